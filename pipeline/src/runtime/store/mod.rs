//! Checkpoints on disk: a small manifest, renamed into place, names pieces of state in files that never change.
//!
//! `NUMBER.checkpoint` is the manifest, `NUMBER.pieces` the pieces that were new with it. A state that has not changed
//! costs its pieces' names. All numbers are little-endian:
//!
//! | manifest | | |
//! | --- | --- | --- |
//! | magic | 8 | `TAILWCK2` |
//! | checksum | u32 | CRC-32C of all that follows |
//! | number | u64 | |
//! | nodes | u64 | how many; then for each: |
//! | key, fingerprint | text, u64 | |
//! | state | bytes | the whole of a small one, else nothing |
//! | pieces | u64 | how many; then for each: hash (xxh3, two u64, the high one first), length, file, offset (u64 each) |
//!
//! A file of pieces is synced before the manifest that names it is written, and removed after the last one that does.
//! The first version (`TAILWCK1`) had all states in the manifest; it is still read.

mod found;
mod pieces;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::{File, TryLockError};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tracing::warn;
use xxhash_rust::xxh3::xxh3_128;

use crate::disk::{Disk, NotWritten, RealDisk, remove_drafts, write_whole};
use crate::error::{Blame, Error, Result};
use crate::state::{StateReader, StateWriter};
pub(crate) use found::{Found, is_locked, is_of_checkpoints, is_set_aside, read_all, were_written};
use pieces::{Fresh, Piece, Pieces};

const MAGIC: &[u8; 8] = b"TAILWCK2";
/// All states in the manifest.
const FIRST_MAGIC: &[u8; 8] = b"TAILWCK1";
const SUFFIX: &str = ".checkpoint";
/// A file that is there from the first checkpoint on, until all are cleared: without it nobody could tell a first start from
/// one whose checkpoints were removed.
const WRITTEN: &str = "written.checkpoints";
const PIECES: &str = ".pieces";
/// Extension of a checkpoint that could not be read when a run started.
const DAMAGED: &str = "damaged";
/// A state of at most so many bytes lies in the manifest itself.
const SMALL_BYTES_MAX: usize = 8 << 10;
/// The error of a disk that cannot read a place, on every Unix.
const EIO: i32 = 5;
/// Checkpoints kept: the newest, and two to fall back to.
const KEPT: usize = 3;

/// The state of all nodes at one point of the stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Checkpoint {
    pub(crate) number: u64,
    /// Per node: its fingerprint and its state.
    pub(crate) nodes: BTreeMap<String, (u64, Vec<u8>)>,
}

/// The state folder, locked by this process. What it knows of the pieces comes from checkpoints that it read whole or wrote
/// itself: one that names a piece that is damaged or gone would be of no use, nor would any after it.
#[derive(Debug)]
pub(crate) struct Store {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    /// Of the checkpoint that was taken up, or of the last one written.
    pieces: Pieces,
    /// The checkpoints that are kept, and the files of pieces that each names.
    kept: VecDeque<(u64, BTreeSet<u64>)>,
    /// Whether [`WRITTEN`] is there, as far as this process knows.
    is_marked: bool,
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

    pub(super) fn on(disk: Arc<dyn Disk>, dir: &Path, lock: Option<File>) -> Result<Self> {
        let prepare = || {
            disk.create_folder(dir)?;
            remove_drafts(&*disk, dir)?;
            // A process may have been killed just after a rename. What is restored now must not be taken back later.
            disk.sync_folder(dir)
        };
        prepare().map_err(|error| failed(dir, error).fatal())?;
        let (pieces, kept) = (Pieces::default(), VecDeque::new());
        Ok(Self { disk, dir: dir.to_owned(), pieces, kept, is_marked: false, _lock: lock })
    }

