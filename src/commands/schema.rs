//! `pipeline schema`: the JSON Schema of the file, made from the structs that read it.

use pipeline::config::pipelines::{CheckpointConfig, EventTimeConfig, OneOrMany, ServerConfig};
use schemars::JsonSchema;
use serde_json::{Value, json};

use super::{Failure, print};
use crate::plugins::PLUGINS;

pub(super) fn run() -> Result<(), Failure> {
    let text = serde_json::to_string_pretty(&schema()).map_err(|error| Failure::running(error.to_string()))?;
    print(&format!("{text}\n"))
}

/// Names of sources, pipelines and sinks.
const NAME: &str = "^[A-Za-z_][A-Za-z0-9_]*$";

fn schema() -> Value {
    let mut definitions = serde_json::Map::new();
    let event_time = of::<EventTimeConfig>(&mut definitions);
    let names = of::<OneOrMany>(&mut definitions);
    let common = json!({
        "event_time": event_time,
        "errors": {"type": "string", "description": "The sink for rows that cannot be read."},
        "on_demand": {"type": "boolean", "description": "Poll only while somebody wants the rows."},
    });
    let sources: Vec<Value> = PLUGINS
        .sources
        .iter()
        .map(|plugin| {
            typed(plugin.type_name, plugin.page, (plugin.schema)().to_value(), Some(&common), &mut definitions)
        })
        .collect();
    let sinks: Vec<Value> = PLUGINS
        .sinks
        .iter()
        .map(|plugin| typed(plugin.type_name, plugin.page, (plugin.schema)().to_value(), None, &mut definitions))
        .collect();
    let steps: Vec<Value> = PLUGINS
        .operators
        .iter()
        .map(|plugin| {
            let options = lift((plugin.schema)().to_value(), &mut definitions);
            json!({
                "type": "object", "properties": {plugin.type_name: options}, "required": [plugin.type_name],
                "additionalProperties": false, "description": first_line(plugin.page),
            })
        })
        .collect();
    let pipeline = json!({
        "type": "object",
        "properties": {
            "from": names, "to": names, "key": names,
            "steps": {"type": ["array", "null"], "items": {"oneOf": steps}},
        },
        "required": ["from"],
        "additionalProperties": false,
    });
    let section =
        |entry: Value| json!({"type": "object", "propertyNames": {"pattern": NAME}, "additionalProperties": entry});
    let server = of::<ServerConfig>(&mut definitions);
    let checkpoint = of::<CheckpointConfig>(&mut definitions);
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "pipelines.yaml",
        "type": "object",
        "properties": {
            "server": server,
            "checkpoint": checkpoint,
            "sources": section(json!({"oneOf": sources})),
            "pipelines": section(pipeline),
            "sinks": section(json!({"oneOf": sinks})),
        },
        "additionalProperties": false,
        "$defs": definitions,
    })
}

fn of<T: JsonSchema>(definitions: &mut serde_json::Map<String, Value>) -> Value {
    lift(schemars::schema_for!(T).to_value(), definitions)
}

/// Moves a schema's own definitions to the top, where its references look for them.
fn lift(mut schema: Value, definitions: &mut serde_json::Map<String, Value>) -> Value {
    if let Some(object) = schema.as_object_mut() {
        object.remove("$schema");
        if let Some(Value::Object(own)) = object.remove("$defs") {
            definitions.extend(own);
        }
    }
    schema
}

/// The options of a source or sink with `type` and the keys that the engine reads.
fn typed(
    type_name: &str,
    page: &str,
    options: Value,
    common: Option<&Value>,
    definitions: &mut serde_json::Map<String, Value>,
) -> Value {
    let mut schema = lift(options, definitions);
    schema["description"] = first_line(page).into();
    if !schema["properties"].is_object() {
        schema["properties"] = json!({});
    }
    schema["properties"]["type"] = json!({"const": type_name});
    if let (Some(common), Some(properties)) = (common.and_then(Value::as_object), schema["properties"].as_object_mut())
    {
        properties.extend(common.iter().map(|(key, value)| (key.clone(), value.clone())));
    }
    match schema["required"].as_array_mut() {
        Some(required) => required.push("type".into()),
        None => schema["required"] = json!(["type"]),
    }
    schema
}

fn first_line(page: &str) -> &str {
    page.trim().lines().next().unwrap_or_default()
}
