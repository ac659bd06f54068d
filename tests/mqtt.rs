//! The mqtt source and sink against real brokers: Mosquitto and the embedded one.

use std::collections::BTreeSet;
use std::fs;
use std::future::Future;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use arrow::array::{Int64Array, RecordBatch, StringArray};
use pipeline::config::tree::parse;
use pipeline::config::{CheckContext, Position, Problems, deserialize};
use pipeline::error::{Error, Result};
use pipeline::http::Routes;
use pipeline::json::encode_rows;
use pipeline::live::Live;
use pipeline::plugin::{
    Acknowledger, Decoded, Delivery, OutboxSink, PushReader, Reader, Record, Sink, SinkConfig, SinkContext, SinkInput,
    Source, SourceConfig, SourceContext, SourceShape, StreamShape,
};
use pipeline::schema::{FieldType, schema_of};
use pipeline::status::Status;
use sinks::mqtt::MqttConfig as SinkYaml;
use sources::mqtt::MqttConfig as SourceYaml;

use crate::support::mosquitto::{Cut, Cutter, Mosquitto, publish, subscribe};
use crate::support::{PATIENCE, Scratch, free_port, wait_for};

/// Waits for a step of a plugin; a test that waits in vain says for what.
async fn patiently<T>(what: &str, step: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, step).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
}

/// Reads and checks a source, or gives the problems as text.
fn source_config(yaml: &str) -> Result<(SourceYaml, SourceShape), String> {
    let mut problems = Problems::default();
    let checked = {
        let node = parse(yaml).expect("YAML");
        let mut cx =
            CheckContext::new(&mut problems, "source devices", Position { line: 1, column: 1 }, Path::new("."));
        let config = deserialize::read::<SourceYaml>(&node, &mut cx);
        config.and_then(|config| config.check(&mut cx).map(|shape| (config, shape)))
    };
    checked.filter(|_| !problems.has_errors()).ok_or_else(|| problems.render("test.yaml"))
}

fn source_context(folder: &Path) -> SourceContext {
    SourceContext {
        name: "devices".into(),
        folder: folder.to_owned(),
        state_dir: folder.join("state"),
        routes: Routes::default(),
        status: Arc::new(Status::default()),
    }
}

/// A built source with its state in `folder`.
fn source(yaml: &str, folder: &Scratch) -> (SourceYaml, Box<dyn Source>) {
    let (config, _) = source_config(yaml).expect("a source that checks clean");
    let built = config.build(source_context(folder.path())).expect("a source");
    (config, built)
}

/// Both ends of a connection.
struct Connection {
    reader: Box<dyn PushReader>,
    acknowledger: Box<dyn Acknowledger>,
}

async fn connect(source: &mut dyn Source) -> Result<Connection> {
    match patiently("a connection", source.connect(None)).await? {
        Reader::Push(reader, acknowledger) => Ok(Connection { reader, acknowledger }),
        Reader::Pull(_) => panic!("an mqtt source pushes"),
    }
}

impl Connection {
    async fn open(source: &mut dyn Source) -> Self {
        connect(source).await.expect("a connection")
    }

    /// Exactly `count` messages.
    async fn receive(&mut self, count: usize) -> Vec<Record> {
        let mut records = Vec::new();
        while records.len() < count {
            records.extend(patiently("messages", self.reader.next()).await.expect("messages"));
        }
        assert_eq!(records.len(), count, "{:?}", payloads(&records));
        records
    }

    async fn acknowledge(&mut self, records: &[Record]) {
        let tokens: Vec<u64> = records.iter().map(|record| record.token).collect();
        self.acknowledger.acknowledge(&tokens).await.expect("acknowledged");
    }

    /// Takes messages, acknowledging each, until the connection fails.
    async fn failure(&mut self) -> Error {
        loop {
            match patiently("the end of the connection", self.reader.next()).await {
                Ok(records) => self.acknowledge(&records).await,
                Err(error) => return error,
            }
        }
    }
}

fn payloads(records: &[Record]) -> Vec<String> {
    records
        .iter()
        .map(|record| String::from_utf8_lossy(&record.payload[..record.payload.len().min(80)]).into())
        .collect()
}

fn decode(config: &SourceYaml, records: &[Record]) -> Decoded {
    config.decoder().expect("a push source has a decoder").decode(records).expect("decoded")
}

fn json(decoded: &Decoded) -> Vec<String> {
    encode_rows(&decoded.rows).iter().map(str::to_owned).collect()
}

fn numbers(count: usize) -> Vec<String> {
    (0..count).map(|n| n.to_string()).collect()
}

fn texts(lines: &[String]) -> Vec<&str> {
    lines.iter().map(String::as_str).collect()
}

/// A source of raw payloads.
fn raw(port: u16, version: u8, more: &str) -> String {
    format!("url: mqtt://127.0.0.1:{port}\nversion: {version}\ntopics: [\"t/#\"]\n{more}")
}

