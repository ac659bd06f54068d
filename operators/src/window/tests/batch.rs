//! Streamed results equal those of DataFusion's batch SQL over the same rows, wherever batches are cut.

use std::collections::BTreeSet;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Int64Array, RecordBatch};
use arrow::compute::{cast, concat_batches};
use arrow::datatypes::{DataType, Field, Float64Type, Int64Type, Schema};
use datafusion::common::ScalarValue;
use datafusion::execution::context::{SessionConfig, SessionContext};

use super::{Random, Row, columns, random_rows, run, run_cut, watermarks};

/// How a column of the stream compares to one of the batch.
#[derive(Clone, Copy, Debug)]
enum Compare {
    Equal,
    /// Within 1e-9 relative.
    Close,
    /// The batch gives the values as a list; the stream their percentile.
    Percentile(f64),
    /// The batch gives a list of (time, value); the stream the counter's rate.
    CounterRate,
}

use Compare::{Close, CounterRate, Equal, Percentile};

/// Name, expression of the window, SQL of the batch, comparison.
const AGGREGATES: [(&str, &str, &str, Compare); 38] = [
    ("a_count", "count()", "count(*)", Equal),
    ("count_star", "count(*)", "count(*)", Equal),
    ("count_x", "count(x)", "count(x)", Equal),
    ("count_if", "count() FILTER (WHERE n > 0)", "count(*) FILTER (WHERE n > 0)", Equal),
    ("sum_n", "sum(n)", "sum(n)", Equal),
    ("sum_x", "sum(x)", "sum(x)", Close),
    ("sum_d", "sum(d)", "sum(d)", Equal),
    ("sum_if", "sum(x) FILTER (WHERE b)", "sum(x) FILTER (WHERE b)", Close),
    ("avg_x", "avg(x)", "avg(x)", Close),
    ("avg_n", "avg(n)", "avg(n)", Close),
    ("avg_d", "avg(d)", "avg(d)", Equal),
    ("avg_half", "avg(x / 2 + n)", "avg(x / 2 + n)", Close),
    ("min_x", "min(x)", "min(x)", Equal),
    ("max_x", "max(x)", "max(x)", Equal),
    ("min_n", "min(n)", "min(n)", Equal),
    ("max_s", "max(s)", "max(s)", Equal),
    ("min_s", "min(upper(s))", "min(upper(s))", Equal),
    ("max_d", "max(d)", "max(d)", Equal),
    ("min_ts", "min(ts)", "min(ts)", Equal),
    ("max_b", "max(b)", "max(b)", Equal),
    ("stddev_x", "stddev(x)", "stddev(x)", Close),
    ("stddev_pop", "stddev_pop(n)", "stddev_pop(n)", Close),
    ("var_x", "var(x)", "var(x)", Close),
    ("var_pop", "var_pop(d)", "var_pop(arrow_cast(d, 'Float64'))", Close),
    ("first_x", "first(x)", "first_value(x ORDER BY t, pos)", Equal),
    ("last_s", "last(s)", "last_value(s ORDER BY t, pos)", Equal),
    ("last_d", "last(d) IGNORE NULLS", "last_value(d ORDER BY t, pos) FILTER (WHERE d IS NOT NULL)", Equal),
    (
        "delta_n",
        "delta(n)",
        "last_value(n ORDER BY t, pos) FILTER (WHERE n IS NOT NULL) \
         - first_value(n ORDER BY t, pos) FILTER (WHERE n IS NOT NULL)",
        Equal,
    ),
    ("p50", "percentile(x, 0.5)", "array_agg(x)", Percentile(0.5)),
    ("p99", "percentile(x, 0.99)", "array_agg(x)", Percentile(0.99)),
    ("p07", "percentile(n, 0.07)", "array_agg(arrow_cast(n, 'Float64'))", Percentile(0.07)),
    ("distinct_s", "distinct(s)", "count(DISTINCT s)", Equal),
    ("distinct_x", "distinct(x)", "count(DISTINCT x)", Equal),
    ("counter", "rate(c)", "array_agg([t, c] ORDER BY t, pos) FILTER (WHERE c IS NOT NULL)", CounterRate),
    ("median", "median(x)", "median(x)", Equal),
    ("bits", "bit_and(n)", "bit_and(n)", Equal),
    ("count_distinct", "count(DISTINCT n)", "count(DISTINCT n)", Equal),
    ("nested", "round(sum(n) / nullif(count(n), 0)) + 1", "round(sum(n) / nullif(count(n), 0)) + 1", Close),
];

