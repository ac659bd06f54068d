//! Runs one read-only query: names resolved to tables, planned, executed within its limits.

use std::sync::Arc;

use arrow::array::{RecordBatch, RecordBatchOptions};
use arrow::compute::cast;
use arrow::datatypes::{DataType, FieldRef, Fields, Schema};
use arrow::error::ArrowError;
use datafusion::catalog::{
    CatalogProvider, MemoryCatalogProvider, MemorySchemaProvider, SchemaProvider, TableProvider,
};
use datafusion::common::{DataFusionError, SchemaError, TableReference};
use datafusion::execution::cache::cache_manager::{CacheManagerConfig, FileMetadataCache};
use datafusion::execution::cache::default_cache::DefaultCache;
use datafusion::execution::context::{SQLOptions, SessionConfig, SessionContext};
use datafusion::execution::disk_manager::{DiskManagerBuilder, DiskManagerMode};
use datafusion::execution::memory_pool::GreedyMemoryPool;
use datafusion::execution::object_store::ObjectStoreUrl;
use datafusion::execution::runtime_env::RuntimeEnvBuilder;
use datafusion::logical_expr::LogicalPlan;
use datafusion::sql::parser::Statement as DfStatement;
use datafusion::sql::sqlparser::ast::Statement as SqlStatement;
use futures::StreamExt;

use super::arg_max;
use super::size;
use super::store::FilesStore;
use super::table::QueriedTable;
use super::{Limits, QueryError, QueryErrorKind, QueryResult, Table, bytes_of};
use crate::config::did_you_mean;

/// The one catalog.
const CATALOG: &str = "tailwater";
/// The schema of bare names.
const HISTORY: &str = "history";
/// The schema of all revisions.
const VERSIONS: &str = "versions";
/// DataFusion's own schema behind `SHOW` and `DESCRIBE`.
const INFORMATION: &str = "information_schema";

/// Times that a query starts anew because files vanished under it: merged or expired, and gone from where they are kept
/// for a while too.
const TRIES_MAX: usize = 5;

/// Rows that an operator works on at a time. Some aggregates (`first_value`, `last_value`) cost so much a batch that
/// DataFusion's 8,192 make them half as fast; of more than this many the columns no longer stay in the processor's cache.
const BATCH_ROWS: usize = 16 * 1024;

/// Most bytes of footers that are kept from query to query; those asked for longest ago go first.
const FOOTERS_BYTES_MAX: usize = 32 << 20;

type Outcome<T> = Result<T, QueryError>;

/// Footers of files that were read, each good for the file of that name, size and time of change.
pub(super) type Footers = Arc<FileMetadataCache>;

/// None yet.
pub(super) fn footers() -> Footers {
    Arc::new(DefaultCache::new(FOOTERS_BYTES_MAX))
}

/// Runs `sql` over `tables`.
pub(super) async fn run(tables: &[Table], footers: &Footers, sql: &str, limits: &Limits) -> Outcome<QueryResult> {
    let mut tries = 1;
    loop {
        let attempt = Attempt::new(tables, footers, limits)?;
        let error = match attempt.run(sql, limits).await {
            Ok(result) => return Ok(result),
            Err(error) => error,
        };
        if !attempt.queried.iter().any(|table| table.lost_a_file()) {
            return Err(error);
        }
        if tries == TRIES_MAX {
            let message = format!("files of the history vanished during the query, {TRIES_MAX} times: {error}");
            return Err(QueryError::new(QueryErrorKind::Files, message));
        }
        tries += 1;
    }
}

/// A session that lives for one try: nothing of an earlier one but footers, no listing above all, can be seen.
struct Attempt<'a> {
    tables: &'a [Table],
    context: SessionContext,
    queried: Vec<Arc<QueriedTable>>,
}

