//! Values and keys as bytes, for every step that groups, joins or compares.
//!
//! The encoding is our own and fixed, so that a key hashes the same in every process and on every machine, and
//! so that the order of the bytes is the order of the values. Column after column:
//!
//! | value | bytes |
//! | --- | --- |
//! | null | `00` |
//! | int, bool, timestamp, date | `01`, then 8 bytes, big-endian, of the number with its sign bit flipped (microseconds, days, 0 or 1) |
//! | decimal | `01`, then 16 bytes in the same manner |
//! | float | `01`, then 8 bytes, big-endian, of the IEEE bits: all flipped if negative, else the sign bit; -0 is 0, NaN one value, the greatest |
//! | string, json, bytes | `01`, then the bytes with `00 ff` for every `00`, then `00 00` |
//!
//! The hash is xxh3 with 64 bits and seed 0.

use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, AsArray, BinaryArray, BinaryBuilder, Decimal128Array, Decimal128Builder, Float64Array,
    Float64Builder, Int64Array, Int64Builder,
};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Decimal128Type, Float64Type, Int64Type};
use pipeline::error::{Error, Result};

/// In which of the four kinds values of a type are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
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
    pub(crate) fn of(data_type: &DataType) -> Option<Self> {
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
pub(crate) fn into_layout(array: &ArrayRef) -> Result<ArrayRef> {
    steps(array.data_type()).iter().try_fold(array.clone(), cast_to)
}

/// An array in its layout as `data_type` again.
pub(crate) fn out_of_layout(array: ArrayRef, data_type: &DataType) -> Result<ArrayRef> {
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

/// `array` as `data_type`, unchanged if it is one already.
pub(crate) fn cast_to(array: ArrayRef, data_type: &DataType) -> Result<ArrayRef> {
    if array.data_type() == data_type { Ok(array) } else { Ok(cast(&array, data_type)?) }
}

/// A key column of a batch in its layout.
pub(crate) enum KeyColumn {
    Int(Int64Array),
    Float(Float64Array),
    Decimal(Decimal128Array),
    Bytes(BinaryArray),
}

impl KeyColumn {
    /// Over a column of a type that has a [`Layout`].
    pub(crate) fn new(array: &ArrayRef) -> Result<Self> {
        let array = into_layout(array)?;
        Ok(match array.data_type() {
            DataType::Int64 => Self::Int(array.as_primitive::<Int64Type>().clone()),
            DataType::Float64 => Self::Float(array.as_primitive::<Float64Type>().clone()),
            DataType::Decimal128(..) => Self::Decimal(array.as_primitive::<Decimal128Type>().clone()),
            DataType::Binary => Self::Bytes(array.as_binary::<i32>().clone()),
            other => return Err(Error::internal(format!("no key of {other}"))),
        })
    }

    /// Appends the encoding of row `row`; false if it is null.
    #[inline]
    pub(crate) fn encode(&self, row: usize, out: &mut Vec<u8>) -> bool {
        let valid = match self {
            Self::Int(array) => array.is_valid(row),
            Self::Float(array) => array.is_valid(row),
            Self::Decimal(array) => array.is_valid(row),
            Self::Bytes(array) => array.is_valid(row),
        };
        if !valid {
            out.push(0);
            return false;
        }
        out.push(1);
        match self {
            Self::Int(array) => out.extend_from_slice(&((array.value(row) ^ i64::MIN).to_be_bytes())),
            Self::Float(array) => out.extend_from_slice(&float_bits(array.value(row)).to_be_bytes()),
            Self::Decimal(array) => out.extend_from_slice(&((array.value(row) ^ i128::MIN).to_be_bytes())),
            Self::Bytes(array) => encode_bytes(array.value(row), out),
        }
        true
    }
}

/// Bits of a float whose order as an unsigned number is that of the floats.
fn float_bits(value: f64) -> u64 {
    // -0 + 0 is 0.
    let bits = if value.is_nan() { f64::NAN.abs().to_bits() } else { (value + 0.0).to_bits() };
    if bits >> 63 == 1 { !bits } else { bits ^ (1 << 63) }
}

fn bits_float(bits: u64) -> f64 {
    f64::from_bits(if bits >> 63 == 1 { bits ^ (1 << 63) } else { !bits })
}

fn encode_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    for (index, part) in bytes.split(|byte| *byte == 0).enumerate() {
        if index > 0 {
            out.extend_from_slice(&[0, 0xff]);
        }
        out.extend_from_slice(part);
    }
    out.extend_from_slice(&[0, 0]);
}

/// Reads encoded keys, value by value.
pub(crate) struct Decoder<'a> {
    bytes: &'a [u8],
}

impl<'a> Decoder<'a> {
    /// Over the encoding of one key.
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { bytes }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N]> {
        let (taken, rest) = self.bytes.split_first_chunk().ok_or_else(damaged)?;
        self.bytes = rest;
        Ok(*taken)
    }

    fn is_value(&mut self) -> Result<bool> {
        Ok(self.take::<1>()? == [1])
    }

    fn text(&mut self) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        loop {
            let zero = self.bytes.iter().position(|byte| *byte == 0).ok_or_else(damaged)?;
            out.extend_from_slice(&self.bytes[..zero]);
            self.bytes = &self.bytes[zero + 1..];
            match self.take::<1>()? {
                [0xff] => out.push(0),
                _ => return Ok(out),
            }
        }
    }
}

fn damaged() -> Error {
    Error::internal("damaged state: a key that does not end")
}

/// The next column of each key.
pub(crate) fn decode_column(data_type: &DataType, rows: &mut [Decoder<'_>]) -> Result<ArrayRef> {
    let array: ArrayRef = match Layout::of(data_type) {
        Some(Layout::Int) => {
            let mut builder = Int64Builder::with_capacity(rows.len());
            for row in rows {
                let valid = row.is_value()?;
                builder.append_option(if valid { Some(i64::from_be_bytes(row.take()?) ^ i64::MIN) } else { None });
            }
            Arc::new(builder.finish())
        }
        Some(Layout::Float) => {
            let mut builder = Float64Builder::with_capacity(rows.len());
            for row in rows {
                let valid = row.is_value()?;
                builder.append_option(if valid { Some(bits_float(u64::from_be_bytes(row.take()?))) } else { None });
            }
            Arc::new(builder.finish())
        }
        Some(Layout::Decimal) => {
            let mut builder = Decimal128Builder::with_capacity(rows.len());
            for row in rows {
                let valid = row.is_value()?;
                builder.append_option(if valid { Some(i128::from_be_bytes(row.take()?) ^ i128::MIN) } else { None });
            }
            Arc::new(builder.finish())
        }
        Some(Layout::Bytes) => {
            let mut builder = BinaryBuilder::with_capacity(rows.len(), rows.len() * 16);
            for row in rows {
                let valid = row.is_value()?;
                builder.append_option(if valid { Some(row.text()?) } else { None });
            }
            Arc::new(builder.finish())
        }
        None => return Err(Error::internal(format!("no key of {data_type}"))),
    };
    out_of_layout(array, data_type)
}
