//! A publishing queue's figures over a WebSocket, from SQLite and from PostgreSQL.

use std::sync::Arc;

use pipeline::time::{format_us, now_us, parse_us};
use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::support::databases::{POSTGRES, Server, execute, unique};
use crate::support::program::{Program, example};
use crate::support::websocket::Client;
use crate::support::{Scratch, wait_for};

const PATH: &str = "/telemetry/live/ws/telemetry";
/// Most bytes of a payload.
const PAYLOAD_BYTES_MAX: usize = 10_000;

/// The application's database, with the tables of the example.
struct Database {
    url: String,
    /// What stands after a time of UTC.
    zone: &'static str,
    /// The example that asks it.
    yaml: &'static str,
    _folder: Scratch,
    server: Option<Arc<Server>>,
}

impl Database {
    async fn sqlite() -> Self {
        let folder = Scratch::new();
        let path = folder.path().join("publishing.db").display().to_string();
        execute(&format!("sqlite://{path}?mode=rwc"), "PRAGMA journal_mode = WAL").await;
        let url = format!("sqlite:{path}");
        let database = Self { url, zone: "", yaml: "publishing-queue.yaml", _folder: folder, server: None };
        database.fill("publishing-queue.sql").await
    }

    async fn postgres() -> Self {
        let server = POSTGRES.get();
        let name = unique("publishing");
        execute(&server.url("postgres"), &format!("CREATE DATABASE {name}")).await;
        let (url, yaml) = (server.url(&name), "publishing-queue-postgres.yaml");
        let database = Self { url, zone: "+00", yaml, _folder: Scratch::new(), server: Some(server) };
        database.fill("publishing-queue-postgres.sql").await
    }

    async fn fill(self, file: &str) -> Self {
        self.execute(&example(file)).await;
        self
    }

    async fn execute(&self, sql: &str) {
        execute(&self.url, sql).await;
    }

    fn start(&self, environment: &[(&str, &str)]) -> Program {
        let environment: Vec<_> = [("DATABASE_URL", self.url.as_str())].iter().chain(environment).copied().collect();
        let program = Program::start_example(self.yaml, &environment);
        program.wait_healthy();
        program
    }

    /// When a connection of another one last began a statement, as the server itself tells; with SQLite nothing.
    async fn last_statement(&self) -> Option<String> {
        self.server.as_ref()?;
        let mut connection = PgConnection::connect(&self.url).await.expect("a connection");
        let sql = "SELECT max(query_start)::text FROM pg_stat_activity
                   WHERE datname = current_database() AND pid <> pg_backend_pid()";
        sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&mut connection).await.expect("the server's statistics")
    }
}

/// Rows of all tables with what the payload must say about them.
struct Known {
    scheduled_us: Vec<i64>,
    actions_us: Vec<i64>,
    last_run_us: i64,
}

const SECOND: i64 = 1_000_000;
const MINUTE: i64 = 60 * SECOND;
const HOUR: i64 = 60 * MINUTE;
const DAY: i64 = 24 * HOUR;

