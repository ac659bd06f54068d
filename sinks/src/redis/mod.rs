//! The `redis` sink: keys, counters, lists, streams and published messages.

use async_trait::async_trait;
use pipeline::config::{At, CheckContext, Duration, SecretUrl};
use pipeline::error::{Error, Result};
use pipeline::plugin::sink::{
    BatchLimits, BatchOptions, OutboxSink, Promise, Sink, SinkConfig, SinkContext, SinkInput, SinkShape,
};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};

mod operation;

use arrow::array::RecordBatch;
use operation::{Operation, Rows};
use wire::redis::{Command, Connection, Endpoint, PATIENCE, Reply};

const PAGE: &str = "\
Writes rows to a Redis server: sets keys, increments counters, pushes to lists, adds to streams, publishes.

## Writes

`write` is one of these, or a list of them:

| | what happens |
| --- | --- |
| `{set: KEY, value: COLUMN, expire: 1m}` | `SET` for each key, the last row wins; without `value` the whole row as JSON. A null value deletes the key |
| `{increment: KEY, by: rows}` | `INCRBY` once per key and delivery, by the number of rows (`rows`, the default), by a number such as `1`, by one per delivery (`batch`), or by the sum of a column (`INCRBYFLOAT` for floats; null counts as 0) |
| `{push: LIST, side: left, keep: 1000}` | `LPUSH` (or `RPUSH` with `side: right`) of each row as JSON, or of `value`; `keep` trims to the newest |
| `{add: STREAM, keep: 100000}` | `XADD` of each row, one field per column that is not null; `keep` trims to about that many |
| `{publish: CHANNEL}` | `PUBLISH` of each row as JSON, or of `value` |

Names are templates: `{column}` is the row's value (`null` if it has none), `{metric}` the name of the pipeline; `{{` and `}}`
are braces. `value` writes text as it is, other types as in JSON. `expire` is renewed by every write.

## Delivery

A delivery (`batch`) is one transaction, `MULTI` to `EXEC`: all of it happens or nothing. When the answer is lost with the
connection, the delivery is repeated, so counters may count it twice. With `exactly_once: true` the key
`tailwater:SINK:METRIC` keeps the number of the last row, written in the same transaction, and rows that are delivered again are
skipped, after a crash too. The key is watched (`WATCH`): a delivery of a lost connection that reaches the server late does
nothing. For all that, rows wait for the checkpoint that has them (`checkpoint: {every: 1s}`).

## Limits

One server; no Cluster, no Sentinel. Redis itself loses the last writes in a crash unless it
runs with `appendonly yes`.

## Fails when

The server is away or refuses the password: rows wait in the outbox. A command that the server refuses because a key holds
another type (`WRONGTYPE`, `not an integer`) fails the delivery for good; the other commands of the delivery are done, and
the rows are counted as failed.
";

/// Of the option `batch`.
const BATCH_DEFAULT: BatchLimits = BatchLimits { rows: 100, every: std::time::Duration::from_millis(100) };

/// Writes rows to a Redis server.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RedisConfig {
    /// The server: `redis://user:password@host:6379/0`; `rediss://` for TLS. Without a port 6379, without a path database 0.
    pub url: At<SecretUrl>,
    /// PEM file with the certificates to trust instead of the system's, for TLS with an own authority.
    #[serde(default)]
    pub ca: Option<At<String>>,
    /// What to write: one operation such as `{push: pending}`, or a list of them, done in this order.
    pub write: Writes,
    /// When waiting rows become a delivery. Default `{rows: 100, every: 100ms}`: one round trip, a transaction too short to
    /// hold others up, and a wait that nobody notices.
    #[serde(default)]
    pub batch: BatchOptions,
    /// Whether to remember deliveries in the server, so that a repeated one is skipped. Default false: it costs a key, which
    /// must be deleted together with the state folder.
    #[serde(default)]
    pub exactly_once: bool,
}

