//! SQL expressions over a batch: parsed, type-checked and planned by DataFusion when the graph is checked.

use std::fmt;
use std::sync::{Arc, LazyLock};

use arrow::array::{ArrayRef, AsArray, BooleanArray};
use arrow::datatypes::{DataType, Field, SchemaRef};
use datafusion::common::{Column, DFSchema, DataFusionError, ScalarValue, SchemaError};
use datafusion::execution::context::{SessionConfig, SessionContext, SessionState};
use datafusion::logical_expr::{ColumnarValue, Expr};
use datafusion::physical_expr::PhysicalExpr;
use datafusion::sql::sqlparser::ast;
use datafusion::sql::sqlparser::dialect::GenericDialect;
use datafusion::sql::sqlparser::parser::Parser;
use datafusion::sql::sqlparser::tokenizer::Tokenizer;

use crate::batch::{Batch, EVENT_TIME, INGEST_TIME, with_hidden_columns};
use crate::config::did_you_mean;
use crate::error::{Error, Result};

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

/// A checked expression, ready to run over batches of one schema.
#[derive(Clone)]
pub struct Expression {
    physical: Arc<dyn PhysicalExpr>,
    data_type: DataType,
    nullable: bool,
    needs_hidden: bool,
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
        let context = SessionContext::new_with_state(state.clone());
        let physical = context.create_physical_expr(logical, &df_schema).map_err(|e| describe(&e, text, schema))?;
        let data_type = physical.data_type(&visible).map_err(|e| describe(&e, text, schema))?;
        let nullable = physical.nullable(&visible).unwrap_or(true);
        let hidden_from = schema.fields().len();
        let needs_hidden = datafusion::physical_expr::utils::collect_columns(&physical)
            .iter()
            .any(|column| column.index() >= hidden_from);
        Ok(Self { physical, data_type, nullable, needs_hidden })
    }

    /// Type of the values.
    pub fn data_type(&self) -> &DataType {
        &self.data_type
    }

    /// Whether a value may be null.
    pub fn nullable(&self) -> bool {
        self.nullable
    }

    /// A field of this type with the name `name`. Always nullable: a column's values come and go.
    pub fn field(&self, name: &str) -> Field {
        Field::new(name, self.data_type.clone(), true)
    }

    /// One value per row of `batch`, whose visible schema must be the one compiled against.
    pub fn evaluate(&self, batch: &Batch) -> Result<ArrayRef> {
        let value = if self.needs_hidden {
            self.physical.evaluate(&batch.with_hidden()?)
        } else {
            self.physical.evaluate(batch.rows())
        };
        let array = value.and_then(|value| value.into_array(batch.len()));
        array.map_err(|e| Error::internal("expression").because(e))
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
        let one = arrow::array::RecordBatch::try_new_with_options(
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
    let byte = text.find(&column.name);
    ExpressionError {
        offset: byte.map(|at| text[..at].chars().count()),
        message: format!("no column `{}` here", column.name),
        hint: did_you_mean(&column.name, names),
    }
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
