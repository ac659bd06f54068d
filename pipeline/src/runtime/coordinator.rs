//! Checkpoints and the stop: who is told what, in which order.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tracing::{info, warn};

use super::edge::Barrier;
use super::store::{Checkpoint, Store};
use crate::error::{Error, Result, Retry};

/// A stop takes at most this long; then the process ends without a last checkpoint.
const STOP_DEADLINE: Duration = Duration::from_secs(20);

/// What the coordinator tells a source.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Control {
    /// Put this barrier into the stream.
    Barrier(Barrier),
    /// Let event time reach its end, so that all windows close.
    Close,
}

/// What nodes tell the coordinator. Nodes are named by their key, such as `sink/history`.
#[derive(Debug)]
pub(crate) enum Report {
    /// The node's state at this checkpoint.
    Prepared(String, u64, Result<Vec<u8>>),
    /// A sink has published, or could not publish, what this checkpoint names.
    Committed(String, u64, Result<(), String>),
    /// A source has reached its end or failed for good.
    SourceEnded(String),
    /// The node's task has panicked, with this message.
    Died(String, String),
}

/// Why the graph stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Somebody asked for it.
    Asked,
    /// Every source has reached its end.
    Ended,
}

pub(crate) struct Coordinator {
    pub(crate) store: Store,
    pub(crate) every: Duration,
    /// Number of the next checkpoint.
    pub(crate) next: u64,
    pub(crate) controls: Vec<mpsc::Sender<Control>>,
    pub(crate) commits: HashMap<String, mpsc::Sender<u64>>,
    pub(crate) reports: mpsc::Receiver<Report>,
    /// Every node that answers a barrier, with the fingerprint of its configuration.
    pub(crate) nodes: BTreeMap<String, u64>,
    pub(crate) ended: BTreeSet<String>,
}

impl Coordinator {
    /// Runs until the end of all sources or until `stop` resolves; then stops the graph.
    pub(crate) async fn run(mut self, stop: impl Future<Output = ()>, drain: bool) -> Result<Stopped> {
        let stopped = if drain { Stopped::Ended } else { self.until_stop(stop).await? };
        let last = async {
            if stopped == Stopped::Ended {
                for control in &self.controls {
                    let _ = control.send(Control::Close).await;
                }
            }
            let number = self.begin(true).await;
            self.finish(number).await
        };
        match timeout(STOP_DEADLINE, last).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(error.context("the last checkpoint failed")),
            Err(_) => {
                return Err(Error::outside(format!(
                    "the stop took longer than {} s; the next start goes on from the checkpoint before it",
                    STOP_DEADLINE.as_secs()
                )));
            }
        }
        if stopped == Stopped::Ended && !drain {
            self.store.clear()?;
        }
        Ok(stopped)
    }

    async fn until_stop(&mut self, stop: impl Future<Output = ()>) -> Result<Stopped> {
        let mut timer = interval(self.every);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tokio::pin!(stop);
        loop {
            if self.ended.len() == self.controls.len() {
                return Ok(Stopped::Ended);
            }
            tokio::select! {
                () = &mut stop => return Ok(Stopped::Asked),
                report = self.reports.recv() => self.note(report)?,
                _ = timer.tick() => {
                    let number = self.begin(false).await;
                    // A sink that is blocked blocks the barrier too: a stop must not wait for it. What the nodes
                    // still answer to this checkpoint is then passed over.
                    let finished = tokio::select! {
                        finished = self.finish(number) => finished,
                        () = &mut stop => return Ok(Stopped::Asked),
                    };
                    match finished {
                        Err(error) if error.retry == Retry::Never => return Err(error),
                        Err(error) => warn!("{error}; the next checkpoint tries again"),
                        Ok(()) => {}
                    }
                }
            }
        }
    }

    fn note(&mut self, report: Option<Report>) -> Result<()> {
        match report {
            Some(Report::SourceEnded(key)) => {
                info!("{key} has ended");
                self.ended.insert(key);
            }
            // Without it no checkpoint can be whole: going on would only pretend.
            Some(Report::Died(key, message)) => {
                return Err(Error::internal(format!("{key} has met a mistake in the program: {message}")));
            }
            _ => {}
        }
        Ok(())
    }

    /// Puts the barrier of the next checkpoint into the stream. A source takes it at once or, while it is held
    /// back, later: its queue has room for every barrier that can be on its way.
    async fn begin(&mut self, last: bool) -> u64 {
        let number = self.next;
        self.next += 1;
        for control in &self.controls {
            let _ = control.send(Control::Barrier(Barrier { checkpoint: number, last })).await;
        }
        number
    }

    /// Takes the checkpoint whose barrier is on its way: states to the disk, then staged files into view.
    async fn finish(&mut self, number: u64) -> Result<()> {
        let checkpoint = self.collect(number).await?;
        tokio::task::block_in_place(|| self.store.write(&checkpoint))?;
        for commit in self.commits.values() {
            let _ = commit.send(number).await;
        }
        self.committed(number).await
    }

    /// The states of all nodes at barrier `number`.
    async fn collect(&mut self, number: u64) -> Result<Checkpoint> {
        let mut checkpoint = Checkpoint { number, ..Checkpoint::default() };
        let mut failed = None;
        let mut answered = 0;
        while answered < self.nodes.len() {
            match self.reports.recv().await {
                Some(Report::Prepared(key, of, state)) if of == number => {
                    answered += 1;
                    let fingerprint = self.nodes.get(&key).copied().unwrap_or_default();
                    match state {
                        Ok(state) => {
                            checkpoint.nodes.insert(key, (fingerprint, state));
                        }
                        Err(mut error) => {
                            // The rows are kept, so the next checkpoint may succeed.
                            error.retry = Retry::BackOff;
                            failed = Some(error.context(format!("checkpoint {number}: {key}")));
                        }
                    }
                }
                Some(report) => self.note(Some(report))?,
                None => return Err(Error::internal("all nodes are gone")),
            }
        }
        failed.map_or(Ok(checkpoint), Err)
    }

    async fn committed(&mut self, number: u64) -> Result<()> {
        let mut waiting: BTreeSet<String> = self.commits.keys().cloned().collect();
        while !waiting.is_empty() {
            match self.reports.recv().await {
                Some(Report::Committed(key, of, result)) if of == number => {
                    if let Err(message) = result {
                        warn!("{key}: {message}");
                    }
                    waiting.remove(&key);
                }
                Some(report) => self.note(Some(report))?,
                None => return Err(Error::internal("all nodes are gone")),
            }
        }
        Ok(())
    }
}
