//! SQL expressions over a batch: parsed, type-checked and planned by DataFusion when the graph is checked.
//!
//! Two things are ours. Every expression gives one of the engine's own types ([`engine_type`]): what DataFusion
//! would give as `Utf8View`, `UInt64` or `Timestamp(ns)` is cast. And a row for which the expression fails
//! (a division by zero, a text that is no number) is null and counted, where DataFusion fails the whole batch:
//! otherwise one row could stop a graph, and results would depend on where batches are cut.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, LazyLock};

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, RecordBatch, new_null_array};
use arrow::compute::concat;
use arrow::datatypes::{DataType, Field, SchemaRef};
use arrow::error::ArrowError;
use datafusion::common::tree_node::TreeNode;
use datafusion::common::{Column, DFSchema, DataFusionError, ScalarValue, SchemaError};
use datafusion::execution::context::{SessionConfig, SessionContext, SessionState};
use datafusion::logical_expr::expr_rewriter::FunctionRewrite;
use datafusion::logical_expr::simplify::SimplifyContext;
use datafusion::logical_expr::{ColumnarValue, Expr};
use datafusion::optimizer::simplify_expressions::ExprSimplifier;
use datafusion::physical_expr::PhysicalExpr;
use datafusion::physical_expr::expressions::cast;
use datafusion::sql::sqlparser::ast;
use datafusion::sql::sqlparser::dialect::GenericDialect;
use datafusion::sql::sqlparser::parser::Parser;
use datafusion::sql::sqlparser::tokenizer::Tokenizer;

use crate::batch::{Batch, EVENT_TIME, INGEST_TIME, with_hidden_columns};
use crate::config::did_you_mean;
use crate::epoch::EpochOfDuration;
use crate::error::{Error, Result};
use crate::schema::{engine_type, is_json};

/// Longest text of one expression. The parser is recursive; longer ones are generated, not written.
const TEXT_BYTES_MAX: usize = 16 * 1024;

/// Functions whose value differs from run to run, with what to use instead.
const REFUSED: [(&str, &str); 9] = [
    ("now", INGEST_TIME),
    ("current_timestamp", INGEST_TIME),
    ("current_date", INGEST_TIME),
    ("current_time", INGEST_TIME),
    ("today", INGEST_TIME),
    ("random", ""),
    ("rand", ""),
    ("uuid", ""),
    ("version", ""),
];

/// What is wrong with an expression's text, and where in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpressionError {
    /// Character in the text, from 0.
    pub offset: Option<usize>,
    /// What is wrong.
    pub message: String,
    /// What to write instead.
    pub hint: Option<String>,
}

impl ExpressionError {
    /// An error about the whole text.
    pub fn new(message: impl Into<String>) -> Self {
        Self { offset: None, message: message.into(), hint: None }
    }
}

/// A checked expression, ready to run over batches of one schema. Clones share the count of failed rows.
#[derive(Clone)]
pub struct Expression {
    physical: Arc<dyn PhysicalExpr>,
    data_type: DataType,
    /// Marks a `json` column that is passed on as it is.
    metadata: HashMap<String, String>,
    nullable: bool,
    needs_hidden: bool,
    failed_rows: Arc<AtomicU64>,
}

impl fmt::Debug for Expression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} as {}", self.physical, self.data_type)
    }
}

impl Expression {
    /// Compiles `text` over the columns of `schema` and the hidden times. Names are case-sensitive as written.
    pub fn compile(text: &str, schema: &SchemaRef) -> Result<Self, ExpressionError> {
        Self::of_ast(text, parse(text)?, schema)
    }

