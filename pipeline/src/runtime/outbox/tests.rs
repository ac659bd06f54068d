use std::collections::VecDeque;
use std::sync::atomic::Ordering::Relaxed;

use arrow::array::{AsArray, Int64Array};
use arrow::datatypes::Int64Type;
use async_trait::async_trait;
use futures::poll;
use tempfile::TempDir;

use super::*;
use crate::disk::RealDisk;
use crate::plugin::{OutboxSink, StreamShape};
use crate::schema::{FieldType, schema_of};
use crate::status::{NodeKind, Status};

/// Longer than any test runs.
const LONG: Duration = Duration::from_secs(3600);

/// An outbox in a folder of its own.
struct Bench {
    outbox: Arc<Outbox>,
    folder: TempDir,
}

impl std::ops::Deref for Bench {
    type Target = Outbox;
    fn deref(&self) -> &Outbox {
        &self.outbox
    }
}

fn open(folder: &Path, rows: usize, every: Duration, metrics: &[&str], exactly_once: bool) -> Outbox {
    let shape = StreamShape { schema: schema_of([("a", FieldType::Int)]), keys: Vec::new(), windowed: false };
    let input = |metric: &&str| SinkInput { metric: (*metric).to_owned(), shape: shape.clone() };
    let inputs = metrics.iter().map(input).collect();
    let limits = BatchLimits { rows, every };
    let hold = Hold::default();
    Outbox::open(limits, exactly_once, inputs, Arc::new(RealDisk), folder, Durability::Process, hold)
        .expect("an outbox")
}

