//! What is in the state folder of a graph, for `pipeline state`. Takes no lock and changes nothing: works beside a running
//! process, of which it then shows a moment.

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use super::intake_task::IntakeTask;
use super::names::{
    INBOXES, fingerprint_of_sink, first_not_covered, inbox_folder, key_of_pipeline, key_of_sink, key_of_source,
    outbox_folder, recognize, what_it_keeps,
};
use super::outbox::Kept;
use super::store::{Checkpoint, Found, is_locked, read_all};
use crate::disk::{Disk, RealDisk};
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::log;
use crate::time::format_us;

/// Bytes of a position that are shown if it is no text.
const SHOWN_BYTES_MAX: usize = 16;

/// What is in a state folder.
#[derive(Clone, Debug, Serialize)]
pub struct State {
    /// The folder.
    pub folder: PathBuf,
    /// Whether a process runs on it.
    pub running: bool,
    /// Oldest first.
    pub checkpoints: Vec<CheckpointState>,
    /// The nodes of the graph and those of the checkpoint that a start would take, by key.
    pub nodes: Vec<NodeState>,
    /// The inboxes of push sources.
    pub inboxes: Vec<InboxState>,
    /// The outboxes of sinks.
    pub outboxes: Vec<OutboxState>,
}

/// A checkpoint.
#[derive(Clone, Debug, Serialize)]
pub struct CheckpointState {
    /// Its number.
    pub number: u64,
    /// When it was written, RFC 3339.
    pub time: Option<String>,
    /// Size of its file.
    pub bytes: u64,
    /// Why it cannot be read; `None`: it is whole.
    pub damage: Option<String>,
    /// Whether a start would go on from it.
    pub taken: bool,
}

/// A node, in the checkpoint that a start would take.
#[derive(Clone, Debug, Serialize)]
pub struct NodeState {
    /// Such as `source/devices`.
    pub key: String,
    /// Size of its state; `None`: it is not in the checkpoint.
    pub bytes: Option<u64>,
    /// Of a source: where it goes on, as text if it is one.
    pub position: Option<String>,
    /// Of a source with an inbox: the first record that the checkpoint does not have.
    pub first_record_not_covered: Option<u64>,
    /// What a start makes of it.
    pub start: Start,
    /// What that start would lose.
    pub lost: Option<&'static str>,
}

/// What a start makes of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Start {
    /// It goes on.
    GoesOn,
    /// Its configuration has changed: it starts anew.
    Changed,
    /// It is not in the checkpoint: it starts.
    New,
    /// It is no longer in the file.
    Gone,
}

/// The inbox of a source.
#[derive(Clone, Debug, Serialize)]
pub struct InboxState {
    /// `None`: no source of the file has it.
    pub source: Option<String>,
    /// Where it is.
    pub folder: PathBuf,
    /// Files.
    pub segments: usize,
    /// The oldest record that is kept.
    pub first_record: u64,
    /// What the next record will be.
    pub next_record: u64,
    /// Size of all files.
    pub bytes: u64,
    /// Records that are in no checkpoint: a start takes them in again.
    pub records_not_in_checkpoint: u64,
    /// Damaged places: a start is refused.
    pub damaged: usize,
}

/// The outbox of a sink.
#[derive(Clone, Debug, Serialize)]
pub struct OutboxState {
    /// `None`: no sink of the file has it.
    pub sink: Option<String>,
    /// Where it is.
    pub folder: PathBuf,
    /// Records, each with many rows.
    pub records: u64,
    /// Size of all files.
    pub bytes: u64,
    /// Rows that the checkpoint has and that are not delivered; `None` if they cannot be counted.
    pub rows_waiting: Option<u64>,
    /// Damaged places: a start is refused.
    pub damaged: usize,
}

