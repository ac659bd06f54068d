//! The files of one table: `FOLDER/dt=YYYY-MM-DD/hh=HH/*.parquet`, where dt and hh are the UTC time of
//! publishing. Always read from the folder itself: a listing that is kept would hide new files.

use std::fs::{self, DirEntry, File};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, FieldRef, Schema, SchemaRef};
use chrono::{DateTime, NaiveDate, Utc};
use parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder};

use crate::batch::with_hidden_columns;
use crate::disk::{Disk, Entry};
use crate::error::{Error, Result};

/// Column with the UTC day of publishing, read from the folder's name.
pub const DAY: &str = "dt";
/// Column with the UTC hour of publishing, read from the folder's name.
pub const HOUR: &str = "hh";
/// Folder beside the tables with files that are durable but not published. Their names do not end in `.parquet`.
pub const STAGE_FOLDER: &str = ".stage";

/// Put after a dot, and after the name of the folder where it lies beside that.
const SWAP: &str = "swap";

const HOUR_US: i64 = 3_600_000_000;

/// A folder with the files of one hour of publishing.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HourFolder {
    /// UTC day of publishing, in days since 1970.
    pub day: i32,
    /// UTC hour of publishing, 0 to 23.
    pub hour: i64,
    /// Where it lies.
    pub path: PathBuf,
}

impl HourFolder {
    /// When the hour is over, microseconds since 1970 UTC.
    pub fn end_us(&self) -> i64 {
        (i64::from(self.day) * 24 + self.hour + 1) * HOUR_US
    }

    /// Its published files, by name.
    pub fn files(&self) -> io::Result<Vec<HistoryFile>> {
        Ok(self.files_of(entries(&self.path)?))
    }

    fn files_of(&self, entries: Entries) -> Vec<HistoryFile> {
        let files = entries.into_iter().filter(|(name, _)| is_published(name));
        let mut files: Vec<_> = files.map(|(_, path)| HistoryFile { day: self.day, hour: self.hour, path }).collect();
        files.sort_unstable();
        files
    }
}

/// A published file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct HistoryFile {
    /// UTC day of publishing, in days since 1970.
    pub day: i32,
    /// UTC hour of publishing, 0 to 23.
    pub hour: i64,
    /// Where it lies.
    pub path: PathBuf,
}

/// The folder of files published at `us` microseconds since 1970 UTC, below the table's folder.
pub fn hour_folder(us: i64) -> PathBuf {
    let time = DateTime::<Utc>::from_timestamp_micros(us).unwrap_or_default();
    PathBuf::from(time.format("dt=%Y-%m-%d/hh=%H").to_string())
}

/// Day and hour of publishing of `us`, as [`HistoryFile`] has them.
pub(super) fn day_and_hour(us: i64) -> (i32, i64) {
    let hours = us.div_euclid(HOUR_US);
    (i32::try_from(hours.div_euclid(24)).unwrap_or_default(), hours.rem_euclid(24))
}

/// All published files of a table, oldest folder first, then by name. No folder means no files. Folders and
/// files that are named otherwise are passed over.
pub fn list(table: &Path) -> io::Result<Vec<HistoryFile>> {
    let mut files = Vec::new();
    for hour in hours(table)? {
        files.extend(hour.files()?);
    }
    Ok(files)
}

/// As [`list`], on any disk.
pub fn list_on(disk: &dyn Disk, table: &Path) -> io::Result<Vec<HistoryFile>> {
    let mut files = Vec::new();
    for hour in hours_by(table, &|folder| entries_on(disk, folder))? {
        files.extend(hour.files_of(entries_on(disk, &hour.path)?));
    }
    Ok(files)
}

/// All hour folders of a table, oldest first.
pub fn hours(table: &Path) -> io::Result<Vec<HourFolder>> {
    hours_by(table, &entries)
}

/// Names and paths in a folder.
type Entries = Vec<(String, PathBuf)>;

fn hours_by(table: &Path, entries: &dyn Fn(&Path) -> io::Result<Entries>) -> io::Result<Vec<HourFolder>> {
    let mut hours = Vec::new();
    for (name, path) in entries(table)? {
        let Some(day) = name.strip_prefix("dt=").and_then(parse_day) else { continue };
        for (name, path) in entries(&path)? {
            let Some(hour) = name.strip_prefix("hh=").and_then(parse_hour) else { continue };
            hours.push(HourFolder { day, hour, path });
        }
    }
    hours.sort_unstable();
    Ok(hours)
}

fn is_published(name: &str) -> bool {
    name.ends_with(".parquet") && !name.starts_with(['.', '_'])
}

/// `.NAME.swap` beside the history folder `folder`, which is a real path: the folder in which an hour is built anew, and in
/// which the files that it replaced stay for a while, so that a query that has listed them still finds them:
/// `.NAME.swap/TABLE/dt=…/hh=…`. Hours that are too old go through it too. A reader that takes all files of `folder` for
/// the history does not come across it. `None` if there is nothing beside `folder`.
pub fn swap_beside(folder: &Path) -> Option<PathBuf> {
    let name = folder.file_name()?.to_str()?;
    Some(folder.with_file_name(format!(".{name}.{SWAP}")))
}

