//! The local document store: an HTTP server that speaks the part of Elasticsearch's API that pgtide uses.
//!
//! It keeps documents in memory, answers in the shapes and with the status codes of Elasticsearch 8.19, and serves the
//! demo, the tests and the benches. It uses nothing of the engine: a test or a person can run it apart.
//!
//! # Endpoints
//!
//! | what | endpoints |
//! |---|---|
//! | root | `GET /` (`version.distribution` is `pgtide-store`) |
//! | writing | `POST\|PUT /_bulk`, `/{index}/_bulk`; `POST /{index}/_delete_by_query` |
//! | reading | `GET\|HEAD /{index}/_doc/{id}`, `/{index}/_source/{id}`; `POST /_mget`, `/{index}/_mget`; `GET\|POST /_count`, `/{index}/_count` |
//! | searching | `GET\|POST /_search`, `/{index}/_search`, `/_search/scroll`; `DELETE /_search/scroll`; `POST /{index}/_pit`; `DELETE /_pit` |
//! | indices | `PUT\|GET\|HEAD\|DELETE /{index}`; `PUT\|GET /{index}/_settings`, `/{index}/_mapping`; `POST /{index}/_close`, `_open`, `_refresh`, `_flush` |
//! | aliases | `POST /_aliases`; `GET /_alias`, `/_alias/{name}`, `/{index}/_alias`; `PUT\|DELETE /{index}/_alias/{name}` |
//! | cluster | `GET /_cluster/health`, `/_cat/indices` |
//! | its own | `POST\|GET\|DELETE /_pgtide/faults` (see [`Effect`]), `DELETE /_pgtide/tombstones` |
//!
//! # Where it differs from a real server
//!
//! `tests/real/contract.rs` asks both the same. Known to differ:
//!
//! - Searches see writes at once; `_refresh` does nothing.
//! - There is no disk: its end is the end of the documents.
//! - No field is guessed. Types are checked only for fields that somebody mapped; a date format that is a pattern of
//!   letters is checked for the characters of a date only. Types of fields and settings are kept, whatever they are
//!   called; the settings that count are `gc_deletes`, `blocks.write`, `blocks.read_only`, `blocks.read_only_allow_delete`.
//! - Queries: `match_all`, `match_none`, `term`, `terms`, `ids`, `range`, `exists`, `prefix`, `wildcard` (`*` only),
//!   `match`, `bool`, `constant_score`. There is no scoring, no aggregation, no script.
//! - Ranges compare text as text: dates need the same notation on both sides.
//! - A document's id alone is its key: `routing` is kept and shown, and does not choose a shard.
//! - A scroll that is gone, and a query that is none, are answered with the same status and fewer words.
//! - An endpoint that it does not know is answered 400 with an `error` object (Elasticsearch: a bare string).
//!
//! # Null mode
//!
//! [`Options::null`]: bulk bodies are scanned for lines, counted and answered for, and nothing is kept. `_count` gives
//! the number of index, create and update actions. Items carry `result` and `status` only. Other endpoints work, on
//! indices without documents.

mod action;
mod bulk;
mod catalog;
mod connection;
mod contexts;
mod failure;
mod faults;
mod fields;
mod filter_path;
mod index;
mod null;
mod query;
mod routes;
mod search;
mod server;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub use self::faults::{Effect, Fault};

use self::catalog::Catalog;
use self::contexts::Contexts;
use self::failure::Failure;
use self::faults::{Arrived, Faults};

/// The version of Elasticsearch that it gives out to be.
const VERSION: &str = "8.19.0";

/// How a store behaves.
#[derive(Clone)]
pub struct Options {
    /// Count and answer only; keep no document.
    pub null: bool,
    /// Name and password that requests must bring as HTTP basic authentication. None: any are ignored.
    pub user: Option<(String, String)>,
    /// The longest body, inflated, in bytes: `http.max_content_length`. A longer one is answered 413.
    pub max_content_length: usize,
    /// `action.auto_create_index`: a write to a missing index makes it.
    pub auto_create_index: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { null: false, user: None, max_content_length: 100 << 20, auto_create_index: true }
    }
}

impl std::fmt::Debug for Options {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The password stays out.
        f.debug_struct("Options")
            .field("null", &self.null)
            .field("user", &self.user.as_ref().map(|(name, _)| name))
            .field("max_content_length", &self.max_content_length)
            .field("auto_create_index", &self.auto_create_index)
            .finish()
    }
}

/// What a store has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Documents it holds; in null mode the index, create and update actions it counted.
    pub documents: u64,
    /// Items of bulk requests, rejected ones included.
    pub items: u64,
    /// Requests.
    pub requests: u64,
    /// Bytes of request bodies as they came, before any inflating.
    pub bytes: u64,
}

/// A running store. Ends when dropped.
#[derive(Debug)]
pub struct Store {
    shared: Arc<Shared>,
    local_addr: SocketAddr,
    server: Option<JoinHandle<()>>,
}

