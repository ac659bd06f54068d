use std::path::Path;
use std::pin::pin;
use std::sync::Mutex;

use async_trait::async_trait;
use bytes::Bytes;
use futures::poll;
use tokio::sync::oneshot;

use arrow::array::Int64Array;

use super::*;
use crate::batch::Times;
use crate::disk::simulated::SimulatedDisk;
use crate::log::Durability;
use crate::plugin::{Acknowledger, Decoded, Pulled};
use crate::runtime::clock::testing::{event_clock, rows};
use crate::runtime::edge::Takes;
use crate::runtime::hold::Hold;
use crate::runtime::queue::{Sender, queue};
use crate::schema::{FieldType, schema_of};
use crate::status::{NodeKind, Status, lock};

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
    async fn reject(&mut self, tokens: &[u64], _: &Rejection) -> Result<()> {
        lock(&self.0).push(format!("rejected {tokens:?}"));
        Ok(())
    }
}

/// A task and all that it is connected to.
struct Bench {
    task: IntakeTask,
    arrivals: Sender<Arrival>,
    control: mpsc::Sender<Control>,
    rows: Receiver<Message>,
    errors: Receiver<Message>,
    reports: mpsc::Receiver<Report>,
    told: Arc<Mutex<Vec<String>>>,
}

fn bench(delivery: Delivery) -> Bench {
    let (arrivals, received) = queue(16);
    let (control, controls) = mpsc::channel(4);
    let (reporter, reports) = mpsc::channel(16);
    let (mut to_rows, mut to_errors) = (Outlet::default(), Outlet::default());
    let (rows, errors) = (to_rows.add(Takes::All), to_errors.add(Takes::All));
    let told = Arc::default();
    let (broken, _) = oneshot::channel();
    let task = IntakeTask {
        name: "s".to_owned(),
        key: "source/s".to_owned(),
        arrivals: received,
        control: controls,
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
        errors_untold: 0,
        delivery,
        inbox: None,
        unsettled: Unsettled::default(),
        held: Hold::default().subscribe(),
    };
    Bench { task, arrivals, control, rows, errors, reports, told }
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

/// An inbox whose records from `from` on are in no checkpoint.
fn inbox(disk: &SimulatedDisk, from: Option<u64>) -> Option<Inbox> {
    let disk = Arc::new(disk.clone());
    let inbox = Inbox::open(disk, Path::new("state/inbox"), Durability::Power, || None, from);
    Some(inbox.expect("an inbox"))
}

#[tokio::test]
async fn a_sender_and_a_checkpoint_wait_for_the_disk_and_the_graph_does_not() {
    let disk = SimulatedDisk::new(1);
    let mut bench = bench(Delivery::Acknowledged);
    bench.task.inbox = inbox(&disk, None);
    let told = Arc::clone(&bench.told);
    disk.set_room(Some(0));
    bench.task.arrival(records(&["100", "x"])).await;
    bench.task.barrier(Barrier { checkpoint: 3, last: false }).await;
    assert_eq!(waiting(&mut bench.rows), ["1: [100]", "time 90", "barrier 3"]);
    let progress = progress(&mut bench.task.inbox).await;
    bench.task.settle(&progress).await;
    assert!(matches!(bench.task.status.state(), NodeState::Retrying(_)), "{progress:?}");
    assert!(lock(&told).is_empty() && bench.reports.try_recv().is_err());
    disk.set_room(None);
    while lock(&told).is_empty() {
        let progress = super::progress(&mut bench.task.inbox).await;
        bench.task.settle(&progress).await;
    }
    assert_eq!(*lock(&told), ["accepted [0, 1]"]);
    assert!(matches!(bench.task.status.state(), NodeState::Healthy));
    let Ok(Report::Prepared(_, 3, Ok(state))) = bench.reports.try_recv() else { panic!("no state") };
    assert_eq!(state.inbox, Some(("inbox/inbox".to_owned(), 2)));
    let state = state.finish();

    // After a crash what no checkpoint has is taken in again, before anything new and before a drain ends.
    bench.task.arrival(records(&["120", "130"])).await;
    let mut after = self::bench(Delivery::Acknowledged);
    while bench.task.inbox.as_ref().is_some_and(|inbox| inbox.durable() < 4) {
        super::progress(&mut bench.task.inbox).await;
    }
    drop(bench);
    after.task.restore(&state).expect("a state");
    after.task.inbox = inbox(&disk, Some(2));
    let control = after.control.clone();
    control.send(Control::Close).await.expect("room");
    control.send(Control::Barrier(Barrier { checkpoint: 4, last: true })).await.expect("room");
    after.task.run().await;
    assert_eq!(waiting(&mut after.rows), ["2: [120, 130]", "time 120", "closed", "barrier 4", "End"]);
}

#[tokio::test]
async fn what_cannot_be_taken_in_again_is_passed_by_no_checkpoint() {
    let disk = SimulatedDisk::new(1);
    let mut inbox = inbox(&disk, None).expect("an inbox");
    for (at, text) in [(1, "100"), (2, "broken"), (3, "120")] {
        let Arrival::Records(records) = records(&[text]) else { panic!("no records") };
        inbox.append(records, at);
        while inbox.durable() < inbox.next() {
            inbox.changed().await;
        }
    }
    drop(inbox);
    let mut bench = bench(Delivery::Acknowledged);
    bench.task.inbox = self::inbox(&disk, None);
    for control in [Control::Close, Control::Barrier(Barrier { checkpoint: 4, last: true })] {
        bench.control.send(control).await.expect("room");
    }
    bench.task.run().await;
    assert!(matches!(bench.reports.try_recv(), Ok(Report::SourceFailed(_))));
    let Ok(Report::Prepared(_, 4, Ok(state))) = bench.reports.try_recv() else { panic!("no state") };
    assert_eq!(state.inbox, Some(("inbox/inbox".to_owned(), 1)));
    assert_eq!(waiting(&mut bench.rows), ["1: [100]", "time 90", "closed", "barrier 4", "End"]);
}

#[tokio::test]
async fn a_disk_that_cannot_be_trusted_ends_the_run_before_another_checkpoint() {
    let disk = SimulatedDisk::new(1);
    let mut bench = bench(Delivery::Acknowledged);
    bench.task.inbox = inbox(&disk, None);
    disk.fail_sync_after(0);
    bench.task.arrival(records(&["100"])).await;
    bench.task.barrier(Barrier { checkpoint: 3, last: false }).await;
    let progress = progress(&mut bench.task.inbox).await;
    assert!(progress.broken.is_some());
    assert!(poll!(pin!(bench.task.settle(&progress))).is_pending(), "for good");
    assert!(matches!(bench.reports.try_recv(), Ok(Report::Lost(key, _)) if key == "source/s"));
    assert!(bench.reports.try_recv().is_err() && lock(&bench.told).is_empty());
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
        let state = state.finish();
        let mut after = self::bench(delivery);
        assert_eq!(after.task.restore(&state).expect("a state"), Some(vec![position]), "{delivery:?}");
        assert_eq!(after.task.clock.newest_us, bench.task.clock.newest_us, "{delivery:?}");
    }
}

#[tokio::test]
async fn a_source_that_is_held_back_takes_nothing_in_and_answers_checkpoints() {
    let hold = Hold::default();
    let Bench { mut task, arrivals, control, mut rows, errors: _errors, mut reports, told: _told } =
        bench(Delivery::Replayable);
    task.held = hold.subscribe();
    let held = hold.hold();
    arrivals.send(pulled(&[100], 1), 1).await.expect("room");
    let barrier = |checkpoint, last| Control::Barrier(Barrier { checkpoint, last });
    control.send(barrier(1, false)).await.expect("room");
    let running = tokio::spawn(task.run());
    assert!(matches!(reports.recv().await, Some(Report::Prepared(_, 1, Ok(_)))));
    assert_eq!(waiting(&mut rows), ["barrier 1"]);
    drop(held);
    assert!(matches!(rows.recv().await, Some(Message::Batch(_, 1))));
    control.send(barrier(2, true)).await.expect("room");
    running.await.expect("a clean end");
    assert_eq!(waiting(&mut rows), ["time 90", "barrier 2", "End"]);
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
