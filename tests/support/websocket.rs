//! A stock WebSocket client.

use futures::{SinkExt, StreamExt};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{WebSocketStream, client_async};

use super::PATIENCE;

/// A connected client.
pub(crate) struct Client {
    /// The connection itself, for what the methods here do not offer.
    pub(crate) socket: WebSocketStream<TcpStream>,
}

impl Client {
    /// Connects to `address` and does the handshake for `path`.
    pub(crate) async fn connect(address: impl tokio::net::ToSocketAddrs + std::fmt::Display, path: &str) -> Self {
        let url = format!("ws://{address}{path}");
        let stream = TcpStream::connect(address).await.expect("a connection");
        let (socket, _) = client_async(url, stream).await.expect("a handshake");
        Self { socket }
    }

    /// The next message of any kind; `None` at the end.
    pub(crate) async fn message(&mut self) -> Option<Result<Message, Error>> {
        tokio::time::timeout(PATIENCE, self.socket.next()).await.expect("a message in time")
    }

    /// The next text.
    pub(crate) async fn text(&mut self) -> String {
        loop {
            match self.message().await {
                Some(Ok(Message::Text(text))) => return text.to_string(),
                Some(Ok(Message::Ping(_))) => {}
                other => panic!("expected a text, not {other:?}"),
            }
        }
    }

    /// The next text as JSON.
    pub(crate) async fn json(&mut self) -> Value {
        serde_json::from_str(&self.text().await).expect("JSON")
    }

    /// Sends a text.
    pub(crate) async fn send(&mut self, text: &str) {
        self.socket.send(Message::text(text)).await.expect("to send");
    }

    /// The code with which the server closes, after any texts.
    pub(crate) async fn closed(&mut self) -> CloseCode {
        let code = loop {
            match self.message().await {
                Some(Ok(Message::Close(Some(frame)))) => break frame.code,
                Some(Ok(_)) => {}
                other => panic!("expected a close frame, not {other:?}"),
            }
        };
        // The answer to the close frame leaves when the end is read.
        while self.message().await.is_some() {}
        code
    }

    /// Closes with the handshake of the standard.
    pub(crate) async fn close(mut self) {
        self.socket.close(None).await.expect("to close");
        while self.message().await.is_some() {}
    }
}
