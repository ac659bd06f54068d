//! The file source through its traits, over files of all formats.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use ::parquet::arrow::ArrowWriter;
use arrow::array::{
    ArrayRef, DictionaryArray, Int32Array, RecordBatch, StringArray, StringViewArray, StructArray,
    TimestampNanosecondArray, UInt64Array,
};
use arrow::datatypes::{DataType, Field, Int32Type, Schema};
use pipeline::config::{Problems, deserialize, tree};
use pipeline::error::Retry;
use pipeline::http::Routes;
use pipeline::json::encode_rows;
use pipeline::status::Status;

use super::*;

fn config(yaml: &str) -> FileConfig {
    let node = tree::parse(yaml).expect("YAML");
    let mut problems = Problems::default();
    let mut cx = CheckContext::new(&mut problems, "source example", node.position, Path::new("."));
    let config = deserialize::read(&node, &mut cx);
    config.unwrap_or_else(|| panic!("{problems:?}"))
}

/// What `check` says, one line per problem.
fn problems(yaml: &str) -> Vec<String> {
    let mut problems = Problems::default();
    let config = config(yaml);
    config.check(&mut CheckContext::new(
        &mut problems,
        "source example",
        tree::parse(yaml).expect("YAML").position,
        Path::new("."),
    ));
    problems.sorted().into_iter().map(|problem| problem.message.clone()).collect()
}

fn context(folder: &Path) -> SourceContext {
    SourceContext {
        name: "example".into(),
        folder: folder.to_path_buf(),
        state_dir: folder.to_path_buf(),
        routes: Routes::default(),
        status: Arc::new(Status::default()),
    }
}

/// Everything that was read: rows as JSON, messages of errors, and the position after each batch with the number
/// of rows and errors until then.
#[derive(Debug, Default, PartialEq)]
struct Read {
    rows: Vec<String>,
    errors: Vec<String>,
    positions: Vec<(Vec<u8>, usize, usize)>,
}

impl Read {
    fn take(&mut self, pulled: &Pulled) {
        self.rows.extend(encode_rows(&pulled.rows).iter().map(str::to_owned));
        self.errors.extend(pulled.errors.iter().map(|error| error.message.clone()));
        self.positions.push((pulled.position.clone(), self.rows.len(), self.errors.len()));
    }
}

/// Reads from `position` to the end.
async fn read(config: &FileConfig, folder: &Path, position: Option<&[u8]>) -> Result<Read> {
    let mut source = config.build(context(folder))?;
    let Reader::Pull(mut reader) = source.connect(position).await? else { panic!("a pull source") };
    let mut read = Read::default();
    while let Some(pulled) = reader.next().await? {
        read.take(&pulled);
    }
    Ok(read)
}

fn scratch() -> tempfile::TempDir {
    tempfile::tempdir().expect("a folder")
}

fn write_parquet(path: &Path, columns: Vec<(&str, ArrayRef)>) {
    let fields: Vec<Field> =
        columns.iter().map(|(name, array)| Field::new(*name, array.data_type().clone(), true)).collect();
    let arrays = columns.into_iter().map(|(_, array)| array).collect();
    let rows = RecordBatch::try_new(Arc::new(Schema::new(fields)), arrays).expect("rows");
    let mut writer =
        ArrowWriter::try_new(std::fs::File::create(path).expect("a file"), rows.schema(), None).expect("writer");
    writer.write(&rows).expect("rows are written");
    writer.close().expect("the file is closed");
}