/// `.swap` in the history folder `folder`, which serves where [`swap_beside`] cannot.
pub fn swap_inside(folder: &Path) -> PathBuf {
    folder.join(format!(".{SWAP}"))
}

/// Where a published file may lie after another hour folder has taken the place of its own. Nowhere if `path` is not below
/// a table.
pub(super) fn swapped(folder: &Path, path: &Path) -> impl Iterator<Item = PathBuf> {
    let within = path.strip_prefix(folder).map(Path::to_owned).ok();
    let swaps = swap_beside(folder).into_iter().chain([swap_inside(folder)]);
    swaps.filter_map(move |swap| Some(swap.join(within.as_ref()?)))
}

/// The facts of the file system about a published file of the table in `table`, where it is or where it was swapped to.
pub(super) fn metadata(table: &Path, path: &Path) -> io::Result<fs::Metadata> {
    match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let mut elsewhere = table.parent().into_iter().flat_map(|folder| swapped(folder, path));
            elsewhere.find_map(|path| fs::metadata(path).ok()).ok_or(error)
        }
        found => found,
    }
}

/// What lies in a table's folder beside its published files: names that no sink of Tailwater gives.
pub fn strays(table: &Path) -> io::Result<Vec<PathBuf>> {
    let mut strays = Vec::new();
    for (day_name, day_path) in entries(table)? {
        if day_name.strip_prefix("dt=").and_then(parse_day).is_none() || !day_path.is_dir() {
            strays.push(day_path);
            continue;
        }
        for (hour_name, hour_path) in entries(&day_path)? {
            if hour_name.strip_prefix("hh=").and_then(parse_hour).is_none() || !hour_path.is_dir() {
                strays.push(hour_path);
                continue;
            }
            let files = entries(&hour_path)?.into_iter();
            strays.extend(files.filter(|(name, _)| sink_and_checkpoint(name).is_none()).map(|(_, path)| path));
        }
    }
    strays.sort();
    Ok(strays)
}

/// The sink and the checkpoint that the name of a published file tells.
pub fn sink_and_checkpoint(name: &str) -> Option<(&str, u64)> {
    let mut parts = name.strip_suffix(".parquet")?.rsplitn(3, '-');
    let (part, checkpoint, sink) = (parts.next()?, parts.next()?, parts.next()?);
    part.parse::<u64>().ok()?;
    // Merged from several: the newest of their checkpoints tells.
    let merged = sink.rsplit_once("-compacted-").filter(|(_, first)| first.parse::<u64>().is_ok());
    let sink = merged.map_or(sink, |(sink, _)| sink);
    Some((sink, checkpoint.parse().ok()?)).filter(|_| !sink.is_empty() && !sink.starts_with(['.', '_']))
}

/// Reads a whole Parquet file, its footer and every row, and says how many rows it has.
///
/// Parquet as it is written here has no checksums: a changed value that is still well-formed cannot be seen.
pub fn read_whole(path: &Path) -> Result<u64> {
    let failed = |cause: Box<dyn std::error::Error + Send + Sync>| Error::outside("cannot be read").because(cause);
    let file = File::open(path).map_err(|e| failed(e.into()))?;
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| failed(e.into()))?;
    let expected = u64::try_from(builder.metadata().file_metadata().num_rows()).unwrap_or_default();
    let mut rows = 0;
    for batch in builder.build().map_err(|e| failed(e.into()))? {
        rows += batch.map_err(|e| failed(e.into()))?.num_rows() as u64;
    }
    if rows != expected {
        return Err(Error::outside(format!("its footer tells of {expected} rows, but it has {rows}")));
    }
    Ok(rows)
}

/// Names and paths in a folder; none if it is not there (any more) or is no folder.
fn entries(folder: &Path) -> io::Result<Entries> {
    let named = |entry: DirEntry| Some((entry.file_name().into_string().ok()?, entry.path()));
    let listed = fs::read_dir(folder);
    none_if_gone(listed.and_then(|entries| entries.filter_map(|entry| entry.map(named).transpose()).collect()))
}

fn entries_on(disk: &dyn Disk, folder: &Path) -> io::Result<Entries> {
    let named = |entry: Entry| (entry.name.clone(), folder.join(entry.name));
    none_if_gone(disk.list(folder).map(|entries| entries.into_iter().map(named).collect()))
}

fn none_if_gone(listed: io::Result<Entries>) -> io::Result<Entries> {
    match listed {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(Vec::new()),
        listed => listed,
    }
}

fn parse_day(text: &str) -> Option<i32> {
    Some(NaiveDate::parse_from_str(text, "%Y-%m-%d").ok()?.to_epoch_days())
}

fn parse_hour(text: &str) -> Option<i64> {
    text.parse().ok().filter(|hour| (0..24).contains(hour))
}

/// The columns of a history file, for the visible columns of its pipeline: these, then `event_time` and
/// `ingest_time` where no visible column has that name. All are nullable, because a file written before a
/// column came has nulls in it.
pub fn file_schema(visible: &SchemaRef) -> SchemaRef {
    let visible_and_hidden = with_hidden_columns(visible);
    let fields = visible_and_hidden.fields().iter().map(|field| field.as_ref().clone().with_nullable(true));
    Arc::new(Schema::new(fields.collect::<Vec<_>>()))
}

