//! The small types of configuration structs: text with its place, durations, sizes, secrets, fields.

use std::borrow::Cow;
use std::fmt;
use std::ops::Deref;
use std::str::FromStr;

use arrow::datatypes::{Schema, SchemaRef};
use indexmap::IndexMap;
use schemars::{JsonSchema, Schema as JsonSchemaValue, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde::de::{self, DeserializeOwned, Deserializer, MapAccess, Visitor};

use super::problems::{Position, did_you_mean};
use crate::schema::{FieldType, TYPE_WORDS};

/// Name by which [`At`] asks our deserializer for the place of a value.
pub(crate) const AT: &str = "$tailwater::At";

/// A value and where it stands in the file, so that `check` can point at it.
#[derive(Clone, Debug, Default)]
pub struct At<T> {
    /// First character of the value; of the text inside quotes, if it is a quoted text whose characters
    /// stand one for one in the file.
    pub position: Position,
    /// Whether `position` plus n characters is the place of the n-th character of a text.
    pub verbatim: bool,
    /// The value.
    pub value: T,
}

impl<T> At<T> {
    /// A value that stands nowhere (a default).
    pub fn nowhere(value: T) -> Self {
        Self { position: Position::default(), verbatim: false, value }
    }

    /// The place of the `offset`-th character (from 0), or of the whole if that cannot be told.
    pub fn place_of(&self, offset: Option<usize>) -> Position {
        match offset {
            Some(offset) if self.verbatim => self.position.right(offset),
            _ => self.position,
        }
    }
}

impl<T> Deref for At<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.value
    }
}

impl<'de, T: DeserializeOwned> Deserialize<'de> for At<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AtVisitor<T>(std::marker::PhantomData<T>);
        impl<'de, T: DeserializeOwned> Visitor<'de> for AtVisitor<T> {
            type Value = At<T>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value of a YAML file")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<At<T>, A::Error> {
                let missing = || de::Error::custom("not a configuration deserializer");
                let (_, line) = map.next_entry::<String, usize>()?.ok_or_else(missing)?;
                let (_, column) = map.next_entry::<String, usize>()?.ok_or_else(missing)?;
                let (_, verbatim) = map.next_entry::<String, bool>()?.ok_or_else(missing)?;
                let (_, value) = map.next_entry::<String, T>()?.ok_or_else(missing)?;
                Ok(At { position: Position { line, column }, verbatim, value })
            }
        }
        deserializer.deserialize_struct(
            AT,
            &["line", "column", "verbatim", "value"],
            AtVisitor(std::marker::PhantomData),
        )
    }
}

impl<T: JsonSchema> JsonSchema for At<T> {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        T::schema_name()
    }
    fn json_schema(generator: &mut SchemaGenerator) -> JsonSchemaValue {
        generator.subschema_for::<T>()
    }
}

/// A duration such as `500ms`, `3s`, `5m`, `2h`, `1d`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Duration(pub std::time::Duration);

impl Duration {
    /// `n` milliseconds.
    pub const fn from_ms(n: u64) -> Self {
        Self(std::time::Duration::from_millis(n))
    }

    /// `n` seconds.
    pub const fn from_secs(n: u64) -> Self {
        Self(std::time::Duration::from_secs(n))
    }

    /// In microseconds, at most `i64::MAX`.
    pub fn as_us(self) -> i64 {
        i64::try_from(self.0.as_micros()).unwrap_or(i64::MAX)
    }
}

impl Deref for Duration {
    type Target = std::time::Duration;
    fn deref(&self) -> &std::time::Duration {
        &self.0
    }
}

impl FromStr for Duration {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no duration; write a number and a unit: `500ms`, `3s`, `5m`, `2h`, `1d`");
        let unit_at = text.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
        let (number, unit) = text.split_at(unit_at);
        let seconds = match unit.trim() {
            "us" => 1e-6,
            "ms" => 1e-3,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            "d" => 86400.0,
            _ => return Err(wrong()),
        };
        let number: f64 = number.parse().map_err(|_| wrong())?;
        // Rounded to microseconds, the unit of all times; a century is far enough.
        let us = (number * seconds * 1e6).round();
        if us > 3.2e15 {
            return Err(format!("`{text}` is longer than a hundred years"));
        }
        Ok(Self(std::time::Duration::from_micros(us as u64)))
    }
}

