//! The redis source and sink against a real server, driven as the engine drives them.

use std::path::Path;
use std::sync::Arc;

use pipeline::config::{CheckContext, Position, Problems, deserialize, tree};
use pipeline::error::{Error, Retry};
use pipeline::json::encode_rows;
use pipeline::live::Live;
use pipeline::plugin::operator::StreamShape;
use pipeline::plugin::{
    Acknowledger, OutboxSink, PullReader, Pulled, PushReader, Reader, Receipt, Record, Sink, SinkConfig, SinkContext,
    SinkInput, Source, SourceConfig, SourceContext,
};
use pipeline::rows::RowsBuilder;
use pipeline::status::Status;

use crate::support::redis::{Redis, Stall};
use crate::support::{PATIENCE, Scratch, free_port, wait_for};

pub(crate) type SourceOptions = sources::redis::RedisConfig;
type SinkOptions = sinks::redis::RedisConfig;

/// Reads and checks a source's block.
pub(crate) fn source_options(server: &Redis, yaml: &str) -> SourceOptions {
    source_options_at(&server.url(), yaml)
}

fn source_options_at(url: &str, yaml: &str) -> SourceOptions {
    let mut problems = Problems::default();
    let node = tree::parse(&format!("url: {url}\n{yaml}")).expect("YAML");
    let mut cx = CheckContext::new(&mut problems, "source test", Position::default(), Path::new("."));
    let options = deserialize::read::<SourceOptions>(&node, &mut cx);
    let checked = options.filter(|options| options.check(&mut cx).is_some());
    checked.unwrap_or_else(|| panic!("{yaml}: {}", problems.render("yaml")))
}

pub(crate) fn source_context() -> SourceContext {
    SourceContext {
        name: "test".to_owned(),
        folder: "/".into(),
        state_dir: "/".into(),
        routes: pipeline::http::Routes::default(),
        status: Arc::new(Status::default()),
    }
}

pub(crate) fn source(server: &Redis, yaml: &str) -> Box<dyn Source> {
    source_options(server, yaml).build(source_context()).expect("a source")
}

pub(crate) async fn pull(source: &mut Box<dyn Source>, position: Option<&[u8]>) -> Box<dyn PullReader> {
    match source.connect(position).await.expect("a connection") {
        Reader::Pull(reader) => reader,
        Reader::Push(..) => panic!("a pull reader was expected"),
    }
}

pub(crate) async fn push(source: &mut Box<dyn Source>) -> (Box<dyn PushReader>, Box<dyn Acknowledger>) {
    match source.connect(None).await.expect("a connection") {
        Reader::Push(reader, acknowledger) => (reader, acknowledger),
        Reader::Pull(_) => panic!("a push reader was expected"),
    }
}

pub(crate) fn json(rows: &arrow::array::RecordBatch) -> Vec<String> {
    encode_rows(rows).iter().map(str::to_owned).collect()
}

pub(crate) async fn next(reader: &mut Box<dyn PullReader>) -> Pulled {
    reader.next().await.expect("rows").expect("no end")
}

/// Pulls until `count` rows are there; returns them and the last position.
pub(crate) async fn rows(reader: &mut Box<dyn PullReader>, count: usize) -> (Vec<String>, Vec<u8>) {
    let mut rows = Vec::new();
    loop {
        let pulled = next(reader).await;
        rows.extend(json(&pulled.rows));
        if rows.len() >= count {
            return (rows, pulled.position);
        }
    }
}

/// Takes records until `count` are there.
pub(crate) async fn records(reader: &mut Box<dyn PushReader>, count: usize) -> Vec<Record> {
    let mut records = Vec::new();
    while records.len() < count {
        records.extend(reader.next().await.expect("records"));
    }
    records
}

fn payloads(records: &[Record]) -> Vec<String> {
    records.iter().map(|record| String::from_utf8_lossy(&record.payload).into_owned()).collect()
}

pub(crate) fn tokens(records: &[Record]) -> Vec<u64> {
    records.iter().map(|record| record.token).collect()
}

pub(crate) fn decoded(options: &SourceOptions, records: &[Record]) -> (Vec<String>, Vec<String>) {
    let decoded = options.decoder().expect("a decoder").decode(records).expect("rows");
    assert_eq!(decoded.record_of_row.len(), decoded.rows.num_rows());
    (json(&decoded.rows), decoded.errors.into_iter().map(|error| error.message).collect())
}

fn is_retried(error: &Error) -> bool {
    error.retry == Retry::BackOff
}

