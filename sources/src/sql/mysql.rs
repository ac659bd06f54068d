//! MySQL and MariaDB: connection, values, binding.

use std::str::FromStr;
use std::time::Duration;

use chrono::{NaiveDate, NaiveDateTime};
use futures::TryStreamExt;
use pipeline::config::SecretUrl;
use pipeline::error::{Error, Result};
use pipeline::rows::Cell;
use pipeline::schema::FieldType;
use sqlx::mysql::types::MySqlTime;
use sqlx::mysql::{MySql, MySqlArguments, MySqlConnectOptions, MySqlConnection, MySqlRow};
use sqlx::query::Query;
use sqlx::types::BigDecimal;
use sqlx::{Column as _, ConnectOptions, Decode, Executor, Row, SqlSafeStr, Statement, TypeInfo, ValueRef};

use super::cells;
use super::collect::{Collector, SqlRow};
use super::connection::{Column, failed, trusted};
use super::key::Key;

/// Connects for reading. Sessions run in UTC, so that `TIMESTAMP` columns are UTC.
pub(super) async fn connect(url: &SecretUrl, timeout: Duration) -> Result<MySqlConnection> {
    let options = MySqlConnectOptions::from_str(url.expose())
        .map_err(failed)?
        // The user's own SQL: `||` means what the server says it means.
        .pipes_as_concat(false)
        .disable_statement_logging();
    let mut connection = options.connect().await.map_err(|e| failed(e).context(format!("connecting to {url}")))?;
    let version: String = sqlx::query_scalar("SELECT VERSION()").fetch_one(&mut connection).await.map_err(failed)?;
    let limit = if version.contains("MariaDB") {
        format!("max_statement_time = {}", timeout.as_secs_f64())
    } else {
        format!("max_execution_time = {}", timeout.as_millis())
    };
    let session = format!("SET SESSION {limit}; SET SESSION TRANSACTION READ ONLY");
    connection.execute(sqlx::raw_sql(trusted(&session))).await.map_err(failed)?;
    Ok(connection)
}

/// Runs a query; see [`super::connection::Connection::fetch`].
pub(super) async fn fetch(
    connection: &mut MySqlConnection,
    sql: &str,
    keys: &[Key],
    rows: &mut Collector,
) -> Result<()> {
    let mut query = sqlx::query(trusted(sql));
    for key in keys {
        query = bind(query, key)?;
    }
    let mut stream = query.fetch(connection);
    while let Some(row) = stream.try_next().await.map_err(failed)? {
        if !rows.take(&row)? {
            break;
        }
    }
    Ok(())
}

fn bind<'q>(query: Query<'q, MySql, MySqlArguments>, key: &Key) -> Result<Query<'q, MySql, MySqlArguments>> {
    Ok(match key {
        Key::Int(value) => query.bind(*value),
        Key::Unsigned(value) => query.bind(*value),
        Key::Float(value) => query.bind(*value),
        Key::Text(text) => query.bind(text.clone()),
        Key::Bytes(bytes) => query.bind(bytes.clone()),
        Key::Time(us) => query.bind(Key::naive(*us)?),
        Key::Day(day) => query.bind(Key::date(*day)?),
        Key::Decimal(digits) => query
            .bind(BigDecimal::from_str(digits).map_err(|e| Error::internal(format!("cursor at {digits}")).because(e))?),
        Key::TimeUtc(_) | Key::Uuid(_) => return Err(key.foreign("MySQL")),
    })
}

/// The columns of a query.
pub(super) async fn columns(connection: &mut MySqlConnection, sql: &str) -> Result<Vec<Column>> {
    let statement = connection.prepare(trusted(sql).into_sql_str()).await.map_err(failed)?;
    let column = |column: &sqlx::mysql::MySqlColumn| Column {
        name: column.name().to_owned(),
        field_type: Some(declared(column.type_info().name())),
        is_xid8: false,
        origin: None,
    };
    Ok(statement.columns().iter().map(column).collect())
}

