//! Reads everything durable of a graph and says what is wrong with it, for `pipeline doctor`.
//!
//! | what | what is looked at |
//! | --- | --- |
//! | checkpoints | checksum, layout |
//! | inboxes, outboxes | every commit of every file; whether they fit the checkpoint that a start takes |
//! | history | footer and every row of every published and staged file; whether the checkpoint knows them; foreign names |
//!
//! [`examine`] changes nothing and works beside a running process. [`salvage`] mends damaged inboxes and outboxes.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::fresh::ASIDE;
use super::inspect::{covered, kept, logs, newest, sink_of, source_of};
use super::names::{inbox_folder, key_of_sink, outbox_folder};
use super::store::{Checkpoint, Found, Store, is_locked, is_set_aside, read_all, were_written};
use crate::disk::{Disk, Entry, RealDisk};
use crate::error::{Error, Result};
use crate::graph::{Graph, GraphSink};
use crate::history::files::{self, STAGE_FOLDER, sink_and_checkpoint};
use crate::log::{self, Durability, Mended};
use crate::plugin::StagedFile;
use crate::state::StateReader;

/// What was looked at, and what was found.
#[derive(Clone, Debug, Default)]
pub struct Examined {
    /// Whether a process runs on the state: what it is just writing is not told.
    pub running: bool,
    /// Checkpoints that were read.
    pub checkpoints: usize,
    /// Inboxes and outboxes that were read.
    pub logs: usize,
    /// Files of the history that were read, and the rows in them.
    pub files: usize,
    /// Rows in them.
    pub rows: u64,
    /// In the order of looking.
    pub findings: Vec<Finding>,
}

impl Examined {
    /// Whether anything is damaged.
    pub fn is_damaged(&self) -> bool {
        self.findings.iter().any(|finding| finding.damaged)
    }
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Whether something durable is damaged, or does not fit the rest; else it is only good to know.
    pub damaged: bool,
    /// The file or folder.
    pub path: PathBuf,
    /// The byte in it.
    pub offset: Option<u64>,
    /// What is wrong.
    pub what: String,
    /// What to do.
    pub advice: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.damaged { "damaged" } else { "note" };
        write!(f, "{kind}: `{}`", self.path.display())?;
        self.offset.map_or(Ok(()), |offset| write!(f, " at byte {offset}"))?;
        write!(f, ": {}; {}", self.what, self.advice)
    }
}

/// Reads everything durable.
///
/// Errors: a folder that cannot be listed. What cannot be read is a finding.
pub fn examine(graph: &Graph) -> Result<Examined> {
    let mut examined = Examined { running: is_locked(&graph.state_dir), ..Examined::default() };
    // Files and logs before the checkpoints: these never name less than there was.
    let listed: Vec<Listed<'_>> =
        graph.sinks.iter().filter_map(Listed::new).collect::<io::Result<_>>().map_err(unlisted)?;
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let inboxes = logs(&disk, &graph.state_dir.join("inbox"))?;
    let outboxes = logs(&disk, &graph.state_dir.join("outbox"))?;
    let found = read_all(&graph.state_dir)?;
    let taken = newest(&found);
    examined.checkpoints(&found, taken);
    for entry in list(&graph.state_dir).map_err(|error| Error::outside("the state cannot be listed").because(error))? {
        if is_set_aside(&entry.name) {
            let path = graph.state_dir.join(&entry.name);
            let what = "a checkpoint that was damaged when a run started, and went on from the one before";
            examined.note(&path, what, "no start takes it any more: remove it when nobody wants to look at it");
        }
    }
    for (folder, report) in &inboxes {
        examined.inbox(graph, folder, report, taken);
    }
    for (folder, report) in &outboxes {
        examined.outbox(graph, folder, report, taken);
    }
    examined.gone(graph, taken, &[inboxes, outboxes].concat());
    for listed in &listed {
        examined.history(listed, &found, taken);
    }
    Ok(examined)
}

fn unlisted(error: io::Error) -> Error {
    Error::outside("the history cannot be listed").because(error)
}

/// A folder of history, as it is listed.
struct Listed<'a> {
    sink: &'a GraphSink,
    root: &'a Path,
    published: Vec<PathBuf>,
    staged: Vec<PathBuf>,
    strays: Vec<PathBuf>,
}

impl<'a> Listed<'a> {
    /// Nothing if the sink writes no history.
    fn new(sink: &'a GraphSink) -> Option<io::Result<Self>> {
        let root = sink.shape.history.as_deref()?;
        Some(Self::list(sink, root))
    }

