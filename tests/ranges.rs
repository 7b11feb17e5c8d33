//! `snapshotPartitionStrategy: integer_range`: the copy by ranges of the key.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use pgtide::config::{Config, Strategy};
use pgtide::engine::Command;
use pgtide::store::{Effect, Fault};
use support::pipeline::{LIMIT, Rig, live, stop};
use support::wait_until;

fn by_key(rig: &Rig, tables: &[&str], chunk: u64) -> Config {
    let mut config = rig.config(tables);
    config.cdc.publication.tables.iter_mut().for_each(|table| table.strategy = Strategy::IntegerRange);
    config.cdc.snapshot.chunk_size = chunk;
    config
}

type Chunk = (String, Option<i64>, Option<i64>, i64);

async fn chunks(rig: &Rig, table: &str) -> Vec<Chunk> {
    let sql = "SELECT partition_strategy, range_start, range_end, rows_processed FROM cdc_snapshot_chunks
               WHERE table_name = $1 ORDER BY chunk_index";
    let rows = rig.client.query(sql, &[&table]).await.unwrap();
    rows.iter().map(|row| (row.get(0), row.get(1), row.get(2), row.get(3))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ranges_hold_about_as_many_rows_each_however_the_keys_lie() {
    let rig = Rig::new().await;
    // Negative, dense, with a hole of 2^62, and both ends of bigint.
    rig.sql("CREATE TABLE odd (\"The Id\" bigint PRIMARY KEY, id text GENERATED ALWAYS AS ('x') STORED, v text)").await;
    rig.sql("INSERT INTO odd (\"The Id\", v) SELECT n, repeat('v', 100) FROM generate_series(-500, 499) n").await;
    rig.sql("INSERT INTO odd (\"The Id\") VALUES (-9223372036854775808), (4611686018427387904), (9223372036854775807)")
        .await;
    rig.sql("ANALYZE odd").await;
    let engine = rig.run(by_key(&rig, &["odd"], 100)).await;
    let chunks = chunks(&rig, "odd").await;
    assert!((9..=11).contains(&chunks.len()), "{chunks:?}");
    assert!(chunks.iter().all(|chunk| chunk.0 == "integer_range" && (40..250).contains(&chunk.3)), "{chunks:?}");
    assert_eq!(chunks.iter().map(|chunk| chunk.3).sum::<i64>(), 1_003);
    assert_eq!((chunks[0].1, chunks[chunks.len() - 1].2), (None, None), "both ends are open");
    let documents = rig.documents("odd");
    assert_eq!(documents.len(), 1_003);
    assert!(documents.contains_key("-9223372036854775808") && documents.contains_key("9223372036854775807"));
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_has_no_integer_key_is_copied_by_pages() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE words (id text PRIMARY KEY); INSERT INTO words VALUES ('a'), ('b')").await;
    rig.sql("CREATE TABLE empty (id int PRIMARY KEY)").await;
    rig.sql("CREATE TABLE pair (a int, id int, PRIMARY KEY (a, id)); INSERT INTO pair VALUES (1, 2)").await;
    let engine = rig.run(by_key(&rig, &["words", "empty", "pair"], 100)).await;
    assert_eq!(chunks(&rig, "words").await, [("ctid_block".to_owned(), None, None, 2)]);
    assert_eq!(chunks(&rig, "pair").await, [("ctid_block".to_owned(), None, None, 1)]);
    assert_eq!(chunks(&rig, "empty").await, [("integer_range".to_owned(), None, None, 0)]);
    let notices = engine.status().notices;
    let said = |table: &str| {
        notices.iter().any(|notice| notice.text.starts_with(&format!("public.{table}: integer_range needs a key")))
    };
    assert!(said("words") && said("pair") && !said("empty"), "{notices:?}");
    rig.equal("words").await;
    stop(engine).await;
}

/// Ended in the middle, changed meanwhile, gone on with, and copied again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_gone_on_with() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE books (id int PRIMARY KEY, title text) PARTITION BY RANGE (id)").await;
    rig.sql("CREATE TABLE low PARTITION OF books FOR VALUES FROM (0) TO (300)").await;
    rig.sql("CREATE TABLE high PARTITION OF books FOR VALUES FROM (300) TO (100000)").await;
    rig.sql(
        "INSERT INTO books SELECT n, rpad('x', 500, 'y') FROM generate_series(1, 600) n; ANALYZE low; ANALYZE high",
    )
    .await;
    let mut config = by_key(&rig, &["books"], 20);
    config.cdc.publication.tables[0].partitioned = true;
    config.cdc.snapshot.workers = Some(2);
    config.elasticsearch.batch_size_limit = 10;
    rig.store.inject(Fault::new(Effect::Delay { milliseconds: 20 }));
    let engine = rig.start(config.clone());
    wait_until("rows are copied", LIMIT, || async { engine.status().tables[0].rows_done > 100 }).await;
    stop(engine).await;
    let done = "SELECT count(*) FROM cdc_snapshot_chunks WHERE status = 'completed'";
    let before = rig.count(done).await;
    let all = rig.count("SELECT count(*) FROM cdc_snapshot_chunks").await;
    assert!(before > 0 && before < all, "{before} of {all}");
    rig.sql("UPDATE books SET id = id + 1000 WHERE id % 10 = 0; UPDATE books SET title = 'new' WHERE id % 7 = 0").await;
    rig.sql("DELETE FROM books WHERE id % 13 = 0").await;
    rig.store.clear_faults();
    let engine = rig.run(config).await;
    rig.equal("books").await;
    engine.control().send(Command::Resnapshot(pgtide::table::TableId::new("public", "books"))).await.unwrap();
    wait_until("it is copied again", LIMIT, || async { engine.status().tables[0].resnapshots_ended == 1 }).await;
    live(&engine).await;
    rig.equal("books").await;
    stop(engine).await;
}
