//! What the footers of files tell, without what Parquet and SQL do not agree on.
//!
//! A footer passes over NaN when it names the least and the greatest float, but in a query NaN is greater than every
//! number: of a file with 2 and NaN the footer says that nothing is above 2, and `WHERE x > 100` would lose a row as soon
//! as it is published. So do the limits that a running query sets itself (`ORDER BY x DESC LIMIT 1`). Leaving such
//! conditions out of what a scan is asked for is not enough: the planner adds them, and its own, later on.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use datafusion::common::Result;
use datafusion::datasource::listing::PartitionedFile;
use datafusion::datasource::physical_plan::ParquetFileReaderFactory;
use datafusion::datasource::physical_plan::parquet::CachedParquetFileReaderFactory;
// There is another type of this name, whose entries are read again and again.
use datafusion::datasource::physical_plan::parquet::metadata::CachedParquetMetaData;
use datafusion::execution::cache::cache_manager::{CachedFileMetadataEntry, FileMetadataCache};
use datafusion::object_store::{ObjectMeta, ObjectStore};
use datafusion::parquet::arrow::arrow_reader::ArrowReaderOptions;
use datafusion::parquet::arrow::async_reader::AsyncFileReader;
use datafusion::parquet::basic::Type;
use datafusion::parquet::errors::Result as ParquetResult;
use datafusion::parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData, RowGroupMetaData};
use datafusion::parquet::file::page_index::column_index::ColumnIndexMetaData;
use datafusion::parquet::file::statistics::Statistics;
use datafusion::physical_plan::metrics::ExecutionPlanMetricsSet;
use futures::FutureExt;
use futures::future::BoxFuture;

/// Reads files, and keeps their footers in a cache.
#[derive(Debug)]
pub(super) struct Readers {
    inner: CachedParquetFileReaderFactory,
    cache: Arc<FileMetadataCache>,
}

impl Readers {
    pub(super) fn new(store: Arc<dyn ObjectStore>, cache: Arc<FileMetadataCache>) -> Self {
        Self { inner: CachedParquetFileReaderFactory::new(store, Arc::clone(&cache)), cache }
    }
}

impl ParquetFileReaderFactory for Readers {
    fn create_reader(
        &self,
        partition: usize,
        file: PartitionedFile,
        footer_bytes: Option<usize>,
        metrics: &ExecutionPlanMetricsSet,
    ) -> Result<Box<dyn AsyncFileReader + Send>> {
        let meta = file.object_meta.clone();
        let inner = self.inner.create_reader(partition, file, footer_bytes, metrics)?;
        Ok(Box::new(Reader { inner, meta, cache: Arc::clone(&self.cache) }))
    }
}

struct Reader {
    inner: Box<dyn AsyncFileReader + Send>,
    meta: ObjectMeta,
    cache: Arc<FileMetadataCache>,
}

impl AsyncFileReader for Reader {
    fn get_bytes(&mut self, range: Range<u64>) -> BoxFuture<'_, ParquetResult<Bytes>> {
        self.inner.get_bytes(range)
    }

    fn get_byte_ranges(&mut self, ranges: Vec<Range<u64>>) -> BoxFuture<'_, ParquetResult<Vec<Bytes>>> {
        self.inner.get_byte_ranges(ranges)
    }

    fn get_metadata<'a>(
        &'a mut self,
        options: Option<&'a ArrowReaderOptions>,
    ) -> BoxFuture<'a, ParquetResult<Arc<ParquetMetaData>>> {
        async move {
            let read = self.inner.get_metadata(options).await?;
            if !read.row_groups().iter().flat_map(RowGroupMetaData::columns).any(names_floats) {
                return Ok(read);
            }
            let agreed = Arc::new(agreed(&read)?);
            // The next reader has nothing left to do.
            let entry = Arc::new(CachedParquetMetaData::new(Arc::clone(&agreed)));
            self.cache.put(&self.meta.location, CachedFileMetadataEntry::new(self.meta.clone(), entry));
            Ok(agreed)
        }
        .boxed()
    }
}

/// The footer without the least and the greatest of floats.
fn agreed(footer: &ParquetMetaData) -> ParquetResult<ParquetMetaData> {
    let column = |column: &ColumnChunkMetaData| match is_float(column) {
        true => without_floats(column),
        false => Ok(column.clone()),
    };
    let row_group = |row_group: &RowGroupMetaData| {
        let columns = row_group.columns().iter().map(column).collect::<ParquetResult<_>>()?;
        row_group.clone().into_builder().set_column_metadata(columns).build()
    };
    let row_groups = footer.row_groups().iter().map(row_group).collect::<ParquetResult<_>>()?;
    let pages = footer.column_index().map(|row_groups| {
        let of_columns = |pages: &Vec<ColumnIndexMetaData>| pages.iter().map(without_float_pages).collect();
        row_groups.iter().map(of_columns).collect()
    });
    Ok(footer.clone().into_builder().set_row_groups(row_groups).set_column_index(pages).build())
}

fn is_float(column: &ColumnChunkMetaData) -> bool {
    matches!(column.column_type(), Type::FLOAT | Type::DOUBLE)
}

fn names_floats(column: &ColumnChunkMetaData) -> bool {
    let is_told = |told: &Statistics| told.min_bytes_opt().is_some() || told.max_bytes_opt().is_some();
    is_float(column) && (column.statistics().is_some_and(is_told) || column.column_index_offset().is_some())
}

/// A column that tells only its nulls, here and page by page.
fn without_floats(column: &ColumnChunkMetaData) -> ParquetResult<ColumnChunkMetaData> {
    let nulls = column.statistics().and_then(Statistics::null_count_opt);
    let told = match column.column_type() {
        Type::FLOAT => Statistics::float(None, None, None, nulls, false),
        _ => Statistics::double(None, None, None, nulls, false),
    };
    let builder = column.clone().into_builder().set_statistics(told);
    builder.set_column_index_offset(None).set_column_index_length(None).build()
}

fn without_float_pages(pages: &ColumnIndexMetaData) -> ColumnIndexMetaData {
    match pages {
        ColumnIndexMetaData::FLOAT(_) | ColumnIndexMetaData::DOUBLE(_) => ColumnIndexMetaData::NONE,
        other => other.clone(),
    }
}
