//! Behaviour at the edges, one case each.

use arrow::array::{Array, AsArray};
use arrow::datatypes::{Float64Type, Int64Type};
use arrow::util::display::array_value_to_string;

use super::{Row, Stream, columns, run};

const SECOND: i64 = 1_000_000;

/// The values of some columns of all results, as text.
fn values(stream: &Stream, columns: &[&str]) -> Vec<String> {
    let results = stream.results();
    let text = |name: &&str, row| {
        let column = results.column_by_name(name).unwrap_or_else(|| panic!("no column {name}"));
        if column.is_null(row) { "null".to_owned() } else { array_value_to_string(column, row).expect("text") }
    };
    (0..results.num_rows())
        .map(|row| columns.iter().map(|name| text(name, row)).collect::<Vec<_>>().join(" "))
        .collect()
}

/// The one value of one aggregate over rows in one window.
fn one(call: &str, rows: &[Row]) -> String {
    let stream = run(&format!("tumbling: 1h\naggregate:\n  a: \"{call}\""), rows, 3600 * SECOND);
    let values = values(&stream, &["a"]);
    assert_eq!(values.len(), 1, "one window");
    values.into_iter().next().expect("one value")
}

#[test]
fn late_row_is_counted_and_changes_nothing() {
    let rows = [Row::at_s(0.5), Row::at_s(2.0), Row::at_s(0.9), Row::at_s(2.1)];
    let stream = run("tumbling: 1s", &rows, 0);
    assert_eq!(values(&stream, &["rows"]), ["1", "2"]);
    assert_eq!(stream.late_rows(), 1);
}

#[test]
fn a_row_meets_the_watermark_of_the_rows_before_it_and_not_its_batch() {
    // The third row moved time on, but the second met an open window, in the same batch or not.
    let rows = [Row::at_s(0.5), Row::at_s(0.2), Row::at_s(5.0), Row::at_s(0.3)];
    let stream = run("tumbling: 1s", &rows, 0);
    assert_eq!((values(&stream, &["rows"]), stream.late_rows()), (vec!["2".to_owned(), "1".to_owned()], 1));
}

#[test]
fn a_row_late_for_some_sliding_windows_counts_in_the_others_only() {
    // 0.5 comes when the window [-1 s, 1 s) is closed and [0 s, 2 s) is open.
    let rows = [Row::at_s(0.1), Row::at_s(1.5), Row::at_s(0.5)];
    let stream = run("sliding: {size: 2s, every: 1s}", &rows, 0);
    assert_eq!(values(&stream, &["rows"]), ["1", "3", "1"]);
    assert_eq!(stream.late_rows(), 0);
}

#[test]
fn panes_have_the_greatest_length_that_divides_size_and_every() {
    // Windows [0, 2.5), [1, 3.5), [2, 4.5) over panes of 0.5 s.
    let rows: Vec<Row> = (0..10).map(|half| Row::at_s(f64::from(half) * 0.5)).collect();
    let stream = run("sliding: {size: 2500ms, every: 1s}", &rows, 0);
    let expected = ["1", "3", "5", "5", "5", "4", "2"];
    assert_eq!(values(&stream, &["rows"]), expected);
}

#[test]
fn windows_are_aligned_to_1970_before_it_too() {
    let stream = run("tumbling: 10s", &[Row::at_s(-0.000_001), Row::at_s(0.0)], 0);
    let expected = ["1969-12-31T23:59:50Z 1970-01-01T00:00:00Z 1", "1970-01-01T00:00:00Z 1970-01-01T00:00:10Z 1"];
    assert_eq!(values(&stream, &["window_start", "window_end", "rows"]), expected);
}

#[test]
fn times_beyond_all_windows_are_late_and_not_a_crash() {
    let far = |event_us| Row { event_us, ..Row::at_s(0.0) };
    let rows = [far(i64::MIN), Row::at_s(1.0), far(i64::MAX)];
    for kind in ["tumbling: 1s", "sliding: {size: 3s, every: 2s}", "session: {gap: 1s}", "none: {every: 1s}"] {
        let mut stream = Stream::new(kind);
        stream.push(&rows, &[i64::MIN; 3], 0);
        stream.watermark(i64::MAX);
        assert_eq!(stream.late_rows(), 2, "{kind}");
        assert_eq!(values(&stream, &["rows"]).last().map(String::as_str), Some("1"), "{kind}");
    }
}

#[test]
fn no_rows_give_no_results() {
    for kind in ["tumbling: 1s", "sliding: {size: 3s, every: 1s}", "session: {gap: 1s}", "none: {every: 1s}"] {
        let stream = run(&format!("{kind}\naggregate: {{n: count()}}"), &[], 0);
        assert_eq!(stream.results().num_rows(), 0, "{kind}");
    }
}

