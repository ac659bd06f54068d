//! Checkpoints on disk: one file each, written, synced, renamed into place.
//!
//! Layout, little-endian: `TAILWCK1`, CRC-32C of the rest (u32), number (u64), count of nodes (u64), then for
//! each node its key (text), fingerprint (u64) and state (bytes).

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::warn;

use crate::disk::{Disk, RealDisk, remove_drafts, write_whole};
use crate::error::{Error, Result};
use crate::state::{StateReader, StateWriter};

const MAGIC: &[u8; 8] = b"TAILWCK1";
const SUFFIX: &str = ".checkpoint";
/// Checkpoints kept: the newest, and two to fall back to.
const KEPT: usize = 3;

/// The state of all nodes at one point of the stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Checkpoint {
    pub(crate) number: u64,
    /// Per node: its fingerprint and its state.
    pub(crate) nodes: BTreeMap<String, (u64, Vec<u8>)>,
}

/// The state folder, locked by this process.
#[derive(Debug)]
pub(crate) struct Store {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    /// Nothing on a simulated disk, which no other process sees.
    _lock: Option<File>,
}

impl Store {
    /// Creates the folder if need be and locks it: two processes on one state would each undo the other's.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        RealDisk.create_folder(dir).map_err(|error| failed(dir, error).fatal())?;
        let lock = File::create(dir.join("lock")).map_err(|error| failed(dir, error).fatal())?;
        match lock.try_lock() {
            Ok(()) => Self::on(Arc::new(RealDisk), dir, Some(lock)),
            Err(TryLockError::WouldBlock) => Err(Error::outside(format!(
                "another process runs on the state folder `{}`; stop it, or give this one its own `checkpoint: {{dir: …}}`",
                dir.display()
            ))
            .fatal()),
            Err(TryLockError::Error(error)) => Err(failed(dir, error).fatal()),
        }
    }

    fn on(disk: Arc<dyn Disk>, dir: &Path, lock: Option<File>) -> Result<Self> {
        let prepare = || {
            disk.create_folder(dir)?;
            remove_drafts(&*disk, dir)?;
            // A process may have been killed just after a rename. What is restored now must not be taken back later.
            disk.sync_folder(dir)
        };
        prepare().map_err(|error| failed(dir, error).fatal())?;
        Ok(Self { disk, dir: dir.to_owned(), _lock: lock })
    }

    /// The newest checkpoint that is whole. A damaged one is skipped with a warning.
    pub(crate) fn latest(&self) -> Result<Option<Checkpoint>> {
        for (number, path) in self.list()?.into_iter().rev() {
            match self.read(&path) {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(error) => warn!("checkpoint {number} is damaged and skipped: {error}"),
            }
        }
        Ok(None)
    }

    /// Makes a checkpoint durable and removes those that are no longer kept. Returns the number of the oldest that is.
    pub(crate) fn write(&self, checkpoint: &Checkpoint) -> Result<u64> {
        let path = self.dir.join(format!("{:020}{SUFFIX}", checkpoint.number));
        write_whole(&*self.disk, &path, &encode(checkpoint)).map_err(|error| {
            Error::outside(format!("checkpoint in `{}`", self.dir.display())).because(io::Error::from(error))
        })?;
        let list = self.list()?;
        let (old, kept) = list.split_at(list.len().saturating_sub(KEPT));
        for (_, old) in old {
            let _ = self.disk.remove(old);
        }
        Ok(kept.first().map_or(checkpoint.number, |(oldest, _)| *oldest))
    }

    /// Removes all checkpoints: the next run starts anew.
    pub(crate) fn clear(&self) -> Result<()> {
        for (_, path) in self.list()? {
            // One by one, the oldest first: of several removals a power loss could keep any, and leave only an old one.
            let removed = self.disk.remove_if_there(&path).and_then(|()| self.disk.sync_folder(&self.dir));
            removed.map_err(|e| Error::outside(format!("`{}`", path.display())).because(e))?;
        }
        Ok(())
    }

    /// Numbers and paths, oldest first.
    fn list(&self) -> Result<Vec<(u64, PathBuf)>> {
        let entries = self.disk.list(&self.dir).map_err(|error| failed(&self.dir, error))?;
        let number = |name: &str| name.strip_suffix(SUFFIX)?.parse().ok();
        let mut list: Vec<(u64, PathBuf)> =
            entries.iter().filter_map(|entry| Some((number(&entry.name)?, self.dir.join(&entry.name)))).collect();
        list.sort();
        Ok(list)
    }

    fn read(&self, path: &Path) -> Result<Checkpoint> {
        let bytes = self.disk.read(path).map_err(|e| Error::outside(format!("`{}`", path.display())).because(e))?;
        decode(&bytes)
    }
}

