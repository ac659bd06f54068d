//! From messages and cells to Arrow columns: the declared fields are read straight into column builders.
//!
//! A row is taken whole or not at all: a wrong cell gives an error that names the field, and the columns stay
//! equally long.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use arrow::array::{
    ArrayBuilder, ArrayRef, BinaryBuilder, BooleanBuilder, Date32Builder, Decimal128Builder, Float64Builder,
    Int64Builder, RecordBatch, StringBuilder, TimestampMicrosecondBuilder,
};
use arrow::datatypes::{Schema, SchemaRef};
use chrono::{Datelike, NaiveDate};
use hashbrown::HashMap;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use crate::config::Fields;
use crate::error::Result;
use crate::schema::FieldType;
use crate::time::parse_us;

/// Days from 0001-01-01 to 1970-01-01, as chrono counts them.
const EPOCH_DAYS_FROM_CE: i32 = 719_163;

/// One value on its way into a column.
#[derive(Clone, Debug, PartialEq)]
pub enum Cell<'a> {
    /// Missing.
    Null,
    /// true or false.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number with a fraction, or beyond `i64`.
    Float(f64),
    /// A JSON number with a fraction, or beyond `i64`, in its own digits: a float would cut those of a decimal.
    Number(&'a str),
    /// Text from a typed format (a JSON string): a number in quotes is not a number.
    Text(Cow<'a, str>),
    /// Text from a format without types (CSV, Redis): read as whatever the field says.
    Untyped(&'a str),
    /// Raw bytes.
    Bytes(&'a [u8]),
    /// A JSON object or array as text.
    Json(Cow<'a, str>),
    /// Microseconds since 1970 UTC.
    Time(i64),
}

impl fmt::Display for Cell<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::Int(value) => write!(f, "{value}"),
            Self::Float(value) => write!(f, "{value}"),
            Self::Number(text) => f.write_str(short(text)),
            Self::Text(text) => write!(f, "\"{}\"", short(text)),
            Self::Untyped(text) => write!(f, "`{}`", short(text)),
            Self::Bytes(bytes) => write!(f, "{} bytes", bytes.len()),
            Self::Json(text) => f.write_str(short(text)),
            Self::Time(us) => f.write_str(&crate::time::format_us(*us)),
        }
    }
}

/// The first characters of a long text, for messages.
fn short(text: &str) -> &str {
    text.char_indices().nth(60).map_or(text, |(end, _)| &text[..end])
}

/// A cell converted to its column's type, before the row is taken.
#[derive(Clone, Debug)]
enum Ready<'a> {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(Cow<'a, str>),
    Bytes(Cow<'a, [u8]>),
    Day(i32),
    Decimal(i128),
}

/// Builds batches of one schema row by row.
pub struct RowsBuilder {
    schema: SchemaRef,
    names: Vec<String>,
    types: Vec<FieldType>,
    columns: Vec<Column>,
    paths: Paths,
    rows: usize,
    /// Memory of the row taken last, empty, for the next one: the hot loop allocates no row.
    spare: Vec<Ready<'static>>,
}

/// A row being put together: one cell per column, null at first.
pub struct Row<'a> {
    cells: Vec<Ready<'a>>,
}

impl RowsBuilder {
    /// For `extra` columns, which the source sets itself, followed by `fields`, which JSON messages fill.
    pub fn new(extra: &[(&str, FieldType)], fields: &Fields) -> Self {
        let mut names: Vec<String> = extra.iter().map(|(name, _)| (*name).to_owned()).collect();
        let mut types: Vec<FieldType> = extra.iter().map(|(_, t)| *t).collect();
        let mut paths = Paths::default();
        for (name, spec) in &fields.0 {
            match &spec.path {
                Some(path) => paths.add(path, names.len(), spec.field_type),
                None => paths.add(std::slice::from_ref(name), names.len(), spec.field_type),
            }
            names.push(name.clone());
            types.push(spec.field_type);
        }
        let arrow_fields: Vec<_> = names.iter().zip(&types).map(|(name, t)| t.field(name)).collect();
        let columns = types.iter().map(|t| Column::new(*t)).collect();
        Self { schema: Arc::new(Schema::new(arrow_fields)), names, types, columns, paths, rows: 0, spare: Vec::new() }
    }

