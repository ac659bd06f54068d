//! The three ways to read: all rows, one row of several queries, new rows only.

use std::collections::VecDeque;
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, StructArray};
use arrow::buffer::NullBuffer;
use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use pipeline::batch::BATCH_ROWS_MAX;
use pipeline::error::{Error, Result};
use pipeline::plugin::{PullReader, Pulled, RowError};

use super::collect::Collector;
use super::connection::Connection;
use super::key::{self, Key};
use super::plan::{Query, Server};

/// All rows at each poll.
pub(super) struct SnapshotReader {
    pub(super) connection: Connection,
    pub(super) query: Query,
    pub(super) rows_max: usize,
    /// What is left of the last poll, in batches.
    pub(super) waiting: VecDeque<RecordBatch>,
}

#[async_trait]
impl PullReader for SnapshotReader {
    async fn next(&mut self) -> Result<Option<Pulled>> {
        let mut errors = Vec::new();
        if self.waiting.is_empty() {
            let limit = self.rows_max + 1;
            let mut rows = Collector::new(&self.query.fields, &[], limit);
            self.connection.fetch(&self.query.sql, &[], &mut rows).await?;
            if rows.seen() == limit {
                return Err(Error::outside(format!(
                    "the query gives more than {} rows; aggregate in SQL, raise `rows_max`, or read new rows only \
                     with `cursor`",
                    self.rows_max
                )));
            }
            let (all, wrong) = rows.finish()?;
            errors = wrong;
            let starts = (0..all.num_rows().max(1)).step_by(BATCH_ROWS_MAX);
            let batches = starts.map(|at| all.slice(at, BATCH_ROWS_MAX.min(all.num_rows() - at)));
            self.waiting.extend(batches);
        }
        let rows = self.waiting.pop_front().ok_or_else(|| Error::internal("a snapshot without a batch"))?;
        Ok(Some(Pulled { rows, errors, position: Vec::new(), more: !self.waiting.is_empty() }))
    }
}

/// One row of structs at each poll.
pub(super) struct TogetherReader {
    pub(super) connection: Connection,
    pub(super) queries: Vec<(String, Query)>,
    pub(super) schema: SchemaRef,
}

#[async_trait]
impl PullReader for TogetherReader {
    async fn next(&mut self) -> Result<Option<Pulled>> {
        self.connection.begin().await?;
        let mut columns: Vec<ArrayRef> = Vec::new();
        let mut errors = Vec::new();
        for (name, query) in &self.queries {
            // Two are enough to know that there is not one.
            let mut rows = Collector::new(&query.fields, &[], 2);
            let fetched = self.connection.fetch(&query.sql, &[], &mut rows).await;
            fetched.map_err(|e| e.context(format!("query `{name}`")))?;
            match one_struct(rows)? {
                Ok(column) => columns.push(Arc::new(column)),
                Err(wrong) => {
                    errors.push(RowError::new(format!("query `{name}`: {}", wrong.message), wrong.payload.as_bytes()))
                }
            }
        }
        self.connection.end().await?;
        let rows = match errors.is_empty() {
            true => RecordBatch::try_new(Arc::clone(&self.schema), columns)?,
            false => RecordBatch::new_empty(Arc::clone(&self.schema)),
        };
        Ok(Some(Pulled { rows, errors, position: Vec::new(), more: false }))
    }
}

/// The only row of a result as a struct; null if there is none.
fn one_struct(rows: Collector) -> Result<Result<StructArray, RowError>> {
    let seen = rows.seen();
    let (batch, mut errors) = rows.finish()?;
    if seen > 1 {
        return Ok(Err(RowError::new("more than one row; aggregate, or add LIMIT 1", &[])));
    }
    if let Some(error) = errors.pop() {
        return Ok(Err(error));
    }
    let fields = batch.schema_ref().fields().clone();
    if seen == 0 {
        return Ok(Ok(StructArray::new_null(fields, 1)));
    }
    Ok(Ok(StructArray::try_new(fields, batch.columns().to_vec(), None::<NullBuffer>)?))
}

