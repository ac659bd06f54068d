//! One connection that publishes, of either version of MQTT.
//!
//! The client library must be polled without a break and never cancelled, so a task does that; it ends with the
//! connection. Messages are handed to it as fast as the broker takes them, and counted when confirmed.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use pipeline::error::{Error, Result};
use rumqttc::v5::mqttbytes::v5 as packets_v5;
use rumqttc::{NetworkOptions, Outgoing, TlsConfiguration, Transport, v5};
use rustls::ClientConfig;
use tokio::sync::watch;

/// Messages handed over that have not left yet; more make `publish` wait.
const REQUESTS_MAX: usize = 1024;
/// Unconfirmed messages on the way, unless the broker allows fewer: 20 000 a second over a line of 50 ms.
const INFLIGHT_MAX: u16 = 1000;
/// Largest packet that MQTT can carry, in bytes; the library's own limit of 10 KiB is less than a row may need.
const PACKET_BYTES_MAX: usize = 268_435_455 + 5;
/// Longest wait for the TCP connection, TLS and CONNACK, in seconds.
const CONNECT_SECONDS_MAX: u64 = 10;
/// Silence after which the broker is asked whether it is still there.
const KEEP_ALIVE: Duration = Duration::from_secs(30);

/// Everything a connection must know.
#[derive(Clone)]
pub(super) struct Settings {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) tls: Option<Arc<ClientConfig>>,
    pub(super) client_id: String,
    pub(super) credentials: Option<(String, String)>,
    pub(super) version: u8,
    pub(super) qos: u8,
    pub(super) retain: bool,
}

impl Settings {
    fn server(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }

    fn transport(&self) -> Option<Transport> {
        let tls = self.tls.as_ref()?;
        Some(Transport::tls_with_config(TlsConfiguration::Rustls(Arc::clone(tls))))
    }
}

/// Name of the user property that carries a message's id.
const ID: &str = "id";

/// A message to publish.
pub(super) struct Message {
    pub(super) topic: String,
    pub(super) payload: Bytes,
    /// Stays the same when the message is delivered again (version 5).
    pub(super) id: String,
}

impl Message {
    /// Bytes of the whole PUBLISH packet.
    fn packet_bytes(&self, client: &Client, qos: u8) -> usize {
        let packet_id = if qos > 0 { 2 } else { 0 };
        let properties = match client {
            Client::V3(_) => 0,
            // One user property: its kind, and the lengths of name and value.
            Client::V5(_) => {
                let bytes = 1 + 2 + ID.len() + 2 + self.id.len();
                length_bytes(bytes) + bytes
            }
        };
        let rest = 2 + self.topic.len() + packet_id + properties + self.payload.len();
        1 + length_bytes(rest) + rest
    }
}

/// Bytes that MQTT needs to write a length: seven bits in each.
fn length_bytes(length: usize) -> usize {
    (1..4).find(|bytes| length >> (7 * bytes) == 0).unwrap_or(4)
}

/// A live connection. Dropping it says goodbye.
pub(super) struct Publisher {
    client: Client,
    qos: u8,
    retain: bool,
    packet_bytes_max: usize,
    published: u64,
    progress: watch::Receiver<Progress>,
}

/// What the polling task knows.
#[derive(Clone, Debug, Default)]
struct Progress {
    confirmed: u64,
    /// Why the connection is of no use any more.
    failure: Option<String>,
}

enum Client {
    V3(rumqttc::AsyncClient),
    V5(v5::AsyncClient),
}

impl Publisher {
    /// Connects and returns when the broker has accepted.
    pub(super) async fn connect(settings: &Settings) -> Result<Self> {
        let (sender, progress) = watch::channel(Progress::default());
        let report = Report { progress: sender, server: settings.server(), qos: settings.qos };
        // A broker of version 3 does not say what it takes.
        let (client, packet_bytes_max) = match settings.version {
            3 => (connect_v3(settings, report).await?, PACKET_BYTES_MAX),
            _ => connect_v5(settings, report).await?,
        };
        let (qos, retain) = (settings.qos, settings.retain);
        Ok(Self { client, qos, retain, packet_bytes_max, published: 0, progress })
    }

    /// The largest packet that the broker takes, in bytes.
    pub(super) fn packet_bytes_max(&self) -> usize {
        self.packet_bytes_max
    }

