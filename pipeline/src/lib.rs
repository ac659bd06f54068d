//! The engine of Tailwater.

pub mod batch;
pub mod config;
pub mod error;
pub mod expression;
pub mod history;
pub mod http;
pub mod json;
pub mod live;
pub mod plugin;
pub mod rows;
pub mod schema;
pub mod state;
pub mod status;
pub mod time;
