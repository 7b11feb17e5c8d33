//! The copy against a real PostgreSQL: chunks, ledger, metrics, and what happens beside it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use pgtide::config::Mode;
use pgtide::engine::{Engine, Phase, TableState};
use pgtide::problem::ProblemKind;
use support::pipeline::{LIMIT, Rig, ended, live, metric, operations, stop};
use support::wait_until;
use tokio_postgres::error::SqlState;

/// A chunk as the ledger has it: table, index, start, size, rows, and whether it is completed.
type Chunk = (String, i32, i64, i64, i64, bool);

async fn chunks(rig: &Rig, job: &str) -> Vec<Chunk> {
    let sql = "SELECT table_schema || '.' || table_name, chunk_index, chunk_start, chunk_size, rows_processed,
                      status = 'completed'
               FROM cdc_snapshot_chunks WHERE slot_name = $1 ORDER BY id";
    let rows = rig.client.query(sql, &[&job]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1), row.get(2), row.get(3), row.get(4), row.get(5))).collect()
}

/// Completed, chunks in all, chunks completed.
async fn job(rig: &Rig, job: &str) -> (bool, i32, i32) {
    let sql = "SELECT completed, total_chunks, completed_chunks FROM cdc_snapshot_job WHERE slot_name = $1";
    let row = rig.client.query_one(sql, &[&job]).await.unwrap();
    (row.get(0), row.get(1), row.get(2))
}

/// Rows, chunks in all and chunks completed of a table's copy, as the metrics have it.
fn copied(engine: &Engine, table: &str) -> [f64; 3] {
    let status = engine.status();
    ["total_rows", "total_chunks", "completed_chunks"]
        .map(|name| metric(&status, &format!("go_pq_cdc_snapshot_{name}"), table))
}

/// A table whose pages hold 25 rows each.
async fn wide_table(rig: &Rig, name: &str, rows: i32) {
    rig.sql(&format!(
        "CREATE TABLE {name} (id int PRIMARY KEY, pad text NOT NULL);
         ALTER TABLE {name} ALTER pad SET STORAGE PLAIN;
         INSERT INTO {name} SELECT n, rpad(n::text, 284, 'x') FROM generate_series(1, {rows}) n;
         ANALYZE {name};"
    ))
    .await;
}

const BOOKS: &str = "CREATE TABLE books (id int PRIMARY KEY, title text NOT NULL, price numeric, sold timestamptz)";

