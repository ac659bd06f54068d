//! `stream` with `group`: several members share the entries of streams, each acknowledged once it is on disk.
//!
//! The server keeps what a member was given and has not acknowledged. That comes first at connect, then what members
//! that seem dead have left, then new entries. An entry is known by its id if it comes again.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::{BufMut, Bytes, BytesMut};
use pipeline::error::{Error, Result};
use pipeline::plugin::source::{
    Acknowledger, Decoded, Decoder, PushReader, Reader, Receipt, Receipts, Record, RowError, Source,
};
use pipeline::state::{StateReader, StateWriter};
use serde::{Deserialize, Serialize};
use wire::redis::{Command, Connection, Endpoint, PATIENCE, Reply};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::entry::{EntryRows, entry_of, payload, streams_of, words_of};
use super::stream::{BLOCK, ENTRIES_MAX, Start};
use super::unacknowledged::Unacknowledged;
use crate::identity;

/// Entries that are remembered, to know one that comes again. No more are given out while so many are unacknowledged: the
/// engine takes in several times as many small ones while its disk stands still.
const REMEMBERED_MAX: usize = 1 << 16;

/// Entries in one `XACK`.
const ACKNOWLEDGED_MAX: usize = 1024;

/// The source in this mode.
pub(super) struct GroupSource {
    pub(super) endpoint: Endpoint,
    pub(super) streams: Vec<String>,
    pub(super) group: String,
    /// The member's name, if the YAML says it.
    pub(super) consumer: Option<String>,
    /// How long an entry waits for its member before another takes it.
    pub(super) claim: Duration,
    pub(super) start: Start,
    pub(super) name: String,
    pub(super) state_dir: PathBuf,
    pub(super) warned: bool,
}

#[async_trait]
impl Source for GroupSource {
    async fn connect(&mut self, _position: Option<&[u8]>) -> Result<Reader> {
        let path = Member::path(&self.state_dir, &self.name);
        let mut member = Member::load(&path, &self.name, self.consumer.as_deref())?;
        // Two connections: an acknowledgement does not wait behind a blocking read.
        let mut connection = self.endpoint.connect(1).await?;
        super::warn_if_volatile(&mut connection, &self.name, &mut self.warned).await?;
        let mut gone = Vec::new();
        for stream in &self.streams {
            let known = member.groups.contains(&(stream.clone(), self.group.clone()));
            if make(&mut connection, stream, &self.group, &self.start, known).await? && known {
                gone.push(stream.clone());
            }
        }
        member.note(&self.streams, &self.group, &path)?;
        let acknowledging = self.endpoint.connect(1).await?;
        let taken = Taken::default();
        let reader = GroupReader {
            connection,
            group: self.group.clone(),
            consumer: member.consumer,
            own: self.streams.iter().map(|stream| (stream.clone(), "0".to_owned())).collect(),
            streams: self.streams.clone(),
            gone,
            claim: self.claim,
            claims: VecDeque::new(),
            claim_at: Instant::now(),
            taken: taken.clone(),
            next: 0,
        };
        let acknowledger = GroupAcknowledger { connection: acknowledging, group: self.group.clone(), taken };
        Ok(Reader::Push(Box::new(reader), Box::new(acknowledger)))
    }
}

/// Makes the group, and the stream if it is missing; whether it was made. One that is `known` and was deleted reads its
/// stream from the beginning: what is there came after it.
async fn make(connection: &mut Connection, stream: &str, group: &str, start: &Start, known: bool) -> Result<bool> {
    let first = match start {
        _ if known => "0",
        Start::Latest => "$",
        Start::Earliest => "0",
        Start::After(id) => id,
    };
    let create = ["CREATE", stream, group, first, "MKSTREAM"].map(str::to_owned);
    match connection.call(Command::new("XGROUP").args(create), PATIENCE).await? {
        Reply::Error(words) if words.starts_with("BUSYGROUP") => Ok(false),
        Reply::Text(_) => Ok(true),
        other => Err(connection.error(format!("stream `{stream}`: {}", words_of(&other)))),
    }
}

/// What an installation remembers, in a small file in the state folder: its name in the group, so that after a restart it
/// gets what it had not acknowledged, and the groups that there were.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Member {
    consumer: String,
    /// Streams with their groups.
    groups: Vec<(String, String)>,
}

