//! The `fields:` block of the messages that arrive.

use std::time::Duration;

use indexmap::IndexMap;
use pipeline::config::{FieldSpec, Fields};
use pipeline::error::{Error, Result};
use pipeline::plugin::SourceContext;
use pipeline::schema::FieldType;
use pipeline::time::parse_us;
use serde_json::Value;
use uuid::Uuid;

use super::client::Event;
use super::session::Change;
use super::{Columns, MqttConfig, MqttSource, subscribe};

/// Longest time of listening, in seconds: a device that reports more seldom is no live source.
const DISCOVER_SECONDS_MAX: u64 = 10;
/// Most messages to look at.
const DISCOVER_MESSAGES_MAX: usize = 100;
/// Deepest nesting that becomes columns; what lies deeper is a `json` column.
const DEPTH_MAX: usize = 4;
/// Most columns of a block; more are no fields but keys of a map.
const COLUMNS_MAX: usize = 200;

/// Listens for a while, without a session, and says which fields the messages have.
pub(super) async fn discover(config: &MqttConfig, cx: SourceContext) -> Result<Fields> {
    let source = MqttSource::new(config, &cx)?;
    // A client id of its own: the running source keeps its session.
    let client_id = format!("tailwater-fields-{}", Uuid::new_v4().simple());
    let mut settings = source.settings(client_id, false);
    // At 1 or 2 a broker would wait for acknowledgements that never come.
    settings.qos = 0;
    let mut client = source.client(&settings).await?;
    client.dial().await?;
    client.greet().await?;
    let change = Change { subscribe: source.filters(), unsubscribe: Vec::new() };
    let mut events = subscribe(client.as_mut(), &change, settings.qos).await?;
    let mut seen = Seen::default();
    let mut messages = 0;
    let listen = async {
        loop {
            for event in events.drain(..) {
                if let Event::Message(message) = event {
                    seen.add(&message.payload);
                    messages += 1;
                }
            }
            if messages >= DISCOVER_MESSAGES_MAX {
                return Ok::<(), Error>(());
            }
            client.poll(&mut events).await?;
        }
    };
    match tokio::time::timeout(Duration::from_secs(DISCOVER_SECONDS_MAX), listen).await {
        Ok(result) => result?,
        Err(_elapsed) => {}
    }
    let columns = Columns::of(config, &config.parsed_topics());
    let fields = seen.fields(&columns.names);
    if fields.is_empty() {
        let message = format!("{messages} messages within {DISCOVER_SECONDS_MAX}s, and no JSON object among them");
        return Err(Error::outside(message));
    }
    Ok(fields)
}

/// What was seen, by path from the outside in, in order of appearance. `None`: only null so far.
#[derive(Debug, Default)]
struct Seen(IndexMap<Vec<String>, Option<FieldType>>);

impl Seen {
    /// Looks at one message: a JSON object or an array of them. Anything else has no fields.
    fn add(&mut self, payload: &[u8]) {
        match serde_json::from_slice(payload) {
            Ok(Value::Array(items)) => items.iter().for_each(|item| self.object(&[], item)),
            Ok(value) => self.object(&[], &value),
            Err(_) => {}
        }
    }

    fn object(&mut self, path: &[String], value: &Value) {
        let Value::Object(entries) = value else { return };
        // A dot in a name cannot be written in a path.
        for (name, value) in entries.iter().filter(|(name, _)| !name.is_empty() && !name.contains('.')) {
            let path = [path, std::slice::from_ref(name)].concat();
            match value {
                Value::Object(_) if path.len() < DEPTH_MAX && !self.0.contains_key(&path) => self.object(&path, value),
                _ => self.value(path, value),
            }
        }
    }

    fn value(&mut self, path: Vec<String>, value: &Value) {
        let is_known = self.0.contains_key(&path);
        if !is_known && self.0.len() >= COLUMNS_MAX {
            return;
        }
        let holds_columns = self.0.keys().any(|other| other.len() > path.len() && other.starts_with(&path));
        let found = type_of(value);
        if holds_columns {
            // Mostly an object, now something else: only `json` takes both, unless it is just absent.
            if found.is_some() {
                self.0.retain(|other, _| !other.starts_with(&path));
                self.0.insert(path, Some(FieldType::Json));
            }
            return;
        }
        let known = self.0.entry(path).or_default();
        *known = match (*known, found) {
            (None, other) | (other, None) => other,
            (Some(one), Some(other)) => Some(both(one, other)),
        };
    }

    /// The block. Names are the last word of the path, or the whole path where that is taken.
    fn fields(&self, taken: &[String]) -> Fields {
        let mut fields = Fields::default();
        for (path, found) in &self.0 {
            let last = column_name(&path[path.len() - 1..]);
            let is_free = |name: &String| !taken.contains(name) && !fields.0.contains_key(name);
            let numbered = (2..).map(|n| format!("{}_{n}", column_name(path)));
            let Some(name) = [last, column_name(path)].into_iter().chain(numbered).find(is_free) else { continue };
            let is_plain = *path == [name.as_str()];
            let field_type = found.unwrap_or(FieldType::Json);
            fields.0.insert(name, FieldSpec { field_type, path: (!is_plain).then(|| path.clone()) });
        }
        fields
    }
}

fn type_of(value: &Value) -> Option<FieldType> {
    Some(match value {
        Value::Null => return None,
        Value::Bool(_) => FieldType::Bool,
        Value::Number(number) if number.is_i64() => FieldType::Int,
        Value::Number(_) => FieldType::Float,
        Value::String(text) if text.len() >= 10 && parse_us(text).is_some() => FieldType::Timestamp(None),
        Value::String(_) => FieldType::String,
        Value::Array(_) | Value::Object(_) => FieldType::Json,
    })
}

/// The type that takes values of both.
fn both(one: FieldType, other: FieldType) -> FieldType {
    use FieldType::{Float, Int, Json, String, Timestamp};
    match (one, other) {
        (one, other) if one == other => one,
        (Int, Float) | (Float, Int) => Float,
        (String, Timestamp(_)) | (Timestamp(_), String) => String,
        _ => Json,
    }
}

/// A path as a column name: letters, digits and `_`, no digit first.
fn column_name(path: &[String]) -> String {
    let name = path.join("_").replace(|c: char| !c.is_ascii_alphanumeric() && c != '_', "_");
    if name.starts_with(|c: char| c.is_ascii_digit()) { format!("_{name}") } else { name }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_give_the_block_that_reads_them() {
        let mut seen = Seen::default();
        for message in [
            r#"{"n":1,"x":1,"at":"2026-11-20T12:00:00Z","ok":true,"gps":{"lat":1.5,"n":2},"mixed":1,"list":[1]}"#,
            r#"[{"x":1.5,"word":"a","temp-c":3,"mixed":"a","gps":null,"device":"taken"},{"whole":{"a":1}}]"#,
            r#"{"whole":7}"#,
            "no json",
        ] {
            seen.add(message.as_bytes());
        }
        assert_eq!(
            seen.fields(&["device".to_owned()]).to_string(),
            "fields:\n  n: int\n  x: float\n  at: timestamp\n  ok: bool\n  lat: {type: float, path: gps.lat}\n  \
             gps_n: {type: int, path: gps.n}\n  mixed: json\n  list: json\n  word: string\n  \
             temp_c: {type: int, path: temp-c}\n  device_2: {type: string, path: device}\n  whole: json\n"
        );
    }
}
