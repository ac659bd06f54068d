//! `join`: adds columns of the latest row of another pipeline, by key.

use arrow::array::{ArrayRef, RecordBatch};
use arrow::datatypes::{Field, Schema, SchemaRef};
use arrow::row::{RowConverter, SortField};
use indexmap::IndexMap;
use pipeline::batch::Batch;
use pipeline::config::{At, CheckContext, did_you_mean};
use pipeline::error::{Error, Result};
use pipeline::plugin::{Operator, OperatorConfig, Output, Planned, StreamShape};
use pipeline::schema::type_word;
use pipeline::state::{StateReader, StateWriter};
use schemars::JsonSchema;
use serde::Deserialize;

use crate::keys::{Keys, key_columns};

const PAGE: &str = "\
Adds columns of another pipeline's latest row of the same key.

    join: {with: device_info, on: [device_id], columns: [site, owner]}

Each row of the pipeline `with` takes the place of the row of its key in a table; each row of this pipeline takes what
the table holds at that moment. It never waits: a row whose key the table lacks goes on with nulls (a left join).

## Emits

Every row, with the chosen columns of the other pipeline after its own. `prefix` goes before their names; two columns
of one name are an error. A null key has no match.

## State

The latest row per key, in the checkpoint. The latest is the one with the newest event time, and of two with the same
the one that came last. Partial and revised rows are taken from neither side.

## Limits

The table holds 100 000 keys; beyond that a new key takes the place of the one that came first. Between two pipelines
there is no order: after a restart a row may meet an older or a newer row of the table than before. Both sides of `on`
have the same names and types.

## Fails when

Never.
";

/// Most keys in the table. About 30 MB at 200 bytes a row, and as much in a checkpoint; beyond it a new key takes the
/// place of the one that came first.
const KEYS_MAX: usize = 100_000;

/// Options of `join`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct JoinConfig {
    /// The other pipeline.
    pub with: At<String>,
    /// Columns of both pipelines that must be equal; of one type on both sides.
    pub on: Vec<At<String>>,
    /// Columns of the other pipeline to add. Default: all but those of `on`.
    #[serde(default)]
    pub columns: Option<Vec<At<String>>>,
    /// Goes before the names of the added columns, to tell them from those of this pipeline. Default: nothing.
    #[serde(default)]
    pub prefix: String,
}

impl OperatorConfig for JoinConfig {
    const TYPE: &'static str = "join";
    const PAGE: &'static str = PAGE;
    const EXAMPLE: &'static str =
        "join: {with: device_average, on: [device_id], columns: [latency_ms], prefix: average_}";

    fn side_inputs(&self) -> Vec<At<String>> {
        vec![self.with.clone()]
    }

    fn plan(&self, inputs: &[StreamShape], cx: &mut CheckContext<'_>) -> Option<Planned> {
        let [main, side] = inputs else {
            cx.error(self.with.position, format!("nothing is known of pipeline `{}`", self.with.value));
            return None;
        };
        let errors_before = cx.errors();
        let main_on = key_columns(&self.on, "on", &main.schema, cx);
        let side_on = self.side_on(side, cx);
        let columns = self.columns(side, cx);
        let (Some(main_on), Some(side_on)) = (main_on, side_on) else {
            return Some(Planned::broken(main.clone()));
        };
        self.check_types(main, side, &main_on, &side_on, cx);
        let added = self.added(main, side, &columns, cx);
        if cx.errors() > errors_before {
            return Some(Planned::broken(main.clone()));
        }
        let fields: Vec<Field> = main.schema.fields().iter().map(|f| f.as_ref().clone()).chain(added).collect();
        let shape = StreamShape { schema: SchemaRef::new(Schema::new(fields)), ..main.clone() };
        match Join::new([main_on, side_on], columns, &side.schema, SchemaRef::clone(&shape.schema), KEYS_MAX) {
            Ok(operator) => Some(Planned { shape, operator: Box::new(operator) }),
            Err(error) => {
                cx.error(self.with.position, error.to_string());
                None
            }
        }
    }
}

impl JoinConfig {
    /// The columns of `on` in the other pipeline.
    fn side_on(&self, side: &StreamShape, cx: &mut CheckContext<'_>) -> Option<Vec<usize>> {
        let index = |name: &At<String>| self.side_column(name, side, cx);
        let indices: Vec<Option<usize>> = self.on.iter().map(index).collect();
        indices.into_iter().collect()
    }

