//! The same rows through files and through a real broker: every window of every key against a plain reference.
//!
//! The rows are made from a seed and lie in no order: bursts, silences, ties, copies, nulls, negative numbers,
//! counters that restart. The reference holds each window's rows in memory and does what the words say.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::path::Path;

use pipeline::time::{format_us, parse_us};
use serde_json::Value;

use crate::support::mosquitto::{Mosquitto, publish};
use crate::support::program::{Program, run};
use crate::support::{Scratch, free_port, wait_for};

const ROWS: usize = 20_000;
const SECOND: i64 = 1_000_000;
/// 2026-11-20T10:40:00Z, so that running totals, which start anew every hour, do so within the rows.
const START_US: i64 = 1_795_171_200 * SECOND;
/// The rows spread over so much event time.
const SPAN_US: i64 = 40 * 60 * SECOND;
/// How far a row may come after a newer one.
const DISORDER_US: i64 = 5 * SECOND;

#[derive(Clone, Debug)]
struct Row {
    seq: i64,
    device: String,
    us: i64,
    x: Option<f64>,
    n: Option<i64>,
    counter: Option<i64>,
    ok: Option<bool>,
    text: Option<&'static str>,
    /// In thousandths.
    price: Option<i64>,
}

/// A small generator (xorshift64*), so that a seed gives the same rows for ever.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: i64) -> i64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        ((self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) % limit as u64) as i64
    }

    fn chance(&mut self, percent: i64) -> bool {
        self.below(100) < percent
    }

    fn but_null<T>(&mut self, percent: i64, value: T) -> Option<T> {
        (!self.chance(percent)).then_some(value)
    }
}

/// All rows in order of arrival.
fn rows(seed: u64) -> Vec<Row> {
    let mut random = Random(seed);
    let mut rows = Vec::new();
    let mut counters = [0i64; 40];
    let texts = ["eu", "us", "Zürich", "北京", "a,b", "q\"uote", "back\\slash", "☂"];
    while rows.len() < ROWS {
        let device = random.below(40);
        let mut us = START_US + random.below(SPAN_US);
        if random.chance(5) {
            us -= us % (10 * SECOND); // on the edge of windows
        }
        // Device 7 is silent for a while in each ten minutes, so that it has sessions.
        if device < 8 && us % (600 * SECOND) > 60 * SECOND * (device + 1) {
            continue;
        }
        for _ in 0..if random.chance(4) { 2 + random.below(12) } else { 1 } {
            let counter = &mut counters[device as usize];
            *counter = if random.chance(1) { random.below(50) } else { *counter + random.below(40) };
            let x = (random.below(2_000_000_000) - 400_000_000) as f64 / 7e6;
            let row = Row {
                seq: 0,
                device: format!("gerät-{device}"),
                us,
                x: random.but_null(10, x),
                n: random.but_null(10, random.0 as i64 >> 24),
                counter: random.but_null(5, *counter),
                ok: random.but_null(3, !random.0.is_multiple_of(10)),
                text: random.but_null(15, texts[(random.0 >> 20) as usize % texts.len()]),
                price: random.but_null(5, (random.0 >> 30) as i64 - (1 << 33)),
            };
            if random.chance(2) {
                rows.push(row.clone()); // the same once more
            }
            rows.push(row);
            us += random.below(300_000);
        }
    }
    rows.truncate(ROWS);
    // The disorder: each row is late by a part of it.
    let mut rows: Vec<(i64, Row)> = rows.into_iter().map(|row| (row.us + random.below(DISORDER_US), row)).collect();
    rows.sort_by_key(|(arrival, _)| *arrival);
    rows.into_iter().enumerate().map(|(seq, (_, row))| Row { seq: seq as i64, ..row }).collect()
}

fn json_line(row: &Row) -> String {
    let mut line = serde_json::json!({
        "device": row.device, "ts": format_us(row.us), "seq": row.seq, "x": row.x, "n": row.n, "ok": row.ok, "text": row.text,
    });
    // A missing field is null, and a decimal may be a number or a text.
    if let Some(counter) = row.counter {
        line["counter"] = counter.into();
    }
    let price = row.price.map(price_text);
    let number = price.as_ref().filter(|_| row.seq % 2 == 0).map(|price| format!(",\"price\":{price}}}"));
    match (number, price) {
        (Some(number), _) => line.to_string().trim_end_matches('}').to_owned() + &number,
        (None, price) => {
            line["price"] = price.into();
            line.to_string()
        }
    }
}

