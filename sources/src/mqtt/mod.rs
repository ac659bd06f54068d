//! Messages of an MQTT broker, one row each.

#[cfg(feature = "embedded-broker")]
mod broker;
mod client;
mod connection;
mod decode;
mod discover;
mod metadata;
mod session;
mod socket;
mod topic;
mod v4;
mod v5;

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use futures::future::BoxFuture;
use pipeline::config::{At, ByteSize, CheckContext, Duration, Fields, Secret, SecretUrl};
use pipeline::error::{Error, Result};
use pipeline::network::{Address, tls_client};
use pipeline::plugin::{
    Decoder, Delivery, Reader, Receipts, Schedule, Source, SourceConfig, SourceContext, SourceShape,
};
use pipeline::rows::RowsBuilder;
use pipeline::schema::FieldType;
use rustls::ClientConfig;
use schemars::JsonSchema;
use serde::Deserialize;
use tokio::task::JoinHandle;

use client::{CONNECT_MAX, Event, PACKET_BYTES_MAX, Request, Settings};
use decode::MqttDecoder;
use metadata::MqttReceipts;
use session::{Change, Session, Subscribed};
use socket::{Client, Socket};
use topic::Topic;

use crate::blocking;

const PAGE: &str = "\
Messages of an MQTT broker, one row each.

## Emits

The columns that `{name}` binds in `topics` (string), then `topic` (string) if asked for, then `fields`, read from
a JSON object. A message that is an array of objects gives one row for each. Without `fields`: the names, `topic`,
and `payload` (bytes), the message as it came.

## Delivery

With `qos: 1` or `2` and `session: persistent`: a message is acknowledged once it is on disk, and the broker sends again what was not. One
that comes again is known by its packet id and its text, so each counts once, through `kill -9` on this side. The client id is made at the first start and kept in the state folder
(`mqtt-SOURCE.id`), so the broker queues messages while the process is away, for `session_expiry`. A session that
the broker still has is resumed without subscribing anew; if `topics` changed, only the difference is asked for. Where a
connection ended before the broker had confirmed the topics, the next one asks for all of them again; with `version: 3` that
brings the retained messages again, too.
Of a broker that marks nothing as sent again (DUP), or gives it another packet id, a message may count twice; give it an id and
use `deduplicate`.
Packet ids are used again. A broker that has only a few of them (the embedded one: 100) soon gives one to a message of the
same topic and text; if a crash takes that one back, it is taken for the earlier one: put a number or a time into the
messages. Mosquitto goes through all 65,535 ids, which tells them apart while no more than 32,767 messages are in flight.
With `qos: 0` or `session: clean`: best effort.
Brokers lose sessions, too: Mosquitto queues 1000 messages per client (`max_queued_messages`) and needs `persistence
true` with a short `autosave_interval` to survive its own crash. `qos: 2` gives no more than 1 here.

## Limits

A message larger than `max_message` is acknowledged and goes to `errors:`. At most 65535 messages and 64 MiB wait
between connection and engine; then nothing is read until the engine goes on, and the broker waits.

`url: embedded` (or `embedded:PORT`) starts a broker inside the process, on 127.0.0.1 and port 1883, for MQTT 3.1.1
and 5, shared by all sources and sinks that say `embedded`. It has no passwords and keeps everything in memory:
queued and retained messages and sessions vanish with the process. It keeps 128 MiB per topic filter for clients that
are slow or away, takes messages up to 16 MiB, and has 100 of them in flight per client. For anything lasting,
run a broker of its own.

## Fails when

The broker cannot be reached, refuses user, password or client id, or refuses one of the topics: the source tries
again with back-off, and `/health` names the reason. Two clients with one `client_id` throw each other out.
";

const EXAMPLE: &str = r#"type: mqtt
url: mqtt://127.0.0.1:1883
topics: ["devices/{device_id}/telemetry"]
qos: 1
fields: {latency_ms: float, ts: timestamp}
"#;

/// Port of `mqtt://` and of the embedded broker.
const PORT: u16 = 1883;
/// Port of `mqtts://`.
const TLS_PORT: u16 = 8883;

