//! `sum` and `avg`, sharing one state of 32 bytes per slot or less.
//!
//! Integers and decimals are added in 128 bits, so the order of rows is no matter; a sum that does not fit its
//! type is null, never a wrapped number. Floats are added with a correction term (Neumaier, "Rundungsfehleranalyse
//! einiger Verfahren zur Summation endlicher Summen", 1974), so that neither the order of rows nor the number of
//! panes shows in the first 15 digits.

use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Decimal128Array, Float64Array, Int64Array};
use arrow::datatypes::{DECIMAL128_MAX_PRECISION, DataType, Decimal128Type, DecimalType};
use pipeline::error::{Error, Result};
use pipeline::state::{StateReader, StateWriter};

use super::{Aggregate, Chunk, argument, each_value, floats, ints, pair_mut, wrong_type};

/// What is asked of a sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum SumOutput {
    /// The sum; null without a value.
    Sum,
    /// The sum divided by the number of values; null without a value.
    Mean,
}

impl SumOutput {
    /// The type of the result, as DataFusion's.
    pub(in super::super) fn data_type(self, argument: &DataType) -> DataType {
        match (self, argument) {
            (Self::Sum, DataType::Decimal128(precision, scale)) => {
                DataType::Decimal128(DECIMAL128_MAX_PRECISION.min(precision + 10), *scale)
            }
            (Self::Mean, DataType::Decimal128(precision, scale)) => DataType::Decimal128(
                DECIMAL128_MAX_PRECISION.min(precision + 4),
                (DECIMAL128_MAX_PRECISION as i8).min(scale + 4),
            ),
            (Self::Sum, DataType::Int64) => DataType::Int64,
            _ => DataType::Float64,
        }
    }
}

/// An empty state for numbers of `data_type`.
pub(super) fn build(data_type: &DataType, outputs: &[SumOutput]) -> Result<Box<dyn Aggregate>> {
    let outputs = outputs.to_vec();
    Ok(match data_type {
        DataType::Float64 => Box::new(FloatSums { sums: Vec::new(), outputs }),
        DataType::Int64 | DataType::Decimal128(..) => {
            Box::new(WideSums { sums: Vec::new(), outputs, data_type: data_type.clone() })
        }
        other => return Err(Error::internal(format!("no sum of {other}"))),
    })
}

#[derive(Clone, Copy, Default)]
struct FloatSum {
    sum: f64,
    /// What rounding took from `sum`.
    correction: f64,
    count: u64,
}

impl FloatSum {
    #[inline]
    fn add(&mut self, value: f64) {
        let total = self.sum + value;
        let added = total - self.sum;
        self.correction += (self.sum - (total - added)) + (value - added);
        self.sum = total;
    }

    fn value(&self) -> f64 {
        let corrected = self.sum + self.correction;
        // Beside an infinity the correction means nothing.
        if corrected.is_nan() { self.sum } else { corrected }
    }
}

struct FloatSums {
    sums: Vec<FloatSum>,
    outputs: Vec<SumOutput>,
}

impl Aggregate for FloatSums {
    fn grow(&mut self, slots: usize) {
        self.sums.resize(slots, FloatSum::default());
    }

    fn update(&mut self, chunk: &Chunk<'_>) -> Result<()> {
        let array = floats(argument(chunk)?)?;
        let values = &array.values()[..chunk.slots.len()];
        each_value(chunk.slots, array, |row, slot| {
            let sum = &mut self.sums[slot];
            sum.add(values[row]);
            sum.count += 1;
        });
        Ok(())
    }

    fn merge(&mut self, pairs: &[(u32, u32)]) -> Result<()> {
        for (into, from) in pairs {
            let (into, from) = pair_mut(&mut self.sums, *into, *from)?;
            into.add(from.sum);
            into.correction += from.correction;
            into.count += from.count;
        }
        Ok(())
    }

    fn clear(&mut self, slots: &[u32]) {
        slots.iter().for_each(|slot| self.sums[*slot as usize] = FloatSum::default());
    }

    fn evaluate(&mut self, slots: &[u32], output: usize) -> Result<ArrayRef> {
        let values = slots.iter().map(|slot| {
            let sum = &self.sums[*slot as usize];
            (sum.count > 0).then(|| match self.outputs[output] {
                SumOutput::Sum => sum.value(),
                SumOutput::Mean => sum.value() / sum.count as f64,
            })
        });
        Ok(Arc::new(values.collect::<Float64Array>()))
    }

    fn save(&self, slots: &[u32], state: &mut StateWriter) -> Result<()> {
        for slot in slots {
            let sum = &self.sums[*slot as usize];
            state.f64(sum.sum);
            state.f64(sum.correction);
            state.u64(sum.count);
        }
        Ok(())
    }

