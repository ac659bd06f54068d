//! Counters and states of all nodes of this process, for `/health`, `/metrics`, the API and the `self` source.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};

use serde::Serialize;

use crate::time::now_us;

/// Closed connections that are remembered.
const CONNECTIONS_KEPT: usize = 1000;

/// Locks, also after a panic elsewhere: counters and caches stay usable.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeKind {
    /// A source.
    Source,
    /// A pipeline with its steps.
    Pipeline,
    /// A sink.
    Sink,
}

impl NodeKind {
    /// The word in labels and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Pipeline => "pipeline",
            Self::Sink => "sink",
        }
    }
}

/// How a node is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeState {
    /// Not connected yet, for the first time.
    Starting,
    /// Connected and working.
    Healthy,
    /// Not connected; the engine tries again. The reason.
    Retrying(String),
    /// Stopped for good. The reason.
    Failed(String),
    /// A bounded source that has reached its end.
    Ended,
}

impl NodeState {
    /// The word in the API.
    pub fn as_str(&self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Healthy => "healthy",
            Self::Retrying(_) => "retrying",
            Self::Failed(_) => "failed",
            Self::Ended => "ended",
        }
    }

    /// Why it is not healthy.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Starting => Some("not connected yet"),
            Self::Retrying(reason) | Self::Failed(reason) => Some(reason),
            Self::Healthy | Self::Ended => None,
        }
    }
}

/// One node's counters, all from the start of the process.
#[derive(Debug)]
pub struct NodeStatus {
    /// What it is.
    pub kind: NodeKind,
    /// Its name in the YAML.
    pub name: String,
    /// The `type:` of a source or sink; `pipeline` else.
    pub type_name: String,
    /// Rows taken in.
    pub rows_in: AtomicU64,
    /// Rows given out.
    pub rows_out: AtomicU64,
    /// Batches given out.
    pub batches_out: AtomicU64,
    /// Errors: wrong rows, failed connections, failed deliveries.
    pub errors: AtomicU64,
    /// Rows of which a window said that they came too late.
    pub late_rows: AtomicU64,
    /// Rows dropped by a named policy (slow live clients; non-final rows before stateful steps).
    pub dropped_rows: AtomicU64,
    /// Polls of a polled source, calls of `next` that returned.
    pub polls: AtomicU64,
    /// Batches or records waiting to be taken in.
    pub queue: AtomicU64,
    /// Newest event time given out, microseconds since 1970 UTC; `i64::MIN` if none.
    pub event_us: AtomicI64,
    /// Of a sink with published files: what became of them.
    pub files: OnceLock<FilesStatus>,
    state: Mutex<NodeState>,
}

/// The published files of a sink, and what was done to them since the start of the process.
#[derive(Debug, Default)]
pub struct FilesStatus {
    /// Files that there are.
    pub files: AtomicU64,
    /// Files that were merged into fewer.
    pub merged_files: AtomicU64,
    /// Hours whose files were merged.
    pub merged_hours: AtomicU64,
    /// Hours that were removed because they had become too old.
    pub expired_hours: AtomicU64,
    /// Failed tries to merge or remove.
    pub failures: AtomicU64,
    failure: Mutex<Option<String>>,
}

impl FilesStatus {
    /// Notes why files cannot be merged or removed, or that they can. Returns what was known before.
    pub fn set_failure(&self, failure: Option<String>) -> Option<String> {
        std::mem::replace(&mut lock(&self.failure), failure)
    }

    /// Why files cannot be merged or removed, time and again.
    pub fn failure(&self) -> Option<String> {
        lock(&self.failure).clone()
    }
}

impl NodeStatus {
    fn new(kind: NodeKind, name: &str, type_name: &str) -> Self {
        Self {
            kind,
            name: name.to_owned(),
            type_name: type_name.to_owned(),
            rows_in: AtomicU64::new(0),
            rows_out: AtomicU64::new(0),
            batches_out: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            late_rows: AtomicU64::new(0),
            dropped_rows: AtomicU64::new(0),
            polls: AtomicU64::new(0),
            queue: AtomicU64::new(0),
            event_us: AtomicI64::new(i64::MIN),
            files: OnceLock::new(),
            state: Mutex::new(NodeState::Starting),
        }
    }

    /// How it is now.
    pub fn state(&self) -> NodeState {
        lock(&self.state).clone()
    }

