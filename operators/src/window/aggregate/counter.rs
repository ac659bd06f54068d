//! `rate(counter)`: the per-second increase of a counter that only grows and sometimes restarts from 0.
//!
//! The samples of a slot are its rows with a value, by event time, then by arrival. Between two neighbours the counter
//! increased by their difference, or, if it fell, by the later value: it restarted from 0. The rate is the sum of the
//! increases divided by the time from the first to the last sample. Panes are joined as if all their samples
//! stood in one row: the step from the last sample of one to the first of the next counts.
//!
//! A sample that comes out of order changes the increase only beside a restart, but then its neighbours must
//! be known; so the newest samples are kept. Older ones are *folded*: their first, their last and
//! their increase stay. That is exact as long as no row comes later than half of [`COUNTER_SAMPLES_MAX`] newer
//! rows of its key (in a running total: than [`SETTLED_SAMPLES`]), and even then unless it stands beside a restart.

use std::sync::Arc;

use arrow::array::{ArrayRef, Float64Array};
use pipeline::error::{Error, Result};
use pipeline::state::{StateReader, StateWriter};

use super::stored::Stored;
use super::{Aggregate, Chunk, argument, each_value, pair_mut};

/// Most samples kept per slot, 16 bytes each; at the limit the older half is folded.
const COUNTER_SAMPLES_MAX: usize = 4096;

/// Samples that a running total keeps after it was given out, for late rows: 4 KiB per key, since totals live long.
const SETTLED_SAMPLES: usize = 256;

/// A counter's value.
pub(super) trait CounterValue: Stored + Copy {
    /// How much the counter grew from `self` to `next`.
    fn increase_to(self, next: Self) -> f64;
    /// Whether the value can be a counter's at all.
    fn is_sample(self) -> bool {
        true
    }
}

impl CounterValue for i64 {
    fn increase_to(self, next: Self) -> f64 {
        if next >= self { next.abs_diff(self) as f64 } else { next.max(0) as f64 }
    }
}

