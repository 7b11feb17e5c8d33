//! Pauses that last: the copy lets go of its snapshot, and goes on under a new one.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use pgtide::config::Config;
use pgtide::engine::{Command, Engine, Phase, TableState};
use pgtide::store::{Effect, Fault};
use pgtide::table::TableId;
use support::pipeline::{LIMIT, Rig, live, stop};
use support::wait_until;

fn id(name: &str) -> TableId {
    TableId::new("public", name)
}

/// A table of 500 rows in chunks of some 10, and a pause that soon counts as long.
async fn rig(tables: &[&str]) -> (Rig, Config) {
    let rig = Rig::new().await;
    for name in tables {
        rig.sql(&format!("CREATE TABLE {name} (id int PRIMARY KEY, title text)")).await;
        let rows = "SELECT n, rpad('x', 1000, 'y') FROM generate_series(1, 500) n";
        rig.sql(&format!("INSERT INTO {name} {rows}; ANALYZE {name}")).await;
    }
    let mut config = rig.config(tables);
    config.cdc.snapshot.chunk_size = 10;
    config.cdc.snapshot.workers = Some(2);
    config.cdc.snapshot.release_after = Duration::from_millis(500);
    config.elasticsearch.batch_size_limit = 10;
    (rig, config)
}

async fn rows(engine: &Engine, table: usize, at_least: u64) {
    wait_until("rows are copied", LIMIT, || async { engine.status().tables[table].rows_done >= at_least }).await;
}

async fn released(rig: &Rig, engine: &Engine) {
    wait_until("the snapshot is let go", LIMIT, || async { engine.status().snapshot.held_seconds.is_none() }).await;
    rig.nobody_idles_in_a_transaction().await;
    let locks = "SELECT count(*) FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
                 WHERE c.relname IN ('a', 'b') AND l.mode = 'AccessShareLock' AND l.pid <> pg_backend_pid()";
    wait_until("no table is locked", LIMIT, || async { rig.count(locks).await == 0 }).await;
}

