//! A table copied again while the stream goes on.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod given_up;
#[path = "../support/mod.rs"]
mod support;

use std::fmt::Write as _;

use pgtide::demo::{Workload, WorkloadOptions, seed};
use pgtide::engine::{Command, Engine, Phase, TableState};
use pgtide::sink::{Body, Sink, SinkOptions, Target};
use pgtide::store::{Effect, Fault};
use pgtide::table::TableId;
use support::pipeline::{LIMIT, Rig, live, phase, stop};
use support::wait_until;
use tokio_util::sync::CancellationToken;

fn table(name: &str) -> TableId {
    TableId::new("public", name)
}

async fn again(engine: &Engine, name: &str) {
    engine.control().send(Command::Resnapshot(table(name))).await.unwrap();
}

/// Waits until no resnapshot runs or is wanted.
async fn done(engine: &Engine) {
    wait_until("the resnapshot has ended", LIMIT, || async {
        engine.status().tables.iter().all(|table| !table.resnapshot && table.state == TableState::Live)
    })
    .await;
}

/// The newest notices hold this text.
fn noticed(engine: &Engine, text: &str) -> bool {
    engine.status().notices.iter().any(|notice| notice.text.contains(text))
}

/// Writes documents past the pipeline, as if they had been left behind.
async fn plant(rig: &Rig, index: &str, documents: &[(&str, u64)]) {
    let client = pgtide::sink::Client::new(&rig.config(&[index]).elasticsearch).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let sink = Sink::new(client, SinkOptions::new(1, folder.path().join("none")));
    let (target, mut body) = (Target::new(index, 0), Body::default());
    for (id, version) in documents {
        body.index(&target, id.as_bytes(), *version, |out| out.extend_from_slice(b"{\"stale\":true}"));
    }
    let delivered = sink.deliver(body, &CancellationToken::new()).await.unwrap();
    assert_eq!(delivered.ok, documents.len() as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_workload_changes_the_tables() {
    let rig = Rig::new().await;
    seed(&rig.client, 3_000, |_, _| {}).await.unwrap();
    let mut config = rig.config(&["users", "books"]);
    config.cdc.snapshot.chunk_size = 200;
    config.elasticsearch.batch_size_limit = 100;
    let engine = rig.run(config).await;
    let workload = Workload::start(rig.socket_config(), WorkloadOptions { rate: 800, seed: Some(7) });
    wait_until("the workload works", LIMIT, || async { workload.stats().changes() > 50 }).await;
    // Copies take their time, so that changes fall into every part of them.
    rig.store.inject(Fault::new(Effect::Delay { milliseconds: 20 }));
    for round in 0..2 {
        let before = workload.stats();
        again(&engine, "users").await;
        again(&engine, "books").await;
        assert!(
            engine.control().send(Command::Resnapshot(table("users"))).await.is_err(),
            "it runs or is wanted already"
        );
        wait_until("rows were deleted in the meantime", LIMIT, || async {
            workload.stats().deleted > before.deleted + 10
        })
        .await;
        done(&engine).await;
        assert!(noticed(&engine, "public.users: copied again"), "round {round}: {:?}", engine.status().notices);
        assert!(noticed(&engine, "public.books: copied again"), "round {round}: {:?}", engine.status().notices);
    }
    rig.store.clear_faults();
    let stats = workload.stop().await;
    assert_eq!(stats.failures, 0);
    rig.equal("users").await;
    rig.equal("books").await;
    let open = "SELECT count(*) FROM cdc_snapshot_chunks WHERE status <> 'completed'";
    assert_eq!(rig.count(open).await, 0);
    let status = engine.status();
    assert_eq!((status.phase, status.sink.rejected), (Phase::Streaming, 0));
    assert!(status.tables.iter().all(|table| table.problem.is_none() && table.chunks.done() == table.chunks.len()));
    // Three copies, of about as many rows each.
    assert!(status.tables.iter().all(|table| table.rows_copied > 2 * table.rows_done), "{:?}", status.tables);
    assert!(status.tables.iter().all(|table| table.resnapshots_ended == 2), "{:?}", status.tables);
    assert_eq!(status.snapshot.held_seconds, None);
    let temporary = "SELECT count(*) FROM pg_replication_slots WHERE temporary AND database = current_database()";
    wait_until("temporary slots are gone", LIMIT, || async { rig.count(temporary).await == 0 }).await;
    rig.nobody_idles_in_a_transaction().await;
    stop(engine).await;
}

const BOOKS: &str = "CREATE TABLE books (id int PRIMARY KEY, title text)";

async fn rig_with_books(rig: &Rig, rows: i32, documents: usize) -> Engine {
    rig.sql(BOOKS).await;
    rig.sql(&format!("INSERT INTO books SELECT n, 'Book ' || n FROM generate_series(1, {rows}) n")).await;
    let mut config = rig.config(&["books"]);
    config.cdc.snapshot.workers = Some(1);
    config.elasticsearch.batch_size_limit = documents;
    rig.run(config).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn documents_without_a_row_are_removed() {
    let rig = Rig::new().await;
    let engine = rig_with_books(&rig, 5, 1_000).await;
    plant(&rig, "books", &[("left over", 1), ("\"odd\\\n", 2), ("6", 3)]).await;
    assert_eq!(rig.documents("books").len(), 8);
    again(&engine, "books").await;
    done(&engine).await;
    rig.equal_now("books").await;
    assert!(noticed(&engine, "3 documents removed"), "{:?}", engine.status().notices);
    // The index lacks a row: the copy brings it back.
    rig.sql("INSERT INTO books VALUES (6, 'six')").await;
    rig.equal("books").await;
    stop(engine).await;
}

/// A deleted row that is on its way in the copy's bulk would come back once the store forgets that it was deleted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_deleted_while_its_copy_is_on_its_way_stays_deleted() {
    let rig = Rig::new().await;
    let engine = rig_with_books(&rig, 20, 1_000).await;
    // Nothing streams at this moment: the bulk that is held is the copy's, with all its rows.
    rig.hold(1);
    again(&engine, "books").await;
    rig.until_held().await;
    rig.sql("DELETE FROM books WHERE id <= 3; UPDATE books SET title = 'changed' WHERE id = 4").await;
    rig.sql("INSERT INTO books VALUES (2, 'born again'); UPDATE books SET id = 50 WHERE id = 5").await;
    // Deletes and writes of one key in one transaction.
    rig.sql("BEGIN; DELETE FROM books WHERE id = 6; INSERT INTO books VALUES (6, 'born at once'); COMMIT").await;
    rig.sql("BEGIN; UPDATE books SET id = -7 WHERE id = 7; UPDATE books SET id = 7 WHERE id = 8; UPDATE books SET id = 8 WHERE id = -7; COMMIT").await;
    rig.delivered().await;
    rig.store.forget_tombstones();
    rig.store.clear_faults();
    done(&engine).await;
    assert!(noticed(&engine, "copied again"), "{:?}", engine.status().notices);
    rig.equal("books").await;
    assert_eq!(rig.documents("books").len(), 18);
    stop(engine).await;
}

/// The stream passes the snapshot's position before the copy can begin: what it deletes then counts as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_deleted_before_its_copy_begins_stays_deleted() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    rig.sql("INSERT INTO books SELECT n, 'Book ' || n FROM generate_series(1, 20) n").await;
    let (config, proxy) = rig.config_by_proxy(&["books"]).await;
    let engine = rig.run(config).await;
    proxy.hold("snapshot keeper");
    again(&engine, "books").await;
    proxy.until_held().await;
    rig.sql("DELETE FROM books WHERE id <= 3; UPDATE books SET id = 50 WHERE id = 5").await;
    rig.delivered().await;
    rig.store.forget_tombstones();
    proxy.release();
    done(&engine).await;
    assert!(noticed(&engine, "copied again"), "{:?}", engine.status().notices);
    rig.equal("books").await;
    assert_eq!(rig.documents("books").len(), 17);
    stop(engine).await;
}

/// A deleted row that the copy has not sent yet is left out when its turn comes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_deleted_before_its_copy_is_sent_is_left_out() {
    let rig = Rig::new().await;
    let engine = rig_with_books(&rig, 50, 10).await;
    let before = rig.store.stats().items;
    rig.hold(1);
    again(&engine, "books").await;
    rig.until_held().await;
    rig.sql("DELETE FROM books WHERE id IN (45, 46); INSERT INTO books VALUES (46, 'born again')").await;
    rig.delivered().await;
    rig.store.forget_tombstones();
    rig.store.clear_faults();
    done(&engine).await;
    rig.equal("books").await;
    // 48 rows by the copy, three changes by the stream, two deletes once more.
    assert_eq!(rig.store.stats().items - before, 48 + 3 + 2);
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cut_short_by_a_stop_it_is_made_again() {
    let rig = Rig::new().await;
    let engine = rig_with_books(&rig, 50, 10).await;
    plant(&rig, "books", &[("left over", 1)]).await;
    rig.hold(1);
    again(&engine, "books").await;
    rig.until_held().await;
    rig.sql("DELETE FROM books WHERE id = 30").await;
    stop(engine).await;
    rig.store.clear_faults();
    rig.sql("DELETE FROM books WHERE id = 31").await;
    let engine = rig.run(rig.config(&["books"])).await;
    wait_until("it was made again", LIMIT, || async { noticed(&engine, "copied again") }).await;
    done(&engine).await;
    rig.equal("books").await;
    assert_eq!(rig.documents("books").len(), 48);
    stop(engine).await;
}

/// Cut short when all rows are copied, but documents without a row are not removed yet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn cut_short_before_the_sweep_it_is_made_again() {
    let rig = Rig::new().await;
    let engine = rig_with_books(&rig, 50, 10).await;
    plant(&rig, "books", &[("left over", 1)]).await;
    let no_sweep = || rig.store.inject(Fault::new(Effect::Reject { status: 503, kind: None }).on("_search"));
    let copied = || async {
        let before = rig.store.stats().items;
        again(&engine, "books").await;
        wait_until("all rows are copied", LIMIT, || async { rig.store.stats().items >= before + 50 }).await;
        let open = "SELECT count(*) FROM cdc_snapshot_chunks WHERE status <> 'completed' AND chunk_index >= 0";
        wait_until("the ledger has it", LIMIT, || async { rig.count(open).await == 0 }).await;
    };
    // By a lost connection.
    no_sweep();
    copied().await;
    let slot = format!("FROM pg_replication_slots WHERE slot_name = '{}'", rig.name);
    rig.count(&format!("SELECT count(pg_terminate_backend(active_pid)) {slot}")).await;
    wait_until("the connections are made again", LIMIT, || async { engine.status().replication.reconnects > 0 }).await;
    rig.store.clear_faults();
    wait_until("it was made again", LIMIT, || async { noticed(&engine, "1 documents removed") }).await;
    done(&engine).await;
    rig.equal("books").await;

    // By a stop.
    plant(&rig, "books", &[("left behind", 1)]).await;
    no_sweep();
    copied().await;
    stop(engine).await;
    rig.store.clear_faults();
    let engine = rig.run(rig.config(&["books"])).await;
    assert!(noticed(&engine, "1 documents removed"), "live is said before the table was copied again");
    done(&engine).await;
    rig.equal("books").await;
    assert_eq!(rig.count("SELECT count(*) FROM cdc_snapshot_chunks WHERE status <> 'completed'").await, 0);
    stop(engine).await;
    let engine = rig.run(rig.config(&["books"])).await;
    assert!(!engine.status().tables[0].resnapshot, "it is made at each start");
    stop(engine).await;
}

