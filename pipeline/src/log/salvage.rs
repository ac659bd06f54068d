//! Mends a damaged log: every record that can still be read stays, under its number.

use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::format::{self, GROUP_HEADER, GroupHeader, LOST, SEGMENT_HEADER};
use super::recovery::{Segment, records_fill, scan};
use crate::disk::{Disk, write_whole};
use crate::error::{Error, Result};

/// Most records that may be missing in one place: more than a segment of this size can hold, even of empty ones. A larger
/// gap is no damage that could be mended, but a file from somewhere else.
const LOST_MAX: u64 = 8 << 20;

/// Lost records that are put down in one group: about a megabyte.
const LOST_GROUP: u64 = 1 << 16;

/// A file that was mended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mended {
    /// The file.
    pub path: PathBuf,
    /// Where the file is now as it was.
    pub aside: PathBuf,
    /// Numbers of the records that could not be read, or were not there.
    pub lost: Vec<Range<u64>>,
    /// Bytes that could not be read.
    pub lost_bytes: u64,
    /// Records that could be read.
    pub kept: u64,
    /// Whether what the owner knew when the segment began is lost and would be needed: see
    /// [`Log::commit`](super::Log::commit).
    pub head_lost: bool,
    /// Whether records may be lost at the end too: how many there were cannot be told.
    pub end_lost: bool,
}

/// Makes a damaged log one that opens again, and says what was mended; nothing if it is not damaged.
///
/// A damaged file is copied to `FILE.damaged` and replaced by one with all of its records that can be read. What is lost keeps
/// its number: cursors pass over it. Ended in the middle, it goes on where it was when it is called again. The caller holds the
/// owner's lock.
///
/// Errors: the disk's, and a gap that is too large to be damage.
pub fn salvage(disk: &Arc<dyn Disk>, folder: &Path) -> Result<Vec<Mended>> {
    let failed = |error: io::Error| Error::outside(format!("`{}`", folder.display())).because(error);
    let report = scan(disk, folder).map_err(failed)?;
    let damaged: BTreeSet<&Path> = report.damage.iter().filter(|d| !d.torn).map(|d| d.path.as_path()).collect();
    let mut mended = Vec::new();
    for (index, segment) in report.segments.iter().enumerate() {
        if damaged.contains(segment.path.as_path()) {
            let until = report.segments.get(index + 1).map(|next| next.first_lsn);
            mended.push(mend(&**disk, segment, until)?);
        }
    }
    Ok(mended)
}

/// Replaces one segment. The next one, if there is one, begins with record `until`.
fn mend(disk: &dyn Disk, segment: &Segment, until: Option<u64>) -> Result<Mended> {
    let path = &segment.path;
    let failed = |error: io::Error| Error::outside(format!("`{}`", path.display())).because(error);
    let bytes = Bytes::from(disk.read(path).map_err(failed)?);
    let found = Found::read(&bytes, segment.first_lsn, until);
    if let Some(range) = found.lost.iter().find(|range| range.end - range.start > LOST_MAX) {
        return Err(Error::outside(format!(
            "`{}`: the records from {} to {} are missing, which is more than damage explains: a file of another log may \
             lie beside it. Put back a copy of the folder, or start anew with `pipeline run --fresh`",
            path.display(),
            range.start,
            range.end
        ))
        .fatal());
    }
    let aside = free_name(disk, path).map_err(failed)?;
    // A copy, and then one rename: at no moment the sound records are in no file.
    write_whole(disk, &aside, &bytes).map_err(|error| failed(error.into()))?;
    write_whole(disk, path, &found.segment(segment.first_lsn)).map_err(|error| failed(error.into()))?;
    let Found { head, groups, lost, lost_bytes, end_lost } = found;
    Ok(Mended {
        path: path.clone(),
        aside,
        kept: groups.iter().map(|(header, _)| u64::from(header.count)).sum(),
        lost,
        lost_bytes,
        // The first segment of a log has none.
        head_lost: head.is_none() && until.is_none() && segment.first_lsn > 0,
        end_lost,
    })
}

