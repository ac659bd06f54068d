//! A TCP proxy that does to connections what networks do: it cuts them in the middle, delays them, and half-closes them.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::random::{Random, let_a_random_moment_pass};

/// Bytes of one read: small, so that most packets fall into several pieces.
const PIECE_BYTES: usize = 512;

/// The longest delay of one piece.
const DELAY_MAX: Duration = Duration::from_millis(3);

/// What becomes of a connection when so many bytes have passed, both ways together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Both ends see the end, in the middle of whatever was under way.
    Cut(u64),
    /// One end sees the end; what the other still sends goes nowhere.
    HalfClosed(u64),
    /// Nothing.
    Whole,
}

impl Fate {
    fn bytes(self) -> u64 {
        match self {
            Self::Cut(bytes) | Self::HalfClosed(bytes) => bytes,
            Self::Whole => u64::MAX,
        }
    }
}

/// A proxy in front of one server. Its threads end with the process or with their connections.
pub struct Proxy {
    /// Where it listens.
    pub port: u16,
    shared: Arc<Shared>,
}

struct Shared {
    target: u16,
    random: Mutex<Random>,
    /// Whether connections meet a bad end.
    cuts: AtomicBool,
    /// Bytes after which a connection ends, at most.
    bytes_max: u64,
    /// Connections that met a bad end.
    ended: AtomicU64,
}

impl Proxy {
    /// Starts a proxy in front of a port of loopback. A connection lives for at most `bytes_max` bytes.
    pub fn start(target: u16, bytes_max: u64, random: Random) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a free port");
        let port = listener.local_addr().expect("its address").port();
        let shared = Arc::new(Shared {
            target,
            random: Mutex::new(random),
            cuts: AtomicBool::new(true),
            bytes_max,
            ended: AtomicU64::new(0),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                accepting.connect(client);
            }
        });
        Self { port, shared }
    }

    /// From now on new connections are left alone.
    pub fn leave_alone(&self) {
        self.shared.cuts.store(false, Ordering::Relaxed);
    }

    /// Connections that met a bad end so far.
    pub fn ended(&self) -> u64 {
        self.shared.ended.load(Ordering::Relaxed)
    }
}

impl Shared {
    fn connect(self: &Arc<Self>, client: TcpStream) {
        let Ok(server) = TcpStream::connect(("127.0.0.1", self.target)) else { return };
        let mut random = self.random.lock().expect("random").fork();
        let bytes = random.between(1, self.bytes_max);
        let fate = match self.cuts.load(Ordering::Relaxed) {
            false => Fate::Whole,
            true if random.once_in(4) => Fate::HalfClosed(bytes),
            true => Fate::Cut(bytes),
        };
        let passed = Arc::new(AtomicU64::new(0));
        let clone = |stream: &TcpStream| stream.try_clone().expect("a handle");
        for (from, to) in [(clone(&client), clone(&server)), (server, client)] {
            let (shared, passed, random) = (Arc::clone(self), Arc::clone(&passed), random.fork());
            std::thread::spawn(move || shared.pass(&from, &to, fate, &passed, random));
        }
    }

    /// Carries bytes one way until an end or the fate of the connection.
    fn pass(&self, mut from: &TcpStream, mut to: &TcpStream, fate: Fate, passed: &AtomicU64, mut random: Random) {
        let mut piece = [0; PIECE_BYTES];
        loop {
            let read = from.read(&mut piece).unwrap_or(0);
            if read == 0 {
                let _ = to.shutdown(Shutdown::Write);
                return;
            }
            let before = passed.fetch_add(read as u64, Ordering::Relaxed);
            let left = usize::try_from(fate.bytes().saturating_sub(before)).unwrap_or(usize::MAX);
            if fate != Fate::Whole && random.once_in(8) {
                let_a_random_moment_pass(&mut random, Duration::ZERO, DELAY_MAX);
            }
            if to.write_all(&piece[..read.min(left)]).is_ok() && read <= left {
                continue;
            }
            // Only one piece goes over the limit.
            if before <= fate.bytes() {
                self.ended.fetch_add(1, Ordering::Relaxed);
            }
            let _ = to.shutdown(Shutdown::Write);
            if matches!(fate, Fate::HalfClosed(_)) {
                while from.read(&mut piece).is_ok_and(|read| read > 0) {}
            } else {
                let _ = to.shutdown(Shutdown::Both);
                let _ = from.shutdown(Shutdown::Both);
            }
            return;
        }
    }
}
