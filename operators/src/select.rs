//! `select`: computes columns, and says which columns go on under which names.

use arrow::array::{ArrayRef, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use indexmap::IndexMap;
use pipeline::batch::Batch;
use pipeline::config::{At, CheckContext};
use pipeline::error::Result;
use pipeline::expression::Expression;
use pipeline::plugin::{Operator, OperatorConfig, Output, Planned, StreamShape};
use schemars::JsonSchema;
use serde::Deserialize;

const PAGE: &str = "\
Computes new columns, and says which columns go on and under which names.

    select:
      derive: {ratio: failed * 1.0 / total, queue: \"named_struct('pending', pending, 'failed', failed)\"}
      keep: [device_id]
      rename: {device: device_id}

The parts work in this order, however they are written:

1. `derive` computes columns. Every expression sees the columns that come in (and the hidden `event_time` and
   `ingest_time`), not the other derived ones: for those write a second `select`. A derived column takes the place of
   one of the same name, else it comes after all others.
2. `keep` or `drop` choose among the columns that came in. Derived and renamed ones always go on, so `keep: []` leaves
   just those.
3. `rename` gives columns that came in another name, in their place.

## Emits

The chosen columns: those of `keep` in its order, or all but the dropped ones in theirs; then the derived ones. Values
have the types of `fields:`; whole numbers are int, every time is a timestamp in UTC. Structs
(`named_struct('a', a)`) and lists (`[a, b]`) nest; `queue['pending']` takes a part out.

Key columns keep being keys under their new names. Event time and ingest time are hidden columns and stay in any case.

## State

None. Partial and revised rows of a window pass as such. A window's rows stay a window's as long as `window_start`,
`window_end`, `stage` and `revision` go on unchanged; without them history cannot tell a corrected row from a new one,
and `check` says so.

## Limits

`now()`, `random()` and the like are refused: the same rows must give the same values when they are read again after
a crash. A difference of two timestamps is no column: write `extract(epoch from a - b)` for seconds. As in SQL, a whole
number divided by a whole number is a whole number: write `failed * 1.0 / total` for a ratio.

## Fails when

Never. A value that cannot be computed (a division by zero, a text that is no number) is null, and the row is counted
among the errors of the pipeline.
";

/// What a window adds to its rows and history needs to tell their versions apart.
const WINDOW_COLUMNS: [&str; 4] = ["window_start", "window_end", "stage", "revision"];

/// Options of `select`; at least one of them.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SelectConfig {
    /// Columns that go on, in this order. Default: all. Derived and renamed columns go on without being named here.
    #[serde(default)]
    pub keep: Option<Vec<At<String>>>,
    /// Columns that do not go on. Default: none.
    #[serde(default)]
    pub drop: Vec<At<String>>,
    /// New names, each with the old one: `{device: device_id}`. Default: none.
    #[serde(default)]
    pub rename: IndexMap<String, At<String>>,
    /// Computed columns, each an SQL expression over the columns that come in. Default: none.
    #[serde(default)]
    pub derive: IndexMap<String, At<String>>,
}

/// Where a column that goes on comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    Input(usize),
    Derived(usize),
}

/// A column that goes on.
struct Chosen {
    name: String,
    from: Origin,
}

impl OperatorConfig for SelectConfig {
    const TYPE: &'static str = "select";
    const PAGE: &'static str = PAGE;
    const EXAMPLE: &'static str = "\
select:
  keep: [device_id, ts]
  rename: {at: ts}
  derive: {latency_s: latency_ms / 1000}
";

