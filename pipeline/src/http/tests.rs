//! The engine's own routes behind a real listener, as clients see them.

use std::sync::Arc;

use arrow::array::{Int64Array, RecordBatch, StringArray};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::api::{self, Summary};
use super::{Routes, respond, server};
use crate::batch::{Batch, Stage, Times};
use crate::history::History;
use crate::live::Live;
use crate::schema::{FieldType, schema_of};
use crate::status::{NodeKind, NodeState, NodeStatus, Status};

/// A listener with the engine's routes, a source `devices`, the keyed metric `load` and the metric `total` without keys.
struct Served {
    address: std::net::SocketAddr,
    live: Arc<Live>,
    source: Arc<NodeStatus>,
    _server: server::Server,
}

/// What came back.
#[derive(Debug)]
struct Answer {
    status: u16,
    /// Lines `name: value`, names in lower case.
    head: Vec<(String, String)>,
    body: String,
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        self.head.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

async fn serve() -> Served {
    let status = Arc::new(Status::default());
    let source = status.node(NodeKind::Source, "devices", "mqtt");
    let metrics = [("load".to_owned(), vec!["device".to_owned()]), ("total".to_owned(), Vec::new())];
    let live = Arc::new(Live::new("e1".to_owned(), status, metrics));
    let history = Arc::new(History::new(Vec::new()).expect("a history"));
    let routes = Routes::default();
    let page = ("/", "text/html; charset=utf-8", "<p>é</p>");
    api::mount(&routes, &live, &history, Summary::new(&[], &[], &[]), &[page]);
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = listener.local_addr().expect("its address");
    Served { address, live, source, _server: server::start(listener, routes) }
}

impl Served {
    async fn ask(&self, method: &str, path: &str, headers: &str) -> Answer {
        let mut stream = TcpStream::connect(self.address).await.expect("a connection");
        let request = format!("{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{headers}\r\n");
        stream.write_all(request.as_bytes()).await.expect("a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.expect("an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        let mut lines = head.lines();
        let status = lines.next().and_then(|line| line.split(' ').nth(1)?.parse().ok()).expect("a status");
        let header = |line: &str| {
            let (name, value) = line.split_once(": ").expect("a header");
            (name.to_ascii_lowercase(), value.to_owned())
        };
        Answer { status, head: lines.map(header).collect(), body: body.to_owned() }
    }

    async fn get(&self, path: &str) -> Answer {
        self.ask("GET", path, "").await
    }

    fn update(&self, rows: &[(&str, i64)], number: u64) {
        let devices: StringArray = rows.iter().map(|(device, _)| Some(*device)).collect();
        let values: Int64Array = rows.iter().map(|(_, value)| *value).collect();
        let schema = schema_of([("device", FieldType::String), ("value", FieldType::Int)]);
        let batch = RecordBatch::try_new(schema, vec![Arc::new(devices), Arc::new(values)]).expect("rows");
        let batch = Batch::new(batch, Times::constant(0, 0, 0, rows.len()), Stage::Final).expect("a batch");
        self.live.update("load", &batch, number);
    }
}

#[tokio::test]
async fn what_is_not_there_is_told_with_the_nearest_that_is() {
    let served = serve().await;
    for (method, path, status, allow, error) in [
        ("GET", "/metric", 404, None, "nothing at `/metric`; did you mean `/metrics`?"),
        ("GET", "/api/v1/pipeline?x=1", 404, None, "nothing at `/api/v1/pipeline`; did you mean `/api/v1/pipelines`?"),
        ("GET", "/api/v1/metrics/laod", 404, None, "no metric `laod`; did you mean `load`?"),
        ("POST", "/health", 405, Some("GET, HEAD"), "`/health` takes GET, HEAD"),
        ("GET", "/api/v1/query", 405, Some("POST"), "`/api/v1/query` takes POST"),
        (
            "GET",
            "/api/v1/metrics/load?devise=a",
            400,
            None,
            "`devise` is no key column of `load`; its keys are: device",
        ),
    ] {
        let answer = served.ask(method, path, "").await;
        assert_eq!((answer.status, answer.header("allow")), (status, allow), "{method} {path}");
        assert_eq!(answer.header("content-type"), Some("application/json"), "{method} {path}");
        assert_eq!(answer.json(), json!({"error": error}), "{method} {path}");
    }
}

#[tokio::test]
async fn a_head_is_the_head_of_the_get() {
    let served = serve().await;
    served.update(&[("a", 1)], 1);
    for path in ["/", "/metrics", "/api/v1/pipelines", "/api/v1/metrics/load", "/nothing", "/api/v1/query"] {
        let (get, head) = (served.get(path).await, served.ask("HEAD", path, "").await);
        let without_date = |answer: &Answer| {
            let head = answer.head.iter().filter(|(name, _)| name != "date").cloned();
            (answer.status, head.collect::<Vec<_>>())
        };
        assert_eq!(without_date(&head), without_date(&get), "{path}");
        assert_eq!(head.header("content-length"), Some(get.body.len().to_string().as_str()), "{path}");
        assert_eq!(head.body, "", "{path}");
    }
}

#[tokio::test]
async fn health_and_readiness_follow_the_nodes() {
    let served = serve().await;
    for (state, health, reason, ready) in [
        (NodeState::Starting, "degraded", Some(("starting", "not connected yet")), 503),
        (NodeState::Healthy, "healthy", None, 200),
        // Once ready, a broker that is away is a matter of health alone.
        (NodeState::Retrying("refused".to_owned()), "degraded", Some(("retrying", "refused")), 200),
        (NodeState::Ended, "healthy", None, 200),
    ] {
        served.source.set_state(state.clone());
        let answer = served.get("/health").await;
        assert_eq!((answer.status, &answer.json()["status"]), (200, &json!(health)), "{state:?}");
        let reasons = reason.map(|(word, text)| json!([{"node": "source devices", "state": word, "reason": text}]));
        assert_eq!(answer.json().get("reasons"), reasons.as_ref(), "{state:?}");
        let answer = served.get("/ready").await;
        assert_eq!(answer.status, ready, "{state:?}");
        assert_eq!(answer.header("retry-after"), (ready == 503).then_some("1"), "{state:?}");
    }
}

#[tokio::test]
async fn the_latest_rows_come_with_a_tag_that_changes_with_them() {
    let served = serve().await;
    let path = "/api/v1/metrics/load";
    let data = |answer: &Answer| answer.json()["data"].clone();
    assert_eq!(data(&served.get(path).await), json!([]), "no row yet");
    served.update(&[("a", 1), ("b", 2), ("a", 3)], 7);
    let answer = served.get(path).await;
    assert_eq!(data(&answer), json!([{"device": "a", "value": 3}, {"device": "b", "value": 2}]));
    assert_eq!((answer.header("etag"), answer.header("cache-control")), (Some("\"e1-7\""), Some("no-cache")));
    assert_eq!(answer.json()["batch"], 7);
    assert_eq!(data(&served.get(&format!("{path}?device=b,c")).await), json!([{"device": "b", "value": 2}]));
    for (known, status) in [
        ("\"e1-7\"", 304),
        ("W/\"e1-7\"", 304),
        ("\"x\", W/\"e1-7\"", 304),
        ("\"x,y\" ,\"e1-7\"", 304),
        ("*", 304),
        ("\"e1-6\"", 200),
        ("e1-7", 200),
        ("\"a, \"e1-7\"\"", 200),
    ] {
        let answer = served.ask("GET", path, &format!("if-none-match: {known}\r\n")).await;
        assert_eq!((answer.status, answer.body.is_empty()), (status, status == 304), "{known}");
        assert_eq!(answer.header("etag"), Some("\"e1-7\""), "{known}");
    }
    served.update(&[("a", 4)], 8);
    assert_eq!(served.ask("GET", path, "if-none-match: \"e1-7\"\r\n").await.status, 200);
    assert!(served.live.is_wanted("load"), "a poller counts as demand");
}

#[tokio::test]
async fn prometheus_reads_families_with_help_and_type_before_their_samples() {
    let served = serve().await;
    served.source.rows_out.fetch_add(5, std::sync::atomic::Ordering::Relaxed);
    let answer = served.get("/metrics").await;
    assert_eq!(answer.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    assert!(answer.body.ends_with('\n'));
    let mut family = String::new();
    let mut lines = answer.body.lines();
    while let Some(line) = lines.next() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, text) = help.split_once(' ').expect("a help text");
            assert!(!text.is_empty() && name.starts_with("tailwater_"), "{line}");
            name.clone_into(&mut family);
            let kind = lines.next().and_then(|line| line.strip_prefix(&format!("# TYPE {name} "))).expect("a type");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            continue;
        }
        let (sample, value) = line.rsplit_once(' ').expect("a value");
        assert_eq!(sample.split('{').next(), Some(family.as_str()), "{line}");
        assert!(value.parse::<f64>().is_ok(), "{line}");
    }
    let expected = "tailwater_rows_out_total{kind=\"source\",node=\"devices\",type=\"mqtt\"} 5\n";
    assert!(answer.body.contains(expected), "{}", answer.body);
}

