//! One table as DataFusion sees it: the published files and the tail, each row once.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::{ArrayRef, AsArray, Date32Array, Int64Array, RecordBatch, RecordBatchOptions, new_null_array};
use arrow::compute::cast;
use arrow::datatypes::{DataType, FieldRef, Fields, Schema, SchemaRef};
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::{
    ColumnStatistics, DFSchema, DataFusionError, Result, ScalarValue, Statistics, project_schema,
};
use datafusion::datasource::listing::PartitionedFile;
use datafusion::datasource::memory::{DataSourceExec, MemorySourceConfig};
use datafusion::datasource::physical_plan::parquet::ParquetAccessPlan;
use datafusion::datasource::physical_plan::parquet::metadata::DFParquetMetadata;
use datafusion::datasource::physical_plan::{FileGroup, FileScanConfigBuilder, ParquetSource};
use datafusion::datasource::table_schema::TableSchema;
use datafusion::execution::cache::cache_manager::FileMetadataCache;
use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion::logical_expr::{Expr, TableProviderFilterPushDown, TableType};
use datafusion::object_store::{ObjectMeta, ObjectStore, path::Path as StorePath};
use datafusion::physical_expr::{PhysicalExpr, conjunction};
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::empty::EmptyExec;
use datafusion::physical_plan::union::UnionExec;
use futures::StreamExt;

use super::Table;
use super::files::{self, DAY, HOUR, HistoryFile, day_and_hour, file_schema, place_columns};
use super::footers::Readers;
use crate::plugin::HistoryTail;
use crate::time::now_us;

/// Most files whose footers are read before a query is planned. More are small ones that are not merged yet, and their
/// footers would be read for nothing.
const FOOTERS_MAX: usize = 512;

/// Footers that are read at one time.
const FOOTERS_AT_ONCE: usize = 8;

/// A table for the time of one query: every scan of it sees the same rows.
#[derive(Debug)]
pub(super) struct QueriedTable {
    folder: PathBuf,
    schema: TableSchema,
    tail: Option<HistoryTail>,
    snapshot: Mutex<Option<Arc<Snapshot>>>,
}

/// What the table held at the first scan.
#[derive(Debug)]
struct Snapshot {
    files: Vec<HistoryFile>,
    tail: Vec<RecordBatch>,
    taken_us: i64,
}

impl QueriedTable {
    pub(super) fn new(table: &Table) -> Self {
        Self {
            folder: real_folder(&table.folder).join(&table.name),
            schema: TableSchema::builder(with_views(&file_schema(&table.schema)))
                .with_table_partition_cols(place_columns())
                .build(),
            tail: table.tail.clone(),
            snapshot: Mutex::default(),
        }
    }

    /// Whether a file that this query counted on is gone.
    pub(super) fn lost_a_file(&self) -> bool {
        let snapshot = self.snapshot.lock().unwrap_or_else(PoisonError::into_inner).clone();
        snapshot.is_some_and(|s| s.files.iter().any(|file| files::metadata(&self.folder, &file.path).is_err()))
    }

    fn snapshot(&self) -> Result<Arc<Snapshot>> {
        let mut kept = self.snapshot.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(snapshot) = &*kept {
            return Ok(Arc::clone(snapshot));
        }
        let list = || {
            let context = |e| DataFusionError::IoError(e).context(format!("cannot list {}", self.folder.display()));
            files::list(&self.folder).map_err(context)
        };
        let (files, tail) = match &self.tail {
            Some(tail) => {
                // The sink publishes a file and drops its rows under the write lock: listing and copying under
                // one read lock sees every row once.
                let rows = tail.read().unwrap_or_else(PoisonError::into_inner);
                (list()?, rows.clone())
            }
            None => (list()?, Vec::new()),
        };
        let snapshot = Arc::new(Snapshot { files, tail, taken_us: now_us() });
        *kept = Some(Arc::clone(&snapshot));
        Ok(snapshot)
    }