    /// Sets how it is.
    pub fn set_state(&self, state: NodeState) {
        *lock(&self.state) = state;
    }
}

/// Something that is not healthy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// The node, such as `source devices`; `sink history files` for what a sink has published; `checkpoint` for the
    /// checkpoints.
    pub node: String,
    /// The word for its state.
    pub state: &'static str,
    /// What is wrong.
    pub reason: String,
}

/// All nodes and connections of this process.
#[derive(Debug)]
pub struct Status {
    /// Start of the process, microseconds since 1970 UTC.
    pub started_us: i64,
    nodes: RwLock<Vec<Arc<NodeStatus>>>,
    /// Why the last checkpoint was not written.
    checkpoint_failure: Mutex<Option<String>>,
    was_healthy: AtomicBool,
    /// Live connections.
    pub connections: Connections,
}

impl Default for Status {
    fn default() -> Self {
        Self {
            started_us: now_us(),
            nodes: RwLock::default(),
            checkpoint_failure: Mutex::default(),
            was_healthy: AtomicBool::new(false),
            connections: Connections::default(),
        }
    }
}

impl Status {
    /// Adds a node.
    pub fn node(&self, kind: NodeKind, name: &str, type_name: &str) -> Arc<NodeStatus> {
        let node = Arc::new(NodeStatus::new(kind, name, type_name));
        self.nodes.write().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&node));
        node
    }

    /// Notes why the last checkpoint was not written, or that it was. Returns what was known before.
    pub fn set_checkpoint_failure(&self, failure: Option<String>) -> Option<String> {
        std::mem::replace(&mut lock(&self.checkpoint_failure), failure)
    }

    /// Why it is not healthy. Nothing if every node is connected and works and the last checkpoint was written; that it
    /// was so once is remembered.
    pub fn reasons(&self) -> Vec<Reason> {
        let of_node = |node: &Arc<NodeStatus>| {
            let state = node.state();
            let reason = state.reason()?.to_owned();
            Some(Reason { node: format!("{} {}", node.kind.as_str(), node.name), state: state.as_str(), reason })
        };
        let retrying =
            |node: String, reason| Reason { node, state: NodeState::Retrying(String::new()).as_str(), reason };
        let of_files = |node: &Arc<NodeStatus>| {
            let failure = node.files.get()?.failure()?;
            Some(retrying(format!("{} {} files", node.kind.as_str(), node.name), failure))
        };
        let nodes = self.nodes();
        let mut reasons: Vec<Reason> =
            nodes.iter().filter_map(of_node).chain(nodes.iter().filter_map(of_files)).collect();
        let checkpoint = lock(&self.checkpoint_failure).clone();
        reasons.extend(checkpoint.map(|reason| retrying("checkpoint".to_owned(), reason)));
        self.was_healthy.fetch_or(reasons.is_empty(), Relaxed);
        reasons
    }

    /// Whether [`Self::reasons`] was empty at least once. It is asked with every checkpoint, and for `/health`.
    pub fn was_healthy(&self) -> bool {
        self.was_healthy.load(Relaxed)
    }

    /// All nodes, in the order of the graph.
    pub fn nodes(&self) -> Vec<Arc<NodeStatus>> {
        self.nodes.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// One live connection.
#[derive(Debug)]
pub struct Connection {
    /// Number of this connection since the start.
    pub id: u64,
    /// The sink it is connected to.
    pub sink: String,
    /// The client's address.
    pub address: Option<SocketAddr>,
    /// The client's `User-Agent`.
    pub agent: String,
    /// When it connected, microseconds since 1970 UTC.
    pub connected_us: i64,
    /// Frames sent.
    pub sent: AtomicU64,
    /// Bytes sent.
    pub sent_bytes: AtomicU64,
    /// Messages received.
    pub received: AtomicU64,
    /// Frames lost because the client was too slow.
    pub dropped: AtomicU64,
    /// Wrong messages from the client.
    pub errors: AtomicU64,
}

/// A closed connection.
#[derive(Clone, Debug, Serialize)]
pub struct ClosedConnection {
    /// The sink it was connected to.
    pub sink: String,
    /// The client's address.
    pub address: Option<SocketAddr>,
    /// The client's `User-Agent`.
    pub agent: String,
    /// When it connected, RFC 3339.
    pub connected_at: String,
    /// When it went, RFC 3339.
    pub disconnected_at: String,
    /// How long it lasted, in seconds.
    pub duration_seconds: f64,
    /// Frames sent.
    pub sent: u64,
    /// Messages received.
    pub received: u64,
    /// Frames lost because the client was too slow.
    pub dropped: u64,
    /// Wrong messages from the client.
    pub errors: u64,
}

/// Live connections, open and lately closed.
#[derive(Debug, Default)]
pub struct Connections {
    inner: Arc<Mutex<ConnectionsInner>>,
}

#[derive(Debug, Default)]
struct ConnectionsInner {
    opened: u64,
    open: HashMap<u64, Arc<Connection>>,
    closed: VecDeque<ClosedConnection>,
    sent_closed: u64,
    received_closed: u64,
    dropped_closed: u64,
}

/// Totals over all connections since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ConnectionTotals {
    /// Open now.
    pub active_connections: u64,
    /// Opened since the start.
    pub total_connections: u64,
    /// Frames sent.
    pub messages_sent: u64,
    /// Messages received.
    pub messages_received: u64,
    /// Frames lost to slow clients.
    pub messages_dropped: u64,
}

