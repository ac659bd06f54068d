//! What the live sinks share: the hub that fans rows out to clients, and everything that has no protocol.
//!
//! A sink has one hub. The pipeline hands it batches; each connection takes what waits for its client. Between
//! them stand a bounded queue per client and a lock that is never held over I/O: the pipeline never waits for a
//! client, and no client for another.

pub(crate) mod envelope;
pub(crate) mod options;
pub(crate) mod queue;
pub(crate) mod subscription;
mod topics;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use hyper::header::USER_AGENT;
use pipeline::batch::Batch;
use pipeline::http::Request;
use pipeline::json::JsonRows;
use pipeline::live::{DemandGuard, KeyColumns, Live};
use pipeline::plugin::{LiveSink, SinkContext, SinkInput};
use pipeline::status::lock;
use tokio::sync::watch;
use tokio_tungstenite::tungstenite::Utf8Bytes;

pub use self::envelope::Envelope;
use self::envelope::{Encoder, now_text};
use self::options::Options;
use self::queue::{Client, Emission, Lost, Outgoing, Snapshot};
use self::subscription::{Catalog, Change, Filter, Metric, Refusal, Since, Subscription};
use self::topics::{Picked, Topics};

/// Bytes of rows at which a frame is cut: what a client's buffers grow to is kept for as long as it stays.
const FRAME_BYTES: usize = 64 << 10;

/// Longest row that is sent. A client that has to hold more in one message is no longer live.
pub(crate) const ROW_BYTES_MAX: usize = 16 << 20;

/// How long a connection may take to send what waits for its client and say good-bye when it is closed.
pub(crate) const CLOSE_PATIENCE: std::time::Duration = std::time::Duration::from_secs(2);

/// Fans the rows of one live sink out to its clients.
#[derive(Debug)]
pub(crate) struct Hub {
    name: String,
    /// Writes the frames.
    pub(crate) encoder: Arc<Encoder>,
    live: Arc<Live>,
    snapshot: bool,
    queue: usize,
    max_clients: usize,
    clients: AtomicUsize,
    state: Mutex<State>,
    closed: watch::Sender<bool>,
}

/// What the pipeline and the connections change.
#[derive(Debug, Default)]
struct State {
    /// Sequence number of the newest frame.
    seq: u64,
    /// By the metric's place in the catalog.
    topics: Vec<Topics>,
    picked: Picked,
}

impl Hub {
    /// A hub without clients.
    pub(crate) fn new(cx: SinkContext, options: Options) -> Arc<Self> {
        let metric = |input: SinkInput| Metric { name: input.metric, keys: input.shape.keys };
        let metrics: Vec<Metric> = cx.inputs.into_iter().map(metric).collect();
        let topics = metrics.iter().map(|_| Topics::default()).collect();
        let catalog = Catalog { metrics, params: options.params, required: options.required };
        let epoch = cx.live.epoch.clone();
        Arc::new(Self {
            name: cx.name,
            encoder: Arc::new(Encoder {
                envelope: options.envelope,
                wire: options.wire,
                epoch,
                catalog,
                keep_alive: options.keep_alive,
            }),
            live: cx.live,
            snapshot: options.snapshot,
            queue: options.queue,
            max_clients: options.max_clients,
            clients: AtomicUsize::new(0),
            state: Mutex::new(State { topics, ..State::default() }),
            closed: watch::Sender::new(false),
        })
    }

    /// What clients may ask for.
    pub(crate) fn catalog(&self) -> &Catalog {
        &self.encoder.catalog
    }