impl Member {
    fn path(state_dir: &Path, source: &str) -> PathBuf {
        state_dir.join(format!("redis-{source}.id"))
    }

    /// Reads the file, or makes a new name. `consumer` is the one of the configuration.
    fn load(path: &Path, source: &str, consumer: Option<&str>) -> Result<Self> {
        let stored = identity::load(path, "is a new member")?;
        let mut member = stored.unwrap_or_else(|| Self { consumer: identity::new_name(source), groups: Vec::new() });
        if let Some(consumer) = consumer {
            consumer.clone_into(&mut member.consumer);
        }
        Ok(member)
    }

    /// Notes that there are these groups. Before the first entry is taken: the name must survive a crash.
    fn note(&mut self, streams: &[String], group: &str, path: &Path) -> Result<()> {
        self.groups = streams.iter().map(|stream| (stream.clone(), group.to_owned())).collect();
        if identity::load(path, "is a new member")?.is_some_and(|stored: Self| stored == *self) {
            return Ok(());
        }
        identity::store(path, self)
    }
}

/// The streams and ids of the entries that the connection has given out.
type Taken = Unacknowledged<(String, String)>;

struct GroupReader {
    connection: Connection,
    streams: Vec<String>,
    group: String,
    consumer: String,
    /// Streams whose own unacknowledged entries are still to be read, after which id.
    own: VecDeque<(String, String)>,
    /// Streams whose group had been deleted.
    gone: Vec<String>,
    claim: Duration,
    /// Streams to look through for entries of dead members, from which id.
    claims: VecDeque<(String, String)>,
    claim_at: Instant,
    taken: Taken,
    next: u64,
}

#[async_trait]
impl PushReader for GroupReader {
    async fn next(&mut self) -> Result<Vec<Record>> {
        loop {
            self.taken.room(self.streams.len() * self.count(), REMEMBERED_MAX).await;
            let mut records: Vec<Record> = Vec::new();
            for stream in std::mem::take(&mut self.gone) {
                records.push(self.record(&stream, None, Kind::Gone, Bytes::new()));
            }
            if let Some((stream, after)) = self.own.pop_front() {
                records.extend(self.own(stream, &after).await?);
            } else if let Some((stream, from)) = self.claims.pop_front() {
                records.extend(self.claim(stream, &from).await?);
            } else if self.claim_at <= Instant::now() {
                // Twice per `claim`: so an entry waits for one and a half of it at most.
                self.claim_at = Instant::now() + self.claim / 2;
                self.claims = self.streams.iter().map(|stream| (stream.clone(), "0-0".to_owned())).collect();
            } else {
                records.extend(self.new_entries().await?);
            }
            if !records.is_empty() {
                return Ok(records);
            }
        }
    }
}

impl GroupReader {
    fn read(&self) -> Command {
        let words = ["GROUP", &self.group, &self.consumer, "COUNT"].map(str::to_owned);
        Command::new("XREADGROUP").args(words).arg(self.count().to_string())
    }

    /// Most entries of one stream in one reply: of all together, no more than half of those that are remembered.
    fn count(&self) -> usize {
        (REMEMBERED_MAX / 2 / self.streams.len().max(1)).clamp(1, ENTRIES_MAX)
    }

    /// Entries of `stream` that this member was given and has not acknowledged.
    async fn own(&mut self, stream: String, after: &str) -> Result<Vec<Record>> {
        let command = self.read().arg("STREAMS").args([stream.clone(), after.to_owned()]);
        let records = self.call(command, PATIENCE).await?;
        if let Some(last) = records.last().and_then(|record| Place::of(&record.metadata)).and_then(|place| place.id) {
            self.own.push_front((stream, last));
        }
        Ok(records)
    }

    /// Entries after all that any member was given.
    async fn new_entries(&mut self) -> Result<Vec<Record>> {
        let block = BLOCK.min(self.claim_at.saturating_duration_since(Instant::now())).max(Duration::from_millis(1));
        let command = self
            .read()
            .args(["BLOCK".to_owned(), block.as_millis().to_string(), "STREAMS".to_owned()])
            .args(self.streams.clone())
            .args(self.streams.iter().map(|_| ">".to_owned()));
        self.call(command, BLOCK + PATIENCE).await
    }

