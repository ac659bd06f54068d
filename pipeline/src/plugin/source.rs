//! Sources: where rows come from.
//!
//! A source is *pull* or *push*.
//!
//! - **Pull** (SQL, files, polls): the engine asks for the next rows and notes the position after them. The
//!   position is in the checkpoint; after a restart the source goes on from there.
//! - **Push** (MQTT, HTTP): records arrive by themselves, each with an acknowledgement token. The engine
//!   stamps the time of receipt, writes the records to the inbox on disk, and acknowledges them in the order of
//!   receipt once they are there. [`Decoder::decode`] is apart and pure: after a restart the records that no
//!   checkpoint covers are decoded again. [`Receipts`] tell a record that comes again from a new one.
//!
//! The reader runs in a task of its own, so a pending [`PullReader::next`] or [`PushReader::next`] is not
//! disturbed by checkpoints. It is dropped only at stop, or when the engine reconnects.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use bytes::Bytes;
use futures::future::BoxFuture;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;

use super::sink::Mount;
use crate::config::tree::Node;
use crate::config::{CheckContext, Fields, deserialize};
use crate::error::{Error, Result};
use crate::http::Routes;
use crate::state::{StateReader, StateWriter};
use crate::status::Status;

/// The configuration of a source: the YAML block without `type`, `event_time`, `errors` and `on_demand`,
/// which the engine reads.
pub trait SourceConfig: DeserializeOwned + JsonSchema + Send + Sync + Sized + 'static {
    /// The word after `type:`; a noun in snake_case, the name of the file.
    const TYPE: &'static str;
    /// The page in Markdown: first line one sentence; then what it emits, delivery, limits, fails when.
    const PAGE: &'static str;
    /// YAML of one source named `example`, with `type:`, that checks clean: the block below its name.
    const EXAMPLE: &'static str;
    /// What happens to rows when the process dies: for each way of using the source, in Markdown (empty if there is but one).
    const PROMISES: &'static [(&'static str, Delivery)] = &[];
    /// What to use instead where `guarantee: exactly_once` asks for more than the source can promise.
    const INSTEAD: Option<&'static str> = None;

    /// Reports what is wrong and says what the source emits. Pure: no I/O of any kind.
    /// The shape is given whenever the columns can be told, also where another option is wrong: then the pipelines can be
    /// checked all the same. `None` if it cannot be told; then at least one problem was reported.
    fn check(&self, cx: &mut CheckContext<'_>) -> Option<SourceShape>;

    /// Makes the running source. Called once, after `check` found nothing wrong. Opens no connection.
    fn build(&self, cx: SourceContext) -> Result<Box<dyn Source>>;

    /// Decodes the records of a push source. Pull sources keep the default.
    fn decoder(&self) -> Option<Box<dyn Decoder>> {
        None
    }

    /// Tells the records of a push source that come again. Default: each record is a new one.
    fn receipts(&self) -> Option<Box<dyn Receipts>> {
        None
    }

    /// What gives the positions of a [`Delivery::Replayable`] source their meaning, as text: where its rows are and by what
    /// they are ordered; no password, no limit, no pace. While it stays the same the source goes on from its position after
    /// other options were edited, and must understand it. Default: all options, as they are written.
    fn identity(&self) -> Option<String> {
        None
    }

    /// Connects and finds out the columns, for `pipeline fields`.
    fn discover(&self, _cx: SourceContext) -> BoxFuture<'_, Result<Fields>> {
        Box::pin(async {
            Err(Error::user(format!("`{}` sources have fixed columns; nothing to find out", Self::TYPE)))
        })
    }
}

/// What a source emits, known from the YAML alone.
#[derive(Clone, Debug)]
pub struct SourceShape {
    /// Columns, all nullable.
    pub schema: SchemaRef,
    /// What happens to rows when the process dies.
    pub delivery: Delivery,
    /// When the engine asks for the next rows.
    pub schedule: Schedule,
    /// Whether the source ends by itself (a file).
    pub bounded: bool,
    /// Whether `on_demand: true` makes sense: polled snapshots, which nobody misses while nobody looks.
    pub can_be_on_demand: bool,
    /// HTTP routes that `build` will mount.
    pub mounts: Vec<Mount>,
}

/// What happens to rows when the process dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Read again from the position in the checkpoint: nothing lost, nothing twice.
    Replayable,
    /// Acknowledged to the sender once they are on disk; unacknowledged records come again.
    Acknowledged,
    /// Rows sent while nobody reads are lost.
    BestEffort,
    /// A sample of a state; there is nothing to lose between samples.
    Sampled,
}

impl Delivery {
    /// One sentence for pages and `check`.
    pub fn sentence(self) -> &'static str {
        match self {
            Self::Replayable => "read again from the position in the checkpoint",
            Self::Acknowledged => {
                "acknowledged to the sender once they are on disk; what was not acknowledged comes again"
            }
            Self::BestEffort => "best effort: rows sent while the process is away are lost",
            Self::Sampled => "a sample of the state at each poll",
        }
    }

    /// Whether no row is lost and none counts twice, through crashes of the process.
    pub fn is_exact(self) -> bool {
        matches!(self, Self::Replayable | Self::Acknowledged)
    }
}

