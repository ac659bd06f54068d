//! Rows per second through filter and window on one thread: from memory, and from JSON lines.
//!
//! `cargo bench --bench throughput` runs it whole and prints one line per shape, with a hash of the results, so that
//! two builds that differ in speed can be seen to agree. The tests run it small.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use arrow::array::{Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use pipeline::batch::{BATCH_ROWS_MAX, Batch, Stage, Times};
use pipeline::config::deserialize::read;
use pipeline::config::{CheckContext, Fields, Position, Problems, tree};
use pipeline::plugin::{Operator, OperatorConfig, Output, StreamShape};
use pipeline::rows::RowsBuilder;
use pipeline::schema::{FieldType, NumberUnit, schema_of};

/// Keys and rows per window of one second: 1,000 keys with 100 rows each.
const KEYS: i64 = 1_000;
const ROWS_PER_SECOND: i64 = 100_000;

const COLUMNS: [(&str, FieldType); 3] = [
    ("device_id", FieldType::String),
    ("latency_ms", FieldType::Float),
    ("ts", FieldType::Timestamp(Some(NumberUnit::Microseconds))),
];

/// A step over the bench's columns.
fn step<C: OperatorConfig>(yaml: &str) -> Box<dyn Operator> {
    let mut problems = Problems::default();
    let node = tree::parse(yaml).expect("YAML");
    let mut cx = CheckContext::new(&mut problems, "bench", Position::default(), Path::new("."));
    let shape = StreamShape { schema: schema_of(COLUMNS), keys: Vec::new(), windowed: false };
    let planned = read::<C>(&node, &mut cx).and_then(|config| config.plan(&[shape], &mut cx));
    planned.unwrap_or_else(|| panic!("{}", problems.render("bench"))).operator
}

