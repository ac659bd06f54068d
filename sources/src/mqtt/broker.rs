//! The broker inside the process: rumqttd, one per port, for as long as the process lives.

use std::collections::HashSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::task::Poll;

use bytes::BytesMut;
use pipeline::error::{Error, Result};
use rumqttd::protocol::v4::V4;
use rumqttd::protocol::v5::V5;
use rumqttd::protocol::{Error as ProtocolError, Packet, Protocol};
use rumqttd::{ConnectionSettings, LinkType, Router, RouterConfig, Server, ServerSettings};
use tokio::sync::{Mutex, oneshot};

/// Clients at one time; a broker for trying things out and for a few devices.
const CONNECTIONS_MAX: usize = 1000;
/// Largest message, in bytes; the default `max_message` of a source.
const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// Messages that one filter keeps in memory for slow and absent clients: segments of so many bytes …
const SEGMENT_BYTES_MAX: usize = 16 << 20;
/// … and so many segments. Older messages are lost to a client that has not had them.
const SEGMENTS_MAX: usize = 8;
/// Packets on the way to one client at a time; rumqttd's own default.
const OUTGOING_PACKETS_MAX: u64 = 200;
/// Packets that one client may have unread, and unacknowledged ones towards it; rumqttd's own default.
const INFLIGHT_MAX: usize = 100;
/// Longest wait for a client's CONNECT, in milliseconds; rumqttd's own default.
const CONNECT_MS_MAX: u16 = 60_000;

/// Ports on which a broker of this process listens.
static RUNNING: Mutex<Option<HashSet<u16>>> = Mutex::const_new(None);

/// Makes sure that a broker listens on 127.0.0.1:`port`. All sources and sinks that say `embedded` share it.
///
/// It runs on threads of its own, which end with the process and do not keep it from ending.
pub(super) async fn start(port: u16) -> Result<()> {
    let mut running = RUNNING.lock().await;
    let ports = running.get_or_insert_default();
    if ports.contains(&port) {
        return Ok(());
    }
    let (listens, answer) = oneshot::channel();
    std::thread::Builder::new()
        .name("mqtt-broker".into())
        .spawn(move || serve(port, listens))
        .map_err(|e| Error::outside("cannot start the embedded MQTT broker").because(e))?;
    answer.await.unwrap_or_else(|_| Err(Error::internal("the embedded MQTT broker ended at its start")))?;
    ports.insert(port);
    Ok(())
}

/// The broker's thread. Answers once it listens, or cannot.
fn serve(port: u16, listens: oneshot::Sender<Result<()>>) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = listens.send(Err(Error::outside("cannot start the embedded MQTT broker").because(error)));
            return;
        }
    };
    runtime.block_on(async move {
        let router = Router::new(0, router_config()).spawn();
        let mut server = Server::new(server_settings(port), router, AnyVersion::default());
        let mut serving = std::pin::pin!(server.start(LinkType::Remote));
        // The first step binds the port without waiting for anything, then waits for a client.
        let outcome = match futures::poll!(serving.as_mut()) {
            Poll::Pending => Ok(()),
            Poll::Ready(Ok(())) => Err(Error::internal("the embedded MQTT broker ended at once")),
            Poll::Ready(Err(error)) => Err(Error::outside(format!(
                "the embedded MQTT broker cannot listen on 127.0.0.1:{port}; if a broker runs there, use it with \
                 `url: mqtt://127.0.0.1:{port}`, or take another port with `url: embedded:PORT`"
            ))
            .because(error)),
        };
        let failed = outcome.is_err();
        if listens.send(outcome).is_ok() && !failed {
            let _ = serving.await;
        }
    });
}

fn router_config() -> RouterConfig {
    RouterConfig {
        max_connections: CONNECTIONS_MAX,
        max_outgoing_packet_count: OUTGOING_PACKETS_MAX,
        max_segment_size: SEGMENT_BYTES_MAX,
        max_segment_count: SEGMENTS_MAX,
        ..RouterConfig::default()
    }
}

