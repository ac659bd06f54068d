//! The checked graph: every edge has a schema, every plugin its options. It is made from the YAML alone; nothing
//! is opened. Only a [`Graph`] can be run.

mod check;
pub mod display;
#[cfg(test)]
mod tests;
mod unknown;

use std::path::PathBuf;
use std::sync::Arc;

use arrow::datatypes::SchemaRef;

pub use check::{ERRORS_SUFFIX, check};

use crate::config::Duration;
use crate::log::Durability;
use crate::plugin::sink::AnySink;
use crate::plugin::source::AnySource;
use crate::plugin::{Operator, SinkInput, SinkShape, SourceShape, StreamShape};
use crate::schema::{FieldType, schema_of};

/// A checked graph.
pub struct Graph {
    /// The YAML file's folder.
    pub folder: PathBuf,
    /// Address and port of the HTTP listener.
    pub listen: String,
    /// Time between two checkpoints.
    pub checkpoint_every: Duration,
    /// Folder of the state.
    pub state_dir: PathBuf,
    /// What acknowledged rows outlive.
    pub durability: Durability,
    /// Sources in file order.
    pub sources: Vec<GraphSource>,
    /// Pipelines, each after those that it reads.
    pub pipelines: Vec<GraphPipeline>,
    /// Sinks in file order.
    pub sinks: Vec<GraphSink>,
}

/// Which node an edge comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Producer {
    /// Rows of the source with this index.
    Source(usize),
    /// Row errors of the source with this index.
    SourceErrors(usize),
    /// Output of the pipeline with this index.
    Pipeline(usize),
}

/// A checked source.
pub struct GraphSource {
    /// Its name.
    pub name: String,
    /// The word after `type:`.
    pub type_name: String,
    /// Its options.
    pub config: Arc<dyn AnySource>,
    /// What it emits.
    pub shape: SourceShape,
    /// Where event time comes from; `None`: the time of receipt.
    pub event_time: Option<EventTime>,
    /// Whether it polls only on demand.
    pub on_demand: bool,
    /// Changes when a position means nothing any more: see
    /// [`SourceConfig::identity`](crate::plugin::SourceConfig::identity).
    pub fingerprint: u64,
    /// What stands in checkpoints of earlier versions instead: it changes with any option.
    pub fingerprint_of_options: u64,
}

/// Where event time comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventTime {
    /// Index of the timestamp column.
    pub column: usize,
    /// How far the watermark trails the newest event time, in microseconds.
    pub lateness_us: i64,
    /// After so long without a row, in microseconds, the source is idle.
    pub idle_us: i64,
}

/// A checked pipeline.
pub struct GraphPipeline {
    /// Its name.
    pub name: String,
    /// Its inputs.
    pub inputs: Vec<Input>,
    /// Names of its steps.
    pub step_names: Vec<String>,
    /// Its operators in order.
    pub steps: Vec<Box<dyn Operator>>,
    /// What it emits.
    pub shape: StreamShape,
    /// Indices of the sinks that it writes to.
    pub to: Vec<usize>,
    /// Changes when the steps or their inputs change: the state of other steps means nothing.
    pub fingerprint: u64,
}

/// One edge into a pipeline.
#[derive(Clone, Debug)]
pub struct Input {
    /// Where it comes from.
    pub producer: Producer,
    /// The step that takes it.
    pub step: usize,
    /// The input of that step: 0 for `from`, then the side inputs in order.
    pub input: usize,
    /// For `from: [a, b]`: the united schema, and for each of its columns the column of this input, if it has one.
    pub unite: Option<(SchemaRef, Vec<Option<usize>>)>,
}

/// A checked sink.
pub struct GraphSink {
    /// Its name.
    pub name: String,
    /// The word after `type:`.
    pub type_name: String,
    /// Its options.
    pub config: Arc<dyn AnySink>,
    /// What it takes, by index.
    pub inputs: Vec<SinkInput>,
    /// Where each input comes from.
    pub producers: Vec<Producer>,
    /// What the engine must know.
    pub shape: SinkShape,
}

impl Graph {
    /// Whether every source ends by itself: then the graph runs to its end.
    pub fn is_bounded(&self) -> bool {
        !self.sources.is_empty() && self.sources.iter().all(|source| source.shape.bounded)
    }

    /// The durable sinks that get rows of source `source`.
    pub fn durable_sinks(&self, source: usize) -> Vec<&GraphSink> {
        let mut sinks: Vec<usize> =
            downstream(&self.pipelines, source).iter().flat_map(|p| self.pipelines[*p].to.clone()).collect();
        sinks.sort_unstable();
        sinks.dedup();
        sinks.into_iter().map(|index| &self.sinks[index]).filter(|sink| !sink.shape.live).collect()
    }
}

/// The pipelines that get rows of source `source`, directly or through others. `pipelines` are in the order of the graph.
pub fn downstream(pipelines: &[GraphPipeline], source: usize) -> Vec<usize> {
    let mut reached: Vec<usize> = Vec::new();
    for (index, pipeline) in pipelines.iter().enumerate() {
        let reads = pipeline.inputs.iter().any(|input| match input.producer {
            Producer::Source(from) => from == source,
            Producer::Pipeline(from) => reached.contains(&from),
            Producer::SourceErrors(_) => false,
        });
        if reads {
            reached.push(index);
        }
    }
    reached
}

/// The columns of a source's row errors.
pub fn errors_schema() -> SchemaRef {
    schema_of([
        ("source", FieldType::String),
        ("time", FieldType::Timestamp(None)),
        ("error", FieldType::String),
        ("payload", FieldType::String),
    ])
}
