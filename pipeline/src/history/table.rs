//! One table as DataFusion sees it: the published files and the tail, each row once.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use arrow::array::{ArrayRef, AsArray, Date32Array, Int64Array, RecordBatch, RecordBatchOptions, new_null_array};
use arrow::compute::cast;
use arrow::datatypes::{FieldRef, Schema, SchemaRef};
use async_trait::async_trait;
use datafusion::catalog::{Session, TableProvider};
use datafusion::common::{DFSchema, DataFusionError, Result, ScalarValue, project_schema};
use datafusion::datasource::listing::PartitionedFile;
use datafusion::datasource::memory::{DataSourceExec, MemorySourceConfig};
use datafusion::datasource::physical_plan::{FileGroup, FileScanConfigBuilder, ParquetSource};
use datafusion::datasource::table_schema::TableSchema;
use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion::logical_expr::{Expr, TableProviderFilterPushDown, TableType};
use datafusion::object_store::{ObjectMeta, path::Path as StorePath};
use datafusion::physical_expr::{PhysicalExpr, conjunction};
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_plan::empty::EmptyExec;
use datafusion::physical_plan::union::UnionExec;

use super::Table;
use super::files::{self, DAY, HOUR, HistoryFile, day_and_hour, file_schema, place_columns};
use crate::plugin::HistoryTail;
use crate::time::now_us;

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
            folder: table.files_folder(),
            schema: TableSchema::builder(file_schema(&table.schema)).with_table_partition_cols(place_columns()).build(),
            tail: table.tail.clone(),
            snapshot: Mutex::default(),
        }
    }

    /// Whether a file that this query counted on is gone.
    pub(super) fn lost_a_file(&self) -> bool {
        let snapshot = self.snapshot.lock().unwrap_or_else(PoisonError::into_inner).clone();
        snapshot.is_some_and(|s| s.files.iter().any(|file| !file.path.exists()))
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
    fn scan_files(
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
        let files = files.into_iter().map(partitioned_file).collect::<Result<Vec<_>>>()?;
        let groups = FileGroup::new(files).split_files(state.config().target_partitions());
        let options = state.default_table_options().parquet;
        let mut source = ParquetSource::new(self.schema.clone()).with_table_parquet_options(options);
        if let Some(predicate) = physical_filter(state, filters, self.schema.table_schema())? {
            source = source.with_predicate(predicate);
        }
        let config = FileScanConfigBuilder::new(ObjectStoreUrl::local_filesystem(), Arc::new(source))
            .with_file_groups(groups)
            .with_projection_indices(projection.cloned())?
            .with_limit(limit)
            .build();
        Ok(Some(DataSourceExec::from_data_source(config)))
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
        let files = self.scan_files(state, &snapshot.files, projection, filters, limit)?;
        let tail = self.scan_tail(&snapshot, projection)?;
        let inputs: Vec<_> = files.into_iter().chain(tail).collect();
        if inputs.is_empty() {
            return Ok(Arc::new(EmptyExec::new(project_schema(self.schema.table_schema(), projection)?)));
        }
        UnionExec::try_new(inputs)
    }
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

fn partitioned_file(file: &HistoryFile) -> Result<PartitionedFile> {
    let metadata = std::fs::metadata(&file.path).map_err(DataFusionError::IoError)?;
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

fn store_path(path: &Path) -> Result<StorePath> {
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
