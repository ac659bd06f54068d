//! A Redis server of a test's own: a free port of loopback, a folder of its own.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use super::{Process, Scratch, free_port, wait_for};

/// A running server, stopped when this is dropped.
pub(crate) struct Redis {
    folder: Scratch,
    /// Where it listens, the same after a restart.
    pub(crate) port: u16,
    options: Vec<String>,
    process: Option<Process>,
}

impl Redis {
    /// A server that keeps every write (`appendonly yes`), so that a killed one comes back with its data.
    pub(crate) fn start() -> Self {
        Self::with_options(&["--appendonly", "yes", "--appendfsync", "always"])
    }

    /// A server with options such as `--requirepass secret`.
    pub(crate) fn with_options(options: &[&str]) -> Self {
        let mut server = Self {
            folder: Scratch::new(),
            port: free_port(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            process: None,
        };
        server.restart();
        server
    }

    /// Starts it again with the data in its folder.
    pub(crate) fn restart(&mut self) {
        let mut command = Command::new("redis-server");
        command.args(["--port", &self.port.to_string(), "--bind", "127.0.0.1", "--save", ""]);
        command.arg("--dir").arg(self.folder.path()).args(&self.options);
        self.process = Some(Process::start(&mut command));
        wait_for("the Redis server", || {
            let reply = self.try_command(&["PING"]);
            (reply.contains("PONG") || reply.contains("NOAUTH")).then_some(())
        });
    }

    /// Kills it as a crash would.
    pub(crate) fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.signal("KILL");
            process.wait();
        }
    }

    /// Its URL.
    pub(crate) fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Runs a command and returns the reply, one line per item.
    pub(crate) fn command(&self, words: &[&str]) -> String {
        let reply = self.try_command(words);
        let is_error = ["ERR ", "WRONGTYPE", "NOAUTH", "Could not connect"].iter().any(|e| reply.contains(e));
        assert!(!is_error, "{words:?}: {reply}");
        reply
    }

    fn try_command(&self, words: &[&str]) -> String {
        let port = self.port.to_string();
        let output = Command::new("redis-cli").args(["-p", &port]).args(words).output().expect("redis-cli");
        let text = if output.status.success() { output.stdout } else { output.stderr };
        String::from_utf8_lossy(&text).trim_end().to_owned()
    }
}

/// A connection of a writer that wants to know what the server answered.
pub(crate) struct Client(BufReader<TcpStream>);

impl Client {
    /// Connects to a port of loopback.
    pub(crate) fn connect(port: u16) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("the Redis server");
        stream.set_nodelay(true).expect("no delay");
        Self(BufReader::new(stream))
    }

    /// Sends commands in one piece and reads a reply for each: a number, a status or a text.
    pub(crate) fn call(&mut self, commands: &[Vec<String>]) -> Vec<String> {
        let mut bytes = Vec::new();
        for words in commands {
            bytes.extend(format!("*{}\r\n", words.len()).into_bytes());
            bytes.extend(words.iter().flat_map(|word| format!("${}\r\n{word}\r\n", word.len()).into_bytes()));
        }
        self.0.get_mut().write_all(&bytes).expect("to send commands");
        commands.iter().map(|words| self.reply(words)).collect()
    }

    fn reply(&mut self, words: &[String]) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).expect("a reply");
        let line = line.trim_end();
        match line.split_at(1) {
            (":" | "+", reply) => reply.to_owned(),
            ("$", length) => {
                let mut text = vec![0; length.parse::<usize>().expect("a length") + 2];
                self.0.read_exact(&mut text).expect("a text");
                String::from_utf8(text).expect("UTF-8").trim_end().to_owned()
            }
            _ => panic!("{words:?}: {line}"),
        }
    }
}

/// A network that can hold back what clients send, and deliver it late.
pub(crate) struct Stall {
    /// Where it listens.
    pub(crate) port: u16,
    line: Arc<Mutex<Arc<Line>>>,
}

/// The connections that were made between two calls of [`Stall::hold`].
#[derive(Default)]
pub(crate) struct Line {
    holds: AtomicBool,
    /// Bytes that are held back.
    bytes: AtomicUsize,
    released: AtomicBool,
    connections: AtomicUsize,
    delivered: AtomicUsize,
}

impl Stall {
    /// In front of a port of loopback.
    pub(crate) fn start(target: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let line = Arc::new(Mutex::new(Arc::new(Line::default())));
        let current = Arc::clone(&line);
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let line = Arc::clone(&current.lock().expect("a lock"));
                line.connections.fetch_add(1, Relaxed);
                let server = TcpStream::connect(("127.0.0.1", target)).expect("the server");
                std::thread::spawn(move || line.pass(client, server));
            }
        });
        Self { port, line }
    }

    /// From now on, holds back what the clients of now send. Later ones are let through.
    pub(crate) fn hold(&self) -> Arc<Line> {
        let line = std::mem::take(&mut *self.line.lock().expect("a lock"));
        line.holds.store(true, Relaxed);
        line
    }
}

impl Line {
    /// Delivers what was held back, and waits until the server has taken it, or refused it.
    pub(crate) fn release(&self) {
        self.released.store(true, Relaxed);
        let arrived = || (self.delivered.load(Relaxed) == self.connections.load(Relaxed)).then_some(());
        wait_for("the late commands to arrive", arrived);
    }

    /// Whether a client has sent anything since.
    pub(crate) fn holds_something(&self) -> bool {
        self.bytes.load(Relaxed) > 0
    }

    fn pass(&self, mut client: TcpStream, mut server: TcpStream) {
        let (mut from, mut to) = (server.try_clone().expect("an end"), client.try_clone().expect("an end"));
        let back = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = from.read(&mut buffer) {
                // The client may have gone.
                let _ = to.write_all(&buffer[..length]);
            }
        });
        let (mut buffer, mut late) = ([0; 4096], Vec::new());
        while let Ok(length @ 1..) = client.read(&mut buffer) {
            if self.holds.load(Relaxed) {
                self.bytes.fetch_add(length, Relaxed);
                late.extend_from_slice(&buffer[..length]);
            } else {
                server.write_all(&buffer[..length]).expect("to the server");
            }
        }
        if self.holds.load(Relaxed) {
            wait_for("the release", || self.released.load(Relaxed).then_some(()));
            let _ = server.write_all(&late);
        }
        let _ = server.shutdown(Shutdown::Write);
        let _ = back.join();
        self.delivered.fetch_add(1, Relaxed);
    }
}