impl fmt::Display for Duration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let us = self.0.as_micros();
        for (unit, size) in
            [("d", 86_400_000_000), ("h", 3_600_000_000), ("m", 60_000_000), ("s", 1_000_000), ("ms", 1_000)]
        {
            if us >= size && us.is_multiple_of(size) {
                return write!(f, "{}{unit}", us / size);
            }
        }
        write!(f, "{us}us")
    }
}

/// A size such as `64MiB`, `10kB`, `512B`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no size; write a number and a unit: `512B`, `64KiB`, `128MiB`, `1GiB`");
        let unit_at = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let (number, unit) = text.split_at(unit_at);
        let factor: u64 = match unit.trim() {
            "B" => 1,
            "kB" | "KB" => 1_000,
            "MB" => 1_000_000,
            "GB" => 1_000_000_000,
            "KiB" => 1 << 10,
            "MiB" => 1 << 20,
            "GiB" => 1 << 30,
            "TiB" => 1 << 40,
            _ => return Err(wrong()),
        };
        number.parse::<u64>().ok().and_then(|n| n.checked_mul(factor)).map(Self).ok_or_else(wrong)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, size) in [("GiB", 1u64 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)] {
            if self.0 >= size && self.0.is_multiple_of(size) {
                return write!(f, "{}{unit}", self.0 / size);
            }
        }
        write!(f, "{}B", self.0)
    }
}

/// Text that is never printed: passwords, tokens.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The text itself, to be handed to the server and to nobody else.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self)
    }
}

impl JsonSchema for Secret {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "Secret".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> JsonSchemaValue {
        json_schema!({"type": "string"})
    }
}

/// A connection URL, which may hold a password. Printing it hides the password.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct SecretUrl(String);

impl SecretUrl {
    /// The whole URL with its password, to be handed to the client library and to nobody else.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<&str> for SecretUrl {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl fmt::Display for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some((scheme, rest)) = self.0.split_once("://") else { return f.write_str(&self.0) };
        let authority_end = rest.find(['/', '?']).unwrap_or(rest.len());
        // The last @: a password may hold one itself.
        match rest[..authority_end].rfind('@').or_else(|| rest.rfind('@')) {
            Some(at) => {
                let user = rest[..at].split(':').next().unwrap_or_default();
                write!(f, "{scheme}://{user}:***@{}", strip_query(&rest[at + 1..]))
            }
            None => write!(f, "{scheme}://{}", strip_query(rest)),
        }
    }
}

/// Parameters may hold passwords too (`?password=`).
fn strip_query(text: &str) -> &str {
    text.split('?').next().unwrap_or_default()
}

impl fmt::Debug for SecretUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<'de> Deserialize<'de> for SecretUrl {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self)
    }
}

impl JsonSchema for SecretUrl {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "Url".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> JsonSchemaValue {
        json_schema!({"type": "string"})
    }
}

/// One entry of `fields:`: `float`, or `{type: float, path: sensors.temperature}`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldSpec {
    /// Type of the column.
    pub field_type: FieldType,
    /// Where the value lies in a nested message, as names from the outside in; the column's name if absent.
    pub path: Option<Vec<String>>,
}

impl<'de> Deserialize<'de> for FieldSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Long {
            #[serde(rename = "type")]
            field_type: FieldType,
            path: String,
        }
        struct SpecVisitor;
        impl<'de> Visitor<'de> for SpecVisitor {
            type Value = FieldSpec;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a type such as `float`, or `{type: float, path: a.b}`")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<FieldSpec, E> {
                let field_type = parse_type(text).map_err(E::custom)?;
                Ok(FieldSpec { field_type, path: None })
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<FieldSpec, A::Error> {
                let long = Long::deserialize(de::value::MapAccessDeserializer::new(map))?;
                let path: Vec<String> = long.path.split('.').map(str::to_owned).collect();
                if path.iter().any(String::is_empty) {
                    return Err(de::Error::custom(format!("path `{}` has an empty name", long.path)));
                }
                Ok(FieldSpec { field_type: long.field_type, path: Some(path) })
            }
        }
        deserializer.deserialize_any(SpecVisitor)
    }
}

impl JsonSchema for FieldSpec {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "Field".into()
    }
    fn json_schema(generator: &mut SchemaGenerator) -> JsonSchemaValue {
        let field_type = generator.subschema_for::<FieldType>();
        json_schema!({"anyOf": [field_type, {
            "type": "object",
            "properties": {"type": field_type, "path": {"type": "string", "description": "names from the outside in, with dots: `sensors.temperature`"}},
            "required": ["type", "path"],
            "additionalProperties": false,
        }]})
    }
}

