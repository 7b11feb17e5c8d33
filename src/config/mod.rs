//! The configuration file: the keys of go-pq-cdc-elasticsearch, and ours beside them.

mod check;
mod error;
mod read;
mod section;
#[cfg(test)]
mod tests;
mod value;
mod yaml;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::table::TableId;

pub use error::{ConfigError, Finding};

/// A value that is never printed. `Debug` and `Display` show `***`.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Secret(pub String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl Secret {
    /// Nothing was given.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Everything that a pipeline needs to know.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Config {
    /// `cdc:`, the PostgreSQL side.
    pub cdc: Cdc,
    /// `elasticsearch:`, the other side.
    pub elasticsearch: Elasticsearch,
}

/// `cdc:`, the keys of go-pq-cdc.
#[derive(Clone, Debug, PartialEq)]
pub struct Cdc {
    /// `host`: name, address, or the folder of a Unix socket (starts with `/`).
    pub host: String,
    /// `port`, default 5432.
    pub port: u16,
    /// `username`.
    pub username: String,
    /// `password`; may be empty where the server asks for none.
    pub password: Secret,
    /// `database`.
    pub database: String,
    /// `sslMode` (ours): as libpq's `sslmode`.
    pub ssl_mode: SslMode,
    /// `sslRootCert` (ours): PEM file of authorities; the system's when absent.
    pub ssl_root_cert: Option<PathBuf>,
    /// `sslCert` (ours): PEM file of the client's certificate.
    pub ssl_cert: Option<PathBuf>,
    /// `sslKey` (ours): PEM file of the client's key.
    pub ssl_key: Option<PathBuf>,
    /// `debugMode`.
    pub debug_mode: bool,
    /// `metric.port`: port of `/metrics` and `/status`; none switches the server off (key absent: 8080 as the reference).
    pub metric_port: Option<u16>,
    /// `logger.level`.
    pub log_level: LogLevel,
    /// `publication`.
    pub publication: Publication,
    /// `slot`.
    pub slot: Slot,
    /// `snapshot`.
    pub snapshot: Snapshot,
    /// `heartbeat`.
    pub heartbeat: Option<Heartbeat>,
}

/// libpq's `sslmode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SslMode {
    /// No TLS.
    Disable,
    /// TLS if the server has it, its certificate unchecked. The default, as libpq's.
    #[default]
    Prefer,
    /// TLS or nothing, certificate unchecked.
    Require,
    /// TLS, certificate signed by a known authority.
    VerifyCa,
    /// TLS, certificate signed and for this host.
    VerifyFull,
}

/// `logger.level`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogLevel {
    /// `debug`
    Debug,
    /// `info`
    #[default]
    Info,
    /// `warn`
    Warn,
    /// `error`
    Error,
}

/// `publication:`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Publication {
    /// `name`.
    pub name: String,
    /// `createIfNotExists`.
    pub create_if_not_exists: bool,
    /// `operations`; all four when empty.
    pub operations: Vec<Operation>,
    /// `tables`.
    pub tables: Vec<Table>,
}

/// An operation that a publication publishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// `INSERT`
    Insert,
    /// `UPDATE`
    Update,
    /// `DELETE`
    Delete,
    /// `TRUNCATE`
    Truncate,
}

impl Operation {
    /// All four.
    pub const ALL: [Operation; 4] = [Operation::Insert, Operation::Update, Operation::Delete, Operation::Truncate];

    /// Its word in SQL.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Operation::Insert => "INSERT",
            Operation::Update => "UPDATE",
            Operation::Delete => "DELETE",
            Operation::Truncate => "TRUNCATE",
        }
    }

    /// What comes of documents where it is not published.
    #[must_use]
    pub fn left_out(self) -> &'static str {
        match self {
            Operation::Insert => "new rows never become documents",
            Operation::Update => "documents keep the values of their row's first version",
            Operation::Delete => "documents of deleted rows stay",
            Operation::Truncate => "documents of emptied tables stay",
        }
    }
}

/// An entry of `publication.tables` or `snapshot.tables`.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    /// `schema` and `name`.
    pub id: TableId,
    /// `replicaIdentity`; none leaves it as it is.
    pub replica_identity: Option<ReplicaIdentity>,
    /// `columns`; all when empty.
    pub columns: Vec<String>,
    /// `partitioned`: publish via the partition root.
    pub partitioned: bool,
    /// `snapshotPartitionStrategy`.
    pub strategy: Strategy,
    /// `queryCondition`: rows copied by the snapshot; overrides `snapshot.queryCondition`.
    pub query_condition: Option<String>,
}

