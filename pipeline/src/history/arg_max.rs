//! `arg_max(value, order)` and `arg_min`: the value of the row with the greatest or least `order`, such as the latest value
//! of every device. DataFusion's `last_value(value ORDER BY order)` says the same and takes nearly twice
//! as long.

use std::mem::size_of_val;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, Int64Array, UInt64Array, new_null_array};
use arrow::compute::kernels::nullif::nullif;
use arrow::compute::{cast, interleave, not, prep_null_mask_filter, take};
use arrow::datatypes::{DataType, Decimal128Type, Field, FieldRef, Float64Type, Int64Type, UInt64Type};
use arrow::error::ArrowError;
use datafusion::common::{Result, ScalarValue, exec_err, plan_err};
use datafusion::logical_expr::function::{AccumulatorArgs, StateFieldsArgs};
use datafusion::logical_expr::utils::format_state_name;
use datafusion::logical_expr::{
    Accumulator, AggregateUDF, AggregateUDFImpl, EmitTo, GroupsAccumulator, Signature, Volatility,
};

/// Both functions. `max_by` and `min_by` are other engines' names for them.
pub(super) fn functions() -> [AggregateUDF; 2] {
    [("arg_max", ["max_by"], true), ("arg_min", ["min_by"], false)].map(|(name, aliases, greatest)| {
        let signature = Signature::user_defined(Volatility::Immutable);
        AggregateUDF::from(Extreme { name, greatest, signature }).with_aliases(aliases)
    })
}

/// Most digits of a decimal order: as many as a key holds exactly. A float would take neighbours for equal.
const KEY_DIGITS: u8 = 18;

/// The value beside the greatest or the least order. Rows in which either is null do not count; of equal ones the first
/// that was met does.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Extreme {
    name: &'static str,
    greatest: bool,
    signature: Signature,
}

impl AggregateUDFImpl for Extreme {
    fn name(&self) -> &str {
        self.name
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn coerce_types(&self, types: &[DataType]) -> Result<Vec<DataType>> {
        let [value, order] = types else {
            return plan_err!("{}(value, order) takes two arguments, not {}", self.name, types.len());
        };
        let order = match order {
            DataType::Timestamp(..) | DataType::Date32 => order.clone(),
            signed if signed.is_signed_integer() => DataType::Int64,
            unsigned if unsigned.is_unsigned_integer() => DataType::UInt64,
            DataType::Decimal32(precision, scale)
            | DataType::Decimal64(precision, scale)
            | DataType::Decimal128(precision, scale)
            | DataType::Decimal256(precision, scale) => match *precision <= KEY_DIGITS {
                true => DataType::Decimal128(*precision, *scale),
                false => {
                    return plan_err!(
                        "{} orders by decimals of at most {KEY_DIGITS} digits, not by {order}: cast it to one of fewer, \
                         or to double where near is as good as equal",
                        self.name
                    );
                }
            },
            number if number.is_numeric() => DataType::Float64,
            DataType::Null => DataType::Int64,
            other => return plan_err!("{} orders by a number or a time, not by {other}", self.name),
        };
        Ok(vec![value.clone(), order])
    }

    fn return_type(&self, types: &[DataType]) -> Result<DataType> {
        Ok(types[0].clone())
    }

    fn state_fields(&self, args: StateFieldsArgs<'_>) -> Result<Vec<FieldRef>> {
        let field = |part: &str, kind| Arc::new(Field::new(format_state_name(args.name, part), kind, true));
        Ok(vec![field("value", args.return_type().clone()), field("key", DataType::Int64)])
    }

    fn accumulator(&self, args: AccumulatorArgs<'_>) -> Result<Box<dyn Accumulator>> {
        Ok(Box::new(One(self.groups(args.return_type()))))
    }

    fn groups_accumulator_supported(&self, _args: AccumulatorArgs<'_>) -> bool {
        true
    }

    fn create_groups_accumulator(&self, args: AccumulatorArgs<'_>) -> Result<Box<dyn GroupsAccumulator>> {
        Ok(Box::new(self.groups(args.return_type())))
    }
}

impl Extreme {
    fn groups(&self, kind: &DataType) -> Groups {
        let held = vec![new_null_array(kind, 1)];
        Groups { greatest: self.greatest, keys: Vec::new(), places: Vec::new(), held, held_bytes: 0, met: Vec::new() }
    }
}

/// What each group has so far.
#[derive(Debug)]
struct Groups {
    greatest: bool,
    /// The greatest key of each group; see [`keys`].
    keys: Vec<i64>,
    /// Where the value beside it is: which of `held`, and which row.
    places: Vec<(usize, usize)>,
    /// A null, and arrays of values.
    held: Vec<ArrayRef>,
    held_bytes: usize,
    /// Within one batch: the groups that take a value over.
    met: Vec<usize>,
}

/// The place of a group that has no row yet.
const NOWHERE: (usize, usize) = (0, 0);

/// Arrays of values that are held before the values that still count are copied together.
const HELD_MAX: usize = 32;

impl Groups {
    fn take(
        &mut self,
        values: &ArrayRef,
        keys: &Int64Array,
        groups: &[usize],
        filter: Option<&BooleanArray>,
        total: usize,
    ) -> Result<()> {
        self.keys.resize(total, i64::MIN);
        self.places.resize(total, NOWHERE);
        let counts =
            |row| keys.is_valid(row) && values.is_valid(row) && filter.is_none_or(|f| f.is_valid(row) && f.value(row));
        let all = keys.null_count() == 0 && values.logical_null_count() == 0 && filter.is_none();
        let here = self.held.len();
        // From the end: rows mostly come in order, and so nearly all that follow are less than what was taken.
        for (row, (&group, &key)) in groups.iter().zip(keys.values()).enumerate().rev() {
            if key < self.keys[group] {
                continue;
            }
            let place = &mut self.places[group];
            let is_of_here = place.0 == here;
            if (key > self.keys[group] || is_of_here || *place == NOWHERE) && (all || counts(row)) {
                self.keys[group] = key;
                *place = (here, row);
                if !is_of_here {
                    self.met.push(group);
                }
            }
        }
        if !self.met.is_empty() {
            // The few values alone: to hold the whole array would keep its memory from the next one.
            let rows = self.met.iter().map(|&group| self.places[group].1 as u64);
            let kept = take(values, &UInt64Array::from_iter_values(rows), None)?;
            self.met.drain(..).enumerate().for_each(|(row, group)| self.places[group].1 = row);
            self.held_bytes += kept.get_array_memory_size();
            self.held.push(kept);
        }
        if self.held.len() > HELD_MAX { self.copy_together() } else { Ok(()) }
    }

