//! What nodes are called in a checkpoint, and where their logs lie.

use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_64;

use super::intake_task::IntakeTask;
use super::store::Checkpoint;
use crate::error::Result;
use crate::graph::{GraphPipeline, GraphSink, GraphSource};
use crate::state::StateReader;

/// The name of a node in a checkpoint.
pub(super) fn key_of_source(source: &GraphSource) -> String {
    format!("source/{}", source.name)
}

pub(super) fn key_of_pipeline(pipeline: &GraphPipeline) -> String {
    format!("pipeline/{}", pipeline.name)
}

pub(super) fn key_of_sink(sink: &GraphSink) -> String {
    format!("sink/{}", sink.name)
}

/// Gives the sources in a checkpoint of an earlier version the fingerprints of this one.
pub(super) fn recognize(checkpoint: &mut Checkpoint, sources: &[GraphSource]) {
    for source in sources {
        if let Some((of, _)) = checkpoint.nodes.get_mut(&key_of_source(source))
            && *of == source.fingerprint_of_options
        {
            *of = source.fingerprint;
        }
    }
}

/// The state of a sink of another type is no state for this one; all else a sink finds out by itself.
pub(super) fn fingerprint_of_sink(sink: &GraphSink) -> u64 {
    xxh3_64(sink.type_name.as_bytes())
}

/// What a node loses that starts anew.
pub(super) fn what_it_keeps(key: &str) -> &'static str {
    match key.split('/').next() {
        Some("source") => "the position that it had, if any,",
        Some("pipeline") => "the windows, totals and rows that its steps had open, if any,",
        _ => "rows that it kept",
    }
}

/// Where the inbox of a push source lies. It outlives a change of the source's options, but not of its type: another one
/// could not read the records.
pub(super) fn inbox_folder(state_dir: &Path, source: &GraphSource) -> PathBuf {
    state_dir.join("inbox").join(format!("{}.{}", source.name, source.type_name))
}

/// Beginning of the keys of inboxes in a checkpoint.
pub(super) const INBOXES: &str = "inbox/";

/// The name in a checkpoint of the inbox in `folder`. It stands there by itself, not in its source's state: the source may
/// leave the file for a while, or have another type, and come back.
pub(super) fn key_of_inbox(folder: &Path) -> String {
    let name = folder.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    format!("{INBOXES}{name}")
}

/// What a checkpoint says of an inbox: the first record that it does not have.
pub(super) fn inbox_entry(key: String, first: u64) -> (String, (u64, Vec<u8>)) {
    (key, (0, first.to_le_bytes().to_vec()))
}

/// The first record of the inbox in `folder` that a checkpoint does not have, if it knows of that inbox.
pub(super) fn first_not_covered(checkpoint: &Checkpoint, folder: &Path) -> Result<Option<u64>> {
    let key = key_of_inbox(folder);
    if let Some((_, state)) = checkpoint.nodes.get(&key) {
        return StateReader::new(state).u64().map(Some);
    }
    // In checkpoints of earlier versions it ends the state of the source, whose name stands before the type.
    let source = key.trim_start_matches(INBOXES).split('.').next().unwrap_or_default();
    match checkpoint.nodes.get(&format!("source/{source}")) {
        Some((_, state)) => IntakeTask::place(state).map(|(_, first)| first),
        None => Ok(None),
    }
}

/// Where the outbox of a sink lies.
pub(super) fn outbox_folder(state_dir: &Path, sink: &str) -> PathBuf {
    state_dir.join("outbox").join(sink)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::clock::SourceClock;
    use crate::state::StateWriter;

    #[test]
    fn a_checkpoint_tells_how_far_it_has_an_inbox() {
        let mut before = StateWriter::default();
        before.bool(false);
        before.bytes(&[]);
        SourceClock::new(None).snapshot(&mut before);
        before.u64(0);
        before.u64(0);
        let now = before.clone().finish();
        before.u64(7);
        let node = |key: &str, state: Vec<u8>| (key.to_owned(), (1, state));
        let entry = |first| inbox_entry("inbox/a.http".to_owned(), first);
        for (case, nodes, expected) in [
            ("nothing", vec![], None),
            ("a source without an inbox", vec![node("source/a", now.clone())], None),
            ("a source of an earlier version", vec![node("source/a", before.clone().finish())], Some(7)),
            ("another one of an earlier version", vec![node("source/b", before.clone().finish())], None),
            ("an inbox whose source is gone", vec![entry(9)], Some(9)),
            ("an inbox and its source", vec![entry(9), node("source/a", now)], Some(9)),
        ] {
            let checkpoint = Checkpoint { number: 1, nodes: nodes.into_iter().collect() };
            let found = first_not_covered(&checkpoint, Path::new("state/inbox/a.http")).expect("whole states");
            assert_eq!(found, expected, "{case}");
        }
        let damaged = Checkpoint { number: 1, nodes: [node("inbox/a.http", vec![1])].into() };
        assert!(first_not_covered(&damaged, Path::new("inbox/a.http")).is_err());
    }
}
