//! Looks after the published files of closed hours: merges small ones, and removes hours that are too old.
//!
//! An hour is merged by building it anew beside the tables, in [`SWAP_FOLDER`], and then exchanging the two folders in one
//! instant. A reader finds the old files, or the new ones, or, when it opens a file that it had listed before, no file:
//! an error. The old files stay for a while where the new ones were built, so that whoever was listing them sees all or none,
//! and our own queries go on with them. Whatever lies there when the process starts is of no use any more: the tables
//! were whole at every instant.

use std::collections::VecDeque;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pipeline::error::{Error, Result};
use pipeline::history::files::{self, HourFolder, SWAP_FOLDER};
use pipeline::plugin::{Upkeep, Upkept};
use tracing::{debug, warn};

use super::file::{self, failed};
use super::ledger::Ledger;
use super::merge::{self, Source};
use super::names::FileName;

/// Size that merged files come near to: few enough to list, and large enough to read at full speed.
const TARGET_BYTES: u64 = 128 << 20;

/// How long files that were replaced or expired are kept: longer than a listing of a folder, and than the longest query.
const GRACE: Duration = Duration::from_secs(60);

/// How long merging waits for room on the disk before it looks again.
const ROOM_AFTER_US: i64 = 60_000_000;

const HOUR_US: i64 = 3_600_000_000;

/// What the sink and its upkeep both know.
#[derive(Debug, Default)]
pub(super) struct Shared {
    ledger: Mutex<Ledger>,
    /// Published files.
    pub(super) files: AtomicU64,
}

impl Shared {
    pub(super) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// So many files are no longer published.
    pub(super) fn fewer(&self, files: u64) {
        // A file that somebody put there by hand was never counted.
        let _ = self.files.fetch_update(Relaxed, Relaxed, |count| Some(count.saturating_sub(files)));
    }
}

/// The running upkeep of one sink.
pub(super) struct HistoryUpkeep {
    pub(super) sink: String,
    pub(super) root: PathBuf,
    /// Pipelines whose tables are looked after.
    pub(super) metrics: Vec<String>,
    /// Age at which an hour is removed.
    pub(super) keep_us: Option<i64>,
    pub(super) target_bytes: u64,
    pub(super) grace: Duration,
    pub(super) shared: Arc<Shared>,
    pub(super) work: Mutex<Work>,
    /// Called between any two things that a crash may come between.
    #[cfg(test)]
    pub(super) crash_point: Box<dyn Fn() + Send + Sync>,
}

/// What is to do, and what was begun.
#[derive(Debug, Default)]
pub(super) struct Work {
    /// The hour of the clock in which the tables were listed. They are listed once an hour: what closes meanwhile is in
    /// the next list.
    listed: Option<i64>,
    /// Closed hours not looked at yet in this round.
    todo: VecDeque<(String, HourFolder)>,
    /// Those that must be looked at again in the next round: not settled yet, without room, failed.
    later: Vec<(String, HourFolder)>,
    /// The first failure of this round.
    failed: Option<Error>,
    /// Folders in [`SWAP_FOLDER`] that wait to be removed, by the name they had in the tables.
    retired: Vec<(PathBuf, Instant)>,
    /// No merging before this, for want of room.
    room_after_us: i64,
    /// Folders cannot be exchanged here.
    off: bool,
}

/// What became of an hour.
enum Seen {
    /// Nothing is to do.
    Fine,
    /// Not now.
    Later,
    /// So many files were merged into so many.
    Merged(u64, u64),
    /// It was removed.
    Expired,
}

impl Upkeep for HistoryUpkeep {
    fn step(&self, now_us: i64) -> Result<Upkept> {
        let mut work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        self.discard(&mut work)?;
        if work.listed != Some(now_us.div_euclid(HOUR_US)) {
            self.list(&mut work, now_us)?;
        }
        while let Some((metric, hour)) = work.todo.pop_front() {
            let seen = match self.look_at(&metric, &hour, now_us, &mut work) {
                Ok(seen) => seen,
                Err(error) => {
                    if file::is_full(&error) {
                        debug!(sink = %self.sink, "merging waits for room on the disk: {error}");
                        work.room_after_us = now_us.saturating_add(ROOM_AFTER_US);
                    } else {
                        work.failed.get_or_insert(error);
                    }
                    Seen::Later
                }
            };
            let files = |done| Upkept { more: true, files: self.shared.files.load(Relaxed), ..done };
            match seen {
                Seen::Fine => {}
                Seen::Later => work.later.push((metric, hour)),
                Seen::Merged(from, into) => {
                    debug!(sink = %self.sink, "merged {from} files of {} into {into}", hour.path.display());
                    return Ok(files(Upkept { merged_files: from, merged_hours: 1, ..Upkept::default() }));
                }
                Seen::Expired => return Ok(files(Upkept { expired_hours: 1, ..Upkept::default() })),
            }
        }
        work.todo = std::mem::take(&mut work.later).into();
        match work.failed.take() {
            Some(error) => Err(error),
            None => Ok(Upkept { files: self.shared.files.load(Relaxed), ..Upkept::default() }),
        }
    }
}

