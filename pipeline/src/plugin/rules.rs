//! Rules that hold for every plugin, for the tests that walk the lists: unique snake_case names, a page, an
//! example that checks clean, a description of every option, and unknown keys reported by name and place.
//!
//! Each function takes a list and returns what breaks a rule, one line each, so that a test shows all at once:
//!
//! ```
//! # use pipeline::plugin::{SourcePlugin, rules};
//! const SOURCES: &[SourcePlugin] = &[];
//! assert_eq!(rules::broken_by_sources(SOURCES), Vec::<String>::new());
//! ```

use std::collections::HashSet;
use std::path::Path;

use schemars::Schema;
use serde_json::Value as Json;

use super::operator::{OperatorPlugin, StreamShape};
use super::sink::{SinkInput, SinkPlugin, SinkShape};
use super::source::{SourcePlugin, SourceShape};
use crate::config::tree::{self, Key, Node, Scalar, Value};
use crate::config::{CheckContext, Position, Problems};
use crate::schema::{FieldType, schema_of};

/// Keys of a source's block that the engine reads; the plugin never sees them.
const SOURCE_KEYS_OF_THE_ENGINE: [&str; 4] = ["type", "event_time", "errors", "on_demand"];
/// Keys of a sink's block that the engine reads.
const SINK_KEYS_OF_THE_ENGINE: [&str; 1] = ["type"];
/// No plugin has an option of this name.
const UNKNOWN_KEY: &str = "no_such_option";
/// Where the unknown key is put: no example is that long.
const UNKNOWN_KEY_AT: Position = Position { line: 9_999, column: 7 };

/// What breaks a rule in a list of sources.
pub fn broken_by_sources(plugins: &[SourcePlugin]) -> Vec<String> {
    let mut broken = names(plugins.iter().map(|p| p.type_name));
    for plugin in plugins {
        let mut rules = Rules::new("source", plugin.type_name, &mut broken);
        rules.page(plugin.page);
        rules.schema(&(plugin.schema)());
        let Some(block) = rules.block(plugin.example, &SOURCE_KEYS_OF_THE_ENGINE) else { continue };
        let mut shape = None;
        rules.clean(|cx| {
            shape = (plugin.read)(&block, cx).and_then(|source| source.check(cx));
            shape.is_some()
        });
        let names_it = |shape: &SourceShape| plugin.promises.iter().any(|(_, promise)| *promise == shape.delivery);
        rules.promise(shape.as_ref().is_none_or(names_it));
        rules.unknown_key(&block, |block, cx| (plugin.read)(block, cx).is_some());
    }
    broken
}

/// What breaks a rule in a list of operators.
pub fn broken_by_operators(plugins: &[OperatorPlugin]) -> Vec<String> {
    let mut broken = names(plugins.iter().map(|p| p.type_name));
    for plugin in plugins {
        let mut rules = Rules::new("operator", plugin.type_name, &mut broken);
        rules.page(plugin.page);
        rules.schema(&(plugin.schema)());
        let Some(options) = rules.step(plugin.example) else { continue };
        rules.clean(|cx| {
            let Some(step) = (plugin.read)(&options, cx) else { return false };
            // Side inputs have the columns of the main one.
            let inputs = vec![example_shape(); 1 + step.side_inputs().len()];
            step.plan(&inputs, cx).is_some()
        });
        rules.unknown_key(&options, |options, cx| (plugin.read)(options, cx).is_some());
    }
    broken
}

/// What breaks a rule in a list of sinks.
pub fn broken_by_sinks(plugins: &[SinkPlugin]) -> Vec<String> {
    let mut broken = names(plugins.iter().map(|p| p.type_name));
    let inputs = [SinkInput { metric: "device_load".to_owned(), shape: example_shape() }];
    for plugin in plugins {
        let mut rules = Rules::new("sink", plugin.type_name, &mut broken);
        rules.page(plugin.page);
        rules.schema(&(plugin.schema)());
        let Some(block) = rules.block(plugin.example, &SINK_KEYS_OF_THE_ENGINE) else { continue };
        let check = |block: &Node, cx: &mut CheckContext<'_>| (plugin.read)(block, cx)?.check(&inputs, cx);
        let mut shape = None;
        rules.clean(|cx| {
            shape = check(&block, cx);
            shape.is_some()
        });
        rules.unknown_key(&block, |block, cx| (plugin.read)(block, cx).is_some());
        let names_it = |shape: &SinkShape| plugin.promises.iter().any(|(_, promise)| *promise == shape.promise);
        rules.promise(shape.as_ref().is_none_or(names_it));
        // What is neither live nor staged in files is delivered from an outbox.
        if shape.is_some_and(|shape| !shape.live && shape.history.is_none()) {
            rules.batch(&block, |block, cx| check(block, cx).is_some());
        }
    }
    broken
}

