//! What waits for one client: bounded, and the oldest goes first when it is full.
//!
//! The policy is `drop_oldest`: a client that comes back wants what is new. What was dropped is counted on the
//! connection, and told to the client by a gap frame that stands where the dropped frames would have stood.
//! Answers and snapshots are never dropped: a client that does not take them is not listened to, so that it cannot ask
//! for more.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};

use pipeline::status::{ConnectionGuard, lock};
use tokio::sync::Notify;
use tokio_tungstenite::tungstenite::Utf8Bytes;

use super::envelope::Encoder;

/// Most bytes of updates that wait for one client, whatever the number of frames.
const QUEUE_BYTES_MAX: usize = 16 << 20;

/// Frames that are taken from the queue at a time: enough to make one large write of small frames.
const TAKEN_FRAMES: usize = 32;

/// Rows of one emission for one subscription, encoded once and shared by all clients that have it.
#[derive(Debug)]
pub(crate) struct Emission {
    /// The metric's place in the catalog.
    pub(crate) metric: usize,
    /// Sequence number of the last frame.
    pub(crate) seq: u64,
    /// One frame, or one per row, as they stand on the wire. At least one.
    pub(crate) frames: Vec<Utf8Bytes>,
    /// Their length together.
    pub(crate) bytes: usize,
}

/// The latest rows of a metric, for one client. Encoded part by part when they are sent.
#[derive(Debug)]
pub(crate) struct Snapshot {
    /// The metric's place in the catalog.
    pub(crate) metric: usize,
    /// The sink's newest sequence number when it was taken.
    pub(crate) seq: u64,
    /// Number of the newest output batch that it holds.
    pub(crate) batch: u64,
    /// The rows as JSON objects.
    pub(crate) rows: Vec<Arc<str>>,
    /// Which rows stand in which frame; at least one part.
    pub(crate) parts: Vec<Range<usize>>,
    /// Whether it is the last snapshot of a connection's beginning.
    pub(crate) completes: bool,
}

/// Frames of one metric that a slow client lost since it was last told so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lost {
    /// The metric's place in the catalog.
    pub(crate) metric: usize,
    /// How many.
    pub(crate) frames: u64,
    /// Sequence number of the last one.
    pub(crate) seq: u64,
}

#[derive(Debug)]
enum Item {
    Update(Arc<Emission>),
    Snapshot(Snapshot),
    Answer(Utf8Bytes),
    Gap(Lost),
}

#[derive(Debug, Default)]
struct Queue {
    items: VecDeque<Item>,
    /// Number of updates among the items, and their bytes.
    updates: usize,
    bytes: usize,
    /// Number of snapshots among the items. Each refers to up to all rows of a metric.
    snapshots: usize,
    lost: Vec<Lost>,
    warned: bool,
    closed: bool,
}

/// One client of a live sink: its connection and what waits for it.
#[derive(Debug)]
pub(crate) struct Client {
    /// To count on.
    pub(crate) connection: ConnectionGuard,
    /// Most updates that wait.
    capacity: usize,
    queue: Mutex<Queue>,
    ready: Notify,
}

impl Client {
    /// A client for which at most `capacity` updates wait.
    pub(crate) fn new(connection: ConnectionGuard, capacity: usize) -> Self {
        Self { connection, capacity, queue: Mutex::default(), ready: Notify::new() }
    }

    /// Adds an update. If there is no room the oldest updates are lost. Never blocks.
    pub(crate) fn update(&self, emission: &Arc<Emission>) {
        let mut queue = lock(&self.queue);
        if queue.closed {
            return;
        }
        while queue.updates > 0 && (queue.updates >= self.capacity || queue.bytes + emission.bytes > QUEUE_BYTES_MAX) {
            self.drop_oldest(&mut queue);
        }
        queue.updates += 1;
        queue.bytes += emission.bytes;
        self.push(&mut queue, Item::Update(Arc::clone(emission)));
    }

    /// Counts frames that nobody can be sent.
    pub(crate) fn lose(&self, lost: Lost) {
        let mut queue = lock(&self.queue);
        self.count(&mut queue, lost);
        // A client that waits for nothing else is told at once.
        self.ready.notify_one();
    }

    /// Adds an answer, which is never dropped.
    pub(crate) fn answer(&self, frame: Utf8Bytes) {
        self.push(&mut lock(&self.queue), Item::Answer(frame));
    }

    /// Adds a snapshot, which is never dropped.
    pub(crate) fn snapshot(&self, snapshot: Snapshot) {
        let mut queue = lock(&self.queue);
        queue.snapshots += 1;
        self.push(&mut queue, Item::Snapshot(snapshot));
    }

