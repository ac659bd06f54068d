//! Keys: the values of the `group_by` columns of a row as bytes.
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
use arrow::datatypes::{DataType, Decimal128Type, Float64Type, Int64Type};
use hashbrown::HashTable;
use pipeline::error::{Error, Result};
use xxhash_rust::xxh3::xxh3_64;

use super::aggregate::{Layout, into_layout, out_of_layout};

/// Stands for "no slot" and "no key".
pub(super) const NONE: u32 = u32::MAX;

/// A key column of a batch in its layout.
pub(super) enum KeyColumn<'a> {
    Int(&'a Int64Array),
    Float(&'a Float64Array),
    Decimal(&'a Decimal128Array),
    Bytes(&'a BinaryArray),
}

impl<'a> KeyColumn<'a> {
    /// Over an array that [`into_layout`] gave.
    pub(super) fn new(array: &'a ArrayRef) -> Result<Self> {
        Ok(match array.data_type() {
            DataType::Int64 => Self::Int(array.as_primitive::<Int64Type>()),
            DataType::Float64 => Self::Float(array.as_primitive::<Float64Type>()),
            DataType::Decimal128(..) => Self::Decimal(array.as_primitive::<Decimal128Type>()),
            DataType::Binary => Self::Bytes(array.as_binary::<i32>()),
            other => return Err(Error::internal(format!("no key of {other}"))),
        })
    }

    /// Appends the encoding of row `row`.
    #[inline]
    pub(super) fn encode(&self, row: usize, out: &mut Vec<u8>) {
        let valid = match self {
            Self::Int(array) => array.is_valid(row),
            Self::Float(array) => array.is_valid(row),
            Self::Decimal(array) => array.is_valid(row),
            Self::Bytes(array) => array.is_valid(row),
        };
        if !valid {
            out.push(0);
            return;
        }
        out.push(1);
        match self {
            Self::Int(array) => out.extend_from_slice(&((array.value(row) ^ i64::MIN).to_be_bytes())),
            Self::Float(array) => out.extend_from_slice(&float_bits(array.value(row)).to_be_bytes()),
            Self::Decimal(array) => out.extend_from_slice(&((array.value(row) ^ i128::MIN).to_be_bytes())),
            Self::Bytes(array) => encode_bytes(array.value(row), out),
        }
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
struct Decoder<'a> {
    bytes: &'a [u8],
}

impl Decoder<'_> {
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

/// The key columns of a window: how they are read from a batch and written to results.
#[derive(Clone, Debug, Default)]
pub(super) struct KeyColumns {
    /// Index of each column in the input, and its type.
    columns: Vec<(usize, DataType)>,
}

impl KeyColumns {
    /// Whether values of this type can be keys.
    pub(super) fn can_hold(data_type: &DataType) -> bool {
        Layout::of(data_type).is_some()
    }

    /// Columns of the input with their types, each of which [`Self::can_hold`].
    pub(super) fn new(columns: Vec<(usize, DataType)>) -> Self {
        Self { columns }
    }

    /// The key of every row.
    pub(super) fn find(&self, columns: &[ArrayRef], rows: usize, keys: &mut Keys) -> Result<Vec<u32>> {
        let arrays = self.columns.iter().map(|(index, _)| into_layout(&columns[*index])).collect::<Result<Vec<_>>>()?;
        let columns = arrays.iter().map(KeyColumn::new).collect::<Result<Vec<_>>>()?;
        let mut encoded = Vec::new();
        let mut found = Vec::with_capacity(rows);
        for row in 0..rows {
            encoded.clear();
            for column in &columns {
                column.encode(row, &mut encoded);
            }
            found.push(keys.find_or_add(&encoded));
        }
        Ok(found)
    }

    /// The key columns of results with these keys.
    pub(super) fn decode(&self, keys: &Keys, of: &[u32]) -> Result<Vec<ArrayRef>> {
        let mut decoders: Vec<Decoder<'_>> = of.iter().map(|key| Decoder { bytes: keys.bytes(*key) }).collect();
        self.columns.iter().map(|(_, data_type)| decode_column(data_type, &mut decoders)).collect()
    }
}

fn decode_column(data_type: &DataType, rows: &mut [Decoder<'_>]) -> Result<ArrayRef> {
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

struct Key {
    bytes: Box<[u8]>,
    hash: u64,
    /// Slots that stand for it.
    slots: u32,
    /// The slot that was asked for last, a guess that [`Panes`](super::panes) checks.
    last_slot: u32,
}

/// The keys that open windows hold, each known by a small number.
#[derive(Default)]
pub(super) struct Keys {
    table: HashTable<u32>,
    keys: Vec<Key>,
    free: Vec<u32>,
    /// Keys that may have no slot, to be looked at by [`Self::sweep`].
    unheld: Vec<u32>,
}

impl Keys {
    /// The number of a key; it stays as long as slots hold it, or else until the next [`Self::sweep`].
    pub(super) fn find_or_add(&mut self, bytes: &[u8]) -> u32 {
        let hash = xxh3_64(bytes);
        if let Some(key) = self.table.find(hash, |key| *self.keys[*key as usize].bytes == *bytes) {
            return *key;
        }
        let new = Key { bytes: bytes.into(), hash, slots: 0, last_slot: NONE };
        let key = match self.free.pop() {
            Some(key) => {
                self.keys[key as usize] = new;
                key
            }
            None => {
                self.keys.push(new);
                (self.keys.len() - 1) as u32
            }
        };
        self.table.insert_unique(hash, key, |key| self.keys[*key as usize].hash);
        self.unheld.push(key);
        key
    }

    /// The encoded key.
    pub(super) fn bytes(&self, key: u32) -> &[u8] {
        &self.keys[key as usize].bytes
    }

    pub(super) fn hash(&self, key: u32) -> u64 {
        self.keys[key as usize].hash
    }

    /// One past the largest number in use.
    pub(super) fn bound(&self) -> usize {
        self.keys.len()
    }

    pub(super) fn last_slot(&self, key: u32) -> u32 {
        self.keys[key as usize].last_slot
    }

    pub(super) fn set_last_slot(&mut self, key: u32, slot: u32) {
        self.keys[key as usize].last_slot = slot;
    }

    /// A slot holds the key.
    pub(super) fn hold(&mut self, key: u32) {
        self.keys[key as usize].slots += 1;
    }

    /// A slot holds the key no more.
    pub(super) fn release(&mut self, key: u32) {
        let held = &mut self.keys[key as usize];
        held.slots -= 1;
        if held.slots == 0 {
            self.unheld.push(key);
        }
    }

    /// Forgets the keys that no slot holds.
    pub(super) fn sweep(&mut self) {
        for key in std::mem::take(&mut self.unheld) {
            let Key { hash, slots: 0, .. } = self.keys[key as usize] else { continue };
            if let Ok(entry) = self.table.find_entry(hash, |one| *one == key) {
                entry.remove();
                self.keys[key as usize].bytes = Box::default();
                self.free.push(key);
            }
        }
    }
}
