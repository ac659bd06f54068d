//! An append-only log of records on disk: under the inbox of push sources and the outbox of sinks.
//!
//! # Layout
//!
//! A folder of segments, each a file `<first record, 20 digits>.log`. All numbers are little-endian.
//!
//! | segment | bytes | |
//! | --- | --- | --- |
//! | magic | 8 | `TAILWLOG` |
//! | version | u32 | 1 |
//! | head length | u32 | |
//! | first lsn | u64 | as in the file name |
//! | checksum | u32 | CRC-32C of version, head length, first lsn and head |
//! | head | | what the owner knew when the segment began: see [`Log::commit`] |
//! | groups | | one per commit, to the end of the file |
//!
//! | group | bytes | |
//! | --- | --- | --- |
//! | magic | 4 | `F7 'G' 'R' 'P'` |
//! | body length | u32 | bytes of the records |
//! | checksum | u32 | CRC-32C of the group's offset in the file (u64), body length, and all that follows here |
//! | first lsn | u64 | |
//! | count | u32 | of records, at least 1 |
//! | synced | u64 | length of this file known to be durable when the group was written |
//! | records | | |
//!
//! | record | bytes | |
//! | --- | --- | --- |
//! | kind | u8 | the owner's; 255: a record that was lost to damage |
//! | ingest time | i64 | microseconds since 1970 |
//! | metadata length | u32 | |
//! | payload length | u32 | |
//! | metadata, payload | | |
//!
//! Records have consecutive numbers (`lsn`) from 0 on, and a segment follows the one before without a gap.
//!
//! # What a crash leaves, and what is damage
//!
//! A segment is written under another name, synced and renamed, and the one before it is synced first. So a crash leaves
//! one thing that is not whole: the last groups of the last segment. [`Log::open`] cuts them off. Anything else is damage to bytes
//! that were durable: a bad header, a bad group in an older segment, a gap, or a bad group before one whose `synced` reaches
//! past it. Then the log does not open, because going on would lose records in silence. [`salvage`] mends it, keeps what can be
//! read, and says what is lost.
//!
//! After an error of a sync the log is of no use any more: the operating system may have dropped the bytes and called them
//! clean, so that a second sync proves nothing. The next start reads what the disk has.

mod cursor;
mod format;
mod groups;
mod recovery;
mod salvage;
mod tail;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt::Debug;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use schemars::JsonSchema;
use serde::Deserialize;
use tracing::warn;

pub use self::cursor::Cursor;
#[cfg(any(test, fuzzing))]
pub(crate) use self::format::resealed;
use self::format::{GROUP_BYTES_MAX, GROUP_HEADER};
use self::groups::Groups;
pub use self::recovery::{Damage, Report, Segment, inspect};
use self::recovery::{damaged, scan, segment_path};
pub use self::salvage::{Mended, salvage};
use self::tail::{Tail, find_place};
use crate::disk::{Disk, NotWritten, remove_drafts, write_whole};
use crate::error::{Error, Result};

/// Capacity of the buffer that is kept from one commit to the next, in bytes: a single huge message shall not hold its
/// memory for ever.
const KEPT_BUFFER_BYTES: usize = 4 << 20;

/// What a commit waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Durability {
    /// The disk: what was committed survives a power loss.
    #[default]
    Power,
    /// The operating system: what was committed survives the end of the process, `kill -9` too, but not a power loss.
    Process,
}

/// How a log is kept.
#[derive(Clone, Copy, Debug)]
pub struct LogOptions {
    /// A segment with more bytes than this is followed by a new one. The unit in which room is given back: 64 MiB.
    pub segment_bytes: u64,
    /// What a commit waits for.
    pub durability: Durability,
}

impl Default for LogOptions {
    fn default() -> Self {
        Self { segment_bytes: 64 << 20, durability: Durability::Power }
    }
}

/// What was found when a log was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Opened {
    /// Whether there was none: it begins now, at record 0.
    pub created: bool,
    /// Bytes cut off the end: commits that never came back, because the process or the power ended in them.
    pub cut_bytes: u64,
}