/// What each chunk was when it was completed, by its number.
async fn completed(rig: &Rig) -> Vec<(i32, String)> {
    let sql = "SELECT id, completed_at::text FROM cdc_snapshot_chunks WHERE status = 'completed' ORDER BY id";
    rig.client.query(sql, &[]).await.unwrap().iter().map(|row| (row.get(0), row.get(1))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_pause_lets_the_snapshot_of_the_copy_go() {
    let (rig, config) = rig(&["a"]).await;
    rig.store.inject(Fault::new(Effect::Delay { milliseconds: 20 }));
    let engine = rig.start(config);
    rows(&engine, 0, 50).await;
    engine.control().send(Command::Pause).await.unwrap();
    released(&rig, &engine).await;
    let status = engine.status();
    assert_eq!((status.phase, &status.problem), (Phase::Paused, &None));
    assert!(status.notices.iter().any(|notice| notice.text.contains("the pause has lasted 500ms")), "{status:?}");
    assert!(status.tables[0].rows_done < 500, "the copy ended before the pause");
    let done = completed(&rig).await;
    // What the copy has not reached yet is changed, and what it has; rows move to the table's end.
    rig.sql("UPDATE a SET title = 'in the pause' WHERE id % 7 = 0; DELETE FROM a WHERE id % 11 = 0").await;
    rig.sql("INSERT INTO a SELECT n, 'new' FROM generate_series(1000, 1010) n").await;
    rig.store.clear_faults();
    engine.control().send(Command::Resume).await.unwrap();
    live(&engine).await;
    rig.equal("a").await;
    let after = completed(&rig).await;
    assert!(!done.is_empty() && done.iter().all(|chunk| after.contains(chunk)), "what was done was done again");
    assert_eq!(engine.status().replication.reconnects, 0, "no connection was lost");
    stop(engine).await;
}

/// The pause begins in the last chunk: when the snapshot is let go there is nothing left to copy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_pause_in_the_last_chunk_ends() {
    let (rig, mut config) = rig(&["a"]).await;
    config.cdc.snapshot.chunk_size = 10_000;
    config.elasticsearch.batch_size_limit = 10_000;
    rig.hold(1);
    let engine = rig.start(config);
    rig.until_held().await;
    engine.control().send(Command::Pause).await.unwrap();
    rig.store.clear_faults();
    released(&rig, &engine).await;
    assert_eq!(completed(&rig).await.len(), 1);
    engine.control().send(Command::Resume).await.unwrap();
    live(&engine).await;
    rig.equal("a").await;
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_that_are_held_for_long_let_the_snapshot_go() {
    let (rig, config) = rig(&["a", "b"]).await;
    rig.store.inject(Fault::new(Effect::Delay { milliseconds: 20 }));
    let engine = rig.start(config);
    rows(&engine, 0, 50).await;
    engine.control().send(Command::PauseTable(id("b"))).await.unwrap();
    rig.store.clear_faults();
    rows(&engine, 0, 500).await;
    released(&rig, &engine).await;
    assert_eq!((engine.status().phase, engine.status().tables[1].state), (Phase::Snapshot, TableState::Paused));
    rig.sql("UPDATE a SET title = 'meanwhile' WHERE id < 10; UPDATE b SET title = 'meanwhile' WHERE id < 10").await;
    engine.control().send(Command::ResumeTable(id("b"))).await.unwrap();
    live(&engine).await;
    rig.equal("a").await;
    rig.equal("b").await;
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_pause_lets_the_snapshot_of_a_resnapshot_go() {
    let (rig, config) = rig(&["a"]).await;
    let engine = rig.run(config).await;
    rig.store.inject(Fault::new(Effect::Delay { milliseconds: 20 }));
    engine.control().send(Command::Resnapshot(id("a"))).await.unwrap();
    wait_until("a snapshot is held", LIMIT, || async { engine.status().snapshot.held_seconds.is_some() }).await;
    engine.control().send(Command::Pause).await.unwrap();
    released(&rig, &engine).await;
    assert!(engine.status().tables[0].resnapshot, "it is still wanted");
    rig.sql("DELETE FROM a WHERE id % 3 = 0").await;
    rig.store.clear_faults();
    engine.control().send(Command::Resume).await.unwrap();
    wait_until("it is copied again", LIMIT, || async {
        let table = &engine.status().tables[0];
        !table.resnapshot && table.state == TableState::Live && table.resnapshots_ended == 1
    })
    .await;
    rig.equal("a").await;
    stop(engine).await;
}

/// One table that is held keeps no other one from being copied, and what is held is its copy: the next one is not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_held_resnapshot_lets_another_one_pass() {
    let (rig, mut config) = rig(&["a", "b"]).await;
    config.cdc.snapshot.release_after = Duration::from_secs(3600);
    let engine = rig.run(config).await;
    let control = engine.control();
    let ended = async |table: usize, times: u64| {
        wait_until("it is copied again", LIMIT, || async {
            let table = &engine.status().tables[table];
            !table.resnapshot && table.state == TableState::Live && table.resnapshots_ended == times
        })
        .await;
    };
    rig.store.inject(Fault::new(Effect::Delay { milliseconds: 20 }));
    control.send(Command::Resnapshot(id("a"))).await.unwrap();
    wait_until("it runs", LIMIT, || async { engine.status().tables[0].state == TableState::Copying }).await;
    control.send(Command::PauseTable(id("a"))).await.unwrap();
    control.send(Command::Resnapshot(id("b"))).await.unwrap();
    rig.store.clear_faults();
    ended(1, 1).await;
    let held = engine.status().tables.remove(0);
    assert_eq!((held.state, held.resnapshot), (TableState::Paused, true));
    rig.sql("UPDATE a SET title = 'meanwhile' WHERE id % 7 = 0; DELETE FROM a WHERE id % 11 = 0").await;
    control.send(Command::ResumeTable(id("a"))).await.unwrap();
    ended(0, 1).await;
    // The hold of one that waits ends with it.
    control.send(Command::Resnapshot(id("b"))).await.unwrap();
    control.send(Command::Resnapshot(id("a"))).await.unwrap();
    control.send(Command::PauseTable(id("a"))).await.unwrap();
    ended(1, 2).await;
    assert_eq!(engine.status().tables[0].state, TableState::Paused, "it waits, and is held");
    control.send(Command::CancelResnapshot(id("a"))).await.unwrap();
    ended(0, 2).await;
    control.send(Command::Resnapshot(id("a"))).await.unwrap();
    ended(0, 3).await;
    rig.equal("a").await;
    rig.equal("b").await;
    stop(engine).await;
}
