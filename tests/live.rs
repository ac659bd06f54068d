//! The live sinks on real sockets: stock clients, slow clients, hostile clients.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use arrow::array::{Float64Array, RecordBatch, StringArray};
use futures::SinkExt;
use pipeline::batch::{Batch, Stage, Times};
use pipeline::config::{CheckContext, Position, Problems, tree};
use pipeline::http::Routes;
use pipeline::live::Live;
use pipeline::plugin::{LiveSink, Sink, SinkContext, SinkInput, StreamShape};
use pipeline::schema::{FieldType, schema_of};
use pipeline::status::Status;
use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::support::PATIENCE;
use super::support::http::{Raw, serve};
use super::support::websocket::Client;

/// Two metrics that go to the sink: `load` by device, `total` without keys.
fn inputs() -> Vec<SinkInput> {
    let schema = schema_of([("device_id", FieldType::String), ("value", FieldType::Float)]);
    let input = |metric: &str, keys: &[&str]| SinkInput {
        metric: metric.into(),
        shape: StreamShape {
            schema: Arc::clone(&schema),
            keys: keys.iter().map(|key| (*key).into()).collect(),
            windowed: false,
        },
    };
    vec![input("load", &["device_id"]), input("total", &[])]
}

const LOAD: usize = 0;
const TOTAL: usize = 1;

/// What `check` has to say about a sink.
fn problems_of(yaml: &str, inputs: &[SinkInput]) -> String {
    let mut problems = Problems::default();
    let mut node = tree::parse(yaml).expect("YAML");
    let word = node.remove("type").and_then(|word| word.text().map(str::to_owned)).expect("a type");
    let mut cx = CheckContext::new(&mut problems, "sink live", Position { line: 1, column: 1 }, Path::new("."));
    let plugin = sinks::SINKS.iter().find(|plugin| plugin.type_name == word).expect("the sink");
    if let Some(sink) = (plugin.read)(&node, &mut cx) {
        let shape = sink.check(inputs, &mut cx);
        assert_eq!(shape.is_some(), !problems.has_errors());
    }
    problems.render("p.yaml")
}

/// A running live sink behind a server.
struct World {
    sink: Option<Box<dyn LiveSink>>,
    live: Arc<Live>,
    address: SocketAddr,
    batches: u64,
}

impl World {
    async fn start(yaml: &str) -> Self {
        assert_eq!(problems_of(yaml, &inputs()), "");
        let metrics = inputs().into_iter().map(|input| (input.metric, input.shape.keys));
        let live = Arc::new(Live::new("epoch".into(), Arc::new(Status::default()), metrics));
        let routes = Routes::default();
        let context = SinkContext {
            name: "live".into(),
            inputs: inputs(),
            folder: PathBuf::new(),
            routes: routes.clone(),
            live: Arc::clone(&live),
            tails: Vec::new(),
        };
        let mut problems = Problems::default();
        let mut cx = CheckContext::new(&mut problems, "sink live", Position { line: 1, column: 1 }, Path::new("."));
        let mut node = tree::parse(yaml).expect("YAML");
        let word = node.remove("type").and_then(|word| word.text().map(str::to_owned)).expect("a type");
        let plugin = sinks::SINKS.iter().find(|plugin| plugin.type_name == word).expect("the sink");
        let config = (plugin.read)(&node, &mut cx).expect("a configuration");
        let Ok(Sink::Live(sink)) = config.build(context) else { panic!("a live sink") };
        Self { sink: Some(sink), live, address: serve(routes).await, batches: 0 }
    }

    /// What the engine does with an output batch.
    fn emit(&mut self, metric: usize, rows: &[(&str, f64)]) {
        self.batches += 1;
        let schema = Arc::clone(&inputs()[metric].shape.schema);
        let devices = StringArray::from_iter_values(rows.iter().map(|(device, _)| device));
        let values = Float64Array::from_iter_values(rows.iter().map(|(_, value)| *value));
        let rows = RecordBatch::try_new(schema, vec![Arc::new(devices), Arc::new(values)]).expect("rows");
        let times = Times::constant(0, 0, i64::MIN, rows.num_rows());
        let batch = Batch::new(rows, times, Stage::Final).expect("a batch");
        self.live.update(&inputs()[metric].metric, &batch, self.batches);
        self.sink.as_mut().expect("a sink").write(metric, &batch, self.batches);
    }

