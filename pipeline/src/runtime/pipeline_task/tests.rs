use super::*;
use crate::error::Error;
use crate::plugin::Output;
use crate::schema::{FieldType, schema_of};
use crate::status::{NodeKind, Status};
use Signal::{Idle, Rows, Time};

const MIN: i64 = i64::MIN;
const END: i64 = i64::MAX;

/// What comes in on a port, or what goes out.
#[derive(Clone, Debug, PartialEq)]
enum Signal {
    /// Event times of rows, and the watermark that each meets.
    Rows(Vec<i64>, Vec<i64>),
    Time(i64),
    Idle(i64),
}

fn rows(event_us: &[i64], watermark_us: i64) -> Signal {
    Rows(event_us.to_vec(), vec![watermark_us; event_us.len()])
}

fn batch(event_us: Vec<i64>, watermark_us: Vec<i64>) -> Batch {
    let column = Int64Array::from(event_us.clone());
    let rows = RecordBatch::try_new(schema_of([("n", FieldType::Int)]), vec![Arc::new(column)]).expect("rows");
    let ingest_us = Int64Array::from_value(0, event_us.len());
    let times = Times { event_us: event_us.into(), ingest_us, watermark_us: watermark_us.into() };
    Batch::new(rows, times, Stage::Final).expect("a batch")
}

/// Passes rows on, or keeps them until the watermark has passed them; fails at a row of time 13.
#[derive(Default)]
struct Step {
    keeps: bool,
    kept: Vec<Batch>,
    /// How far below the watermark the rows may lie that it gives out later.
    behind_us: Option<i64>,
    watermark_us: i64,
    unwritable: bool,
}

impl Operator for Step {
    fn process(&mut self, _: usize, batch: Batch, out: &mut Output) -> Result<()> {
        if batch.event_us().contains(&13) {
            return Err(Error::internal("13"));
        }
        if self.keeps {
            self.kept.push(batch)
        } else {
            out.push(batch)
        }
        Ok(())
    }
    fn watermark(&mut self, time_us: i64, out: &mut Output) -> Result<()> {
        self.watermark_us = time_us;
        let (out_now, kept) = self.kept.drain(..).partition(|b| b.event_us().iter().all(|us| *us < time_us));
        self.kept = kept;
        Vec::into_iter(out_now).for_each(|batch| out.push(batch));
        Ok(())
    }
    fn holds_back_us(&self) -> Option<i64> {
        self.behind_us.map(|behind_us| self.watermark_us.saturating_sub(behind_us))
    }
    fn snapshot(&self, state: &mut StateWriter) {
        match self.unwritable {
            true => state.attempt(|_| Err(Error::internal("too long"))),
            false => state.i64(self.watermark_us),
        }
    }
    fn restore(&mut self, state: &mut StateReader<'_>) -> Result<()> {
        self.watermark_us = state.i64()?;
        Ok(())
    }
}

fn task(names: &[&str], steps: Vec<Step>) -> (PipelineTask, mpsc::Receiver<Report>) {
    let status = Arc::new(Status::default());
    let (reports, received) = mpsc::channel(8);
    let port = |from: &&str| Port {
        from: (*from).to_owned(),
        step: 0,
        input: 0,
        unite: None,
        watermark_us: MIN,
        idle_us: None,
    };
    let task = PipelineTask {
        name: "p".to_owned(),
        key: "pipeline/p".to_owned(),
        inputs: Inputs::new(Vec::new()),
        ports: names.iter().map(port).collect(),
        steps: steps.into_iter().map(|step| Box::new(step) as Box<dyn Operator>).collect(),
        outlet: Outlet::default(),
        status: status.node(NodeKind::Pipeline, "p", "pipeline"),
        live: Arc::new(Live::new(String::new(), status, [("p".to_owned(), vec!["n".to_owned()])])),
        reports,
        number: 0,
        watermark_us: MIN,
        forwarded_us: MIN,
        told_idle: false,
        failed: false,
        failed_rows: 0,
        state_bytes: 0,
    };
    (task, received)
}

/// What the pipeline sends after `signal` on `port`.
fn after(task: &mut PipelineTask, port: usize, signal: &Signal) -> Vec<Signal> {
    let sent = match signal.clone() {
        Rows(event_us, watermark_us) => task.batch(port, batch(event_us, watermark_us)),
        Time(time_us) => task.port_watermark(port, time_us),
        Idle(time_us) => task.port_idle(port, time_us),
    };
    let signal = |message| match message {
        Message::Batch(batch, _) => Rows(batch.event_us().to_vec(), batch.watermark_us().to_vec()),
        Message::Watermark(time_us) => Time(time_us),
        Message::Idle(time_us) => Idle(time_us),
        other => panic!("{other:?}"),
    };
    sent.expect("no failure").into_iter().map(signal).collect()
}

