//! Faults of the machine under the program: a disk that does not keep what it was given, a clock that is set back, a
//! database that is away for long. Whatever was acknowledged counts, and counts once.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::support::program::{BINARY, Program, Sse, request, run};
use super::support::random::number_from_environment;
use super::support::{PATIENCE, Process, Scratch, can_trace, databases, free_port, wait_for};

/// Rows posted one by one, and what was said to each.
#[derive(Default)]
struct Posted {
    next: u64,
    acknowledged: BTreeSet<u64>,
}

impl Posted {
    /// Posts the next row; whether it was acknowledged.
    fn post(&mut self, port: u16) -> bool {
        let n = self.next;
        self.next += 1;
        let answer = request(port, "POST", "/rows", &format!("{{\"n\":{n}}}"));
        let acknowledged = answer.is_some_and(|(status, _)| status == 200);
        if acknowledged {
            self.acknowledged.insert(n);
        }
        acknowledged
    }

    /// Posts until so many more are acknowledged.
    fn post_acknowledged(&mut self, port: u16, count: usize) {
        let wanted = self.acknowledged.len() + count;
        wait_for("rows to be acknowledged", || {
            while self.post(port) && self.acknowledged.len() < wanted {}
            (self.acknowledged.len() >= wanted).then_some(())
        });
    }

    /// Whether these numbers are what must be there: all that were acknowledged, none twice, none that was not posted.
    fn check(&self, place: &str, found: &[u64]) {
        let once: BTreeSet<u64> = found.iter().copied().collect();
        assert_eq!(once.len(), found.len(), "{place}: some are there twice: {found:?}");
        let lost: Vec<_> = self.acknowledged.difference(&once).collect();
        assert!(lost.is_empty(), "{place}: lost {lost:?}");
        assert!(once.iter().all(|n| *n < self.next), "{place}: {found:?}");
    }
}

/// The first column of a query over the published files.
fn column(folder: &Path, sql: &str) -> Vec<u64> {
    let output = run(folder, &["query", sql, "--format", "csv"]);
    assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    text.lines().skip(1).map(|line| line.parse().expect("a number")).collect()
}

fn count(program: &Program, sql: &str) -> u64 {
    program.query(&format!("SELECT count(*) AS n FROM ({sql})"))[0]["n"].as_u64().expect("a number")
}

const SYNCED: &str = "
server: {listen: 127.0.0.1:PORT}
checkpoint: {every: 20ms}
sources:
  posted: {type: http, path: /rows, fields: {n: int}}
pipelines:
  rows: {from: posted, to: [history, copies]}
sinks:
  history: {type: parquet, path: history, roll: 20ms}
  copies: {type: sql, url: 'sqlite:copies.db', table: copies, create: true, batch: {rows: 5, every: 5ms}}
";

/// Rows posted while syncs fail: enough for each of them to be reached.
const POSTS: usize = 400;