impl HistoryUpkeep {
    pub(super) fn new(
        sink: String,
        root: PathBuf,
        metrics: Vec<String>,
        keep_us: Option<i64>,
        shared: Arc<Shared>,
    ) -> Self {
        Self {
            sink,
            root,
            metrics,
            keep_us,
            target_bytes: TARGET_BYTES,
            grace: GRACE,
            shared,
            work: Mutex::default(),
            #[cfg(test)]
            crash_point: Box::new(|| {}),
        }
    }

    fn point(&self) {
        #[cfg(test)]
        (self.crash_point)();
    }

    /// Begins a round over all closed hours, oldest first.
    fn list(&self, work: &mut Work, now_us: i64) -> Result<()> {
        let mut todo = Vec::new();
        for metric in &self.metrics {
            let table = self.root.join(metric);
            let hours = files::hours(&table).map_err(failed("list", &table))?;
            let closed = hours.into_iter().filter(|hour| hour.end_us() <= now_us);
            todo.extend(closed.map(|hour| (metric.clone(), hour)));
        }
        todo.sort_by_key(|(_, hour)| hour.end_us());
        (work.todo, work.later) = (todo.into(), Vec::new());
        work.listed = Some(now_us.div_euclid(HOUR_US));
        Ok(())
    }

    fn look_at(&self, metric: &str, hour: &HourFolder, now_us: i64, work: &mut Work) -> Result<Seen> {
        if work.retired.iter().any(|(path, _)| *path == hour.path) {
            return Ok(Seen::Later);
        }
        if self.keep_us.is_some_and(|keep_us| now_us.saturating_sub(keep_us) >= hour.end_us()) {
            return self.expire(hour, work);
        }
        if work.off {
            return Ok(Seen::Fine);
        }
        if now_us < work.room_after_us {
            return Ok(Seen::Later);
        }
        let Some(sources) = self.sources(&hour.path)? else { return Ok(Seen::Fine) };
        let bytes = sources.iter().map(|source| source.bytes).sum();
        if !merge::is_worthwhile(sources.len(), bytes, self.target_bytes) {
            return Ok(Seen::Fine);
        }
        if !self.is_settled(&hour.path, &sources, &self.shared.ledger()) {
            return Ok(Seen::Later);
        }
        // The sink and the rest of the machine need room too.
        if bytes > file::room(&self.root).map_err(failed("look at", &self.root))? / 2 {
            debug!(sink = %self.sink, "merging {} waits for room on the disk", hour.path.display());
            work.room_after_us = now_us.saturating_add(ROOM_AFTER_US);
            return Ok(Seen::Later);
        }
        self.merge(metric, hour, &sources, work)
    }

