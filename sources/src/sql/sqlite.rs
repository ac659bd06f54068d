//! SQLite: connection, values, binding.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::TryStreamExt;
use pipeline::error::{Error, Result};
use pipeline::rows::Cell;
use pipeline::schema::FieldType;
use sqlx::query::Query;
use sqlx::sqlite::{Sqlite, SqliteArguments, SqliteConnectOptions, SqliteConnection, SqliteRow};
use sqlx::{Column as _, ConnectOptions, Decode, Executor, Row, SqlSafeStr, Statement, TypeInfo, ValueRef};

use super::cells;
use super::collect::{Collector, SqlRow};
use super::connection::{Column, failed, trusted};
use super::key::Key;

/// Steps of SQLite's machine between two looks at the clock: some 100 us of work.
const STEPS_BETWEEN_LOOKS: i32 = 10_000;

/// A connection that can only read.
pub(super) struct SqliteReader {
    connection: SqliteConnection,
    timeout: Duration,
    /// When the running statement must end; SQLite has no such limit of its own.
    deadline: Arc<Mutex<Option<Instant>>>,
}

/// Opens an existing file for reading. A writer that holds a lock is waited for until `timeout`.
pub(super) async fn connect(file: &Path, timeout: Duration) -> Result<SqliteReader> {
    if !file.exists() {
        return Err(Error::outside(format!("database file {} does not exist", file.display())));
    }
    let options = SqliteConnectOptions::new()
        .filename(file)
        .read_only(true)
        .create_if_missing(false)
        .busy_timeout(timeout)
        .disable_statement_logging();
    let opening = |e| failed(e).context(format!("opening {}", file.display()));
    let mut connection = options.connect().await.map_err(opening)?;
    let deadline = Arc::new(Mutex::new(None::<Instant>));
    let watched = Arc::clone(&deadline);
    let in_time = move || {
        let deadline = *watched.lock().unwrap_or_else(PoisonError::into_inner);
        deadline.is_none_or(|deadline| Instant::now() < deadline)
    };
    connection.lock_handle().await.map_err(failed)?.set_progress_handler(STEPS_BETWEEN_LOOKS, in_time);
    Ok(SqliteReader { connection, timeout, deadline })
}

impl SqliteReader {
    /// Runs a query; see [`super::connection::Connection::fetch`].
    pub(super) async fn fetch(&mut self, sql: &str, keys: &[Key], rows: &mut Collector) -> Result<()> {
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + self.timeout);
        // Not kept prepared: the columns of a kept `SELECT *` go stale when the table changes.
        let mut query = sqlx::query(trusted(sql)).persistent(false);
        for key in keys {
            query = bind(query, key)?;
        }
        let mut stream = query.fetch(&mut self.connection);
        while let Some(row) = stream.try_next().await.map_err(failed)? {
            if !rows.take(&row)? {
                break;
            }
        }
        drop(stream);
        *self.deadline.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(())
    }

    /// The columns of a query. Those that are computed have no type before a value is seen.
    pub(super) async fn columns(&mut self, sql: &str) -> Result<Vec<Column>> {
        let statement = (&mut self.connection).prepare(trusted(sql).into_sql_str()).await.map_err(failed)?;
        let column = |column: &sqlx::sqlite::SqliteColumn| Column {
            name: column.name().to_owned(),
            field_type: declared(column.type_info().name()),
            is_xid8: false,
            origin: column.origin().table_column().map(|c| (c.table.to_string(), c.name.to_string())),
        };
        Ok(statement.columns().iter().map(column).collect())
    }

    /// Whether `column` is the `INTEGER PRIMARY KEY AUTOINCREMENT` of `table`: such ids are never used again.
    pub(super) async fn is_autoincrement(&mut self, table: &str, column: &str) -> Result<bool> {
        // A table has one such column at most, and it is the primary key.
        let sql = "SELECT sql FROM sqlite_schema AS t WHERE type = 'table' AND name = ? COLLATE NOCASE AND EXISTS \
                   (SELECT 1 FROM pragma_table_info(t.name) AS c WHERE c.pk = 1 AND c.name = ? COLLATE NOCASE)";
        let query = sqlx::query_scalar::<_, Option<String>>(sql).bind(table.to_owned()).bind(column.to_owned());
        let created = query.persistent(false).fetch_optional(&mut self.connection).await.map_err(failed)?;
        Ok(created.flatten().is_some_and(|sql| has_autoincrement(&sql)))
    }

    /// The greatest id that an AUTOINCREMENT table has ever given out; 0 before the first.
    pub(super) async fn sequence(&mut self, table: &str) -> Result<i64> {
        let sql = "SELECT seq FROM sqlite_sequence WHERE name = ? COLLATE NOCASE";
        let query = sqlx::query_scalar::<_, i64>(sql).bind(table.to_owned());
        let found = query.persistent(false).fetch_optional(&mut self.connection).await.map_err(failed)?;
        Ok(found.unwrap_or_default())
    }

    /// Runs a statement without values.
    pub(super) async fn execute(&mut self, sql: &'static str) -> Result<(), sqlx::Error> {
        (&mut self.connection).execute(sqlx::raw_sql(sql)).await.map(drop)
    }
}

