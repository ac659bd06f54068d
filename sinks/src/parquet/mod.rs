//! `parquet`: history in Parquet files, each row in exactly one of them.

mod aside;
mod file;
mod ledger;
mod merge;
mod names;
mod open;
mod state;
mod swap;
#[cfg(test)]
mod tests;
mod upkeep;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use pipeline::batch::{Batch, Stage, with_hidden_columns};
use pipeline::config::{At, ByteSize, CheckContext, Duration};
use pipeline::disk::{Disk, RealDisk};
use pipeline::error::{Error, Result};
use pipeline::history::bytes_of;
use pipeline::history::files::{self, DAY, HOUR, HistoryFile, STAGE_FOLDER, hour_folder};
use pipeline::plugin::{
    self, HistoryTail, Promise, Sink, SinkConfig, SinkContext, SinkInput, SinkShape, StagingSink, Upkeep,
};
use pipeline::schema::type_word;
use pipeline::state::{StateReader, StateWriter};
use pipeline::time::now_us;
use schemars::JsonSchema;
use serde::Deserialize;

use ledger::Ledger;
use names::FileName;
use open::{Facts, Input, Open};
use upkeep::{HistoryUpkeep, Shared};

const PAGE: &str = "\
Writes history as Parquet files, each row in exactly one of them, for SQL and any other reader of Parquet.

## Writes
`PATH/PIPELINE/dt=YYYY-MM-DD/hh=HH/SINK-CHECKPOINT-PART.parquet`, compressed with zstd. `dt` and `hh` are the UTC
time of publishing, read from the clock when the file's name goes into a checkpoint; the file appears a moment later,
so one made in the last instant of an hour still lies in that hour's folder.

A file has the pipeline's columns, then `event_time` and `ingest_time` (timestamps, UTC) unless the pipeline has
columns of these names. Rows stand in the order of arrival. The footer tells by key: `tailwater.version`,
`tailwater.pipeline`, `tailwater.sink`, `tailwater.first_batch` and `tailwater.last_batch` (numbers of the pipeline's
output batches, as live frames have them), `tailwater.event_time_min` and `tailwater.event_time_max`.

Once an hour is over, its files are merged into few of about 128 MiB, `SINK-compacted-FIRST-LAST-PART.parquet`, where
FIRST and LAST are the checkpoints between which their rows came. The rows and their order stay the same. With `keep`,
hours that are older are removed, folder by folder.

Query it with `pipeline query`, over HTTP, or with any reader of Parquet, such as DuckDB:
`SELECT * FROM read_parquet('history/PIPELINE/**/*.parquet', hive_partitioning = true, union_by_name = true)`.

## Delivery
Exactly once, through `kill -9` at any instruction. Rows are written to `PATH/.stage` and synced to the disk, their
files named in a checkpoint, and after it renamed into place. Rows not worth a file yet are in the checkpoint itself.
A final or revised row is kept as it comes, a partial one is not.

Merging builds the hour anew beside `PATH`, in `.NAME.swap` for a folder NAME, then exchanges the two folders in one
instant; the old files stay there for a minute. A query sees the files from before or from after, never both;
`pipeline query` needs no lock for it. Another reader of Parquet, too, sees one set or the other, or finds that a file it
has listed is no longer there: an error, and it must list anew. Where nothing can be moved to the folder beside (`PATH` is
a mount point, or its parent may not be written) merging takes `PATH/.swap` and logs it: name a pipeline's folder to other
readers then, for one that goes through all of `PATH` may count rows twice.

A start that cannot read the newest checkpoint goes on from one before it. Files that were published since are moved to
`PATH/.aside`, with a warning that names them, for their rows come again. Only files that no kept checkpoint can make come
again are merged or removed.

## Limits
A row waits at most `roll` and one checkpoint until its file appears. 32 MiB of rows that wait make a file at once,
because each checkpoint writes them anew. At most 256 MiB of rows are kept in memory; beyond it rows that are safe in
a staged file are left out of queries until they are published.

