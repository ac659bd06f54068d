//! Checkpoints on disk: one file each, written, synced, renamed into place.
//!
//! Layout, little-endian: `TAILWCK1`, CRC-32C of the rest (u32), number (u64), count of nodes (u64), then for
//! each node its key (text), fingerprint (u64) and state (bytes).

use std::collections::BTreeMap;
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use tracing::warn;

use crate::error::{Error, Result};
use crate::state::{StateReader, StateWriter};

const MAGIC: &[u8; 8] = b"TAILWCK1";
const SUFFIX: &str = ".checkpoint";
/// Extension of a checkpoint that is being written.
const DRAFT: &str = "draft";
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
    dir: PathBuf,
    _lock: File,
}

impl Store {
    /// Creates the folder if need be and locks it: two processes on one state would each undo the other's.
    pub(crate) fn open(dir: &Path) -> Result<Self> {
        let failed = |e: std::io::Error| Error::outside(format!("state folder `{}`", dir.display())).because(e).fatal();
        fs::create_dir_all(dir).map_err(failed)?;
        let lock = File::create(dir.join("lock")).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {
                remove_drafts(dir).map_err(failed)?;
                Ok(Self { dir: dir.to_owned(), _lock: lock })
            }
            Err(TryLockError::WouldBlock) => Err(Error::outside(format!(
                "another process runs on the state folder `{}`; stop it, or give this one its own `checkpoint: {{dir: …}}`",
                dir.display()
            ))
            .fatal()),
            Err(TryLockError::Error(error)) => Err(failed(error)),
        }
    }

    /// The newest checkpoint that is whole. A damaged one is skipped with a warning.
    pub(crate) fn latest(&self) -> Result<Option<Checkpoint>> {
        for (number, path) in self.list()?.into_iter().rev() {
            match read(&path) {
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(error) => warn!("checkpoint {number} is damaged and skipped: {error}"),
            }
        }
        Ok(None)
    }

    /// Makes a checkpoint durable and removes those that are no longer kept. Returns the number of the oldest that is.
    pub(crate) fn write(&self, checkpoint: &Checkpoint) -> Result<u64> {
        let failed = |e: std::io::Error| Error::outside(format!("checkpoint in `{}`", self.dir.display())).because(e);
        let path = self.dir.join(format!("{:020}{SUFFIX}", checkpoint.number));
        let draft = path.with_extension(DRAFT);
        if let Err(error) = write_and_sync(&draft, &encode(checkpoint)) {
            // On a full disk it would only take room: the next checkpoint has another name.
            let _ = fs::remove_file(&draft);
            return Err(failed(error));
        }
        fs::rename(&draft, &path).map_err(failed)?;
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(failed)?;
        let list = self.list()?;
        let (old, kept) = list.split_at(list.len().saturating_sub(KEPT));
        for (_, old) in old {
            let _ = fs::remove_file(old);
        }
        Ok(kept.first().map_or(checkpoint.number, |(oldest, _)| *oldest))
    }

    /// Removes all checkpoints: the next run starts anew.
    pub(crate) fn clear(&self) -> Result<()> {
        for (_, path) in self.list()? {
            fs::remove_file(&path).map_err(|e| Error::outside(format!("`{}`", path.display())).because(e))?;
        }
        Ok(())
    }

    /// Numbers and paths, oldest first.
    fn list(&self) -> Result<Vec<(u64, PathBuf)>> {
        let failed = |e: std::io::Error| Error::outside(format!("state folder `{}`", self.dir.display())).because(e);
        let mut list = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if let Some(number) = name.strip_suffix(SUFFIX).and_then(|number| number.parse().ok()) {
                list.push((number, path));
            }
        }
        list.sort();
        Ok(list)
    }
}

/// Removes what a process that was killed had begun to write.
fn remove_drafts(dir: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == DRAFT) {
            fs::remove_file(&path)?;
        }
    }
    Ok(())
}

fn write_and_sync(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(bytes)?;
    file.sync_all()
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

fn read(path: &Path) -> Result<Checkpoint> {
    let bytes = fs::read(path).map_err(|e| Error::outside(format!("`{}`", path.display())).because(e))?;
    decode(&bytes)
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
    use super::*;

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
        for length in 0..bytes.len() {
            assert!(decode(&bytes[..length]).is_err(), "cut to {length}");
        }
        store.clear().expect("cleared");
        assert_eq!(store.latest().expect("latest"), None);
    }

    #[test]
    fn a_second_process_on_the_same_folder_is_refused() {
        let dir = tempfile::tempdir().expect("folder");
        let first = Store::open(dir.path()).expect("store");
        assert!(Store::open(dir.path()).is_err());
        drop(first);
        assert!(Store::open(dir.path()).is_ok());
    }
}