/// A checkpoint as it lies on the disk.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) number: u64,
    pub(crate) path: PathBuf,
    pub(crate) bytes: u64,
    /// When it was written, in microseconds since 1970, if the file system tells.
    pub(crate) written_us: Option<i64>,
    /// What is in it, or why it cannot be read.
    pub(crate) checkpoint: Result<Checkpoint, String>,
}

/// All checkpoints in a state folder, oldest first; none if there is no folder. Takes no lock, so one that a running process
/// removes meanwhile is left out.
pub(crate) fn read_all(dir: &Path) -> Result<Vec<Found>> {
    let entries = match RealDisk.list(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|error| failed(dir, error))?,
    };
    let mut all = Vec::new();
    for entry in entries {
        let Some(number) = entry.name.strip_suffix(SUFFIX).and_then(|digits| digits.parse().ok()) else { continue };
        let path = dir.join(&entry.name);
        let bytes = match RealDisk.read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            bytes => bytes,
        };
        let written = std::fs::metadata(&path).and_then(|file| file.modified()).ok();
        let since = written.and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok());
        all.push(Found {
            number,
            path,
            bytes: entry.length,
            written_us: since.and_then(|since| i64::try_from(since.as_micros()).ok()),
            checkpoint: match bytes {
                Ok(bytes) => decode(&bytes).map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            },
        });
    }
    all.sort_by_key(|found| found.number);
    Ok(all)
}

/// Whether a name in the state folder belongs to the checkpoints.
pub(crate) fn is_of_checkpoints(name: &str) -> bool {
    name.ends_with(SUFFIX)
}

/// Whether a process runs on a state folder.
pub(crate) fn is_locked(dir: &Path) -> bool {
    let Ok(lock) = File::open(dir.join("lock")) else { return false };
    // Shared, so that two who only look do not take each other for a process.
    matches!(lock.try_lock_shared(), Err(TryLockError::WouldBlock))
}

fn failed(dir: &Path, error: io::Error) -> Error {
    Error::outside(format!("state folder `{}`", dir.display())).because(error)
}

fn encode(checkpoint: &Checkpoint) -> Vec<u8> {
    let mut body = StateWriter::default();
    body.u64(checkpoint.number);
    body.u64(checkpoint.nodes.len() as u64);
    for (key, (fingerprint, state)) in &checkpoint.nodes {
        body.str(key);
        body.u64(*fingerprint);
        body.bytes(state);
    }
    let body = body.finish();
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
    bytes.extend_from_slice(&body);
    bytes
}

