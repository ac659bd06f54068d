//! The SQL texts of the three databases.

use std::path::PathBuf;

use super::columns::Kind;

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
                "" | ":memory:" => Err("SQLite needs a file: `sqlite:demo.db`".into()),
                _ if file.contains('?') => Err("a SQLite URL takes no parameters: `sqlite:demo.db`".into()),
                _ => Ok(Self::Sqlite(file.into())),
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

    /// Most values of one statement: SQLite's and MySQL's own limits; PostgreSQL takes one array a column.
    pub(super) fn values_max(&self) -> usize {
        match self {
            Self::Postgres => usize::MAX,
            Self::MySql => 65_535,
            Self::Sqlite(_) => 32_766,
        }
    }

    /// The statements that open a delivery's transaction.
    pub(super) fn begin(&self) -> &'static str {
        match self {
            // The default may be stricter, and then waiting for another transaction ends in an error. A constraint that
            // is only looked at by COMMIT would refuse all rows together, and nobody could say which one is wrong.
            Self::Postgres => "BEGIN ISOLATION LEVEL READ COMMITTED; SET CONSTRAINTS ALL IMMEDIATE",
            Self::MySql => "START TRANSACTION",
            // Takes the write lock at once: a lock taken later could not be waited for.
            Self::Sqlite(_) => "BEGIN IMMEDIATE",
        }
    }

    fn column_type(&self, kind: Kind, is_key: bool) -> String {
        let word = match (self, kind) {
            (Self::Postgres, Kind::Text) => "text",
            (Self::Postgres, Kind::Int) => "bigint",
            (Self::Postgres, Kind::Float) => "double precision",
            (Self::Postgres, Kind::Bool) => "boolean",
            (Self::Postgres, Kind::Time) => "timestamptz",
            (Self::Postgres, Kind::Json) => "jsonb",
            (Self::Postgres, Kind::Bytes) => "bytea",
            (Self::Postgres | Self::MySql, Kind::Day) => "date",
            (Self::Postgres, Kind::Decimal(precision, scale)) => return format!("numeric({precision},{scale})"),
            // A key needs a length in MySQL; four of them fit into the longest index.
            (Self::MySql, Kind::Text) if is_key => "varchar(191)",
            (Self::MySql, Kind::Bytes) if is_key => "varbinary(255)",
            (Self::MySql, Kind::Text) => "longtext",
            (Self::MySql, Kind::Int) => "bigint",
            (Self::MySql, Kind::Float) => "double",
            (Self::MySql, Kind::Bool) => "boolean",
            (Self::MySql, Kind::Time) => "datetime(6)",
            (Self::MySql, Kind::Json) => "json",
            (Self::MySql, Kind::Bytes) => "longblob",
            (Self::MySql, Kind::Decimal(precision, scale)) => return format!("decimal({precision},{scale})"),
            (Self::Sqlite(_), Kind::Int) => "integer",
            (Self::Sqlite(_), Kind::Bool) => "boolean",
            (Self::Sqlite(_), Kind::Float) => "real",
            (Self::Sqlite(_), Kind::Bytes) => "blob",
            // Exact, and in order for times and days of one width; a number would lose digits.
            (Self::Sqlite(_), Kind::Text | Kind::Json | Kind::Time | Kind::Day | Kind::Decimal(..)) => "text",
        };
        word.to_owned()
    }

    /// `CREATE TABLE IF NOT EXISTS` with the columns and the key of a table.
    pub(super) fn create(&self, table: &Table) -> String {
        let mut parts: Vec<String> = Vec::new();
        for (name, kind) in &table.columns {
            let is_key = table.key.contains(name);
            let not_null = if is_key { " NOT NULL" } else { "" };
            parts.push(format!("{} {}{not_null}", self.quote_column(name), self.column_type(*kind, is_key)));
        }
        if !table.key.is_empty() {
            parts.push(format!("PRIMARY KEY ({})", self.list(&table.key)));
        }
        format!("CREATE TABLE IF NOT EXISTS {} ({})", self.quote(&table.name), parts.join(", "))
    }

    /// A query that gives no row and names every column, to see whether they are there.
    pub(super) fn probe(&self, table: &Table) -> String {
        let names: Vec<&String> = table.columns.iter().map(|(name, _)| name).collect();
        format!("SELECT {} FROM {} WHERE 1 = 0", self.list(names), self.quote(&table.name))
    }

    /// The insert or upsert of `rows` rows. PostgreSQL takes an array of each column instead, cast to
    /// `casts`, the types of the table's columns: one text for any number of rows.
    pub(super) fn insert(&self, table: &Table, casts: &[String], rows: usize) -> String {
        let names: Vec<&String> = table.columns.iter().map(|(name, _)| name).collect();
        let into = format!("INSERT INTO {} ({})", self.quote(&table.name), self.list(names));
        let values = match self {
            Self::Postgres => {
                let aliases: Vec<String> = (0..casts.len()).map(|i| format!("c{i}")).collect();
                let selected = aliases.iter().zip(casts).map(|(alias, cast)| format!("r.{alias}::{cast}"));
                let arrays = table.columns.iter().enumerate().map(|(i, (_, kind))| {
                    let element = match kind {
                        Kind::Int => "bigint",
                        Kind::Float => "double precision",
                        Kind::Bool => "boolean",
                        Kind::Bytes => "bytea",
                        Kind::Text | Kind::Json | Kind::Time | Kind::Day | Kind::Decimal(..) => "text",
                    };
                    format!("${}::{element}[]", i + 1)
                });
                format!("SELECT {} FROM unnest({}) AS r({})", join(selected), join(arrays), aliases.join(", "))
            }
            Self::MySql | Self::Sqlite(_) => {
                let row = format!("({})", vec!["?"; table.columns.len()].join(", "));
                format!("VALUES {}", vec![row; rows].join(", "))
            }
        };
        format!("{into} {values}{}", self.on_conflict(table))
    }

    fn on_conflict(&self, table: &Table) -> String {
        if table.key.is_empty() {
            return String::new();
        }
        let others: Vec<String> = table
            .columns
            .iter()
            .filter(|(name, _)| !table.key.contains(name))
            .map(|(name, _)| self.quote_column(name))
            .collect();
        if *self == Self::MySql {
            // With nothing but keys, an update that changes nothing; INSERT IGNORE would hide real errors.
            let others = if others.is_empty() { vec![self.quote_column(&table.key[0])] } else { others };
            return format!(
                " ON DUPLICATE KEY UPDATE {}",
                join(others.iter().map(|name| format!("{name} = VALUES({name})")))
            );
        }
        let key = self.list(&table.key);
        if others.is_empty() {
            return format!(" ON CONFLICT ({key}) DO NOTHING");
        }
        let updates = others.iter().map(|name| format!("{name} = excluded.{name}"));
        format!(" ON CONFLICT ({key}) DO UPDATE SET {}", join(updates))
    }

    /// Creates the table of deliveries done.
    pub(super) fn create_deliveries(&self, table: &str) -> String {
        let text = if *self == Self::MySql { "varchar(191)" } else { "text" };
        let [sink, input, id] = ["sink", "input", "id"].map(|name| self.quote_column(name));
        format!(
            "CREATE TABLE IF NOT EXISTS {} ({sink} {text} NOT NULL, {input} {text} NOT NULL, {id} bigint NOT NULL, \
             PRIMARY KEY ({sink}, {input}))",
            self.quote(table)
        )
    }

    /// Adds the line of a sink and a pipeline, if it is not there.
    pub(super) fn open_deliveries(&self, table: &str) -> String {
        let [sink, input, id] = ["sink", "input", "id"].map(|name| self.quote_column(name));
        let (first, second) = self.two_values();
        let table = self.quote(table);
        match self {
            // An update that changes nothing; INSERT IGNORE would hide real errors.
            Self::MySql => format!(
                "INSERT INTO {table} ({sink}, {input}, {id}) VALUES ({first}, {second}, -1) \
                 ON DUPLICATE KEY UPDATE {id} = {id}"
            ),
            _ => format!(
                "INSERT INTO {table} ({sink}, {input}, {id}) VALUES ({first}, {second}, -1) ON CONFLICT DO NOTHING"
            ),
        }
    }

    /// Moves the line on to a delivery of the rows after `first`; touches no row if some of them are there already.
    pub(super) fn claim_delivery(&self, table: &str, first: u64, id: u64) -> String {
        let [sink, input, column] = ["sink", "input", "id"].map(|name| self.quote_column(name));
        let (of_sink, of_input) = self.two_values();
        let table = self.quote(table);
        format!(
            "UPDATE {table} SET {column} = {id} \
             WHERE {sink} = {of_sink} AND {input} = {of_input} AND {column} <= {first}"
        )
    }

    /// The number of the last row that is there.
    pub(super) fn last_delivery(&self, table: &str) -> String {
        let [sink, input, id] = ["sink", "input", "id"].map(|name| self.quote_column(name));
        let (first, second) = self.two_values();
        format!("SELECT {id} FROM {} WHERE {sink} = {first} AND {input} = {second}", self.quote(table))
    }

    fn two_values(&self) -> (&'static str, &'static str) {
        if *self == Self::Postgres { ("$1", "$2") } else { ("?", "?") }
    }

    fn list<'a>(&self, names: impl IntoIterator<Item = &'a String>) -> String {
        join(names.into_iter().map(|name| self.quote_column(name)))
    }
}

