//! The operators of Tailwater, one file each. A new operator is one file, one `mod` line and one entry in the list.

pub mod deduplicate;
pub mod filter;
pub mod join;
pub mod select;
pub mod window;

mod encoding;
mod keys;
#[cfg(test)]
mod testing;

use pipeline::plugin::OperatorPlugin;

/// Every operator, in the order of the documentation.
pub const OPERATORS: &[OperatorPlugin] = &[
    OperatorPlugin::of::<filter::FilterConfig>(),
    OperatorPlugin::of::<select::SelectConfig>(),
    OperatorPlugin::of::<window::WindowConfig>(),
    OperatorPlugin::of::<join::JoinConfig>(),
    OperatorPlugin::of::<deduplicate::DeduplicateConfig>(),
];

#[cfg(test)]
mod tests {
    use pipeline::plugin::rules;

    #[test]
    fn every_operator_keeps_the_rules_of_plugins() {
        assert_eq!(rules::broken_by_operators(super::OPERATORS), Vec::<String>::new());
    }
}
