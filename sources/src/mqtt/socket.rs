//! The bytes of a connection: reads packets, sends what is asked for, and keeps the connection alive.
//!
//! rumqttc takes packets apart and puts them together; its event loop is not used. That one sends one acknowledgement
//! for nine messages that it reads, and none while the engine holds back. Mosquitto 2.0 does not keep to the window that
//! it was given, so tens of thousands of messages would be unconfirmed, and come again with the next connection.

use std::convert::Infallible;
use std::marker::PhantomData;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::BytesMut;
use pipeline::error::{Error, Result};
use rumqttc::tokio_rustls::TlsConnector;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf, split};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};

use super::client::{
    CONNECT_MAX, Event, PacketId, Request, Requests, Settings, broken, closed, connection_gone, refused, requests,
};

/// Bytes that one read asks for.
const READ_BYTES: usize = 64 << 10;

/// Bytes of requests that wait to be written, at which no more are taken: some hundred acknowledgements go out at once.
const WRITE_BYTES: usize = 16 << 10;

/// What a broker sends.
#[derive(Debug)]
pub(super) enum Incoming {
    /// CONNACK.
    Accepted {
        /// Whether the broker had kept the session.
        session_present: bool,
    },
    /// CONNACK with this code.
    Refused(String),
    Event(Event),
    /// PUBREL: the broker will not send the message of this packet id again.
    Release(u16),
    /// DISCONNECT; `None` if another client took the session over.
    Ended(Option<String>),
    /// What needs no answer.
    Nothing,
}

/// What a client sends, beside CONNECT.
#[derive(Debug)]
pub(super) enum Outgoing {
    Subscribe { number: u16, filters: Vec<String>, qos: u8 },
    Unsubscribe { number: u16, filter: String },
    Acknowledge(PacketId),
    Complete(u16),
    Ping,
    Disconnect,
}

/// The packets of one version of MQTT.
pub(super) trait Protocol: Send + 'static {
    type Packet: Send;

    /// The packet that opens a connection.
    fn connect(settings: &Settings) -> Self::Packet;

    /// Takes the first packet off `input`; `None` if it is not all there yet.
    fn read(input: &mut BytesMut) -> Result<Option<Incoming>, String>;

    fn packet(outgoing: Outgoing) -> Self::Packet;

    fn write(packet: &Self::Packet, output: &mut BytesMut) -> Result<(), String>;
}

/// One connection, polled by one task. A call that is dropped half-way loses nothing.
#[async_trait]
pub(super) trait Client: Send {
    /// Makes the connection, as far as the broker learns nothing of the client. Called once.
    async fn dial(&mut self) -> Result<()>;

    /// Asks for the session, and says whether the broker had kept it. Called once, after [`Self::dial`].
    async fn greet(&mut self) -> Result<bool>;

    /// Waits for packets, sends requests and pings, and appends what happened.
    async fn poll(&mut self, events: &mut Vec<Event>) -> Result<()>;

    /// Sends requests and pings and reads nothing, until the connection fails: for the time in which nobody takes
    /// messages.
    async fn attend(&mut self) -> Error;

    /// The way to send requests from elsewhere.
    fn requests(&self) -> Requests;
}

/// A connection of any kind.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection in one version of MQTT.
pub(super) struct Socket<P> {
    talk: Talk<P>,
    requests: Requests,
    /// Once it is dialled.
    line: Option<Line>,
}

/// One side of the conversation.
struct Talk<P> {
    settings: Settings,
    asked: mpsc::Receiver<Request>,
    /// Packet id of the last subscription.
    number: u16,
    /// Whether DISCONNECT is among what was written down.
    leaves: bool,
    protocol: PhantomData<fn() -> P>,
}

/// Both directions of an open connection.
struct Line {
    reader: ReadHalf<Box<dyn Stream>>,
    writer: WriteHalf<Box<dyn Stream>>,
    input: BytesMut,
    output: BytesMut,
    /// Whether what was written may still wait, in the TLS layer.
    unflushed: bool,
    /// When the line has been silent for so long on our side that the broker needs a sign of life.
    ping_at: Instant,
    /// Whether a ping has gone out and nothing has come since.
    unanswered: bool,
}

impl<P: Protocol> Socket<P> {
    /// Not connected yet.
    pub(super) fn new(settings: &Settings) -> Self {
        let (requests, asked) = requests();
        let talk = Talk { settings: settings.clone(), asked, number: 0, leaves: false, protocol: PhantomData };
        Self { talk, requests, line: None }
    }
}

