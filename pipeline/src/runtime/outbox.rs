//! The bounded outbox before a database or broker, and the task that empties it.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arrow::array::RecordBatch;
use arrow::compute::concat_batches;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::warn;

use super::back_off::BackOff;
use crate::error::{Error, Result, Retry};
use crate::plugin::{BatchLimits, OutboxSink, SinkInput};
use crate::state::{StateReader, StateWriter};
use crate::status::{NodeState, NodeStatus, lock};
use crate::time::now_us;

/// Most bytes of rows that wait for the other side; then the graph is held back.
const OUTBOX_BYTES_MAX: usize = 256 << 20;

/// At a stop, rows are delivered for this long; the rest stays in the checkpoint.
const DRAIN: Duration = Duration::from_secs(5);

/// Rows on their way to one sink.
pub(crate) struct Outbox {
    limits: BatchLimits,
    inner: Mutex<Inner>,
    changed: Notify,
    room: Notify,
    empty: Notify,
}

struct Inner {
    inputs: Vec<SinkInput>,
    waiting: Vec<Waiting>,
    in_flight: Option<Delivery>,
    next_id: u64,
    bytes: usize,
    draining: bool,
}

/// Rows of one input.
#[derive(Default)]
struct Waiting {
    batches: VecDeque<RecordBatch>,
    rows: usize,
    since: Option<Instant>,
}

/// Rows that are being delivered; a repeated delivery has the same id and the same rows.
#[derive(Clone)]
struct Delivery {
    input: usize,
    id: u64,
    rows: RecordBatch,
}

impl Outbox {
    pub(crate) fn new(limits: BatchLimits, inputs: Vec<SinkInput>) -> Self {
        let waiting = inputs.iter().map(|_| Waiting::default()).collect();
        // Ids grow through restarts, so that a sink that remembers the last one never takes a new delivery for a repeated one.
        let next_id = u64::try_from(now_us()).unwrap_or(1);
        Self {
            limits,
            inner: Mutex::new(Inner { inputs, waiting, in_flight: None, next_id, bytes: 0, draining: false }),
            changed: Notify::new(),
            room: Notify::new(),
            empty: Notify::new(),
        }
    }

    /// Adds rows; waits while the outbox is full.
    pub(crate) async fn put(&self, input: usize, rows: &RecordBatch) {
        loop {
            let room = self.room.notified();
            {
                let mut inner = lock(&self.inner);
                if inner.bytes < OUTBOX_BYTES_MAX {
                    inner.add(input, rows.clone());
                    break;
                }
            }
            room.await;
        }
        self.changed.notify_one();
    }

    /// Delivers what waits, for a few seconds at most.
    pub(crate) async fn drain(&self) {
        lock(&self.inner).draining = true;
        self.changed.notify_one();
        let emptied = async {
            loop {
                let empty = self.empty.notified();
                if lock(&self.inner).is_empty() {
                    return;
                }
                empty.await;
            }
        };
        let _ = timeout(DRAIN, emptied).await;
    }

    pub(crate) fn snapshot(&self, state: &mut StateWriter) -> Result<()> {
        let inner = lock(&self.inner);
        state.bool(inner.in_flight.is_some());
        if let Some(delivery) = &inner.in_flight {
            state.str(&inner.inputs[delivery.input].metric);
            state.u64(delivery.id);
            state.batches(std::slice::from_ref(&delivery.rows))?;
        }
        state.u64(inner.waiting.len() as u64);
        for (input, waiting) in inner.inputs.iter().zip(&inner.waiting) {
            state.str(&input.metric);
            let batches: Vec<RecordBatch> = waiting.batches.iter().cloned().collect();
            state.batches(&batches)?;
        }
        Ok(())
    }

    pub(crate) fn restore(&self, state: &[u8]) -> Result<()> {
        let mut state = StateReader::new(state);
        let mut inner = lock(&self.inner);
        if state.bool()? {
            let metric = state.str()?;
            let id = state.u64()?;
            inner.next_id = inner.next_id.max(id + 1);
            for rows in state.batches()? {
                if let Some(input) = inner.input_of(metric, &rows) {
                    inner.bytes += size(&rows);
                    inner.in_flight = Some(Delivery { input, id, rows });
                }
            }
        }
        for _ in 0..state.count()? {
            let metric = state.str()?;
            for rows in state.batches()? {
                if let Some(input) = inner.input_of(metric, &rows) {
                    inner.add(input, rows);
                }
            }
        }
        Ok(())
    }

    /// The next delivery, if one is due; else when to look again.
    fn next(&self) -> Result<std::result::Result<Delivery, Option<Instant>>> {
        let mut inner = lock(&self.inner);
        if let Some(delivery) = &inner.in_flight {
            return Ok(Ok(delivery.clone()));
        }
        let now = Instant::now();
        let draining = inner.draining;
        let limits = self.limits;
        let due = |waiting: &Waiting| {
            waiting.since.map(|since| if draining || waiting.rows >= limits.rows { now } else { since + limits.every })
        };
        let first = inner.waiting.iter().enumerate().filter_map(|(input, w)| Some((due(w)?, input))).min();
        match first {
            Some((at, input)) if at <= now => {
                let rows = inner.waiting[input].take(limits.rows)?;
                let delivery = Delivery { input, id: inner.next_id, rows };
                inner.next_id += 1;
                inner.in_flight = Some(delivery.clone());
                Ok(Ok(delivery))
            }
            other => Ok(Err(other.map(|(at, _)| at))),
        }
    }