/// 20,000 rows in two files of each format: several batches, several reads, every thousandth row wrong.
fn write_many(folder: &Path) {
    for (file, numbers) in [("1", 0..13_000u64), ("2", 13_000..20_000)] {
        let is_wrong = |n: u64| n % 1000 == 7;
        let name = |n: u64| format!("row {n} {}", "x".repeat((n % 200) as usize));
        let json = |n| match is_wrong(n) {
            true => format!("{{\"n\":\"{n}\"}}\n"),
            false => format!("{{\"n\":{n},\"name\":\"{}\"}}\r\n", name(n)),
        };
        let csv = |n| match is_wrong(n) {
            true => format!("a,,{n}\n"),
            false => format!("\"{}\n\"\"second\"\" line\",{n}\r\n", name(n)),
        };
        let text: String = numbers.clone().map(json).collect();
        std::fs::write(folder.join(format!("{file}.ndjson")), text).expect("a file");
        let text: String = numbers.clone().map(csv).collect();
        std::fs::write(
            folder.join(format!("{file}.csv")),
            format!(
                "name,n
{text}"
            ),
        )
        .expect("a file");
        let column = |n| if is_wrong(n) { u64::MAX } else { n };
        let columns: Vec<(&str, ArrayRef)> = vec![
            ("name", Arc::new(numbers.clone().map(|n| Some(name(n))).collect::<StringArray>())),
            ("n", Arc::new(numbers.map(column).collect::<UInt64Array>())),
        ];
        write_parquet(&folder.join(format!("{file}.parquet")), columns);
    }
}

#[tokio::test]
async fn every_format_resumes_after_every_batch_with_each_row_once() {
    let folder = scratch();
    write_many(folder.path());
    for extension in ["ndjson", "csv", "parquet"] {
        let config = config(&format!("path: '*.{extension}'\nfields: {{n: int, name: string}}"));
        let whole = read(&config, folder.path(), None).await.expect(extension);
        assert_eq!((whole.rows.len(), whole.errors.len()), (19_980, 20), "{extension}: {:?}", whole.errors);
        let first_of_second = whole.rows.iter().position(|row| row.starts_with("{\"n\":13000,")).expect("row 13000");
        assert_eq!(first_of_second, 12_987);
        assert!(whole.positions.len() >= 3, "several batches");
        for (position, rows, errors) in &whole.positions {
            let rest = read(&config, folder.path(), Some(position)).await.expect("the rest");
            assert!(rest.rows == whole.rows[*rows..], "{extension} after {rows} rows");
            assert_eq!(rest.errors, whole.errors[*errors..], "{extension} after {rows} rows");
        }
    }
}

#[test]
fn paced_rows_come_when_due_and_resume_in_the_middle_of_a_batch() {
    let folder = scratch();
    let line = |second: u32| match second {
        3 | 7 => "oops\n".to_owned(),
        _ => format!("{{\"ts\":\"2026-11-20T12:00:{second:02}Z\"}}\n"),
    };
    let text: String = (0..10).map(line).collect();
    std::fs::write(folder.path().join("a.json"), text).expect("a file");
    let config = config("path: a.json\nfields: {ts: timestamp}\nspeed: 1x\ntime: ts");
    let layout = Arc::new(config.layout().expect("a layout"));
    let start = |position: Option<&[u8]>| {
        let files = files::find(folder.path(), "a.json").expect("the file");
        let position = position.map(|bytes| Position::decode(bytes).expect("a position"));
        Walk::start(Arc::clone(&layout), files, position, Some((0, 1.0))).expect("a walk")
    };
    let began = Instant::now();
    let mut walk = start(None);
    let mut whole = Read::default();
    for second in 0..10 {
        if let Some(pulled) = walk.next(began + Duration::from_secs(second)).expect("rows") {
            whole.take(&pulled);
        }
        let seconds_without = [0, 0, 0, 1, 1, 1, 1, 2, 2, 2][second as usize];
        assert_eq!(whole.rows.len(), second as usize + 1 - seconds_without, "after {second} s");
    }
    assert!(walk.next(began).expect("the end").is_none());
    assert_eq!(whole.errors.len(), 2);
    for (position, rows, errors) in &whole.positions {
        let (mut walk, mut rest) = (start(Some(position)), Read::default());
        while let Some(pulled) = walk.next(began + Duration::from_secs(rest.positions.len() as u64)).expect("rows") {
            rest.take(&pulled);
            assert!(rest.positions.len() < 20, "no end");
        }
        assert_eq!(rest.rows, whole.rows[*rows..], "after {rows} rows");
        assert_eq!(rest.errors, whole.errors[*errors..], "after {rows} rows");
    }
}

