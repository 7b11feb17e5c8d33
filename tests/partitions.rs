//! Partitions that come, go and are emptied: the stream says nothing of their rows.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::Duration;

use pgtide::config::Config;
use pgtide::engine::{Command, Engine};
use pgtide::table::TableId;
use support::pipeline::{LIMIT, Rig, live, stop};
use support::wait_until;

const PARTS: &str = "CREATE TABLE parts (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
    CREATE TABLE part_0 PARTITION OF parts FOR VALUES FROM (0) TO (100);
    CREATE TABLE part_1 PARTITION OF parts FOR VALUES FROM (100) TO (200);
    INSERT INTO parts SELECT n, 'row ' || n FROM generate_series(1, 150) n";

/// Partitions that the ledger knows as they are.
const KNOWN: &str = "SELECT count(*) FROM cdc_snapshot_tables, jsonb_array_elements(definition::jsonb -> 'leaves') l
                     JOIN pg_class c ON c.oid = (l ->> 'oid')::oid AND c.relfilenode = (l ->> 'filenode')::oid";

/// What the stream does not tell, and what is said of it.
const SILENT: [(&str, &str); 9] = [
    (
        "CREATE TABLE part_2 (LIKE parts INCLUDING ALL); INSERT INTO part_2 SELECT n, 'x' FROM generate_series(200, 220) n;
         ALTER TABLE parts ATTACH PARTITION part_2 FOR VALUES FROM (200) TO (300)",
        "a partition was attached",
    ),
    ("ALTER TABLE parts DETACH PARTITION part_1", "detached or dropped"),
    ("DROP TABLE part_1", "detached or dropped"),
    (
        "ALTER TABLE parts DETACH PARTITION part_1; UPDATE part_1 SET v = 'apart'; DELETE FROM part_1 WHERE id < 110;
         ALTER TABLE parts ATTACH PARTITION part_1 FOR VALUES FROM (100) TO (200)",
        "detached and attached again",
    ),
    ("TRUNCATE part_1", "truncated"),
    ("TRUNCATE part_1; INSERT INTO parts SELECT n, 'new' FROM generate_series(110, 120) n; VACUUM ANALYZE part_1", "truncated"),
    (
        // Between two looks.
        "BEGIN; ALTER TABLE part_1 SET UNLOGGED; UPDATE part_1 SET v = 'unheard'; DELETE FROM part_1 WHERE id < 110;
         ALTER TABLE part_1 SET LOGGED; COMMIT",
        "unlogged for a while",
    ),
    (
        // A tree of its own.
        "CREATE TABLE sub (LIKE parts INCLUDING ALL) PARTITION BY RANGE (id);
         CREATE TABLE sub_1 PARTITION OF sub FOR VALUES FROM (300) TO (350);
         INSERT INTO sub SELECT n, 's' FROM generate_series(300, 310) n;
         ALTER TABLE parts ATTACH PARTITION sub FOR VALUES FROM (300) TO (400)",
        "a partition was attached",
    ),
    (
        // Moved from one to the other without the stream.
        "BEGIN; ALTER TABLE parts DETACH PARTITION part_0; UPDATE part_0 SET id = id + 1000, v = 'moved';
         ALTER TABLE parts ATTACH PARTITION part_0 FOR VALUES FROM (1000) TO (1100); COMMIT",
        "detached and attached again",
    ),
];

fn config(rig: &Rig, via_root: bool) -> Config {
    let mut config = rig.config(&["parts"]);
    config.cdc.publication.tables[0].partitioned = via_root;
    config
}

/// Every statement by itself: VACUUM takes no transaction.
async fn each(rig: &Rig, sql: &str) {
    if sql.starts_with("BEGIN") {
        return rig.sql(sql).await;
    }
    for statement in sql.split("; ") {
        rig.sql(statement).await;
    }
}

fn noticed(engine: &Engine, text: &str) -> bool {
    engine.status().notices.iter().any(|notice| notice.text.contains(text))
}

fn copied(engine: &Engine) -> bool {
    noticed(engine, "copied again, ")
}