/// The document of a refused row would be removed with those that have no row; but the next copy is another one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_row_stops_the_removal_of_its_own_copy_only() {
    let rig = Rig::new().await;
    let engine = rig_with_books(&rig, 20, 1_000).await;
    plant(&rig, "books", &[("left over", 1)]).await;
    let refuse = Effect::RejectItems { status: 400, kind: None, every: 0, ids: ["7".to_owned()].into() };
    rig.store.inject(Fault::new(refuse));
    again(&engine, "books").await;
    done(&engine).await;
    assert!(noticed(&engine, "stay in books: 1 rows of the copy were refused"), "{:?}", engine.status().notices);
    assert_eq!(rig.documents("books").len(), 21, "documents were removed");
    rig.store.clear_faults();
    again(&engine, "books").await;
    done(&engine).await;
    assert!(noticed(&engine, "1 documents removed"), "{:?}", engine.status().notices);
    rig.equal("books").await;
    stop(engine).await;
}

/// Documents that were there before the first copy are said, and removed by the next one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_with_documents_of_an_earlier_life() {
    let rig = Rig::new().await;
    plant(&rig, "books", &[("left over", 1), ("3", 1)]).await;
    let engine = rig_with_books(&rig, 5, 1_000).await;
    assert!(noticed(&engine, "index books has 2 documents already"), "{:?}", engine.status().notices);
    again(&engine, "books").await;
    done(&engine).await;
    rig.equal("books").await;
    stop(engine).await;
}

