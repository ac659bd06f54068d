//! `sql`: rows into PostgreSQL, MySQL, MariaDB and SQLite.

mod columns;
mod connection;
mod statement;

use std::path::PathBuf;
use std::time::Duration;

use arrow::array::RecordBatch;
use async_trait::async_trait;
use indexmap::IndexMap;
use pipeline::config::{At, CheckContext, SecretUrl, did_you_mean};
use pipeline::error::{Error, Result};
use pipeline::plugin::{
    BatchLimits, BatchOptions, OutboxSink, Promise, Sink, SinkConfig, SinkContext, SinkInput, SinkShape,
};
use schemars::JsonSchema;
use serde::Deserialize;

use columns::{Columns, Kind};
use connection::{Connection, Failure};
use statement::{Server, Table};

/// The page of the documentation.
const PAGE: &str = "\
Writes rows into a table of PostgreSQL, MySQL, MariaDB or SQLite: appended, or replaced by key.

## Writes
One multi-row INSERT per delivery, in one transaction; with `key` an upsert, so that a window's `revised` row replaces its
`final` one. Within a delivery the last row of a key wins. `{pipeline}` in `table` is the pipeline's name, for a table each.
`create: true` makes a missing table: int as `bigint`, float as `double`, string as `text`, timestamp as `timestamptz`
(MySQL `datetime(6)` in UTC, SQLite text such as `2026-11-20T12:00:00.000000Z`), decimal as `numeric` (SQLite text), structs, lists and
json as `jsonb` (MySQL `json`, SQLite text); with `key` as the primary key. Into an existing table, values are converted as an INSERT does.

## Delivery
Exactly once: the number of the last row is kept in the table `tailwater_deliveries` and moves on in the same transaction as
the rows, so that rows that are delivered again after a crash are passed over. For that, rows wait for the checkpoint that has
them (`checkpoint: {every: 1s}`). With `exactly_once: false`: at least once, and at once.
Rows wait in the outbox while the database is away.

## Limits
- A row whose values the database refuses (a constraint, a range, a null in a key, a text too long for an index) is reported and
  not written; the other rows of the delivery are. The delivery then counts as failed, and its message says how many rows were
  refused. In PostgreSQL, deferred constraints are checked at once.
- Two programs that write with a sink of the same name into one database need different `deliveries` tables.
- An upsert needs a unique index over exactly the `key` columns; `create: true` makes one. In MySQL, text in a created key is at most 191 characters.
- MySQL keeps no NaN and no infinity, SQLite no NaN: they are written as null.
- A SQLite file is created, in WAL mode, so that others can read it meanwhile; there is one writer at a time.

## Fails when
The server is away, a table or column is missing, a right is missing: the sink says so in `/health`, keeps its rows in the outbox and tries again.
";

/// Most time of one delivery: far beyond any healthy transaction, so that a dead connection is noticed.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(60);
/// Most bytes of one statement, roughly: well below MySQL's default `max_allowed_packet` of 16 MiB.
const STATEMENT_BYTES_MAX: usize = 4 << 20;

/// The options of a `sql` sink.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SqlConfig {
    /// `sqlite:FILE` (counted from the YAML's folder), `postgres://USER:PASSWORD@HOST/DATABASE`, or `mysql://…` (MariaDB too).
    pub url: At<SecretUrl>,
    /// The table, or `SCHEMA.TABLE`; `{pipeline}` is the pipeline's name.
    pub table: At<String>,
    /// Columns of the table with the pipeline's columns they take: `{device: device_id}`. Default: all, by the same names.
    #[serde(default)]
    pub columns: IndexMap<String, At<String>>,
    /// Columns of the table by which a row replaces an older one. Default: none, rows are appended.
    #[serde(default)]
    pub key: Vec<At<String>>,
    /// Whether to create the table if it is missing. Default false: a mistyped name should not make a table.
    #[serde(default)]
    pub create: bool,
    /// Whether repeated rows are passed over. Default true; costs one small UPDATE per delivery, and the wait for the
    /// checkpoint.
    #[serde(default = "exactly_once_default")]
    pub exactly_once: bool,
    /// Table that remembers the deliveries, created if missing. Default `tailwater_deliveries`.
    #[serde(default = "deliveries_default")]
    pub deliveries: String,
    /// When waiting rows become a delivery. Default `{rows: 500, every: 1s}`: a transaction costs a disk write, whatever it
    /// holds; and a second is fresh enough for a table that people query.
    #[serde(default)]
    pub batch: BatchOptions,
}

fn exactly_once_default() -> bool {
    true
}