/// Messages of an MQTT broker.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MqttConfig {
    /// The broker: `mqtt://HOST:1883`, `mqtts://HOST:8883` (TLS), or `embedded` for a broker inside the process
    /// (`embedded:PORT` for another port than 1883). User and password may stand before the host.
    pub url: At<SecretUrl>,
    /// MQTT topic filters. `{name}` stands for one level and becomes a string column; `+` and `#` as in MQTT. A
    /// topic without a name that another one binds has null there.
    pub topics: Vec<At<String>>,
    /// Quality of service: 0 at most once, 1 at least once, 2 exactly once between broker and process. Default 1:
    /// nothing is lost, and brokers hand 2 on more slowly for no gain here.
    #[serde(default = "default_qos")]
    pub qos: At<u8>,
    /// Version of MQTT: 5, or 3 for 3.1.1. Default 5: the number of messages in flight can be agreed with the broker.
    #[serde(default = "default_version")]
    pub version: At<u8>,
    /// The name under which the broker keeps the session; no other client may use it. Default: made once for this
    /// installation and source, and kept in the state folder.
    #[serde(default)]
    pub client_id: Option<At<String>>,
    /// `persistent`: the broker queues messages while the process is away. `clean`: it forgets the client. Default
    /// persistent, so that nothing is lost at a restart.
    #[serde(default)]
    pub session: SessionKind,
    /// How long the broker keeps the session of an absent client (version 5 only). Default 1d: a night and a
    /// weekend morning without filling the broker for ever.
    #[serde(default)]
    pub session_expiry: Option<At<Duration>>,
    /// User name; goes before the one in the URL. Default none.
    #[serde(default)]
    pub username: Option<String>,
    /// Password; goes before the one in the URL. Default none.
    #[serde(default)]
    pub password: Option<Secret>,
    /// Longest silence before a ping, 5s or more. Default 30s: a dead connection is noticed within a minute.
    #[serde(default = "default_keep_alive")]
    pub keep_alive: At<Duration>,
    /// File of certificates (PEM) to trust instead of those of the operating system, for `mqtts://`.
    #[serde(default)]
    pub ca: Option<At<PathBuf>>,
    /// Columns read from the JSON message. Default none: the message itself in `payload`.
    #[serde(default)]
    pub fields: Fields,
    /// Whether a column `topic` holds the whole topic. Default false with `fields`; without them it is always there.
    #[serde(default)]
    pub topic: bool,
    /// Largest message that is read; a larger one is a row error. Default 16MiB: more is no telemetry.
    #[serde(default = "default_max_message")]
    pub max_message: At<ByteSize>,
    /// Unacknowledged messages that the broker may send ahead (version 5 only). Default 10000: a tenth of a second at
    /// a hundred thousand messages a second, so that a disk that takes its time does not fill the broker's own queue.
    #[serde(default = "default_receive_maximum")]
    pub receive_maximum: At<u16>,
}

/// What the broker keeps of an absent client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SessionKind {
    /// Subscriptions and messages.
    #[default]
    Persistent,
    /// Nothing.
    Clean,
}

fn default_qos() -> At<u8> {
    At::nowhere(1)
}

fn default_version() -> At<u8> {
    At::nowhere(5)
}

fn default_keep_alive() -> At<Duration> {
    At::nowhere(Duration::from_secs(30))
}

fn default_max_message() -> At<ByteSize> {
    At::nowhere(ByteSize(16 << 20))
}

fn default_receive_maximum() -> At<u16> {
    At::nowhere(10_000)
}

/// Default of `session_expiry`.
const SESSION_EXPIRY: Duration = Duration::from_secs(24 * 60 * 60);

