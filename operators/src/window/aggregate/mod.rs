//! Aggregates: what a window keeps of the rows it saw.
//!
//! The state of one aggregate is one column of *slots*. A slot is a number that stands for one key in one
//! pane; the window hands them out, and every aggregate keeps the state of slot `n` at its index `n`. So a batch
//! is added with one virtual call per aggregate and a tight loop inside, and nothing is allocated per row.
//!
//! Every state merges: two slots that saw different rows become one that saw both. On a tie of event times the
//! rows of `from` count as arrived after those of `into`.

mod count;
mod counter;
mod distinct;
mod edge;
mod extreme;
mod function;
mod moments;
mod percentile;
mod stored;
mod sum;

use std::sync::Arc;

use crate::encoding::Layout;
use arrow::array::{Array, ArrayRef, AsArray, Float64Array, Int64Array};
use arrow::datatypes::{DataType, Float64Type, Int64Type};
use datafusion::physical_expr::aggregate::AggregateFunctionExpr;
use pipeline::error::{Error, Result};
use pipeline::schema::timestamp_type;
use pipeline::state::{StateReader, StateWriter};

pub(super) use edge::delta_type;
pub(super) use function::{FUNCTION_BYTES_MAX, buffers_rows};
pub(super) use moments::Moment;
pub(super) use sum::SumOutput;

/// Rows to add: equally long columns.
pub(super) struct Chunk<'a> {
    /// The slot of each row.
    pub(super) slots: &'a [u32],
    /// Event time of each row, in microseconds.
    pub(super) event_us: &'a [i64],
    /// The values of each argument.
    pub(super) arguments: &'a [ArrayRef],
}

/// The state of one aggregate for every slot.
pub(super) trait Aggregate: Send {
    /// Makes room for slots below `slots`; new ones are empty.
    fn grow(&mut self, slots: usize);

