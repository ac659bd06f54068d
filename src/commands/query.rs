//! `pipeline query`: SQL over the published history, beside a running process or without one.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use pipeline::history::output::Format;
use pipeline::history::{History, Limits, Table};

use super::{Failure, by_blame, load, print};

#[derive(Debug, Args)]
pub(super) struct Query {
    /// The SQL text; each pipeline with a Parquet sink is a table
    sql: String,
    /// The YAML file whose history is queried [default: pipelines.yaml]
    #[arg(long)]
    config: Option<PathBuf>,
    /// How to print the rows
    #[arg(long, value_enum, default_value_t = Output::Table)]
    format: Output,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    Table,
    Json,
    Csv,
}

impl Query {
    pub(super) fn run(self) -> Result<(), Failure> {
        let graph = load(self.config.as_deref())?.graph()?;
        let mut tables = Vec::new();
        for sink in &graph.sinks {
            for input in sink.shape.history.iter().flat_map(|folder| sink.inputs.iter().map(move |i| (folder, i))) {
                tables.push(Table {
                    name: input.1.metric.clone(),
                    sink: sink.name.clone(),
                    folder: input.0.clone(),
                    schema: Arc::clone(&input.1.shape.schema),
                    tail: None,
                });
            }
        }
        let history = History::new(tables)?;
        let format = match self.format {
            Output::Table => Format::Table,
            Output::Json => Format::Json,
            Output::Csv => Format::Csv,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let runtime = runtime.map_err(|error| Failure::running(error.to_string()))?;
        // A person at a terminal asked: no limit on rows, but on time and memory.
        let limits = Limits { rows: usize::MAX, ..Limits::default() };
        let answer = runtime.block_on(history.query_text(&self.sql, format, &limits));
        let mut text = answer.map_err(|error| by_blame(&error.into()))?;
        if !text.ends_with('\n') {
            text.push('\n');
        }
        print(&text)
    }
}
