//! Runs a checked graph. The only place that spawns tasks, waits, retries and decides to stop.
//!
//! ```text
//! reader task -> intake task -> pipeline task(s) -> sink task -> (outbox -> delivery task)
//!      ^              ^                                  |
//!      |              +---- coordinator: barriers -------+ reports, commits
//!      +- connects, reconnects
//! ```
//!
//! Three pools of threads: `io` for sockets, sinks and the HTTP surface; `operators` for intake and pipelines;
//! `query` for history: its queries, and the upkeep of its files.

mod back_off;
mod clock;
mod coordinator;
mod demand;
pub mod doctor;
mod edge;
mod fresh;
#[cfg(any(test, fuzzing))]
pub mod fuzzing;
mod hold;
mod inbox;
pub mod inspect;
mod intake_task;
mod names;
mod outbox;
mod pipeline_task;
mod queue;
mod reader_task;
mod sink_task;
mod store;
mod upkeep_task;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures::FutureExt;
use futures::future::join_all;
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Handle, Runtime, RuntimeFlavor};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, block_in_place};
use tokio::time::{Duration, sleep, timeout};
use tracing::{info, warn};

pub use coordinator::Stopped;

use crate::disk::{Disk, RealDisk};
use crate::error::{Error, Result};
use crate::graph::{ERRORS_SUFFIX, Graph, GraphPipeline, GraphSink, GraphSource, Producer};
use crate::history::{History, Table, files};
use crate::http::{Routes, api, server};
use crate::live::Live;
use crate::plugin::{Delivery, HistoryTail, Sink, SinkContext, SourceContext};
use crate::state::StateReader;
use crate::status::{NodeKind, NodeState, NodeStatus, Status};
use crate::time::now_us;
use clock::SourceClock;
use coordinator::{Commit, Control, Coordinator, Report, STOP_DEADLINE};
use demand::Wanted;
use edge::{Inputs, Message, Outlet, Takes};
use hold::Hold;
use inbox::Inbox;
use intake_task::{IntakeTask, Unsettled};
use names::{
    INBOXES, fingerprint_of_sink, first_not_covered, inbox_folder, key_of_inbox, key_of_pipeline, key_of_sink,
    key_of_source, outbox_folder, recognize, what_it_keeps,
};
use outbox::{DeliveryTask, Outbox};
use pipeline_task::{PipelineTask, Port};
use queue::{Receiver, queue};
use reader_task::{ARRIVALS_MAX, ReaderTask};
use sink_task::{Running, SinkTask};
use store::{Checkpoint, Store};
use upkeep_task::UpkeepTask;

/// At a stop, live clients may say good-bye for this long.
const CLIENTS_WITHIN: Duration = Duration::from_secs(5);

/// At a stop, acknowledgements may be on their way to their senders for this long; what has none comes again.
const SOURCES_WITHIN: Duration = Duration::from_secs(5);

/// Sinks deliver once every source has tried to connect, but wait no longer than this: a source may run the very server
/// (an embedded broker) that a sink delivers to, and a sink that finds none would wait for its next try.
const SOURCES_FIRST: Duration = Duration::from_secs(1);

/// Commits that wait for a sink: of the checkpoint at hand, and of one that a stop has overtaken.
const COMMITS_MAX: usize = 4;

/// Reports and controls that wait; every node sends at most two a checkpoint.
const SIGNALS_MAX: usize = 1024;

/// How to run.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Take no new rows: restore, close every window, publish, end.
    pub drain: bool,
    /// Go on without the state: move it aside and start anew.
    pub fresh: bool,
    /// The web page: path and content type and text, mounted as they are.
    pub pages: Vec<(&'static str, &'static str, &'static str)>,
}

/// How a run ended.
#[derive(Debug)]
pub struct Outcome {
    /// Why it stopped.
    pub stopped: Stopped,
    /// Nodes that failed for good, with the reason.
    pub failed: Vec<(String, String)>,
}

/// Runs the graph until it ends or what `stop` gives resolves; `stop` is called first of all, within the runtime. Blocks
/// the calling thread.
pub fn run<S: Future<Output = ()> + Send>(graph: Graph, options: Options, stop: impl FnOnce() -> S) -> Result<Outcome> {
    let io = pool("io")?;
    let operators = pool("operators")?;
    let result = io.block_on(async {
        let stop = stop();
        let started = Starter::new(graph, options, operators.handle().clone()).await?;
        started.run(stop).await
    });
    // Tasks that still wait for a server that is away end here.
    operators.shutdown_background();
    io.shutdown_timeout(Duration::from_millis(500));
    result
}

