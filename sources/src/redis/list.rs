//! `list`: the elements of a list, taken one by one and confirmed once the engine has them.
//!
//! An element is moved to a second list, the processing list, in the same command that takes it, and leaves that
//! when it is acknowledged. What is there at connect was taken and never acknowledged, and comes first. A hash beside
//! it counts the elements that have left: so every element has a number, by which one that comes again is known.

use std::collections::VecDeque;
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use pipeline::error::Result;
use pipeline::plugin::source::{Acknowledger, PushReader, Reader, Receipt, Receipts, Record, Source};
use pipeline::state::{StateReader, StateWriter};
use schemars::JsonSchema;
use serde::Deserialize;
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_64;

use super::unacknowledged::Unacknowledged;
use wire::redis::{Command, Connection, Endpoint, PATIENCE, Reply};

/// How long the server holds a pop back when the list is empty. An element ends the wait at once, so this only
/// bounds how long a dead connection stays unnoticed.
const BLOCK: Duration = Duration::from_secs(5);

/// Most elements taken in one round trip: enough to hide the round trip, few enough that a reply stays small.
const POP_MAX: usize = 512;

/// Elements whose text is remembered, to know one that comes again. No more are given out while so many are unacknowledged.
const REMEMBERED_MAX: usize = 1 << 16;

/// Confirms the elements before number `ARGV[1]`, of which the last is `ARGV[2]`: those that have not left yet leave the
/// processing list `KEYS[1]`, and the count `KEYS[2]` goes with them. Repeated, or late, it does nothing; and nothing where
/// another element stands than the one that was read.
const CONFIRM: &str = "\
local count = tonumber(redis.call('HGET', KEYS[2], 'count') or '0')
local left = tonumber(ARGV[1]) - count
if left > 0 then
  if redis.call('LINDEX', KEYS[1], -left) ~= ARGV[2] then
    return redis.error_reply('it does not hold what was read from it; does another process use it?')
  end
  redis.call('LTRIM', KEYS[1], 0, -(left + 1))
  redis.call('HSET', KEYS[2], 'count', ARGV[1])
end
return left";

/// Notes in the hash `KEYS[1]` that the reader has the connections `ARGV[2]`, if it still names those of `ARGV[1]`.
const TAKE_OVER: &str = "\
if (redis.call('HGET', KEYS[1], 'connections') or '') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'connections', ARGV[2])
return 1";

/// The end of a list that elements are taken from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ListEnd {
    /// For writers that push on the right.
    Left,
    /// For writers that push on the left (`LPUSH`).
    #[default]
    Right,
}

impl ListEnd {
    fn word(self) -> &'static str {
        match self {
            Self::Left => "LEFT",
            Self::Right => "RIGHT",
        }
    }
}

/// The source in this mode.
pub(super) struct ListSource {
    pub(super) endpoint: Endpoint,
    pub(super) list: String,
    pub(super) processing: String,
    pub(super) pop: ListEnd,
    pub(super) name: String,
    pub(super) warned: bool,
    /// Whether the log tells that the connections of an earlier reader cannot be ended.
    pub(super) warned_of_late: bool,
}

#[async_trait]
impl Source for ListSource {
    async fn connect(&mut self, _position: Option<&[u8]>) -> Result<Reader> {
        // Two connections: an acknowledgement does not wait behind a blocking pop.
        let mut connection = self.endpoint.connect(1).await?;
        super::warn_if_volatile(&mut connection, &self.name, &mut self.warned).await?;
        let mut acknowledging = self.endpoint.connect(1).await?;
        let counted = format!("{}:count", self.processing);
        if let Err(words) = take_over(&mut connection, &mut acknowledging, &counted).await?
            && !self.warned_of_late
        {
            self.warned_of_late = true;
            tracing::warn!(
                source = self.name,
                reason = words,
                "the server does not let this user end the connections of an earlier reader (CLIENT INFO, CLIENT KILL): \
                 what one of them had under way while the network was away may take elements late, which then count twice"
            );
        }
        let (list_id, first) = count(&mut connection, &counted).await?;
        let left_over = unacknowledged(&mut connection, &self.processing).await?;
        let taken = Taken::default();
        let reader = ListReader {
            connection,
            pop: Pop { list: self.list.clone(), processing: self.processing.clone(), end: self.pop },
            again: left_over.len(),
            left_over,
            waiting: 0,
            list_id,
            next: first,
            taken: taken.clone(),
        };
        let processing = self.processing.clone();
        let acknowledger = ListAcknowledger { connection: acknowledging, processing, counted, taken };
        Ok(Reader::Push(Box::new(reader), Box::new(acknowledger)))
    }
}

