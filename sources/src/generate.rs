//! `generate`: synthetic rows, for demos, tests and benches.

use std::sync::Arc;
use std::time::Duration;

use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch, TimestampMicrosecondArray};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use async_trait::async_trait;
use indexmap::IndexMap;
use pipeline::batch::{BATCH_ROWS_MAX, Batch, Stage, Times};
use pipeline::config::{At, CheckContext};
use pipeline::error::{Error, Result};
use pipeline::expression::Expression;
use pipeline::plugin::{
    Delivery, PullReader, Pulled, Reader, RowError, Schedule, Source, SourceConfig, SourceContext, SourceShape,
};
use pipeline::schema::{FieldType, schema_of};
use pipeline::state::{StateReader, StateWriter};
use pipeline::time::now_us;
use schemars::JsonSchema;
use serde::Deserialize;

const PAGE: &str = "\
Makes synthetic rows from SQL expressions, with no server to install.

Every column is an expression over three inputs:

- `seq`: the row's number from 0, an int.
- `time`: the row's time, a timestamp. With `rate` the rows are evenly spaced.
- `random`: a float from 0 up to 1, drawn anew for every row and column from `seed`, `seq` and the column's name. The
  same seed gives the same rows. Within one expression it is one number, however often it is named.

## Emits

The columns as written, `rate` rows per second. Without `rate`, `count` rows as fast as they are taken.

## Delivery

Read again from the position in the checkpoint: after a crash the same rows come again, with the same numbers and
times. After a longer stop the numbers go on without a gap, but the time skips what was more than a minute ago.

## Limits

At most 8 000 000 rows per second. Without `rate` all rows of a batch have the time at which it was made, so that they
are not the same when read again.

## Fails when

Never. A value that cannot be computed (a division by zero) is null, and an error is counted.
";

/// Highest `rate`: a full batch every millisecond, the shortest time between two polls.
const RATE_MAX: f64 = 8_000_000.0;
/// Shortest and longest time between two polls, unless the rate asks for shorter ones.
const POLL_MIN: Duration = Duration::from_millis(10);
const POLL_MAX: Duration = Duration::from_secs(1);
/// Rows that are overdue for longer are not made up for: nobody wants the synthetic rows of last night.
const CATCH_UP_MAX_US: i64 = 60_000_000;

/// Options of `generate`; one of `rate` and `count` is needed.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GenerateConfig {
    /// Rows per second, fractions allowed. Default: as fast as they are taken; then `count` is needed.
    #[serde(default)]
    pub rate: Option<At<f64>>,
    /// Ends after so many rows. Default: never.
    #[serde(default)]
    pub count: Option<u64>,
    /// Start of the random numbers. Default: 0, so that two runs give the same numbers.
    #[serde(default)]
    pub seed: u64,
    /// Each column with its SQL expression over `seq`, `time` and `random`.
    pub columns: IndexMap<String, At<String>>,
}