/// A name for messages, the YAML below `path` and `fields: {n: int, s: string}`, the file, the rows, and what errors
/// start with.
type Case<'a> = (&'a str, &'a str, &'a [u8], &'a [&'a str], &'a [&'a str]);

async fn check(file: &str, cases: &[Case<'_>]) {
    for (case, options, text, rows, errors) in cases {
        let folder = scratch();
        std::fs::write(folder.path().join(file), text).expect("a file");
        let config = config(&format!("path: {file}\nfields: {{n: int, s: string}}\n{options}"));
        let read = read(&config, folder.path(), None).await.expect(case);
        assert_eq!(read.rows, *rows, "{case}");
        assert_eq!(read.errors.len(), errors.len(), "{case}: {:?}", read.errors);
        for (error, expected) in read.errors.iter().zip(*errors) {
            assert!(error.starts_with(expected), "{case}: {error}");
        }
    }
}

#[tokio::test]
async fn json_lines_are_read_and_wrong_ones_named_by_their_line() {
    let huge = format!("{{\"n\":1}}\n{{\"s\":\"{}\"}}\n{{\"n\":3}}", "x".repeat(3 << 20));
    check(
        "a.json",
        &[
            ("empty", "", b"", &[], &[]),
            ("only blank lines", "", b"\n \r\n", &[], &[]),
            (
                "no end of the last line",
                "",
                b"{\"n\":1}\n{\"n\":2}",
                &["{\"n\":1,\"s\":null}", "{\"n\":2,\"s\":null}"],
                &[],
            ),
            (
                "byte order mark and CR LF",
                "",
                b"\xef\xbb\xbf{\"n\":1}\r\n\r\n{\"s\":\"a\"}\r\n",
                &["{\"n\":1,\"s\":null}", "{\"n\":null,\"s\":\"a\"}"],
                &[],
            ),
            (
                "wrong lines",
                "",
                b"{\"n\":\"1\"}\n{\"n\":2}\n\n{\"n\":\n[1]\n{\"s\":\"\xff\"}\n",
                &["{\"n\":2,\"s\":null}"],
                &[
                    "a.json:1: field `n`: expected int, found \"1\"",
                    "a.json:4: malformed JSON",
                    "a.json:5: invalid type",
                    "a.json:6: not UTF-8",
                ],
            ),
            (
                "a huge line",
                "",
                huge.as_bytes(),
                &["{\"n\":1,\"s\":null}", "{\"n\":3,\"s\":null}"],
                &["a.json:2: longer than"],
            ),
        ],
    )
    .await;
}

#[tokio::test]
async fn csv_records_are_read_and_wrong_ones_named_by_their_line() {
    let huge = format!("n,s\n1,a\n2,\"{}\n3,c\n", "x".repeat(3 << 20));
    check(
        "a.csv",
        &[
            ("empty", "", b"", &[], &[]),
            ("only a header", "", b"n,s\n", &[], &[]),
            ("other order and more columns", "", b"x,s,n\n9,a,1", &["{\"n\":1,\"s\":\"a\"}"], &[]),
            ("empty cells", "", b"n,s\n,\n", &["{\"n\":null,\"s\":\"\"}"], &[]),
            ("no header", "header: false", b"1,a\r\n2,b\r\n", &["{\"n\":1,\"s\":\"a\"}", "{\"n\":2,\"s\":\"b\"}"], &[]),
            ("delimiter", "delimiter: ';'", b"n;s\n1;a,b\n", &["{\"n\":1,\"s\":\"a,b\"}"], &[]),
            ("tab", "delimiter: tab", b"n\ts\n1\ta\n", &["{\"n\":1,\"s\":\"a\"}"], &[]),
            (
                "quotes with delimiters, quotes and line ends",
                "",
                b"\xef\xbb\xbf\"n\",s\r\n1,\"a,\"\"b\"\"\r\nc\"\r\n\r\n\"2\",5\" disk",
                &["{\"n\":1,\"s\":\"a,\\\"b\\\"\\r\\nc\"}", "{\"n\":2,\"s\":\"5\\\" disk\"}"],
                &[],
            ),
            (
                "wrong cells and too few",
                "",
                b"n,s\n1,\"a\nb\"\nx,c\n\n3\n4,d,e\n5,\xff\n6,f\n",
                &["{\"n\":1,\"s\":\"a\\nb\"}", "{\"n\":6,\"s\":\"f\"}"],
                &[
                    "a.csv:4: field `n`: expected int, found `x`",
                    "a.csv:6: expected 2 cells, found 1",
                    "a.csv:7: expected 2 cells, found 3",
                    "a.csv:8: field `s`: not UTF-8",
                ],
            ),
            (
                "a quote that is not closed",
                "",
                b"n,s\n1,\"a\n2,b\n3,c\n",
                &["{\"n\":2,\"s\":\"b\"}", "{\"n\":3,\"s\":\"c\"}"],
                &["a.csv:2: a quote is not closed"],
            ),
            (
                "a huge record",
                "",
                huge.as_bytes(),
                &["{\"n\":1,\"s\":\"a\"}", "{\"n\":3,\"s\":\"c\"}"],
                &["a.csv:3: longer than"],
            ),
        ],
    )
    .await;
}

#[tokio::test]
async fn parquet_columns_are_cast_to_the_declared_types() {
    let folder = scratch();
    let naive: ArrayRef = Arc::new(TimestampNanosecondArray::from(vec![Some(1_001), None, Some(0)]));
    let words: DictionaryArray<Int32Type> = ["a", "b", "a"].into_iter().collect();
    let inner: ArrayRef = Arc::new(Int32Array::from(vec![1, 2, 3]));
    let outer = StructArray::new(
        vec![Field::new("x", DataType::Int32, true)].into(),
        vec![inner],
        Some(vec![true, false, true].into()),
    );
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("n", Arc::new(UInt64Array::from(vec![1, 2, u64::MAX]))),
        ("t", naive),
        ("word", Arc::new(words)),
        ("view", Arc::new(StringViewArray::from(vec!["2026-11-20T12:00:00Z"; 3]))),
        ("a", Arc::new(outer)),
        ("ms", Arc::new(Int32Array::from(vec![5, 6, 7]))),
    ];
    write_parquet(&folder.path().join("a.parquet"), columns);
    let fields = "{n: int, t: timestamp, word: string, view: timestamp, x: {type: float, path: a.x}, ms: timestamp_ms}";
    let config_of = |fields: &str| config(&format!("path: a.parquet\nfields: {fields}"));
    let found = read(&config_of(fields), folder.path(), None).await.expect("rows");
    assert_eq!(
        found.rows,
        [
            r#"{"n":1,"t":"1970-01-01T00:00:00.000001Z","word":"a","view":"2026-11-20T12:00:00.000Z","x":1.0,"ms":"1970-01-01T00:00:00.005Z"}"#,
            r#"{"n":2,"t":null,"word":"b","view":"2026-11-20T12:00:00.000Z","x":null,"ms":"1970-01-01T00:00:00.006Z"}"#,
        ]
    );
    assert_eq!(found.errors, ["a.parquet: row 3: field `n`: expected int, found 18446744073709551615"]);
    for (fields, expected) in [
        ("{wort: string}", "`a.parquet` has no column `wort` (did you mean `word`?)"),
        ("{word: int}", "`a.parquet`: field `word`: expected int, the column is Dictionary(Int32, Utf8)"),
        ("{ms: timestamp}", "`a.parquet`: field `ms`: expected timestamp, the column is Int32"),
    ] {
        let error = read(&config_of(fields), folder.path(), None).await.expect_err(fields);
        assert!(error.to_string().starts_with(expected), "{error}");
    }
    let discovered = config("path: a.parquet").discover(context(folder.path())).await.expect("fields");
    let expected =
        "fields:\n  n: int\n  t: timestamp\n  word: string\n  view: string\n  a_x: {type: int, path: a.x}\n  ms: int\n";
    assert_eq!(discovered.to_string(), expected);
}