impl Table {
    /// All rows and columns of a table, its replica identity left as it is.
    #[must_use]
    pub fn new(id: TableId) -> Self {
        Self {
            id,
            replica_identity: None,
            columns: Vec::new(),
            partitioned: false,
            strategy: Strategy::Auto,
            query_condition: None,
        }
    }
}

/// `replicaIdentity`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplicaIdentity {
    /// `DEFAULT`
    Default,
    /// `FULL`
    Full,
    /// `NOTHING`
    Nothing,
    /// `USING INDEX`, with `replicaIdentityIndex`.
    UsingIndex(String),
}

/// `snapshotPartitionStrategy`: by what a table is cut into chunks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Strategy {
    /// `auto` or absent: by ctid.
    #[default]
    Auto,
    /// `ctid_block`: by ctid.
    CtidBlock,
    /// `integer_range`: by the key, where it is one column of integers; else by ctid.
    IntegerRange,
    /// `offset`: by ctid; there is nothing that an offset does better.
    Offset,
}

/// `slot:`.
#[derive(Clone, Debug, PartialEq)]
pub struct Slot {
    /// `name`.
    pub name: String,
    /// `createIfNotExists`.
    pub create_if_not_exists: bool,
    /// `slotActivityCheckerInterval`: how often the slot is looked at. A bare number is milliseconds, as the reference means it.
    pub activity_checker_interval: Duration,
    /// `protoVersion`: 1 or 2 are accepted; pgtide always streams by version 1 (memory stays bounded).
    pub proto_version: u8,
    /// `failover` (ours): the slot is kept on standbys as well, PostgreSQL 17.
    pub failover: bool,
    /// `acceptTimeline` (ours): go on after a promotion to this timeline, of which the operator knows that it lost nothing.
    pub accept_timeline: Option<u32>,
}

/// `snapshot.mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Copy once, then stream.
    Initial,
    /// Stream only.
    #[default]
    Never,
    /// Copy once and end.
    SnapshotOnly,
}

/// `snapshot.onSchemaChange`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnSchemaChange {
    /// The table is copied again.
    #[default]
    Copy,
    /// It is said, and left to the operator.
    Warn,
}

/// How the type `numeric` is written in documents.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NumericAs {
    /// A number with every digit that PostgreSQL prints; `NaN` and the infinities are null.
    #[default]
    Number,
    /// A string of what PostgreSQL prints.
    String,
}

/// What becomes of a table whose rows have no key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WithoutKey {
    /// It is refused.
    #[default]
    Refuse,
    /// A digest of the whole row names its document. Needs `REPLICA IDENTITY FULL`; equal rows are one document.
    Hash,
}

/// What `json` and `jsonb` become in an index that pgtide creates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum JsonAs {
    /// Kept in the document and not searched, so that any JSON will do.
    #[default]
    Stored,
    /// `flattened`, on OpenSearch `flat_object`: searched by key and value. Where a value is no object, Elasticsearch
    /// refuses the document.
    Flattened,
}

/// `snapshot:`.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// `enabled`; false is mode `never`.
    pub enabled: bool,
    /// `mode`.
    pub mode: Mode,
    /// `chunkSize`: rows a chunk should hold, default 8000.
    pub chunk_size: u64,
    /// `claimTimeout`: a process that holds the job and gave no heartbeat for so long is said to hang, default 30 s.
    pub claim_timeout: Duration,
    /// `releaseAfter`: a pause that lasts longer lets go of the exported snapshot, which keeps VACUUM from removing
    /// rows; default 10 min. Resumed, the copy goes on under a new one.
    pub release_after: Duration,
    /// `heartbeatInterval`, default 5 s.
    pub heartbeat_interval: Duration,
    /// `instanceId`, default `hostname-pid`.
    pub instance_id: Option<String>,
    /// `id`: job name in mode `snapshot_only`, default `snapshot_only_<database>`.
    pub id: Option<String>,
    /// `tables`; the publication's when empty.
    pub tables: Vec<Table>,
    /// `queryCondition`: rows copied by the snapshot, for tables without one of their own.
    pub query_condition: Option<String>,
    /// `resnapshot`: copy again although the ledger says it is done.
    pub resnapshot: bool,
    /// `workers` (ours): chunks copied at once; default the number of processors, 2 to 8.
    pub workers: Option<usize>,
    /// `onSchemaChange` (ours): what is done about documents that a change of their table's definition left behind.
    pub on_schema_change: OnSchemaChange,
}

