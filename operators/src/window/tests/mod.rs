//! Tests of the window step. Time is simulated: rows carry the watermark that a source would give them.

mod batch;
mod checks;
mod edges;

use std::path::Path;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, BooleanArray, Decimal128Array, Float64Array, Int64Array, RecordBatch, StringArray,
    TimestampMicrosecondArray,
};
use arrow::compute::concat_batches;
use arrow::datatypes::SchemaRef;
use pipeline::batch::{Batch, Stage, Times};
use pipeline::config::{CheckContext, Position, Problems, deserialize, tree};
use pipeline::plugin::{Operator, OperatorConfig, Output, Planned, StreamShape};
use pipeline::schema::{FieldType, schema_of};
use pipeline::state::{StateReader, StateWriter};

use super::WindowConfig;

/// One input row. Numbers are small and floats have few binary digits, so that their sums are exact in any order.
#[derive(Clone, Debug, Default)]
pub(super) struct Row {
    pub(super) event_us: i64,
    pub(super) key: Option<String>,
    pub(super) group: Option<i64>,
    pub(super) x: Option<f64>,
    pub(super) n: Option<i64>,
    pub(super) s: Option<String>,
    pub(super) d: Option<i128>,
    pub(super) b: Option<bool>,
    pub(super) c: Option<i64>,
}

impl Row {
    pub(super) fn at_s(seconds: f64) -> Self {
        Self { event_us: (seconds * 1e6) as i64, key: Some("a".to_owned()), ..Self::default() }
    }

    pub(super) fn x(self, x: f64) -> Self {
        Self { x: Some(x), ..self }
    }

    pub(super) fn n(self, n: i64) -> Self {
        Self { n: Some(n), ..self }
    }

    pub(super) fn key(self, key: &str) -> Self {
        Self { key: Some(key.to_owned()), ..self }
    }
}

/// The columns of a [`Row`].
pub(super) fn schema() -> SchemaRef {
    schema_of([
        ("key", FieldType::String),
        ("group", FieldType::Int),
        ("x", FieldType::Float),
        ("n", FieldType::Int),
        ("s", FieldType::String),
        ("d", FieldType::Decimal(18, 2)),
        ("ts", FieldType::Timestamp(None)),
        ("b", FieldType::Bool),
        ("c", FieldType::Int),
    ])
}

/// Rows as a batch of the visible columns.
pub(super) fn columns(rows: &[Row]) -> RecordBatch {
    let decimals: Decimal128Array = rows.iter().map(|row| row.d).collect();
    let timestamps: TimestampMicrosecondArray = rows.iter().map(|row| row.n.map(|n| n * 1_000_003)).collect();
    let columns: Vec<ArrayRef> = vec![
        Arc::new(rows.iter().map(|row| row.key.clone()).collect::<StringArray>()),
        Arc::new(rows.iter().map(|row| row.group).collect::<Int64Array>()),
        Arc::new(rows.iter().map(|row| row.x).collect::<Float64Array>()),
        Arc::new(rows.iter().map(|row| row.n).collect::<Int64Array>()),
        Arc::new(rows.iter().map(|row| row.s.clone()).collect::<StringArray>()),
        Arc::new(decimals.with_precision_and_scale(18, 2).expect("two digits after the point")),
        Arc::new(timestamps.with_timezone("UTC")),
        Arc::new(rows.iter().map(|row| row.b).collect::<BooleanArray>()),
        Arc::new(rows.iter().map(|row| row.c).collect::<Int64Array>()),
    ];
    RecordBatch::try_new(schema(), columns).expect("columns of the schema")
}

/// The watermark that a source gives each row: the newest event time before it, minus the lateness.
pub(super) fn watermarks(rows: &[Row], lateness_us: i64) -> Vec<i64> {
    let mut newest = i64::MIN;
    rows.iter()
        .map(|row| {
            let before = newest;
            newest = newest.max(row.event_us);
            if before == i64::MIN { i64::MIN } else { before - lateness_us }
        })
        .collect()
}

/// Plans a step, or gives the problems.
pub(super) fn plan(yaml: &str, schema: SchemaRef) -> Result<Planned, String> {
    let node = tree::parse(yaml).expect("YAML");
    let node = node.get("window").cloned().unwrap_or(node);
    let mut problems = Problems::default();
    let mut cx = CheckContext::new(&mut problems, "step", Position { line: 1, column: 1 }, Path::new("."));
    let input = StreamShape { schema, keys: Vec::new(), windowed: false };
    let planned = deserialize::read::<WindowConfig>(&node, &mut cx).and_then(|config| config.plan(&[input], &mut cx));
    match planned {
        Some(planned) if !problems.has_errors() => Ok(planned),
        Some(_) => Err(format!("planned in spite of\n{}", problems.render("yaml"))),
        None => Err(problems.render("yaml")),
    }
}

/// A running step.
pub(super) struct Stream {
    yaml: String,
    pub(super) shape: StreamShape,
    operator: Box<dyn Operator>,
    results: Vec<RecordBatch>,
    pub(super) batches: Vec<Batch>,
}

impl Stream {
    pub(super) fn new(yaml: &str) -> Self {
        let Planned { shape, operator } = plan(yaml, schema()).unwrap_or_else(|problems| panic!("{yaml}\n{problems}"));
        Self { yaml: yaml.to_owned(), shape, operator, results: Vec::new(), batches: Vec::new() }
    }