fn decode(bytes: &[u8]) -> Result<Checkpoint> {
    let body = bytes.strip_prefix(MAGIC).and_then(|rest| rest.split_first_chunk::<4>());
    let (crc, body) = body.ok_or_else(|| Error::internal("not a checkpoint of this version"))?;
    if u32::from_le_bytes(*crc) != crc32c::crc32c(body) {
        return Err(Error::internal("the checksum is wrong"));
    }
    let mut reader = StateReader::new(body);
    let number = reader.u64()?;
    let mut nodes = BTreeMap::new();
    for _ in 0..reader.count()? {
        let key = reader.str()?.to_owned();
        let fingerprint = reader.u64()?;
        nodes.insert(key, (fingerprint, reader.bytes()?.to_vec()));
    }
    Ok(Checkpoint { number, nodes })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::disk::simulated::SimulatedDisk;

    fn checkpoint(number: u64) -> Checkpoint {
        let nodes = [("source/a", 1, vec![1, 2]), ("pipeline/b", 2, vec![])];
        Checkpoint { number, nodes: nodes.into_iter().map(|(k, f, s)| (k.to_owned(), (f, s))).collect() }
    }

    #[test]
    fn the_newest_whole_checkpoint_is_found_and_three_are_kept() {
        let dir = tempfile::tempdir().expect("folder");
        let store = Store::open(dir.path()).expect("store");
        assert_eq!(store.latest().expect("latest"), None);
        for number in 1..=5 {
            store.write(&checkpoint(number)).expect("written");
        }
        let numbers: Vec<u64> = store.list().expect("list").into_iter().map(|(number, _)| number).collect();
        assert_eq!(numbers, [3, 4, 5]);
        assert_eq!(store.latest().expect("latest"), Some(checkpoint(5)));
        let (_, newest) = store.list().expect("list").pop().expect("one");
        let mut bytes = fs::read(&newest).expect("read");
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&newest, &bytes).expect("write");
        assert_eq!(store.latest().expect("latest"), Some(checkpoint(4)));
        let found = read_all(dir.path()).expect("all");
        let whole: Vec<(u64, bool)> = found.iter().map(|found| (found.number, found.checkpoint.is_ok())).collect();
        assert_eq!(whole, [(3, true), (4, true), (5, false)]);
        assert!(found.iter().all(|found| found.bytes == bytes.len() as u64 && found.written_us.is_some()));
        for length in 0..bytes.len() {
            assert!(decode(&bytes[..length]).is_err(), "cut to {length}");
        }
        store.clear().expect("cleared");
        assert_eq!(store.latest().expect("latest"), None);
    }

    #[test]
    fn a_second_process_on_the_same_folder_is_refused() {
        let dir = tempfile::tempdir().expect("folder");
        assert!(!is_locked(dir.path()));
        let first = Store::open(dir.path()).expect("store");
        assert!(is_locked(dir.path()));
        assert!(Store::open(dir.path()).is_err());
        drop(first);
        assert!(Store::open(dir.path()).is_ok());
    }
    fn on(disk: &SimulatedDisk) -> Result<Store> {
        Store::on(Arc::new(disk.clone()), Path::new("state"), None)
    }

    fn newest(disk: &SimulatedDisk) -> u64 {
        let found = on(disk).expect("store").latest().expect("latest").unwrap_or_default();
        if found.number > 0 {
            assert_eq!(found, checkpoint(found.number));
        }
        found.number
    }

    /// Writes checkpoints until something fails: the newest that was written, and the one that was begun.
    fn write_some(disk: &SimulatedDisk, from: u64) -> (u64, u64) {
        let Ok(store) = on(disk) else { return (from, from) };
        for number in from + 1..from + 6 {
            if store.write(&checkpoint(number)).is_err() {
                return (number - 1, number);
            }
        }
        (from + 5, from + 5)
    }

    #[test]
    fn a_power_loss_anywhere_leaves_the_newest_checkpoint_or_the_one_begun() {
        let disk = SimulatedDisk::new(0);
        write_some(&disk, 0);
        for seed in 0..20 {
            for operation in 0..=disk.operations() {
                let disk = SimulatedDisk::new(seed);
                disk.power_off_after(operation);
                let (written, begun) = write_some(&disk, 0);
                let disk = disk.crash();
                let found = newest(&disk);
                assert!((written..=begun).contains(&found), "seed {seed}, operation {operation}: {found}");
                // Once restored it is not taken back, and the run goes on from it.
                assert_eq!(newest(&disk.crash()), found, "seed {seed}, operation {operation}");
                let disk = SimulatedDisk::new(seed);
                disk.fail_after(operation, 1);
                let (written, begun) = write_some(&disk, 0);
                let disk = disk.kill();
                let found = newest(&disk);
                assert!((written..=begun).contains(&found), "seed {seed}, operation {operation}: {found}");
                assert_eq!(newest(&disk.crash()), found, "seed {seed}, operation {operation}");
            }
        }
    }

    #[test]
    fn clearing_that_a_power_loss_ends_leaves_the_newest_checkpoint_or_none() {
        for seed in 0..50 {
            for operation in 0..10 {
                let disk = SimulatedDisk::new(seed);
                let (written, _) = write_some(&disk, 0);
                let store = on(&disk).expect("store");
                disk.power_off_after(operation);
                let cleared = store.clear().is_ok();
                let found = newest(&disk.crash());
                assert!(found == 0 || (found == written && !cleared), "seed {seed}, operation {operation}: {found}");
            }
        }
    }
}
