//! `sql`: rows of PostgreSQL, MySQL, MariaDB and SQLite.

mod cells;
mod collect;
mod connection;
mod cursor;
mod key;
mod mysql;
mod options;
mod plan;
mod postgres;
mod readers;
mod sqlite;

use std::collections::VecDeque;
use std::path::PathBuf;

use async_trait::async_trait;
use futures::future::BoxFuture;
use indexmap::IndexMap;
use pipeline::config::{At, CheckContext, Duration, Fields, Position, SecretUrl};
use pipeline::error::{Error, Result};
use pipeline::plugin::{Delivery, Reader, Schedule, Source, SourceConfig, SourceContext, SourceShape};
use pipeline::schema::FieldType;
use schemars::JsonSchema;
use serde::Deserialize;

pub use options::{CommitOrder, Cursor, SqlField, Words};

use collect::Collector;
use connection::{Column, Connection};
use cursor::CursorReader;
use plan::{Guard, Mode, Plan, Query, Server};
use readers::{SnapshotReader, TogetherReader};

/// The page of the documentation.
const PAGE: &str = "\
Reads rows of PostgreSQL, MySQL, MariaDB or SQLite: a whole result at intervals, several queries as one row, or new rows only.

## Emits
- `query: SELECT …` (or `table: NAME`): all rows of the result at each poll.
- `queries: {queue: SELECT …, workers: SELECT …}`: one row at each poll, with one struct column for each query, all
  read in one read transaction (`REPEATABLE READ, READ ONLY` in PostgreSQL and MySQL, a deferred one in SQLite), so
  that the figures belong together. A query without a row gives null; one with several is a row error.
- with `cursor`: only rows after the last one read, in the order of the cursor's columns. While more rows wait than
  fit into one batch, they are read at once, whatever `every` says.

Every declared field must be a column of the result, by its exact name. Numbers fit `float`, whole ones `int`;
decimals (what `sum` and `avg` give) fit `int`, `float`, `decimal(p,s)` and `string`; a time without a zone is UTC; UUID, time of
day and enums are `string`; a PostgreSQL array is `json`, an interval `float` (seconds) or `string`; numbers 0 and 1 are
`bool` in MySQL and SQLite; SQLite times are text, or numbers with `timestamp_s` and its like. A value that does not
fit is a row error: it names the column and the value, and the other rows go on.

## Delivery
Without `cursor`: a sample of the state at each poll; it may be `on_demand`. With `cursor`: read again from the position
in the checkpoint, nothing lost, nothing twice, if rows become visible in the order of the cursor. The position stays when
options are edited, but not when these are: host, port and database in `url`, `table` or the text of `query`, the columns of
`cursor`. Then all is read anew, and a warning says so. The order is the database's part:

- **PostgreSQL** draws ids and times before the commit, so a transaction that commits late shows rows behind the position.
  With the transaction's own id as the first column it is exact: rows are read when every earlier transaction has ended.

      CREATE TABLE events (
        id bigint GENERATED ALWAYS AS IDENTITY,
        xid xid8 NOT NULL DEFAULT pg_current_xact_id(),   -- PostgreSQL 13 or newer
        …,
        PRIMARY KEY (xid, id));

      cursor: [xid, id]
      commit_order: xid8
      fields: {xid: int, id: int, …}

  An open transaction that has written anything, in any database of the server, holds the rows after it back. A row that is
  updated comes again only if a trigger sets its `xid` anew. (The system column `xmin` is no replacement: it has 32 bits, and
  is not ordered.)
- **SQLite** has one writer at a time: an `INTEGER PRIMARY KEY AUTOINCREMENT` is exact, `commit_order: autoincrement` insists
  on it. A plain rowid is used again after the newest rows are deleted, so a warning says when the cursor is none.
- **MySQL, MariaDB, and any cursor with a time**: `lag: 10s`. A row is read when so much time has passed since a row at or after
  it was first seen; by then whatever drew a smaller id or an earlier time is there. Its limit: a transaction that is
  open for longer than `lag` after it drew its id or time is passed over, and so is a time that a clock gives which is slow by
  more than that. Nothing comes twice.
- A database that was set back (restored from a copy, ids counted anew) gives ids out again that were read already. An `xid8`
  and an AUTOINCREMENT tell, and the source fails; for other cursors a warning at the connect tells when every row lies before
  the position.
- `commit_order: assured` says that you know: one writer, or a query that holds young rows back itself.

