//! Going on from a checkpoint that is not the newest: what later ones had published is taken out of the tables.

use std::fs;
use std::path::{Path, PathBuf};

use pipeline::error::{Error, Result};
use pipeline::history::files::{self, HistoryFile};
use tracing::warn;

use super::file::{self, failed};
use super::ledger::Ledger;
use super::names::FileName;

/// Folder beside the tables with files that were taken back. Nothing removes them: their rows come again, unless a source
/// has forgotten them.
pub(super) const ASIDE_FOLDER: &str = ".aside";

/// Put after the name of a file that was taken back: no reader of Parquet takes it for a part of the history.
const SUFFIX: &str = ".aside";

/// Most names in the warning.
const NAMED_MAX: usize = 20;

/// The highest checkpoint number of the files of `sink` in these tables.
pub(super) fn highest_number(root: &Path, sink: &str, metrics: &[String]) -> Result<u64> {
    let mut highest = 0;
    for metric in metrics {
        for file in list(&root.join(metric))? {
            highest = highest.max(FileName::read(sink, &file.path).map_or(0, |name| name.last));
        }
    }
    Ok(highest)
}

/// Moves files of `sink` that checkpoints after the restored one have published to [`ASIDE_FOLDER`]. Returns how many.
pub(super) fn take_back(root: &Path, sink: &str, metrics: &[String], ledger: &Ledger) -> Result<usize> {
    let mut newer = Vec::new();
    for metric in metrics {
        for file in list(&root.join(metric))? {
            let Some(name) = FileName::read(sink, &file.path).filter(|name| ledger.is_newer(name.last)) else {
                continue;
            };
            if !ledger.is_newer(name.first) {
                return Err(Error::outside(format!(
                    "{} has rows from before and from after the checkpoint that this start goes on from; the later ones \
                     would come again: move the file away to do without its rows, or remove the checkpoints to start anew",
                    file.path.display()
                ))
                .fatal());
            }
            newer.push(file.path);
        }
    }
    if newer.is_empty() {
        return Ok(0);
    }
    let mut changed: Vec<&Path> = newer.iter().filter_map(|path| path.parent()).collect();
    changed.dedup();
    for path in &newer {
        move_aside(root, path)?;
    }
    for folder in changed {
        file::sync_folder(folder)?;
    }
    let names: Vec<_> = newer.iter().take(NAMED_MAX).map(|path| path.display().to_string()).collect();
    let more = if newer.len() > NAMED_MAX { ", …" } else { "" };
    warn!(
        sink,
        "{} history files are newer than the checkpoint that this start goes on from: their rows come again, so they \
         were moved to {}: {}{more}",
        newer.len(),
        root.join(ASIDE_FOLDER).display(),
        names.join(", "),
    );
    Ok(newer.len())
}

fn move_aside(root: &Path, path: &Path) -> Result<()> {
    let within = path.strip_prefix(root).map_err(|e| Error::internal("a file outside its folder").because(e))?;
    let to = root.join(ASIDE_FOLDER).join(within);
    let folder = to.parent().unwrap_or(root);
    file::create_folder(folder)?;
    let named = |end: String| PathBuf::from(format!("{}{end}{SUFFIX}", to.display()));
    // A file that was made again under the same name, and taken back again.
    let free = std::iter::once(String::new()).chain((1..).map(|n| format!(".{n}"))).map(named).find(|to| !to.exists());
    let to = free.unwrap_or(to);
    fs::rename(path, &to).map_err(failed("move", path))?;
    file::sync_folder(to.parent().unwrap_or(root))
}

fn list(table: &Path) -> Result<Vec<HistoryFile>> {
    files::list(table).map_err(failed("list", table))
}