/// One operation: exactly one of `set`, `increment`, `push`, `add`, `publish`, with its options.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Write {
    /// The key to set, such as `rps:{device_id}`.
    #[serde(default)]
    pub set: Option<At<String>>,
    /// The counter to increment.
    #[serde(default)]
    pub increment: Option<At<String>>,
    /// The list to push to.
    #[serde(default)]
    pub push: Option<At<String>>,
    /// The stream to add to.
    #[serde(default)]
    pub add: Option<At<String>>,
    /// The channel to publish to.
    #[serde(default)]
    pub publish: Option<At<String>>,
    /// Set, push, publish: the column to write. Default: the whole row as JSON.
    #[serde(default)]
    pub value: Option<At<String>>,
    /// Increment: `rows` (default: the number of rows), `batch` (one per delivery), a number, or a column to sum up.
    #[serde(default)]
    #[schemars(schema_with = "by_schema")]
    pub by: Option<At<String>>,
    /// Set, increment: time after the last write at which the key goes away. Default: never.
    #[serde(default)]
    pub expire: Option<At<Duration>>,
    /// Push, add: how many elements to keep, the newest. Default: all.
    #[serde(default)]
    pub keep: Option<At<u64>>,
    /// Push: `left` (default, as `LPUSH`) or `right`.
    #[serde(default)]
    pub side: Option<At<Side>>,
}

fn by_schema(_: &mut SchemaGenerator) -> Schema {
    json_schema!({"type": ["string", "integer", "null"]})
}

/// The end of a list that is pushed to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// `LPUSH`
    #[default]
    Left,
    /// `RPUSH`
    Right,
}

/// One operation or a list of them.
#[derive(Clone, Debug, Default)]
pub struct Writes(pub Vec<At<Write>>);

impl<'de> Deserialize<'de> for Writes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WritesVisitor;
        impl<'de> Visitor<'de> for WritesVisitor {
            type Value = Writes;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an operation such as `{push: LIST}`, or a list of them")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Writes, A::Error> {
                let write = Write::deserialize(de::value::MapAccessDeserializer::new(map))?;
                Ok(Writes(vec![At::nowhere(write)]))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Writes, A::Error> {
                let mut writes = Vec::new();
                while let Some(write) = items.next_element()? {
                    writes.push(write);
                }
                Ok(Writes(writes))
            }
        }
        deserializer.deserialize_any(WritesVisitor)
    }
}

impl JsonSchema for Writes {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Writes".into()
    }
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let write = generator.subschema_for::<Write>();
        json_schema!({"anyOf": [write, {"type": "array", "items": write, "minItems": 1}]})
    }
}

