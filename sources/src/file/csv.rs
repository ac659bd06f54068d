//! Comma-separated values, RFC 4180 and the usual liberties.

use csv_core::ReadRecordResult;
use memchr::memchr_iter;
use pipeline::batch::BATCH_ROWS_MAX;
use pipeline::config::{Fields, did_you_mean};
use pipeline::error::{Error, Result};
use pipeline::plugin::RowError;
use pipeline::rows::{Cell, RowsBuilder};

use super::files::DataFile;
use super::window::{Fill, RECORD_BYTES_MAX, Window};
use super::{ERRORS_PER_PART_MAX, Layout, PART_BYTES_MAX, Part, Place, Rows, Tail, counted, name_in_file};

/// An open CSV file.
pub(super) struct Csv {
    records: Records,
    builder: RowsBuilder,
    /// For each column, the cell of a record that fills it.
    cell_of_column: Vec<usize>,
    /// Cells of a record.
    cells: usize,
    /// What became of the record before the window, or of the one that starts it.
    tail: Tail,
    /// What was found at the place where it was opened.
    late: Option<RowError>,
    /// Whether the last line was read and has no end.
    is_ended: bool,
    /// Where to go on if the last record could not be read.
    before_wrong: Option<Place>,
}

impl Csv {
    /// Opens `file` at `place`, reading its header first.
    pub(super) fn open(layout: &Layout, file: &DataFile, place: Place) -> Result<Self> {
        let mut records = Records::open(file, layout.delimiter)?;
        let (cell_of_column, cells) = if layout.header {
            // An empty file has no header, nor any row to miss it.
            let header = records.header()?.unwrap_or_default();
            let cell_of_column =
                if header.is_empty() { Vec::new() } else { columns(&layout.fields, &header, &file.name)? };
            (cell_of_column, header.len())
        } else {
            ((0..layout.fields.0.len()).collect(), layout.fields.0.len())
        };
        if place.offset > 0 {
            records.window.seek(place)?;
            records.line = place.line;
        }
        let (mut tail, mut late) = (place.tail, None);
        if tail == Tail::Row {
            let (is_ended, added) = records.window.finish_line(place.line + 1)?;
            late = added;
            if is_ended {
                tail = Tail::None;
                records.line += 1;
            }
        }
        let builder = RowsBuilder::new(&[], &layout.fields);
        Ok(Self { records, builder, cell_of_column, cells, tail, late, is_ended: false, before_wrong: None })
    }

    fn place(&self) -> Place {
        let window = &self.records.window;
        Place { offset: window.offset(), line: self.records.line, mark: window.mark(), tail: self.tail }
    }

    /// Takes the record just read as a row, or says why not.
    fn push(&mut self, cells: usize) -> Result<(), String> {
        if cells != self.cells {
            return Err(format!("expected {}, found {cells}", counted(self.cells, "cell")));
        }
        let mut row = self.builder.row();
        for (column, &cell) in self.cell_of_column.iter().enumerate() {
            let text = std::str::from_utf8(self.records.cell(cell)).map_err(|error| {
                format!("field `{}`: not UTF-8: {error}", self.builder.schema().field(column).name())
            })?;
            self.builder.set(&mut row, column, Cell::Untyped(text))?;
        }
        self.builder.push(row);
        Ok(())
    }

    fn read_record(&mut self, errors: &mut Vec<(usize, RowError)>) -> Result<bool> {
        // A file that grows meanwhile ends where its end was first seen.
        if self.is_ended {
            return Ok(false);
        }
        let Some(record) = self.records.next()? else { return Ok(false) };
        let (before, reported) = (self.place(), std::mem::take(&mut self.tail));
        let wrong = match record {
            Record::Whole { cells, .. } => self.push(cells).err(),
            Record::TooLong => Some(format!("longer than {RECORD_BYTES_MAX} bytes; is a quote not closed?")),
            Record::Unclosed => Some("a quote is not closed until the end of the file".to_owned()),
        };
        let length = match record {
            Record::Whole { length, .. } => length,
            _ => self.records.window.bytes().len(),
        };
        // An open quote in the last line may be closed by what is added to it; one that swallowed lines is a slip.
        let is_open = match record {
            Record::Whole { is_open, .. } => is_open,
            Record::Unclosed => !self.records.window.bytes().contains(&b'\n'),
            Record::TooLong => false,
        };
        let open = Tail::Wrong(length as u64);
        self.is_ended = is_open;
        match &wrong {
            Some(_) if is_open => self.before_wrong = Some(Place { tail: open, ..before }),
            None if is_open => self.tail = Tail::Row,
            _ => {}
        }
        if let Some(wrong) = wrong.filter(|_| !(is_open && reported == open)) {
            let message = format!("{}:{}: {wrong}", self.records.window.name(), self.records.line + 1);
            let text = self.records.window.bytes()[..length].trim_ascii_end();
            errors.push((self.builder.len(), RowError::new(message, text)));
        }
        match record {
            Record::Whole { length, .. } => self.records.consume(length),
            // The quote that swallowed the rest may be a slip: the lines behind it are read again without it.
            Record::TooLong | Record::Unclosed => self.records.skip_line()?,
        }
        Ok(true)
    }
}

impl Rows for Csv {
    fn read(&mut self) -> Result<Option<Part>> {
        let mut errors: Vec<_> = self.late.take().map(|error| (0, error)).into_iter().collect();
        let end = self.records.window.offset() + PART_BYTES_MAX;
        while self.builder.len() < BATCH_ROWS_MAX
            && errors.len() < ERRORS_PER_PART_MAX
            && self.records.window.offset() < end
        {
            if !self.read_record(&mut errors)? {
                if self.builder.is_empty() && errors.is_empty() {
                    return Ok(None);
                }
                break;
            }
        }
        let after = self.before_wrong.unwrap_or_else(|| self.place());
        Ok(Some(Part { rows: self.builder.finish()?, errors, after }))
    }
}

