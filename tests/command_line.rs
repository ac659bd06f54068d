//! Every command as it is typed: exit codes, what is printed where, and what is never printed.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use pipeline::config::tree::{self, Node, Value as YamlValue};
use serde_json::{Value, json};

use super::support::program::{self, BINARY, Program, request};
use super::support::{Scratch, free_port, json_schema, wait_for};

/// A bounded graph over `rows.csv`.
const GOOD: &str = "
server: {listen: 127.0.0.1:PORT}
sources:
  rows: {type: file, path: rows.csv, fields: {device: string, value: int, at: timestamp}, event_time: {field: at}}
pipelines:
  load:
    from: rows
    steps:
      - filter: value > 0
      - window: {tumbling: 1s, group_by: [device], aggregate: {total: sum(value)}}
    to: [history, out]
sinks:
  history: {type: parquet, path: history}
  out: {type: console, envelope: none}
";

const ROWS: &str = "\
device,value,at
a,1,2026-01-01T00:00:00Z
b,2,2026-01-01T00:00:00.5Z
a,3,2026-01-01T00:00:01Z
a,-3,2026-01-01T00:00:01Z
b,4,2026-01-01T00:00:03Z
";

fn good() -> Scratch {
    let folder = Scratch::new();
    folder.write("pipelines.yaml", &GOOD.replace("PORT", &free_port().to_string()));
    folder.write("rows.csv", ROWS);
    folder
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("UTF-8")
}

/// Runs the binary to its end with variables of its own.
fn run_with(folder: &Path, variables: &[(&str, &str)], arguments: &[&str]) -> Output {
    let mut command = Command::new(BINARY);
    command.args(arguments).current_dir(folder).stdin(Stdio::null());
    command.envs(variables.iter().copied()).output().expect("the binary runs")
}

/// Names in a folder.
fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8")).collect();
    names.sort();
    names
}

#[test]
fn the_exit_code_says_whose_fault_it_is() {
    let folder = good();
    folder.write("wrong.yaml", "sources: {a: {type: nothing}}");
    folder.write("latin1.yaml", "");
    std::fs::write(folder.path().join("latin1.yaml"), b"sources: {\xe9: 1}").expect("a file");
    folder.write("lost.yaml", &GOOD.replace("rows.csv", "lost.csv").replace("PORT", &free_port().to_string()));
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("its address").port();
    folder.write("taken.yaml", &GOOD.replace("PORT", &port.to_string()));
    folder.write(
        "no_folder.yaml",
        &GOOD.replace("PORT", &free_port().to_string()).replace("path: history", "path: rows.csv/x"),
    );
    let empty = Scratch::new();
    let taken_says = format!(
        "error: cannot listen on 127.0.0.1:{port} (`server: {{listen: …}}` chooses another port): Address already in use"
    );
    let cases: &[(&Scratch, &[&str], i32, &str)] = &[
        (&folder, &[], 0, ""),
        (&folder, &["run"], 0, ""),
        (&folder, &["pipelines.yaml"], 0, ""),
        (&folder, &["run", "--drain"], 0, ""),
        (&folder, &["run", "--fresh"], 0, "this run reads its sources from their start"),
        (&folder, &["check"], 0, ""),
        (&folder, &["state"], 0, ""),
        (&folder, &["doctor"], 0, ""),
        (&folder, &["doctor", "--salvage"], 0, ""),
        (&folder, &["graph", "--format", "dot"], 0, ""),
        (&folder, &["query", "SELECT 1"], 0, ""),
        (&folder, &["fields", "rows"], 0, ""),
        (&folder, &["schema"], 0, ""),
        (&folder, &["docs"], 0, ""),
        (&folder, &["--help"], 0, ""),
        (&folder, &["--version"], 0, ""),
        (&empty, &[], 1, "cannot read `pipelines.yaml`: No such file"),
        (&empty, &["run", "--drain", "x.yaml"], 1, "cannot read `x.yaml`"),
        (&empty, &["check"], 1, "name the file"),
        (&empty, &["graph"], 1, "cannot read"),
        (&empty, &["state"], 1, "cannot read"),
        (&empty, &["doctor"], 1, "cannot read"),
        (&empty, &["query", "SELECT 1"], 1, "cannot read"),
        (&empty, &["fields", "rows"], 1, "cannot read"),
        (&empty, &["chek"], 1, "did you mean the command `check`?"),
        (&folder, &["check", "."], 1, "cannot read `.`: Is a directory"),
        (&folder, &["check", "latin1.yaml"], 1, "cannot read `latin1.yaml`: stream did not contain valid UTF-8"),
        (&folder, &["check", "wrong.yaml"], 1, "`wrong.yaml` has one error"),
        (&folder, &["run", "wrong.yaml"], 1, "wrong.yaml:1:21: error: source a: no source type `nothing`"),
        (&folder, &["graph", "wrong.yaml"], 1, "no source type"),
        (&folder, &["query", "SELECT 1", "--config", "wrong.yaml"], 1, "no source type"),
        (&folder, &["fields", "a", "--config", "wrong.yaml"], 1, "no source type `nothing`"),
        (&folder, &["fields", "row"], 1, "no source `row`; did you mean `rows`?"),
        (&folder, &["docs", "parket"], 1, "no plugin `parket`; did you mean `parquet`?"),
        (&folder, &["query", "SELEC 1"], 1, "found: SELEC"),
        (&folder, &["query", "SELECT * FROM lod"], 1, "no table `lod` in the history"),
        (&folder, &["query", "SELECT totl FROM load"], 1, "no column `totl` here; did you mean `total`?"),
        (&folder, &["query", "DELETE FROM load"], 1, "read-only"),
        (&folder, &["query"], 1, "required"),
        (&folder, &["query", "SELECT 1", "--format", "xml"], 1, "invalid value 'xml'"),
        (&folder, &["run", "--fresh", "--drain"], 1, "cannot be used with"),
        (&folder, &["state", "--format", "csv"], 1, "invalid value 'csv'"),
        (&folder, &["check", "--frob"], 1, "unexpected argument '--frob'"),
        (&folder, &["run", "taken.yaml"], 2, &taken_says),
        (&folder, &["run", "lost.yaml"], 2, "there is no file `lost.csv`"),
        (&folder, &["fields", "rows", "--config", "lost.yaml"], 2, "there is no file `lost.csv`"),
        (&folder, &["run", "no_folder.yaml"], 2, "sink history: cannot make the folder"),
    ];
    for (folder, arguments, code, says) in cases {
        let output = program::run(folder.path(), arguments);
        let errors = text(&output.stderr);
        assert_eq!(output.status.code(), Some(*code), "{arguments:?}: {errors}");
        assert!(errors.contains(says), "{arguments:?} does not say {says:?}: {errors}");
    }
}

