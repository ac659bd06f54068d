//! History that is merged, removed and taken back while the program runs, is killed, and is queried from outside.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use datafusion::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use super::support::program::{self, BINARY, Program, request};
use super::support::{Process, Scratch, free_port, wait_for};

const GRAPH: &str = "
checkpoint: {every: 20ms}
sources:
  posted: {type: http, path: /rows, fields: {n: int}}
pipelines:
  rows: {from: posted, to: history}
sinks:
  history: {type: parquet, path: history, roll: 1ms}
";

/// Files of an hour, and hours.
const FILES: usize = 4;
const HOURS: usize = 8;
const ROWS: u64 = (FILES * HOURS) as u64;

/// The published files of a table, by path.
fn published(folder: &Path, table: &str) -> Vec<PathBuf> {
    let (mut found, mut open) = (Vec::new(), vec![folder.join("history").join(table)]);
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.expect("an entry").path();
            match path.is_dir() {
                true => open.push(path),
                false => found.push(path),
            }
        }
    }
    found.sort();
    found
}

/// A folder with rows 1 to [`ROWS`], each in a file of its own, as of hours long ago.
fn old_hours() -> Scratch {
    let program = Program::start(GRAPH);
    for n in 1..=ROWS {
        program.post("/rows", &[format!("{{\"n\":{n}}}\n")]);
        wait_for("its file", || (published(program.scratch.path(), "rows").len() as u64 == n).then_some(()));
    }
    let scratch = program.stop();
    for (index, path) in published(scratch.path(), "rows").into_iter().enumerate() {
        let hour = scratch.path().join(format!("history/rows/dt=2026-01-02/hh={:02}", index / FILES));
        fs::create_dir_all(&hour).expect("a folder");
        fs::rename(&path, hour.join(path.file_name().expect("a name"))).expect("moved");
    }
    scratch
}

