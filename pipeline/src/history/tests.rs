use std::fs::File;
use std::path::Path;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use arrow::array::{ArrayRef, Float64Array, Int64Array, RecordBatch, StringArray, TimestampMicrosecondArray};
use arrow::datatypes::{Schema, SchemaRef};
use http_body_util::BodyExt;
use hyper::StatusCode;
use parquet::arrow::ArrowWriter;
use parquet::file::properties::WriterProperties;

use super::files::{file_schema, hour_folder};
use super::http::QueryHandler;
use super::*;
use crate::schema::{FieldType, schema_of};

/// Works for minutes and gives the processor back now and then.
const ENDLESS: &str = "SELECT count(*) FROM generate_series(1, 1000000000000)";

/// 2026-11-20T12:00:00Z.
const NOON_US: i64 = 1_795_176_000_000_000;
const HOUR_US: i64 = 3_600_000_000;

fn columns() -> SchemaRef {
    schema_of([("device_id", FieldType::String), ("n", FieldType::Int), ("note", FieldType::Json)])
}

/// Rows of [`columns`] with the hidden times; device `d`, note `{"n":N}`, event time noon + n seconds.
fn rows(numbers: impl IntoIterator<Item = i64>) -> RecordBatch {
    let numbers: Vec<i64> = numbers.into_iter().collect();
    let times: ArrayRef = Arc::new(
        TimestampMicrosecondArray::from_iter_values(numbers.iter().map(|n| NOON_US + n * 1_000_000))
            .with_timezone("UTC"),
    );
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from_iter_values(numbers.iter().map(|_| "d"))),
        Arc::new(Int64Array::from_iter_values(numbers.iter().copied())),
        Arc::new(StringArray::from_iter_values(numbers.iter().map(|n| format!("{{\"n\":{n}}}")))),
        Arc::clone(&times),
        times,
    ];
    RecordBatch::try_new(file_schema(&super::tests::columns()), columns).expect("rows")
}

/// Publishes rows as a file of table `t` below `root`.
fn publish(root: &Path, at_us: i64, name: &str, rows: &RecordBatch) -> PathBuf {
    let folder = root.join("t").join(hour_folder(at_us));
    std::fs::create_dir_all(&folder).expect("folders");
    // Renamed into place, as a sink does: a query never meets half a file.
    let (part, path) = (folder.join("part"), folder.join(name));
    let mut writer = ArrowWriter::try_new(File::create(&part).expect("a file"), rows.schema(), None).expect("a writer");
    writer.write(rows).expect("rows");
    writer.close().expect("a footer");
    std::fs::rename(part, &path).expect("published");
    path
}

fn table(root: &Path) -> Table {
    Table { name: "t".into(), sink: "history".into(), folder: root.to_owned(), schema: columns(), tail: None }
}

fn history(tables: impl IntoIterator<Item = Table>) -> Arc<History> {
    Arc::new(History::new(tables.into_iter().collect()).expect("threads"))
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    Builder::new_current_thread().enable_time().build().expect("a runtime").block_on(future)
}

fn query(history: &History, sql: &str) -> Result<QueryResult, QueryError> {
    block_on(history.query(sql, &Limits::default()))
}

#[track_caller]
fn csv(history: &History, sql: &str) -> String {
    block_on(history.query_text(sql, Format::Csv, &Limits::default())).unwrap_or_else(|e| panic!("{sql}: {e}"))
}

#[track_caller]
fn failure(history: &History, sql: &str, limits: &Limits) -> QueryError {
    match block_on(history.query(sql, limits)) {
        Ok(result) => panic!("{sql} gave {} rows", result.rows()),
        Err(error) => error,
    }
}

