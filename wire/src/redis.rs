//! One connection to a Redis server. All that the plugins know of fred is in this file and in the pub/sub source.
//!
//! Why fred is fenced in: without a reconnect policy its task ends with the connection, but its client goes on
//! accepting commands that nobody will ever answer. So every call here also watches that task, and has a
//! limit of time: a lost server is an error, never a silence. After an error the connection is of no use; the
//! engine makes a new one.

use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use fred::clients::Client;
use fred::interfaces::ClientLike;
use fred::types::config::{Config, ConnectionConfig, PerformanceConfig, TcpConfig, TlsConnector};
use fred::types::{CustomCommand, Resp3Frame, Value};
use futures::future::maybe_done;
use pipeline::config::{At, CheckContext, SecretUrl};
use pipeline::error::{Error, Result};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::task::JoinHandle;

/// How long a server may take to answer a command that does not wait by itself. A healthy one answers in
/// milliseconds; one that is saving or loading may take seconds.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Silence after which the system probes whether the server's machine is still there.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(30);

/// Events of fred that may wait, its default: connecting makes several at once, and to miss one looks like a failure.
const EVENTS_MIN: usize = 32;

/// What error replies begin with when the server as a whole cannot answer now, whatever the command.
const UNAVAILABLE: [&str; 7] = ["LOADING", "BUSY", "MASTERDOWN", "NOAUTH", "CLUSTERDOWN", "TRYAGAIN", "READONLY"];

/// Where a server is and how to trust it.
#[derive(Clone, Debug)]
pub struct Endpoint {
    url: SecretUrl,
    authority: Option<PathBuf>,
}

impl Endpoint {
    /// `authority` is a PEM file of certificates to trust instead of the system's.
    pub fn new(url: &SecretUrl, authority: Option<PathBuf>) -> Self {
        Self { url: url.clone(), authority }
    }

    /// Reports what is wrong with a URL.
    pub fn check(url: &At<SecretUrl>, authority: Option<&At<String>>, cx: &mut CheckContext<'_>) {
        let form = || Some("redis://user:password@host:6379/0, or rediss:// for TLS".to_owned());
        let parsed = match url::Url::parse(url.expose()) {
            Ok(parsed) => parsed,
            Err(error) => return cx.error_hint(url.position, format!("no URL: {error}"), form()),
        };
        if !matches!(parsed.scheme(), "redis" | "rediss") {
            cx.error_hint(url.position, format!("`{}` is no scheme of Redis", parsed.scheme()), form());
        }
        if parsed.host_str().is_none_or(str::is_empty) {
            cx.error_hint(url.position, "the URL names no host", form());
        }
        let database = parsed.path().trim_matches('/');
        if !database.is_empty() && database.parse::<u8>().is_err() {
            cx.error_hint(url.position, format!("`{database}` is no number of a database"), form());
        }
        if let Some(authority) = authority.filter(|_| parsed.scheme() == "redis") {
            let hint = Some("write `rediss://` for TLS".to_owned());
            cx.error_hint(authority.position, "`ca` is of no use without TLS", hint);
        }
    }

    /// Connects, authenticates, selects the database. `messages_max` bounds the pub/sub messages that wait to
    /// be read, each taking about 100 bytes beside its text from the start.
    pub async fn connect(&self, messages_max: usize) -> Result<Connection> {
        let capacity = messages_max.max(EVENTS_MIN);
        let performance = PerformanceConfig { broadcast_channel_capacity: capacity, ..PerformanceConfig::default() };
        let keepalive = fred::socket2::TcpKeepalive::new().with_time(KEEPALIVE_AFTER).with_interval(PATIENCE);
        let tcp = TcpConfig { nodelay: Some(true), keepalive: Some(keepalive), ..TcpConfig::default() };
        let times = ConnectionConfig {
            connection_timeout: PATIENCE,
            internal_command_timeout: PATIENCE,
            tcp,
            ..ConnectionConfig::default()
        };
        // No reconnect policy: the engine reconnects.
        let client = Client::new(self.config()?, Some(performance), Some(times), None);
        let mut connection = Connection { task: Some(client.connect()), client, server: self.url.to_string() };
        let ready = connection.client.clone();
        // Twice the patience of one step: the connection itself, then the commands that set it up.
        match connection.watch(2 * PATIENCE, async move { ready.wait_for_connect().await }).await {
            Ok(()) => Ok(connection),
            Err(error) => Err(error.context("cannot connect")),
        }
    }

