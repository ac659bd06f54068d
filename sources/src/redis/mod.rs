//! The `redis` source: replies of commands, entries of streams, elements of lists, published messages.

use futures::future::BoxFuture;
use indexmap::IndexMap;
use pipeline::config::{At, CheckContext, Duration, Fields, SecretUrl};
use pipeline::error::{Error, Result};
use pipeline::plugin::source::{
    Decoded, Decoder, Delivery, Receipts, Record, RowError, Schedule, Source, SourceConfig, SourceContext, SourceShape,
};
use pipeline::rows::{Cell, RowsBuilder};
use pipeline::schema::FieldType;
use schemars::JsonSchema;
use serde::Deserialize;

mod command;
mod entry;
mod group;
mod list;
mod poll;
mod pubsub;
mod stream;
mod unacknowledged;

pub use entry::StreamColumn;
pub use list::ListEnd;

use entry::{EntryRows, Layout};
use group::{EntryDecoder, GroupReceipts, GroupSource};
use list::{ListReceipts, ListSource};
use poll::{PollSource, Reads};
use pubsub::PubsubSource;
use stream::{Start, StreamSource};
use wire::redis::{Command, Connection, Endpoint, PATIENCE, Reply};

const PAGE: &str = "\
Reads from a Redis server in one of four ways: polls commands, or takes stream entries, list elements or published messages.

Give exactly one of `read`, `stream` (or `streams`), `list`, `channels` (and `patterns`).

## Emits

| way | rows | columns |
| --- | --- | --- |
| `read` | one per poll (`every`) | one per command. `int` where the reply is a whole number (`LLEN`, `SCARD`, `TTL`, …), `float` for `ZSCORE` and `GEODIST`, `json` for lists, `HGETALL` and `INFO`, else `string`; `fields` says otherwise. A missing key is null |
| `stream` | one per entry | `fields` from the entry's fields (its texts read as the types say), or with `json: NAME` from the JSON in that field; `columns` adds `id`, `stream`, `time`. Without `fields`: `id`, `stream` and `payload`, the entry as JSON |
| `list` | one per element | `fields` from JSON, else the whole element as `payload` |
| `channels` | one per message | `channel`, then `fields` from JSON, else the whole message as `payload` |

All commands of a poll go in one round trip. Only commands that read and answer at once are allowed. Words are split as a
shell does: `HGET \"my hash\" field`. A field with a path picks one value from `HGETALL`, `INFO`, `CONFIG GET`, or from JSON text:
`read: {clients: INFO clients}` with `fields: {clients: {type: int, path: connected_clients}}`.

## Delivery

- `read`: a sample of the state at each poll. `on_demand: true` polls only while somebody wants rows.
- `stream`: the id of the last entry is in the checkpoint; nothing lost, nothing twice. No consumer group is needed. Options
  may be edited meanwhile, and streams added; at another server or database all begin at `start` again. Entries
  that were trimmed or deleted before they were read are counted at connect and every 5 s, and reported as a row error; so is
  a stream that was deleted and began anew. One that ends before the position is an error in `/health`, because nothing would
  ever be read from it.
- `stream` with `group`: several processes share the entries. Each is acknowledged (`XACK`) once it is on disk here, and
  known by its id if it comes again. At connect a member first gets what it had not acknowledged, then what others have left
  for longer than `claim`, then new entries. Entries that were deleted while they waited are acknowledged and reported as row
  errors. What a member had on disk and could not acknowledge before it died is also given to another member after `claim`:
  so `claim` is longer than a restart takes. A group that was deleted is made anew, reads from the beginning, and says so.
- `list`: an element moves to the list `NAME:processing` and leaves it when it is on disk here. `NAME:processing:count` counts
  those that left, so that one that comes again after a crash is known: none is lost, none counts twice. It also names the
  source's connections, which the next one ends (`CLIENT KILL`), so that nothing a lost connection had under way comes late.
  A user who may not do that is told so in a warning; then elements that come late count twice.
- `channels`: best effort. Redis keeps nothing for those who are away.

Redis itself loses the last minutes of writes in a crash unless it runs with `appendonly yes`; for streams and lists a
warning says so at connect.

## Limits