    /// Compiles a part of `text` that is already parsed, such as the argument of an aggregate.
    pub fn of_ast(text: &str, expression: ast::Expr, schema: &SchemaRef) -> Result<Self, ExpressionError> {
        refuse_varying(text)?;
        let state: &SessionState = &STATE;
        let visible = with_hidden_columns(schema);
        let df_schema = DFSchema::try_from(visible.as_ref().clone()).map_err(|e| describe(&e, text, schema))?;
        let located = ast::ExprWithAlias { expr: expression, alias: None };
        let logical =
            state.create_logical_expr_from_sql_expr(located, &df_schema).map_err(|e| describe(&e, text, schema))?;
        if contains_aggregate(&logical) {
            return Err(ExpressionError {
                offset: None,
                message: "an aggregate stands only in the `aggregate` of a window".to_owned(),
                hint: None,
            });
        }
        let physical = simplify(state, logical, &df_schema)
            .and_then(|simple| state.create_physical_expr(simple, &df_schema))
            .map_err(|e| describe(&e, text, schema))?;
        let field = physical.return_field(&visible).map_err(|e| describe(&e, text, schema))?;
        let data_type = column_type(field.data_type())?;
        // A `json` column that is passed on stays one; text made from it is text.
        let metadata = if is_json(&field) { field.metadata().clone() } else { HashMap::new() };
        let physical = cast(physical, &visible, data_type.clone()).map_err(|e| describe(&e, text, schema))?;
        let hidden_from = schema.fields().len();
        let needs_hidden = datafusion::physical_expr::utils::collect_columns(&physical)
            .iter()
            .any(|column| column.index() >= hidden_from);
        let failed_rows = Arc::default();
        Ok(Self { physical, data_type, metadata, nullable: field.is_nullable(), needs_hidden, failed_rows })
    }

    /// Type of the values: one of the engine's own, see [`engine_type`].
    pub fn data_type(&self) -> &DataType {
        &self.data_type
    }

    /// Whether a value may be null.
    pub fn nullable(&self) -> bool {
        self.nullable
    }

    /// A field of this type with the name `name`. Always nullable: a column's values come and go.
    pub fn field(&self, name: &str) -> Field {
        Field::new(name, self.data_type.clone(), true).with_metadata(self.metadata.clone())
    }

    /// Rows so far for which the expression failed: they are null.
    pub fn failed_rows(&self) -> u64 {
        self.failed_rows.load(Relaxed)
    }

    /// One value per row of `batch`, whose visible schema must be the one compiled against. Null where the
    /// expression fails for a row.
    pub fn evaluate(&self, batch: &Batch) -> Result<ArrayRef> {
        if self.needs_hidden { self.evaluate_rows(&batch.with_hidden()?) } else { self.evaluate_rows(batch.rows()) }
    }

    fn evaluate_rows(&self, rows: &RecordBatch) -> Result<ArrayRef> {
        match self.physical.evaluate(rows).and_then(|value| value.into_array(rows.num_rows())) {
            Ok(array) => Ok(array),
            Err(error) if is_of_a_row(&error) => self.evaluate_halves(rows),
            Err(error) => Err(Error::internal("expression").because(error)),
        }
    }

    /// Finds the rows that fail by halving: few failing rows cost little more than none.
    fn evaluate_halves(&self, rows: &RecordBatch) -> Result<ArrayRef> {
        let length = rows.num_rows();
        if length <= 1 {
            self.failed_rows.fetch_add(length as u64, Relaxed);
            return Ok(new_null_array(&self.data_type, length));
        }
        let middle = length / 2;
        let left = self.evaluate_rows(&rows.slice(0, middle))?;
        let right = self.evaluate_rows(&rows.slice(middle, length - middle))?;
        Ok(concat(&[left.as_ref() as &dyn Array, right.as_ref()])?)
    }

    /// As [`Self::evaluate`] for a condition: null counts as false.
    pub fn evaluate_condition(&self, batch: &Batch) -> Result<BooleanArray> {
        let array = self.evaluate(batch)?;
        array.as_boolean_opt().cloned().ok_or_else(|| Error::internal("a condition that is no boolean"))
    }

    /// The value of an expression that names no column, such as a default or an argument `0.99`.
    pub fn constant(text: &str, expression: ast::Expr) -> Result<ScalarValue, ExpressionError> {
        let empty: SchemaRef = Arc::new(arrow::datatypes::Schema::empty());
        let compiled = Self::of_ast(text, expression, &empty)?;
        let one = RecordBatch::try_new_with_options(
            empty,
            Vec::new(),
            &arrow::array::RecordBatchOptions::new().with_row_count(Some(1)),
        )
        .map_err(|e| ExpressionError::new(e.to_string()))?;
        match compiled.physical.evaluate(&one) {
            Ok(ColumnarValue::Scalar(value)) => Ok(value),
            Ok(ColumnarValue::Array(array)) => {
                ScalarValue::try_from_array(&array, 0).map_err(|e| ExpressionError::new(e.to_string()))
            }
            Err(e) => Err(ExpressionError::new(e.to_string())),
        }
    }
}

