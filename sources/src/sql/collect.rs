//! From rows of any of the databases to Arrow columns.

use std::fmt::Write;

use arrow::array::RecordBatch;
use pipeline::config::{Fields, did_you_mean};
use pipeline::error::{Error, Result};
use pipeline::plugin::RowError;
use pipeline::rows::{Cell, RowsBuilder};
use pipeline::schema::FieldType;

use super::key::Key;

/// A row of one of the databases.
pub(super) trait SqlRow {
    /// Number of columns.
    fn width(&self) -> usize;
    /// The name of a column.
    fn name(&self, index: usize) -> &str;
    /// A value, for a column of the type `wanted`.
    fn cell(&self, index: usize, wanted: FieldType) -> Result<Cell<'_>, String>;
    /// A value of a cursor column.
    fn key(&self, index: usize) -> Result<Key, String>;
}

/// Takes the rows of one result.
pub(super) struct Collector {
    columns: Vec<(String, FieldType)>,
    /// Names of the cursor's columns.
    cursor: Vec<String>,
    builder: RowsBuilder,
    errors: Vec<RowError>,
    /// Rows taken, wrong ones among them.
    seen: usize,
    /// Rows after which the collector wants no more.
    limit: usize,
    /// Where the declared columns and the cursor's columns lie, found at the first row.
    places: Option<(Vec<usize>, Vec<usize>)>,
    /// The cursor after the last row.
    keys: Vec<Key>,
}

impl Collector {
    /// For the rows of one result, at most `limit`.
    pub(super) fn new(fields: &Fields, cursor: &[String], limit: usize) -> Self {
        Self {
            columns: fields.0.iter().map(|(name, spec)| (name.clone(), spec.field_type)).collect(),
            cursor: cursor.to_vec(),
            builder: RowsBuilder::new(&[], fields),
            errors: Vec::new(),
            seen: 0,
            limit,
            places: None,
            keys: Vec::new(),
        }
    }

    /// Rows taken so far, wrong ones among them.
    pub(super) fn seen(&self) -> usize {
        self.seen
    }

    /// The cursor after the last row; empty without a row or without a cursor.
    pub(super) fn keys(&self) -> &[Key] {
        &self.keys
    }

    /// The rows and the errors.
    pub(super) fn finish(mut self) -> Result<(RecordBatch, Vec<RowError>)> {
        Ok((self.builder.finish()?, self.errors))
    }

    /// Takes a row; `false` if no more are wanted. An error is about the query, not about the row.
    pub(super) fn take(&mut self, row: &impl SqlRow) -> Result<bool> {
        let (columns, cursor) = match self.places.take() {
            Some(places) => places,
            None => {
                let names: Vec<&str> = (0..row.width()).map(|i| row.name(i)).collect();
                (places(self.columns.iter().map(|(name, _)| name), &names)?, places(&self.cursor, &names)?)
            }
        };
        self.seen += 1;
        self.keys.clear();
        for (name, &index) in self.cursor.iter().zip(&cursor) {
            let key = row.key(index).map_err(|e| Error::user(format!("cursor column `{name}`: {e}")))?;
            self.keys.push(key);
        }
        if let Err(message) = self.push(row, &columns) {
            let error = RowError::new(message, self.excerpt(row, &columns).as_bytes());
            self.errors.push(error);
        }
        self.places = Some((columns, cursor));
        Ok(self.seen < self.limit)
    }

    fn push(&mut self, row: &impl SqlRow, places: &[usize]) -> Result<(), String> {
        let mut cells = self.builder.row();
        for (column, (&index, (name, wanted))) in places.iter().zip(&self.columns).enumerate() {
            let cell = row.cell(index, *wanted).map_err(|e| format!("field `{name}`: {e}"))?;
            self.builder.set(&mut cells, column, cell)?;
        }
        self.builder.push(cells);
        Ok(())
    }

    /// The row as text, for its error.
    fn excerpt(&self, row: &impl SqlRow, places: &[usize]) -> String {
        let mut text = String::new();
        for (&index, (name, wanted)) in places.iter().zip(&self.columns) {
            let separator = if text.is_empty() { "" } else { ", " };
            let _ = match row.cell(index, *wanted) {
                Ok(cell) => write!(text, "{separator}{name}: {cell}"),
                Err(_) => write!(text, "{separator}{name}: ?"),
            };
        }
        text
    }
}

/// Where each of `wanted` lies among the columns of a result.
pub(super) fn places<'a>(wanted: impl IntoIterator<Item = &'a String>, names: &[&str]) -> Result<Vec<usize>> {
    let place = |name: &String| {
        names.iter().position(|n| n == name).ok_or_else(|| {
            let hint = match names.iter().find(|n| n.eq_ignore_ascii_case(name)) {
                Some(other) => format!("did you mean `{other}`?"),
                None => did_you_mean(name, names.iter().copied()).unwrap_or_default(),
            };
            let has = names.join(", ");
            // A column may be added while we wait: tried again.
            Error::outside(format!("field `{name}` is no column of the result, which has {has}; {hint}"))
        })
    };
    wanted.into_iter().map(place).collect()
}
