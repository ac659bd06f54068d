//! The one error type at the plugin edge: whose fault, whether to try again, what happened, and why.
//!
//! A plugin says what it knows; the engine adds the node's name, counts the error, logs it once where
//! it is handled, and decides from [`Retry`] what happens next.

use std::error::Error as StdError;
use std::fmt;

/// Result of everything a plugin does while running.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Who can mend it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    /// The YAML, an argument, or an SQL text.
    User,
    /// A server, the network, the disk, a row.
    Outside,
    /// Tailwater itself.
    Internal,
}

/// What the engine does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// The node stops and `/health` says why; the other nodes go on.
    Never,
    /// The engine waits (exponential back-off with jitter) and tries again.
    BackOff,
}

/// An error of a running node.
#[derive(Debug)]
pub struct Error {
    /// Who can mend it.
    pub blame: Blame,
    /// What the engine does next.
    pub retry: Retry,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// The user's text is wrong: not tried again.
    pub fn user(message: impl Into<String>) -> Self {
        Self::new(Blame::User, Retry::Never, message)
    }

    /// A server, network or disk failed: tried again.
    pub fn outside(message: impl Into<String>) -> Self {
        Self::new(Blame::Outside, Retry::BackOff, message)
    }

    /// A broken promise of our own code: not tried again.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Blame::Internal, Retry::Never, message)
    }

    fn new(blame: Blame, retry: Retry, message: impl Into<String>) -> Self {
        Self { blame, retry, message: message.into(), source: None }
    }

    /// Adds the cause; it is printed after the message.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// The same error, not to be tried again.
    #[must_use]
    pub fn fatal(mut self) -> Self {
        self.retry = Retry::Never;
        self
    }

    /// Puts `context: ` before the message.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut told = self.message.clone();
        let mut cause: Option<&(dyn StdError + 'static)> = self.source.as_deref().map(|e| e as _);
        while let Some(error) = cause {
            let text = error.to_string();
            // Libraries often repeat the cause in their own message.
            if !told.contains(&text) {
                told.push_str(": ");
                told.push_str(&text);
            }
            cause = error.source();
        }
        f.write_str(&told)
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.source.as_deref().map(|e| e as _)
    }
}

impl From<arrow::error::ArrowError> for Error {
    fn from(error: arrow::error::ArrowError) -> Self {
        Self::internal("Arrow").because(error)
    }
}

impl From<datafusion::error::DataFusionError> for Error {
    fn from(error: datafusion::error::DataFusionError) -> Self {
        Self::internal("DataFusion").because(error)
    }
}