/// The type to declare a column of this MySQL type with.
fn declared(type_name: &str) -> FieldType {
    match type_name {
        "BOOLEAN" => FieldType::Bool,
        "FLOAT" | "DOUBLE" | "DECIMAL" => FieldType::Float,
        "TIMESTAMP" | "DATETIME" => FieldType::Timestamp(None),
        "DATE" => FieldType::Date,
        "JSON" => FieldType::Json,
        "BINARY" | "VARBINARY" | "TINYBLOB" | "BLOB" | "MEDIUMBLOB" | "LONGBLOB" | "GEOMETRY" => FieldType::Bytes,
        _ if is_int(type_name) || is_unsigned(type_name) => FieldType::Int,
        _ => FieldType::String,
    }
}

fn is_int(type_name: &str) -> bool {
    matches!(type_name, "BOOLEAN" | "TINYINT" | "SMALLINT" | "MEDIUMINT" | "INT" | "BIGINT")
}

fn is_unsigned(type_name: &str) -> bool {
    matches!(type_name, "YEAR" | "BIT") || type_name.ends_with(" UNSIGNED")
}

/// Decodes without asking whether the Rust type fits: the caller has looked at the column's type.
fn get<'r, T: Decode<'r, MySql>>(row: &'r MySqlRow, index: usize) -> Result<T, String> {
    row.try_get_unchecked(index).map_err(|e| match e {
        sqlx::Error::ColumnDecode { source, .. } => source.to_string(),
        other => other.to_string(),
    })
}

fn time_us(time: NaiveDateTime) -> i64 {
    time.and_utc().timestamp_micros()
}

impl SqlRow for MySqlRow {
    fn width(&self) -> usize {
        self.len()
    }

    fn name(&self, index: usize) -> &str {
        self.column(index).name()
    }

    fn cell(&self, index: usize, wanted: FieldType) -> Result<Cell<'_>, String> {
        let value = self.try_get_raw(index).map_err(|e| e.to_string())?;
        if value.is_null() {
            return Ok(Cell::Null);
        }
        let type_info = value.type_info();
        Ok(match type_info.name() {
            name if is_int(name) => cells::int_or_bool(get(self, index)?, wanted),
            name if is_unsigned(name) => unsigned(get(self, index)?, wanted),
            "FLOAT" | "DOUBLE" => Cell::Float(get(self, index)?),
            "DECIMAL" => cells::decimal(get::<&str>(self, index)?.into(), wanted),
            "TIMESTAMP" | "DATETIME" => cells::time(time_us(get(self, index)?), wanted),
            "DATE" => cells::day(cells::day_number(get::<NaiveDate>(self, index)?), wanted)?,
            "TIME" => Cell::Text(get::<MySqlTime>(self, index)?.to_string().into()),
            "JSON" => cells::json(get(self, index)?, wanted),
            // MariaDB keeps JSON as text, and text with a binary collation is told as bytes.
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
            name if is_int(name) => Key::Int(get(self, index)?),
            name if is_unsigned(name) => {
                let value: u64 = get(self, index)?;
                i64::try_from(value).map_or(Key::Unsigned(value), Key::Int)
            }
            "DECIMAL" => Key::Decimal(get(self, index)?),
            "TIMESTAMP" | "DATETIME" => Key::Time(time_us(get(self, index)?)),
            "DATE" => Key::Day(cells::day_number(get(self, index)?)),
            "CHAR" | "VARCHAR" | "TINYTEXT" | "TEXT" | "MEDIUMTEXT" | "LONGTEXT" => Key::Text(get(self, index)?),
            "BINARY" | "VARBINARY" | "TINYBLOB" | "BLOB" | "MEDIUMBLOB" | "LONGBLOB" => {
                let bytes: Vec<u8> = get(self, index)?;
                // Text with a binary collation is told as bytes too; compared as text, it uses its index.
                String::from_utf8(bytes).map_or_else(|e| Key::Bytes(e.into_bytes()), Key::Text)
            }
            other => return Err(format!("{other} cannot be a cursor; cast it in the query")),
        })
    }
}

/// A number beyond `i64` stays exact as text.
fn unsigned<'a>(value: u64, wanted: FieldType) -> Cell<'a> {
    match i64::try_from(value) {
        Ok(value) => cells::int_or_bool(value, wanted),
        Err(_) => cells::decimal(value.to_string().into(), wanted),
    }
}