async fn books(rig: &Rig, first: i32, last: i32) {
    rig.sql(&format!(
        "INSERT INTO books SELECT n, 'Book ' || n, n * 1.5, timestamptz '2024-01-01Z' + n * interval '1 hour'
         FROM generate_series({first}, {last}) n"
    ))
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_chunk_then_the_stream() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    books(&rig, 1, 5).await;
    let engine = rig.run(rig.config(&["books"])).await;

    rig.equal_now("books").await;
    assert_eq!(chunks(&rig, &rig.name).await, [("public.books".into(), 0, 0, 0, 5, true)]);
    assert_eq!(job(&rig, &rig.name).await, (true, 1, 1));
    assert_eq!(copied(&engine, "public.books"), [5.0, 1.0, 1.0]);
    let status = engine.status();
    assert_eq!(metric(&status, "go_pq_cdc_snapshot_in_progress", ""), 0.0);
    assert_eq!(metric(&status, "go_pq_cdc_snapshot_total_tables", ""), 1.0);
    assert_eq!(metric(&status, "go_pq_cdc_snapshot_completed_tables", ""), 1.0);
    assert_eq!(metric(&status, "go_pq_cdc_snapshot_active_workers", ""), 0.0);
    assert!(metric(&status, "go_pq_cdc_snapshot_duration_seconds", "") > 0.0);
    assert_eq!(operations(&status, "public.books"), [0.0; 3], "a row came by both ways");
    assert_eq!(status.tables[0].state, TableState::Live);
    rig.nobody_idles_in_a_transaction().await;
    assert_eq!(rig.store.stats().items, 5);

    books(&rig, 6, 6).await;
    rig.equal("books").await;
    assert_eq!(operations(&engine.status(), "public.books"), [1.0, 0.0, 0.0]);
    assert_eq!(copied(&engine, "public.books"), [5.0, 1.0, 1.0], "the stream counts as copy");
    assert_eq!(rig.store.stats().items, 6, "each row exactly once");
    let versions: Vec<i64> = (1..=6).map(|id| rig.version("books", &id.to_string())).collect();
    assert!(versions[..5].iter().all(|version| *version == versions[0] && *version < versions[5]), "{versions:?}");
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn four_chunks() {
    let rig = Rig::new().await;
    wide_table(&rig, "wide", 100).await;
    let mut config = rig.config(&["wide"]);
    config.cdc.snapshot.chunk_size = 25;
    let engine = rig.run(config).await;

    rig.equal_now("wide").await;
    let wide = |index, size| ("public.wide".to_owned(), index, i64::from(index), size, 25, true);
    // By pages: the last chunk has no end, which the ledger writes as size 0.
    assert_eq!(chunks(&rig, &rig.name).await, [wide(0, 1), wide(1, 1), wide(2, 1), wide(3, 0)]);
    assert_eq!(
        rig.count("SELECT count(*) FROM cdc_snapshot_chunks WHERE is_last_chunk AND block_end IS NULL").await,
        1,
        "rows that come behind the last page would be lost"
    );
    assert_eq!(job(&rig, &rig.name).await, (true, 4, 4));
    assert_eq!(copied(&engine, "public.wide"), [100.0, 4.0, 4.0]);
    assert_eq!(rig.store.stats().items, 100);
    stop(engine).await;
}

/// What PostgreSQL believes of a table decides how large its chunks are, and never how many rows are copied.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_estimate_loses_no_row() {
    let rig = Rig::new().await;
    let estimates = [("never", -1), ("none", 0), ("few", 3), ("many", 1_000_000_000)];
    for (name, rows) in estimates {
        wide_table(&rig, name, 200).await;
        rig.sql(&format!("UPDATE pg_class SET reltuples = {rows} WHERE oid = '{name}'::regclass")).await;
    }
    let names = estimates.map(|(name, _)| name);
    let mut config = rig.config(&names);
    config.cdc.snapshot.chunk_size = 4;
    let engine = rig.run(config).await;
    for name in names {
        rig.equal_now(name).await;
        assert_eq!(rig.documents(name).len(), 200);
    }
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_table() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    let engine = rig.run(rig.config(&["books"])).await;
    assert_eq!(chunks(&rig, &rig.name).await, [("public.books".into(), 0, 0, 0, 0, true)]);
    assert_eq!(job(&rig, &rig.name).await, (true, 1, 1));
    assert_eq!(copied(&engine, "public.books"), [0.0, 1.0, 1.0]);
    assert!(rig.documents("books").is_empty());
    books(&rig, 1, 3).await;
    rig.equal("books").await;
    assert_eq!(rig.documents("books").len(), 3);
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn several_tables() {
    let rig = Rig::new().await;
    let tables = [("a", 60, 3.0), ("b", 40, 2.0), ("c", 15, 1.0)];
    for (name, rows, _) in tables {
        wide_table(&rig, name, rows).await;
    }
    let mut config = rig.config(&["a", "b", "c"]);
    config.cdc.snapshot.chunk_size = 25;
    let engine = rig.run(config).await;
    for (name, rows, count) in tables {
        rig.equal_now(name).await;
        assert_eq!(copied(&engine, &format!("public.{name}")), [f64::from(rows), count, count]);
    }
    let done = chunks(&rig, &rig.name).await;
    assert_eq!(done.iter().map(|chunk| chunk.4).collect::<Vec<_>>(), [25, 25, 10, 25, 15, 15]);
    assert_eq!(job(&rig, &rig.name).await, (true, 6, 6));
    assert_eq!(metric(&engine.status(), "go_pq_cdc_snapshot_completed_tables", ""), 3.0);
    for (name, rows, _) in tables {
        rig.sql(&format!("INSERT INTO {name} VALUES ({rows} + 1, 'new')")).await;
    }
    for (name, ..) in tables {
        rig.equal(name).await;
        assert_eq!(operations(&engine.status(), &format!("public.{name}")), [1.0, 0.0, 0.0]);
    }
    stop(engine).await;
}

/// What is committed while the copy runs comes with the stream, and only with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_during_the_copy_come_exactly_once() {
    let rig = Rig::new().await;
    wide_table(&rig, "wide", 50).await;
    let mut config = rig.config(&["wide"]);
    config.cdc.snapshot.chunk_size = 25;
    // One worker: while its first bulk is held, the second chunk is not read yet, and that has the pages of the rows to
    // come. Only the snapshot keeps them out of the copy.
    config.cdc.snapshot.workers = Some(1);
    config.elasticsearch.batch_size_limit = 10;
    rig.hold(1);
    let engine = rig.start(config);
    rig.until_held().await;
    let begin = rig.confirmed().await;
    rig.sql("INSERT INTO wide SELECT n, 'later ' || n FROM generate_series(100, 150) n").await;
    rig.sql("UPDATE wide SET pad = 'changed ' || id WHERE id BETWEEN 1 AND 10").await;
    rig.sql("DELETE FROM wide WHERE id BETWEEN 41 AND 50").await;
    assert_eq!(engine.status().phase, Phase::Snapshot);
    rig.store.clear_faults();
    live(&engine).await;
    rig.equal("wide").await;
    assert_eq!(rig.documents("wide").len(), 91);
    // Each of these chunks took three bulks.
    assert_eq!(chunks(&rig, &rig.name).await.iter().map(|chunk| chunk.4).collect::<Vec<_>>(), [25, 25]);
    assert_eq!(copied(&engine, "public.wide"), [50.0, 2.0, 2.0]);
    assert_eq!(operations(&engine.status(), "public.wide"), [51.0, 10.0, 10.0]);
    assert_eq!(rig.store.stats().items, 50 + 51 + 10 + 10);
    assert_eq!(engine.status().sink.superseded, 0);
    assert_eq!(
        rig.version("wide", "20"),
        i64::try_from(pgtide::version::before(begin)).unwrap(),
        "not just before the first change"
    );
    stop(engine).await;
}

