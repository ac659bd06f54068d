//! The engine of Tailwater: runs a graph of sources, pipelines and sinks that a YAML file describes.
//!
//! # From text to a running graph
//!
//! Three typed steps, so that nothing unchecked runs:
//!
//! 1. [`config`] - the text becomes [`config::Pipelines`]: entries with their places, the plugins' own options still
//!    as trees.
//! 2. [`graph`] - [`graph::check`] gives every edge a schema and makes a [`graph::Graph`], or reports every problem.
//! 3. [`runtime`] - [`runtime::run`] runs it to its end.
//!
//! # What flows
//!
//! [`batch::Batch`]: Arrow columns with the event time, the ingest time and the watermark of every row beside them. Between
//! the batches go watermarks and checkpoint barriers. [`rows`] makes batches from messages, [`json`] makes text from rows,
//! [`schema`] has the types of `fields:`, [`expression`] the SQL expressions of steps.
//!
//! # Where to look
//!
//! | to | read |
//! | --- | --- |
//! | write a plugin | [`plugin`] |
//! | follow a row | `runtime`: reader, intake, pipeline and sink task |
//! | follow a checkpoint | `runtime`: coordinator, store |
//! | keep something on disk | [`log`] on [`disk`] |
//! | see what is on disk, or what is damaged | [`runtime::inspect`], [`runtime::doctor`] |
//! | serve a route | [`http`]; live sinks find the latest rows and demand in [`live`] |
//! | query history | [`history`] |
//! | count something | [`status`] |
//!
//! # What holds everywhere
//!
//! - The engine names no plugin. Plugin crates import the engine and never each other. A test checks both.
//! - Only `runtime` and `http` spawn tasks, sleep and decide to retry. A plugin does one small step.
//! - Operators have no I/O, no clock and no randomness without a seed: the same rows give the same results,
//!   wherever batches are cut.
//! - `config` and `graph` open nothing.
//! - Every queue and cache has a bound with a name, a unit and a reason.
//! - There is no global mutable state: two graphs can run in one process.

pub mod batch;
pub mod config;
pub mod disk;
pub mod epoch;
pub mod error;
pub mod expression;
pub mod graph;
pub mod history;
pub mod http;
pub mod json;
pub mod live;
pub mod log;
pub mod network;
pub mod plugin;
pub mod rows;
pub mod runtime;
pub mod schema;
pub mod state;
pub mod status;
pub mod time;
