//! The built binary, run as a user would, and plain HTTP to it.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use super::{Process, Scratch, free_port, wait_for};

/// The binary under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_pipeline");

/// A running `pipeline` with its own folder and port.
pub struct Program {
    /// The folder of its YAML, state and history.
    pub scratch: Scratch,
    /// Its HTTP port.
    pub port: u16,
    /// The process.
    pub process: Process,
}

impl Program {
    /// Starts the binary on `yaml`, in which `PORT` stands for its own free port, and waits until it answers.
    pub fn start(yaml: &str) -> Self {
        Self::start_in(Scratch::new(), free_port(), yaml)
    }

    /// As [`Self::start`], in a folder and on a port of the caller's.
    pub fn start_in(scratch: Scratch, port: u16, yaml: &str) -> Self {
        Self::start_with(scratch, port, yaml, &[])
    }

    /// As [`Self::start_in`], with options of `run`.
    pub fn start_with(scratch: Scratch, port: u16, yaml: &str, options: &[&str]) -> Self {
        Self::start_by(scratch, port, yaml, Command::new(BINARY).arg("run").args(options))
    }

    /// As [`Self::start_in`], by a command of the caller's that becomes the program.
    pub fn start_by(scratch: Scratch, port: u16, yaml: &str, command: &mut Command) -> Self {
        let yaml = if yaml.contains("server:") {
            yaml.to_owned()
        } else {
            format!("server: {{listen: 127.0.0.1:PORT}}\n{yaml}")
        };
        scratch.write("pipelines.yaml", &yaml.replace("PORT", &port.to_string()));
        Self::launch(scratch, port, command)
    }

    /// Starts the binary on `examples/NAME` as it is, but in a folder and on a port of its own.
    pub fn start_example(name: &str, environment: &[(&str, &str)]) -> Self {
        Self::start_example_in(Scratch::new(), name, environment)
    }

    /// As [`Self::start_example`], in a folder where it may have run before.
    pub fn start_example_in(scratch: Scratch, name: &str, environment: &[(&str, &str)]) -> Self {
        let port = free_port();
        scratch.write(name, &example(name));
        let mut command = Command::new(BINARY);
        command.arg("run").arg(name).env("LISTEN", format!("127.0.0.1:{port}"));
        Self::launch(scratch, port, command.envs(environment.iter().copied()))
    }

    fn launch(scratch: Scratch, port: u16, command: &mut Command) -> Self {
        let mut process = Process::start(command.current_dir(scratch.path()));
        wait_for("the program to answer", || {
            assert!(process.is_running(), "the program ended: {}", process.printed());
            get(port, "/health")
        });
        Self { scratch, port, process }
    }

    /// Where it listens.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The status of a source: its state and its counters.
    pub fn source(&self, name: &str) -> Value {
        self.node("sources", name)
    }

    /// The status of a pipeline: its state and its counters.
    pub fn pipeline(&self, name: &str) -> Value {
        self.node("pipelines", name)
    }

    /// The status of a sink: its state and its counters.
    pub fn sink(&self, name: &str) -> Value {
        self.node("sinks", name)
    }

    fn node(&self, kind: &str, name: &str) -> Value {
        let graph = self.get("/api/v1/pipelines");
        let node = graph[kind].as_array().expect(kind).iter().find(|node| node["name"] == name);
        node.unwrap_or_else(|| panic!("none of the {kind} is {name}: {graph}"))["status"].clone()
    }

    /// What `/health` says is wrong, by node.
    pub fn reasons(&self) -> BTreeMap<String, String> {
        let health = self.get("/health");
        let reasons: BTreeMap<String, String> =
            health["reasons"].as_array().into_iter().flatten().map(reason).collect();
        assert_eq!(reasons.is_empty(), health["status"] == "healthy", "{health}");
        reasons
    }

    /// Sends lines to an `http` source once it is connected, and expects all of them to be accepted.
    pub fn post(&self, path: &str, lines: &[String]) {
        let (status, body) = wait_for("the source to be connected", || {
            request(self.port, "POST", path, &lines.concat()).filter(|(status, _)| *status != 503)
        });
        assert_eq!(status, 200, "{body}");
        let body: Value = serde_json::from_str(&body).expect("JSON");
        assert_eq!(body["accepted"], lines.len(), "{body}");
    }

    /// Waits until every node is connected.
    pub fn wait_healthy(&self) {
        wait_for("the program to be healthy", || {
            let (_, health) = get(self.port, "/health")?;
            (serde_json::from_str::<Value>(&health).ok()?["status"] == "healthy").then_some(())
        });
    }

