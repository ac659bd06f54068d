//! The engine of Tailwater.

pub mod batch;
pub mod config;
pub mod epoch;
pub mod error;
pub mod expression;
pub mod graph;
pub mod history;
pub mod http;
pub mod json;
pub mod live;
pub mod network;
pub mod plugin;
pub mod rows;
pub mod runtime;
pub mod schema;
pub mod state;
pub mod status;
pub mod time;
