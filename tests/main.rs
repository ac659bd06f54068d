//! Tests of the whole program: the built binary, real servers, real clients.

// There is nothing outside this binary that `pub` could mean.
#![allow(unreachable_pub)]

mod benches;
mod command_line;
mod cursor;
mod dashboard;
mod default_graph;
mod diamond;
mod doctor;
mod examples;
mod failures;
mod faults;
mod guarantee;
mod history;
mod http;
mod ledger;
mod live;
mod mqtt;
mod redis;
mod replay;
mod restart;
mod sql;
mod streams;
mod support;
mod tidy;
