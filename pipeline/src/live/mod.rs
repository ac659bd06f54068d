//! What live sinks and the HTTP surface share: the epoch, the latest rows of every metric, and demand.

use std::collections::HashMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use tokio::sync::watch;

use crate::batch::Batch;
use crate::error::Result;
use crate::json::{ColumnText, encode_rows};
use crate::state::StateReader;
use crate::status::{Status, lock};
use crate::time::now_us;

mod latest;

pub(crate) use latest::Frozen;
pub use latest::LATEST_KEYS_MAX;
use latest::LatestRows;

/// How long a `GET` of a metric counts as demand.
const GET_DEMAND_US: i64 = 60_000_000;

/// Shared by all live sinks and the HTTP surface of one running graph.
#[derive(Debug)]
pub struct Live {
    /// New at every start.
    pub epoch: String,
    /// Counters and connections.
    pub status: Arc<Status>,
    metrics: HashMap<String, Metric>,
    demand_changed: watch::Sender<u64>,
}

#[derive(Debug)]
struct Metric {
    keys: Vec<String>,
    latest: Mutex<LatestRows>,
    subscribers: AtomicU64,
    wanted_until_us: AtomicI64,
}

/// The text of a row's key columns, in the order of the metric's keys: text as it is, numbers and times as
/// in JSON without quotes, null as the empty text.
pub type KeyText = Box<[Box<str>]>;

/// The latest row per key of a metric.
#[derive(Clone, Debug, Default)]
pub struct Latest {
    /// Each row as a JSON object.
    pub rows: Vec<Arc<str>>,
    /// Number of the newest output batch; 0 if there is none.
    pub number: u64,
    /// When it came, microseconds since 1970 UTC.
    pub updated_us: i64,
}

impl Live {
    /// For the metrics of a graph: each name with its key columns.
    pub fn new(epoch: String, status: Arc<Status>, metrics: impl IntoIterator<Item = (String, Vec<String>)>) -> Self {
        let metric = |keys| Metric {
            keys,
            latest: Mutex::default(),
            subscribers: AtomicU64::new(0),
            wanted_until_us: AtomicI64::new(i64::MIN),
        };
        let metrics = metrics.into_iter().map(|(name, keys)| (name, metric(keys))).collect();
        Self { epoch, status, metrics, demand_changed: watch::Sender::new(0) }
    }

    /// Keeps the latest row per key. Called by the engine for every output batch, before the live sinks.
    pub fn update(&self, metric: &str, batch: &Batch, number: u64) {
        let Some(metric) = self.metrics.get(metric) else { return };
        // Without keys only the last row counts: encode that one alone.
        let (json, keys) = match metric.keys.is_empty() {
            true => {
                let last = batch.rows().slice(batch.len().saturating_sub(1), batch.len().min(1));
                (&encode_rows(&last), None)
            }
            false => (batch.json(), Some(KeyColumns::new(batch, &metric.keys))),
        };
        let key = |row| keys.as_ref().map_or_else(KeyText::default, |keys| keys.text(row));
        let mut latest = lock(&metric.latest);
        latest.extend(json.iter().enumerate().map(|(row, text)| (key(row), Arc::from(text))));
        latest.number = number;
        latest.updated_us = now_us();
    }

    /// The latest rows of a metric as they are now, for a checkpoint.
    pub(crate) fn freeze(&self, metric: &str) -> Option<Frozen> {
        let metric = self.metrics.get(metric)?;
        Some(lock(&metric.latest).freeze(&metric.keys))
    }

    /// Takes over the latest rows that a checkpoint has, unless the metric has other key columns now.
    pub(crate) fn restore(&self, metric: &str, state: &mut StateReader<'_>) -> Result<()> {
        let Some(metric) = self.metrics.get(metric) else { return Ok(()) };
        if let Some(latest) = LatestRows::restore(&metric.keys, state)? {
            *lock(&metric.latest) = latest;
        }
        Ok(())
    }

    /// The latest rows of a metric; `None` if there is no such metric.
    pub fn latest(&self, metric: &str) -> Option<Latest> {
        self.latest_where(metric, |_| true)
    }

