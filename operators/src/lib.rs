//! The operators of Tailwater, one file each. A new operator is one file, one `mod` line and one entry in the list.

use pipeline::plugin::OperatorPlugin;

pub mod window;

/// Every operator, in the order of the documentation.
pub const OPERATORS: &[OperatorPlugin] = &[OperatorPlugin::of::<window::WindowConfig>()];
