//! From a tree node to a plugin's typed struct, with every problem reported and not just the first.
//!
//! serde stops at the first error. So unknown keys and missing required keys are reported by looking at the
//! mapping first, and a value that does not fit is reported, taken out of a copy of the tree, and the rest
//! is read again, until nothing new is wrong.

use std::cell::RefCell;
use std::fmt;

use schemars::JsonSchema;
use serde::de::{self, DeserializeOwned, DeserializeSeed, Deserializer, Expected, Unexpected, Visitor};

use super::check::CheckContext;
use super::problems::{Position, did_you_mean};
use super::tree::{Key, Node, Scalar, Value};
use super::values::AT;

/// Reads `node` as a `T`. `None` if anything was wrong; then every problem is in `cx`.
pub fn read<T: DeserializeOwned + JsonSchema>(node: &Node, cx: &mut CheckContext<'_>) -> Option<T> {
    let errors_before = cx.errors();
    read_rest(node, cx).filter(|_| cx.errors() == errors_before)
}

/// As [`read`], but gives what is left when the wrong parts are taken out, so that it can be checked further.
/// `None` if a required part is wrong or missing.
pub fn read_rest<T: DeserializeOwned + JsonSchema>(node: &Node, cx: &mut CheckContext<'_>) -> Option<T> {
    let mut removed: Vec<(Position, String)> = report_missing::<T>(node, cx);
    let mut tree = node.clone();
    loop {
        let unknown = RefCell::new(Vec::new());
        let result = T::deserialize(NodeDeserializer { node: &tree, unknown: &unknown });
        for (key, known) in unknown.into_inner() {
            let hint = did_you_mean(&key.name, known.iter().copied());
            cx.error_hint(key.position, format!("unknown key `{}`", key.name), hint);
        }
        let error = match result {
            Ok(value) => return Some(value),
            Err(error) => error,
        };
        let position = error.position.unwrap_or(node.position);
        // Where something wrong was taken out, more is wrong only because of that.
        let consequence =
            removed.iter().any(|(at, key)| *at == position && error.missing.is_none_or(|field| field == key));
        if !consequence {
            cx.error_hint(position, error.message, error.hint);
        }
        removed.push(remove_at(&mut tree, position)?);
    }
}

/// Reports every required key of `T` that `node` lacks, and returns them.
fn report_missing<T: JsonSchema>(node: &Node, cx: &mut CheckContext<'_>) -> Vec<(Position, String)> {
    let schema = schemars::schema_for!(T);
    let required = schema.get("required").and_then(|r| r.as_array());
    let (Some(entries), Some(required)) = (node.mapping(), required) else { return Vec::new() };
    let mut missing = Vec::new();
    for name in required.iter().filter_map(|n| n.as_str()) {
        if !entries.iter().any(|(key, _)| key.name == name) {
            cx.error(node.position, format!("`{name}` is missing"));
            missing.push((node.position, name.to_owned()));
        }
    }
    missing
}

/// Takes the innermost mapping entry or list item whose value starts at `position` out of the tree.
fn remove_at(node: &mut Node, position: Position) -> Option<(Position, String)> {
    let parent = node.position;
    match &mut node.value {
        Value::Scalar(_) => None,
        Value::Sequence(items) => {
            if let Some(found) = items.iter_mut().find_map(|item| remove_at(item, position)) {
                return Some(found);
            }
            let index = items.iter().position(|item| item.position == position)?;
            items.remove(index);
            Some((parent, index.to_string()))
        }
        Value::Mapping(entries) => {
            if let Some(found) = entries.iter_mut().find_map(|(_, value)| remove_at(value, position)) {
                return Some(found);
            }
            let index = entries.iter().position(|(_, value)| value.position == position)?;
            let (key, _) = entries.remove(index);
            Some((parent, key.name))
        }
    }
}

/// What serde found wrong, with the place once it is known.
#[derive(Debug)]
pub(crate) struct ReadError {
    position: Option<Position>,
    message: String,
    hint: Option<String>,
    missing: Option<&'static str>,
    /// `expected …`, to be completed with what the node really is.
    expected: Option<String>,
}

impl ReadError {
    fn new(message: impl Into<String>) -> Self {
        Self { position: None, message: message.into(), hint: None, missing: None, expected: None }
    }

