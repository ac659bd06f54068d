//! What a plugin's `check` sees: a place to report problems to, and the compiler of expressions.

use std::path::{Path, PathBuf};

use arrow::datatypes::{DataType, SchemaRef};

use super::problems::{Position, Problem, Problems, Severity};
use super::values::At;
use crate::expression::{Expression, ExpressionError};
use crate::schema::type_word;

/// Given to every `check`. Checking is pure: it opens no file, no port and no connection.
pub struct CheckContext<'a> {
    problems: &'a mut Problems,
    node: String,
    position: Position,
    folder: &'a Path,
    exactly_once: bool,
}

impl<'a> CheckContext<'a> {
    /// For the node `node`, whose block starts at `position`, in a YAML file in `folder`.
    pub fn new(problems: &'a mut Problems, node: impl Into<String>, position: Position, folder: &'a Path) -> Self {
        Self { problems, node: node.into(), position, folder, exactly_once: false }
    }

    /// The same for a part of this node.
    pub fn part(&mut self, node: impl Into<String>, position: Position) -> CheckContext<'_> {
        let (folder, exactly_once) = (self.folder, self.exactly_once);
        CheckContext { problems: self.problems, node: node.into(), position, folder, exactly_once }
    }

    /// The same where the file says `guarantee: exactly_once`, if `asked`.
    #[must_use]
    pub fn asked_exactly_once(self, asked: bool) -> Self {
        Self { exactly_once: asked, ..self }
    }

    /// Whether the file asks that nothing is lost and nothing comes twice.
    pub fn exactly_once(&self) -> bool {
        self.exactly_once
    }

    /// Reports what may lose rows or repeat them: an error where `guarantee: exactly_once` is asked, else a note.
    pub fn weakness(&mut self, position: Position, message: impl Into<String>, hint: Option<String>) {
        let severity = if self.exactly_once { Severity::Error } else { Severity::Note };
        self.push(severity, position, message.into(), hint);
    }

    /// The node's name, such as `source devices`.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Where the node's block starts.
    pub fn position(&self) -> Position {
        self.position
    }

    /// `path` as counted from the YAML file's folder.
    pub fn resolve(&self, path: impl AsRef<Path>) -> PathBuf {
        self.folder.join(path)
    }

    /// Number of errors of the whole file so far.
    pub fn errors(&self) -> usize {
        self.problems.errors()
    }

    /// Reports an error.
    pub fn error(&mut self, position: Position, message: impl Into<String>) {
        self.error_hint(position, message, None);
    }

    /// Reports an error with a hint.
    pub fn error_hint(&mut self, position: Position, message: impl Into<String>, hint: Option<String>) {
        self.push(Severity::Error, position, message.into(), hint);
    }

    /// Tells the user something that does not keep the graph from running.
    pub fn note(&mut self, position: Position, message: impl Into<String>) {
        self.push(Severity::Note, position, message.into(), None);
    }

    fn push(&mut self, severity: Severity, position: Position, message: String, hint: Option<String>) {
        // A default stands nowhere: then the block is the place.
        let position = if position.line == 0 { self.position } else { position };
        self.problems.push(Problem { position, severity, node: self.node.clone(), message, hint });
    }

    /// Compiles an SQL expression over the columns of `schema` and the hidden times, or reports why not,
    /// pointing into the text.
    pub fn expression(&mut self, text: &At<String>, schema: &SchemaRef) -> Option<Expression> {
        match Expression::compile(text, schema) {
            Ok(expression) => Some(expression),
            Err(error) => {
                self.expression_error(text, error);
                None
            }
        }
    }

    /// As [`Self::expression`], for one that must give a boolean.
    pub fn condition(&mut self, text: &At<String>, schema: &SchemaRef) -> Option<Expression> {
        let expression = self.expression(text, schema)?;
        if *expression.data_type() == DataType::Boolean {
            return Some(expression);
        }
        let word = type_word(&expression.field("")).into_owned();
        self.error_hint(
            text.position,
            format!("expected a condition (bool), this is {word}"),
            Some("compare it: `x > 0`".into()),
        );
        None
    }

    /// Reports an expression's error at its place inside `text`.
    pub fn expression_error(&mut self, text: &At<String>, error: ExpressionError) {
        self.error_hint(text.place_of(error.offset), error.message, error.hint);
    }

    /// Reports a column name that `schema` lacks. Returns its index if it is there.
    pub fn column(&mut self, name: &At<String>, schema: &SchemaRef) -> Option<usize> {
        match schema.index_of(name) {
            Ok(index) => Some(index),
            Err(_) => {
                let hint = super::problems::did_you_mean(name, schema.fields().iter().map(|f| f.name()));
                self.error_hint(name.position, format!("no column `{}` here", name.value), hint);
                None
            }
        }
    }
}
