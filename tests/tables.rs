//! Tables that come into the configuration, and leave it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use futures_util::FutureExt;
use pgtide::config::{Config, Mode, Table};
use pgtide::engine::{Command, Engine, Phase, TableState};
use pgtide::table::TableId;
use support::pipeline::{LIMIT, Rig, ended, live, stop};
use support::wait_until;

async fn rig(tables: &[&str]) -> Rig {
    let rig = Rig::new().await;
    for name in tables {
        rig.sql(&format!("CREATE TABLE {name} (id int PRIMARY KEY, title text)")).await;
        rig.sql(&format!("INSERT INTO {name} SELECT n, '{name} ' || n FROM generate_series(1, 30) n")).await;
    }
    rig
}

fn noticed(engine: &Engine, text: &str) -> bool {
    engine.status().notices.iter().any(|notice| notice.text.contains(text))
}

/// How often the documents of an index were written.
async fn copies(rig: &Rig, table: &str) -> Vec<String> {
    let sql = "SELECT completed_at::text FROM cdc_snapshot_chunks WHERE table_name = $1 ORDER BY id";
    rig.client.query(sql, &[&table]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_added_is_copied_and_no_other() {
    let rig = rig(&["a", "b"]).await;
    let engine = rig.run(rig.config(&["a"])).await;
    stop(engine).await;
    let before = copies(&rig, "a").await;
    rig.sql("DELETE FROM b WHERE id = 1; UPDATE b SET title = 'changed' WHERE id = 2; DELETE FROM a WHERE id = 3")
        .await;
    let engine = rig.run(rig.config(&["a", "b"])).await;
    assert!(noticed(&engine, "public.b: added to publication"), "{:?}", engine.status().notices);
    assert!(noticed(&engine, "public.b: new in the configuration"), "{:?}", engine.status().notices);
    assert!(!noticed(&engine, "public.a: copied again"), "{:?}", engine.status().notices);
    rig.equal("a").await;
    rig.equal("b").await;
    rig.sql("UPDATE b SET title = 'streamed' WHERE id = 5; DELETE FROM b WHERE id = 6").await;
    rig.equal("b").await;
    assert_eq!(copies(&rig, "a").await, before, "a was not copied again");
    stop(engine).await;
    // Once is enough.
    let before = copies(&rig, "b").await;
    let engine = rig.run(rig.config(&["a", "b"])).await;
    assert_eq!(copies(&rig, "b").await, before);
    rig.equal("b").await;
    stop(engine).await;
}

/// Given up, it would leave a part of the documents under a table that is shown live.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_first_copy_of_an_added_table_is_not_given_up() {
    let rig = rig(&["a", "b"]).await;
    stop(rig.run(rig.config(&["a"])).await).await;
    let mut config = rig.config(&["a", "b"]);
    config.elasticsearch.batch_size_limit = 10;
    let b = TableId::new("public", "b");
    // The second start goes by what the ledger says.
    for _ in 0..2 {
        rig.hold_after(1, 1);
        let engine = rig.start(config.clone());
        rig.until_held().await;
        wait_until("it is a first copy", LIMIT, || async { engine.status().tables[1].first_copy }).await;
        let refusal = engine.control().send(Command::CancelResnapshot(b.clone())).await.unwrap_err();
        assert!(refusal.contains("never been copied to its end"), "{refusal}");
        stop(engine).await;
        rig.store.clear_faults();
    }
    let engine = rig.run(config).await;
    rig.equal("b").await;
    assert!(!engine.status().tables[1].first_copy);
    rig.hold(1);
    engine.control().send(Command::Resnapshot(b.clone())).await.unwrap();
    rig.until_held().await;
    engine.control().send(Command::CancelResnapshot(b)).await.unwrap();
    rig.store.clear_faults();
    wait_until("it is given up", LIMIT, || async {
        let table = &engine.status().tables[1];
        !table.resnapshot && table.state == TableState::Live
    })
    .await;
    rig.equal("b").await;
    stop(engine).await;
}

/// What fails for good is said, and is not called live; the next start tries it again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_fails_for_good() {
    let rig = rig(&["a", "b"]).await;
    stop(rig.run(rig.config(&["a"])).await).await;
    let mut config = rig.config(&["a", "b"]);
    config.cdc.snapshot.query_condition = Some("1 / (id - 7) < 5".to_owned());
    let engine = rig.start(config);
    wait_until("it has failed", LIMIT, || async { engine.status().tables[1].state == TableState::Failed }).await;
    rig.sql("UPDATE a SET title = 'streamed'").await;
    rig.equal("a").await;
    let status = engine.status();
    let problem = status.tables[1].problem.clone().expect("it says why");
    assert!(problem.message.contains("division by zero"), "{problem:?}");
    assert_eq!((status.phase, status.tables[0].state), (Phase::Streaming, TableState::Live));
    assert_eq!((status.tables[1].state, status.tables[1].resnapshot), (TableState::Failed, false));
    assert!(engine.live().now_or_never().is_none(), "it is live without documents of b");
    stop(engine).await;
    let engine = rig.start(rig.config(&["a", "b"]));
    live(&engine).await;
    rig.equal("b").await;
    stop(engine).await;
}

