//! Tests of the whole program: the built binary, real servers, real clients.

<<<<<<< HEAD
mod http;
=======
mod dashboard;
mod live;
>>>>>>> live
mod support;