impl SourceConfig for GenerateConfig {
    const TYPE: &'static str = "generate";
    const PAGE: &'static str = PAGE;
    const EXAMPLE: &'static str = "\
type: generate
rate: 20
seed: 7
columns:
  device_id: concat('dev-', seq % 5)
  latency_ms: 20 + 10 * random + 5 * sin(seq / 10.0)
  ts: time
event_time: {field: ts}
";
    const PROMISES: &'static [(&'static str, Delivery)] = &[("", Delivery::Replayable)];

    fn check(&self, cx: &mut CheckContext<'_>) -> Option<SourceShape> {
        if let Some(rate) = &self.rate
            && !(rate.value > 0.0 && rate.value <= RATE_MAX)
        {
            cx.error(rate.position, format!("expected a rate above 0 and up to {RATE_MAX} rows per second"));
        }
        if self.rate.is_none() && self.count.is_none() {
            let hint = "`rate: 20` for 20 rows per second, or `count: 1000000` to end after so many".to_owned();
            cx.error_hint(cx.position(), "`generate` needs `rate`, `count` or both", Some(hint));
        }
        if self.columns.is_empty() {
            cx.error(cx.position(), "`columns` needs at least one column");
        }
        let inputs = inputs();
        let fields = self.columns.iter().map(|(name, text)| match cx.expression(text, &inputs) {
            Some(expression) => expression.field(name),
            // Its type is not known.
            None => Field::new(name, DataType::Null, true),
        });
        let fields: Vec<Field> = fields.collect();
        Some(SourceShape {
            schema: SchemaRef::new(Schema::new(fields)),
            delivery: Delivery::Replayable,
            schedule: schedule(self.rate.as_ref().map(|rate| rate.value)),
            bounded: self.count.is_some(),
            can_be_on_demand: false,
            mounts: Vec::new(),
        })
    }

    fn build(&self, _: SourceContext) -> Result<Box<dyn Source>> {
        Ok(Box::new(Generate(self.clone())))
    }
}

/// What the expressions see.
fn inputs() -> SchemaRef {
    schema_of([("seq", FieldType::Int), ("time", FieldType::Timestamp(None)), ("random", FieldType::Float)])
}

/// Polls four times per row, so that a row is hardly late, but neither all the time nor with overfull batches.
fn schedule(rate: Option<f64>) -> Schedule {
    let Some(rate) = rate.filter(|rate| *rate > 0.0) else { return Schedule::Continuous };
    let quarter = Duration::try_from_secs_f64(0.25 / rate).unwrap_or(POLL_MAX).clamp(POLL_MIN, POLL_MAX);
    // Half a batch leaves room to catch up.
    let half_batch = Duration::try_from_secs_f64(BATCH_ROWS_MAX as f64 / 2.0 / rate).unwrap_or(POLL_MAX);
    Schedule::Every(quarter.min(half_batch).max(Duration::from_millis(1)))
}

struct Generate(GenerateConfig);

#[async_trait]
impl Source for Generate {
    async fn connect(&mut self, position: Option<&[u8]>) -> Result<Reader> {
        let rate = self.0.rate.as_ref().map(|rate| rate.value);
        let timeline = match position {
            Some(position) => Timeline::read(position, rate)?,
            None => Timeline { rate, seq: 0, anchor_seq: 0, anchor_us: now_us() },
        };
        Ok(Reader::Pull(Box::new(GenerateReader { timeline, count: self.0.count, rows: Rows::new(&self.0)? })))
    }
}

struct GenerateReader {
    timeline: Timeline,
    count: Option<u64>,
    rows: Rows,
}

#[async_trait]
impl PullReader for GenerateReader {
    async fn next(&mut self) -> Result<Option<Pulled>> {
        let left = self.count.map_or(u64::MAX, |count| count.saturating_sub(self.timeline.seq));
        if left == 0 {
            return Ok(None);
        }
        let (first, times) = self.timeline.take(now_us(), left.min(BATCH_ROWS_MAX as u64));
        let (rows, errors) = self.rows.make(first, times)?;
        let more = rows.num_rows() + errors.len() == BATCH_ROWS_MAX;
        Ok(Some(Pulled { rows, errors, position: self.timeline.position(), more }))
    }
}

/// Which row is due when. Row `anchor_seq` has the time `anchor_us`, the others follow at the rate.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Timeline {
    rate: Option<f64>,
    /// Number of the next row.
    seq: u64,
    anchor_seq: u64,
    anchor_us: i64,
}

impl Timeline {
    /// Time of row `seq`.
    fn time(&self, seq: u64, rate: f64) -> i64 {
        let rows = seq.saturating_sub(self.anchor_seq);
        self.anchor_us.saturating_add((rows as f64 * 1e6 / rate) as i64)
    }

