//! The default `pipelines.yaml` in an empty folder, as somebody sees it who has just built the program.

use std::collections::{BTreeMap, BTreeSet};

use regex::Regex;
use serde_json::Value;

use super::support::mosquitto::publish;
use super::support::program::{self, Program, Sse, request};
use super::support::websocket::Client;
use super::support::{Scratch, free_port, wait_for};

const DEFAULT: &str = include_str!("../pipelines.yaml");
const METRICS: [&str; 4] = ["device_load", "device_trend", "queue", "machine_load"];

/// The default graph, only with ports of its own so that tests can run beside each other.
fn start() -> (Program, u16) {
    let broker = free_port();
    (start_in(Scratch::new(), free_port(), broker), broker)
}

fn start_in(folder: Scratch, port: u16, broker: u16) -> Program {
    let mut yaml = DEFAULT.to_owned();
    for (written, ours) in [
        ("127.0.0.1:8080}", "127.0.0.1:PORT}".to_owned()),
        ("url: embedded\n", format!("url: embedded:{broker}\n")),
        ("mqtt://127.0.0.1:1883", format!("mqtt://127.0.0.1:{broker}")),
    ] {
        assert_eq!(yaml.matches(written).count(), 1, "{written}");
        yaml = yaml.replace(written, &ours);
    }
    let program = Program::start_in(folder, port, &yaml);
    program.wait_healthy();
    program
}

/// What a client of a whole live sink sees: the hello, a snapshot of each metric, then updates without a jump.
#[derive(Default)]
struct Stream {
    hello: Value,
    snapshots: usize,
    seq: u64,
    updated: BTreeSet<String>,
}

impl Stream {
    /// Checks the next frame. Returns whether every metric has had an update.
    fn is_complete_with(&mut self, frame: &Value) -> bool {
        if self.hello.is_null() {
            assert_eq!(frame["type"], "hello", "{frame}");
            let metrics = frame["metrics"].as_array().expect("metrics").iter();
            assert_eq!(metrics.flat_map(|metric| metric["name"].as_str()).collect::<Vec<_>>(), METRICS);
            self.hello = frame.clone();
            self.seq = frame["seq"].as_u64().expect("seq");
        } else if let Some(metric) = METRICS.get(self.snapshots) {
            assert_eq!((&frame["type"], &frame["metric"]), (&"snapshot".into(), &(*metric).into()), "{frame}");
            self.snapshots += 1;
        } else {
            self.seq += 1;
            assert_eq!((&frame["type"], frame["seq"].as_u64()), (&"update".into(), Some(self.seq)), "{frame}");
            let rows = frame["data"].as_array().expect("rows");
            assert!(!rows.is_empty() && rows.iter().all(Value::is_object), "{frame}");
            self.updated.insert(frame["metric"].as_str().expect("a metric").to_owned());
        }
        assert_eq!(frame["epoch"], self.hello["epoch"], "{frame}");
        self.updated.len() == METRICS.len()
    }
}

#[tokio::test]
async fn every_metric_comes_over_websocket_and_server_sent_events() {
    let (program, _) = start();
    let mut socket = Client::connect(program.address(), "/ws").await;
    let mut events = Sse::open(program.port, "/events");
    assert_eq!(events.status, 200);
    let mut stream = Stream::default();
    while !stream.is_complete_with(&socket.json().await) {}
    let mut stream = Stream::default();
    loop {
        let (event, _, data) = events.next();
        let frame: Value = serde_json::from_str(&data).expect("JSON");
        assert_eq!(frame["type"], event.as_str());
        if stream.is_complete_with(&frame) {
            break;
        }
    }
    let stats = program.get("/api/v1/stats");
    assert_eq!(stats["active_connections"], 2, "{stats}");
    assert_eq!(stats["subscribers"]["device_load"], 2, "{stats}");
    let open = program.get("/api/v1/connections");
    let sinks: BTreeSet<&str> =
        open["open"].as_array().expect("open").iter().flat_map(|c| c["sink"].as_str()).collect();
    assert_eq!(sinks, BTreeSet::from(["events", "live"]));
    drop((socket, events));
    wait_for("both clients to be gone", || (program.get("/api/v1/stats")["active_connections"] == 0).then_some(()));
    assert_eq!(program.get("/api/v1/connections")["closed"].as_array().map(Vec::len), Some(2));
    program.stop();
}