/// The ledger's connection holds the lock that keeps a second process out, and no change of the stream needs it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_lost_while_streaming_comes_back() {
    let rig = Rig::new().await;
    let engine = rig_with_books(&rig, 20, 1_000).await;
    let ledger = "FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'pgtide ledger %'";
    assert_eq!(rig.count(&format!("SELECT count(pg_terminate_backend(pid)) {ledger}")).await, 1);
    let locked = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database =
                  (SELECT oid FROM pg_database WHERE datname = current_database())";
    // At once, so that it is begun before the loss is noticed, unless that was quicker.
    let control = engine.control();
    wait_until("it is taken", LIMIT, || async { control.send(Command::Resnapshot(table("books"))).await.is_ok() })
        .await;
    wait_until("it is made", LIMIT, || async { noticed(&engine, "copied again") }).await;
    done(&engine).await;
    assert_eq!(engine.status().replication.reconnects, 1);
    assert_eq!(rig.count(locked).await, 1);
    rig.sql("DELETE FROM books WHERE id = 3").await;
    rig.equal("books").await;
    stop(engine).await;
}

/// The TRUNCATE of a partition is acknowledged once the table is sure to be copied again, not once it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_truncated_partition_is_remembered() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    rig.sql(
        "INSERT INTO books VALUES (1, 'one');
         CREATE TABLE parts (id int PRIMARY KEY) PARTITION BY RANGE (id);
         CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (100);
         CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM (100) TO (200);
         INSERT INTO parts SELECT generate_series(90, 110)",
    )
    .await;
    let engine = rig.run(rig.config(&["books", "parts"])).await;
    // One is copied at a time: the next waits.
    rig.hold(1);
    again(&engine, "books").await;
    rig.until_held().await;
    rig.sql("TRUNCATE parts_1").await;
    rig.delivered().await;
    assert!(engine.status().tables[1].resnapshot, "it says that parts is live");
    stop(engine).await;
    rig.store.clear_faults();
    assert_eq!(rig.documents("parts").len(), 21, "it was copied again before");
    let engine = rig.run(rig.config(&["books", "parts"])).await;
    wait_until("it is copied again", LIMIT, || async { noticed(&engine, "public.parts: copied again") }).await;
    done(&engine).await;
    rig.equal("parts").await;
    assert_eq!(rig.documents("parts").len(), 11);
    stop(engine).await;
}

