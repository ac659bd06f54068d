//! Keys of rows as bytes: what `group by`-like steps compare and hash.
//!
//! One key is the encodings of its columns, one after the other. A column's value is a tag byte and its value,
//! little-endian: `0` null; `1` bool, one byte; `2` int, 8 bytes; `3` float, the 8 bytes of its bits, with one zero
//! and one NaN; `4` text, `5` bytes, each a length of 8 bytes and the bytes; `6` timestamp, 8 bytes of microseconds;
//! `7` date, 4 bytes of days; `8` decimal, 16 bytes of the unscaled value. The same on every machine, so it may stand
//! in a checkpoint and may be hashed to spread keys.

use arrow::array::{Array, ArrayRef, AsArray, RecordBatch};
use arrow::datatypes::{
    DataType, Date32Type, Decimal128Type, Float64Type, Int64Type, SchemaRef, TimeUnit, TimestampMicrosecondType,
};
use pipeline::config::{At, CheckContext};
use pipeline::error::{Error, Result};
use pipeline::schema::type_word;
use xxhash_rust::xxh3::xxh3_128;

/// Whether values of this type can be a key.
pub(crate) fn can_be_key(data_type: &DataType) -> bool {
    matches!(
        data_type,
        DataType::Boolean
            | DataType::Int64
            | DataType::Float64
            | DataType::Utf8
            | DataType::Binary
            | DataType::Timestamp(TimeUnit::Microsecond, _)
            | DataType::Date32
            | DataType::Decimal128(_, _)
    )
}

/// The indices of the columns `names`, each of a type that can be a key; reports those that are not, twice, or none.
pub(crate) fn key_columns(
    names: &[At<String>],
    option: &str,
    schema: &SchemaRef,
    cx: &mut CheckContext<'_>,
) -> Option<Vec<usize>> {
    let errors_before = cx.errors();
    if names.is_empty() {
        cx.error(cx.position(), format!("`{option}` needs at least one column"));
    }
    let mut columns = Vec::with_capacity(names.len());
    for name in names {
        let Some(index) = cx.column(name, schema) else { continue };
        let field = schema.field(index);
        if columns.contains(&index) {
            cx.error(name.position, format!("column `{}` stands twice in `{option}`", name.value));
        } else if !can_be_key(field.data_type()) {
            let message = format!("column `{}` is {}, which cannot be a key", name.value, type_word(field));
            cx.error_hint(name.position, message, Some("take out one value with a `select` before".to_owned()));
        }
        columns.push(index);
    }
    (cx.errors() == errors_before).then_some(columns)
}

/// Encodes the keys of one batch.
pub(crate) struct Keys<'a> {
    columns: Vec<Column<'a>>,
    buffer: Vec<u8>,
    nulls: usize,
}

