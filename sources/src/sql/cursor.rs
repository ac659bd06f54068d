//! New rows only: what is asked for the rows behind a position, and what keeps rows of a transaction that commits late
//! from being passed over.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use pipeline::batch::BATCH_ROWS_MAX;
use pipeline::config::Fields;
use pipeline::error::{Error, Result};
use pipeline::plugin::{PullReader, Pulled};

use super::collect::Collector;
use super::connection::{Column, Connection};
use super::key::{self, Key};
use super::plan::{Guard, Query, Server};

/// Reads the rows after its position.
pub(super) struct CursorReader {
    connection: Connection,
    fields: Fields,
    select: Select,
    /// The cursor in the last row read; empty before the first.
    keys: Vec<Key>,
    lag: Option<Lag>,
}

impl CursorReader {
    /// A reader behind `keys` of a query whose result has the columns `result`, if what `guard` asks for is there.
    pub(super) async fn open(
        mut connection: Connection,
        server: &Server,
        query: &Query,
        columns: &[String],
        keys: Vec<Key>,
        (guard, result): (&Guard, &[Column]),
    ) -> Result<Self> {
        let first = columns.first().and_then(|name| result.iter().find(|column| column.name == *name));
        let is_xid8 = first.is_some_and(|column| column.is_xid8);
        if is_xid8 && columns.len() == 1 {
            let column = &columns[0];
            return Err(Error::outside(format!(
                "the rows of one transaction share their `{column}`, which is an xid8; end the cursor with a unique \
                 column: `cursor: [{column}, id]`"
            )));
        }
        if *guard == Guard::Xid8 && !is_xid8 {
            return Err(Error::outside(format!(
                "`commit_order: xid8`: the cursor's first column is no xid8; add one with `ALTER TABLE … ADD COLUMN {} \
                 xid8 DEFAULT pg_current_xact_id()`",
                columns.first().map_or("xid", String::as_str)
            )));
        }
        if is_xid8 && let Some(position) = keys.first() {
            not_behind(&mut connection, position).await?;
        }
        let lag = match guard {
            Guard::Lag(lag) => Some(Lag::new(*lag)),
            _ => None,
        };
        let select = Select { server: server.clone(), query: query.sql.clone(), columns: columns.to_vec(), is_xid8 };
        Ok(Self { connection, fields: query.fields.clone(), select, keys, lag })
    }

    /// Whether there are rows, and none of them at the position or behind it: the newest were deleted, or the database was set
    /// back. Costs no more than a poll.
    pub(super) async fn lies_behind_all(&mut self) -> Result<bool> {
        if self.select.is_xid8 || self.keys.is_empty() {
            return Ok(false);
        }
        for (sql, bound) in [self.select.at_or_behind(&self.keys), self.select.any()] {
            let mut rows = Collector::new(&Fields::default(), &[], 1);
            self.connection.fetch(&sql, &bound, &mut rows).await?;
            if rows.seen() > 0 {
                return Ok(bound.is_empty());
            }
        }
        Ok(false)
    }

    /// The rows after the position and up to `until`.
    async fn rows(&mut self, until: Option<&[Key]>) -> Result<Pulled> {
        let mut rows = Collector::new(&self.fields, &self.select.columns, BATCH_ROWS_MAX);
        let (sql, bound) = self.select.rows(&self.keys, until);
        self.connection.fetch(&sql, &bound, &mut rows).await?;
        if rows.seen() > 0 {
            self.keys = rows.keys().to_vec();
        }
        let more = rows.seen() == BATCH_ROWS_MAX;
        let (rows, errors) = rows.finish()?;
        Ok(Pulled { rows, errors, position: key::encode(&self.select.columns, &self.keys), more })
    }

    /// No rows.
    fn nothing(&self) -> Result<Pulled> {
        let (rows, errors) = Collector::new(&self.fields, &[], 0).finish()?;
        Ok(Pulled { rows, errors, position: key::encode(&self.select.columns, &self.keys), more: false })
    }

