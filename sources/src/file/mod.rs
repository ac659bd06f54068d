//! Reads JSON lines, CSV and Parquet files, as fast as the graph takes them or at the pace of their event time.

mod csv;
mod discover;
mod files;
mod lines;
mod pace;
mod parquet;
mod walk;
mod window;

#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::RecordBatch;
use async_trait::async_trait;
use futures::future::BoxFuture;
use pipeline::config::{At, CheckContext, Fields, did_you_mean};
use pipeline::error::{Error, Result};
use pipeline::plugin::{
    Delivery, PullReader, Pulled, Reader, RowError, Schedule, Source, SourceConfig, SourceContext, SourceShape,
};
use pipeline::schema::FieldType;
use schemars::JsonSchema;
use serde::Deserialize;
use tokio::task::JoinHandle;

pub use self::pace::Speed;
use self::walk::{Position, Walk};
use crate::blocking;

const PAGE: &str = "\
Reads JSON lines, CSV and Parquet files, as fast as the graph takes them or at the pace of their event time.

## Emits
One row per line, record or row, with the columns of `fields`, in file order; several files (`data/*.parquet`) one after
the other in the order of their names. `*` and `?` stand for any characters of one name, `**` for any folders; hidden
files are not matched.

- `json` (`.json`, `.ndjson`, `.jsonl`): one object per line. A missing name is null, other names are skipped.
- `csv` (`.csv`, `.tsv`): a header names the columns, in any order; without one (`header: false`) the cells are `fields` in
  order. `{type: float, path: Latency (ms)}` reads the column of that name. Cells may be quoted and then hold newlines; an
  empty cell is null (in a `string` column empty text); every record has as many cells as the header.
- `parquet`: columns by name, in structs by `path: a.b`. Integers of any size are `int`, timestamps of any unit are
  `timestamp` (without a zone: UTC), text and dictionaries `string`. A column that is missing or of another kind is an error
  of the file; a value that does not fit is an error of its row.

`pipeline fields SOURCE` prints the `fields:` block of the first file.

## Delivery
Read again from the position in the checkpoint (the file, and the place after the last row), so nothing is lost and nothing
comes twice; other options than `path` may be edited meanwhile (with a `speed`, none). What is appended to the last file meanwhile is read after a
restart. At the end of the last file the source ends, and a graph of such sources only runs to its end. Run again it starts
anew: its rows are added to the history a second time, and a warning at the start says so.

The last line of a file may lack its end. If it can be read it counts; if not it is a row error, and is read again after a
restart once it has grown. A CSV record that was cut off in its last cell can be read, so append whole lines: when more of
such a line is there after a restart, a row error tells what was left out.

## Limits
Lines and CSV records of at most 1 MiB; a longer one is a row error. Text is UTF-8. Compressed files are not read, but for
Parquet with Snappy or Zstandard inside. With a `speed` other than `max`, about 400,000 rows a second.

## Fails when
A file is missing, is no file of its format, or lacks a column of `fields`: the source stops and says which. A file that
changed under the position (it is gone, shorter, or another one, by the 256 bytes before it; of Parquet by the row groups)
is such an error too. A disk that fails while reading is tried again.
";

/// What may block on the disk.
const READING: &str = "reading a file";

/// How often rows that have become due are looked for, when a pace is given: finer than an eye can tell, and 50 polls
/// a second cost nothing.
const PACE_EVERY: Duration = Duration::from_millis(20);

/// The YAML block of a `file` source.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FileConfig {
    /// The file, or several: `data/*.parquet`, `history/**/*.parquet`. Relative paths count from the YAML file's folder.
    pub path: At<String>,
    /// `json`, `csv` or `parquet`. Default: what the name ends with says.
    #[serde(default)]
    pub format: Option<Format>,
    /// Columns with their types; required. `pipeline fields SOURCE` prints them.
    #[serde(default)]
    pub fields: Option<Fields>,
    /// csv: whether the first record names the columns. Default `true`, as most files have it.
    #[serde(default)]
    pub header: Option<At<bool>>,
    /// csv: the character between cells, such as `;` or `tab`. Default `,`; of a `.tsv` file a tab.
    #[serde(default)]
    pub delimiter: Option<At<String>>,
    /// How fast rows come: `max` (default), or as a multiple of the time between them, such as `1x` or `60x`.
    #[serde(default)]
    pub speed: At<Speed>,
    /// The timestamp field that gives the pace; required with a `speed` other than `max`.
    #[serde(default)]
    pub time: Option<At<String>>,
}

/// The format of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// One JSON object per line.
    Json,
    /// Comma-separated values.
    Csv,
    /// Apache Parquet.
    Parquet,
}