#[test]
fn a_query_sees_published_and_waiting_rows_with_the_place_of_publishing() {
    // Characters that URLs and object stores give a meaning to.
    let scratch = tempfile::tempdir().expect("a folder");
    let root =
        scratch.path().join("../").join(scratch.path().file_name().expect("a name")).join("my history #1 100% é");
    publish(&root, NOON_US, "h-1-0.parquet", &rows([1, 2]));
    publish(&root, NOON_US + 3 * HOUR_US, "h-2-0.parquet", &rows([3]));
    let tail: HistoryTail = Arc::new(RwLock::new(vec![rows([4]), rows([5, 6])]));
    let history = history([Table { tail: Some(tail), ..table(&root) }]);
    for (sql, expected) in [
        ("SELECT count(*) AS c, sum(n) AS s FROM t", "c,s\n6,21\n"),
        (
            "SELECT n, dt, hh FROM t WHERE dt = '2026-11-20' AND hh < 13 ORDER BY n",
            "n,dt,hh\n1,2026-11-20,12\n2,2026-11-20,12\n",
        ),
        ("SELECT n FROM t WHERE hh = 15 AND dt = DATE '2026-11-20'", "n\n3\n"),
        // Waiting rows count as published now, whenever that is.
        ("SELECT count(*) AS c FROM t WHERE dt >= current_date() - INTERVAL '1 day' AND n > 3", "c\n3\n"),
        ("SELECT n FROM t WHERE event_time = '2026-11-20T12:00:05Z'", "n\n5\n"),
        (
            "SELECT event_time, ingest_time FROM t WHERE n = 1",
            "event_time,ingest_time\n2026-11-20T12:00:01.000Z,2026-11-20T12:00:01.000Z\n",
        ),
        ("SELECT a.n FROM t a JOIN t b ON a.n = b.n + 1 ORDER BY a.n DESC LIMIT 2", "n\n6\n5\n"),
        ("SELECT n FROM t WHERE n > (SELECT avg(n) FROM t) ORDER BY n", "n\n4\n5\n6\n"),
        ("SELECT count(*) AS c FROM versions.t", "c\n6\n"),
        ("SELECT count(*) AS c FROM history.t", "c\n6\n"),
    ] {
        assert_eq!(csv(&history, sql), expected, "{sql}");
    }
    let all = query(&history, "SELECT * FROM t").expect("rows");
    let names: Vec<_> = all.schema.fields().iter().map(|f| f.name().as_str()).collect();
    assert_eq!(names, ["device_id", "n", "note", "event_time", "ingest_time", "dt", "hh"]);
}

#[test]
fn files_are_passed_over_by_folder_and_by_event_time() {
    let scratch = tempfile::tempdir().expect("a folder");
    publish(scratch.path(), NOON_US, "h-1-0.parquet", &rows(0..100));
    // No Parquet at all: opening it would fail.
    let broken = scratch.path().join("t/dt=2026-11-19/hh=00/h-0-0.parquet");
    std::fs::create_dir_all(broken.parent().expect("a parent")).expect("folders");
    std::fs::write(&broken, "broken").expect("a file");
    let history = history([table(scratch.path())]);
    assert_eq!(csv(&history, "SELECT count(*) AS c FROM t WHERE dt >= '2026-11-20'"), "c\n100\n");
    let error = failure(&history, "SELECT count(*) FROM t WHERE n > 0", &Limits::default());
    assert_eq!(error.kind, QueryErrorKind::Files, "{error}");
    std::fs::write(&broken, "").expect("an empty file");
    let error = failure(&history, "SELECT count(*) FROM t WHERE n > 0", &Limits::default());
    assert_eq!(error.kind, QueryErrorKind::Files, "{error}");
    std::fs::remove_file(broken).expect("removed");
    let plan = csv(&history, "EXPLAIN ANALYZE SELECT n FROM t WHERE event_time > '2027-01-01'");
    assert!(plan.contains("files_ranges_pruned_statistics=1 total → 0 matched"), "{plan}");
}

#[test]
fn names_are_case_sensitive_and_wrong_ones_get_a_hint() {
    let scratch = tempfile::tempdir().expect("a folder");
    let schema = schema_of([("deviceId", FieldType::String), ("N", FieldType::Int)]);
    let named = |name: &str, sink: &str| Table {
        name: name.into(),
        sink: sink.into(),
        folder: scratch.path().join(sink),
        schema: Arc::clone(&schema),
        tail: None,
    };
    let history = history([named("Load", "a"), named("twice", "a"), named("twice", "b")]);
    for sql in [
        "SELECT COUNT(*), Sum(N) FROM Load",
        "SELECT \"deviceId\", N FROM a.Load WHERE deviceId = 'x'",
        "SELECT 1 FROM b.twice UNION ALL SELECT 1 FROM a.twice",
        "WITH x AS (SELECT N FROM Load) SELECT * FROM x",
    ] {
        query(&history, sql).unwrap_or_else(|e| panic!("{sql}: {e}"));
    }
    for (sql, expected) in [
        ("SELECT * FROM load", "no table `load` in the history; did you mean `Load`?"),
        ("SELECT * FROM b.Load", "no table `b.Load` in the history; did you mean `a.Load`?"),
        ("SELECT * FROM twice", "`twice` is in the history of 2 sinks; write `a.twice` or `b.twice`"),
        ("SELECT * FROM versions.twice", "`twice` is in the history of 2 sinks; write `a.twice` or `b.twice`"),
        ("SELECT deviceid FROM Load", "no column `deviceid` here; did you mean `deviceId`?"),
        ("SELECT * FROM '/etc/passwd'", "no table `/etc/passwd` in the history; one of `Load`, `twice`, `twice`"),
        ("SELEC 1", "Expected: an SQL statement, found: SELEC at line 1, column 1"),
        ("SELECT nosuch(1)", "Invalid function 'nosuch'."),
        ("SELECT 1 FROM Load WHERE", "Expected: an expression, found: EOF"),
        ("SELECT 1; SELECT 2", "The context currently only supports a single SQL statement"),
        ("  ", "an SQL query is missing"),
        ("SELECT 1 / 0", "Divide by zero error"),
    ] {
        let error = failure(&history, sql, &Limits::default());
        assert_eq!((error.kind, error.to_string().as_str()), (QueryErrorKind::Sql, expected), "{sql}");
    }
}

