//! MQTT 3.1.1.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use pipeline::error::{Error, Result};
use rumqttc::{
    AsyncClient, ConnectionError, Event as LibraryEvent, EventLoop, MqttOptions, Outgoing, Packet, Publish, QoS,
    StateError, SubscribeFilter, SubscribeReasonCode, TlsConfiguration, Transport,
};

use super::client::{
    CONNECT_SECONDS_MAX, Client, Event, Message, OUTGOING_MAX, PACKET_BYTES_MAX, PacketId, REQUESTS_MAX, Requests,
    Settings, broken, closed, connection_gone, refused,
};

/// A connection.
pub(super) struct V4 {
    client: AsyncClient,
    event_loop: EventLoop,
    server: String,
    client_id: String,
}

impl V4 {
    pub(super) fn new(settings: &Settings) -> Self {
        let mut options = MqttOptions::new(&settings.client_id, &settings.host, settings.port);
        options
            .set_clean_session(!settings.persistent)
            .set_manual_acks(true)
            .set_keep_alive(settings.keep_alive)
            .set_inflight(OUTGOING_MAX)
            .set_max_packet_size(PACKET_BYTES_MAX as usize, PACKET_BYTES_MAX as usize);
        if let Some((username, password)) = &settings.credentials {
            options.set_credentials(username, password);
        }
        if let Some(tls) = &settings.tls {
            options.set_transport(Transport::tls_with_config(TlsConfiguration::Rustls(Arc::clone(tls))));
        }
        let (client, mut event_loop) = AsyncClient::new(options, REQUESTS_MAX);
        event_loop.network_options.set_connection_timeout(CONNECT_SECONDS_MAX);
        // An acknowledgement is a small packet that must not wait for the next one.
        event_loop.network_options.set_tcp_nodelay(true);
        if settings.qos == 2 {
            expect_every_release(&mut event_loop);
        }
        Self { client, event_loop, server: settings.server(), client_id: settings.client_id.clone() }
    }

    fn error(&self, error: ConnectionError) -> Error {
        match error {
            ConnectionError::ConnectionRefused(code) => refused(&self.server, &format!("{code:?}")),
            ConnectionError::MqttState(StateError::ConnectionAborted) => closed(&self.server, &self.client_id),
            error => broken(&self.server, error),
        }
    }
}

/// Makes the library answer a PUBREL for any packet id. A broker repeats the PUBREL of a message that was
/// received before a reconnect; a new client does not know it and would end the connection, and so on for ever.
fn expect_every_release(event_loop: &mut EventLoop) {
    let mut publish = Publish::new("", QoS::ExactlyOnce, Vec::new());
    for number in 1..=u16::MAX {
        publish.pkid = number;
        // Manual acknowledgements: nothing is answered, the id is only noted.
        let _ = event_loop.state.handle_incoming_packet(Packet::Publish(publish.clone()));
        event_loop.state.events.clear();
    }
}

#[async_trait]
impl Client for V4 {
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
        Arc::new(V4Requests(self.client.clone()))
    }
}

fn translate(event: LibraryEvent) -> Option<Event> {
    match event {
        LibraryEvent::Incoming(Packet::Publish(publish)) => Some(Event::Message(Message {
            topic: Bytes::from(publish.topic),
            payload: publish.payload,
            id: PacketId { number: publish.pkid, qos: publish.qos as u8 },
        })),
        LibraryEvent::Incoming(Packet::SubAck(answer)) => {
            let refusal = |code: &SubscribeReasonCode| match code {
                SubscribeReasonCode::Success(_) => None,
                SubscribeReasonCode::Failure => Some("Failure".to_owned()),
            };
            Some(Event::Subscribed(answer.return_codes.iter().map(refusal).collect()))
        }
        LibraryEvent::Incoming(Packet::UnsubAck(_)) => Some(Event::Unsubscribed),
        LibraryEvent::Outgoing(Outgoing::Disconnect) => Some(Event::Disconnected),
        _ => None,
    }
}

struct V4Requests(AsyncClient);

impl Requests for V4Requests {
    fn subscribe(&self, filters: &[String], qos: u8) -> Result<()> {
        let filters = filters.iter().map(|filter| SubscribeFilter::new(filter.clone(), quality(qos)));
        self.0.try_subscribe_many(filters).map_err(|_| connection_gone())
    }

    fn unsubscribe(&self, filter: &str) -> Result<()> {
        self.0.try_unsubscribe(filter).map_err(|_| connection_gone())
    }

    fn acknowledge(&self, id: PacketId) -> Result<()> {
        let mut publish = Publish::new("", quality(id.qos), Vec::new());
        publish.pkid = id.number;
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
