//! Tables that are altered, truncated or taken apart while they are copied.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use pgtide::engine::{Command, Engine, Notice, Phase, TableState};
use pgtide::table::TableId;
use support::pipeline::{LIMIT, Rig, live, stop};
use support::wait_until;
use tokio_postgres::Client;

fn noticed(engine: &Engine, text: &str) -> bool {
    engine.status().notices.iter().any(|notice| notice.text.contains(text))
}

async fn again(engine: &Engine, name: &str) {
    engine.control().send(Command::Resnapshot(TableId::new("public", name))).await.unwrap();
}

async fn copied_again(engine: &Engine) {
    wait_until("it is copied again", LIMIT, || async {
        noticed(engine, "copied again") && engine.status().tables.iter().all(|table| table.state == TableState::Live)
    })
    .await;
}

/// Ends the session that holds the snapshot.
async fn end_keeper(rig: &Rig) {
    let keepers =
        "FROM pg_stat_activity WHERE application_name = 'pgtide snapshot keeper' AND datname = current_database()";
    assert_eq!(rig.count(&format!("SELECT count(pg_terminate_backend(pid)) {keepers}")).await, 1);
    wait_until("the keeper is gone", LIMIT, || async { rig.count(&format!("SELECT count(*) {keepers}")).await == 0 })
        .await;
}

/// A transaction that PostgreSQL waits for before it makes a slot.
async fn open_transaction(rig: &Rig) -> Client {
    let client = rig.connect().await;
    client.batch_execute("CREATE TABLE IF NOT EXISTS others (n int)").await.unwrap();
    client.batch_execute("BEGIN; INSERT INTO others VALUES (1)").await.unwrap();
    client
}

/// A slot is asked for, and waits.
async fn slot_waits(rig: &Rig) {
    let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND backend_type = 'walsender'
               AND wait_event_type = 'Lock'";
    wait_until("a slot is being made", LIMIT, || async { rig.count(sql).await > 0 }).await;
}

const PARTS: &str = "CREATE TABLE parts (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
    CREATE TABLE parts_1 PARTITION OF parts FOR VALUES FROM (0) TO (1000);
    CREATE TABLE parts_2 PARTITION OF parts FOR VALUES FROM (1000) TO (2000);
    INSERT INTO parts SELECT n, 'row ' || n FROM generate_series(1, 100) n;
    INSERT INTO parts SELECT n, 'row ' || n FROM generate_series(1001, 1100) n";

/// Rows that no older snapshot sees, although none of them was changed.
const REWRITE: &str =
    "BEGIN; ALTER TABLE parts DETACH PARTITION parts_2; ALTER TABLE parts_2 ALTER v TYPE text USING v || '';
    ALTER TABLE parts ATTACH PARTITION parts_2 FOR VALUES FROM (1000) TO (2000); COMMIT";

fn parts(rig: &Rig) -> pgtide::config::Config {
    let mut config = rig.config(&["parts"]);
    config.cdc.publication.tables[0].partitioned = true;
    config.cdc.snapshot.workers = Some(1);
    config.elasticsearch.batch_size_limit = 10;
    config
}

/// A copy whose keeper has ended while its first bulk is on its way.
async fn copy_without_keeper() -> (Rig, Engine) {
    let rig = Rig::new().await;
    rig.sql(PARTS).await;
    rig.hold(1);
    let engine = rig.start(parts(&rig));
    rig.until_held().await;
    end_keeper(&rig).await;
    (rig, engine)
}

/// Without the keeper's locks a table that no worker has read yet can be rewritten, and is empty to the old snapshot.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_rewritten_behind_a_dead_keeper() {
    let (rig, engine) = copy_without_keeper().await;
    rig.sql("UPDATE parts SET v = 'changed' WHERE id = 1001").await;
    rig.sql(REWRITE).await;
    rig.store.clear_faults();
    live(&engine).await;
    rig.equal("parts").await;

    // Where documents are there already, their rows would be missed and the documents removed.
    rig.hold(1);
    again(&engine, "parts").await;
    rig.until_held().await;
    end_keeper(&rig).await;
    rig.sql(REWRITE).await;
    rig.store.clear_faults();
    copied_again(&engine).await;
    rig.equal("parts").await;
    stop(engine).await;
}