fn deliveries_default() -> String {
    "tailwater_deliveries".into()
}

/// Of the option `batch`.
const BATCH_DEFAULT: BatchLimits = BatchLimits { rows: 500, every: Duration::from_secs(1) };

impl SinkConfig for SqlConfig {
    const TYPE: &'static str = "sql";
    const PAGE: &'static str = PAGE;
    const EXAMPLE: &'static str = "\
type: sql
url: sqlite:demo.db
table: messages
create: true
batch: {rows: 50, every: 2s}
";
    const PROMISES: &'static [(&'static str, Promise)] =
        &[("", Promise::ExactlyOnce), ("`exactly_once: false`", Promise::AtLeastOnce)];
    const INSTEAD: Option<&'static str> = Some("`exactly_once: true`, the default");

    fn check(&self, inputs: &[SinkInput], cx: &mut CheckContext<'_>) -> Option<SinkShape> {
        let errors = cx.errors();
        if let Err(message) = Server::of(self.url.expose()) {
            cx.error(self.url.position, message);
        }
        if self.table.trim().is_empty() {
            cx.error(self.table.position, "`table` is empty");
        }
        if self.deliveries.trim().is_empty() {
            cx.error(cx.position(), "`deliveries` is empty");
        }
        self.batch.check(cx);
        let mut tables = Vec::new();
        for input in inputs {
            tables.extend(self.check_input(input, cx));
        }
        if self.create {
            self.check_union(&tables, cx);
        }
        let promise = if self.exactly_once { Promise::ExactlyOnce } else { Promise::AtLeastOnce };
        let shape = SinkShape { takes_revised: !self.key.is_empty(), promise, ..SinkShape::default() };
        (cx.errors() == errors).then_some(shape)
    }

    fn build(&self, cx: SinkContext) -> Result<Sink> {
        let tables = cx.inputs.iter().map(|input| self.table(input)).collect::<Option<Vec<_>>>();
        let tables = tables.ok_or_else(|| Error::internal("a sink was built that does not check"))?;
        let sink = SqlSink {
            name: cx.name,
            inputs: cx.inputs.into_iter().map(|input| input.metric).collect(),
            server: Server::of(self.url.expose()).map_err(Error::user)?,
            url: self.url.value.clone(),
            folder: cx.folder,
            tables,
            create: self.create,
            deliveries: self.exactly_once.then(|| self.deliveries.clone()),
            open: None,
        };
        Ok(Sink::Outbox(Box::new(sink), self.batch.limits(BATCH_DEFAULT)))
    }
}

impl SqlConfig {
    /// Reports what does not fit between one pipeline and the table.
    fn check_input(&self, input: &SinkInput, cx: &mut CheckContext<'_>) -> Option<Table> {
        for name in self.columns.values() {
            cx.column(name, &input.shape.schema);
        }
        let table = self.table(input)?;
        for key in &self.key {
            match table.columns.iter().find(|(name, _)| *name == key.value) {
                Some((_, Kind::Json)) => {
                    cx.error(key.position, format!("`{}` is a struct, list or json: no key", key.value));
                }
                Some(_) => {}
                None => {
                    let hint = did_you_mean(key, table.columns.iter().map(|(name, _)| name));
                    let message = format!("key `{}` is no column that pipeline `{}` writes", key.value, input.metric);
                    cx.error_hint(key.position, message, hint);
                }
            }
        }
        Some(table)
    }

    /// Reports pipelines that want one column of a created table with two types.
    fn check_union(&self, tables: &[Table], cx: &mut CheckContext<'_>) {
        for table in unions(tables) {
            let mut kinds: IndexMap<&str, Kind> = IndexMap::new();
            for (name, kind) in &table.columns {
                if *kinds.entry(name).or_insert(*kind) != *kind {
                    let message = format!("column `{name}` of `{}` would have two types", table.name);
                    let hint = "name a table each: `table: \"{pipeline}\"`".to_owned();
                    cx.error_hint(self.table.position, message, Some(hint));
                }
            }
        }
    }

    /// The table as one pipeline writes it; `None` if a column is missing.
    fn table(&self, input: &SinkInput) -> Option<Table> {
        let schema = &input.shape.schema;
        let pairs: Vec<(String, usize)> = if self.columns.is_empty() {
            schema.fields().iter().enumerate().map(|(index, field)| (field.name().clone(), index)).collect()
        } else {
            let pair = |(to, from): (&String, &At<String>)| Some((to.clone(), schema.index_of(from).ok()?));
            self.columns.iter().map(pair).collect::<Option<_>>()?
        };
        Some(Table {
            name: self.table.replace("{pipeline}", &input.metric),
            columns: pairs.iter().map(|(name, index)| (name.clone(), Kind::of(schema.field(*index)))).collect(),
            from: pairs.into_iter().map(|(_, index)| index).collect(),
            key: self.key.iter().map(|key| key.value.clone()).collect(),
        })
    }
}