    /// Adds the place if a node further in has not.
    fn at(mut self, node: &Node) -> Self {
        if self.position.is_none() {
            self.position = Some(node.position);
            if let Some(expected) = self.expected.take() {
                // serde names its own types.
                let expected = match expected.as_str() {
                    "i8" | "i16" | "i32" | "i64" => "a whole number",
                    "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number from 0",
                    "f32" | "f64" => "a number",
                    other => other,
                };
                self.message = format!("expected {expected}, found {}", node.kind());
            }
        }
        self
    }
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for ReadError {}

impl de::Error for ReadError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(message.to_string())
    }
    fn invalid_type(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self { expected: Some(expected.to_string()), ..Self::new(String::new()) }
    }
    fn invalid_value(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self { expected: Some(expected.to_string()), ..Self::new(String::new()) }
    }
    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self { hint: did_you_mean(variant, expected), ..Self::new(format!("unknown value `{variant}`")) }
    }
    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self { hint: did_you_mean(field, expected), ..Self::new(format!("unknown key `{field}`")) }
    }
    fn missing_field(field: &'static str) -> Self {
        Self { missing: Some(field), ..Self::new(format!("`{field}` is missing")) }
    }
}

type Unknown = RefCell<Vec<(Key, &'static [&'static str])>>;

#[derive(Clone, Copy)]
struct NodeDeserializer<'a> {
    node: &'a Node,
    unknown: &'a Unknown,
}

impl<'a> NodeDeserializer<'a> {
    fn scalar(&self) -> Option<&'a Scalar> {
        match &self.node.value {
            Value::Scalar(scalar) => Some(scalar),
            _ => None,
        }
    }

    fn child(&self, node: &'a Node) -> Self {
        Self { node, unknown: self.unknown }
    }

    /// A scalar that may be read as a number or boolean: unquoted, or put together from the environment.
    fn unquoted(&self) -> Option<&'a str> {
        self.scalar().filter(|s| s.plain || s.text != s.written).map(|s| s.text.as_str())
    }

    fn any<'de, V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match &self.node.value {
            Value::Sequence(items) => visitor.visit_seq(Items { parent: self, items: items.iter() }),
            Value::Mapping(entries) => {
                visitor.visit_map(Entries { parent: self, entries: entries.iter(), value: None })
            }
            Value::Scalar(scalar) if scalar.is_null() => visitor.visit_unit(),
            Value::Scalar(scalar) => match self.unquoted().map(plain_value) {
                Some(Plain::Bool(value)) => visitor.visit_bool(value),
                Some(Plain::Int(value)) => visitor.visit_i64(value),
                Some(Plain::Float(value)) => visitor.visit_f64(value),
                Some(Plain::Text) | None => visitor.visit_str(&scalar.text),
            },
        }
    }
}

enum Plain {
    Bool(bool),
    Int(i64),
    Float(f64),
    Text,
}

/// YAML 1.2's core schema, without the words that older versions took for booleans (`yes`, `on`).
fn plain_value(text: &str) -> Plain {
    match text {
        "true" | "True" | "TRUE" => return Plain::Bool(true),
        "false" | "False" | "FALSE" => return Plain::Bool(false),
        _ => {}
    }
    if let Ok(value) = text.parse::<i64>() {
        return Plain::Int(value);
    }
    let numeric = text.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '-' | '+' | '.'));
    match text.parse::<f64>() {
        Ok(value) if numeric => Plain::Float(value),
        _ => Plain::Text,
    }
}

macro_rules! through_any {
    ($($method:ident)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
            self.any(visitor).map_err(|e| e.at(self.node))
        }
    )*};
}