/// PostgreSQL makes a slot only when the transactions that are open have ended. What is committed until then is in the
/// copy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_committed_while_the_slot_is_made_is_not_lost() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    books(&rig, 1, 10).await;
    let open = rig.connect().await;
    open.batch_execute("BEGIN; INSERT INTO books VALUES (11, 'open')").await.unwrap();
    let engine = rig.start(rig.config(&["books"]));
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                 AND backend_type = 'walsender' AND wait_event_type = 'Lock'";
    wait_until("the slot waits for the transaction", LIMIT, || async { rig.count(waits).await == 1 }).await;
    rig.sql("INSERT INTO books VALUES (12, 'meanwhile'); UPDATE books SET title = 'changed' WHERE id = 1").await;
    rig.sql("DELETE FROM books WHERE id = 2").await;
    open.batch_execute("COMMIT").await.unwrap();
    live(&engine).await;
    rig.equal("books").await;
    assert_eq!(copied(&engine, "public.books"), [11.0, 1.0, 1.0]);
    assert_eq!(operations(&engine.status(), "public.books"), [0.0; 3]);
    stop(engine).await;
}

/// The session that holds the snapshot comes after the slot.
const KEEPER: &str = "snapshot keeper";

/// What is committed behind the slot's beginning is not in the copy, however late that begins.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_committed_after_the_slot_comes_only_with_the_stream() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    books(&rig, 1, 10).await;
    let (config, proxy) = rig.config_by_proxy(&["books"]).await;
    proxy.hold(KEEPER);
    let engine = rig.start(config);
    proxy.until_held().await;
    books(&rig, 11, 12).await;
    rig.sql("UPDATE books SET title = 'changed' WHERE id = 1; DELETE FROM books WHERE id = 2").await;
    proxy.release();
    live(&engine).await;
    rig.equal("books").await;
    assert_eq!(copied(&engine, "public.books"), [10.0, 1.0, 1.0]);
    assert_eq!(operations(&engine.status(), "public.books"), [2.0, 1.0, 1.0]);
    stop(engine).await;
}

/// Rewritten between the snapshot and the lock, a table has no row in that snapshot. The slot that was made for it is dropped,
/// which is no loss.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_rewritten_behind_the_snapshot_is_seen() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    books(&rig, 1, 10).await;
    let (config, proxy) = rig.config_by_proxy(&["books"]).await;
    proxy.hold(KEEPER);
    let engine = rig.start(config);
    proxy.until_held().await;
    let seen = || engine.status().replication.wal_status.is_some();
    wait_until("the monitor sees the slot", LIMIT, || async { seen() }).await;
    rig.sql("ALTER TABLE books ALTER id TYPE bigint").await;
    // The keeper goes on; its slot is dropped, and nobody is told.
    proxy.mute("pgtide slot");
    proxy.hold("nothing");
    wait_until("the monitor sees that there is none", LIMIT, || async { !seen() }).await;
    assert_ne!(engine.status().phase, Phase::Failed);
    proxy.release();
    live(&engine).await;
    rig.equal_now("books").await;
    assert_eq!(rig.documents("books").len(), 10);
    let notices = engine.status().notices;
    assert!(notices.iter().any(|notice| notice.text.contains("while the snapshot was taken")), "{notices:?}");
    stop(engine).await;
}

