//! The program as processes of their own: a pipeline that can be killed, and a document store that survives it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::AtomicU16;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{LazyLock, Once};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pgtide::config::Cdc;
use pgtide::engine::Status;
use serde_json::{Value, json};
use tokio_postgres::Client;

use super::wait_until;

/// The program under test.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_pgtide");

/// An HTTP client. reqwest wants a provider of TLS even where it speaks plain HTTP.
pub fn http() -> reqwest::Client {
    static PROVIDER: Once = Once::new();
    PROVIDER.call_once(|| drop(rustls::crypto::ring::default_provider().install_default()));
    reqwest::Client::new()
}

/// Sends a signal to a process that this test started.
pub fn signal(pid: u32, signal: Signal) {
    kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
}

/// A child that does not outlive its test.
struct Owned(Child);

impl Drop for Owned {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `pgtide store` on a free port.
pub struct StoreProcess {
    child: Owned,
    /// Its URL, without a slash at the end.
    pub url: String,
    client: reqwest::Client,
}

impl StoreProcess {
    pub fn start() -> Self {
        let mut command = Command::new(PROGRAM);
        command.args(["store", "--listen", "127.0.0.1:0"]).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut url = String::new();
        let read = BufReader::new(child.stdout.take().unwrap()).read_line(&mut url);
        let child = Owned(child);
        assert!(read.unwrap() > 0, "the store printed no URL");
        let url = url.trim().trim_end_matches('/').to_owned();
        Self { child, url, client: http() }
    }

    pub fn pid(&self) -> u32 {
        self.child.0.id()
    }

    async fn call(&self, path: &str, body: &Value) -> Value {
        let request = self.client.post(format!("{}{path}", self.url)).header("content-type", "application/json");
        let response = request.body(body.to_string()).send().await.unwrap();
        let (code, text) = (response.status(), response.text().await.unwrap());
        assert!(code.is_success(), "{path}: {code} {text}");
        serde_json::from_str(&text).unwrap()
    }

    /// All documents of an index by their ids, read by scroll.
    pub async fn documents(&self, index: &str) -> BTreeMap<String, Value> {
        let mut documents = BTreeMap::new();
        let query = json!({"size": 5_000, "sort": ["_doc"]});
        let mut page = self.call(&format!("/{index}/_search?scroll=1m"), &query).await;
        loop {
            let hits = page["hits"]["hits"].as_array().unwrap();
            if hits.is_empty() {
                break;
            }
            for hit in hits {
                let id = hit["_id"].as_str().unwrap().to_owned();
                let before = documents.insert(id, hit["_source"].clone());
                assert_eq!(before, None, "a document was shown twice: {hit}");
            }
            page = self.call("/_search/scroll", &json!({"scroll": "1m", "scroll_id": page["_scroll_id"]})).await;
        }
        documents
    }

    /// Sends lines to `_bulk`; every item must succeed.
    pub async fn bulk(&self, lines: &[Value]) {
        let body: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let request = self.client.post(format!("{}/_bulk", self.url)).header("content-type", "application/x-ndjson");
        let answer: Value =
            serde_json::from_str(&request.body(body).send().await.unwrap().text().await.unwrap()).unwrap();
        assert_eq!(answer["errors"], false, "{answer}");
    }
}

/// `pgtide run --headless` with a configuration file, a log and a free port of its own; started as often as wanted.
pub struct Pipeline {
    folder: tempfile::TempDir,
    configuration: Value,
    client: reqwest::Client,
    port: u16,
    child: Option<Owned>,
    environment: Vec<(&'static str, String)>,
    starts: u32,
}

/// What a pipeline's configuration has beside the two servers.
#[derive(Clone)]
pub struct Settings {
    /// Name of slot and publication: slots are shared by all databases of a server.
    pub name: String,
    /// Tables of the schema `public`; their indices have the same names.
    pub tables: Vec<&'static str>,
    pub chunk_size: u32,
    pub batch_size_limit: u32,
    pub workers: u32,
}

impl Settings {
    fn configuration(&self, cdc: &Cdc, url: &str) -> Value {
        let tables: Vec<Value> = self.tables.iter().map(|name| json!({"name": name, "schema": "public"})).collect();
        let indices: BTreeMap<String, &str> =
            self.tables.iter().map(|name| (format!("public.{name}"), *name)).collect();
        json!({
            "cdc": {
                "host": cdc.host, "port": cdc.port, "database": cdc.database, "username": cdc.username,
                "password": cdc.password.0, "sslMode": "disable", "metric": {},
                "publication": {"name": self.name, "createIfNotExists": true, "tables": tables,
                    "operations": ["INSERT", "UPDATE", "DELETE", "TRUNCATE"]},
                "slot": {"name": self.name, "createIfNotExists": true},
                "snapshot": {"enabled": true, "mode": "initial", "chunkSize": self.chunk_size,
                    "workers": self.workers},
            },
            "elasticsearch": {"urls": [url], "tableIndexMapping": indices,
                "batchSizeLimit": self.batch_size_limit, "batchTickerDuration": "50ms"},
        })
    }
}

impl Pipeline {
    pub fn new(cdc: &Cdc, store: &StoreProcess, settings: Settings) -> Self {
        Self::of(settings.configuration(cdc, &store.url))
    }

