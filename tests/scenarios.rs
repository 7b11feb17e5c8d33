//! What a connector meets in use, each as a small story: see docs/conformance.md, which says where another one fails.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use pgtide::change::{Action, Change};
use pgtide::config::{Heartbeat, Mode, Table};
use pgtide::store::{Effect, Fault};
use pgtide::table::TableId;
use serde_json::json;
use support::pipeline::{LIMIT, Rig, ended, live, stop};
use support::wait_until;

fn id(name: &str) -> TableId {
    TableId::new("public", name)
}

const BOOKS: &str = "CREATE TABLE books (id int PRIMARY KEY, title text);
    INSERT INTO books SELECT n, 'Book ' || n FROM generate_series(1, 100) n";

/// The rows of one COPY are one transaction: an end in the middle of it loses none, and doubles none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_in_the_middle_of_a_copy_command() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE books (id int PRIMARY KEY, title text)").await;
    let mut config = rig.config(&["books"]);
    config.elasticsearch.batch_size_limit = 4;
    let engine = rig.run(config.clone()).await;
    // The first half of the rows is taken, and no answer comes for the others.
    rig.hold_after(4, 1000);
    assert_eq!(rig.client.execute("COPY books (id) FROM PROGRAM 'seq 30'", &[]).await.unwrap(), 30);
    let commit = rig.position().await;
    rig.until_held().await;
    stop(engine).await;
    assert!(rig.confirmed().await < commit, "the transaction is confirmed in part");
    rig.store.clear_faults();
    let engine = rig.run(config).await;
    rig.equal("books").await;
    assert_eq!(rig.documents("books").len(), 30);
    stop(engine).await;
}

/// PostgreSQL writes large transactions to its disk: nothing of what is rolled back comes, not by a savepoint either, and
/// everything else does, in the order of the commits.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn spilled_transactions_and_savepoints() {
    let rig = Rig::new().await;
    rig.sql(&format!("ALTER DATABASE {} SET logical_decoding_work_mem = '64kB'", rig.name)).await;
    rig.sql("CREATE TABLE books (id int PRIMARY KEY, title text)").await;
    let engine = rig.run(rig.config(&["books"])).await;
    let many = |first: i32, count: i32| {
        format!(
            "INSERT INTO books SELECT n, repeat('x', 200) || n FROM generate_series({first}, {first} + {count} - 1) n;"
        )
    };
    let other = rig.connect().await;

    // A small one commits in the middle of a large one.
    rig.sql(&format!("BEGIN; {}", many(1000, 400))).await;
    other.batch_execute("INSERT INTO books VALUES (1, 'small')").await.unwrap();
    rig.sql("COMMIT").await;
    // Rolled back, and then another that is not.
    rig.sql(&format!("BEGIN; {} ROLLBACK", many(10_000, 500))).await;
    rig.sql(&format!("BEGIN; {} COMMIT", many(10_000, 500))).await;
    // A savepoint that is rolled back takes its own rows along and no others: so does each EXCEPTION block of PL/pgSQL.
    rig.sql(&format!(
        "BEGIN; {} SAVEPOINT a; {} ROLLBACK TO a; {} RELEASE a; {} COMMIT",
        many(20_000, 1000),
        many(30_000, 1000),
        many(40_000, 10),
        many(50_000, 1000)
    ))
    .await;
    rig.sql(
        "DO $$ BEGIN INSERT INTO books VALUES (2, 'kept'); BEGIN INSERT INTO books VALUES (3, 'lost'); RAISE 'no';
             EXCEPTION WHEN others THEN INSERT INTO books VALUES (4, 'kept'); END; END $$",
    )
    .await;
    rig.equal("books").await;
    assert_eq!(rig.documents("books").len(), 401 + 500 + 2010 + 2);
    // The statistics come a little later.
    let spilled = format!(
        "SELECT coalesce(sum(spill_txns), 0)::int8 FROM pg_stat_replication_slots WHERE slot_name = '{}'",
        rig.name
    );
    wait_until("large transactions were written to disk", LIMIT, || async { rig.count(&spilled).await >= 3 }).await;
    stop(engine).await;
}

