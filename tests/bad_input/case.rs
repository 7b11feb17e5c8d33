//! A database with a table, a store, a configuration, and `pgtide run` on them as a child process.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgtide::config::Config;
use pgtide::demo::Server;
use pgtide::engine::{Engine, Options, Status};
use pgtide::problem::{Problem, ProblemKind};
use pgtide::store::{self, Store};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio_postgres::Client;

use crate::support::{rows_as_json, shared_server, wait_until};

/// What must not take long on a machine that does something else as well.
pub(crate) const SOON: Duration = Duration::from_secs(30);
/// A slot or lock that somebody else holds is waited for, but not for ever.
pub(crate) const HELD: Duration = Duration::from_secs(40);

/// The password of roles that tests make; like every other one it must appear nowhere.
pub(crate) const PASSWORD: &str = "s3cr3t-of-the-role";
/// Of the store's user.
pub(crate) const STORE_PASSWORD: &str = "s3cr3t-of-the-store";

pub(crate) struct Case {
    pub(crate) client: Client,
    pub(crate) store: Store,
    pub(crate) slot: String,
    /// The configuration as it is written to the file.
    pub(crate) config: Value,
    folder: TempDir,
    secrets: Vec<String>,
}

/// How `pgtide run` ended.
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) logs: String,
    pub(crate) took: Duration,
}

impl Case {
    /// On the server that the tests of this binary share.
    pub(crate) async fn new() -> Self {
        Self::on(shared_server().await).await
    }

    /// In a database of its own on `server`: the table `people` of three rows, mapped to the index `people`.
    pub(crate) async fn on(server: &Server) -> Self {
        let name = format!("bad_{:016x}", fastrand::u64(..));
        server.create_database(&name).await.unwrap();
        let client = server.connect(&name).await.unwrap();
        client
            .batch_execute(
                "CREATE TABLE people (id int PRIMARY KEY, name text);
                 INSERT INTO people VALUES (1, 'Ada'), (2, 'Grace'), (3, 'Edsger')",
            )
            .await
            .unwrap();
        let store = Store::bind(loopback(0), store::Options::default()).await.unwrap();
        let cdc = server.config(&name);
        let secrets = vec![cdc.password.0.clone(), PASSWORD.to_owned(), STORE_PASSWORD.to_owned()];
        let config = json!({
            "cdc": {
                "host": cdc.host, "port": cdc.port, "username": cdc.username, "password": cdc.password.0,
                "database": name, "sslMode": "disable",
                "metric": {"port": 0},
                "publication": {"name": "tide", "createIfNotExists": true, "tables": [{"name": "people"}]},
                "slot": {"name": name, "createIfNotExists": true},
                "snapshot": {"enabled": true, "mode": "initial"},
            },
            "elasticsearch": {
                "urls": [store.url()], "batchTickerDuration": "50ms",
                "tableIndexMapping": {"public.people": "people"},
            },
        });
        Self { client, store, slot: name, config, folder: tempfile::tempdir().unwrap(), secrets }
    }

    /// Sets the value at a JSON pointer.
    pub(crate) fn set(&mut self, pointer: &str, value: impl Into<Value>) -> &mut Self {
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        self.config.pointer_mut(parent).unwrap_or_else(|| panic!("no {parent}"))[key] = value.into();
        self
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.folder.path().join("pgtide.json")
    }

    fn command(&self) -> Command {
        std::fs::write(self.file(), serde_json::to_string_pretty(&self.config).unwrap()).unwrap();
        run_command(&self.file(), self.folder.path())
    }

    /// Starts `pgtide run --headless` and lets it run.
    pub(crate) fn spawn(&self) -> Running {
        Running::spawn(self.command())
    }

    /// Runs `pgtide run --headless` to its end, and checks that it says nothing that it must not.
    pub(crate) async fn run(&self, arguments: &[&str], limit: Duration) -> Ended {
        let mut command = self.command();
        command.args(arguments);
        let running = Running::spawn(command);
        self.ended(running, limit).await
    }

