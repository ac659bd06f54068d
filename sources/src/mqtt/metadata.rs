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

/// Messages after which one with the id, the topic and the text of an earlier one is another message.
///
/// A broker that goes through the 65,535 packet ids in turn gives one out again after all the others but those in flight.
/// Half of them is as far as can be from both: from a message that comes again (after at most as many others as are in
/// flight) and from the next one of its id.
const COMES_AGAIN_WITHIN: u64 = 1 << 15;

/// The last message of each packet id.
///
/// A broker sends a message that it has no acknowledgement of again, with the same packet id and marked as sent before.
/// It gives the id to another message only after the acknowledgement, so one that is marked, with the id and the text of
/// the last one of that id, is that one. But the next of the same id and text may have been received, not be on the disk
/// at a crash, and come again: it is told by the messages between. Ids of another session have nothing to do with it: the
/// session's number is part of what is compared.
#[derive(Debug, Default, PartialEq)]
pub(super) struct MqttReceipts {
    /// By packet id, as far as one has been seen.
    last: Vec<Last>,
    /// Messages with a packet id that were new.
    count: u64,
}

/// What is remembered of a message.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Last {
    /// 0 if there was none.
    hash: u64,
    /// [`MqttReceipts::count`] with it.
    count: u64,
}

impl Receipts for MqttReceipts {
    fn receive(&mut self, record: &Record, _ingest_us: i64) -> Receipt {
        let Some(metadata) = Metadata::read(&record.metadata).filter(|metadata| metadata.packet_id > 0) else {
            return Receipt::New;
        };
        let topic = xxh3_64_with_seed(&record.metadata[HEADER..], u64::from(metadata.session));
        let hash = xxh3_64_with_seed(&record.payload, topic).max(1);
        let count = self.count;
        let last = self.of(metadata.packet_id);
        if metadata.again && last.hash == hash && count.saturating_sub(last.count) < COMES_AGAIN_WITHIN {
            // Nothing changes: the memory on the disk is told of new ones only.
            return Receipt::Repeated;
        }
        *last = Last { hash, count: count + 1 };
        self.count += 1;
        Receipt::New
    }

    fn snapshot(&self, state: &mut StateWriter) {
        let seen = || (0..).zip(&self.last).filter(|(_, last)| last.hash != 0);
        state.u64(seen().count() as u64);
        for (packet_id, last) in seen() {
            state.u64(packet_id);
            state.u64(last.hash);
        }
        // At the end: states of earlier versions end before the counts.
        state.u64(self.count);
        seen().for_each(|(_, last)| state.u64(last.count));
    }

    fn restore(&mut self, state: &mut StateReader<'_>) -> Result<()> {
        let mut seen = Vec::new();
        for _ in 0..state.count()? {
            seen.push((state.u64()?, state.u64()?));
        }
        // Without counts each was received just now: that is what earlier versions took it for.
        let has_counts = !state.is_empty();
        self.count = if has_counts { state.u64()? } else { 0 };
        for (packet_id, hash) in seen {
            let count = if has_counts { state.u64()? } else { 0 };
            if let Ok(packet_id) = u16::try_from(packet_id) {
                *self.of(packet_id) = Last { hash, count };
            }
        }
        Ok(())
    }
}

impl MqttReceipts {
    fn of(&mut self, packet_id: u16) -> &mut Last {
        let index = usize::from(packet_id);
        if self.last.len() <= index {
            self.last.resize(index + 1, Last::default());
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
            let mut restored = restored(&receipts);
            assert_eq!(restored, receipts, "{case}");
            assert_eq!(restored.receive(&received, 0), expected, "{case}");
        }
    }

    fn restored(receipts: &MqttReceipts) -> MqttReceipts {
        let mut state = StateWriter::default();
        receipts.snapshot(&mut state);
        let mut restored = MqttReceipts::default();
        restored.restore(&mut StateReader::new(&state.finish())).expect("a state");
        restored
    }

    #[test]
    fn a_message_with_the_id_and_the_text_of_one_that_is_long_past_is_new() {
        for (since, expected) in [(0, Receipt::Repeated), (32_767, Receipt::Repeated), (65_534, Receipt::New)] {
            let mut receipts = MqttReceipts::default();
            assert_eq!(receipts.receive(&record(7, false, 1, "on"), 0), Receipt::New);
            for number in (8..=u16::MAX).chain(1..7).take(since) {
                assert_eq!(receipts.receive(&record(number, false, 1, "on"), 0), Receipt::New);
            }
            // What comes again in between says nothing of the ids.
            assert_eq!(receipts.receive(&record(0, false, 1, "on"), 0), Receipt::New);
            let mut receipts = restored(&receipts);
            assert_eq!(receipts.receive(&record(7, true, 1, "on"), 0), expected, "after {since} others");
            // It was not on the disk at the crash, and is now.
            assert_eq!(receipts.receive(&record(7, true, 1, "on"), 0), Receipt::Repeated, "after {since} others");
        }
    }

    #[test]
    fn a_state_without_counts_knows_the_messages_as_before() {
        let mut state = StateWriter::default();
        let mut receipts = MqttReceipts::default();
        receipts.receive(&record(7, false, 1, "x"), 0);
        state.u64(1);
        state.u64(7);
        state.u64(receipts.last[7].hash);
        let mut restored = MqttReceipts::default();
        restored.restore(&mut StateReader::new(&state.finish())).expect("a state");
        assert_eq!(restored.receive(&record(7, true, 1, "x"), 0), Receipt::Repeated);
        assert_eq!(restored.receive(&record(7, true, 1, "y"), 0), Receipt::New);
    }

    #[test]
    fn a_record_keeps_the_topic() {
        assert_eq!(Metadata::topic(&record(7, false, 1, "x").metadata), Ok("a/b"));
    }
}
