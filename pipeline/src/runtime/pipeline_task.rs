//! The task that runs one pipeline: all its operators, fused, over all its inputs.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use arrow::array::{Int64Array, RecordBatch, RecordBatchOptions, new_null_array};
use arrow::datatypes::SchemaRef;
use tokio::sync::mpsc;

use super::coordinator::{Prepared, Report};
use super::edge::{Barrier, Event, Inputs, Message, Outlet};
use crate::batch::{Batch, Stage, Times};
use crate::error::{Error, Result};
use crate::live::Live;
use crate::plugin::{Operator, Output};
use crate::state::{StateReader, StateWriter};
use crate::status::{NodeState, NodeStatus};

pub(crate) struct PipelineTask {
    pub(crate) name: String,
    pub(crate) key: String,
    pub(crate) inputs: Inputs,
    pub(crate) ports: Vec<Port>,
    pub(crate) steps: Vec<Box<dyn Operator>>,
    pub(crate) outlet: Outlet,
    pub(crate) live: Arc<Live>,
    pub(crate) status: Arc<NodeStatus>,
    pub(crate) reports: mpsc::Sender<Report>,
    /// Output batches so far, through restarts.
    pub(crate) number: u64,
    /// The watermark given to the first step.
    pub(crate) watermark_us: i64,
    /// The watermark given to the consumers.
    pub(crate) forwarded_us: i64,
    /// Whether the consumers were told that no row is to be waited for.
    pub(crate) told_idle: bool,
    pub(crate) failed: bool,
    /// Rows so far for which an expression failed.
    pub(crate) failed_rows: u64,
    /// Length of the last state.
    pub(crate) state_bytes: usize,
}

/// One input of the pipeline.
pub(crate) struct Port {
    /// Name of the source or pipeline that it reads: inputs may stand in another order in the next run.
    pub(crate) from: String,
    pub(crate) step: usize,
    pub(crate) input: usize,
    pub(crate) unite: Option<(SchemaRef, Vec<Option<usize>>)>,
    pub(crate) watermark_us: i64,
    /// Set while the input is idle: how far its own clock has gone on.
    pub(crate) idle_us: Option<i64>,
}

impl PipelineTask {
    pub(crate) async fn run(mut self) {
        self.status.set_state(NodeState::Healthy);
        loop {
            let event = self.inputs.next().await;
            self.status.queue.store(self.inputs.queued() as u64, Relaxed);
            let rows = if let Event::Batch(_, batch, _) = &event { batch.len() as u64 } else { 0 };
            let result = match event {
                Event::Batch(port, batch, _) if !self.failed => self.batch(port, batch),
                Event::Watermark(port, time) if !self.failed => self.port_watermark(port, time),
                Event::Idle(port, time) if !self.failed => self.port_idle(port, time),
                Event::Batch(..) => {
                    self.status.dropped_rows.fetch_add(rows, Relaxed);
                    Ok(Vec::new())
                }
                Event::Watermark(..) | Event::Idle(..) => Ok(Vec::new()),
                Event::Barrier(barrier) => {
                    self.barrier(barrier).await;
                    Ok(Vec::new())
                }
                Event::End => {
                    self.outlet.send(Message::End).await;
                    return;
                }
            };
            match result {
                Ok(messages) => self.send(messages).await,
                Err(error) => {
                    tracing::error!(pipeline = %self.name, "{error}; this pipeline stops, the others go on");
                    self.status.errors.fetch_add(1, Relaxed);
                    self.status.dropped_rows.fetch_add(rows, Relaxed);
                    self.status.set_state(NodeState::Failed(error.to_string()));
                    self.failed = true;
                }
            }
        }
    }

    async fn send(&mut self, messages: Vec<Message>) {
        for message in messages {
            let rows = if let Message::Batch(batch, _) = &message { batch.len() as u64 } else { 0 };
            let refused = self.outlet.send(message).await;
            self.status.dropped_rows.fetch_add(refused * rows, Relaxed);
        }
    }

    fn batch(&mut self, port: usize, batch: Batch) -> Result<Vec<Message>> {
        let count = batch.len() as u64;
        let (step, input) = (self.ports[port].step, self.ports[port].input);
        self.ports[port].idle_us = None;
        let batch = match &self.ports[port].unite {
            Some((schema, columns)) => unite(&batch, schema, columns)?,
            None => batch,
        };
        let batch = if input == 0 { self.cap_watermarks(port, batch)? } else { batch };
        let mut messages = Vec::new();
        self.through(step, input, batch, &mut messages)?;
        self.count_lost();
        // After what came of them: whoever sees these rows counted sees their late ones counted too.
        self.status.rows_in.fetch_add(count, Relaxed);
        self.withdraw_idle(&mut messages);
        Ok(messages)
    }

