//! `read`: the replies of some commands, one row per poll.

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use indexmap::IndexMap;
use pipeline::config::{At, CheckContext, FieldSpec, Fields, did_you_mean};
use pipeline::error::{Error, Result};
use pipeline::plugin::source::{PullReader, Pulled, Reader, RowError, Source};
use pipeline::rows::{Cell, RowsBuilder};
use pipeline::schema::{FieldType, schema_of};
use serde_json::Value;

use super::command::{ReadCommand, Shape};
use wire::redis::{Command, Connection, Endpoint, PATIENCE, Reply};

/// Commands by the name of their column.
pub(super) type Reads = IndexMap<String, At<String>>;

/// One column of the row.
#[derive(Clone, Debug)]
pub(super) struct PollColumn {
    name: String,
    text: String,
    command: ReadCommand,
    field_type: FieldType,
    /// Where the value lies in the reply.
    path: Vec<String>,
}

impl PollColumn {
    fn new(name: &str, text: &str, command: ReadCommand, spec: Option<&FieldSpec>) -> Self {
        Self {
            name: name.to_owned(),
            text: text.to_owned(),
            field_type: spec.map_or(command.shape.default_type(), |spec| spec.field_type),
            path: spec.and_then(|spec| spec.path.clone()).unwrap_or_default(),
            command,
        }
    }

    fn request(&self) -> Command {
        let mut words = self.command.words.iter().cloned();
        Command::new(words.next().unwrap_or_default()).args(words)
    }
}

/// Reports what is wrong with the commands and gives the row's columns.
pub(super) fn check(reads: &At<Reads>, fields: &At<Fields>, cx: &mut CheckContext<'_>) -> Vec<PollColumn> {
    for name in fields.0.keys().filter(|name| !reads.contains_key(*name)) {
        let hint = did_you_mean(name, reads.keys());
        cx.error_hint(fields.position, format!("`fields` types `{name}`, which `read` does not have"), hint);
    }
    if reads.is_empty() {
        cx.error_hint(reads.position, "`read` is empty", Some("such as `read: {visits: GET visits}`".to_owned()));
    }
    let mut columns = Vec::new();
    for (name, text) in &reads.value {
        let command = match ReadCommand::parse(text) {
            Ok(command) => command,
            Err(error) => {
                cx.error_hint(text.place_of(Some(error.offset)), format!("`{name}`: {}", error.message), error.hint);
                continue;
            }
        };
        let column = PollColumn::new(name, text, command, fields.0.get(name));
        if !column.path.is_empty() && matches!(column.command.shape, Shape::Int | Shape::Float) {
            cx.error(fields.position, format!("`{name}`: `path` needs a reply with names in it; this one is a number"));
        }
        columns.push(column);
    }
    columns
}

/// The columns of a checked configuration.
pub(super) fn columns(reads: &Reads, fields: &Fields) -> Result<Vec<PollColumn>> {
    let column = |(name, text): (&String, &At<String>)| match ReadCommand::parse(text) {
        Ok(command) => Ok(PollColumn::new(name, text, command, fields.0.get(name))),
        Err(error) => Err(Error::user(format!("`{name}`: {}", error.message))),
    };
    reads.iter().map(column).collect()
}

/// The schema of the row.
pub(super) fn schema(columns: &[PollColumn]) -> SchemaRef {
    schema_of(columns.iter().map(|column| (column.name.as_str(), column.field_type)))
}

/// The source in this mode.
pub(super) struct PollSource {
    endpoint: Endpoint,
    columns: Vec<PollColumn>,
}

impl PollSource {
    pub(super) fn new(endpoint: Endpoint, columns: Vec<PollColumn>) -> Self {
        Self { endpoint, columns }
    }
}

#[async_trait]
impl Source for PollSource {
    async fn connect(&mut self, _position: Option<&[u8]>) -> Result<Reader> {
        let connection = self.endpoint.connect(1).await?;
        let extra: Vec<_> = self.columns.iter().map(|column| (column.name.as_str(), column.field_type)).collect();
        let rows = RowsBuilder::new(&extra, &Fields::default());
        Ok(Reader::Pull(Box::new(PollReader { connection, columns: self.columns.clone(), rows })))
    }
}

struct PollReader {
    connection: Connection,
    columns: Vec<PollColumn>,
    rows: RowsBuilder,
}

