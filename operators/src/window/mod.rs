//! `window`: metrics over time, per key.

mod aggregate;
mod calls;
mod keys;
mod panes;
mod running;
mod session;
mod slots;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use indexmap::IndexMap;
use pipeline::config::{At, CheckContext, Duration};
use pipeline::error::Result;
use pipeline::plugin::{Operator, OperatorConfig, Planned, StreamShape};
use pipeline::schema::{timestamp_type, type_word};
use schemars::JsonSchema;
use serde::Deserialize;

use aggregate::plain_type;
use calls::{Calls, Parsed};
use keys::KeyColumns;
use panes::{Grid, PaneWindow};
use running::RunningWindow;
use session::SessionWindow;
use slots::{Column, Core, Plan};

const PAGE: &str = include_str!("page.md");

/// Most panes of one window. A window that closes merges its panes, so each result costs this many steps per key.
pub const PANES_PER_WINDOW_MAX: i64 = 10_000;

/// The `window` step.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WindowConfig {
    /// Windows of this length, one after the other, aligned to 1970 UTC: `tumbling: 1s`.
    #[serde(default)]
    pub tumbling: Option<At<Duration>>,
    /// Windows that overlap: `sliding: {size: 10s, every: 1s}` gives the last 10 s at every second.
    #[serde(default)]
    pub sliding: Option<At<Sliding>>,
    /// Windows that end when a key is silent: `session: {gap: 30s}`.
    #[serde(default)]
    pub session: Option<At<Session>>,
    /// Running totals: `none: {every: 1s, reset: 1d}`.
    #[serde(default)]
    pub none: Option<At<Running>>,
    /// Columns of which each combination of values has its own windows. Default: none, one window for all rows.
    #[serde(default)]
    pub group_by: Vec<At<String>>,
    /// Columns of the results with their expressions, such as `avg_ms: avg(latency_ms)`. Default: none; `rows` is
    /// always there.
    #[serde(default)]
    pub aggregate: IndexMap<String, At<String>>,
    /// How long a closed window still takes late rows. Default 0s; other values are not available yet.
    #[serde(default)]
    pub allowed_lateness: Option<At<Duration>>,
    /// Which results are given out. Default `{final: true}`; others are not available yet.
    #[serde(default)]
    pub emit: Option<Emit>,
}

/// Windows that overlap.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sliding {
    /// Length of a window.
    pub size: Duration,
    /// Time between the starts of two windows, at most `size`.
    pub every: Duration,
}

/// Windows that end when a key is silent.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Session {
    /// A row belongs to a session if it is less than this away from another row of it.
    pub gap: Duration,
}

/// Running totals.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Running {
    /// Time between two results of a key, in event time.
    pub every: Duration,
    /// The totals start anew at every multiple of this since 1970 UTC, such as `1d`; a multiple of `every`. Default: never.
    #[serde(default)]
    pub reset: Option<Duration>,
}

/// Which results are given out.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Emit {
    /// The result at the close of a window. Default true; false is not available yet.
    #[serde(default, rename = "final")]
    pub finals: Option<At<bool>>,
    /// Early results of open windows. Default false; true is not available yet.
    #[serde(default)]
    pub partial: Option<At<bool>>,
    /// Results corrected by late rows. Default false; true is not available yet.
    #[serde(default)]
    pub revised: Option<At<bool>>,
}

/// The checked kind of a window.
enum Kind {
    Grid(Grid),
    Session { gap_us: i64 },
    Running { every_us: i64, reset_us: Option<i64> },
}

impl OperatorConfig for WindowConfig {
    const TYPE: &'static str = "window";
    const PAGE: &'static str = PAGE;
    const EXAMPLE: &'static str = "\
window:
  tumbling: 1s
  group_by: [device_id]
  aggregate:
    rps: rate()
    avg_delay_ms: avg(latency_ms)
    p99_ms: percentile(latency_ms, 0.99)
";

    fn plan(&self, inputs: &[StreamShape], cx: &mut CheckContext<'_>) -> Option<Planned> {
        let input = &inputs.first()?.schema;
        let kind = self.kind(cx);
        self.refuse_later_features(cx);
        let keys = self.keys(input, cx);
        let columns = self.columns(input, cx);
        let (Some(kind), Some(keys), Some(plan)) = (kind, keys, columns) else {
            return Some(Planned::broken(self.known_shape(input)));
        };
        let shape = StreamShape { schema: plan.output.clone(), keys, windowed: true };
        match operator(&kind, plan) {
            Ok(operator) => Some(Planned { shape, operator }),
            Err(error) => {
                cx.error(cx.position(), error.to_string());
                None
            }
        }
    }
}