- Entries that are trimmed from a stream before they are read are lost; they are counted with Redis 7 or newer.
- With `group`, the last 65 536 entries are remembered to know one that comes again; no more are read while so many are not
  acknowledged.
- One process per `processing` list.
- At most 8192 published messages wait to be read; when more come, the oldest are lost, and an error row says how many.
- Keyspace notifications (`__keyevent@0__:…`) are not delivered.
- A reply of 3 or 4 texts of which the first is `message`, `pmessage`, `subscribe` or alike is lost on the client's way; the poll fails.
- `list` and `group` need Redis 6.2, everything else Redis 5.
- One server; no Cluster, no Sentinel.

## Fails when

The server refuses the connection, the user or the password; a stream or list is of another type. The engine connects again
with back-off and goes on where it was. In a poll, a command that fails (`WRONGTYPE`) leaves its column null and is reported as
a row error; the other columns go on.
";

/// Reads from a Redis server. Give exactly one of `read`, `stream`/`streams`, `list`, `channels`/`patterns`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RedisConfig {
    /// The server: `redis://user:password@host:6379/0`; `rediss://` for TLS. Without a port 6379, without a path database 0.
    pub url: At<SecretUrl>,
    /// PEM file with the certificates to trust instead of the system's, for TLS with an own authority.
    #[serde(default)]
    pub ca: Option<At<String>>,
    /// Columns and their types. For `read` only where the type of the reply is not the wanted one; for the others what to
    /// read from each entry, element or message; without it they pass the raw `payload`.
    #[serde(default)]
    pub fields: At<Fields>,

    /// Poll: commands by the name of their column, such as `{total: GET total, depth: LLEN queue}`.
    #[serde(default)]
    pub read: Option<At<Reads>>,
    /// Poll: time from one poll to the next. Default 1s: a person looking at it wants no more.
    #[serde(default)]
    pub every: Option<At<Duration>>,

    /// Stream: its name.
    #[serde(default)]
    pub stream: Option<At<String>>,
    /// Stream: the names of several.
    #[serde(default)]
    pub streams: Option<At<Vec<String>>>,
    /// Stream: where to begin at the very first start: `latest` (default: only what is added from now on, because a stream
    /// may hold months), `earliest`, or after the entry with this id.
    #[serde(default)]
    pub start: Option<At<String>>,
    /// Stream: the field of the entry that holds JSON with the `fields`. Default: they are fields of the entry themselves.
    #[serde(default)]
    pub json: Option<At<String>>,
    /// Stream: columns beside `fields`: `id`, `stream`, `time` (the time in the id). Default none; `[id, stream]` without `fields`.
    #[serde(default)]
    pub columns: Option<At<Vec<StreamColumn>>>,

    /// Stream: read as a member of this consumer group, which shares the entries among its members. It is made if it is
    /// missing, from `start`. Default: none; this source reads every entry.
    #[serde(default)]
    pub group: Option<At<String>>,
    /// Stream with `group`: this member's name. Default: a name of this installation's own, kept in the state folder; two
    /// members of one name get each other's entries.
    #[serde(default)]
    pub consumer: Option<At<String>>,
    /// Stream with `group`: how long an entry that another member was given and did not acknowledge waits before this one takes
    /// it. Default `1m`: longer than a restart takes.
    #[serde(default)]
    pub claim: Option<At<Duration>>,

    /// List: its name.
    #[serde(default)]
    pub list: Option<At<String>>,
    /// List: the end to take elements from. Default `right`, because most writers use `LPUSH`.
    #[serde(default)]
    pub pop: Option<At<ListEnd>>,
    /// List: where elements wait until they are acknowledged. Default `LIST:processing`. Each process needs its own.
    #[serde(default)]
    pub processing: Option<At<String>>,

    /// Pub/sub: channels to subscribe to.
    #[serde(default)]
    pub channels: Option<At<Vec<String>>>,
    /// Pub/sub: patterns of channels to subscribe to, such as `news.*`.
    #[serde(default)]
    pub patterns: Option<At<Vec<String>>>,
}

/// Port of a URL that names none.
const PORT: u16 = 6379;

/// Time between polls if `every` is not given.
const EVERY_DEFAULT: Duration = Duration::from_secs(1);

