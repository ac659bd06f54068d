//! `distinct(x)`: how many different values, nulls left out.
//!
//! A value is known by the xxh3 hash (64 bits) of its encoding (see `keys.rs`). A slot keeps the hashes themselves up to
//! [`EXACT_HASHES_MAX`], and the count is exact (but for the chance of two equal hashes, 1 in 10^13 at the
//! limit). Above that it keeps a HyperLogLog of 2^14 registers, 16 KiB, with a standard error of 0.81 %
//! (Flajolet et al. 2007, estimated as in Ertl, "New cardinality estimation algorithms for HyperLogLog sketches", 2017,
//! which has no bias at any size). Both forms depend on the set of values only.

use std::sync::Arc;

use arrow::array::{Array, ArrayRef, Int64Array};
use arrow::datatypes::DataType;
use hashbrown::HashTable;
use hashbrown::hash_table::Entry;
use pipeline::error::{Error, Result};
use pipeline::state::{StateReader, StateWriter};
use xxhash_rust::xxh3::xxh3_64;

use super::{Aggregate, Chunk, argument, each_value, pair_mut};
use crate::encoding::{KeyColumn, Layout};

/// Most hashes that a slot keeps as they are: 16 KiB, as much as the registers.
const EXACT_HASHES_MAX: usize = 2048;
/// Leading bits of a hash that choose its register.
const REGISTER_BITS: u32 = 14;
const REGISTERS: usize = 1 << REGISTER_BITS;
/// Bits of a hash beside the register's number.
const RANK_BITS: u32 = 64 - REGISTER_BITS;

enum Seen {
    Hashes(HashTable<u64>),
    Registers(Box<[u8]>),
}

impl Default for Seen {
    fn default() -> Self {
        Self::Hashes(HashTable::new())
    }
}

impl Seen {
    #[inline]
    fn add(&mut self, hash: u64) {
        match self {
            Self::Registers(registers) => register(registers, hash),
            Self::Hashes(hashes) => {
                let Entry::Vacant(free) = hashes.entry(hash, |one| *one == hash, |one| *one) else { return };
                free.insert(hash);
                if hashes.len() > EXACT_HASHES_MAX {
                    self.registers();
                }
            }
        }
    }

    /// The registers, made of the hashes if need be.
    fn registers(&mut self) -> &mut [u8] {
        if let Self::Hashes(hashes) = self {
            let mut registers = vec![0; REGISTERS].into_boxed_slice();
            hashes.iter().for_each(|hash| register(&mut registers, *hash));
            *self = Self::Registers(registers);
        }
        match self {
            Self::Registers(registers) => registers,
            Self::Hashes(_) => &mut [],
        }
    }

    fn merge(&mut self, other: &Self) {
        match other {
            Self::Hashes(hashes) => hashes.iter().for_each(|hash| self.add(*hash)),
            Self::Registers(theirs) => {
                for (ours, theirs) in self.registers().iter_mut().zip(theirs) {
                    *ours = (*ours).max(*theirs);
                }
            }
        }
    }

    fn count(&self) -> i64 {
        match self {
            Self::Hashes(hashes) => hashes.len() as i64,
            Self::Registers(registers) => estimate(registers).round() as i64,
        }
    }
}

/// Notes the place of the first 1 bit after the register's number.
#[inline]
fn register(registers: &mut [u8], hash: u64) {
    let index = (hash >> RANK_BITS) as usize;
    let rank = ((hash << REGISTER_BITS).leading_zeros().min(RANK_BITS) + 1) as u8;
    registers[index] = registers[index].max(rank);
}

/// Ertl's improved raw estimator (his algorithm 6).
fn estimate(registers: &[u8]) -> f64 {
    let mut counts = [0_u32; RANK_BITS as usize + 2];
    for rank in registers {
        counts[usize::from(*rank).min(RANK_BITS as usize + 1)] += 1;
    }
    let m = REGISTERS as f64;
    let mut z = m * tau(1.0 - f64::from(counts[RANK_BITS as usize + 1]) / m);
    for count in counts[1..=RANK_BITS as usize].iter().rev() {
        z = 0.5 * (z + f64::from(*count));
    }
    z += m * sigma(f64::from(counts[0]) / m);
    m * m / (2.0 * std::f64::consts::LN_2 * z)
}