/// The state that all expressions are planned with: DataFusion's functions, names kept as written.
static STATE: LazyLock<SessionState> = LazyLock::new(|| {
    let mut config = SessionConfig::new();
    config.options_mut().sql_parser.enable_ident_normalization = false;
    config.options_mut().sql_parser.collect_spans = true;
    // `CAST(x AS VARCHAR)` gives the engine's own text at once, not a view to be copied afterwards.
    config.options_mut().sql_parser.map_string_types_to_utf8view = false;
    SessionContext::new_with_config(config).state()
});

/// The state that expressions are planned with, for those who plan aggregates by name.
pub fn session_state() -> &'static SessionState {
    &STATE
}

/// Parses `text` as exactly one SQL expression.
pub fn parse(text: &str) -> Result<ast::Expr, ExpressionError> {
    if text.len() > TEXT_BYTES_MAX {
        return Err(ExpressionError::new(format!("longer than {TEXT_BYTES_MAX} bytes")));
    }
    if text.trim().is_empty() {
        return Err(ExpressionError::new("an expression is missing"));
    }
    let syntax = |message: &str| located(message, text);
    let mut parser = Parser::new(&GenericDialect {}).try_with_sql(text).map_err(|e| syntax(&e.to_string()))?;
    let expression = parser.parse_expr().map_err(|e| syntax(&e.to_string()))?;
    let rest = parser.peek_token();
    if rest.token != datafusion::sql::sqlparser::tokenizer::Token::EOF {
        let offset = character_offset(text, rest.span.start.line, rest.span.start.column);
        return Err(ExpressionError { offset, message: format!("unexpected `{}`", rest.token), hint: None });
    }
    Ok(expression)
}

/// Refuses functions whose value differs from run to run: the replay of a crash would give other rows.
fn refuse_varying(text: &str) -> Result<(), ExpressionError> {
    let Ok(tokens) = Tokenizer::new(&GenericDialect {}, text).tokenize_with_location() else { return Ok(()) };
    use datafusion::sql::sqlparser::tokenizer::Token;
    for (index, token) in tokens.iter().enumerate() {
        let Token::Word(word) = &token.token else { continue };
        let name = word.value.to_lowercase();
        let Some((_, instead)) = REFUSED.iter().find(|(refused, _)| *refused == name) else { continue };
        let called = tokens[index + 1..].iter().find(|t| !matches!(t.token, Token::Whitespace(_)));
        let is_call = called.is_some_and(|t| t.token == Token::LParen);
        if word.quote_style.is_none() && (is_call || name.starts_with("current_")) {
            return Err(ExpressionError {
                offset: character_offset(text, token.span.start.line, token.span.start.column),
                message: format!("`{}` differs from run to run and is refused in steps", word.value),
                hint: (!instead.is_empty()).then(|| format!("use `{instead}`, the time of receipt")),
            });
        }
    }
    Ok(())
}

/// Folds constants and rewrites functions that exist as rewrites only: `coalesce` is a `CASE`.
fn simplify(state: &SessionState, expression: Expr, schema: &DFSchema) -> Result<Expr, DataFusionError> {
    let context = SimplifyContext::builder()
        .with_schema(Arc::new(schema.clone()))
        .with_config_options(Arc::clone(state.config_options()))
        .build();
    let simplifier = ExprSimplifier::new(context);
    let coerced = simplifier.coerce(expression, schema)?;
    let options = state.config_options();
    let rewritten = coerced.transform_up(|part| EpochOfDuration.rewrite(part, schema, options))?.data;
    simplifier.simplify(rewritten)
}