    /// The columns to add. Empty if there is none; then a problem was reported.
    fn columns(&self, side: &StreamShape, cx: &mut CheckContext<'_>) -> Vec<usize> {
        let columns: Vec<usize> = match &self.columns {
            Some(names) => names.iter().filter_map(|name| self.side_column(name, side, cx)).collect(),
            None => {
                let is_on = |name: &str| self.on.iter().any(|on| on.as_str() == name);
                let fields = side.schema.fields().iter().enumerate();
                fields.filter(|(_, field)| !is_on(field.name())).map(|(index, _)| index).collect()
            }
        };
        if columns.is_empty() {
            cx.error(self.with.position, format!("no column of `{}` would be added", self.with.value));
        }
        columns
    }

    fn side_column(&self, name: &At<String>, side: &StreamShape, cx: &mut CheckContext<'_>) -> Option<usize> {
        let index = side.schema.index_of(name).ok();
        if index.is_none() {
            let hint = did_you_mean(name, side.schema.fields().iter().map(|f| f.name()));
            let message = format!("no column `{}` in pipeline `{}`", name.value, self.with.value);
            cx.error_hint(name.position, message, hint);
        }
        index
    }

    fn check_types(
        &self,
        main: &StreamShape,
        side: &StreamShape,
        main_on: &[usize],
        side_on: &[usize],
        cx: &mut CheckContext<'_>,
    ) {
        for ((name, main_index), side_index) in self.on.iter().zip(main_on).zip(side_on) {
            let (here, there) = (main.schema.field(*main_index), side.schema.field(*side_index));
            if here.data_type() != there.data_type() {
                let (here, there) = (type_word(here), type_word(there));
                let message = format!("`{}` is {here} here and {there} in `{}`", name.value, self.with.value);
                let hint = format!("make them one type with `select: {{derive: {{{0}: CAST({0} AS …)}}}}`", name.value);
                cx.error_hint(name.position, message, Some(hint));
            }
        }
    }

    /// The added columns under their names; reports those that are there already.
    fn added(
        &self,
        main: &StreamShape,
        side: &StreamShape,
        columns: &[usize],
        cx: &mut CheckContext<'_>,
    ) -> Vec<Field> {
        let mut added: Vec<Field> = Vec::with_capacity(columns.len());
        for (position, &index) in columns.iter().enumerate() {
            let field = side.schema.field(index);
            let name = format!("{}{}", self.prefix, field.name());
            if main.schema.column_with_name(&name).is_some() || added.iter().any(|f| *f.name() == name) {
                let at = self.columns.as_ref().and_then(|names| names.get(position));
                let hint = "choose with `columns: […]`, or tell them apart with `prefix: other_`".to_owned();
                let message = format!("two columns would be named `{name}`");
                cx.error_hint(at.map_or(self.with.position, |at| at.position), message, Some(hint));
            }
            added.push(field.clone().with_name(name).with_nullable(true));
        }
        added
    }
}

struct Join {
    main_on: Vec<usize>,
    side_on: Vec<usize>,
    /// Columns of the other pipeline to add.
    columns: Vec<usize>,
    /// Their schema there.
    side_schema: SchemaRef,
    /// What is emitted.
    schema: SchemaRef,
    converter: RowConverter,
    /// A row of nulls.
    nothing: Box<[u8]>,
    table: IndexMap<Box<[u8]>, Latest>,
    keys_max: usize,
    /// Index in the table of the key that goes next.
    oldest: usize,
}

/// The latest row of a key.
struct Latest {
    event_us: i64,
    /// The added columns in Arrow's row format, which is compact and quick to turn back. It may differ between
    /// versions of Arrow and never leaves the process.
    row: Box<[u8]>,
}