fn sigma(mut x: f64) -> f64 {
    if x == 1.0 {
        return f64::INFINITY;
    }
    let (mut y, mut z) = (1.0, x);
    loop {
        x *= x;
        let before = z;
        z += x * y;
        y += y;
        if z == before {
            return z;
        }
    }
}

fn tau(mut x: f64) -> f64 {
    if x == 0.0 || x == 1.0 {
        return 0.0;
    }
    let (mut y, mut z) = (1.0, 1.0 - x);
    loop {
        x = x.sqrt();
        let before = z;
        y *= 0.5;
        z -= (1.0 - x) * (1.0 - x) * y;
        if z == before {
            return z / 3.0;
        }
    }
}

/// The hashes of every slot.
pub(super) struct Distinct {
    seen: Vec<Seen>,
    encoded: Vec<u8>,
}

impl Distinct {
    pub(super) fn new(data_type: &DataType) -> Result<Self> {
        if Layout::of(data_type).is_none() {
            return Err(Error::internal(format!("no distinct of {data_type}")));
        }
        Ok(Self { seen: Vec::new(), encoded: Vec::new() })
    }
}

impl Aggregate for Distinct {
    fn grow(&mut self, slots: usize) {
        self.seen.resize_with(slots, Seen::default);
    }

    fn update(&mut self, chunk: &Chunk<'_>) -> Result<()> {
        let array = argument(chunk)?;
        let column = KeyColumn::new(array)?;
        let Self { seen, encoded } = self;
        each_value(chunk.slots, array as &dyn Array, |row, slot| {
            encoded.clear();
            column.encode(row, encoded);
            seen[slot].add(xxh3_64(encoded));
        });
        Ok(())
    }

    fn merge(&mut self, pairs: &[(u32, u32)]) -> Result<()> {
        for (into, from) in pairs {
            let (into, from) = pair_mut(&mut self.seen, *into, *from)?;
            into.merge(from);
        }
        Ok(())
    }

    fn clear(&mut self, slots: &[u32]) {
        for slot in slots {
            match &mut self.seen[*slot as usize] {
                Seen::Hashes(hashes) => hashes.clear(),
                registers => *registers = Seen::default(),
            }
        }
    }

    fn evaluate(&mut self, slots: &[u32], _output: usize) -> Result<ArrayRef> {
        Ok(Arc::new(slots.iter().map(|slot| Some(self.seen[*slot as usize].count())).collect::<Int64Array>()))
    }

    fn save(&self, slots: &[u32], state: &mut StateWriter) -> Result<()> {
        for slot in slots {
            match &self.seen[*slot as usize] {
                Seen::Hashes(hashes) => {
                    state.bool(true);
                    let mut sorted: Vec<u64> = hashes.iter().copied().collect();
                    sorted.sort_unstable();
                    state.u64(sorted.len() as u64);
                    sorted.into_iter().for_each(|hash| state.u64(hash));
                }
                Seen::Registers(registers) => {
                    state.bool(false);
                    state.bytes(registers);
                }
            }
        }
        Ok(())
    }

    fn load(&mut self, slots: &[u32], state: &mut StateReader<'_>) -> Result<()> {
        for slot in slots {
            let mut seen = Seen::default();
            if state.bool()? {
                for _ in 0..state.count()? {
                    seen.add(state.u64()?);
                }
            } else {
                let registers = state.bytes()?;
                if registers.len() != REGISTERS {
                    return Err(Error::internal(format!("damaged state: {} registers", registers.len())));
                }
                seen = Seen::Registers(registers.into());
            }
            self.seen[*slot as usize] = seen;
        }
        Ok(())
    }
}
