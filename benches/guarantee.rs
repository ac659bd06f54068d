//! What the guarantees cost: messages per second from Mosquitto (QoS 1) with them and of a bare rumqttc subscriber; the
//! delay with and without them; and how long a checkpoint holds up a pipeline of 100,000 keys.
//!
//! `cargo bench --bench guarantee`: every round runs all of them, one after the other, on one broker with its default
//! settings. Publisher, subscriber and clients are this process.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use arrow::array::{Float64Array, Int64Array, RecordBatch, StringArray};
use futures::StreamExt;
use futures::future::join_all;
use pipeline::batch::{BATCH_ROWS_MAX, Batch, Stage, Times};
use pipeline::config::deserialize::read;
use pipeline::config::{CheckContext, Position, Problems, tree};
use pipeline::plugin::{OperatorConfig, Output, StreamShape};
use pipeline::schema::{FieldType, schema_of};
use pipeline::state::StateWriter;
use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::Packet;
use rumqttc::v5::{AsyncClient, Event, MqttOptions};
use tokio_tungstenite::tungstenite::Message;

mod servers;

use servers::{Running, free_port, start};

const ROUNDS: usize = 5;
const SECONDS: u64 = 5;
/// That of the program.
const RECEIVE_MAXIMUM: u16 = 10_000;
/// Publishers that flood the broker: one, which mostly waits for the broker, and enough to keep every core busy.
const PUBLISHERS: [usize; 2] = [1, 4];
/// Messages a second while delays are measured.
const PACE: u64 = 1_000;

/// A program that counts the messages of the broker, in a folder of its own.
struct Program {
    port: u16,
    _folder: tempfile::TempDir,
    _process: Running,
}

impl Program {
    fn start(broker: u16, source: &str) -> Self {
        let (folder, port) = (tempfile::tempdir().expect("a folder"), free_port());
        let yaml = format!(
            "server: {{listen: 127.0.0.1:{port}}}
sources:
  devices: {{type: mqtt, url: 'mqtt://127.0.0.1:{broker}', topics: ['d/{{device_id}}'], fields: {{sent_ns: int, value: float}}, {source}}}
pipelines:
  readings: {{from: devices, key: [device_id], to: [live]}}
  load: {{from: devices, steps: [window: {{tumbling: 1s, group_by: [device_id], aggregate: {{rps: rate()}}}}], to: [history]}}
sinks:
  live: {{type: websocket, path: /ws, snapshot: false}}
  history: {{type: parquet, path: history, roll: 10s}}
"
        );
        std::fs::write(folder.path().join("pipelines.yaml"), yaml).expect("a file");
        let process = start(Command::new(env!("CARGO_BIN_EXE_pipeline")).current_dir(folder.path()), port);
        let program = Self { port, _folder: folder, _process: process };
        while !program.get("/health").contains("\"healthy\"") {
            std::thread::sleep(Duration::from_millis(20));
        }
        program
    }

    fn get(&self, path: &str) -> String {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(("127.0.0.1", self.port)).expect("connected");
        let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        answer
    }

    /// Messages taken in so far.
    fn received(&self) -> u64 {
        let metrics = self.get("/metrics");
        let line =
            metrics.lines().find(|line| line.starts_with("tailwater_rows_out_total") && line.contains("\"devices\""));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).expect("a counter")
    }
}

fn client(id: &str, broker: u16) -> (AsyncClient, rumqttc::v5::EventLoop) {
    let mut options = MqttOptions::new(id, "127.0.0.1", broker);
    options.set_keep_alive(Duration::from_secs(30)).set_receive_maximum(Some(RECEIVE_MAXIMUM));
    AsyncClient::new(options, 1000)
}

/// Publishes as fast as the broker takes messages, until `stop`.
async fn flood(broker: u16, number: usize, stop: Arc<AtomicBool>) {
    let (publisher, mut events) = client(&format!("flood {number}"), broker);
    let driver = tokio::spawn(async move { while events.poll().await.is_ok() {} });
    let mut n = 0_u64;
    while !stop.load(Relaxed) {
        publish(&publisher, n, 0).await;
        n += 1;
    }
    driver.abort();
}