/// Looks at the state of a graph.
///
/// Errors: the disk's. A folder that is missing is an empty one.
pub fn state(graph: &Graph) -> Result<State> {
    let dir = &graph.state_dir;
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    // Before the checkpoints: what is told to be in none of them is not just on its way into one.
    let inboxes = logs(&disk, &dir.join("inbox"))?;
    let mut found = read_all(dir)?;
    found.iter_mut().flat_map(|found| &mut found.checkpoint).for_each(|one| recognize(one, &graph.sources));
    // After them: then all that they name is in it.
    let outboxes = logs(&disk, &dir.join("outbox"))?;
    let taken = newest(&found);
    let number = taken.map(|checkpoint| checkpoint.number);
    Ok(State {
        folder: dir.clone(),
        running: is_locked(dir),
        checkpoints: found
            .iter()
            .map(|found| CheckpointState {
                number: found.number,
                time: found.written_us.map(format_us),
                bytes: found.bytes,
                damage: found.checkpoint.as_ref().err().cloned(),
                taken: Some(found.number) == number,
            })
            .collect(),
        nodes: nodes(graph, taken),
        inboxes: inboxes.into_iter().map(|(folder, report)| inbox(graph, folder, &report, taken)).collect(),
        outboxes: outboxes.into_iter().map(|(folder, report)| outbox(graph, &disk, folder, &report, taken)).collect(),
    })
}

/// The checkpoint that a start takes.
pub(super) fn newest(found: &[Found]) -> Option<&Checkpoint> {
    found.iter().rev().find_map(|found| found.checkpoint.as_ref().ok())
}

/// Every log in a folder of the state, with what is in it.
pub(super) fn logs(disk: &Arc<dyn Disk>, folder: &Path) -> Result<Vec<(PathBuf, log::Report)>> {
    let folders = log_folders(disk, folder)?.into_iter();
    folders.map(|folder| log::inspect(disk, &folder).map(|report| (folder, report))).collect()
}

/// The folders of the logs in a folder of the state.
pub(super) fn log_folders(disk: &Arc<dyn Disk>, folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = match disk.list(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|error| Error::outside(format!("`{}`", folder.display())).because(error))?,
    };
    Ok(entries.into_iter().filter(|entry| entry.folder).map(|entry| folder.join(entry.name)).collect())
}

/// The source whose inbox is in a folder.
pub(super) fn source_of<'a>(graph: &'a Graph, folder: &Path) -> Option<&'a str> {
    let source = graph.sources.iter().find(|source| inbox_folder(&graph.state_dir, source) == folder)?;
    Some(&source.name)
}

/// The sink whose outbox is in a folder.
pub(super) fn sink_of<'a>(graph: &'a Graph, folder: &Path) -> Option<&'a str> {
    let sink = graph.sinks.iter().find(|sink| outbox_folder(&graph.state_dir, &sink.name) == folder)?;
    Some(&sink.name)
}

/// The first record of the inbox in `folder` that a checkpoint does not have, if it knows.
pub(super) fn covered(checkpoint: Option<&Checkpoint>, folder: &Path) -> Option<u64> {
    first_not_covered(checkpoint?, folder).ok()?
}

/// What a checkpoint says of a sink's outbox.
pub(super) fn kept(checkpoint: Option<&Checkpoint>, sink: Option<&str>) -> Option<Kept> {
    let (_, state) = checkpoint?.nodes.get(&format!("sink/{}", sink?))?;
    Kept::read(state).ok()?
}

fn nodes(graph: &Graph, checkpoint: Option<&Checkpoint>) -> Vec<NodeState> {
    let mut nodes: Vec<(String, u64, Option<u64>)> = Vec::new();
    nodes.extend(graph.sources.iter().map(|source| {
        let first = covered(checkpoint, &inbox_folder(&graph.state_dir, source));
        (key_of_source(source), source.fingerprint, first)
    }));
    nodes.extend(graph.pipelines.iter().map(|pipeline| (key_of_pipeline(pipeline), pipeline.fingerprint, None)));
    let sinks = graph.sinks.iter().filter(|sink| !sink.inputs.is_empty());
    nodes.extend(sinks.map(|sink| (key_of_sink(sink), fingerprint_of_sink(sink), None)));
    let known: BTreeSet<String> = nodes.iter().map(|(key, ..)| key.clone()).collect();
    let stored = |key: &str| checkpoint.and_then(|checkpoint| checkpoint.nodes.get(key));
    let mut states: Vec<NodeState> = nodes
        .into_iter()
        .map(|(key, fingerprint, first)| {
            let state = stored(&key);
            let start = match state {
                None => Start::New,
                Some((of, _)) if *of == fingerprint => Start::GoesOn,
                Some(_) => Start::Changed,
            };
            node(key, state.map(|(_, state)| state.as_slice()), first, start)
        })
        .collect();
    for (key, (_, state)) in checkpoint.iter().flat_map(|checkpoint| &checkpoint.nodes) {
        if !known.contains(key) && !key.starts_with(INBOXES) {
            states.push(node(key.clone(), Some(state), None, Start::Gone));
        }
    }
    states
}

