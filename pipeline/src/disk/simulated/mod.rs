//! A disk in memory that loses power: for tests, of this crate and of others.
//!
//! What a power loss does here, all of it drawn from the seed:
//!
//! - Of the bytes written since the last sync of a file, any subset of the 512-byte sectors is kept, in any order; lost
//!   sectors between kept ones read as zeros. A cut ([`DiskFile::set_len`]) is kept or lost, whatever came after it.
//! - Of the names made, changed and removed since the last sync of their folder, any subset is kept. A rename is kept or
//!   lost as a whole; a file whose creation was lost is gone, its synced bytes with it.
//!
//! That is more than real file systems lose (they keep some order), so what survives here survives there.

mod state;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use self::state::{Change, Content, Fate, Naming, Node, State, is_root};
use super::{Disk, DiskFile, Entry};

/// Numbers from a seed, the same on every machine (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Equal seeds give equal numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`; zero if `bound` is.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.number().checked_rem(bound).unwrap_or(0)
    }

    /// Changes bytes in one of the ways in which files go wrong.
    pub fn damage(&mut self, bytes: &mut Vec<u8>) {
        let length = bytes.len() as u64;
        let at = self.below(length) as usize;
        let to = at + self.below(length - at as u64 + 1) as usize;
        match self.below(6) {
            _ if bytes.is_empty() => bytes.push(self.number() as u8),
            0 => bytes[at] ^= 1 << self.below(8),
            1 => bytes[at] = [0, 1, 0x7F, 0x80, 0xFF][self.below(5) as usize],
            2 => bytes.truncate(at),
            3 => drop(bytes.drain(at..to)),
            4 => bytes.extend_from_within(at..to),
            _ => bytes[at..to].fill(0),
        }
    }
}

/// A disk in memory. Clones are the same disk.
#[derive(Clone, Debug)]
pub struct SimulatedDisk {
    state: Arc<Mutex<State>>,
}

impl SimulatedDisk {
    /// An empty disk whose losses come from `seed`.
    pub fn new(seed: u64) -> Self {
        Self::of(State::new(Random::new(seed)))
    }

    fn of(state: State) -> Self {
        Self { state: Arc::new(Mutex::new(state)) }
    }

    /// Operations so far, reads included: what [`SimulatedDisk::power_off_after`] counts.
    pub fn operations(&self) -> u64 {
        lock(&self.state).operations
    }

    /// Lets `operations` more succeed; the power goes in the middle of the one after them, and every later one fails.
    pub fn power_off_after(&self, operations: u64) {
        lock(&self.state).power_off_after = Some(operations);
    }

    /// Lets `operations` more succeed and fails the `times` after them. A write that fails is perhaps half done, or wholly; for
    /// a sync see [`SimulatedDisk::fail_sync_after`].
    pub fn fail_after(&self, operations: u64, times: u64) {
        let mut state = lock(&self.state);
        (state.fail_after, state.fail_times) = (Some(operations), times);
    }

    /// Lets `syncs` more succeed and fails the one after them, once. Any part of the bytes that it was to make durable is
    /// gone for ever, although reads still show them and the next sync succeeds. Names and lengths are not forgotten like
    /// that: file systems keep them in a journal.
    pub fn fail_sync_after(&self, syncs: u64) {
        lock(&self.state).fail_sync_after = Some(syncs);
    }

    /// Lets that many more bytes fit; the write that does not is done in part. `None`: as much as you like.
    /// With no byte left no file can be made either. Cutting and removing give bytes back.
    pub fn set_room(&self, bytes: Option<u64>) {
        lock(&self.state).room = bytes;
    }

    /// Takes back every failure asked for; any number of bytes fits.
    pub fn calm(&self) {
        let mut state = lock(&self.state);
        state.power_off_after = None;
        state.fail_after = None;
        state.fail_sync_after = None;
        state.room = None;
    }

    /// Whether the power is off, or another disk went on from this one.
    pub fn is_off(&self) -> bool {
        lock(&self.state).dead
    }