#[tokio::test]
async fn a_poll_is_one_row_of_all_replies() {
    let server = Redis::start();
    for command in [
        &["SET", "total", "1234"][..],
        &["SET", "rps", "45.67"],
        &["RPUSH", "queue", "a", "b"],
        &["HSET", "sensor", "t", "21.5", "unit", "C"],
        &["ZADD", "board", "1.5", "ann"],
        &["SET", "a key", "x"],
    ] {
        server.command(command);
    }
    let yaml = "every: 500ms\n\
        read: {total: GET total, rps: GET rps, depth: LLEN queue, t: HGET sensor t, all: HGETALL sensor, score: ZSCORE board ann, \
        missing: GET nothing, none: ZSCORE board bob, quoted: GET 'a key', queue: LRANGE queue 0 -1, clients: INFO clients}\n\
        fields: {total: int, rps: float, t: float, clients: {type: int, path: connected_clients}}";
    let mut reader = pull(&mut source(&server, yaml), None).await;
    let pulled = next(&mut reader).await;
    assert_eq!(pulled.errors, []);
    assert_eq!(
        json(&pulled.rows),
        [
            r#"{"total":1234,"rps":45.67,"depth":2,"t":21.5,"all":{"t":"21.5","unit":"C"},"score":1.5,"missing":null,"none":null,"quoted":"x","queue":["a","b"],"clients":1}"#
        ]
    );
    server.command(&["INCRBY", "total", "6"]);
    assert!(json(&next(&mut reader).await.rows)[0].starts_with(r#"{"total":1240,"#));
}

#[tokio::test]
async fn a_failed_command_leaves_its_column_null_and_the_others_go_on() {
    let server = Redis::start();
    server.command(&["RPUSH", "queue", "a"]);
    server.command(&["SET", "name", "ann"]);
    let yaml = "read: {wrong: GET queue, text: GET name, depth: LLEN queue}\nfields: {text: int}";
    let mut reader = pull(&mut source(&server, yaml), None).await;
    let pulled = next(&mut reader).await;
    assert_eq!(json(&pulled.rows), [r#"{"wrong":null,"text":null,"depth":1}"#]);
    let messages: Vec<&str> = pulled.errors.iter().map(|error| error.message.as_str()).collect();
    assert!(messages[0].starts_with("`GET queue`: WRONGTYPE"), "{messages:?}");
    assert_eq!(messages[1], "`GET name`: field `text`: expected int, found `ann`");
    assert_eq!(messages.len(), 2);
}

#[tokio::test]
async fn a_poll_fails_when_the_server_is_gone_and_goes_on_when_it_is_back() {
    let mut server = Redis::start();
    server.command(&["SET", "n", "1"]);
    let mut source = source(&server, "read: {n: GET n}");
    let mut reader = pull(&mut source, None).await;
    next(&mut reader).await;
    server.kill();
    assert!(is_retried(&reader.next().await.expect_err("the server is gone")));
    // A command after the loss must not wait for ever.
    assert!(is_retried(&reader.next().await.expect_err("the connection stays closed")));
    let refused = source.connect(None).await.err().expect("nothing listens").to_string();
    assert!(refused.contains("cannot connect") && refused.contains("Connection refused"), "{refused}");
    server.restart();
    assert_eq!(json(&next(&mut pull(&mut source, None).await).await.rows), [r#"{"n":"1"}"#]);
}

#[tokio::test]
async fn types_are_guessed_from_replies_and_entries() {
    let server = Redis::start();
    server.command(&["SET", "n", "5"]);
    server.command(&["SET", "x", "5.5"]);
    server.command(&["XADD", "s", "*", "n", "1", "at", "2026-11-20T12:00:00Z", "body", r#"{"a":1,"b":{"c":2}}"#]);
    for (yaml, expected) in [
        ("read: {n: GET n, x: GET x, depth: LLEN q, none: GET none}", "n: int|x: float|depth: int|none: string"),
        ("stream: s", "n: int|at: timestamp|body: json"),
        ("stream: s\njson: body\nfields: {a: int}", "a: int|b: json"),
    ] {
        let fields = source_options(&server, yaml).discover(source_context()).await.expect("fields").to_string();
        let lines: Vec<&str> = fields.lines().skip(1).map(str::trim).collect();
        assert_eq!(lines.join("|"), expected);
    }
    assert!(source_options(&server, "list: q").discover(source_context()).await.is_err());
}

#[tokio::test]
async fn stream_entries_are_read_as_their_fields_say() {
    let server = Redis::start();
    server.command(&["XADD", "s", "1000-1", "device", "a", "x", "1.5", "body", r#"{"n":{"m":7}}"#]);
    server.command(&["XADD", "s", "1000-2", "device", "b", "x", "fast", "body", "no"]);
    server.command(&["XADD", "s", "1001-0", "device", "c", "body", r#"{"n":{"m":8}}"#]);
    for (yaml, expected, errors) in [
        (
            "columns: [id, time]\nfields: {device: string, x: float}",
            vec![
                r#"{"id":"1000-1","time":"1970-01-01T00:00:01.000Z","device":"a","x":1.5}"#,
                r#"{"id":"1001-0","time":"1970-01-01T00:00:01.001Z","device":"c","x":null}"#,
            ],
            vec!["s 1000-2: field `x`: expected float, found `fast`"],
        ),
        (
            "json: body\nfields: {m: {type: int, path: n.m}}",
            vec![r#"{"m":7}"#, r#"{"m":8}"#],
            vec!["s 1000-2: malformed JSON: expected ident at line 1 column 2"],
        ),
    ] {
        let mut reader = pull(&mut source(&server, &format!("stream: s\nstart: earliest\n{yaml}")), None).await;
        assert_eq!(next(&mut reader).await.rows.num_rows(), 0, "the first answer only names the beginning");
        let pulled = next(&mut reader).await;
        assert_eq!(json(&pulled.rows), expected);
        assert_eq!(pulled.errors.iter().map(|error| error.message.as_str()).collect::<Vec<_>>(), errors);
    }
    let mut reader = pull(&mut source(&server, "stream: s\nstart: 1000-2"), None).await;
    let (found, _) = rows(&mut reader, 1).await;
    assert_eq!(found, [r#"{"id":"1001-0","stream":"s","payload":{"device":"c","body":"{\"n\":{\"m\":8}}"}}"#]);
}

#[tokio::test]
async fn a_stream_goes_on_exactly_after_its_position() {
    let mut server = Redis::start();
    server.command(&["XADD", "a", "*", "n", "old"]);
    let yaml = "streams: [a, b]\nfields: {n: int}";
    let mut first = source(&server, yaml);
    let mut reader = pull(&mut first, None).await;
    let beginning = next(&mut reader).await.position;
    server.command(&["XADD", "a", "*", "n", "1"]);
    server.command(&["XADD", "b", "*", "n", "2"]);
    let (found, after_two) = rows(&mut reader, 2).await;
    assert_eq!(found, [r#"{"n":1}"#, r#"{"n":2}"#]);

    // Killed while the reader waits for entries: an error, no silence.
    let waiting = tokio::spawn(async move { reader.next().await.err() });
    server.kill();
    let error = waiting.await.expect("no panic").expect("the server is gone");
    assert!(is_retried(&error), "{error}");
    server.restart();
    server.command(&["XADD", "a", "*", "n", "3"]);
    let (found, after_three) = rows(&mut pull(&mut first, Some(&after_two)).await, 1).await;
    assert_eq!(found, [r#"{"n":3}"#]);

    // Another process with an older position sees the same entries again, and with the newest none of them.
    let (found, _) = rows(&mut pull(&mut source(&server, yaml), Some(&beginning)).await, 3).await;
    assert_eq!(found, [r#"{"n":1}"#, r#"{"n":3}"#, r#"{"n":2}"#]);
    let mut reader = pull(&mut source(&server, yaml), Some(&after_three)).await;
    server.command(&["XADD", "b", "*", "n", "4"]);
    assert_eq!(rows(&mut reader, 1).await.0, [r#"{"n":4}"#]);
}

#[tokio::test]
async fn a_stream_of_thousands_comes_whole_and_in_order() {
    let server = Redis::start();
    let script = "for i = 1, 10000 do redis.call('XADD', KEYS[1], i .. '-0', 'n', i) end";
    server.command(&["EVAL", script, "1", "s"]);
    let mut reader = pull(&mut source(&server, "stream: s\nstart: earliest\nfields: {n: int}"), None).await;
    let (found, _) = rows(&mut reader, 10_000).await;
    assert_eq!(found, (1..=10_000).map(|n| format!(r#"{{"n":{n}}}"#)).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_stream_of_another_type_is_an_error_with_its_name() {
    let server = Redis::start();
    server.command(&["SET", "s", "x"]);
    let error = source(&server, "stream: s").connect(None).await.err().expect("WRONGTYPE").to_string();
    assert!(error.contains("stream `s`: WRONGTYPE"), "{error}");
}

#[tokio::test]
async fn list_elements_come_again_until_they_are_acknowledged() {
    let mut server = Redis::start();
    let mut source = source(&server, "list: q");
    let (mut reader, mut acknowledger) = push(&mut source).await;
    server.command(&["LPUSH", "q", "1", "2", "3", "4", "5"]);
    let taken = records(&mut reader, 5).await;
    assert_eq!(payloads(&taken), ["1", "2", "3", "4", "5"]);
    acknowledger.acknowledge(&tokens(&taken[..2])).await.expect("acknowledged");
    assert_eq!(server.command(&["LRANGE", "q:processing", "0", "-1"]), "5\n4\n3");
    drop((reader, acknowledger));

    // What was not acknowledged comes first, then what is new; the server may crash in between.
    server.command(&["LPUSH", "q", "6"]);
    server.kill();
    server.restart();
    let (mut reader, mut acknowledger) = push(&mut source).await;
    let taken = records(&mut reader, 4).await;
    assert_eq!(payloads(&taken), ["3", "4", "5", "6"]);
    acknowledger.acknowledge(&tokens(&taken)).await.expect("acknowledged");
    assert_eq!(server.command(&["EXISTS", "q", "q:processing"]), "0");
}

#[tokio::test]
async fn a_server_killed_under_a_waiting_list_reader_is_an_error() {
    let mut server = Redis::start();
    let mut source = source(&server, "list: q");
    let (mut reader, mut acknowledger) = push(&mut source).await;
    server.command(&["LPUSH", "q", "1"]);
    let taken = records(&mut reader, 1).await;
    let waiting = tokio::spawn(async move { reader.next().await.err() });
    server.kill();
    assert!(is_retried(&waiting.await.expect("no panic").expect("the server is gone")));
    assert!(is_retried(&acknowledger.acknowledge(&tokens(&taken)).await.expect_err("the server is gone")));
    server.restart();
    let (mut reader, _acknowledger) = push(&mut source).await;
    assert_eq!(payloads(&records(&mut reader, 1).await), ["1"]);
}

#[tokio::test]
async fn a_full_list_is_emptied_in_order_without_loss_or_repetition() {
    let server = Redis::start();
    server.command(&["EVAL", "for i = 1, 5000 do redis.call('RPUSH', KEYS[1], i) end", "1", "q"]);
    let (mut reader, mut acknowledger) = push(&mut source(&server, "list: q\npop: left\nprocessing: mine")).await;
    let mut taken = Vec::new();
    while taken.len() < 5000 {
        let records = reader.next().await.expect("records");
        acknowledger.acknowledge(&tokens(&records)).await.expect("acknowledged");
        taken.extend(payloads(&records));
    }
    assert_eq!(taken, (1..=5000).map(|n| n.to_string()).collect::<Vec<_>>());
    assert_eq!(server.command(&["EXISTS", "q", "mine"]), "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_lost_list_reader_had_under_way_takes_nothing_when_it_comes_late() {
    let server = Redis::start();
    server.command(&["EVAL", "for i = 1, 300 do redis.call('RPUSH', KEYS[1], i) end", "1", "q"]);
    let network = Stall::start(server.port);
    let options = source_options_at(&format!("redis://127.0.0.1:{}", network.port), "list: q\npop: left");
    let mut source = options.build(source_context()).expect("a source");
    let mut receipts = options.receipts().expect("receipts");
    let (mut reader, acknowledger) = push(&mut source).await;
    let mut received = Vec::new();
    let mut take = |records: &[Record]| {
        let new = records.iter().filter(|record| receipts.receive(record, 0) == Receipt::New);
        received.extend(payloads(&new.cloned().collect::<Vec<_>>()));
        received.len()
    };
    take(&records(&mut reader, 1).await);
    let late = network.hold();
    let sent = Arc::clone(&late);
    let is_sent = tokio::task::spawn_blocking(move || {
        wait_for("the reader to ask for more", || sent.holds_something().then_some(()));
    });
    tokio::select! {
        records = reader.next() => panic!("{records:?} through a network that is away"),
        sent = is_sent => sent.expect("it was sent"),
    }
    drop((reader, acknowledger));
    let (mut reader, mut acknowledger) = push(&mut source).await;
    tokio::task::block_in_place(|| late.release());
    let rest = async {
        loop {
            let records = records(&mut reader, 1).await;
            let count = take(&records);
            acknowledger.acknowledge(&tokens(&records)).await.expect("acknowledged");
            if count == 300 {
                break;
            }
        }
    };
    tokio::time::timeout(PATIENCE, rest).await.expect("every element");
    assert_eq!(received, (1..=300).map(|n| n.to_string()).collect::<Vec<_>>());
    assert_eq!(server.command(&["EXISTS", "q", "q:processing"]), "0");
    assert_eq!(server.command(&["HGET", "q:processing:count", "count"]), "300");
}

#[tokio::test]
async fn a_list_is_read_by_a_user_who_may_not_end_connections() {
    let server = Redis::start();
    server.command(&["ACL", "SETUSER", "reader", "on", ">secret", "~*", "+@all", "-client"]);
    server.command(&["LPUSH", "q", "1"]);
    let url = format!("redis://reader:secret@127.0.0.1:{}", server.port);
    let mut source = source_options_at(&url, "list: q").build(source_context()).expect("a source");
    for n in 1..3 {
        let (mut reader, mut acknowledger) = push(&mut source).await;
        let taken = records(&mut reader, 1).await;
        assert_eq!(payloads(&taken), [n.to_string()]);
        acknowledger.acknowledge(&tokens(&taken)).await.expect("acknowledged");
        server.command(&["LPUSH", "q", &(n + 1).to_string()]);
    }
}

#[tokio::test]
async fn an_element_that_was_not_read_is_not_confirmed() {
    let server = Redis::start();
    server.command(&["RPUSH", "q", "1", "2"]);
    let mut source = source(&server, "list: q\npop: left");
    let (mut reader, mut acknowledger) = push(&mut source).await;
    let taken = records(&mut reader, 2).await;
    // As a process does that uses the processing list, too.
    server.command(&["RPUSH", "q:processing", "other"]);
    let error = acknowledger.acknowledge(&tokens(&taken[..1])).await.expect_err("another element").to_string();
    assert!(error.contains("`q:processing`") && error.contains("does another process use it?"), "{error}");
    assert_eq!(server.command(&["LRANGE", "q:processing", "0", "-1"]), "2\n1\nother");
}

#[tokio::test]
async fn list_elements_are_read_as_json_or_passed_raw() {
    let server = Redis::start();
    for (yaml, expected, errors) in [
        ("list: q\nfields: {n: int}", vec![r#"{"n":1}"#, r#"{"n":2}"#], vec!["field `n`: expected int, found \"x\""]),
        (
            "list: q",
            vec![r#"{"payload":"{\"n\":1}"}"#, r#"{"payload":"{\"n\":\"x\"}"}"#, r#"{"payload":"{\"n\":2}"}"#],
            vec![],
        ),
    ] {
        server.command(&["LPUSH", "q", r#"{"n":1}"#, r#"{"n":"x"}"#, r#"{"n":2}"#]);
        let options = source_options(&server, yaml);
        let mut source = options.build(source_context()).expect("a source");
        let (mut reader, mut acknowledger) = push(&mut source).await;
        let taken = records(&mut reader, 3).await;
        acknowledger.acknowledge(&tokens(&taken)).await.expect("acknowledged");
        let (rows, messages) = decoded(&options, &taken);
        assert_eq!(rows, expected);
        assert_eq!(messages, errors);
    }
}

#[tokio::test]
async fn published_messages_arrive_with_their_channel() {
    let mut server = Redis::start();
    let yaml = "channels: [plain]\npatterns: ['news.*']\nfields: {n: int}";
    let options = source_options(&server, yaml);
    let mut source = options.build(source_context()).expect("a source");
    let (mut reader, _acknowledger) = push(&mut source).await;
    // Connected means subscribed: the very first message arrives.
    for (channel, message) in [("plain", r#"{"n":1}"#), ("news.a", r#"{"n":2}"#), ("other", "{}"), ("plain", "no")] {
        server.command(&["PUBLISH", channel, message]);
    }
    let (rows, errors) = decoded(&options, &records(&mut reader, 3).await);
    assert_eq!(rows, [r#"{"channel":"plain","n":1}"#, r#"{"channel":"news.a","n":2}"#]);
    assert_eq!(errors.len(), 1);

    let waiting = tokio::spawn(async move { reader.next().await.err() });
    server.kill();
    assert!(is_retried(&waiting.await.expect("no panic").expect("the server is gone")));
    server.restart();
    let (mut reader, _acknowledger) = push(&mut source).await;
    server.command(&["PUBLISH", "plain", r#"{"n":3}"#]);
    assert_eq!(payloads(&records(&mut reader, 1).await), [r#"{"n":3}"#]);
}

#[tokio::test]
async fn messages_beyond_the_limit_are_lost_and_reported() {
    let server = Redis::start();
    let options = source_options(&server, "channels: [c]");
    let mut source = options.build(source_context()).expect("a source");
    let (mut reader, _acknowledger) = push(&mut source).await;
    let publish = "for i = 1, 20000 do redis.call('PUBLISH', KEYS[1], i) end";
    server.command(&["EVAL", publish, "1", "c"]);
    let (mut rows, mut lost) = (0, 0);
    while rows + lost < 20_000 {
        let (decoded_rows, errors) = decoded(&options, &reader.next().await.expect("records"));
        rows += decoded_rows.len();
        for error in errors {
            lost += error.split(' ').next().and_then(|n| n.parse::<usize>().ok()).expect("a count");
        }
    }
    assert_eq!(rows + lost, 20_000);
}

#[tokio::test]
async fn a_password_is_needed_where_the_server_asks_for_one() {
    let server = Redis::with_options(&["--requirepass", "secret"]);
    for (user, expected) in [("", "NOAUTH"), (":wrong@", "WRONGPASS"), ("default:secret@", ""), (":secret@", "")] {
        let url = format!("redis://{user}127.0.0.1:{}/1", server.port);
        let node = tree::parse(&format!("url: {url}\nread: {{size: DBSIZE}}")).expect("YAML");
        let mut problems = Problems::default();
        let mut cx = CheckContext::new(&mut problems, "", Position::default(), Path::new("."));
        let options = deserialize::read::<SourceOptions>(&node, &mut cx).expect("options");
        let mut source = options.build(source_context()).expect("a source");
        match source.connect(None).await {
            Ok(_) => assert_eq!(expected, "", "{user}"),
            Err(error) => {
                let message = error.to_string();
                assert!(message.contains(expected) && message.contains("user or password"), "{user}: {message}");
                assert!(!expected.is_empty() && !message.contains("wrong@"), "{user}: {message}");
            }
        }
    }
}

#[tokio::test]
async fn tls_trusts_the_named_authority_and_nobody_else() {
    let folder = Scratch::new();
    let certificate = folder.path().join("server.pem");
    let key = folder.path().join("server.key");
    let request = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test \
                   -addext subjectAltName=IP:127.0.0.1 -addext basicConstraints=CA:FALSE";
    let mut openssl = std::process::Command::new("openssl");
    openssl.args(request.split_whitespace()).arg("-keyout").arg(&key).arg("-out").arg(&certificate);
    assert!(openssl.output().expect("openssl").status.success());
    let port = free_port();
    let certificate = certificate.to_str().expect("a path");
    let tls_port = port.to_string();
    let server = Redis::with_options(&[
        "--tls-port",
        &tls_port,
        "--tls-cert-file",
        certificate,
        "--tls-key-file",
        key.to_str().expect("a path"),
        "--tls-ca-cert-file",
        certificate,
        "--tls-auth-clients",
        "no",
    ]);
    server.command(&["SET", "n", "1"]);
    for (authority, trusted) in [(format!("ca: {certificate}\n"), true), (String::new(), false)] {
        let yaml = format!("url: rediss://127.0.0.1:{port}\n{authority}read: {{n: GET n}}");
        let mut problems = Problems::default();
        let mut cx = CheckContext::new(&mut problems, "", Position::default(), Path::new("."));
        let options = deserialize::read::<SourceOptions>(&tree::parse(&yaml).expect("YAML"), &mut cx).expect("options");
        assert!(options.check(&mut cx).is_some(), "{}", problems.render("yaml"));
        let mut source = options.build(source_context()).expect("a source");
        if trusted {
            assert_eq!(json(&next(&mut pull(&mut source, None).await).await.rows), [r#"{"n":"1"}"#]);
        } else {
            let error = source.connect(None).await.err().expect("an unknown authority").to_string();
            assert!(error.contains("UnknownIssuer") || error.contains("no certificate to trust"), "{error}");
        }
    }
}

/// A sink over the columns `device: string, n: int, x: float`.
async fn sink(server: &Redis, yaml: &str) -> Box<dyn OutboxSink> {
    sink_of(server, yaml, &["load"]).await
}

/// A sink over pipelines of these names.
async fn sink_of(server: &Redis, yaml: &str, metrics: &[&str]) -> Box<dyn OutboxSink> {
    let mut problems = Problems::default();
    let node = tree::parse(&format!("url: {}\n{yaml}", server.url())).expect("YAML");
    let shape = StreamShape { schema: sink_rows(&[]).schema(), keys: Vec::new(), windowed: false };
    let input = |metric: &&str| SinkInput { metric: (*metric).to_owned(), shape: shape.clone() };
    let inputs: Vec<SinkInput> = metrics.iter().map(input).collect();
    let mut cx = CheckContext::new(&mut problems, "sink test", Position::default(), Path::new("."));
    let options = deserialize::read::<SinkOptions>(&node, &mut cx);
    let checked = options.filter(|options| options.check(&inputs, &mut cx).is_some());
    let options = checked.unwrap_or_else(|| panic!("{yaml}: {}", problems.render("yaml")));
    let context = SinkContext {
        name: "out".to_owned(),
        inputs,
        folder: "/".into(),
        routes: pipeline::http::Routes::default(),
        live: Arc::new(Live::new("epoch".to_owned(), Arc::new(Status::default()), [])),
        tails: Vec::new(),
    };
    let Sink::Outbox(mut sink, _) = options.build(context).expect("a sink") else {
        panic!("an outbox sink was expected")
    };
    sink.connect().await.expect("a connection");
    sink
}

fn sink_rows(messages: &[&str]) -> arrow::array::RecordBatch {
    use pipeline::schema::FieldType;
    let columns = [("device", FieldType::String), ("n", FieldType::Int), ("x", FieldType::Float)];
    let mut rows = RowsBuilder::new(&[], &pipeline::config::Fields::of(columns));
    for message in messages {
        rows.push_json(message.as_bytes()).expect("a row");
    }
    rows.finish().expect("rows")
}

const TWO_ROWS: [&str; 2] = [r#"{"device":"a","n":1,"x":0.5}"#, r#"{"device":"b","n":2}"#];

#[tokio::test]
async fn every_operation_does_in_the_server_what_it_says() {
    let server = Redis::start();
    let yaml = "write:\n\
        - {push: pending, keep: 3}\n\
        - {increment: total, by: rows}\n\
        - {increment: batches, by: batch}\n\
        - {increment: sum, by: n}\n\
        - {increment: fraction, by: x}\n\
        - {set: \"x:{device}\", value: x, expire: 1m}\n\
        - {set: \"last:{metric}\"}\n\
        - {add: entries}\n\
        - {publish: news}";
    let mut subscriber = source(&server, "channels: [news]");
    let (mut messages, _acknowledger) = push(&mut subscriber).await;
    let mut sink = sink(&server, yaml).await;
    server.command(&["SET", "x:b", "old"]);
    for id in [1, 2] {
        sink.deliver(0, &sink_rows(&TWO_ROWS), id).await.expect("delivered");
    }
    let (a, b) = (r#"{"device":"a","n":1,"x":0.5}"#, r#"{"device":"b","n":2,"x":null}"#);
    for (command, expected) in [
        (&["LRANGE", "pending", "0", "-1"][..], format!("{b}\n{a}\n{b}")),
        (&["MGET", "total", "batches", "sum", "fraction"], "4\n2\n6\n1".to_owned()),
        (&["MGET", "x:a", "x:b", "last:load"], format!("0.5\n\n{b}")),
        (&["XLEN", "entries"], "4".to_owned()),
    ] {
        assert_eq!(server.command(command), expected, "{command:?}");
    }
    assert!(server.command(&["PTTL", "x:a"]).parse::<i64>().expect("a time") > 1000);
    let entries = server.command(&["XREVRANGE", "entries", "+", "-", "COUNT", "2"]);
    let fields: Vec<&str> = entries.lines().filter(|line| !line.contains('-')).collect();
    assert_eq!(fields, ["device", "b", "n", "2", "device", "a", "n", "1", "x", "0.5"]);
    assert_eq!(payloads(&records(&mut messages, 4).await), [a, b, a, b]);
}

#[tokio::test]
async fn a_repeated_delivery_is_skipped_where_asked_even_after_a_restart() {
    let mut server = Redis::start();
    let yaml = "write: {increment: total}\nexactly_once: true";
    let mut first = sink(&server, yaml).await;
    for id in [2, 4, 4] {
        first.deliver(0, &sink_rows(&TWO_ROWS), id).await.expect("delivered");
    }
    assert_eq!(server.command(&["GET", "total"]), "4");
    server.kill();
    server.restart();
    let mut second = sink(&server, yaml).await;
    for id in [2, 4, 6] {
        second.deliver(0, &sink_rows(&TWO_ROWS), id).await.expect("delivered");
    }
    assert_eq!(server.command(&["GET", "total"]), "6");
    assert_eq!(server.command(&["GET", "tailwater:out:load"]), "6");
    assert_eq!(second.last_delivery(0).await.expect("connected"), Some(6));
    // Cut otherwise after a restart: one row is known, the other is not.
    second.deliver(0, &sink_rows(&TWO_ROWS), 7).await.expect("delivered");
    assert_eq!(server.command(&["GET", "total"]), "7");

    // Without it every delivery counts.
    let mut plain = sink(&server, "write: {increment: plain}").await;
    for id in [1, 1] {
        plain.deliver(0, &sink_rows(&TWO_ROWS), id).await.expect("delivered");
    }
    assert_eq!(server.command(&["GET", "plain"]), "4");
}

/// After a broken path the system goes on sending what an earlier connection had written, so that its transaction may
/// reach the server when the next connection is long in use. To the server that is a connection that reads, another one
/// that writes, and then the write of the first.
#[tokio::test]
async fn a_delivery_of_an_earlier_connection_that_arrives_late_does_nothing() {
    let server = Redis::start();
    let yaml = "write: {increment: total}\nexactly_once: true";
    let overtaken = |error: Error| {
        assert!(is_retried(&error) && error.to_string().contains("another connection wrote"), "{error}");
    };
    for start in [0, 4] {
        // The next connection came first: what the earlier one sent does nothing.
        let mut earlier = sink(&server, yaml).await;
        let mut next = sink(&server, yaml).await;
        next.deliver(0, &sink_rows(&TWO_ROWS), start + 2).await.expect("delivered");
        overtaken(earlier.deliver(0, &sink_rows(&TWO_ROWS), start + 2).await.expect_err("done by the other"));
        assert_eq!(server.command(&["GET", "total"]), (start + 2).to_string());
        // The earlier one came first, this time with a number that it had from its own delivery.
        earlier.connect().await.expect("a connection");
        for id in [start + 2, start + 4] {
            earlier.deliver(0, &sink_rows(&TWO_ROWS), id).await.expect("known, or delivered");
        }
        overtaken(next.deliver(0, &sink_rows(&TWO_ROWS), start + 4).await.expect_err("done by the other"));
        let error = next.deliver(0, &sink_rows(&TWO_ROWS), start + 4).await.expect_err("not connected again");
        assert!(is_retried(&error), "{error}");
        next.connect().await.expect("a connection");
        next.deliver(0, &sink_rows(&TWO_ROWS), start + 4).await.expect("known");
        assert_eq!(server.command(&["GET", "total"]), (start + 4).to_string());
        assert_eq!(server.command(&["GET", "tailwater:out:load"]), (start + 4).to_string());
    }
}

#[tokio::test]
async fn a_late_delivery_for_one_pipeline_is_not_mistaken_for_one_of_another() {
    let server = Redis::start();
    let yaml = "write: {increment: \"total:{metric}\"}\nexactly_once: true";
    let inputs = ["load", "other"];
    let mut earlier = sink_of(&server, yaml, &inputs).await;
    let mut next = sink_of(&server, yaml, &inputs).await;
    earlier.deliver(1, &sink_rows(&TWO_ROWS), 2).await.expect("delivered");
    // Nothing of this pipeline was delivered, but the connection no longer knows what is there.
    let error = next.deliver(0, &sink_rows(&TWO_ROWS), 2).await.expect_err("a number was changed");
    assert!(is_retried(&error), "{error}");
    next.connect().await.expect("a connection");
    for input in [0, 1] {
        next.deliver(input, &sink_rows(&TWO_ROWS), 2).await.expect("delivered, or known");
    }
    assert_eq!(server.command(&["MGET", "total:load", "total:other"]), "2\n2");
}

#[tokio::test]
async fn a_refused_command_fails_the_delivery_for_good_and_a_lost_server_only_for_now() {
    let mut server = Redis::start();
    server.command(&["SET", "total", "many"]);
    let mut sink = sink(&server, "write: [{increment: total}, {push: q, value: device}]").await;
    let error = sink.deliver(0, &sink_rows(&TWO_ROWS), 1).await.expect_err("not an integer");
    assert!(error.retry == Retry::Never && error.to_string().contains("`INCRBY total`: ERR value is not an integer"));
    assert_eq!(server.command(&["LRANGE", "q", "0", "-1"]), "b\na");
    server.kill();
    assert!(is_retried(&sink.deliver(0, &sink_rows(&TWO_ROWS), 2).await.expect_err("the server is gone")));
    assert!(is_retried(&sink.connect().await.expect_err("the server is gone")));
    server.restart();
    server.command(&["DEL", "total", "q"]);
    sink.connect().await.expect("a connection");
    sink.deliver(0, &sink_rows(&TWO_ROWS), 2).await.expect("delivered");
    assert_eq!(server.command(&["GET", "total"]), "2");
}

#[tokio::test]
async fn nothing_of_a_delivery_is_done_when_the_server_takes_no_writes() {
    let server = Redis::start();
    let mut sink = sink(&server, "write: [{push: q}, {increment: total}]").await;
    server.command(&["CONFIG", "SET", "maxmemory", "1"]);
    let error = sink.deliver(0, &sink_rows(&TWO_ROWS), 1).await.expect_err("no memory");
    assert!(is_retried(&error) && error.to_string().contains("OOM"), "{error}");
    server.command(&["CONFIG", "SET", "maxmemory", "0"]);
    sink.connect().await.expect("a connection");
    sink.deliver(0, &sink_rows(&TWO_ROWS), 1).await.expect("delivered");
    assert_eq!(server.command(&["MGET", "total"]), "2");
}

#[tokio::test]
async fn a_queue_flows_from_sink_to_source_to_counters() {
    let server = Redis::start();
    let mut api = sink(&server, "write: {push: pending_messages}").await;
    let worker = source_options(&server, "list: pending_messages\nfields: {device: string, n: int, x: float}");
    let mut counters = sink(
        &server,
        "write: [{increment: total_messages}, {increment: total_batches, by: batch}]\nbatch: {rows: 50, every: 2s}",
    )
    .await;
    let mut worker_source = worker.build(source_context()).expect("a source");
    let (mut reader, mut acknowledger) = push(&mut worker_source).await;
    let yaml = "every: 500ms\n\
        read: {total_messages: GET total_messages, total_batches: GET total_batches, queue_depth: LLEN pending_messages}\n\
        fields: {total_messages: int, total_batches: int}";
    let mut poll = pull(&mut source(&server, yaml), None).await;
    let empty = r#"{"total_messages":null,"total_batches":null,"queue_depth":0}"#;
    assert_eq!(json(&next(&mut poll).await.rows), [empty]);
    api.deliver(0, &sink_rows(&TWO_ROWS), 1).await.expect("delivered");
    let waiting = r#"{"total_messages":null,"total_batches":null,"queue_depth":2}"#;
    assert_eq!(json(&next(&mut poll).await.rows), [waiting]);
    let taken = records(&mut reader, 2).await;
    let rows = worker.decoder().expect("a decoder").decode(&taken).expect("rows").rows;
    counters.deliver(0, &rows, 1).await.expect("delivered");
    acknowledger.acknowledge(&tokens(&taken)).await.expect("acknowledged");
    let done = r#"{"total_messages":2,"total_batches":1,"queue_depth":0}"#;
    assert_eq!(json(&next(&mut poll).await.rows), [done]);
}
