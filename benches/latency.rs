//! Delay from an MQTT publisher to WebSocket clients, through a real Mosquitto and the built binary.
//!
//! `cargo bench --bench latency`: 100 clients that get everything, 1,000 messages a second for 10 s; then one client
//! per device. Every message carries its time of sending; publisher and clients are this process, so one clock.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use futures::StreamExt;
use rumqttc::{AsyncClient, Event, MqttOptions, Packet, QoS};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio_tungstenite::tungstenite::Message;

mod servers;

use servers::{free_port, start};

const CLIENTS: usize = 100;
const DEVICES: usize = 100;
const MESSAGES_PER_SECOND: u64 = 1_000;
const SECONDS: u64 = 10;

#[tokio::main(flavor = "multi_thread", worker_threads = 1)]
async fn main() {
    let scratch = tempfile::tempdir().expect("a folder");
    let (broker_port, port) = (free_port(), free_port());
    let config = scratch.path().join("mosquitto.conf");
    std::fs::write(&config, format!("listener {broker_port} 127.0.0.1\nallow_anonymous true\n")).expect("a file");
    let _broker = start(Command::new("mosquitto").arg("-c").arg(&config), broker_port);
    let yaml = format!(
        "server: {{listen: 127.0.0.1:{port}}}
sources:
  devices: {{type: mqtt, url: 'mqtt://127.0.0.1:{broker_port}', topics: ['d/{{device_id}}'], fields: {{sent_ns: int, value: float, text: string}}}}
pipelines:
  readings: {{from: devices, key: [device_id], to: [live]}}
sinks:
  live: {{type: websocket, path: /ws, snapshot: false}}
"
    );
    std::fs::write(scratch.path().join("pipelines.yaml"), yaml).expect("a file");
    let _program = start(Command::new(env!("CARGO_BIN_EXE_pipeline")).current_dir(scratch.path()), port);
    measure("every client gets everything", port, broker_port, |_| String::new()).await;
    measure("one client per message", port, broker_port, |client| format!("?device_id=dev{client}")).await;
}

async fn measure(name: &str, port: u16, broker_port: u16, query: impl Fn(usize) -> String) {
    let started = Instant::now();
    let delays: Arc<Mutex<Vec<u64>>> = Arc::default();
    let received = Arc::new(AtomicU64::new(0));
    let mut clients = Vec::new();
    for client in 0..CLIENTS {
        let url = format!("ws://127.0.0.1:{port}/ws{}", query(client));
        let stream = TcpStream::connect(("127.0.0.1", port)).await.expect("connected");
        stream.set_nodelay(true).expect("no delay");
        let (mut socket, _) = tokio_tungstenite::client_async(url, stream).await.expect("a handshake");
        let (delays, received) = (Arc::clone(&delays), Arc::clone(&received));
        clients.push(tokio::spawn(async move {
            let mut own = Vec::new();
            while let Some(Ok(Message::Text(text))) = socket.next().await {
                let now = started.elapsed().as_nanos() as u64;
                for part in text.split("\"sent_ns\":").skip(1) {
                    let digits = part.split(',').next().and_then(|digits| digits.parse::<u64>().ok());
                    let Some(sent) = digits else { continue };
                    if sent == u64::MAX >> 1 {
                        delays.lock().await.extend(own);
                        return;
                    }
                    own.push(now.saturating_sub(sent));
                    received.fetch_add(1, Relaxed);
                }
            }
        }));
    }
    let mut options = MqttOptions::new("latency-bench", "127.0.0.1", broker_port);
    options.set_keep_alive(Duration::from_secs(30));
    let (publisher, mut events) = AsyncClient::new(options, 1000);
    // The first messages must not wait for the connection.
    while !matches!(events.poll().await.expect("the broker"), Event::Incoming(Packet::ConnAck(_))) {}
    let driver = tokio::spawn(async move { while events.poll().await.is_ok() {} });
    let mut tick = tokio::time::interval(Duration::from_micros(1_000_000 / MESSAGES_PER_SECOND));
    for n in 0..MESSAGES_PER_SECOND * SECONDS {
        tick.tick().await;
        let sent = started.elapsed().as_nanos();
        publish(&publisher, n as usize % DEVICES, sent as u64).await;
    }
    // The last message of every device tells its clients to stop.
    for device in 0..DEVICES {
        publish(&publisher, device, u64::MAX >> 1).await;
    }
    for client in clients {
        let _ = tokio::time::timeout(Duration::from_secs(10), client).await;
    }
    driver.abort();
    let mut delays = std::mem::take(&mut *delays.lock().await);
    delays.sort_unstable();
    let at = |share: f64| {
        delays
            .get(((delays.len() as f64 * share) as usize).min(delays.len().saturating_sub(1)))
            .map_or(0, |ns| ns / 1000)
    };
    #[allow(clippy::print_stdout, reason = "the figures are the result")]
    {
        println!(
            "{name:<30} {} frames; p50 {} us, p99 {} us, p99.9 {} us, max {} us",
            received.load(Relaxed),
            at(0.5),
            at(0.99),
            at(0.999),
            at(1.0)
        );
    }
}

async fn publish(publisher: &AsyncClient, device: usize, sent_ns: u64) {
    let payload = format!(
        r#"{{"sent_ns":{sent_ns},"value":{}.5,"text":"a text that makes the message about 150 bytes long, as a device's reading often is"}}"#,
        device
    );
    publisher.publish(format!("d/dev{device}"), QoS::AtMostOnce, false, payload).await.expect("published");
}
