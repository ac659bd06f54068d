//! What lies on the disk, shown and examined; damaged on purpose, mended, and gone on from.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::{Value, json};

use super::support::program::{self, Program};
use super::support::{Scratch, free_port, wait_for};

/// A checkpoint at the start and at the stop, and none between.
const SELDOM: &str = "checkpoint: {every: 1h}\n";
/// Many checkpoints.
const OFTEN: &str = "checkpoint: {every: 50ms}\n";

const GRAPH: &str = "
sources:
  readings: {type: http, path: /readings, fields: {device: string, value: int, at: timestamp}, event_time: {field: at, idle: 1d}}
pipelines:
  every: {from: readings, to: [history, away]}
  load: {from: readings, steps: [{window: {tumbling: 10s, aggregate: {total: sum(value)}}}], to: history}
sinks:
  history: {type: parquet, path: history, roll: 100ms}
  away: {type: redis, url: \"redis://127.0.0.1:NOBODY\", write: [{push: readings}]}
";

/// The graph, with a sink whose server is not there: its rows wait.
fn graph(checkpoints: &str) -> String {
    checkpoints.to_owned() + &GRAPH.replace("NOBODY", &free_port().to_string())
}

fn reading(value: i64) -> String {
    format!("{{\"device\":\"a\",\"value\":{value},\"at\":\"2026-01-01T00:00:{value:02}Z\"}}\n")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// Runs a command; its output, if it ends with `code`.
fn run(folder: &Path, arguments: &[&str], code: i32) -> (String, String) {
    let Output { status, stdout, stderr } = program::run(folder, arguments);
    let (stdout, stderr) = (text(&stdout), text(&stderr));
    assert_eq!(status.code(), Some(code), "{arguments:?}: {stdout}\n{stderr}");
    (stdout, stderr)
}

fn state(folder: &Path) -> Value {
    serde_json::from_str(&run(folder, &["state", "--format", "json"], 0).0).expect("JSON")
}

/// Kills the program as a crash would.
fn kill(mut program: Program) -> Scratch {
    program.process.signal("KILL");
    program.process.wait();
    program.scratch
}

/// A graph killed with five commits in its inbox, of which its checkpoint has none.
fn killed_with_an_inbox() -> (Scratch, PathBuf) {
    let program = Program::start(&graph(SELDOM));
    // The first checkpoint is taken at the start; the rows shall come after it.
    wait_for("the first checkpoint", || (!checkpoints(program.scratch.path()).is_empty()).then_some(()));
    (1..=5).for_each(|value| program.post("/readings", &[reading(value)]));
    let folder = kill(program);
    let inbox = folder.path().join("state/inbox/readings.http/00000000000000000000.log");
    (folder, inbox)
}

/// A graph killed after many checkpoints, with published history and rows that wait for a server.
fn killed_with_checkpoints() -> Scratch {
    let program = Program::start(&graph(OFTEN));
    program.post("/readings", &[reading(1), reading(2)]);
    wait_for("a published file", || (files(&program.scratch.path().join("history/every")).len() == 1).then_some(()));
    let last = checkpoints(program.scratch.path()).last().cloned();
    wait_for("three checkpoints after it", || {
        let checkpoints = checkpoints(program.scratch.path());
        (checkpoints.len() == 3 && checkpoints.first() > last.as_ref()).then_some(())
    });
    kill(program)
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten() {
        let path = entry.expect("an entry").path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

fn checkpoints(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder.join("state")).into_iter().flatten();
    let mut all: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    all.retain(|path| path.extension().is_some_and(|extension| extension == "checkpoint"));
    all.sort();
    all
}

/// Starts the graph on what is there, and waits until it has taken a checkpoint: then it can be stopped.
fn start_again(folder: Scratch, yaml: &str, options: &[&str]) -> Program {
    let last = checkpoints(folder.path()).pop();
    let program = Program::start_with(folder, free_port(), yaml, options);
    wait_for("a checkpoint of its own", || (checkpoints(program.scratch.path()).pop() > last).then_some(()));
    program
}

fn flip(path: &Path, place: usize) {
    let mut bytes = fs::read(path).expect("a file");
    bytes[place] ^= 1;
    fs::write(path, bytes).expect("written");
}

fn cut(path: &Path, bytes: usize) {
    let left = fs::read(path).expect("a file");
    fs::write(path, &left[..left.len() - bytes]).expect("written");
}

/// Starts again until what is in the inbox has been taken in; the history must have these values then.
fn check_values_after_a_start(folder: Scratch, expected: &[i64]) -> Scratch {
    let program = start_again(folder, &graph(SELDOM), &[]);
    wait_for("the inbox to be taken in", || (program.pipeline("every")["rows_in"] == expected.len()).then_some(()));
    let folder = program.stop();
    assert_eq!(values(folder.path()), expected);
    folder
}

/// The values in the history.
fn values(folder: &Path) -> Vec<i64> {
    let (rows, _) = run(folder, &["query", "SELECT value FROM every ORDER BY value", "--format", "csv"], 0);
    rows.lines().skip(1).map(|line| line.parse().expect("a number")).collect()
}

#[test]
fn the_state_is_shown_beside_a_running_process_and_after_it() {
    let program = Program::start(&graph(SELDOM));
    wait_for("the first checkpoint", || (!checkpoints(program.scratch.path()).is_empty()).then_some(()));
    program.post("/readings", &[reading(1), reading(2), reading(3)]);
    let folder = program.scratch.path();
    let now = state(folder);
    assert_eq!((&now["running"], &now["checkpoints"][0]["taken"]), (&json!(true), &json!(true)), "{now}");
    let inbox = &now["inboxes"][0];
    assert_eq!((&inbox["source"], &inbox["next_record"]), (&json!("readings"), &json!(3)), "{now}");
    assert_eq!(inbox["records_not_in_checkpoint"], 3, "{now}");
    let (examined, _) = run(folder, &["doctor"], 0);
    assert!(examined.starts_with("all is well: 1 checkpoint, 2 logs"), "{examined}");
    assert!(examined.contains("a process runs on the state"), "{examined}");
    let (_, refused) = run(folder, &["doctor", "--salvage"], 2);
    assert!(refused.contains("a process runs on the state folder `./state`"), "{refused}");

    let folder = program.stop();
    let after = state(folder.path());
    assert_eq!((&after["running"], &after["inboxes"][0]["records_not_in_checkpoint"]), (&json!(false), &json!(0)));
    let node = |state: &Value, key: &str| -> Value {
        let nodes = state["nodes"].as_array().expect("nodes");
        nodes.iter().find(|node| node["key"] == key).unwrap_or_else(|| panic!("{key}: {state}")).clone()
    };
    assert_eq!(node(&after, "source/readings")["first_record_not_covered"], 3, "{after}");
    assert_eq!(after["outboxes"][0]["rows_waiting"], 3, "{after}");
    let (table, _) = run(folder.path(), &["state"], 0);
    for part in
        ["state folder ./state: no process runs on it", "a start takes it", "source/readings", "goes on", "whole"]
    {
        assert!(table.contains(part), "{part}: {table}");
    }
    assert!(
        run(folder.path(), &["doctor"], 0)
            .0
            .starts_with("all is well: 2 checkpoints, 2 logs, 1 history file with 3 rows")
    );

    let steps = "every: {from: readings, steps: [{deduplicate: {key: [value], window: 1h}}],";
    let changed = graph(SELDOM).replace("every: {from: readings,", steps).replace("path: /readings", "path: /other");
    folder.write("changed.yaml", &changed.replace("load:", "burden:"));
    let (changed, _) = run(folder.path(), &["state", "changed.yaml", "--format", "json"], 0);
    let changed: Value = serde_json::from_str(&changed).expect("JSON");
    for (key, start, lost) in [
        ("source/readings", "goes_on", Value::Null),
        ("pipeline/every", "changed", json!("the windows, totals and rows that its steps had open, if any,")),
        ("pipeline/burden", "new", Value::Null),
        ("pipeline/load", "gone", json!("the windows, totals and rows that its steps had open, if any,")),
        ("sink/history", "goes_on", Value::Null),
    ] {
        let node = node(&changed, key);
        assert_eq!((&node["start"], &node["lost"]), (&json!(start), &lost), "{key}");
    }
}

#[test]
fn before_the_first_run_there_is_nothing_to_show_and_nothing_wrong() {
    let folder = Scratch::new();
    folder.write("pipelines.yaml", &graph(SELDOM));
    assert!(run(folder.path(), &["state"], 0).0.contains("checkpoints: none"));
    assert_eq!(
        run(folder.path(), &["doctor"], 0).0,
        "all is well: 0 checkpoints, 0 logs, 0 history files with 0 rows read\n"
    );
    assert!(run(folder.path(), &["doctor", "--salvage"], 0).0.starts_with("no inbox and no outbox is damaged"));
    assert!(!folder.path().join("state").exists());
}

#[test]
fn a_flipped_bit_in_an_inbox_stops_the_start_and_the_salvage_keeps_the_other_records() {
    let (folder, inbox) = killed_with_an_inbox();
    flip(&inbox, 80);
    let (found, _) = run(folder.path(), &["doctor"], 2);
    let place =
        "damaged: `./state/inbox/readings.http/00000000000000000000.log` at byte 28: the checksum of a group is wrong";
    assert!(found.contains(place) && found.contains("`pipeline doctor --salvage`"), "{found}");
    let (_, refused) = run(folder.path(), &["run"], 2);
    assert!(refused.contains("is damaged at byte 28") && refused.contains("pipeline doctor"), "{refused}");
    let damaged = fs::read(&inbox).expect("the file");

    let (mended, _) = run(folder.path(), &["doctor", "--salvage"], 0);
    let told = "mended: `./state/inbox/readings.http/00000000000000000000.log`: records set aside: 1 (numbers 0) with ";
    assert!(mended.contains(told) && mended.contains("of these 1 are lost for good"), "{mended}");
    assert!(mended.contains("records kept: 4;"), "{mended}");
    assert_eq!(fs::read(inbox.with_extension("log.damaged")).expect("the file as it was"), damaged);
    assert!(mended.contains("note: `./state/inbox/readings.http/00000000000000000000.log.damaged`"), "{mended}");
    let folder = check_values_after_a_start(folder, &[2, 3, 4, 5]);
    run(folder.path(), &["doctor"], 0);
}

#[test]
fn a_torn_end_of_an_inbox_is_a_note_and_a_start_cuts_it_off() {
    let (folder, inbox) = killed_with_an_inbox();
    cut(&inbox, 3);
    let (found, _) = run(folder.path(), &["doctor"], 0);
    assert!(found.contains("note: ") && found.contains("the next start cuts it off"), "{found}");
    assert!(run(folder.path(), &["doctor", "--salvage"], 0).0.starts_with("no inbox and no outbox is damaged"));
    check_values_after_a_start(folder, &[1, 2, 3, 4]);
}

#[test]
fn a_flipped_bit_in_an_outbox_costs_its_rows_and_the_others_still_wait() {
    let program = Program::start(&graph(OFTEN));
    for value in 1..=3 {
        program.post("/readings", &[reading(value)]);
        wait_for("the row to be in a checkpoint", || {
            (state(program.scratch.path())["outboxes"][0]["rows_waiting"] == value).then_some(())
        });
    }
    let folder = kill(program);
    flip(&folder.path().join("state/outbox/away/00000000000000000000.log"), 80);
    assert_eq!(state(folder.path())["outboxes"][0]["rows_waiting"], Value::Null);
    let (found, _) = run(folder.path(), &["doctor"], 2);
    assert!(found.contains("damaged: `./state/outbox/away/00000000000000000000.log` at byte 28"), "{found}");
    run(folder.path(), &["run"], 2);
    let (mended, _) = run(folder.path(), &["doctor", "--salvage"], 0);
    assert!(mended.contains("records set aside: 1 (numbers 0)") && mended.contains("of these 1 are lost"), "{mended}");
    let folder = start_again(folder, &graph(OFTEN), &[]).stop();
    assert_eq!(state(folder.path())["outboxes"][0]["rows_waiting"], 2);
    assert_eq!(values(folder.path()), [1, 2, 3]);
}

#[test]
fn an_inbox_that_was_cut_to_nothing_is_mended_too() {
    let (folder, inbox) = killed_with_an_inbox();
    fs::write(&inbox, "").expect("a file");
    run(folder.path(), &["doctor"], 2);
    run(folder.path(), &["run"], 2);
    let (mended, _) = run(folder.path(), &["doctor", "--salvage"], 0);
    assert!(mended.contains("records kept: 0;") && mended.contains("cannot be counted"), "{mended}");
    let program = start_again(folder, &graph(SELDOM), &[]);
    program.post("/readings", &[reading(7)]);
    assert_eq!(values(program.stop().path()), [7]);
}

#[test]
fn a_damaged_newest_checkpoint_is_told_and_a_start_takes_the_one_before() {
    let folder = killed_with_checkpoints();
    let all = checkpoints(folder.path());
    flip(&all[2], 40);
    let (found, _) = run(folder.path(), &["doctor"], 2);
    let name = |path: &Path| path.file_name().expect("a name").to_str().expect("UTF-8").to_owned();
    assert!(found.contains(&format!("damaged: `./state/{}`: the checkpoint cannot be read", name(&all[2]))), "{found}");
    let before = name(&all[1]).trim_start_matches('0').trim_end_matches(".checkpoint").to_owned();
    assert!(found.contains(&format!("a start goes back to checkpoint {before}")), "{found}");
    let shown = state(folder.path());
    let taken: Vec<&Value> = shown["checkpoints"].as_array().expect("a list").iter().map(|c| &c["taken"]).collect();
    assert_eq!(taken, [&json!(false), &json!(true), &json!(false)], "{shown}");
    let program = start_again(folder, &graph(OFTEN), &[]);
    assert!(program.process.printed().contains(&format!("going on from checkpoint {before}")));
    let folder = program.stop();
    assert_eq!(values(folder.path()), [1, 2]);
    let (found, _) = run(folder.path(), &["doctor"], 0);
    let aside = name(&all[2].with_extension("damaged"));
    assert!(
        found.contains(&format!("note: `./state/{aside}`: a checkpoint that was damaged when a run started")),
        "{found}"
    );
}

#[test]
fn history_of_a_checkpoint_that_is_gone_is_told() {
    let folder = killed_with_checkpoints();
    run(folder.path(), &["doctor"], 0);
    let published = files(&folder.path().join("history/every")).remove(0);
    // As if the state were a copy from before the file was published.
    fs::copy(&published, published.with_file_name("history-99999999999999-0.parquet")).expect("a copy");
    let (found, _) = run(folder.path(), &["doctor"], 2);
    assert!(
        found.contains("of checkpoint 99999999999999, which is newer than the one a start goes on from"),
        "{found}"
    );
    assert!(found.contains("move the file away before it"), "{found}");
    assert_eq!(found.matches("damaged: `").count(), 1, "{found}");
}

#[test]
fn when_no_checkpoint_is_whole_a_start_is_refused_and_fresh_goes_on_without_them() {
    let folder = killed_with_checkpoints();
    let state = folder.path().join("state");
    fs::write(state.join("mqtt-devices.id"), "7").expect("a file");
    let all = checkpoints(folder.path());
    all.iter().for_each(|path| cut(path, 1));
    let (found, _) = run(folder.path(), &["doctor"], 2);
    assert_eq!(found.matches("no checkpoint is whole, so a start is refused").count(), 3, "{found}");
    let (_, refused) = run(folder.path(), &["run"], 2);
    for part in ["no checkpoint can be read (`./state/0", "pipeline doctor", "pipeline run --fresh"] {
        assert!(refused.contains(part), "{part}: {refused}");
    }
    let before = values(folder.path());
    run(folder.path(), &["run", "--fresh", "--drain"], 1);

    let program = start_again(folder, &graph(OFTEN), &["--fresh"]);
    let printed = program.process.printed();
    assert!(printed.contains("the state is moved to `./state/fresh-2"), "{printed}");
    program.post("/readings", &[reading(9)]);
    let folder = program.stop();
    let state = folder.path().join("state");
    let aside = fs::read_dir(&state).expect("the state").map(|entry| entry.expect("an entry").path());
    let aside: Vec<PathBuf> = aside.filter(|path| path.to_string_lossy().contains("fresh-")).collect();
    assert_eq!(aside.len(), 1, "{aside:?}");
    let kept = files(&aside[0]);
    for path in &all {
        assert!(kept.contains(&aside[0].join(path.file_name().expect("a name"))), "{kept:?}");
    }
    assert!(kept.iter().any(|path| path.starts_with(aside[0].join("inbox/readings.http"))), "{kept:?}");
    assert!(kept.iter().any(|path| path.starts_with(aside[0].join("outbox/away"))), "{kept:?}");
    assert_eq!(fs::read(state.join("mqtt-devices.id")).expect("it stays"), b"7");
    assert_eq!(values(folder.path()), [before, vec![9]].concat());
    assert!(run(folder.path(), &["doctor"], 0).0.contains("all is well"));
}

#[test]
fn damage_in_the_history_is_told_with_its_file() {
    let folder = killed_with_checkpoints();
    let file = files(&folder.path().join("history/every")).remove(0);
    let whole = fs::read(&file).expect("a file");
    let shown = format!("`./{}`", file.strip_prefix(folder.path()).expect("inside").display());
    let zstd = whole.windows(4).position(|four| four == [0x28, 0xb5, 0x2f, 0xfd]).expect("a compressed page");
    // In the last bytes, in the length of the footer, in a page.
    for place in [whole.len() - 1, whole.len() - 7, zstd] {
        flip(&file, place);
        let (found, _) = run(folder.path(), &["doctor"], 2);
        assert!(found.contains(&format!("damaged: {shown}: ")), "byte {place}: {found}");
        assert!(found.contains("move the file away, or put back a copy"), "{found}");
        fs::write(&file, &whole).expect("as it was");
    }
    cut(&file, whole.len() / 2);
    assert!(run(folder.path(), &["doctor"], 2).0.contains(&format!("damaged: {shown}: ")));
    fs::write(&file, &whole).expect("as it was");
    run(folder.path(), &["doctor"], 0);

    for name in ["notes.txt", ".stage/history-every-99.part", "every/dt=today", "every/part.parquet"] {
        folder.write(&format!("history/{name}"), "x");
    }
    let (found, _) = run(folder.path(), &["doctor"], 0);
    for (name, what) in [
        ("notes.txt", "no file of the history has such a name"),
        (".stage/history-every-99.part", "a staged file that no checkpoint names"),
        ("every/dt=today", "no file of the history has such a name"),
        ("every/part.parquet", "no file of the history has such a name"),
    ] {
        assert!(found.contains(&format!("note: `./history/{name}`: {what}")), "{name}: {found}");
    }
}

#[test]
fn a_staged_file_that_a_checkpoint_names_is_missed_and_fresh_keeps_it() {
    let scratch = Scratch::new();
    // A file where a folder should be: what is staged cannot be published.
    fs::create_dir(scratch.path().join("history")).expect("a folder");
    scratch.write("history/every", "");
    let program = Program::start_in(scratch, free_port(), &graph(OFTEN));
    program.post("/readings", &[reading(1), reading(2)]);
    wait_for("a file that cannot be published", || {
        program.reasons().values().any(|reason| reason.contains("publishing")).then_some(())
    });
    let folder = kill(program);
    let staged = files(&folder.path().join("history/.stage"));
    assert_eq!(staged.len(), 1, "{staged:?}");
    let (found, _) = run(folder.path(), &["doctor"], 0);
    assert!(found.contains("1 history file with 2 rows read") && !found.contains("no checkpoint names"), "{found}");
    let bytes = fs::read(&staged[0]).expect("a file");
    fs::remove_file(&staged[0]).expect("removed");
    let (found, _) = run(folder.path(), &["doctor"], 2);
    assert!(
        found.contains("the checkpoint names this staged file, but neither it nor `./history/every/dt="),
        "{found}"
    );
    fs::write(&staged[0], &bytes).expect("put back");

    fs::remove_file(folder.path().join("history/every")).expect("removed");
    let program = start_again(folder, &graph(OFTEN), &["--fresh"]);
    program.post("/readings", &[reading(3)]);
    let folder = program.stop();
    assert_eq!(values(folder.path()), [3]);
    let kept = files(&folder.path().join("history/.stage"));
    assert_eq!(kept.len(), 1, "{kept:?}");
    assert!(kept[0].to_string_lossy().contains("/.stage/fresh-2"), "{kept:?}");
    assert_eq!(fs::read(&kept[0]).expect("a file"), bytes);
    run(folder.path(), &["doctor"], 0);
}