#[test]
fn results_carry_their_times() {
    let stream = run("tumbling: 1s", &[Row::at_s(0.5), Row::at_s(0.7), Row::at_s(0.6)], SECOND);
    let batch = &stream.batches[0];
    assert_eq!((batch.event_us(), batch.ingest_us()), (&[999_999][..], &[700_007][..]));
    assert_eq!(batch.watermark_us(), [999_999], "so that no window downstream finds it late");
    assert_eq!(values(&stream, &["stage", "revision"]), ["final 0"]);
}

#[test]
fn a_window_over_the_results_of_a_window_finds_none_late() {
    let rows: Vec<Row> = (0..100).map(|n| Row::at_s(f64::from(n) * 0.37).key(&format!("k{}", n % 3))).collect();
    let first = run("sliding: {size: 3s, every: 1s}\ngroup_by: [key]", &rows, 0);
    let mut second =
        super::plan("tumbling: 5s\naggregate: {n: sum(rows)}", first.shape.schema.clone()).expect("planned");
    let mut out = pipeline::plugin::Output::default();
    for batch in &first.batches {
        second.operator.process(0, batch.clone(), &mut out).expect("process");
    }
    second.operator.watermark(i64::MAX, &mut out).expect("watermark");
    assert_eq!(second.operator.late_rows(), 0);
    let total: i64 = out
        .take()
        .iter()
        .flat_map(|batch| batch.rows().column(2).as_primitive::<Int64Type>().iter().flatten().collect::<Vec<_>>())
        .sum();
    assert_eq!(total, 300, "each row is in three windows");
}

#[test]
fn nulls_are_a_key_of_their_own() {
    let rows = [
        Row::at_s(0.1),
        Row { key: None, ..Row::at_s(0.2) },
        Row::at_s(0.3).key(""),
        Row { key: None, ..Row::at_s(0.4) },
    ];
    let stream = run("tumbling: 1s\ngroup_by: [key]", &rows, 0);
    assert_eq!(values(&stream, &["key", "rows"]), ["null 2", " 1", "a 1"]);
}

#[test]
fn keys_of_every_type_come_back_as_they_were() {
    let rows: Vec<Row> =
        [(0.5, -3, "b\0c", -77, true), (-0.0, i64::MIN, "", 5, false), (f64::NAN, i64::MAX / 2_000_000, "ä", 0, true)]
            .into_iter()
            .map(|(x, n, s, d, b)| Row {
                x: Some(x),
                n: Some(n / 2_000_000),
                s: Some(s.to_owned()),
                d: Some(d),
                b: Some(b),
                ..Row::at_s(0.1)
            })
            .collect();
    let stream = run("tumbling: 1s\ngroup_by: [x, n, s, d, ts, b]", &rows, 0);
    let input = columns(&rows);
    let results = stream.results();
    assert_eq!(results.num_rows(), 3);
    for name in ["x", "n", "s", "d", "ts", "b"] {
        let text = |array: &dyn Array| {
            let mut all: Vec<String> =
                (0..3).map(|row| array_value_to_string(array, row).expect("text").replace("-0.0", "0.0")).collect();
            all.sort();
            all
        };
        let (ours, theirs) =
            (results.column_by_name(name).expect("a key"), input.column_by_name(name).expect("a column"));
        assert_eq!(ours.data_type(), theirs.data_type());
        assert_eq!(text(ours), text(theirs), "{name}");
    }
}

#[test]
fn integer_sums_never_wrap() {
    let rows = |ns: &[i64]| ns.iter().map(|n| Row { c: Some(*n), ..Row::at_s(0.0) }).collect::<Vec<_>>();
    assert_eq!(one("sum(c)", &rows(&[i64::MAX, 1])), "null");
    assert_eq!(one("sum(c)", &rows(&[i64::MAX, 1, -1])), i64::MAX.to_string());
    assert_eq!(one("sum(c)", &rows(&[i64::MIN, -1, 1])), i64::MIN.to_string());
    assert_eq!(one("avg(c)", &rows(&[i64::MAX, i64::MAX])), "9.223372036854776e18");
    assert_eq!(one("delta(c)", &rows(&[i64::MIN, i64::MAX])), "null");
    assert_eq!(one("min(c)", &rows(&[i64::MAX, i64::MIN])), i64::MIN.to_string());
}