A column may come (older files read as null) or go. Its type may not change: give the column a new name.
`dt` and `hh` cannot be columns.

Merging needs a file system that can exchange two folders (ext4, xfs, btrfs and tmpfs can; others are told in one
warning) and twice the room of an hour; it works beside the stream, on the threads of the queries. Hours of a pipeline that
is no longer in the file are neither merged nor removed, nor are hours merged in which files of other names lie.

## Fails when
the folder cannot be written or the disk is full: rows are kept, the sources wait, and it is tried again. A staged file
that a checkpoint names and that is gone stops the sink. A damaged file keeps its hour from being merged; `/health` names
it.
";

/// Most bytes of waiting rows that a checkpoint carries. Each checkpoint (every second) writes them anew, so
/// more would cost more than a file. Beyond it the largest tables are staged.
const STATE_BYTES_MAX: usize = 32 << 20;

/// Most bytes of rows in memory: waiting, or staged and kept for queries. At the limit the largest table is
/// staged and staged rows are left to the disk alone; if that fails, `write` takes no more.
const MEMORY_BYTES_MAX: usize = 256 << 20;

/// Newest files of a table whose column types are compared with the pipeline's at the start. More than one, as
/// a column may be missing in the newest; few, because each is opened.
const COMPARED_FILES_MAX: usize = 16;

/// Where and how history is written.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ParquetConfig {
    /// Folder of the history, counted from the YAML file's folder; made if missing. Two sinks do not share one.
    pub path: At<String>,
    /// Most time a row waits unpublished. Default `60s`: a file a minute is few enough for fast queries.
    #[serde(default = "default_roll")]
    pub roll: Duration,
    /// Size in memory at which rows make a file before `roll` is over; the file is several times smaller. Default
    /// `128MiB`: one file that a reader's threads can share.
    #[serde(default = "default_roll_size")]
    pub roll_size: At<ByteSize>,
    /// Age at which history is removed, by whole hours of publishing, such as `30d`. Default: never, because only its
    /// owner knows when it has served.
    pub keep: Option<At<Duration>>,
}

fn default_roll() -> Duration {
    Duration::from_secs(60)
}

fn default_roll_size() -> At<ByteSize> {
    At::nowhere(ByteSize(128 << 20))
}

impl SinkConfig for ParquetConfig {
    const TYPE: &'static str = "parquet";
    const PAGE: &'static str = PAGE;
    const EXAMPLE: &'static str = "type: parquet\npath: history\nroll: 10s\n";
    const PROMISES: &'static [(&'static str, Promise)] = &[("", Promise::ExactlyOnce)];

    fn check(&self, inputs: &[SinkInput], cx: &mut CheckContext<'_>) -> Option<SinkShape> {
        let errors = cx.errors();
        if self.path.is_empty() {
            cx.error(self.path.position, "`path` is empty");
        }
        if self.roll_size.0 == 0 {
            cx.error(self.roll_size.position, "`roll_size` is more than nothing; the default is `128MiB`");
        }
        if let Some(keep) = self.keep.as_ref().filter(|keep| keep.value < self.roll) {
            cx.error_hint(
                keep.position,
                format!("`keep` ({}) is shorter than `roll` ({})", keep.value, self.roll),
                Some("history is removed by whole hours: keep an hour or more, such as `30d`".to_owned()),
            );
        }
        for input in inputs {
            check_columns(input, cx);
        }
        let history = Some(cx.resolve(&self.path.value));
        (cx.errors() == errors).then(|| SinkShape {
            history,
            takes_revised: true,
            promise: Promise::ExactlyOnce,
            ..SinkShape::default()
        })
    }

    fn build(&self, cx: SinkContext) -> Result<Sink> {
        Ok(Sink::Staging(Box::new(ParquetSink::new(self, cx)?)))
    }

    fn staged(&self, state: &mut StateReader<'_>) -> Result<Vec<plugin::StagedFile>> {
        let named = state::read(state)?.staged.into_iter();
        Ok(named
            .filter_map(|file| Some(plugin::StagedFile { staged: file.stage, published: file.target?.path }))
            .collect())
    }
}

