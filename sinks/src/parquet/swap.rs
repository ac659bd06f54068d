//! Where hours are built anew, and where the files that they replaced stay for a while.
//!
//! A reader that takes every `.parquet` file below `PATH` for a part of the history must not come across them: so they lie
//! beside `PATH`. Only where that folder cannot be used, they lie in `PATH`.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use pipeline::disk::RealDisk;
use pipeline::error::{Error, Result};
use pipeline::history::files;
use tracing::info;

use super::file::{self, failed};

/// An empty folder that is moved to try out whether one can be. No pipeline has a name like that.
const PROBE: &str = ".probe";

/// Finds the folder to use, beside `root` or in it. Which one, only a move tells: `root` may be a mount of the file system
/// that its parent lies on, too.
pub(super) fn choose(sink: &str, root: &Path) -> Result<PathBuf> {
    let inside = files::swap_inside(root);
    let from = inside.join(PROBE);
    file::create_folder(&RealDisk, &from)?;
    let tried = match files::swap_beside(root) {
        Some(beside) => {
            let tried = try_beside(&from, &beside);
            tried.map(|()| beside)
        }
        None => Err(Error::outside("nothing lies beside it")),
    };
    remove_empty(&inside, &from);
    tried.or_else(|error| {
        info!(
            sink,
            "the history's hours are merged in {}, not beside {}: {error}; a reader that takes all Parquet files below {} \
             for the history may count rows twice meanwhile: name it a pipeline's folder",
            inside.display(),
            root.display(),
            root.display(),
        );
        Ok(inside)
    })
}

fn try_beside(from: &Path, beside: &Path) -> Result<()> {
    let to = beside.join(PROBE);
    let tried =
        file::create_folder(&RealDisk, beside).and_then(|()| fs::rename(from, &to).map_err(failed("make", &to)));
    remove_empty(beside, &to);
    tried
}

/// Removes what an earlier process has left of these tables.
pub(super) fn clean(root: &Path, metrics: &[String]) -> Result<()> {
    for swap in files::swap_beside(root).into_iter().chain([files::swap_inside(root)]) {
        for metric in metrics {
            let left = swap.join(metric);
            for hour in files::hours(&left).map_err(failed("list", &left))? {
                // Whether it was exchanged or not: what lies in the table now must outlive what is removed here.
                let table = hour.path.strip_prefix(&swap).map(|within| root.join(within));
                sync_parents(&table.unwrap_or_else(|_| root.to_owned()), &hour.path)?;
            }
            file::remove_folder(&left)?;
        }
        remove_empty(&swap, &swap.join(PROBE));
    }
    Ok(())
}

/// Makes an exchange or a rename durable: the names in both parent folders, or in what is left of them.
pub(super) fn sync_parents(one: &Path, other: &Path) -> Result<()> {
    for path in [one, other] {
        let there = path.ancestors().skip(1).find(|folder| folder.is_dir());
        there.map_or(Ok(()), |folder| file::sync_folder(&RealDisk, folder))?;
    }
    Ok(())
}

/// Removes `folder` and those above it, up to `swap`, as long as they are empty. They are in nobody's way if they stay.
pub(super) fn remove_empty(swap: &Path, folder: &Path) {
    for folder in folder.ancestors().take_while(|above| above.starts_with(swap)) {
        if fs::remove_dir(folder).is_err_and(|error| error.kind() != ErrorKind::NotFound) {
            return;
        }
    }
}
