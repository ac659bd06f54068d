//! Branches that part and meet again: nothing waits for itself, and no row is lost or doubled on the way.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::support::{Scratch, free_port, program};

/// Many times what the queues of all edges hold.
const ROWS: u64 = 1_000_000;
const SUM: u64 = ROWS * (ROWS - 1) / 2;
/// One row in so many goes through the thin branch.
const THIN: u64 = 1_000;

/// One branch carries every row, one hardly any, one only what a window has closed; they are united, joined, and united
/// again with what they came from.
const GRAPH: &str = r#"
server: {listen: 127.0.0.1:PORT}
checkpoint: {every: 10ms}
sources:
  made: {type: generate, count: COUNT, columns: {n: seq, k: "seq % 7"}}
pipelines:
  thick: {from: made}
  thin: {from: made, steps: [{filter: "n % THIN = 0"}], key: k}
  windowed:
    from: made
    steps: [{window: {tumbling: 100ms, group_by: [k], aggregate: {n: count()}}}]
  united: {from: [thick, thin], to: [history]}
  joined: {from: thick, steps: [{join: {with: thin, on: [k], prefix: thin_}}], to: [history]}
  again: {from: [made, united, thin], to: [history]}
  counted: {from: [thin, windowed], to: [history]}
sinks:
  history: {type: parquet, path: history, roll: 50ms}
"#;

/// The rows of a query over the published history.
fn query(folder: &Scratch, sql: &str) -> Value {
    let output = program::run(folder.path(), &["query", sql, "--format", "json"]);
    assert_eq!(output.status.code(), Some(0), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON rows")
}

/// The checkpoints whose files a table consists of.
fn checkpoints(folder: &Scratch, table: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let mut folders = vec![folder.path().join("history").join(table)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().and_then(|name| name.to_str()).expect("a name").to_owned();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.extend(name.split('-').nth(1).map(str::to_owned));
            }
        }
    }
    found
}

#[test]
fn every_row_arrives_through_branches_that_meet_again_while_checkpoints_go_on() {
    let folder = Scratch::new();
    let graph = GRAPH.replace("PORT", &free_port().to_string());
    folder.write("pipelines.yaml", &graph.replace("COUNT", &ROWS.to_string()).replace("THIN", &THIN.to_string()));
    let output = program::run(folder.path(), &["run"]);
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    let thin = ROWS / THIN;
    let thin_sum = (0..thin).map(|index| index * THIN).sum::<u64>();
    for (table, rows, sum) in [
        ("united", ROWS + thin, SUM + thin_sum),
        ("joined", ROWS, SUM),
        ("again", 2 * ROWS + 2 * thin, 2 * (SUM + thin_sum)),
    ] {
        let sql = format!("SELECT count(*) AS rows, sum(n) AS sum, count(DISTINCT n) AS different FROM {table}");
        assert_eq!(query(&folder, &sql), json!([{"rows": rows, "sum": sum, "different": ROWS}]), "{table}");
    }
    let windows = "SELECT sum(n) AS rows FROM counted WHERE window_start IS NOT NULL";
    assert_eq!(query(&folder, windows), json!([{"rows": ROWS}]));
    let several = checkpoints(&folder, "again");
    assert!(several.len() > 1, "a checkpoint was taken meanwhile: {several:?}");
}