/// A process that is killed while it gives its attempt up leaves a slot that the server is about to drop. Nothing depends on it
/// before the copy has begun.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_is_dropped_before_the_copy_begins_is_no_loss() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    books(&rig, 1, 10).await;
    let (config, proxy) = rig.config_by_proxy(&["books"]).await;
    rig.sql(&format!("SELECT pg_create_logical_replication_slot('{}', 'pgoutput')", rig.name)).await;
    proxy.hold(KEEPER);
    let engine = rig.start(config);
    proxy.until_held().await;
    let seen = || engine.status().replication.wal_status.is_some();
    wait_until("the monitor sees the slot", LIMIT, || async { seen() }).await;
    rig.sql(&format!("SELECT pg_drop_replication_slot('{}')", rig.name)).await;
    wait_until("the monitor sees that it is gone", LIMIT, || async { !seen() }).await;
    proxy.release();
    live(&engine).await;
    books(&rig, 11, 12).await;
    rig.equal("books").await;
    assert_eq!(rig.documents("books").len(), 12);
    stop(engine).await;
}

/// Between the snapshot and the lock lie changes of both forms, and rows of neither.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_altered_behind_the_snapshot_is_seen() {
    for sql in [
        "INSERT INTO parts VALUES (5, 'old form'); ALTER TABLE parts ADD c int DEFAULT 7",
        "CREATE TABLE more (LIKE parts INCLUDING ALL); INSERT INTO more VALUES (150, 'attached');
         ALTER TABLE parts ATTACH PARTITION more FOR VALUES FROM (100) TO (200)",
        "INSERT INTO parts VALUES (6, 'goes'); ALTER TABLE parts DETACH PARTITION first",
    ] {
        let rig = Rig::new().await;
        rig.sql(
            "CREATE TABLE parts (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
             CREATE TABLE first PARTITION OF parts FOR VALUES FROM (0) TO (100);
             CREATE TABLE rest PARTITION OF parts DEFAULT;
             INSERT INTO parts VALUES (1, 'one'), (300, 'three hundred')",
        )
        .await;
        let (config, proxy) = rig.config_by_proxy(&["parts"]).await;
        proxy.hold(KEEPER);
        let engine = rig.start(config);
        proxy.until_held().await;
        for statement in sql.split("; ") {
            rig.sql(statement).await;
        }
        proxy.release();
        live(&engine).await;
        rig.equal("parts").await;
        stop(engine).await;
    }
}

/// A snapshot sees no row of a table that was rewritten after it, so no table is before it is copied.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_waits_for_its_copy_cannot_be_rewritten() {
    let rig = Rig::new().await;
    for name in ["a", "b"] {
        wide_table(&rig, name, 25).await;
    }
    let mut config = rig.config(&["a", "b"]);
    config.cdc.snapshot.workers = Some(1);
    config.elasticsearch.batch_size_limit = 10;
    rig.hold(1);
    let engine = rig.start(config);
    rig.until_held().await;
    rig.sql("SET lock_timeout = '100ms'").await;
    for sql in ["TRUNCATE b", "ALTER TABLE b ALTER id TYPE bigint"] {
        let error = rig.client.batch_execute(sql).await.expect_err(sql);
        assert_eq!(error.code(), Some(&SqlState::LOCK_NOT_AVAILABLE), "{sql}: {error:?}");
    }
    rig.store.clear_faults();
    live(&engine).await;
    rig.equal_now("a").await;
    rig.equal_now("b").await;
    assert_eq!(rig.documents("b").len(), 25);
    stop(engine).await;
}

