//! The task between a source's connection and the graph: stamps the time of receipt, decodes, keeps the
//! watermark, acknowledges, and answers checkpoints.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use arrow::array::{Array, ArrayRef, AsArray, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow::compute::{filter_record_batch, is_not_null};
use arrow::datatypes::TimestampMicrosecondType;
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::warn;

use super::coordinator::{Control, Report};
use super::edge::{Barrier, Message, Outlet};
use super::queue::Receiver;
use super::reader_task::{Arrival, Link};
use crate::batch::{BATCH_ROWS_MAX, Batch, Stage, Times};
use crate::error::{Error, Result};
use crate::graph::{EventTime, errors_schema};
use crate::plugin::{Decoder, Delivery, Record, RowError};
use crate::state::{StateReader, StateWriter};
use crate::status::{NodeState, NodeStatus};
use crate::time::now_us;

/// How often time moves on without rows. Windows over the time of receipt close at most this late.
const TICK: Duration = Duration::from_millis(50);

/// Row errors of one source are logged at most this often; all are counted.
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
    pub(crate) delivery: Delivery,
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
                    Some(Control::Close) => self.close().await,
                    None => return,
                },
                arrival = self.arrivals.recv(), if phase == Phase::Running => {
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
            if phase == Phase::Running && self.delivery != Delivery::Replayable {
                phase = self.arrival(arrival).await;
            }
        }
        self.barrier(barrier).await;
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
        let _ = self.reports.send(Report::Prepared(self.key.clone(), barrier.checkpoint, Ok(state.finish()))).await;
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
                    if let Err(error) = self.take_rows(&pulled.rows, pulled.errors).await {
                        return self.fail(&error).await;
                    }
                    self.position = Some(pulled.position);
                }
                Arrival::Records(mut records) => {
                    next = self.more_records(&mut records);
                    let taken = self.take_records(&records).await;
                    self.acknowledge(&records, taken.is_ok()).await;
                    if let Err(error) = taken {
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
        while records.len() < BATCH_ROWS_MAX {
            match self.arrivals.try_recv() {
                Ok(Arrival::Records(more)) => records.extend(more),
                Ok(other) => return Some(other),
                Err(_) => return None,
            }
        }
        None
    }

    async fn take_records(&mut self, records: &[Record]) -> Result<()> {
        let decoder = self.decoder.as_mut().ok_or_else(|| Error::internal("a push source without a decoder"))?;
        let decoded = decoder.decode(records)?;
        self.take_rows(&decoded.rows, decoded.errors).await
    }

    async fn take_rows(&mut self, rows: &RecordBatch, mut errors: Vec<RowError>) -> Result<()> {
        let ingest_us = self.clock.stamp();
        if rows.num_rows() > 0 || !errors.is_empty() {
            self.clock.row_came();
        }
        let rows = self.drop_without_event_time(rows, &mut errors)?;
        self.emit_errors(errors, ingest_us).await?;
        let mut offset = 0;
        while offset < rows.num_rows() {
            let part = rows.slice(offset, BATCH_ROWS_MAX.min(rows.num_rows() - offset));
            offset += part.num_rows();
            let times = self.clock.times(&part, ingest_us)?;
            let batch = Batch::new(part, times, Stage::Final)?;
            self.batches += 1;
            self.status.rows_out.fetch_add(batch.len() as u64, Relaxed);
            self.status.batches_out.fetch_add(1, Relaxed);
            self.status.event_us.store(self.clock.newest_us, Relaxed);
            self.rows.send(Message::Batch(batch, self.batches)).await;
            if let Some(watermark) = self.clock.advanced() {
                self.rows.send(Message::Watermark(watermark)).await;
            }
        }
        Ok(())
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

    async fn emit_errors(&mut self, errors: Vec<RowError>, ingest_us: i64) -> Result<()> {
        let Some(first) = errors.first() else { return Ok(()) };
        self.status.errors.fetch_add(errors.len() as u64, Relaxed);
        if self.error_log.is_none_or(|at| at.elapsed() > ERROR_LOG_EVERY) {
            self.error_log = Some(Instant::now());
            warn!(source = %self.name, rows = errors.len(), payload = %first.payload, "a row cannot be read: {}", first.message);
        }
        let count = errors.len();
        let columns: Vec<ArrayRef> = vec![
            Arc::new(StringArray::from(vec![self.name.as_str(); count])),
            Arc::new(TimestampMicrosecondArray::from_value(ingest_us, count).with_timezone("UTC")),
            Arc::new(errors.iter().map(|e| Some(e.message.as_str())).collect::<StringArray>()),
            Arc::new(errors.iter().map(|e| Some(e.payload.as_str())).collect::<StringArray>()),
        ];
        let times = Times::constant(ingest_us, ingest_us, i64::MIN, count);
        let batch = Batch::new(RecordBatch::try_new(errors_schema(), columns)?, times, Stage::Final)?;
        self.error_batches += 1;
        self.errors.send(Message::Batch(batch, self.error_batches)).await;
        Ok(())
    }

    async fn acknowledge(&mut self, records: &[Record], accepted: bool) {
        let Some(link) = self.link.as_mut() else { return };
        let tokens: Vec<u64> = records.iter().map(|record| record.token).collect();
        let told = match accepted {
            true => link.acknowledger.acknowledge(&tokens).await,
            false => link.acknowledger.reject(&tokens).await,
        };
        if let Err(error) = told {
            // The reader may not notice by itself. What is not confirmed comes again on the next connection.
            self.status.errors.fetch_add(1, Relaxed);
            warn!(source = %self.name, "acknowledging failed: {error}");
            if let Some(link) = self.link.take() {
                let _ = link.broken.send(());
            }
        }
    }

    async fn tick(&mut self, phase: Phase) {
        if let Some(message) = self.clock.tick(phase == Phase::Failed || self.arrivals.is_empty()) {
            self.rows.send(message).await;
        }
    }
}

/// Event time, lateness and idleness of one source.
#[derive(Debug)]
pub(crate) struct SourceClock {
    event_time: Option<EventTime>,
    /// Newest event time, `i64::MIN` if none.
    newest_us: i64,
    /// Newest time of receipt; the wall clock may be set back, this is not.
    ingest_us: i64,
    /// Last watermark given out.
    watermark_us: i64,
    /// The last row or (re)connect: idleness counts from here. Not by the wall clock, which may jump.
    active: Instant,
    connected: bool,
    unwanted: bool,
    /// Whether the consumers were told that no row is to be waited for.
    told_idle: bool,
}

impl SourceClock {
    pub(crate) fn new(event_time: Option<EventTime>) -> Self {
        Self {
            event_time,
            newest_us: i64::MIN,
            ingest_us: i64::MIN,
            watermark_us: i64::MIN,
            active: Instant::now(),
            connected: false,
            unwanted: false,
            told_idle: false,
        }
    }

    fn set_connected(&mut self, connected: bool) {
        self.connected = connected;
        self.unwanted = false;
        self.active = Instant::now();
    }

    fn set_unwanted(&mut self) {
        self.unwanted = true;
    }

    /// The time of receipt of what arrives now.
    fn stamp(&mut self) -> i64 {
        self.unwanted = false;
        self.ingest_us = self.ingest_us.max(now_us());
        self.ingest_us
    }

    /// What arrived was not empty, as an idle poll is.
    fn row_came(&mut self) {
        self.active = Instant::now();
    }

    /// The times of rows received at `ingest_us`; their event times move the clock.
    fn times(&mut self, rows: &RecordBatch, ingest_us: i64) -> Result<Times> {
        let count = rows.num_rows();
        let Some(event_time) = self.event_time else {
            let times = Times::constant(ingest_us, ingest_us, self.newest_us, count);
            self.newest_us = self.newest_us.max(ingest_us);
            return Ok(times);
        };
        let column = rows.column(event_time.column);
        let column = column
            .as_primitive_opt::<TimestampMicrosecondType>()
            .ok_or_else(|| Error::internal("an event time that is no timestamp"))?;
        let mut watermarks = Vec::with_capacity(count);
        for &event_us in column.values() {
            watermarks.push(self.trailing());
            self.newest_us = self.newest_us.max(event_us);
        }
        Ok(Times {
            event_us: Int64Array::new(column.values().clone(), None),
            ingest_us: Int64Array::from_value(ingest_us, count),
            watermark_us: Int64Array::from(watermarks),
        })
    }

    /// The watermark that follows from the newest event time.
    fn trailing(&self) -> i64 {
        let lateness = self.event_time.map_or(0, |event_time| event_time.lateness_us);
        if self.newest_us == i64::MIN { i64::MIN } else { self.newest_us.saturating_sub(lateness) }
    }

    /// The watermark, if it has moved since the last call.
    fn advanced(&mut self) -> Option<i64> {
        let watermark = self.trailing();
        (watermark > self.watermark_us).then(|| {
            self.watermark_us = watermark;
            watermark
        })
    }

    /// What time alone does: over the time of receipt it moves the watermark; over event time it makes a
    /// source idle that is connected, has nothing queued and got no row for long, and tells when that is over.
    fn tick(&mut self, nothing_queued: bool) -> Option<Message> {
        let Some(event_time) = self.event_time else {
            if !nothing_queued {
                return None;
            }
            self.ingest_us = self.ingest_us.max(now_us());
            self.newest_us = self.newest_us.max(self.ingest_us);
            return self.advanced().map(Message::Watermark);
        };
        let quiet_us = i64::try_from(self.active.elapsed().as_micros()).unwrap_or(i64::MAX);
        let idle = self.unwanted || (self.connected && nothing_queued && quiet_us >= event_time.idle_us);
        if !idle {
            let was_idle = std::mem::take(&mut self.told_idle);
            return was_idle.then_some(Message::Watermark(self.watermark_us));
        }
        self.told_idle = true;
        // Without any row there is no event time to go on from: i64::MIN still says that this input holds nothing back.
        let on = if self.newest_us == i64::MIN { i64::MIN } else { self.trailing().saturating_add(quiet_us) };
        Some(Message::Idle(on))
    }

    fn snapshot(&self, state: &mut StateWriter) {
        state.i64(self.newest_us);
        state.i64(self.ingest_us);
        state.i64(self.watermark_us);
    }

    fn restore(&mut self, state: &mut StateReader<'_>) -> Result<()> {
        self.newest_us = state.i64()?;
        self.ingest_us = state.i64()?;
        self.watermark_us = state.i64()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::pin::pin;
    use std::sync::Mutex;

    use async_trait::async_trait;
    use bytes::Bytes;
    use futures::poll;
    use tokio::sync::oneshot;

    use super::*;
    use crate::plugin::{Acknowledger, Decoded, Pulled};
    use crate::runtime::edge::Takes;
    use crate::runtime::queue::{Sender, queue};
    use crate::schema::{FieldType, schema_of};
    use crate::status::{NodeKind, Status, lock};

    const MIN: i64 = i64::MIN;

    /// A clock over the only column, 10 us late at most and idle at once.
    fn event_clock() -> SourceClock {
        SourceClock::new(Some(EventTime { column: 0, lateness_us: 10, idle_us: 0 }))
    }

    fn rows(event_us: &[i64]) -> RecordBatch {
        let column = TimestampMicrosecondArray::from(event_us.to_vec()).with_timezone("UTC");
        let schema = schema_of([("ts", FieldType::Timestamp(None))]);
        RecordBatch::try_new(schema, vec![Arc::new(column)]).expect("rows")
    }

    fn watermarks(clock: &mut SourceClock, event_us: &[i64]) -> Vec<i64> {
        let times = clock.times(&rows(event_us), 7).expect("times");
        assert_eq!(times.event_us.values(), event_us);
        assert!(times.ingest_us.values().iter().all(|ingest| *ingest == 7));
        times.watermark_us.values().to_vec()
    }

    #[test]
    fn each_row_meets_the_newest_time_before_it_less_the_lateness_however_batches_are_cut() {
        for (event_us, expected) in [
            (vec![100, 105, 95, 120, 120, 110], vec![MIN, 90, 95, 95, 110, 110]),
            (vec![-5, 0, -100], vec![MIN, -15, -10]),
            (vec![MIN + 3, 50], vec![MIN, MIN]),
            (vec![i64::MAX, 0], vec![MIN, i64::MAX - 10]),
        ] {
            for size in 1..=event_us.len() {
                let mut clock = event_clock();
                let cut: Vec<i64> = event_us.chunks(size).flat_map(|part| watermarks(&mut clock, part)).collect();
                assert_eq!(cut, expected, "{event_us:?} in batches of {size}");
            }
        }
    }

    #[test]
    fn a_watermark_is_given_out_once_and_only_forward() {
        let mut clock = event_clock();
        assert_eq!(clock.advanced(), None, "no row, no watermark");
        for (event_us, expected) in [(100, Some(90)), (100, None), (50, None), (101, Some(91))] {
            watermarks(&mut clock, &[event_us]);
            assert_eq!(clock.advanced(), expected, "after {event_us}");
            assert_eq!(clock.advanced(), None);
        }
    }

    #[test]
    fn over_the_time_of_receipt_no_tick_makes_a_later_row_late() {
        let mut clock = SourceClock::new(None);
        for round in 0..100 {
            let given = match clock.tick(true) {
                Some(Message::Watermark(time)) => time,
                None => clock.watermark_us,
                other => panic!("a tick without event time gave {other:?}"),
            };
            let ingest_us = clock.stamp();
            let times = clock.times(&rows(&[0, 0]), ingest_us).expect("times");
            assert_eq!(times.event_us.values(), &[ingest_us, ingest_us], "round {round}");
            for watermark in times.watermark_us.values() {
                assert!(ingest_us >= given && ingest_us >= *watermark, "round {round}: a row before the watermark");
            }
        }
        assert!(clock.tick(false).is_none(), "rows that wait were received before now");
    }

    #[test]
    fn a_wall_clock_set_back_does_not_set_the_time_of_receipt_back() {
        let ahead = now_us() + 3_600_000_000;
        let mut clock =
            SourceClock { ingest_us: ahead, newest_us: ahead, watermark_us: ahead, ..SourceClock::new(None) };
        assert_eq!(clock.stamp(), ahead);
        assert!(clock.tick(true).is_none());
    }

    #[test]
    fn a_source_is_idle_only_if_connected_and_quiet_or_if_nobody_wants_it() {
        /// An hour: longer than this test runs.
        const LONG: i64 = 3_600_000_000;
        for (connected, unwanted, idle_us, nothing_queued, idle) in [
            (true, false, 0, true, true),
            (true, false, 0, false, false),
            (true, false, LONG, true, false),
            (false, false, 0, true, false),
            (false, true, LONG, true, true),
        ] {
            let mut clock = SourceClock::new(Some(EventTime { column: 0, lateness_us: 10, idle_us }));
            clock.set_connected(connected);
            if unwanted {
                clock.set_unwanted();
            }
            let case =
                format!("connected {connected}, unwanted {unwanted}, {idle_us} us, queue empty {nothing_queued}");
            let told = clock.tick(nothing_queued);
            assert_eq!(told.is_some(), idle, "{case}");
            // Before the first row there is no time to go on from.
            assert!(told.is_none_or(|message| matches!(message, Message::Idle(MIN))), "{case}");
        }
    }

    #[test]
    fn an_idle_source_goes_on_from_its_watermark_and_a_row_ends_that() {
        let mut clock = event_clock();
        clock.set_unwanted();
        watermarks(&mut clock, &[100]);
        let Some(Message::Idle(on)) = clock.tick(true) else { panic!("not idle") };
        assert!(on >= 90, "{on}");
        clock.stamp();
        let given = clock.watermark_us;
        assert!(matches!(clock.tick(true), Some(Message::Watermark(time)) if time == given), "wanted again");
        assert!(clock.tick(true).is_none(), "and not connected");
    }

    #[test]
    fn a_restored_clock_gives_the_same_watermarks() {
        for event_time in [None, Some(EventTime { column: 0, lateness_us: 10, idle_us: 0 })] {
            let mut clock = SourceClock::new(event_time);
            clock.times(&rows(&[100, 90]), 1_000).expect("times");
            clock.stamp();
            clock.advanced();
            let mut state = StateWriter::default();
            clock.snapshot(&mut state);
            let state = state.finish();
            let mut restored = SourceClock::new(event_time);
            let mut reader = StateReader::new(&state);
            restored.restore(&mut reader).expect("a state");
            assert!(reader.is_empty());
            assert_eq!(restored.advanced(), None, "given out before");
            let rows = rows(&[95, 200, 150]);
            let (one, other) = (clock.times(&rows, 2_000), restored.times(&rows, 2_000));
            let (one, other) = (one.expect("times"), other.expect("times"));
            assert_eq!(one.watermark_us, other.watermark_us);
            assert_eq!(clock.advanced(), restored.advanced());
        }
    }

    #[test]
    fn a_poll_without_rows_is_no_row() {
        let mut clock = event_clock();
        clock.set_connected(true);
        let active = clock.active;
        clock.stamp();
        assert_eq!(clock.active, active);
        clock.row_came();
        assert!(clock.active >= active);
    }

    #[test]
    fn a_connection_that_breaks_while_idle_is_waited_for_again() {
        let mut clock = event_clock();
        clock.set_connected(true);
        watermarks(&mut clock, &[100]);
        clock.advanced();
        assert!(matches!(clock.tick(true), Some(Message::Idle(_))));
        clock.set_connected(false);
        assert!(matches!(clock.tick(true), Some(Message::Watermark(90))), "the idle time is taken back");
        assert!(clock.tick(true).is_none());
    }

    /// A record holds one event time; any other text is a wrong row; `broken` fails the decoder.
    struct Times1;

    impl Decoder for Times1 {
        fn decode(&mut self, records: &[Record]) -> Result<Decoded> {
            let (mut times, mut record_of_row, mut errors) = (Vec::new(), Vec::new(), Vec::new());
            for (index, record) in records.iter().enumerate() {
                let text = std::str::from_utf8(&record.payload).expect("text");
                match text.parse() {
                    _ if text == "broken" => return Err(Error::internal("broken")),
                    Ok(time) => {
                        times.push(time);
                        record_of_row.push(index as u32);
                    }
                    Err(_) => errors.push(RowError::new("no number", &record.payload)),
                }
            }
            Ok(Decoded { rows: rows(&times), record_of_row, errors })
        }
    }

    /// Notes what it is told.
    struct Noting(Arc<Mutex<Vec<String>>>);

    #[async_trait]
    impl Acknowledger for Noting {
        async fn acknowledge(&mut self, tokens: &[u64]) -> Result<()> {
            lock(&self.0).push(format!("accepted {tokens:?}"));
            Ok(())
        }
        async fn reject(&mut self, tokens: &[u64]) -> Result<()> {
            lock(&self.0).push(format!("rejected {tokens:?}"));
            Ok(())
        }
    }

    /// A task and all that it is connected to.
    struct Bench {
        task: IntakeTask,
        arrivals: Sender<Arrival>,
        rows: Receiver<Message>,
        errors: Receiver<Message>,
        reports: mpsc::Receiver<Report>,
        told: Arc<Mutex<Vec<String>>>,
    }

    fn bench(delivery: Delivery) -> Bench {
        let (arrivals, received) = queue(16);
        let (_, control) = mpsc::channel(1);
        let (reporter, reports) = mpsc::channel(16);
        let (mut to_rows, mut to_errors) = (Outlet::default(), Outlet::default());
        let (rows, errors) = (to_rows.add(Takes::All), to_errors.add(Takes::All));
        let told = Arc::default();
        let (broken, _) = oneshot::channel();
        let task = IntakeTask {
            name: "s".to_owned(),
            key: "source/s".to_owned(),
            arrivals: received,
            control,
            reports: reporter,
            decoder: Some(Box::new(Times1)),
            rows: to_rows,
            errors: to_errors,
            status: Status::default().node(NodeKind::Source, "s", ""),
            clock: event_clock(),
            position: None,
            link: Some(Link { acknowledger: Box::new(Noting(Arc::clone(&told))), broken }),
            error_batches: 0,
            batches: 0,
            error_log: None,
            delivery,
        };
        Bench { task, arrivals, rows, errors, reports, told }
    }

    fn records(payloads: &[&str]) -> Arrival {
        let record = |(token, payload): (usize, &&str)| Record {
            payload: Bytes::copy_from_slice(payload.as_bytes()),
            metadata: Bytes::new(),
            token: token as u64,
        };
        Arrival::Records(payloads.iter().enumerate().map(record).collect())
    }

    fn pulled(event_us: &[i64], position: u8) -> Arrival {
        Arrival::Rows(Pulled { rows: rows(event_us), errors: Vec::new(), position: vec![position], more: false })
    }

    /// Everything that waits, event times of batches as they are.
    fn waiting(receiver: &mut Receiver<Message>) -> Vec<String> {
        let show = |message| match message {
            Message::Batch(batch, number) => format!("{number}: {:?}", batch.event_us()),
            Message::Watermark(i64::MAX) => "closed".to_owned(),
            Message::Watermark(time) => format!("time {time}"),
            Message::Barrier(barrier) => format!("barrier {}", barrier.checkpoint),
            other => format!("{other:?}"),
        };
        std::iter::from_fn(|| receiver.try_recv().ok()).map(show).collect()
    }

    #[tokio::test]
    async fn records_are_acknowledged_once_they_are_in_the_graph() {
        let mut bench = bench(Delivery::Acknowledged);
        let told = Arc::clone(&bench.told);
        let full = i64::try_from(crate::runtime::queue::QUEUE_ROWS_MAX).expect("a number");
        bench.task.rows.send(Message::Batch(huge(full), 0)).await;
        {
            let mut arrival = pin!(bench.task.arrival(records(&["100", "x", "120"])));
            assert!(poll!(arrival.as_mut()).is_pending(), "no room");
            assert!(lock(&told).is_empty());
            bench.rows.recv().await;
            assert!(matches!(arrival.await, Phase::Running));
        }
        assert_eq!(*lock(&told), ["accepted [0, 1, 2]"]);
        assert_eq!(waiting(&mut bench.rows), ["1: [100, 120]", "time 110"]);
        assert_eq!(waiting(&mut bench.errors).len(), 1);
        assert_eq!(bench.task.status.errors.load(Relaxed), 1);
    }

    fn huge(count: i64) -> Batch {
        let times: Vec<i64> = (0..count).collect();
        Batch::new(rows(&times), Times::constant(0, 0, 0, times.len()), Stage::Final).expect("a batch")
    }

    #[tokio::test]
    async fn what_cannot_be_taken_in_fails_the_source_and_is_neither_acknowledged_nor_passed_over() {
        for (case, arrival, told) in [
            ("records", records(&["1", "broken"]), vec!["rejected [0, 1]"]),
            // Rows of other columns than promised.
            ("rows", other_columns(), vec![]),
        ] {
            let mut bench = bench(Delivery::Replayable);
            bench.task.arrival(pulled(&[100], 1)).await;
            assert!(matches!(bench.task.arrival(arrival).await, Phase::Failed), "{case}");
            assert_eq!(*lock(&bench.told), told, "{case}");
            assert_eq!(bench.task.position, Some(vec![1]), "{case}");
            assert!(matches!(bench.reports.try_recv(), Ok(Report::SourceFailed(key)) if key == "source/s"), "{case}");
            assert!(matches!(bench.task.status.state(), NodeState::Failed(_)), "{case}");
            assert!(bench.arrivals.send(pulled(&[2], 2), 1).await.is_err(), "{case}: the reader stops");
            assert_eq!(waiting(&mut bench.rows), ["1: [100]", "time 90"], "{case}: windows stay open");
        }
    }

    fn other_columns() -> Arrival {
        let rows = RecordBatch::try_new(schema_of([("ts", FieldType::Int)]), vec![Arc::new(Int64Array::from(vec![1]))]);
        Arrival::Rows(Pulled { rows: rows.expect("rows"), errors: Vec::new(), position: vec![9], more: false })
    }

    #[tokio::test]
    async fn the_end_closes_windows_and_a_failure_does_not() {
        for (arrival, ended, expected) in
            [(Arrival::Ended, true, vec!["closed"]), (Arrival::Failed, false, Vec::<&str>::new())]
        {
            let mut bench = bench(Delivery::Replayable);
            let phase = bench.task.arrival(arrival).await;
            assert!(if ended { phase == Phase::Ended } else { phase == Phase::Failed });
            let report = bench.reports.try_recv().expect("a report");
            assert!(
                matches!(report, Report::SourceEnded(_)) == ended && matches!(report, Report::SourceFailed(_)) != ended
            );
            assert_eq!(waiting(&mut bench.rows), expected);
        }
    }

    #[tokio::test]
    async fn a_stop_takes_in_what_would_be_lost_and_leaves_what_is_read_again() {
        for (delivery, expected, position) in [
            (Delivery::Sampled, vec!["1: [100]", "time 90", "barrier 5", "End"], 7),
            (Delivery::Replayable, vec!["barrier 5", "End"], 1),
        ] {
            let mut bench = bench(delivery);
            bench.task.position = Some(vec![1]);
            bench.arrivals.send(pulled(&[100], 7), 1).await.expect("room");
            let barrier = Barrier { checkpoint: 5, last: true };
            bench.task.stop(barrier, Phase::Running).await;
            assert_eq!(waiting(&mut bench.rows), expected, "{delivery:?}");
            assert_eq!(waiting(&mut bench.errors), ["barrier 5", "End"], "{delivery:?}");
            let Ok(Report::Prepared(_, 5, Ok(state))) = bench.reports.try_recv() else { panic!("no state") };
            let mut after = self::bench(delivery);
            assert_eq!(after.task.restore(&state).expect("a state"), Some(vec![position]), "{delivery:?}");
            assert_eq!(after.task.clock.newest_us, bench.task.clock.newest_us, "{delivery:?}");
        }
    }

    #[tokio::test]
    async fn a_row_without_event_time_is_a_row_in_error() {
        let mut bench = bench(Delivery::Sampled);
        let column = TimestampMicrosecondArray::from(vec![Some(5), None, Some(6)]).with_timezone("UTC");
        let rows = RecordBatch::try_new(rows(&[]).schema(), vec![Arc::new(column)]).expect("rows");
        let arrival = Arrival::Rows(Pulled { rows, errors: Vec::new(), position: vec![1], more: false });
        assert!(matches!(bench.task.arrival(arrival).await, Phase::Running));
        assert_eq!(waiting(&mut bench.rows), ["1: [5, 6]", "time -4"]);
        assert_eq!(bench.task.status.errors.load(Relaxed), 1);
        let Ok(Message::Batch(errors, 1)) = bench.errors.try_recv() else { panic!("no error row") };
        assert!(errors.json().row(0).contains("no event time: `ts` is null"), "{}", errors.json().row(0));
    }
}