    async fn call(&mut self, command: Command, patience: Duration) -> Result<Vec<Record>> {
        let reply = self.connection.call(command, patience).await?;
        let streams = streams_of(reply).map_err(|words| self.connection.error(words))?;
        let mut records = Vec::new();
        for (stream, entries) in streams {
            for entry in entries {
                records.push(self.entry(&stream, entry)?);
            }
        }
        Ok(records)
    }

    /// Takes over entries of `stream` that their members have left alone for too long.
    async fn claim(&mut self, stream: String, from: &str) -> Result<Vec<Record>> {
        let idle = self.claim.as_millis().to_string();
        let count = self.count().to_string();
        let words = [&stream, &self.group, &self.consumer, &idle, from, "COUNT", &count].map(|word| word.to_owned());
        let mut parts = match self.connection.call(Command::new("XAUTOCLAIM").args(words), PATIENCE).await? {
            Reply::List(parts) => parts.into_iter(),
            Reply::Error(words) if words.contains("unknown command") => {
                return Err(self.connection.error("`group` needs Redis 6.2 or newer"));
            }
            other => return Err(self.connection.error(format!("stream `{stream}`: {}", words_of(&other)))),
        };
        let malformed = || self.connection.error("a malformed answer to XAUTOCLAIM");
        let next = parts.next().and_then(|id| id.as_str().map(str::to_owned)).ok_or_else(malformed)?;
        let entries = parts.next().and_then(Reply::into_list).ok_or_else(malformed)?;
        // Since Redis 7 entries that were deleted are named apart, and are no longer the group's.
        let deleted = parts.next().and_then(Reply::into_list).unwrap_or_default();
        let mut records = Vec::new();
        // Before Redis 7 deleted ones are null here.
        for entry in entries.into_iter().filter(|entry| *entry != Reply::Null) {
            records.push(self.entry(&stream, entry)?);
        }
        for id in deleted {
            let id = id.as_str().ok_or_else(malformed_id(&self.connection))?.to_owned();
            records.push(self.record(&stream, Some(&id), Kind::Deleted, Bytes::new()));
        }
        if next != "0-0" {
            self.claims.push_front((stream, next));
        }
        Ok(records)
    }

    fn entry(&mut self, stream: &str, entry: Reply) -> Result<Record> {
        let is_deleted = matches!(&entry, Reply::List(parts) if parts.get(1) == Some(&Reply::Null));
        let (id, fields) = entry_of(entry).ok_or_else(malformed_id(&self.connection))?;
        let (kind, payload) = match is_deleted {
            true => (Kind::Deleted, Bytes::new()),
            false => (Kind::Entry, encode_fields(&fields)),
        };
        Ok(self.record(stream, Some(&id), kind, payload))
    }

    fn record(&mut self, stream: &str, id: Option<&str>, kind: Kind, payload: Bytes) -> Record {
        self.next += 1;
        if let Some(id) = id {
            self.taken.push(self.next, (stream.to_owned(), id.to_owned()));
        }
        let place = Place { kind, stream: stream.to_owned(), id: id.map(str::to_owned) };
        Record { payload, metadata: place.metadata(), token: self.next }
    }
}

fn malformed_id(connection: &Connection) -> impl Fn() -> Error {
    || connection.error("an entry without id")
}

struct GroupAcknowledger {
    connection: Connection,
    group: String,
    taken: Taken,
}

#[async_trait]
impl Acknowledger for GroupAcknowledger {
    async fn acknowledge(&mut self, tokens: &[u64]) -> Result<()> {
        let mut ids: HashMap<String, Vec<String>> = HashMap::new();
        for (stream, id) in self.taken.take(tokens) {
            ids.entry(stream).or_default().push(id);
        }
        let commands: Vec<Command> = ids
            .iter()
            .flat_map(|(stream, ids)| ids.chunks(ACKNOWLEDGED_MAX).map(move |ids| (stream, ids)))
            .map(|(stream, ids)| Command::new("XACK").args([stream.clone(), self.group.clone()]).args(ids.to_vec()))
            .collect();
        for reply in self.connection.pipeline(&commands, PATIENCE).await? {
            if let Reply::Error(words) = reply {
                return Err(self.connection.error(format!("group `{}`: {words}", self.group)));
            }
        }
        Ok(())
    }
}

