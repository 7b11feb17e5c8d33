//! A pipeline in this process: a database of a test's own, the in-memory store, and what to compare them by.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use pgtide::change::Handler;
use pgtide::config::{Cdc, Config, Mode, Table};
use pgtide::demo::Server;
use pgtide::engine::{Engine, Options, Phase, Status};
use pgtide::lsn::Lsn;
use pgtide::problem::Problem;
use pgtide::store::{self, Effect, Fault, Store};
use pgtide::table::TableId;
use pgtide::telemetry::metrics;
use pgtide::version;
use serde_json::Value;
use tokio_postgres::Client;

use super::proxy::Proxy;
use super::wait_until;

/// The longest wait for anything: far beyond what a machine under load needs.
pub const LIMIT: Duration = Duration::from_secs(60);

/// A database, a store, and a folder for dead letters. The slot has the database's name, which is unique on its server.
pub struct Rig {
    /// The database's name, and the slot's and the publication's.
    pub name: String,
    /// A connection as superuser, in UTC.
    pub client: Client,
    /// Where documents go.
    pub store: Store,
    cdc: Cdc,
    socket: tokio_postgres::Config,
    folder: tempfile::TempDir,
}

impl Rig {
    /// A fresh database on the server that the tests of this binary share.
    pub async fn new() -> Self {
        let database = super::fresh_database().await;
        Self::of(super::shared_server().await, &database.name).await
    }

    /// A database in this encoding on the server that the tests of this binary share.
    pub async fn encoded(encoding: &str) -> Self {
        let server = super::shared_server().await;
        let name = format!("encoded_{}", encoding.to_lowercase());
        let sql =
            format!("CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'");
        server.connect("postgres").await.unwrap().batch_execute(&sql).await.unwrap();
        Self::of(server, &name).await
    }

    /// A fresh database on a server of the test's own.
    pub async fn on(server: &Server) -> Self {
        server.create_database("alone").await.unwrap();
        Self::of(server, "alone").await
    }