fn price_text(thousandths: i64) -> String {
    let sign = if thousandths < 0 { "-" } else { "" };
    format!("{sign}{}.{:03}", thousandths.abs() / 1000, thousandths.abs() % 1000)
}

fn csv_text(rows: &[Row]) -> String {
    fn cell<T: ToString>(value: Option<T>) -> String {
        let text = value.map(|value| value.to_string()).unwrap_or_default();
        if text.contains([',', '"']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text }
    }
    // The columns in another order than in `fields`.
    let mut text = "price,device,seq,text,x,n,ok,counter,ts\n".to_owned();
    for row in rows {
        let (price, x, n) = (cell(row.price.map(price_text)), cell(row.x), cell(row.n));
        let (ok, counter, ts) = (cell(row.ok), cell(row.counter), format_us(row.us));
        let _ = writeln!(text, "{price},{},{},{},{x},{n},{ok},{counter},{ts}", row.device, row.seq, cell(row.text));
    }
    text
}

const FIELDS: &str = "{device: string, ts: timestamp, seq: int, x: float, n: int, counter: int, ok: bool, text: string, price: 'decimal(12,3)'}";

/// Kinds of windows, and the names of their pipelines.
const KINDS: [(&str, &str); 4] = [
    ("tumbling", "tumbling: 10s"),
    ("sliding", "sliding: {size: 1m, every: 10s}"),
    ("session", "session: {gap: 30s}"),
    ("total", "none: {every: 1m, reset: 1h}"),
];

/// The graph over one source: every kind of window with every aggregate, and the rows themselves.
fn graph(source: &str, lateness_us: i64) -> String {
    let mut yaml = format!(
        "sources:\n  events:\n{source}    fields: {FIELDS}\n    event_time: {{field: ts, lateness: {lateness_us}us}}\npipelines:\n  raw: {{from: events, to: [history]}}\n"
    );
    for (name, kind) in KINDS {
        let _ = write!(
            yaml,
            r#"
  {name}:
    from: events
    steps:
      - window:
          {kind}
          group_by: [device]
          aggregate:
            count_x: count(x)
            sum_n: sum(n)
            sum_price: sum(price)
            sum_x: sum(x)
            avg_x: avg(x)
            min_x: min(x)
            max_x: max(x)
            stddev_x: stddev(x)
            max_text: max(text)
            first_n: first(n)
            last_n: last(n)
            last_ok: last(ok)
            first_known: first(text) IGNORE NULLS
            per_second: rate()
            counter_rate: rate(counter)
            counter_delta: delta(counter)
            p50: percentile(x, 0.5)
            p90: percentile(x, 0.9)
            p99: percentile(x, 0.99)
            texts: distinct(text)
            share: round(count() FILTER (WHERE ok) / (count() * 1.0), 6)
            median_x: median(x)
            seqs: array_agg(seq)
            joined: string_agg(text, '|')
    to: [history]
"#
        );
    }
    yaml + "sinks:\n  history: {type: parquet, path: history, roll: 1s}\n"
}

/// Key, start and end of a window.
type Id = (String, i64, i64);

/// The windows of all rows, each with its rows in order of arrival.
fn windows<'a>(name: &str, rows: &'a [Row]) -> BTreeMap<Id, Vec<&'a Row>> {
    let mut windows: BTreeMap<Id, Vec<&Row>> = BTreeMap::new();
    let mut put = |start: i64, end: i64, row: &'a Row| {
        windows.entry((row.device.clone(), start, end)).or_default().push(row);
    };
    let floor = |us: i64, size: i64| us.div_euclid(size) * size;
    match name {
        "tumbling" => rows.iter().for_each(|row| {
            let start = floor(row.us, 10 * SECOND);
            put(start, start + 10 * SECOND, row);
        }),
        "sliding" => rows.iter().for_each(|row| {
            let newest = floor(row.us, 10 * SECOND);
            (0..6).map(|back| newest - back * 10 * SECOND).for_each(|start| put(start, start + 60 * SECOND, row));
        }),
        "total" => {
            let mut devices: BTreeMap<&str, Vec<&Row>> = BTreeMap::new();
            rows.iter().for_each(|row| devices.entry(row.device.as_str()).or_default().push(row));
            for rows in devices.values() {
                let ends: BTreeSet<i64> = rows.iter().map(|row| floor(row.us, 60 * SECOND) + 60 * SECOND).collect();
                for end in ends {
                    let start = floor(end - 1, 3600 * SECOND);
                    rows.iter().filter(|row| (start..end).contains(&row.us)).for_each(|row| put(start, end, row));
                }
            }
        }
        _ => sessions(rows).into_iter().for_each(|(start, end, row)| put(start, end, row)),
    }
    windows
}