    pub(crate) async fn ended(&self, running: Running, limit: Duration) -> Ended {
        let mut ended = running.end(limit).await;
        ended.logs = logs(self.folder.path());
        self.keeps_secrets(&ended.stdout);
        self.keeps_secrets(&ended.stderr);
        self.keeps_secrets(&ended.logs);
        ended
    }

    pub(crate) fn keeps_secrets(&self, text: &str) {
        for secret in &self.secrets {
            assert!(!text.contains(secret.as_str()), "a password in: {text}");
        }
    }

    /// It ends soon with `code` and one message that holds all of `words`.
    pub(crate) async fn refused(&self, code: i32, words: &[&str]) -> Ended {
        let ended = self.run(&[], SOON).await;
        ended.refused(code, words);
        ended
    }

    /// Nothing is in the way any more: it copies, goes live, and documents equal rows.
    pub(crate) async fn starts(&self) {
        let ended = self.run(&["--until-live"], SOON).await;
        assert_eq!(ended.code, Some(0), "{ended}");
        self.equal().await;
    }

    /// The slot's `confirmed_flush_lsn`; none where there is no such slot.
    pub(crate) async fn confirmed(&self) -> Option<String> {
        let sql = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1";
        self.client.query_opt(sql, &[&self.slot]).await.unwrap().map(|row| row.get(0))
    }

    /// Where PostgreSQL writes now: after everything that is committed.
    pub(crate) async fn position(&self) -> String {
        self.client.query_one("SELECT pg_current_wal_insert_lsn()::text", &[]).await.unwrap().get(0)
    }

    /// The slot has not confirmed what was committed just before `position`. Other tests' changes count too, so that
    /// what is confirmed may still rise.
    pub(crate) async fn confirmed_before(&self, position: &str) -> bool {
        let sql = "SELECT confirmed_flush_lsn < $2::text::pg_lsn FROM pg_replication_slots WHERE slot_name = $1";
        self.client.query_one(sql, &[&self.slot, &position]).await.unwrap().get(0)
    }

    /// Documents equal rows, every column, both ways.
    pub(crate) async fn equal(&self) {
        assert_eq!(documents(&self.store), rows_as_json(&self.client, "people").await);
    }

    /// Waits until they do.
    pub(crate) async fn becomes_equal(&self) {
        let rows = rows_as_json(&self.client, "people").await;
        wait_until("documents equal rows", SOON, || async { documents(&self.store) == rows }).await;
    }

    /// The same configuration as the program reads it.
    pub(crate) fn loaded(&self) -> Config {
        std::fs::write(self.file(), self.config.to_string()).unwrap();
        Config::load(self.file()).unwrap().config
    }

    /// An engine as the screen runs it: it tries again, and stays when it has failed.
    pub(crate) fn engine(&self) -> Engine {
        let mut options = Options::new(Arc::new(self.loaded()));
        options.wait_when_failed = true;
        options.dead_letter_file = self.folder.path().join("dead-letters.ndjson");
        Engine::start(options).unwrap()
    }
}

/// Documents of the index `people` by id.
pub(crate) fn documents(store: &Store) -> BTreeMap<String, Value> {
    let all = store.documents("people").into_iter();
    all.map(|(id, (_, source))| (id, serde_json::from_slice(&source).unwrap())).collect()
}

pub(crate) fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// A port on which nobody listens for the moment.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind(loopback(0)).unwrap().local_addr().unwrap().port()
}