#[async_trait]
impl PullReader for PollReader {
    async fn next(&mut self) -> Result<Option<Pulled>> {
        let replies = ask(&mut self.connection, &self.columns).await?;
        let mut errors = Vec::new();
        let values: Vec<Found> = self
            .columns
            .iter()
            .zip(&replies)
            .map(|(column, reply)| {
                find(column, reply).unwrap_or_else(|error| {
                    errors.push(wrong(column, &error, reply));
                    Found::Null
                })
            })
            .collect();
        let mut row = self.rows.row();
        for (index, (value, column)) in values.iter().zip(&self.columns).enumerate() {
            if let Err(error) = self.rows.set(&mut row, index, value.cell(column.field_type)) {
                errors.push(wrong(column, &error, &replies[index]));
            }
        }
        self.rows.push(row);
        Ok(Some(Pulled { rows: self.rows.finish()?, errors, position: Vec::new(), more: false }))
    }
}

/// Runs all commands in one round trip.
async fn ask(connection: &mut Connection, columns: &[PollColumn]) -> Result<Vec<Reply>> {
    let requests: Vec<Command> = columns.iter().map(PollColumn::request).collect();
    let replies = connection.pipeline(&requests, PATIENCE).await?;
    match replies.iter().find_map(Reply::unavailable) {
        Some(words) => Err(connection.error(words)),
        None => Ok(replies),
    }
}

fn wrong(column: &PollColumn, error: &str, reply: &Reply) -> RowError {
    let message = format!("`{}`: {error}", column.text);
    match reply {
        Reply::Text(text) => RowError::new(message, text),
        other => RowError::new(message, json_of(other, column.command.shape).to_string().as_bytes()),
    }
}

/// A value found in a reply, on its way into a column.
#[derive(Debug, PartialEq)]
enum Found {
    Null,
    Untyped(String),
    Bytes(bytes::Bytes),
    Json(String),
}

impl Found {
    fn cell(&self, field_type: FieldType) -> Cell<'_> {
        match self {
            Self::Null => Cell::Null,
            Self::Untyped(text) => Cell::Untyped(text),
            Self::Bytes(bytes) => Cell::Bytes(bytes),
            Self::Json(text) if field_type == FieldType::Json => Cell::Untyped(text),
            Self::Json(text) => Cell::Json(text.as_str().into()),
        }
    }
}

/// The column's value in its reply. A missing key is null.
fn find(column: &PollColumn, reply: &Reply) -> Result<Found, String> {
    let text = match reply {
        Reply::Null => return Ok(Found::Null),
        Reply::Error(words) => return Err(words.clone()),
        Reply::Int(number) => return Ok(Found::Untyped(number.to_string())),
        Reply::List(items) if items.is_empty() && column.command.shape == Shape::Pairs => return Ok(Found::Null),
        Reply::Text(bytes) if column.field_type == FieldType::Bytes && column.path.is_empty() => {
            return Ok(Found::Bytes(bytes.clone()));
        }
        Reply::List(_) => "",
        Reply::Text(bytes) => std::str::from_utf8(bytes).map_err(|e| format!("not UTF-8: {e}"))?,
    };
    let is_plain = matches!(column.command.shape, Shape::Text | Shape::Float | Shape::Int);
    if is_plain && column.path.is_empty() {
        return Ok(Found::Untyped(text.to_owned()));
    }
    let whole = match column.command.shape {
        Shape::Text => serde_json::from_str(text).map_err(|e| format!("`path` needs JSON: {e}"))?,
        shape => json_of(reply, shape),
    };
    let found = column.path.iter().try_fold(&whole, |value, name| value.get(name));
    Ok(match found {
        None | Some(Value::Null) => Found::Null,
        Some(Value::String(text)) if column.field_type != FieldType::Json => Found::Untyped(text.clone()),
        Some(Value::Number(number)) if column.field_type != FieldType::Json => Found::Untyped(number.to_string()),
        Some(Value::Bool(value)) if column.field_type != FieldType::Json => Found::Untyped(value.to_string()),
        Some(value) => Found::Json(value.to_string()),
    })
}

/// A reply as JSON. Bytes that are no UTF-8 are replaced.
fn json_of(reply: &Reply, shape: Shape) -> Value {
    match reply {
        Reply::Null => Value::Null,
        Reply::Int(number) => Value::from(*number),
        Reply::Text(text) if shape == Shape::Info => info(&String::from_utf8_lossy(text)),
        Reply::Text(text) => Value::from(String::from_utf8_lossy(text)),
        Reply::Error(words) => Value::from(words.as_str()),
        Reply::List(items) if shape == Shape::Pairs => {
            let name = |reply: &Reply| match json_of(reply, Shape::Text) {
                Value::String(text) => text,
                other => other.to_string(),
            };
            let pairs = items.chunks_exact(2);
            Value::Object(pairs.map(|pair| (name(&pair[0]), json_of(&pair[1], Shape::List))).collect())
        }
        Reply::List(items) => Value::Array(items.iter().map(|item| json_of(item, Shape::List)).collect()),
    }
}

