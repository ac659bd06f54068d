//! WebSocket sink: rows go to whoever is connected.

mod connection;

use std::sync::Arc;

use async_trait::async_trait;
use hyper::header::{CONNECTION, HeaderMap, HeaderValue, RETRY_AFTER, UPGRADE};
use hyper::{Method, StatusCode, Version};
use indexmap::IndexMap;
use pipeline::config::{At, CheckContext, Duration};
use pipeline::error::Result;
use pipeline::http::respond::{error, full, json, parameters};
use pipeline::http::{Handler, Request, Response};
use pipeline::plugin::{Promise, Sink, SinkConfig, SinkContext, SinkInput, SinkShape};
use schemars::JsonSchema;
use serde::Deserialize;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

use crate::live::envelope::Wire;
use crate::live::options::{Declared, Options, check, default_keep_alive, default_max_clients, default_queue};
use crate::live::{Caller, Envelope, Hub, HubSink};

const PAGE: &str = r#"Sends rows to every connected WebSocket client, each its own choice of metrics and keys.

A client connects to `ws://HOST/ws`, with `?metric=a,b` (default: all that the sink receives) and `&COLUMN=v1,v2` on
any key column; metrics that lack the column are left out. `params` gives a column another name in the URL, `required`
refuses clients that do not filter. Anything wrong is answered by an `error` frame and close code 1008, because
a browser cannot read the HTTP answer to a failed handshake.

While connected it may send

    {"type":"subscribe","metric":"load","where":{"device_id":["A","B"]}}
    {"type":"unsubscribe","metric":"load","where":{"device_id":["A"]}}
    ping

`subscribe` adds rows of a metric; if the client had all of its rows it narrows to the ones named. `unsubscribe` takes
rows back, without `where` all of the metric. Each is answered by a snapshot of what the client now has of the
metric, once the snapshot before it has been sent, or by an `error` frame; `ping` by `pong`.

## Writes

One text message per emission and distinct subscription:

    {"type":"update","metric":"load","seq":42,"epoch":"…","timestamp":"2026-11-20T12:00:00.000Z","batch":7,"data":[{…row…}]}

First come `hello` (the metrics with their key columns, the sequence number, `keep_alive_ms`) and for each metric a `snapshot` with the
latest row per key, which replaces what the client has of the metric. A long snapshot comes in parts (`part`, `parts`), of
which the first replaces. Updates follow that are in no snapshot: nothing is missing and nothing comes twice. `ping`
comes every `keep_alive`, beside a WebSocket Ping that must be answered. `seq` numbers the frames of the sink over all its
metrics; filters leave jumps. `batch` is the pipeline's own number of the batch.

`envelope: event` sends `{"event":"message","data":{…row…}}` per row, `ping`, `gap` and `error` alike, and no hello.
`envelope: none` sends each row bare, and nothing else but errors.

## Delivery

At most once. At most `queue` emissions (and 16 MiB) wait for a client; beyond that the oldest are dropped
(`drop_oldest`), counted, and told to the client by `{"type":"gap","metric":"load","lost":3,…}` in their place. A slow client
never slows the pipeline or another client. After a gap `subscribe` again for a fresh snapshot.

`&since=EPOCH:SEQ` (of the last update, or of the last snapshot after hello) spares the snapshots of metrics that have
nothing newer; for all others the snapshot comes.

## Limits

`max_clients` connections (then 503). Messages from clients are text of at most 64 KiB (longer: close 1009; binary: 1003); ten
wrong ones close with 1008. A row over 16 MiB is not sent, but told as a gap. A client is dropped that answers no Ping
until the next, or takes nothing for a minute. Not offered: compression, subprotocols, HTTP/2.

## Fails when

Never by itself. At shutdown every client gets what waits for it and close code 1001.
"#;

/// Configuration of the `websocket` sink.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WebSocketConfig {
    /// Path of the WebSocket on the program's HTTP listener, such as `/ws`.
    pub path: At<String>,
    /// Names of URL parameters for key columns, as `device_ids: device_id`. The column's own name works too. Default: none.
    #[serde(default)]
    pub params: IndexMap<String, At<String>>,
    /// Parameters or key columns without which a client is refused. Default: none, so that a plain connection gets all.
    #[serde(default)]
    pub required: Vec<At<String>>,
    /// What stands around the rows: `metric` (default: a list of rows with metric, sequence number and time), `event` (one
    /// row as `{"event":"message","data":…}`) or `none` (the bare row).
    #[serde(default)]
    pub envelope: Envelope,
    /// Whether a new client first gets the latest row per key. Default: true, so that a dashboard is never empty; false with
    /// `envelope: event`, whose rows are events that happen once.
    #[serde(default)]
    pub snapshot: Option<bool>,
    /// Time between pings. A client that leaves one unanswered until the next is dropped. Default: 30s, half of
    /// the minute after which the usual proxies cut a silent connection. At least 100ms.
    #[serde(default = "default_keep_alive")]
    pub keep_alive: At<Duration>,
    /// Most emissions that wait for one slow client before it loses the oldest. Default: 100, a second of a hundred a second.
    #[serde(default = "default_queue")]
    pub queue: At<usize>,
    /// Most clients at a time. Default: 10000, some 20 kB each.
    #[serde(default = "default_max_clients")]
    pub max_clients: usize,
}

