//! Tests of the whole program: the built binary, real servers, real clients.

mod dashboard;
mod live;
mod support;
