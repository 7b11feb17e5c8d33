//! Tables that change while their rows are streamed: columns and keys dropped and renamed, tables and partitions renamed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use pgtide::config::OnSchemaChange;
use pgtide::engine::{Command, Engine, Phase};
use pgtide::problem::ProblemKind;
use serde_json::json;
use support::pipeline::{LIMIT, Rig, ended, phase, stop};
use support::wait_until;

/// An SQL expression of 13 kB that does not compress.
const LARGE: &str = "(SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 400))";

async fn pause(engine: &Engine) {
    engine.control().send(Command::Pause).await.unwrap();
    phase(engine, Phase::Paused).await;
}

async fn resume(engine: &Engine) {
    engine.control().send(Command::Resume).await.unwrap();
}

/// The row of an UPDATE that left a large value alone is read again: by the table as it is by then.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn columns_dropped_and_renamed_behind_an_update_that_has_to_be_read_again() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE t (id int PRIMARY KEY, old int, large text, v int, gone text, large_too text)").await;
    rig.sql("ALTER TABLE t DROP COLUMN old").await;
    rig.sql(&format!("INSERT INTO t SELECT n, {LARGE} || n, 1, 'a\\b', {LARGE} FROM generate_series(1, 6) n")).await;
    let mut config = rig.config(&["t"]);
    // What is asked here is what the change itself wrote.
    config.cdc.snapshot.on_schema_change = OnSchemaChange::Warn;
    let engine = rig.run(config).await;
    let copied = rig.documents("t");
    rig.sql("BEGIN; UPDATE t SET v = 2 WHERE id = 3; ALTER TABLE t DROP COLUMN gone; COMMIT").await;
    rig.delivered().await;
    let mut expected = copied["3"].clone();
    expected["v"] = json!(2);
    assert_eq!(rig.documents("t")["3"], expected, "what the change brought of a dropped column is kept");

    rig.sql("BEGIN; UPDATE t SET v = 3 WHERE id = 4; ALTER TABLE t RENAME large TO renamed; COMMIT").await;
    rig.delivered().await;
    let mut expected = copied["4"].clone();
    expected["v"] = json!(3);
    expected.as_object_mut().unwrap().remove("gone");
    assert_eq!(rig.documents("t")["4"], expected);

    // Key and table are not called any more what they were. A large value that is dropped is nowhere to be had.
    pause(&engine).await;
    rig.sql("UPDATE t SET v = 4 WHERE id = 5").await;
    rig.sql("ALTER TABLE t RENAME id TO number; ALTER TABLE t DROP COLUMN large_too; ALTER TABLE t RENAME TO u").await;
    resume(&engine).await;
    rig.delivered().await;
    let document = &rig.documents("t")["5"];
    assert_eq!((&document["v"], &document["large_too"]), (&json!(4), &json!(null)));
    assert_eq!(document["renamed"], copied["5"]["large"]);
    stop(engine).await;
}

/// A key that is so large that PostgreSQL stores it apart is sent as the old one only.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_key_is_found_again() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE t (id text PRIMARY KEY, large text, v int)").await;
    rig.sql("ALTER TABLE t ALTER id SET STORAGE EXTERNAL, ALTER large SET STORAGE EXTERNAL, ALTER v SET NOT NULL")
        .await;
    rig.sql("ALTER TABLE t SET (toast_tuple_target = 128)").await;
    rig.sql(&format!("INSERT INTO t SELECT repeat('k', 500) || n, {LARGE}, 1 FROM generate_series(1, 3) n")).await;
    let engine = rig.run(rig.config(&["t"])).await;
    rig.equal_now("t").await;
    rig.sql("UPDATE t SET v = 2 WHERE id LIKE '%2'").await;
    rig.equal("t").await;
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_that_was_renamed_while_changes_waited() {
    let rig = Rig::new().await;
    for (table, identity) in [("by_key", "DEFAULT"), ("by_row", "FULL")] {
        rig.sql(&format!("CREATE TABLE {table} (dropped int, id int PRIMARY KEY, b text)")).await;
        rig.sql(&format!("ALTER TABLE {table} DROP COLUMN dropped; ALTER TABLE {table} REPLICA IDENTITY {identity}"))
            .await;
        rig.sql(&format!("INSERT INTO {table} SELECT n, 'b' FROM generate_series(1, 5) n")).await;
    }
    let tables = ["by_key", "by_row"];
    let mut config = rig.config(&tables);
    config.cdc.snapshot.on_schema_change = OnSchemaChange::Warn;
    let engine = rig.run(config).await;
    pause(&engine).await;
    for table in tables {
        rig.sql(&format!("UPDATE {table} SET b = 'before' WHERE id = 1; DELETE FROM {table} WHERE id = 2")).await;
        rig.sql(&format!("ALTER TABLE {table} RENAME id TO number")).await;
        rig.sql(&format!("UPDATE {table} SET b = 'behind'; DELETE FROM {table} WHERE number = 3")).await;
    }
    resume(&engine).await;
    for table in tables {
        rig.delivered().await;
        rig.equal_by(table, "number::text").await;
    }
    assert_eq!(engine.status().tables[1].state, pgtide::engine::TableState::Live);
    assert!(!engine.status().notices.iter().any(|notice| notice.text.contains(": copied again")));
    stop(engine).await;
}