    /// The cursor in the newest row that can be seen; empty if there is none after the position.
    async fn newest(&mut self) -> Result<Vec<Key>> {
        let mut rows = Collector::new(&Fields::default(), &self.select.columns, 1);
        let (sql, bound) = self.select.newest(&self.keys);
        self.connection.fetch(&sql, &bound, &mut rows).await?;
        Ok(rows.keys().to_vec())
    }
}

#[async_trait]
impl PullReader for CursorReader {
    async fn next(&mut self) -> Result<Option<Pulled>> {
        // Taken from `self` while rows are fetched; lost only with the whole reader, after an error.
        let Some(mut lag) = self.lag.take() else { return self.rows(None).await.map(Some) };
        // The time is noted before the rows are read and after the newest is seen: so it is never too short.
        let pulled = match lag.ripe(Instant::now()) {
            Some(until) => self.rows(Some(&until)).await?,
            None => self.nothing()?,
        };
        if !pulled.more {
            lag.until = None;
            let newest = self.newest().await?;
            lag.see(Instant::now(), newest);
        }
        self.lag = Some(lag);
        Ok(Some(pulled))
    }
}

/// Refuses a position that the server's transactions have not come to: it was restored from a dump, and counts anew.
async fn not_behind(connection: &mut Connection, position: &Key) -> Result<()> {
    let sql = "SELECT 1 AS one WHERE $1::text::xid8 >= pg_snapshot_xmax(pg_current_snapshot())";
    let mut rows = Collector::new(&Fields::default(), &[], 1);
    connection.fetch(sql, std::slice::from_ref(position), &mut rows).await?;
    if rows.seen() == 0 {
        return Ok(());
    }
    Err(Error::outside(
        "the server has not come to the transaction that the position names: it is another one, or was restored from \
         a dump, and counts anew; give the source another name to read all rows again",
    ))
}

/// Refuses a position that an AUTOINCREMENT table has not come to: its next ids would be passed over. Not tried again, because
/// the table may come to the position meanwhile.
pub(super) fn not_behind_sequence(position: &[Key], sequence: i64) -> Result<()> {
    match position {
        [Key::Int(id)] if *id > sequence => Err(Error::outside(format!(
            "the table has not come to the id {id} that the position names, its AUTOINCREMENT is at {sequence}: it is another \
             one, or was restored from a copy, and counts anew; give the source another name to read all rows again"
        ))
        .fatal()),
        _ => Ok(()),
    }
}

/// Makes the queries of a cursor.
struct Select {
    server: Server,
    query: String,
    columns: Vec<String>,
    /// Whether the first column is a transaction id of PostgreSQL.
    is_xid8: bool,
}

impl Select {
    /// The query for the next rows after `after` and up to `until`, in the order of the cursor, and its values.
    fn rows(&self, after: &[Key], until: Option<&[Key]>) -> (String, Vec<Key>) {
        let (condition, bound) = self.condition(after, until);
        let order = self.quoted().join(", ");
        (self.sql("*", &condition, &format!("{order} LIMIT {BATCH_ROWS_MAX}")), bound)
    }

    /// The query for the cursor in the newest row after `after`, and its values.
    fn newest(&self, after: &[Key]) -> (String, Vec<Key>) {
        let (condition, bound) = self.condition(after, None);
        let quoted = self.quoted();
        let order: Vec<String> = quoted.iter().map(|column| format!("{column} DESC")).collect();
        (self.sql(&quoted.join(", "), &condition, &format!("{} LIMIT 1", order.join(", "))), bound)
    }

    /// The query for one row at `position` or behind it, and its values.
    fn at_or_behind(&self, position: &[Key]) -> (String, Vec<Key>) {
        let mut bound = Vec::new();
        let condition = self.compare(&self.quoted(), ">=", position, &mut bound);
        (format!("SELECT 1 AS one FROM (\n{}\n) AS tailwater WHERE {condition} LIMIT 1", self.query), bound)
    }

