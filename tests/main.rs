//! Tests of the whole program: the built binary, real servers, real clients.

<<<<<<< HEAD
<<<<<<< HEAD
mod http;
=======
mod dashboard;
mod live;
>>>>>>> live
=======
// There is nothing outside this binary that `pub` could mean.
#![allow(unreachable_pub)]

mod sql;
>>>>>>> sql
mod support;