/// What a record tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// An entry.
    Entry,
    /// An entry that was deleted before this member read it.
    Deleted,
    /// The group had been deleted.
    Gone,
}

/// Where an entry stands, as a record's metadata keeps it: its kind in one byte, the length of its id in one, its id, its
/// stream.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    kind: Kind,
    stream: String,
    id: Option<String>,
}

impl Place {
    fn metadata(&self) -> Bytes {
        let id = self.id.as_deref().unwrap_or_default();
        let mut bytes = BytesMut::with_capacity(2 + id.len() + self.stream.len());
        bytes.put_u8(self.kind as u8);
        // Two numbers of 64 bits have 41 characters at most.
        bytes.put_u8(u8::try_from(id.len()).unwrap_or_default());
        bytes.put_slice(id.as_bytes());
        bytes.put_slice(self.stream.as_bytes());
        bytes.freeze()
    }

    fn of(metadata: &[u8]) -> Option<Self> {
        let (&[kind, length], rest) = metadata.split_first_chunk()?;
        let kind = [Kind::Entry, Kind::Deleted, Kind::Gone].into_iter().find(|known| *known as u8 == kind)?;
        let (id, stream) = rest.split_at_checked(usize::from(length))?;
        let text = |bytes: &[u8]| std::str::from_utf8(bytes).ok().map(str::to_owned);
        Some(Self { kind, stream: text(stream)?, id: text(id).filter(|id| !id.is_empty()) })
    }
}

/// The names and values of an entry, in turn.
fn encode_fields(fields: &[Reply]) -> Bytes {
    let mut state = StateWriter::default();
    let texts = fields.iter().map(|field| match field {
        Reply::Text(text) => text.as_ref(),
        _ => b"",
    });
    state.u64(fields.len() as u64);
    texts.for_each(|text| state.bytes(text));
    state.finish().into()
}

fn decode_fields(payload: &[u8]) -> Result<Vec<Reply>> {
    let mut state = StateReader::new(payload);
    (0..state.count()?).map(|_| Ok(Reply::Text(Bytes::copy_from_slice(state.bytes()?)))).collect()
}

/// Decodes entries.
pub(super) struct EntryDecoder {
    pub(super) rows: EntryRows,
}

impl Decoder for EntryDecoder {
    fn decode(&mut self, records: &[Record]) -> Result<Decoded> {
        let mut record_of_row = Vec::with_capacity(records.len());
        let mut errors = Vec::new();
        for (index, record) in (0..).zip(records) {
            match self.take(record)? {
                None => record_of_row.push(index),
                Some(error) => errors.push(error),
            }
        }
        Ok(Decoded { rows: self.rows.finish()?, record_of_row, errors })
    }
}

impl EntryDecoder {
    /// Takes a record as a row, or as an error.
    fn take(&mut self, record: &Record) -> Result<Option<RowError>> {
        let place = Place::of(&record.metadata).ok_or_else(|| Error::internal("a damaged record of a stream"))?;
        let (stream, id) = (place.stream, place.id.unwrap_or_default());
        Ok(match place.kind {
            Kind::Entry => {
                let fields = decode_fields(&record.payload)?;
                let wrong = self.rows.take(&stream, &id, &fields).err();
                wrong.map(|e| RowError::new(format!("{stream} {id}: {e}"), payload(&fields).as_bytes()))
            }
            Kind::Deleted => Some(RowError::new(format!("{stream} {id}: trimmed or deleted before it was read"), &[])),
            Kind::Gone => {
                let what =
                    "the group was deleted, or the stream with it; it was made anew and reads from the beginning";
                Some(RowError::new(format!("{stream}: {what}"), &[]))
            }
        })
    }
}

/// The entries that were received last, with hashes of what they held: a stream that was deleted may use ids again.
#[derive(Debug, Default, PartialEq)]
pub(super) struct GroupReceipts {
    contents: HashMap<u128, u64>,
    order: VecDeque<u128>,
}