/// A heartbeat moves the slot on, and so do other tables' changes, but neither past what Elasticsearch has not answered for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heartbeat_acknowledges_nothing_that_waits() {
    let rig = Rig::new().await;
    rig.sql(
        "CREATE TABLE books (id int PRIMARY KEY); CREATE TABLE others (id int);
             CREATE TABLE beat (id int PRIMARY KEY DEFAULT 1, last_heartbeat timestamptz NOT NULL DEFAULT now())",
    )
    .await;
    let mut config = rig.config(&["books"]);
    config.cdc.publication.tables.push(Table::new(id("beat")));
    config.cdc.heartbeat = Some(Heartbeat { table: id("beat"), interval: Duration::from_millis(50) });
    let engine = rig.run(config).await;
    let begin = rig.confirmed().await;
    wait_until("the heartbeat moves the slot", LIMIT, || async { rig.confirmed().await > begin }).await;

    rig.hold(1);
    rig.sql("INSERT INTO books VALUES (1)").await;
    let commit = rig.position().await;
    rig.until_held().await;
    let beats = async {
        let mut writers = BTreeSet::new();
        while writers.len() < 10 {
            writers.insert(rig.text("SELECT xmin::text FROM beat").await);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LIMIT, beats).await.expect("there are no ten beats");
    // The server was told of a position that lies behind the beats, and not that it may forget the change.
    let told = format!(
        "SELECT count(*) FROM pg_stat_replication r JOIN pg_replication_slots s ON s.active_pid = r.pid
         WHERE s.slot_name = '{}' AND r.write_lsn > '{commit}'",
        rig.name
    );
    wait_until("the beats have arrived", LIMIT, || async { rig.count(&told).await == 1 }).await;
    assert!(rig.confirmed().await < commit, "a beat acknowledged a change that waits");
    rig.store.clear_faults();
    rig.equal("books").await;
    // Of an idle database nothing is written, of this one much: it is confirmed although nothing of it is published.
    rig.sql("INSERT INTO others SELECT generate_series(1, 1000)").await;
    rig.delivered().await;
    stop(engine).await;
}

/// Conditions filter the copy. A table's own takes the place of the common one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conditions_filter_the_copy_only() {
    let rig = Rig::new().await;
    for name in ["a", "b"] {
        rig.sql(&format!("CREATE TABLE {name} (id int PRIMARY KEY, action text); INSERT INTO {name} VALUES (1, 'DELETE'), (2, 'x;'), (3, NULL)"))
            .await;
    }
    let mut config = rig.config(&["a", "b"]);
    config.cdc.snapshot.query_condition = Some("action <> 'DELETE' OR action IS NULL".into());
    config.cdc.snapshot.tables = config.cdc.publication.tables.clone();
    config.cdc.snapshot.tables[1].query_condition = Some("action = 'DELETE' -- not the others".into());
    let engine = rig.run(config).await;
    assert_eq!(rig.documents("a").into_keys().collect::<Vec<_>>(), ["2", "3"]);
    assert_eq!(rig.documents("b").into_keys().collect::<Vec<_>>(), ["1"]);
    rig.sql("INSERT INTO a VALUES (4, 'DELETE')").await;
    rig.delivered().await;
    assert_eq!(rig.documents("a").into_keys().collect::<Vec<_>>(), ["2", "3", "4"]);
    stop(engine).await;
}

/// However the database prints its values for others, and however far their years are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn settings_of_the_database_change_no_document() {
    let rig = Rig::new().await;
    for setting in [
        "datestyle = 'SQL, DMY'",
        "intervalstyle = 'postgres_verbose'",
        "bytea_output = 'escape'",
        "timezone = 'Asia/Tokyo'",
        "extra_float_digits = 0",
        "standard_conforming_strings = off",
        "search_path = ''",
    ] {
        rig.sql(&format!("ALTER DATABASE {} SET {setting}", rig.name)).await;
    }
    rig.sql(
        "SET intervalstyle = 'iso_8601'; SET extra_float_digits = 3;
             CREATE TABLE v (id int PRIMARY KEY, d date, s timestamp, z timestamptz, i interval, f float8, r float4)",
    )
    .await;
    let row =
        "'2024-02-03', '12024-02-03 04:05:06.7', '9999-12-31 23:59:59+00', '1 year 2 days 03:04:05', 0.1 + 0.2, 1.1";
    rig.sql(&format!("INSERT INTO v VALUES (1, {row}); CREATE TABLE bytes (id int PRIMARY KEY, b bytea)")).await;
    rig.sql("INSERT INTO bytes VALUES (1, '\\x00ff5c0a')").await;
    let engine = rig.run(rig.config(&["v", "bytes"])).await;
    rig.sql(&format!("INSERT INTO v VALUES (2, {row}); INSERT INTO bytes VALUES (2, '\\x00ff5c0a')")).await;
    rig.equal("v").await;
    for (id, document) in rig.documents("bytes") {
        assert_eq!(document["b"], "AP9cCg==", "{id}");
    }
    assert_eq!(rig.documents("bytes").len(), 2);
    stop(engine).await;
}