impl SinkConfig for WebSocketConfig {
    const TYPE: &'static str = "websocket";
    const PAGE: &'static str = PAGE;
    const EXAMPLE: &'static str = "{type: websocket, path: /ws, keep_alive: 30s, queue: 100}";
    const PROMISES: &'static [(&'static str, Promise)] = &[("", Promise::Live)];

    fn check(&self, inputs: &[SinkInput], cx: &mut CheckContext<'_>) -> Option<SinkShape> {
        let Self { path, params, required, keep_alive, queue, .. } = self;
        check(&Declared { path, params, required, keep_alive, queue }, inputs, cx)
    }

    fn build(&self, cx: SinkContext) -> Result<Sink> {
        let routes = cx.routes.clone();
        let options = Options {
            envelope: self.envelope,
            wire: Wire::WebSocket,
            snapshot: self.snapshot.unwrap_or(self.envelope != Envelope::Event),
            params: self.params.iter().map(|(name, column)| (name.clone(), column.value.clone())).collect(),
            required: self.required.iter().map(|name| name.value.clone()).collect(),
            keep_alive: *self.keep_alive.value,
            queue: self.queue.value,
            max_clients: self.max_clients,
        };
        let hub = Hub::new(cx, options);
        routes.mount("GET", &self.path, Arc::new(Upgrade { hub: Arc::clone(&hub) }));
        Ok(Sink::Live(Box::new(HubSink(hub))))
    }
}

/// Answers the handshake and hands the connection to its task.
struct Upgrade {
    hub: Arc<Hub>,
}

#[async_trait]
impl Handler for Upgrade {
    async fn handle(&self, mut request: Request) -> Response {
        let accept = match accept_key(&request) {
            Ok(accept) => accept,
            Err(refused) => return *refused,
        };
        let place = match self.hub.reserve() {
            Ok(place) => place,
            Err(reason) => {
                let mut response = error(StatusCode::SERVICE_UNAVAILABLE, reason);
                response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("5"));
                return response;
            }
        };
        let caller = Caller::of(&request);
        let parameters = parameters(request.inner.uri());
        let upgraded = hyper::upgrade::on(&mut request.inner);
        // The connection's driver: it ends with the connection, and after the sink at the latest.
        tokio::spawn(async move {
            if let Ok(upgraded) = upgraded.await {
                connection::serve(upgraded, place, &caller, &parameters).await;
            }
        });
        let mut response = Response::new(full(""));
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        let headers = response.headers_mut();
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
        headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
        headers.insert("Sec-WebSocket-Accept", accept);
        response
    }
}

/// The value of `Sec-WebSocket-Accept`, or the answer to a request that is no WebSocket handshake (RFC 6455, 4.2.1).
fn accept_key(request: &Request) -> std::result::Result<HeaderValue, Box<Response>> {
    let (headers, path) = (request.inner.headers(), request.inner.uri().path());
    let is_upgrade = has_token(headers, "connection", "upgrade") && has_token(headers, "upgrade", "websocket");
    if !is_upgrade || request.inner.method() != Method::GET || request.inner.version() < Version::HTTP_11 {
        let host = headers.get("host").and_then(|host| host.to_str().ok()).unwrap_or("HOST");
        let message = format!("this is a WebSocket; connect to ws://{host}{path}, or wss:// behind TLS");
        return Err(Box::new(upgrade_required(&message)));
    }
    if headers.get("sec-websocket-version").is_none_or(|version| version != "13") {
        return Err(Box::new(upgrade_required("the WebSocket version is 13")));
    }
    let key = headers.get("sec-websocket-key").map(HeaderValue::as_bytes).unwrap_or_default();
    // 16 bytes in base64.
    let accept = (key.len() == 24).then(|| HeaderValue::from_str(&derive_accept_key(key)).ok()).flatten();
    accept.ok_or_else(|| Box::new(error(StatusCode::BAD_REQUEST, "`Sec-WebSocket-Key` is missing or wrong")))
}

fn upgrade_required(message: &str) -> Response {
    let mut response = json(StatusCode::UPGRADE_REQUIRED, &serde_json::json!({"error": message}));
    response.headers_mut().insert(UPGRADE, HeaderValue::from_static("websocket"));
    response.headers_mut().insert("Sec-WebSocket-Version", HeaderValue::from_static("13"));
    response
}

/// Whether a header that is a list holds a word, in any case.
fn has_token(headers: &HeaderMap, name: &str, token: &str) -> bool {
    let values = headers.get_all(name).into_iter().filter_map(|value| value.to_str().ok());
    values.flat_map(|value| value.split(',')).any(|word| word.trim().eq_ignore_ascii_case(token))
}
