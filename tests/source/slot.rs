//! A slot that was moved, made anew, dropped or lost; what is remembered of it, and how often.

use std::time::{Duration, Instant};

use crate::support::pipeline::{LIMIT, Rig, phase, stop};
use crate::support::process::{Pipeline, Settings, StoreProcess, wait_confirmed};
use crate::support::{fresh_database, own_server, own_server_with, wait_until};
use crate::{BOOKS, advance, copied, gap};
use pgtide::config::{Config, Mode};
use pgtide::engine::{Command, Phase};
use pgtide::lsn::Lsn;

async fn make_anew(rig: &Rig) {
    rig.sql(&format!(
        "SELECT pg_drop_replication_slot('{0}'); SELECT pg_create_logical_replication_slot('{0}', 'pgoutput')",
        rig.name
    ))
    .await;
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
