//! The checkpoints of a state folder as they lie on the disk, for those who only look.

use std::collections::VecDeque;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use super::pieces::Pieces;
use super::{Checkpoint, DAMAGED, PIECES, SUFFIX, Store, WRITTEN};
use crate::disk::RealDisk;
use crate::error::Result;

/// A checkpoint as it lies on the disk.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) number: u64,
    pub(crate) path: PathBuf,
    /// Size of its file, and of the pieces that it names.
    pub(crate) bytes: u64,
    /// When it was written, in microseconds since 1970, if the file system tells.
    pub(crate) written_us: Option<i64>,
    /// What is in it, or why it cannot be read.
    pub(crate) checkpoint: Result<Checkpoint, String>,
}

/// All checkpoints in a state folder, oldest first; none if there is no folder. Takes no lock and changes nothing; one that
/// a running process removes meanwhile is left out.
pub(crate) fn read_all(dir: &Path) -> Result<Vec<Found>> {
    if !dir.exists() {
        return Ok(Vec::new());
    }
    let (pieces, kept) = (Pieces::default(), VecDeque::new());
    let store = Store { disk: Arc::new(RealDisk), dir: dir.to_owned(), pieces, kept, is_marked: false, _lock: None };
    let mut all = Vec::new();
    for (number, path) in store.list()? {
        let file = match fs::metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            file => file.ok(),
        };
        let manifest = store.manifest(&path).ok();
        let pieces = manifest.iter().flat_map(|manifest| manifest.pieces());
        let named = pieces.fold(0, |bytes: u64, piece| bytes.saturating_add(piece.length));
        let checkpoint = store.read(&path).map(|(_, checkpoint)| checkpoint).map_err(|error| error.to_string());
        // The checkpoint goes first, and then its pieces.
        if checkpoint.is_err() && !path.exists() {
            continue;
        }
        let since = file.as_ref().and_then(|file| file.modified().ok()?.duration_since(UNIX_EPOCH).ok());
        all.push(Found {
            number,
            path,
            bytes: file.map_or(0, |file| file.len()).saturating_add(named),
            written_us: since.and_then(|since| i64::try_from(since.as_micros()).ok()),
            checkpoint,
        });
    }
    Ok(all)
}

/// Whether a name in the state folder belongs to the checkpoints.
pub(crate) fn is_of_checkpoints(name: &str) -> bool {
    [SUFFIX, PIECES].iter().any(|suffix| name.ends_with(suffix)) || name == WRITTEN || is_set_aside(name)
}

/// Whether a name in the state folder is of a checkpoint that was damaged when a run started.
pub(crate) fn is_set_aside(name: &str) -> bool {
    name.ends_with(&format!(".{DAMAGED}"))
}

/// Whether there were checkpoints in a state folder that nobody cleared.
pub(crate) fn were_written(dir: &Path) -> bool {
    dir.join(WRITTEN).exists()
}

/// Whether a process runs on a state folder.
pub(crate) fn is_locked(dir: &Path) -> bool {
    let Ok(lock) = File::open(dir.join("lock")) else { return false };
    // Shared, so that two who only look do not take each other for a process.
    matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_damaged_is_told_and_its_pieces_stay_at_a_start() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path();
        assert!(!is_locked(dir) && read_all(&dir.join("none")).expect("nothing").is_empty());
        let mut store = Store::open(dir).expect("a store");
        for number in 1..=3 {
            let state = (0..20_000u64).flat_map(|n| (n * number).to_le_bytes()).collect();
            let nodes = [("pipeline/a".to_owned(), (1, state))].into();
            store.write(&Checkpoint { number, nodes }).expect("written");
        }
        assert!(is_locked(dir));
        drop(store);
        assert!(!is_locked(dir));
        let whole = |dir: &Path| -> Vec<(u64, bool)> {
            let found = read_all(dir).expect("all");
            assert!(found.iter().all(|found| found.written_us.is_some()));
            found.iter().map(|found| (found.number, found.checkpoint.is_ok())).collect()
        };
        assert_eq!(whole(dir), [(1, true), (2, true), (3, true)]);
        assert!(read_all(dir).expect("all").iter().all(|found| found.bytes > 160_000));
        let newest = dir.join("00000000000000000003.checkpoint");
        let bytes = fs::read(&newest).expect("read");
        fs::write(&newest, &bytes[1..]).expect("damaged");
        assert_eq!(whole(dir), [(1, true), (2, true), (3, false)]);
        // A copy of the damaged file must be of use even after a start.
        Store::open(dir).expect("a store").latest().expect("the one before");
        fs::write(&newest, &bytes).expect("put back");
        assert_eq!(whole(dir), [(1, true), (2, true), (3, true)]);
        fs::remove_file(dir.join("00000000000000000002.pieces")).expect("removed");
        assert_eq!(whole(dir), [(1, true), (2, false), (3, true)]);
    }
}