/// For each field, its place in the header.
fn columns(fields: &Fields, header: &[String], file: &str) -> Result<Vec<usize>> {
    let place = |(name, spec): (&String, &pipeline::config::FieldSpec)| {
        let wanted = name_in_file(name, spec.path.as_ref());
        let mut found = header.iter().enumerate().filter(|(_, column)| **column == *wanted).map(|(index, _)| index);
        match (found.next(), found.next()) {
            (Some(index), None) => Ok(index),
            (Some(_), Some(_)) => Err(Error::user(format!("`{file}` has two columns `{wanted}`"))),
            (None, _) => {
                let hint = did_you_mean(&wanted, header).map_or(String::new(), |hint| format!(" ({hint})"));
                Err(Error::user(format!(
                    "`{file}` has no column `{wanted}`{hint}; its header is {}",
                    header.join(", ")
                )))
            }
        }
    };
    fields.0.iter().map(place).collect()
}

/// The records of a file, one after the other.
pub(super) struct Records {
    window: Window,
    parser: csv_core::Reader,
    /// Unquoted cells of the record just read, back to back.
    text: Vec<u8>,
    /// Where each cell ends in `text`.
    ends: Vec<usize>,
    /// Lines before the window.
    line: u64,
}

/// What [`Records::next`] found at the start of the window.
#[derive(Clone, Copy)]
pub(super) enum Record {
    /// `length` bytes of the file; the cells are in [`Records::cell`]. `is_open` if the file ends before the record does.
    Whole { length: usize, cells: usize, is_open: bool },
    /// More than [`RECORD_BYTES_MAX`].
    TooLong,
    /// The file ends inside a quoted cell.
    Unclosed,
}

impl Records {
    pub(super) fn open(file: &DataFile, delimiter: u8) -> Result<Self> {
        let parser = csv_core::ReaderBuilder::new().delimiter(delimiter).build();
        Ok(Self { window: Window::open(file)?, parser, text: vec![0; 4096], ends: vec![0; 64], line: 0 })
    }

    /// Reads and consumes the record with the columns' names. `None` in an empty file.
    pub(super) fn header(&mut self) -> Result<Option<Vec<String>>> {
        let name = self.window.name().to_owned();
        match self.next()? {
            None => Ok(None),
            Some(Record::Whole { length, cells, .. }) => {
                let names = (0..cells).map(|cell| String::from_utf8_lossy(self.cell(cell)).trim().to_owned()).collect();
                self.consume(length);
                Ok(Some(names))
            }
            Some(_) => Err(Error::user(format!("`{name}` starts with no header: the first record does not end"))),
        }
    }

    /// Parses the next record that is not blank. It stays in the window until consumed.
    pub(super) fn next(&mut self) -> Result<Option<Record>> {
        if !self.skip_blank()? {
            return Ok(None);
        }
        let (mut length, mut written, mut cells) = (0, 0, 0);
        loop {
            let at_end = length == self.window.bytes().len()
                && match self.window.fill()? {
                    Fill::More => false,
                    Fill::End => true,
                    Fill::Full => return Ok(Some(self.give_up(Record::TooLong))),
                };
            // The last line may lack its end: then it gets one, which an open quote swallows.
            let input = if at_end { b"\n" } else { &self.window.bytes()[length..] };
            let (result, read, text, ends) =
                self.parser.read_record(input, &mut self.text[written..], &mut self.ends[cells..]);
            length += if at_end { 0 } else { read };
            written += text;
            cells += ends;
            match result {
                ReadRecordResult::InputEmpty if at_end => return Ok(Some(self.give_up(Record::Unclosed))),
                ReadRecordResult::InputEmpty => {}
                ReadRecordResult::OutputFull => self.text.resize(self.text.len() * 2, 0),
                ReadRecordResult::OutputEndsFull => self.ends.resize(self.ends.len() * 2, 0),
                ReadRecordResult::Record if length > RECORD_BYTES_MAX => {
                    return Ok(Some(self.give_up(Record::TooLong)));
                }
                ReadRecordResult::Record => return Ok(Some(Record::Whole { length, cells, is_open: at_end })),
                ReadRecordResult::End => return Ok(None),
            }
        }
    }

    /// The parser must not go on in the middle of a record.
    fn give_up(&mut self, record: Record) -> Record {
        self.parser.reset();
        record
    }

    /// Cell `index` of the record just read, unquoted.
    pub(super) fn cell(&self, index: usize) -> &[u8] {
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.text[start..self.ends[index]]
    }

    /// Lets go of a record of `length` bytes.
    pub(super) fn consume(&mut self, length: usize) {
        self.line += memchr_iter(b'\n', &self.window.bytes()[..length]).count() as u64;
        self.window.consume(length);
    }

    fn skip_line(&mut self) -> Result<()> {
        self.line += 1;
        self.window.skip_line()
    }

    /// Consumes empty lines, also the second half of a CR LF. `false` at the end of the file.
    fn skip_blank(&mut self) -> Result<bool> {
        loop {
            let bytes = self.window.bytes();
            let blank = bytes.iter().take_while(|byte| matches!(byte, b'\r' | b'\n')).count();
            let is_last = blank == bytes.len();
            self.consume(blank);
            if !is_last {
                return Ok(true);
            }
            if self.window.fill()? == Fill::End {
                return Ok(false);
            }
        }
    }
}
