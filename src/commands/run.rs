//! `pipeline run`: runs the graph until its end, Ctrl-C or SIGTERM.

use std::path::PathBuf;

use clap::Args;
use pipeline::runtime::{self, Options, Stopped};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tracing::info;

use super::{Failure, by_blame, load};

const JAVASCRIPT: &str = "text/javascript; charset=utf-8";

/// The web page: path, content type, text.
const PAGES: &[(&str, &str, &str)] = &[
    ("/", "text/html; charset=utf-8", include_str!("../../dashboard/index.html")),
    ("/dashboard.css", "text/css; charset=utf-8", include_str!("../../dashboard/dashboard.css")),
    ("/dashboard.js", JAVASCRIPT, include_str!("../../dashboard/dashboard.js")),
    ("/connection.js", JAVASCRIPT, include_str!("../../dashboard/connection.js")),
    ("/metrics.js", JAVASCRIPT, include_str!("../../dashboard/metrics.js")),
];

#[derive(Debug, Args)]
pub(super) struct Run {
    /// The YAML file [default: pipelines.yaml]
    file: Option<PathBuf>,
    /// Take no new rows: close every window of the last checkpoint, publish, and end
    #[arg(long)]
    drain: bool,
    /// Go on without the state: move checkpoints, inboxes and outboxes into a folder `fresh-TIME` beside them, and start anew
    #[arg(long, conflicts_with = "drain")]
    fresh: bool,
}

impl Run {
    pub(super) fn run(self) -> Result<(), Failure> {
        let graph = load(self.file.as_deref())?.graph()?;
        let options = Options { drain: self.drain, fresh: self.fresh, pages: PAGES.to_vec() };
        let outcome = runtime::run(graph, options, stop_signal).map_err(|error| by_blame(&error))?;
        for (node, reason) in &outcome.failed {
            eprintln!("error: {node}: {reason}");
        }
        match outcome.stopped {
            // Whoever stops a graph knows its health; a graph that ran to its end must say that a part of it failed.
            Stopped::Ended if !outcome.failed.is_empty() => {
                Err(Failure { message: String::new(), code: Failure::RUNNING })
            }
            _ => Ok(()),
        }
    }
}

/// Resolves on Ctrl-C or SIGTERM; one that comes after this call is not missed, whenever the future is asked. From then
/// on a second one ends the process at once: whoever cannot wait for the stop loses no more than by a crash.
fn stop_signal() -> impl Future<Output = ()> {
    let handlers = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()));
    async {
        match handlers {
            (Ok(interrupt), Ok(terminate)) => stopped(interrupt, terminate).await,
            // Without signal handlers the default action ends the process.
            _ => std::future::pending().await,
        }
    }
}

async fn stopped(mut interrupt: Signal, mut terminate: Signal) {
    let name = either(&mut interrupt, &mut terminate).await;
    info!("{name}: stopping; a second one stops at once");
    tokio::spawn(async move {
        let name = either(&mut interrupt, &mut terminate).await;
        eprintln!("error: {name} again: the stop is cut short; the next start goes on from the last checkpoint");
        std::process::exit(i32::from(Failure::CUT_SHORT));
    });
}

/// Waits for one of the signals and tells its name.
async fn either(interrupt: &mut Signal, terminate: &mut Signal) -> &'static str {
    tokio::select! {
        _ = interrupt.recv() => "Ctrl-C",
        _ = terminate.recv() => "SIGTERM",
    }
}
