//! What the check of a graph reports, with plugins made up for it.

use std::path::Path;

use schemars::JsonSchema;
use serde::Deserialize;

use super::check;
use crate::batch::Batch;
use crate::config::{At, CheckContext, Fields, Problems, pipelines};
use crate::error::{Error, Result};
use crate::plugin::{
    Delivery, Mount, Operator, OperatorConfig, OperatorPlugin, Output, Planned, Plugins, Promise, Schedule, Sink,
    SinkConfig, SinkContext, SinkInput, SinkPlugin, SinkShape, Source, SourceConfig, SourceContext, SourcePlugin,
    SourceShape, StreamShape,
};

/// A source with the columns that it is told.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Table {
    fields: Fields,
    #[serde(default)]
    polled: bool,
    #[serde(default)]
    path: Option<String>,
}

fn mounts(path: Option<&String>) -> Vec<Mount> {
    path.map(|path| Mount { method: "GET", path: path.clone() }).into_iter().collect()
}

impl SourceConfig for Table {
    const TYPE: &'static str = "table";
    const PAGE: &'static str = "";
    const EXAMPLE: &'static str = "";

    fn check(&self, _cx: &mut CheckContext<'_>) -> Option<SourceShape> {
        Some(SourceShape {
            schema: self.fields.schema(),
            delivery: Delivery::Sampled,
            schedule: Schedule::Continuous,
            bounded: false,
            can_be_on_demand: self.polled,
            mounts: mounts(self.path.as_ref()),
        })
    }
    fn build(&self, _cx: SourceContext) -> Result<Box<dyn Source>> {
        Err(Error::internal("only checked"))
    }
}

/// A step that passes its rows on and may read another pipeline.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Pass {
    #[serde(default)]
    column: Option<At<String>>,
    #[serde(default)]
    with: Option<At<String>>,
}

struct Passing;

impl Operator for Passing {
    fn process(&mut self, _input: usize, batch: Batch, out: &mut Output) -> Result<()> {
        out.push(batch);
        Ok(())
    }
}

impl OperatorConfig for Pass {
    const TYPE: &'static str = "pass";
    const PAGE: &'static str = "";
    const EXAMPLE: &'static str = "";

    fn side_inputs(&self) -> Vec<At<String>> {
        self.with.clone().into_iter().collect()
    }
    fn plan(&self, inputs: &[StreamShape], cx: &mut CheckContext<'_>) -> Option<Planned> {
        if let Some(column) = &self.column {
            cx.column(column, &inputs[0].schema)?;
        }
        Some(Planned { shape: inputs[0].clone(), operator: Box::new(Passing) })
    }
}

/// A sink that is what it is told to be.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Store {
    #[serde(default)]
    path: Option<String>,
    #[serde(default)]
    folder: Option<String>,
    #[serde(default)]
    live: bool,
}

impl SinkConfig for Store {
    const TYPE: &'static str = "store";
    const PAGE: &'static str = "";
    const EXAMPLE: &'static str = "";

    fn check(&self, _inputs: &[SinkInput], cx: &mut CheckContext<'_>) -> Option<SinkShape> {
        Some(SinkShape {
            mounts: mounts(self.path.as_ref()),
            history: self.folder.as_ref().map(|folder| cx.resolve(folder)),
            live: self.live,
            takes_revised: true,
            promise: Promise::default(),
        })
    }
    fn build(&self, _cx: SinkContext) -> Result<Sink> {
        Err(Error::internal("only checked"))
    }
}

const PLUGINS: Plugins = Plugins {
    sources: &[SourcePlugin::of::<Table>()],
    operators: &[OperatorPlugin::of::<Pass>()],
    sinks: &[SinkPlugin::of::<Store>()],
};

/// One source, pipeline and sink that are right, on lines 1 to 3 of their sections.
const A: &str = "{type: table, fields: {n: int, ts: timestamp}}";

/// A file of these entries: each section's on lines of its own.
fn file(sources: &[&str], pipelines: &[&str], sinks: &[&str]) -> String {
    let section = |name: &str, entries: &[&str]| {
        let lines: String = entries.iter().map(|entry| format!("  {entry}\n")).collect();
        format!("{name}:\n{lines}")
    };
    section("sources", sources) + &section("pipelines", pipelines) + &section("sinks", sinks)
}

/// The problems of a file, one line each.
fn problems(text: &str) -> Vec<String> {
    let mut problems = Problems::default();
    let file = pipelines::parse(text, Path::new("/f"), &|_| None, &mut problems);
    let graph = check(&file, &PLUGINS, &mut problems);
    assert_eq!(graph.is_none(), problems.has_errors(), "{text}: {problems:?}");
    problems.sorted().iter().map(|problem| problem.to_string().replace("\n  ", " ")).collect()
}