fn outbox(rows: usize, every: Duration, metrics: &[&str]) -> Bench {
    let folder = tempfile::tempdir().expect("a folder");
    Bench { outbox: Arc::new(open(folder.path(), rows, every, metrics, false)), folder }
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

/// What the checkpoint has of the outbox.
fn prepared(outbox: &Outbox, checkpoint: u64) -> Vec<u8> {
    let mut state = StateWriter::default();
    outbox.prepare(checkpoint, &mut state).expect("a state");
    state.finish()
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
        for written in [false, true] {
            let outbox = outbox(3, every, &["m"]);
            let mut first = 0;
            for count in &puts {
                outbox.put(0, &rows(first..first + count)).await;
                first += count;
            }
            if written {
                prepared(&outbox, 1);
            }
            let seen: Vec<Vec<i64>> = std::iter::from_fn(|| delivered(&outbox)).map(|(_, rows)| rows).collect();
            assert_eq!(seen, expected, "{case}");
            let inner = lock(&outbox.inner);
            assert_eq!((inner.waiting[0].rows, inner.is_empty()), (left, left == 0), "{case}");
        }
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

/// An outbox that is full with one row.
fn tiny(exactly_once: bool) -> Bench {
    let folder = tempfile::tempdir().expect("a folder");
    let outbox = open(folder.path(), usize::MAX, Duration::ZERO, &["m"], exactly_once);
    Bench { outbox: Arc::new(Outbox { bytes_max: 1, ..outbox }), folder }
}

#[tokio::test]
async fn a_full_outbox_lets_the_graph_wait_until_a_delivery_is_done() {
    let outbox = tiny(false);
    outbox.put(0, &rows(0..100)).await;
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

#[tokio::test]
async fn a_full_outbox_lets_rows_pass_that_its_next_checkpoint_stands_behind() {
    let outbox = tiny(true);
    for value in 0..3 {
        outbox.put(0, &rows([value])).await;
    }
    assert_eq!(delivered(&outbox), None, "no checkpoint has them");
    prepared(&outbox, 4);
    assert_eq!(delivered(&outbox), None, "it is not durable");
    outbox.put(0, &rows([3])).await;
    outbox.commit(4, 4).expect("room");
    let one = rows([4]);
    let mut put = std::pin::pin!(outbox.put(0, &one));
    assert!(poll!(put.as_mut()).is_pending());
    assert_eq!(delivered(&outbox), Some((0, vec![0, 1, 2])));
    assert_eq!(delivered(&outbox), None, "the next checkpoint has it");
    assert!(poll!(put.as_mut()).is_ready());
}

#[tokio::test]
async fn rows_that_no_checkpoint_has_hold_the_sources_back_while_the_outbox_is_full() {
    for (exactly_once, while_full) in [(true, 1), (false, 0)] {
        let outbox = tiny(exactly_once);
        let held = outbox.hold.subscribe();
        assert_eq!(*held.borrow(), 0);
        outbox.put(0, &rows([1])).await;
        assert_eq!(*held.borrow(), while_full, "{exactly_once}");
        prepared(&outbox, 1);
        outbox.commit(1, 1).expect("room");
        assert_eq!(*held.borrow(), 0, "{exactly_once}: they can be delivered");
        assert_eq!(delivered(&outbox), Some((0, vec![1])));
        assert_eq!(*held.borrow(), 0);
    }
}

#[tokio::test]
async fn rows_of_a_run_that_would_be_taken_for_others_are_told() {
    let outbox = tiny(true);
    outbox.put(0, &rows([1])).await;
    let start = lock(&outbox.inner).waiting[0].start;
    outbox.check_numbers(0, 0).expect("another table");
    outbox.check_numbers(0, start).expect("a run before");
    let error = outbox.check_numbers(0, start + 1).expect_err("a clock that was set back");
    assert!(error.to_string().contains("the clock was set back") && error.to_string().contains("`m`"), "{error}");
    // From a checkpoint before the last one: what was delivered after it comes again.
    let state = prepared(&outbox, 1);
    let after = open(outbox.folder.path(), 1, LONG, &["m"], true);
    after.restore(1, &state).expect("a state");
    assert_eq!(lock(&after.inner).waiting[0].start, start + 1);
    after.check_numbers(0, start + 5).expect("a warning");
}

#[tokio::test]
async fn rows_that_are_lost_take_no_others_with_them_and_all_keep_their_numbers() {
    let folder = tempfile::tempdir().expect("a folder");
    let before = open(folder.path(), 10, Duration::ZERO, &["m"], true);
    for (checkpoint, values) in [(1, 0..2), (2, 2..4), (3, 4..6)] {
        before.put(0, &rows(values)).await;
        prepared(&before, checkpoint);
    }
    let state = prepared(&before, 4);
    let first = lock(&before.inner).waiting[0].entries[0].first;
    drop(before);
    // As if the last commit was torn.
    let mut log = Log::open(Arc::new(RealDisk), folder.path(), LogOptions::default()).expect("a log").0;
    log.truncate(2).expect("cut");
    drop(log);
    let after = open(folder.path(), 10, Duration::ZERO, &["m"], true);
    after.restore(4, &state).expect("a state");
    after.put(0, &rows([9])).await;
    prepared(&after, 5);
    after.commit(5, 4).expect("room");
    let mut seen = Vec::new();
    while let Ok(delivery) = after.next().expect("no failure") {
        after.done(&delivery);
        seen.push((delivery.id - first, values(&delivery.rows)));
    }
    assert_eq!(seen, [(4, vec![0, 1, 2, 3]), (7, vec![9])]);
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
        ("fails twice", vec![failed(), failed()], vec![(1, 0), (1, 0), (1, 0), (2, 1)], 0),
        ("refused", vec![refused()], vec![(1, 0), (2, 1)], 1),
        ("the second fails", vec![Ok(()), failed()], vec![(1, 0), (2, 1), (2, 1)], 0),
    ] {
        let outbox = outbox(1, LONG, &["m"]);
        let before = lock(&outbox.inner).waiting[0].next;
        let seen = Arc::default();
        let sink = Box::new(Fake { answers: answers.into(), seen: Arc::clone(&seen) });
        let status = Status::default().node(NodeKind::Sink, "s", "");
        let shared = Arc::clone(&outbox.outbox);
        let task =
            DeliveryTask { name: "s".to_owned(), outbox: shared, sink, status: Arc::clone(&status), checked: false };
        outbox.put(0, &rows(0..2)).await;
        tokio::select! {
            () = task.run() => panic!("{case}: the task ends"),
            () = outbox.drain() => {}
        }
        let expected: Vec<_> = expected.into_iter().map(|(id, value)| (before + id, vec![value])).collect();
        assert_eq!(*lock(&seen), expected, "{case}");
        assert!(lock(&outbox.inner).is_empty(), "{case}");
        assert_eq!(status.dropped_rows.load(Relaxed), dropped, "{case}");
    }
}

#[tokio::test]
async fn at_a_stop_rows_on_their_way_pass_a_full_outbox() {
    let outbox = tiny(false);
    outbox.put(0, &rows([6])).await;
    let one = rows([7]);
    let mut put = std::pin::pin!(outbox.put(0, &one));
    assert!(poll!(put.as_mut()).is_pending());
    outbox.hurry();
    assert!(poll!(put.as_mut()).is_ready());
    assert_eq!(outbox.rows(), 2);
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
async fn draining_makes_everything_due() {
    let outbox = outbox(100, LONG, &["m"]);
    outbox.put(0, &rows(0..2)).await;
    let mut drain = std::pin::pin!(outbox.drain());
    assert!(poll!(drain.as_mut()).is_pending());
    assert_eq!(delivered(&outbox), Some((0, vec![0, 1])));
    assert!(poll!(drain.as_mut()).is_ready());
}

#[tokio::test]
async fn what_rows_count_for_is_taken_off_again_to_the_byte() {
    let outbox = outbox(7, Duration::ZERO, &["m", "n"]);
    for value in 0..100 {
        outbox.put(value as usize % 2, &rows(value..value * 3)).await;
        if value % 30 == 0 {
            prepared(&outbox, value.unsigned_abs());
            delivered(&outbox);
        }
    }
    while delivered(&outbox).is_some() {}
    let inner = lock(&outbox.inner);
    assert_eq!((inner.bytes, inner.memory, inner.unwritten), (0, 0, 0));
    assert!(inner.waiting.iter().all(|waiting| waiting.rows == 0 && waiting.ready == 0));
}

#[tokio::test]
async fn rows_beyond_the_memory_are_read_back_from_the_disk() {
    const ROWS: i64 = 4096;
    let outbox = outbox(1000, Duration::ZERO, &["m"]);
    let count = 2 * i64::try_from(MEMORY_BYTES_MAX).expect("a number") / 8 / ROWS;
    for batch in 0..count {
        outbox.put(0, &rows(batch * ROWS..(batch + 1) * ROWS)).await;
    }
    prepared(&outbox, 1);
    {
        let inner = lock(&outbox.inner);
        assert!(
            inner.memory <= MEMORY_BYTES_MAX && inner.bytes > MEMORY_BYTES_MAX,
            "{} of {}",
            inner.memory,
            inner.bytes
        );
    }
    let mut next = 0;
    while let Some((_, values)) = delivered(&outbox) {
        for value in values {
            assert_eq!(value, next);
            next += 1;
        }
    }
    assert_eq!(next, count * ROWS);
    assert_eq!(lock(&outbox.inner).memory, 0);
}

#[tokio::test]
async fn a_restored_outbox_goes_on_where_the_checkpoint_was_with_the_same_numbers() {
    for (case, metrics, expected) in [
        ("the same", vec!["m", "n"], vec![(0, vec![0, 1]), (0, vec![2, 9]), (1, vec![3, 4])]),
        ("in another order", vec!["n", "o", "m"], vec![(2, vec![0, 1]), (2, vec![2, 9]), (0, vec![3, 4])]),
        ("one is gone", vec!["n"], vec![(0, vec![3, 4])]),
    ] {
        for exactly_once in [false, true] {
            let folder = tempfile::tempdir().expect("a folder");
            let before = open(folder.path(), 2, Duration::ZERO, &["m", "n"], exactly_once);
            before.put(0, &rows([-2, -1, 0])).await;
            prepared(&before, 1);
            before.commit(1, 1).expect("room");
            before.put(0, &rows([1, 2, 9])).await;
            before.put(1, &rows(3..5)).await;
            assert_eq!(delivered(&before), Some((0, vec![-2, -1])), "{case}");
            let state = prepared(&before, 2);
            // After the checkpoint: delivered once more, and rows that it does not have.
            before.commit(2, 1).expect("room");
            let in_flight = before.next().expect("no failure").expect("due");
            before.put(1, &rows([77])).await;
            prepared(&before, 3);
            drop(before);

            let after = open(folder.path(), 2, Duration::ZERO, &metrics, exactly_once);
            after.restore(2, &state).expect(case);
            if metrics.contains(&"m") {
                let again = after.next().expect("no failure").expect("in flight");
                assert_eq!((again.id, values(&again.rows)), (in_flight.id, values(&in_flight.rows)), "{case}");
            }
            let mut seen: Vec<_> = std::iter::from_fn(|| delivered(&after)).collect();
            // Rows restored within one tick of the clock are due at the same time.
            seen.sort_by_key(|delivery| expected.iter().position(|expected| expected == delivery));
            assert_eq!(seen, expected, "{case}");
            for end in 0..state.len() {
                let damaged = open(folder.path(), 2, LONG, &["m", "n"], exactly_once);
                assert!(damaged.restore(2, &state[..end]).is_err(), "{end} of {} bytes", state.len());
            }
        }
    }
}

#[tokio::test]
async fn rows_that_wait_are_delivered_with_the_columns_that_their_pipeline_has_now() {
    let folder = tempfile::tempdir().expect("a folder");
    let before = open(folder.path(), 10, Duration::ZERO, &["m"], true);
    before.put(0, &rows(0..3)).await;
    let state = prepared(&before, 1);
    drop(before);
    for (fields, expected) in [
        (vec![("b", FieldType::String), ("a", FieldType::Int)], Some((2, vec![0, 1, 2]))),
        (vec![("b", FieldType::String)], Some((1, vec![]))),
        // Another type: nobody can say what the row would be.
        (vec![("a", FieldType::String)], None),
    ] {
        let shape = StreamShape { schema: schema_of(fields.clone()), keys: Vec::new(), windowed: false };
        let inputs = vec![SinkInput { metric: "m".to_owned(), shape: shape.clone() }];
        let limits = BatchLimits { rows: 10, every: Duration::ZERO };
        let disk = Arc::new(RealDisk);
        let after = Outbox::open(limits, true, inputs, disk, folder.path(), Durability::Process, Hold::default())
            .expect("an outbox");
        after.restore(1, &state).expect("a state");
        let delivery = after.next().expect("no failure").ok();
        let seen = delivery.map(|delivery| {
            assert_eq!(delivery.rows.schema(), shape.schema);
            let numbers = delivery.rows.column_by_name("a").map(|_| {
                let index = delivery.rows.schema().index_of("a").expect("a column");
                delivery.rows.column(index).as_primitive::<Int64Type>().values().to_vec()
            });
            (delivery.rows.num_columns(), numbers.unwrap_or_default())
        });
        assert_eq!(seen, expected, "{fields:?}");
    }
}

#[tokio::test]
async fn a_log_that_no_checkpoint_needs_is_trimmed_and_one_that_none_names_is_passed_over() {
    let outbox = outbox(usize::MAX, Duration::ZERO, &["m"]);
    let batch = rows(0..8192);
    for checkpoint in 1..=600 {
        outbox.put(0, &batch).await;
        prepared(&outbox, checkpoint);
        outbox.commit(checkpoint, checkpoint.saturating_sub(2)).expect("room");
        while delivered(&outbox).is_some() {}
    }
    let first = lock(&outbox.inner).log.first_lsn();
    assert!(first > 0 && first < 600, "{first}");
    let folder = outbox.folder.path().to_owned();
    let Bench { outbox, folder: _kept } = outbox;
    drop(outbox);
    // A start without a state for it: the checkpoints before may still be gone back to.
    let anew = open(&folder, 1, Duration::ZERO, &["m"], false);
    assert_eq!(anew.rows(), 0);
    assert_eq!(lock(&anew.inner).log.first_lsn(), first);
    anew.put(0, &rows([5])).await;
    let state = prepared(&anew, 700);
    anew.commit(700, 699).expect("room");
    assert_eq!(delivered(&anew), Some((0, vec![5])));
    drop(anew);
    let after = open(&folder, 1, Duration::ZERO, &["m"], false);
    after.restore(700, &state).expect("a state");
    assert_eq!(delivered(&after), Some((0, vec![5])));
    assert_eq!(delivered(&after), None);
}

#[tokio::test]
async fn the_state_of_the_first_version_is_read() {
    let mut state = StateWriter::default();
    state.u64(1_700_000_000_000_000);
    state.bool(true);
    state.str("m");
    state.u64(1_700_000_000_000_000);
    state.batches(&[rows([1])]).expect("rows");
    state.u64(2);
    state.str("m");
    state.batches(&[rows([2, 3])]).expect("rows");
    state.str("gone");
    state.batches(&[rows([4])]).expect("rows");
    let outbox = outbox(10, Duration::ZERO, &["m"]);
    outbox.restore(7, &state.finish()).expect("read");
    assert_eq!(delivered(&outbox), Some((0, vec![1, 2, 3])));
}