    /// The schema of the batches.
    pub fn schema(&self) -> &SchemaRef {
        &self.schema
    }

    /// Rows taken since the last [`Self::finish`].
    pub fn len(&self) -> usize {
        self.rows
    }

    /// Whether no row was taken since the last [`Self::finish`].
    pub fn is_empty(&self) -> bool {
        self.rows == 0
    }

    /// A row of nulls, in the memory of the row that was taken or discarded last.
    pub fn row<'a>(&mut self) -> Row<'a> {
        let mut cells: Vec<Ready<'a>> = std::mem::take(&mut self.spare);
        cells.resize(self.columns.len(), Ready::Null);
        Row { cells }
    }

    /// A row of nulls in memory of its own: for one who shares the builder and only asks [`Self::set_json`]
    /// whether messages are right. It may be set again and again, but keeps what no later message sets.
    pub fn row_apart<'a>(&self) -> Row<'a> {
        Row { cells: vec![Ready::Null; self.columns.len()] }
    }

    /// Sets one cell, converted to the column's type.
    pub fn set<'a>(&self, row: &mut Row<'a>, column: usize, cell: Cell<'a>) -> Result<(), String> {
        row.cells[column] = convert(self.types[column], cell).map_err(|wrong| self.field_error(column, &wrong))?;
        Ok(())
    }

    /// Sets the cells of all `fields` from one JSON object. A missing name stays null; unknown names are skipped.
    pub fn set_json<'a>(&self, row: &mut Row<'a>, message: &'a [u8]) -> Result<(), String> {
        let text = std::str::from_utf8(message).map_err(|e| format!("not UTF-8: {e}"))?;
        let mut json = serde_json::Deserializer::from_str(text);
        let seed = ObjectSeed { paths: &self.paths, builder: self, row };
        seed.deserialize(&mut json).and_then(|()| json.end()).map_err(|e| json_message(&e))
    }

    /// Whether these columns of the row are set, or which one is null.
    pub fn require(&self, row: &Row<'_>, columns: &[usize]) -> Result<(), String> {
        match columns.iter().find(|column| matches!(row.cells[**column], Ready::Null)) {
            Some(column) => Err(self.field_error(*column, "required, but missing or null")),
            None => Ok(()),
        }
    }

    /// Takes the row.
    pub fn push(&mut self, mut row: Row<'_>) {
        for (column, cell) in self.columns.iter_mut().zip(row.cells.drain(..)) {
            column.append(cell);
        }
        self.rows += 1;
        self.spare = emptied(row.cells);
    }

    /// Gives the memory of a row that is not taken back for the next one. Dropping the row is right too.
    pub fn discard(&mut self, row: Row<'_>) {
        self.spare = emptied(row.cells);
    }

    /// Takes one JSON object as a row, or says why not.
    pub fn push_json(&mut self, message: &[u8]) -> Result<(), String> {
        let mut row = self.row();
        match self.set_json(&mut row, message) {
            Ok(()) => self.push(row),
            Err(wrong) => {
                self.discard(row);
                return Err(wrong);
            }
        }
        Ok(())
    }

    /// The rows taken so far; the builder starts anew.
    pub fn finish(&mut self) -> Result<RecordBatch> {
        let rows = std::mem::take(&mut self.rows);
        let columns: Vec<ArrayRef> = self.columns.iter_mut().map(Column::finish).collect();
        let options = arrow::array::RecordBatchOptions::new().with_row_count(Some(rows));
        Ok(RecordBatch::try_new_with_options(Arc::clone(&self.schema), columns, &options)?)
    }

    fn field_error(&self, column: usize, wrong: &str) -> String {
        format!("field `{}`: {wrong}", self.names[column])
    }
}

/// The same memory with no cell in it, for cells of any lifetime: collecting a vector's own iterator into items
/// of the same layout reuses its allocation.
fn emptied<'a>(mut cells: Vec<Ready<'_>>) -> Vec<Ready<'a>> {
    cells.clear();
    cells.into_iter().map(|_| Ready::Null).collect()
}

