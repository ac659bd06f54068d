//! Keys of rows as bytes, in the encoding of [`crate::encoding`]: what `join` and `deduplicate` compare and hash.

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, SchemaRef, TimeUnit};
use pipeline::config::{At, CheckContext};
use pipeline::error::Result;
use pipeline::schema::type_word;
use xxhash_rust::xxh3::xxh3_128;

use crate::encoding::KeyColumn;

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
pub(crate) struct Keys {
    columns: Vec<KeyColumn>,
    buffer: Vec<u8>,
    nulls: usize,
}

impl Keys {
    /// Over the columns `columns` of `rows`, each of a type that [`can_be_key`].
    pub(crate) fn new(rows: &RecordBatch, columns: &[usize]) -> Result<Self> {
        let columns = columns.iter().map(|&index| KeyColumn::new(rows.column(index))).collect::<Result<Vec<_>>>()?;
        Ok(Self { columns, buffer: Vec::new(), nulls: 0 })
    }

    /// The key of one row.
    pub(crate) fn encode(&mut self, row: usize) -> &[u8] {
        self.buffer.clear();
        self.nulls = 0;
        for column in &self.columns {
            self.nulls += usize::from(!column.encode(row, &mut self.buffer));
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
