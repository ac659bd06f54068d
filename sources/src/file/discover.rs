//! Finds out the columns of a file, for `pipeline fields`.

use std::collections::HashSet;

use arrow::datatypes::{DataType, Fields as ArrowFields};
use indexmap::IndexMap;
use pipeline::config::{FieldSpec, Fields};
use pipeline::error::{Error, Result};
use pipeline::schema::FieldType;
use pipeline::time::parse_us;
use serde_json::Value;

use super::csv::{Record, Records};
use super::files::DataFile;
use super::window::Line;
use super::{Format, Layout, lines, parquet};

/// Rows looked at: enough to meet the usual exceptions, and read in a moment.
const ROWS_MAX: usize = 1000;

/// The columns of `file`. JSON and CSV tell no types; they are guessed from the first [`ROWS_MAX`] rows.
pub(super) fn fields(layout: &Layout, file: &DataFile) -> Result<Fields> {
    let columns = match layout.format {
        Format::Json => of_json(file)?,
        Format::Csv => of_csv(layout, file)?,
        Format::Parquet => {
            let mut columns = Vec::new();
            of_parquet(parquet::open(file)?.schema().fields(), &mut Vec::new(), &mut columns);
            columns
        }
    };
    if columns.is_empty() {
        return Err(Error::user(format!("`{}` has no columns to find out", file.name)));
    }
    Ok(named(columns))
}

/// A column's path in the file and its type.
type Found = (Vec<String>, FieldType);

/// Gives each column a name that YAML and SQL take as it is, and its path where that differs.
fn named(columns: Vec<Found>) -> Fields {
    let mut fields = IndexMap::new();
    for (path, field_type) in columns {
        let original = path.join(".");
        let plain: String = original.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        let plain = if plain.starts_with(|c: char| c.is_ascii_digit()) { format!("_{plain}") } else { plain };
        let plain = if plain.is_empty() { "_".to_owned() } else { plain };
        let mut numbered = (2..).map(|n| format!("{plain}_{n}"));
        let mut name = plain.clone();
        while fields.contains_key(&name) {
            name = numbered.next().unwrap_or_default();
        }
        let path = (name != original).then_some(path);
        fields.insert(name, FieldSpec { field_type, path });
    }
    Fields(fields)
}

/// What the values of a column have been so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Kind {
    Bool,
    Int,
    Float,
    Timestamp,
    Date,
    Text,
    Nested,
}

fn of_json(file: &DataFile) -> Result<Vec<Found>> {
    let mut window = lines::window(file)?;
    let mut columns: IndexMap<String, HashSet<Kind>> = IndexMap::new();
    for _ in 0..ROWS_MAX {
        let Some(line) = window.line()? else { break };
        let Line::Whole { length, with_end } = line else {
            window.skip_line()?;
            continue;
        };
        // A wrong line is the reader's matter.
        if let Ok(Value::Object(object)) = serde_json::from_slice(&window.bytes()[..length]) {
            for (name, value) in object {
                let kinds = columns.entry(name).or_default();
                kinds.extend(kind_of_json(&value));
            }
        }
        window.consume(with_end);
    }
    // Values of several kinds can only be kept as JSON.
    Ok(columns.into_iter().map(|(name, kinds)| (vec![name], type_of(&kinds, FieldType::Json))).collect())
}

fn kind_of_json(value: &Value) -> Option<Kind> {
    Some(match value {
        Value::Null => return None,
        Value::Bool(_) => Kind::Bool,
        Value::Number(number) if number.is_i64() => Kind::Int,
        Value::Number(_) => Kind::Float,
        Value::String(text) => kind_of_text(text),
        Value::Array(_) | Value::Object(_) => Kind::Nested,
    })
}

fn kind_of_text(text: &str) -> Kind {
    // A day alone: ten characters, four digits first.
    let is_day = text.len() == 10 && text.is_char_boundary(10) && parse_us(&format!("{text}T00:00:00Z")).is_some();
    match parse_us(text) {
        Some(_) => Kind::Timestamp,
        None if is_day => Kind::Date,
        None => Kind::Text,
    }
}

