//! From the texts under `aggregate` to a plan: which states to keep, over which arguments, and what to compute of them.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, SchemaRef};
use datafusion::common::{DataFusionError, ScalarValue};
use datafusion::logical_expr::AggregateUDF;
use datafusion::logical_expr::type_coercion::functions::fields_with_udf;
use datafusion::physical_expr::aggregate::AggregateExprBuilder;
use datafusion::physical_expr::expressions::{Column as ColumnExpr, Literal};
use datafusion::physical_expr::{PhysicalExpr, aggregate::AggregateFunctionExpr};
use datafusion::sql::sqlparser::ast::{
    DuplicateTreatment, Expr, Function, FunctionArg, FunctionArgExpr, FunctionArgumentClause, FunctionArguments, Ident,
    NullTreatment, ObjectNamePart, VisitMut, VisitorMut,
};
use pipeline::config::{At, CheckContext, did_you_mean};
use pipeline::expression::{self, Expression, ExpressionError, character_offset, session_state};
use pipeline::schema::type_word;

use super::aggregate::{
    FUNCTION_BYTES_MAX, Family, Moment, SumOutput, buffers_rows, delta_type, is_number, is_ordered, plain_type,
};
use super::slots::{Argument, Call, Column, Source, State};

/// The aggregates of our own, for hints.
const OWN: [&str; 16] = [
    "count",
    "sum",
    "avg",
    "min",
    "max",
    "stddev",
    "stddev_pop",
    "var",
    "var_pop",
    "first",
    "last",
    "rate",
    "delta",
    "percentile",
    "distinct",
    "mean",
];

/// DataFusion aggregates that mean nothing here.
const REFUSED: [&str; 1] = ["grouping"];

type Checked<T> = Result<T, ExpressionError>;

/// Collects the aggregate calls of all columns.
pub(super) struct Calls<'a> {
    schema: &'a SchemaRef,
    pub(super) arguments: Vec<Argument>,
    argument_texts: Vec<String>,
    pub(super) filters: Vec<Expression>,
    filter_texts: Vec<String>,
    pub(super) states: Vec<State>,
    pub(super) calls: Vec<Call>,
    /// The name and field of each call, as expressions around it see it.
    fields: Vec<Field>,
    /// What the user should know.
    notes: Vec<String>,
}

/// A text under `aggregate`, its calls collected: what is left to compute over them.
pub(super) enum Parsed {
    /// Just a call.
    Call(usize),
    /// Something around calls, each of them now a column named as it was written.
    Around(Box<Expr>),
}