/// Puts known rows in the place of the example's.
async fn insert_known(database: &Database) -> Known {
    let now = now_us();
    let at = |us: i64| format!("'{}{}'", format_us(us).replace('T', " ").replace('Z', ""), database.zone);
    let log = [
        ("pending", now + 30 * MINUTE, None),
        ("pending", now + 50 * MINUTE, None),
        ("pending", now + 3 * HOUR, None),
        ("pending", now - 2 * HOUR, None),
        ("processing", now - MINUTE, None),
        ("success", now - 3 * HOUR, Some(120)),
        ("success", now - 4 * HOUR, Some(121)),
        // Too long ago for the mean.
        ("success", now - 50 * HOUR, Some(3600)),
        ("failed", now - 30 * HOUR, None),
    ];
    let mut sql =
        "DELETE FROM publish_log; DELETE FROM clip_variant; DELETE FROM job; DELETE FROM ledger_event;".to_owned();
    for (platform, ready) in [("instagram", 25), ("tiktok", 18), ("youtube", 12), ("facebook", 5)] {
        let rows = vec![format!("('{platform}', 'ready')"); ready].join(",");
        sql += &format!("INSERT INTO clip_variant (platform, status) VALUES {rows}, ('{platform}', 'draft');");
    }
    for (status, scheduled, delay_s) in log {
        let published = delay_s.map_or("NULL".to_owned(), |s| at(scheduled + s * SECOND));
        sql += &format!(
            "INSERT INTO publish_log (clip_variant_id, status, scheduled_for, published_at)
             SELECT min(id), '{status}', {}, {published} FROM clip_variant;",
            at(scheduled)
        );
    }
    let jobs = [
        ("processing", Some("a"), None),
        ("processing", Some("a"), None),
        ("processing", Some("b"), None),
        ("done", Some("a"), Some((now - 10 * MINUTE, 2450))),
        ("done", Some("b"), Some((now - 11 * MINUTE, 2451))),
        ("done", Some("b"), Some((now - 12 * MINUTE, 2451))),
        ("failed", Some("c"), Some((now - 13 * MINUTE, 2451))),
        ("done", Some("c"), Some((now - 3 * HOUR, 60_000))),
        ("pending", None, None),
        ("pending", None, None),
        ("pending", None, None),
        ("pending", None, None),
    ];
    for (status, worker, span) in jobs {
        let worker = worker.map_or("NULL".to_owned(), |worker| format!("'{worker}'"));
        let (from, to) = span.map_or(("NULL".to_owned(), "NULL".to_owned()), |(us, ms)| (at(us), at(us + ms * 1000)));
        sql += &format!(
            "INSERT INTO job (status, worker_id, started_at, finished_at) VALUES ('{status}', {worker}, {from}, {to});"
        );
    }
    let events = [
        ("decision_made", "'d0'", now - 6 * MINUTE),
        ("action_executed", "'d0'", now - 5 * MINUTE),
        ("decision_made", "'d1'", now - 40 * SECOND),
        ("decision_made", "'d2'", now - 40 * SECOND),
        ("decision_made", "'d3'", now - 30 * SECOND),
        ("decision_made", "'d4'", now - 30 * SECOND),
        ("action_executed", "'d1'", now - 20 * SECOND),
        ("action_executed", "'d2'", now - 10 * SECOND),
        ("run_finished", "NULL", now - HOUR),
        ("run_finished", "NULL", now - 15 * SECOND),
    ];
    for (kind, entity, us) in events {
        sql += &format!(
            "INSERT INTO ledger_event (event_type, entity_id, created_at) VALUES ('orchestrator.{kind}', {entity}, {});",
            at(us)
        );
    }
    database.execute(&sql).await;
    Known {
        scheduled_us: log.iter().map(|(_, scheduled, _)| *scheduled).collect(),
        actions_us: events.iter().filter(|(kind, ..)| *kind == "action_executed").map(|(.., us)| *us).collect(),
        last_run_us: now - 15 * SECOND,
    }
}

fn timestamp(frame: &str) -> i64 {
    let frame: Value = serde_json::from_str(frame).expect("JSON");
    parse_us(frame["timestamp"].as_str().expect("a timestamp")).expect("a time")
}

impl Known {
    /// The payload, byte for byte; what depends on the moment is computed from the frame's own.
    fn assert_payload(&self, frame: &str) {
        assert!(frame.len() < PAYLOAD_BYTES_MAX, "{} bytes", frame.len());
        let us = timestamp(frame);
        let today = self.scheduled_us.iter().filter(|at| at.div_euclid(DAY) == us.div_euclid(DAY)).count();
        let actions = self.actions_us.iter().filter(|at| **at >= us - MINUTE).count();
        let parsed: Value = serde_json::from_str(frame).expect("JSON");
        let ago = parsed["orchestrator"]["last_run_seconds_ago"].as_i64().expect("a whole number");
        assert!((ago - (us - self.last_run_us) / SECOND).abs() <= 1, "{ago} s at {us}");
        let expected = format!(
            concat!(
                r#"{{"queue":{{"pending":4,"processing":1,"success":3,"failed":1,"total":9}},"#,
                r#""scheduler":{{"scheduled_today":{},"scheduled_next_hour":2,"overdue":1,"avg_delay_seconds":120.5}},"#,
                r#""orchestrator":{{"actions_last_minute":{},"decisions_pending":2,"saturation_rate":0.35,"last_run_seconds_ago":{}}},"#,
                r#""platforms":{{"instagram":25,"tiktok":18,"youtube":12,"facebook":5}},"#,
                r#""workers":{{"active_workers":2,"tasks_processing":3,"avg_processing_time_ms":2450.75}},"#,
                r#""timestamp":{}}}"#
            ),
            today, actions, ago, parsed["timestamp"]
        );
        assert_eq!(frame, expected);
    }
}