    fn load(&mut self, slots: &[u32], state: &mut StateReader<'_>) -> Result<()> {
        for slot in slots {
            self.sums[*slot as usize] = FloatSum { sum: state.f64()?, correction: state.f64()?, count: state.u64()? };
        }
        Ok(())
    }
}

/// A sum in 128 bits: 2^64 integers fit, or any decimals whose sum has at most 38 digits.
#[derive(Clone, Copy, Default)]
struct WideSum {
    sum: i128,
    count: u64,
    /// The sum left 128 bits; it has no value any more.
    overflowed: bool,
}

impl WideSum {
    #[inline]
    fn add(&mut self, value: i128) {
        let (sum, overflowed) = self.sum.overflowing_add(value);
        self.sum = sum;
        self.overflowed |= overflowed;
    }

    /// The sum, if there is one.
    fn value(&self) -> Option<i128> {
        (self.count > 0 && !self.overflowed).then_some(self.sum)
    }
}

struct WideSums {
    sums: Vec<WideSum>,
    outputs: Vec<SumOutput>,
    data_type: DataType,
}

impl WideSums {
    fn decimals(&self, slots: &[u32], output: SumOutput) -> Result<ArrayRef> {
        let DataType::Decimal128(precision, scale) = output.data_type(&self.data_type) else {
            return Err(Error::internal("a decimal sum of another type"));
        };
        let DataType::Decimal128(_, scale_in) = self.data_type else {
            return Err(Error::internal("a decimal sum of another type"));
        };
        // The mean has more digits after the point than the sum: as DataFusion, cut and not rounded.
        let factor = 10_i128.pow(u32::from(scale.abs_diff(scale_in)));
        let values = slots.iter().map(|slot| {
            let sum = &self.sums[*slot as usize];
            let value = match output {
                SumOutput::Sum => sum.value()?,
                SumOutput::Mean => sum.value()?.checked_mul(factor)? / i128::from(sum.count),
            };
            Decimal128Type::validate_decimal_precision(value, precision, scale).is_ok().then_some(value)
        });
        Ok(Arc::new(values.collect::<Decimal128Array>().with_precision_and_scale(precision, scale)?))
    }
}

impl Aggregate for WideSums {
    fn grow(&mut self, slots: usize) {
        self.sums.resize(slots, WideSum::default());
    }

    fn update(&mut self, chunk: &Chunk<'_>) -> Result<()> {
        let array = argument(chunk)?;
        let mut add = |slot: usize, value: i128| {
            let sum = &mut self.sums[slot];
            sum.add(value);
            sum.count += 1;
        };
        if self.data_type == DataType::Int64 {
            let values = &ints(array)?.values()[..chunk.slots.len()];
            each_value(chunk.slots, array, |row, slot| add(slot, i128::from(values[row])));
        } else {
            let decimals = array.as_primitive_opt::<Decimal128Type>().ok_or_else(|| wrong_type(array))?;
            let values = &decimals.values()[..chunk.slots.len()];
            each_value(chunk.slots, array, |row, slot| add(slot, values[row]));
        }
        Ok(())
    }

    fn merge(&mut self, pairs: &[(u32, u32)]) -> Result<()> {
        for (into, from) in pairs {
            let (into, from) = pair_mut(&mut self.sums, *into, *from)?;
            into.add(from.sum);
            into.overflowed |= from.overflowed;
            into.count += from.count;
        }
        Ok(())
    }

    fn clear(&mut self, slots: &[u32]) {
        slots.iter().for_each(|slot| self.sums[*slot as usize] = WideSum::default());
    }

    fn evaluate(&mut self, slots: &[u32], output: usize) -> Result<ArrayRef> {
        let output = self.outputs[output];
        if self.data_type != DataType::Int64 {
            return self.decimals(slots, output);
        }
        let sums = slots.iter().map(|slot| &self.sums[*slot as usize]);
        Ok(match output {
            SumOutput::Sum => Arc::new(sums.map(|sum| i64::try_from(sum.value()?).ok()).collect::<Int64Array>()),
            SumOutput::Mean => {
                Arc::new(sums.map(|sum| Some(sum.value()? as f64 / sum.count as f64)).collect::<Float64Array>())
            }
        })
    }

    fn save(&self, slots: &[u32], state: &mut StateWriter) -> Result<()> {
        for slot in slots {
            let sum = &self.sums[*slot as usize];
            state.u64(sum.sum as u64);
            state.i64((sum.sum >> 64) as i64);
            state.u64(sum.count);
            state.bool(sum.overflowed);
        }
        Ok(())
    }

    fn load(&mut self, slots: &[u32], state: &mut StateReader<'_>) -> Result<()> {
        for slot in slots {
            let (low, high) = (state.u64()?, state.i64()?);
            self.sums[*slot as usize] = WideSum {
                sum: (i128::from(high) << 64) | i128::from(low),
                count: state.u64()?,
                overflowed: state.bool()?,
            };
        }
        Ok(())
    }
}
