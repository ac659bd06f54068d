//! The plugins of a program: three plain lists.

use super::operator::OperatorPlugin;
use super::sink::SinkPlugin;
use super::source::SourcePlugin;

/// All plugins that a graph may use.
#[derive(Clone, Copy)]
pub struct Plugins {
    /// Sources, by the word after `type:`.
    pub sources: &'static [SourcePlugin],
    /// Operators, by the name of the step.
    pub operators: &'static [OperatorPlugin],
    /// Sinks, by the word after `type:`.
    pub sinks: &'static [SinkPlugin],
}

impl Plugins {
    /// The source of this type.
    pub fn source(&self, type_name: &str) -> Option<&'static SourcePlugin> {
        self.sources.iter().find(|p| p.type_name == type_name)
    }

    /// The operator of this name.
    pub fn operator(&self, type_name: &str) -> Option<&'static OperatorPlugin> {
        self.operators.iter().find(|p| p.type_name == type_name)
    }

    /// The sink of this type.
    pub fn sink(&self, type_name: &str) -> Option<&'static SinkPlugin> {
        self.sinks.iter().find(|p| p.type_name == type_name)
    }
}
