//! What is acknowledged and when, and what survives refusals, lost connections and a pause.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test fails by panicking, and says what it took")]

mod support;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pgtide::engine::{Command, Engine, Phase, TableState};
use pgtide::store::{Effect, Fault};
use pgtide::table::TableId;
use support::pipeline::{LIMIT, Rig, live, metric, phase, stop};
use support::process::{Pipeline, Settings};
use support::wire::{Way, Wire};
use support::{own_server, wait_until};

const BOOKS: &str = "CREATE TABLE books (id int PRIMARY KEY, title text); CREATE TABLE noise (id serial PRIMARY KEY)";

/// Tables `books`, which goes to an index, and `noise`, which is published only.
async fn rig_with_books(rig: &Rig) -> Engine {
    rig.sql(BOOKS).await;
    let mut config = rig.config(&["books", "noise"]);
    config.elasticsearch.table_index_mapping.retain(|table, _| table.name == "books");
    rig.run(config).await
}

/// Waits until PostgreSQL has taken two more status updates of the pipeline's walsender: what the pipeline was willing
/// to acknowledge at the call has arrived then.
async fn two_updates(rig: &Rig) {
    let sql = "SELECT coalesce(max(reply_time)::text, 'none yet') FROM pg_stat_replication r JOIN pg_stat_activity a USING (pid)
               WHERE a.datname = current_database()";
    for _ in 0..2 {
        let last = rig.text(sql).await;
        wait_until("a status update comes", LIMIT, || async { rig.text(sql).await != last }).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_acknowledged_before_its_answer() {
    let rig = Rig::new().await;
    let engine = rig_with_books(&rig).await;
    rig.sql("INSERT INTO books VALUES (1, 'one')").await;
    rig.delivered().await;

    rig.hold(1);
    rig.sql("INSERT INTO books VALUES (2, 'held')").await;
    rig.until_held().await;
    let behind = rig.position().await;
    // Later changes are answered for: those of other lanes, and those that go nowhere.
    for n in 3..30 {
        rig.sql(&format!("INSERT INTO books VALUES ({n}, 'later'); INSERT INTO noise DEFAULT VALUES")).await;
    }
    let received = rig.position().await;
    wait_until("later documents are there", LIMIT, || async { rig.documents("books").len() > 10 }).await;
    wait_until("everything is received", LIMIT, || async {
        engine.status().replication.received_lsn.is_some_and(|at| at >= received)
    })
    .await;
    two_updates(&rig).await;
    let confirmed = rig.confirmed().await;
    assert!(confirmed < behind, "{confirmed} passes the held change before {behind}");
    assert!(!rig.documents("books").contains_key("2"));
    let status = engine.status();
    assert!(status.replication.lag_seconds.unwrap() > 0.0 && status.replication.lag_bytes.unwrap() > 0);
    assert_eq!(metric(&status, "pgtide_in_flight_requests", ""), 1.0);

    rig.store.clear_faults();
    rig.equal("books").await;
    assert!(confirmed <= rig.position_of("books", "2"), "its commit record was acknowledged");
    assert!(rig.confirmed().await >= received);
    stop(engine).await;
}

/// A table is live when the changes of before the start are answered for, and not when they are received.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn live_is_said_only_after_the_backlog() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    stop(rig.run(rig.config(&["books"])).await).await;
    rig.sql("INSERT INTO books VALUES (1, 'while it was down')").await;
    rig.hold(1);
    let engine = rig.start(rig.config(&["books"]));
    rig.until_held().await;
    two_updates(&rig).await;
    let status = engine.status();
    assert_eq!((status.phase, status.tables[0].state), (Phase::CatchUp, TableState::CatchUp));
    rig.store.clear_faults();
    live(&engine).await;
    rig.equal_now("books").await;
    assert_eq!(engine.status().tables[0].state, TableState::Live);
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals_are_waited_out() {
    let rig = Rig::new().await;
    let engine = rig_with_books(&rig).await;
    rig.sql("INSERT INTO books SELECT n, 'first' FROM generate_series(1, 50) n").await;
    rig.equal("books").await;

    rig.store.inject(Fault::new(Effect::Reject { status: 503, kind: None }));
    rig.sql("UPDATE books SET title = 'while it refuses' WHERE id = 1").await;
    rig.sql("INSERT INTO books SELECT n, 'while it refuses' FROM generate_series(51, 300) n").await;
    rig.sql("DELETE FROM books WHERE id BETWEEN 10 AND 20; INSERT INTO noise DEFAULT VALUES").await;
    phase(&engine, Phase::Degraded).await;
    let status = engine.status();
    let problem = status.problem.as_ref().unwrap();
    assert!(problem.transient && problem.message.contains("503") && !problem.hint.is_empty(), "{problem:?}");
    two_updates(&rig).await;
    let confirmed = rig.confirmed().await;
    assert_eq!(rig.documents("books").len(), 50);
    rig.store.clear_faults();
    rig.equal("books").await;
    assert!(confirmed <= rig.position_of("books", "1"), "a refused change was acknowledged");
    phase(&engine, Phase::Streaming).await;
    let status = engine.status();
    assert_eq!((status.sink.rejected, status.sink.trouble.as_ref()), (0, None));
    assert!(metric(&status, "pgtide_retried_total", "") > 0.0);
    stop(engine).await;
}

/// Each kind of failure that leaves open what was applied, many times in a row.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn half_done_bulks_are_done_again() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    rig.sql("INSERT INTO books SELECT n, 'copied' FROM generate_series(1, 300) n").await;
    let mut config = rig.config(&["books"]);
    config.elasticsearch.batch_size_limit = 20;
    let busy = |every| Effect::RejectItems { status: 429, kind: None, every, ids: HashSet::new() };
    rig.store.inject(Fault::new(busy(3)).times(4));
    rig.store.inject(Fault::new(Effect::Reject { status: 429, kind: None }).times(2));
    rig.store.inject(Fault::new(Effect::Cut { bytes: 30 }).times(2));
    rig.store.inject(Fault::new(Effect::ApplyThenFail { status: Some(502) }).times(2));
    let engine = rig.run(config).await;
    rig.equal_now("books").await;
    assert_eq!(engine.status().tables[0].rows_done, 300);

    rig.store.inject(Fault::new(busy(2)).times(5));
    rig.store.inject(Fault::new(Effect::ApplyThenFail { status: None }).times(3));
    rig.store.inject(Fault::new(Effect::Cut { bytes: 0 }).times(2));
    rig.store.inject(Fault::new(Effect::Cut { bytes: 200 }).times(2));
    for n in 0..20 {
        let (a, b, c) = (n * 10, n * 10 + 3, 400 + n);
        rig.sql(&format!(
            "UPDATE books SET title = 'changed {n}' WHERE id BETWEEN {a} AND {b};
             DELETE FROM books WHERE id = {b}; INSERT INTO books VALUES ({c}, 'new'), ({b}, 'again');
             UPDATE books SET id = -id WHERE id = {c}"
        ))
        .await;
    }
    rig.equal("books").await;
    let status = engine.status();
    assert_eq!(status.sink.rejected, 0);
    assert!(status.sink.retried > 0);
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_really_stops() {
    let rig = Rig::new().await;
    let engine = rig_with_books(&rig).await;
    let control = engine.control();
    assert!(control.send(Command::Resume).await.is_err());
    // Only what is written after a look at the slot has a time.
    wait_until("the slot was looked at", LIMIT, || async { engine.status().replication.current_lsn.is_some() }).await;
    // Asked for is not done: the bulk that is on its way comes home first.
    rig.hold(1);
    rig.sql("INSERT INTO books VALUES (1, 'on its way')").await;
    rig.until_held().await;
    control.send(Command::Pause).await.unwrap();
    two_updates(&rig).await;
    assert_eq!(engine.status().phase, Phase::Pausing);
    rig.store.clear_faults();
    phase(&engine, Phase::Paused).await;
    assert!(rig.documents("books").contains_key("1"));
    let requests = rig.store.stats().requests;

    rig.sql("INSERT INTO books SELECT n, 'held' FROM generate_series(2, 100) n; UPDATE books SET title = 'x'").await;
    let committed = rig.position().await;
    // Nobody writes to a reader that does not read: the server could not even end that.
    let senders =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'walsender'";
    assert_eq!(rig.count(senders).await, 0);
    wait_until("the status says so, and how far behind it is", LIMIT, || async {
        let replication = engine.status().replication;
        replication.active == Some(false)
            && replication.lag_bytes > Some(0)
            && replication.lag_seconds.is_some_and(|seconds| seconds > 0.5)
    })
    .await;
    assert_eq!(rig.store.stats().requests, requests, "a request was sent in a pause");
    assert!(rig.confirmed().await < committed);
    let status = engine.status();
    assert_eq!((status.phase, status.tables[0].inserts), (Phase::Paused, 1));
    assert_eq!(metric(&status, "pgtide_phase", "paused"), 1.0);

    control.send(Command::Resume).await.unwrap();
    rig.equal("books").await;
    assert_eq!(rig.documents("books").len(), 100);
    phase(&engine, Phase::Streaming).await;
    // Paused, it can still be stopped.
    control.send(Command::Pause).await.unwrap();
    phase(&engine, Phase::Paused).await;
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_stops_the_copy() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    rig.sql("INSERT INTO books SELECT n, rpad('x', 1000, 'y') FROM generate_series(1, 500) n; ANALYZE books").await;
    let mut config = rig.config(&["books"]);
    config.cdc.snapshot.chunk_size = 20;
    config.elasticsearch.batch_size_limit = 10;
    rig.hold(1);
    let engine = rig.start(config);
    rig.until_held().await;
    engine.control().send(Command::Pause).await.unwrap();
    assert_eq!(engine.status().phase, Phase::Pausing);
    rig.store.clear_faults();
    phase(&engine, Phase::Paused).await;
    let (done, requests) = (engine.status().tables[0].rows_done, rig.store.stats().requests);
    assert!(done < 500, "the copy ended in a pause");
    rig.sql("UPDATE books SET title = 'in the pause' WHERE id % 100 = 0").await;
    assert_eq!((engine.status().tables[0].rows_done, rig.store.stats().requests), (done, requests));
    engine.control().send(Command::Resume).await.unwrap();
    live(&engine).await;
    rig.equal("books").await;
    assert_eq!(engine.status().tables[0].rows_done, 500);
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_copy_of_one_table_may_be_held() {
    let rig = Rig::new().await;
    for name in ["a", "b"] {
        rig.sql(&format!("CREATE TABLE {name} (id int PRIMARY KEY); INSERT INTO {name} SELECT generate_series(1, 25)"))
            .await;
    }
    let mut config = rig.config(&["a", "b"]);
    config.cdc.snapshot.workers = Some(1);
    // Were it not held, b's first rows would go with a's last ones.
    config.elasticsearch.batch_size_limit = 10;
    rig.hold(1);
    let engine = rig.start(config);
    rig.until_held().await;
    let (control, b) = (engine.control(), TableId::new("public", "b"));
    control.send(Command::PauseTable(b.clone())).await.unwrap();
    rig.store.clear_faults();
    wait_until("the other table is copied", LIMIT, || async { engine.status().tables[0].rows_done == 25 }).await;
    assert!(rig.documents("b").is_empty());
    let status = engine.status();
    assert_eq!((status.phase, status.tables[1].state), (Phase::Snapshot, TableState::Paused));
    control.send(Command::ResumeTable(b)).await.unwrap();
    live(&engine).await;
    rig.equal_now("a").await;
    rig.equal_now("b").await;
    stop(engine).await;
}

/// Paused is said only when the answers are there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_waits_for_the_bulks_of_the_copy() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    rig.sql("INSERT INTO books SELECT n, 'x' FROM generate_series(1, 500) n").await;
    let mut config = rig.config(&["books"]);
    config.cdc.snapshot.workers = Some(1);
    config.elasticsearch.batch_size_limit = 10;
    rig.store.inject(Fault::new(Effect::Delay { milliseconds: 300 }));
    let engine = rig.start(config);
    wait_until("a bulk was answered", LIMIT, || async { engine.status().tables[0].rows_done > 0 }).await;
    engine.control().send(Command::Pause).await.unwrap();
    phase(&engine, Phase::Paused).await;
    let status = engine.status();
    assert_eq!((status.sink.in_flight, status.sink.queued_documents), (0, 0));
    assert_eq!(status.tables[0].rows_done, rig.documents("books").len() as u64);
    rig.store.clear_faults();
    engine.control().send(Command::Resume).await.unwrap();
    live(&engine).await;
    rig.equal("books").await;
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_walsender_is_replaced() {
    let rig = Rig::new().await;
    let engine = rig_with_books(&rig).await;
    let end = format!(
        "SELECT count(pg_terminate_backend(active_pid)) FROM pg_replication_slots WHERE active AND slot_name = '{}'",
        rig.name
    );
    for round in 0..3 {
        // Changes that are on their way, and some that are not answered for.
        rig.hold(1);
        rig.sql(&format!("INSERT INTO books SELECT n, 'x' FROM generate_series({round} * 100, {round} * 100 + 49) n"))
            .await;
        rig.until_held().await;
        wait_until("a walsender is ended", LIMIT, || async { rig.count(&end).await == 1 }).await;
        rig.sql(&format!(
            "UPDATE books SET title = 'round {round}' WHERE id % 7 = 0; DELETE FROM books WHERE id % 31 = 0"
        ))
        .await;
        rig.store.clear_faults();
        rig.equal("books").await;
        phase(&engine, Phase::Streaming).await;
    }
    let status = engine.status();
    assert!(status.replication.reconnects >= 3, "{}", status.replication.reconnects);
    assert_eq!(metric(&status, "pgtide_reconnects_total", ""), f64::from(status.replication.reconnects));
    stop(engine).await;
}

/// What was received and given up without an answer is received again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_sides_may_fail_at_once() {
    let rig = Rig::new().await;
    let engine = rig_with_books(&rig).await;
    rig.store.inject(Fault::new(Effect::Reject { status: 503, kind: None }));
    rig.sql("INSERT INTO books SELECT n, 'refused' FROM generate_series(1, 50) n").await;
    phase(&engine, Phase::Degraded).await;
    let end = format!(
        "SELECT count(pg_terminate_backend(active_pid)) FROM pg_replication_slots WHERE slot_name = '{}'",
        rig.name
    );
    assert_eq!(rig.count(&end).await, 1);
    // It waits some seconds for the answers before it gives them up.
    wait_until("it has connected again", LIMIT, || async { engine.status().replication.reconnects > 0 }).await;
    assert!(rig.documents("books").is_empty());
    rig.store.clear_faults();
    rig.equal("books").await;
    assert_eq!(rig.documents("books").len(), 50);
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgresql_may_crash_in_the_stream() {
    let mut server = own_server().await;
    let mut rig = Rig::on(&server).await;
    let engine = rig_with_books(&rig).await;
    rig.sql("INSERT INTO books SELECT n, 'before' FROM generate_series(1, 100) n").await;
    rig.equal("books").await;
    rig.hold(1);
    rig.sql("UPDATE books SET title = 'not answered for' WHERE id <= 50; DELETE FROM books WHERE id = 60").await;
    rig.until_held().await;
    server.kill_hard().await.unwrap();
    rig.store.clear_faults();
    phase(&engine, Phase::Degraded).await;
    // A pause asked for meanwhile is no phase, and can be taken back.
    assert!(!engine.status().pause_requested);
    engine.control().send(Command::Pause).await.unwrap();
    assert!(engine.status().pause_requested);
    engine.control().send(Command::Resume).await.unwrap();
    assert!(!engine.status().pause_requested);
    server.restart().await.unwrap();
    rig.client = rig.connect().await;
    rig.sql("INSERT INTO books VALUES (101, 'after'); UPDATE books SET title = 'after' WHERE id = 1").await;
    rig.equal("books").await;
    phase(&engine, Phase::Streaming).await;
    assert_eq!(engine.status().problem, None);
    stop(engine).await;
    server.stop().await.unwrap();
}

/// Commits wait for pgtide, which is everybody's synchronous standby. What its ledger writes waits for nobody: least of all for
/// what is acknowledged behind it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ledger_waits_for_no_standby() {
    let server = own_server().await;
    let rig = Rig::on(&server).await;
    let engine = rig_with_books(&rig).await;
    rig.sql("ALTER SYSTEM SET synchronous_standby_names = '*'").await;
    rig.sql("SELECT pg_reload_conf()").await;
    let standby = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'";
    wait_until("it is the synchronous standby", LIMIT, || async { rig.count(standby).await == 1 }).await;
    let insert = rig.sql("SET synchronous_commit = on; INSERT INTO books VALUES (1, 'one')");
    tokio::time::timeout(LIMIT, insert).await.expect("a commit hangs");
    let control = engine.control();
    let asked = control.send(Command::Resnapshot(TableId::new("public", "books")));
    tokio::time::timeout(LIMIT, asked).await.expect("the wish waits for a standby").unwrap();
    let copied = || engine.status().notices.iter().any(|notice| notice.text.contains("copied again"));
    wait_until("it is copied again", LIMIT, || async { copied() }).await;
    tokio::time::timeout(LIMIT, rig.sql("INSERT INTO books VALUES (2, 'two')")).await.expect("a commit hangs");
    rig.equal("books").await;
    stop(engine).await;
    server.stop().await.unwrap();
}

/// In the middle of the copy every session ends. What was answered for stays done; the rest comes under a new snapshot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgresql_may_crash_in_the_copy() {
    let mut server = own_server().await;
    let mut rig = Rig::on(&server).await;
    rig.sql(BOOKS).await;
    rig.sql("INSERT INTO books SELECT n, rpad('x', 1000, 'y') FROM generate_series(1, 500) n; ANALYZE books").await;
    let mut config = rig.config(&["books"]);
    config.cdc.snapshot.chunk_size = 20;
    config.elasticsearch.batch_size_limit = 10;
    // Some chunks are done, one is on its way.
    config.cdc.snapshot.workers = Some(2);
    let done = "SELECT count(*) FROM cdc_snapshot_chunks WHERE status = 'completed'";
    rig.hold(1);
    let engine = rig.start(config);
    rig.until_held().await;
    wait_until("a chunk is done", LIMIT, || async { rig.count(done).await > 0 }).await;
    server.kill_hard().await.unwrap();
    rig.store.clear_faults();
    server.restart().await.unwrap();
    rig.client = rig.connect().await;
    rig.sql("UPDATE books SET title = 'after' WHERE id % 3 = 0; DELETE FROM books WHERE id % 50 = 0").await;
    rig.sql("INSERT INTO books SELECT n, 'after' FROM generate_series(601, 620) n").await;
    live(&engine).await;
    rig.equal("books").await;
    assert_eq!(rig.count("SELECT count(*) FROM cdc_snapshot_chunks WHERE status <> 'completed'").await, 0);
    let job = "SELECT count(*) FROM cdc_snapshot_job WHERE completed AND completed_chunks = total_chunks";
    assert_eq!(rig.count(job).await, 1);
    stop(engine).await;
    server.stop().await.unwrap();
}

/// Each way to fail, one after the other, while rows change: nothing is lost, each ends without help, and what waits does so in
/// PostgreSQL, not in memory.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_storm_under_load_passes_in_bounded_memory() {
    const MIB: u64 = 1 << 20;
    let rig = Rig::new().await;
    // Rows of 1.8 kB that are written whole at each change.
    rig.sql(
        "CREATE TABLE items (id int PRIMARY KEY, n int, body text); ALTER TABLE items ALTER body SET STORAGE PLAIN;
         INSERT INTO items SELECT n, 0, repeat(md5(n::text), 56) FROM generate_series(1, 4000) n",
    )
    .await;
    let wire = Wire::to(&rig.store.url()).await;
    let settings =
        Settings { name: rig.name.clone(), tables: vec!["items"], chunk_size: 500, batch_size_limit: 500, workers: 2 };
    let mut pipeline = Pipeline::to(&rig.config(&["items"]).cdc, &wire.url(), &settings);
    let some_items = Effect::RejectItems { status: 429, kind: None, every: 3, ids: HashSet::new() };
    rig.store.inject(Fault::new(some_items.clone()).times(10));
    pipeline.start();
    pipeline.wait("it is live", LIMIT, |status| status.phase == Phase::Streaming).await;
    let before_storms = pipeline.highest_resident();

    let calm = Arc::new(AtomicBool::new(false));
    let (client, ends) = (rig.connect().await, Arc::clone(&calm));
    let changes = tokio::spawn(async move {
        while !ends.load(Ordering::Relaxed) {
            let id = fastrand::u32(1..3800);
            let sql = format!(
                "DELETE FROM items WHERE id BETWEEN {id} AND {id} + 3; UPDATE items SET n = n + 1 WHERE id BETWEEN {id} AND {id} + 150;
                 INSERT INTO items VALUES ({id}, 0, repeat('anew', 450)) ON CONFLICT (id) DO UPDATE SET n = 0"
            );
            client.batch_execute(&sql).await.unwrap();
        }
    });
    let storms = [
        ("429 for some items", Some(some_items), Way::Open),
        ("no request is served", Some(Effect::Reject { status: 503, kind: None }), Way::Open),
        ("applied, and 500", Some(Effect::ApplyThenFail { status: Some(500) }), Way::Open),
        ("applied, and no answer", Some(Effect::ApplyThenFail { status: None }), Way::Open),
        ("cut in the middle of the answer", Some(Effect::Cut { bytes: 150 }), Way::Open),
        ("late answers", Some(Effect::Delay { milliseconds: 300 }), Way::Open),
        ("no connection lasts", None, Way::Cut),
        ("answers byte by byte", None, Way::Drip),
    ];
    for (name, effect, way) in storms {
        let served = matches!(effect, Some(Effect::Delay { .. })) || way == Way::Drip;
        let (before, began) = (pipeline.status().await.unwrap().sink, rig.position().await);
        wire.turn(way);
        if let Some(effect) = effect {
            rig.store.inject(Fault::new(effect));
        }
        // As much changes meanwhile as it may take in memory, all storms together.
        wait_until(name, LIMIT, || async { rig.position().await.0 - began.0 > 8 * MIB }).await;
        pipeline
            .wait(name, LIMIT, |status| {
                status.sink.retried > before.retried || served && status.sink.documents > before.documents + 100
            })
            .await;
        wire.turn(Way::Open);
        rig.store.clear_faults();
        let documents = pipeline.status().await.unwrap().sink.documents;
        pipeline.wait(&format!("{name} is over"), LIMIT, |status| status.sink.documents > documents + 1000).await;
    }
    calm.store(true, Ordering::Relaxed);
    changes.await.expect("the changes failed");
    rig.equal("items").await;
    let taken = pipeline.highest_resident() - before_storms;
    println!("{} MiB before, {} MiB more", before_storms / MIB, taken / MIB);
    assert!(taken < 40 * MIB, "{} MiB more in the storms", taken / MIB);
    pipeline.assert_nothing_rejected();
    pipeline.kill();
}