impl SinkConfig for RedisConfig {
    const TYPE: &'static str = "redis";
    const PAGE: &'static str = PAGE;
    const EXAMPLE: &'static str = "\
type: redis
url: redis://127.0.0.1:6379
write:
  - {push: pending_messages}
  - {increment: total_messages, by: rows}
  - {increment: total_batches, by: batch}
  - {set: \"latency:{device_id}\", value: latency_ms, expire: 1m}
batch: {rows: 50, every: 2s}
";
    const PROMISES: &'static [(&'static str, Promise)] =
        &[("", Promise::AtLeastOnce), ("`exactly_once: true`", Promise::ExactlyOnce)];
    const INSTEAD: Option<&'static str> = Some("`exactly_once: true`");

    fn check(&self, inputs: &[SinkInput], cx: &mut CheckContext<'_>) -> Option<SinkShape> {
        let errors_before = cx.errors();
        Endpoint::check(&self.url, self.ca.as_ref(), cx);
        if self.write.0.is_empty() {
            let hint = Some("such as `write: {push: LIST}`".to_owned());
            cx.error_hint(cx.position(), "`write` is empty", hint);
        }
        self.batch.check(cx);
        for write in &self.write.0 {
            for input in inputs {
                if let Err(problems) = Operation::plan(write, input) {
                    for problem in problems {
                        cx.error_hint(problem.position, problem.message, problem.hint);
                    }
                }
                let counts_rows = write.by.as_ref().filter(|by| by.value == "rows");
                if let (Some(by), true) = (counts_rows, input.shape.schema.column_with_name("rows").is_some()) {
                    cx.note(by.position, "`by: rows` is the number of rows of a delivery, not the column `rows`");
                }
            }
        }
        let takes_revised = self.write.0.iter().all(|write| write.set.is_some());
        let promise = if self.exactly_once { Promise::ExactlyOnce } else { Promise::AtLeastOnce };
        let shape = SinkShape { takes_revised, promise, ..SinkShape::default() };
        (cx.errors() == errors_before).then_some(shape)
    }

    fn build(&self, cx: SinkContext) -> Result<Sink> {
        let plan = |input: &SinkInput| {
            let operations = self.write.0.iter().map(|write| Operation::plan(write, input));
            let operations: Result<Vec<_>, _> = operations.collect();
            let operations = operations.map_err(|problems| {
                Error::user(problems.first().map_or_else(String::new, |problem| problem.message.clone()))
            })?;
            let ids_key = format!("tailwater:{}:{}", cx.name, input.metric);
            Ok(Input { operations, done: self.exactly_once.then(|| Done { key: ids_key, ..Done::default() }) })
        };
        let sink = RedisSink {
            endpoint: Endpoint::new(&self.url, self.ca.as_ref().map(|ca| cx.folder.join(&ca.value))),
            connection: None,
            inputs: cx.inputs.iter().map(plan).collect::<Result<_>>()?,
        };
        Ok(Sink::Outbox(Box::new(sink), self.batch.limits(BATCH_DEFAULT)))
    }
}

struct RedisSink {
    endpoint: Endpoint,
    connection: Option<Connection>,
    inputs: Vec<Input>,
}

/// One pipeline that writes here.
struct Input {
    operations: Vec<Operation>,
    /// With `exactly_once`.
    done: Option<Done>,
}

/// The number of the last row that the server has.
#[derive(Default)]
struct Done {
    key: String,
    last: u64,
}

impl RedisSink {
    /// Watches the numbers of all inputs, then reads them. What another connection writes from then on makes the next
    /// `EXEC` of this one do nothing. That other connection may be an earlier one of our own: after a broken path the
    /// system goes on sending what it was given, and a transaction may arrive when this connection is long in use. It
    /// watched the same keys, so the first of the two is done and the other is not.
    fn watch(&self) -> Vec<Command> {
        let keys: Vec<&String> = self.dones().map(|done| &done.key).collect();
        if keys.is_empty() {
            return Vec::new();
        }
        let watch = Command::new("WATCH").args(keys.iter().map(|key| (*key).clone()));
        std::iter::once(watch).chain(keys.iter().map(|key| Command::new("GET").arg((*key).clone()))).collect()
    }

    /// The numbers by the replies to [`Self::watch`], in the order of the inputs.
    fn numbers(&self, connection: &Connection, replies: &[Reply]) -> Result<Vec<u64>> {
        let Some((watched, read)) = replies.split_first() else { return Ok(Vec::new()) };
        if let Reply::Error(words) = watched {
            return Err(connection.error(format!("`WATCH`: {words}")));
        }
        let number = |(done, reply): (&Done, &Reply)| match reply {
            Reply::Error(words) => Err(connection.error(format!("`{}`: {words}", done.key))),
            reply => Ok(reply.as_str().and_then(|last| last.parse().ok()).unwrap_or_default()),
        };
        self.dones().zip(read).map(number).collect()
    }

    fn dones(&self) -> impl Iterator<Item = &Done> {
        self.inputs.iter().filter_map(|input| input.done.as_ref())
    }
}

