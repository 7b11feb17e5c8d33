//! Several processes of one job: they share the copy, one streams, the others take over when it dies.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "captured, and shown when a test fails")]

mod helpers;
mod leaders;
#[path = "../support/mod.rs"]
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pgtide::config::Cdc;
use pgtide::demo::Server;
use pgtide::engine::{Phase, Status, TableState};
use pgtide::store::{self, Effect, Fault, Store};
use serde_json::Value;
use support::process::{Pipeline, Settings, signal, wait_confirmed};
use support::{fresh_database, own_server, rows_as_json, wait_until};
use tokio_postgres::Client;

const LIMIT: Duration = Duration::from_secs(60);
const ROWS: i64 = 8_000;

/// A database with a table `items`, and a document store.
struct Job {
    name: String,
    client: Client,
    cdc: Cdc,
    store: Store,
}

/// A chunk's row in the ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Chunk {
    status: String,
    by: Option<String>,
    attempts: i32,
    rows: i64,
}

impl Job {
    async fn new() -> Self {
        let database = fresh_database().await;
        Self::of(format!("procs_{}", database.name), database.client, database.config).await
    }

    async fn on(server: &Server) -> Self {
        server.create_database("procs").await.unwrap();
        Self::of("procs".to_owned(), server.connect("procs").await.unwrap(), server.config("procs")).await
    }

