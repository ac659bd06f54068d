//! `percentile(x, q)`: the value at rank ceil(q n) of the n values in order (SQL's `percentile_disc`).
//!
//! A slot keeps its values themselves up to [`EXACT_VALUES_MAX`], and the answer is one of them. Above that
//! it keeps a histogram whose bins grow by a constant factor, as DDSketch (Masson, Rim, Lee, "DDSketch: a fast
//! and fully-mergeable quantile sketch with relative-error guarantees", VLDB 2019), here never collapsed: every answer is
//! within [`RELATIVE_ERROR`] of the exact one, for negative values too; zero, infinities and NaN (the greatest)
//! have bins of their own. Both forms depend on the values only, not on their order or on how panes were merged.

use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array};
use pipeline::error::{Error, Result};
use pipeline::state::{StateReader, StateWriter};

use super::stored::compare_floats;
use super::{Aggregate, Chunk, argument, each_value, floats, pair_mut};

/// Most values that a slot keeps as they are: 16 KiB, about what the histogram of widely spread values takes.
const EXACT_VALUES_MAX: usize = 2048;
/// Half the width of a bin. Half of what is promised, so that rounding in the logarithm cannot matter.
const RELATIVE_ERROR: f64 = 0.005;
/// Number of the bin of 1.0. The smallest float has bin 1, so that all positive bins are above 0, the bin of zero.
const BIN_OF_ONE: i32 = 75_000;
/// Bin of infinity; its negative that of minus infinity.
const BIN_INFINITE: i32 = i32::MAX - 1;
/// Bin of NaN.
const BIN_NAN: i32 = i32::MAX;

/// Logarithm of the factor between two bins.
fn log_gamma() -> f64 {
    ((1.0 + RELATIVE_ERROR) / (1.0 - RELATIVE_ERROR)).ln()
}

/// The bin of a value; bins are ordered as their values.
fn bin_of(value: f64, inverse_log_gamma: f64) -> i32 {
    if value.is_nan() {
        return BIN_NAN;
    }
    let size = value.abs();
    let bin = if size == 0.0 {
        0
    } else if size.is_infinite() {
        BIN_INFINITE
    } else {
        BIN_OF_ONE + (size.ln() * inverse_log_gamma).ceil() as i32
    };
    if value < 0.0 { -bin } else { bin }
}

/// The value that is within the relative error of all values of a bin.
fn value_of(bin: i32) -> f64 {
    let size = match bin.abs() {
        BIN_NAN => return f64::NAN,
        BIN_INFINITE => f64::INFINITY,
        0 => 0.0,
        // The middle of a bin that ends at gamma^i is 2 gamma^i / (gamma + 1) = gamma^i (1 - error).
        bin => (f64::from(bin - BIN_OF_ONE) * log_gamma() + (-RELATIVE_ERROR).ln_1p()).exp().min(f64::MAX),
    };
    if bin < 0 { -size } else { size }
}

/// Rank, from 1, of quantile `q` among `n` values: ceil(q n), written so that 0.07 * 100, which is
/// 7.000000000000001 in floats, gives 7.
fn rank(q: f64, n: u64) -> u64 {
    let above = (n as f64 - q * n as f64).floor() as u64;
    n.saturating_sub(above).clamp(1, n.max(1))
}

/// A histogram over all floats.
#[derive(Clone, Debug, Default)]
struct Histogram {
    /// Bins with their counts, in order.
    bins: Vec<(i32, u64)>,
    count: u64,
    /// The least and the greatest value, which ends the bins exactly.
    ends: Option<(f64, f64)>,
}

impl Histogram {
    fn widen(&mut self, least: f64, greatest: f64) {
        let lesser = |a: f64, b: f64| if compare_floats(&b, &a).is_lt() { b } else { a };
        let greater = |a: f64, b: f64| if compare_floats(&b, &a).is_gt() { b } else { a };
        self.ends = Some(match self.ends {
            Some((least_so_far, greatest_so_far)) => (lesser(least_so_far, least), greater(greatest_so_far, greatest)),
            None => (least, greatest),
        });
    }

    fn add(&mut self, values: &[f64]) {
        let inverse = 1.0 / log_gamma();
        let mut bins: Vec<i32> = Vec::with_capacity(values.len());
        for value in values {
            bins.push(bin_of(*value, inverse));
            self.widen(*value, *value);
        }
        bins.sort_unstable();
        let counted: Vec<(i32, u64)> = bins.chunk_by(|a, b| a == b).map(|same| (same[0], same.len() as u64)).collect();
        self.add_bins(&counted);
    }

    /// Adds bins that are in order.
    fn add_bins(&mut self, more: &[(i32, u64)]) {
        let mut merged = Vec::with_capacity(self.bins.len() + more.len());
        let (mut ours, mut theirs) = (self.bins.iter().peekable(), more.iter().peekable());
        while let (Some(a), Some(b)) = (ours.peek(), theirs.peek()) {
            let bin = a.0.min(b.0);
            let mut count = 0;
            count += ours.next_if(|one| one.0 == bin).map_or(0, |one| one.1);
            count += theirs.next_if(|one| one.0 == bin).map_or(0, |one| one.1);
            merged.push((bin, count));
        }
        merged.extend(ours.chain(theirs).copied());
        self.bins = merged;
        self.count += more.iter().map(|one| one.1).sum::<u64>();
    }

