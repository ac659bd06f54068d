//! Files and folders that outlive a power cut: written, synced, renamed, exchanged.
//!
//! The `object_store` crate is not used: the version that DataFusion takes never syncs a file.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::parquet::arrow::ArrowWriter;
use ::parquet::basic::{Compression, ZstdLevel};
use ::parquet::file::metadata::{KeyValue, ParquetMetaData};
use ::parquet::file::properties::{WriterProperties, WriterPropertiesBuilder};
use arrow::array::{RecordBatch, new_null_array};
use arrow::datatypes::{Field, Schema};
use pipeline::error::{Error, Result};
use pipeline::time::{format_us, parse_us};

use super::Facts;

/// Ending of a staged file.
const STAGED: &str = ".part";

/// Zstandard level of a file on its way through the stream.
const LEVEL: i32 = 1;

/// How all files are written.
pub(super) fn properties(level: i32) -> Result<WriterPropertiesBuilder> {
    let level = ZstdLevel::try_new(level).map_err(|e| Error::internal("zstd").because(e))?;
    let created_by = format!("tailwater {}", env!("CARGO_PKG_VERSION"));
    Ok(WriterProperties::builder().set_compression(Compression::ZSTD(level)).set_created_by(created_by))
}

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

/// Reads what [`footer`] wrote. The time of arrival is not told.
pub(super) fn facts_of(metadata: &ParquetMetaData) -> Option<Facts> {
    let pairs = metadata.file_metadata().key_value_metadata()?;
    let value = |key: &str| {
        let pair = pairs.iter().find(|pair| pair.key.strip_prefix("tailwater.") == Some(key))?;
        pair.value.as_deref()
    };
    // A time that no calendar has is written as its number.
    let time = |key| value(key).and_then(|text| parse_us(text).or_else(|| text.parse().ok()));
    Some(Facts {
        first_batch: value("first_batch")?.parse().ok()?,
        last_batch: value("last_batch")?.parse().ok()?,
        event_min_us: time("event_time_min")?,
        event_max_us: time("event_time_max")?,
        since_us: i64::MAX,
    })
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
    let properties = properties(LEVEL)?.set_key_value_metadata(Some(footer)).build();
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

/// Renames `from` to `to`; fine if that has happened already. Returns whether it happened now.
pub(super) fn move_into_place(from: &Path, to: &Path) -> Result<bool> {
    if to.try_exists().map_err(failed("look at", to))? {
        return Ok(false);
    }
    match fs::rename(from, to) {
        Ok(()) => Ok(true),
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

/// Exchanges two folders, so that there is no moment at which either name is missing. `Ok(false)` where the file system
/// or the platform cannot, or where they lie on different ones.
#[cfg(any(target_os = "linux", target_os = "android", target_os = "macos"))]
pub(super) fn exchange(one: &Path, other: &Path) -> io::Result<bool> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;
    match renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE) {
        Ok(()) => Ok(true),
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::XDEV) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// No way to exchange two folders is known here.
#[cfg(not(any(target_os = "linux", target_os = "android", target_os = "macos")))]
pub(super) fn exchange(_one: &Path, _other: &Path) -> io::Result<bool> {
    Ok(false)
}

/// Bytes that a file in this folder may still take.
pub(super) fn room(folder: &Path) -> io::Result<u64> {
    let disk = rustix::fs::statvfs(folder)?;
    Ok(disk.f_bavail.saturating_mul(disk.f_frsize))
}

/// Whether an error says that there is no room.
pub(super) fn is_full(error: &Error) -> bool {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = std::error::Error::source(error);
    while let Some(error) = cause {
        let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
        if matches!(kind, Some(ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge)) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// Removes a folder with all that is in it; fine if it is not there.
pub(super) fn remove_folder(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(failed("remove", folder)(error)),
        _ => Ok(()),
    }
}

pub(super) fn failed<'a>(doing: &'a str, path: &'a Path) -> impl Fn(io::Error) -> Error + 'a {
    move |cause| Error::outside(format!("cannot {doing} {}", path.display())).because(cause)
}
