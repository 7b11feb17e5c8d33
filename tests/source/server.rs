//! Another server answers, or this one was promoted.

use crate::support::pipeline::{LIMIT, Rig, ended, live, phase, stop};
use crate::support::proxy::Proxy;
use crate::support::standby::{self, Slots};
use crate::support::{own_server, wait_until};
use crate::{BOOKS, copied, gap};
use pgtide::config::{Config, Mode};
use pgtide::demo::{Options, Server};
use pgtide::engine::{Engine, Phase};
use pgtide::problem::ProblemKind;

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
    proxy: Proxy,
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

    /// A start with this configuration streams, and brings what is changed then.
    async fn streams(&self, config: &Config, sql: &str) {
        let engine = self.rig.run(config.clone()).await;
        self.rig.sql(sql).await;
        self.rig.equal("books").await;
        stop(engine).await;
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
    pair.streams(&pair.config, "INSERT INTO books VALUES (5, 'later')").await;
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
    pair.streams(&again, "").await;
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
    pair.streams(&pair.config, "").await;
    // Accepted once.
    pair.config.cdc.slot.accept_timeline = None;
    pair.streams(&pair.config, "DELETE FROM books WHERE id = 2").await;
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
    pair.streams(&again, "").await;
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