/// What somebody has to set up first is waited for, and keeps no other table waiting.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_waits_until_its_table_is_published() {
    let rig = rig(&["a", "b"]).await;
    let engine = rig.run(rig.config(&["a", "b"])).await;
    rig.sql(&format!("ALTER PUBLICATION {} DROP TABLE b", rig.name)).await;
    rig.sql("DELETE FROM b WHERE id < 10").await;
    engine.control().send(Command::Resnapshot(TableId::new("public", "b"))).await.unwrap();
    let waits = || async {
        let table = &engine.status().tables[1];
        let reason = table.problem.as_ref().is_some_and(|problem| problem.message.contains("does not publish table"));
        reason && table.state == TableState::Retrying && table.attempts > 2
    };
    wait_until("it is tried again and again", LIMIT, waits).await;
    engine.control().send(Command::Resnapshot(TableId::new("public", "a"))).await.unwrap();
    wait_until("the other one is copied", LIMIT, || async { noticed(&engine, "public.a: copied again") }).await;
    rig.sql(&format!("ALTER PUBLICATION {} ADD TABLE b", rig.name)).await;
    wait_until("it is copied", LIMIT, || async { noticed(&engine, "public.b: copied again") }).await;
    rig.equal("b").await;
    live(&engine).await;
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_taken_out_keeps_its_index_and_is_copied_when_it_comes_back() {
    let rig = rig(&["a", "b"]).await;
    stop(rig.run(rig.config(&["a", "b"])).await).await;
    let left = rig.documents("b");
    let engine = rig.run(rig.config(&["a"])).await;
    assert!(noticed(&engine, "public.b: no longer configured; its index is left as it is"), "{:?}", engine.status());
    rig.sql("DELETE FROM b WHERE id < 10; UPDATE b SET title = 'nobody hears'; INSERT INTO a VALUES (100, 'x')").await;
    rig.equal("a").await;
    assert_eq!(rig.documents("b"), left);
    stop(engine).await;
    let engine = rig.run(rig.config(&["a", "b"])).await;
    rig.equal("a").await;
    rig.equal("b").await;
    stop(engine).await;
}

/// What was changed while the publication left a table out does not come by the stream.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_the_publication_lost_is_copied_again() {
    let rig = rig(&["a", "b"]).await;
    stop(rig.run(rig.config(&["a", "b"])).await).await;
    rig.sql(&format!("ALTER PUBLICATION {} DROP TABLE b", rig.name)).await;
    rig.sql("DELETE FROM b WHERE id < 10; UPDATE b SET title = 'nobody hears' WHERE id > 20").await;
    let before = copies(&rig, "a").await;
    let engine = rig.run(rig.config(&["a", "b"])).await;
    rig.equal("b").await;
    rig.equal("a").await;
    assert_eq!(copies(&rig, "a").await, before, "a was not copied again");
    stop(engine).await;
}

/// Without `createIfNotExists` the publication is the operator's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_publication_of_an_operator_is_left_alone() {
    let rig = rig(&["a", "b"]).await;
    stop(rig.run(rig.config(&["a"])).await).await;
    let mut config = rig.config(&["a", "b"]);
    config.cdc.publication.create_if_not_exists = false;
    let mut engine = rig.start(config);
    wait_until("it is refused", LIMIT, || async { engine.status().phase == Phase::Failed }).await;
    let problem = engine.status().problem.unwrap();
    assert!(problem.message.contains("does not publish table public.b"), "{problem:?}");
    assert!(ended(&mut engine).await.is_err());
}

fn once(rig: &Rig, tables: &[&str]) -> Config {
    let mut config = rig.config(tables);
    config.cdc.snapshot.mode = Mode::SnapshotOnly;
    let list = tables.iter().map(|name| Table::new(TableId::new("public", *name)));
    config.cdc.snapshot.tables = list.collect();
    config
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_is_added_to_a_copy_that_is_done() {
    let rig = rig(&["a", "b"]).await;
    let mut engine = rig.start(once(&rig, &["a"]));
    ended(&mut engine).await.unwrap();
    let (before, documents) = (copies(&rig, "a").await, rig.documents("a"));
    rig.sql("UPDATE a SET title = 'not copied again'").await;
    // Ended in the middle, changed, and begun again: one table is of one snapshot.
    rig.sql("TRUNCATE b; INSERT INTO b SELECT n, rpad('x', 1000, 'y') FROM generate_series(1, 200) n; ANALYZE b").await;
    rig.sql(&format!("CREATE PUBLICATION {} FOR ALL TABLES", rig.name)).await;
    let mut config = once(&rig, &["a", "b"]);
    config.cdc.snapshot.workers = Some(1);
    config.cdc.snapshot.chunk_size = 10;
    config.elasticsearch.batch_size_limit = 10;
    rig.hold_after(6, 1);
    let engine = rig.start(config);
    rig.until_held().await;
    stop(engine).await;
    rig.store.clear_faults();
    assert!(rig.documents("b").len() > 10);
    rig.sql("DELETE FROM b WHERE id < 4; UPDATE b SET title = 'meanwhile' WHERE id > 150").await;
    let mut engine = rig.start(once(&rig, &["a", "b"]));
    ended(&mut engine).await.unwrap();
    rig.equal_now("b").await;
    assert_eq!((copies(&rig, "a").await, rig.documents("a")), (before, documents));
    let mut engine = rig.start(once(&rig, &["a", "b"]));
    ended(&mut engine).await.unwrap();
}
