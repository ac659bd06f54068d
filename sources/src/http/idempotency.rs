//! `Idempotency-Key`: a request that a client repeats, because it got no answer, counts once.

use std::collections::{HashMap, VecDeque};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use pipeline::error::Result;
use pipeline::plugin::{Receipt, Receipts, Record};
use pipeline::state::{StateReader, StateWriter};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

/// How long a key is remembered, in microseconds: a client that was away over night may still repeat its request.
const KEPT_US: i64 = 24 * 60 * 60 * 1_000_000;

/// Most keys remembered: some megabytes.
const KEPT_MAX: usize = 1 << 16;

/// Bytes of a record's metadata.
const METADATA: usize = 16 + 8 + 4;

/// A request with a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// Hash of the key.
    key: u128,
    /// Hash of the body.
    body: u64,
}

impl Request {
    pub(super) fn new(key: &[u8], body: &[u8]) -> Self {
        Self { key: xxh3_128(key), body: xxh3_64(body) }
    }

    /// Metadata of the record of its message `number`, counted from 0.
    pub(super) fn metadata(self, number: u32) -> Bytes {
        let mut bytes = BytesMut::with_capacity(METADATA);
        bytes.put_u128(self.key);
        bytes.put_u64(self.body);
        bytes.put_u32(number);
        bytes.freeze()
    }

    fn of(mut metadata: &[u8]) -> Option<(Self, u32)> {
        (metadata.len() == METADATA)
            .then(|| (Self { key: metadata.get_u128(), body: metadata.get_u64() }, metadata.get_u32()))
    }
}

/// The requests of the last day.
#[derive(Debug, Default, PartialEq)]
pub(super) struct HttpReceipts {
    /// By the hash of the key.
    requests: HashMap<u128, Known>,
    /// Keys in order of receipt, each with its time.
    order: VecDeque<(i64, u128)>,
}

/// What is known of a request.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Known {
    body: u64,
    /// Messages of it that were received.
    received: u32,
}

impl Receipts for HttpReceipts {
    fn receive(&mut self, record: &Record, ingest_us: i64) -> Receipt {
        self.forget(ingest_us);
        let Some((request, number)) = Request::of(&record.metadata) else { return Receipt::New };
        if let Some(known) = self.requests.get_mut(&request.key) {
            if known.body != request.body {
                let reason = "another body came with the same `Idempotency-Key` before; use a new key for a new body";
                return Receipt::Refused(reason.to_owned());
            }
            if number < known.received {
                return Receipt::Repeated;
            }
            known.received = number + 1;
            return Receipt::New;
        }
        self.requests.insert(request.key, Known { body: request.body, received: number + 1 });
        self.order.push_back((ingest_us, request.key));
        Receipt::New
    }

    fn snapshot(&self, state: &mut StateWriter) {
        state.u64(self.order.len() as u64);
        for (at, key) in &self.order {
            let known = self.requests.get(key).copied().unwrap_or(Known { body: 0, received: 0 });
            state.i64(*at);
            state.bytes(&key.to_be_bytes());
            state.u64(known.body);
            state.u64(u64::from(known.received));
        }
    }

    fn restore(&mut self, state: &mut StateReader<'_>) -> Result<()> {
        for _ in 0..state.count()? {
            let at = state.i64()?;
            let key = state.bytes()?.try_into().map_or(0, u128::from_be_bytes);
            let known = Known { body: state.u64()?, received: u32::try_from(state.u64()?).unwrap_or(u32::MAX) };
            self.requests.insert(key, known);
            self.order.push_back((at, key));
        }
        Ok(())
    }
}

impl HttpReceipts {
    fn forget(&mut self, now_us: i64) {
        while let Some(&(at, key)) = self.order.front()
            && (at < now_us.saturating_sub(KEPT_US) || self.order.len() > KEPT_MAX)
        {
            self.order.pop_front();
            self.requests.remove(&key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, body: &str, number: u32) -> Record {
        let metadata = Request::new(key.as_bytes(), body.as_bytes()).metadata(number);
        Record { payload: Bytes::new(), metadata, token: 0 }
    }

    #[test]
    fn a_repeated_request_counts_once_and_goes_on_where_it_broke_off() {
        let mut receipts = HttpReceipts::default();
        for (case, key, body, number, at, expected) in [
            ("first", "k", "b", 0, 0, Some(Receipt::New)),
            ("second message", "k", "b", 1, 0, Some(Receipt::New)),
            ("again", "k", "b", 0, 1, Some(Receipt::Repeated)),
            ("again, and further", "k", "b", 2, 1, Some(Receipt::New)),
            ("another body", "k", "c", 0, 1, None),
            ("another key", "l", "b", 0, 1, Some(Receipt::New)),
            ("a day later", "k", "c", 0, KEPT_US + 1, Some(Receipt::New)),
        ] {
            let mut state = StateWriter::default();
            receipts.snapshot(&mut state);
            let mut restored = HttpReceipts::default();
            restored.restore(&mut StateReader::new(&state.finish())).expect("a state");
            assert_eq!(restored, receipts, "{case}");
            let told = restored.receive(&record(key, body, number), at);
            match expected {
                Some(expected) => assert_eq!(told, expected, "{case}"),
                None => assert!(matches!(told, Receipt::Refused(_)), "{case}"),
            }
            receipts = restored;
        }
        assert_eq!(receipts.requests.len(), 2);
    }

    #[test]
    fn memory_is_bounded() {
        let mut receipts = HttpReceipts::default();
        for number in 0..KEPT_MAX + 10 {
            receipts.receive(&record(&number.to_string(), "b", 0), 0);
        }
        receipts.receive(&record("last", "b", 0), 0);
        assert!(receipts.requests.len() <= KEPT_MAX + 1 && receipts.order.len() == receipts.requests.len());
    }
}
