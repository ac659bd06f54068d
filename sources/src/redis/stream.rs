//! `stream`: the entries of streams, from a position that is kept in the checkpoint.

use std::collections::HashMap;
use std::time::Duration;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use pipeline::batch::BATCH_ROWS_MAX;
use pipeline::config::{At, CheckContext, Fields};
use pipeline::error::{Error, Result};
use pipeline::json::json_string;
use pipeline::plugin::source::{PullReader, Pulled, Reader, RowError, Source};
use pipeline::rows::{Cell, RowsBuilder};
use pipeline::schema::FieldType;
use pipeline::state::{StateReader, StateWriter};
use schemars::JsonSchema;
use serde::Deserialize;

use wire::redis::{Command, Connection, Endpoint, PATIENCE, Reply};

/// How long the server holds a read back when there is nothing new. New entries end the wait at once, so this
/// only bounds how long a dead connection stays unnoticed.
const BLOCK: Duration = Duration::from_secs(5);

/// Most entries of one read of one stream: a larger batch gains nothing, a smaller one costs round trips.
const ENTRIES_MAX: usize = 2048;

/// Entries that `pipeline fields` looks at.
const DISCOVER_ENTRIES: usize = 100;

/// A column beside `fields`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StreamColumn {
    /// The entry's id, such as `1700000000000-0`.
    Id,
    /// The name of the stream.
    Stream,
    /// The time in the entry's id, in milliseconds: when the server took it, unless the writer set the id.
    Time,
}

impl StreamColumn {
    fn name_and_type(self) -> (&'static str, FieldType) {
        match self {
            Self::Id => ("id", FieldType::String),
            Self::Stream => ("stream", FieldType::String),
            Self::Time => ("time", FieldType::Timestamp(None)),
        }
    }
}

/// How entries become rows.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    /// Columns beside `fields`, first in the row.
    pub(super) columns: Vec<StreamColumn>,
    /// Whether the whole entry is one `payload` column.
    pub(super) raw: bool,
    /// The field of the entry that holds JSON with the `fields`; else they are fields of the entry.
    pub(super) json: Option<String>,
    /// The declared columns.
    pub(super) fields: Fields,
}

impl Layout {
    fn extra(&self) -> Vec<(&'static str, FieldType)> {
        let payload = self.raw.then_some(("payload", FieldType::Json));
        self.columns.iter().map(|column| column.name_and_type()).chain(payload).collect()
    }

    fn builder(&self) -> RowsBuilder {
        RowsBuilder::new(&self.extra(), &self.fields)
    }

    /// The columns of the row.
    pub(super) fn schema(&self) -> SchemaRef {
        self.builder().schema().clone()
    }

    /// Reports what does not fit together.
    pub(super) fn check(&self, fields: &At<Fields>, cx: &mut CheckContext<'_>) {
        for (name, _) in self.extra() {
            if self.fields.0.contains_key(name) {
                let hint = format!("another name: `{name}_field: {{type: string, path: {name}}}`");
                cx.error_hint(fields.position, format!("`{name}` is in `columns` and in `fields`"), Some(hint));
            }
        }
        if self.json.is_some() && self.fields.is_empty() {
            cx.error(fields.position, "`json` needs `fields`: what to read from it");
        }
        let nested = self.fields.0.iter().find(|(_, spec)| spec.path.as_ref().is_some_and(|path| path.len() > 1));
        if let Some((name, _)) = nested.filter(|_| self.json.is_none()) {
            let hint = Some("name the field that holds JSON: `json: payload`".to_owned());
            cx.error_hint(fields.position, format!("`{name}`: an entry's fields are not nested"), hint);
        }
    }

    /// Which columns an entry's field fills.
    fn columns_of_name(&self) -> HashMap<String, Vec<usize>> {
        let mut columns: HashMap<String, Vec<usize>> = HashMap::new();
        let first = self.extra().len();
        for (index, (name, spec)) in self.fields.0.iter().enumerate() {
            let entry_name = spec.path.as_ref().and_then(|path| path.first()).unwrap_or(name);
            columns.entry(entry_name.clone()).or_default().push(first + index);
        }
        columns
    }
}

/// Where to begin at the very first start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// With entries added from now on.
    Latest,
    /// With the oldest entry.
    Earliest,
    /// After the entry with this id.
    After(String),
}

impl Start {
    pub(super) fn parse(text: &str) -> Option<Self> {
        Some(match text {
            "latest" => Self::Latest,
            "earliest" => Self::Earliest,
            id if milliseconds(id).is_some() => Self::After(id.to_owned()),
            _ => return None,
        })
    }
}

/// The milliseconds in an id such as `1700000000000-0` or `1700000000000`.
fn milliseconds(id: &str) -> Option<i64> {
    let (time, sequence) = id.split_once('-').unwrap_or((id, "0"));
    sequence.parse::<u64>().ok()?;
    time.parse().ok()
}

