//! `stddev`, `stddev_pop`, `var`, `var_pop`: 24 bytes per slot.
//!
//! Welford's method, and for merging that of Chan, Golub and LeVeque ("Updating formulae and a pairwise algorithm
//! for computing sample variances", 1979): no difference of large squares, so a small spread around a large mean
//! keeps its digits. The order of rows shows in the last digits only.

use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array};
use pipeline::error::Result;
use pipeline::state::{StateReader, StateWriter};

use super::{Aggregate, Chunk, argument, each_value, floats, pair_mut};

/// What is asked of the moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Moment {
    /// Sample standard deviation; null for fewer than two values.
    Deviation,
    /// Standard deviation of the values themselves; null without a value.
    DeviationPopulation,
    /// Sample variance; null for fewer than two values.
    Variance,
    /// Variance of the values themselves; null without a value.
    VariancePopulation,
}

#[derive(Clone, Copy, Default)]
struct Spread {
    count: u64,
    mean: f64,
    /// Sum of squared distances from the mean.
    squares: f64,
}

impl Spread {
    #[inline]
    fn add(&mut self, value: f64) {
        self.count += 1;
        let distance = value - self.mean;
        self.mean += distance / self.count as f64;
        self.squares += distance * (value - self.mean);
    }

    fn merge(&mut self, other: &Self) {
        if self.count == 0 {
            *self = *other;
        } else if other.count > 0 {
            let (a, b) = (self.count as f64, other.count as f64);
            let distance = other.mean - self.mean;
            self.mean += distance * (b / (a + b));
            self.squares += other.squares + distance * distance * (a * b / (a + b));
            self.count += other.count;
        }
    }

    fn value(&self, moment: Moment) -> Option<f64> {
        let sample = matches!(moment, Moment::Deviation | Moment::Variance);
        let divisor = self.count.checked_sub(u64::from(sample)).filter(|divisor| *divisor > 0)?;
        let variance = self.squares / divisor as f64;
        Some(match moment {
            Moment::Deviation | Moment::DeviationPopulation => variance.sqrt(),
            Moment::Variance | Moment::VariancePopulation => variance,
        })
    }
}

/// Count, mean and squared distances.
pub(super) struct Moments {
    spreads: Vec<Spread>,
    outputs: Vec<Moment>,
}

impl Moments {
    pub(super) fn new(outputs: &[Moment]) -> Self {
        Self { spreads: Vec::new(), outputs: outputs.to_vec() }
    }
}

impl Aggregate for Moments {
    fn grow(&mut self, slots: usize) {
        self.spreads.resize(slots, Spread::default());
    }

    fn update(&mut self, chunk: &Chunk<'_>) -> Result<()> {
        let array = floats(argument(chunk)?)?;
        let values = &array.values()[..chunk.slots.len()];
        each_value(chunk.slots, array, |row, slot| self.spreads[slot].add(values[row]));
        Ok(())
    }

    fn merge(&mut self, pairs: &[(u32, u32)]) -> Result<()> {
        for (into, from) in pairs {
            let (into, from) = pair_mut(&mut self.spreads, *into, *from)?;
            into.merge(from);
        }
        Ok(())
    }

    fn clear(&mut self, slots: &[u32]) {
        slots.iter().for_each(|slot| self.spreads[*slot as usize] = Spread::default());
    }

    fn evaluate(&mut self, slots: &[u32], output: usize) -> Result<ArrayRef> {
        let moment = self.outputs[output];
        Ok(Arc::new(slots.iter().map(|slot| self.spreads[*slot as usize].value(moment)).collect::<Float64Array>()))
    }

    fn save(&self, slots: &[u32], state: &mut StateWriter) -> Result<()> {
        for slot in slots {
            let spread = &self.spreads[*slot as usize];
            state.u64(spread.count);
            state.f64(spread.mean);
            state.f64(spread.squares);
        }
        Ok(())
    }

    fn load(&mut self, slots: &[u32], state: &mut StateReader<'_>) -> Result<()> {
        for slot in slots {
            self.spreads[*slot as usize] = Spread { count: state.u64()?, mean: state.f64()?, squares: state.f64()? };
        }
        Ok(())
    }
}