impl Join {
    fn new(
        [main_on, side_on]: [Vec<usize>; 2],
        columns: Vec<usize>,
        side_schema: &SchemaRef,
        schema: SchemaRef,
        keys_max: usize,
    ) -> Result<Self> {
        let side_schema = SchemaRef::new(side_schema.project(&columns)?);
        let types = side_schema.fields().iter().map(|field| SortField::new(field.data_type().clone()));
        let converter = RowConverter::new(types.collect())?;
        let nulls: Vec<ArrayRef> =
            side_schema.fields().iter().map(|field| arrow::array::new_null_array(field.data_type(), 1)).collect();
        let nothing = Box::from(converter.convert_columns(&nulls)?.row(0).data());
        let table = IndexMap::new();
        Ok(Self { main_on, side_on, columns, side_schema, schema, converter, nothing, table, keys_max, oldest: 0 })
    }

    /// Takes rows of the other pipeline into the table.
    fn update(&mut self, batch: &Batch) -> Result<()> {
        let columns: Vec<ArrayRef> =
            self.columns.iter().map(|&index| ArrayRef::clone(batch.rows().column(index))).collect();
        let rows = self.converter.convert_columns(&columns)?;
        let mut keys = Keys::new(batch.rows(), &self.side_on)?;
        for (row, &event_us) in batch.event_us().iter().enumerate() {
            if let Some(key) = keys.encode_whole(row) {
                self.put(key, Latest { event_us, row: Box::from(rows.row(row).data()) });
            }
        }
        Ok(())
    }

    fn put(&mut self, key: &[u8], latest: Latest) {
        if let Some(held) = self.table.get_mut(key) {
            if held.event_us <= latest.event_us {
                *held = latest;
            }
        } else if self.table.len() < self.keys_max {
            self.table.insert(Box::from(key), latest);
        } else if self.table.replace_index(self.oldest, Box::from(key)).is_ok() {
            self.table[self.oldest] = latest;
            self.oldest = (self.oldest + 1) % self.keys_max;
        }
    }

    /// The added columns for rows in Arrow's row format.
    fn columns_of<'a>(&self, rows: impl Iterator<Item = &'a [u8]>) -> Result<Vec<ArrayRef>> {
        let parser = self.converter.parser();
        Ok(self.converter.convert_rows(rows.map(|row| parser.parse(row)))?)
    }

    /// The whole table as rows in its order.
    fn table_rows(&self) -> Result<RecordBatch> {
        let columns = self.columns_of(self.table.values().map(|latest| &*latest.row))?;
        Ok(RecordBatch::try_new(SchemaRef::clone(&self.side_schema), columns)?)
    }
}

impl Operator for Join {
    fn process(&mut self, input: usize, batch: Batch, out: &mut Output) -> Result<()> {
        if input > 0 {
            return self.update(&batch);
        }
        let mut keys = Keys::new(batch.rows(), &self.main_on)?;
        let mut found: Vec<&[u8]> = Vec::with_capacity(batch.len());
        for row in 0..batch.len() {
            let latest = keys.encode_whole(row).and_then(|key| self.table.get(key));
            found.push(latest.map_or(&self.nothing, |latest| &latest.row));
        }
        let mut columns = batch.rows().columns().to_vec();
        columns.extend(self.columns_of(found.into_iter())?);
        out.push(batch.with_rows(RecordBatch::try_new(SchemaRef::clone(&self.schema), columns)?)?);
        Ok(())
    }

    fn is_stateful(&self) -> bool {
        true
    }

    fn snapshot(&self, state: &mut StateWriter) {
        state.u64(self.oldest as u64);
        state.u64(self.table.len() as u64);
        for (key, latest) in &self.table {
            state.bytes(key);
            state.i64(latest.event_us);
        }
        // The rows are our own: writing them cannot fail but for a mistake of ours, which the next start then
        // reports instead of going on without them.
        let written = self.table_rows().and_then(|rows| state.batches(&[rows]));
        state.str(&written.err().map(|error| error.to_string()).unwrap_or_default());
    }