/// `heartbeat:`.
#[derive(Clone, Debug, PartialEq)]
pub struct Heartbeat {
    /// `table`.
    pub table: TableId,
    /// `interval`, default 100 ms.
    pub interval: Duration,
}

/// `elasticsearch:`, the keys of go-pq-cdc-elasticsearch.
#[derive(Clone, Debug, PartialEq)]
pub struct Elasticsearch {
    /// `urls`: at least one.
    pub urls: Vec<String>,
    /// `username`.
    pub username: String,
    /// `password`.
    pub password: Secret,
    /// `apiKey` (ours): as Elasticsearch encodes it, or `id:key`.
    pub api_key: Secret,
    /// `bearerToken` (ours): of a service account, or of whatever stands before the cluster.
    pub bearer_token: Secret,
    /// `ssl` (ours).
    pub ssl: Ssl,
    /// `proxy` (ours): an HTTP proxy, where the cluster is not reached directly.
    pub proxy: Option<String>,
    /// `proxyUsername` (ours).
    pub proxy_username: String,
    /// `proxyPassword` (ours).
    pub proxy_password: Secret,
    /// `connectTimeout` (ours), default 5 s.
    pub connect_timeout: Duration,
    /// `requestTimeout` (ours): from the first byte of a request to the last of its answer, default 60 s.
    pub request_timeout: Duration,
    /// `tableIndexMapping`: which index a table goes to.
    pub table_index_mapping: BTreeMap<TableId, String>,
    /// `batchSizeLimit`: documents in a bulk at most.
    pub batch_size_limit: usize,
    /// `batchByteSizeLimit`: bytes in a bulk at most, before compression.
    pub batch_byte_size_limit: usize,
    /// `batchTickerDuration`: how long after a bulk the next one waits to fill, default 10 ms. The first change after
    /// a pause does not wait.
    pub batch_ticker_duration: Duration,
    /// `concurrentRequest`: bulks in flight at most.
    pub concurrent_request: usize,
    /// `compressionEnabled`: gzip.
    pub compression_enabled: bool,
    /// `maxConnsPerHost`.
    pub max_conns_per_host: usize,
    /// `maxIdleConnDuration`.
    pub max_idle_conn_duration: Duration,
    /// `rejectionLog` / dead letters (ours: `deadLetterFile`): where refused documents are kept, fsynced.
    pub dead_letter_file: Option<PathBuf>,
    /// `numericAs` (ours): how the type `numeric` is written in documents.
    pub numeric_as: NumericAs,
    /// `tablesWithoutKey` (ours): what becomes of them.
    pub without_key: WithoutKey,
    /// `manageIndices` (ours): indices that are missing are created, and those created by pgtide extended.
    pub manage_indices: bool,
    /// `jsonAs` (ours): what `json` and `jsonb` become in an index that pgtide creates.
    pub json_as: JsonAs,
}

/// `elasticsearch.ssl:`, the words of Elasticsearch's own clients.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ssl {
    /// `certificateAuthorities`: PEM file; the system's when absent.
    pub certificate_authorities: Option<PathBuf>,
    /// `certificate`: PEM file of the client's certificate.
    pub certificate: Option<PathBuf>,
    /// `key`: PEM file of its key.
    pub key: Option<PathBuf>,
    /// `verificationMode`.
    pub verification_mode: VerificationMode,
}

/// `ssl.verificationMode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VerificationMode {
    /// A known authority has signed the certificate, for this host.
    #[default]
    Full,
    /// A known authority has signed it, for whatever host.
    Certificate,
    /// It is not looked at.
    None,
}

impl Default for Cdc {
    fn default() -> Self {
        Self {
            host: String::new(),
            port: 5432,
            username: String::new(),
            password: Secret::default(),
            database: String::new(),
            ssl_mode: SslMode::default(),
            ssl_root_cert: None,
            ssl_cert: None,
            ssl_key: None,
            debug_mode: false,
            metric_port: Some(8080),
            log_level: LogLevel::default(),
            publication: Publication::default(),
            slot: Slot::default(),
            snapshot: Snapshot::default(),
            heartbeat: None,
        }
    }
}

impl Default for Slot {
    fn default() -> Self {
        Self {
            name: String::new(),
            create_if_not_exists: false,
            activity_checker_interval: Duration::from_secs(1),
            proto_version: 2,
            failover: false,
            accept_timeline: None,
        }
    }
}