    /// The query for any row.
    fn any(&self) -> (String, Vec<Key>) {
        (format!("SELECT 1 AS one FROM (\n{}\n) AS tailwater LIMIT 1", self.query), Vec::new())
    }

    fn sql(&self, columns: &str, condition: &str, order: &str) -> String {
        // The line break keeps a comment at the query's end from swallowing the rest.
        format!("SELECT {columns} FROM (\n{}\n) AS tailwater WHERE {condition} ORDER BY {order}", self.query)
    }

    fn quoted(&self) -> Vec<String> {
        self.columns.iter().map(|column| self.server.quote_column(column)).collect()
    }

    fn condition(&self, after: &[Key], until: Option<&[Key]>) -> (String, Vec<Key>) {
        let quoted = self.quoted();
        let mut bound = Vec::new();
        let mut conditions = Vec::new();
        if after.is_empty() {
            // Null is never after a position; so it is not read before one either.
            conditions.extend(quoted.iter().map(|column| format!("{column} IS NOT NULL")));
        } else {
            conditions.push(self.compare(&quoted, ">", after, &mut bound));
        }
        if let Some(until) = until {
            conditions.push(self.compare(&quoted, "<=", until, &mut bound));
        }
        if self.is_xid8 {
            // Every transaction before this one has ended: what can be seen of them is all there will be.
            conditions.push(format!("{} < pg_snapshot_xmin(pg_current_snapshot())", quoted[0]));
        }
        (conditions.join(" AND "), bound)
    }

    /// Several columns are compared as one row value, so that ties in the first lose nothing; the comparison of
    /// the first column alone says the same once more, for planners that use no index for row values.
    fn compare(&self, quoted: &[String], operator: &str, keys: &[Key], bound: &mut Vec<Key>) -> String {
        let mut value = |column: usize, key: &Key| {
            bound.push(key.clone());
            match (&self.server, self.is_xid8 && column == 0) {
                (Server::Postgres, true) => format!("${}::text::xid8", bound.len()),
                (Server::Postgres, false) => format!("${}", bound.len()),
                (Server::MySql | Server::Sqlite(_), _) => "?".to_owned(),
            }
        };
        match (quoted, keys) {
            ([column], [key]) => format!("{column} {operator} {}", value(0, key)),
            _ => {
                let first = keys.first().map(|key| value(0, key)).unwrap_or_default();
                let values: Vec<String> = keys.iter().enumerate().map(|(column, key)| value(column, key)).collect();
                let wide = if operator == ">" { ">=" } else { operator };
                format!("{} {wide} {first} AND ({}) {operator} ({})", quoted[0], quoted.join(", "), values.join(", "))
            }
        }
    }
}

/// Most places that are remembered as seen: they divide `lag` finely enough that a row waits 3 % longer at worst.
const MARKS_MAX: u32 = 32;

/// Holds rows back until the transactions that were open when they were first seen have ended.
///
/// A value is drawn before its row can be seen. So when the newest row is seen, every smaller value has been drawn; and
/// when the longest transaction's time has passed since then, every row with a smaller value can be seen, or was
/// rolled back. Up to there the rows are read, in order. Neither gaps nor clocks of different machines matter.
struct Lag {
    lag: Duration,
    /// When which row was the newest, oldest first.
    marks: VecDeque<(Instant, Vec<Key>)>,
    /// Up to here all rows can be seen; `None` if they have been read.
    until: Option<Vec<Key>>,
}

impl Lag {
    fn new(lag: Duration) -> Self {
        Self { lag, marks: VecDeque::new(), until: None }
    }

    /// The newest row that was seen at least `lag` before `now`, until it is read.
    fn ripe(&mut self, now: Instant) -> Option<Vec<Key>> {
        while self.marks.front().is_some_and(|(seen, _)| now.duration_since(*seen) >= self.lag) {
            self.until = self.marks.pop_front().map(|(_, keys)| keys);
        }
        self.until.clone()
    }