    fn plan(&self, inputs: &[StreamShape], cx: &mut CheckContext<'_>) -> Option<Planned> {
        let input = inputs.first()?;
        let errors_before = cx.errors();
        if self.keep.is_none() && self.drop.is_empty() && self.rename.is_empty() && self.derive.is_empty() {
            cx.error(cx.position(), "`select` needs at least one of `keep`, `drop`, `rename`, `derive`");
        }
        let expressions = self.expressions(&input.schema, cx);
        self.check_names(&input.schema, cx);
        if cx.errors() > errors_before {
            return Some(Planned::broken(self.known_shape(input)));
        }
        let chosen = self.chosen(&input.schema);
        self.check_chosen(&chosen, cx);
        if cx.errors() > errors_before {
            return Some(Planned::broken(self.known_shape(input)));
        }
        let fields: Vec<Field> = chosen
            .iter()
            .map(|column| match column.from {
                Origin::Input(index) => input.schema.field(index).clone().with_name(&column.name),
                Origin::Derived(index) => expressions[index].field(&column.name),
            })
            .collect();
        let schema = SchemaRef::new(Schema::new(fields));
        let keys = keys(input, &chosen, cx);
        let windowed = input.windowed && keeps_window(input, &chosen, cx);
        let columns = chosen.iter().map(|column| column.from).collect();
        let operator = Select { expressions, columns, schema: SchemaRef::clone(&schema) };
        Some(Planned { shape: StreamShape { schema, keys, windowed }, operator: Box::new(operator) })
    }
}

impl SelectConfig {
    /// What a step with problems may emit: every input column and every new name.
    fn known_shape(&self, input: &StreamShape) -> StreamShape {
        let mut fields: Vec<Field> = input.schema.fields().iter().map(|field| field.as_ref().clone()).collect();
        let renamed = self.rename.iter().map(|(new, old)| match input.schema.field_with_name(old) {
            Ok(field) => field.clone().with_name(new),
            Err(_) => Field::new(new, DataType::Null, true),
        });
        let derived = self.derive.iter().map(|(name, text)| match Expression::compile(text, &input.schema) {
            Ok(expression) => expression.field(name),
            Err(_) => Field::new(name, DataType::Null, true),
        });
        for field in renamed.chain(derived) {
            fields.retain(|other| other.name() != field.name());
            fields.push(field);
        }
        StreamShape { schema: SchemaRef::new(Schema::new(fields)), ..input.clone() }
    }

    /// Compiles the derived columns, in the order of `derive`.
    fn expressions(&self, schema: &SchemaRef, cx: &mut CheckContext<'_>) -> Vec<Expression> {
        let mut expressions = Vec::with_capacity(self.derive.len());
        for (name, text) in &self.derive {
            if name.is_empty() {
                cx.error(text.position, "a derived column needs a name");
            }
            match Expression::compile(text, schema) {
                Ok(expression) => expressions.push(expression),
                Err(mut error) => {
                    let other = self.derive.keys().find(|other| error.message == format!("no column `{other}` here"));
                    if let Some(other) = other {
                        let hint = format!("`{other}` is derived in this step: use it in a second `select` after this");
                        error.hint = Some(hint);
                    }
                    cx.expression_error(text, error);
                }
            }
        }
        expressions
    }

    /// Reports names that are not there, and those that are asked two things at once.
    fn check_names(&self, schema: &SchemaRef, cx: &mut CheckContext<'_>) {
        for name in self.keep.iter().flatten().filter(|name| !self.derive.contains_key(name.as_str())) {
            cx.column(name, schema);
        }
        for name in &self.drop {
            if self.derive.contains_key(name.as_str()) {
                cx.error(
                    name.position,
                    format!("`{}` is derived in this step; dropping it makes no sense", name.value),
                );
            } else if cx.column(name, schema).is_some() && self.keep.iter().flatten().any(|kept| **kept == **name) {
                cx.error(name.position, format!("`{}` stands in `keep` too", name.value));
            }
        }
        for (new, old) in &self.rename {
            if new.is_empty() {
                cx.error(old.position, "a column needs a name");
            }
            if self.derive.contains_key(old.as_str()) {
                let hint =
                    format!("give it its name in `derive`, or derive `{new}: {}` to keep the old one", old.value);
                cx.error_hint(old.position, format!("`{}` is derived in this step", old.value), Some(hint));
            } else if cx.column(old, schema).is_some() && self.drop.iter().any(|dropped| **dropped == **old) {
                cx.error(old.position, format!("`{}` stands in `drop` too", old.value));
            }
        }
    }