    fn config(&self) -> Result<Config> {
        let url = self.url.expose();
        let (tls, plain_url) = match url.strip_prefix("rediss://") {
            Some(rest) => (true, format!("redis://{rest}")),
            None => (false, url.to_owned()),
        };
        let mut config = Config::from_url_centralized(&plain_url)
            .map_err(|e| Error::user(format!("{}: {}", self.url, e.details())))?;
        if tls {
            config.tls = Some(self.tls()?.into());
        }
        Ok(config)
    }

    /// TLS by rustls with ring. fred's own default takes whichever provider the process has, and panics if
    /// that is not clear.
    fn tls(&self) -> Result<TlsConnector> {
        let mut roots = rustls::RootCertStore::empty();
        match &self.authority {
            Some(path) => {
                let wrong = |e: rustls::pki_types::pem::Error| Error::user(format!("{}: {e}", path.display()));
                for certificate in CertificateDer::pem_file_iter(path).map_err(wrong)? {
                    let added = roots.add(certificate.map_err(wrong)?);
                    added.map_err(|e| Error::user(format!("{}: {e}", path.display())))?;
                }
            }
            None => {
                roots.add_parsable_certificates(fred::rustls_native_certs::load_native_certs().certs);
            }
        }
        if roots.is_empty() {
            return Err(Error::user("no certificate to trust: neither the system nor `ca` has one"));
        }
        let config = rustls::ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
            .with_safe_default_protocol_versions()
            .map_err(|e| Error::internal("TLS").because(e))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(config.into())
    }
}

/// A live connection. It closes when this is dropped.
pub struct Connection {
    /// fred's client; every use goes through [`Self::watch`].
    pub client: Client,
    /// fred's task that owns the socket; it ends with the connection. `None` after an error.
    task: Option<JoinHandle<Result<(), fred::error::Error>>>,
    server: String,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.close();
    }
}

impl Connection {
    /// Sends one command and waits for its reply at most `patience`.
    pub async fn call(&mut self, command: Command, patience: Duration) -> Result<Reply> {
        let mut replies = self.pipeline(&[command], patience).await?;
        replies.pop().ok_or_else(|| Error::internal("no reply to one command"))
    }

    /// Sends all commands in order without waiting in between; one reply for each, error replies among them.
    pub async fn pipeline(&mut self, commands: &[Command], patience: Duration) -> Result<Vec<Reply>> {
        let client = self.client.clone();
        let work = async move {
            let calls = commands.iter().map(|command| {
                let arguments: Vec<Value> = command.arguments.iter().cloned().map(Value::Bytes).collect();
                let name = CustomCommand::new(command.name.clone(), None::<u16>, false);
                Box::pin(maybe_done(client.custom_raw(name, arguments)))
            });
            let mut calls: Vec<_> = calls.collect();
            for call in &mut calls {
                // A call is sent when it is first polled: this fixes the order.
                let _ = futures::poll!(call.as_mut());
            }
            let mut replies = Vec::with_capacity(calls.len());
            for call in &mut calls {
                call.as_mut().await;
                if let Some(frame) = call.as_mut().take_output() {
                    replies.push(Reply::of_frame(frame?));
                }
            }
            Ok(replies)
        };
        self.watch(patience, work).await
    }

    /// Does `work` unless the connection ends or `patience` runs out first; both close it.
    pub async fn watch<T>(
        &mut self,
        patience: Duration,
        work: impl Future<Output = Result<T, fred::error::Error>>,
    ) -> Result<T> {
        let Some(task) = &mut self.task else { return Err(self.error("the connection is closed")) };
        let problem = tokio::select! {
            biased;
            done = tokio::time::timeout(patience, work) => match done {
                Ok(Ok(value)) => return Ok(value),
                // The task knows better than its client why the connection ended.
                Ok(Err(error)) if error.is_canceled() => "the connection was lost".to_owned(),
                Ok(Err(error)) => describe(&error),
                Err(_) => format!("no answer within {} s", patience.as_secs()),
            },
            ended = task => match ended {
                Ok(Err(error)) => describe(&error),
                _ => "the connection was lost".to_owned(),
            },
        };
        self.close();
        Err(self.error(problem))
    }