/// What the owner put at the start of a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The first record of the segment: the head speaks of all records below.
    pub lsn: u64,
    /// The owner's bytes; empty in the first segment of a log.
    pub bytes: Bytes,
}

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its number.
    pub lsn: u64,
    /// The owner's.
    pub kind: u8,
    /// Microseconds since 1970.
    pub ingest_us: i64,
    /// The owner's.
    pub metadata: Bytes,
    /// The message or row itself.
    pub payload: Bytes,
}

/// A log, open for writing. Two on one folder would destroy each other: the owner holds a lock.
#[derive(Debug)]
pub struct Log {
    disk: Arc<dyn Disk>,
    folder: PathBuf,
    options: LogOptions,
    /// Oldest first, never empty; the last one is written to.
    segments: VecDeque<Kept>,
    tail: Tail,
    /// Room for a group's header, and the records not yet committed.
    buffer: Vec<u8>,
    buffered: u32,
    /// All records below are committed. Cursors watch it.
    end: Arc<AtomicU64>,
    /// Why nothing can be written any more.
    poisoned: Option<String>,
    /// A new segment could not be made the last time, which was logged.
    rotation_failed: bool,
}

/// A segment that is there.
#[derive(Clone, Copy, Debug)]
struct Kept {
    first_lsn: u64,
    bytes: u64,
}

impl Log {
    /// Opens the log in a folder, or begins one, and cuts off what a crash left of its last commits.
    ///
    /// Errors: the disk's; and damage to what was durable, with file, byte and what to do. Neither is tried again.
    pub fn open(disk: Arc<dyn Disk>, folder: &Path, options: LogOptions) -> Result<(Self, Opened)> {
        let failed = |error: io::Error| Error::outside(format!("log `{}`", folder.display())).because(error).fatal();
        disk.create_folder(folder).map_err(failed)?;
        remove_drafts(&*disk, folder).map_err(failed)?;
        let mut report = scan(&disk, folder).map_err(failed)?;
        if let Some(damage) = report.damage.iter().find(|damage| !damage.torn) {
            return Err(damaged(&damage.path, damage.offset, &damage.what));
        }
        let mut opened = Opened::default();
        let tail = if let Some(last) = report.segments.last_mut() {
            opened.cut_bytes = last.bytes - last.sound_bytes;
            if opened.cut_bytes > 0 {
                let (path, cut) = (last.path.display(), opened.cut_bytes);
                warn!(
                    "`{path}`: its last {cut} bytes are no whole commit and are cut off: what a crash left of one, of which \
                     nobody was told, or damage by the disk"
                );
            }
            last.bytes = last.sound_bytes;
            Tail::open(&*disk, last).map_err(failed)?
        } else {
            opened.created = true;
            let tail = Tail::make(&*disk, &segment_path(folder, 0), 0, &[]).map_err(|error| failed(error.into()))?;
            report.segments.push(Segment::new(segment_path(folder, 0), 0, tail.length));
            tail
        };
        let log = Self {
            segments: report.segments.iter().map(|s| Kept { first_lsn: s.first_lsn, bytes: s.bytes }).collect(),
            end: Arc::new(AtomicU64::new(report.next_lsn())),
            disk,
            folder: folder.to_owned(),
            options,
            tail,
            buffer: vec![0; GROUP_HEADER],
            buffered: 0,
            poisoned: None,
            rotation_failed: false,
        };
        Ok((log, opened))
    }

    /// Buffers a record and says its number. It is in memory only until the next commit: the caller bounds
    /// [`Log::buffered_bytes`]. Kind 255 is taken.
    pub fn append(&mut self, kind: u8, ingest_us: i64, metadata: &[u8], payload: &[u8]) -> u64 {
        let lsn = self.next_lsn();
        format::push_record(&mut self.buffer, kind, ingest_us, metadata, payload);
        self.buffered += 1;
        lsn
    }

    /// Bytes that the next commit writes; zero if there is nothing to commit.
    pub fn buffered_bytes(&self) -> usize {
        if self.buffered == 0 { 0 } else { self.buffer.len() }
    }