#[tokio::test]
async fn fields_are_found_out_from_the_first_rows() {
    let folder = scratch();
    let json = "{\"id\":\"a\",\"n\":1,\"x\":1,\"ts\":\"2026-11-20T12:00:00Z\",\"day\":\"2026-11-20\",\"mixed\":1,\"my.key\":true}\n\
                oops\n{\"n\":null,\"x\":1.5,\"mixed\":\"b\",\"deep\":{\"a\":1},\"none\":null}\n";
    std::fs::write(folder.path().join("a.json"), json).expect("a file");
    let csv = "Latency (ms),code,on,when\n1.5,007,true,2026-11-20 12:00:00\n2,,false,\n";
    std::fs::write(folder.path().join("a.csv"), csv).expect("a file");
    for (yaml, expected) in [
        (
            "path: a.json",
            "fields:\n  id: string\n  n: int\n  x: float\n  ts: timestamp\n  day: date\n  mixed: json\n  \
             my_key: {type: bool, path: my.key}\n  deep: json\n  none: string\n",
        ),
        (
            "path: a.csv",
            "fields:\n  Latency__ms_: {type: float, path: Latency (ms)}\n  code: string\n  on: bool\n  when: timestamp\n",
        ),
    ] {
        let fields = config(yaml).discover(context(folder.path())).await.expect(yaml);
        assert_eq!(fields.to_string(), expected);
    }
}