/// How long an entry waits for its member if `claim` is not given.
const CLAIM_DEFAULT: Duration = Duration::from_secs(60);

/// A shorter `claim` takes entries from members that are alive.
const CLAIM_MIN: std::time::Duration = std::time::Duration::from_millis(100);

/// The way of reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Poll,
    Stream,
    List,
    Pubsub,
}

impl Mode {
    /// The option that chooses it, for messages.
    fn option(self) -> &'static str {
        match self {
            Self::Poll => "read",
            Self::Stream => "stream",
            Self::List => "list",
            Self::Pubsub => "channels",
        }
    }
}

impl SourceConfig for RedisConfig {
    const TYPE: &'static str = "redis";
    const PAGE: &'static str = PAGE;
    const EXAMPLE: &'static str = "\
type: redis
url: redis://127.0.0.1:6379
every: 500ms
read: {total_messages: GET total_messages, queue_depth: LLEN pending_messages}
fields: {total_messages: int}
";
    const PROMISES: &'static [(&'static str, Delivery)] = &[
        ("`read`", Delivery::Sampled),
        ("`stream`", Delivery::Replayable),
        ("`stream` with `group`", Delivery::Acknowledged),
        ("`list`", Delivery::Acknowledged),
        ("`channels`", Delivery::BestEffort),
    ];
    const INSTEAD: Option<&'static str> = Some("`stream` or `list`");

    fn check(&self, cx: &mut CheckContext<'_>) -> Option<SourceShape> {
        Endpoint::check(&self.url, self.ca.as_ref(), cx);
        let mode = self.check_mode(cx)?;
        self.check_options(mode, cx);
        let errors_before = cx.errors();
        let (schema, delivery, schedule) = match mode {
            Mode::Poll => {
                let columns = self.read.as_ref().map(|reads| poll::check(reads, &self.fields, cx));
                let every = self.every.as_ref().map_or(EVERY_DEFAULT, |every| every.value);
                (poll::schema(&columns.unwrap_or_default()), Delivery::Sampled, Schedule::Every(every.0))
            }
            Mode::Stream => {
                let layout = self.layout();
                layout.check(&self.fields, cx);
                let delivery = if self.group.is_some() { Delivery::Acknowledged } else { Delivery::Replayable };
                (layout.schema(), delivery, Schedule::Continuous)
            }
            Mode::List => (self.messages().0.schema().clone(), Delivery::Acknowledged, Schedule::Continuous),
            Mode::Pubsub => {
                self.check_channels(cx);
                (self.messages().0.schema().clone(), Delivery::BestEffort, Schedule::Continuous)
            }
        };
        let can_be_on_demand = mode == Mode::Poll;
        let shape = SourceShape { schema, delivery, schedule, bounded: false, can_be_on_demand, mounts: Vec::new() };
        (cx.errors() == errors_before).then_some(shape)
    }

    fn build(&self, cx: SourceContext) -> Result<Box<dyn Source>> {
        let endpoint = self.endpoint(&cx);
        Ok(match self.mode()? {
            Mode::Poll => Box::new(PollSource::new(endpoint, self.poll_columns()?)),
            Mode::Stream if self.group.is_some() => Box::new(GroupSource {
                endpoint,
                streams: self.stream_names(),
                group: self.group.as_ref().map(|group| group.value.clone()).unwrap_or_default(),
                consumer: self.consumer.as_ref().map(|consumer| consumer.value.clone()),
                claim: self.claim.as_ref().map_or(CLAIM_DEFAULT, |claim| claim.value).0,
                start: self.first(),
                name: cx.name,
                state_dir: cx.state_dir,
                warned: false,
            }),
            Mode::Stream => Box::new(StreamSource {
                endpoint,
                streams: self.stream_names(),
                start: self.first(),
                layout: self.layout(),
                name: cx.name,
                begun: None,
                warned: false,
            }),
            Mode::List => {
                let list = self.list.as_ref().map(|list| list.value.clone()).unwrap_or_default();
                let processing = self.processing.as_ref().map(|name| name.value.clone());
                Box::new(ListSource {
                    endpoint,
                    processing: processing.unwrap_or_else(|| format!("{list}:processing")),
                    list,
                    pop: self.pop.as_ref().map(|pop| pop.value).unwrap_or_default(),
                    name: cx.name,
                    warned: false,
                    warned_of_late: false,
                })
            }
            Mode::Pubsub => Box::new(PubsubSource {
                endpoint,
                channels: names(self.channels.as_ref()),
                patterns: names(self.patterns.as_ref()),
            }),
        })
    }

    fn decoder(&self) -> Option<Box<dyn Decoder>> {
        match self.mode().ok()? {
            Mode::Stream if self.group.is_some() => {
                Some(Box::new(EntryDecoder { rows: EntryRows::new(self.layout()) }))
            }
            Mode::Poll | Mode::Stream => None,
            Mode::List | Mode::Pubsub => {
                let (rows, raw_column) = self.messages();
                Some(Box::new(MessageDecoder { rows, raw_column, with_channel: self.list.is_none() }))
            }
        }
    }

    fn receipts(&self) -> Option<Box<dyn Receipts>> {
        if self.group.is_some() {
            return Some(Box::new(GroupReceipts::default()));
        }
        self.list.as_ref().map(|_| Box::new(ListReceipts::default()) as Box<dyn Receipts>)
    }

    /// A position names its streams itself: one that is added begins at its start, the others go on.
    fn identity(&self) -> Option<String> {
        let url = url::Url::parse(self.url.expose()).ok()?;
        let database = url.path().trim_matches('/');
        let database = if database.is_empty() { "0" } else { database };
        Some(format!("streams at {}:{}/{database}", url.host_str().unwrap_or_default(), url.port().unwrap_or(PORT)))
    }

    fn discover(&self, cx: SourceContext) -> BoxFuture<'_, Result<Fields>> {
        Box::pin(async move {
            let endpoint = self.endpoint(&cx);
            match self.mode()? {
                Mode::Poll => poll::discover(&endpoint, self.poll_columns()?).await,
                Mode::Stream => {
                    let json = self.json.as_ref().map(|json| json.value.as_str());
                    stream::discover(&endpoint, &self.stream_names(), json).await
                }
                mode => Err(Error::user(format!(
                    "looking at `{}` would take from it; write `fields` by hand, or leave them out for the raw `payload`",
                    mode.option()
                ))),
            }
        })
    }
}