impl<'a> Calls<'a> {
    /// Over the columns of `schema`.
    pub(super) fn new(schema: &'a SchemaRef) -> Self {
        Self {
            schema,
            arguments: Vec::new(),
            argument_texts: Vec::new(),
            filters: Vec::new(),
            filter_texts: Vec::new(),
            states: Vec::new(),
            calls: Vec::new(),
            fields: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// The fields of all calls, in order.
    pub(super) fn fields(&self) -> &[Field] {
        &self.fields
    }

    /// Collects the calls in `text`, or reports what is wrong with it.
    pub(super) fn parse(&mut self, text: &At<String>, cx: &mut CheckContext<'_>) -> Option<Parsed> {
        let parsed = self.collect(text);
        for note in self.notes.drain(..) {
            cx.note(text.position, note);
        }
        parsed.map_err(|error| cx.expression_error(text, error)).ok()
    }

    fn collect(&mut self, text: &str) -> Checked<Parsed> {
        let mut ast = expression::parse(text)?;
        let mut finder = Finder { calls: self, text, found: Vec::new() };
        if let ControlFlow::Break(error) = VisitMut::visit(&mut ast, &mut finder) {
            return Err(error);
        }
        let found = finder.found;
        let Some(first) = found.first() else {
            return Err(ExpressionError {
                offset: None,
                message: "no aggregate function here".to_owned(),
                hint: Some("a window has many rows: say which, as in `last(x)`, `avg(x)`, `count()`".to_owned()),
            });
        };
        match ast {
            Expr::Identifier(_) => Ok(Parsed::Call(*first)),
            ast => Ok(Parsed::Around(Box::new(ast))),
        }
    }

    /// Compiles what stands around calls, over the calls and the keys.
    pub(super) fn compile(
        &self,
        text: &At<String>,
        mut ast: Expr,
        inner: &SchemaRef,
        cx: &mut CheckContext<'_>,
    ) -> Option<Column> {
        let mut outside = Outside { text, inner, outer: self.schema };
        let compiled = match VisitMut::visit(&mut ast, &mut outside) {
            ControlFlow::Break(error) => Err(error),
            ControlFlow::Continue(()) => Expression::of_ast(text, ast, inner),
        };
        compiled.map(Column::Expression).map_err(|error| cx.expression_error(text, error)).ok()
    }

    /// The index of a call.
    fn call(&mut self, text: &str, function: &Function, udf: Option<Arc<AggregateUDF>>) -> Checked<usize> {
        let name = function.to_string();
        if let Some(known) = self.fields.iter().position(|one| *one.name() == name) {
            return Ok(known);
        }
        let call = Written::read(text, function)?;
        let filter = match &function.filter {
            Some(condition) => Some(self.filter(text, condition)?),
            None => None,
        };
        let (source, field) = self.source(&call, filter, udf)?;
        self.calls.push(Call { source, data_type: field.data_type().clone() });
        self.fields.push(field.with_name(name).with_nullable(true));
        Ok(self.calls.len() - 1)
    }

    /// The index of a FILTER's condition.
    fn filter(&mut self, text: &str, condition: &Expr) -> Checked<usize> {
        let key = condition.to_string();
        if let Some(index) = self.filter_texts.iter().position(|one| *one == key) {
            return Ok(index);
        }
        let compiled = Expression::of_ast(text, condition.clone(), self.schema)?;
        if *compiled.data_type() != DataType::Boolean {
            let word = type_word(&compiled.field("")).into_owned();
            return Err(ExpressionError {
                offset: None,
                message: format!("FILTER expects a condition (bool), `{key}` is {word}"),
                hint: Some("compare it: `FILTER (WHERE x > 0)`".to_owned()),
            });
        }
        self.filters.push(compiled);
        self.filter_texts.push(key);
        Ok(self.filters.len() - 1)
    }

    /// Where the value of a call comes from, and the field it has.
    fn source(
        &mut self,
        call: &Written<'_>,
        filter: Option<usize>,
        udf: Option<Arc<AggregateUDF>>,
    ) -> Checked<(Source, Field)> {
        let state = |state, output| Source::State { state, output };
        let own = !call.distinct || matches!(call.name.as_str(), "min" | "max" | "distinct");
        let rows = call.arguments.is_empty();
        let field = |data_type| Field::new("", data_type, true);
        Ok(match call.name.as_str() {
            "count" if rows && !call.distinct => match filter {
                None => (Source::Rows, field(DataType::Int64)),
                Some(_) => (state(self.state(Family::Count, Vec::new(), filter).0, 0), field(DataType::Int64)),
            },
            "rate" if rows => {
                let counted = filter.map(|_| self.state(Family::Count, Vec::new(), filter).0);
                (Source::RowRate(counted), field(DataType::Float64))
            }
            "count" if own => {
                let argument = self.argument(call, 0, None)?;
                (self.one(Family::Count, argument.index, filter), field(DataType::Int64))
            }
            "min" | "max" => {
                let argument = self.ordered(call)?;
                let family = Family::Extreme { data_type: argument.data_type.clone(), greatest: call.name == "max" };
                (self.one(family, argument.index, filter), argument.field)
            }
            "first" | "last" | "first_value" | "last_value" if own => {
                let argument = self.ordered(call)?;
                let family = Family::Edge {
                    data_type: argument.data_type.clone(),
                    last: call.name.starts_with("last"),
                    ignore_nulls: call.ignore_nulls,
                };
                (self.one(family, argument.index, filter), argument.field)
            }
            "sum" | "avg" | "mean" | "stddev" | "stddev_samp" | "stddev_pop" | "var" | "var_samp" | "var_sample"
            | "variance" | "var_pop" | "var_population" | "delta" | "rate" | "percentile"
                if own =>
            {
                self.of_number(call, filter)?
            }
            "distinct" => {
                let argument = self.ordered(call)?;
                (self.one(Family::Distinct(argument.data_type), argument.index, filter), field(DataType::Int64))
            }
            _ => match udf {
                Some(udf) => self.function(call, &udf, filter)?,
                None => return Err(call.error(format!("`{}` takes no DISTINCT", call.name), None)),
            },
        })
    }

    /// As [`Self::source`], for aggregates of one number.
    fn of_number(&mut self, call: &Written<'_>, filter: Option<usize>) -> Checked<(Source, Field)> {
        let float = || Some(DataType::Float64);
        let (argument, family, data_type) = match call.name.as_str() {
            "sum" | "avg" | "mean" => {
                let argument = self.number(call, None)?;
                let output = if call.name == "sum" { SumOutput::Sum } else { SumOutput::Mean };
                let data_type = output.data_type(&argument.data_type);
                let family = Family::Sum(argument.data_type.clone(), vec![output]);
                (argument, family, data_type)
            }
            "delta" => {
                let argument = self.number(call, None)?;
                let data_type = delta_type(&argument.data_type);
                let family = Family::Delta(argument.data_type.clone());
                (argument, family, data_type)
            }
            "rate" => {
                let argument = self.number(call, None)?;
                // Integers stay as they are: a counter beyond 2^53 has no exact float.
                let argument =
                    if argument.data_type == DataType::Int64 { argument } else { self.number(call, float())? };
                let family = Family::Counter(argument.data_type.clone());
                (argument, family, DataType::Float64)
            }
            "percentile" => {
                call.expect(2, "percentile(x, 0.99)")?;
                let q = call.quantile()?;
                (self.number(call, float())?, Family::Percentile(vec![q]), DataType::Float64)
            }
            name => {
                let moment = match name {
                    "stddev" | "stddev_samp" => Moment::Deviation,
                    "stddev_pop" => Moment::DeviationPopulation,
                    "var_pop" | "var_population" => Moment::VariancePopulation,
                    _ => Moment::Variance,
                };
                (self.number(call, float())?, Family::Moments(vec![moment]), DataType::Float64)
            }
        };
        Ok((self.one(family, argument.index, filter), Field::new("", data_type, true)))
    }

    /// A state of one argument.
    fn one(&mut self, family: Family, argument: usize, filter: Option<usize>) -> Source {
        let (state, output) = self.state(family, vec![argument], filter);
        Source::State { state, output }
    }

    /// The index of a state and of its output; one that is there already is shared.
    fn state(&mut self, family: Family, arguments: Vec<usize>, filter: Option<usize>) -> (usize, usize) {
        let mut states = self.states.iter_mut().enumerate();
        let shared = states.find_map(|(index, state)| {
            let alike = state.arguments == arguments && state.filter == filter;
            Some((index, if alike { state.family.share(&family)? } else { return None }))
        });
        shared.unwrap_or_else(|| {
            self.states.push(State { family, arguments, filter });
            (self.states.len() - 1, 0)
        })
    }

    /// The argument `index` of a call, as `data_type` or as the type of ours that it has.
    fn argument(&mut self, call: &Written<'_>, index: usize, data_type: Option<DataType>) -> Checked<ArgumentOf> {
        let ast = call.arguments[index];
        let expression = Expression::of_ast(call.text, ast.clone(), self.schema)?;
        let data_type = data_type.unwrap_or_else(|| plain_type(expression.data_type()));
        // A column as it is keeps what its field says about it, such as being JSON.
        let field = match ast {
            Expr::Identifier(name) => self.schema.field_with_name(&name.value).ok().cloned(),
            _ => None,
        };
        let field = field.unwrap_or_else(|| expression.field("")).with_data_type(data_type.clone());
        let text = format!("{ast} as {data_type}");
        let index = self.argument_texts.iter().position(|one| *one == text).unwrap_or_else(|| {
            self.arguments.push(Argument { expression, data_type: data_type.clone() });
            self.argument_texts.push(text);
            self.arguments.len() - 1
        });
        Ok(ArgumentOf { index, data_type, field })
    }

    /// The argument of a call that takes a number.
    fn number(&mut self, call: &Written<'_>, data_type: Option<DataType>) -> Checked<ArgumentOf> {
        if call.name != "percentile" {
            call.expect(1, &format!("{}(x)", call.name))?;
        }
        self.typed(call, "a number", is_number, data_type)
    }

    /// The argument of a call that takes any value with an order.
    fn ordered(&mut self, call: &Written<'_>) -> Checked<ArgumentOf> {
        call.expect(1, &format!("{}(x)", call.name))?;
        self.typed(call, "a plain value", is_ordered, None)
    }

    /// The first argument, whose type must be `fit`, as `data_type` or as the type of ours that it has.
    fn typed(
        &mut self,
        call: &Written<'_>,
        wanted: &str,
        fit: fn(&DataType) -> bool,
        data_type: Option<DataType>,
    ) -> Checked<ArgumentOf> {
        let expression = Expression::of_ast(call.text, call.arguments[0].clone(), self.schema)?;
        if fit(&plain_type(expression.data_type())) {
            return self.argument(call, 0, data_type);
        }
        let word = type_word(&expression.field("")).into_owned();
        let hint = match expression.data_type() {
            DataType::Utf8 if wanted == "a number" => Some(format!("`distinct({0})` counts values", call.arguments[0])),
            DataType::Boolean => {
                Some(format!("count where it is true: `count() FILTER (WHERE {})`", call.arguments[0]))
            }
            _ => None,
        };
        Err(call.error(format!("`{}` takes {wanted}, `{}` is {word}", call.name, call.arguments[0]), hint))
    }

    /// A DataFusion aggregate.
    fn function(
        &mut self,
        call: &Written<'_>,
        udf: &Arc<AggregateUDF>,
        filter: Option<usize>,
    ) -> Checked<(Source, Field)> {
        let describe = |error: DataFusionError| {
            let message = error.strip_backtrace();
            let message = message.lines().next().unwrap_or_default();
            let short = message.strip_prefix("Error during planning: ").unwrap_or(message);
            call.error(short.to_owned(), None)
        };
        if REFUSED.contains(&call.name.as_str()) {
            return Err(call.error(format!("`{}` means nothing in a window", call.name), None));
        }
        if call.arguments.is_empty() {
            return Err(call.error(format!("`{}` needs an argument", call.name), None));
        }
        let mut given = Vec::new();
        for ast in &call.arguments {
            let expression = Expression::of_ast(call.text, (*ast).clone(), self.schema)?;
            given.push(Arc::new(expression.field("argument")));
        }
        let taken = fields_with_udf(&given, udf.as_ref()).map_err(describe)?;
        let mut arguments = Vec::new();
        let mut physical: Vec<Arc<dyn PhysicalExpr>> = Vec::new();
        let mut columns = Vec::new();
        for (index, (ast, field)) in call.arguments.iter().zip(&taken).enumerate() {
            arguments.push(self.argument(call, index, Some(field.data_type().clone()))?.index);
            let name = format!("argument_{index}");
            columns.push(field.as_ref().clone().with_name(&name).with_nullable(true));
            physical.push(match Expression::constant(call.text, (*ast).clone()) {
                Ok(value) => Arc::new(Literal::new(value.cast_to(field.data_type()).map_err(describe)?)),
                Err(_) => Arc::new(ColumnExpr::new(&name, index)),
            });
        }
        let function: AggregateFunctionExpr = AggregateExprBuilder::new(udf.clone(), physical)
            .schema(Arc::new(arrow::datatypes::Schema::new(columns)))
            .alias(call.name.clone())
            .with_distinct(call.distinct)
            .with_ignore_nulls(call.ignore_nulls)
            .build()
            .map_err(describe)?;
        function.create_accumulator().map_err(describe)?;
        if buffers_rows(&call.name, call.distinct) {
            let distinct = if call.distinct { "(DISTINCT …)" } else { "" };
            self.notes.push(format!(
                "`{}{distinct}` keeps every row of its open windows, at most {} MiB",
                call.name,
                FUNCTION_BYTES_MAX >> 20
            ));
        }
        let data_type = plain_type(function.field().data_type());
        let family = Family::Function(Arc::new(function), data_type.clone());
        let (state, output) = self.state(family, arguments, filter);
        Ok((Source::State { state, output }, Field::new("", data_type, true)))
    }
}

/// A checked argument.
struct ArgumentOf {
    index: usize,
    data_type: DataType,
    field: Field,
}

/// A call as it is written.
struct Written<'a> {
    text: &'a str,
    offset: Option<usize>,
    /// In lower case.
    name: String,
    /// Empty for `()` and `(*)`.
    arguments: Vec<&'a Expr>,
    distinct: bool,
    ignore_nulls: bool,
}

impl<'a> Written<'a> {
    fn read(text: &'a str, function: &'a Function) -> Checked<Self> {
        let (name, offset) = name_of(text, function);
        let mut call = Self { text, offset, name, arguments: Vec::new(), distinct: false, ignore_nulls: false };
        let mut nulls = function.null_treatment;
        if function.over.is_some() {
            return Err(call.error("OVER has no place here: the step is the window".to_owned(), None));
        }
        if !function.within_group.is_empty() {
            return Err(call.error(
                "WITHIN GROUP has no place here".to_owned(),
                Some("write the values as the first argument: `percentile(x, 0.99)`".to_owned()),
            ));
        }
        let FunctionArguments::List(list) = &function.args else {
            return Err(call.error(format!("`{}` needs parentheses", call.name), None));
        };
        call.distinct = list.duplicate_treatment == Some(DuplicateTreatment::Distinct);
        for clause in &list.clauses {
            match clause {
                FunctionArgumentClause::IgnoreOrRespectNulls(treatment) => nulls = Some(*treatment),
                FunctionArgumentClause::OrderBy(_) => {
                    return Err(call.error(
                        "ORDER BY has no place here: `first` and `last` go by event time, others by arrival".to_owned(),
                        None,
                    ));
                }
                other => return Err(call.error(format!("`{other}` has no place here"), None)),
            }
        }
        call.ignore_nulls = nulls == Some(NullTreatment::IgnoreNulls);
        for argument in &list.args {
            match argument {
                FunctionArg::Unnamed(FunctionArgExpr::Expr(expr)) => call.arguments.push(expr),
                FunctionArg::Unnamed(FunctionArgExpr::Wildcard)
                    if list.args.len() == 1 && matches!(call.name.as_str(), "count" | "rate") => {}
                other => return Err(call.error(format!("`{other}` is no argument for `{}`", call.name), None)),
            }
        }
        if call.name == "count" && call.arguments.len() > 1 {
            call.expect(1, "count(x)")?;
        }
        Ok(call)
    }