fn pool(name: &'static str) -> Result<Runtime> {
    let pool = Builder::new_multi_thread().worker_threads(2).thread_name(name).enable_all().build();
    pool.map_err(|e| Error::outside("threads").because(e).fatal())
}

/// Everything that is shared while the nodes are put together.
struct Starter {
    graph: Graph,
    options: Options,
    operators: Handle,
    status: Arc<Status>,
    live: Arc<Live>,
    routes: Routes,
    listener: TcpListener,
    disk: Arc<dyn Disk>,
    store: Store,
    restored: Checkpoint,
    history: Arc<History>,
    tails: HashMap<(usize, usize), HistoryTail>,
}

impl Starter {
    async fn new(graph: Graph, options: Options, operators: Handle) -> Result<Self> {
        let disk: Arc<dyn Disk> = Arc::new(RealDisk);
        // Before it listens: a second process on the same state shall not look as if it ran.
        let mut store = Store::open(&graph.state_dir)?;
        let listen: SocketAddr =
            graph.listen.parse().map_err(|_| Error::user(format!("`{}` is no address", graph.listen)))?;
        let listener = TcpListener::bind(listen).await.map_err(|e| {
            Error::outside(format!("cannot listen on {listen} (`server: {{listen: …}}` chooses another port)"))
                .because(e)
                .fatal()
        })?;
        info!("listening on http://{listen}/");
        if options.fresh {
            match fresh::set_aside(&graph.state_dir, &graph.sinks)? {
                Some(aside) => warn!(
                    "the state is moved to `{}`: this run starts anew, without the positions, open windows and waiting rows in it",
                    aside.display()
                ),
                None => info!("there is no state to go on without"),
            }
        }
        let restored = store.latest()?;
        let inboxes = graph.sources.iter().map(|source| inbox_folder(&graph.state_dir, source));
        fresh::check_start(&graph.state_dir, restored.is_some(), inboxes)?;
        let mut restored = restored.unwrap_or_default();
        recognize(&mut restored, &graph.sources);
        let status = Arc::new(Status::default());
        let pipelines = graph.pipelines.iter().map(|p| (p.name.clone(), p.shape.keys.clone()));
        let errors = graph.sources.iter().map(|s| (format!("{}{ERRORS_SUFFIX}", s.name), Vec::new()));
        let epoch = format!("{:x}", now_us());
        let live = Arc::new(Live::new(epoch, Arc::clone(&status), pipelines.chain(errors)));
        let (tables, tails) = history_tables(&graph);
        let history = Arc::new(History::new(tables)?);
        let routes = Routes::default();
        Ok(Self { graph, options, operators, status, live, routes, listener, disk, store, restored, history, tails })
    }