/// serde_json's message without its line, which is always 1.
fn json_message(error: &serde_json::Error) -> String {
    let text = error.to_string();
    if error.is_data() {
        return text.split(" at line ").next().unwrap_or(&text).to_owned();
    }
    format!("malformed JSON: {text}")
}

/// The tree of names under which fields lie in a message.
#[derive(Debug, Default)]
struct Paths {
    names: HashMap<String, PathNode>,
}

#[derive(Debug, Default)]
struct PathNode {
    columns: Vec<usize>,
    below: Paths,
    /// Whether the value's own text is needed: something lies below it, a column keeps it as JSON, or a column takes
    /// numbers with a fraction, which serde_json's own floats miss by one digit in the 17th place.
    needs_text: bool,
}

impl Paths {
    fn add(&mut self, path: &[String], column: usize, field_type: FieldType) {
        let Some((first, rest)) = path.split_first() else { return };
        let node = self.names.entry(first.clone()).or_default();
        let has_fraction =
            matches!(field_type, FieldType::Float | FieldType::Decimal(..) | FieldType::Timestamp(Some(_)));
        node.needs_text |= !rest.is_empty() || has_fraction || field_type == FieldType::Json;
        if rest.is_empty() {
            node.columns.push(column);
        } else {
            node.below.add(rest, column, field_type);
        }
    }
}

/// Reads one JSON object into the row.
struct ObjectSeed<'b, 'r, 'a> {
    paths: &'b Paths,
    builder: &'b RowsBuilder,
    row: &'r mut Row<'a>,
}

impl<'de: 'a, 'a> DeserializeSeed<'de> for ObjectSeed<'_, '_, 'a> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de: 'a, 'a> Visitor<'de> for ObjectSeed<'_, '_, 'a> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<M: MapAccess<'de>>(mut self, mut map: M) -> Result<(), M::Error> {
        while let Some(name) = map.next_key::<Name<'de>>()? {
            let Some(node) = self.paths.names.get(&*name.0) else {
                map.next_value::<IgnoredAny>()?;
                continue;
            };
            if node.needs_text {
                let raw: &'de RawValue = map.next_value()?;
                self.set_raw(node, raw.get()).map_err(serde::de::Error::custom)?;
            } else {
                let cell = map.next_value_seed(CellSeed)?;
                let Some((&last, others)) = node.columns.split_last() else { continue };
                for &column in others {
                    self.builder.set(self.row, column, cell.clone()).map_err(serde::de::Error::custom)?;
                }
                self.builder.set(self.row, last, cell).map_err(serde::de::Error::custom)?;
            }
        }
        Ok(())
    }
}

impl<'a> ObjectSeed<'_, '_, 'a> {
    /// Sets the columns that lie at or below `node` from the JSON text of its value.
    fn set_raw(&mut self, node: &PathNode, text: &'a str) -> Result<(), String> {
        for &column in &node.columns {
            let cell = match text.as_bytes().first() {
                Some(b'{' | b'[') => Cell::Json(Cow::Borrowed(text)),
                // Any JSON value is JSON: a `json` field keeps `"text"` with its quotes.
                _ if self.builder.types[column] == FieldType::Json && text != "null" => Cell::Json(Cow::Borrowed(text)),
                _ => scalar(text)?,
            };
            self.builder.set(self.row, column, cell)?;
        }
        if !node.below.names.is_empty() && text.starts_with('{') {
            let below = ObjectSeed { paths: &node.below, builder: self.builder, row: &mut *self.row };
            below.deserialize(&mut serde_json::Deserializer::from_str(text)).map_err(|e| json_message(&e))?;
        }
        Ok(())
    }
}

/// A JSON scalar as a cell.
fn scalar(text: &str) -> Result<Cell<'_>, String> {
    if text.starts_with(|c: char| c == '-' || c.is_ascii_digit()) {
        return Ok(text.parse().map_or(Cell::Number(text), Cell::Int));
    }
    CellSeed.deserialize(&mut serde_json::Deserializer::from_str(text)).map_err(|e| json_message(&e))
}

/// A key, borrowed from the message unless it holds escapes.
struct Name<'a>(Cow<'a, str>);

