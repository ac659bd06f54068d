//! History: SQL over the Parquet files that a graph has written, and over the rows not published yet.
//!
//! [`History`] knows the tables of one graph and runs read-only queries on threads of its own. Each query lists the files
//! anew, so that it sees what was published a moment ago; only the footers of files are kept for the next one.
//!
//! | name in SQL | rows |
//! | --- | --- |
//! | `PIPELINE` | the newest revision per key and window |
//! | `versions.PIPELINE` | all revisions |
//! | `SINK.PIPELINE` | as `PIPELINE`, in that sink; the only way when the pipeline is in two Parquet sinks |
//!
//! A table has the pipeline's columns, then `event_time` and `ingest_time` unless the pipeline has columns of
//! these names, then `dt` (date) and `hh` (int): the UTC day and hour of publishing, which rule out whole
//! folders. A row that is not published yet counts as published now.
//!
//! SQL is DataFusion's, with `arg_max(value, order)` and `arg_min` (also `max_by`, `min_by`): `arg_max(avg_ms, event_time)`
//! grouped by `device_id` is the latest value of every device.

mod arg_max;
pub mod files;
mod footers;
pub mod http;
pub mod output;
mod query;
mod size;
mod store;
mod table;

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use arrow::array::{Array, RecordBatch};
use arrow::datatypes::SchemaRef;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::error::{Blame, Error, Result};
use crate::plugin::HistoryTail;
use output::Format;
use query::Footers;

/// Longest SQL text. Longer ones are generated, not written, and the planner is recursive.
pub const SQL_BYTES_MAX: usize = 32 * 1024;

/// Most queries at one time. Each may use its whole memory limit, so this bounds the memory of all.
pub const QUERIES_MAX: usize = 4;

/// Most threads that work on queries. More would take the processor from the graph, which comes first.
const THREADS_MAX: usize = 4;

/// Stack of a query thread. The planner recurses once per nested operator; the deepest query that is allowed
/// needs a part of this in a debug build. Only touched pages are memory.
const THREAD_STACK_BYTES: usize = 64 << 20;

/// Longest wait for the query threads at the end; a query that was given up may still be in the middle of a batch.
const END_WITHIN: Duration = Duration::from_secs(5);

/// Most threads that read files for queries; they wait for the disk.
const READ_THREADS_MAX: usize = 8;

/// One pipeline in one Parquet sink.
#[derive(Clone, Debug)]
pub struct Table {
    /// The pipeline's name.
    pub name: String,
    /// The sink's name.
    pub sink: String,
    /// The sink's folder, as its shape names it: the files lie in `FOLDER/NAME/dt=…/hh=…`.
    pub folder: PathBuf,
    /// The visible columns of the pipeline as the YAML has them now. Files may have fewer (null) or more (unseen).
    pub schema: SchemaRef,
    /// Rows of the running sink that are not published yet. `None` outside the process that runs the graph.
    pub tail: Option<HistoryTail>,
}

/// What one query may use.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Most time from start to end.
    pub time: Duration,
    /// Most bytes of memory for sorting, grouping, joining, and for the result; nothing is spilled to disk.
    pub memory: usize,
    /// Most rows of the result.
    pub rows: usize,
}

impl Default for Limits {
    /// 30 seconds, 512 MiB, 100,000 rows: enough for a dashboard or a person, and a server survives
    /// [`QUERIES_MAX`] of them.
    fn default() -> Self {
        Self { time: Duration::from_secs(30), memory: 512 << 20, rows: 100_000 }
    }
}

/// Bytes of the rows themselves: a slice counts for its part of the buffers.
pub fn bytes_of(rows: &RecordBatch) -> usize {
    let sliced = |array: &dyn Array| {
        let whole = array.get_array_memory_size();
        array.to_data().get_slice_memory_size().map_or(whole, |part| part.min(whole))
    };
    rows.columns().iter().map(|column| sliced(column.as_ref())).sum()
}

/// The rows of a query.
#[derive(Clone, Debug)]
pub struct QueryResult {
    /// Columns of the result.
    pub schema: SchemaRef,
    /// Rows, in order.
    pub batches: Vec<RecordBatch>,
}

impl QueryResult {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.batches.iter().map(RecordBatch::num_rows).sum()
    }
}

/// Why there is no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueryErrorKind {
    /// The text is wrong, or asks for something else than reading.
    Sql,
    /// Longer than [`Limits::time`].
    Time,
    /// More than [`Limits::memory`].
    Memory,
    /// More than [`Limits::rows`].
    Rows,
    /// [`QUERIES_MAX`] are running.
    Busy,
    /// A file could not be read.
    Files,
    /// A mistake of Tailwater or DataFusion.
    Internal,
}

/// A query that gave no result.
#[derive(Clone, Debug)]
pub struct QueryError {
    /// What kind of failure it is.
    pub kind: QueryErrorKind,
    /// What is wrong, for the author of the query.
    pub message: String,
    /// What to write instead, if we know.
    pub hint: Option<String>,
}

impl QueryError {
    pub(crate) fn new(kind: QueryErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), hint: None }
    }
}

impl fmt::Display for QueryError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        self.hint.as_ref().map_or(Ok(()), |hint| write!(f, "; {hint}"))
    }
}

impl std::error::Error for QueryError {}

