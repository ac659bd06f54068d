//! Queries over a day of one-second rows of 1,000 keys, as a window writes them, merged as at the end of an hour.
//!
//! `cargo bench --bench history` runs it whole: 86.4 million rows. With `DUCKDB=…`, a Python that has the package `duckdb`
//! (`pip install duckdb pytz`), each query is also asked of DuckDB, over the same files, in the same run. The tests run it small.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef, TimeUnit};
use pipeline::batch::{BATCH_ROWS_MAX, Batch, Stage, Times};
use pipeline::config::{At, ByteSize};
use pipeline::history::output::Format;
use pipeline::history::{History, Limits, Table};
use pipeline::http::Routes;
use pipeline::live::Live;
use pipeline::plugin::{SinkContext, SinkInput, StagingSink, StreamShape};
use pipeline::state::StateWriter;
use pipeline::time::{format_us, now_us};
use sinks::parquet::{ParquetConfig, ParquetSink};

const KEYS: i64 = 1_000;
/// Rows of a published file: what a minute gives.
const FILE_SECONDS: i64 = 60;
/// 2026-11-20T00:00:00Z.
const START_US: i64 = 1_795_132_800_000_000;
/// Of each query, of which the median counts.
const RUNS: usize = 5;

/// The columns of a window's results.
fn columns() -> SchemaRef {
    let time = || DataType::Timestamp(TimeUnit::Microsecond, Some("UTC".into()));
    Arc::new(Schema::new(vec![
        Field::new("window_start", time(), true),
        Field::new("window_end", time(), true),
        Field::new("device_id", DataType::Utf8, true),
        Field::new("rps", DataType::Float64, true),
        Field::new("avg_delay_ms", DataType::Float64, true),
        Field::new("rows", DataType::Int64, true),
        Field::new("stage", DataType::Utf8, true),
        Field::new("revision", DataType::Int64, true),
    ]))
}

