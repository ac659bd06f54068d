//! Stop and resume: a graph that was stopped in the middle writes the history of one that was not.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::support::mosquitto::Mosquitto;
use super::support::program::{self, BINARY, Program, request, request_with};
use super::support::{Process, Scratch, free_port, wait_for};

/// Every stateful step, over event time that the rows carry themselves.
const GRAPH: &str = "
sources:
  readings:
    type: http
    path: /readings
    fields: {device: string, value: int, at: timestamp}
    event_time: {field: at, lateness: 2s, idle: 1d}
  places: {type: http, path: /places, fields: {device: string, room: string}}
pipelines:
  tumbling: {from: readings, steps: [{window: {tumbling: 10s, group_by: [device], aggregate: AGGREGATES}}], to: history}
  sliding:
    from: readings
    steps: [{window: {sliding: {size: 10s, every: 5s}, group_by: [device], aggregate: AGGREGATES}}]
    to: history
  session: {from: readings, steps: [{window: {session: {gap: 4s}, group_by: [device], aggregate: AGGREGATES}}], to: history}
  running: {from: readings, steps: [{window: {none: {every: 5s}, group_by: [device], aggregate: AGGREGATES}}], to: history}
  once: {from: readings, steps: [{deduplicate: {key: [value], window: 1h}}], to: history}
  whereabouts: {from: places, key: [device]}
  joined: {from: readings, steps: [{join: {with: whereabouts, on: [device]}}], to: history}
sinks:
  history: {type: parquet, path: history}
";

const TABLES: [&str; 6] = ["tumbling", "sliding", "session", "running", "once", "joined"];

fn graph() -> String {
    let aggregates = "{n: count(), total: sum(value), mean: avg(value), least: min(value), newest: last(value), \
                      median: \"percentile(value, 0.5)\", kinds: distinct(value), rise: delta(value)}";
    GRAPH.replace("AGGREGATES", aggregates)
}

/// A reading at a second after midnight.
fn reading(device: &str, value: i64, second: u32) -> String {
    let (minute, second) = (second / 60, second % 60);
    format!("{{\"device\":\"{device}\",\"value\":{value},\"at\":\"2026-01-01T00:{minute:02}:{second:02}Z\"}}\n")
}

/// Readings of three devices over two minutes, somewhat out of order, with repetitions and silences.
fn readings() -> Vec<String> {
    (0..360u32)
        .filter(|n| n % 7 != 3 && n / 20 % 3 != 2)
        .map(|n| reading(["a", "b", "c"][n as usize % 3], i64::from(n * n % 97), (n ^ 1) / 3))
        .collect()
}

