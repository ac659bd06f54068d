//! From parsed entries to a checked graph, collecting every problem on the way.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use xxhash_rust::xxh3::xxh3_64;

use super::{
    EventTime, Graph, GraphPipeline, GraphSink, GraphSource, Input, Producer, downstream, errors_schema, unknown,
};
use crate::config::pipelines::{PipelineEntry, SinkEntry, SourceEntry};
use crate::config::tree::{Node, Value};
use crate::config::{At, CheckContext, Pipelines, Position, Problems, did_you_mean};
use crate::plugin::operator::AnyOperator;
use crate::plugin::sink::AnySink;
use crate::plugin::source::AnySource;
use crate::plugin::{
    Delivery, Mount, Operator, Planned, Plugins, Promise, SinkInput, SourcePlugin, SourceShape, StreamShape,
};
use crate::schema::type_word;

/// Metric of a source's row errors: the source's name and this.
pub const ERRORS_SUFFIX: &str = "_errors";

/// Paths of the engine's own HTTP surface (`http::api` mounts them). One that ends with a slash stands for everything
/// below it. Others below `/api/v1/` are free: clients of an earlier service find their stream where it was.
const OWN_PATHS: [&str; 9] = [
    "/",
    "/health",
    "/ready",
    "/metrics",
    "/api/v1/pipelines",
    "/api/v1/metrics/",
    "/api/v1/stats",
    "/api/v1/connections",
    "/api/v1/query",
];

/// Fewer microseconds than this between checkpoints and the disk does nothing else.
const CHECKPOINT_US_MIN: i64 = 10_000;

/// Checks the parsed file. `None` if anything is wrong; then every problem is in `problems`.
pub fn check(file: &Pipelines, plugins: &Plugins, problems: &mut Problems) -> Option<Graph> {
    let mut checker = Checker { file, plugins, problems, names: BTreeMap::new() };
    checker.file_level();
    checker.names();
    let sources: Vec<Option<GraphSource>> = file.sources.iter().map(|entry| checker.source(entry)).collect();
    let steps: Vec<Vec<ReadStep>> = file.pipelines.iter().map(|entry| checker.read_steps(entry)).collect();
    let order = checker.order(&steps);
    let pipelines = checker.pipelines(&order, &steps, &sources);
    let sinks = checker.sinks(&pipelines);
    checker.mounts(&sources, &sinks);
    checker.history_folders(&sinks);
    if checker.problems.has_errors() {
        return None;
    }
    let graph = Graph {
        folder: file.folder.clone(),
        listen: file.server.listen.value.clone(),
        checkpoint_every: file.checkpoint.every.value,
        state_dir: file.folder.join(&file.checkpoint.dir),
        durability: file.checkpoint.durability,
        sources: sources.into_iter().collect::<Option<_>>()?,
        pipelines: pipelines.into_iter().map(|p| p.pipeline).collect::<Option<_>>()?,
        sinks: sinks.into_iter().collect::<Option<_>>()?,
    };
    notes(file, &graph, plugins, problems);
    Some(graph)
}

/// What a name of the shared namespace stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Named {
    Source(usize),
    Pipeline(usize),
}

struct Checker<'a> {
    file: &'a Pipelines,
    plugins: &'a Plugins,
    problems: &'a mut Problems,
    names: BTreeMap<&'a str, Named>,
}

/// A step's options; `None` if they have errors.
type ReadStep = Option<Box<dyn AnyOperator>>;

/// A pipeline on its way; `pipeline` is `None` if it has errors.
struct Checked {
    entry: usize,
    shape: Option<StreamShape>,
    pipeline: Option<GraphPipeline>,
}

