//! Posted messages by way of Redis into PostgreSQL, and the worker's figures over a WebSocket.

use std::sync::Arc;
use std::time::Duration;

use pipeline::time::parse_us;
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::support::databases::{POSTGRES, Server, execute, unique};
use crate::support::program::{Program, request};
use crate::support::redis::Redis;
use crate::support::websocket::Client;
use crate::support::{PATIENCE, Scratch, wait_for};

const YAML: &str = "redis-worker.yaml";

/// The servers of the example.
struct World {
    redis: Redis,
    _postgres: Arc<Server>,
    database: String,
}

impl World {
    async fn start() -> Self {
        let postgres = POSTGRES.get();
        let name = unique("messages");
        execute(&postgres.url("postgres"), &format!("CREATE DATABASE {name}")).await;
        Self { redis: Redis::start(), database: postgres.url(&name), _postgres: postgres }
    }

    fn run(&self, scratch: Scratch) -> Program {
        let environment = [("REDIS_URL", self.redis.url()), ("DATABASE_URL", self.database.clone())];
        let environment = environment.each_ref().map(|(name, value)| (*name, value.as_str()));
        let program = Program::start_example_in(scratch, YAML, &environment);
        program.wait_healthy();
        program
    }

    /// One number of the database; `None` while its table is missing.
    async fn number(&self, sql: &str) -> Option<i64> {
        let mut connection = PgConnection::connect(&self.database).await.expect("a connection");
        sqlx::query_scalar(AssertSqlSafe(sql.to_owned())).fetch_one(&mut connection).await.ok()
    }

    fn counter(&self, key: &str) -> i64 {
        self.redis.command(&["GET", key]).parse().unwrap_or(0)
    }

    /// Waits until `total` messages are stored and counted, and nothing waits any more.
    async fn wait_stored(&self, total: i64) {
        // As rarely as `wait_for` asks: every question is a connection of its own.
        let mut again = tokio::time::interval(Duration::from_millis(20));
        let stored = async {
            while self.number("SELECT count(*) FROM messages").await.unwrap_or(0) < total {
                again.tick().await;
            }
        };
        tokio::time::timeout(PATIENCE, stored).await.expect("every message in PostgreSQL");
        wait_for("the messages to be counted", || (self.counter("total_messages") >= total).then_some(()));
        for list in ["pending_messages", "pending_messages:processing"] {
            wait_for("the lists to be empty", || (self.redis.command(&["LLEN", list]) == "0").then_some(()));
        }
    }

    /// Every message once, in PostgreSQL and in the counters.
    async fn assert_once(&self, total: i64) {
        for count in ["count(*)", "count(DISTINCT content)", "count(DISTINCT user_id)", "max(user_id) + 1"] {
            assert_eq!(self.number(&format!("SELECT {count} FROM messages")).await, Some(total), "{count}");
        }
        assert_eq!(self.counter("total_messages"), total);
        assert!(self.counter("total_batches") >= (total + 49) / 50);
        let largest = "SELECT max(n) FROM (SELECT count(*) AS n FROM messages GROUP BY xmin::text) AS deliveries";
        assert_eq!(self.number(largest).await, Some(50), "a full batch is 50 rows");
    }
}

fn message(user: usize) -> Value {
    json!({"user_id": user, "channel_id": 1, "content": format!("Test {user}: ñ \"quoted\" 'n' \\ 🌊")})
}