impl RedisConfig {
    fn modes(&self) -> Vec<Mode> {
        let given = [
            (Mode::Poll, self.read.is_some()),
            (Mode::Stream, self.stream.is_some() || self.streams.is_some()),
            (Mode::List, self.list.is_some()),
            (Mode::Pubsub, self.channels.is_some() || self.patterns.is_some()),
        ];
        given.into_iter().filter(|(_, given)| *given).map(|(mode, _)| mode).collect()
    }

    fn mode(&self) -> Result<Mode> {
        self.modes()
            .first()
            .copied()
            .ok_or_else(|| Error::user("one of `read`, `stream`, `list`, `channels` is missing"))
    }

    fn check_mode(&self, cx: &mut CheckContext<'_>) -> Option<Mode> {
        let modes = self.modes();
        match modes.as_slice() {
            [mode] => return Some(*mode),
            [] => cx.error_hint(
                cx.position(),
                "says where, but not what to read",
                Some("give one of `read`, `stream`, `list`, `channels`".to_owned()),
            ),
            several => {
                let options: Vec<String> = several.iter().map(|mode| format!("`{}`", mode.option())).collect();
                let hint = Some("make one source of each".to_owned());
                cx.error_hint(cx.position(), format!("{} exclude each other", options.join(" and ")), hint);
            }
        }
        None
    }

