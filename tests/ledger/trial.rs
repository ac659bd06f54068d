//! One trial: publishers, the program between them and its history, and the count at the end.

use std::cell::RefCell;
use std::fmt::Write;
use std::process::Command;
use std::sync::atomic::Ordering::Relaxed;

use serde_json::Value;

use super::copies::Copies;
use super::feed::{Feed, Publisher, Setting, WINDOW_S};
use super::truth;
use super::watcher::{self, Watcher};
use crate::support::program::{self, BINARY, request};
use crate::support::proxy::Proxy;
use crate::support::random::Random;
use crate::support::{PATIENCE, Process, Scratch, free_port, wait_for};

/// A source under test.
#[derive(Clone, Copy)]
pub(super) struct FeedEntry {
    /// Its name in the YAML and in messages.
    pub(super) name: &'static str,
    /// Starts what is behind it.
    pub(super) open: fn(&Setting<'_>) -> Box<dyn Feed>,
}

/// A sink under test, beside Parquet.
#[derive(Clone, Copy)]
pub(super) struct CopiesEntry {
    /// Its name in the YAML and in messages.
    pub(super) name: &'static str,
    /// Starts what is behind it.
    pub(super) open: fn(&Setting<'_>) -> Copies,
}

/// Bytes that a connection lives at most when a trial cuts connections.
const CONNECTION_BYTES_MAX: u64 = 60_000;

/// A graph of all sources and sinks under test, and everything around it.
pub(super) struct Trial {
    /// The folder of the YAML.
    pub(super) folder: Scratch,
    /// Where the program listens.
    pub(super) port: u16,
    publishers: Vec<Publisher>,
    copies: Vec<(&'static str, Copies)>,
    /// What stands between the program and its servers.
    proxies: Vec<Proxy>,
    watcher: Option<Watcher>,
}

impl Trial {
    /// Starts the servers and writes the YAML. With `cuts`, the program reaches its servers through proxies.
    pub(super) fn new(
        feeds: &[FeedEntry],
        copies: &[CopiesEntry],
        rows_at_once: u64,
        cuts: Option<&mut Random>,
    ) -> Self {
        let (folder, port) = (Scratch::new(), free_port());
        let proxies = RefCell::new(Vec::new());
        let random = cuts.map(|random| RefCell::new(random.fork()));
        let route = |target: u16| match &random {
            None => target,
            Some(random) => {
                let proxy = Proxy::start(target, CONNECTION_BYTES_MAX, random.borrow_mut().fork());
                let port = proxy.port;
                proxies.borrow_mut().push(proxy);
                port
            }
        };
        let setting = Setting { folder: folder.path(), port, route: &route };
        let publishers: Vec<Publisher> =
            feeds.iter().map(|entry| Publisher::new(entry.name, (entry.open)(&setting), rows_at_once)).collect();
        let copies: Vec<(&str, Copies)> = copies.iter().map(|entry| (entry.name, (entry.open)(&setting))).collect();
        let yaml = yaml(port, &publishers, &copies);
        folder.write("pipelines.yaml", &yaml);
        let proxies = proxies.into_inner();
        Self { folder, port, publishers, copies, proxies, watcher: None }
    }

    /// Starts the program; does not wait for it.
    pub(super) fn spawn(&self) -> Process {
        Process::start(Command::new(BINARY).arg("run").current_dir(self.folder.path()))
    }

    /// Starts the program and waits until it answers.
    pub(super) fn start(&self) -> Process {
        let mut process = self.spawn();
        self.wait_until_it_answers(&mut process);
        process
    }

    /// Waits until the program answers.
    pub(super) fn wait_until_it_answers(&self, process: &mut Process) {
        wait_for("the program to answer", || {
            assert!(process.is_running(), "the program ended: {}", process.printed());
            program::get(self.port, "/health")
        });
    }

    /// Waits until every source and sink is connected.
    pub(super) fn wait_until_healthy(&self) {
        wait_for("the program to be healthy", || {
            let (_, health) = program::get(self.port, "/health")?;
            (serde_json::from_str::<Value>(&health).ok()?["status"] == "healthy").then_some(())
        });
    }