    async fn connect(&self, path: &str) -> Client {
        Client::connect(self.address, path).await
    }

    /// A client that has read its beginning: hello and a snapshot for each of `snapshots` metrics.
    async fn join(&self, path: &str, snapshots: usize) -> Client {
        let mut client = self.connect(path).await;
        assert_eq!(client.json().await["type"], "hello");
        for _ in 0..snapshots {
            assert_eq!(client.json().await["type"], "snapshot");
        }
        client
    }

    fn stop(&mut self) {
        self.sink = None;
    }

    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let waiting = async {
            while !holds(self) {
                tokio::task::yield_now().await;
            }
        };
        assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "waited in vain for {what}");
    }
}

/// `data` of a frame as `device=value` in order.
fn rows(frame: &Value) -> Vec<String> {
    let rows = frame["data"].as_array().unwrap_or_else(|| panic!("no rows in {frame}"));
    rows.iter().map(|row| format!("{}={}", row["device_id"].as_str().unwrap_or("?"), row["value"])).collect()
}

fn without_time(mut frame: Value) -> Value {
    let time = frame["timestamp"].take();
    assert!(time.as_str().is_some_and(|time| time.len() == "2026-11-20T12:00:00.000Z".len()), "{time}");
    frame.as_object_mut().expect("an object").remove("timestamp");
    frame
}

const PLAIN: &str = "{type: websocket, path: /ws}";
const DEVICES: &str =
    "{type: websocket, path: /ws, params: {device_ids: device_id}, required: [device_ids], envelope: event}";
const SSE: &str = "{type: sse, path: /events}";

