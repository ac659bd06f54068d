//! Slots and what every kind of window shares: reading batches, keeping state, giving out results.

use std::ops::Range;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, BooleanArray, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow::buffer::ScalarBuffer;
use arrow::compute::filter;
use arrow::datatypes::{DataType, SchemaRef};
use pipeline::batch::{BATCH_ROWS_MAX, Batch, Stage, Times};
use pipeline::error::{Error, Result};
use pipeline::expression::Expression;
use pipeline::plugin::Output;
use pipeline::state::{StateReader, StateWriter};

use super::aggregate::{Aggregate, Chunk, Family};
use super::keys::{KeyColumns, Keys, NONE};
use crate::encoding::cast_to;

/// Most slots (a key in a pane, or in an open window) of one window step. At 100 to 200 bytes each
/// this is most of a gigabyte; a key set that grows without end is stopped before the process is.
pub(super) const SLOTS_MAX: usize = 1 << 22;

/// Event times further than this from 1970 (73,000 years) belong to no window: their ends might not fit 64 bits.
const EVENT_US_MAX: u64 = (i64::MAX / 4) as u64;

/// Version of the state that a snapshot holds.
const STATE_VERSION: u64 = 1;

/// What a window step computes, made from the YAML.
pub(super) struct Plan {
    /// The `group_by` columns.
    pub(super) keys: KeyColumns,
    /// The arguments of all aggregates, each once.
    pub(super) arguments: Vec<Argument>,
    /// The conditions of all FILTERs, each once.
    pub(super) filters: Vec<Expression>,
    /// The states to keep.
    pub(super) states: Vec<State>,
    /// The aggregate calls of all expressions, each once.
    pub(super) calls: Vec<Call>,
    /// The columns under `aggregate`.
    pub(super) columns: Vec<Column>,
    /// What expressions around aggregates see: the calls, then the keys.
    pub(super) inner: SchemaRef,
    /// The visible columns of results.
    pub(super) output: SchemaRef,
}

/// An argument of aggregates.
pub(super) struct Argument {
    pub(super) expression: Expression,
    /// What the aggregate takes; values of another type are cast.
    pub(super) data_type: DataType,
}

/// One state.
pub(super) struct State {
    pub(super) family: Family,
    /// Indices of its arguments.
    pub(super) arguments: Vec<usize>,
    /// Index of the condition that rows must meet.
    pub(super) filter: Option<usize>,
}

/// Where the value of an aggregate call comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// The number of rows.
    Rows,
    /// The number of rows per second, of all or of those that a state counts.
    RowRate(Option<usize>),
    /// An output of a state.
    State { state: usize, output: usize },
}

/// One aggregate call.
pub(super) struct Call {
    pub(super) source: Source,
    /// The type that results have.
    pub(super) data_type: DataType,
}

/// A column under `aggregate`.
pub(super) enum Column {
    /// An aggregate call.
    Call(usize),
    /// An expression over aggregate calls and keys.
    Expression(Expression),
}

/// The rows of a batch, ready to be added.
pub(super) struct Rows {
    event_us: ScalarBuffer<i64>,
    ingest_us: ScalarBuffer<i64>,
    arguments: Vec<ArrayRef>,
    filters: Vec<BooleanArray>,
}

/// What a slot knows beside its aggregates.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pub(super) rows: i64,
    pub(super) first_us: i64,
    pub(super) last_us: i64,
    newest_ingest_us: i64,
}

impl Seen {
    const NOTHING: Self = Self { rows: 0, first_us: i64::MAX, last_us: i64::MIN, newest_ingest_us: i64::MIN };

    fn merge(&mut self, other: &Self) {
        self.rows += other.rows;
        self.first_us = self.first_us.min(other.first_us);
        self.last_us = self.last_us.max(other.last_us);
        self.newest_ingest_us = self.newest_ingest_us.max(other.newest_ingest_us);
    }
}

/// The slots with their states.
struct Slots {
    seen: Vec<Seen>,
    key: Vec<u32>,
    free: Vec<u32>,
    aggregates: Vec<Box<dyn Aggregate>>,
    /// [`SLOTS_MAX`].
    max: usize,
}

/// A result to give out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Closing {
    pub(super) start_us: i64,
    pub(super) end_us: i64,
    /// The time that `rate()` divides by; 0 makes it null.
    pub(super) span_us: i64,
    pub(super) slot: u32,
    /// Whether the slot is free afterwards.
    pub(super) free: bool,
}

