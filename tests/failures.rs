//! What goes wrong around the program while it runs: it stays up, says what is wrong, and loses nothing.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::support::disk::Disk;
use super::support::mosquitto::{self, Mosquitto};
use super::support::program::{self, BINARY, Program, request};
use super::support::websocket::Client;
use super::support::{Process, Scratch, databases, free_port, wait_for};

/// `{"n": 1}` and so on, one per line.
fn numbers(range: std::ops::RangeInclusive<u64>) -> Vec<String> {
    range.map(|n| format!("{{\"n\":{n}}}\n")).collect()
}

/// A number out of a query's one row.
fn number(program: &Program, value: &str, table: &str) -> u64 {
    program.query(&format!("SELECT {value} AS x FROM {table}"))[0]["x"].as_u64().unwrap_or_default()
}

#[test]
fn a_broker_that_is_killed_and_comes_back_costs_no_row() {
    let mut broker = Mosquitto::start();
    let program = Program::start(&format!(
        "
checkpoint: {{every: 200ms}}
sources:
  devices: {{type: mqtt, url: \"mqtt://127.0.0.1:{0}\", topics: [\"in/{{device}}\"], fields: {{n: int}}}}
pipelines:
  rows: {{from: devices, to: [history, copies]}}
sinks:
  history: {{type: parquet, path: history, roll: 100ms}}
  copies: {{type: mqtt, url: \"mqtt://127.0.0.1:{0}\", topic: \"out/{{n}}\", retain: true}}
",
        broker.port
    ));
    program.wait_healthy();
    let epoch = program.get("/api/v1/pipelines")["epoch"].clone();
    let distinct = || number(&program, "count(DISTINCT n)", "rows");
    let publish = |broker: &Mosquitto, range| {
        let lines = numbers(range);
        let lines: Vec<&str> = lines.iter().map(|line| line.trim_end()).collect();
        broker.publish("in/a", 1, &lines);
    };
    publish(&broker, 1..=100);
    wait_for("the first rows", || (distinct() == 100).then_some(()));

    // Rows that only the broker has: the program sleeps, so nothing of them is acknowledged.
    program.process.signal("STOP");
    publish(&broker, 101..=250);
    broker.save("{\"n\":250}");
    broker.end("KILL");
    program.process.signal("CONT");
    // The first reason may be that the connection broke while rows were acknowledged; the next names the broker.
    let address = format!("127.0.0.1:{}", broker.port);
    wait_for("both sides of the broker to be missed", || {
        let reasons = program.reasons();
        let names_it = |node: &str| reasons.get(node).is_some_and(|reason| reason.contains(&address));
        (reasons.len() == 2 && names_it("source devices") && names_it("sink copies")).then_some(())
    });
    assert_eq!(request(program.port, "GET", "/ready", "").expect("an answer").0, 200, "it was ready once");

    broker.restart();
    program.wait_healthy();
    wait_for("the rows that the broker had kept", || (distinct() == 250).then_some(()));
    publish(&broker, 251..=300);
    wait_for("later rows", || (distinct() == 300).then_some(()));
    assert_eq!(number(&program, "max(n)", "rows"), 300);
    assert_eq!(program.get("/api/v1/pipelines")["epoch"], epoch, "it was never restarted");
    // What went out while the broker was away waited for it.
    let subscriber = mosquitto::subscribe(broker.port, "out/#", &[]);
    wait_for("all copies", || {
        let printed = subscriber.printed();
        let seen: BTreeSet<&str> =
            printed.lines().filter_map(|line| line.strip_prefix("out/")?.split(' ').next()).collect();
        (seen.len() == 300).then_some(())
    });
    program.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_restarted_gets_every_row_once() {
    let server = databases::postgres();
    let url = server.url("postgres");
    databases::execute(&url, "CREATE TABLE jobs (id bigserial PRIMARY KEY, n bigint)").await;
    databases::execute(&url, "CREATE TABLE copies (id bigint, n bigint)").await;
    let program = Program::start(&format!(
        "
checkpoint: {{every: 200ms}}
sources:
  jobs: {{type: sql, url: \"{url}\", every: 20ms, query: \"SELECT id, n FROM jobs\", cursor: id, fields: {{id: int, n: int}}}}
  clock: {{type: generate, rate: 50, columns: {{tick: seq}}}}
pipelines:
  rows: {{from: jobs, to: copies}}
  ticks: {{from: clock, to: history}}
sinks:
  copies: {{type: sql, url: \"{url}\", table: copies, batch: {{rows: 50, every: 10ms}}}}
  history: {{type: parquet, path: history, roll: 100ms}}
"
    ));
    program.wait_healthy();
    let insert = "INSERT INTO jobs (n) SELECT generate_series(1, 5000)";
    for round in 1..=3 {
        databases::execute(&url, insert).await;
        // Somewhere in the middle, wherever that is.
        wait_for("some rows", || (program.source("jobs")["rows_out"].as_u64()? > 5000 * (round - 1)).then_some(()));
        server.stop();
        let reasons = wait_for("both sides of the database to be missed", || {
            let reasons = program.reasons();
            (reasons.len() == 2).then_some(reasons)
        });
        assert_eq!(reasons.keys().collect::<Vec<_>>(), ["sink copies", "source jobs"]);
        let ticks = number(&program, "max(tick)", "ticks");
        wait_for("the other source to go on", || (number(&program, "max(tick)", "ticks") > ticks).then_some(()));
        server.start();
        program.wait_healthy();
    }
    wait_for("all rows", || (program.sink("copies")["rows_out"].as_u64()? >= 15_000).then_some(()));
    program.stop();
    let wrong = "SELECT count(*) FROM jobs j FULL JOIN (SELECT id, count(*) AS times FROM copies GROUP BY id) c \
                 ON j.id = c.id WHERE c.times IS DISTINCT FROM 1 OR j.id IS NULL";
    assert_eq!(scalar(&url, wrong).await, 0);
    assert_eq!(scalar(&url, "SELECT count(*) FROM copies").await, 15_000);
}

/// One whole number from PostgreSQL.
async fn scalar(url: &str, sql: &'static str) -> i64 {
    let mut connection = <sqlx::PgConnection as sqlx::Connection>::connect(url).await.expect("connected");
    sqlx::query_scalar(sql).fetch_one(&mut connection).await.expect("a number")
}

#[test]
fn a_message_that_cannot_be_read_goes_to_the_errors_sink_and_the_others_go_on() {
    let broker = Mosquitto::start();
    let program = Program::start(&format!(
        "
sources:
  posted: {{type: http, path: /rows, fields: {{n: int, at: timestamp}}, errors: rejected, event_time: {{field: at}}}}
  devices:
    {{type: mqtt, url: \"mqtt://127.0.0.1:{}\", topics: [\"in/{{device}}\"], fields: {{n: int}}, errors: rejected}}
pipelines:
  one: {{from: posted, to: history}}
  two: {{from: devices, to: history}}
sinks:
  history: {{type: parquet, path: history}}
  rejected: {{type: console}}
",
        broker.port
    ));
    program.wait_healthy();
    let at = "\"at\":\"2026-01-01T00:00:00Z\"";
    let lines = [
        format!("{{\"n\":1,{at}}}"),
        "{\"n\":2".to_owned(),
        format!("{{\"n\":\"three\",{at}}}"),
        format!("{{\"n\":4.5,{at}}}"),
        "[5]".to_owned(),
        "{\"n\":6,\"at\":\"yesterday\"}".to_owned(),
        "{\"n\":7}".to_owned(),
        format!("{{\"n\":8,{at}}}"),
    ];
    let (status, body) = request(program.port, "POST", "/rows", &lines.join("\n")).expect("an answer");
    let body: Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!(status, 200, "{body}");
    // The seventh can be read; that it has no event time is found later.
    assert_eq!((&body["accepted"], &body["rejected"]), (&3.into(), &5.into()), "{body}");
    broker.publish("in/a", 1, &["{\"n\":1}", "no JSON", "{\"n\":[]}", "{\"n\":2}"]);
    let rejected = wait_for("every rejected row", || {
        let lines: Vec<Value> =
            program.process.printed().lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
        (lines.len() == 8).then_some(lines)
    });
    let of = |metric: &str| -> BTreeSet<&str> {
        let rows = rejected.iter().filter(|line| line["metric"] == metric);
        rows.map(|line| line["data"]["payload"].as_str().expect("a payload")).collect()
    };
    let seventh = "{\"n\":7,\"at\":null}";
    let expected: BTreeSet<&str> = lines[1..6].iter().map(String::as_str).chain([seventh]).collect();
    assert_eq!(of("posted_errors"), expected);
    assert_eq!(of("devices_errors"), BTreeSet::from(["no JSON", "{\"n\":[]}"]));
    for line in &rejected {
        let row = &line["data"];
        let source = line["metric"].as_str().expect("a metric").trim_end_matches("_errors");
        assert_eq!(row["source"], source);
        assert!(row["error"].as_str().is_some_and(|error| !error.is_empty()), "{row}");
    }
    assert_eq!(program.source("posted")["errors"], 6);
    assert_eq!(program.source("devices")["errors"], 2);
    wait_for("the right rows", || (number(&program, "count(*)", "two") == 2).then_some(()));
    assert_eq!(program.query("SELECT n FROM one ORDER BY n"), json!([{"n": 1}, {"n": 8}]));
    // A wrong row is the sender's fault: the node is healthy.
    assert_eq!(program.reasons().len(), 0);
    program.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_fails_leaves_the_others_alone_and_recovers() {
    let folder = Scratch::new();
    let database = format!("sqlite:{}?mode=rwc", folder.path().join("demo.db").display());
    databases::execute(&database, "CREATE TABLE other (x integer)").await;
    let program = Program::start_in(
        folder,
        free_port(),
        "
sources:
  bad: {type: sql, url: \"sqlite:demo.db\", every: 20ms, query: SELECT n FROM missing, fields: {n: int}}
  good: {type: generate, rate: 50, columns: {n: seq}}
pipelines:
  from_bad: {from: bad, to: live}
  from_good: {from: good, to: [live, history, out]}
sinks:
  live: {type: websocket, path: /ws}
  history: {type: parquet, path: history, roll: 100ms}
  out: {type: sql, url: \"sqlite:demo.db\", table: target}
",
    );
    let reasons = wait_for("both nodes to have failed", || {
        let reasons = program.reasons();
        (reasons.len() == 2 && reasons.values().all(|reason| reason != "not connected yet")).then_some(reasons)
    });
    assert!(reasons["source bad"].contains("no such table: missing"), "{reasons:?}");
    assert!(reasons["sink out"].contains("target"), "{reasons:?}");
    let seen = number(&program, "count(*)", "from_good");
    wait_for("the others to go on", || (number(&program, "count(*)", "from_good") > seen).then_some(()));
    let (_, metrics) = request(program.port, "GET", "/metrics", "").expect("an answer");
    let healthy = |line: &str| metrics.lines().any(|l| l == format!("tailwater_node_healthy{line}"));
    assert!(healthy("{kind=\"source\",node=\"bad\",type=\"sql\"} 0"), "{metrics}");
    assert!(healthy("{kind=\"source\",node=\"good\",type=\"generate\"} 1"), "{metrics}");
    assert!(healthy("{kind=\"sink\",node=\"out\",type=\"sql\"} 0"), "{metrics}");
    databases::execute(&database, "CREATE TABLE target (n integer)").await;
    databases::execute(&database, "CREATE TABLE missing (n integer)").await;
    program.wait_healthy();
    let first = wait_for("the rows that waited", || {
        let rows = program.sink("out")["rows_out"].as_u64()?;
        (rows > seen).then_some(rows)
    });
    assert!(first > 0);
    program.stop();
}

#[test]
fn a_taken_broker_port_is_told_with_the_way_out() {
    let taken = Mosquitto::start();
    let program = Program::start(&format!(
        "sources: {{devices: {{type: mqtt, url: \"embedded:{}\", topics: [a]}}}}\npipelines: {{p: {{from: devices}}}}",
        taken.port
    ));
    let reasons = wait_for("the reason", || Some(program.reasons()).filter(|r| r["source devices"].contains("listen")));
    assert!(reasons["source devices"].contains("embedded:PORT"), "{reasons:?}");
    program.stop();
}

const DISK: &str = "
checkpoint: {every: 50ms}
sources:
  posted: {type: http, path: /rows, fields: {n: int}}
pipelines:
  rows: {from: posted, to: [live, history]}
sinks:
  live: {type: websocket, path: /ws, queue: 10000}
  history: {type: parquet, path: history, roll: 50ms}
";

/// Numbers in the published files.
fn published(folder: &Path) -> Vec<u64> {
    let output = program::run(folder, &["query", "SELECT n FROM rows ORDER BY n", "--format", "csv"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    text.lines().skip(1).map(|n| n.parse().expect("a number")).collect()
}

/// A client that has read its beginning: what is posted from now on comes as updates.
async fn join(program: &Program) -> Client {
    let mut client = Client::connect(program.address(), "/ws").await;
    for beginning in ["hello", "snapshot"] {
        assert_eq!(client.json().await["type"], beginning);
    }
    client
}

/// Reads the live stream up to a number.
async fn read_until(client: &mut Client, next: &mut u64, last: u64) {
    while *next <= last {
        let frame = client.json().await;
        for row in frame["data"].as_array().into_iter().flatten() {
            assert_eq!(row["n"], *next);
            *next += 1;
        }
    }
}

/// Fills `disk` while rows flow, and makes room again.
async fn fill_and_free(program: Program, disk: &Disk, nodes: &[&str], words: &str) {
    program.wait_healthy();
    let process = program.process.id();
    let mut client = join(&program).await;
    let mut next = 1;
    program.post("/rows", &numbers(1..=100));
    wait_for("the first rows to be published", || (published(program.scratch.path()).len() == 100).then_some(()));
    disk.fill(process);
    // Whatever the disk, rows are live at once; their sender is answered when they are on it.
    let (port, body) = (program.port, numbers(101..=600).concat());
    let posting = tokio::task::spawn_blocking(move || request(port, "POST", "/rows", &body));
    // Live goes on; queries see what waits; what is published stays whole.
    read_until(&mut client, &mut next, 600).await;
    let reasons = wait_for("the reason", || Some(program.reasons()).filter(|reasons| !reasons.is_empty()));
    for (node, reason) in &reasons {
        assert!(nodes.contains(&node.as_str()) && reason.contains(words), "{reasons:?}");
    }
    assert_eq!(number(&program, "count(*)", "rows"), 600);
    assert_eq!(published(program.scratch.path()), (1..=100).collect::<Vec<_>>());
    disk.free(process);
    let (status, answer) = posting.await.expect("no panic").expect("an answer");
    assert_eq!(status, 200, "{answer}");
    program.wait_healthy();
    wait_for("the rows that waited", || (published(program.scratch.path()).len() == 600).then_some(()));
    program.post("/rows", &numbers(601..=700));
    read_until(&mut client, &mut next, 700).await;
    let warnings = program.process.printed().matches("WARN").count();
    assert!(warnings <= 20, "{warnings} warnings:\n{}", program.process.printed());
    let folder = program.stop();
    assert_eq!(published(folder.path()), (1..=700).collect::<Vec<_>>());
    let left = files(folder.path());
    let wrong = |path: &PathBuf| path.extension().is_some_and(|e| e == "draft" || e == "part");
    assert!(!left.iter().any(wrong), "{left:?}");
}

/// Every file below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_under_the_history_holds_rows_back_until_there_is_room() {
    let folder = Scratch::new();
    let Some(disk) = Disk::mount(&folder.path().join("history")) else {
        return eprintln!("this user may not mount: see the test with a limit");
    };
    let program = Program::start_in(folder, free_port(), DISK);
    fill_and_free(program, &disk, &["sink history", "checkpoint"], "No space left").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_under_the_checkpoints_holds_rows_back_until_there_is_room() {
    let folder = Scratch::new();
    let Some(disk) = Disk::mount(&folder.path().join("state")) else {
        return eprintln!("this user may not mount: see the test with a limit");
    };
    let program = Program::start_in(folder, free_port(), DISK);
    fill_and_free(program, &disk, &["checkpoint", "source posted"], "No space left").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_that_may_not_grow_hold_rows_back_until_they_may() {
    let (folder, port) = (Scratch::new(), free_port());
    folder.write("pipelines.yaml", &format!("server: {{listen: 127.0.0.1:{port}}}\n{DISK}"));
    let mut command = Command::new("sh");
    // Without the signal, a write beyond the limit is an error like that of a full disk.
    command.args(["-c", "trap '' XFSZ; exec \"$0\" run", BINARY]).current_dir(folder.path());
    let process = Process::start(&mut command);
    let program = Program { scratch: folder, port, process };
    wait_for("the program to answer", || program::get(port, "/health"));
    fill_and_free(program, &Disk::Limited, &["sink history", "checkpoint", "source posted"], "File too large").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_client_does_not_disturb_another() {
    let program = Program::start(DISK);
    program.wait_healthy();
    let mut client = join(&program).await;
    let mut next = 1;
    program.post("/rows", &numbers(1..=50));

    // Bytes that are no frame.
    let mut garbage = Client::connect(program.address(), "/ws").await;
    let bytes: Vec<u8> = (0..100_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let _ = tokio::io::AsyncWriteExt::write_all(garbage.socket.get_mut(), &bytes).await;
    while let Some(Ok(_)) = garbage.message().await {}
    // 100 MB in one message.
    let mut large = Client::connect(program.address(), "/ws").await;
    let sent = futures::SinkExt::send(&mut large.socket, Message::text("x".repeat(100 << 20))).await;
    let mut code = None;
    while let Some(Ok(message)) = large.message().await {
        if let Message::Close(Some(frame)) = message {
            code = Some(frame.code);
        }
    }
    assert!(sent.is_err() || code == Some(CloseCode::Size), "{sent:?}, {code:?}");
    // Texts that mean nothing are answered, and the connection stays.
    let mut talker = Client::connect(program.address(), "/ws?metric=rows").await;
    for text in ["", "{", "null", "[1]", "{\"type\":\"subscribe\"}", "{\"type\":\"subscribe\",\"metric\":7}", "\u{0}"] {
        talker.send(text).await;
    }
    talker.send("ping").await;
    while talker.text().await != "pong" {}
    // No HTTP, and HTTP without an end.
    for bytes in [&b"\x16\x03\x01\x02\x00\x01\x00"[..], b"GET\r\n\r\n", &[b'x'; 100_000]] {
        let mut stream = TcpStream::connect(program.address()).expect("a connection");
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    let (status, _) = request(program.port, "POST", "/rows", &"x".repeat(2 << 20)).unwrap_or((413, String::new()));
    assert_eq!(status, 413);

    program.post("/rows", &numbers(51..=100));
    read_until(&mut client, &mut next, 100).await;
    read_rows_of(&mut talker, 100).await;
    assert_eq!(program.reasons().len(), 0);
    let stats = program.get("/api/v1/stats");
    assert_eq!(stats["messages_dropped"], 0, "{stats}");
    program.stop();
}

/// Reads on until a row with this number has come.
async fn read_rows_of(client: &mut Client, last: u64) {
    loop {
        let frame = client.json().await;
        if frame["data"].as_array().into_iter().flatten().any(|row| row["n"] == last) {
            return;
        }
    }
}

#[test]
fn wrong_sql_over_http_is_the_clients_fault() {
    let program = Program::start(DISK);
    program.wait_healthy();
    for (body, says) in [
        ("{\"sql\": \"SELEC 1\"}", "SELEC"),
        ("{\"sql\": \"\"}", ""),
        ("{\"sql\": \"SELECT * FROM nothing\"}", "no table `nothing` in the history; one of `rows`"),
        ("{\"sql\": \"SELECT m FROM rows\"}", "no column `m` here"),
        ("{\"sql\": \"SELECT n + 'x' - FROM rows\"}", ""),
        ("{\"sql\": \"DROP TABLE rows\"}", "read-only"),
        ("{\"sql\": \"COPY rows TO '/tmp/x.csv'\"}", "read-only"),
        ("{\"sql\": \"CREATE EXTERNAL TABLE x STORED AS CSV LOCATION '/etc/passwd'\"}", "read-only"),
        ("{\"sql\": \"SELECT 1; SELECT 2\"}", ""),
        ("{\"sql\": 1}", "the body is not"),
        ("{\"query\": \"SELECT 1\"}", "the body is not"),
        ("{\"sql\": \"SELECT 1\", \"format\": \"xml\"}", "xml"),
        ("SELECT 1", "the body is not"),
        ("", "the body is not"),
    ] {
        let (status, answer) = request(program.port, "POST", "/api/v1/query", body).expect("an answer");
        let answer: Value = serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{body}: {e}: {answer}"));
        let error = answer["error"].as_str().unwrap_or_default();
        assert!(status == 400 && !error.is_empty() && error.contains(says), "{body}: {status} {answer}");
    }
    let (status, _) = request(program.port, "GET", "/api/v1/query", "").expect("an answer");
    assert_eq!(status, 405);
    assert_eq!(program.query("SELECT count(*) AS n FROM rows"), json!([{"n": 0}]));
    program.stop();
}