    /// Ends when the sink stops.
    pub(crate) fn stopped(&self) -> impl Future<Output = ()> + Send + 'static {
        let mut closed = self.closed.subscribe();
        async move {
            // An error would mean that the hub is gone, which is the same.
            let _ = closed.wait_for(|closed| *closed).await;
        }
    }

    /// A place for one more client. An error is why there is none.
    pub(crate) fn reserve(self: &Arc<Self>) -> Result<Place, &'static str> {
        if *self.closed.borrow() {
            return Err("the server stops");
        }
        if self.clients.fetch_add(1, Relaxed) >= self.max_clients {
            self.clients.fetch_sub(1, Relaxed);
            return Err("too many clients; try again later");
        }
        Ok(Place { hub: Arc::clone(self) })
    }

    /// Hands the rows of one batch to all that want them.
    fn write(&self, metric: usize, batch: &Batch, number: u64) {
        let mut state = lock(&self.state);
        let State { seq, topics, picked, .. } = &mut *state;
        let Some(topics) = topics.get_mut(metric) else { return };
        if topics.is_empty() || batch.is_empty() {
            // Nobody has seen a number, so any step will do; rows are not even encoded.
            *seq += 1;
            topics.newest_seq = *seq;
            return;
        }
        let json = batch.json();
        let keys = topics.needs_keys().then(|| KeyColumns::new(batch, &self.catalog().metrics[metric].keys));
        let timestamp = now_text();
        for rows in cut(json.iter().map(str::len)) {
            let first_row = rows.start;
            let first_seq = *seq + 1;
            *seq += if self.encoder.envelope == Envelope::Metric { 1 } else { rows.len() as u64 };
            topics.newest_seq = *seq;
            let too_long = rows.len() == 1 && json.row(first_row).len() > ROW_BYTES_MAX;
            topics.pick(rows, keys.as_ref(), picked);
            let seqs = (first_seq, *seq);
            let mut writer = EmissionWriter {
                hub: self,
                metric,
                number,
                timestamp: &timestamp,
                json,
                first_row,
                seqs,
                rows: Vec::new(),
            };
            for (topic, rows) in topics.picked(picked) {
                let members = topic.members.values().filter(|member| number > member.after);
                if too_long {
                    members.for_each(|member| member.client.lose(Lost { metric, frames: 1, seq: seqs.1 }));
                    continue;
                }
                let emission = Arc::new(writer.write(rows));
                members.for_each(|member| member.client.update(&emission));
            }
        }
    }

    /// Puts a client in the topic of a metric and, if it is to have one, the snapshot in its queue. Under the
    /// lock, so that every batch is either in the snapshot or comes after it.
    fn enter(&self, state: &mut State, client: &Arc<Client>, entry: Entry<'_>) {
        let Entry { metric, filter, snapshot, completes } = entry;
        let after = if snapshot {
            let snapshot = self.take_snapshot(state.seq, metric, filter, completes);
            let after = snapshot.batch;
            client.snapshot(snapshot);
            after
        } else {
            0
        };
        if let Some(filter) = filter {
            state.topics[metric].join(filter, client, after);
        }
    }

    fn take_snapshot(&self, seq: u64, metric: usize, filter: Option<&Filter>, completes: bool) -> Snapshot {
        let keep = |key: &pipeline::live::KeyText| {
            filter.is_some_and(|filter| filter.matches(|column| key.get(column).map_or("", |text| text)))
        };
        let latest = self.live.latest_where(&self.catalog().metrics[metric].name, keep).unwrap_or_default();
        let rows: Vec<Arc<str>> = latest.rows.into_iter().filter(|row| row.len() <= ROW_BYTES_MAX).collect();
        let parts = match rows.is_empty() {
            true => vec![Range::default()],
            false => cut(rows.iter().map(|row| row.len())).collect(),
        };
        Snapshot { metric, seq, batch: latest.number, rows, parts, completes }
    }
}

/// How a client enters a topic.
#[derive(Clone, Copy)]
struct Entry<'a> {
    metric: usize,
    /// `None`: it wants the metric no longer.
    filter: Option<&'a Filter>,
    snapshot: bool,
    completes: bool,
}

/// Writes the frames of one piece of a batch, a row that needs its own frame only once.
struct EmissionWriter<'a> {
    hub: &'a Hub,
    metric: usize,
    number: u64,
    timestamp: &'a str,
    json: &'a JsonRows,
    first_row: usize,
    /// Sequence numbers of the piece's first and last frame.
    seqs: (u64, u64),
    rows: Vec<Option<Utf8Bytes>>,
}

impl EmissionWriter<'_> {
    fn write(&mut self, rows: &[usize]) -> Emission {
        let encoder = &self.hub.encoder;
        let (frames, seq) = if encoder.envelope == Envelope::Metric {
            let bytes = rows.iter().map(|&row| self.json.row(row).len() + 1).sum();
            let rows = rows.iter().map(|&row| self.json.row(row));
            let frame = encoder.update(self.metric, self.seqs.1, self.number, self.timestamp, bytes, rows);
            (vec![frame], self.seqs.1)
        } else {
            let last = rows.last().map_or(0, |row| row - self.first_row);
            (rows.iter().map(|&row| self.row(row)).collect(), self.seqs.0 + last as u64)
        };
        let bytes = frames.iter().map(|frame| frame.len()).sum();
        Emission { metric: self.metric, seq, frames, bytes }
    }

    fn row(&mut self, row: usize) -> Utf8Bytes {
        let place = row - self.first_row;
        if self.rows.len() <= place {
            self.rows.resize(place + 1, None);
        }
        let seq = self.seqs.0 + place as u64;
        let (encoder, json) = (&self.hub.encoder, self.json);
        self.rows[place].get_or_insert_with(|| encoder.row(json.row(row), Some(seq))).clone()
    }
}

/// Cuts rows of these lengths where a frame becomes long.
fn cut(lengths: impl Iterator<Item = usize>) -> impl Iterator<Item = Range<usize>> {
    let mut lengths = lengths.enumerate().peekable();
    std::iter::from_fn(move || {
        let (start, mut bytes) = lengths.next()?;
        let mut end = start + 1;
        while let Some((row, length)) = lengths.next_if(|(_, length)| bytes + length <= FRAME_BYTES) {
            bytes += length;
            end = row + 1;
        }
        Some(start..end)
    })
}

/// A reserved place for a client; free again when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    hub: Arc<Hub>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.hub.clients.fetch_sub(1, Relaxed);
    }
}

impl Place {
    /// The hub.
    pub(crate) fn hub(&self) -> &Arc<Hub> {
        &self.hub
    }