/// Checks cases of pipelines and sinks after the source `a` of [`A`]; pipelines begin on line 4.
fn check_cases(cases: &[(&[&str], &[&str], &[&str])]) {
    for (pipelines, sinks, expected) in cases {
        let text = file(&[&format!("a: {A}")], pipelines, sinks);
        assert_eq!(problems(&text), *expected, "{text}");
    }
}

const S: &str = "s: {type: store}";

#[test]
fn names_that_stand_for_nothing_are_reported_with_the_nearest() {
    check_cases(&[
        (&["p: {from: a, to: s}"], &[S], &[]),
        (
            &["p: {from: aa, to: ss}"],
            &[S],
            &[
                "4:13: error: pipeline p: no source or pipeline `aa` hint: did you mean `a`?",
                "4:21: error: pipeline p: no sink `ss` hint: did you mean `s`?",
                "6:3: note: sink s: no pipeline writes to this sink",
            ],
        ),
        (
            &["p: {from: a, to: s, steps: [{pas: {}}]}"],
            &["s: {type: stor}"],
            &[
                "4:32: error: pipeline p step 1 (pas): no operator `pas` hint: did you mean `pass`?",
                "6:13: error: sink s: no sink type `stor` hint: did you mean `store`?",
            ],
        ),
        (
            &["p: {from: a, to: s, steps: [{pass: {with: b}}]}"],
            &[S],
            &["4:45: error: pipeline p step 1 (pass): no source or pipeline `b` hint: did you mean `a`?"],
        ),
        (
            &["p: {from: a, to: s, steps: [{pass: {with: a}}]}"],
            &[S],
            &["4:45: error: pipeline p step 1 (pass): `a` is a source; only a pipeline can be joined"],
        ),
        (
            &["p: {from: a, to: s, key: [n, m]}"],
            &[S],
            &["4:32: error: pipeline p: no column `m` here hint: did you mean `n`?"],
        ),
        (&["p: {from: [], to: s}"], &[S], &["4:3: error: pipeline p: `from` names no source or pipeline"]),
        (&["p: {from: [a, a], to: s}"], &[S], &["4:17: error: pipeline p: `a` is named twice"]),
    ]);
}

#[test]
fn cycles_and_names_given_twice_are_reported() {
    check_cases(&[
        (&["p: {from: p, to: s}"], &[S], &["4:3: error: pipeline p: a cycle: p -> p"]),
        (
            &["p: {from: r, to: s}", "q: {from: p}", "r: {from: q}"],
            &[S],
            &["4:3: error: pipeline p: a cycle: p -> r -> q -> p"],
        ),
        (
            &["p: {from: a, to: s, steps: [{pass: {with: q}}]}", "q: {from: p}"],
            &[S],
            &["4:3: error: pipeline p: a cycle: p -> q -> p"],
        ),
        (&["q: {from: p, to: s}", "p: {from: a}"], &[S], &[]),
        (
            &["a: {from: a, to: s}"],
            &[S],
            &[
                "4:3: error: pipeline a: `a` is a source already; sources and pipelines share their names",
                "4:3: error: pipeline a: a cycle: a -> a",
            ],
        ),
    ]);
}

#[test]
fn several_inputs_need_equal_types_where_they_share_a_column() {
    for (other, expected) in [
        ("n: int", vec![]),
        ("m: string", vec![]),
        (
            "n: string",
            vec![
                "5:17: error: pipeline p: column `n` is int in `a` and string in `b` hint: make the types equal, or rename one \
             with a `select` step",
            ],
        ),
    ] {
        let b = format!("b: {{type: table, fields: {{{other}}}}}");
        let text = file(&[&format!("a: {A}"), &b], &["p: {from: [a, b], to: s}"], &[S]);
        assert_eq!(problems(&text), expected, "{text}");
    }
}

#[test]
fn the_keys_of_a_source_are_checked_against_its_columns_and_kind() {
    for (keys, expected) in [
        ("event_time: {field: ts}", vec![]),
        (
            "event_time: {field: n}",
            vec![
                "2:73: error: source a: `n` is int, not a timestamp hint: give it the type `timestamp`, or `timestamp_ms` if it \
             is a number",
            ],
        ),
        ("event_time: {field: t}", vec!["2:73: error: source a: no column `t` here hint: did you mean `n`?"]),
        (
            "on_demand: true",
            vec!["2:64: error: source a: a `table` source cannot wait for demand: rows would be missed"],
        ),
        (
            "on_demand: true, polled: true",
            vec!["2:64: note: source a: `on_demand` has no effect: the sink `s` always wants the rows"],
        ),
        ("errors: s", vec![]),
        ("errors: q", vec!["2:61: error: source a: no sink `q` hint: did you mean `s`?"]),
    ] {
        let a = format!("a: {{type: table, fields: {{n: int, ts: timestamp}}, {keys}}}");
        let text = file(&[&a], &["p: {from: a, to: s}"], &[S]);
        assert_eq!(problems(&text), expected, "{text}");
    }
}