/// The rows that every operator's and sink's example checks clean over.
pub fn example_shape() -> StreamShape {
    let columns =
        [("device_id", FieldType::String), ("latency_ms", FieldType::Float), ("ts", FieldType::Timestamp(None))];
    StreamShape { schema: schema_of(columns), keys: vec!["device_id".to_owned()], windowed: false }
}

/// Names that are not unique or not snake_case.
fn names(names: impl Iterator<Item = &'static str>) -> Vec<String> {
    let mut seen = HashSet::new();
    let mut broken = Vec::new();
    for name in names {
        let snake = name.starts_with(|c: char| c.is_ascii_lowercase())
            && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_');
        if !snake {
            broken.push(format!("`{name}` is not snake_case"));
        }
        if !seen.insert(name) {
            broken.push(format!("`{name}` stands twice in the list"));
        }
    }
    broken
}

/// Collects what one plugin breaks.
struct Rules<'a> {
    node: String,
    type_name: &'static str,
    broken: &'a mut Vec<String>,
}

impl<'a> Rules<'a> {
    fn new(kind: &str, type_name: &'static str, broken: &'a mut Vec<String>) -> Self {
        Self { node: format!("{kind} {type_name}"), type_name, broken }
    }

    fn broken(&mut self, what: impl std::fmt::Display) {
        self.broken.push(format!("{}: {what}", self.node));
    }

    /// The page begins with one sentence.
    fn page(&mut self, page: &str) {
        let first = page.lines().next().unwrap_or_default();
        let one_sentence = first.ends_with('.') && !first.starts_with('#') && !first.contains(". ");
        if !one_sentence {
            self.broken(format!("the page's first line is not one sentence: `{first}`"));
        }
    }

    /// The promises name that of the example.
    fn promise(&mut self, names_it: bool) {
        if !names_it {
            self.broken("`PROMISES` does not name what the example promises");
        }
    }

    /// Every option has a description.
    fn schema(&mut self, schema: &Schema) {
        let root = schema.as_value();
        let options = root.get("properties").or_else(|| root.get("oneOf")).or_else(|| root.get("anyOf"));
        if options.is_none() && !is_described(root) {
            self.broken("the option has no description");
        }
        // Else an editor that knows the schema shows a misspelt key as fine.
        if root.get("properties").is_some() && root.get("additionalProperties") != Some(&Json::Bool(false)) {
            self.broken("unknown keys pass the schema: `#[serde(deny_unknown_fields)]` is missing");
        }
        let mut missing = Vec::new();
        undescribed(root, "", &mut missing);
        for path in missing {
            self.broken(format!("option `{path}` has no description"));
        }
    }

    /// An example block with its `type:`, without the keys that the engine reads.
    fn block(&mut self, example: &str, engine_keys: &[&str]) -> Option<Node> {
        let mut block = self.parse(example)?;
        let named = block.get("type").and_then(Node::text).map(str::to_owned);
        if named.as_deref() != Some(self.type_name) {
            self.broken(format!("the example's `type:` is {named:?}"));
        }
        for key in engine_keys {
            block.remove(key);
        }
        Some(block)
    }

    /// What stands after the name in an example step.
    fn step(&mut self, example: &str) -> Option<Node> {
        let step = self.parse(example)?;
        match step.mapping() {
            Some([(name, options)]) if name.name == self.type_name => Some(options.clone()),
            _ => {
                self.broken(format!("the example is not one step `{}: …`", self.type_name));
                None
            }
        }
    }

