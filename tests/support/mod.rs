//! What the integration tests share: a server, databases, polling, rows as JSON.

#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

pub mod elasticsearch;
pub mod pipeline;
pub mod process;
pub mod proxy;
pub mod standby;
pub mod wire;

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use pgtide::config;
use pgtide::demo::{Options, Server};
use tokio::sync::OnceCell;
use tokio_postgres::Client;

/// A server for one test alone: it may be restarted, or filled with slots.
pub async fn own_server() -> Server {
    own_server_with(&[]).await
}

/// A server for one test alone with settings of its own.
pub async fn own_server_with(settings: &[(&str, &str)]) -> Server {
    let settings = settings.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect();
    Server::start(Options { settings, copy_cluster: true, ..Options::default() }).await.unwrap()
}

/// The server that all tests of this binary share. Its statics are not dropped, but it ends with the process.
pub async fn shared_server() -> &'static Server {
    static SERVER: OnceCell<Server> = OnceCell::const_new();
    // Started on a runtime that outlives the first test's: the handle of the child process belongs to it.
    SERVER
        .get_or_init(|| async {
            let (sender, receiver) = tokio::sync::oneshot::channel();
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let settings =
                        [("max_connections", "300"), ("max_replication_slots", "100"), ("max_wal_senders", "100")];
                    assert!(sender.send(own_server_with(&settings).await).is_ok(), "nobody waits for the server");
                    std::future::pending::<()>().await;
                });
            });
            receiver.await.expect("the server did not start")
        })
        .await
}

/// An empty database on the shared server.
pub struct Database {
    /// Its name, which no other test has.
    pub name: String,
    /// A connection to it as superuser.
    pub client: Client,
    /// The `cdc` part of a configuration for it.
    pub config: config::Cdc,
}

/// An empty database on the shared server, for one test.
pub async fn fresh_database() -> Database {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let server = shared_server().await;
    let name = format!("test_{}", NUMBER.fetch_add(1, Ordering::Relaxed));
    server.create_database(&name).await.unwrap();
    Database { client: server.connect(&name).await.unwrap(), config: server.config(&name), name }
}

/// Polls until the condition holds; panics with `what` after `limit`.
pub async fn wait_until<F, T>(what: &str, limit: Duration, mut condition: F)
where
    F: FnMut() -> T,
    T: Future<Output = bool>,
{
    let deadline = Instant::now() + limit;
    while !condition().await {
        assert!(Instant::now() < deadline, "after {limit:?} still not so: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Every row of a table as PostgreSQL itself makes JSON of it, by the text of its column `id`. `table` is put into the
/// statement as it is.
pub async fn rows_as_json(client: &Client, table: &str) -> BTreeMap<String, serde_json::Value> {
    let rows = client.query(&format!("SELECT id::text, to_jsonb(t) FROM {table} AS t"), &[]).await.unwrap();
    let count = rows.len();
    let map: BTreeMap<_, _> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(map.len(), count, "ids of {table} are not unique");
    map
}
