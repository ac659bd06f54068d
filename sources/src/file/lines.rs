//! JSON lines.

use pipeline::batch::BATCH_ROWS_MAX;
use pipeline::error::{Error, Result};
use pipeline::plugin::RowError;
use pipeline::rows::RowsBuilder;

use super::files::DataFile;
use super::window::{Line, RECORD_BYTES_MAX, Window};
use super::{ERRORS_PER_PART_MAX, Layout, PART_BYTES_MAX, Part, Place, Rows};

/// An open file of JSON lines.
pub(super) struct JsonLines {
    window: Window,
    builder: RowsBuilder,
    /// Lines before the window.
    line: u64,
}

impl JsonLines {
    /// Opens `file` at `place`.
    pub(super) fn open(layout: &Layout, file: &DataFile, place: Place) -> Result<Self> {
        let mut window = window(file)?;
        if place.offset > window.offset() {
            window.seek(place.offset)?;
        }
        Ok(Self { window, builder: RowsBuilder::new(&[], &layout.fields), line: place.line })
    }

    /// Reads one line into the builder. `Ok(false)` at the end of the file.
    fn read_line(&mut self, errors: &mut Vec<(usize, RowError)>) -> Result<bool> {
        let Some(line) = self.window.line()? else { return Ok(false) };
        self.line += 1;
        let Line::Whole { length, with_end } = line else {
            let message = format!("{}:{}: longer than {RECORD_BYTES_MAX} bytes", self.window.name(), self.line);
            errors.push((self.builder.len(), RowError::new(message, self.window.bytes())));
            self.window.skip_line()?;
            return Ok(true);
        };
        let text = self.window.bytes()[..length].trim_ascii();
        if !text.is_empty()
            && let Err(wrong) = self.builder.push_json(text)
        {
            let message = format!("{}:{}: {wrong}", self.window.name(), self.line);
            errors.push((self.builder.len(), RowError::new(message, text)));
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
        let mut errors = Vec::new();
        let end = self.window.offset() + PART_BYTES_MAX;
        while self.builder.len() < BATCH_ROWS_MAX && errors.len() < ERRORS_PER_PART_MAX && self.window.offset() < end {
            if !self.read_line(&mut errors)? {
                if self.builder.is_empty() && errors.is_empty() {
                    return Ok(None);
                }
                break;
            }
        }
        let after = Place { offset: self.window.offset(), line: self.line };
        Ok(Some(Part { rows: self.builder.finish()?, errors, after }))
    }
}
