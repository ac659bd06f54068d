//! One MQTT message per row.

mod publisher;
mod topic;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::path::PathBuf;
use std::time::Duration;

use arrow::array::RecordBatch;
use async_trait::async_trait;
use bytes::Bytes;
use pipeline::config::{At, CheckContext, Secret, SecretUrl};
use pipeline::error::{Error, Result};
use pipeline::json::encode_rows;
use pipeline::network::{Address, tls_client};
use pipeline::plugin::{
    BatchLimits, BatchOptions, OutboxSink, Promise, Sink, SinkConfig, SinkContext, SinkInput, SinkShape,
};
use schemars::JsonSchema;
use serde::Deserialize;
use xxhash_rust::xxh3::Xxh3;

use publisher::{Message, Publisher, Settings};
use topic::{Template, is_short_enough};

const PAGE: &str = "\
One MQTT message per row, to a topic that may name the metric and columns of the row.

## Writes

The row as a JSON object. In `topic`, `{metric}` is the pipeline's name and `{column}` the row's value of a string,
int, bool or date column; in the value `/`, `+`, `#`, `%` and control characters are written `%XX`, and null or empty
is `_`.

## Delivery

At least once with `qos: 1` or `2`: rows wait in the outbox until the broker has confirmed them, and those of a broken
connection are published again. With version 5 each message carries the user property `id`, a hash of metric, topic and
row, which stays the same when it is published again. Two rows of a metric that are equal in every column have the same
`id`: for a subscriber that drops repeated ones, give them a column that differs, such as a time.
`qos: 0`: a message has left when it is written to the connection; best effort.

## Limits

At most 1000 messages are unconfirmed at a time, or as many as the broker allows. A row that is larger than the
broker takes, or whose topic is longer than 65535 bytes, is reported and not published; the other rows of the delivery
are. The delivery then counts as failed, and its message says how many rows were too large. Brokers of version 3.1.1 do
not say how much they take and end the connection instead.

## Fails when

The broker cannot be reached, or refuses user, password, client id or topic: the sink tries again with back-off, and
rows wait in the outbox.
";

const EXAMPLE: &str = r#"type: mqtt
url: mqtt://127.0.0.1:1883
topic: "metrics/{metric}/{device_id}"
"#;

/// Port of `mqtt://` and of the embedded broker.
const PORT: u16 = 1883;
/// Port of `mqtts://`.
const TLS_PORT: u16 = 8883;

/// Publishes rows to an MQTT broker.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MqttConfig {
    /// The broker: `mqtt://HOST:1883`, `mqtts://HOST:8883` (TLS), or `embedded` (`embedded:PORT`) for the broker that a
    /// source with the same `url` starts inside the process. User and password may stand before the host.
    pub url: At<SecretUrl>,
    /// Where to publish: text with `{metric}` and `{column}` in it.
    pub topic: At<String>,
    /// Quality of service: 0 at most once, 1 at least once, 2 exactly once on an unbroken connection. Default 1: nothing
    /// is lost.
    #[serde(default = "default_qos")]
    pub qos: At<u8>,
    /// Whether the broker keeps the last message of each topic for later subscribers. Default false, so that nothing
    /// outdated is left behind.
    #[serde(default)]
    pub retain: bool,
    /// Version of MQTT: 5, or 3 for 3.1.1. Default 5: a broker can say why it refuses a message.
    #[serde(default = "default_version")]
    pub version: At<u8>,
    /// The client's name at the broker; no other client may use it. Default: a new one at each start, as no session is
    /// kept.
    #[serde(default)]
    pub client_id: Option<At<String>>,
    /// User name; goes before the one in the URL. Default none.
    #[serde(default)]
    pub username: Option<String>,
    /// Password; goes before the one in the URL. Default none.
    #[serde(default)]
    pub password: Option<Secret>,
    /// File of certificates (PEM) to trust instead of those of the operating system, for `mqtts://`.
    #[serde(default)]
    pub ca: Option<At<PathBuf>>,
    /// When waiting rows become a delivery: how many are published before their confirmations are awaited. Default
    /// `{rows: 1000, every: 0s}`: as many as are under way at a time, and at once, as each row is a message of its own.
    #[serde(default)]
    pub batch: BatchOptions,
}