impl<'a> Attempt<'a> {
    fn new(tables: &'a [Table], footers: &Footers, limits: &Limits) -> Outcome<Self> {
        let threads = tokio::runtime::Handle::current().metrics().num_workers();
        let mut config = SessionConfig::new()
            .with_target_partitions(threads)
            .with_batch_size(BATCH_ROWS)
            .with_default_catalog_and_schema(CATALOG, HISTORY)
            .with_create_default_catalog_and_schema(false)
            .with_information_schema(true);
        config.options_mut().sql_parser.enable_ident_normalization = false;
        let caches = CacheManagerConfig::default()
            .with_file_metadata_cache(Some(Arc::clone(footers)))
            .with_metadata_cache_limit(FOOTERS_BYTES_MAX);
        let runtime = RuntimeEnvBuilder::new()
            .with_cache_manager(caches)
            .with_memory_pool(Arc::new(GreedyMemoryPool::new(limits.memory)))
            .with_disk_manager_builder(DiskManagerBuilder::default().with_mode(DiskManagerMode::Disabled))
            .build_arc()
            .map_err(|e| describe(&e, limits))?;
        let files = FilesStore::new(tables.iter().map(|table| table.folder.as_path()));
        runtime.register_object_store(ObjectStoreUrl::local_filesystem().as_ref(), Arc::new(files));
        let context = SessionContext::new_with_config_rt(config, runtime);
        arg_max::functions().into_iter().for_each(|function| context.register_udaf(function));
        let queried: Vec<_> = tables.iter().map(|table| Arc::new(QueriedTable::new(table))).collect();
        context.register_catalog(CATALOG, catalog(tables, &queried).map_err(|e| describe(&e, limits))?);
        Ok(Self { tables, context, queried })
    }

    async fn run(&self, sql: &str, limits: &Limits) -> Outcome<QueryResult> {
        let plan = self.plan(sql, limits).await?;
        let described = |e: DataFusionError| describe(&e, limits);
        let frame = self.context.execute_logical_plan(plan).await.map_err(described)?;
        let schema = Arc::clone(frame.schema().inner());
        let mut stream = frame.execute_stream().await.map_err(described)?;
        let mut result = QueryResult { schema, batches: Vec::new() };
        let (mut rows, mut bytes) = (0, 0);
        while let Some(batch) = stream.next().await {
            let batch = plain_text(&batch.map_err(described)?).map_err(described)?;
            rows += batch.num_rows();
            bytes += bytes_of(&batch);
            if rows > limits.rows {
                return Err(QueryError {
                    kind: QueryErrorKind::Rows,
                    message: format!("the result has more rows than its limit of {}", limits.rows),
                    hint: Some("group the rows or add a LIMIT".to_owned()),
                });
            }
            if bytes > limits.memory {
                return Err(too_much_memory(limits));
            }
            if batch.num_rows() > 0 {
                // The stream's own schema may say more (metadata) or less (nulls) than the plan's.
                result.schema = batch.schema();
                result.batches.push(batch);
            }
        }
        Ok(result)
    }

    /// Plans a query, and nothing else than a query.
    async fn plan(&self, sql: &str, limits: &Limits) -> Outcome<LogicalPlan> {
        let wrong = |message: String| QueryError::new(QueryErrorKind::Sql, message);
        if sql.trim().is_empty() {
            return Err(wrong("an SQL query is missing".to_owned()));
        }
        let state = self.context.state();
        let dialect = state.config().options().sql_parser.dialect;
        let statement = state.sql_to_statement(sql, &dialect).map_err(|e| describe(&e, limits))?;
        if !is_query(&statement) {
            return Err(wrong(
                "history is read-only: only SELECT, WITH, VALUES, EXPLAIN, DESCRIBE and SHOW TABLES are allowed"
                    .to_owned(),
            ));
        }
        size::refuse_statement(&statement)?;
        for reference in state.resolve_table_references(&statement).map_err(|e| describe(&e, limits))? {
            self.check_name(&reference)?;
        }
        let plan = state.statement_to_plan(statement).await.map_err(|e| describe(&e, limits))?;
        let read_only = SQLOptions::new().with_allow_ddl(false).with_allow_dml(false).with_allow_statements(false);
        read_only.verify_plan(&plan).map_err(|e| describe(&e, limits))?;
        size::refuse_plan(&plan)?;
        Ok(plan)
    }

