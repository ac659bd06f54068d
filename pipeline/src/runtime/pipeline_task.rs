//! The task that runs one pipeline: all its operators, fused, over all its inputs.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use arrow::array::{Int64Array, RecordBatch, RecordBatchOptions, new_null_array};
use arrow::datatypes::SchemaRef;
use tokio::sync::mpsc;

use super::coordinator::Report;
use super::edge::{Barrier, Event, Inputs, Message, Outlet};
use crate::batch::{Batch, Stage, Times};
use crate::error::Result;
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
    pub(crate) failed: bool,
    /// Rows so far for which an expression failed.
    pub(crate) failed_rows: u64,
}

/// One input of the pipeline.
pub(crate) struct Port {
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
            let result = match event {
                Event::Batch(port, batch, _) if !self.failed => self.batch(port, batch),
                Event::Watermark(port, time) if !self.failed => self.port_watermark(port, time),
                Event::Idle(port, time) if !self.failed => self.port_idle(port, time),
                Event::Batch(_, batch, _) => {
                    self.status.dropped_rows.fetch_add(batch.len() as u64, Relaxed);
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
        self.status.rows_in.fetch_add(batch.len() as u64, Relaxed);
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
        self.advance()
    }

    fn port_idle(&mut self, port: usize, time_us: i64) -> Result<Vec<Message>> {
        self.ports[port].idle_us = Some(time_us);
        let mut messages = self.advance()?;
        if self.from_ports().all(|port| port.idle_us.is_some()) {
            messages.push(Message::Idle(self.forwarded_us));
        }
        Ok(messages)
    }

    fn from_ports(&self) -> impl Iterator<Item = &Port> {
        self.ports.iter().filter(|port| port.input == 0)
    }

    /// The minimum over the inputs that are not idle; if all are idle, time goes on by itself.
    fn advance(&mut self) -> Result<Vec<Message>> {
        let active = self.from_ports().filter(|port| port.idle_us.is_none()).map(|port| port.watermark_us).min();
        let idle = || self.from_ports().map(|port| port.idle_us.unwrap_or(i64::MIN).max(port.watermark_us)).min();
        let Some(time_us) = active.or_else(idle).filter(|time| *time > self.watermark_us) else {
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
        let mut state = StateWriter::default();
        state.u64(self.number);
        state.i64(self.watermark_us);
        state.i64(self.forwarded_us);
        state.u64(self.ports.len() as u64);
        for port in &self.ports {
            state.i64(port.watermark_us);
        }
        state.u64(self.steps.len() as u64);
        for step in &self.steps {
            let mut inner = StateWriter::default();
            step.snapshot(&mut inner);
            state.bytes(&inner.finish());
        }
        let _ = self.reports.send(Report::Prepared(self.key.clone(), barrier.checkpoint, Ok(state.finish()))).await;
        self.outlet.send(Message::Barrier(barrier)).await;
    }

    /// Takes over the state of a checkpoint that the same steps wrote.
    pub(crate) fn restore(&mut self, state: &[u8]) -> Result<()> {
        let mut state = StateReader::new(state);
        self.number = state.u64()?;
        self.watermark_us = state.i64()?;
        self.forwarded_us = state.i64()?;
        let ports = state.count()?;
        let watermarks: Vec<i64> = (0..ports).map(|_| state.i64()).collect::<Result<_>>()?;
        // Other inputs may feed the same steps after a change of the YAML; they start with no watermark.
        if ports == self.ports.len() {
            self.ports.iter_mut().zip(watermarks).for_each(|(port, time)| port.watermark_us = time);
        }
        let steps = state.count()?;
        for index in 0..steps {
            let bytes = state.bytes()?;
            if let Some(step) = self.steps.get_mut(index) {
                step.restore(&mut StateReader::new(bytes))?;
            }
        }
        Ok(())
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
    use std::sync::Mutex;

    use arrow::array::{Int64Array, StringArray};

    use super::*;
    use crate::error::Error;
    use crate::json::encode_rows;
    use crate::runtime::edge::Takes;
    use crate::schema::{FieldType, schema_of};
    use crate::status::{NodeKind, Status, lock};

    const MIN: i64 = i64::MIN;

    /// Passes rows on, counts them, and notes what it is told.
    #[derive(Default)]
    struct Fake {
        told: Arc<Mutex<Vec<String>>>,
        rows: u64,
        holds_back_us: Option<i64>,
        fails: bool,
        stateful: bool,
        /// Emits the rows of the last batch again at a watermark.
        at_watermark: Option<Batch>,
    }

    impl Operator for Fake {
        fn process(&mut self, input: usize, batch: Batch, out: &mut Output) -> Result<()> {
            if self.fails {
                return Err(Error::internal("broken"));
            }
            lock(&self.told).push(format!("input {input}: {:?}", batch.watermark_us()));
            self.rows += batch.len() as u64;
            out.push(batch);
            Ok(())
        }
        fn watermark(&mut self, time_us: i64, out: &mut Output) -> Result<()> {
            lock(&self.told).push(format!("time {time_us}"));
            self.at_watermark.take().into_iter().for_each(|batch| out.push(batch));
            Ok(())
        }
        fn holds_back_us(&self) -> Option<i64> {
            self.holds_back_us
        }
        fn is_stateful(&self) -> bool {
            self.stateful
        }
        fn snapshot(&self, state: &mut StateWriter) {
            state.u64(self.rows);
        }
        fn restore(&mut self, state: &mut StateReader<'_>) -> Result<()> {
            self.rows = state.u64()?;
            lock(&self.told).push(format!("restored {} rows", self.rows));
            Ok(())
        }
    }

    fn port(step: usize, input: usize) -> Port {
        Port { step, input, unite: None, watermark_us: MIN, idle_us: None }
    }

    /// A task with these ports and steps, and where its reports go.
    fn task(ports: Vec<Port>, steps: Vec<Fake>) -> (PipelineTask, mpsc::Receiver<Report>) {
        let (reports, received) = mpsc::channel(4);
        let status = Arc::new(Status::default());
        let task = PipelineTask {
            name: "load".to_owned(),
            key: "pipeline/load".to_owned(),
            inputs: Inputs::new(Vec::new()),
            ports,
            steps: steps.into_iter().map(|step| Box::new(step) as Box<dyn Operator>).collect(),
            outlet: Outlet::default(),
            status: status.node(NodeKind::Pipeline, "load", ""),
            live: Arc::new(Live::new("e".to_owned(), status, [])),
            reports,
            number: 0,
            watermark_us: MIN,
            forwarded_us: MIN,
            failed: false,
            failed_rows: 0,
        };
        (task, received)
    }

    fn batch(watermarks: &[i64], stage: Stage) -> Batch {
        let count = watermarks.len();
        let column = Int64Array::from_iter_values(0..count as i64);
        let rows = RecordBatch::try_new(schema_of([("a", FieldType::Int)]), vec![Arc::new(column)]).expect("rows");
        let times = Times { watermark_us: watermarks.to_vec().into(), ..Times::constant(5, 6, MIN, count) };
        Batch::new(rows, times, stage).expect("a batch")
    }

    fn shown(messages: Vec<Message>) -> Vec<String> {
        let show = |message| match message {
            Message::Batch(batch, number) => format!("batch {number} of {}", batch.len()),
            Message::Watermark(time) => format!("watermark {time}"),
            Message::Idle(time) => format!("idle {time}"),
            Message::Barrier(barrier) => format!("barrier {}", barrier.checkpoint),
            Message::End => "end".to_owned(),
        };
        messages.into_iter().map(show).collect()
    }

    /// What an input tells of time.
    #[derive(Clone, Copy)]
    enum Told {
        Time(usize, i64),
        Idle(usize, i64),
        Rows(usize),
    }

    #[test]
    fn time_is_the_least_of_the_inputs_that_are_not_idle() {
        use Told::{Idle, Rows, Time};
        for (case, told, expected) in [
            ("the minimum", vec![Time(0, 10), Time(1, 5), Time(1, 20)], vec!["watermark 5", "watermark 10"]),
            ("never back", vec![Time(0, 10), Time(1, 10), Time(0, 3), Time(1, 10)], vec!["watermark 10"]),
            ("an idle input does not hold it", vec![Idle(1, 0), Time(0, 7)], vec!["watermark 7"]),
            ("nor one that falls idle later", vec![Time(0, 7), Time(1, 3), Idle(1, 4)], {
                vec!["watermark 3", "watermark 7"]
            }),
            ("an input with rows again holds it", vec![Idle(1, 0), Time(0, 7), Rows(1), Time(0, 9)], {
                vec!["watermark 7", "batch 1 of 1"]
            }),
            ("all idle: time goes on by itself", vec![Time(0, 7), Time(1, 3), Idle(0, 50), Idle(1, 40)], {
                vec!["watermark 3", "watermark 40", "idle 40"]
            }),
            ("idle before any row", vec![Idle(0, MIN), Idle(1, MIN)], vec!["idle -9223372036854775808"]),
            ("a joined table gives no time", vec![Time(2, 1), Time(0, 7), Time(1, 8)], vec!["watermark 7"]),
        ] {
            let (mut task, _reports) = task(vec![port(0, 0), port(0, 0), port(0, 1)], vec![Fake::default()]);
            let mut messages = Vec::new();
            for told in told {
                messages.extend(match told {
                    Time(port, time) => task.port_watermark(port, time).expect(case),
                    Idle(port, time) => task.port_idle(port, time).expect(case),
                    Rows(port) => task.batch(port, batch(&[0], Stage::Final)).expect(case),
                });
            }
            assert_eq!(shown(messages), expected, "{case}");
        }
    }

    #[test]
    fn a_row_meets_the_time_of_all_inputs_and_not_just_of_its_own() {
        for (case, other, idle, input, expected) in [
            ("the other is behind", 4, false, 0, [1, 4, 4]),
            ("the other is ahead", 99, false, 0, [1, 5, 9]),
            ("the other has no row yet", MIN, false, 0, [MIN; 3]),
            ("the other is idle", 4, true, 0, [1, 5, 9]),
            ("rows of a joined table", 4, false, 1, [1, 5, 9]),
        ] {
            let fake = Fake::default();
            let told = Arc::clone(&fake.told);
            let (mut task, _reports) = task(vec![port(0, input), port(0, 0)], vec![fake]);
            task.ports[1].watermark_us = other;
            task.ports[1].idle_us = idle.then_some(0);
            task.batch(0, batch(&[1, 5, 9], Stage::Final)).expect(case);
            assert_eq!(*lock(&told), [format!("input {input}: {expected:?}")], "{case}");
        }
    }

    #[test]
    fn later_steps_and_consumers_stay_before_the_rows_that_a_step_holds_back() {
        let last = Fake::default();
        let told = Arc::clone(&last.told);
        let holding =
            Fake { holds_back_us: Some(8), at_watermark: Some(batch(&[2, 2], Stage::Final)), ..Fake::default() };
        let (mut task, _reports) = task(vec![port(0, 0)], vec![holding, last]);
        let messages = task.port_watermark(0, 10).expect("time");
        assert_eq!(shown(messages), ["batch 1 of 2", "watermark 7"], "rows go before the time that made them");
        assert_eq!(*lock(&told), ["input 0: [2, 2]", "time 7"]);
        assert!(task.port_watermark(0, 12).expect("time").is_empty(), "still held back");
    }

    #[test]
    fn a_stateful_step_sees_final_rows_only_and_the_others_are_counted() {
        for (stage, passed) in [(Stage::Final, 1), (Stage::Partial, 0), (Stage::Revised, 0)] {
            let (mut task, _reports) =
                task(vec![port(0, 0)], vec![Fake::default(), Fake { stateful: true, ..Fake::default() }]);
            let messages = task.batch(0, batch(&[0, 0, 0], stage)).expect("rows");
            assert_eq!(messages.len(), passed, "{stage:?}");
            assert_eq!(task.status.dropped_rows.load(Relaxed), if passed == 1 { 0 } else { 3 }, "{stage:?}");
        }
    }

    #[test]
    fn inputs_are_united_by_name_with_null_where_a_column_is_missing() {
        let schema = schema_of([("b", FieldType::String), ("a", FieldType::Int)]);
        let names = StringArray::from(vec!["x"]);
        let other = RecordBatch::try_new(schema_of([("b", FieldType::String)]), vec![Arc::new(names)]).expect("rows");
        let other = Batch::new(other, Times::constant(1, 2, 3, 1), Stage::Revised).expect("a batch");
        for (given, columns, expected) in [
            (batch(&[3], Stage::Final), [None, Some(0)], r#"{"b":null,"a":0}"#),
            (other, [Some(0), None], r#"{"b":"x","a":null}"#),
            (batch(&[3], Stage::Partial), [None, None], r#"{"b":null,"a":null}"#),
        ] {
            let united = unite(&given, &schema, &columns).expect("rows");
            assert_eq!(encode_rows(united.rows()).iter().collect::<Vec<_>>(), [expected]);
            assert_eq!((united.stage(), united.watermark_us()), (given.stage(), given.watermark_us()));
        }
    }

    #[tokio::test]
    async fn a_step_that_fails_stops_its_pipeline_and_lets_barriers_and_the_end_pass() {
        let (mut task, mut reports) = task(vec![port(0, 0)], vec![Fake { fails: true, ..Fake::default() }]);
        let mut source = Outlet::default();
        task.inputs = Inputs::new(vec![source.add(Takes::All)]);
        let mut consumer = task.outlet.add(Takes::All);
        let status = Arc::clone(&task.status);
        for message in [
            Message::Batch(batch(&[0], Stage::Final), 1),
            Message::Watermark(10),
            Message::Batch(batch(&[0, 0], Stage::Final), 2),
            Message::Barrier(Barrier { checkpoint: 3, last: true }),
            Message::End,
        ] {
            source.send(message).await;
        }
        task.run().await;
        let mut seen = Vec::new();
        while let Some(message) = consumer.recv().await {
            seen.push(message);
        }
        assert_eq!(shown(seen), ["barrier 3", "end"]);
        assert_eq!(status.state(), NodeState::Failed("broken".to_owned()));
        assert_eq!(status.dropped_rows.load(Relaxed), 2, "rows after the failure");
        assert!(matches!(reports.recv().await, Some(Report::Prepared(key, 3, Ok(_))) if key == "pipeline/load"));
    }

    #[tokio::test]
    async fn a_restored_pipeline_goes_on_where_its_checkpoint_was() {
        let ports = || vec![port(0, 0), port(0, 0)];
        let (mut before, mut reports) = task(ports(), vec![Fake::default(), Fake::default()]);
        before.port_watermark(0, 20).expect("time");
        before.port_watermark(1, 10).expect("time");
        before.batch(0, batch(&[0, 0], Stage::Final)).expect("rows");
        before.barrier(Barrier { checkpoint: 1, last: false }).await;
        let Some(Report::Prepared(_, 1, Ok(state))) = reports.recv().await else { panic!("no state") };

        for (case, ports, expected) in [
            ("the same inputs", ports(), vec!["watermark 15"]),
            ("an input more, which has no time yet", vec![port(0, 0), port(0, 0), port(0, 0)], vec![]),
        ] {
            let steps = [Fake::default(), Fake::default()];
            let told = steps.each_ref().map(|step| Arc::clone(&step.told));
            let (mut after, _reports) = task(ports, steps.into());
            after.restore(&state).expect(case);
            assert!(told.iter().all(|told| *lock(told) == ["restored 2 rows"]), "{case}");
            assert!(after.port_watermark(0, 5).expect(case).is_empty(), "{case}");
            assert_eq!(shown(after.port_watermark(1, 15).expect(case)), expected, "{case}");
            let messages = after.batch(0, batch(&[0], Stage::Final)).expect(case);
            assert_eq!(shown(messages), ["batch 2 of 1"], "{case}: numbers go on");
            for end in 0..state.len() {
                let (mut damaged, _reports) = task(vec![port(0, 0)], vec![Fake::default(), Fake::default()]);
                assert!(damaged.restore(&state[..end]).is_err(), "{end} of {} bytes", state.len());
            }
        }
    }
}