    /// Gives the operator rows and then the watermark that follows from them.
    pub(super) fn push(&mut self, rows: &[Row], watermarks: &[i64], then_us: i64) {
        let mut out = Output::default();
        let times = Times {
            event_us: rows.iter().map(|row| row.event_us).collect::<Vec<_>>().into(),
            ingest_us: rows.iter().map(|row| row.event_us.wrapping_add(7)).collect::<Vec<_>>().into(),
            watermark_us: watermarks.to_vec().into(),
        };
        let batch = Batch::new(columns(rows), times, Stage::Final).expect("times as long as rows");
        self.operator.process(0, batch, &mut out).expect("process");
        self.operator.watermark(then_us, &mut out).expect("watermark");
        self.take(out);
    }

    /// Moves event time on.
    pub(super) fn watermark(&mut self, time_us: i64) {
        let mut out = Output::default();
        self.operator.watermark(time_us, &mut out).expect("watermark");
        self.take(out);
    }

    fn take(&mut self, mut out: Output) {
        for batch in out.take() {
            assert_eq!(batch.rows().schema(), self.shape.schema, "the promised schema");
            self.results.push(batch.rows().clone());
            self.batches.push(batch);
        }
    }

    /// Saves the state and goes on with a new operator that has restored it.
    pub(super) fn kill_and_resume(&mut self) {
        let mut state = StateWriter::default();
        self.operator.snapshot(&mut state);
        let mut again = StateWriter::default();
        self.operator.snapshot(&mut again);
        let state = state.finish();
        // DataFusion's DISTINCT writes its values in the order of a hash table with a random seed.
        assert!(state == again.finish() || self.yaml.contains("DISTINCT"), "a snapshot changes nothing");
        let mut fresh = plan(&self.yaml, schema()).expect("planned before").operator;
        let mut reader = StateReader::new(&state);
        fresh.restore(&mut reader).expect("restore");
        assert!(reader.is_empty(), "restore reads all");
        assert_eq!(fresh.late_rows(), self.operator.late_rows());
        self.operator = fresh;
    }

    pub(super) fn late_rows(&self) -> u64 {
        self.operator.late_rows()
    }

    /// All results so far.
    pub(super) fn results(&self) -> RecordBatch {
        concat_batches(&self.shape.schema, &self.results).expect("one schema")
    }
}

/// Streams rows in one piece and closes all windows.
pub(super) fn run(yaml: &str, rows: &[Row], lateness_us: i64) -> Stream {
    let mut stream = Stream::new(yaml);
    let newest = rows.iter().map(|row| row.event_us).max().unwrap_or_default();
    stream.push(rows, &watermarks(rows, lateness_us), newest.saturating_sub(lateness_us));
    stream.watermark(i64::MAX);
    stream
}

/// Streams rows cut at random, with a kill and a resume now and then.
pub(super) fn run_cut(yaml: &str, rows: &[Row], lateness_us: i64, random: &mut Random) -> Stream {
    let mut stream = Stream::new(yaml);
    let marks = watermarks(rows, lateness_us);
    let mut at = 0;
    let longest = [1, 3, 20, 200][random.below(4)];
    while at < rows.len() {
        let until = (at + 1 + random.below(longest)).min(rows.len());
        let newest = rows[..until].iter().map(|row| row.event_us).max().unwrap_or_default();
        stream.push(&rows[at..until], &marks[at..until], newest - lateness_us);
        if random.below(8) == 0 {
            stream.kill_and_resume();
        }
        at = until;
    }
    stream.watermark(i64::MAX);
    stream
}

/// SplitMix64 (Steele, Lea, Flood, 2014): seeded, so that every failure can be run again.
#[derive(Clone, Debug)]
pub(super) struct Random(pub(super) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to `n` - 1.
    pub(super) fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// From `from` to `to` - 1.
    pub(super) fn between(&mut self, from: i64, to: i64) -> i64 {
        from + self.below((to - from) as usize) as i64
    }

    /// A value, or null one time in `n`.
    fn or_null<T>(&mut self, n: usize, value: T) -> Option<T> {
        (self.below(n) > 0).then_some(value)
    }
}

/// Rows out of order by up to `displaced_us`, around 1970, with nulls everywhere. Event times are multiples of
/// `grain_us`: the coarser, the more are equal, or exactly at the ends of windows.
pub(super) fn random_rows(
    random: &mut Random,
    count: usize,
    span_us: i64,
    displaced_us: i64,
    grain_us: i64,
) -> Vec<Row> {
    let keys = 1 + random.below(5);
    let start_us = random.between(-span_us, span_us);
    let mut counter = 0;
    (0..count)
        .map(|index| {
            let due_us = start_us + span_us * index as i64 / count as i64;
            let event_us = (due_us - random.between(0, displaced_us + 1)).div_euclid(grain_us) * grain_us;
            counter = if random.below(30) == 0 { random.between(0, 5) } else { counter + random.between(0, 20) };
            let key = random.below(keys);
            Row {
                event_us,
                key: (key > 0).then(|| format!("device-{key}")),
                group: random.or_null(9, key as i64 % 2),
                x: {
                    let x = random.between(-8000, 8000) as f64 / 8.0;
                    random.or_null(7, x)
                },
                n: {
                    let n = random.between(-1000, 1000);
                    random.or_null(7, n)
                },
                s: {
                    let s = format!("s{}", random.below(12));
                    random.or_null(7, s)
                },
                d: {
                    let d = i128::from(random.between(-100_000, 100_000));
                    random.or_null(7, d)
                },
                b: {
                    let b = random.below(2) == 0;
                    random.or_null(7, b)
                },
                c: random.or_null(5, counter),
            }
        })
        .collect()
}