fn operator(kind: &Kind, plan: Plan) -> Result<Box<dyn Operator>> {
    let core = Core::new(plan)?;
    Ok(match *kind {
        Kind::Grid(grid) => Box::new(PaneWindow::new(grid, core)),
        Kind::Session { gap_us } => Box::new(SessionWindow::new(gap_us, core)),
        Kind::Running { every_us, reset_us } => Box::new(RunningWindow::new(every_us, reset_us, core)),
    })
}

impl WindowConfig {
    /// What a window with problems would emit: its names are known, the types of its aggregates are not.
    fn known_shape(&self, input: &SchemaRef) -> StreamShape {
        let keys = self.group_by.iter().filter_map(|name| input.field_with_name(name).ok().cloned());
        let time = |name| Field::new(name, timestamp_type(), true);
        let fields = [time("window_start"), time("window_end")]
            .into_iter()
            .chain(keys)
            .chain(self.aggregate.keys().map(|name| Field::new(name, DataType::Null, true)))
            .chain([
                Field::new("rows", DataType::Int64, true),
                Field::new("stage", DataType::Utf8, true),
                Field::new("revision", DataType::Int64, true),
            ]);
        let schema = Arc::new(Schema::new(fields.collect::<Vec<_>>()));
        StreamShape { schema, keys: self.group_by.iter().map(|name| name.value.clone()).collect(), windowed: true }
    }

    /// The one kind that is given.
    fn kind(&self, cx: &mut CheckContext<'_>) -> Option<Kind> {
        let mut given: Vec<_> = [
            self.tumbling.as_ref().map(|at| (at.position, "tumbling")),
            self.sliding.as_ref().map(|at| (at.position, "sliding")),
            self.session.as_ref().map(|at| (at.position, "session")),
            self.none.as_ref().map(|at| (at.position, "none")),
        ]
        .into_iter()
        .flatten()
        .collect();
        given.sort_unstable();
        match given.as_slice() {
            [(position, word)] => {
                let kind = self.checked_kind();
                kind.map_err(|(message, hint)| cx.error_hint(*position, format!("{word}: {message}"), hint)).ok()
            }
            [] => {
                let hint = "write one of `tumbling: 1s`, `sliding: {size: 10s, every: 1s}`, `session: {gap: 30s}`, \
                            `none: {every: 1s}`";
                cx.error_hint(cx.position(), "a window needs its kind", Some(hint.to_owned()));
                None
            }
            [(_, first), rest @ ..] => {
                for (position, word) in rest {
                    let hint = Some("use two pipelines for two kinds".to_owned());
                    cx.error_hint(
                        *position,
                        format!("a window has one kind, and `{first}` is given already: `{word}`"),
                        hint,
                    );
                }
                None
            }
        }
    }

    fn checked_kind(&self) -> Result<Kind, (String, Option<String>)> {
        let positive = |name: &str, duration: Duration| match duration.as_us() {
            0 => Err((format!("{name} must be more than 0s"), None)),
            us => Ok(us),
        };
        if let Some(size) = &self.tumbling {
            let size_us = positive("the length", size.value)?;
            return Ok(Kind::Grid(Grid { size_us, every_us: size_us }));
        }
        if let Some(sliding) = &self.sliding {
            let grid =
                Grid { size_us: positive("`size`", sliding.size)?, every_us: positive("`every`", sliding.every)? };
            if grid.every_us > grid.size_us {
                let message = format!(
                    "every {} is longer than size {}: rows between windows would be lost",
                    sliding.every, sliding.size
                );
                return Err((message, Some(format!("use `tumbling: {}`, or a longer `size`", sliding.every))));
            }
            let panes = grid.size_us / grid.pane_us();
            if panes > PANES_PER_WINDOW_MAX {
                let pane = Duration(std::time::Duration::from_micros(grid.pane_us().unsigned_abs()));
                let message = format!("{panes} panes of {pane} per window, more than {PANES_PER_WINDOW_MAX}");
                let hint = "use a longer `every`, of which `size` is a multiple".to_owned();
                return Err((message, Some(hint)));
            }
            return Ok(Kind::Grid(grid));
        }
        if let Some(session) = &self.session {
            return Ok(Kind::Session { gap_us: positive("`gap`", session.gap)? });
        }
        let Some(running) = &self.none else { return Err(("no kind".to_owned(), None)) };
        let every_us = positive("`every`", running.every)?;
        let reset_us = running.reset.map(|reset| positive("`reset`", reset)).transpose()?;
        if reset_us.is_some_and(|reset_us| reset_us % every_us != 0) {
            return Err(("`reset` must be a multiple of `every`".to_owned(), None));
        }
        Ok(Kind::Running { every_us, reset_us })
    }

