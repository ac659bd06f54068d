//! One WebSocket connection: sends what waits for its client, and listens to it.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use futures::{SinkExt, StreamExt};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at, timeout};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::{Error as WsError, ProtocolError};
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig as Protocol};
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};

use crate::live::queue::{Client, Outgoing};
use crate::live::subscription::ClientMessage;
use crate::live::{CLOSE_PATIENCE, Caller, Membership, Place, ROW_BYTES_MAX};

/// Longest message from a client: a subscription with some thousand values.
const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// The library reserves this for every connection; its default of 128 KiB would be most of a client's memory.
const READ_BUFFER_BYTES: usize = 4 << 10;

/// Small frames are gathered up to this length before they are written.
const WRITE_BUFFER_BYTES: usize = 32 << 10;

/// Wrong messages after which a client is sent away.
const ERRORS_MAX: u64 = 10;

/// A client that takes nothing for so long is gone.
const WRITE_PATIENCE: Duration = Duration::from_secs(60);

type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// Why a connection ends.
enum End {
    /// The client closed it, or is gone.
    Gone,
    /// It is closed from here.
    Close(CloseCode, &'static str),
}

/// Serves one client until it goes or the sink stops.
pub(super) async fn serve(upgraded: Upgraded, place: Place, caller: &Caller, parameters: &[(String, String)]) {
    let protocol = Protocol::default()
        .read_buffer_size(READ_BUFFER_BYTES)
        .write_buffer_size(WRITE_BUFFER_BYTES)
        // A frame is handed over only when the one before it is written, so this is never reached.
        .max_write_buffer_size(WRITE_BUFFER_BYTES + 2 * ROW_BYTES_MAX)
        .max_message_size(Some(MESSAGE_BYTES_MAX))
        .max_frame_size(Some(MESSAGE_BYTES_MAX));
    let mut socket = WebSocketStream::from_raw_socket(TokioIo::new(upgraded), Role::Server, Some(protocol)).await;
    let hub = Arc::clone(place.hub());
    match hub.catalog().subscription(parameters) {
        Ok((subscription, since)) => {
            let mut session = Session::new(socket, place.join(caller, subscription, since.as_ref()));
            let (stopped, client) = (hub.stopped(), Arc::clone(&session.client));
            let too_late = async {
                stopped.await;
                // What waits is still sent, within limits.
                client.close();
                tokio::time::sleep(CLOSE_PATIENCE).await;
            };
            let end = tokio::select! {
                end = session.run() => end,
                () = too_late => End::Gone,
            };
            // It counts as connected until it has heard the good-bye, but is sent nothing more.
            session.client.close();
            end.finish(&mut session.socket).await;
        }
        Err(refusal) => {
            let error = Message::Text(hub.encoder.error(&refusal.0));
            if let Ok(Ok(())) = timeout(CLOSE_PATIENCE, socket.send(error)).await {
                End::Close(CloseCode::Policy, "see the error frame").finish(&mut socket).await;
            }
        }
    }
}

impl End {
    /// Closes the connection if it is to be closed from here.
    async fn finish(self, socket: &mut Socket) {
        if let Self::Close(code, reason) = self {
            // Whether the client hears it is its own matter.
            let _ = timeout(CLOSE_PATIENCE, close(socket, code, reason)).await;
        }
    }
}

/// Says good-bye and waits for the client's answer.
async fn close(socket: &mut Socket, code: CloseCode, reason: &'static str) {
    let frame = CloseFrame { code, reason: Utf8Bytes::from_static(reason) };
    if socket.send(Message::Close(Some(frame))).await.is_err() {
        return;
    }
    while let Some(Ok(_)) = socket.next().await {}
    // What the client still sends must be read: closing a socket with unread bytes resets the connection, and
    // the client might never see the close frame.
    let stream = socket.get_mut();
    if stream.shutdown().await.is_err() {
        return;
    }
    // Not in the task's own memory, which every connection has.
    let mut discarded = vec![0; READ_BUFFER_BYTES];
    while stream.read(&mut discarded).await.is_ok_and(|read| read > 0) {}
}

/// A client that is subscribed.
struct Session {
    socket: Socket,
    membership: Membership,
    client: Arc<Client>,
    outgoing: Outgoing,
    frames: Vec<Utf8Bytes>,
    /// Frames are written that the library may still hold.
    is_unflushed: bool,
    /// What the client asked for while a snapshot was on its way to it. Nothing more is read before it is done: each
    /// answer is a snapshot too, and takes time from the pipeline.
    asked: Option<ClientMessage>,
    /// A Ping was sent and nothing came since.
    is_silent: bool,
    errors: u64,
}

impl Session {
    fn new(socket: Socket, membership: Membership) -> Self {
        let (client, outgoing) = (Arc::clone(membership.client()), membership.outgoing());
        Self {
            socket,
            membership,
            client,
            outgoing,
            frames: Vec::new(),
            is_unflushed: false,
            asked: None,
            is_silent: false,
            errors: 0,
        }
    }