/// Refuses columns that a history file cannot have.
fn check_columns(input: &SinkInput, cx: &mut CheckContext<'_>) {
    let metric = &input.metric;
    for field in input.shape.schema.fields() {
        let (name, position) = (field.name(), cx.position());
        // Other readers do not tell `DT` from `dt`.
        if [DAY, HOUR].iter().any(|taken| name.eq_ignore_ascii_case(taken)) {
            cx.error_hint(
                position,
                format!("pipeline `{metric}` has a column `{name}`, which is a folder's name in history"),
                Some(format!("rename it in a `select` step, such as `{name}_value: {name}`")),
            );
        }
        if let Err(error) = file::try_column(field) {
            let word = type_word(field);
            cx.error(
                position,
                format!("column `{name}` of pipeline `{metric}` is {word}, which Parquet lacks: {error}"),
            );
        }
    }
}

/// The running sink.
pub struct ParquetSink {
    name: String,
    /// Where rows are staged and published. Hours are merged on the real one.
    disk: Arc<dyn Disk>,
    root: PathBuf,
    roll_us: i64,
    roll_bytes: usize,
    inputs: Vec<Input>,
    /// Files that are staged and not yet published, in the order of their rows.
    staged: Vec<StagedFile>,
    /// Counts staged files since the start, so that no two have one name.
    serial: u64,
    keep_us: Option<i64>,
    shared: Arc<Shared>,
}

/// A file that is durable and invisible.
#[derive(Debug)]
struct StagedFile {
    metric: String,
    /// Index of the pipeline, if it still names this sink.
    input: Option<usize>,
    /// Name in the stage folder.
    stage: String,
    /// Given with the checkpoint that names the file first.
    target: Option<Target>,
    /// How many of the oldest batches of the tail are its rows.
    tail_batches: usize,
    tail_bytes: usize,
}

/// Where a staged file will appear.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    /// The first checkpoint that names it.
    checkpoint: u64,
    /// Counted from the sink's folder, so that the whole history may be moved.
    path: PathBuf,
}

impl StagingSink for ParquetSink {
    fn write(&mut self, input: usize, batch: &Batch, number: u64) -> Result<()> {
        self.write_at(input, batch, number, now_us())
    }

    fn prepare(&mut self, checkpoint: u64, end: bool, state: &mut StateWriter) -> Result<()> {
        self.prepare_at(checkpoint, end, now_us(), state)
    }

    fn commit(&mut self, checkpoint: u64, oldest_kept: u64) -> Result<()> {
        self.shared.ledger().forget_before(oldest_kept);
        self.publish(checkpoint)
    }

    fn restore(&mut self, checkpoint: u64, state: Option<&mut StateReader<'_>>) -> Result<()> {
        self.forget();
        let metrics = self.metrics();
        let restored = state.map(state::read).transpose()?.unwrap_or_default();
        let strangers = match checkpoint {
            0 => aside::highest_number(&*self.disk, &self.root, &self.name, &metrics)?,
            _ => restored.strangers,
        };
        let mut ledger = Ledger::new(checkpoint, strangers);
        let taken_back = aside::take_back(&*self.disk, &self.root, &self.name, &metrics, &ledger)?;
        self.shared.fewer(taken_back as u64);
        for file in restored.staged {
            if let Some(target) = &file.target {
                ledger.name(&target.path, checkpoint);
            }
            let input = self.inputs.iter().position(|i| i.metric == file.metric);
            self.staged.push(StagedFile { input, ..file });
        }
        *self.shared.ledger() = ledger;
        self.publish(checkpoint)?;
        file::remove_stale(&*self.disk, &self.stage_folder(), &self.name)?;
        swap::clean(&self.root, &metrics)?;
        for open in restored.open {
            self.take_back(open)?;
        }
        Ok(())
    }

    fn upkeep(&self) -> Option<Arc<dyn Upkeep>> {
        Some(Arc::new(self.history_upkeep()))
    }
}

