//! Any other DataFusion aggregate, by its name: `median`, `array_agg`, `corr`, `bit_and`, ...
//!
//! One DataFusion accumulator per slot. Rows reach it in arrival order.

use std::cell::RefCell;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, RecordBatch, UInt32Array, new_empty_array};
use arrow::compute::take;
use arrow::datatypes::{DataType, Schema};
use datafusion::common::ScalarValue;
use datafusion::logical_expr::Accumulator;
use datafusion::physical_expr::aggregate::AggregateFunctionExpr;
use pipeline::error::{Error, Result};
use pipeline::state::{StateReader, StateWriter};

use super::{Aggregate, Chunk};
use crate::encoding::cast_to;

/// Most bytes of rows that one aggregate which keeps its rows holds over all its slots: a run-away key set is stopped before
/// the process is.
pub(in super::super) const FUNCTION_BYTES_MAX: usize = 256 << 20;

/// Whether the aggregate keeps its rows.
pub(in super::super) fn buffers_rows(name: &str, distinct: bool) -> bool {
    distinct
        || matches!(name, "array_agg" | "string_agg" | "median" | "percentile_cont" | "nth_value" | "quantile_cont")
}

/// One accumulator.
struct Slot {
    // `state()` consumes what it returns, so even a snapshot takes the accumulator apart and puts it together again.
    accumulator: RefCell<Box<dyn Accumulator>>,
    /// Bytes of the rows it was given.
    bytes: usize,
}

/// The accumulators of every slot.
pub(super) struct Function {
    function: Arc<AggregateFunctionExpr>,
    output: DataType,
    slots: Vec<Option<Slot>>,
    buffers: bool,
    bytes: usize,
    /// [`FUNCTION_BYTES_MAX`].
    bytes_max: usize,
}

impl Function {
    pub(super) fn new(function: Arc<AggregateFunctionExpr>, output: DataType) -> Self {
        let buffers = buffers_rows(function.fun().name(), function.is_distinct());
        Self { function, output, slots: Vec::new(), buffers, bytes: 0, bytes_max: FUNCTION_BYTES_MAX }
    }

    fn slot(&mut self, slot: u32) -> Result<&mut Slot> {
        let place = &mut self.slots[slot as usize];
        if let Some(slot) = place {
            return Ok(slot);
        }
        let accumulator = RefCell::new(self.function.create_accumulator()?);
        Ok(place.insert(Slot { accumulator, bytes: 0 }))
    }

    /// Takes the state out of an accumulator and leaves an equal one behind.
    fn state(&self, slot: &Slot) -> Result<Vec<ScalarValue>> {
        let mut accumulator = slot.accumulator.borrow_mut();
        let state = accumulator.state()?;
        let mut rebuilt = self.function.create_accumulator()?;
        rebuilt.merge_batch(&arrays(&state)?)?;
        *accumulator = rebuilt;
        Ok(state)
    }

    fn count_bytes(&mut self, slot: u32, bytes: usize) -> Result<()> {
        if self.buffers {
            self.slot(slot)?.bytes += bytes;
            self.bytes += bytes;
            if self.bytes > self.bytes_max {
                let name = self.function.fun().name();
                return Err(Error::user(format!(
                    "`{name}` keeps more than {} MiB of rows; use a shorter window, fewer keys, or an aggregate \
                     that keeps none (`percentile`, `distinct`, `last`)",
                    self.bytes_max >> 20
                )));
            }
        }
        Ok(())
    }
}

/// A state as arrays of one row.
fn arrays(state: &[ScalarValue]) -> Result<Vec<ArrayRef>> {
    state.iter().map(|value| Ok(value.to_array()?)).collect()
}

/// Bytes of the rows of a slice.
fn bytes_of(arrays: &[ArrayRef]) -> usize {
    arrays.iter().map(|array| array.to_data().get_slice_memory_size().unwrap_or_default()).sum()
}

impl Aggregate for Function {
    fn grow(&mut self, slots: usize) {
        self.slots.resize_with(slots, || None);
    }

    fn update(&mut self, chunk: &Chunk<'_>) -> Result<()> {
        // Rows of one slot side by side, each slot's in arrival order.
        let mut order: Vec<u32> = (0..chunk.slots.len() as u32).collect();
        order.sort_by_key(|row| chunk.slots[*row as usize]);
        let rows = UInt32Array::from(order);
        let arguments =
            chunk.arguments.iter().map(|array| Ok(take(array, &rows, None)?)).collect::<Result<Vec<_>>>()?;
        let mut at = 0;
        for same in rows.values().chunk_by(|a, b| chunk.slots[*a as usize] == chunk.slots[*b as usize]) {
            let slot = chunk.slots[same[0] as usize];
            let slices: Vec<ArrayRef> = arguments.iter().map(|array| array.slice(at, same.len())).collect();
            at += same.len();
            self.slot(slot)?.accumulator.get_mut().update_batch(&slices)?;
            if self.buffers {
                self.count_bytes(slot, bytes_of(&slices))?;
            }
        }
        Ok(())
    }

