//! The segment that is written to: made, opened, cut.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::format::{self, GROUP_HEADER, GroupHeader};
use super::groups::{Groups, Step};
use super::recovery::Segment;
use crate::disk::{Disk, DiskFile, NotWritten, write_whole};

/// The segment that is written to.
#[derive(Debug)]
pub(super) struct Tail {
    pub(super) file: Box<dyn DiskFile>,
    pub(super) header_bytes: u64,
    /// Up to the end of the last whole group.
    pub(super) length: u64,
    /// How much of that is durable.
    pub(super) synced: u64,
    /// Whether a part of a group that could not be written is still to be cut off.
    pub(super) cut_needed: bool,
    /// Whether a power loss could bring back such a part: it was cut off, but nothing was synced since.
    pub(super) unsure: bool,
}

impl Tail {
    /// A new segment without groups, durable.
    pub(super) fn make(disk: &dyn Disk, path: &Path, first_lsn: u64, head: &[u8]) -> Result<Self, NotWritten> {
        let header = format::segment_header(first_lsn, head);
        let file = write_whole(disk, path, &header)?;
        let length = header.len() as u64;
        Ok(Self { file, header_bytes: length, length, synced: length, cut_needed: false, unsure: false })
    }

    /// Opens the newest segment to go on after what is sound of it, and makes that durable.
    pub(super) fn open(disk: &dyn Disk, segment: &Segment) -> io::Result<Self> {
        let Segment { path, header_bytes, sound_bytes: length, durable_bytes, .. } = segment;
        let (mut file, found) = disk.append(path)?;
        if found != *length {
            // Durable before there are new groups: behind those the old bytes would be damage.
            file.set_len(*length)?;
        }
        // What an earlier process wrote is about to be believed in. It may have been killed before the sync; or the sync
        // failed, and only the memory of the operating system has the bytes: writing them again makes the sync mean them.
        let unsure =
            disk.read_range(path, *durable_bytes, usize::try_from(length - durable_bytes).unwrap_or(usize::MAX))?;
        file.overwrite(*durable_bytes, &unsure)?;
        file.sync_all()?;
        disk.sync_folder(path.parent().unwrap_or(Path::new("")))?;
        Ok(Self {
            file,
            header_bytes: *header_bytes,
            length: *length,
            synced: *length,
            cut_needed: false,
            unsure: false,
        })
    }
}

/// Where a segment is to be cut.
pub(super) struct Place {
    pub(super) header_bytes: u64,
    /// Up to here everything is kept.
    pub(super) offset: u64,
    /// The group that takes the place of the one at `offset`, if the cut goes through it.
    pub(super) shortened: Option<Vec<u8>>,
}

/// Where the records of a segment that are below `lsn` end.
pub(super) fn find_place(disk: &Arc<dyn Disk>, path: &Path, first_lsn: u64, lsn: u64) -> io::Result<Place> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let (mut groups, _head) = Groups::open(disk, path, first_lsn)?.map_err(bad)?;
    let header_bytes = groups.offset();
    let mut next = first_lsn;
    while next < lsn {
        let Step::Group { offset, header, bytes } = groups.step(next)? else {
            return Err(bad("a committed group is missing"));
        };
        next += u64::from(header.count);
        if next > lsn {
            let count = header.count - (next - lsn) as u32;
            let shortened = shorten(&bytes, offset, &header, count).ok_or_else(|| bad("a record does not fit"))?;
            return Ok(Place { header_bytes, offset, shortened: Some(shortened) });
        }
    }
    Ok(Place { header_bytes, offset: groups.offset(), shortened: None })
}

/// A group with the first `count` of its records.
fn shorten(group: &[u8], offset: u64, header: &GroupHeader, count: u32) -> Option<Vec<u8>> {
    let mut length = GROUP_HEADER;
    for _ in 0..count {
        length += format::record_length(&group[length..])?;
    }
    let mut group = group[..length].to_vec();
    format::seal(&mut group, offset, header.first_lsn, count, header.synced);
    Some(group)
}
