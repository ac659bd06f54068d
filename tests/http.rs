//! The `http` source behind a real listener: a client posts, the test stands in for the engine.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Arc;

use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use pipeline::config::{CheckContext, Problems, deserialize, tree};
use pipeline::http::{Request, Routes};
use pipeline::plugin::{Acknowledger, PushReader, Reader, Rejection, Source, SourceConfig, SourceContext};
use pipeline::status::Status;
use sources::http::HttpConfig;
use tokio::task::JoinHandle;

const FIELDS: &str = "path: /messages\nfields: {device_id: string, x: int}\nmax_body: 1KiB";

/// A source mounted on a listener.
struct Served {
    address: SocketAddr,
    config: HttpConfig,
    source: Box<dyn Source>,
    listener: JoinHandle<()>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.listener.abort();
    }
}

/// Builds the source of this YAML and serves its routes.
fn serve(yaml: &str) -> Served {
    let node = tree::parse(yaml).expect("YAML");
    let mut problems = Problems::default();
    let mut cx = CheckContext::new(&mut problems, "source ingest", node.position, Path::new("."));
    let config: HttpConfig = deserialize::read(&node, &mut cx).expect("a configuration");
    let shape = config.check(&mut cx).expect("a shape");
    assert!(problems.is_empty(), "{problems:?}");
    let routes = Routes::default();
    let source = config.build(SourceContext {
        name: "ingest".into(),
        folder: ".".into(),
        state_dir: ".".into(),
        routes: routes.clone(),
        status: Arc::new(Status::default()),
    });
    for mount in &shape.mounts {
        assert!(matches!(routes.find(mount.method, &mount.path), Some(Ok(_))), "{mount:?} is mounted");
    }
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = listener.local_addr().expect("its address");
    listener.set_nonblocking(true).expect("a listener for tokio");
    let listener = tokio::spawn(listen(listener, routes));
    Served { address, config, source: source.expect("a source"), listener }
}

async fn listen(listener: TcpListener, routes: Routes) {
    let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
    loop {
        let (stream, peer) = listener.accept().await.expect("a connection");
        let routes = routes.clone();
        let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
            let found = routes.find(request.method().as_str(), request.uri().path());
            async move {
                let handler = found.expect("a known path").unwrap_or_else(|others| panic!("takes {others:?}"));
                Ok::<_, std::convert::Infallible>(handler.handle(Request { inner: request, peer }).await)
            }
        });
        tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}

/// Posts a body and gives the status, the head and the body of the answer.
fn post(address: SocketAddr, headers: &str, body: &str) -> JoinHandle<(u16, String, String)> {
    let request = format!(
        "POST /messages HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n{body}",
        body.len()
    );
    tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(address).expect("a connection");
        // A server that refuses early may close before all is sent.
        let _ = stream.write_all(request.as_bytes());
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        let answer = String::from_utf8(answer).expect("text");
        let (head, body) = answer.split_once("\r\n\r\n").expect("an answer");
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
        (status, head.to_ascii_lowercase(), body.to_owned())
    })
}

async fn connect(served: &mut Served) -> (Box<dyn PushReader>, Box<dyn Acknowledger>) {
    match served.source.connect(None).await.expect("a connection") {
        Reader::Push(reader, acknowledger) => (reader, acknowledger),
        Reader::Pull(_) => panic!("a push source"),
    }
}

const JSON: &str = "content-type: application/json\r\n";
const LINES: &str = "content-type: application/x-ndjson\r\n";

