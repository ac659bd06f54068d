//! What one entry of `write` does with the rows of a delivery.

use std::borrow::Cow;

use arrow::array::{AsArray, RecordBatch};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Float64Type, Int64Type};
use indexmap::IndexMap;
use pipeline::config::{At, Duration, Position, did_you_mean};
use pipeline::error::{Error, Result};
use pipeline::json::{ColumnText, JsonRows, encode_rows};
use pipeline::plugin::sink::SinkInput;
use pipeline::schema::type_word;

use super::{Side, Write};
use wire::redis::Command;

/// What is wrong with an operation, and where.
#[derive(Debug)]
pub(super) struct OperationProblem {
    pub(super) position: Position,
    pub(super) message: String,
    pub(super) hint: Option<String>,
}

impl OperationProblem {
    fn new(position: Position, message: impl Into<String>) -> Self {
        Self { position, message: message.into(), hint: None }
    }

    fn hint(mut self, hint: Option<String>) -> Self {
        self.hint = hint;
        self
    }
}

/// An operation checked against the columns of one pipeline.
#[derive(Clone, Debug)]
pub(super) struct Operation {
    key: Template,
    action: Action,
}

#[derive(Clone, Debug)]
enum Action {
    Set { value: Content, expire: Option<Duration> },
    Increment { by: By, expire: Option<Duration> },
    Push { value: Content, side: Side, keep: Option<u64> },
    Add { keep: Option<u64> },
    Publish { value: Content },
}

/// What is written of a row.
#[derive(Clone, Copy, Debug)]
enum Content {
    Row,
    Column(usize),
}

/// What a counter is incremented by.
#[derive(Clone, Copy, Debug)]
enum By {
    /// The number of rows.
    Rows,
    /// The same for each delivery.
    Fixed(i64),
    /// The sum of a column of whole numbers.
    IntColumn(usize),
    /// The sum of a column of numbers with a fraction.
    FloatColumn(usize),
}

impl Operation {
    /// Checks an entry of `write` against the columns of `input`.
    pub(super) fn plan(write: &At<Write>, input: &SinkInput) -> Result<Self, Vec<OperationProblem>> {
        let mut problems = Vec::new();
        let named = [
            ("set", &write.set),
            ("increment", &write.increment),
            ("push", &write.push),
            ("add", &write.add),
            ("publish", &write.publish),
        ];
        let given: Vec<_> = named.iter().filter_map(|(name, key)| key.as_ref().map(|key| (*name, key))).collect();
        let (name, key) = match given.as_slice() {
            [one] => *one,
            [] => {
                let message = "says no operation: one of `set`, `increment`, `push`, `add`, `publish`";
                return Err(vec![OperationProblem::new(write.position, message)]);
            }
            _ => return Err(vec![OperationProblem::new(write.position, "write one operation each, in a list")]),
        };
        misplaced(write, name, &mut problems);
        let template = Template::parse(key, input).map_err(|problem| problems.push(problem)).ok();
        let action = Action::plan(name, write, input).map_err(|problem| problems.push(problem)).ok();
        match (template, action) {
            (Some(key), Some(action)) if problems.is_empty() => Ok(Self { key, action }),
            _ => Err(problems),
        }
    }
}

/// Reports options that belong to other operations.
fn misplaced(write: &Write, operation: &str, problems: &mut Vec<OperationProblem>) {
    let options = [
        ("value", write.value.as_ref().map(|o| o.position), &["set", "push", "publish"][..]),
        ("by", write.by.as_ref().map(|o| o.position), &["increment"]),
        ("expire", write.expire.as_ref().map(|o| o.position), &["set", "increment"]),
        ("keep", write.keep.as_ref().map(|o| o.position), &["push", "add"]),
        ("side", write.side.as_ref().map(|o| o.position), &["push"]),
    ];
    for (name, position, operations) in options {
        if let Some(position) = position.filter(|_| !operations.contains(&operation)) {
            problems.push(OperationProblem::new(position, format!("`{name}` does not go with `{operation}`")));
        }
    }
    if let Some(keep) = write.keep.as_ref().filter(|keep| keep.value == 0) {
        problems.push(OperationProblem::new(keep.position, "`keep` is at least 1"));
    }
    if let Some(expire) = write.expire.as_ref().filter(|expire| expire.as_millis() == 0) {
        problems.push(OperationProblem::new(expire.position, "`expire` is at least 1ms"));
    }
}