/// Rows `first..first + count`; a second has one of each key.
fn batch(first: i64, count: i64) -> Batch {
    let rows = first..first + count;
    let second = |n: i64| START_US + n / KEYS * 1_000_000;
    // A fixed multiplication spreads the values without a generator's state.
    let mixed = |n: i64| (n as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
    let times = |add: i64| -> ArrayRef {
        let values = rows.clone().map(|n| second(n) + add);
        Arc::new(TimestampMicrosecondArray::from_iter_values(values).with_timezone("UTC"))
    };
    let columns: Vec<ArrayRef> = vec![
        times(0),
        times(1_000_000),
        Arc::new(StringArray::from_iter_values(rows.clone().map(|n| format!("device-{}", n % KEYS)))),
        Arc::new(Float64Array::from_iter_values(rows.clone().map(|n| (mixed(n) % 20) as f64))),
        Arc::new(Float64Array::from_iter_values(rows.clone().map(|n| (mixed(n + 7) % 10_000) as f64 / 100.0))),
        Arc::new(Int64Array::from_iter_values(rows.clone().map(|n| (mixed(n) % 20) as i64))),
        Arc::new(StringArray::from_iter_values(rows.clone().map(|_| "final"))),
        Arc::new(Int64Array::from_iter_values(rows.clone().map(|_| 0))),
    ];
    let event_us = Int64Array::from_iter_values(rows.clone().map(|n| second(n) + 999_999));
    let ingest_us = Int64Array::from_iter_values(rows.map(|n| second(n) + 1_001_000));
    let times = Times { watermark_us: event_us.clone(), event_us, ingest_us };
    Batch::new(RecordBatch::try_new(self::columns(), columns).expect("rows"), times, Stage::Final).expect("a batch")
}

fn input() -> SinkInput {
    let shape = StreamShape { schema: columns(), keys: vec!["device_id".to_owned()], windowed: true };
    SinkInput { metric: "load".to_owned(), shape }
}

/// Writes the rows of `seconds` seconds, a file a minute, and merges them. Returns the number of files before and after.
fn write(folder: &Path, seconds: i64) -> (u64, u64) {
    let config = ParquetConfig {
        path: At::nowhere("history".to_owned()),
        roll: pipeline::config::Duration::from_ms(0),
        roll_size: At::nowhere(ByteSize(128 << 20)),
        keep: None,
    };
    let context = SinkContext {
        name: "history".to_owned(),
        inputs: vec![input()],
        folder: folder.to_owned(),
        routes: Routes::default(),
        live: Arc::new(Live::new("epoch".to_owned(), Arc::default(), [])),
        tails: Vec::new(),
    };
    let mut sink = ParquetSink::new(&config, context).expect("a sink");
    sink.restore(0, None).expect("restored");
    let (mut checkpoint, mut before) = (0, 0);
    let size = BATCH_ROWS_MAX as i64;
    for minute in (0..seconds).step_by(FILE_SECONDS as usize) {
        let (first, end) = (minute * KEYS, (minute + FILE_SECONDS).min(seconds) * KEYS);
        for first in (first..end).step_by(BATCH_ROWS_MAX) {
            sink.write(0, &batch(first, size.min(end - first)), first as u64).expect("written");
        }
        checkpoint += 1;
        before += 1;
        sink.prepare(checkpoint, false, &mut StateWriter::default()).expect("prepared");
        sink.commit(checkpoint, checkpoint).expect("committed");
    }
    checkpoint += 1;
    sink.prepare(checkpoint, false, &mut StateWriter::default()).expect("prepared");
    sink.commit(checkpoint, checkpoint).expect("committed");
    let upkeep = sink.upkeep().expect("upkeep");
    // When the hour of writing is over.
    let later_us = now_us() + 3_600_000_000;
    loop {
        let done = upkeep.step(later_us).expect("merged");
        if !done.more {
            return (before, done.files);
        }
    }
}

/// One query: its name, our SQL, and DuckDB's.
fn queries(seconds: i64) -> Vec<(&'static str, String, String)> {
    let from = format_us(START_US + seconds / 2 * 1_000_000);
    let to = format_us(START_US + (seconds / 2 + seconds / 24) * 1_000_000);
    let same = |name, sql: String| (name, sql.clone(), sql);
    let newest =
        |aggregate: &str| format!("SELECT device_id, {aggregate} AS a FROM load GROUP BY device_id ORDER BY device_id");
    let p99 = |aggregate: &str| format!("SELECT {aggregate} AS p99 FROM load");
    vec![
        same("count", "SELECT count(*) AS c, max(event_time) AS newest FROM load".to_owned()),
        same(
            "average_by_key_of_an_hour",
            format!(
                "SELECT device_id, avg(avg_delay_ms) AS a, sum(rps) AS s FROM load \
                 WHERE event_time >= TIMESTAMP '{from}' AND event_time < TIMESTAMP '{to}' \
                 GROUP BY device_id ORDER BY device_id"
            ),
        ),
        same(
            "average_by_key_of_the_day",
            "SELECT device_id, avg(avg_delay_ms) AS a, sum(rps) AS s FROM load GROUP BY device_id ORDER BY device_id"
                .to_owned(),
        ),
        same("newest_value_per_key", newest("arg_max(avg_delay_ms, event_time)")),
        (
            "newest_by_last_value",
            newest("last_value(avg_delay_ms ORDER BY event_time)"),
            newest("arg_max(avg_delay_ms, event_time)"),
        ),
        (
            "percentile_99_of_the_day",
            p99("approx_percentile_cont(0.99) WITHIN GROUP (ORDER BY avg_delay_ms)"),
            p99("approx_quantile(avg_delay_ms, 0.99)"),
        ),
    ]
}

/// What one query took.
pub struct Figure {
    /// The query's name.
    pub name: &'static str,
    /// The answer, as CSV.
    pub answer: String,
    /// Median of our runs.
    pub ours: Duration,
    /// Median of DuckDB's runs, if it was asked.
    pub duckdb: Option<Duration>,
}

/// Writes the rows of `seconds` seconds, merges them, and asks every query. `duckdb` is a Python that has the package.
pub fn run(seconds: i64, duckdb: Option<&str>) -> (u64, u64, Vec<Figure>) {
    let scratch = tempfile::tempdir().expect("a folder");
    let (before, after) = write(scratch.path(), seconds);
    let folder = scratch.path().join("history");
    let table = Table {
        name: "load".to_owned(),
        sink: "history".to_owned(),
        folder: folder.clone(),
        schema: columns(),
        tail: None,
    };
    let history = History::new(vec![table]).expect("threads");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let ask = |sql: &str| {
        let start = Instant::now();
        let answer = runtime.block_on(history.query_text(sql, Format::Csv, &Limits::default()));
        (answer.unwrap_or_else(|e| panic!("{sql}: {e}")), start.elapsed())
    };
    let figures = queries(seconds).into_iter().map(|(name, ours, theirs)| {
        let (answer, _) = ask(&ours);
        let runs = (0..RUNS).map(|_| ask(&ours).1).collect();
        let duckdb = duckdb.and_then(|python| ask_duckdb(python, &folder, &theirs));
        Figure { name, answer, ours: median(runs), duckdb }
    });
    let figures = figures.collect();
    (before, after, figures)
}

fn median(mut runs: Vec<Duration>) -> Duration {
    runs.sort_unstable();
    runs[runs.len() / 2]
}

/// The median of DuckDB's runs after a first one, with its own defaults; `None` if it gave no answer.
fn ask_duckdb(python: &str, folder: &Path, sql: &str) -> Option<Duration> {
    const SCRIPT: &str = "
import duckdb, sys, time
db = duckdb.connect()
db.execute(f\"SET enable_progress_bar = false; SET TimeZone = 'UTC'; CREATE VIEW load AS FROM read_parquet('{sys.argv[1]}/load/**/*.parquet')\")
runs = []
for _ in range(int(sys.argv[3]) + 1):
    start = time.perf_counter()
    db.execute(sys.argv[2]).fetchall()
    runs.append(time.perf_counter() - start)
print(sorted(runs[1:])[len(runs[1:]) // 2])
";
    let mut command = Command::new(python);
    command.args(["-c", SCRIPT]).arg(folder).arg(sql).arg(RUNS.to_string());
    let output = command.output().expect("Python");
    let seconds = String::from_utf8_lossy(&output.stdout).trim().parse().ok().map(Duration::from_secs_f64);
    if seconds.is_none() {
        eprintln!("DuckDB, {}: {sql}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    seconds
}

#[allow(dead_code, clippy::print_stdout, reason = "the tests take `run` alone; the figures are the result")]
fn main() {
    let duckdb = std::env::var("DUCKDB").ok();
    let start = Instant::now();
    let (before, after, figures) = run(86_400, duckdb.as_deref());
    println!("{before} files merged into {after}; all took {:.0} s", start.elapsed().as_secs_f64());
    for figure in figures {
        let ours = figure.ours.as_secs_f64();
        let beside = figure.duckdb.map_or(String::new(), |duckdb| {
            format!("   DuckDB {:>8.1} ms   ratio {:.2}", duckdb.as_secs_f64() * 1e3, ours / duckdb.as_secs_f64())
        });
        println!("{:<28} {:>8.1} ms{beside}", figure.name, ours * 1e3);
    }
}