/// A table whose name begins as that of another is not the other's: its rows go nowhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_that_begins_alike_is_another_table() {
    let rig = Rig::new().await;
    for name in ["orders", "orders_archive", "orders_2024"] {
        rig.sql(&format!("CREATE TABLE {name} (id int PRIMARY KEY, state text)")).await;
    }
    let mut config = rig.config(&["orders"]);
    config.cdc.publication.tables.extend([Table::new(id("orders_archive")), Table::new(id("orders_2024"))]);
    let engine = rig.run(config).await;
    rig.sql("INSERT INTO orders VALUES (1, 'new'); INSERT INTO orders_archive VALUES (1, 'old'), (2, 'old'); DELETE FROM orders_archive;
             INSERT INTO orders_2024 VALUES (1, 'old')")
        .await;
    rig.equal("orders").await;
    stop(engine).await;
}

/// Keys of any kind and any distance, and names that have to be quoted: as many chunks as pages ask for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_far_apart_and_names_that_need_quotes() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE sparse (id int8 PRIMARY KEY); INSERT INTO sparse VALUES (-9223372036854775808), (1), (9223372036854775807);
             CREATE TABLE texts (id text PRIMARY KEY, n int); INSERT INTO texts SELECT 'k' || n, n FROM generate_series(1, 200) n;
             CREATE TABLE \"Mixed.Case'\"\"\" (\"id\" int PRIMARY KEY, \"userId\" int, \"select\" text);
             INSERT INTO \"Mixed.Case'\"\"\" VALUES (1, 2, 'x'); ANALYZE")
        .await;
    let odd = "Mixed.Case'\"";
    let mut config = rig.config(&["sparse", "texts", odd]);
    config.cdc.snapshot.chunk_size = 1;
    let index = "odd".to_owned();
    config.elasticsearch.table_index_mapping.insert(id(odd), index);
    let engine = rig.run(config).await;
    rig.sql("INSERT INTO sparse VALUES (0); DELETE FROM texts WHERE n < 50; INSERT INTO \"Mixed.Case'\"\"\" VALUES (2, 3, NULL)").await;
    rig.equal("sparse").await;
    rig.equal_now("texts").await;
    let documents = rig.documents("odd");
    assert_eq!(documents.len(), 2);
    assert_eq!(documents["2"], json!({"id": 2, "userId": 3, "select": null}));
    let chunks = "SELECT count(*) FROM cdc_snapshot_chunks WHERE table_name = 'sparse'";
    assert_eq!(rig.count(chunks).await, 1);
    stop(engine).await;
}

/// The ledger lies in the schema `public` also where the user has one of its own name, and a copy made again touches no
/// job of another slot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ledger_is_found_again_and_holds_other_jobs() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE books (id int PRIMARY KEY); INSERT INTO books VALUES (1); CREATE SCHEMA postgres").await;
    let engine = rig.run(rig.config(&["books"])).await;
    rig.equal("books").await;
    stop(engine).await;
    rig.sql("SET search_path = public; INSERT INTO cdc_snapshot_job (slot_name, snapshot_id, snapshot_lsn, started_at, completed)
             VALUES ('another', 'x', '0/1', now(), true);
             INSERT INTO cdc_snapshot_chunks (slot_name, table_schema, table_name, chunk_index, chunk_start, chunk_size, status)
             VALUES ('another', 'public', 'books', 0, 0, 10, 'completed')")
        .await;
    let others =
        "SELECT (SELECT string_agg(j::text, ';') FROM cdc_snapshot_job j WHERE slot_name = 'another') || '/' ||
                         (SELECT string_agg(c::text, ';') FROM cdc_snapshot_chunks c WHERE slot_name = 'another')";
    let before = rig.text(others).await;
    let copied = format!("SELECT started_at::text FROM cdc_snapshot_job WHERE slot_name = '{}'", rig.name);
    let first = rig.text(&copied).await;
    let engine = rig.run(rig.config(&["books"])).await;
    assert_eq!(rig.text(&copied).await, first, "it was copied a second time");
    stop(engine).await;
    let mut config = rig.config(&["books"]);
    config.cdc.snapshot.resnapshot = true;
    let engine = rig.run(config).await;
    rig.equal("books").await;
    assert_eq!(rig.text(others).await, before);
    stop(engine).await;
}

/// A document that Elasticsearch refuses is one document: it is kept, and the others of its bulk arrive, in copy and stream.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_refused_document_holds_up_no_other() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE books (id int PRIMARY KEY); INSERT INTO books SELECT generate_series(1, 100)").await;
    let refuse =
        Effect::RejectItems { status: 400, kind: None, every: 0, ids: ["7".to_owned(), "107".to_owned()].into() };
    rig.store.inject(Fault::new(refuse));
    let engine = rig.run(rig.config(&["books"])).await;
    rig.sql("INSERT INTO books SELECT generate_series(101, 200)").await;
    rig.delivered().await;
    let documents = rig.documents("books");
    assert_eq!(documents.len(), 198);
    assert!(!documents.contains_key("7") && !documents.contains_key("107"));
    assert_eq!(engine.status().sink.rejected, 2, "{:?}", engine.status().sink);
    stop(engine).await;
}