impl Action {
    fn plan(name: &str, write: &Write, input: &SinkInput) -> Result<Self, OperationProblem> {
        let expire = write.expire.as_ref().map(|expire| expire.value);
        let keep = write.keep.as_ref().map(|keep| keep.value);
        let value = || match &write.value {
            Some(column) => column_of(column, &[], input).map(Content::Column),
            None => Ok(Content::Row),
        };
        Ok(match name {
            "set" => Self::Set { value: value()?, expire },
            "increment" => Self::Increment { by: By::plan(write.by.as_ref(), input)?, expire },
            "push" => {
                Self::Push { value: value()?, side: write.side.as_ref().map(|s| s.value).unwrap_or_default(), keep }
            }
            "add" => Self::Add { keep },
            _ => Self::Publish { value: value()? },
        })
    }
}

impl By {
    fn plan(by: Option<&At<String>>, input: &SinkInput) -> Result<Self, OperationProblem> {
        let Some(by) = by else { return Ok(Self::Rows) };
        match by.as_str() {
            "rows" => return Ok(Self::Rows),
            "batch" => return Ok(Self::Fixed(1)),
            text => {
                if let Ok(number) = text.parse() {
                    return Ok(Self::Fixed(number));
                }
            }
        }
        let column = column_of(by, &["rows", "batch"], input)?;
        let field = input.shape.schema.field(column);
        match field.data_type() {
            integer if integer.is_integer() => Ok(Self::IntColumn(column)),
            number if number.is_numeric() => Ok(Self::FloatColumn(column)),
            _ => {
                let message = format!("`{}` is {}, no number", by.value, type_word(field));
                Err(OperationProblem::new(by.position, message))
            }
        }
    }
}

/// The index of a column. `words` may stand in its place, for the hint.
fn column_of(name: &At<String>, words: &[&str], input: &SinkInput) -> Result<usize, OperationProblem> {
    let schema = &input.shape.schema;
    schema.index_of(name).map_err(|_| {
        let columns = schema.fields().iter().map(|field| field.name().as_str());
        let message = format!("`{}` has no column `{}`", input.metric, name.value);
        OperationProblem::new(name.position, message).hint(did_you_mean(name, columns.chain(words.iter().copied())))
    })
}

/// A name with columns in it.
#[derive(Clone, Debug)]
struct Template(Vec<Part>);

#[derive(Clone, Debug, PartialEq)]
enum Part {
    Text(String),
    Column(usize),
}

impl Template {
    fn parse(text: &At<String>, input: &SinkInput) -> Result<Self, OperationProblem> {
        let problem = |offset, message: &str| OperationProblem::new(text.place_of(Some(offset)), message);
        let characters: Vec<char> = text.chars().collect();
        let (mut parts, mut plain, mut at) = (Vec::new(), String::new(), 0);
        while let Some(&character) = characters.get(at) {
            let doubled = characters.get(at + 1) == Some(&character);
            match character {
                '{' | '}' if doubled => {
                    plain.push(character);
                    at += 1;
                }
                '{' => {
                    let length = characters[at..].iter().position(|c| *c == '}');
                    let end =
                        at + length.ok_or_else(|| problem(at, "this `{` is not closed; for a brace write `{{`"))?;
                    let name: String = characters[at + 1..end].iter().collect();
                    if name == "metric" {
                        plain.push_str(&input.metric);
                    } else {
                        let place = text.place_of(Some(at + 1));
                        let name = At { position: place, verbatim: text.verbatim, value: name };
                        let column = column_of(&name, &["metric"], input)?;
                        parts.push(Part::Text(std::mem::take(&mut plain)));
                        parts.push(Part::Column(column));
                    }
                    at = end;
                }
                '}' => return Err(problem(at, "a `}` without `{`; for a brace write `}}`")),
                plain_character => plain.push(plain_character),
            }
            at += 1;
        }
        parts.push(Part::Text(plain));
        parts.retain(|part| *part != Part::Text(String::new()));
        if parts.is_empty() {
            return Err(problem(0, "a name is missing"));
        }
        Ok(Self(parts))
    }