async fn publish(publisher: &AsyncClient, n: u64, sent_ns: u64) {
    let payload = format!(
        r#"{{"sent_ns":{sent_ns},"value":{n}.5,"text":"a text that makes the message about 150 bytes long, as a device's reading often is"}}"#
    );
    publisher.publish(format!("d/dev{}", n % 100), QoS::AtLeastOnce, false, payload).await.expect("published");
}

/// Messages per second that `received` counts while the broker is flooded.
async fn throughput(broker: u16, publishers: usize, received: impl Fn() -> u64) -> f64 {
    let stop = Arc::new(AtomicBool::new(false));
    let floods = (0..publishers).map(|number| tokio::spawn(flood(broker, number, Arc::clone(&stop))));
    let flooding = join_all(floods.collect::<Vec<_>>());
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (before, since) = (received(), Instant::now());
    tokio::time::sleep(Duration::from_secs(SECONDS)).await;
    let rate = (received() - before) as f64 / since.elapsed().as_secs_f64();
    stop.store(true, Relaxed);
    flooding.await;
    rate
}

async fn bare(broker: u16, publishers: usize) -> f64 {
    let (subscriber, mut events) = client("bare", broker);
    subscriber.subscribe("d/+", QoS::AtLeastOnce).await.expect("subscribed");
    let count = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&count);
    let driver = tokio::spawn(async move {
        while let Ok(event) = events.poll().await {
            if matches!(event, Event::Incoming(Packet::Publish(_))) {
                counted.fetch_add(1, Relaxed);
            }
        }
    });
    let rate = throughput(broker, publishers, || count.load(Relaxed)).await;
    driver.abort();
    rate
}

/// The 99th percentile of the delay from publisher to a WebSocket client, in microseconds.
async fn delay(broker: u16, program: &Program) -> u64 {
    let since = Instant::now();
    let stream = tokio::net::TcpStream::connect(("127.0.0.1", program.port)).await.expect("connected");
    let url = format!("ws://127.0.0.1:{}/ws", program.port);
    let (mut socket, _) = tokio_tungstenite::client_async(url, stream).await.expect("a handshake");
    let reading = tokio::spawn(async move {
        let mut delays = Vec::new();
        while (delays.len() as u64) < PACE * SECONDS {
            let Some(Ok(Message::Text(text))) = socket.next().await else { break };
            let now = since.elapsed().as_nanos() as u64;
            for part in text.split("\"sent_ns\":").skip(1) {
                let digits = part.split(',').next().and_then(|digits| digits.parse::<u64>().ok());
                delays.extend(digits.filter(|sent| *sent > 0).map(|sent| now.saturating_sub(sent) / 1000));
            }
        }
        delays
    });
    let (publisher, mut events) = client("pace", broker);
    // The first messages must not wait for the connection.
    while !matches!(events.poll().await.expect("the broker"), Event::Incoming(Packet::ConnAck(_))) {}
    let driver = tokio::spawn(async move { while events.poll().await.is_ok() {} });
    let mut tick = tokio::time::interval(Duration::from_micros(1_000_000 / PACE));
    for n in 0..PACE * SECONDS {
        tick.tick().await;
        publish(&publisher, n, since.elapsed().as_nanos() as u64).await;
    }
    let mut delays = reading.await.expect("no panic");
    driver.abort();
    delays.sort_unstable();
    delays[(delays.len() * 99 / 100).min(delays.len() - 1)]
}