    fn merge(&mut self, pairs: &[(u32, u32)]) -> Result<()> {
        for (into, from) in pairs {
            let Some(slot) = &self.slots[*from as usize] else { continue };
            let (state, bytes) = (arrays(&self.state(slot)?)?, slot.bytes);
            self.slot(*into)?.accumulator.get_mut().merge_batch(&state)?;
            self.count_bytes(*into, bytes)?;
        }
        Ok(())
    }

    fn clear(&mut self, slots: &[u32]) {
        for slot in slots {
            if let Some(slot) = self.slots[*slot as usize].take() {
                self.bytes -= slot.bytes;
            }
        }
    }

    fn evaluate(&mut self, slots: &[u32], _output: usize) -> Result<ArrayRef> {
        let function = self.function.clone();
        let mut values = Vec::with_capacity(slots.len());
        for slot in slots {
            // What `evaluate` takes out of an accumulator must be put back: a total goes on.
            let state = match &self.slots[*slot as usize] {
                Some(slot) => arrays(&self.state(slot)?)?,
                None => Vec::new(),
            };
            let mut accumulator = function.create_accumulator()?;
            if !state.is_empty() {
                accumulator.merge_batch(&state)?;
            }
            values.push(accumulator.evaluate()?);
        }
        if values.is_empty() {
            return Ok(new_empty_array(&self.output));
        }
        cast_to(ScalarValue::iter_to_array(values)?, &self.output)
    }

    fn save(&self, slots: &[u32], state: &mut StateWriter) -> Result<()> {
        let mut columns: Vec<Vec<ScalarValue>> = Vec::new();
        for slot in slots {
            let slot = self.slots[*slot as usize].as_ref();
            state.bool(slot.is_some());
            let Some(slot) = slot else { continue };
            state.u64(slot.bytes as u64);
            for (index, value) in self.state(slot)?.into_iter().enumerate() {
                match columns.get_mut(index) {
                    Some(column) => column.push(value),
                    None => columns.push(vec![value]),
                }
            }
        }
        let fields = self.function.state_fields()?;
        let arrays: Vec<ArrayRef> =
            columns.into_iter().map(|column| Ok(ScalarValue::iter_to_array(column)?)).collect::<Result<_>>()?;
        // The arrays know their types better than the declared fields, whose inner names may differ.
        let schema = Schema::new(
            fields
                .iter()
                .zip(&arrays)
                .map(|(field, array)| {
                    field.as_ref().clone().with_data_type(array.data_type().clone()).with_nullable(true)
                })
                .collect::<Vec<_>>(),
        );
        let batches =
            if arrays.is_empty() { Vec::new() } else { vec![RecordBatch::try_new(Arc::new(schema), arrays)?] };
        state.batches(&batches)
    }

    fn load(&mut self, slots: &[u32], state: &mut StateReader<'_>) -> Result<()> {
        let mut held = Vec::new();
        for slot in slots {
            if state.bool()? {
                held.push((*slot, usize::try_from(state.u64()?).unwrap_or(usize::MAX)));
            }
        }
        let batches = state.batches()?;
        let rows: usize = batches.iter().map(RecordBatch::num_rows).sum();
        if rows != held.len() {
            return Err(Error::internal(format!("damaged state: {rows} states of {} slots", held.len())));
        }
        let states = batches.iter().flat_map(|batch| (0..batch.num_rows()).map(|row| batch.slice(row, 1)));
        for ((slot, bytes), one) in held.into_iter().zip(states) {
            self.slot(slot)?.accumulator.get_mut().merge_batch(one.columns())?;
            self.count_bytes(slot, bytes)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::Int64Array;
    use arrow::datatypes::Field;
    use datafusion::physical_expr::aggregate::AggregateExprBuilder;
    use datafusion::physical_expr::expressions::Column;
    use pipeline::expression::session_state;

    use super::*;

    #[test]
    fn kept_rows_end_at_their_limit_with_an_error_and_cleared_slots_give_theirs_back() {
        let function = session_state().aggregate_functions().get("array_agg").expect("array_agg").clone();
        let built = AggregateExprBuilder::new(function, vec![Arc::new(Column::new("n", 0))])
            .schema(Arc::new(Schema::new(vec![Field::new("n", DataType::Int64, true)])))
            .alias("n")
            .build()
            .expect("array_agg of ints");
        let mut aggregate = Function::new(Arc::new(built), DataType::Int64);
        aggregate.bytes_max = 8 * 100;
        aggregate.grow(2);
        let rows: ArrayRef = Arc::new(Int64Array::from_value(1, 60));
        let add = |aggregate: &mut Function, slot| {
            aggregate.update(&Chunk { slots: &[slot; 60], event_us: &[0; 60], arguments: std::slice::from_ref(&rows) })
        };
        add(&mut aggregate, 0).expect("below the limit");
        aggregate.clear(&[0]);
        add(&mut aggregate, 1).expect("below the limit again");
        let error = add(&mut aggregate, 0).expect_err("beyond the limit").to_string();
        assert!(error.starts_with("`array_agg` keeps more than"), "{error}");
    }
}