#[tokio::test]
async fn messages_are_answered_once_they_are_accepted() {
    let mut served = serve(FIELDS);
    let (mut reader, mut acknowledger) = connect(&mut served).await;
    let mut decoder = served.config.decoder().expect("a decoder");
    for (headers, body, records, rows, status, expected) in [
        (JSON, r#"{"device_id":"a","x":1}"#, 1, 1, 200, r#"{"accepted":1,"rejected":0,"errors":[]}"#),
        ("", r#"[{"x":1},{"x":2}]"#, 2, 2, 200, r#"{"accepted":2,"rejected":0,"errors":[]}"#),
        (
            LINES,
            "{\"x\":1}\n\n{\"x\":\"fast\"}\n{\"x\":3}\n",
            3,
            2,
            200,
            r#"{"accepted":2,"rejected":1,"errors":[{"line":3,"error":"field `x`: expected int, found \"fast\""}]}"#,
        ),
        (
            JSON,
            r#"[7]"#,
            1,
            0,
            400,
            r#"{"accepted":0,"rejected":1,"errors":[{"element":1,"error":"invalid type: integer `7`, expected a JSON object"}]}"#,
        ),
    ] {
        let answer = post(served.address, headers, body);
        let received = reader.next().await.expect("records");
        assert_eq!(received.len(), records, "{body}");
        let decoded = decoder.decode(&received).expect("rows");
        assert_eq!((decoded.rows.num_rows(), decoded.errors.len()), (rows, records - rows), "{body}");
        assert!(!answer.is_finished(), "answered before it was accepted: {body}");
        let tokens: Vec<u64> = received.iter().map(|record| record.token).collect();
        // The engine may acknowledge in any pieces.
        let (first, rest) = tokens.split_at(tokens.len() / 2);
        acknowledger.acknowledge(first).await.expect("an acknowledgement");
        acknowledger.acknowledge(rest).await.expect("an acknowledgement");
        let (found, _, text) = answer.await.expect("an answer");
        assert_eq!((found, text.as_str()), (status, expected), "{body}");
    }
}

#[tokio::test]
async fn what_cannot_be_taken_is_answered_at_once() {
    let mut served = serve(FIELDS);
    let (status, head, _) = post(served.address, JSON, r#"{"x":1}"#).await.expect("an answer");
    assert_eq!(status, 503, "nobody reads yet");
    assert!(head.contains("retry-after: 1"), "{head}");
    let connection = connect(&mut served).await;
    let long = format!("{{\"device_id\":\"{}\"}}", "x".repeat(2000));
    for (headers, body, expected, message) in [
        (JSON, "", 400, "the body is empty"),
        (LINES, " \n\n", 400, "the body is empty"),
        ("content-encoding: gzip\r\n", "x", 400, "content encoding `gzip` is not read"),
        (JSON, long.as_str(), 413, "the body is longer than 1KiB (`max_body` of source `ingest`)"),
        (JSON, "[]", 200, r#""accepted":0"#),
    ] {
        let (status, _, text) = post(served.address, headers, body).await.expect("an answer");
        assert_eq!(status, expected, "{text}");
        assert!(text.contains(message), "{text}");
    }
    drop(connection);
    let (status, _, _) = post(served.address, JSON, r#"{"x":1}"#).await.expect("an answer");
    assert_eq!(status, 503, "nobody reads any more");
}

#[tokio::test]
async fn what_is_not_accepted_is_answered_to_be_sent_again() {
    let mut served = serve(FIELDS);
    let (mut reader, mut acknowledger) = connect(&mut served).await;

    let rejected = post(served.address, JSON, r#"[{"x":1},{"x":2}]"#);
    let tokens: Vec<u64> = reader.next().await.expect("records").iter().map(|record| record.token).collect();
    acknowledger.acknowledge(&tokens[..1]).await.expect("an acknowledgement");
    acknowledger.reject(&tokens[1..], &Rejection::Failed).await.expect("a rejection");
    assert_eq!(rejected.await.expect("an answer").0, 503);

    let lost = post(served.address, JSON, r#"{"x":3}"#);
    assert_eq!(reader.next().await.expect("records").len(), 1);
    let (mut second, mut second_acknowledger) = connect(&mut served).await;
    assert!(reader.next().await.is_err(), "the first reader is over");
    drop((reader, acknowledger));
    assert_eq!(lost.await.expect("an answer").0, 503);

    let taken = post(served.address, JSON, r#"{"x":4}"#);
    let records = second.next().await.expect("records");
    second_acknowledger.acknowledge(&[records[0].token]).await.expect("an acknowledgement");
    assert_eq!(taken.await.expect("an answer").0, 200);
}

#[tokio::test]
async fn without_fields_the_body_is_one_row() {
    let mut served = serve("path: /messages");
    let (mut reader, mut acknowledger) = connect(&mut served).await;
    let mut decoder = served.config.decoder().expect("a decoder");
    for (headers, body, expected) in
        [(JSON, "any\ntext", vec!["any\ntext"]), (LINES, "any\ntext\n", vec!["any", "text"])]
    {
        let answer = post(served.address, headers, body);
        let records = reader.next().await.expect("records");
        let decoded = decoder.decode(&records).expect("rows");
        let rows = pipeline::json::encode_rows(&decoded.rows);
        let expected: Vec<String> =
            expected.iter().map(|text| format!("{{\"payload\":{}}}", pipeline::json::json_string(text))).collect();
        assert_eq!(rows.iter().collect::<Vec<_>>(), expected);
        let tokens: Vec<u64> = records.iter().map(|record| record.token).collect();
        acknowledger.acknowledge(&tokens).await.expect("an acknowledgement");
        assert_eq!(answer.await.expect("an answer").0, 200);
    }
}

#[test]
fn what_is_required_must_be_a_field() {
    for (required, expected) in [("[x]", ""), ("[device_id, y]", "`y` is none of the `fields`"), ("[device]", "device")]
    {
        let node = tree::parse(&format!("{FIELDS}\nrequired: {required}")).expect("YAML");
        let mut problems = Problems::default();
        let mut cx = CheckContext::new(&mut problems, "source ingest", node.position, Path::new("."));
        let config: HttpConfig = deserialize::read(&node, &mut cx).expect("a configuration");
        let _ = config.check(&mut cx);
        assert_eq!(problems.has_errors(), !expected.is_empty(), "{required}");
        assert!(problems.render("p.yaml").contains(expected), "{required}: {}", problems.render("p.yaml"));
    }
}
