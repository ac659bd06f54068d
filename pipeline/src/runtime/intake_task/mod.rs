//! The task between a source's connection and the graph: stamps the time of receipt, decodes, keeps the
//! watermark, acknowledges, and answers checkpoints.
//!
//! Records whose sender waits for an acknowledgement go to the [`Inbox`] too. They enter the graph at once; the
//! acknowledgement, and the answer to a checkpoint that has them in it, wait until they are on disk.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use arrow::array::{Array, ArrayRef, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow::compute::{filter_record_batch, is_not_null};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::warn;

use super::blocking;
use super::clock::SourceClock;
use super::coordinator::{Control, Prepared, Report};
use super::edge::{Barrier, Message, Outlet};
use super::inbox::{Inbox, Progress};
use super::queue::Receiver;
use super::reader_task::{Arrival, Link};
use crate::batch::{BATCH_ROWS_MAX, Batch, Stage, Times};
use crate::error::{Error, Result};
use crate::graph::errors_schema;
use crate::plugin::{Decoder, Delivery, Record, Rejection, RowError};
use crate::state::{StateReader, StateWriter};
use crate::status::{NodeState, NodeStatus};

/// How often time moves on without rows. Windows over the time of receipt close at most this late.
const TICK: Duration = Duration::from_millis(50);

/// Bytes of records, from which on no more are taken together: they are decoded, and written to the inbox, as one.
const LOT_BYTES_MAX: usize = 8 << 20;

/// Row errors of one source are logged at most this often, with the number of all since.
const ERROR_LOG_EVERY: Duration = Duration::from_secs(10);

pub(crate) struct IntakeTask {
    pub(crate) name: String,
    pub(crate) key: String,
    pub(crate) arrivals: Receiver<Arrival>,
    pub(crate) control: mpsc::Receiver<Control>,
    pub(crate) reports: mpsc::Sender<Report>,
    pub(crate) decoder: Option<Box<dyn Decoder>>,
    pub(crate) rows: Outlet,
    pub(crate) errors: Outlet,
    pub(crate) status: Arc<NodeStatus>,
    pub(crate) clock: SourceClock,
    pub(crate) position: Option<Vec<u8>>,
    pub(crate) link: Option<Link>,
    pub(crate) error_batches: u64,
    pub(crate) batches: u64,
    pub(crate) error_log: Option<Instant>,
    /// Row errors since the log told of some.
    pub(crate) errors_untold: usize,
    pub(crate) delivery: Delivery,
    /// Of a source whose senders wait for an acknowledgement.
    pub(crate) inbox: Option<Inbox>,
    /// What waits for the inbox.
    pub(crate) unsettled: Unsettled,
    /// Not zero while something downstream is full that only a checkpoint empties.
    pub(crate) held: watch::Receiver<usize>,
}

/// What waits until records are on disk, each with the number after the last of them.
#[derive(Default)]
pub(crate) struct Unsettled {
    /// Tokens to acknowledge.
    tokens: VecDeque<(u64, Vec<u64>)>,
    /// Answers to checkpoints.
    answers: VecDeque<(u64, Report)>,
    /// Checkpoints, and the number of the first record that is not in each.
    covered: VecDeque<(u64, u64)>,
}

impl Unsettled {
    /// Checkpoint `checkpoint` has all records before `taken`.
    pub(crate) fn cover(&mut self, checkpoint: u64, taken: u64) {
        self.covered.push_back((checkpoint, taken));
    }
}

/// Rows that are ready for the graph: from here on nothing can fail.
struct Lot {
    /// Rows of what could not be read.
    errors: Option<Batch>,
    /// Batches, and how far event time is after each, if it went on.
    parts: Vec<(Batch, Option<i64>)>,
}

/// What goes on with the source.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    /// Failed for good: nothing more comes, but the windows stay open for the run after the mistake is mended.
    Failed,
    Ended,
}