/// Each signal on its port gives what is expected.
fn gives(names: &[&str], steps: Vec<Step>, signals: &[(usize, Signal, Vec<Signal>)]) {
    let (mut task, _received) = task(names, steps);
    for (number, (port, signal, expected)) in signals.iter().enumerate() {
        assert_eq!(after(&mut task, *port, signal), *expected, "signal {number}: {signal:?} on {}", names[*port]);
    }
}

#[test]
fn event_time_is_that_of_the_slowest_input() {
    gives(
        &["a", "b"],
        vec![],
        &[
            (0, Time(10), vec![]),
            (1, Time(5), vec![Time(5)]),
            (1, Time(20), vec![Time(10)]),
            (1, Time(15), vec![]),
            (0, Time(END), vec![Time(20)]),
            (1, Time(END), vec![Time(END)]),
        ],
    );
}

#[test]
fn a_row_meets_the_watermark_of_all_inputs() {
    gives(
        &["a", "b"],
        vec![],
        &[
            (0, rows(&[7], 5), vec![rows(&[7], MIN)]),
            (0, Time(5), vec![]),
            (1, Time(3), vec![Time(3)]),
            (0, rows(&[8, 9], 5), vec![rows(&[8, 9], 3)]),
            (1, rows(&[4], 2), vec![rows(&[4], 2)]),
            (1, Idle(9), vec![Time(5)]),
            (0, rows(&[8], 6), vec![rows(&[8], 6)]),
        ],
    );
}

#[test]
fn an_idle_input_holds_nothing_back_until_it_has_rows_again() {
    gives(
        &["a", "b"],
        vec![],
        &[
            (0, Time(10), vec![]),
            (1, Idle(MIN), vec![Time(10)]),
            (0, Time(30), vec![Time(30)]),
            // Its own time is behind, so nothing moves until it has caught up.
            (1, Time(20), vec![]),
            (0, Time(40), vec![]),
            (1, Time(35), vec![Time(35)]),
        ],
    );
}

#[test]
fn if_all_inputs_are_idle_time_goes_on_and_consumers_hear_of_both_ends() {
    gives(
        &["a", "b", "never"],
        vec![],
        &[
            (0, Time(10), vec![]),
            (1, Time(20), vec![]),
            (2, Idle(MIN), vec![Time(10)]),
            (0, Idle(15), vec![Time(20)]),
            // The one that never had a row has no time that could hold the others.
            (1, Idle(25), vec![Idle(20)]),
            (0, Idle(30), vec![Time(25), Idle(25)]),
            (0, Time(12), vec![Time(25)]),
            (0, Time(13), vec![]),
            (0, Idle(40), vec![Idle(25)]),
            // The rows themselves withdraw it, and a filter may drop them.
            (0, rows(&[50], 40), vec![rows(&[50], 40), Time(25)]),
        ],
    );
}

#[test]
fn an_input_at_its_end_does_not_end_one_that_is_idle() {
    gives(
        &["a", "b"],
        vec![],
        &[
            (0, Time(10), vec![]),
            (1, Time(10), vec![Time(10)]),
            (0, Time(END), vec![]),
            (1, Idle(12), vec![Time(12), Idle(12)]),
            (1, rows(&[14], 10), vec![rows(&[14], 10), Time(12)]),
            (1, Time(END), vec![Time(END)]),
        ],
    );
}

#[test]
fn rows_leave_before_the_watermark_that_closed_them_and_held_ones_hold_it_back() {
    let keeps = || Step { keeps: true, ..Step::default() };
    gives(
        &["a"],
        vec![keeps(), Step::default()],
        &[(0, rows(&[5], MIN), vec![]), (0, Time(5), vec![Time(5)]), (0, Time(6), vec![rows(&[5], MIN), Time(6)])],
    );
    gives(
        &["a"],
        vec![Step { behind_us: Some(10), ..Step::default() }, keeps()],
        &[
            (0, rows(&[80], MIN), vec![]),
            (0, Time(91), vec![Time(80)]),
            (0, Time(92), vec![rows(&[80], MIN), Time(81)]),
        ],
    );
}