#[test]
fn a_first_start_warns_of_nothing() {
    let (program, _) = start();
    let printed = program.process.printed();
    assert!(!printed.contains("WARN") && !printed.contains("ERROR") && !printed.contains("note:"), "{printed}");
    program.stop();
}

#[tokio::test]
async fn a_reading_published_by_anybody_shows_up() {
    let (program, broker) = start();
    let mut socket = Client::connect(program.address(), "/ws?metric=device_load&device_id=my-device").await;
    publish(broker, "devices/my-device/telemetry", &["-q", "1"], &[r#"{"latency_ms": 12.5}"#]);
    let mut frame = socket.json().await;
    while frame["data"].as_array().is_none_or(Vec::is_empty) {
        frame = socket.json().await;
    }
    let row = &frame["data"][0];
    assert_eq!(
        (&row["device_id"], &row["rps"], &row["avg_delay_ms"]),
        (&"my-device".into(), &1.0.into(), &12.5.into())
    );
    let latest = program.get("/api/v1/metrics/device_load?device_id=my-device");
    assert_eq!(latest["data"][0], *row);
    let (status, _) = request(program.port, "GET", "/api/v1/metrics/nobody", "").expect("an answer");
    assert_eq!(status, 404);
    program.stop();
}

#[test]
fn the_http_surface_tells_of_every_node() {
    let (program, _) = start();
    let health = program.get("/health");
    assert_eq!((&health["status"], &health["nodes"]), (&"healthy".into(), &16.into()), "{health}");
    assert_eq!(request(program.port, "GET", "/ready", "").expect("an answer").0, 200);
    for metric in METRICS {
        wait_for(metric, || {
            let latest = program.get(&format!("/api/v1/metrics/{metric}"));
            assert_eq!(latest["metric"], metric);
            latest["data"].as_array().is_some_and(|rows| !rows.is_empty()).then_some(())
        });
    }
    let graph = program.get("/api/v1/pipelines");
    let names = |kind: &str| -> Vec<&str> {
        graph[kind].as_array().expect(kind).iter().flat_map(|node| node["name"].as_str()).collect()
    };
    assert_eq!(names("sources"), ["devices", "job_queue", "machine", "made_readings", "made_jobs"]);
    let mut pipelines = names("pipelines");
    pipelines.sort_unstable();
    assert_eq!(pipelines, ["device_load", "device_trend", "insert_jobs", "machine_load", "publish_readings", "queue"]);
    assert_eq!(names("sinks"), ["live", "events", "history", "broker", "jobs"]);
    for kind in ["sources", "pipelines", "sinks"] {
        for node in graph[kind].as_array().expect(kind) {
            assert_eq!(node["status"]["state"], "healthy", "{node}");
        }
    }
    let (status, text) = request(program.port, "GET", "/metrics", "").expect("an answer");
    assert_eq!(status, 200);
    let families = parse_prometheus(&text);
    let up = &families["tailwater_node_healthy"];
    assert_eq!((up.len(), up.values().all(|value| *value == 1.0)), (16, true), "{text}");
    assert!(families["tailwater_rows_out_total"].values().sum::<f64>() > 0.0);
    let page = request(program.port, "GET", "/", "").expect("an answer");
    assert!(page.0 == 200 && page.1.contains("<html"), "{page:?}");
    program.stop();
}

/// Every series by family and labels. Holds the text to the rules of Prometheus' format 0.0.4: HELP and TYPE once
/// before the samples of a family, all samples of a family together, no series twice.
fn parse_prometheus(text: &str) -> BTreeMap<String, BTreeMap<String, f64>> {
    let sample = Regex::new(
        r#"^([a-zA-Z_:][a-zA-Z0-9_:]*)(\{[a-zA-Z_][a-zA-Z0-9_]*="([^"\\\n]|\\["\\n])*"(,[a-zA-Z_][a-zA-Z0-9_]*="([^"\\\n]|\\["\\n])*")*\})? (\S+)$"#,
    )
    .expect("a pattern");
    let mut families: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
    let (mut helped, mut current) = (String::new(), String::new());
    assert!(text.ends_with('\n'));
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            helped = help.split(' ').next().expect("a name").to_owned();
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').expect("a type");
            assert!(name == helped && ["counter", "gauge"].contains(&kind), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            assert!(families.insert(name.to_owned(), BTreeMap::new()).is_none(), "twice: {line}");
            current = name.to_owned();
        } else {
            let parts = sample.captures(line).unwrap_or_else(|| panic!("no sample: {line}"));
            assert_eq!(parts[1], *current, "outside its family: {line}");
            let labels = parts.get(2).map_or("", |labels| labels.as_str()).to_owned();
            let value = parts[6].parse().unwrap_or_else(|e| panic!("{e}: {line}"));
            let family = families.get_mut(&current).expect("a family");
            assert!(family.insert(labels, value).is_none(), "twice: {line}");
        }
    }
    families
}

#[test]
fn history_is_queryable_over_http_and_beside_the_running_process() {
    let (program, _) = start();
    let command_line = |sql: &str, format: &str| {
        let output = program::run(program.scratch.path(), &["query", sql, "--format", format]);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("UTF-8")
    };
    for metric in METRICS {
        wait_for("published rows", || {
            let count = command_line(&format!("SELECT count(*) AS n FROM {metric}"), "csv");
            (count != "n\n0\n").then_some(())
        });
    }
    // One closed window, which no later row changes.
    let sql = "SELECT device_id, rows, rps FROM device_load \
               WHERE window_start = (SELECT min(window_start) FROM device_load) ORDER BY device_id LIMIT 1";
    let row = &program.query(sql)[0];
    let json: Value = serde_json::from_str(&command_line(sql, "json")).expect("JSON");
    assert_eq!(json[0], *row);
    let (device, rows, rps) = (row["device_id"].as_str().expect("a device"), &row["rows"], &row["rps"]);
    assert_eq!(command_line(sql, "csv"), format!("device_id,rows,rps\n{device},{rows},{rps}\n"));
    let table = command_line(sql, "table");
    let header: Vec<&str> = table.lines().next().expect("a header").split('|').map(str::trim).collect();
    assert_eq!(header, ["device_id", "rows", "rps"]);
    assert!(table.ends_with("(1 row)\n"), "{table}");
    // Rows that no file holds yet are seen over HTTP as soon as they are live.
    let latest = program.get("/api/v1/metrics/queue");
    let seen = program.query("SELECT max(total) AS total FROM queue");
    assert!(seen[0]["total"].as_i64() >= latest["data"][0]["total"].as_i64(), "{seen} {latest}");
    program.stop();
}

#[test]
fn ctrl_c_ends_it_with_0_and_a_restart_goes_on() {
    let (program, broker) = start();
    let batch = |program: &Program| program.get("/api/v1/metrics/device_load")["batch"].as_u64().expect("a number");
    wait_for("windows", || (batch(&program) >= 2).then_some(()));
    let before = batch(&program);
    let Program { scratch, port, mut process } = program;
    process.signal("INT");
    assert_eq!(process.wait().code(), Some(0), "{}", process.printed());
    let count = |folder: &Scratch, sql: &str| -> i64 {
        let output = program::run(folder.path(), &["query", sql, "--format", "csv"]);
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        text.lines().nth(1).and_then(|n| n.parse().ok()).unwrap_or_else(|| panic!("{sql}: {text}"))
    };
    // A stop publishes: nothing that was live is missing from the files.
    let rows = count(&scratch, "SELECT count(*) FROM device_load");
    assert!(rows > 0);
    let program = start_in(scratch, port, broker);
    assert!(program.process.printed().contains("going on from checkpoint"), "{}", program.process.printed());
    wait_for("a later window", || (batch(&program) > before).then_some(()));
    let folder = program.stop();
    assert!(count(&folder, "SELECT count(*) FROM device_load") > rows);
    let twice = "SELECT count(*) FROM (SELECT device_id, window_start FROM versions.device_load \
                 GROUP BY device_id, window_start HAVING count(*) > 1)";
    assert_eq!(count(&folder, twice), 0);
}
