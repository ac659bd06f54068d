//! Files and folders that outlive a power cut: written, synced, renamed, with the standard library alone.
//!
//! The `object_store` crate is not used: the version that DataFusion takes never syncs a file.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::parquet::arrow::ArrowWriter;
use ::parquet::basic::{Compression, ZstdLevel};
use ::parquet::file::metadata::KeyValue;
use ::parquet::file::properties::WriterProperties;
use arrow::array::{RecordBatch, new_null_array};
use arrow::datatypes::{Field, Schema};
use pipeline::error::{Error, Result};
use pipeline::time::format_us;

use super::Facts;

/// Ending of a staged file.
const STAGED: &str = ".part";

/// What the footer of a file says, by key.
pub(super) fn footer(sink: &str, metric: &str, facts: Facts) -> Vec<KeyValue> {
    let pair = |key: &str, value: String| KeyValue::new(format!("tailwater.{key}"), value);
    vec![
        pair("version", env!("CARGO_PKG_VERSION").to_owned()),
        pair("pipeline", metric.to_owned()),
        pair("sink", sink.to_owned()),
        pair("first_batch", facts.first_batch.to_string()),
        pair("last_batch", facts.last_batch.to_string()),
        pair("event_time_min", format_us(facts.event_min_us)),
        pair("event_time_max", format_us(facts.event_max_us)),
    ]
}

/// Writes rows as a Parquet file and makes it durable, its name too. After an error there is no file.
pub(super) fn write(path: &Path, batches: &[RecordBatch], footer: Vec<KeyValue>) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let result = write_and_sync(path, batches, footer).and_then(|()| sync_folder(folder));
    if result.is_err() {
        // It would be removed at the next start anyway; until then it only takes room.
        let _ = fs::remove_file(path);
    }
    result
}

fn write_and_sync(path: &Path, batches: &[RecordBatch], footer: Vec<KeyValue>) -> Result<()> {
    let Some(first) = batches.first() else { return Err(Error::internal("a history file without rows")) };
    let file = File::create(path).map_err(failed("write", path))?;
    let level = ZstdLevel::try_new(1).map_err(|e| Error::internal("zstd").because(e))?;
    let properties = WriterProperties::builder()
        .set_compression(Compression::ZSTD(level))
        .set_created_by(format!("tailwater {}", env!("CARGO_PKG_VERSION")))
        .set_key_value_metadata(Some(footer))
        .build();
    let unwritten = |e| Error::outside(format!("cannot write {}", path.display())).because(e);
    // The writer puts the Arrow schema into the footer too: a `json` column reads back as one.
    let mut writer = ArrowWriter::try_new(&file, first.schema(), Some(properties)).map_err(unwritten)?;
    for batch in batches {
        writer.write(batch).map_err(unwritten)?;
    }
    writer.finish().map_err(unwritten)?;
    drop(writer);
    file.sync_all().map_err(failed("sync", path))
}

/// Whether a file may have such a column: the writer is asked, in memory.
pub(super) fn try_column(field: &Field) -> ::parquet::errors::Result<()> {
    let schema = Arc::new(Schema::new(vec![field.clone().with_nullable(true)]));
    let row = RecordBatch::try_new(Arc::clone(&schema), vec![new_null_array(field.data_type(), 1)])?;
    let mut writer = ArrowWriter::try_new(Vec::new(), schema, None)?;
    writer.write(&row)?;
    writer.close().map(|_| ())
}

/// Renames `from` to `to`; fine if that has happened already.
pub(super) fn move_into_place(from: &Path, to: &Path) -> Result<()> {
    if to.try_exists().map_err(failed("look at", to))? {
        return Ok(());
    }
    match fs::rename(from, to) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound && !from.exists() => Err(Error::outside(format!(
            "a checkpoint names the staged file {}, but neither it nor {} is there: put the folder back where it was, \
             or remove the checkpoints to start anew",
            from.display(),
            to.display()
        ))
        .fatal()),
        Err(error) => Err(failed("publish", to)(error)),
    }
}

/// Makes a folder with all its parents; each new one is synced into the folder above it.
pub(super) fn create_folder(folder: &Path) -> Result<()> {
    let mut missing: Vec<PathBuf> = Vec::new();
    let mut at = Some(folder);
    while let Some(path) = at.filter(|path| !path.as_os_str().is_empty() && !path.is_dir()) {
        missing.push(path.to_owned());
        at = path.parent();
    }
    for path in missing.iter().rev() {
        match fs::create_dir(path) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists || !path.is_dir() => {
                return Err(failed("make the folder", path)(error));
            }
            _ => {}
        }
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
        sync_folder(parent.unwrap_or(Path::new(".")))?;
    }
    Ok(())
}

/// Makes the names in a folder durable.
pub(super) fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|file| file.sync_all()).map_err(failed("sync the folder", folder))
}

/// Removes all staged files of one sink.
pub(super) fn remove_stale(stage_folder: &Path, sink: &str) -> Result<()> {
    let prefix = format!("{sink}-");
    for entry in fs::read_dir(stage_folder).map_err(failed("list", stage_folder))? {
        let entry = entry.map_err(failed("list", stage_folder))?;
        let name = entry.file_name();
        let ours = name.to_str().is_some_and(|name| name.starts_with(&prefix) && name.ends_with(STAGED));
        if ours {
            fs::remove_file(entry.path()).map_err(failed("remove", &entry.path()))?;
        }
    }
    Ok(())
}

fn failed<'a>(doing: &'a str, path: &'a Path) -> impl Fn(io::Error) -> Error + 'a {
    move |cause| Error::outside(format!("cannot {doing} {}", path.display())).because(cause)
}
