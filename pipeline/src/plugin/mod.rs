//! What a plugin is. Read this first to write one.
//!
//! A plugin has two halves. Its **configuration** is what the user wrote: a typed, strict struct that can be
//! checked without touching the world, and that lives on so that the engine can reconnect. Its **running
//! thing** takes small steps. The engine owns the loop: it decides when to connect, to poll, to retry, to
//! checkpoint and to stop, and it stamps the time. A plugin does not spawn, sleep, retry, or watch for shutdown.
//!
//! The life of a node:
//!
//! 1. `read` - the YAML block becomes the configuration struct; unknown keys and wrong types are reported.
//! 2. `check` - pure; says what the node emits or takes, or reports problems with their places.
//! 3. `build` - makes the running thing; still no network. Routes for the HTTP listener are mounted here.
//! 4. running - see [`source`], [`operator`], [`sink`].
//!
//! A new plugin is one file in `sources/`, `operators/` or `sinks/`, one `mod` line and one entry in the
//! list beside it. Tests walk the lists: every plugin has a page, an example that checks clean, and a
//! description of every option.

pub mod operator;
pub mod registry;
pub mod rules;
pub mod sink;
pub mod source;

pub use operator::{Operator, OperatorConfig, OperatorPlugin, Output, Planned, StreamShape};
pub use registry::Plugins;
pub use sink::{
    BatchLimits, BatchOptions, HistoryTail, LiveSink, Mount, OutboxSink, Promise, Sink, SinkConfig, SinkContext,
    SinkInput, SinkPlugin, SinkShape, StagedFile, StagingSink, Upkeep, Upkept,
};
pub use source::{
    Acknowledger, Decoded, Decoder, Delivery, PullReader, Pulled, PushReader, Reader, Receipt, Receipts, Record,
    Rejection, RowError, Schedule, Source, SourceConfig, SourceContext, SourcePlugin, SourceShape,
};