impl<'a> Checker<'a> {
    fn context(&mut self, node: String, position: Position) -> CheckContext<'_> {
        let asked = self.file.guarantee.is_some();
        CheckContext::new(self.problems, node, position, &self.file.folder).asked_exactly_once(asked)
    }

    fn file_level(&mut self) {
        let file = self.file;
        let listen = &file.server.listen;
        let mut cx = self.context("server".to_owned(), Position::default());
        if listen.parse::<std::net::SocketAddr>().is_err() {
            let hint = Some("an address and a port: `127.0.0.1:8080`, `0.0.0.0:80`".to_owned());
            cx.error_hint(listen.position, format!("`{}` is no address to listen on", listen.value), hint);
        }
        let every = &file.checkpoint.every;
        let mut cx = self.context("checkpoint".to_owned(), Position::default());
        if every.as_us() < CHECKPOINT_US_MIN {
            cx.error(every.position, "checkpoints closer than 10ms leave no time for anything else");
        }
        if file.sources.is_empty() && cx.errors() == 0 {
            self.context(String::new(), Position::default()).error(Position::default(), "the file names no source");
        }
    }

    fn names(&mut self) {
        let sources = self.file.sources.iter().enumerate().map(|(i, e)| (&e.name, Named::Source(i)));
        let pipelines = self.file.pipelines.iter().enumerate().map(|(i, e)| (&e.name, Named::Pipeline(i)));
        for (name, named) in sources.chain(pipelines) {
            if self.names.insert(name.value.as_str(), named).is_some() {
                let mut cx = self.context(format!("pipeline {}", name.value), name.position);
                cx.error(
                    name.position,
                    format!("`{}` is a source already; sources and pipelines share their names", name.value),
                );
            }
        }
        for (index, source) in self.file.sources.iter().enumerate() {
            let errors = format!("{}{ERRORS_SUFFIX}", source.name.value);
            if source.common.errors.is_some() && self.names.contains_key(errors.as_str()) {
                let position = self.file.sources[index].position;
                let mut cx = self.context(format!("source {}", source.name.value), position);
                cx.error(position, format!("the name `{errors}` is needed for the rows in error of this source"));
            }
        }
    }

    fn source(&mut self, entry: &SourceEntry) -> Option<GraphSource> {
        let file = self.file;
        let plugins = self.plugins;
        let mut cx = self.context(format!("source {}", entry.name.value), entry.position);
        let type_name = &entry.common.type_name;
        let Some(plugin) = plugins.source(type_name) else {
            let hint = did_you_mean(type_name, plugins.sources.iter().map(|p| p.type_name));
            cx.error_hint(type_name.position, format!("no source type `{}`", type_name.value), hint);
            return None;
        };
        if let Some(errors) = &entry.common.errors {
            sink_exists(file, errors, &mut cx);
        }
        let (config, shape) = match (plugin.read)(&entry.options, &mut cx) {
            Some(config) => {
                let shape = config.check(&mut cx)?;
                (config, shape)
            }
            None => columns_in_spite(plugin, entry, &file.folder)?,
        };
        let config: Arc<dyn AnySource> = config.into();
        if cx.exactly_once() && !shape.delivery.is_exact() {
            let message =
                format!("source `{}` cannot promise exactly once: {}", entry.name.value, shape.delivery.sentence());
            cx.error_hint(type_name.position, message, plugin.instead.map(str::to_owned));
        }
        duplicate_columns(&shape.schema, entry.position, &mut cx);
        let event_time = entry.common.event_time.as_ref().and_then(|config| {
            let column = cx.column(&config.field, &shape.schema)?;
            let field = shape.schema.field(column);
            if !matches!(field.data_type(), DataType::Timestamp(..) | DataType::Null) {
                let hint = "give it the type `timestamp`, or `timestamp_ms` if it is a number".to_owned();
                let message = format!("`{}` is {}, not a timestamp", field.name(), type_word(field));
                cx.error_hint(config.field.position, message, Some(hint));
            }
            Some(EventTime { column, lateness_us: config.lateness.as_us(), idle_us: config.idle.as_us() })
        });
        let on_demand = entry.common.on_demand.value;
        if on_demand && !shape.can_be_on_demand {
            let message = format!("a `{}` source cannot wait for demand: rows would be missed", type_name.value);
            cx.error(entry.common.on_demand.position, message);
        }
        let identity = match shape.delivery {
            Delivery::Replayable => config.identity().unwrap_or_else(|| canonical(&entry.options)),
            // Without a position there is nothing that an edited option could change.
            delivery => format!("{delivery:?}"),
        };
        let fingerprint = |of: &str| xxh3_64(format!("{}{of}", type_name.value).as_bytes());
        Some(GraphSource {
            name: entry.name.value.clone(),
            type_name: type_name.value.clone(),
            config,
            shape,
            event_time,
            on_demand,
            fingerprint: fingerprint(&identity),
            fingerprint_of_options: fingerprint(&canonical(&entry.options)),
        })
    }

    /// Reads the options of every step.
    fn read_steps(&mut self, entry: &PipelineEntry) -> Vec<ReadStep> {
        let plugins = self.plugins;
        let mut list = Vec::new();
        for (number, step) in entry.steps.iter().enumerate() {
            let Some(options) = &step.options else {
                list.push(None);
                continue;
            };
            let mut cx = self.context(step_node(entry, number), step.name.position);
            list.push(match plugins.operator(&step.name) {
                Some(plugin) => (plugin.read)(options, &mut cx),
                None => {
                    let hint = did_you_mean(&step.name, plugins.operators.iter().map(|p| p.type_name));
                    cx.error_hint(step.name.position, format!("no operator `{}`", step.name.value), hint);
                    None
                }
            });
        }
        list
    }

    /// Indices of the pipelines, each after those that it reads. Reports cycles; their members come last.
    fn order(&mut self, steps: &[Vec<ReadStep>]) -> Vec<usize> {
        let file = self.file;
        let reads: Vec<Vec<usize>> =
            file.pipelines.iter().zip(steps).map(|(entry, steps)| self.pipelines_read(entry, steps)).collect();
        let mut order: Vec<usize> = Vec::new();
        let mut placed = vec![false; reads.len()];
        loop {
            let ready = (0..reads.len()).find(|i| !placed[*i] && reads[*i].iter().all(|from| placed[*from]));
            let Some(next) = ready else { break };
            placed[next] = true;
            order.push(next);
        }
        if let Some(cycle) = find_cycle(&reads, &placed) {
            let names: Vec<&str> = cycle.iter().map(|i| file.pipelines[*i].name.value.as_str()).collect();
            let entry = &file.pipelines[cycle[0]];
            let mut cx = self.context(format!("pipeline {}", entry.name.value), entry.position);
            cx.error(entry.position, format!("a cycle: {} -> {}", names.join(" -> "), names[0]));
        }
        order.extend((0..reads.len()).filter(|i| !placed[*i]));
        order
    }

    fn pipelines_read(&self, entry: &PipelineEntry, steps: &[ReadStep]) -> Vec<usize> {
        let sides = steps.iter().flatten().flat_map(|step| step.side_inputs()).map(|name| name.value);
        let from = entry.config.from.0.iter().map(|name| name.value.clone());
        from.chain(sides)
            .filter_map(|name| match self.names.get(name.as_str()) {
                Some(Named::Pipeline(index)) => Some(*index),
                _ => None,
            })
            .collect()
    }

    fn pipelines(&mut self, order: &[usize], steps: &[Vec<ReadStep>], sources: &[Option<GraphSource>]) -> Vec<Checked> {
        let mut done: Vec<Checked> = Vec::new();
        for &index in order {
            let checked = self.pipeline(index, &steps[index], sources, &done);
            done.push(checked);
        }
        done
    }

    fn pipeline(
        &mut self,
        index: usize,
        read_steps: &[ReadStep],
        sources: &[Option<GraphSource>],
        done: &[Checked],
    ) -> Checked {
        let entry = &self.file.pipelines[index];
        let node = format!("pipeline {}", entry.name.value);
        let errors_before = self.problems.errors();
        for name in &entry.config.to.0 {
            let file = self.file;
            sink_exists(file, name, &mut self.context(node.clone(), entry.position));
        }
        let mut inputs = Vec::new();
        let first = self.from(entry, sources, done, &mut inputs);
        let (steps, shape) = self.steps(entry, read_steps, first, done, &mut inputs);
        let shape = shape.map(|shape| self.keys(entry, shape));
        let whole = self.problems.errors() == errors_before;
        let pipeline = shape.clone().zip(steps).filter(|_| whole).map(|(shape, steps)| GraphPipeline {
            name: entry.name.value.clone(),
            fingerprint: fingerprint(entry, &inputs, sources, done),
            inputs,
            step_names: entry.steps.iter().map(|step| step.name.value.clone()).collect(),
            steps,
            shape,
            to: self.sink_indices(entry),
        });
        Checked { entry: index, shape, pipeline }
    }

    fn sink_indices(&self, entry: &PipelineEntry) -> Vec<usize> {
        let position = |name: &At<String>| self.file.sinks.iter().position(|sink| sink.name.value == name.value);
        let mut indices: Vec<usize> = Vec::new();
        for index in entry.config.to.0.iter().filter_map(position) {
            if !indices.contains(&index) {
                indices.push(index);
            }
        }
        indices
    }

    /// Finds a producer by name. Its shape is `None` if it has errors itself, or is a source that `sources` leaves out.
    fn producer(
        &mut self,
        name: &At<String>,
        sources: &[Option<GraphSource>],
        done: &[Checked],
        cx_node: (&str, Position),
    ) -> Option<(Producer, Option<StreamShape>)> {
        match self.names.get(name.value.as_str()) {
            Some(Named::Source(index)) => {
                let source = sources.get(*index).and_then(Option::as_ref);
                let shape = source.map(|source| StreamShape {
                    schema: Arc::clone(&source.shape.schema),
                    keys: Vec::new(),
                    windowed: false,
                });
                Some((Producer::Source(*index), shape))
            }
            Some(Named::Pipeline(index)) => {
                let at = done.iter().position(|checked| checked.entry == *index)?;
                Some((Producer::Pipeline(at), done[at].shape.clone()))
            }
            None if self.file.unreadable.contains(&name.value) => None,
            None => {
                let hint = did_you_mean(&name.value, self.names.keys());
                let mut cx = self.context(cx_node.0.to_owned(), cx_node.1);
                cx.error_hint(name.position, format!("no source or pipeline `{}`", name.value), hint);
                None
            }
        }
    }

    /// Resolves `from` and unites several inputs by column name.
    fn from(
        &mut self,
        entry: &PipelineEntry,
        sources: &[Option<GraphSource>],
        done: &[Checked],
        inputs: &mut Vec<Input>,
    ) -> Option<StreamShape> {
        let node = format!("pipeline {}", entry.name.value);
        let names = &entry.config.from.0;
        let mut shapes: Vec<(&At<String>, Producer, Option<StreamShape>)> = Vec::new();
        for name in names {
            if shapes.iter().any(|(other, ..)| other.value == name.value) {
                let mut cx = self.context(node.clone(), entry.position);
                cx.error(name.position, format!("`{}` is named twice", name.value));
                continue;
            }
            if let Some((producer, shape)) = self.producer(name, sources, done, (&node, entry.position)) {
                shapes.push((name, producer, shape));
            }
        }
        if names.is_empty() && !entry.is_partial {
            self.context(node.clone(), entry.position).error(entry.position, "`from` names no source or pipeline");
        }
        let known: Vec<(&At<String>, StreamShape)> =
            shapes.iter().filter_map(|(name, _, shape)| Some((*name, shape.clone()?))).collect();
        let mut cx = self.context(node, entry.position);
        let united = if known.len() == names.len() { unite(&known, &mut cx) } else { None };
        for (_, producer, shape) in &shapes {
            let unite = united.as_ref().filter(|_| names.len() > 1).zip(shape.as_ref()).map(|(united, shape)| {
                let columns = united.schema.fields().iter().map(|f| shape.schema.index_of(f.name()).ok()).collect();
                (Arc::clone(&united.schema), columns)
            });
            inputs.push(Input { producer: *producer, step: 0, input: 0, unite });
        }
        united
    }

    /// Plans the steps. After one whose result cannot be told, the later ones are not planned: their columns are
    /// unknown. Their options were read, so mistakes there are reported all the same.
    fn steps(
        &mut self,
        entry: &PipelineEntry,
        read_steps: &[ReadStep],
        first: Option<StreamShape>,
        done: &[Checked],
        inputs: &mut Vec<Input>,
    ) -> (Option<Vec<Box<dyn Operator>>>, Option<StreamShape>) {
        let mut shape = first;
        let mut operators = Some(Vec::new());
        for (number, (step, read)) in entry.steps.iter().zip(read_steps).enumerate() {
            let node = step_node(entry, number);
            let mut step_inputs: Option<Vec<StreamShape>> = shape.take().map(|s| vec![s]);
            let sides = read.iter().flat_map(|operator| operator.side_inputs());
            for (side_index, side) in sides.enumerate() {
                let side_shape = match self.producer(&side, &[], done, (&node, step.name.position)) {
                    Some((producer @ Producer::Pipeline(_), side_shape)) => {
                        inputs.push(Input { producer, step: number, input: side_index + 1, unite: None });
                        side_shape
                    }
                    Some(_) => {
                        let message = format!("`{}` is a source; only a pipeline can be joined", side.value);
                        self.context(node.clone(), step.name.position).error(side.position, message);
                        None
                    }
                    None => None,
                };
                step_inputs = step_inputs.zip(side_shape).map(|(mut list, side)| {
                    list.push(side);
                    list
                });
            }
            let kept = read.as_ref().filter(|operator| operator.keeps_columns());
            let kept = kept.and(step_inputs.as_ref()).and_then(|list| list.first().cloned());
            let planned = step_inputs.zip(read.as_ref()).and_then(|(list, operator)| {
                plan(operator.as_ref(), &list, self.problems, (&node, step.name.position, &self.file.folder))
            });
            let mut cx = self.context(node, step.name.position);
            match planned {
                Some(Planned { shape: next, operator }) => {
                    duplicate_columns(&next.schema, step.name.position, &mut cx);
                    shape = Some(next);
                    operators = operators.map(|mut list: Vec<Box<dyn Operator>>| {
                        list.push(operator);
                        list
                    });
                }
                None => (operators, shape) = (None, kept),
            }
        }
        (operators, shape)
    }

    fn keys(&mut self, entry: &PipelineEntry, mut shape: StreamShape) -> StreamShape {
        let keys = &entry.config.key.0;
        let mut cx = self.context(format!("pipeline {}", entry.name.value), entry.position);
        for key in keys {
            cx.column(key, &shape.schema);
        }
        if !keys.is_empty() {
            shape.keys = keys.iter().map(|key| key.value.clone()).collect();
        }
        shape
    }

    fn sinks(&mut self, pipelines: &[Checked]) -> Vec<Option<GraphSink>> {
        self.file.sinks.iter().map(|entry| self.sink(entry, pipelines)).collect()
    }

    fn sink(&mut self, entry: &SinkEntry, pipelines: &[Checked]) -> Option<GraphSink> {
        let file = self.file;
        let plugins = self.plugins;
        let node = format!("sink {}", entry.name.value);
        let mut cx = self.context(node.clone(), entry.position);
        let Some(plugin) = plugins.sink(&entry.type_name) else {
            let hint = did_you_mean(&entry.type_name, plugins.sinks.iter().map(|p| p.type_name));
            cx.error_hint(entry.type_name.position, format!("no sink type `{}`", entry.type_name.value), hint);
            return None;
        };
        let config: Arc<dyn AnySink> = (plugin.read)(&entry.options, &mut cx)?.into();
        let mut inputs = Vec::new();
        let mut producers = Vec::new();
        // What an entry that could not be read would write is as unknown as the rows of a pipeline with errors.
        let mut all_known = file.unreadable.is_empty();
        for (index, checked) in pipelines.iter().enumerate() {
            let pipeline = &file.pipelines[checked.entry];
            if pipeline.config.to.0.iter().any(|name| name.value == entry.name.value) {
                all_known &= checked.shape.is_some();
                let Some(shape) = checked.shape.clone() else { continue };
                inputs.push(SinkInput { metric: pipeline.name.value.clone(), shape });
                producers.push(Producer::Pipeline(index));
            }
        }
        for (index, source) in file.sources.iter().enumerate() {
            if source.common.errors.as_ref().is_some_and(|name| name.value == entry.name.value) {
                let metric = format!("{}{ERRORS_SUFFIX}", source.name.value);
                let shape = StreamShape { schema: errors_schema(), keys: Vec::new(), windowed: false };
                inputs.push(SinkInput { metric, shape });
                producers.push(Producer::SourceErrors(index));
            }
        }
        let known: &[SinkInput] = if all_known { &inputs } else { &[] };
        let shapes: Vec<StreamShape> = known.iter().map(|input| input.shape.clone()).collect();
        let checked = unknown::for_every_type(&shapes, self.problems, |shapes, problems| {
            let of = |(input, shape): (&SinkInput, &StreamShape)| SinkInput { shape: shape.clone(), ..input.clone() };
            let inputs: Vec<SinkInput> = known.iter().zip(shapes).map(of).collect();
            let cx = CheckContext::new(problems, node.clone(), entry.position, &file.folder);
            config.check(&inputs, &mut cx.asked_exactly_once(file.guarantee.is_some()))
        });
        let shape = checked.into_iter().next().flatten()?;
        let mut cx = self.context(node, entry.position);
        if inputs.is_empty() && all_known {
            cx.note(entry.position, "no pipeline writes to this sink");
        }
        // Rows in error are there to be looked at.
        let takes_rows = producers.iter().any(|producer| matches!(producer, Producer::Pipeline(_)));
        if cx.exactly_once() && takes_rows && shape.promise == Promise::AtLeastOnce {
            let name = &entry.name.value;
            let message = format!("sink `{name}` cannot promise exactly once: {}", shape.promise.sentence());
            cx.error_hint(entry.type_name.position, message, plugin.instead.map(str::to_owned));
        }
        let (name, type_name) = (entry.name.value.clone(), entry.type_name.value.clone());
        Some(GraphSink { name, type_name, config, inputs, producers, shape })
    }

    /// Two sinks that keep history in one folder: their files could not be told apart by pipeline.
    fn history_folders(&mut self, sinks: &[Option<GraphSink>]) {
        let file = self.file;
        let mut taken: HashMap<&Path, &str> = HashMap::new();
        for (sink, entry) in sinks.iter().zip(&file.sinks) {
            let Some(folder) = sink.as_ref().and_then(|sink| sink.shape.history.as_deref()) else { continue };
            if let Some(other) = taken.insert(folder, &entry.name.value) {
                let mut cx = self.context(format!("sink {}", entry.name.value), entry.position);
                let message = format!("the folder `{}` is taken by sink {other} already", folder.display());
                cx.error(entry.position, message);
            }
        }
    }

    /// Two plugins on one path, or a plugin on one of the engine's.
    fn mounts(&mut self, sources: &[Option<GraphSource>], sinks: &[Option<GraphSink>]) {
        let file = self.file;
        let mut taken: HashMap<Mount, String> = HashMap::new();
        let of_sources = sources.iter().zip(&file.sources).filter_map(|(source, entry)| {
            let mounts = source.as_ref()?.shape.mounts.clone();
            Some((format!("source {}", entry.name.value), entry.position, mounts))
        });
        let of_sinks = sinks.iter().zip(&file.sinks).filter_map(|(sink, entry)| {
            let mounts = sink.as_ref()?.shape.mounts.clone();
            Some((format!("sink {}", entry.name.value), entry.position, mounts))
        });
        let all: Vec<_> = of_sources.chain(of_sinks).collect();
        for (node, position, mounts) in all {
            for mount in mounts {
                let own = OWN_PATHS.iter().any(|path| {
                    mount.path == *path || (path.len() > 1 && path.ends_with('/') && mount.path.starts_with(path))
                });
                let mut cx = self.context(node.clone(), position);
                if own {
                    cx.error(position, format!("the path `{}` belongs to the program itself", mount.path));
                }
                let path = mount.path.clone();
                if let Some(other) = taken.insert(mount, node.clone()) {
                    cx.error(position, format!("the path `{path}` is taken by {other} already"));
                }
            }
        }
    }
}