impl SourceConfig for FileConfig {
    const TYPE: &'static str = "file";
    const PAGE: &'static str = PAGE;
    const EXAMPLE: &'static str = "\
type: file
path: events.ndjson
fields: {device_id: string, latency_ms: float, ts: timestamp}
";
    const PROMISES: &'static [(&'static str, Delivery)] = &[("", Delivery::Replayable)];

    fn check(&self, cx: &mut CheckContext<'_>) -> Option<SourceShape> {
        let format = self.checked_format(cx);
        if format.is_some_and(|format| format != Format::Csv) {
            let positions = [self.header.as_ref().map(|at| at.position), self.delimiter.as_ref().map(|at| at.position)];
            for position in positions.into_iter().flatten() {
                cx.error(position, "`header` and `delimiter` are for csv files");
            }
        }
        if let Some(delimiter) = &self.delimiter
            && delimiter_byte(delimiter).is_none()
        {
            let message = format!("`{}` cannot be the delimiter; it is one ASCII character, or `tab`", delimiter.value);
            cx.error(delimiter.position, message);
        }
        self.check_fields(cx);
        self.check_pace(cx);
        let fields = self.fields.as_ref().filter(|fields| !fields.is_empty())?;
        let is_paced = self.speed.value != Speed::Max;
        Some(SourceShape {
            schema: fields.schema(),
            delivery: Delivery::Replayable,
            schedule: if is_paced { Schedule::Every(PACE_EVERY) } else { Schedule::Continuous },
            bounded: true,
            can_be_on_demand: false,
            mounts: Vec::new(),
        })
    }

    fn build(&self, cx: SourceContext) -> Result<Box<dyn Source>> {
        let layout = self.layout()?;
        let pace = match (self.speed.value, &self.time) {
            (Speed::Times(factor), Some(time)) => Some((layout.fields.schema().index_of(time)?, factor)),
            _ => None,
        };
        Ok(Box::new(FileSource { layout: Arc::new(layout), folder: cx.folder, pattern: self.path.value.clone(), pace }))
    }

    fn identity(&self) -> Option<String> {
        if self.speed.value != Speed::Max {
            // A position counts the rows that were handed out of a part: with other options the part has other rows.
            return None;
        }
        let is_text = self.layout().is_ok_and(|layout| layout.format != Format::Parquet);
        Some(format!("{} in {}", if is_text { "bytes" } else { "rows" }, self.path.value))
    }

    fn discover(&self, cx: SourceContext) -> BoxFuture<'_, Result<Fields>> {
        let layout = self.layout();
        let pattern = self.path.value.clone();
        Box::pin(async move {
            let layout = layout?;
            blocking(READING, move || {
                let files = files::find(&cx.folder, &pattern)?;
                let first = files.first().ok_or_else(|| Error::internal("no file found and no error"))?;
                discover::fields(&layout, first)
            })
            .await
        })
    }
}

impl FileConfig {
    fn checked_format(&self, cx: &mut CheckContext<'_>) -> Option<Format> {
        let extension = extension(&self.path);
        if matches!(&*extension, "gz" | "zst" | "bz2" | "xz" | "lz4" | "zip") {
            cx.error(self.path.position, format!("compressed files (`.{extension}`) are not read; unpack it first"));
            return None;
        }
        let format = self.format.or_else(|| Format::of_extension(&extension));
        if format.is_none() {
            let hint = Some("add `format: json`, `csv` or `parquet`".to_owned());
            cx.error_hint(self.path.position, format!("the name of `{}` tells no format", self.path.value), hint);
        }
        format
    }

    fn check_fields(&self, cx: &mut CheckContext<'_>) {
        let Some(fields) = self.fields.as_ref().filter(|fields| !fields.is_empty()) else {
            let hint =
                Some(format!("`pipeline fields {}` prints it", cx.node().rsplit(' ').next().unwrap_or_default()));
            return cx.error_hint(cx.position(), "`fields` is missing", hint);
        };
        if let Some(header) = self.header.as_ref().filter(|header| !header.value)
            && let Some((name, _)) = fields.0.iter().find(|(_, spec)| spec.path.is_some())
        {
            cx.error(
                header.position,
                format!("without a header, cells are taken in order: `{name}` can have no `path`"),
            );
        }
    }

    fn check_pace(&self, cx: &mut CheckContext<'_>) {
        match (&self.time, self.speed.value) {
            (None, Speed::Times(_)) => {
                let hint = Some("`time: ts`, the timestamp field that gives the pace".to_owned());
                cx.error_hint(self.speed.position, format!("`speed: {}` needs `time`", self.speed.value), hint);
            }
            (Some(time), Speed::Max) => cx.note(time.position, "`time` has no effect with `speed: max`"),
            _ => {}
        }
        let (Some(time), Some(fields)) = (&self.time, &self.fields) else { return };
        match fields.0.get(&time.value).map(|spec| spec.field_type) {
            Some(FieldType::Timestamp(_)) => {}
            Some(other) => cx.error(time.position, format!("`{}` is {other}; the pace needs a timestamp", time.value)),
            None => {
                let hint = did_you_mean(time, fields.0.keys());
                cx.error_hint(time.position, format!("`{}` is not among `fields`", time.value), hint);
            }
        }
    }

    fn layout(&self) -> Result<Layout> {
        let extension = extension(&self.path);
        let format = self.format.or_else(|| Format::of_extension(&extension));
        let format = format.ok_or_else(|| Error::user(format!("the name of `{}` tells no format", self.path.value)))?;
        let default = if extension == "tsv" { b'\t' } else { b',' };
        Ok(Layout {
            format,
            fields: self.fields.clone().unwrap_or_default(),
            header: self.header.as_ref().is_none_or(|header| header.value),
            delimiter: self.delimiter.as_ref().and_then(|text| delimiter_byte(text)).unwrap_or(default),
        })
    }
}