async fn quiet(rig: &Rig, engine: &Engine) {
    rig.becomes_equal("parts").await;
    wait_until("nothing is copied", LIMIT, || async { engine.status().tables.iter().all(|table| !table.resnapshot) })
        .await;
    rig.sql("UPDATE parts SET v = v || '!'").await;
    rig.equal("parts").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_stream_does_not_tell_is_noticed_while_it_runs() {
    for via_root in [true, false] {
        for (sql, said) in SILENT {
            let rig = Rig::new().await;
            rig.sql(PARTS).await;
            let engine = rig.run(config(&rig, via_root)).await;
            each(&rig, sql).await;
            wait_until(&format!("{sql}: it is noticed"), LIMIT, || async { noticed(&engine, said) }).await;
            quiet(&rig, &engine).await;
            stop(engine).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_stream_does_not_tell_is_noticed_at_the_next_start() {
    for via_root in [true, false] {
        for (sql, said) in SILENT {
            let rig = Rig::new().await;
            rig.sql(PARTS).await;
            let engine = rig.run(config(&rig, via_root)).await;
            stop(engine).await;
            rig.sql("UPDATE parts SET v = 'waits' WHERE id = 120").await;
            each(&rig, sql).await;
            let engine = rig.run(config(&rig, via_root)).await;
            assert!(noticed(&engine, said), "{sql}: {:?}", engine.status().notices);
            rig.equal("parts").await;
            quiet(&rig, &engine).await;
            stop(engine).await;
        }
    }
}

/// It brings no row, but a walsender of PostgreSQL 14 that has seen its changes would send none of those to come.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_that_was_emptied_before_it_came() {
    let rig = Rig::new().await;
    rig.sql(PARTS).await;
    let engine = rig.run(config(&rig, true)).await;
    rig.sql("CREATE TABLE part_2 (LIKE parts INCLUDING ALL); INSERT INTO part_2 VALUES (200, 'x')").await;
    rig.sql("TRUNCATE part_2").await;
    rig.delivered().await;
    rig.sql("ALTER TABLE parts ATTACH PARTITION part_2 FOR VALUES FROM (200) TO (300)").await;
    wait_until("it is noted", LIMIT, || async { rig.count(KNOWN).await == 3 }).await;
    rig.sql("INSERT INTO parts VALUES (201, 'y')").await;
    rig.equal("parts").await;
    stop(engine).await;
}

/// What the stream still brings of a partition that is gone must not come back behind the sweep.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_of_a_detached_partition_that_are_on_their_way() {
    let rig = Rig::new().await;
    rig.sql(PARTS).await;
    let engine = rig.run(config(&rig, true)).await;
    // The stream's, not the copy's, which comes later.
    rig.hold(1);
    rig.sql("INSERT INTO parts SELECT n, 'late' FROM generate_series(160, 180) n").await;
    rig.until_held().await;
    rig.sql("ALTER TABLE parts DETACH PARTITION part_1").await;
    // Before 15 the copy itself waits for the stream.
    let waits = rig.count("SELECT current_setting('server_version_num')::int8").await < 150_000;
    wait_until("its chunks are copied", LIMIT, || async {
        let table = &engine.status().tables[0];
        table.resnapshot && (waits || table.rows_done == 99 && table.chunks.done() == table.chunks.len())
    })
    .await;
    let swept = async { wait_until("", LIMIT, || async { copied(&engine) }).await };
    assert!(tokio::time::timeout(Duration::from_secs(1), swept).await.is_err(), "swept before the stream had passed");
    rig.store.clear_faults();
    wait_until("it is copied again", LIMIT, || async { copied(&engine) }).await;
    rig.equal("parts").await;
    stop(engine).await;
}

/// The same where everything is copied again before the stream runs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_detached_partition_before_a_copy_from_the_beginning() {
    let rig = Rig::new().await;
    rig.sql(PARTS).await;
    let mut config = config(&rig, true);
    let engine = rig.run(config.clone()).await;
    stop(engine).await;
    rig.sql("INSERT INTO parts SELECT n, 'late' FROM generate_series(160, 180) n").await;
    rig.sql("ALTER TABLE parts DETACH PARTITION part_1; INSERT INTO parts VALUES (0, 'more')").await;
    config.cdc.snapshot.resnapshot = true;
    let engine = rig.run(config).await;
    rig.equal("parts").await;
    assert_eq!(engine.status().tables[0].resnapshots_ended, 0);
    stop(engine).await;
}

/// The same with a slot that is older than the first copy: a start may have come no further than to make it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_detached_partition_between_the_slot_and_the_first_copy() {
    let rig = Rig::new().await;
    rig.sql(PARTS).await;
    let name = &rig.name;
    rig.sql(&format!("CREATE PUBLICATION {name} FOR TABLE parts WITH (publish_via_partition_root)")).await;
    rig.sql(&format!("SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')")).await;
    rig.sql("INSERT INTO parts SELECT n, 'late' FROM generate_series(160, 180) n").await;
    rig.sql("ALTER TABLE parts DETACH PARTITION part_1; INSERT INTO parts VALUES (0, 'more')").await;
    let engine = rig.run(config(&rig, true)).await;
    rig.equal("parts").await;
    stop(engine).await;
}