/// Who only waits for a table keeps its copy waiting as well: it is said who that is, and nothing of what it writes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_somebody_waits_to_alter() {
    let rig = Rig::new().await;
    for name in ["a", "b"] {
        wide_table(&rig, name, 25).await;
    }
    let mut config = rig.config(&["a", "b"]);
    config.cdc.snapshot.workers = Some(1);
    config.elasticsearch.concurrent_request = 1;
    config.elasticsearch.batch_size_limit = 10;
    rig.hold(1);
    let engine = rig.start(config);
    rig.until_held().await;
    let other = rig.connect().await;
    other.batch_execute("SET application_name = 'migration'").await.unwrap();
    let pid: i32 = other.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let alters = tokio::spawn(async move { other.batch_execute("ALTER TABLE b ADD word text DEFAULT 'hush'").await });
    let waits = format!("SELECT count(*) FROM pg_locks WHERE pid = {pid} AND NOT granted");
    wait_until("it waits for the lock", LIMIT, || async { rig.count(&waits).await == 1 }).await;
    rig.store.clear_faults();
    let said = format!("table public.b is locked by another session: pid {pid}, application migration, user ");
    wait_until("it is said who it is", LIMIT, || async {
        let notices = engine.status().notices;
        assert!(!notices.iter().any(|notice| notice.text.contains("hush")), "{notices:?}");
        notices.iter().any(|notice| {
            let rest = notice.text.split_once(&said).map_or("", |(_, rest)| rest);
            rest.ends_with(" UTC, ALTER TABLE, which itself waits for the lock; trying again")
        })
    })
    .await;
    alters.await.unwrap().unwrap();
    live(&engine).await;
    rig.equal("a").await;
    rig.equal("b").await;
    stop(engine).await;
}

/// Rows on the pages 4 to 7, one chunk each, with one that is not done when the copy is stopped. First `prepare`.
async fn cut_short(rig: &Rig, prepare: &str) {
    wide_table(rig, "wide", 200).await;
    rig.sql(prepare).await;
    rig.sql("DELETE FROM wide WHERE id <= 100; ANALYZE wide").await;
    let mut config = rig.config(&["wide"]);
    config.cdc.snapshot.chunk_size = 10;
    config.cdc.snapshot.workers = Some(2);
    config.elasticsearch.batch_size_limit = 25;
    rig.hold(1);
    let engine = rig.start(config);
    rig.until_held().await;
    wait_until("the other chunks are done", LIMIT, || async { job(rig, &rig.name).await == (false, 8, 7) }).await;
    stop(engine).await;
    assert_eq!(rig.documents("wide").len(), 75);
}

/// Moves the rows of the page that is still to be copied to pages that are done.
async fn move_what_is_left(rig: &Rig) {
    let done: Vec<String> = rig.documents("wide").into_keys().collect();
    let without = done.join(",");
    rig.sql(&format!("UPDATE wide SET pad = rpad('moved ' || id, 284, 'y') WHERE id NOT IN ({without})")).await;
    let on_the_page = "SELECT count(*) FROM wide, cdc_snapshot_chunks WHERE status <> 'completed'
                       AND wide.ctid BETWEEN format('(%s,0)', block_start)::tid AND format('(%s,999)', block_start)::tid";
    assert_eq!(rig.count(on_the_page).await, 0, "they did not move");
}

/// A row that moved from the page that is still to be copied to one that is done comes with the change that moved it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_goes_on_after_rows_have_moved() {
    let rig = Rig::new().await;
    cut_short(&rig, "").await;
    move_what_is_left(&rig).await;
    rig.sql("DELETE FROM wide WHERE id IN (150, 175)").await;
    let engine = rig.run(rig.config(&["wide"])).await;
    rig.equal("wide").await;
    assert_eq!(rig.documents("wide").len(), 98);
    assert_eq!(job(&rig, &rig.name).await, (true, 8, 8), "it began anew");
    stop(engine).await;
}

/// Where updates are not published, none brings a row that moved.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_updates_in_the_publication_a_copy_does_not_go_on() {
    let rig = Rig::new().await;
    let publication = format!("CREATE PUBLICATION {} FOR TABLE wide WITH (publish = 'insert, delete')", rig.name);
    cut_short(&rig, &publication).await;
    move_what_is_left(&rig).await;
    let engine = rig.run(rig.config(&["wide"])).await;
    rig.becomes_equal("wide").await;
    assert_eq!(rig.documents("wide").len(), 100);
    let notices = engine.status().notices;
    let said = |text: &str| notices.iter().any(|notice| notice.text.contains(text));
    assert!(said("updates are not published, and some may have been made"), "{notices:?}");
    stop(engine).await;
}