#[test]
fn a_path_or_a_history_folder_belongs_to_one() {
    let p = "p: {from: a, to: [s, t]}";
    for (source, s, t, expected) in [
        ("", "path: /s", "path: /t", vec![]),
        ("", "path: /s", "path: /s", vec!["7:3: error: sink t: the path `/s` is taken by sink s already"]),
        (", path: /s", "path: /s", "", vec!["6:3: error: sink s: the path `/s` is taken by source a already"]),
        (
            "",
            "path: /",
            "path: /api/v1/metrics/x/y",
            vec![
                "6:3: error: sink s: the path `/` belongs to the program itself",
                "7:3: error: sink t: the path `/api/v1/metrics/x/y` belongs to the program itself",
            ],
        ),
        (
            "",
            "path: /health",
            "path: /api/v1/stream",
            vec!["6:3: error: sink s: the path `/health` belongs to the program itself"],
        ),
        ("", "folder: h", "folder: i", vec![]),
        ("", "folder: h", "folder: /f/h", vec!["7:3: error: sink t: the folder `/f/h` is taken by sink s already"]),
        ("", "folder: h", "folder: ./h/", vec!["7:3: error: sink t: the folder `/f/./h/` is taken by sink s already"]),
    ] {
        let a = format!("a: {{type: table, fields: {{n: int}}{source}}}");
        let (s, t) = (format!("s: {{type: store, {s}}}"), format!("t: {{type: store, {t}}}"));
        let text = file(&[&a], &[p], &[&s, &t]);
        assert_eq!(problems(&text), expected, "{text}");
    }
}

#[test]
fn the_user_is_told_what_goes_nowhere_in_a_right_file() {
    check_cases(&[
        (
            &[],
            &[S],
            &[
                "2:3: note: source a: no pipeline reads this source",
                "5:3: note: sink s: no pipeline writes to this sink",
            ],
        ),
        (
            &["p: {from: a}"],
            &[],
            &["4:3: note: pipeline p: its rows go nowhere: it has no `to`, and no pipeline reads it"],
        ),
        (&["p: {from: a}", "q: {from: p, to: s}"], &[S], &[]),
    ]);
    let text = file(
        &["a: {type: table, fields: {n: int}, polled: true, on_demand: true}"],
        &["p: {from: a, to: s}"],
        &["s: {type: store, live: true}"],
    );
    assert_eq!(problems(&text), Vec::<String>::new(), "a live sink keeps nothing awake");
}

#[test]
fn errors_in_one_place_hide_none_in_another() {
    check_cases(&[
        (
            &[
                "p: {from: a, to: s, steps: [{pass: {column: x1}}, {pass: {colum: n}}]}",
                "q: {from: a, to: s, steps: [{pass: {column: x2}}]}",
                "r: {from: p, to: s, steps: [{pass: {columm: n}}], key: n}",
                "t: {from: a, to: nowhere_at_all, key: x3}",
            ],
            &["s: {type: store, fold: x}"],
            &[
                "4:47: error: pipeline p step 1 (pass): no column `x1` here hint: one of `n`, `ts`",
                "4:61: error: pipeline p step 2 (pass): unknown key `colum` hint: did you mean `column`?",
                "5:47: error: pipeline q step 1 (pass): no column `x2` here hint: one of `n`, `ts`",
                "6:39: error: pipeline r step 1 (pass): unknown key `columm` hint: did you mean `column`?",
                "7:20: error: pipeline t: no sink `nowhere_at_all` hint: one of `s`",
                "7:41: error: pipeline t: no column `x3` here hint: one of `n`, `ts`",
                "9:20: error: sink s: unknown key `fold` hint: one of `path`, `folder`, `live`",
            ],
        ),
        (
            &["p: {from: [b, a, c], to: s}"],
            &[S],
            &[
                "4:14: error: pipeline p: no source or pipeline `b` hint: did you mean `a`?",
                "4:20: error: pipeline p: no source or pipeline `c` hint: did you mean `a`?",
            ],
        ),
    ]);
}

#[test]
fn a_sink_named_twice_gets_the_rows_once() {
    let mut problems = Problems::default();
    let text = file(&[&format!("a: {A}")], &["p: {from: a, to: [s, t, s]}"], &[S, "t: {type: store}"]);
    let file = pipelines::parse(&text, Path::new("/f"), &|_| None, &mut problems);
    let graph = check(&file, &PLUGINS, &mut problems).expect("a graph");
    assert_eq!(graph.pipelines[0].to, [0, 1]);
    assert!(graph.sinks.iter().all(|sink| sink.inputs.len() == 1));
}
