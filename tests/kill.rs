//! The program killed and stopped at random moments, against a real PostgreSQL and a document store that live on.
//!
//! `PGTIDE_KILL_SEED` sets the seed of the moments; a failure prints it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "captured, and shown when a test fails")]

mod support;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pgtide::engine::{Phase, TableState};
use serde_json::json;
use support::process::{Pipeline, Settings, StoreProcess, assert_equal, signal, wait_confirmed};
use support::{Database, fresh_database, shared_server, wait_until};
use tokio::task::JoinHandle;
use tokio_postgres::Client;

const LIMIT: Duration = Duration::from_secs(60);
/// What an orderly end may take at most.
const END: Duration = Duration::from_secs(8);

const TABLES: [&str; 2] = ["items", "notes"];

/// `note` is kept out of line, so that an UPDATE of another column does not send it.
const SCHEMA: &str = r#"
CREATE TABLE items (
    id bigint PRIMARY KEY, amount int, name text, note text, ok boolean, at timestamptz, local timestamp, day date,
    price numeric(12, 4), ref uuid, extra jsonb
);
ALTER TABLE items ALTER COLUMN note SET STORAGE EXTERNAL;
CREATE SEQUENCE item_ids START 10000000;
CREATE FUNCTION item(id bigint) RETURNS items LANGUAGE sql VOLATILE AS $$
    SELECT id, nullif(id % 1000, 7)::int, 'name "' || id || E'"\n\\ \u00e4 \u6f22',
           CASE WHEN id % 50 = 0 THEN repeat(md5(id::text), 100) ELSE 'short' END, id % 2 = 0,
           timestamptz '2024-02-29 12:00:00.000001+00' + id * interval '1.5 s', timestamp '1999-12-31 23:59:59.5',
           date '2000-01-01' + (id % 5000)::int, (id % 100000) / 7.0, md5(id::text)::uuid,
           jsonb_build_object('id', id, 'deep', jsonb_build_array(1, NULL, 'x"y'))
$$;
CREATE TABLE notes (id text PRIMARY KEY, body text, n int);
ALTER TABLE notes REPLICA IDENTITY FULL;
"#;

/// The two tables, with so many rows in `items`.
async fn fill(database: &Database, items: i64) {
    database.client.batch_execute("SET TimeZone = 'UTC'").await.unwrap();
    database.client.batch_execute(SCHEMA).await.unwrap();
    let sql = format!(
        r#"INSERT INTO items SELECT (item(i)).* FROM generate_series(1, {items}) AS i;
           INSERT INTO notes SELECT 'key "' || i || '" \ ä', 'body ' || i, i FROM generate_series(1, 1000) AS i;
           ANALYZE items; ANALYZE notes"#
    );
    database.client.batch_execute(&sql).await.unwrap();
}

/// Changes to both tables, one transaction after the other, until stopped.
struct Changes {
    stop: Arc<AtomicBool>,
    transactions: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Changes {
    async fn start(database: &Database, items: i64, seed: u64) -> Self {
        let client = shared_server().await.connect(&database.name).await.unwrap();
        let (stop, transactions) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counter) = (Arc::clone(&stop), Arc::clone(&transactions));
        let task = tokio::spawn(async move {
            let mut rng = fastrand::Rng::with_seed(seed);
            while !stopped.load(Relaxed) {
                client.batch_execute(&transaction(&mut rng, items)).await.unwrap();
                counter.fetch_add(1, Relaxed);
                tokio::time::sleep(Duration::from_millis(rng.u64(0..8))).await;
            }
        });
        Self { stop, transactions, task }
    }

    async fn stop(self) -> u64 {
        self.stop.store(true, Relaxed);
        self.task.await.expect("the changes failed");
        self.transactions.load(Relaxed)
    }
}

