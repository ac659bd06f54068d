//! Takes JSON messages by `POST` on the server's own listener.

mod idempotency;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use hyper::StatusCode;
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use pipeline::config::{At, ByteSize, CheckContext, Fields, did_you_mean};
use pipeline::error::{Error, Result};
use pipeline::http::respond::{self, BodyError};
use pipeline::http::{Handler, Request, Response};
use pipeline::plugin::{
    Acknowledger, Decoded, Decoder, Delivery, Mount, PushReader, Reader, Receipts, Record, Rejection, RowError,
    Schedule, Source, SourceConfig, SourceContext, SourceShape,
};
use pipeline::rows::{Cell, Row, RowsBuilder};
use pipeline::schema::FieldType;
use pipeline::status::lock;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::timeout;

use idempotency::{HttpReceipts, Request as RequestId};

const PAGE: &str = "\
Takes JSON messages by `POST` on the server's own listener.

## Emits
With `fields`, one row per JSON object with those columns; a missing field is null, unless `required` names it: then the
message is wrong. Other names are skipped. A body is one object, an array of objects, or one object per line (NDJSON: content type `application/x-ndjson`, or simply several
lines). Without `fields`, the whole body (of `application/x-ndjson`: each line) is one row with the column
`payload: string`, as it came.

The answer comes once the messages are on disk (`checkpoint: {durability: power}`, the default: synced), so that no crash
loses them:

    {\"accepted\":2,\"rejected\":1,\"errors\":[{\"line\":3,\"error\":\"field `x`: expected int, found \\\"fast\\\"\"}]}

An array counts `element` instead of `line`, both from 1; the first 20 errors are listed. Wrong messages are also counted
by the source and go to its `errors:` sink, like those of any other source.

| status | when |
| --- | --- |
| 200 | at least one message was accepted (or an empty array sent) |
| 400 | nothing was accepted: every message is wrong, the body is empty or no JSON |
| 408 | the body took longer than 30 s |
| 413 | the body is longer than `max_body` |
| 422 | another body came with the same `Idempotency-Key` before |
| 503 | the graph is starting, stopping, or busy; `Retry-After` says when to send the same body again |

## Delivery
A message is acknowledged (200) once it is on disk. A client that got no answer, or 503, sends the same body again, with
the same header `Idempotency-Key: ANY-TEXT` as before: then nothing counts twice, and the answer is that of the first time.
Keys are remembered for a day, the newest 65,536 of them, through restarts. Without the header a message that is sent again
counts again; give it an id and use `deduplicate` if that matters.

## Limits
Bodies of at most `max_body`; at most 32 MiB and 1024 requests wait to be accepted, a further one is answered 503. The
content type is not checked beyond NDJSON. Compressed bodies are not read. Anyone who reaches the listener may send.

## Fails when
It has no connection of its own that could fail.
";

/// Most bytes of messages that wait to be accepted, with [`MESSAGE_OVERHEAD_BYTES`] for each; a request beyond is
/// answered 503. A few times the largest usual body, little beside the engine's own inbox.
const WAITING_BYTES_MAX: usize = 32 << 20;
/// What a message costs in memory beside its text, so that a body of many tiny ones is weighed rightly.
const MESSAGE_OVERHEAD_BYTES: usize = 128;
/// Most requests that wait to be taken by the reader; one beyond is answered 503.
const REQUESTS_WAITING_MAX: usize = 1024;
/// Most errors listed in one answer: enough to see what is wrong, and the answer to a body of a million wrong lines
/// stays small.
const ERRORS_LISTED_MAX: usize = 20;
/// How long a client has to send its body; one that trickles must not hold memory for ever.
const BODY_WITHIN: Duration = Duration::from_secs(30);
/// How long a request waits for its messages to be accepted before it is answered 503. Shorter than the minute
/// after which common proxies give up by themselves.
const ACCEPTED_WITHIN: Duration = Duration::from_secs(30);
/// The header by which a client says that a body is the same as before.
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
/// Seconds after which a client answered 503 should send again.
const RETRY_AFTER_S: HeaderValue = HeaderValue::from_static("1");
/// The column without `fields`.
const PAYLOAD: &str = "payload";

/// The YAML block of an `http` source.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HttpConfig {
    /// Path on `server.listen` that takes `POST`, such as `/messages`.
    pub path: At<String>,
    /// Columns with their types. Without it a row is the raw message, in the column `payload: string`.
    #[serde(default)]
    pub fields: Option<Fields>,
    /// Fields without which a message is wrong. Default: none, a missing one is null.
    #[serde(default)]
    pub required: Vec<At<String>>,
    /// Longest body; a longer one is answered 413. Default `1MiB`: thousands of messages at once, and a client
    /// gone wild costs little memory.
    #[serde(default = "max_body")]
    pub max_body: At<ByteSize>,
}