impl SourceConfig for MqttConfig {
    const TYPE: &'static str = "mqtt";
    const PAGE: &'static str = PAGE;
    const EXAMPLE: &'static str = EXAMPLE;
    const PROMISES: &'static [(&'static str, Delivery)] = &[
        ("`qos: 1` or `2` in a session that the broker keeps (the default)", Delivery::Acknowledged),
        ("`qos: 0` or `session: clean`", Delivery::BestEffort),
    ];
    const INSTEAD: Option<&'static str> = Some("`qos: 1` without `session: clean`");

    fn check(&self, cx: &mut CheckContext<'_>) -> Option<SourceShape> {
        if let Err(message) = Broker::of(&self.url) {
            let hint = "write `mqtt://HOST`, `mqtts://HOST` (TLS) or `embedded`";
            cx.error_hint(self.url.position, message, Some(hint.into()));
        }
        self.check_broker_options(cx);
        self.check_limits(cx);
        let topics = self.check_topics(cx);
        let columns = Columns::of(self, &topics);
        let errors_before = cx.errors();
        columns.check(self, cx);
        if cx.errors() > errors_before {
            return None;
        }
        let acknowledged = self.qos.value > 0 && self.session == SessionKind::Persistent;
        Some(SourceShape {
            schema: Arc::clone(RowsBuilder::new(&columns.extra(), &self.fields).schema()),
            delivery: if acknowledged { Delivery::Acknowledged } else { Delivery::BestEffort },
            schedule: Schedule::Continuous,
            bounded: false,
            can_be_on_demand: false,
            mounts: Vec::new(),
        })
    }

    fn build(&self, cx: SourceContext) -> Result<Box<dyn Source>> {
        Ok(Box::new(MqttSource::new(self, &cx)?))
    }

    fn decoder(&self) -> Option<Box<dyn Decoder>> {
        let topics = self.parsed_topics();
        let columns = Columns::of(self, &topics);
        Some(Box::new(MqttDecoder::new(self, topics, &columns)))
    }

    fn receipts(&self) -> Option<Box<dyn Receipts>> {
        Some(Box::new(MqttReceipts::default()))
    }

    fn discover(&self, cx: SourceContext) -> BoxFuture<'_, Result<Fields>> {
        Box::pin(discover::discover(self, cx))
    }
}

impl MqttConfig {
    fn check_broker_options(&self, cx: &mut CheckContext<'_>) {
        let broker = Broker::of(&self.url).ok();
        if let (Some(Broker::Server(address)), Some(ca)) = (&broker, &self.ca)
            && address.scheme != "mqtts"
        {
            cx.error(ca.position, "`ca` is for TLS; write the URL with `mqtts://`");
        }
        if cfg!(not(feature = "embedded-broker")) && matches!(broker, Some(Broker::Embedded(_))) {
            let hint = "build with `--features embedded-broker`, or run a broker and write `mqtt://HOST`";
            cx.error_hint(self.url.position, "this build has no embedded broker", Some(hint.into()));
        }
        if !matches!(self.version.value, 3 | 5) {
            cx.error(self.version.position, format!("`version` is 3 (for 3.1.1) or 5, not {}", self.version.value));
        }
        if self.qos.value > 2 {
            cx.error(self.qos.position, format!("`qos` is 0, 1 or 2, not {}", self.qos.value));
        }
        if let Some(id) = &self.client_id
            && (id.is_empty() || id.len() > usize::from(u16::MAX) || id.contains('\0'))
        {
            cx.error(id.position, "a client id has 1 to 65535 bytes and no NUL");
        }
        if self.password.is_some() && self.username.is_none() && !self.url.expose().contains('@') {
            cx.error(cx.position(), "MQTT takes no `password` without a `username`");
        }
    }