impl Default for Snapshot {
    fn default() -> Self {
        Self {
            enabled: false,
            mode: Mode::default(),
            chunk_size: 8000,
            claim_timeout: Duration::from_secs(30),
            release_after: Duration::from_secs(600),
            heartbeat_interval: Duration::from_secs(5),
            instance_id: None,
            id: None,
            tables: Vec::new(),
            query_condition: None,
            resnapshot: false,
            workers: None,
            on_schema_change: OnSchemaChange::default(),
        }
    }
}

impl Default for Elasticsearch {
    fn default() -> Self {
        Self {
            urls: Vec::new(),
            username: String::new(),
            password: Secret::default(),
            api_key: Secret::default(),
            bearer_token: Secret::default(),
            ssl: Ssl::default(),
            proxy: None,
            proxy_username: String::new(),
            proxy_password: Secret::default(),
            connect_timeout: Duration::from_secs(5),
            request_timeout: Duration::from_secs(60),
            table_index_mapping: BTreeMap::new(),
            batch_size_limit: 10_000,
            batch_byte_size_limit: 5 << 20,
            batch_ticker_duration: Duration::from_millis(10),
            concurrent_request: 4,
            compression_enabled: false,
            max_conns_per_host: 512,
            max_idle_conn_duration: Duration::from_secs(10),
            dead_letter_file: None,
            numeric_as: NumericAs::default(),
            without_key: WithoutKey::default(),
            manage_indices: true,
            json_as: JsonAs::default(),
        }
    }
}

/// A configuration, and what its reader has to tell.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// Keys that were accepted and do not do what their name says, one sentence each. Show them to the operator.
    pub warnings: Vec<String>,
}

impl Config {
    /// Reads the file at `path`, with the process's environment for `${NAME}`.
    ///
    /// # Errors
    /// The file cannot be read, or says something that cannot be.
    pub fn load(path: impl AsRef<Path>) -> Result<Loaded, ConfigError> {
        let path = path.as_ref();
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_path_buf(), source })?;
        Self::parse(&text, &path.display().to_string(), &|name| std::env::var(name).ok())
    }

    /// Reads `text`, YAML or JSON. `file_name` is for the errors; `env` answers for `${NAME}`. Only files that the key
    /// `passwordFile` names are opened; paths are relative to the working directory.
    ///
    /// # Errors
    /// Everything that is wrong with single keys and between them, not only the first.
    ///
    /// ```
    /// let text = "cdc: {hots: localhost}\nelasticsearch: {urls: [localhost:9200]}";
    /// let error = pgtide::config::Config::parse(text, "my.yaml", &|_| None).unwrap_err();
    /// assert!(error.to_string().contains("my.yaml:1:7: cdc.hots: unknown key; did you mean `host`?"));
    /// ```
    pub fn parse(text: &str, file_name: &str, env: &dyn Fn(&str) -> Option<String>) -> Result<Loaded, ConfigError> {
        let invalid = |findings| ConfigError::Invalid { file: shown(file_name, 4096), findings };
        let root = match yaml::parse(text) {
            Ok(Some(root)) => root,
            Ok(None) => {
                let message = "the file is empty: it needs the groups `cdc` and `elasticsearch`".to_owned();
                return Err(invalid(vec![Finding { line: 1, column: 1, path: String::new(), message }]));
            }
            Err(finding) => return Err(invalid(vec![finding])),
        };
        let context = section::Context::new(env);
        let mut config = read::config(&section::Field::root(&root, &context));
        check::whole(&mut config, &context);
        let (findings, warnings) = context.end();
        if findings.is_empty() { Ok(Loaded { config, warnings }) } else { Err(invalid(findings)) }
    }

    /// The name under which the ledger knows the copy, and the advisory lock the process: that of the slot, or of the
    /// copy that has none.
    #[must_use]
    pub fn job(&self) -> String {
        match self.mode() {
            Mode::SnapshotOnly => {
                self.cdc.snapshot.id.clone().unwrap_or_else(|| format!("snapshot_only_{}", self.cdc.database))
            }
            Mode::Initial | Mode::Never => self.cdc.slot.name.clone(),
        }
    }

    /// The mode that is in force: `snapshot.enabled: false` is `never`.
    #[must_use]
    pub fn mode(&self) -> Mode {
        if self.cdc.snapshot.enabled { self.cdc.snapshot.mode } else { Mode::Never }
    }
}

/// `text` for an error message: cut to `most` characters, nothing in it that a terminal would obey.
fn shown(text: &str, most: usize) -> String {
    let mut out = String::new();
    for c in text.chars().take(most) {
        if c.is_control() || matches!(c, '\u{200e}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}') {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    if text.chars().nth(most).is_some() {
        out.push_str("...");
    }
    out
}