## Limits
- A cursor in PostgreSQL or MySQL without `lag` and `commit_order` passes over rows that become visible behind its position;
  `check` notes it, and refuses it where `guarantee: exactly_once` is asked.
- A single cursor column must be unique; with several, all together. A time alone is refused. Rows with null in a cursor
  column are not read. An index over the cursor's columns in their order keeps a poll cheap.
- A snapshot of more than `rows_max` rows is an error, not a part of the rows.
- The connection can only read. One connection per source.
- The SQL is run as written: the YAML is trusted as the program itself.

## Fails when
The server, the file, a table or a column is missing, a password is wrong, a statement takes longer than `timeout`: the source says so in
`/health` and tries again. A SQLite file is never created.
";

/// The options of a `sql` source.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SqlConfig {
    /// `sqlite:FILE` (counted from the YAML's folder), `postgres://USER:PASSWORD@HOST/DATABASE`, or `mysql://…` (MariaDB too).
    pub url: At<SecretUrl>,
    /// Time between polls. Default `1s`: what a person calls live, at a cost any database bears.
    #[serde(default = "every_default")]
    pub every: At<Duration>,
    /// A SELECT. Exactly one of `query`, `table`, `queries`.
    pub query: Option<At<String>>,
    /// A table or view; the declared fields are read from it. `SCHEMA.TABLE` works too.
    pub table: Option<At<String>>,
    /// SELECTs by name: one row of structs at each poll, from one transaction.
    pub queries: Option<At<IndexMap<String, At<String>>>>,
    /// Columns with their types; with `queries`, the columns of each query: `{queue: {pending: int}}`.
    /// `pipeline fields` prints them.
    #[serde(default)]
    pub fields: IndexMap<String, At<SqlField>>,
    /// Read new rows only: `id`, `[updated_at, id]`, or `{column: id, start: 1000}`. Default: all rows at each poll.
    pub cursor: Option<At<Cursor>>,
    /// What makes rows visible in the order of the cursor, so that none is passed over: `xid8` (PostgreSQL: its first column),
    /// `autoincrement` (SQLite), or `assured` (you know). Default: nothing that is known.
    pub commit_order: Option<At<CommitOrder>>,
    /// How long rows of a cursor wait after they are first seen, for transactions that drew a smaller id and commit later:
    /// longer than your longest transaction. Default: not at all.
    pub lag: Option<At<Duration>>,
    /// Most rows of one snapshot. Default 8192, one batch: more is nearly always a forgotten `GROUP BY`.
    pub rows_max: Option<At<usize>>,
    /// Most time of one statement. Default `10s`: longer ones hurt the database more than they tell.
    #[serde(default = "timeout_default")]
    pub timeout: At<Duration>,
}

fn every_default() -> At<Duration> {
    At::nowhere(Duration::from_secs(1))
}

fn timeout_default() -> At<Duration> {
    At::nowhere(Duration::from_secs(10))
}

impl SourceConfig for SqlConfig {
    const TYPE: &'static str = "sql";
    const PAGE: &'static str = PAGE;
    const EXAMPLE: &'static str = "\
type: sql
url: sqlite:demo.db
every: 3s
queries:
  queue: SELECT count(*) AS total, sum(status = 'pending') AS pending FROM publish_log
  scheduler: SELECT avg(unixepoch(published_at) - unixepoch(scheduled_for)) AS avg_delay_seconds FROM publish_log
fields:
  queue: {total: int, pending: int}
  scheduler: {avg_delay_seconds: float}
";
    const PROMISES: &'static [(&'static str, Delivery)] = &[
        ("without `cursor`", Delivery::Sampled),
        ("with `cursor`, if rows become visible in its order", Delivery::Replayable),
    ];
    const INSTEAD: Option<&'static str> = Some("read new rows with `cursor`, and `commit_order` or `lag`");

    fn check(&self, cx: &mut CheckContext<'_>) -> Option<SourceShape> {
        let plan = plan::plan(self, &mut |position, message, hint| cx.error_hint(position, message, hint));
        // Without a plan, for a wrong URL say, `fields` still tell the columns.
        let schema = plan.as_ref().map(Plan::schema).or_else(|| plan::declared(self))?;
        if let (Some(Plan { server, mode: Mode::Cursor { guard: Guard::None, .. } }), Some(cursor)) =
            (&plan, &self.cursor)
        {
            unguarded(server, cursor.position, cx);
        }
        let is_cursor = self.cursor.is_some();
        Some(SourceShape {
            schema,
            delivery: if is_cursor { Delivery::Replayable } else { Delivery::Sampled },
            schedule: Schedule::Every(self.every.0),
            bounded: false,
            can_be_on_demand: !is_cursor,
            mounts: Vec::new(),
        })
    }

    fn build(&self, cx: SourceContext) -> Result<Box<dyn Source>> {
        let plan = self.checked_plan()?;
        let (url, timeout) = (self.url.value.clone(), self.timeout.value);
        let (folder, name) = (cx.folder, cx.name);
        Ok(Box::new(SqlSource { plan, url, timeout, folder, name, warned: false, warned_of_set_back: false }))
    }

    fn identity(&self) -> Option<String> {
        let Plan { server, mode: Mode::Cursor { query, columns, .. } } = self.checked_plan().ok()? else { return None };
        let what = match &self.table {
            // Without the columns that are read: they may be added to.
            Some(table) => format!("table {}", table.value),
            None => query.sql.clone(),
        };
        Some(format!("{} by {columns:?} at {}", what, server.place(self.url.expose())?))
    }

    fn discover(&self, cx: SourceContext) -> BoxFuture<'_, Result<Fields>> {
        Box::pin(self.discover(cx.folder))
    }
}