impl<P: Protocol> Talk<P> {
    async fn connect(&self) -> Result<Line> {
        let server = self.settings.server();
        let failed = |error: std::io::Error| broken(&server, error);
        let tcp = TcpStream::connect(&server).await.map_err(failed)?;
        // An acknowledgement is a small packet that must not wait for the next one.
        tcp.set_nodelay(true).map_err(failed)?;
        let stream: Box<dyn Stream> = match &self.settings.tls {
            None => Box::new(tcp),
            Some(config) => {
                let host = self.settings.host.trim_matches(['[', ']']).to_owned();
                let name = ServerName::try_from(host).map_err(|error| broken(&server, error))?;
                Box::new(TlsConnector::from(Arc::clone(config)).connect(name, tcp).await.map_err(failed)?)
            }
        };
        let (reader, writer) = split(stream);
        Ok(Line {
            reader,
            writer,
            input: BytesMut::new(),
            output: BytesMut::new(),
            unflushed: false,
            ping_at: Instant::now() + self.settings.keep_alive,
            unanswered: false,
        })
    }

    /// Sends CONNECT and waits for the answer.
    async fn greet(&mut self, line: &mut Line) -> Result<bool> {
        self.put(&mut line.output, &P::connect(&self.settings))?;
        loop {
            match self.take(line)? {
                Some(Incoming::Accepted { session_present }) => return Ok(session_present),
                Some(Incoming::Refused(code)) => return Err(refused(&self.settings.server(), &code)),
                Some(other) => return Err(self.broken(format!("{other:?} instead of CONNACK"))),
                None => self.step(line, true).await?,
            }
        }
    }

    /// What `step` gives, if it is done in time.
    async fn in_time<T>(server: &str, step: impl Future<Output = Result<T>>) -> Result<T> {
        let seconds = CONNECT_MAX.as_secs();
        let late = |_| Error::outside(format!("MQTT broker {server}: no answer within {seconds} s"));
        timeout(CONNECT_MAX, step).await.map_err(late)?
    }

    fn broken(&self, cause: impl Into<String>) -> Error {
        Error::outside(format!("MQTT broker {}: {}", self.settings.server(), cause.into()))
    }

    fn put(&self, output: &mut BytesMut, packet: &P::Packet) -> Result<()> {
        P::write(packet, output).map_err(|e| self.broken(e))
    }

    /// The next packet that has arrived.
    fn take(&self, line: &mut Line) -> Result<Option<Incoming>> {
        P::read(&mut line.input).map_err(|e| self.broken(e))
    }

    /// Waits until some bytes have come or gone, or a request was taken. Nothing is lost if it is dropped.
    async fn step(&mut self, line: &mut Line, reads: bool) -> Result<()> {
        let has_room = line.output.len() < WRITE_BYTES && !self.leaves;
        let has_output = !line.output.is_empty() || line.unflushed;
        if line.input.capacity() - line.input.len() < READ_BYTES / 2 {
            line.input.reserve(READ_BYTES);
        }
        tokio::select! {
            biased;
            Some(request) = self.asked.recv(), if has_room => {
                self.ask(&mut line.output, request)?;
                while line.output.len() < WRITE_BYTES
                    && !self.leaves
                    && let Ok(request) = self.asked.try_recv()
                {
                    self.ask(&mut line.output, request)?;
                }
            }
            sent = send(&mut line.writer, &mut line.output, &mut line.unflushed), if has_output => {
                sent.map_err(|e| broken(&self.settings.server(), e))?;
                line.ping_at = Instant::now() + self.settings.keep_alive;
            }
            read = line.reader.read_buf(&mut line.input), if reads => {
                if read.map_err(|e| broken(&self.settings.server(), e))? == 0 {
                    return Err(closed(&self.settings.server(), &self.settings.client_id));
                }
                line.unanswered = false;
            }
            () = sleep_until(line.ping_at) => self.ping(line, reads)?,
        }
        Ok(())
    }