#[async_trait]
impl OutboxSink for RedisSink {
    async fn connect(&mut self) -> Result<()> {
        self.connection = None;
        let mut connection = self.endpoint.connect(1).await?;
        let watch = self.watch();
        if !watch.is_empty() {
            let replies = connection.pipeline(&watch, PATIENCE).await?;
            let numbers = self.numbers(&connection, &replies)?;
            let dones = self.inputs.iter_mut().filter_map(|input| input.done.as_mut());
            dones.zip(numbers).for_each(|(done, last)| done.last = last);
        }
        self.connection = Some(connection);
        Ok(())
    }

    fn is_exactly_once(&self) -> bool {
        self.dones().next().is_some()
    }

    async fn last_delivery(&mut self, input: usize) -> Result<Option<u64>> {
        Ok(self.inputs.get(input).and_then(|input| Some(input.done.as_ref()?.last)))
    }

    async fn deliver(&mut self, input: usize, rows: &RecordBatch, id: u64) -> Result<()> {
        let plan = self.inputs.get(input).ok_or_else(|| Error::internal(format!("no input {input}")))?;
        let first = id.saturating_sub(rows.num_rows() as u64);
        let known = plan.done.as_ref().map_or(0, |done| done.last.min(id).saturating_sub(first));
        let known = usize::try_from(known).unwrap_or(usize::MAX).min(rows.num_rows());
        if known == rows.num_rows() {
            return Ok(());
        }
        let rows = &rows.slice(known, rows.num_rows() - known);
        let mut commands = vec![Command::new("MULTI")];
        let mut rows = Rows::new(rows);
        for operation in &plan.operations {
            operation.commands(&mut rows, &mut commands)?;
        }
        if commands.len() == 1 {
            return Ok(());
        }
        let note = |done: &Done| Command::new("SET").args([done.key.clone(), id.to_string()]);
        commands.extend(plan.done.iter().map(note));
        commands.push(Command::new("EXEC"));
        let transaction = commands.len();
        // `EXEC` ends the watch.
        commands.extend(self.watch());
        // Taken out: after a failure, or if this future is dropped half-way, the numbers must be read again.
        let mut connection = self.connection.take().ok_or_else(|| Error::outside("not connected"))?;
        let mut replies = connection.pipeline(&commands, PATIENCE).await?;
        let watched = replies.split_off(transaction.min(replies.len()));
        let results = executed(&connection, replies)?;
        if let Some(done) = self.inputs.get_mut(input).and_then(|input| input.done.as_mut()) {
            done.last = id;
        }
        // Done; if the numbers are not known for sure now, they are read again before the next rows.
        let numbers = self.numbers(&connection, &watched)?;
        if !self.dones().map(|done| done.last).eq(numbers) {
            return Err(connection.error(OVERTAKEN));
        }
        let outcome = refused(&connection, &commands, &results);
        self.connection = Some(connection);
        outcome
    }
}

/// What it means when a watched number was changed.
const OVERTAKEN: &str = "another connection wrote for this sink meanwhile, such as an earlier one whose last delivery \
                         arrived late; what it wrote is looked up before the rows are delivered again";

/// The results of the transaction in `replies`, if it was done.
fn executed(connection: &Connection, mut replies: Vec<Reply>) -> Result<Vec<Reply>> {
    let last = match replies.pop() {
        Some(Reply::List(results)) => return Ok(results),
        Some(Reply::Null) => return Err(connection.error(OVERTAKEN)),
        last => last,
    };
    // Nothing was done. The reason is the reply of the command that could not be queued.
    let refused = replies.iter().chain(&last).find(|reply| matches!(reply, Reply::Error(_)));
    Err(connection.error(match refused {
        Some(reply @ Reply::Error(words)) => reply.unavailable().unwrap_or(words),
        _ => "no reply to EXEC",
    }))
}

