//! `filter`: passes the rows for which a condition holds.

use pipeline::batch::Batch;
use pipeline::config::{At, CheckContext};
use pipeline::error::Result;
use pipeline::expression::Expression;
use pipeline::plugin::{Operator, OperatorConfig, Output, Planned, StreamShape};
use schemars::JsonSchema;
use serde::Deserialize;

const PAGE: &str = "\
Passes the rows for which a condition holds, and drops the others.

The condition is an SQL expression over the columns and the hidden `event_time` and `ingest_time`:
`filter: latency_ms >= 0 AND device_id <> 'test'`.

## Emits

The same columns in the same order. A row whose condition is null does not pass: say `x IS NULL OR x > 0` to keep rows
without `x`.

## State

None. Partial and revised rows of a window are judged like any other; a revised row may fail where its first
version passed, and then the first version stays.

## Limits

`now()`, `random()` and the like are refused: the same rows must pass when they are read again after a crash.

## Fails when

Never. A row for which the condition cannot be computed (a division by zero) does not pass and is counted among the
errors of the pipeline.
";

/// The condition, an SQL expression that gives true or false: `latency_ms >= 0`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct FilterConfig(pub At<String>);

impl OperatorConfig for FilterConfig {
    const TYPE: &'static str = "filter";
    const PAGE: &'static str = PAGE;
    const EXAMPLE: &'static str = "filter: latency_ms >= 0";

    fn keeps_columns(&self) -> bool {
        true
    }

    fn plan(&self, inputs: &[StreamShape], cx: &mut CheckContext<'_>) -> Option<Planned> {
        let shape = inputs.first()?.clone();
        let Some(condition) = cx.condition(&self.0, &shape.schema) else { return Some(Planned::broken(shape)) };
        Some(Planned { shape, operator: Box::new(Filter { condition }) })
    }
}

struct Filter {
    condition: Expression,
}

impl Operator for Filter {
    fn process(&mut self, _: usize, batch: Batch, out: &mut Output) -> Result<()> {
        let keep = self.condition.evaluate_condition(&batch)?;
        // Mostly all or nothing passes: then no column is copied, and rows already encoded stay so.
        match keep.true_count() {
            0 => {}
            all if all == batch.len() => out.push(batch),
            _ => out.push(batch.filter(&keep)?),
        }
        Ok(())
    }

    fn failed_rows(&self) -> u64 {
        self.condition.failed_rows()
    }
}

#[cfg(test)]
mod tests {
    use pipeline::schema::FieldType;

    use crate::testing::{Case, Columns, row};

    const COLUMNS: Columns<'static> = &[("id", FieldType::String), ("n", FieldType::Int)];

    fn case(step: &str) -> Case<'_> {
        Case { step, inputs: &[COLUMNS], keys: &[], windowed: false, lateness_s: 0.0 }
    }

    #[test]
    fn rows_pass_where_the_condition_is_true_and_not_where_it_is_null_or_fails() {
        let rows = [
            row(1.0, r#"{"id": "a", "n": 1}"#),
            row(2.0, r#"{"id": "b", "n": -1}"#),
            row(3.0, r#"{"id": "c"}"#),
            row(4.0, r#"{"id": "d", "n": 0}"#),
        ];
        let (a, b, c, d) =
            (r#"1 {"id":"a","n":1}"#, r#"2 {"id":"b","n":-1}"#, r#"3 {"id":"c","n":null}"#, r#"4 {"id":"d","n":0}"#);
        for (step, expected) in [
            ("filter: n >= 0", vec![a, d]),
            ("filter: n IS NULL OR n >= 0", vec![a, c, d]),
            ("filter: true", vec![a, b, c, d]),
            ("filter: id > 'z'", vec![]),
            ("filter: 1 / n < 0", vec![b]),
            ("filter: event_time > to_timestamp(2)", vec![c, d]),
        ] {
            case(step).gives(&rows, &expected);
        }
    }

    #[test]
    fn what_is_no_condition_is_reported_at_its_place() {
        for (step, expected) in [
            ("filter: n + 1", "test:1:9: error: step: expected a condition (bool), this is int"),
            ("filter: n > 0 AND m > 0", "test:1:19: error: step: no column `m` here"),
            ("filter: n >", "test:1:9: error: step:"),
            ("filter: {n: 1}", "test:1:9: error: step: expected"),
        ] {
            let problems = case(step).problems();
            assert!(problems.contains(expected), "{step}: {problems}");
        }
    }
}
