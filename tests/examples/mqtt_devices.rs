//! Device messages of a broker to clients that name their devices.

use serde_json::Value;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use crate::support::free_port;
use crate::support::mosquitto::{Mosquitto, publish};
use crate::support::program::{Program, Sse, get};
use crate::support::websocket::Client;

const YAML: &str = "mqtt-devices.yaml";
const PATH: &str = "/api/v1/stream";
const SSE_PATH: &str = "/api/v1/stream/sse";

/// What a device sends, with a number to tell its messages apart.
fn message(device: &str, number: usize) -> String {
    format!(
        r#"{{"device_id":"{device}","temperature":21.5,"humidity":48.25,"battery_percent":{number},"location":{{"lat":-33.45,"room":["a",1]}},"ts":"2026-11-20T12:00:00.250Z"}}"#
    )
}

fn frame(device: &str, number: usize) -> String {
    format!(r#"{{"event":"message","data":{}}}"#, message(device, number))
}

fn send(port: u16, device: &str, numbers: std::ops::Range<usize>) {
    let messages: Vec<String> = numbers.map(|number| message(device, number)).collect();
    let messages: Vec<&str> = messages.iter().map(String::as_str).collect();
    publish(port, &format!("devices/{device}/telemetry"), &["-q", "1"], &messages);
}

async fn connect(program: &Program, devices: &str) -> Client {
    Client::connect(program.address(), &format!("{PATH}?device_ids={devices}")).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_gets_the_messages_of_its_devices_and_no_others() {
    let broker = Mosquitto::start();
    let url = format!("mqtt://127.0.0.1:{}", broker.port);
    let program = Program::start_example(YAML, &[("MQTT_URL", &url)]);
    program.wait_healthy();
    let mut both = connect(&program, "0848086072,0848086073").await;
    let mut one = connect(&program, "0848086072").await;
    let mut other = connect(&program, "0848086074").await;
    let mut legacy = Sse::open(program.port, &format!("{SSE_PATH}?device_ids=0848086072"));
    assert_eq!(legacy.status, 200);

    for (device, count) in [("0848086075", 3), ("0848086074", 1), ("0848086073", 2), ("0848086072", 3)] {
        send(broker.port, device, 0..count);
    }
    for (device, count) in [("0848086073", 2), ("0848086072", 3)] {
        for number in 0..count {
            assert_eq!(both.text().await, frame(device, number));
        }
    }
    for number in 0..3 {
        assert_eq!(one.text().await, frame("0848086072", number));
    }
    assert_eq!(other.text().await, frame("0848086074", 0));
    for number in 0..3 {
        let (event, _, data) = legacy.next();
        assert_eq!((event.as_str(), data), ("message", message("0848086072", number)));
    }
    // All has been sent that was to be sent: nothing else waits before the answer.
    for client in [&mut both, &mut one, &mut other] {
        client.send("ping").await;
        assert_eq!(client.text().await, "pong");
    }
    let stats = program.get("/api/v1/stats");
    assert_eq!((&stats["total_messages_processed"], &stats["active_connections"]), (&9.into(), &4.into()), "{stats}");
    program.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_names_no_device_is_told_so() {
    let broker = Mosquitto::start();
    let url = format!("mqtt://127.0.0.1:{}", broker.port);
    let program = Program::start_example(YAML, &[("MQTT_URL", &url)]);
    for path in [PATH.to_owned(), format!("{PATH}?device_ids=")] {
        let mut client = Client::connect(program.address(), &path).await;
        let text = client.text().await;
        let error: Value = serde_json::from_str(&text).expect("JSON");
        let message = error["data"]["message"].as_str().expect("a message");
        assert!(message.contains("`device_ids` is required"), "{text}");
        assert_eq!(text, format!(r#"{{"event":"error","data":{{"message":{}}}}}"#, error["data"]["message"]));
        assert_eq!(client.closed().await, CloseCode::Policy);
    }
    let (status, body) = get(program.port, SSE_PATH).expect("an answer");
    assert_eq!(status, 400, "{body}");
    assert!(body.contains("`device_ids` is required"), "{body}");
    program.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_connection_is_kept_alive() {
    // As the example says, a broker inside the process does as well.
    let port = free_port();
    let url = format!("embedded:{port}");
    let program = Program::start_example(YAML, &[("MQTT_URL", &url), ("KEEP_ALIVE", "1s")]);
    program.wait_healthy();
    let mut client = connect(&program, "0848086072").await;
    for _ in 0..2 {
        assert_eq!(client.text().await, r#"{"event":"ping","data":{"type":"keep-alive"}}"#);
    }
    send(port, "0848086072", 0..1);
    loop {
        match client.json().await {
            frame if frame["event"] == "ping" => {}
            frame => break assert_eq!(frame["data"]["device_id"], "0848086072"),
        }
    }
    program.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn hundreds_of_clients_share_one_connection_to_the_broker() {
    const CLIENTS: usize = 200;
    const DEVICES: usize = 10;
    const MESSAGES: usize = 20;
    let broker = Mosquitto::start();
    let url = format!("mqtt://127.0.0.1:{}", broker.port);
    let program = Program::start_example(YAML, &[("MQTT_URL", &url)]);
    program.wait_healthy();
    let device = |number: usize| format!("device-{}", number % DEVICES);
    let mut clients = Vec::new();
    for number in 0..CLIENTS {
        clients.push((number, connect(&program, &device(number)).await));
    }
    for number in 0..DEVICES {
        send(broker.port, &device(number), 0..MESSAGES);
    }
    for (number, client) in &mut clients {
        for message in 0..MESSAGES {
            assert_eq!(client.text().await, frame(&device(*number), message));
        }
    }
    assert_eq!(program.source("devices")["rows_out"], DEVICES * MESSAGES);
    program.stop();
}