impl IntakeTask {
    pub(crate) async fn run(mut self) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Skip);
        let mut phase = Phase::Running;
        loop {
            tokio::select! {
                biased;
                control = self.control.recv() => match control {
                    Some(Control::Barrier(barrier)) if barrier.last => return self.stop(barrier, phase).await,
                    Some(Control::Barrier(barrier)) => self.barrier(barrier).await,
                    Some(Control::Close) => {
                        while phase == Phase::Running && self.is_replaying() {
                            phase = self.replay().await;
                        }
                        self.close().await;
                    }
                    Some(Control::Kept(oldest)) => self.trim(oldest),
                    None => return,
                },
                progress = progress(&mut self.inbox) => self.settle(&progress).await,
                Ok(()) = self.held.changed() => {}
                () = async {}, if phase == Phase::Running && self.is_replaying() && !self.is_held() => {
                    phase = self.replay().await;
                }
                arrival = self.arrivals.recv(), if phase == Phase::Running && self.has_room() && !self.is_held() => {
                    phase = self.arrival(arrival.unwrap_or(Arrival::Ended)).await;
                }
                _ = tick.tick(), if phase != Phase::Ended => self.tick(phase).await,
            }
        }
    }

    /// Closes all windows downstream: nothing more will come.
    async fn close(&mut self) {
        self.rows.send(Message::Watermark(i64::MAX)).await;
        self.errors.send(Message::Watermark(i64::MAX)).await;
    }

    /// The last barrier: takes in what has arrived, then stops.
    async fn stop(&mut self, barrier: Barrier, mut phase: Phase) {
        // Closing first makes the connection's task stop; what it had handed over is still received, unless the
        // next start reads it again from the position: a stop need not wait for that.
        self.arrivals.close();
        while let Some(arrival) = self.arrivals.recv().await {
            if phase == Phase::Running
                && self.delivery != Delivery::Replayable
                && self.has_room()
                && !self.is_replaying()
            {
                phase = self.arrival(arrival).await;
            }
        }
        self.barrier(barrier).await;
        while !(self.unsettled.answers.is_empty() && self.unsettled.tokens.is_empty()) {
            let progress = progress(&mut self.inbox).await;
            self.settle(&progress).await;
        }
        self.rows.send(Message::End).await;
        self.errors.send(Message::End).await;
    }

    async fn barrier(&mut self, barrier: Barrier) {
        self.rows.send(Message::Barrier(barrier)).await;
        self.errors.send(Message::Barrier(barrier)).await;
        let mut state = StateWriter::default();
        state.bool(self.position.is_some());
        state.bytes(self.position.as_deref().unwrap_or_default());
        self.clock.snapshot(&mut state);
        state.u64(self.batches);
        state.u64(self.error_batches);
        let inbox = self.inbox.as_ref().map(|inbox| (inbox.key().to_owned(), inbox.taken()));
        let prepared = Prepared { state: state.finish(), inbox: inbox.clone(), ..Prepared::default() };
        let report = Report::Prepared(self.key.clone(), barrier.checkpoint, Ok(prepared));
        let Some((inbox, (_, taken))) = self.inbox.as_ref().zip(inbox) else {
            let _ = self.reports.send(report).await;
            return;
        };
        // What a checkpoint covers must be on disk before it: a record that is not would come again.
        self.unsettled.cover(barrier.checkpoint, taken);
        if inbox.durable() >= taken {
            let _ = self.reports.send(report).await;
        } else {
            self.unsettled.answers.push_back((taken, report));
        }
    }

    /// Where the source goes on, by its state in a checkpoint: its position, if it has one, and, if the checkpoint is of an
    /// earlier version, the first record in its inbox that the checkpoint does not have.
    pub(crate) fn place(state: &[u8]) -> Result<(Option<&[u8]>, Option<u64>)> {
        let mut state = StateReader::new(state);
        let known = state.bool()?;
        let position = state.bytes()?;
        SourceClock::new(None).restore(&mut state)?;
        state.u64()?;
        state.u64()?;
        let first = if state.is_empty() { None } else { Some(state.u64()?) };
        Ok((known.then_some(position), first))
    }

    /// Takes over the state of a checkpoint and returns the position to go on from.
    pub(crate) fn restore(&mut self, state: &[u8]) -> Result<Option<Vec<u8>>> {
        let mut state = StateReader::new(state);
        let known = state.bool()?;
        let position = state.bytes()?.to_vec();
        self.position = known.then_some(position);
        self.clock.restore(&mut state)?;
        self.batches = state.u64()?;
        self.error_batches = state.u64()?;
        Ok(self.position.clone())
    }

    async fn arrival(&mut self, arrival: Arrival) -> Phase {
        let mut next = Some(arrival);
        while let Some(arrival) = next.take() {
            self.status.queue.store(self.arrivals.len() as u64, Relaxed);
            match arrival {
                Arrival::Connected(link) => {
                    self.link = link;
                    self.clock.set_connected(true);
                }
                Arrival::Disconnected => {
                    self.link = None;
                    // What was not acknowledged comes again on the next connection.
                    self.unsettled.tokens.clear();
                    self.clock.set_connected(false);
                }
                Arrival::Unwanted => self.clock.set_unwanted(),
                Arrival::Ended => {
                    self.close().await;
                    let _ = self.reports.send(Report::SourceEnded(self.key.clone())).await;
                    return Phase::Ended;
                }
                Arrival::Failed => return self.failed().await,
                Arrival::Rows(pulled) => {
                    let ingest_us = self.clock.stamp();
                    match self.prepare(&pulled.rows, pulled.errors, ingest_us) {
                        Ok(lot) => self.take_in(lot).await,
                        Err(error) => return self.fail(&error).await,
                    }
                    self.position = Some(pulled.position);
                }
                Arrival::Records(mut records) => {
                    next = self.more_records(&mut records);
                    if let Err(error) = self.receive(records).await {
                        return self.fail(&error).await;
                    }
                }
            }
        }
        Phase::Running
    }

    /// Rows could not be taken in: taking in later ones would lose them.
    async fn fail(&mut self, error: &Error) -> Phase {
        self.status.errors.fetch_add(1, Relaxed);
        tracing::error!(source = %self.name, "{error}");
        self.status.set_state(NodeState::Failed(error.to_string()));
        // The connection's task stops.
        self.arrivals.close();
        self.link = None;
        self.failed().await
    }

    async fn failed(&mut self) -> Phase {
        self.clock.set_connected(false);
        let _ = self.reports.send(Report::SourceFailed(self.key.clone())).await;
        Phase::Failed
    }

    /// Adds the records that have arrived meanwhile, so that under load batches fill up. Returns the arrival
    /// after them if it was something else.
    fn more_records(&mut self, records: &mut Vec<Record>) -> Option<Arrival> {
        let bytes_of = |records: &[Record]| records.iter().map(|record| record.payload.len()).sum::<usize>();
        let mut bytes = bytes_of(records);
        while records.len() < BATCH_ROWS_MAX && bytes < LOT_BYTES_MAX {
            match self.arrivals.try_recv() {
                Ok(Arrival::Records(more)) => {
                    bytes += bytes_of(&more);
                    records.extend(more);
                }
                Ok(other) => return Some(other),
                Err(_) => return None,
            }
        }
        None
    }

    /// Takes in records that have arrived just now.
    async fn receive(&mut self, records: Vec<Record>) -> Result<()> {
        let ingest_us = self.clock.stamp();
        let Some(inbox) = &mut self.inbox else {
            let tokens: Vec<u64> = records.iter().map(|record| record.token).collect();
            let lot = match self.decoded(&records, ingest_us) {
                Ok(lot) => lot,
                Err(error) => {
                    self.reject(&tokens, &Rejection::Failed).await;
                    return Err(error);
                }
            };
            self.take_in(lot).await;
            self.acknowledge(&tokens).await;
            return Ok(());
        };
        let received = inbox.receive(records, ingest_us);
        for (token, reason) in received.refused {
            self.reject(&[token], &Rejection::Refused(reason)).await;
        }
        let lot = match self.decoded(&received.fresh, ingest_us) {
            Ok(lot) => lot,
            // Nothing of it is in the inbox: no checkpoint may pass it.
            Err(error) => {
                self.reject(&received.tokens, &Rejection::Failed).await;
                return Err(error);
            }
        };
        if let Some(inbox) = &mut self.inbox {
            inbox.append(received.fresh, ingest_us);
            // Also what came again is acknowledged in its turn: by then the first of its kind is on disk.
            if !received.tokens.is_empty() && self.link.is_some() {
                self.unsettled.tokens.push_back((inbox.next(), received.tokens));
            }
        }
        self.take_in(lot).await;
        self.settle_now().await;
        Ok(())
    }

    /// Takes in records of an earlier run.
    async fn replay(&mut self) -> Phase {
        let Some(inbox) = &mut self.inbox else { return Phase::Running };
        let lot = match blocking(|| inbox.replay()) {
            Ok(None) => return Phase::Running,
            Ok(Some((records, ingest_us))) => {
                self.clock.stamped(ingest_us);
                self.decoded(&records, ingest_us)
            }
            Err(error) => Err(error),
        };
        match lot {
            Ok(lot) => {
                self.take_in(lot).await;
                // Not before: the next checkpoint passes them.
                if let Some(inbox) = &mut self.inbox {
                    inbox.replayed();
                }
                Phase::Running
            }
            Err(error) => self.fail(&error).await,
        }
    }

    fn is_replaying(&self) -> bool {
        self.inbox.as_ref().is_some_and(Inbox::is_replaying)
    }

    fn is_held(&self) -> bool {
        *self.held.borrow() > 0
    }

    fn has_room(&self) -> bool {
        self.inbox.as_ref().is_none_or(|inbox| inbox.has_room() && !inbox.is_replaying())
    }

    /// Does what had to wait for the disk.
    async fn settle(&mut self, progress: &Progress) {
        if let Some(broken) = &progress.broken {
            // What is in the graph may not be on disk, so no checkpoint may follow; and only a new start can tell.
            let error = Error::outside(format!("the inbox of source {} can no longer be written: {broken}", self.name));
            self.status.set_state(NodeState::Failed(error.to_string()));
            self.unsettled = Unsettled::default();
            self.link = None;
            let _ = self.reports.send(Report::Lost(self.key.clone(), error.fatal())).await;
            return pending().await;
        }
        match (&progress.trouble, self.status.state()) {
            (Some(trouble), _) => self.status.set_state(NodeState::Retrying(trouble.clone())),
            (None, NodeState::Retrying(_)) if self.link.is_some() => self.status.set_state(NodeState::Healthy),
            _ => {}
        }
        self.settle_now().await;
    }

    async fn settle_now(&mut self) {
        let Some(durable) = self.inbox.as_ref().map(Inbox::durable) else { return };
        while let Some((_, tokens)) = self.unsettled.tokens.pop_front_if(|(end, _)| *end <= durable) {
            self.acknowledge(&tokens).await;
        }
        while let Some((_, report)) = self.unsettled.answers.pop_front_if(|(taken, _)| *taken <= durable) {
            let _ = self.reports.send(report).await;
        }
    }

    /// Checkpoints before `oldest` are gone: records that all others have will not be asked for again.
    fn trim(&mut self, oldest: u64) {
        let Some(inbox) = &self.inbox else { return };
        let mut before = None;
        while let Some((_, taken)) = self.unsettled.covered.pop_front_if(|(checkpoint, _)| *checkpoint <= oldest) {
            before = Some(taken);
        }
        if let Some(before) = before {
            inbox.trim(before);
        }
    }

    fn decoded(&mut self, records: &[Record], ingest_us: i64) -> Result<Lot> {
        let decoder = self.decoder.as_mut().ok_or_else(|| Error::internal("a push source without a decoder"))?;
        let decoded = decoder.decode(records)?;
        self.prepare(&decoded.rows, decoded.errors, ingest_us)
    }

    /// Makes rows ready for the graph, as a whole or not at all.
    fn prepare(&mut self, rows: &RecordBatch, mut errors: Vec<RowError>, ingest_us: i64) -> Result<Lot> {
        if rows.num_rows() > 0 || !errors.is_empty() {
            self.clock.row_came();
        }
        let rows = self.drop_without_event_time(rows, &mut errors)?;
        let errors = self.error_rows(&errors, ingest_us)?;
        let mut parts = Vec::new();
        let mut offset = 0;
        while offset < rows.num_rows() {
            let part = rows.slice(offset, BATCH_ROWS_MAX.min(rows.num_rows() - offset));
            offset += part.num_rows();
            let times = self.clock.times(&part, ingest_us)?;
            parts.push((Batch::new(part, times, Stage::Final)?, self.clock.advanced()));
        }
        Ok(Lot { errors, parts })
    }

    /// Puts rows into the graph.
    async fn take_in(&mut self, lot: Lot) {
        if let Some(errors) = lot.errors {
            self.error_batches += 1;
            self.errors.send(Message::Batch(errors, self.error_batches)).await;
        }
        for (batch, watermark) in lot.parts {
            self.batches += 1;
            self.status.rows_out.fetch_add(batch.len() as u64, Relaxed);
            self.status.batches_out.fetch_add(1, Relaxed);
            self.status.event_us.store(self.clock.newest_us, Relaxed);
            self.rows.send(Message::Batch(batch, self.batches)).await;
            if let Some(watermark) = watermark {
                self.rows.send(Message::Watermark(watermark)).await;
            }
        }
    }

    /// A row without event time belongs into no window: it is a row error.
    fn drop_without_event_time(&self, rows: &RecordBatch, errors: &mut Vec<RowError>) -> Result<RecordBatch> {
        let Some(event_time) = self.clock.event_time else { return Ok(rows.clone()) };
        let column = rows.column(event_time.column);
        if column.null_count() == 0 {
            return Ok(rows.clone());
        }
        let message = format!("no event time: `{}` is null", rows.schema_ref().field(event_time.column).name());
        for row in (0..rows.num_rows()).filter(|row| column.is_null(*row)) {
            let text = crate::json::encode_rows(&rows.slice(row, 1));
            errors.push(RowError::new(message.clone(), text.row(0).as_bytes()));
        }
        Ok(filter_record_batch(rows, &is_not_null(column)?)?)
    }

    /// Counts row errors and makes rows of them.
    fn error_rows(&mut self, errors: &[RowError], ingest_us: i64) -> Result<Option<Batch>> {
        let Some(first) = errors.first() else { return Ok(None) };
        self.status.errors.fetch_add(errors.len() as u64, Relaxed);
        let count = errors.len();
        self.errors_untold += count;
        if self.error_log.is_none_or(|at| at.elapsed() > ERROR_LOG_EVERY) {
            self.error_log = Some(Instant::now());
            let rows = std::mem::take(&mut self.errors_untold);
            warn!(source = %self.name, rows, payload = %first.payload, "rows cannot be read, the last one: {}", first.message);
        }
        let columns: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from(vec![self.name.as_str(); count])),
            Arc::new(TimestampMicrosecondArray::from_value(ingest_us, count).with_timezone("UTC")),
            Arc::new(errors.iter().map(|e| Some(e.message.as_str())).collect::<StringArray>()),
            Arc::new(errors.iter().map(|e| Some(e.payload.as_str())).collect::<StringArray>()),
        ];
        let times = Times::constant(ingest_us, ingest_us, i64::MIN, count);
        Batch::new(RecordBatch::try_new(errors_schema(), columns)?, times, Stage::Final).map(Some)
    }

    async fn acknowledge(&mut self, tokens: &[u64]) {
        if let Some(link) = self.link.as_mut() {
            let told = link.acknowledger.acknowledge(tokens).await;
            self.told(told);
        }
    }

    async fn reject(&mut self, tokens: &[u64], reason: &Rejection) {
        if let Some(link) = self.link.as_mut() {
            let told = link.acknowledger.reject(tokens, reason).await;
            self.told(told);
        }
    }

    /// The reader may not notice by itself that the connection is of no use any more. What is not confirmed comes again
    /// on the next one.
    fn told(&mut self, told: Result<()>) {
        let Err(error) = told else { return };
        self.status.errors.fetch_add(1, Relaxed);
        warn!(source = %self.name, "acknowledging failed: {error}");
        self.unsettled.tokens.clear();
        if let Some(link) = self.link.take() {
            let _ = link.broken.send(());
        }
    }

    async fn tick(&mut self, phase: Phase) {
        let has_all = self.arrivals.is_empty() && !self.is_replaying() && !self.is_held();
        if let Some(message) = self.clock.tick(phase == Phase::Failed || has_all) {
            self.rows.send(message).await;
        }
    }
}

/// Waits until the inbox is further; for ever without one. Cancel safe.
async fn progress(inbox: &mut Option<Inbox>) -> Progress {
    match inbox {
        Some(inbox) => inbox.changed().await,
        None => pending().await,
    }
}
