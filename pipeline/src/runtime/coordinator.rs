//! Checkpoints and the stop: who is told what, in which order.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval, sleep};
use tracing::{info, warn};

use super::edge::Barrier;
use super::names::inbox_entry;
use super::outbox::Outbox;
use super::store::{Checkpoint, Store};
use super::{blocking, is_true};
use crate::error::{Error, Result, Retry};
use crate::live::Frozen;
use crate::state::StateWriter;
use crate::status::Status;

/// A stop takes at most this long; then the process ends without a last checkpoint.
pub(crate) const STOP_DEADLINE: Duration = Duration::from_secs(20);

/// What the coordinator tells a source.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Control {
    /// Put this barrier into the stream.
    Barrier(Barrier),
    /// Let event time reach its end, so that all windows close.
    Close,
    /// Checkpoints with smaller numbers than this are gone.
    Kept(u64),
}

/// A checkpoint is durable: what it names may be published.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Commit {
    pub(crate) checkpoint: u64,
    /// The oldest checkpoint that a start could still go on from.
    pub(crate) oldest_kept: u64,
}

/// What nodes tell the coordinator. Nodes are named by their key, such as `sink/history`.
#[derive(Debug)]
pub(crate) enum Report {
    /// The node's state at this checkpoint.
    Prepared(String, u64, Result<Prepared>),
    /// A sink has published, or could not publish, what this checkpoint names.
    Committed(String, u64, Result<(), String>),
    /// A source has reached its end.
    SourceEnded(String),
    /// A source has failed for good.
    SourceFailed(String),
    /// The node can no longer keep its promise: no checkpoint may follow.
    Lost(String, Error),
    /// The node's task has panicked, with this message.
    Died(String, String),
}

/// A node's state at a barrier.
#[derive(Debug, Default)]
pub(crate) struct Prepared {
    /// What the node wrote down while its stream waited.
    pub(crate) state: Vec<u8>,
    /// What is written down after that, beside the stream.
    pub(crate) latest: Option<Frozen>,
    /// The key of a source's inbox, and the first record in it that the checkpoint does not have.
    pub(crate) inbox: Option<(String, u64)>,
}

impl Prepared {
    /// All of it.
    pub(crate) fn finish(self) -> Vec<u8> {
        let Some(latest) = self.latest else { return self.state };
        let mut state = StateWriter::from(self.state);
        latest.write(&mut state);
        state.finish()
    }
}

impl From<Vec<u8>> for Prepared {
    fn from(state: Vec<u8>) -> Self {
        Self { state, ..Self::default() }
    }
}

/// Why the graph stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Somebody asked for it.
    Asked,
    /// Every source has reached its end, or has failed for good.
    Ended,
}

pub(crate) struct Coordinator {
    pub(crate) store: Store,
    pub(crate) status: Arc<Status>,
    pub(crate) every: Duration,
    /// A stop that was asked for takes at most this long.
    pub(crate) stop_within: Duration,
    /// Number of the next checkpoint.
    pub(crate) next: u64,
    pub(crate) controls: Vec<mpsc::Sender<Control>>,
    /// The sinks that publish what a checkpoint names.
    pub(crate) commits: BTreeMap<String, mpsc::Sender<Commit>>,
    /// The other sinks end when these are dropped.
    pub(crate) _others: Vec<mpsc::Sender<Commit>>,
    pub(crate) outboxes: Vec<Arc<Outbox>>,
    pub(crate) reports: mpsc::Receiver<Report>,
    /// Every node that answers a barrier, with the fingerprint of its configuration.
    pub(crate) nodes: BTreeMap<String, u64>,
    /// By key, the inboxes that no source of this run has, and the first record in each that no checkpoint has: their source
    /// may come back.
    pub(crate) left_inboxes: BTreeMap<String, u64>,
    /// Sources that have reached their end.
    pub(crate) ended: BTreeSet<String>,
    /// Sources that have failed for good.
    pub(crate) failed: BTreeSet<String>,
}