/// Of the option `batch`.
const BATCH_DEFAULT: BatchLimits = BatchLimits { rows: 1000, every: Duration::ZERO };

fn default_qos() -> At<u8> {
    At::nowhere(1)
}

fn default_version() -> At<u8> {
    At::nowhere(5)
}

impl SinkConfig for MqttConfig {
    const TYPE: &'static str = "mqtt";
    const PAGE: &'static str = PAGE;
    const EXAMPLE: &'static str = EXAMPLE;
    const PROMISES: &'static [(&'static str, Promise)] = &[("", Promise::AtLeastOnce)];
    const INSTEAD: Option<&'static str> = Some("`parquet`, `sql`, or `redis` with `exactly_once: true`");

    fn check(&self, inputs: &[SinkInput], cx: &mut CheckContext<'_>) -> Option<SinkShape> {
        let errors_before = cx.errors();
        match Server::of(&self.url) {
            Ok(server) => {
                if let (Some(ca), false) = (&self.ca, server.is_tls) {
                    cx.error(ca.position, "`ca` is for TLS; write the URL with `mqtts://`");
                }
            }
            Err(message) => {
                let hint = "write `mqtt://HOST`, `mqtts://HOST` (TLS) or `embedded`";
                cx.error_hint(self.url.position, message, Some(hint.into()));
            }
        }
        if !matches!(self.version.value, 3 | 5) {
            cx.error(self.version.position, format!("`version` is 3 (for 3.1.1) or 5, not {}", self.version.value));
        }
        if self.qos.value > 2 {
            cx.error(self.qos.position, format!("`qos` is 0, 1 or 2, not {}", self.qos.value));
        }
        self.batch.check(cx);
        if let Some(id) = &self.client_id
            && (id.is_empty() || id.len() > usize::from(u16::MAX) || id.contains('\0'))
        {
            cx.error(id.position, "a client id has 1 to 65535 bytes and no NUL");
        }
        if self.password.is_some() && self.username.is_none() && !self.url.expose().contains('@') {
            cx.error(cx.position(), "MQTT takes no `password` without a `username`");
        }
        self.check_topic(inputs, cx);
        (cx.errors() == errors_before).then(SinkShape::default)
    }

    fn build(&self, cx: SinkContext) -> Result<Sink> {
        Ok(Sink::Outbox(Box::new(MqttSink::new(self, &cx)?), self.batch.limits(BATCH_DEFAULT)))
    }
}

impl MqttConfig {
    fn check_topic(&self, inputs: &[SinkInput], cx: &mut CheckContext<'_>) {
        let template = match Template::parse(&self.topic) {
            Ok(template) => template,
            Err((offset, message)) => return cx.error(self.topic.place_of(Some(offset)), message),
        };
        for input in inputs {
            for (offset, message) in template.problems(&input.shape.schema) {
                let message = format!("rows of `{}`: {message}", input.metric);
                cx.error(self.topic.place_of(Some(offset)), message);
            }
        }
    }

    fn settings(&self, cx: &SinkContext) -> Result<Settings> {
        let server = Server::of(&self.url).map_err(Error::user)?;
        let tls = if server.is_tls {
            let ca = self.ca.as_ref().map(|ca| cx.folder.join(&ca.value));
            Some(tls_client(ca.as_deref())?)
        } else {
            None
        };
        let password = self.password.clone().or(server.password).unwrap_or_default();
        let username = self.username.clone().or(server.username);
        let client_id = self.client_id.as_ref().map(|id| id.value.clone());
        Ok(Settings {
            host: server.host,
            port: server.port,
            tls,
            client_id: client_id.unwrap_or_else(|| new_client_id(&cx.name)),
            credentials: username.map(|user| (user, password.expose().to_owned())),
            version: self.version.value,
            qos: self.qos.value,
            retain: self.retain,
        })
    }
}

/// A client id that no other process has.
fn new_client_id(sink: &str) -> String {
    // Each `RandomState` has random keys, so an empty hash is a random number.
    format!("tailwater-{sink}-{:016x}", RandomState::new().build_hasher().finish())
}

