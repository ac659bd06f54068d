//! The SQL source and sink against PostgreSQL, MariaDB and SQLite.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use pipeline::config::{CheckContext, Fields, Position, Problems, deserialize, tree};
use pipeline::error::Retry;
use pipeline::json::encode_rows;
use pipeline::live::Live;
use pipeline::plugin::{
    OutboxSink, PullReader, Pulled, Reader, Sink, SinkConfig, SinkContext, SinkInput, Source, SourceConfig,
    SourceContext, StreamShape,
};
use pipeline::rows::RowsBuilder;
use pipeline::status::Status;

use crate::support::databases::{self, MARIADB, POSTGRES, Server, execute, unique};
use crate::support::random::Random;
use crate::support::{PATIENCE, Scratch};

/// One empty database of one of the three kinds.
pub(crate) struct Database {
    url: String,
    folder: Scratch,
    _server: Option<Arc<Server>>,
}

impl Database {
    pub(crate) async fn postgres() -> Self {
        let server = POSTGRES.get();
        let name = unique("db");
        execute(&server.url("postgres"), &format!("CREATE DATABASE {name}")).await;
        Self { url: server.url(&name), folder: Scratch::new(), _server: Some(server) }
    }

    pub(crate) async fn mariadb() -> Self {
        let server = MARIADB.get();
        let name = unique("db");
        execute(&server.url("mysql"), &format!("CREATE DATABASE {name} CHARACTER SET utf8mb4")).await;
        Self { url: server.url(&name), folder: Scratch::new(), _server: Some(server) }
    }

    pub(crate) async fn sqlite() -> Self {
        let folder = Scratch::new();
        let url = format!("sqlite://{}?mode=rwc", folder.path().join("demo.db").display());
        execute(&url, "PRAGMA journal_mode = WAL").await;
        Self { url: "sqlite:demo.db".into(), folder, _server: None }
    }

