//! Several processes of one job: they share the copy, one streams, the others take over when it dies.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "captured, and shown when a test fails")]

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

/// What another process had in hand when it was killed is taken over at once: its backend is gone.
#[tokio::test(flavor = "multi_thread")]
async fn a_helper_is_killed() {
    let job = Job::new().await;
    job.slow(40);
    let (mut one, mut two) = (job.process("one"), job.process("two"));
    one.start();
    two.start();
    job.chunks_when("both have copied some", |chunks| completed_by(chunks).len() == 2).await;
    let mut helper = if helps(&one.wait("it works", LIMIT, |status| status.phase != Phase::Connecting).await) {
        two.wait("it leads", LIMIT, |status| status.phase == Phase::Snapshot).await;
        one
    } else {
        two.wait("it helps", LIMIT, helps).await;
        std::mem::replace(&mut two, one)
    };
    let mut leader = two;
    let name = if helper.status().await.unwrap().standby.unwrap().leader.contains("one") { "two" } else { "one" };
    let lost = loop {
        let chunks = job.chunks_when("it has chunks in hand", |chunks| !in_hand_of(chunks, name).is_empty()).await;
        helper.kill();
        // What it had sent by then is carried out.
        job.until_ledgers(name, "no backend", "TRUE").await;
        let after = job.chunks().await;
        let completed = |id: &i32| after[id].status == "completed" && after[id].by.as_deref() == Some(name);
        let left: Vec<i32> = in_hand_of(&chunks, name).into_iter().filter(|id| !completed(id)).collect();
        if !left.is_empty() {
            break left;
        }
        assert!(done(&chunks) < chunks.len(), "the copy ended before a kill in the middle of a chunk");
        helper.start();
        helper.wait("it helps again", LIMIT, helps).await;
    };
    leader.wait("the other one streams", LIMIT, streams).await;
    let chunks = job.chunks().await;
    for id in &lost {
        assert!(chunks[id].attempts > 1, "{id}: {chunks:?}");
    }
    job.is_exact().await;
    job.store.clear_faults();
    job.delivers("killed").await;
}

/// A helper that hangs is taken over from after claimTimeout. Once it goes on, nothing that it still does has an effect.
#[tokio::test(flavor = "multi_thread")]
async fn a_helper_hangs() {
    let job = Job::new().await;
    let (chunks, _leader, mut helper) = hang(&job, None).await;
    let back = |status: &Status| stands_by(status) && status.tables[0].state == TableState::Standby && !helps(status);
    helper.wait("the helper stands by again", LIMIT, back).await;
    assert_eq!(job.chunks().await, chunks, "a late completion counted");
    job.is_exact().await;
    assert!(helper.output().contains("another process has taken over"), "{}", helper.output());
}

/// The same without the token of claims: what it completes late is counted once more. Without the lease either, which
/// would keep it from sending what it then completes.
#[tokio::test(flavor = "multi_thread")]
async fn a_helper_hangs_and_shows_no_token() {
    let job = Job::new().await;
    let (chunks, _leader, _helper) = hang(&job, Some("ClaimToken,Lease")).await;
    let sql = "SELECT completed_chunks::int8 FROM cdc_snapshot_job WHERE slot_name = $1";
    wait_until("more chunks are completed than there are", LIMIT, || async {
        let count: i64 = job.client.query_one(sql, &[&job.name]).await.unwrap().get(0);
        count > i64::try_from(chunks.len()).unwrap()
    })
    .await;
}

