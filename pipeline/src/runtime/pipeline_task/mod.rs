//! The task that runs one pipeline: all its operators, fused, over all its inputs.

use std::convert::Infallible;
#[cfg(test)]
mod tests;

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