/// The columns that a file's place tells: `dt` (date) and `hh` (int).
pub(super) fn place_columns() -> Vec<FieldRef> {
    vec![Arc::new(Field::new(DAY, DataType::Date32, false)), Arc::new(Field::new(HOUR, DataType::Int64, false))]
}

/// The columns of a published file, from its footer.
pub fn schema_of_file(path: &Path) -> Result<SchemaRef> {
    let failed = |cause: Box<dyn std::error::Error + Send + Sync>| {
        Error::outside(format!("cannot read {}", path.display())).because(cause)
    };
    let file = File::open(path).map_err(|e| failed(e.into()))?;
    let footer = ArrowReaderMetadata::load(&file, ArrowReaderOptions::new()).map_err(|e| failed(e.into()))?;
    Ok(Arc::clone(footer.schema()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::parse_us;

    #[test]
    fn an_hour_folder_reads_back_as_its_day_and_hour() {
        for text in ["1970-01-01T00:00:00Z", "2026-11-20T23:59:59.999999Z", "1969-12-31T23:00:00Z"] {
            let us = parse_us(text).expect("a time");
            let folder = hour_folder(us);
            let folder = folder.to_str().expect("ASCII");
            let (day, hour) = folder.split_once('/').expect("two levels");
            let read = (
                parse_day(day.strip_prefix("dt=").expect("dt")).expect("a day"),
                parse_hour(hour.strip_prefix("hh=").expect("hh")).expect("an hour"),
            );
            assert_eq!(read, day_and_hour(us), "{text}");
        }
    }

    #[test]
    fn the_name_of_a_file_tells_its_sink_and_checkpoint() {
        for (name, expected) in [
            ("h-12-0.parquet", Some(("h", 12))),
            ("long-name-12-3.parquet", Some(("long-name", 12))),
            ("h-compacted-3-17-2.parquet", Some(("h", 17))),
            ("-12-3.parquet", None),
            ("_h-12-3.parquet", None),
            ("h-12.parquet", None),
            ("h-x-0.parquet", None),
            ("h-12-0.part", None),
        ] {
            assert_eq!(sink_and_checkpoint(name), expected, "{name}");
        }
    }

    #[test]
    fn an_hour_tells_its_end_and_where_it_is_swapped_to() {
        let folder = Path::new("/a/h");
        let path = folder.join("t").join(hour_folder(parse_us("2026-11-20T23:10:00Z").expect("a time")));
        let (day, hour) = day_and_hour(parse_us("2026-11-20T23:10:00Z").expect("a time"));
        let hour = HourFolder { day, hour, path };
        assert_eq!(hour.end_us(), parse_us("2026-11-21T00:00:00Z").expect("a time"));
        let to = |folder: &str| swapped(Path::new(folder), &hour.path).collect::<Vec<_>>();
        let expected =
            ["/a/.h.swap/t/dt=2026-11-20/hh=23", "/a/h/.swap/t/dt=2026-11-20/hh=23"].map(PathBuf::from).to_vec();
        assert_eq!(to("/a/h"), expected);
        assert!(to("/other").is_empty());
        assert_eq!(to("/"), [PathBuf::from("/.swap/a/h/t/dt=2026-11-20/hh=23")]);
    }

    #[test]
    fn only_parquet_files_of_hour_folders_are_listed() {
        let folder = tempfile::tempdir().expect("a folder");
        assert_eq!(list(&folder.path().join("none")).expect("no folder is no files"), []);
        let put = |name: &str| {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().expect("a parent")).expect("folders");
            fs::write(path, "x").expect("a file");
        };
        for name in [
            "dt=2026-11-20/hh=13/h-2-0.parquet",
            "dt=2026-11-20/hh=02/h-1-0.parquet",
            "dt=2026-11-20/hh=02/h-1-0.part",
            "dt=2026-11-20/hh=02/.h-1-0.parquet",
            "dt=2026-11-20/hh=24/h-1-0.parquet",
            "dt=2026-11-20/h-1-0.parquet",
            "dt=today/hh=02/h-1-0.parquet",
            ".stage/h-1-0.part",
            "README",
        ] {
            put(name);
        }
        let names: Vec<_> = list(folder.path()).expect("a listing").into_iter().map(|f| (f.hour, f.path)).collect();
        let hour = |name: &str| folder.path().join("dt=2026-11-20").join(name);
        assert_eq!(names, [(2, hour("hh=02/h-1-0.parquet")), (13, hour("hh=13/h-2-0.parquet"))]);
        let strays: Vec<_> = strays(folder.path()).expect("a listing");
        let top = |name: &str| folder.path().join(name);
        let hidden = [hour("h-1-0.parquet"), hour("hh=02/.h-1-0.parquet"), hour("hh=02/h-1-0.part"), hour("hh=24")];
        assert_eq!(strays, [&[top(".stage"), top("README")][..], &hidden, &[top("dt=today")]].concat());
    }
}