    fn values(&self, places: &[(usize, usize)]) -> Result<ArrayRef> {
        let held: Vec<&dyn Array> = self.held.iter().map(|values| values.as_ref()).collect();
        Ok(interleave(&held, places)?)
    }

    /// Lets the rows go that no group needs any more.
    fn copy_together(&mut self) -> Result<()> {
        let mut values = self.values(&self.places)?;
        if let Some(views) = values.as_string_view_opt() {
            // Views hold the texts of every batch that they were taken from.
            values = Arc::new(views.gc());
        }
        for (row, place) in self.places.iter_mut().enumerate().filter(|(_, place)| **place != NOWHERE) {
            *place = (1, row);
        }
        self.held.truncate(1);
        self.held_bytes = values.get_array_memory_size();
        self.held.push(values);
        Ok(())
    }

    fn emit(&mut self, emit_to: EmitTo) -> Result<(ArrayRef, Int64Array)> {
        let places = emit_to.take_needed(&mut self.places);
        let keys = emit_to.take_needed(&mut self.keys);
        let known = places.iter().zip(keys).map(|(place, key)| (*place != NOWHERE).then_some(key));
        Ok((self.values(&places)?, known.collect()))
    }
}

impl GroupsAccumulator for Groups {
    fn update_batch(
        &mut self,
        values: &[ArrayRef],
        groups: &[usize],
        filter: Option<&BooleanArray>,
        total: usize,
    ) -> Result<()> {
        let keys = keys(&values[1], self.greatest)?;
        self.take(&values[0], &keys, groups, filter, total)
    }

    fn merge_batch(&mut self, values: &[ArrayRef], groups: &[usize], total: usize) -> Result<()> {
        self.take(&values[0], values[1].as_primitive::<Int64Type>(), groups, None, total)
    }

    fn convert_to_state(&self, values: &[ArrayRef], filter: Option<&BooleanArray>) -> Result<Vec<ArrayRef>> {
        let keys: ArrayRef = Arc::new(keys(&values[1], self.greatest)?);
        let keys = match filter {
            Some(filter) => nullif(&keys, &not(&prep_null_mask_filter(filter))?)?,
            None => keys,
        };
        Ok(vec![Arc::clone(&values[0]), keys])
    }

