//! Merges the files of one hour into few: the same rows, in the same order.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::parquet::arrow::ArrowWriter;
use ::parquet::arrow::arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder};
use arrow::datatypes::{Schema, SchemaRef};
use pipeline::error::{Error, Result};

use super::Facts;
use super::file::{self, failed};
use super::names::FileName;

/// Rows that are read at a time.
const READ_ROWS: usize = 8192;

/// Most rows of a row group: a reader passes over a group by its statistics, and its threads share a file by its groups.
/// Fewer would make the footer long and the reading slow.
const ROW_GROUP_ROWS: usize = 1 << 19;

/// Most bytes of a row group, encoded: the writer keeps one in memory.
const ROW_GROUP_BYTES: usize = 32 << 20;

/// Zstandard level of a merged file. It is written once, beside the stream, and read often.
const LEVEL: i32 = 3;

/// A file to merge.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub(super) path: PathBuf,
    pub(super) name: FileName,
    pub(super) bytes: u64,
}

/// Whether merging `files` files of together `bytes` bytes into such of `target` bytes makes them fewer than half.
pub(super) fn is_worthwhile(files: usize, bytes: u64, target: u64) -> bool {
    files as u64 > 2 * bytes.div_ceil(target.max(1)).max(1)
}

/// Writes the rows of `sources`, which are in the order of their names, into new files in `folder`, each of about
/// `target` bytes, and makes them durable. Returns their names, which none of the sources has.
pub(super) fn merge(
    sources: &[Source],
    folder: &Path,
    sink: &str,
    metric: &str,
    target: u64,
    between: &mut dyn FnMut(),
) -> Result<Vec<String>> {
    // Numbered on, so that a reader that has listed older merged files cannot meet other rows under their names.
    let merged_before = sources.iter().filter(|source| source.name.compacted).map(|source| source.name.part + 1);
    let mut part = merged_before.max().unwrap_or(0);
    let mut names = Vec::new();
    let mut open: Option<Output> = None;
    for source in sources {
        let input = Input::open(&source.path)?;
        // Columns that came or went are null where a file lacks them: such files are left apart.
        let full = |output: &mut Output| output.schema != input.schema || output.bytes() >= target;
        if let Some(full) = open.take_if(full) {
            names.push(full.finish(sink, metric, part)?);
            part += 1;
            between();
        }
        let output = match &mut open {
            Some(output) => output,
            None => open.insert(Output::create(folder, &input, source.name.first)?),
        };
        output.take(input, source)?;
    }
    if let Some(output) = open {
        names.push(output.finish(sink, metric, part)?);
    }
    Ok(names)
}

/// A file that is read.
struct Input {
    schema: SchemaRef,
    facts: Facts,
    rows: i64,
    reader: ParquetRecordBatchReaderBuilder<File>,
}

impl Input {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(failed("read", path))?;
        let metadata = ArrowReaderMetadata::load(&file, ArrowReaderOptions::new()).map_err(unread(path))?;
        let facts = file::facts_of(metadata.metadata()).ok_or_else(|| {
            Error::outside(format!("cannot merge {}: it is not as this program writes history", path.display()))
        })?;
        let rows = metadata.metadata().file_metadata().num_rows();
        // Without the footer's other pairs, which differ from file to file.
        let schema = Arc::new(Schema::new(metadata.schema().fields().clone()));
        let reader = ParquetRecordBatchReaderBuilder::new_with_metadata(file, metadata).with_batch_size(READ_ROWS);
        Ok(Self { schema, facts, rows, reader })
    }
}

/// A file that is written. Its name is known when its last source is.
struct Output {
    path: PathBuf,
    schema: SchemaRef,
    writer: ArrowWriter<File>,
    facts: Facts,
    /// First and last checkpoint whose rows it has.
    first: u64,
    last: u64,
    rows: i64,
}

impl Output {
    fn create(folder: &Path, input: &Input, first: u64) -> Result<Self> {
        let path = folder.join("part");
        let file = File::create(&path).map_err(failed("write", &path))?;
        let properties = file::properties(LEVEL)?
            .set_max_row_group_row_count(Some(ROW_GROUP_ROWS))
            .set_max_row_group_bytes(Some(ROW_GROUP_BYTES))
            .build();
        let writer =
            ArrowWriter::try_new(file, Arc::clone(&input.schema), Some(properties)).map_err(unwritten(&path))?;
        let (schema, facts) = (Arc::clone(&input.schema), input.facts);
        Ok(Self { path, schema, writer, facts, first, last: first, rows: 0 })
    }

    fn bytes(&self) -> u64 {
        (self.writer.bytes_written() + self.writer.in_progress_size()) as u64
    }

    fn take(&mut self, input: Input, source: &Source) -> Result<()> {
        let expected = input.rows;
        let mut rows = 0;
        for batch in input.reader.build().map_err(unread(&source.path))? {
            let batch = batch.map_err(unread(&source.path))?;
            rows += batch.num_rows() as i64;
            self.writer.write(&batch).map_err(unwritten(&self.path))?;
        }
        if rows != expected {
            let path = source.path.display();
            return Err(Error::outside(format!("{path} has {rows} rows, its footer says {expected}")));
        }
        self.rows += rows;
        self.facts = self.facts.merge(input.facts);
        self.last = self.last.max(source.name.last);
        Ok(())
    }

    /// Makes the file durable under its name.
    fn finish(mut self, sink: &str, metric: &str, part: u64) -> Result<String> {
        for pair in file::footer(sink, metric, self.facts) {
            self.writer.append_key_value_metadata(pair);
        }
        let metadata = self.writer.finish().map_err(unwritten(&self.path))?;
        let written = metadata.file_metadata().num_rows();
        if written != self.rows {
            return Err(Error::internal(format!("{written} rows of {} were merged", self.rows)));
        }
        self.writer.inner().sync_all().map_err(failed("sync", &self.path))?;
        let name = FileName { first: self.first, last: self.last, part, compacted: true }.write(sink);
        let to = self.path.with_file_name(&name);
        std::fs::rename(&self.path, &to).map_err(failed("rename", &self.path))?;
        Ok(name)
    }
}

fn unread<E: std::error::Error + Send + Sync + 'static>(path: &Path) -> impl Fn(E) -> Error + '_ {
    move |cause| Error::outside(format!("cannot read {}", path.display())).because(cause)
}

fn unwritten(path: &Path) -> impl Fn(::parquet::errors::ParquetError) -> Error + '_ {
    move |cause| Error::outside(format!("cannot write {}", path.display())).because(cause)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_merge_must_make_fewer_than_half() {
        for (files, bytes, worthwhile) in [
            (0, 0, false),
            (1, 10, false),
            (2, 10, false),
            (3, 10, true),
            (3, 100, true),
            (3, 101, false),
            (5, 101, true),
            (1800, 900, true),
            (18, 900, false),
        ] {
            assert_eq!(is_worthwhile(files, bytes, 100), worthwhile, "{files} files of {bytes} bytes");
        }
    }
}
