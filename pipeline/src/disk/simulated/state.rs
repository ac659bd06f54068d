//! What is on a simulated disk, and what of it is durable.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use super::Random;

/// What a disk writes as a whole or not at all, in bytes.
pub(super) const SECTOR: usize = 512;

#[derive(Clone, Debug)]
pub(super) struct State {
    pub(super) random: Random,
    /// The power is off: every operation fails.
    pub(super) dead: bool,
    pub(super) operations: u64,
    pub(super) power_off_after: Option<u64>,
    pub(super) fail_after: Option<u64>,
    pub(super) fail_times: u64,
    pub(super) fail_sync_after: Option<u64>,
    /// Bytes that still fit.
    pub(super) room: Option<u64>,
    pub(super) next_file: u64,
    pub(super) files: BTreeMap<u64, Content>,
    /// The names as a running process sees them.
    pub(super) names: BTreeMap<PathBuf, Node>,
    /// The names that survive a power loss for sure.
    pub(super) durable: BTreeMap<PathBuf, Node>,
    /// What lies between the two, in order.
    pub(super) unsynced: Vec<Naming>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Node {
    Folder,
    File(u64),
}

#[derive(Clone, Debug)]
pub(super) enum Naming {
    Added { path: PathBuf, node: Node },
    Renamed { from: PathBuf, to: PathBuf, node: Node },
    Removed { path: PathBuf, node: Node },
}

/// One file: as a running process sees it, as it surely survives, and the changes between, in order.
#[derive(Clone, Debug, Default)]
pub(super) struct Content {
    pub(super) seen: Vec<u8>,
    pub(super) durable: Vec<u8>,
    pub(super) unsynced: Vec<Change>,
}

#[derive(Clone, Debug)]
pub(super) enum Change {
    Written { offset: usize, bytes: Vec<u8> },
    Length(usize),
}

/// What becomes of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    Succeeds,
    /// It fails, and was perhaps half done.
    Fails,
    /// The power goes in the middle of it.
    PowerGoes,
}

impl Fate {
    pub(super) fn result(self) -> io::Result<()> {
        match self {
            Self::Succeeds => Ok(()),
            Self::Fails => Err(io::Error::other("simulated input/output error")),
            Self::PowerGoes => Err(power_is_off()),
        }
    }
}

pub(super) fn power_is_off() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the simulated power is off")
}

pub(super) fn is_root(path: &Path) -> bool {
    path.parent().is_none()
}

impl State {
    pub(super) fn new(random: Random) -> Self {
        Self {
            random,
            dead: false,
            operations: 0,
            power_off_after: None,
            fail_after: None,
            fail_times: 0,
            fail_sync_after: None,
            room: None,
            next_file: 0,
            files: BTreeMap::new(),
            names: BTreeMap::new(),
            durable: BTreeMap::new(),
            unsynced: Vec::new(),
        }
    }

    /// A power loss: some of what was not synced is there, the rest never was.
    pub(super) fn lose(&mut self) {
        let Self { random, files, durable, unsynced, names, .. } = self;
        for content in files.values_mut() {
            content.lose(random);
        }
        let odds = random.below(5);
        for change in unsynced.drain(..) {
            if random.below(4) < odds {
                change.apply(durable);
            }
        }
        let folders: Vec<PathBuf> =
            durable.iter().filter(|(_, node)| **node == Node::Folder).map(|(path, _)| path.clone()).collect();
        let there = |above: &Path| is_root(above) || folders.iter().any(|folder| folder == above);
        durable.retain(|path, _| path.ancestors().skip(1).all(there));
        names.clone_from(durable);
    }

    /// Counts an operation and says what becomes of it.
    pub(super) fn begin(&mut self) -> io::Result<Fate> {
        if self.dead {
            return Err(power_is_off());
        }
        self.operations += 1;
        if count_down(&mut self.power_off_after) {
            self.dead = true;
            return Ok(Fate::PowerGoes);
        }
        if !count_down(&mut self.fail_after) {
            return Ok(Fate::Succeeds);
        }
        self.fail_times = self.fail_times.saturating_sub(1);
        if self.fail_times > 0 {
            self.fail_after = Some(0);
        }
        Ok(Fate::Fails)
    }

    pub(super) fn begin_sync(&mut self) -> io::Result<Fate> {
        let fate = self.begin()?;
        let fails = fate != Fate::PowerGoes && count_down(&mut self.fail_sync_after);
        Ok(if fails { Fate::Fails } else { fate })
    }