    /// `GET path` as JSON.
    pub fn get(&self, path: &str) -> Value {
        let (status, body) = get(self.port, path).unwrap_or_else(|| panic!("GET {path}: no answer"));
        assert!(status < 500, "GET {path}: {status} {body}");
        serde_json::from_str(&body).unwrap_or_else(|e| panic!("GET {path}: {e}: {body}"))
    }

    /// The rows of a query over HTTP.
    pub fn query(&self, sql: &str) -> Value {
        let body = serde_json::json!({"sql": sql}).to_string();
        let (status, text) = request(self.port, "POST", "/api/v1/query", &body).expect("an answer to a query");
        assert_eq!(status, 200, "{sql}: {text}");
        serde_json::from_str(&text).expect("JSON rows")
    }

    /// Asks it to stop and expects exit code 0.
    pub fn stop(mut self) -> Scratch {
        self.process.signal("TERM");
        let status = self.process.wait();
        assert_eq!(status.code(), Some(0), "{}", self.process.printed());
        self.scratch
    }
}

fn reason(reason: &Value) -> (String, String) {
    let text = |key: &str| reason[key].as_str().expect(key).to_owned();
    (text("node"), text("reason"))
}

/// The text of a file in `examples/`.
pub fn example(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Runs the binary to its end.
pub fn run(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(BINARY).args(arguments).current_dir(folder).stdin(Stdio::null()).output().expect("the binary runs")
}

/// `GET`: status and body; `None` if nothing answers.
pub fn get(port: u16, path: &str) -> Option<(u16, String)> {
    request(port, "GET", path, "")
}

/// A whole HTTP exchange over its own connection.
pub fn request(port: u16, method: &str, path: &str, body: &str) -> Option<(u16, String)> {
    request_with(port, method, path, "", body)
}

/// As [`request`], with more header lines, each ended by `\r\n`.
pub fn request_with(port: u16, method: &str, path: &str, headers: &str, body: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n{headers}\r\n"
    );
    stream.write_all(format!("{head}{body}").as_bytes()).ok()?;
    let mut reader = BufReader::new(stream);
    let (status, chunked) = read_head(&mut reader)?;
    let mut bytes = Vec::new();
    if chunked {
        while let Some(chunk) = read_chunk(&mut reader) {
            bytes.extend(chunk);
        }
    } else {
        reader.read_to_end(&mut bytes).ok()?;
    }
    Some((status, String::from_utf8(bytes).expect("UTF-8")))
}

fn read_head(reader: &mut impl BufRead) -> Option<(u16, bool)> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let status = line.split(' ').nth(1)?.parse().ok()?;
    let mut chunked = false;
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        if line.trim().is_empty() {
            return Some((status, chunked));
        }
        chunked |= line.to_lowercase().starts_with("transfer-encoding: chunked");
    }
}

fn read_chunk(reader: &mut impl BufRead) -> Option<Vec<u8>> {
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let length = usize::from_str_radix(line.trim(), 16).ok().filter(|length| *length > 0)?;
    let mut chunk = vec![0; length + 2];
    reader.read_exact(&mut chunk).ok()?;
    chunk.truncate(length);
    Some(chunk)
}

/// A stock SSE reader over HTTP/1.1.
pub struct Sse {
    reader: BufReader<TcpStream>,
    text: String,
    /// Status of the answer.
    pub status: u16,
}

impl Sse {
    /// Opens an event stream.
    pub fn open(port: u16, path: &str) -> Self {
        Self::try_open(port, path).expect("an answer")
    }

    /// Opens an event stream; `None` if nothing answers.
    pub fn try_open(port: u16, path: &str) -> Option<Self> {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
        stream.set_read_timeout(Some(super::PATIENCE)).expect("a timeout");
        let head = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n");
        stream.write_all(head.as_bytes()).ok()?;
        let mut reader = BufReader::new(stream);
        let (status, _) = read_head(&mut reader)?;
        Some(Self { reader, text: String::new(), status })
    }

    /// The next event as (event, id, data).
    pub fn next(&mut self) -> (String, String, String) {
        self.try_next().expect("more of the stream")
    }

    /// As [`Self::next`]; `None` if the stream ends, in the middle of an event too.
    pub fn try_next(&mut self) -> Option<(String, String, String)> {
        loop {
            if let Some(end) = self.text.find("\n\n") {
                let block: String = self.text.drain(..end + 2).collect();
                let field = |name: &str| {
                    let lines = block.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
                    lines.map(|value| value.strip_prefix(' ').unwrap_or(value)).collect::<Vec<_>>().join("\n")
                };
                let (event, id, data) = (field("event"), field("id"), field("data"));
                if !data.is_empty() {
                    return Some((event, id, data));
                }
                continue;
            }
            let chunk = read_chunk(&mut self.reader)?;
            self.text.push_str(&String::from_utf8(chunk).expect("UTF-8"));
        }
    }
}