/// What is left of a source whose options could not all be read, if that tells the columns: only single values are wrong, no
/// list and no mapping, and no key is unknown, which may be that of the columns misspelt.
fn columns_in_spite(
    plugin: &SourcePlugin,
    entry: &SourceEntry,
    folder: &Path,
) -> Option<(Box<dyn AnySource>, SourceShape)> {
    let mut found = Problems::default();
    let mut cx = CheckContext::new(&mut found, "", entry.position, folder);
    let config = (plugin.read_rest)(&entry.options, &mut cx)?;
    // What it says of the rest may come of what is missing there.
    let shape = config.check(&mut CheckContext::new(&mut Problems::default(), "", entry.position, folder))?;
    let is_single = |position: Position| {
        let values = entry.options.mapping().unwrap_or_default().iter().map(|(_, value)| value);
        values.into_iter().any(|value| value.position == position && value.text().is_some())
    };
    found.sorted().iter().all(|problem| is_single(problem.position)).then_some((config, shape))
}

/// Plans one step; where a type of its inputs is not known, for every type that it may be.
fn plan(
    operator: &dyn AnyOperator,
    inputs: &[StreamShape],
    problems: &mut Problems,
    (node, position, folder): (&str, Position, &Path),
) -> Option<Planned> {
    let planned = unknown::for_every_type(inputs, problems, |inputs, problems| {
        operator.plan(inputs, &mut CheckContext::new(problems, node, position, folder))
    });
    let shapes: Vec<StreamShape> = planned.iter().flatten().map(|planned| planned.shape.clone()).collect();
    let best = planned.into_iter().flatten().next()?;
    Some(Planned { shape: unknown::common(&shapes)?, operator: best.operator })
}