impl From<QueryError> for Error {
    fn from(error: QueryError) -> Self {
        let made = match error.kind {
            QueryErrorKind::Sql => Self::user,
            QueryErrorKind::Internal => Self::internal,
            _ => Self::outside,
        };
        let made = made(error.to_string());
        if made.blame == Blame::Outside { made.fatal() } else { made }
    }
}

/// The tables of one graph, and the threads that query them.
///
/// Queries run on their own Tokio runtime (threads `query-0`, `query-1`, …), so that none can hold up the
/// graph's sockets; so does the upkeep of the files. The standard library cannot lower a thread's priority; the bounds are the number of threads
/// and of queries.
pub struct History {
    tables: Arc<[Table]>,
    /// Taken only by `drop`.
    runtime: Option<Runtime>,
    permits: Arc<Semaphore>,
    footers: Footers,
}

impl fmt::Debug for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("History").field("tables", &self.tables).finish_non_exhaustive()
    }
}

impl History {
    /// For these tables. Opens no file; starts the threads.
    ///
    /// # Errors
    /// When the threads cannot be started.
    pub fn new(tables: Vec<Table>) -> Result<Self> {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
        let started = AtomicUsize::new(0);
        let runtime = Builder::new_multi_thread()
            .worker_threads(threads)
            .max_blocking_threads(READ_THREADS_MAX)
            .thread_name_fn(move || format!("query-{}", started.fetch_add(1, Relaxed)))
            .thread_stack_size(THREAD_STACK_BYTES)
            .enable_time()
            .build()
            .map_err(|e| Error::outside("cannot start the query threads").because(e))?;
        let permits = Arc::new(Semaphore::new(QUERIES_MAX));
        Ok(Self { tables: tables.into(), runtime: Some(runtime), permits, footers: query::footers() })
    }

    /// The tables, in the order given.
    pub fn tables(&self) -> &[Table] {
        &self.tables
    }

    /// Runs one read-only query and gives its rows. To be called in a Tokio runtime with a timer.
    ///
    /// Dropping the future, or the end of the time, stops the work when it next comes to an end of a batch; a join
    /// of everything with everything may hold its threads and its place among [`QUERIES_MAX`] some seconds longer.
    ///
    /// # Errors
    /// See [`QueryErrorKind`].
    pub async fn query(&self, sql: &str, limits: &Limits) -> Result<QueryResult, QueryError> {
        self.run(sql, limits, |result| result).await
    }

    /// As [`Self::query`], with the rows as text, written on the query threads too.
    pub async fn query_text(&self, sql: &str, format: Format, limits: &Limits) -> Result<String, QueryError> {
        self.run(sql, limits, move |result| format.write(&result)).await
    }

    async fn run<T: Send + 'static>(
        &self,
        sql: &str,
        limits: &Limits,
        finish: impl FnOnce(QueryResult) -> T + Send + 'static,
    ) -> Result<T, QueryError> {
        if sql.len() > SQL_BYTES_MAX {
            return Err(QueryError::new(
                QueryErrorKind::Sql,
                format!("the query is longer than {SQL_BYTES_MAX} bytes"),
            ));
        }
        let permit = Arc::clone(&self.permits).try_acquire_owned().map_err(|_| {
            QueryError::new(
                QueryErrorKind::Busy,
                format!("too many queries: {QUERIES_MAX} are running; try again later"),
            )
        })?;
        let Some(runtime) = &self.runtime else {
            return Err(QueryError::new(QueryErrorKind::Internal, "the query threads have ended"));
        };
        let (tables, footers) = (Arc::clone(&self.tables), Arc::clone(&self.footers));
        let (sql, limits, time) = (sql.to_owned(), limits.clone(), limits.time);
        // The permit is held until the work has really ended.
        let mut task = Stopping(runtime.spawn(async move {
            let _permit = permit;
            query::run(&tables, &footers, &sql, &limits).await.map(finish)
        }));
        // Waited for here, not on the query's own thread: that one may be busy.
        match tokio::time::timeout(time, &mut task.0).await {
            Ok(Ok(result)) => result,
            Ok(Err(error)) => Err(QueryError::new(QueryErrorKind::Internal, format!("the query broke off: {error}"))),
            Err(_) => Err(QueryError {
                kind: QueryErrorKind::Time,
                message: format!("the query took longer than its time limit of {time:?}"),
                hint: Some("narrow it: `WHERE dt >= …` passes over whole folders".to_owned()),
            }),
        }
    }
}

impl History {
    /// Runs work on files on the threads of the queries. It goes on even if nobody waits for it any more.
    pub(crate) async fn beside_queries<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T> {
        let runtime = self.runtime.as_ref().ok_or_else(|| Error::internal("the query threads have ended"))?;
        runtime
            .spawn_blocking(work)
            .await
            .map_err(|e| Error::internal("the work on history files broke off").because(e))
    }
}

/// A task that stops when nobody waits for it any more.
struct Stopping<T>(JoinHandle<T>);

impl<T> Drop for Stopping<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Drop for History {
    fn drop(&mut self) {
        let Some(runtime) = self.runtime.take() else { return };
        // The threads are waited for, not let go: `pthread_detach` of glibc 2.36 looks at a thread once more after it let it
        // go, and the stack of one that ends just then, being so large, is no longer there.
        let end = move || runtime.shutdown_timeout(END_WITHIN);
        match Handle::try_current() {
            // A runtime must not wait inside another one.
            Ok(_) => drop(std::thread::spawn(end)),
            Err(_) => end(),
        }
    }
}

#[cfg(test)]
mod tests;
