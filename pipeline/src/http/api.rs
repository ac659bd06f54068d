//! The engine's own routes: health, metrics, the graph, the latest rows, connections, history.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use async_trait::async_trait;
use hyper::StatusCode;
use hyper::header::{CACHE_CONTROL, ETAG, HeaderValue, RETRY_AFTER};
use serde_json::{Value, json};

use super::{Handler, Request, Response, Routes, respond};
use crate::graph::{GraphPipeline, GraphSink, GraphSource, Producer};
use crate::history::History;
use crate::history::http::QueryHandler;
use crate::live::{KeyText, Latest, Live};
use crate::schema::type_word;
use crate::status::{FilesStatus, NodeKind, NodeState, NodeStatus};
use crate::time::{format_us, now_us};

/// Where the latest rows of a metric are: below this.
const METRICS_PATH: &str = "/api/v1/metrics/";

/// The graph as JSON, made before it starts.
pub struct Summary {
    sources: Vec<Value>,
    pipelines: Vec<Value>,
    sinks: Vec<Value>,
}

impl Summary {
    /// Describes a checked graph.
    pub fn new(sources: &[GraphSource], pipelines: &[GraphPipeline], sinks: &[GraphSink]) -> Self {
        let columns = |schema: &arrow::datatypes::SchemaRef| -> Value {
            let list = schema.fields().iter().map(|f| json!({"name": f.name(), "type": type_word(f)}));
            list.collect()
        };
        let producer = |producer: &Producer| match producer {
            Producer::Source(index) | Producer::SourceErrors(index) => sources[*index].name.clone(),
            Producer::Pipeline(index) => pipelines[*index].name.clone(),
        };
        let source = |s: &GraphSource| {
            json!({
                "name": s.name, "type": s.type_name, "columns": columns(&s.shape.schema),
                "on_demand": s.on_demand, "delivery": s.shape.delivery.sentence(),
            })
        };
        let pipeline = |p: &GraphPipeline| {
            let from: Vec<String> = p.inputs.iter().map(|input| producer(&input.producer)).collect();
            let to: Vec<&str> = p.to.iter().map(|index| sinks[*index].name.as_str()).collect();
            json!({
                "name": p.name, "from": from, "steps": p.step_names, "to": to,
                "keys": p.shape.keys, "columns": columns(&p.shape.schema),
            })
        };
        let sink = |s: &GraphSink| {
            let metrics: Vec<&str> = s.inputs.iter().map(|input| input.metric.as_str()).collect();
            let path = s.shape.mounts.first().map(|mount| mount.path.as_str());
            json!({"name": s.name, "type": s.type_name, "metrics": metrics, "path": path})
        };
        Self {
            sources: sources.iter().map(source).collect(),
            pipelines: pipelines.iter().map(pipeline).collect(),
            sinks: sinks.iter().map(sink).collect(),
        }
    }
}