impl Connections {
    /// Registers a connection; dropping the guard closes it.
    pub fn open(&self, sink: &str, address: Option<SocketAddr>, agent: &str) -> ConnectionGuard {
        let mut inner = lock(&self.inner);
        inner.opened += 1;
        let connection = Arc::new(Connection {
            id: inner.opened,
            sink: sink.to_owned(),
            address,
            agent: agent.chars().take(200).collect(),
            connected_us: now_us(),
            sent: AtomicU64::new(0),
            sent_bytes: AtomicU64::new(0),
            received: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            errors: AtomicU64::new(0),
        });
        inner.open.insert(connection.id, Arc::clone(&connection));
        ConnectionGuard { connection, inner: Arc::clone(&self.inner) }
    }

    /// Open connections, oldest first.
    pub fn list(&self) -> Vec<Arc<Connection>> {
        let mut list: Vec<_> = lock(&self.inner).open.values().cloned().collect();
        list.sort_by_key(|c| c.id);
        list
    }

    /// Closed connections, newest first, at most the last 1000.
    pub fn closed(&self) -> Vec<ClosedConnection> {
        lock(&self.inner).closed.iter().rev().cloned().collect()
    }

    /// Totals.
    pub fn totals(&self) -> ConnectionTotals {
        let inner = lock(&self.inner);
        let sum = |f: fn(&Connection) -> &AtomicU64| inner.open.values().map(|c| f(c).load(Relaxed)).sum::<u64>();
        ConnectionTotals {
            active_connections: inner.open.len() as u64,
            total_connections: inner.opened,
            messages_sent: inner.sent_closed + sum(|c| &c.sent),
            messages_received: inner.received_closed + sum(|c| &c.received),
            messages_dropped: inner.dropped_closed + sum(|c| &c.dropped),
        }
    }
}

/// An open connection, to count on; closes when dropped.
#[derive(Debug)]
pub struct ConnectionGuard {
    connection: Arc<Connection>,
    inner: Arc<Mutex<ConnectionsInner>>,
}

impl std::ops::Deref for ConnectionGuard {
    type Target = Connection;
    fn deref(&self) -> &Connection {
        &self.connection
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        let connection = &self.connection;
        let now = now_us();
        let mut inner = lock(&self.inner);
        inner.open.remove(&connection.id);
        inner.sent_closed += connection.sent.load(Relaxed);
        inner.received_closed += connection.received.load(Relaxed);
        inner.dropped_closed += connection.dropped.load(Relaxed);
        if inner.closed.len() == CONNECTIONS_KEPT {
            inner.closed.pop_front();
        }
        inner.closed.push_back(ClosedConnection {
            sink: connection.sink.clone(),
            address: connection.address,
            agent: connection.agent.clone(),
            connected_at: crate::time::format_us(connection.connected_us),
            disconnected_at: crate::time::format_us(now),
            duration_seconds: (now - connection.connected_us) as f64 / 1e6,
            sent: connection.sent.load(Relaxed),
            received: connection.received.load(Relaxed),
            dropped: connection.dropped.load(Relaxed),
            errors: connection.errors.load(Relaxed),
        });
    }
}