fn transaction(rng: &mut fastrand::Rng, items: i64) -> String {
    let id = rng.i64(1..=items);
    let (to, key) = (id + rng.i64(0..20), rng.u32(1..=1_000));
    let number = rng.u32(..);
    match rng.u32(0..12) {
        0 | 1 => {
            format!("INSERT INTO items SELECT (item(nextval('item_ids'))).* FROM generate_series(1, {})", rng.u8(1..9))
        }
        2 | 3 => format!("UPDATE items SET amount = {}, name = 'changed' WHERE id BETWEEN {id} AND {to}", number / 2),
        4 => format!("UPDATE items SET note = repeat('{number}', 400), ok = NULL WHERE id = {id}"),
        5 => format!("DELETE FROM items WHERE id BETWEEN {id} AND {id} + 2"),
        6 => format!("UPDATE items SET id = nextval('item_ids'), price = -1.5 WHERE id BETWEEN {id} AND {id} + 1"),
        7 => format!(
            "BEGIN; DELETE FROM items WHERE id = {id}; INSERT INTO items SELECT (item({id})).*;
             UPDATE items SET extra = '{{\"again\": {number}}}' WHERE id = {id}; COMMIT"
        ),
        8 => format!("BEGIN; DELETE FROM items WHERE id >= {id}; ROLLBACK"),
        9 => format!("DELETE FROM notes WHERE n = {key}"),
        10 => format!(
            "INSERT INTO notes VALUES ('key \"{key}\" \\ ä', '{number}', {key})
             ON CONFLICT (id) DO UPDATE SET body = excluded.body"
        ),
        _ => format!("UPDATE notes SET id = 'moved ' || nextval('item_ids'), body = NULL WHERE n = {key}"),
    }
}

fn settings(database: &Database) -> Settings {
    Settings {
        name: format!("kill_{}", database.name),
        tables: TABLES.to_vec(),
        chunk_size: 100,
        batch_size_limit: 50,
        workers: 2,
    }
}

/// What the ledger says.
#[derive(Debug, Default)]
struct Ledger {
    completed: bool,
    /// Chunks by id: completed, how often claimed.
    chunks: BTreeMap<i32, (bool, i32)>,
}

impl Ledger {
    /// Of the whole job, or of one table of it. Empty before the first start has made one.
    async fn read(client: &Client, job: &str, table: Option<&str>) -> Self {
        let exists = client.query_one("SELECT to_regclass('public.cdc_snapshot_job') IS NOT NULL", &[]).await.unwrap();
        if !exists.get::<_, bool>(0) {
            return Self::default();
        }
        let completed = client.query_opt("SELECT completed FROM cdc_snapshot_job WHERE slot_name = $1", &[&job]).await;
        let sql = "SELECT id, status = 'completed', attempts FROM cdc_snapshot_chunks
                   WHERE slot_name = $1 AND ($2::text IS NULL OR table_name = $2) AND chunk_index >= 0";
        let chunks = client.query(sql, &[&job, &table]).await.unwrap();
        Self {
            completed: completed.unwrap().is_some_and(|row| row.get(0)),
            chunks: chunks.iter().map(|row| (row.get(0), (row.get(1), row.get(2)))).collect(),
        }
    }

    fn done(&self) -> usize {
        self.chunks.values().filter(|(done, _)| *done).count()
    }

    fn is_half_done(&self) -> bool {
        !self.completed && self.done() > 0 && self.done() < self.chunks.len()
    }

    /// What was completed in `before` was not copied again since.
    fn assert_went_on_from(&self, before: &Ledger) {
        assert_eq!(self.chunks.len(), before.chunks.len(), "the plan was made anew");
        for (id, (done, attempts)) in &before.chunks {
            if *done {
                assert_eq!(self.chunks.get(id), Some(&(true, *attempts)), "chunk {id} was copied again");
            }
        }
    }
}

/// Waits until so many more chunks are done than in `before`, and a random moment longer.
async fn wait_chunks(client: &Client, job: &str, table: Option<&str>, before: usize, rng: &mut fastrand::Rng) {
    let wanted = before + rng.usize(1..=4);
    wait_until(&format!("{wanted} chunks are done"), LIMIT, || async {
        Ledger::read(client, job, table).await.done() >= wanted
    })
    .await;
    tokio::time::sleep(Duration::from_micros(rng.u64(0..20_000))).await;
}

fn seed(number: u64) -> u64 {
    let given = std::env::var("PGTIDE_KILL_SEED").ok().map(|text| text.parse().expect("PGTIDE_KILL_SEED is a number"));
    let seed = given.unwrap_or_else(|| fastrand::u64(..1_000_000)) + number;
    println!("PGTIDE_KILL_SEED={} (history {number})", seed - number);
    seed
}

