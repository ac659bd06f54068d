//! Which published files are settled: no start, from whichever checkpoint that is kept, would name or make them again.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::names::FileName;

/// What the sink knows of its published files and the checkpoints; shared with the upkeep of the files.
///
/// A checkpoint that is kept may be gone on from. Files that later checkpoints had published are then taken out of the
/// table, and files that it names itself must be where it expects them. So only files that every kept checkpoint has
/// behind it may be merged or removed.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    /// The checkpoint that this run went on from; 0 if it started anew.
    restored: u64,
    /// The oldest checkpoint that a start could go on from; 0 until the first commit.
    oldest_kept: u64,
    /// Files up to this number were there when the run started anew: they are of a run that is over, whose clock may
    /// have been ahead of ours.
    strangers: u64,
    /// Files that were named for publishing, counted from the sink's folder, with the last checkpoint that names each.
    /// Published ones stay until no kept checkpoint names them.
    named: HashMap<PathBuf, u64>,
}

impl Ledger {
    /// Of a run that goes on from checkpoint `restored`.
    pub(super) fn new(restored: u64, strangers: u64) -> Self {
        Self { restored, strangers, ..Self::default() }
    }

    pub(super) fn strangers(&self) -> u64 {
        self.strangers
    }

    /// `checkpoint` names this file as one to publish.
    pub(super) fn name(&mut self, path: &Path, checkpoint: u64) {
        self.named.insert(path.to_owned(), checkpoint);
    }

    /// All checkpoints before `oldest_kept` are gone for good.
    pub(super) fn forget_before(&mut self, oldest_kept: u64) {
        self.oldest_kept = oldest_kept;
        self.named.retain(|_, last| *last >= oldest_kept);
    }

    /// Whether no kept checkpoint names a file in this hour folder, counted from the sink's folder, and no file in it
    /// would come again.
    pub(super) fn is_settled(&self, hour: &Path, mut files: impl Iterator<Item = FileName>) -> bool {
        self.oldest_kept > self.restored
            && !self.named.keys().any(|path| path.parent() == Some(hour))
            && files.all(|file| file.last < self.oldest_kept || file.last <= self.strangers)
    }

    /// Whether a file was published by a checkpoint after the one gone on from.
    pub(super) fn is_newer(&self, number: u64) -> bool {
        self.restored > 0 && number > self.restored && number > self.strangers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_settled_once_every_kept_checkpoint_has_it_behind_it() {
        let hour = Path::new("load/dt=2026-11-20/hh=12");
        let file = |number| FileName::published(number, 0);
        let mut ledger = Ledger::new(10, 4);
        assert!(!ledger.is_settled(hour, [file(3)].into_iter()), "who knows which checkpoints there are");
        ledger.forget_before(9);
        assert!(!ledger.is_settled(hour, [file(3)].into_iter()), "checkpoint 9 may name any of them");
        ledger.name(&hour.join("history-11-0.parquet"), 11);
        ledger.name(&hour.join("history-11-0.parquet"), 12);
        for (oldest_kept, numbers, settled) in [
            (11, &[3, 9][..], false),
            // Published with 12, which is kept still.
            (12, &[3, 9], false),
            (13, &[3, 9, 11], true),
            (13, &[3, 9, 11, 12], true),
            (13, &[3, 13], false),
            (13, &[], true),
        ] {
            ledger.forget_before(oldest_kept);
            assert_eq!(ledger.is_settled(hour, numbers.iter().map(|n| file(*n))), settled, "{oldest_kept} {numbers:?}");
        }
        assert!(ledger.is_settled(Path::new("load/dt=2026-11-20/hh=13"), [file(12)].into_iter()));
        let compacted = FileName { first: 2, last: 13, part: 0, compacted: true };
        assert!(!ledger.is_settled(hour, [compacted].into_iter()));
    }

    #[test]
    fn files_of_a_run_that_is_over_stay_even_if_its_clock_was_ahead() {
        let ledger = Ledger::new(10, 40);
        assert_eq!([9, 10, 11, 40, 41].map(|number| ledger.is_newer(number)), [false, false, false, false, true]);
        assert_eq!([1, 11].map(|number| Ledger::new(0, 0).is_newer(number)), [false, false]);
        let mut ledger = ledger;
        ledger.forget_before(12);
        assert!(ledger.is_settled(Path::new("x"), [FileName::published(40, 0)].into_iter()));
        assert!(!ledger.is_settled(Path::new("x"), [FileName::published(41, 0)].into_iter()));
    }
}