    fn list(sink: &'a GraphSink, root: &'a Path) -> io::Result<Self> {
        let mut listed = Self { sink, root, published: Vec::new(), staged: Vec::new(), strays: Vec::new() };
        for entry in list(root)? {
            let path = root.join(&entry.name);
            if entry.folder && path == files::swap_inside(root) {
                // What a merge replaced, kept for a while: nobody reads it.
                continue;
            }
            if entry.folder && entry.name == STAGE_FOLDER {
                let (files, folders): (Vec<_>, Vec<_>) = list(&path)?.into_iter().partition(|entry| !entry.folder);
                listed.staged.extend(files.iter().map(|entry| path.join(&entry.name)));
                let strays = folders.iter().filter(|entry| !entry.name.starts_with(ASIDE));
                listed.strays.extend(strays.map(|entry| path.join(&entry.name)));
            } else if entry.folder && sink.inputs.iter().any(|input| input.metric == entry.name) {
                listed.published.extend(files::list(&path)?.into_iter().map(|file| file.path));
                listed.strays.extend(files::strays(&path)?);
            } else if entry.folder {
                // Of a pipeline that was there once: part of the history, but no table of this graph.
                let files = files::list(&path)?;
                if files.is_empty() {
                    listed.strays.push(path);
                }
                listed.published.extend(files.into_iter().map(|file| file.path));
            } else {
                listed.strays.push(path);
            }
        }
        Ok(listed)
    }
}

/// What is in a folder; nothing if it is not there.
fn list(folder: &Path) -> io::Result<Vec<Entry>> {
    match RealDisk.list(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries,
    }
}

const RESTORE_OR_FRESH: &str = "put back a copy of the state folder, or start anew with `pipeline run --fresh`";

impl Examined {
    fn damaged(&mut self, path: &Path, what: impl Into<String>, advice: impl Into<String>) {
        let (path, what, advice) = (path.to_owned(), what.into(), advice.into());
        self.findings.push(Finding { damaged: true, path, offset: None, what, advice });
    }

    fn note(&mut self, path: &Path, what: impl Into<String>, advice: impl Into<String>) {
        let (path, what, advice) = (path.to_owned(), what.into(), advice.into());
        self.findings.push(Finding { damaged: false, path, offset: None, what, advice });
    }

    fn checkpoints(&mut self, found: &[Found], taken: Option<&Checkpoint>) {
        self.checkpoints = found.len();
        for Found { number, path, checkpoint, .. } in found {
            let Err(error) = checkpoint else { continue };
            let advice = match taken {
                None => format!("no checkpoint is whole, so a start is refused: {RESTORE_OR_FRESH}"),
                Some(taken) if taken.number > *number => {
                    format!("no start needs it: it goes by itself, a start takes checkpoint {}", taken.number)
                }
                Some(taken) => format!(
                    "a start goes back to checkpoint {} and takes in again what came since: put back a copy of the file, or \
                     accept that sinks may get rows again",
                    taken.number
                ),
            };
            self.damaged(path, format!("the checkpoint cannot be read: {error}"), advice);
        }
    }

    /// What the checkpoint that a start takes knows of, and is not there at all.
    fn gone(&mut self, graph: &Graph, taken: Option<&Checkpoint>, logs: &[(PathBuf, log::Report)]) {
        let dir = &graph.state_dir;
        if taken.is_none() && self.checkpoints == 0 && were_written(dir) {
            let what = "the checkpoints that were here are gone";
            self.damaged(dir, what, format!("a start is refused: {RESTORE_OR_FRESH}"));
        }
        let is_there = |folder: &Path| logs.iter().any(|(path, report)| path == folder && !report.segments.is_empty());
        for source in &graph.sources {
            let folder = inbox_folder(dir, source);
            if let Some(from) = covered(taken, &folder).filter(|from| *from > 0 && !is_there(&folder)) {
                self.damaged(
                    &folder,
                    format!("this inbox is gone; the checkpoint has its records up to {from}"),
                    "later ones are lost, and so is the memory of what was received: what comes again may count twice. Put back a \
                     copy of the folder",
                );
            }
        }
        for sink in &graph.sinks {
            let folder = outbox_folder(dir, &sink.name);
            let needed = kept(taken, Some(&sink.name)).is_some_and(|kept| kept.needed() < kept.end);
            if needed && !is_there(&folder) {
                let what =
                    "this outbox is gone, and with it rows that waited for delivery when the checkpoint was written";
                self.damaged(&folder, what, "put back a copy of the folder; a start goes on without them");
            }
        }
    }