    /// Builds and starts every node, then watches over them until the stop.
    async fn run(mut self, stop: impl Future<Output = ()> + Send) -> Result<Outcome> {
        self.warn_of_history_written_again();
        let sources = std::mem::take(&mut self.graph.sources);
        let pipelines = std::mem::take(&mut self.graph.pipelines);
        let sinks = std::mem::take(&mut self.graph.sinks);
        let summary = api::Summary::new(&sources, &pipelines, &sinks);
        let wanted = Wanted::new(&sources, &pipelines, &sinks);
        let (reporter, reports) = mpsc::channel(SIGNALS_MAX);
        let mut nodes = Nodes::new(reporter, &self.history);
        let source_status: Vec<_> =
            sources.iter().map(|s| self.status.node(NodeKind::Source, &s.name, &s.type_name)).collect();

        // Consumers first, so that every edge exists before its producer is built; and a sink that cannot be built
        // (a folder that cannot be written) stops the start before anything is read.
        let names: Vec<String> = pipelines.iter().map(|pipeline| pipeline.name.clone()).collect();
        let name_of = |producer: Producer| match producer {
            Producer::Source(index) | Producer::SourceErrors(index) => sources[index].name.clone(),
            Producer::Pipeline(index) => names[index].clone(),
        };
        for pipeline in pipelines {
            self.pipeline(pipeline, name_of, &mut nodes)?;
        }
        for (index, sink) in sinks.into_iter().enumerate() {
            self.sink(index, sink, &mut nodes)?;
        }
        for (index, (source, status)) in sources.into_iter().zip(source_status).enumerate() {
            self.source(index, &source, status, wanted.receiver(index), &mut nodes)?;
        }
        for (index, task) in nodes.pipelines.iter_mut().enumerate() {
            task.outlet = nodes.outlets.take(Producer::Pipeline(index));
        }

        self.warn_of_lost_state(&nodes.fingerprints);
        let left_inboxes = self.left_inboxes(&nodes)?;
        let next = (self.restored.number + 1).max(u64::try_from(now_us() / 1000).unwrap_or(1));
        let drain = self.options.drain;
        api::mount(&self.routes, &self.live, &self.history, summary, &self.options.pages);
        let server = server::start(self.listener, self.routes);
        tokio::spawn(wanted.watch(Arc::clone(&self.live)));
        let started = nodes.start(&self.operators, drain);
        let coordinator = Coordinator {
            store: self.store,
            status: Arc::clone(&self.status),
            every: *self.graph.checkpoint_every,
            stop_within: STOP_DEADLINE,
            next,
            controls: started.controls,
            commits: started.commits,
            _others: started.others,
            outboxes: started.outboxes,
            reports,
            nodes: started.fingerprints,
            left_inboxes,
            ended: BTreeSet::new(),
            failed: BTreeSet::new(),
        };
        let stopped = coordinator.run(stop, drain).await?;
        let _ = timeout(SOURCES_WITHIN, join_all(started.readers)).await;
        server.stop().await;
        let closed = async {
            while self.status.connections.totals().active_connections > 0 {
                sleep(Duration::from_millis(10)).await;
            }
        };
        // Live clients are told to go when their sink is dropped; one that does not answer is left behind.
        let _ = timeout(CLIENTS_WITHIN, closed).await;
        let failed = self.status.nodes().into_iter().filter_map(|node| match node.state() {
            NodeState::Failed(reason) => Some((format!("{} {}", node.kind.as_str(), node.name), reason)),
            _ => None,
        });
        Ok(Outcome { stopped, failed: failed.collect() })
    }

    /// The state of a node in the restored checkpoint, if the same configuration wrote it.
    fn restored(&self, key: &str, fingerprint: u64) -> Option<&[u8]> {
        let (of, state) = self.restored.nodes.get(key)?;
        if *of == fingerprint {
            return Some(state);
        }
        let number = self.restored.number;
        warn!("{key} has changed since checkpoint {number}: it starts anew; {} are lost", what_it_keeps(key));
        None
    }

    /// A graph that has run to its end starts anew, as does one that is told to: what it wrote stands in the history already.
    fn warn_of_history_written_again(&self) {
        let reads_again = self.graph.sources.iter().any(|source| source.shape.delivery == Delivery::Replayable);
        let starts_anew = self.graph.is_bounded() || (self.options.fresh && reads_again);
        if !starts_anew || self.options.drain || self.restored.number > 0 {
            return;
        }
        let folders = self.history.tables().iter().map(|table| table.folder.join(&table.name));
        let written = folders.filter(|folder| files::list(folder).is_ok_and(|files| !files.is_empty()));
        let written: Vec<String> = written.map(|folder| format!("`{}`", folder.display())).collect();
        if !written.is_empty() {
            warn!(
                "this run reads its sources from their start, and adds its rows to those that the history has already; \
                 if they are to stand there once, stop it and remove {} first",
                written.join(", ")
            );
        }
    }

    fn warn_of_lost_state(&self, nodes: &BTreeMap<String, u64>) {
        let is_node = |key: &&String| !key.starts_with(INBOXES);
        for key in self.restored.nodes.keys().filter(is_node).filter(|key| !nodes.contains_key(*key)) {
            warn!("{key} is no longer in the file: its state is dropped");
        }
        if self.restored.number > 0 {
            info!("going on from checkpoint {}", self.restored.number);
        }
    }