    /// Waits for the next delivery.
    async fn due(&self) -> Result<Delivery> {
        loop {
            let changed = self.changed.notified();
            match self.next()? {
                Ok(delivery) => return Ok(delivery),
                Err(Some(at)) => tokio::select! {
                    () = changed => {}
                    () = sleep_until(at) => {}
                },
                Err(None) => changed.await,
            }
        }
    }

    fn done(&self, delivery: &Delivery) {
        let mut inner = lock(&self.inner);
        inner.in_flight = None;
        inner.bytes = inner.bytes.saturating_sub(size(&delivery.rows));
        if inner.is_empty() {
            inner.bytes = 0;
            self.empty.notify_waiters();
        }
        drop(inner);
        self.room.notify_waiters();
    }
}

impl Inner {
    /// The input that takes rows of an earlier run: the same metric with the same columns.
    fn input_of(&self, metric: &str, rows: &RecordBatch) -> Option<usize> {
        let same =
            |input: &SinkInput| input.metric == metric && input.shape.schema.fields() == rows.schema_ref().fields();
        let found = self.inputs.iter().position(same);
        if found.is_none() {
            let count = rows.num_rows();
            warn!("`{metric}` has other columns now or goes elsewhere: {count} rows that waited for delivery are lost");
        }
        found
    }

    fn add(&mut self, input: usize, rows: RecordBatch) {
        self.bytes += size(&rows);
        let waiting = &mut self.waiting[input];
        waiting.rows += rows.num_rows();
        waiting.since.get_or_insert_with(Instant::now);
        waiting.batches.push_back(rows);
    }

    fn is_empty(&self) -> bool {
        self.in_flight.is_none() && self.waiting.iter().all(|waiting| waiting.rows == 0)
    }
}

impl Waiting {
    /// At most `rows_max` rows from the front, as one batch.
    fn take(&mut self, rows_max: usize) -> Result<RecordBatch> {
        let mut parts = Vec::new();
        let mut wanted = rows_max.max(1);
        while let Some(batch) = self.batches.pop_front() {
            if batch.num_rows() > wanted {
                self.batches.push_front(batch.slice(wanted, batch.num_rows() - wanted));
                parts.push(batch.slice(0, wanted));
                break;
            }
            wanted -= batch.num_rows();
            parts.push(batch);
            if wanted == 0 {
                break;
            }
        }
        let first = parts.first().ok_or_else(|| Error::internal("nothing to deliver"))?;
        let rows = concat_batches(first.schema_ref(), &parts)?;
        self.rows -= rows.num_rows();
        self.since = (self.rows > 0).then(Instant::now);
        Ok(rows)
    }
}

/// Memory of rows; slices count in proportion.
fn size(rows: &RecordBatch) -> usize {
    rows.columns().iter().map(|column| column.to_data().get_slice_memory_size().unwrap_or(0)).sum()
}

/// Empties an outbox into its sink, connecting and retrying as needed. Runs until it is dropped.
pub(crate) struct DeliveryTask {
    pub(crate) name: String,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) sink: Box<dyn OutboxSink>,
    pub(crate) status: Arc<NodeStatus>,
}

impl DeliveryTask {
    pub(crate) async fn run(mut self) {
        let mut back_off = BackOff::new(now_us() as u64);
        loop {
            let error = match self.connected(&mut back_off).await {
                Ok(never) => match never {},
                Err(error) => error,
            };
            self.status.errors.fetch_add(1, Relaxed);
            if error.retry == Retry::Never {
                tracing::error!(sink = %self.name, "{error}");
                self.status.set_state(NodeState::Failed(error.to_string()));
            } else {
                self.status.set_state(NodeState::Retrying(error.to_string()));
            }
            // Even an error that is the user's to mend is tried again: a table may be created meanwhile, and giving
            // up would lose the rows that wait.
            let wait = back_off.wait();
            warn!(sink = %self.name, "{error}; trying again in {:.1} s", wait.as_secs_f64());
            sleep(wait).await;
        }
    }

    /// Connects and delivers until something fails.
    async fn connected(&mut self, back_off: &mut BackOff) -> Result<std::convert::Infallible> {
        self.sink.connect().await?;
        self.status.set_state(NodeState::Healthy);
        loop {
            let delivery = self.outbox.due().await?;
            let rows = delivery.rows.num_rows() as u64;
            match self.sink.deliver(delivery.input, &delivery.rows, delivery.id).await {
                Ok(()) => {
                    back_off.reset();
                    self.status.rows_out.fetch_add(rows, Relaxed);
                    self.status.batches_out.fetch_add(1, Relaxed);
                }
                Err(error) if error.retry == Retry::Never => {
                    tracing::error!(sink = %self.name, rows, "rows are refused: {error}");
                    self.status.errors.fetch_add(1, Relaxed);
                    self.status.dropped_rows.fetch_add(rows, Relaxed);
                }
                Err(error) => return Err(error),
            }
            self.outbox.done(&delivery);
        }
    }
}