    /// Makes all buffered records durable and says the number of the next one: all below are.
    ///
    /// When the segment is full, a new one begins with what `head` gives: the owner's knowledge of all records so far (for
    /// an inbox its memory of duplicates), so that older segments can go. Nothing is buffered when it is called, so every
    /// record it knows of is durable. An owner without such knowledge passes `Vec::new`.
    ///
    /// Errors: with [`Retry::BackOff`](crate::error::Retry::BackOff) nothing changed (the disk is full, say) and the records are
    /// still buffered, more may be appended, and calling this again mends it. With
    /// [`Retry::Never`](crate::error::Retry::Never) a sync failed: it is not known what the disk holds, and every later
    /// call fails too.
    pub fn commit(&mut self, head: impl FnOnce() -> Vec<u8>) -> Result<u64> {
        self.check_sound()?;
        if self.buffered > 0 {
            self.write_group()?;
        }
        if self.tail.length - self.tail.header_bytes >= self.options.segment_bytes {
            self.rotate(&head())?;
        }
        Ok(self.committed_lsn())
    }

    /// Removes the segments whose records are all below `lsn`; never the newest segment. To save room: nothing depends on it.
    ///
    /// Errors: the disk's. After a failed sync the log is of no use any more, see [`Log::commit`].
    pub fn trim(&mut self, lsn: u64) -> Result<()> {
        self.check_sound()?;
        while self.segments.get(1).is_some_and(|next| next.first_lsn <= lsn) {
            let path = segment_path(&self.folder, self.segments[0].first_lsn);
            self.disk.remove_if_there(&path).map_err(|error| failed(&path, error))?;
            self.segments.pop_front();
            // One by one: of several removals a power loss could keep any, and leave a gap.
            self.sync_folder()?;
        }
        Ok(())
    }

    /// Drops the records from `lsn` on, durably, and those that are buffered. Their numbers will be given again; cursors
    /// made before are void. After a crash in the middle, more or all of the dropped records may be back: drop them again.
    ///
    /// Errors: `lsn` is not between [`Log::first_lsn`] and [`Log::committed_lsn`]; the disk's, after which the log is of no use
    /// any more. None of them is tried again.
    pub fn truncate(&mut self, lsn: u64) -> Result<()> {
        self.check_sound()?;
        self.check_kept(lsn)?;
        self.drop_buffered();
        if lsn == self.committed_lsn() && !self.tail.unsure {
            return Ok(());
        }
        // Readers first: they must not look for what is about to go.
        self.end.store(lsn, Ordering::Release);
        self.cut(lsn).map_err(|error| self.poison("cutting off its end failed", error))
    }

    /// Begins anew with record `lsn`, beyond the last one: the owner knows of records that are not here, and needs none of
    /// those that are. Cursors made before are void. After a crash in the middle, some are still here: call it again.
    ///
    /// Errors: `lsn` is below [`Log::committed_lsn`]; the disk's, after which the log is of no use any more. Neither is tried
    /// again.
    pub fn skip_to(&mut self, lsn: u64) -> Result<()> {
        self.check_sound()?;
        if lsn < self.committed_lsn() {
            return Err(Error::internal(format!("log `{}`: no way back to record {lsn}", self.folder.display())));
        }
        self.drop_buffered();
        self.begin_anew(lsn).map_err(|error| self.poison("beginning it anew failed", error))
    }

    /// Gives the numbers up to `lsn` to records that are lost, durably: the owner knows of records that are not here any more,
    /// and needs those that are. Cursors pass over them.
    ///
    /// Errors: as of [`Log::commit`].
    pub fn pass_over(&mut self, lsn: u64) -> Result<()> {
        while self.next_lsn() < lsn {
            format::push_record(&mut self.buffer, format::LOST, 0, &[], &[]);
            self.buffered += 1;
            if self.buffered_bytes() >= KEPT_BUFFER_BYTES {
                self.commit(Vec::new)?;
            }
        }
        self.commit(Vec::new).map(drop)
    }

