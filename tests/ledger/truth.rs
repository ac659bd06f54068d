//! What must be in history, and what is.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::feed::{Ledger, Row, WINDOW_S};
use crate::support::program;

/// Most numbers that a message lists.
const LISTED_MAX: usize = 20;

/// The rows of a query over the published files, each as its cells.
pub(super) fn query(folder: &Path, sql: &str) -> Vec<Vec<String>> {
    let output = program::run(folder, &["query", sql, "--format", "csv"]);
    assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    text.lines().skip(1).map(|line| line.split(',').map(str::to_owned).collect()).collect()
}

fn number(cell: &str) -> u64 {
    cell.parse().unwrap_or_else(|_| panic!("`{cell}` is no whole number"))
}

/// How often each number of a source is in a history table.
pub(super) fn counts(folder: &Path, table: &str, feed: &str) -> BTreeMap<u64, u64> {
    let rows = query(folder, &format!("SELECT n, count(*) FROM versions.{table} WHERE s = '{feed}' GROUP BY n"));
    rows.iter().map(|row| (number(&row[0]), number(&row[1]))).collect()
}

/// What is wrong with how often the numbers of a source are somewhere.
pub(super) fn wrong_counts(place: &str, ledger: &Ledger, counts: &BTreeMap<u64, u64>) -> Vec<String> {
    let lost = ledger.acknowledged.iter().filter(|n| !counts.contains_key(n)).copied().collect();
    let twice = counts.iter().filter(|(_, count)| **count > 1).map(|(n, _)| *n).collect();
    let known = |n: &u64| ledger.acknowledged.contains(n) || ledger.doubtful.contains(n);
    let unknown = counts.keys().filter(|n| !known(n)).copied().collect();
    [("lost", lost), ("twice", twice), ("never published", unknown)]
        .into_iter()
        .filter(|(_, numbers): &(_, Vec<u64>)| !numbers.is_empty())
        .map(|(what, numbers)| {
            let listed = &numbers[..numbers.len().min(LISTED_MAX)];
            let of = ledger.acknowledged.len();
            format!("{place}: {} of {of} {what}, such as {listed:?}", numbers.len())
        })
        .collect()
}

/// A window: its start in seconds, its key, count and sum of the numbers, and its stage.
type Window = (u64, String, u64, u64, String);

/// The windows over these rows.
fn windows_of(feed: &'static str, numbers: &BTreeSet<u64>) -> Vec<Window> {
    let mut windows: BTreeMap<(u64, &str), (u64, u64)> = BTreeMap::new();
    for row in numbers.iter().map(|n| Row { feed, n: *n }) {
        let (count, sum) = windows.entry((row.window_s(), row.key())).or_default();
        *count += 1;
        *sum += row.n;
    }
    let window =
        |((start, key), (count, sum)): ((u64, &str), _)| (start, key.to_owned(), count, sum, "final".to_owned());
    windows.into_iter().map(window).collect()
}

/// What is wrong with the windows of a source in a history table, given the rows that are in history.
pub(super) fn wrong_windows(folder: &Path, table: &str, feed: &'static str, numbers: &BTreeSet<u64>) -> Vec<String> {
    let sql = format!(
        "SELECT CAST(date_part('epoch', window_start) AS BIGINT), k, n, total, stage, \
         CAST(date_part('epoch', window_end) AS BIGINT), rows FROM versions.{table} WHERE s = '{feed}'"
    );
    let mut found: Vec<Window> = Vec::new();
    for row in query(folder, &sql) {
        assert_eq!(number(&row[5]), number(&row[0]) + WINDOW_S, "{row:?}");
        assert_eq!(row[6], row[2], "{row:?}");
        found.push((number(&row[0]), row[1].clone(), number(&row[2]), number(&row[3]), row[4].clone()));
    }
    found.sort();
    let expected = windows_of(feed, numbers);
    let missing = expected.iter().filter(|window| !found.contains(window)).map(|window| ("without", window));
    let twice = found.windows(2).filter(|pair| pair[0] == pair[1]).map(|pair| ("twice", &pair[0]));
    let wrong = found.iter().filter(|window| !expected.contains(window)).map(|window| ("with a wrong", window));
    let wrong = missing.chain(twice).chain(wrong).take(LISTED_MAX);
    wrong.map(|(how, window)| format!("{table} of {feed}: {how} {window:?}")).collect()
}

/// Every file below a folder.
pub(super) fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let path = entry.expect("an entry").path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found
}

/// Files that should not be there after a clean end: staged ones, drafts, and history of errors.
pub(super) fn wrong_files(folder: &Path) -> Vec<String> {
    let wrong = |path: &PathBuf| {
        let name = path.to_string_lossy();
        name.contains("/.stage/") || name.contains("_errors/") || name.ends_with(".draft")
    };
    files(folder).into_iter().filter(wrong).map(|path| format!("left over: {}", path.display())).collect()
}
