//! Tables without a key whose documents are named by whole rows.

use std::collections::BTreeSet;

use pgtide::config::{Config, OnSchemaChange, ReplicaIdentity, WithoutKey};
use pgtide::verify;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::support::pipeline::{LIMIT, Rig, ended, stop};
use super::support::wait_until;

fn hashed(rig: &Rig, tables: &[&str]) -> Config {
    let mut config = rig.config(tables);
    config.elasticsearch.without_key = WithoutKey::Hash;
    config
}

/// The documents of `table` as a set, each with an id of 64 hexadecimal digits.
fn contents(rig: &Rig, table: &str) -> BTreeSet<String> {
    let documents = rig.documents(table);
    assert!(
        documents.keys().all(|id| id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit())),
        "{documents:?}"
    );
    let texts: BTreeSet<String> = documents.values().map(Value::to_string).collect();
    assert_eq!(texts.len(), documents.len(), "two documents of one row");
    texts
}

async fn rows(rig: &Rig, table: &str) -> BTreeSet<String> {
    let rows = rig.client.query(&format!("SELECT to_jsonb(t) FROM {table} t"), &[]).await.unwrap();
    rows.iter().map(|row| row.get::<_, Value>(0).to_string()).collect()
}

async fn verified(config: &Config, repair: bool) -> verify::Report {
    let options = verify::Options { repair, ..verify::Options::new(config.clone().into()) };
    verify::run(&options, &CancellationToken::new(), |_| {}).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whole_rows_name_the_documents() {
    let rig = Rig::new().await;
    rig.sql(
        "CREATE TABLE notes (a int, b text, j json, large text); ALTER TABLE notes REPLICA IDENTITY FULL;
         ALTER TABLE notes ALTER large SET STORAGE EXTERNAL;
         INSERT INTO notes VALUES (1, 'one', '{}', repeat('long ', 2000)), (NULL, NULL, NULL, NULL), (2, '', '[1]', ''), (2, NULL, '[1]', '');
         CREATE TABLE parts (a int, b text) PARTITION BY LIST (a); ALTER TABLE parts REPLICA IDENTITY FULL;
         CREATE TABLE first PARTITION OF parts FOR VALUES IN (1); ALTER TABLE first REPLICA IDENTITY FULL;
         CREATE TABLE other (b text, a int); ALTER TABLE other REPLICA IDENTITY FULL;
         ALTER TABLE parts ATTACH PARTITION other DEFAULT; INSERT INTO parts VALUES (1, 'x'), (2, 'y')",
    )
    .await;
    let mut config = hashed(&rig, &["notes", "parts"]);
    let engine = rig.run(config.clone()).await;
    assert_eq!(contents(&rig, "notes"), rows(&rig, "notes").await);
    rig.sql(
        "INSERT INTO notes VALUES (3, 'three', '1', repeat('more ', 3000)); UPDATE notes SET b = 'new' WHERE a = 1;
         UPDATE notes SET a = 0 WHERE a IS NULL; DELETE FROM notes WHERE b = ''; UPDATE notes SET a = a WHERE a = 2;
         INSERT INTO parts VALUES (1, 'z'), (3, 'z'); UPDATE parts SET a = 5 WHERE b = 'x'; DELETE FROM parts WHERE b = 'y'",
    )
    .await;
    rig.delivered().await;
    for table in ["notes", "parts"] {
        assert_eq!(contents(&rig, table), rows(&rig, table).await);
    }
    assert_eq!(verified(&config, false).await.outcome(), verify::Outcome::Equal);

    // What is spoilt is found by content and mended.
    let id = rig.documents("notes").into_keys().next().unwrap();
    let lines = format!(
        "{{\"delete\":{{\"_index\":\"notes\",\"_id\":\"{id}\"}}}}\n{{\"index\":{{\"_index\":\"notes\",\"_id\":\"none\"}}}}\n{{}}\n"
    );
    let bulk = super::support::process::http().post(format!("{}/_bulk", rig.store.url()));
    assert!(
        bulk.header("content-type", "application/x-ndjson").body(lines).send().await.unwrap().status().is_success()
    );
    let report = verified(&config, false).await;
    assert_eq!((report.tables[0].missing, report.tables[0].extra), (1, 1), "{report:?}");
    assert_eq!(verified(&config, true).await.outcome(), verify::Outcome::Equal);
    assert_eq!(contents(&rig, "notes"), rows(&rig, "notes").await);

    // Another column, other digests: all of it is copied again, what has an old name goes.
    assert_eq!(config.cdc.snapshot.on_schema_change, OnSchemaChange::Copy);
    rig.sql("ALTER TABLE notes ADD COLUMN more int DEFAULT 7; DELETE FROM notes WHERE a = 3; UPDATE notes SET more = 8 WHERE a = 0")
        .await;
    let same = || async { rig.documents("notes").len() == 3 && contents(&rig, "notes") == rows(&rig, "notes").await };
    wait_until("the documents are the rows", LIMIT, same).await;
    stop(engine).await;

    // A key: its own names.
    rig.sql("UPDATE notes SET a = 4 WHERE b IS NULL AND large = ''; ALTER TABLE notes ADD PRIMARY KEY (a)").await;
    config.cdc.snapshot.resnapshot = true;
    let engine = rig.run(config).await;
    rig.delivered().await;
    rig.equal_by("notes", "a::text").await;
    stop(engine).await;
}

/// As the manual says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_rows_are_one_document() {
    let rig = Rig::new().await;
    rig.sql(
        "CREATE TABLE twins (a int); ALTER TABLE twins REPLICA IDENTITY FULL; INSERT INTO twins VALUES (1), (1), (2)",
    )
    .await;
    let config = hashed(&rig, &["twins"]);
    let engine = rig.run(config.clone()).await;
    assert_eq!(contents(&rig, "twins").len(), 2);
    assert_eq!(verified(&config, false).await.outcome(), verify::Outcome::Equal);
    // The other one's document goes with it, until it is repaired.
    rig.sql("DELETE FROM twins WHERE ctid = (SELECT min(ctid) FROM twins WHERE a = 1)").await;
    rig.delivered().await;
    assert_eq!(contents(&rig, "twins").len(), 1);
    let report = verified(&config, true).await;
    assert_eq!((report.tables[0].missing, report.outcome()), (1, verify::Outcome::Equal), "{report:?}");
    assert_eq!(contents(&rig, "twins"), rows(&rig, "twins").await);
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_without_a_key_is_refused_unless_it_sends_whole_rows() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE plain (a int); INSERT INTO plain VALUES (1)").await;
    let full = {
        let mut config = rig.config(&["plain"]);
        config.cdc.publication.tables[0].replica_identity = Some(ReplicaIdentity::Full);
        config
    };
    for config in [rig.config(&["plain"]), hashed(&rig, &["plain"]), full.clone()] {
        let problem = ended(&mut rig.start(config)).await.unwrap_err();
        assert!(problem.message.contains("public.plain has no primary key"), "{problem:?}");
        assert!(problem.hint.contains("tablesWithoutKey"), "{problem:?}");
        assert_eq!(rig.count("SELECT count(*) FROM pg_publication").await, 0);
    }
    let mut config = full;
    config.elasticsearch.without_key = WithoutKey::Hash;
    let engine = rig.run(config).await;
    rig.sql("UPDATE plain SET a = 2").await;
    rig.delivered().await;
    assert_eq!(contents(&rig, "plain"), rows(&rig, "plain").await);
    stop(engine).await;
}
