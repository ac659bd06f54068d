//! A moving window on a text file: big reads, and a line or record is always in one piece.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};

use memchr::memchr;
use pipeline::error::{Error, Result};
use pipeline::plugin::RowError;
use xxhash_rust::xxh3::xxh3_64;

use super::files::{DataFile, unreadable};
use super::{Place, changed};

/// Longest line or CSV record; one beyond is an error of that row.
pub(super) const RECORD_BYTES_MAX: usize = 1 << 20;
/// Free room for one read: large enough that the system calls cost nothing, small enough for the second-level cache.
const READ_BYTES: usize = 1 << 20;
/// Bytes before a place by which the file is known again: several lines, so hardly the same in another file.
const MARK_BYTES: usize = 256;

/// Bytes of a file that are in memory, from the first that is not consumed.
pub(super) struct Window {
    file: File,
    name: String,
    buffer: Vec<u8>,
    /// At least [`MARK_BYTES`] of the file stand before it, or all that there are.
    start: usize,
    end: usize,
    /// Place in the file of `buffer[start]`.
    offset: u64,
}

/// What [`Window::fill`] found.
#[derive(PartialEq, Eq)]
pub(super) enum Fill {
    More,
    End,
    /// There is no more room: what is in the window is longer than a record may be.
    Full,
}

/// What [`Window::line`] found.
pub(super) enum Line {
    /// `length` bytes without their end; `with_end` bytes to consume, as many if the file ends before the line does.
    Whole { length: usize, with_end: usize },
    /// More than [`RECORD_BYTES_MAX`]: to be skipped.
    TooLong,
}

impl Window {
    /// Opens a file at its start, after the byte order mark if it has one.
    pub(super) fn open(file: &DataFile) -> Result<Self> {
        let opened = File::open(&file.path).map_err(|error| unreadable(&file.name, &file.path, error))?;
        let name = file.name.clone();
        let buffer = vec![0; MARK_BYTES + RECORD_BYTES_MAX + READ_BYTES];
        let mut window = Self { file: opened, name, buffer, start: 0, end: 0, offset: 0 };
        while window.bytes().len() < 3 && window.fill()? == Fill::More {}
        match window.bytes() {
            [0xef, 0xbb, 0xbf, ..] => window.consume(3),
            [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => {
                return Err(Error::user(format!("`{}` is UTF-16; convert it to UTF-8", window.name)));
            }
            _ => {}
        }
        Ok(window)
    }

    /// The file's name, for messages.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// What is in memory, from the first byte that is not consumed.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Bytes of the file before [`Self::bytes`].
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    /// Lets go of the first `length` bytes.
    pub(super) fn consume(&mut self, length: usize) {
        debug_assert!(length <= self.end - self.start);
        self.start += length;
        self.offset += length as u64;
    }

    /// A hash of what stands before the window.
    pub(super) fn mark(&self) -> Option<u64> {
        let length = usize::try_from(self.offset).unwrap_or(usize::MAX).min(MARK_BYTES);
        (length > 0).then(|| xxh3_64(&self.buffer[self.start - length..self.start]))
    }

    /// Goes to a place of the file, if it is the file that the place is of.
    pub(super) fn seek(&mut self, place: Place) -> Result<()> {
        let offset = place.offset;
        let length = self.file.metadata().map_err(|error| self.failed(error))?.len();
        if length < offset {
            let message = format!("`{}` was read up to byte {offset} before and has only {length} now", self.name);
            return Err(Error::user(message));
        }
        let before = offset.min(MARK_BYTES as u64);
        self.file.seek(SeekFrom::Start(offset - before)).map_err(|error| self.failed(error))?;
        let before = usize::try_from(before).unwrap_or(MARK_BYTES);
        self.file.read_exact(&mut self.buffer[..before]).map_err(|error| self.failed(error))?;
        (self.start, self.end, self.offset) = (before, before, offset);
        if place.mark.is_some() && place.mark != self.mark() {
            return Err(changed(&self.name, &format!("byte {offset}")));
        }
        Ok(())
    }

    /// Reads more of the file behind what is there.
    pub(super) fn fill(&mut self) -> Result<Fill> {
        if self.start > MARK_BYTES && self.buffer.len() - self.end < READ_BYTES {
            self.buffer.copy_within(self.start - MARK_BYTES..self.end, 0);
            (self.start, self.end) = (MARK_BYTES, self.end - self.start + MARK_BYTES);
        }
        if self.end == self.buffer.len() {
            return Ok(Fill::Full);
        }
        loop {
            match self.file.read(&mut self.buffer[self.end..]) {
                Ok(0) => return Ok(Fill::End),
                Ok(read) => {
                    self.end += read;
                    return Ok(Fill::More);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(error)),
            }
        }
    }

    /// Finds the end of the line that the window starts with, reading on as needed. `None` at the end of the file.
    pub(super) fn line(&mut self) -> Result<Option<Line>> {
        let mut searched = 0;
        loop {
            if let Some(at) = memchr(b'\n', &self.bytes()[searched..]) {
                let length = searched + at;
                let fits = length <= RECORD_BYTES_MAX;
                return Ok(Some(if fits { Line::Whole { length, with_end: length + 1 } } else { Line::TooLong }));
            }
            searched = self.bytes().len();
            match self.fill()? {
                Fill::More => {}
                Fill::End if searched == 0 => return Ok(None),
                Fill::End if searched <= RECORD_BYTES_MAX => {
                    return Ok(Some(Line::Whole { length: searched, with_end: searched }));
                }
                Fill::End | Fill::Full => return Ok(Some(Line::TooLong)),
            }
        }
    }

    /// Consumes the rest of a line of any length, with its end.
    pub(super) fn skip_line(&mut self) -> Result<()> {
        loop {
            let found = memchr(b'\n', self.bytes());
            self.consume(found.map_or(self.bytes().len(), |at| at + 1));
            if found.is_some() || self.fill()? == Fill::End {
                return Ok(());
            }
        }
    }

    /// Consumes what is left of a line that had no end when it was taken as a row. Whether it has its end now, and the error of
    /// what was added to it.
    pub(super) fn finish_line(&mut self, line: u64) -> Result<(bool, Option<RowError>)> {
        let Some(found) = self.line()? else { return Ok((false, None)) };
        let (length, with_end) = match found {
            Line::Whole { length, with_end } => (length, with_end),
            Line::TooLong => (RECORD_BYTES_MAX, RECORD_BYTES_MAX),
        };
        let added = self.bytes()[..length].trim_ascii();
        let error = (!added.is_empty()).then(|| {
            let message =
                format!("{}:{line}: this was added to the line after it had been read, and is left out", self.name);
            RowError::new(message, added)
        });
        match found {
            Line::Whole { .. } => self.consume(with_end),
            Line::TooLong => self.skip_line()?,
        }
        Ok((with_end > length || matches!(found, Line::TooLong), error))
    }

    fn failed(&self, error: std::io::Error) -> Error {
        Error::outside(format!("`{}` cannot be read", self.name)).because(error)
    }
}
