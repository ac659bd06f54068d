//! The file as a whole: typed entries with positions, the plugins' own options still as trees.

use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::Deserialize;

use super::check::CheckContext;
use super::problems::{Position, Problems, did_you_mean};
use super::tree::{Key, Node, Value};
use super::values::{At, Duration};
use super::{deserialize, environment, tree};
use crate::log::Durability;

/// Default of `server.listen`: this machine only, because there is no authentication yet.
pub const LISTEN: &str = "127.0.0.1:8080";

/// The HTTP listener.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ServerConfig {
    /// Address and port of the HTTP listener. Default `127.0.0.1:8080`: this machine only.
    #[serde(default = "default_listen")]
    pub listen: At<String>,
}

fn default_listen() -> At<String> {
    At::nowhere(LISTEN.to_owned())
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self { listen: default_listen() }
    }
}

/// Checkpoints.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointConfig {
    /// Time between two checkpoints. Default `1s`: history is at most that much behind its `roll`.
    #[serde(default = "default_every")]
    pub every: At<Duration>,
    /// Folder of the state, counted from the YAML file's folder. Default `state`.
    #[serde(default = "default_dir")]
    pub dir: String,
    /// What acknowledged rows outlive. Default `power`: a power cut, for one sync of the disk per group of rows.
    #[serde(default)]
    pub durability: Durability,
}

fn default_every() -> At<Duration> {
    At::nowhere(Duration::from_secs(1))
}

fn default_dir() -> String {
    "state".to_owned()
}

impl Default for CheckpointConfig {
    fn default() -> Self {
        Self { every: default_every(), dir: default_dir(), durability: Durability::default() }
    }
}

/// What is asked of every source and sink of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Guarantee {
    /// Nothing is lost and nothing comes twice, through crashes: what cannot promise it is refused.
    ExactlyOnce,
}

/// Where a source's event time comes from.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EventTimeConfig {
    /// The timestamp column.
    pub field: At<String>,
    /// How far a row may come behind the newest one before a window calls it late. Default `0s`.
    #[serde(default)]
    pub lateness: Duration,
    /// After so long without a row, a connected source no longer holds the watermark back. Default `10s`.
    #[serde(default = "default_idle")]
    pub idle: Duration,
}

fn default_idle() -> Duration {
    Duration::from_secs(10)
}

/// The keys of a source that the engine reads; the others are the plugin's.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SourceCommon {
    /// The kind of source.
    #[serde(rename = "type")]
    pub type_name: At<String>,
    /// Where event time comes from. Without it, event time is the time of receipt.
    #[serde(default)]
    pub event_time: Option<EventTimeConfig>,
    /// The sink for rows that cannot be read. Without it they are only counted and logged.
    #[serde(default)]
    pub errors: Option<At<String>>,
    /// Poll only while somebody wants the rows: a live subscriber or a durable sink. Default `false`.
    #[serde(default)]
    pub on_demand: At<bool>,
}

/// The keys of a pipeline.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PipelineConfig {
    /// A source or another pipeline, or a list of them.
    pub from: From,
    /// Names of sinks.
    #[serde(default)]
    pub to: OneOrMany,
    /// Key columns, where no window gives them: what live clients filter by and the latest row is kept for.
    #[serde(default)]
    pub key: OneOrMany,
}

/// One name or a list of names.
pub type From = OneOrMany;

/// One name or a list of names.
#[derive(Clone, Debug, Default)]
pub struct OneOrMany(pub Vec<At<String>>);

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NamesVisitor;
        impl<'de> serde::de::Visitor<'de> for NamesVisitor {
            type Value = OneOrMany;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a name or a list of names")
            }
            fn visit_str<E>(self, name: &str) -> Result<OneOrMany, E> {
                Ok(OneOrMany(vec![At::nowhere(name.to_owned())]))
            }
            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut names: A) -> Result<OneOrMany, A::Error> {
                let mut list = Vec::new();
                while let Some(name) = names.next_element()? {
                    list.push(name);
                }
                Ok(OneOrMany(list))
            }
        }
        deserializer.deserialize_any(NamesVisitor)
    }
}

impl JsonSchema for OneOrMany {
    fn inline_schema() -> bool {
        true
    }
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Names".into()
    }
    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]})
    }
}

/// A source as written.
#[derive(Debug)]
pub struct SourceEntry {
    /// Its name.
    pub name: At<String>,
    /// Start of its block.
    pub position: Position,
    /// What the engine reads.
    pub common: SourceCommon,
    /// What the plugin reads.
    pub options: Node,
}

/// A pipeline as written.
#[derive(Debug)]
pub struct PipelineEntry {
    /// Its name.
    pub name: At<String>,
    /// Start of its block.
    pub position: Position,
    /// Inputs, sinks and keys.
    pub config: PipelineConfig,
    /// Whether `config` lacks what could not be read, which is reported already.
    pub is_partial: bool,
    /// Its steps in order.
    pub steps: Vec<StepEntry>,
}