#[test]
fn only_reading_is_allowed() {
    let scratch = tempfile::tempdir().expect("a folder");
    let history = history([table(scratch.path())]);
    for sql in [
        "SHOW TABLES",
        "DESCRIBE t",
        "SHOW COLUMNS FROM t",
        "EXPLAIN SELECT * FROM t",
        "EXPLAIN ANALYZE SELECT * FROM t",
        "VALUES (1), (2)",
        "SELECT 1",
        "SELECT table_name FROM information_schema.tables",
    ] {
        query(&history, sql).unwrap_or_else(|e| panic!("{sql}: {e}"));
    }
    for sql in [
        "CREATE TABLE x AS SELECT 1",
        "CREATE VIEW x AS SELECT 1",
        "CREATE EXTERNAL TABLE x STORED AS PARQUET LOCATION '/tmp'",
        "EXPLAIN CREATE TABLE x AS SELECT 1",
        "DROP TABLE t",
        "INSERT INTO t VALUES (1)",
        "WITH x AS (SELECT 1) INSERT INTO t SELECT * FROM x",
        "DELETE FROM t",
        "UPDATE t SET n = 1",
        "COPY t TO '/tmp/x.parquet'",
        "SET datafusion.execution.target_partitions = 64",
        "PREPARE p AS SELECT 1",
        "SELECT * INTO x FROM t",
        "TRUNCATE t",
    ] {
        let error = failure(&history, sql, &Limits::default());
        assert_eq!(error.kind, QueryErrorKind::Sql, "{sql}: {error}");
    }
    assert!(!scratch.path().join("t").exists());
}

#[test]
fn a_column_that_came_or_went_reads_as_null() {
    let scratch = tempfile::tempdir().expect("a folder");
    publish(scratch.path(), NOON_US, "h-1-0.parquet", &rows([1]));
    let waiting: HistoryTail = Arc::new(RwLock::new(vec![rows([2])]));
    let schema = schema_of([("n", FieldType::Int), ("added", FieldType::Float)]);
    let history = history([Table { schema: Arc::clone(&schema), tail: Some(waiting), ..table(scratch.path()) }]);
    let times = Arc::new(TimestampMicrosecondArray::from(vec![NOON_US]).with_timezone("UTC"));
    let columns: Vec<ArrayRef> =
        vec![Arc::new(Int64Array::from(vec![3])), Arc::new(Float64Array::from(vec![0.5])), times.clone(), times];
    let new = RecordBatch::try_new(file_schema(&schema), columns).expect("rows");
    publish(scratch.path(), NOON_US, "h-2-0.parquet", &new);
    assert_eq!(csv(&history, "SELECT n, added FROM t ORDER BY n"), "n,added\n1,\n2,\n3,0.5\n");
    assert_eq!(csv(&history, "SELECT n FROM t WHERE added IS NULL ORDER BY n"), "n\n1\n2\n");
    assert_eq!(failure(&history, "SELECT note FROM t", &Limits::default()).kind, QueryErrorKind::Sql);
}

#[test]
fn a_table_without_files_is_empty_and_has_its_columns() {
    let scratch = tempfile::tempdir().expect("a folder");
    let history = history([table(&scratch.path().join("none"))]);
    assert_eq!(csv(&history, "SELECT * FROM t"), "device_id,n,note,event_time,ingest_time,dt,hh\n");
    assert_eq!(csv(&history, "SELECT count(*) AS c FROM t"), "c\n0\n");
}