#[test]
fn results_are_on_stdout_and_logs_on_stderr() {
    let folder = good();
    let output = program::run(folder.path(), &["run", "--log-format", "json"]);
    let printed = text(&output.stdout);
    let rows: Vec<Value> = printed.lines().map(|line| serde_json::from_str(line).expect("a row")).collect();
    let totals: Vec<String> =
        rows.iter().map(|row| format!("{}{}", row["device"].as_str().expect("a device"), row["total"])).collect();
    assert_eq!(totals, ["a1", "b2", "a3", "b4"]);
    let log: Vec<Value> = text(&output.stderr).lines().map(|l| serde_json::from_str(l).expect("a JSON line")).collect();
    assert!(log.iter().any(|line| line["fields"]["message"].as_str().is_some_and(|m| m.starts_with("listening on"))));

    let sql = "SELECT device, sum(total) AS total, max(window_end) AS until FROM load GROUP BY device ORDER BY device";
    for (format, expected) in [
        (
            "table",
            " device | total | until\n--------+-------+--------------------------\n \
             a      |     4 | 2026-01-01T00:00:02.000Z\n b      |     6 | 2026-01-01T00:00:04.000Z\n(2 rows)\n",
        ),
        ("csv", "device,total,until\na,4,2026-01-01T00:00:02.000Z\nb,6,2026-01-01T00:00:04.000Z\n"),
        (
            "json",
            "[\n{\"device\":\"a\",\"total\":4,\"until\":\"2026-01-01T00:00:02.000Z\"},\n\
             {\"device\":\"b\",\"total\":6,\"until\":\"2026-01-01T00:00:04.000Z\"}\n]\n",
        ),
    ] {
        let output = program::run(folder.path(), &["query", sql, "--format", format]);
        assert_eq!((text(&output.stdout).as_str(), text(&output.stderr).as_str()), (expected, ""), "{format}");
    }
}

#[test]
fn a_query_before_the_first_row_gives_no_rows() {
    let folder = good();
    for (format, expected) in [("csv", "total\n"), ("json", "[]\n"), ("table", " total\n-------\n(0 rows)\n")] {
        let output = program::run(folder.path(), &["query", "SELECT total FROM load", "--format", format]);
        assert_eq!((text(&output.stdout).as_str(), text(&output.stderr).as_str()), (expected, ""), "{format}");
    }
    assert_eq!(names(folder.path()), ["pipelines.yaml", "rows.csv"]);
}

