//! A live connection: the task that polls it, and the engine's two ends of it.
//!
//! Pings and acknowledgements must leave whatever the engine does, so a task of its own sees to them. It ends with
//! the connection, after it has sent what was acknowledged.

use std::pin::pin;
use std::sync::Arc;

use async_trait::async_trait;
use pipeline::batch::BATCH_ROWS_MAX;
use pipeline::error::{Error, Result};
use pipeline::plugin::{Acknowledger, PushReader, Reader, Record};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;

use super::client::{Event, Message, PacketId, Request, Requests, connection_gone};
use super::metadata::Metadata;
use super::socket::Client;

/// Messages that wait for the engine. MQTT has no more packet ids, so a broker that waits for acknowledgements
/// never fills it; with `qos: 0` a full queue stops the reading, and TCP holds the broker back.
const QUEUE_MESSAGES_MAX: usize = 65_535;

/// Bytes of payload that wait for the engine. At the limit nothing is read from the broker until the engine takes
/// messages, and TCP holds the broker back.
const QUEUE_BYTES_MAX: u32 = 64 << 20;

/// Starts to poll the connection. `events` happened while it was made; `resumes` says whether the broker sends
/// unacknowledged messages again after a reconnect; messages longer than `bytes_max` are cut to one byte more,
/// by which [`super::decode`] knows them; `session` is the number of the broker's session. The task ends by itself after the reader and the acknowledger.
pub(super) fn start(
    client: Box<dyn Client>,
    events: Vec<Event>,
    resumes: bool,
    bytes_max: usize,
    session: u32,
) -> (Reader, JoinHandle<()>) {
    let (sender, receiver) = mpsc::channel(QUEUE_MESSAGES_MAX);
    let room = Arc::new(Semaphore::new(QUEUE_BYTES_MAX as usize));
    let goodbye = Arc::new(Goodbye(client.requests()));
    let queue = Queue { sender, room: Arc::clone(&room), bytes_max };
    let task = tokio::spawn(drive(client, events, queue));
    let reader = MqttReader { receiver, room, resumes, session, failed: None, _goodbye: Arc::clone(&goodbye) };
    (Reader::Push(Box::new(reader), Box::new(MqttAcknowledger { goodbye })), task)
}

/// Polls until the connection breaks or our DISCONNECT has left.
async fn drive(mut client: Box<dyn Client>, mut events: Vec<Event>, queue: Queue) {
    loop {
        let mut broken = None;
        for event in events.drain(..) {
            match event {
                Event::Message(message) => {
                    let mut push = pin!(queue.push(message));
                    tokio::select! {
                        biased;
                        () = &mut push => {}
                        // While there is no room, what is acknowledged leaves, and so do pings.
                        error = client.attend(), if broken.is_none() => {
                            broken = Some(error);
                            push.await;
                        }
                    }
                }
                Event::Disconnected => return,
                Event::Subscribed(_) | Event::Unsubscribed => {}
            }
        }
        let polled = match broken {
            Some(error) => Err(error),
            None => client.poll(&mut events).await,
        };
        if let Err(error) = polled {
            let _ = queue.sender.send(Err(error)).await;
            return;
        }
    }
}

/// The task's end of the queue.
struct Queue {
    sender: mpsc::Sender<Result<Message>>,
    /// Free bytes.
    room: Arc<Semaphore>,
    bytes_max: usize,
}

impl Queue {
    /// Waits for room. When the reader is gone the message is dropped, unacknowledged.
    async fn push(&self, mut message: Message) {
        message.payload.truncate(self.bytes_max.saturating_add(1));
        if let Ok(permit) = self.room.acquire_many(room_of(&message)).await {
            permit.forget();
            let _ = self.sender.send(Ok(message)).await;
        }
    }
}

/// Bytes that a message takes of the queue. A larger one than the queue takes all of it.
fn room_of(message: &Message) -> u32 {
    u32::try_from(message.payload.len()).unwrap_or(u32::MAX).min(QUEUE_BYTES_MAX)
}

/// Ends the connection when reader and acknowledger are gone. Acknowledgements asked for before leave before it.
struct Goodbye(Requests);

impl Drop for Goodbye {
    fn drop(&mut self) {
        // A connection that is gone already is fine.
        let _ = self.0.send(Request::Disconnect);
    }
}

struct MqttReader {
    receiver: mpsc::Receiver<Result<Message>>,
    room: Arc<Semaphore>,
    resumes: bool,
    session: u32,
    /// Why the connection broke, until the messages before it are taken.
    failed: Option<Error>,
    _goodbye: Arc<Goodbye>,
}

impl Drop for MqttReader {
    fn drop(&mut self) {
        // The task may wait for room that nobody makes any more.
        self.room.close();
    }
}

#[async_trait]
impl PushReader for MqttReader {
    async fn next(&mut self) -> Result<Vec<Record>> {
        loop {
            if let Some(error) = self.failed.take() {
                return Err(error);
            }
            let mut arrived = Vec::new();
            if self.receiver.recv_many(&mut arrived, BATCH_ROWS_MAX).await == 0 {
                return Err(connection_gone());
            }
            let records = self.take(arrived);
            if !records.is_empty() {
                return Ok(records);
            }
        }
    }
}

impl MqttReader {
    fn take(&mut self, arrived: Vec<Result<Message>>) -> Vec<Record> {
        let mut messages = Vec::with_capacity(arrived.len());
        for item in arrived {
            match item {
                Ok(message) => messages.push(message),
                Err(error) => self.failed = Some(error),
            }
        }
        let bytes: usize = messages.iter().map(|message| room_of(message) as usize).sum();
        self.room.add_permits(bytes);
        if self.failed.is_some() && self.resumes {
            // They can no longer be acknowledged and come again: taken now, they would be there twice.
            messages.retain(|message| message.id.qos == 0);
        }
        let session = self.session;
        messages.into_iter().map(|message| Metadata::of(&message, session).record(message)).collect()
    }
}

struct MqttAcknowledger {
    goodbye: Arc<Goodbye>,
}

#[async_trait]
impl Acknowledger for MqttAcknowledger {
    /// Hands the acknowledgements to the polling task and does not wait for it: it may wait for the engine.
    async fn acknowledge(&mut self, tokens: &[u64]) -> Result<()> {
        let ids = tokens.iter().map(|token| PacketId::of_token(*token));
        for id in ids.filter(|id| id.qos > 0) {
            self.goodbye.0.send(Request::Acknowledge(id))?;
        }
        Ok(())
    }
}
