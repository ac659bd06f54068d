//! The sources of Tailwater, one file each. A new source is one file, one `mod` line and one entry in the list.

pub mod file;
pub mod generate;
pub mod host;
pub mod http;
pub mod mqtt;
pub mod redis;
pub mod self_metrics;
pub mod sql;

mod fixed;
mod identity;
#[cfg(test)]
mod testing;

use pipeline::error::{Error, Result};
use pipeline::plugin::SourcePlugin;

/// Every source, in the order of the documentation.
pub const SOURCES: &[SourcePlugin] = &[
    SourcePlugin::of::<mqtt::MqttConfig>(),
    SourcePlugin::of::<redis::RedisConfig>(),
    SourcePlugin::of::<sql::SqlConfig>(),
    SourcePlugin::of::<http::HttpConfig>(),
    SourcePlugin::of::<file::FileConfig>(),
    SourcePlugin::of::<generate::GenerateConfig>(),
    SourcePlugin::of::<host::HostConfig>(),
    SourcePlugin::of::<self_metrics::SelfConfig>(),
];

/// Runs what may block on the disk or the system; `what` names it in the error of a panic.
async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Error::internal(what).because(error))?
}

#[cfg(test)]
mod tests {
    use pipeline::plugin::rules;

    #[test]
    fn every_source_keeps_the_rules_of_plugins() {
        assert_eq!(rules::broken_by_sources(super::SOURCES), Vec::<String>::new());
    }
}