#[test]
fn nan_is_the_greatest_float() {
    let rows: Vec<Row> = [f64::NAN, 1.0, f64::NEG_INFINITY].into_iter().map(|x| Row::at_s(0.0).x(x)).collect();
    let cases = [
        ("min(x)", "-inf"),
        ("max(x)", "NaN"),
        ("percentile(x, 0.5)", "1.0"),
        ("percentile(x, 1)", "NaN"),
        ("sum(x)", "NaN"),
        ("distinct(x)", "3"),
    ];
    for (call, expected) in cases {
        assert_eq!(one(call, &rows), expected, "{call}");
    }
    let rows: Vec<Row> = [f64::INFINITY, 1.0].into_iter().map(|x| Row::at_s(0.0).x(x)).collect();
    assert_eq!((one("sum(x)", &rows), one("avg(x)", &rows)), ("inf".to_owned(), "inf".to_owned()));
}

#[test]
fn aggregates_of_nulls_alone_are_null_or_zero() {
    let rows = [Row::at_s(0.0), Row::at_s(0.1)];
    for call in [
        "sum(x)",
        "avg(n)",
        "min(s)",
        "max(d)",
        "stddev(x)",
        "first(x)",
        "last(s)",
        "delta(n)",
        "rate(c)",
        "percentile(x, 0.5)",
        "median(x)",
    ] {
        assert_eq!(one(call, &rows), "null", "{call}");
    }
    for call in ["count(x)", "distinct(x)", "count() FILTER (WHERE x > 0)", "count(DISTINCT x)"] {
        assert_eq!(one(call, &rows), "0", "{call}");
    }
    assert_eq!(one("count()", &rows), "2");
}

#[test]
fn sums_of_floats_keep_their_digits() {
    let rows: Vec<Row> = [1e16, 1.0, 1.0, -1e16].into_iter().map(|x| Row::at_s(0.0).x(x)).collect();
    assert_eq!(one("sum(x)", &rows), "2.0");
    let rows: Vec<Row> = [1.0, 2.0, 3.0].into_iter().map(|x| Row::at_s(0.0).x(1e9 + x)).collect();
    assert_eq!(one("stddev(x)", &rows), "1.0");
    assert_eq!(one("stddev(x)", &rows[..1]), "null");
    assert_eq!(one("stddev_pop(x)", &rows[..1]), "0.0");
}

#[test]
fn first_and_last_go_by_event_time_then_arrival() {
    let rows =
        [Row::at_s(0.3).n(1), Row::at_s(0.1).n(2), Row::at_s(0.1).n(3), Row::at_s(0.3).n(4), Row::at_s(0.2).n(5)];
    assert_eq!(
        (one("first(n)", &rows), one("last(n)", &rows), one("delta(n)", &rows)),
        ("2".to_owned(), "4".to_owned(), "2".to_owned())
    );
    let rows = [Row::at_s(0.1), Row::at_s(0.2).n(7), Row::at_s(0.3)];
    assert_eq!(
        (one("first(n)", &rows), one("first(n) IGNORE NULLS", &rows), one("last(n) IGNORE NULLS", &rows)),
        ("null".to_owned(), "7".to_owned(), "7".to_owned())
    );
}

#[test]
fn a_counter_that_falls_has_restarted_from_zero() {
    let sample = |seconds: f64, c: i64| Row { c: Some(c), ..Row::at_s(seconds) };
    // 10 -> 30 -> (restart) 5 -> 15, out of order: 20 + 5 + 10 in 4 s.
    let rows = [sample(1.0, 10), sample(5.0, 15), sample(2.0, 30), sample(4.0, 5)];
    assert_eq!(one("rate(c)", &rows), "8.75");
    assert_eq!(one("rate(c * 0.5)", &rows), "4.375");
    assert_eq!(one("rate(c)", &rows[..1]), "null", "one sample has no rate");
    assert_eq!(one("rate(c)", &[sample(1.0, 1), sample(1.0, 5)]), "null", "no time passed");
}

#[test]
fn a_long_counter_keeps_its_increase_while_samples_are_folded() {
    let mut rows: Vec<Row> =
        (0..10_000).map(|n| Row { c: Some(n % 2500), ..Row::at_s(f64::from(n as i32) / 100.0) }).collect();
    for pair in rows.chunks_exact_mut(2) {
        pair.swap(0, 1);
    }
    // Four rises of 2499 and three restarts from 0 at 0.
    let rate: f64 = one("rate(c)", &rows).parse().expect("a number");
    assert!((rate - 4.0 * 2499.0 / 99.99).abs() < 1e-9, "{rate}");
}