    fn error(&self, message: String, hint: Option<String>) -> ExpressionError {
        ExpressionError { offset: self.offset, message, hint }
    }

    fn expect(&self, arguments: usize, example: &str) -> Checked<()> {
        if self.arguments.len() == arguments {
            return Ok(());
        }
        let plural = if arguments == 1 { "" } else { "s" };
        let found = self.arguments.len();
        let message = format!("`{}` takes {arguments} argument{plural}, found {found}", self.name);
        Err(self.error(message, Some(format!("write `{example}`"))))
    }

    /// The second argument of `percentile`.
    fn quantile(&self) -> Checked<f64> {
        let ast = self.arguments[1];
        let wrong =
            |hint: Option<String>| self.error(format!("`{ast}` is no rank: expected a number from 0 to 1"), hint);
        let constant = Expression::constant(self.text, ast.clone())
            .map_err(|_| wrong(Some("the rank is the same for all rows, such as 0.99".to_owned())))?;
        let ScalarValue::Float64(Some(q)) = constant.cast_to(&DataType::Float64).map_err(|_| wrong(None))? else {
            return Err(wrong(None));
        };
        match q {
            0.0..=1.0 => Ok(q),
            1.0..=100.0 => Err(wrong(Some(format!("did you mean `{}`?", q / 100.0)))),
            _ => Err(wrong(None)),
        }
    }
}

/// The name of a function in lower case, and where it stands.
fn name_of(text: &str, function: &Function) -> (String, Option<usize>) {
    let offset = match function.name.0.first() {
        Some(ObjectNamePart::Identifier(ident)) => offset_of(text, ident),
        _ => None,
    };
    (function.name.to_string().to_lowercase(), offset)
}

fn offset_of(text: &str, ident: &Ident) -> Option<usize> {
    character_offset(text, ident.span.start.line, ident.span.start.column)
}

/// Replaces the aggregate calls of an expression by columns.
struct Finder<'a, 'b> {
    calls: &'a mut Calls<'b>,
    text: &'a str,
    found: Vec<usize>,
}

impl VisitorMut for Finder<'_, '_> {
    type Break = ExpressionError;