/// The engine's type for what an expression gives, or what to do where there is none.
fn column_type(data_type: &DataType) -> Result<DataType, ExpressionError> {
    engine_type(data_type).ok_or_else(|| {
        let hint = match data_type {
            DataType::Duration(_) => Some("in seconds: `extract(epoch from a - b)`"),
            DataType::Interval(_) => Some("add it to a timestamp, or write a number of seconds"),
            DataType::Map(_, _) => Some("a fixed set of names is a struct: `named_struct('a', a, 'b', b)`"),
            _ => None,
        };
        let message = format!("{data_type} is no type that a column can have");
        ExpressionError { offset: None, message, hint: hint.map(str::to_owned) }
    })
}

/// Whether evaluation failed because of a value, so that other rows may do.
fn is_of_a_row(error: &DataFusionError) -> bool {
    match error {
        DataFusionError::ArrowError(error, _) => matches!(
            **error,
            ArrowError::CastError(_)
                | ArrowError::ParseError(_)
                | ArrowError::ComputeError(_)
                | ArrowError::DivideByZero
                | ArrowError::ArithmeticOverflow(_)
                | ArrowError::InvalidArgumentError(_)
        ),
        DataFusionError::Execution(_) | DataFusionError::External(_) => true,
        DataFusionError::Context(_, inner) | DataFusionError::Diagnostic(_, inner) => is_of_a_row(inner),
        DataFusionError::Collection(errors) => errors.iter().all(is_of_a_row),
        _ => false,
    }
}

fn contains_aggregate(expression: &Expr) -> bool {
    !datafusion::logical_expr::utils::find_aggregate_exprs([expression]).is_empty()
}

/// A DataFusion error as a message for the YAML's author.
fn describe(error: &DataFusionError, text: &str, schema: &SchemaRef) -> ExpressionError {
    match error {
        DataFusionError::Diagnostic(diagnostic, inner) => {
            let mut described = describe(inner, text, schema);
            if let Some(span) = diagnostic.span {
                described.offset = character_offset(text, span.start.line, span.start.column).or(described.offset);
            }
            described
        }
        DataFusionError::Context(_, inner) => describe(inner, text, schema),
        DataFusionError::Collection(errors) if !errors.is_empty() => describe(&errors[0], text, schema),
        DataFusionError::SchemaError(schema_error, _) => match schema_error.as_ref() {
            SchemaError::FieldNotFound { field, .. } => unknown_column(field, text, schema),
            other => ExpressionError::new(other.to_string()),
        },
        other => located(&other.strip_backtrace(), text),
    }
}

fn unknown_column(column: &Column, text: &str, schema: &SchemaRef) -> ExpressionError {
    let names = schema.fields().iter().map(|f| f.name().as_str()).chain([EVENT_TIME, INGEST_TIME]);
    ExpressionError {
        offset: place_of_name(&column.name, text),
        message: format!("no column `{}` here", column.name),
        hint: did_you_mean(&column.name, names),
    }
}

/// The character at which the name `name` first stands in `text`; inside another word or a string it does not count.
fn place_of_name(name: &str, text: &str) -> Option<usize> {
    use datafusion::sql::sqlparser::tokenizer::Token;
    let tokens = Tokenizer::new(&GenericDialect {}, text).tokenize_with_location().ok()?;
    let found = tokens.iter().find(|token| matches!(&token.token, Token::Word(word) if word.value == name))?;
    character_offset(text, found.span.start.line, found.span.start.column)
}

/// Takes the `Line: 1, Column: 5` out of a parser's message.
fn located(message: &str, text: &str) -> ExpressionError {
    let number_after = |word: &str| -> Option<u64> {
        let rest = message.rsplit_once(word)?.1;
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    };
    let offset = number_after("Line: ")
        .zip(number_after("Column: "))
        .and_then(|(line, column)| character_offset(text, line, column));
    let mut short = message.split(" at Line:").next().unwrap_or(message).trim();
    for prefix in ["sql parser error: ", "SQL error: ", "Error during planning: ", "This feature is not implemented: "]
    {
        short = short.strip_prefix(prefix).unwrap_or(short);
    }
    // DataFusion appends the list of candidate signatures on further lines; the first says it all.
    let short = short
        .lines()
        .next()
        .unwrap_or(short)
        .trim_end_matches(" No function matches the given name and argument types");
    ExpressionError { offset, message: short.to_owned(), hint: None }
}

