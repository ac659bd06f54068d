//! The way through the files: which file is open, what of it is handed out, and where to go on.

use std::sync::Arc;
use std::time::Instant;

use arrow::array::AsArray;
use arrow::datatypes::TimestampMicrosecondType;
use pipeline::error::{Error, Result};
use pipeline::plugin::{Pulled, RowError};
use pipeline::state::{StateReader, StateWriter};

use super::csv::Csv;
use super::files::DataFile;
use super::lines::JsonLines;
use super::pace::Pace;
use super::parquet::ParquetFile;
use super::{Format, Layout, Part, Place, Rows, Tail};

/// First number of an encoded position, so that a later form can be told apart. Version 1 ended after `taken`.
const POSITION_VERSION: u64 = 2;

/// Where to go on: what the checkpoint keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Position {
    /// Name of the file; a name and not a number, because a file may be added before it.
    pub(super) file: String,
    /// Where a part starts.
    pub(super) place: Place,
    /// How many rows of that part are handed out already: a paced part goes out in pieces.
    pub(super) taken: usize,
}

impl Position {
    /// As the engine keeps it.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut writer = StateWriter::default();
        writer.u64(POSITION_VERSION);
        writer.str(&self.file);
        writer.u64(self.place.offset);
        writer.u64(self.place.line);
        writer.u64(self.taken as u64);
        writer.bool(self.place.mark.is_some());
        writer.u64(self.place.mark.unwrap_or_default());
        let (kind, length) = match self.place.tail {
            Tail::None => (0, 0),
            Tail::Row => (1, 0),
            Tail::Wrong(length) => (2, length),
        };
        writer.u64(kind);
        writer.u64(length);
        writer.finish()
    }

    /// What [`Self::encode`] made.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self> {
        let mut reader = StateReader::new(bytes);
        let version = reader.u64()?;
        if !(1..=POSITION_VERSION).contains(&version) {
            return Err(Error::internal(format!(
                "a position of version {version}; this program writes {POSITION_VERSION}"
            )));
        }
        let file = reader.str()?.to_owned();
        let mut place = Place { offset: reader.u64()?, line: reader.u64()?, ..Place::default() };
        let taken = usize::try_from(reader.u64()?).unwrap_or(usize::MAX);
        if version > 1 {
            let (has_mark, mark) = (reader.bool()?, reader.u64()?);
            place.mark = has_mark.then_some(mark);
            place.tail = match (reader.u64()?, reader.u64()?) {
                (1, _) => Tail::Row,
                (2, length) => Tail::Wrong(length),
                _ => Tail::None,
            };
        }
        Ok(Self { file, place, taken })
    }
}

/// A walk through the files. All methods may block on the disk.
pub(super) struct Walk {
    layout: Arc<Layout>,
    files: Vec<DataFile>,
    /// The file being read.
    file: usize,
    open: Box<dyn Rows>,
    /// Where the next part starts.
    place: Place,
    /// A part that is not handed out wholly.
    held: Option<Held>,
    /// The column that gives the pace.
    pace: Option<(usize, Pace)>,
    /// Rows of the first part that were handed out before a restart.
    taken_before: usize,
}

/// A part on its way out.
struct Held {
    part: Part,
    taken: usize,
}

impl Walk {
    /// Opens the file to start with: the first, or that of `position`.
    pub(super) fn start(
        layout: Arc<Layout>,
        files: Vec<DataFile>,
        position: Option<Position>,
        pace: Option<(usize, f64)>,
    ) -> Result<Self> {
        let (file, place, taken_before) = match position {
            None => (0, Place::default(), 0),
            Some(position) => {
                let file = files.iter().position(|file| file.name == position.file).ok_or_else(|| {
                    let name = &position.file;
                    Error::user(format!(
                        "`{name}` was being read and is not there now; put it back, or remove the state folder to start anew"
                    ))
                })?;
                (file, position.place, position.taken)
            }
        };
        let first = files.get(file).ok_or_else(|| Error::internal("no file found and no error"))?;
        let open = open(&layout, first, place)?;
        let pace = pace.map(|(column, factor)| (column, Pace::new(factor)));
        Ok(Self { layout, files, file, open, place, held: None, pace, taken_before })
    }

    /// The rows that are due at `now`; all there are if no pace is given. `None` after the last file.
    pub(super) fn next(&mut self, now: Instant) -> Result<Option<Pulled>> {
        let held = match self.held.take() {
            Some(held) => held,
            None => match self.read()? {
                Some(part) => Held { taken: std::mem::take(&mut self.taken_before).min(part.rows.num_rows()), part },
                None => return Ok(None),
            },
        };
        let rows = held.part.rows.num_rows();
        let due = match &mut self.pace {
            None => rows - held.taken,
            Some((column, pace)) => {
                let times = held.part.rows.column(*column).as_primitive::<TimestampMicrosecondType>();
                pace.due(now, &times.slice(held.taken, rows - held.taken))
            }
        };
        Ok(Some(self.hand_out(held, due)))
    }

    /// Takes `due` rows of a part, with the errors among them. Those behind the last row go with it.
    fn hand_out(&mut self, held: Held, due: usize) -> Pulled {
        let Held { mut part, taken } = held;
        let upto = taken + due;
        let is_whole = upto == part.rows.num_rows();
        let rows = part.rows.slice(taken, due);
        // What stands before a row that was handed out went with it, before a restart too.
        let gone = part.errors.partition_point(|(before, _)| *before < taken);
        part.errors.drain(..gone);
        let count =
            if is_whole { part.errors.len() } else { part.errors.partition_point(|(before, _)| *before < upto) };
        let errors: Vec<RowError> = part.errors.drain(..count).map(|(_, error)| error).collect();
        let taken = if is_whole {
            self.place = part.after;
            0
        } else {
            self.held = Some(Held { part, taken: upto });
            upto
        };
        let position = Position { file: self.files[self.file].name.clone(), place: self.place, taken };
        Pulled { rows, errors, position: position.encode(), more: false }
    }

    /// The next part, of the next file if need be.
    fn read(&mut self) -> Result<Option<Part>> {
        loop {
            if let Some(part) = self.open.read()? {
                return Ok(Some(part));
            }
            let Some(next) = self.files.get(self.file + 1) else { return Ok(None) };
            self.open = open(&self.layout, next, Place::default())?;
            self.file += 1;
            self.place = Place::default();
            self.taken_before = 0;
        }
    }
}

fn open(layout: &Layout, file: &DataFile, place: Place) -> Result<Box<dyn Rows>> {
    Ok(match layout.format {
        Format::Json => Box::new(JsonLines::open(layout, file, place)?),
        Format::Csv => Box::new(Csv::open(layout, file, place)?),
        Format::Parquet => Box::new(ParquetFile::open(layout, file, place)?),
    })
}
