//! A resnapshot that the operator gives up.

use pgtide::engine::{Command, Phase, TableState};
use pgtide::store::{Effect, Fault};

use super::support::pipeline::{LIMIT, Rig, stop};
use super::support::wait_until;
use super::{BOOKS, again, done, noticed, plant, rig_with_books, table};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_leaves_the_documents_valid() {
    let rig = Rig::new().await;
    let engine = rig_with_books(&rig, 50, 10).await;
    let control = engine.control();
    assert!(control.send(Command::CancelResnapshot(table("books"))).await.is_err(), "there is none to give up");
    plant(&rig, "books", &[("left over", 1)]).await;
    rig.hold(1);
    again(&engine, "books").await;
    rig.until_held().await;
    rig.sql("DELETE FROM books WHERE id = 30; UPDATE books SET title = 'changed' WHERE id = 1").await;
    control.send(Command::CancelResnapshot(table("books"))).await.unwrap();
    rig.store.clear_faults();
    done(&engine).await;
    assert!(noticed(&engine, "given up by the operator"), "{:?}", engine.status().notices);
    rig.delivered().await;
    let mut documents = rig.documents("books");
    assert!(documents.remove("left over").is_some(), "a copy that was given up removed documents");
    let row = |document: &serde_json::Value| document["title"].as_str().unwrap().to_owned();
    assert_eq!((documents.len(), row(&documents["1"])), (49, "changed".into()));
    assert_eq!(rig.count("SELECT count(*) FROM cdc_snapshot_chunks WHERE status <> 'completed'").await, 0);
    rig.nobody_idles_in_a_transaction().await;
    // It can be asked for again.
    again(&engine, "books").await;
    done(&engine).await;
    rig.equal("books").await;
    stop(engine).await;
}

/// A copied row that is on its way while it is deleted, and a copy that is given up before its end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_brings_no_deleted_row_back() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    rig.sql("INSERT INTO books SELECT n, 'x' FROM generate_series(1, 9) n").await;
    let engine = rig.run(rig.config(&["books"])).await;
    rig.hold(1);
    again(&engine, "books").await;
    rig.until_held().await;
    rig.sql("DELETE FROM books WHERE id > 5; UPDATE books SET title = 'y' WHERE id = 1").await;
    rig.delivered().await;
    // A minute later, or after a restart of its node, Elasticsearch does not know of the deletes any more.
    rig.store.forget_tombstones();
    engine.control().send(Command::CancelResnapshot(table("books"))).await.unwrap();
    assert!(engine.status().tables[0].resnapshot, "it ends once what is on its way has arrived");
    rig.store.clear_faults();
    done(&engine).await;
    assert!(noticed(&engine, "given up"), "{:?}", engine.status().notices);
    rig.equal("books").await;
    stop(engine).await;
}

/// Between two attempts it can be given up as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_it_is_tried_again() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    rig.sql("INSERT INTO books SELECT n, 'x' FROM generate_series(1, 9) n").await;
    let server = rig.config(&["books"]).cdc.port;
    let (config, proxy) = rig.config_by_proxy(&["books"]).await;
    let engine = rig.run(config).await;
    // No session is made from now on; those that are there stay.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    proxy.turn_to(nobody);
    again(&engine, "books").await;
    let retries = || async { engine.status().tables[0].attempts >= 2 };
    wait_until("it is tried again", LIMIT, retries).await;
    assert_eq!(engine.status().tables[0].state, TableState::Retrying);
    engine.control().send(Command::CancelResnapshot(table("books"))).await.unwrap();
    done(&engine).await;
    assert_eq!(rig.count("SELECT count(*) FROM cdc_snapshot_chunks WHERE status <> 'completed'").await, 0);
    assert!(engine.control().send(Command::CancelResnapshot(table("books"))).await.is_err());
    proxy.turn_to(server);
    again(&engine, "books").await;
    done(&engine).await;
    rig.equal("books").await;
    stop(engine).await;
}