    fn evaluate(&mut self, emit_to: EmitTo) -> Result<ArrayRef> {
        Ok(self.emit(emit_to)?.0)
    }

    fn state(&mut self, emit_to: EmitTo) -> Result<Vec<ArrayRef>> {
        let (values, keys) = self.emit(emit_to)?;
        Ok(vec![values, Arc::new(keys)])
    }

    fn size(&self) -> usize {
        self.held_bytes + size_of_val(&*self.keys) + size_of_val(&*self.places)
    }
}

/// Without groups: one for all.
#[derive(Debug)]
struct One(Groups);

impl Accumulator for One {
    fn update_batch(&mut self, values: &[ArrayRef]) -> Result<()> {
        self.0.update_batch(values, &vec![0; values[0].len()], None, 1)
    }

    fn merge_batch(&mut self, states: &[ArrayRef]) -> Result<()> {
        self.0.merge_batch(states, &vec![0; states[0].len()], 1)
    }

    fn evaluate(&mut self) -> Result<ScalarValue> {
        let place = self.0.places.first().copied().unwrap_or(NOWHERE);
        ScalarValue::try_from_array(&self.0.held[place.0], place.1)
    }

    fn state(&mut self) -> Result<Vec<ScalarValue>> {
        let place = self.0.places.first().filter(|place| **place != NOWHERE);
        let key = place.and_then(|_| self.0.keys.first().copied());
        Ok(vec![self.evaluate()?, ScalarValue::Int64(key)])
    }

    fn size(&self) -> usize {
        self.0.size()
    }
}

/// Numbers that stand in the order of `order`, or in the opposite one.
fn keys(order: &ArrayRef, greatest: bool) -> Result<Int64Array> {
    let keys = match order.data_type() {
        DataType::Int64 => order.as_primitive::<Int64Type>().clone(),
        DataType::Timestamp(..) => cast(order, &DataType::Int64)?.as_primitive::<Int64Type>().clone(),
        DataType::Date32 => {
            cast(&cast(order, &DataType::Int32)?, &DataType::Int64)?.as_primitive::<Int64Type>().clone()
        }
        DataType::Decimal128(..) => order.as_primitive::<Decimal128Type>().try_unary(|value| {
            // Arithmetic may leave more digits in a column than its type says.
            i64::try_from(value)
                .map_err(|_| ArrowError::ComputeError(format!("an order has more than {KEY_DIGITS} digits")))
        })?,
        DataType::UInt64 => order.as_primitive::<UInt64Type>().unary(|value| (value ^ 1 << 63) as i64),
        DataType::Float64 => order.as_primitive::<Float64Type>().unary(|value: f64| {
            // As `f64::total_cmp` orders them.
            let bits = value.to_bits() as i64;
            bits ^ (((bits >> 63) as u64) >> 1) as i64
        }),
        other => return exec_err!("an order of {other}"),
    };
    Ok(if greatest { keys } else { keys.unary(|key| !key) })
}

#[cfg(test)]
mod tests {
    use arrow::array::{Float64Array, RecordBatch, StringArray};
    use arrow::datatypes::Schema;
    use datafusion::datasource::MemTable;
    use datafusion::execution::context::{SessionConfig, SessionContext};

    use super::*;

    /// Rows in many batches and two partitions, with nulls among values and orders, and orders of both signs.
    fn table() -> MemTable {
        let schema = Arc::new(Schema::new(vec![
            Field::new("device", DataType::Utf8, true),
            Field::new("value", DataType::Float64, true),
            Field::new("at", DataType::Int64, true),
        ]));
        let batch = |first: i64| {
            let rows = first..first + 10;
            // Spread as if by chance; each is there once, so that there is one right answer.
            let at = |n: i64| (n * 7919 % 1000) - 500;
            let columns: Vec<ArrayRef> = vec![
                Arc::new(StringArray::from_iter_values(rows.clone().map(|n| format!("d{}", n % 13)))),
                Arc::new(rows.clone().map(|n| (n % 11 > 0).then_some(n as f64)).collect::<Float64Array>()),
                Arc::new(rows.map(|n| (n % 17 > 0).then(|| at(n))).collect::<Int64Array>()),
            ];
            RecordBatch::try_new(Arc::clone(&schema), columns).expect("rows")
        };
        let partitions = (0..2).map(|part| (0..50).map(|n| batch(part * 500 + n * 10)).collect()).collect();
        MemTable::try_new(Arc::clone(&schema), partitions).expect("a table")
    }

