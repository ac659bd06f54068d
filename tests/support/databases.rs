//! PostgreSQL and MariaDB, each with its own data folder, port and process.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};

use sqlx::{AssertSqlSafe, Connection, Executor};

use super::{Process, Scratch, free_port, wait_for, wait_for_port};

/// A database server that stops when this is dropped.
pub struct Server {
    process: Mutex<Option<Process>>,
    start: Box<dyn Fn() -> Command + Send + Sync>,
    /// Signal that makes it stop at once, cleanly.
    stop: &'static str,
    /// URL up to the database's name.
    base: String,
    /// Its port on 127.0.0.1.
    pub port: u16,
    _folder: Scratch,
}

impl Server {
    /// The URL of a database.
    pub fn url(&self, database: &str) -> String {
        format!("{}/{database}", self.base)
    }

    /// Stops the server and waits for its end.
    pub fn stop(&self) {
        if let Some(mut process) = self.process.lock().expect("process").take() {
            process.signal(self.stop);
            process.wait();
        }
    }

    /// Starts the server and waits until it listens.
    pub fn start(&self) {
        *self.process.lock().expect("process") = Some(Process::start(&mut (self.start)()));
        wait_for_port(self.port);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The one server of its kind for all tests that run at the moment; the last to let go stops it.
pub struct Shared {
    server: Mutex<Weak<Server>>,
    make: fn() -> Server,
}

/// PostgreSQL for all tests.
pub static POSTGRES: Shared = Shared { server: Mutex::new(Weak::new()), make: postgres };
/// MariaDB for all tests.
pub static MARIADB: Shared = Shared { server: Mutex::new(Weak::new()), make: mariadb };

impl Shared {
    /// The server, started if it does not run.
    pub fn get(&self) -> Arc<Server> {
        let mut shared = self.server.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(server) = shared.upgrade() {
            return server;
        }
        let server = Arc::new((self.make)());
        *shared = Arc::downgrade(&server);
        server
    }
}

/// A name that no other test of this process uses.
pub fn unique(prefix: &str) -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    format!("{prefix}_{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Runs statements on the database of a URL, over a connection of their own.
pub async fn execute(url: &str, sql: &str) {
    Session::open(url).await.execute(sql).await;
}

/// A connection whose transactions may stay open from one statement to the next.
pub enum Session {
    /// To PostgreSQL.
    Postgres(sqlx::PgConnection),
    /// To MariaDB.
    MySql(sqlx::MySqlConnection),
    /// To a file.
    Sqlite(sqlx::SqliteConnection),
}

impl Session {
    /// Connects to the database of a URL.
    pub async fn open(url: &str) -> Self {
        if url.starts_with("postgres") {
            Self::Postgres(sqlx::PgConnection::connect(url).await.expect(url))
        } else if url.starts_with("mysql") {
            Self::MySql(sqlx::MySqlConnection::connect(url).await.expect(url))
        } else {
            Self::Sqlite(sqlx::SqliteConnection::connect(url).await.expect(url))
        }
    }

    /// Runs statements.
    pub async fn execute(&mut self, sql: &str) {
        let statements = sqlx::raw_sql(AssertSqlSafe(sql.to_owned()));
        let done = match self {
            Self::Postgres(connection) => connection.execute(statements).await.map(drop),
            Self::MySql(connection) => connection.execute(statements).await.map(drop),
            Self::Sqlite(connection) => connection.execute(statements).await.map(drop),
        };
        done.unwrap_or_else(|e| panic!("{sql}: {e}"));
    }
}

/// Neither server runs as root: then as its own user, which gets the folder.
fn as_user(mut command: Command, user: &str, folder: &Scratch) -> Command {
    if id(None) == Some(0)
        && let Some(uid) = id(Some(user))
    {
        std::os::unix::fs::chown(folder.path(), Some(uid), Some(uid)).expect("chown");
        command.uid(uid).gid(uid);
    }
    command.current_dir(folder.path());
    command
}

fn id(user: Option<&str>) -> Option<u32> {
    let output = Command::new("id").arg("-u").args(user).output().ok()?;
    String::from_utf8(output.stdout).ok()?.trim().parse().ok()
}

fn run(mut command: Command) {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// The newest PostgreSQL of the machine.
fn postgres_program(name: &str) -> PathBuf {
    let versions = std::fs::read_dir("/usr/lib/postgresql").expect("PostgreSQL");
    let mut folders: Vec<PathBuf> = versions.filter_map(|v| Some(v.ok()?.path())).collect();
    folders.sort();
    folders.pop().expect("a version of PostgreSQL").join("bin").join(name)
}

/// A PostgreSQL of its own.
pub fn postgres() -> Server {
    let (folder, port) = (Scratch::new(), free_port());
    let data = folder.path().join("data");
    let mut initdb = Command::new(postgres_program("initdb"));
    initdb.args(["--username=tester", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "-D"]).arg(&data);
    run(as_user(initdb, "postgres", &folder));
    let (data_dir, sockets) = (data, folder.path().to_path_buf());
    let is_root = id(None) == Some(0);
    let uid = id(Some("postgres"));
    let start = move || {
        let mut command = Command::new(postgres_program("postgres"));
        command.arg("-D").arg(&data_dir).arg("-k").arg(&sockets);
        command.args(["-h", "127.0.0.1", "-p", &port.to_string(), "-c", "fsync=off"]);
        if let (true, Some(uid)) = (is_root, uid) {
            command.uid(uid).gid(uid);
        }
        command
    };
    let server = Server {
        process: Mutex::new(None),
        start: Box::new(start),
        stop: "INT",
        base: format!("postgres://tester@127.0.0.1:{port}"),
        port,
        _folder: folder,
    };
    server.start();
    wait_for("PostgreSQL", || {
        let mut ready = Command::new(postgres_program("pg_isready"));
        ready.args(["-h", "127.0.0.1", "-p", &port.to_string()]).output().ok()?.status.success().then_some(())
    });
    server
}

/// A MariaDB of its own.
pub fn mariadb() -> Server {
    let (folder, port) = (Scratch::new(), free_port());
    let data = format!("--datadir={}", folder.path().join("data").display());
    std::fs::create_dir(folder.path().join("data")).expect("data folder");
    let mut install = Command::new("mariadb-install-db");
    install.args(["--no-defaults", &data, "--auth-root-authentication-method=normal", "--skip-test-db"]);
    if let (Some(0), Some(uid)) = (id(None), id(Some("mysql"))) {
        std::os::unix::fs::chown(folder.path().join("data"), Some(uid), Some(uid)).expect("chown");
    }
    run(as_user(install, "mysql", &folder));
    let socket = format!("--socket={}", folder.path().join("socket").display());
    let is_root = id(None) == Some(0);
    let uid = id(Some("mysql"));
    let start = move || {
        let mut command = Command::new("mariadbd");
        command.args(["--no-defaults", &data, &socket, "--bind-address=127.0.0.1", "--skip-log-bin"]);
        command.arg(format!("--port={port}"));
        if let (true, Some(uid)) = (is_root, uid) {
            command.uid(uid).gid(uid);
        }
        command
    };
    let server = Server {
        process: Mutex::new(None),
        start: Box::new(start),
        stop: "TERM",
        base: format!("mysql://root@127.0.0.1:{port}"),
        port,
        _folder: folder,
    };
    server.start();
    server
}
