//! What both versions of the protocol have in common: one small trait over the client library.
//!
//! Each connection has a client of its own, which never reconnects: the engine does. So nothing of an earlier
//! connection (an acknowledgement above all) can reach the broker on a later one.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use pipeline::error::{Error, Result};
use rustls::ClientConfig;

/// Requests that may wait for the connection: an acknowledgement of every packet id there is, and some more
/// for subscribing. So an acknowledgement never finds the queue full.
pub(super) const REQUESTS_MAX: usize = 65_535 + 64;

/// Largest packet that MQTT can carry, in bytes. The library would end the connection at a larger message than
/// it is told, and the broker would send the message again, for ever: so it is told this, and the
/// source's own limit turns a large message into a row error.
pub(super) const PACKET_BYTES_MAX: u32 = 268_435_455 + 5;

/// Longest wait for the TCP connection, TLS and CONNACK, in seconds. Longer than a broker needs that is busy
/// with a restart; the engine tries again after it.
pub(super) const CONNECT_SECONDS_MAX: u64 = 10;

/// Outgoing publishes the library keeps room for. A source publishes nothing; the least it works with.
pub(super) const OUTGOING_MAX: u16 = 10;

/// Everything a client must know.
#[derive(Clone)]
pub(super) struct Settings {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) tls: Option<Arc<ClientConfig>>,
    pub(super) client_id: String,
    pub(super) credentials: Option<(String, String)>,
    pub(super) keep_alive: Duration,
    /// Whether the broker keeps the session when the connection ends.
    pub(super) persistent: bool,
    /// How long it keeps it, in seconds (version 5).
    pub(super) session_expiry_seconds: u32,
    /// Messages in flight towards us (version 5).
    pub(super) receive_maximum: u16,
    pub(super) qos: u8,
}

impl Settings {
    /// Where the broker is.
    pub(super) fn server(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
}

/// A message as it arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) topic: Bytes,
    pub(super) payload: Bytes,
    pub(super) id: PacketId,
}

/// What an acknowledgement names: the packet id and the quality of service, which decides its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PacketId {
    /// 0 if `qos` is 0.
    pub(super) number: u16,
    pub(super) qos: u8,
}

impl PacketId {
    pub(super) fn to_token(self) -> u64 {
        u64::from(self.qos) << 16 | u64::from(self.number)
    }

    pub(super) fn of_token(token: u64) -> Self {
        // Only `to_token` makes tokens, so the parts fit.
        Self { number: (token & 0xffff) as u16, qos: (token >> 16) as u8 }
    }
}

/// What arrived or left.
#[derive(Debug)]
pub(super) enum Event {
    /// A message.
    Message(Message),
    /// The answer to a subscription, per filter: `None`, or why the broker refused.
    Subscribed(Vec<Option<String>>),
    /// The answer to an unsubscription.
    Unsubscribed,
    /// Our DISCONNECT has left.
    Disconnected,
}

/// One connection, polled by one task and never cancelled: the library may lose an answer otherwise.
#[async_trait]
pub(super) trait Client: Send {
    /// Connects, and says whether the broker had kept the session. Called once.
    async fn open(&mut self) -> Result<bool>;

    /// Waits for the next packets, answers pings, sends requests, and appends what happened.
    async fn poll(&mut self, events: &mut Vec<Event>) -> Result<()>;

    /// The way to send requests from elsewhere.
    fn requests(&self) -> Arc<dyn Requests>;
}

/// Requests to the task that polls the connection; they leave in the order of the calls.
pub(super) trait Requests: Send + Sync {
    /// Asks for all filters at once. Answered by one [`Event::Subscribed`].
    fn subscribe(&self, filters: &[String], qos: u8) -> Result<()>;
    /// Answered by [`Event::Unsubscribed`].
    fn unsubscribe(&self, filter: &str) -> Result<()>;
    /// Confirms a message: PUBACK or PUBREC.
    fn acknowledge(&self, id: PacketId) -> Result<()>;
    /// Says goodbye, after everything asked before. A connection that is gone already is fine.
    fn disconnect(&self);
}

/// The error of a request whose connection is gone.
pub(super) fn connection_gone() -> Error {
    Error::outside("the connection to the MQTT broker has ended")
}

/// What a refused CONNECT means to the user.
pub(super) fn refused(server: &str, code: &str) -> Error {
    let advice = match code {
        "BadUserNamePassword" | "NotAuthorized" => ": check `username` and `password`",
        "BadClientId" | "ClientIdentifierNotValid" => ": it does not take this `client_id`",
        "RefusedProtocolVersion" | "UnsupportedProtocolVersion" => ": try the other `version` (3 or 5)",
        _ => "",
    };
    Error::outside(format!("the MQTT broker {server} refused the connection ({code}){advice}"))
}

/// The broker ended the connection without a word. Version 3 has none for it, and brokers seldom use that of 5.
pub(super) fn closed(server: &str, client_id: &str) -> Error {
    Error::outside(format!(
        "the MQTT broker {server} closed the connection: it stopped, or another client uses the client id `{client_id}`"
    ))
}

/// The error of a connection that failed or broke.
pub(super) fn broken(server: &str, cause: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::outside(format!("MQTT broker {server}")).because(cause)
}
