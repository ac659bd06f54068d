//! The bounded outbox before a database or broker, and the task that empties it.

use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arrow::array::RecordBatch;
use arrow::compute::concat_batches;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::warn;

use super::back_off::BackOff;
use super::is_true;
use crate::error::{Error, Result, Retry};
use crate::plugin::{BatchLimits, OutboxSink, SinkInput};
use crate::state::{StateReader, StateWriter};
use crate::status::{NodeState, NodeStatus, lock};
use crate::time::now_us;

/// Most bytes of rows that wait for the other side; then the graph is held back.
const OUTBOX_BYTES_MAX: usize = 256 << 20;

/// After a stop was asked for, rows are delivered for this long; the rest stays in the checkpoint.
const DRAIN: Duration = Duration::from_secs(5);

/// Rows on their way to one sink.
pub(crate) struct Outbox {
    limits: BatchLimits,
    inner: Mutex<Inner>,
    changed: Notify,
    room: Notify,
    empty: Notify,
    /// Whether a stop was asked for.
    hurried: watch::Sender<bool>,
    /// Whether the sink has failed in a way that waiting does not mend.
    failing: watch::Sender<bool>,
}

struct Inner {
    inputs: Vec<SinkInput>,
    waiting: Vec<Waiting>,
    in_flight: Option<Delivery>,
    next_id: u64,
    /// Bytes of all rows, those in flight included.
    bytes: usize,
    draining: bool,
}

/// Rows of one input.
#[derive(Default)]
struct Waiting {
    entries: VecDeque<Entry>,
    rows: usize,
}

/// Rows that came together.
struct Entry {
    rows: RecordBatch,
    /// What they count for in [`Inner::bytes`]: taken off again to the byte, so that nothing adds up over time.
    bytes: usize,
    since: Instant,
}