    /// The name for one row.
    fn render(&self, rows: &mut Rows<'_>, row: usize) -> String {
        let parts = self.0.iter().map(|part| match part {
            Part::Text(text) => Cow::Borrowed(text.as_str()),
            Part::Column(column) => Cow::Owned(rows.text(*column, row).unwrap_or("null").to_owned()),
        });
        parts.collect()
    }

    /// Rows by their name, both in order of appearance.
    fn group(&self, rows: &mut Rows<'_>) -> IndexMap<String, Vec<usize>> {
        let mut groups: IndexMap<String, Vec<usize>> = IndexMap::new();
        for row in 0..rows.batch.num_rows() {
            groups.entry(self.render(rows, row)).or_default().push(row);
        }
        groups
    }
}

/// The rows of a delivery with their texts, made when first asked for.
pub(super) struct Rows<'a> {
    batch: &'a RecordBatch,
    json: Option<JsonRows>,
    texts: Vec<Option<ColumnText>>,
}

impl<'a> Rows<'a> {
    pub(super) fn new(batch: &'a RecordBatch) -> Self {
        Self { batch, json: None, texts: batch.columns().iter().map(|_| None).collect() }
    }

    /// A row as a JSON object.
    fn json(&mut self, row: usize) -> &str {
        self.json.get_or_insert_with(|| encode_rows(self.batch)).row(row)
    }

    /// A cell: text as it is, other types as in JSON; `None` if it is null.
    fn text(&mut self, column: usize, row: usize) -> Option<&str> {
        let write = || ColumnText::new(self.batch.schema_ref().field(column), self.batch.column(column));
        self.texts[column].get_or_insert_with(write).get(row)
    }

    fn content(&mut self, content: Content, row: usize) -> Option<String> {
        match content {
            Content::Row => Some(self.json(row).to_owned()),
            Content::Column(column) => self.text(column, row).map(str::to_owned),
        }
    }
}

impl Operation {
    /// Appends the commands for one delivery.
    pub(super) fn commands(&self, rows: &mut Rows<'_>, commands: &mut Vec<Command>) -> Result<()> {
        match &self.action {
            Action::Set { value, expire } => self.set(*value, *expire, rows, commands),
            Action::Increment { by, expire } => self.increment(*by, *expire, rows, commands)?,
            Action::Push { value, side, keep } => self.push(*value, *side, *keep, rows, commands),
            Action::Add { keep } => self.add(*keep, rows, commands),
            Action::Publish { value } => {
                for row in 0..rows.batch.num_rows() {
                    let message = rows.content(*value, row).unwrap_or_else(|| "null".to_owned());
                    commands.push(Command::new("PUBLISH").args([self.key.render(rows, row), message]));
                }
            }
        }
        Ok(())
    }

    fn set(&self, value: Content, expire: Option<Duration>, rows: &mut Rows<'_>, commands: &mut Vec<Command>) {
        for (key, members) in self.key.group(rows) {
            let text = members.last().and_then(|&last| rows.content(value, last));
            let Some(text) = text else {
                commands.push(Command::new("DEL").arg(key));
                continue;
            };
            let set = Command::new("SET").args([key, text]);
            commands.push(match expire {
                Some(expire) => set.args(["PX".to_owned(), expire.as_millis().to_string()]),
                None => set,
            });
        }
    }

