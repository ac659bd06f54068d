//! Sinks: where rows go. There are three kinds.
//!
//! - **Staging** (Parquet): rows become durable but invisible in `prepare`, visible in `commit`, both
//!   bound to a checkpoint.
//! - **Outbox** (databases, brokers): the engine keeps rows in a bounded outbox and delivers them in batches,
//!   retrying while the other side is away; only a full outbox pushes back.
//! - **Live** (WebSocket, SSE): rows are handed to whoever listens; slow clients lose rows, by a policy that
//!   is named, bounded and counted.
//!
//! One sink takes rows of several pipelines; each is named by its index in the inputs given to `build`.

use std::path::PathBuf;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use arrow::array::RecordBatch;
use async_trait::async_trait;
use schemars::JsonSchema;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::operator::StreamShape;
use crate::batch::{BATCH_ROWS_MAX, Batch};
use crate::config::tree::Node;
use crate::config::{self, At, CheckContext, deserialize};
use crate::error::Result;
use crate::http::Routes;
use crate::live::Live;
use crate::state::{StateReader, StateWriter};

/// The configuration of a sink: the YAML block without `type`.
pub trait SinkConfig: DeserializeOwned + JsonSchema + Send + Sync + Sized + 'static {
    /// The word after `type:`; a noun in snake_case, the name of the file.
    const TYPE: &'static str;
    /// The page in Markdown: first line one sentence; then what it writes, delivery, limits, fails when.
    const PAGE: &'static str;
    /// YAML of one sink, with `type:`, that checks clean for the example rows of the operators.
    const EXAMPLE: &'static str;
    /// What happens to rows when the process or the other side dies: for each way of using the sink, in Markdown (empty if
    /// there is but one).
    const PROMISES: &'static [(&'static str, Promise)] = &[];
    /// What to use instead where `guarantee: exactly_once` asks for more than the sink can promise.
    const INSTEAD: Option<&'static str> = None;

    /// Reports what is wrong, for the pipelines that name this sink. Pure. `inputs` is empty if none does, or if what
    /// one writes is not known because of its own mistakes: then nothing is wrong for want of a column.
    fn check(&self, inputs: &[SinkInput], cx: &mut CheckContext<'_>) -> Option<SinkShape>;

    /// Makes the running sink. Called once; opens no connection. May create folders.
    fn build(&self, cx: SinkContext) -> Result<Sink>;

    /// The staged files that the state of this sink in a checkpoint names, for `pipeline doctor`. Pure. A sink that stages
    /// none keeps the default.
    fn staged(&self, _state: &mut StateReader<'_>) -> Result<Vec<StagedFile>> {
        Ok(Vec::new())
    }
}

/// A staged file that a checkpoint names: it is there under one of two names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StagedFile {
    /// Name in the folder of staged files.
    pub staged: String,
    /// Where it appears, counted from the folder of the history.
    pub published: PathBuf,
}

/// One pipeline that names the sink.
#[derive(Clone, Debug)]
pub struct SinkInput {
    /// The pipeline's name, which is the metric's name.
    pub metric: String,
    /// What it emits.
    pub shape: StreamShape,
}

/// What the engine must know of a sink before it runs.
#[derive(Clone, Debug, Default)]
pub struct SinkShape {
    /// HTTP routes that `build` will mount.
    pub mounts: Vec<Mount>,
    /// Folder of Parquet history: `FOLDER/METRIC/dt=…/hh=…/*.parquet`.
    pub history: Option<PathBuf>,
    /// Whether it only serves whoever listens now: it keeps no `on_demand` source awake, and takes partial rows.
    pub live: bool,
    /// Whether it takes `Revised` rows (live, history and upsert sinks do).
    pub takes_revised: bool,
    /// What happens to rows when the process or the other side dies.
    pub promise: Promise,
}

/// What happens to rows of a sink when the process or the other side dies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Promise {
    /// None is lost; one may be written again.
    #[default]
    AtLeastOnce,
    /// None is lost, none is written twice.
    ExactlyOnce,
    /// Rows are for whoever listens now.
    Live,
}

impl Promise {
    /// One sentence for pages and `check`.
    pub fn sentence(self) -> &'static str {
        match self {
            Self::AtLeastOnce => {
                "at least once: none is lost; after a crash or a lost connection rows may be written again"
            }
            Self::ExactlyOnce => "exactly once: none is lost, none is written twice",
            Self::Live => "live: whoever listens now gets the rows; history is where they are kept",
        }
    }
}

/// A route on the HTTP listener; two plugins on one are an error.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mount {
    /// `GET`, `POST`, …
    pub method: &'static str,
    /// Such as `/ws`.
    pub path: String,
}