/// A key column with its type resolved once.
enum Column<'a> {
    Bool(&'a arrow::array::BooleanArray),
    Fixed { tag: u8, values: Fixed<'a>, array: &'a ArrayRef },
    Text(&'a arrow::array::StringArray),
    Bytes(&'a arrow::array::BinaryArray),
}

enum Fixed<'a> {
    I64(&'a [i64]),
    F64(&'a [f64]),
    I32(&'a [i32]),
    I128(&'a [i128]),
}

impl<'a> Keys<'a> {
    /// Over the columns `columns` of `rows`, each of a type that [`can_be_key`].
    pub(crate) fn new(rows: &'a RecordBatch, columns: &[usize]) -> Result<Self> {
        let columns = columns.iter().map(|&index| Column::new(rows.column(index))).collect::<Result<Vec<_>>>()?;
        Ok(Self { columns, buffer: Vec::new(), nulls: 0 })
    }

    /// The key of one row.
    pub(crate) fn encode(&mut self, row: usize) -> &[u8] {
        self.buffer.clear();
        self.nulls = 0;
        for column in &self.columns {
            self.nulls += usize::from(!column.write(row, &mut self.buffer));
        }
        &self.buffer
    }

    /// The key of one row, unless a part of it is null.
    pub(crate) fn encode_whole(&mut self, row: usize) -> Option<&[u8]> {
        self.encode(row);
        (self.nulls == 0).then_some(&self.buffer)
    }

    /// Whether all parts of the key encoded last were null.
    pub(crate) fn is_null(&self) -> bool {
        self.nulls == self.columns.len()
    }

    /// A hash of the key of one row, wide enough to stand for it: among a million keys two share one with a
    /// probability of about 10^-27.
    pub(crate) fn hash(&mut self, row: usize) -> u128 {
        xxh3_128(self.encode(row))
    }
}

impl<'a> Column<'a> {
    fn new(array: &'a ArrayRef) -> Result<Self> {
        let fixed = |tag, values| Self::Fixed { tag, values, array };
        Ok(match array.data_type() {
            DataType::Boolean => Self::Bool(array.as_boolean()),
            DataType::Int64 => fixed(2, Fixed::I64(array.as_primitive::<Int64Type>().values())),
            DataType::Float64 => fixed(3, Fixed::F64(array.as_primitive::<Float64Type>().values())),
            DataType::Utf8 => Self::Text(array.as_string()),
            DataType::Binary => Self::Bytes(array.as_binary()),
            DataType::Timestamp(TimeUnit::Microsecond, _) => {
                fixed(6, Fixed::I64(array.as_primitive::<TimestampMicrosecondType>().values()))
            }
            DataType::Date32 => fixed(7, Fixed::I32(array.as_primitive::<Date32Type>().values())),
            DataType::Decimal128(_, _) => fixed(8, Fixed::I128(array.as_primitive::<Decimal128Type>().values())),
            other => return Err(Error::internal(format!("a key of type {other}"))),
        })
    }

    /// Appends one value; false if it is null.
    fn write(&self, row: usize, out: &mut Vec<u8>) -> bool {
        let is_null = match self {
            Self::Bool(array) => array.is_null(row),
            Self::Fixed { array, .. } => array.is_null(row),
            Self::Text(array) => array.is_null(row),
            Self::Bytes(array) => array.is_null(row),
        };
        if is_null {
            out.push(0);
            return false;
        }
        let mut long = |tag: u8, bytes: &[u8]| {
            out.push(tag);
            out.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
            out.extend_from_slice(bytes);
        };
        match self {
            Self::Bool(array) => out.extend_from_slice(&[1, u8::from(array.value(row))]),
            Self::Text(array) => long(4, array.value(row).as_bytes()),
            Self::Bytes(array) => long(5, array.value(row)),
            Self::Fixed { tag, values, .. } => {
                out.push(*tag);
                match values {
                    Fixed::I64(values) => out.extend_from_slice(&values[row].to_le_bytes()),
                    Fixed::F64(values) => out.extend_from_slice(&one_zero_one_nan(values[row]).to_le_bytes()),
                    Fixed::I32(values) => out.extend_from_slice(&values[row].to_le_bytes()),
                    Fixed::I128(values) => out.extend_from_slice(&values[row].to_le_bytes()),
                }
            }
        }
        true
    }
}

/// The bits of a float, equal where a user would call the values equal.
fn one_zero_one_nan(value: f64) -> u64 {
    if value.is_nan() {
        return f64::NAN.to_bits();
    }
    // -0.0 + 0.0 is 0.0.
    (value + 0.0).to_bits()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{Float64Array, StringArray};
    use arrow::datatypes::{Field, Schema};

    use super::*;

    #[test]
    fn keys_are_equal_just_where_their_values_are() {
        let text = StringArray::from(vec![Some("a"), Some(""), None, Some("a"), Some("ab")]);
        let more = StringArray::from(vec![Some("b"), Some("ab"), Some("ab"), Some("b"), Some("")]);
        let float = Float64Array::from(vec![0.0, f64::NAN, 1.0, -0.0, -f64::NAN]);
        let fields = [("a", DataType::Utf8), ("b", DataType::Utf8), ("c", DataType::Float64)];
        let schema = Arc::new(Schema::new(fields.map(|(name, t)| Field::new(name, t, true)).to_vec()));
        let rows = RecordBatch::try_new(schema, vec![Arc::new(text), Arc::new(more), Arc::new(float)]).expect("rows");
        let mut both = Keys::new(&rows, &[0, 1]).expect("keys");
        let texts: Vec<Vec<u8>> = (0..5).map(|row| both.encode(row).to_vec()).collect();
        for (left, right) in (0..5).flat_map(|left| (0..5).map(move |right| (left, right))) {
            let same = left == right || (left.min(right), left.max(right)) == (0, 3);
            assert_eq!(texts[left] == texts[right], same, "{left} {right}");
        }
        assert!(both.encode_whole(2).is_none(), "a part is null");
        let mut floats = Keys::new(&rows, &[2]).expect("keys");
        assert_eq!(floats.hash(0), floats.hash(3), "zero has two signs");
        assert_eq!(floats.hash(1), floats.hash(4), "NaN has many bits");
    }
}