#[test]
fn columns_unite_by_name_and_missing_ones_are_null() {
    let united = schema_of([("x", FieldType::String), ("n", FieldType::Int)]);
    let one = unite(&batch(vec![1, 2], vec![0, 0]), &united, &[None, Some(0)]).expect("united");
    assert_eq!(one.json().iter().collect::<Vec<_>>(), [r#"{"x":null,"n":1}"#, r#"{"x":null,"n":2}"#]);
    assert_eq!(one.event_us(), [1, 2]);
}

#[tokio::test]
async fn a_failed_pipeline_drops_and_counts_rows_and_still_answers_checkpoints() {
    let mut input = Outlet::default();
    let (mut task, mut received) = task(&["a"], vec![Step::default()]);
    task.inputs = Inputs::new(vec![input.add(crate::runtime::edge::Takes::Final)]);
    let status = Arc::clone(&task.status);
    let mut output = task.outlet.add(crate::runtime::edge::Takes::Final);
    let barrier = Barrier { checkpoint: 1, last: true };
    for message in [
        Message::Batch(batch(vec![1], vec![0]), 1),
        Message::Batch(batch(vec![13], vec![0]), 2),
        Message::Batch(batch(vec![2, 3], vec![0, 0]), 3),
        Message::Watermark(7),
        Message::Barrier(barrier),
        Message::End,
    ] {
        input.send(message).await;
    }
    task.run().await;
    assert!(matches!(output.recv().await, Some(Message::Batch(batch, 1)) if batch.event_us() == [1]));
    assert!(matches!(output.recv().await, Some(Message::Barrier(one)) if one == barrier));
    assert!(matches!(output.recv().await, Some(Message::End)));
    let Some(Report::Prepared(key, 1, Ok(state))) = received.recv().await else { panic!("no state") };
    assert_eq!(key, "pipeline/p");
    assert!(matches!(status.state(), NodeState::Failed(reason) if reason == "13"));
    assert_eq!(status.dropped_rows.load(Relaxed), 3);
    // What the step made of a part of its rows is not gone on from; the numbers of batches are.
    let (mut after, _received) = self::task(&["a"], vec![Step { watermark_us: 5, ..Step::default() }]);
    after.restore(&state.finish()).expect("a state");
    let mut step = StateWriter::default();
    after.steps[0].snapshot(&mut step);
    assert_eq!((after.number, step.finish()), (1, 5i64.to_le_bytes().to_vec()));
}

#[tokio::test]
async fn a_step_whose_state_cannot_be_written_lets_no_checkpoint_pass() {
    let (mut task, mut received) = task(&["a"], vec![Step { unwritable: true, ..Step::default() }]);
    task.barrier(Barrier { checkpoint: 1, last: false }).await;
    let Some(Report::Prepared(_, 1, Err(error))) = received.recv().await else { panic!("a state") };
    assert_eq!(error.to_string(), "too long");
}

#[tokio::test]
async fn a_restored_pipeline_goes_on_where_the_snapshot_was_taken() {
    let (mut one, mut received) = task(&["a", "b"], vec![Step::default()]);
    for (port, signal) in [(0, rows(&[1], MIN)), (0, Time(10)), (1, Time(20))] {
        after(&mut one, port, &signal);
    }
    one.barrier(Barrier { checkpoint: 3, last: false }).await;
    let Some(Report::Prepared(_, 3, Ok(state))) = received.recv().await else { panic!("no state") };
    let state = state.finish();
    let (mut other, _received) = task(&["a", "b"], vec![Step::default()]);
    other.restore(&state).expect("a state");
    assert_eq!((other.number, other.watermark_us, other.forwarded_us), (1, 10, 10));
    let latest = |task: &PipelineTask| task.live.latest("p").map(|latest| (latest.number, latest.rows));
    assert_eq!(latest(&other).expect("a metric"), (1, vec!["{\"n\":1}".into()]));
    // A checkpoint of before they were kept.
    let latest = Prepared { latest: one.live.freeze("p"), ..Prepared::default() };
    let length = state.len() - latest.finish().len();
    task(&["a", "b"], vec![Step::default()]).0.restore(&state[..length]).expect("a state");
    for (port, signal) in [(0, Time(15)), (1, rows(&[30], 20)), (0, Time(40))] {
        assert_eq!(after(&mut one, port, &signal), after(&mut other, port, &signal), "{signal:?}");
    }
    let (mut turned, _received) = task(&["b", "new", "a"], vec![Step::default()]);
    turned.restore(&state).expect("a state");
    assert_eq!(turned.ports.iter().map(|port| port.watermark_us).collect::<Vec<_>>(), [20, MIN, 10]);
    for cut in (0..state.len()).filter(|cut| *cut != length) {
        assert!(task(&["a", "b"], vec![Step::default()]).0.restore(&state[..cut]).is_err(), "cut to {cut}");
    }
}
