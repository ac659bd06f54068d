//! A small HTTP server over the routes that plugins mounted, and a raw client.

use std::convert::Infallible;
use std::net::SocketAddr;

use hyper::StatusCode;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use pipeline::http::{Request, Routes, respond};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::PATIENCE;

/// Serves `routes` on a free port for as long as the runtime lives.
pub(crate) async fn serve(routes: Routes) -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
    let address = listener.local_addr().expect("its address");
    tokio::spawn(async move {
        while let Ok((stream, peer)) = listener.accept().await {
            let routes = routes.clone();
            stream.set_nodelay(true).expect("no delay");
            let service = service_fn(move |inner: hyper::Request<hyper::body::Incoming>| {
                let handler = routes.find(inner.method().as_str(), inner.uri().path());
                async move {
                    Ok::<_, Infallible>(match handler {
                        Some(Ok(handler)) => handler.handle(Request { inner, peer }).await,
                        _ => respond::error(StatusCode::NOT_FOUND, "nothing here"),
                    })
                }
            });
            tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service).with_upgrades());
        }
    });
    address
}

/// A connection on which the test reads and writes the bytes itself.
pub(crate) struct Raw {
    stream: TcpStream,
    read: String,
}

impl Raw {
    /// Sends a GET with these headers (each `Name: value`), and reads the head of the answer.
    pub(crate) async fn get(address: SocketAddr, path: &str, headers: &[&str]) -> (String, Self) {
        let mut stream = TcpStream::connect(address).await.expect("a connection");
        let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
        let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n{headers}\r\n");
        stream.write_all(request.as_bytes()).await.expect("a request");
        let mut raw = Self { stream, read: String::new() };
        let head = raw.read_to("\r\n\r\n").await.expect("the head of an answer");
        (head, raw)
    }

    /// Everything up to `end`, without it; `None` if the connection ends before.
    pub(crate) async fn read_to(&mut self, end: &str) -> Option<String> {
        loop {
            if let Some((before, after)) = self.read.split_once(end) {
                let (before, after) = (before.to_owned(), after.to_owned());
                self.read = after;
                return Some(before);
            }
            let mut bytes = [0; 4096];
            let read = tokio::time::timeout(PATIENCE, self.stream.read(&mut bytes)).await.expect("bytes in time");
            match read {
                Ok(read) if read > 0 => self.read.push_str(&String::from_utf8_lossy(&bytes[..read])),
                _ => return None,
            }
        }
    }
}