    /// Writes a request down.
    fn ask(&mut self, output: &mut BytesMut, request: Request) -> Result<()> {
        let outgoing = match request {
            Request::Subscribe { filters, qos } => Outgoing::Subscribe { number: self.next_number(), filters, qos },
            Request::Unsubscribe { filter } => Outgoing::Unsubscribe { number: self.next_number(), filter },
            Request::Acknowledge(ids) => {
                return ids.into_iter().try_for_each(|id| self.put(output, &P::packet(Outgoing::Acknowledge(id))));
            }
            Request::Disconnect => {
                self.leaves = true;
                Outgoing::Disconnect
            }
        };
        self.put(output, &P::packet(outgoing))
    }

    /// A packet id for a subscription. Ids of the broker's messages are its own.
    fn next_number(&mut self) -> u16 {
        self.number = self.number.checked_add(1).unwrap_or(1);
        self.number
    }

    /// A sign of life. An answer that is not looked for cannot be missed.
    fn ping(&self, line: &mut Line, reads: bool) -> Result<()> {
        if reads && line.unanswered {
            let seconds = self.settings.keep_alive.as_secs();
            return Err(self.broken(format!("no answer to a ping within {seconds} s")));
        }
        self.put(&mut line.output, &P::packet(Outgoing::Ping))?;
        line.unanswered = reads;
        line.ping_at = Instant::now() + self.settings.keep_alive;
        Ok(())
    }

    /// Appends what the packets that have arrived tell.
    fn events(&self, line: &mut Line, events: &mut Vec<Event>) -> Result<()> {
        while let Some(incoming) = self.take(line)? {
            match incoming {
                Incoming::Event(event) => events.push(event),
                Incoming::Release(number) => self.put(&mut line.output, &P::packet(Outgoing::Complete(number)))?,
                Incoming::Ended(None) => return Err(closed(&self.settings.server(), &self.settings.client_id)),
                Incoming::Ended(Some(reason)) => {
                    return Err(self.broken(format!("it ended the connection ({reason})")));
                }
                Incoming::Nothing | Incoming::Accepted { .. } | Incoming::Refused(_) => {}
            }
        }
        Ok(())
    }

    async fn poll(&mut self, line: &mut Line, events: &mut Vec<Event>) -> Result<()> {
        let before = events.len();
        loop {
            self.events(line, events)?;
            if events.len() > before {
                return Ok(());
            }
            if self.leaves && line.output.is_empty() && !line.unflushed {
                leave(line).await;
                events.push(Event::Disconnected);
                return Ok(());
            }
            self.step(line, true).await?;
        }
    }

    async fn attend(&mut self, line: &mut Line) -> Result<Infallible> {
        loop {
            self.step(line, false).await?;
        }
    }
}

/// Writes some bytes, or flushes what was written. Nothing is lost if it is dropped.
async fn send(
    writer: &mut WriteHalf<Box<dyn Stream>>,
    output: &mut BytesMut,
    unflushed: &mut bool,
) -> std::io::Result<()> {
    if output.is_empty() {
        writer.flush().await?;
        *unflushed = false;
    } else if writer.write_buf(output).await? == 0 {
        return Err(std::io::ErrorKind::WriteZero.into());
    } else {
        *unflushed = true;
    }
    Ok(())
}

/// Waits for the broker to hang up. To close with its bytes unread would reset the connection, and what we sent
/// last might never reach it.
async fn leave(line: &mut Line) {
    let _ = line.writer.shutdown().await;
    loop {
        line.input.clear();
        line.input.reserve(READ_BYTES);
        if !matches!(line.reader.read_buf(&mut line.input).await, Ok(1..)) {
            return;
        }
    }
}

#[async_trait]
impl<P: Protocol> Client for Socket<P> {
    async fn dial(&mut self) -> Result<()> {
        let server = self.talk.settings.server();
        self.line = Some(Talk::<P>::in_time(&server, self.talk.connect()).await?);
        Ok(())
    }

    async fn greet(&mut self) -> Result<bool> {
        let line = self.line.as_mut().ok_or_else(connection_gone)?;
        let server = self.talk.settings.server();
        Talk::<P>::in_time(&server, self.talk.greet(line)).await
    }

    async fn poll(&mut self, events: &mut Vec<Event>) -> Result<()> {
        let line = self.line.as_mut().ok_or_else(connection_gone)?;
        self.talk.poll(line, events).await
    }

    async fn attend(&mut self) -> Error {
        let Some(line) = self.line.as_mut() else { return connection_gone() };
        match self.talk.attend(line).await {
            Err(error) => error,
        }
    }

    fn requests(&self) -> Requests {
        self.requests.clone()
    }
}