impl ParquetSink {
    /// Makes the folders and compares the columns of the newest files with those of the pipelines.
    pub fn new(config: &ParquetConfig, cx: SinkContext) -> Result<Self> {
        let root = cx.folder.join(&config.path.value);
        file::create_folder(&RealDisk, &root)?;
        // A folder that is found through a link has its neighbours elsewhere.
        let root = std::fs::canonicalize(&root).map_err(file::failed("look at", &root))?;
        let sink = Self::on_disk(Arc::new(RealDisk), root, config, cx)?;
        for Input { metric, schema, .. } in &sink.inputs {
            let table = sink.root.join(metric);
            let files = files::list(&table).map_err(file::failed("list", &table))?;
            refuse_changed_types(&table, &files, metric, schema)?;
            sink.shared.files.fetch_add(files.len() as u64, Relaxed);
        }
        Ok(sink)
    }

    fn on_disk(disk: Arc<dyn Disk>, root: PathBuf, config: &ParquetConfig, cx: SinkContext) -> Result<Self> {
        file::create_folder(&*disk, &root.join(STAGE_FOLDER))?;
        let mut tails = cx.tails.into_iter();
        let mut inputs = Vec::with_capacity(cx.inputs.len());
        for SinkInput { metric, shape } in cx.inputs {
            let schema = with_hidden_columns(&shape.schema);
            inputs.push(Input { metric, schema, tail: tails.next(), open: Open::default() });
        }
        let roll_bytes = usize::try_from(config.roll_size.0).unwrap_or(usize::MAX);
        let (name, roll_us) = (cx.name, config.roll.as_us());
        let keep_us = config.keep.as_ref().map(|keep| keep.as_us());
        let shared = Arc::default();
        Ok(Self { name, disk, root, roll_us, roll_bytes, inputs, staged: Vec::new(), serial: 0, keep_us, shared })
    }

    fn history_upkeep(&self) -> HistoryUpkeep {
        let (name, root, shared) = (self.name.clone(), self.root.clone(), Arc::clone(&self.shared));
        HistoryUpkeep::new(name, root, self.metrics(), self.keep_us, shared)
    }

    fn metrics(&self) -> Vec<String> {
        self.inputs.iter().map(|input| input.metric.clone()).collect()
    }

    /// Publishes the staged files that a checkpoint up to this one names.
    fn publish(&mut self, checkpoint: u64) -> Result<()> {
        let in_time = |file: &StagedFile| file.target.as_ref().is_some_and(|t| t.checkpoint <= checkpoint);
        while let Some(position) = self.staged.iter().position(in_time) {
            let file = &mut self.staged[position];
            let tail = file.input.and_then(|index| self.inputs[index].tail.as_ref());
            let is_new = publish(&*self.disk, &self.root, file, tail)?;
            self.shared.files.fetch_add(u64::from(is_new && file.input.is_some()), Relaxed);
            self.staged.remove(position);
        }
        Ok(())
    }

    fn stage_folder(&self) -> PathBuf {
        self.root.join(STAGE_FOLDER)
    }

    fn write_at(&mut self, input: usize, batch: &Batch, number: u64, now_us: i64) -> Result<()> {
        let (Some(&min), Some(&max)) = (batch.event_us().iter().min(), batch.event_us().iter().max()) else {
            return Ok(());
        };
        if batch.stage() == Stage::Partial {
            return Ok(());
        }
        let rows = batch.with_hidden()?;
        let rows = RecordBatch::try_new(SchemaRef::clone(&self.inputs[input].schema), rows.columns().to_vec())?;
        let bytes = bytes_of(&rows);
        // Whatever may fail comes first: after an error the same batch is written again.
        if self.inputs[input].open.bytes >= self.roll_bytes {
            self.stage(input)?;
        }
        self.make_room(bytes)?;
        let facts =
            Facts { first_batch: number, last_batch: number, event_min_us: min, event_max_us: max, since_us: now_us };
        self.inputs[input].push(rows, bytes, facts)
    }

