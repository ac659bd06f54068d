//! The servers of a bench.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A process that ends with the bench.
pub(crate) struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A port that nobody listens on.
pub(crate) fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    listener.local_addr().expect("its address").port()
}

/// Starts a server and waits until it listens.
pub(crate) fn start(command: &mut Command, port: u16) -> Running {
    let child = Running(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("started"));
    let since = Instant::now();
    while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
        assert!(since.elapsed() < Duration::from_secs(20), "{command:?} does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    child
}