#[tokio::test]
async fn files_that_cannot_be_read_are_fatal_and_named() {
    let folder = scratch();
    for (name, text) in [
        ("array.json", "[{\"n\":1}]"),
        ("short.csv", "a,b\n1,2\n"),
        ("bad.parquet", "no Parquet"),
        ("u16.csv", "\u{0}"),
    ] {
        std::fs::write(folder.path().join(name), text).expect("a file");
    }
    std::fs::write(folder.path().join("u16.csv"), b"\xff\xfea\0").expect("a file");
    let at = |file: &str, offset| {
        Position { file: file.to_owned(), place: Place { offset, ..Place::default() }, taken: 0 }.encode()
    };
    let (gone, beyond) = (at("gone.json", 0), at("short.csv", 1000));
    for (path, position, expected) in [
        ("none.json", None, "there is no file `none.json`"),
        ("*.jsonl", None, "no file matches `*.jsonl`"),
        ("array.json", None, "`array.json` is one JSON array"),
        ("short.csv", None, "`short.csv` has no column `n`"),
        ("bad.parquet", None, "`bad.parquet` cannot be read as Parquet"),
        ("u16.csv", None, "`u16.csv` is UTF-16"),
        ("array.json", Some(&gone), "`gone.json` was being read and is not there now"),
        ("short.csv", Some(&beyond), "`short.csv` was read up to byte 1000 before and has only 8 now"),
    ] {
        let fields = if position.is_some() { "{a: int}" } else { "{n: int}" };
        let config = config(&format!("path: '{path}'\nfields: {fields}"));
        let error = read(&config, folder.path(), position.map(Vec::as_slice)).await.expect_err(path);
        assert!(error.to_string().starts_with(expected), "{error}");
        assert_eq!(error.retry, Retry::Never, "{path}");
    }
}

/// Reads a file, and reads on after a restart when it has become another text.
async fn read_on(name: &str, first: &str, then: &str) -> (Read, Result<Read>) {
    let folder = scratch();
    let config = config(&format!("path: {name}\nfields: {{a: int, b: int}}"));
    std::fs::write(folder.path().join(name), first).expect("a file");
    let before = read(&config, folder.path(), None).await.expect("rows");
    std::fs::write(folder.path().join(name), then).expect("a file");
    let position = before.positions.last().map(|(position, ..)| position.clone());
    let after = read(&config, folder.path(), position.as_deref()).await;
    (before, after)
}