    fn prepare_at(&mut self, checkpoint: u64, end: bool, now_us: i64, state: &mut StateWriter) -> Result<()> {
        for index in 0..self.inputs.len() {
            if let Some(facts) = self.inputs[index].open.facts {
                // A clock that was set back must not hold rows back.
                let waited = now_us < facts.since_us || now_us - facts.since_us >= self.roll_us;
                if end || waited || self.inputs[index].open.bytes >= self.roll_bytes {
                    self.stage(index)?;
                }
            }
        }
        while self.open_bytes() > STATE_BYTES_MAX {
            self.stage_largest()?;
        }
        self.name_files(checkpoint, now_us);
        let strangers = self.shared.ledger().strangers();
        state::write(state, strangers, &self.staged, &self.inputs)
    }

    /// Gives every staged file that has none its final name, one that no file has: a run that starts without
    /// its old checkpoints may count them from an older clock.
    fn name_files(&mut self, checkpoint: u64, now_us: i64) {
        // Held until all are named: the upkeep takes no hour away between the choice of a name and its entry here.
        let shared = Arc::clone(&self.shared);
        let mut ledger = shared.ledger();
        for index in 0..self.staged.len() {
            if let Some(target) = &self.staged[index].target {
                ledger.name(&target.path, checkpoint);
                continue;
            }
            let folder = Path::new(&self.staged[index].metric).join(hour_folder(now_us));
            let path = (0u64..).map(|part| folder.join(FileName::published(checkpoint, part).write(&self.name))).find(
                |path| {
                    let promised = self.staged.iter().any(|f| f.target.as_ref().is_some_and(|t| t.path == *path));
                    !promised && !self.disk.exists(&self.root.join(path)).unwrap_or(false)
                },
            );
            path.iter().for_each(|path| ledger.name(path, checkpoint));
            self.staged[index].target = path.map(|path| Target { checkpoint, path });
        }
    }

    fn open_bytes(&self) -> usize {
        self.inputs.iter().map(|input| input.open.bytes).sum()
    }

    /// Makes room in memory for `bytes` more.
    fn make_room(&mut self, bytes: usize) -> Result<()> {
        let staged = |sink: &Self| sink.staged.iter().map(|file| file.tail_bytes).sum::<usize>();
        if self.open_bytes() + staged(self) + bytes <= MEMORY_BYTES_MAX {
            return Ok(());
        }
        while self.open_bytes() > 0 && self.open_bytes() + bytes > MEMORY_BYTES_MAX {
            self.stage_largest()?;
        }
        // Waiting for the next commit instead could wait forever: its barrier may stand behind this batch.
        for file in &mut self.staged {
            drop_from_tail(file, file.input.and_then(|index| self.inputs[index].tail.as_ref()));
        }
        Ok(())
    }

    fn stage_largest(&mut self) -> Result<()> {
        let largest = (0..self.inputs.len()).max_by_key(|index| self.inputs[*index].open.bytes);
        largest.map_or(Ok(()), |index| self.stage(index))
    }

    /// Writes the waiting rows of an input into a staged file. After an error they still wait.
    fn stage(&mut self, index: usize) -> Result<()> {
        let input = &self.inputs[index];
        let Some(facts) = input.open.facts else { return Ok(()) };
        let stage = self.write_stage(&input.metric, &input.open.batches, facts)?;
        let open = std::mem::take(&mut self.inputs[index].open);
        self.staged.push(StagedFile {
            metric: self.inputs[index].metric.clone(),
            input: Some(index),
            stage,
            target: None,
            tail_batches: open.batches.len(),
            tail_bytes: open.bytes,
        });
        self.serial += 1;
        Ok(())
    }

    /// Writes a staged file and gives its name.
    fn write_stage(&self, metric: &str, batches: &[RecordBatch], facts: Facts) -> Result<String> {
        let name = format!("{}-{metric}-{}.part", self.name, self.serial);
        let footer = file::footer(&self.name, metric, facts);
        file::write(&*self.disk, &self.stage_folder().join(&name), batches, footer)?;
        Ok(name)
    }