fn post(port: u16, body: &Value) -> (u16, Value) {
    let (status, answer) = request(port, "POST", "/messages", &body.to_string()).expect("an answer");
    (status, serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{e}: {answer}")))
}

/// Posts messages of these users, each by itself, from several clients at once.
fn post_each(port: u16, users: std::ops::Range<usize>) {
    std::thread::scope(|scope| {
        for first in 0..4 {
            let users = users.clone().skip(first).step_by(4);
            scope.spawn(move || users.for_each(|user| assert_eq!(post(port, &message(user)).0, 200)));
        }
    });
}

/// Checks the shape of a frame and what its figures say of each other.
fn assert_figures(frame: &Value) {
    let names: Vec<&str> = frame.as_object().expect("an object").keys().map(String::as_str).collect();
    let expected = [
        "total_messages",
        "current_rps",
        "messages_per_second",
        "queue_depth",
        "total_batches",
        "avg_batch_size",
        "timestamp",
    ];
    assert_eq!(names, expected);
    let is_int = |name: &str| frame[name].is_i64() || frame[name].is_u64();
    assert!(["total_messages", "queue_depth", "total_batches"].into_iter().all(is_int), "{frame}");
    assert!(frame["current_rps"].is_f64() && frame["current_rps"] == frame["messages_per_second"], "{frame}");
    let number = |name: &str| frame[name].as_f64().expect("a number");
    let average = match number("total_batches") {
        0.0 => 0.0,
        batches => (number("total_messages") / batches * 10.0).round() / 10.0,
    };
    assert!((number("avg_batch_size") - average).abs() < 0.051, "{frame}");
    assert!(parse_us(frame["timestamp"].as_str().expect("text")).is_some(), "{frame}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_posted_message_is_stored_and_counted_once() {
    let world = World::start().await;
    let program = world.run(Scratch::new());
    let mut client = Client::connect(program.address(), "/ws/stats").await;
    let first = client.json().await;
    assert_figures(&first);
    for name in ["total_messages", "current_rps", "queue_depth", "total_batches", "avg_batch_size"] {
        assert_eq!(first[name].as_f64(), Some(0.0), "{name} before any message");
    }

    post_each(program.port, 0..100);
    let many: Vec<Value> = (100..600).map(message).collect();
    assert_eq!(post(program.port, &Value::Array(many)), (200, json!({"accepted": 500, "rejected": 0, "errors": []})));
    // Figures while it goes on: the rate rises, and all is counted in the end.
    let mut rates = Vec::new();
    let last = loop {
        let frame = client.json().await;
        assert_figures(&frame);
        rates.push(frame["current_rps"].as_f64().expect("a number"));
        let has_rate = rates.iter().any(|rate| *rate > 0.0);
        if frame["total_messages"] == 600 && frame["queue_depth"] == 0 && has_rate {
            break frame;
        }
    };
    // 600 messages lie in windows of 10 s: no window can say more than 60 a second.
    assert!(rates.iter().all(|rate| (0.0..=60.0).contains(rate)), "{rates:?}");
    assert_eq!(last["total_batches"], world.counter("total_batches"));
    world.wait_stored(600).await;
    world.assert_once(600).await;

    // The same state after a restart, and further messages.
    let scratch = program.stop();
    let program = world.run(scratch);
    post_each(program.port, 600..640);
    world.wait_stored(640).await;
    world.assert_once(640).await;
    program.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_without_its_fields_is_refused() {
    let world = World::start().await;
    let program = world.run(Scratch::new());
    for (body, error) in [
        (json!({"user_id": 1, "channel_id": 1}), "field `content`: required, but missing or null"),
        (json!({"user_id": null, "channel_id": 1, "content": "x"}), "field `user_id`: required, but missing or null"),
        (json!({"user_id": "one", "channel_id": 1, "content": "x"}), "field `user_id`: expected int, found \"one\""),
    ] {
        let (status, answer) = post(program.port, &body);
        assert_eq!((status, answer["errors"][0]["error"].as_str()), (400, Some(error)), "{body}");
    }
    // Right ones pass beside wrong ones; what stood in the message before does not count.
    let mixed = json!([message(0), {"user_id": 1, "channel_id": 1}]);
    let error = json!({"element": 2, "error": "field `content`: required, but missing or null"});
    assert_eq!(post(program.port, &mixed), (200, json!({"accepted": 1, "rejected": 1, "errors": [error]})));
    world.wait_stored(1).await;
    assert_eq!(world.number("SELECT count(*) FROM messages").await, Some(1));
    assert_eq!(world.counter("total_messages"), 1);
    program.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn quiet_seconds_bring_the_rate_back_to_nothing() {
    let world = World::start().await;
    let program = world.run(Scratch::new());
    let mut client = Client::connect(program.address(), "/ws/stats").await;
    post_each(program.port, 0..10);
    while client.json().await["current_rps"] != 1.0 {}
    while client.json().await["current_rps"] != 0.0 {}
    // Nobody looks: Redis is not asked.
    client.close().await;
    wait_for("nobody to look", || (program.get("/api/v1/stats")["has_subscribers"] == false).then_some(()));
    program.stop();
}