const KEYS: &str = "group_by: [key, group]";

fn yaml(kind: &str) -> String {
    let aggregates: String = AGGREGATES.iter().map(|(name, call, ..)| format!("  {name}: \"{call}\"\n")).collect();
    format!("{kind}\n{KEYS}\naggregate:\n{aggregates}")
}

/// A window of the batch: which rows it holds, as bounds of event time; whether it is given out only if a row
/// entered it since `changed_since_us`; and for sessions its key.
#[derive(Clone, Debug)]
struct Span {
    start_us: i64,
    end_us: i64,
    from_us: i64,
    changed_since_us: i64,
    key: Option<(Option<String>, Option<i64>)>,
}

impl Span {
    fn plain(start_us: i64, end_us: i64) -> Self {
        Self { start_us, end_us, from_us: start_us, changed_since_us: i64::MIN, key: None }
    }
}

/// What the batch gives for these windows, in the order of results. A row is in a window if its event time is,
/// and if the window had not ended for the row's watermark.
async fn batch(rows: &[Row], lateness_us: i64, spans: &[Span]) -> RecordBatch {
    let mut config = SessionConfig::new().with_target_partitions(1).with_information_schema(false);
    config.options_mut().sql_parser.enable_ident_normalization = false;
    let context = SessionContext::new_with_config(config);
    let visible = columns(rows);
    let ints = |values: Vec<i64>| -> ArrayRef { Arc::new(Int64Array::from(values)) };
    let with = |schema: &Schema, names: &[&str]| {
        let more = names.iter().map(|name| Arc::new(Field::new(*name, DataType::Int64, true)));
        Arc::new(Schema::new(schema.fields().iter().cloned().chain(more).collect::<Vec<_>>()))
    };
    let mut arrays = visible.columns().to_vec();
    arrays.push(ints(rows.iter().map(|row| row.event_us).collect()));
    arrays.push(ints((0..rows.len() as i64).collect()));
    arrays.push(ints(watermarks(rows, lateness_us)));
    let table = RecordBatch::try_new(with(visible.schema_ref(), &["t", "pos", "mark"]), arrays).expect("rows");
    context.register_batch("rows", table).expect("register");
    let bounds = [
        ("ws", spans.iter().map(|span| span.start_us).collect::<Vec<_>>()),
        ("we", spans.iter().map(|span| span.end_us).collect()),
        ("wf", spans.iter().map(|span| span.from_us).collect()),
        ("wc", spans.iter().map(|span| span.changed_since_us).collect()),
    ];
    let mut fields: Vec<Field> = bounds.iter().map(|(name, _)| Field::new(*name, DataType::Int64, true)).collect();
    let mut arrays: Vec<ArrayRef> = bounds.into_iter().map(|(_, values)| ints(values)).collect();
    fields.push(Field::new("wkey", DataType::Utf8, true));
    fields.push(Field::new("wgroup", DataType::Int64, true));
    let keys = || spans.iter().map(|span| span.key.clone().unwrap_or_default());
    arrays.push(Arc::new(keys().map(|key| key.0).collect::<arrow::array::StringArray>()));
    arrays.push(Arc::new(keys().map(|key| key.1).collect::<Int64Array>()));
    let table = RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays).expect("windows");
    context.register_batch("windows", table).expect("register");

    let aggregates: String = AGGREGATES.iter().map(|(name, _, sql, _)| format!("{sql} AS {name}, ")).collect();
    let by_key = if spans.iter().any(|span| span.key.is_some()) {
        "AND (r.key IS NOT DISTINCT FROM w.wkey) AND (r.\"group\" IS NOT DISTINCT FROM w.wgroup)"
    } else {
        ""
    };
    let sql = format!(
        "SELECT w.ws AS window_start, w.we AS window_end, r.key AS key, r.\"group\" AS \"group\", {aggregates} \
         count(*) AS rows, min(t) AS first_us, max(t) AS last_us \
         FROM rows r JOIN windows w ON r.t >= w.wf AND r.t < w.we AND r.mark < w.we {by_key} \
         GROUP BY w.ws, w.we, w.wc, r.key, r.\"group\" \
         HAVING max(greatest(r.t, r.mark)) >= w.wc \
         ORDER BY w.we, w.ws, r.key NULLS FIRST, r.\"group\" NULLS FIRST"
    );
    let frame = context.sql(&sql).await.expect("SQL");
    let schema = Arc::new(frame.schema().as_arrow().clone());
    concat_batches(&schema, &frame.collect().await.expect("batch")).expect("one schema")
}