/// Says which of the commands of a transaction that was done failed.
fn refused(connection: &Connection, commands: &[Command], results: &[Reply]) -> Result<()> {
    for (command, result) in commands[1..].iter().zip(results) {
        if let Reply::Error(words) = result {
            // The others are done: once more would do them twice.
            return Err(connection.error(format!("`{command}`: {words}")).fatal());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use pipeline::config::{Position, Problems, deserialize, tree};
    use pipeline::plugin::operator::StreamShape;
    use pipeline::schema::{FieldType, schema_of};

    use super::*;

    fn checked(yaml: &str) -> Result<SinkShape, String> {
        let mut problems = Problems::default();
        let node = tree::parse(yaml).expect("YAML");
        let schema = schema_of([
            ("device_id", FieldType::String),
            ("latency_ms", FieldType::Float),
            ("ts", FieldType::Timestamp(None)),
        ]);
        let shape = StreamShape { schema, keys: Vec::new(), windowed: false };
        let inputs = [SinkInput { metric: "load".to_owned(), shape }];
        let mut cx = CheckContext::new(&mut problems, "", Position { line: 1, column: 1 }, Path::new("."));
        let shape = deserialize::read::<RedisConfig>(&node, &mut cx).and_then(|config| config.check(&inputs, &mut cx));
        shape.ok_or_else(|| problems.render("f"))
    }

    #[test]
    fn one_operation_or_several_check_clean() {
        let example = RedisConfig::EXAMPLE.strip_prefix("type: redis\n").expect("a type");
        for yaml in [
            example,
            "url: redis://h\nwrite: {push: q}",
            "url: redis://h\nwrite: [{add: \"s:{metric}\", keep: 10}, {publish: c, value: ts}]",
            "url: redis://h\nwrite: {increment: total, by: 1}\nexactly_once: true",
            "url: redis://h\nwrite: {increment: \"{{x}}\", by: latency_ms, expire: 1d}",
        ] {
            assert!(checked(yaml).is_ok(), "{yaml}: {:?}", checked(yaml));
        }
        assert!(checked("url: redis://h\nwrite: {set: a}").is_ok_and(|shape| shape.takes_revised));
        assert!(checked("url: redis://h\nwrite: {push: a}").is_ok_and(|shape| !shape.takes_revised));
    }

    #[test]
    fn wrong_blocks_are_reported_at_their_place() {
        for (yaml, place, message) in [
            ("url: redis://h\nwrite: []", "1:1", "`write` is empty"),
            ("url: redis://h\nwrite: {value: ts}", "1:1", "one of `set`, `increment`, `push`, `add`, `publish`"),
            ("url: redis://h\nwrite: [{push: a, add: b}]", "2:9", "one operation each"),
            ("url: redis://h\nwrite: {pusch: a}", "2:9", "unknown key `pusch`"),
            ("url: redis://h\nwrite: {set: \"a:{devic_id}\"}", "2:18", "did you mean `device_id`?"),
            ("url: redis://h\nwrite: {set: \"a:{device_id\"}", "2:17", "is not closed"),
            ("url: redis://h\nwrite: {set: \"a}\"}", "2:16", "without `{`"),
            ("url: redis://h\nwrite: {set: a, value: latency}", "2:24", "no column `latency`"),
            ("url: redis://h\nwrite: {increment: a, by: device_id}", "2:27", "is string, no number"),
            ("url: redis://h\nwrite: {increment: a, by: row}", "2:27", "did you mean `rows`?"),
            ("url: redis://h\nwrite: {increment: a, value: ts}", "2:30", "`value` does not go with `increment`"),
            ("url: redis://h\nwrite: {push: a, expire: 1s}", "2:26", "`expire` does not go with `push`"),
            ("url: redis://h\nwrite: {push: a, keep: 0}", "2:24", "`keep` is at least 1"),
            ("url: redis://h\nwrite: {push: a}\nbatch: {rows: 0}", "3:15", "`rows` is 1 to 8192"),
        ] {
            let problems = checked(yaml).expect_err(yaml);
            assert!(problems.contains(&format!("f:{place}: ")) && problems.contains(message), "{yaml}\n{problems}");
        }
    }
}