    /// With several inputs a row meets the watermark of all of them, not just that of its own source.
    fn cap_watermarks(&self, port: usize, batch: Batch) -> Result<Batch> {
        let others = self.ports.iter().enumerate().filter(|(index, other)| *index != port && other.input == 0);
        let Some(cap) = others.filter(|(_, other)| other.idle_us.is_none()).map(|(_, other)| other.watermark_us).min()
        else {
            return Ok(batch);
        };
        let times = batch.times();
        let capped = Int64Array::from_iter_values(times.watermark_us.values().iter().map(|w| (*w).min(cap)));
        let times = Times { watermark_us: capped, ..times.clone() };
        Batch::new(batch.rows().clone(), times, batch.stage())
    }

    /// Runs a batch through the steps from `first` on and numbers what comes out.
    fn through(&mut self, first: usize, input: usize, batch: Batch, messages: &mut Vec<Message>) -> Result<()> {
        let mut batches = vec![batch];
        let mut out = Output::default();
        for (offset, step) in self.steps[first..].iter_mut().enumerate() {
            let input = if offset == 0 { input } else { 0 };
            for batch in batches {
                if step.is_stateful() && batch.stage() != Stage::Final {
                    self.status.dropped_rows.fetch_add(batch.len() as u64, Relaxed);
                    continue;
                }
                step.process(input, batch, &mut out)?;
            }
            batches = out.take();
        }
        for batch in batches {
            self.number += 1;
            self.status.rows_out.fetch_add(batch.len() as u64, Relaxed);
            self.status.batches_out.fetch_add(1, Relaxed);
            if let Some(newest) = batch.event_us().iter().max() {
                self.status.event_us.fetch_max(*newest, Relaxed);
            }
            self.live.update(&self.name, &batch, self.number);
            messages.push(Message::Batch(batch, self.number));
        }
        Ok(())
    }

    fn port_watermark(&mut self, port: usize, time_us: i64) -> Result<Vec<Message>> {
        let port = &mut self.ports[port];
        port.watermark_us = port.watermark_us.max(time_us);
        port.idle_us = None;
        let mut messages = self.advance()?;
        self.withdraw_idle(&mut messages);
        Ok(messages)
    }

    fn port_idle(&mut self, port: usize, time_us: i64) -> Result<Vec<Message>> {
        self.ports[port].idle_us = Some(time_us);
        let mut messages = self.advance()?;
        if self.is_idle() {
            self.told_idle = true;
            messages.push(Message::Idle(self.forwarded_us));
        }
        Ok(messages)
    }

    /// Rows are to be waited for again: else a consumer of several pipelines would go on without this one.
    fn withdraw_idle(&mut self, messages: &mut Vec<Message>) {
        if self.told_idle && !self.is_idle() {
            self.told_idle = false;
            messages.push(Message::Watermark(self.forwarded_us));
        }
    }

    /// Whether every input that has not ended is idle.
    fn is_idle(&self) -> bool {
        let mut open = self.open_ports().peekable();
        open.peek().is_some() && open.all(|port| port.idle_us.is_some())
    }

    /// The ports of the first step that have not ended.
    fn open_ports(&self) -> impl Iterator<Item = &Port> {
        self.ports.iter().filter(|port| port.input == 0 && port.watermark_us < i64::MAX)
    }

    /// How far event time is: the minimum over the inputs that are neither idle nor at their end. If the others are
    /// all idle, time goes on by itself, as far as those let it that ever had a row. If all are at their end, so is time.
    fn reached(&self) -> Option<i64> {
        if self.open_ports().next().is_none() {
            return Some(i64::MAX);
        }
        if let Some(time_us) = self.open_ports().filter(|port| port.idle_us.is_none()).map(|p| p.watermark_us).min() {
            return Some(time_us);
        }
        let idle = self.open_ports().filter_map(|port| Some(port.idle_us?.max(port.watermark_us)));
        idle.filter(|time_us| *time_us > i64::MIN).min()
    }

