//! The rows of a query as text: a table for people, JSON and CSV for programs.

use std::fmt::Write;
use std::str::FromStr;

use arrow::array::RecordBatch;

use super::QueryResult;
use crate::json::{ColumnText, encode_rows};

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
        let columns = texts(batch);
        for row in 0..batch.num_rows() {
            for (index, column) in columns.iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                out.push_str(&csv_cell(column.get(row)));
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
        let columns = texts(batch);
        let line = |row| columns.iter().map(|column| one_line(column.get(row).unwrap_or("NULL"))).collect();
        lines.extend((0..batch.num_rows()).map(line));
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

/// The columns of a batch as text.
fn texts(batch: &RecordBatch) -> Vec<ColumnText> {
    let columns = batch.schema_ref().fields().iter().zip(batch.columns());
    columns.map(|(field, values)| ColumnText::new(field, values)).collect()
}