impl Store {
    /// Listens on `addr` (port 0: one that is free) and serves on tasks of the current tokio runtime.
    ///
    /// # Errors
    /// The address cannot be listened on.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub async fn bind(addr: SocketAddr, options: Options) -> io::Result<Self> {
        let listener = tokio::net::TcpListener::bind(addr).await?;
        let local_addr = listener.local_addr()?;
        let shared = Arc::new(Shared {
            options,
            uuid: index::random_id(22),
            catalog: Catalog::default(),
            contexts: Contexts::default(),
            faults: Faults::default(),
            under_way: Arrived::default(),
            counters: Counters::default(),
            closing: CancellationToken::new(),
        });
        let server = tokio::spawn(server::serve(listener, Arc::clone(&shared)));
        Ok(Self { shared, local_addr, server: Some(server) })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Its URL, without a slash at the end, without name and password.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.local_addr)
    }

    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let indices = self.shared.catalog.resolve("_all", true).unwrap_or_default();
        let counters = &self.shared.counters;
        Stats {
            documents: indices.iter().map(|index| index.count()).sum(),
            items: counters.items.load(Ordering::Relaxed),
            requests: counters.requests.load(Ordering::Relaxed),
            bytes: counters.bytes.load(Ordering::Relaxed),
        }
    }

    /// The documents of an index or alias by id: version and source. Empty if there is none such.
    #[must_use]
    pub fn documents(&self, index: &str) -> BTreeMap<String, (i64, Vec<u8>)> {
        let indices = self.shared.catalog.resolve(index, true).unwrap_or_default();
        let entry = |document: &Arc<index::Document>| {
            (document.id().to_owned(), (document.version, document.source().as_bytes().to_vec()))
        };
        let mut all = BTreeMap::new();
        for index in indices {
            all.extend(index.documents().all().map(entry));
        }
        all
    }

    /// Adds a fault to the end of the queue. Of those for its path each request meets the first.
    pub fn inject(&self, fault: Fault) {
        self.shared.faults.inject(fault);
    }

    /// Takes all faults away and releases the requests that are held.
    pub fn clear_faults(&self) {
        self.shared.faults.clear();
    }

    /// Waits until at least `count` requests are held by [`Effect::Hold`] at once.
    pub async fn until_held(&self, count: usize) {
        self.shared.faults.until_held(count).await;
    }

    /// Requests whose client has gone, and which will be applied all the same.
    #[must_use]
    pub fn abandoned(&self) -> usize {
        self.shared.under_way.abandoned()
    }

    /// Waits until every request that has arrived is applied.
    pub async fn until_applied(&self) {
        self.shared.under_way.until_none().await;
    }

    /// Forgets all tombstones, as a real node does when it restarts.
    pub fn forget_tombstones(&self) {
        self.shared.forget_tombstones();
    }

    /// Takes no more requests, answers those under way (held ones too) and ends. Connections that are still open
    /// after five seconds are left to themselves.
    pub async fn shutdown(mut self) {
        self.shared.closing.cancel();
        if let Some(server) = self.server.take() {
            let abort = server.abort_handle();
            if tokio::time::timeout(Duration::from_secs(5), server).await.is_err() {
                abort.abort();
            }
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.shared.closing.cancel();
    }
}

#[derive(Default)]
struct Counters {
    items: AtomicU64,
    requests: AtomicU64,
    bytes: AtomicU64,
}

/// What all requests share.
struct Shared {
    options: Options,
    uuid: String,
    catalog: Catalog,
    contexts: Contexts,
    faults: Faults,
    under_way: Arrived,
    counters: Counters,
    closing: CancellationToken,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("options", &self.options).finish_non_exhaustive()
    }
}

impl Shared {
    fn forget_tombstones(&self) {
        for index in self.catalog.resolve("_all", true).unwrap_or_default() {
            index.documents().forget_tombstones();
        }
    }
}

/// An answer before it becomes HTTP.
struct Reply {
    status: u16,
    body: Vec<u8>,
    /// Plain text instead of JSON.
    text: bool,
    /// `filter_path` has been seen to, or does not apply.
    filtered: bool,
    /// Everything but a 413 says that it comes from Elasticsearch.
    product: bool,
    /// Asks for name and password.
    challenge: bool,
}

impl Reply {
    fn ok(body: Vec<u8>) -> Self {
        Self { status: 200, body, text: false, filtered: false, product: true, challenge: false }
    }

    fn failure(failure: &Failure) -> Self {
        let body = failure.body().to_string().into_bytes();
        Self { status: failure.status, filtered: true, challenge: failure.status == 401, ..Self::ok(body) }
    }

    /// 413 as Elasticsearch sends it: without body and product header.
    fn too_large() -> Self {
        Self { status: 413, product: false, ..Self::ok(Vec::new()) }
    }
}