fn polls(program: &Program) -> u64 {
    program.source("publishing")["polls"].as_u64().expect("a count")
}

fn wait_for_subscribers(program: &Program, expected: bool) {
    wait_for("the subscribers to be counted", || {
        (program.get("/api/v1/stats")["has_subscribers"] == expected).then_some(())
    });
}

/// Waits for the program's own clock to go on by at least a second.
fn wait_a_second(program: &Program) {
    let uptime = || program.get("/health")["uptime_seconds"].as_i64();
    let begin = uptime();
    wait_for("a second", || (uptime() > begin.map(|seconds| seconds + 1)).then_some(()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_payload_has_the_figures_of_the_tables() {
    for database in [Database::sqlite().await, Database::postgres().await] {
        let known = insert_known(&database).await;
        // An hour between polls: what comes sooner comes for another reason.
        let program = database.start(&[("TELEMETRY_INTERVAL_SECONDS", "3600")]);
        assert_eq!(polls(&program), 0, "nobody is there");
        let mut first = Client::connect(program.address(), PATH).await;
        let frame = first.text().await;
        known.assert_payload(&frame);
        let mut second = Client::connect(program.address(), PATH).await;
        assert_eq!(second.text().await, frame, "one who comes later begins with the last figures");
        for client in [&mut first, &mut second] {
            client.send("ping").await;
            assert_eq!(client.text().await, "pong");
        }
        assert_eq!(polls(&program), 1);
        first.close().await;
        second.close().await;
        wait_for_subscribers(&program, false);
        let mut third = Client::connect(program.address(), PATH).await;
        assert_eq!(third.text().await, frame);
        let fresh = third.text().await;
        known.assert_payload(&fresh);
        assert!(timestamp(&fresh) > timestamp(&frame), "asked again at once");
        program.stop();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_subscribers_the_database_is_left_alone() {
    for database in [Database::sqlite().await, Database::postgres().await] {
        let program = database.start(&[("TELEMETRY_INTERVAL_SECONDS", "0.05")]);
        let before = database.last_statement().await;
        wait_a_second(&program);
        assert_eq!(polls(&program), 0);
        assert_eq!(database.last_statement().await, before);

        let mut client = Client::connect(program.address(), PATH).await;
        let mut last = timestamp(&client.text().await);
        for _ in 0..10 {
            let next = timestamp(&client.text().await);
            assert!(next > last);
            last = next;
        }
        database.execute("UPDATE publish_log SET status = 'failed' WHERE status = 'processing'").await;
        while client.json().await["queue"]["processing"] != 0 {}
        client.close().await;

        wait_for_subscribers(&program, false);
        // A poll may still be under way.
        wait_a_second(&program);
        let (after, statement) = (polls(&program), database.last_statement().await);
        assert!(after > 10 && (statement.is_none() || statement != before));
        wait_a_second(&program);
        assert_eq!(polls(&program), after);
        assert_eq!(database.last_statement().await, statement);
        program.stop();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_payload_comes_every_three_seconds_and_an_empty_database_has_one_too() {
    let database = Database::sqlite().await;
    database
        .execute("DELETE FROM publish_log; DELETE FROM clip_variant; DELETE FROM job; DELETE FROM ledger_event")
        .await;
    let program = database.start(&[]);
    let mut client = Client::connect(program.address(), PATH).await;
    let mut times = Vec::new();
    for _ in 0..2 {
        let frame = client.text().await;
        times.push(timestamp(&frame));
        let (figures, _) = frame.split_once(r#","timestamp":"#).expect("a timestamp at the end");
        let expected = concat!(
            r#"{"queue":{"pending":0,"processing":0,"success":0,"failed":0,"total":0},"#,
            r#""scheduler":{"scheduled_today":0,"scheduled_next_hour":0,"overdue":0,"avg_delay_seconds":null},"#,
            r#""orchestrator":{"actions_last_minute":0,"decisions_pending":0,"saturation_rate":0.0,"last_run_seconds_ago":null},"#,
            r#""platforms":{"instagram":0,"tiktok":0,"youtube":0,"facebook":0},"#,
            r#""workers":{"active_workers":0,"tasks_processing":0,"avg_processing_time_ms":null}"#,
        );
        assert_eq!(figures, expected);
    }
    // A poll that was held up makes the time to the next one shorter, never much longer than what held it up.
    assert!(times[1] - times[0] > SECOND, "{times:?}");
    program.stop();
}
