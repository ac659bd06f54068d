//! The sources of Tailwater, one file each. A new source is one file, one `mod` line and one entry in the list.

pub mod http;
pub mod file;

use pipeline::plugin::SourcePlugin;

/// Every source, in the order of the documentation.
pub const SOURCES: &[SourcePlugin] = &[
    SourcePlugin::of::<http::HttpConfig>(),
    SourcePlugin::of::<file::FileConfig>(),
];

#[cfg(test)]
mod tests {
    use pipeline::plugin::rules;

    #[test]
    fn every_source_keeps_the_rules_of_plugins() {
        assert_eq!(rules::broken_by_sources(super::SOURCES), Vec::<String>::new());
    }
}