    /// Whether a name is a table, and only one.
    fn check_name(&self, reference: &TableReference) -> Outcome<()> {
        let name = reference.table();
        let sinks: Vec<&str> = self.tables.iter().filter(|t| t.name == name).map(|t| t.sink.as_str()).collect();
        let known = match reference.schema() {
            Some(INFORMATION) => true,
            None if sinks.is_empty() && self.context.table_function(name).is_ok() => true,
            Some(schema) if sinks.contains(&schema) => true,
            None | Some(HISTORY | VERSIONS) if sinks.len() > 1 => {
                let names: Vec<String> = sinks.iter().map(|sink| format!("`{sink}.{name}`")).collect();
                return Err(QueryError {
                    kind: QueryErrorKind::Sql,
                    message: format!("`{name}` is in the history of {} sinks", sinks.len()),
                    hint: Some(format!("write {}", names.join(" or "))),
                });
            }
            None | Some(HISTORY | VERSIONS) => !sinks.is_empty(),
            Some(_) => false,
        };
        if known && reference.catalog().is_none_or(|catalog| catalog == CATALOG) {
            return Ok(());
        }
        // The table may be right and the sink wrong.
        let hint = if sinks.is_empty() {
            did_you_mean(name, self.tables.iter().map(|t| &t.name))
        } else {
            did_you_mean(&reference.to_string(), sinks.iter().map(|sink| format!("{sink}.{name}")))
        };
        let none = || "no pipeline writes to a `parquet` sink".to_owned();
        Err(QueryError {
            kind: QueryErrorKind::Sql,
            message: format!("no table `{reference}` in the history"),
            hint: hint.or_else(|| self.tables.is_empty().then(none)),
        })
    }
}

/// Every name of every table. Until a pipeline can have revised rows, all revisions are the newest ones.
fn catalog(tables: &[Table], queried: &[Arc<QueriedTable>]) -> Result<Arc<MemoryCatalogProvider>, DataFusionError> {
    let catalog = MemoryCatalogProvider::new();
    let schema = |name: &str| -> Result<Arc<dyn SchemaProvider>, DataFusionError> {
        if catalog.schema(name).is_none() {
            catalog.register_schema(name, Arc::new(MemorySchemaProvider::new()))?;
        }
        catalog.schema(name).ok_or_else(|| DataFusionError::Internal(format!("schema {name} is not there")))
    };
    schema(HISTORY)?;
    schema(VERSIONS)?;
    for (table, provider) in tables.iter().zip(queried) {
        let alone = tables.iter().filter(|other| other.name == table.name).count() == 1;
        let mut schemas = vec![table.sink.as_str()];
        if alone {
            schemas.extend([HISTORY, VERSIONS]);
        }
        for name in schemas {
            let schema = schema(name)?;
            if !schema.table_exist(&table.name) {
                schema.register_table(table.name.clone(), Arc::clone(provider) as Arc<dyn TableProvider>)?;
            }
        }
    }
    Ok(Arc::new(catalog))
}

fn is_query(statement: &DfStatement) -> bool {
    match statement {
        DfStatement::Explain(explain) => is_query(&explain.statement),
        DfStatement::Statement(statement) => matches!(
            statement.as_ref(),
            SqlStatement::Query(_)
                | SqlStatement::ExplainTable { .. }
                | SqlStatement::ShowTables { .. }
                | SqlStatement::ShowColumns { .. }
        ),
        _ => false,
    }
}