/// The name of a step in messages.
fn step_node(entry: &PipelineEntry, number: usize) -> String {
    format!("pipeline {} step {} ({})", entry.name.value, number + 1, entry.steps[number].name.value)
}

fn sink_exists(file: &Pipelines, name: &At<String>, cx: &mut CheckContext<'_>) {
    if !file.sinks.iter().any(|sink| sink.name.value == name.value) && !file.unreadable.contains(&name.value) {
        let hint = did_you_mean(&name.value, file.sinks.iter().map(|sink| &sink.name.value));
        cx.error_hint(name.position, format!("no sink `{}`", name.value), hint);
    }
}

fn duplicate_columns(schema: &SchemaRef, position: Position, cx: &mut CheckContext<'_>) {
    for (index, field) in schema.fields().iter().enumerate() {
        if schema.fields()[..index].iter().any(|other| other.name() == field.name()) {
            cx.error(position, format!("two columns named `{}`", field.name()));
        }
    }
}

/// Unites inputs by column name: equal types, missing = null.
fn unite(inputs: &[(&At<String>, StreamShape)], cx: &mut CheckContext<'_>) -> Option<StreamShape> {
    let (first_name, first) = inputs.first()?;
    let mut fields: Vec<(Arc<Field>, &str)> =
        first.schema.fields().iter().map(|f| (Arc::clone(f), first_name.value.as_str())).collect();
    for (name, shape) in &inputs[1..] {
        for field in shape.schema.fields() {
            match fields.iter_mut().find(|(other, _)| other.name() == field.name()) {
                None => fields.push((Arc::clone(field), name.value.as_str())),
                Some((other, _)) if other.data_type() == field.data_type() => {}
                // A type that is not known is no other type.
                Some((other, _)) if *other.data_type() == DataType::Null => *other = Arc::clone(field),
                Some(_) if *field.data_type() == DataType::Null => {}
                Some((other, owner)) => {
                    let message = format!(
                        "column `{}` is {} in `{owner}` and {} in `{}`",
                        field.name(),
                        type_word(other),
                        type_word(field),
                        name.value
                    );
                    let hint = Some("make the types equal, or rename one with a `select` step".to_owned());
                    cx.error_hint(name.position, message, hint);
                }
            }
        }
    }
    let keys = if inputs.iter().all(|(_, shape)| shape.keys == first.keys) { first.keys.clone() } else { Vec::new() };
    let windowed = inputs.iter().all(|(_, shape)| shape.windowed);
    let fields: Vec<Arc<Field>> = fields.into_iter().map(|(field, _)| field).collect();
    Some(StreamShape { schema: Arc::new(Schema::new(fields)), keys, windowed })
}