/// The same without the lease: what it sends late brings deleted documents back. Not where it hangs with a chunk in hand of
/// which it has not read a row yet, or sent the last one: then another one has to.
#[tokio::test(flavor = "multi_thread")]
async fn a_helper_hangs_and_has_no_lease() {
    for _ in 0..5 {
        let job = Job::new().await;
        let (_, _leader, _helper) = hang(&job, Some("Lease")).await;
        let back = async {
            while job.store.documents("items").len() <= 3 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        if tokio::time::timeout(Duration::from_secs(15), back).await.is_ok() {
            return;
        }
    }
    panic!("deleted documents are never back");
}

/// A helper hangs in the copy, another process does its work, and what was copied is deleted and forgotten before it goes on.
/// Gives the
/// chunks of before, the leader, and the helper, which breaks a rule.
async fn hang(job: &Job, broken: Option<&str>) -> (BTreeMap<i32, Chunk>, Pipeline, Pipeline) {
    job.slow(40);
    let (mut leader, mut helper) = (job.hasty("one"), job.hasty("two"));
    helper.environment(&broken.map(|rule| ("PGTIDE_BROKEN", rule.to_owned())).into_iter().collect::<Vec<_>>());
    job.both_copy(&mut leader, &mut helper).await;
    let stuck = loop {
        job.chunks_when("it has chunks in hand", |chunks| !in_hand_of(chunks, "two").is_empty()).await;
        signal(helper.pid(), Signal::SIGSTOP);
        // What it had sent by then is carried out.
        job.until_ledgers("two", "an idle backend", "state <> 'idle'").await;
        let settled = in_hand_of(&job.chunks().await, "two");
        if !settled.is_empty() {
            break settled;
        }
        signal(helper.pid(), Signal::SIGCONT);
    };
    leader.wait("the leader streams", LIMIT, streams).await;
    let chunks = job.chunks().await;
    for id in &stuck {
        assert_eq!((chunks[id].by.as_deref(), chunks[id].attempts), (Some("one"), 2), "{id}");
    }
    job.is_exact().await;
    // What the helper still holds in memory would bring these back, once Elasticsearch has forgotten that they are gone.
    job.store.clear_faults();
    job.change("DELETE FROM items; INSERT INTO items SELECT i, 'new', i FROM generate_series(1, 3) AS i").await;
    wait_confirmed(&job.client, &job.name, LIMIT).await;
    job.is_equal().await;
    job.store.forget_tombstones();
    signal(helper.pid(), Signal::SIGCONT);
    (chunks, leader, helper)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_is_killed_in_the_copy() {
    let job = Job::new().await;
    job.slow(40);
    let (mut one, mut two) = (job.process("one"), job.process("two"));
    job.both_copy(&mut one, &mut two).await;
    job.change("UPDATE items SET n = -1 WHERE id % 3 = 0; DELETE FROM items WHERE id % 10 = 1").await;
    let killed = Instant::now();
    one.kill();
    let before = job.chunks().await;
    assert!(done(&before) < before.len(), "the copy was over");
    two.wait("it goes on with the copy", LIMIT, |status| status.phase == Phase::Snapshot).await;
    println!("the copy has a new leader after {:?}", killed.elapsed());
    job.change("UPDATE items SET n = -2 WHERE id % 3 = 1").await;
    // The one that was killed comes back, and helps.
    one.start();
    one.wait("it helps now", LIMIT, |status| helps(status) || status.tables[0].state == TableState::Standby).await;
    two.wait("it streams", LIMIT, streams).await;
    let after = job.chunks().await;
    for (id, chunk) in &before {
        if chunk.status == "completed" {
            assert_eq!(after.get(id), Some(chunk), "what was done was done again");
        }
    }
    wait_confirmed(&job.client, &job.name, LIMIT).await;
    job.is_exact().await;
    job.store.clear_faults();
    job.delivers("a new leader").await;
}

/// From SIGKILL to the stream of the next it takes 5 s at most.
#[tokio::test(flavor = "multi_thread")]
async fn the_leader_is_killed_while_it_streams() {
    let job = Job::new().await;
    let (mut one, mut two) = (job.process("one"), job.process("two"));
    one.start();
    one.wait("it streams", LIMIT, streams).await;
    two.start();
    for round in 0..6 {
        let status = two.wait("the other one stands by", LIMIT, |status| {
            stands_by(status) && status.tables[0].state == TableState::Standby
        });
        let name = if round % 2 == 0 { "instance one" } else { "instance two" };
        assert!(status.await.standby.unwrap().leader.contains(name));
        let (code, text) = two.ask("/pause").await.unwrap();
        assert!(code == 409 && text.contains("stands by") && text.contains(name), "{code} {text}");
        job.change(&format!(
            "INSERT INTO items SELECT i, 'round', 0 FROM generate_series({}, {}) AS i",
            100_000 + round * 10_000,
            100_999 + round * 10_000
        ))
        .await;
        let killed = Instant::now();
        one.kill();
        job.change("UPDATE items SET n = n + 1 WHERE id <= 500").await;
        two.wait("the other one streams", LIMIT, |status| {
            matches!(status.phase, Phase::CatchUp | Phase::Streaming) && status.replication.transactions > 0
        })
        .await;
        let takeover = killed.elapsed();
        println!("takeover after {takeover:?}");
        assert!(takeover < Duration::from_secs(5), "round {round}: {takeover:?}");
        job.delivers(&format!("round {round}")).await;
        one.start();
        std::mem::swap(&mut one, &mut two);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_leader_is_stopped() {
    let job = Job::new().await;
    let (mut one, mut two) = (job.process("one"), job.process("two"));
    job.one_streams(&mut one, &mut two).await;
    signal(one.pid(), Signal::SIGTERM);
    assert!(one.ended(LIMIT).await.success(), "{}", one.output());
    two.wait("the other one streams", LIMIT, streams).await;
    job.delivers("stopped").await;
    // One that stands by is stopped as well.
    one.start();
    one.wait("it stands by", LIMIT, stands_by).await;
    signal(one.pid(), Signal::SIGTERM);
    assert!(one.ended(LIMIT).await.success(), "{}", one.output());
    assert!(one.output().contains("STANDBY") && one.output().contains("instance two, backend"), "{}", one.output());
    job.delivers("still").await;
}

/// A leader that hangs loses the lead after claimTimeout. Once it goes on it finds its connections ended: what it still
/// sends is older than what is there, and it stands by.
#[tokio::test(flavor = "multi_thread")]
async fn the_leader_hangs() {
    let job = Job::new().await;
    let (mut one, mut two) = (job.hasty("one"), job.hasty("two"));
    job.one_streams(&mut one, &mut two).await;
    // A bulk that the old leader has sent is carried out late.
    job.store.inject(Fault::new(Effect::Hold { applied: false }).times(1));
    job.change("UPDATE items SET name = 'old' WHERE id = 1").await;
    job.store.until_held(1).await;
    // The next ones wait in its memory: a bulk of the same lane goes when the one before it is answered.
    job.change("UPDATE items SET name = 'older' WHERE id = 1").await;
    signal(one.pid(), Signal::SIGSTOP);
    job.change("UPDATE items SET name = 'new' WHERE id = 1; DELETE FROM items WHERE id = 2").await;
    two.wait("the other one streams", LIMIT, streams).await;
    wait_confirmed(&job.client, &job.name, LIMIT).await;
    job.is_equal().await;
    let confirmed = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1";
    let before: String = job.client.query_one(confirmed, &[&job.name]).await.unwrap().get(0);
    signal(one.pid(), Signal::SIGCONT);
    job.store.clear_faults();
    one.wait("the old leader stands by", LIMIT, stands_by).await;
    let after: String = job.client.query_one(confirmed, &[&job.name]).await.unwrap().get(0);
    assert!(after.parse::<pgtide::lsn::Lsn>().unwrap() >= before.parse().unwrap(), "{before} {after}");
    job.is_equal().await;
    job.delivers("new leader").await;
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'pgtide stream'";
    assert_eq!(job.client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0), 1);
    assert!(two.output().contains("instance one led and has said nothing for 2 s"), "{}", two.output());
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