#[test]
fn what_footers_tell_gives_the_answers_that_the_rows_give() {
    let scratch = tempfile::tempdir().expect("a folder");
    let schema = schema_of([("n", FieldType::Int), ("x", FieldType::Float), ("note", FieldType::String)]);
    let times: ArrayRef = Arc::new(TimestampMicrosecondArray::from(vec![NOON_US, NOON_US + 1]).with_timezone("UTC"));
    let long = "z".repeat(200);
    // Least and greatest values of a footer pass over NaN, and cut long texts.
    let columns: Vec<ArrayRef> = vec![
        Arc::new(Int64Array::from(vec![Some(1), None])),
        Arc::new(Float64Array::from(vec![f64::NAN, 2.0])),
        Arc::new(StringArray::from(vec![Some(long.as_str()), None])),
        Arc::clone(&times),
        Arc::clone(&times),
    ];
    let new = RecordBatch::try_new(file_schema(&schema), columns).expect("rows");
    publish(scratch.path(), NOON_US, "h-2-0.parquet", &new);
    let of = |tail| history([Table { schema: Arc::clone(&schema), tail, ..table(scratch.path()) }]);
    let answer = "count(*) AS c, count(x) AS cx, min(n) AS least, max(n) AS most, max(x) AS x, max(note) AS note, \
                  max(event_time) AS newest, max(hh) AS hh FROM t";
    // The rows are read for a condition that all of them meet.
    let same = |history: &History| {
        let told = csv(history, &format!("SELECT {answer}"));
        assert_eq!(told, csv(history, &format!("SELECT {answer} WHERE n IS NULL OR n > -1")));
        told
    };
    let told = same(&of(None));
    assert!(told.contains("\n2,2,1,1,") && told.contains(&long), "{told}");
    let plan = csv(&of(None), "EXPLAIN SELECT count(*) AS c, max(event_time) AS newest FROM t");
    assert!(!plan.contains("ParquetSource") && !plan.contains("DataSourceExec: file_groups"), "{plan}");
    // Files without the column, of other rows, and rows that wait.
    publish(scratch.path(), NOON_US - HOUR_US, "h-1-0.parquet", &rows(5..8));
    assert!(same(&of(None)).contains("\n5,2,1,7,"), "{}", same(&of(None)));
    let tail: HistoryTail = Arc::new(RwLock::new(vec![rows([9])]));
    assert!(same(&of(Some(tail))).contains("\n6,2,1,9,"));
}

#[test]
fn a_filter_over_a_large_file_finds_every_row_whichever_thread_reads_it() {
    let scratch = tempfile::tempdir().expect("a folder");
    // Texts that do not compress, so that the file is dealt out in several pieces.
    let (count, groups) = (20_000, 20);
    let schema = schema_of([("n", FieldType::Int), ("note", FieldType::String)]);
    let text = |n: i64| {
        let mut mixed = n as u64 + 1;
        let word = std::iter::repeat_with(|| {
            mixed = mixed.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23);
            format!("{mixed:016x}")
        });
        word.take(20).collect::<String>()
    };
    let times: ArrayRef =
        Arc::new(TimestampMicrosecondArray::from_iter_values((0..count).map(|n| NOON_US + n)).with_timezone("UTC"));
    let columns: Vec<ArrayRef> = vec![
        Arc::new(Int64Array::from_iter_values(0..count)),
        Arc::new(StringArray::from_iter_values((0..count).map(text))),
        Arc::clone(&times),
        times,
    ];
    let rows = RecordBatch::try_new(file_schema(&schema), columns).expect("rows");
    let folder = scratch.path().join("t").join(hour_folder(NOON_US));
    std::fs::create_dir_all(&folder).expect("folders");
    let rows_of_a_group = usize::try_from(count / groups).expect("small");
    let properties = WriterProperties::builder().set_max_row_group_row_count(Some(rows_of_a_group)).build();
    let file = File::create(folder.join("h-1-0.parquet")).expect("a file");
    let mut writer = ArrowWriter::try_new(&file, rows.schema(), Some(properties)).expect("a writer");
    writer.write(&rows).expect("rows");
    writer.close().expect("a footer");
    assert!(file.metadata().expect("a file").len() > 5 << 20);
    let history = history([Table { schema, ..table(scratch.path()) }]);
    for (condition, from, to) in [
        ("n >= 0", 0, count),
        ("n >= 7000 AND n < 7100", 7000, 7100),
        ("event_time >= '2026-11-20T12:00:00.003Z' AND event_time < '2026-11-20T12:00:00.009500Z'", 3000, 9500),
        ("n > 100000", 0, 0),
    ] {
        let sql = format!("SELECT count(*) AS c, coalesce(sum(n), 0) AS s FROM t WHERE {condition}");
        let sum: i64 = (from..to).sum();
        assert_eq!(csv(&history, &sql), format!("c,s\n{},{sum}\n", to - from), "{condition}");
    }
}

#[test]
fn a_file_that_vanishes_under_a_query_makes_it_start_anew() {
    let scratch = tempfile::tempdir().expect("a folder");
    let tail: HistoryTail = Arc::default();
    let history = history([Table { tail: Some(Arc::clone(&tail)), ..table(scratch.path()) }]);
    let mut path = publish(scratch.path(), NOON_US, "h-0-0.parquet", &rows(0..1000));
    for round in 0..10 {
        // Fewer replacements than tries, so that the query must succeed whenever they fall.
        let swapper = std::thread::spawn({
            let (tail, root, mut old) = (Arc::clone(&tail), scratch.path().to_owned(), path);
            move || {
                for swap in 0..3 {
                    let _lock = tail.write();
                    let new = publish(&root, NOON_US, &format!("h-{round}-{}.parquet", swap + 1), &rows(0..1000));
                    std::fs::remove_file(old).expect("removed");
                    old = new;
                }
                old
            }
        });
        assert_eq!(csv(&history, "SELECT count(*) AS c, sum(n) AS s FROM t"), "c,s\n1000,499500\n");
        path = swapper.join().expect("the swapper");
    }
    // Listed every time, never there.
    std::os::unix::fs::symlink("/nowhere", path.with_file_name("gone.parquet")).expect("a link");
    let error = failure(&history, "SELECT count(*) FROM t WHERE n > 1", &Limits::default());
    assert_eq!(error.kind, QueryErrorKind::Files, "{error}");
}

