//! Values that a slot keeps, one kind per [`Layout`](crate::encoding::Layout).

use std::cmp::Ordering;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, BinaryArray, BinaryBuilder, Decimal128Array, Float64Array, Int64Array, PrimitiveArray,
};
use pipeline::error::Result;
use pipeline::state::{StateReader, StateWriter};

use super::wrong_type;

/// A value of one layout.
pub(super) trait Stored: Clone + Default + Send + 'static {
    /// The array that holds such values.
    type Column: Array + 'static;

    /// `self` becomes row `row`, which is not null.
    fn set(&mut self, column: &Self::Column, row: usize);
    /// How `self` stands to row `row`, which is not null.
    fn against(&self, column: &Self::Column, row: usize) -> Ordering;
    /// How `self` stands to `other`.
    fn compare(&self, other: &Self) -> Ordering;
    /// An array in this layout.
    fn column<'a>(values: impl Iterator<Item = Option<&'a Self>>) -> ArrayRef;
    /// Writes the value.
    fn write(&self, state: &mut StateWriter);
    /// Reads a value.
    fn read(state: &mut StateReader<'_>) -> Result<Self>;

    /// The argument in this layout.
    fn downcast(array: &ArrayRef) -> Result<&Self::Column> {
        array.as_any().downcast_ref().ok_or_else(|| wrong_type(array))
    }
}

macro_rules! stored_number {
    ($native:ty, $column:ty, $order:expr, $write:expr, $read:expr) => {
        impl Stored for $native {
            type Column = $column;
            #[inline]
            fn set(&mut self, column: &Self::Column, row: usize) {
                *self = column.value(row);
            }
            #[inline]
            fn against(&self, column: &Self::Column, row: usize) -> Ordering {
                self.compare(&column.value(row))
            }
            #[inline]
            fn compare(&self, other: &Self) -> Ordering {
                $order(self, other)
            }
            fn column<'a>(values: impl Iterator<Item = Option<&'a Self>>) -> ArrayRef {
                Arc::new(values.map(Option::<&Self>::copied).collect::<PrimitiveArray<_>>()) as Arc<$column>
            }
            fn write(&self, state: &mut StateWriter) {
                $write(state, *self);
            }
            fn read(state: &mut StateReader<'_>) -> Result<Self> {
                $read(state)
            }
        }
    };
}

stored_number!(i64, Int64Array, i64::cmp, StateWriter::i64, StateReader::i64);
stored_number!(f64, Float64Array, compare_floats, StateWriter::f64, StateReader::f64);
stored_number!(i128, Decimal128Array, i128::cmp, write_wide, read_wide);

/// NaN is the greatest value and equal to itself, as in PostgreSQL; -0 is 0.
#[inline]
pub(super) fn compare_floats(a: &f64, b: &f64) -> Ordering {
    a.partial_cmp(b).unwrap_or_else(|| a.is_nan().cmp(&b.is_nan()))
}

fn write_wide(state: &mut StateWriter, value: i128) {
    state.u64(value as u64);
    state.i64((value >> 64) as i64);
}

fn read_wide(state: &mut StateReader<'_>) -> Result<i128> {
    let (low, high) = (state.u64()?, state.i64()?);
    Ok((i128::from(high) << 64) | i128::from(low))
}

impl Stored for Vec<u8> {
    type Column = BinaryArray;

    fn set(&mut self, column: &BinaryArray, row: usize) {
        self.clear();
        self.extend_from_slice(column.value(row));
    }

    fn against(&self, column: &BinaryArray, row: usize) -> Ordering {
        self.as_slice().cmp(column.value(row))
    }

    fn compare(&self, other: &Self) -> Ordering {
        self.cmp(other)
    }

    fn column<'a>(values: impl Iterator<Item = Option<&'a Self>>) -> ArrayRef {
        let mut builder = BinaryBuilder::new();
        values.for_each(|value| builder.append_option(value));
        Arc::new(builder.finish())
    }

    fn write(&self, state: &mut StateWriter) {
        state.bytes(self);
    }

    fn read(state: &mut StateReader<'_>) -> Result<Self> {
        Ok(state.bytes()?.to_vec())
    }
}
