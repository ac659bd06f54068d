//! `${NAME}` and `${NAME:-default}` in values, after parsing: a variable can never add a key or a node.

use std::cell::RefCell;

use super::problems::{Position, Problem, Problems, Severity};
use super::tree::{Node, Value};

/// Replaces variables in every scalar below `node`. `lookup` reads one variable. `$$` is a dollar sign. What a
/// variable holds may be a secret: `problems` does not show it.
pub fn expand(node: &mut Node, lookup: &dyn Fn(&str) -> Option<String>, problems: &mut Problems) {
    let seen = RefCell::new(Vec::new());
    let noting = |name: &str| {
        let value = lookup(name)?;
        seen.borrow_mut().push((value.clone(), name.to_owned()));
        Some(value)
    };
    walk(node, &noting, problems);
    for (value, name) in seen.into_inner() {
        problems.hide(value, &name);
    }
}

fn walk(node: &mut Node, lookup: &dyn Fn(&str) -> Option<String>, problems: &mut Problems) {
    let position = node.position;
    match &mut node.value {
        Value::Sequence(items) => items.iter_mut().for_each(|item| walk(item, lookup, problems)),
        Value::Mapping(entries) => entries.iter_mut().for_each(|(_, value)| walk(value, lookup, problems)),
        Value::Scalar(scalar) if scalar.written.contains('$') => match replace(&scalar.written, lookup) {
            Ok(text) => scalar.text = text,
            Err((offset, message)) => {
                // Two more for the quotes. Places inside a folded text cannot be told: they are all its first one.
                let length = if scalar.verbatim { scalar.written.chars().count() + 2 } else { 1 };
                let place =
                    if scalar.verbatim { position.right(offset + usize::from(!scalar.plain)) } else { position };
                problems.push_unset(problem(place, message), position, length);
            }
        },
        Value::Scalar(_) => {}
    }
}

/// The text with its variables, or the character offset and message of what is wrong.
fn replace(text: &str, lookup: &dyn Fn(&str) -> Option<String>) -> Result<String, (usize, String)> {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        let offset = text[..text.len() - rest.len() + at].chars().count();
        rest = &rest[at + 1..];
        if let Some(after) = rest.strip_prefix('$') {
            out.push('$');
            rest = after;
        } else if let Some(inner) = rest.strip_prefix('{') {
            let end = inner.find('}').ok_or_else(|| (offset, "`${` without `}`".to_owned()))?;
            out.push_str(&variable(&inner[..end], lookup).map_err(|message| (offset, message))?);
            rest = &inner[end + 1..];
        } else {
            out.push('$');
        }
    }
    out.push_str(rest);
    Ok(out)
}

fn variable(inner: &str, lookup: &dyn Fn(&str) -> Option<String>) -> Result<String, String> {
    let (name, default) = match inner.split_once(":-") {
        Some((name, default)) => (name, Some(default)),
        None => (inner, None),
    };
    let valid = name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') && !name.is_empty();
    if !valid {
        return Err(format!("`${{{inner}}}` names no variable"));
    }
    // As in a shell, `:-` also replaces an empty variable.
    match (lookup(name), default) {
        (Some(value), Some(default)) if value.is_empty() => Ok(default.to_owned()),
        (Some(value), _) => Ok(value),
        (None, Some(default)) => Ok(default.to_owned()),
        (None, None) => Err(format!("environment variable `{name}` is not set; give a default with `${{{name}:-…}}`")),
    }
}

fn problem(position: Position, message: String) -> Problem {
    Problem { position, severity: Severity::Error, node: String::new(), message, hint: None }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tree;

    #[test]
    fn what_is_wrong_only_because_a_variable_is_not_set_is_not_told() {
        let mut problems = Problems::default();
        let mut root = tree::parse("{a: \"${NONE}\", b: x}").expect("YAML");
        expand(&mut root, &|_| None, &mut problems);
        for (column, errors_told) in [(5, 1), (6, 1), (12, 1), (15, 2)] {
            let errors = problems.errors();
            problems.push(problem(Position { line: 1, column }, format!("wrong at {column}")));
            assert_eq!(problems.errors_told(), errors_told, "{column}");
            assert_eq!(problems.errors(), errors + 1, "it counts, so that what depends on the value is not looked at");
        }
    }

    #[test]
    fn variables_are_replaced_as_values_only() {
        let lookup = |name: &str| match name {
            "HOST" => Some("db: [x]".to_owned()),
            "EMPTY" => Some(String::new()),
            _ => None,
        };
        for (text, expected) in [
            ("${HOST}", Ok("db: [x]")),
            ("a-${NONE:-b}-c", Ok("a-b-c")),
            ("${EMPTY:-x}", Ok("x")),
            ("${EMPTY}", Ok("")),
            ("$$ and $5", Ok("$ and $5")),
            ("é ${NONE}", Err(2)),
            ("${HOST", Err(0)),
            ("${a b}", Err(0)),
        ] {
            let result = replace(text, &lookup).map_err(|(offset, _)| offset);
            assert_eq!(result.as_deref().map_err(|o| *o), expected, "{text}");
        }
    }
}
