//! One connection to any of the three databases, for writing.

use std::path::Path;
use std::str::FromStr;
use std::time::Duration;

use arrow::array::Array;
use pipeline::config::SecretUrl;
use pipeline::error::{Error, Result};
use sqlx::mysql::{MySql, MySqlConnectOptions, MySqlConnection};
use sqlx::postgres::{PgConnectOptions, PgConnection, Postgres};
use sqlx::sqlite::{Sqlite, SqliteConnectOptions, SqliteConnection, SqliteJournalMode, SqliteSynchronous};
use sqlx::{AssertSqlSafe, ConnectOptions, Executor, SqlSafeStr};

use super::columns::{Column, Columns};
use super::statement::{Server, Table};

/// How long opening a connection may take. Longer than a lost packet's retransmission, shorter than a person's patience.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a write waits for another writer of the same SQLite file.
const SQLITE_BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// An open connection.
pub(super) struct Connection {
    driver: Driver,
}

enum Driver {
    Postgres(PgConnection),
    MySql(MySqlConnection),
    Sqlite(SqliteConnection),
}

/// Why rows were not written.
pub(super) enum Failure {
    /// The database refused the values of a row.
    Values(String),
    /// Anything else; tried again.
    Other(Error),
}

impl From<sqlx::Error> for Failure {
    fn from(error: sqlx::Error) -> Self {
        match &error {
            sqlx::Error::Database(inner) if is_about_values(inner.as_ref()) => Self::Values(inner.message().to_owned()),
            _ => Self::Other(failed(error)),
        }
    }
}

/// Whether a database refused values (a constraint, a range, a text that is no JSON), and not a table, a
/// column, a right or the connection: those may be mended while the rows wait.
fn is_about_values(error: &dyn sqlx::error::DatabaseError) -> bool {
    /// MySQL's errors about values that have no SQLSTATE of their own: wrong value, truncated, check
    /// constraints of MySQL and MariaDB, invalid JSON.
    const MYSQL_VALUES: [u16; 5] = [1366, 1265, 3819, 4025, 3140];
    /// SQLSTATE classes: cardinality (two rows of one key in a statement, where the column's type or collation takes
    /// for equal what we do not), data exception, integrity constraint violation, check option of a view, program limit
    /// exceeded (a value too large for an index or a page).
    const SQLSTATE_VALUES: [&str; 5] = ["21", "22", "23", "44", "54"];
    /// SQLite's constraint, mismatch and too big, in the low byte of the code.
    const SQLITE_VALUES: [i32; 3] = [19, 20, 18];
    let code = error.code().unwrap_or_default();
    if error.try_downcast_ref::<sqlx::sqlite::SqliteError>().is_some() {
        return code.parse::<i32>().is_ok_and(|code| SQLITE_VALUES.contains(&(code & 0xff)));
    }
    let number = error.try_downcast_ref::<sqlx::mysql::MySqlDatabaseError>().map(|e| e.number());
    SQLSTATE_VALUES.iter().any(|class| code.starts_with(class)) || number.is_some_and(|n| MYSQL_VALUES.contains(&n))
}

/// What a database or its connection said.
fn failed(error: sqlx::Error) -> Error {
    match error {
        sqlx::Error::Database(error) => Error::outside(error.message()),
        sqlx::Error::Io(error) => Error::outside("connection lost").because(error),
        other => Error::outside(other.to_string()),
    }
}

/// Our own texts: only names from the YAML stand in them, in quotes. Values are bound.
fn trusted(sql: &str) -> AssertSqlSafe<String> {
    AssertSqlSafe(sql.to_owned())
}

impl Connection {
    /// Opens a connection; a SQLite file is created.
    pub(super) async fn open(server: &Server, url: &SecretUrl, folder: &Path) -> Result<Self> {
        let open = async {
            match server {
                Server::Postgres => postgres(url).await.map(Driver::Postgres),
                Server::MySql => mysql(url).await.map(Driver::MySql),
                Server::Sqlite(file) => sqlite(&folder.join(file)).await.map(Driver::Sqlite),
            }
        };
        let driver = tokio::time::timeout(CONNECT_TIMEOUT, open)
            .await
            .map_err(|_| Error::outside(format!("no connection to {url} within {} s", CONNECT_TIMEOUT.as_secs())))?;
        let driver = driver.map_err(|e| failed(e).context(format!("connecting to {url}")))?;
        Ok(Self { driver })
    }