    /// Registers the connection. Everything ends with the membership.
    pub(crate) fn join(self, caller: &Caller, subscription: Subscription, since: Option<&Since>) -> Membership {
        let hub = &self.hub;
        let connection = hub.live.status.connections.open(&hub.name, Some(caller.address), &caller.agent);
        let client = Arc::new(Client::new(connection, hub.queue));
        let demand = hub.demand(&subscription);
        let mut state = lock(&hub.state);
        if let Some(hello) = hub.encoder.hello(&subscription, state.seq) {
            client.answer(hello);
        }
        let since = since.filter(|since| since.epoch == hub.live.epoch).map(|since| since.seq);
        let has_all = |topics: &Topics| since.is_some_and(|seq| seq >= topics.newest_seq);
        let wants_snapshot: Vec<usize> = match hub.snapshot {
            true => subscription.keys().copied().filter(|&metric| !has_all(&state.topics[metric])).collect(),
            false => Vec::new(),
        };
        for (&metric, filter) in &subscription {
            let snapshot = wants_snapshot.contains(&metric);
            let completes = wants_snapshot.last() == Some(&metric);
            hub.enter(&mut state, &client, Entry { metric, filter: Some(filter), snapshot, completes });
        }
        drop(state);
        Membership { client, subscription, demand, place: self }
    }
}

impl Hub {
    fn demand(&self, subscription: &Subscription) -> DemandGuard {
        let names = subscription.keys().map(|&metric| self.catalog().metrics[metric].name.clone());
        self.live.subscribe(names)
    }
}

/// Who connects.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    address: std::net::SocketAddr,
    agent: String,
}

impl Caller {
    /// Who sent this request.
    pub(crate) fn of(request: &Request) -> Self {
        let agent = request.inner.headers().get(USER_AGENT).and_then(|agent| agent.to_str().ok());
        Self { address: request.peer, agent: agent.unwrap_or_default().to_owned() }
    }
}

/// A client's place in the hub. Dropping it ends its subscriptions, its demand and its connection.
#[derive(Debug)]
pub(crate) struct Membership {
    client: Arc<Client>,
    subscription: Subscription,
    demand: DemandGuard,
    place: Place,
}

impl Membership {
    /// The client's queue and counters.
    pub(crate) fn client(&self) -> &Arc<Client> {
        &self.client
    }

    /// The hub.
    pub(crate) fn hub(&self) -> &Arc<Hub> {
        &self.place.hub
    }

    /// The taking end of the queue.
    pub(crate) fn outgoing(&self) -> Outgoing {
        Outgoing::new(Arc::clone(&self.client), Arc::clone(&self.place.hub.encoder))
    }

    /// Asks for more rows of a metric; the answer is a snapshot of what the client then has of it.
    pub(crate) fn subscribe(&mut self, change: &Change) -> Result<(), Refusal> {
        let (metric, subscription) = self.hub().catalog().subscribe(&self.subscription, change)?;
        self.change(metric, subscription);
        Ok(())
    }

    /// Asks for fewer rows of a metric; the answer is a snapshot of what is left of it.
    pub(crate) fn unsubscribe(&mut self, change: &Change) -> Result<(), Refusal> {
        let (metric, subscription) = self.hub().catalog().unsubscribe(&self.subscription, change)?;
        self.change(metric, subscription);
        Ok(())
    }

    fn change(&mut self, metric: usize, subscription: Subscription) {
        // The new demand begins before the old one ends, so that no source falls asleep in between.
        self.demand = self.place.hub.demand(&subscription);
        let hub = &self.place.hub;
        let mut state = lock(&hub.state);
        if let Some(filter) = self.subscription.get(&metric) {
            state.topics[metric].leave(filter, &self.client);
        }
        let filter = subscription.get(&metric);
        hub.enter(&mut state, &self.client, Entry { metric, filter, snapshot: hub.snapshot, completes: false });
        drop(state);
        self.subscription = subscription;
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let mut state = lock(&self.place.hub.state);
        for (&metric, filter) in &self.subscription {
            state.topics[metric].leave(filter, &self.client);
        }
    }
}

/// The end of a hub that the pipeline writes to. Dropping it ends all connections.
pub(crate) struct HubSink(pub(crate) Arc<Hub>);

impl LiveSink for HubSink {
    fn write(&mut self, input: usize, batch: &Batch, number: u64) {
        self.0.write(input, batch, number);
    }
}

impl Drop for HubSink {
    fn drop(&mut self) {
        self.0.closed.send_replace(true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_cut_where_they_become_long() {
        let all = FRAME_BYTES;
        for (lengths, expected) in [
            (vec![], vec![]),
            (vec![10, 20, 30], vec![(0, 3)]),
            (vec![all, 1, all, all / 2, all / 2, 1], vec![(0, 1), (1, 2), (2, 3), (3, 5), (5, 6)]),
            (vec![3 * all, 1], vec![(0, 1), (1, 2)]),
        ] {
            let pieces: Vec<_> = cut(lengths.iter().copied()).map(|rows| (rows.start, rows.end)).collect();
            assert_eq!(pieces, expected, "{lengths:?}");
        }
    }
}