/// Says what a cursor without `lag` and `commit_order` does not promise.
fn unguarded(server: &Server, position: Position, cx: &mut CheckContext<'_>) {
    let (message, hint) = match server {
        Server::Postgres => (
            "rows of a transaction that commits late can be passed over",
            "begin the cursor with an `xid8` column and say `commit_order: xid8`, or give `lag`",
        ),
        Server::MySql => {
            ("rows of a transaction that commits late can be passed over", "give `lag`, longer than any transaction")
        }
        // Most SQLite cursors are in order; whether this one is shows at connect.
        Server::Sqlite(_) if !cx.exactly_once() => return,
        Server::Sqlite(_) => {
            ("a plain rowid is used again after the newest rows are deleted", "say `commit_order: autoincrement`")
        }
    };
    cx.weakness(position, message, Some(hint.to_owned()));
}

impl SqlConfig {
    fn checked_plan(&self) -> Result<Plan> {
        let mut problem = None;
        let plan = plan::plan(self, &mut |_, message, _| problem = Some(message));
        plan.ok_or_else(|| Error::user(problem.unwrap_or_default()))
    }

    /// Asks the database for the columns of the query, and SQLite for a first row where the types are not told.
    async fn discover(&self, folder: PathBuf) -> Result<Fields> {
        let server = plan::Server::of(self.url.expose()).map_err(Error::user)?;
        let timeout = *self.timeout.value;
        let mut connection = Connection::open(&server, &self.url, &folder, timeout).await?;
        if let Some(queries) = &self.queries {
            let mut blocks = String::new();
            for (name, sql) in &queries.value {
                let fields = discover_query(&mut connection, sql).await.map_err(|e| e.context(name))?;
                let columns: Vec<String> =
                    fields.0.iter().map(|(name, spec)| format!("{name}: {}", spec.field_type)).collect();
                blocks.push_str(&format!("\n  {name}: {{{}}}", columns.join(", ")));
            }
            return Err(Error::user(format!(
                "with `queries` the fields lie one level deeper; they are\nfields:{blocks}"
            )));
        }
        let sql = match (&self.query, &self.table) {
            (Some(query), _) => query.trim().trim_end_matches(';').to_owned(),
            (None, Some(table)) => format!("SELECT * FROM {}", server.quote(table)),
            (None, None) => return Err(Error::user("expected `query`, `table` or `queries`")),
        };
        discover_query(&mut connection, &sql).await
    }
}

async fn discover_query(connection: &mut Connection, sql: &str) -> Result<Fields> {
    let columns = connection.columns(sql).await?;
    let mut fields = Vec::new();
    for column in &columns {
        let field_type = match column.field_type {
            Some(field_type) => field_type,
            None => first_fit(connection, sql, &column.name).await?,
        };
        fields.push((column.name.as_str(), field_type));
    }
    Ok(Fields::of(fields))
}

