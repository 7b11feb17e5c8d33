//! Definitions that change documents without a change of a row: columns, types, keys, the publication, the index.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use pgtide::config::{Config, OnSchemaChange};
use pgtide::engine::{Command, Engine, Phase, TableState};
use pgtide::problem::ProblemKind;
use pgtide::table::TableId;
use serde_json::json;
use support::pipeline::{LIMIT, Rig, ended, live, phase, same, stop};
use support::wait_until;

const TABLE: &str = "CREATE TYPE mood AS ENUM ('good', 'bad');
    CREATE TABLE t (id int PRIMARY KEY, number int NOT NULL, v int, w varchar(10), n numeric(10, 2), m mood,
                    twice int GENERATED ALWAYS AS (v * 2) STORED);
    ALTER TABLE t DROP COLUMN twice;
    INSERT INTO t SELECT n, n + 10, n, 'w' || n, n, 'bad' FROM generate_series(1, 5) n;
    CREATE PUBLICATION p FOR TABLE t";

/// What changes documents, what is said of it, and by what they are named.
const OUTDATED: [(&str, &str, &str); 16] = [
    ("ALTER TABLE t ADD c int", "columns", "id"),
    ("ALTER TABLE t ADD c int DEFAULT 7", "columns", "id"),
    ("ALTER TABLE t ADD c text DEFAULT clock_timestamp()", "columns", "id"),
    ("ALTER TABLE t DROP w", "columns", "id"),
    ("ALTER TABLE t RENAME w TO x", "columns", "id"),
    // Rows of in between have a field that no row has any more.
    ("ALTER TABLE t ADD c int; UPDATE t SET c = 1 WHERE id < 3; ALTER TABLE t DROP c", "columns", "id"),
    ("ALTER TABLE t ALTER v TYPE text", "type", "id"),
    ("ALTER TABLE t ALTER n TYPE numeric(10, 4)", "type", "id"),
    // To the type that it has: the values are others all the same.
    ("ALTER TABLE t ALTER v TYPE int USING v * 10", "type", "id"),
    ("ALTER TABLE t ALTER n TYPE numeric(10, 0); ALTER TABLE t ALTER n TYPE numeric(10, 2)", "type", "id"),
    ("ALTER TYPE mood RENAME VALUE 'bad' TO 'sad'", "type", "id"),
    (
        "BEGIN; ALTER TYPE mood RENAME VALUE 'bad' TO 'sad'; UPDATE t SET v = 50 WHERE id = 1;
         ALTER TYPE mood RENAME VALUE 'sad' TO 'bad'; COMMIT",
        "type",
        "id",
    ),
    ("ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (number)", "key", "number"),
    (
        "DROP TABLE t; CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (3, 3), (9, 9);
         ALTER PUBLICATION p ADD TABLE t",
        "made anew",
        "id",
    ),
    (
        "ALTER PUBLICATION p DROP TABLE t; UPDATE t SET v = 50 WHERE id = 1; DELETE FROM t WHERE id = 2;
         ALTER PUBLICATION p ADD TABLE t",
        "publication was altered",
        "id",
    ),
    (
        "ALTER PUBLICATION p SET (publish = 'insert'); DELETE FROM t WHERE id = 2;
         ALTER PUBLICATION p SET (publish = 'insert, update, delete, truncate')",
        "publication was altered",
        "id",
    ),
];

fn config(rig: &Rig) -> Config {
    let mut config = rig.config(&["t"]);
    config.cdc.publication.name = "p".to_owned();
    config
}

async fn each(rig: &Rig, sql: &str) {
    for statement in sql.split("; ") {
        rig.sql(statement).await;
    }
}

fn noticed(engine: &Engine, text: &str) -> bool {
    engine.status().notices.iter().any(|notice| notice.text.contains(text))
}

async fn until_noticed(engine: &Engine, text: &str) {
    let what = format!("it is said: {text}");
    wait_until(&what, LIMIT, || async { noticed(engine, text) }).await;
}

