//! From the YAML to what is asked of the database, with every mistake named.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use indexmap::IndexMap;
use pipeline::config::{At, Fields, Position, did_you_mean};
use pipeline::schema::FieldType;

use super::SqlConfig;
use super::key::Key;
use super::options::{CommitOrder, Cursor, SqlField};

/// Which database the URL names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Server {
    /// `postgres://`, `postgresql://`.
    Postgres,
    /// `mysql://`, `mariadb://`.
    MySql,
    /// `sqlite:FILE`, the path as written.
    Sqlite(PathBuf),
}

impl Server {
    /// The server that `url` names, or what is wrong with the URL. The message never holds the URL: a
    /// password may stand in it.
    pub(super) fn of(url: &str) -> Result<Self, String> {
        if let Some(file) = url.strip_prefix("sqlite:") {
            let file = file.strip_prefix("//").unwrap_or(file);
            return match file {
                "" | ":memory:" => {
                    Err("SQLite needs a file: `sqlite:demo.db`; nobody else sees a database in memory".into())
                }
                _ if file.contains('?') => Err("a SQLite URL takes no parameters: `sqlite:demo.db`".into()),
                _ => Ok(Self::Sqlite(Path::new(file).to_path_buf())),
            };
        }
        let expected = "expected `sqlite:FILE`, `postgres://USER:PASSWORD@HOST/DATABASE` or `mysql://…`";
        let parsed = url::Url::parse(url).map_err(|e| format!("not a URL ({e}); {expected}"))?;
        match parsed.scheme() {
            "postgres" | "postgresql" => Ok(Self::Postgres),
            "mysql" | "mariadb" => Ok(Self::MySql),
            other => Err(format!("unknown database `{other}`; {expected}")),
        }
    }

    /// Where the database is that `url` names: host, port, database; no password, and no settings of the connection but
    /// `options`, which may choose a schema. Without a database PostgreSQL takes that of the user's name.
    pub(super) fn place(&self, url: &str) -> Option<String> {
        let (word, port) = match self {
            Self::Postgres => ("postgres", 5432),
            Self::MySql => ("mysql", 3306),
            Self::Sqlite(file) => return Some(format!("sqlite {}", file.display())),
        };
        let url = url::Url::parse(url).ok()?;
        let names_a_place = |name: &str| matches!(name, "host" | "hostaddr" | "port" | "dbname" | "socket" | "options");
        let more = url.query_pairs().filter(|(name, _)| names_a_place(name)).map(|(_, value)| format!(" {value}"));
        let host = url.host_str().unwrap_or_default();
        let database = if url.path().trim_matches('/').is_empty() { url.username() } else { url.path() };
        Some(format!("{word} {host}:{}{database}{}", url.port().unwrap_or(port), more.collect::<String>()))
    }

    /// A table's name in quotes; dots separate a schema from its table.
    pub(super) fn quote(&self, name: &str) -> String {
        name.split('.').map(|part| self.quote_column(part)).collect::<Vec<_>>().join(".")
    }

    /// A column's name in quotes.
    pub(super) fn quote_column(&self, name: &str) -> String {
        // SQLite takes an unknown name in double quotes for a text, so it gets MySQL's quotes, which it knows.
        let quote = if *self == Self::Postgres { "\"" } else { "`" };
        format!("{quote}{}{quote}", name.replace(quote, &quote.repeat(2)))
    }
}

/// What a source asks.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) server: Server,
    pub(super) mode: Mode,
}

/// How it asks.
#[derive(Clone, Debug)]
pub(super) enum Mode {
    /// All rows at each poll.
    Snapshot { query: Query, rows_max: usize },
    /// One row of structs at each poll, from one read transaction.
    Together(Vec<(String, Query)>),
    /// New rows only.
    Cursor { query: Query, columns: Vec<String>, start: Vec<Key>, guard: Guard },
}

/// What keeps a cursor from passing over rows of transactions that commit late.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guard {
    /// Nothing that the YAML says.
    None,
    /// The first column is a PostgreSQL `xid8`.
    Xid8,
    /// The column is a SQLite `INTEGER PRIMARY KEY AUTOINCREMENT`.
    Autoincrement,
    /// The user knows.
    Assured,
    /// Rows wait so long after they are first seen.
    Lag(Duration),
}