/// A step as written.
#[derive(Debug)]
pub struct StepEntry {
    /// The operator's name.
    pub name: At<String>,
    /// What the plugin reads; `None` if this is no step, which is reported already.
    pub options: Option<Node>,
}

/// A sink as written.
#[derive(Debug)]
pub struct SinkEntry {
    /// Its name.
    pub name: At<String>,
    /// Start of its block.
    pub position: Position,
    /// The word after `type:`.
    pub type_name: At<String>,
    /// What the plugin reads.
    pub options: Node,
}

/// A parsed file.
#[derive(Debug, Default)]
pub struct Pipelines {
    /// The folder that relative paths count from.
    pub folder: PathBuf,
    /// The HTTP listener.
    pub server: ServerConfig,
    /// Checkpoints.
    pub checkpoint: CheckpointConfig,
    /// What is asked of every source and sink. Default: what each of them can promise.
    pub guarantee: Option<Guarantee>,
    /// Sources in file order.
    pub sources: Vec<SourceEntry>,
    /// Pipelines in file order.
    pub pipelines: Vec<PipelineEntry>,
    /// Sinks in file order.
    pub sinks: Vec<SinkEntry>,
    /// Names of entries that could not be read: what refers to them is not wrong for that.
    pub unreadable: Vec<String>,
}

/// Parses the text of a file that lies in `folder`. What cannot be read is left out; why is in `problems`.
pub fn parse(text: &str, folder: &Path, lookup: &dyn Fn(&str) -> Option<String>, problems: &mut Problems) -> Pipelines {
    let mut file = Pipelines { folder: folder.to_owned(), ..Pipelines::default() };
    let mut wrong = Vec::new();
    let root = tree::parse_on(text, &mut wrong);
    wrong.into_iter().for_each(|problem| problems.push(problem));
    let Some(mut root) = root else { return file };
    environment::expand(&mut root, lookup, problems);
    let mut cx = CheckContext::new(problems, "", root.position, folder);
    let Value::Mapping(sections) = root.value else {
        cx.error(root.position, "the file must be a mapping with `sources`, `pipelines` and `sinks`");
        return file;
    };
    for (key, node) in sections {
        file.section(&key, node, &mut cx);
    }
    file
}

/// The keys of a file.
const SECTIONS: [&str; 6] = ["server", "checkpoint", "guarantee", "sources", "pipelines", "sinks"];

impl Pipelines {
    fn section(&mut self, key: &Key, node: Node, cx: &mut CheckContext<'_>) {
        match key.name.as_str() {
            _ if node.is_null() => {}
            "server" => {
                let mut cx = cx.part("server", key.position);
                self.server = deserialize::read_rest(&node, &mut cx).unwrap_or_default();
            }
            "checkpoint" => {
                let mut cx = cx.part("checkpoint", key.position);
                self.checkpoint = deserialize::read_rest(&node, &mut cx).unwrap_or_default();
            }
            "guarantee" => {
                let mut cx = cx.part("guarantee", key.position);
                self.guarantee = deserialize::read(&node, &mut cx);
            }
            "sources" => self.sources = self.entries(key, node, "source", cx, source_entry),
            "pipelines" => self.pipelines = self.entries(key, node, "pipeline", cx, pipeline_entry),
            "sinks" => self.sinks = self.entries(key, node, "sink", cx, sink_entry),
            other => {
                cx.error_hint(key.position, format!("unknown key `{other}`"), did_you_mean(other, SECTIONS));
            }
        }
    }

    /// Reads every entry of a section.
    fn entries<T>(
        &mut self,
        key: &Key,
        node: Node,
        kind: &str,
        cx: &mut CheckContext<'_>,
        read: ReadEntry<T>,
    ) -> Vec<T> {
        let Value::Mapping(entries) = node.value else {
            cx.error(node.position, format!("`{}` must be a mapping from names to {kind}s", key.name));
            return Vec::new();
        };
        let mut list = Vec::new();
        for (name, node) in entries {
            let mut cx = cx.part(format!("{kind} {}", name.name), name.position);
            if !is_name(&name.name) {
                let hint = "letters, digits and underscores, not starting with a digit".to_owned();
                cx.error_hint(name.position, format!("`{}` is no name", name.name), Some(hint));
            }
            let at = At { position: name.position, verbatim: true, value: name.name.clone() };
            let entry = if node.mapping().is_some() {
                read(at, node, &mut cx)
            } else {
                cx.error(node.position, format!("expected a mapping, found {}", node.kind()));
                None
            };
            match entry {
                Some(entry) => list.push(entry),
                None => self.unreadable.push(name.name),
            }
        }
        list
    }
}