impl Format {
    fn of_extension(extension: &str) -> Option<Self> {
        Some(match extension {
            "json" | "ndjson" | "jsonl" => Self::Json,
            "csv" | "tsv" => Self::Csv,
            "parquet" => Self::Parquet,
            _ => return None,
        })
    }
}

fn extension(path: &str) -> String {
    Path::new(path).extension().unwrap_or_default().to_string_lossy().to_ascii_lowercase()
}

fn delimiter_byte(text: &str) -> Option<u8> {
    match text.as_bytes() {
        b"tab" | b"\\t" => Some(b'\t'),
        [byte] if byte.is_ascii() && !matches!(byte, b'"' | b'\n' | b'\r') => Some(*byte),
        _ => None,
    }
}

/// How files are read.
#[derive(Clone, Debug)]
struct Layout {
    format: Format,
    fields: Fields,
    header: bool,
    delimiter: u8,
}

/// Where reading goes on in a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Place {
    /// Bytes before it; of a Parquet file, rows.
    offset: u64,
    /// Lines before it, for messages; of a Parquet file 0.
    line: u64,
    /// A hash of what stands right before it; `None` if nothing does, or if the position is of an earlier version.
    mark: Option<u64>,
    tail: Tail,
}

/// What became of a line at the end of the file that had no end of its own. The file may have been in the middle of growing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Tail {
    /// There was none.
    #[default]
    None,
    /// It was taken as a row and stands before the place.
    Row,
    /// It could not be read, which was reported. It stands behind the place and has so many bytes.
    Wrong(u64),
}

/// The error of a file that is not the one that a position is of.
fn changed(name: &str, place: &str) -> Error {
    Error::user(format!(
        "`{name}` is not the file that was read up to {place} before: what stands there has changed; put it back, or give \
         the source another name to read it from the start"
    ))
}

/// Some rows of one file.
struct Part {
    rows: RecordBatch,
    /// Rows that could not be read, in order, each with the number of good ones before it in `rows`.
    errors: Vec<(usize, RowError)>,
    /// The place after it all.
    after: Place,
}

/// An open file. Read from the same place, an unchanged file gives the same parts.
trait Rows: Send {
    /// The next rows, at most [`BATCH_ROWS_MAX`](pipeline::batch::BATCH_ROWS_MAX). `None` at the end. Blocks.
    fn read(&mut self) -> Result<Option<Part>>;
}

/// Most wrong rows of one part, so that a file of nothing but wrong lines is not held whole in memory.
const ERRORS_PER_PART_MAX: usize = 1024;
/// A part ends after so many bytes of the file, however few rows they are: rows may be as long as a record may be.
const PART_BYTES_MAX: u64 = 8 << 20;

/// The name of a column in a file: its `path`, written with dots, or the field's name.
fn name_in_file<'a>(name: &'a str, path: Option<&Vec<String>>) -> Cow<'a, str> {
    path.map_or(Cow::Borrowed(name), |path| Cow::Owned(path.join(".")))
}

/// `1 rows` reads badly in messages.
fn counted(number: usize, thing: &str) -> String {
    format!("{number} {thing}{}", if number == 1 { "" } else { "s" })
}

/// The source, not reading yet.
struct FileSource {
    layout: Arc<Layout>,
    folder: PathBuf,
    pattern: String,
    /// The column that gives the pace, and how fast.
    pace: Option<(usize, f64)>,
}

#[async_trait]
impl Source for FileSource {
    async fn connect(&mut self, position: Option<&[u8]>) -> Result<Reader> {
        let position = position.map(Position::decode).transpose()?;
        let (layout, folder, pattern) = (Arc::clone(&self.layout), self.folder.clone(), self.pattern.clone());
        let pace = self.pace;
        let walk =
            blocking(READING, move || Walk::start(layout, files::find(&folder, &pattern)?, position, pace)).await?;
        Ok(Reader::Pull(Box::new(FileReader { walk: Some(walk), reading: None })))
    }
}

/// Reads on a thread that may block. A call that is dropped half-way loses nothing: the next one waits for the same step.
struct FileReader {
    walk: Option<Walk>,
    reading: Option<JoinHandle<(Walk, Result<Option<Pulled>>)>>,
}

#[async_trait]
impl PullReader for FileReader {
    async fn next(&mut self) -> Result<Option<Pulled>> {
        if let Some(mut walk) = self.walk.take() {
            self.reading = Some(tokio::task::spawn_blocking(move || {
                let pulled = walk.next(Instant::now());
                (walk, pulled)
            }));
        }
        let reading = self.reading.as_mut().ok_or_else(|| Error::internal("the reader has failed before"))?;
        let finished = reading.await;
        self.reading = None;
        let (walk, pulled) = finished.map_err(|e| Error::internal(READING).because(e))?;
        self.walk = Some(walk);
        pulled
    }
}