/// A sync that fails may have dropped what it was given: nothing that is not known to be on disk may be acknowledged.
#[test]
fn a_disk_that_fails_to_sync_is_told_loudly_and_costs_nothing() {
    if !can_trace() {
        return eprintln!("nobody may trace a process here");
    }
    let mut told = 0;
    for (call, at) in [("fdatasync", 1), ("fdatasync", 4), ("fdatasync", 20), ("fsync", 2), ("fsync", 9), ("fsync", 30)]
    {
        let case = format!("{call} {at}");
        let (mut posted, port) = (Posted::default(), free_port());
        let folder = Scratch::new();
        folder.write("pipelines.yaml", &SYNCED.replace("PORT", &port.to_string()));
        let inject = format!("inject={call}:error=EIO:when={at}");
        // Traced from aside: the process is the program itself.
        let options = ["-D", "-f", "-o", "/dev/null", "-e", &format!("trace={call}"), "-e", &inject, BINARY, "run"];
        let mut process = Process::start(Command::new("strace").args(options).current_dir(folder.path()));
        wait_for("the program to answer or to end", || (posted.post(port) || !process.is_running()).then_some(()));
        for _ in 0..POSTS {
            if !process.is_running() {
                break;
            }
            posted.post(port);
        }
        if posted.acknowledged.len() < POSTS {
            wait_for("the end of the program", || (!process.is_running()).then_some(()));
        }
        let printed = process.printed();
        let is_loud = printed.contains("Input/output error");
        assert!(is_loud || process.is_running(), "{case}: ended without a word: {printed}");
        eprintln!("{case}: {} acknowledged of {}, told: {is_loud}", posted.acknowledged.len(), posted.next);
        told += u32::from(is_loud);
        drop(process);
        let program = Program::start_in(folder, port, SYNCED);
        posted.post_acknowledged(port, 5);
        wait_for("all rows", || {
            let all = posted.acknowledged.len() as u64;
            (count(&program, "SELECT DISTINCT n FROM rows") >= all).then_some(())
        });
        let folder = program.stop();
        posted.check(&case, &column(folder.path(), "SELECT n FROM rows"));
        posted.check(&format!("{case}, the table"), &copies(folder.path()));
    }
    assert!(told >= 5, "{told}");
}

/// The numbers in the table of the `sql` sink.
fn copies(folder: &Path) -> Vec<u64> {
    let url = format!("sqlite:{}", folder.join("copies.db").display());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let found: Vec<i64> = runtime.block_on(async {
        let mut connection = <sqlx::SqliteConnection as sqlx::Connection>::connect(&url).await.expect("connected");
        sqlx::query_scalar("SELECT n FROM copies").fetch_all(&mut connection).await.expect("numbers")
    });
    found.into_iter().map(|n| u64::try_from(n).expect("a number")).collect()
}

/// The library that gives a process another clock.
fn clock_library() -> PathBuf {
    let folders = std::fs::read_dir("/usr/lib").expect("a folder").map(|entry| entry.expect("an entry").path());
    let mut found = folders.map(|folder| folder.join("faketime/libfaketime.so.1")).filter(|path| path.exists());
    found.next().expect("libfaketime is installed")
}

#[test]
fn a_clock_that_is_set_back_neither_stops_windows_nor_counts_a_row_twice() {
    let yaml = "
checkpoint: {every: 50ms}
sources:
  posted: {type: http, path: /rows, fields: {n: int}}
pipelines:
  rows: {from: posted, to: history}
  load: {from: posted, steps: [{window: {tumbling: 200ms, aggregate: {n: count(), total: sum(n)}}}], to: history}
sinks:
  history: {type: parquet, path: history, roll: 50ms}
";
    let (mut folder, port, mut posted) = (Scratch::new(), free_port(), Posted::default());
    let clock = folder.path().join("clock");
    let mut hours_back = 0;
    for round in 0..3 {
        // Set back while it runs, and while it does not.
        std::fs::write(&clock, format!("-{hours_back}h\n")).expect("a file");
        let mut command = Command::new(BINARY);
        command.arg("run").env("LD_PRELOAD", clock_library()).env("FAKETIME_TIMESTAMP_FILE", &clock);
        command.env("FAKETIME_NO_CACHE", "1").env("FAKETIME_DONT_FAKE_MONOTONIC", "1").env("NO_FAKE_STAT", "1");
        let mut program = Program::start_by(folder, port, yaml, &mut command);
        for _ in 0..2 {
            let windows = || count(&program, "SELECT window_start FROM load");
            let before = windows();
            posted.post_acknowledged(port, 20);
            wait_for("windows to close", || {
                posted.post_acknowledged(port, 1);
                (windows() > before + 2).then_some(())
            });
            hours_back += 1;
            std::fs::write(&clock, format!("-{hours_back}h\n")).expect("a file");
        }
        let printed = program.process.printed();
        assert!(printed.contains("the clock of this machine was set back by "), "round {round}: {printed}");
        program.process.signal("KILL");
        program.process.wait();
        folder = program.scratch;
    }
    let drained = run(folder.path(), &["run", "--drain"]);
    assert!(drained.status.success(), "{}", String::from_utf8_lossy(&drained.stderr));
    let rows = column(folder.path(), "SELECT n FROM rows");
    posted.check("the rows", &rows);
    let folder = folder.path();
    assert_eq!(column(folder, "SELECT sum(n) FROM versions.load"), [rows.len() as u64]);
    assert_eq!(column(folder, "SELECT sum(total) FROM versions.load"), [rows.iter().sum::<u64>()]);
    assert_eq!(
        column(folder, "SELECT max(c) FROM (SELECT count(*) AS c FROM versions.load GROUP BY window_start)"),
        [1]
    );
}