/// `count, sum` by the command line, which knows nothing of a running process.
fn queried(folder: &Path) -> String {
    let sql = "SELECT count(*) AS c, sum(n) AS s FROM rows";
    let output = program::run(folder, &["query", sql, "--format", "csv"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn expected() -> String {
    format!("c,s\n{ROWS},{}\n", ROWS * (ROWS + 1) / 2)
}

/// Counts as a reader of Parquet does that lists a glob and then opens each file; an error is no count.
fn counted(folder: &Path) -> Result<u64, String> {
    let mut rows = 0;
    for path in published(folder, "rows") {
        let file = File::open(path).map_err(|e| e.to_string())?;
        let footer = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| e.to_string())?;
        rows += footer.metadata().file_metadata().num_rows() as u64;
    }
    Ok(rows)
}

fn is_merged(folder: &Path) -> bool {
    published(folder, "rows").len() == HOURS
}

#[test]
fn closed_hours_are_merged_beside_queries_from_everywhere_and_removed_in_time() {
    let scratch = old_hours();
    let before = published(scratch.path(), "rows");
    assert_eq!(before.len() as u64, ROWS);
    let program = Program::start_in(scratch, free_port(), GRAPH);
    let folder = program.scratch.path().to_owned();
    let globbing = thread::spawn(move || {
        let mut counts = 0;
        while !is_merged(&folder) || counts == 0 {
            if let Ok(rows) = counted(&folder) {
                assert_eq!(rows, ROWS);
                counts += 1;
            }
        }
    });
    let folder = program.scratch.path().to_owned();
    wait_for("all hours to be merged", || {
        assert_eq!(queried(&folder), expected());
        let rows = program.query("SELECT count(*) AS c, sum(n) AS s FROM rows");
        assert_eq!(rows, serde_json::json!([{"c": ROWS, "s": ROWS * (ROWS + 1) / 2}]));
        (program.sink("history")["merged_hours"] == HOURS).then_some(())
    });
    globbing.join().expect("counted");
    assert_eq!(program.reasons().len(), 0);
    let (_, metrics) = request(program.port, "GET", "/metrics", "").expect("an answer");
    for line in [
        format!("tailwater_files{{sink=\"history\"}} {HOURS}"),
        format!("tailwater_merged_files_total{{sink=\"history\"}} {ROWS}"),
        format!("tailwater_merged_hours_total{{sink=\"history\"}} {HOURS}"),
        "tailwater_expired_hours_total{sink=\"history\"} 0".to_owned(),
        "tailwater_files_failures_total{sink=\"history\"} 0".to_owned(),
    ] {
        assert!(metrics.lines().any(|l| l == line), "no `{line}` in\n{metrics}");
    }
    // New rows go on beside it.
    program.post("/rows", &["{\"n\":0}\n".to_owned()]);
    wait_for("the new row", || (published(&folder, "rows").len() == HOURS + 1).then_some(()));
    let scratch = program.stop();
    assert_eq!(counted(scratch.path()), Ok(ROWS + 1));
    let names = published(scratch.path(), "rows");
    assert!(names[0].file_name().expect("a name").to_string_lossy().starts_with("history-compacted-"), "{names:?}");

    let program = Program::start_in(scratch, free_port(), &GRAPH.replace("roll: 1ms", "roll: 1ms, keep: 30d"));
    wait_for("all old hours to be removed", || (program.sink("history")["expired_hours"] == HOURS).then_some(()));
    let scratch = program.stop();
    assert_eq!(counted(scratch.path()), Ok(1));
}

#[test]
fn a_kill_while_hours_are_merged_costs_nothing() {
    let scratch = old_hours();
    let swap = scratch.path().join("history/.swap/rows");
    scratch.write("pipelines.yaml", &format!("server: {{listen: 127.0.0.1:{}}}\n{GRAPH}", free_port()));
    let mut kills = 0;
    while !is_merged(scratch.path()) {
        let before = published(scratch.path(), "rows");
        let mut process = Process::start(Command::new(BINARY).arg("run").current_dir(scratch.path()));
        // As soon as an hour is being built, or some files later.
        wait_for("an hour to be merged", || {
            assert!(process.is_running(), "{}", process.printed());
            let built = fs::read_dir(&swap).into_iter().flatten().count() > 0;
            (built && (kills % 2 == 0 || published(scratch.path(), "rows").len() < before.len())).then_some(())
        });
        process.signal("KILL");
        process.wait();
        kills += 1;
        assert_eq!(queried(scratch.path()), expected());
        assert_eq!(counted(scratch.path()), Ok(ROWS));
    }
    assert!(kills > 1, "all hours were merged at once");
    let program = Program::start_in(scratch, free_port(), GRAPH);
    assert_eq!(fs::read_dir(program.scratch.path().join("history/.swap")).expect("a folder").count(), 0);
    let scratch = program.stop();
    assert_eq!((queried(scratch.path()), counted(scratch.path())), (expected(), Ok(ROWS)));
}

#[test]
fn a_damaged_checkpoint_takes_back_the_files_that_came_after_the_one_before() {
    const LINES: usize = 400;
    let scratch = Scratch::new();
    let line = |n: usize| format!("{{\"n\":{n},\"at\":\"2026-01-01T00:{:02}:{:02}Z\"}}\n", n / 60, n % 60);
    scratch.write("rows.json", &(0..LINES).map(line).collect::<String>());
    let yaml = format!(
        "
server: {{listen: 127.0.0.1:{}}}
checkpoint: {{every: 20ms}}
sources:
  read:
    {{type: file, path: rows.json, fields: {{n: int, at: timestamp}}, event_time: {{field: at}}, time: at, speed: 60x}}
pipelines:
  rows: {{from: read, to: history}}
sinks:
  history: {{type: parquet, path: history, roll: 1ms}}
",
        free_port()
    );
    scratch.write("pipelines.yaml", &yaml);
    let state = scratch.path().join("state");
    let mut taken_back = 0;
    for _ in 0..2 {
        let before = published(scratch.path(), "rows").len();
        let mut process = Process::start(Command::new(BINARY).arg("run").current_dir(scratch.path()));
        wait_for("some files", || {
            assert!(process.is_running(), "{}", process.printed());
            (published(scratch.path(), "rows").len() >= before + 10).then_some(())
        });
        process.signal("KILL");
        process.wait();
        let mut checkpoints: Vec<PathBuf> =
            fs::read_dir(&state).expect("a folder").map(|entry| entry.expect("an entry").path()).collect();
        checkpoints.retain(|path| path.extension().is_some_and(|extension| extension == "checkpoint"));
        checkpoints.sort();
        // The newest two of three.
        for path in &checkpoints[1..] {
            fs::write(path, "torn").expect("damaged");
        }
    }
    let output = program::run(scratch.path(), &["run"]);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{errors}");
    let warning = errors.lines().find(|line| line.contains("are newer than the checkpoint")).expect("a warning");
    for entry in published(scratch.path(), ".aside") {
        taken_back += 1;
        assert!(entry.extension().is_some_and(|extension| extension == "aside"), "{}", entry.display());
    }
    assert!(warning.contains("history-") && warning.contains("their rows come again"), "{warning}");
    assert!(taken_back > 0, "nothing was taken back");
    let sql = "SELECT count(*) AS c, count(DISTINCT n) AS d FROM rows";
    let output = program::run(scratch.path(), &["query", sql, "--format", "csv"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), format!("c,d\n{LINES},{LINES}\n"));
}