/// When the engine calls a pull reader's `next`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Schedule {
    /// At once after the rows of the last call were taken; `next` itself waits for new ones.
    Continuous,
    /// Every so often, first at once; a call that takes longer delays the next one.
    Every(Duration),
}

/// What `build` gets.
#[derive(Clone)]
pub struct SourceContext {
    /// The source's name.
    pub name: String,
    /// The YAML file's folder; relative paths count from here.
    pub folder: PathBuf,
    /// The state folder (`checkpoint.dir`); a source may keep a small file of its own here.
    pub state_dir: PathBuf,
    /// Where to mount HTTP routes.
    pub routes: Routes,
    /// Counters of all nodes, for the source that reports them.
    pub status: Arc<Status>,
}

/// A running source.
#[async_trait]
pub trait Source: Send {
    /// Connects, and is called again with back-off after a failure or after a reader failed.
    ///
    /// `position` is what the last rows taken carried, or what the checkpoint held; `None` at the very first
    /// start. Return only when the source really receives (an MQTT source after SUBACK): the engine then
    /// reports it healthy. Cancel safe: may be dropped at stop.
    async fn connect(&mut self, position: Option<&[u8]>) -> Result<Reader>;

    /// Waits until what was acknowledged has left. Called once, at the stop, when the reader of the last connection is
    /// dropped; its acknowledger follows when all that was read is taken in, and a few seconds later the engine waits
    /// no more. Default: nothing to do.
    async fn close(&mut self) {}
}

/// A live connection.
pub enum Reader {
    /// Rows on request.
    Pull(Box<dyn PullReader>),
    /// Records by themselves, and the way to acknowledge them. Both end with the connection.
    Push(Box<dyn PushReader>, Box<dyn Acknowledger>),
}

/// Rows on request.
#[async_trait]
pub trait PullReader: Send {
    /// The next rows, at most [`BATCH_ROWS_MAX`](crate::batch::BATCH_ROWS_MAX) of them.
    ///
    /// Called by one task, again after each return, as [`Schedule`] says. `Ok(None)` is the end of a bounded
    /// source. May return no rows (an idle poll). An error with [`Retry::BackOff`](crate::error::Retry) makes
    /// the engine reconnect at the last position. Blocking work belongs into `spawn_blocking`.
    async fn next(&mut self) -> Result<Option<Pulled>>;
}

/// Rows of a pull source.
#[derive(Debug)]
pub struct Pulled {
    /// The rows, with the schema of the [`SourceShape`].
    pub rows: RecordBatch,
    /// Rows that could not be read.
    pub errors: Vec<RowError>,
    /// Where to go on after these rows: the source's own encoding, opaque to the engine.
    pub position: Vec<u8>,
    /// Whether more rows are waiting: the engine then calls `next` again at once, whatever the schedule.
    pub more: bool,
}

/// Records by themselves.
#[async_trait]
pub trait PushReader: Send {
    /// Waits for records and returns all that are there, at least one.
    ///
    /// Polled by one task all the time, also to keep the connection alive; the engine stops polling only when
    /// its bounded inbox is full. An error makes the engine reconnect.
    async fn next(&mut self) -> Result<Vec<Record>>;
}

/// One message as it arrived.
#[derive(Clone, Debug)]
pub struct Record {
    /// The message.
    pub payload: Bytes,
    /// What the source knows beside it (an MQTT topic); its own encoding, kept with the record.
    pub metadata: Bytes,
    /// Names the record in [`Acknowledger::acknowledge`]; of this connection only.
    pub token: u64,
}

/// Confirms records to their sender.
#[async_trait]
pub trait Acknowledger: Send {
    /// These records are on disk (of a source whose [`Delivery`] is not `Acknowledged`: in the graph). Called in the
    /// order of receipt, never for records of an earlier connection. An error makes the engine reconnect.
    async fn acknowledge(&mut self, tokens: &[u64]) -> Result<()>;

    /// The engine could not accept these records, because the decoder failed as a whole or [`Receipts`] refused them.
    /// They are not confirmed.
    async fn reject(&mut self, _tokens: &[u64], _reason: &Rejection) -> Result<()> {
        Ok(())
    }
}

/// Why records were not accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// The source cannot take records any more.
    Failed,
    /// [`Receipt::Refused`], with its reason.
    Refused(String),
}

/// What a source remembers of the records that it has received, so that none that is sent again counts twice.
///
/// Pure and deterministic: told of the same records in the same order, it is the same memory. It is kept with the
/// inbox and survives a restart.
pub trait Receipts: Send {
    /// Notes a record, received at `ingest_us` (microseconds since 1970), unless it was received before.
    fn receive(&mut self, record: &Record, ingest_us: i64) -> Receipt;