/// The first type that the first row's value fits; text if there is no value to see.
async fn first_fit(connection: &mut Connection, sql: &str, name: &str) -> Result<FieldType> {
    for field_type in [FieldType::Int, FieldType::Float, FieldType::Timestamp(None), FieldType::String] {
        let mut rows = Collector::new(&Fields::of([(name, field_type)]), &[], 1);
        connection.fetch(sql, &[], &mut rows).await?;
        let (batch, errors) = rows.finish()?;
        if errors.is_empty() {
            let seen = batch.columns().iter().any(|column| column.len() > column.null_count());
            return Ok(if seen { field_type } else { FieldType::String });
        }
    }
    Ok(FieldType::Bytes)
}

/// A source that is to run: opens one connection at a time.
struct SqlSource {
    plan: Plan,
    url: SecretUrl,
    timeout: Duration,
    folder: PathBuf,
    name: String,
    /// Whether the log tells that the cursor is not known to be in order.
    warned: bool,
    /// Whether the log tells that every row lies before the position.
    warned_of_set_back: bool,
}

#[async_trait]
impl Source for SqlSource {
    async fn connect(&mut self, position: Option<&[u8]>) -> Result<Reader> {
        let Plan { server, mode } = &self.plan;
        let mut connection = Connection::open(server, &self.url, &self.folder, *self.timeout).await?;
        Ok(Reader::Pull(match mode {
            Mode::Snapshot { query, rows_max } => {
                verify(&mut connection, query).await?;
                let (query, rows_max) = (query.clone(), *rows_max);
                Box::new(SnapshotReader { connection, query, rows_max, waiting: VecDeque::new() })
            }
            Mode::Together(queries) => {
                for (name, query) in queries {
                    verify(&mut connection, query).await.map_err(|e| e.context(format!("query `{name}`")))?;
                }
                Box::new(TogetherReader { connection, queries: queries.clone(), schema: self.plan.schema() })
            }
            Mode::Cursor { query, columns, start, guard } => {
                let result = verify(&mut connection, query).await?;
                let stored = position.map(|p| key::decode(columns, p)).transpose()?.unwrap_or_default();
                let mut counts = false;
                if let (Server::Sqlite(_), Guard::None | Guard::Autoincrement) = (server, guard) {
                    let id = result.iter().find(|column| Some(&column.name) == columns.first());
                    if let Some(id) = id.filter(|_| columns.len() == 1) {
                        counts = connection.is_autoincrement(id).await?;
                        if counts && let Some(sequence) = connection.sequence(id).await? {
                            cursor::not_behind_sequence(&stored, sequence)?;
                        }
                    }
                    self.warned = not_autoincrement(&self.name, &columns[0], *guard, counts, self.warned)?;
                }
                let has_position = !stored.is_empty();
                let keys = if has_position { stored } else { start.clone() };
                let mut reader = CursorReader::open(connection, server, query, columns, keys, (guard, &result)).await?;
                if has_position && !counts && !self.warned_of_set_back && reader.lies_behind_all().await? {
                    self.warned_of_set_back = true;
                    tracing::warn!(
                        source = self.name,
                        "every row lies before the position: if the newest were not deleted, the database was set back (restored \
                         from a copy, its ids counted anew), and rows are not read before they pass the position; then give the \
                         source another name to read all rows again"
                    );
                }
                Box::new(reader)
            }
        }))
    }
}

/// Prepares the query, so that a source is connected only when its query can run and has the declared columns.
async fn verify(connection: &mut Connection, query: &Query) -> Result<Vec<Column>> {
    let columns = connection.columns(&query.sql).await?;
    let names: Vec<&str> = columns.iter().map(|c| c.name.as_str()).collect();
    collect::places(query.fields.0.keys(), &names)?;
    Ok(columns)
}

/// Refuses a SQLite cursor that is no AUTOINCREMENT id where that is asked, else warns of it once.
fn not_autoincrement(source: &str, column: &str, guard: Guard, is_exact: bool, warned: bool) -> Result<bool> {
    if is_exact {
        return Ok(false);
    }
    if guard == Guard::Autoincrement {
        return Err(Error::outside(format!(
            "`commit_order: autoincrement`: `{column}` is no INTEGER PRIMARY KEY AUTOINCREMENT of a table"
        )));
    }
    if !warned {
        tracing::warn!(
            source,
            column,
            "the cursor is no INTEGER PRIMARY KEY AUTOINCREMENT: rows with a value that is not beyond the last one read \
             are never read, and SQLite uses plain rowids again after the newest rows are deleted"
        );
    }
    Ok(true)
}