fn sessions(rows: &[Row]) -> Vec<(i64, i64, &Row)> {
    let gap = 30 * SECOND;
    let mut sorted: Vec<&Row> = rows.iter().collect();
    sorted.sort_by(|a, b| (&a.device, a.us).cmp(&(&b.device, b.us)));
    let together = |a: &&Row, b: &&Row| a.device == b.device && b.us - a.us < gap;
    let mut all = Vec::new();
    for session in sorted.chunk_by(together) {
        let (start, end) = (session[0].us, session[session.len() - 1].us + gap);
        all.extend(session.iter().map(|row| (start, end, *row)));
    }
    all.sort_by_key(|(_, _, row)| row.seq);
    all
}

/// What a column should hold, and how close the result must be.
enum Expected {
    Exactly(Value),
    Near(Option<f64>, f64),
}

/// The test's own reading of JSON misses some floats in the last place.
const LAST_PLACE: f64 = 1e-15;

/// The reference: every aggregate of a window's rows, in order of arrival.
fn expected(name: &str, (_, start, end): &Id, rows: &[&Row]) -> Vec<(&'static str, Expected)> {
    use Expected::{Exactly, Near};
    let mut by_time = rows.to_vec();
    by_time.sort_by_key(|row| (row.us, row.seq));
    let (first, last) = (by_time[0], by_time[by_time.len() - 1]);
    let mut xs: Vec<f64> = rows.iter().filter_map(|row| row.x).collect();
    let (count, total) = (xs.len() as f64, xs.iter().sum::<f64>());
    let some = |value: f64| (count > 0.0).then_some(value);
    let mean = total / count;
    let squares: f64 = xs.iter().map(|x| (x - mean).powi(2)).sum();
    xs.sort_by(f64::total_cmp);
    let rank = |q: f64| xs.get(((q * count).ceil() as usize).saturating_sub(1)).copied();
    let median = some(
        (xs.get((xs.len().saturating_sub(1)) / 2).copied().unwrap_or_default()
            + xs.get(xs.len() / 2).copied().unwrap_or_default())
            / 2.0,
    );
    let seconds = match name {
        "session" => last.us - first.us,
        _ => end - start,
    } as f64
        / 1e6;
    let samples: Vec<(i64, i64)> = by_time.iter().filter_map(|row| Some((row.us, row.counter?))).collect();
    let increase: i64 =
        samples.windows(2).map(|pair| if pair[1].1 < pair[0].1 { pair[1].1 } else { pair[1].1 - pair[0].1 }).sum();
    let span = samples.last().map_or(0, |end| end.0 - samples[0].0);
    // Overlapping windows share panes, and totals grow by ticks: these keep their rows in order of arrival.
    let mut rows = rows.to_vec();
    match name {
        "sliding" => rows.sort_by_key(|row| row.us.div_euclid(10 * SECOND)),
        "total" => rows.sort_by_key(|row| row.us.div_euclid(60 * SECOND)),
        _ => {}
    }
    let texts: Vec<&str> = rows.iter().filter_map(|row| row.text).collect();
    let prices: Vec<i64> = rows.iter().filter_map(|row| row.price).collect();
    let ns: Vec<i64> = rows.iter().filter_map(|row| row.n).collect();
    let share = rows.iter().filter(|row| row.ok == Some(true)).count() as f64 / rows.len() as f64;
    vec![
        ("rows", Exactly(rows.len().into())),
        ("stage", Exactly("final".into())),
        ("revision", Exactly(0.into())),
        ("count_x", Exactly(xs.len().into())),
        ("sum_n", Exactly((!ns.is_empty()).then(|| ns.iter().sum::<i64>()).into())),
        ("sum_price", Exactly((!prices.is_empty()).then(|| price_text(prices.iter().sum())).into())),
        ("sum_x", Near(some(total), 1e-9)),
        ("avg_x", Near(some(mean), 1e-9)),
        ("min_x", Near(xs.first().copied(), LAST_PLACE)),
        ("max_x", Near(xs.last().copied(), LAST_PLACE)),
        ("stddev_x", Near((count > 1.0).then(|| (squares / (count - 1.0)).sqrt()), 1e-9)),
        ("max_text", Exactly(texts.iter().max().copied().into())),
        ("first_n", Exactly(first.n.into())),
        ("last_n", Exactly(last.n.into())),
        ("last_ok", Exactly(last.ok.into())),
        ("first_known", Exactly(by_time.iter().find_map(|row| row.text).into())),
        ("per_second", Near((seconds > 0.0).then(|| rows.len() as f64 / seconds), 1e-9)),
        ("counter_rate", Near((span > 0).then(|| increase as f64 / (span as f64 / 1e6)), 1e-9)),
        ("counter_delta", Exactly(samples.last().map(|end| end.1 - samples[0].1).into())),
        ("p50", Near(rank(0.5), 0.01)),
        ("p90", Near(rank(0.9), 0.01)),
        ("p99", Near(rank(0.99), 0.01)),
        ("texts", Exactly(texts.iter().collect::<BTreeSet<_>>().len().into())),
        ("share", Near(Some((share * 1e6).round() / 1e6), 1e-9)),
        ("median_x", Near(median, 1e-12)),
        ("seqs", Exactly(rows.iter().map(|row| row.seq).collect::<Vec<_>>().into())),
        ("joined", Exactly((!texts.is_empty()).then(|| texts.join("|")).into())),
    ]
}