fn max_body() -> At<ByteSize> {
    At::nowhere(ByteSize(1 << 20))
}

impl SourceConfig for HttpConfig {
    const TYPE: &'static str = "http";
    const PAGE: &'static str = PAGE;
    const EXAMPLE: &'static str = "\
type: http
path: /messages
fields: {device_id: string, latency_ms: float, ts: timestamp}
required: [device_id]
";
    const PROMISES: &'static [(&'static str, Delivery)] = &[("", Delivery::Acknowledged)];

    fn check(&self, cx: &mut CheckContext<'_>) -> Option<SourceShape> {
        if !self.path.starts_with('/') {
            let hint = Some(format!("`/{}`", self.path.value));
            cx.error_hint(self.path.position, format!("path `{}` must start with `/`", self.path.value), hint);
        } else if let Some(wrong) = self.path.chars().find(|c| !c.is_ascii_graphic() || "?#%".contains(*c)) {
            cx.error(self.path.position, format!("path `{}` has a `{wrong}`, which no path here has", self.path.value));
        }
        if self.max_body.0 == 0 {
            cx.error(self.max_body.position, "`max_body` must be more than nothing");
        }
        if self.fields.as_ref().is_some_and(Fields::is_empty) {
            let hint = Some("name them, or leave `fields` out for the raw `payload`".to_owned());
            cx.error_hint(cx.position(), "`fields` names no column", hint);
        }
        let names = || self.fields.iter().flat_map(|fields| fields.0.keys());
        for required in &self.required {
            if !names().any(|name| *name == required.value) {
                let hint = did_you_mean(required, names().map(String::as_str));
                cx.error_hint(required.position, format!("`{}` is none of the `fields`", required.value), hint);
            }
        }
        Some(SourceShape {
            schema: Arc::clone(self.columns().rows.schema()),
            delivery: Delivery::Acknowledged,
            schedule: Schedule::Continuous,
            bounded: false,
            can_be_on_demand: false,
            mounts: vec![Mount { method: "POST", path: self.path.value.clone() }],
        })
    }

    fn build(&self, cx: SourceContext) -> Result<Box<dyn Source>> {
        let inlet = Arc::new(Inlet::default());
        let handler = Post {
            source: cx.name,
            columns: self.columns(),
            body_bytes_max: usize::try_from(self.max_body.0).unwrap_or(usize::MAX),
            inlet: Arc::clone(&inlet),
        };
        cx.routes.mount("POST", &self.path, Arc::new(handler));
        Ok(Box::new(Http { inlet }))
    }

    fn decoder(&self) -> Option<Box<dyn Decoder>> {
        Some(Box::new(self.columns()))
    }

    fn receipts(&self) -> Option<Box<dyn Receipts>> {
        Some(Box::new(HttpReceipts::default()))
    }
}