    /// Takes nothing more; what waits is still to be sent.
    pub(crate) fn close(&self) {
        lock(&self.queue).closed = true;
        self.ready.notify_one();
    }

    /// Waits until something is to be sent or the queue is closed. Cancel safe.
    pub(crate) async fn ready(&self) {
        self.ready.notified().await;
    }

    /// Whether so much waits that the client should not ask for more.
    pub(crate) fn is_backed_up(&self) -> bool {
        lock(&self.queue).items.len() > self.capacity
    }

    fn push(&self, queue: &mut Queue, item: Item) {
        let was_empty = queue.items.is_empty();
        queue.items.push_back(item);
        if was_empty {
            self.ready.notify_one();
        }
    }

    fn drop_oldest(&self, queue: &mut Queue) {
        // The first one as a rule: what is never dropped are a few items of a connection's beginning.
        let oldest = queue.items.iter().position(|item| matches!(item, Item::Update(_)));
        let Some(Item::Update(emission)) = oldest.and_then(|index| queue.items.remove(index)) else { return };
        queue.updates -= 1;
        queue.bytes -= emission.bytes;
        let lost = Lost { metric: emission.metric, frames: emission.frames.len() as u64, seq: emission.seq };
        self.count(queue, lost);
    }

    fn count(&self, queue: &mut Queue, lost: Lost) {
        self.connection.dropped.fetch_add(lost.frames, Relaxed);
        match queue.lost.iter_mut().find(|known| known.metric == lost.metric) {
            Some(known) => *known = Lost { frames: known.frames + lost.frames, ..lost },
            None => queue.lost.push(lost),
        }
        if !queue.warned {
            queue.warned = true;
            let (sink, address) = (&self.connection.sink, self.connection.address.map(tracing::field::display));
            tracing::warn!(%sink, address, "a client is too slow and loses frames");
        }
    }
}

/// What [`Outgoing::take`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    /// More waits.
    pub(crate) more: bool,
    /// Nothing more will ever come.
    pub(crate) ended: bool,
}

/// The taking end of a client's queue. There is one per client.
#[derive(Debug)]
pub(crate) struct Outgoing {
    client: Arc<Client>,
    encoder: Arc<Encoder>,
    /// A snapshot on its way, and its next part.
    snapshot: Option<(Snapshot, usize)>,
    items: Vec<Item>,
}

impl Outgoing {
    /// The end of this client's queue.
    pub(crate) fn new(client: Arc<Client>, encoder: Arc<Encoder>) -> Self {
        Self { client, encoder, snapshot: None, items: Vec::new() }
    }

    /// Moves the next frames, in order, to the end of `frames`: some dozen, or one part of a snapshot.
    pub(crate) fn take(&mut self, frames: &mut Vec<Utf8Bytes>) -> Taken {
        if self.snapshot.is_none() {
            self.take_items();
        }
        for item in self.items.drain(..) {
            match item {
                Item::Update(emission) => frames.extend(emission.frames.iter().cloned()),
                Item::Answer(frame) => frames.push(frame),
                Item::Gap(lost) => frames.extend(self.encoder.gap(&lost)),
                // Always the last one taken.
                Item::Snapshot(snapshot) => self.snapshot = Some((snapshot, 0)),
            }
        }
        if let Some((snapshot, part)) = &mut self.snapshot {
            self.encoder.snapshot(snapshot, *part, frames);
            *part += 1;
            if *part >= snapshot.parts.len() {
                self.snapshot = None;
            }
        }
        let queue = lock(&self.client.queue);
        let more = self.snapshot.is_some() || !queue.items.is_empty() || !queue.lost.is_empty();
        Taken { more, ended: queue.closed && !more }
    }

    /// Whether a snapshot waits, or is on its way.
    pub(crate) fn has_snapshot(&self) -> bool {
        self.snapshot.is_some() || lock(&self.client.queue).snapshots > 0
    }