#[test]
fn rates_divide_by_the_length_of_the_window() {
    let rows = [Row::at_s(0.0), Row::at_s(0.5), Row::at_s(1.0), Row::at_s(1.9)];
    let rates = |kind: &str| {
        let stream = run(
            &format!(
                "{kind}\naggregate: {{r: rate(), odd: rate() FILTER (WHERE event_time > '1970-01-01T00:00:00.9')}}"
            ),
            &rows,
            SECOND,
        );
        values(&stream, &["r", "odd"])
    };
    assert_eq!(rates("tumbling: 2s"), ["2.0 1.0"]);
    assert_eq!(rates("sliding: {size: 4s, every: 2s}"), ["1.0 0.5", "1.0 0.5"]);
    assert_eq!(rates("session: {gap: 10s}"), [format!("{} {}", 4.0 / 1.9, 2.0 / 1.9)]);
    assert_eq!(rates("none: {every: 1s}"), ["2.0 0.0", "2.0 1.0"]);
    let stream = run("session: {gap: 1s}\naggregate: {r: rate()}", &rows[..1], 0);
    assert_eq!(values(&stream, &["r"]), ["null"], "a session of one row has no span");
}

#[test]
fn percentiles_take_the_rank_of_sql() {
    let rows: Vec<Row> = (1..=100).map(|n| Row::at_s(0.0).n(n)).collect();
    for (q, expected) in
        [("0", "1.0"), ("0.07", "7.0"), ("0.5", "50.0"), ("0.991", "100.0"), ("0.99", "99.0"), ("1", "100.0")]
    {
        assert_eq!(one(&format!("percentile(n, {q})"), &rows), expected, "{q}");
    }
}

#[test]
fn large_percentiles_are_within_one_percent_for_all_floats() {
    let mut rows: Vec<Row> = Vec::new();
    for exponent in -300..300 {
        for sign in [-1.0, 1.0] {
            rows.extend((1..5).map(|n| Row::at_s(0.0).x(sign * f64::from(n) * 10_f64.powi(exponent))));
        }
    }
    rows.extend((0..200).map(|_| Row::at_s(0.0).x(0.0)));
    let mut sorted: Vec<f64> = rows.iter().filter_map(|row| row.x).collect();
    sorted.sort_by(f64::total_cmp);
    let results = run(
        "tumbling: 1h\naggregate: {a: 'percentile(x, 0.1)', b: 'percentile(x, 0.5)', c: 'percentile(x, 0.8)'}",
        &rows,
        0,
    )
    .results();
    for (name, q) in [("a", 0.1), ("b", 0.5), ("c", 0.8)] {
        let exact = sorted[(q * sorted.len() as f64).ceil() as usize - 1];
        let found = results.column_by_name(name).expect("a column").as_primitive::<Float64Type>().value(0);
        assert!((found - exact).abs() <= 0.01 * exact.abs(), "{name}: {found}, not {exact}");
    }
}

#[test]
fn a_row_between_two_sessions_joins_them() {
    let rows = [Row::at_s(0.0).n(1), Row::at_s(1.5).n(2), Row::at_s(0.8).n(3)];
    let stream = run("session: {gap: 1s}\naggregate: {l: last(n), f: first(n)}", &rows, 10 * SECOND);
    assert_eq!(
        values(&stream, &["window_start", "window_end", "rows", "f", "l"]),
        ["1970-01-01T00:00:00Z 1970-01-01T00:00:02.500Z 3 1 2"]
    );
    let stream = run("session: {gap: 1s}", &[Row::at_s(0.0), Row::at_s(1.0)], 10 * SECOND);
    assert_eq!(values(&stream, &["rows"]), ["1", "1"], "a silence of exactly the gap ends a session");
}

#[test]
fn a_late_row_that_joins_an_open_session_is_not_late() {
    let rows = [Row::at_s(1.5), Row::at_s(2.2), Row::at_s(0.9), Row::at_s(0.1)];
    // At 2.2 s the row at 0.9 would end at 1.9 by itself, but the session at 1.5 s takes it in; then 0.1 joins, too.
    let stream = run("session: {gap: 1s}", &rows, 0);
    assert_eq!((values(&stream, &["rows"]), stream.late_rows()), (vec!["4".to_owned()], 0));
}