    async fn of(server: &Server, database: &str) -> Self {
        let store = Store::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), store::Options::default()).await.unwrap();
        let mut rig = Self {
            name: database.to_owned(),
            client: server.connect(database).await.unwrap(),
            store,
            cdc: server.config(database),
            socket: server.socket_config(database),
            folder: tempfile::tempdir().unwrap(),
        };
        rig.client = rig.connect().await;
        rig
    }

    /// One more connection, in UTC as pgtide's own, so that `to_jsonb` prints times as it does.
    pub async fn connect(&self) -> Client {
        let (client, connection) = self.socket.connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client.batch_execute("SET timezone = 'UTC'").await.unwrap();
        client
    }

    /// From now on the database is the one of the same name on `server`. Configurations stay as they are.
    pub async fn follow(&mut self, server: &Server) {
        self.socket = server.socket_config(&self.name);
        self.client = self.connect().await;
    }

    /// How to reach the database, for a [`Workload`](pgtide::demo::Workload).
    pub fn socket_config(&self) -> tokio_postgres::Config {
        self.socket.clone()
    }

    /// Mode `initial`, everything created; each table of the schema `public` goes to the index of its name.
    pub fn config(&self, tables: &[&str]) -> Config {
        let id = |name: &&str| TableId::new("public", *name);
        let mut config = Config { cdc: self.cdc.clone(), ..Config::default() };
        let cdc = &mut config.cdc;
        cdc.publication.name = self.name.clone();
        cdc.publication.create_if_not_exists = true;
        cdc.publication.tables = tables.iter().map(|table| Table::new(id(table))).collect();
        cdc.slot.name = self.name.clone();
        cdc.slot.create_if_not_exists = true;
        cdc.slot.activity_checker_interval = Duration::from_millis(100);
        cdc.snapshot.enabled = true;
        cdc.snapshot.mode = Mode::Initial;
        config.elasticsearch.urls = vec![self.store.url()];
        config.elasticsearch.table_index_mapping =
            tables.iter().map(|table| (id(table), (*table).to_owned())).collect();
        config
    }

    /// The same through a proxy.
    pub async fn config_by_proxy(&self, tables: &[&str]) -> (Config, Proxy) {
        let mut config = self.config(tables);
        let proxy = Proxy::to(config.cdc.port).await;
        config.cdc.port = proxy.port;
        (config, proxy)
    }

    /// Starts a pipeline.
    pub fn start(&self, config: Config) -> Engine {
        self.start_with(config, None)
    }

    /// Starts a pipeline with an embedder's code.
    pub fn start_with(&self, config: Config, handler: Option<Arc<dyn Handler>>) -> Engine {
        let dead_letter_file = self.folder.path().join("dead-letters.ndjson");
        Engine::start(Options { handler, dead_letter_file, ..Options::new(Arc::new(config)) }).unwrap()
    }

    /// Starts a pipeline and waits until it is live.
    pub async fn run(&self, config: Config) -> Engine {
        let engine = self.start(config);
        live(&engine).await;
        engine
    }

    /// Runs SQL.
    pub async fn sql(&self, sql: &str) {
        self.client.batch_execute(sql).await.unwrap_or_else(|error| panic!("{sql}: {error:?}"));
    }

    /// The only value of a query's only row, which has to be text.
    pub async fn text(&self, sql: &str) -> String {
        self.client.query_one(sql, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
    }

    /// A number that a query counts.
    pub async fn count(&self, sql: &str) -> i64 {
        self.client.query_one(sql, &[]).await.unwrap_or_else(|error| panic!("{sql}: {error:?}")).get(0)
    }

    /// Where PostgreSQL writes now.
    pub async fn position(&self) -> Lsn {
        self.text("SELECT pg_current_wal_lsn()::text").await.parse().unwrap()
    }

    /// `confirmed_flush_lsn` of the slot.
    pub async fn confirmed(&self) -> Lsn {
        let sql =
            format!("SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = '{}'", self.name);
        self.text(&sql).await.parse().unwrap()
    }

    /// Waits until the slot has passed everything that is committed now: each change of it has been answered for, or
    /// is none of this pipeline's.
    pub async fn delivered(&self) {
        let now = self.position().await;
        wait_until("the slot passes what is committed", LIMIT, || async { self.confirmed().await >= now }).await;
    }

    /// Walsenders of this database at the moment.
    pub async fn walsenders(&self) -> i64 {
        self.count(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'walsender'",
        )
        .await
    }

    /// Waits until no session of this database holds a transaction open without working.
    pub async fn nobody_idles_in_a_transaction(&self) {
        let sql = "SELECT count(*) FROM pg_stat_activity
                   WHERE datname = current_database() AND state LIKE 'idle in transaction%'";
        wait_until("no session idles in a transaction", LIMIT, || async { self.count(sql).await == 0 }).await;
    }

    /// The documents of an index without their versions.
    pub fn documents(&self, index: &str) -> BTreeMap<String, Value> {
        let parse = |source: Vec<u8>| serde_json::from_slice(&source).expect("a document is no JSON");
        self.store.documents(index).into_iter().map(|(id, (_, source))| (id, parse(source))).collect()
    }

    /// The position that the document's version was made from.
    pub fn position_of(&self, index: &str, id: &str) -> Lsn {
        version::position(self.version(index, id).unsigned_abs())
    }

    /// The document's version.
    pub fn version(&self, index: &str, id: &str) -> i64 {
        self.store.documents(index).get(id).unwrap_or_else(|| panic!("{index} has no document {id}")).0
    }

    /// Waits until everything is delivered; then the documents of the index of its name have to be the table's rows.
    pub async fn equal(&self, table: &str) {
        self.delivered().await;
        self.equal_now(table).await;
    }

    /// The documents are the rows: the same ids, and every column. The id is the text of the column `id`.
    pub async fn equal_now(&self, table: &str) {
        self.equal_by(table, "id::text").await;
    }

    /// The same for documents that are named by another expression.
    pub async fn equal_by(&self, table: &str, id: &str) {
        same(&self.documents(table), &self.rows_by(table, id).await, table);
    }

    async fn rows_by(&self, table: &str, id: &str) -> BTreeMap<String, Value> {
        let sql = format!("SELECT {id}, to_jsonb(t) FROM {table} AS t");
        let rows = self.client.query(&sql, &[]).await.unwrap();
        let expected: BTreeMap<String, Value> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        assert_eq!(expected.len(), rows.len(), "{id} does not name the rows of {table}");
        expected
    }

    /// Waits until the documents are the rows, whatever has to be noticed and copied before; then they stay so.
    pub async fn becomes_equal(&self, table: &str) {
        let deadline = std::time::Instant::now() + LIMIT;
        while self.documents(table) != self.rows_by(table, "id::text").await && std::time::Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.equal(table).await;
    }

    /// Answers to `count` bulks are held, from now on, before anything of them is applied.
    pub fn hold(&self, count: u64) {
        self.store.inject(Fault::new(Effect::Hold { applied: false }).times(count));
    }

    /// The same for the `count` bulks after the next `first` ones.
    pub fn hold_after(&self, first: u64, count: u64) {
        self.store.inject(Fault::new(Effect::Delay { milliseconds: 0 }).times(first));
        self.hold(count);
    }

    /// The requests that are held from now on. Waits until there is one.
    pub async fn until_held(&self) {
        tokio::time::timeout(LIMIT, self.store.until_held(1)).await.expect("no bulk came");
    }
}