/// Nothing is copied again, and a copy that ended was made as often as it says.
async fn until_copied(engine: &Engine, times: u64) {
    wait_until("it is copied again", LIMIT, || async {
        let table = &engine.status().tables[0];
        !table.resnapshot && table.resnapshots_ended >= times && table.state == TableState::Live
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_changes_documents_is_copied_again_while_it_runs() {
    for (sql, said, key) in OUTDATED {
        let rig = Rig::new().await;
        rig.sql(TABLE).await;
        let engine = rig.run(config(&rig)).await;
        each(&rig, sql).await;
        until_noticed(&engine, said).await;
        until_copied(&engine, 1).await;
        rig.delivered().await;
        rig.equal_by("t", &format!("{key}::text")).await;
        stop(engine).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_changes_documents_is_copied_again_at_the_next_start() {
    for (sql, said, key) in OUTDATED {
        let rig = Rig::new().await;
        rig.sql(TABLE).await;
        let engine = rig.run(config(&rig)).await;
        stop(engine).await;
        each(&rig, sql).await;
        let engine = rig.run(config(&rig)).await;
        // Not called live before.
        assert!(noticed(&engine, said) && engine.status().tables[0].resnapshots_ended == 1, "{sql}");
        rig.delivered().await;
        rig.equal_by("t", &format!("{key}::text")).await;
        stop(engine).await;
    }
}

/// What the catalog does not tell afterwards: the stream had other names or types.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_otherwise_between_two_looks_is_copied_again() {
    let rig = Rig::new().await;
    rig.sql(TABLE).await;
    let engine = rig.run(config(&rig)).await;
    rig.sql("BEGIN; ALTER TABLE t RENAME TO u; UPDATE u SET v = 40 WHERE id = 1; ALTER TABLE u RENAME TO t; COMMIT")
        .await;
    rig.equal("t").await;
    let renamed =
        "BEGIN; ALTER TABLE t RENAME v TO x; UPDATE t SET x = x + 50 WHERE id = 1; ALTER TABLE t RENAME x TO v; COMMIT";
    let retyped = "BEGIN; ALTER TABLE t ALTER v TYPE oid; UPDATE t SET v = 4294967295 WHERE id = 2;
                   ALTER TABLE t ALTER v TYPE int; COMMIT";
    let swapped = "BEGIN; ALTER TABLE t RENAME v TO x; ALTER TABLE t RENAME number TO v; ALTER TABLE t RENAME x TO number;
                   UPDATE t SET v = 7 WHERE id = 3;
                   ALTER TABLE t RENAME number TO x; ALTER TABLE t RENAME v TO number; ALTER TABLE t RENAME x TO v; COMMIT";
    for (times, sql) in (1..).zip([renamed, renamed, retyped, swapped]) {
        rig.sql(sql).await;
        until_copied(&engine, times).await;
        rig.equal("t").await;
    }
    rig.sql("UPDATE t SET v = 60").await;
    rig.equal("t").await;
    assert!(noticed(&engine, "other names or types for a while"));
    assert_eq!(engine.status().tables[0].resnapshots_ended, 4);
    stop(engine).await;
    rig.sql(renamed).await;
    let engine = rig.run(config(&rig)).await;
    until_copied(&engine, 1).await;
    rig.equal("t").await;
    stop(engine).await;
    let engine = rig.run(config(&rig)).await;
    rig.sql("UPDATE t SET v = 70").await;
    rig.equal("t").await;
    assert!(!noticed(&engine, "copied again"), "{:?}", engine.status().notices);
    stop(engine).await;
}

/// Rows that change while nothing is streamed of them, until all is as before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_not_streamed_between_two_looks_is_copied_again() {
    let unlogged = "BEGIN; ALTER TABLE t SET UNLOGGED; UPDATE t SET v = v + 50 WHERE id = 1;
                    DELETE FROM t WHERE id = (SELECT max(id) FROM t); ALTER TABLE t SET LOGGED; COMMIT";
    let emptied = "BEGIN; ALTER TABLE t SET UNLOGGED; DELETE FROM t; ALTER TABLE t SET LOGGED; COMMIT";
    let moved = "BEGIN; CREATE SCHEMA aside; ALTER TABLE t SET SCHEMA aside; INSERT INTO aside.t VALUES (9, 9);
                 ALTER TABLE aside.t SET SCHEMA public; COMMIT";
    for publication in ["FOR ALL TABLES", "FOR TABLES IN SCHEMA public"] {
        let rig = Rig::new().await;
        let by_schema = publication != "FOR ALL TABLES";
        if by_schema && version(&rig).await < 150_000 {
            continue;
        }
        rig.sql(&TABLE.replace("FOR TABLE t", publication)).await;
        let mut engine = rig.run(config(&rig)).await;
        let steps = [unlogged, unlogged, emptied, moved].into_iter().take(if by_schema { 4 } else { 3 });
        for (times, sql) in (1..).zip(steps) {
            rig.sql(sql).await;
            until_copied(&engine, times).await;
            rig.equal("t").await;
            if times == 1 {
                // From now on it has a TOAST table.
                rig.sql("ALTER TABLE t ALTER w TYPE text").await;
                let sql =
                    "SELECT count(*) FROM cdc_snapshot_tables WHERE definition::jsonb #>> '{columns, 3, type}' = '25'";
                wait_until("it is noted", LIMIT, || async { rig.count(sql).await == 1 }).await;
            }
        }
        let said = |text| engine.status().notices.iter().filter(|notice| notice.text.contains(text)).count();
        assert_eq!(said("may have been unlogged for a while"), 3, "{:?}", engine.status().notices);
        stop(engine).await;
        rig.sql("INSERT INTO t SELECT n, n FROM generate_series(10, 15) n").await;
        rig.sql(unlogged).await;
        engine = rig.run(config(&rig)).await;
        assert!(noticed(&engine, "unlogged for a while"), "{:?}", engine.status().notices);
        rig.equal("t").await;
        stop(engine).await;
    }
}

/// In the middle of the first copy: what is done of it was made of other columns.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_does_not_go_on_with_another_definition() {
    for (sql, key) in [
        ("ALTER TABLE t ADD c int DEFAULT 7", "id"),
        ("ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (number)", "number"),
        ("ALTER PUBLICATION p SET (publish = 'insert'); DELETE FROM t WHERE id < 3; UPDATE t SET v = 0", "id"),
    ] {
        let rig = Rig::new().await;
        rig.sql(TABLE).await;
        rig.sql("CREATE TABLE z (id int PRIMARY KEY); INSERT INTO z SELECT generate_series(1, 50)").await;
        rig.sql("ALTER PUBLICATION p ADD TABLE z").await;
        let mut config = rig.config(&["t", "z"]);
        config.cdc.publication.name = "p".to_owned();
        config.cdc.snapshot.workers = Some(1);
        config.elasticsearch.batch_size_limit = 5;
        rig.hold_after(3, 1);
        let engine = rig.start(config.clone());
        rig.until_held().await;
        wait_until("t is copied", LIMIT, || async { rig.documents("t").len() == 5 }).await;
        stop(engine).await;
        rig.store.clear_faults();
        rig.sql("UPDATE t SET v = 8 WHERE id = 4; INSERT INTO t VALUES (6, 16, 6, 'w')").await;
        each(&rig, sql).await;
        let engine = rig.run(config).await;
        assert!(noticed(&engine, "does not go on"), "{sql}: {:?}", engine.status().notices);
        rig.delivered().await;
        rig.equal_by("t", &format!("{key}::text")).await;
        rig.equal("z").await;
        stop(engine).await;
    }
}

/// That table was never copied whole, and is not called so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_does_not_go_on_is_not_given_up() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t SELECT n, n FROM generate_series(1, 40) n")
        .await;
    let mut config = rig.config(&["t"]);
    config.elasticsearch.batch_size_limit = 10;
    rig.hold_after(1, 1);
    let engine = rig.start(config.clone());
    rig.until_held().await;
    stop(engine).await;
    rig.store.clear_faults();
    rig.sql("ALTER TABLE t ADD c int DEFAULT 7").await;
    rig.hold_after(1, 1);
    let engine = rig.start(config);
    rig.until_held().await;
    assert!(noticed(&engine, "does not go on"), "{:?}", engine.status().notices);
    let refusal = engine.control().send(Command::CancelResnapshot(TableId::new("public", "t"))).await.unwrap_err();
    assert!(refusal.contains("never been copied to its end"), "{refusal}");
    rig.store.clear_faults();
    live(&engine).await;
    rig.equal("t").await;
    stop(engine).await;
}

/// Documents of an older form are not called live.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_is_given_up_leaves_documents_of_the_old_form() {
    let rig = Rig::new().await;
    rig.sql(TABLE).await;
    let engine = rig.run(config(&rig)).await;
    let (control, id) = (engine.control(), TableId::new("public", "t"));
    rig.hold(1);
    rig.sql("ALTER TABLE t ADD c int DEFAULT 7").await;
    rig.until_held().await;
    control.send(Command::CancelResnapshot(id.clone())).await.unwrap();
    rig.store.clear_faults();
    until_noticed(&engine, "given up by the operator").await;
    let table = engine.status().tables.remove(0);
    let problem = table.problem.expect("it says what is wrong");
    assert!(problem.message.contains("columns") && problem.message.contains("given up"), "{problem:?}");
    assert_eq!(table.state, TableState::Failed);
    control.send(Command::Resnapshot(id)).await.unwrap();
    until_copied(&engine, 2).await;
    assert_eq!(engine.status().tables[0].problem, None);
    rig.equal("t").await;
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_changes_no_document_is_not_copied_again() {
    for publication in ["FOR TABLE t", "FOR ALL TABLES"] {
        let rig = Rig::new().await;
        rig.sql(&TABLE.replace("FOR TABLE t", publication)).await;
        rig.sql("CREATE TABLE other (id int PRIMARY KEY)").await;
        let engine = rig.run(config(&rig)).await;
        if publication == "FOR TABLE t" {
            rig.sql("ALTER PUBLICATION p ADD TABLE other").await;
        }
        // By themselves: a rewrite and another type at once are a rewrite to another type.
        let harmless = [
        "VACUUM FULL t; CLUSTER t USING t_pkey",
        "ALTER TABLE t ALTER w TYPE varchar(20); ALTER TABLE t ALTER w TYPE text; ALTER TABLE t ALTER v SET STATISTICS 50;
         ALTER TABLE t ALTER v SET DEFAULT 5; ALTER TABLE t ALTER v SET NOT NULL; CREATE INDEX ON t (v);
         ALTER TYPE mood ADD VALUE 'so-so'; ALTER TABLE t ADD CHECK (v > 0); ALTER TABLE t REPLICA IDENTITY FULL;
         COMMENT ON TABLE t IS 'c'; ANALYZE t; GRANT SELECT ON t TO PUBLIC; GRANT UPDATE (v) ON t TO PUBLIC;
         ALTER TABLE t DISABLE TRIGGER ALL; UPDATE t SET v = v + 1; VACUUM t",
        "TRUNCATE t; INSERT INTO t SELECT n, n + 10, n, 'w' || n, n, 'so-so' FROM generate_series(1, 9) n",
    ];
        let noted = "SELECT count(*) FROM cdc_snapshot_tables s JOIN pg_class c ON c.relname = table_name
                 JOIN pg_attribute a ON a.attrelid = c.oid AND attname = 'w'
                 WHERE (definition::jsonb #>> '{leaves, 0, filenode}')::oid = c.relfilenode
                   AND (definition::jsonb #>> '{columns, 3, type}')::oid = a.atttypid";
        for statements in harmless {
            for statement in statements.split(';') {
                rig.sql(statement).await;
            }
            wait_until("it is noted", LIMIT, || async { rig.count(noted).await == 1 }).await;
        }
        rig.equal("t").await;
        assert!(!noticed(&engine, "copied again"), "{:?}", engine.status().notices);
        stop(engine).await;
        rig.sql("VACUUM FULL t").await;
        let engine = rig.run(config(&rig)).await;
        assert!(!noticed(&engine, "copied again"), "{:?}", engine.status().notices);
        rig.equal("t").await;
        stop(engine).await;
    }
}

/// One copy for a script of them, not one for each.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_of_alterations_is_one_copy() {
    let rig = Rig::new().await;
    rig.sql(TABLE).await;
    let mut config = config(&rig);
    config.cdc.slot.activity_checker_interval = std::time::Duration::from_millis(500);
    let engine = rig.run(config).await;
    let began = std::time::Instant::now();
    let mut n = 0;
    // Over several looks.
    while began.elapsed() < std::time::Duration::from_secs(2) {
        n += 1;
        rig.sql(&format!("ALTER TABLE t ADD c int DEFAULT {n}")).await;
        rig.sql("UPDATE t SET v = v + 1; ALTER TABLE t DROP c").await;
    }
    let all = "SELECT count(*) FROM cdc_snapshot_tables JOIN pg_class ON relname = table_name
               WHERE (definition::jsonb ->> 'columns_ever')::int = relnatts";
    wait_until("the last one is copied", LIMIT, || async { rig.count(all).await == 1 }).await;
    until_copied(&engine, 1).await;
    rig.equal("t").await;
    assert_eq!(engine.status().tables[0].resnapshots_ended, 1);
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn left_to_the_operator_where_it_is_configured_so() {
    let rig = Rig::new().await;
    rig.sql(TABLE).await;
    let mut config = config(&rig);
    config.cdc.snapshot.on_schema_change = OnSchemaChange::Warn;
    let engine = rig.run(config.clone()).await;
    rig.sql("ALTER TABLE t ADD c int DEFAULT 7").await;
    until_noticed(&engine, "documents of rows that were there before are left as they are").await;
    rig.sql("UPDATE t SET v = 9 WHERE id = 1").await;
    rig.delivered().await;
    assert_eq!(rig.documents("t")["1"]["c"], json!(7));
    assert!(rig.documents("t")["2"].get("c").is_none());
    stop(engine).await;
    // Said once; the operator copies it when there is time.
    let engine = rig.run(config).await;
    assert!(!noticed(&engine, "left as they are") && engine.status().tables[0].resnapshots_ended == 0);
    engine.control().send(Command::Resnapshot(TableId::new("public", "t"))).await.unwrap();
    until_copied(&engine, 1).await;
    rig.equal("t").await;
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_dropped_or_not_published_is_said_at_once() {
    for (away, said, back) in [
        (
            "ALTER TABLE t RENAME TO t_old",
            "table public.t has been renamed to public.t_old",
            "UPDATE t_old SET v = 70 WHERE FALSE; ALTER TABLE t_old RENAME TO t",
        ),
        (
            "DROP TABLE t",
            "table public.t was dropped. Its documents stay",
            "CREATE TABLE t (id int PRIMARY KEY, v int); INSERT INTO t VALUES (1, 1); ALTER PUBLICATION p ADD TABLE t",
        ),
        (
            "ALTER PUBLICATION p DROP TABLE t",
            "does not publish table public.t any more",
            "UPDATE t SET v = 70; DELETE FROM t WHERE id = 1; ALTER PUBLICATION p ADD TABLE t",
        ),
    ] {
        let rig = Rig::new().await;
        rig.sql(TABLE).await;
        let engine = rig.run(config(&rig)).await;
        let documents = rig.documents("t");
        each(&rig, away).await;
        until_noticed(&engine, said).await;
        let failed = || async { engine.status().tables[0].state == TableState::Failed };
        wait_until("the table shows it", LIMIT, failed).await;
        assert!(engine.status().tables[0].problem.is_some());
        same(&rig.documents("t"), &documents, "t");
        each(&rig, back).await;
        wait_until("it is over", LIMIT, || async {
            let table = &engine.status().tables[0];
            table.state == TableState::Live && table.problem.is_none() && !table.resnapshot
        })
        .await;
        rig.becomes_equal("t").await;
        assert_eq!(engine.status().phase, Phase::Streaming);
        stop(engine).await;
    }
}

/// Before an UPDATE of the application fails for the first time.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_identity_that_refuses_changes_is_said() {
    for sql in
        ["ALTER TABLE t REPLICA IDENTITY NOTHING", "ALTER TABLE t DROP CONSTRAINT t_pkey, ALTER id DROP NOT NULL"]
    {
        let rig = Rig::new().await;
        rig.sql(TABLE).await;
        let engine = rig.run(config(&rig)).await;
        rig.sql(sql).await;
        until_noticed(&engine, "PostgreSQL refuses UPDATE and DELETE").await;
        assert!(rig.client.batch_execute("UPDATE t SET v = 1").await.is_err(), "as was said");
        stop(engine).await;
    }
}

async fn version(rig: &Rig) -> i64 {
    rig.count("SELECT current_setting('server_version_num')::int8").await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_of_columns_and_row_filters_that_are_altered() {
    let rig = Rig::new().await;
    rig.sql(TABLE).await;
    if version(&rig).await < 150_000 {
        assert!(rig.client.batch_execute("ALTER PUBLICATION p SET TABLE t (id, v)").await.is_err());
        return;
    }
    let engine = rig.run(config(&rig)).await;
    rig.sql("ALTER PUBLICATION p SET TABLE t (id, v)").await;
    let of = |ids: std::ops::RangeInclusive<i32>| ids.map(|n| (n.to_string(), json!({"id": n, "v": n}))).collect();
    wait_until("the other fields are gone", LIMIT, || async { rig.documents("t") == of(1..=5) }).await;
    // Not published, so that documents do not change.
    until_copied(&engine, 1).await;
    rig.sql("ALTER TABLE t DROP w; INSERT INTO t VALUES (6, 16, 6)").await;
    rig.delivered().await;
    same(&rig.documents("t"), &of(1..=6), "t");
    rig.sql("ALTER PUBLICATION p SET TABLE t (id, v) WHERE (id <= 3)").await;
    wait_until("the other rows are gone", LIMIT, || async { rig.documents("t") == of(1..=3) }).await;
    rig.sql("ALTER PUBLICATION p SET TABLE t").await;
    rig.becomes_equal("t").await;
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_that_is_made_anew_is_not_gone_on_with() {
    for again in [true, false] {
        let rig = Rig::new().await;
        rig.sql(TABLE).await;
        let client = pgtide::sink::Client::new(&config(&rig).elasticsearch).unwrap();
        let mut engine = rig.run(config(&rig)).await;
        client.delete_index("t").await.unwrap();
        if again {
            rig.sql("UPDATE t SET v = 100 WHERE id = 1").await;
        }
        let problem = ended(&mut engine).await.unwrap_err();
        assert_eq!(problem.kind, ProblemKind::Gap, "{problem:?}");
        assert!(problem.message.contains("index t"), "{problem:?}");
        drop(engine);
        // Nor at the next start, with an index that has everything but the documents.
        client.create_index("t", &json!({})).await.unwrap();
        let mut engine = rig.start(config(&rig));
        let problem = ended(&mut engine).await.unwrap_err();
        assert_eq!(problem.kind, ProblemKind::Gap, "{problem:?}");
        assert!(problem.message.contains("made anew"), "{problem:?}");
        drop(engine);
        let mut config = config(&rig);
        config.cdc.snapshot.resnapshot = true;
        let engine = rig.run(config.clone()).await;
        rig.equal("t").await;
        stop(engine).await;
        config.cdc.snapshot.resnapshot = false;
        let engine = rig.run(config).await;
        rig.sql("UPDATE t SET v = 200").await;
        rig.equal("t").await;
        stop(engine).await;
    }
}

/// The copy has what the stream will have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn columns_are_those_of_the_publication() {
    let rig = Rig::new().await;
    rig.sql(TABLE).await;
    let mut listed = config(&rig);
    listed.cdc.publication.tables[0].columns = vec!["id".to_owned(), "v".to_owned()];
    let mut engine = rig.start(listed.clone());
    let problem = ended(&mut engine).await.unwrap_err();
    assert_eq!(problem.kind, ProblemKind::Setup, "{problem:?}");
    assert!(problem.message.contains("publishes other columns of public.t"), "{problem:?}");
    if version(&rig).await < 150_000 {
        return;
    }
    rig.sql("ALTER PUBLICATION p SET TABLE t (v, id)").await;
    let engine = rig.run(listed).await;
    rig.sql("UPDATE t SET v = 100 WHERE id = 1").await;
    rig.delivered().await;
    assert_eq!(json!(rig.documents("t")["1"]), json!({"id": 1, "v": 100}));
    assert_eq!(json!(rig.documents("t")["2"]), json!({"id": 2, "v": 2}));
    stop(engine).await;
}

/// PostgreSQL publishes them from 18 on, where it is told to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn generated_columns_are_copied_as_they_are_streamed() {
    let rig = Rig::new().await;
    rig.sql(
        "CREATE TABLE t (id int PRIMARY KEY, twice int GENERATED ALWAYS AS (v * 2) STORED, v int, large text,
             long text GENERATED ALWAYS AS (large || '!') STORED)",
    )
    .await;
    rig.sql("ALTER TABLE t ALTER long SET STORAGE EXTERNAL, ALTER large SET STORAGE EXTERNAL").await;
    rig.sql("INSERT INTO t (id, v, large) SELECT n, n, repeat('x', 2100) || n FROM generate_series(1, 5) n").await;
    let published = version(&rig).await >= 180_000;
    rig.sql("CREATE PUBLICATION p FOR TABLE t").await;
    let engine = rig.run(config(&rig)).await;
    let without = || async {
        let rows = rig.client.query("SELECT id::text, to_jsonb(t) - 'twice' - 'long' FROM t", &[]).await.unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    };
    same(&rig.documents("t"), &without().await, "copied");
    rig.sql("UPDATE t SET v = v + 1 WHERE id < 3; INSERT INTO t (id, v) VALUES (9, 9)").await;
    rig.delivered().await;
    same(&rig.documents("t"), &without().await, "streamed");
    if published {
        rig.sql("ALTER PUBLICATION p SET (publish_generated_columns = stored)").await;
        rig.becomes_equal("t").await;
        rig.sql("UPDATE t SET v = v + 1; INSERT INTO t (id, v) VALUES (10, 10)").await;
        rig.equal("t").await;
        // Its values change with it, and no row does.
        rig.sql("ALTER TABLE t ALTER twice SET EXPRESSION AS (v * 3)").await;
        rig.becomes_equal("t").await;
    }
    stop(engine).await;
    let engine = rig.run(config(&rig)).await;
    assert_eq!(engine.status().tables[0].resnapshots_ended, 0);
    stop(engine).await;
}

/// Our own ledger is published with everything else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn publications_of_whole_schemas_and_databases() {
    for publication in ["FOR ALL TABLES", "FOR TABLES IN SCHEMA public"] {
        let rig = Rig::new().await;
        if publication != "FOR ALL TABLES" && version(&rig).await < 150_000 {
            assert!(rig.client.batch_execute(&format!("CREATE PUBLICATION p {publication}")).await.is_err());
            continue;
        }
        rig.sql(&TABLE.replace("FOR TABLE t", publication)).await;
        let mut config = config(&rig);
        config.cdc.snapshot.chunk_size = 1;
        let engine = rig.run(config).await;
        rig.equal("t").await;
        rig.sql("UPDATE t SET v = 0; DELETE FROM t WHERE id = 1").await;
        rig.equal("t").await;
        engine.control().send(Command::Resnapshot(TableId::new("public", "t"))).await.unwrap();
        until_copied(&engine, 1).await;
        rig.sql("ALTER TABLE t ADD c int DEFAULT 1").await;
        until_copied(&engine, 2).await;
        rig.equal("t").await;
        // The stream has passed the ledger's rows.
        rig.delivered().await;
        assert!(rig.documents("cdc_snapshot_chunks").is_empty() && rig.documents("cdc_snapshot_tables").is_empty());
        // Of a table that is published by name PostgreSQL refuses it.
        rig.sql("ALTER TABLE t SET UNLOGGED").await;
        until_noticed(&engine, "table public.t is unlogged").await;
        rig.sql("UPDATE t SET v = 7 WHERE id = 2; DELETE FROM t WHERE id = 3; ALTER TABLE t SET LOGGED").await;
        until_noticed(&engine, "unlogged for a while").await;
        until_copied(&engine, 3).await;
        rig.equal("t").await;
        stop(engine).await;
    }
}

const ODD: &str = r#"CREATE SCHEMA "Odd.Schema"; CREATE TABLE "Odd.Schema"."Täble ""x"".y" ("Id" int PRIMARY KEY, "Größe" text);
    INSERT INTO "Odd.Schema"."Täble ""x"".y" SELECT n, 'g' || n FROM generate_series(1, 20) n"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_names_all_the_way() {
    let rig = Rig::new().await;
    rig.sql(ODD).await;
    let id = TableId::new("Odd.Schema", "Täble \"x\".y");
    let mut config = rig.config(&["t"]);
    config.cdc.publication.tables = vec![pgtide::config::Table::new(id.clone())];
    config.elasticsearch.table_index_mapping = [(id.clone(), "odd".to_owned())].into();
    config.cdc.snapshot.chunk_size = 5;
    let engine = rig.run(config.clone()).await;
    let rows = || async {
        let sql = format!("SELECT \"Id\"::text, to_jsonb(t) FROM {} t", id.quoted());
        let rows = rig.client.query(&sql, &[]).await.unwrap();
        rows.iter().map(|row| (row.get(0), row.get(1))).collect()
    };
    same(&rig.documents("odd"), &rows().await, "copied");
    rig.sql(&format!("UPDATE {} SET \"Größe\" = 'x' WHERE \"Id\" < 5; DELETE FROM {0} WHERE \"Id\" = 7", id.quoted()))
        .await;
    rig.delivered().await;
    same(&rig.documents("odd"), &rows().await, "streamed");
    rig.sql(&format!("ALTER TABLE {} ADD \"Ünit.\" text DEFAULT 'u'; ALTER TABLE {0} DROP \"Ünit.\"", id.quoted()))
        .await;
    until_copied(&engine, 1).await;
    engine.control().send(Command::Pause).await.unwrap();
    phase(&engine, Phase::Paused).await;
    engine.control().send(Command::Resume).await.unwrap();
    live(&engine).await;
    rig.sql(&format!("TRUNCATE {}; INSERT INTO {0} VALUES (1, 'y')", id.quoted())).await;
    rig.delivered().await;
    same(&rig.documents("odd"), &rows().await, "truncated");
    stop(engine).await;
    let engine = rig.run(config).await;
    assert_eq!(engine.status().tables[0].resnapshots_ended, 0);
    same(&rig.documents("odd"), &rows().await, "started again");
    stop(engine).await;
}
