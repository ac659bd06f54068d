//! `pipeline docs`: the page, options and example of a plugin or of what all of a kind share, or the list of all.

use std::fmt::Write;

use clap::Args;
use pipeline::config::did_you_mean;
use pipeline::config::pipelines::{PipelineConfig, SourceCommon};
use pipeline::plugin::BatchOptions;
use schemars::{JsonSchema, Schema, schema_for};
use serde_json::Value;

use super::{Failure, print};
use crate::plugins::PLUGINS;

#[derive(Debug, Args)]
pub(super) struct Docs {
    /// The plugin's name; `source mqtt` or `sink mqtt` where two have one name; `source`, `pipeline` or `sink` alone for
    /// what all of them share
    #[arg(num_args = 0..=2)]
    plugin: Vec<String>,
}

const SOURCE_PAGE: &str = "\
Keys that every source has beside its own: the time of its rows, where wrong rows go, and whether it waits for demand.

## Time
`event_time` names the column that says when a row happened; without it that is the time of receipt. Windows go by it. The
watermark trails the newest time by `lateness`: rows may come in any order within it. A source from which no row has come for
`idle` does not hold the others back; one that is away, catching up or held back does, and `/health` shows it.

## Wrong rows
A row that does not fit `fields` is counted and logged, and the others go on. With `errors: SINK` it goes to that sink too, as
the metric `NAME_errors` with the columns `source`, `time`, `error` and `payload` (its first 1024 bytes). A column that the
row lacks is null, and no error; but a row without the time that `event_time` names belongs into no window and is a wrong row.
(An `http` source has answered by then: with `required` it refuses such a row.)

## Demand
With `on_demand: true` a polled source asks only while somebody wants its rows: a subscriber of a metric made of them, or a
durable sink (every one but `websocket` and `sse`). A `GET` of the metric counts for a minute. The first demand polls at
once. Sources that would miss rows meanwhile refuse it.

## Delivery
The page of each source says it. `guarantee: exactly_once` at the top of the file, beside `checkpoint`, refuses every source
and sink that may lose rows or repeat them, and names what to use instead; without it `check` notes sources that lose rows on
their way to a durable sink. What the engine does for all of them: it connects again with back-off (0.1 s, doubling to
15 s), and reads on from the position of the last checkpoint where the source has one.

Records whose sender waits for an answer (`mqtt` with QoS 1 or 2, `http`, `redis` lists and groups) enter the graph at once and go to the
inbox (`state/inbox/`) beside it. They are acknowledged, in their order, when they are on disk; after a crash, those that no
checkpoint has are taken in again from there. `checkpoint: {durability: power}` (the default) waits until the disk has them;
`process` until the operating system has, which `kill -9` cannot undo but a power cut can. On a full disk nothing is
acknowledged until there is room. A disk whose sync fails ends the run (exit code 2): nobody can say what it holds.
";

const SOURCE_EXAMPLE: &str = "\
type: http
path: /readings
fields: {device_id: string, latency_ms: float, ts: timestamp}
event_time: {field: ts, lateness: 2s, idle: 10s}
errors: rejected
";

const PIPELINE_PAGE: &str = "\
Takes rows of sources and other pipelines through its steps, and hands them to sinks.

## Reads
`from` names a source, a pipeline, or a list of them. Several are united by column name: a column has one type in all of
them, and is null where one lacks it. Of a pipeline with a window, other pipelines get the `final` rows.

## Steps
`steps` is a list, each entry one operator with its options, done in order; `pipeline docs` lists the operators. It may be
absent: then the rows go on as they are. Expressions are SQL over the columns, type-checked before anything runs.

## Writes
`to` names sinks. The pipeline's name is the name of its metric, its topic for live clients and its table in history. `key`
says which columns tell one thing (a device) from another where no window does: live clients filter by them, and the latest
row is kept for each.

## Fails when
A step meets a limit of its own (its page says which). The pipeline stops, the others go on; its rows are counted as dropped and
`/health` says why. The next start begins it anew, and says that its open windows and the rows since the failure are lost.
";