    fn parse(&mut self, example: &str) -> Option<Node> {
        match tree::parse(example) {
            Ok(node) if node.mapping().is_some() => Some(node),
            Ok(node) => {
                self.broken(format!("the example is {}, not a mapping", node.kind()));
                None
            }
            Err(problems) => {
                problems.iter().for_each(|problem| self.broken(format!("the example: {problem}")));
                None
            }
        }
    }

    /// The example is read and checked without an error.
    fn clean(&mut self, check: impl FnOnce(&mut CheckContext<'_>) -> bool) {
        let mut problems = Problems::default();
        let passed = check(&mut self.context(&mut problems));
        if !passed || problems.errors() > 0 {
            self.broken(format!("the example does not check clean:\n{}", problems.render("example")));
        }
    }

    /// An unknown key is reported by its name, where it stands.
    fn unknown_key(&mut self, block: &Node, read: impl FnOnce(&Node, &mut CheckContext<'_>) -> bool) {
        let mut block = block.clone();
        // A step such as `filter: x > 0` has no keys.
        let Value::Mapping(entries) = &mut block.value else { return };
        let key = Key { position: UNKNOWN_KEY_AT, name: UNKNOWN_KEY.to_owned() };
        entries.push((key, number("1", UNKNOWN_KEY_AT.right(20))));
        let mut problems = Problems::default();
        let passed = read(&block, &mut self.context(&mut problems));
        let reported =
            problems.sorted().iter().any(|p| p.position == UNKNOWN_KEY_AT && p.message.contains(UNKNOWN_KEY));
        if passed || !reported {
            self.broken("an unknown key is not reported by name and place: is a struct flattened?");
        }
    }

    /// A sink with an outbox has the option `batch`, and says where it cannot be.
    fn batch(&mut self, block: &Node, check: impl Fn(&Node, &mut CheckContext<'_>) -> bool) {
        for (rows, every, is_right) in [("50", "2s", true), ("0", "2s", false), ("8193", "0s", false)] {
            let mut block = block.clone();
            block.remove("batch");
            let Value::Mapping(entries) = &mut block.value else { return };
            let key = |name: &str| Key { position: UNKNOWN_KEY_AT, name: name.to_owned() };
            let options =
                vec![(key("rows"), number(rows, UNKNOWN_KEY_AT)), (key("every"), number(every, UNKNOWN_KEY_AT))];
            entries.push((key("batch"), Node { position: UNKNOWN_KEY_AT, value: Value::Mapping(options) }));
            let mut problems = Problems::default();
            let passed = check(&block, &mut self.context(&mut problems));
            let reported = problems
                .sorted()
                .iter()
                .any(|p| p.position == UNKNOWN_KEY_AT && p.message.starts_with("`rows` is 1 to"));
            if passed != is_right || reported == is_right {
                let problems = problems.render("example");
                self.broken(format!(
                    "`batch: {{rows: {rows}, every: {every}}}` is not what `BatchOptions` make of it:\n{problems}"
                ));
            }
        }
    }

    fn context<'p>(&self, problems: &'p mut Problems) -> CheckContext<'p> {
        CheckContext::new(problems, self.node.clone(), Position { line: 1, column: 1 }, Path::new("."))
    }
}

/// An unquoted scalar.
fn number(text: &str, position: Position) -> Node {
    let scalar = Scalar { text: text.to_owned(), written: text.to_owned(), plain: true, verbatim: true };
    Node { position, value: Value::Scalar(scalar) }
}

/// Whether a schema says what it is for.
fn is_described(schema: &Json) -> bool {
    schema.get("description").and_then(Json::as_str).is_some_and(|text| !text.trim().is_empty())
}

/// The paths of all properties below `schema`, its `$defs` included, that lack a description.
fn undescribed(schema: &Json, path: &str, missing: &mut Vec<String>) {
    match schema {
        Json::Object(object) => {
            for (key, below) in object {
                if key == "properties" {
                    properties(below, path, missing);
                } else {
                    undescribed(below, path, missing);
                }
            }
        }
        Json::Array(items) => items.iter().for_each(|item| undescribed(item, path, missing)),
        _ => {}
    }
}

fn properties(properties: &Json, path: &str, missing: &mut Vec<String>) {
    for (name, schema) in properties.as_object().into_iter().flatten() {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        if !is_described(schema) {
            missing.push(path.clone());
        }
        undescribed(schema, &path, missing);
    }
}

#[cfg(test)]
mod tests {
    use schemars::JsonSchema;
    use serde::Deserialize;