/// The tables by name, each with the columns of all pipelines that write it.
fn unions(tables: &[Table]) -> Vec<Table> {
    let mut unions: IndexMap<&str, Table> = IndexMap::new();
    for table in tables {
        match unions.get_mut(table.name.as_str()) {
            None => {
                unions.insert(&table.name, table.clone());
            }
            Some(union) => {
                for column in &table.columns {
                    if !union.columns.contains(column) {
                        union.columns.push(column.clone());
                    }
                }
            }
        }
    }
    unions.into_values().collect()
}

/// A running sink.
struct SqlSink {
    name: String,
    /// Names of the pipelines.
    inputs: Vec<String>,
    server: Server,
    url: SecretUrl,
    folder: PathBuf,
    /// For each pipeline.
    tables: Vec<Table>,
    create: bool,
    /// The table of deliveries, if exactly once.
    deliveries: Option<String>,
    open: Option<Open>,
}

/// An open connection, and for each pipeline the types of its table's columns (PostgreSQL).
struct Open {
    connection: Connection,
    casts: Vec<Vec<String>>,
}

#[async_trait]
impl OutboxSink for SqlSink {
    async fn connect(&mut self) -> Result<()> {
        self.open = None;
        let mut connection = Connection::open(&self.server, &self.url, &self.folder).await?;
        if self.create {
            for table in unions(&self.tables) {
                let created = connection.run(&self.server.create(&table)).await;
                created.map_err(|e| e.context(format!("creating table `{}`", table.name)))?;
            }
        }
        let mut casts = Vec::new();
        for table in &self.tables {
            let hint = if self.create { "" } else { " (`create: true` makes a missing table)" };
            let verified = connection.verify(&self.server, table).await;
            casts.push(verified.map_err(|e| e.context(format!("table `{}`{hint}", table.name)))?);
        }
        if let Some(deliveries) = &self.deliveries {
            connection.run(&self.server.create_deliveries(deliveries)).await?;
            for input in &self.inputs {
                connection.run_with(&self.server.open_deliveries(deliveries), [&self.name, input]).await?;
            }
        }
        self.open = Some(Open { connection, casts });
        Ok(())
    }

    fn is_exactly_once(&self) -> bool {
        self.deliveries.is_some()
    }

    async fn last_delivery(&mut self, input: usize) -> Result<Option<u64>> {
        let (Some(deliveries), Some(open)) = (&self.deliveries, &mut self.open) else { return Ok(None) };
        let line = [self.name.as_str(), self.inputs[input].as_str()];
        let last = open.connection.number(&self.server.last_delivery(deliveries), line).await?;
        Ok(last.and_then(|last| u64::try_from(last).ok()))
    }

    async fn deliver(&mut self, input: usize, rows: &RecordBatch, id: u64) -> Result<()> {
        // Taken out: if this future is dropped or fails half-way, the connection with its open transaction goes too.
        let mut open = self.open.take().ok_or_else(|| Error::outside("not connected"))?;
        let table = self.tables.get(input).ok_or_else(|| Error::internal(format!("no input {input}")))?;
        let columns = Columns::new(rows, table, &self.server)?;
        let written = columns.rows_to_write(rows.num_rows(), table);
        let first = id.saturating_sub(rows.num_rows() as u64);
        let delivery = Delivery { sink: self, table, columns, casts: &open.casts[input], input, first, id };
        let deliver = delivery.run(&mut open.connection, &written);
        let refused = tokio::time::timeout(DELIVERY_TIMEOUT, deliver)
            .await
            .map_err(|_| Error::outside(format!("a delivery took longer than {} s", DELIVERY_TIMEOUT.as_secs())))??;
        self.open = Some(open);
        match refused.first {
            None => Ok(()),
            Some(first) => {
                let count = refused.count;
                let table = &self.tables[input].name;
                let message =
                    format!("`{table}` refused {count} of {} rows, the others are written: {first}", rows.num_rows());
                Err(Error::outside(message).fatal())
            }
        }
    }
}

/// One delivery on its way.
struct Delivery<'a> {
    sink: &'a SqlSink,
    table: &'a Table,
    columns: Columns,
    casts: &'a [String],
    input: usize,
    /// Numbers of the rows: after `first`, up to and with `id`.
    first: u64,
    id: u64,
}