#[tokio::test]
async fn a_last_line_without_end_counts_once_whether_it_was_whole_or_not() {
    const WHOLE: &str = r#"{"a":1,"b":2}"#;
    const NEXT: &str = r#"{"a":3,"b":4}"#;
    let cut = WHOLE.len() - 2;
    for (file, first, then, rows, errors) in [
        // JSON that was whole: nothing, its end, its end and more.
        ("f.json", WHOLE.to_owned(), WHOLE.to_owned(), [vec![WHOLE], vec![]], [0, 0]),
        ("f.json", WHOLE.to_owned(), format!("{WHOLE}\n"), [vec![WHOLE], vec![]], [0, 0]),
        ("f.json", WHOLE.to_owned(), format!("{WHOLE}\r\n{NEXT}"), [vec![WHOLE], vec![NEXT]], [0, 0]),
        ("f.json", WHOLE.to_owned(), format!("{WHOLE} x\n{NEXT}\n"), [vec![WHOLE], vec![NEXT]], [0, 1]),
        // JSON that was cut off: still, whole, and whole with more.
        ("f.json", WHOLE[..cut].to_owned(), WHOLE[..cut].to_owned(), [vec![], vec![]], [1, 0]),
        ("f.json", WHOLE[..cut].to_owned(), WHOLE[..cut + 1].to_owned(), [vec![], vec![]], [1, 1]),
        ("f.json", WHOLE[..cut].to_owned(), WHOLE.to_owned(), [vec![], vec![WHOLE]], [1, 0]),
        (
            "f.json",
            format!("{NEXT}\n{}", &WHOLE[..cut]),
            format!("{NEXT}\n{WHOLE}\n{NEXT}\n"),
            [vec![NEXT], vec![WHOLE, NEXT]],
            [1, 0],
        ),
        // A record that was whole, was cut off before its last cell, or in it.
        ("f.csv", "a,b\n1,2".to_owned(), "a,b\n1,2\n3,4\n".to_owned(), [vec![WHOLE], vec![NEXT]], [0, 0]),
        ("f.csv", "a,b\n1".to_owned(), "a,b\n1,2\n3,4\n".to_owned(), [vec![], vec![WHOLE, NEXT]], [1, 0]),
        ("f.csv", "a,b\n1,\"2".to_owned(), "a,b\n1,\"2\"\n3,4\n".to_owned(), [vec![], vec![WHOLE, NEXT]], [1, 0]),
        ("f.csv", "a,b\n1,2".to_owned(), "a,b\n1,25\n3,4\n".to_owned(), [vec![WHOLE], vec![NEXT]], [0, 1]),
        ("f.csv", "a,b\n1,2".to_owned(), "a,b\n1,25".to_owned(), [vec![WHOLE], vec![]], [0, 1]),
    ] {
        let (before, after) = read_on(file, &first, &then).await;
        let after = after.expect("the same file");
        assert_eq!([&before.rows[..], &after.rows[..]], [&rows[0][..], &rows[1][..]], "{first:?} {then:?}");
        assert_eq!(
            [before.errors.len(), after.errors.len()],
            errors,
            "{then:?} {:?} {:?}",
            before.errors,
            after.errors
        );
    }
    let (_, after) = read_on("f.csv", "a,b\n1,2", "a,b\n1,25\n3,x\n").await;
    let errors = after.expect("the same file").errors;
    assert!(errors[0].starts_with("f.csv:2: this was added to the line"), "{errors:?}");
    assert!(errors[1].starts_with("f.csv:3: field `b`"), "{errors:?}");
    let (_, after) = read_on("f.json", WHOLE, &format!("{WHOLE} x\nx\n")).await;
    let errors = after.expect("the same file").errors;
    assert!(errors[0].starts_with("f.json:1: this was added to the line"), "{errors:?}");
    assert!(errors[1].starts_with("f.json:2: "), "{errors:?}");
}

#[test]
fn a_position_outlives_other_options_unless_it_counts_rows() {
    let identity = |yaml: &str| config(yaml).identity();
    let known = identity("path: a.json\nfields: {n: int}");
    assert!(known.is_some());
    assert_eq!(identity("path: a.json\nfields: {n: float, s: string}"), known);
    assert_ne!(identity("path: b.json\nfields: {n: int}"), known);
    // All options, that is.
    assert_eq!(identity("path: a.json\nfields: {t: timestamp}\nspeed: 2x\ntime: t"), None);
}

