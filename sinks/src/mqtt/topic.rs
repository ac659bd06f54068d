//! The topic of a row: a text with `{metric}` and `{column}` in it.

use std::fmt::Write;

use arrow::array::RecordBatch;
use arrow::datatypes::{DataType, SchemaRef};
use arrow::util::display::{ArrayFormatter, FormatOptions};
use pipeline::error::{Error, Result};

/// Longest topic that MQTT can carry, in bytes.
const TOPIC_BYTES_MAX: usize = 65_535;
/// What stands for null and for empty text: an empty level would be another topic tree.
const NOTHING: &str = "_";

/// A topic with its placeholders.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Template(Vec<Part>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Text(String),
    Metric,
    /// A column's name and the place of its brace in the template, in characters.
    Column(String, usize),
}

impl Template {
    /// Takes the text apart, or says what is wrong and at which character.
    pub(super) fn parse(text: &str) -> Result<Self, (usize, String)> {
        if text.is_empty() || text.len() > TOPIC_BYTES_MAX {
            return Err((0, "a topic has 1 to 65535 bytes".into()));
        }
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let at = text[..text.len() - rest.len()].chars().count();
            let (literal, after) = rest.split_once('{').map_or((rest, None), |(literal, after)| (literal, Some(after)));
            if let Some(wrong) = literal.find(['+', '#', '}', '\0']) {
                let place = at + literal[..wrong].chars().count();
                return Err((place, "a topic to publish to has no `+`, `#`, `}` or NUL".into()));
            }
            if !literal.is_empty() {
                parts.push(Part::Text(literal.to_owned()));
            }
            let Some(after) = after else { break };
            let brace = at + literal.chars().count();
            let Some((name, after)) = after.split_once('}') else {
                return Err((brace, "`{` without `}`".into()));
            };
            parts.push(if name == "metric" { Part::Metric } else { Part::Column(name.to_owned(), brace) });
            rest = after;
        }
        Ok(Self(parts))
    }

    /// Each column it names that `schema` lacks or whose type is no name for a level, with its place and why.
    pub(super) fn problems(&self, schema: &SchemaRef) -> Vec<(usize, String)> {
        let problem = |part: &Part| {
            let Part::Column(name, at) = part else { return None };
            let wrong = match schema.field_with_name(name) {
                Err(_) => format!("no column `{name}` here"),
                Ok(field) if !is_level(field.data_type()) => {
                    format!("column `{name}` is no name for a topic; take a string, int, bool or date")
                }
                Ok(_) => return None,
            };
            Some((*at, wrong))
        };
        self.0.iter().filter_map(problem).collect()
    }

    /// The topic of every row.
    pub(super) fn topics(&self, metric: &str, rows: &RecordBatch) -> Result<Vec<String>> {
        let options = FormatOptions::new();
        let mut pieces = Vec::with_capacity(self.0.len());
        for part in &self.0 {
            pieces.push(match part {
                Part::Text(text) => Piece::Text(text),
                Part::Metric => Piece::Text(metric),
                Part::Column(name, _) => {
                    let column = rows.column_by_name(name);
                    let column = column.ok_or_else(|| Error::internal(format!("no column `{name}` in the rows")))?;
                    Piece::Cell(ArrayFormatter::try_new(column.as_ref(), &options)?)
                }
            });
        }
        Ok((0..rows.num_rows()).map(|row| topic(&pieces, row)).collect())
    }
}

/// A part of the template, ready for a batch.
enum Piece<'a> {
    Text(&'a str),
    Cell(ArrayFormatter<'a>),
}

fn topic(pieces: &[Piece<'_>], row: usize) -> String {
    let mut topic = String::new();
    for piece in pieces {
        match piece {
            Piece::Text(text) => topic.push_str(text),
            Piece::Cell(cells) => push_level(&mut topic, &cells.value(row).to_string()),
        }
    }
    topic
}

/// Appends a value as part of one level: what MQTT gives a meaning to is written `%XX`.
fn push_level(topic: &mut String, value: &str) {
    if value.is_empty() {
        topic.push_str(NOTHING);
        return;
    }
    for character in value.chars() {
        let starts_topic = topic.is_empty() && character == '$';
        if starts_topic || matches!(character, '/' | '+' | '#' | '%') || character.is_control() {
            for byte in character.encode_utf8(&mut [0; 4]).bytes() {
                let _ = write!(topic, "%{byte:02X}");
            }
        } else {
            topic.push(character);
        }
    }
}

/// Types whose text is one clear word. Floats and times are not: nobody subscribes to `21.500000000000004`.
fn is_level(data_type: &DataType) -> bool {
    data_type.is_integer()
        || matches!(
            data_type,
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View | DataType::Boolean | DataType::Date32
        )
}

/// Whether MQTT can carry the topic.
pub(super) fn is_short_enough(topic: &str) -> bool {
    topic.len() <= TOPIC_BYTES_MAX
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{Int64Array, StringArray};
    use pipeline::schema::{FieldType, schema_of};

    use super::*;

    #[test]
    fn a_topic_is_made_of_metric_and_columns() {
        let schema = schema_of([("device", FieldType::String), ("n", FieldType::Int)]);
        let devices = StringArray::from(vec![Some("a"), Some("x/y+#%"), None, Some("")]);
        let numbers = Int64Array::from(vec![Some(1), Some(-2), None, Some(4)]);
        let rows = RecordBatch::try_new(schema, vec![Arc::new(devices), Arc::new(numbers)]).expect("rows");
        let template = Template::parse("m/{metric}/{device}-{n}").expect("template");
        let topics = template.topics("load", &rows).expect("topics");
        assert_eq!(topics, ["m/load/a-1", "m/load/x%2Fy%2B%23%25--2", "m/load/_-_", "m/load/_-4"]);
    }

    #[test]
    fn a_wrong_template_is_told_with_its_place() {
        for (text, at, expected) in [
            ("", 0, "1 to 65535"),
            ("é/#", 2, "no `+`"),
            ("a/{metric}/+", 11, "no `+`"),
            ("a/{b", 2, "without"),
            ("a/b}", 3, "no `+`"),
        ] {
            let (place, message) = Template::parse(text).expect_err(text);
            assert!(place == at && message.contains(expected), "{text}: {place} {message}");
        }
        let schema = schema_of([("device", FieldType::String), ("x", FieldType::Float)]);
        let problems = Template::parse("{device}/{y}/{x}").expect("template").problems(&schema);
        assert_eq!(
            problems,
            [
                (9, "no column `y` here".to_owned()),
                (13, "column `x` is no name for a topic; take a string, int, bool or date".to_owned())
            ]
        );
    }
}