/// What follows from an announcement waits for Elasticsearch, and a pause drops it there: the stream announces it again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_while_another_key_waits_for_elasticsearch() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE t (id int PRIMARY KEY, other int NOT NULL)").await;
    rig.sql("INSERT INTO t SELECT n, 1000 + n FROM generate_series(1, 5) n").await;
    let mut config = rig.config(&["t"]);
    // Nothing else has it copied again.
    config.cdc.snapshot.on_schema_change = OnSchemaChange::Warn;
    let engine = rig.run(config).await;
    rig.hold(1);
    rig.sql("INSERT INTO t VALUES (6, 1006)").await;
    rig.until_held().await;
    let before = rig.text("SELECT clock_timestamp()::text").await;
    rig.sql("BEGIN; ALTER TABLE t DROP CONSTRAINT t_pkey; ALTER TABLE t ADD PRIMARY KEY (other); INSERT INTO t VALUES (7, 1007); COMMIT")
        .await;
    let looked = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle'
            AND application_name = 'pgtide stream catalog' AND query_start > '{before}' AND query LIKE '%pg_attribute%'"
    );
    wait_until("the columns are looked up", LIMIT, || async { rig.count(&looked).await == 1 }).await;
    engine.control().send(Command::Pause).await.unwrap();
    rig.store.clear_faults();
    phase(&engine, Phase::Paused).await;
    resume(&engine).await;
    wait_until("it is copied again", LIMIT, || async {
        let table = &engine.status().tables[0];
        table.resnapshots_ended == 1 && !table.resnapshot
    })
    .await;
    rig.delivered().await;
    rig.equal_by("t", "other::text").await;
    stop(engine).await;
}

const PARTS: &str = "CREATE TABLE parts (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
                     CREATE TABLE part_1 PARTITION OF parts FOR VALUES FROM (0) TO (100);
                     CREATE TABLE part_2 PARTITION OF parts FOR VALUES FROM (100) TO (200);
                     INSERT INTO parts VALUES (1, 'a'), (2, 'b'), (101, 'c')";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_that_was_renamed_while_changes_waited() {
    let rig = Rig::new().await;
    rig.sql(PARTS).await;
    let engine = rig.run(rig.config(&["parts"])).await;
    pause(&engine).await;
    rig.sql("UPDATE parts SET v = 'x' WHERE id = 1; DELETE FROM parts WHERE id = 2; INSERT INTO parts VALUES (3, 'n')")
        .await;
    rig.sql("ALTER TABLE part_1 RENAME TO part_one").await;
    resume(&engine).await;
    rig.equal("parts").await;
    rig.sql("UPDATE parts SET v = 'y'").await;
    rig.equal("parts").await;
    stop(engine).await;
}

/// Its changes come under a name that goes nowhere: not in silence.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_renamed_stops_the_stream() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 1), (2, 1)").await;
    let mut engine = rig.run(rig.config(&["t"])).await;
    rig.sql("ALTER TABLE t RENAME TO u; UPDATE u SET v = 2").await;
    let problem = ended(&mut engine).await.unwrap_err();
    assert_eq!(problem.kind, ProblemKind::Setup, "{problem:?}");
    assert!(problem.message.contains("public.t") && problem.message.contains("public.u"), "{problem:?}");
    // Under its new name nothing is lost, what was changed under the old one neither.
    rig.sql("ALTER TABLE u RENAME TO t; UPDATE t SET v = 3 WHERE id = 1; ALTER TABLE t RENAME TO u").await;
    let mut config = rig.config(&["u"]);
    config.elasticsearch.table_index_mapping.values_mut().for_each(|index| *index = "t".to_owned());
    let engine = rig.run(config).await;
    rig.delivered().await;
    assert_eq!(json!(rig.documents("t")), json!({"1": {"id": 1, "v": 3}, "2": {"id": 2, "v": 2}}));
    stop(engine).await;
}

/// The changes of either go where its name of then says, or nowhere; what the new one had before is copied.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_swaps_its_name_with_another_is_copied_again() {
    let rig = Rig::new().await;
    rig.sql(&format!(
        "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 1), (2, 1);
         CREATE TABLE u (id int PRIMARY KEY, v int); INSERT INTO u VALUES (2, 7), (3, 7);
         CREATE PUBLICATION {} FOR ALL TABLES",
        rig.name
    ))
    .await;
    let engine = rig.run(rig.config(&["t"])).await;
    pause(&engine).await;
    rig.sql("UPDATE t SET v = 2").await;
    rig.sql("BEGIN; ALTER TABLE t RENAME TO x; ALTER TABLE u RENAME TO t; ALTER TABLE x RENAME TO u; COMMIT").await;
    // The old table first: no change of the new one has come yet.
    rig.sql("UPDATE u SET v = 3; INSERT INTO u VALUES (4, 3); UPDATE t SET v = 8 WHERE id = 3").await;
    resume(&engine).await;
    becomes_equal(&rig, &engine, "id::text").await;
    rig.sql("UPDATE u SET v = 4; UPDATE t SET v = 9").await;
    rig.equal("t").await;
    stop(engine).await;
}

