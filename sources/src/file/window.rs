//! A moving window on a text file: big reads, and a line or record is always in one piece.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};

use memchr::memchr;
use pipeline::error::{Error, Result};

use super::files::{DataFile, unreadable};

/// Longest line or CSV record; one beyond is an error of that row.
pub(super) const RECORD_BYTES_MAX: usize = 1 << 20;
/// Free room for one read: large enough that the system calls cost nothing, small enough for the second-level cache.
const READ_BYTES: usize = 1 << 20;

/// Bytes of a file that are in memory, from the first that is not consumed.
pub(super) struct Window {
    file: File,
    name: String,
    buffer: Vec<u8>,
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
    /// `length` bytes without their end; `with_end` bytes to consume.
    Whole { length: usize, with_end: usize },
    /// More than [`RECORD_BYTES_MAX`]: to be skipped.
    TooLong,
}

impl Window {
    /// Opens a file at its start, after the byte order mark if it has one.
    pub(super) fn open(file: &DataFile) -> Result<Self> {
        let opened = File::open(&file.path).map_err(|error| unreadable(&file.name, &file.path, error))?;
        let name = file.name.clone();
        let buffer = vec![0; RECORD_BYTES_MAX + READ_BYTES];
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

    /// Goes to another place of the file.
    pub(super) fn seek(&mut self, offset: u64) -> Result<()> {
        let length = self.file.metadata().map_err(|error| self.failed(error))?.len();
        if length < offset {
            let message = format!("`{}` was read up to byte {offset} before and has only {length} now", self.name);
            return Err(Error::user(message));
        }
        self.file.seek(SeekFrom::Start(offset)).map_err(|error| self.failed(error))?;
        (self.start, self.end, self.offset) = (0, 0, offset);
        Ok(())
    }

    /// Reads more of the file behind what is there.
    pub(super) fn fill(&mut self) -> Result<Fill> {
        if self.start > 0 && self.buffer.len() - self.end < READ_BYTES {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
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

    fn failed(&self, error: std::io::Error) -> Error {
        Error::outside(format!("`{}` cannot be read", self.name)).because(error)
    }
}
