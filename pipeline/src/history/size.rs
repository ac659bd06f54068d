//! How large a query becomes for the planner, which has no limit of time or memory of its own: it cannot be interrupted,
//! and a short text may stand for a query without end.

use std::collections::{HashMap, VecDeque};
use std::ops::ControlFlow;

use datafusion::common::Column;
use datafusion::common::tree_node::{TreeNode, TreeNodeRecursion};
use datafusion::logical_expr::{Expr, LogicalPlan};
use datafusion::sql::parser::Statement as DfStatement;
use datafusion::sql::sqlparser::ast::{Expr as SqlExpr, ObjectName, Query, SetExpr, Visit, Visitor};

use super::{QueryError, QueryErrorKind};

/// Deepest nesting of operators, and most `UNION`s. The planner's time grows with the square of either, and it
/// cannot be interrupted: this much takes a fraction of a second.
pub(super) const DEPTH_MAX: usize = 500;

/// Most tables that a query reads. The planner's time grows with the third power of those that are joined, and it cannot
/// be interrupted: this many take about a second.
pub(super) const TABLES_MAX: usize = 100;

/// Most operators, names and values of all expressions together, once every name of a column is replaced by what it
/// stands for. A text of the longest length has fewer; it takes the planner about a second to go through this many.
const EXPRESSIONS_MAX: usize = 50_000;

/// Functions that the planner writes as a `CASE` in which their arguments stand twice, as they do for `BETWEEN`.
const TWICE: [&str; 3] = ["coalesce", "nvl", "ifnull"];

/// Deepest nesting of what stands twice: two to the power of it.
const TWICE_DEPTH_MAX: usize = 10;

/// Refuses a statement that would take the planner too long, or more memory or stack than there is.
pub(super) fn refuse_statement(statement: &DfStatement) -> Result<(), QueryError> {
    match statement {
        DfStatement::Explain(explain) => refuse_statement(&explain.statement),
        DfStatement::Statement(statement) => match statement.visit(&mut Size::default()) {
            ControlFlow::Break(message) => Err(QueryError::new(QueryErrorKind::Sql, message)),
            ControlFlow::Continue(()) => Ok(()),
        },
        _ => Ok(()),
    }
}

/// What a statement makes the planner do, counted on the way through it.
#[derive(Default)]
struct Size {
    /// Operators around the place where we are.
    depth: usize,
    /// Those of them whose arguments stand twice.
    twice: usize,
    /// Queries around it.
    queries: Vec<QuerySize>,
}

#[derive(Default)]
struct QuerySize {
    /// Tables that it reads, each as often as it stands there once every name of its `WITH`s is replaced by its query:
    /// the planner does replace it.
    tables: usize,
    /// Names of its `WITH` whose queries come next.
    names: VecDeque<String>,
    /// Names of its `WITH` with the tables of their queries.
    known: HashMap<String, usize>,
}

impl Visitor for Size {
    type Break = String;

    fn pre_visit_expr(&mut self, expr: &SqlExpr) -> ControlFlow<String> {
        self.depth += 1;
        self.twice += usize::from(stands_twice(expr));
        if self.twice > TWICE_DEPTH_MAX {
            return ControlFlow::Break(format!(
                "`BETWEEN`, `coalesce`, `nvl`, `ifnull` are nested deeper than {TWICE_DEPTH_MAX}"
            ));
        }
        if self.depth > DEPTH_MAX { too_deep() } else { ControlFlow::Continue(()) }
    }

    fn post_visit_expr(&mut self, expr: &SqlExpr) -> ControlFlow<String> {
        self.depth -= 1;
        self.twice -= usize::from(stands_twice(expr));
        ControlFlow::Continue(())
    }

    fn pre_visit_query(&mut self, query: &Query) -> ControlFlow<String> {
        let (mut body, mut unions) = (query.body.as_ref(), 0);
        while let SetExpr::SetOperation { left, .. } = body {
            (body, unions) = (left, unions + 1);
        }
        let with = query.with.iter().flat_map(|with| &with.cte_tables);
        let names = with.map(|named| named.alias.name.value.clone()).collect();
        self.queries.push(QuerySize { names, ..QuerySize::default() });
        if unions > DEPTH_MAX { too_deep() } else { ControlFlow::Continue(()) }
    }

    fn pre_visit_relation(&mut self, name: &ObjectName) -> ControlFlow<String> {
        let bare = match name.0.as_slice() {
            [part] => part.as_ident().map(|ident| ident.value.as_str()),
            _ => None,
        };
        let named = bare.and_then(|bare| self.queries.iter().rev().find_map(|query| query.known.get(bare)));
        let tables = named.map_or(1, |tables| tables.saturating_add(1));
        if let Some(query) = self.queries.last_mut() {
            query.tables = query.tables.saturating_add(tables);
        }
        ControlFlow::Continue(())
    }