    use super::*;
    use crate::error::{Error, Result};
    use crate::plugin::{
        Delivery, Promise, Schedule, Sink, SinkConfig, SinkContext, Source, SourceConfig, SourceContext,
    };

    macro_rules! source {
        ($name:ident, $type_name:literal, $page:literal, $example:literal, $promises:expr) => {
            impl SourceConfig for $name {
                const TYPE: &'static str = $type_name;
                const PAGE: &'static str = $page;
                const EXAMPLE: &'static str = $example;
                const PROMISES: &'static [(&'static str, Delivery)] = $promises;

                fn check(&self, _: &mut CheckContext<'_>) -> Option<SourceShape> {
                    Some(SourceShape {
                        schema: example_shape().schema,
                        delivery: Delivery::Sampled,
                        schedule: Schedule::Continuous,
                        bounded: false,
                        can_be_on_demand: false,
                        mounts: Vec::new(),
                    })
                }

                fn build(&self, _: SourceContext) -> Result<Box<dyn Source>> {
                    Err(Error::internal("never built"))
                }
            }
        };
    }

    #[derive(Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Good {
        /// Where.
        #[serde(rename = "url")]
        _url: String,
    }
    source!(
        Good,
        "good",
        "Gives rows.\n\n## Emits",
        "type: good\nurl: a\nevent_time: {field: ts}",
        &[("", Delivery::Sampled)]
    );

    #[derive(Deserialize, JsonSchema)]
    struct Bad {
        #[serde(rename = "url")]
        _url: Nested,
    }
    #[derive(Deserialize, JsonSchema)]
    struct Nested {
        #[serde(rename = "host")]
        _host: String,
    }
    source!(Bad, "Bad", "# Bad", "type: bat\nurl: {}", &[]);

    #[derive(Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Silent {}
    source!(Silent, "silent", "Gives rows.", "type: silent", &[("", Delivery::Replayable)]);

    /// An outbox sink, since it is neither live nor history, but without `batch`.
    #[derive(Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Unbatched {}
    impl SinkConfig for Unbatched {
        const TYPE: &'static str = "unbatched";
        const PAGE: &'static str = "Takes rows.\n\n## Writes";
        const EXAMPLE: &'static str = "type: unbatched";
        const PROMISES: &'static [(&'static str, Promise)] = &[("", Promise::AtLeastOnce)];

        fn check(&self, _: &[SinkInput], _: &mut CheckContext<'_>) -> Option<SinkShape> {
            Some(SinkShape::default())
        }

        fn build(&self, _: SinkContext) -> Result<Sink> {
            Err(Error::internal("never built"))
        }
    }

    #[test]
    fn a_sink_with_an_outbox_has_the_option_batch() {
        let broken = broken_by_sinks(&[SinkPlugin::of::<Unbatched>()]);
        assert!(!broken.is_empty() && broken.iter().all(|one| one.contains("`batch: {rows: ")), "{broken:?}");
    }

    #[test]
    fn what_breaks_a_rule_is_named_and_what_does_not_passes() {
        assert_eq!(broken_by_sources(&[SourcePlugin::of::<Good>()]), Vec::<String>::new());
        let silent = broken_by_sources(&[SourcePlugin::of::<Silent>()]);
        assert!(silent.iter().any(|one| one.contains("`PROMISES` does not name")), "{silent:?}");
        let broken = broken_by_sources(&[SourcePlugin::of::<Bad>(), SourcePlugin::of::<Bad>()]).join("\n");
        for expected in [
            "not snake_case",
            "twice",
            "not one sentence",
            "`url` has no description",
            "`host` has no description",
            "`type:` is Some(\"bat\")",
            "`host` is missing",
            "deny_unknown_fields",
        ] {
            assert!(broken.contains(expected), "{expected} in {broken}");
        }
    }
}