    /// Notes that `newest` was the newest row before `now`.
    fn see(&mut self, now: Instant, newest: Vec<Key>) {
        let is_near =
            |(seen, keys): &(Instant, Vec<Key>)| *keys == newest || now.duration_since(*seen) < self.lag / MARKS_MAX;
        if !newest.is_empty() && !self.marks.back().is_some_and(is_near) {
            self.marks.push_back((now, newest));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn select(server: Server, columns: &[&str], is_xid8: bool) -> Select {
        let columns = columns.iter().map(|column| (*column).to_owned()).collect();
        Select { server, query: "q -- x".into(), columns, is_xid8 }
    }

    #[test]
    fn a_cursor_compares_whole_rows() {
        let (two, one) = ([Key::Time(5), Key::Int(7)], [Key::Int(7)]);
        let until = [Key::Time(6), Key::Int(9)];
        let conditions = |select: Select, after: &[Key], until: Option<&[Key]>| {
            let (sql, bound) = select.rows(after, until);
            let condition = sql.strip_prefix("SELECT * FROM (\nq -- x\n) AS tailwater WHERE ").expect(&sql).to_owned();
            (condition, bound.len())
        };
        for (select, after, until, expected, bound) in [
            (
                select(Server::Postgres, &["at", "id"], false),
                &two[..],
                None,
                r#""at" >= $1 AND ("at", "id") > ($2, $3) ORDER BY "at", "id" LIMIT 8192"#,
                3,
            ),
            (
                select(Server::Postgres, &["x", "id"], true),
                &two,
                None,
                r#""x" >= $1::text::xid8 AND ("x", "id") > ($2::text::xid8, $3) AND "x" < pg_snapshot_xmin(pg_current_snapshot()) ORDER BY "x", "id" LIMIT 8192"#,
                3,
            ),
            (
                select(Server::Postgres, &["at", "id"], false),
                &two,
                Some(&until[..]),
                r#""at" >= $1 AND ("at", "id") > ($2, $3) AND "at" <= $4 AND ("at", "id") <= ($5, $6) ORDER BY "at", "id" LIMIT 8192"#,
                6,
            ),
            (select(Server::MySql, &["id"], false), &one, None, "`id` > ? ORDER BY `id` LIMIT 8192", 1),
            (
                select(Server::MySql, &["at", "id"], false),
                &[],
                None,
                "`at` IS NOT NULL AND `id` IS NOT NULL ORDER BY `at`, `id` LIMIT 8192",
                0,
            ),
        ] {
            assert_eq!(conditions(select, after, until), (expected.to_owned(), bound));
        }
        let (sql, _) = select(Server::MySql, &["at", "id"], false).newest(&two);
        assert_eq!(
            sql,
            "SELECT `at`, `id` FROM (\nq -- x\n) AS tailwater WHERE `at` >= ? AND (`at`, `id`) > (?, ?) ORDER BY `at` \
             DESC, `id` DESC LIMIT 1"
        );
    }

    #[test]
    fn rows_are_ripe_when_they_were_seen_long_enough_ago() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let key = |id: i64| vec![Key::Int(id)];
        let mut lag = Lag::new(Duration::from_millis(3200));
        assert_eq!(lag.ripe(at(0)), None);
        lag.see(at(0), Vec::new());
        lag.see(at(100), key(5));
        lag.see(at(500), key(5));
        lag.see(at(1000), key(7));
        lag.see(at(1050), key(8));
        assert_eq!(lag.ripe(at(3299)), None);
        assert_eq!(lag.ripe(at(3300)), Some(key(5)), "when it was first seen counts");
        assert_eq!(lag.ripe(at(3400)), Some(key(5)), "until it is read");
        lag.until = None;
        assert_eq!(lag.ripe(at(4199)), None);
        assert_eq!(lag.ripe(at(9000)), Some(key(7)), "one too near to the last is seen again later");
        for n in 0..10_000 {
            lag.see(at(10_000 + n), key(i64::try_from(n).expect("small")));
            lag.ripe(at(10_000 + n));
        }
        assert!(lag.marks.len() <= MARKS_MAX as usize + 1, "{}", lag.marks.len());
    }
}