#[test]
fn every_limit_has_its_own_error() {
    let history = history([]);
    let limits = Limits::default();
    for (sql, limits, kind, text) in [
        (
            ENDLESS,
            Limits { time: Duration::from_millis(100), ..limits.clone() },
            QueryErrorKind::Time,
            "time limit of 100ms",
        ),
        (
            "SELECT * FROM generate_series(1, 11)",
            Limits { rows: 10, ..limits.clone() },
            QueryErrorKind::Rows,
            "limit of 10",
        ),
        (
            "SELECT value, count(*) FROM generate_series(1, 1000000) GROUP BY value",
            Limits { memory: 1 << 20, rows: usize::MAX, ..limits.clone() },
            QueryErrorKind::Memory,
            "memory limit of 1048576 bytes",
        ),
        (
            "SELECT * FROM generate_series(1, 1000000) ORDER BY value DESC",
            Limits { memory: 1 << 20, ..limits.clone() },
            QueryErrorKind::Memory,
            "memory limit of 1048576 bytes",
        ),
        (
            "SELECT * FROM generate_series(1, 1000000)",
            Limits { memory: 1 << 20, rows: usize::MAX, ..limits.clone() },
            QueryErrorKind::Memory,
            "memory limit of 1048576 bytes",
        ),
    ] {
        let error = failure(&history, sql, &limits);
        assert_eq!(error.kind, kind, "{sql}: {error}");
        assert!(error.to_string().contains(text), "{sql}: {error}");
    }
    assert_eq!(query(&history, "SELECT * FROM generate_series(1, 10)").expect("rows").rows(), 10);
}