/// A query and the columns that are read from it.
#[derive(Clone, Debug)]
pub(super) struct Query {
    pub(super) sql: String,
    pub(super) fields: Fields,
}

impl Plan {
    /// The columns of the source.
    pub(super) fn schema(&self) -> SchemaRef {
        match &self.mode {
            Mode::Snapshot { query, .. } | Mode::Cursor { query, .. } => query.fields.schema(),
            Mode::Together(queries) => Arc::new(Schema::new(
                queries
                    .iter()
                    .map(|(name, query)| {
                        let columns = DataType::Struct(query.fields.schema().fields().clone());
                        Field::new(name, columns, true)
                    })
                    .collect::<Vec<_>>(),
            )),
        }
    }
}

/// Takes a problem: where, what, and a hint.
pub(super) type Report<'a> = &'a mut dyn FnMut(Position, String, Option<String>);

/// Most rows of one snapshot, if the YAML does not say: one batch. A metric is an aggregate; more rows are
/// nearly always a forgotten `GROUP BY`.
pub(super) const ROWS_MAX_DEFAULT: usize = 8192;
/// Most rows that `rows_max` may ask for: all of them are held in memory at once.
const ROWS_MAX_LIMIT: usize = 1_000_000;

/// Makes the plan, or reports at least one problem.
pub(super) fn plan(config: &SqlConfig, report: Report<'_>) -> Option<Plan> {
    let mut ok = durations(config, report);
    let server = Server::of(config.url.expose()).map_err(|e| report(config.url.position, e, None)).ok();
    let given = [config.query.is_some(), config.table.is_some(), config.queries.is_some()];
    if given.iter().filter(|g| **g).count() != 1 {
        let hint = "`query: SELECT …`, `table: NAME`, or `queries: {NAME: SELECT …}`".to_owned();
        report(Position::default(), "expected exactly one of `query`, `table`, `queries`".into(), Some(hint));
        return None;
    }
    if config.fields.is_empty() {
        let hint = "`pipeline fields` asks the database and prints the block".to_owned();
        report(Position::default(), "`fields` is missing".into(), Some(hint));
        ok = false;
    }
    if config.queries.is_some() {
        let queries = together(config, report);
        return ok.then_some(Plan { server: server?, mode: Mode::Together(queries?) });
    }
    let (fields, server) = (columns(config, report), server?);
    let query = Query { sql: sql(config, &server, report)?, fields: fields? };
    let mode = match &config.cursor {
        Some(cursor) => cursor_mode(config, cursor, query, &server, report)?,
        None => Mode::Snapshot { query, rows_max: config.rows_max.as_ref().map_or(ROWS_MAX_DEFAULT, |r| r.value) },
    };
    ok.then_some(Plan { server, mode })
}

/// The columns of `query` or `table` as `fields` say them, whatever else is wrong.
pub(super) fn declared(config: &SqlConfig) -> Option<SchemaRef> {
    let is_flat = config.queries.is_none() && !config.fields.is_empty();
    is_flat.then(|| columns(config, &mut |_, _, _| {})).flatten().map(|fields| fields.schema())
}

fn durations(config: &SqlConfig, report: Report<'_>) -> bool {
    let mut ok = true;
    for (name, duration) in [("every", &config.every), ("timeout", &config.timeout)] {
        if duration.value.0.is_zero() {
            report(duration.position, format!("`{name}` must be longer than zero"), None);
            ok = false;
        }
    }
    if let Some(rows_max) = &config.rows_max
        && !(1..=ROWS_MAX_LIMIT).contains(&rows_max.value)
    {
        report(rows_max.position, format!("`rows_max` is 1 to {ROWS_MAX_LIMIT}"), None);
        ok = false;
    }
    if let (Some(rows_max), true) = (&config.rows_max, config.cursor.is_some() || config.queries.is_some()) {
        report(rows_max.position, "`rows_max` belongs to a `query` or `table` without `cursor`".into(), None);
        ok = false;
    }
    let of_cursor = [
        ("lag", config.lag.as_ref().map(|lag| lag.position)),
        ("commit_order", config.commit_order.as_ref().map(|order| order.position)),
    ];
    for (name, position) in of_cursor {
        if let Some(position) = position.filter(|_| config.cursor.is_none()) {
            report(position, format!("`{name}` belongs to a `cursor`"), None);
            ok = false;
        }
    }
    ok
}