    fn pipeline(&self, pipeline: GraphPipeline, name_of: impl Fn(Producer) -> String, nodes: &mut Nodes) -> Result<()> {
        let key = key_of_pipeline(&pipeline);
        nodes.fingerprints.insert(key.clone(), pipeline.fingerprint);
        let receivers = pipeline.inputs.iter().map(|input| nodes.outlets.add(input.producer, Takes::Final)).collect();
        let ports = pipeline.inputs.into_iter().map(|input| Port {
            from: name_of(input.producer),
            step: input.step,
            input: input.input,
            unite: input.unite,
            watermark_us: i64::MIN,
            idle_us: None,
        });
        let mut task = PipelineTask {
            status: self.status.node(NodeKind::Pipeline, &pipeline.name, "pipeline"),
            name: pipeline.name,
            inputs: Inputs::new(receivers),
            ports: ports.collect(),
            steps: pipeline.steps,
            outlet: Outlet::default(),
            live: Arc::clone(&self.live),
            reports: nodes.reporter.clone(),
            number: 0,
            watermark_us: i64::MIN,
            forwarded_us: i64::MIN,
            told_idle: false,
            failed: false,
            failed_rows: 0,
            state_bytes: 0,
            key,
        };
        if let Some(state) = self.restored(&task.key, pipeline.fingerprint) {
            task.restore(state).map_err(|e| e.context(&task.key))?;
        }
        nodes.pipelines.push(task);
        Ok(())
    }

    fn sink(&self, index: usize, sink: GraphSink, nodes: &mut Nodes) -> Result<()> {
        let status = self.status.node(NodeKind::Sink, &sink.name, &sink.type_name);
        if sink.inputs.is_empty() {
            status.set_state(NodeState::Ended);
            return Ok(());
        }
        let (key, fingerprint) = (key_of_sink(&sink), fingerprint_of_sink(&sink));
        nodes.fingerprints.insert(key.clone(), fingerprint);
        let takes = match (sink.shape.live, sink.shape.takes_revised) {
            (true, _) => Takes::All,
            (false, true) => Takes::FinalAndRevised,
            (false, false) => Takes::Final,
        };
        let receivers = sink.producers.iter().map(|producer| nodes.outlets.add(*producer, takes)).collect();
        let inputs = sink.inputs.len();
        let tail = |input| self.tails.get(&(index, input)).cloned().unwrap_or_default();
        let sink_inputs = sink.inputs.clone();
        let built = sink.config.build(SinkContext {
            name: sink.name.clone(),
            inputs: sink.inputs,
            folder: self.graph.folder.clone(),
            routes: self.routes.clone(),
            live: Arc::clone(&self.live),
            tails: (0..inputs).map(tail).collect(),
        });
        let state = self.restored(&key, fingerprint);
        let (commit, commits) = mpsc::channel(COMMITS_MAX);
        let running = match built.map_err(|e| e.context(format!("sink {}", sink.name)))? {
            Sink::Live(live) => Running::Live(live),
            Sink::Staging(mut staging) => {
                let mut reader = state.map(StateReader::new);
                staging.restore(self.restored.number, reader.as_mut()).map_err(|e| e.context(&key))?;
                nodes.commits.insert(key.clone(), commit.clone());
                if let Some(upkeep) = staging.upkeep() {
                    nodes.upkeep.add(upkeep, &status);
                }
                Running::Staging(staging)
            }
            Sink::Outbox(outbox_sink, limits) => {
                let folder = outbox_folder(&self.graph.state_dir, &sink.name);
                let disk = Arc::clone(&self.disk);
                let exactly_once = outbox_sink.is_exactly_once();
                let (durability, hold) = (self.graph.durability, nodes.hold.clone());
                let outbox = Outbox::open(limits, exactly_once, sink_inputs, disk, &folder, durability, hold);
                let outbox = Arc::new(outbox.map_err(|e| e.context(&key))?);
                if let Some(state) = state {
                    outbox.restore(self.restored.number, state).map_err(|e| e.context(&key))?;
                }
                nodes.commits.insert(key.clone(), commit.clone());
                nodes.deliveries.push(DeliveryTask {
                    name: sink.name.clone(),
                    outbox: Arc::clone(&outbox),
                    sink: outbox_sink,
                    status: Arc::clone(&status),
                    checked: false,
                });
                nodes.outboxes.push(Arc::clone(&outbox));
                Running::Outbox(outbox)
            }
        };
        nodes.others.push(commit);
        nodes.sinks.push(SinkTask {
            name: sink.name,
            key,
            inputs: Inputs::new(receivers),
            sink: running,
            status,
            reports: nodes.reporter.clone(),
            commits,
            last: None,
        });
        Ok(())
    }

