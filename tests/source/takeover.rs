//! What go-pq-cdc-elasticsearch left is taken over.

use crate::support::pipeline::{Rig, stop};
use crate::support::process::http;
use crate::{advance, gap};
use serde_json::json;

/// What go-pq-cdc-elasticsearch leaves: its tables with its columns only, publication and slot, and documents whose
/// versions Elasticsearch has counted itself.
async fn reference(rig: &Rig, completed: bool) {
    rig.sql(
        "CREATE TABLE cdc_snapshot_job (slot_name TEXT PRIMARY KEY, snapshot_id TEXT NOT NULL, snapshot_lsn TEXT NOT NULL,
             started_at TIMESTAMP NOT NULL, completed BOOLEAN DEFAULT FALSE, total_chunks INT NOT NULL DEFAULT 0,
             completed_chunks INT NOT NULL DEFAULT 0);
         CREATE TABLE cdc_snapshot_chunks (id SERIAL PRIMARY KEY, slot_name TEXT NOT NULL, table_schema TEXT NOT NULL,
             table_name TEXT NOT NULL, chunk_index INT NOT NULL, chunk_start BIGINT NOT NULL, chunk_size BIGINT NOT NULL,
             range_start BIGINT, range_end BIGINT, block_start BIGINT, block_end BIGINT,
             is_last_chunk BOOLEAN NOT NULL DEFAULT FALSE, partition_strategy TEXT NOT NULL DEFAULT 'offset',
             status TEXT NOT NULL DEFAULT 'pending', claimed_by TEXT, claimed_at TIMESTAMP, heartbeat_at TIMESTAMP,
             completed_at TIMESTAMP, rows_processed BIGINT DEFAULT 0,
             UNIQUE (slot_name, table_schema, table_name, chunk_index));
         CREATE INDEX idx_chunks_claim ON cdc_snapshot_chunks (slot_name, status, claimed_at)
             WHERE status IN ('pending', 'in_progress');
         CREATE INDEX idx_chunks_status ON cdc_snapshot_chunks (slot_name, status);
         CREATE TABLE books (id int PRIMARY KEY, title text);
         INSERT INTO books SELECT n, 'row ' || n FROM generate_series(1, 20) n",
    )
    .await;
    let name = &rig.name;
    rig.sql(&format!("CREATE PUBLICATION {name} FOR TABLE books")).await;
    rig.sql(&format!("SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')")).await;
    let (done, second, rows) = if completed { (2, "completed", 10) } else { (1, "in_progress", 0) };
    rig.sql(&format!(
        "INSERT INTO cdc_snapshot_job VALUES
             ('{name}', '00000003-0000001B-1', pg_current_wal_lsn()::text, now() AT TIME ZONE 'UTC', {completed}, 2, {done});
         INSERT INTO cdc_snapshot_chunks (slot_name, table_schema, table_name, chunk_index, chunk_start, chunk_size,
             range_start, range_end, is_last_chunk, partition_strategy, status, claimed_by, claimed_at, heartbeat_at, rows_processed)
         VALUES ('{name}', 'public', 'books', 0, 0, 10, 1, 10, FALSE, 'integer_range', 'completed', 'host-1', now(), now(), 10),
                ('{name}', 'public', 'books', 1, 10, 10, 11, 20, TRUE, 'integer_range', '{second}', 'host-1', now(), now(), {rows})"
    ))
    .await;
    // Written again and again: versions 1 to 3.
    let last = if completed { 20 } else { 13 };
    for id in (1..=last).chain(1..=7).chain(1..=3) {
        index(rig, id, &format!("row {id}")).await;
    }
    assert_eq!((rig.version("books", "1"), rig.version("books", "5"), rig.version("books", "9")), (3, 2, 1));
    // Since then nobody streamed.
    rig.sql(
        "UPDATE books SET title = 'changed' WHERE id IN (1, 12); DELETE FROM books WHERE id IN (2, 11, 20);
         INSERT INTO books VALUES (21, 'new'); UPDATE books SET id = 30 WHERE id = 3",
    )
    .await;
}

async fn index(rig: &Rig, id: i32, title: &str) {
    let action = json!({"index": {"_index": "books", "_id": id.to_string()}});
    let body = format!("{action}\n{}\n", json!({"id": id, "title": title}));
    let url = format!("{}/_bulk", rig.store.url().trim_end_matches('/'));
    let answer = http().post(url).header("content-type", "application/x-ndjson").body(body).send().await.unwrap();
    let answer = answer.text().await.unwrap();
    assert!(answer.contains("\"errors\":false"), "{answer}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_completed_job_of_the_reference_is_streamed_on() {
    let rig = Rig::new().await;
    reference(&rig, true).await;
    let engine = rig.run(rig.config(&["books"])).await;
    rig.equal("books").await;
    // Nothing was copied: documents without a change are as they were.
    let status = engine.status();
    assert_eq!((rig.version("books", "5"), rig.version("books", "9")), (2, 1));
    assert_eq!((status.tables[0].rows_copied, status.sink.superseded, status.sink.rejected), (0, 0, 0));
    let said = |text: &str| status.notices.iter().any(|notice| notice.text.contains(text));
    assert!(said("made by another program (go-pq-cdc-elasticsearch)") && said("taken over"), "{:?}", status.notices);
    rig.sql("UPDATE books SET title = 'later' WHERE id IN (5, 9); DELETE FROM books WHERE id = 6").await;
    rig.equal("books").await;
    stop(engine).await;
    // From now on the slot is remembered.
    rig.sql("DELETE FROM books WHERE id = 7").await;
    advance(&rig).await;
    gap(&mut rig.start(rig.config(&["books"])), &["somebody else moved it"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_half_done_job_of_the_reference_is_begun_again() {
    let rig = Rig::new().await;
    reference(&rig, false).await;
    // Whose row was gone before the slot was made.
    index(&rig, 99, "stale").await;
    let engine = rig.run(rig.config(&["books"])).await;
    rig.equal("books").await;
    let status = engine.status();
    assert_eq!(status.tables[0].rows_copied, 18);
    let said = |text: &str| status.notices.iter().any(|notice| notice.text.contains(text));
    assert!(
        said("starts from its beginning") && said("another program (go-pq-cdc-elasticsearch)"),
        "{:?}",
        status.notices
    );
    rig.sql("UPDATE books SET title = 'later' WHERE id IN (5, 9); DELETE FROM books WHERE id = 6").await;
    rig.equal("books").await;
    stop(engine).await;
}
