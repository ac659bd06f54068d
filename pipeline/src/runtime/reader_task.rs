//! The task that owns a source's connection: connects, reads, and connects again.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{info, warn};

use super::back_off::BackOff;
use super::queue::{Sender, room};
use crate::error::{Error, Retry};
use crate::plugin::{Acknowledger, PullReader, Pulled, PushReader, Reader, Record, Schedule, Source};
use crate::status::{NodeState, NodeStatus};

/// Arrivals that wait between the connection and the graph, beside the queue's bound on rows: what is received but
/// not yet taken in. Beyond it the source is not polled.
pub(crate) const ARRIVALS_MAX: usize = 32;

/// A connection that lived this long was a good one: the next failure starts with the shortest wait again.
const GOOD_CONNECTION: Duration = Duration::from_secs(5);

/// For this long after its start, a source that is not connected is no more than news: what it reads may be made by the
/// graph itself (a broker inside the process, a table that a sink creates), or by a server that starts beside it.
const STARTING: Duration = Duration::from_secs(5);

/// What the connection hands to the graph.
pub(crate) enum Arrival {
    /// A new connection; acknowledgements go here from now on.
    Connected(Option<Link>),
    /// The connection is lost.
    Disconnected,
    /// Rows of a pull source.
    Rows(Pulled),
    /// Records of a push source.
    Records(Vec<Record>),
    /// Nobody wants the rows: the source waits.
    Unwanted,
    /// A bounded source has reached its end.
    Ended,
    /// The source has failed for good.
    Failed,
}

/// The engine's way back to the sender of records.
pub(crate) struct Link {
    pub(crate) acknowledger: Box<dyn Acknowledger>,
    /// Tells the reader that the connection is of no use any more: acknowledging failed.
    pub(crate) broken: oneshot::Sender<()>,
}

pub(crate) struct ReaderTask {
    pub(crate) source: Box<dyn Source>,
    pub(crate) schedule: Schedule,
    pub(crate) position: Option<Vec<u8>>,
    pub(crate) arrivals: Sender<Arrival>,
    pub(crate) wanted: watch::Receiver<bool>,
    pub(crate) status: Arc<NodeStatus>,
    /// Dropped after the first try to connect, for which the deliveries of the sinks wait.
    pub(crate) trying: Option<watch::Sender<()>>,
}

/// Why reading stopped.
enum Stop {
    /// The graph is gone.
    Closed,
    /// The end of a bounded source.
    End,
    Error(Error),
}

impl ReaderTask {
    /// Runs until the source ends, fails for good, or the receiver of arrivals is dropped.
    pub(crate) async fn run(mut self) {
        let arrivals = self.arrivals.clone();
        tokio::select! {
            () = arrivals.closed() => {}
            () = self.connect_and_read() => {}
        }
        self.source.close().await;
    }

    async fn connect_and_read(&mut self) {
        let mut back_off = BackOff::new(crate::time::now_us() as u64 ^ self.status.name.len() as u64);
        let started = Instant::now();
        loop {
            let connected = self.source.connect(self.position.as_deref()).await;
            self.trying = None;
            let error = match connected {
                Ok(reader) => {
                    info!(source = %self.status.name, "connected");
                    self.status.set_state(NodeState::Healthy);
                    let since = Instant::now();
                    match self.read(reader).await {
                        Stop::Closed => return,
                        Stop::End => {
                            self.status.set_state(NodeState::Ended);
                            let _ = self.arrivals.send(Arrival::Ended, 0).await;
                            return;
                        }
                        Stop::Error(error) => {
                            if since.elapsed() > GOOD_CONNECTION {
                                back_off.reset();
                            }
                            let _ = self.arrivals.send(Arrival::Disconnected, 0).await;
                            error
                        }
                    }
                }
                Err(error) => error,
            };
            self.status.errors.fetch_add(1, Relaxed);
            if error.retry == Retry::Never {
                tracing::error!(source = %self.status.name, "{error}");
                self.status.set_state(NodeState::Failed(error.to_string()));
                let _ = self.arrivals.send(Arrival::Failed, 0).await;
                return;
            }
            let wait = back_off.wait();
            let seconds = wait.as_secs_f64();
            if started.elapsed() < STARTING {
                info!(source = %self.status.name, "not there yet: {error}; trying again in {seconds:.1} s");
            } else {
                warn!(source = %self.status.name, "{error}; trying again in {seconds:.1} s");
            }
            self.status.set_state(NodeState::Retrying(error.to_string()));
            sleep(wait).await;
        }
    }

    async fn read(&mut self, reader: Reader) -> Stop {
        match reader {
            Reader::Push(reader, acknowledger) => {
                let (broken, is_broken) = oneshot::channel();
                let link = Link { acknowledger, broken };
                if self.arrivals.send(Arrival::Connected(Some(link)), 0).await.is_err() {
                    return Stop::Closed;
                }
                tokio::select! {
                    stop = self.push(reader) => stop,
                    Ok(()) = is_broken => Stop::Error(Error::outside("what was received could not be acknowledged")),
                }
            }
            Reader::Pull(reader) => {
                if self.arrivals.send(Arrival::Connected(None), 0).await.is_err() {
                    return Stop::Closed;
                }
                self.pull(reader).await
            }
        }
    }

    async fn push(&mut self, mut reader: Box<dyn PushReader>) -> Stop {
        loop {
            match reader.next().await {
                Ok(records) => {
                    self.status.polls.fetch_add(1, Relaxed);
                    let bytes = records.iter().map(|record| record.payload.len()).sum();
                    let room = room(records.len(), bytes);
                    if self.arrivals.send(Arrival::Records(records), room).await.is_err() {
                        return Stop::Closed;
                    }
                }
                Err(error) => return Stop::Error(error),
            }
        }
    }

    async fn pull(&mut self, mut reader: Box<dyn PullReader>) -> Stop {
        let mut due = Instant::now();
        loop {
            if !*self.wanted.borrow_and_update() {
                if self.arrivals.send(Arrival::Unwanted, 0).await.is_err() {
                    return Stop::Closed;
                }
                if self.wanted.wait_for(|wanted| *wanted).await.is_err() {
                    return Stop::Closed;
                }
                // The first demand polls at once.
                due = Instant::now();
            }
            if let Schedule::Every(every) = self.schedule {
                tokio::select! {
                    () = sleep_until(due) => {}
                    changed = self.wanted.changed() => match changed {
                        Ok(()) => continue,
                        Err(_) => return Stop::Closed,
                    },
                }
                due = Instant::max(due + every, Instant::now());
            }
            let pulled = match reader.next().await {
                Ok(Some(pulled)) => pulled,
                Ok(None) => return Stop::End,
                Err(error) => return Stop::Error(error),
            };
            self.status.polls.fetch_add(1, Relaxed);
            if pulled.more {
                due = Instant::now();
            }
            self.position = Some(pulled.position.clone());
            let rows = pulled.rows.num_rows() + pulled.errors.len();
            let room = room(rows, pulled.rows.get_array_memory_size());
            if self.arrivals.send(Arrival::Rows(pulled), room).await.is_err() {
                return Stop::Closed;
            }
        }
    }
}