/// VACUUM FULL moves rows without a change in the stream: what is known of the pages is worth nothing then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_rewritten_in_the_middle_is_copied_from_its_beginning() {
    let rig = Rig::new().await;
    cut_short(&rig, "").await;
    rig.sql("VACUUM FULL wide").await;
    let engine = rig.run(rig.config(&["wide"])).await;
    rig.equal("wide").await;
    assert_eq!(rig.documents("wide").len(), 100);
    let notices = engine.status().notices;
    assert!(notices.iter().any(|notice| notice.text.contains("was rewritten")), "{notices:?}");
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_start_copies_only_when_it_is_told_to() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    books(&rig, 1, 3).await;
    let engine = rig.run(rig.config(&["books"])).await;
    assert_eq!(copied(&engine, "public.books")[0], 3.0);
    stop(engine).await;
    let started = "SELECT started_at::text FROM cdc_snapshot_job";
    let first = rig.text(started).await;

    books(&rig, 4, 5).await;
    let engine = rig.run(rig.config(&["books"])).await;
    rig.equal("books").await;
    let table = engine.status().tables.remove(0);
    assert_eq!(table.rows_copied, 0, "it was copied again");
    assert_eq!((table.rows_done, table.rows_total), (3, Some(3)), "what the ledger knows");
    assert_eq!(operations(&engine.status(), "public.books"), [2.0, 0.0, 0.0]);
    assert_eq!(rig.text(started).await, first);
    stop(engine).await;

    // With its slot everything goes that was deleted meanwhile; without it only the sweep can know.
    rig.sql(&format!("SELECT pg_drop_replication_slot('{}')", rig.name)).await;
    rig.sql("DELETE FROM books WHERE id = 2; UPDATE books SET title = 'Changed' WHERE id = 3").await;
    books(&rig, 6, 6).await;
    let mut engine = rig.start(rig.config(&["books"]));
    let gap = ended(&mut engine).await.unwrap_err();
    assert_eq!(gap.kind, ProblemKind::Gap, "{gap:?}");
    assert!(gap.hint.contains("resnapshot"), "{gap:?}");
    assert!(rig.documents("books").contains_key("2"));

    let mut config = rig.config(&["books"]);
    config.cdc.snapshot.resnapshot = true;
    let engine = rig.run(config.clone()).await;
    rig.equal_now("books").await;
    assert_eq!(rig.documents("books").keys().collect::<Vec<_>>(), ["1", "3", "4", "5", "6"]);
    assert_eq!(copied(&engine, "public.books"), [5.0, 1.0, 1.0]);
    assert_eq!(job(&rig, &rig.name).await, (true, 1, 1));
    assert_ne!(rig.text(started).await, first, "the job is the old one");
    stop(engine).await;

    // The same where the slot is there, and brings the deletes as well.
    rig.sql("DELETE FROM books WHERE id = 4").await;
    let engine = rig.run(config).await;
    rig.equal("books").await;
    assert_eq!(copied(&engine, "public.books"), [4.0, 1.0, 1.0]);
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn snapshot_only_ends_and_leaves_nothing_behind() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    books(&rig, 1, 20).await;
    let mut config = rig.config(&["books"]);
    config.cdc.snapshot.mode = Mode::SnapshotOnly;
    let mut engine = rig.start(config.clone());
    ended(&mut engine).await.unwrap();

    assert_eq!(engine.status().phase, Phase::Stopped);
    rig.equal_now("books").await;
    assert_eq!(rig.documents("books").len(), 20);
    let name = format!("snapshot_only_{}", rig.name);
    assert_eq!(job(&rig, &name).await, (true, 1, 1));
    assert_eq!(chunks(&rig, &name).await, [("public.books".into(), 0, 0, 0, 20, true)]);
    assert_eq!(copied(&engine, "public.books"), [20.0, 1.0, 1.0]);
    let slots = "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()";
    assert_eq!(rig.count(slots).await, 0, "a slot was made");
    assert_eq!(rig.count("SELECT count(*) FROM pg_publication").await, 0, "a publication was made");
    rig.nobody_idles_in_a_transaction().await;
    let others =
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'pgtide%'";
    wait_until("all its sessions are gone", LIMIT, || async { rig.count(others).await == 0 }).await;

    books(&rig, 21, 21).await;
    let items = rig.store.stats().items;
    let mut engine = rig.start(config.clone());
    ended(&mut engine).await.unwrap();
    assert_eq!(rig.store.stats().items, items, "the second run copied");

    // Another job, another copy.
    config.cdc.snapshot.id = Some("nightly".into());
    let mut engine = rig.start(config);
    ended(&mut engine).await.unwrap();
    rig.equal_now("books").await;
    assert_eq!(job(&rig, "nightly").await, (true, 1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_walsender_while_copying_and_one_after() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    books(&rig, 1, 50).await;
    rig.hold(1);
    let engine = rig.start(rig.config(&["books"]));
    rig.until_held().await;
    // The session that made the slot may just be on its way out.
    wait_until("no walsender is left", LIMIT, || async { rig.walsenders().await == 0 }).await;
    let status = engine.status();
    assert_eq!(status.phase, Phase::Snapshot);
    assert_eq!(metric(&status, "go_pq_cdc_snapshot_in_progress", ""), 1.0);
    assert_eq!(metric(&status, "pgtide_phase", "snapshot"), 1.0);
    assert_eq!(job(&rig, &rig.name).await, (false, 1, 0), "a chunk is done before its answer");
    assert_eq!(copied(&engine, "public.books"), [0.0, 1.0, 0.0], "rows count before their answer");
    rig.store.clear_faults();
    live(&engine).await;
    wait_until("the temporary connections are gone", LIMIT, || async { rig.walsenders().await == 1 }).await;
    rig.equal("books").await;
    assert_eq!(rig.walsenders().await, 1);
    let slot = format!("SELECT count(*) FROM pg_replication_slots WHERE active AND slot_name = '{}'", rig.name);
    assert_eq!(rig.count(&slot).await, 1);
    stop(engine).await;
    wait_until("the slot is free", LIMIT, || async { rig.count(&slot).await == 0 }).await;
}

/// A start that finds no slot makes one, and may end before it has begun a job of its own: the slot knows nothing of the
/// changes since the half-done copy.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_half_done_copy_is_not_gone_on_with_from_a_later_slot() {
    let rig = Rig::new().await;
    wide_table(&rig, "wide", 100).await;
    let mut config = rig.config(&["wide"]);
    config.cdc.snapshot.chunk_size = 25;
    config.cdc.snapshot.workers = Some(1);
    config.elasticsearch.batch_size_limit = 25;
    rig.hold_after(2, 1);
    let engine = rig.start(config.clone());
    rig.until_held().await;
    stop(engine).await;
    rig.store.clear_faults();
    assert_eq!(job(&rig, &rig.name).await, (false, 4, 2));
    rig.sql(&format!("SELECT pg_drop_replication_slot('{}')", rig.name)).await;
    rig.sql("DELETE FROM wide WHERE id <= 5; UPDATE wide SET pad = 'changed' WHERE id IN (6, 99)").await;
    rig.sql(&format!("SELECT pg_create_logical_replication_slot('{}', 'pgoutput')", rig.name)).await;
    let engine = rig.run(config).await;
    rig.equal("wide").await;
    stop(engine).await;
}