    /// The same into the document store at `url`.
    pub fn to(cdc: &Cdc, url: &str, settings: &Settings) -> Self {
        Self::of(settings.configuration(cdc, url))
    }

    /// With a configuration of the caller's; `cdc.metric.port` is set at each start.
    pub fn of(configuration: Value) -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
            configuration,
            client: http(),
            port: 0,
            child: None,
            environment: Vec::new(),
            starts: 0,
        }
    }

    /// Puts `value` at `place` of the configuration, such as `/cdc/snapshot/claimTimeout`, from the next start on.
    pub fn set(&mut self, place: &str, value: impl Into<Value>) {
        let (parent, key) = place.rsplit_once('/').expect("a place begins with /");
        self.configuration.pointer_mut(parent).unwrap_or_else(|| panic!("{place}"))[key] = value.into();
    }

    fn log(&self) -> PathBuf {
        self.folder.path().join("output.txt")
    }

    fn log_folder(&self) -> PathBuf {
        self.folder.path().join("log")
    }

    /// The end of what the process has printed, all its lives together.
    pub fn output(&self) -> String {
        let text = String::from_utf8_lossy(&fs::read(self.log()).unwrap_or_default()).into_owned();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// More variables for its environment.
    pub fn environment(&mut self, variables: &[(&'static str, String)]) {
        self.environment.extend_from_slice(variables);
    }

    /// Starts it; returns without waiting for anything.
    pub fn start(&mut self) {
        assert!(self.child.is_none(), "it runs already");
        self.port = free_port();
        let file = self.folder.path().join("pgtide.json");
        self.configuration["cdc"]["metric"]["port"] = json!(self.port);
        fs::write(&file, self.configuration.to_string()).unwrap();
        let output = File::options().create(true).append(true).open(self.log()).unwrap();
        let mut command = Command::new(PROGRAM);
        command.args(["run", "--headless", "--config"]).arg(&file).arg("--log-folder").arg(self.log_folder());
        command.envs(self.environment.iter().map(|(name, value)| (*name, value)));
        command.stdin(Stdio::null()).stdout(output.try_clone().unwrap()).stderr(output);
        self.child = Some(Owned(command.spawn().unwrap()));
        self.starts += 1;
    }

    /// Runs another command on the same configuration: `check`, `drop --yes`.
    pub fn call(&self, command: &[&str]) -> std::process::Output {
        let file = self.folder.path().join("pgtide.json");
        fs::write(&file, self.configuration.to_string()).unwrap();
        let (name, options) = command.split_first().expect("a command");
        let mut call = Command::new(PROGRAM);
        call.arg(name).arg("--config").arg(&file).args(options).stdin(Stdio::null()).output().unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("it does not run").0.id()
    }

    /// The highest resident memory (`VmHWM`) of the process so far, in bytes.
    pub fn highest_resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
    }

    /// SIGKILL, and waits until the process is gone.
    pub fn kill(&mut self) {
        let mut child = self.child.take().expect("it does not run");
        assert_eq!(child.0.try_wait().unwrap(), None, "it had ended before the kill:\n{}", self.output());
        child.0.kill().unwrap();
        child.0.wait().unwrap();
    }

    /// How it ended by itself; none: it runs, or was not started since its last end was told.
    pub fn has_ended(&mut self) -> Option<ExitStatus> {
        let status = self.child.as_mut()?.0.try_wait().unwrap()?;
        self.child = None;
        Some(status)
    }

    /// It was started and its end was not told yet.
    pub fn is_started(&self) -> bool {
        self.child.is_some()
    }

    /// Waits until it ends by itself.
    pub async fn ended(&mut self, limit: Duration) -> ExitStatus {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.as_mut().expect("it does not run").0.try_wait().unwrap() {
                self.child = None;
                return status;
            }
            assert!(Instant::now() < deadline, "it has not ended after {limit:?}:\n{}", self.output());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// `GET /status`; none while nobody listens yet.
    pub async fn status(&self) -> Option<Status> {
        let response = self.client.get(format!("http://127.0.0.1:{}/status", self.port)).send().await.ok()?;
        Some(serde_json::from_str(&response.text().await.ok()?).expect("/status is no status"))
    }

    /// Polls `GET /status` until the condition holds, and gives the status of that moment.
    pub async fn wait(&mut self, what: &str, limit: Duration, condition: impl Fn(&Status) -> bool) -> Status {
        let deadline = Instant::now() + limit;
        let mut last = None;
        loop {
            let ended = self.child.as_mut().expect("it does not run").0.try_wait().unwrap();
            assert!(ended.is_none(), "it has ended ({ended:?}) before: {what}\n{}", self.output());
            if let Some(status) = self.status().await {
                if condition(&status) {
                    return status;
                }
                last = Some((status.phase, status.problem, status.replication));
            }
            assert!(Instant::now() < deadline, "after {limit:?} still not so: {what}\n{last:?}\n{}", self.output());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// `POST path`; the command must be taken.
    pub async fn post(&self, path: &str) {
        let (code, text) = self.ask(path).await.unwrap();
        assert_eq!(code, 202, "{path}: {text}");
    }

    /// `POST path`, and what is answered.
    pub async fn ask(&self, path: &str) -> reqwest::Result<(u16, String)> {
        let response = self.client.post(format!("http://127.0.0.1:{}{path}", self.port)).send().await?;
        Ok((response.status().as_u16(), response.text().await?))
    }

    /// No document was refused for good, in any of its lives.
    pub fn assert_nothing_rejected(&self) {
        for entry in fs::read_dir(self.log_folder()).into_iter().flatten().flatten() {
            if entry.file_name().to_string_lossy().contains("dead-letter") {
                let text = fs::read_to_string(entry.path()).unwrap();
                assert_eq!(text, "", "documents were refused");
            }
        }
    }
}

/// A port that nobody listens on, below those of outgoing connections. One after another from a random one on: who asks at the
/// same moment gets another, though neither has it yet.
pub fn free_port() -> u16 {
    static NEXT: LazyLock<AtomicU16> = LazyLock::new(|| AtomicU16::new(fastrand::u16(..)));
    loop {
        let port = 10_000 + NEXT.fetch_add(1, Relaxed) % 10_000;
        if TcpListener::bind(("0.0.0.0", port)).is_ok() {
            return port;
        }
    }
}

/// Asserts that the documents of the index `table` are the rows of `table`: every one, every column, both ways.
pub async fn assert_equal(client: &Client, store: &StoreProcess, table: &str) {
    let rows = super::rows_as_json(client, table).await;
    let documents = store.documents(table).await;
    let mut differences: Vec<String> = Vec::new();
    for (id, row) in &rows {
        match documents.get(id) {
            None => differences.push(format!("{id}: no document for {row}")),
            Some(document) if document != row => differences.push(format!("{id}: {document} is not {row}")),
            Some(_) => {}
        }
    }
    differences.extend(documents.keys().filter(|id| !rows.contains_key(*id)).map(|id| format!("{id}: no such row")));
    let count = differences.len();
    differences.truncate(5);
    assert_eq!(count, 0, "{table}: {} rows, {} documents: {differences:#?}", rows.len(), documents.len());
}

/// Waits until the slot has acknowledged all that is committed now.
pub async fn wait_confirmed(client: &Client, slot: &str, limit: Duration) {
    let now: String = client.query_one("SELECT pg_current_wal_lsn()::text", &[]).await.unwrap().get(0);
    let sql = "SELECT confirmed_flush_lsn >= $2::text::pg_lsn FROM pg_replication_slots WHERE slot_name = $1";
    wait_until(&format!("{slot} has acknowledged {now}"), limit, || async {
        client.query_one(sql, &[&slot, &now]).await.unwrap().get(0)
    })
    .await;
}

/// Processes whose command line has `part` in it.
pub fn processes_with(part: &Path) -> Vec<String> {
    let part = part.to_string_lossy();
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let lines = entries.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    lines.map(|line| String::from_utf8_lossy(&line).replace('\0', " ")).filter(|line| line.contains(&*part)).collect()
}
