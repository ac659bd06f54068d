//! A real Mosquitto broker with its own port, configuration and persistence folder, and its command line clients.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

use super::{Process, Scratch, free_port, wait_for, wait_for_port};

/// A broker. Stopped when dropped.
pub struct Mosquitto {
    /// Its port on 127.0.0.1; the same after a restart.
    pub port: u16,
    folder: Scratch,
    process: Option<Process>,
}

impl Mosquitto {
    /// A broker that takes anyone and writes its sessions to the disk at every change.
    pub fn start() -> Self {
        let lines = "persistence true\npersistence_location DIR/\nautosave_on_changes true\nautosave_interval 1";
        Self::start_with(&format!("allow_anonymous true\n{lines}"))
    }

    /// A broker that takes anyone, keeps everything in memory, and drops nothing however slow a subscriber is.
    pub fn start_in_memory() -> Self {
        Self::start_with("allow_anonymous true\nmax_queued_messages 0\nmax_inflight_messages 0")
    }

    /// A broker with these lines in its configuration; `DIR` in them is its folder.
    pub fn start_with(lines: &str) -> Self {
        Self::start_in(Scratch::new(), lines)
    }

    /// A broker in a folder that holds files which its configuration names.
    pub fn start_in(folder: Scratch, lines: &str) -> Self {
        let port = free_port();
        let dir = folder.path().display().to_string();
        let lines = lines.replace("DIR", &dir);
        // Started as root it would change to a user that may not write here.
        let config = format!("user root\nlistener {port} 127.0.0.1\n{lines}\n");
        folder.write("mosquitto.conf", &config);
        let mut broker = Self { port, folder, process: None };
        broker.restart();
        broker
    }

    /// Starts it (again) on its port.
    pub fn restart(&mut self) {
        let mut command = Command::new("/usr/sbin/mosquitto");
        command.arg("-c").arg(self.folder.path().join("mosquitto.conf"));
        self.process = Some(Process::start(&mut command));
        wait_for_port(self.port);
    }

    /// Ends it with a signal and waits for the end.
    pub fn end(&mut self, signal: &str) {
        let mut process = self.process.take().expect("a running broker");
        process.signal(signal);
        process.wait();
    }

    /// Has it write its sessions to the disk, and waits until a message with `payload` is among them.
    pub fn save(&self, payload: &str) {
        self.process.as_ref().expect("a running broker").signal("USR1");
        let saved = self.folder().join("mosquitto.db");
        wait_for("the broker to have saved a message", || {
            let bytes = std::fs::read(&saved).ok()?;
            bytes.windows(payload.len()).any(|part| part == payload.as_bytes()).then_some(())
        });
    }

    /// Where its configuration and its sessions lie.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Publishes every line as one message, and waits until the broker has all.
    pub fn publish(&self, topic: &str, qos: u8, lines: &[&str]) {
        publish(self.port, topic, &["-q", &qos.to_string()], lines);
    }
}

/// Publishes every line as one message with mosquitto_pub, and waits until the broker has all.
pub fn publish(port: u16, topic: &str, options: &[&str], lines: &[&str]) {
    let mut command = Command::new("mosquitto_pub");
    command.args(["-h", "127.0.0.1", "-p", &port.to_string(), "-t", topic, "-l"]).args(options);
    let mut child = command.stdin(Stdio::piped()).spawn().expect("mosquitto_pub");
    let mut stdin = child.stdin.take().expect("its input");
    for line in lines {
        writeln!(stdin, "{line}").expect("a line");
    }
    drop(stdin);
    assert!(child.wait().expect("mosquitto_pub").success(), "mosquitto_pub {topic}");
}

/// A mosquitto_sub that has subscribed and prints `TOPIC PAYLOAD` for each message.
pub fn subscribe(port: u16, topic: &str, options: &[&str]) -> Process {
    let mut command = Command::new("stdbuf");
    command.args(["-oL", "mosquitto_sub", "-d", "-F", "%t %p", "-h", "127.0.0.1", "-p", &port.to_string()]);
    command.args(["-q", "1", "-t", topic]).args(options);
    let process = Process::start(&mut command);
    wait_for("a subscription", || process.printed().contains("Subscribed").then_some(()));
    process
}

/// Where a handshake is cut off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    /// The broker gets CONNECT, and its answer goes nowhere.
    Connack,
    /// SUBSCRIBE goes nowhere.
    Subscribe,
}

/// Stands before a broker, and cuts handshakes off where it is told to.
pub struct Cutter {
    /// Where it listens.
    pub port: u16,
    cut: Arc<Mutex<Option<Cut>>>,
}

impl Cutter {
    /// In front of a broker's port.
    pub fn start(broker: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let port = listener.local_addr().expect("its address").port();
        let cut = Arc::new(Mutex::new(None));
        let told = Arc::clone(&cut);
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let cut = *told.lock().expect("a lock");
                if let Ok(server) = TcpStream::connect(("127.0.0.1", broker)) {
                    std::thread::spawn(move || Self::pass(client, server, cut));
                }
            }
        });
        Self { port, cut }
    }

    /// What becomes of the connections from now on.
    pub fn set(&self, cut: Option<Cut>) {
        *self.cut.lock().expect("a lock") = cut;
    }

    fn pass(mut client: TcpStream, mut server: TcpStream, cut: Option<Cut>) {
        // Each side sends one packet and waits for the other.
        let carry = |from: &mut TcpStream, to: Option<&mut TcpStream>| {
            let mut packet = [0; 4096];
            let length = from.read(&mut packet).unwrap_or(0);
            to.is_some_and(|to| length > 0 && to.write_all(&packet[..length]).is_ok())
        };
        let answered = carry(&mut client, Some(&mut server))
            && carry(&mut server, Some(&mut client).filter(|_| cut != Some(Cut::Connack)));
        if !answered || (cut == Some(Cut::Subscribe) && !carry(&mut client, None)) {
            return;
        }
        let (mut reader, mut writer) = (server.try_clone().expect("an end"), client.try_clone().expect("an end"));
        let back = std::thread::spawn(move || {
            let _ = std::io::copy(&mut reader, &mut writer);
            let _ = writer.shutdown(Shutdown::Write);
        });
        let _ = std::io::copy(&mut client, &mut server);
        let _ = server.shutdown(Shutdown::Write);
        let _ = back.join();
    }
}