/// The flat columns of `query` and `table`.
fn columns(config: &SqlConfig, report: Report<'_>) -> Option<Fields> {
    let mut columns = Vec::new();
    let mut ok = true;
    for (name, field) in &config.fields {
        match &field.value {
            SqlField::Column(field_type) => columns.push((name.as_str(), *field_type)),
            SqlField::Query(_) => {
                let hint = "columns in columns belong to `queries`".to_owned();
                report(field.position, format!("field `{name}`: expected a type such as `float`"), Some(hint));
                ok = false;
            }
        }
    }
    ok.then(|| Fields::of(columns))
}

/// The text of `query`, or the query of a whole `table`.
fn sql(config: &SqlConfig, server: &Server, report: Report<'_>) -> Option<String> {
    if let Some(query) = &config.query {
        return statement(query, report);
    }
    let table = config.table.as_ref()?;
    if table.trim().is_empty() {
        report(table.position, "`table` is empty".into(), None);
        return None;
    }
    let columns: Vec<String> = config.fields.keys().map(|name| server.quote_column(name)).collect();
    Some(format!("SELECT {} FROM {}", columns.join(", "), server.quote(table)))
}

/// The text without the semicolon at its end, which could not stand inside another statement.
fn statement(text: &At<String>, report: Report<'_>) -> Option<String> {
    let sql = text.trim().trim_end_matches(';').trim_end();
    if sql.is_empty() {
        report(text.position, "the query is empty".into(), None);
        return None;
    }
    Some(sql.to_owned())
}

/// `queries` with the `fields` of each.
fn together(config: &SqlConfig, report: Report<'_>) -> Option<Vec<(String, Query)>> {
    let queries = config.queries.as_ref()?;
    let mut planned = Vec::new();
    if let Some(cursor) = &config.cursor {
        report(cursor.position, "`cursor` belongs to `query` or `table`, not to `queries`".into(), None);
        return None;
    }
    if queries.is_empty() {
        report(queries.position, "`queries` is empty".into(), None);
    }
    for (name, text) in &queries.value {
        let sql = statement(text, report);
        let fields = match config.fields.get(name).map(|f| (&f.value, f.position)) {
            Some((SqlField::Query(columns), _)) if !columns.is_empty() => {
                Some(Fields::of(columns.iter().map(|(name, t)| (name.as_str(), *t))))
            }
            Some((_, position)) => {
                let hint = format!("`{name}: {{COLUMN: TYPE, …}}`");
                report(position, format!("query `{name}` needs the types of its columns"), Some(hint));
                None
            }
            None => {
                let hint = format!("`fields: {{{name}: {{COLUMN: TYPE, …}}}}`");
                report(text.position, format!("query `{name}` has no `fields`"), Some(hint));
                None
            }
        };
        if let (Some(sql), Some(fields)) = (sql, fields) {
            planned.push((name.clone(), Query { sql, fields }));
        }
    }
    let mut ok = planned.len() == queries.len() && !planned.is_empty();
    for (name, field) in config.fields.iter().filter(|(name, _)| !queries.contains_key(*name)) {
        let hint = did_you_mean(name, queries.keys());
        report(field.position, format!("no query `{name}` for these fields"), hint);
        ok = false;
    }
    ok.then_some(planned)
}

fn cursor_mode(
    config: &SqlConfig,
    cursor: &At<Cursor>,
    query: Query,
    server: &Server,
    report: Report<'_>,
) -> Option<Mode> {
    let place = |at: &At<String>| if at.position.line == 0 { cursor.position } else { at.position };
    let types = cursor_types(config, cursor, report)?;
    let mut start = Vec::new();
    if !cursor.start.is_empty() && cursor.start.len() != types.len() {
        let message = format!("`start` has {} values for {} columns", cursor.start.len(), types.len());
        report(cursor.position, message, None);
        return None;
    }
    for (text, field_type) in cursor.start.iter().zip(types.values()) {
        match Key::parse(text, *field_type, server) {
            Ok(key) => start.push(key),
            Err(message) => report(place(text), message, None),
        }
    }
    let guard = guard(config, &types, server, report)?;
    let columns = types.keys().cloned().collect();
    (start.len() == cursor.start.len()).then_some(Mode::Cursor { query, columns, start, guard })
}