/// `name:value` lines as an object; a value such as `keys=1,expires=0` is an object again.
fn info(text: &str) -> Value {
    // Only plain digits: `12e4` is more likely the hash of a build.
    let plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit() || matches!(byte, b'-' | b'.'));
    let number = |text: &str| match text.parse::<serde_json::Number>() {
        Ok(number) if plain(text) => Value::Number(number),
        _ => Value::from(text),
    };
    let value = |text: &str| match text.split(',').map(|part| part.split_once('=')).collect::<Option<Vec<_>>>() {
        Some(parts) => Value::Object(parts.into_iter().map(|(k, v)| (k.to_owned(), number(v))).collect()),
        None => number(text),
    };
    let lines = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once(':'));
    Value::Object(lines.map(|(name, text)| (name.to_owned(), value(text.trim()))).collect())
}

/// Runs the commands once and guesses types from the replies.
pub(super) async fn discover(endpoint: &Endpoint, columns: Vec<PollColumn>) -> Result<Fields> {
    let replies = ask(&mut endpoint.connect(1).await?, &columns).await?;
    let typed = columns.iter().zip(&replies).map(|(column, reply)| {
        let field_type = match (column.command.shape, reply.as_str()) {
            (Shape::Text, Some(text)) => super::guess(text),
            (shape, _) => shape.default_type(),
        };
        (column.name.as_str(), field_type)
    });
    Ok(Fields::of(typed))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(command: &str, field_type: &str, path: &str) -> PollColumn {
        let field_type = field_type.parse().expect("type");
        let path = (!path.is_empty()).then(|| path.split('.').map(str::to_owned).collect());
        let command_read = ReadCommand::parse(command).expect("command");
        PollColumn::new("v", command, command_read, Some(&FieldSpec { field_type, path }))
    }

    fn text(text: &'static str) -> Reply {
        Reply::Text(text.into())
    }

    #[test]
    fn replies_become_the_values_that_columns_want() {
        let hash = || Reply::List(vec![text("t"), text("21.5"), text("unit"), text("C")]);
        let keyspace = || text("# Keyspace\r\ndb0:keys=3,expires=0\r\nversion:7.0.15\r\nclients:2\r\n");
        let untyped = |text: &str| Ok(Found::Untyped(text.to_owned()));
        let json = |text: &str| Ok(Found::Json(text.to_owned()));
        for (command, field_type, path, reply, expected) in [
            ("GET k", "int", "", Reply::Null, Ok(Found::Null)),
            ("GET k", "int", "", text("5"), untyped("5")),
            ("GET k", "float", "a.b", text(r#"{"a":{"b":1.5}}"#), untyped("1.5")),
            ("GET k", "float", "a.c", text(r#"{"a":{"b":1.5}}"#), Ok(Found::Null)),
            ("GET k", "bytes", "", text("x"), Ok(Found::Bytes("x".into()))),
            ("LLEN q", "int", "", Reply::Int(3), untyped("3")),
            ("HGETALL h", "json", "", hash(), json(r#"{"t":"21.5","unit":"C"}"#)),
            ("HGETALL h", "json", "", Reply::List(vec![]), Ok(Found::Null)),
            ("HGETALL h", "float", "t", hash(), untyped("21.5")),
            ("HGETALL h", "float", "other", hash(), Ok(Found::Null)),
            ("LRANGE q 0 1", "json", "", Reply::List(vec![text("a"), Reply::Int(1)]), json(r#"["a",1]"#)),
            ("LRANGE q 0 1", "json", "", Reply::List(vec![]), json("[]")),
            ("INFO", "int", "db0.keys", keyspace(), untyped("3")),
            ("INFO", "string", "version", keyspace(), untyped("7.0.15")),
            ("INFO", "json", "", keyspace(), json(r#"{"db0":{"keys":3,"expires":0},"version":"7.0.15","clients":2}"#)),
            ("GET k", "int", "", Reply::Error("WRONGTYPE x".to_owned()), Err("WRONGTYPE x".to_owned())),
        ] {
            assert_eq!(find(&column(command, field_type, path), &reply), expected, "{command} {field_type} {path}");
        }
    }
}
