//! `first`, `last` and `delta`: a value and its event time per slot.
//!
//! Rows are ordered by event time, then by arrival. Arrival needs no number: within a slot rows come in arrival
//! order, and where two slots that share an event time are merged, `from` arrived after `into`.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Decimal128Array, Float64Array, Int64Array};
use arrow::datatypes::{DECIMAL128_MAX_PRECISION, DataType, Decimal128Type, DecimalType, Float64Type, Int64Type};
use pipeline::error::{Error, Result};
use pipeline::state::{StateReader, StateWriter};

use super::stored::Stored;
use super::{Aggregate, Chunk, argument, pair_mut};
use crate::encoding::{Layout, into_layout, out_of_layout};

/// An empty state for values of `data_type`.
pub(super) fn build(data_type: &DataType, last: bool, ignore_nulls: bool) -> Result<Box<dyn Aggregate>> {
    fn edge<T: Stored>(data_type: &DataType, last: bool, ignore_nulls: bool) -> Box<dyn Aggregate> {
        Box::new(Edge::<T> { held: Vec::new(), last, ignore_nulls, data_type: data_type.clone() })
    }
    Ok(match Layout::of(data_type) {
        Some(Layout::Int) => edge::<i64>(data_type, last, ignore_nulls),
        Some(Layout::Float) => edge::<f64>(data_type, last, ignore_nulls),
        Some(Layout::Decimal) => edge::<i128>(data_type, last, ignore_nulls),
        Some(Layout::Bytes) => edge::<Vec<u8>>(data_type, last, ignore_nulls),
        None => return Err(Error::internal(format!("no first or last of {data_type}"))),
    })
}

/// An empty state for differences of numbers of `data_type`.
pub(super) fn build_delta(data_type: &DataType) -> Result<Box<dyn Aggregate>> {
    let (first, last) = (build(data_type, false, true)?, build(data_type, true, true)?);
    Ok(Box::new(Delta { first, last, data_type: data_type.clone() }))
}

/// The type of a difference: one digit more for decimals.
pub(in super::super) fn delta_type(data_type: &DataType) -> DataType {
    match data_type {
        DataType::Decimal128(precision, scale) => {
            DataType::Decimal128(DECIMAL128_MAX_PRECISION.min(precision + 1), *scale)
        }
        other => other.clone(),
    }
}

/// What a slot holds: nothing, a null, or a value.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Content {
    #[default]
    Nothing,
    Null,
    Value,
}

#[derive(Clone, Default)]
struct Held<T> {
    event_us: i64,
    content: Content,
    value: T,
}

struct Edge<T> {
    held: Vec<Held<T>>,
    last: bool,
    ignore_nulls: bool,
    data_type: DataType,
}

impl<T> Edge<T> {
    /// Whether a row that arrived later, at `event_us`, takes the place of `held`.
    #[inline]
    fn replaces(last: bool, held: &Held<T>, event_us: i64) -> bool {
        held.content == Content::Nothing || if last { event_us >= held.event_us } else { event_us < held.event_us }
    }
}

impl<T: Stored> Aggregate for Edge<T> {
    fn grow(&mut self, slots: usize) {
        self.held.resize(slots, Held::default());
    }

    fn update(&mut self, chunk: &Chunk<'_>) -> Result<()> {
        use arrow::array::Array;
        let array = into_layout(argument(chunk)?)?;
        let column = T::downcast(&array)?;
        for (row, (slot, event_us)) in chunk.slots.iter().zip(chunk.event_us).enumerate() {
            let held = &mut self.held[*slot as usize];
            if !Self::replaces(self.last, held, *event_us) {
                continue;
            }
            if column.is_valid(row) {
                held.event_us = *event_us;
                held.content = Content::Value;
                held.value.set(column, row);
            } else if !self.ignore_nulls {
                held.event_us = *event_us;
                held.content = Content::Null;
            }
        }
        Ok(())
    }

    fn merge(&mut self, pairs: &[(u32, u32)]) -> Result<()> {
        for (into, from) in pairs {
            let (into, from) = pair_mut(&mut self.held, *into, *from)?;
            if from.content != Content::Nothing && Self::replaces(self.last, into, from.event_us) {
                into.clone_from(from);
            }
        }
        Ok(())
    }