/// Operations of a handler on one document are all sent, in their order: none takes the place of another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_operation_of_a_handler_is_sent() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE clicks (id int PRIMARY KEY)").await;
    let handler = |change: &Change<'_>| {
        let id = change.new.as_ref().and_then(|row| row.get("id")).unwrap();
        vec![Action::script_update("counter", json!({"doc": {(format!("n{id}")): id}, "doc_as_upsert": true}))]
    };
    let engine = rig.start_with(rig.config(&["clicks"]), Some(Arc::new(handler)));
    live(&engine).await;
    rig.sql("INSERT INTO clicks VALUES (1), (2), (3)").await;
    rig.delivered().await;
    assert_eq!(rig.documents("clicks")["counter"], json!({"n1": 1, "n2": 2, "n3": 3}));
    stop(engine).await;
}

/// The same in mode `snapshot_only`, with a list of columns for each table.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn conditions_and_columns_of_a_copy_alone() {
    let rig = Rig::new().await;
    for name in ["a", "b"] {
        rig.sql(&format!("CREATE TABLE {name} (id int PRIMARY KEY, x int, y int); INSERT INTO {name} SELECT n, n, n FROM generate_series(1, 15) n"))
            .await;
    }
    let mut config = rig.config(&["a", "b"]);
    config.cdc.snapshot.mode = Mode::SnapshotOnly;
    config.cdc.snapshot.tables = config.cdc.publication.tables.clone();
    config.cdc.snapshot.tables[0].columns = vec!["id".into(), "x".into()];
    config.cdc.snapshot.tables[1].columns = vec!["y".into(), "id".into()];
    config.cdc.snapshot.tables[1].query_condition = Some("id <= 5".into());
    ended(&mut rig.start(config)).await.unwrap();
    assert_eq!(rig.documents("a").len(), 15);
    assert_eq!(rig.documents("a")["7"], json!({"id": 7, "x": 7}));
    assert_eq!(rig.documents("b").len(), 5);
    assert_eq!(rig.documents("b")["5"], json!({"id": 5, "y": 5}));
}

/// Chunks that an end left in the ledger without their job: the copy is made anew.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn chunks_without_a_job_are_in_nobodys_way() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    stop(rig.run(rig.config(&["books"])).await).await;
    rig.sql(&format!("SELECT pg_drop_replication_slot('{}'); DELETE FROM cdc_snapshot_job", rig.name)).await;
    rig.sql("UPDATE cdc_snapshot_chunks SET status = 'pending', claimed_by = 'nobody'; UPDATE books SET title = 'new' WHERE id = 1").await;
    let engine = rig.run(rig.config(&["books"])).await;
    rig.equal("books").await;
    assert_eq!(rig.count("SELECT count(*) FROM cdc_snapshot_chunks WHERE status <> 'completed'").await, 0);
    stop(engine).await;
}

/// A ledger without the columns that later versions of the reference added to it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ledger_of_an_older_version() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    rig.sql(
        "CREATE TABLE cdc_snapshot_job (slot_name text PRIMARY KEY, snapshot_id text NOT NULL, snapshot_lsn text NOT NULL,
             started_at timestamp NOT NULL, completed boolean DEFAULT false, total_chunks int NOT NULL DEFAULT 0,
             completed_chunks int NOT NULL DEFAULT 0);
         CREATE TABLE cdc_snapshot_chunks (id serial PRIMARY KEY, slot_name text NOT NULL, table_schema text NOT NULL,
             table_name text NOT NULL, chunk_index int NOT NULL, chunk_start bigint NOT NULL, chunk_size bigint NOT NULL,
             status text NOT NULL DEFAULT 'pending', claimed_by text, claimed_at timestamp, heartbeat_at timestamp,
             completed_at timestamp, rows_processed bigint DEFAULT 0,
             UNIQUE (slot_name, table_schema, table_name, chunk_index));
         INSERT INTO cdc_snapshot_job VALUES ('another', 'x', '0/1', now(), true, 1, 1)",
    )
    .await;
    let engine = rig.run(rig.config(&["books"])).await;
    rig.equal("books").await;
    stop(engine).await;
    assert_eq!(rig.count("SELECT count(*) FROM cdc_snapshot_job WHERE completed").await, 2);
}