/// Five kills in the copy and five in the stream, with changes all the time: in the end, documents equal rows.
async fn history(number: u64) {
    const ITEMS: i64 = 20_000;
    let mut rng = fastrand::Rng::with_seed(seed(number));
    let database = fresh_database().await;
    fill(&database, ITEMS).await;
    let client = &database.client;
    let store = StoreProcess::start();
    let settings = settings(&database);
    let job = settings.name.clone();
    let changes = Changes::start(&database, ITEMS, rng.u64(..)).await;
    let mut pipeline = Pipeline::new(&database.config, &store, settings);
    let mut before = Ledger::default();
    for kill in 1..=5 {
        pipeline.start();
        wait_chunks(client, &job, None, before.done(), &mut rng).await;
        pipeline.kill();
        let ledger = Ledger::read(client, &job, None).await;
        assert!(ledger.is_half_done(), "kill {kill} was not in the middle of the copy");
        if kill > 1 {
            ledger.assert_went_on_from(&before);
        }
        println!("copy, kill {kill}: {} of {} chunks done", ledger.done(), ledger.chunks.len());
        before = ledger;
    }
    pipeline.start();
    for kill in 1..=5 {
        let status = pipeline.wait("it streams", LIMIT, |status| status.phase == Phase::Streaming).await;
        let wanted = status.replication.changes + rng.u64(1..300);
        pipeline.wait("changes came", LIMIT, |status| status.replication.changes >= wanted).await;
        tokio::time::sleep(Duration::from_micros(rng.u64(0..30_000))).await;
        pipeline.kill();
        println!("stream, kill {kill} after {wanted} changes");
        pipeline.start();
    }
    let ledger = Ledger::read(client, &job, None).await;
    assert!(ledger.completed && ledger.done() == ledger.chunks.len(), "{ledger:?}");
    ledger.assert_went_on_from(&before);
    let transactions = changes.stop().await;
    pipeline.wait("it streams", LIMIT, |status| status.phase == Phase::Streaming).await;
    wait_confirmed(client, &job, LIMIT).await;
    for table in TABLES {
        assert_equal(client, &store, table).await;
    }
    pipeline.assert_nothing_rejected();
    println!("{transactions} transactions");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_kills_lose_nothing() {
    history(0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_other_kills_lose_nothing() {
    history(1).await;
}

/// SIGTERM in the copy and in the stream.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_is_quick_and_acknowledges_all_that_was_answered_for() {
    const ITEMS: i64 = 10_000;
    let mut rng = fastrand::Rng::with_seed(seed(2));
    let database = fresh_database().await;
    fill(&database, ITEMS).await;
    let client = &database.client;
    client.batch_execute("CREATE TABLE marks (id int PRIMARY KEY, mark text)").await.unwrap();
    let store = StoreProcess::start();
    let mut settings = settings(&database);
    settings.tables.push("marks");
    let job = settings.name.clone();
    let mut pipeline = Pipeline::new(&database.config, &store, settings);

    pipeline.start();
    wait_chunks(client, &job, None, 0, &mut rng).await;
    signal(pipeline.pid(), Signal::SIGTERM);
    assert_eq!(pipeline.ended(END).await.code(), Some(0), "{}", pipeline.output());
    let before = Ledger::read(client, &job, None).await;
    assert!(before.is_half_done(), "the stop was not in the middle of the copy");

    pipeline.start();
    pipeline.wait("it streams", LIMIT, |status| status.phase == Phase::Streaming).await;
    Ledger::read(client, &job, None).await.assert_went_on_from(&before);
    let marks = Marks::start(&database).await;
    for stop in 1..=3 {
        let status = pipeline.wait("it streams", LIMIT, |status| status.phase == Phase::Streaming).await;
        let wanted = status.replication.changes + rng.u64(50..300);
        pipeline.wait("marks came", LIMIT, |status| status.replication.changes >= wanted).await;
        signal(pipeline.pid(), Signal::SIGTERM);
        assert_eq!(pipeline.ended(END).await.code(), Some(0), "stop {stop}: {}", pipeline.output());
        // What the next start will be sent is what it has no document for, from the first to the last.
        let documents = store.documents("marks").await;
        let newest = i64::try_from(documents.len()).unwrap();
        assert_eq!(documents.keys().filter_map(|id| id.parse().ok()).max(), Some(newest), "marks are missing");
        wait_until("a mark is committed after the stop", LIMIT, || async {
            client.query_one("SELECT count(*) FROM marks", &[]).await.unwrap().get::<_, i64>(0) > newest
        })
        .await;
        let first = marks_left(client, &job).await;
        // Of the newest one, the stop may have come between its row and its commit.
        assert!(first == Some(newest + 1) || first == Some(newest), "stop {stop}: {newest} answered, {first:?} next");
        pipeline.start();
    }
    let count = marks.stop().await;
    pipeline.wait("it streams", LIMIT, |status| status.phase == Phase::Streaming).await;
    wait_confirmed(client, &job, LIMIT).await;
    assert_eq!(store.documents("marks").await.len(), usize::try_from(count).unwrap());
    for table in ["items", "notes", "marks"] {
        assert_equal(client, &store, table).await;
    }
    // What is on its way at a stop is waited for and acknowledged.
    let silent = Stopped::process(store.pid());
    client.batch_execute("INSERT INTO marks VALUES (0, 'mark 000000000')").await.unwrap();
    received(client, &job).await;
    signal(pipeline.pid(), Signal::SIGINT);
    pipeline.wait("it stops", END, |status| status.phase == Phase::Stopping).await;
    drop(silent);
    assert_eq!(pipeline.ended(END).await.code(), Some(0), "{}", pipeline.output());
    assert!(store.documents("marks").await.contains_key("0"));
    assert_eq!(marks_left(client, &job).await, None);
}

/// Waits until the pipeline has received all that is committed now and PostgreSQL was told so; gives that position.
async fn received(client: &Client, slot: &str) -> String {
    let end: String = client.query_one("SELECT pg_current_wal_lsn()::text", &[]).await.unwrap().get(0);
    wait_until("it is received", LIMIT, || told(client, slot, "write_lsn", &end)).await;
    end
}

/// Whether PostgreSQL was told that this position is received (`write_lsn`) or may be forgotten (`flush_lsn`).
async fn told(client: &Client, slot: &str, column: &str, position: &str) -> bool {
    let sql = format!(
        "SELECT coalesce(r.{column} >= $2::text::pg_lsn, FALSE) FROM pg_replication_slots s
         JOIN pg_stat_replication r ON r.pid = s.active_pid WHERE slot_name = $1"
    );
    client.query_one(&sql, &[&slot, &position]).await.unwrap().get(0)
}

/// The first mark that the slot would send.
async fn marks_left(client: &Client, slot: &str) -> Option<i64> {
    let sql = "SELECT data FROM pg_logical_slot_peek_binary_changes($1, NULL, NULL, 'proto_version', '1',
               'publication_names', $2)";
    client.query(sql, &[&slot, &slot]).await.unwrap().iter().find_map(|row| mark_in(row.get(0)))
}

/// Numbers from 1, each inserted by a transaction of its own, in order.
struct Marks {
    stop: Arc<AtomicBool>,
    task: JoinHandle<u64>,
}

impl Marks {
    async fn start(database: &Database) -> Self {
        let client = shared_server().await.connect(&database.name).await.unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let task = tokio::spawn(async move {
            let mut number = 0;
            while !stopped.load(Relaxed) {
                number += 1;
                let sql = format!("INSERT INTO marks VALUES ({number}, 'mark {number:09}')");
                client.batch_execute(&sql).await.unwrap();
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            number
        });
        Self { stop, task }
    }

    async fn stop(self) -> u64 {
        self.stop.store(true, Relaxed);
        self.task.await.expect("the marks failed")
    }
}

/// The mark that an INSERT of pgoutput carries.
fn mark_in(data: &[u8]) -> Option<i64> {
    let at = data.windows(5).position(|window| window == b"mark ")?;
    std::str::from_utf8(data.get(at + 5..at + 14)?).ok()?.parse().ok()
}

/// A kill in the middle of a resnapshot: the next start does it again, unasked.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_resnapshot_is_done_again() {
    const ITEMS: i64 = 10_000;
    let mut rng = fastrand::Rng::with_seed(seed(3));
    let database = fresh_database().await;
    fill(&database, ITEMS).await;
    let client = &database.client;
    // The repair at the end needs a row that no change touches.
    client.batch_execute("INSERT INTO items SELECT (item(9000000)).*").await.unwrap();
    let store = StoreProcess::start();
    let settings = settings(&database);
    let job = settings.name.clone();
    let mut pipeline = Pipeline::new(&database.config, &store, settings);
    pipeline.start();
    pipeline.wait("it streams", LIMIT, |status| status.phase == Phase::Streaming).await;
    let changes = Changes::start(&database, ITEMS, rng.u64(..)).await;

    // What only a whole resnapshot repairs: a lost document, and one without a row.
    store
        .bulk(&[
            json!({"delete": {"_index": "items", "_id": "9000000"}}),
            json!({"index": {"_index": "items", "_id": "ghost", "version": 1, "version_type": "external_gte"}}),
            json!({"id": "ghost"}),
        ])
        .await;
    pipeline.post("/tables/public.items/resnapshot").await;
    let mut before = usize::MAX;
    for kill in 1..=2 {
        wait_until("the resnapshot has begun anew", LIMIT, || async {
            let ledger = Ledger::read(client, &job, Some("items")).await;
            !ledger.chunks.is_empty() && ledger.done() < ledger.chunks.len() && ledger.done() < before
        })
        .await;
        wait_chunks(client, &job, Some("items"), 0, &mut rng).await;
        pipeline.kill();
        let ledger = Ledger::read(client, &job, Some("items")).await;
        before = ledger.done();
        assert!(before > 0 && before < ledger.chunks.len(), "kill {kill} was not in the middle of the resnapshot");
        assert!(store.documents("items").await.contains_key("ghost"), "the sweep came before the end of the copy");
        pipeline.start();
    }
    let items = |status: &pgtide::engine::Status| status.tables[0].clone();
    pipeline.wait("the resnapshot goes on by itself", LIMIT, |status| items(status).resnapshot).await;
    pipeline
        .wait("it is done", LIMIT, |status| !items(status).resnapshot && items(status).state == TableState::Live)
        .await;
    let status = pipeline.status().await.unwrap();
    assert!(
        status.notices.iter().any(|notice| notice.text.contains("public.items: copied again")),
        "{:?}",
        status.notices
    );
    changes.stop().await;
    wait_confirmed(client, &job, LIMIT).await;
    let documents = store.documents("items").await;
    assert!(documents.contains_key("9000000") && !documents.contains_key("ghost"));
    for table in TABLES {
        assert_equal(client, &store, table).await;
    }
    pipeline.assert_nothing_rejected();
}

/// PostgreSQL has not noticed yet that the killed process is gone: its backend is stopped, so that it cannot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_waits_for_the_slot_of_a_dead_process() {
    let database = fresh_database().await;
    fill(&database, 200).await;
    let client = &database.client;
    let store = StoreProcess::start();
    let settings = settings(&database);
    let job = settings.name.clone();
    let mut pipeline = Pipeline::new(&database.config, &store, settings);
    pipeline.start();
    pipeline.wait("it streams", LIMIT, |status| status.phase == Phase::Streaming).await;

    let held = Stopped::process(slot_holder(client, &job).await.unwrap());
    pipeline.kill();
    client.batch_execute("UPDATE items SET amount = -1 WHERE id < 100").await.unwrap();
    pipeline.start();
    let began = Instant::now();
    let status = pipeline
        .wait("it says what it waits for", Duration::from_secs(10), |status| {
            status.attempts >= 2
                && status.problem.as_ref().is_some_and(|problem| problem.message.contains("is held by another process"))
        })
        .await;
    assert_ne!(status.phase, Phase::Failed);
    assert!(began.elapsed() < Duration::from_secs(12), "the machine is too slow for this test");
    drop(held);
    pipeline.wait("it streams", LIMIT, |status| status.phase == Phase::Streaming).await;
    wait_confirmed(client, &job, LIMIT).await;
    for table in TABLES {
        assert_equal(client, &store, table).await;
    }
}