    /// Back to the state of a sink that was just built.
    fn forget(&mut self) {
        self.staged.clear();
        for input in &mut self.inputs {
            input.open = Open::default();
            if let Some(tail) = &input.tail {
                tail.write().unwrap_or_else(PoisonError::into_inner).clear();
            }
        }
    }

    /// Takes back rows that waited when the checkpoint was made. Where the pipeline has other columns now, or is
    /// no longer there, they become a file with the columns they have.
    fn take_back(&mut self, restored: state::RestoredRows) -> Result<()> {
        let state::RestoredRows { metric, facts, batches } = restored;
        let index = self.inputs.iter().position(|input| input.metric == metric);
        if let Some(index) = index {
            let input = &mut self.inputs[index];
            if batches.iter().all(|batch| batch.schema() == input.schema) {
                return batches.into_iter().try_for_each(|rows| {
                    let bytes = bytes_of(&rows);
                    input.push(rows, bytes, facts)
                });
            }
        }
        let stage = self.write_stage(&metric, &batches, facts)?;
        self.serial += 1;
        let tail_bytes = batches.iter().map(bytes_of).sum();
        let tail = index.and_then(|index| self.inputs[index].tail.as_ref());
        if let Some(tail) = tail {
            tail.write().unwrap_or_else(PoisonError::into_inner).extend(batches.iter().cloned());
        }
        let tail_batches = batches.len();
        self.staged.push(StagedFile { metric, input: index, stage, target: None, tail_batches, tail_bytes });
        Ok(())
    }
}

/// Renames a staged file into place and drops its rows from the tail, in one lock; then syncs both folders. Returns
/// whether it was not there before.
fn publish(disk: &dyn Disk, root: &Path, staged: &mut StagedFile, tail: Option<&HistoryTail>) -> Result<bool> {
    let Some(target) = staged.target.clone() else { return Ok(false) };
    let stage_folder = root.join(STAGE_FOLDER);
    let (from, to) = (stage_folder.join(&staged.stage), root.join(&target.path));
    let folder = to.parent().unwrap_or(root);
    file::create_folder(disk, folder)?;
    let is_new = {
        let mut rows = tail.map(|tail| tail.write().unwrap_or_else(PoisonError::into_inner));
        let is_new = file::move_into_place(disk, &from, &to)?;
        if let Some(rows) = &mut rows {
            let gone = staged.tail_batches.min(rows.len());
            rows.drain(..gone);
        }
        (staged.tail_batches, staged.tail_bytes) = (0, 0);
        is_new
    };
    file::sync_folder(disk, folder)?;
    file::sync_folder(disk, &stage_folder)?;
    Ok(is_new)
}

/// Leaves the rows of a staged file to the disk alone.
fn drop_from_tail(staged: &mut StagedFile, tail: Option<&HistoryTail>) {
    if let Some(tail) = tail {
        let mut rows = tail.write().unwrap_or_else(PoisonError::into_inner);
        let gone = staged.tail_batches.min(rows.len());
        rows.drain(..gone);
    }
    (staged.tail_batches, staged.tail_bytes) = (0, 0);
}

/// Refuses a column whose type differs from the one in the newest files: readers could not read both.
fn refuse_changed_types(table: &Path, files: &[HistoryFile], metric: &str, schema: &SchemaRef) -> Result<()> {
    for file in files.iter().rev().take(COMPARED_FILES_MAX) {
        let written = files::schema_of_file(&file.path)?;
        for field in schema.fields() {
            let Ok(old) = written.field_with_name(field.name()) else { continue };
            if old.data_type() != field.data_type() {
                let (name, old, new) = (field.name(), type_word(old), type_word(field));
                return Err(Error::user(format!(
                    "column `{name}` of pipeline `{metric}` is {new} now and {old} in its history ({}): give it a new \
                     name, such as `{name}_{}`, or move the folder {} away",
                    file.path.display(),
                    new.split('(').next().unwrap_or("2"),
                    table.display(),
                )));
            }
        }
    }
    Ok(())
}