/// Servers, databases and roles have timeouts for applications. One that ended the session which holds the snapshot
/// would have the copy begin again and again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_timeout_of_the_database_ends_the_copy() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    books(&rig, 1, 100).await;
    // Those that this version has.
    let sql = "SELECT name FROM pg_settings WHERE name IN ('statement_timeout', 'idle_in_transaction_session_timeout',
               'idle_session_timeout', 'transaction_timeout')";
    for row in rig.client.query(sql, &[]).await.unwrap() {
        rig.sql(&format!("ALTER DATABASE {} SET {} = '500ms'", rig.name, row.get::<_, String>(0))).await;
    }
    let keeper = "SELECT coalesce(max(pid), 0)::text FROM pg_stat_activity
                  WHERE datname = current_database() AND application_name = 'pgtide snapshot keeper'";
    rig.hold(1);
    let engine = rig.start(rig.config(&["books"]));
    rig.until_held().await;
    let before = rig.text(keeper).await;
    // It is the passing of time that is tested.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(rig.text(keeper).await, before, "another session holds the snapshot");
    assert_ne!(before, "0");
    rig.store.clear_faults();
    live(&engine).await;
    rig.equal("books").await;
    let notices = engine.status().notices;
    assert!(!notices.iter().any(|notice| notice.text.contains("has ended")), "{notices:?}");
    stop(engine).await;
}
