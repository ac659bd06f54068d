//! From Arrow columns to the values that the databases take.

use std::borrow::Cow;
use std::collections::HashMap;

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, BooleanArray, Float64Array, Int64Array, RecordBatch, StringArray,
};
use arrow::compute::{CastOptions, cast_with_options};
use arrow::datatypes::{DataType, Field, TimestampMicrosecondType};
use chrono::DateTime;
use pipeline::error::{Error, Result};
use pipeline::json::ColumnText;
use pipeline::schema::{is_json, timestamp_type};

use super::statement::{Server, Table};

/// What a column holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Int,
    Float,
    Bool,
    Time,
    Day,
    Decimal(u8, i8),
    Bytes,
    /// JSON text, structs and lists.
    Json,
}

impl Kind {
    /// Of a pipeline's column.
    pub(super) fn of(field: &Field) -> Self {
        Self::of_type(field.data_type(), is_json(field))
    }

    fn of_type(data_type: &DataType, is_json: bool) -> Self {
        match data_type {
            DataType::Dictionary(_, value) => Self::of_type(value, is_json),
            DataType::Boolean => Self::Bool,
            DataType::Float16 | DataType::Float32 | DataType::Float64 => Self::Float,
            t if t.is_integer() => Self::Int,
            DataType::Timestamp(..) => Self::Time,
            DataType::Date32 | DataType::Date64 => Self::Day,
            DataType::Decimal128(precision, scale) | DataType::Decimal256(precision, scale) => {
                Self::Decimal(*precision, *scale)
            }
            DataType::Binary | DataType::LargeBinary | DataType::BinaryView | DataType::FixedSizeBinary(_) => {
                Self::Bytes
            }
            t if t.is_nested() => Self::Json,
            _ if is_json => Self::Json,
            _ => Self::Text,
        }
    }
}

/// One column of a delivery.
pub(super) enum Column {
    Int(Int64Array),
    Float(Float64Array),
    Bool(BooleanArray),
    Bytes(BinaryArray),
    /// Text, and whatever the databases read best as text.
    Text(StringArray),
}

impl Column {
    fn new(field: &Field, array: &ArrayRef, server: &Server) -> Result<Self> {
        let cast = |to: &DataType| -> Result<ArrayRef> {
            let exact = CastOptions { safe: false, ..CastOptions::default() };
            Ok(cast_with_options(array, to, &exact)?)
        };
        Ok(match Kind::of(field) {
            Kind::Int => Self::Int(cast(&DataType::Int64)?.as_primitive().clone()),
            Kind::Float => Self::Float(cast(&DataType::Float64)?.as_primitive().clone()),
            Kind::Bool => Self::Bool(cast(&DataType::Boolean)?.as_boolean().clone()),
            Kind::Bytes => Self::Bytes(cast(&DataType::Binary)?.as_binary().clone()),
            Kind::Time => {
                let times = cast(&timestamp_type())?;
                let times = times.as_primitive::<TimestampMicrosecondType>();
                Self::Text(times.iter().map(|us| us.map(|us| time_text(us, server))).collect())
            }
            Kind::Json if field.data_type().is_nested() => {
                let texts = ColumnText::new(field, array);
                Self::Text((0..array.len()).map(|row| texts.get(row)).collect())
            }
            Kind::Text | Kind::Json | Kind::Day | Kind::Decimal(..) => {
                Self::Text(cast(&DataType::Utf8)?.as_string().clone())
            }
        })
    }

    /// A value as text, for comparing keys and measuring rows; `None` is null.
    fn text(&self, row: usize) -> Option<Cow<'_, str>> {
        match self {
            Self::Int(values) => values.is_valid(row).then(|| values.value(row).to_string().into()),
            Self::Float(values) => values.is_valid(row).then(|| values.value(row).to_string().into()),
            Self::Bool(values) => values.is_valid(row).then(|| values.value(row).to_string().into()),
            Self::Bytes(values) => values.is_valid(row).then(|| format!("{:?}", values.value(row)).into()),
            Self::Text(values) => values.is_valid(row).then(|| values.value(row).into()),
        }
    }

    /// Bytes of a value on the wire, roughly.
    fn bytes(&self, row: usize) -> usize {
        match self {
            Self::Int(_) | Self::Float(_) | Self::Bool(_) => 8,
            Self::Bytes(values) => values.value_length(row).max(0) as usize,
            Self::Text(values) => values.value_length(row).max(0) as usize,
        }
    }
}