fn float(array: &ArrayRef, row: usize) -> Option<f64> {
    let floats = cast(array, &DataType::Float64).expect("a number");
    let floats = floats.as_primitive::<Float64Type>();
    floats.is_valid(row).then(|| floats.value(row))
}

/// The exact value at rank ceil(q n).
fn percentile(list: &ArrayRef, row: usize, q: f64) -> Option<f64> {
    let lists = list.as_list::<i32>();
    if lists.is_null(row) {
        return None;
    }
    let mut values: Vec<f64> = lists.value(row).as_primitive::<Float64Type>().iter().flatten().collect();
    values.sort_by(f64::total_cmp);
    let rank = ((q * values.len() as f64) - 1e-9).ceil().max(1.0) as usize;
    values.get(rank - 1).copied()
}

fn counter_rate(list: &ArrayRef, row: usize) -> Option<f64> {
    let lists = list.as_list::<i32>();
    if lists.is_null(row) {
        return None;
    }
    let pairs = lists.value(row);
    let pairs = pairs.as_list::<i32>();
    let samples: Vec<(i64, i64)> = (0..pairs.len())
        .map(|index| {
            let pair = cast(&pairs.value(index), &DataType::Int64).expect("integers");
            let pair = pair.as_primitive::<Int64Type>();
            (pair.value(0), pair.value(1))
        })
        .collect();
    let increase: i64 =
        samples.windows(2).map(|pair| if pair[1].1 >= pair[0].1 { pair[1].1 - pair[0].1 } else { pair[1].1 }).sum();
    let span_us = samples.last()?.0 - samples.first()?.0;
    (span_us > 0).then(|| increase as f64 / (span_us as f64 / 1e6))
}

fn close(a: Option<f64>, b: Option<f64>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => (a - b).abs() <= 1e-9 * a.abs().max(b.abs()).max(1.0),
        (a, b) => a == b,
    }
}

fn same(streamed: &RecordBatch, batch: &RecordBatch, context: &str) {
    assert_eq!(streamed.num_rows(), batch.num_rows(), "results of {context}");
    let pair = |name: &str| {
        let ours = streamed.column_by_name(name).expect("a streamed column");
        (ours, batch.column_by_name(name).expect("a batch column"))
    };
    let equal = |name: &str, row: usize| {
        let (ours, theirs) = pair(name);
        let theirs = cast(theirs, ours.data_type()).expect("a cast");
        let one = |array: &ArrayRef| ScalarValue::try_from_array(array, row).expect("a value");
        assert_eq!(one(ours), one(&theirs), "{name} of result {row} of {context}");
    };
    for row in 0..streamed.num_rows() {
        for name in ["window_start", "window_end", "key", "group", "rows"] {
            equal(name, row);
        }
        for (name, _, _, compare) in &AGGREGATES {
            let (ours, theirs) = pair(name);
            let (ours, theirs) = match compare {
                Equal => {
                    equal(name, row);
                    continue;
                }
                Close => (float(ours, row), float(theirs, row)),
                Percentile(q) => (float(ours, row), percentile(theirs, row, *q)),
                CounterRate => (float(ours, row), counter_rate(theirs, row)),
            };
            assert!(close(ours, theirs), "{name} of result {row} of {context}: {ours:?}, not {theirs:?}");
        }
    }
}