    fn clear(&mut self, slots: &[u32]) {
        slots.iter().for_each(|slot| self.held[*slot as usize].content = Content::Nothing);
    }

    fn evaluate(&mut self, slots: &[u32], _output: usize) -> Result<ArrayRef> {
        let values = slots.iter().map(|slot| {
            let held = &self.held[*slot as usize];
            (held.content == Content::Value).then_some(&held.value)
        });
        out_of_layout(T::column(values), &self.data_type)
    }

    fn save(&self, slots: &[u32], state: &mut StateWriter) -> Result<()> {
        for slot in slots {
            let held = &self.held[*slot as usize];
            state.u64(match held.content {
                Content::Nothing => 0,
                Content::Null => 1,
                Content::Value => 2,
            });
            if held.content != Content::Nothing {
                state.i64(held.event_us);
            }
            if held.content == Content::Value {
                held.value.write(state);
            }
        }
        Ok(())
    }

    fn load(&mut self, slots: &[u32], state: &mut StateReader<'_>) -> Result<()> {
        for slot in slots {
            self.held[*slot as usize] = match state.u64()? {
                0 => Held::default(),
                1 => Held { event_us: state.i64()?, content: Content::Null, value: T::default() },
                2 => Held { event_us: state.i64()?, content: Content::Value, value: T::read(state)? },
                other => return Err(Error::internal(format!("damaged state: content {other}"))),
            };
        }
        Ok(())
    }
}

/// The last value minus the first, nulls left out.
struct Delta {
    first: Box<dyn Aggregate>,
    last: Box<dyn Aggregate>,
    data_type: DataType,
}

impl Aggregate for Delta {
    fn grow(&mut self, slots: usize) {
        self.first.grow(slots);
        self.last.grow(slots);
    }

    fn update(&mut self, chunk: &Chunk<'_>) -> Result<()> {
        self.first.update(chunk)?;
        self.last.update(chunk)
    }

    fn merge(&mut self, pairs: &[(u32, u32)]) -> Result<()> {
        self.first.merge(pairs)?;
        self.last.merge(pairs)
    }

    fn clear(&mut self, slots: &[u32]) {
        self.first.clear(slots);
        self.last.clear(slots);
    }

    fn evaluate(&mut self, slots: &[u32], output: usize) -> Result<ArrayRef> {
        let (first, last) = (self.first.evaluate(slots, output)?, self.last.evaluate(slots, output)?);
        Ok(match delta_type(&self.data_type) {
            DataType::Int64 => {
                let pairs = last.as_primitive::<Int64Type>().iter().zip(first.as_primitive::<Int64Type>());
                Arc::new(pairs.map(|(last, first)| last?.checked_sub(first?)).collect::<Int64Array>())
            }
            DataType::Float64 => {
                let pairs = last.as_primitive::<Float64Type>().iter().zip(first.as_primitive::<Float64Type>());
                Arc::new(pairs.map(|(last, first)| Some(last? - first?)).collect::<Float64Array>())
            }
            DataType::Decimal128(precision, scale) => {
                let pairs = last.as_primitive::<Decimal128Type>().iter().zip(first.as_primitive::<Decimal128Type>());
                let differences = pairs.map(|(last, first)| {
                    let difference = last?.checked_sub(first?)?;
                    let fits = Decimal128Type::validate_decimal_precision(difference, precision, scale).is_ok();
                    fits.then_some(difference)
                });
                Arc::new(differences.collect::<Decimal128Array>().with_precision_and_scale(precision, scale)?)
            }
            other => return Err(Error::internal(format!("no difference of {other}"))),
        })
    }

    fn save(&self, slots: &[u32], state: &mut StateWriter) -> Result<()> {
        self.first.save(slots, state)?;
        self.last.save(slots, state)
    }

    fn load(&mut self, slots: &[u32], state: &mut StateReader<'_>) -> Result<()> {
        self.first.load(slots, state)?;
        self.last.load(slots, state)
    }
}
