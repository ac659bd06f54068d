//! A start without the state: what is there is moved aside, and never passed over in silence.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::store::{is_of_checkpoints, read_all, were_written};
use crate::disk::{Disk, Entry, RealDisk};
use crate::error::{Error, Result};
use crate::graph::GraphSink;
use crate::history::files::STAGE_FOLDER;
use crate::log;
use crate::time::{format_us, now_us};

/// Beginning of the name of a folder with what was moved aside.
pub(crate) const ASIDE: &str = "fresh-";
/// Its end until everything is in it.
const UNFINISHED: &str = ".unfinished";
/// Folders of the state that go with the checkpoints.
const LOGS: [&str; 2] = ["inbox", "outbox"];

/// Refuses a start that would lose state without a word: one without a checkpoint although there were some, and one in
/// the middle of [`set_aside`]. `inboxes` are the folders of those that the start takes up.
pub(crate) fn check_start(dir: &Path, restored: bool, inboxes: impl Iterator<Item = PathBuf>) -> Result<()> {
    let way_out = "`pipeline run --fresh` moves the state aside and starts anew";
    if let Some(folder) = unfinished(dir)? {
        let what = "holds a part of the state: moving it aside was begun and not finished";
        return Err(Error::outside(format!("`{}` {what}; {way_out}", folder.display())).fatal());
    }
    if restored {
        return Ok(());
    }
    let damaged: Vec<String> = read_all(dir)?
        .into_iter()
        .filter_map(|found| Some(format!("`{}`: {}", found.path.display(), found.checkpoint.err()?)))
        .collect();
    if !damaged.is_empty() {
        return Err(Error::outside(format!(
            "no checkpoint can be read ({}). Starting anew would lose positions, open windows and rows that wait, so nothing \
             is started. `pipeline doctor` shows what is damaged; put back a copy of the state folder `{}`, or {way_out}",
            damaged.join("; "),
            dir.display()
        ))
        .fatal());
    }
    if were_written(dir) {
        return Err(Error::outside(format!(
            "the checkpoints in `{}` are gone: a start without them would take rows in again that the history has. Put back a \
             copy of the folder, or {way_out}",
            dir.display()
        ))
        .fatal());
    }
    let disk: Arc<dyn Disk> = Arc::new(RealDisk);
    for folder in inboxes {
        let first = log::inspect(&disk, &folder)?.first_lsn();
        if first > 0 {
            return Err(Error::outside(format!(
                "there is no checkpoint, but the inbox `{}` begins with record {first}: those before were in checkpoints, \
                 which are gone. Put back a copy of the state folder `{}`, or {way_out}",
                folder.display(),
                dir.display()
            ))
            .fatal());
        }
    }
    Ok(())
}

/// Moves the checkpoints, the inboxes and outboxes, and the staged files of the history aside, and says where to; nothing
/// if there are none. Ended in the middle, it goes on when it is called again. The caller holds the lock.
pub(crate) fn set_aside(dir: &Path, sinks: &[GraphSink]) -> Result<Option<PathBuf>> {
    let found = match unfinished(dir)? {
        None if !holds_state(dir).map_err(|error| failed(dir, error))? => return Ok(None),
        None => new_name(dir).map_err(|error| failed(dir, error))? + UNFINISHED,
        Some(folder) => name_of(&folder).to_owned(),
    };
    let (unfinished, name) = (dir.join(&found), found.trim_end_matches(UNFINISHED));
    let move_all = || {
        RealDisk.create_folder(&unfinished)?;
        for history in sinks.iter().filter_map(|sink| sink.shape.history.as_ref()) {
            // They stay in their folder: a rename does not reach another file system.
            let stage = history.join(STAGE_FOLDER);
            move_some(&stage, &stage.join(name), |entry| !entry.folder)?;
        }
        move_some(dir, &unfinished, |entry| entry.folder && LOGS.contains(&entry.name.as_str()))?;
        move_some(dir, &unfinished, |entry| !entry.folder && is_of_checkpoints(&entry.name))?;
        RealDisk.rename(&unfinished, &dir.join(name))?;
        RealDisk.sync_folder(dir)
    };
    move_all().map_err(|error| failed(dir, error))?;
    Ok(Some(dir.join(name)))
}

/// Moves what is chosen to the folder `to`, durably.
fn move_some(from: &Path, to: &Path, chosen: impl Fn(&Entry) -> bool) -> io::Result<()> {
    let chosen: Vec<Entry> = list(from)?.into_iter().filter(chosen).collect();
    if chosen.is_empty() {
        return Ok(());
    }
    RealDisk.create_folder(to)?;
    for Entry { name, .. } in &chosen {
        RealDisk.rename(&from.join(name), &to.join(name))?;
    }
    RealDisk.sync_folder(to)?;
    RealDisk.sync_folder(from)
}

/// The folder of a move that was begun and not finished.
fn unfinished(dir: &Path) -> Result<Option<PathBuf>> {
    let entries = list(dir).map_err(|error| failed(dir, error))?;
    let found = entries.iter().find(|e| e.folder && e.name.starts_with(ASIDE) && e.name.ends_with(UNFINISHED));
    Ok(found.map(|entry| dir.join(&entry.name)))
}

