//! One check for all operators: rows in, rows out, whatever the batches and wherever the process restarts.

use std::path::Path;

use arrow::array::{Int64Array, RecordBatch};
use pipeline::batch::{Batch, Stage, Times};
use pipeline::config::tree;
use pipeline::config::{CheckContext, Fields, Position, Problems};
use pipeline::plugin::{Operator, Output, Planned, StreamShape};
use pipeline::rows::RowsBuilder;
use pipeline::schema::{FieldType, schema_of};
use pipeline::state::{StateReader, StateWriter};

/// How often each case runs with other batches and other restarts.
const RUNS: u64 = 40;

/// One row of a case.
#[derive(Clone, Copy)]
pub(crate) struct Row {
    input: usize,
    event_s: f64,
    json: &'static str,
}

/// A row of the step before.
pub(crate) fn row(event_s: f64, json: &'static str) -> Row {
    Row { input: 0, event_s, json }
}

/// A row of the first side input.
pub(crate) fn side(event_s: f64, json: &'static str) -> Row {
    Row { input: 1, event_s, json }
}

/// The columns of one input.
pub(crate) type Columns<'a> = &'a [(&'a str, FieldType)];

/// A step over its inputs.
pub(crate) struct Case<'a> {
    /// The step as YAML: `filter: x > 0`.
    pub(crate) step: &'a str,
    /// The columns of the step before, then of the side inputs.
    pub(crate) inputs: &'a [Columns<'a>],
    /// The key columns of the step before.
    pub(crate) keys: &'a [&'a str],
    /// Whether a window made the rows of the step before.
    pub(crate) windowed: bool,
    /// How far the watermark stays behind the newest row of the step before.
    pub(crate) lateness_s: f64,
}

impl Case<'_> {
    /// Plans the step.
    pub(crate) fn plan(&self) -> (Option<Planned>, Problems) {
        let node = tree::parse(self.step).expect("YAML");
        let (name, options) = node.mapping().and_then(|entries| entries.first()).expect("one step").clone();
        let plugin = crate::OPERATORS.iter().find(|p| p.type_name == name.name).expect("a known step");
        let shape = |columns: &Columns<'_>, keys: &[&str]| StreamShape {
            schema: schema_of(columns.iter().copied()),
            keys: keys.iter().map(|key| (*key).to_owned()).collect(),
            windowed: self.windowed,
        };
        let shapes: Vec<StreamShape> = self.inputs.iter().map(|columns| shape(columns, self.keys)).collect();
        let mut problems = Problems::default();
        let mut cx = CheckContext::new(&mut problems, "step", Position { line: 1, column: 1 }, Path::new("."));
        let planned = (plugin.read)(&options, &mut cx).and_then(|step| step.plan(&shapes, &mut cx));
        (planned, problems)
    }

    /// Every problem and note, one line each with its hint.
    pub(crate) fn problems(&self) -> String {
        let (planned, problems) = self.plan();
        assert!(planned.is_some() || problems.errors() > 0, "a step that cannot be made says why");
        problems.render("test")
    }

    fn operator(&self) -> Planned {
        let (planned, problems) = self.plan();
        planned.unwrap_or_else(|| panic!("{}", problems.render("test")))
    }

    /// The rows give `expected` (event time in seconds, a space, the row as JSON), however they are cut into
    /// batches, and with a restart from a snapshot at any place.
    pub(crate) fn gives(&self, rows: &[Row], expected: &[&str]) {
        assert_eq!(self.run(rows, None), expected, "one batch: {}", self.step);
        for seed in 1..=RUNS {
            assert_eq!(self.run(rows, Some(seed)), expected, "cuts of seed {seed}: {}", self.step);
        }
    }

    /// Runs with the batches and restarts of a seed, or with the fewest batches and none.
    fn run(&self, rows: &[Row], seed: Option<u64>) -> Vec<String> {
        let mut random = seed.map(Random);
        let mut planned = self.operator();
        let mut out = Output::default();
        let mut emitted = Vec::new();
        let (mut newest, mut from) = (i64::MIN, 0);
        while from < rows.len() {
            let same_input = rows[from..].iter().take_while(|r| r.input == rows[from].input).count();
            let length = random.as_mut().map_or(same_input, |r| 1 + r.below(same_input as u64) as usize);
            let batch = self.batch(&rows[from..from + length], &mut newest);
            planned.operator.process(rows[from].input, batch, &mut out).expect("process");
            if newest != i64::MIN {
                planned.operator.watermark(self.watermark(newest), &mut out).expect("watermark");
            }
            emitted.append(&mut out.take());
            from += length;
            if random.as_mut().is_some_and(|r| r.below(3) == 0) {
                planned = self.restart(planned.operator.as_ref());
            }
        }
        planned.operator.watermark(i64::MAX, &mut out).expect("the end");
        emitted.append(&mut out.take());
        for batch in &emitted {
            assert_eq!(batch.rows().schema(), planned.shape.schema, "{}", self.step);
        }
        emitted.iter().flat_map(lines).collect()
    }

    fn restart(&self, operator: &dyn Operator) -> Planned {
        let mut state = StateWriter::default();
        operator.snapshot(&mut state);
        let bytes = state.finish();
        let mut planned = self.operator();
        let mut reader = StateReader::new(&bytes);
        planned.operator.restore(&mut reader).expect("restore");
        assert!(reader.is_empty(), "a part of the state was not read: {}", self.step);
        planned
    }

    fn watermark(&self, newest: i64) -> i64 {
        newest - (self.lateness_s * 1e6) as i64
    }

    fn batch(&self, rows: &[Row], newest: &mut i64) -> Batch {
        let input = rows[0].input;
        let mut watermarks = Vec::with_capacity(rows.len());
        for row in rows {
            watermarks.push(if *newest == i64::MIN { i64::MIN } else { self.watermark(*newest) });
            if input == 0 {
                *newest = (*newest).max(micros(row));
            }
        }
        let event_us: Int64Array = rows.iter().map(micros).collect();
        let times = Times { ingest_us: event_us.clone(), event_us, watermark_us: watermarks.into() };
        Batch::new(records(self.inputs[input], rows), times, Stage::Final).expect("a batch")
    }
}

fn micros(row: &Row) -> i64 {
    (row.event_s * 1e6).round() as i64
}

fn records(columns: Columns<'_>, rows: &[Row]) -> RecordBatch {
    let mut builder = RowsBuilder::new(&[], &Fields::of(columns.iter().copied()));
    for row in rows {
        builder.push_json(row.json.as_bytes()).unwrap_or_else(|e| panic!("{}: {e}", row.json));
    }
    builder.finish().expect("rows")
}

fn lines(batch: &Batch) -> Vec<String> {
    batch.json().iter().zip(batch.event_us()).map(|(json, us)| format!("{} {json}", *us as f64 / 1e6)).collect()
}

/// Steele, Lea and Flood's SplitMix64: small, and the same everywhere.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    /// A number from 0 up to `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}
