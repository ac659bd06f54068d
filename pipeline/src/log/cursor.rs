//! Reads records in order, also while more are appended.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::{Buf, Bytes};

use super::groups::{Groups, Step};
use super::recovery::{damaged, segment_path};
use super::{Record, format};
use crate::disk::Disk;
use crate::error::{Error, Result};

/// A place in a log, from which records are read in order.
///
/// It does not borrow the [`Log`](super::Log): another thread may go on appending. It sees what was committed. Memory: what is
/// read at once (1 MiB), or one group if that is longer; the payloads it gives share that memory, so keeping one keeps it all.
///
/// It passes over numbers whose records [`salvage`](super::salvage) has found to be lost.
///
/// After [`Log::truncate`](super::Log::truncate) a cursor made before is void: make a new one.
#[derive(Debug)]
pub struct Cursor {
    disk: Arc<dyn Disk>,
    folder: PathBuf,
    /// Committed records are below.
    end: Arc<AtomicU64>,
    /// The first record wanted.
    from: u64,
    /// The next record in the file.
    next: u64,
    /// The segment it is in, once opened, and where that begins.
    groups: Option<Groups>,
    segment: u64,
    /// What is left of the group it is in.
    records: Bytes,
    records_left: u32,
}

impl Cursor {
    /// From record `from` on, which is in the segment that begins at `segment`.
    pub(super) fn new(disk: Arc<dyn Disk>, folder: PathBuf, end: Arc<AtomicU64>, from: u64, segment: u64) -> Self {
        let records = Bytes::new();
        Self { disk, folder, end, from, next: segment, groups: None, segment, records, records_left: 0 }
    }

    /// The record that [`Cursor::read`] gives next.
    pub fn lsn(&self) -> u64 {
        self.next.max(self.from)
    }

    /// The next record, or nothing if no more are committed by now: ask again later.
    ///
    /// Errors: the disk's (to be tried again), a record that was trimmed away, and damage (neither is).
    pub fn read(&mut self) -> Result<Option<Record>> {
        let end = self.end.load(Ordering::Acquire);
        loop {
            if self.lsn() >= end {
                return Ok(None);
            }
            if self.records_left == 0 {
                self.next_group()?;
                continue;
            }
            let record = format::record(&self.records, self.next);
            let Some((record, length)) = record else { return Err(self.damaged("a record is longer than its group")) };
            self.records.advance(length);
            self.records_left -= 1;
            self.next += 1;
            if record.lsn >= self.from && record.kind != format::LOST {
                return Ok(Some(record));
            }
        }
    }

    /// Goes on to the next group that has a wanted record.
    fn next_group(&mut self) -> Result<()> {
        let Some(groups) = &mut self.groups else { return self.open_segment() };
        match groups.step(self.next).map_err(|error| failed(&self.folder, self.segment, error))? {
            Step::Group { header, bytes, .. } => {
                let after = header.first_lsn + u64::from(header.count);
                if after <= self.from {
                    self.next = after;
                } else {
                    self.records = bytes.slice(format::GROUP_HEADER..);
                    self.records_left = header.count;
                }
                Ok(())
            }
            Step::End if self.next > self.segment => {
                self.segment = self.next;
                self.groups = None;
                Ok(())
            }
            Step::End => Err(self.damaged("a committed group is missing")),
            Step::Damaged { what, .. } => Err(self.damaged(what)),
        }
    }

    fn open_segment(&mut self) -> Result<()> {
        let path = segment_path(&self.folder, self.segment);
        let opened = Groups::open(&self.disk, &path, self.segment);
        match opened.map_err(|error| failed(&self.folder, self.segment, error))? {
            Ok((groups, _)) => self.groups = Some(groups),
            Err(what) => return Err(damaged(&path, 0, what)),
        }
        Ok(())
    }

    fn damaged(&self, what: &str) -> Error {
        let offset = self.groups.as_ref().map_or(0, Groups::offset);
        damaged(&segment_path(&self.folder, self.segment), offset, what)
    }
}

fn failed(folder: &std::path::Path, segment: u64, error: io::Error) -> Error {
    let path = segment_path(folder, segment);
    if error.kind() == io::ErrorKind::NotFound {
        let gone = format!("`{}` is gone: its records were given up, or the file was removed by hand", path.display());
        return Error::outside(gone).because(error).fatal();
    }
    Error::outside(format!("`{}`", path.display())).because(error)
}
