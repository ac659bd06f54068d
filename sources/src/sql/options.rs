//! The parts of the configuration that YAML may write in two ways.

use std::borrow::Cow;
use std::fmt;

use indexmap::IndexMap;
use pipeline::config::At;
use pipeline::schema::FieldType;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor};

/// One entry of `fields:`: a type, or with `queries` the columns of one query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SqlField {
    /// A column.
    Column(FieldType),
    /// The columns of one of the `queries`.
    Query(IndexMap<String, FieldType>),
}

impl<'de> Deserialize<'de> for SqlField {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FieldVisitor;
        impl<'de> Visitor<'de> for FieldVisitor {
            type Value = SqlField;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a type such as `float`, or the columns of a query: `{pending: int}`")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<SqlField, E> {
                text.parse().map(SqlField::Column).map_err(E::custom)
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<SqlField, A::Error> {
                IndexMap::deserialize(de::value::MapAccessDeserializer::new(map)).map(SqlField::Query)
            }
        }
        deserializer.deserialize_any(FieldVisitor)
    }
}

impl JsonSchema for SqlField {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "SqlField".into()
    }
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let field_type = generator.subschema_for::<FieldType>();
        json_schema!({"anyOf": [field_type, {"type": "object", "additionalProperties": field_type}]})
    }
}

/// One word, or a list of them. Numbers are words too.
#[derive(Clone, Debug, Default)]
pub struct Words(pub Vec<At<String>>);

impl<'de> Deserialize<'de> for Words {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WordsVisitor;
        fn word<E>(text: impl fmt::Display) -> Result<Words, E> {
            Ok(Words(vec![At::nowhere(text.to_string())]))
        }
        impl<'de> Visitor<'de> for WordsVisitor {
            type Value = Words;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value or a list of values")
            }
            fn visit_str<E>(self, text: &str) -> Result<Words, E> {
                word(text)
            }
            fn visit_i64<E>(self, value: i64) -> Result<Words, E> {
                word(value)
            }
            fn visit_f64<E>(self, value: f64) -> Result<Words, E> {
                word(value)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Words, A::Error> {
                let mut words = Vec::new();
                while let Some(item) = items.next_element()? {
                    words.push(item);
                }
                Ok(Words(words))
            }
        }
        deserializer.deserialize_any(WordsVisitor)
    }
}

impl JsonSchema for Words {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "Words".into()
    }
    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let word = json_schema!({"type": ["string", "number"]});
        json_schema!({"anyOf": [word, {"type": "array", "items": word, "minItems": 1}]})
    }
}

/// `cursor: id`, `cursor: [updated_at, id]`, or `cursor: {column: id, start: 1000}`.
#[derive(Clone, Debug)]
pub struct Cursor {
    /// The columns, most significant first.
    pub columns: Vec<At<String>>,
    /// Rows after these values are read at the very first start; all rows if empty.
    pub start: Vec<At<String>>,
}

impl<'de> Deserialize<'de> for Cursor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Long {
            column: Words,
            #[serde(default)]
            start: Words,
        }
        struct CursorVisitor;
        impl<'de> Visitor<'de> for CursorVisitor {
            type Value = Cursor;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a column, a list of columns, or `{column: id, start: 1000}`")
            }
            fn visit_str<E>(self, text: &str) -> Result<Cursor, E> {
                Ok(Cursor { columns: vec![At::nowhere(text.to_owned())], start: Vec::new() })
            }
            fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<Cursor, A::Error> {
                let columns = Words::deserialize(de::value::SeqAccessDeserializer::new(items))?.0;
                Ok(Cursor { columns, start: Vec::new() })
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Cursor, A::Error> {
                let long = Long::deserialize(de::value::MapAccessDeserializer::new(map))?;
                Ok(Cursor { columns: long.column.0, start: long.start.0 })
            }
        }
        deserializer.deserialize_any(CursorVisitor)
    }
}

impl JsonSchema for Cursor {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> Cow<'static, str> {
        "Cursor".into()
    }
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let words = generator.subschema_for::<Words>();
        json_schema!({"anyOf": [words, {
            "type": "object",
            "properties": {
                "column": {"anyOf": [words], "description": "the column, or a list of columns, most significant first"},
                "start": {"anyOf": [words], "description": "rows after this value are read at the very first start; default: all rows"},
            },
            "required": ["column"],
            "additionalProperties": false,
        }]})
    }
}

/// What makes rows visible in the order of a cursor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CommitOrder {
    /// PostgreSQL: the cursor's first column is an `xid8` with `DEFAULT pg_current_xact_id()`; rows are read when every
    /// earlier transaction has ended.
    Xid8,
    /// SQLite: the cursor is an `INTEGER PRIMARY KEY AUTOINCREMENT`.
    Autoincrement,
    /// You know it: one writer at a time, or a query that holds young rows back itself.
    Assured,
}

impl CommitOrder {
    /// The word in the YAML.
    pub fn word(self) -> &'static str {
        match self {
            Self::Xid8 => "xid8",
            Self::Autoincrement => "autoincrement",
            Self::Assured => "assured",
        }
    }
}
