//! `pipeline check`: every problem at once; pure.

use std::path::PathBuf;

use clap::Args;
use pipeline::graph;

use super::{Failure, counted, load, print};
use crate::plugins::PLUGINS;

#[derive(Debug, Args)]
pub(super) struct Check {
    /// The YAML file [default: pipelines.yaml]
    file: Option<PathBuf>,
}

impl Check {
    pub(super) fn run(self) -> Result<(), Failure> {
        let mut loaded = load(self.file.as_deref())?;
        let graph = graph::check(&loaded.file, &PLUGINS, &mut loaded.problems);
        print(&loaded.problems.render(&loaded.path.display().to_string()))?;
        let Some(graph) = graph else {
            return Err(Failure::user(loaded.summary()));
        };
        print(&format!(
            "{}: ok, {}, {}, {}\n",
            loaded.path.display(),
            counted(graph.sources.len(), "source"),
            counted(graph.pipelines.len(), "pipeline"),
            counted(graph.sinks.len(), "sink")
        ))
    }
}
