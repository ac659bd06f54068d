//! `POST /api/v1/query`: SQL over the history, by HTTP.

use std::sync::Arc;

use async_trait::async_trait;
use hyper::StatusCode;
use hyper::header::{HeaderValue, RETRY_AFTER};
use serde::Deserialize;

use super::output::Format;
use super::{History, Limits, QueryError, QueryErrorKind, SQL_BYTES_MAX};
use crate::http::respond::{self, BodyError};
use crate::http::{Handler, Request, Response};

/// Longest body: the longest SQL text with every character escaped twice, and room for the other keys.
const BODY_BYTES_MAX: usize = 2 * SQL_BYTES_MAX + 1024;

/// Answers `{"sql": "SELECT …"}` with one JSON array of row objects; `"format": "csv"` or `"table"` with text.
///
/// | status | when |
/// | --- | --- |
/// | 200 | the rows |
/// | 400 | the body or the SQL is wrong |
/// | 408 | longer than the time limit |
/// | 413 | more rows or memory than the limit, or a longer body |
/// | 429 | too many queries at one time, with `Retry-After` |
/// | 500 | a file could not be read, or a mistake of ours |
///
/// Every error is `{"error": "…"}`.
#[derive(Debug)]
pub struct QueryHandler {
    history: Arc<History>,
    limits: Limits,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    sql: String,
    format: Option<String>,
}

impl QueryHandler {
    /// Over `history`, each query within `limits`.
    pub fn new(history: Arc<History>, limits: Limits) -> Self {
        Self { history, limits }
    }

    /// The answer to a body.
    pub async fn answer(&self, body: &[u8]) -> Response {
        let body: Body = match serde_json::from_slice(body) {
            Ok(body) => body,
            Err(error) => {
                let message = format!("the body is not `{{\"sql\": \"SELECT …\"}}`: {error}");
                return respond::error(StatusCode::BAD_REQUEST, message);
            }
        };
        let format = match body.format.as_deref().unwrap_or("json").parse::<Format>() {
            Ok(format) => format,
            Err(message) => return respond::error(StatusCode::BAD_REQUEST, message),
        };
        match self.history.query_text(&body.sql, format, &self.limits).await {
            Ok(text) => respond::answer(StatusCode::OK, format.content_type(), text),
            Err(error) => failure(&error),
        }
    }
}

#[async_trait]
impl Handler for QueryHandler {
    async fn handle(&self, request: Request) -> Response {
        match respond::read_body(request.inner.into_body(), BODY_BYTES_MAX).await {
            Ok(body) => self.answer(&body).await,
            Err(BodyError::TooLong) => {
                let message = format!("the body is longer than {BODY_BYTES_MAX} bytes");
                respond::error(StatusCode::PAYLOAD_TOO_LARGE, message)
            }
            Err(BodyError::Broken(message)) => respond::error(StatusCode::BAD_REQUEST, message),
        }
    }
}

fn failure(error: &QueryError) -> Response {
    let status = match error.kind {
        QueryErrorKind::Sql => StatusCode::BAD_REQUEST,
        QueryErrorKind::Time => StatusCode::REQUEST_TIMEOUT,
        QueryErrorKind::Memory | QueryErrorKind::Rows => StatusCode::PAYLOAD_TOO_LARGE,
        QueryErrorKind::Busy => StatusCode::TOO_MANY_REQUESTS,
        QueryErrorKind::Files | QueryErrorKind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    };
    let mut response = respond::error(status, error.to_string());
    if error.kind == QueryErrorKind::Busy {
        response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("1"));
    }
    response
}
