//! `channels` and `patterns`: messages as they are published.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use fred::interfaces::{EventInterface, PubsubInterface};
use fred::types::{Message, Value};
use pipeline::error::{Error, Result};
use pipeline::plugin::source::{Acknowledger, PushReader, Reader, Record, Source};
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};

use wire::redis::{Command, Connection, Endpoint, PATIENCE};

/// Most messages that wait to be read; more are lost, counted and reported. Takes about 1 MiB from the start.
const MESSAGES_MAX: usize = 8192;

/// Most messages handed on at once.
const RECORDS_MAX: usize = 1024;

/// Silence after which the server is asked whether it is still there.
const SILENCE: Duration = Duration::from_secs(30);

/// First byte of a record's metadata: a message, the rest being its channel.
pub(super) const MESSAGE: u8 = b'm';
/// First byte of a record's metadata: messages were lost, the payload says how many.
pub(super) const LOST: u8 = b'l';

/// The source in this mode.
pub(super) struct PubsubSource {
    pub(super) endpoint: Endpoint,
    pub(super) channels: Vec<String>,
    pub(super) patterns: Vec<String>,
}

#[async_trait]
impl Source for PubsubSource {
    async fn connect(&mut self, _position: Option<&[u8]>) -> Result<Reader> {
        let mut connection = self.endpoint.connect(MESSAGES_MAX).await?;
        let client = connection.client.clone();
        let messages = client.message_rx();
        let (channels, patterns) = (self.channels.clone(), self.patterns.clone());
        let subscribe = async move {
            if !channels.is_empty() {
                client.subscribe(channels).await?;
            }
            if !patterns.is_empty() {
                client.psubscribe(patterns).await?;
            }
            Ok(())
        };
        connection.watch(PATIENCE, subscribe).await?;
        // fred answers a subscription before the server does. The server answers in order, so after its answer
        // to this the subscriptions are in force.
        ping(&mut connection).await?;
        let reader = PubsubReader { connection, messages, received: 0 };
        Ok(Reader::Push(Box::new(reader), Box::new(NothingToAcknowledge)))
    }
}

async fn ping(connection: &mut Connection) -> Result<()> {
    match connection.call(Command::new("PING"), PATIENCE).await? {
        wire::redis::Reply::Error(words) => Err(connection.error(words)),
        _ => Ok(()),
    }
}

struct PubsubReader {
    connection: Connection,
    messages: Receiver<Message>,
    received: u64,
}

#[async_trait]
impl PushReader for PubsubReader {
    async fn next(&mut self) -> Result<Vec<Record>> {
        let mut records = vec![self.first().await?];
        while records.len() < RECORDS_MAX {
            let record = match self.messages.try_recv() {
                Ok(message) => self.record(message),
                Err(TryRecvError::Lagged(lost)) => self.lost(lost),
                Err(TryRecvError::Empty | TryRecvError::Closed) => break,
            };
            records.push(record);
        }
        Ok(records)
    }
}

impl PubsubReader {
    /// Waits for a message; in silence, asks now and then whether the server is still there.
    async fn first(&mut self) -> Result<Record> {
        loop {
            // The message is received inside `watch`, which ends when the connection does.
            let messages = &mut self.messages;
            let receive = async move { Ok(tokio::time::timeout(SILENCE, messages.recv()).await) };
            match self.connection.watch(SILENCE + PATIENCE, receive).await? {
                Ok(Ok(message)) => return Ok(self.record(message)),
                Ok(Err(RecvError::Lagged(lost))) => return Ok(self.lost(lost)),
                Ok(Err(RecvError::Closed)) => return Err(Error::outside("the connection was closed")),
                Err(_) => ping(&mut self.connection).await?,
            }
        }
    }

    fn record(&mut self, message: Message) -> Record {
        let payload = match message.value {
            Value::Bytes(bytes) => bytes,
            Value::String(text) => text.into_inner(),
            other => other.into_string().unwrap_or_default().into(),
        };
        let mut metadata = vec![MESSAGE];
        metadata.extend_from_slice(message.channel.as_bytes());
        self.numbered(payload, metadata)
    }

    fn lost(&mut self, messages: u64) -> Record {
        self.numbered(messages.to_string().into(), vec![LOST])
    }

    fn numbered(&mut self, payload: Bytes, metadata: Vec<u8>) -> Record {
        self.received += 1;
        Record { payload, metadata: metadata.into(), token: self.received }
    }
}

/// Publishers wait for nobody.
struct NothingToAcknowledge;

#[async_trait]
impl Acknowledger for NothingToAcknowledge {
    async fn acknowledge(&mut self, _tokens: &[u64]) -> Result<()> {
        Ok(())
    }
}