    /// A cursor that gives the records from `lsn` on, and goes on with those that are committed later.
    ///
    /// Errors: `lsn` is not between [`Log::first_lsn`] and [`Log::committed_lsn`]: a reader that relies on it would miss
    /// records without knowing.
    pub fn records_from(&self, lsn: u64) -> Result<Cursor> {
        self.check_kept(lsn)?;
        let after = self.segments.partition_point(|segment| segment.first_lsn <= lsn);
        let segment = self.segments[after.saturating_sub(1)].first_lsn;
        Ok(Cursor::new(self.disk.clone(), self.folder.clone(), self.end.clone(), lsn, segment))
    }

    /// The head of the newest segment, read from the disk.
    pub fn head(&self) -> Result<Head> {
        let lsn = self.newest().first_lsn;
        let path = segment_path(&self.folder, lsn);
        match Groups::open(&self.disk, &path, lsn).map_err(|error| failed(&path, error))? {
            Ok((_, bytes)) => Ok(Head { lsn, bytes }),
            Err(what) => Err(damaged(&path, 0, what)),
        }
    }

    /// The oldest record that is kept; the next one if there is none.
    pub fn first_lsn(&self) -> u64 {
        self.segments.front().map_or(0, |segment| segment.first_lsn)
    }

    /// The number that the next appended record gets.
    pub fn next_lsn(&self) -> u64 {
        self.committed_lsn() + u64::from(self.buffered)
    }

    /// All records below are committed.
    pub fn committed_lsn(&self) -> u64 {
        self.end.load(Ordering::Acquire)
    }

