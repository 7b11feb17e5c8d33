//! A table, its index on the node, and what to compare them by.

use std::sync::Arc;

use pgtide::config::Config;
use pgtide::engine::{Engine, Status};
use pgtide::table::TableId;
use pgtide::verify::{self, Outcome, Report, TableReport};
use reqwest::Method;
use serde_json::Value;
use tokio::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use tokio_util::sync::CancellationToken;

use super::support::elasticsearch::{Installation, Node};
use super::support::pipeline::{LIMIT, Rig};
use super::support::process::http;
use super::support::wait_until;

/// The node's settings.
pub type Settings = &'static [(&'static str, &'static str)];

/// As it comes.
pub const USUAL: Settings = &[];

/// Short bodies, and one write at a time with one that waits.
pub const LITTLE: Settings =
    &[("http.max_content_length", "1mb"), ("thread_pool.write.queue_size", "1"), ("node.processors", "1")];

/// The rows of all scenes. `body` may be large.
const TABLE: &str = "CREATE TABLE items (id int PRIMARY KEY, n int, body text);
                     ALTER TABLE items ALTER COLUMN body SET STORAGE EXTERNAL";

/// Begun by the first test that needs it, for all of them.
static NODE: RwLock<Option<Node>> = RwLock::const_new(None);

/// How a test has the node.
enum Held {
    /// With others at the same time.
    Shared(RwLockReadGuard<'static, Option<Node>>),
    /// Alone: it may end it.
    Alone(RwLockWriteGuard<'static, Option<Node>>),
}

/// The node, a database with the table `items`, and an index name that no other test has.
pub struct Scene {
    /// The database. Its own document store is not used.
    pub rig: Rig,
    /// The index that documents of `items` go to.
    pub index: String,
    held: Held,
    client: reqwest::Client,
    folder: tempfile::TempDir,
}

impl Scene {
    /// On a node with these settings, `alone` or with other tests.
    pub async fn new(installation: Installation, settings: Settings, alone: bool) -> Self {
        let mut node = NODE.write().await;
        match node.as_mut() {
            Some(node) => node.ensure(settings).await,
            None => *node = Some(Node::start(installation, settings).await),
        }
        let held = if alone { Held::Alone(node) } else { Held::Shared(node.downgrade()) };
        let rig = Rig::new().await;
        rig.sql(TABLE).await;
        let index = format!("{}_items", rig.name);
        Self { rig, index, held, client: http(), folder: tempfile::tempdir().unwrap() }
    }

    /// Ends the node of all tests.
    pub async fn end() {
        NODE.write().await.take();
    }

    /// The node, of a test that has it alone.
    pub fn node(&mut self) -> &mut Node {
        match &mut self.held {
            Held::Alone(node) => node.as_mut().expect("a scene has a node"),
            Held::Shared(_) => panic!("other tests use the node"),
        }
    }

    fn node_as_it_is(&self) -> &Node {
        match &self.held {
            Held::Alone(node) => node.as_ref(),
            Held::Shared(node) => node.as_ref(),
        }
        .expect("a scene has a node")
    }

    /// What the node runs.
    pub fn installation(&self) -> &Installation {
        &self.node_as_it_is().installation
    }

    /// Its URL, without a slash at the end.
    pub fn url(&self) -> String {
        self.node_as_it_is().url()
    }

    /// So many rows, from 1.
    pub async fn rows(&self, count: u32) {
        self.rig
            .sql(&format!("INSERT INTO items SELECT i, i, 'row ' || i FROM generate_series(1, {count}) AS i"))
            .await;
    }

    /// Into the node, in small chunks and bodies.
    pub fn config(&self) -> Config {
        let mut config = self.rig.config(&["items"]);
        config.cdc.snapshot.chunk_size = 100;
        config.elasticsearch.urls = vec![self.url()];
        config.elasticsearch.table_index_mapping =
            [(TableId::new("public", "items"), self.index.clone())].into_iter().collect();
        config.elasticsearch.batch_size_limit = 100;
        config.elasticsearch.dead_letter_file = Some(self.dead_letters());
        config
    }

    /// The dead letters, without their documents.
    pub fn letters(&self) -> String {
        let letters = std::fs::read_to_string(self.dead_letters()).unwrap_or_default();
        letters.lines().map(|line| line.chars().take(600).chain(['\n']).collect::<String>()).collect()
    }

    fn dead_letters(&self) -> std::path::PathBuf {
        self.folder.path().join("dead-letters.ndjson")
    }

    /// Asks the node; what it answers is JSON or nothing.
    pub async fn call(&self, method: Method, path: &str, body: Value) -> (u16, Value) {
        let mut request = self.client.request(method, format!("{}{path}", self.url()));
        if !body.is_null() {
            request = request.header("content-type", "application/json").body(body.to_string());
        }
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        (status, serde_json::from_str(&response.text().await.unwrap()).unwrap_or_default())
    }

    /// The same; it has to succeed.
    pub async fn done(&self, method: Method, path: &str, body: Value) -> Value {
        let (status, answer) = self.call(method, path, body).await;
        assert!((200..300).contains(&status), "{path}: {status} {answer}");
        answer
    }

    /// Makes the index.
    pub async fn create(&self, body: Value) {
        self.done(Method::PUT, &format!("/{}", self.index), body).await;
    }

    /// What `pgtide verify` says of the table.
    pub async fn verify(&self, config: &Config, repair: bool) -> (Outcome, TableReport) {
        let options = verify::Options { timeout: LIMIT, repair, ..verify::Options::new(Arc::new(config.clone())) };
        let stop = CancellationToken::new();
        let run = tokio::time::timeout(2 * LIMIT, verify::run(&options, &stop, |_| {}));
        let report: Report = run.await.expect("verify hangs").unwrap();
        let outcome = report.outcome();
        let [table] = <[TableReport; 1]>::try_from(report.tables).expect("one table");
        (outcome, table)
    }

    /// Nothing was refused.
    pub fn nothing_is_refused(&self) {
        assert_eq!(self.letters(), "");
    }

    /// Waits until everything is delivered; then `pgtide verify` has to say equal, of as many documents as there are rows.
    pub async fn equal(&self, config: &Config) {
        self.rig.delivered().await;
        let (outcome, table) = self.verify(config, false).await;
        assert_eq!(outcome, Outcome::Equal, "{table:?}");
        let rows = u64::try_from(self.rig.count("SELECT count(*) FROM items").await).unwrap();
        assert_eq!((table.rows, table.documents), (rows, rows), "{table:?}");
    }

    /// Rows that `verify` finds without their document, with the reason that the dead letters have.
    pub async fn refused(&self, config: &Config, reason: &str) -> usize {
        self.rig.delivered().await;
        let (outcome, table) = self.verify(config, false).await;
        assert_eq!(outcome, Outcome::Different, "{table:?}");
        for difference in &table.differences {
            let refused = difference.refused.as_deref().unwrap_or("no dead letter");
            assert!(refused.contains(reason), "{reason} is not in: {refused}");
        }
        table.differences.len()
    }
}

/// Waits until the status is so.
pub async fn until(engine: &Engine, what: &str, condition: impl Fn(&Status) -> bool) {
    wait_until(what, LIMIT, || async { condition(&engine.status()) }).await;
}

/// Waits until the screen says that this keeps documents from being delivered.
pub async fn trouble(engine: &Engine, reason: &str) {
    until(engine, &format!("the screen says {reason}"), |status| {
        status.sink.trouble.as_ref().is_some_and(|trouble| trouble.reason.contains(reason))
    })
    .await;
}
