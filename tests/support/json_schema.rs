//! A validator for the part of JSON Schema that `pipeline schema` uses. An unknown keyword is an error, so that
//! nothing goes unchecked.

use regex::Regex;
use serde_json::Value;

/// Everything in which `value` differs from what `schema` says, as `PATH: what`.
pub fn problems(schema: &Value, value: &Value) -> Vec<String> {
    let mut found = Vec::new();
    check(schema, schema, value, "", &mut found);
    found
}

fn check(schema: &Value, root: &Value, value: &Value, path: &str, found: &mut Vec<String>) {
    let keywords = match schema {
        Value::Bool(true) => return,
        Value::Bool(false) => return found.push(format!("{path}: nothing may be here")),
        Value::Object(keywords) => keywords,
        _ => panic!("{schema} is no schema"),
    };
    for (keyword, says) in keywords {
        match keyword.as_str() {
            "$schema" | "$defs" | "title" | "description" | "default" | "examples" | "format" => {}
            "$ref" => {
                let name = says.as_str().and_then(|r| r.strip_prefix("#/$defs/")).expect("a local reference");
                check(
                    root["$defs"].get(name).unwrap_or_else(|| panic!("no definition {name}")),
                    root,
                    value,
                    path,
                    found,
                );
            }
            "type" => {
                let list = says.as_array().cloned().unwrap_or_else(|| vec![says.clone()]);
                if !list.iter().any(|word| is_of(value, word.as_str().expect("a type"))) {
                    found.push(format!("{path}: {value} is not {says}"));
                }
            }
            "const" if says != value => found.push(format!("{path}: {value} is not {says}")),
            "const" => {}
            "enum" if !says.as_array().expect("a list").contains(value) => {
                found.push(format!("{path}: {value} is none of {says}"));
            }
            "enum" => {}
            "pattern" => {
                let pattern = Regex::new(says.as_str().expect("a pattern")).expect("a regular expression");
                if value.as_str().is_some_and(|text| !pattern.is_match(text)) {
                    found.push(format!("{path}: {value} does not match {says}"));
                }
            }
            "minimum" | "maximum" => {
                let (limit, value) = (says.as_f64().expect("a number"), value.as_f64());
                if value.is_some_and(|v| if keyword == "minimum" { v < limit } else { v > limit }) {
                    found.push(format!("{path}: beyond the {keyword} of {limit}"));
                }
            }
            "minItems" | "maxItems" => {
                let (limit, length) = (says.as_u64().expect("a number"), value.as_array().map(|l| l.len() as u64));
                if length.is_some_and(|l| if keyword == "minItems" { l < limit } else { l > limit }) {
                    found.push(format!("{path}: beyond the {keyword} of {limit}"));
                }
            }
            "anyOf" | "oneOf" => alternatives(keyword, says, root, value, path, found),
            "items" => {
                for (index, item) in value.as_array().into_iter().flatten().enumerate() {
                    check(says, root, item, &format!("{path}/{index}"), found);
                }
            }
            "required" => {
                for name in says.as_array().expect("names").iter().flat_map(|name| name.as_str()) {
                    if value.is_object() && value.get(name).is_none() {
                        found.push(format!("{path}: `{name}` is missing"));
                    }
                }
            }
            "properties" => {
                for (name, inner) in says.as_object().expect("properties") {
                    if let Some(value) = value.get(name) {
                        check(inner, root, value, &format!("{path}/{name}"), found);
                    }
                }
            }
            "additionalProperties" => {
                let known = schema["properties"].as_object();
                for (name, value) in value.as_object().into_iter().flatten() {
                    if known.is_none_or(|known| !known.contains_key(name)) {
                        check(says, root, value, &format!("{path}/{name}"), found);
                    }
                }
            }
            "propertyNames" => {
                for name in value.as_object().into_iter().flat_map(|entries| entries.keys()) {
                    check(says, root, &Value::from(name.as_str()), &format!("{path}/{name}"), found);
                }
            }
            other => panic!("the validator does not know `{other}`"),
        }
    }
}

fn alternatives(keyword: &str, says: &Value, root: &Value, value: &Value, path: &str, found: &mut Vec<String>) {
    let tries: Vec<Vec<String>> = says
        .as_array()
        .expect("alternatives")
        .iter()
        .map(|schema| {
            let mut found = Vec::new();
            check(schema, root, value, path, &mut found);
            found
        })
        .collect();
    let fitting = tries.iter().filter(|found| found.is_empty()).count();
    if fitting == 0 {
        let nearest = tries.iter().min_by_key(|found| found.len()).expect("an alternative");
        found.push(format!("{path}: fits no alternative; the nearest: {nearest:?}"));
    } else if fitting > 1 && keyword == "oneOf" {
        found.push(format!("{path}: fits {fitting} alternatives, not one"));
    }
}

fn is_of(value: &Value, word: &str) -> bool {
    match word {
        "null" => value.is_null(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "string" => value.is_string(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        other => panic!("no type {other}"),
    }
}
