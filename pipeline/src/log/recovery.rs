//! Reads a whole log and says what is in it and what is wrong with it; changes nothing.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::Cursor;
use super::format::{self, GROUP_HEADER};
use super::groups::{Groups, Step};
use crate::disk::Disk;
use crate::error::{Error, Result};

const SUFFIX: &str = ".log";

/// What is in a log's folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Oldest first.
    pub segments: Vec<Segment>,
    /// Everything that is not as it should be.
    pub damage: Vec<Damage>,
}

impl Report {
    /// The oldest record there is; the next one if there is none.
    pub fn first_lsn(&self) -> u64 {
        self.segments.first().map_or(0, |segment| segment.first_lsn)
    }

    /// What the next record will be, as far as the log can be read.
    pub fn next_lsn(&self) -> u64 {
        self.segments.last().map_or(0, |segment| segment.next_lsn)
    }

    /// Reads the sound records of the log that was inspected, oldest first; an error at the first damage.
    pub fn records(&self, disk: &Arc<dyn Disk>, folder: &Path) -> Cursor {
        let end = Arc::new(AtomicU64::new(self.next_lsn()));
        Cursor::new(disk.clone(), folder.to_owned(), end, self.first_lsn(), self.first_lsn())
    }

    /// Bytes of all segments.
    pub fn bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.bytes).sum()
    }
}

/// One file of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where it is.
    pub path: PathBuf,
    /// Its first record, which names the file.
    pub first_lsn: u64,
    /// The record after its last one that is whole.
    pub next_lsn: u64,
    /// Length of the file.
    pub bytes: u64,
    /// Length up to the first damage.
    pub sound_bytes: u64,
    /// Length that its last whole group knew to be durable.
    pub durable_bytes: u64,
    /// Length of the header with its head.
    pub header_bytes: u64,
    /// Commits, as far as it is sound.
    pub groups: u64,
}

impl Segment {
    /// Without groups.
    pub(super) fn new(path: PathBuf, first_lsn: u64, bytes: u64) -> Self {
        Self {
            path,
            first_lsn,
            next_lsn: first_lsn,
            bytes,
            sound_bytes: bytes,
            durable_bytes: bytes,
            header_bytes: bytes,
            groups: 0,
        }
    }
}

/// A place that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damage {
    /// The file.
    pub path: PathBuf,
    /// The byte in it where the damage begins.
    pub offset: u64,
    /// What is wrong.
    pub what: String,
    /// Whether this is only what a crash leaves of a commit that never came back: the next start cuts it off. Beside a
    /// running process it may be a commit under way.
    pub torn: bool,
}

/// What is in a log's folder, for the commands that show and mend it. Takes no lock and changes nothing, so it works beside a
/// running process. A folder that is missing is an empty log.
///
/// Errors: the disk's.
pub fn inspect(disk: &Arc<dyn Disk>, folder: &Path) -> Result<Report> {
    scan(disk, folder).map_err(|error| Error::outside(format!("`{}`", folder.display())).because(error))
}

/// The file of the segment that begins with a record.
pub(super) fn segment_path(folder: &Path, first_lsn: u64) -> PathBuf {
    folder.join(format!("{first_lsn:020}{SUFFIX}"))
}

/// The first record of the segment with that file name, if it is one.
fn segment_lsn(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(SUFFIX)?;
    let lsn = (digits.len() == 20 && digits.bytes().all(|b| b.is_ascii_digit())).then(|| digits.parse().ok())?;
    // No log gets there; a file that someone named so must not make sums overflow.
    lsn.filter(|lsn| *lsn < 1 << 63)
}

/// An error about a place that is wrong although it was durable.
pub(super) fn damaged(path: &Path, offset: u64, what: &str) -> Error {
    Error::outside(format!(
        "`{}` is damaged at byte {offset}: {what}. Records that were safe are lost there, so nothing is read past it. \
         `pipeline doctor` shows what can be saved, `pipeline doctor --salvage` saves it; a copy of the folder from before \
         the damage is better",
        path.display()
    ))
    .fatal()
}

pub(super) fn scan(disk: &Arc<dyn Disk>, folder: &Path) -> io::Result<Report> {
    let mut report = Report::default();
    let entries = match disk.list(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(report),
        entries => entries?,
    };
    // The digits are of equal number, so the order of names is the order of records.
    let lsns: Vec<u64> = entries.iter().filter(|e| !e.folder).filter_map(|e| segment_lsn(&e.name)).collect();
    for (index, first_lsn) in lsns.iter().enumerate() {
        let path = segment_path(folder, *first_lsn);
        let last = index + 1 == lsns.len();
        let (segment, damage) = match scan_segment(disk, path, *first_lsn, last) {
            // Trimmed since the folder was listed; a hole shows as one below.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            found => found?,
        };
        if let Some(before) = report.segments.last()
            && before.next_lsn != *first_lsn
            && before.sound_bytes == before.bytes
        {
            report.damage.push(Damage {
                path: before.path.clone(),
                offset: before.bytes,
                what: format!("the file ends before record {}, the next file begins with {first_lsn}", before.next_lsn),
                torn: false,
            });
        }
        report.segments.push(segment);
        report.damage.extend(damage);
    }
    Ok(report)
}

fn scan_segment(
    disk: &Arc<dyn Disk>,
    path: PathBuf,
    first_lsn: u64,
    last: bool,
) -> io::Result<(Segment, Option<Damage>)> {
    let mut segment = Segment::new(path, first_lsn, 0);
    let mut groups = match Groups::open(disk, &segment.path, first_lsn)? {
        Ok((groups, _head)) => groups,
        Err(what) => {
            segment.bytes = disk.read(&segment.path)?.len() as u64;
            let damage = Damage { path: segment.path.clone(), offset: 0, what: what.to_owned(), torn: false };
            return Ok((segment, Some(damage)));
        }
    };
    segment.header_bytes = groups.offset();
    segment.durable_bytes = segment.header_bytes;
    loop {
        let (offset, what) = match groups.step(segment.next_lsn)? {
            Step::End => {
                segment.bytes = groups.offset();
                segment.sound_bytes = segment.bytes;
                return Ok((segment, None));
            }
            Step::Group { offset, header, bytes } => {
                if records_fill(&bytes[GROUP_HEADER..], header.count) {
                    segment.next_lsn += u64::from(header.count);
                    segment.groups += 1;
                    segment.durable_bytes = segment.durable_bytes.max(header.synced.min(offset));
                    continue;
                }
                (offset, "the records of a group do not fill it")
            }
            Step::Damaged { offset, what } => (offset, what),
        };
        // At most a segment and the group that made it full.
        let rest = disk.read_range(&segment.path, offset, usize::MAX)?;
        segment.bytes = offset + rest.len() as u64;
        segment.sound_bytes = offset;
        let torn = last && format::proof_of_durability(&rest, offset, segment.next_lsn).is_none();
        let damage = Damage { path: segment.path.clone(), offset, what: what.to_owned(), torn };
        return Ok((segment, Some(damage)));
    }
}

/// Whether this is the body of a group of so many records.
pub(super) fn records_fill(mut body: &[u8], count: u32) -> bool {
    for _ in 0..count {
        let Some(length) = format::record_length(body) else { return false };
        body = &body[length..];
    }
    body.is_empty()
}