    async fn run(&mut self) -> End {
        let mut keep_alive = ticks(self.membership.hub().encoder.keep_alive);
        loop {
            let taken = self.outgoing.take(&mut self.frames);
            if let Err(end) = self.write(!taken.more).await {
                return end;
            }
            if taken.ended {
                return End::Close(CloseCode::Away, "the server stops");
            }
            if !self.outgoing.has_snapshot()
                && let Some(asked) = self.asked.take()
            {
                if let Err(end) = self.answer(&asked) {
                    return end;
                }
                continue;
            }
            // A client that does not take its answers is not listened to.
            let listens = self.asked.is_none() && !self.client.is_backed_up();
            tokio::select! {
                message = self.socket.next(), if listens => {
                    if let Err(end) = self.receive(message) {
                        return end;
                    }
                }
                () = self.client.ready(), if !taken.more => {}
                () = std::future::ready(()), if taken.more => {}
                _ = keep_alive.tick() => {
                    if let Err(end) = self.ping(listens).await {
                        return end;
                    }
                }
            }
        }
    }

    /// Writes the taken frames; the last of them leave the process at once if nothing more waits.
    async fn write(&mut self, flush: bool) -> Result<(), End> {
        if self.frames.is_empty() && !(flush && self.is_unflushed) {
            return Ok(());
        }
        self.is_unflushed = !flush;
        let (socket, frames, connection) = (&mut self.socket, &mut self.frames, &self.client.connection);
        let writing = async {
            for frame in frames.drain(..) {
                let bytes = frame.len() as u64;
                socket.feed(Message::Text(frame)).await?;
                connection.sent.fetch_add(1, Relaxed);
                connection.sent_bytes.fetch_add(bytes, Relaxed);
            }
            if flush { socket.flush().await } else { Ok(()) }
        };
        match timeout(WRITE_PATIENCE, writing).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(End::Gone),
            Err(_) => {
                tracing::warn!(sink = %connection.sink, "a client took nothing for a minute and is dropped");
                Err(End::Gone)
            }
        }
    }

    /// Sends a Ping, and a frame that scripts in a browser can see. A client that answered none since the last one is
    /// gone; of one that is not listened to nobody knows, but it takes what waits, or is gone too.
    async fn ping(&mut self, listens: bool) -> Result<(), End> {
        if self.is_silent && listens {
            return Err(End::Gone);
        }
        self.is_silent = listens;
        let ping = Message::Ping(bytes::Bytes::new());
        if !matches!(timeout(WRITE_PATIENCE, self.socket.send(ping)).await, Ok(Ok(()))) {
            return Err(End::Gone);
        }
        self.frames.extend(self.membership.hub().encoder.ping());
        self.write(true).await
    }

    fn receive(&mut self, message: Option<Result<Message, WsError>>) -> Result<(), End> {
        self.is_silent = false;
        match message {
            Some(Ok(Message::Text(text))) => {
                self.client.connection.received.fetch_add(1, Relaxed);
                self.understand(&text)
            }
            Some(Ok(Message::Binary(_))) => Err(End::Close(CloseCode::Unsupported, "text messages only")),
            // The library answers Ping and Close by itself.
            Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Close(_) | Message::Frame(_))) => Ok(()),
            Some(Err(WsError::Capacity(_))) => Err(End::Close(CloseCode::Size, "a message is at most 64 KiB")),
            Some(Err(WsError::Utf8(_))) => Err(End::Close(CloseCode::Invalid, "text must be UTF-8")),
            Some(Err(WsError::Protocol(ProtocolError::ResetWithoutClosingHandshake))) | None => Err(End::Gone),
            Some(Err(WsError::Protocol(_))) => Err(End::Close(CloseCode::Protocol, "against the WebSocket protocol")),
            Some(Err(_)) => Err(End::Gone),
        }
    }

    fn understand(&mut self, text: &str) -> Result<(), End> {
        if text == "ping" {
            self.client.answer(Utf8Bytes::from_static("pong"));
            return Ok(());
        }
        match serde_json::from_str(text) {
            Ok(ClientMessage::Ping {}) => {
                self.client.answer(self.membership.hub().encoder.pong());
                Ok(())
            }
            Ok(asked) if self.outgoing.has_snapshot() => {
                self.asked = Some(asked);
                Ok(())
            }
            Ok(asked) => self.answer(&asked),
            Err(error) => self.refuse(&format!(
                "not understood: {error}; send `ping`, or {{\"type\":\"subscribe\",\"metric\":NAME,\"where\":{{COLUMN:[VALUES]}}}}"
            )),
        }
    }

    /// Does what the client asked for.
    fn answer(&mut self, asked: &ClientMessage) -> Result<(), End> {
        let result = match asked {
            ClientMessage::Subscribe(change) => self.membership.subscribe(change),
            ClientMessage::Unsubscribe(change) => self.membership.unsubscribe(change),
            ClientMessage::Ping {} => Ok(()),
        };
        result.or_else(|refusal| self.refuse(&refusal.0))
    }

    /// Tells the client that a message was wrong.
    fn refuse(&mut self, message: &str) -> Result<(), End> {
        self.client.connection.errors.fetch_add(1, Relaxed);
        self.errors += 1;
        if self.errors >= ERRORS_MAX {
            return Err(End::Close(CloseCode::Policy, "too many wrong messages"));
        }
        self.client.answer(self.membership.hub().encoder.error(message));
        Ok(())
    }
}

fn ticks(every: Duration) -> Interval {
    let mut ticks = interval_at(Instant::now() + every, every);
    // Late is late: two pings at once would leave no time to answer.
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}