impl<'de> serde::Deserialize<'de> for Name<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NameVisitor;
        impl<'de> Visitor<'de> for NameVisitor {
            type Value = Name<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name")
            }
            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Name<'de>, E> {
                Ok(Name(Cow::Borrowed(text)))
            }
            fn visit_str<E>(self, text: &str) -> Result<Name<'de>, E> {
                Ok(Name(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(NameVisitor)
    }
}

/// Reads one JSON scalar; an object or array becomes an empty [`Cell::Json`], which only `json` columns take
/// and which they never get this way.
struct CellSeed;

impl<'de> DeserializeSeed<'de> for CellSeed {
    type Value = Cell<'de>;
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Cell<'de>, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for CellSeed {
    type Value = Cell<'de>;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }
    fn visit_unit<E>(self) -> Result<Cell<'de>, E> {
        Ok(Cell::Null)
    }
    fn visit_bool<E>(self, value: bool) -> Result<Cell<'de>, E> {
        Ok(Cell::Bool(value))
    }
    fn visit_i64<E>(self, value: i64) -> Result<Cell<'de>, E> {
        Ok(Cell::Int(value))
    }
    fn visit_u64<E>(self, value: u64) -> Result<Cell<'de>, E> {
        Ok(i64::try_from(value).map_or(Cell::Float(value as f64), Cell::Int))
    }
    fn visit_f64<E>(self, value: f64) -> Result<Cell<'de>, E> {
        Ok(Cell::Float(value))
    }
    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Cell<'de>, E> {
        Ok(Cell::Text(Cow::Borrowed(text)))
    }
    fn visit_str<E>(self, text: &str) -> Result<Cell<'de>, E> {
        Ok(Cell::Text(Cow::Owned(text.to_owned())))
    }
    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Cell<'de>, M::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Cell::Json(Cow::Borrowed("an object")))
    }
    fn visit_seq<S: SeqAccess<'de>>(self, mut items: S) -> Result<Cell<'de>, S::Error> {
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Cell::Json(Cow::Borrowed("an array")))
    }
}

/// A cell as its column's type wants it.
fn convert<'a>(field_type: FieldType, cell: Cell<'a>) -> Result<Ready<'a>, String> {
    if let Cell::Untyped(text) = cell {
        return untyped(field_type, text);
    }
    if let Cell::Number(text) = cell {
        return number(field_type, text);
    }
    let wrong = |cell: &Cell<'_>| format!("expected {field_type}, found {cell}");
    Ok(match (field_type, cell) {
        (_, Cell::Null) => Ready::Null,
        (FieldType::String, Cell::Text(text) | Cell::Json(text)) => Ready::Text(text),
        (FieldType::Json, Cell::Json(text)) => Ready::Text(text),
        (FieldType::Json, Cell::Text(text)) => Ready::Text(crate::json::json_string(&text).into()),
        (FieldType::Json, cell @ (Cell::Bool(_) | Cell::Int(_) | Cell::Float(_))) => {
            Ready::Text(cell.to_string().into())
        }
        (FieldType::Int, Cell::Int(value)) => Ready::Int(value),
        // A JSON writer may print 5 as 5.0.
        (FieldType::Int, Cell::Float(value)) if value.fract() == 0.0 && value.abs() < 9.007_199_254_740_992e15 => {
            Ready::Int(value as i64)
        }
        (FieldType::Float, Cell::Float(value)) => Ready::Float(value),
        (FieldType::Float, Cell::Int(value)) => Ready::Float(value as f64),
        (FieldType::Bool, Cell::Bool(value)) => Ready::Bool(value),
        (FieldType::Timestamp(_), Cell::Time(us)) => Ready::Int(us),
        (FieldType::Timestamp(_), Cell::Text(text)) => {
            Ready::Int(parse_us(&text).ok_or_else(|| wrong(&Cell::Text(text)))?)
        }
        (FieldType::Timestamp(Some(unit)), cell @ Cell::Int(value)) => {
            Ready::Int(unit.to_us(value).ok_or_else(|| wrong(&cell))?)
        }
        (FieldType::Timestamp(Some(unit)), cell @ Cell::Float(value)) => {
            Ready::Int(unit.float_to_us(value).ok_or_else(|| wrong(&cell))?)
        }
        (FieldType::Timestamp(None), cell @ (Cell::Int(_) | Cell::Float(_))) => {
            return Err(format!("{}; for numbers say the unit: `timestamp_ms`, `timestamp_s`, …", wrong(&cell)));
        }
        (FieldType::Date, Cell::Text(text)) => day(&text).ok_or_else(|| wrong(&Cell::Text(text)))?,
        (FieldType::Decimal(precision, scale), cell @ (Cell::Text(_) | Cell::Int(_) | Cell::Float(_))) => {
            let text = match &cell {
                Cell::Text(text) => text.to_string(),
                other => other.to_string(),
            };
            decimal(&text, precision, scale).ok_or_else(|| wrong(&cell))?
        }
        (FieldType::Bytes, Cell::Bytes(bytes)) => Ready::Bytes(Cow::Borrowed(bytes)),
        (FieldType::Bytes, Cell::Text(text)) => Ready::Bytes(match text {
            Cow::Borrowed(text) => Cow::Borrowed(text.as_bytes()),
            Cow::Owned(text) => Cow::Owned(text.into_bytes()),
        }),
        (FieldType::String, Cell::Bytes(bytes)) => {
            Ready::Text(std::str::from_utf8(bytes).map_err(|e| format!("not UTF-8: {e}"))?.into())
        }
        (_, cell) => return Err(wrong(&cell)),
    })
}

