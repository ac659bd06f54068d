//! The sources under test, each with a real server behind it and a publisher in front of it.

use std::sync::Arc;

use rumqttc::{Client as MqttClient, Connection as MqttConnection, Event, MqttOptions, Packet, QoS};
use sqlx::{AssertSqlSafe, Connection, Executor};
use tokio::runtime::{Builder, Runtime};

use super::feed::{Answer, FIELDS, Feed, Row, Setting};
use crate::support::databases::{self, POSTGRES, Server, unique};
use crate::support::mosquitto::Mosquitto;
use crate::support::program::request;
use crate::support::redis::{Client as RedisClient, Redis};

/// How often SQL sources ask: often, so that a kill falls on a poll as soon as on anything else.
const SQL_EVERY: &str = "5ms";

/// `XADD`, read by its position.
pub(super) struct RedisStream {
    _server: Redis,
    client: RedisClient,
    url: String,
}

/// A server that keeps every write; it is not killed here, so it need not wait for its disk.
fn redis() -> Redis {
    Redis::with_options(&["--appendonly", "yes", "--appendfsync", "no"])
}

impl RedisStream {
    pub(super) fn open(setting: &Setting<'_>) -> Box<dyn Feed> {
        let server = redis();
        let url = format!("redis://127.0.0.1:{}", (setting.route)(server.port));
        Box::new(Self { client: RedisClient::connect(server.port), _server: server, url })
    }
}

impl Feed for RedisStream {
    fn yaml(&self) -> String {
        format!("type: redis\nurl: {}\nstream: rows\nstart: earliest\nfields: {FIELDS}", self.url)
    }

    fn publish(&mut self, rows: &[Row]) -> Answer {
        let add = |row: &Row| {
            let (n, at) = (row.n.to_string(), row.at_ms().to_string());
            ["XADD", "rows", "*", "s", row.feed, "n", &n, "k", row.key(), "at", &at].map(str::to_owned).to_vec()
        };
        let ids = self.client.call(&rows.iter().map(add).collect::<Vec<_>>());
        assert!(ids.iter().all(|id| id.contains('-')), "{ids:?}");
        Answer::Acknowledged
    }
}

/// `RPUSH`, taken through a processing list.
pub(super) struct RedisList {
    _server: Redis,
    client: RedisClient,
    url: String,
}

impl RedisList {
    pub(super) fn open(setting: &Setting<'_>) -> Box<dyn Feed> {
        let server = redis();
        let url = format!("redis://127.0.0.1:{}", (setting.route)(server.port));
        Box::new(Self { client: RedisClient::connect(server.port), _server: server, url })
    }
}

impl Feed for RedisList {
    fn yaml(&self) -> String {
        format!("type: redis\nurl: {}\nlist: rows\npop: left\nfields: {FIELDS}", self.url)
    }

    fn publish(&mut self, rows: &[Row]) -> Answer {
        let words = ["RPUSH".to_owned(), "rows".to_owned()].into_iter().chain(rows.iter().map(|row| row.json()));
        let lengths = self.client.call(&[words.collect()]);
        assert!(lengths[0].parse::<u64>().is_ok(), "{lengths:?}");
        Answer::Acknowledged
    }
}