#[test]
fn a_dropped_query_stops_and_makes_room_for_another() {
    let history = history([]);
    let limits = Limits { time: Duration::from_secs(600), ..Limits::default() };
    block_on(async {
        let mut running: Vec<_> = (0..QUERIES_MAX).map(|_| Box::pin(history.query(ENDLESS, &limits))).collect();
        for query in &mut running {
            assert!(futures::poll!(query).is_pending());
        }
        let error = history.query("SELECT 1", &limits).await.expect_err("no room");
        assert_eq!(
            (error.kind, error.to_string().as_str()),
            (QueryErrorKind::Busy, "too many queries: 4 are running; try again later")
        );
        drop(running);
        let start = Instant::now();
        while let Err(error) = history.query("SELECT 1", &limits).await {
            assert!(error.kind == QueryErrorKind::Busy && start.elapsed() < Duration::from_secs(60), "{error}");
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn a_query_as_deep_as_it_is_long_is_refused() {
    let history = history([]);
    for (first, repeated, last) in [
        ("SELECT 1", "+1", ""),
        ("SELECT true", " OR 1=1", ""),
        ("SELECT 1", "::int", ""),
        ("SELECT 1", " IS NULL", ""),
        ("EXPLAIN SELECT 1", "+1", ""),
        ("SELECT ", "(", "1"),
        ("SELECT ", "- ", "1"),
        ("SELECT 1", " UNION SELECT 1", ""),
        ("SELECT 1 FROM ", "(SELECT 1 FROM ", "x"),
        ("", "EXPLAIN ", "SELECT 1"),
    ] {
        let count = (SQL_BYTES_MAX - first.len() - last.len()) / repeated.len();
        let error = failure(&history, &format!("{first}{}{last}", repeated.repeat(count)), &Limits::default());
        assert_eq!(error.kind, QueryErrorKind::Sql, "{repeated}: {error}");
        let error = failure(&history, &format!("{first}{}{last}", repeated.repeat(SQL_BYTES_MAX)), &Limits::default());
        assert_eq!(error.to_string(), "the query is longer than 32768 bytes");
    }
    // As deep as allowed, and long in ways that are not deep.
    for sql in
        [format!("SELECT 1{}", "+1".repeat(size::DEPTH_MAX - 1)), format!("SELECT 1 IN (2{})", ",2".repeat(5000))]
    {
        query(&history, &sql).unwrap_or_else(|e| panic!("{}…: {e}", &sql[..20]));
    }
}

#[test]
fn a_short_text_cannot_make_a_large_query() {
    let scratch = tempfile::tempdir().expect("a folder");
    let history = history([table(scratch.path())]);
    let doubled = |first: &str, body: &str, count: usize| {
        let more: String =
            (1..=count).map(|n| format!(", a{n} AS ({})", body.replace('_', &(n - 1).to_string()))).collect();
        format!("WITH a0 AS ({first}){more} SELECT count(*) AS c FROM a{count}")
    };
    let aliases = |count: usize| (0..count).map(|n| format!("t a{n}")).collect::<Vec<_>>().join(",");
    let limit = size::TABLES_MAX;
    for sql in [
        doubled("SELECT 1 x", "SELECT * FROM a_ UNION ALL SELECT * FROM a_", 40),
        doubled("SELECT n FROM t", "SELECT b.n FROM a_ b, a_ c", 40),
        doubled(
            "SELECT 1 x",
            "SELECT * FROM (WITH b AS (SELECT * FROM a_) SELECT * FROM b UNION ALL SELECT * FROM b) q",
            40,
        ),
        // Never read, and planned all the same.
        doubled("SELECT 1 x", "SELECT * FROM a_ WHERE x IN (SELECT x FROM a_)", 40).replace("FROM a40", "FROM a0"),
        format!("EXPLAIN SELECT count(*) FROM {}", aliases(4000)),
        format!("SELECT count(*) FROM {}", aliases(limit + 1)),
    ] {
        let error = failure(&history, &sql, &Limits::default());
        assert!(error.to_string().starts_with("the query reads more than 100 tables"), "{sql:.99}: {error}");
        assert_eq!(error.kind, QueryErrorKind::Sql);
    }
    for (sql, expected) in [
        (format!("SELECT count(*) AS c FROM {}", aliases(limit)), "c\n0\n"),
        (doubled("SELECT 1 x", "SELECT * FROM a_", limit - 1), "c\n1\n"),
        (doubled("SELECT 1 x", "SELECT * FROM a_ UNION ALL SELECT * FROM a_", 5), "c\n32\n"),
    ] {
        assert_eq!(csv(&history, &sql), expected, "{sql:.99}");
    }
}

#[test]
fn a_short_text_cannot_make_a_large_expression() {
    let scratch = tempfile::tempdir().expect("a folder");
    publish(scratch.path(), NOON_US, "h-1-0.parquet", &rows([1]));
    let history = history([table(scratch.path())]);
    let inner = |first: &str, step: &str, count: usize| {
        (0..count).fold(first.to_owned(), |inner, level| format!("SELECT {step} FROM ({inner}) q{level}"))
    };
    let nested = |open: &str, close: &str, count: usize| format!("{}n{}", open.repeat(count), close.repeat(count));
    let doubled = |count: usize| inner("SELECT n AS x FROM t", "x + x AS x", count);
    let between = |count: usize| nested("CAST(", " BETWEEN 0 AND 1 AS int)", count);
    for sql in [
        format!("SELECT x FROM ({}) q WHERE x > 1", doubled(20)),
        format!("SELECT x FROM ({}) q ORDER BY x LIMIT 1", doubled(20)),
        format!("SELECT x, count(*) AS c FROM ({}) q GROUP BY x HAVING x > 1", doubled(20)),
        format!("SELECT 1 WHERE EXISTS (SELECT x FROM ({}) q WHERE x > 1)", doubled(20)),
        format!(
            "SELECT a.x FROM ({}) a JOIN t ON a.x = t.n WHERE a.x > 1",
            inner("SELECT n AS x FROM t UNION SELECT 1", "x * x AS x", 20)
        ),
        format!(
            "SELECT x FROM ({}) q WHERE x > 1",
            inner("SELECT n AS x FROM t", "x + x AS x, row_number() OVER () AS r", 20)
        ),
        format!("SELECT n FROM t WHERE {} > 0", between(20)),
        format!("SELECT {} AS n FROM t", nested("coalesce(", ", 1)", 20)),
        format!("SELECT {} AS n FROM t", nested("ifnull(", ", 1)", 20)),
        format!("EXPLAIN SELECT n FROM t WHERE {} > 0", between(20)),
    ] {
        let error = failure(&history, &sql, &Limits::default());
        let message = error.to_string();
        let is_told = message.starts_with("the expressions of the query become too long")
            || message.starts_with("`BETWEEN`, `coalesce`, `nvl`, `ifnull` are nested deeper than 10");
        assert!(is_told && error.kind == QueryErrorKind::Sql, "{sql:.99}: {error}");
    }
    for (sql, expected) in [
        (format!("SELECT x FROM ({}) q WHERE x > 1", doubled(5)), "x\n32\n"),
        // An aggregate stands between the levels: nothing is moved below it.
        (
            format!("SELECT x FROM ({}) q WHERE x > 1", inner("SELECT n AS x FROM t", "sum(x) + sum(x) AS x", 15)),
            "x\n32768\n",
        ),
        (format!("SELECT {} AS n FROM t", nested("abs(", ")", 20)), "n\n1\n"),
    ] {
        assert_eq!(csv(&history, &sql), expected, "{sql:.99}");
    }
}

/// Rows of a table with floats, each with its number.
fn floats(first: i64, values: &[f64]) -> RecordBatch {
    let numbers: Vec<i64> = (first..).take(values.len()).collect();
    let times = TimestampMicrosecondArray::from_iter_values(numbers.iter().map(|n| NOON_US + n)).with_timezone("UTC");
    let times: ArrayRef = Arc::new(times);
    let columns: Vec<ArrayRef> = vec![
        Arc::new(Int64Array::from_iter_values(numbers)),
        Arc::new(Float64Array::from(values.to_vec())),
        Arc::clone(&times),
        times,
    ];
    let schema = schema_of([("n", FieldType::Int), ("x", FieldType::Float)]);
    RecordBatch::try_new(file_schema(&schema), columns).expect("rows")
}

#[test]
fn a_row_with_nan_is_found_before_and_after_it_is_published() {
    let batches =
        [floats(0, &[1000.0, 3.0]), floats(10, &[f64::NAN, 2.0]), floats(20, &[-5.0, 1.0]), floats(30, &[7.0])];
    let schema = schema_of([("n", FieldType::Int), ("x", FieldType::Float)]);
    let (waiting, published) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    for (number, batch) in batches.iter().enumerate() {
        publish(published.path(), NOON_US, &format!("h-{number}-0.parquet"), batch);
    }
    let tail: HistoryTail = Arc::new(RwLock::new(batches.to_vec()));
    let before = history([Table { tail: Some(tail), schema: Arc::clone(&schema), ..table(waiting.path()) }]);
    let after = history([Table { schema, ..table(published.path()) }]);
    for (sql, expected) in [
        ("SELECT n FROM t WHERE x > 100 ORDER BY n", "n\n0\n10\n"),
        ("SELECT n FROM t WHERE x > 100 AND event_time >= '2026-11-20T12:00:00.00001Z'", "n\n10\n"),
        ("SELECT count(*) AS c FROM t WHERE NOT x < 5", "c\n3\n"),
        ("SELECT count(*) AS c FROM (SELECT * FROM t WHERE x < 5 LIMIT 6)", "c\n4\n"),
        ("SELECT n FROM t WHERE x = CAST('NaN' AS double)", "n\n10\n"),
        ("SELECT n FROM t ORDER BY x DESC LIMIT 2", "n\n10\n0\n"),
        ("SELECT n FROM t ORDER BY x LIMIT 1", "n\n20\n"),
        ("SELECT max(x) > 1000 AS above, min(x) AS least, count(x) AS c FROM t", "above,least,c\ntrue,-5.0,7\n"),
        ("SELECT max(x) > 1000 AS above FROM t WHERE x > 1", "above\ntrue\n"),
        ("SELECT count(*) AS c FROM t WHERE x IS NULL", "c\n0\n"),
    ] {
        // Once more with the footers that the first time left behind.
        for history in [&before, &after, &after] {
            assert_eq!(csv(history, sql), expected, "{sql}");
        }
    }
    // Other columns still rule files out.
    let plan = csv(&after, "EXPLAIN ANALYZE SELECT x FROM t WHERE x > 100 AND n >= 30");
    assert!(plan.contains("files_ranges_pruned_statistics=4 total → 1 matched"), "{plan}");
}

#[test]
fn a_damaged_page_is_a_fault_of_the_files() {
    let scratch = tempfile::tempdir().expect("a folder");
    let folder = scratch.path().join("t").join(hour_folder(NOON_US));
    std::fs::create_dir_all(&folder).expect("folders");
    let path = folder.join("h-1-0.parquet");
    let compression = parquet::basic::Compression::ZSTD(parquet::basic::ZstdLevel::default());
    let properties = WriterProperties::builder().set_compression(compression).set_dictionary_enabled(false).build();
    let rows = rows(0..10_000);
    let file = File::create(&path).expect("a file");
    let mut writer = ArrowWriter::try_new(file, rows.schema(), Some(properties)).expect("a writer");
    writer.write(&rows).expect("rows");
    let footer = writer.close().expect("a footer");
    let whole = std::fs::read(&path).expect("the file");
    let history = history([table(scratch.path())]);
    let sql = "SELECT sum(n) AS s FROM t";
    assert_eq!(csv(&history, sql), "s\n49995000\n");
    // The column `n`: the head of its first page, and what is in it.
    let chunk = footer.row_group(0).column(1).data_page_offset() as usize;
    for place in [chunk..chunk + 8, chunk + 40..chunk + 60] {
        let mut damaged = whole.clone();
        damaged[place.clone()].iter_mut().for_each(|byte| *byte = !*byte);
        std::fs::write(&path, damaged).expect("a damaged file");
        let error = failure(&history, sql, &Limits::default());
        assert_eq!(error.kind, QueryErrorKind::Files, "{place:?}: {error}");
        assert!(error.to_string().starts_with("cannot read the history: "), "{place:?}: {error}");
    }
}

#[test]
fn rows_are_written_as_json_csv_and_table() {
    let scratch = tempfile::tempdir().expect("a folder");
    publish(scratch.path(), NOON_US, "h-1-0.parquet", &rows([1]));
    let history = history([table(scratch.path())]);
    let sql = "SELECT n, note, event_time, 'a,\"b\"' AS text, CAST(NULL AS int) AS nothing, '' AS empty, 0.5 AS half, \
               CAST('1.50' AS decimal(9,2)) AS money, DATE '2026-11-20' AS day, true AS yes, [1, 2] AS list, \
               'two' || chr(10) || 'lines' AS lines FROM t";
    let write = |format: Format| block_on(history.query_text(sql, format, &Limits::default())).expect("text");
    assert_eq!(
        write(Format::Json),
        "[\n{\"n\":1,\"note\":{\"n\":1},\"event_time\":\"2026-11-20T12:00:01.000Z\",\"text\":\"a,\\\"b\\\"\",\"nothing\":null,\
         \"empty\":\"\",\"half\":0.5,\"money\":\"1.50\",\"day\":\"2026-11-20\",\"yes\":true,\"list\":[1,2],\"lines\":\"two\\nlines\"}\n]\n"
    );
    assert_eq!(
        write(Format::Csv),
        "n,note,event_time,text,nothing,empty,half,money,day,yes,list,lines\n\
         1,\"{\"\"n\"\":1}\",2026-11-20T12:00:01.000Z,\"a,\"\"b\"\"\",,\"\",0.5,1.50,2026-11-20,true,\"[1,2]\",\"two\nlines\"\n"
    );
    let table = write(Format::Table);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 4, "{table}");
    assert!(lines[2].starts_with(" 1 | {\"n\":1} | 2026-11-20T12:00:01.000Z | a,\"b\" |    NULL |"), "{table}");
    assert!(lines[2].ends_with("| [1,2] | two\\nlines") && lines[3] == "(1 row)", "{table}");
    let empty = query(&history, "SELECT n FROM t WHERE n > 5").expect("no rows");
    assert_eq!(
        (output::json(&empty), output::csv(&empty), output::table(&empty)),
        ("[]\n".into(), "n\n".into(), " n\n---\n(0 rows)\n".into())
    );
}

#[test]
fn an_http_answer_tells_by_its_status_what_went_wrong() {
    let handler = QueryHandler::new(history([]), Limits { rows: 10, ..Limits::default() });
    for (body, status, text) in [
        (r#"{"sql": "SELECT 1 AS one"}"#, StatusCode::OK, "[\n{\"one\":1}\n]\n"),
        (r#"{"sql": "SELECT 1 AS one", "format": "csv"}"#, StatusCode::OK, "one\n1\n"),
        (
            r#"{"sql": "SELECT 1", "format": "xml"}"#,
            StatusCode::BAD_REQUEST,
            r#"{"error":"unknown format `xml`; one of `table`, `json`, `csv`"}"#,
        ),
        (r#"{"sql": "DROP TABLE t"}"#, StatusCode::BAD_REQUEST, "read-only"),
        (
            r#"{"sql": "SELECT * FROM t"}"#,
            StatusCode::BAD_REQUEST,
            "no table `t` in the history; no pipeline writes to a `parquet` sink",
        ),
        (r#"{"query": "SELECT 1"}"#, StatusCode::BAD_REQUEST, "unknown field `query`"),
        ("SELECT 1", StatusCode::BAD_REQUEST, "the body is not"),
        (r#"{"sql": "SELECT * FROM generate_series(1, 11)"}"#, StatusCode::PAYLOAD_TOO_LARGE, "limit of 10"),
    ] {
        let (found, answer) = block_on(async {
            let response = handler.answer(body.as_bytes()).await;
            (response.status(), response.into_body().collect().await.expect("a body").to_bytes())
        });
        let answer = String::from_utf8_lossy(&answer);
        assert_eq!(found, status, "{body}: {answer}");
        assert!(answer.contains(text), "{body}: {answer}");
    }
}

#[test]
fn text_columns_of_every_arrow_kind_are_written_alike() {
    let schema = Arc::new(Schema::empty());
    assert_eq!(output::json(&QueryResult { schema, batches: Vec::new() }), "[]\n");
    let history = history([]);
    let sql = "SELECT arrow_cast('x', 'Utf8View') AS a, arrow_cast('x', 'LargeUtf8') AS b, arrow_cast('x', 'Dictionary(Int32, Utf8)') AS c";
    assert_eq!(csv(&history, sql), "a,b,c\nx,x,x\n");
}
