//! The rows of a query as text: a table for people, JSON and CSV for programs.

use std::fmt::Write;
use std::str::FromStr;

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema};

use super::QueryResult;
use crate::json::{JsonRows, encode_rows};
use crate::schema::is_json;

/// How rows are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// See [`table`].
    #[default]
    Table,
    /// See [`json`].
    Json,
    /// See [`csv`].
    Csv,
}

impl Format {
    /// Writes `result` in this format.
    pub fn write(self, result: &QueryResult) -> String {
        match self {
            Self::Table => table(result),
            Self::Json => json(result),
            Self::Csv => csv(result),
        }
    }

    /// The content type of an HTTP answer.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Table => "text/plain; charset=utf-8",
            Self::Json => "application/json",
            Self::Csv => "text/csv; charset=utf-8",
        }
    }
}

impl FromStr for Format {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "table" => Ok(Self::Table),
            "json" => Ok(Self::Json),
            "csv" => Ok(Self::Csv),
            _ => Err(format!("unknown format `{text}`; one of `table`, `json`, `csv`")),
        }
    }
}

/// One JSON array of row objects, a row per line, values as in live frames.
pub fn json(result: &QueryResult) -> String {
    let mut out = String::from("[");
    let mut separator = "\n";
    for batch in &result.batches {
        for row in encode_rows(batch).iter() {
            out.push_str(separator);
            out.push_str(row);
            separator = ",\n";
        }
    }
    out.push_str(if result.rows() == 0 { "]\n" } else { "\n]\n" });
    out
}

/// A header and a line per row, as RFC 4180 has it except that a line ends with `\n` alone. Null is nothing,
/// the empty text `""`; timestamps are RFC 3339, bytes base64, `json` and nested columns JSON.
pub fn csv(result: &QueryResult) -> String {
    let mut out = String::new();
    let header: Vec<String> = result.schema.fields().iter().map(|f| csv_cell(Some(f.name()))).collect();
    out.push_str(&header.join(","));
    out.push('\n');
    for batch in &result.batches {
        let cells = Cells::new(batch);
        for row in 0..batch.num_rows() {
            for column in 0..cells.columns.len() {
                if column > 0 {
                    out.push(',');
                }
                out.push_str(&csv_cell(cells.text(column, row)));
            }
            out.push('\n');
        }
    }
    out
}

fn csv_cell(text: Option<&str>) -> String {
    match text {
        None => String::new(),
        Some(text) if text.is_empty() || text.contains([',', '"', '\n', '\r']) => {
            format!("\"{}\"", text.replace('"', "\"\""))
        }
        Some(text) => text.to_owned(),
    }
}

/// Columns side by side under their names, and the number of rows. Null is `NULL`; numbers stand on the right.
pub fn table(result: &QueryResult) -> String {
    let names: Vec<String> = result.schema.fields().iter().map(|f| one_line(f.name())).collect();
    let right: Vec<bool> = result.schema.fields().iter().map(|f| f.data_type().is_numeric()).collect();
    let mut lines: Vec<Vec<String>> = Vec::with_capacity(result.rows());
    for batch in &result.batches {
        let cells = Cells::new(batch);
        lines.extend(
            (0..batch.num_rows()).map(|row| {
                (0..names.len()).map(|column| one_line(cells.text(column, row).unwrap_or("NULL"))).collect()
            }),
        );
    }
    let width = |column: usize| {
        lines.iter().map(|line| line[column].chars().count()).chain([names[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..names.len()).map(width).collect();
    let mut out = String::new();
    let rule = widths.iter().map(|width| "-".repeat(width + 2)).collect::<Vec<_>>().join("+");
    write_line(&mut out, &names, &widths, &right);
    let _ = writeln!(out, "{rule}");
    for line in &lines {
        write_line(&mut out, line, &widths, &right);
    }
    let _ = writeln!(out, "({} {})", lines.len(), if lines.len() == 1 { "row" } else { "rows" });
    out
}

fn write_line(out: &mut String, cells: &[String], widths: &[usize], right: &[bool]) {
    let start = out.len();
    for (index, cell) in cells.iter().enumerate() {
        let separator = if index == 0 { " " } else { " | " };
        let width = widths[index];
        let _ = if right[index] {
            write!(out, "{separator}{cell:>width$}")
        } else {
            write!(out, "{separator}{cell:<width$}")
        };
    }
    let kept = start + out[start..].trim_end().len();
    out.truncate(kept);
    out.push('\n');
}

/// A cell must not break the lines of a table, nor send control codes to a terminal.
fn one_line(text: &str) -> String {
    if !text.contains(char::is_control) {
        return text.to_owned();
    }
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

/// The cells of a batch as text.
struct Cells {
    columns: Vec<Column>,
}

enum Column {
    /// Text as it is.
    Text(ArrayRef),
    /// A number, a boolean, JSON: as in JSON.
    Json(JsonRows),
    /// A time, a day, a decimal, bytes: as in JSON without the quotes.
    Unquoted(JsonRows),
    /// Cannot be written.
    Nothing,
}

impl Cells {
    fn new(batch: &RecordBatch) -> Self {
        let column = |(field, array): (&Field, &ArrayRef)| {
            if *array.data_type() == DataType::Utf8 && !is_json(field) {
                return Column::Text(array.clone());
            }
            let quoted = !is_json(field) && !array.data_type().is_nested();
            // A name of no letters, so that the place of the value is known.
            let alone = Schema::new(vec![field.clone().with_name("").with_nullable(true)]);
            match RecordBatch::try_new(alone.into(), vec![array.clone()]) {
                Ok(alone) if quoted => Column::Unquoted(encode_rows(&alone)),
                Ok(alone) => Column::Json(encode_rows(&alone)),
                Err(_) => Column::Nothing,
            }
        };
        let text_views = |array: &ArrayRef| match array.data_type() {
            DataType::Utf8View | DataType::LargeUtf8 => {
                arrow::compute::cast(array, &DataType::Utf8).unwrap_or_else(|_| array.clone())
            }
            _ => array.clone(),
        };
        let columns = batch.schema_ref().fields().iter().zip(batch.columns());
        Self { columns: columns.map(|(field, array)| column((field, &text_views(array)))).collect() }
    }

    /// The text of one cell; `None` for null.
    fn text(&self, column: usize, row: usize) -> Option<&str> {
        // `{"":VALUE}`
        let value = |rows: &'_ JsonRows| -> Option<std::ops::Range<usize>> {
            let end = rows.row(row).len().checked_sub(1)?;
            (rows.row(row).get(4..end)? != "null").then_some(4..end)
        };
        match &self.columns[column] {
            Column::Text(array) => (!array.is_null(row)).then(|| array.as_string::<i32>().value(row)),
            Column::Json(rows) => rows.row(row).get(value(rows)?),
            Column::Unquoted(rows) => {
                let text = rows.row(row).get(value(rows)?)?;
                Some(text.strip_prefix('"').and_then(|t| t.strip_suffix('"')).unwrap_or(text))
            }
            Column::Nothing => None,
        }
    }
}