/// A JSON number that is no `i64`.
fn number<'a>(field_type: FieldType, text: &'a str) -> Result<Ready<'a>, String> {
    let wrong = || format!("expected {field_type}, found {}", Cell::Number(text));
    match field_type {
        FieldType::Decimal(precision, scale) => decimal(text, precision, scale).ok_or_else(wrong),
        _ => match text.parse::<f64>() {
            Ok(value) if value.is_finite() => convert(field_type, Cell::Float(value)),
            _ => Err(wrong()),
        },
    }
}

/// Text of a format without types. Empty text is null, but for string, bytes.
fn untyped(field_type: FieldType, text: &str) -> Result<Ready<'_>, String> {
    let wrong = || format!("expected {field_type}, found {}", Cell::Untyped(text));
    let trimmed = text.trim();
    if trimmed.is_empty() && !matches!(field_type, FieldType::String | FieldType::Bytes) {
        return Ok(Ready::Null);
    }
    Ok(match field_type {
        FieldType::String => Ready::Text(Cow::Borrowed(text)),
        FieldType::Bytes => Ready::Bytes(Cow::Borrowed(text.as_bytes())),
        FieldType::Json => {
            serde_json::from_str::<&RawValue>(trimmed).map_err(|e| format!("malformed JSON: {e}"))?;
            Ready::Text(Cow::Borrowed(text))
        }
        FieldType::Int => Ready::Int(trimmed.parse().map_err(|_| wrong())?),
        FieldType::Float => Ready::Float(trimmed.parse().map_err(|_| wrong())?),
        FieldType::Bool => match trimmed {
            "true" | "TRUE" | "True" | "t" | "1" => Ready::Bool(true),
            "false" | "FALSE" | "False" | "f" | "0" => Ready::Bool(false),
            _ => return Err(wrong()),
        },
        FieldType::Timestamp(unit) => match (unit, trimmed.parse::<i64>(), trimmed.parse::<f64>()) {
            (Some(unit), Ok(value), _) => Ready::Int(unit.to_us(value).ok_or_else(wrong)?),
            (Some(unit), Err(_), Ok(value)) => Ready::Int(unit.float_to_us(value).ok_or_else(wrong)?),
            _ => Ready::Int(parse_us(trimmed).ok_or_else(wrong)?),
        },
        FieldType::Date => day(trimmed).ok_or_else(wrong)?,
        FieldType::Decimal(precision, scale) => decimal(trimmed, precision, scale).ok_or_else(wrong)?,
    })
}

fn day(text: &str) -> Option<Ready<'static>> {
    let date = NaiveDate::parse_from_str(text.get(..10)?, "%Y-%m-%d").ok()?;
    (text.len() == 10 || parse_us(text).is_some()).then(|| Ready::Day(date.num_days_from_ce() - EPOCH_DAYS_FROM_CE))
}