    async fn all() -> [(&'static str, Self); 3] {
        [("postgres", Self::postgres().await), ("mariadb", Self::mariadb().await), ("sqlite", Self::sqlite().await)]
    }

    pub(crate) async fn execute(&self, sql: &str) {
        execute(&self.session_url(), sql).await;
    }

    /// The URL for a session that writes.
    pub(crate) fn session_url(&self) -> String {
        match self.url.strip_prefix("sqlite:") {
            Some(file) => format!("sqlite://{}", self.folder.path().join(file).display()),
            None => self.url.clone(),
        }
    }

    /// All rows of a query as JSON, through a snapshot source.
    pub(crate) async fn rows(&self, sql: &str, fields: &str) -> Vec<String> {
        let mut reader = self.read(&format!("query: {sql}\nfields: {fields}"), None).await;
        texts(&next(&mut reader).await)
    }

    pub(crate) fn source(&self, options: &str) -> Box<dyn Source> {
        source(&self.url, options, self.folder.path())
    }

    pub(crate) async fn read(&self, options: &str, position: Option<&[u8]>) -> Box<dyn PullReader> {
        connect(&mut self.source(options), position).await.expect("connected")
    }
}

/// The problems of a source's YAML, or its configuration and schema.
pub(crate) fn checked(url: &str, options: &str, folder: &Path) -> Result<(sources::sql::SqlConfig, SchemaRef), String> {
    let node = tree::parse(&format!("url: {url}\n{options}\n")).expect("YAML");
    let mut problems = Problems::default();
    let mut cx = CheckContext::new(&mut problems, "source s", Position::default(), folder);
    let config = deserialize::read::<sources::sql::SqlConfig>(&node, &mut cx);
    let shape = config.as_ref().and_then(|c| c.check(&mut cx));
    match (config, shape) {
        (Some(config), Some(shape)) if !problems.has_errors() => Ok((config, shape.schema)),
        _ => Err(problems.render("")),
    }
}

fn context(folder: &Path) -> SourceContext {
    SourceContext {
        name: "s".into(),
        folder: folder.to_path_buf(),
        state_dir: folder.to_path_buf(),
        routes: Default::default(),
        status: Arc::default(),
    }
}

fn source(url: &str, options: &str, folder: &Path) -> Box<dyn Source> {
    let (config, _) = checked(url, options, folder).expect("no problems");
    config.build(context(folder)).expect("a source")
}

pub(crate) async fn connect(
    source: &mut Box<dyn Source>,
    position: Option<&[u8]>,
) -> pipeline::error::Result<Box<dyn PullReader>> {
    match source.connect(position).await? {
        Reader::Pull(reader) => Ok(reader),
        Reader::Push(..) => panic!("a pull source"),
    }
}

pub(crate) async fn next(reader: &mut Box<dyn PullReader>) -> Pulled {
    reader.next().await.expect("rows").expect("never at its end")
}

pub(crate) fn texts(pulled: &Pulled) -> Vec<String> {
    encode_rows(&pulled.rows).iter().map(str::to_owned).collect()
}

/// Rows for a sink, from JSON.
fn rows(fields: &str, json: &[&str]) -> RecordBatch {
    let node = tree::parse(&format!("{{{fields}}}")).expect("YAML");
    let mut problems = Problems::default();
    let mut cx = CheckContext::new(&mut problems, "", Position::default(), Path::new("."));
    let fields = deserialize::read::<Fields>(&node, &mut cx).expect("fields");
    let mut builder = RowsBuilder::new(&[], &fields);
    for row in json {
        builder.push_json(row.as_bytes()).expect(row);
    }
    builder.finish().expect("rows")
}

/// A connected sink for one pipeline `rates` with the columns of `rows`.
async fn sink(database: &Database, options: &str, rows: &RecordBatch) -> Box<dyn OutboxSink> {
    let mut sink = unconnected_sink(database, options, rows).expect("no problems");
    sink.connect().await.expect("connected");
    sink
}

fn unconnected_sink(database: &Database, options: &str, rows: &RecordBatch) -> Result<Box<dyn OutboxSink>, String> {
    let node = tree::parse(&format!("url: {}\n{options}\n", database.url)).expect("YAML");
    let mut problems = Problems::default();
    let mut cx = CheckContext::new(&mut problems, "sink db", Position::default(), database.folder.path());
    let shape = StreamShape { schema: rows.schema(), keys: Vec::new(), windowed: false };
    let inputs = vec![SinkInput { metric: "rates".into(), shape }];
    let config = deserialize::read::<sinks::sql::SqlConfig>(&node, &mut cx);
    let config = config.filter(|c| c.check(&inputs, &mut cx).is_some()).ok_or(()).map_err(|()| problems.render(""))?;
    let cx = SinkContext {
        name: "db".into(),
        inputs,
        folder: database.folder.path().to_path_buf(),
        routes: Default::default(),
        live: Arc::new(Live::new("e".into(), Arc::<Status>::default(), [])),
        tails: Vec::new(),
    };
    match config.build(cx).expect("a sink") {
        Sink::Outbox(sink, _) => Ok(sink),
        _ => panic!("an outbox sink"),
    }
}

#[tokio::test]
async fn postgres_values_of_every_type_arrive_as_declared() {
    let db = Database::postgres().await;
    db.execute(
        "CREATE TYPE mood AS ENUM ('ok', 'bad'); CREATE DOMAIN small AS int CHECK (VALUE < 10);
         CREATE TABLE t (a smallint, b int, c bigint, d real, e double precision, f numeric(20,4), g text, h varchar(9),
           i char(3), j mood, k boolean, l timestamp, m timestamptz, n date, o time, p uuid, q json, r jsonb, s bytea,
           t int[], u text[][], v interval, w small, x timetz, y numeric, z numeric[]);
         INSERT INTO t VALUES (-1, 2, 3000000000, 0.5, 0.1, 123456789.1234, 'ü', 'v', 'c', 'bad', true,
           '2026-11-20 12:00:00.5', '2026-11-20 14:00:00+02', '2026-11-20', '12:30:00.25',
           '11111111-2222-3333-4444-555555555555', '{\"a\": 1}', '[1, \"x\"]', '\\x00ff', '{1,NULL,3}', '{{a,b},{c,d}}',
           '1 day 00:00:01.5', 7, '12:30:00+02', 42, '{1.50,NaN}');
         INSERT INTO t DEFAULT VALUES;",
    )
    .await;
    let fields = "{a: int, b: int, c: int, d: float, e: float, f: 'decimal(20,4)', g: string, h: string, i: string, \
                  j: string, k: bool, l: timestamp, m: timestamp, n: date, o: string, p: string, q: json, r: json, \
                  s: bytes, t: json, u: json, v: float, w: int, x: string, y: int, z: json}";
    let read = db.rows("SELECT * FROM t ORDER BY a NULLS LAST", fields).await;
    assert_eq!(
        read[0],
        r#"{"a":-1,"b":2,"c":3000000000,"d":0.5,"e":0.1,"f":"123456789.1234","g":"ü","h":"v","i":"c  ","j":"bad","k":true,"l":"2026-11-20T12:00:00.500Z","m":"2026-11-20T12:00:00.000Z","n":"2026-11-20","o":"12:30:00.250000","p":"11111111-2222-3333-4444-555555555555","q":{"a": 1},"r":[1, "x"],"s":"AP8=","t":[1,null,3],"u":[["a","b"],["c","d"]],"v":86401.5,"w":7,"x":"12:30:00+02:00","y":42,"z":[1.50,"NaN"]}"#
    );
    let nulls: serde_json::Value = serde_json::from_str(&read[1]).expect("JSON");
    assert!(nulls.as_object().expect("object").values().all(serde_json::Value::is_null), "{nulls}");

    let (config, _) = checked(&db.url, "table: t\nfields: {a: int}", db.folder.path()).expect("config");
    let found = SourceConfig::discover(&config, context(db.folder.path())).await.expect("fields").to_string();
    for line in
        ["a: int", "f: float", "k: bool", "m: timestamp", "n: date", "r: json", "s: bytes", "u: json", "p: string"]
    {
        assert!(found.contains(&format!("  {line}\n")), "{line} in {found}");
    }
}

#[tokio::test]
async fn mariadb_values_of_every_type_arrive_as_declared() {
    let db = Database::mariadb().await;
    db.execute(
        "CREATE TABLE t (a tinyint, b smallint unsigned, c mediumint, d int, e bigint unsigned, f float, g double,
           h decimal(20,4), i varchar(9), j text, k enum('ok','bad'), l boolean, m datetime(6), n timestamp NULL, o date,
           p time(2), q json, r blob, s varchar(9) CHARACTER SET utf8mb4 COLLATE utf8mb4_bin, t year, u bit(3));
         SET time_zone = '+02:00';
         INSERT INTO t VALUES (-1, 65535, 3, -4, 5, 0.5, 0.1, 123456789.1234, 'ü', 'text', 'bad', true,
           '2026-11-20 12:00:00.5', '2026-11-20 14:00:00', '2026-11-20', '12:30:00.25', '{\"a\": 1}', x'00ff', 'bin', 2026, b'101');
         INSERT INTO t VALUES ();",
    )
    .await;
    let fields = "{a: int, b: int, c: int, d: int, e: int, f: float, g: float, h: 'decimal(20,4)', i: string, j: string, \
                  k: string, l: bool, m: timestamp, n: timestamp, o: date, p: string, q: json, r: bytes, s: string, \
                  t: int, u: int}";
    let read = db.rows("SELECT * FROM t ORDER BY a DESC", fields).await;
    let expected = r#"{"a":-1,"b":65535,"c":3,"d":-4,"e":5,"f":0.5,"g":0.1,"h":"123456789.1234","i":"ü","j":"text","k":"bad","l":true,"m":"2026-11-20T12:00:00.500Z","n":"2026-11-20T12:00:00.000Z","o":"2026-11-20","p":"12:30:00.25","q":{"a": 1},"r":"AP8=","s":"bin","t":2026,"u":5}"#;
    // The fraction of a TIME is printed with as many digits as the client library likes.
    assert_eq!(read[0].replace("12:30:00.250000", "12:30:00.25"), expected);
    let nulls: serde_json::Value = serde_json::from_str(&read[1]).expect("JSON");
    assert!(nulls.as_object().expect("object").values().all(serde_json::Value::is_null), "{nulls}");

