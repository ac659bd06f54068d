//! The cursor of the SQL source while transactions commit in another order than they began.

use std::collections::BTreeSet;
use std::path::Path;

use futures::future::{join, join_all};
use pipeline::plugin::SourceConfig;

use crate::sql::{Database, checked, connect, next, texts};
use crate::support::PATIENCE;
use crate::support::databases::Session;

/// Longer than any transaction of these tests is open, even on a machine that is busy.
const LAG: &str = "4s";

/// A table with a cursor that is exact in one of the ways there are.
struct Trial {
    kind: &'static str,
    db: Database,
    options: String,
}

impl Trial {
    async fn xid8() -> Self {
        let db = Database::postgres().await;
        db.execute(
            "CREATE TABLE t (id bigint GENERATED ALWAYS AS IDENTITY, xid xid8 NOT NULL DEFAULT pg_current_xact_id(), \
             v int, PRIMARY KEY (xid, id))",
        )
        .await;
        let options = "table: t\ncursor: [xid, id]\ncommit_order: xid8\nfields: {xid: int, id: int, v: int}";
        Self { kind: "postgres xid8", db, options: options.to_owned() }
    }

    async fn postgres_lag() -> Self {
        let db = Database::postgres().await;
        db.execute(
            "CREATE TABLE t (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, at timestamptz DEFAULT now(), v int)",
        )
        .await;
        let options = format!("table: t\ncursor: [at, id]\nlag: {LAG}\nfields: {{at: timestamp, id: int, v: int}}");
        Self { kind: "postgres lag", db, options }
    }

    async fn mariadb_lag() -> Self {
        let db = Database::mariadb().await;
        db.execute("CREATE TABLE t (id bigint AUTO_INCREMENT PRIMARY KEY, v int)").await;
        let options = format!("table: t\ncursor: id\nlag: {LAG}\nfields: {{id: int, v: int}}");
        Self { kind: "mariadb lag", db, options }
    }

    async fn sqlite() -> Self {
        let db = Database::sqlite().await;
        db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY AUTOINCREMENT, v int)").await;
        let options = "query: SELECT id, v FROM t\ncursor: id\ncommit_order: autoincrement\nfields: {id: int, v: int}";
        Self { kind: "sqlite", db, options: options.to_owned() }
    }

    /// All values of the table.
    async fn truth(&self) -> BTreeSet<i64> {
        let rows = self.db.rows("SELECT v FROM t", "{v: int}").await;
        rows.iter().map(|text| value(text)).collect()
    }
}

/// `v` of a row.
fn value(text: &str) -> i64 {
    let row: serde_json::Value = serde_json::from_str(text).expect("JSON");
    row["v"].as_i64().expect("v")
}

/// A reader as the engine drives it through crashes: what was read since the last checkpoint is read again.
struct Ledger {
    /// Values that a checkpoint covers, in the order of reading.
    kept: Vec<i64>,
    position: Option<Vec<u8>>,
}

impl Ledger {
    fn new() -> Self {
        Self { kept: Vec::new(), position: None }
    }

    /// Reads until `count` values are kept, with a crash before every other checkpoint that has rows in it.
    async fn read(&mut self, trial: &Trial, count: usize) {
        let give_up = tokio::time::Instant::now() + PATIENCE;
        let mut crash = false;
        'connected: loop {
            let mut reader = trial.db.read(&trial.options, self.position.as_deref()).await;
            while self.kept.len() < count {
                assert!(tokio::time::Instant::now() < give_up, "{}: {} of {count}", trial.kind, self.kept.len());
                let pulled = next(&mut reader).await;
                assert!(pulled.errors.is_empty(), "{}: {:?}", trial.kind, pulled.errors);
                if pulled.rows.num_rows() > 0 {
                    crash = !crash;
                    if crash {
                        continue 'connected;
                    }
                }
                self.kept.extend(texts(&pulled).iter().map(|text| value(text)));
                self.position = Some(pulled.position);
            }
            return;
        }
    }
}

