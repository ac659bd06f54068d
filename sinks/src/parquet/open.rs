//! The rows of a pipeline that are in no file yet.

use std::sync::PoisonError;

use arrow::array::RecordBatch;
use arrow::compute::concat_batches;
use arrow::datatypes::SchemaRef;
use pipeline::batch::BATCH_ROWS_MAX;
use pipeline::error::Result;
use pipeline::plugin::HistoryTail;

/// One pipeline.
pub(super) struct Input {
    pub(super) metric: String,
    /// Columns of its files.
    pub(super) schema: SchemaRef,
    pub(super) tail: Option<HistoryTail>,
    pub(super) open: Open,
}

/// Rows that are in no file yet.
#[derive(Debug, Default)]
pub(super) struct Open {
    pub(super) batches: Vec<RecordBatch>,
    pub(super) bytes: usize,
    /// What the footer will say; `None` while there is no row.
    pub(super) facts: Option<Facts>,
}

/// What is known of some rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) first_batch: u64,
    pub(super) last_batch: u64,
    pub(super) event_min_us: i64,
    pub(super) event_max_us: i64,
    /// When the oldest row came to this sink, by the wall clock: it counts through a restart.
    pub(super) since_us: i64,
}

impl Input {
    /// Adds rows, joined with the small batches before them: a batch of one row costs a checkpoint and a query as
    /// much as one of a hundred. A batch only joins one that is not larger, so that a row is copied few times.
    pub(super) fn push(&mut self, rows: RecordBatch, bytes: usize, facts: Facts) -> Result<()> {
        let batches = &self.open.batches;
        let (mut keep, mut total) = (batches.len(), rows.num_rows());
        while let Some(before) = keep.checked_sub(1).map(|index| batches[index].num_rows()) {
            if before > total || before + total > BATCH_ROWS_MAX {
                break;
            }
            keep -= 1;
            total += before;
        }
        let joined = batches.len() - keep;
        let rows = match joined {
            0 => rows,
            _ => concat_batches(&self.schema, batches[keep..].iter().chain([&rows]))?,
        };
        self.open.batches.truncate(keep);
        self.open.batches.push(rows.clone());
        self.open.bytes += bytes;
        self.open.facts = Some(self.open.facts.map_or(facts, |known| known.merge(facts)));
        if let Some(tail) = &self.tail {
            let mut tail = tail.write().unwrap_or_else(PoisonError::into_inner);
            let kept = tail.len().saturating_sub(joined);
            tail.truncate(kept);
            tail.push(rows);
        }
        Ok(())
    }
}

impl Facts {
    pub(super) fn merge(self, other: Self) -> Self {
        Self {
            first_batch: self.first_batch.min(other.first_batch),
            last_batch: self.last_batch.max(other.last_batch),
            event_min_us: self.event_min_us.min(other.event_min_us),
            event_max_us: self.event_max_us.max(other.event_max_us),
            since_us: self.since_us.min(other.since_us),
        }
    }
}
