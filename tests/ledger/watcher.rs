//! A live client that follows metrics through kills and cuts, and comes back each time where it left off.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::Value;

use crate::support::program::Sse;
use crate::support::random::Random;

/// Where the client listens.
pub(super) const PATH: &str = "/events";

/// The sink behind it: one that is silent for long cannot be told from one that is gone.
pub(super) const SINK: &str = "type: sse\npath: /events\nqueue: 100000\nkeep_alive: 200ms";

/// Most frames that the client reads before it hangs up by itself.
const FRAMES_MAX: u64 = 2_000;

/// Pause before another attempt to connect.
const PAUSE: Duration = Duration::from_millis(2);

/// The latest row of every key of one metric.
pub(super) type Rows = BTreeMap<String, Value>;

/// What a client knows.
#[derive(Debug, Default)]
pub(super) struct View {
    /// By metric.
    pub(super) metrics: BTreeMap<String, Rows>,
    /// The last `batch` of each metric, in this epoch.
    batches: BTreeMap<String, u64>,
    epoch: String,
    seq: u64,
    /// The last id: from here the client goes on. Of several snapshots only the last one has one.
    since: String,
    /// What should not have been.
    pub(super) wrong: Vec<String>,
}

/// How often what happened.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) connections: AtomicU64,
    pub(super) epochs: AtomicU64,
    /// Connections to the same start of the program as the one before.
    pub(super) resumed: AtomicU64,
    pub(super) frames: AtomicU64,
}

/// A client in a thread of its own.
pub(super) struct Watcher {
    view: Arc<Mutex<View>>,
    pub(super) counts: Arc<Counts>,
    stops: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Follows all metrics of the sink from now on.
    pub(super) fn start(port: u16, random: Random) -> Self {
        let (view, counts, stops) = (Arc::default(), Arc::default(), Arc::default());
        let thread = {
            let (view, counts, stops) = (Arc::clone(&view), Arc::clone(&counts), Arc::clone(&stops));
            std::thread::spawn(move || follow(port, &view, &counts, &stops, random))
        };
        Self { view, counts, stops, thread: Some(thread) }
    }

    /// What the client knows now.
    pub(super) fn view(&self) -> MutexGuard<'_, View> {
        self.view.lock().expect("the view")
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stops.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn follow(port: u16, view: &Mutex<View>, counts: &Counts, stops: &AtomicBool, mut random: Random) {
    while !stops.load(Relaxed) {
        let since = {
            let view = view.lock().expect("the view");
            if view.since.is_empty() { String::new() } else { format!("?since={}", view.since) }
        };
        let Some(mut stream) = Sse::try_open(port, &format!("{PATH}{since}")).filter(|stream| stream.status == 200)
        else {
            std::thread::sleep(PAUSE);
            continue;
        };
        counts.connections.fetch_add(1, Relaxed);
        for _ in 0..random.between(1, FRAMES_MAX) {
            let Some((kind, id, data)) = stream.try_next() else { break };
            if stops.load(Relaxed) {
                return;
            }
            counts.frames.fetch_add(1, Relaxed);
            let frame: Value = serde_json::from_str(&data).expect("JSON");
            let mut view = view.lock().expect("the view");
            let before = view.epoch.clone();
            view.take(&kind, &id, &frame);
            if kind == "hello" {
                let count = if view.epoch == before { &counts.resumed } else { &counts.epochs };
                count.fetch_add(1, Relaxed);
            }
        }
    }
}

impl View {
    /// Takes a frame in as any client would.
    fn take(&mut self, kind: &str, id: &str, frame: &Value) {
        let metric = frame["metric"].as_str().unwrap_or_default().to_owned();
        let batch = frame["batch"].as_u64().unwrap_or_default();
        match kind {
            "hello" => {
                let epoch = frame["epoch"].as_str().expect("an epoch");
                if epoch != self.epoch {
                    // Another start: what was known may be taken back, and comes anew.
                    self.batches.clear();
                    (self.epoch, self.seq) = (epoch.to_owned(), 0);
                }
                return;
            }
            "snapshot" => {
                self.batches.insert(metric.clone(), batch);
                self.metrics.insert(metric, keyed(&frame["data"]));
            }
            "update" => {
                let seq = frame["seq"].as_u64().expect("a number");
                if seq <= self.seq {
                    self.wrong.push(format!("{metric}: frame {seq} after {}: shown twice", self.seq));
                }
                // The frames of a long batch have one number.
                match self.batches.insert(metric.clone(), batch) {
                    None => self.wrong.push(format!("{metric}: an update before the snapshot of epoch {}", self.epoch)),
                    Some(before) if batch == before || batch == before + 1 => {}
                    Some(before) => self.wrong.push(format!("{metric}: batch {batch} after {before}")),
                }
                self.metrics.entry(metric).or_default().extend(keyed(&frame["data"]));
            }
            "ping" => return,
            _ => self.wrong.push(format!("{kind}: {frame}")),
        }
        self.seq = frame["seq"].as_u64().expect("a number");
        if !id.is_empty() {
            id.clone_into(&mut self.since);
        } else if kind != "snapshot" {
            self.wrong.push(format!("{kind} {} without an id", self.seq));
        }
    }
}

/// The latest of these rows, by key.
pub(super) fn keyed(rows: &Value) -> Rows {
    let rows = rows.as_array().into_iter().flatten();
    rows.map(|row| (format!("{} {}", row["s"], row["k"]), row.clone())).collect()
}
