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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::disk::simulated::SimulatedDisk;

    /// A large state of which a tenth changes each time.
    fn large(number: u64, words: u32) -> Vec<u8> {
        let mut state: Vec<u8> = (0..words).flat_map(|n| (n.wrapping_mul(2_654_435_761)).to_le_bytes()).collect();
        let tenth = state.len() / 10;
        let from = (number as usize % 10) * tenth;
        state[from..from + tenth].iter_mut().for_each(|byte| *byte ^= number as u8 | 1);
        state
    }

    fn checkpoint(number: u64) -> Checkpoint {
        checkpoint_of(number, 5_000)
    }

    fn checkpoint_of(number: u64, words: u32) -> Checkpoint {
        let nodes = [("source/a", 1, vec![1, 2]), ("pipeline/b", 2, vec![]), ("pipeline/c", 3, large(number, words))];
        Checkpoint { number, nodes: nodes.into_iter().map(|(k, f, s)| (k.to_owned(), (f, s))).collect() }
    }

    #[test]
    fn the_newest_whole_checkpoint_is_found_and_three_are_kept() {
        let dir = tempfile::tempdir().expect("folder");
        let mut store = Store::open(dir.path()).expect("store");
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
        // Whatever becomes of the damaged one, no start goes on from it any more, and it pushes no whole one out.
        assert!(newest.with_extension(DAMAGED).exists() && !newest.exists());
        assert_eq!(store.write(&checkpoint(6)).expect("written"), 3);
        for length in 0..bytes.len() {
            assert!(Manifest::decode(&bytes[..length]).is_err(), "cut to {length}");
        }
        store.clear().expect("cleared");
        assert_eq!(store.latest().expect("latest"), None);
    }

    #[test]
    fn a_checkpoint_writes_what_has_changed_and_keeps_what_it_needs() {
        const WORDS: u32 = 60_000;
        let dir = tempfile::tempdir().expect("folder");
        let bytes = |store: &Store| -> u64 {
            let files = store.disk.list(&store.dir).expect("a list");
            files.iter().filter(|file| file.name.ends_with(PIECES)).map(|file| file.length).sum()
        };
        let mut store = Store::open(dir.path()).expect("store");
        store.write(&checkpoint_of(1, WORDS)).expect("written");
        let whole = bytes(&store);
        assert!(whole >= large(1, WORDS).len() as u64);
        store.write(&Checkpoint { number: 2, ..checkpoint_of(1, WORDS) }).expect("written");
        assert_eq!(bytes(&store), whole, "nothing has changed");
        for number in 3..100 {
            store.write(&checkpoint_of(number, WORDS)).expect("written");
            assert!(bytes(&store) <= 5 * whole, "{number}: {} of {whole}", bytes(&store));
            assert_eq!(store.latest().expect("latest"), Some(checkpoint_of(number, WORDS)));
            if number % 20 == 0 {
                drop(store);
                store = Store::open(dir.path()).expect("store");
                assert_eq!(store.latest().expect("latest"), Some(checkpoint_of(number, WORDS)));
                for (number, path) in store.list().expect("a list") {
                    assert_eq!(store.read(&path).expect("whole").1, checkpoint_of(number, WORDS));
                }
            }
        }
        store.clear().expect("cleared");
        assert_eq!(bytes(&store), 0);
    }

    #[test]
    fn a_flipped_bit_in_a_piece_is_seen_and_the_checkpoint_before_is_taken() {
        let dir = tempfile::tempdir().expect("folder");
        let mut store = Store::open(dir.path()).expect("store");
        let mut other = checkpoint(2);
        other.nodes.insert("pipeline/c".to_owned(), (3, vec![7; 200_000]));
        store.write(&checkpoint(1)).expect("written");
        store.write(&other).expect("written");
        let path = store.path(2, PIECES);
        let mut bytes = fs::read(&path).expect("read");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, &bytes).expect("write");
        let mut store = {
            drop(store);
            Store::open(dir.path()).expect("store")
        };
        assert_eq!(store.latest().expect("latest"), Some(checkpoint(1)));
        // The same state again: no checkpoint may name the damaged piece, nor one that is gone.
        let again = Checkpoint { number: 3, ..other };
        store.write(&again).expect("written");
        assert_eq!(store.latest().expect("latest"), Some(again.clone()));
        // Nor does a copy under another name count.
        fs::rename(store.path(3, SUFFIX), store.path(30, SUFFIX)).expect("renamed");
        fs::remove_file(store.path(3, PIECES)).expect("removed");
        assert_eq!(store.latest().expect("latest"), Some(checkpoint(1)));
        let again = Checkpoint { number: 4, ..again };
        store.write(&again).expect("written");
        assert_eq!(store.latest().expect("latest"), Some(again));
    }

    #[test]
    fn a_checkpoint_that_cannot_be_read_for_now_is_not_set_aside() {
        let dir = tempfile::tempdir().expect("folder");
        let mut store = Store::open(dir.path()).expect("store");
        store.write(&checkpoint(1)).expect("written");
        let path = store.path(2, SUFFIX);
        // No way to read a folder as a file, and none that says the disk is damaged.
        fs::create_dir(&path).expect("a folder");
        let error = store.latest().expect_err("unreadable");
        assert_eq!((error.blame, error.retry), (Blame::Outside, crate::error::Retry::Never), "{error}");
        assert!(path.exists());
    }

    #[test]
    fn the_first_version_is_read() {
        let dir = tempfile::tempdir().expect("folder");
        let mut body = StateWriter::default();
        body.u64(9);
        body.u64(3);
        for (key, (fingerprint, state)) in &checkpoint(9).nodes {
            body.str(key);
            body.u64(*fingerprint);
            body.bytes(state);
        }
        let body = body.finish();
        let bytes = [&FIRST_MAGIC[..], &crc32c::crc32c(&body).to_le_bytes(), &body].concat();
        fs::write(dir.path().join("00000000000000000009.checkpoint"), bytes).expect("written");
        let mut store = Store::open(dir.path()).expect("store");
        assert_eq!(store.latest().expect("latest"), Some(checkpoint(9)));
        store.write(&checkpoint(10)).expect("written");
        assert_eq!(store.latest().expect("latest"), Some(checkpoint(10)));
    }

    /// The checkpoints of the corpus: the layouts of this version and of the one before, which must stay readable.
    fn corpus() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus/checkpoint")
    }

    /// A checkpoint with a state of each kind.
    fn manifest() -> Manifest {
        let piece = |number: u64| Piece { hash: u128::from(number) << 64 | 7, length: 9, file: number, offset: 3 };
        let nodes = [
            ("source/a", (1, State::Small(vec![1, 2, 3]))),
            ("pipeline/b", (2, State::Pieces(vec![piece(4), piece(5)]))),
            ("sink/c", (3, State::Small(Vec::new()))),
        ];
        Manifest { number: 42, nodes: nodes.into_iter().map(|(key, node)| (key.to_owned(), node)).collect() }
    }

    #[test]
    fn the_layout_stays_as_it_is() {
        let kept = fs::read(corpus().join("version-2.checkpoint")).expect("the corpus");
        assert_eq!(kept, manifest().encode());
        let first = Manifest::decode(&fs::read(corpus().join("version-1.checkpoint")).expect("the corpus"));
        let first = first.expect("readable");
        assert_eq!((first.number, first.nodes.len(), first.pieces().count()), (9, 2, 0));
    }

    #[test]
    fn no_damaged_manifest_is_read() {
        for entry in fs::read_dir(corpus()).expect("the corpus") {
            let bytes = fs::read(entry.expect("an entry").path()).expect("a file");
            for bit in 0..bytes.len() * 8 {
                let mut flipped = bytes.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                // The digit of the version alone is not under the checksum.
                let read = Manifest::decode(&flipped);
                assert!(read.is_err() || bit / 8 == 7, "bit {bit}");
            }
        }
    }

    #[test]
    fn a_second_process_on_the_same_folder_is_refused() {
        let dir = tempfile::tempdir().expect("folder");
        let first = Store::open(dir.path()).expect("store");
        assert!(Store::open(dir.path()).is_err());
        drop(first);
        assert!(Store::open(dir.path()).is_ok());
    }
    fn on(disk: &SimulatedDisk) -> Result<Store> {
        Store::on(Arc::new(disk.clone()), Path::new("state"), None)
    }

    fn newest(disk: &SimulatedDisk) -> u64 {
        let mut store = on(disk).expect("store");
        let found = store.latest().expect("latest").unwrap_or_default();
        if found.number > 0 {
            assert_eq!(found, checkpoint(found.number));
        }
        found.number
    }

    /// Writes checkpoints until something fails: the newest that was written, and the one that was begun.
    fn write_some(disk: &SimulatedDisk, from: u64) -> (u64, u64) {
        let Ok(mut store) = on(disk) else { return (from, from) };
        if store.latest().is_err() {
            return (from, from);
        }
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
        for seed in 0..8 {
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
                let mut store = on(&disk).expect("store");
                disk.power_off_after(operation);
                let cleared = store.clear().is_ok();
                let found = newest(&disk.crash());
                assert!(found == 0 || (found == written && !cleared), "seed {seed}, operation {operation}: {found}");
            }
        }
    }
}