/// Ends the connections of the reader before, and notes those of this one. What a lost connection had under way may lie in
/// the network for as long as that is away, and reach the server after the count and the processing list were read: it would
/// put elements there that nobody has seen. The server's words if it does not allow that.
async fn take_over(
    connection: &mut Connection,
    acknowledging: &mut Connection,
    counted: &str,
) -> Result<Result<(), String>> {
    let mut own = Vec::new();
    for connection in [&mut *connection, acknowledging] {
        match connection.call(Command::new("CLIENT").arg("INFO"), PATIENCE).await? {
            Reply::Error(words) if is_refusal(&words) => return Ok(Err(words)),
            reply => match reply.as_str().and_then(address_of) {
                Some(identity) => own.push(identity),
                None => return Err(unexpected(connection, counted, &reply)),
            },
        }
    }
    let before =
        match connection.call(Command::new("HGET").args([counted.to_owned(), "connections".into()]), PATIENCE).await? {
            Reply::Null => String::new(),
            Reply::Text(text) => String::from_utf8_lossy(&text).into_owned(),
            other => return Err(unexpected(connection, counted, &other)),
        };
    for identity in before.split(',').filter(|identity| !identity.is_empty()) {
        // A server that was started again gives numbers out again, but hardly with the same address.
        let (id, address) = identity.split_once(' ').unwrap_or((identity, ""));
        let words = ["KILL", "ID", id, "ADDR", address].map(str::to_owned);
        match connection.call(Command::new("CLIENT").args(words), PATIENCE).await? {
            Reply::Error(words) if is_refusal(&words) => return Ok(Err(words)),
            // How many there were: none if it is long gone.
            Reply::Int(_) => {}
            other => return Err(unexpected(connection, counted, &other)),
        }
    }
    let words = ["1".to_owned(), counted.to_owned(), before, own.join(",")];
    match connection.call(Command::new("EVAL").arg(TAKE_OVER).args(words), PATIENCE).await? {
        Reply::Int(1) => Ok(Ok(())),
        Reply::Int(_) => {
            Err(connection.error(format!("`{counted}`: another reader has connected; one process per processing list")))
        }
        other => Err(unexpected(connection, counted, &other)),
    }
}

/// Whether an error of the server is about a command that it does not allow or does not know.
fn is_refusal(words: &str) -> bool {
    words.starts_with("NOPERM") || words.starts_with("ERR")
}

/// The number and the address of a connection, from the line that `CLIENT INFO` gives.
fn address_of(info: &str) -> Option<String> {
    let value = |name: &str| info.split(' ').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
    Some(format!("{} {}", value("id")?, value("addr")?))
}

/// The texts of the elements that the connection has given out.
type Taken = Unacknowledged<Bytes>;

/// What tells this processing list from another one of the same name, and the number of its oldest element.
async fn count(connection: &mut Connection, counted: &str) -> Result<(u64, u64)> {
    let id = Uuid::new_v4().simple().to_string();
    let commands = [
        Command::new("HSETNX").args([counted.to_owned(), "id".to_owned(), id]),
        Command::new("HGET").args([counted, "id"].map(str::to_owned)),
        Command::new("HGET").args([counted, "count"].map(str::to_owned)),
    ];
    let replies = connection.pipeline(&commands, PATIENCE).await?;
    match replies.as_slice() {
        [Reply::Int(_), Reply::Text(id), count] => {
            let count = count.as_str().and_then(|count| count.parse().ok()).unwrap_or_default();
            Ok((xxh3_64(id), count))
        }
        [other, ..] => Err(unexpected(connection, counted, other)),
        [] => Err(connection.error(format!("`{counted}`: no reply"))),
    }
}

/// The elements that were taken and not acknowledged, oldest first. The processing list is pushed on the left.
async fn unacknowledged(connection: &mut Connection, processing: &str) -> Result<VecDeque<Bytes>> {
    let length = match connection.call(Command::new("LLEN").arg(processing.to_owned()), PATIENCE).await? {
        Reply::Int(length) => usize::try_from(length).unwrap_or_default(),
        other => return Err(unexpected(connection, processing, &other)),
    };
    let mut elements = VecDeque::with_capacity(length);
    // One by one: fred takes a list reply that begins with `message` for a pub/sub message.
    let indexes: Vec<String> = (1..=length).map(|back| format!("-{back}")).collect();
    for indexes in indexes.chunks(POP_MAX) {
        let element = |index: &String| Command::new("LINDEX").args([processing.to_owned(), index.clone()]);
        let commands: Vec<Command> = indexes.iter().map(element).collect();
        for reply in connection.pipeline(&commands, PATIENCE).await? {
            match reply {
                Reply::Text(element) => elements.push_back(element),
                other => return Err(unexpected(connection, processing, &other)),
            }
        }
    }
    Ok(elements)
}