async fn late_trial(trial: Trial) {
    let kind = trial.kind;
    let mut late = Session::open(&trial.db.session_url()).await;
    late.execute("BEGIN").await;
    late.execute("INSERT INTO t (v) VALUES (1)").await;
    trial.db.execute("INSERT INTO t (v) VALUES (2)").await;
    let mut reader = trial.db.read(&trial.options, None).await;
    let pulled = next(&mut reader).await;
    assert_eq!(texts(&pulled), Vec::<String>::new(), "{kind}: a row that may not be the next one");
    late.execute("INSERT INTO t (v) VALUES (3)").await;
    late.execute("COMMIT").await;
    drop(reader);
    let mut ledger = Ledger { kept: Vec::new(), position: Some(pulled.position) };
    ledger.read(&trial, 3).await;
    ledger.kept.sort_unstable();
    assert_eq!(ledger.kept, [1, 2, 3], "{kind}");

    // A transaction that is rolled back holds nothing up for good.
    late.execute("BEGIN").await;
    late.execute("INSERT INTO t (v) VALUES (4)").await;
    trial.db.execute("INSERT INTO t (v) VALUES (5)").await;
    late.execute("ROLLBACK").await;
    ledger.read(&trial, 4).await;
    assert_eq!(ledger.kept, [1, 2, 3, 5], "{kind}");
}

#[tokio::test]
async fn rows_of_a_transaction_that_commits_late_are_read_once_and_none_is_passed_over() {
    let lagging = join(late_trial(Trial::postgres_lag().await), late_trial(Trial::mariadb_lag().await));
    join(late_trial(Trial::xid8().await), lagging).await;
}

#[tokio::test]
async fn without_lag_and_commit_order_a_late_commit_is_passed_over_as_the_page_says() {
    for trial in [Trial::postgres_lag().await, Trial::mariadb_lag().await] {
        let mut late = Session::open(&trial.db.session_url()).await;
        late.execute("BEGIN").await;
        late.execute("INSERT INTO t (v) VALUES (1)").await;
        trial.db.execute("INSERT INTO t (v) VALUES (2)").await;
        let mut reader = trial.db.read("table: t\ncursor: id\nfields: {id: int, v: int}", None).await;
        assert_eq!(texts(&next(&mut reader).await).len(), 1, "{}", trial.kind);
        late.execute("COMMIT").await;
        assert_eq!(texts(&next(&mut reader).await).len(), 0, "{}", trial.kind);
    }
}

/// Commits each transaction after the next one has drawn its ids.
async fn overlapping_writer(url: String, writer: i64) {
    let mut sessions = [Session::open(&url).await, Session::open(&url).await];
    for n in 0..TRANSACTIONS {
        let (this, other) = (n % 2, (n + 1) % 2);
        sessions[this].execute("BEGIN").await;
        for row in 0..ROWS {
            let v = (writer * i64::from(u16::MAX)) + i64::try_from(n * ROWS + row).expect("small");
            sessions[this].execute(&format!("INSERT INTO t (v) VALUES ({v})")).await;
        }
        if n > 0 {
            sessions[other].execute(if n % 7 == 0 { "ROLLBACK" } else { "COMMIT" }).await;
        }
    }
    sessions[(TRANSACTIONS + 1) % 2].execute("COMMIT").await;
}

const WRITERS: i64 = 4;
const TRANSACTIONS: usize = 30;
const ROWS: usize = 3;
/// Rows of all transactions that are not rolled back.
const COMMITTED: usize = WRITERS as usize * (TRANSACTIONS - (TRANSACTIONS - 1) / 7) * ROWS;

/// One after the other, as SQLite wants it; the newest row of every other transaction is deleted.
async fn sqlite_writer(url: String, writer: i64) {
    let mut session = Session::open(&url).await;
    for n in 0..TRANSACTIONS - (TRANSACTIONS - 1) / 7 {
        let v = |row: usize| writer * i64::from(u16::MAX) + i64::try_from(n * ROWS + row).expect("small");
        session.execute("BEGIN IMMEDIATE").await;
        if n % 2 == 0 {
            session.execute("INSERT INTO t (v) VALUES (-1)").await;
            session.execute("DELETE FROM t WHERE v = -1").await;
        }
        for row in 0..ROWS {
            session.execute(&format!("INSERT INTO t (v) VALUES ({})", v(row))).await;
        }
        session.execute("COMMIT").await;
    }
}

