//! Follows demand against the stream: which sources somebody wants rows of.

use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::{Duration, MissedTickBehavior, interval};

use crate::graph::{GraphPipeline, GraphSink, GraphSource, downstream};
use crate::live::Live;

/// How often demand is looked at even if nothing changed: the minute after a `GET` ends by itself.
const DEMAND_EVERY: Duration = Duration::from_secs(1);

/// Which sources somebody wants: only `on_demand` ones are ever unwanted.
pub(super) struct Wanted {
    /// Per on-demand source without a durable sink: the metrics downstream of it.
    on_demand: Vec<(watch::Sender<bool>, Vec<String>)>,
    receivers: Vec<watch::Receiver<bool>>,
    /// Keeps the channels of sources that are always wanted open.
    always: Vec<watch::Sender<bool>>,
}

impl Wanted {
    pub(super) fn new(sources: &[GraphSource], pipelines: &[GraphPipeline], sinks: &[GraphSink]) -> Self {
        let mut wanted = Self { on_demand: Vec::new(), receivers: Vec::new(), always: Vec::new() };
        for (index, source) in sources.iter().enumerate() {
            let downstream = downstream(pipelines, index);
            let durable = downstream.iter().flat_map(|p| &pipelines[*p].to).any(|sink| !sinks[*sink].shape.live);
            let (sender, receiver) = watch::channel(durable || !source.on_demand);
            wanted.receivers.push(receiver);
            if durable || !source.on_demand {
                wanted.always.push(sender);
            } else {
                let metrics = downstream.iter().map(|p| pipelines[*p].name.clone()).collect();
                wanted.on_demand.push((sender, metrics));
            }
        }
        wanted
    }

    pub(super) fn receiver(&self, source: usize) -> watch::Receiver<bool> {
        self.receivers[source].clone()
    }

    /// Follows demand for as long as the graph runs.
    pub(super) async fn watch(self, live: Arc<Live>) {
        let mut changed = live.demand();
        let mut timer = interval(DEMAND_EVERY);
        timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Moved in, so that the channels of the other sources stay open as well.
        let _always = self.always;
        loop {
            for (sender, metrics) in &self.on_demand {
                let now = metrics.iter().any(|metric| live.is_wanted(metric));
                sender.send_if_modified(|wanted| std::mem::replace(wanted, now) != now);
            }
            tokio::select! {
                _ = changed.changed() => {}
                _ = timer.tick() => {}
            }
        }
    }
}
