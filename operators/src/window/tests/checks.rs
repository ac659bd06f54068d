//! What the YAML may say, and where problems point.

use super::{plan, schema};

/// Each YAML with the place and the words of its first problem.
#[track_caller]
fn refused(yaml: &str, expected: &str) {
    let problems = plan(yaml, schema()).map(|_| "planned").expect_err(yaml);
    assert!(problems.contains(expected), "{yaml}\n{problems}\ndoes not say: {expected}");
}

#[test]
fn a_window_has_exactly_one_kind() {
    refused("aggregate: {n: count()}", "1:1: error: step: a window needs its kind");
    refused("tumbling: 1s\nsession: {gap: 1s}", "2:10: error: step: a window has one kind, and `tumbling` is given");
    refused("tumbling: 0s", "1:11: error: step: tumbling: the length must be more than 0s");
    refused("sliding: {size: 1s, every: 2s}", "sliding: every 2s is longer than size 1s");
    refused("sliding: {size: 1d, every: 1s}", "sliding: 86400 panes of 1s per window, more than 10000");
    refused("none: {every: 2s, reset: 3s}", "none: `reset` must be a multiple of `every`");
    assert!(plan("tumbling: 1s", schema()).is_ok(), "`rows` is there without an aggregate");
}

#[test]
fn what_is_not_available_yet_is_refused_at_its_place() {
    refused("tumbling: 1s\nallowed_lateness: 5s", "2:19: error: step: `allowed_lateness` is not available yet");
    refused("tumbling: 1s\nemit: {partial: true}", "2:17: error: step: `partial: true` is not available yet");
    refused("tumbling: 1s\nemit: {final: false}", "2:15: error: step: `final: false` is not available yet");
    assert!(plan("tumbling: 1s\nallowed_lateness: 0s\nemit: {final: true}", schema()).is_ok());
}

#[test]
fn problems_point_into_the_expression() {
    let window = |call: &str| format!("tumbling: 1s\naggregate:\n  a: {call}");
    let cases = [
        ("avg(latncy)", "3:10: error: step: no column `latncy` here"),
        ("avrg(x)", "3:6: error: step: no function `avrg`\n  hint: did you mean `avg`?"),
        ("1 + percentil(x, 0.9)", "3:10: error: step: no function `percentil`\n  hint: did you mean `percentile`?"),
        ("sum(s)", "3:6: error: step: `sum` takes a number, `s` is string"),
        ("rate(b)", "3:6: error: step: `rate` takes a number, `b` is bool"),
        ("avg(x, n)", "3:6: error: step: `avg` takes 1 argument, found 2"),
        ("avg()", "3:6: error: step: `avg` takes 1 argument, found 0"),
        ("percentile(x)", "`percentile` takes 2 arguments, found 1"),
        ("percentile(x, 99)", "`99` is no rank: expected a number from 0 to 1\n  hint: did you mean `0.99`?"),
        ("percentile(x, n)", "`n` is no rank"),
        ("sum(x) + n", "3:15: error: step: `n` stands outside of an aggregate"),
        ("x", "no aggregate function here"),
        ("abs(x)", "no aggregate function here"),
        ("sum(avg(x))", "an aggregate stands only in the `aggregate` of a window"),
        ("count() FILTER (WHERE x)", "FILTER expects a condition (bool), `x` is float"),
        ("sum(x) OVER ()", "OVER has no place here"),
        ("array_agg(x ORDER BY n)", "ORDER BY has no place here"),
        ("corr(x)", "error: step:"),
        ("median(s)", "error: step:"),
        ("sum(x", "error: step:"),
        ("count(now())", "`now` differs from run to run"),
        ("sum(*)", "`*` is no argument for `sum`"),
        ("percentile(DISTINCT x, 0.5)", "`percentile` takes no DISTINCT"),
    ];
    for (call, expected) in cases {
        refused(&window(call), expected);
    }
}

#[test]
fn keys_and_names_are_checked() {
    refused("tumbling: 1s\ngroup_by: [kay]", "2:12: error: step: no column `kay` here\n  hint: did you mean `key`?");
    refused("tumbling: 1s\ngroup_by: [key, key]", "2:17: error: step: `key` is in `group_by` twice");
    refused("tumbling: 1s\naggregate: {rows: count()}", "`rows` cannot be the name of an aggregate");
    refused("tumbling: 1s\ngroup_by: [key]\naggregate: {key: count()}", "`key` is a column of `group_by` already");
    refused("tumbling: 1s\naggregate: {a-b: count()}", "`a-b` is no column name");
    refused(
        "tumbling: 1s\ngrup_by: [key]",
        "2:1: error: step: unknown key `grup_by`\n  hint: did you mean `group_by`?",
    );
}

#[test]
fn every_problem_is_reported_at_once() {
    let yaml = "tumbling: 1s\ngroup_by: [nokey]\naggregate: {a: sum(s), b: avg(nothing)}";
    let problems = plan(yaml, schema()).map(|_| "planned").expect_err(yaml);
    assert_eq!(problems.matches("error:").count(), 3, "{problems}");
}

#[test]
fn the_example_plans_over_the_documented_columns() {
    use pipeline::plugin::OperatorConfig;
    use pipeline::schema::{FieldType, schema_of};
    let columns = schema_of([
        ("device_id", FieldType::String),
        ("latency_ms", FieldType::Float),
        ("ts", FieldType::Timestamp(None)),
    ]);
    let shape = plan(super::WindowConfig::EXAMPLE, columns).map(|planned| planned.shape).expect("the example plans");
    let names: Vec<&str> = shape.schema.fields().iter().map(|field| field.name().as_str()).collect();
    let expected =
        ["window_start", "window_end", "device_id", "rps", "avg_delay_ms", "p99_ms", "rows", "stage", "revision"];
    assert_eq!(names, expected);
    assert_eq!((shape.keys, shape.windowed), (vec!["device_id".to_owned()], true));
}