/// Reads a decimal, with an exponent or not; digits finer than `scale` are cut. Arrow's own parser counts in bytes and
/// wraps around: long texts would give a wrong number.
fn decimal(text: &str, precision: u8, scale: i8) -> Option<Ready<'static>> {
    let (number, exponent) = match text.split_once(['e', 'E']) {
        Some((number, exponent)) => (number, exponent.parse::<i32>().ok()?),
        None => (text, 0),
    };
    let (sign, digits) = match number.strip_prefix('-') {
        Some(digits) => (-1, digits),
        None => (1, number.strip_prefix('+').unwrap_or(number)),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    let count = whole.len() + fraction.len();
    // How many of the digits, or zeros after them, the column keeps.
    let kept = whole.len() as i64 + i64::from(exponent) + i64::from(scale);
    let mut value = 0i128;
    for (index, byte) in whole.bytes().chain(fraction.bytes()).enumerate() {
        let digit = byte.is_ascii_digit().then(|| i128::from(byte - b'0'))?;
        if (index as i64) < kept {
            value = value.checked_mul(10)?.checked_add(digit)?;
        }
    }
    if value != 0 {
        for _ in count as i64..kept {
            value = value.checked_mul(10)?; // at most 38 times
        }
    }
    let limit = 10i128.checked_pow(u32::from(precision))?;
    (count > 0 && value < limit).then_some(Ready::Decimal(sign * value))
}

/// A column under construction.
enum Column {
    Text(StringBuilder),
    Int(Int64Builder),
    Float(Float64Builder),
    Bool(BooleanBuilder),
    Time(TimestampMicrosecondBuilder),
    Day(Date32Builder),
    Decimal(Decimal128Builder),
    Bytes(BinaryBuilder),
}

impl Column {
    fn new(field_type: FieldType) -> Self {
        match field_type {
            FieldType::String | FieldType::Json => Self::Text(StringBuilder::new()),
            FieldType::Int => Self::Int(Int64Builder::new()),
            FieldType::Float => Self::Float(Float64Builder::new()),
            FieldType::Bool => Self::Bool(BooleanBuilder::new()),
            FieldType::Timestamp(_) => {
                Self::Time(TimestampMicrosecondBuilder::new().with_data_type(field_type.data_type()))
            }
            FieldType::Date => Self::Day(Date32Builder::new()),
            FieldType::Decimal(..) => Self::Decimal(Decimal128Builder::new().with_data_type(field_type.data_type())),
            FieldType::Bytes => Self::Bytes(BinaryBuilder::new()),
        }
    }

    /// Appends a cell that [`convert`] made for this column's type; any other pair would be null.
    fn append(&mut self, cell: Ready<'_>) {
        match (self, cell) {
            (Self::Text(builder), Ready::Text(text)) => builder.append_value(text),
            (Self::Int(builder), Ready::Int(value)) => builder.append_value(value),
            (Self::Float(builder), Ready::Float(value)) => builder.append_value(value),
            (Self::Bool(builder), Ready::Bool(value)) => builder.append_value(value),
            (Self::Time(builder), Ready::Int(us)) => builder.append_value(us),
            (Self::Day(builder), Ready::Day(day)) => builder.append_value(day),
            (Self::Decimal(builder), Ready::Decimal(value)) => builder.append_value(value),
            (Self::Bytes(builder), Ready::Bytes(bytes)) => builder.append_value(bytes),
            (Self::Text(builder), _) => builder.append_null(),
            (Self::Int(builder), _) => builder.append_null(),
            (Self::Float(builder), _) => builder.append_null(),
            (Self::Bool(builder), _) => builder.append_null(),
            (Self::Time(builder), _) => builder.append_null(),
            (Self::Day(builder), _) => builder.append_null(),
            (Self::Decimal(builder), _) => builder.append_null(),
            (Self::Bytes(builder), _) => builder.append_null(),
        }
    }