/// Row `n` of the data: a key, a value and a time, without order among the keys.
fn row(n: i64) -> (i64, f64, i64) {
    // A fixed multiplication spreads the keys and values without a generator's state.
    let mixed = (n as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    ((mixed >> 40) as i64 % KEYS, (mixed >> 20 & 0xFFFFF) as f64 / 1e4, n * 1_000_000 / ROWS_PER_SECOND)
}

fn times(first: i64, count: i64) -> Times {
    let event_us = Int64Array::from_iter_values((first..first + count).map(|n| row(n).2));
    let watermark_us =
        Int64Array::from_iter_values((first..first + count).map(|n| if n == 0 { i64::MIN } else { row(n - 1).2 }));
    Times { ingest_us: event_us.clone(), event_us, watermark_us }
}

fn arrow_batch(first: i64, count: i64) -> Batch {
    let names = StringArray::from_iter_values((first..first + count).map(|n| format!("device-{}", row(n).0)));
    let values = Float64Array::from_iter_values((first..first + count).map(|n| row(n).1));
    let times_column = TimestampMicrosecondArray::from_iter_values((first..first + count).map(|n| row(n).2));
    let columns: Vec<arrow::array::ArrayRef> =
        vec![Arc::new(names), Arc::new(values), Arc::new(times_column.with_timezone("UTC"))];
    let rows = RecordBatch::try_new(schema_of(COLUMNS), columns).expect("a batch");
    Batch::new(rows, times(first, count), Stage::Final).expect("a batch")
}

fn json_lines(first: i64, count: i64) -> Vec<String> {
    let line = |n| {
        let (key, value, ts) = row(n);
        format!(
            r#"{{"device_id":"device-{key}","site":"north-building-2","firmware":"4.18.2-rc1","latency_ms":{value},"ok":true,"battery":{{"volts":3.71,"percent":81}},"ts":{ts}}}"#
        )
    };
    (first..first + count).map(line).collect()
}

/// Steps with a place to collect and hash what comes out.
struct Steps {
    steps: Vec<Box<dyn Operator>>,
    rows: u64,
    hash: u64,
}

impl Steps {
    fn new(aggregate: &str) -> Self {
        let window = format!("{{tumbling: 1s, group_by: [device_id], aggregate: {aggregate}}}");
        let steps = vec![
            step::<operators::filter::FilterConfig>("latency_ms >= 0"),
            step::<operators::window::WindowConfig>(&window),
        ];
        Self { steps, rows: 0, hash: 0 }
    }

    fn push(&mut self, batch: Batch, watermark_us: i64) {
        let mut out = Output::default();
        self.steps[0].process(0, batch, &mut out).expect("filter");
        for batch in out.take() {
            self.steps[1].process(0, batch, &mut out).expect("window");
        }
        self.steps[1].watermark(watermark_us, &mut out).expect("watermark");
        for batch in out.take() {
            self.rows += batch.len() as u64;
            for row in batch.json().iter() {
                let hashed = row
                    .bytes()
                    .fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
                self.hash = self.hash.wrapping_add(hashed);
            }
        }
    }
}

/// What one shape gave.
pub struct Figure {
    /// The shape's name.
    pub name: &'static str,
    /// Million rows per second.
    pub million_rows_per_second: f64,
    /// Result rows.
    pub results: u64,
    /// Hash of the result rows, independent of their order.
    pub hash: u64,
}

const COUNT_AVG_P99: &str = r#"{n: count(), avg_ms: avg(latency_ms), p99_ms: "percentile(latency_ms, 0.99)"}"#;
const COUNT_AVG_MAX: &str = "{n: count(), avg_ms: avg(latency_ms), max_ms: max(latency_ms)}";

/// Rows that lie in memory as Arrow batches.
fn from_memory(name: &'static str, aggregate: &str, rows: i64) -> Figure {
    let size = BATCH_ROWS_MAX as i64;
    let batches: Vec<Batch> =
        (0..rows).step_by(BATCH_ROWS_MAX).map(|first| arrow_batch(first, size.min(rows - first))).collect();
    let mut steps = Steps::new(aggregate);
    let start = Instant::now();
    for batch in batches {
        let newest = batch.event_us().last().copied().unwrap_or(i64::MIN);
        steps.push(batch, newest);
    }
    finish(name, steps, rows, start)
}

/// Rows that arrive as JSON objects of about 170 bytes, decoded on the same thread.
fn from_json(name: &'static str, aggregate: &str, rows: i64) -> Figure {
    let lines = json_lines(0, rows);
    let mut builder = RowsBuilder::new(&[], &Fields::of(COLUMNS));
    let mut steps = Steps::new(aggregate);
    let start = Instant::now();
    let mut first = 0;
    for chunk in lines.chunks(BATCH_ROWS_MAX) {
        for line in chunk {
            builder.push_json(line.as_bytes()).expect("a row");
        }
        let count = chunk.len() as i64;
        let batch = Batch::new(builder.finish().expect("rows"), times(first, count), Stage::Final).expect("a batch");
        first += count;
        let newest = batch.event_us().last().copied().unwrap_or(i64::MIN);
        steps.push(batch, newest);
    }
    finish(name, steps, rows, start)
}

/// The peer: DataFusion's batch SQL over the same batches on one thread, which need not keep state between batches,
/// watch event time, or give results before the end.
fn datafusion_batch(name: &'static str, rows: i64) -> Figure {
    use datafusion::prelude::{SessionConfig, SessionContext};
    let size = BATCH_ROWS_MAX as i64;
    let batches =
        (0..rows).step_by(BATCH_ROWS_MAX).map(|first| arrow_batch(first, size.min(rows - first)).rows().clone());
    let table =
        datafusion::datasource::MemTable::try_new(schema_of(COLUMNS), vec![batches.collect()]).expect("a table");
    let context = SessionContext::new_with_config(SessionConfig::new().with_target_partitions(1));
    context.register_table("t", Arc::new(table)).expect("registered");
    let sql = "SELECT date_bin(INTERVAL '1 second', ts) AS w, device_id, count(*), avg(latency_ms), max(latency_ms) \
               FROM t WHERE latency_ms >= 0 GROUP BY 1, 2";
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let start = Instant::now();
    let results = runtime.block_on(async { context.sql(sql).await?.collect().await }).expect("results");
    let seconds = start.elapsed().as_secs_f64();
    let results = results.iter().map(|batch| batch.num_rows() as u64).sum();
    Figure { name, million_rows_per_second: rows as f64 / seconds / 1e6, results, hash: 0 }
}

fn finish(name: &'static str, mut steps: Steps, rows: i64, start: Instant) -> Figure {
    let empty = arrow_batch(0, 0);
    steps.push(empty, i64::MAX);
    let seconds = start.elapsed().as_secs_f64();
    Figure { name, million_rows_per_second: rows as f64 / seconds / 1e6, results: steps.rows, hash: steps.hash }
}

/// Every shape over `rows` rows.
pub fn run(rows: i64) -> Vec<Figure> {
    vec![
        from_memory("memory_filter_window_count_avg_max", COUNT_AVG_MAX, rows),
        from_memory("memory_filter_window_count_avg_p99", COUNT_AVG_P99, rows),
        datafusion_batch("datafusion_batch_count_avg_max", rows),
        from_json("json_filter_window_count_avg_p99", COUNT_AVG_P99, rows),
    ]
}

#[allow(dead_code, reason = "the tests take `run` alone")]
fn main() {
    // The JSON lines of 2 million rows take 0.4 GB; the figures do not change with more.
    for figure in run(2_000_000) {
        #[allow(clippy::print_stdout, reason = "the figures are the result")]
        {
            println!(
                "{:<40} {:>7.2} M rows/s   {} result rows, hash {:016x}",
                figure.name, figure.million_rows_per_second, figure.results, figure.hash
            );
        }
    }
}