/// Rows that the database would not take.
#[derive(Default)]
struct Refused {
    count: usize,
    first: Option<String>,
}

impl Delivery<'_> {
    /// Writes all rows in one transaction; if values are refused, once more with the wrong rows left out.
    async fn run(&self, connection: &mut Connection, rows: &[usize]) -> Result<Refused> {
        let Some(known) = self.begin(connection).await? else { return Ok(Refused::default()) };
        let rows = &rows[rows.partition_point(|row| *row < known)..];
        let mut refused = Refused::default();
        match self.write_all(connection, rows).await {
            Ok(()) => {}
            Err(Failure::Other(error)) => return Err(error),
            Err(Failure::Values(_)) => {
                connection.run("ROLLBACK").await?;
                if self.begin(connection).await?.is_none() {
                    return Ok(Refused::default());
                }
                refused = self.write_around(connection, rows).await?;
            }
        }
        connection.run("COMMIT").await?;
        Ok(refused)
    }

    /// Opens the transaction and says how many of the first rows are in the database already; `None` if all are.
    async fn begin(&self, connection: &mut Connection) -> Result<Option<usize>> {
        let server = &self.sink.server;
        connection.run(server.begin()).await?;
        let Some(deliveries) = &self.sink.deliveries else { return Ok(Some(0)) };
        let line = [self.sink.name.as_str(), self.sink.inputs[self.input].as_str()];
        // The first statement, and it locks the line: a commit of a lost connection that is still under way
        // ends before we look.
        if connection.run_with(&server.claim_delivery(deliveries, self.first, self.id), line).await? > 0 {
            return Ok(Some(0));
        }
        let Some(last) = connection.number(&server.last_delivery(deliveries), line).await? else {
            connection.run("ROLLBACK").await?;
            return Err(Error::outside(format!("the line of this sink is gone from `{deliveries}`")));
        };
        let last = u64::try_from(last).unwrap_or_default();
        tracing::info!(
            sink = line[0],
            pipeline = line[1],
            last,
            id = self.id,
            "rows up to `last` are in the database already"
        );
        if last < self.id && connection.run_with(&server.claim_delivery(deliveries, last, self.id), line).await? > 0 {
            return Ok(usize::try_from(last.saturating_sub(self.first)).ok());
        }
        connection.run("ROLLBACK").await?;
        Ok(None)
    }

    /// Writes the rows with as few statements as the limits allow.
    async fn write_all(&self, connection: &mut Connection, rows: &[usize]) -> Result<(), Failure> {
        let rows_max = (self.sink.server.values_max() / self.columns.0.len().max(1)).max(1);
        let mut rest = rows;
        while !rest.is_empty() {
            let mut bytes = 0;
            let fitting = rest.iter().take_while(|&&row| {
                bytes += self.columns.row_bytes(row);
                bytes <= STATEMENT_BYTES_MAX
            });
            let count = fitting.count().clamp(1, rows_max).min(rest.len());
            let (now, later) = rest.split_at(count);
            // Statements of full size come again and again; kept ones of every other size would fill the cache.
            self.insert(connection, now, !later.is_empty()).await?;
            rest = later;
        }
        Ok(())
    }

    /// Halves the rows until those that are refused stand alone.
    async fn write_around(&self, connection: &mut Connection, rows: &[usize]) -> Result<Refused> {
        let mut refused = Refused::default();
        let mut open = vec![rows];
        while let Some(rows) = open.pop() {
            connection.run("SAVEPOINT tailwater_rows").await?;
            match self.write_all(connection, rows).await {
                Ok(()) => connection.run("RELEASE SAVEPOINT tailwater_rows").await?,
                Err(Failure::Other(error)) => return Err(error),
                Err(Failure::Values(message)) => {
                    connection.run("ROLLBACK TO SAVEPOINT tailwater_rows").await?;
                    connection.run("RELEASE SAVEPOINT tailwater_rows").await?;
                    if rows.len() == 1 {
                        refused.count += 1;
                        refused.first.get_or_insert(message);
                    } else {
                        let (first, second) = rows.split_at(rows.len() / 2);
                        open.extend([second, first]);
                    }
                }
            }
        }
        Ok(refused)
    }

    async fn insert(&self, connection: &mut Connection, rows: &[usize], keep: bool) -> Result<(), Failure> {
        let sql = self.sink.server.insert(self.table, self.casts, rows.len());
        connection.insert(&sql, &self.columns, rows, keep).await
    }
}