fn is_near(found: &Value, expected: Option<f64>, relative: f64) -> bool {
    match (found.as_f64(), expected) {
        (Some(a), Some(b)) => (a - b).abs() <= relative * a.abs().max(b.abs()).max(1.0),
        (found, expected) => found.is_none() && expected.is_none(),
    }
}

/// `pipeline query` in a folder.
fn query(folder: &Path, sql: &str) -> Vec<Value> {
    let output = run(folder, &["query", sql, "--format", "json"]);
    assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON rows")
}

/// Compares everything in the history of `folder` with the reference over `rows`. `is_late` tells which rows are too late
/// for a window of tumbling and sliding pipelines; sessions and totals are compared only if there is none.
fn check_history(context: &str, folder: &Path, rows: &[Row], is_late: impl Fn(&Row, i64) -> bool, kinds: &[&str]) {
    let mut arrived: Vec<i64> =
        query(folder, "SELECT seq FROM raw").iter().filter_map(|row| row["seq"].as_i64()).collect();
    arrived.sort_unstable();
    assert!(arrived.iter().copied().eq(0..rows.len() as i64), "{context}: {} rows, each once", arrived.len());
    for name in kinds {
        let mut windows = windows(name, rows);
        for ((_, _, end), rows) in &mut windows {
            rows.retain(|row| !is_late(row, *end));
        }
        windows.retain(|_, rows| !rows.is_empty());
        let found = query(folder, &format!("SELECT * FROM versions.{name}"));
        for result in &found {
            let us = |column: &str| result[column].as_str().and_then(parse_us).expect("a time");
            let id = (result["device"].as_str().expect("a key").to_owned(), us("window_start"), us("window_end"));
            let rows =
                windows.remove(&id).unwrap_or_else(|| panic!("{context}: {name}: unexpected or twice: {result}"));
            for (column, expected) in expected(name, &id, &rows) {
                let found = &result[column];
                match expected {
                    Expected::Exactly(value) => assert_eq!(*found, value, "{context}: {name}: {column} of {id:?}"),
                    Expected::Near(value, relative) => assert!(
                        is_near(found, value, relative),
                        "{context}: {name}: {column} of {id:?}: {found}, not {value:?}"
                    ),
                }
            }
        }
        assert!(windows.is_empty(), "{context}: {name}: {} windows are missing", windows.len());
    }
}

fn all_kinds() -> Vec<&'static str> {
    KINDS.iter().map(|(name, _)| *name).collect()
}

/// Runs a graph over files to its end, in a new folder.
fn replay_file(context: &str, file: &str, text: &str, rows: &[Row]) -> Scratch {
    let scratch = Scratch::new();
    scratch.write(file, text);
    run_to_end(&scratch, &format!("    type: file\n    path: {file}\n"));
    check_history(context, scratch.path(), rows, |_, _| false, &all_kinds());
    scratch
}