async fn concurrent_trial(trial: Trial) {
    let url = trial.db.session_url();
    let mut ledger = Ledger::new();
    let write = async {
        if trial.kind == "sqlite" {
            join_all((0..WRITERS).map(|writer| sqlite_writer(url.clone(), writer))).await;
        } else {
            join_all((0..WRITERS).map(|writer| overlapping_writer(url.clone(), writer))).await;
        }
    };
    join(write, ledger.read(&trial, COMMITTED)).await;
    let truth = trial.truth().await;
    assert_eq!(truth.len(), COMMITTED, "{}", trial.kind);
    let once: BTreeSet<i64> = ledger.kept.iter().copied().collect();
    assert_eq!(ledger.kept.len(), once.len(), "{}: none twice", trial.kind);
    assert_eq!(once, truth, "{}", trial.kind);
}

#[tokio::test]
async fn concurrent_transactions_are_read_once_each_through_crashes() {
    let lagging = join(concurrent_trial(Trial::postgres_lag().await), concurrent_trial(Trial::mariadb_lag().await));
    let exact = join(concurrent_trial(Trial::xid8().await), concurrent_trial(Trial::sqlite().await));
    join(exact, lagging).await;
}

#[tokio::test]
async fn an_xid8_column_is_used_without_being_asked_for() {
    let mut trial = Trial::xid8().await;
    trial.options = trial.options.replace("commit_order: xid8\n", "");
    late_trial(trial).await;
}