    fn pre_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<ExpressionError> {
        let Expr::Function(function) = expr else { return ControlFlow::Continue(()) };
        let (name, offset) = name_of(self.text, function);
        let state = session_state();
        let udf = state.aggregate_functions().get(&name).cloned();
        if udf.is_none() && !OWN.contains(&name.as_str()) {
            if state.scalar_functions().contains_key(&name) {
                return ControlFlow::Continue(());
            }
            let names = OWN.iter().copied().chain(state.aggregate_functions().keys().map(String::as_str));
            return ControlFlow::Break(ExpressionError {
                offset,
                message: format!("no function `{name}`"),
                hint: did_you_mean(&name, names).or_else(|| Some(format!("aggregates: {}", OWN.join(", ")))),
            });
        }
        match self.calls.call(self.text, function, udf) {
            Ok(call) => {
                self.found.push(call);
                *expr = Expr::Identifier(Ident::with_quote('"', self.calls.fields[call].name()));
                ControlFlow::Continue(())
            }
            Err(error) => ControlFlow::Break(error),
        }
    }
}

/// Finds a column that stands outside of every aggregate and is no key.
struct Outside<'a> {
    text: &'a str,
    inner: &'a SchemaRef,
    outer: &'a SchemaRef,
}

impl VisitorMut for Outside<'_> {
    type Break = ExpressionError;

    fn pre_visit_expr(&mut self, expr: &mut Expr) -> ControlFlow<ExpressionError> {
        match expr {
            Expr::Identifier(ident)
                if self.inner.index_of(&ident.value).is_err() && self.outer.index_of(&ident.value).is_ok() =>
            {
                ControlFlow::Break(ExpressionError {
                    offset: offset_of(self.text, ident),
                    message: format!("`{0}` stands outside of an aggregate", ident.value),
                    hint: Some(format!("write `last({0})`, or add it to `group_by`", ident.value)),
                })
            }
            _ => ControlFlow::Continue(()),
        }
    }
}

/// Names that results have anyway, and names that are taken by the hidden times.
pub(super) fn reserved() -> HashMap<&'static str, &'static str> {
    HashMap::from([
        ("window_start", "every result has it"),
        ("window_end", "every result has it"),
        ("rows", "every result has it"),
        ("stage", "every result has it"),
        ("revision", "every result has it"),
        (pipeline::batch::EVENT_TIME, "it names the hidden time"),
        (pipeline::batch::INGEST_TIME, "it names the hidden time"),
    ])
}