fn unexpected(connection: &Connection, list: &str, reply: &Reply) -> pipeline::error::Error {
    match reply {
        Reply::Error(words) if words.contains("unknown command") => {
            connection.error(format!("list `{list}`: {words}; `list` needs Redis 6.2 or newer"))
        }
        Reply::Error(words) => connection.error(format!("list `{list}`: {words}")),
        other => connection.error(format!("list `{list}`: unexpected reply {other:?}")),
    }
}

/// What is taken from where.
struct Pop {
    list: String,
    processing: String,
    end: ListEnd,
}

impl Pop {
    fn command(&self, name: &str) -> Command {
        Command::new(name).args([self.list.clone(), self.processing.clone()]).args([self.end.word(), "LEFT"])
    }
}

struct ListReader {
    connection: Connection,
    pop: Pop,
    /// Elements of an earlier connection that were not acknowledged.
    left_over: VecDeque<Bytes>,
    /// How many of the next elements may have been given out on an earlier connection.
    again: usize,
    /// How many elements the list held when last asked.
    waiting: usize,
    list_id: u64,
    /// Number of the next element.
    next: u64,
    taken: Taken,
}

#[async_trait]
impl PushReader for ListReader {
    async fn next(&mut self) -> Result<Vec<Record>> {
        self.taken.room(POP_MAX, REMEMBERED_MAX).await;
        let mut elements: Vec<Bytes> = self.left_over.drain(..self.left_over.len().min(POP_MAX)).collect();
        while elements.is_empty() {
            elements = if self.waiting == 0 { self.pop_waiting().await? } else { self.pop_many().await? };
        }
        let records = elements.into_iter().map(|payload| {
            let place = Place { again: self.again > 0, list_id: self.list_id, number: self.next };
            self.again = self.again.saturating_sub(1);
            self.next += 1;
            self.taken.push(self.next, payload.clone());
            Record { payload, metadata: place.metadata(), token: self.next }
        });
        Ok(records.collect())
    }
}

impl ListReader {
    /// Waits for one element, then asks how many there are behind it.
    async fn pop_waiting(&mut self) -> Result<Vec<Bytes>> {
        let seconds = BLOCK.as_secs().to_string();
        let reply = self.connection.call(self.pop.command("BLMOVE").arg(seconds), BLOCK + PATIENCE).await?;
        let elements = self.elements(vec![reply])?;
        if !elements.is_empty() {
            let length = self.connection.call(self.length(), PATIENCE).await?;
            self.note_waiting(&length)?;
        }
        Ok(elements)
    }

    /// Takes as many elements as there were, in one round trip.
    async fn pop_many(&mut self) -> Result<Vec<Bytes>> {
        let mut commands = vec![self.pop.command("LMOVE"); self.waiting.min(POP_MAX)];
        commands.push(self.length());
        let mut replies = self.connection.pipeline(&commands, PATIENCE).await?;
        if let Some(length) = replies.pop() {
            self.note_waiting(&length)?;
        }
        self.elements(replies)
    }

    fn length(&self) -> Command {
        Command::new("LLEN").arg(self.pop.list.clone())
    }

    fn note_waiting(&mut self, length: &Reply) -> Result<()> {
        match length {
            Reply::Int(length) => self.waiting = usize::try_from(*length).unwrap_or_default(),
            other => return Err(unexpected(&self.connection, &self.pop.list, other)),
        }
        Ok(())
    }

    fn elements(&self, replies: Vec<Reply>) -> Result<Vec<Bytes>> {
        let mut elements = Vec::with_capacity(replies.len());
        for reply in replies {
            match reply {
                Reply::Text(element) => elements.push(element),
                Reply::Null => {}
                other => return Err(unexpected(&self.connection, &self.pop.list, &other)),
            }
        }
        Ok(elements)
    }
}

/// Where an element stands, as a record's metadata keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    /// Whether it was in the processing list when the connection was made.
    again: bool,
    list_id: u64,
    number: u64,
}