const PIPELINE_EXAMPLE: &str = "\
from: devices
steps:
  - filter: latency_ms >= 0
  - window: {tumbling: 1s, group_by: [device_id], aggregate: {rps: rate(), avg_delay_ms: avg(latency_ms)}}
to: [live, history]
";

const SINK_PAGE: &str = "\
What sinks share: which rows they get, and how those of databases, brokers and the console deliver.

## Writes
A sink gets the rows of every pipeline that names it in `to`, and the wrong rows of every source that names it in `errors`.
It gets the `final` rows of windows; live sinks also `partial` and `revised` ones; history and sinks that replace by key also
`revised` ones.

## Delivery
`websocket` and `sse` serve whoever listens now. `parquet` publishes files that are bound to checkpoints, each row once. All
others have an outbox: rows wait in it, in order, while the other side is away; a delivery is tried again until it succeeds;
and what waits is kept on disk (`state/outbox/`), from the next checkpoint on. A sink that takes each row exactly once (`sql`;
`redis` if asked) gets rows when a checkpoint has them; `guarantee: exactly_once` at the top of the file refuses every other,
unless only rows in error go there. `batch` says when waiting rows become a delivery: as soon as there are `rows` of
one pipeline, or the oldest has waited for `every`. Its default is the sink's own; the page of the sink says it.

## Limits
An outbox holds 1 GiB. A full one pushes back to the sources; nothing is dropped.

## Fails when
The other side is away: `/health` says so, and the engine tries again with back-off (0.1 s, doubling to 15 s). Rows that the
other side refuses for good are counted as errors, and the others go on. A start from an older checkpoint, because the newest
was damaged: what was delivered after it is known to a sink that takes each row once by the number of rows alone, so it
gets the right ones only if they come again in the same order (one source that reads again); it says how many these are.
";

const SINK_EXAMPLE: &str = "\
type: sql
url: sqlite:demo.db
table: messages
create: true
batch: {rows: 50, every: 2s}
";

/// The options of a sink with an outbox.
#[derive(JsonSchema)]
#[expect(dead_code, reason = "only its schema is used")]
struct SinkCommon {
    /// The kind of sink.
    r#type: String,
    /// Not for `websocket`, `sse` and `parquet`: when waiting rows become a delivery.
    batch: Option<BatchOptions>,
}