    /// Reads the files that may hold wanted rows.
    async fn scan_files(
        &self,
        state: &dyn Session,
        files: &[HistoryFile],
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Option<Arc<dyn ExecutionPlan>>> {
        let files = select_by_place(state, files, filters)?;
        if files.is_empty() {
            return Ok(None);
        }
        let files = files.into_iter().map(|file| self.partitioned(file)).collect::<Result<Vec<_>>>()?;
        let store = state.runtime_env().object_store(ObjectStoreUrl::local_filesystem())?;
        let cache = state.runtime_env().cache_manager.get_file_metadata_cache();
        let files = self.with_footers(files, &store, &cache).await;
        let schema = self.schema.table_schema();
        let told: Option<Vec<&Statistics>> = files.iter().map(|(file, _)| file.statistics.as_deref()).collect();
        let statistics = match told {
            Some(told) => Statistics::try_merge_iter(told, schema)?,
            None => Statistics::new_unknown(schema),
        };
        let predicate = physical_filter(state, filters, schema)?;
        let threads = state.config().target_partitions();
        let groups = match predicate {
            Some(_) => dealt_out(files, threads),
            None => FileGroup::new(files.into_iter().map(|(file, _)| file).collect()).split_files(threads),
        };
        let options = state.default_table_options().parquet;
        let reader = Arc::new(Readers::new(store, cache));
        let mut source = ParquetSource::new(self.schema.clone())
            .with_table_parquet_options(options)
            .with_parquet_file_reader_factory(reader);
        if let Some(predicate) = predicate {
            source = source.with_predicate(predicate);
        }
        let config = FileScanConfigBuilder::new(ObjectStoreUrl::local_filesystem(), Arc::new(source))
            .with_file_groups(groups)
            .with_statistics(statistics)
            .with_projection_indices(projection.cloned())?
            .with_limit(limit)
            .build();
        Ok(Some(DataSourceExec::from_data_source(config)))
    }

    /// With what the footers tell, if the files are few: of rows and values, so that whole files are ruled out before they
    /// are opened, and a count is known without reading a row; and the number of row groups.
    async fn with_footers(
        &self,
        files: Vec<PartitionedFile>,
        store: &Arc<dyn ObjectStore>,
        cache: &Arc<FileMetadataCache>,
    ) -> Vec<(PartitionedFile, Option<usize>)> {
        if files.len() > FOOTERS_MAX {
            return files.into_iter().map(|file| (file, None)).collect();
        }
        let told = files.into_iter().map(async |file| {
            let footer = DFParquetMetadata::new(store.as_ref(), &file.object_meta);
            let footer = footer.with_file_metadata_cache(Some(Arc::clone(cache)));
            let schema = self.schema.file_schema();
            match (footer.fetch_statistics(schema).await, footer.fetch_metadata().await) {
                (Ok(statistics), Ok(metadata)) => {
                    (file.with_statistics(Arc::new(reliable(statistics, schema))), Some(metadata.num_row_groups()))
                }
                // Whoever reads it will say what is wrong with it.
                _ => (file, None),
            }
        });
        futures::stream::iter(told).buffered(FOOTERS_AT_ONCE).collect().await
    }

    fn partitioned(&self, file: &HistoryFile) -> Result<PartitionedFile> {
        let metadata = files::metadata(&self.folder, &file.path).map_err(DataFusionError::IoError)?;
        let meta = ObjectMeta {
            location: store_path(&file.path)?,
            last_modified: metadata.modified().map_err(DataFusionError::IoError)?.into(),
            size: metadata.len(),
            e_tag: None,
            version: None,
        };
        let place = vec![ScalarValue::Date32(Some(file.day)), ScalarValue::Int64(Some(file.hour))];
        Ok(PartitionedFile::new_from_meta(meta).with_partition_values(place))
    }

    /// Reads the rows that are not published yet. They count as published now.
    fn scan_tail(
        &self,
        snapshot: &Snapshot,
        projection: Option<&Vec<usize>>,
    ) -> Result<Option<Arc<dyn ExecutionPlan>>> {
        if snapshot.tail.is_empty() {
            return Ok(None);
        }
        let schema = self.schema.table_schema();
        let (day, hour) = day_and_hour(snapshot.taken_us);
        let adapted = snapshot.tail.iter().map(|batch| adapt(batch, schema, day, hour)).collect::<Result<Vec<_>>>()?;
        Ok(Some(MemorySourceConfig::try_new_exec(&[adapted], Arc::clone(schema), projection.cloned())?))
    }
}

#[async_trait]
impl TableProvider for QueriedTable {
    fn schema(&self) -> SchemaRef {
        Arc::clone(self.schema.table_schema())
    }

    fn table_type(&self) -> TableType {
        TableType::Base
    }

    fn supports_filters_pushdown(&self, filters: &[&Expr]) -> Result<Vec<TableProviderFilterPushDown>> {
        // Statistics only rule out files and row groups; the rows are filtered again above.
        Ok(vec![TableProviderFilterPushDown::Inexact; filters.len()])
    }

