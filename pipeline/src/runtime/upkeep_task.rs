//! The task that has published files looked after: merged, and removed when they are too old.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use tokio::time::{Duration, sleep};
use tracing::{debug, warn};

use crate::error::Result;
use crate::history::History;
use crate::plugin::{Upkeep, Upkept};
use crate::status::{FilesStatus, NodeStatus};
use crate::time::now_us;

/// Between two looks when there was nothing to do. A look at nothing costs next to nothing.
const EVERY: Duration = Duration::from_secs(1);

/// First wait after a failure; it doubles with each further one.
const WAIT_FIRST: Duration = Duration::from_secs(10);

/// Longest rest after a step. A step is followed by a rest as long as it took, so that upkeep has at most half of one
/// processor while it catches up.
const REST_MAX: Duration = Duration::from_secs(10);

/// Failures in a row after which `/health` tells: one may pass by itself, such as a disk that was full for a moment.
const TOLD_AFTER: u32 = 3;

/// Longest wait after failures: what fails then needs a person, and each try may read much.
const WAIT_MAX: Duration = Duration::from_secs(3600);

/// All sinks with upkeep, one step of one of them at a time.
pub(crate) struct UpkeepTask {
    history: Arc<History>,
    sinks: Vec<Kept>,
}

struct Kept {
    upkeep: Arc<dyn Upkeep>,
    status: Arc<NodeStatus>,
    /// In a row.
    failures: u32,
    /// Not before this after a failure.
    again: Option<Instant>,
}

impl UpkeepTask {
    pub(crate) fn new(history: Arc<History>) -> Self {
        Self { history, sinks: Vec::new() }
    }

    pub(crate) fn add(&mut self, upkeep: Arc<dyn Upkeep>, status: &Arc<NodeStatus>) {
        self.sinks.push(Kept { upkeep, status: Arc::clone(status), failures: 0, again: None });
    }

    /// Runs for as long as the process does, if there is anything to look after.
    pub(crate) async fn run(mut self) {
        while !self.sinks.is_empty() {
            let mut more = false;
            for kept in &mut self.sinks {
                if kept.again.is_some_and(|again| Instant::now() < again) {
                    continue;
                }
                let (upkeep, start) = (Arc::clone(&kept.upkeep), Instant::now());
                let done = self.history.beside_queries(move || upkeep.step(now_us())).await;
                more |= kept.note(done.and_then(|done| done));
                sleep(start.elapsed().min(REST_MAX)).await;
            }
            if !more {
                sleep(EVERY).await;
            }
        }
    }
}

impl Kept {
    /// Counts what a step did; whether there is more to do.
    fn note(&mut self, done: Result<Upkept>) -> bool {
        let files = self.status.files.get_or_init(FilesStatus::default);
        let done = match done {
            Ok(done) => done,
            Err(error) => {
                self.failures += 1;
                files.failures.fetch_add(1, Relaxed);
                let wait = WAIT_FIRST.saturating_mul(1 << (self.failures - 1).min(16)).min(WAIT_MAX);
                self.again = Some(Instant::now() + wait);
                debug!(sink = %self.status.name, "{error}; trying again in {} s", wait.as_secs());
                if self.failures >= TOLD_AFTER && files.set_failure(Some(error.to_string())).is_none() {
                    warn!(sink = %self.status.name, "{error}; trying again later");
                }
                return false;
            }
        };
        files.files.store(done.files, Relaxed);
        files.merged_files.fetch_add(done.merged_files, Relaxed);
        files.merged_hours.fetch_add(done.merged_hours, Relaxed);
        files.expired_hours.fetch_add(done.expired_hours, Relaxed);
        // What failed comes last: only a round that came to its end has got over it.
        if !done.more {
            self.failures = 0;
            files.set_failure(None);
        }
        done.more
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use crate::status::{NodeKind, Status};

    struct Idle;

    impl Upkeep for Idle {
        fn step(&self, _now_us: i64) -> Result<Upkept> {
            Ok(Upkept::default())
        }
    }

    #[test]
    fn a_failure_that_repeats_itself_is_told_until_a_round_has_come_to_its_end() {
        let status = Status::default();
        let node = status.node(NodeKind::Sink, "history", "parquet");
        node.set_state(crate::status::NodeState::Healthy);
        let mut kept = Kept { upkeep: Arc::new(Idle), status: node, failures: 0, again: None };
        let failure = || Err(Error::outside("cannot read x"));
        let did = |more| Ok(Upkept { more, files: 7, merged_files: 10, merged_hours: 1, expired_hours: 2 });
        for told in [false, false, true, true] {
            assert!(!kept.note(failure()));
            let reasons = status.reasons();
            assert_eq!(
                reasons.first().map(|r| (r.node.as_str(), r.reason.as_str())),
                told.then_some(("sink history files", "cannot read x"))
            );
            // Other hours can be merged; the one that fails is tried last.
            assert!(kept.note(did(true)));
            assert_eq!(status.reasons().len(), usize::from(told));
        }
        assert!(kept.again.is_some_and(|again| again > Instant::now()));
        assert!(!kept.note(did(false)));
        assert_eq!((status.reasons().len(), kept.failures), (0, 0));
        let files = kept.status.files.get().expect("counters");
        let counted = [&files.files, &files.merged_files, &files.merged_hours, &files.expired_hours, &files.failures];
        assert_eq!(counted.map(|counter| counter.load(Relaxed)), [7, 50, 5, 10, 4]);
    }
}
