//! Whole results: all rows, or one row of several queries.

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
use super::plan::Query;

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