/// The state and the results of a window step, whatever its kind.
pub(super) struct Core {
    plan: Plan,
    keys: Keys,
    slots: Slots,
    closing: Vec<Closing>,
    /// Windows that end at or before it are closed.
    pub(super) watermark_us: i64,
    /// Rows that came too late.
    pub(super) late: u64,
}

impl Core {
    /// With no state yet.
    pub(super) fn new(plan: Plan) -> Result<Self> {
        let aggregates = plan.states.iter().map(|state| state.family.build()).collect::<Result<_>>()?;
        let slots = Slots { seen: Vec::new(), key: Vec::new(), free: Vec::new(), aggregates, max: SLOTS_MAX };
        let keys = Keys::default();
        Ok(Self { plan, keys, slots, closing: Vec::new(), watermark_us: i64::MIN, late: 0 })
    }

    /// The watermark in force for each row: its own, but never behind one that closed windows already.
    pub(super) fn watermarks(&self, batch: &Batch) -> Vec<i64> {
        let mut reached = self.watermark_us;
        let mut column = Vec::with_capacity(batch.len());
        for watermark_us in batch.watermark_us() {
            reached = reached.max(*watermark_us);
            column.push(reached);
        }
        column
    }

    /// Event time has reached `watermark_us`. The end of all rows is no time that later rows could be judged by: after
    /// a drain, the next run goes on behind the last window that was closed.
    pub(super) fn reach(&mut self, watermark_us: i64) {
        if watermark_us != i64::MAX {
            self.watermark_us = self.watermark_us.max(watermark_us);
        }
    }

    /// Whether windows around this event time can be computed with.
    pub(super) fn in_range(event_us: i64) -> bool {
        event_us.unsigned_abs() <= EVENT_US_MAX
    }

    /// Evaluates the arguments of all rows.
    pub(super) fn rows(&self, batch: &Batch) -> Result<Rows> {
        let arguments = self.plan.arguments.iter().map(|a| cast_to(a.expression.evaluate(batch)?, &a.data_type));
        let filters = self.plan.filters.iter().map(|condition| condition.evaluate_condition(batch));
        Ok(Rows {
            event_us: batch.times().event_us.values().clone(),
            ingest_us: batch.times().ingest_us.values().clone(),
            arguments: arguments.collect::<Result<_>>()?,
            filters: filters.collect::<Result<_>>()?,
        })
    }

    /// The key of every row.
    pub(super) fn find_keys(&mut self, batch: &Batch) -> Result<Vec<u32>> {
        self.plan.keys.find(batch.rows().columns(), batch.len(), &mut self.keys)
    }

    pub(super) fn keys(&self) -> &Keys {
        &self.keys
    }

    pub(super) fn keys_mut(&mut self) -> &mut Keys {
        &mut self.keys
    }

    /// An empty slot of `key`.
    pub(super) fn open(&mut self, key: u32) -> Result<u32> {
        if self.slots.free.is_empty() {
            self.slots.grow()?;
        }
        let slot = self.slots.free.pop().ok_or_else(|| Error::internal("no free slot after growing"))?;
        self.slots.key[slot as usize] = key;
        self.keys.hold(key);
        Ok(slot)
    }

    /// Empties slots for others to use.
    pub(super) fn free(&mut self, slots: &[u32]) {
        for slot in slots {
            self.slots.seen[*slot as usize] = Seen::NOTHING;
            let key = std::mem::replace(&mut self.slots.key[*slot as usize], NONE);
            self.keys.release(key);
        }
        self.slots.aggregates.iter_mut().for_each(|aggregate| aggregate.clear(slots));
        self.slots.free.extend_from_slice(slots);
    }

    /// The key of a slot.
    pub(super) fn key_of(&self, slot: u32) -> u32 {
        self.slots.key[slot as usize]
    }

    /// What a slot saw.
    pub(super) fn seen(&self, slot: u32) -> &Seen {
        &self.slots.seen[slot as usize]
    }

    /// Sorts slots by their keys' values, null first.
    pub(super) fn sort_by_key(&self, slots: &mut [u32]) {
        slots.sort_unstable_by(|a, b| self.compare_keys(*a, *b));
    }

    /// How the keys of two slots stand to each other.
    pub(super) fn compare_keys(&self, a: u32, b: u32) -> std::cmp::Ordering {
        self.keys.bytes(self.key_of(a)).cmp(self.keys.bytes(self.key_of(b)))
    }