/// `INSERT`, read with a cursor.
pub(super) struct Sql<C: Connection> {
    _server: Option<Arc<Server>>,
    runtime: Runtime,
    connection: C,
    url: String,
    table: String,
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// The table that a cursor reads.
fn create(table: &str) -> String {
    format!("CREATE TABLE {table} (n bigint PRIMARY KEY, s text, k text, at bigint)")
}

pub(super) fn open_postgres(setting: &Setting<'_>) -> Box<dyn Feed> {
    let server = POSTGRES.get();
    let (table, url) = (unique("fed"), server.url("postgres"));
    let runtime = runtime();
    runtime.block_on(databases::execute(&url, &create(&table)));
    let connection = runtime.block_on(sqlx::PgConnection::connect(&url)).expect("connected");
    let routed = url.replace(&server.port.to_string(), &(setting.route)(server.port).to_string());
    Box::new(Sql { _server: Some(server), runtime, connection, url: routed, table })
}

pub(super) fn open_sqlite(setting: &Setting<'_>) -> Box<dyn Feed> {
    let file = setting.folder.join("fed.db");
    let url = format!("sqlite:{}?mode=rwc", file.display());
    let runtime = runtime();
    // The writer must not be slower than its readers: it is not the database that is killed.
    runtime.block_on(databases::execute(&url, &format!("PRAGMA journal_mode = WAL; {}", create("fed"))));
    let mut connection = runtime.block_on(sqlx::SqliteConnection::connect(&url)).expect("connected");
    runtime.block_on(connection.execute("PRAGMA synchronous = OFF")).expect("set");
    Box::new(Sql { _server: None, runtime, connection, url: "sqlite:fed.db".to_owned(), table: "fed".to_owned() })
}

impl<C: Connection + Send> Feed for Sql<C>
where
    for<'c> &'c mut C: Executor<'c>,
{
    fn yaml(&self) -> String {
        let Self { url, table, .. } = self;
        format!("type: sql\nurl: \"{url}\"\nevery: {SQL_EVERY}\ntable: {table}\ncursor: n\nfields: {FIELDS}")
    }

    fn publish(&mut self, rows: &[Row]) -> Answer {
        let values: Vec<String> =
            rows.iter().map(|row| format!("({}, '{}', '{}', {})", row.n, row.feed, row.key(), row.at_ms())).collect();
        let sql = format!("INSERT INTO {} (n, s, k, at) VALUES {}", self.table, values.join(", "));
        self.runtime.block_on(self.connection.execute(sqlx::raw_sql(AssertSqlSafe(sql)))).expect("inserted");
        Answer::Acknowledged
    }
}

/// Lines of a file, read at the pace of their event time, so that kills fall into the middle of it.
pub(super) struct File {
    path: std::path::PathBuf,
}

impl File {
    pub(super) fn open(setting: &Setting<'_>) -> Box<dyn Feed> {
        Box::new(Self { path: setting.folder.join("fed.ndjson") })
    }
}

impl Feed for File {
    fn yaml(&self) -> String {
        format!("type: file\npath: fed.ndjson\ntime: at\nspeed: 10x\nfields: {FIELDS}")
    }

    fn publish(&mut self, rows: &[Row]) -> Answer {
        let lines: String = rows.iter().map(|row| row.json() + "\n").collect();
        std::fs::write(&self.path, lines).expect("a file");
        Answer::Acknowledged
    }

    fn is_bounded(&self) -> bool {
        true
    }
}

/// `PUBLISH` with quality of service 1, through Mosquitto.
pub(super) struct Mqtt {
    _broker: Mosquitto,
    client: MqttClient,
    connection: MqttConnection,
    url: String,
    version: u8,
}

/// Publications of one call that may wait for their acknowledgement.
const MQTT_IN_FLIGHT: usize = 100;

impl Mqtt {
    pub(super) fn open_v3(setting: &Setting<'_>) -> Box<dyn Feed> {
        Self::open(setting, 3)
    }

    pub(super) fn open_v5(setting: &Setting<'_>) -> Box<dyn Feed> {
        Self::open(setting, 5)
    }

    fn open(setting: &Setting<'_>, version: u8) -> Box<dyn Feed> {
        // However long the program is away: the limit of the broker is not what is tested.
        let broker = Mosquitto::start_with("allow_anonymous true\nmax_queued_messages 0");
        let url = format!("mqtt://127.0.0.1:{}", (setting.route)(broker.port));
        let options = MqttOptions::new("publisher", "127.0.0.1", broker.port);
        let (client, connection) = MqttClient::new(options, MQTT_IN_FLIGHT);
        Box::new(Self { _broker: broker, client, connection, url, version })
    }
}

impl Feed for Mqtt {
    fn yaml(&self) -> String {
        let Self { url, version, .. } = self;
        format!("type: mqtt\nurl: {url}\ntopics: [rows]\nqos: 1\nversion: {version}\nfields: {FIELDS}")
    }

    fn publish(&mut self, rows: &[Row]) -> Answer {
        for row in rows {
            self.client.try_publish("rows", QoS::AtLeastOnce, false, row.json()).expect("room in the queue");
        }
        let mut waiting = rows.len();
        while waiting > 0 {
            let event = self.connection.recv().expect("the broker").expect("the broker's answer");
            if matches!(event, Event::Incoming(Packet::PubAck(_))) {
                waiting -= 1;
            }
        }
        Answer::Acknowledged
    }
}

/// `POST`, answered by the program itself.
pub(super) struct Http {
    port: u16,
}

impl Http {
    pub(super) fn open(setting: &Setting<'_>) -> Box<dyn Feed> {
        Box::new(Self { port: setting.port })
    }
}

impl Feed for Http {
    fn yaml(&self) -> String {
        format!("type: http\npath: /rows\nfields: {FIELDS}")
    }

    fn publish(&mut self, rows: &[Row]) -> Answer {
        let lines: String = rows.iter().map(|row| row.json() + "\n").collect();
        match request(self.port, "POST", "/rows", &lines) {
            Some((200, _)) => Answer::Acknowledged,
            Some((503, _)) | None => Answer::Doubtful,
            Some((status, body)) => panic!("{status}: {body}"),
        }
    }
}