/// Fails with the first differences, not with two whole tables.
pub fn same(documents: &BTreeMap<String, Value>, expected: &BTreeMap<String, Value>, what: &str) {
    let missing: Vec<_> = expected.keys().filter(|id| !documents.contains_key(*id)).take(5).collect();
    let left: Vec<_> = documents.keys().filter(|id| !expected.contains_key(*id)).take(5).collect();
    assert!(
        missing.is_empty() && left.is_empty(),
        "{what}: {} documents for {} rows; without a document: {missing:?}; without a row: {left:?}",
        documents.len(),
        expected.len()
    );
    for (id, row) in expected {
        assert_eq!(&documents[id], row, "{what}: document {id}");
    }
}

/// Waits until the pipeline is live. It must not have ended.
pub async fn live(engine: &Engine) {
    if tokio::time::timeout(LIMIT, engine.live()).await.is_err() {
        let status = engine.status();
        panic!("not live: {:?} {:?} {:?}", status.phase, status.problem, status.notices);
    }
    assert_eq!(engine.status().phase, Phase::Streaming, "{:?}", engine.status().problem);
}

/// Waits until the pipeline is in this phase.
pub async fn phase(engine: &Engine, phase: Phase) {
    let what = format!("the phase is {phase:?}");
    wait_until(&what, LIMIT, || async { engine.status().phase == phase }).await;
}

/// Waits until the pipeline has ended, and says how.
pub async fn ended(engine: &mut Engine) -> Result<(), Problem> {
    tokio::time::timeout(LIMIT, engine.wait()).await.expect("the pipeline does not end")
}

/// Stops the pipeline, which must not have failed.
pub async fn stop(engine: Engine) {
    tokio::time::timeout(LIMIT, engine.stop()).await.expect("the pipeline does not end").unwrap();
}

/// The value of a metric: that of a table, of an index, or the only one there is.
pub fn metric(status: &Status, name: &str, of: &str) -> f64 {
    let text = metrics::render(status);
    let label = format!("=\"{of}\"");
    let samples: Vec<&str> = text
        .lines()
        .filter(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with('{')))
        .filter(|line| of.is_empty() || line.contains(&label))
        .collect();
    let [sample] = samples.as_slice() else { panic!("{} samples of {name} {of}: {text}", samples.len()) };
    sample.rsplit(' ').next().unwrap().parse().unwrap()
}

/// The metrics of INSERTs, UPDATEs and DELETEs of a table.
pub fn operations(status: &Status, table: &str) -> [f64; 3] {
    ["insert", "update", "delete"].map(|name| metric(status, &format!("go_pq_cdc_{name}_total"), table))
}