    /// Takes up the newest checkpoint that is whole. Damaged ones that are newer are set aside with a warning: once a run
    /// has gone on from an older one, nothing may start from them, even if the disk gives them back, and they must not
    /// count as kept. If none is whole all stay where they are, for the start that is refused.
    ///
    /// Errors: the disk's. One that cannot be read for now is not damaged.
    pub(crate) fn latest(&mut self) -> Result<Option<Checkpoint>> {
        let mut damaged: Vec<(u64, PathBuf, Error)> = Vec::new();
        let mut older = self.list()?;
        while let Some((number, path)) = older.pop() {
            match self.read(&path) {
                Ok((manifest, checkpoint)) => {
                    damaged.iter().for_each(|(number, path, error)| self.set_aside(*number, path, error));
                    self.take_up(&manifest, &older, damaged.is_empty())?;
                    return Ok(Some(checkpoint));
                }
                Err(error) if error.blame == Blame::Internal => damaged.push((number, path, error)),
                Err(error) => return Err(error.fatal()),
            }
        }
        Ok(None)
    }

    /// Goes on from a checkpoint: its pieces can be named again. Files that no checkpoint names are removed, unless one is
    /// damaged: a copy of it would need its pieces.
    fn take_up(&mut self, manifest: &Manifest, older: &[(u64, PathBuf)], mut all_told: bool) -> Result<()> {
        self.pieces = Pieces::default();
        self.pieces.note(manifest.pieces());
        self.kept.clear();
        for (number, path) in older {
            match self.manifest(path) {
                Ok(manifest) => self.kept.push_back((*number, manifest.files())),
                Err(_) => all_told = false,
            }
        }
        self.kept.push_back((manifest.number, manifest.files()));
        if all_told { self.remove_unnamed() } else { Ok(()) }
    }

    fn set_aside(&self, number: u64, path: &Path, error: &Error) {
        let aside = path.with_extension(DAMAGED);
        // If it stays, it is skipped again.
        let moved = self.disk.rename(path, &aside).and_then(|()| self.disk.sync_folder(&self.dir));
        let kept_as = if moved.is_ok() { &aside } else { path };
        warn!("checkpoint {number} is damaged and skipped, and kept as {}: {error}", kept_as.display());
    }

    /// Makes a checkpoint durable and removes those that are no longer kept. Returns the number of the oldest that is.
    pub(crate) fn write(&mut self, checkpoint: &Checkpoint) -> Result<u64> {
        let sparse = self.pieces.sparse();
        let mut fresh = Fresh::new(checkpoint.number);
        let mut manifest = Manifest { number: checkpoint.number, nodes: BTreeMap::new() };
        for (key, (fingerprint, state)) in &checkpoint.nodes {
            let state = match state.len() {
                ..=SMALL_BYTES_MAX => State::Small(state.clone()),
                _ => State::Pieces(self.pieces.place(state, &sparse, &mut fresh)),
            };
            manifest.nodes.insert(key.clone(), (*fingerprint, state));
        }
        let pieces = self.path(checkpoint.number, PIECES);
        if !fresh.bytes.is_empty() {
            self.put(&pieces, &fresh.bytes).map_err(|failed| self.not_written(failed))?;
        }
        let written = self.put(&self.path(checkpoint.number, SUFFIX), &manifest.encode());
        if let Err(NotWritten::Unchanged(_)) = written {
            // On a full disk it would only take room. If it stays: the next start removes it.
            let _ = self.disk.remove_if_there(&pieces);
        } else {
            // It may be there even after an error: a start would take it, and needs what it names.
            self.kept.push_back((checkpoint.number, manifest.files()));
        }
        written.map_err(|failed| self.not_written(failed))?;
        if !self.is_marked {
            self.put(&self.dir.join(WRITTEN), b"").map_err(|failed| self.not_written(failed))?;
            self.is_marked = true;
        }
        self.pieces.note(manifest.pieces());
        let list = self.list()?;
        let (old, kept) = list.split_at(list.len().saturating_sub(KEPT));
        for (_, path) in old {
            let _ = self.disk.remove_if_there(path);
        }
        let oldest = kept.first().map_or(checkpoint.number, |(oldest, _)| *oldest);
        while self.kept.pop_front_if(|(number, _)| *number < oldest).is_some() {}
        if !old.is_empty() {
            // They only take room; the next checkpoint removes them too.
            let _ = self.remove_unnamed();
        }
        Ok(oldest)
    }

    /// Writes a file that is there as a whole or not at all.
    fn put(&self, path: &Path, bytes: &[u8]) -> Result<(), NotWritten> {
        write_whole(&*self.disk, path, bytes).map(drop)
    }