impl CounterValue for f64 {
    fn increase_to(self, next: Self) -> f64 {
        if next >= self { next - self } else { next.max(0.0) }
    }
    fn is_sample(self) -> bool {
        !self.is_nan()
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Sample<T> {
    event_us: i64,
    value: T,
}

/// Samples of which only the ends and the sum of increases are left.
#[derive(Clone, Copy, Debug)]
struct Folded<T> {
    first: Sample<T>,
    last: Sample<T>,
    increase: f64,
}

impl<T: CounterValue> Folded<T> {
    fn one(sample: Sample<T>) -> Self {
        Self { first: sample, last: sample, increase: 0.0 }
    }

    /// Adds a sample at or after the last.
    fn append(&mut self, sample: Sample<T>) {
        self.increase += self.last.value.increase_to(sample.value);
        self.last = sample;
    }

    /// Adds samples that are all at or after the last.
    fn join(&mut self, later: &Self) {
        self.increase += self.last.value.increase_to(later.first.value) + later.increase;
        self.last = later.last;
    }

    /// Adds a sample before the last: it counts if it is the first of all; between folded samples it is
    /// taken to lie on the way up.
    fn insert(&mut self, sample: Sample<T>) {
        if sample.event_us < self.first.event_us {
            self.increase += sample.value.increase_to(self.first.value);
            self.first = sample;
        }
    }
}

#[derive(Clone, Debug)]
struct Series<T> {
    folded: Option<Folded<T>>,
    /// At or after the end of `folded`; the first `sorted` of them in order.
    samples: Vec<Sample<T>>,
    sorted: usize,
}

impl<T> Default for Series<T> {
    fn default() -> Self {
        Self { folded: None, samples: Vec::new(), sorted: 0 }
    }
}

impl<T: CounterValue> Series<T> {
    fn add(&mut self, sample: Sample<T>) {
        if let Some(folded) = self.folded.as_mut().filter(|folded| sample.event_us < folded.last.event_us) {
            folded.insert(sample);
            return;
        }
        if self.samples.len() >= COUNTER_SAMPLES_MAX {
            self.fold(COUNTER_SAMPLES_MAX / 2);
            return self.add(sample);
        }
        let in_order = self.samples.last().is_none_or(|last| last.event_us <= sample.event_us);
        if in_order && self.sorted == self.samples.len() {
            self.sorted += 1;
        }
        self.samples.push(sample);
    }

    fn sort(&mut self) {
        if self.sorted < self.samples.len() {
            // Stable: on a tie the arrival decides.
            self.samples.sort_by_key(|sample| sample.event_us);
            self.sorted = self.samples.len();
        }
    }

    /// Folds the oldest `count` samples.
    fn fold(&mut self, count: usize) {
        self.sort();
        for sample in self.samples.drain(..count) {
            match &mut self.folded {
                Some(folded) => folded.append(sample),
                empty => *empty = Some(Folded::one(sample)),
            }
        }
        self.sorted = self.samples.len();
    }

    /// Everything folded, without changing anything but the order of the samples.
    fn total(&mut self) -> Option<Folded<T>> {
        self.sort();
        let mut samples = self.samples.iter();
        let mut total = match self.folded {
            Some(folded) => folded,
            None => Folded::one(*samples.next()?),
        };
        samples.for_each(|sample| total.append(*sample));
        Some(total)
    }

    fn merge(&mut self, later: &Self) {
        if let Some(other) = &later.folded {
            self.sort();
            let before = self.samples.partition_point(|sample| sample.event_us <= other.first.event_us);
            self.fold(before);
            match &mut self.folded {
                Some(folded) if other.first.event_us >= folded.last.event_us => folded.join(other),
                Some(folded) if other.last.event_us < folded.first.event_us => {
                    let mut first = *other;
                    first.join(folded);
                    *folded = first;
                }
                // Both have forgotten the samples between which the other's lie.
                Some(folded) => {
                    folded.insert(other.first);
                    folded.increase += other.increase;
                    if other.last.event_us >= folded.last.event_us {
                        folded.last = other.last;
                    }
                }
                empty => *empty = Some(*other),
            }
            self.sorted = 0;
            let samples = std::mem::take(&mut self.samples);
            samples.into_iter().for_each(|sample| self.add(sample));
        }
        later.samples.iter().for_each(|sample| self.add(*sample));
    }
}

/// The samples of every slot.
#[derive(Default)]
pub(super) struct Counter<T> {
    series: Vec<Series<T>>,
}

impl<T: CounterValue> Aggregate for Counter<T> {
    fn grow(&mut self, slots: usize) {
        self.series.resize_with(slots, Series::default);
    }

    fn update(&mut self, chunk: &Chunk<'_>) -> Result<()> {
        let column = T::downcast(argument(chunk)?)?;
        let mut value = T::default();
        each_value(chunk.slots, column, |row, slot| {
            value.set(column, row);
            if value.is_sample() {
                self.series[slot].add(Sample { event_us: chunk.event_us[row], value });
            }
        });
        Ok(())
    }

    fn merge(&mut self, pairs: &[(u32, u32)]) -> Result<()> {
        for (into, from) in pairs {
            self.series[*from as usize].sort();
            let (into, from) = pair_mut(&mut self.series, *into, *from)?;
            into.merge(from);
        }
        Ok(())
    }

    fn settle(&mut self, slots: &[u32]) {
        for slot in slots {
            let series = &mut self.series[*slot as usize];
            series.fold(series.samples.len().saturating_sub(SETTLED_SAMPLES));
        }
    }

    fn clear(&mut self, slots: &[u32]) {
        for slot in slots {
            let series = &mut self.series[*slot as usize];
            series.folded = None;
            series.samples.clear();
            series.sorted = 0;
        }
    }

    fn evaluate(&mut self, slots: &[u32], _output: usize) -> Result<ArrayRef> {
        let rates = slots.iter().map(|slot| {
            let total = self.series[*slot as usize].total()?;
            let span_us = total.last.event_us.saturating_sub(total.first.event_us);
            (span_us > 0).then(|| total.increase / (span_us as f64 / 1e6))
        });
        Ok(Arc::new(rates.collect::<Float64Array>()))
    }

    fn save(&self, slots: &[u32], state: &mut StateWriter) -> Result<()> {
        let write = |sample: &Sample<T>, state: &mut StateWriter| {
            state.i64(sample.event_us);
            sample.value.write(state);
        };
        for slot in slots {
            let series = &self.series[*slot as usize];
            state.bool(series.folded.is_some());
            if let Some(folded) = &series.folded {
                write(&folded.first, state);
                write(&folded.last, state);
                state.f64(folded.increase);
            }
            state.u64(series.samples.len() as u64);
            series.samples.iter().for_each(|sample| write(sample, state));
        }
        Ok(())
    }

    fn load(&mut self, slots: &[u32], state: &mut StateReader<'_>) -> Result<()> {
        let read = |state: &mut StateReader<'_>| -> Result<Sample<T>> {
            Ok(Sample { event_us: state.i64()?, value: T::read(state)? })
        };
        for slot in slots {
            let series = &mut self.series[*slot as usize];
            series.folded = match state.bool()? {
                true => Some(Folded { first: read(state)?, last: read(state)?, increase: state.f64()? }),
                false => None,
            };
            let samples = state.count()?;
            if samples > COUNTER_SAMPLES_MAX {
                return Err(Error::internal(format!("damaged state: {samples} samples")));
            }
            series.samples = (0..samples).map(|_| read(state)).collect::<Result<_>>()?;
            series.sorted = 0;
        }
        Ok(())
    }
}