    fn merge(&mut self, other: &Self) {
        self.add_bins(&other.bins);
        if let Some((least, greatest)) = other.ends {
            self.widen(least, greatest);
        }
    }

    fn quantile(&self, q: f64) -> Option<f64> {
        let (least, greatest) = self.ends?;
        let rank = rank(q, self.count);
        if rank <= 1 || rank == self.count {
            return Some(if rank <= 1 { least } else { greatest });
        }
        let mut seen = 0;
        let (bin, _) = self.bins.iter().find(|(_, count)| {
            seen += count;
            seen >= rank
        })?;
        let value = value_of(*bin);
        let within = if compare_floats(&value, &least).is_lt() { least } else { value };
        Some(if compare_floats(&within, &greatest).is_gt() { greatest } else { within })
    }
}

#[derive(Default)]
struct Values {
    /// All values, or, beside a histogram, those not in it yet.
    values: Vec<f64>,
    histogram: Option<Box<Histogram>>,
}

impl Values {
    #[inline]
    fn add(&mut self, value: f64) {
        if self.values.len() == EXACT_VALUES_MAX {
            self.fold();
        }
        self.values.push(value);
    }

    /// Moves the values into the histogram.
    #[cold]
    fn fold(&mut self) {
        self.histogram.get_or_insert_default().add(&self.values);
        self.values.clear();
    }

    fn merge(&mut self, other: &Self) {
        if let Some(histogram) = &other.histogram {
            self.fold();
            self.histogram.get_or_insert_default().merge(histogram);
        }
        other.values.iter().for_each(|value| self.add(*value));
    }

    fn quantile(&mut self, q: f64) -> Option<f64> {
        if self.histogram.is_some() {
            self.fold();
        }
        if let Some(histogram) = &self.histogram {
            return histogram.quantile(q);
        }
        let index = usize::try_from(rank(q, self.values.len() as u64)).ok()?.checked_sub(1)?;
        if index >= self.values.len() {
            return None;
        }
        Some(*self.values.select_nth_unstable_by(index, compare_floats).1)
    }
}

/// The values of every slot.
pub(super) struct Percentile {
    values: Vec<Values>,
    quantiles: Vec<f64>,
}

impl Percentile {
    pub(super) fn new(quantiles: &[f64]) -> Self {
        Self { values: Vec::new(), quantiles: quantiles.to_vec() }
    }
}

impl Aggregate for Percentile {
    fn grow(&mut self, slots: usize) {
        self.values.resize_with(slots, Values::default);
    }

    fn update(&mut self, chunk: &Chunk<'_>) -> Result<()> {
        let array = floats(argument(chunk)?)?;
        let values = &array.values()[..chunk.slots.len()];
        each_value(chunk.slots, array, |row, slot| self.values[slot].add(values[row]));
        Ok(())
    }

    fn merge(&mut self, pairs: &[(u32, u32)]) -> Result<()> {
        for (into, from) in pairs {
            let (into, from) = pair_mut(&mut self.values, *into, *from)?;
            into.merge(from);
        }
        Ok(())
    }

    fn clear(&mut self, slots: &[u32]) {
        for slot in slots {
            let values = &mut self.values[*slot as usize];
            values.values.clear();
            values.histogram = None;
        }
    }

    fn evaluate(&mut self, slots: &[u32], output: usize) -> Result<ArrayRef> {
        let q = self.quantiles[output];
        Ok(Arc::new(slots.iter().map(|slot| self.values[*slot as usize].quantile(q)).collect::<Float64Array>()))
    }

    fn save(&self, slots: &[u32], state: &mut StateWriter) -> Result<()> {
        for slot in slots {
            let values = &self.values[*slot as usize];
            state.u64(values.values.len() as u64);
            values.values.iter().for_each(|value| state.f64(*value));
            state.bool(values.histogram.is_some());
            if let Some(histogram) = &values.histogram {
                state.u64(histogram.bins.len() as u64);
                for (bin, count) in &histogram.bins {
                    state.i64(i64::from(*bin));
                    state.u64(*count);
                }
                let (least, greatest) = histogram.ends.unwrap_or_default();
                state.f64(least);
                state.f64(greatest);
            }
        }
        Ok(())
    }

    fn load(&mut self, slots: &[u32], state: &mut StateReader<'_>) -> Result<()> {
        for slot in slots {
            let count = state.count()?;
            let values = (0..count).map(|_| state.f64()).collect::<Result<_>>()?;
            let histogram = if state.bool()? { Some(Box::new(load_histogram(state)?)) } else { None };
            self.values[*slot as usize] = Values { values, histogram };
        }
        Ok(())
    }
}

fn load_histogram(state: &mut StateReader<'_>) -> Result<Histogram> {
    let bins = (0..state.count()?)
        .map(|_| {
            let bin = i32::try_from(state.i64()?).map_err(|_| Error::internal("damaged state: a bin"))?;
            Ok((bin, state.u64()?))
        })
        .collect::<Result<Vec<_>>>()?;
    let count = bins.iter().map(|(_, count)| count).sum();
    let ends = (count > 0).then_some((state.f64()?, state.f64()?));
    Ok(Histogram { bins, count, ends })
}