impl Coordinator {
    /// Runs until the end of all sources or until `stop` resolves; then stops the graph.
    pub(crate) async fn run(mut self, stop: impl Future<Output = ()>, drain: bool) -> Result<Stopped> {
        let (asked, mut is_asked) = watch::channel(false);
        let outboxes = self.outboxes.clone();
        let stop_within = self.stop_within;
        // A stop that is asked for is watched all the time: at whatever the graph is then, it has so long to end.
        let too_long = async {
            stop.await;
            outboxes.iter().for_each(|outbox| outbox.hurry());
            asked.send_replace(true);
            sleep(stop_within).await;
        };
        tokio::select! {
            biased;
            stopped = self.until_end(&mut is_asked, drain) => stopped,
            () = too_long => Err(Error::outside(format!(
                "the stop took longer than {} s; the next start goes on from the checkpoint before it",
                stop_within.as_secs()
            ))),
        }
    }

    async fn until_end(&mut self, asked: &mut watch::Receiver<bool>, drain: bool) -> Result<Stopped> {
        let stopped = if drain { Stopped::Ended } else { self.until_stop(asked).await? };
        if drain {
            for control in &self.controls {
                let _ = control.send(Control::Close).await;
            }
        }
        let number = self.begin(true).await;
        self.finish(number).await.map_err(|error| error.context("the last checkpoint failed"))?;
        let waiting: usize = self.outboxes.iter().map(|outbox| outbox.rows()).sum();
        if waiting > 0 {
            warn!("{waiting} rows are not delivered yet; the next start goes on with them");
        }
        // The next run starts anew, unless there is something left to go on with.
        if stopped == Stopped::Ended && !drain && waiting == 0 && self.failed.is_empty() {
            self.store.clear()?;
        }
        Ok(stopped)
    }