    /// Lets a live client follow the metrics.
    pub(super) fn watch(&mut self, random: &mut Random) {
        self.watcher = Some(Watcher::start(self.port, random.fork()));
    }

    /// Lets the publishers publish.
    pub(super) fn publish(&mut self, random: &mut Random) {
        for publisher in &mut self.publishers {
            publisher.start(random.fork());
        }
    }

    /// Stops the publishers.
    pub(super) fn stop_publishing(&mut self) {
        for publisher in &mut self.publishers {
            publisher.stop();
        }
    }

    /// Connections that met a bad end so far.
    pub(super) fn cuts(&self) -> u64 {
        self.proxies.iter().map(Proxy::ended).sum()
    }

    /// From now on connections are whole.
    pub(super) fn leave_connections_alone(&self) {
        self.proxies.iter().for_each(Proxy::leave_alone);
    }

    /// Rows that were acknowledged so far, over all sources.
    pub(super) fn acknowledged(&self) -> usize {
        self.publishers.iter().map(|publisher| publisher.ledger().acknowledged.len()).sum()
    }

    /// Waits until everything that was acknowledged has come through, or nothing comes any more: the count at the
    /// end says what is missing.
    pub(super) fn settle(&self) {
        for publisher in &self.publishers {
            let name = publisher.name;
            let expected = publisher.ledger().acknowledged.len() as u64;
            self.wait_for_rows(&format!("rows of {name}"), expected, || self.distinct(&format!("{name}_raw"), name));
            self.wait_for_rows(&format!("united rows of {name}"), expected, || self.distinct("united", name));
            for (sink, copies) in &self.copies {
                self.wait_for_rows(&format!("{name} in {sink}"), expected, || copies.counts(name).len() as u64);
            }
        }
        self.settle_watcher();
    }

    /// Waits until the live client shows what the program says is the latest, and that is the newest in history.
    fn settle_watcher(&self) {
        let Some(watcher) = &self.watcher else { return };
        for publisher in &self.publishers {
            for metric in ["raw", "windows"].map(|kind| format!("{}_{kind}", publisher.name)) {
                wait_for(&format!("the live client to agree on {metric}"), || {
                    let (_, latest) = program::get(self.port, &format!("/api/v1/metrics/{metric}"))?;
                    let latest: Value = serde_json::from_str(&latest).expect("JSON");
                    (watcher.view().metrics.get(&metric)? == &watcher::keyed(&latest["data"])).then_some(())
                });
            }
            let metric = format!("{}_windows", publisher.name);
            let columns = "s, k, n, total, window_start";
            let rows = self.query(&format!("SELECT {columns} FROM versions.{metric} ORDER BY window_start"));
            let view = watcher.view();
            for (key, newest) in watcher::keyed(&rows) {
                let shown = view.metrics[&metric].get(&key).unwrap_or(&Value::Null);
                let differs = columns.split(", ").any(|column| shown[column] != newest[column]);
                assert!(!differs, "{metric}: the live client shows {shown}, the newest in history is {newest}");
            }
        }
    }

    fn wait_for_rows(&self, what: &str, expected: u64, count: impl Fn() -> u64) {
        let (mut seen, mut since) = (0, std::time::Instant::now());
        wait_for(what, || {
            let now = count();
            if now != seen {
                (seen, since) = (now, std::time::Instant::now());
            }
            // A lost row never comes: then the count tells which.
            (now >= expected || since.elapsed() > PATIENCE / 6).then_some(())
        });
    }

    /// Different numbers of a source in a table, with those that are not published yet.
    fn distinct(&self, table: &str, feed: &str) -> u64 {
        let sql = format!("SELECT count(DISTINCT n) AS n FROM versions.{table} WHERE s = '{feed}'");
        self.query(&sql)[0]["n"].as_u64().expect("a number")
    }

    /// The rows of a query to the program.
    fn query(&self, sql: &str) -> Value {
        let body = serde_json::json!({"sql": sql}).to_string();
        let (status, text) = request(self.port, "POST", "/api/v1/query", &body).expect("an answer to a query");
        assert_eq!(status, 200, "{sql}: {text}");
        serde_json::from_str(&text).expect("JSON")
    }