/// The rows of a table in the published files, in one order.
fn rows(folder: &Path, table: &str, columns: &str) -> Vec<String> {
    let sql = format!("SELECT {columns} FROM versions.{table}");
    let output = program::run(folder, &["query", &sql, "--format", "csv"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let mut rows: Vec<String> = text.lines().skip(1).map(str::to_owned).collect();
    rows.sort();
    rows
}

/// All columns that do not tell when a row was received or published.
fn columns(table: &str) -> &'static str {
    match table {
        "once" => "device, value, at, event_time",
        "joined" => "device, value, at, room, event_time",
        _ => {
            "window_start, window_end, device, n, total, mean, least, newest, median, kinds, rise, rows, stage, revision, \
             event_time"
        }
    }
}

fn drain(folder: &Path) {
    let output = program::run(folder, &["run", "--drain"]);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{errors}");
    assert!(errors.contains("going on from checkpoint"), "{errors}");
}

/// The history of a graph that got the readings in `parts`, stopped between them, and was drained.
fn history(parts: &[&[String]]) -> Vec<Vec<String>> {
    let mut folder = Scratch::new();
    for (index, part) in parts.iter().enumerate() {
        let program = Program::start_in(folder, free_port(), &graph());
        if index == 0 {
            let places =
                [("a", "hall"), ("b", "attic")].map(|(d, r)| format!("{{\"device\":\"{d}\",\"room\":\"{r}\"}}\n"));
            program.post("/places", &places);
            // Between two sources there is no order: the join must have both before the readings come.
            wait_for("the places", || (program.pipeline("joined")["rows_in"] == 2).then_some(()));
        }
        program.post("/readings", part);
        folder = program.stop();
    }
    drain(folder.path());
    TABLES.iter().map(|table| rows(folder.path(), table, columns(table))).collect()
}

#[test]
fn a_graph_that_was_stopped_writes_the_history_of_one_that_was_not() {
    let all = readings();
    let whole = history(&[&all]);
    for (table, rows) in TABLES.iter().zip(&whole) {
        assert!(rows.len() > 15, "{table}: {rows:?}");
    }
    // In the middle of windows, of sessions, and of rows that are out of order.
    let stopped = history(&[&all[..31], &all[31..32], &all[32..200], &all[200..]]);
    for ((table, whole), stopped) in TABLES.iter().zip(&whole).zip(&stopped) {
        assert_eq!(stopped, whole, "{table}");
    }
}

/// Posts readings under a key, for as long as the program starts.
fn post_with_key(program: &Program, key: &str, body: &str) -> u16 {
    let header = format!("Idempotency-Key: {key}\r\n");
    let answered =
        || request_with(program.port, "POST", "/readings", &header, body).filter(|(status, _)| *status != 503);
    wait_for("an answer", answered).0
}

#[test]
fn what_was_answered_counts_once_through_kills_right_after_the_answer() {
    let all = readings();
    let whole = history(&[&all]);
    let program = Program::start_in(Scratch::new(), free_port(), &graph());
    let places = [("a", "hall"), ("b", "attic")].map(|(d, r)| format!("{{\"device\":\"{d}\",\"room\":\"{r}\"}}\n"));
    program.post("/places", &places);
    // Between two sources there is no order, a crash may change it: the join has both in a checkpoint before.
    let mut folder = program.stop();
    for (index, part) in all.chunks(30).enumerate() {
        let mut program = Program::start_in(folder, free_port(), &graph());
        if index > 0 {
            // A client that does not know whether its last request was heard.
            let before = all.chunks(30).nth(index - 1).expect("a part").concat();
            assert_eq!(post_with_key(&program, &format!("part {}", index - 1), &before), 200);
        }
        assert_eq!(post_with_key(&program, &format!("part {index}"), &part.concat()), 200);
        assert_eq!(post_with_key(&program, &format!("part {index}"), &all[0]), 422, "another body");
        program.process.signal("KILL");
        program.process.wait();
        folder = program.scratch;
    }
    drain(folder.path());
    for (table, whole) in TABLES.iter().zip(&whole) {
        assert_eq!(rows(folder.path(), table, columns(table)), *whole, "{table}");
    }
}

const ONE: &str = "
sources:
  readings:
    type: http
    path: /readings
    fields: {device: string, value: int, at: timestamp}
    event_time: {field: at, idle: 1d}
pipelines:
  changed: {from: readings, steps: [{window: {tumbling: 10s, aggregate: {total: sum(value)}}}], to: history}
  kept: {from: readings, steps: [{window: {tumbling: 10s, aggregate: {total: sum(value)}}}], to: history}
sinks:
  history: {type: parquet, path: history}
";

#[test]
fn a_changed_step_starts_anew_with_a_warning_and_the_others_go_on() {
    let program = Program::start(ONE);
    program.post("/readings", &[reading("a", 1, 1)]);
    let folder = program.stop();
    let changed = ONE.replacen("sum(value)", "max(value)", 1);
    let program = Program::start_in(folder, free_port(), &changed);
    let printed = program.process.printed();
    assert!(printed.contains("WARN pipeline/changed has changed since checkpoint"), "{printed}");
    assert!(!printed.contains("pipeline/kept"), "{printed}");
    program.post("/readings", &[reading("a", 2, 2)]);
    let folder = program.stop();
    drain(folder.path());
    assert_eq!(rows(folder.path(), "changed", "total, rows"), ["2,1"]);
    assert_eq!(rows(folder.path(), "kept", "total, rows"), ["3,2"]);
}

/// A graph that reads new rows of a table.
const TABLE: &str = "
sources:
  visits:
    type: sql
    url: sqlite:demo.db
    table: visits
    cursor: id
    every: 10ms
    fields: {id: int}
pipelines:
  all: {from: visits, to: history}
sinks:
  history: {type: parquet, path: history}
";

/// Runs SQL in the database of [`TABLE`].
fn sqlite(folder: &Path, sql: &str) {
    let status = Command::new("sqlite3").arg(folder.join("demo.db")).arg(sql).status();
    assert!(status.expect("sqlite3").success(), "{sql}");
}

/// Runs a graph in `folder` until it has read so many rows. What it printed.
fn read_rows(folder: Scratch, yaml: &str, count: u64) -> (Scratch, String) {
    let program = Program::start_in(folder, free_port(), yaml);
    wait_for("the rows", || (program.pipeline("all")["rows_in"] == count).then_some(()));
    let printed = program.process.printed();
    (program.stop(), printed)
}

#[test]
fn a_source_goes_on_from_its_position_after_an_edit_unless_it_reads_something_else() {
    let folder = Scratch::new();
    for table in ["visits", "others"] {
        let columns = "id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT DEFAULT 'x'";
        sqlite(folder.path(), &format!("CREATE TABLE {table} ({columns}); INSERT INTO {table} (id) VALUES (1), (2)"));
    }
    let (folder, _) = read_rows(folder, TABLE, 2);
    sqlite(folder.path(), "INSERT INTO visits (id) VALUES (3)");
    let edited = TABLE
        .replace("{id: int}", "{id: int, name: string}")
        .replace("every: 10ms", "every: 20ms\n    timeout: 30s\n    commit_order: autoincrement");
    let (folder, printed) = read_rows(folder, &edited, 1);
    assert!(
        printed.contains("going on from checkpoint") && !printed.contains("source/visits has changed"),
        "{printed}"
    );
    let (folder, printed) = read_rows(folder, &edited.replace("table: visits", "table: others"), 2);
    assert!(printed.contains("WARN source/visits has changed since checkpoint"), "{printed}");
    drain(folder.path());
    assert_eq!(rows(folder.path(), "all", "id, coalesce(name, 'none')"), ["1,none", "1,x", "2,none", "2,x", "3,x"]);
}

#[test]
fn a_table_that_was_set_back_is_told() {
    let folder = Scratch::new();
    sqlite(folder.path(), "CREATE TABLE visits (id INTEGER PRIMARY KEY); INSERT INTO visits VALUES (1), (2), (3)");
    let (mut folder, _) = read_rows(folder, TABLE, 3);
    const WARNING: &str = "every row lies before the position";
    for (change, is_told) in [("DELETE FROM visits WHERE id = 1", false), ("DELETE FROM visits WHERE id = 3", true)] {
        sqlite(folder.path(), change);
        let program = Program::start_in(folder, free_port(), TABLE);
        program.wait_healthy();
        assert_eq!(program.process.printed().contains(WARNING), is_told, "{change}");
        folder = program.stop();
    }
}

#[test]
fn a_pipeline_that_has_gone_is_told_and_its_waiting_rows_are_published() {
    let program = Program::start(ONE);
    program.post("/readings", &[reading("a", 1, 1), reading("a", 1, 11)]);
    let folder = program.stop();
    let without: String =
        ONE.lines().filter(|line| !line.contains("changed:")).map(|line| format!("{line}\n")).collect();
    let program = Program::start_in(folder, free_port(), &without);
    let printed = program.process.printed();
    assert!(printed.contains("pipeline/changed is no longer in the file: its state is dropped"), "{printed}");
    let folder = program.stop();
    assert_eq!(history_files(&folder, "changed").len(), 1);
}

#[test]
fn a_source_that_leaves_the_file_and_comes_back_counts_each_record_once() {
    const OTHER: &str = "
sources:
  readings: {type: generate, rate: 10, columns: {n: seq}}
pipelines:
  numbers: {from: readings, to: history}
sinks:
  history: {type: parquet, path: history}
";
    let with = "checkpoint: {every: 1h}
sources:
  readings: {type: http, path: /readings, fields: {device: string, value: int}}
pipelines:
  all: {from: readings, to: history}
sinks:
  history: {type: parquet, path: history}
";
    let program = Program::start(with);
    program.post("/readings", &[reading("a", 1, 1), reading("a", 2, 2)]);
    let folder = program.stop();
    let mut program = Program::start_in(folder, free_port(), with);
    program.post("/readings", &[reading("a", 3, 3)]);
    program.process.signal("KILL");
    program.process.wait();
    // Nobody takes the third up; and a source of that name that has another inbox, or none, says nothing of this one.
    let program = Program::start_in(program.scratch, free_port(), OTHER);
    wait_for("a number", || program.source("readings")["rows_out"].as_u64().filter(|rows| *rows > 0));
    let folder = program.stop();
    let program = Program::start_in(folder, free_port(), with);
    let printed = program.process.printed();
    assert!(printed.contains("source readings: 1 rows of the inbox are in no checkpoint yet"), "{printed}");
    program.post("/readings", &[reading("a", 4, 4)]);
    let folder = program.stop();
    assert_eq!(rows(folder.path(), "all", "value"), ["1", "2", "3", "4"]);
}

#[test]
fn drain_closes_open_windows_as_final_and_a_later_run_takes_new_rows() {
    let program = Program::start(ONE);
    program.post("/readings", &[reading("a", 1, 1), reading("a", 2, 11)]);
    let folder = program.stop();
    assert_eq!(rows(folder.path(), "kept", "total, stage"), ["1,final"]);
    drain(folder.path());
    assert_eq!(rows(folder.path(), "kept", "total, stage"), ["1,final", "2,final"]);
    // Nothing is left to drain.
    drain(folder.path());
    assert_eq!(rows(folder.path(), "kept", "total, stage"), ["1,final", "2,final"]);
    let program = Program::start_in(folder, free_port(), ONE);
    program.post("/readings", &[reading("a", 3, 21), reading("a", 4, 31)]);
    let folder = program.stop();
    drain(folder.path());
    assert_eq!(rows(folder.path(), "kept", "total, stage"), ["1,final", "2,final", "3,final", "4,final"]);
}

#[test]
fn no_row_is_counted_twice_around_a_drain() {
    let all = readings();
    let mut folder = Scratch::new();
    let mut late = 0;
    for part in [&all[..100], &all[100..]] {
        let program = Program::start_in(folder, free_port(), &graph());
        program.post("/readings", part);
        wait_for("the rows to be taken", || (program.pipeline("tumbling")["rows_in"] == part.len()).then_some(()));
        late += program.pipeline("tumbling")["late_rows"].as_u64().expect("a count");
        folder = program.stop();
        drain(folder.path());
    }
    let sum = |sql: &str| rows(folder.path(), sql, "CAST(sum(n) AS BIGINT)");
    // The drain closed windows early: what came for them afterwards is late, and counted as such.
    assert_eq!(sum("tumbling"), [(all.len() as u64 - late).to_string()]);
    for table in ["tumbling", "sliding", "session", "running"] {
        let key = "device, CAST(window_start AS VARCHAR) || CAST(window_end AS VARCHAR)";
        let twice = format!("{table} GROUP BY {key} HAVING count(*) > 1");
        assert_eq!(rows(folder.path(), &twice, "count(*)"), Vec::<String>::new(), "{table}");
    }
    let twice = "once GROUP BY value HAVING count(*) > 1";
    assert_eq!(rows(folder.path(), twice, "value"), Vec::<String>::new());
}

#[test]
fn a_second_process_on_the_same_state_is_refused() {
    let program = Program::start(ONE);
    let other = ONE.replace("sources:", &format!("server: {{listen: 127.0.0.1:{}}}\nsources:", free_port()));
    program.scratch.write("other.yaml", &other);
    for arguments in [&["run", "other.yaml"][..], &["run", "other.yaml", "--drain"]] {
        let output = program::run(program.scratch.path(), arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{errors}");
        assert!(errors.contains("another process runs on the state folder `./state`"), "{errors}");
        assert!(errors.contains("`checkpoint: {dir: …}`"), "{errors}");
    }
    program.post("/readings", &[reading("a", 1, 1)]);
    program.stop();
}

/// The Parquet files of a table.
fn history_files(folder: &Scratch, table: &str) -> Vec<PathBuf> {
    fn walk(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(folder).into_iter().flatten() {
            let path = entry.expect("an entry").path();
            match path.is_dir() {
                true => walk(&path, found),
                false => found.push(path),
            }
        }
    }
    let mut found = Vec::new();
    walk(&folder.path().join("history").join(table), &mut found);
    found.sort();
    found
}

const FILE: &str = "
server: {listen: 127.0.0.1:PORT}
sources:
  readings:
    type: file
    path: readings.json
    fields: {device: string, value: int, at: timestamp}
    event_time: {field: at, lateness: 2s}
PACE
pipelines:
  tumbling:
    from: readings
    steps: [{window: {tumbling: 10s, group_by: [device], aggregate: {n: count(), total: sum(value)}}}]
    to: history
  every: {from: readings, to: history}
sinks:
  history: {type: parquet, path: history}
";

fn file_graph(pace: &str) -> Scratch {
    let folder = Scratch::new();
    folder.write("readings.json", &readings().concat());
    folder.write("pipelines.yaml", &FILE.replace("PORT", &free_port().to_string()).replace("PACE", pace));
    folder
}

fn run_to_the_end(folder: &Scratch) {
    let output = program::run(folder.path(), &["run"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_bounded_graph_leaves_no_checkpoint_and_a_second_run_adds_its_rows_again() {
    let folder = file_graph("");
    run_to_the_end(&folder);
    let left = || -> Vec<_> {
        let entries = std::fs::read_dir(folder.path().join("state")).expect("the state folder");
        entries.map(|entry| entry.expect("an entry").file_name()).filter(|name| name != "lock").collect()
    };
    assert_eq!(left(), Vec::<std::ffi::OsString>::new());
    let columns = "window_start, device, n, total";
    let (first, files) = (rows(folder.path(), "tumbling", columns), history_files(&folder, "tumbling"));
    assert_eq!(files.len(), 1);
    run_to_the_end(&folder);
    let mut twice = [first.clone(), first.clone()].concat();
    twice.sort();
    assert_eq!(rows(folder.path(), "tumbling", columns), twice);
    let after = history_files(&folder, "tumbling");
    assert!(after.len() == 2 && after.contains(&files[0]), "{after:?}");
    assert_eq!(left(), Vec::<std::ffi::OsString>::new());
}

#[test]
fn a_file_that_was_half_read_is_read_on() {
    let whole = file_graph("");
    run_to_the_end(&whole);
    // Two minutes of event time in two seconds: time enough to stop it in the middle.
    let folder = file_graph("    time: at\n    speed: 60x\n");
    let yaml = std::fs::read_to_string(folder.path().join("pipelines.yaml")).expect("the graph");
    let port: u16 = yaml.split("127.0.0.1:").nth(1).and_then(|p| p.split('}').next()?.parse().ok()).expect("a port");
    let mut process = Process::start(Command::new(BINARY).arg("run").current_dir(folder.path()));
    wait_for("a window", || {
        assert!(process.is_running(), "{}", process.printed());
        let (_, latest) = request(port, "GET", "/api/v1/metrics/tumbling", "")?;
        let latest: Value = serde_json::from_str(&latest).ok()?;
        latest["data"].as_array().is_some_and(|rows| !rows.is_empty()).then_some(())
    });
    process.signal("TERM");
    assert_eq!(process.wait().code(), Some(0), "{}", process.printed());
    let all = rows(whole.path(), "every", "device, value, at");
    let half = rows(folder.path(), "every", "device, value, at");
    assert!(half.len() < all.len(), "it had ended before it was stopped");
    run_to_the_end(&folder);
    assert_eq!(rows(folder.path(), "every", "device, value, at"), all);
    let columns = "window_start, device, n, total, rows, stage, revision";
    assert_eq!(rows(folder.path(), "tumbling", columns), rows(whole.path(), "tumbling", columns));
}

#[test]
fn what_a_broker_kept_during_a_stop_goes_into_the_windows_that_were_open() {
    let broker = Mosquitto::start();
    let yaml = ONE
        .replace("type: http", "type: mqtt")
        .replace("path: /readings", &format!("url: mqtt://127.0.0.1:{}\n    topics: [readings]", broker.port));
    let publish = |seconds: std::ops::Range<u32>| {
        let lines: Vec<String> = seconds.map(|second| reading("a", 1, second)).collect();
        broker.publish("readings", 1, &lines.iter().map(|line| line.trim_end()).collect::<Vec<_>>());
    };
    let taken = |program: &Program, rows: u64| {
        wait_for("rows", || (program.pipeline("kept")["rows_in"] == rows).then_some(()));
    };
    let program = Program::start(&yaml);
    program.wait_healthy();
    publish(0..15);
    taken(&program, 15);
    let folder = program.stop();
    publish(15..25);
    let program = Program::start_in(folder, free_port(), &yaml);
    taken(&program, 10);
    publish(25..40);
    taken(&program, 25);
    let folder = program.stop();
    drain(folder.path());
    assert_eq!(rows(folder.path(), "kept", "total, rows, stage"), vec!["10,10,final"; 4]);
}

#[test]
fn rows_later_than_allowed_are_counted_and_change_nothing() {
    let count = |program: &Program| program.pipeline("tumbling")["late_rows"].clone();
    let lines = [
        reading("a", 1, 1),
        reading("a", 2, 9),
        // 2 s of lateness: the watermark is 10 s, and the first window has closed.
        reading("a", 4, 12),
        reading("a", 100, 9),
        reading("a", 100, 0),
        reading("a", 8, 11),
        reading("a", 16, 22),
        // Late for the tumbling window and for one of the two sliding ones.
        reading("a", 32, 13),
    ];
    for cut in 1..lines.len() {
        let mut folder = Scratch::new();
        let mut late = 0;
        for part in [&lines[..cut], &lines[cut..]] {
            let program = Program::start_in(folder, free_port(), &graph());
            program.post("/readings", part);
            let before: u64 = lines[..lines.len() - part.len()].len() as u64;
            wait_for("the rows to be judged", || {
                let taken = program.pipeline("tumbling")["rows_in"].as_u64()?;
                (taken == part.len() as u64).then_some(before)
            });
            late = count(&program).as_u64().expect("a count").max(late);
            folder = program.stop();
        }
        drain(folder.path());
        let columns = "window_start, n, total";
        assert_eq!(
            rows(folder.path(), "tumbling", columns),
            ["2026-01-01T00:00:00.000Z,2,3", "2026-01-01T00:00:10.000Z,2,12", "2026-01-01T00:00:20.000Z,1,16"],
            "cut at {cut}"
        );
        assert_eq!(late, 3, "cut at {cut}");
    }
}
