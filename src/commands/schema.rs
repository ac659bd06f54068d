//! `pipeline schema`: the JSON Schema of the file, made from the structs that read it.

use pipeline::config::pipelines::{CheckpointConfig, EventTimeConfig, Guarantee, OneOrMany, ServerConfig};
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
    let guarantee = of::<Guarantee>(&mut definitions);
    let mut schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "pipelines.yaml",
        "type": "object",
        "properties": {
            "server": server,
            "checkpoint": checkpoint,
            "guarantee": guarantee,
            "sources": section(json!({"oneOf": sources})),
            "pipelines": section(pipeline),
            "sinks": section(json!({"oneOf": sinks})),
        },
        "additionalProperties": false,
        "$defs": definitions,
    });
    allow_variables(&mut schema);
    schema
}

/// `${NAME}` may stand where a number or a word of a certain form is expected: an editor sees a string.
fn allow_variables(schema: &mut Value) {
    for inside in ["properties", "$defs"] {
        let schemas = schema.get_mut(inside).and_then(Value::as_object_mut);
        schemas.into_iter().flat_map(|schemas| schemas.values_mut()).for_each(allow_variables);
    }
    for inside in ["anyOf", "oneOf"] {
        let schemas = schema.get_mut(inside).and_then(Value::as_array_mut);
        schemas.into_iter().flatten().for_each(allow_variables);
    }
    for inside in ["items", "additionalProperties"] {
        schema.get_mut(inside).into_iter().for_each(allow_variables);
    }
    let is = |word: &str| schema["type"] == word || schema["type"].as_array().is_some_and(|t| t.contains(&word.into()));
    let is_word = is("string") && (schema["pattern"].is_string() || schema["enum"].is_array());
    let words = schema["oneOf"].as_array();
    let is_choice = words.is_some_and(|list| list.iter().all(|one| one["const"].is_string()));
    if is_word || is_choice || ["integer", "number", "boolean"].into_iter().any(is) {
        let description = schema.as_object_mut().and_then(|object| object.remove("description"));
        *schema = json!({"anyOf": [schema.take(), {"type": "string", "pattern": r"\$\{"}]});
        if let Some(description) = description {
            schema["description"] = description;
        }
    }
}

fn of<T: JsonSchema>(definitions: &mut serde_json::Map<String, Value>) -> Value {
    lift(schemars::schema_for!(T).to_value(), definitions)
}

/// Moves a schema's own definitions to the top, where its references look for them. Two plugins may each have a type of
/// one name: the later one is numbered.
fn lift(mut schema: Value, definitions: &mut serde_json::Map<String, Value>) -> Value {
    let own = schema.as_object_mut().and_then(|object| {
        object.remove("$schema");
        object.remove("$defs")
    });
    let Some(Value::Object(mut own)) = own else { return schema };
    for name in own.keys().cloned().collect::<Vec<_>>() {
        let fits = |free: &String| definitions.get(free).is_none_or(|taken| *taken == own[&name]);
        let numbered = (2u32..).map(|number| format!("{name}{number}"));
        let Some(new) = std::iter::once(name.clone()).chain(numbered).find(fits) else { continue };
        if new != name {
            refer(&mut schema, &name, &new);
            own.values_mut().for_each(|definition| refer(definition, &name, &new));
        }
        definitions.insert(new, own[&name].clone());
    }
    schema
}

/// Points references to the definition `name` at `new`.
fn refer(schema: &mut Value, name: &str, new: &str) {
    match schema {
        Value::Object(object) => {
            if object.get("$ref").is_some_and(|at| *at == format!("#/$defs/{name}")) {
                object.insert("$ref".into(), format!("#/$defs/{new}").into());
            }
            object.values_mut().for_each(|inner| refer(inner, name, new));
        }
        Value::Array(list) => list.iter_mut().for_each(|inner| refer(inner, name, new)),
        _ => {}
    }
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