impl<'de> Deserialize<'de> for FieldType {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parse_type(&String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

/// A type, or what is wrong with the word and what it may have meant.
fn parse_type(text: &str) -> Result<FieldType, String> {
    let other_word = match text.to_lowercase().as_str() {
        "integer" | "bigint" | "long" | "int64" | "int32" | "number" => Some("int"),
        "double" | "real" | "float64" | "float32" => Some("float"),
        "text" | "str" | "varchar" | "utf8" => Some("string"),
        "datetime" | "time" => Some("timestamp"),
        "numeric" => Some("decimal(18,2)"),
        "object" | "array" | "list" | "jsonb" => Some("json"),
        _ => None,
    };
    let hint = other_word.map(|word| format!("did you mean `{word}`?")).or_else(|| did_you_mean(text, TYPE_WORDS));
    let hinted = |wrong: String| hint.map_or(wrong.clone(), |hint| format!("{wrong}; {hint}"));
    text.parse().map_err(|wrong: String| hinted(wrong))
}

impl JsonSchema for FieldType {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "Type".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> JsonSchemaValue {
        json_schema!({
            "type": "string",
            "pattern": r"^(string|int|float|bool|timestamp(_s|_ms|_us|_ns)?|date|decimal\(\d+, *\d+\)|bytes|json)$",
            "description": format!("one of {}", TYPE_WORDS.join(", ")),
        })
    }
}

/// The `fields:` block: column names with their types, in file order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Fields(pub IndexMap<String, FieldSpec>);

impl Fields {
    /// The Arrow schema, every column nullable.
    pub fn schema(&self) -> SchemaRef {
        let fields: Vec<_> = self.0.iter().map(|(name, spec)| spec.field_type.field(name)).collect();
        SchemaRef::new(Schema::new(fields))
    }

    /// Whether no field is given.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Plain fields without paths.
    pub fn of<'a>(columns: impl IntoIterator<Item = (&'a str, FieldType)>) -> Self {
        Self(columns.into_iter().map(|(name, t)| (name.to_owned(), FieldSpec { field_type: t, path: None })).collect())
    }
}

impl fmt::Display for Fields {
    /// The block to paste: `fields: {a: int, b: string}`, one line per field when there are many.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("fields:\n")?;
        for (name, spec) in &self.0 {
            match &spec.path {
                Some(path) => writeln!(f, "  {name}: {{type: {}, path: {}}}", spec.field_type, path.join("."))?,
                None => writeln!(f, "  {name}: {}", spec.field_type)?,
            }
        }
        Ok(())
    }
}

macro_rules! text_value {
    ($type:ty, $name:literal, $pattern:literal) => {
        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
        impl JsonSchema for $type {
            fn inline_schema() -> bool {
                true
            }
            fn schema_name() -> Cow<'static, str> {
                $name.into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> JsonSchemaValue {
                json_schema!({"type": "string", "pattern": $pattern})
            }
        }
    };
}

text_value!(Duration, "Duration", r"^[0-9.]+ *(us|ms|s|m|h|d)$");
text_value!(ByteSize, "Size", r"^[0-9]+ *(B|kB|KB|MB|GB|KiB|MiB|GiB|TiB)$");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes_read_what_they_print() {
        for text in ["500ms", "3s", "5m", "2h", "1d", "250us"] {
            assert_eq!(text.parse::<Duration>().map(|d| d.to_string()), Ok(text.to_owned()));
        }
        for text in ["", "5", "s", "5 weeks", "-1s", "1e400d", "99999999d"] {
            assert!(text.parse::<Duration>().is_err(), "{text}");
        }
        for text in ["64MiB", "1GiB", "512B"] {
            assert_eq!(text.parse::<ByteSize>().map(|d| d.to_string()), Ok(text.to_owned()));
        }
        assert!("64".parse::<ByteSize>().is_err());
    }

    #[test]
    fn a_printed_url_hides_its_password() {
        for (url, shown) in [
            ("mqtt://user:p@ss@host:1883/x", "mqtt://user:***@host:1883/x"),
            ("redis://:secret@host", "redis://:***@host"),
            ("postgres://host/db?password=x", "postgres://host/db"),
            ("embedded", "embedded"),
        ] {
            assert_eq!(SecretUrl::from(url).to_string(), shown);
        }
    }
}
