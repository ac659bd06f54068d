//! The HTTP surface: one listener, routes that plugins mount, and the engine's own API.

pub mod api;
pub mod respond;
pub mod server;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError, RwLock};

use async_trait::async_trait;
use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;

/// A response body: whole or streamed.
pub type Body = UnsyncBoxBody<Bytes, std::io::Error>;
/// A response.
pub type Response = hyper::Response<Body>;

/// A request with the client's address.
pub struct Request {
    /// Method, path, headers and body.
    pub inner: hyper::Request<Incoming>,
    /// The client's address.
    pub peer: SocketAddr,
}

/// Answers the requests of one route.
#[async_trait]
pub trait Handler: Send + Sync {
    /// Answers one request. Dropped when the client goes away.
    async fn handle(&self, request: Request) -> Response;
}

/// The routes of the listener. Cloning gives another handle on the same routes.
#[derive(Clone, Default)]
pub struct Routes {
    routes: Arc<RwLock<RouteMap>>,
}

type RouteMap = HashMap<String, Vec<(&'static str, Arc<dyn Handler>)>>;

impl Routes {
    /// Mounts a handler. `check` has made sure that no other plugin takes the same method and path. A path that
    /// ends with a slash stands for everything below it (but `/` for itself alone).
    pub fn mount(&self, method: &'static str, path: &str, handler: Arc<dyn Handler>) {
        let mut routes = self.routes.write().unwrap_or_else(PoisonError::into_inner);
        routes.entry(path.to_owned()).or_default().push((method, handler));
    }

    /// The handler of a request; or the methods that the path takes, if it takes others; or `None`.
    pub fn find(&self, method: &str, path: &str) -> Option<Result<Arc<dyn Handler>, Vec<&'static str>>> {
        let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
        let above = || path.rfind('/').filter(|at| *at > 0).and_then(|at| routes.get(&path[..=at]));
        let handlers = routes.get(path).or_else(above)?;
        let handler = handlers.iter().find(|(m, _)| *m == method).map(|(_, handler)| Arc::clone(handler));
        Some(handler.ok_or_else(|| handlers.iter().map(|(m, _)| *m).collect()))
    }

    /// Every path, in order.
    pub fn paths(&self) -> Vec<String> {
        let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
        let mut paths: Vec<String> = routes.keys().cloned().collect();
        paths.sort_unstable();
        paths
    }
}

impl std::fmt::Debug for Routes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
        f.debug_list().entries(routes.keys()).finish()
    }
}