    fn finish(&mut self) -> ArrayRef {
        let builder: &mut dyn ArrayBuilder = match self {
            Self::Text(builder) => builder,
            Self::Int(builder) => builder,
            Self::Float(builder) => builder,
            Self::Bool(builder) => builder,
            Self::Time(builder) => builder,
            Self::Day(builder) => builder,
            Self::Decimal(builder) => builder,
            Self::Bytes(builder) => builder,
        };
        builder.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::FieldSpec;
    use crate::json::encode_rows;

    fn fields(list: &[(&str, &str, Option<&str>)]) -> Fields {
        let spec = |t: &str, path: &Option<&str>| FieldSpec {
            field_type: t.parse().expect("type"),
            path: path.map(|p| p.split('.').map(str::to_owned).collect()),
        };
        Fields(list.iter().map(|(name, t, path)| ((*name).to_owned(), spec(t, path))).collect())
    }

    #[test]
    fn json_messages_fill_declared_fields_and_wrong_ones_leave_the_columns_whole() {
        let fields = fields(&[
            ("n", "int", None),
            ("x", "float", Some("a.b.x")),
            ("whole", "json", Some("a")),
            ("t", "timestamp_ms", None),
            ("price", "decimal(10,2)", None),
            ("day", "date", None),
        ]);
        let mut builder = RowsBuilder::new(&[("topic", FieldType::String)], &fields);
        let good = [
            r#"{"n":1,"a":{"b":{"x":2}},"t":1700000000000,"price":"12.50","day":"2026-11-20","other":[1,{"n":2}]}"#,
            r#"{"n":5.0,"a":{"b":1},"t":"2026-11-20T12:00:00Z","price":3.1}"#,
            "{}",
        ];
        for message in good {
            assert_eq!(builder.push_json(message.as_bytes()), Ok(()), "{message}");
        }
        for (message, expected) in [
            (r#"{"n":"1"}"#, "field `n`: expected int, found \"1\""),
            (r#"{"n":1.5}"#, "field `n`: expected int, found 1.5"),
            (r#"{"x":1,"a":{"b":{"x":"fast"}}}"#, "field `x`: expected float, found \"fast\""),
            (r#"{"n":1"#, "malformed JSON"),
            (r#"{"n":1} x"#, "malformed JSON"),
            ("[1]", "invalid type: sequence, expected a JSON object"),
            (r#"{"n":{"a":1}}"#, "field `n`: expected int, found an object"),
            (r#"{"price":"1e"}"#, "field `price`"),
        ] {
            let error = builder.push_json(message.as_bytes()).expect_err(message);
            assert!(error.starts_with(expected), "{message}: {error}");
        }
        let rows = encode_rows(&builder.finish().expect("rows"));
        assert_eq!(
            rows.iter().collect::<Vec<_>>(),
            [
                r#"{"topic":null,"n":1,"x":2.0,"whole":{"b":{"x":2}},"t":"2023-11-14T22:13:20.000Z","price":"12.50","day":"2026-11-20"}"#,
                r#"{"topic":null,"n":5,"x":null,"whole":{"b":1},"t":"2026-11-20T12:00:00.000Z","price":"3.10","day":null}"#,
                r#"{"topic":null,"n":null,"x":null,"whole":null,"t":null,"price":null,"day":null}"#,
            ]
        );
    }

    #[test]
    fn json_numbers_keep_all_their_digits() {
        let fields = fields(&[
            ("x", "float", None),
            ("exact", "decimal(38,10)", None),
            ("t", "timestamp_s", None),
            ("below", "float", Some("a.b")),
        ]);
        let long = format!(r#"{{"exact":1{}}}"#, "0".repeat(300));
        for (message, expected) in [
            // Floats that serde_json's fast path misses by one in the last place.
            (
                r#"{"x":27.834380695266482,"a":{"b":10.646881380260416}}"#,
                r#""x":27.834380695266482,"exact":null,"t":null,"below":10.646881380260416"#,
            ),
            (
                r#"{"exact":1234567890123456789012345678.0123456789}"#,
                r#""exact":"1234567890123456789012345678.0123456789""#,
            ),
            (r#"{"exact":18446744073709551615}"#, r#""exact":"18446744073709551615.0000000000""#),
            (r#"{"exact":-2.5e3}"#, r#""exact":"-2500.0000000000""#),
            (r#"{"t":1795171220.123457}"#, r#""t":"2026-11-20T10:40:20.123457Z""#),
            (r#"{"x":1e400}"#, "expected float, found 1e400"),
            (r#"{"exact":1e99999}"#, "expected decimal(38,10), found 1e99999"),
            (&long, "expected decimal(38,10), found 1000"),
        ] {
            let mut builder = RowsBuilder::new(&[], &fields);
            let found = match builder.push_json(message.as_bytes()) {
                Ok(()) => encode_rows(&builder.finish().expect("rows")).row(0).to_owned(),
                Err(wrong) => wrong,
            };
            assert!(found.contains(expected), "{message}: {found}");
        }
    }

    #[test]
    fn decimals_are_read_exactly_or_not_at_all() {
        for (text, expected) in [
            ("0", Some(0)),
            ("-12.5", Some(-12_500)),
            ("+.5", Some(500)),
            ("7.", Some(7_000)),
            ("1.23456", Some(1_234)),
            ("-0.0009", Some(0)),
            ("1.5e3", Some(1_500_000)),
            ("15E-1", Some(1_500)),
            ("1e-999999", Some(0)),
            ("0e999999", Some(0)),
            ("00000000000000000000000000000000000000000000000001", Some(1_000)),
            ("999999.999", Some(999_999_999)),
            ("1000000", None),
            ("1e6", None),
            ("1e999999", None),
            ("123456789012345678901234567890123456789012345678901234567890e-58", Some(12_345)),
            ("", None),
            (".", None),
            ("-", None),
            ("e5", None),
            ("1e", None),
            ("1e99999999999", None),
            ("1,5", None),
            ("--1", None),
            ("1.2.3", None),
            ("NaN", None),
        ] {
            let found = decimal(text, 9, 3).map(|ready| match ready {
                Ready::Decimal(value) => value,
                other => panic!("{text}: {other:?}"),
            });
            assert_eq!(found, expected, "{text}");
        }
        assert!(decimal(&"9".repeat(38), 38, 0).is_some());
        assert!(decimal(&"9".repeat(39), 38, 0).is_none());
        assert!(decimal(&format!("1{}", "0".repeat(300)), 38, 0).is_none());
    }

    #[test]
    fn rows_reuse_the_memory_of_the_row_before() {
        let mut builder = RowsBuilder::new(&[], &fields(&[("a", "string", None), ("b", "int", None)]));
        let first = builder.row();
        let memory = first.cells.as_ptr() as usize;
        builder.push(first);
        for text in ["x", "y"] {
            let text = text.to_owned(); // each row borrows from a message of its own
            let mut row = builder.row();
            assert_eq!(row.cells.as_ptr() as usize, memory);
            assert_eq!(builder.set(&mut row, 0, Cell::Text(Cow::Borrowed(&text))), Ok(()));
            builder.push(row);
            let mut wrong = builder.row();
            assert!(builder.set(&mut wrong, 1, Cell::Bool(true)).is_err());
            builder.discard(wrong);
        }
        let rows = encode_rows(&builder.finish().expect("rows"));
        let expected = [r#"{"a":null,"b":null}"#, r#"{"a":"x","b":null}"#, r#"{"a":"y","b":null}"#];
        assert_eq!(rows.iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn untyped_text_is_read_as_the_field_says() {
        for (field_type, text, expected) in [
            ("int", " 5 ", r#"{"v":5}"#),
            ("float", "1e3", r#"{"v":1000.0}"#),
            ("bool", "t", r#"{"v":true}"#),
            ("string", "", r#"{"v":""}"#),
            ("int", "", r#"{"v":null}"#),
            ("timestamp_s", "1.5", r#"{"v":"1970-01-01T00:00:01.500Z"}"#),
            ("json", "[1]", r#"{"v":[1]}"#),
        ] {
            let mut builder = RowsBuilder::new(&[], &fields(&[("v", field_type, None)]));
            let mut row = builder.row();
            assert_eq!(builder.set(&mut row, 0, Cell::Untyped(text)), Ok(()), "{text}");
            builder.push(row);
            assert_eq!(encode_rows(&builder.finish().expect("rows")).row(0), expected);
        }
    }
}
