//! `guarantee: exactly_once`: what cannot promise it is refused, with the way out.

use crate::support::{Scratch, program};

/// What `check` prints of a graph of one source and one sink, and whether it passes.
fn checked(guarantee: &str, source: &str, sink: &str, errors: &str) -> (String, bool) {
    let folder = Scratch::new();
    let yaml = format!(
        "{guarantee}sources:\n  in: {{{source}{errors}}}\npipelines:\n  through: {{from: in, to: out}}\nsinks:\n  out: \
         {{{sink}}}\n  rejected: {{type: console}}\n"
    );
    folder.write("x.yaml", &yaml);
    let output = program::run(folder.path(), &["check", "x.yaml"]);
    (String::from_utf8(output.stdout).expect("UTF-8"), output.status.code() == Some(0))
}

const ASKED: &str = "guarantee: exactly_once\n";
const GENERATE: &str = "type: generate, columns: {n: seq}, rate: 1";
const PARQUET: &str = "type: parquet, path: h";

#[test]
fn sources_that_lose_rows_are_refused_and_the_others_pass() {
    let acknowledged =
        "source `in` cannot promise exactly once: best effort: rows sent while the process is away are lost";
    let sampled = "source `in` cannot promise exactly once: a sample of the state at each poll";
    let late = "rows of a transaction that commits late can be passed over";
    for (source, expected, instead) in [
        (GENERATE, "", ""),
        ("type: http, path: /a, fields: {a: int}", "", ""),
        ("type: file, path: a.csv, fields: {a: int}", "", ""),
        ("type: mqtt, url: 'mqtt://h', topics: [t]", "", ""),
        ("type: mqtt, url: 'mqtt://h', topics: [t], qos: 0", acknowledged, "`qos: 1` without `session: clean`"),
        ("type: mqtt, url: 'mqtt://h', topics: [t], session: clean", acknowledged, "`qos: 1`"),
        ("type: redis, url: 'redis://h', stream: s", "", ""),
        ("type: redis, url: 'redis://h', stream: s, group: g", "", ""),
        ("type: redis, url: 'redis://h', list: l", "", ""),
        ("type: redis, url: 'redis://h', channels: [c]", acknowledged, "`stream` or `list`"),
        ("type: redis, url: 'redis://h', read: {a: GET a}", sampled, "`stream` or `list`"),
        ("type: sql, url: 'postgres://h/d', table: t, fields: {a: int}", sampled, "`cursor`"),
        ("type: sql, url: 'postgres://h/d', table: t, fields: {a: int}, cursor: a", late, "`commit_order: xid8`"),
        ("type: sql, url: 'postgres://h/d', table: t, fields: {a: int}, cursor: a, lag: 5s", "", ""),
        ("type: sql, url: 'postgres://h/d', table: t, fields: {a: int}, cursor: a, commit_order: assured", "", ""),
        (
            "type: sql, url: 'postgres://h/d', table: t, fields: {x: int, a: int}, cursor: [x, a], commit_order: xid8",
            "",
            "",
        ),
        ("type: sql, url: 'mysql://h/d', table: t, fields: {a: int}, cursor: a", late, "give `lag`"),
        ("type: sql, url: 'sqlite:d', table: t, fields: {a: int}, cursor: a", "rowid", "`commit_order: autoincrement`"),
        ("type: sql, url: 'sqlite:d', table: t, fields: {a: int}, cursor: a, commit_order: autoincrement", "", ""),
        ("type: host", sampled, "without the guarantee"),
        ("type: self", sampled, "/metrics"),
    ] {
        let (told, passes) = checked(ASKED, source, PARQUET, ", errors: rejected");
        assert_eq!(passes, expected.is_empty(), "{source}: {told}");
        let error = told.lines().find(|line| line.contains(": error: source in: ")).unwrap_or_default();
        assert!(error.contains(expected), "{source}: {told}");
        assert!(told.contains(instead), "{source}: {told}");
        // Without the guarantee all of them run.
        let (told, passes) = checked("", source, PARQUET, ", errors: rejected");
        assert!(passes, "{source}: {told}");
    }
}

#[test]
fn sinks_that_repeat_rows_are_refused_and_the_others_pass() {
    let refused = "sink `out` cannot promise exactly once: at least once";
    for (sink, expected, instead) in [
        (PARQUET, "", ""),
        ("type: sse, path: /e", "", ""),
        ("type: websocket, path: /w", "", ""),
        ("type: sql, url: 'sqlite:d', table: t", "", ""),
        ("type: sql, url: 'sqlite:d', table: t, exactly_once: false", refused, "`exactly_once: true`"),
        ("type: redis, url: 'redis://h', write: {increment: n}, exactly_once: true", "", ""),
        ("type: redis, url: 'redis://h', write: {increment: n}", refused, "`exactly_once: true`"),
        ("type: mqtt, url: 'mqtt://h', topic: t", refused, "`parquet`"),
        ("type: console", refused, "the console may still take `errors`"),
    ] {
        // Rows in error may go to the console.
        let (told, passes) = checked(ASKED, GENERATE, sink, ", errors: rejected");
        assert_eq!(passes, expected.is_empty(), "{sink}: {told}");
        let error = told.lines().find(|line| line.contains(": error: sink out: ")).unwrap_or_default();
        assert!(error.contains(expected) && told.contains(instead), "{sink}: {told}");
        let (told, passes) = checked("", GENERATE, sink, "");
        assert!(passes, "{sink}: {told}");
    }
}

#[test]
fn a_wrong_guarantee_is_named() {
    for (guarantee, expected) in [
        ("guarantee: twice\n", "x.yaml:1:12: error: guarantee: "),
        ("guarantee: {a: 1}\n", "x.yaml:1:12: error: guarantee: "),
        ("guarantees: exactly_once\n", "unknown key `guarantees`"),
    ] {
        let (told, passes) = checked(guarantee, GENERATE, PARQUET, "");
        assert!(!passes && told.contains(expected), "{told}");
    }
}

#[test]
fn a_source_that_loses_rows_before_a_durable_sink_is_noted() {
    let channels = "type: redis, url: 'redis://h', channels: [c]";
    let cursor = "type: sql, url: 'mysql://h/d', table: t, fields: {a: int}, cursor: a";
    for (source, sink, note) in [
        (
            channels,
            PARQUET,
            "note: source in: best effort: rows sent while the process is away are lost; the sink `out`",
        ),
        (channels, "type: sse, path: /e", ""),
        (cursor, PARQUET, "note: source in: rows of a transaction that commits late can be passed over"),
        ("type: redis, url: 'redis://h', stream: s", PARQUET, ""),
    ] {
        let (told, passes) = checked("", source, sink, "");
        assert!(passes, "{told}");
        let found = told.lines().find(|line| line.contains("note: source in: ")).unwrap_or_default();
        assert!(if note.is_empty() { found.is_empty() } else { found.contains(note) }, "{source}: {told}");
    }
}

#[test]
fn docs_say_what_every_plugin_promises() {
    for (kind, name, expected) in [
        ("source", "redis", "- `channels`: best effort: rows sent while the process is away are lost.\n"),
        ("source", "file", "\n- read again from the position in the checkpoint.\n"),
        ("sink", "parquet", "\n- exactly once: none is lost, none is written twice.\n"),
    ] {
        let output = program::run(std::path::Path::new("."), &["docs", kind, name]);
        let page = String::from_utf8(output.stdout).expect("UTF-8");
        assert!(page.contains("\n## Promise\n\n") && page.contains(expected), "{page}");
    }
}