    async fn until_stop(&mut self, asked: &mut watch::Receiver<bool>) -> Result<Stopped> {
        let mut timer = interval(self.every);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if self.ended.len() + self.failed.len() == self.controls.len() {
                return Ok(Stopped::Ended);
            }
            tokio::select! {
                () = is_true(asked) => return Ok(Stopped::Asked),
                report = self.reports.recv() => self.note(report)?,
                _ = timer.tick() => {
                    let number = self.begin(false).await;
                    // A sink that is blocked blocks the barrier too: a stop must not wait for it. What the nodes
                    // still answer to this checkpoint is then passed over.
                    let finished = tokio::select! {
                        finished = self.finish(number) => finished,
                        () = is_true(asked) => return Ok(Stopped::Asked),
                    };
                    match finished {
                        Err(error) if error.retry == Retry::Never => return Err(error),
                        Err(error) => self.tell(Some(error.to_string())),
                        Ok(()) => self.tell(None),
                    }
                }
            }
        }
    }

    /// What has become of a checkpoint, for `/health`; logged when it changes.
    fn tell(&self, failure: Option<String>) {
        let before = self.status.set_checkpoint_failure(failure.clone());
        // `/ready` must know of it even if nobody asked meanwhile.
        let _ = self.status.reasons();
        match failure {
            Some(error) if before.is_none() => warn!("{error}; the next checkpoint tries again"),
            None if before.is_some() => info!("checkpoints are written again"),
            _ => {}
        }
    }

    fn note(&mut self, report: Option<Report>) -> Result<()> {
        match report {
            Some(Report::SourceEnded(key)) => {
                info!("{key} has ended");
                self.ended.insert(key);
            }
            Some(Report::SourceFailed(key)) => {
                self.failed.insert(key);
            }
            Some(Report::Lost(key, error)) => return Err(error.context(key)),
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
        let oldest_kept = blocking(|| self.store.write(&checkpoint))?;
        for control in &self.controls {
            // If a source is held back, a later one says it as well.
            let _ = control.try_send(Control::Kept(oldest_kept));
        }
        for commit in self.commits.values() {
            let _ = commit.send(Commit { checkpoint: number, oldest_kept }).await;
        }
        self.committed(number).await
    }

    /// The states of all nodes at barrier `number`.
    async fn collect(&mut self, number: u64) -> Result<Checkpoint> {
        let mut checkpoint = Checkpoint { number, ..Checkpoint::default() };
        checkpoint.nodes.extend(self.left_inboxes.iter().map(|(key, first)| inbox_entry(key.clone(), *first)));
        let mut failed = None;
        let mut answered = 0;
        while answered < self.nodes.len() {
            match self.reports.recv().await {
                Some(Report::Prepared(key, of, state)) if of == number => {
                    answered += 1;
                    let fingerprint = self.nodes.get(&key).copied().unwrap_or_default();
                    match state {
                        Ok(mut state) => {
                            checkpoint.nodes.extend(state.inbox.take().map(|(key, first)| inbox_entry(key, first)));
                            checkpoint.nodes.insert(key, (fingerprint, blocking(|| state.finish())));
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

    /// Waits until every sink has published, or could not publish, what checkpoint `number` names.
    async fn committed(&mut self, number: u64) -> Result<()> {
        let mut waiting: BTreeSet<String> = self.commits.keys().cloned().collect();
        let mut failed = Vec::new();
        while !waiting.is_empty() {
            match self.reports.recv().await {
                Some(Report::Committed(key, of, result)) if of == number => {
                    if let Err(message) = result {
                        failed.push(format!("{key}: {message}"));
                    }
                    waiting.remove(&key);
                }
                Some(report) => self.note(Some(report))?,
                None => return Err(Error::internal("all nodes are gone")),
            }
        }
        if failed.is_empty() {
            return Ok(());
        }
        Err(Error::outside(format!("publishing checkpoint {number}: {}", failed.join("; "))))
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use arrow::array::{Int64Array, RecordBatch};

    use super::*;
    use crate::disk::RealDisk;
    use crate::log::Durability;
    use crate::plugin::{BatchLimits, SinkInput, StreamShape};
    use crate::runtime::hold::Hold;
    use crate::schema::{FieldType, schema_of};

    /// As fast as can be.
    const EVERY: Duration = Duration::from_millis(1);
    /// Long enough to see that a stop does not end by itself.
    const STOP_WITHIN: Duration = Duration::from_millis(50);

    /// What the source and the sink of a test do.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Does {
        Answers,
        /// The sink cannot prepare this checkpoint.
        CannotPrepare(u64),
        /// The sink cannot publish.
        CannotPublish,
        /// Nor does it when the source comes to its end with this checkpoint.
        EndsUnpublished(u64),
        /// The sink is blocked from this checkpoint on.
        Blocks(u64),
        /// The sink is blocked at this checkpoint; a stop lets it go on.
        BlocksUntilStop(u64),
        /// The source comes to its end with this checkpoint.
        Ends(u64),
        /// The source fails for good with this checkpoint.
        Fails(u64),
        /// The sink panics with this checkpoint.
        Dies(u64),
    }

    /// Stands for a source and a sink: answers, tells of each barrier that has come, and notes the commits.
    async fn nodes(
        does: Does,
        seen: watch::Sender<u64>,
        mut control: mpsc::Receiver<Control>,
        mut commits: mpsc::Receiver<Commit>,
        reports: mpsc::Sender<Report>,
    ) -> Vec<u64> {
        let mut committed = Vec::new();
        loop {
            tokio::select! {
                biased;
                Some(control) = control.recv() => {
                    let Control::Barrier(Barrier { checkpoint, last }) = control else { continue };
                    seen.send_replace(checkpoint);
                    let prepared = match does {
                        Does::CannotPrepare(at) if at == checkpoint => Err(Error::outside("the disk is full")),
                        Does::Blocks(at) if checkpoint >= at => continue,
                        Does::BlocksUntilStop(at) if checkpoint >= at && !last => continue,
                        Does::Dies(at) if at == checkpoint => {
                            let _ = reports.send(Report::Died("sink/k".to_owned(), "oops".to_owned())).await;
                            continue;
                        }
                        _ => Ok(vec![7].into()),
                    };
                    let position = Ok(checkpoint.to_le_bytes().to_vec().into());
                    let _ = reports.send(Report::Prepared("source/s".to_owned(), checkpoint, position)).await;
                    let _ = reports.send(Report::Prepared("sink/k".to_owned(), checkpoint, prepared)).await;
                    match does {
                        Does::Ends(at) | Does::EndsUnpublished(at) if at == checkpoint => {
                            let _ = reports.send(Report::SourceEnded("source/s".to_owned())).await;
                        }
                        Does::Fails(at) if at == checkpoint => {
                            let _ = reports.send(Report::SourceFailed("source/s".to_owned())).await;
                        }
                        _ => {}
                    }
                }
                Some(Commit { checkpoint, oldest_kept }) = commits.recv() => {
                    let published = match does {
                        Does::CannotPublish | Does::EndsUnpublished(_) => Err("no".to_owned()),
                        _ => Ok(()),
                    };
                    assert!(oldest_kept <= checkpoint, "{oldest_kept} at {checkpoint}");
                    committed.push(checkpoint);
                    let _ = reports.send(Report::Committed("sink/k".to_owned(), checkpoint, published)).await;
                }
                else => return committed,
            }
        }
    }

    struct Ran {
        result: Result<Stopped>,
        /// Numbers of the checkpoints that the sink was told to publish.
        committed: Vec<u64>,
        /// Number of the checkpoint that the next start finds.
        kept: Option<u64>,
        /// Number of the last barrier.
        last: u64,
    }

    /// Runs; a stop is asked for when the barrier of checkpoint `stop_at` has come.
    async fn ran(does: Does, outbox: Option<Arc<Outbox>>, stop_at: Option<u64>, drain: bool) -> Ran {
        let folder = tempfile::tempdir().expect("a folder");
        let (control, controls) = mpsc::channel(4);
        let (commit, commits) = mpsc::channel(4);
        let (reporter, reports) = mpsc::channel(100);
        let coordinator = Coordinator {
            store: Store::open(folder.path()).expect("a store"),
            status: Arc::default(),
            every: EVERY,
            stop_within: STOP_WITHIN,
            next: 1,
            controls: vec![control],
            commits: BTreeMap::from([("sink/k".to_owned(), commit)]),
            _others: Vec::new(),
            outboxes: outbox.into_iter().collect(),
            reports,
            nodes: BTreeMap::from([("source/s".to_owned(), 1), ("sink/k".to_owned(), 2)]),
            left_inboxes: BTreeMap::new(),
            ended: BTreeSet::new(),
            failed: BTreeSet::new(),
        };
        let (seen, mut is_seen) = watch::channel(0);
        let nodes = tokio::spawn(nodes(does, seen, controls, commits, reporter));
        let stop = async {
            match stop_at {
                Some(number) => drop(is_seen.wait_for(|seen| *seen >= number).await),
                None => pending().await,
            }
        };
        let result = coordinator.run(stop, drain).await;
        let committed = nodes.await.expect("no panic");
        let mut store = Store::open(folder.path()).expect("a store");
        let kept = store.latest().expect("a list").map(|checkpoint| checkpoint.number);
        let last = *is_seen.borrow();
        Ran { result, committed, kept, last }
    }

    /// An outbox in which a row waits for a sink that is away.
    async fn undelivered() -> Arc<Outbox> {
        let schema = schema_of([("n", FieldType::Int)]);
        let shape = StreamShape { schema: Arc::clone(&schema), keys: Vec::new(), windowed: false };
        let limits = BatchLimits { rows: 10, every: EVERY };
        let folder = tempfile::tempdir().expect("a folder");
        let inputs = vec![SinkInput { metric: "m".to_owned(), shape }];
        let outbox = {
            let hold = Hold::default();
            Outbox::open(limits, false, inputs, Arc::new(RealDisk), folder.path(), Durability::Process, hold)
        };
        let outbox = Arc::new(outbox.expect("an outbox"));
        let rows = RecordBatch::try_new(schema, vec![Arc::new(Int64Array::from(vec![1]))]).expect("rows");
        outbox.put(0, &rows).await;
        outbox
    }

    #[tokio::test]
    async fn a_checkpoint_is_published_once_it_is_durable_and_a_stop_takes_a_last_one() {
        for (does, stop_at, passed_over) in [
            (Does::Answers, 3, None),
            (Does::Answers, 0, None),
            (Does::CannotPrepare(2), 3, Some(2)),
            // The stop passes the checkpoint that hangs.
            (Does::BlocksUntilStop(3), 3, Some(3)),
            (Does::BlocksUntilStop(1), 1, Some(1)),
        ] {
            let ran = ran(does, None, Some(stop_at), false).await;
            assert_eq!(ran.result.expect("a clean stop"), Stopped::Asked, "{does:?}");
            assert_eq!(ran.kept, Some(ran.last), "{does:?}");
            assert_eq!(ran.committed.last(), Some(&ran.last), "{does:?}");
            for number in 1..ran.last.min(stop_at) {
                assert_eq!(ran.committed.contains(&number), Some(number) != passed_over, "{does:?}: {number}");
            }
        }
    }

    #[tokio::test]
    async fn a_stop_has_a_deadline_and_the_checkpoint_before_stays() {
        for (does, stop_at, kept) in [(Does::Blocks(3), 3, Some(2)), (Does::Blocks(1), 1, None)] {
            let ran = ran(does, None, Some(stop_at), false).await;
            assert!(ran.result.expect_err("too long").to_string().contains("took longer"), "{does:?}");
            assert_eq!(ran.kept, kept, "{does:?}");
        }
    }

    #[tokio::test]
    async fn a_graph_that_ran_to_its_end_leaves_a_checkpoint_only_if_something_is_left_to_do() {
        for (does, outbox, expected) in [
            (Does::Ends(2), None, (Some(Stopped::Ended), None)),
            (Does::Fails(2), None, (Some(Stopped::Ended), Some(3))),
            (Does::Ends(2), Some(undelivered().await), (Some(Stopped::Ended), Some(3))),
        ] {
            let ran = ran(does, outbox, None, false).await;
            assert_eq!((ran.result.ok(), ran.kept), expected, "{does:?}");
            assert_eq!(ran.committed, [1, 2, 3], "{does:?}");
        }
    }

    #[tokio::test]
    async fn what_could_not_be_published_at_the_last_is_an_error_and_stays_in_the_checkpoint() {
        for does in [Does::CannotPublish, Does::EndsUnpublished(2)] {
            let stop_at = (does == Does::CannotPublish).then_some(2);
            let ran = ran(does, None, stop_at, false).await;
            assert!(ran.result.expect_err("not published").to_string().contains("sink/k: no"), "{does:?}");
            assert_eq!(ran.kept, Some(ran.last), "{does:?}");
        }
    }

    #[tokio::test]
    async fn a_drain_keeps_its_checkpoint() {
        let ran = ran(Does::Answers, None, None, true).await;
        assert_eq!((ran.result.expect("drained"), ran.committed, ran.kept), (Stopped::Ended, vec![1], Some(1)));
    }

    #[tokio::test]
    async fn a_node_that_panics_ends_the_run_without_another_checkpoint() {
        let ran = ran(Does::Dies(3), None, None, false).await;
        let error = ran.result.expect_err("dead").to_string();
        assert!(error.contains("sink/k") && error.contains("oops"), "{error}");
        assert_eq!((ran.committed, ran.kept), (vec![1, 2], Some(2)));
    }
}
