//! `pipeline graph`: the graph as text, Mermaid or Graphviz.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{Failure, load, print};

#[derive(Debug, Args)]
pub(super) struct GraphCommand {
    /// The YAML file [default: pipelines.yaml]
    file: Option<PathBuf>,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Text)]
    format: Format,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    Text,
    Mermaid,
    Dot,
}

impl GraphCommand {
    pub(super) fn run(self) -> Result<(), Failure> {
        let graph = load(self.file.as_deref())?.graph()?;
        print(&match self.format {
            Format::Text => graph.to_text(),
            Format::Mermaid => graph.to_mermaid(),
            Format::Dot => graph.to_dot(),
        })
    }
}