    fn increment(
        &self,
        by: By,
        expire: Option<Duration>,
        rows: &mut Rows<'_>,
        commands: &mut Vec<Command>,
    ) -> Result<()> {
        let amounts = by.amounts(rows.batch)?;
        for (key, members) in self.key.group(rows) {
            let (name, amount) = match &amounts {
                Amounts::Count => ("INCRBY", members.len().to_string()),
                Amounts::Fixed(number) => ("INCRBY", number.to_string()),
                Amounts::Ints(values) => {
                    let sum = members.iter().try_fold(0i64, |sum, &row| sum.checked_add(values[row]));
                    let overflow = || Error::outside(format!("`{key}`: the sum of the rows overflows")).fatal();
                    ("INCRBY", sum.ok_or_else(overflow)?.to_string())
                }
                Amounts::Floats(values) => {
                    let sum: f64 = members.iter().map(|&row| values[row]).sum();
                    ("INCRBYFLOAT", sum.to_string())
                }
            };
            commands.push(Command::new(name).args([key.clone(), amount]));
            if let Some(expire) = expire {
                commands.push(Command::new("PEXPIRE").args([key, expire.as_millis().to_string()]));
            }
        }
        Ok(())
    }

    fn push(&self, value: Content, side: Side, keep: Option<u64>, rows: &mut Rows<'_>, commands: &mut Vec<Command>) {
        for (key, members) in self.key.group(rows) {
            let elements = members.iter().map(|&row| rows.content(value, row).unwrap_or_else(|| "null".to_owned()));
            let name = if side == Side::Left { "LPUSH" } else { "RPUSH" };
            commands.push(Command::new(name).arg(key.clone()).args(elements));
            if let Some(keep) = keep {
                let (from, to) = match side {
                    Side::Left => ("0".to_owned(), (keep - 1).to_string()),
                    Side::Right => (format!("-{keep}"), "-1".to_owned()),
                };
                commands.push(Command::new("LTRIM").args([key, from, to]));
            }
        }
    }

    fn add(&self, keep: Option<u64>, rows: &mut Rows<'_>, commands: &mut Vec<Command>) {
        let schema = rows.batch.schema();
        for row in 0..rows.batch.num_rows() {
            let mut command = Command::new("XADD").arg(self.key.render(rows, row));
            if let Some(keep) = keep {
                command = command.args(["MAXLEN".to_owned(), "~".to_owned(), keep.to_string()]);
            }
            command = command.arg("*");
            let mut is_empty = true;
            for (index, field) in schema.fields().iter().enumerate() {
                if let Some(text) = rows.text(index, row) {
                    command = command.args([field.name().clone(), text.to_owned()]);
                    is_empty = false;
                }
            }
            if is_empty {
                // An entry must have a field, and a row must not vanish.
                command = command.args(["payload".to_owned(), rows.json(row).to_owned()]);
            }
            commands.push(command);
        }
    }
}

/// What each row adds to its counter.
enum Amounts {
    Count,
    Fixed(i64),
    Ints(Vec<i64>),
    Floats(Vec<f64>),
}