    fn close(&mut self) {
        if let Some(task) = self.task.take() {
            task.abort();
        }
    }

    /// An error of this server.
    pub fn error(&self, message: impl std::fmt::Display) -> Error {
        Error::outside(format!("{}: {message}", self.server))
    }
}

/// fred's error in words for the user.
fn describe(error: &fred::error::Error) -> String {
    let details = error.details();
    if ["WRONGPASS", "NOAUTH", "NOPERM", "ERR invalid password"].iter().any(|word| details.starts_with(word)) {
        return format!("the server refuses the user or password of `url`: {details}");
    }
    // `Os { code: 111, kind: ConnectionRefused, message: "Connection refused" }`
    let message = details.split_once("message: \"").and_then(|(_, rest)| rest.split_once('"'));
    message.map_or_else(|| details.to_owned(), |(message, _)| message.to_owned())
}

/// A command with its arguments.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    name: String,
    arguments: Vec<Bytes>,
}

impl Command {
    /// A command without arguments.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), arguments: Vec::new() }
    }

    /// Adds an argument.
    pub fn arg(mut self, argument: impl Into<Bytes>) -> Self {
        self.arguments.push(argument.into());
        self
    }

    /// Adds arguments.
    pub fn args<T: Into<Bytes>>(mut self, arguments: impl IntoIterator<Item = T>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }
}

impl std::fmt::Display for Command {
    /// The command and its first argument, which mostly is the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.name)?;
        self.arguments.first().map_or(Ok(()), |key| write!(f, " {}", String::from_utf8_lossy(key)))
    }
}

/// A reply of protocol version 2, which every server speaks.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// Missing key, field, element.
    Null,
    /// A whole number.
    Int(i64),
    /// Text or bytes.
    Text(Bytes),
    /// Replies in order.
    List(Vec<Reply>),
    /// The server's words: `WRONGTYPE Operation against a key holding the wrong kind of value`.
    Error(String),
}

impl Reply {
    fn of_frame(frame: Resp3Frame) -> Self {
        match frame {
            Resp3Frame::Null => Self::Null,
            Resp3Frame::Number { data, .. } => Self::Int(data),
            Resp3Frame::Boolean { data, .. } => Self::Int(i64::from(data)),
            Resp3Frame::Double { data, .. } => Self::Text(data.to_string().into()),
            Resp3Frame::SimpleString { data, .. }
            | Resp3Frame::BlobString { data, .. }
            | Resp3Frame::VerbatimString { data, .. }
            | Resp3Frame::BigNumber { data, .. } => Self::Text(data),
            Resp3Frame::SimpleError { data, .. } => Self::Error(data.to_string()),
            Resp3Frame::BlobError { data, .. } => Self::Error(String::from_utf8_lossy(&data).into_owned()),
            Resp3Frame::Array { data, .. } | Resp3Frame::Push { data, .. } => {
                Self::List(data.into_iter().map(Self::of_frame).collect())
            }
            Resp3Frame::Set { data, .. } => Self::List(data.into_iter().map(Self::of_frame).collect()),
            Resp3Frame::Map { data, .. } => {
                Self::List(data.into_iter().flat_map(|(k, v)| [Self::of_frame(k), Self::of_frame(v)]).collect())
            }
            other => Self::Error(format!("a reply of unknown kind: {other:?}")),
        }
    }

    /// The items of a list.
    pub fn into_list(self) -> Option<Vec<Reply>> {
        match self {
            Self::List(items) => Some(items),
            _ => None,
        }
    }

    /// Text as UTF-8.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::Text(text) => std::str::from_utf8(text).ok(),
            _ => None,
        }
    }

    /// The server's words, if it cannot answer any command now.
    pub fn unavailable(&self) -> Option<&str> {
        match self {
            Self::Error(words) if UNAVAILABLE.iter().any(|prefix| words.starts_with(prefix)) => Some(words),
            _ => None,
        }
    }
}