impl GroupReceipts {
    fn remember(&mut self, entry: u128, content: u64) {
        if self.contents.insert(entry, content).is_none() {
            self.order.push_back(entry);
        }
        if self.order.len() > REMEMBERED_MAX
            && let Some(oldest) = self.order.pop_front()
        {
            self.contents.remove(&oldest);
        }
    }
}

impl Receipts for GroupReceipts {
    fn receive(&mut self, record: &Record, _ingest_us: i64) -> Receipt {
        let Some(kind) = Place::of(&record.metadata).map(|place| place.kind).filter(|kind| *kind != Kind::Gone) else {
            return Receipt::New;
        };
        // Its id and its stream, without the kind.
        let entry = xxh3_128(&record.metadata[1..]);
        let content = xxh3_64(&record.payload);
        match self.contents.get(&entry) {
            // Received, and deleted from the stream before the acknowledgement.
            Some(_) if kind == Kind::Deleted => Receipt::Repeated,
            Some(known) if *known == content => Receipt::Repeated,
            _ => {
                self.remember(entry, content);
                Receipt::New
            }
        }
    }

    fn snapshot(&self, state: &mut StateWriter) {
        state.u64(self.order.len() as u64);
        for entry in &self.order {
            state.bytes(&entry.to_be_bytes());
            state.u64(self.contents.get(entry).copied().unwrap_or_default());
        }
    }

    fn restore(&mut self, state: &mut StateReader<'_>) -> Result<()> {
        *self = Self::default();
        for _ in 0..state.count()? {
            let entry = state.bytes()?.try_into().map_err(|_| Error::internal("damaged receipts of a stream"))?;
            let content = state.u64()?;
            self.remember(u128::from_be_bytes(entry), content);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: Kind, id: &str, value: &'static str) -> Record {
        let place = Place { kind, stream: "s".to_owned(), id: Some(id.to_owned()) };
        let fields = [Reply::Text("a".into()), Reply::Text(value.into())];
        let payload = if kind == Kind::Entry { encode_fields(&fields) } else { Bytes::new() };
        Record { payload, metadata: place.metadata(), token: 0 }
    }

    #[test]
    fn an_entry_comes_again_if_its_id_and_its_text_say_so() {
        for (case, received, expected) in [
            ("again", record(Kind::Entry, "1-0", "x"), Receipt::Repeated),
            ("the next one", record(Kind::Entry, "2-0", "x"), Receipt::New),
            ("the id in a stream that began anew", record(Kind::Entry, "1-0", "y"), Receipt::New),
            ("deleted after it was received", record(Kind::Deleted, "1-0", ""), Receipt::Repeated),
            ("deleted before it was received", record(Kind::Deleted, "2-0", ""), Receipt::New),
        ] {
            let mut receipts = GroupReceipts::default();
            assert_eq!(receipts.receive(&record(Kind::Entry, "1-0", "x"), 0), Receipt::New, "{case}");
            let mut state = StateWriter::default();
            receipts.snapshot(&mut state);
            let mut restored = GroupReceipts::default();
            restored.restore(&mut StateReader::new(&state.finish())).expect("a state");
            assert_eq!(restored, receipts, "{case}");
            assert_eq!(restored.receive(&received, 0), expected, "{case}");
        }
    }

    #[test]
    fn the_oldest_entries_are_forgotten() {
        let mut receipts = GroupReceipts::default();
        for n in 0..=REMEMBERED_MAX {
            receipts.receive(&record(Kind::Entry, &format!("{n}-0"), "x"), 0);
        }
        assert_eq!((receipts.order.len(), receipts.contents.len()), (REMEMBERED_MAX, REMEMBERED_MAX));
        assert_eq!(receipts.receive(&record(Kind::Entry, "1-0", "x"), 0), Receipt::Repeated);
        assert_eq!(receipts.receive(&record(Kind::Entry, "0-0", "x"), 0), Receipt::New);
    }

    #[test]
    fn a_place_reads_back() {
        for id in [None, Some("18446744073709551615-18446744073709551615".to_owned())] {
            let place = Place { kind: Kind::Gone, stream: "ü".to_owned(), id };
            assert_eq!(Place::of(&place.metadata()), Some(place));
        }
        assert_eq!(Place::of(&[]), None);
        assert_eq!(Place::of(&[0, 5, b'1']), None);
    }
}
