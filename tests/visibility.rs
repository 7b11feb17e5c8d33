//! What the stream brings before PostgreSQL shows it to anybody.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::time::Duration;

use pgtide::demo::Server;
use pgtide::engine::Phase;
use support::process::{Pipeline, Settings, StoreProcess, assert_equal, wait_confirmed};
use support::standby::Unconfirmed;
use support::{own_server, wait_until};
use tokio_postgres::Client;

const LIMIT: Duration = Duration::from_secs(60);

async fn connect(server: &Server) -> Client {
    let client = server.connect("postgres").await.unwrap();
    client.batch_execute("SET TimeZone = 'UTC'").await.unwrap();
    client
}

/// A commit that waits for a standby is decoded, and seen by nobody: the row that an UPDATE did not send whole must not
/// be read as it was before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_is_read_only_once_its_transaction_is_seen() {
    let server = own_server().await;
    let client = connect(&server).await;
    client
        .batch_execute(
            "CREATE TABLE items (id int PRIMARY KEY, note text, amount int);
             ALTER TABLE items ALTER COLUMN note SET STORAGE EXTERNAL;
             INSERT INTO items SELECT i, repeat('x', 4000), 0 FROM generate_series(1, 10) AS i; ANALYZE items",
        )
        .await
        .unwrap();
    let store = StoreProcess::start();
    let settings =
        Settings { name: "seen".into(), tables: vec!["items"], chunk_size: 100, batch_size_limit: 50, workers: 1 };
    let mut pipeline = Pipeline::new(&server.config("postgres"), &store, settings);
    pipeline.start();
    pipeline.wait("it streams", LIMIT, |status| status.phase == Phase::Streaming).await;

    let unconfirmed = Unconfirmed::begin(&client, connect(&server).await).await;
    let other = connect(&server).await;
    let change = tokio::spawn(async move {
        other.batch_execute("UPDATE items SET amount = 1 WHERE id = 1").await.unwrap();
        other
            .batch_execute(
                "BEGIN; DELETE FROM items WHERE id = 2; INSERT INTO items VALUES (2, repeat('y', 4000), 2);
                 UPDATE items SET amount = 3 WHERE id = 2; COMMIT",
            )
            .await
            .unwrap();
    });
    wait_until("the stream has brought the change, and the row is looked for or read", LIMIT, || async {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND
                   (query LIKE '%pg_visible_in_snapshot(%' OR query LIKE 'COPY (SELECT % WHERE \"id\" = %')";
        client.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) > 0
    })
    .await;
    let amount: i32 = client.query_one("SELECT amount FROM items WHERE id = 1", &[]).await.unwrap().get(0);
    assert_eq!(amount, 0, "the change is seen already: nothing was tested");
    assert!(!change.is_finished());
    unconfirmed.end(&client).await;
    change.await.unwrap();
    wait_confirmed(&client, "seen", LIMIT).await;
    assert_equal(&client, &store, "items").await;
    drop(pipeline);
    server.stop().await.unwrap();
}