    /// Whether the broker takes a message of this length. The library would give up the connection over one that
    /// it does not.
    pub(super) fn takes(&self, message: &Message) -> bool {
        message.packet_bytes(&self.client, self.qos) <= self.packet_bytes_max
    }

    /// Hands a message over; waits while too many are under way.
    pub(super) async fn publish(&mut self, message: Message) -> Result<()> {
        let Message { topic, payload, id } = message;
        let sent = match &self.client {
            Client::V3(client) => {
                let qos = [rumqttc::QoS::AtMostOnce, rumqttc::QoS::AtLeastOnce, rumqttc::QoS::ExactlyOnce];
                let qos = qos[usize::from(self.qos.min(2))];
                client.publish_bytes(topic, qos, self.retain, payload).await.is_ok()
            }
            Client::V5(client) => {
                use v5::mqttbytes::QoS;
                let qos = [QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce][usize::from(self.qos.min(2))];
                let properties = packets_v5::PublishProperties {
                    user_properties: vec![(ID.to_owned(), id)],
                    ..packets_v5::PublishProperties::default()
                };
                client.publish_with_properties(topic, qos, self.retain, payload, properties).await.is_ok()
            }
        };
        if !sent {
            return Err(self.failure());
        }
        self.published += 1;
        Ok(())
    }

    /// Waits until the broker has confirmed everything published so far (`qos: 0`: until it has left).
    pub(super) async fn confirmed(&mut self) -> Result<()> {
        let published = self.published;
        let done = |progress: &Progress| progress.failure.is_some() || progress.confirmed >= published;
        match self.progress.wait_for(done).await.map(|progress| progress.failure.clone()) {
            Ok(None) => Ok(()),
            Ok(Some(failure)) => Err(Error::outside(failure)),
            Err(_ended) => Err(self.failure()),
        }
    }

    fn failure(&self) -> Error {
        match &self.progress.borrow().failure {
            Some(failure) => Error::outside(failure.clone()),
            None => Error::outside("the connection to the MQTT broker has ended"),
        }
    }
}

impl Drop for Publisher {
    fn drop(&mut self) {
        // Ends the polling task. If the queue is full, the task ends when it sees that nobody awaits the messages.
        match &self.client {
            Client::V3(client) => drop(client.try_disconnect()),
            Client::V5(client) => drop(client.try_disconnect()),
        }
    }
}

/// The polling task's way to tell.
struct Report {
    progress: watch::Sender<Progress>,
    server: String,
    qos: u8,
}

impl Report {
    fn confirm(&self) {
        self.progress.send_modify(|progress| progress.confirmed += 1);
    }

    fn fail(&self, message: String) {
        self.progress.send_modify(|progress| {
            progress.failure.get_or_insert(message);
        });
    }

    fn is_abandoned(&self) -> bool {
        self.progress.is_closed()
    }

    /// What a refused CONNECT means to the user.
    fn refused(&self, code: &str) -> Error {
        let advice = match code {
            "BadUserNamePassword" | "NotAuthorized" => ": check `username` and `password`",
            "BadClientId" | "ClientIdentifierNotValid" => ": it does not take this `client_id`",
            "RefusedProtocolVersion" | "UnsupportedProtocolVersion" => ": try the other `version` (3 or 5)",
            _ => "",
        };
        Error::outside(format!("the MQTT broker {} refused the connection ({code}){advice}", self.server))
    }

    fn broken(&self, error: impl std::error::Error + Send + Sync + 'static) -> Error {
        Error::outside(format!("MQTT broker {}", self.server)).because(error)
    }
}