/// Checkpoints that pass while the database is away; `TAILWATER_AWAY=60` makes it a minute's.
const CHECKPOINTS_AWAY: u64 = 5;

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_away_holds_up_neither_live_clients_nor_checkpoints_and_misses_nothing() {
    let server = databases::postgres();
    let url = server.url("postgres");
    let yaml = format!(
        "
server: {{listen: 127.0.0.1:PORT}}
checkpoint: {{every: 1s}}
sources:
  posted: {{type: http, path: /rows, fields: {{n: int}}}}
pipelines:
  rows: {{from: posted, to: [history, copies, events]}}
sinks:
  history: {{type: parquet, path: history, roll: 100ms}}
  copies: {{type: sql, url: '{url}', table: copies, create: true, batch: {{rows: 50, every: 10ms}}}}
  events: {{type: sse, path: /events}}
"
    );
    let (mut posted, port) = (Posted::default(), free_port());
    let program = Program::start_in(Scratch::new(), port, &yaml);
    program.wait_healthy();
    posted.post_acknowledged(port, 50);
    server.stop();
    let newest = |folder: &Path| -> u64 {
        let entries = std::fs::read_dir(folder.join("state")).into_iter().flatten();
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let numbers = names.filter_map(|name| name.strip_suffix(".checkpoint")?.parse().ok());
        numbers.max().unwrap_or_default()
    };
    let away = number_from_environment("TAILWATER_AWAY").unwrap_or(CHECKPOINTS_AWAY);
    let mut program = Some(program);
    // A kill in the middle of it, too.
    for part in 0..2 {
        let running = program.take().expect("a program");
        let mut client = Sse::open(port, "/events");
        assert_eq!(client.next().0, "hello");
        assert_eq!(client.next().0, "snapshot");
        for _ in 0..away {
            let last = newest(running.scratch.path());
            wait_for("a checkpoint while the database is away", || {
                posted.post_acknowledged(port, 10);
                let last_row = posted.next - 1;
                while !client.next().2.contains(&format!("\"n\":{last_row}}}")) {}
                (newest(running.scratch.path()) > last).then_some(())
            });
        }
        assert!(running.reasons().contains_key("sink copies"), "{:?}", running.reasons());
        let Program { scratch, process, .. } = running;
        drop(process);
        if part == 1 {
            server.start();
        }
        program = Some(Program::start_in(scratch, port, &yaml));
    }
    let program = program.expect("a program");
    program.wait_healthy();
    posted.post_acknowledged(port, 10);
    let table = "SELECT n FROM copies";
    let all = posted.acknowledged.len();
    let copied = async || -> Vec<i64> {
        let mut connection = <sqlx::PgConnection as sqlx::Connection>::connect(&url).await.expect("connected");
        sqlx::query_scalar(table).fetch_all(&mut connection).await.expect("numbers")
    };
    let all_copied = async {
        while copied().await.len() < all {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, all_copied).await.expect("all rows in the table");
    let folder = program.stop();
    let found: Vec<u64> = copied().await.into_iter().map(|n| u64::try_from(n).expect("a number")).collect();
    posted.check("the table", &found);
    posted.check("the history", &column(folder.path(), "SELECT n FROM rows"));
}