    fn not_written(&self, failed: NotWritten) -> Error {
        Error::outside(format!("checkpoint in `{}`", self.dir.display())).because(io::Error::from(failed))
    }

    /// Removes the files of pieces that no kept checkpoint names.
    fn remove_unnamed(&self) -> Result<()> {
        let named: BTreeSet<u64> = self.kept.iter().flat_map(|(_, files)| files.iter().copied()).collect();
        for (number, path) in self.numbered(PIECES)? {
            if !named.contains(&number) {
                self.disk.remove_if_there(&path).map_err(|error| failed(&path, error))?;
            }
        }
        Ok(())
    }

    fn path(&self, number: u64, suffix: &str) -> PathBuf {
        self.dir.join(format!("{number:020}{suffix}"))
    }

    /// Removes all checkpoints: the next run starts anew.
    pub(crate) fn clear(&mut self) -> Result<()> {
        // The mark first: in between, checkpoints without it are gone on from, and it without checkpoints is refused.
        let mark = self.dir.join(WRITTEN);
        let unmarked = self.disk.remove_if_there(&mark).and_then(|()| self.disk.sync_folder(&self.dir));
        unmarked.map_err(|e| Error::outside(format!("`{}`", mark.display())).because(e))?;
        self.is_marked = false;
        for (_, path) in self.list()? {
            // One by one, the oldest first: of several removals a power loss could keep any, and leave only an old one.
            let removed = self.disk.remove_if_there(&path).and_then(|()| self.disk.sync_folder(&self.dir));
            removed.map_err(|e| Error::outside(format!("`{}`", path.display())).because(e))?;
        }
        self.kept.clear();
        self.pieces = Pieces::default();
        self.remove_unnamed()
    }

    /// Numbers and paths of the checkpoints, oldest first.
    fn list(&self) -> Result<Vec<(u64, PathBuf)>> {
        self.numbered(SUFFIX)
    }

    fn numbered(&self, suffix: &str) -> Result<Vec<(u64, PathBuf)>> {
        let entries = self.disk.list(&self.dir).map_err(|error| failed(&self.dir, error))?;
        let number = |name: &str| name.strip_suffix(suffix)?.parse().ok();
        let mut list: Vec<(u64, PathBuf)> =
            entries.iter().filter_map(|entry| Some((number(&entry.name)?, self.dir.join(&entry.name)))).collect();
        list.sort();
        Ok(list)
    }

    fn manifest(&self, path: &Path) -> Result<Manifest> {
        let manifest = Manifest::decode(&self.disk.read(path).map_err(|error| unreadable(path, error))?)?;
        if self.path(manifest.number, SUFFIX) != path {
            return Err(Error::internal(format!("it is checkpoint {}, under another name", manifest.number)));
        }
        Ok(manifest)
    }

    /// Errors: the disk's; and [`Blame::Internal`] if it is damaged.
    fn read(&self, path: &Path) -> Result<(Manifest, Checkpoint)> {
        let manifest = self.manifest(path)?;
        let mut nodes = BTreeMap::new();
        for (key, (fingerprint, state)) in &manifest.nodes {
            let state = match state {
                State::Small(bytes) => bytes.clone(),
                State::Pieces(pieces) => self.join(pieces)?,
            };
            nodes.insert(key.clone(), (*fingerprint, state));
        }
        let checkpoint = Checkpoint { number: manifest.number, nodes };
        Ok((manifest, checkpoint))
    }

    /// The state that pieces make up.
    fn join(&self, pieces: &[Piece]) -> Result<Vec<u8>> {
        let mut state = Vec::new();
        for piece in pieces {
            let path = self.path(piece.file, PIECES);
            let length = usize::try_from(piece.length).unwrap_or(usize::MAX);
            let bytes = self.disk.read_range(&path, piece.offset, length).map_err(|error| unreadable(&path, error))?;
            if xxh3_128(&bytes) != piece.hash {
                return Err(Error::internal(format!(
                    "{}: the piece at byte {} is damaged",
                    path.display(),
                    piece.offset
                )));
            }
            state.extend_from_slice(&bytes);
        }
        Ok(state)
    }
}