/// `pgtide run --headless` on a file, its logs below `folder`.
pub(crate) fn run_command(file: &std::path::Path, folder: &std::path::Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgtide"));
    command.args(["run", "--headless", "--config"]).arg(file).arg("--log-folder").arg(folder.join("logs"));
    command.current_dir(folder).env("RUST_BACKTRACE", "1");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

fn logs(folder: &std::path::Path) -> String {
    let files = std::fs::read_dir(folder.join("logs")).into_iter().flatten().flatten();
    files.map(|file| std::fs::read_to_string(file.path()).unwrap()).collect()
}

/// A `pgtide` under way; killed when dropped.
pub(crate) struct Running {
    child: Child,
    output: tokio::task::JoinHandle<(String, String)>,
    began: Instant,
}

impl Running {
    pub(crate) fn spawn(mut command: Command) -> Self {
        let began = Instant::now();
        let mut child = command.spawn().unwrap();
        let (mut stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let output = tokio::spawn(async move {
            let (mut out, mut err) = (String::new(), String::new());
            let (a, b) = tokio::join!(stdout.read_to_string(&mut out), stderr.read_to_string(&mut err));
            a.unwrap();
            b.unwrap();
            (out, err)
        });
        Self { child, output, began }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id().unwrap()
    }

    /// Asks it to end as SIGTERM does.
    pub(crate) fn terminate(&self) {
        let pid = nix::unistd::Pid::from_raw(self.child.id().unwrap().try_into().unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    }

    pub(crate) async fn end(mut self, limit: Duration) -> Ended {
        let status: Option<ExitStatus> = tokio::time::timeout(limit, self.child.wait()).await.ok().map(Result::unwrap);
        let took = self.began.elapsed();
        if status.is_none() {
            self.child.kill().await.unwrap();
        }
        let (stdout, stderr) = self.output.await.unwrap();
        let ended = Ended { code: status.and_then(|status| status.code()), stdout, stderr, logs: String::new(), took };
        assert!(status.is_some(), "did not end within {limit:?}: {ended}");
        ended
    }
}

impl Ended {
    /// One clear message on stderr with all of `words`, and this exit code.
    pub(crate) fn refused(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self}");
        let messages: Vec<_> = self.stderr.lines().filter(|line| line.starts_with("pgtide: ")).collect();
        assert_eq!(messages.len(), 1, "{self}");
        let said = &self.stderr[self.stderr.find("pgtide: ").unwrap()..];
        for word in words {
            assert!(said.contains(word), "no {word:?} in {said:?}: {self}");
        }
        let message = messages[0].strip_prefix("pgtide: ").unwrap();
        // Before it, what may pass is told once as a warning.
        let others = self.stderr.lines().filter(|line| !line.ends_with("; trying again") && line.contains(message));
        assert_eq!(others.count(), 1, "the message comes more than once: {self}");
        assert!(said.lines().count() > 1, "no hint: {self}");
        for trace in ["panicked", "stack backtrace", "RUST_BACKTRACE", ".rs:"] {
            assert!(!self.stderr.contains(trace) && !self.stdout.contains(trace), "{trace} in {self}");
        }
    }
}

impl std::fmt::Display for Ended {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "code {:?} after {:?}\nstdout: {}\nstderr: {}", self.code, self.took, self.stdout, self.stderr)
    }
}

/// `GET path`; the body, or nothing while nobody answers.
pub(crate) async fn get(port: u16, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(loopback(port)).await.ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.ok()?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply).await.ok()?;
    reply.split_once("\r\n\r\n").map(|(_, body)| body.to_owned())
}

/// Waits until the engine's status is as it should be, and gives it.
pub(crate) async fn status_when(engine: &Engine, what: &str, so: impl Fn(&Status) -> bool) -> Status {
    let deadline = Instant::now() + SOON;
    loop {
        let status = engine.status();
        if so(&status) {
            return status;
        }
        let (phase, problem, attempts) = (status.phase, &status.problem, status.attempts);
        assert!(Instant::now() < deadline, "still not {what}: {phase:?}, {problem:?}, {attempts} attempts");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The problem in a status is of this kind, says all of `words`, and what to do.
pub(crate) fn says(problem: Option<&Problem>, kind: ProblemKind, words: &[&str]) {
    let problem = problem.expect("no problem");
    assert_eq!(problem.kind, kind, "{problem:?}");
    assert!(!problem.hint.is_empty(), "{problem:?}");
    for word in words {
        assert!(problem.message.contains(word) || problem.hint.contains(word), "no {word:?} in {problem:?}");
    }
}