    /// Reports options of another mode, and values that no mode takes.
    fn check_options(&self, mode: Mode, cx: &mut CheckContext<'_>) {
        let options = [
            ("every", Mode::Poll, self.every.as_ref().map(|o| o.position)),
            ("start", Mode::Stream, self.start.as_ref().map(|o| o.position)),
            ("json", Mode::Stream, self.json.as_ref().map(|o| o.position)),
            ("columns", Mode::Stream, self.columns.as_ref().map(|o| o.position)),
            ("group", Mode::Stream, self.group.as_ref().map(|o| o.position)),
            ("consumer", Mode::Stream, self.consumer.as_ref().map(|o| o.position)),
            ("claim", Mode::Stream, self.claim.as_ref().map(|o| o.position)),
            ("pop", Mode::List, self.pop.as_ref().map(|o| o.position)),
            ("processing", Mode::List, self.processing.as_ref().map(|o| o.position)),
        ];
        for (name, of, position) in options {
            if let Some(position) = position.filter(|_| of != mode) {
                cx.error(position, format!("`{name}` belongs to `{}`, not to `{}`", of.option(), mode.option()));
            }
        }
        if mode == Mode::Stream {
            self.check_group(cx);
        }
        if let Some(every) = self.every.as_ref().filter(|every| every.is_zero()) {
            cx.error(every.position, "`every` must be longer than nothing");
        }
        if let Some(start) = self.start.as_ref().filter(|start| Start::parse(start).is_none()) {
            let hint = Some("`latest`, `earliest`, or the id of an entry such as `1700000000000-0`".to_owned());
            cx.error_hint(start.position, format!("`{}` is no start", start.value), hint);
        }
        if let (Some(streams), true) = (&self.streams, self.stream.is_some()) {
            cx.error(streams.position, "give `stream` or `streams`, not both");
        }
        for list in [&self.streams, &self.channels, &self.patterns].into_iter().flatten() {
            if list.is_empty() {
                cx.error(list.position, "the list is empty");
            }
        }
        let same = self.processing.as_ref().filter(|p| self.list.as_ref().is_some_and(|list| list.value == p.value));
        if let Some(processing) = same {
            cx.error(processing.position, "`processing` must be another list than `list`");
        }
    }

    fn check_group(&self, cx: &mut CheckContext<'_>) {
        let of_group = [
            ("consumer", self.consumer.as_ref().map(|o| o.position)),
            ("claim", self.claim.as_ref().map(|o| o.position)),
        ];
        for (name, position) in of_group {
            if let Some(position) = position.filter(|_| self.group.is_none()) {
                cx.error(position, format!("`{name}` belongs to `group`"));
            }
        }
        for (name, text) in [("group", &self.group), ("consumer", &self.consumer)] {
            if let Some(text) = text.as_ref().filter(|text| text.trim().is_empty()) {
                cx.error(text.position, format!("`{name}` is empty"));
            }
        }
        if let Some(claim) = self.claim.as_ref().filter(|claim| claim.value.0 < CLAIM_MIN) {
            let message = format!("`claim` is {} ms or longer", CLAIM_MIN.as_millis());
            cx.error_hint(claim.position, message, Some("longer than a restart takes: `1m`".to_owned()));
        }
    }

    fn check_channels(&self, cx: &mut CheckContext<'_>) {
        for list in [&self.channels, &self.patterns].into_iter().flatten() {
            for name in list.iter().filter(|name| name.starts_with("__key")) {
                let hint = Some("poll the keys with `read`".to_owned());
                cx.error_hint(list.position, format!("`{name}`: keyspace notifications are not delivered"), hint);
            }
        }
        if self.fields.0.contains_key("channel") {
            let hint = Some("another name: `channel_field: {type: string, path: channel}`".to_owned());
            cx.error_hint(self.fields.position, "the column `channel` is the message's channel already", hint);
        }
    }

    fn endpoint(&self, cx: &SourceContext) -> Endpoint {
        Endpoint::new(&self.url, self.ca.as_ref().map(|ca| cx.folder.join(&ca.value)))
    }

    fn poll_columns(&self) -> Result<Vec<poll::PollColumn>> {
        self.read.as_ref().map_or_else(|| Ok(Vec::new()), |reads| poll::columns(reads, &self.fields))
    }

    fn stream_names(&self) -> Vec<String> {
        self.stream.iter().map(|stream| stream.value.clone()).chain(names(self.streams.as_ref())).collect()
    }

    /// Where streams begin at the very first start.
    fn first(&self) -> Start {
        self.start.as_ref().and_then(|start| Start::parse(start)).unwrap_or(Start::Latest)
    }

