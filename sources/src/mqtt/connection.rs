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

/// Bytes that wait for the engine. At the limit nothing is read from the broker until the engine takes messages, and TCP
/// holds the broker back.
const QUEUE_BYTES_MAX: u32 = 64 << 20;

/// What a message takes beside its payload, and most messages that wait for the engine by that. MQTT has no more packet
/// ids, so a broker that waits for acknowledgements never fills the queue with small messages.
const MESSAGE_BYTES: u32 = 1 << 10;
const QUEUE_MESSAGES_MAX: usize = (QUEUE_BYTES_MAX / MESSAGE_BYTES) as usize;

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
        let (mut lot, mut left) = (Lot::default(), false);
        let mut broken = None;
        for event in events.drain(..) {
            match event {
                Event::Message(message) => {
                    if let Some(full) = lot.add(message, queue.bytes_max) {
                        queue.push_beside(full, client.as_mut(), &mut broken).await;
                    }
                }
                Event::Disconnected => left = true,
                Event::Subscribed(_) | Event::Unsubscribed => {}
            }
        }
        if !lot.messages.is_empty() {
            queue.push_beside(lot, client.as_mut(), &mut broken).await;
        }
        if left {
            return;
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

/// Messages on their way to the engine.
#[derive(Debug, Default)]
struct Lot {
    messages: Vec<Message>,
    /// Bytes that they take of the queue.
    room: u32,
}

impl Lot {
    /// Adds a message, cut to one byte more than `bytes_max`. What was there before, if both are more than the queue
    /// can take at once.
    fn add(&mut self, mut message: Message, bytes_max: usize) -> Option<Self> {
        message.payload.truncate(bytes_max.saturating_add(1));
        let room = u32::try_from(message.payload.len()).unwrap_or(u32::MAX);
        let room = room.saturating_add(MESSAGE_BYTES).min(QUEUE_BYTES_MAX);
        let is_full = self.messages.len() >= BATCH_ROWS_MAX || self.room.saturating_add(room) > QUEUE_BYTES_MAX;
        let full = is_full.then(|| std::mem::take(self));
        self.messages.push(message);
        self.room += room;
        full
    }
}

/// The task's end of the queue.
struct Queue {
    sender: mpsc::Sender<Result<Lot>>,
    /// Free bytes.
    room: Arc<Semaphore>,
    bytes_max: usize,
}

impl Queue {
    /// Waits for room. When the reader is gone the messages are dropped, unacknowledged.
    async fn push(&self, lot: Lot) {
        if let Ok(permit) = self.room.acquire_many(lot.room).await {
            permit.forget();
            let _ = self.sender.send(Ok(lot)).await;
        }
    }

    /// As [`Self::push`]. While there is no room, what is acknowledged leaves, and so do pings.
    async fn push_beside(&self, lot: Lot, client: &mut dyn Client, broken: &mut Option<Error>) {
        let mut push = pin!(self.push(lot));
        tokio::select! {
            biased;
            () = &mut push => {}
            error = client.attend(), if broken.is_none() => {
                *broken = Some(error);
                push.await;
            }
        }
    }
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
    receiver: mpsc::Receiver<Result<Lot>>,
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
            let Some(first) = self.receiver.recv().await else { return Err(connection_gone()) };
            let records = self.take(first);
            if !records.is_empty() {
                return Ok(records);
            }
        }
    }
}

impl MqttReader {
    /// The records of this lot and of those that have arrived after it.
    fn take(&mut self, first: Result<Lot>) -> Vec<Record> {
        let mut messages = Vec::new();
        let mut next = Some(first);
        while let Some(arrived) = next.take() {
            match arrived {
                Ok(lot) => {
                    self.room.add_permits(lot.room as usize);
                    messages.extend(lot.messages);
                }
                Err(error) => self.failed = Some(error),
            }
            if messages.len() < BATCH_ROWS_MAX {
                next = self.receiver.try_recv().ok();
            }
        }
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
        let ids: Vec<PacketId> =
            tokens.iter().map(|token| PacketId::of_token(*token)).filter(|id| id.qos > 0).collect();
        if ids.is_empty() {
            return Ok(());
        }
        self.goodbye.0.send(Request::Acknowledge(ids))
    }
}
