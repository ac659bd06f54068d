//! What both versions of the protocol have in common: settings, what arrives, what is asked for, and the errors.
//!
//! Each connection has a client of its own, which never reconnects: the engine does. So nothing of an earlier
//! connection (an acknowledgement above all) can reach the broker on a later one.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pipeline::error::{Error, Result};
use rustls::ClientConfig;
use tokio::sync::mpsc::{self, error::TrySendError};

/// Requests that may wait for the connection: an acknowledgement of every packet id there is, were each asked for alone,
/// and some more for subscribing. So an acknowledgement never finds the queue full.
pub(super) const REQUESTS_MAX: usize = 65_535 + 64;

/// Largest packet that MQTT can carry, in bytes. A smaller limit would end the connection at a larger message,
/// and the broker would send the message again, for ever: the source's own limit turns it into a row error.
pub(super) const PACKET_BYTES_MAX: u32 = 268_435_455 + 5;

/// Longest wait for the TCP connection with TLS, again for CONNACK, and again for SUBACK. Longer than a broker needs that is busy with a
/// restart; the engine tries again after it.
pub(super) const CONNECT_MAX: Duration = Duration::from_secs(10);

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

    /// As CONNECT says it; `check` keeps it in bounds.
    pub(super) fn keep_alive_seconds(&self) -> u16 {
        u16::try_from(self.keep_alive.as_secs()).unwrap_or(u16::MAX)
    }
}

/// A message as it arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) topic: Bytes,
    pub(super) payload: Bytes,
    pub(super) id: PacketId,
    /// Whether the broker says that it has sent it before (DUP).
    pub(super) again: bool,
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
    /// Our DISCONNECT has left, and the broker has taken all that we sent before it.
    Disconnected,
}

/// What the task that polls the connection is asked to send.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// All filters at once. Answered by one [`Event::Subscribed`].
    Subscribe { filters: Vec<String>, qos: u8 },
    /// Answered by [`Event::Unsubscribed`].
    Unsubscribe { filter: String },
    /// Confirms messages, in this order: PUBACK or PUBREC.
    Acknowledge(Vec<PacketId>),
    /// Says goodbye, after everything asked before.
    Disconnect,
}

/// The way to that task; requests leave in the order of the calls.
#[derive(Clone)]
pub(super) struct Requests(mpsc::Sender<Request>);

/// A way for requests, and its end.
pub(super) fn requests() -> (Requests, mpsc::Receiver<Request>) {
    let (sender, receiver) = mpsc::channel(REQUESTS_MAX);
    (Requests(sender), receiver)
}

impl Requests {
    /// Hands a request over without waiting.
    pub(super) fn send(&self, request: Request) -> Result<()> {
        self.0.try_send(request).map_err(|error| match error {
            TrySendError::Closed(_) => connection_gone(),
            TrySendError::Full(_) => Error::outside("the MQTT broker takes no more acknowledgements"),
        })
    }
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
