//! `pipeline state`: what is in the state folder, beside a running process or without one.

use std::fmt::Write;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use pipeline::runtime::inspect::{self, CheckpointState, InboxState, NodeState, OutboxState, Start, State};

use super::{Failure, load, print};

#[derive(Debug, Args)]
pub(super) struct StateCommand {
    /// The YAML file [default: pipelines.yaml]
    file: Option<PathBuf>,
    /// How to print it
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    Table,
    Json,
}

impl StateCommand {
    pub(super) fn run(self) -> Result<(), Failure> {
        let graph = load(self.file.as_deref())?.graph()?;
        let state = inspect::state(&graph)?;
        print(&match self.format {
            Format::Table => tables(&state),
            Format::Json => {
                let text = serde_json::to_string_pretty(&state).map_err(|error| Failure::running(error.to_string()))?;
                text + "\n"
            }
        })
    }
}

fn tables(state: &State) -> String {
    let running = if state.running { "a process runs on it" } else { "no process runs on it" };
    let mut out = format!("state folder {}: {running}\n", state.folder.display());
    let checkpoints = state.checkpoints.iter().map(checkpoint).collect();
    table(&mut out, "checkpoints", &["number", "time", "bytes", "state", ""], checkpoints);
    let nodes = state.nodes.iter().map(node).collect();
    table(&mut out, "nodes", &["key", "bytes", "position", "first record not covered", "a start"], nodes);
    let inboxes = state.inboxes.iter().map(inbox).collect();
    let columns = ["source", "segments", "first record", "next record", "bytes", "not in a checkpoint", "state"];
    table(&mut out, "inboxes", &columns, inboxes);
    let outboxes = state.outboxes.iter().map(outbox).collect();
    table(&mut out, "outboxes", &["sink", "records", "bytes", "rows waiting", "state"], outboxes);
    out
}

fn checkpoint(checkpoint: &CheckpointState) -> Vec<String> {
    vec![
        checkpoint.number.to_string(),
        checkpoint.time.clone().unwrap_or_default(),
        checkpoint.bytes.to_string(),
        checkpoint.damage.as_ref().map_or("whole".to_owned(), |damage| format!("damaged: {damage}")),
        if checkpoint.taken { "a start takes it".to_owned() } else { String::new() },
    ]
}

fn node(node: &NodeState) -> Vec<String> {
    let start = match node.start {
        Start::GoesOn => "goes on",
        Start::Changed => "starts anew: its configuration has changed",
        Start::New => "starts: it is not in the checkpoint",
        Start::Gone => "drops it: it is no longer in the file",
    };
    let lost = node.lost.map(|lost| format!("; {lost} are lost")).unwrap_or_default();
    vec![
        node.key.clone(),
        text(node.bytes),
        node.position.clone().unwrap_or_default(),
        text(node.first_record_not_covered),
        format!("{start}{lost}"),
    ]
}

fn inbox(inbox: &InboxState) -> Vec<String> {
    vec![
        inbox.source.clone().unwrap_or_else(|| format!("none: {}", inbox.folder.display())),
        inbox.segments.to_string(),
        inbox.first_record.to_string(),
        inbox.next_record.to_string(),
        inbox.bytes.to_string(),
        inbox.records_not_in_checkpoint.to_string(),
        log_state(inbox.damaged),
    ]
}

fn outbox(outbox: &OutboxState) -> Vec<String> {
    vec![
        outbox.sink.clone().unwrap_or_else(|| format!("none: {}", outbox.folder.display())),
        outbox.records.to_string(),
        outbox.bytes.to_string(),
        outbox.rows_waiting.map_or("unknown".to_owned(), |rows| rows.to_string()),
        log_state(outbox.damaged),
    ]
}

fn log_state(damaged: usize) -> String {
    if damaged == 0 { "whole".to_owned() } else { "damaged: see `pipeline doctor`".to_owned() }
}

fn text(number: Option<u64>) -> String {
    number.map(|number| number.to_string()).unwrap_or_default()
}

/// Columns side by side under a title; numbers stand on the right.
fn table(out: &mut String, title: &str, header: &[&str], rows: Vec<Vec<String>>) {
    let _ = writeln!(out, "\n{title}:{}", if rows.is_empty() { " none" } else { "" });
    if rows.is_empty() {
        return;
    }
    let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let right: Vec<bool> = (0..header.len()).map(|column| rows.iter().all(|row| is_number(&row[column]))).collect();
    let header = header.iter().map(|&name| name.to_owned()).collect();
    let lines: Vec<Vec<String>> = std::iter::once(header).chain(rows).collect();
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..right.len()).map(width).collect();
    for line in &lines {
        let mut text = String::new();
        for ((cell, width), right) in line.iter().zip(&widths).zip(&right) {
            let _ = if *right { write!(text, "  {cell:>width$}") } else { write!(text, "  {cell:<width$}") };
        }
        out.push_str(text.trim_end());
        out.push('\n');
    }
}