/// What `url` names.
struct Server {
    host: String,
    port: u16,
    is_tls: bool,
    username: Option<String>,
    password: Option<Secret>,
}

impl Server {
    fn of(url: &SecretUrl) -> Result<Self, String> {
        let embedded = |port| Self { host: "127.0.0.1".into(), port, is_tls: false, username: None, password: None };
        if url.expose() == "embedded" {
            return Ok(embedded(PORT));
        }
        if let Some(port) = url.expose().strip_prefix("embedded:") {
            let port = port.parse().ok().filter(|port| *port > 0);
            return port.map(embedded).ok_or_else(|| format!("`{url}`: a port is 1 to 65535"));
        }
        let Address { scheme, host, port, username, password } = Address::parse(url)?;
        let (default_port, is_tls) = match scheme.as_str() {
            "mqtt" => (PORT, false),
            "mqtts" => (TLS_PORT, true),
            other => return Err(format!("`{other}://` is no MQTT broker")),
        };
        Ok(Self { host, port: port.unwrap_or(default_port), is_tls, username, password })
    }
}

/// The running sink.
struct MqttSink {
    settings: Settings,
    template: Template,
    metrics: Vec<String>,
    publisher: Option<Publisher>,
}

impl MqttSink {
    fn new(config: &MqttConfig, cx: &SinkContext) -> Result<Self> {
        let template = Template::parse(&config.topic).map_err(|(_, message)| Error::user(message))?;
        let metrics = cx.inputs.iter().map(|input| input.metric.clone()).collect();
        Ok(Self { settings: config.settings(cx)?, template, metrics, publisher: None })
    }
}

#[async_trait]
impl OutboxSink for MqttSink {
    async fn connect(&mut self) -> Result<()> {
        self.publisher = None;
        self.publisher = Some(Publisher::connect(&self.settings).await?);
        Ok(())
    }

    async fn deliver(&mut self, input: usize, rows: &RecordBatch, _id: u64) -> Result<()> {
        let metric = self.metrics.get(input).ok_or_else(|| Error::internal(format!("no input {input}")))?;
        let topics = self.template.topics(metric, rows)?;
        let encoded = encode_rows(rows);
        // Taken out: a connection that failed, or whose rows were given up half-way, is never used again.
        let connected = self.publisher.take();
        let mut publisher = connected.ok_or_else(|| Error::outside("not connected to the MQTT broker"))?;
        let (mut too_long, mut too_large) = (0, 0);
        for (row, topic) in topics.into_iter().enumerate() {
            if !is_short_enough(&topic) {
                too_long += 1;
                continue;
            }
            let payload = Bytes::copy_from_slice(encoded.row(row).as_bytes());
            let message = Message { id: message_id(metric, &topic, &payload), topic, payload };
            if publisher.takes(&message) {
                publisher.publish(message).await?;
            } else {
                too_large += 1;
            }
        }
        publisher.confirmed().await?;
        let packet_bytes_max = publisher.packet_bytes_max();
        self.publisher = Some(publisher);
        let too_long = (too_long > 0).then(|| format!("{too_long} rows have a topic of more than 65535 bytes"));
        let too_large = (too_large > 0).then(|| {
            format!("{too_large} rows make a message of more than the {packet_bytes_max} bytes that the broker takes")
        });
        let refused: Vec<String> = too_long.into_iter().chain(too_large).collect();
        if refused.is_empty() {
            return Ok(());
        }
        Err(Error::outside(format!("{}; the others are published", refused.join(", "))).fatal())
    }
}

/// The id of a message, from its content: how deliveries are cut, and how rows are numbered, may be another after a
/// crash. A length before each part keeps different ones from looking the same side by side.
fn message_id(metric: &str, topic: &str, payload: &[u8]) -> String {
    let mut hash = Xxh3::new();
    for part in [metric.as_bytes(), topic.as_bytes(), payload] {
        hash.update(&part.len().to_le_bytes());
        hash.update(part);
    }
    format!("{:032x}", hash.digest128())
}