    pub(super) fn file(&self, path: &Path) -> io::Result<u64> {
        match self.names.get(path) {
            Some(Node::File(id)) => Ok(*id),
            Some(Node::Folder) => Err(io::ErrorKind::IsADirectory.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    pub(super) fn content(&mut self, id: u64) -> &mut Content {
        self.files.entry(id).or_default()
    }

    pub(super) fn seen(&self, path: &Path) -> io::Result<&[u8]> {
        Ok(self.files.get(&self.file(path)?).map_or(&[], |content| content.seen.as_slice()))
    }

    pub(super) fn check_folder(&self, path: &Path) -> io::Result<()> {
        match self.names.get(path) {
            _ if is_root(path) => Ok(()),
            Some(Node::Folder) => Ok(()),
            Some(Node::File(_)) => Err(io::ErrorKind::NotADirectory.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    pub(super) fn add_file(&mut self) -> Node {
        self.next_file += 1;
        self.files.insert(self.next_file, Content::default());
        Node::File(self.next_file)
    }

    pub(super) fn name(&mut self, change: Naming) {
        change.apply(&mut self.names);
        self.unsynced.push(change);
    }

    pub(super) fn give_room(&mut self, bytes: usize) {
        if let Some(room) = &mut self.room {
            *room += bytes as u64;
        }
    }

    pub(super) fn set_len(&mut self, id: u64, length: usize) {
        let content = self.content(id);
        let before = content.seen.len();
        content.change(Change::Length(length));
        self.give_room(before.saturating_sub(length));
    }

    pub(super) fn sync_names(&mut self, folder: &Path) {
        for change in std::mem::take(&mut self.unsynced) {
            if change.is_in(folder) {
                change.apply(&mut self.durable);
            } else {
                self.unsynced.push(change);
            }
        }
    }
}

/// Whether this was the one to fail.
pub(super) fn count_down(left: &mut Option<u64>) -> bool {
    match left {
        Some(0) => {
            *left = None;
            true
        }
        Some(more) => {
            *more -= 1;
            false
        }
        None => false,
    }
}

impl Naming {
    pub(super) fn apply(&self, names: &mut BTreeMap<PathBuf, Node>) {
        match self {
            Self::Added { path, node } => {
                names.insert(path.clone(), *node);
            }
            Self::Renamed { from, to, node } => {
                if names.get(from) == Some(node) {
                    names.remove(from);
                }
                names.insert(to.clone(), *node);
            }
            Self::Removed { path, node } => {
                if names.get(path) == Some(node) {
                    names.remove(path);
                }
            }
        }
    }

    pub(super) fn is_in(&self, folder: &Path) -> bool {
        let within = |path: &Path| path.parent() == Some(folder);
        match self {
            Self::Added { path, .. } | Self::Removed { path, .. } => within(path),
            Self::Renamed { from, to, .. } => within(from) || within(to),
        }
    }
}

impl Content {
    pub(super) fn change(&mut self, change: Change) {
        change.apply(&mut self.seen, || true);
        self.unsynced.push(change);
    }

    pub(super) fn sync(&mut self) {
        for change in self.unsynced.drain(..) {
            change.apply(&mut self.durable, || true);
        }
    }

    /// A failed sync: some sectors reach the disk, the others never will. A new length waits for the next sync.
    pub(super) fn sync_in_part(&mut self, random: &mut Random) {
        let odds = random.below(5);
        for change in std::mem::take(&mut self.unsynced) {
            if let Change::Length(_) = change {
                self.unsynced.push(change);
            } else {
                change.apply(&mut self.durable, || random.below(4) < odds);
            }
        }
    }

    /// A power loss: some sectors and lengths had reached the disk, and that is all there is.
    pub(super) fn lose(&mut self, random: &mut Random) {
        let odds = random.below(5);
        for change in self.unsynced.drain(..) {
            change.apply(&mut self.durable, || random.below(4) < odds);
        }
        self.seen.clone_from(&self.durable);
    }
}

impl Change {
    /// Changes the parts that `keep` says, asked once per sector and once for a length.
    pub(super) fn apply(&self, to: &mut Vec<u8>, mut keep: impl FnMut() -> bool) {
        match self {
            Self::Length(length) => {
                if keep() {
                    to.resize(*length, 0);
                }
            }
            Self::Written { offset, bytes } => {
                let mut done = 0;
                while done < bytes.len() {
                    let at = offset + done;
                    let next = bytes.len().min((at / SECTOR + 1) * SECTOR - offset);
                    if keep() {
                        if to.len() < offset + next {
                            to.resize(offset + next, 0);
                        }
                        to[at..offset + next].copy_from_slice(&bytes[done..next]);
                    }
                    done = next;
                }
            }
        }
    }
}