#[tokio::test(flavor = "multi_thread")]
async fn topics_and_messages_become_rows() {
    let broker = Mosquitto::start();
    for version in [3, 5] {
        let folder = Scratch::new();
        let yaml = format!(
            "url: mqtt://127.0.0.1:{}\nversion: {version}\n\
             topics: [\"devices/{{device_id}}/telemetry\", \"x/+/{{kind}}\", \"z/#\"]\n\
             fields: {{latency_ms: float, lat: {{type: float, path: gps.lat}}}}",
            broker.port
        );
        let (config, mut source) = source(&yaml, &folder);
        let mut connection = Connection::open(source.as_mut()).await;
        broker.publish(
            "devices/d 1/telemetry",
            1,
            &[r#"{"latency_ms":1.5,"gps":{"lat":48.1}}"#, r#"{"latency_ms":"x"}"#],
        );
        broker.publish("x/any/temperature", 1, &[r#"[{"latency_ms":2},{"latency_ms":[]},{}]"#, "no json"]);
        broker.publish("z", 0, &["{}"]);
        let records = connection.receive(5).await;
        let decoded = decode(&config, &records);
        assert_eq!(
            json(&decoded),
            [
                r#"{"device_id":"d 1","kind":null,"latency_ms":1.5,"lat":48.1}"#,
                r#"{"device_id":null,"kind":"temperature","latency_ms":2.0,"lat":null}"#,
                r#"{"device_id":null,"kind":"temperature","latency_ms":null,"lat":null}"#,
                r#"{"device_id":null,"kind":null,"latency_ms":null,"lat":null}"#,
            ]
        );
        assert_eq!(decoded.record_of_row, [0, 2, 2, 4]);
        let errors: Vec<_> = decoded.errors.iter().map(|e| (e.message.as_str(), e.payload.as_str())).collect();
        assert_eq!(errors[0], ("field `latency_ms`: expected float, found \"x\"", r#"{"latency_ms":"x"}"#));
        assert_eq!(errors[1].0, "item 1 of the array: field `latency_ms`: expected float, found []");
        assert!(errors[2].0.starts_with("malformed JSON") && errors[2].1 == "no json", "{errors:?}");
        connection.acknowledge(&records).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unacknowledged_messages_come_again_after_the_broker_was_killed() {
    for (version, signal) in [(3, "TERM"), (5, "KILL")] {
        let mut broker = Mosquitto::start();
        let folder = Scratch::new();
        let (_, mut source) = source(&raw(broker.port, version, ""), &folder);
        let mut connection = Connection::open(source.as_mut()).await;
        let lines = numbers(15);
        broker.publish("t/a", 1, &texts(&lines));
        let first = connection.receive(15).await;
        assert_eq!(payloads(&first), lines);
        connection.acknowledge(&first[..5]).await;
        wait_until_saved(&broker);
        broker.end(signal);
        let error = connection.failure().await;
        assert!(error.to_string().contains("MQTT broker 127.0.0.1:"), "{error}");
        drop(connection);
        let error = connect(source.as_mut()).await.err().expect("no broker");
        assert!(error.to_string().contains("refused"), "{error}");
        broker.restart();
        let mut connection = Connection::open(source.as_mut()).await;
        let again = connection.receive(10).await;
        assert_eq!(payloads(&again), lines[5..]);
        for (record, before) in again.iter().zip(&first[5..]) {
            assert_eq!(record.metadata[0], 1, "marked as sent before");
            assert_eq!(record.metadata[1..], before.metadata[1..], "told from a new message by its packet id");
        }
        connection.acknowledge(&again).await;
        drop(connection);
        // What was acknowledged before the goodbye does not come again.
        broker.publish("t/a", 1, &["marker"]);
        let mut connection = Connection::open(source.as_mut()).await;
        assert_eq!(payloads(&connection.receive(1).await), ["marker"]);
    }
}

/// Waits until the broker has written its sessions, with what it has received so far.
fn wait_until_saved(broker: &Mosquitto) {
    let database = broker.folder().join("mosquitto.db");
    let modified = || fs::metadata(&database).and_then(|data| data.modified()).ok();
    // Two savings: one may have begun before.
    for round in 0..2 {
        let before = modified();
        let mut change = 0;
        wait_for("the broker's file", || {
            change += 1;
            broker.publish("elsewhere", 1, &[&format!("{round} {change}")]);
            publish(broker.port, "elsewhere", &["-r", "-q", "1"], &[&change.to_string()]);
            (modified() != before).then_some(())
        });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_queue_under_the_same_client_id_while_the_process_is_away() {
    let broker = Mosquitto::start();
    for version in [3, 5] {
        let folder = Scratch::new();
        let yaml = raw(broker.port, version, "");
        let (_, mut one) = source(&yaml, &folder);
        drop(Connection::open(one.as_mut()).await);
        let file = folder.path().join("state/mqtt-devices.id");
        let remembered = fs::read_to_string(&file).expect("the state file");
        drop(one);
        let lines = numbers(50);
        broker.publish("t/away", 1, &texts(&lines));
        let (_, mut other) = source(&yaml, &folder);
        let mut connection = Connection::open(other.as_mut()).await;
        let mut received = Vec::new();
        while received.len() < lines.len() {
            let records = patiently("queued messages", connection.reader.next()).await.expect("messages");
            connection.acknowledge(&records).await;
            received.extend(payloads(&records));
        }
        assert_eq!(received, lines);
        assert_eq!(fs::read_to_string(&file).expect("the state file"), remembered);
        let elsewhere = Scratch::new();
        drop(Connection::open(source(&yaml, &elsewhere).1.as_mut()).await);
        let other = fs::read_to_string(elsewhere.path().join("state/mqtt-devices.id")).expect("the state file");
        assert_ne!(other, remembered, "another installation has another client id");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kept_session_is_subscribed_anew_only_where_topics_changed() {
    let broker = Mosquitto::start();
    for version in [3, 5] {
        let folder = Scratch::new();
        let yaml =
            |topics: &str| format!("url: mqtt://127.0.0.1:{}\nversion: {version}\ntopics: [{topics}]", broker.port);
        publish(broker.port, &format!("{version}/keep"), &["-r", "-q", "1"], &["retained"]);
        publish(broker.port, &format!("{version}/new"), &["-r", "-q", "1"], &["retained too"]);
        let (_, mut first) = source(&yaml(&format!("{version}/keep, {version}/old")), &folder);
        let mut connection = Connection::open(first.as_mut()).await;
        let records = connection.receive(1).await;
        assert_eq!(payloads(&records), ["retained"]);
        connection.acknowledge(&records).await;
        drop(connection);
        // Resumed as it is: the retained message does not come again.
        let mut connection = Connection::open(first.as_mut()).await;
        broker.publish(&format!("{version}/old"), 1, &["for the old topic"]);
        let records = connection.receive(1).await;
        assert_eq!(payloads(&records), ["for the old topic"]);
        connection.acknowledge(&records).await;
        drop(connection);
        // Other topics: only the new one is asked for, and the old one given up.
        let (_, mut second) = source(&yaml(&format!("{version}/keep, {version}/new")), &folder);
        let mut connection = Connection::open(second.as_mut()).await;
        broker.publish(&format!("{version}/old"), 1, &["nobody wants this"]);
        broker.publish(&format!("{version}/keep"), 1, &["still here"]);
        assert_eq!(payloads(&connection.receive(2).await), ["retained too", "still here"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_began_without_its_topics_is_subscribed_on_the_next_connection() {
    for (version, cut, restarts) in
        [(3, Cut::Subscribe, true), (3, Cut::Connack, false), (5, Cut::Subscribe, false), (5, Cut::Connack, true)]
    {
        let case = format!("version {version}, {cut:?}, restarts: {restarts}");
        // It keeps nothing on the disk, so a restart loses the sessions.
        let mut broker = Mosquitto::start_in_memory();
        let cutter = Cutter::start(broker.port);
        let folder = Scratch::new();
        let yaml = raw(cutter.port, version, "");
        let (_, mut source_) = source(&yaml, &folder);
        let mut connection = Connection::open(source_.as_mut()).await;
        broker.publish("t/a", 1, &["first"]);
        let first = connection.receive(1).await;
        connection.acknowledge(&first).await;
        drop(connection);
        broker.end("KILL");
        broker.restart();
        cutter.set(Some(cut));
        connect(source_.as_mut()).await.err().unwrap_or_else(|| panic!("{case}: it was cut off"));
        cutter.set(None);
        if restarts {
            source_ = source(&yaml, &folder).1;
        }
        let mut connection = Connection::open(source_.as_mut()).await;
        broker.publish("t/a", 1, &["second"]);
        let second = connection.receive(1).await;
        assert_eq!(payloads(&second), ["second"], "{case}");
        if cut == Cut::Subscribe {
            assert_ne!(second[0].metadata[3..7], first[0].metadata[3..7], "{case}: another session of the broker");
        }
        connection.acknowledge(&second).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_handshake_that_was_cut_off_brings_no_retained_message_again_in_version_5() {
    let broker = Mosquitto::start();
    let cutter = Cutter::start(broker.port);
    let folder = Scratch::new();
    publish(broker.port, "t/kept", &["-r", "-q", "1"], &["retained"]);
    let (_, mut source) = source(&raw(cutter.port, 5, ""), &folder);
    let mut connection = Connection::open(source.as_mut()).await;
    let records = connection.receive(1).await;
    assert_eq!(payloads(&records), ["retained"]);
    connection.acknowledge(&records).await;
    drop(connection);
    cutter.set(Some(Cut::Connack));
    connect(source.as_mut()).await.err().expect("it was cut off");
    cutter.set(None);
    let mut connection = Connection::open(source.as_mut()).await;
    broker.publish("t/a", 1, &["next"]);
    assert_eq!(payloads(&connection.receive(1).await), ["next"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_message_arrives_and_a_too_large_one_is_an_error_and_no_more() {
    let broker = Mosquitto::start();
    for version in [3, 5] {
        let folder = Scratch::new();
        let (config, mut source) = source(&raw(broker.port, version, "max_message: 1MiB"), &folder);
        let mut connection = Connection::open(source.as_mut()).await;
        for size in [1 << 20, (1 << 20) + 7, 3] {
            let file = folder.write("message", &"x".repeat(size));
            let status = Command::new("mosquitto_pub")
                .args(["-h", "127.0.0.1", "-p", &broker.port.to_string(), "-t", "t/big", "-q", "1", "-f"])
                .arg(file)
                .status();
            assert!(status.expect("mosquitto_pub").success());
        }
        let records = connection.receive(3).await;
        let decoded = decode(&config, &records);
        assert_eq!(decoded.record_of_row, [0, 2]);
        assert_eq!(decoded.errors.len(), 1);
        assert_eq!(decoded.errors[0].message, "the message is larger than `max_message: 1MiB`");
        connection.acknowledge(&records).await;
        drop(connection);
        broker.publish("t/big", 1, &["after"]);
        let mut connection = Connection::open(source.as_mut()).await;
        assert_eq!(payloads(&connection.receive(1).await), ["after"]);
    }
}

/// Makes a certificate authority and a certificate for 127.0.0.1, as PEM files in `folder`.
fn make_certificates(folder: &Path) {
    let openssl = |arguments: &str| {
        let mut command = Command::new("openssl");
        command.args(arguments.split(' ')).current_dir(folder).stdout(Stdio::null()).stderr(Stdio::null());
        assert!(command.status().expect("openssl").success(), "openssl {arguments}");
    };
    fs::write(folder.join("names"), "subjectAltName=IP:127.0.0.1,DNS:localhost\n").expect("a file");
    for ca in ["ca", "other"] {
        openssl(&format!(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN={ca} -keyout {ca}.key -out {ca}.pem"
        ));
    }
    openssl(
        "req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=broker -keyout server.key -out server.csr",
    );
    openssl("x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.pem");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_with_tls_is_trusted_by_its_certificate_authority() {
    let folder = Scratch::new();
    make_certificates(folder.path());
    let files = Scratch::new();
    for name in ["ca.pem", "other.pem"] {
        fs::copy(folder.path().join(name), files.path().join(name)).expect("a copy");
    }
    let broker = Mosquitto::start_in(folder, "certfile DIR/server.pem\nkeyfile DIR/server.key\nallow_anonymous true");
    for version in [3, 5] {
        let yaml = |ca: &str| {
            format!(
                "url: mqtts://127.0.0.1:{}\nversion: {version}\ntopics: [t]\nsession: clean\nqos: 0\nca: {ca}",
                broker.port
            )
        };
        let (_, mut source_) = source(&yaml("ca.pem"), &files);
        let mut connection = Connection::open(source_.as_mut()).await;
        let ca = files.path().join("ca.pem").display().to_string();
        publish(broker.port, "t", &["--cafile", &ca], &["over TLS"]);
        assert_eq!(payloads(&connection.receive(1).await), ["over TLS"]);
        let (_, mut other) = source(&yaml("other.pem"), &files);
        let error = connect(other.as_mut()).await.err().expect("an unknown authority").to_string();
        assert!(error.contains("certificate"), "{error}");
    }
    let (config, _) = source_config("url: mqtts://h\ntopics: [t]\nca: missing.pem").expect("config");
    let error = config.build(source_context(files.path())).err().expect("no such file").to_string();
    assert!(error.contains("`ca`: cannot read certificates from") && error.contains("missing.pem"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_login_is_told_without_the_password() {
    let folder = Scratch::new();
    let passwords = folder.path().join("passwords");
    let status =
        Command::new("mosquitto_passwd").arg("-b").arg("-c").arg(&passwords).args(["me", "p@ss:word"]).status();
    assert!(status.expect("mosquitto_passwd").success());
    let broker = Mosquitto::start_in(folder, "allow_anonymous false\npassword_file DIR/passwords");
    let folder = Scratch::new();
    for version in [3, 5] {
        let yaml =
            |login: &str| format!("url: mqtt://{login}127.0.0.1:{}\nversion: {version}\ntopics: [t/a]", broker.port);
        for login in ["", "me:wrong-word@"] {
            let (_, mut refused) = source(&yaml(login), &folder);
            let error = connect(refused.as_mut()).await.err().expect("refused").to_string();
            assert!(error.contains("check `username` and `password`") && !error.contains("wrong-word"), "{error}");
        }
        let (_, mut welcome) = source(&yaml("me:p%40ss%3Aword@"), &folder);
        drop(Connection::open(welcome.as_mut()).await);
        let options = "username: me\npassword: p@ss:word";
        let (_, mut welcome) = source(&format!("{}\n{options}", yaml("")), &folder);
        drop(Connection::open(welcome.as_mut()).await);
    }
}

/// A broker that keeps to no window: it sends `count` messages of quality 1 at once, as fast as they are taken, and
/// counts the acknowledgements (PUBACK of two bytes) that come meanwhile.
fn start_flooding_broker(count: usize) -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let port = listener.local_addr().expect("its address").port();
    let acknowledged = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&acknowledged);
    std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().expect("a client");
        let mut writer = socket.try_clone().expect("another end");
        let mut read = move || {
            let mut header = [0; 2];
            socket.read_exact(&mut header).ok()?;
            let mut body = vec![0; usize::from(header[1])];
            socket.read_exact(&mut body).ok()?;
            Some((header[0], body))
        };
        let _connect = read();
        writer.write_all(&[0x20, 2, 0, 0]).expect("CONNACK");
        let (_, subscribe) = read().expect("SUBSCRIBE");
        writer.write_all(&[0x90, 3, subscribe[0], subscribe[1], 1]).expect("SUBACK");
        std::thread::spawn(move || {
            while let Some((kind, _)) = read() {
                counter.fetch_add(usize::from(kind == 0x40), Relaxed);
            }
        });
        for number in 0..count {
            let [high, low] = u16::try_from(number % 65_535 + 1).expect("a packet id").to_be_bytes();
            // Ends when the client has gone.
            if writer.write_all(&[0x32, 6, 0, 1, b't', high, low, b'x']).is_err() {
                return;
            }
        }
    });
    (port, acknowledged)
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledgements_leave_while_nobody_takes_messages() {
    // More messages than wait between connection and engine.
    let (port, acknowledged) = start_flooding_broker(200_000);
    let folder = Scratch::new();
    let yaml = format!("url: mqtt://127.0.0.1:{port}\nversion: 3\ntopics: [t]");
    let (_, mut source) = source(&yaml, &folder);
    let mut connection = Connection::open(source.as_mut()).await;
    let mut taken = Vec::new();
    while taken.len() < 20_000 {
        taken.extend(patiently("messages", connection.reader.next()).await.expect("messages"));
    }
    connection.acknowledge(&taken).await;
    let arrived = || (acknowledged.load(Relaxed) == taken.len()).then_some(());
    tokio::task::block_in_place(|| wait_for("every acknowledgement", arrived));
}

/// A broker that takes one client, and refuses its second topic. Returns the port.
fn start_refusing_broker(version: u8) -> u16 {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let port = listener.local_addr().expect("its address").port();
    std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().expect("a client");
        let mut writer = socket.try_clone().expect("another end");
        let mut read = || {
            let mut header = [0; 2];
            socket.read_exact(&mut header).expect("a packet");
            let mut body = vec![0; usize::from(header[1])];
            socket.read_exact(&mut body).expect("its body");
            body
        };
        let _connect = read();
        let properties: &[u8] = if version == 3 { &[] } else { &[0] };
        let answer = |kind: u8, body: &[&[u8]]| {
            let body = body.concat();
            [&[kind, u8::try_from(body.len()).expect("a short packet")], body.as_slice()].concat()
        };
        writer.write_all(&answer(0x20, &[&[0, 0], properties])).expect("CONNACK");
        let subscribe = read();
        let refused = if version == 3 { 0x80 } else { 0x87 };
        writer.write_all(&answer(0x90, &[&subscribe[..2], properties, &[1, refused]])).expect("SUBACK");
        // Until the client has gone.
        let _ = socket.read(&mut [0; 100]);
    });
    port
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_topic_is_named() {
    for (version, reason) in [(3, "Failure"), (5, "NotAuthorized")] {
        let folder = Scratch::new();
        let port = start_refusing_broker(version);
        let yaml = format!("url: mqtt://127.0.0.1:{port}\nversion: {version}\ntopics: [open/#, \"secret/{{id}}\"]");
        let error = connect(source(&yaml, &folder).1.as_mut()).await.err().expect("refused").to_string();
        assert_eq!(error, format!("the broker refused the topic `secret/+` ({reason})"));
    }
}

/// A bare MQTT client that receives one message of quality 2, answers PUBREC and is gone before PUBREL's answer.
fn die_after_pubrec(port: u16, version: u8, client_id: &str) {
    let mut socket = TcpStream::connect(("127.0.0.1", port)).expect("the broker");
    socket.set_read_timeout(Some(PATIENCE)).expect("a limit");
    let properties: &[u8] = if version == 3 { &[] } else { &[5, 0x11, 0, 0, 0x0e, 0x10] };
    let level = if version == 3 { 4 } else { 5 };
    let id_length = u8::try_from(client_id.len()).expect("a short id");
    let mut body = [b"\0\x04MQTT".as_slice(), &[level, 0, 0, 60], properties, &[0, id_length]].concat();
    body.extend_from_slice(client_id.as_bytes());
    let mut packet = vec![0x10, u8::try_from(body.len()).expect("a short packet")];
    packet.extend(body);
    socket.write_all(&packet).expect("CONNECT");
    let mut received = None;
    loop {
        let mut header = [0; 2];
        socket.read_exact(&mut header).expect("a packet");
        let mut body = vec![0; usize::from(header[1])];
        socket.read_exact(&mut body).expect("its body");
        match header[0] >> 4 {
            3 => {
                let topic = usize::from(body[1]);
                let id = [body[2 + topic], body[3 + topic]];
                received = Some(id);
                socket.write_all(&[0x50, 2, id[0], id[1]]).expect("PUBREC");
            }
            // The broker has taken PUBREC and keeps the release until PUBCOMP.
            6 if received == Some([body[0], body[1]]) => return,
            // An earlier message, whose release the source left unanswered when it said goodbye.
            6 => socket.write_all(&[0x70, 2, body[0], body[1]]).expect("PUBCOMP"),
            _ => {}
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_of_quality_2_that_was_cut_between_pubrec_and_pubcomp_is_resumed() {
    let broker = Mosquitto::start();
    for version in [3, 5] {
        let folder = Scratch::new();
        let id = format!("resumed-{version}");
        let (_, mut source) = source(&raw(broker.port, version, &format!("qos: 2\nclient_id: {id}")), &folder);
        let mut connection = Connection::open(source.as_mut()).await;
        broker.publish("t/two", 2, &["whole"]);
        let records = connection.receive(1).await;
        connection.acknowledge(&records).await;
        drop(connection);
        broker.publish("t/two", 2, &["cut"]);
        die_after_pubrec(broker.port, version, &id);
        let mut connection = Connection::open(source.as_mut()).await;
        broker.publish("t/two", 2, &["after"]);
        let records = connection.receive(1).await;
        assert_eq!(payloads(&records), ["after"]);
        connection.acknowledge(&records).await;
        broker.publish("t/two", 2, &["and on"]);
        assert_eq!(payloads(&connection.receive(1).await), ["and on"]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_messages_keep_their_order_and_come_in_batches() {
    const MESSAGES: usize = 20_000;
    let broker = Mosquitto::start_in_memory();
    for version in [3, 5] {
        let folder = Scratch::new();
        let (_, mut source) = source(&raw(broker.port, version, ""), &folder);
        let mut connection = Connection::open(source.as_mut()).await;
        let port = broker.port;
        let publisher = tokio::task::spawn_blocking(move || {
            let lines = numbers(MESSAGES);
            publish(port, "t/many", &["-q", "1"], &texts(&lines));
        });
        let mut received = Vec::new();
        let mut calls = 0;
        while received.len() < MESSAGES {
            let records = patiently("messages", connection.reader.next()).await.expect("messages");
            calls += 1;
            connection.acknowledge(&records).await;
            received.extend(payloads(&records));
        }
        assert_eq!(received, numbers(MESSAGES));
        assert!(calls <= MESSAGES, "{calls} calls");
        publisher.await.expect("the publisher");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_client_of_the_same_id_is_named_as_the_reason() {
    let broker = Mosquitto::start();
    let (one, other) = (Scratch::new(), Scratch::new());
    let yaml = raw(broker.port, 5, "client_id: twin");
    let (_, mut first) = source(&yaml, &one);
    let mut connection = Connection::open(first.as_mut()).await;
    let (_, mut second) = source(&yaml, &other);
    let _second = Connection::open(second.as_mut()).await;
    let error = connection.failure().await.to_string();
    assert!(error.contains("another client uses the client id `twin`"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_fields_of_arriving_messages_are_found() {
    let broker = Mosquitto::start();
    publish(broker.port, "t/a", &["-r", "-q", "1"], &[r#"{"n":1,"gps":{"lat":1.5}}"#]);
    publish(broker.port, "t/b", &["-r", "-q", "1"], &[r#"{"n":1.5,"at":"2026-11-20T12:00:00Z"}"#]);
    // Enough messages end the listening early.
    let lines: Vec<String> = vec![r#"{"n":2}"#.to_owned(); 100];
    let port = broker.port;
    let (config, _) = source_config(&raw(broker.port, 5, "")).expect("config");
    let folder = Scratch::new();
    let found = config.discover(source_context(folder.path()));
    let more = tokio::task::spawn_blocking(move || publish(port, "t/c", &["-q", "1"], &texts(&lines)));
    let fields = patiently("fields", found).await.expect("fields").to_string();
    more.await.expect("the publisher");
    assert_eq!(fields, "fields:\n  n: float\n  lat: {type: float, path: gps.lat}\n  at: timestamp\n");
    assert!(!folder.path().join("state").exists(), "the session of the running source is left alone");
}

#[test]
fn a_wrong_source_is_told_with_the_place() {
    for (yaml, expected) in [
        ("url: tcp://h\ntopics: [t]", "1:6: error: source devices: `tcp://` is no MQTT broker"),
        ("url: embedded:0\ntopics: [t]", "`embedded:0`: a port is 1 to 65535"),
        ("url: mqtt://h\ntopics: []", "`topics` is empty"),
        ("url: mqtt://h\ntopics: [t, \"a/b#\"]", "2:16: error: source devices: `b#`: `+`, `#` and `{name}`"),
        ("url: mqtt://h\ntopics: [\"a/{x}\", a/+]", "the same filter `a/+`"),
        ("url: mqtt://h\ntopics: [t]\nqos: 3", "3:6: error: source devices: `qos` is 0, 1 or 2, not 3"),
        ("url: mqtt://h\ntopics: [t]\nversion: 4", "`version` is 3 (for 3.1.1) or 5, not 4"),
        ("url: mqtt://h\ntopics: [t]\nversion: 3\nsession_expiry: 1d", "`session_expiry` is of version 5"),
        ("url: mqtt://h\ntopics: [t]\nkeep_alive: 1s", "`keep_alive` is 5s to 65535s, not 1s"),
        ("url: mqtt://h\ntopics: [t]\nmax_message: 1GiB", "`max_message` is 1B to 256MiB"),
        ("url: mqtt://h\ntopics: [t]\nreceive_maximum: 0", "`receive_maximum` is 1 to 65535"),
        ("url: mqtt://h\ntopics: [t]\nca: a.pem", "`ca` is for TLS"),
        ("url: mqtt://h\ntopics: [\"{a}/t\"]\nfields: {a: int}", "column `a` is in `fields`"),
        ("url: mqtt://h\ntopics: [\"{payload}/t\"]", "the source has a column `payload` already"),
        ("url: mqtt://h\ntopics: [t]\nsession: lasting", "unknown value `lasting`"),
    ] {
        let Err(problems) = source_config(yaml) else { panic!("{yaml}") };
        assert!(problems.contains(expected), "{yaml}:\n{problems}");
    }
}

#[test]
fn a_source_says_what_it_emits() {
    for (more, columns, delivery) in [
        ("", "device,topic,payload", Delivery::Acknowledged),
        ("fields: {n: int}", "device,n", Delivery::Acknowledged),
        ("fields: {n: int}\ntopic: true\nqos: 0", "device,topic,n", Delivery::BestEffort),
        ("session: clean", "device,topic,payload", Delivery::BestEffort),
    ] {
        let (_, shape) = source_config(&format!("url: mqtt://h\ntopics: [\"a/{{device}}\"]\n{more}")).expect(more);
        let names: Vec<&str> = shape.schema.fields().iter().map(|field| field.name().as_str()).collect();
        assert_eq!((names.join(","), shape.delivery), (columns.to_owned(), delivery), "{more}");
    }
}

#[cfg(feature = "embedded-broker")]
#[tokio::test(flavor = "multi_thread")]
async fn the_embedded_broker_serves_clients_of_both_versions() {
    let port = free_port();
    for version in [3, 5] {
        let folder = Scratch::new();
        let yaml = format!("url: embedded:{port}\nversion: {version}\ntopics: [\"t/{{device}}\"]\nfields: {{n: int}}");
        let (config, mut source) = source(&yaml, &folder);
        let mut connection = Connection::open(source.as_mut()).await;
        for (protocol, qos, line) in
            [("mqttv311", "1", r#"{"n":1}"#), ("mqttv5", "1", r#"{"n":2}"#), ("mqttv5", "0", r#"{"n":3}"#)]
        {
            let mut options = vec!["-V", protocol, "-q", qos];
            if protocol == "mqttv5" {
                options.extend(["-D", "publish", "user-property", "from", "test"]);
            }
            publish(port, "t/d1", &options, &[line]);
        }
        let records = connection.receive(3).await;
        let rows = (1..=3).map(|n| format!("{{\"device\":\"d1\",\"n\":{n}}}")).collect::<Vec<_>>();
        assert_eq!(json(&decode(&config, &records)), rows);
        connection.acknowledge(&records[..1]).await;
        drop(connection);
        // The session lives as long as the process.
        publish(port, "t/d1", &["-q", "1"], &[r#"{"n":4}"#]);
        let mut connection = Connection::open(source.as_mut()).await;
        let mut seen = BTreeSet::new();
        while !seen.contains(r#"{"n":2}"#) || !seen.contains(r#"{"n":4}"#) {
            let records = patiently("messages", connection.reader.next()).await.expect("messages");
            connection.acknowledge(&records).await;
            seen.extend(payloads(&records));
        }
    }
}

#[cfg(feature = "embedded-broker")]
#[tokio::test(flavor = "multi_thread")]
async fn an_embedded_broker_on_a_taken_port_says_so() {
    let broker = Mosquitto::start();
    let folder = Scratch::new();
    let (_, mut source) = source(&format!("url: embedded:{}\ntopics: [t]", broker.port), &folder);
    let error = connect(source.as_mut()).await.err().expect("a taken port").to_string();
    assert!(error.contains(&format!("cannot listen on 127.0.0.1:{}", broker.port)), "{error}");
    assert!(error.contains("in use") && error.contains("embedded:PORT"), "{error}");
}

fn sink_inputs() -> Vec<SinkInput> {
    let schema = schema_of([("device_id", FieldType::String), ("n", FieldType::Int)]);
    let shape = StreamShape { schema, keys: vec!["device_id".into()], windowed: false };
    vec![SinkInput { metric: "load".into(), shape: shape.clone() }, SinkInput { metric: "other".into(), shape }]
}

fn sink(yaml: &str, folder: &Path) -> Result<Box<dyn OutboxSink>, String> {
    let inputs = sink_inputs();
    let mut problems = Problems::default();
    let config = {
        let node = parse(yaml).expect("YAML");
        let mut cx = CheckContext::new(&mut problems, "sink out", Position { line: 1, column: 1 }, folder);
        let config = deserialize::read::<SinkYaml>(&node, &mut cx);
        config.filter(|config| config.check(&inputs, &mut cx).is_some())
    };
    let config = config.ok_or_else(|| problems.render("test.yaml"))?;
    let live = Live::new("epoch".into(), Arc::new(Status::default()), Vec::new());
    let cx = SinkContext {
        name: "out".into(),
        inputs,
        folder: folder.to_owned(),
        routes: Routes::default(),
        live: Arc::new(live),
        tails: Vec::new(),
    };
    match config.build(cx).expect("a sink") {
        Sink::Outbox(sink, _) => Ok(sink),
        Sink::Staging(_) | Sink::Live(_) => panic!("an mqtt sink has an outbox"),
    }
}

fn sink_rows(devices: &[Option<&str>]) -> RecordBatch {
    let count = i64::try_from(devices.len()).expect("few rows");
    let columns: [arrow::array::ArrayRef; 2] =
        [Arc::new(StringArray::from(devices.to_vec())), Arc::new(Int64Array::from_iter_values(0..count))];
    RecordBatch::try_new(Arc::clone(&sink_inputs()[0].shape.schema), columns.to_vec()).expect("rows")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sink_publishes_every_row_to_its_topic() {
    let broker = Mosquitto::start_in_memory();
    let folder = Scratch::new();
    for (version, qos) in [(3, 0), (3, 1), (3, 2), (5, 0), (5, 1), (5, 2)] {
        let yaml = format!(
            "url: mqtt://127.0.0.1:{}\nversion: {version}\nqos: {qos}\ntopic: \"m/{{metric}}/{{device_id}}\"",
            broker.port
        );
        let subscriber = subscribe(broker.port, "m/#", &[]);
        let mut sink = sink(&yaml, folder.path()).expect("a sink");
        patiently("a connection", sink.connect()).await.expect("connected");
        let devices: Vec<String> = (0..2500).map(|n| format!("d{n}")).collect();
        let mut devices: Vec<Option<&str>> = devices.iter().map(|d| Some(d.as_str())).collect();
        devices.extend([None, Some("a/b")]);
        patiently("delivery", sink.deliver(0, &sink_rows(&devices), 7)).await.expect("delivered");
        patiently("delivery", sink.deliver(1, &sink_rows(&[Some("last")]), 8)).await.expect("delivered");
        let printed = wait_for("the last message", || {
            let printed = subscriber.printed();
            printed.lines().any(|line| line.starts_with("m/other/last")).then_some(printed)
        });
        let found: Vec<&str> = printed.lines().filter(|line| line.starts_with("m/")).collect();
        let mut expected: Vec<String> =
            (0..2500).map(|n| format!("m/load/d{n} {{\"device_id\":\"d{n}\",\"n\":{n}}}")).collect();
        expected.push("m/load/_ {\"device_id\":null,\"n\":2500}".into());
        expected.push("m/load/a%2Fb {\"device_id\":\"a/b\",\"n\":2501}".into());
        expected.push("m/other/last {\"device_id\":\"last\",\"n\":0}".into());
        assert_eq!(found, expected, "version {version}, qos {qos}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_larger_than_the_broker_takes_is_left_out_alone() {
    const BYTES_MAX: usize = 4000;
    let broker = Mosquitto::start_with(&format!("allow_anonymous true\nmax_packet_size {BYTES_MAX}"));
    let folder = Scratch::new();
    for qos in [0, 1, 2] {
        let subscriber = subscribe(broker.port, "m/#", &[]);
        let yaml = format!("url: mqtt://127.0.0.1:{}\nqos: {qos}\ntopic: m/{{metric}}", broker.port);
        let mut sink = sink(&yaml, folder.path()).expect("a sink");
        patiently("a connection", sink.connect()).await.expect("connected");
        // Type and length of the packet, topic, packet id, the property `id`, and the row without its text.
        let packet_id = if qos > 0 { 2 } else { 0 };
        let around = 1 + 2 + 2 + "m/load".len() + packet_id + 1 + 39 + r#"{"device_id":"","n":1}"#.len();
        let fits = "x".repeat(BYTES_MAX - around);
        let too_large = format!("{fits}x");
        let rows = [&fits[1..], &too_large, &fits, "small"].map(Some);
        for id in [4, 8] {
            let error = patiently("delivery", sink.deliver(0, &sink_rows(&rows), id)).await.expect_err("one too large");
            assert_eq!(error.retry, pipeline::error::Retry::Never, "{error}");
            assert!(error.to_string().contains("1 rows make a message of more than the 4000 bytes"), "{error}");
        }
        patiently("delivery", sink.deliver(0, &sink_rows(&[Some("last")]), 9)).await.expect("the same connection");
        let printed = wait_for("the last message", || {
            let printed = subscriber.printed();
            printed.contains(r#""last""#).then_some(printed)
        });
        let numbers: Vec<&str> =
            printed.lines().filter_map(|line| line.rsplit_once("\"n\":")).map(|(_, n)| n).collect();
        assert_eq!(numbers, ["0}", "2}", "3}", "0}", "2}", "3}", "0}"], "qos {qos}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_id_of_a_message_depends_on_its_content_alone() {
    let broker = Mosquitto::start_in_memory();
    let folder = Scratch::new();
    let subscriber = subscribe(broker.port, "m/#", &["-V", "5", "-F", "%P %p"]);
    let yaml = format!("url: mqtt://127.0.0.1:{}\ntopic: \"m/{{metric}}\"", broker.port);
    let mut sink = sink(&yaml, folder.path()).expect("a sink");
    patiently("a connection", sink.connect()).await.expect("connected");
    let all = sink_rows(&[Some("a"), Some("b"), Some("c")]);
    // Cut otherwise, as after a crash; then the same rows of another metric.
    for (input, rows, id) in
        [(0, all.clone(), 3), (0, all.slice(0, 1), 1), (0, all.slice(1, 2), 9), (1, all.clone(), 3)]
    {
        patiently("delivery", sink.deliver(input, &rows, id)).await.expect("delivered");
    }
    let last = sink_rows(&[Some("last")]);
    patiently("delivery", sink.deliver(0, &last, 10)).await.expect("delivered");
    let printed = wait_for("the last message", || {
        let printed = subscriber.printed();
        printed.contains(r#""last""#).then_some(printed)
    });
    let ids: Vec<&str> = printed.lines().filter_map(|line| line.strip_prefix("id:")?.split(' ').next()).collect();
    assert_eq!(ids.len(), 10, "{printed}");
    assert_eq!(ids[..3], ids[3..6]);
    let different: std::collections::HashSet<&str> = ids.iter().copied().collect();
    assert_eq!(different.len(), 7, "{ids:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sink_whose_broker_was_away_connects_and_delivers_again() {
    for version in [3, 5] {
        let mut broker = Mosquitto::start();
        let folder = Scratch::new();
        let yaml = format!(
            "url: mqtt://127.0.0.1:{}\nversion: {version}\ntopic: out/{{device_id}}\nretain: true",
            broker.port
        );
        let mut sink = sink(&yaml, folder.path()).expect("a sink");
        patiently("a connection", sink.connect()).await.expect("connected");
        broker.end("KILL");
        let large = "x".repeat(100_000);
        let rows = sink_rows(&[Some(&large[..50_000]), Some("small")]);
        let error = patiently("an error", sink.deliver(0, &rows, 1)).await.expect_err("no broker");
        assert_eq!(error.retry, pipeline::error::Retry::BackOff, "{error}");
        patiently("a refusal", sink.connect()).await.expect_err("no broker");
        broker.restart();
        patiently("a connection", sink.connect()).await.expect("connected");
        patiently("delivery", sink.deliver(0, &rows, 1)).await.expect("delivered");
        let late = subscribe(broker.port, "out/#", &[]);
        wait_for("the retained rows", || {
            let printed = late.printed();
            (printed.contains("out/small {") && printed.contains(&large[..50_000])).then_some(())
        });
    }
}

#[test]
fn a_wrong_sink_is_told_with_the_place() {
    for (yaml, expected) in [
        ("url: http://h\ntopic: t", "1:6: error: sink out: `http://` is no MQTT broker"),
        ("url: mqtt://h\ntopic: a/{nobody}", "2:10: error: sink out: rows of `load`: no column `nobody` here"),
        ("url: mqtt://h\ntopic: a/#", "2:10: error: sink out: a topic to publish to has no"),
        ("url: mqtt://h\ntopic: t\nbatch: {rows: 0}", "`rows` is 1 to 8192"),
        ("url: mqtt://h\ntopic: t\nqos: 9", "`qos` is 0, 1 or 2, not 9"),
    ] {
        let problems = sink(yaml, Path::new(".")).err().expect(yaml);
        assert!(problems.contains(expected), "{yaml}:\n{problems}");
    }
}