type ReadEntry<T> = fn(At<String>, Node, &mut CheckContext<'_>) -> Option<T>;

/// Whether `name` matches `[A-Za-z_][A-Za-z0-9_]*`.
pub fn is_name(name: &str) -> bool {
    let first = name.chars().next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_');
    first && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

/// Takes the entries named in `names` out of a mapping, as a mapping of its own.
fn split(node: &mut Node, names: &[&str]) -> Node {
    let taken = match &mut node.value {
        Value::Mapping(entries) => {
            entries.extract_if(.., |(key, _)| names.contains(&key.name.as_str())).collect::<Vec<_>>()
        }
        _ => Vec::new(),
    };
    Node { position: node.position, value: Value::Mapping(taken) }
}

fn source_entry(name: At<String>, mut options: Node, cx: &mut CheckContext<'_>) -> Option<SourceEntry> {
    let position = name.position;
    let common = split(&mut options, &["type", "event_time", "errors", "on_demand"]);
    options.position = position;
    let common = deserialize::read_rest(&Node { position, ..common }, cx)?;
    Some(SourceEntry { name, position, common, options })
}

/// The scalars of a node: itself, or the items of a list.
fn texts(node: &Node) -> Vec<At<String>> {
    let nodes = match &node.value {
        Value::Sequence(items) => items.as_slice(),
        _ => std::slice::from_ref(node),
    };
    let text = |node: &Node| Some(At { position: node.position, verbatim: true, value: node.text()?.to_owned() });
    nodes.iter().filter_map(text).collect()
}

fn sink_entry(name: At<String>, mut options: Node, cx: &mut CheckContext<'_>) -> Option<SinkEntry> {
    #[derive(Deserialize, JsonSchema)]
    #[serde(deny_unknown_fields)]
    struct Common {
        #[serde(rename = "type")]
        type_name: At<String>,
    }
    let position = name.position;
    let common = split(&mut options, &["type"]);
    options.position = position;
    let common: Common = deserialize::read(&Node { position, ..common }, cx)?;
    Some(SinkEntry { name, position, type_name: common.type_name, options })
}

fn pipeline_entry(name: At<String>, mut node: Node, cx: &mut CheckContext<'_>) -> Option<PipelineEntry> {
    let position = name.position;
    let steps = node.remove("steps").filter(|steps| !steps.is_null());
    let steps = steps.map_or_else(Vec::new, |steps| step_entries(steps, cx));
    for field in ["from", "to", "key"] {
        place_single_name(&mut node, field);
    }
    node.position = position;
    // Without a `from` the steps are still looked at.
    let config = deserialize::read_rest(&node, cx);
    let is_partial = config.is_none();
    let config = config.unwrap_or_else(|| {
        let names = |field| OneOrMany(node.get(field).map(texts).unwrap_or_default());
        PipelineConfig { from: names("from"), to: names("to"), key: names("key") }
    });
    Some(PipelineEntry { name, position, config, is_partial, steps })
}

/// `from: a` as `from: [a]`, so that the name keeps its place.
fn place_single_name(node: &mut Node, field: &str) {
    let Value::Mapping(entries) = &mut node.value else { return };
    for (_, value) in entries.iter_mut().filter(|(key, _)| key.name == field) {
        if value.text().is_some() && !value.is_null() {
            let single = value.clone();
            value.value = Value::Sequence(vec![single]);
        }
    }
}

fn step_entries(steps: Node, cx: &mut CheckContext<'_>) -> Vec<StepEntry> {
    let no_step = |position, name: &str| StepEntry {
        name: At { position, verbatim: false, value: name.to_owned() },
        options: None,
    };
    let Value::Sequence(items) = steps.value else {
        let hint = "start each step with its own `- `: `- filter: x > 0`".to_owned();
        cx.error_hint(steps.position, format!("`steps` must be a list, found {}", steps.kind()), Some(hint));
        return vec![no_step(steps.position, "steps")];
    };
    let mut list = Vec::new();
    for item in items {
        match item.value {
            Value::Mapping(mut entries) if entries.len() == 1 => {
                let (key, options) = entries.remove(0);
                let name = At { position: key.position, verbatim: true, value: key.name };
                list.push(StepEntry { name, options: Some(options) });
            }
            _ => {
                let hint = Some("start each step with its own `- `: `- filter: x > 0`".to_owned());
                cx.error_hint(item.position, "a step is one operator with its options".to_owned(), hint);
                list.push(no_step(item.position, "step"));
            }
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> (Pipelines, Vec<String>) {
        let mut problems = Problems::default();
        let lookup = |name: &str| (name == "KIND").then(|| "mqtt".to_owned());
        let file = parse(text, Path::new("/folder"), &lookup, &mut problems);
        (file, problems.sorted().iter().map(|problem| problem.to_string().replace("\n  ", " ")).collect())
    }

    #[test]
    fn a_file_is_read_with_its_places_and_defaults() {
        let (file, problems) = read(concat!(
            "server: {listen: '0.0.0.0:80'}\n",
            "sinks:\n",
            "sources:\n",
            "  devices: {type: \"${KIND}\", url: here, event_time: {field: ts}}\n",
            "pipelines:\n",
            "  load:\n",
            "    from: devices\n",
            "    to: [live, history]\n",
            "    steps:\n",
            "      - filter: x > 0\n",
            "      - window: {size: 1s}\n",
        ));
        assert_eq!(problems, Vec::<String>::new());
        assert_eq!((file.server.listen.as_str(), file.checkpoint.dir.as_str()), ("0.0.0.0:80", "state"));
        let source = &file.sources[0];
        assert_eq!((source.name.as_str(), source.common.type_name.as_str()), ("devices", "mqtt"));
        assert!(source.options.get("url").is_some() && source.options.get("type").is_none());
        let pipeline = &file.pipelines[0];
        let places = |names: &OneOrMany| {
            names
                .0
                .iter()
                .map(|name| (name.value.clone(), name.position.line, name.position.column))
                .collect::<Vec<_>>()
        };
        assert_eq!(places(&pipeline.config.from), [("devices".to_owned(), 7, 11)]);
        assert_eq!(places(&pipeline.config.to), [("live".to_owned(), 8, 10), ("history".to_owned(), 8, 16)]);
        let steps: Vec<&str> = pipeline.steps.iter().map(|step| step.name.as_str()).collect();
        assert_eq!(steps, ["filter", "window"]);
        assert!(file.sinks.is_empty());
    }

    #[test]
    fn what_is_wrong_in_one_entry_hides_nothing_in_another() {
        for (text, expected) in [
            ("- a", vec!["1:1: error: the file must be a mapping with `sources`, `pipelines` and `sinks`"]),
            ("source: {}", vec!["1:1: error: unknown key `source` hint: did you mean `sources`?"]),
            ("sources: [a]", vec!["1:10: error: `sources` must be a mapping from names to sources"]),
            (
                "server: {port: 80}\ncheckpoint: {every: soon}",
                vec![
                    "1:10: error: server: unknown key `port` hint: one of `listen`",
                    "2:21: error: checkpoint: `soon` is no duration; write a number and a unit: `500ms`, `3s`, `5m`, `2h`, `1d`",
                ],
            ),
            (
                "sources:\n  1st: {type: a}\n  b: text\n  c: {url: x}",
                vec![
                    "2:3: error: source 1st: `1st` is no name hint: letters, digits and underscores, not starting with a digit",
                    "3:6: error: source b: expected a mapping, found `text`",
                    "4:3: error: source c: `type` is missing",
                ],
            ),
            (
                "sources:\n  a: {type: x, event_time: {feild: ts}, on_demand: 3}",
                vec![
                    "2:28: error: source a: `field` is missing",
                    "2:29: error: source a: unknown key `feild` hint: did you mean `field`?",
                    "2:52: error: source a: expected a boolean, found `3`",
                ],
            ),
            (
                "pipelines:\n  p: {to: a, stps: []}\n  q: {from: 5, steps: {a: 1}}",
                vec![
                    "2:3: error: pipeline p: `from` is missing",
                    "2:14: error: pipeline p: unknown key `stps` hint: one of `from`, `to`, `key`",
                    "3:23: error: pipeline q: `steps` must be a list, found a mapping hint: start each step with its own `- `: \
                     `- filter: x > 0`",
                ],
            ),
            (
                "pipelines:\n  p:\n    from: a\n    steps:\n      - filter\n      - {a: 1, b: 2}\n      - c: 1",
                vec![
                    "5:9: error: pipeline p: a step is one operator with its options hint: start each step with its own `- `: \
                 `- filter: x > 0`",
                    "6:9: error: pipeline p: a step is one operator with its options hint: start each step with its own `- `: \
                 `- filter: x > 0`",
                ],
            ),
            (
                "sinks:\n  s: {}\n  t: {type: [x]}",
                vec!["2:3: error: sink s: `type` is missing", "3:13: error: sink t: expected a string, found a list"],
            ),
        ] {
            assert_eq!(read(text).1, expected, "{text}");
        }
    }

    #[test]
    fn steps_and_options_are_kept_where_other_keys_are_wrong() {
        let (file, problems) = read(concat!(
            "sources: {a: {type: x, on_demand: 3, url: y}}\n",
            "pipelines: {p: {from: [a, {b: 1}], steps: [{filter: z}]}}\n",
        ));
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(file.sources[0].options.get("url").is_some());
        assert_eq!((file.pipelines[0].config.from.0.len(), file.pipelines[0].steps.len()), (1, 1));
    }
}
