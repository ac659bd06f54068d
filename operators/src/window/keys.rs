//! The keys that open windows hold. Their bytes are those of [`crate::encoding`].

use arrow::array::ArrayRef;
use arrow::datatypes::DataType;
use hashbrown::HashTable;
use pipeline::error::Result;
use xxhash_rust::xxh3::xxh3_64;

use crate::encoding::{Decoder, KeyColumn, Layout, decode_column};

/// Stands for "no slot" and "no key".
pub(super) const NONE: u32 = u32::MAX;

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
        let columns =
            self.columns.iter().map(|(index, _)| KeyColumn::new(&columns[*index])).collect::<Result<Vec<_>>>()?;
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
        let mut decoders: Vec<Decoder<'_>> = of.iter().map(|key| Decoder::new(keys.bytes(*key))).collect();
        self.columns.iter().map(|(_, data_type)| decode_column(data_type, &mut decoders)).collect()
    }
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