    fn post_visit_query(&mut self, _: &Query) -> ControlFlow<String> {
        let tables = self.queries.pop().map_or(0, |query| query.tables);
        if tables > TABLES_MAX {
            return ControlFlow::Break(format!(
                "the query reads more than {TABLES_MAX} tables, each name of a `WITH` counted as the tables behind it"
            ));
        }
        if let Some(outer) = self.queries.last_mut() {
            // The queries of a `WITH` stand before all else.
            match outer.names.pop_front() {
                Some(name) => drop(outer.known.insert(name, tables)),
                None => outer.tables = outer.tables.saturating_add(tables),
            }
        }
        ControlFlow::Continue(())
    }
}

fn stands_twice(expr: &SqlExpr) -> bool {
    match expr {
        SqlExpr::Between { .. } => true,
        SqlExpr::Function(call) => TWICE.iter().any(|name| call.name.to_string().eq_ignore_ascii_case(name)),
        _ => false,
    }
}

fn too_deep() -> ControlFlow<String> {
    ControlFlow::Break(format!("the query is nested deeper than {DEPTH_MAX} operators"))
}

/// Refuses a plan whose expressions the planner would write out without end: it moves a condition below the columns that it
/// names, and `SELECT x + x AS x` then doubles it, in every subquery anew.
pub(super) fn refuse_plan(plan: &LogicalPlan) -> Result<(), QueryError> {
    let mut written = 0;
    weigh(plan, &mut written);
    if written <= EXPRESSIONS_MAX {
        return Ok(());
    }
    let message = "the expressions of the query become too long, each name of a column counted as what it stands for";
    Err(QueryError::new(QueryErrorKind::Sql, message.to_owned()))
}

/// What each column of a plan becomes, in operators, names and values. Adds all expressions on the way to `written`.
fn weigh(plan: &LogicalPlan, written: &mut usize) -> Vec<usize> {
    let inputs = plan.inputs();
    let weights: Vec<Vec<usize>> = inputs.iter().map(|input| weigh(input, written)).collect();
    let of_column = |column: &Column| {
        let mut found = inputs.iter().zip(&weights);
        let found = found.find_map(|(input, of)| of.get(input.schema().maybe_index_of_column(column)?).copied());
        found.unwrap_or(1)
    };
    let expressions: Vec<usize> = plan.expressions().iter().map(|e| weigh_expression(e, &of_column, written)).collect();
    *written = expressions.iter().fold(*written, |sum, weight| sum.saturating_add(*weight));
    let columns = plan.schema().fields().len();
    let most = || weights.iter().flatten().copied().max().unwrap_or(1);
    match plan {
        LogicalPlan::Projection(_) => expressions,
        // Nothing is moved below an aggregate but what names its groups.
        LogicalPlan::Aggregate(aggregate) => {
            let groups = expressions[..aggregate.group_expr.len()].iter().copied();
            vec![groups.max().unwrap_or(1); columns]
        }
        LogicalPlan::Union(_) => vec![most(); columns],
        LogicalPlan::Join(_) if weights.iter().map(Vec::len).sum::<usize>() != columns => vec![most(); columns],
        // The columns of the inputs, and what a window adds.
        _ => {
            let mut weights = weights.concat();
            weights.resize(columns, 1);
            weights
        }
    }
}

fn weigh_expression(expr: &Expr, of_column: &dyn Fn(&Column) -> usize, written: &mut usize) -> usize {
    let times = match expr {
        Expr::Column(column) => return of_column(column),
        Expr::Between(_) => 2,
        Expr::ScalarFunction(call) if TWICE.contains(&call.name()) => 2,
        _ => 1,
    };
    if let Expr::ScalarSubquery(inner) = expr {
        weigh(&inner.subquery, written);
    } else if let Expr::InSubquery(inner) = expr {
        weigh(&inner.subquery.subquery, written);
    } else if let Expr::Exists(inner) = expr {
        weigh(&inner.subquery.subquery, written);
    }
    let mut arguments: usize = 0;
    // Nothing in here fails.
    let _ = expr.apply_children(|argument| {
        arguments = arguments.saturating_add(weigh_expression(argument, of_column, written));
        Ok(TreeNodeRecursion::Continue)
    });
    arguments.saturating_mul(times).saturating_add(1)
}
