//! One connection to any of the three databases, for reading only.

use std::path::Path;
use std::time::Duration;

use pipeline::config::SecretUrl;
use pipeline::error::{Error, Result};
use pipeline::schema::FieldType;
use sqlx::mysql::MySqlConnection;
use sqlx::postgres::PgConnection;
use sqlx::{AssertSqlSafe, Executor};

use super::collect::Collector;
use super::key::Key;
use super::plan::Server;
use super::sqlite::SqliteReader;
use super::{mysql, postgres, sqlite};

/// How long opening a connection may take. Longer than a lost packet's retransmission, shorter than a person's patience.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How much longer than the server we wait for a statement, so that the server's own message comes first.
const TIMEOUT_GRACE: Duration = Duration::from_secs(1);

/// An open connection.
pub(super) struct Connection {
    driver: Driver,
    timeout: Duration,
}

enum Driver {
    Postgres(PgConnection),
    MySql(MySqlConnection),
    Sqlite(SqliteReader),
}

/// A column of a result, with the type to declare it with.
pub(super) struct Column {
    pub(super) name: String,
    /// `None` if only the values tell (SQLite).
    pub(super) field_type: Option<FieldType>,
    /// Whether it is a transaction id of PostgreSQL.
    pub(super) is_xid8: bool,
    /// The table and its column that the values come from unchanged, where the database tells (SQLite).
    pub(super) origin: Option<(String, String)>,
}

impl Connection {
    /// Opens a connection that can only read and whose statements end after `timeout`.
    pub(super) async fn open(server: &Server, url: &SecretUrl, folder: &Path, timeout: Duration) -> Result<Self> {
        let open = async {
            Ok::<_, Error>(match server {
                Server::Postgres => Driver::Postgres(postgres::connect(url, timeout).await?),
                Server::MySql => Driver::MySql(mysql::connect(url, timeout).await?),
                Server::Sqlite(file) => Driver::Sqlite(sqlite::connect(&folder.join(file), timeout).await?),
            })
        };
        let driver = tokio::time::timeout(CONNECT_TIMEOUT, open)
            .await
            .map_err(|_| Error::outside(format!("no connection to {url} within {} s", CONNECT_TIMEOUT.as_secs())))??;
        Ok(Self { driver, timeout })
    }

    /// Runs one query and hands its rows to `rows` until that wants no more.
    pub(super) async fn fetch(&mut self, sql: &str, keys: &[Key], rows: &mut Collector) -> Result<()> {
        in_time(self.timeout, async {
            match &mut self.driver {
                Driver::Postgres(connection) => postgres::fetch(connection, sql, keys, rows).await,
                Driver::MySql(connection) => mysql::fetch(connection, sql, keys, rows).await,
                Driver::Sqlite(reader) => reader.fetch(sql, keys, rows).await,
            }
        })
        .await
    }

    /// The columns that a query would give, without running it.
    pub(super) async fn columns(&mut self, sql: &str) -> Result<Vec<Column>> {
        in_time(self.timeout, async {
            match &mut self.driver {
                Driver::Postgres(connection) => postgres::columns(connection, sql).await,
                Driver::MySql(connection) => mysql::columns(connection, sql).await,
                Driver::Sqlite(reader) => reader.columns(sql).await,
            }
        })
        .await
    }

    /// Whether a column is the `INTEGER PRIMARY KEY AUTOINCREMENT` of a SQLite table.
    pub(super) async fn is_autoincrement(&mut self, column: &Column) -> Result<bool> {
        match (&mut self.driver, &column.origin) {
            (Driver::Sqlite(reader), Some((table, name))) => {
                in_time(self.timeout, reader.is_autoincrement(table, name)).await
            }
            _ => Ok(false),
        }
    }

    /// The greatest id that the AUTOINCREMENT table of a column has ever given out.
    pub(super) async fn sequence(&mut self, column: &Column) -> Result<Option<i64>> {
        match (&mut self.driver, &column.origin) {
            (Driver::Sqlite(reader), Some((table, _))) => in_time(self.timeout, reader.sequence(table)).await.map(Some),
            _ => Ok(None),
        }
    }

    /// Starts a transaction in which all queries see the same state of the database.
    pub(super) async fn begin(&mut self) -> Result<()> {
        in_time(self.timeout, async {
            match &mut self.driver {
                Driver::Postgres(c) => {
                    c.execute(sqlx::raw_sql("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")).await.map(drop)
                }
                Driver::MySql(c) => {
                    let begin = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ; \
                                 START TRANSACTION WITH CONSISTENT SNAPSHOT, READ ONLY";
                    c.execute(sqlx::raw_sql(begin)).await.map(drop)
                }
                Driver::Sqlite(reader) => reader.execute("BEGIN DEFERRED").await,
            }
            .map_err(failed)
        })
        .await
    }

    /// Ends the transaction; there is nothing to keep.
    pub(super) async fn end(&mut self) -> Result<()> {
        in_time(self.timeout, async {
            match &mut self.driver {
                Driver::Postgres(c) => c.execute(sqlx::raw_sql("ROLLBACK")).await.map(drop),
                Driver::MySql(c) => c.execute(sqlx::raw_sql("ROLLBACK")).await.map(drop),
                Driver::Sqlite(reader) => reader.execute("ROLLBACK").await,
            }
            .map_err(failed)
        })
        .await
    }
}

/// What `statement` gives, if it ends in time. A server that is gone without a word never answers.
async fn in_time<T>(timeout: Duration, statement: impl Future<Output = Result<T>>) -> Result<T> {
    match tokio::time::timeout(timeout + TIMEOUT_GRACE, statement).await {
        Ok(done) => done,
        Err(_) => Err(Error::outside(format!("the database took longer than `timeout` ({timeout:?})"))),
    }
}

/// The text of the YAML as sqlx wants it: the YAML is trusted as the program is, and values are always bound.
pub(super) fn trusted(sql: &str) -> AssertSqlSafe<String> {
    AssertSqlSafe(sql.to_owned())
}

/// What a database or its connection said. Every error is tried again: a missing table may be made, a
/// password be set, a server come back.
pub(super) fn failed(error: sqlx::Error) -> Error {
    match error {
        sqlx::Error::Database(error) => Error::outside(error.message()),
        sqlx::Error::Io(error) => Error::outside("connection lost").because(error),
        sqlx::Error::Configuration(error) => Error::user("the URL is wrong").because(error),
        other => Error::outside(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_database_that_never_answers_is_an_error() {
        let error = in_time::<()>(Duration::from_millis(1), std::future::pending()).await.expect_err("no answer");
        assert!(error.to_string().contains("took longer than `timeout` (1ms)"), "{error}");
    }
}