/// A cycle among the pipelines that could not be placed.
fn find_cycle(reads: &[Vec<usize>], placed: &[bool]) -> Option<Vec<usize>> {
    let start = placed.iter().position(|placed| !placed)?;
    let mut path = vec![start];
    loop {
        let last = *path.last()?;
        let next = *reads[last].iter().find(|from| !placed[**from])?;
        if let Some(at) = path.iter().position(|i| *i == next) {
            return Some(path.split_off(at));
        }
        path.push(next);
    }
}

/// The values below `node`, without places and comments.
fn canonical(node: &Node) -> String {
    match &node.value {
        Value::Scalar(scalar) => format!("{:?}", scalar.text),
        Value::Sequence(items) => format!("[{}]", items.iter().map(canonical).collect::<Vec<_>>().join(",")),
        Value::Mapping(entries) => {
            let entries = entries.iter().map(|(key, value)| format!("{:?}:{}", key.name, canonical(value)));
            format!("{{{}}}", entries.collect::<Vec<_>>().join(","))
        }
    }
}

/// Of the steps, the input columns, and the names that they come from.
fn fingerprint(entry: &PipelineEntry, inputs: &[Input], sources: &[Option<GraphSource>], done: &[Checked]) -> u64 {
    let mut text = String::new();
    for step in &entry.steps {
        let options = step.options.as_ref().map(canonical).unwrap_or_default();
        text.push_str(&format!("{}:{options};", step.name.value));
    }
    for input in inputs {
        let schema = match input.producer {
            Producer::Source(index) | Producer::SourceErrors(index) => {
                sources.get(index).and_then(Option::as_ref).map(|source| Arc::clone(&source.shape.schema))
            }
            Producer::Pipeline(index) => done[index].shape.as_ref().map(|shape| Arc::clone(&shape.schema)),
        };
        let columns = schema.iter().flat_map(|schema| schema.fields().iter());
        for field in columns {
            text.push_str(&format!("{}={},", field.name(), field.data_type()));
        }
    }
    xxh3_64(text.as_bytes())
}