fn join(parts: impl Iterator<Item = String>) -> String {
    parts.collect::<Vec<_>>().join(", ")
}

/// A table as one pipeline writes it.
#[derive(Clone, Debug)]
pub(super) struct Table {
    pub(super) name: String,
    /// Columns of the table.
    pub(super) columns: Vec<(String, Kind)>,
    /// For each, the column of the pipeline.
    pub(super) from: Vec<usize>,
    /// Columns of the table by which rows are replaced; empty to append.
    pub(super) key: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(key: &[&str]) -> Table {
        Table {
            name: "s.t".into(),
            columns: vec![("id".into(), Kind::Text), ("n".into(), Kind::Int)],
            from: vec![0, 1],
            key: key.iter().map(|k| (*k).to_owned()).collect(),
        }
    }

    #[test]
    fn each_server_gets_its_own_upsert() {
        let sqlite = Server::Sqlite("x".into());
        let casts = ["text".to_owned(), "integer".to_owned()];
        for (server, key, expected) in [
            (
                &sqlite,
                &["id"][..],
                "INSERT INTO `s`.`t` (`id`, `n`) VALUES (?, ?), (?, ?) ON CONFLICT (`id`) DO UPDATE SET `n` = excluded.`n`",
            ),
            (
                &sqlite,
                &["id", "n"],
                "INSERT INTO `s`.`t` (`id`, `n`) VALUES (?, ?), (?, ?) ON CONFLICT (`id`, `n`) DO NOTHING",
            ),
            (&sqlite, &[], "INSERT INTO `s`.`t` (`id`, `n`) VALUES (?, ?), (?, ?)"),
            (
                &Server::MySql,
                &["id"],
                "INSERT INTO `s`.`t` (`id`, `n`) VALUES (?, ?), (?, ?) ON DUPLICATE KEY UPDATE `n` = VALUES(`n`)",
            ),
            (
                &Server::MySql,
                &["id", "n"],
                "INSERT INTO `s`.`t` (`id`, `n`) VALUES (?, ?), (?, ?) ON DUPLICATE KEY UPDATE `id` = VALUES(`id`)",
            ),
            (
                &Server::Postgres,
                &["id"],
                "INSERT INTO \"s\".\"t\" (\"id\", \"n\") SELECT r.c0::text, r.c1::integer FROM unnest($1::text[], $2::bigint[]) AS r(c0, c1) ON CONFLICT (\"id\") DO UPDATE SET \"n\" = excluded.\"n\"",
            ),
        ] {
            assert_eq!(server.insert(&table(key), &casts, 2), expected);
        }
    }

    #[test]
    fn names_are_quoted_and_quotes_doubled() {
        assert_eq!(Server::Postgres.quote("a\"b.c"), "\"a\"\"b\".\"c\"");
        assert_eq!(Server::MySql.quote_column("a`b.c"), "`a``b.c`");
    }

    #[test]
    fn a_created_table_has_the_key_not_null() {
        let sql = Server::MySql.create(&table(&["id"]));
        assert_eq!(
            sql,
            "CREATE TABLE IF NOT EXISTS `s`.`t` (`id` varchar(191) NOT NULL, `n` bigint, PRIMARY KEY (`id`))"
        );
    }
}