/// Milliseconds for which a checkpoint holds up a pipeline with so many keys in its window.
fn checkpoint_stop(keys: usize, aggregate: &str) -> (f64, usize) {
    let columns = [("device_id", FieldType::String), ("latency_ms", FieldType::Float)];
    let mut problems = Problems::default();
    let yaml = format!("{{tumbling: 1h, group_by: [device_id], aggregate: {aggregate}}}");
    let node = tree::parse(&yaml).expect("YAML");
    let mut cx = CheckContext::new(&mut problems, "bench", Position::default(), Path::new("."));
    let shape = StreamShape { schema: schema_of(columns), keys: Vec::new(), windowed: false };
    let planned = read::<operators::window::WindowConfig>(&node, &mut cx).and_then(|c| c.plan(&[shape], &mut cx));
    let mut window = planned.expect("a window").operator;
    for round in 0..4_usize {
        for first in (0..keys).step_by(BATCH_ROWS_MAX) {
            let ids = first..keys.min(first + BATCH_ROWS_MAX);
            let count = ids.len();
            let names = StringArray::from_iter_values(ids.clone().map(|key| format!("device-{key}")));
            let values = Float64Array::from_iter_values(ids.map(|key| (key * (round + 3) % 977) as f64));
            let rows = RecordBatch::try_new(schema_of(columns), vec![Arc::new(names), Arc::new(values)]).expect("rows");
            let times = Times {
                event_us: Int64Array::from_value(1, count),
                ingest_us: Int64Array::from_value(1, count),
                watermark_us: Int64Array::from_value(0, count),
            };
            let batch = Batch::new(rows, times, Stage::Final).expect("a batch");
            window.process(0, batch, &mut Output::default()).expect("taken");
        }
    }
    let mut taken: Vec<(f64, usize)> = (0..9)
        .map(|_| {
            let since = Instant::now();
            let mut state = StateWriter::default();
            window.snapshot(&mut state);
            (since.elapsed().as_secs_f64() * 1e3, state.finish().len())
        })
        .collect();
    taken.sort_by(|a, b| a.0.total_cmp(&b.0));
    taken[taken.len() / 2]
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
#[allow(clippy::print_stdout, reason = "the figures are the result")]
async fn main() {
    for aggregate in
        ["{n: count(), avg_ms: avg(latency_ms), max_ms: max(latency_ms)}", "{p99_ms: 'percentile(latency_ms, 0.99)'}"]
    {
        let (milliseconds, bytes) = checkpoint_stop(100_000, aggregate);
        println!("checkpoint of 100,000 keys, {aggregate}: {milliseconds:.1} ms, {:.1} MB", bytes as f64 / 1e6);
    }
    let scratch = tempfile::tempdir().expect("a folder");
    let broker = free_port();
    let config = scratch.path().join("mosquitto.conf");
    std::fs::write(&config, format!("listener {broker} 127.0.0.1\nallow_anonymous true\n")).expect("a file");
    let _broker = start(Command::new("mosquitto").arg("-c").arg(&config), broker);
    let (with, without) = ("qos: 1", "qos: 1, session: clean");
    let mut figures: Vec<[f64; 6]> = Vec::new();
    for round in 1..=ROUNDS {
        let mut line = [0.0; 6];
        for (index, publishers) in PUBLISHERS.into_iter().enumerate() {
            line[index * 2] = bare(broker, publishers).await;
            let program = Program::start(broker, with);
            line[index * 2 + 1] = throughput(broker, publishers, || program.received()).await;
        }
        for (index, source) in [with, without].into_iter().enumerate() {
            let program = Program::start(broker, source);
            line[4 + index] = delay(broker, &program).await as f64;
        }
        let [bare_1, with_1, bare_4, with_4, with_us, without_us] = line;
        println!(
            "round {round}: bare {bare_1:.0}/s, with {with_1:.0}/s; 4 publishers: bare {bare_4:.0}/s, with {with_4:.0}/s; \
             p99 with {with_us:.0} us, without {without_us:.0} us"
        );
        figures.push(line);
    }
    let of = |value: fn(&[f64; 6]) -> f64| median(figures.iter().map(value).collect());
    println!(
        "medians: {:.2} of the bare subscriber ({:.0}/s), with 4 publishers {:.2} ({:.0}/s); p99 {:+.0} us beside no guarantee",
        of(|line| line[1] / line[0]),
        of(|line| line[1]),
        of(|line| line[3] / line[2]),
        of(|line| line[3]),
        of(|line| line[4] - line[5]),
    );
}
