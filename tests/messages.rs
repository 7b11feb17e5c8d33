//! What else a stream may bring: two-phase transactions, foreign origins, messages of applications, types of one's own.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use pgtide::engine::Phase;
use support::pipeline::{LIMIT, Rig, live, stop};
use support::wait_until;

const BOOKS: &str = "CREATE TABLE books (id int PRIMARY KEY, title text)";

/// A prepared transaction comes when it is committed, whatever happened in between, and not at all when it is rolled back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_prepared_transaction_counts_when_it_is_committed() {
    let server = support::own_server_with(&[("max_prepared_transactions", "10")]).await;
    let rig = Rig::on(&server).await;
    rig.sql(BOOKS).await;
    rig.sql("INSERT INTO books SELECT n, 'row ' || n FROM generate_series(1, 10) n").await;
    // One that is open when the slot is made: the slot waits for it, and the screen says where to look.
    rig.sql("BEGIN; UPDATE books SET title = 'before' WHERE id = 1; PREPARE TRANSACTION 'zero'").await;
    let engine = rig.start(rig.config(&["books"]));
    wait_until("the operator is told what the slot waits for", LIMIT, || async {
        engine.status().notices.iter().any(|notice| notice.text.contains("pg_prepared_xacts"))
    })
    .await;
    assert_eq!(engine.status().phase, Phase::Snapshot);
    rig.sql("COMMIT PREPARED 'zero'").await;
    live(&engine).await;
    rig.equal_now("books").await;

    rig.sql(
        "BEGIN; UPDATE books SET title = 'one' WHERE id = 2; DELETE FROM books WHERE id = 3; PREPARE TRANSACTION 'one'",
    )
    .await;
    rig.sql("BEGIN; UPDATE books SET title = 'two' WHERE id = 4; PREPARE TRANSACTION 'two'").await;
    rig.sql("UPDATE books SET title = 'in between' WHERE id = 5").await;
    rig.delivered().await;
    assert_eq!(rig.documents("books")["2"]["title"], "row 2", "prepared is not committed");
    rig.equal_now("books").await;
    let confirmed = rig.confirmed().await;
    stop(engine).await;
    // Committed while nobody streams, and behind a later one: the slot kept it.
    rig.sql("COMMIT PREPARED 'one'").await;
    rig.sql("ROLLBACK PREPARED 'two'").await;
    let engine = rig.run(rig.config(&["books"])).await;
    rig.equal("books").await;
    assert_eq!(rig.documents("books")["2"]["title"], "one");
    assert!(rig.confirmed().await > confirmed);
    stop(engine).await;
    server.stop().await.unwrap();
}

/// Messages of `pg_logical_emit_message`, in and outside a transaction, are no changes and hold nothing up. Nor do
/// transactions that were replicated from elsewhere differ from local ones.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_and_origins_change_nothing() {
    let rig = Rig::new().await;
    rig.sql("CREATE TYPE mood AS ENUM ('sad', 'glad'); CREATE TYPE pair AS (a int, b text)").await;
    rig.sql("CREATE DOMAIN positive AS int CHECK (value > 0)").await;
    rig.sql("CREATE TABLE people (id int PRIMARY KEY, mood mood, pair pair, age positive)").await;
    let engine = rig.run(rig.config(&["people"])).await;
    rig.sql("INSERT INTO people VALUES (1, 'sad', '(1,x)', 7)").await;
    rig.sql("SELECT pg_logical_emit_message(false, 'somebody', 'not for us')").await;
    rig.sql(
        "BEGIN; INSERT INTO people VALUES (2, 'glad', NULL, 8); SELECT pg_logical_emit_message(true, 'a', repeat('x', 100000));
         UPDATE people SET age = 9 WHERE id = 2; COMMIT",
    )
    .await;
    // A transaction of messages alone.
    rig.sql("SELECT pg_logical_emit_message(true, 'b', 'nothing else')").await;
    rig.sql(&format!("SELECT pg_replication_origin_create('{}')", rig.name)).await;
    rig.sql(&format!("SELECT pg_replication_origin_session_setup('{}')", rig.name)).await;
    rig.sql("BEGIN; SELECT pg_replication_origin_xact_setup('0/1234', now()); INSERT INTO people VALUES (3, 'sad', '(2,)', 1); COMMIT")
        .await;
    rig.sql("SELECT pg_replication_origin_session_reset()").await;
    rig.delivered().await;
    let documents = rig.documents("people");
    assert_eq!(documents.keys().collect::<Vec<_>>(), ["1", "2", "3"]);
    assert_eq!(documents["2"]["age"], 9);
    let status = engine.status();
    assert_eq!((status.phase, status.sink.rejected), (Phase::Streaming, 0));
    rig.sql(&format!("SELECT pg_replication_origin_drop('{}')", rig.name)).await;
    stop(engine).await;
}