    /// What is wrong with a log by itself. Whether it can be told what is in it.
    fn log(&mut self, folder: &Path, report: &log::Report) -> bool {
        self.logs += 1;
        for damage in &report.damage {
            if damage.torn && self.running {
                // A commit under way.
                continue;
            }
            let advice = match damage.torn {
                true => {
                    "what a crash left of a commit that never came back, of which nobody was told: the next start cuts it off. If \
                     there was no crash, the disk has damaged it: put back a copy of the folder"
                }
                false => {
                    "records that were safe cannot be read and a start is refused: put back a copy of the folder, or \
                     `pipeline doctor --salvage` keeps what can be read"
                }
            };
            self.findings.push(Finding {
                damaged: !damage.torn,
                path: damage.path.clone(),
                offset: Some(damage.offset),
                what: damage.what.clone(),
                advice: advice.to_owned(),
            });
        }
        for entry in list(folder).unwrap_or_default() {
            let path = folder.join(&entry.name);
            if entry.name.contains(".damaged") {
                self.note(&path, "a file as it was before it was mended", "remove it when nobody wants to look at it");
            } else if !report.segments.iter().any(|s| s.path == path)
                && !entry.name.ends_with(".draft")
                && !self.running
            {
                self.note(&path, "no part of the log", "move it away");
            }
        }
        report.damage.iter().all(|damage| damage.torn)
    }

    fn inbox(&mut self, graph: &Graph, folder: &Path, report: &log::Report, taken: Option<&Checkpoint>) {
        let source = source_of(graph, folder);
        let sound = self.log(folder, report);
        let (first, next) = (report.first_lsn(), report.next_lsn());
        let from = covered(taken, folder);
        if source.is_none() {
            let (count, rest) = (next - first, next.saturating_sub(from.unwrap_or(0).max(first)));
            return self.note(
                folder,
                format!(
                    "no source of the file has this inbox; {count} records are in it, {rest} of them in no checkpoint"
                ),
                "its source goes on with these if it comes back; if it does not, remove it",
            );
        }
        match from {
            None if taken.is_none() && first > 0 => self.damaged(
                folder,
                format!("it begins with record {first}, but there is no checkpoint that has those before"),
                format!("a start is refused: {RESTORE_OR_FRESH}"),
            ),
            Some(from) if from < first => self.damaged(
                folder,
                format!("it begins with record {first}, but the checkpoint goes on from {from}: records are missing"),
                format!("a start is refused: {RESTORE_OR_FRESH}"),
            ),
            // A power loss may take back what only the operating system had.
            Some(from) if from > next && sound && !self.running && graph.durability == Durability::Power => self.damaged(
                folder,
                format!("it ends before record {next}, but the checkpoint has records up to {from}"),
                "none of these is lost, and a start goes on; but the disk has lost what it had called safe: check it",
            ),
            _ => {}
        }
    }

    fn outbox(&mut self, graph: &Graph, folder: &Path, report: &log::Report, taken: Option<&Checkpoint>) {
        let sound = self.log(folder, report);
        let Some(sink) = sink_of(graph, folder) else {
            return self.note(
                folder,
                "no sink of the file has this outbox",
                "remove it if its sink does not come back",
            );
        };
        let Some(kept) = kept(taken, Some(sink)) else { return };
        let (first, next) = (report.first_lsn(), report.next_lsn());
        if (kept.needed() < kept.end && kept.needed() < first) || (kept.end > next && sound && !self.running) {
            self.damaged(
                folder,
                format!(
                    "it has the records from {first} to {next}, but rows of those from {} to {} wait for delivery: they are gone",
                    kept.needed(),
                    kept.end
                ),
                "put back a copy of the state folder; a start goes on without these rows",
            );
        }
    }

    fn history(&mut self, listed: &Listed<'_>, found: &[Found], taken: Option<&Checkpoint>) {
        for path in &listed.published {
            self.file(path, "readers of this table fail: move the file away, or put back a copy");
            let name = path.file_name().and_then(|name| name.to_str()).and_then(sink_and_checkpoint);
            if let (Some((sink, number)), Some(taken)) = (name, taken)
                && sink == listed.sink.name
                && number > taken.number
            {
                self.damaged(
                    path,
                    format!("of checkpoint {number}, which is newer than the one a start goes on from, {}", taken.number),
                    "a start writes its rows again: move the file away before it, or put back a copy of the state folder",
                );
            }
        }
        for path in &listed.strays {
            self.note(path, "no file of the history has such a name", "queries pass over it: move it away");
        }
        self.staged(listed, found, taken);
    }