/// All windows of a grid that hold any row.
fn grid(rows: &[Row], size_us: i64, every_us: i64) -> Vec<Span> {
    let starts: BTreeSet<i64> = rows
        .iter()
        .flat_map(|row| {
            let newest = row.event_us.div_euclid(every_us) * every_us;
            (0..).map(move |back| newest - back * every_us).take_while(move |start| start + size_us > row.event_us)
        })
        .collect();
    starts.into_iter().map(|start| Span::plain(start, start + size_us)).collect()
}

/// The sessions of rows of which none is late, from their definition.
fn sessions(rows: &[Row], gap_us: i64) -> Vec<Span> {
    let mut sorted: Vec<_> = rows.iter().map(|row| ((row.key.clone(), row.group), row.event_us)).collect();
    sorted.sort();
    let mut spans: Vec<Span> = Vec::new();
    for (key, event_us) in sorted {
        match spans.last_mut() {
            Some(span) if span.key.as_ref() == Some(&key) && event_us < span.end_us => span.end_us = event_us + gap_us,
            _ => spans.push(Span { key: Some(key), ..Span::plain(event_us, event_us + gap_us) }),
        }
    }
    spans
}

/// The ticks of running totals.
fn ticks(rows: &[Row], lateness_us: i64, every_us: i64, reset_us: Option<i64>) -> Vec<Span> {
    let marks = watermarks(rows, lateness_us);
    let tick = |(row, mark): (&Row, &i64)| row.event_us.max(*mark).div_euclid(every_us) * every_us + every_us;
    let ticks: BTreeSet<i64> = rows.iter().zip(&marks).map(tick).collect();
    let span = |end_us: i64| {
        let start_us = reset_us.map_or(i64::MIN, |reset_us| (end_us - 1).div_euclid(reset_us) * reset_us);
        Span { from_us: start_us, changed_since_us: end_us - every_us, ..Span::plain(start_us, end_us) }
    };
    ticks.into_iter().map(span).collect()
}

fn late_in(rows: &[Row], lateness_us: i64, last_end: impl Fn(i64) -> i64) -> u64 {
    let marks = watermarks(rows, lateness_us);
    rows.iter().zip(marks).filter(|(row, mark)| last_end(row.event_us) <= *mark).count() as u64
}

/// Streams the rows cut in several ways, and compares with the batch.
async fn check(kind: &str, rows: &[Row], lateness_us: i64, spans: &[Span], late: u64, random: &mut Random) {
    let context = format!("{kind}, lateness {lateness_us} us, {} rows, random {random:?}", rows.len());
    let text = yaml(kind);
    let expected = batch(rows, lateness_us, spans).await;
    let whole = run(&text, rows, lateness_us);
    let mut results = whole.results();
    if spans.iter().any(|span| span.start_us == i64::MIN) {
        // Without a reset, a total starts at the tick before its first row.
        results = without_start(&results, &expected, &context);
    }
    same(&results, &expected, &context);
    assert_eq!(whole.late_rows(), late, "late rows of {context}");
    for _ in 0..3 {
        let cut = run_cut(&text, rows, lateness_us, random);
        assert_eq!(cut.late_rows(), late, "late rows of {context}, cut");
        assert_same_results(&cut.results(), &whole.results(), &context);
    }
}

/// Checks `window_start` against the first row's time, then replaces it by the batch's.
fn without_start(results: &RecordBatch, expected: &RecordBatch, context: &str) -> RecordBatch {
    assert_eq!(results.num_rows(), expected.num_rows(), "results of {context}");
    let starts = cast(results.column(0), &DataType::Int64).expect("a timestamp");
    let first = expected.column_by_name("first_us").expect("the first row's time");
    for row in 0..results.num_rows() {
        let first_us = first.as_primitive::<Int64Type>().value(row);
        assert_eq!(
            starts.as_primitive::<Int64Type>().value(row),
            first_us.div_euclid(1_000_000) * 1_000_000,
            "{context}"
        );
    }
    let mut columns = results.columns().to_vec();
    columns[0] = cast(&expected.column(0).clone(), columns[0].data_type()).expect("a timestamp");
    RecordBatch::try_new(results.schema(), columns).expect("the same schema")
}