impl HttpConfig {
    fn columns(&self) -> Columns {
        let Some(fields) = &self.fields else {
            let rows = RowsBuilder::new(&[(PAYLOAD, FieldType::String)], &Fields::default());
            return Columns { rows, required: Vec::new(), raw: true };
        };
        let required = self.required.iter().filter_map(|name| fields.0.get_index_of(&name.value)).collect();
        Columns { rows: RowsBuilder::new(&[], fields), required, raw: false }
    }
}

/// From messages to rows: the decoder, and what the handler asks whether a message is right.
struct Columns {
    rows: RowsBuilder,
    /// Columns that must not be null.
    required: Vec<usize>,
    /// Whether there are no `fields`.
    raw: bool,
}

impl Columns {
    fn set<'a>(&self, row: &mut Row<'a>, message: &'a [u8]) -> Result<(), String> {
        if self.raw {
            return self.rows.set(row, 0, Cell::Bytes(message));
        }
        self.rows.set_json(row, message)?;
        self.rows.require(row, &self.required)
    }
}

impl Decoder for Columns {
    fn decode(&mut self, records: &[Record]) -> Result<Decoded> {
        let mut record_of_row = Vec::with_capacity(records.len());
        let mut errors = Vec::new();
        for (index, record) in (0u32..).zip(records) {
            let mut row = self.rows.row();
            match self.set(&mut row, &record.payload) {
                Ok(()) => {
                    self.rows.push(row);
                    record_of_row.push(index);
                }
                Err(wrong) => {
                    self.rows.discard(row);
                    errors.push(RowError::new(wrong, &record.payload));
                }
            }
        }
        Ok(Decoded { rows: self.rows.finish()?, record_of_row, errors })
    }
}

/// The running source: opens and reopens the way from the handler to the reader.
struct Http {
    inlet: Arc<Inlet>,
}

#[async_trait]
impl Source for Http {
    async fn connect(&mut self, _position: Option<&[u8]>) -> Result<Reader> {
        let waiting = Arc::default();
        let posted = self.inlet.open();
        let reader = Inbox { posted, waiting: Arc::clone(&waiting), next_token: 0 };
        Ok(Reader::Push(Box::new(reader), Box::new(Replies { waiting })))
    }
}

/// The handler's end. Without a reader at the other end, posting fails.
struct Inlet {
    sender: Mutex<Option<mpsc::Sender<Posted>>>,
    /// One permit per byte that may wait.
    room: Arc<Semaphore>,
}

/// The messages of one request. Dropping it tells the handler that they were not accepted.
struct Posted {
    messages: Vec<Bytes>,
    id: Option<RequestId>,
    reply: oneshot::Sender<Verdict>,
    room: OwnedSemaphorePermit,
}

/// What became of a request's messages.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Verdict {
    /// They are on disk.
    Accepted,
    /// The source cannot take them.
    Failed,
    /// They never can be taken, for this reason.
    Refused(String),
}

impl Default for Inlet {
    fn default() -> Self {
        Self { sender: Mutex::default(), room: Arc::new(Semaphore::new(WAITING_BYTES_MAX)) }
    }
}

impl Inlet {
    /// A new way in. What waited for an earlier reader is dropped, and so refused.
    fn open(&self) -> mpsc::Receiver<Posted> {
        let (sender, receiver) = mpsc::channel(REQUESTS_WAITING_MAX);
        *lock(&self.sender) = Some(sender);
        receiver
    }

    /// Whether a reader is there and some room is left; asked before a body is read.
    fn ready(&self) -> Result<(), Refusal> {
        let is_read = lock(&self.sender).as_ref().is_some_and(|sender| !sender.is_closed());
        match (is_read, self.room.available_permits()) {
            (false, _) => Err(Refusal::NotRead),
            (true, 0) => Err(Refusal::Full),
            (true, _) => Ok(()),
        }
    }