/// New rows only.
pub(super) struct CursorReader {
    pub(super) connection: Connection,
    pub(super) query: Query,
    pub(super) columns: Vec<String>,
    /// The query for the first rows, and for the rows after `keys`.
    pub(super) sql: (String, String),
    /// The cursor in the last row read; empty before the first.
    pub(super) keys: Vec<Key>,
}

impl CursorReader {
    pub(super) fn new(
        connection: Connection,
        server: &Server,
        query: &Query,
        columns: &[String],
        keys: Vec<Key>,
    ) -> Self {
        let sql = (cursor_sql(server, &query.sql, columns, false), cursor_sql(server, &query.sql, columns, true));
        Self { connection, query: query.clone(), columns: columns.to_vec(), sql, keys }
    }
}

#[async_trait]
impl PullReader for CursorReader {
    async fn next(&mut self) -> Result<Option<Pulled>> {
        let mut rows = Collector::new(&self.query.fields, &self.columns, BATCH_ROWS_MAX);
        let sql = if self.keys.is_empty() { &self.sql.0 } else { &self.sql.1 };
        // With several columns the first value is bound twice, see `cursor_sql`.
        let first = if self.keys.len() > 1 { self.keys.first() } else { None };
        let bound: Vec<Key> = first.into_iter().chain(&self.keys).cloned().collect();
        self.connection.fetch(sql, &bound, &mut rows).await?;
        if rows.seen() > 0 {
            self.keys = rows.keys().to_vec();
        }
        let more = rows.seen() == BATCH_ROWS_MAX;
        let (rows, errors) = rows.finish()?;
        Ok(Some(Pulled { rows, errors, position: key::encode(&self.columns, &self.keys), more }))
    }
}

/// The query for the next rows in the order of the cursor.
///
/// Several columns are compared as one row value, so that ties in the first lose nothing; the comparison of
/// the first column alone says the same once more, for planners that use no index for row values.
fn cursor_sql(server: &Server, query: &str, columns: &[String], after: bool) -> String {
    let quoted: Vec<String> = columns.iter().map(|c| server.quote_column(c)).collect();
    let order = quoted.join(", ");
    let mut number = 0;
    let mut value = || {
        number += 1;
        if *server == Server::Postgres { format!("${number}") } else { "?".to_owned() }
    };
    let condition = match (after, quoted.as_slice()) {
        // Null is never after a position; so it is not read before one either.
        (false, all) => all.iter().map(|c| format!("{c} IS NOT NULL")).collect::<Vec<_>>().join(" AND "),
        (true, [one]) => format!("{one} > {}", value()),
        (true, all) => {
            let first = format!("{} >= {}", all[0], value());
            let values: Vec<String> = all.iter().map(|_| value()).collect();
            format!("{first} AND ({order}) > ({})", values.join(", "))
        }
    };
    // The line break keeps a comment at the query's end from swallowing the rest.
    format!("SELECT * FROM (\n{query}\n) AS tailwater WHERE {condition} ORDER BY {order} LIMIT {BATCH_ROWS_MAX}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_compares_whole_rows() {
        let columns = ["updated_at".to_owned(), "id".to_owned()];
        let sql = cursor_sql(&Server::Postgres, "SELECT 1 -- x", &columns, true);
        assert_eq!(
            sql,
            "SELECT * FROM (\nSELECT 1 -- x\n) AS tailwater WHERE \"updated_at\" >= $1 AND (\"updated_at\", \"id\") > \
             ($2, $3) ORDER BY \"updated_at\", \"id\" LIMIT 8192"
        );
        let sql = cursor_sql(&Server::MySql, "q", &columns[1..], true);
        assert_eq!(sql, "SELECT * FROM (\nq\n) AS tailwater WHERE `id` > ? ORDER BY `id` LIMIT 8192");
        let sql = cursor_sql(&Server::MySql, "q", &columns, false);
        assert!(sql.contains("WHERE `updated_at` IS NOT NULL AND `id` IS NOT NULL ORDER"), "{sql}");
    }
}