/// What the user should know of a graph that is right.
fn notes(file: &Pipelines, graph: &Graph, plugins: &Plugins, problems: &mut Problems) {
    for (index, (source, entry)) in graph.sources.iter().zip(&file.sources).enumerate() {
        let mut cx = CheckContext::new(problems, format!("source {}", source.name), entry.position, &file.folder);
        if downstream(&graph.pipelines, index).is_empty() {
            cx.note(entry.position, "no pipeline reads this source");
        }
        let durable = graph.durable_sinks(index);
        if let (true, Some(sink)) = (source.on_demand, durable.first()) {
            let position = entry.common.on_demand.position;
            cx.note(position, format!("`on_demand` has no effect: the sink `{}` always wants the rows", sink.name));
        }
        if let (Delivery::BestEffort, Some(sink)) = (source.shape.delivery, durable.first()) {
            let promise = source.shape.delivery.sentence();
            let message = format!("{promise}; the sink `{}` keeps only what arrives", sink.name);
            let instead = plugins.source(&source.type_name).and_then(|plugin| plugin.instead);
            cx.weakness(entry.common.type_name.position, message, instead.map(str::to_owned));
        }
    }
    for pipeline in &graph.pipelines {
        let read = graph.pipelines.iter().flat_map(|p| &p.inputs).any(|input| match input.producer {
            Producer::Pipeline(from) => graph.pipelines[from].name == pipeline.name,
            _ => false,
        });
        if pipeline.to.is_empty() && !read {
            let entry = file.pipelines.iter().find(|entry| entry.name.value == pipeline.name);
            let position = entry.map_or(Position::default(), |entry| entry.position);
            let mut cx = CheckContext::new(problems, format!("pipeline {}", pipeline.name), position, &file.folder);
            cx.note(position, "its rows go nowhere: it has no `to`, and no pipeline reads it");
        }
    }
}