    /// The files of an hour in the order of their rows; `None` if there is anything else, which is left alone.
    fn sources(&self, hour: &Path) -> Result<Option<Vec<Source>>> {
        let mut sources = Vec::new();
        let entries = match fs::read_dir(hour) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            entries => entries.map_err(failed("list", hour))?,
        };
        for entry in entries {
            let path = entry.map_err(failed("list", hour))?.path();
            let Some(name) = FileName::read(&self.sink, &path) else { return Ok(None) };
            let bytes = fs::metadata(&path).map_err(failed("look at", &path))?.len();
            sources.push(Source { path, name, bytes });
        }
        sources.sort_unstable_by_key(|source| source.name);
        Ok(Some(sources))
    }

    fn is_settled(&self, hour: &Path, sources: &[Source], ledger: &Ledger) -> bool {
        let within = hour.strip_prefix(&self.root).unwrap_or(hour);
        ledger.is_settled(within, sources.iter().map(|source| source.name))
    }

    /// Builds the hour anew and exchanges the two.
    fn merge(&self, metric: &str, hour: &HourFolder, sources: &[Source], work: &mut Work) -> Result<Seen> {
        let built = self.swap_path(&hour.path)?;
        file::remove_folder(&built)?;
        file::create_folder(&built)?;
        self.point();
        let made = merge::merge(sources, &built, &self.sink, metric, self.target_bytes, &mut || self.point());
        let swapped = made.and_then(|names| {
            self.point();
            file::sync_folder(&built)?;
            self.point();
            Ok((self.swap(hour, sources, &built, &names, work)?, names.len()))
        });
        let into = match swapped {
            Ok((true, into)) => into as u64,
            result => {
                // It would be removed at the next start anyway; until then it only takes room.
                file::remove_folder(&built)?;
                result?;
                return Ok(if work.off { Seen::Fine } else { Seen::Later });
            }
        };
        let from = sources.len() as u64;
        self.shared.fewer(from - into);
        self.point();
        sync_parents(&hour.path, &built)?;
        self.point();
        Ok(Seen::Merged(from, into))
    }

    /// Exchanges the hour for the one built from `sources`, if it has just these files still and they are settled. The
    /// sink can name no file for publishing meanwhile.
    fn swap(
        &self,
        hour: &HourFolder,
        sources: &[Source],
        built: &Path,
        names: &[String],
        work: &mut Work,
    ) -> Result<bool> {
        let ledger = self.shared.ledger();
        let unchanged = self.sources(&hour.path)?.is_some_and(|found| {
            found.len() == sources.len() && found.iter().zip(sources).all(|(found, source)| found.name == source.name)
        });
        let complete = names.iter().all(|name| built.join(name).is_file());
        if !unchanged || !complete || !self.is_settled(&hour.path, sources, &ledger) {
            return Ok(false);
        }
        if file::exchange(built, &hour.path).map_err(failed("exchange", &hour.path))? {
            work.retired.push((hour.path.clone(), Instant::now()));
            return Ok(true);
        }
        work.off = true;
        warn!(
            sink = %self.sink,
            "files of history are not merged: the file system of {} cannot exchange two folders", self.root.display()
        );
        Ok(false)
    }

    /// Takes an hour out of its table; it is removed when its time in [`SWAP_FOLDER`] is over.
    fn expire(&self, hour: &HourFolder, work: &mut Work) -> Result<Seen> {
        let retired = self.swap_path(&hour.path)?;
        file::remove_folder(&retired)?;
        file::create_folder(retired.parent().unwrap_or(&self.root))?;
        self.point();
        let ledger = self.shared.ledger();
        let files = hour.files().map_err(failed("list", &hour.path))?;
        let ours = files.iter().filter_map(|file| FileName::read(&self.sink, &file.path));
        if !ledger.is_settled(hour.path.strip_prefix(&self.root).unwrap_or(&hour.path), ours) {
            return Ok(Seen::Later);
        }
        match fs::rename(&hour.path, &retired) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Seen::Fine),
            result => result.map_err(failed("move", &hour.path))?,
        }
        work.retired.push((hour.path.clone(), Instant::now()));
        self.shared.fewer(files.len() as u64);
        self.point();
        // The day goes with its last hour.
        if let Some(day) = hour.path.parent() {
            let _ = fs::remove_dir(day);
        }
        drop(ledger);
        self.point();
        Ok(Seen::Expired)
    }

    /// Removes what has been out of the tables for long enough.
    fn discard(&self, work: &mut Work) -> Result<()> {
        while let Some(position) = work.retired.iter().position(|(_, since)| since.elapsed() >= self.grace) {
            let path = work.retired[position].0.clone();
            let retired = self.swap_path(&path)?;
            // What takes its place must be durable first.
            sync_parents(&path, &retired)?;
            self.point();
            file::remove_folder(&retired)?;
            work.retired.remove(position);
            self.point();
        }
        Ok(())
    }

    fn swap_path(&self, hour: &Path) -> Result<PathBuf> {
        files::swapped(&self.root, hour).ok_or_else(|| Error::internal("an hour outside its folder"))
    }
}

/// Removes what an earlier process has left in [`SWAP_FOLDER`] of these tables.
pub(super) fn clean(root: &Path, metrics: &[String]) -> Result<()> {
    for metric in metrics {
        let left = root.join(SWAP_FOLDER).join(metric);
        for hour in files::hours(&left).map_err(failed("list", &left))? {
            // Whether it was exchanged or not: what lies in the table now must outlive what is removed here.
            let table = hour.path.strip_prefix(root.join(SWAP_FOLDER)).map(|within| root.join(within));
            sync_parents(&table.unwrap_or_else(|_| root.to_owned()), &hour.path)?;
        }
        file::remove_folder(&left)?;
    }
    Ok(())
}

/// Makes an exchange or a rename durable: the names in both parent folders, or in what is left of them.
fn sync_parents(one: &Path, other: &Path) -> Result<()> {
    for path in [one, other] {
        let there = path.ancestors().skip(1).find(|folder| folder.is_dir());
        there.map_or(Ok(()), file::sync_folder)?;
    }
    Ok(())
}