#[test]
fn running_totals_are_given_out_for_changed_keys_and_reset() {
    let rows = [
        Row::at_s(0.1).key("a"),
        Row::at_s(0.2).key("b"),
        Row::at_s(1.1).key("a"),
        Row::at_s(3.5).key("b"),
        Row::at_s(4.5).key("b"),
    ];
    let stream = run("none: {every: 1s, reset: 4s}\ngroup_by: [key]\naggregate: {n: count()}", &rows, 0);
    let columns = ["window_start", "window_end", "key", "n"];
    let expected = [
        "1970-01-01T00:00:00Z 1970-01-01T00:00:01Z a 1",
        "1970-01-01T00:00:00Z 1970-01-01T00:00:01Z b 1",
        "1970-01-01T00:00:00Z 1970-01-01T00:00:02Z a 2",
        "1970-01-01T00:00:00Z 1970-01-01T00:00:04Z b 2",
        "1970-01-01T00:00:04Z 1970-01-01T00:00:05Z b 1",
    ];
    assert_eq!(values(&stream, &columns), expected);
}

#[test]
fn a_row_late_for_a_tick_enters_the_running_total_at_the_next() {
    let rows = [Row::at_s(0.5).n(1), Row::at_s(2.5).n(2), Row::at_s(0.6).n(4)];
    let stream = run("none: {every: 1s}\naggregate: {n: sum(n)}", &rows, 0);
    assert_eq!((values(&stream, &["n"]), stream.late_rows()), (vec!["1".to_owned(), "7".to_owned()], 0));
}

#[test]
fn other_functions_of_datafusion_work_by_name() {
    let rows: Vec<Row> = (1..=4)
        .map(|n| Row {
            s: Some(format!("s{n}")),
            b: Some(n > 1),
            ..Row::at_s(f64::from(n as i32)).n(n).x(2.0 * n as f64)
        })
        .collect();
    let cases = [
        ("array_agg(n)", "[1, 2, 3, 4]"),
        ("string_agg(s, '-')", "s1-s2-s3-s4"),
        ("corr(n, x)", "1.0"),
        ("bit_or(n)", "7"),
        ("bool_and(b)", "false"),
        ("approx_distinct(s)", "4"),
        ("approx_median(n)", "2.5"),
        ("covar_samp(n, x)", "3.3333333333333335"),
        ("regr_slope(x, n)", "2.0"),
        ("median(n)", "2.5"),
        ("sum(DISTINCT n / 2)", "3"),
        ("array_agg(n) FILTER (WHERE b)", "[2, 3, 4]"),
        ("SUM(n) + COUNT(*)", "14"),
    ];
    for (call, expected) in cases {
        assert_eq!(one(call, &rows), expected, "{call}");
    }
    let sliding = run("sliding: {size: 4s, every: 2s}\naggregate: {a: array_agg(n)}", &rows, 0);
    assert_eq!(values(&sliding, &["a"]), ["[1]", "[1, 2, 3]", "[2, 3, 4]", "[4]"]);
}

#[test]
fn a_state_of_another_window_is_an_error_and_not_a_crash() {
    use pipeline::state::{StateReader, StateWriter};
    let mut other = StateWriter::default();
    let one = super::plan("tumbling: 1s\naggregate: {n: sum(n)}", super::schema()).expect("planned").operator;
    one.snapshot(&mut other);
    let bytes = other.finish();
    let two = || super::plan("tumbling: 1s", super::schema()).expect("planned").operator;
    assert!(two().restore(&mut StateReader::new(&bytes)).is_err());
    assert!(two().restore(&mut StateReader::new(&bytes[..bytes.len() - 1])).is_err());
    assert!(two().restore(&mut StateReader::new(&[])).is_err());
}

#[test]
fn results_of_one_window_are_in_the_order_of_their_keys() {
    let rows: Vec<Row> = [Some(2.0), None, Some(-1.5), Some(f64::NAN), Some(f64::NEG_INFINITY), Some(0.0), Some(-0.0)]
        .into_iter()
        .map(|x| Row { x, n: x.map(|x| if x > 0.0 { 3 } else { -5 }), ..Row::at_s(0.0) })
        .collect();
    let stream = run("tumbling: 1s\ngroup_by: [n, x]", &rows, 0);
    let expected = ["null null 1", "-5 -inf 1", "-5 -1.5 1", "-5 0.0 2", "-5 NaN 1", "3 2.0 1"];
    assert_eq!(values(&stream, &["n", "x", "rows"]), expected);
}

#[test]
fn one_call_may_stand_in_many_expressions() {
    let rows = [Row::at_s(0.1).x(2.0).n(3), Row::at_s(0.2).x(4.0).n(5)];
    let text = "tumbling: 1s\ngroup_by: [key]\naggregate: {a: min(x), b: min(x) + 1, c: 'min(x) / max(x)', d: \"key || '!'  || count()\", e: 'case when sum(n) > 7 then avg(n) end'}";
    let stream = run(text, &rows, 0);
    assert_eq!(values(&stream, &["a", "b", "c", "d", "e"]), ["2.0 3.0 0.5 a!2 4.0"]);
}
