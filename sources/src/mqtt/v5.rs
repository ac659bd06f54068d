//! MQTT 5.

use bytes::BytesMut;
use rumqttc::v5::mqttbytes::v5::{
    Connect, ConnectProperties, ConnectReturnCode, Disconnect, DisconnectReasonCode, Filter, Login, Packet, PingReq,
    PubAck, PubComp, PubRec, RetainForwardRule, Subscribe, SubscribeReasonCode, Unsubscribe,
};
use rumqttc::v5::mqttbytes::{Error as LibraryError, QoS};

use super::client::{Event, Message, PACKET_BYTES_MAX, PacketId, Settings};
use super::socket::{Incoming, Outgoing, Protocol};

/// The packets of version 5.
pub(super) struct V5;

impl Protocol for V5 {
    type Packet = Packet;

    fn connect(settings: &Settings) -> Packet {
        let properties = ConnectProperties {
            // Without it the session ends with the connection, whatever clean_start says.
            session_expiry_interval: settings.persistent.then_some(settings.session_expiry_seconds),
            receive_maximum: Some(settings.receive_maximum),
            max_packet_size: Some(PACKET_BYTES_MAX),
            // No topic alias maximum: aliased messages would come without their topic.
            ..ConnectProperties::new()
        };
        let connect = Connect {
            keep_alive: settings.keep_alive_seconds(),
            client_id: settings.client_id.clone(),
            clean_start: !settings.persistent,
            properties: Some(properties),
        };
        let login = settings.credentials.as_ref().map(|(user, password)| Login::new(user, password));
        Packet::Connect(connect, None, login)
    }

    fn read(input: &mut BytesMut) -> Result<Option<Incoming>, String> {
        let packet = match Packet::read(input, Some(PACKET_BYTES_MAX)) {
            Ok(packet) => packet,
            Err(LibraryError::InsufficientBytes(_)) => return Ok(None),
            Err(error) => return Err(error.to_string()),
        };
        Ok(Some(match packet {
            Packet::ConnAck(answer) if answer.code == ConnectReturnCode::Success => {
                Incoming::Accepted { session_present: answer.session_present }
            }
            Packet::ConnAck(answer) => Incoming::Refused(format!("{:?}", answer.code)),
            Packet::Publish(publish) => Incoming::Event(Event::Message(Message {
                topic: publish.topic,
                payload: publish.payload,
                id: PacketId { number: publish.pkid, qos: publish.qos as u8 },
                again: publish.dup,
            })),
            Packet::PubRel(release) => Incoming::Release(release.pkid),
            Packet::SubAck(answer) => {
                let refusal = |code: &SubscribeReasonCode| match code {
                    SubscribeReasonCode::Success(_) => None,
                    other => Some(format!("{other:?}")),
                };
                Incoming::Event(Event::Subscribed(answer.return_codes.iter().map(refusal).collect()))
            }
            Packet::UnsubAck(_) => Incoming::Event(Event::Unsubscribed),
            Packet::Disconnect(Disconnect { reason_code: DisconnectReasonCode::SessionTakenOver, .. }) => {
                Incoming::Ended(None)
            }
            Packet::Disconnect(disconnect) => Incoming::Ended(Some(format!("{:?}", disconnect.reason_code))),
            _ => Incoming::Nothing,
        }))
    }

    fn packet(outgoing: Outgoing) -> Packet {
        match outgoing {
            Outgoing::Subscribe { number, filters, qos } => {
                // A filter that the session has already, or has in another quality, brings its retained messages no more.
                let filters = filters.into_iter().map(|filter| Filter {
                    retain_forward_rule: RetainForwardRule::OnNewSubscribe,
                    ..Filter::new(filter, quality(qos))
                });
                let mut subscribe = Subscribe::new_many(filters, None);
                subscribe.pkid = number;
                Packet::Subscribe(subscribe)
            }
            Outgoing::Unsubscribe { number, filter } => {
                let mut unsubscribe = Unsubscribe::new(filter, None);
                unsubscribe.pkid = number;
                Packet::Unsubscribe(unsubscribe)
            }
            Outgoing::Acknowledge(PacketId { number, qos: 2 }) => Packet::PubRec(PubRec::new(number, None)),
            Outgoing::Acknowledge(PacketId { number, .. }) => Packet::PubAck(PubAck::new(number, None)),
            Outgoing::Complete(number) => Packet::PubComp(PubComp::new(number, None)),
            Outgoing::Ping => Packet::PingReq(PingReq),
            Outgoing::Disconnect => Packet::Disconnect(Disconnect::new(DisconnectReasonCode::NormalDisconnection)),
        }
    }

    fn write(packet: &Packet, output: &mut BytesMut) -> Result<(), String> {
        packet.write(output, None).map(drop).map_err(|e| e.to_string())
    }
}

fn quality(qos: u8) -> QoS {
    match qos {
        0 => QoS::AtMostOnce,
        1 => QoS::AtLeastOnce,
        _ => QoS::ExactlyOnce,
    }
}