    /// Adds the rows `range`, of which `slots` are the slots, to all states.
    pub(super) fn update(&mut self, rows: &Rows, range: Range<usize>, slots: &[u32]) -> Result<()> {
        let events = &rows.event_us[range.clone()];
        for ((slot, event_us), ingest_us) in slots.iter().zip(events).zip(&rows.ingest_us[range.clone()]) {
            let seen = &mut self.slots.seen[*slot as usize];
            seen.rows += 1;
            seen.first_us = seen.first_us.min(*event_us);
            seen.last_us = seen.last_us.max(*event_us);
            seen.newest_ingest_us = seen.newest_ingest_us.max(*ingest_us);
        }
        for (aggregate, state) in self.slots.aggregates.iter_mut().zip(&self.plan.states) {
            let slice = |index: &usize| rows.arguments[*index].slice(range.start, range.len());
            let arguments: Vec<ArrayRef> = state.arguments.iter().map(slice).collect();
            match state.filter {
                None => aggregate.update(&Chunk { slots, event_us: events, arguments: &arguments })?,
                Some(index) => {
                    let mask = rows.filters[index].slice(range.start, range.len());
                    update_filtered(aggregate.as_mut(), &mask, slots, events, &arguments)?;
                }
            }
        }
        Ok(())
    }

    /// For each pair `(into, from)` in order: adds what `from` saw to `into`.
    pub(super) fn merge(&mut self, pairs: &[(u32, u32)]) -> Result<()> {
        for (into, from) in pairs {
            let from = self.slots.seen[*from as usize];
            self.slots.seen[*into as usize].merge(&from);
        }
        self.slots.aggregates.iter_mut().try_for_each(|aggregate| aggregate.merge(pairs))
    }

    /// See [`Aggregate::settle`].
    pub(super) fn settle(&mut self, slots: &[u32]) {
        self.slots.aggregates.iter_mut().for_each(|aggregate| aggregate.settle(slots));
    }

    /// Gives out a result, at the latest with the next [`Self::flush`]. Until then its slot must stay as it is.
    pub(super) fn close(&mut self, closing: Closing, out: &mut Output) -> Result<()> {
        self.closing.push(closing);
        if self.closing.len() >= BATCH_ROWS_MAX { self.flush(out) } else { Ok(()) }
    }

    /// Gives out what is closed.
    pub(super) fn flush(&mut self, out: &mut Output) -> Result<()> {
        if self.closing.is_empty() {
            return Ok(());
        }
        let closing = std::mem::take(&mut self.closing);
        out.push(self.results(&closing)?);
        let free: Vec<u32> = closing.iter().filter(|one| one.free).map(|one| one.slot).collect();
        self.free(&free);
        self.closing = closing;
        self.closing.clear();
        Ok(())
    }

    /// Ends a call: gives out what is closed and forgets keys that nothing holds.
    pub(super) fn finish(&mut self, out: &mut Output) -> Result<()> {
        self.flush(out)?;
        self.keys.sweep();
        Ok(())
    }

    /// One batch of results.
    ///
    /// The watermark of a result is its own event time, `window_end` - 1 us. Results leave in the order of
    /// their ends, so no later one has an event time before it: a window downstream may close whatever ends there
    /// and never judges a result late, for the window that a result falls into ends at `window_end` or after.
    fn results(&mut self, closing: &[Closing]) -> Result<Batch> {
        let rows = closing.len();
        let slots: Vec<u32> = closing.iter().map(|one| one.slot).collect();
        let keys: Vec<u32> = slots.iter().map(|slot| self.key_of(*slot)).collect();
        let key_columns = self.plan.keys.decode(&self.keys, &keys)?;
        let calls =
            (0..self.plan.calls.len()).map(|call| self.call(call, closing, &slots)).collect::<Result<Vec<_>>>()?;

        let seen = |f: fn(&Seen) -> i64| slots.iter().map(|slot| f(self.seen(*slot))).collect::<Vec<i64>>();
        let event_us: Int64Array = closing.iter().map(|one| one.end_us - 1).collect::<Vec<_>>().into();
        let times =
            Times { watermark_us: event_us.clone(), event_us, ingest_us: seen(|seen| seen.newest_ingest_us).into() };
        let computed = self.columns(&calls, &key_columns, &times)?;

        let timestamps = |f: fn(&Closing) -> i64| -> ArrayRef {
            Arc::new(TimestampMicrosecondArray::from_iter_values(closing.iter().map(f)).with_timezone("UTC"))
        };
        let mut columns = vec![timestamps(|one| one.start_us), timestamps(|one| one.end_us)];
        columns.extend(key_columns);
        columns.extend(computed);
        columns.push(Arc::new(Int64Array::from(seen(|seen| seen.rows))));
        columns.push(Arc::new(StringArray::from_iter_values(std::iter::repeat_n(Stage::Final.as_str(), rows))));
        columns.push(Arc::new(Int64Array::from_value(0, rows)));
        Batch::new(RecordBatch::try_new(self.plan.output.clone(), columns)?, times, Stage::Final)
    }

