//! `extract(epoch from a - b)` with its fraction.
//!
//! DataFusion cuts the epoch of a duration to whole seconds (of a timestamp it does not), so that a delay of 0.9 s
//! would be 0. A rewrite computes it from the duration's own unit.

use arrow::datatypes::{DataType, TimeUnit};
use datafusion::common::config::ConfigOptions;
use datafusion::common::tree_node::Transformed;
use datafusion::common::{DFSchema, Result, ScalarValue};
use datafusion::logical_expr::expr_rewriter::FunctionRewrite;
use datafusion::logical_expr::{Expr, ExprSchemable, cast, lit};

/// Makes `extract(epoch from duration)` a float of seconds. To be registered with every session.
#[derive(Debug)]
pub struct EpochOfDuration;

impl FunctionRewrite for EpochOfDuration {
    fn name(&self) -> &str {
        "epoch_of_duration"
    }

    fn rewrite(&self, expr: Expr, schema: &DFSchema, _: &ConfigOptions) -> Result<Transformed<Expr>> {
        let Some(duration) = epoch_argument(&expr) else { return Ok(Transformed::no(expr)) };
        let DataType::Duration(unit) = duration.get_type(schema)? else { return Ok(Transformed::no(expr)) };
        let per_second = match unit {
            TimeUnit::Second => 1.0,
            TimeUnit::Millisecond => 1e3,
            TimeUnit::Microsecond => 1e6,
            TimeUnit::Nanosecond => 1e9,
        };
        let count = cast(cast(duration.clone(), DataType::Int64), DataType::Float64);
        Ok(Transformed::yes(count / lit(per_second)))
    }
}

/// `x` of `date_part('epoch', x)`, which is what `extract(epoch from x)` becomes.
fn epoch_argument(expr: &Expr) -> Option<&Expr> {
    let Expr::ScalarFunction(call) = expr else { return None };
    let [Expr::Literal(part, _), argument] = call.args.as_slice() else { return None };
    let part = match part {
        ScalarValue::Utf8(Some(part)) | ScalarValue::Utf8View(Some(part)) | ScalarValue::LargeUtf8(Some(part)) => part,
        _ => return None,
    };
    (call.func.name() == "date_part" && part.eq_ignore_ascii_case("epoch")).then_some(argument)
}
