//! SSE sink: rows go to whoever listens, over plain HTTP.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::stream;
use http_body_util::{BodyExt, StreamBody};
use hyper::StatusCode;
use hyper::body::Frame;
use hyper::header::{ACCESS_CONTROL_ALLOW_ORIGIN, CACHE_CONTROL, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use indexmap::IndexMap;
use pipeline::config::{At, CheckContext, Duration};
use pipeline::error::Result;
use pipeline::http::respond::{error, json, parameters};
use pipeline::http::{Handler, Request, Response};
use pipeline::plugin::{Promise, Sink, SinkConfig, SinkContext, SinkInput, SinkShape};
use schemars::JsonSchema;
use serde::Deserialize;
use tokio::time::{Instant, Interval, MissedTickBehavior, interval_at};
use tokio_tungstenite::tungstenite::Utf8Bytes;

use crate::live::envelope::Wire;
use crate::live::options::{Declared, Options, check, default_keep_alive, default_max_clients, default_queue};
use crate::live::queue::Outgoing;
use crate::live::subscription::Since;
use crate::live::{Caller, Envelope, Hub, HubSink, Membership};

const PAGE: &str = r#"Sends rows as server-sent events to every client that listens, each its own choice of metrics and keys.

A client opens `http://HOST/events` (a browser: `new EventSource(url)`), with `?metric=a,b` (default: all that the sink
receives) and `&COLUMN=v1,v2` on any key column; metrics that lack the column are left out. `params` gives a column
another name in the URL, `required` refuses clients that do not filter. Anything wrong is answered by 400 and a JSON
error that names what there is.

## Writes

One event per emission and distinct subscription; `event:` is the frame's type, or `event_name` if that is set:

    event: update
    id: EPOCH:42
    data: {"type":"update","metric":"load","seq":42,"epoch":"…","timestamp":"2026-11-20T12:00:00.000Z","batch":7,"data":[{…row…}]}

The frames are those of the `websocket` sink: first `hello` and for each metric a `snapshot`, then updates, `gap` and `ping`.
`envelope: event` sends `{"event":"message","data":{…row…}}` per row, `envelope: none` each row bare (event type `message`).

## Delivery

At most once. At most `queue` emissions (and 16 MiB) wait for a client; beyond that the oldest are dropped
(`drop_oldest`), counted, and told to the client by a `gap` event in their place. A slow client never slows the pipeline or
another client. A browser reconnects by itself after 3 s and says in `Last-Event-ID` what it has (others may use
`&since=EPOCH:SEQ`): metrics with nothing newer send no snapshot, all others do.

## Limits

`max_clients` connections (then 503). Browsers open at most six connections to one host over HTTP/1; use one
stream for several metrics. A row over 16 MiB is not sent, but told as a gap.

## Fails when

Never by itself. At shutdown every stream ends after what waits in it.
"#;

/// How long a browser waits before it reconnects.
const RETRY: Utf8Bytes = Utf8Bytes::from_static("retry: 3000\n\n");

/// Configuration of the `sse` sink.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SseConfig {
    /// Path of the stream on the program's HTTP listener, such as `/events`.
    pub path: At<String>,
    /// Stands after `event:` in every event, for clients that listen to one name. Default: the frame's type.
    #[serde(default)]
    pub event_name: Option<At<String>>,
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
    /// Time between pings. Default: 30s, half of the minute after which the usual proxies cut a silent connection. At
    /// least 100ms.
    #[serde(default = "default_keep_alive")]
    pub keep_alive: At<Duration>,
    /// Most emissions that wait for one slow client before it loses the oldest. Default: 100, a second of a hundred a second.
    #[serde(default = "default_queue")]
    pub queue: At<usize>,
    /// Most clients at a time. Default: 10000, some 20 kB each.
    #[serde(default = "default_max_clients")]
    pub max_clients: usize,
}

impl SinkConfig for SseConfig {
    const TYPE: &'static str = "sse";
    const PAGE: &'static str = PAGE;
    const EXAMPLE: &'static str = "{type: sse, path: /events, event_name: telemetry}";
    const PROMISES: &'static [(&'static str, Promise)] = &[("", Promise::Live)];

    fn check(&self, inputs: &[SinkInput], cx: &mut CheckContext<'_>) -> Option<SinkShape> {
        let Self { path, params, required, keep_alive, queue, .. } = self;
        let mut good = true;
        if let Some(name) = &self.event_name
            && (name.is_empty() || name.contains(char::is_control))
        {
            cx.error(name.position, "`event_name` is one line of text");
            good = false;
        }
        check(&Declared { path, params, required, keep_alive, queue }, inputs, cx).filter(|_| good)
    }

    fn build(&self, cx: SinkContext) -> Result<Sink> {
        let routes = cx.routes.clone();
        let options = Options {
            envelope: self.envelope,
            wire: Wire::Sse { event_name: self.event_name.as_ref().map(|name| name.value.clone()) },
            snapshot: self.snapshot.unwrap_or(self.envelope != Envelope::Event),
            params: self.params.iter().map(|(name, column)| (name.clone(), column.value.clone())).collect(),
            required: self.required.iter().map(|name| name.value.clone()).collect(),
            keep_alive: *self.keep_alive.value,
            queue: self.queue.value,
            max_clients: self.max_clients,
        };
        let hub = Hub::new(cx, options);
        routes.mount("GET", &self.path, Arc::new(Events { hub: Arc::clone(&hub) }));
        Ok(Sink::Live(Box::new(HubSink(hub))))
    }
}