#[tokio::test(flavor = "multi_thread")]
async fn a_client_gets_hello_then_snapshots_then_updates() {
    let mut world = World::start(PLAIN).await;
    world.emit(LOAD, &[("A", 1.0), ("B", 2.0)]);
    world.emit(LOAD, &[("A", 3.0)]);
    let mut client = world.connect("/ws").await;
    let metrics = json!([{"name": "load", "keys": ["device_id"]}, {"name": "total", "keys": []}]);
    let hello = json!({"type": "hello", "seq": 2, "epoch": "epoch", "keep_alive_ms": 30000, "metrics": metrics});
    assert_eq!(without_time(client.json().await), hello);
    let data = json!([{"device_id": "A", "value": 3.0}, {"device_id": "B", "value": 2.0}]);
    let load = json!({"type": "snapshot", "metric": "load", "seq": 2, "epoch": "epoch", "batch": 2, "data": data});
    assert_eq!(without_time(client.json().await), load);
    let total = json!({"type": "snapshot", "metric": "total", "seq": 2, "epoch": "epoch", "batch": 0, "data": []});
    assert_eq!(without_time(client.json().await), total);
    world.emit(TOTAL, &[("all", 6.0)]);
    let data = json!([{"device_id": "all", "value": 6.0}]);
    let update = json!({"type": "update", "metric": "total", "seq": 3, "epoch": "epoch", "batch": 3, "data": data});
    assert_eq!(without_time(client.json().await), update);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_in_the_snapshot_or_in_an_update_but_never_in_both_or_neither() {
    let mut world = World::start("{type: websocket, path: /ws, queue: 100000}").await;
    // Clients come while rows flow: each must see every value after its snapshot, once.
    let clients: Vec<_> = (0..16).map(|_| tokio::spawn(watch_count_up(world.address))).collect();
    let mut value = 0;
    while world.live.status.connections.totals().total_connections < 16 {
        value += 1;
        world.emit(LOAD, &[("A", f64::from(value))]);
        tokio::task::yield_now().await;
    }
    world.emit(LOAD, &[("end", f64::from(value))]);
    for client in clients {
        client.await.expect("a client");
    }
}

async fn watch_count_up(address: SocketAddr) {
    let mut client = Client::connect(address, "/ws?metric=load").await;
    assert_eq!(client.json().await["type"], "hello");
    let snapshot = client.json().await;
    let mut value = snapshot["data"][0]["value"].as_f64().unwrap_or(0.0);
    let mut frame = snapshot;
    while frame["data"].as_array().expect("rows").iter().all(|row| row["device_id"] != "end") {
        frame = client.json().await;
        let next = frame["data"][0]["value"].as_f64().expect("a value");
        assert!(
            next == value + 1.0 || frame["data"][0]["device_id"] == "end" && next == value,
            "{value}, then {frame}"
        );
        value = next;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_client_gets_the_rows_it_asked_for() {
    let mut world = World::start(PLAIN).await;
    let mut a = world.join("/ws?device_id=A", 1).await;
    let mut both = world.join("/ws?metric=load&device_id=A,B", 1).await;
    let mut total = world.join("/ws?metric=total", 1).await;
    world.emit(LOAD, &[("A", 1.0), ("B", 2.0), ("C", 3.0), ("A", 4.0)]);
    world.emit(LOAD, &[("C", 5.0)]);
    world.emit(LOAD, &[("B", 6.0)]);
    world.emit(TOTAL, &[("all", 7.0)]);
    world.emit(LOAD, &[("A", 8.0)]);
    assert_eq!(rows(&a.json().await), ["A=1.0", "A=4.0"]);
    assert_eq!(rows(&a.json().await), ["A=8.0"]);
    for expected in [&["A=1.0", "B=2.0", "A=4.0"][..], &["B=6.0"], &["A=8.0"]] {
        assert_eq!(rows(&both.json().await), expected);
    }
    let frame = total.json().await;
    assert_eq!((rows(&frame), &frame["seq"]), (vec!["all=7.0".to_owned()], &json!(4)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_subscribes_and_unsubscribes_while_connected() {
    let mut world = World::start(PLAIN).await;
    world.emit(LOAD, &[("A", 1.0), ("B", 2.0)]);
    let mut client = world.join("/ws?device_id=A", 1).await;
    assert!(world.live.is_wanted("load") && !world.live.is_wanted("total"));
    client.send(r#"{"type":"subscribe","metric":"load","where":{"device_id":["B"]}}"#).await;
    assert_eq!(rows(&client.json().await), ["A=1.0", "B=2.0"]);
    client.send(r#"{"type":"unsubscribe","metric":"load","where":{"device_id":["A"]}}"#).await;
    assert_eq!(rows(&client.json().await), ["B=2.0"]);
    client.send(r#"{"type":"subscribe","metric":"total"}"#).await;
    let snapshot = client.json().await;
    assert_eq!((&snapshot["type"], &snapshot["metric"]), (&json!("snapshot"), &json!("total")));
    assert!(world.live.is_wanted("total"));
    world.emit(LOAD, &[("A", 3.0), ("B", 4.0)]);
    world.emit(TOTAL, &[("all", 5.0)]);
    assert_eq!(rows(&client.json().await), ["B=4.0"]);
    assert_eq!(rows(&client.json().await), ["all=5.0"]);
    client.send(r#"{"type":"unsubscribe","metric":"load"}"#).await;
    assert_eq!(rows(&client.json().await), Vec::<String>::new());
    assert!(!world.live.is_wanted("load"));
    client.send(r#"{"type":"subscribe","metric":"lod"}"#).await;
    let error = client.json().await;
    assert_eq!(error["message"], "no metric `lod` here; there is `load`, `total`", "{error}");
    drop(client);
    world.until("the end of demand", |world| !world.live.is_wanted("total")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ping_is_answered() {
    let world = World::start(PLAIN).await;
    let mut client = world.join("/ws", 2).await;
    client.send("ping").await;
    assert_eq!(client.text().await, "pong");
    client.send(r#"{"type":"ping"}"#).await;
    assert_eq!(client.text().await, r#"{"type":"pong"}"#);
    client.socket.send(Message::Ping("x".into())).await.expect("to send");
    assert_eq!(client.message().await.expect("open").expect("a pong"), Message::Pong("x".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_client_reads_why_before_the_close() {
    let world = World::start(DEVICES).await;
    for (path, message) in [
        ("/ws", "`device_ids` is required: `?device_ids=VALUE,VALUE`"),
        ("/ws?device_ids=A&metric=lod", "no metric `lod` here; there is `load`, `total`"),
        ("/ws?device_ids=A&x=1", "no parameter or key column `x` here"),
    ] {
        let mut client = world.connect(path).await;
        let error = client.json().await;
        let told = error["data"]["message"].as_str().unwrap_or_default();
        assert!(error["event"] == "error" && told.starts_with(message), "{path}: {error}");
        assert_eq!(client.closed().await, CloseCode::Policy);
    }
    assert!(!world.live.is_wanted("load"));
}

#[tokio::test(flavor = "multi_thread")]
async fn events_come_one_by_one_without_a_beginning() {
    let mut world = World::start(DEVICES).await;
    world.emit(LOAD, &[("A", 0.0)]);
    let mut client = world.connect("/ws?device_ids=A,B").await;
    client.send("ping").await;
    assert_eq!(client.text().await, "pong");
    world.emit(LOAD, &[("A", 1.0), ("C", 2.0), ("B", 3.0)]);
    assert_eq!(client.text().await, r#"{"event":"message","data":{"device_id":"A","value":1.0}}"#);
    assert_eq!(client.text().await, r#"{"event":"message","data":{"device_id":"B","value":3.0}}"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn bare_rows_begin_with_the_latest_ones() {
    let mut world = World::start("{type: websocket, path: /ws, envelope: none}").await;
    world.emit(LOAD, &[("A", 1.0)]);
    let mut client = world.connect("/ws").await;
    assert_eq!(client.text().await, r#"{"device_id":"A","value":1.0}"#);
    world.emit(LOAD, &[("A", 2.0), ("B", 3.0)]);
    assert_eq!(client.text().await, r#"{"device_id":"A","value":2.0}"#);
    assert_eq!(client.text().await, r#"{"device_id":"B","value":3.0}"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_messages_are_answered_and_too_many_end_the_connection() {
    let world = World::start(PLAIN).await;
    let mut client = world.join("/ws", 2).await;
    for wrong in ["", "hello", "{}", r#"{"type":"drop"}"#, r#"{"type":"subscribe"}"#, "[1,2", "null", "\u{0}"] {
        client.send(wrong).await;
        let error = client.json().await;
        assert!(error["type"] == "error" && error["message"].is_string(), "{wrong}: {error}");
    }
    client.send(r#"{"type":"subscribe","metric":"load","where":{"device_id":[[]]}}"#).await;
    assert_eq!(client.json().await["message"], "a value in `where` is a text, number, bool or null");
    client.send("once more").await;
    assert_eq!(client.closed().await, CloseCode::Policy);
    world.until("the end of the connection", |world| world.live.status.connections.list().is_empty()).await;
    assert_eq!(world.live.status.connections.closed()[0].errors, 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_megabytes_hurt_nobody() {
    let mut world = World::start(PLAIN).await;
    let mut other = world.join("/ws", 2).await;
    for (message, code) in [
        (Message::text("x".repeat(100 << 20)), CloseCode::Size),
        (Message::binary(vec![0; 100 << 20]), CloseCode::Size),
        (Message::binary(vec![0; 10]), CloseCode::Unsupported),
        (Message::text("x".repeat((64 << 10) + 1)), CloseCode::Size),
    ] {
        let mut client = world.join("/ws", 2).await;
        client.socket.send(message).await.expect("to send it all");
        assert_eq!(client.closed().await, code);
    }
    world.emit(LOAD, &[("A", 1.0)]);
    assert_eq!(rows(&other.json().await), ["A=1.0"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_client_is_told_its_loss_and_a_fast_one_loses_nothing() {
    let mut world = World::start("{type: websocket, path: /ws, queue: 5}").await;
    let mut slow = world.connect("/ws?metric=load").await;
    let mut fast = world.join("/ws?metric=load", 1).await;
    // Long rows fill the buffers of the sockets soon.
    let device = "x".repeat(256 << 10);
    let mut sent = 0;
    let is_lossy = |world: &World| world.live.status.connections.totals().messages_dropped > 20;
    while !is_lossy(&world) {
        sent += 1;
        world.emit(LOAD, &[(&device, f64::from(sent))]);
        assert_eq!(fast.json().await["data"][0]["value"], f64::from(sent));
        assert!(sent < 2000, "buffers without end");
    }
    assert_eq!(slow.json().await["type"], "hello");
    assert_eq!(slow.json().await["type"], "snapshot");
    let (mut received, mut lost, mut seq) = (0, 0, 0);
    while received + lost < u64::try_from(sent).expect("a count") {
        let frame = slow.json().await;
        let frame_seq = frame["seq"].as_u64().expect("a number");
        assert!(frame_seq > seq, "in order");
        seq = frame_seq;
        match frame["type"].as_str() {
            Some("update") => received += 1,
            Some("gap") => lost += frame["lost"].as_u64().expect("a count"),
            _ => panic!("{}", frame["type"]),
        }
    }
    assert_eq!(world.live.status.connections.totals().messages_dropped, lost);
    // And it is a client like any other again.
    world.emit(LOAD, &[("A", 1.0)]);
    assert_eq!(rows(&slow.json().await), ["A=1.0"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_snapshot_comes_in_parts_before_what_follows() {
    let mut world = World::start("{type: websocket, path: /ws, queue: 1}").await;
    let devices: Vec<String> = (0..5000).map(|n| format!("{n:060}")).collect();
    let all: Vec<(&str, f64)> = devices.iter().map(|device| (device.as_str(), 1.0)).collect();
    world.emit(LOAD, &all);
    let mut client = world.connect("/ws?metric=load").await;
    let hello = client.json().await;
    world.emit(LOAD, &[("A", 2.0)]);
    let (mut seen, mut part, mut parts) = (0, 0, 1);
    while part < parts {
        let frame = client.json().await;
        assert_eq!((&frame["type"], &frame["seq"]), (&json!("snapshot"), &hello["seq"]));
        part += 1;
        assert_eq!(frame["part"], part);
        parts = frame["parts"].as_u64().expect("a count");
        seen += rows(&frame).len();
    }
    assert_eq!((seen, parts > 3), (5000, true));
    assert_eq!(rows(&client.json().await), ["A=2.0"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_asks_and_does_not_read_is_given_one_snapshot_at_a_time() {
    const ASKED: u64 = 200;
    let mut world = World::start("{type: websocket, path: /ws}").await;
    let devices: Vec<String> = (0..5000).map(|n| format!("{n:060}")).collect();
    let all: Vec<(&str, f64)> = devices.iter().map(|device| (device.as_str(), 1.0)).collect();
    world.emit(LOAD, &all);
    let mut client = world.connect("/ws?metric=load").await;
    for _ in 0..ASKED {
        client.send(r#"{"type":"subscribe","metric":"load"}"#).await;
    }
    client.send("ping").await;
    let _hello = client.json().await;
    for asked in 0..=ASKED {
        let (mut seen, mut part, mut parts) = (0, 0, 1);
        while part < parts {
            let frame = client.json().await;
            assert_eq!(frame["type"], "snapshot");
            part += 1;
            assert_eq!(frame["part"], part);
            parts = frame["parts"].as_u64().expect("a count");
            seen += rows(&frame).len();
        }
        assert_eq!(seen, 5000);
        let connections = world.live.status.connections.list();
        let received = connections[0].received.load(Relaxed);
        // Half a megabyte each: no more than fit into the buffers of the two sockets are on their way.
        assert!(received < asked + ASKED / 2, "{received} messages were read when {asked} were answered");
    }
    assert_eq!(client.text().await, "pong");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_has_everything_gets_no_snapshot() {
    let mut world = World::start(PLAIN).await;
    world.emit(LOAD, &[("A", 1.0)]);
    world.emit(TOTAL, &[("all", 1.0)]);
    for (since, snapshots) in [
        ("epoch:2", &[][..]),
        ("epoch:1", &["total"]),
        ("epoch:0", &["load", "total"]),
        ("another:2", &["load", "total"]),
    ] {
        let mut client = world.connect(&format!("/ws?since={since}")).await;
        assert_eq!(client.json().await["type"], "hello");
        client.send("ping").await;
        let mut metrics = Vec::new();
        loop {
            match client.text().await.as_str() {
                "pong" => break,
                frame => {
                    let frame: Value = serde_json::from_str(frame).expect("JSON");
                    metrics.push(frame["metric"].as_str().expect("a metric").to_owned());
                }
            }
        }
        // The ping may overtake nothing: snapshots are queued before it is read.
        assert_eq!(metrics, snapshots, "{since}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_delivers_what_waits_and_says_good_bye() {
    let mut world = World::start(PLAIN).await;
    let mut client = world.join("/ws?metric=load", 1).await;
    let mut idle = world.join("/ws?metric=total", 1).await;
    idle.send(r#"{"type":"unsubscribe","metric":"total"}"#).await;
    assert_eq!(idle.json().await["type"], "snapshot");
    for value in 0..50 {
        world.emit(LOAD, &[("A", f64::from(value))]);
    }
    world.stop();
    for value in 0..50 {
        assert_eq!(rows(&client.json().await), [format!("A={:?}", f64::from(value))]);
    }
    assert_eq!(client.closed().await, CloseCode::Away);
    assert_eq!(idle.closed().await, CloseCode::Away);
    world.until("the end of the connection", |world| world.live.status.connections.list().is_empty()).await;
    let (head, _) = Raw::get(world.address, "/ws", &HANDSHAKE).await;
    assert!(head.starts_with("HTTP/1.1 503 "), "{head}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_closes_with_a_handshake_and_is_gone() {
    let mut world = World::start(PLAIN).await;
    let mut client = world.join("/ws", 2).await;
    client.socket.close(None).await.expect("to close");
    while client.message().await.is_some() {}
    world.until("the end of the connection", |world| world.live.status.connections.list().is_empty()).await;
    assert!(!world.live.is_wanted("load"));
    world.emit(LOAD, &[("A", 1.0)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn pings_come_by_themselves_and_a_client_that_answers_none_is_dropped() {
    let world = World::start("{type: websocket, path: /ws, keep_alive: 1s, envelope: event}").await;
    let (head, mut silent) = Raw::get(world.address, "/ws", &HANDSHAKE).await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    let mut client = world.connect("/ws").await;
    for _ in 0..3 {
        assert_eq!(client.text().await, r#"{"event":"ping","data":{"type":"keep-alive"}}"#);
    }
    assert_eq!(silent.read_to("no such text").await, None);
    client.send("ping").await;
    while client.text().await != "pong" {}
}

const HANDSHAKE: [&str; 4] = [
    "Connection: keep-alive, Upgrade",
    "Upgrade: WebSocket",
    "Sec-WebSocket-Version: 13",
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
];

#[tokio::test(flavor = "multi_thread")]
async fn the_handshake_is_that_of_the_standard() {
    let world = World::start("{type: websocket, path: /ws, max_clients: 1}").await;
    let (head, first) = Raw::get(world.address, "/ws", &HANDSHAKE).await;
    assert!(head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
    let (full, _) = Raw::get(world.address, "/ws", &HANDSHAKE).await;
    assert!(full.starts_with("HTTP/1.1 503 ") && full.to_lowercase().contains("retry-after: "), "{full}");
    drop(first);
    let is_free = |world: &World| {
        world.live.status.connections.totals().total_connections == 1 && world.live.status.connections.list().is_empty()
    };
    world.until("a free place", is_free).await;
    let (plain, _) = Raw::get(world.address, "/ws", &["X: y"]).await;
    assert!(plain.starts_with("HTTP/1.1 426 ") && plain.to_lowercase().contains("upgrade: websocket"), "{plain}");
    let old = HANDSHAKE.map(|header| if header.ends_with("13") { "Sec-WebSocket-Version: 8" } else { header });
    let (old, _) = Raw::get(world.address, "/ws", &old).await;
    assert!(old.starts_with("HTTP/1.1 426 ") && old.to_lowercase().contains("sec-websocket-version: 13"), "{old}");
    let (keyless, _) = Raw::get(world.address, "/ws", &HANDSHAKE[..3]).await;
    assert!(keyless.starts_with("HTTP/1.1 400 "), "{keyless}");
}

/// The next event of a stream: its lines without those of the chunked encoding.
async fn event(raw: &mut Raw) -> Option<Vec<String>> {
    let text = raw.read_to("\n\n").await?;
    let is_field = |line: &&str| line.contains(':');
    Some(text.lines().filter(is_field).map(str::to_owned).collect())
}

fn data(event: &[String]) -> Value {
    let text = event.iter().find_map(|line| line.strip_prefix("data: ")).expect("data");
    serde_json::from_str(text).expect("JSON")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_frames_come_over_sse() {
    let mut world = World::start(SSE).await;
    world.emit(LOAD, &[("A", 1.0), ("B", 1.0)]);
    let (head, mut raw) =
        Raw::get(world.address, "/events?metric=load&device_id=A", &["Accept: text/event-stream", "Connection: close"])
            .await;
    let head = head.to_lowercase();
    for header in ["200 ok", "text/event-stream", "no-cache", "x-accel-buffering: no", "access-control-allow-origin: *"]
    {
        assert!(head.contains(header), "{head}");
    }
    assert_eq!(event(&mut raw).await.expect("retry"), ["retry: 3000"]);
    let hello = event(&mut raw).await.expect("hello");
    assert_eq!(
        (hello[0].as_str(), &data(&hello)["metrics"][0]["where"]),
        ("event: hello", &json!({"device_id": ["A"]}))
    );
    let snapshot = event(&mut raw).await.expect("a snapshot");
    assert_eq!(snapshot[..2], ["event: snapshot", "id: epoch:1"]);
    assert_eq!(rows(&data(&snapshot)), ["A=1.0"]);
    world.emit(LOAD, &[("B", 2.0)]);
    world.emit(LOAD, &[("A", 3.0)]);
    let update = event(&mut raw).await.expect("an update");
    assert_eq!(update[..2], ["event: update", "id: epoch:3"]);
    assert_eq!(rows(&data(&update)), ["A=3.0"]);
    // As a browser reconnects.
    let (_, mut again) = Raw::get(world.address, "/events?metric=load&device_id=A", &["Last-Event-ID: epoch:3"]).await;
    for kind in ["retry: 3000", "event: hello"] {
        assert_eq!(event(&mut again).await.expect("an event")[0], kind);
    }
    world.emit(LOAD, &[("A", 4.0)]);
    for raw in [&mut raw, &mut again] {
        assert_eq!(rows(&data(&event(raw).await.expect("an update"))), ["A=4.0"]);
    }
    drop(again);
    world.until("one connection less", |world| world.live.status.connections.list().len() == 1).await;
    world.stop();
    assert_eq!(event(&mut raw).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn sse_has_its_options_too() {
    let yaml = "{type: sse, path: /events, event_name: telemetry, required: [device_id], keep_alive: 100ms}";
    let mut world = World::start(yaml).await;
    let (refused, mut body) = Raw::get(world.address, "/events", &[]).await;
    assert!(refused.starts_with("HTTP/1.1 400 "), "{refused}");
    let error = body.read_to("}").await.expect("a body");
    assert_eq!(error, r#"{"error":"`device_id` is required: `?device_id=VALUE,VALUE`","metrics":["load","total"]"#);
    let (_, mut raw) = Raw::get(world.address, "/events?device_id=A", &[]).await;
    assert_eq!(event(&mut raw).await.expect("retry"), ["retry: 3000"]);
    let mut kinds = Vec::new();
    while kinds.len() < 4 {
        let event = event(&mut raw).await.expect("an event");
        assert_eq!(event[0], "event: telemetry");
        kinds.push(data(&event)["type"].as_str().expect("a type").to_owned());
    }
    assert_eq!(kinds, ["hello", "snapshot", "ping", "ping"]);
    world.emit(LOAD, &[("A", 1.0)]);
    let connections = world.live.status.connections.list();
    assert!(connections[0].sent.load(Relaxed) >= 5, "{connections:?}");
}

#[test]
fn check_names_what_is_wrong_and_where() {
    for (yaml, expected) in [
        ("{type: websocket, path: ws}", "`ws` is no path"),
        ("{type: sse, path: '/e?x'}", "`/e?x` is no path"),
        ("{type: websocket, path: /ws, params: {ids: divice_id}}", "did you mean `device_id`?"),
        ("{type: websocket, path: /ws, params: {metric: device_id}}", "parameter `metric` is taken"),
        ("{type: websocket, path: /ws, required: [device]}", "`device` is neither one of `params` nor a key column"),
        ("{type: websocket, path: /ws, queue: 0}", "`queue` is 1 to 100000"),
        ("{type: websocket, path: /ws, keep_alive: 1ms}", "`keep_alive` is at least 100ms"),
        ("{type: websocket, path: /ws, envelope: bare}", "envelope"),
        ("{type: sse, path: /e, event_name: ''}", "`event_name` is one line of text"),
        ("{type: sse, path: /e, colour: red}", "unknown key `colour`"),
    ] {
        let problems = problems_of(yaml, &inputs());
        assert!(
            problems.contains(expected) || expected == "envelope" && problems.contains("bare"),
            "{yaml}: {problems}"
        );
    }
    let mut reserved = inputs();
    reserved[0].shape.keys = vec!["since".into()];
    let problems = problems_of(PLAIN, &reserved);
    assert!(problems.contains("key column `since` of `load` is named like a parameter"), "{problems}");
}