    /// Hands messages to the reader. What comes back tells whether they were accepted.
    fn post(&self, messages: Vec<Bytes>, id: Option<RequestId>) -> Result<oneshot::Receiver<Verdict>, Refusal> {
        let bytes: usize = messages.iter().map(|message| message.len() + MESSAGE_OVERHEAD_BYTES).sum();
        // A body larger than all the room (`max_body` says how large) waits alone.
        let weight = u32::try_from(bytes.min(WAITING_BYTES_MAX)).unwrap_or(u32::MAX);
        let room = Arc::clone(&self.room).try_acquire_many_owned(weight).map_err(|_| Refusal::Full)?;
        let (reply, accepted) = oneshot::channel();
        let sender = lock(&self.sender);
        let sender = sender.as_ref().ok_or(Refusal::NotRead)?;
        sender.try_send(Posted { messages, id, reply, room }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => Refusal::Full,
            mpsc::error::TrySendError::Closed(_) => Refusal::NotRead,
        })?;
        Ok(accepted)
    }
}

/// A request that is read but not answered yet; its records have the tokens from `first` on.
struct Waiting {
    first: u64,
    count: u64,
    /// Records of it that the engine has said nothing about yet.
    unsettled: u64,
    verdict: Verdict,
    reply: oneshot::Sender<Verdict>,
    /// Held until the answer: what waits for the disk still counts.
    _room: OwnedSemaphorePermit,
}

type WaitingRequests = Arc<Mutex<VecDeque<Waiting>>>;

struct Inbox {
    posted: mpsc::Receiver<Posted>,
    waiting: WaitingRequests,
    next_token: u64,
}

#[async_trait]
impl PushReader for Inbox {
    async fn next(&mut self) -> Result<Vec<Record>> {
        let mut posted = Vec::new();
        if self.posted.recv_many(&mut posted, REQUESTS_WAITING_MAX).await == 0 {
            return Err(Error::outside("a later connection has taken over"));
        }
        let mut records = Vec::with_capacity(posted.iter().map(|request| request.messages.len()).sum());
        let mut waiting = lock(&self.waiting);
        for Posted { messages, id, reply, room } in posted {
            let (first, count) = (self.next_token, messages.len() as u64);
            self.next_token += count;
            let tokens = first..;
            records.extend((0..).zip(messages).zip(tokens).map(|((number, payload), token)| {
                let metadata = id.map_or_else(Bytes::new, |id| id.metadata(number));
                Record { payload, metadata, token }
            }));
            let verdict = Verdict::Accepted;
            waiting.push_back(Waiting { first, count, unsettled: count, verdict, reply, _room: room });
        }
        Ok(records)
    }
}

struct Replies {
    waiting: WaitingRequests,
}

#[async_trait]
impl Acknowledger for Replies {
    async fn acknowledge(&mut self, tokens: &[u64]) -> Result<()> {
        self.settle(tokens, &Verdict::Accepted);
        Ok(())
    }

    async fn reject(&mut self, tokens: &[u64], reason: &Rejection) -> Result<()> {
        let verdict = match reason {
            Rejection::Failed => Verdict::Failed,
            Rejection::Refused(reason) => Verdict::Refused(reason.clone()),
        };
        self.settle(tokens, &verdict);
        Ok(())
    }
}

impl Replies {
    /// Notes what became of records, and answers the requests of which all records are settled.
    fn settle(&self, tokens: &[u64], verdict: &Verdict) {
        let mut waiting = lock(&self.waiting);
        for &token in tokens {
            let index = waiting.partition_point(|request| request.first + request.count <= token);
            if let Some(request) = waiting.get_mut(index).filter(|request| request.first <= token) {
                request.unsettled = request.unsettled.saturating_sub(1);
                if *verdict != Verdict::Accepted {
                    request.verdict = verdict.clone();
                }
            }
        }
        while waiting.front().is_some_and(|request| request.unsettled == 0) {
            if let Some(request) = waiting.pop_front() {
                // The client may have gone away.
                let _ = request.reply.send(request.verdict);
            }
        }
    }
}

/// Answers `POST`.
struct Post {
    source: String,
    columns: Columns,
    body_bytes_max: usize,
    inlet: Arc<Inlet>,
}