    fn check_limits(&self, cx: &mut CheckContext<'_>) {
        let keep_alive = &self.keep_alive;
        if !(5..=u64::from(u16::MAX)).contains(&keep_alive.value.as_secs()) {
            cx.error(keep_alive.position, format!("`keep_alive` is 5s to 65535s, not {}", keep_alive.value));
        }
        if !(1..=u64::from(PACKET_BYTES_MAX)).contains(&self.max_message.value.0) {
            cx.error(self.max_message.position, "`max_message` is 1B to 256MiB, the most that MQTT carries");
        }
        if self.receive_maximum.value == 0 {
            cx.error(self.receive_maximum.position, "`receive_maximum` is 1 to 65535");
        }
        if let Some(expiry) = &self.session_expiry {
            if self.version.value == 3 {
                cx.error(expiry.position, "`session_expiry` is of version 5; with version 3 the broker decides");
            } else if !(1..=u64::from(u32::MAX)).contains(&expiry.value.as_secs()) {
                cx.error(expiry.position, "`session_expiry` is 1s to 49710d");
            } else if self.session == SessionKind::Clean {
                cx.error(expiry.position, "`session_expiry` means nothing with `session: clean`");
            }
        }
    }

    fn check_topics(&self, cx: &mut CheckContext<'_>) -> Vec<Topic> {
        if self.topics.is_empty() {
            cx.error(cx.position(), "`topics` is empty; write at least one, `#` for all");
        }
        let mut topics: Vec<Topic> = Vec::new();
        for text in &self.topics {
            match Topic::parse(text) {
                Ok(topic) if topics.iter().any(|other| other.filter == topic.filter) => {
                    cx.error(text.position, format!("two of `topics` are the same filter `{}`", topic.filter));
                }
                Ok(topic) => topics.push(topic),
                Err((offset, message)) => cx.error(text.place_of(Some(offset)), message),
            }
        }
        topics
    }

    /// The topics after a check that found nothing wrong.
    fn parsed_topics(&self) -> Vec<Topic> {
        self.topics.iter().filter_map(|text| Topic::parse(text).ok()).collect()
    }
}

/// What may block on the disk.
const STATE_FILE: &str = "the state file of an MQTT source";

/// Longest wait for the goodbye of a connection, which a broken line may swallow.
const GOODBYE_MAX: std::time::Duration = std::time::Duration::from_secs(2);

/// What `url` names.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Broker {
    Embedded(u16),
    Server(Address),
}

impl Broker {
    fn of(url: &SecretUrl) -> Result<Self, String> {
        if url.expose() == "embedded" {
            return Ok(Self::Embedded(PORT));
        }
        if let Some(port) = url.expose().strip_prefix("embedded:") {
            let port = port.parse().ok().filter(|port| *port > 0);
            return port.map(Self::Embedded).ok_or_else(|| format!("`{url}`: a port is 1 to 65535"));
        }
        let address = Address::parse(url)?;
        match address.scheme.as_str() {
            "mqtt" | "mqtts" => Ok(Self::Server(address)),
            other => Err(format!("`{other}://` is no MQTT broker")),
        }
    }
}

/// Which columns stand before `fields`, and where.
struct Columns {
    /// What the topics bind, in order of appearance.
    names: Vec<String>,
    topic: Option<usize>,
    payload: Option<usize>,
}

impl Columns {
    fn of(config: &MqttConfig, topics: &[Topic]) -> Self {
        let mut names: Vec<String> = Vec::new();
        for name in topics.iter().flat_map(Topic::names) {
            if !names.iter().any(|known| known == name) {
                names.push(name.to_owned());
            }
        }
        let is_raw = config.fields.is_empty();
        let topic = (is_raw || config.topic).then_some(names.len());
        let payload = is_raw.then_some(names.len() + 1);
        Self { names, topic, payload }
    }

    /// The columns for a [`RowsBuilder`].
    fn extra(&self) -> Vec<(&str, FieldType)> {
        let names = self.names.iter().map(|name| (name.as_str(), FieldType::String));
        let topic = self.topic.map(|_| ("topic", FieldType::String));
        let payload = self.payload.map(|_| ("payload", FieldType::Bytes));
        names.chain(topic).chain(payload).collect()
    }

    fn check(&self, config: &MqttConfig, cx: &mut CheckContext<'_>) {
        let extra = self.extra();
        for (index, (name, _)) in extra.iter().enumerate() {
            if config.fields.0.contains_key(*name) {
                cx.error(cx.position(), format!("column `{name}` is in `fields` and comes from the topic, too"));
            }
            if extra[..index].iter().any(|(other, _)| other == name) {
                cx.error(cx.position(), format!("`{{{name}}}` in `topics`: the source has a column `{name}` already"));
            }
        }
    }
}