/// What `build` gets.
#[derive(Clone)]
pub struct SinkContext {
    /// The sink's name.
    pub name: String,
    /// The pipelines that name it; `write` gets an index into these.
    pub inputs: Vec<SinkInput>,
    /// The YAML file's folder; relative paths count from here.
    pub folder: PathBuf,
    /// Where to mount HTTP routes.
    pub routes: Routes,
    /// Epoch, latest rows, demand and connections, for live sinks.
    pub live: Arc<Live>,
    /// For a staging sink: rows written but not yet published, per input, for queries.
    pub tails: Vec<HistoryTail>,
}

/// Rows of one pipeline that are not in a published file yet. A query holds the read lock while it lists the
/// files and copies the tail; a sink holds the write lock while it publishes files and drops their rows, so
/// a query sees every row once.
pub type HistoryTail = Arc<RwLock<Vec<RecordBatch>>>;

/// A running sink.
pub enum Sink {
    /// Bound to checkpoints.
    Staging(Box<dyn StagingSink>),
    /// Delivered by the engine. The configuration has the option `batch`: [`BatchOptions`].
    Outbox(Box<dyn OutboxSink>, BatchLimits),
    /// Handed to whoever listens.
    Live(Box<dyn LiveSink>),
}

/// Serves whoever listens now.
pub trait LiveSink: Send {
    /// Hands on one batch. Never blocks: a slow client loses rows and is told so. `number` counts the output
    /// batches of the pipeline, from 1, through restarts.
    fn write(&mut self, input: usize, batch: &Batch, number: u64);
}

/// Writes files that appear with a checkpoint. All methods may block on the disk; they run on their own thread.
pub trait StagingSink: Send {
    /// Takes one batch. Buffers or writes; nothing becomes visible.
    fn write(&mut self, input: usize, batch: &Batch, number: u64) -> Result<()>;

    /// Makes everything written so far durable: in staged files, or in `state` (rows not worth a file yet).
    /// `end` asks to stage all rows, because the process stops. After an error nothing is lost: the rows are
    /// kept, and a later `prepare` includes them.
    fn prepare(&mut self, checkpoint: u64, end: bool, state: &mut StateWriter) -> Result<()>;

    /// The checkpoint is durable: makes its staged files visible. Repeatable: a file already visible is fine.
    /// `oldest_kept` is the oldest checkpoint that a start could still go on from: rows that became visible with a
    /// later one may come again, those of an earlier one may not.
    fn commit(&mut self, checkpoint: u64, oldest_kept: u64) -> Result<()>;

    /// Takes over the state of checkpoint `checkpoint`, then publishes its staged files as `commit` does and
    /// removes staged files that no checkpoint names. Called before any batch; without a checkpoint (number 0, no
    /// state: the run starts anew) and without a state of this sink too. What later checkpoints had made visible is
    /// taken back: its rows come again.
    fn restore(&mut self, checkpoint: u64, state: Option<&mut StateReader<'_>>) -> Result<()>;

    /// What looks after the published files beside the stream, if anything does. Asked for once, after `restore`.
    fn upkeep(&self) -> Option<Arc<dyn Upkeep>> {
        None
    }
}

/// Looks after the published files of a sink while it runs: merges small ones, removes old ones.
///
/// The engine calls it on the threads of the queries, never on those of the stream, one step of one sink at a time:
/// again soon while there is [more](Upkept::more) to do, else every few seconds, and with back-off after an error. The
/// process may be killed, or end, at any instruction of a step.
pub trait Upkeep: Send + Sync {
    /// Does the next piece of work, if there is one; may work on the disk for minutes. `now_us` is the wall clock.
    ///
    /// # Errors
    /// Nothing was changed that a reader could see. An error that repeats itself is shown by `/health`.
    fn step(&self, now_us: i64) -> Result<Upkept>;
}

/// What one step of [`Upkeep`] did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Upkept {
    /// There is more to do now.
    pub more: bool,
    /// Published files that there are.
    pub files: u64,
    /// Files that were merged into fewer.
    pub merged_files: u64,
    /// Hours whose files were merged.
    pub merged_hours: u64,
    /// Hours that were removed because they had become too old.
    pub expired_hours: u64,
}

/// Delivers rows to another server. The engine owns the outbox and the retries.
#[async_trait]
pub trait OutboxSink: Send {
    /// Connects; called again with back-off after a failure. Cancel safe.
    async fn connect(&mut self) -> Result<()>;