fn server_settings(port: u16) -> ServerSettings {
    ServerSettings {
        name: "embedded".into(),
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
        tls: None,
        next_connection_delay_ms: 0,
        connections: ConnectionSettings {
            connection_timeout_ms: CONNECT_MS_MAX,
            max_payload_size: MESSAGE_BYTES_MAX,
            max_inflight_count: INFLIGHT_MAX,
            auth: None,
            external_auth: None,
            dynamic_filters: false,
        },
    }
}

/// Both versions of MQTT on one port: the client's CONNECT says which.
#[derive(Clone, Debug, Default)]
struct AnyVersion {
    is_5: Option<bool>,
}

impl Protocol for AnyVersion {
    fn read_mut(&mut self, stream: &mut BytesMut, max_size: usize) -> Result<Packet, ProtocolError> {
        let is_5 = match self.is_5 {
            Some(is_5) => is_5,
            None => *self.is_5.insert(level(stream)? == 5),
        };
        if is_5 { V5.read_mut(stream, max_size) } else { V4.read_mut(stream, max_size) }
    }

    fn write(&self, packet: Packet, buffer: &mut BytesMut) -> Result<usize, ProtocolError> {
        if self.is_5 == Some(true) { V5.write(packet, buffer) } else { V4.write(without_properties(packet), buffer) }
    }
}

/// The protocol level in a CONNECT packet: packet type, length (1 to 4 bytes), name with its length, level.
fn level(stream: &[u8]) -> Result<u8, ProtocolError> {
    let at = |index: usize| {
        stream.get(index).copied().ok_or_else(|| ProtocolError::InsufficientBytes(index + 1 - stream.len()))
    };
    if at(0)? >> 4 != 1 {
        return Err(ProtocolError::InvalidProtocol);
    }
    let mut name = 2;
    while at(name - 1)? & 0x80 != 0 {
        name += 1;
        if name > 5 {
            return Err(ProtocolError::MalformedRemainingLength);
        }
    }
    let length = usize::from(at(name)?) << 8 | usize::from(at(name + 1)?);
    // `MQTT`, or `MQIsdp` of version 3.1.
    if length > 6 {
        return Err(ProtocolError::InvalidProtocol);
    }
    at(name + 2 + length)
}

/// A packet as version 3 has it. A message of a version 5 client may go to one of version 3, and rumqttd
/// would panic over the properties.
fn without_properties(packet: Packet) -> Packet {
    match packet {
        Packet::ConnAck(packet, _) => Packet::ConnAck(packet, None),
        Packet::Publish(packet, _) => Packet::Publish(packet, None),
        Packet::PubAck(packet, _) => Packet::PubAck(packet, None),
        Packet::PubRec(packet, _) => Packet::PubRec(packet, None),
        Packet::PubRel(packet, _) => Packet::PubRel(packet, None),
        Packet::PubComp(packet, _) => Packet::PubComp(packet, None),
        Packet::SubAck(packet, _) => Packet::SubAck(packet, None),
        Packet::UnsubAck(packet, _) => Packet::UnsubAck(packet, None),
        Packet::Disconnect(packet, _) => Packet::Disconnect(packet, None),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connect_tells_its_version_as_soon_as_the_bytes_are_there() {
        let three = b"\x10\x10\x00\x04MQTT\x04\x02\x00\x3c\x00\x04name";
        let five = b"\x10\x80\x01\x00\x04MQTT\x05\x02\x00\x3c";
        let old = b"\x10\x10\x00\x06MQIsdp\x03\x02\x00\x3c";
        for (packet, expected, enough) in [(&three[..], 4, 9), (&five[..], 5, 10), (&old[..], 3, 11)] {
            for length in 0..packet.len() {
                match level(&packet[..length]) {
                    Ok(found) => assert!(found == expected && length >= enough, "{length}"),
                    Err(ProtocolError::InsufficientBytes(more)) => assert!(length < enough && more > 0, "{length}"),
                    Err(other) => panic!("{length}: {other}"),
                }
            }
        }
        assert!(matches!(level(b"GET / HTTP/1.1\r\n"), Err(ProtocolError::InvalidProtocol)));
    }
}
