//! A real PostgreSQL in a temporary folder.

use std::fs::{File, OpenOptions};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use tokio_postgres::{Client, NoTls};

use super::account::Account;
use super::leftovers::{self, DATA, PREFIX, bases, claim};
use super::watchdog::{Process, Signal};
use super::{Installation, OnStep, ServerError, Step, binaries, cluster, fetch};
use crate::config;

/// `sockaddr_un` holds 104 bytes on macOS and 108 on Linux, with the final zero.
const SOCKET_PATH_LIMIT: usize = 103;

/// Ports below those that systems give to outgoing connections, so that a restart finds its port free.
const PORTS: std::ops::Range<u16> = 20_000..32_000;

/// How often another port is tried when someone else was faster.
const PORT_TRIES: usize = 8;

/// The longest that a fast shutdown may take before an immediate one.
const FAST_LIMIT: Duration = Duration::from_secs(8);

/// How a [`Server`] is started.
#[derive(Clone)]
pub struct Options {
    /// Settings of `postgresql.conf`, over ours; `ALTER SYSTEM` wins over both.
    pub settings: Vec<(String, String)>,
    /// Copy a cluster that was made before instead of running `initdb`: faster, but all copies of a day have the same
    /// system identifier. For tests.
    pub copy_cluster: bool,
    /// The longest that the server may take until it accepts connections.
    pub start_limit: Duration,
    /// Hears what is being done.
    pub on_step: OnStep,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            settings: Vec::new(),
            copy_cluster: false,
            start_limit: Duration::from_secs(60),
            on_step: std::sync::Arc::new(|_| {}),
        }
    }
}

/// A running PostgreSQL that is ours alone, with `wal_level=logical`, on 127.0.0.1 and on a Unix socket.
///
/// It ends with its owner: [`stop`](Self::stop) is the clean way, dropping it stops it at once, and so does the death
/// of this process; in each case the folder is removed.
///
/// ```no_run
/// # async fn example() -> Result<(), pgtide::demo::ServerError> {
/// use pgtide::demo::{Options, Server};
/// let server = Server::start(Options::default()).await?;
/// let client = server.connect("postgres").await?;
/// client.batch_execute("CREATE TABLE t (id int)").await?;
/// server.stop().await
/// # }
/// ```
#[derive(Debug)]
pub struct Server {
    /// None between [`kill_hard`](Self::kill_hard) and [`restart`](Self::restart), and after the end.
    process: Option<Process>,
    installation: Installation,
    account: Account,
    folder: PathBuf,
    /// Keeps the folder from being swept.
    _owner: File,
    port: u16,
    password: config::Secret,
    start_limit: Duration,
}

impl Server {
    /// Removes what killed processes left behind, finds PostgreSQL (or fetches it, see the
    /// [module](super)), creates a cluster in a temporary folder and starts the server; returns when it accepts connections.
    ///
    /// # Errors
    /// No PostgreSQL to be had, or it does not start: the error carries the end of its log. Nothing stays behind.
    pub async fn start(options: Options) -> Result<Self, ServerError> {
        let _ = tokio::task::spawn_blocking(leftovers::sweep).await;
        let account = Account::choose()?;
        let installation = binaries::find(&account, &options.on_step).await?;
        let base = usable_base(&account)?;

        (options.on_step)(Step::Creating);
        let temporary = tempfile::Builder::new()
            .prefix(&format!("{PREFIX}{}-", std::process::id()))
            .tempdir_in(&base)
            .map_err(ServerError::io("create", &base))?;
        let folder = temporary.path().to_owned();
        let owner = claim(&folder).map_err(ServerError::io("claim", &folder))?;
        account.own(&folder)?;
        let data = folder.join(DATA);
        if options.copy_cluster {
            cluster::copy(&installation, &account, &base, &data).await?;
        } else {
            cluster::create(&installation, &account, &data).await?;
        }
        cluster::configure(&data, &options.settings)?;

        (options.on_step)(Step::Starting);
        let mut server = Self {
            process: None,
            installation,
            account,
            folder: temporary.keep(),
            _owner: owner,
            port: 0,
            password: config::Secret(random_password()?),
            start_limit: options.start_limit,
        };
        let mut attempt = 1;
        loop {
            server.port = free_port();
            match server.launch().await {
                Err(error) if attempt < PORT_TRIES && port_was_taken(&error) => attempt += 1,
                result => break result?,
            }
        }
        // The alphabet of the password needs no quoting.
        let sql = format!("ALTER USER postgres PASSWORD '{}'", server.password.0);
        server.connect("postgres").await?.batch_execute(&sql).await?;
        (options.on_step)(Step::Ready);
        Ok(server)
    }