    /// The latest rows of a metric whose key `keep` accepts; `None` if there is no such metric.
    pub fn latest_where(&self, metric: &str, keep: impl Fn(&KeyText) -> bool) -> Option<Latest> {
        let latest = lock(&self.metrics.get(metric)?.latest);
        // The pipeline waits meanwhile: rows are shared, not copied, and their keys stay where they are.
        let rows = latest.iter().filter(|(key, _)| keep(key)).map(|(_, row)| Arc::clone(row)).collect();
        Some(Latest { rows, number: latest.number, updated_us: latest.updated_us })
    }

    /// Key columns of a metric.
    pub fn keys(&self, metric: &str) -> Option<&[String]> {
        self.metrics.get(metric).map(|m| m.keys.as_slice())
    }

    /// Names of all metrics.
    pub fn metrics(&self) -> impl Iterator<Item = &str> {
        self.metrics.keys().map(String::as_str)
    }

    /// A subscriber wants these metrics until the guard is dropped.
    pub fn subscribe(self: &Arc<Self>, metrics: impl IntoIterator<Item = String>) -> DemandGuard {
        let metrics: Vec<String> = metrics.into_iter().collect();
        for metric in metrics.iter().filter_map(|name| self.metrics.get(name)) {
            metric.subscribers.fetch_add(1, Relaxed);
        }
        self.demand_changed.send_modify(|version| *version += 1);
        DemandGuard { live: Arc::clone(self), metrics }
    }

    /// A `GET` wants this metric for the next minute.
    pub fn want_for_a_minute(&self, metric: &str) {
        if let Some(metric) = self.metrics.get(metric) {
            metric.wanted_until_us.store(now_us() + GET_DEMAND_US, Relaxed);
            self.demand_changed.send_modify(|version| *version += 1);
        }
    }

    /// Whether somebody wants the metric now.
    pub fn is_wanted(&self, metric: &str) -> bool {
        self.metrics
            .get(metric)
            .is_some_and(|m| m.subscribers.load(Relaxed) > 0 || m.wanted_until_us.load(Relaxed) > now_us())
    }

    /// Number of subscribers of a metric.
    pub fn subscribers(&self, metric: &str) -> u64 {
        self.metrics.get(metric).map_or(0, |m| m.subscribers.load(Relaxed))
    }

    /// Number of keys of a metric whose latest row is kept; 0 for a metric without key columns.
    pub fn keys_seen(&self, metric: &str) -> usize {
        let keyed = self.metrics.get(metric).filter(|m| !m.keys.is_empty());
        keyed.map_or(0, |m| lock(&m.latest).len())
    }

    /// Changes whenever demand may have changed.
    pub fn demand(&self) -> watch::Receiver<u64> {
        self.demand_changed.subscribe()
    }
}

/// Demand that ends when this is dropped.
#[derive(Debug)]
pub struct DemandGuard {
    live: Arc<Live>,
    metrics: Vec<String>,
}

impl Drop for DemandGuard {
    fn drop(&mut self) {
        for metric in self.metrics.iter().filter_map(|name| self.live.metrics.get(name)) {
            metric.subscribers.fetch_sub(1, Relaxed);
        }
        self.live.demand_changed.send_modify(|version| *version += 1);
    }
}

/// Reads the key columns of a batch as text.
pub struct KeyColumns {
    /// `None` is a column that is not there.
    columns: Vec<Option<ColumnText>>,
}

impl KeyColumns {
    /// The columns `keys` of `batch`; one that is not there counts as null.
    pub fn new(batch: &Batch, keys: &[String]) -> Self {
        let rows = batch.rows();
        let column = |name: &String| {
            let index = rows.schema_ref().index_of(name).ok()?;
            Some(ColumnText::new(rows.schema_ref().field(index), rows.column(index)))
        };
        Self { columns: keys.iter().map(column).collect() }
    }

    /// The key of one row.
    pub fn text(&self, row: usize) -> KeyText {
        (0..self.columns.len()).map(|index| Box::from(self.value(index, row))).collect()
    }

    /// The text of key column `index` in one row.
    pub fn value(&self, index: usize, row: usize) -> &str {
        self.columns[index].as_ref().and_then(|column| column.get(row)).unwrap_or_default()
    }
}