    async fn scan(
        &self,
        state: &dyn Session,
        projection: Option<&Vec<usize>>,
        filters: &[Expr],
        limit: Option<usize>,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let snapshot = self.snapshot()?;
        let files = self.scan_files(state, &snapshot.files, projection, filters, limit).await?;
        let tail = self.scan_tail(&snapshot, projection)?;
        let inputs: Vec<_> = files.into_iter().chain(tail).collect();
        if inputs.is_empty() {
            return Ok(Arc::new(EmptyExec::new(project_schema(self.schema.table_schema(), projection)?)));
        }
        UnionExec::try_new(inputs)
    }
}

/// Row groups of the files, dealt out to the threads in turn: rows of one time lie together, and a filter for that time
/// must not leave them all to one thread. Where their number is not known, whole files are.
fn dealt_out(files: Vec<(PartitionedFile, Option<usize>)>, threads: usize) -> Vec<FileGroup> {
    let threads = threads.max(1);
    let mut hands = vec![Vec::new(); threads];
    let mut dealt = 0;
    for (file, row_groups) in files {
        let Some(row_groups) = row_groups else {
            hands[dealt % threads].push(file);
            dealt += 1;
            continue;
        };
        let mut plans = vec![ParquetAccessPlan::new_none(row_groups); threads.min(row_groups)];
        let first = dealt % threads;
        for row_group in 0..row_groups {
            plans[row_group % threads].scan(row_group);
        }
        for (offset, plan) in plans.into_iter().enumerate() {
            hands[(first + offset) % threads].push(file.clone().with_extension(plan));
        }
        dealt += row_groups;
    }
    hands.into_iter().filter(|hand| !hand.is_empty()).map(FileGroup::new).collect()
}

/// Least and greatest values only of columns for which Parquet and SQL agree on them: not of texts, which a footer may
/// have cut, nor of floats (see [`footers`](super::footers)).
fn reliable(mut statistics: Statistics, schema: &SchemaRef) -> Statistics {
    for (column, field) in statistics.column_statistics.iter_mut().zip(schema.fields()) {
        let agreed = matches!(field.data_type(), DataType::Int64 | DataType::Timestamp(..) | DataType::Date32);
        if !agreed {
            *column = ColumnStatistics { null_count: column.null_count, ..ColumnStatistics::new_unknown() };
        }
    }
    statistics
}

/// The same columns with texts as views: groups and filters over them are faster.
fn with_views(schema: &SchemaRef) -> SchemaRef {
    let view = |field: &FieldRef| match field.data_type() {
        DataType::Utf8 => Arc::new(field.as_ref().clone().with_data_type(DataType::Utf8View)),
        _ => Arc::clone(field),
    };
    Arc::new(Schema::new(schema.fields().iter().map(view).collect::<Fields>()))
}

/// The files whose day and hour of publishing pass every filter that names nothing else.
fn select_by_place<'a>(
    state: &dyn Session,
    files: &'a [HistoryFile],
    filters: &[Expr],
) -> Result<Vec<&'a HistoryFile>> {
    let of_place = |filter: &&Expr| filter.column_refs().iter().all(|column| [DAY, HOUR].contains(&column.name()));
    let filters: Vec<Expr> = filters.iter().filter(of_place).cloned().collect();
    let schema: SchemaRef = Arc::new(Schema::new(place_columns()));
    let Some(filter) = physical_filter(state, &filters, &schema)? else { return Ok(files.iter().collect()) };
    let days: ArrayRef = Arc::new(Date32Array::from_iter_values(files.iter().map(|f| f.day)));
    let hours: ArrayRef = Arc::new(Int64Array::from_iter_values(files.iter().map(|f| f.hour)));
    let places = RecordBatch::try_new(schema, vec![days, hours])?;
    let wanted = filter.evaluate(&places)?.into_array(files.len())?;
    let wanted = wanted.as_boolean();
    Ok(files.iter().zip(wanted).filter(|(_, wanted)| *wanted == Some(true)).map(|(file, _)| file).collect())
}

/// The filters as one condition over `schema`. One that cannot be planned alone (a subquery) is left out:
/// it is applied above the scan anyway.
fn physical_filter(state: &dyn Session, filters: &[Expr], schema: &SchemaRef) -> Result<Option<Arc<dyn PhysicalExpr>>> {
    let df_schema = DFSchema::try_from(Arc::clone(schema))?;
    let planned: Vec<_> = filters
        .iter()
        .filter(|filter| !filter.is_volatile())
        .filter_map(|filter| state.create_physical_expr(filter.clone(), &df_schema).ok())
        .collect();
    Ok((!planned.is_empty()).then(|| conjunction(planned)))
}

/// The folder without `..` and links, which the paths of an object store cannot have. One that is not there stays as it is.
pub(super) fn real_folder(folder: &Path) -> PathBuf {
    std::fs::canonicalize(folder).unwrap_or_else(|_| folder.to_owned())
}

pub(super) fn store_path(path: &Path) -> Result<StorePath> {
    let absolute = std::path::absolute(path).map_err(DataFusionError::IoError)?;
    StorePath::from_absolute_path(absolute).map_err(|e| DataFusionError::External(Box::new(e)))
}

/// `batch` with the columns of `schema`: by name, a missing one null, `dt` and `hh` as given.
fn adapt(batch: &RecordBatch, schema: &SchemaRef, day: i32, hour: i64) -> Result<RecordBatch> {
    let rows = batch.num_rows();
    let column = |field: &FieldRef| -> Result<ArrayRef> {
        match batch.column_by_name(field.name()) {
            Some(array) if array.data_type() == field.data_type() => Ok(Arc::clone(array)),
            Some(array) => Ok(cast(array, field.data_type())?),
            None if field.name() == DAY => Ok(Arc::new(Date32Array::from_value(day, rows))),
            None if field.name() == HOUR => Ok(Arc::new(Int64Array::from_value(hour, rows))),
            None => Ok(new_null_array(field.data_type(), rows)),
        }
    };
    let columns = schema.fields().iter().map(column).collect::<Result<Vec<_>>>()?;
    let options = RecordBatchOptions::new().with_row_count(Some(rows));
    Ok(RecordBatch::try_new_with_options(Arc::clone(schema), columns, &options)?)
}