    /// The next rows that are due, at most `limit`: the number of the first, and their times.
    fn take(&mut self, now_us: i64, limit: u64) -> (u64, Vec<i64>) {
        let first = self.seq;
        let Some(rate) = self.rate else {
            self.seq += limit;
            return (first, vec![now_us; limit as usize]);
        };
        let next_us = self.time(first, rate);
        let overdue = now_us.saturating_sub(next_us);
        let early = next_us.saturating_sub(now_us).saturating_sub((1e6 / rate) as i64);
        // The second: the clock was set back.
        if overdue > CATCH_UP_MAX_US || early > CATCH_UP_MAX_US {
            self.anchor_seq = first;
            self.anchor_us = now_us;
        }
        let mut times = Vec::new();
        while (times.len() as u64) < limit {
            let time = self.time(self.seq, rate);
            if time > now_us {
                break;
            }
            times.push(time);
            self.seq += 1;
        }
        (first, times)
    }

    fn position(&self) -> Vec<u8> {
        let mut position = StateWriter::default();
        position.u64(self.seq);
        position.u64(self.anchor_seq);
        position.i64(self.anchor_us);
        position.f64(self.rate.unwrap_or(0.0));
        position.finish()
    }

    /// Goes on from a position; at another rate from the time of its last row on.
    fn read(position: &[u8], rate: Option<f64>) -> Result<Self> {
        let mut reader = StateReader::new(position);
        let (seq, anchor_seq, anchor_us) = (reader.u64()?, reader.u64()?, reader.i64()?);
        let old_rate = reader.f64()?;
        let old = Self { rate: (old_rate > 0.0).then_some(old_rate), seq, anchor_seq, anchor_us };
        if old.rate == rate {
            return Ok(old);
        }
        let anchor_us = old.rate.map_or_else(now_us, |old_rate| old.time(seq, old_rate));
        Ok(Self { rate, seq, anchor_seq: seq, anchor_us })
    }
}

/// Makes rows from their numbers and times.
struct Rows {
    columns: Vec<Column>,
    inputs: SchemaRef,
    schema: SchemaRef,
}

struct Column {
    name: String,
    expression: Expression,
    /// Start of the column's own random numbers; `None` if it uses none.
    random: Option<u64>,
}

impl Rows {
    fn new(config: &GenerateConfig) -> Result<Self> {
        let inputs = inputs();
        let mut columns = Vec::with_capacity(config.columns.len());
        for (name, text) in &config.columns {
            let expression = Expression::compile(text, &inputs)
                .map_err(|error| Error::user(format!("column `{name}`: {}", error.message)))?;
            // A text without the word cannot name the input.
            let random = text.contains("random").then(|| mix(config.seed ^ hash(name)));
            columns.push(Column { name: name.clone(), expression, random });
        }
        let fields: Vec<Field> = columns.iter().map(|column| column.expression.field(&column.name)).collect();
        Ok(Self { columns, inputs, schema: SchemaRef::new(Schema::new(fields)) })
    }

    fn make(&self, first: u64, times: Vec<i64>) -> Result<(RecordBatch, Vec<RowError>)> {
        let rows = times.len();
        let seqs = first..first + rows as u64;
        let seq: ArrayRef = Arc::new(Int64Array::from_iter_values(seqs.clone().map(|seq| seq as i64)));
        let event_us = Int64Array::from(times);
        let time: ArrayRef =
            Arc::new(TimestampMicrosecondArray::new(event_us.values().clone(), None).with_timezone("UTC"));
        let unused: ArrayRef = Arc::new(Float64Array::from_value(0.0, rows));
        let hidden = Times { ingest_us: event_us.clone(), watermark_us: event_us.clone(), event_us };
        let mut columns = Vec::with_capacity(self.columns.len());
        let mut errors = Vec::new();
        for column in &self.columns {
            let random: ArrayRef = match column.random {
                Some(start) => Arc::new(Float64Array::from_iter_values(seqs.clone().map(|seq| random(start, seq)))),
                None => ArrayRef::clone(&unused),
            };
            let inputs = vec![ArrayRef::clone(&seq), ArrayRef::clone(&time), random];
            let inputs = RecordBatch::try_new(SchemaRef::clone(&self.inputs), inputs)?;
            let failed_before = column.expression.failed_rows();
            columns.push(column.expression.evaluate(&Batch::new(inputs, hidden.clone(), Stage::Final)?)?);
            let failed = column.expression.failed_rows() - failed_before;
            if failed > 0 {
                errors.push(RowError::new(format!("column `{}` failed for {failed} rows", column.name), b""));
            }
        }
        Ok((RecordBatch::try_new(SchemaRef::clone(&self.schema), columns)?, errors))
    }
}

