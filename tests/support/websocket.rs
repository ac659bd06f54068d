//! A stock WebSocket client that blocks.

use std::io::Write;
use std::net::TcpStream;

use serde_json::Value;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::{Error, Message, WebSocket, client};

use super::PATIENCE;

/// A connected client.
pub struct Socket(WebSocket<TcpStream>);

impl Socket {
    /// Connects to a path of the program.
    pub fn open(port: u16, path: &str) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).expect("a connection");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let (socket, _) = client(format!("ws://127.0.0.1:{port}{path}"), stream).expect("a handshake");
        Self(socket)
    }

    /// The next frame as JSON.
    pub fn json(&mut self) -> Value {
        loop {
            match self.0.read().expect("a frame") {
                Message::Text(text) => return serde_json::from_str(&text).expect("JSON"),
                Message::Ping(_) | Message::Pong(_) => {}
                other => panic!("expected a text, not {other:?}"),
            }
        }
    }

    /// Reads frames until `found` holds for one, and returns it.
    pub fn until(&mut self, mut found: impl FnMut(&Value) -> bool) -> Value {
        loop {
            let frame = self.json();
            if found(&frame) {
                return frame;
            }
        }
    }

    /// Sends a message; an error means that the other side has gone.
    pub fn send(&mut self, message: Message) -> Result<(), Error> {
        self.0.send(message)
    }

    /// Writes bytes that need not be a frame.
    pub fn write_raw(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.0.get_mut().write_all(bytes)
    }

    /// Reads to the end: the close frame, if one came.
    pub fn closed(mut self) -> Option<CloseFrame> {
        let mut close = None;
        loop {
            match self.0.read() {
                Ok(Message::Close(frame)) => close = frame,
                Ok(_) => {}
                Err(_) => return close,
            }
        }
    }
}