impl Place {
    fn metadata(self) -> Bytes {
        let mut bytes = BytesMut::with_capacity(17);
        bytes.put_u8(u8::from(self.again));
        bytes.put_u64(self.list_id);
        bytes.put_u64(self.number);
        bytes.freeze()
    }

    fn of(mut metadata: &[u8]) -> Option<Self> {
        (metadata.len() == 17).then(|| Self {
            again: metadata.get_u8() != 0,
            list_id: metadata.get_u64(),
            number: metadata.get_u64(),
        })
    }
}

/// The elements that were received last.
#[derive(Debug, Default, PartialEq)]
pub(super) struct ListReceipts {
    list_id: u64,
    /// Number of the element after the last one.
    next: u64,
    /// Hashes of the last elements. A server that was set back to an older state gives numbers out again; the text
    /// tells that.
    hashes: VecDeque<u64>,
}

impl Receipts for ListReceipts {
    fn receive(&mut self, record: &Record, _ingest_us: i64) -> Receipt {
        let Some(place) = Place::of(&record.metadata) else { return Receipt::New };
        let hash = xxh3_64(&record.payload);
        if place.list_id == self.list_id && place.again && place.number < self.next {
            let back = usize::try_from(self.next - place.number).unwrap_or(usize::MAX);
            let known = self.hashes.len().checked_sub(back).map(|index| self.hashes[index]);
            if known.is_none_or(|known| known == hash) {
                return Receipt::Repeated;
            }
        }
        if place.list_id != self.list_id || place.number != self.next {
            self.hashes.clear();
        }
        self.list_id = place.list_id;
        self.next = place.number + 1;
        if self.hashes.len() == REMEMBERED_MAX {
            self.hashes.pop_front();
        }
        self.hashes.push_back(hash);
        Receipt::New
    }

    fn snapshot(&self, state: &mut StateWriter) {
        state.u64(self.list_id);
        state.u64(self.next);
        state.u64(self.hashes.len() as u64);
        self.hashes.iter().for_each(|hash| state.u64(*hash));
    }

    fn restore(&mut self, state: &mut StateReader<'_>) -> Result<()> {
        self.list_id = state.u64()?;
        self.next = state.u64()?;
        self.hashes = (0..state.count()?).map(|_| state.u64()).collect::<Result<_>>()?;
        Ok(())
    }
}

struct ListAcknowledger {
    connection: Connection,
    processing: String,
    counted: String,
    taken: Taken,
}

#[async_trait]
impl Acknowledger for ListAcknowledger {
    /// Records come in the order of receipt, so they are the oldest, the ones on the right.
    async fn acknowledge(&mut self, tokens: &[u64]) -> Result<()> {
        let texts = self.taken.take(tokens);
        let (Some(next), Some(text)) = (tokens.last(), texts.last()) else { return Ok(()) };
        let keys = ["2".to_owned(), self.processing.clone(), self.counted.clone()];
        let confirm = Command::new("EVAL").arg(CONFIRM.to_owned()).args(keys).arg(next.to_string()).arg(text.clone());
        match self.connection.call(confirm, PATIENCE).await? {
            Reply::Error(words) => Err(self.connection.error(format!("list `{}`: {words}", self.processing))),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_comes_again_if_its_number_and_its_text_say_so() {
        let record = |again, list_id, number, payload: &'static str| {
            let metadata = Place { again, list_id, number }.metadata();
            Record { payload: payload.into(), metadata, token: 0 }
        };
        for (case, received, expected) in [
            ("the next one", record(false, 1, 2, "c"), Receipt::New),
            ("the last one again", record(true, 1, 1, "b"), Receipt::Repeated),
            ("the first one again", record(true, 1, 0, "a"), Receipt::Repeated),
            ("left over, not received", record(true, 1, 2, "c"), Receipt::New),
            ("the server was set back and took another", record(true, 1, 1, "x"), Receipt::New),
            ("the server was set back", record(false, 1, 1, "b"), Receipt::New),
            ("another list", record(true, 2, 1, "b"), Receipt::New),
        ] {
            let mut receipts = ListReceipts::default();
            for (number, payload) in [(0, "a"), (1, "b")] {
                assert_eq!(receipts.receive(&record(false, 1, number, payload), 0), Receipt::New, "{case}");
            }
            let mut state = StateWriter::default();
            receipts.snapshot(&mut state);
            let mut restored = ListReceipts::default();
            restored.restore(&mut StateReader::new(&state.finish())).expect("a state");
            assert_eq!(restored, receipts, "{case}");
            assert_eq!(restored.receive(&received, 0), expected, "{case}");
        }
    }
}
