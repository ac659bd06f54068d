//! Killed at every write, sync, rename and removal of a short run: `strace` counts the calls and kills at the N-th.

use std::fmt::Write;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sqlx::{Connection, SqliteConnection};
use tokio::runtime::Builder;

use super::truth;
use crate::support::program::{self, BINARY};
use crate::support::random::number_from_environment;
use crate::support::{Scratch, can_trace, free_port};

/// Rows of the file; some checkpoints and published files pass while it is read.
const ROWS: u64 = 300;

/// The calls that change what is on the disk.
const CALLS: [&str; 6] = ["write", "fdatasync", "fsync", "rename", "unlink", "ftruncate"];

/// Kills per call of a plain `cargo test`; with `TAILWATER_SYSCALLS=1` at every single one.
const KILLS: u64 = 8;

/// More calls than one thread makes in a run.
const CALLS_MAX: u64 = 5_000;

fn graph(port: u16) -> String {
    format!(
        "server: {{listen: 127.0.0.1:{port}}}
checkpoint: {{every: 15ms}}
sources:
  rows:
    type: file
    path: rows.jsonl
    fields: {{n: int, s: string, at: timestamp_ms}}
    speed: 100x
    time: at
    event_time: {{field: at}}
pipelines:
  raw: {{from: rows, to: [history, copies]}}
  windows: {{from: rows, steps: [{{window: {{tumbling: 1s, aggregate: {{n: count(), total: sum(n)}}}}}}], to: history}}
sinks:
  history: {{type: parquet, path: history, roll: 15ms}}
  copies: {{type: sql, url: 'sqlite:copies.db', table: copies, create: true, batch: {{rows: 20, every: 5ms}}}}
"
    )
}

/// A folder with the graph and its rows.
fn scratch() -> Scratch {
    let folder = Scratch::new();
    folder.write("pipelines.yaml", &graph(free_port()));
    let mut rows = String::new();
    for n in 0..ROWS {
        writeln!(rows, "{{\"n\":{n},\"s\":\"rows\",\"at\":{}}}", 1_767_225_600_000 + n * 100).expect("text");
    }
    folder.write("rows.jsonl", &rows);
    folder
}

/// Runs the graph and kills it at the `at`-th such call of any of its threads. Whether it came so far.
fn killed_at(folder: &Path, call: &str, at: u64) -> bool {
    let inject = format!("inject={call}:signal=SIGKILL:when={at}");
    let status = Command::new("strace")
        .args(["-f", "-o", "/dev/null", "-e", &format!("trace={call}"), "-e", &inject, BINARY, "run"])
        .current_dir(folder)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .expect("strace runs");
    let killed = status.signal() == Some(9);
    assert!(killed || status.success(), "{call} {at}: {status}");
    killed
}

/// Whether the graph had come to its end, and only the process had not: the next run would start anew.
fn is_at_its_end(folder: &Path) -> bool {
    let is_checkpoint = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "checkpoint");
    !truth::files(&folder.join("state")).iter().any(is_checkpoint)
        && folder.join("history/raw").is_dir()
        && truth::query(folder, "SELECT count(*) FROM raw") == [[ROWS.to_string()]]
}

/// Rows and different rows in the table of the `sql` sink.
fn copies(folder: &Path) -> (i64, i64) {
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let url = format!("sqlite:{}", folder.join("copies.db").display());
        let mut connection = SqliteConnection::connect(&url).await.expect("connected");
        sqlx::query_as("SELECT count(*), count(DISTINCT n) FROM copies")
            .fetch_one(&mut connection)
            .await
            .expect("a row")
    })
}

/// What is wrong after the graph has run to its end.
fn wrong(folder: &Path) -> Vec<String> {
    if !is_at_its_end(folder) {
        let output = program::run(folder, &["run"]);
        if !output.status.success() {
            return vec![String::from_utf8_lossy(&output.stderr).into_owned()];
        }
    }
    let mut wrong = truth::wrong_files(folder);
    for (sql, expected) in [
        ("SELECT count(*), count(DISTINCT n), sum(n) FROM raw", [ROWS, ROWS, ROWS * (ROWS - 1) / 2]),
        ("SELECT count(*), sum(n), sum(total) FROM versions.windows", [ROWS / 10, ROWS, ROWS * (ROWS - 1) / 2]),
    ] {
        let found = truth::query(folder, sql);
        if found != [expected.map(|number| number.to_string())] {
            wrong.push(format!("{sql}: {found:?} instead of {expected:?}"));
        }
    }
    let rows = i64::try_from(ROWS).expect("a number");
    if copies(folder) != (rows, rows) {
        wrong.push(format!("rows in the table: {:?} instead of {rows}", copies(folder)));
    }
    wrong
}

#[test]
fn a_program_that_is_killed_at_any_call_goes_on_from_there() {
    if !can_trace() {
        return eprintln!("nobody may trace a process here: see the kills at random moments");
    }
    let every = number_from_environment("TAILWATER_SYSCALLS").is_some();
    let mut kills = 0;
    for call in CALLS {
        // How many there are is known when a run comes to its end: the steps grow until one does.
        let (mut at, mut step) = (1, 1);
        while at < CALLS_MAX {
            let folder = scratch();
            if !killed_at(folder.path(), call, at) {
                break;
            }
            kills += 1;
            let wrong = wrong(folder.path());
            assert!(wrong.is_empty(), "{call} {at}: {}", wrong.join("; "));
            if !every {
                step = (at * 2 / KILLS).max(1);
            }
            at += step;
        }
    }
    eprintln!("{kills} kills");
    assert!(kills > 20, "{kills}");
}