    /// Runs a statement without values.
    pub(super) async fn run(&mut self, sql: &str) -> Result<()> {
        let sql = sqlx::raw_sql(trusted(sql));
        match &mut self.driver {
            Driver::Postgres(c) => c.execute(sql).await.map(drop),
            Driver::MySql(c) => c.execute(sql).await.map(drop),
            Driver::Sqlite(c) => c.execute(sql).await.map(drop),
        }
        .map_err(failed)
    }

    /// Runs a statement with two values; gives the number of rows it touched.
    pub(super) async fn run_with(&mut self, sql: &str, values: [&str; 2]) -> Result<u64> {
        let [first, second] = values;
        match &mut self.driver {
            Driver::Postgres(c) => sqlx::query::<Postgres>(trusted(sql))
                .persistent(false)
                .bind(first)
                .bind(second)
                .execute(c)
                .await
                .map(|r| r.rows_affected()),
            Driver::MySql(c) => sqlx::query::<MySql>(trusted(sql))
                .persistent(false)
                .bind(first)
                .bind(second)
                .execute(c)
                .await
                .map(|r| r.rows_affected()),
            Driver::Sqlite(c) => sqlx::query::<Sqlite>(trusted(sql))
                .persistent(false)
                .bind(first)
                .bind(second)
                .execute(c)
                .await
                .map(|r| r.rows_affected()),
        }
        .map_err(failed)
    }

    /// The number that a query with two values gives.
    pub(super) async fn number(&mut self, sql: &str, values: [&str; 2]) -> Result<Option<i64>> {
        let [first, second] = values;
        match &mut self.driver {
            Driver::Postgres(c) => {
                sqlx::query_scalar::<Postgres, i64>(trusted(sql)).bind(first).bind(second).fetch_optional(c).await
            }
            Driver::MySql(c) => {
                sqlx::query_scalar::<MySql, i64>(trusted(sql)).bind(first).bind(second).fetch_optional(c).await
            }
            Driver::Sqlite(c) => {
                sqlx::query_scalar::<Sqlite, i64>(trusted(sql)).bind(first).bind(second).fetch_optional(c).await
            }
        }
        .map_err(failed)
    }

    /// Sees whether a table has its columns. In PostgreSQL, gives their types for the casts of the insert.
    pub(super) async fn verify(&mut self, server: &Server, table: &Table) -> Result<Vec<String>> {
        let probe = trusted(&server.probe(table)).into_sql_str();
        match &mut self.driver {
            Driver::Postgres(c) => {
                c.prepare(probe).await.map_err(failed)?;
                column_types(c, server, table).await
            }
            Driver::MySql(c) => c.prepare(probe).await.map(|_| Vec::new()).map_err(failed),
            Driver::Sqlite(c) => c.prepare(probe).await.map(|_| Vec::new()).map_err(failed),
        }
    }

    /// Writes the rows named by `rows` with one statement. `keep` keeps the statement prepared.
    pub(super) async fn insert(
        &mut self,
        sql: &str,
        columns: &Columns,
        rows: &[usize],
        keep: bool,
    ) -> Result<(), Failure> {
        match &mut self.driver {
            Driver::Postgres(c) => insert_arrays(c, sql, columns, rows).await?,
            Driver::MySql(c) => {
                let mut query = sqlx::query::<MySql>(trusted(sql)).persistent(keep);
                for &row in rows {
                    for column in &columns.0 {
                        query = match column {
                            Column::Int(v) => query.bind(v.is_valid(row).then(|| v.value(row))),
                            // MySQL knows no NaN and no infinity.
                            Column::Float(v) => {
                                query.bind(v.is_valid(row).then(|| v.value(row)).filter(|v| v.is_finite()))
                            }
                            Column::Bool(v) => query.bind(v.is_valid(row).then(|| v.value(row))),
                            Column::Bytes(v) => query.bind(v.is_valid(row).then(|| v.value(row))),
                            Column::Text(v) => query.bind(v.is_valid(row).then(|| v.value(row))),
                        };
                    }
                }
                query.execute(c).await?;
            }
            Driver::Sqlite(c) => {
                let mut query = sqlx::query::<Sqlite>(trusted(sql)).persistent(keep);
                for &row in rows {
                    for column in &columns.0 {
                        query = match column {
                            Column::Int(v) => query.bind(v.is_valid(row).then(|| v.value(row))),
                            Column::Float(v) => query.bind(v.is_valid(row).then(|| v.value(row))),
                            Column::Bool(v) => query.bind(v.is_valid(row).then(|| v.value(row))),
                            Column::Bytes(v) => query.bind(v.is_valid(row).then(|| v.value(row).to_vec())),
                            Column::Text(v) => query.bind(v.is_valid(row).then(|| v.value(row).to_owned())),
                        };
                    }
                }
                query.execute(c).await?;
            }
        }
        Ok(())
    }
}