    /// Adds rows in arrival order.
    fn update(&mut self, chunk: &Chunk<'_>) -> Result<()>;

    /// For each pair `(into, from)` in order: adds what `from` saw to `into`. `from` stays as it is.
    fn merge(&mut self, pairs: &[(u32, u32)]) -> Result<()>;

    /// Rows of these slots have been given out and others come seldom: a state that keeps rows for the sake
    /// of their order may let them go.
    fn settle(&mut self, _slots: &[u32]) {}

    /// Empties slots for others to use.
    fn clear(&mut self, slots: &[u32]);

    /// The values of output `output`, one per slot.
    fn evaluate(&mut self, slots: &[u32], output: usize) -> Result<ArrayRef>;

    /// Writes the state of these slots.
    fn save(&self, slots: &[u32], state: &mut StateWriter) -> Result<()>;

    /// Reads what [`Self::save`] wrote for as many slots into these, which are empty.
    fn load(&mut self, slots: &[u32], state: &mut StateReader<'_>) -> Result<()>;
}

/// What kind of state an aggregate needs, over arguments of which types.
#[derive(Clone, Debug)]
pub(super) enum Family {
    /// Rows, or values that are not null if there is an argument.
    Count,
    /// Sums and means of a number type (int, float, decimal).
    Sum(DataType, Vec<SumOutput>),
    /// Variances and standard deviations of floats.
    Moments(Vec<Moment>),
    /// The least or the greatest value.
    Extreme { data_type: DataType, greatest: bool },
    /// The first or the last value in event time.
    Edge { data_type: DataType, last: bool, ignore_nulls: bool },
    /// Last minus first number.
    Delta(DataType),
    /// Per-second increase of a counter (int, float).
    Counter(DataType),
    /// Values at ranks, of floats.
    Percentile(Vec<f64>),
    /// Number of different values.
    Distinct(DataType),
    /// A DataFusion aggregate, cast to a type of ours at the end.
    Function(Arc<AggregateFunctionExpr>, DataType),
}

impl Family {
    /// An empty state.
    pub(super) fn build(&self) -> Result<Box<dyn Aggregate>> {
        Ok(match self {
            Self::Count => Box::new(count::Count::default()),
            Self::Sum(data_type, outputs) => sum::build(data_type, outputs)?,
            Self::Moments(outputs) => Box::new(moments::Moments::new(outputs)),
            Self::Extreme { data_type, greatest } => extreme::build(data_type, *greatest)?,
            Self::Edge { data_type, last, ignore_nulls } => edge::build(data_type, *last, *ignore_nulls)?,
            Self::Delta(data_type) => edge::build_delta(data_type)?,
            Self::Counter(DataType::Int64) => Box::new(counter::Counter::<i64>::default()),
            Self::Counter(_) => Box::new(counter::Counter::<f64>::default()),
            Self::Percentile(quantiles) => Box::new(percentile::Percentile::new(quantiles)),
            Self::Distinct(data_type) => Box::new(distinct::Distinct::new(data_type)?),
            Self::Function(function, output) => Box::new(function::Function::new(function.clone(), output.clone())),
        })
    }

    /// Adds the outputs of another of the same family and arguments, so that both share one state. Returns the
    /// index of `other`'s first output, or `None` if the two cannot share.
    pub(super) fn share(&mut self, other: &Self) -> Option<usize> {
        fn add<T: PartialEq + Clone>(all: &mut Vec<T>, more: &[T]) -> Option<usize> {
            let wanted = more.first()?;
            if let Some(index) = all.iter().position(|one| one == wanted) {
                return Some(index);
            }
            all.push(wanted.clone());
            Some(all.len() - 1)
        }
        match (self, other) {
            (Self::Count, Self::Count) => Some(0),
            (Self::Sum(a, all), Self::Sum(b, more)) if a == b => add(all, more),
            (Self::Moments(all), Self::Moments(more)) => add(all, more),
            (Self::Percentile(all), Self::Percentile(more)) => add(all, more),
            _ => None,
        }
    }
}

/// The type of ours (see `fields:`) that values of `data_type` are computed and given out in. Types that have
/// none stay as they are.
pub(super) fn plain_type(data_type: &DataType) -> DataType {
    match data_type {
        t if t.is_integer() => DataType::Int64,
        DataType::Float16 | DataType::Float32 => DataType::Float64,
        DataType::LargeUtf8 | DataType::Utf8View => DataType::Utf8,
        DataType::LargeBinary | DataType::BinaryView | DataType::FixedSizeBinary(_) => DataType::Binary,
        DataType::Timestamp(..) => timestamp_type(),
        DataType::Date64 => DataType::Date32,
        DataType::Decimal32(precision, scale) | DataType::Decimal64(precision, scale) => {
            DataType::Decimal128(*precision, *scale)
        }
        DataType::Dictionary(_, values) => plain_type(values),
        other => other.clone(),
    }
}

/// Whether `data_type` is a number of ours.
pub(super) fn is_number(data_type: &DataType) -> bool {
    matches!(data_type, DataType::Int64 | DataType::Float64 | DataType::Decimal128(..))
}

/// Whether values of this type (one of ours) have an order.
pub(super) fn is_ordered(data_type: &DataType) -> bool {
    Layout::of(data_type).is_some()
}

/// The argument as integers.
fn ints(array: &ArrayRef) -> Result<&Int64Array> {
    array.as_primitive_opt::<Int64Type>().ok_or_else(|| wrong_type(array))
}

/// The argument as floats.
fn floats(array: &ArrayRef) -> Result<&Float64Array> {
    array.as_primitive_opt::<Float64Type>().ok_or_else(|| wrong_type(array))
}

fn wrong_type(array: &ArrayRef) -> Error {
    Error::internal(format!("an aggregate was planned over another type than {}", array.data_type()))
}

/// The only argument.
fn argument<'a>(chunk: &Chunk<'a>) -> Result<&'a ArrayRef> {
    chunk.arguments.first().ok_or_else(|| Error::internal("an aggregate without its argument"))
}

/// Calls `add(row, slot)` for every row whose value is not null.
#[inline]
fn each_value(slots: &[u32], array: &dyn Array, mut add: impl FnMut(usize, usize)) {
    match array.logical_nulls().filter(|nulls| nulls.null_count() > 0) {
        None => {
            for (row, slot) in slots.iter().enumerate() {
                add(row, *slot as usize);
            }
        }
        Some(nulls) => {
            for (row, slot) in slots.iter().enumerate() {
                if nulls.is_valid(row) {
                    add(row, *slot as usize);
                }
            }
        }
    }
}

/// Two different elements of one slice, the first to write and the second to read.
fn pair_mut<T>(all: &mut [T], into: u32, from: u32) -> Result<(&mut T, &T)> {
    match all.get_disjoint_mut([into as usize, from as usize]) {
        Ok([into, from]) => Ok((into, from)),
        Err(_) => Err(Error::internal("a merge of a slot with itself")),
    }
}