    /// The inboxes in the state folder that no source of this run has, and how far the restored checkpoint has each.
    fn left_inboxes(&self, nodes: &Nodes) -> Result<BTreeMap<String, u64>> {
        let taken_up: BTreeSet<&str> =
            nodes.sources.iter().filter_map(|(intake, _)| Some(intake.inbox.as_ref()?.key())).collect();
        let mut left = BTreeMap::new();
        for folder in inspect::log_folders(&self.disk, &self.graph.state_dir.join("inbox"))? {
            let key = key_of_inbox(&folder);
            if !taken_up.contains(key.as_str())
                && let Some(first) = first_not_covered(&self.restored, &folder)?
            {
                left.insert(key, first);
            }
        }
        Ok(left)
    }

    /// The inbox of a push source.
    fn inbox(&self, source: &GraphSource) -> Result<Inbox> {
        let folder = inbox_folder(&self.graph.state_dir, source);
        let covered = first_not_covered(&self.restored, &folder)?;
        let receipts = || source.config.receipts();
        let inbox = Inbox::open(Arc::clone(&self.disk), &folder, self.graph.durability, receipts, covered)
            .map_err(|e| e.context(format!("source {}: inbox `{}`", source.name, folder.display())))?;
        if inbox.is_replaying() {
            info!(
                "source {}: {} rows of the inbox are in no checkpoint yet",
                source.name,
                inbox.next() - inbox.taken()
            );
        }
        Ok(inbox)
    }

    fn source(
        &self,
        index: usize,
        source: &GraphSource,
        status: Arc<NodeStatus>,
        wanted: watch::Receiver<bool>,
        nodes: &mut Nodes,
    ) -> Result<()> {
        let key = key_of_source(source);
        let inbox = match source.shape.delivery {
            Delivery::Acknowledged => Some(self.inbox(source)?),
            Delivery::Replayable | Delivery::BestEffort | Delivery::Sampled => None,
        };
        nodes.fingerprints.insert(key.clone(), source.fingerprint);
        let (control, control_receiver) = mpsc::channel(4);
        nodes.controls.push(control);
        let (arrival_sender, arrivals) = queue(ARRIVALS_MAX);
        let built = source.config.build(SourceContext {
            name: source.name.clone(),
            folder: self.graph.folder.clone(),
            state_dir: self.graph.state_dir.clone(),
            routes: self.routes.clone(),
            status: Arc::clone(&self.status),
        });
        let mut intake = IntakeTask {
            name: source.name.clone(),
            key,
            arrivals,
            control: control_receiver,
            reports: nodes.reporter.clone(),
            decoder: source.config.decoder(),
            rows: nodes.outlets.take(Producer::Source(index)),
            errors: nodes.outlets.take(Producer::SourceErrors(index)),
            status: Arc::clone(&status),
            clock: SourceClock::new(source.event_time),
            position: None,
            link: None,
            error_batches: 0,
            batches: 0,
            error_log: None,
            errors_untold: 0,
            delivery: source.shape.delivery,
            unsettled: Unsettled::default(),
            inbox,
            held: nodes.hold.subscribe(),
        };
        if let Some(inbox) = &intake.inbox {
            intake.unsettled.cover(self.restored.number, inbox.taken());
        }
        let position = match self.restored(&intake.key, source.fingerprint) {
            Some(state) => intake.restore(state).map_err(|e| e.context(format!("source {}", source.name)))?,
            None => None,
        };
        let reader = ReaderTask {
            source: built.map_err(|e| e.context(format!("source {}", source.name)))?,
            schedule: source.shape.schedule,
            position,
            arrivals: arrival_sender,
            wanted,
            status,
            trying: Some(nodes.trying.clone()),
        };
        nodes.sources.push((intake, reader));
        Ok(())
    }
}

/// The tasks of all nodes before they start, and the channels to them.
struct Nodes {
    reporter: mpsc::Sender<Report>,
    outlets: Outlets,
    fingerprints: BTreeMap<String, u64>,
    controls: Vec<mpsc::Sender<Control>>,
    commits: BTreeMap<String, mpsc::Sender<Commit>>,
    others: Vec<mpsc::Sender<Commit>>,
    outboxes: Vec<Arc<Outbox>>,
    hold: Hold,
    sources: Vec<(IntakeTask, ReaderTask)>,
    pipelines: Vec<PipelineTask>,
    sinks: Vec<SinkTask>,
    deliveries: Vec<DeliveryTask>,
    upkeep: UpkeepTask,
    /// Each source holds a clone until it has tried to connect.
    trying: watch::Sender<()>,
}

