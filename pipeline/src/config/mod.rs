//! From YAML text to typed, positioned configuration.

pub mod check;
pub mod deserialize;
pub mod environment;
pub mod pipelines;
pub mod problems;
pub mod tree;
pub mod values;

pub use check::CheckContext;
pub use pipelines::Pipelines;

pub use problems::{Position, Problem, Problems, Severity, did_you_mean};
pub use values::{At, ByteSize, Duration, FieldSpec, Fields, Secret, SecretUrl};