async fn connect_v3(settings: &Settings, report: Report) -> Result<Client> {
    use rumqttc::{ConnectionError, Event, Packet};
    let mut options = rumqttc::MqttOptions::new(&settings.client_id, &settings.host, settings.port);
    options
        .set_clean_session(true)
        .set_keep_alive(KEEP_ALIVE)
        .set_inflight(INFLIGHT_MAX)
        .set_max_packet_size(PACKET_BYTES_MAX, PACKET_BYTES_MAX);
    if let Some((username, password)) = &settings.credentials {
        options.set_credentials(username, password);
    }
    if let Some(transport) = settings.transport() {
        options.set_transport(transport);
    }
    let (client, mut event_loop) = rumqttc::AsyncClient::new(options, REQUESTS_MAX);
    event_loop.network_options.set_connection_timeout(CONNECT_SECONDS_MAX);
    event_loop.network_options.set_tcp_nodelay(true);
    match event_loop.poll().await {
        Ok(Event::Incoming(Packet::ConnAck(_))) => {}
        Ok(other) => return Err(Error::outside(format!("MQTT broker {}: {other:?}", report.server))),
        Err(ConnectionError::ConnectionRefused(code)) => return Err(report.refused(&format!("{code:?}"))),
        Err(error) => return Err(report.broken(error)),
    }
    tokio::spawn(async move {
        loop {
            match event_loop.poll().await {
                Ok(Event::Incoming(Packet::PubAck(_) | Packet::PubComp(_))) => report.confirm(),
                Ok(Event::Outgoing(Outgoing::Publish(_))) if report.qos == 0 => report.confirm(),
                Ok(Event::Outgoing(Outgoing::Disconnect)) => return,
                Ok(_) if report.is_abandoned() => return,
                Ok(_) => {}
                Err(error) => {
                    report.fail(report.broken(error).to_string());
                    return;
                }
            }
        }
    });
    Ok(Client::V3(client))
}

/// Connects, and says how large a packet the broker takes.
async fn connect_v5(settings: &Settings, report: Report) -> Result<(Client, usize)> {
    use packets_v5::Packet;
    use v5::{ConnectionError, Event};
    let mut options = v5::MqttOptions::new(&settings.client_id, &settings.host, settings.port);
    let mut network = NetworkOptions::new();
    network.set_tcp_nodelay(true);
    options
        .set_clean_start(true)
        .set_keep_alive(KEEP_ALIVE)
        .set_connection_timeout(CONNECT_SECONDS_MAX)
        .set_outgoing_inflight_upper_limit(INFLIGHT_MAX)
        .set_network_options(network);
    if let Some((username, password)) = &settings.credentials {
        options.set_credentials(username, password);
    }
    if let Some(transport) = settings.transport() {
        options.set_transport(transport);
    }
    let (client, mut event_loop) = v5::AsyncClient::new(options, REQUESTS_MAX);
    let told = match event_loop.poll().await {
        Ok(Event::Incoming(Packet::ConnAck(accepted))) => accepted.properties.and_then(|told| told.max_packet_size),
        Ok(other) => return Err(Error::outside(format!("MQTT broker {}: {other:?}", report.server))),
        Err(ConnectionError::ConnectionRefused(code)) => return Err(report.refused(&format!("{code:?}"))),
        Err(error) => return Err(report.broken(error)),
    };
    let told = told.and_then(|bytes| usize::try_from(bytes).ok());
    let packet_bytes_max = told.map_or(PACKET_BYTES_MAX, |bytes| bytes.min(PACKET_BYTES_MAX));
    tokio::spawn(async move {
        loop {
            match event_loop.poll().await {
                Ok(Event::Incoming(packet)) => match answer(&packet) {
                    Answer::Confirmed => report.confirm(),
                    Answer::Refused(reason) => {
                        report.fail(format!("the MQTT broker {} refused a message ({reason})", report.server));
                        return;
                    }
                    Answer::Other => {}
                },
                Ok(Event::Outgoing(Outgoing::Publish(_))) if report.qos == 0 => report.confirm(),
                Ok(Event::Outgoing(Outgoing::Disconnect)) => return,
                Ok(_) if report.is_abandoned() => return,
                Ok(_) => {}
                Err(error) => {
                    report.fail(report.broken(error).to_string());
                    return;
                }
            }
        }
    });
    Ok((Client::V5(client), packet_bytes_max))
}

/// What a packet of version 5 says about a message.
enum Answer {
    Confirmed,
    Refused(String),
    Other,
}

fn answer(packet: &packets_v5::Packet) -> Answer {
    use packets_v5::{Packet, PubAckReason, PubCompReason, PubRecReason};
    match packet {
        Packet::PubAck(ack) => match ack.reason {
            PubAckReason::Success | PubAckReason::NoMatchingSubscribers => Answer::Confirmed,
            reason => Answer::Refused(format!("{reason:?}")),
        },
        Packet::PubRec(ack) => match ack.reason {
            PubRecReason::Success | PubRecReason::NoMatchingSubscribers => Answer::Other,
            reason => Answer::Refused(format!("{reason:?}")),
        },
        Packet::PubComp(ack) => match ack.reason {
            PubCompReason::Success => Answer::Confirmed,
            reason => Answer::Refused(format!("{reason:?}")),
        },
        _ => Answer::Other,
    }
}