    fn staged(&mut self, listed: &Listed<'_>, found: &[Found], taken: Option<&Checkpoint>) {
        let checkpoints = || found.iter().filter_map(|found| found.checkpoint.as_ref().ok());
        let named: BTreeSet<String> =
            checkpoints().flat_map(|of| named_files(listed.sink, of)).map(|f| f.staged).collect();
        for path in &listed.staged {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if named.contains(name) {
                self.file(path, "a start publishes it all the same, and readers of its table fail: put back a copy");
            } else if !self.running {
                self.note(
                    path,
                    "a staged file that no checkpoint names",
                    "its rows come again: the next start removes it",
                );
            }
        }
        let stage = listed.root.join(STAGE_FOLDER);
        for file in taken.iter().flat_map(|taken| named_files(listed.sink, taken)) {
            let (from, to) = (stage.join(&file.staged), listed.root.join(&file.published));
            if !from.exists() && !to.exists() {
                self.damaged(
                    &from,
                    format!("the checkpoint names this staged file, but neither it nor `{}` is there", to.display()),
                    format!("a start is refused: put back a copy of the history; or {RESTORE_OR_FRESH}"),
                );
            }
        }
    }

    /// Reads a Parquet file. One that has gone since it was listed was published or removed by the process that runs.
    fn file(&mut self, path: &Path, advice: &str) {
        // A damaged length may make the reader panic.
        let read = catch_unwind(AssertUnwindSafe(|| files::read_whole(path)));
        self.files += 1;
        match read {
            Ok(Ok(rows)) => self.rows += rows,
            Ok(Err(_)) if !path.exists() => self.files -= 1,
            Ok(Err(error)) => self.damaged(path, error.to_string(), advice),
            Err(_) => self.damaged(path, "cannot be read: the reader gave up", advice),
        }
    }
}

/// The staged files that a checkpoint names.
fn named_files(sink: &GraphSink, checkpoint: &Checkpoint) -> Vec<StagedFile> {
    let Some((_, state)) = checkpoint.nodes.get(&key_of_sink(sink)) else { return Vec::new() };
    sink.config.staged(&mut StateReader::new(state)).unwrap_or_default()
}

/// A file of an inbox or outbox that was mended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Salvaged {
    /// What was done.
    pub mended: Mended,
    /// Of the lost records, those that the checkpoint does not have (of an inbox) or that wait for delivery (of an outbox):
    /// their rows are lost for good.
    pub lost_for_good: u64,
}

impl fmt::Display for Salvaged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Mended { path, aside, lost, lost_bytes, kept, head_lost, end_lost } = &self.mended;
        let records: u64 = lost.iter().map(|range| range.end - range.start).sum();
        let place = |range: &Range<u64>| match range.end - range.start {
            1 => range.start.to_string(),
            _ => format!("{} to {}", range.start, range.end - 1),
        };
        let places: Vec<String> = lost.iter().map(place).collect();
        let places = if places.is_empty() { String::new() } else { format!(" (numbers {})", places.join(", ")) };
        let more = if *end_lost { ", and those at its end, which cannot be counted," } else { "" };
        write!(
            f,
            "mended: `{}`: records set aside: {records}{places}{more} with {lost_bytes} bytes; of these {} are lost for good, \
             the others are not needed any more; records kept: {kept}; `{}` is the file as it was",
            path.display(),
            self.lost_for_good,
            aside.display()
        )?;
        if *head_lost {
            f.write_str("; the memory of what was received before is lost: what is sent again may count twice")?;
        }
        Ok(())
    }
}

/// Mends every damaged inbox and outbox, so that a start works again: see [`log::salvage`]. Checkpoints and history are left
/// as they are.
///
/// Errors: a process runs on the state; the disk's; a log that cannot be mended.
pub fn salvage(graph: &Graph) -> Result<Vec<Salvaged>> {
    let dir = &graph.state_dir;
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    if is_locked(dir) {
        let what = format!("a process runs on the state folder `{}`: stop it before anything is mended", dir.display());
        return Err(Error::outside(what).fatal());
    }
    let _lock = Store::open(dir)?;
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    let found = read_all(dir)?;
    let taken = newest(&found);
    let mut salvaged = Vec::new();
    for (folder, _) in logs(&disk, &dir.join("inbox"))? {
        let from = covered(taken, &folder).unwrap_or_default();
        salvaged.extend(log::salvage(&disk, &folder)?.into_iter().map(|mended| Salvaged::new(mended, from..u64::MAX)));
    }
    for (folder, _) in logs(&disk, &dir.join("outbox"))? {
        let needed = kept(taken, sink_of(graph, &folder)).map_or(0..0, |kept| kept.needed()..kept.end);
        salvaged.extend(log::salvage(&disk, &folder)?.into_iter().map(|mended| Salvaged::new(mended, needed.clone())));
    }
    Ok(salvaged)
}

impl Salvaged {
    fn new(mended: Mended, needed: Range<u64>) -> Self {
        let common = |lost: &Range<u64>| lost.end.min(needed.end).saturating_sub(lost.start.max(needed.start));
        Self { lost_for_good: mended.lost.iter().map(common).sum(), mended }
    }
}
