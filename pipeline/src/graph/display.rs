//! The graph as text: for a terminal, for Mermaid, for Graphviz.

use std::fmt::Write;

use super::{Graph, GraphPipeline, GraphSink, GraphSource, Producer};
use crate::schema::type_word;

impl Graph {
    fn producer_name(&self, producer: Producer) -> String {
        match producer {
            Producer::Source(index) | Producer::SourceErrors(index) => self.sources[index].name.clone(),
            Producer::Pipeline(index) => self.pipelines[index].name.clone(),
        }
    }

    /// The kind and name of a node: names alone may be words of Mermaid (`end`), or be those of a sink too.
    fn producer_id(&self, producer: Producer) -> String {
        let kind = if matches!(producer, Producer::Pipeline(_)) { "pipeline" } else { "source" };
        format!("{kind}_{}", self.producer_name(producer))
    }

    /// Every edge as (from, to, what flows).
    fn edges(&self) -> Vec<(String, String, &'static str)> {
        let mut edges = Vec::new();
        for pipeline in &self.pipelines {
            for input in &pipeline.inputs {
                let what = if input.input == 0 { "" } else { "join" };
                edges.push((self.producer_id(input.producer), format!("pipeline_{}", pipeline.name), what));
            }
        }
        for sink in &self.sinks {
            for producer in &sink.producers {
                let what = if matches!(producer, Producer::SourceErrors(_)) { "errors" } else { "" };
                edges.push((self.producer_id(*producer), format!("sink_{}", sink.name), what));
            }
        }
        edges
    }

    /// One line per node, with the columns on every edge.
    pub fn to_text(&self) -> String {
        let mut text = String::new();
        let columns = |schema: &arrow::datatypes::SchemaRef| {
            let list: Vec<String> = schema.fields().iter().map(|f| format!("{}: {}", f.name(), type_word(f))).collect();
            list.join(", ")
        };
        for source in &self.sources {
            let demand = if source.on_demand { ", on demand" } else { "" };
            let _ = writeln!(text, "source {} ({}{demand})", source.name, source.type_name);
            let _ = writeln!(text, "  {}", columns(&source.shape.schema));
        }
        for pipeline in &self.pipelines {
            let from: Vec<String> = pipeline.inputs.iter().map(|input| self.producer_name(input.producer)).collect();
            let _ = write!(text, "pipeline {} <- {}", pipeline.name, from.join(", "));
            let _ = match pipeline.step_names.as_slice() {
                [] => writeln!(text),
                steps => writeln!(text, " | {}", steps.join(" | ")),
            };
            let _ = writeln!(text, "  {}", columns(&pipeline.shape.schema));
            if !pipeline.shape.keys.is_empty() {
                let _ = writeln!(text, "  key: {}", pipeline.shape.keys.join(", "));
            }
        }
        for sink in &self.sinks {
            let from: Vec<&str> = sink.inputs.iter().map(|input| input.metric.as_str()).collect();
            let _ = writeln!(text, "sink {} ({}) <- {}", sink.name, sink.type_name, from.join(", "));
        }
        text
    }

    /// A Mermaid flowchart.
    pub fn to_mermaid(&self) -> String {
        let mut text = String::from("flowchart LR\n");
        for GraphSource { name, type_name, .. } in &self.sources {
            let _ = writeln!(text, "  source_{name}[/\"{name}<br/>{type_name}\"/]");
        }
        for GraphPipeline { name, step_names, .. } in &self.pipelines {
            let _ = writeln!(text, "  pipeline_{name}[\"{name}<br/>{}\"]", step_names.join(" | "));
        }
        for GraphSink { name, type_name, .. } in &self.sinks {
            let _ = writeln!(text, "  sink_{name}[(\"{name}<br/>{type_name}\")]");
        }
        for (from, to, what) in self.edges() {
            let _ = match what {
                "" => writeln!(text, "  {from} --> {to}"),
                what => writeln!(text, "  {from} -- {what} --> {to}"),
            };
        }
        text
    }

    /// A Graphviz digraph.
    pub fn to_dot(&self) -> String {
        let mut text = String::from("digraph tailwater {\n  rankdir=LR;\n");
        for GraphSource { name, type_name, .. } in &self.sources {
            let _ = writeln!(text, "  \"source_{name}\" [shape=parallelogram, label=\"{name}\\n{type_name}\"];");
        }
        for GraphPipeline { name, step_names, .. } in &self.pipelines {
            let steps = step_names.join(" | ");
            let _ = writeln!(text, "  \"pipeline_{name}\" [shape=box, label=\"{name}\\n{steps}\"];");
        }
        for GraphSink { name, type_name, .. } in &self.sinks {
            let _ = writeln!(text, "  \"sink_{name}\" [shape=cylinder, label=\"{name}\\n{type_name}\"];");
        }
        for (from, to, what) in self.edges() {
            let _ = writeln!(text, "  \"{from}\" -> \"{to}\" [label=\"{what}\"];");
        }
        text.push_str("}\n");
        text
    }
}