/// The source in this mode.
pub(super) struct StreamSource {
    pub(super) endpoint: Endpoint,
    pub(super) streams: Vec<String>,
    pub(super) start: Start,
    pub(super) layout: Layout,
    pub(super) name: String,
    /// Where the last reader began, for a connection that is lost before it gave a position.
    pub(super) begun: Option<Vec<(String, String)>>,
    pub(super) warned: bool,
}

#[async_trait]
impl Source for StreamSource {
    async fn connect(&mut self, position: Option<&[u8]>) -> Result<Reader> {
        let mut connection = self.endpoint.connect(1).await?;
        super::warn_if_volatile(&mut connection, &self.name, &mut self.warned).await?;
        let known = match position {
            Some(bytes) => decode_position(bytes)?,
            None => self.begun.clone().unwrap_or_default(),
        };
        let mut positions = Vec::with_capacity(self.streams.len());
        for stream in &self.streams {
            let id = match known.iter().find(|(name, _)| name == stream) {
                Some((_, id)) => id.clone(),
                None => first_position(&mut connection, stream, &self.start).await?,
            };
            positions.push((stream.clone(), id));
        }
        self.begun = Some(positions.clone());
        Ok(Reader::Pull(Box::new(StreamReader {
            connection,
            positions,
            // The engine learns the beginning even if no entry comes before a restart.
            announce: position.is_none(),
            columns_of_name: self.layout.columns_of_name(),
            rows: self.layout.builder(),
            layout: self.layout.clone(),
        })))
    }
}

/// The id after which a stream is read at the very first start.
async fn first_position(connection: &mut Connection, stream: &str, start: &Start) -> Result<String> {
    match start {
        Start::Earliest => return Ok(BEFORE_ALL.to_owned()),
        Start::After(id) => return Ok(id.clone()),
        Start::Latest => {}
    }
    let command = Command::new("XINFO").args(["STREAM".to_owned(), stream.to_owned()]);
    match connection.call(command, PATIENCE).await? {
        Reply::Error(words) if words.contains("no such key") => Ok(BEFORE_ALL.to_owned()),
        Reply::List(pairs) => {
            let pair = pairs.chunks_exact(2).find(|pair| pair[0].as_str() == Some("last-generated-id"));
            let id = pair.and_then(|pair| pair[1].as_str());
            Ok(id.ok_or_else(|| connection.error("XINFO STREAM without last-generated-id"))?.to_owned())
        }
        other => Err(connection.error(format!("stream `{stream}`: {}", words_of(&other)))),
    }
}

/// The id before every entry.
const BEFORE_ALL: &str = "0-0";

fn words_of(reply: &Reply) -> String {
    match reply {
        Reply::Error(words) => words.clone(),
        other => format!("unexpected reply {other:?}"),
    }
}

struct StreamReader {
    connection: Connection,
    /// The id of the last entry taken, per stream.
    positions: Vec<(String, String)>,
    announce: bool,
    layout: Layout,
    columns_of_name: HashMap<String, Vec<usize>>,
    rows: RowsBuilder,
}

#[async_trait]
impl PullReader for StreamReader {
    async fn next(&mut self) -> Result<Option<Pulled>> {
        let mut errors = Vec::new();
        if !std::mem::take(&mut self.announce) {
            for (stream, entries) in self.read().await? {
                for entry in entries {
                    let (id, fields) = entry_of(entry).ok_or_else(|| self.connection.error("an entry without id"))?;
                    if let Err(message) = self.take(&stream, &id, &fields) {
                        errors.push(RowError::new(format!("{stream} {id}: {message}"), payload(&fields).as_bytes()));
                    }
                    if let Some((_, position)) = self.positions.iter_mut().find(|(name, _)| *name == stream) {
                        *position = id;
                    }
                }
            }
        }
        Ok(Some(Pulled { rows: self.rows.finish()?, errors, position: encode_position(&self.positions), more: false }))
    }
}

impl StreamReader {
    /// Entries after the positions, per stream; none if nothing came while the server waited.
    async fn read(&mut self) -> Result<Vec<(String, Vec<Reply>)>> {
        let count = (BATCH_ROWS_MAX / self.positions.len().max(1)).clamp(1, ENTRIES_MAX);
        let command = Command::new("XREAD")
            .args(["COUNT".to_owned(), count.to_string(), "BLOCK".to_owned(), BLOCK.as_millis().to_string()])
            .arg("STREAMS")
            .args(self.positions.iter().map(|(stream, _)| stream.clone()))
            .args(self.positions.iter().map(|(_, id)| id.clone()));
        let streams = match self.connection.call(command, BLOCK + PATIENCE).await? {
            Reply::Null => return Ok(Vec::new()),
            Reply::List(streams) => streams,
            other => return Err(self.connection.error(words_of(&other))),
        };
        let stream_of = |reply: Reply| {
            let mut parts = reply.into_list()?.into_iter();
            let name = parts.next()?.as_str()?.to_owned();
            Some((name, parts.next()?.into_list()?))
        };
        streams.into_iter().map(|s| stream_of(s).ok_or_else(|| self.connection.error("a malformed entry"))).collect()
    }