    /// The whole memory, for a restart.
    fn snapshot(&self, state: &mut StateWriter);

    /// Takes over what [`Self::snapshot`] wrote.
    fn restore(&mut self, state: &mut StateReader<'_>) -> Result<()>;
}

/// What [`Receipts`] say of a record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Receipt {
    /// Not seen before.
    New,
    /// Received before: to be acknowledged, but not to be counted again.
    Repeated,
    /// Contradicts one that was received before; the reason is for its sender.
    Refused(String),
}

/// Turns records into rows. Pure and deterministic: the same records give the same rows.
pub trait Decoder: Send {
    /// Decodes records in order. A record may give no row, one, or many; a wrong one gives an error and the
    /// others go on.
    fn decode(&mut self, records: &[Record]) -> Result<Decoded>;
}

/// Rows of decoded records.
#[derive(Debug)]
pub struct Decoded {
    /// The rows, with the schema of the [`SourceShape`].
    pub rows: RecordBatch,
    /// For each row, the index of the record it came from.
    pub record_of_row: Vec<u32>,
    /// What could not be decoded.
    pub errors: Vec<RowError>,
}

/// A row that could not be read. It is counted and goes to the source's `errors:` sink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowError {
    /// What is wrong, with the place: ``field `latency_ms`: expected float, found "fast"``.
    pub message: String,
    /// The row or message as it came, cut to [`EXCERPT_BYTES_MAX`] bytes.
    pub payload: String,
}

/// Longest part of a wrong row that is kept for its error.
pub const EXCERPT_BYTES_MAX: usize = 1024;

impl RowError {
    /// An error about `payload`, cut to a readable length.
    pub fn new(message: impl Into<String>, payload: &[u8]) -> Self {
        let cut = &payload[..payload.len().min(EXCERPT_BYTES_MAX)];
        Self { message: message.into(), payload: String::from_utf8_lossy(cut).into_owned() }
    }
}

/// A source configuration of any type.
pub trait AnySource: Send + Sync {
    /// See [`SourceConfig::check`].
    fn check(&self, cx: &mut CheckContext<'_>) -> Option<SourceShape>;
    /// See [`SourceConfig::build`].
    fn build(&self, cx: SourceContext) -> Result<Box<dyn Source>>;
    /// See [`SourceConfig::decoder`].
    fn decoder(&self) -> Option<Box<dyn Decoder>>;
    /// See [`SourceConfig::receipts`].
    fn receipts(&self) -> Option<Box<dyn Receipts>>;
    /// See [`SourceConfig::identity`].
    fn identity(&self) -> Option<String>;
    /// See [`SourceConfig::discover`].
    fn discover(&self, cx: SourceContext) -> BoxFuture<'_, Result<Fields>>;
}

impl<T: SourceConfig> AnySource for T {
    fn check(&self, cx: &mut CheckContext<'_>) -> Option<SourceShape> {
        SourceConfig::check(self, cx)
    }
    fn build(&self, cx: SourceContext) -> Result<Box<dyn Source>> {
        SourceConfig::build(self, cx)
    }
    fn decoder(&self) -> Option<Box<dyn Decoder>> {
        SourceConfig::decoder(self)
    }
    fn receipts(&self) -> Option<Box<dyn Receipts>> {
        SourceConfig::receipts(self)
    }
    fn identity(&self) -> Option<String> {
        SourceConfig::identity(self)
    }
    fn discover(&self, cx: SourceContext) -> BoxFuture<'_, Result<Fields>> {
        SourceConfig::discover(self, cx)
    }
}

/// One entry of the list of sources.
#[derive(Clone, Copy)]
pub struct SourcePlugin {
    /// The word after `type:`.
    pub type_name: &'static str,
    /// The page in Markdown.
    pub page: &'static str,
    /// The example block.
    pub example: &'static str,
    /// What happens to rows when the process dies, for each way of using it.
    pub promises: &'static [(&'static str, Delivery)],
    /// What to use instead where more is asked than it can promise.
    pub instead: Option<&'static str>,
    /// JSON Schema of the options.
    pub schema: fn() -> schemars::Schema,
    /// Reads a YAML block.
    pub read: fn(&Node, &mut CheckContext<'_>) -> Option<Box<dyn AnySource>>,
    /// Reads what is left of a YAML block when the wrong parts are taken out.
    pub read_rest: fn(&Node, &mut CheckContext<'_>) -> Option<Box<dyn AnySource>>,
}

impl SourcePlugin {
    /// The entry of `T`.
    pub const fn of<T: SourceConfig>() -> Self {
        Self {
            type_name: T::TYPE,
            page: T::PAGE,
            example: T::EXAMPLE,
            promises: T::PROMISES,
            instead: T::INSTEAD,
            schema: || schemars::schema_for!(T),
            read: |node, cx| Some(Box::new(deserialize::read::<T>(node, cx)?)),
            read_rest: |node, cx| Some(Box::new(deserialize::read_rest::<T>(node, cx)?)),
        }
    }
}