fn failed(path: &Path, error: io::Error) -> Error {
    Error::outside(format!("state: `{}`", path.display())).because(error)
}

/// What is gone, too short or on a bad place of the disk is damaged; another failure (too many open files, say) passes.
fn unreadable(path: &Path, error: io::Error) -> Error {
    // An offset that no file can have is an invalid input.
    let is_gone = matches!(error.kind(), ErrorKind::NotFound | ErrorKind::UnexpectedEof | ErrorKind::InvalidInput);
    if is_gone || error.raw_os_error() == Some(EIO) {
        return Error::internal(format!("`{}`", path.display())).because(error);
    }
    failed(path, error)
}

/// What the file of a checkpoint says.
#[derive(Debug)]
pub(super) struct Manifest {
    pub(super) number: u64,
    /// Per node: its fingerprint and its state.
    nodes: BTreeMap<String, (u64, State)>,
}

#[derive(Debug)]
enum State {
    Small(Vec<u8>),
    Pieces(Vec<Piece>),
}

impl Manifest {
    fn pieces(&self) -> impl Iterator<Item = Piece> {
        self.nodes
            .values()
            .flat_map(|(_, state)| match state {
                State::Small(_) => &[],
                State::Pieces(pieces) => pieces.as_slice(),
            })
            .copied()
    }

    /// The files of pieces that it names.
    fn files(&self) -> BTreeSet<u64> {
        self.pieces().map(|piece| piece.file).collect()
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut body = StateWriter::default();
        body.u64(self.number);
        body.u64(self.nodes.len() as u64);
        for (key, (fingerprint, state)) in &self.nodes {
            body.str(key);
            body.u64(*fingerprint);
            let (small, pieces): (&[u8], &[Piece]) = match state {
                State::Small(bytes) => (bytes, &[]),
                State::Pieces(pieces) => (&[], pieces),
            };
            body.bytes(small);
            body.u64(pieces.len() as u64);
            for piece in pieces {
                for word in [(piece.hash >> 64) as u64, piece.hash as u64, piece.length, piece.file, piece.offset] {
                    body.u64(word);
                }
            }
        }
        let body = body.finish();
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&crc32c::crc32c(&body).to_le_bytes());
        bytes.extend_from_slice(&body);
        bytes
    }

    pub(super) fn decode(bytes: &[u8]) -> Result<Self> {
        let (magic, rest) = bytes.split_first_chunk::<8>().ok_or_else(|| Error::internal("it is cut off"))?;
        if magic != MAGIC && magic != FIRST_MAGIC {
            return Err(Error::internal("not a checkpoint of this version, or of one before"));
        }
        let (crc, body) = rest.split_first_chunk::<4>().ok_or_else(|| Error::internal("it is cut off"))?;
        if u32::from_le_bytes(*crc) != crc32c::crc32c(body) {
            return Err(Error::internal("the checksum is wrong"));
        }
        let mut reader = StateReader::new(body);
        let number = reader.u64()?;
        let mut nodes = BTreeMap::new();
        for _ in 0..reader.count()? {
            let key = reader.str()?.to_owned();
            let fingerprint = reader.u64()?;
            let small = reader.bytes()?.to_vec();
            let count = if magic == FIRST_MAGIC { 0 } else { reader.count()? };
            let mut pieces = Vec::new();
            for _ in 0..count {
                let hash = u128::from(reader.u64()?) << 64 | u128::from(reader.u64()?);
                let (length, file, offset) = (reader.u64()?, reader.u64()?, reader.u64()?);
                pieces.push(Piece { hash, length, file, offset });
            }
            let state = if pieces.is_empty() { State::Small(small) } else { State::Pieces(pieces) };
            nodes.insert(key, (fingerprint, state));
        }
        if !reader.is_empty() {
            return Err(Error::internal("something follows its end"));
        }
        Ok(Self { number, nodes })
    }
}

/// The bytes of a manifest with the checksum that fits them.
#[cfg(any(test, fuzzing))]
pub(super) fn resealed(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    if let Some((head, body)) = bytes.split_first_chunk_mut::<12>() {
        head[8..].copy_from_slice(&crc32c::crc32c(body).to_le_bytes());
    }
    bytes
}
