//! Everything wrong with a file, at once, each with its place, its node and a hint.

use std::fmt;

/// A place in the YAML file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Line, from 1; 0 if the place is the whole file.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
}

impl Position {
    /// `characters` further right on the same line.
    #[must_use]
    pub fn right(self, characters: usize) -> Self {
        Self { column: self.column + characters, ..self }
    }
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The graph does not run.
    Error,
    /// The graph runs; the user should know.
    Note,
}

/// One thing to mend or to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where.
    pub position: Position,
    /// Error or note.
    pub severity: Severity,
    /// The node, such as `source devices` or `pipeline device_load step 2`; empty for the file itself.
    pub node: String,
    /// What is wrong.
    pub message: String,
    /// What to write instead, if we know.
    pub hint: Option<String>,
}

/// The problems found so far.
#[derive(Debug, Default)]
pub struct Problems {
    list: Vec<Problem>,
    /// Texts from the environment and what to show instead.
    hidden: Vec<(String, String)>,
    /// Where a value lacks its variable: its first character, and how many there are.
    unset: Vec<(Position, usize)>,
    /// Errors that come of these.
    consequences: usize,
}

/// Texts from the environment that are shorter are no secrets, and common in other words.
const HIDDEN_CHARS_MIN: usize = 4;

impl Problems {
    /// Adds one, unless it is there already, or finds fault with a value whose variable is not set.
    pub fn push(&mut self, problem: Problem) {
        let Position { line, column } = problem.position;
        let in_unset =
            |(at, length): &(Position, usize)| line == at.line && (at.column..at.column + length).contains(&column);
        if self.unset.iter().any(in_unset) {
            self.consequences += usize::from(problem.severity == Severity::Error);
        } else if !self.list.contains(&problem) {
            self.list.push(problem);
        }
    }

    /// Adds what is wrong with the variables of a value. Whatever else is wrong with the `length` characters from `value`
    /// on comes of that.
    pub fn push_unset(&mut self, problem: Problem, value: Position, length: usize) {
        self.push(problem);
        self.unset.push((value, length));
    }

    /// Whether the value that starts here lacks its variable.
    pub fn is_unset(&self, value: Position) -> bool {
        self.unset.iter().any(|(at, _)| *at == value)
    }

    /// None yet, for a check whose problems are perhaps not told; but knowing which values lack their variable.
    pub fn fork(&self) -> Self {
        Self { unset: self.unset.clone(), ..Self::default() }
    }

    /// From now on [`Self::render`] shows `${name}` where a message quotes `value`, which may be a password.
    pub fn hide(&mut self, value: String, name: &str) {
        if value.chars().count() >= HIDDEN_CHARS_MIN {
            self.hidden.push((value, format!("${{{name}}}")));
            // A text that holds another one goes first.
            self.hidden.sort_by_key(|(value, _)| std::cmp::Reverse(value.len()));
        }
    }

    /// Whether any is an error.
    pub fn has_errors(&self) -> bool {
        self.list.iter().any(|p| p.severity == Severity::Error)
    }

    /// Whether there is none at all.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// Number of errors so far, those included that are not told because they come of others.
    pub fn errors(&self) -> usize {
        self.errors_told() + self.consequences
    }

    /// Number of errors that are told.
    pub fn errors_told(&self) -> usize {
        self.list.iter().filter(|p| p.severity == Severity::Error).count()
    }

    /// All, in file order.
    pub fn sorted(&self) -> Vec<&Problem> {
        let mut list: Vec<&Problem> = self.list.iter().collect();
        list.sort_by_key(|p| (p.position, p.severity));
        list
    }

    /// The text for a terminal: `file:line:column: error: node: message`, and a hint below it.
    pub fn render(&self, file: &str) -> String {
        self.render_where(file, |_| true)
    }

    /// As [`Self::render`], without the notes.
    pub fn render_errors(&self, file: &str) -> String {
        self.render_where(file, |problem| problem.severity == Severity::Error)
    }

    fn render_where(&self, file: &str, is_shown: impl Fn(&Problem) -> bool) -> String {
        let shown = self.sorted().into_iter().filter(|problem| is_shown(problem));
        let lines = shown.map(|problem| {
            let mut line = problem.to_string();
            for (value, shown) in &self.hidden {
                line = line.replace(value, shown);
            }
            format!("{file}:{line}\n")
        });
        lines.collect()
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Position { line, column } = self.position;
        if line > 0 {
            write!(f, "{line}:{column}:")?;
        }
        f.write_str(match self.severity {
            Severity::Error => " error: ",
            Severity::Note => " note: ",
        })?;
        if !self.node.is_empty() {
            write!(f, "{}: ", self.node)?;
        }
        f.write_str(&self.message)?;
        if let Some(hint) = &self.hint {
            write!(f, "\n  hint: {hint}")?;
        }
        Ok(())
    }
}

/// A hint with the nearest of `names` to `wrong`, or with all of them if none is near and they are few.
pub fn did_you_mean<S: AsRef<str>>(wrong: &str, names: impl IntoIterator<Item = S>) -> Option<String> {
    let names: Vec<S> = names.into_iter().collect();
    let lower = wrong.to_lowercase();
    let nearest = names
        .iter()
        .map(|name| (strsim::damerau_levenshtein(&lower, &name.as_ref().to_lowercase()), name.as_ref()))
        .min()?;
    // A third of the letters wrong is still the same word; more is another one.
    if nearest.0 <= (wrong.chars().count().max(3)) / 3 {
        return Some(format!("did you mean `{}`?", nearest.1));
    }
    let list: Vec<String> = names.iter().map(|n| format!("`{}`", n.as_ref())).collect();
    (list.len() <= LISTED_NAMES_MAX).then(|| format!("one of {}", list.join(", ")))
}

/// More names than this make a hint unreadable.
const LISTED_NAMES_MAX: usize = 24;