fn of_csv(layout: &Layout, file: &DataFile) -> Result<Vec<Found>> {
    let mut records = Records::open(file, layout.delimiter)?;
    let mut names = if layout.header { records.header()?.unwrap_or_default() } else { Vec::new() };
    let mut columns: Vec<HashSet<Kind>> = vec![HashSet::new(); names.len()];
    for _ in 0..ROWS_MAX {
        // What ends in no record is the reader's matter.
        let Some(Record::Whole { length, cells, .. }) = records.next()? else { break };
        if !layout.header && names.is_empty() {
            names = (1..=cells).map(|number| format!("column_{number}")).collect();
            columns = vec![HashSet::new(); cells];
        }
        for (cell, kinds) in columns.iter_mut().enumerate().take(cells) {
            kinds.extend(kind_of_cell(&String::from_utf8_lossy(records.cell(cell))));
        }
        records.consume(length);
    }
    Ok(names.into_iter().zip(columns).map(|(name, kinds)| (vec![name], type_of(&kinds, FieldType::String))).collect())
}

fn kind_of_cell(text: &str) -> Option<Kind> {
    let text = text.trim();
    // `007` is rather a code than a number, and `nan` rather a name.
    let is_code = text.len() > 1 && text.starts_with('0') && text.bytes().all(|byte| byte.is_ascii_digit());
    Some(match text {
        "" => return None,
        "true" | "false" | "True" | "False" | "TRUE" | "FALSE" => Kind::Bool,
        _ if is_code => Kind::Text,
        _ if text.parse::<i64>().is_ok() => Kind::Int,
        _ if text.parse::<f64>().is_ok_and(f64::is_finite) => Kind::Float,
        _ => kind_of_text(text),
    })
}

/// The one type that holds all values seen; `mixed` if there is none, text if there was no value.
fn type_of(kinds: &HashSet<Kind>, mixed: FieldType) -> FieldType {
    let only = |allowed: &[Kind]| kinds.iter().all(|kind| allowed.contains(kind));
    match () {
        () if kinds.is_empty() => FieldType::String,
        () if only(&[Kind::Bool]) => FieldType::Bool,
        () if only(&[Kind::Int]) => FieldType::Int,
        () if only(&[Kind::Int, Kind::Float]) => FieldType::Float,
        () if only(&[Kind::Timestamp]) => FieldType::Timestamp(None),
        () if only(&[Kind::Date]) => FieldType::Date,
        () if only(&[Kind::Text, Kind::Timestamp, Kind::Date]) => FieldType::String,
        () if only(&[Kind::Nested]) => FieldType::Json,
        () => mixed,
    }
}

/// The columns that can be read, those of structs by their paths. Lists and maps cannot.
fn of_parquet(fields: &ArrowFields, path: &mut Vec<String>, found: &mut Vec<Found>) {
    for field in fields {
        path.push(field.name().clone());
        if let DataType::Struct(below) = field.data_type() {
            of_parquet(below, path, found);
        } else if let Some(field_type) = type_of_arrow(field.data_type()) {
            found.push((path.clone(), field_type));
        }
        path.pop();
    }
}

fn type_of_arrow(data_type: &DataType) -> Option<FieldType> {
    Some(match data_type {
        DataType::Dictionary(_, value) => return type_of_arrow(value),
        DataType::Boolean => FieldType::Bool,
        DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Null => FieldType::String,
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView | DataType::FixedSizeBinary(_) => {
            FieldType::Bytes
        }
        DataType::Timestamp(..) => FieldType::Timestamp(None),
        DataType::Date32 | DataType::Date64 => FieldType::Date,
        DataType::Decimal32(precision, scale)
        | DataType::Decimal64(precision, scale)
        | DataType::Decimal128(precision, scale)
            if *scale >= 0 =>
        {
            FieldType::Decimal(*precision, *scale)
        }
        other if other.is_integer() => FieldType::Int,
        other if other.is_floating() => FieldType::Float,
        _ => return None,
    })
}