/// One that was cut short leaves its chunks, which the other one must not take for its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_that_were_cut_short_are_both_made_again() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    rig.sql("CREATE TABLE atlases (id int PRIMARY KEY, title text); INSERT INTO atlases SELECT generate_series(1, 50)")
        .await;
    rig.sql("INSERT INTO books SELECT generate_series(1, 50)").await;
    let mut config = rig.config(&["atlases", "books"]);
    config.cdc.snapshot.workers = Some(1);
    let engine = rig.run(config.clone()).await;
    rig.hold(1);
    again(&engine, "books").await;
    rig.until_held().await;
    // What is answered with yes is in the ledger, whatever ends the process now.
    let wishes = "SELECT count(*) FROM cdc_snapshot_chunks WHERE table_name = 'atlases' AND status = 'wanted'";
    again(&engine, "atlases").await;
    assert_eq!(rig.count(wishes).await, 1);
    // Given up while it waits, it is gone, and can be asked for again at once.
    engine.control().send(Command::CancelResnapshot(table("atlases"))).await.unwrap();
    assert_eq!((rig.count(wishes).await, engine.status().tables[0].resnapshot), (0, false));
    again(&engine, "atlases").await;
    stop(engine).await;
    rig.store.clear_faults();
    let engine = rig.run(config).await;
    for table in ["atlases", "books"] {
        wait_until("both are copied again", LIMIT, || async { noticed(&engine, &format!("{table}: copied again")) })
            .await;
    }
    done(&engine).await;
    rig.equal("books").await;
    stop(engine).await;
}

