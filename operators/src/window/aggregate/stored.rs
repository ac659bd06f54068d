//! Values that a slot keeps: integers, floats, decimals and bytes. All other types are one of these in disguise.

use std::cmp::Ordering;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, BinaryArray, BinaryBuilder, Decimal128Array, Float64Array, Int64Array, PrimitiveArray,
};
use arrow::datatypes::DataType;
use pipeline::error::Result;
use pipeline::state::{StateReader, StateWriter};

use super::{cast_to, wrong_type};

/// In which of the four kinds values of a type are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Layout {
    /// 64-bit integers: ints, booleans, times, dates.
    Int,
    /// Floats.
    Float,
    /// 128-bit integers.
    Decimal,
    /// Text and bytes.
    Bytes,
}

impl Layout {
    /// The layout of a type; `None` for nested and exotic ones.
    pub(in super::super) fn of(data_type: &DataType) -> Option<Self> {
        Some(match data_type {
            DataType::UInt64 | DataType::Decimal128(..) => Self::Decimal,
            t if t.is_integer() => Self::Int,
            DataType::Boolean
            | DataType::Timestamp(..)
            | DataType::Date32
            | DataType::Date64
            | DataType::Time32(_)
            | DataType::Time64(_)
            | DataType::Duration(_) => Self::Int,
            DataType::Float16 | DataType::Float32 | DataType::Float64 => Self::Float,
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => Self::Bytes,
            DataType::Binary | DataType::LargeBinary | DataType::BinaryView => Self::Bytes,
            _ => return None,
        })
    }
}

/// The types that a value passes through on its way to its layout, the last one being the layout's own.
fn steps(data_type: &DataType) -> Vec<DataType> {
    match data_type {
        DataType::Date32 | DataType::Time32(_) => vec![DataType::Int32, DataType::Int64],
        DataType::UInt64 => vec![DataType::Decimal128(20, 0)],
        DataType::Decimal128(..) => Vec::new(),
        DataType::LargeUtf8 | DataType::Utf8View => vec![DataType::Utf8, DataType::Binary],
        other => match Layout::of(other) {
            Some(Layout::Int) => vec![DataType::Int64],
            Some(Layout::Float) => vec![DataType::Float64],
            Some(Layout::Bytes) => vec![DataType::Binary],
            Some(Layout::Decimal) | None => Vec::new(),
        },
    }
}

/// `array` in its layout.
pub(in super::super) fn into_layout(array: &ArrayRef) -> Result<ArrayRef> {
    steps(array.data_type()).iter().try_fold(array.clone(), cast_to)
}

/// An array in its layout as `data_type` again.
pub(in super::super) fn out_of_layout(array: ArrayRef, data_type: &DataType) -> Result<ArrayRef> {
    if let (DataType::Decimal128(precision, scale), Some(decimals)) =
        (data_type, array.as_any().downcast_ref::<Decimal128Array>())
    {
        return Ok(Arc::new(decimals.clone().with_precision_and_scale(*precision, *scale)?));
    }
    if let (DataType::UInt64, Some(decimals)) = (data_type, array.as_any().downcast_ref::<Decimal128Array>()) {
        return cast_to(Arc::new(decimals.clone().with_precision_and_scale(20, 0)?), data_type);
    }
    let mut back = steps(data_type);
    back.pop();
    let array = back.iter().rev().try_fold(array, cast_to)?;
    cast_to(array, data_type)
}

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