fn bind<'q>(query: Query<'q, Sqlite, SqliteArguments>, key: &Key) -> Result<Query<'q, Sqlite, SqliteArguments>> {
    Ok(match key {
        Key::Int(value) => query.bind(*value),
        Key::Float(value) => query.bind(*value),
        Key::Text(text) => query.bind(text.clone()),
        Key::Bytes(bytes) => query.bind(bytes.clone()),
        // A decimal of `start:`; SQLite has no exact decimals, the column's affinity decides.
        Key::Decimal(digits) => query.bind(digits.clone()),
        Key::Unsigned(_) | Key::Time(_) | Key::TimeUtc(_) | Key::Day(_) | Key::Uuid(_) => {
            return Err(key.foreign("SQLite"));
        }
    })
}

/// The type to declare a column with, from its type in `CREATE TABLE`.
fn declared(type_name: &str) -> Option<FieldType> {
    Some(match type_name {
        "BOOLEAN" => FieldType::Bool,
        "INTEGER" => FieldType::Int,
        "REAL" | "NUMERIC" => FieldType::Float,
        "DATETIME" => FieldType::Timestamp(None),
        "DATE" => FieldType::Date,
        "BLOB" => FieldType::Bytes,
        "TEXT" | "TIME" => FieldType::String,
        _ => return None,
    })
}

/// Whether a `CREATE TABLE` has the keyword, outside of names, texts and comments.
fn has_autoincrement(sql: &str) -> bool {
    let mut rest = sql;
    while let Some(first) = rest.chars().next() {
        let word = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        if rest[..word].eq_ignore_ascii_case("autoincrement") {
            return true;
        }
        // What a doubled quote separates is one text more: none of it is looked at either.
        let closing = match first {
            '\'' => "'",
            '"' => "\"",
            '`' => "`",
            '[' => "]",
            '-' if rest.starts_with("--") => "\n",
            '/' if rest.starts_with("/*") => "*/",
            _ => {
                rest = &rest[word.max(first.len_utf8())..];
                continue;
            }
        };
        let inside = &rest[first.len_utf8()..];
        rest = inside.find(closing).map_or("", |end| &inside[end + closing.len()..]);
    }
    false
}

fn get<'r, T: Decode<'r, Sqlite>>(row: &'r SqliteRow, index: usize) -> Result<T, String> {
    row.try_get_unchecked(index).map_err(|e| match e {
        sqlx::Error::ColumnDecode { source, .. } => source.to_string(),
        other => other.to_string(),
    })
}

impl SqlRow for SqliteRow {
    fn width(&self) -> usize {
        self.len()
    }

    fn name(&self, index: usize) -> &str {
        self.column(index).name()
    }

    /// Each value has its own type here, whatever the column says.
    fn cell(&self, index: usize, wanted: FieldType) -> Result<Cell<'_>, String> {
        let value = self.try_get_raw(index).map_err(|e| e.to_string())?;
        if value.is_null() {
            return Ok(Cell::Null);
        }
        let type_info = value.type_info();
        Ok(match type_info.name() {
            "INTEGER" => cells::int_or_bool(get(self, index)?, wanted),
            "REAL" => Cell::Float(get(self, index)?),
            "TEXT" => cells::text(get(self, index)?, wanted),
            _ => cells::text_or_bytes(get(self, index)?, wanted)?,
        })
    }

    fn key(&self, index: usize) -> Result<Key, String> {
        let value = self.try_get_raw(index).map_err(|e| e.to_string())?;
        if value.is_null() {
            return Err("null".into());
        }
        let type_info = value.type_info();
        Ok(match type_info.name() {
            "INTEGER" => Key::Int(get(self, index)?),
            "REAL" => Key::Float(get(self, index)?),
            "TEXT" => Key::Text(get(self, index)?),
            _ => Key::Bytes(get(self, index)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn autoincrement_is_a_keyword() {
        for (sql, expected) in [
            ("CREATE TABLE t (id INTEGER PRIMARY KEY AUTOINCREMENT, a)", true),
            ("CREATE TABLE t (id INTEGER PRIMARY KEY autoincrement)", true),
            ("CREATE TABLE 'it''s' (\"id\" INTEGER PRIMARY KEY/**/AUTOINCREMENT)", true),
            ("CREATE TABLE t (id INTEGER PRIMARY KEY)", false),
            ("CREATE TABLE t (id INTEGER PRIMARY KEY, autoincrements)", false),
            ("CREATE TABLE t (id INTEGER PRIMARY KEY, [autoincrement] INT DEFAULT 'AUTOINCREMENT')", false),
            ("CREATE TABLE \"autoincrement\" (id INTEGER PRIMARY KEY -- AUTOINCREMENT\n)", false),
            ("CREATE TABLE t (id INTEGER PRIMARY KEY /* AUTOINCREMENT", false),
        ] {
            assert_eq!(has_autoincrement(sql), expected, "{sql}");
        }
    }
}