impl<'de> Deserializer<'de> for NodeDeserializer<'_> {
    type Error = ReadError;

    through_any! {
        deserialize_any deserialize_bool deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 deserialize_f32 deserialize_f64
        deserialize_char deserialize_bytes deserialize_byte_buf deserialize_unit deserialize_seq deserialize_map
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        match self.scalar() {
            // A number is a fine text too: `password: 1234`.
            Some(scalar) if !scalar.is_null() => visitor.visit_str(&scalar.text),
            _ => self.any(visitor),
        }
        .map_err(|e| e.at(self.node))
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_identifier<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_ignored_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        visitor.visit_unit()
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ReadError> {
        if self.node.is_null() { visitor.visit_none() } else { visitor.visit_some(self) }
            .map_err(|e: ReadError| e.at(self.node))
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, ReadError> {
        self.any(visitor).map_err(|e| e.at(self.node))
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, ReadError> {
        visitor.visit_newtype_struct(self).map_err(|e: ReadError| e.at(self.node))
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, ReadError> {
        self.any(visitor).map_err(|e| e.at(self.node))
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: usize,
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        self.any(visitor).map_err(|e| e.at(self.node))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        if name == AT {
            return visitor.visit_map(AtAccess { at: self, next: 0 }).map_err(|e| e.at(self.node));
        }
        if let Some(entries) = self.node.mapping() {
            let unknown = entries.iter().filter(|(key, _)| !fields.contains(&key.name.as_str()));
            self.unknown.borrow_mut().extend(unknown.map(|(key, _)| (key.clone(), fields)));
        }
        self.any(KnownOnly { visitor, fields }).map_err(|e| e.at(self.node))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        let access = match &self.node.value {
            Value::Scalar(scalar) => EnumAccess { parent: self, variant: &scalar.text, value: None },
            Value::Mapping(entries) if entries.len() == 1 => {
                EnumAccess { parent: self, variant: &entries[0].0.name, value: Some(&entries[0].1) }
            }
            _ => return Err(ReadError::new(format!("expected one name, found {}", self.node.kind())).at(self.node)),
        };
        visitor.visit_enum(access).map_err(|e| e.at(self.node))
    }
}

/// Hides unknown keys from a derived visitor (they are already reported), so that
/// `deny_unknown_fields` does not stop at the first.
struct KnownOnly<V> {
    visitor: V,
    fields: &'static [&'static str],
}

impl<'de, V: Visitor<'de>> Visitor<'de> for KnownOnly<V> {
    type Value = V::Value;
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a mapping with {}", self.fields.iter().map(|n| format!("`{n}`")).collect::<Vec<_>>().join(", "))
    }
    fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<V::Value, A::Error> {
        self.visitor.visit_map(KnownEntries { map, fields: self.fields })
    }
    fn visit_seq<A: de::SeqAccess<'de>>(self, _: A) -> Result<V::Value, A::Error> {
        Err(de::Error::invalid_type(Unexpected::Seq, &self))
    }
}

struct KnownEntries<A> {
    map: A,
    fields: &'static [&'static str],
}

impl<'de, A: de::MapAccess<'de>> de::MapAccess<'de> for KnownEntries<A> {
    type Error = A::Error;
    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, A::Error> {
        while let Some(name) = self.map.next_key::<String>()? {
            if self.fields.contains(&name.as_str()) {
                return seed.deserialize(de::value::StringDeserializer::new(name)).map(Some);
            }
            self.map.next_value::<de::IgnoredAny>()?;
        }
        Ok(None)
    }
    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        self.map.next_value_seed(seed)
    }
}

struct Items<'a> {
    parent: NodeDeserializer<'a>,
    items: std::slice::Iter<'a, Node>,
}

impl<'de> de::SeqAccess<'de> for Items<'_> {
    type Error = ReadError;
    fn next_element_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, ReadError> {
        let Some(node) = self.items.next() else { return Ok(None) };
        seed.deserialize(self.parent.child(node)).map(Some).map_err(|e| e.at(node))
    }
}

struct Entries<'a> {
    parent: NodeDeserializer<'a>,
    entries: std::slice::Iter<'a, (Key, Node)>,
    value: Option<&'a Node>,
}

impl<'de> de::MapAccess<'de> for Entries<'_> {
    type Error = ReadError;
    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, ReadError> {
        let Some((key, node)) = self.entries.next() else { return Ok(None) };
        self.value = Some(node);
        let name = de::value::StringDeserializer::<ReadError>::new(key.name.clone());
        seed.deserialize(name).map(Some).map_err(|mut e| {
            e.position.get_or_insert(key.position);
            e
        })
    }
    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, ReadError> {
        let node = self.value.take().ok_or_else(|| ReadError::new("a value before its key"))?;
        seed.deserialize(self.parent.child(node)).map_err(|e| e.at(node))
    }
}

/// Hands [`At`](super::values::At) the place of a value before the value.
struct AtAccess<'a> {
    at: NodeDeserializer<'a>,
    next: usize,
}

impl<'de> de::MapAccess<'de> for AtAccess<'_> {
    type Error = ReadError;
    fn next_key_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<Option<S::Value>, ReadError> {
        if self.next == 4 {
            return Ok(None);
        }
        let name = ["line", "column", "verbatim", "value"][self.next];
        seed.deserialize(de::value::StrDeserializer::new(name)).map(Some)
    }
    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, ReadError> {
        use de::IntoDeserializer;
        self.next += 1;
        let node = self.at.node;
        let scalar = self.at.scalar();
        let verbatim = scalar.is_some_and(|s| s.verbatim && s.text == s.written);
        let quote = usize::from(verbatim && scalar.is_some_and(|s| !s.plain));
        match self.next {
            1 => seed.deserialize(node.position.line.into_deserializer()),
            2 => seed.deserialize((node.position.column + quote).into_deserializer()),
            3 => seed.deserialize(verbatim.into_deserializer()),
            _ => seed.deserialize(self.at),
        }
    }
}

