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
        if self.main_ports().all(|port| port.idle_us.is_some()) {
            messages.push(Message::Idle(self.forwarded_us));
        }
        Ok(messages)
    }

    fn main_ports(&self) -> impl Iterator<Item = &Port> {
        self.ports.iter().filter(|port| port.input == 0)
    }

    /// The minimum over the inputs that are not idle; if all are idle, time goes on by itself.
    fn advance(&mut self) -> Result<Vec<Message>> {
        let active = self.main_ports().filter(|port| port.idle_us.is_none()).map(|port| port.watermark_us).min();
        let idle = || self.main_ports().map(|port| port.idle_us.unwrap_or(i64::MIN).max(port.watermark_us)).min();
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
        // After a drain the next run takes rows again: the end is not kept.
        let kept = |time_us: i64| if time_us == i64::MAX { i64::MIN } else { time_us };
        let mut state = StateWriter::default();
        state.u64(self.number);
        state.i64(kept(self.watermark_us));
        state.i64(kept(self.forwarded_us));
        state.u64(self.ports.len() as u64);
        for port in &self.ports {
            state.i64(kept(port.watermark_us));
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
