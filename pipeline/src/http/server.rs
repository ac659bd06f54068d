//! The listener: accepts connections, serves routes, hands upgraded sockets to their handlers, stops cleanly.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::body::{Body, Incoming};
use hyper::header::{ALLOW, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tracing::{debug, warn};

use super::{Request, Response, Routes, respond};
use crate::config::did_you_mean;

/// Most connections at one time, live ones included; a further one waits in the kernel's queue. About 4 KiB of
/// kernel memory each.
const CONNECTIONS_MAX: usize = 20_000;
/// A client that has not sent its headers by then is cut off.
const HEADERS_WITHIN: Duration = Duration::from_secs(10);
/// Longest request head.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// At a stop, requests in flight may finish for this long.
const STOP_WITHIN: Duration = Duration::from_secs(2);
/// Wait after a failed accept (no file descriptor left), so that the loop does not spin.
const ACCEPT_AGAIN_AFTER: Duration = Duration::from_millis(100);

/// The running listener.
pub struct Server {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

/// Serves `routes` on `listener` until [`Server::stop`].
pub fn start(listener: TcpListener, routes: Routes) -> Server {
    let (stop, stopped) = watch::channel(false);
    let task = tokio::spawn(accept(listener, routes, stopped));
    Server { stop, task }
}

impl Server {
    /// Accepts no more, lets requests in flight finish, and returns.
    pub async fn stop(self) {
        let _ = self.stop.send(true);
        let _ = self.task.await;
    }
}

async fn accept(listener: TcpListener, routes: Routes, mut stopped: watch::Receiver<bool>) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // Every connection holds a clone: when all are gone, so are the connections.
    let (open, mut all_closed) = mpsc::channel::<()>(1);
    loop {
        let permit = tokio::select! {
            _ = stopped.changed() => break,
            permit = Arc::clone(&permits).acquire_owned() => permit,
        };
        let (stream, peer) = tokio::select! {
            _ = stopped.changed() => break,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    warn!("accepting a connection failed: {error}");
                    sleep(ACCEPT_AGAIN_AFTER).await;
                    continue;
                }
            },
        };
        let (routes, stopped, open) = (routes.clone(), stopped.clone(), open.clone());
        tokio::spawn(async move {
            if let Err(error) = serve(stream, peer, routes, stopped).await {
                debug!(%peer, "connection: {error}");
            }
            drop((permit, open));
        });
    }
    drop(open);
    let _ = timeout(STOP_WITHIN, all_closed.recv()).await;
}

async fn serve(
    stream: TcpStream,
    peer: SocketAddr,
    routes: Routes,
    mut stopped: watch::Receiver<bool>,
) -> hyper::Result<()> {
    // Frames are small and must not wait for each other.
    let _ = stream.set_nodelay(true);
    let service = service_fn(move |request| {
        let routes = routes.clone();
        async move { Ok::<_, Infallible>(route(&routes, request, peer).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS_WITHIN)
        .max_buf_size(HEAD_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    tokio::pin!(connection);
    tokio::select! {
        result = connection.as_mut() => return result,
        _ = stopped.changed() => connection.as_mut().graceful_shutdown(),
    }
    connection.await
}

async fn route(routes: &Routes, inner: hyper::Request<Incoming>, peer: SocketAddr) -> Response {
    let head = inner.method() == Method::HEAD;
    let method = if head { "GET" } else { inner.method().as_str() };
    let path = inner.uri().path().to_owned();
    let found = routes.find(method, &path);
    match found {
        Some(Ok(handler)) => {
            let response = handler.handle(Request { inner, peer }).await;
            // hyper sends the head of a whole body with its length and leaves the body out; a stream it would begin.
            let is_stream = response.body().size_hint().exact().is_none();
            if head && is_stream { response.map(|_| respond::full("")) } else { response }
        }
        Some(Err(mut methods)) => {
            if methods.contains(&"GET") {
                methods.push("HEAD");
            }
            let allowed = methods.join(", ");
            let message = format!("`{path}` takes {allowed}");
            let mut response = respond::error(StatusCode::METHOD_NOT_ALLOWED, message);
            if let Ok(value) = HeaderValue::from_str(&allowed) {
                response.headers_mut().insert(ALLOW, value);
            }
            response
        }
        None => {
            let hint = did_you_mean(&path, routes.paths()).map(|hint| format!("; {hint}")).unwrap_or_default();
            respond::error(StatusCode::NOT_FOUND, format!("nothing at `{path}`{hint}"))
        }
    }
}
