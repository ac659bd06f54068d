//! The sinks of Tailwater, one file each. A new sink is one file, one `mod` line and one entry in the list.

pub mod redis;

use pipeline::plugin::SinkPlugin;

/// Every sink, in the order of the documentation.
pub const SINKS: &[SinkPlugin] = &[SinkPlugin::of::<redis::RedisConfig>()];