    fn advance(&mut self) -> Result<Vec<Message>> {
        let Some(time_us) = self.reached().filter(|time| *time > self.watermark_us) else {
            return Ok(Vec::new());
        };
        self.watermark_us = time_us;
        let mut messages = Vec::new();
        let mut time_us = time_us;
        for index in 0..self.steps.len() {
            let mut out = Output::default();
            self.steps[index].watermark(time_us, &mut out)?;
            for batch in out.take() {
                self.through(index + 1, 0, batch, &mut messages)?;
            }
            if let Some(held) = self.steps[index].holds_back_us() {
                time_us = time_us.min(held.saturating_sub(1));
            }
        }
        self.count_lost();
        if time_us > self.forwarded_us {
            self.forwarded_us = time_us;
            messages.push(Message::Watermark(time_us));
        }
        Ok(messages)
    }

    fn count_lost(&mut self) {
        let late = self.steps.iter().map(|step| step.late_rows()).sum();
        self.status.late_rows.store(late, Relaxed);
        let failed: u64 = self.steps.iter().map(|step| step.failed_rows()).sum();
        self.status.errors.fetch_add(failed.saturating_sub(self.failed_rows), Relaxed);
        if failed > 0 && self.failed_rows == 0 {
            tracing::warn!(pipeline = %self.name, "an expression fails for some rows; its value is null there");
        }
        self.failed_rows = failed;
    }

    async fn barrier(&mut self, barrier: Barrier) {
        // After a drain the next run takes rows again: the end is not kept.
        let kept = |time_us: i64| if time_us == i64::MAX { i64::MIN } else { time_us };
        // The stream waits meanwhile: memory is asked for once.
        let mut state = StateWriter::with_capacity(self.state_bytes + self.state_bytes / 8);
        state.u64(self.number);
        state.i64(kept(self.watermark_us));
        state.i64(kept(self.forwarded_us));
        state.u64(self.ports.len() as u64);
        for port in &self.ports {
            state.str(&port.from);
            state.i64(kept(port.watermark_us));
        }
        // After a failure in the middle of a batch the steps hold a part of it: nobody may go on from that.
        let steps = if self.failed { &[] } else { self.steps.as_slice() };
        state.u64(steps.len() as u64);
        for step in steps {
            let Ok(()) = state.nested(|state| {
                step.snapshot(state);
                Ok::<(), Infallible>(())
            });
        }
        self.state_bytes = state.len();
        let prepared = match state.failure() {
            Some(failure) => Err(Error::internal(failure)),
            None => Ok(Prepared { state: state.finish(), latest: self.live.freeze(&self.name), ..Prepared::default() }),
        };
        let _ = self.reports.send(Report::Prepared(self.key.clone(), barrier.checkpoint, prepared)).await;
        self.outlet.send(Message::Barrier(barrier)).await;
    }

    /// Takes over the state of a checkpoint that the same steps wrote.
    pub(crate) fn restore(&mut self, state: &[u8]) -> Result<()> {
        let mut state = StateReader::new(state);
        self.number = state.u64()?;
        self.watermark_us = state.i64()?;
        self.forwarded_us = state.i64()?;
        let ports = state.count()?;
        for _ in 0..ports {
            let (from, time_us) = (state.str()?, state.i64()?);
            // Other inputs may feed the same steps after a change of the YAML; they start with no watermark.
            self.ports.iter_mut().filter(|port| port.from == from).for_each(|port| port.watermark_us = time_us);
        }
        let steps = state.count()?;
        if steps < self.steps.len() {
            tracing::warn!(
                pipeline = %self.name,
                "it had failed before the last checkpoint: it starts anew; its open windows are lost, and so are the rows \
                 that came after the failure"
            );
        }
        for index in 0..steps {
            let bytes = state.bytes()?;
            if let Some(step) = self.steps.get_mut(index) {
                step.restore(&mut StateReader::new(bytes))?;
            }
        }
        // Checkpoints of earlier versions end here.
        if state.is_empty() { Ok(()) } else { self.live.restore(&self.name, &mut state) }
    }
}

/// The columns of one of several inputs in the order of the united schema; missing ones are null.
fn unite(batch: &Batch, schema: &SchemaRef, columns: &[Option<usize>]) -> Result<Batch> {
    let rows = batch.rows();
    let arrays = columns.iter().zip(schema.fields()).map(|(column, field)| match column {
        Some(index) => Arc::clone(rows.column(*index)),
        None => new_null_array(field.data_type(), rows.num_rows()),
    });
    let options = RecordBatchOptions::new().with_row_count(Some(rows.num_rows()));
    batch.with_rows(RecordBatch::try_new_with_options(Arc::clone(schema), arrays.collect(), &options)?)
}

#[cfg(test)]
mod tests {
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
        task.inputs = Inputs::new(vec![input.add(super::super::edge::Takes::Final)]);
        let status = Arc::clone(&task.status);
        let mut output = task.outlet.add(super::super::edge::Takes::Final);
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
}
