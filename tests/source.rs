//! The server and its slot are not what they were: seen at the start and while running, named, never gone on with in
//! silence.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::{Duration, Instant};

use pgtide::config::{Config, Mode};
use pgtide::demo::{Options, Server};
use pgtide::engine::{Command, Engine, Phase};
use pgtide::lsn::Lsn;
use pgtide::problem::{Problem, ProblemKind};
use serde_json::json;
use support::pipeline::{LIMIT, Rig, ended, live, phase, stop};
use support::process::{Pipeline, Settings, StoreProcess, http, wait_confirmed};
use support::standby::{self, Slots};
use support::{fresh_database, own_server, own_server_with, wait_until};

const BOOKS: &str =
    "CREATE TABLE books (id int PRIMARY KEY, title text); INSERT INTO books VALUES (1, 'one'), (2, 'two')";

/// A pipeline that has copied `books` and was stopped in order.
async fn copied(rig: &Rig) -> Config {
    rig.sql(BOOKS).await;
    let config = rig.config(&["books"]);
    stop(rig.run(config.clone()).await).await;
    config
}

/// Moves the slot over everything that is committed.
async fn advance(rig: &Rig) {
    rig.sql(&format!("SELECT pg_replication_slot_advance('{}', pg_current_wal_lsn())", rig.name)).await;
}

async fn make_anew(rig: &Rig) {
    rig.sql(&format!(
        "SELECT pg_drop_replication_slot('{0}'); SELECT pg_create_logical_replication_slot('{0}', 'pgoutput')",
        rig.name
    ))
    .await;
}

/// The start, or what runs, ends with a gap whose hint names the table.
async fn gap(engine: &mut Engine, words: &[&str]) -> Problem {
    let problem = ended(engine).await.expect_err("it goes on as if nothing was missing");
    assert_eq!((problem.kind, problem.transient), (ProblemKind::Gap, false), "{problem:?}");
    for word in words {
        assert!(problem.message.contains(word), "{word}: {}", problem.message);
    }
    assert!(problem.hint.contains("public.books"), "{}", problem.hint);
    let status = engine.status();
    assert_eq!((status.phase, status.problem.as_ref()), (Phase::Failed, Some(&problem)));
    problem
}