    /// The values of one aggregate call.
    fn call(&mut self, call: usize, closing: &[Closing], slots: &[u32]) -> Result<ArrayRef> {
        let Call { source, data_type } = &self.plan.calls[call];
        let array: ArrayRef = match source {
            Source::Rows => Arc::new(slots.iter().map(|slot| Some(self.seen(*slot).rows)).collect::<Int64Array>()),
            Source::RowRate(counted) => {
                let counts: Int64Array = match counted {
                    Some(state) => self.slots.aggregates[*state].evaluate(slots, 0)?.to_data().into(),
                    None => slots.iter().map(|slot| Some(self.seen(*slot).rows)).collect(),
                };
                let rates = counts
                    .values()
                    .iter()
                    .zip(closing)
                    .map(|(count, one)| (one.span_us > 0).then(|| *count as f64 / (one.span_us as f64 / 1e6)));
                Arc::new(rates.collect::<arrow::array::Float64Array>())
            }
            Source::State { state, output } => self.slots.aggregates[*state].evaluate(slots, *output)?,
        };
        cast_to(array, data_type)
    }

    /// The columns under `aggregate`.
    fn columns(&self, calls: &[ArrayRef], keys: &[ArrayRef], times: &Times) -> Result<Vec<ArrayRef>> {
        let mut inner = None;
        let mut columns = Vec::with_capacity(self.plan.columns.len());
        for column in &self.plan.columns {
            columns.push(match column {
                Column::Call(call) => calls[*call].clone(),
                Column::Expression(expression) => {
                    if inner.is_none() {
                        let arrays = calls.iter().chain(keys).cloned().collect();
                        let rows = RecordBatch::try_new(self.plan.inner.clone(), arrays)?;
                        inner = Some(Batch::new(rows, times.clone(), Stage::Final)?);
                    }
                    let Some(batch) = &inner else { return Err(Error::internal("no inner batch")) };
                    let index = columns.len() + 2 + keys.len();
                    cast_to(expression.evaluate(batch)?, self.plan.output.field(index).data_type())?
                }
            });
        }
        Ok(columns)
    }

    /// Writes the common part of the state.
    pub(super) fn save(&self, state: &mut StateWriter) {
        state.u64(STATE_VERSION);
        state.u64(self.slots.aggregates.len() as u64);
        state.i64(self.watermark_us);
        state.u64(self.late);
    }

    /// Reads what [`Self::save`] wrote.
    pub(super) fn load(&mut self, state: &mut StateReader<'_>) -> Result<()> {
        let version = state.u64()?;
        if version != STATE_VERSION {
            return Err(Error::internal(format!("window state of version {version}, not {STATE_VERSION}")));
        }
        let aggregates = state.u64()?;
        if aggregates != self.slots.aggregates.len() as u64 {
            return Err(Error::internal(format!(
                "window state of {aggregates} aggregates, not {}",
                self.slots.aggregates.len()
            )));
        }
        self.watermark_us = state.i64()?;
        self.late = state.u64()?;
        Ok(())
    }

    /// Writes slots, each with a number that says where it belongs, in the order given: one that stays the same from
    /// one checkpoint to the next leaves most of the state the same.
    pub(super) fn save_slots(&self, places: &[(i64, u32)], state: &mut StateWriter) -> Result<()> {
        state.u64(places.len() as u64);
        for (place, slot) in places {
            state.i64(*place);
            state.bytes(self.keys.bytes(self.key_of(*slot)));
            let seen = self.seen(*slot);
            state.i64(seen.rows);
            state.i64(seen.first_us);
            state.i64(seen.last_us);
            state.i64(seen.newest_ingest_us);
        }
        let slots: Vec<u32> = places.iter().map(|(_, slot)| *slot).collect();
        self.slots.aggregates.iter().try_for_each(|aggregate| aggregate.save(&slots, state))
    }