fn node(key: String, state: Option<&[u8]>, first_record_not_covered: Option<u64>, start: Start) -> NodeState {
    let is_source = key.starts_with("source/");
    let place = state.filter(|_| is_source).and_then(|state| IntakeTask::place(state).ok());
    let (position, _) = place.unwrap_or_default();
    NodeState {
        bytes: state.map(|state| state.len() as u64),
        position: position.map(readable),
        first_record_not_covered,
        start,
        lost: matches!(start, Start::Changed | Start::Gone).then(|| what_it_keeps(&key)),
        key,
    }
}

/// A position as text if it is one, else its first bytes and its length.
fn readable(position: &[u8]) -> String {
    match std::str::from_utf8(position) {
        Ok("") => "empty".to_owned(),
        Ok(text) if !text.contains(char::is_control) => text.to_owned(),
        _ => {
            let shown = &position[..position.len().min(SHOWN_BYTES_MAX)];
            let hex: String = shown.iter().map(|byte| format!("{byte:02x}")).collect();
            let more = if position.len() > SHOWN_BYTES_MAX { "…" } else { "" };
            format!("0x{hex}{more} ({} bytes)", position.len())
        }
    }
}

fn inbox(graph: &Graph, folder: PathBuf, report: &log::Report, checkpoint: Option<&Checkpoint>) -> InboxState {
    let source = source_of(graph, &folder);
    let from = covered(checkpoint, &folder).unwrap_or_default().max(report.first_lsn());
    InboxState {
        source: source.map(str::to_owned),
        folder,
        segments: report.segments.len(),
        first_record: report.first_lsn(),
        next_record: report.next_lsn(),
        bytes: report.bytes(),
        records_not_in_checkpoint: report.next_lsn().saturating_sub(from),
        damaged: damaged(report),
    }
}

fn outbox(
    graph: &Graph,
    disk: &Arc<dyn Disk>,
    folder: PathBuf,
    report: &log::Report,
    checkpoint: Option<&Checkpoint>,
) -> OutboxState {
    let sink = sink_of(graph, &folder);
    // Without a checkpoint, what is in it was never part of one.
    let rows = kept(checkpoint, sink).map_or(Some(0), |kept| rows_waiting(disk, &folder, report, &kept).ok());
    OutboxState {
        sink: sink.map(str::to_owned),
        records: report.next_lsn() - report.first_lsn(),
        bytes: report.bytes(),
        rows_waiting: rows,
        damaged: damaged(report),
        folder,
    }
}

fn rows_waiting(disk: &Arc<dyn Disk>, folder: &Path, report: &log::Report, kept: &Kept) -> Result<u64> {
    if damaged(report) > 0 || report.next_lsn() < kept.end {
        return Err(Error::outside("records are missing"));
    }
    let mut cursor = report.records(disk, folder);
    let mut rows = 0;
    while let Some(record) = cursor.read()? {
        rows += kept.rows_waiting(&record)?;
    }
    Ok(rows)
}

fn damaged(report: &log::Report) -> usize {
    report.damage.iter().filter(|damage| !damage.torn).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_is_text_or_hex() {
        for (position, expected) in [
            (b"1526919030474-55".as_slice(), "1526919030474-55"),
            ("größer".as_bytes(), "größer"),
            (b"", "empty"),
            (&[0, 255], "0x00ff (2 bytes)"),
            (&[7; 20], "0x07070707070707070707070707070707… (20 bytes)"),
        ] {
            assert_eq!(readable(position), expected);
        }
    }
}