    fn refuse_later_features(&self, cx: &mut CheckContext<'_>) {
        if let Some(lateness) = self.allowed_lateness.as_ref().filter(|lateness| lateness.as_us() != 0) {
            let hint = "give the source a longer `lateness`: it keeps windows open for late rows".to_owned();
            cx.error_hint(lateness.position, "`allowed_lateness` is not available yet", Some(hint));
        }
        let emit = self.emit.clone().unwrap_or_default();
        let settings =
            [("final", emit.finals, true), ("partial", emit.partial, false), ("revised", emit.revised, false)];
        for (name, setting, available) in settings {
            if let Some(setting) = setting.filter(|setting| setting.value != available) {
                let message = format!("`{name}: {}` is not available yet", setting.value);
                cx.error_hint(
                    setting.position,
                    message,
                    Some("leave `emit` away, or write `emit: {final: true}`".to_owned()),
                );
            }
        }
    }

    /// The names of the key columns.
    fn keys(&self, input: &SchemaRef, cx: &mut CheckContext<'_>) -> Option<Vec<String>> {
        let errors = cx.errors();
        let reserved = calls::reserved();
        for (index, name) in self.group_by.iter().enumerate() {
            let Some(column) = cx.column(name, input) else { continue };
            let field = input.field(column);
            if !KeyColumns::can_hold(field.data_type()) {
                cx.error(name.position, format!("cannot group by `{}`, which is {}", name.value, type_word(field)));
            }
            if self.group_by[..index].iter().any(|one| one.value == name.value) {
                cx.error(name.position, format!("`{}` is in `group_by` twice", name.value));
            }
            if let Some(why) = reserved.get(name.as_str()) {
                let hint = Some("give it another name in a `select` step before".to_owned());
                cx.error_hint(name.position, format!("`{}` cannot be a key: {why}", name.value), hint);
            }
        }
        (cx.errors() == errors).then(|| self.group_by.iter().map(|name| name.value.clone()).collect())
    }

    /// Everything to compute. `None` if anything under `aggregate` or `group_by` is wrong.
    fn columns(&self, input: &SchemaRef, cx: &mut CheckContext<'_>) -> Option<Plan> {
        let errors = cx.errors();
        let key_indices: Vec<usize> = self.group_by.iter().filter_map(|name| input.index_of(name).ok()).collect();
        let key_fields = || key_indices.iter().map(|index| input.field(*index).clone().with_nullable(true));
        let mut calls = Calls::new(input);
        let mut parsed = Vec::new();
        for (name, text) in &self.aggregate {
            self.check_name(name, text, cx);
            parsed.push(calls.parse(text, cx));
        }
        let inner: SchemaRef =
            Arc::new(Schema::new(calls.fields().iter().cloned().chain(key_fields()).collect::<Vec<_>>()));
        let mut columns = Vec::new();
        let mut fields = Vec::new();
        for ((name, text), parsed) in self.aggregate.iter().zip(parsed) {
            let column = match parsed {
                Some(Parsed::Call(call)) => Column::Call(call),
                Some(Parsed::Around(ast)) => match calls.compile(text, *ast, &inner, cx) {
                    Some(column) => column,
                    None => continue,
                },
                None => continue,
            };
            fields.push(match &column {
                Column::Call(call) => calls.fields()[*call].clone().with_name(name),
                Column::Expression(expression) => Field::new(name, plain_type(expression.data_type()), true),
            });
            columns.push(column);
        }
        let output = output_schema(key_fields().collect(), fields);
        let keys = key_indices.iter().map(|index| (*index, input.field(*index).data_type().clone())).collect();
        (cx.errors() == errors).then(|| Plan {
            keys: KeyColumns::new(keys),
            arguments: calls.arguments,
            filters: calls.filters,
            states: calls.states,
            calls: calls.calls,
            columns,
            inner,
            output,
        })
    }

    fn check_name(&self, name: &str, text: &At<String>, cx: &mut CheckContext<'_>) {
        let starts = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
        if !starts || !name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') {
            cx.error_hint(
                text.position,
                format!("`{name}` is no column name"),
                Some("letters, digits and _ only, no digit first".to_owned()),
            );
        }
        if let Some(why) = calls::reserved().get(name) {
            cx.error(text.position, format!("`{name}` cannot be the name of an aggregate: {why}"));
        }
        if self.group_by.iter().any(|key| key.value == name) {
            cx.error(text.position, format!("`{name}` is a column of `group_by` already"));
        }
    }
}

/// The visible columns of results.
fn output_schema(keys: Vec<Field>, aggregates: Vec<Field>) -> SchemaRef {
    let field = |name: &str, data_type| Field::new(name, data_type, true);
    let mut fields = vec![field("window_start", timestamp_type()), field("window_end", timestamp_type())];
    fields.extend(keys);
    fields.extend(aggregates);
    fields.push(field("rows", DataType::Int64));
    fields.push(field("stage", DataType::Utf8));
    fields.push(field("revision", DataType::Int64));
    Arc::new(Schema::new(fields))
}
