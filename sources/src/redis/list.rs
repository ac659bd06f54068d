//! `list`: the elements of a list, taken one by one and confirmed once the engine has them.
//!
//! An element is moved to a second list, the processing list, in the same command that takes it, and leaves that
//! when it is acknowledged. What is there at connect was taken and never acknowledged, and comes first.

use std::collections::VecDeque;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use pipeline::error::Result;
use pipeline::plugin::source::{Acknowledger, PushReader, Reader, Record, Source};
use schemars::JsonSchema;
use serde::Deserialize;

use wire::redis::{Command, Connection, Endpoint, PATIENCE, Reply};

/// How long the server holds a pop back when the list is empty. An element ends the wait at once, so this only
/// bounds how long a dead connection stays unnoticed.
const BLOCK: Duration = Duration::from_secs(5);

/// Most elements taken in one round trip: enough to hide the round trip, few enough that a reply stays small.
const POP_MAX: usize = 512;

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
}

#[async_trait]
impl Source for ListSource {
    async fn connect(&mut self, _position: Option<&[u8]>) -> Result<Reader> {
        // Two connections: an acknowledgement does not wait behind a blocking pop.
        let mut connection = self.endpoint.connect(1).await?;
        super::warn_if_volatile(&mut connection, &self.name, &mut self.warned).await?;
        let left_over = unacknowledged(&mut connection, &self.processing).await?;
        let acknowledging = self.endpoint.connect(1).await?;
        let reader = ListReader {
            connection,
            pop: Pop { list: self.list.clone(), processing: self.processing.clone(), end: self.pop },
            left_over,
            waiting: 0,
            taken: 0,
        };
        let acknowledger = ListAcknowledger { connection: acknowledging, processing: self.processing.clone() };
        Ok(Reader::Push(Box::new(reader), Box::new(acknowledger)))
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
    /// How many elements the list held when last asked.
    waiting: usize,
    /// Elements given out on this connection.
    taken: u64,
}

#[async_trait]
impl PushReader for ListReader {
    async fn next(&mut self) -> Result<Vec<Record>> {
        let mut elements: Vec<Bytes> = self.left_over.drain(..self.left_over.len().min(POP_MAX)).collect();
        while elements.is_empty() {
            elements = if self.waiting == 0 { self.pop_waiting().await? } else { self.pop_many().await? };
        }
        let records = elements.into_iter().map(|payload| {
            self.taken += 1;
            Record { payload, metadata: Bytes::new(), token: self.taken }
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

struct ListAcknowledger {
    connection: Connection,
    processing: String,
}

#[async_trait]
impl Acknowledger for ListAcknowledger {
    /// Records come in the order of receipt, so they are the oldest, the ones on the right.
    async fn acknowledge(&mut self, tokens: &[u64]) -> Result<()> {
        if tokens.is_empty() {
            return Ok(());
        }
        let keep = ["0".to_owned(), format!("-{}", tokens.len() + 1)];
        let trim = Command::new("LTRIM").arg(self.processing.clone()).args(keep);
        match self.connection.call(trim, PATIENCE).await? {
            Reply::Error(words) => Err(self.connection.error(format!("list `{}`: {words}", self.processing))),
            _ => Ok(()),
        }
    }
}
