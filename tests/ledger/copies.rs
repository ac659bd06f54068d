//! The sinks under test beside Parquet: tables that get a copy of every row.

use std::collections::BTreeMap;
use std::sync::Arc;

use sqlx::{AssertSqlSafe, Connection};
use tokio::runtime::{Builder, Runtime};

use super::feed::Setting;
use crate::support::databases::{self, POSTGRES, Server, unique};

/// A table that gets the rows of every source.
pub(super) struct Copies {
    _server: Option<Arc<Server>>,
    runtime: Runtime,
    /// For the program.
    routed: String,
    /// For the test.
    url: String,
}

impl Copies {
    pub(super) fn open_postgres(setting: &Setting<'_>) -> Self {
        let server = POSTGRES.get();
        // The sink keeps a table of deliveries beside its own.
        let database = unique("copies");
        let (first, create) = (server.url("postgres"), format!("CREATE DATABASE {database}"));
        runtime().block_on(databases::execute(&first, &create));
        let url = server.url(&database);
        let routed = url.replace(&server.port.to_string(), &(setting.route)(server.port).to_string());
        Self::create(Some(server), url, routed)
    }

    pub(super) fn open_sqlite(setting: &Setting<'_>) -> Self {
        let url = format!("sqlite:{}?mode=rwc", setting.folder.join("copies.db").display());
        Self::create(None, url, "sqlite:copies.db".to_owned())
    }

    fn create(server: Option<Arc<Server>>, url: String, routed: String) -> Self {
        let runtime = runtime();
        runtime.block_on(databases::execute(&url, "CREATE TABLE copies (s text, n bigint)"));
        Self { _server: server, runtime, routed, url }
    }

    /// The sink's block in the YAML.
    pub(super) fn yaml(&self) -> String {
        let routed = &self.routed;
        format!(
            "type: sql\nurl: \"{routed}\"\ntable: copies\ncolumns: {{s: s, n: n}}\nbatch: {{rows: 50, every: 10ms}}"
        )
    }

    /// How often each number of a source is in the table.
    pub(super) fn counts(&self, feed: &str) -> BTreeMap<u64, u64> {
        let sql = AssertSqlSafe(format!("SELECT n, count(*) FROM copies WHERE s = '{feed}' GROUP BY n"));
        let rows: Vec<(i64, i64)> = self.runtime.block_on(async {
            if self.url.starts_with("postgres") {
                let mut connection = sqlx::PgConnection::connect(&self.url).await.expect("connected");
                sqlx::query_as(sql).fetch_all(&mut connection).await.expect("rows")
            } else {
                let mut connection = sqlx::SqliteConnection::connect(&self.url).await.expect("connected");
                sqlx::query_as(sql).fetch_all(&mut connection).await.expect("rows")
            }
        });
        rows.into_iter().map(|(n, count)| (n.unsigned_abs(), count.unsigned_abs())).collect()
    }
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}