#[async_trait]
impl Handler for Post {
    async fn handle(&self, request: Request) -> Response {
        match self.take(request).await {
            Ok(answer) => answer.response(),
            Err(refusal) => refusal.response(self),
        }
    }
}

impl Post {
    async fn take(&self, request: Request) -> Result<Answer, Refusal> {
        let (head, body) = request.inner.into_parts();
        if let Some(encoding) = header(&head.headers, &CONTENT_ENCODING).filter(|e| !e.eq_ignore_ascii_case("identity"))
        {
            return Err(Refusal::Wrong(format!("content encoding `{encoding}` is not read; send the body plain")));
        }
        self.inlet.ready()?;
        let body = timeout(BODY_WITHIN, respond::read_body(body, self.body_bytes_max));
        let body = body.await.map_err(|_| Refusal::Slow)?.map_err(|error| match error {
            BodyError::TooLong => Refusal::TooLong,
            BodyError::Broken(error) => Refusal::Wrong(format!("the body broke off: {error}")),
        })?;
        let by_lines = header(&head.headers, &CONTENT_TYPE).is_some_and(is_lines);
        let messages =
            split(&body, by_lines, self.columns.raw).ok_or_else(|| Refusal::Wrong("the body is empty".into()))?;
        let answer = self.examine(&messages);
        if !messages.list.is_empty() {
            // The wrong ones go along: the engine counts them and hands them to `errors:`.
            let id = head.headers.get(&IDEMPOTENCY_KEY).map(|key| RequestId::new(key.as_bytes(), &body));
            let messages = messages.list.into_iter().map(|(_, message)| message).collect();
            let verdict = self.inlet.post(messages, id)?;
            match timeout(ACCEPTED_WITHIN, verdict).await {
                Ok(Ok(Verdict::Accepted)) => {}
                Ok(Ok(Verdict::Refused(reason))) => return Err(Refusal::Contradicts(reason)),
                Ok(Ok(Verdict::Failed) | Err(_)) => return Err(Refusal::NotRead),
                Err(_) => return Err(Refusal::Full),
            }
        }
        Ok(answer)
    }