#[tokio::test]
async fn another_file_in_the_place_of_the_one_that_was_read_is_told() {
    let lines = |count: usize, b: usize| (0..count).map(|a| format!("{{\"a\":{a},\"b\":{b}}}\n")).collect::<String>();
    let (_, after) = read_on("f.json", &lines(100, 1), &lines(200, 1)).await;
    assert_eq!(after.expect("it has grown").rows.len(), 100);
    let (_, after) = read_on("f.json", &lines(100, 1), &lines(200, 2)).await;
    let error = after.expect_err("another file");
    assert!(error.to_string().starts_with("`f.json` is not the file that was read up to byte 1490 before"), "{error}");
    assert_eq!(error.retry, Retry::Never);
    let (_, after) = read_on("f.csv", "a,b\n1,2\n", "other,b,and,a,long,header\n1,2,3,4,5,6\n").await;
    assert!(after.expect_err("another file").to_string().contains("`f.csv` is not the file"));
}

#[tokio::test]
async fn another_parquet_file_in_the_place_of_the_one_that_was_read_is_told() {
    let folder = scratch();
    let path = folder.path().join("f.parquet");
    let numbers =
        |values: std::ops::Range<i32>| vec![("n", Arc::new(Int32Array::from_iter_values(values)) as ArrayRef)];
    write_parquet(&path, numbers(0..100));
    let config = config("path: f.parquet\nfields: {n: int}");
    let position = read(&config, folder.path(), None).await.expect("rows").positions[0].0.clone();
    assert_eq!(read(&config, folder.path(), Some(&position)).await.expect("the same file").rows.len(), 0);
    write_parquet(&path, numbers(1..201));
    let error = read(&config, folder.path(), Some(&position)).await.expect_err("another file").to_string();
    assert!(error.starts_with("`f.parquet` is not the file that was read up to row 100 before"), "{error}");
}

#[tokio::test]
async fn a_position_without_a_mark_is_read_on_from() {
    let folder = scratch();
    std::fs::write(folder.path().join("f.json"), "{\"a\":1}\n{\"a\":2}\n").expect("a file");
    let config = config("path: f.json\nfields: {a: int}");
    let mut position = pipeline::state::StateWriter::default();
    position.u64(1);
    position.str("f.json");
    [8, 1, 0].into_iter().for_each(|number| position.u64(number));
    let read = read(&config, folder.path(), Some(&position.finish())).await.expect("rows");
    assert_eq!(read.rows, [r#"{"a":2}"#]);
}

#[test]
fn check_finds_what_does_not_fit_together() {
    let with = |options: &str| problems(&format!("path: a.csv\nfields: {{n: int, ts: timestamp}}\n{options}"));
    for (found, expected) in [
        (problems(FileConfig::EXAMPLE.trim_start_matches("type: file\n")), vec![]),
        (problems("path: a.csv"), vec!["`fields` is missing"]),
        (problems("path: a.json.gz\nfields: {n: int}"), vec!["compressed files (`.gz`) are not read; unpack it first"]),
        (problems("path: a.log\nfields: {n: int}"), vec!["the name of `a.log` tells no format"]),
        (problems("path: a.log\nformat: json\nfields: {n: int}"), vec![]),
        (problems("path: a.json\nheader: true\nfields: {n: int}"), vec!["`header` and `delimiter` are for csv files"]),
        (with("delimiter: ab"), vec!["`ab` cannot be the delimiter; it is one ASCII character, or `tab`"]),
        (with("speed: 60x"), vec!["`speed: 60x` needs `time`"]),
        (with("speed: 60x\ntime: ts"), vec![]),
        (with("speed: 60x\ntime: n"), vec!["`n` is int; the pace needs a timestamp"]),
        (with("speed: 60x\ntime: t"), vec!["`t` is not among `fields`"]),
        (with("time: ts"), vec!["`time` has no effect with `speed: max`"]),
    ] {
        assert_eq!(found, expected);
    }
}