    fn take_items(&mut self) {
        let mut queue = lock(&self.client.queue);
        let mut frames = 0;
        while frames < TAKEN_FRAMES {
            let next_is_update = queue.items.front().is_none_or(|item| matches!(item, Item::Update(_)));
            if next_is_update {
                // Where the lost frames would have stood.
                self.items.extend(queue.lost.drain(..).map(Item::Gap));
            }
            let Some(item) = queue.items.pop_front() else { return };
            let is_snapshot = matches!(item, Item::Snapshot(_));
            if let Item::Update(emission) = &item {
                queue.updates -= 1;
                queue.bytes -= emission.bytes;
                frames += emission.frames.len();
            }
            frames += 1;
            self.items.push(item);
            if is_snapshot {
                queue.snapshots -= 1;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use pipeline::status::Connections;

    use super::super::envelope::{Envelope, Wire};
    use super::super::subscription::{Catalog, Metric};
    use super::*;

    fn client(capacity: usize) -> (Arc<Client>, Outgoing) {
        let client = Arc::new(Client::new(Connections::default().open("live", None, "test"), capacity));
        let metric = |name: &str| Metric { name: name.into(), keys: Vec::new() };
        let catalog = Catalog { metrics: vec![metric("a"), metric("b")], ..Catalog::default() };
        let encoder = Encoder {
            envelope: Envelope::Event,
            wire: Wire::WebSocket,
            epoch: "e".into(),
            catalog,
            keep_alive: std::time::Duration::from_secs(30),
        };
        let outgoing = Outgoing::new(Arc::clone(&client), Arc::new(encoder));
        (client, outgoing)
    }

    fn emission(metric: usize, seq: u64) -> Arc<Emission> {
        let frame = Utf8Bytes::from(format!("{metric}:{seq}"));
        Arc::new(Emission { metric, seq, bytes: frame.len(), frames: vec![frame] })
    }

    fn everything(outgoing: &mut Outgoing) -> Vec<String> {
        let mut frames = Vec::new();
        while outgoing.take(&mut frames).more {}
        frames.iter().map(ToString::to_string).collect()
    }

    fn gap(metric: &str, lost: u64) -> String {
        format!(r#"{{"event":"gap","data":{{"metric":"{metric}","lost":{lost}}}}}"#)
    }

    #[test]
    fn the_oldest_updates_give_way_and_a_gap_stands_in_their_place() {
        let (client, mut outgoing) = client(2);
        client.answer("hello".into());
        for (metric, seq) in [(0, 1), (1, 2), (0, 3), (0, 4), (1, 5)] {
            client.update(&emission(metric, seq));
        }
        client.answer("pong".into());
        assert_eq!(everything(&mut outgoing), ["hello", &gap("a", 2), &gap("b", 1), "0:4", "1:5", "pong"]);
        assert_eq!(client.connection.dropped.load(Relaxed), 3);
        client.update(&emission(0, 6));
        assert_eq!(everything(&mut outgoing), ["0:6"]);
    }

    #[test]
    fn large_updates_are_bounded_by_their_bytes() {
        let (client, mut outgoing) = client(100);
        let large = |seq| {
            let frame = Utf8Bytes::from(format!("{seq}").repeat(QUEUE_BYTES_MAX / 2));
            Arc::new(Emission { metric: 0, seq, bytes: frame.len(), frames: vec![frame] })
        };
        for seq in 1..=3 {
            client.update(&large(seq));
        }
        let first: Vec<char> = everything(&mut outgoing).iter().filter_map(|frame| frame.chars().next()).collect();
        assert_eq!(first, ['{', '2', '3']);
    }

    #[test]
    fn a_closed_queue_ends_when_all_is_taken() {
        let (client, mut outgoing) = client(100);
        for seq in 0..100 {
            client.update(&emission(0, seq));
        }
        client.close();
        client.update(&emission(0, 100));
        let mut frames = Vec::new();
        let mut last = outgoing.take(&mut frames);
        assert_eq!(last, Taken { more: true, ended: false });
        while last.more {
            last = outgoing.take(&mut frames);
        }
        assert!(last.ended);
        assert_eq!(frames.len(), 100);
    }

    #[test]
    fn a_snapshot_is_sent_part_by_part_before_what_follows() {
        let (client, mut outgoing) = client(100);
        client.update(&emission(0, 1));
        let rows = vec!["1".into(), "2".into(), "3".into()];
        client.snapshot(Snapshot { metric: 0, seq: 1, batch: 1, rows, parts: vec![0..2, 2..3], completes: true });
        client.update(&emission(0, 2));
        let row = |n| format!(r#"{{"event":"message","data":{n}}}"#);
        assert!(outgoing.has_snapshot());
        let mut frames = Vec::new();
        outgoing.take(&mut frames);
        assert_eq!(frames, ["0:1".to_owned(), row(1), row(2)]);
        assert!(outgoing.has_snapshot(), "half of it is not all");
        outgoing.take(&mut frames);
        assert!(!outgoing.has_snapshot());
        assert_eq!(frames[3..], [row(3)]);
        assert_eq!(everything(&mut outgoing), ["0:2"]);
    }
}