/// A partition may have its columns in another order than its table, by which the copy names documents.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_partition_with_another_order_of_columns() {
    let rig = Rig::new().await;
    rig.sql(
        "CREATE TABLE t (x text, y text, v text, PRIMARY KEY (x, y)) PARTITION BY LIST (y);
         CREATE TABLE p (v text, y text NOT NULL, x text NOT NULL, PRIMARY KEY (x, y));
         INSERT INTO p SELECT 'v', 'a', 'x' || n FROM generate_series(1, 5) n;
         ALTER TABLE t ATTACH PARTITION p FOR VALUES IN ('a')",
    )
    .await;
    let engine = rig.run(rig.config(&["t"])).await;
    rig.equal_by("t", "x || ':' || y").await;
    for identity in ["DEFAULT", "FULL"] {
        rig.sql(&format!("ALTER TABLE p REPLICA IDENTITY {identity}")).await;
        rig.sql(&format!(
            "UPDATE t SET v = '{identity}' WHERE x = 'x3'; INSERT INTO t VALUES ('{identity}', 'a', 'n')"
        ))
        .await;
        rig.sql(&format!("DELETE FROM t WHERE x = '{identity}'")).await;
        rig.sql("UPDATE t SET x = x || '!' WHERE x LIKE 'x2%'").await;
        rig.delivered().await;
        rig.equal_by("t", "x || ':' || y").await;
    }
    stop(engine).await;
}

/// What is in the way of the copy that it asks for would show; what it did is seen by the documents.
async fn becomes_equal(rig: &Rig, engine: &Engine, id: &str) {
    wait_until("it was copied again", LIMIT, || async {
        let status = engine.status();
        status.notices.iter().any(|notice| notice.text.contains("copied again, ")) && !status.tables[0].resnapshot
    })
    .await;
    rig.delivered().await;
    rig.equal_by("t", id).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_key_gives_all_documents_other_ids() {
    for change in [
        "ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (number)",
        "CREATE UNIQUE INDEX i ON t (number); ALTER TABLE t REPLICA IDENTITY USING INDEX i",
        "DROP TABLE t; CREATE TABLE t (number int PRIMARY KEY, v int); INSERT INTO t VALUES (15, 1), (18, 2);
         ALTER PUBLICATION p ADD TABLE t",
    ] {
        let rig = Rig::new().await;
        rig.sql("CREATE TABLE t (id int PRIMARY KEY, number int NOT NULL, v int); CREATE PUBLICATION p FOR TABLE t")
            .await;
        rig.sql("INSERT INTO t SELECT n, n + 10, 1 FROM generate_series(1, 5) n").await;
        let mut config = rig.config(&["t"]);
        config.cdc.publication.name = "p".to_owned();
        let engine = rig.run(config).await;
        rig.equal_now("t").await;
        rig.sql("UPDATE t SET v = 2 WHERE id = 1").await;
        rig.equal("t").await;
        rig.sql(change).await;
        rig.sql("UPDATE t SET v = 3 WHERE number = 15").await;
        becomes_equal(&rig, &engine, "number::text").await;
        stop(engine).await;
    }
}

/// With `REPLICA IDENTITY FULL` the key is that of today, and a row of then may lack it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_from_before_their_key() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE t (id int PRIMARY KEY, number int, v int); ALTER TABLE t REPLICA IDENTITY FULL").await;
    rig.sql("INSERT INTO t VALUES (1, NULL, 1), (2, NULL, 1), (3, 13, 1)").await;
    let engine = rig.run(rig.config(&["t"])).await;
    pause(&engine).await;
    rig.sql("INSERT INTO t VALUES (4, NULL, 1); UPDATE t SET v = 2; UPDATE t SET number = NULL WHERE id = 3").await;
    rig.sql("DELETE FROM t WHERE id = 2; UPDATE t SET number = id + 10").await;
    rig.sql("ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (number)").await;
    resume(&engine).await;
    becomes_equal(&rig, &engine, "number::text").await;
    stop(engine).await;
}

/// What the stream brings of the key is no value of the type that it has by now.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_of_another_type_behind_an_update_that_has_to_be_read_again() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE t (id numeric PRIMARY KEY, big text, v int); ALTER TABLE t ALTER big SET STORAGE EXTERNAL")
        .await;
    rig.sql("INSERT INTO t SELECT n + 0.5, repeat('x', 5000), 0 FROM generate_series(1, 3) n").await;
    let engine = rig.run(rig.config(&["t"])).await;
    pause(&engine).await;
    rig.sql("UPDATE t SET v = 1; ALTER TABLE t ALTER id TYPE bigint; UPDATE t SET v = v + 1 WHERE id > 2").await;
    resume(&engine).await;
    becomes_equal(&rig, &engine, "id::text").await;
    stop(engine).await;
}
