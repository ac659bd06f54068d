//! Tests of the whole program: the built binary, real servers, real clients.

// There is nothing outside this binary that `pub` could mean.
#![allow(unreachable_pub)]

mod benches;
mod dashboard;
mod examples;
mod http;
mod live;
mod mqtt;
mod redis;
mod replay;
mod sql;
mod support;
