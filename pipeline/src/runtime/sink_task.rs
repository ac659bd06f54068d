//! The task that feeds one sink.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use tokio::sync::mpsc;
use tokio::time::sleep;
use tracing::warn;

use super::back_off::BackOff;
use super::blocking;
use super::coordinator::{Commit, Report};
use super::edge::{Barrier, Event, Inputs};
use super::outbox::Outbox;
use crate::batch::Batch;
use crate::error::{Error, Result, Retry};
use crate::plugin::{LiveSink, StagingSink};
use crate::state::StateWriter;
use crate::status::{NodeState, NodeStatus};

pub(crate) struct SinkTask {
    pub(crate) name: String,
    pub(crate) key: String,
    pub(crate) inputs: Inputs,
    pub(crate) sink: Running,
    pub(crate) status: Arc<NodeStatus>,
    pub(crate) reports: mpsc::Sender<Report>,
    /// Checkpoints that are durable.
    pub(crate) commits: mpsc::Receiver<Commit>,
    /// Number of the last checkpoint, once its barrier has come.
    pub(crate) last: Option<u64>,
}

/// A sink of one of the three kinds.
pub(crate) enum Running {
    Live(Box<dyn LiveSink>),
    Staging(Box<dyn StagingSink>),
    Outbox(Arc<Outbox>),
}

impl SinkTask {
    /// Runs until the inputs have ended and the last checkpoint is committed.
    pub(crate) async fn run(mut self) {
        if !matches!(self.sink, Running::Outbox(_)) {
            self.status.set_state(NodeState::Healthy);
        }
        loop {
            tokio::select! {
                biased;
                commit = self.commits.recv() => match commit {
                    Some(commit) => self.commit(commit).await,
                    // The coordinator has gone: no checkpoint will come any more.
                    None => return,
                },
                event = self.inputs.next() => match event {
                    Event::Batch(input, batch, number) => {
                        self.status.queue.store(self.inputs.queued() as u64, Relaxed);
                        self.write(input, &batch, number).await;
                    }
                    Event::Barrier(barrier) => self.barrier(barrier).await,
                    Event::Watermark(..) | Event::Idle(..) => {}
                    Event::End => break,
                },
            }
        }
        while let Some(commit) = self.commits.recv().await {
            self.commit(commit).await;
        }
    }

    async fn write(&mut self, input: usize, batch: &Batch, number: u64) {
        self.status.rows_in.fetch_add(batch.len() as u64, Relaxed);
        match &mut self.sink {
            Running::Live(sink) => sink.write(input, batch, number),
            Running::Outbox(outbox) => {
                let outbox = Arc::clone(outbox);
                self.put(&outbox, input, batch).await;
            }
            Running::Staging(_) => {
                if !self.stage(input, batch, number).await {
                    return;
                }
            }
        }
        if !matches!(self.sink, Running::Outbox(_)) {
            self.status.rows_out.fetch_add(batch.len() as u64, Relaxed);
        }
    }

    /// Puts rows into an outbox, which may be full for long: the checkpoint before waits for its answer meanwhile, and
    /// with it those of all other nodes.
    async fn put(&mut self, outbox: &Outbox, input: usize, batch: &Batch) {
        loop {
            tokio::select! {
                biased;
                () = outbox.put(input, batch.rows()) => return,
                Some(commit) = self.commits.recv() => self.commit(commit).await,
            }
        }
    }

    /// Writes to a staging sink; whether it took the rows. Nothing may be lost: an error that may pass holds the
    /// stream here until it has.
    async fn stage(&mut self, input: usize, batch: &Batch, number: u64) -> bool {
        let mut back_off = BackOff::new(number);
        loop {
            let Running::Staging(sink) = &mut self.sink else { return false };
            let Err(error) = blocking(|| sink.write(input, batch, number)) else { break };
            self.status.errors.fetch_add(1, Relaxed);
            if error.retry == Retry::Never {
                tracing::error!(sink = %self.name, "{error}; {} rows are lost", batch.len());
                self.status.dropped_rows.fetch_add(batch.len() as u64, Relaxed);
                self.status.set_state(NodeState::Failed(error.to_string()));
                return false;
            }
            let wait = back_off.wait();
            warn!(sink = %self.name, "{error}; trying again in {:.1} s", wait.as_secs_f64());
            self.status.set_state(NodeState::Retrying(error.to_string()));
            // The checkpoint before waits for its answer, and with it those of all other nodes.
            tokio::select! {
                () = sleep(wait) => {}
                Some(commit) = self.commits.recv() => self.commit(commit).await,
            }
        }
        self.healthy_again();
        true
    }

    async fn barrier(&mut self, barrier: Barrier) {
        let mut state = StateWriter::default();
        let prepared: Result<()> = match &mut self.sink {
            Running::Live(_) => Ok(()),
            Running::Staging(sink) => blocking(|| sink.prepare(barrier.checkpoint, barrier.last, &mut state)),
            Running::Outbox(outbox) => {
                if barrier.last && !outbox.is_exactly_once() {
                    outbox.drain().await;
                }
                blocking(|| outbox.prepare(barrier.checkpoint, &mut state))
            }
        };
        self.last = barrier.last.then_some(barrier.checkpoint);
        if let (Running::Outbox(_), Err(error)) = (&self.sink, &prepared)
            && error.retry == Retry::Never
        {
            let error = Error::outside(error.to_string()).fatal();
            let _ = self.reports.send(Report::Lost(self.key.clone(), error)).await;
            return;
        }
        if let (Running::Staging(_), Err(error)) = (&self.sink, &prepared) {
            self.status.errors.fetch_add(1, Relaxed);
            // While a disk is full, every checkpoint fails in the same way: once is enough.
            if !matches!(self.status.state(), NodeState::Retrying(_)) {
                warn!(sink = %self.name, "checkpoint {}: {error}; the rows are kept for the next one", barrier.checkpoint);
            }
            self.status.set_state(NodeState::Retrying(error.to_string()));
        }
        let state = prepared.map(|()| state.finish().into());
        let _ = self.reports.send(Report::Prepared(self.key.clone(), barrier.checkpoint, state)).await;
    }

    fn healthy_again(&self) {
        if matches!(self.status.state(), NodeState::Retrying(_)) {
            self.status.set_state(NodeState::Healthy);
        }
    }

    async fn commit(&mut self, Commit { checkpoint, oldest_kept }: Commit) {
        let result = match &mut self.sink {
            Running::Outbox(outbox) => {
                let committed = blocking(|| outbox.commit(checkpoint, oldest_kept));
                if self.last == Some(checkpoint) && outbox.is_exactly_once() {
                    outbox.drain().await;
                }
                if let Err(error) = committed {
                    // It only takes room; the next commit removes it too.
                    warn!(sink = %self.name, "{error}");
                }
                Ok(())
            }
            Running::Staging(sink) => blocking(|| sink.commit(checkpoint, oldest_kept)),
            Running::Live(_) => Ok(()),
        };
        match &result {
            Ok(()) if matches!(self.sink, Running::Outbox(_)) => {}
            Ok(()) => self.healthy_again(),
            Err(error) => {
                self.status.errors.fetch_add(1, Relaxed);
                let never = error.retry == Retry::Never;
                let state = if never { NodeState::Failed } else { NodeState::Retrying };
                self.status.set_state(state(error.to_string()));
            }
        }
        let committed = result.map_err(|error: Error| error.to_string());
        let _ = self.reports.send(Report::Committed(self.key.clone(), checkpoint, committed)).await;
    }
}