struct EnumAccess<'a> {
    parent: NodeDeserializer<'a>,
    variant: &'a str,
    value: Option<&'a Node>,
}

impl<'a, 'de> de::EnumAccess<'de> for EnumAccess<'a> {
    type Error = ReadError;
    type Variant = VariantAccess<'a>;
    fn variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<(S::Value, VariantAccess<'a>), ReadError> {
        let variant = seed.deserialize(de::value::StrDeserializer::<ReadError>::new(self.variant))?;
        Ok((variant, VariantAccess { parent: self.parent, value: self.value }))
    }
}

struct VariantAccess<'a> {
    parent: NodeDeserializer<'a>,
    value: Option<&'a Node>,
}

impl<'a> VariantAccess<'a> {
    fn value(self) -> Result<NodeDeserializer<'a>, ReadError> {
        let node = self.value.ok_or_else(|| ReadError::new("expected a mapping with this name and a value"))?;
        Ok(self.parent.child(node))
    }
}

impl<'de> de::VariantAccess<'de> for VariantAccess<'_> {
    type Error = ReadError;
    fn unit_variant(self) -> Result<(), ReadError> {
        match self.value {
            None => Ok(()),
            Some(node) => Err(ReadError::new("this name takes no value").at(node)),
        }
    }
    fn newtype_variant_seed<S: DeserializeSeed<'de>>(self, seed: S) -> Result<S::Value, ReadError> {
        seed.deserialize(self.value()?)
    }
    fn tuple_variant<V: Visitor<'de>>(self, _: usize, visitor: V) -> Result<V::Value, ReadError> {
        self.value()?.deserialize_seq(visitor)
    }
    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ReadError> {
        self.value()?.deserialize_struct("", fields, visitor)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use serde::Deserialize;

    use super::*;
    use crate::config::values::{At, Duration};
    use crate::config::{Problems, tree};

    #[derive(Debug, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only read from YAML")]
    struct Options {
        name: String,
        count: u32,
        #[serde(default)]
        ratio: Option<f64>,
        #[serde(default)]
        mode: Mode,
        #[serde(default)]
        every: Duration,
        #[serde(default)]
        inner: Option<Inner>,
        #[serde(default)]
        list: Vec<Inner>,
        #[serde(default)]
        numbers: Vec<i64>,
        #[serde(default)]
        place: At<String>,
    }

    #[derive(Debug, Default, Deserialize, JsonSchema)]
    #[serde(rename_all = "snake_case")]
    enum Mode {
        #[default]
        Fast,
        Exact,
        Sampled(#[expect(dead_code, reason = "only read from YAML")] u8),
        Shaped {
            #[expect(dead_code, reason = "only read from YAML")]
            width: u8,
        },
    }

    #[derive(Debug, Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only read from YAML")]
    struct Inner {
        size: u8,
        #[serde(default)]
        on: bool,
    }

    /// The problems of `text` read as [`Options`], one line each; `clean` if there is none.
    fn problems(text: &str) -> Vec<String> {
        let node = tree::parse(text).expect("YAML");
        let mut problems = Problems::default();
        let read: Option<Options> =
            read(&node, &mut CheckContext::new(&mut problems, "", node.position, Path::new("")));
        assert_eq!(read.is_none(), problems.has_errors(), "{text}: {problems:?}");
        problems.sorted().iter().map(|problem| problem.to_string().replace("\n  ", " ")).collect()
    }

    #[test]
    fn every_problem_of_a_block_is_reported_with_its_place() {
        for (text, expected) in [
            ("{name: a, count: 1}", vec![]),
            ("{name: 12, count: 1, mode: exact, inner: {size: 1, on: true}, numbers: [1, -2]}", vec![]),
            ("{name: a, count: 1, mode: {sampled: 3}, ratio: 2}", vec![]),
            ("{name: a, count: 1, mode: {shaped: {width: 3}}, inner: ~}", vec![]),
            ("{}", vec!["1:1: error: `name` is missing", "1:1: error: `count` is missing"]),
            (
                "count: many\nname: [a]\nratio: high",
                vec![
                    "1:8: error: expected a whole number from 0, found `many`",
                    "2:7: error: expected a string, found a list",
                    "3:8: error: expected a number, found `high`",
                ],
            ),
            (
                "nam: a\ncount: -1\nzzzzzzzzz: 1",
                vec![
                    "1:1: error: `name` is missing",
                    "1:1: error: unknown key `nam` hint: did you mean `name`?",
                    "2:8: error: expected a whole number from 0, found `-1`",
                    "3:1: error: unknown key `zzzzzzzzz` hint: one of `name`, `count`, `ratio`, `mode`, `every`, `inner`, `list`, \
                 `numbers`, `place`",
                ],
            ),
            (
                "name: a\ncount: 1\nmode: exat\nevery: 5",
                vec![
                    "3:7: error: unknown value `exat` hint: did you mean `exact`?",
                    "4:8: error: `5` is no duration; write a number and a unit: `500ms`, `3s`, `5m`, `2h`, `1d`",
                ],
            ),
            (
                "name: a\ncount: 1\nmode: {sampled: x}\nratio: y",
                vec![
                    "3:17: error: expected a whole number from 0, found `x`",
                    "4:8: error: expected a number, found `y`",
                ],
            ),
            ("name: a\ncount: 1\nmode: {fast: 1}", vec!["3:14: error: this name takes no value"]),
            (
                "name: a\ncount: 1\nmode: {shaped: {width: 300}}\nratio: y",
                vec![
                    "3:24: error: expected a whole number from 0, found `300`",
                    "4:8: error: expected a number, found `y`",
                ],
            ),
            (
                "inner: {on: 3}\nname: a\ncount: x",
                vec![
                    "1:8: error: `size` is missing",
                    "1:13: error: expected a boolean, found `3`",
                    "3:8: error: expected a whole number from 0, found `x`",
                ],
            ),
            (
                "inner: {sise: 3, size: 256}\nname: a\ncount: x",
                vec![
                    "1:9: error: unknown key `sise` hint: did you mean `size`?",
                    "1:24: error: expected a whole number from 0, found `256`",
                    "3:8: error: expected a whole number from 0, found `x`",
                ],
            ),
            (
                "name: a\ncount: 1\nlist:\n  - {size: a}\n  - {on: true}\n  - 5\n  - {size: 1, of: 1}",
                vec![
                    "4:12: error: expected a whole number from 0, found `a`",
                    "5:5: error: `size` is missing",
                    "6:5: error: expected a mapping with `size`, `on`, found `5`",
                    "7:15: error: unknown key `of` hint: did you mean `on`?",
                ],
            ),
            (
                "name: a\ncount: 1\nnumbers: [1, x, 2, 1.5, '3']",
                vec![
                    "3:14: error: expected a whole number, found `x`",
                    "3:20: error: expected a whole number, found `1.5`",
                    "3:25: error: expected a whole number, found `3`",
                ],
            ),
            (
                "name:\ncount: 1\nratio: true",
                vec!["1:5: error: expected a string, found nothing", "3:8: error: expected a number, found `true`"],
            ),
        ] {
            assert_eq!(problems(text), expected, "{text}");
        }
    }

    #[test]
    fn a_block_that_is_no_mapping_is_one_problem() {
        for text in ["[a]", "text"] {
            let found = problems(text);
            assert!(found.len() == 1 && found[0].starts_with("1:1: error: expected"), "{text}: {found:?}");
        }
    }

    #[test]
    fn a_place_inside_a_text_is_known_where_the_characters_stand_one_for_one() {
        for (text, value, expected) in [
            ("plain text", "plain text", (1, 12)),
            ("'quoted'", "quoted", (1, 13)),
            ("\"quoted\"", "quoted", (1, 13)),
            ("'it''s'", "it's", (1, 8)),
            ("\"tab\\t!\"", "tab\t!", (1, 8)),
            ("näme ü", "näme ü", (1, 12)),
        ] {
            let node = tree::parse(&format!("place: {text}")).expect("YAML");
            let node = node.get("place").expect("a value");
            let mut problems = Problems::default();
            let mut cx = CheckContext::new(&mut problems, "", node.position, Path::new(""));
            let at: At<String> = read(node, &mut cx).expect("a text");
            let place = at.place_of(Some(4));
            assert_eq!((at.value.as_str(), (place.line, place.column)), (value, expected), "{text}");
        }
        for (text, line) in [
            ("place: >\n  a folded\n  text", 2),
            ("place: |\n  a block", 2),
            ("place: a plain\n  text", 1),
            ("place: 'a\n  b'", 1),
        ] {
            let node = tree::parse(text).expect("YAML");
            let node = node.get("place").expect("a value");
            let mut problems = Problems::default();
            let mut cx = CheckContext::new(&mut problems, "", node.position, Path::new(""));
            let at: At<String> = read(node, &mut cx).expect("a text");
            assert_eq!(at.place_of(Some(3)), at.position, "{text}: the place is the whole");
            assert_eq!(at.position.line, line, "{text}");
        }
    }
}