/// A time of one width, so that it sorts as text; always with microseconds.
fn time_text(us: i64, server: &Server) -> String {
    let format = match server {
        // MySQL takes no zone; the session runs in UTC.
        Server::MySql => "%Y-%m-%d %H:%M:%S%.6f",
        Server::Postgres | Server::Sqlite(_) => "%Y-%m-%dT%H:%M:%S%.6fZ",
    };
    match DateTime::from_timestamp_micros(us) {
        Some(time) => time.format(format).to_string(),
        // Beyond the year 262143: the database refuses it and the row is reported.
        None => us.to_string(),
    }
}

/// The columns of a delivery, in the order of the table.
pub(super) struct Columns(pub(super) Vec<Column>);

impl Columns {
    pub(super) fn new(rows: &RecordBatch, table: &Table, server: &Server) -> Result<Self> {
        let column = |&index: &usize| {
            let (Some(array), Some(field)) = (rows.columns().get(index), rows.schema_ref().fields().get(index)) else {
                return Err(Error::internal(format!("no column {index} in a delivery")));
            };
            Column::new(field, array, server)
        };
        table.from.iter().map(column).collect::<Result<_>>().map(Self)
    }

    /// The rows to write: all, or the last of each key, because one statement may not write a key twice.
    pub(super) fn rows_to_write(&self, rows: usize, table: &Table) -> Vec<usize> {
        let key: Vec<&Column> = self
            .0
            .iter()
            .zip(&table.columns)
            .filter(|(_, (name, _))| table.key.contains(name))
            .map(|(c, _)| c)
            .collect();
        if key.is_empty() {
            return (0..rows).collect();
        }
        let mut last: HashMap<Vec<Cow<'_, str>>, usize> = HashMap::new();
        let mut kept: Vec<usize> = Vec::new();
        for row in 0..rows {
            match key.iter().map(|column| column.text(row)).collect() {
                Some(key) => drop(last.insert(key, row)),
                // Null equals no null: such a row replaces none.
                None => kept.push(row),
            }
        }
        kept.extend(last.into_values());
        kept.sort_unstable();
        kept
    }

    /// Bytes of a row on the wire, roughly.
    pub(super) fn row_bytes(&self, row: usize) -> usize {
        self.0.iter().map(|column| column.bytes(row)).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::StructArray;

    use super::*;

    #[test]
    fn structs_become_json_and_times_one_width() {
        let inner = Arc::new(Field::new("n", DataType::Int64, true));
        let array = StructArray::from(vec![(inner, Arc::new(Int64Array::from(vec![Some(1), None])) as ArrayRef)]);
        let field = Field::new("s", array.data_type().clone(), true);
        let column = Column::new(&field, &(Arc::new(array) as ArrayRef), &Server::Postgres).expect("texts");
        let Column::Text(texts) = column else { panic!("text was expected") };
        assert_eq!(texts.iter().collect::<Vec<_>>(), [Some(r#"{"n":1}"#), Some(r#"{"n":null}"#)]);
        assert_eq!(time_text(1_500_000, &Server::Postgres), "1970-01-01T00:00:01.500000Z");
        assert_eq!(time_text(1_000_000, &Server::MySql), "1970-01-01 00:00:01.000000");
    }

    #[test]
    fn the_last_row_of_a_key_is_written() {
        let table = Table {
            name: "t".into(),
            columns: vec![("k".into(), Kind::Text), ("n".into(), Kind::Int)],
            from: vec![0, 1],
            key: vec!["k".into()],
        };
        let keys = StringArray::from(vec![Some("a"), None, Some("a"), Some("b"), None]);
        let columns = Columns(vec![Column::Text(keys), Column::Int(Int64Array::from(vec![1, 2, 3, 4, 5]))]);
        assert_eq!(columns.rows_to_write(5, &table), [1, 2, 3, 4]);
        let append = Table { key: Vec::new(), ..table };
        assert_eq!(columns.rows_to_write(5, &append), [0, 1, 2, 3, 4]);
    }
}
