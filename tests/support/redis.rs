//! A Redis server of a test's own: a free port of loopback, a folder of its own.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::Command;

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
