//! PostgreSQL servers for histories. What one history does to a server is felt by others on it: a slot is made only when
//! every transaction of the server has ended, and each stream reads the WAL of all databases. Two share one, so that it
//! is felt now and then.

use std::sync::Arc;

use pgtide::config::Cdc;
use pgtide::demo::{Options, Server};
use tokio::sync::Mutex;
use tokio_postgres::Client;

use super::support::pipeline::LIMIT;
use super::support::wait_until;

/// The server's own one with another method.
const HBA: &str = "local all,replication all trust\nhost all,replication all 127.0.0.1/32 md5\n";

/// Databases of a server.
const SHARED_BY: u32 = 2;

/// An empty database, for one history at a time.
pub struct Place {
    server: Arc<Server>,
    /// The database's name, and the slot's: they are shared by all databases of a server.
    pub name: String,
    /// A connection as superuser, in UTC.
    pub client: Client,
}

#[derive(Default)]
struct Places {
    free: Vec<Place>,
    made: u32,
    newest: Option<Arc<Server>>,
}

static PLACES: Mutex<Option<Places>> = Mutex::const_new(None);

impl Place {
    /// One that is free. There are never more than histories run at once; their servers end with this process.
    pub async fn take() -> Self {
        let mut places = PLACES.lock().await;
        let places = places.get_or_insert_default();
        if let Some(place) = places.free.pop() {
            return place;
        }
        let server = match places.newest.take() {
            Some(server) => server,
            None => Arc::new(server().await),
        };
        if places.made.is_multiple_of(SHARED_BY) {
            places.newest = Some(Arc::clone(&server));
        }
        let name = format!("model_{}", places.made);
        places.made += 1;
        server.create_database(&name).await.unwrap();
        let client = server.connect(&name).await.unwrap();
        client.batch_execute("SET timezone = 'UTC'").await.unwrap();
        Self { server, name, client }
    }

    /// Gives it back, empty, for the next history.
    pub async fn give_back(self) {
        PLACES.lock().await.get_or_insert_default().free.push(self);
    }

    /// One more connection.
    pub async fn connect(&self) -> Client {
        self.server.connect(&self.name).await.unwrap()
    }

    /// The `cdc` part of a configuration for it.
    pub fn config(&self) -> Cdc {
        self.server.config(&self.name)
    }
}

async fn server() -> Server {
    let settings = [
        // Every table that is dropped, emptied or rewritten is looked for in all of them.
        ("shared_buffers", "16MB"),
        ("deadlock_timeout", "200ms"),
        ("password_encryption", "md5"),
    ];
    let settings = settings.map(|(name, value)| (name.into(), value.into())).into();
    let server = Server::start(Options { settings, copy_cluster: true, ..Options::default() }).await.unwrap();
    // A hundred connections a history: SCRAM makes each of them expensive on purpose.
    std::fs::write(server.socket_dir().join("data/pg_hba.conf"), HBA).unwrap();
    let loaded = || async {
        let client = server.connect("postgres").await.unwrap();
        client.query_one("SELECT pg_conf_load_time()::text", &[]).await.unwrap().get::<_, String>(0)
    };
    let before = loaded().await;
    server.connect("postgres").await.unwrap().batch_execute("SELECT pg_reload_conf()").await.unwrap();
    wait_until("pg_hba.conf is read again", LIMIT, || async { loaded().await != before }).await;
    server
}