/// One array for each column.
async fn insert_arrays(
    connection: &mut PgConnection,
    sql: &str,
    columns: &Columns,
    rows: &[usize],
) -> Result<(), sqlx::Error> {
    let mut query = sqlx::query::<Postgres>(trusted(sql));
    for column in &columns.0 {
        query = match column {
            Column::Int(v) => query.bind(rows.iter().map(|&r| v.is_valid(r).then(|| v.value(r))).collect::<Vec<_>>()),
            Column::Float(v) => query.bind(rows.iter().map(|&r| v.is_valid(r).then(|| v.value(r))).collect::<Vec<_>>()),
            Column::Bool(v) => query.bind(rows.iter().map(|&r| v.is_valid(r).then(|| v.value(r))).collect::<Vec<_>>()),
            Column::Bytes(v) => query.bind(rows.iter().map(|&r| v.is_valid(r).then(|| v.value(r))).collect::<Vec<_>>()),
            Column::Text(v) => query.bind(rows.iter().map(|&r| v.is_valid(r).then(|| v.value(r))).collect::<Vec<_>>()),
        };
    }
    query.execute(connection).await.map(drop)
}

/// The types of a table's columns, in the order in which we write them.
async fn column_types(connection: &mut PgConnection, server: &Server, table: &Table) -> Result<Vec<String>> {
    // Without their lengths: a cast to `varchar(5)` would cut a text, the insert itself refuses it.
    let sql = "SELECT a.attname::text, format_type(a.atttypid, -1) FROM pg_attribute a \
               WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped";
    let types: Vec<(String, String)> =
        sqlx::query_as(sql).bind(server.quote(&table.name)).fetch_all(connection).await.map_err(failed)?;
    let type_of = |(name, _): &(String, super::columns::Kind)| {
        let found = types.iter().find(|(column, _)| column == name);
        found.map(|(_, t)| t.clone()).ok_or_else(|| Error::outside(format!("no column `{name}` in `{}`", table.name)))
    };
    table.columns.iter().map(type_of).collect()
}

async fn postgres(url: &SecretUrl) -> Result<PgConnection, sqlx::Error> {
    let options = PgConnectOptions::from_str(url.expose())?.application_name("tailwater").disable_statement_logging();
    let mut connection = options.connect().await?;
    // Times without a zone are UTC, in whatever type the table keeps them.
    connection.execute(sqlx::raw_sql("SET TIME ZONE 'UTC'")).await?;
    Ok(connection)
}

async fn mysql(url: &SecretUrl) -> Result<MySqlConnection, sqlx::Error> {
    let options = MySqlConnectOptions::from_str(url.expose())?.disable_statement_logging();
    let mut connection = options.connect().await?;
    // Without it a value that does not fit would be cut, with a warning that nobody reads.
    let strict = "SET SESSION sql_mode = CONCAT(@@sql_mode, ',STRICT_ALL_TABLES')";
    connection.execute(sqlx::raw_sql(strict)).await?;
    Ok(connection)
}

async fn sqlite(file: &Path) -> Result<SqliteConnection, sqlx::Error> {
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder)?;
    }
    SqliteConnectOptions::new()
        .filename(file)
        .create_if_missing(true)
        // Readers go on while we write.
        .journal_mode(SqliteJournalMode::Wal)
        // A delivery that was confirmed must outlive a power failure: the outbox forgets it.
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(SQLITE_BUSY_TIMEOUT)
        .disable_statement_logging()
        .connect()
        .await
}
