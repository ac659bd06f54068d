//! The YAML text as a tree in which every node knows its place.

use std::collections::HashMap;

use saphyr_parser::{Event, Parser, ScalarStyle, Span, StrInput};

use super::problems::{Position, Problem, Severity};

/// Most nodes of one file after aliases are expanded; a larger one is an alias bomb, not a configuration.
const NODES_MAX: usize = 100_000;
/// Deepest nesting.
const DEPTH_MAX: usize = 64;

/// A YAML value and where it stands.
#[derive(Clone, Debug)]
pub struct Node {
    /// First character of the value.
    pub position: Position,
    /// The value.
    pub value: Value,
}

/// What a node holds.
#[derive(Clone, Debug)]
pub enum Value {
    /// A scalar as written, after environment variables.
    Scalar(Scalar),
    /// A sequence.
    Sequence(Vec<Node>),
    /// A mapping in file order.
    Mapping(Vec<(Key, Node)>),
}

/// A mapping's key.
#[derive(Clone, Debug)]
pub struct Key {
    /// First character of the key.
    pub position: Position,
    /// The key's text.
    pub name: String,
}

/// A scalar.
#[derive(Clone, Debug)]
pub struct Scalar {
    /// The text to use.
    pub text: String,
    /// The text as written, with `${NAME}` in place: what messages may show.
    pub written: String,
    /// Whether it stood without quotes, so that `5` is a number and `true` a boolean.
    pub plain: bool,
    /// Whether the text's characters stand one for one on the first line from `position` (plus an opening
    /// quote), so that a place inside it can be shown.
    pub verbatim: bool,
}

impl Node {
    /// A mapping's entries.
    pub fn mapping(&self) -> Option<&[(Key, Node)]> {
        match &self.value {
            Value::Mapping(entries) => Some(entries),
            _ => None,
        }
    }

    /// The value under `name` in a mapping.
    pub fn get(&self, name: &str) -> Option<&Node> {
        self.mapping()?.iter().find(|(key, _)| key.name == name).map(|(_, node)| node)
    }

    /// Takes the value under `name` out of a mapping.
    pub fn remove(&mut self, name: &str) -> Option<Node> {
        let Value::Mapping(entries) = &mut self.value else { return None };
        let index = entries.iter().position(|(key, _)| key.name == name)?;
        Some(entries.remove(index).1)
    }

    /// A scalar's text.
    pub fn text(&self) -> Option<&str> {
        match &self.value {
            Value::Scalar(scalar) => Some(&scalar.text),
            _ => None,
        }
    }

    /// Whether it is an empty plain scalar, `~` or `null`.
    pub fn is_null(&self) -> bool {
        matches!(&self.value, Value::Scalar(s) if s.is_null())
    }

    /// What it is, for messages.
    pub fn kind(&self) -> String {
        match &self.value {
            Value::Scalar(scalar) if scalar.is_null() => "nothing".to_owned(),
            Value::Scalar(scalar) => format!("`{}`", scalar.written),
            Value::Sequence(_) => "a list".to_owned(),
            Value::Mapping(_) => "a mapping".to_owned(),
        }
    }
}

impl Scalar {
    /// Whether it is an empty plain scalar, `~` or `null`.
    pub fn is_null(&self) -> bool {
        self.plain && matches!(self.text.as_str(), "" | "~" | "null" | "Null" | "NULL")
    }
}

/// What usually is behind a message of the YAML parser.
const HINTS: [(&str, &str); 3] = [
    ("did not find expected key", "indent it as the lines around it"),
    ("mapping values are not allowed", "indent it as the lines around it; a text that holds `: ` needs quotes"),
    ("tabs disallowed", "indent with spaces"),
];

/// Parses one YAML document without a mistake. An empty text is an empty mapping.
pub fn parse(text: &str) -> Result<Node, Vec<Problem>> {
    let mut problems = Vec::new();
    match parse_on(text, &mut problems) {
        Some(node) if problems.is_empty() => Ok(node),
        _ => Err(problems),
    }
}

/// As [`parse`], but a key that is given twice counts once, so that the rest of the file can be checked too.
/// `None` if the text is no YAML.
pub fn parse_on(text: &str, problems: &mut Vec<Problem>) -> Option<Node> {
    let mut builder =
        Builder { parser: Parser::new_from_str(text), anchors: HashMap::new(), nodes: 0, problems: Vec::new() };
    let node = builder.document();
    problems.append(&mut builder.problems);
    node.map_err(|problem| problems.push(*problem)).ok()
}

type Step<T> = Result<T, Box<Problem>>;

struct Builder<'a> {
    parser: Parser<'a, StrInput<'a>>,
    anchors: HashMap<usize, Node>,
    nodes: usize,
    problems: Vec<Problem>,
}

