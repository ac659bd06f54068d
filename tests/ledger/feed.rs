//! What publishers publish, and the ledger of what was acknowledged to them.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::support::random::Random;

/// Event time of row 0: 2026-01-01T00:00:00Z, in milliseconds.
const START_MS: u64 = 1_767_225_600_000;

/// Event time between two rows.
const STEP_MS: u64 = 20;

/// Length of a window: short enough that many close within a run.
pub(super) const WINDOW_S: u64 = 2;

/// The columns of every source.
pub(super) const FIELDS: &str = "{s: string, n: int, k: string, at: timestamp_ms}";

/// Time between two publications of a source. A load is paced; nothing is waited for.
const PACE: Duration = Duration::from_millis(5);

/// Most rows of one publication.
const ROWS_MAX: u64 = 5;

/// A row: all of it follows from its source and its number.
#[derive(Clone, Copy, Debug)]
pub(super) struct Row {
    /// The source's name.
    pub(super) feed: &'static str,
    /// Counted per source, from 1.
    pub(super) n: u64,
}

impl Row {
    /// What windows group by.
    pub(super) fn key(self) -> &'static str {
        ["a", "b", "c"][(self.n % 3) as usize]
    }

    /// Milliseconds since 1970, a little out of order, within the lateness that the sources declare.
    pub(super) fn at_ms(self) -> u64 {
        START_MS + (self.n ^ 3) * STEP_MS
    }

    /// Start of the window that the row belongs into, in seconds since 1970.
    pub(super) fn window_s(self) -> u64 {
        self.at_ms() / 1000 / WINDOW_S * WINDOW_S
    }

    /// As a JSON object.
    pub(super) fn json(self) -> String {
        let (feed, n, key, at) = (self.feed, self.n, self.key(), self.at_ms());
        format!("{{\"s\":\"{feed}\",\"n\":{n},\"k\":\"{key}\",\"at\":{at}}}")
    }
}

/// What the other side said to a publication.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It has the rows: from now on they may not be lost.
    Acknowledged,
    /// It did not say: it may have them, once.
    Doubtful,
}

/// The circumstances in which a source is tested.
pub(super) struct Setting<'a> {
    /// The folder of the YAML.
    pub(super) folder: &'a Path,
    /// Where the program listens.
    pub(super) port: u16,
    /// The way of the program to a server's port: straight, or through a proxy.
    pub(super) route: &'a dyn Fn(u16) -> u16,
}

/// One source, with the server behind it and the publisher in front.
pub(super) trait Feed: Send {
    /// The source's block in the YAML, without event time.
    fn yaml(&self) -> String;

    /// Publishes rows and waits for the answer.
    fn publish(&mut self, rows: &[Row]) -> Answer;

    /// Whether all rows are published before the first start, because the source reads what is there and ends.
    fn is_bounded(&self) -> bool {
        false
    }
}

/// What became of the published rows.
#[derive(Clone, Debug, Default)]
pub(super) struct Ledger {
    /// In history exactly once.
    pub(super) acknowledged: BTreeSet<u64>,
    /// In history at most once.
    pub(super) doubtful: BTreeSet<u64>,
}

/// A source with its ledger, and its publisher while that runs.
pub(super) struct Publisher {
    /// The source's name.
    pub(super) name: &'static str,
    feed: Arc<Mutex<Box<dyn Feed>>>,
    ledger: Arc<Mutex<Ledger>>,
    thread: Option<(Sender<()>, JoinHandle<()>)>,
    next: Arc<Mutex<u64>>,
}

impl Publisher {
    /// Not publishing yet, unless the source is bounded: that gets `rows_at_once` rows at once.
    pub(super) fn new(name: &'static str, mut feed: Box<dyn Feed>, rows_at_once: u64) -> Self {
        let mut ledger = Ledger::default();
        if feed.is_bounded() {
            let rows: Vec<Row> = (1..=rows_at_once).map(|n| Row { feed: name, n }).collect();
            assert_eq!(feed.publish(&rows), Answer::Acknowledged, "{name}");
            ledger.acknowledged.extend(1..=rows_at_once);
        }
        let (feed, ledger) = (Arc::new(Mutex::new(feed)), Arc::new(Mutex::new(ledger)));
        Self { name, feed, ledger, thread: None, next: Arc::new(Mutex::new(1)) }
    }

    /// The source's block in the YAML.
    pub(super) fn yaml(&self) -> String {
        self.feed.lock().expect("the feed").yaml()
    }

    /// What was published so far.
    pub(super) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().expect("the ledger")
    }

    /// Publishes from now on, a few rows at a time, until [`Self::stop`].
    pub(super) fn start(&mut self, random: Random) {
        if self.feed.lock().expect("the feed").is_bounded() {
            return;
        }
        let (name, feed, ledger) = (self.name, Arc::clone(&self.feed), Arc::clone(&self.ledger));
        let next = Arc::clone(&self.next);
        let (stop, stopped) = channel();
        let publish = move || publish(name, feed.lock().expect("the feed").as_mut(), &ledger, &next, &stopped, random);
        self.thread = Some((stop, std::thread::spawn(publish)));
    }

    /// Stops publishing, after the answer to what is on its way.
    pub(super) fn stop(&mut self) {
        if let Some((stop, thread)) = self.thread.take() {
            drop(stop);
            thread.join().unwrap_or_else(|_| panic!("the publisher of {} has failed", self.name));
        }
    }
}

fn publish(
    name: &'static str,
    feed: &mut dyn Feed,
    ledger: &Mutex<Ledger>,
    next: &Mutex<u64>,
    stopped: &Receiver<()>,
    mut random: Random,
) {
    while stopped.recv_timeout(PACE) == Err(RecvTimeoutError::Timeout) {
        let mut next = next.lock().expect("the next number");
        let first = *next;
        *next += random.between(1, ROWS_MAX);
        let rows: Vec<Row> = (first..*next).map(|n| Row { feed: name, n }).collect();
        let answer = feed.publish(&rows);
        let mut ledger = ledger.lock().expect("the ledger");
        match answer {
            Answer::Acknowledged => ledger.acknowledged.extend(first..*next),
            Answer::Doubtful => ledger.doubtful.extend(first..*next),
        }
    }
}
