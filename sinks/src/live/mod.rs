//! What the live sinks share: the hub that fans rows out to clients, and everything that has no protocol.
//!
//! A sink has one hub. The pipeline hands it batches; each connection takes what waits for its client. Between
//! them stand a bounded queue per client and a lock that is never held over I/O: the pipeline never waits for a
//! client, and no client for another.

pub(crate) mod envelope;
pub(crate) mod queue;
pub(crate) mod subscription;
mod topics;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use hyper::header::USER_AGENT;
use indexmap::IndexMap;
use pipeline::batch::Batch;
use pipeline::config::{At, CheckContext, Duration, did_you_mean};
use pipeline::http::Request;
use pipeline::json::JsonRows;
use pipeline::live::{DemandGuard, KeyColumns, Live};
use pipeline::plugin::{LiveSink, Mount, SinkContext, SinkInput, SinkShape};
use pipeline::status::lock;
use tokio::sync::watch;

pub use self::envelope::Envelope;
use self::envelope::{Encoder, Wire, now_text};
use self::queue::{Client, Emission, Lost, Outgoing, Snapshot};
use self::subscription::{Catalog, Change, METRIC, Metric, Refusal, SINCE, Since, Subscription};
use self::topics::{Picked, Topics};

/// Bytes of rows at which a frame is cut: what a client's buffers grow to is kept for as long as it stays.
const FRAME_BYTES: usize = 64 << 10;

/// Longest row that is sent. A client that has to hold more in one message is no longer live.
pub(crate) const ROW_BYTES_MAX: usize = 16 << 20;

/// Most frames that may be let wait for a client, by `queue`.
const QUEUE_MAX: usize = 100_000;

/// Shortest keep-alive: more often is a load and proves nothing.
const KEEP_ALIVE_MIN: std::time::Duration = std::time::Duration::from_millis(100);

/// How long a connection may take to send what waits for its client and say good-bye when it is closed.
pub(crate) const CLOSE_PATIENCE: std::time::Duration = std::time::Duration::from_secs(2);

/// Default of `keep_alive`: half of the minute after which the usual proxies cut a silent connection.
pub(crate) fn default_keep_alive() -> At<Duration> {
    At::nowhere(Duration::from_secs(30))
}

/// Default of `queue`: a second of a hundred emissions a second, and little memory.
pub(crate) fn default_queue() -> At<usize> {
    At::nowhere(100)
}

/// Default of `max_clients`: some 20 kB each, so 200 MB.
pub(crate) fn default_max_clients() -> usize {
    10_000
}

/// The options that both live sinks have, for [`check`].
pub(crate) struct Declared<'a> {
    pub(crate) path: &'a At<String>,
    pub(crate) params: &'a IndexMap<String, At<String>>,
    pub(crate) required: &'a [At<String>],
    pub(crate) keep_alive: &'a At<Duration>,
    pub(crate) queue: &'a At<usize>,
}

/// Checks the options that both live sinks have.
pub(crate) fn check(declared: &Declared<'_>, inputs: &[SinkInput], cx: &mut CheckContext<'_>) -> Option<SinkShape> {
    let errors = cx.errors();
    let path = declared.path;
    if !path.starts_with('/') || path.contains(['?', '#']) || path.contains(char::is_whitespace) {
        let hint = "write it as in a URL: `/ws`".to_owned();
        cx.error_hint(path.position, format!("`{}` is no path", path.value), Some(hint));
    }
    check_names(declared, inputs, cx);
    if *declared.keep_alive.value < KEEP_ALIVE_MIN {
        let shortest = Duration(KEEP_ALIVE_MIN);
        cx.error(declared.keep_alive.position, format!("`keep_alive` is at least {shortest}"));
    }
    if !(1..=QUEUE_MAX).contains(&declared.queue.value) {
        cx.error(declared.queue.position, format!("`queue` is 1 to {QUEUE_MAX} frames"));
    }
    let mounts = vec![Mount { method: "GET", path: path.value.clone() }];
    (cx.errors() == errors).then_some(SinkShape { mounts, live: true, takes_revised: true, ..SinkShape::default() })
}