    /// Reads what [`Self::save_slots`] wrote into new slots.
    pub(super) fn load_slots(&mut self, state: &mut StateReader<'_>) -> Result<Vec<(i64, u32)>> {
        let mut places = Vec::new();
        for _ in 0..state.count()? {
            let place = state.i64()?;
            let key = self.keys.find_or_add(state.bytes()?);
            let slot = self.open(key)?;
            self.slots.seen[slot as usize] = Seen {
                rows: state.i64()?,
                first_us: state.i64()?,
                last_us: state.i64()?,
                newest_ingest_us: state.i64()?,
            };
            places.push((place, slot));
        }
        let slots: Vec<u32> = places.iter().map(|(_, slot)| *slot).collect();
        self.slots.aggregates.iter_mut().try_for_each(|aggregate| aggregate.load(&slots, state))?;
        Ok(places)
    }
}

impl Slots {
    /// Doubles the slots.
    fn grow(&mut self) -> Result<()> {
        let (before, after) = (self.seen.len(), (self.seen.len() * 2).clamp(64, self.max));
        if before == after {
            return Err(Error::user(format!(
                "more than {} keys and panes are open; group by fewer keys, or use shorter windows or a longer `every`",
                self.max
            )));
        }
        self.seen.resize(after, Seen::NOTHING);
        self.key.resize(after, NONE);
        self.free.extend((before as u32..after as u32).rev());
        self.aggregates.iter_mut().for_each(|aggregate| aggregate.grow(after));
        Ok(())
    }
}

/// Adds the rows for which the condition is true (null counts as false).
fn update_filtered(
    aggregate: &mut dyn Aggregate,
    mask: &BooleanArray,
    slots: &[u32],
    event_us: &[i64],
    arguments: &[ArrayRef],
) -> Result<()> {
    let met = |row: usize| mask.is_valid(row) && mask.value(row);
    let (slots, event_us): (Vec<u32>, Vec<i64>) = slots
        .iter()
        .zip(event_us)
        .enumerate()
        .filter(|(row, _)| met(*row))
        .map(|(_, (slot, event_us))| (*slot, *event_us))
        .unzip();
    if slots.is_empty() {
        return Ok(());
    }
    let arguments = arguments.iter().map(|array| Ok(filter(array, mask)?)).collect::<Result<Vec<_>>>()?;
    aggregate.update(&Chunk { slots: &slots, event_us: &event_us, arguments: &arguments })
}

/// Reads what [`StateWriter::attempt`] wrote.
pub(super) fn restore(
    state: &mut StateReader<'_>,
    read: impl FnOnce(&mut StateReader<'_>) -> Result<()>,
) -> Result<()> {
    if !state.bool()? {
        return Err(Error::internal(format!("the state of the window could not be saved: {}", state.str()?)));
    }
    let mut whole = StateReader::new(state.bytes()?);
    read(&mut whole)?;
    if whole.is_empty() { Ok(()) } else { Err(Error::internal("damaged state: more than one window's")) }
}

#[cfg(test)]
mod tests {
    use arrow::datatypes::Schema;

    use super::*;

    #[test]
    fn slots_end_at_their_limit_with_an_error_and_are_used_again() {
        let empty: SchemaRef = Arc::new(Schema::empty());
        let plan = Plan {
            keys: KeyColumns::default(),
            arguments: Vec::new(),
            filters: Vec::new(),
            states: Vec::new(),
            calls: Vec::new(),
            columns: Vec::new(),
            inner: empty.clone(),
            output: empty,
        };
        let mut core = Core::new(plan).expect("no aggregates");
        core.slots.max = 128;
        let key = core.keys.find_or_add(b"key");
        let slots: Vec<u32> = (0..128).map(|_| core.open(key).expect("below the limit")).collect();
        let error = core.open(key).expect_err("at the limit").to_string();
        assert!(error.starts_with("more than 128 keys and panes are open; group by fewer keys"), "{error}");
        core.free(&slots[..1]);
        assert_eq!(core.open(key).expect("a free slot"), slots[0]);
        core.free(&slots);
        core.keys.sweep();
        assert_eq!(core.keys.find_or_add(b"other"), key, "a key that no slot holds is forgotten");
    }
}