#[tokio::test]
async fn a_commit_order_that_the_table_does_not_have_is_refused() {
    let refused = async |db: &Database, options: &str| {
        let error = connect(&mut db.source(options), None).await.err().unwrap_or_else(|| panic!("{options}"));
        assert_eq!(error.retry, pipeline::error::Retry::BackOff, "the table may be changed");
        error.to_string()
    };
    let trial = Trial::postgres_lag().await;
    let options = "table: t\ncursor: [id, v]\ncommit_order: xid8\nfields: {id: int, v: int}";
    let error = refused(&trial.db, options).await;
    assert!(error.contains("ADD COLUMN id xid8 DEFAULT pg_current_xact_id()"), "{error}");

    let trial = Trial::xid8().await;
    let error = refused(&trial.db, "table: t\ncursor: xid\nfields: {xid: int}").await;
    assert!(error.contains("`cursor: [xid, id]`"), "{error}");
    let dumped = trial.options.replace("[xid, id]", "{column: [xid, id], start: [99999999, 0]}");
    let error = refused(&trial.db, &dumped).await;
    assert!(error.contains("restored from a dump"), "{error}");

    let db = Database::sqlite().await;
    db.execute(
        "CREATE TABLE plain (id INTEGER PRIMARY KEY, v int); CREATE TABLE other (id int, v int);
         CREATE TABLE exact (\"Id\" INTEGER PRIMARY KEY AUTOINCREMENT, v int);
         CREATE VIEW seen AS SELECT id AS id, v FROM exact",
    )
    .await;
    for (table, cursor, is_exact) in [
        ("plain", "id", false),
        ("other", "id", false),
        ("exact", "v", false),
        ("exact", "Id", true),
        ("seen", "id", true),
    ] {
        let options = |order| format!("table: {table}\ncursor: {cursor}\n{order}fields: {{{cursor}: int}}");
        assert!(connect(&mut db.source(&options("")), None).await.is_ok(), "{table}");
        let asked = options("commit_order: autoincrement\n");
        match is_exact {
            true => assert!(connect(&mut db.source(&asked), None).await.is_ok(), "{table}"),
            false => {
                let error = refused(&db, &asked).await;
                assert!(error.contains("no INTEGER PRIMARY KEY AUTOINCREMENT"), "{table}: {error}");
            }
        }
    }
}

#[tokio::test]
async fn a_table_that_counts_anew_is_refused() {
    for order in ["commit_order: autoincrement\n", ""] {
        let mut trial = Trial::sqlite().await;
        trial.options = trial.options.replace("commit_order: autoincrement\n", order);
        trial.db.execute("INSERT INTO t (v) VALUES (1), (2), (3)").await;
        let mut ledger = Ledger::new();
        ledger.read(&trial, 3).await;
        let position = ledger.position.as_deref();
        // Deleted rows are no reason: their ids are not given out again.
        trial.db.execute("DELETE FROM t").await;
        assert!(connect(&mut trial.db.source(&trial.options), position).await.is_ok());
        for set_back in ["UPDATE sqlite_sequence SET seq = 2", "DELETE FROM sqlite_sequence"] {
            trial.db.execute(set_back).await;
            let error = connect(&mut trial.db.source(&trial.options), position).await.err().expect(set_back);
            assert!(error.to_string().contains("has not come to the id 3 that the position names"), "{error}");
            assert_eq!(error.retry, pipeline::error::Retry::Never, "it may come there, and rows would be passed over");
        }
        assert!(connect(&mut trial.db.source(&trial.options), None).await.is_ok(), "read from the start");
    }
}

#[test]
fn mistakes_about_the_order_of_commits_are_named() {
    for (url, options, expected) in [
        ("sqlite:x", "lag: 5s", "5:6: error: source s: `lag` belongs to a `cursor`"),
        ("sqlite:x", "commit_order: assured", "`commit_order` belongs to a `cursor`"),
        ("postgres://h/d", "cursor: id\nlag: 0s", "`lag` must be longer than zero"),
        ("postgres://h/d", "cursor: id\nlag: soon", "6:6: error"),
        ("postgres://h/d", "cursor: [x, id]\nlag: 5s\ncommit_order: xid8", "exclude each other"),
        ("postgres://h/d", "cursor: id\ncommit_order: autoincrement", "it can have `xid8`, `assured`"),
        ("postgres://h/d", "cursor: x\ncommit_order: xid8", "end with a unique column: `cursor: [x, id]`"),
        ("postgres://h/d", "cursor: [s, id]\ncommit_order: xid8", "the cursor begins with no xid8"),
        ("mysql://h/d", "cursor: [x, id]\ncommit_order: xid8", "it can have `lag`, `assured`"),
        ("sqlite:x", "cursor: [x, id]\ncommit_order: xid8", "it can have `autoincrement`, `assured`"),
        ("sqlite:x", "cursor: [x, id]\ncommit_order: autoincrement", "no AUTOINCREMENT id"),
        ("sqlite:x", "cursor: s\ncommit_order: autoincrement", "no AUTOINCREMENT id"),
        ("sqlite:x", "cursor: id\ncommit_order: sure", "6:15: error"),
    ] {
        let options = format!("table: t\n\nfields: {{id: int, x: int, s: string}}\n{options}");
        let problems = checked(url, &options, Path::new(".")).err().unwrap_or_default();
        assert!(problems.contains(expected), "{options}\ngave {problems}");
    }
}

#[test]
fn a_position_means_the_same_rows_while_their_place_and_order_stay() {
    let identity = |url: &str, options: &str| {
        let (config, _) = checked(url, options, Path::new(".")).unwrap_or_else(|problems| panic!("{problems}"));
        config.identity()
    };
    let (url, options) = ("postgres://me:secret@host/d", "table: t\ncursor: id\nfields: {id: int}");
    let known = identity(url, options);
    assert!(known.as_ref().is_some_and(|text| !text.contains("secret")), "{known:?}");
    for (url, options) in [
        ("postgresql://other:rotated@host:5432/d?sslmode=require", options),
        (url, "table: t\ncursor: {column: id, start: 7}\nfields: {name: string, id: int}\nlag: 5s"),
        (url, "table: t\ncursor: id\nfields: {id: int}\nevery: 3s\ntimeout: 1m\ncommit_order: assured"),
    ] {
        assert_eq!(identity(url, options), known, "{url} {options}");
    }
    for (url, options) in [
        ("postgres://me:secret@elsewhere/d", options),
        ("postgres://me:secret@host:5433/d", options),
        ("postgres://me:secret@host/e", options),
        // Another schema; and the database of the user's name.
        ("postgres://me:secret@host/d?options=-c%20search_path%3Dother", options),
        ("postgres://me:secret@host", options),
        ("mysql://me:secret@host:5432/d", options),
        (url, "table: u\ncursor: id\nfields: {id: int}"),
        (url, "query: SELECT * FROM t\ncursor: id\nfields: {id: int}"),
        (url, "table: t\ncursor: [at, id]\nfields: {id: int, at: timestamp}"),
    ] {
        assert_ne!(identity(url, options), known, "{url} {options}");
    }
    assert_ne!(identity("postgres://me@host", options), identity("postgres://you@host/", options));
    assert_eq!(identity(url, "table: t\nfields: {id: int}"), None, "no cursor, no position");
}