/// Checks parameters against key columns.
fn check_names(declared: &Declared<'_>, inputs: &[SinkInput], cx: &mut CheckContext<'_>) {
    let keys: Vec<&str> = inputs.iter().flat_map(|input| &input.shape.keys).map(String::as_str).collect();
    for input in inputs {
        for key in input.shape.keys.iter().filter(|key| [METRIC, SINCE].contains(&key.as_str())) {
            let message = format!("key column `{key}` of `{}` is named like a parameter of live clients", input.metric);
            cx.error_hint(cx.position(), message, Some(format!("rename it: `select: {{{key}_: {key}}}`")));
        }
    }
    for (name, column) in declared.params {
        if [METRIC, SINCE].contains(&name.as_str()) {
            cx.error(column.position, format!("parameter `{name}` is taken: it has a meaning of its own"));
        } else if keys.contains(&name.as_str()) && *name != column.value {
            cx.error(column.position, format!("parameter `{name}` is also the name of another key column"));
        }
        if !keys.contains(&column.as_str()) {
            let hint = did_you_mean(column, &keys)
                .or_else(|| Some("a window's `group_by` or a pipeline's `key` gives key columns".to_owned()));
            cx.error_hint(
                column.position,
                format!("no key column `{}` in what this sink receives", column.value),
                hint,
            );
        }
    }
    for name in declared.required {
        if !declared.params.contains_key(&name.value) && !keys.contains(&name.as_str()) {
            let known = declared.params.keys().map(String::as_str).chain(keys.iter().copied());
            let message = format!("`{}` is neither one of `params` nor a key column", name.value);
            cx.error_hint(name.position, message, did_you_mean(name, known));
        }
    }
}

/// How a hub treats its clients.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// What stands around the rows.
    pub(crate) envelope: Envelope,
    /// How frames stand on the wire.
    pub(crate) wire: Wire,
    /// Whether a client first gets the latest rows.
    pub(crate) snapshot: bool,
    /// Parameter to key column.
    pub(crate) params: IndexMap<String, String>,
    /// Parameters without which a client is refused.
    pub(crate) required: Vec<String>,
    /// Time between signs of life.
    pub(crate) keep_alive: std::time::Duration,
    /// Most emissions that wait for one client.
    pub(crate) queue: usize,
    /// Most clients.
    pub(crate) max_clients: usize,
}

/// Fans the rows of one live sink out to its clients.
#[derive(Debug)]
pub(crate) struct Hub {
    name: String,
    /// Time between signs of life.
    pub(crate) keep_alive: std::time::Duration,
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

#[derive(Debug, Default)]
struct State {
    /// Sequence number of the newest frame.
    seq: u64,
    /// By the metric's place in the catalog.
    topics: Vec<Topics>,
    picked: Picked,
    closed: bool,
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
            keep_alive: options.keep_alive,
            encoder: Arc::new(Encoder { envelope: options.envelope, wire: options.wire, epoch, catalog }),
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

    /// Changes to true when the sink stops.
    pub(crate) fn closed(&self) -> watch::Receiver<bool> {
        self.closed.subscribe()
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

    fn take_snapshot(
        &self,
        seq: u64,
        metric: usize,
        filter: Option<&subscription::Filter>,
        completes: bool,
    ) -> Snapshot {
        let keep = |key: &pipeline::live::KeyText| {
            filter.is_some_and(|filter| filter.matches(|column| key.get(column).map_or("", |text| text)))
        };
        let latest = self.live.latest_where(&self.catalog().metrics[metric].name, keep).unwrap_or_default();
        let rows: Vec<Arc<str>> =
            latest.rows.into_iter().map(|(_, row)| row).filter(|row| row.len() <= ROW_BYTES_MAX).collect();
        let parts = match rows.is_empty() {
            true => vec![Range::default()],
            false => cut(rows.iter().map(|row| row.len())).collect(),
        };
        Snapshot { metric, seq, batch: latest.number, rows, parts, completes }
    }

    /// Ends all connections once they have sent what waits.
    fn close(&self) {
        let mut state = lock(&self.state);
        state.closed = true;
        state.topics.iter().flat_map(Topics::members).for_each(|member| member.client.close());
        self.closed.send_replace(true);
    }
}

/// How a client enters a topic.
struct Entry<'a> {
    metric: usize,
    /// `None`: it wants the metric no longer.
    filter: Option<&'a subscription::Filter>,
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
    rows: Vec<Option<tokio_tungstenite::tungstenite::Utf8Bytes>>,
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

    fn row(&mut self, row: usize) -> tokio_tungstenite::tungstenite::Utf8Bytes {
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
        if state.closed {
            client.close();
        }
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
        self.0.close();
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
            (vec![10, 20, 30], vec![0..3]),
            (vec![all, 1, all, all / 2, all / 2, 1], vec![0..1, 1..2, 2..3, 3..5, 5..6]),
            (vec![3 * all, 1], vec![0..1, 1..2]),
        ] {
            assert_eq!(cut(lengths.iter().copied()).collect::<Vec<_>>(), expected, "{lengths:?}");
        }
    }
}