/// The pages of what all of a kind share: name, text, example, options.
fn shared() -> [(&'static str, &'static str, &'static str, Schema); 3] {
    [
        ("source", SOURCE_PAGE, SOURCE_EXAMPLE, schema_for!(SourceCommon)),
        ("pipeline", PIPELINE_PAGE, PIPELINE_EXAMPLE, schema_for!(PipelineConfig)),
        ("sink", SINK_PAGE, SINK_EXAMPLE, schema_for!(SinkCommon)),
    ]
}

/// Kind of the pages of what all of a kind share.
const ALL: &str = "every";

/// What a page is made of.
struct Page {
    kind: &'static str,
    name: &'static str,
    text: &'static str,
    example: &'static str,
    schema: Value,
    /// What happens to rows, for each way of using the plugin.
    promises: Vec<(&'static str, &'static str)>,
}

fn pages() -> Vec<Page> {
    let sources = PLUGINS.sources.iter().map(|p| {
        let promises = p.promises.iter().map(|(way, delivery)| (*way, delivery.sentence())).collect();
        ("source", p.type_name, p.page, p.example, (p.schema)(), promises)
    });
    let operators =
        PLUGINS.operators.iter().map(|p| ("operator", p.type_name, p.page, p.example, (p.schema)(), Vec::new()));
    let sinks = PLUGINS.sinks.iter().map(|p| {
        let promises = p.promises.iter().map(|(way, promise)| (*way, promise.sentence())).collect();
        ("sink", p.type_name, p.page, p.example, (p.schema)(), promises)
    });
    let shared =
        shared().into_iter().map(|(name, text, example, schema)| (ALL, name, text, example, schema, Vec::new()));
    let page = |(kind, name, text, example, schema, promises): (_, _, _, _, Schema, _)| Page {
        kind,
        name,
        text,
        example,
        schema: schema.to_value(),
        promises,
    };
    shared.chain(sources).chain(operators).chain(sinks).map(page).collect()
}

impl Docs {
    pub(super) fn run(self) -> Result<(), Failure> {
        let pages = pages();
        let (kind, name) = match self.plugin.as_slice() {
            [] => return print(&list(&pages)),
            [name] => (None, name),
            [kind, name, ..] => (Some(kind), name),
        };
        let found: Vec<&Page> =
            pages.iter().filter(|page| page.name == name && kind.is_none_or(|kind| page.kind == kind)).collect();
        if found.is_empty() {
            let mut names: Vec<&str> = pages.iter().map(|page| page.name).collect();
            names.sort_unstable();
            names.dedup();
            let hint = did_you_mean(name, names);
            let hint = hint.map(|hint| format!("; {hint}")).unwrap_or_default();
            return Err(Failure::user(format!("no plugin `{name}`{hint}")));
        }
        let text: Vec<String> = found.into_iter().map(Page::render).collect();
        print(&text.join("\n---\n\n"))
    }
}

fn list(pages: &[Page]) -> String {
    let mut text = String::new();
    for (kind, heading) in
        [(ALL, "in general:"), ("source", "sources:"), ("operator", "operators:"), ("sink", "sinks:")]
    {
        let _ = writeln!(text, "{heading}");
        for page in pages.iter().filter(|page| page.kind == kind) {
            let _ = writeln!(text, "  {:<12} {}", page.name, page.text.trim().lines().next().unwrap_or_default());
        }
    }
    text.push_str("\n`pipeline docs NAME` prints a page.\n");
    text
}

impl Page {
    fn render(&self) -> String {
        let mut text = format!("# {} `{}`\n\n{}\n", self.kind, self.name, self.text.trim());
        if !self.promises.is_empty() {
            text.push_str("\n## Promise\n\n");
            for (way, promise) in &self.promises {
                let separator = if way.is_empty() { "" } else { ": " };
                let _ = writeln!(text, "- {way}{separator}{promise}.");
            }
        }
        let mut options = String::new();
        write_options(&self.schema, &self.schema, "", &mut options);
        if !options.is_empty() {
            let _ = write!(text, "\n## Options\n\n{options}");
        }
        let _ = write!(text, "\n## Example\n\n```yaml\n{}\n```\n", self.example.trim());
        text
    }
}

/// One line per option, nested ones below their owner.
fn write_options(schema: &Value, root: &Value, indent: &str, out: &mut String) {
    let Some(properties) = resolve(schema, root)["properties"].as_object() else { return };
    let required = resolve(schema, root)["required"].as_array().cloned().unwrap_or_default();
    for (name, option) in properties {
        let description = option["description"].as_str().or_else(|| resolve(option, root)["description"].as_str());
        let must = if required.iter().any(|r| r == name) { " (required)" } else { "" };
        let description = description.unwrap_or_default().replace('\n', " ");
        let _ = writeln!(out, "{indent}- `{name}`{must}: {description}");
        for inner in inner_schemas(option) {
            write_options(inner, root, &format!("{indent}  "), out);
        }
    }
}

/// The schema itself, or its non-null alternatives.
fn inner_schemas(option: &Value) -> Vec<&Value> {
    match option["anyOf"].as_array().or_else(|| option["oneOf"].as_array()) {
        Some(list) => list.iter().collect(),
        None => vec![option],
    }
}

fn resolve<'a>(schema: &'a Value, root: &'a Value) -> &'a Value {
    match schema["$ref"].as_str().and_then(|path| path.strip_prefix("#/$defs/")) {
        Some(name) => &root["$defs"][name],
        None => schema,
    }
}