/// Mounts the engine's routes and the pages (path, content type, text).
pub fn mount(
    routes: &Routes,
    live: &Arc<Live>,
    history: &Arc<History>,
    summary: Summary,
    pages: &[(&'static str, &'static str, &'static str)],
) {
    let api = |what: What| -> Arc<dyn Handler> { Arc::new(Api { live: Arc::clone(live), what }) };
    routes.mount("GET", "/health", api(What::Health));
    routes.mount("GET", "/ready", api(What::Ready));
    routes.mount("GET", "/metrics", api(What::Prometheus));
    routes.mount("GET", "/api/v1/pipelines", api(What::Pipelines(summary)));
    routes.mount("GET", METRICS_PATH, api(What::Latest));
    routes.mount("GET", "/api/v1/stats", api(What::Stats));
    routes.mount("GET", "/api/v1/connections", api(What::Connections));
    routes.mount("POST", "/api/v1/query", Arc::new(QueryHandler::new(Arc::clone(history), Default::default())));
    for (path, content_type, text) in pages {
        routes.mount("GET", path, Arc::new(Page { content_type, text }));
    }
}

/// A page of the program itself.
struct Page {
    content_type: &'static str,
    text: &'static str,
}

#[async_trait]
impl Handler for Page {
    async fn handle(&self, _request: Request) -> Response {
        let mut response = respond::answer(StatusCode::OK, self.content_type, self.text);
        // The page belongs to the running binary: another version may be there after a restart.
        response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        response
    }
}

struct Api {
    live: Arc<Live>,
    what: What,
}

enum What {
    Health,
    Ready,
    Prometheus,
    Pipelines(Summary),
    Latest,
    Stats,
    Connections,
}

#[async_trait]
impl Handler for Api {
    async fn handle(&self, request: Request) -> Response {
        match &self.what {
            What::Health => respond::json(StatusCode::OK, &self.health()),
            What::Ready => self.ready(),
            What::Prometheus => {
                respond::answer(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", prometheus(&self.live))
            }
            What::Pipelines(summary) => respond::json(StatusCode::OK, &self.pipelines(summary)),
            What::Latest => self.latest(&request),
            What::Stats => respond::json(StatusCode::OK, &self.stats()),
            What::Connections => respond::json(StatusCode::OK, &self.connections()),
        }
    }
}

impl Api {
    /// Always 200 while the process answers: a broker that is away is no reason to restart the process.
    fn health(&self) -> Value {
        let reasons = self.live.status.reasons();
        let mut health = json!({
            "status": if reasons.is_empty() { "healthy" } else { "degraded" },
            "version": env!("CARGO_PKG_VERSION"),
            "uptime_seconds": (now_us() - self.live.status.started_us) / 1_000_000,
            "nodes": self.live.status.nodes().len(),
        });
        if !reasons.is_empty() {
            health["reasons"] = json!(reasons);
        }
        health
    }

    fn ready(&self) -> Response {
        if self.live.status.reasons().is_empty() || self.live.status.was_healthy() {
            return respond::json(StatusCode::OK, &json!({"status": "ready"}));
        }
        let mut response = respond::json(StatusCode::SERVICE_UNAVAILABLE, &self.health());
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
        response
    }

    fn pipelines(&self, summary: &Summary) -> Value {
        let nodes = self.live.status.nodes();
        let with = |entries: &[Value], kind: NodeKind| -> Vec<Value> {
            let add = |entry: &Value| {
                let mut entry = entry.clone();
                let name = entry["name"].as_str().unwrap_or_default();
                if let Some(node) = nodes.iter().find(|node| node.kind == kind && node.name == name) {
                    entry["status"] = node_status(node);
                }
                entry
            };
            entries.iter().map(add).collect()
        };
        json!({
            "epoch": self.live.epoch,
            "sources": with(&summary.sources, NodeKind::Source),
            "pipelines": with(&summary.pipelines, NodeKind::Pipeline),
            "sinks": with(&summary.sinks, NodeKind::Sink),
        })
    }

    /// The latest row per key, filtered by `COLUMN=v1,v2`, with an ETag that changes with the rows.
    fn latest(&self, request: &Request) -> Response {
        let name = request.inner.uri().path().strip_prefix(METRICS_PATH).unwrap_or_default();
        let Some(keys) = self.live.keys(name) else {
            let hint = crate::config::did_you_mean(name, self.live.metrics());
            let hint = hint.map(|hint| format!("; {hint}")).unwrap_or_default();
            return respond::error(StatusCode::NOT_FOUND, format!("no metric `{name}`{hint}"));
        };
        let mut filters: Vec<(usize, Vec<String>)> = Vec::new();
        for (column, values) in respond::parameters(request.inner.uri()) {
            let Some(index) = keys.iter().position(|key| *key == column) else {
                let message = format!("`{column}` is no key column of `{name}`; its keys are: {}", keys.join(", "));
                return respond::error(StatusCode::BAD_REQUEST, message);
            };
            filters.push((index, values.split(',').map(str::to_owned).collect()));
        }
        self.live.want_for_a_minute(name);
        let wanted = |key: &KeyText| filters.iter().all(|(index, values)| values.iter().any(|v| **v == *key[*index]));
        let latest = self.live.latest_where(name, wanted).unwrap_or_default();
        let tag = format!("\"{}-{}\"", self.live.epoch, latest.number);
        let mut response = if respond::is_known(request.inner.headers(), &tag) {
            respond::answer(StatusCode::NOT_MODIFIED, "application/json", "")
        } else {
            respond::answer(StatusCode::OK, "application/json", latest_body(name, &self.live.epoch, &latest))
        };
        let headers = response.headers_mut();
        if let Ok(tag) = HeaderValue::from_str(&tag) {
            headers.insert(ETAG, tag);
        }
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        response
    }

    /// Totals of the live connections; who subscribes to what; how many keys (devices, say) each metric knows.
    fn stats(&self) -> Value {
        let live = &self.live;
        let totals = live.status.connections.totals();
        let subscribers: BTreeMap<&str, u64> = live.metrics().map(|name| (name, live.subscribers(name))).collect();
        let keyed = live.metrics().filter(|name| live.keys(name).is_some_and(|keys| !keys.is_empty()));
        let keys: BTreeMap<&str, usize> = keyed.map(|name| (name, live.keys_seen(name))).collect();
        let nodes = live.status.nodes();
        let sources = nodes.iter().filter(|node| node.kind == NodeKind::Source);
        let mut stats = json!(totals);
        stats["has_subscribers"] = (totals.active_connections > 0).into();
        stats["active_subscribers"] = subscribers.values().sum::<u64>().into();
        stats["subscribers"] = json!(subscribers);
        stats["keys"] = json!(keys);
        stats["uptime_seconds"] = ((now_us() - live.status.started_us) / 1_000_000).into();
        stats["total_messages_processed"] = sources.map(|node| node.rows_out.load(Relaxed)).sum::<u64>().into();
        stats
    }

    fn connections(&self) -> Value {
        let connections = &self.live.status.connections;
        let open: Vec<Value> = connections
            .list()
            .iter()
            .map(|c| {
                json!({
                    "id": c.id, "sink": c.sink, "address": c.address, "agent": c.agent,
                    "connected_at": format_us(c.connected_us),
                    "duration_seconds": (now_us() - c.connected_us) as f64 / 1e6,
                    "sent": c.sent.load(Relaxed), "sent_bytes": c.sent_bytes.load(Relaxed),
                    "received": c.received.load(Relaxed), "dropped": c.dropped.load(Relaxed),
                    "errors": c.errors.load(Relaxed),
                })
            })
            .collect();
        json!({"open": open, "closed": connections.closed()})
    }
}

/// `{"metric":…,"epoch":…,"batch":…,"timestamp":…,"data":[…]}`, the rows as they were encoded once.
fn latest_body(name: &str, epoch: &str, latest: &Latest) -> String {
    let timestamp =
        if latest.number == 0 { "null".to_owned() } else { format!("\"{}\"", format_us(latest.updated_us)) };
    let mut body = format!(
        "{{\"metric\":\"{name}\",\"epoch\":\"{epoch}\",\"batch\":{},\"timestamp\":{timestamp},\"data\":[",
        latest.number
    );
    for (index, row) in latest.rows.iter().enumerate() {
        if index > 0 {
            body.push(',');
        }
        body.push_str(row);
    }
    body.push_str("]}");
    body
}

fn node_status(node: &NodeStatus) -> Value {
    let state = node.state();
    let newest = node.event_us.load(Relaxed);
    let mut status = json!({
        "state": state.as_str(),
        "rows_in": node.rows_in.load(Relaxed),
        "rows_out": node.rows_out.load(Relaxed),
        "batches_out": node.batches_out.load(Relaxed),
        "errors": node.errors.load(Relaxed),
        "late_rows": node.late_rows.load(Relaxed),
        "dropped_rows": node.dropped_rows.load(Relaxed),
        "polls": node.polls.load(Relaxed),
        "queue": node.queue.load(Relaxed),
    });
    if newest > i64::MIN && newest < i64::MAX {
        status["newest_event_time"] = format_us(newest).into();
        status["lag_seconds"] = ((now_us().saturating_sub(newest)) as f64 / 1e6).into();
    }
    if let Some(reason) = state.reason() {
        status["reason"] = reason.into();
    }
    if let Some(files) = node.files.get() {
        for (_, name, _, read) in FILE_FAMILIES {
            status[name] = read(files).load(Relaxed).into();
        }
    }
    status
}

/// Kind, name, help, and where it is counted.
type FileFamily = (&'static str, &'static str, &'static str, fn(&FilesStatus) -> &AtomicU64);

/// What `/metrics` and the API tell of a sink's published files.
const FILE_FAMILIES: [FileFamily; 5] = [
    ("gauge", "files", "Published files.", |f| &f.files),
    ("counter", "merged_files", "Published files that were merged into fewer.", |f| &f.merged_files),
    ("counter", "merged_hours", "Hours of history whose files were merged.", |f| &f.merged_hours),
    ("counter", "expired_hours", "Hours of history removed by their age.", |f| &f.expired_hours),
    ("counter", "files_failures", "Failed tries to merge or remove published files.", |f| &f.failures),
];

/// The text format of Prometheus, version 0.0.4.
fn prometheus(live: &Live) -> String {
    let nodes = live.status.nodes();
    let mut text = String::new();
    type Read = fn(&NodeStatus) -> u64;
    let families: [(&str, &str, &str, Read); 9] = [
        ("tailwater_rows_in_total", "counter", "Rows taken in.", |n| n.rows_in.load(Relaxed)),
        ("tailwater_rows_out_total", "counter", "Rows given out.", |n| n.rows_out.load(Relaxed)),
        ("tailwater_batches_out_total", "counter", "Batches given out.", |n| n.batches_out.load(Relaxed)),
        ("tailwater_errors_total", "counter", "Wrong rows, failed connections and deliveries.", |n| {
            n.errors.load(Relaxed)
        }),
        ("tailwater_late_rows_total", "counter", "Rows that came too late for their window.", |n| {
            n.late_rows.load(Relaxed)
        }),
        ("tailwater_dropped_rows_total", "counter", "Rows dropped by a named policy.", |n| {
            n.dropped_rows.load(Relaxed)
        }),
        ("tailwater_polls_total", "counter", "Polls of a source.", |n| n.polls.load(Relaxed)),
        ("tailwater_queue_depth", "gauge", "Batches or records that wait to be taken in.", |n| n.queue.load(Relaxed)),
        ("tailwater_node_healthy", "gauge", "1 if the node is connected and works.", |n| {
            u64::from(matches!(n.state(), NodeState::Healthy | NodeState::Ended))
        }),
    ];
    for (name, kind, help, read) in families {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for node in &nodes {
            let (kind, node_name, type_name) = (node.kind.as_str(), &node.name, &node.type_name);
            let _ =
                writeln!(text, "{name}{{kind=\"{kind}\",node=\"{node_name}\",type=\"{type_name}\"}} {}", read(node));
        }
    }
    for (kind, name, help, read) in FILE_FAMILIES {
        let name = format!("tailwater_{name}{}", if kind == "counter" { "_total" } else { "" });
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (node, files) in nodes.iter().filter_map(|node| Some((node, node.files.get()?))) {
            let _ = writeln!(text, "{name}{{sink=\"{}\"}} {}", node.name, read(files).load(Relaxed));
        }
    }
    let totals = live.status.connections.totals();
    for (name, kind, help, value) in [
        ("tailwater_connections", "gauge", "Open live connections.", totals.active_connections),
        ("tailwater_connections_total", "counter", "Live connections since the start.", totals.total_connections),
        ("tailwater_frames_sent_total", "counter", "Frames sent to live clients.", totals.messages_sent),
        ("tailwater_frames_dropped_total", "counter", "Frames lost by slow live clients.", totals.messages_dropped),
    ] {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
    }
    text
}
