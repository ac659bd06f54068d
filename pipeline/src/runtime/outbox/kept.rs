//! What a checkpoint says of an outbox: how far its log goes, and from where on its rows are not delivered.

use super::STATE_VERSION;
use crate::error::Result;
use crate::log::Record;
use crate::state::{StateReader, StateWriter};

/// What a checkpoint says of an outbox.
pub(crate) struct Kept {
    /// The record after the last one that is in the checkpoint.
    pub(crate) end: u64,
    pub(super) froms: Vec<From>,
}

/// Where the rows of an input begin that a checkpoint has and the other side may not have.
pub(super) struct From {
    pub(super) metric: String,
    /// Number of the input's next row.
    pub(super) next: u64,
    /// Their first record, and the rows in it that are delivered.
    first: u64,
    skip: u64,
}

impl Kept {
    /// Reads the state; nothing if it has the layout from before there was a log.
    pub(crate) fn read(state: &[u8]) -> Result<Option<Self>> {
        let mut state = StateReader::new(state);
        if state.u64()? != STATE_VERSION {
            return Ok(None);
        }
        let end = state.u64()?;
        let mut froms = Vec::new();
        for _ in 0..state.count()? {
            let metric = state.str()?.to_owned();
            froms.push(From { metric, next: state.u64()?, first: state.u64()?, skip: state.u64()? });
        }
        Ok(Some(Self { end, froms }))
    }

    /// The first record that is needed.
    pub(crate) fn needed(&self) -> u64 {
        self.froms.iter().map(|from| from.first).min().unwrap_or(self.end)
    }

    /// Rows of a record that are in the checkpoint and not delivered.
    pub(crate) fn rows_waiting(&self, record: &Record) -> Result<u64> {
        let Told { metric, count, .. } = Told::of(record)?;
        Ok(if record.lsn < self.end { self.waiting(record, metric, count).1 } else { 0 })
    }

    /// Of the rows of a record: how many are delivered already, and how many wait.
    pub(super) fn waiting(&self, record: &Record, metric: &str, count: u64) -> (u64, u64) {
        let Some(from) = self.froms.iter().find(|from| from.metric == metric && from.first <= record.lsn) else {
            return (count, 0);
        };
        let skip = if from.first == record.lsn { from.skip } else { 0 };
        (skip, count.saturating_sub(skip))
    }
}

/// What a record says of its rows.
pub(super) struct Told<'a> {
    pub(super) metric: &'a str,
    /// Number of the first one.
    pub(super) first: u64,
    pub(super) count: u64,
}

impl<'a> Told<'a> {
    pub(super) fn of(record: &'a Record) -> Result<Self> {
        let mut metadata = StateReader::new(&record.metadata);
        Ok(Self { metric: metadata.str()?, first: metadata.u64()?, count: metadata.u64()? })
    }

    pub(super) fn write(&self) -> Vec<u8> {
        let mut metadata = StateWriter::default();
        metadata.str(self.metric);
        metadata.u64(self.first);
        metadata.u64(self.count);
        metadata.finish()
    }
}