    fn layout(&self) -> Layout {
        let raw = self.fields.is_empty() && self.json.is_none();
        let default = if raw { vec![StreamColumn::Id, StreamColumn::Stream] } else { Vec::new() };
        Layout {
            columns: self.columns.as_ref().map_or(default, |columns| columns.value.clone()),
            raw,
            json: self.json.as_ref().map(|json| json.value.clone()),
            fields: self.fields.value.clone(),
        }
    }

    /// The rows of list elements or messages, and which column takes the whole of it, if one does.
    fn messages(&self) -> (RowsBuilder, Option<usize>) {
        let channel = self.list.is_none().then_some(("channel", FieldType::String));
        let payload = self.fields.is_empty().then_some(("payload", FieldType::String));
        let extra: Vec<_> = channel.into_iter().chain(payload).collect();
        (RowsBuilder::new(&extra, &self.fields), payload.map(|_| extra.len() - 1))
    }
}

fn names(list: Option<&At<Vec<String>>>) -> Vec<String> {
    list.map(|list| list.value.clone()).unwrap_or_default()
}

/// Decodes list elements and published messages.
struct MessageDecoder {
    rows: RowsBuilder,
    /// The column of the whole message, if no fields are declared.
    raw_column: Option<usize>,
    with_channel: bool,
}

impl Decoder for MessageDecoder {
    fn decode(&mut self, records: &[Record]) -> Result<Decoded> {
        let mut record_of_row = Vec::with_capacity(records.len());
        let mut errors = Vec::new();
        for (index, record) in (0..).zip(records) {
            match self.take(record) {
                Ok(()) => record_of_row.push(index),
                Err(message) => errors.push(RowError::new(message, &record.payload)),
            }
        }
        Ok(Decoded { rows: self.rows.finish()?, record_of_row, errors })
    }
}

impl MessageDecoder {
    fn take(&mut self, record: &Record) -> Result<(), String> {
        let mut row = self.rows.row();
        if self.with_channel {
            match record.metadata.split_first() {
                Some((&pubsub::MESSAGE, channel)) => self.rows.set(&mut row, 0, Cell::Bytes(channel))?,
                _ => {
                    let lost = String::from_utf8_lossy(&record.payload);
                    return Err(format!("{lost} messages were lost: they came faster than they were read"));
                }
            }
        }
        match self.raw_column {
            Some(column) => self.rows.set(&mut row, column, Cell::Bytes(&record.payload))?,
            None => self.rows.set_json(&mut row, &record.payload)?,
        }
        self.rows.push(row);
        Ok(())
    }
}

/// Warns once if the server would lose acknowledged writes in a crash. A server that does not tell is left alone.
async fn warn_if_volatile(connection: &mut Connection, source: &str, warned: &mut bool) -> Result<()> {
    if *warned {
        return Ok(());
    }
    let reply = connection.call(Command::new("CONFIG").args(["GET", "appendonly"]), PATIENCE).await?;
    let is_off = reply.into_list().is_some_and(|pair| pair.get(1).and_then(Reply::as_str) == Some("no"));
    if is_off {
        *warned = true;
        tracing::warn!(
            source,
            "this Redis runs with `appendonly no`: a crash of the server loses the writes since its last snapshot"
        );
    }
    Ok(())
}

/// The likeliest type of a text without one.
fn guess(text: &str) -> FieldType {
    let is_json = || text.starts_with(['{', '[']) && serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok();
    match text {
        "true" | "false" => FieldType::Bool,
        _ if text.parse::<i64>().is_ok() => FieldType::Int,
        _ if text.parse::<f64>().is_ok_and(f64::is_finite) => FieldType::Float,
        _ if pipeline::time::parse_us(text).is_some() => FieldType::Timestamp(None),
        _ if is_json() => FieldType::Json,
        _ => FieldType::String,
    }
}

/// Types seen so far, by name.
#[derive(Default)]
struct Guesses(IndexMap<String, FieldType>);

impl Guesses {
    /// Notes one more value of a field. Types that do not agree make it a string.
    fn see(&mut self, name: &str, field_type: FieldType) {
        let Some(known) = self.0.get_mut(name) else {
            self.0.insert(name.to_owned(), field_type);
            return;
        };
        *known = match (*known, field_type) {
            (known, seen) if known == seen => known,
            (FieldType::Int | FieldType::Float, FieldType::Int | FieldType::Float) => FieldType::Float,
            _ => FieldType::String,
        };
    }