    /// Takes one entry as a row.
    fn take(&mut self, stream: &str, id: &str, fields: &[Reply]) -> Result<(), String> {
        let whole = if self.layout.raw { payload(fields) } else { String::new() };
        let mut row = self.rows.row();
        for (index, column) in self.layout.columns.iter().enumerate() {
            let cell = match column {
                StreamColumn::Id => Cell::Text(id.into()),
                StreamColumn::Stream => Cell::Text(stream.into()),
                StreamColumn::Time => {
                    Cell::Time(milliseconds(id).and_then(|ms| ms.checked_mul(1000)).ok_or("an id without time")?)
                }
            };
            self.rows.set(&mut row, index, cell)?;
        }
        if self.layout.raw {
            self.rows.set(&mut row, self.layout.columns.len(), Cell::Json(whole.as_str().into()))?;
        } else if let Some(json) = &self.layout.json {
            let named = fields.chunks_exact(2).find(|pair| pair[0].as_str() == Some(json));
            match named.map(|pair| &pair[1]) {
                Some(Reply::Text(message)) => self.rows.set_json(&mut row, message)?,
                _ => return Err(format!("the entry has no field `{json}`")),
            }
        } else {
            for pair in fields.chunks_exact(2) {
                let (Some(name), Reply::Text(value)) = (pair[0].as_str(), &pair[1]) else { continue };
                for &column in self.columns_of_name.get(name).into_iter().flatten() {
                    let cell = std::str::from_utf8(value).map_or(Cell::Bytes(value), Cell::Untyped);
                    self.rows.set(&mut row, column, cell)?;
                }
            }
        }
        self.rows.push(row);
        Ok(())
    }
}

/// An entry's id and its names and values in turn. An entry that was deleted meanwhile has none.
fn entry_of(entry: Reply) -> Option<(String, Vec<Reply>)> {
    let mut parts = entry.into_list()?.into_iter();
    let id = parts.next()?.as_str()?.to_owned();
    Some((id, parts.next().and_then(Reply::into_list).unwrap_or_default()))
}

/// An entry as a JSON object of texts. Bytes that are no UTF-8 are replaced.
fn payload(fields: &[Reply]) -> String {
    let text = |reply: &Reply| match reply {
        Reply::Text(text) => json_string(&String::from_utf8_lossy(text)),
        _ => "null".to_owned(),
    };
    let pairs: Vec<String> =
        fields.chunks_exact(2).map(|pair| format!("{}:{}", text(&pair[0]), text(&pair[1]))).collect();
    format!("{{{}}}", pairs.join(","))
}

fn encode_position(positions: &[(String, String)]) -> Vec<u8> {
    let mut state = StateWriter::default();
    state.u64(positions.len() as u64);
    for (stream, id) in positions {
        state.str(stream);
        state.str(id);
    }
    state.finish()
}

fn decode_position(bytes: &[u8]) -> Result<Vec<(String, String)>> {
    let mut state = StateReader::new(bytes);
    (0..state.count()?).map(|_| Ok((state.str()?.to_owned(), state.str()?.to_owned()))).collect()
}

/// Guesses the fields from the newest entries.
pub(super) async fn discover(endpoint: &Endpoint, streams: &[String], json: Option<&str>) -> Result<Fields> {
    let mut connection = endpoint.connect(1).await?;
    let mut guesses = super::Guesses::default();
    for stream in streams {
        let newest = ["+".to_owned(), "-".to_owned(), "COUNT".to_owned(), DISCOVER_ENTRIES.to_string()];
        let command = Command::new("XREVRANGE").arg(stream.clone()).args(newest);
        let entries = match connection.call(command, PATIENCE).await? {
            Reply::List(entries) => entries,
            other => return Err(connection.error(format!("stream `{stream}`: {}", words_of(&other)))),
        };
        for (_, fields) in entries.into_iter().filter_map(entry_of) {
            for pair in fields.chunks_exact(2) {
                let (Some(name), Some(value)) = (pair[0].as_str(), pair[1].as_str()) else { continue };
                match json {
                    None => guesses.see(name, super::guess(value)),
                    Some(json) if json == name => guesses.see_json(value),
                    Some(_) => {}
                }
            }
        }
    }
    guesses.fields().ok_or_else(|| Error::user("no entry to look at: add one, then ask again"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_is_a_word_or_an_id() {
        for (text, expected) in [
            ("latest", Some(Start::Latest)),
            ("earliest", Some(Start::Earliest)),
            ("1700000000000-3", Some(Start::After("1700000000000-3".to_owned()))),
            ("1700000000000", Some(Start::After("1700000000000".to_owned()))),
            ("newest", None),
            ("1-", None),
            ("$", None),
        ] {
            assert_eq!(Start::parse(text), expected, "{text}");
        }
    }

    #[test]
    fn positions_read_back_and_damage_is_an_error() {
        let positions = vec![("a".to_owned(), "1-0".to_owned()), ("b".to_owned(), BEFORE_ALL.to_owned())];
        let bytes = encode_position(&positions);
        assert_eq!(decode_position(&bytes).expect("positions"), positions);
        assert!(decode_position(&bytes[..bytes.len() - 1]).is_err());
    }
}