    /// Bytes of all segments on disk.
    pub fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.bytes).sum()
    }

    /// The folder it is in.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    fn write_group(&mut self) -> Result<()> {
        if self.buffer.len() > GROUP_BYTES_MAX {
            let much = self.buffer.len();
            return Err(Error::internal(format!("one commit of {much} bytes: at most {GROUP_BYTES_MAX} are allowed")));
        }
        let lsn = self.committed_lsn();
        let path = self.newest_path();
        let Tail { file, length, synced, cut_needed, unsure, .. } = &mut self.tail;
        if *cut_needed {
            file.set_len(*length).map_err(|error| failed(&path, error))?;
            *cut_needed = false;
        }
        format::seal(&mut self.buffer, *length, lsn, self.buffered, *synced);
        if let Err(error) = file.write_all(&self.buffer) {
            *cut_needed = file.set_len(*length).is_err();
            *unsure = true;
            return Err(failed(&path, error));
        }
        if self.options.durability == Durability::Power
            && let Err(error) = file.sync_data()
        {
            return Err(self.poison("a sync failed", error));
        }
        let tail = &mut self.tail;
        tail.length += self.buffer.len() as u64;
        tail.unsure = false;
        if self.options.durability == Durability::Power {
            tail.synced = tail.length;
        }
        let length = tail.length;
        self.newest_mut().bytes = length;
        let next = lsn + u64::from(self.buffered);
        self.drop_buffered();
        self.end.store(next, Ordering::Release);
        Ok(())
    }

    /// Begins a new segment. If it cannot be made the old one goes on: its records are safe, so that is no error.
    fn rotate(&mut self, head: &[u8]) -> Result<()> {
        if head.len() > GROUP_BYTES_MAX {
            let much = head.len();
            return Err(Error::internal(format!("a head of {much} bytes: at most {GROUP_BYTES_MAX} are allowed")));
        }
        // Only the last segment may end torn.
        if self.tail.synced < self.tail.length {
            if let Err(error) = self.tail.file.sync_data() {
                return Err(self.poison("a sync failed", error));
            }
            self.tail.synced = self.tail.length;
        }
        let lsn = self.committed_lsn();
        match Tail::make(&*self.disk, &segment_path(&self.folder, lsn), lsn, head) {
            Ok(tail) => {
                self.segments.push_back(Kept { first_lsn: lsn, bytes: tail.length });
                self.tail = tail;
                self.rotation_failed = false;
                Ok(())
            }
            Err(NotWritten::Unchanged(error)) => {
                if !self.rotation_failed {
                    warn!("log `{}`: no new segment could be made, the old one grows: {error}", self.folder.display());
                }
                self.rotation_failed = true;
                Ok(())
            }
            Err(NotWritten::Unknown(error)) => Err(self.poison("a new segment may or may not be there", error)),
        }
    }

    fn begin_anew(&mut self, lsn: u64) -> io::Result<()> {
        // The newest first, each removal durable: what a crash leaves has no gap.
        for segment in self.segments.iter().rev() {
            self.disk.remove_if_there(&segment_path(&self.folder, segment.first_lsn))?;
            self.disk.sync_folder(&self.folder)?;
        }
        self.tail = Tail::make(&*self.disk, &segment_path(&self.folder, lsn), lsn, &[])?;
        self.segments = VecDeque::from([Kept { first_lsn: lsn, bytes: self.tail.length }]);
        self.end.store(lsn, Ordering::Release);
        Ok(())
    }

    /// Removes the segments from `lsn` on and cuts the one that holds it.
    fn cut(&mut self, lsn: u64) -> io::Result<()> {
        while self.segments.len() > 1 && self.newest().first_lsn >= lsn {
            self.disk.remove_if_there(&self.newest_path())?;
            // One by one, the newest first: of several removals a power loss could keep any, and leave a gap.
            self.disk.sync_folder(&self.folder)?;
            self.segments.pop_back();
        }
        let Kept { first_lsn, bytes } = *self.newest();
        let mut segment = Segment::new(self.newest_path(), first_lsn, bytes);
        let place = find_place(&self.disk, &segment.path, first_lsn, lsn)?;
        segment.header_bytes = place.header_bytes;
        segment.sound_bytes = place.offset;
        if let Some(group) = place.shortened {
            // A shorter group written over the longer one could be torn by a crash: records below `lsn` would be lost.
            let kept = usize::try_from(place.offset).unwrap_or(usize::MAX);
            let mut bytes = self.disk.read_range(&segment.path, 0, kept)?;
            bytes.extend_from_slice(&group);
            write_whole(&*self.disk, &segment.path, &bytes)?;
            segment.sound_bytes = bytes.len() as u64;
        }
        // In this process no sync failed: nothing has to be written again.
        segment.durable_bytes = segment.sound_bytes;
        self.tail = Tail::open(&*self.disk, &segment)?;
        self.newest_mut().bytes = segment.sound_bytes;
        Ok(())
    }

    fn check_sound(&self) -> Result<()> {
        match &self.poisoned {
            None => Ok(()),
            Some(why) => Err(Error::outside(format!(
                "log `{}`: {why}. What the disk holds is not known any more; check the disk and start again",
                self.folder.display()
            ))
            .fatal()),
        }
    }

    fn check_kept(&self, lsn: u64) -> Result<()> {
        let (first, end) = (self.first_lsn(), self.committed_lsn());
        if (first..=end).contains(&lsn) {
            return Ok(());
        }
        let told = format!(
            "log `{}` begins at record {first} and ends before {end}, but it should go on at {lsn}: \
             files of it were removed, or it and the checkpoints are of different times",
            self.folder.display()
        );
        Err(Error::outside(told).fatal())
    }

    /// From now on nothing can be written.
    fn poison(&mut self, what: &str, error: io::Error) -> Error {
        let why = format!("{what} ({error})");
        let told = format!("log `{}`: {why}. What the disk holds is not known any more", self.folder.display());
        self.poisoned = Some(why);
        Error::outside(told).because(error).fatal()
    }

    fn sync_folder(&mut self) -> Result<()> {
        match self.disk.sync_folder(&self.folder) {
            Ok(()) => Ok(()),
            Err(error) => Err(self.poison("a sync of its folder failed", error)),
        }
    }

    fn newest(&self) -> &Kept {
        &self.segments[self.segments.len() - 1]
    }

    fn newest_mut(&mut self) -> &mut Kept {
        let last = self.segments.len() - 1;
        &mut self.segments[last]
    }

    fn newest_path(&self) -> PathBuf {
        segment_path(&self.folder, self.newest().first_lsn)
    }

    fn drop_buffered(&mut self) {
        self.buffer.truncate(GROUP_HEADER);
        self.buffer.shrink_to(KEPT_BUFFER_BYTES);
        self.buffered = 0;
    }
}

fn failed(path: &Path, error: io::Error) -> Error {
    Error::outside(format!("`{}`", path.display())).because(error)
}