#[tokio::test]
async fn stats_count_subscribers_and_keys_of_every_metric() {
    let served = serve().await;
    served.update(&[("a", 1), ("b", 2), ("a", 3)], 1);
    let one = served.live.subscribe(["load".to_owned(), "total".to_owned()]);
    let _other = served.live.subscribe(["load".to_owned()]);
    let stats = served.get("/api/v1/stats").await.json();
    assert_eq!(stats["subscribers"], json!({"load": 2, "total": 1}));
    assert_eq!((&stats["active_subscribers"], &stats["keys"]), (&json!(3), &json!({"load": 2})));
    drop(one);
    assert_eq!(served.get("/api/v1/stats").await.json()["active_subscribers"], 1);
}

#[test]
fn parameters_are_decoded_once() {
    for (query, expected) in [
        ("a=1&b=x%20y+z", vec![("a", "1"), ("b", "x y z")]),
        ("a&&b=&c=d=e", vec![("a", ""), ("b", ""), ("c", "d=e")]),
        ("a=%2526&b=%zz%", vec![("a", "%26"), ("b", "%zz%")]),
        ("%C3%A9=%FF", vec![("é", "\u{fffd}")]),
    ] {
        let uri = format!("/x?{query}").parse().expect("a URI");
        let found = respond::parameters(&uri);
        let found: Vec<(&str, &str)> = found.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        assert_eq!(found, expected, "{query}");
    }
}