    /// The disk as it is found when the power comes back. Files still open on this one only give errors.
    #[must_use]
    pub fn crash(&self) -> Self {
        let mut found = self.take_over();
        found.lose();
        Self::of(found)
    }

    /// The disk as the next process finds it after `kill -9`: nothing is lost, but nothing more became durable.
    #[must_use]
    pub fn kill(&self) -> Self {
        Self::of(self.take_over())
    }

    /// Puts a file there, durable, whatever was there before; its folders too.
    pub fn install(&self, path: &Path, bytes: &[u8]) {
        let mut state = lock(&self.state);
        for above in path.ancestors().skip(1).filter(|above| !is_root(above)) {
            state.names.insert(above.to_owned(), Node::Folder);
            state.durable.insert(above.to_owned(), Node::Folder);
        }
        let node = state.add_file();
        if let Node::File(id) = node {
            state.files.insert(id, Content { seen: bytes.to_vec(), durable: bytes.to_vec(), unsynced: Vec::new() });
        }
        state.names.insert(path.to_owned(), node);
        state.durable.insert(path.to_owned(), node);
    }

    /// The state, for the disk that goes on from this one, which is switched off.
    fn take_over(&self) -> State {
        let mut state = lock(&self.state);
        let mut next = state.clone();
        state.dead = true;
        next.dead = false;
        next.power_off_after = None;
        next.fail_after = None;
        next.fail_sync_after = None;
        next.random = Random::new(state.random.number());
        next
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A file open on the simulated disk.
#[derive(Debug)]
struct SimulatedFile {
    state: Arc<Mutex<State>>,
    id: u64,
}

impl Write for SimulatedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = lock(&self.state);
        let fate = state.begin()?;
        let mut length = bytes.len();
        if fate != Fate::Succeeds {
            let done = state.random.below(length as u64 + 1);
            // All of it and nothing of it are the cases that code forgets.
            length = match state.random.below(3) {
                0 => 0,
                1 => length,
                _ => usize::try_from(done).unwrap_or(length),
            };
        }
        if let Some(room) = &mut state.room {
            length = length.min(usize::try_from(*room).unwrap_or(usize::MAX));
            *room -= length as u64;
            if fate == Fate::Succeeds && length == 0 && !bytes.is_empty() {
                return Err(io::ErrorKind::StorageFull.into());
            }
        }
        let content = state.content(self.id);
        content.change(Change::Written { offset: content.seen.len(), bytes: bytes[..length].to_vec() });
        fate.result().map(|()| length)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl DiskFile for SimulatedFile {
    fn sync_data(&mut self) -> io::Result<()> {
        let mut state = lock(&self.state);
        let fate = state.begin_sync()?;
        let mut random = state.random.clone();
        match fate {
            Fate::Succeeds => state.content(self.id).sync(),
            Fate::Fails => state.content(self.id).sync_in_part(&mut random),
            // The loss itself decides.
            Fate::PowerGoes => {}
        }
        state.random = random;
        fate.result()
    }

    fn sync_all(&mut self) -> io::Result<()> {
        self.sync_data()
    }

    fn set_len(&mut self, length: u64) -> io::Result<()> {
        let mut state = lock(&self.state);
        let fate = state.begin()?;
        if fate != Fate::Fails {
            let length = usize::try_from(length).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
            state.set_len(self.id, length);
        }
        fate.result()
    }

    fn overwrite(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut state = lock(&self.state);
        let fate = state.begin()?;
        let offset = usize::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        if fate != Fate::Fails {
            state.content(self.id).change(Change::Written { offset, bytes: bytes.to_vec() });
        }
        fate.result()
    }
}

impl Disk for SimulatedDisk {
    fn create(&self, path: &Path) -> io::Result<Box<dyn DiskFile>> {
        let mut state = lock(&self.state);
        let fate = state.begin()?;
        state.check_folder(path.parent().unwrap_or(Path::new("")))?;
        let id = match state.file(path) {
            _ if fate == Fate::Fails => 0,
            Ok(id) => {
                state.set_len(id, 0);
                id
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Err(_) if state.room == Some(0) => return Err(io::ErrorKind::StorageFull.into()),
            Err(_) => {
                let node = state.add_file();
                state.name(Naming::Added { path: path.to_owned(), node });
                state.file(path)?
            }
        };
        fate.result()?;
        Ok(Box::new(SimulatedFile { state: self.state.clone(), id }))
    }

    fn append(&self, path: &Path) -> io::Result<(Box<dyn DiskFile>, u64)> {
        let mut state = lock(&self.state);
        state.begin()?.result()?;
        let id = state.file(path)?;
        let length = state.seen(path)?.len() as u64;
        Ok((Box::new(SimulatedFile { state: self.state.clone(), id }), length))
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        self.read_range(path, 0, usize::MAX)
    }

    fn read_range(&self, path: &Path, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut state = lock(&self.state);
        state.begin()?.result()?;
        let seen = state.seen(path)?;
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(seen.len());
        let to = from.saturating_add(length).min(seen.len());
        Ok(seen[from..to].to_vec())
    }

    fn list(&self, folder: &Path) -> io::Result<Vec<Entry>> {
        let mut state = lock(&self.state);
        state.begin()?.result()?;
        state.check_folder(folder)?;
        let inside = state.names.iter().filter(|(path, _)| path.parent() == Some(folder));
        let entry = |(path, node): (&PathBuf, &Node)| {
            let name = path.file_name()?.to_str()?.to_owned();
            let length = match node {
                Node::Folder => 0,
                Node::File(id) => state.files.get(id).map_or(0, |content| content.seen.len() as u64),
            };
            Some(Entry { name, length, folder: *node == Node::Folder })
        };
        Ok(inside.filter_map(entry).collect())
    }

    fn create_folder(&self, folder: &Path) -> io::Result<()> {
        let mut state = lock(&self.state);
        let fate = state.begin()?;
        let mut missing: Vec<&Path> = folder.ancestors().filter(|above| state.check_folder(above).is_err()).collect();
        if missing.iter().any(|path| state.names.contains_key(*path)) {
            return Err(io::ErrorKind::NotADirectory.into());
        }
        // Before the last of them is made, those above it are durable.
        let mut left = match fate {
            Fate::Succeeds => missing.len() as u64,
            Fate::Fails => 0,
            Fate::PowerGoes => state.random.below(missing.len() as u64 + 1),
        };
        let there = folder.ancestors().find(|above| state.check_folder(above).is_ok());
        if let Some(above) = there.and_then(Path::parent).filter(|_| left > 0 || fate == Fate::Succeeds) {
            state.sync_names(above);
        }
        while let Some(path) = missing.pop().filter(|_| left > 0) {
            left -= 1;
            state.name(Naming::Added { path: path.to_owned(), node: Node::Folder });
            if left > 0 || fate == Fate::Succeeds {
                state.sync_names(path.parent().unwrap_or(Path::new("")));
            }
        }
        fate.result()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = lock(&self.state);
        let fate = state.begin()?;
        let node = Node::File(state.file(from)?);
        state.check_folder(to.parent().unwrap_or(Path::new("")))?;
        if fate != Fate::Fails {
            state.name(Naming::Renamed { from: from.to_owned(), to: to.to_owned(), node });
        }
        fate.result()
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = lock(&self.state);
        let fate = state.begin()?;
        let id = state.file(path)?;
        if fate != Fate::Fails {
            state.name(Naming::Removed { path: path.to_owned(), node: Node::File(id) });
            let length = state.content(id).seen.len();
            state.give_room(length);
        }
        fate.result()
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        let mut state = lock(&self.state);
        state.begin()?.result()?;
        Ok(is_root(path) || state.names.contains_key(path))
    }

    fn sync_folder(&self, folder: &Path) -> io::Result<()> {
        let mut state = lock(&self.state);
        let fate = state.begin_sync()?;
        state.check_folder(folder)?;
        if fate == Fate::Succeeds {
            state.sync_names(folder);
        }
        fate.result()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::state::SECTOR;
    use super::*;

    fn write(disk: &SimulatedDisk, name: &str, bytes: &[u8]) -> Box<dyn DiskFile> {
        let mut file = disk.create(Path::new(name)).expect("created");
        file.write_all(bytes).expect("written");
        file
    }

    /// A file with one synced sector and two more that are not.
    fn three_sectors(seed: u64) -> SimulatedDisk {
        let disk = SimulatedDisk::new(seed);
        let mut file = write(&disk, "a", &[1; SECTOR]);
        file.sync_data().expect("synced");
        disk.sync_folder(Path::new("")).expect("synced");
        file.write_all(&[2; 2 * SECTOR]).expect("written");
        disk
    }

    #[test]
    fn any_subset_of_the_sectors_survives_and_what_was_synced_always() {
        let mut seen = BTreeSet::new();
        for seed in 0..200 {
            let bytes = three_sectors(seed).crash().read(Path::new("a")).expect("read");
            assert_eq!(bytes[..SECTOR], [1; SECTOR]);
            seen.insert(bytes.chunks(SECTOR).map(|sector| sector[0]).collect::<Vec<u8>>());
        }
        let subsets: [&[u8]; 4] = [&[1], &[1, 0, 2], &[1, 2], &[1, 2, 2]];
        assert_eq!(seen, subsets.into_iter().map(<[u8]>::to_vec).collect());
    }

    #[test]
    fn a_kill_loses_nothing_and_makes_nothing_durable() {
        let disk = three_sectors(1);
        let next = disk.kill();
        assert!(disk.is_off() && disk.read(Path::new("a")).is_err());
        assert_eq!(next.read(Path::new("a")).expect("read").len(), 3 * SECTOR);
        let lengths = (0..200).map(|seed| three_sectors(seed).kill().crash().read(Path::new("a")).expect("read").len());
        assert_eq!(lengths.min(), Some(SECTOR));
    }

    #[test]
    fn a_failed_sync_forgets_bytes_that_are_still_read() {
        let mut lost = false;
        for seed in 0..50 {
            let disk = three_sectors(seed);
            let (mut file, _) = disk.append(Path::new("a")).expect("opened");
            disk.fail_sync_after(0);
            assert!(file.sync_data().is_err());
            file.sync_data().expect("the next one succeeds");
            assert_eq!(disk.read(Path::new("a")).expect("read").len(), 3 * SECTOR);
            lost |= disk.crash().read(Path::new("a")).expect("read").len() < 3 * SECTOR;
        }
        assert!(lost);
    }

    #[test]
    fn a_rename_gives_the_old_file_or_the_new_one() {
        let mut seen = BTreeSet::new();
        for seed in 0..100 {
            let disk = SimulatedDisk::new(seed);
            for (name, bytes) in [("new", b"new"), ("name", b"old")] {
                write(&disk, name, bytes).sync_all().expect("synced");
            }
            disk.sync_folder(Path::new("")).expect("synced");
            disk.rename(Path::new("new"), Path::new("name")).expect("renamed");
            let found = disk.crash();
            let bytes = found.read(Path::new("name")).expect("never neither");
            assert_eq!(found.exists(Path::new("new")).expect("looked"), bytes == b"old");
            seen.insert(bytes);
        }
        assert_eq!(seen.len(), 2);
    }

    #[test]
    fn the_power_goes_and_stays_off_and_a_full_disk_takes_a_part() {
        let disk = SimulatedDisk::new(1);
        let mut file = write(&disk, "a", b"");
        disk.set_room(Some(3));
        assert_eq!(file.write(b"hello").expect("a part"), 3);
        assert_eq!(file.write(b"lo").expect_err("full").kind(), io::ErrorKind::StorageFull);
        assert_eq!(disk.create(Path::new("b")).expect_err("full").kind(), io::ErrorKind::StorageFull);
        file.set_len(1).expect("cut");
        assert_eq!(file.write(b"llo").expect("what the cut gave back"), 2);
        disk.power_off_after(1);
        assert!(disk.exists(Path::new("a")).is_ok());
        assert!(disk.exists(Path::new("a")).is_err() && disk.read(Path::new("a")).is_err() && file.sync_all().is_err());
        assert!(disk.is_off());
    }
}