    /// Notes the fields of a JSON object.
    fn see_json(&mut self, text: &str) {
        let Ok(serde_json::Value::Object(object)) = serde_json::from_str(text) else { return };
        for (name, value) in &object {
            match value {
                serde_json::Value::Null => {}
                serde_json::Value::Bool(_) => self.see(name, FieldType::Bool),
                serde_json::Value::Number(number) if number.is_f64() => self.see(name, FieldType::Float),
                serde_json::Value::Number(_) => self.see(name, FieldType::Int),
                serde_json::Value::String(text) if pipeline::time::parse_us(text).is_some() => {
                    self.see(name, FieldType::Timestamp(None));
                }
                serde_json::Value::String(_) => self.see(name, FieldType::String),
                serde_json::Value::Array(_) | serde_json::Value::Object(_) => self.see(name, FieldType::Json),
            }
        }
    }

    fn fields(self) -> Option<Fields> {
        let types = self.0;
        (!types.is_empty()).then(|| Fields::of(types.iter().map(|(name, field_type)| (name.as_str(), *field_type))))
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use pipeline::config::{Position, Problems, deserialize, tree};

    use super::*;

    /// The columns and types that a block emits, or its problems.
    fn checked(yaml: &str) -> Result<String, String> {
        let mut problems = Problems::default();
        let node = tree::parse(yaml).expect("YAML");
        let mut cx = CheckContext::new(&mut problems, "", Position { line: 1, column: 1 }, Path::new("."));
        let shape = deserialize::read::<RedisConfig>(&node, &mut cx).and_then(|config| config.check(&mut cx));
        let columns = shape.map(|shape| {
            let fields = shape.schema.fields().iter();
            fields.map(|f| format!("{}: {}", f.name(), pipeline::schema::type_word(f))).collect::<Vec<_>>().join(", ")
        });
        columns.filter(|_| !problems.has_errors()).ok_or_else(|| problems.render("f"))
    }

    #[test]
    fn every_way_of_reading_has_its_columns() {
        for (yaml, columns) in [
            (
                "read: {total: GET t, depth: LLEN q, score: ZSCORE z m, all: HGETALL h, clients: INFO clients}\n\
                 fields: {total: int, clients: {type: int, path: connected_clients}}",
                "total: int, depth: int, score: float, all: json, clients: int",
            ),
            ("stream: s", "id: string, stream: string, payload: json"),
            ("streams: [a, b]\nfields: {x: float}", "x: float"),
            (
                "stream: s\nfields: {x: float}\ncolumns: [time, id]\nstart: earliest",
                "time: timestamp, id: string, x: float",
            ),
            ("stream: s\njson: body\nfields: {x: {type: int, path: a.b}}", "x: int"),
            ("stream: s\ngroup: g\nclaim: 5m\nconsumer: me\nfields: {x: float}", "x: float"),
            ("list: q", "payload: string"),
            ("list: q\npop: left\nfields: {x: int}", "x: int"),
            ("channels: [a]", "channel: string, payload: string"),
            ("patterns: ['a.*']\nfields: {x: int}", "channel: string, x: int"),
        ] {
            assert_eq!(checked(&format!("url: redis://h\n{yaml}")), Ok(columns.to_owned()), "{yaml}");
        }
    }

    #[test]
    fn wrong_blocks_are_reported_at_their_place() {
        for (yaml, place, message) in [
            ("url: redis://h", "1:1", "says where, but not what to read"),
            ("url: redis://h\nlist: a\nstream: b", "1:1", "`stream` and `list` exclude each other"),
            ("url: http://h\nlist: a", "1:6", "`http` is no scheme of Redis"),
            ("url: redis://h/x\nlist: a", "1:6", "`x` is no number of a database"),
            ("url: redis://h\nlist: a\nca: x.pem", "3:5", "`ca` is of no use without TLS"),
            ("url: redis://h\nread: {a: GET a, b: SET b 1}", "2:21", "`b`: `SET` is refused"),
            ("url: redis://h\nread: {a: \"GET a\", b: 'LLENN q'}", "2:24", "did you mean `LLEN`?"),
            ("url: redis://h\nread: {a: GET a}\nfields: {b: int}", "3:9", "did you mean `a`?"),
            ("url: redis://h\nread: {a: LLEN a}\nfields: {a: {type: int, path: x}}", "3:9", "this one is a number"),
            ("url: redis://h\nstream: s\nstart: newest", "3:8", "`newest` is no start"),
            ("url: redis://h\nlist: s\nstart: latest", "3:8", "`start` belongs to `stream`, not to `list`"),
            ("url: redis://h\nstream: s\nevery: 1s", "3:8", "`every` belongs to `read`"),
            ("url: redis://h\nstream: s\nfields: {x: {type: int, path: a.b}}", "3:9", "json: payload"),
            ("url: redis://h\nstream: s\ncolumns: [id]\nfields: {id: int}", "4:9", "in `columns` and in `fields`"),
            ("url: redis://h\nlist: q\nprocessing: q", "3:13", "another list"),
            ("url: redis://h\nlist: q\ngroup: g", "3:8", "`group` belongs to `stream`"),
            ("url: redis://h\nstream: s\nconsumer: c", "3:11", "`consumer` belongs to `group`"),
            ("url: redis://h\nstream: s\nclaim: 1m", "3:8", "`claim` belongs to `group`"),
            ("url: redis://h\nstream: s\ngroup: ''", "3:9", "`group` is empty"),
            ("url: redis://h\nstream: s\ngroup: g\nclaim: 1ms", "4:8", "`claim` is 100 ms or longer"),
            ("url: redis://h\nstream: s\ngroup: g\nclaim: soon", "4:8", "soon"),
            ("url: redis://h\npatterns: ['__keyevent@0__:*']", "2:11", "keyspace notifications"),
            ("url: redis://h\nchannels: []", "2:11", "the list is empty"),
        ] {
            let problems = checked(yaml).expect_err(yaml);
            assert!(problems.contains(&format!("f:{place}: ")) && problems.contains(message), "{yaml}\n{problems}");
        }
    }

    #[test]
    fn a_position_belongs_to_a_server_and_a_database() {
        let identity = |url: &str, streams: &str| {
            let node = tree::parse(&format!("url: {url}\n{streams}")).expect("YAML");
            let mut problems = Problems::default();
            let mut cx = CheckContext::new(&mut problems, "", Position { line: 1, column: 1 }, Path::new("."));
            deserialize::read::<RedisConfig>(&node, &mut cx).expect("a source").identity()
        };
        let known = identity("redis://me:secret@h", "stream: s");
        assert_eq!(known.as_deref(), Some("streams at h:6379/0"));
        for (url, streams) in [("rediss://h:6379/0", "stream: s"), ("redis://h", "streams: [s, t]\nfields: {x: int}")] {
            assert_eq!(identity(url, streams), known, "{url} {streams}");
        }
        for url in ["redis://other", "redis://h:6380", "redis://h/1"] {
            assert_ne!(identity(url, "stream: s"), known, "{url}");
        }
    }

    #[test]
    fn a_password_never_shows() {
        let problems = checked("url: http://user:hunter2@h\nlist: a").expect_err("a wrong scheme");
        assert!(!problems.contains("hunter2"), "{problems}");
    }

    #[test]
    fn values_of_several_entries_agree_on_a_type() {
        let mut guesses = Guesses::default();
        guesses.see_json(r#"{"n":1,"x":1,"t":"2026-11-20T12:00:00Z","s":"a","o":{"a":1},"b":true,"m":1}"#);
        guesses.see_json(r#"{"n":2,"x":1.5,"m":"a","extra":null}"#);
        let expected =
            "fields:\n  n: int\n  x: float\n  t: timestamp\n  s: string\n  o: json\n  b: bool\n  m: string\n";
        assert_eq!(guesses.fields().map(|fields| fields.to_string()).as_deref(), Some(expected));
        for (text, field_type) in [("5", "int"), ("5.5", "float"), ("true", "bool"), ("{}", "json"), ("nan", "string")]
        {
            assert_eq!(guess(text).to_string(), field_type, "{text}");
        }
    }
}
