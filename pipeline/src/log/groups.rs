//! Walks the groups of one segment with bounded memory.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::format::{self, GROUP_HEADER, GroupHeader, SEGMENT_HEADER};
use crate::disk::Disk;

/// How much is read from a segment at once, in bytes; a group that is longer is read as a whole.
const READ_BYTES: usize = 1 << 20;

/// What stands at the next place of a segment.
#[derive(Debug)]
pub(super) enum Step {
    /// A whole group, from its header to its last record.
    Group { offset: u64, header: GroupHeader, bytes: Bytes },
    /// The end of the file, just after a group.
    End,
    /// Neither.
    Damaged { offset: u64, what: &'static str },
}

/// The groups of one segment, in order.
#[derive(Debug)]
pub(super) struct Groups {
    disk: Arc<dyn Disk>,
    path: PathBuf,
    /// Of the next group.
    offset: u64,
    /// What was read last, and where it stands in the file.
    chunk: Bytes,
    chunk_offset: u64,
}

impl Groups {
    /// Reads the header of a segment. The outer error is the disk's, the inner one tells what is wrong with the header.
    pub(super) fn open(
        disk: &Arc<dyn Disk>,
        path: &Path,
        first_lsn: u64,
    ) -> io::Result<Result<(Self, Bytes), &'static str>> {
        let mut groups =
            Self { disk: disk.clone(), path: path.to_owned(), offset: 0, chunk: Bytes::new(), chunk_offset: 0 };
        let start = groups.at_least(SEGMENT_HEADER)?;
        let length = match format::segment_header_length(&start) {
            Ok(length) => length,
            Err(what) => return Ok(Err(what)),
        };
        let start = groups.at_least(length)?;
        Ok(format::segment_head(&start, first_lsn).map(|head| {
            groups.offset = length as u64;
            (groups, head)
        }))
    }

    /// Where the next group begins.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// The next group, which must begin with record `lsn`.
    pub(super) fn step(&mut self, lsn: u64) -> io::Result<Step> {
        let step = self.look(lsn)?;
        if !matches!(step, Step::Damaged { .. }) || self.chunk_offset == self.offset {
            self.advance(&step);
            return Ok(step);
        }
        // Read when the writer was in the middle of this group: what is there by now decides.
        self.forget();
        let step = self.look(lsn)?;
        self.advance(&step);
        Ok(step)
    }

    fn advance(&mut self, step: &Step) {
        match step {
            Step::Group { header, .. } => self.offset += header.length as u64,
            Step::Damaged { .. } => self.forget(),
            Step::End => {}
        }
    }

    fn look(&mut self, lsn: u64) -> io::Result<Step> {
        let offset = self.offset;
        let damaged = |what| Ok(Step::Damaged { offset, what });
        let start = self.at_least(GROUP_HEADER)?;
        if start.is_empty() {
            return Ok(Step::End);
        }
        let header = match format::group_header(&start) {
            Ok(header) => header,
            Err(what) => return damaged(what),
        };
        let bytes = self.at_least(header.length)?;
        if let Err(what) = format::check_group(&bytes, &header, offset) {
            return damaged(what);
        }
        if header.first_lsn != lsn || header.count == 0 {
            return damaged("a group does not follow the one before it");
        }
        Ok(Step::Group { offset, header, bytes: bytes.slice(..header.length) })
    }

    /// Bytes from the next group on, at least that many unless the file ends before.
    fn at_least(&mut self, wanted: usize) -> io::Result<Bytes> {
        let start = usize::try_from(self.offset - self.chunk_offset).unwrap_or(usize::MAX).min(self.chunk.len());
        if self.chunk.len() - start >= wanted {
            return Ok(self.chunk.slice(start..));
        }
        self.chunk = Bytes::from(self.disk.read_range(&self.path, self.offset, wanted.max(READ_BYTES))?);
        self.chunk_offset = self.offset;
        Ok(self.chunk.clone())
    }

    fn forget(&mut self) {
        self.chunk = Bytes::new();
        self.chunk_offset = self.offset;
    }
}