/// A wish that was cancelled before its turn is not granted by the next start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wish_that_is_given_up_while_it_waits() {
    let rig = Rig::new().await;
    rig.sql(PARTS).await;
    rig.sql("CREATE TABLE books (id int PRIMARY KEY); INSERT INTO books SELECT generate_series(1, 10)").await;
    let mut config = rig.config(&["parts", "books"]);
    config.cdc.publication.tables[0].partitioned = false;
    let engine = rig.run(config.clone()).await;
    rig.hold(1);
    engine.control().send(Command::Resnapshot(TableId::new("public", "books"))).await.unwrap();
    rig.until_held().await;
    rig.sql("TRUNCATE part_1").await;
    let wishes = "SELECT count(*) FROM cdc_snapshot_chunks WHERE table_name = 'parts' AND status = 'wanted'";
    wait_until("it is wanted", LIMIT, || async { rig.count(wishes).await == 1 }).await;
    engine.control().send(Command::CancelResnapshot(TableId::new("public", "parts"))).await.unwrap();
    rig.store.clear_faults();
    wait_until("it is given up", LIMIT, || async {
        rig.count(wishes).await == 0 && engine.status().tables.iter().all(|table| !table.resnapshot)
    })
    .await;
    assert!(noticed(&engine, "public.parts: resnapshot given up by the operator"));
    stop(engine).await;
    let engine = rig.run(config).await;
    assert!(!copied(&engine), "{:?}", engine.status().notices);
    engine.control().send(Command::Resnapshot(TableId::new("public", "parts"))).await.unwrap();
    rig.becomes_equal("parts").await;
    stop(engine).await;
}

/// Partitions are made every day, and rewritten, and the stream has all of their rows: no reason to copy anything.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_stream_tells_is_not_copied_again() {
    for via_root in [true, false] {
        let rig = Rig::new().await;
        rig.sql(PARTS).await;
        let engine = rig.run(config(&rig, via_root)).await;
        rig.sql("CREATE TABLE part_2 PARTITION OF parts FOR VALUES FROM (200) TO (300)").await;
        wait_until("it is noted", LIMIT, || async { rig.count(KNOWN).await == 3 }).await;
        rig.sql("INSERT INTO parts SELECT n, 'n' FROM generate_series(200, 220) n").await;
        rig.equal("parts").await;
        // Not of rows of the last moment: what was there before the last look is the proof.
        rig.sql("VACUUM FULL part_1").await;
        wait_until("it is noted", LIMIT, || async { rig.count(KNOWN).await == 3 }).await;
        rig.sql("CREATE INDEX ON parts (v); ALTER TABLE parts ALTER v SET DEFAULT 'd'; ANALYZE parts").await;
        rig.sql("CREATE TABLE part_3 PARTITION OF parts FOR VALUES FROM (300) TO (400)").await;
        wait_until("it is noted", LIMIT, || async { rig.count(KNOWN).await == 4 }).await;
        rig.equal("parts").await;
        assert!(!copied(&engine) && !noticed(&engine, "it is copied again"), "{:?}", engine.status().notices);
        stop(engine).await;
        rig.sql("CREATE TABLE part_4 PARTITION OF parts FOR VALUES FROM (400) TO (500)").await;
        rig.sql("VACUUM FULL part_0").await;
        let again = rig.run(config(&rig, via_root)).await;
        rig.equal("parts").await;
        rig.sql("INSERT INTO parts SELECT n, 'n' FROM generate_series(400, 410) n").await;
        rig.equal("parts").await;
        assert!(!copied(&again) && !noticed(&again, "it is copied again"), "{:?}", again.status().notices);
        stop(again).await;
    }
}

/// Its partitions are copied in chunks, and no chunk is read further than Elasticsearch takes it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partitioned_table_is_copied_in_chunks_and_never_held_whole() {
    let rig = Rig::new().await;
    // 40 rows of 1 MB in each of the first two chunks.
    rig.sql(
        "CREATE TABLE parts (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
         ALTER TABLE parts ALTER v SET STORAGE EXTERNAL;
         CREATE TABLE part_0 PARTITION OF parts FOR VALUES FROM (0) TO (100) WITH (fillfactor = 25);
         CREATE TABLE part_1 PARTITION OF parts FOR VALUES FROM (100) TO (200);
         INSERT INTO parts SELECT n, repeat('large', 200000) FROM generate_series(1, 80) n;
         INSERT INTO parts VALUES (100, 'short'); ANALYZE part_0; ANALYZE part_1",
    )
    .await;
    let mut config = config(&rig, true);
    config.cdc.snapshot.workers = Some(1);
    config.cdc.snapshot.chunk_size = 40;
    config.elasticsearch.concurrent_request = 1;
    config.elasticsearch.batch_size_limit = 1;
    rig.hold(1);
    let engine = rig.start(config);
    rig.until_held().await;
    assert!(rig.count("SELECT count(*) FROM cdc_snapshot_chunks WHERE chunk_index >= 0").await > 2);
    // One that was read whole would let PostgreSQL end its COPY.
    let waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                 AND application_name = 'pgtide copy' AND wait_event = 'ClientWrite'";
    let seen = AtomicU32::new(0);
    wait_until("PostgreSQL waits for its reader, and goes on waiting", LIMIT, || async {
        let waits = rig.count(waits).await == 1;
        let times = if waits { seen.load(Relaxed) + 1 } else { 0 };
        seen.store(times, Relaxed);
        times == 30
    })
    .await;
    rig.store.clear_faults();
    live(&engine).await;
    rig.equal("parts").await;
    stop(engine).await;
}