/// Whether there is anything that a start would take up.
fn holds_state(dir: &Path) -> io::Result<bool> {
    for Entry { name, folder, .. } in list(dir)? {
        let logs = folder && LOGS.contains(&name.as_str());
        if (!folder && is_of_checkpoints(&name)) || (logs && !list(&dir.join(&name))?.is_empty()) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// `fresh-` and the time, with a number if that is taken. Without colons, which some file systems refuse.
fn new_name(dir: &Path) -> io::Result<String> {
    let second = now_us().div_euclid(1_000_000) * 1_000_000;
    let name = format!("{ASIDE}{}", format_us(second).replace(".000", "").replace(':', "-"));
    for number in 1u32.. {
        let name = if number == 1 { name.clone() } else { format!("{name}-{number}") };
        if !RealDisk.exists(&dir.join(&name))? {
            return Ok(name);
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

fn name_of(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// What is in a folder; nothing if it is not there.
fn list(folder: &Path) -> io::Result<Vec<Entry>> {
    match RealDisk.list(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries,
    }
}

fn failed(dir: &Path, error: io::Error) -> Error {
    Error::outside(format!("state folder `{}`", dir.display())).because(error).fatal()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::log::{Log, LogOptions};
    use crate::runtime::store::{Checkpoint, Store};

    fn none() -> std::iter::Empty<PathBuf> {
        std::iter::empty()
    }

    fn names(dir: &Path) -> Vec<String> {
        list(dir).expect("a listing").into_iter().map(|entry| entry.name).collect()
    }

    #[test]
    fn the_state_is_moved_aside_and_nothing_else() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path();
        assert_eq!(set_aside(&dir.join("none"), &[]).expect("nothing there"), None);
        fs::write(dir.join("lock"), "").expect("a file");
        fs::write(dir.join("mqtt-devices.id"), "7").expect("a file");
        fs::create_dir(dir.join("inbox")).expect("a folder");
        assert_eq!(set_aside(dir, &[]).expect("an empty one"), None);
        for round in 0..2 {
            fs::create_dir_all(dir.join("inbox/readings.http")).expect("a folder");
            fs::create_dir_all(dir.join("outbox/db")).expect("a folder");
            fs::write(dir.join("00000000000000000001.checkpoint"), "x").expect("a file");
            let aside = set_aside(dir, &[]).expect("moved").expect("a folder");
            assert_eq!(names(&aside), ["00000000000000000001.checkpoint", "inbox", "outbox"], "round {round}");
            let mut left = names(dir);
            left.retain(|name| !name.starts_with(ASIDE));
            assert_eq!(left, ["lock", "mqtt-devices.id"]);
        }
        assert_eq!(names(dir).len(), 4, "each has a folder of its own");
    }

    #[test]
    fn a_move_that_was_not_finished_stops_a_start_and_is_finished() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path();
        fs::create_dir_all(dir.join("fresh-x.unfinished/inbox")).expect("a folder");
        fs::write(dir.join("00000000000000000001.checkpoint"), "x").expect("a file");
        let error = check_start(dir, true, none()).expect_err("refused").to_string();
        assert!(error.contains("fresh-x.unfinished") && error.contains("--fresh"), "{error}");
        assert_eq!(set_aside(dir, &[]).expect("moved"), Some(dir.join("fresh-x")));
        assert_eq!(names(&dir.join("fresh-x")), ["00000000000000000001.checkpoint", "inbox"]);
        check_start(dir, false, none()).expect("a new start");
    }

    #[test]
    fn a_start_is_refused_when_no_checkpoint_can_be_read() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path();
        check_start(dir, false, none()).expect("the first start");
        let path = dir.join("00000000000000000001.checkpoint");
        fs::write(&path, "x").expect("a file");
        let error = check_start(dir, false, none()).expect_err("refused").to_string();
        for part in [&path.display().to_string(), "pipeline doctor", "pipeline run --fresh"] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_start_is_refused_when_all_checkpoints_are_gone_that_there_were() {
        let folder = tempfile::tempdir().expect("a folder");
        let dir = folder.path();
        let mut store = Store::open(dir).expect("a store");
        store.write(&Checkpoint { number: 1, nodes: [].into() }).expect("written");
        fs::remove_file(dir.join("00000000000000000001.checkpoint")).expect("removed");
        let error = check_start(dir, false, none()).expect_err("refused").to_string();
        assert!(error.contains("are gone") && error.contains("--fresh"), "{error}");
        set_aside(dir, &[]).expect("moved");
        check_start(dir, false, none()).expect("a new start");
        store.write(&Checkpoint { number: 2, nodes: [].into() }).expect("written");
        store.clear().expect("cleared");
        check_start(dir, false, none()).expect("a graph that has run to its end");
    }

    #[test]
    fn a_start_is_refused_when_the_checkpoints_of_an_inbox_are_gone() {
        let folder = tempfile::tempdir().expect("a folder");
        let inbox = folder.path().join("inbox/readings.http");
        let disk: Arc<dyn Disk> = Arc::new(RealDisk);
        let (mut log, _) = Log::open(disk, &inbox, LogOptions::default()).expect("a log");
        let start = || check_start(folder.path(), false, std::iter::once(inbox.clone()));
        start().expect("all of its records are there: a crash before the first checkpoint");
        log.skip_to(5).expect("later ones");
        let error = start().expect_err("refused").to_string();
        assert!(error.contains("inbox/readings.http` begins with record 5") && error.contains("--fresh"), "{error}");
        check_start(folder.path(), true, std::iter::once(inbox.clone())).expect("a start from a checkpoint");
    }
}