/// Equal results; what DataFusion's own accumulators give may differ in the last digits.
fn assert_same_results(a: &RecordBatch, b: &RecordBatch, context: &str) {
    assert_eq!(a.num_rows(), b.num_rows(), "results of {context}, cut");
    for (index, field) in a.schema().fields().iter().enumerate() {
        assert_eq!(a.column(index), b.column(index), "{} of {context}, cut", field.name());
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().build().expect("a runtime")
}

const SECOND: i64 = 1_000_000;

/// Rows of one case, with a lateness that is mostly shorter than their disorder. Neighbouring seeds go through the
/// combinations, so that none is left to chance.
fn case(seed: u64) -> (Vec<Row>, i64, Random) {
    let mut random = Random(seed);
    let pick = |among: &[i64], by: u64| among[(by % among.len() as u64) as usize];
    let displaced_us = pick(&[3 * SECOND, 300_000, 2 * SECOND, 0], seed);
    let lateness_us = pick(&[displaced_us / 3, 0, displaced_us], seed / 4);
    let grain_us = pick(&[100_000, 1_000, 500_000, 50_000, 250_000], seed);
    let count = pick(&[300, 120, 200, 60, 250, 1, 150, 0], seed / 2) as usize;
    (random_rows(&mut random, count, 20 * SECOND, displaced_us, grain_us), lateness_us, random)
}

#[test]
fn the_cases_hold_what_is_hard() {
    let (mut late, mut at_the_end, mut just_in_time, mut ties, mut behind_total) = (0, 0, 0, 0, 0);
    for seed in (0..24).chain(100..124).chain(400..424) {
        let (rows, lateness_us, _) = case(seed);
        for (row, mark) in rows.iter().zip(watermarks(&rows, lateness_us)) {
            let end_us = row.event_us.div_euclid(SECOND) * SECOND + SECOND;
            late += usize::from(end_us < mark);
            at_the_end += usize::from(end_us == mark);
            just_in_time += usize::from(row.event_us < mark && mark < end_us);
            // Late for a total's tick and not for the total.
            behind_total +=
                usize::from(end_us <= mark && mark < row.event_us.div_euclid(4 * SECOND) * 4 * SECOND + 4 * SECOND);
        }
        let distinct: BTreeSet<_> = rows.iter().map(|row| (row.key.clone(), row.group, row.event_us)).collect();
        ties += rows.len() - distinct.len();
    }
    let found = [late, at_the_end, just_in_time, ties, behind_total];
    assert!(found.iter().all(|count| *count > 50), "late, at the end, just in time, ties, behind a total: {found:?}");
}

#[test]
fn tumbling_windows_equal_the_batch() {
    runtime().block_on(async {
        for seed in 0..24 {
            let (rows, lateness, mut random) = case(seed);
            let size = [700_000, SECOND, 60 * SECOND][random.below(3)];
            let kind = format!("tumbling: {}ms", size / 1000);
            let late = late_in(&rows, lateness, |t| t.div_euclid(size) * size + size);
            check(&kind, &rows, lateness, &grid(&rows, size, size), late, &mut random).await;
        }
    });
}

#[test]
fn sliding_windows_equal_the_batch() {
    runtime().block_on(async {
        for seed in 100..124 {
            let (rows, lateness, mut random) = case(seed);
            let (size, every) = [(3 * SECOND, SECOND), (2_500_000, SECOND), (10 * SECOND, 4 * SECOND)][random.below(3)];
            let kind = format!("sliding: {{size: {}ms, every: {}ms}}", size / 1000, every / 1000);
            let late = late_in(&rows, lateness, |t| t.div_euclid(every) * every + size);
            check(&kind, &rows, lateness, &grid(&rows, size, every), late, &mut random).await;
        }
    });
}

#[test]
fn sessions_equal_the_batch() {
    runtime().block_on(async {
        for seed in 200..224 {
            let (rows, _, mut random) = case(seed);
            let gap = [200_000, SECOND, 5 * SECOND][random.below(3)];
            // No row is late: sessions that late rows would have joined have no simple definition.
            let kind = format!("session: {{gap: {}ms}}", gap / 1000);
            check(&kind, &rows, 3 * SECOND, &sessions(&rows, gap), 0, &mut random).await;
        }
    });
}

#[test]
fn late_rows_of_sessions_do_not_depend_on_batch_cuts() {
    for seed in 300..330 {
        let (rows, lateness, mut random) = case(seed);
        let text = yaml("session: {gap: 150ms}");
        let whole = run(&text, &rows, lateness / 2);
        let counted: i64 =
            whole.results().column_by_name("rows").expect("rows").as_primitive::<Int64Type>().iter().flatten().sum();
        assert_eq!(counted as u64 + whole.late_rows(), rows.len() as u64, "seed {seed}: every row counts once");
        let cut = run_cut(&text, &rows, lateness / 2, &mut random);
        assert_eq!(cut.late_rows(), whole.late_rows(), "seed {seed}");
        assert_same_results(&cut.results(), &whole.results(), &format!("seed {seed}"));
    }
}

#[test]
fn running_totals_equal_the_batch() {
    runtime().block_on(async {
        for seed in 400..424 {
            let (rows, lateness, mut random) = case(seed);
            let reset = [None, Some(4 * SECOND)][random.below(2)];
            let (kind, late) = match reset {
                None => ("none: {every: 1s}".to_owned(), 0),
                Some(reset) => (
                    "none: {every: 1s, reset: 4s}".to_owned(),
                    late_in(&rows, lateness, |t| t.div_euclid(reset) * reset + reset),
                ),
            };
            let spans = ticks(&rows, lateness, SECOND, reset);
            check(&kind, &rows, lateness, &spans, late, &mut random).await;
        }
    });
}

#[test]
fn large_windows_equal_the_batch_within_the_stated_errors() {
    let mut random = Random(7);
    let rows = random_rows(&mut random, 20_000, 50 * SECOND, 2 * SECOND, 1_000);
    let text = "tumbling: 60s\naggregate: {p50: 'percentile(x, 0.5)', p01: 'percentile(x, 0.01)', distinct_t: distinct(event_time), low: 'percentile(x, 0)', high: 'percentile(x, 1)', min: min(x), max: max(x)}";
    let results = run(text, &rows, 2 * SECOND).results();
    let cut = run_cut(text, &rows, 2 * SECOND, &mut random).results();
    assert_same_results(&cut, &results, "large windows");
    let windows = grid(&rows, 60 * SECOND, 60 * SECOND);
    assert_eq!(results.num_rows(), windows.len());
    for (row, window) in windows.iter().enumerate() {
        let inside = || rows.iter().filter(|one| one.event_us >= window.start_us && one.event_us < window.end_us);
        let mut values: Vec<f64> = inside().filter_map(|one| one.x).collect();
        values.sort_by(f64::total_cmp);
        for (name, q) in [("p50", 0.5), ("p01", 0.01)] {
            let exact = values[((q * values.len() as f64).ceil() as usize).max(1) - 1];
            let found = float(results.column_by_name(name).expect("a column"), row).expect("a value");
            assert!((found - exact).abs() <= 0.01 * exact.abs(), "{name}: {found}, not {exact}");
        }
        let column = |name: &str| float(results.column_by_name(name).expect("a column"), row);
        assert_eq!((column("low"), column("high")), (column("min"), column("max")), "the ends are exact");
        let exact = inside().map(|one| one.event_us).collect::<BTreeSet<_>>().len() as f64;
        let found = column("distinct_t").expect("a count");
        // Three times the standard error.
        assert!((found - exact).abs() <= 0.0243 * exact, "distinct: {found}, not {exact}");
    }
}
