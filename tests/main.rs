//! Tests of the whole program: the built binary, real servers, real clients.

mod mqtt;
mod support;
