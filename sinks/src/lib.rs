//! The sinks of Tailwater, one file each. A new sink is one file, one `mod` line and one entry in the list.

pub mod console;
pub mod mqtt;
pub mod parquet;
pub mod redis;
pub mod sql;
pub mod sse;
pub mod websocket;

pub mod live;

use pipeline::plugin::SinkPlugin;

/// Every sink, in the order of the documentation.
pub const SINKS: &[SinkPlugin] = &[
    SinkPlugin::of::<websocket::WebSocketConfig>(),
    SinkPlugin::of::<sse::SseConfig>(),
    SinkPlugin::of::<parquet::ParquetConfig>(),
    SinkPlugin::of::<sql::SqlConfig>(),
    SinkPlugin::of::<redis::RedisConfig>(),
    SinkPlugin::of::<mqtt::MqttConfig>(),
    SinkPlugin::of::<console::ConsoleConfig>(),
];

#[cfg(test)]
mod tests {
    use pipeline::plugin::rules;

    #[test]
    fn every_sink_keeps_the_rules_of_plugins() {
        assert_eq!(rules::broken_by_sinks(super::SINKS), Vec::<String>::new());
    }
}