/// `FILE.damaged`, or the next name that is free: a file may be damaged twice.
fn free_name(disk: &dyn Disk, path: &Path) -> io::Result<PathBuf> {
    for number in 1u32.. {
        let mut name = path.as_os_str().to_owned();
        name.push(if number == 1 { ".damaged".to_owned() } else { format!(".damaged-{number}") });
        let name = PathBuf::from(name);
        if !disk.exists(&name)? {
            return Ok(name);
        }
    }
    Err(io::Error::from(io::ErrorKind::AlreadyExists))
}

/// What can be read of a segment.
struct Found {
    /// `None`: the header cannot be read.
    head: Option<Bytes>,
    /// Whole groups, in order.
    groups: Vec<(GroupHeader, Bytes)>,
    lost: Vec<Range<u64>>,
    lost_bytes: u64,
    end_lost: bool,
}

impl Found {
    fn read(bytes: &Bytes, first_lsn: u64, until: Option<u64>) -> Self {
        let head = format::segment_head(bytes, first_lsn).ok();
        let mut at = head.as_ref().map_or(0, |head| SEGMENT_HEADER + head.len());
        let mut found = Self { head, groups: Vec::new(), lost: Vec::new(), lost_bytes: 0, end_lost: false };
        let mut next = first_lsn;
        while at < bytes.len() {
            let place = (at..bytes.len()).find_map(|at| Some((at, group_at(bytes, at, next, until)?)));
            let Some((place, header)) = place else {
                found.lost_bytes += (bytes.len() - at) as u64;
                found.end_lost = until.is_none();
                break;
            };
            found.lost_bytes += (place - at) as u64;
            found.lose(next..header.first_lsn);
            next = header.first_lsn + u64::from(header.count);
            at = place + header.length;
            found.groups.push((header, bytes.slice(place..at)));
        }
        found.lose(next..until.unwrap_or(next));
        // Of a file without anything that can be read, nobody knows what it was.
        found.end_lost |= until.is_none() && found.head.is_none() && found.groups.is_empty();
        found
    }

    fn lose(&mut self, range: Range<u64>) {
        if !range.is_empty() {
            self.lost.push(range);
        }
    }

    /// A whole segment of what was found, with a placeholder for each lost record.
    fn segment(&self, first_lsn: u64) -> Vec<u8> {
        let mut bytes = format::segment_header(first_lsn, self.head.as_deref().unwrap_or_default());
        let mut lost = self.lost.iter().peekable();
        for (header, group) in &self.groups {
            while let Some(range) = lost.next_if(|range| range.start < header.first_lsn) {
                push_lost(&mut bytes, range);
            }
            push_group(&mut bytes, group.to_vec(), header.first_lsn, header.count);
        }
        lost.for_each(|range| push_lost(&mut bytes, range));
        bytes
    }
}

/// The group at this place, if there is a whole one that may follow record `next`.
fn group_at(bytes: &Bytes, at: usize, next: u64, until: Option<u64>) -> Option<GroupHeader> {
    let rest = &bytes[at..];
    let header = format::group_header(rest).ok()?;
    let end = header.first_lsn.checked_add(u64::from(header.count))?;
    let fits = header.first_lsn >= next && header.count > 0 && until.is_none_or(|until| end <= until);
    let sound = fits && format::check_group(rest, &header, at as u64).is_ok();
    (sound && records_fill(&rest[GROUP_HEADER..header.length], header.count)).then_some(header)
}

fn push_lost(bytes: &mut Vec<u8>, range: &Range<u64>) {
    let mut first = range.start;
    while first < range.end {
        let count = (range.end - first).min(LOST_GROUP);
        let mut group = vec![0; GROUP_HEADER];
        (0..count).for_each(|_| format::push_record(&mut group, LOST, 0, &[], &[]));
        push_group(bytes, group, first, count as u32);
        first += count;
    }
}

/// Appends a group that lies elsewhere now. What comes before it is durable as soon as the file has its name.
fn push_group(bytes: &mut Vec<u8>, mut group: Vec<u8>, first_lsn: u64, count: u32) {
    let offset = bytes.len() as u64;
    format::seal(&mut group, offset, first_lsn, count, offset);
    bytes.extend_from_slice(&group);
}