/// The start is refused so; nothing is acknowledged, and no document changes. Copying again as the hint says mends it.
async fn refused_until_copied_again(rig: &Rig, config: &Config, words: &[&str]) {
    let (documents, confirmed) = (rig.documents("books"), rig.confirmed().await);
    for _ in 0..2 {
        let problem = gap(&mut rig.start(config.clone()), words).await;
        assert!(problem.hint.contains("`cdc.snapshot.resnapshot: true`"), "{}", problem.hint);
    }
    assert_eq!((rig.documents("books"), rig.confirmed().await), (documents, confirmed));
    let mut again = config.clone();
    again.cdc.snapshot.resnapshot = true;
    stop(rig.run(again).await).await;
    rig.equal_now("books").await;
    rig.sql("INSERT INTO books VALUES (9, 'after')").await;
    let engine = rig.run(config.clone()).await;
    rig.equal("books").await;
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_was_moved_while_stopped_is_a_gap() {
    let rig = Rig::new().await;
    let config = copied(&rig).await;
    rig.sql("INSERT INTO books VALUES (3, 'lost'); DELETE FROM books WHERE id = 1").await;
    let before = rig.confirmed().await;
    advance(&rig).await;
    let words = [format!("slot {} stands at {}", rig.name, rig.confirmed().await), format!("beyond {before}")];
    refused_until_copied_again(&rig, &config, &[&words[0], &words[1], "somebody else"]).await;
}

/// A process that is killed leaves a position that is just as exact.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_was_made_anew_after_a_kill_is_a_gap() {
    let (database, store) = (fresh_database().await, StoreProcess::start());
    let (client, name) = (&database.client, database.name.clone());
    let settings =
        Settings { name: name.clone(), tables: vec!["books"], chunk_size: 100, batch_size_limit: 100, workers: 1 };
    client.batch_execute(BOOKS).await.unwrap();
    let mut pipeline = Pipeline::new(&database.config, &store, settings);
    pipeline.start();
    pipeline.wait("it streams", LIMIT, |status| status.phase == Phase::Streaming).await;
    client.batch_execute("INSERT INTO books VALUES (3, 'three')").await.unwrap();
    wait_confirmed(client, &name, LIMIT).await;
    pipeline.kill();
    wait_until("the slot is free", LIMIT, || async {
        let sql = "SELECT active FROM pg_replication_slots WHERE slot_name = $1";
        !client.query_one(sql, &[&name]).await.unwrap().get::<_, bool>(0)
    })
    .await;
    // As little WAL as can be.
    client.batch_execute("UPDATE books SET title = 'lost' WHERE id = 3").await.unwrap();
    client.execute("SELECT pg_drop_replication_slot($1)", &[&name]).await.unwrap();
    client.execute("SELECT pg_create_logical_replication_slot($1, 'pgoutput')", &[&name]).await.unwrap();
    pipeline.start();
    let code = pipeline.ended(LIMIT).await.code();
    assert_eq!(code, Some(6), "{}", pipeline.output());
    let output = pipeline.output();
    assert!(output.contains("made it anew") && output.contains("public.books"), "{output}");
    assert_eq!(store.documents("books").await["3"]["title"], "three");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_is_gone_after_a_stop_is_a_gap() {
    let rig = Rig::new().await;
    let config = copied(&rig).await;
    rig.sql(&format!("DELETE FROM books; SELECT pg_drop_replication_slot('{}')", rig.name)).await;
    let problem = gap(&mut rig.start(config), &["is gone"]).await;
    assert!(problem.hint.contains("`cdc.snapshot.resnapshot: true`"), "{}", problem.hint);
}

/// In a pause nobody streams: the slot is looked at all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_is_moved_or_dropped_in_a_pause_is_named_at_once() {
    for (what, word) in
        [("moved", "somebody else moved it"), ("anew", "made it anew"), ("dropped", "somebody dropped it")]
    {
        let rig = Rig::new().await;
        rig.sql(BOOKS).await;
        let mut engine = rig.run(rig.config(&["books"])).await;
        engine.control().send(Command::Pause).await.unwrap();
        phase(&engine, Phase::Paused).await;
        rig.sql("UPDATE books SET title = 'lost'").await;
        match what {
            "moved" => advance(&rig).await,
            "anew" => make_anew(&rig).await,
            _ => rig.sql(&format!("SELECT pg_drop_replication_slot('{}')", rig.name)).await,
        }
        gap(&mut engine, &[word]).await;
        assert!(!rig.documents("books")["1"]["title"].as_str().unwrap().contains("lost"));
    }
}

/// Between two looks of the monitor.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_is_moved_behind_the_monitor_is_seen_when_the_stream_begins_again() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    let mut config = rig.config(&["books"]);
    config.cdc.slot.activity_checker_interval = Duration::from_secs(3600);
    let mut engine = rig.run(config).await;
    wait_until("the monitor has seen that the stream runs", LIMIT, || async {
        engine.status().replication.active == Some(true)
    })
    .await;
    engine.control().send(Command::Pause).await.unwrap();
    phase(&engine, Phase::Paused).await;
    rig.sql("UPDATE books SET title = 'lost'").await;
    advance(&rig).await;
    engine.control().send(Command::Resume).await.unwrap();
    gap(&mut engine, &["somebody else moved it"]).await;
}