/// The `seq`-th number from 0 up to 1 of the stream that begins at `start`.
fn random(start: u64, seq: u64) -> f64 {
    let bits = mix(start.wrapping_add(seq.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
    // 53 bits are what a float holds.
    (bits >> 11) as f64 / (1_u64 << 53) as f64
}

/// The mixing step of SplitMix64 (Steele, Lea, Flood 2014): any row's number without those before it.
fn mix(mut z: u64) -> u64 {
    z = z.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// FNV-1a of a name.
fn hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use pipeline::json::encode_rows;

    use super::*;
    use crate::testing;

    fn config(yaml: &str) -> GenerateConfig {
        testing::read(yaml)
    }

    fn lines(config: &GenerateConfig, first: u64, times: Vec<i64>) -> Vec<String> {
        let (rows, _) = Rows::new(config).expect("rows").make(first, times).expect("rows");
        assert_eq!(rows.schema(), testing::check(config).expect("a shape").schema);
        encode_rows(&rows).iter().map(str::to_owned).collect()
    }

    #[test]
    fn columns_are_computed_from_number_and_time() {
        let config = config(
            "{rate: 2, columns: {id: \"concat('dev-', seq % 3)\", at: time, half: seq / 2.0, bad: 6 / (seq - 4)}}",
        );
        assert_eq!(
            lines(&config, 3, vec![0, 500_000]),
            [
                r#"{"id":"dev-0","at":"1970-01-01T00:00:00.000Z","half":1.5,"bad":-6}"#,
                r#"{"id":"dev-1","at":"1970-01-01T00:00:00.500Z","half":2.0,"bad":null}"#,
            ]
        );
        let (_, errors) = Rows::new(&config).expect("rows").make(3, vec![0, 500_000]).expect("rows");
        assert_eq!(errors, [RowError::new("column `bad` failed for 1 rows", b"")]);
    }

    #[test]
    fn random_is_told_by_seed_row_and_column_and_lies_between_0_and_1() {
        let values = |seed: u64, name: &str, first: u64, rows: usize| -> Vec<f64> {
            let config = config(&format!("{{rate: 1, seed: {seed}, columns: {{{name}: random}}}}"));
            let (rows, _) = Rows::new(&config).expect("rows").make(first, vec![0; rows]).expect("rows");
            let values = rows.column(0).as_any().downcast_ref::<Float64Array>().expect("floats");
            values.values().to_vec()
        };
        let all = values(7, "a", 0, 10_000);
        assert_eq!(all[4_000..], values(7, "a", 4_000, 6_000), "cut anywhere");
        assert_ne!(all[..10], values(8, "a", 0, 10));
        assert_ne!(all[..10], values(7, "b", 0, 10));
        assert!(all.iter().all(|value| (0.0..1.0).contains(value)));
        let mean = all.iter().sum::<f64>() / all.len() as f64;
        assert!((0.48..0.52).contains(&mean), "{mean}");
    }

    #[test]
    fn rows_fall_due_at_their_rate_and_go_on_from_a_position() {
        let start = 1_000_000_000;
        let mut timeline = Timeline { rate: Some(3.0), seq: 0, anchor_seq: 0, anchor_us: start };
        for (now, limit, expected) in [
            (start, 10, vec![0]),
            (start + 333_332, 10, vec![]),
            (start + 333_333, 10, vec![333_333]),
            (start + 2_000_000, 3, vec![666_666, 1_000_000, 1_333_333]),
        ] {
            let (_, times) = timeline.take(now, limit);
            assert_eq!(times.iter().map(|time| time - start).collect::<Vec<_>>(), expected, "{now}");
        }
        let read = |rate| Timeline::read(&timeline.position(), rate).expect("a position");
        assert_eq!(read(Some(3.0)), timeline);
        let slower = read(Some(1.0)).take(start + 9_000_000, 2);
        assert_eq!(slower, (5, vec![start + 1_666_666, start + 2_666_666]));
        assert!(Timeline::read(b"short", Some(1.0)).is_err());
    }

    #[test]
    fn a_long_stop_and_a_clock_set_back_leave_no_gap_in_the_numbers_and_no_flood() {
        let hour = 3_600_000_000;
        for now in [hour, -hour] {
            let mut timeline = Timeline { rate: Some(10.0), seq: 7, anchor_seq: 0, anchor_us: 0 };
            assert_eq!(timeline.take(now, 100), (7, vec![now]));
            assert_eq!(timeline.take(now + 200_000, 100), (8, vec![now + 100_000, now + 200_000]));
        }
        let mut timeline = Timeline { rate: Some(10.0), seq: 10, anchor_seq: 0, anchor_us: 0 };
        assert_eq!(timeline.take(30_000_000, 1_000).1.len(), 291, "half a minute is made up for");
    }

    #[tokio::test]
    async fn a_count_ends_the_source_and_a_restart_goes_on_with_the_next_row() {
        let config = config("{count: 20000, columns: {n: seq}}");
        assert!(testing::check(&config).expect("a shape").bounded);
        let (mut numbers, mut position, mut batches) = (Vec::new(), None::<Vec<u8>>, 0);
        loop {
            // A new connection for every batch.
            let mut source = config.build(testing::context()).expect("a source");
            let Reader::Pull(mut reader) = source.connect(position.as_deref()).await.expect("a reader") else {
                panic!("a pull source");
            };
            let Some(pulled) = reader.next().await.expect("rows") else { break };
            let column = pulled.rows.column(0).as_any().downcast_ref::<Int64Array>().expect("ints").clone();
            numbers.extend(column.values().iter().copied());
            position = Some(pulled.position);
            batches += 1;
        }
        assert_eq!((numbers, batches), ((0..20_000).collect::<Vec<i64>>(), 3));
    }

    #[test]
    fn wrong_options_are_reported_and_polls_suit_the_rate() {
        for (yaml, expected) in [
            ("{columns: {a: seq}}", "needs `rate`, `count` or both"),
            ("{rate: 0, columns: {a: seq}}", "1:8: error: source test: expected a rate above 0"),
            ("{rate: .nan, columns: {a: seq}}", "error"),
            ("{rate: 1, columns: {}}", "at least one column"),
            ("{rate: 1}", "`columns` is missing"),
            ("{rate: 1, columns: {a: random()}}", "differs from run to run"),
            ("{rate: 1, columns: {a: sequ}}", "did you mean `seq`?"),
        ] {
            let problems = testing::problems::<GenerateConfig>(yaml);
            assert!(problems.contains(expected), "{yaml}: {problems}");
        }
        for (rate, ms) in [(0.001, 1_000), (1.0, 250), (20.0, 12), (1_000.0, 10), (1e6, 4), (8e6, 1)] {
            let Schedule::Every(every) = schedule(Some(rate)) else { panic!("polled") };
            assert_eq!(every.as_millis(), ms, "{rate}");
        }
        assert_eq!(schedule(None), Schedule::Continuous);
    }
}