/// Nothing is copied under a snapshot whose locks are gone, although workers that have it could go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_keeper_ends_the_copy() {
    let (rig, engine) = copy_without_keeper().await;
    wait_until("the copy is begun again", LIMIT, || async { noticed(&engine, "the session that held it has ended") })
        .await;
    rig.store.clear_faults();
    live(&engine).await;
    rig.equal("parts").await;
    stop(engine).await;
}

/// PostgreSQL makes a slot once all transactions have ended that are open now: what was looked at before may be
/// altered by then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_altered_while_the_slot_is_made() {
    let rig = Rig::new().await;
    rig.sql(PARTS).await;
    rig.sql("CREATE TABLE a (id int PRIMARY KEY, s text, w int); INSERT INTO a SELECT n, 's', n FROM generate_series(1, 20) n")
        .await;
    let mut config = rig.config(&["a", "parts"]);
    config.cdc.publication.tables[1].partitioned = true;
    let open = open_transaction(&rig).await;
    let engine = rig.start(config);
    slot_waits(&rig).await;
    rig.sql("ALTER TABLE a ADD n int DEFAULT 5; ALTER TABLE a DROP w").await;
    rig.sql("CREATE TABLE parts_3 PARTITION OF parts FOR VALUES FROM (2000) TO (3000)").await;
    rig.sql("INSERT INTO parts SELECT n, 'row ' || n FROM generate_series(2001, 2100) n").await;
    open.batch_execute("COMMIT").await.unwrap();
    live(&engine).await;
    rig.equal("a").await;
    rig.equal("parts").await;

    // The same for a copy made again.
    let open = open_transaction(&rig).await;
    let told = || {
        let waiting = |notice: &&Notice| notice.text.starts_with("waiting for PostgreSQL to make the slot");
        engine.status().notices.iter().filter(waiting).count()
    };
    let before = told();
    again(&engine, "parts").await;
    slot_waits(&rig).await;
    wait_until("it says what the copy waits for", LIMIT, || async { told() > before }).await;
    rig.sql("ALTER TABLE parts DETACH PARTITION parts_1").await;
    rig.sql("CREATE TABLE parts_4 (LIKE parts INCLUDING ALL); INSERT INTO parts_4 SELECT n, 'x' FROM generate_series(3001, 3050) n")
        .await;
    rig.sql("ALTER TABLE parts ATTACH PARTITION parts_4 FOR VALUES FROM (3000) TO (4000)").await;
    open.batch_execute("COMMIT").await.unwrap();
    copied_again(&engine).await;
    rig.equal("parts").await;
    assert_eq!(engine.status().phase, Phase::Streaming);
    stop(engine).await;
}

/// A partition that is detached while the copy stands still: nothing in the stream says that its rows are gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_detached_before_the_copy_goes_on() {
    // In the middle of its table, and after it.
    for (bulks, done) in [(12, 1), (22, 2)] {
        let rig = Rig::new().await;
        rig.sql(PARTS).await;
        rig.sql("CREATE TABLE zebras (id int PRIMARY KEY); INSERT INTO zebras SELECT generate_series(1, 100)").await;
        let mut config = rig.config(&["parts", "zebras"]);
        config.cdc.publication.tables[0].partitioned = true;
        config.cdc.snapshot.workers = Some(1);
        config.elasticsearch.batch_size_limit = 10;
        rig.hold_after(bulks, 1);
        let engine = rig.start(config.clone());
        rig.until_held().await;
        stop(engine).await;
        rig.store.clear_faults();
        assert_eq!(rig.count("SELECT count(*) FROM cdc_snapshot_chunks WHERE status = 'completed'").await, done);
        rig.sql("ALTER TABLE parts DETACH PARTITION parts_1").await;
        let engine = rig.run(config).await;
        rig.equal("parts").await;
        rig.equal("zebras").await;
        assert_eq!(rig.documents("parts").len(), 100);
        stop(engine).await;
    }
}