    async fn csv(context: &SessionContext, sql: &str) -> Result<String, String> {
        let frame = context.sql(sql).await.map_err(|e| e.to_string())?;
        let batches = frame.collect().await.map_err(|e| e.to_string())?;
        Ok(arrow::util::pretty::pretty_format_batches(&batches).map_err(|e| e.to_string())?.to_string())
    }

    #[tokio::test]
    async fn the_value_beside_the_greatest_and_the_least_order_of_every_type() {
        let context =
            SessionContext::new_with_config(SessionConfig::new().with_target_partitions(2).with_batch_size(64));
        functions().into_iter().for_each(|function| context.register_udaf(function));
        context.register_table("t", Arc::new(table())).expect("registered");
        for order in [
            "at",
            "CAST(at AS int)",
            "CAST(at + 500 AS bigint unsigned)",
            "CAST(at AS double) / 3",
            "CAST(at AS decimal(10, 2))",
            "to_timestamp_micros(at)",
            "CAST(CAST(at AS int) AS date)",
        ] {
            for (function, last) in [("arg_max", "DESC"), ("arg_min", "ASC"), ("max_by", "DESC"), ("min_by", "ASC")] {
                for (grouped, key) in [("GROUP BY device ", "device, "), ("", "")] {
                    let found = format!("SELECT {key}{function}(value, {order}) AS v FROM t {grouped}ORDER BY 1");
                    let expected = format!(
                        "SELECT {key}first_value(value ORDER BY {order} {last}) AS v FROM t \
                         WHERE value IS NOT NULL AND at IS NOT NULL {grouped}ORDER BY 1"
                    );
                    assert_eq!(csv(&context, &found).await, csv(&context, &expected).await, "{found}");
                }
            }
        }
        for (sql, expected) in [
            (
                "SELECT arg_max(device, at) FILTER (WHERE at < 0) AS v FROM t",
                "first_value(device ORDER BY at DESC) FILTER (WHERE at < 0)",
            ),
            (
                "SELECT arg_max(arrow_cast(device || ' is its name', 'Utf8View'), at) AS v FROM t",
                "first_value(arrow_cast(device || ' is its name', 'Utf8View') ORDER BY at DESC)",
            ),
            ("SELECT arg_max(value, at) AS v FROM t WHERE at > 1000", "CAST(NULL AS double)"),
            ("SELECT arg_max(value, NULL) AS v FROM t", "CAST(NULL AS double)"),
        ] {
            let expected = format!("SELECT {expected} AS v FROM t WHERE at IS NOT NULL LIMIT 1");
            assert_eq!(csv(&context, sql).await, csv(&context, &expected).await, "{sql}");
        }
        let near = "(VALUES (1, '12345678901234567'), (2, '12345678901234568'), (3, '12345678901234566')) AS r(v, o)";
        for (kind, function, expected) in
            [("decimal(17, 0)", "arg_max", 2), ("decimal(18, 1)", "arg_max", 2), ("decimal(18, 1)", "arg_min", 3)]
        {
            let found = csv(&context, &format!("SELECT {function}(v, CAST(o AS {kind})) AS v FROM {near}")).await;
            assert_eq!(found, csv(&context, &format!("SELECT CAST({expected} AS bigint) AS v")).await, "{kind}");
        }
        let equal = "(VALUES (1, 4), (2, 5), (3, 5), (4, 5)) AS r(v, o)";
        let first = csv(&context, &format!("SELECT arg_max(v, o) AS v, arg_min(v, -o) AS w FROM {equal}")).await;
        assert_eq!(first, csv(&context, "SELECT CAST(2 AS bigint) AS v, CAST(2 AS bigint) AS w").await);
        for (sql, part) in [
            ("SELECT arg_max(value) FROM t", "takes two arguments"),
            ("SELECT arg_max(value, device) FROM t", "orders by a number or a time, not by Utf8"),
            (
                "SELECT arg_max(value, CAST(at AS decimal(19, 2))) FROM t",
                "decimals of at most 18 digits, not by Decimal128(19",
            ),
        ] {
            let error = csv(&context, sql).await.expect_err(sql);
            assert!(error.contains(part), "{error}");
        }
    }
}
