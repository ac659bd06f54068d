//! What a checkpoint keeps of this sink: the staged files it will publish, and the rows that wait.

use std::path::PathBuf;

use arrow::array::RecordBatch;
use pipeline::error::{Error, Result};
use pipeline::state::{StateReader, StateWriter};

use super::{Facts, Input, StagedFile, Target};

/// First number of the state; another one is another format.
const VERSION: u64 = 2;
/// The format before, without the number of strangers.
const VERSION_BEFORE: u64 = 1;

/// What [`read`] gives.
#[derive(Default)]
pub(super) struct Restored {
    /// See [`super::ledger::Ledger`].
    pub(super) strangers: u64,
    pub(super) staged: Vec<StagedFile>,
    pub(super) open: Vec<RestoredRows>,
}

/// Rows of one pipeline that waited.
pub(super) struct RestoredRows {
    pub(super) metric: String,
    pub(super) facts: Facts,
    pub(super) batches: Vec<RecordBatch>,
}

pub(super) fn write(state: &mut StateWriter, strangers: u64, staged: &[StagedFile], inputs: &[Input]) -> Result<()> {
    state.u64(VERSION);
    state.u64(strangers);
    state.u64(staged.len() as u64);
    for file in staged {
        let target = file.target.as_ref().and_then(|t| Some((t.checkpoint, t.path.to_str()?)));
        let (checkpoint, path) = target.ok_or_else(|| Error::internal("a staged file without a final name"))?;
        state.str(&file.metric);
        state.str(&file.stage);
        state.u64(checkpoint);
        state.str(path);
    }
    let waiting: Vec<(&Input, Facts)> = inputs.iter().filter_map(|i| Some((i, i.open.facts?))).collect();
    state.u64(waiting.len() as u64);
    for (input, facts) in waiting {
        state.str(&input.metric);
        state.u64(facts.first_batch);
        state.u64(facts.last_batch);
        state.i64(facts.event_min_us);
        state.i64(facts.event_max_us);
        state.i64(facts.since_us);
        state.batches(&input.open.batches)?;
    }
    Ok(())
}

pub(super) fn read(state: &mut StateReader<'_>) -> Result<Restored> {
    let version = state.u64()?;
    if ![VERSION_BEFORE, VERSION].contains(&version) {
        return Err(Error::user(format!(
            "the checkpoint's history state has format {version}, this program reads {VERSION}"
        )));
    }
    let strangers = if version == VERSION { state.u64()? } else { 0 };
    let mut restored = Restored { strangers, ..Restored::default() };
    for _ in 0..state.count()? {
        let (metric, stage) = (state.str()?.to_owned(), state.str()?.to_owned());
        let target = Some(Target { checkpoint: state.u64()?, path: PathBuf::from(state.str()?) });
        restored.staged.push(StagedFile { metric, input: None, stage, target, tail_batches: 0, tail_bytes: 0 });
    }
    for _ in 0..state.count()? {
        let metric = state.str()?.to_owned();
        let facts = Facts {
            first_batch: state.u64()?,
            last_batch: state.u64()?,
            event_min_us: state.i64()?,
            event_max_us: state.i64()?,
            since_us: state.i64()?,
        };
        restored.open.push(RestoredRows { metric, facts, batches: state.batches()? });
    }
    Ok(restored)
}
