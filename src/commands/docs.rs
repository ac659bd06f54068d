//! `pipeline docs`: the page, options and example of a plugin, or the list of all.

use std::fmt::Write;

use clap::Args;
use pipeline::config::did_you_mean;
use serde_json::Value;

use super::{Failure, print};
use crate::plugins::PLUGINS;

#[derive(Debug, Args)]
pub(super) struct Docs {
    /// The plugin's name; `source mqtt` or `sink mqtt` where two have one name
    #[arg(num_args = 0..=2)]
    plugin: Vec<String>,
}

/// What a page is made of.
struct Page {
    kind: &'static str,
    name: &'static str,
    text: &'static str,
    example: &'static str,
    schema: Value,
}

fn pages() -> Vec<Page> {
    let sources = PLUGINS.sources.iter().map(|p| ("source", p.type_name, p.page, p.example, (p.schema)()));
    let operators = PLUGINS.operators.iter().map(|p| ("operator", p.type_name, p.page, p.example, (p.schema)()));
    let sinks = PLUGINS.sinks.iter().map(|p| ("sink", p.type_name, p.page, p.example, (p.schema)()));
    let page = |(kind, name, text, example, schema): (_, _, _, _, schemars::Schema)| Page {
        kind,
        name,
        text,
        example,
        schema: schema.to_value(),
    };
    sources.chain(operators).chain(sinks).map(page).collect()
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
    for kind in ["source", "operator", "sink"] {
        let _ = writeln!(text, "{kind}s:");
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
