//! MQTT 3.1.1.

use bytes::{Bytes, BytesMut};
use rumqttc::mqttbytes::v4::{
    Connect, ConnectReturnCode, Login, Packet, PubAck, PubComp, PubRec, Subscribe, SubscribeFilter,
    SubscribeReasonCode, Unsubscribe,
};
use rumqttc::mqttbytes::{Error as LibraryError, Protocol as ProtocolLevel, QoS};

use super::client::{Event, Message, PACKET_BYTES_MAX, PacketId, Settings};
use super::socket::{Incoming, Outgoing, Protocol};

/// The packets of version 3.1.1.
pub(super) struct V4;

impl Protocol for V4 {
    type Packet = Packet;

    fn connect(settings: &Settings) -> Packet {
        let login = settings.credentials.as_ref().map(|(user, password)| Login::new(user, password));
        Packet::Connect(Connect {
            protocol: ProtocolLevel::V4,
            keep_alive: settings.keep_alive_seconds(),
            client_id: settings.client_id.clone(),
            clean_session: !settings.persistent,
            last_will: None,
            login,
        })
    }

    fn read(input: &mut BytesMut) -> Result<Option<Incoming>, String> {
        let packet = match Packet::read(input, PACKET_BYTES_MAX as usize) {
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
                topic: Bytes::from(publish.topic),
                payload: publish.payload,
                id: PacketId { number: publish.pkid, qos: publish.qos as u8 },
                again: publish.dup,
            })),
            Packet::PubRel(release) => Incoming::Release(release.pkid),
            Packet::SubAck(answer) => {
                let refusal = |code: &SubscribeReasonCode| match code {
                    SubscribeReasonCode::Success(_) => None,
                    SubscribeReasonCode::Failure => Some("Failure".to_owned()),
                };
                Incoming::Event(Event::Subscribed(answer.return_codes.iter().map(refusal).collect()))
            }
            Packet::UnsubAck(_) => Incoming::Event(Event::Unsubscribed),
            _ => Incoming::Nothing,
        }))
    }

    fn packet(outgoing: Outgoing) -> Packet {
        match outgoing {
            Outgoing::Subscribe { number, filters, qos } => {
                let filters = filters.into_iter().map(|filter| SubscribeFilter::new(filter, quality(qos)));
                let mut subscribe = Subscribe::new_many(filters);
                subscribe.pkid = number;
                Packet::Subscribe(subscribe)
            }
            Outgoing::Unsubscribe { number, filter } => {
                let mut unsubscribe = Unsubscribe::new(filter);
                unsubscribe.pkid = number;
                Packet::Unsubscribe(unsubscribe)
            }
            Outgoing::Acknowledge(PacketId { number, qos: 2 }) => Packet::PubRec(PubRec::new(number)),
            Outgoing::Acknowledge(PacketId { number, .. }) => Packet::PubAck(PubAck::new(number)),
            Outgoing::Complete(number) => Packet::PubComp(PubComp::new(number)),
            Outgoing::Ping => Packet::PingReq,
            Outgoing::Disconnect => Packet::Disconnect,
        }
    }

    fn write(packet: &Packet, output: &mut BytesMut) -> Result<(), String> {
        packet.write(output, PACKET_BYTES_MAX as usize).map(drop).map_err(|e| e.to_string())
    }
}

fn quality(qos: u8) -> QoS {
    match qos {
        0 => QoS::AtMostOnce,
        1 => QoS::AtLeastOnce,
        _ => QoS::ExactlyOnce,
    }
}