    // Sums are decimals, and they are whole numbers too; a boolean is a number.
    let sums = "SELECT sum(b) AS s, avg(b) AS a, count(*) AS n, max(l) AS l FROM t";
    let read = db.rows(sums, "{s: int, a: float, n: int, l: int}").await;
    assert_eq!(read, [r#"{"s":65535,"a":65535.0,"n":2,"l":1}"#]);
    let (config, _) = checked(&db.url, "query: SELECT * FROM t\nfields: {a: int}", db.folder.path()).expect("config");
    let found = SourceConfig::discover(&config, context(db.folder.path())).await.expect("fields").to_string();
    for line in ["a: int", "e: int", "h: float", "l: bool", "m: timestamp", "o: date", "r: bytes", "k: string"] {
        assert!(found.contains(&format!("  {line}\n")), "{line} in {found}");
    }
}

#[tokio::test]
async fn sqlite_values_of_every_kind_arrive_as_declared() {
    let db = Database::sqlite().await;
    db.execute(
        "CREATE TABLE t (id INTEGER PRIMARY KEY, x REAL, s TEXT, b BLOB, ok BOOLEAN, at TEXT, unix INTEGER, day TEXT, j TEXT, d TEXT);
         INSERT INTO t VALUES (1, 0.5, 'ü', x'00ff', 1, '2026-11-20 12:00:00', 1700000000, '2026-11-20', '{\"a\":[1]}', '1.50');
         INSERT INTO t (id) VALUES (2);
         INSERT INTO t (id, x, s) VALUES (3, 7, '');",
    )
    .await;
    let fields = "{id: int, x: float, s: string, b: bytes, ok: bool, at: timestamp, unix: timestamp_s, day: date, \
                  j: json, d: 'decimal(9,2)'}";
    let read = db.rows("SELECT * FROM t ORDER BY id", fields).await;
    assert_eq!(
        read,
        [
            r#"{"id":1,"x":0.5,"s":"ü","b":"AP8=","ok":true,"at":"2026-11-20T12:00:00.000Z","unix":"2023-11-14T22:13:20.000Z","day":"2026-11-20","j":{"a":[1]},"d":"1.50"}"#,
            r#"{"id":2,"x":null,"s":null,"b":null,"ok":null,"at":null,"unix":null,"day":null,"j":null,"d":null}"#,
            r#"{"id":3,"x":7.0,"s":"","b":null,"ok":null,"at":null,"unix":null,"day":null,"j":null,"d":null}"#,
        ]
    );
    let query = "query: SELECT id, ok, count(*) AS n, avg(x) AS a, max(at) AS t, max(s) AS s FROM t\nfields: {id: int}";
    let (config, _) = checked(&db.url, query, db.folder.path()).expect("config");
    let found = SourceConfig::discover(&config, context(db.folder.path())).await.expect("fields").to_string();
    assert_eq!(found, "fields:\n  id: int\n  ok: bool\n  n: int\n  a: float\n  t: timestamp\n  s: string\n");
}

#[tokio::test]
async fn a_wrong_value_is_a_row_error_and_the_others_go_on() {
    for (kind, db) in Database::all().await {
        db.execute("CREATE TABLE t (id int, v varchar(20))").await;
        db.execute("INSERT INTO t VALUES (1, '2026-11-20'), (2, 'soon'), (3, NULL)").await;
        let options = "query: SELECT id, v FROM t ORDER BY id;\nfields: {id: int, v: timestamp}";
        let (mut reader, mut errors) = (db.read(options, None).await, Vec::new());
        let pulled = next(&mut reader).await;
        errors.extend(pulled.errors.iter().map(|e| (e.message.as_str(), e.payload.as_str())));
        let wrong = |text| format!("field `v`: expected timestamp, found \"{text}\"");
        let (first, second) = (wrong("2026-11-20"), wrong("soon"));
        // A day is no time in text.
        assert_eq!(
            errors,
            [(first.as_str(), "id: 1, v: \"2026-11-20\""), (second.as_str(), "id: 2, v: \"soon\"")],
            "{kind}"
        );
        assert_eq!(texts(&pulled), [r#"{"id":3,"v":null}"#], "{kind}");
    }
}

#[tokio::test]
async fn several_queries_give_one_row_of_structs() {
    for (kind, db) in Database::all().await {
        db.execute("CREATE TABLE log (id int, status varchar(9), delay double precision)").await;
        let options = "queries:\n  queue: SELECT count(*) AS total, sum(CASE WHEN status = 'pending' THEN 1 ELSE 0 END) AS pending FROM log\n  \
                       scheduler: SELECT avg(delay) AS avg_delay_seconds FROM log\n  last: SELECT id, status FROM log WHERE id > 1\n\
                       fields:\n  queue: {total: int, pending: int}\n  scheduler: {avg_delay_seconds: float}\n  last: {id: int, status: string}";
        let mut reader = db.read(options, None).await;
        let empty = r#"{"queue":{"total":0,"pending":null},"scheduler":{"avg_delay_seconds":null},"last":null}"#;
        assert_eq!(texts(&next(&mut reader).await), [empty], "{kind}");
        db.execute("INSERT INTO log VALUES (1, 'pending', 1.5), (2, 'done', 2.5)").await;
        let full = r#"{"queue":{"total":2,"pending":1},"scheduler":{"avg_delay_seconds":2.0},"last":{"id":2,"status":"done"}}"#;
        assert_eq!(texts(&next(&mut reader).await), [full], "{kind}");
        db.execute("INSERT INTO log VALUES (3, 'done', NULL)").await;
        let pulled = next(&mut reader).await;
        assert_eq!(pulled.rows.num_rows(), 0, "{kind}");
        assert_eq!(pulled.errors[0].message, "query `last`: more than one row; aggregate, or add LIMIT 1", "{kind}");
    }
}

#[tokio::test]
async fn queries_of_one_row_see_one_state_of_the_database() {
    for (kind, db) in Database::all().await {
        db.execute("CREATE TABLE t (id int, n int)").await;
        db.execute("INSERT INTO t VALUES (1, 1000), (2, 0)").await;
        let options = "queries: {one: SELECT n FROM t WHERE id = 1, two: SELECT n FROM t WHERE id = 2}\n\
                       fields: {one: {n: int}, two: {n: int}}";
        let mut reader = db.read(options, None).await;
        let done = std::sync::atomic::AtomicBool::new(false);
        let write = async {
            for _ in 0..30 {
                db.execute("BEGIN; UPDATE t SET n = n - 1 WHERE id = 1; UPDATE t SET n = n + 1 WHERE id = 2; COMMIT")
                    .await;
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        };
        let read = async {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let row: serde_json::Value = serde_json::from_str(&texts(&next(&mut reader).await)[0]).expect("JSON");
                let sum = row["one"]["n"].as_i64().zip(row["two"]["n"].as_i64()).map(|(one, two)| one + two);
                assert_eq!(sum, Some(1000), "{kind}: {row}");
            }
        };
        tokio::join!(write, read);
    }
}

#[tokio::test]
async fn a_cursor_reads_each_row_once_through_ties_batches_and_restarts() {
    const ROWS: usize = 20_000;
    for (kind, db) in Database::all().await {
        db.execute(
            "CREATE TABLE t (id bigint PRIMARY KEY, at timestamp(6) NULL, v int)"
                .replace(
                    "timestamp(6)",
                    match kind {
                        "sqlite" => "text",
                        "mariadb" => "datetime(6)",
                        _ => "timestamp(6)",
                    },
                )
                .as_str(),
        )
        .await;
        // 500 rows share each second, so a batch always ends among ties.
        let digits = "(SELECT 0 AS d UNION ALL SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3 UNION ALL SELECT 4 UNION ALL \
                      SELECT 5 UNION ALL SELECT 6 UNION ALL SELECT 7 UNION ALL SELECT 8 UNION ALL SELECT 9)";
        let n = "a.d + 10 * b.d + 100 * c.d + 1000 * e.d + 10000 * f.d";
        let at = match kind {
            "postgres" => format!("timestamp '2026-11-20 00:00:00' + (({n}) / 500) * interval '1 second'"),
            "mariadb" => format!("timestamp '2026-11-20 00:00:00' + interval (({n}) DIV 500) second"),
            _ => format!("datetime('2026-11-20 00:00:00', '+' || (({n}) / 500) || ' seconds')"),
        };
        db.execute(&format!(
            "INSERT INTO t SELECT {n}, {at}, {n} FROM {digits} a, {digits} b, {digits} c, {digits} e, {digits} f WHERE {n} < {ROWS}"
        ))
        .await;
        let options = "query: SELECT id, at, v FROM t\ncursor: [at, id]\nfields: {id: int, at: timestamp, v: int}";
        let (mut position, mut seen, mut calls) = (None::<Vec<u8>>, Vec::new(), Vec::new());
        loop {
            // A new reader for each batch: every batch is a restart.
            let pulled = next(&mut db.read(options, position.as_deref()).await).await;
            assert!(pulled.errors.is_empty(), "{kind}: {:?}", pulled.errors.first());
            calls.push((pulled.rows.num_rows(), pulled.more));
            seen.extend(texts(&pulled));
            position = Some(pulled.position);
            if !pulled.more {
                break;
            }
        }
        assert_eq!(calls, [(8192, true), (8192, true), (ROWS - 16_384, false)], "{kind}");
        assert_eq!(seen.len(), ROWS, "{kind}");
        for (id, text) in seen.iter().enumerate() {
            assert!(text.starts_with(&format!("{{\"id\":{id},")), "{kind}: {text} at {id}");
        }
        // One reader goes on when rows come, and says nothing in between.
        let mut reader = db.read(options, position.as_deref()).await;
        assert_eq!(next(&mut reader).await.rows.num_rows(), 0, "{kind}");
        db.execute("INSERT INTO t VALUES (90000, '2027-01-01 00:00:00', 1), (90001, NULL, 1)").await;
        assert!(texts(&next(&mut reader).await)[0].starts_with("{\"id\":90000,"), "{kind}");
        assert_eq!(next(&mut reader).await.rows.num_rows(), 0, "{kind}");

        let options = "table: t\ncursor: {column: id, start: 19997}\nfields: {id: int}";
        let read = texts(&next(&mut db.read(options, None).await).await);
        assert_eq!(read, [r#"{"id":19998}"#, r#"{"id":19999}"#, r#"{"id":90000}"#, r#"{"id":90001}"#], "{kind}");
    }
}

#[tokio::test]
async fn cursors_compare_every_ordered_type_exactly() {
    let postgres = [
        ("uuid", "'11111111-2222-3333-4444-555555555555'", "'11111111-2222-3333-4444-555555555556'", "string"),
        ("numeric", "0.10000000000000000001", "0.10000000000000000002", "string"),
        ("text", "'a'", "'b'", "string"),
        ("smallint", "1", "2", "int"),
    ];
    let mariadb = [
        ("bigint unsigned", "18446744073709551614", "18446744073709551615", "string"),
        ("decimal(30,20)", "0.10000000000000000001", "0.10000000000000000002", "string"),
        ("varchar(20)", "'a'", "'b'", "string"),
    ];
    let sqlite = [("text", "'a'", "'b'", "string"), ("integer", "1", "2", "int")];
    for (db, cases) in [
        (Database::postgres().await, &postgres[..]),
        (Database::mariadb().await, &mariadb[..]),
        (Database::sqlite().await, &sqlite[..]),
    ] {
        for (column_type, first, second, field) in cases {
            db.execute(&format!(
                "DROP TABLE IF EXISTS k; CREATE TABLE k (k {column_type}); INSERT INTO k VALUES ({first})"
            ))
            .await;
            let mut reader = db.read(&format!("table: k\ncursor: k\nfields: {{k: {field}}}"), None).await;
            assert_eq!(next(&mut reader).await.rows.num_rows(), 1, "{column_type}");
            assert_eq!(next(&mut reader).await.rows.num_rows(), 0, "{column_type}");
            db.execute(&format!("INSERT INTO k VALUES ({second})")).await;
            let pulled = next(&mut reader).await;
            assert_eq!(pulled.rows.num_rows(), 1, "{column_type}: {:?}", pulled.errors);
        }
    }
}

#[tokio::test]
async fn what_is_missing_is_named_and_waited_for() {
    for (kind, db) in Database::all().await {
        let options = "query: SELECT pendng AS Pending FROM late\nfields: {pending: int}";
        let mut source = db.source(options);
        let error = connect(&mut source, None).await.err().expect("no table").to_string();
        assert!(error.contains("late"), "{kind}: {error}");
        db.execute("CREATE TABLE late (pendng int)").await;
        if kind == "postgres" {
            // PostgreSQL folds names without quotes.
            connect(&mut source, None).await.expect("the table is there");
            continue;
        }
        let error = connect(&mut source, None).await.err().expect("no column").to_string();
        assert!(
            error.contains("`pending` is no column") && error.contains("did you mean `Pending`?"),
            "{kind}: {error}"
        );
        assert!(connect(&mut db.source("query: SELECT pendng FROM late\nfields: {pendng: int}"), None).await.is_ok());
    }
}

#[tokio::test]
async fn a_sqlite_file_is_waited_for_and_never_created() {
    let folder = Scratch::new();
    let mut source = source("sqlite:no.db", "query: SELECT 1 AS n\nfields: {n: int}", folder.path());
    let error = connect(&mut source, None).await.err().expect("no file");
    assert!(error.to_string().contains("no.db does not exist"), "{error}");
    assert_eq!(error.retry, Retry::BackOff);
    assert!(!folder.path().join("no.db").exists());
}

#[tokio::test]
async fn a_source_can_only_read_and_is_stopped_in_time() {
    for (kind, db) in Database::all().await {
        db.execute("CREATE TABLE t (id int)").await;
        let (endless, write) = match kind {
            "postgres" => (
                "SELECT 1 AS n FROM pg_sleep(60)",
                "WITH w AS (INSERT INTO t VALUES (1) RETURNING id) SELECT id AS n FROM w",
            ),
            "mariadb" => ("SELECT count(*) AS n FROM seq_1_to_100000 a, seq_1_to_100000 b", ""),
            _ => ("WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT count(*) AS n FROM c", ""),
        };
        let mut reader = db.read(&format!("query: \"{endless}\"\ntimeout: 300ms\nfields: {{n: int}}"), None).await;
        let error = reader.next().await.expect_err("too long").to_string().to_lowercase();
        assert!(["timeout", "interrupt", "max_statement_time"].iter().any(|w| error.contains(w)), "{kind}: {error}");
        if !write.is_empty() {
            let mut reader = db.read(&format!("query: \"{write}\"\nfields: {{n: int}}"), None).await;
            let error = reader.next().await.expect_err("read only").to_string();
            assert!(error.contains("read-only"), "{kind}: {error}");
        }
        let mut reader = db.read("query: SELECT id FROM t\nrows_max: 2\nfields: {id: int}", None).await;
        db.execute("INSERT INTO t VALUES (1), (2)").await;
        assert_eq!(next(&mut reader).await.rows.num_rows(), 2, "{kind}");
        db.execute("INSERT INTO t VALUES (3)").await;
        let error = reader.next().await.expect_err("too many").to_string();
        assert!(error.contains("more than 2 rows"), "{kind}: {error}");
    }
}

#[tokio::test]
async fn a_cursor_goes_on_after_the_server_was_restarted() {
    let server = databases::postgres();
    let url = server.url("postgres");
    execute(&url, "CREATE TABLE t (id bigint); INSERT INTO t VALUES (1), (2)").await;
    let folder = Scratch::new();
    let mut source = source(&url, "table: t\ncursor: id\nfields: {id: int}", folder.path());
    let mut reader = connect(&mut source, None).await.expect("connected");
    let position = next(&mut reader).await.position;
    server.stop();
    let error = reader.next().await.expect_err("the server is gone");
    assert_eq!(error.retry, Retry::BackOff, "{error}");
    assert!(connect(&mut source, Some(&position)).await.is_err());
    server.start();
    let started = Instant::now();
    let mut reader = loop {
        assert!(started.elapsed() < PATIENCE, "the server does not take connections");
        // The port is open before it does.
        if let Ok(reader) = connect(&mut source, Some(&position)).await {
            break reader;
        }
    };
    execute(&url, "INSERT INTO t VALUES (3)").await;
    assert_eq!(texts(&next(&mut reader).await), [r#"{"id":3}"#]);
}

#[test]
fn mistakes_in_a_source_are_named() {
    for (url, options, expected) in [
        ("redis://x", "query: SELECT 1\nfields: {a: int}", "unknown database `redis`"),
        ("'sqlite::memory:'", "query: SELECT 1\nfields: {a: int}", "SQLite needs a file"),
        ("sqlite:x", "fields: {a: int}", "exactly one of `query`, `table`, `queries`"),
        ("sqlite:x", "query: SELECT 1\ntable: t\nfields: {a: int}", "exactly one of"),
        ("sqlite:x", "query: SELECT 1", "`fields` is missing"),
        ("sqlite:x", "query: SELECT 1\nfields: {a: {b: int}}", "3:13: error: source s: field `a`: expected a type"),
        ("sqlite:x", "queries: {q: SELECT 1}\nfields: {q: int}", "query `q` needs the types of its columns"),
        ("sqlite:x", "queries: {q: SELECT 1}\nfields: {q: {a: int}, p: {a: int}}", "no query `p`"),
        ("sqlite:x", "table: t\ncursor: at\nfields: {at: timestamp}", "a time alone is no cursor"),
        ("sqlite:x", "table: t\ncursor: [id, at]\nfields: {at: timestamp_ms, id: int}", "a time alone is no cursor"),
        ("sqlite:x", "table: t\ncursor: id\nfields: {at: timestamp}", "cursor column `id` is not in `fields`"),
        ("sqlite:x", "table: t\ncursor: x\nfields: {x: float}", "`x` cannot be a cursor"),
        ("sqlite:x", "table: t\ncursor: {column: id, start: soon}\nfields: {id: int}", "`soon` is no int"),
        ("sqlite:x", "table: t\ncursor: [id, id]\nfields: {id: int}", "stands twice"),
        ("sqlite:x", "table: t\nevery: 0s\nfields: {id: int}", "`every` must be longer than zero"),
        ("sqlite:x", "table: t\nfields: {id: integer}", "integer"),
    ] {
        let problems = checked(url, options, Path::new(".")).err().unwrap_or_default();
        assert!(problems.contains(expected), "{options}\ngave {problems}");
    }
}

const METRIC: &str = "device_id: string, n: int, x: float, ok: bool, at: timestamp, day: date, price: 'decimal(9,2)', raw: bytes, tags: json";
const METRIC_ROWS: [&str; 2] = [
    r#"{"device_id":"ü'\"","n":-5,"x":0.1,"ok":true,"at":"2026-11-20T12:00:00.000001Z","day":"2026-11-20","price":"1.50","raw":"ab","tags":{"a":[1,"x"]}}"#,
    r#"{"device_id":"b"}"#,
];

#[tokio::test]
async fn what_a_sink_writes_a_source_reads() {
    for (kind, db) in Database::all().await {
        let batch = rows(METRIC, &METRIC_ROWS);
        let mut sink = sink(&db, "table: \"{pipeline}\"\ncreate: true\nkey: [device_id]", &batch).await;
        sink.deliver(0, &batch, 1).await.expect("delivered");
        let read = db.rows("SELECT * FROM rates ORDER BY n", &format!("{{{METRIC}}}")).await;
        let mut expected: Vec<String> = encode_rows(&batch).iter().map(str::to_owned).collect();
        if kind != "postgres" {
            // Null comes first there.
            expected.reverse();
        }
        // PostgreSQL's jsonb prints spaces.
        let compact =
            |texts: Vec<String>| texts.iter().map(|t| t.replace(": [", ":[").replace("1, ", "1,")).collect::<Vec<_>>();
        assert_eq!(compact(read), expected, "{kind}");
        // Connecting again finds the table.
        sink.connect().await.expect("again");
    }
}

#[tokio::test]
async fn a_repeated_delivery_is_passed_over_and_a_key_is_replaced() {
    for (kind, db) in Database::all().await {
        let fields = "id: string, n: int";
        let batch = rows(fields, &[r#"{"id":"a","n":1}"#, r#"{"id":"b","n":2}"#, r#"{"id":"a","n":3}"#]);
        let all = "SELECT id, n FROM t ORDER BY id, n";
        let shown = "{id: string, n: int}";

        let options = "table: t\ncreate: true\nkey: [id]\ncolumns: {id: id, n: n}";
        let mut upsert = sink(&db, options, &batch).await;
        upsert.deliver(0, &batch, 1).await.expect("delivered");
        assert_eq!(db.rows(all, shown).await, [r#"{"id":"a","n":3}"#, r#"{"id":"b","n":2}"#], "{kind}");
        let newer = rows(fields, &[r#"{"id":"b","n":9}"#]);
        upsert.deliver(0, &newer, 2).await.expect("delivered");
        assert_eq!(db.rows(all, shown).await, [r#"{"id":"a","n":3}"#, r#"{"id":"b","n":9}"#], "{kind}");

        db.execute("DROP TABLE t; DELETE FROM tailwater_deliveries").await;
        let mut append = sink(&db, "table: t\ncreate: true", &batch).await;
        append.deliver(0, &newer, 7).await.expect("delivered");
        append.deliver(0, &newer, 7).await.expect("passed over");
        let mut restarted = sink(&db, "table: t", &batch).await;
        restarted.deliver(0, &newer, 7).await.expect("passed over after a restart");
        restarted.deliver(0, &newer, 8).await.expect("delivered");
        assert_eq!(restarted.last_delivery(0).await.expect("a number"), Some(8), "{kind}");
        assert_eq!(db.rows(all, shown).await, [r#"{"id":"b","n":9}"#, r#"{"id":"b","n":9}"#], "{kind}");
        // Cut otherwise after a restart: the first two rows are known, the third is not.
        restarted.deliver(0, &batch, 9).await.expect("delivered");
        assert_eq!(db.rows(all, shown).await[0], r#"{"id":"a","n":3}"#, "{kind}");

        let mut twice = sink(&db, "table: t\nexactly_once: false", &batch).await;
        twice.deliver(0, &newer, 1).await.expect("delivered");
        twice.deliver(0, &newer, 1).await.expect("delivered again");
        assert_eq!(db.rows(all, shown).await.len(), 5, "{kind}");
        assert_eq!(twice.last_delivery(0).await.expect("connected"), None, "{kind}");
    }
}

#[tokio::test]
async fn rows_that_the_database_refuses_are_counted_and_the_others_stored() {
    for (kind, db) in Database::all().await {
        db.execute("CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL, CHECK (n < 100))").await;
        let texts: Vec<String> = (0..50)
            .map(|i| match i {
                7 => "{\"id\":7}".to_owned(),
                8 => "{\"id\":8,\"n\":100}".to_owned(),
                9 => "{\"id\":0,\"n\":9}".to_owned(),
                _ => format!("{{\"id\":{i},\"n\":{i}}}"),
            })
            .collect();
        let batch = rows("id: int, n: int", &texts.iter().map(String::as_str).collect::<Vec<_>>());
        let mut sink = sink(&db, "table: t", &batch).await;
        let error = sink.deliver(0, &batch, 1).await.expect_err("refused rows");
        assert_eq!(error.retry, Retry::Never, "{kind}: {error}");
        assert!(error.to_string().contains("refused 3 of 50 rows, the others are written"), "{kind}: {error}");
        assert_eq!(db.rows("SELECT count(*) AS n FROM t", "{n: int}").await, [r#"{"n":47}"#], "{kind}");
        // The connection goes on, and the delivery is done.
        sink.deliver(0, &batch, 1).await.expect("passed over");
        sink.deliver(0, &rows("id: int, n: int", &[r#"{"id":1000,"n":1}"#]), 2).await.expect("delivered");

        // A table that is gone is waited for: no row is dropped.
        db.execute("DROP TABLE t").await;
        let error = sink.deliver(0, &batch, 3).await.expect_err("no table");
        assert_eq!(error.retry, Retry::BackOff, "{kind}: {error}");
        let error = sink.connect().await.expect_err("no table").to_string();
        assert!(error.contains("table `t` (`create: true` makes a missing table)"), "{kind}: {error}");
    }
}

#[tokio::test]
async fn a_row_that_postgres_refuses_late_or_for_its_size_holds_no_other_row_up() {
    let db = Database::postgres().await;
    let mut random = Random::seeded("a row that postgres refuses", 1);
    // Text that does not become short by compression.
    let long: String = (0..500).map(|_| format!("{:016x}", random.between(0, u64::MAX - 1))).collect();
    db.execute(
        "CREATE TABLE lengths (k text PRIMARY KEY, n int);
         CREATE TABLE numbers (k numeric PRIMARY KEY, n int);
         CREATE TABLE parents (k text PRIMARY KEY);
         INSERT INTO parents VALUES ('a'), ('c');
         CREATE TABLE children (k text REFERENCES parents DEFERRABLE INITIALLY DEFERRED, n int);",
    )
    .await;
    let long = [r#"{"k":"a","n":1}"#, &format!(r#"{{"k":"{long}","n":2}}"#), r#"{"k":"c","n":3}"#];
    // Two texts that are one number, and so one key.
    let equal = [r#"{"k":"1.5","n":1}"#, r#"{"k":"1.50","n":2}"#, r#"{"k":"2","n":3}"#];
    let orphan = [r#"{"k":"a","n":1}"#, r#"{"k":"nobody","n":2}"#, r#"{"k":"c","n":3}"#];
    for (options, written, refusal, left) in [
        ("table: lengths\nkey: [k]", long, Some("refused 1 of 3 rows, the others are written"), "1,3"),
        ("table: numbers\nkey: [k]", equal, None, "2,3"),
        ("table: children", orphan, Some("refused 1 of 3 rows, the others are written"), "1,3"),
    ] {
        let batch = rows("k: string, n: int", &written);
        let table = options.split_whitespace().nth(1).expect("a table");
        let mut sink = sink(&db, &format!("{options}\ndeliveries: done_{table}"), &batch).await;
        let done = sink.deliver(0, &batch, 3).await.map_err(|error| (error.retry, error.to_string()));
        match (&done, refusal) {
            (Ok(()), None) => {}
            (Err((Retry::Never, message)), Some(expected)) if message.contains(expected) => {}
            _ => panic!("{options}: {done:?}"),
        }
        let sql = format!("SELECT string_agg(n::text, ',' ORDER BY n) AS n FROM {table}");
        assert_eq!(db.rows(&sql, "{n: string}").await, [format!(r#"{{"n":"{left}"}}"#)], "{options}");
    }
}

#[tokio::test]
async fn many_rows_and_columns_fit_into_statements() {
    for (kind, db) in Database::all().await {
        let names: Vec<String> = (0..40).map(|i| format!("c{i}: int")).collect();
        let one: Vec<String> = (0..40).map(|i| format!("\"c{i}\":{i}")).collect();
        let text = format!("{{{}}}", one.join(","));
        let batch = rows(&names.join(", "), &vec![text.as_str(); 8192]);
        let mut sink = sink(&db, "table: wide\ncreate: true", &batch).await;
        sink.deliver(0, &batch, 1).await.expect("delivered");
        let read = db.rows("SELECT count(*) AS n, sum(c39) AS s FROM wide", "{n: int, s: int}").await;
        assert_eq!(read, [format!("{{\"n\":8192,\"s\":{}}}", 8192 * 39)], "{kind}");
    }
}

#[tokio::test]
async fn one_sqlite_file_is_read_while_it_is_written() {
    let db = Database::sqlite().await;
    let batch = rows("n: int", &[r#"{"n":1}"#]);
    let mut sink = sink(&db, "table: t\ncreate: true", &batch).await;
    let mut reader = db.read("query: SELECT count(*) AS n FROM t\nfields: {n: int}", None).await;
    let write = async {
        for id in 1..=200 {
            sink.deliver(0, &batch, id).await.expect("delivered");
        }
    };
    let read = async {
        let mut last = String::new();
        while last != r#"{"n":200}"# {
            last = texts(&next(&mut reader).await).remove(0);
        }
    };
    tokio::join!(write, read);
}

#[test]
fn mistakes_in_a_sink_are_named() {
    let folder = Scratch::new();
    let database = Database { url: "sqlite:x.db".into(), folder, _server: None };
    let batch = rows("device_id: string, tags: json", &[]);
    for (options, expected) in [
        ("table: t\ncolumns: {d: devce_id}", "no column `devce_id`"),
        ("table: t\nkey: [devce_id]", "did you mean `device_id`?"),
        ("table: t\nkey: [tags]", "no key"),
        ("table: ''", "`table` is empty"),
        ("table: t\nbatch: {rows: 0}", "`rows` is 1 to"),
        ("tabel: t", "unknown key `tabel`"),
    ] {
        let problems = unconnected_sink(&database, options, &batch).err().unwrap_or_default();
        assert!(problems.contains(expected), "{options}\ngave {problems}");
    }
}