    /// Whether the other side keeps the `id` of the last delivery together with its rows, and so takes each row exactly
    /// once. Then only rows of a durable checkpoint are delivered, which come again under the same numbers. Default: no,
    /// at least once; rows are delivered at once.
    fn is_exactly_once(&self) -> bool {
        false
    }

    /// The `id` of the last delivery of an input that the other side has, if it keeps it. Asked once, after the first
    /// connection: the engine's numbers must not lie before it.
    async fn last_delivery(&mut self, _input: usize) -> Result<Option<u64>> {
        Ok(None)
    }

    /// Delivers one chunk of rows of one input, at most [`BatchLimits::rows`].
    ///
    /// `id` counts the rows of the input, up to and with the last one of these; it only grows. After a failure the same
    /// rows come again under the same `id`; after a restart they may be cut differently, so that the first of them are
    /// known to the other side and the rest is not. An error with `Retry::BackOff` makes the engine reconnect and deliver again; one with `Retry::Never`
    /// counts the rows as failed and goes on.
    async fn deliver(&mut self, input: usize, rows: &RecordBatch, id: u64) -> Result<()>;
}

/// When rows in the outbox become a delivery.
#[derive(Clone, Copy, Debug)]
pub struct BatchLimits {
    /// Most rows of one delivery.
    pub rows: usize,
    /// Most time a row waits for others. Zero delivers at once.
    pub every: Duration,
}

/// The option `batch` of every outbox sink: when the rows that wait become a delivery. What is not said is up to the
/// sink.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BatchOptions {
    /// Most rows of one delivery, 1 to 8192.
    pub rows: Option<At<usize>>,
    /// Most time a row waits for others before it is delivered with fewer; `0s` delivers at once.
    pub every: Option<config::Duration>,
}

impl BatchOptions {
    /// Reports a number of rows that no delivery can have.
    pub fn check(&self, cx: &mut CheckContext<'_>) {
        if let Some(rows) = &self.rows
            && !(1..=BATCH_ROWS_MAX).contains(&rows.value)
        {
            cx.error(rows.position, format!("`rows` is 1 to {BATCH_ROWS_MAX}"));
        }
    }

    /// What is said here, the rest from `default`.
    pub fn limits(&self, default: BatchLimits) -> BatchLimits {
        BatchLimits {
            rows: self.rows.as_ref().map_or(default.rows, |rows| rows.value),
            every: self.every.map_or(default.every, |every| every.0),
        }
    }
}

/// One entry of the list of sinks.
#[derive(Clone, Copy)]
pub struct SinkPlugin {
    /// The word after `type:`.
    pub type_name: &'static str,
    /// The page in Markdown.
    pub page: &'static str,
    /// The example block.
    pub example: &'static str,
    /// What happens to rows when the process or the other side dies, for each way of using it.
    pub promises: &'static [(&'static str, Promise)],
    /// What to use instead where more is asked than it can promise.
    pub instead: Option<&'static str>,
    /// JSON Schema of the options.
    pub schema: fn() -> schemars::Schema,
    /// Reads a YAML block.
    pub read: fn(&Node, &mut CheckContext<'_>) -> Option<Box<dyn AnySink>>,
}

/// A sink configuration of any type.
pub trait AnySink: Send + Sync {
    /// See [`SinkConfig::check`].
    fn check(&self, inputs: &[SinkInput], cx: &mut CheckContext<'_>) -> Option<SinkShape>;
    /// See [`SinkConfig::build`].
    fn build(&self, cx: SinkContext) -> Result<Sink>;
    /// See [`SinkConfig::staged`].
    fn staged(&self, state: &mut StateReader<'_>) -> Result<Vec<StagedFile>>;
}

impl<T: SinkConfig> AnySink for T {
    fn check(&self, inputs: &[SinkInput], cx: &mut CheckContext<'_>) -> Option<SinkShape> {
        SinkConfig::check(self, inputs, cx)
    }
    fn build(&self, cx: SinkContext) -> Result<Sink> {
        SinkConfig::build(self, cx)
    }
    fn staged(&self, state: &mut StateReader<'_>) -> Result<Vec<StagedFile>> {
        SinkConfig::staged(self, state)
    }
}

impl SinkPlugin {
    /// The entry of `T`.
    pub const fn of<T: SinkConfig>() -> Self {
        Self {
            type_name: T::TYPE,
            page: T::PAGE,
            example: T::EXAMPLE,
            promises: T::PROMISES,
            instead: T::INSTEAD,
            schema: || schemars::schema_for!(T),
            read: |node, cx| Some(Box::new(deserialize::read::<T>(node, cx)?)),
        }
    }
}
