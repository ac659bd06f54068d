//! MQTT 5.

use std::sync::Arc;

use async_trait::async_trait;
use pipeline::error::{Error, Result};
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{DisconnectReasonCode, Filter, Packet, Publish, SubscribeReasonCode};
use rumqttc::v5::{AsyncClient, ConnectionError, Event as LibraryEvent, EventLoop, MqttOptions, StateError};
use rumqttc::{NetworkOptions, Outgoing, TlsConfiguration, Transport};

use super::client::{
    CONNECT_SECONDS_MAX, Client, Event, Message, OUTGOING_MAX, PACKET_BYTES_MAX, PacketId, REQUESTS_MAX, Requests,
    Settings, broken, closed, connection_gone, refused,
};

/// A connection.
pub(super) struct V5 {
    client: AsyncClient,
    event_loop: EventLoop,
    server: String,
    client_id: String,
}

impl V5 {
    pub(super) fn new(settings: &Settings) -> Self {
        let mut options = MqttOptions::new(&settings.client_id, &settings.host, settings.port);
        let mut network = NetworkOptions::new();
        // An acknowledgement is a small packet that must not wait for the next one.
        network.set_tcp_nodelay(true);
        options
            .set_network_options(network)
            .set_clean_start(!settings.persistent)
            .set_manual_acks(true)
            .set_keep_alive(settings.keep_alive)
            .set_connection_timeout(CONNECT_SECONDS_MAX)
            .set_outgoing_inflight_upper_limit(OUTGOING_MAX)
            .set_receive_maximum(Some(settings.receive_maximum))
            .set_max_packet_size(Some(PACKET_BYTES_MAX));
        // No topic alias maximum: the library hands on aliased messages without their topic.
        if settings.persistent {
            // Without it the session ends with the connection, whatever clean_start says.
            options.set_session_expiry_interval(Some(settings.session_expiry_seconds));
        }
        if let Some((username, password)) = &settings.credentials {
            options.set_credentials(username, password);
        }
        if let Some(tls) = &settings.tls {
            options.set_transport(Transport::tls_with_config(TlsConfiguration::Rustls(Arc::clone(tls))));
        }
        let (client, mut event_loop) = AsyncClient::new(options, REQUESTS_MAX);
        if settings.qos == 2 {
            expect_every_release(&mut event_loop);
        }
        Self { client, event_loop, server: settings.server(), client_id: settings.client_id.clone() }
    }

    fn error(&self, error: ConnectionError) -> Error {
        match error {
            ConnectionError::ConnectionRefused(code) => refused(&self.server, &format!("{code:?}")),
            ConnectionError::MqttState(StateError::ConnectionAborted) => closed(&self.server, &self.client_id),
            ConnectionError::MqttState(StateError::ServerDisconnect {
                reason_code: DisconnectReasonCode::SessionTakenOver,
                ..
            }) => closed(&self.server, &self.client_id),
            error => broken(&self.server, error),
        }
    }
}

/// See the function of the same name for version 3.
fn expect_every_release(event_loop: &mut EventLoop) {
    let mut publish = Publish { qos: QoS::ExactlyOnce, topic: "released".into(), ..Publish::default() };
    for number in 1..=u16::MAX {
        publish.pkid = number;
        let _ = event_loop.state.handle_incoming_packet(Packet::Publish(publish.clone()));
        event_loop.state.events.clear();
    }
}

#[async_trait]
impl Client for V5 {
    async fn open(&mut self) -> Result<bool> {
        match self.event_loop.poll().await {
            Ok(LibraryEvent::Incoming(Packet::ConnAck(answer))) => Ok(answer.session_present),
            Ok(other) => Err(Error::outside(format!("MQTT broker {}: {other:?} instead of CONNACK", self.server))),
            Err(error) => Err(self.error(error)),
        }
    }

    async fn poll(&mut self, events: &mut Vec<Event>) -> Result<()> {
        let first = self.event_loop.poll().await.map_err(|e| self.error(e))?;
        events.extend(translate(first));
        // One read takes several packets off the socket; the others wait here.
        while let Some(event) = self.event_loop.state.events.pop_front() {
            events.extend(translate(event));
        }
        Ok(())
    }

    fn requests(&self) -> Arc<dyn Requests> {
        Arc::new(V5Requests(self.client.clone()))
    }
}

fn translate(event: LibraryEvent) -> Option<Event> {
    match event {
        LibraryEvent::Incoming(Packet::Publish(publish)) => Some(Event::Message(Message {
            topic: publish.topic,
            payload: publish.payload,
            id: PacketId { number: publish.pkid, qos: publish.qos as u8 },
        })),
        LibraryEvent::Incoming(Packet::SubAck(answer)) => {
            let refusal = |code: &SubscribeReasonCode| match code {
                SubscribeReasonCode::Success(_) => None,
                other => Some(format!("{other:?}")),
            };
            Some(Event::Subscribed(answer.return_codes.iter().map(refusal).collect()))
        }
        LibraryEvent::Incoming(Packet::UnsubAck(_)) => Some(Event::Unsubscribed),
        LibraryEvent::Outgoing(Outgoing::Disconnect) => Some(Event::Disconnected),
        _ => None,
    }
}

struct V5Requests(AsyncClient);

impl Requests for V5Requests {
    fn subscribe(&self, filters: &[String], qos: u8) -> Result<()> {
        let filters = filters.iter().map(|filter| Filter::new(filter.clone(), quality(qos)));
        self.0.try_subscribe_many(filters).map_err(|_| connection_gone())
    }

    fn unsubscribe(&self, filter: &str) -> Result<()> {
        self.0.try_unsubscribe(filter).map_err(|_| connection_gone())
    }

    fn acknowledge(&self, id: PacketId) -> Result<()> {
        let publish = Publish { qos: quality(id.qos), pkid: id.number, ..Publish::default() };
        self.0.try_ack(&publish).map_err(|_| connection_gone())
    }

    fn disconnect(&self) {
        let _ = self.0.try_disconnect();
    }
}

fn quality(qos: u8) -> QoS {
    match qos {
        0 => QoS::AtMostOnce,
        1 => QoS::AtLeastOnce,
        _ => QoS::ExactlyOnce,
    }
}