    /// What goes on, in order. The names were checked.
    fn chosen(&self, schema: &SchemaRef) -> Vec<Chosen> {
        let derived = |name: &str| self.derive.get_index_of(name);
        let named = |name: &str| match derived(name) {
            Some(index) => Some(Origin::Derived(index)),
            None => schema.index_of(name).ok().map(Origin::Input),
        };
        let mut from: Vec<(&str, Origin)> = Vec::new();
        match &self.keep {
            Some(keep) => {
                from.extend(keep.iter().filter_map(|name| Some((name.as_str(), named(name)?))));
                // Renamed columns go on without being kept by name.
                for old in self.rename.values() {
                    if let Some(origin) = named(old).filter(|_| !from.iter().any(|(name, _)| *name == old.as_str())) {
                        from.push((old, origin));
                    }
                }
            }
            None => {
                let names = schema.fields().iter().map(|field| field.name().as_str());
                let stay = names.filter(|name| !self.drop.iter().any(|dropped| dropped.as_str() == *name));
                from.extend(stay.filter_map(|name| Some((name, named(name)?))));
            }
        }
        for (index, name) in self.derive.keys().enumerate() {
            if !from.iter().any(|(_, from)| *from == Origin::Derived(index)) {
                from.push((name, Origin::Derived(index)));
            }
        }
        let renamed = |name: &str, from: Origin| -> Vec<String> {
            let new = self.rename.iter().filter(|(_, old)| old.as_str() == name && matches!(from, Origin::Input(_)));
            let new: Vec<String> = new.map(|(new, _)| new.clone()).collect();
            if new.is_empty() { vec![name.to_owned()] } else { new }
        };
        let names = from
            .into_iter()
            .flat_map(|(name, from)| renamed(name, from).into_iter().map(move |name| Chosen { name, from }));
        names.collect()
    }

    /// Reports two columns of one name, and no column at all.
    fn check_chosen(&self, chosen: &[Chosen], cx: &mut CheckContext<'_>) {
        if chosen.is_empty() {
            cx.error(cx.position(), "no column is left");
        }
        for (index, column) in chosen.iter().enumerate() {
            if chosen[..index].iter().any(|before| before.name == column.name) {
                let position = self.rename.get(&column.name).map_or(cx.position(), |old| old.position);
                cx.error(position, format!("two columns would be named `{}`", column.name));
            }
        }
    }
}

/// The key columns under their new names; tells of those that are lost.
fn keys(input: &StreamShape, chosen: &[Chosen], cx: &mut CheckContext<'_>) -> Vec<String> {
    let mut keys = Vec::with_capacity(input.keys.len());
    for key in &input.keys {
        let index = input.schema.index_of(key).ok();
        let same = chosen.iter().find(|column| index.is_some_and(|index| column.from == Origin::Input(index)));
        // A derived column of the key's name is the key from now on.
        match same.or_else(|| chosen.iter().find(|column| column.name == *key)) {
            Some(column) => keys.push(column.name.clone()),
            None => cx.note(
                cx.position(),
                format!(
                    "the key column `{key}` does not go on: rows that differ in it alone take each other's place among \
                     the latest rows and in history"
                ),
            ),
        }
    }
    keys
}

/// Whether the columns that tell a window's versions apart go on unchanged.
fn keeps_window(input: &StreamShape, chosen: &[Chosen], cx: &mut CheckContext<'_>) -> bool {
    let goes_on = |name: &&&str| {
        let index = input.schema.index_of(name).ok();
        chosen.iter().any(|c| c.name == **name && index.is_some_and(|index| c.from == Origin::Input(index)))
    };
    match WINDOW_COLUMNS.iter().find(|name| !goes_on(name)) {
        Some(lost) => {
            cx.note(
                cx.position(),
                format!("`{lost}` does not go on unchanged: history takes a revised row for one more row"),
            );
            false
        }
        None => true,
    }
}

struct Select {
    expressions: Vec<Expression>,
    columns: Vec<Origin>,
    schema: SchemaRef,
}