/// The running source.
struct MqttSource {
    name: String,
    config: MqttConfig,
    broker: Broker,
    tls: Option<Arc<ClientConfig>>,
    path: PathBuf,
    /// From the first connection on.
    session: Option<Session>,
    /// The task of the last connection.
    last_task: Option<JoinHandle<()>>,
}

impl MqttSource {
    fn new(config: &MqttConfig, cx: &SourceContext) -> Result<Self> {
        let broker = Broker::of(&config.url).map_err(Error::user)?;
        let tls = match &broker {
            Broker::Server(address) if address.scheme == "mqtts" => {
                let ca = config.ca.as_ref().map(|ca| cx.folder.join(&ca.value));
                Some(tls_client(ca.as_deref())?)
            }
            _ => None,
        };
        let path = Session::path(&cx.state_dir, &cx.name);
        Ok(Self { name: cx.name.clone(), config: config.clone(), broker, tls, path, session: None, last_task: None })
    }

    fn settings(&self, client_id: String, persistent: bool) -> Settings {
        let config = &self.config;
        let (host, port, user, word) = match &self.broker {
            Broker::Embedded(port) => ("127.0.0.1".to_owned(), *port, None, None),
            Broker::Server(address) => {
                let port = address.port.unwrap_or(if self.tls.is_some() { TLS_PORT } else { PORT });
                (address.host.clone(), port, address.username.clone(), address.password.clone())
            }
        };
        let password = config.password.clone().or(word).unwrap_or_default();
        let credentials = config.username.clone().or(user).map(|user| (user, password.expose().to_owned()));
        let expiry = config.session_expiry.as_ref().map_or(SESSION_EXPIRY, |at| at.value);
        Settings {
            host,
            port,
            tls: self.tls.clone(),
            client_id,
            credentials,
            keep_alive: *config.keep_alive.value,
            persistent,
            session_expiry_seconds: u32::try_from(expiry.as_secs()).unwrap_or(u32::MAX),
            receive_maximum: config.receive_maximum.value,
            qos: config.qos.value,
        }
    }

    /// A client that is not connected yet. Starts the embedded broker first, if that is the one.
    async fn client(&self, settings: &Settings) -> Result<Box<dyn Client>> {
        #[cfg(feature = "embedded-broker")]
        if let Broker::Embedded(port) = self.broker {
            broker::start(port).await?;
        }
        Ok(match self.config.version.value {
            3 => Box::new(Socket::<v4::V4>::new(settings)),
            _ => Box::new(Socket::<v5::V5>::new(settings)),
        })
    }

    /// The client id and what is known of the session.
    async fn session(&mut self) -> Result<Session> {
        if let Some(session) = &self.session {
            return Ok(session.clone());
        }
        let (path, name) = (self.path.clone(), self.name.clone());
        let client_id = self.config.client_id.as_ref().map(|id| id.value.clone());
        let session = blocking(STATE_FILE, move || Session::load(&path, &name, client_id.as_deref())).await?;
        self.session = Some(session.clone());
        Ok(session)
    }

    /// Notes a step of the session, on the disk first. Returns the number of the broker's session.
    async fn remember(&mut self, step: impl FnOnce() -> Result<Session> + Send + 'static) -> Result<u32> {
        let session = blocking(STATE_FILE, step).await?;
        let number = session.sessions;
        self.session = Some(session);
        Ok(number)
    }

    /// Waits until the last connection has sent its acknowledgements: a new one of the same client id ends it.
    async fn end_last_connection(&mut self) {
        if let Some(task) = &mut self.last_task {
            if tokio::time::timeout(GOODBYE_MAX, &mut *task).await.is_err() {
                task.abort();
            }
            self.last_task = None;
        }
    }

    fn filters(&self) -> Vec<String> {
        self.config.parsed_topics().into_iter().map(|topic| topic.filter).collect()
    }
}