/// Answers with a stream of events.
struct Events {
    hub: Arc<Hub>,
}

#[async_trait]
impl Handler for Events {
    async fn handle(&self, request: Request) -> Response {
        let mut response = self.answer(&request);
        // The frames are for any page: who may see them is not a matter of the page's origin.
        response.headers_mut().insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
        response
    }
}

impl Events {
    fn answer(&self, request: &Request) -> Response {
        let catalog = self.hub.catalog();
        let (subscription, since) = match catalog.subscription(&parameters(request.inner.uri())) {
            Ok(wanted) => wanted,
            Err(refusal) => {
                let metrics: Vec<&str> = catalog.metrics.iter().map(|metric| metric.name.as_str()).collect();
                let body = serde_json::json!({"error": refusal.0, "metrics": metrics});
                return json(StatusCode::BAD_REQUEST, &body);
            }
        };
        let place = match self.hub.reserve() {
            Ok(place) => place,
            Err(reason) => {
                let mut response = error(StatusCode::SERVICE_UNAVAILABLE, reason);
                response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("5"));
                return response;
            }
        };
        // A browser that reconnects keeps the URL, so what the header says is newer.
        let last = request.inner.headers().get("last-event-id").and_then(|id| Since::parse(id.to_str().ok()?));
        let membership = place.join(&Caller::of(request), subscription, last.or(since).as_ref());
        let events = stream::unfold(EventStream::new(membership), |mut events| async move {
            let bytes = events.next().await?;
            Some((Ok::<_, Infallible>(Frame::data(bytes)), events))
        });
        let body = StreamBody::new(events).map_err(|never| match never {}).boxed_unsync();
        let mut response = Response::new(body);
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        // nginx would gather the events otherwise.
        headers.insert("X-Accel-Buffering", HeaderValue::from_static("no"));
        response
    }
}

/// The events of one client.
struct EventStream {
    membership: Membership,
    outgoing: Outgoing,
    frames: Vec<Utf8Bytes>,
    keep_alive: Interval,
    stopped: Pin<Box<dyn Future<Output = ()> + Send>>,
    ended: bool,
}

impl EventStream {
    fn new(membership: Membership) -> Self {
        let every = membership.hub().encoder.keep_alive;
        let mut keep_alive = interval_at(Instant::now() + every, every);
        keep_alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (outgoing, stopped) = (membership.outgoing(), Box::pin(membership.hub().stopped()));
        Self { membership, outgoing, frames: vec![RETRY], keep_alive, stopped, ended: false }
    }

    /// The next bytes of the body; `None` is its end.
    async fn next(&mut self) -> Option<Bytes> {
        while !self.ended {
            let taken = self.outgoing.take(&mut self.frames);
            self.ended = taken.ended;
            if !self.frames.is_empty() {
                return Some(self.join());
            }
            if taken.more || self.ended {
                continue;
            }
            let client = self.membership.client();
            tokio::select! {
                () = client.ready() => {}
                // Not asked again: then nothing waits, and the next turn is the last.
                () = &mut self.stopped => client.close(),
                _ = self.keep_alive.tick() => self.frames.extend(self.membership.hub().encoder.ping()),
            }
        }
        None
    }

    /// The taken frames in one piece, so that many small ones are one write.
    fn join(&mut self) -> Bytes {
        let bytes = self.frames.iter().map(|frame| frame.len()).sum();
        let connection = &self.membership.client().connection;
        connection.sent.fetch_add(self.frames.len() as u64, Relaxed);
        connection.sent_bytes.fetch_add(bytes as u64, Relaxed);
        if self.frames.len() == 1
            && let Some(frame) = self.frames.pop()
        {
            return frame.into();
        }
        let mut joined = BytesMut::with_capacity(bytes);
        self.frames.drain(..).for_each(|frame| joined.extend_from_slice(frame.as_bytes()));
        joined.freeze()
    }
}