/// Without a copy there is no promise about rows of before, but changes that are lost are said.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_without_a_copy_remembers_its_slot_too() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    let mut config = rig.config(&["books"]);
    config.cdc.snapshot.mode = Mode::Never;
    let engine = rig.run(config.clone()).await;
    rig.sql("UPDATE books SET title = title || '!'").await;
    rig.equal("books").await;
    stop(engine).await;
    rig.sql("INSERT INTO books VALUES (3, 'lost')").await;
    advance(&rig).await;
    let problem = gap(&mut rig.start(config.clone()), &["somebody else moved it"]).await;
    rig.sql(&format!("SELECT pg_drop_replication_slot('{}')", rig.name)).await;
    gap(&mut rig.start(config.clone()), &["is gone"]).await;

    // What the hint offers, both ways.
    let forget = problem.hint.split(": ").last().unwrap();
    assert!(forget.starts_with("DELETE FROM public.cdc_snapshot_job"), "{}", problem.hint);
    rig.sql(forget).await;
    let engine = rig.run(config.clone()).await;
    assert!(!rig.documents("books").contains_key("3"));
    stop(engine).await;
    config.cdc.snapshot.mode = Mode::Initial;
    config.cdc.snapshot.resnapshot = true;
    let engine = rig.run(config).await;
    rig.equal("books").await;
    stop(engine).await;
}

/// The slot is never beyond what the ledger remembers, at no moment: whoever is killed then can tell.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_position_is_remembered_before_the_server_is_told() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    let engine = rig.run(rig.config(&["books"])).await;
    let watcher = rig.connect().await;
    let slot = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1";
    let ledger = "SELECT acknowledged_lsn FROM cdc_snapshot_job WHERE slot_name = $1";
    let read = async |sql: &str| -> Lsn {
        watcher.query_one(sql, &[&rig.name]).await.unwrap().get::<_, String>(0).parse().unwrap()
    };
    let first = read(slot).await;
    let (mut moved, mut last) = (0, first);
    let deadline = Instant::now() + LIMIT;
    while moved < 8 {
        rig.sql("UPDATE books SET title = title || '.' WHERE id = 1").await;
        let (told, remembered) = (read(slot).await, read(ledger).await);
        assert!(told <= remembered, "the slot is at {told}, and the ledger at {remembered}");
        moved += u32::from(told > last);
        last = told;
        assert!(Instant::now() < deadline, "the slot moved {moved} times only");
    }
    // To the byte, after a stop in order.
    stop(engine).await;
    assert_eq!(read(slot).await, read(ledger).await);
}

/// Remembering writes WAL, which moves the position, which is to be remembered: ever more rarely.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_pipeline_writes_less_and_less() {
    let server = own_server().await;
    let rig = Rig::on(&server).await;
    rig.sql(BOOKS).await;
    let engine = rig.run(rig.config(&["books"])).await;
    rig.sql("INSERT INTO books VALUES (3, 'the last change')").await;
    rig.equal("books").await;
    let sql = "SELECT acknowledged_lsn FROM cdc_snapshot_job";
    let (mut writes, mut last, began) = (0, rig.text(sql).await, Instant::now());
    // 0.25, 0.5, 1, 2, 4 seconds apart; each pause is a condition here, not a wait for one.
    while began.elapsed() < Duration::from_secs(8) {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let now = rig.text(sql).await;
        writes += u32::from(now != last);
        last = now;
    }
    assert!((1..=5).contains(&writes), "{writes} writes in 8 s without a change");
    // A change is acknowledged at once all the same.
    rig.sql("INSERT INTO books VALUES (4, 'one more')").await;
    let began = Instant::now();
    rig.equal("books").await;
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    stop(engine).await;
    server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_loses_its_wal_in_a_pause_is_named_at_once() {
    let server = own_server_with(&[("max_slot_wal_keep_size", "1MB"), ("min_wal_size", "32MB")]).await;
    let rig = Rig::on(&server).await;
    rig.sql(BOOKS).await;
    let mut engine = rig.run(rig.config(&["books"])).await;
    engine.control().send(Command::Pause).await.unwrap();
    phase(&engine, Phase::Paused).await;
    rig.sql("UPDATE books SET title = 'lost'").await;
    lose(&rig).await;
    let problem = gap(&mut engine, &["is lost", "max_slot_wal_keep_size"]).await;
    assert!(problem.hint.contains("pg_drop_replication_slot"), "{}", problem.hint);
    assert_eq!(engine.status().replication.wal_status.as_deref(), Some("lost"));
    // Not tried again for ever, and not by the next start either.
    gap(&mut rig.start(rig.config(&["books"])), &["is lost"]).await;
    server.stop().await.unwrap();
}