/// One file with a mistake of every kind. `PORT` is a port on which nobody may be called.
const WRONG: &str = "\
server: {lisen: 127.0.0.1:PORT}
checkpoint: {every: 1 fortnight}
sorces: {}
sources:
  devices:
    type: mqtt
    url: mqtt://user:${PASSWORD}@127.0.0.1:PORT
    topics: [\"devices/{device_id}/telemetry\"]
    fields: {latency_ms: flot, ts: timestamp}
    qos: seven
    event_time: {field: ts, lateness: 2 parsecs}
    errors: rejcted
  files:
    type: fil
  bad name:
    type: http
    path: /bad
    fields: {n: int}
  table:
    type: sql
    url: ${DATABASE_URL}
    on_demand: perhaps
    intervall: 3s
  made:
    type: generate
    columns: {n: seq, m: \"nn + 1\"}
  made:
    type: generate
  post: {type: http, path: /events, fields: {n: int, s: string, at: timestamp}, event_time: {field: n}}
  nowhere: {type: http}
pipelines:
  one:
    from: device
    to: [live, histroy]
  two:
    from: post
    steps:
      - filter: n > 0 AND nn > 1
      - window: {tumbling: 0s, group_by: [k], aggregate: {x: avrg(n), y: \"sum(n\"}}
      - filtr: n > 1
    to: live
  three: {from: four, to: live}
  four: {from: three, to: live}
  five:
    from: post
    steps:
      - filter: n + 1
      - {filter: n > 1, select: {keep: [n]}}
    too: live
  six:
    from: [post, five, table]
    steps: {filter: n > 1}
    to: []
  seven: {from: post, to: [live], key: [m]}
  eight: {from: post, steps: [{filter: \"now() > at\"}], to: [live]}
  nine: {from: post, steps: [{join: {with: nobody, on: [n]}}], to: live}
sinks:
  live: {type: websocket, path: /ws}
  events: {type: sse, path: /ws}
  more: {type: sse, path: /health}
  history: {type: parquet, path: history, roll: ten}
  history2: {type: parquet, path: past}
  history3: {type: parquet, path: past}
  console: {type: consle}
  db: {type: sql, url: \"mysql://root:${PASSWORD}@127.0.0.1:PORT/db\"}
";

/// Place, beginning of the message, and the hint of every error in [`WRONG`], in file order.
const MISTAKES: &[(&str, &str, &str)] = &[
    ("1:10", "server: unknown key `lisen`", "did you mean `listen`?"),
    ("2:21", "checkpoint: `1 fortnight` is no duration; write a number and a unit: `500ms`, `3s`", ""),
    ("3:1", "unknown key `sorces`", "did you mean `sources`?"),
    ("9:26", "source devices: unknown type `flot`; did you mean `float`?", ""),
    ("10:10", "source devices: expected a whole number from 0, found `seven`", ""),
    ("11:39", "source devices: `2 parsecs` is no duration", ""),
    ("12:13", "source devices: no sink `rejcted`", "one of `live`, `events`, `more`, `history`, `history2`"),
    ("14:11", "source files: no source type `fil`", "did you mean `file`?"),
    ("15:3", "source bad name: `bad name` is no name", "letters, digits and underscores"),
    ("21:10", "environment variable `DATABASE_URL` is not set; give a default with `${DATABASE_URL:-…}`", ""),
    ("22:16", "source table: expected a boolean, found `perhaps`", ""),
    ("23:5", "source table: unknown key `intervall`", "one of `url`, `every`"),
    ("24:3", "source made: `generate` needs `rate`, `count` or both", "`rate: 20`"),
    ("26:27", "source made: no column `nn` here", "one of `seq`, `time`, `random`"),
    ("27:3", "`made` is already given on line 24", ""),
    ("29:101", "source post: `n` is int, not a timestamp", "give it the type `timestamp`"),
    ("30:3", "source nowhere: `path` is missing", ""),
    ("33:11", "pipeline one: no source or pipeline `device`", "did you mean `devices`?"),
    ("34:16", "pipeline one: no sink `histroy`", "did you mean `history`?"),
    ("38:27", "pipeline two step 1 (filter): no column `nn` here", "did you mean `n`?"),
    ("39:28", "pipeline two step 2 (window): tumbling: the length must be more than 0s", ""),
    ("39:43", "pipeline two step 2 (window): no column `k` here", ""),
    ("39:62", "pipeline two step 2 (window): no function `avrg`", "did you mean `avg`?"),
    ("39:75", "pipeline two step 2 (window): Expected: ), found: EOF", ""),
    ("40:9", "pipeline two step 3 (filtr): no operator `filtr`", "did you mean `filter`?"),
    ("42:3", "pipeline three: a cycle: three -> four -> three", ""),
    ("47:17", "pipeline five step 1 (filter): expected a condition (bool), this is int", "compare it"),
    ("48:9", "pipeline five: a step is one operator with its options", "start each step with its own `- `"),
    ("49:5", "pipeline five: unknown key `too`", "did you mean `to`?"),
    ("52:12", "pipeline six: `steps` must be a list, found a mapping", ""),
    ("54:41", "pipeline seven: no column `m` here", "did you mean `n`?"),
    ("55:41", "pipeline eight step 1 (filter): `now` differs from run to run", "use `ingest_time`"),
    ("56:44", "pipeline nine step 1 (join): no source or pipeline `nobody`", "one of `bad name`, `devices`, `eight`"),
    ("59:3", "sink events: the path `/ws` is taken by sink live already", ""),
    ("60:3", "sink more: the path `/health` belongs to the program itself", ""),
    ("61:49", "sink history: `ten` is no duration", ""),
    ("63:3", "sink history3: the folder `./past` is taken by sink history2 already", ""),
    ("64:19", "sink console: no sink type `consle`", "did you mean `console`?"),
    ("65:3", "sink db: `table` is missing", ""),
];

#[test]
fn check_reports_every_mistake_at_once_and_opens_nothing() {
    let folder = Scratch::new();
    let nobody = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = nobody.local_addr().expect("its address").port();
    folder.write("wrong.yaml", &WRONG.replace("PORT", &port.to_string()));
    let output = run_with(folder.path(), &[("PASSWORD", "hunter2")], &["check", "wrong.yaml"]);
    let printed = text(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{printed}");
    assert_eq!(text(&output.stderr), format!("error: `wrong.yaml` has {} errors\n", MISTAKES.len()), "{printed}");
    let mut lines = printed.lines().filter(|line| !line.contains(": note: ")).peekable();
    for (place, message, hint) in MISTAKES {
        let line = lines.next().unwrap_or_default();
        let expected = format!("wrong.yaml:{place}: error: {message}");
        assert!(line.starts_with(&expected), "expected {expected}\n   found {line}\n\n{printed}");
        let hinted = lines.next_if(|line| line.starts_with("  hint: ")).unwrap_or_default();
        assert!(hinted.contains(hint), "{expected}\nexpected the hint {hint}\n   found {hinted}");
    }
    assert_eq!(lines.next(), None);
    assert_eq!(names(folder.path()), ["wrong.yaml"]);
    nobody.set_nonblocking(true).expect("non-blocking");
    assert!(nobody.accept().is_err(), "somebody was called");
    let errors: String =
        printed.lines().filter(|line| !line.contains(": note: ")).map(|line| format!("{line}\n")).collect();
    for command in ["run", "graph"] {
        let output = run_with(folder.path(), &[("PASSWORD", "hunter2")], &[command, "wrong.yaml"]);
        assert_eq!(output.status.code(), Some(1));
        assert_eq!(text(&output.stderr), format!("{errors}error: `wrong.yaml` has {} errors\n", MISTAKES.len()));
    }
    assert_eq!(names(folder.path()), ["wrong.yaml"]);
}

#[test]
fn text_that_is_no_yaml_is_told_with_its_place() {
    let folder = Scratch::new();
    for (yaml, expected) in [
        ("sources: [\n", "x.yaml:2:1: error: "),
        ("sources:\n  a: {type: http\n  b: 3\n", "x.yaml:3:4: error: "),
        ("sources:\n\ta: 1\n", "x.yaml:2:2: error: tabs"),
        ("sources: {a: \"b}\n", "x.yaml:1:14: error: "),
        ("sources:\n  a: *b\n", "x.yaml:2:6: error: "),
        (
            "sources: {a: {type: http, path: /x, fields: {x: decimal(10, 2)}}}\n",
            "x.yaml:1:49: error: source a: unknown type `decimal(10`",
        ),
        (
            "pipelines: {p: {steps: [{window: {aggregate: {p: percentile(x, 0.5)}}}]}}\n",
            "x.yaml:1:64: error: `0.5)` is no key: in `{…}` a comma ends a text\n  hint: put a text with a comma in quotes",
        ),
        ("- a\n", "x.yaml:1:1: error: the file must be a mapping"),
        ("a: 1\n---\nb: 1\n", "x.yaml:3:1: error: a second YAML document"),
        ("", "x.yaml: error: the file names no source"),
        ("sources: {a: {? [b] : c}}\n", "x.yaml:1:17: error: a key must be a plain name"),
    ] {
        folder.write("x.yaml", yaml);
        let output = program::run(folder.path(), &["check", "x.yaml"]);
        let printed = text(&output.stdout);
        assert!(printed.contains(expected) && output.status.code() == Some(1), "{yaml:?}: {printed}");
    }
    // What Windows editors put before and between lines is no mistake.
    let windows = format!("\u{feff}{}", GOOD.replace("PORT", "8080").replace('\n', "\r\n"));
    folder.write("x.yaml", &windows);
    let output = program::run(folder.path(), &["check", "x.yaml"]);
    assert_eq!(text(&output.stdout), "x.yaml: ok, 1 source, 1 pipeline, 2 sinks\n");
}

/// Servers that refuse at once, each with a password; and values that are wrong.
const SECRETS: &str = "
server: {listen: 127.0.0.1:PORT}
sources:
  table: {type: sql, url: \"postgres://me:${PASSWORD}@127.0.0.1:1/db\", every: 1s, query: SELECT 1 AS n, fields: {n: int}}
  other: {type: sql, url: \"mysql://me:${PASSWORD}@127.0.0.1:1/db\", every: 1s, query: SELECT 1 AS n, fields: {n: int}}
  devices: {type: mqtt, url: \"mqtt://me:${PASSWORD}@127.0.0.1:1\", topics: [a]}
pipelines:
  a: {from: table, to: [live, out, more]}
  b: {from: devices, to: [live, topic, tls]}
  c: {from: other, steps: [{filter: \"n > 0 OR '${PASSWORD}' = 'x'\"}], to: live}
sinks:
  live: {type: websocket, path: /ws}
  out: {type: sql, url: \"mysql://me:${PASSWORD}@127.0.0.1:1/db\", table: t}
  more: {type: sql, url: \"postgres://127.0.0.1:1/db?user=me&password=${PASSWORD}\", table: t}
  topic: {type: mqtt, url: \"mqtt://me:${PASSWORD}@127.0.0.1:1\", topic: a}
  tls: {type: mqtt, url: \"mqtts://me:${PASSWORD}@127.0.0.1:1\", topic: a}
";

#[test]
fn a_secret_is_never_printed() {
    const SECRET: &str = "correct-horse";
    // Libraries print more at these levels; they are only logged for whoever asks for them by name.
    const OUR_LOG: &str = "warn,tailwater=trace,pipeline=trace,sources=trace,operators=trace,sinks=trace";
    let folder = Scratch::new();
    let port = free_port();
    let mut printed = String::new();
    let secret = [("PASSWORD", SECRET), ("RUST_LOG", OUR_LOG)];
    for (written, wrong) in [
        ("a: no mistake", "a: no mistake"),
        ("every: 1s", "every: ${PASSWORD}"),
        ("{n: int}", "{n: \"${PASSWORD}\"}"),
        ("path: /ws", "path: \"${PASSWORD}\""),
        ("= 'x'", "= 'x"),
        ("n > 0 OR", "${PASSWORD}"),
        ("mqtt://", "${PASSWORD}://"),
        ("postgres://", "${PASSWORD}://"),
        ("127.0.0.1:1/db", "127.0.0.1:x/db"),
        ("type: mqtt", "type: ${PASSWORD}"),
        ("table: t", "table: t, ${PASSWORD}: 1"),
        ("to: live}", "to: \"${PASSWORD}\"}"),
        ("from: other", "from: \"${PASSWORD}\""),
        ("127.0.0.1:PORT", "${PASSWORD}"),
    ] {
        folder.write("x.yaml", &SECRETS.replace(written, wrong).replace("PORT", &port.to_string()));
        for arguments in [&["check", "x.yaml"][..], &["graph", "x.yaml"], &["query", "SELECT '", "--config", "x.yaml"]]
        {
            let output = run_with(folder.path(), &secret, arguments);
            assert!(output.status.code() == Some(1) || written == wrong, "{wrong}: {}", text(&output.stdout));
            printed += &text(&output.stdout);
            printed += &text(&output.stderr);
        }
        assert!(!printed.contains(SECRET), "{wrong}: {printed}");
    }
    folder.write("x.yaml", &SECRETS.replace("PORT", &port.to_string()));
    for source in ["table", "other", "devices"] {
        let output = run_with(folder.path(), &secret, &["fields", source, "--config", "x.yaml"]);
        printed += &text(&output.stderr);
    }
    let mut command = Command::new(BINARY);
    command.args(["run", "x.yaml"]).current_dir(folder.path()).envs(secret);
    let mut process = super::support::Process::start(&mut command);
    let tried = wait_for("every node to have tried", || {
        let (_, health) = request(port, "GET", "/health", "")?;
        let health: Value = serde_json::from_str(&health).ok()?;
        let reasons = health["reasons"].as_array()?;
        let tried = reasons.iter().filter(|reason| reason["state"] == "retrying").count();
        (tried == 7).then_some(health.to_string())
    });
    printed += &tried;
    for path in ["/api/v1/pipelines", "/metrics", "/api/v1/stats", "/"] {
        printed += &request(port, "GET", path, "").expect("an answer").1;
    }
    process.signal("TERM");
    assert_eq!(process.wait().code(), Some(0));
    printed += &process.printed();
    assert!(!printed.contains(SECRET), "{printed}");
    assert!(printed.contains("postgres://me:***@127.0.0.1:1/db"), "{printed}");
}

#[test]
fn graph_prints_text_mermaid_and_graphviz() {
    let folder = good();
    for (format, expected) in [
        (
            "text",
            "source rows (file)\n  device: string, value: int, at: timestamp\npipeline load <- rows | filter | window\n  \
             window_start: timestamp, window_end: timestamp, device: string, total: int, rows: int, stage: string, \
             revision: int\n  key: device\nsink history (parquet) <- load\nsink out (console) <- load\n",
        ),
        (
            "mermaid",
            "flowchart LR\n  source_rows[/\"rows<br/>file\"/]\n  pipeline_load[\"load<br/>filter | window\"]\n  \
             sink_history[(\"history<br/>parquet\")]\n  sink_out[(\"out<br/>console\")]\n  \
             source_rows --> pipeline_load\n  pipeline_load --> sink_history\n  pipeline_load --> sink_out\n",
        ),
        (
            "dot",
            "digraph tailwater {\n  rankdir=LR;\n  \"source_rows\" [shape=parallelogram, label=\"rows\\nfile\"];\n  \
             \"pipeline_load\" [shape=box, label=\"load\\nfilter | window\"];\n  \
             \"sink_history\" [shape=cylinder, label=\"history\\nparquet\"];\n  \
             \"sink_out\" [shape=cylinder, label=\"out\\nconsole\"];\n  \
             \"source_rows\" -> \"pipeline_load\" [label=\"\"];\n  \
             \"pipeline_load\" -> \"sink_history\" [label=\"\"];\n  \
             \"pipeline_load\" -> \"sink_out\" [label=\"\"];\n}\n",
        ),
    ] {
        let output = program::run(folder.path(), &["graph", "--format", format]);
        assert_eq!((text(&output.stdout).as_str(), text(&output.stderr).as_str()), (expected, ""), "{format}");
    }
}

#[test]
fn a_variable_that_is_not_set_is_one_error() {
    let folder = Scratch::new();
    let whole = "sources: {a: {type: generate, rate: 1, columns: {n: seq}}}\npipelines: {p: {from: a, to: out}}\n";
    for (broken, by) in [
        ("rate: 1", "rate: \"${NOWHERE}\""),
        ("n: seq", "n: \"seq + ${NOWHERE}\""),
        ("type: generate", "type: \"${NOWHERE}\""),
        ("from: a", "from: \"${NOWHERE}\""),
        ("to: out", "to: [\"${NOWHERE}\"]"),
        ("out: {type: console", "out: {type: \"${NOWHERE}\""),
        ("every: 2s", "every: \"${NOWHERE}\""),
        ("rows: 50", "rows: \"${NOWHERE}\""),
    ] {
        let sinks = "sinks: {out: {type: console, batch: {rows: 50, every: 2s}}}\n";
        let graph = format!("{whole}{sinks}").replace(broken, by);
        folder.write("pipelines.yaml", &graph);
        let output = program::run(folder.path(), &["check"]);
        let told = text(&output.stdout);
        let errors: Vec<&str> = told.lines().filter(|line| line.contains(": error: ")).collect();
        assert!(errors.len() == 1 && errors[0].contains("environment variable `NOWHERE` is not set"), "{by}: {told}");
        assert_eq!((output.status.code(), text(&output.stderr).contains("has one error")), (Some(1), true), "{by}");
    }
    folder.write("pipelines.yaml", "sources: {a: {type: sql, url: \"${NOWHERE}\", every: 1s, query: SELECT 1}}\n");
    let output = program::run(folder.path(), &["fields", "a"]);
    let told = text(&output.stderr);
    assert!(told.contains("environment variable `NOWHERE` is not set") && told.lines().count() == 2, "{told}");
}

#[test]
fn notes_are_told_by_check_and_not_at_every_start() {
    let folder = good();
    let graph = std::fs::read_to_string(folder.path().join("pipelines.yaml")).expect("the graph");
    folder.write("pipelines.yaml", &format!("{graph}  spare: {{type: console}}\n"));
    let note = "note: sink spare: no pipeline writes to this sink";
    assert!(text(&program::run(folder.path(), &["check"]).stdout).contains(note));
    for arguments in [&["run"] as &[&str], &["graph"], &["query", "SELECT 1"]] {
        let output = program::run(folder.path(), arguments);
        assert_eq!(output.status.code(), Some(0), "{arguments:?}");
        assert!(!text(&output.stderr).contains("note:"), "{arguments:?}: {}", text(&output.stderr));
    }
}

/// What `check` says of a text, without hints: the places, nodes and messages of the errors.
fn errors_of(yaml: &str) -> Vec<String> {
    let folder = Scratch::new();
    folder.write("x.yaml", yaml);
    let told = text(&program::run(folder.path(), &["check", "x.yaml"]).stdout);
    let errors = told.lines().filter_map(|line| line.strip_prefix("x.yaml:")?.split_once(": error: "));
    errors.map(|(_, error)| error.to_owned()).collect()
}

#[test]
fn a_mistake_in_a_source_hides_none_in_the_steps() {
    for (source, message) in [
        ("type: mqtt, url: 'htp://h', topics: [t], fields: {a: int}", "is no MQTT broker"),
        ("type: mqtt, url: embedded, topics: [t], qos: 7, fields: {a: int}", "`qos`"),
        ("type: mqtt, url: embedded, topics: [t], qos: high, fields: {a: int}", "expected a whole number"),
        ("type: redis, url: 'redis://h', read: {a: GET a}, every: soon", "`soon` is no duration"),
        ("type: redis, url: 'htp://h', list: l, fields: {a: int}", ""),
        ("type: redis, url: 'redis://h', list: l, start: latest, fields: {a: int}", "`start` belongs to"),
        ("type: sql, url: 'oracle://h', query: SELECT 1, every: 1s, fields: {a: int}", "unknown database"),
        ("type: sql, url: 'sqlite:a.db', query: ' ', every: 1s, fields: {a: int}", "the query is empty"),
        ("type: generate, rate: -1, columns: {a: seq}", "expected a rate"),
        ("type: http, path: x, fields: {a: int}", "must start with `/`"),
        ("type: file, path: x.gz, fields: {a: int}", "compressed"),
    ] {
        let yaml = format!(
            "sources: {{s: {{{source}}}}}\npipelines: {{p: {{from: s, steps: [filter: aa > 1], to: out}}}}\n\
             sinks: {{out: {{type: console}}}}\n"
        );
        let errors = errors_of(&yaml);
        let of_source =
            errors.iter().filter(|error| error.starts_with("source s: ") && error.contains(message)).count();
        assert!(of_source >= 1 && errors.len() == of_source + 1, "{source}: {errors:?}");
        assert_eq!(
            errors.last().map(String::as_str),
            Some("pipeline p step 1 (filter): no column `aa` here"),
            "{source}"
        );
    }
}

#[test]
fn a_column_of_unknown_type_brings_no_errors_of_its_own() {
    let sinks = "sinks:\n  out: {type: mqtt, url: embedded, topic: 'x/{u}'}\n  key: {type: sql, url: 'sqlite:a', table: t, key: [u]}\n";
    for (steps, errors) in [
        ("- filter: u", 0),
        ("- filter: u > 1", 0),
        ("- filter: upper(u) = 'A' AND starts_with(u, 'x')", 0),
        ("- select: {derive: {v: 'round(u, 2)', w: u AND true}}", 0),
        ("- select: {derive: {v: u + 1}}\n      - filter: v", 0),
        ("- window: {tumbling: 1s, group_by: [u], aggregate: {p: \"percentile(u, 0.5)\"}}", 0),
        ("- window: {tumbling: 1s, aggregate: {u: last(u)}}\n      - filter: u", 0),
        ("- join: {with: other, on: [u], prefix: o_}", 0),
        ("- filter: u > nothing", 1),
        ("- filter: a", 1),
        ("- filter: u AND nosuchfunction(a)", 1),
        ("- select: {derive: {v: u +}}", 1),
    ] {
        let yaml = format!(
            "sources:\n  s: {{type: generate, rate: 1, columns: {{a: seq, u: \"lost + 1\", k: \"seq\"}}}}\n\
             pipelines:\n  other: {{from: s, steps: [select: {{keep: [u, k]}}], key: u}}\n  both: {{from: [s, other], to: out}}\n  \
             p:\n    from: s\n    to: [out, key]\n    steps:\n      {steps}\n{sinks}"
        );
        let found = errors_of(&yaml);
        let first = "source s: no column `lost` here";
        let of_steps = found.iter().filter(|error| error.starts_with("pipeline p step 1")).count();
        assert_eq!(
            (found.first().map(String::as_str), found.len(), of_steps),
            (Some(first), 1 + errors, errors),
            "{steps}: {found:?}"
        );
    }
}

#[test]
fn a_bounded_graph_that_runs_again_warns_that_its_history_gets_its_rows_again() {
    let folder = good();
    for (run, rows, warns) in [(1, 4, false), (2, 8, true)] {
        let output = program::run(folder.path(), &["run"]);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{said}");
        let warned =
            said.lines().filter(|line| line.contains("WARN") && line.contains("remove `./history/load` first"));
        assert_eq!(warned.count(), usize::from(warns), "run {run}: {said}");
        let output =
            program::run(folder.path(), &["query", "SELECT count(*) AS n FROM versions.load", "--format", "json"]);
        let counted: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert_eq!(counted[0]["n"], rows, "run {run}");
    }
    std::fs::remove_dir_all(folder.path().join("history/load")).expect("the history");
    assert!(!text(&program::run(folder.path(), &["run"]).stderr).contains("WARN"));
}

#[test]
fn columns_that_are_misspelt_are_not_missed_by_the_steps_too() {
    for source in [
        "type: mqtt, url: embedded, topics: [t], feilds: {a: int}",
        "type: mqtt, url: embedded, topics: [t], fields: {a: itn}",
        "type: redis, url: 'redis://h', read: {a: GTE a}",
        "type: generate, rate: 1, columns: [a]",
        "type: sql, url: 'sqlite:a.db', query: SELECT 1, every: 1s, fields: {a: itn}",
    ] {
        let yaml = format!(
            "sources: {{s: {{{source}}}}}\npipelines: {{p: {{from: s, steps: [filter: a > 1], to: out}}}}\n\
             sinks: {{out: {{type: console}}}}\n"
        );
        let errors = errors_of(&yaml);
        assert!(
            !errors.is_empty() && errors.iter().all(|error| error.starts_with("source s: ")),
            "{source}: {errors:?}"
        );
    }
}

/// A client that never says good-bye holds a stop up for seconds.
#[test]
fn a_second_signal_cuts_a_slow_stop_short() {
    for (first, second, says) in [("TERM", "INT", "Ctrl-C again"), ("INT", "TERM", "SIGTERM again")] {
        let mut program = Program::start(
            "sources: {a: {type: generate, rate: 1, columns: {n: seq}}}\npipelines: {p: {from: a, to: live}}\n\
             sinks: {live: {type: websocket, path: /ws}}\n",
        );
        let mut silent = std::net::TcpStream::connect(program.address()).expect("a connection");
        let upgrade = "GET /ws HTTP/1.1\r\nHost: test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                       Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
        std::io::Write::write_all(&mut silent, upgrade.as_bytes()).expect("an upgrade");
        wait_for("the client", || (program.get("/api/v1/stats")["active_connections"] == 1).then_some(()));
        program.process.signal(first);
        wait_for("the stop to begin", || {
            program.process.printed().contains("a second one stops at once").then_some(())
        });
        program.process.signal(second);
        assert_eq!(program.process.wait().code(), Some(130), "{}", program.process.printed());
        wait_for("the reason", || program.process.printed().contains(says).then_some(()));
    }
}

/// Words of Mermaid and Graphviz are names like others: no line of a drawing begins with a bare one.
#[test]
fn a_graph_of_words_that_mean_something_to_mermaid_and_graphviz_is_drawn() {
    let folder = Scratch::new();
    let words = ["end", "graph", "subgraph", "class", "click", "node", "style", "digraph", "default", "edge"];
    let pipelines: String = words.iter().map(|word| format!("  {word}: {{from: flowchart, to: {word}}}\n")).collect();
    let sinks: String = words.iter().map(|word| format!("  {word}: {{type: console}}\n")).collect();
    folder.write(
        "pipelines.yaml",
        &format!(
            "sources:\n  flowchart: {{type: file, path: rows.csv, fields: {{x: int}}}}\npipelines:\n{pipelines}sinks:\n{sinks}"
        ),
    );
    for format in ["mermaid", "dot"] {
        let output = program::run(folder.path(), &["graph", "--format", format]);
        let drawing = text(&output.stdout);
        for word in words {
            for id in [format!("pipeline_{word}"), format!("sink_{word}")] {
                assert!(drawing.contains(&id), "{format}: {id} in {drawing}");
            }
        }
        for line in drawing.lines().filter(|line| line.starts_with("  ") && *line != "  rankdir=LR;") {
            let id = line.trim_start().trim_start_matches('"');
            let kinds = ["source_", "pipeline_", "sink_"];
            assert!(kinds.iter().any(|kind| id.starts_with(kind)), "{format}: {line}");
        }
    }
}

/// The plugins that `pipeline docs` lists: kind and name.
fn listed_plugins() -> Vec<(String, String)> {
    let printed = text(&program::run(Path::new("."), &["docs"]).stdout);
    let (mut kind, mut list) = (String::new(), Vec::new());
    for line in printed.lines() {
        if let Some(heading) = line.strip_suffix(':') {
            kind = if heading == "in general" { "every".to_owned() } else { heading.trim_end_matches('s').to_owned() };
        } else if let Some(entry) = line.strip_prefix("  ") {
            let (name, sentence) = entry.split_once(' ').expect("a sentence");
            assert!(sentence.trim().ends_with('.'), "{line}");
            list.push((kind.clone(), name.to_owned()));
        }
    }
    list
}

#[test]
fn docs_lists_every_plugin_and_prints_each_page() {
    let listed = listed_plugins();
    let of = |kind: &str| listed.iter().filter(|(k, _)| k == kind).map(|(_, name)| name.as_str()).collect::<Vec<_>>();
    assert_eq!(of("every"), ["source", "pipeline", "sink"]);
    assert_eq!(of("source"), sources::SOURCES.iter().map(|p| p.type_name).collect::<Vec<_>>());
    assert_eq!(of("operator"), operators::OPERATORS.iter().map(|p| p.type_name).collect::<Vec<_>>());
    assert_eq!(of("sink"), sinks::SINKS.iter().map(|p| p.type_name).collect::<Vec<_>>());
    for (kind, name) in &listed {
        let page = text(&program::run(Path::new("."), &["docs", kind, name]).stdout);
        assert!(page.starts_with(&format!("# {kind} `{name}`\n\n")), "{page}");
        let (_, example) = page.split_once("\n## Example\n\n```yaml\n").unwrap_or_else(|| panic!("no example: {page}"));
        assert!(example.ends_with("```\n"), "{page}");
        assert!(kind == "every" || example.contains(name.as_str()), "{page}");
        let by_name = text(&program::run(Path::new("."), &["docs", name]).stdout);
        assert!(by_name.contains(&page), "{name}");
    }
}

#[test]
fn docs_tell_what_every_source_and_sink_has_and_their_examples_fit_together() {
    let page = |kind: &str| text(&program::run(Path::new("."), &["docs", kind]).stdout);
    for (kind, options) in [
        ("source", vec!["`event_time`", "  - `lateness`", "`errors`", "`on_demand`"]),
        ("pipeline", vec!["`from` (required)", "`to`", "`key`"]),
        ("sink", vec!["`batch`", "  - `rows`", "  - `every`"]),
    ] {
        for option in options {
            assert!(
                page(kind)
                    .lines()
                    .any(|line| line.starts_with(&format!("- {option}:")) || line.starts_with(&format!("{option}:"))),
                "{kind} {option}: {}",
                page(kind)
            );
        }
    }
    let example = |kind: &str| {
        let page = page(kind);
        let (_, example) = page.split_once("```yaml\n").expect("an example");
        example.trim_end_matches("```\n").replace("\n", "\n    ")
    };
    let folder = Scratch::new();
    let (source, pipeline, sink) = (example("source"), example("pipeline"), example("sink"));
    let graph = format!(
        "sources:\n  devices:\n    {source}\npipelines:\n  load:\n    {pipeline}\nsinks:\n  rejected:\n    {sink}\n  \
         live: {{type: sse, path: /e}}\n  history: {{type: parquet, path: h}}\n"
    );
    folder.write("pipelines.yaml", &graph);
    let output = program::run(folder.path(), &["check"]);
    assert_eq!(output.status.code(), Some(0), "{graph}\n{}", text(&output.stdout));
}

/// A YAML tree as the JSON that an editor's validator sees.
fn to_json(node: &Node) -> Value {
    match &node.value {
        YamlValue::Scalar(scalar) if scalar.is_null() => Value::Null,
        YamlValue::Scalar(scalar) if scalar.plain => {
            let number = serde_json::from_str::<Value>(&scalar.text).ok().filter(|v| v.is_number() || v.is_boolean());
            number.unwrap_or_else(|| scalar.text.as_str().into())
        }
        YamlValue::Scalar(scalar) => scalar.text.as_str().into(),
        YamlValue::Sequence(items) => items.iter().map(to_json).collect(),
        YamlValue::Mapping(entries) => {
            Value::Object(entries.iter().map(|(key, value)| (key.name.clone(), to_json(value))).collect())
        }
    }
}

fn yaml(text: &str) -> Value {
    to_json(&tree::parse(text).expect("YAML"))
}

#[test]
fn the_schema_fits_every_graph_that_we_ship_and_no_wrong_one() {
    let schema = program::run(Path::new("."), &["schema"]);
    let schema: Value = serde_json::from_slice(&schema.stdout).expect("JSON");
    assert_eq!(schema["$schema"], "https://json-schema.org/draft/2020-12/schema");
    let variables = "{sources: {a: {type: mqtt, url: '${URL}', topics: [t], qos: '${QOS}', session: '${SESSION:-clean}'}}, \
                     checkpoint: {every: '${EVERY}s'}}";
    let mut graphs: Vec<(String, Value)> = vec![("GOOD".into(), yaml(GOOD)), (variables.into(), yaml(variables))];
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let examples = std::fs::read_dir(root.join("examples")).into_iter().flatten();
    let examples = examples.map(|entry| entry.expect("an entry").path());
    for path in examples.chain([root.join("pipelines.yaml")]).filter(|p| p.extension().is_some_and(|e| e == "yaml")) {
        let text = std::fs::read_to_string(&path).expect("a graph");
        graphs.push((path.display().to_string(), yaml(&text)));
    }
    let examples = [
        ("sources", sources::SOURCES.iter().map(|p| (p.type_name, p.example)).collect::<Vec<_>>()),
        ("sinks", sinks::SINKS.iter().map(|p| (p.type_name, p.example)).collect()),
    ];
    for (section, list) in examples {
        graphs.extend(list.into_iter().map(|(name, example)| (name.into(), json!({section: {"x": yaml(example)}}))));
    }
    for operator in operators::OPERATORS {
        let pipeline = json!({"from": "a", "steps": [yaml(operator.example)]});
        graphs.push((operator.type_name.into(), json!({"pipelines": {"x": pipeline}})));
    }
    for (name, graph) in &graphs {
        assert_eq!(json_schema::problems(&schema, graph), Vec::<String>::new(), "{name}");
    }
    for wrong in [
        "sorces: {}",
        "sources: {a: {type: mqt}}",
        "sources: {a: {type: http}}",
        "sources: {a b: {type: http, path: /x}}",
        "sources: {a: {type: http, path: /x, pth: 1}}",
        "sources: {a: {type: http, path: /x, fields: {n: flot}}}",
        "pipelines: {a: {}}",
        "pipelines: {a: {from: b, steps: [{filtr: x}]}}",
        "pipelines: {a: {from: b, steps: {filter: x}}}",
        "sinks: {a: {type: parquet, path: x, roll: 5}}",
        "checkpoint: {every: soon}",
    ] {
        assert!(!json_schema::problems(&schema, &yaml(wrong)).is_empty(), "{wrong}");
    }
}

#[tokio::test]
async fn fields_prints_the_block_to_paste() {
    let folder = Scratch::new();
    folder.write("rows.csv", ROWS);
    folder.write(
        "rows.json",
        "{\"a\": 1, \"b\": 2.5}\n{\"a\": 2, \"c\": {\"d\": [true]}, \"e\": \"2026-01-01T00:00:00Z\"}\n",
    );
    let database = format!("sqlite:{}?mode=rwc", folder.path().join("demo.db").display());
    let mut connection = <sqlx::SqliteConnection as sqlx::Connection>::connect(&database).await.expect("a database");
    let table = "CREATE TABLE jobs (id INTEGER PRIMARY KEY, status TEXT, cost REAL, at TIMESTAMP, flag BOOLEAN)";
    sqlx::Executor::execute(&mut connection, table).await.expect("a table");
    sqlx::Connection::close(connection).await.expect("closed");
    folder.write(
        "pipelines.yaml",
        "sources:\n  csv: {type: file, path: rows.csv}\n  json: {type: file, path: \"*.json\"}\n  \
         jobs: {type: sql, url: \"sqlite:demo.db\", every: 1s, query: SELECT * FROM jobs}\n  \
         lost: {type: sql, url: \"sqlite:lost.db\", every: 1s, query: SELECT * FROM jobs}\n",
    );
    for (source, expected) in [
        ("csv", "fields:\n  device: string\n  value: int\n  at: timestamp\n"),
        ("json", "fields:\n  a: int\n  b: float\n  c: json\n  e: timestamp\n"),
        ("jobs", "fields:\n  id: int\n  status: string\n  cost: float\n  at: timestamp\n  flag: bool\n"),
    ] {
        let output = program::run(folder.path(), &["fields", source]);
        assert_eq!((text(&output.stdout).as_str(), text(&output.stderr).as_str()), (expected, ""), "{source}");
    }
    let output = program::run(folder.path(), &["fields", "lost"]);
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(text(&output.stderr), "error: database file ./lost.db does not exist\n");
    assert!(!folder.path().join("lost.db").exists());
}

#[test]
fn what_runs_listens_on_one_port_and_says_so() {
    let program = Program::start("sources: {a: {type: generate, rate: 1, columns: {n: seq}}}");
    assert!(program.process.printed().contains(&format!("listening on http://127.0.0.1:{}/", program.port)));
    program.stop();
}