/// Rows that are being delivered; a repeated delivery has the same id and the same rows.
#[derive(Clone)]
struct Delivery {
    input: usize,
    id: u64,
    rows: RecordBatch,
    bytes: usize,
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
            hurried: watch::Sender::new(false),
            failing: watch::Sender::new(false),
        }
    }

    /// Adds rows; waits while the outbox is full. Not at a stop: then the rows on their way stand before the last
    /// barrier, and are few.
    pub(crate) async fn put(&self, input: usize, rows: &RecordBatch) {
        loop {
            let room = self.room.notified();
            {
                let mut inner = lock(&self.inner);
                if inner.bytes < OUTBOX_BYTES_MAX || *self.hurried.borrow() {
                    inner.add(input, rows.clone());
                    break;
                }
            }
            room.await;
        }
        self.changed.notify_one();
    }

    /// A stop was asked for: whoever waits for the other side does so for a few seconds more at most.
    pub(crate) fn hurry(&self) {
        self.hurried.send_replace(true);
        self.room.notify_waiters();
    }

    /// Rows that are not delivered yet.
    pub(crate) fn rows(&self) -> usize {
        let inner = lock(&self.inner);
        let in_flight = inner.in_flight.as_ref().map_or(0, |delivery| delivery.rows.num_rows());
        in_flight + inner.waiting.iter().map(|waiting| waiting.rows).sum::<usize>()
    }

    /// Delivers what waits, at once and for as long as it takes, unless the sink has failed or a stop was asked for.
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
        let (mut hurried, mut failing) = (self.hurried.subscribe(), self.failing.subscribe());
        let too_late = async {
            is_true(&mut hurried).await;
            sleep(DRAIN).await;
        };
        tokio::select! {
            biased;
            () = emptied => {}
            () = is_true(&mut failing) => {}
            () = too_late => {}
        }
    }

    pub(crate) fn snapshot(&self, state: &mut StateWriter) -> Result<()> {
        let inner = lock(&self.inner);
        state.u64(inner.next_id);
        state.bool(inner.in_flight.is_some());
        if let Some(delivery) = &inner.in_flight {
            state.str(&inner.inputs[delivery.input].metric);
            state.u64(delivery.id);
            state.batches(std::slice::from_ref(&delivery.rows))?;
        }
        state.u64(inner.waiting.len() as u64);
        for (input, waiting) in inner.inputs.iter().zip(&inner.waiting) {
            state.str(&input.metric);
            let batches: Vec<RecordBatch> = waiting.entries.iter().map(|entry| entry.rows.clone()).collect();
            state.batches(&batches)?;
        }
        Ok(())
    }

    pub(crate) fn restore(&self, state: &[u8]) -> Result<()> {
        let mut state = StateReader::new(state);
        let mut inner = lock(&self.inner);
        inner.next_id = inner.next_id.max(state.u64()?);
        if state.bool()? {
            let metric = state.str()?;
            let id = state.u64()?;
            for rows in state.batches()? {
                if let Some(input) = inner.input_of(metric, &rows) {
                    let bytes = size(&rows);
                    inner.bytes += bytes;
                    inner.in_flight = Some(Delivery { input, id, rows, bytes });
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
        // The longest waiting first, so that no input starves behind one that is always full.
        let due = |waiting: &Waiting| {
            let since = waiting.entries.front()?.since;
            Some(if draining || waiting.rows >= limits.rows { since } else { since + limits.every })
        };
        let first = inner.waiting.iter().enumerate().filter_map(|(input, w)| Some((due(w)?, input))).min();
        match first {
            Some((at, input)) if at <= now => {
                let (rows, bytes) = inner.waiting[input].take(limits.rows)?;
                let delivery = Delivery { input, id: inner.next_id, rows, bytes };
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
        inner.bytes -= delivery.bytes;
        if inner.is_empty() {
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
        let bytes = size(&rows);
        self.bytes += bytes;
        let waiting = &mut self.waiting[input];
        waiting.rows += rows.num_rows();
        waiting.entries.push_back(Entry { rows, bytes, since: Instant::now() });
    }

    fn is_empty(&self) -> bool {
        self.in_flight.is_none() && self.waiting.iter().all(|waiting| waiting.rows == 0)
    }
}

impl Waiting {
    /// At most `rows_max` rows from the front, as one batch, and the bytes that they count for.
    fn take(&mut self, rows_max: usize) -> Result<(RecordBatch, usize)> {
        let mut parts = Vec::new();
        let mut bytes = 0;
        let mut wanted = rows_max.max(1);
        while wanted > 0
            && let Some(mut entry) = self.entries.pop_front()
        {
            let count = entry.rows.num_rows();
            if count > wanted {
                let part = entry.bytes * wanted / count;
                parts.push(entry.rows.slice(0, wanted));
                bytes += part;
                entry.rows = entry.rows.slice(wanted, count - wanted);
                entry.bytes -= part;
                self.entries.push_front(entry);
                break;
            }
            wanted -= count;
            bytes += entry.bytes;
            parts.push(entry.rows);
        }
        let first = parts.first().ok_or_else(|| Error::internal("nothing to deliver"))?;
        let rows = concat_batches(first.schema_ref(), &parts)?;
        self.rows -= rows.num_rows();
        Ok((rows, bytes))
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
                self.outbox.failing.send_replace(true);
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
        self.outbox.failing.send_replace(false);
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

#[cfg(test)]
mod tests {
    use arrow::array::{AsArray, Int64Array};
    use arrow::datatypes::Int64Type;
    use async_trait::async_trait;
    use futures::poll;

    use super::*;
    use crate::plugin::StreamShape;
    use crate::schema::{FieldType, schema_of};
    use crate::status::{NodeKind, Status};

    /// Longer than any test runs.
    const LONG: Duration = Duration::from_secs(3600);

    fn outbox(rows: usize, every: Duration, metrics: &[&str]) -> Outbox {
        let shape = StreamShape { schema: schema_of([("a", FieldType::Int)]), keys: Vec::new(), windowed: false };
        let input = |metric: &&str| SinkInput { metric: (*metric).to_owned(), shape: shape.clone() };
        Outbox::new(BatchLimits { rows, every }, metrics.iter().map(input).collect())
    }

    fn rows(values: impl IntoIterator<Item = i64>) -> RecordBatch {
        let column = Int64Array::from_iter_values(values);
        RecordBatch::try_new(schema_of([("a", FieldType::Int)]), vec![Arc::new(column)]).expect("rows")
    }

    fn values(rows: &RecordBatch) -> Vec<i64> {
        rows.column(0).as_primitive::<Int64Type>().values().to_vec()
    }

    /// The delivery that is due, as its input and rows; done at once.
    fn delivered(outbox: &Outbox) -> Option<(usize, Vec<i64>)> {
        let delivery = outbox.next().expect("no failure").ok()?;
        outbox.done(&delivery);
        Some((delivery.input, values(&delivery.rows)))
    }

    #[tokio::test]
    async fn rows_are_due_at_the_limit_or_when_they_have_waited_and_never_more_at_once() {
        let zero = Duration::ZERO;
        for (case, every, puts, expected, left) in [
            ("below the limit", LONG, vec![2], vec![], 2),
            ("at the limit", LONG, vec![2, 1], vec![vec![0, 1, 2]], 0),
            ("a large batch is cut", LONG, vec![8], vec![vec![0, 1, 2], vec![3, 4, 5]], 2),
            ("batches are joined and cut", LONG, vec![2, 2, 1], vec![vec![0, 1, 2]], 2),
            ("waited", zero, vec![2], vec![vec![0, 1]], 0),
            ("what is cut off has waited too", zero, vec![4], vec![vec![0, 1, 2], vec![3]], 0),
        ] {
            let outbox = outbox(3, every, &["m"]);
            let mut first = 0;
            for count in puts {
                outbox.put(0, &rows(first..first + count)).await;
                first += count;
            }
            let seen: Vec<Vec<i64>> = std::iter::from_fn(|| delivered(&outbox)).map(|(_, rows)| rows).collect();
            assert_eq!(seen, expected, "{case}");
            let inner = lock(&outbox.inner);
            assert_eq!((inner.waiting[0].rows, inner.is_empty()), (left, left == 0), "{case}");
        }
    }

    #[tokio::test]
    async fn rows_that_are_cut_off_keep_the_time_since_which_they_wait() {
        let outbox = outbox(3, LONG, &["m"]);
        outbox.put(0, &rows(0..4)).await;
        let since = lock(&outbox.inner).waiting[0].entries[0].since;
        assert_eq!(delivered(&outbox), Some((0, vec![0, 1, 2])));
        let Ok(Err(Some(at))) = outbox.next() else { panic!("one row waits") };
        assert_eq!(at, since + LONG);
    }

    #[tokio::test]
    async fn each_input_is_delivered_by_itself_and_the_longest_waiting_first() {
        let outbox = outbox(3, Duration::ZERO, &["m", "n"]);
        for (input, values) in [(1, 0..2), (0, 2..3), (1, 3..4)] {
            outbox.put(input, &rows(values)).await;
        }
        assert_eq!(delivered(&outbox), Some((1, vec![0, 1, 3])));
        assert_eq!(delivered(&outbox), Some((0, vec![2])));
        assert_eq!(delivered(&outbox), None);
    }

    #[tokio::test]
    async fn an_input_that_is_always_full_does_not_starve_another() {
        let outbox = outbox(1, LONG, &["m", "n"]);
        for (input, value) in [(0, 0), (1, 1), (0, 2)] {
            outbox.put(input, &rows([value])).await;
        }
        for expected in [(0, vec![0]), (1, vec![1]), (0, vec![2])] {
            assert_eq!(delivered(&outbox), Some(expected));
        }
    }

    #[tokio::test]
    async fn a_full_outbox_lets_the_graph_wait_until_a_delivery_is_done() {
        let outbox = outbox(usize::MAX, Duration::ZERO, &["m"]);
        let huge = RecordBatch::try_new(
            schema_of([("a", FieldType::Int)]),
            // Zeros that are never touched take no memory.
            vec![Arc::new(Int64Array::from(vec![0; OUTBOX_BYTES_MAX / size_of::<i64>()]))],
        );
        outbox.put(0, &huge.expect("rows")).await;
        let one = rows([7]);
        let mut put = std::pin::pin!(outbox.put(0, &one));
        assert!(poll!(put.as_mut()).is_pending());
        let delivery = outbox.next().expect("no failure").expect("due");
        assert!(poll!(put.as_mut()).is_pending(), "what is in flight may have to go again");
        outbox.done(&delivery);
        put.await;
        assert_eq!(delivered(&outbox), Some((0, vec![7])));
        assert_eq!(lock(&outbox.inner).bytes, 0);
    }

    /// Ids and rows of deliveries.
    type Deliveries = Vec<(u64, Vec<i64>)>;

    /// Notes every delivery and answers from a list; then all is well.
    struct Fake {
        answers: VecDeque<Result<()>>,
        seen: Arc<Mutex<Deliveries>>,
    }

    #[async_trait]
    impl OutboxSink for Fake {
        async fn connect(&mut self) -> Result<()> {
            Ok(())
        }
        async fn deliver(&mut self, _input: usize, rows: &RecordBatch, id: u64) -> Result<()> {
            lock(&self.seen).push((id, values(rows)));
            self.answers.pop_front().unwrap_or(Ok(()))
        }
    }

    #[tokio::test]
    async fn a_failed_delivery_comes_again_with_its_id_and_refused_rows_do_not() {
        let refused = || Err(Error::user("no such table"));
        let failed = || Err(Error::outside("gone"));
        for (case, answers, expected, dropped) in [
            ("fails twice", vec![failed(), failed()], vec![(0, 0), (0, 0), (0, 0), (1, 1)], 0),
            ("refused", vec![refused()], vec![(0, 0), (1, 1)], 1),
            ("the second fails", vec![Ok(()), failed()], vec![(0, 0), (1, 1), (1, 1)], 0),
        ] {
            let outbox = Arc::new(outbox(1, LONG, &["m"]));
            let first_id = lock(&outbox.inner).next_id;
            let seen = Arc::default();
            let sink = Box::new(Fake { answers: answers.into(), seen: Arc::clone(&seen) });
            let status = Status::default().node(NodeKind::Sink, "s", "");
            let task =
                DeliveryTask { name: "s".to_owned(), outbox: Arc::clone(&outbox), sink, status: Arc::clone(&status) };
            outbox.put(0, &rows(0..2)).await;
            tokio::select! {
                () = task.run() => panic!("{case}: the task ends"),
                () = outbox.drain() => {}
            }
            let expected: Vec<_> = expected.into_iter().map(|(id, value)| (first_id + id, vec![value])).collect();
            assert_eq!(*lock(&seen), expected, "{case}");
            assert!(lock(&outbox.inner).is_empty(), "{case}");
            assert_eq!(status.dropped_rows.load(Relaxed), dropped, "{case}");
        }
    }

    #[tokio::test]
    async fn at_a_stop_rows_on_their_way_pass_a_full_outbox() {
        let outbox = outbox(usize::MAX, Duration::ZERO, &["m"]);
        lock(&outbox.inner).bytes = OUTBOX_BYTES_MAX;
        let one = rows([7]);
        let mut put = std::pin::pin!(outbox.put(0, &one));
        assert!(poll!(put.as_mut()).is_pending());
        outbox.hurry();
        assert!(poll!(put.as_mut()).is_ready());
        assert_eq!(outbox.rows(), 1);
    }

    #[tokio::test]
    async fn draining_ends_when_nothing_waits_or_the_sink_has_failed() {
        let outbox = outbox(100, LONG, &["m"]);
        outbox.drain().await;
        outbox.put(0, &rows(0..2)).await;
        let mut drain = std::pin::pin!(outbox.drain());
        assert!(poll!(drain.as_mut()).is_pending(), "however long the other side is away");
        outbox.hurry();
        assert!(poll!(drain.as_mut()).is_pending(), "a few seconds more");
        outbox.failing.send_replace(true);
        assert!(poll!(drain.as_mut()).is_ready());
        assert_eq!(outbox.rows(), 2);
    }

    #[tokio::test]
    async fn what_rows_count_for_is_taken_off_again_to_the_byte() {
        let outbox = outbox(7, Duration::ZERO, &["m", "n"]);
        for value in 0..100 {
            outbox.put(value as usize % 2, &rows(value..value * 3)).await;
        }
        let mut state = StateWriter::default();
        let in_flight = outbox.next().expect("no failure").expect("due");
        outbox.snapshot(&mut state).expect("a state");
        outbox.done(&in_flight);
        while delivered(&outbox).is_some() {}
        assert_eq!(lock(&outbox.inner).bytes, 0);
        outbox.restore(&state.finish()).expect("a state");
        assert_eq!(outbox.rows(), (0..100).map(|value| value * 2).sum::<usize>());
        while delivered(&outbox).is_some() {}
        assert_eq!(lock(&outbox.inner).bytes, 0);
        assert_eq!(outbox.rows(), 0);
    }

    #[tokio::test]
    async fn draining_makes_everything_due() {
        let outbox = outbox(100, LONG, &["m"]);
        outbox.put(0, &rows(0..2)).await;
        let mut drain = std::pin::pin!(outbox.drain());
        assert!(poll!(drain.as_mut()).is_pending());
        assert_eq!(delivered(&outbox), Some((0, vec![0, 1])));
        assert!(poll!(drain.as_mut()).is_ready());
    }

    #[tokio::test]
    async fn a_restored_outbox_repeats_what_was_in_flight_and_keeps_rows_by_metric() {
        let before = outbox(2, Duration::ZERO, &["m", "n"]);
        before.put(0, &rows(0..3)).await;
        let in_flight = before.next().expect("no failure").expect("due");
        before.put(1, &rows(3..5)).await;
        let mut state = StateWriter::default();
        before.snapshot(&mut state).expect("a state");
        let state = state.finish();

        for (case, metrics, expected) in [
            ("the same", vec!["m", "n"], vec![(0, vec![0, 1]), (0, vec![2]), (1, vec![3, 4])]),
            ("in another order", vec!["n", "o", "m"], vec![(2, vec![0, 1]), (2, vec![2]), (0, vec![3, 4])]),
            ("one is gone", vec!["n"], vec![(0, vec![3, 4])]),
        ] {
            let after = outbox(2, Duration::ZERO, &metrics);
            lock(&after.inner).next_id = 1;
            after.restore(&state).expect(case);
            if metrics.contains(&"m") {
                assert_eq!(after.next().expect("no failure").expect("in flight").id, in_flight.id, "{case}");
            }
            let mut seen: Vec<_> = std::iter::from_fn(|| delivered(&after)).collect();
            // Rows restored within one tick of the clock are due at the same time.
            seen[1.min(expected.len() - 1)..].sort_by_key(|(input, _)| expected.iter().position(|(e, _)| e == input));
            assert_eq!(seen, expected, "{case}");
            assert!(lock(&after.inner).next_id > in_flight.id, "{case}: an id is never used for other rows");
        }
        for end in 0..state.len() {
            assert!(outbox(2, LONG, &["m", "n"]).restore(&state[..end]).is_err(), "{end} of {} bytes", state.len());
        }
    }
}