impl By {
    /// Null, NaN and infinity count as zero.
    fn amounts(self, batch: &RecordBatch) -> Result<Amounts> {
        Ok(match self {
            Self::Rows => Amounts::Count,
            Self::Fixed(number) => Amounts::Fixed(number),
            Self::IntColumn(column) => {
                let values = cast(batch.column(column), &DataType::Int64)?;
                Amounts::Ints(values.as_primitive::<Int64Type>().iter().map(Option::unwrap_or_default).collect())
            }
            Self::FloatColumn(column) => {
                let values = cast(batch.column(column), &DataType::Float64)?;
                let values = values.as_primitive::<Float64Type>().iter();
                Amounts::Floats(values.map(|value| value.filter(|v| v.is_finite()).unwrap_or_default()).collect())
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use pipeline::config::Fields;
    use pipeline::plugin::operator::StreamShape;
    use pipeline::rows::RowsBuilder;
    use pipeline::schema::FieldType;

    use super::*;

    fn at(text: &str) -> Option<At<String>> {
        Some(At::nowhere(text.to_owned()))
    }

    /// The commands of an operation over three rows.
    fn commands(write: Write) -> Vec<Command> {
        let fields = Fields::of([
            ("device", FieldType::String),
            ("n", FieldType::Int),
            ("x", FieldType::Float),
            ("ts", FieldType::Timestamp(None)),
        ]);
        let mut builder = RowsBuilder::new(&[], &fields);
        for row in [
            r#"{"device":"a","n":1,"x":0.5,"ts":"2026-11-20T12:00:00Z"}"#,
            r#"{"device":"b","n":2}"#,
            r#"{"device":"a","n":4,"x":0.25}"#,
        ] {
            builder.push_json(row.as_bytes()).expect("row");
        }
        let batch = builder.finish().expect("rows");
        let shape = StreamShape { schema: batch.schema(), keys: Vec::new(), windowed: false };
        let input = SinkInput { metric: "load".to_owned(), shape };
        let operation = Operation::plan(&At::nowhere(write), &input).expect("a plan");
        let mut commands = Vec::new();
        operation.commands(&mut Rows::new(&batch), &mut commands).expect("commands");
        commands
    }

    fn words(lines: &[&[&'static str]]) -> Vec<Command> {
        lines.iter().map(|line| Command::new(line[0]).args(line[1..].iter().copied())).collect()
    }

    #[test]
    fn rows_become_the_documented_commands() {
        let keep = Some(At::nowhere(10));
        let expire = Some(At::nowhere(Duration::from_secs(60)));
        let right = Some(At::nowhere(Side::Right));
        let cases: [(Write, &[&[&str]]); 10] = [
            (
                Write { set: at("x:{device}"), value: at("x"), expire: expire.clone(), ..Write::default() },
                &[&["SET", "x:a", "0.25", "PX", "60000"], &["DEL", "x:b"]],
            ),
            (Write { set: at("{metric}:ts"), value: at("ts"), ..Write::default() }, &[&["DEL", "load:ts"]]),
            (Write { increment: at("total"), ..Write::default() }, &[&["INCRBY", "total", "3"]]),
            (
                Write { increment: at("n:{device}"), by: at("n"), expire, ..Write::default() },
                &[
                    &["INCRBY", "n:a", "5"],
                    &["PEXPIRE", "n:a", "60000"],
                    &["INCRBY", "n:b", "2"],
                    &["PEXPIRE", "n:b", "60000"],
                ],
            ),
            (Write { increment: at("x"), by: at("x"), ..Write::default() }, &[&["INCRBYFLOAT", "x", "0.75"]]),
            (Write { increment: at("batches"), by: at("batch"), ..Write::default() }, &[&["INCRBY", "batches", "1"]]),
            (Write { increment: at("down"), by: at("-7"), ..Write::default() }, &[&["INCRBY", "down", "-7"]]),
            (
                Write { push: at("q:{device}"), value: at("n"), keep: keep.clone(), ..Write::default() },
                &[
                    &["LPUSH", "q:a", "1", "4"],
                    &["LTRIM", "q:a", "0", "9"],
                    &["LPUSH", "q:b", "2"],
                    &["LTRIM", "q:b", "0", "9"],
                ],
            ),
            (
                Write { push: at("{{q}}"), value: at("x"), keep: keep.clone(), side: right, ..Write::default() },
                &[&["RPUSH", "{q}", "0.5", "null", "0.25"], &["LTRIM", "{q}", "-10", "-1"]],
            ),
            (
                Write { add: at("s"), keep, ..Write::default() },
                &[
                    &[
                        "XADD",
                        "s",
                        "MAXLEN",
                        "~",
                        "10",
                        "*",
                        "device",
                        "a",
                        "n",
                        "1",
                        "x",
                        "0.5",
                        "ts",
                        "2026-11-20T12:00:00.000Z",
                    ],
                    &["XADD", "s", "MAXLEN", "~", "10", "*", "device", "b", "n", "2"],
                    &["XADD", "s", "MAXLEN", "~", "10", "*", "device", "a", "n", "4", "x", "0.25"],
                ],
            ),
        ];
        for (write, expected) in cases {
            let shown = format!("{write:?}");
            let expected: Vec<Command> = expected
                .iter()
                .map(|line| Command::new(line[0]).args(line[1..].iter().map(|w| (*w).to_owned())))
                .collect();
            assert_eq!(commands(write), expected, "{shown}");
        }
        let published = commands(Write { publish: at("c"), ..Write::default() });
        let first = r#"{"device":"a","n":1,"x":0.5,"ts":"2026-11-20T12:00:00.000Z"}"#;
        assert_eq!(published[..1], words(&[&["PUBLISH", "c", first]])[..]);
        assert_eq!(published.len(), 3);
    }
}
