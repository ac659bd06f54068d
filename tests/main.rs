//! Tests of the whole program: the built binary, real servers, real clients.

mod redis;
mod support;