    /// What the client is told if the messages are accepted.
    fn examine(&self, messages: &Messages) -> Answer {
        let mut answer = Answer { accepted: 0, rejected: 0, errors: Vec::new() };
        for (number, message) in &messages.list {
            // A row of its own: what an earlier message set would pass for a required field.
            let mut row = self.columns.rows.row_apart();
            match self.columns.set(&mut row, message) {
                Ok(()) => answer.accepted += 1,
                Err(error) => {
                    answer.rejected += 1;
                    if answer.errors.len() < ERRORS_LISTED_MAX {
                        answer.errors.push(json!({messages.unit: number, "error": error}));
                    }
                }
            }
        }
        answer
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Whether a content type says one message per line.
fn is_lines(content_type: &str) -> bool {
    let mime = content_type.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    ["ndjson", "jsonl", "jsonlines", "json-lines"].iter().any(|word| mime.trim_end_matches("+json").ends_with(word))
}

/// The messages of a body, each with its number from 1.
struct Messages {
    /// What the numbers count: `line` or `element`.
    unit: &'static str,
    list: Vec<(usize, Bytes)>,
}

/// Cuts a body into messages. What is no JSON at all stays one message, to be found wrong like any other.
/// `None` if there is nothing.
fn split(body: &Bytes, by_lines: bool, raw: bool) -> Option<Messages> {
    let text = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    let trimmed = text.trim_ascii();
    if trimmed.is_empty() {
        return None;
    }
    if by_lines {
        return Some(lines(body, text));
    }
    let whole = |text: &[u8]| Some(Messages { unit: "line", list: vec![(1, body.slice_ref(text))] });
    if raw {
        return whole(text);
    }
    if trimmed.starts_with(b"[") {
        let Ok(elements) = serde_json::from_slice::<Vec<&RawValue>>(trimmed) else { return whole(trimmed) };
        let list = elements.iter().map(|element| body.slice_ref(element.get().as_bytes()));
        return Some(Messages { unit: "element", list: (1..).zip(list).collect() });
    }
    if serde_json::from_slice::<&RawValue>(trimmed).is_ok() {
        return whole(trimmed);
    }
    // Several lines of which one is an object by itself are lines; otherwise it is one broken object.
    let lines = lines(body, text);
    let is_object =
        |line: &Bytes| line.trim_ascii().starts_with(b"{") && serde_json::from_slice::<&RawValue>(line).is_ok();
    if lines.list.iter().any(|(_, line)| is_object(line)) { Some(lines) } else { whole(trimmed) }
}

/// Each line that is not blank.
fn lines(body: &Bytes, text: &[u8]) -> Messages {
    let lines = text.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    let list = (1..).zip(lines).filter(|(_, line)| !line.trim_ascii().is_empty());
    Messages { unit: "line", list: list.map(|(number, line)| (number, body.slice_ref(line))).collect() }
}

/// The answer to a request whose messages were accepted, the right and the wrong ones.
struct Answer {
    accepted: usize,
    rejected: usize,
    errors: Vec<Value>,
}

impl Answer {
    fn response(self) -> Response {
        let status = if self.accepted == 0 && self.rejected > 0 { StatusCode::BAD_REQUEST } else { StatusCode::OK };
        respond::json(status, &json!({"accepted": self.accepted, "rejected": self.rejected, "errors": self.errors}))
    }
}

/// Why a request was not taken.
enum Refusal {
    /// It can never be taken.
    Wrong(String),
    /// Longer than `max_body`.
    TooLong,
    /// It contradicts an earlier request.
    Contradicts(String),
    /// The body did not come.
    Slow,
    /// Too much is waiting.
    Full,
    /// The graph does not read: it starts or stops.
    NotRead,
}

impl Refusal {
    fn response(self, post: &Post) -> Response {
        let source = &post.source;
        match self {
            Self::Wrong(message) => respond::error(StatusCode::BAD_REQUEST, message),
            Self::Contradicts(message) => respond::error(StatusCode::UNPROCESSABLE_ENTITY, message),
            Self::TooLong => {
                let limit = ByteSize(post.body_bytes_max as u64);
                let message = format!("the body is longer than {limit} (`max_body` of source `{source}`)");
                respond::error(StatusCode::PAYLOAD_TOO_LARGE, message)
            }
            Self::Slow => respond::error(StatusCode::REQUEST_TIMEOUT, "the body took too long"),
            Self::Full => later(format!("source `{source}` is busy; send again")),
            Self::NotRead => later(format!("source `{source}` is not running; send again")),
        }
    }
}

fn later(message: String) -> Response {
    let mut response = respond::error(StatusCode::SERVICE_UNAVAILABLE, message);
    response.headers_mut().insert(RETRY_AFTER, RETRY_AFTER_S);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_cut_into_messages() {
        let lines = |n: &[usize]| n.iter().map(|n| ("line", *n)).collect::<Vec<_>>();
        let elements = |n: &[usize]| n.iter().map(|n| ("element", *n)).collect::<Vec<_>>();
        for (body, by_lines, raw, texts, numbers) in [
            ("{\"a\":1}", false, false, vec!["{\"a\":1}"], lines(&[1])),
            ("\u{feff} {\"a\":\n1}\n", false, false, vec!["{\"a\":\n1}"], lines(&[1])),
            ("[{\"a\":1}, 2,\n[]]", false, false, vec!["{\"a\":1}", "2", "[]"], elements(&[1, 2, 3])),
            ("[]", false, false, vec![], vec![]),
            ("[{\"a\":1}", false, false, vec!["[{\"a\":1}"], lines(&[1])),
            ("{\"a\":1}\r\n\n{\"a\":2}", false, false, vec!["{\"a\":1}", "{\"a\":2}"], lines(&[1, 3])),
            ("{\"a\"\n{\"a\":2}\n", false, false, vec!["{\"a\"", "{\"a\":2}"], lines(&[1, 2])),
            ("{\n\"a\":\n", false, false, vec!["{\n\"a\":"], lines(&[1])),
            ("[1]\n[2]\n", true, false, vec!["[1]", "[2]"], lines(&[1, 2])),
            (" any\ntext\n", false, true, vec![" any\ntext\n"], lines(&[1])),
            ("any\ntext\n", true, true, vec!["any", "text"], lines(&[1, 2])),
        ] {
            let bytes = Bytes::copy_from_slice(body.as_bytes());
            let messages = split(&bytes, by_lines, raw).expect(body);
            let found: Vec<_> = messages.list.iter().map(|(_, m)| String::from_utf8_lossy(m).into_owned()).collect();
            assert_eq!(found, texts, "{body}");
            assert_eq!(messages.list.iter().map(|(n, _)| (messages.unit, *n)).collect::<Vec<_>>(), numbers, "{body}");
        }
        for empty in ["", " \n", "\u{feff}\r\n"] {
            assert!(split(&Bytes::from_static(empty.as_bytes()), true, false).is_none(), "{empty:?}");
        }
    }

    #[test]
    fn requests_beyond_the_room_are_refused_until_others_are_answered() {
        let body = |bytes: usize| vec![Bytes::from(vec![b' '; bytes])];
        let inlet = Inlet::default();
        assert!(matches!(inlet.post(body(1), None), Err(Refusal::NotRead)));
        let mut posted = inlet.open();
        for bytes in [WAITING_BYTES_MAX / 2, WAITING_BYTES_MAX * 2] {
            assert!(inlet.ready().is_ok());
            let answer = inlet.post(body(bytes), None).ok().expect("there is room");
            let busy = inlet.post(body(WAITING_BYTES_MAX / 2), None);
            assert!(matches!(busy, Err(Refusal::Full)), "half of the room and more is taken");
            drop((posted.try_recv().expect("what was posted"), answer));
        }
        for _ in 0..REQUESTS_WAITING_MAX {
            assert!(inlet.post(body(1), None).is_ok());
        }
        assert!(matches!(inlet.post(body(1), None), Err(Refusal::Full)));
        drop(posted);
        assert!(matches!(inlet.ready(), Err(Refusal::NotRead)));
    }

    #[test]
    fn content_types_of_lines_are_known() {
        for (content_type, expected) in [
            ("application/x-ndjson", true),
            ("application/jsonl; charset=utf-8", true),
            ("Application/NDJSON", true),
            ("application/json", false),
            ("text/plain", false),
        ] {
            assert_eq!(is_lines(content_type), expected, "{content_type}");
        }
    }

    #[test]
    fn decoding_gives_rows_and_errors_of_their_records() {
        let config = HttpConfig {
            path: At::nowhere("/m".to_owned()),
            fields: Some(Fields::of([("x", FieldType::Int), ("y", FieldType::Int)])),
            required: vec![At::nowhere("x".to_owned())],
            max_body: max_body(),
        };
        let record = |text: &'static str| Record { payload: text.into(), metadata: Bytes::new(), token: 0 };
        let mut decoder = config.decoder().expect("a push source decodes");
        let records = ["{\"x\":1}", "{\"x\":\"a\"}", "oops", "{\"x\":2}", "{\"y\":1}"].map(record);
        let decoded = decoder.decode(&records).expect("rows");
        assert_eq!(decoded.rows.num_rows(), 2);
        assert_eq!(decoded.record_of_row, [0, 3]);
        assert_eq!(decoded.errors[0].message, "field `x`: expected int, found \"a\"");
        assert_eq!(decoded.errors[1].payload, "oops");
        assert_eq!(decoded.errors[2].message, "field `x`: required, but missing or null");
    }
}