/// What was on its way when a copy was cut short may arrive after that was given up, and nobody deletes once more what is
/// deleted by then: it is not called live.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_it_was_cut_short() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    rig.sql("INSERT INTO books SELECT n, 'x' FROM generate_series(1, 9) n").await;
    let engine = rig.run(rig.config(&["books"])).await;
    rig.hold(1);
    again(&engine, "books").await;
    rig.until_held().await;
    rig.sql("DELETE FROM books WHERE id > 5").await;
    rig.delivered().await;
    rig.store.forget_tombstones();
    let control = engine.control();
    // Connected again it waits, and has not begun once more.
    control.send(Command::PauseTable(table("books"))).await.unwrap();
    let ledger = "FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'pgtide ledger %'";
    assert_eq!(rig.count(&format!("SELECT count(pg_terminate_backend(pid)) {ledger}")).await, 1);
    wait_until("it is connected again", LIMIT, || async {
        let status = engine.status();
        status.replication.reconnects > 0 && status.phase == Phase::Streaming && status.tables[0].resnapshot
    })
    .await;
    control.send(Command::CancelResnapshot(table("books"))).await.unwrap();
    rig.store.clear_faults();
    wait_until("it is given up", LIMIT, || async { !engine.status().tables[0].resnapshot }).await;
    let books = engine.status().tables[0].clone();
    assert_eq!(books.state, TableState::Failed);
    let problem = books.problem.unwrap();
    assert!(problem.message.contains("cut short") && problem.hint.contains("Copy it again"), "{problem:?}");
    again(&engine, "books").await;
    done(&engine).await;
    rig.equal("books").await;
    stop(engine).await;
}

/// Nothing of it is in the ledger once it was answered with yes, though a copy of another table goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_another_table_is_copied() {
    let rig = Rig::new().await;
    for name in ["a", "b"] {
        rig.sql(&format!("CREATE TABLE {name} (id int PRIMARY KEY, title text)")).await;
        rig.sql(&format!("INSERT INTO {name} SELECT n, 'x' FROM generate_series(1, 50) n")).await;
    }
    let mut config = rig.config(&["a", "b"]);
    config.cdc.snapshot.workers = Some(1);
    config.elasticsearch.batch_size_limit = 10;
    let engine = rig.run(config).await;
    rig.hold(1);
    again(&engine, "a").await;
    rig.until_held().await;
    again(&engine, "b").await;
    let copy = "FROM pg_stat_activity WHERE application_name IN ('pgtide copy', 'pgtide snapshot keeper') AND datname = current_database()";
    assert!(rig.count(&format!("SELECT count(pg_terminate_backend(pid)) {copy}")).await > 0);
    wait_until("no copy of a is left", LIMIT, || async { rig.count(&format!("SELECT count(*) {copy}")).await == 0 })
        .await;
    rig.store.clear_faults();
    // Not one bulk of b is answered.
    rig.store.inject(Fault::new(Effect::Hold { applied: false }));
    let left = "SELECT count(*) FROM cdc_snapshot_chunks WHERE table_name = 'a' AND status <> 'completed'";
    wait_until("b is copied, and a is tried again", LIMIT, || async {
        let tables = engine.status().tables;
        tables[0].state == TableState::Retrying && tables[1].state == TableState::Copying
    })
    .await;
    assert!(rig.count(left).await > 0);
    engine.control().send(Command::CancelResnapshot(table("a"))).await.unwrap();
    assert_eq!(rig.count(left).await, 0);
    rig.store.clear_faults();
    done(&engine).await;
    stop(engine).await;
}

/// Of a table of few chunks nothing is left then. It is none that came new into the configuration.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn before_its_first_chunk_is_done() {
    let rig = Rig::new().await;
    let engine = rig_with_books(&rig, 50, 10).await;
    rig.hold(1);
    again(&engine, "books").await;
    rig.until_held().await;
    engine.control().send(Command::CancelResnapshot(table("books"))).await.unwrap();
    rig.store.clear_faults();
    done(&engine).await;
    assert_eq!(rig.count("SELECT count(*) FROM cdc_snapshot_chunks").await, 0);
    stop(engine).await;
    let engine = rig.run(rig.config(&["books"])).await;
    assert!(!noticed(&engine, "new in the configuration"), "{:?}", engine.status().notices);
    assert!(!engine.status().tables[0].resnapshot);
    rig.equal("books").await;
    stop(engine).await;
}