/// What is left of the nodes once they run: the ways to them.
struct Started {
    controls: Vec<mpsc::Sender<Control>>,
    commits: BTreeMap<String, mpsc::Sender<Commit>>,
    others: Vec<mpsc::Sender<Commit>>,
    outboxes: Vec<Arc<Outbox>>,
    fingerprints: BTreeMap<String, u64>,
    readers: Vec<JoinHandle<()>>,
}

impl Nodes {
    fn new(reporter: mpsc::Sender<Report>, history: &Arc<History>) -> Self {
        Self {
            reporter,
            upkeep: UpkeepTask::new(Arc::clone(history)),
            outlets: Outlets::default(),
            fingerprints: BTreeMap::new(),
            controls: Vec::new(),
            commits: BTreeMap::new(),
            others: Vec::new(),
            outboxes: Vec::new(),
            hold: Hold::default(),
            sources: Vec::new(),
            pipelines: Vec::new(),
            sinks: Vec::new(),
            deliveries: Vec::new(),
            trying: watch::Sender::new(()),
        }
    }

    /// Spawns everything, consumers first.
    fn start(self, operators: &Handle, drain: bool) -> Started {
        let tried = self.trying.subscribe();
        drop(self.trying);
        for task in self.deliveries {
            let key = format!("sink/{}", task.name);
            let mut tried = tried.clone();
            let deliver = async move {
                // Closed once every source has tried.
                let _ = timeout(SOURCES_FIRST, tried.changed()).await;
                task.run().await;
            };
            tokio::spawn(watched(key, self.reporter.clone(), deliver));
        }
        for task in self.sinks {
            tokio::spawn(watched(task.key.clone(), self.reporter.clone(), task.run()));
        }
        for task in self.pipelines {
            operators.spawn(watched(task.key.clone(), self.reporter.clone(), task.run()));
        }
        tokio::spawn(self.upkeep.run());
        let mut readers = Vec::new();
        for (intake, reader) in self.sources {
            let key = intake.key.clone();
            operators.spawn(watched(key.clone(), self.reporter.clone(), intake.run()));
            if drain {
                reader.status.set_state(NodeState::Ended);
            } else {
                readers.push(tokio::spawn(watched(key, self.reporter.clone(), reader.run())));
            }
        }
        let Self { controls, commits, others, outboxes, fingerprints, .. } = self;
        Started { controls, commits, others, outboxes, fingerprints, readers }
    }
}

/// Runs what may wait for the disk. A runtime of one thread, as tests have it, has no other thread to hand over to.
fn blocking<T>(f: impl FnOnce() -> T) -> T {
    match Handle::current().runtime_flavor() {
        RuntimeFlavor::MultiThread => block_in_place(f),
        _ => f(),
    }
}

/// Waits until a flag is set.
async fn is_true(flag: &mut watch::Receiver<bool>) {
    let _ = flag.wait_for(|set| *set).await;
}

/// Runs a node's task; a panic in it ends the run with an error, instead of leaving a graph that waits for it.
async fn watched(key: String, reporter: mpsc::Sender<Report>, task: impl Future<Output = ()> + Send) {
    if let Err(panic) = AssertUnwindSafe(task).catch_unwind().await {
        let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
        let _ = reporter.send(Report::Died(key, text.unwrap_or("panic").to_owned())).await;
    }
}

/// The outlets of producers whose consumers are known before they are built themselves.
#[derive(Default)]
struct Outlets {
    of: HashMap<Producer, Outlet>,
}

impl Outlets {
    fn add(&mut self, producer: Producer, takes: Takes) -> Receiver<Message> {
        self.of.entry(producer).or_default().add(takes)
    }

    fn take(&mut self, producer: Producer) -> Outlet {
        self.of.remove(&producer).unwrap_or_default()
    }
}

/// The history tables of the graph, and the tail of each by (sink, input).
fn history_tables(graph: &Graph) -> (Vec<Table>, HashMap<(usize, usize), HistoryTail>) {
    let mut tables = Vec::new();
    let mut tails = HashMap::new();
    for (index, sink) in graph.sinks.iter().enumerate() {
        let Some(folder) = &sink.shape.history else { continue };
        for (input, of) in sink.inputs.iter().enumerate() {
            let tail = HistoryTail::default();
            tails.insert((index, input), Arc::clone(&tail));
            tables.push(Table {
                name: of.metric.clone(),
                sink: sink.name.clone(),
                folder: folder.clone(),
                schema: Arc::clone(&of.shape.schema),
                tail: Some(tail),
            });
        }
    }
    (tables, tails)
}