/// A document store that answers nothing for a while, and a kill meanwhile: the slot must still have all of it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_acknowledged_before_its_answer() {
    let database = fresh_database().await;
    fill(&database, 200).await;
    let client = &database.client;
    let store = StoreProcess::start();
    let settings = settings(&database);
    let job = settings.name.clone();
    let mut pipeline = Pipeline::new(&database.config, &store, settings);
    pipeline.start();
    pipeline.wait("it streams", LIMIT, |status| status.phase == Phase::Streaming).await;

    let silent = Stopped::process(store.pid());
    client.batch_execute("UPDATE items SET amount = -1 WHERE id < 20").await.unwrap();
    let end = received(client, &job).await;
    assert!(!told(client, &job, "flush_lsn", &end).await, "what nobody answered for was acknowledged");
    pipeline.kill();
    drop(silent);
    pipeline.start();
    wait_confirmed(client, &job, LIMIT).await;
    for table in TABLES {
        assert_equal(client, &store, table).await;
    }
}

/// The backend that streams from the slot.
async fn slot_holder(client: &Client, slot: &str) -> Option<u32> {
    let sql = "SELECT active_pid FROM pg_replication_slots WHERE slot_name = $1";
    client.query_one(sql, &[&slot]).await.unwrap().get::<_, Option<i32>>(0).map(|pid| pid.try_into().unwrap())
}

/// A process of our own, or a backend of our own server, that does nothing until this is dropped.
struct Stopped(u32);

impl Stopped {
    fn process(pid: u32) -> Self {
        signal(pid, Signal::SIGSTOP);
        Self(pid)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        signal(self.0, Signal::SIGCONT);
    }
}