/// A copy of everything that is begun anew goes on after a lost connection, and does not begin anew once more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_copied_again_is_begun_once() {
    let rig = Rig::new().await;
    let engine = rig_with_books(&rig, 500, 10).await;
    stop(engine).await;
    plant(&rig, "books", &[("left over", 1)]).await;
    rig.sql("UPDATE books SET title = rpad('x', 1000, 'y'); ANALYZE books; DELETE FROM books WHERE id > 490").await;
    let mut config = rig.config(&["books"]);
    config.cdc.snapshot.resnapshot = true;
    config.cdc.snapshot.chunk_size = 20;
    config.cdc.snapshot.workers = Some(1);
    config.elasticsearch.batch_size_limit = 20;
    rig.hold_after(10, 1);
    let engine = rig.start(config);
    rig.until_held().await;
    let completed = || async {
        let sql = "SELECT id, completed_at::text FROM cdc_snapshot_chunks WHERE status = 'completed' ORDER BY id";
        let rows = rig.client.query(sql, &[]).await.unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect::<Vec<(i32, String)>>()
    };
    let before = completed().await;
    assert!(!before.is_empty());
    let ledger = "FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'pgtide ledger %'";
    rig.count(&format!("SELECT count(pg_terminate_backend(pid)) {ledger}")).await;
    wait_until("the connections are made again", LIMIT, || async { engine.status().replication.reconnects > 0 }).await;
    rig.store.clear_faults();
    live(&engine).await;
    let after = completed().await;
    assert!(before.iter().all(|chunk| after.contains(chunk)), "what was done was done again");
    rig.equal("books").await;
    stop(engine).await;
}

/// Paused is what sends nothing, the removal of old documents included.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_holds_the_removal_of_documents() {
    let rig = Rig::new().await;
    let engine = rig_with_books(&rig, 5, 1_000).await;
    plant(&rig, "books", &[("left over", 1)]).await;
    rig.hold_after(1, 1);
    again(&engine, "books").await;
    rig.until_held().await;
    engine.control().send(Command::Pause).await.unwrap();
    wait_until("the stream rests", LIMIT, || async { rig.walsenders().await == 0 }).await;
    assert_eq!(engine.status().phase, Phase::Pausing);
    rig.store.clear_faults();
    phase(&engine, Phase::Paused).await;
    assert!(engine.status().tables[0].resnapshot);
    engine.control().send(Command::Resume).await.unwrap();
    done(&engine).await;
    rig.equal("books").await;
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wish_that_cannot_be_granted_is_refused_in_words() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    let mut insert = String::from("INSERT INTO books VALUES (0, 'x')");
    for n in 1..10 {
        write!(insert, ", ({n}, 'x')").unwrap();
    }
    rig.sql(&insert).await;
    rig.hold(1);
    let engine = rig.start(rig.config(&["books"]));
    rig.until_held().await;
    let early = engine.control().send(Command::Resnapshot(table("books"))).await.unwrap_err();
    assert!(early.contains("first copy"), "{early}");
    rig.store.clear_faults();
    live(&engine).await;
    let unknown = engine.control().send(Command::Resnapshot(table("boks"))).await.unwrap_err();
    assert!(unknown.contains("public.boks"), "{unknown}");
    rig.equal("books").await;
    stop(engine).await;
}