/// What `lag` and `commit_order` say, if the server and the cursor can have it.
fn guard(
    config: &SqlConfig,
    types: &IndexMap<String, FieldType>,
    server: &Server,
    report: Report<'_>,
) -> Option<Guard> {
    let Some(order) = &config.commit_order else {
        return Some(match &config.lag {
            Some(lag) if lag.value.0.is_zero() => {
                report(lag.position, "`lag` must be longer than zero".into(), None);
                return None;
            }
            Some(lag) => Guard::Lag(lag.value.0),
            None => Guard::None,
        });
    };
    let first = types.first().map(|(name, field_type)| (name.as_str(), *field_type));
    let (message, hint) = match (order.value, server, first) {
        _ if config.lag.is_some() => {
            ("`lag` and `commit_order` exclude each other".to_owned(), "keep `lag` if no order is sure".to_owned())
        }
        (CommitOrder::Assured, ..) => return Some(Guard::Assured),
        (CommitOrder::Xid8, Server::Postgres, Some((_, FieldType::Int))) if types.len() > 1 => {
            return Some(Guard::Xid8);
        }
        (CommitOrder::Xid8, Server::Postgres, Some((name, FieldType::Int))) => (
            "the rows of one transaction share their xid8".to_owned(),
            format!("end with a unique column: `cursor: [{name}, id]`"),
        ),
        (CommitOrder::Xid8, Server::Postgres, _) => {
            ("the cursor begins with no xid8".to_owned(), "begin it with an xid8 column, declared as `int`".to_owned())
        }
        (CommitOrder::Autoincrement, Server::Sqlite(_), Some((_, FieldType::Int))) if types.len() == 1 => {
            return Some(Guard::Autoincrement);
        }
        (CommitOrder::Autoincrement, Server::Sqlite(_), _) => (
            "the cursor is no AUTOINCREMENT id".to_owned(),
            "one column, the INTEGER PRIMARY KEY AUTOINCREMENT, declared as `int`".to_owned(),
        ),
        (order, server, _) => {
            let other = if matches!(server, Server::Postgres) { "`xid8`, `assured`" } else { "`lag`, `assured`" };
            let other = if matches!(server, Server::Sqlite(_)) { "`autoincrement`, `assured`" } else { other };
            (format!("`{}` is nothing that this database has", order.word()), format!("it can have {other}"))
        }
    };
    report(order.position, message, Some(hint));
    None
}

/// The cursor's columns with their types, if rows can be ordered by them without losing any.
fn cursor_types(config: &SqlConfig, cursor: &At<Cursor>, report: Report<'_>) -> Option<IndexMap<String, FieldType>> {
    let mut types = IndexMap::new();
    for column in &cursor.columns {
        let position = if column.position.line == 0 { cursor.position } else { column.position };
        match config.fields.get(&column.value).map(|f| &f.value) {
            Some(SqlField::Column(FieldType::Float | FieldType::Bool | FieldType::Bytes | FieldType::Json)) => {
                let hint = "int, string, timestamp, date and decimal can".to_owned();
                report(position, format!("`{}` cannot be a cursor by its type", column.value), Some(hint));
            }
            Some(SqlField::Column(field_type)) => {
                if types.insert(column.value.clone(), *field_type).is_some() {
                    report(position, format!("cursor column `{}` stands twice", column.value), None);
                }
            }
            _ => {
                let hint = did_you_mean(column, config.fields.keys())
                    .unwrap_or_else(|| format!("add `{}` to `fields`", column.value));
                report(position, format!("cursor column `{}` is not in `fields`", column.value), Some(hint));
            }
        }
    }
    if cursor.columns.is_empty() {
        report(cursor.position, "`cursor` names no column".into(), None);
    }
    if types.is_empty() || types.len() != cursor.columns.len() {
        return None;
    }
    if let Some((last, FieldType::Timestamp(_) | FieldType::Date)) = types.last() {
        let hint = format!("end with a unique column: `cursor: [{last}, id]`");
        let message = format!("rows with the same `{last}` would be skipped: a time alone is no cursor");
        report(cursor.position, message, Some(hint));
        return None;
    }
    Some(types)
}