/// Text as the pipelines have it: inside a query it is views, which are faster.
fn plain_text(batch: &RecordBatch) -> Result<RecordBatch, DataFusionError> {
    let is_view = |field: &FieldRef| *field.data_type() == DataType::Utf8View;
    let schema = batch.schema_ref();
    if !schema.fields().iter().any(is_view) {
        return Ok(batch.clone());
    }
    let plain = |field: &FieldRef| match is_view(field) {
        true => Arc::new(field.as_ref().clone().with_data_type(DataType::Utf8)),
        false => Arc::clone(field),
    };
    let schema =
        Schema::new_with_metadata(schema.fields().iter().map(plain).collect::<Fields>(), schema.metadata().clone());
    let casted = batch.columns().iter().zip(schema.fields()).map(|(column, field)| cast(column, field.data_type()));
    let columns = casted.collect::<Result<Vec<_>, _>>()?;
    let options = RecordBatchOptions::new().with_row_count(Some(batch.num_rows()));
    Ok(RecordBatch::try_new_with_options(Arc::new(schema), columns, &options)?)
}

fn too_much_memory(limits: &Limits) -> QueryError {
    QueryError {
        kind: QueryErrorKind::Memory,
        message: format!("the query needs more than its memory limit of {} bytes", limits.memory),
        hint: Some("read fewer columns or a shorter time, or group the rows".to_owned()),
    }
}

/// DataFusion's error for the author of the query.
fn describe(error: &DataFusionError, limits: &Limits) -> QueryError {
    match error {
        DataFusionError::Context(_, inner) | DataFusionError::Diagnostic(_, inner) => describe(inner, limits),
        DataFusionError::Shared(inner) => describe(inner, limits),
        DataFusionError::Collection(errors) if !errors.is_empty() => describe(&errors[0], limits),
        DataFusionError::ResourcesExhausted(_) => too_much_memory(limits),
        DataFusionError::SchemaError(error, _) => match error.as_ref() {
            SchemaError::FieldNotFound { field, valid_fields } => {
                let mut names: Vec<&str> = valid_fields.iter().map(|column| column.name.as_str()).collect();
                names.dedup();
                QueryError {
                    kind: QueryErrorKind::Sql,
                    message: format!("no column `{}` here", field.name),
                    hint: did_you_mean(&field.name, names),
                }
            }
            other => QueryError::new(QueryErrorKind::Sql, clean(&other.to_string())),
        },
        error if is_of_files(error) => QueryError {
            kind: QueryErrorKind::Files,
            message: format!("cannot read the history: {}", error.strip_backtrace()),
            hint: Some("`pipeline doctor` reads every file and names those that are damaged".to_owned()),
        },
        DataFusionError::Internal(_) | DataFusionError::ExecutionJoin(_) => {
            QueryError::new(QueryErrorKind::Internal, error.strip_backtrace())
        }
        // Division by zero, a cast that fails, a function that does not exist: the text must change.
        other => QueryError::new(QueryErrorKind::Sql, clean(&other.strip_backtrace())),
    }
}

/// Whether a file is missing or damaged.
fn is_of_files(error: &DataFusionError) -> bool {
    match error {
        DataFusionError::ObjectStore(_) | DataFusionError::ParquetError(_) | DataFusionError::IoError(_) => true,
        // What goes wrong while rows are decoded comes by way of Arrow.
        DataFusionError::ArrowError(error, _) => {
            matches!(error.as_ref(), ArrowError::ParquetError(_) | ArrowError::IoError(..))
        }
        _ => false,
    }
}

/// Without the names of the libraries, and the first line only: further ones list all candidates.
fn clean(message: &str) -> String {
    let mut short = message.lines().next().unwrap_or(message).trim();
    const PREFIXES: [&str; 9] = [
        "SQL error: ",
        "ParserError(\"",
        "TokenizerError(\"",
        "sql parser error: ",
        "Error during planning: ",
        "Schema error: ",
        "Execution error: ",
        "Arrow error: ",
        "This feature is not implemented: ",
    ];
    while let Some(rest) = PREFIXES.iter().find_map(|prefix| short.strip_prefix(prefix)) {
        short = rest;
    }
    short
        .trim_end_matches("\")")
        .trim_end_matches(" No function matches the given name and argument types")
        .replace(" at Line: ", " at line ")
        .replace(", Column: ", ", column ")
}
