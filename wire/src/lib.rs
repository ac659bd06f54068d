//! What the source and the sink of one system share: its connections. Plugin crates do not import each other,
//! and the engine knows no system by name, so it stands between them.

pub mod redis;