impl Operator for Select {
    fn process(&mut self, _: usize, batch: Batch, out: &mut Output) -> Result<()> {
        let derived: Vec<ArrayRef> = self.expressions.iter().map(|e| e.evaluate(&batch)).collect::<Result<_>>()?;
        let columns = self.columns.iter().map(|from| match *from {
            Origin::Input(index) => ArrayRef::clone(batch.rows().column(index)),
            Origin::Derived(index) => ArrayRef::clone(&derived[index]),
        });
        let rows = RecordBatch::try_new(SchemaRef::clone(&self.schema), columns.collect())?;
        out.push(batch.with_rows(rows)?);
        Ok(())
    }

    fn failed_rows(&self) -> u64 {
        self.expressions.iter().map(Expression::failed_rows).sum()
    }
}

#[cfg(test)]
mod tests {
    use pipeline::expression::Expression;
    use pipeline::schema::FieldType;

    use crate::testing::{Case, Columns, row};

    const COLUMNS: Columns<'static> = &[
        ("id", FieldType::String),
        ("pending", FieldType::Int),
        ("failed", FieldType::Int),
        ("note", FieldType::Json),
        ("at", FieldType::Timestamp(None)),
    ];
    const WINDOW: Columns<'static> = &[
        ("window_start", FieldType::Timestamp(None)),
        ("window_end", FieldType::Timestamp(None)),
        ("id", FieldType::String),
        ("n", FieldType::Int),
        ("rows", FieldType::Int),
        ("stage", FieldType::String),
        ("revision", FieldType::Int),
    ];

    fn case(step: &str) -> Case<'_> {
        Case { step, inputs: &[COLUMNS], keys: &["id"], windowed: false, lateness_s: 0.0 }
    }

    #[test]
    fn columns_are_derived_then_chosen_then_renamed() {
        let rows = [
            row(1.0, r#"{"id": "a", "pending": 3, "failed": 2, "note": {"x": [1]}, "at": "1970-01-01T00:00:02.5Z"}"#),
            row(2.0, r#"{"id": "b", "pending": 1, "failed": 0}"#),
        ];
        for (step, expected) in [
            ("select: {keep: [failed, id]}", [r#"1 {"failed":2,"id":"a"}"#, r#"2 {"failed":0,"id":"b"}"#]),
            ("select: {drop: [at, note, id]}", [r#"1 {"pending":3,"failed":2}"#, r#"2 {"pending":1,"failed":0}"#]),
            ("select: {keep: [id], rename: {n: pending}}", [r#"1 {"id":"a","n":3}"#, r#"2 {"id":"b","n":1}"#]),
            (
                "select: {keep: [], rename: {pending: failed, failed: pending}}",
                [r#"1 {"pending":2,"failed":3}"#, r#"2 {"pending":0,"failed":1}"#],
            ),
            ("select: {keep: [], rename: {a: id, b: id}}", [r#"1 {"a":"a","b":"a"}"#, r#"2 {"a":"b","b":"b"}"#]),
            (
                "select: {keep: [note, ratio, id], derive: {twice: pending * 2, ratio: pending / failed}}",
                [
                    r#"1 {"note":{"x": [1]},"ratio":1,"id":"a","twice":6}"#,
                    r#"2 {"note":null,"ratio":null,"id":"b","twice":2}"#,
                ],
            ),
            (
                "select: {drop: [note, at], derive: {pending: pending + 1, id: upper(id)}}",
                [r#"1 {"id":"A","pending":4,"failed":2}"#, r#"2 {"id":"B","pending":2,"failed":0}"#],
            ),
            (
                "select: {keep: [], derive: {delay_s: extract(epoch from at - event_time), n: note}}",
                [r#"1 {"delay_s":1.5,"n":{"x": [1]}}"#, r#"2 {"delay_s":null,"n":null}"#],
            ),
            (
                "select: {keep: [], derive: {queue: \"named_struct('pending', pending, 'failed', failed)\"}}",
                [r#"1 {"queue":{"pending":3,"failed":2}}"#, r#"2 {"queue":{"pending":1,"failed":0}}"#],
            ),
        ] {
            case(step).gives(&rows, &expected);
        }
    }

    #[test]
    fn a_nested_column_can_be_taken_apart_by_the_next_step() {
        let nest = case("select: {keep: [id], derive: {queue: \"named_struct('pending', pending, 'note', note)\"}}");
        let (planned, _) = nest.plan();
        let nested = planned.expect("a step").shape.schema;
        for text in ["queue['pending'] + 1", "get_field(queue, 'pending')", "queue.pending * 2"] {
            let part = Expression::compile(text, &nested).unwrap_or_else(|e| panic!("{text}: {e:?}"));
            assert_eq!(*part.data_type(), arrow::datatypes::DataType::Int64, "{text}");
        }
    }

    #[test]
    fn keys_follow_their_columns_and_a_lost_one_is_told() {
        for (step, keys, note) in [
            ("select: {drop: [note]}", vec!["id"], ""),
            ("select: {keep: [], rename: {device: id}}", vec!["device"], ""),
            ("select: {keep: [], derive: {id: upper(id)}}", vec!["id"], ""),
            ("select: {drop: [id]}", vec![], "the key column `id` does not go on"),
        ] {
            let (planned, problems) = case(step).plan();
            assert_eq!(planned.map(|p| p.shape.keys), Some(keys.into_iter().map(str::to_owned).collect()), "{step}");
            let notes = problems.render("test");
            assert!(if note.is_empty() { notes.is_empty() } else { notes.contains(note) }, "{step}: {notes}");
        }
    }

    #[test]
    fn rows_stay_a_windows_while_the_columns_that_tell_versions_apart_go_on() {
        for (step, windowed) in [
            ("select: {drop: [rows]}", true),
            ("select: {derive: {twice: n * 2}}", true),
            ("select: {keep: [id, n]}", false),
            ("select: {rename: {start: window_start}}", false),
            ("select: {derive: {revision: revision + 1}}", false),
        ] {
            let case = Case { step, inputs: &[WINDOW], keys: &["id"], windowed: true, lateness_s: 0.0 };
            let (planned, problems) = case.plan();
            assert_eq!(planned.map(|p| p.shape.windowed), Some(windowed), "{step}");
            assert_eq!(problems.render("test").contains("one more row"), !windowed, "{step}");
        }
    }

    #[test]
    fn wrong_names_and_contradictions_are_reported_at_their_place() {
        for (step, expected) in [
            ("select: {}", "needs at least one of"),
            ("select: {keep: [idd]}", "1:17: error: step: no column `idd` here\n  hint: did you mean `id`?"),
            ("select: {drop: [nope]}", "1:17: error"),
            ("select: {rename: {a: nope}}", "1:22: error"),
            ("select: {keep: []}", "no column is left"),
            ("select: {keep: [id, id]}", "two columns would be named `id`"),
            ("select: {rename: {id: failed}}", "1:23: error: step: two columns would be named `id`"),
            ("select: {keep: [id], drop: [id]}", "1:29: error: step: `id` stands in `keep` too"),
            ("select: {rename: {a: id}, drop: [id]}", "`id` stands in `drop` too"),
            ("select: {derive: {a: 1, b: a + 1}}", "use it in a second `select`"),
            ("select: {derive: {id: lower(id)}, rename: {b: id}}", "`id` is derived in this step"),
            ("select: {derive: {id: lower(id)}, drop: [id]}", "dropping it makes no sense"),
            ("select: {derive: {d: at - event_time}}", "extract(epoch from a - b)"),
            ("select: {derive: {d: pending + nope}}", "1:32: error: step: no column `nope` here"),
            ("select: {derive: {d: sum(pending)}}", "an aggregate stands only in"),
            ("select: {kep: [id]}", "unknown key `kep`\n  hint: did you mean `keep`?"),
        ] {
            let problems = case(step).problems();
            assert!(problems.contains(expected), "{step}: {problems}");
        }
    }
}