    fn restore(&mut self, state: &mut StateReader<'_>) -> Result<()> {
        self.oldest = usize::try_from(state.u64()?).unwrap_or(0) % self.keys_max;
        let keys: Vec<(Box<[u8]>, i64)> =
            (0..state.count()?).map(|_| Ok((Box::from(state.bytes()?), state.i64()?))).collect::<Result<_>>()?;
        let batches = state.batches()?;
        let failure = state.str()?;
        if !failure.is_empty() {
            return Err(Error::internal(format!("the table of a join was not written: {failure}")));
        }
        let mut keys = keys.into_iter();
        for batch in batches {
            let rows = self.converter.convert_columns(batch.columns())?;
            for (row, (key, event_us)) in rows.iter().zip(keys.by_ref()) {
                self.table.insert(key, Latest { event_us, row: Box::from(row.data()) });
            }
        }
        match keys.next() {
            Some(_) => Err(Error::internal("damaged state: a join has more keys than rows")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{Int64Array, StringArray};
    use pipeline::batch::{Stage, Times};
    use pipeline::expression::Expression;
    use pipeline::schema::{FieldType, schema_of};

    use super::*;
    use crate::testing::{Case, Columns, row, side};

    const MAIN: Columns<'static> = &[("id", FieldType::String), ("part", FieldType::Int), ("n", FieldType::Int)];
    const SIDE: Columns<'static> = &[
        ("id", FieldType::String),
        ("part", FieldType::Int),
        ("site", FieldType::String),
        ("since", FieldType::Timestamp(None)),
        ("more", FieldType::Json),
        ("cost", FieldType::Decimal(10, 2)),
        ("n", FieldType::Int),
    ];

    fn case(step: &str) -> Case<'_> {
        Case { step, inputs: &[MAIN, SIDE], keys: &["id"], windowed: false, lateness_s: 0.0 }
    }

    #[test]
    fn rows_take_the_latest_row_of_their_key_by_event_time_or_nulls() {
        let rows = [
            row(1.0, r#"{"id": "a", "n": 1}"#),
            side(1.0, r#"{"id": "a", "site": "north", "cost": "1.50", "more": {"x": 1}, "n": 7}"#),
            side(1.0, r#"{"site": "nowhere"}"#),
            row(2.0, r#"{"id": "a", "n": 2}"#),
            row(3.0, r#"{"id": "b", "n": 3}"#),
            row(4.0, r#"{"n": 4}"#),
            side(0.5, r#"{"id": "a", "site": "older"}"#),
            side(5.0, r#"{"id": "b", "site": "west", "since": "1970-01-01T00:00:05Z"}"#),
            side(6.0, r#"{"id": "a", "site": "south"}"#),
            side(6.0, r#"{"id": "a", "site": "east"}"#),
            row(5.0, r#"{"id": "b", "n": 5}"#),
            row(6.0, r#"{"id": "a", "n": 6}"#),
        ];
        case("join: {with: p, on: [id], columns: [site]}").gives(
            &rows,
            &[
                r#"1 {"id":"a","part":null,"n":1,"site":null}"#,
                r#"2 {"id":"a","part":null,"n":2,"site":"north"}"#,
                r#"3 {"id":"b","part":null,"n":3,"site":null}"#,
                r#"4 {"id":null,"part":null,"n":4,"site":null}"#,
                r#"5 {"id":"b","part":null,"n":5,"site":"west"}"#,
                r#"6 {"id":"a","part":null,"n":6,"site":"east"}"#,
            ],
        );
        let short = [rows[1], rows[3], rows[7], rows[10]];
        case("join: {with: p, on: [id], prefix: p_}").gives(
            &short,
            &[
                concat!(
                    r#"2 {"id":"a","part":null,"n":2,"p_part":null,"p_site":"north","p_since":null,"#,
                    r#""p_more":{"x": 1},"p_cost":"1.50","p_n":7}"#
                ),
                concat!(
                    r#"5 {"id":"b","part":null,"n":5,"p_part":null,"p_site":"west","#,
                    r#""p_since":"1970-01-01T00:00:05.000Z","p_more":null,"p_cost":null,"p_n":null}"#
                ),
            ],
        );
    }

    #[test]
    fn all_columns_of_on_must_be_equal() {
        let rows = [
            side(1.0, r#"{"id": "a", "part": 1, "site": "one"}"#),
            side(1.0, r#"{"id": "a", "part": 2, "site": "two"}"#),
            row(1.0, r#"{"id": "a", "part": 2}"#),
            row(1.0, r#"{"id": "a"}"#),
        ];
        case("join: {with: p, on: [id, part], columns: [site]}").gives(
            &rows,
            &[r#"1 {"id":"a","part":2,"n":null,"site":"two"}"#, r#"1 {"id":"a","part":null,"n":null,"site":null}"#],
        );
    }

    #[test]
    fn nested_columns_survive_the_table_and_a_restart() {
        let plain = schema_of([("k", FieldType::Int), ("name", FieldType::String)]);
        let text = "named_struct('name', name, 'list', [k, k + 1], 'deep', named_struct('k', k))";
        let nested = Expression::compile(text, &plain).expect("an expression");
        let keys: ArrayRef = Arc::new(Int64Array::from(vec![1, 2]));
        let names: ArrayRef = Arc::new(StringArray::from(vec![Some("one"), None]));
        let rows = RecordBatch::try_new(plain, vec![ArrayRef::clone(&keys), names]).expect("rows");
        let batch = |rows| Batch::new(rows, Times::constant(1, 1, i64::MIN, 2), Stage::Final).expect("a batch");
        let values = nested.evaluate(&batch(rows)).expect("structs");

        let side = SchemaRef::new(Schema::new(vec![FieldType::Int.field("k"), nested.field("v")]));
        let join = || Join::new([vec![0], vec![0]], vec![1], &side, SchemaRef::clone(&side), 3).expect("a join");
        let rows = RecordBatch::try_new(SchemaRef::clone(&side), vec![keys, values]).expect("rows");
        let mut first = join();
        first.process(1, batch(rows), &mut Output::default()).expect("side rows");
        let mut state = StateWriter::default();
        first.snapshot(&mut state);
        let mut second = join();
        second.restore(&mut StateReader::new(&state.finish())).expect("restore");

        let main: ArrayRef = Arc::new(Int64Array::from(vec![3, 1]));
        let main = RecordBatch::try_new(schema_of([("k", FieldType::Int)]), vec![main]).expect("rows");
        let mut out = Output::default();
        second.process(0, batch(main), &mut out).expect("main rows");
        let lines: Vec<String> = out.take()[0].json().iter().map(str::to_owned).collect();
        assert_eq!(lines, [r#"{"k":3,"v":null}"#, r#"{"k":1,"v":{"name":"one","list":[1,2],"deep":{"k":1}}}"#]);
    }

    #[test]
    fn the_table_is_bounded_and_the_first_key_goes_first() {
        let side = schema_of([("k", FieldType::Int), ("v", FieldType::Int)]);
        let mut join = Join::new([vec![0], vec![0]], vec![1], &side, SchemaRef::clone(&side), 3).expect("a join");
        let nothing = join.nothing.clone();
        let mut put = |key: u8, event_us| join.put(&[key], Latest { event_us, row: nothing.clone() });
        (1..=5).for_each(|key| put(key, 1));
        put(3, 2);
        put(6, 1);
        let mut keys: Vec<u8> = join.table.keys().map(|key| key[0]).collect();
        keys.sort_unstable();
        assert_eq!(keys, [4, 5, 6]);
    }

    #[test]
    fn wrong_options_are_reported_at_their_place() {
        const NUMBERS: Columns<'static> = &[("id", FieldType::Int), ("site", FieldType::String)];
        for (step, side, expected) in [
            ("join: {with: p, on: [], columns: [site]}", SIDE, "`on` needs at least one column"),
            ("join: {with: p, on: [ix], columns: [site]}", SIDE, "1:22: error: step: no column `ix` here"),
            ("join: {with: p, on: [ix], columns: [site]}", SIDE, "no column `ix` in pipeline `p`"),
            ("join: {with: p, on: [id], columns: [sit]}", SIDE, "in pipeline `p`\n  hint: did you mean `site`?"),
            ("join: {with: p, on: [id]}", SIDE, "1:14: error: step: two columns would be named `part`"),
            (
                "join: {with: p, on: [id], columns: [site, n]}",
                SIDE,
                "1:43: error: step: two columns would be named `n`",
            ),
            ("join: {with: p, on: [id], columns: [site, site]}", SIDE, "would be named `site`"),
            ("join: {with: p, on: [id], columns: []}", SIDE, "no column of `p` would be added"),
            ("join: {with: p, on: [id]}", NUMBERS, "`id` is string here and int in `p`"),
        ] {
            let problems = Case { inputs: &[MAIN, side], ..case(step) }.problems();
            assert!(problems.contains(expected), "{step}: {problems}");
        }
    }
}