fn run_to_end(scratch: &Scratch, source: &str) {
    let yaml = format!("server: {{listen: 127.0.0.1:{}}}\n{}", free_port(), graph(source, DISORDER_US));
    scratch.write("pipelines.yaml", &yaml);
    let output = run(scratch.path(), &["run"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn files_of_every_format_give_the_windows_of_the_reference() {
    let rows = rows(1);
    let lines: String = rows.iter().map(|row| json_line(row) + "\n").collect();
    let first = replay_file("JSON lines", "events.ndjson", &lines, &rows);

    // An empty cell of text is empty text, not null.
    let of_csv: Vec<Row> = rows.iter().map(|row| Row { text: row.text.or(Some("")), ..row.clone() }).collect();
    replay_file("CSV", "events.csv", &csv_text(&rows), &of_csv);

    // History is Parquet: the rows of the first run once more, from its files.
    let again = Scratch::new();
    let path = first.path().join("history/raw/**/*.parquet");
    run_to_end(&again, &format!("    type: file\n    path: {}\n", path.display()));
    check_history("Parquet", again.path(), &rows, |_, _| false, &all_kinds());
}

fn mqtt_source(broker: &Mosquitto, version: u8) -> String {
    let url = format!("mqtt://127.0.0.1:{}", broker.port);
    format!("    type: mqtt\n    url: {url}\n    version: {version}\n    topics: [readings]\n    qos: 1\n")
}

fn publish_rows(broker: &Mosquitto, rows: &[Row]) {
    let lines: Vec<String> = rows.iter().map(json_line).collect();
    publish(broker.port, "readings", &["-q", "1"], &lines.iter().map(String::as_str).collect::<Vec<_>>());
}

/// Waits until `count` rows have come, over all runs in this folder.
fn wait_for_rows(program: &Program, count: usize) {
    wait_for("all rows", || {
        let found = program.query("SELECT count(*) AS n FROM raw")[0]["n"].as_u64()?;
        assert!(found <= count as u64, "{found} rows of {count}: some came twice");
        (found == count as u64).then_some(())
    });
}

#[test]
fn a_restart_in_the_middle_of_a_stream_leaves_no_trace_in_the_results() {
    let rows = rows(2);
    let broker = Mosquitto::start_with("allow_anonymous true\nmax_queued_messages 0");
    let program = Program::start(&graph(&mqtt_source(&broker, 5), DISORDER_US));
    program.wait_healthy();
    publish_rows(&broker, &rows[..ROWS / 2]);
    // Whatever is on its way now is on its way.
    let port = program.port;
    let folder = program.stop();
    publish_rows(&broker, &rows[ROWS / 2..]);
    let program = Program::start_in(folder, port, &graph(&mqtt_source(&broker, 5), DISORDER_US));
    wait_for_rows(&program, ROWS);
    let folder = program.stop();
    let output = run(folder.path(), &["run", "--drain"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    check_history("MQTT 5 with a restart", folder.path(), &rows, |_, _| false, &all_kinds());
}

#[test]
fn rows_beyond_lateness_are_left_out_and_counted_exactly() {
    let rows = rows(3);
    let lateness_us = SECOND;
    let broker = Mosquitto::start_with("allow_anonymous true\nmax_queued_messages 0");
    let program = Program::start(&graph(&mqtt_source(&broker, 3), lateness_us));
    program.wait_healthy();
    publish_rows(&broker, &rows);
    wait_for_rows(&program, ROWS);

    let mut newest_us = i64::MIN / 2;
    let marks: Vec<i64> = rows
        .iter()
        .map(|row| {
            let mark = newest_us - lateness_us;
            newest_us = newest_us.max(row.us);
            mark
        })
        .collect();
    let is_late = |row: &Row, end: i64| end <= marks[row.seq as usize];
    let window_end = |row: &&Row| row.us.div_euclid(10 * SECOND) * 10 * SECOND + 10 * SECOND;
    let late = rows.iter().filter(|row| is_late(row, window_end(row))).count() as u64;
    assert!(late > 100, "{late} late rows prove little");
    wait_for("all late rows to be counted", || {
        let graph = program.get("/api/v1/pipelines");
        let nodes = graph["pipelines"].as_array()?;
        let node = nodes.iter().find(|node| node["name"] == "tumbling")?;
        // A batch's rows are counted when it comes in, its late ones when it is done with.
        (node["status"]["rows_in"] == ROWS && node["status"]["late_rows"] == late).then_some(())
    });
    let folder = program.stop();
    let output = run(folder.path(), &["run", "--drain"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    check_history("MQTT 3 with late rows", folder.path(), &rows, is_late, &["tumbling", "sliding"]);
}