impl<'a> Builder<'a> {
    fn next(&mut self) -> Step<(Event<'a>, Span)> {
        match self.parser.next_event() {
            Some(Ok(event)) => Ok(event),
            Some(Err(error)) => Err(syntax(place(error.marker().line(), error.marker().col()), error.info())),
            None => Err(syntax(Position::default(), "the file ends too early")),
        }
    }

    fn document(&mut self) -> Step<Node> {
        let mut root = None;
        loop {
            let (event, span) = self.next()?;
            match event {
                Event::StreamEnd => break,
                Event::StreamStart | Event::DocumentStart(_) | Event::DocumentEnd | Event::Nothing => {}
                _ if root.is_some() => {
                    return Err(syntax(start(&span), "a second YAML document; the file holds one"));
                }
                event => root = Some(self.node(event, &span, 0)?),
            }
        }
        let empty = Node { position: Position { line: 1, column: 1 }, value: Value::Mapping(Vec::new()) };
        Ok(root.filter(|node| !node.is_null()).unwrap_or(empty))
    }

    fn node(&mut self, event: Event<'a>, span: &Span, depth: usize) -> Step<Node> {
        let position = start(span);
        self.count(1, depth, position)?;
        let (value, anchor) = match event {
            Event::Scalar(text, style, anchor, _) => {
                let plain = style == ScalarStyle::Plain;
                let quote = usize::from(!plain);
                // One line, and as many characters as the source: then nothing was folded or escaped.
                let verbatim = span.start.line() == span.end.line()
                    && matches!(style, ScalarStyle::Plain | ScalarStyle::SingleQuoted | ScalarStyle::DoubleQuoted)
                    && span.len() == text.chars().count() + 2 * quote;
                let text = text.into_owned();
                (Value::Scalar(Scalar { written: text.clone(), text, plain, verbatim }), anchor)
            }
            Event::SequenceStart(anchor, _) => (self.sequence(depth)?, anchor),
            Event::MappingStart(anchor, _) => (self.mapping(depth)?, anchor),
            Event::Alias(anchor) => {
                let node = self.anchors.get(&anchor).cloned().ok_or_else(|| syntax(position, "unknown alias"))?;
                self.count(size(&node), depth + height(&node), position)?;
                return Ok(node);
            }
            _ => return Err(syntax(position, "a value is missing here")),
        };
        let node = Node { position, value };
        if anchor > 0 {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn sequence(&mut self, depth: usize) -> Step<Value> {
        let mut items = Vec::new();
        loop {
            let (event, span) = self.next()?;
            if event == Event::SequenceEnd {
                return Ok(Value::Sequence(items));
            }
            items.push(self.node(event, &span, depth + 1)?);
        }
    }

    fn mapping(&mut self, depth: usize) -> Step<Value> {
        let mut entries: Vec<(Key, Node)> = Vec::new();
        loop {
            let (event, span) = self.next()?;
            let (name, position) = match event {
                Event::MappingEnd => return Ok(Value::Mapping(entries)),
                Event::Scalar(text, ..) => (text.into_owned(), start(&span)),
                _ => return Err(syntax(start(&span), "a key must be a plain name")),
            };
            let (event, span) = self.next()?;
            let node = self.node(event, &span, depth + 1)?;
            if node.is_null() && name.ends_with(')') && !name.contains('(') {
                let mut problem = syntax(position, format!("`{name}` is no key: in `{{…}}` a comma ends a text"));
                problem.hint = Some("put a text with a comma in quotes: `p99: \"percentile(x, 0.99)\"`".to_owned());
                self.problems.push(*problem);
                continue;
            }
            if let Some((first, _)) = entries.iter().find(|(key, _)| key.name == name) {
                let line = first.position.line;
                self.problems.push(*syntax(position, format!("`{name}` is already given on line {line}")));
                continue;
            }
            entries.push((Key { position, name }, node));
        }
    }

    fn count(&mut self, nodes: usize, depth: usize, position: Position) -> Step<()> {
        self.nodes += nodes;
        if self.nodes > NODES_MAX {
            return Err(syntax(position, format!("more than {NODES_MAX} values (aliases counted as often as used)")));
        }
        if depth > DEPTH_MAX {
            return Err(syntax(position, format!("nested deeper than {DEPTH_MAX} levels")));
        }
        Ok(())
    }
}

fn size(node: &Node) -> usize {
    1 + match &node.value {
        Value::Scalar(_) => 0,
        Value::Sequence(items) => items.iter().map(size).sum(),
        Value::Mapping(entries) => entries.iter().map(|(_, node)| size(node)).sum(),
    }
}

/// Levels below a node.
fn height(node: &Node) -> usize {
    let below = |nodes: &mut dyn Iterator<Item = &Node>| nodes.map(|node| 1 + height(node)).max().unwrap_or(0);
    match &node.value {
        Value::Scalar(_) => 0,
        Value::Sequence(items) => below(&mut items.iter()),
        Value::Mapping(entries) => below(&mut entries.iter().map(|(_, node)| node)),
    }
}

fn start(span: &Span) -> Position {
    place(span.start.line(), span.start.col())
}

/// The parser counts lines from 1 and columns from 0.
fn place(line: usize, column: usize) -> Position {
    Position { line, column: column + 1 }
}

fn syntax(position: Position, message: impl Into<String>) -> Box<Problem> {
    let message = message.into();
    let hint = HINTS.iter().find(|(part, _)| message.contains(part)).map(|(_, hint)| (*hint).to_owned());
    Box::new(Problem { position, severity: Severity::Error, node: String::new(), message, hint })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_slips_of_yaml_are_told_with_their_cure() {
        for (text, place, hint) in [
            ("a:\n  b: 1\n c: 2", "3:2", "indent it as the lines around it"),
            ("a: round(x): y", "1:12", "a text that holds `: ` needs quotes"),
            ("a:\n\tb: 1", "2:2", "indent with spaces"),
            ("{n: count(), p: percentile(x, 0.5), m: max(x)}", "1:31", "put a text with a comma in quotes"),
        ] {
            let problems = parse(text).expect_err(text);
            let told: String = problems.iter().map(|problem| format!("{problem}\n")).collect();
            assert!(problems.len() == 1 && told.starts_with(place) && told.contains(hint), "{text}: {told}");
        }
        assert!(parse("{n: , p: f(x), m: }").is_ok(), "keys without values are for others to judge");
    }

    /// The problems of a text, one line each.
    fn problems(text: &str) -> Vec<String> {
        parse(text).err().unwrap_or_default().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_is_wrong_with_the_text_is_told_with_its_place() {
        let deep = "[".repeat(DEPTH_MAX + 2) + &"]".repeat(DEPTH_MAX + 2);
        for (text, expected) in [
            (
                "a: 1\nb: 2\na: 3\nb: 4",
                vec!["3:1: error: `a` is already given on line 1", "4:1: error: `b` is already given on line 2"],
            ),
            ("a: 1\n---\nb: 2", vec!["3:1: error: a second YAML document; the file holds one"]),
            ("a: *b", vec!["1:4: error: "]),
            ("a: [1, 2\nb: 3", vec!["2:"]),
            ("a: 'open", vec!["1:"]),
            ("a: b: c", vec!["1:"]),
            ("? [a]\n: 1", vec!["1:3: error: a key must be a plain name"]),
            (&deep, vec!["1:66: error: nested deeper than 64 levels"]),
        ] {
            let found = problems(text);
            assert_eq!(found.len(), expected.len(), "{text}: {found:?}");
            for (found, expected) in found.iter().zip(expected) {
                assert!(found.starts_with(expected), "{text}: {found}");
            }
        }
    }

    #[test]
    fn aliases_count_as_often_and_as_deep_as_they_are_used() {
        let level = |at: usize, times: usize, opened: usize| {
            let aliases = vec![format!("*a{}", at - 1); times].join(", ");
            format!("a{at}: &a{at} {}{aliases}{}\n", "[".repeat(opened), "]".repeat(opened))
        };
        let chain = |levels, times, opened| {
            (1..=levels).fold("a0: &a0 x\n".to_owned(), |text, at| text + &level(at, times, opened))
        };
        for (case, text, expected) in [
            ("few", chain(3, 9, 1), None),
            ("a bomb", chain(9, 9, 1), Some("more than 100000 values")),
            ("a deep one", chain(9, 1, 10), Some("nested deeper than 64 levels")),
        ] {
            let found = problems(&text);
            match expected {
                None => assert!(found.is_empty(), "{case}: {found:?}"),
                Some(expected) => assert!(found.len() == 1 && found[0].contains(expected), "{case}: {found:?}"),
            }
        }
    }

    #[test]
    fn a_text_without_values_is_an_empty_mapping() {
        for text in ["", "\n\n", "# only a comment\n", "---\n", "~", "{}"] {
            let node = parse(text).expect(text);
            assert_eq!(node.mapping().map(<[_]>::len), Some(0), "{text:?}");
        }
    }

    #[test]
    fn every_node_knows_its_place() {
        let node = parse("# ä\na:\n  - x\n  - {k: 'y'}\né: \"z\"\n").expect("YAML");
        let at = |node: &Node| (node.position.line, node.position.column);
        let Some(Value::Sequence(items)) = node.get("a").map(|a| &a.value) else { panic!("no list") };
        assert_eq!(items.iter().map(at).collect::<Vec<_>>(), [(3, 5), (4, 5)]);
        assert_eq!(items[1].get("k").map(at), Some((4, 9)));
        assert_eq!(node.get("é").map(at), Some((5, 4)));
    }
}