    async fn of(name: String, client: Client, cdc: Cdc) -> Self {
        let sql = format!(
            "SET TimeZone = 'UTC'; CREATE TABLE items (id int PRIMARY KEY, name text, n int);
             INSERT INTO items SELECT i, 'item ' || i, i % 7 FROM generate_series(1, {ROWS}) AS i; ANALYZE items"
        );
        client.batch_execute(&sql).await.unwrap();
        let store = Store::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), store::Options::default()).await.unwrap();
        Self { name, client, cdc, store }
    }

    /// A process of the job, not started yet.
    fn process(&self, instance: &str) -> Pipeline {
        self.process_of(instance, &["items"])
    }

    fn process_of(&self, instance: &str, tables: &[&'static str]) -> Pipeline {
        let settings = Settings {
            name: self.name.clone(),
            tables: tables.to_vec(),
            chunk_size: 100,
            batch_size_limit: 50,
            workers: 2,
        };
        let mut process = Pipeline::to(&self.cdc, &self.store.url(), &settings);
        process.set("/cdc/snapshot/instanceId", instance);
        process.set("/cdc/slot/slotActivityCheckerInterval", 1000);
        process
    }

    /// The same, which is taken for hung after two seconds.
    fn hasty(&self, instance: &str) -> Pipeline {
        let mut process = self.process(instance);
        process.set("/cdc/snapshot/claimTimeout", "2s");
        process.set("/cdc/snapshot/heartbeatInterval", "500ms");
        process
    }

    /// Every bulk takes so long.
    fn slow(&self, milliseconds: u64) {
        self.store.inject(Fault::new(Effect::Delay { milliseconds }));
    }

    async fn chunks(&self) -> BTreeMap<i32, Chunk> {
        let made = "SELECT to_regclass('public.cdc_snapshot_chunks') IS NOT NULL";
        if !self.client.query_one(made, &[]).await.unwrap().get::<_, bool>(0) {
            return BTreeMap::new();
        }
        let sql = "SELECT id, status, claimed_by, attempts, coalesce(rows_processed, 0) FROM cdc_snapshot_chunks
                   WHERE slot_name = $1 AND chunk_index >= 0";
        let rows = self.client.query(sql, &[&self.name]).await.unwrap();
        let chunk = |row: &tokio_postgres::Row| Chunk {
            status: row.get(1),
            by: row.get(2),
            attempts: row.get(3),
            rows: row.get(4),
        };
        rows.iter().map(|row| (row.get(0), chunk(row))).collect()
    }

    /// Waits until the chunks satisfy the condition, and gives them.
    async fn chunks_when(&self, what: &str, condition: impl Fn(&BTreeMap<i32, Chunk>) -> bool) -> BTreeMap<i32, Chunk> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let chunks = self.chunks().await;
            if condition(&chunks) {
                return chunks;
            }
            assert!(Instant::now() < deadline, "still not so: {what}: {chunks:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until the ledger of an instance has `what`: none of which the condition holds.
    async fn until_ledgers(&self, instance: &str, what: &str, condition: &str) {
        let sql = format!(
            "SELECT count(*) FROM pg_stat_activity
             WHERE application_name = 'pgtide ledger {instance}' AND datname = current_database() AND {condition}"
        );
        wait_until(&format!("the ledger of {instance} has {what}"), LIMIT, || async {
            self.client.query_one(&sql, &[]).await.unwrap().get::<_, i64>(0) == 0
        })
        .await;
    }

    /// Starts two processes: the first leads, and both have copied some.
    async fn both_copy(&self, one: &mut Pipeline, two: &mut Pipeline) {
        one.start();
        self.chunks_when("the copy has begun", |chunks| done(chunks) > 0).await;
        two.start();
        self.chunks_when("both have copied some", |chunks| completed_by(chunks).len() == 2).await;
    }

    /// Starts two processes: the first streams, and the second stands by.
    async fn one_streams(&self, one: &mut Pipeline, two: &mut Pipeline) {
        one.start();
        one.wait("it streams", LIMIT, streams).await;
        two.start();
        two.wait("the other one stands by", LIMIT, stands_by).await;
    }

    async fn change(&self, sql: &str) {
        self.client.batch_execute(sql).await.unwrap();
    }

    /// The job is done, every chunk and every row of it counted once, and the documents are the rows.
    async fn is_exact(&self) {
        let sql = "SELECT completed, total_chunks, completed_chunks FROM cdc_snapshot_job WHERE slot_name = $1";
        let job = self.client.query_one(sql, &[&self.name]).await.unwrap();
        let chunks = self.chunks().await;
        assert!(chunks.values().all(|chunk| chunk.status == "completed"), "{chunks:?}");
        let count = i32::try_from(chunks.len()).unwrap();
        assert_eq!((job.get::<_, bool>(0), job.get::<_, i32>(1), job.get::<_, i32>(2)), (true, count, count));
        self.is_equal().await;
    }

    async fn is_equal(&self) {
        let rows = rows_as_json(&self.client, "items").await;
        let documents: BTreeMap<String, Value> = self
            .store
            .documents("items")
            .into_iter()
            .map(|(id, (_, source))| (id, serde_json::from_slice(&source).unwrap()))
            .collect();
        let missing: Vec<_> = rows.iter().filter(|(id, row)| documents.get(*id) != Some(row)).take(5).collect();
        let extra: Vec<_> = documents.keys().filter(|id| !rows.contains_key(*id)).take(5).collect();
        assert!(missing.is_empty() && extra.is_empty(), "missing or different: {missing:?}, extra: {extra:?}");
    }

    /// Changes go on arriving: the documents become the rows.
    async fn delivers(&self, tag: &str) {
        self.change(&format!(
            "UPDATE items SET name = '{tag}' WHERE id % 50 = 3; DELETE FROM items WHERE id = (SELECT max(id) FROM items);
             INSERT INTO items SELECT max(id) + 7, '{tag}', 0 FROM items"
        ))
        .await;
        wait_confirmed(&self.client, &self.name, LIMIT).await;
        self.is_equal().await;
    }
}

fn done(chunks: &BTreeMap<i32, Chunk>) -> usize {
    chunks.values().filter(|chunk| chunk.status == "completed").count()
}

fn in_hand_of(chunks: &BTreeMap<i32, Chunk>, instance: &str) -> Vec<i32> {
    let of = |chunk: &Chunk| chunk.status == "in_progress" && chunk.by.as_deref() == Some(instance);
    chunks.iter().filter(|(_, chunk)| of(chunk)).map(|(id, _)| *id).collect()
}

fn completed_by(chunks: &BTreeMap<i32, Chunk>) -> BTreeSet<String> {
    chunks.values().filter(|chunk| chunk.status == "completed").filter_map(|chunk| chunk.by.clone()).collect()
}

fn streams(status: &Status) -> bool {
    status.phase == Phase::Streaming
}

fn stands_by(status: &Status) -> bool {
    status.phase == Phase::Standby
}

fn helps(status: &Status) -> bool {
    status.standby.as_ref().is_some_and(|standby| standby.helps)
}

async fn share(count: usize) {
    let job = Job::new().await;
    job.slow(40);
    let names = ["one", "two", "three"];
    let mut processes: Vec<Pipeline> = names[..count].iter().map(|name| job.process(name)).collect();
    processes[0].start();
    job.chunks_when("the copy has begun", |chunks| done(chunks) > 0).await;
    for process in &mut processes[1..] {
        // The same cluster by another name.
        process.set("/elasticsearch/urls", serde_json::json!([job.store.url().replace("127.0.0.1", "localhost")]));
        process.start();
    }
    for process in &mut processes[1..] {
        let status = process.wait("it helps", LIMIT, helps).await;
        let standby = status.standby.unwrap();
        assert!(standby.leader.starts_with("instance one, backend "), "{standby:?}");
        // Of the whole job, not of its own part.
        let halfway = |status: &Status| status.tables[0].rows_done > 1_000 && status.tables[0].chunks.done() > 10;
        process.wait("it sees what all have done", LIMIT, halfway).await;
    }
    let status = processes[0].wait("the first one streams", LIMIT, streams).await;
    assert_eq!(status.tables[0].rows_done, ROWS as u64);
    let own = status.tables[0].rows_copied;
    let mut all = own;
    for process in &mut processes[1..] {
        let live = |status: &Status| stands_by(status) && status.tables[0].state == TableState::Standby;
        let status = process.wait("it stands by", LIMIT, live).await;
        assert_eq!(status.tables[0].rows_done, ROWS as u64);
        assert!(status.tables[0].rows_copied > 0, "it copied nothing");
        all += status.tables[0].rows_copied;
    }
    assert_eq!(all, ROWS as u64, "some rows were copied twice, or counted so");
    let chunks = job.chunks().await;
    assert_eq!(completed_by(&chunks), names[..count].iter().map(|name| (*name).to_owned()).collect());
    assert!(chunks.values().all(|chunk| chunk.attempts == 1), "{chunks:?}");
    assert_eq!(chunks.values().map(|chunk| chunk.rows).sum::<i64>(), ROWS);
    job.is_exact().await;
    job.store.clear_faults();
    job.delivers("shared").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_share_a_copy() {
    share(2).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn three_share_a_copy() {
    share(3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_at_once_on_an_empty_database() {
    let job = Job::new().await;
    let mut processes: Vec<Pipeline> = ["one", "two", "three", "four"].map(|name| job.process(name)).into();
    for process in &mut processes {
        process.start();
    }
    let settled = |status: &Status| streams(status) || status.tables[0].state == TableState::Standby;
    let mut leaders = 0;
    for process in &mut processes {
        leaders += usize::from(streams(&process.wait("it streams or stands by", LIMIT, settled).await));
    }
    assert_eq!(leaders, 1);
    job.is_exact().await;
    job.delivers("at once").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_of_another_configuration_does_not_help() {
    let job = Job::new().await;
    job.slow(40);
    job.change("CREATE TABLE extra (id int PRIMARY KEY)").await;
    let (mut one, mut two, mut three) = (job.process("one"), job.process("two"), job.process("three"));
    two.set("/cdc/snapshot/queryCondition", "id < 100");
    let elsewhere = Store::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), store::Options::default()).await.unwrap();
    three.set("/elasticsearch/urls", serde_json::json!([elsewhere.url()]));
    // It has a table more, which is in nobody's way.
    let mut four = job.process_of("four", &["items", "extra"]);
    one.start();
    job.chunks_when("the copy has begun", |chunks| done(chunks) > 0).await;
    for process in [&mut four, &mut two, &mut three] {
        process.start();
    }
    let idle = |status: &Status| status.standby.as_ref().is_some_and(|standby| standby.idle.is_some());
    for (process, why) in [
        (&mut two, "condition of public.items differ"),
        (&mut three, "another Elasticsearch cluster than this configuration's"),
    ] {
        let status = process.wait("it says why it does not help", LIMIT, idle).await;
        let standby = status.standby.unwrap();
        assert!(standby.idle.as_ref().unwrap().contains(why), "{standby:?}");
    }
    one.wait("it streams", LIMIT, streams).await;
    for process in [&mut two, &mut three] {
        let status = process.wait("it stands by", LIMIT, |status| status.tables[0].state == TableState::Standby).await;
        assert_eq!(status.tables[0].rows_copied, 0);
    }
    assert!(elsewhere.documents("items").is_empty());
    assert_eq!(completed_by(&job.chunks().await), ["four".to_owned(), "one".to_owned()].into());
    let status = four.wait("it stands by", LIMIT, |status| status.tables[0].state == TableState::Standby).await;
    assert_eq!(status.tables[1].state, TableState::Queued, "nobody streams it");
    job.is_exact().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_restarts_under_both() {
    let mut server = own_server().await;
    let mut job = Job::on(&server).await;
    job.slow(40);
    let (mut one, mut two) = (job.process("one"), job.process("two"));
    job.both_copy(&mut one, &mut two).await;
    server.kill_hard().await.unwrap();
    server.restart().await.unwrap();
    job.client = server.connect("procs").await.unwrap();
    job.change("SET TimeZone = 'UTC'; UPDATE items SET n = 9 WHERE id % 2 = 0").await;
    let settled = |status: &Status| streams(status) || status.tables[0].state == TableState::Standby;
    let first = one.wait("it streams or stands by", LIMIT, settled).await;
    let second = two.wait("it streams or stands by", LIMIT, settled).await;
    assert!(streams(&first) != streams(&second), "{:?} {:?}", first.phase, second.phase);
    wait_confirmed(&job.client, &job.name, LIMIT).await;
    job.is_exact().await;
    server.kill_hard().await.unwrap();
    server.restart().await.unwrap();
    job.client = server.connect("procs").await.unwrap();
    job.change("SET TimeZone = 'UTC'").await;
    job.store.clear_faults();
    job.delivers("after the second").await;
    drop((one, two));
    server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_alone_is_shared_and_ends_everywhere() {
    let job = Job::new().await;
    job.slow(40);
    let mut processes = ["one", "two"].map(|name| job.process(name));
    for process in &mut processes {
        process.set("/cdc/snapshot/mode", "snapshot_only");
        process.set("/cdc/snapshot/id", job.name.as_str());
        process.set("/cdc/snapshot/tables", serde_json::json!([{"name": "items", "schema": "public"}]));
        process.start();
    }
    for process in &mut processes {
        let status = process.ended(LIMIT).await;
        assert!(status.success(), "{status:?}: {}", process.output());
    }
    assert_eq!(completed_by(&job.chunks().await).len(), 2);
    job.is_exact().await;
}

/// A pause of the leader holds what others copy for it, too.
#[tokio::test(flavor = "multi_thread")]
async fn a_pause_holds_every_process() {
    let job = Job::new().await;
    job.slow(40);
    let (mut one, mut two) = (job.process("one"), job.process("two"));
    job.both_copy(&mut one, &mut two).await;
    one.post("/pause").await;
    one.wait("it is paused", LIMIT, |status| status.phase == Phase::Paused).await;
    let bulks = || job.store.stats().items;
    let (chunks, sent) = (job.chunks().await, bulks());
    assert!(done(&chunks) < chunks.len(), "the copy was over");
    assert!(in_hand_of(&chunks, "two").is_empty(), "{chunks:?}");
    two.wait("it does not help", LIMIT, |status| stands_by(status) && !helps(status)).await;
    assert_eq!((job.chunks().await, bulks()), (chunks, sent));
    // The other one's screen says so, and counts no worker that is gone.
    let idles = |status: &Status| status.snapshot.active_workers == 0 && status.snapshot.workers == 0;
    let paused = |status: &Status| status.standby.as_ref().is_some_and(|standby| standby.paused);
    two.wait("it says that the leader is paused", LIMIT, |status| paused(status) && idles(status)).await;
    one.post("/resume").await;
    two.wait("it helps again", LIMIT, |status| helps(status) && !paused(status)).await;
    one.post("/tables/public.items/pause").await;
    let held = |status: &Status| status.standby.as_ref().is_some_and(|standby| standby.held == ["public.items"]);
    two.wait("it says what the leader holds", LIMIT, |status| {
        held(status) && status.tables[0].state == TableState::Paused
    })
    .await;
    one.wait("the table is held", LIMIT, |status| status.tables[0].state == TableState::Paused).await;
    let idle =
        |chunks: &BTreeMap<i32, Chunk>| in_hand_of(chunks, "one").is_empty() && in_hand_of(chunks, "two").is_empty();
    job.chunks_when("nobody copies a table that is held", idle).await;
    one.post("/tables/public.items/resume").await;
    one.wait("it streams", LIMIT, streams).await;
    job.is_exact().await;
}

/// A request that Elasticsearch carries out after its sender has died, when the transaction has been applied once more:
/// it puts nothing back that a later change of the same transaction replaced or removed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_request_of_the_same_transaction() {
    let job = Job::new().await;
    let start = || {
        let mut process = job.process("a");
        // Each change in a request of its own, one after the other.
        process.set("/elasticsearch/batchSizeLimit", 1);
        process.set("/elasticsearch/concurrentRequest", 1);
        process.start();
        process
    };
    let mut first = start();
    first.wait("it streams", LIMIT, |status| status.phase == Phase::Streaming).await;
    let counted = job.store.stats().items;
    job.store.inject(Fault::new(Effect::Hold { applied: false }).times(1));
    job.change(
        "BEGIN; UPDATE items SET name = 'early' WHERE id = 1; UPDATE items SET name = 'late' WHERE id = 1;
         DELETE FROM items WHERE id = 1; INSERT INTO items VALUES (1, 'latest', 0); COMMIT",
    )
    .await;
    job.store.until_held(1).await;
    first.kill();
    let second = start();
    wait_confirmed(&job.client, &job.name, LIMIT).await;
    job.is_equal().await;
    assert_eq!(job.store.stats().items, counted + 4);
    job.store.clear_faults();
    wait_until("the late request is carried out", LIMIT, || async { job.store.stats().items == counted + 5 }).await;
    job.is_equal().await;
    drop(second);
}

/// A hold that lasts lets the snapshot go, but not while another process still reads by it.
#[tokio::test(flavor = "multi_thread")]
async fn a_long_hold_waits_for_every_process() {
    let job = Job::new().await;
    job.slow(40);
    let (mut one, mut two) = (job.process("one"), job.process("two"));
    one.set("/cdc/snapshot/releaseAfter", "300ms");
    one.start();
    job.chunks_when("the copy has begun", |chunks| done(chunks) > 0).await;
    two.start();
    job.chunks_when("two has a chunk in hand", |chunks| !in_hand_of(chunks, "two").is_empty()).await;
    signal(two.pid(), Signal::SIGSTOP);
    one.post("/tables/public.items/pause").await;
    let chunks = job.chunks_when("one has none", |chunks| in_hand_of(chunks, "one").is_empty()).await;
    assert!(!in_hand_of(&chunks, "two").is_empty(), "it had ended its chunks: {chunks:?}");
    let held = one.wait("a snapshot is held", LIMIT, |status| status.snapshot.held_seconds.is_some()).await;
    let at = held.snapshot.held_seconds.unwrap();
    let long = |status: &Status| status.snapshot.held_seconds.is_none_or(|seconds| seconds > at + 2.0);
    let status = one.wait("time passes", LIMIT, long).await;
    assert!(status.snapshot.held_seconds.is_some(), "it was let go under the other's hands");
    signal(two.pid(), Signal::SIGCONT);
    one.wait("it is let go", LIMIT, |status| status.snapshot.held_seconds.is_none()).await;
    one.post("/tables/public.items/resume").await;
    one.wait("it streams", LIMIT, streams).await;
    job.is_exact().await;
}
