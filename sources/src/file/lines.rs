//! JSON lines.

use pipeline::batch::BATCH_ROWS_MAX;
use pipeline::error::{Error, Result};
use pipeline::plugin::RowError;
use pipeline::rows::RowsBuilder;

use super::files::DataFile;
use super::window::{Line, RECORD_BYTES_MAX, Window};
use super::{ERRORS_PER_PART_MAX, Layout, PART_BYTES_MAX, Part, Place, Rows, Tail};

/// An open file of JSON lines.
pub(super) struct JsonLines {
    window: Window,
    builder: RowsBuilder,
    /// Lines before the window.
    line: u64,
    /// What became of the line before the window, or of the one that starts it.
    tail: Tail,
    /// What was found at the place where it was opened.
    late: Option<RowError>,
    /// Whether the last line was read and has no end.
    is_ended: bool,
    /// Where to go on if the last line could not be read.
    before_wrong: Option<Place>,
}

impl JsonLines {
    /// Opens `file` at `place`.
    pub(super) fn open(layout: &Layout, file: &DataFile, place: Place) -> Result<Self> {
        let mut window = window(file)?;
        if place.offset > 0 {
            window.seek(place)?;
        }
        let (mut tail, mut late) = (place.tail, None);
        if tail == Tail::Row {
            let (is_ended, added) = window.finish_line(place.line)?;
            late = added;
            tail = if is_ended { Tail::None } else { Tail::Row };
        }
        let builder = RowsBuilder::new(&[], &layout.fields);
        Ok(Self { window, builder, line: place.line, tail, late, is_ended: false, before_wrong: None })
    }

    fn place(&self) -> Place {
        Place { offset: self.window.offset(), line: self.line, mark: self.window.mark(), tail: self.tail }
    }

    /// Reads one line into the builder. `Ok(false)` at the end of the file.
    fn read_line(&mut self, errors: &mut Vec<(usize, RowError)>) -> Result<bool> {
        // A file that grows meanwhile ends where its end was first seen.
        if self.is_ended {
            return Ok(false);
        }
        let Some(line) = self.window.line()? else { return Ok(false) };
        let (before, reported) = (self.place(), std::mem::take(&mut self.tail));
        self.line += 1;
        let Line::Whole { length, with_end } = line else {
            let message = format!("{}:{}: longer than {RECORD_BYTES_MAX} bytes", self.window.name(), self.line);
            errors.push((self.builder.len(), RowError::new(message, self.window.bytes())));
            self.window.skip_line()?;
            return Ok(true);
        };
        let text = self.window.bytes()[..length].trim_ascii();
        let wrong = if text.is_empty() { None } else { self.builder.push_json(text).err() };
        let is_open = length == with_end && !text.is_empty();
        let open = Tail::Wrong(length as u64);
        self.is_ended = is_open;
        if let Some(wrong) = wrong.as_ref().filter(|_| !(is_open && reported == open)) {
            let message = format!("{}:{}: {wrong}", self.window.name(), self.line);
            errors.push((self.builder.len(), RowError::new(message, text)));
        }
        match wrong {
            Some(_) if is_open => self.before_wrong = Some(Place { tail: open, ..before }),
            None if is_open => self.tail = Tail::Row,
            _ => {}
        }
        self.window.consume(with_end);
        Ok(true)
    }
}

/// Opens a file that should hold JSON lines.
pub(super) fn window(file: &DataFile) -> Result<Window> {
    let window = Window::open(file)?;
    if window.bytes().trim_ascii_start().starts_with(b"[") {
        return Err(Error::user(format!(
            "`{}` is one JSON array; this source reads one object per line (`jq -c '.[]'` makes such a file)",
            file.name
        )));
    }
    Ok(window)
}

impl Rows for JsonLines {
    fn read(&mut self) -> Result<Option<Part>> {
        let mut errors: Vec<_> = self.late.take().map(|error| (0, error)).into_iter().collect();
        let end = self.window.offset() + PART_BYTES_MAX;
        while self.builder.len() < BATCH_ROWS_MAX && errors.len() < ERRORS_PER_PART_MAX && self.window.offset() < end {
            if !self.read_line(&mut errors)? {
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