#[async_trait]
impl Source for MqttSource {
    async fn connect(&mut self, _position: Option<&[u8]>) -> Result<Reader> {
        self.end_last_connection().await;
        let session = self.session().await?;
        let persistent = self.config.session == SessionKind::Persistent;
        let settings = self.settings(session.client_id.clone(), persistent);
        let wanted = Subscribed { server: settings.server(), qos: settings.qos, filters: self.filters() };
        let mut client = self.client(&settings).await?;
        // A broker that is not there has begun no session: only from here on is it uncertain.
        client.dial().await?;
        let (asked, path) = (wanted.clone(), self.path.clone());
        let before = session.clone();
        self.remember(move || session.about_to_connect(&asked, &path)).await?;
        let present = client.greet().await?;
        // The broker inside the process begins with it: there was nobody to queue anything.
        let outside = matches!(self.broker, Broker::Server(_));
        if persistent && !present && outside && before.was_subscribed(&wanted.server) {
            tracing::warn!(
                source = self.name,
                server = wanted.server,
                "the broker no longer has the session: messages it had queued for this source are lost"
            );
        }
        if !present {
            let (session, path) = (self.session().await?, self.path.clone());
            self.remember(move || session.begun(&path)).await?;
        }
        let change = Session::change(present.then_some(&before), &wanted);
        let events = subscribe(client.as_mut(), &change, settings.qos).await?;
        let (session, path) = (self.session().await?, self.path.clone());
        let number = self.remember(move || session.confirmed(wanted, &path)).await?;
        let resumes = persistent && settings.qos > 0;
        let bytes_max = usize::try_from(self.config.max_message.value.0).unwrap_or(usize::MAX);
        let (reader, task) = connection::start(client, events, resumes, bytes_max, number);
        self.last_task = Some(task);
        Ok(reader)
    }

    async fn close(&mut self) {
        // No limit of our own: the engine still acknowledges, and its limit counts from the last of these.
        if let Some(task) = self.last_task.take() {
            let _ = task.await;
        }
    }
}

/// Asks for the change and waits, within [`CONNECT_MAX`], until the broker has confirmed all of it. Returns what arrived
/// meanwhile.
async fn subscribe(client: &mut dyn Client, change: &Change, qos: u8) -> Result<Vec<Event>> {
    let late = |_| {
        let seconds = CONNECT_MAX.as_secs();
        Error::outside(format!("the broker does not confirm the subscription within {seconds} s"))
    };
    tokio::time::timeout(CONNECT_MAX, subscribed(client, change, qos)).await.map_err(late)?
}

async fn subscribed(client: &mut dyn Client, change: &Change, qos: u8) -> Result<Vec<Event>> {
    let requests = client.requests();
    for filter in &change.unsubscribe {
        requests.send(Request::Unsubscribe { filter: filter.clone() })?;
    }
    if !change.subscribe.is_empty() {
        requests.send(Request::Subscribe { filters: change.subscribe.clone(), qos })?;
    }
    let mut unconfirmed = change.unsubscribe.len() + usize::from(!change.subscribe.is_empty());
    let mut arrived = Vec::new();
    let mut events = Vec::new();
    while unconfirmed > 0 {
        client.poll(&mut events).await?;
        for event in events.drain(..) {
            match event {
                Event::Subscribed(answers) => {
                    check_answers(&change.subscribe, &answers)?;
                    unconfirmed -= 1;
                }
                Event::Unsubscribed => unconfirmed = unconfirmed.saturating_sub(1),
                other => arrived.push(other),
            }
        }
    }
    Ok(arrived)
}

/// Whether every filter was granted.
fn check_answers(filters: &[String], answers: &[Option<String>]) -> Result<()> {
    if answers.len() != filters.len() {
        return Err(Error::outside(format!("the broker answered {} of {} topics", answers.len(), filters.len())));
    }
    for (filter, answer) in filters.iter().zip(answers) {
        if let Some(reason) = answer {
            return Err(Error::outside(format!("the broker refused the topic `{filter}` ({reason})")));
        }
    }
    Ok(())
}