/// The character at a line and column from 1, counted from the start of the text.
pub fn character_offset(text: &str, line: u64, column: u64) -> Option<usize> {
    if line == 0 || column == 0 {
        return None;
    }
    let before: usize = text.split('\n').take(usize::try_from(line).ok()? - 1).map(|l| l.chars().count() + 1).sum();
    Some(before + usize::try_from(column).ok()? - 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::{Stage, Times};
    use crate::config::Fields;
    use crate::json::encode_rows;
    use crate::rows::RowsBuilder;
    use crate::schema::FieldType;

    const COLUMNS: [(&str, FieldType); 7] = [
        ("name", FieldType::String),
        ("pending", FieldType::Int),
        ("failed", FieldType::Int),
        ("latency_ms", FieldType::Float),
        ("ts", FieldType::Timestamp(None)),
        ("due", FieldType::Timestamp(None)),
        ("payload", FieldType::Json),
    ];

    /// Rows over [`COLUMNS`] from JSON objects; event time is 1 s, ingest time 2 s.
    fn batch(rows: &[&str]) -> Batch {
        let mut builder = RowsBuilder::new(&[], &Fields::of(COLUMNS));
        for row in rows {
            builder.push_json(row.as_bytes()).expect("a row");
        }
        let times = Times::constant(1_000_000, 2_000_000, i64::MIN, rows.len());
        Batch::new(builder.finish().expect("rows"), times, Stage::Final).expect("a batch")
    }

    fn compile(text: &str) -> Result<Expression, ExpressionError> {
        Expression::compile(text, batch(&[]).rows().schema_ref())
    }

    /// The values of `text` over `batch` as JSON rows `{"v":…}`.
    fn values(text: &str, batch: &Batch) -> Vec<String> {
        let expression = compile(text).unwrap_or_else(|e| panic!("{text}: {e:?}"));
        let array = expression.evaluate(batch).unwrap_or_else(|e| panic!("{text}: {e}"));
        assert_eq!(array.data_type(), expression.data_type(), "{text}");
        assert_eq!(engine_type(array.data_type()).as_ref(), Some(array.data_type()), "{text}");
        let schema = Arc::new(arrow::datatypes::Schema::new(vec![expression.field("v")]));
        let rows = RecordBatch::try_new(schema, vec![array]).unwrap_or_else(|e| panic!("{text}: {e}"));
        encode_rows(&rows).iter().map(str::to_owned).collect()
    }

    #[test]
    fn the_usual_expressions_give_the_engines_own_types() {
        let row = batch(&[concat!(
            r#"{"name": "Press 7", "pending": 7, "failed": 2, "latency_ms": 12.345, "ts": "2026-11-20T12:34:56.5Z","#,
            r#" "due": "2026-11-20T12:34:50Z", "payload": {"a": 1}}"#
        )]);
        for (text, expected) in [
            ("round(latency_ms, 1)", "12.3"),
            ("round(latency_ms)", "12.0"),
            ("pending / failed", "3"),
            ("pending * 1.0 / failed", "3.5"),
            ("coalesce(NULL, failed, 0)", "2"),
            ("case when pending > 5 then 'busy' else 'idle' end", r#""busy""#),
            ("case name when 'x' then 1 end", "null"),
            ("nullif(failed, 2)", "null"),
            ("greatest(pending, failed)", "7"),
            ("abs(-3) + power(2, 3) + sqrt(16.0)", "15.0"),
            ("upper(name) || '!'", r#""PRESS 7!""#),
            ("concat(lower(name), '-', CAST(pending AS VARCHAR))", r#""press 7-7""#),
            ("split_part(name, ' ', 2)", r#""7""#),
            ("substr(trim(name), 1, 3)", r#""Pre""#),
            ("replace(name, ' ', '_')", r#""Press_7""#),
            ("length(name)", "7"),
            ("regexp_replace(name, '[0-9]+', '#')", r#""Press #""#),
            ("name like 'Press%' and name is not null", "true"),
            ("pending in (1, 7)", "true"),
            ("pending between 1 and 3", "false"),
            ("arrow_cast(pending, 'UInt64')", "7"),
            ("arrow_cast(latency_ms, 'Float32') > 12", "true"),
            ("arrow_cast(name, 'Dictionary(Int32, Utf8)')", r#""Press 7""#),
            ("CAST(pending AS INT)", "7"),
            ("CAST(latency_ms AS DECIMAL(60, 2))", r#""12.35""#),
            ("CAST('2026-11-20' AS DATE)", r#""2026-11-20""#),
            ("date_trunc('minute', ts)", r#""2026-11-20T12:34:00.000Z""#),
            ("date_bin(interval '15 minutes', ts)", r#""2026-11-20T12:30:00.000Z""#),
            ("to_timestamp('2026-11-20T12:00:00Z')", r#""2026-11-20T12:00:00.000Z""#),
            ("to_timestamp(1)", r#""1970-01-01T00:00:01.000Z""#),
            ("to_timestamp_millis(1500)", r#""1970-01-01T00:00:01.500Z""#),
            ("ts + interval '1 second'", r#""2026-11-20T12:34:57.500Z""#),
            ("extract(hour from ts)", "12"),
            ("extract(epoch from ts)", "1795178096.5"),
            ("extract(epoch from ts - due)", "6.5"),
            ("ts > due", "true"),
            ("ts > '2026-01-01T00:00:00Z'", "true"),
            ("event_time", r#""1970-01-01T00:00:01.000Z""#),
            ("ingest_time", r#""1970-01-01T00:00:02.000Z""#),
            ("payload", r#"{"a": 1}"#),
            ("upper(payload)", r#""{\"A\": 1}""#),
            ("payload || ''", r#""{\"a\": 1}""#),
            ("CAST(payload AS VARCHAR)", r#""{\"a\": 1}""#),
            ("coalesce(payload, '{}')", r#""{\"a\": 1}""#),
            ("NULL", "null"),
            ("named_struct('pending', pending, 'failed', failed)", r#"{"pending":7,"failed":2}"#),
            ("struct(pending, name)", r#"{"c0":7,"c1":"Press 7"}"#),
            ("named_struct('q', named_struct('n', arrow_cast(pending, 'UInt8')))", r#"{"q":{"n":7}}"#),
            ("named_struct('a', pending)['a']", "7"),
            ("get_field(named_struct('a', pending), 'a')", "7"),
            ("[pending, failed]", "[7,2]"),
            ("array_length([pending, failed])", "2"),
        ] {
            assert_eq!(values(text, &row), [format!(r#"{{"v":{expected}}}"#)], "{text}");
        }
    }

    #[test]
    fn a_type_that_no_column_has_is_an_error_with_a_way_out() {
        for (text, hint) in [
            ("ts - due", "extract(epoch from"),
            ("interval '1 day'", "timestamp"),
            ("named_struct('d', ts - due)", ""),
            ("map(['a'], [pending])", "named_struct"),
        ] {
            let error = compile(text).expect_err(text);
            assert!(error.message.contains("no type that a column can have"), "{text}: {error:?}");
            assert!(error.hint.unwrap_or_default().contains(hint), "{text}");
        }
    }

    #[test]
    fn a_row_that_fails_is_null_and_counted_and_the_others_are_not_touched() {
        let rows: Vec<String> = (0..100)
            .map(|n| {
                format!(r#"{{"pending": {n}, "failed": {}, "name": "{}"}}"#, n % 7, if n == 3 { "x" } else { "5" })
            })
            .collect();
        let rows = batch(&rows.iter().map(String::as_str).collect::<Vec<_>>());
        for (text, failures) in [
            ("pending / failed", 15),
            ("CAST(name AS BIGINT)", 1),
            ("case when failed <> 0 then pending / failed end", 0),
        ] {
            let expression = compile(text).expect(text);
            let whole = expression.evaluate(&rows).expect(text);
            assert_eq!(expression.failed_rows(), failures, "{text}");
            for row in 0..rows.len() {
                let one = expression.evaluate(&rows.slice(row, 1).expect("a row")).expect(text);
                assert_eq!(one.as_ref(), whole.slice(row, 1).as_ref(), "{text} row {row}");
            }
        }
        let condition = compile("pending / failed > 3").expect("a condition");
        assert!(!condition.evaluate_condition(&rows).expect("a mask").value(0), "null counts as false");
    }

    #[test]
    fn what_differs_from_run_to_run_is_refused_with_its_place() {
        for text in ["1 + random()", "now() - ts", "uuid()", "current_timestamp > ts"] {
            assert!(compile(text).expect_err(text).message.contains("differs from run to run"), "{text}");
        }
        let error = compile("pending + lateny_ms").expect_err("a typing mistake");
        assert_eq!((error.offset, error.hint.as_deref()), (Some(10), Some("did you mean `latency_ms`?")));
    }

    #[test]
    fn an_error_points_at_its_place_and_says_what_to_write() {
        for (text, offset, message, hint) in [
            ("lateny_ms", Some(0), "no column `lateny_ms` here", "did you mean `latency_ms`?"),
            ("latency_ms + lat", Some(13), "no column `lat` here", "one of `name`, `pending`"),
            ("name = 'nam' and nam > 1", Some(17), "no column `nam` here", "did you mean `name`?"),
            ("pending +\n  failde", Some(12), "no column `failde` here", "did you mean `failed`?"),
            ("'ü' || nam", Some(7), "no column `nam` here", "did you mean `name`?"),
            ("Name", Some(0), "no column `Name` here", "did you mean `name`?"),
            ("\"NAME\" = 'x'", Some(0), "no column `NAME` here", "did you mean `name`?"),
            ("event_tim", Some(0), "no column `event_tim` here", "did you mean `event_time`?"),
            ("pending > > 1", Some(10), "Expected", ""),
            ("pending > 1 failed", Some(12), "unexpected `failed`", ""),
            ("pending ) + 1", Some(8), "unexpected `)`", ""),
            ("", None, "an expression is missing", ""),
            (" \n", None, "an expression is missing", ""),
            ("pending + now()", Some(10), "`now` differs from run to run", "use `ingest_time`, the time of receipt"),
            ("NOW() > ts", Some(0), "`NOW` differs from run to run", "use `ingest_time`, the time of receipt"),
            ("1 + random ()", Some(4), "`random` differs from run to run", ""),
            ("sum(pending)", None, "an aggregate stands only in the `aggregate` of a window", ""),
            ("1 + count(*)", None, "an aggregate stands only in the `aggregate` of a window", ""),
        ] {
            let error = compile(text).expect_err(text);
            assert_eq!(error.offset, offset, "{text}: {error:?}");
            assert!(error.message.starts_with(message), "{text}: {error:?}");
            let given = error.hint.clone().unwrap_or_default();
            assert!(given.starts_with(hint) && given.is_empty() == hint.is_empty(), "{text}: {error:?}");
        }
        assert!(compile(&format!("1{}", " + 1".repeat(TEXT_BYTES_MAX))).is_err_and(|e| e.message.contains("longer")));
    }

    #[test]
    fn names_are_taken_as_written_and_only_calls_are_refused() {
        let schema = Fields::of([("Now", FieldType::Int), ("now", FieldType::Int), ("a b", FieldType::Int)]).schema();
        for text in ["Now", "now + 1", "\"Now\"", "\"a b\" * 2", "'now()' || 'x'", "1 + 2", "event_time > ingest_time"]
        {
            assert!(Expression::compile(text, &schema).is_ok(), "{text}");
        }
        assert!(Expression::compile("NOW", &schema).is_err());
    }

    #[test]
    fn a_visible_column_hides_the_hidden_one_of_its_name() {
        let schema = Fields::of([("event_time", FieldType::Int)]).schema();
        let type_of = |text| Expression::compile(text, &schema).map(|e| e.data_type().clone());
        assert_eq!(type_of("event_time"), Ok(DataType::Int64));
        assert!(matches!(type_of("ingest_time"), Ok(DataType::Timestamp(..))));
    }

    #[test]
    fn a_constant_has_a_value_for_every_row() {
        let three = batch(&["{}", "{}", "{}"]);
        for (text, expected) in
            [("1 + 2", "3"), ("'a' || 'b'", r#""ab""#), ("NULL", "null"), ("true and false", "false")]
        {
            assert_eq!(values(text, &three), vec![format!(r#"{{"v":{expected}}}"#); 3], "{text}");
            assert!(values(text, &batch(&[])).is_empty(), "{text}");
        }
    }
}
