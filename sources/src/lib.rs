//! The sources of Tailwater, one file each. A new source is one file, one `mod` line and one entry in the list.

pub mod redis;

use pipeline::plugin::SourcePlugin;

/// Every source, in the order of the documentation.
pub const SOURCES: &[SourcePlugin] = &[SourcePlugin::of::<redis::RedisConfig>()];