    /// Asks the program to stop, and closes all windows.
    pub(super) fn stop(&self, mut process: Process) {
        process.signal("TERM");
        assert_eq!(process.wait().code(), Some(0), "{}", process.printed());
        let output = program::run(self.folder.path(), &["run", "--drain"]);
        assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    }

    /// Everything that is not as the ledgers say; says how much there was.
    pub(super) fn wrong(&self) -> Vec<String> {
        let folder = self.folder.path();
        let mut wrong = truth::wrong_files(folder);
        if let Some(watcher) = &self.watcher {
            let counts = &watcher.counts;
            eprintln!("the live client: {counts:?}");
            assert!(counts.epochs.load(Relaxed) > 1 && counts.resumed.load(Relaxed) > 0, "{counts:?}");
            wrong.extend(watcher.view().wrong.iter().map(|what| format!("the live client: {what}")));
        }
        for publisher in &self.publishers {
            let (name, ledger) = (publisher.name, publisher.ledger());
            let raw = truth::counts(folder, &format!("{name}_raw"), name);
            let (rows, doubtful) = (ledger.acknowledged.len(), ledger.doubtful.len());
            eprintln!("{name}: {rows} rows acknowledged, {doubtful} in doubt, {} in history", raw.len());
            wrong.extend(truth::wrong_counts(&format!("{name}_raw"), &ledger, &raw));
            let united = truth::counts(folder, "united", name);
            wrong.extend(truth::wrong_counts(&format!("united of {name}"), &ledger, &united));
            let numbers = raw.keys().copied().collect();
            wrong.extend(truth::wrong_windows(folder, &format!("{name}_windows"), name, &numbers));
            let numbers = united.keys().copied().collect();
            wrong.extend(truth::wrong_windows(folder, "united_windows", name, &numbers));
            for (sink, copies) in &self.copies {
                wrong.extend(truth::wrong_counts(&format!("{sink} of {name}"), &ledger, &copies.counts(name)));
            }
        }
        wrong
    }
}

/// A raw and a windowed pipeline per source, and one of each over all.
fn yaml(port: u16, publishers: &[Publisher], copies: &[(&str, Copies)]) -> String {
    let mut yaml = format!("server: {{listen: 127.0.0.1:{port}}}\ncheckpoint: {{every: 50ms}}\nsources:\n");
    let indented = |block: &str| block.lines().map(|line| format!("    {line}\n")).collect::<String>();
    for publisher in publishers {
        let event_time = "event_time: {field: at, lateness: 100ms, idle: 1d}\nerrors: history";
        let block = indented(&format!("{}\n{event_time}", publisher.yaml()));
        write!(yaml, "  {}:\n{block}", publisher.name).expect("text");
    }
    yaml.push_str("pipelines:\n");
    let window = format!(
        "steps: [{{window: {{tumbling: {WINDOW_S}s, group_by: [s, k], aggregate: {{n: count(), total: sum(n)}}}}}}]"
    );
    let names: Vec<&str> = publishers.iter().map(|publisher| publisher.name).collect();
    let sinks: String = copies.iter().map(|(name, _)| format!(", {name}")).collect();
    for name in &names {
        writeln!(yaml, "  {name}_raw: {{from: {name}, key: [s, k], to: [history, events{sinks}]}}").expect("text");
        writeln!(yaml, "  {name}_windows: {{from: {name}, {window}, to: [history, events]}}").expect("text");
    }
    let all = names.join(", ");
    writeln!(yaml, "  united: {{from: [{all}], to: history}}").expect("text");
    writeln!(yaml, "  united_windows: {{from: [{all}], {window}, to: history}}").expect("text");
    yaml.push_str("sinks:\n  history: {type: parquet, path: history, roll: 500ms}\n");
    write!(yaml, "  events:\n{}", indented(watcher::SINK)).expect("text");
    for (name, copies) in copies {
        write!(yaml, "  {name}:\n{}", indented(&copies.yaml())).expect("text");
    }
    yaml
}