/// WAL comes and goes until the slot is lost.
async fn lose(rig: &Rig) {
    let status = format!("SELECT wal_status FROM pg_replication_slots WHERE slot_name = '{}'", rig.name);
    wait_until("the slot is lost", LIMIT, || async {
        rig.sql("SELECT pg_switch_wal()").await;
        rig.sql("CHECKPOINT").await;
        rig.text(&status).await == "lost"
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_loses_its_wal_during_the_copy_ends_it() {
    let server = own_server_with(&[("max_slot_wal_keep_size", "1MB"), ("min_wal_size", "32MB")]).await;
    let rig = Rig::on(&server).await;
    rig.sql(BOOKS).await;
    let config = rig.config(&["books"]);
    rig.hold(1);
    let mut engine = rig.start(config.clone());
    rig.until_held().await;
    rig.sql("UPDATE books SET title = 'lost'").await;
    lose(&rig).await;
    gap(&mut engine, &["is lost"]).await;
    rig.store.clear_faults();
    // As the hint says.
    rig.sql(&format!("SELECT pg_drop_replication_slot('{}')", rig.name)).await;
    let engine = rig.run(config).await;
    rig.equal("books").await;
    stop(engine).await;
    server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL 18: PGTIDE_PG_FETCH=18"]
async fn a_slot_that_was_idle_for_too_long_says_why_it_is_lost() {
    let server = own_server_with(&[("idle_replication_slot_timeout", "1s")]).await;
    let rig = Rig::on(&server).await;
    rig.sql(BOOKS).await;
    let mut engine = rig.run(rig.config(&["books"])).await;
    engine.control().send(Command::Pause).await.unwrap();
    phase(&engine, Phase::Paused).await;
    rig.sql("UPDATE books SET title = 'lost'").await;
    lose(&rig).await;
    gap(&mut engine, &["is lost", "idle_replication_slot_timeout"]).await;
    server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_server_that_answers_while_running_is_refused() {
    let rig = Rig::new().await;
    // Not a copy of a cluster, as the shared one is: another system identifier.
    let other = Server::start(Options::default()).await.unwrap();
    other.create_database(&rig.name).await.unwrap();
    let there = other.connect(&rig.name).await.unwrap();
    there
        .batch_execute("CREATE TABLE books (id int PRIMARY KEY, title text); INSERT INTO books VALUES (7, 'not ours')")
        .await
        .unwrap();
    rig.sql(BOOKS).await;
    let (config, proxy) = rig.config_by_proxy(&["books"]).await;
    let password = format!("ALTER USER postgres PASSWORD '{}'", config.cdc.password.0);
    there.batch_execute(&password).await.unwrap();
    let mut engine = rig.run(config).await;
    proxy.turn_to(other.port());
    rig.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
        .await;
    gap(&mut engine, &["another PostgreSQL server", "system identifier"]).await;
    assert_eq!(rig.documents("books").len(), 2);
    let made: i64 = there.query_one("SELECT count(*) FROM pg_replication_slots", &[]).await.unwrap().get(0);
    assert_eq!(made, 0, "it left something on the other server");
    other.stop().await.unwrap();
}

/// Primary, standby, and a pipeline that reaches whichever the proxy leads to.
struct Pair {
    primary: Server,
    standby: Server,
    rig: Rig,
    config: Config,
    proxy: support::proxy::Proxy,
}

impl Pair {
    /// The pipeline has copied, its slot may be on the standby.
    async fn new(slots: Slots) -> (Self, Engine) {
        let primary = own_server().await;
        let rig = Rig::on(&primary).await;
        rig.sql(BOOKS).await;
        let (mut config, proxy) = rig.config_by_proxy(&["books"]).await;
        config.cdc.slot.failover = slots == Slots::Synchronized;
        let engine = rig.run(config.clone()).await;
        let standby = standby::of(&primary, slots).await;
        (Self { primary, standby, rig, config, proxy }, engine)
    }

    /// The primary dies and the standby takes its place.
    async fn fail_over(&mut self) {
        self.primary.kill_hard().await.unwrap();
        standby::promote(&self.standby).await;
        self.rig.follow(&self.standby).await;
        self.proxy.turn_to(self.standby.port());
    }

    async fn end(self) {
        self.standby.stop().await.unwrap();
        self.primary.stop().await.unwrap();
    }
}

/// Whatever documents hold, the new primary has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_that_lost_nothing_is_followed() {
    let (mut pair, engine) = Pair::new(Slots::Copied).await;
    pair.rig.sql("INSERT INTO books VALUES (3, 'before'); UPDATE books SET title = 'changed' WHERE id = 1").await;
    pair.rig.equal("books").await;
    standby::caught_up(&pair.primary, &pair.standby).await;
    pair.fail_over().await;
    pair.rig.sql("INSERT INTO books VALUES (4, 'after'); DELETE FROM books WHERE id = 2").await;
    pair.rig.equal("books").await;
    phase(&engine, Phase::Streaming).await;
    let notices = engine.status().notices;
    assert!(notices.iter().any(|notice| notice.text.contains("was promoted: it is on timeline 2")), "{notices:?}");
    stop(engine).await;
    // The timeline is remembered: this start is as any other.
    let engine = pair.rig.run(pair.config.clone()).await;
    pair.rig.sql("INSERT INTO books VALUES (5, 'later')").await;
    pair.rig.equal("books").await;
    stop(engine).await;
    pair.end().await;
}

/// Documents hold what the standby never got.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_that_lost_what_documents_hold_is_a_gap() {
    let (mut pair, mut engine) = Pair::new(Slots::Copied).await;
    standby::caught_up(&pair.primary, &pair.standby).await;
    standby::cut_off(&pair.standby).await;
    // Further than what a promotion itself writes.
    pair.rig.sql("CREATE TABLE other ()").await;
    pair.rig.sql("SELECT pg_switch_wal()").await;
    pair.rig.sql("INSERT INTO books VALUES (3, 'never heard of')").await;
    pair.rig.equal("books").await;
    pair.fail_over().await;
    gap(&mut engine, &["on timeline 2", "documents hold changes up to", "never had"]).await;
    // The new primary is behind what documents hold: what the hint says ends in documents that equal rows, or in words.
    let mut again = pair.config.clone();
    again.cdc.snapshot.resnapshot = true;
    let mut engine = pair.rig.start(again.clone());
    let problem = ended(&mut engine).await.expect_err("later versions stay in silence");
    assert!(problem.message.contains("later version") && problem.hint.contains("Delete that index"), "{problem:?}");
    assert!(pair.rig.documents("books").contains_key("3"));
    // Until its positions have passed them.
    for _ in 0..3 {
        pair.rig.sql("SELECT pg_switch_wal()").await;
        pair.rig.sql("INSERT INTO books SELECT 100 + count(*) FROM books").await;
    }
    let engine = pair.rig.run(again).await;
    pair.rig.equal("books").await;
    stop(engine).await;
    pair.end().await;
}

/// A process that was not there cannot tell; the operator may.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_while_stopped_is_not_followed_unasked() {
    let (mut pair, engine) = Pair::new(Slots::Copied).await;
    stop(engine).await;
    standby::caught_up(&pair.primary, &pair.standby).await;
    pair.fail_over().await;
    pair.rig.sql("INSERT INTO books VALUES (3, 'after')").await;
    let problem = gap(&mut pair.rig.start(pair.config.clone()), &["on timeline 2", "did not run"]).await;
    assert!(problem.hint.contains("`cdc.slot.acceptTimeline: 2`"), "{}", problem.hint);
    // Another one than asked for.
    pair.config.cdc.slot.accept_timeline = Some(3);
    gap(&mut pair.rig.start(pair.config.clone()), &["on timeline 2"]).await;
    pair.config.cdc.slot.accept_timeline = Some(2);
    let engine = pair.rig.run(pair.config.clone()).await;
    pair.rig.equal("books").await;
    stop(engine).await;
    // Accepted once.
    pair.config.cdc.slot.accept_timeline = None;
    let engine = pair.rig.run(pair.config.clone()).await;
    pair.rig.sql("DELETE FROM books WHERE id = 2").await;
    pair.rig.equal("books").await;
    stop(engine).await;
    pair.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promotion_without_the_slot_is_a_gap() {
    let (mut pair, mut engine) = Pair::new(Slots::LeftOut).await;
    standby::caught_up(&pair.primary, &pair.standby).await;
    pair.fail_over().await;
    gap(&mut engine, &["is gone", "promoted to timeline 2", "`cdc.slot.failover`"]).await;
    let mut again = pair.config.clone();
    again.cdc.snapshot.resnapshot = true;
    let engine = pair.rig.run(again).await;
    pair.rig.equal("books").await;
    stop(engine).await;
    pair.end().await;
}

/// Rows that were copied before the promotion may be of transactions that it lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_a_promotion_cuts_short_begins_again() {
    let primary = own_server().await;
    let mut rig = Rig::on(&primary).await;
    rig.sql(BOOKS).await;
    rig.sql("INSERT INTO books SELECT n, rpad('x', 1000, 'y') FROM generate_series(3, 300) n; ANALYZE books").await;
    let standby = standby::of(&primary, Slots::LeftOut).await;
    standby::caught_up(&primary, &standby).await;
    standby::cut_off(&standby).await;
    rig.sql("DELETE FROM books WHERE id = 1; INSERT INTO books VALUES (0, 'never heard of')").await;
    let (mut config, proxy) = rig.config_by_proxy(&["books"]).await;
    config.cdc.snapshot.chunk_size = 20;
    config.elasticsearch.batch_size_limit = 10;
    rig.hold_after(20, 1);
    let engine = rig.start(config.clone());
    rig.until_held().await;
    let mut primary = primary;
    primary.kill_hard().await.unwrap();
    standby::promote(&standby).await;
    rig.follow(&standby).await;
    for _ in 0..3 {
        rig.sql("SELECT pg_switch_wal()").await;
        rig.sql("UPDATE books SET title = title WHERE id = 2").await;
    }
    proxy.turn_to(standby.port());
    rig.store.clear_faults();
    live(&engine).await;
    rig.equal("books").await;
    stop(engine).await;
    standby.stop().await.unwrap();
    primary.stop().await.unwrap();
}

/// All of PostgreSQL's own making: a failover slot that the standby synchronizes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "needs PostgreSQL 17 or newer: PGTIDE_PG_FETCH=17"]
async fn a_failover_slot_is_followed_to_the_standby() {
    let (mut pair, engine) = Pair::new(Slots::Synchronized).await;
    pair.rig.sql(&format!("ALTER SYSTEM SET synchronized_standby_slots = '{}'", standby::SLOT)).await;
    pair.rig.sql("SELECT pg_reload_conf()").await;
    pair.rig.sql("INSERT INTO books VALUES (3, 'before'); UPDATE books SET title = 'changed' WHERE id = 1").await;
    pair.rig.equal("books").await;
    let there = pair.standby.connect("postgres").await.unwrap();
    wait_until("the standby has the slot", LIMIT, || async {
        pair.rig.sql("UPDATE books SET title = title || '.' WHERE id = 1").await;
        let sql = "SELECT count(*) FROM pg_replication_slots WHERE slot_name = $1 AND synced AND NOT temporary";
        there.query_one(sql, &[&pair.rig.name]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    drop(there);
    pair.rig.sql("INSERT INTO books VALUES (6, 'at the last moment')").await;
    pair.rig.equal("books").await;
    pair.fail_over().await;
    pair.rig.sql("INSERT INTO books VALUES (4, 'after'); DELETE FROM books WHERE id = 2").await;
    pair.rig.equal("books").await;
    phase(&engine, Phase::Streaming).await;
    stop(engine).await;
    pair.end().await;
}

/// `failover` makes such a slot where PostgreSQL knows them, of one that is there already too, and is refused elsewhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failover_slots_need_a_server_that_has_them() {
    let server = own_server().await;
    let rig = Rig::on(&server).await;
    let mut config = copied(&rig).await;
    config.cdc.slot.failover = true;
    if server.installation().major() < 17 {
        let problem = ended(&mut rig.start(config)).await.expect_err("there are no failover slots");
        assert_eq!(problem.kind, ProblemKind::Setup);
        assert!(problem.message.contains("has no failover slots"), "{problem:?}");
        server.stop().await.unwrap();
        return;
    }
    let engine = rig.run(config.clone()).await;
    let failover = "SELECT count(*) FROM pg_replication_slots WHERE failover";
    assert_eq!(rig.count(failover).await, 1, "the slot of before was not made one");
    let notices = engine.status().notices;
    assert!(notices.iter().any(|notice| notice.text.contains("synchronized_standby_slots")), "{notices:?}");
    stop(engine).await;
    rig.sql(&format!("SELECT pg_drop_replication_slot('{}')", rig.name)).await;
    config.cdc.snapshot.resnapshot = true;
    stop(rig.run(config).await).await;
    assert_eq!(rig.count(failover).await, 1, "a new slot is none");
    server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_standby_is_no_source() {
    let primary = own_server().await;
    let rig = Rig::on(&primary).await;
    rig.sql(BOOKS).await;
    let standby = standby::of(&primary, Slots::LeftOut).await;
    standby::caught_up(&primary, &standby).await;
    let mut config = rig.config(&["books"]);
    config.cdc.port = standby.port();
    for mode in [Mode::Initial, Mode::Never, Mode::SnapshotOnly] {
        config.cdc.snapshot.mode = mode;
        let problem = ended(&mut rig.start(config.clone())).await.expect_err("nothing can be written there");
        assert_eq!((problem.kind, problem.transient), (ProblemKind::Setup, false), "{mode:?}: {problem:?}");
        assert!(problem.message.contains("is a standby") && problem.hint.contains("primary"), "{mode:?}: {problem:?}");
    }
    standby.stop().await.unwrap();
    primary.stop().await.unwrap();
}

/// What go-pq-cdc-elasticsearch leaves: its tables with its columns only, publication and slot, and documents whose
/// versions Elasticsearch has counted itself.
async fn reference(rig: &Rig, completed: bool) {
    rig.sql(
        "CREATE TABLE cdc_snapshot_job (slot_name TEXT PRIMARY KEY, snapshot_id TEXT NOT NULL, snapshot_lsn TEXT NOT NULL,
             started_at TIMESTAMP NOT NULL, completed BOOLEAN DEFAULT FALSE, total_chunks INT NOT NULL DEFAULT 0,
             completed_chunks INT NOT NULL DEFAULT 0);
         CREATE TABLE cdc_snapshot_chunks (id SERIAL PRIMARY KEY, slot_name TEXT NOT NULL, table_schema TEXT NOT NULL,
             table_name TEXT NOT NULL, chunk_index INT NOT NULL, chunk_start BIGINT NOT NULL, chunk_size BIGINT NOT NULL,
             range_start BIGINT, range_end BIGINT, block_start BIGINT, block_end BIGINT,
             is_last_chunk BOOLEAN NOT NULL DEFAULT FALSE, partition_strategy TEXT NOT NULL DEFAULT 'offset',
             status TEXT NOT NULL DEFAULT 'pending', claimed_by TEXT, claimed_at TIMESTAMP, heartbeat_at TIMESTAMP,
             completed_at TIMESTAMP, rows_processed BIGINT DEFAULT 0,
             UNIQUE (slot_name, table_schema, table_name, chunk_index));
         CREATE INDEX idx_chunks_claim ON cdc_snapshot_chunks (slot_name, status, claimed_at)
             WHERE status IN ('pending', 'in_progress');
         CREATE INDEX idx_chunks_status ON cdc_snapshot_chunks (slot_name, status);
         CREATE TABLE books (id int PRIMARY KEY, title text);
         INSERT INTO books SELECT n, 'row ' || n FROM generate_series(1, 20) n",
    )
    .await;
    let name = &rig.name;
    rig.sql(&format!("CREATE PUBLICATION {name} FOR TABLE books")).await;
    rig.sql(&format!("SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')")).await;
    let (done, second, rows) = if completed { (2, "completed", 10) } else { (1, "in_progress", 0) };
    rig.sql(&format!(
        "INSERT INTO cdc_snapshot_job VALUES
             ('{name}', '00000003-0000001B-1', pg_current_wal_lsn()::text, now() AT TIME ZONE 'UTC', {completed}, 2, {done});
         INSERT INTO cdc_snapshot_chunks (slot_name, table_schema, table_name, chunk_index, chunk_start, chunk_size,
             range_start, range_end, is_last_chunk, partition_strategy, status, claimed_by, claimed_at, heartbeat_at, rows_processed)
         VALUES ('{name}', 'public', 'books', 0, 0, 10, 1, 10, FALSE, 'integer_range', 'completed', 'host-1', now(), now(), 10),
                ('{name}', 'public', 'books', 1, 10, 10, 11, 20, TRUE, 'integer_range', '{second}', 'host-1', now(), now(), {rows})"
    ))
    .await;
    // Written again and again: versions 1 to 3.
    let last = if completed { 20 } else { 13 };
    for id in (1..=last).chain(1..=7).chain(1..=3) {
        index(rig, id, &format!("row {id}")).await;
    }
    assert_eq!((rig.version("books", "1"), rig.version("books", "5"), rig.version("books", "9")), (3, 2, 1));
    // Since then nobody streamed.
    rig.sql(
        "UPDATE books SET title = 'changed' WHERE id IN (1, 12); DELETE FROM books WHERE id IN (2, 11, 20);
         INSERT INTO books VALUES (21, 'new'); UPDATE books SET id = 30 WHERE id = 3",
    )
    .await;
}

async fn index(rig: &Rig, id: i32, title: &str) {
    let action = json!({"index": {"_index": "books", "_id": id.to_string()}});
    let body = format!("{action}\n{}\n", json!({"id": id, "title": title}));
    let url = format!("{}/_bulk", rig.store.url().trim_end_matches('/'));
    let answer = http().post(url).header("content-type", "application/x-ndjson").body(body).send().await.unwrap();
    let answer = answer.text().await.unwrap();
    assert!(answer.contains("\"errors\":false"), "{answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completed_job_of_the_reference_is_streamed_on() {
    let rig = Rig::new().await;
    reference(&rig, true).await;
    let engine = rig.run(rig.config(&["books"])).await;
    rig.equal("books").await;
    // Nothing was copied: documents without a change are as they were.
    let status = engine.status();
    assert_eq!((rig.version("books", "5"), rig.version("books", "9")), (2, 1));
    assert_eq!((status.tables[0].rows_copied, status.sink.superseded, status.sink.rejected), (0, 0, 0));
    let said = |text: &str| status.notices.iter().any(|notice| notice.text.contains(text));
    assert!(said("made by another program (go-pq-cdc-elasticsearch)") && said("taken over"), "{:?}", status.notices);
    rig.sql("UPDATE books SET title = 'later' WHERE id IN (5, 9); DELETE FROM books WHERE id = 6").await;
    rig.equal("books").await;
    stop(engine).await;
    // From now on the slot is remembered.
    rig.sql("DELETE FROM books WHERE id = 7").await;
    advance(&rig).await;
    gap(&mut rig.start(rig.config(&["books"])), &["somebody else moved it"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_half_done_job_of_the_reference_is_begun_again() {
    let rig = Rig::new().await;
    reference(&rig, false).await;
    // Whose row was gone before the slot was made.
    index(&rig, 99, "stale").await;
    let engine = rig.run(rig.config(&["books"])).await;
    rig.equal("books").await;
    let status = engine.status();
    assert_eq!(status.tables[0].rows_copied, 18);
    let said = |text: &str| status.notices.iter().any(|notice| notice.text.contains(text));
    assert!(
        said("starts from its beginning") && said("another program (go-pq-cdc-elasticsearch)"),
        "{:?}",
        status.notices
    );
    rig.sql("UPDATE books SET title = 'later' WHERE id IN (5, 9); DELETE FROM books WHERE id = 6").await;
    rig.equal("books").await;
    stop(engine).await;
}
