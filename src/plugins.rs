//! The plugins of this program.

use pipeline::plugin::Plugins;

/// Every source, operator and sink.
pub(crate) const PLUGINS: Plugins =
    Plugins { sources: sources::SOURCES, operators: operators::OPERATORS, sinks: sinks::SINKS };
