//! What is kept with a message beside its payload, and how a message that comes again is told by it.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use pipeline::error::Result;
use pipeline::plugin::{Receipt, Receipts, Record};
use pipeline::state::{StateReader, StateWriter};
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::client::Message;

/// A record's metadata: flags in one byte, the packet id in two, the number of the broker's session in four, all
/// big-endian, and the topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Metadata {
    /// Whether the broker says that it has sent the message before.
    again: bool,
    /// 0 for `qos: 0`.
    packet_id: u16,
    session: u32,
}

/// Flag of [`Metadata::again`].
const AGAIN: u8 = 1;
/// Bytes before the topic.
const HEADER: usize = 7;

impl Metadata {
    pub(super) fn of(message: &Message, session: u32) -> Self {
        Self { again: message.again, packet_id: message.id.number, session }
    }

    /// The record of `message`.
    pub(super) fn record(self, message: Message) -> Record {
        let mut metadata = BytesMut::with_capacity(HEADER + message.topic.len());
        metadata.put_u8(if self.again { AGAIN } else { 0 });
        metadata.put_u16(self.packet_id);
        metadata.put_u32(self.session);
        metadata.put_slice(&message.topic);
        Record { payload: message.payload, metadata: metadata.freeze(), token: message.id.to_token() }
    }

    fn read(mut metadata: &[u8]) -> Option<Self> {
        if metadata.len() < HEADER {
            return None;
        }
        let again = metadata.get_u8() & AGAIN != 0;
        Some(Self { again, packet_id: metadata.get_u16(), session: metadata.get_u32() })
    }

    /// The topic in a record's metadata.
    pub(super) fn topic(metadata: &Bytes) -> Result<&str, String> {
        let topic = metadata.get(HEADER..).unwrap_or_default();
        std::str::from_utf8(topic).map_err(|e| format!("the topic is not UTF-8: {e}"))
    }
}

/// The last message of each packet id.
///
/// A broker sends a message that it has no acknowledgement of again, with the same packet id and marked as sent before.
/// It gives the id to another message only after the acknowledgement, so one that is marked, with the id and the text of
/// the last one of that id, is that one. Ids of another session have nothing to do with it: the session's number is part
/// of what is compared.
#[derive(Debug, Default, PartialEq)]
pub(super) struct MqttReceipts {
    /// By packet id, as far as one has been seen: the hash of its last message; 0 if there was none.
    last: Vec<u64>,
}

impl Receipts for MqttReceipts {
    fn receive(&mut self, record: &Record, _ingest_us: i64) -> Receipt {
        let Some(metadata) = Metadata::read(&record.metadata).filter(|metadata| metadata.packet_id > 0) else {
            return Receipt::New;
        };
        let topic = xxh3_64_with_seed(&record.metadata[HEADER..], u64::from(metadata.session));
        let hash = xxh3_64_with_seed(&record.payload, topic).max(1);
        let last = std::mem::replace(self.of(metadata.packet_id), hash);
        if metadata.again && last == hash { Receipt::Repeated } else { Receipt::New }
    }

    fn snapshot(&self, state: &mut StateWriter) {
        let seen = || (0..).zip(&self.last).filter(|(_, hash)| **hash != 0);
        state.u64(seen().count() as u64);
        for (packet_id, hash) in seen() {
            state.u64(packet_id);
            state.u64(*hash);
        }
    }

    fn restore(&mut self, state: &mut StateReader<'_>) -> Result<()> {
        for _ in 0..state.count()? {
            let packet_id = state.u64()?;
            let hash = state.u64()?;
            if let Ok(packet_id) = u16::try_from(packet_id) {
                *self.of(packet_id) = hash;
            }
        }
        Ok(())
    }
}

impl MqttReceipts {
    fn of(&mut self, packet_id: u16) -> &mut u64 {
        let index = usize::from(packet_id);
        if self.last.len() <= index {
            self.last.resize(index + 1, 0);
        }
        &mut self.last[index]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mqtt::client::PacketId;

    fn record(number: u16, again: bool, session: u32, payload: &'static str) -> Record {
        let id = PacketId { number, qos: u8::from(number > 0) };
        let message = Message { topic: Bytes::from_static(b"a/b"), payload: payload.into(), id, again };
        Metadata::of(&message, session).record(message)
    }

    #[test]
    fn a_message_comes_again_if_it_is_marked_and_the_same_as_the_last_of_its_id_in_its_session() {
        for (case, received, expected) in [
            ("sent again", record(7, true, 1, "x"), Receipt::Repeated),
            ("a new one under the same id", record(7, false, 1, "x"), Receipt::New),
            ("its first sending was lost", record(7, true, 1, "y"), Receipt::New),
            ("another id", record(8, true, 1, "x"), Receipt::New),
            ("another session", record(7, true, 2, "x"), Receipt::New),
            ("no id", record(0, true, 1, "x"), Receipt::New),
        ] {
            let mut receipts = MqttReceipts::default();
            assert_eq!(receipts.receive(&record(0, false, 1, "x"), 0), Receipt::New, "{case}");
            assert_eq!(receipts.receive(&record(7, false, 1, "x"), 0), Receipt::New, "{case}");
            let mut state = StateWriter::default();
            receipts.snapshot(&mut state);
            let mut restored = MqttReceipts::default();
            restored.restore(&mut StateReader::new(&state.finish())).expect("a state");
            assert_eq!(restored, receipts, "{case}");
            assert_eq!(restored.receive(&received, 0), expected, "{case}");
        }
    }

    #[test]
    fn a_record_keeps_the_topic() {
        assert_eq!(Metadata::topic(&record(7, false, 1, "x").metadata), Ok("a/b"));
    }
}