    /// Starts the process on the folder and waits until it accepts connections.
    async fn launch(&mut self) -> Result<(), ServerError> {
        let path = self.log();
        let log = OpenOptions::new().create(true).append(true).open(&path).map_err(ServerError::io("open", &path))?;
        let before = log.metadata().map_or(0, |meta| usize::try_from(meta.len()).unwrap_or(0));
        let end_of_log = || {
            let text = std::fs::read(&path).unwrap_or_default();
            cluster::last_lines(text.get(before..).unwrap_or_default(), 20)
        };
        let arguments: [PathBuf; 6] =
            ["-D".into(), self.data(), "-p".into(), self.port.to_string().into(), "-k".into(), self.folder.clone()];
        let postgres = self.installation.postgres();
        let process = Process::spawn(&self.account, &self.folder, &postgres, &arguments, &log)
            .map_err(ServerError::io("run", &postgres))?;
        self.process = Some(process);

        let deadline = Instant::now() + self.start_limit;
        let mut pause = Duration::from_millis(5);
        loop {
            if self.connect("postgres").await.is_ok() {
                return Ok(());
            }
            if self.has_ended() {
                self.process = None;
                return Err(ServerError::Ended { log: end_of_log() });
            }
            if Instant::now() > deadline {
                self.kill_hard().await?;
                return Err(ServerError::Slow { seconds: self.start_limit.as_secs(), log: end_of_log() });
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    /// The `cdc` part of a configuration for this server: by TCP, with the password, no TLS, no port for metrics.
    #[must_use]
    pub fn config(&self, database: &str) -> config::Cdc {
        config::Cdc {
            host: Ipv4Addr::LOCALHOST.to_string(),
            port: self.port,
            username: "postgres".into(),
            password: self.password.clone(),
            database: database.into(),
            ssl_mode: config::SslMode::Disable,
            metric_port: None,
            ..config::Cdc::default()
        }
    }

    /// For connections of one's own, over the Unix socket. Stays right after [`restart`](Self::restart).
    #[must_use]
    pub fn socket_config(&self, database: &str) -> tokio_postgres::Config {
        let mut config = tokio_postgres::Config::new();
        config.host_path(&self.folder).port(self.port).user("postgres").dbname(database);
        config
    }

    /// A connection over the Unix socket as superuser. It ends when the client is dropped.
    ///
    /// # Errors
    /// The server is down or has no such database.
    pub async fn connect(&self, database: &str) -> Result<Client, ServerError> {
        let (client, connection) = self.socket_config(database).connect(NoTls).await?;
        // Its error reaches the client's next call.
        tokio::spawn(connection);
        Ok(client)
    }

    /// Creates an empty database.
    ///
    /// # Errors
    /// It exists, or the server is down.
    pub async fn create_database(&self, name: &str) -> Result<(), ServerError> {
        let name = name.replace('"', "\"\"");
        Ok(self.connect("postgres").await?.batch_execute(&format!("CREATE DATABASE \"{name}\"")).await?)
    }

    /// The port on 127.0.0.1; it stays the same over restarts.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The folder of the Unix socket.
    #[must_use]
    pub fn socket_dir(&self) -> &Path {
        &self.folder
    }

    /// The server's log.
    #[must_use]
    pub fn log(&self) -> PathBuf {
        self.folder.join("postgres.log")
    }

    /// What it runs.
    #[must_use]
    pub fn installation(&self) -> &Installation {
        &self.installation
    }

    /// The pid of PostgreSQL's main process; none while it is down.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        let data = self.data();
        leftovers::server_of(&data).filter(|pid| leftovers::is_server(*pid, &data))
    }

    fn data(&self) -> PathBuf {
        self.folder.join(DATA)
    }

    fn has_ended(&mut self) -> bool {
        self.process.as_mut().is_none_or(|process| process.ended().is_some())
    }

    /// Stops the server at once, without a checkpoint, as a crash would. Data and port are kept for
    /// [`restart`](Self::restart).
    ///
    /// # Errors
    /// [`ServerError::Stuck`] when the process does not end.
    pub async fn kill_hard(&mut self) -> Result<(), ServerError> {
        self.end(&[(Signal::Immediate, Duration::from_secs(8)), (Signal::Kill, Duration::from_secs(8))]).await
    }

    /// Starts the server again on the same port and data; a running one is stopped at once before. It recovers.
    ///
    /// # Errors
    /// As [`start`](Self::start). The server is down then, and this can be called again.
    pub async fn restart(&mut self) -> Result<(), ServerError> {
        self.kill_hard().await?;
        let mut attempt = 1;
        loop {
            match self.launch().await {
                // Someone else has the port for the moment.
                Err(error) if attempt < PORT_TRIES && port_was_taken(&error) => attempt += 1,
                result => return result,
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    }

    /// Stops the server (fast shutdown, after some seconds an immediate one) and removes its folder.
    ///
    /// # Errors
    /// [`ServerError::Stuck`] when the process does not end, [`ServerError::Io`] when the folder cannot be removed.
    pub async fn stop(mut self) -> Result<(), ServerError> {
        let order = [
            (Signal::Fast, FAST_LIMIT),
            (Signal::Immediate, Duration::from_secs(8)),
            (Signal::Kill, Duration::from_secs(8)),
        ];
        self.end(&order).await?;
        let folder = self.folder.clone();
        let removed = tokio::task::spawn_blocking(move || std::fs::remove_dir_all(folder)).await;
        removed.unwrap_or_else(|error| Err(error.into())).map_err(ServerError::io("remove", &self.folder))
    }

    async fn end(&mut self, order: &[(Signal, Duration)]) -> Result<(), ServerError> {
        let Some(process) = self.process.as_mut() else { return Ok(()) };
        for (signal, limit) in order {
            if process.end(*signal, *limit).await {
                self.process = None;
                return Ok(());
            }
        }
        Err(ServerError::Stuck { folder: self.folder.clone() })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // While it runs, the watchdog stops it and then removes the folder; else nobody would.
        if self.has_ended() {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }
}

/// The first temporary folder that serves.
fn usable_base(account: &Account) -> Result<PathBuf, ServerError> {
    let bases = bases();
    let longest = format!("/{PREFIX}4294967295-xxxxxx/.s.PGSQL.65535");
    let usable = |base: &&PathBuf| {
        base.as_os_str().len() + longest.len() <= SOCKET_PATH_LIMIT
            && account.can_enter(base)
            && tempfile::tempfile_in(base).is_ok()
    };
    bases.iter().find(usable).cloned().ok_or_else(|| ServerError::NoFolder { tried: fetch::join(&bases) })
}

fn free_port() -> u16 {
    for _ in 0..100 {
        let port = fastrand::u16(PORTS);
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
    // PostgreSQL tells what is wrong with it.
    PORTS.start
}

fn port_was_taken(error: &ServerError) -> bool {
    matches!(error, ServerError::Ended { log } if log.contains("Address already in use"))
}

/// 24 characters of the URL-safe Base64 alphabet.
fn random_password() -> Result<String, ServerError> {
    let mut bytes = [0; 18];
    rustls::crypto::ring::default_provider().secure_random.fill(&mut bytes).map_err(|_| ServerError::NoRandomness)?;
    Ok(URL_SAFE_NO_PAD.encode(bytes))
}
