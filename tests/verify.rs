//! `pgtide verify`: says what differs, only what differs, and mends just that, while changes flow.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeMap;
use std::process::Output;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use pgtide::config::{Config, Mode};
use pgtide::engine::{Phase, TableState};
use pgtide::problem::Problem;
use pgtide::verify::{self, DifferenceKind, Options, Outcome, Report, TableReport};
use serde_json::{Value, json};
use support::pipeline::{LIMIT, Rig, phase, stop};
use support::standby::Unconfirmed;
use support::{own_server_with, process, wait_until};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

const ITEMS: &str = "CREATE TABLE items (id int PRIMARY KEY, name text, price numeric(10, 2));
                     INSERT INTO items SELECT i, 'item ' || i, i + 0.5 FROM generate_series(1, 2000) AS i";

/// The index `index` of the rig's store, written to behind pgtide's back.
async fn plant(rig: &Rig, lines: &[Value]) {
    let body: String = lines.iter().map(|line| format!("{line}\n")).collect();
    let request = process::http().post(format!("{}/_bulk", rig.store.url()));
    let answer = request.header("content-type", "application/x-ndjson").body(body).send().await.unwrap();
    let answer: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
    assert_eq!(answer["errors"], false, "{answer}");
}

fn index(index: &str, id: &str, version: i64) -> Value {
    json!({"index": {"_index": index, "_id": id, "version": version, "version_type": "external_gte"}})
}

fn delete(index: &str, id: &str, version: i64) -> Value {
    json!({"delete": {"_index": index, "_id": id, "version": version, "version_type": "external_gte"}})
}

fn options(config: Config) -> Options {
    Options { timeout: LIMIT, ..Options::new(Arc::new(config)) }
}

async fn run(options: &Options) -> Result<Report, Problem> {
    tokio::time::timeout(2 * LIMIT, verify::run(options, &CancellationToken::new(), |_| {})).await.expect("it hangs")
}

async fn compare(config: Config) -> Report {
    run(&options(config)).await.unwrap()
}

/// Kinds, ids and fields.
fn found(table: &TableReport) -> Vec<(DifferenceKind, String, String)> {
    let mut found: Vec<_> = table
        .differences
        .iter()
        .map(|difference| (difference.kind, difference.id.clone(), difference.fields.join(",")))
        .collect();
    found.sort_by(|one, other| one.1.cmp(&other.1));
    found
}

/// Plants one of each kind into the index `items`, which is that of [`ITEMS`].
async fn spoil(rig: &Rig) {
    let version = rig.version("items", "7");
    let spoilt = json!({"id": 7, "name": "no item", "price": 7.500});
    let extra = json!({"id": 9999, "name": "nobody", "price": 1});
    plant(
        rig,
        &[
            delete("items", "5", version),
            index("items", "7", version),
            spoilt,
            index("items", "9999", version),
            extra,
            // Written anew, with the same meaning.
            index("items", "8", version),
            json!({"price": 8.5, "name": "item 8", "id": 8}),
        ],
    )
    .await;
}

fn spoilt() -> Vec<(DifferenceKind, String, String)> {
    vec![
        (DifferenceKind::Missing, "5".into(), String::new()),
        (DifferenceKind::Different, "7".into(), "name".into()),
        (DifferenceKind::Extra, "9999".into(), String::new()),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_differs_is_named_and_nothing_else() {
    let rig = Rig::new().await;
    rig.sql(ITEMS).await;
    let config = rig.config(&["items"]);
    let engine = rig.run(config.clone()).await;
    rig.delivered().await;
    let equal = compare(config.clone()).await;
    assert_eq!(equal.outcome(), Outcome::Equal, "{equal:?}");
    assert_eq!((equal.tables[0].rows, equal.tables[0].documents), (2000, 2000));
    assert!(equal.notes.is_empty(), "{:?}", equal.notes);

    spoil(&rig).await;
    let report = compare(config.clone()).await;
    assert_eq!(report.outcome(), Outcome::Different);
    let table = &report.tables[0];
    assert_eq!((table.missing, table.extra, table.different), (1, 1, 1));
    assert_eq!(found(table), spoilt());
    assert!(table.differences.iter().all(|found| found.row.is_none() && found.document.is_none()), "{table:?}");

    let shown = run(&Options { show_values: true, limit: 2, ..options(config) }).await.unwrap();
    assert_eq!(shown.tables[0].differences.len(), 2);
    assert_eq!(shown.tables[0].unequal(), 3);
    let values: String = shown.tables[0].differences.iter().map(|found| format!("{found:?}")).collect();
    assert!(values.contains("no item") || values.contains("nobody"), "{values}");
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repair_mends_what_differs_and_touches_nothing_else() {
    let rig = Rig::new().await;
    rig.sql(ITEMS).await;
    let config = rig.config(&["items"]);
    let engine = rig.run(config.clone()).await;
    rig.delivered().await;
    spoil(&rig).await;
    // A document with a routing of its own, beside the right one in the real Elasticsearch, in its place here.
    let untouched = rig.version("items", "11");
    let report = run(&Options { repair: true, ..options(config.clone()) }).await.unwrap();
    let table = &report.tables[0];
    assert_eq!(report.outcome(), Outcome::Equal, "{table:?}");
    assert_eq!((table.missing, table.extra, table.different, table.left), (1, 1, 1, Some(0)));
    let repaired = table.repaired.unwrap();
    assert_eq!((repaired.written, repaired.deleted, repaired.refused), (2, 1, 0));
    rig.equal("items").await;
    assert_eq!(rig.version("items", "11"), untouched);
    assert!(rig.version("items", "7") > untouched, "written under a newer snapshot");
    // The stream goes on over it.
    rig.sql("UPDATE items SET name = 'after' WHERE id IN (5, 7); INSERT INTO items VALUES (9999, 'now', 1)").await;
    rig.equal("items").await;
    assert_eq!(rig.count("SELECT count(*) FROM pg_replication_slots WHERE temporary").await, 0);
    rig.nobody_idles_in_a_transaction().await;
    stop(engine).await;
}

/// The row goes, and its delete is applied and forgotten, while the repair's write is on its way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repair_brings_no_deleted_row_back() {
    let rig = Rig::new().await;
    rig.sql(ITEMS).await;
    let config = rig.config(&["items"]);
    let engine = rig.run(config.clone()).await;
    rig.delivered().await;
    plant(&rig, &[delete("items", "5", rig.version("items", "5")), delete("items", "6", rig.version("items", "6"))])
        .await;
    rig.hold(1);
    let repairing = Options { repair: true, ..options(config) };
    let repair = tokio::spawn(async move { run(&repairing).await.unwrap() });
    rig.until_held().await;
    rig.sql("DELETE FROM items WHERE id = 5; UPDATE items SET name = 'newer' WHERE id = 6").await;
    rig.delivered().await;
    rig.store.forget_tombstones();
    rig.store.clear_faults();
    let report = repair.await.unwrap();
    let repaired = report.tables[0].repaired.unwrap();
    assert_eq!(report.outcome(), Outcome::Equal, "{report:?}");
    assert!(repaired.deleted == 1 && repaired.superseded == 1, "{repaired:?}");
    rig.equal("items").await;
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_document_from_elsewhere_cannot_be_repaired_and_a_refused_one_is_said_to_be() {
    let rig = Rig::new().await;
    rig.sql(ITEMS).await;
    let mut config = rig.config(&["items"]);
    // With a mapping of the test's.
    config.elasticsearch.manage_indices = false;
    let engine = rig.run(config.clone()).await;
    rig.delivered().await;
    let ahead = i64::MAX - 1;
    plant(&rig, &[index("items", "7", ahead), json!({"id": 7, "name": "far ahead", "price": 1})]).await;
    let report = run(&Options { repair: true, ..options(config.clone()) }).await.unwrap();
    let table = &report.tables[0];
    assert_eq!((report.outcome(), table.left), (Outcome::Different, Some(1)), "{table:?}");
    assert!(table.differences[0].foreign, "{table:?}");
    assert!(table.repaired.unwrap().superseded > 0, "{table:?}");
    stop(engine).await;

    let mapping = json!({"properties": {"name": {"type": "integer"}}});
    let put = process::http().put(format!("{}/items/_mapping", rig.store.url()));
    let put = put.header("content-type", "application/json").body(mapping.to_string()).send().await.unwrap();
    assert!(put.status().is_success(), "{}", put.text().await.unwrap());
    plant(&rig, &[delete("items", "9", rig.version("items", "9"))]).await;
    let folder = tempfile::tempdir().unwrap();
    let dead_letter_file = folder.path().join("letters.ndjson");
    let refused = Options { repair: true, dead_letter_file, ..options(config) };
    let report = run(&refused).await.unwrap();
    let table = &report.tables[0];
    assert_eq!((report.outcome(), table.left), (Outcome::Different, Some(2)), "{table:?}");
    let nine = table.differences.iter().find(|found| found.id == "9").unwrap();
    assert!(nine.refused.as_ref().unwrap().contains("parsing_exception"), "{nine:?}");
}

/// While four sessions change the rows all the time, nothing is said to differ; what differs for good is, each time.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_running_workload_makes_no_difference() {
    let rig = Rig::new().await;
    rig.sql(ITEMS).await;
    rig.sql("CREATE TABLE parts (id int, sub int, at int NOT NULL, PRIMARY KEY (id, sub)) PARTITION BY LIST (sub);
             CREATE TABLE parts_0 PARTITION OF parts FOR VALUES IN (0); CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1);
             INSERT INTO parts SELECT i, i % 2, 0 FROM generate_series(1, 500) AS i")
        .await;
    let mut config = rig.config(&["items", "parts"]);
    config.cdc.publication.tables[1].partitioned = true;
    let engine = rig.run(config.clone()).await;
    let ended = Arc::new(AtomicBool::new(false));
    let mut writers = Vec::new();
    for seed in 0..4 {
        let (client, ended) = (rig.connect().await, Arc::clone(&ended));
        writers.push(tokio::spawn(async move {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut changes = 0_u64;
            while !ended.load(Relaxed) {
                let id = random.i32(1..2200);
                // 5 and 7 are for the differences that are planted.
                let id = if matches!(id, 5 | 7) { 6 } else { id };
                let sql = match random.u8(0..6) {
                    0 => format!("DELETE FROM items WHERE id = {id}"),
                    1 => format!("INSERT INTO items VALUES ({id}, 'again', 1) ON CONFLICT DO NOTHING"),
                    2 => format!("UPDATE parts SET sub = 1 - sub WHERE id = {id} AND NOT EXISTS (SELECT FROM parts p WHERE p.id = {id} AND p.sub = 1 - parts.sub)"),
                    3 => format!("BEGIN; DELETE FROM items WHERE id = {id}; INSERT INTO items VALUES ({id}, 'anew', {id}); COMMIT"),
                    _ => format!("UPDATE items SET price = price + 1, name = name || '.' WHERE id = {id}"),
                };
                // Two sessions may insert the same key.
                if client.batch_execute(&sql).await.is_err() {
                    client.batch_execute("ROLLBACK").await.unwrap();
                }
                changes += 1;
            }
            changes
        }));
    }
    for _ in 0..12 {
        let report = compare(config.clone()).await;
        assert_eq!(report.outcome(), Outcome::Equal, "{report:?}");
    }
    for round in 0..4 {
        let version = rig.version("items", "7");
        plant(&rig, &[delete("items", "5", version), index("items", "7", version), json!({"id": 7})]).await;
        let report = run(&Options { repair: round % 2 == 1, ..options(config.clone()) }).await.unwrap();
        let table = &report.tables[0];
        assert_eq!((table.missing, table.extra, table.different), (1, 0, 1), "{table:?}");
        assert_eq!(report.outcome() == Outcome::Equal, round % 2 == 1, "{table:?}");
    }
    ended.store(true, Relaxed);
    let mut changes = 0;
    for writer in writers {
        changes += writer.await.unwrap();
    }
    assert!(changes > 200, "only {changes} changes were made meanwhile");
    rig.equal("items").await;
    rig.equal_by("parts", "id || ':' || sub").await;
    stop(engine).await;
}

/// What was read of the table as it was is no difference, and repairs nothing, once its documents are those of another.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_altered_meanwhile_is_not_compared_nor_repaired() {
    for step in ["looking again at what seems to differ", "repairing"] {
        let rig = Arc::new(Rig::new().await);
        rig.sql(ITEMS).await;
        let config = rig.config(&["items"]);
        let engine = rig.run(config.clone()).await;
        rig.delivered().await;
        spoil(&rig).await;
        let (altering, altered) = (Arc::clone(&rig), AtomicBool::new(false));
        let alter = move |progress: &verify::Progress| {
            if progress.step == step && !altered.swap(true, Relaxed) {
                tokio::task::block_in_place(|| {
                    Handle::current().block_on(async {
                        altering.sql("ALTER TABLE items ADD COLUMN n int DEFAULT 5").await;
                        altering.becomes_equal("items").await;
                    });
                });
            }
        };
        let repairing = Options { repair: true, progress: Some(Arc::new(alter)), ..options(config.clone()) };
        let report = run(&repairing).await.unwrap();
        let table = &report.tables[0];
        assert_eq!((report.outcome(), table.repaired), (Outcome::NotCompared, None), "{step}: {table:?}");
        let reason = "the table was altered while it was compared: its columns have changed".to_owned();
        assert_eq!(table.not_compared, BTreeMap::from([(reason, 2_000)]), "{step}");
        rig.equal("items").await;
        assert_eq!(compare(config).await.outcome(), Outcome::Equal);
        stop(engine).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_stream_only_what_no_change_explains_counts() {
    let rig = Rig::new().await;
    rig.sql(ITEMS).await;
    let config = rig.config(&["items"]);
    let engine = rig.run(config.clone()).await;
    rig.delivered().await;
    stop(engine).await;
    assert_eq!(compare(config.clone()).await.outcome(), Outcome::Equal);
    // WAL that is none of ours does not explain anything.
    rig.sql("CREATE TABLE other (id int); INSERT INTO other SELECT generate_series(1, 1000); CHECKPOINT").await;
    spoil(&rig).await;
    let report = compare(config.clone()).await;
    assert_eq!(found(&report.tables[0]), spoilt(), "{report:?}");

    // A change that waits may.
    rig.sql("UPDATE items SET name = 'newer' WHERE id = 20").await;
    let report = compare(config.clone()).await;
    assert_eq!(report.outcome(), Outcome::NotCompared, "{report:?}");
    let (reason, count) = report.tables[0].not_compared.iter().next().unwrap();
    assert!(reason.contains("nothing streams from slot") && *count == 4, "{reason} {count}");
    assert_eq!(report.tables[0].unequal(), 0);

    // Nothing will ever come from a slot that is gone.
    rig.text(&format!("SELECT pg_drop_replication_slot('{}')::text", rig.name)).await;
    let report = compare(config).await;
    assert_eq!(report.tables[0].unequal(), 4, "{report:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_hangs_is_waited_for_no_longer_than_asked() {
    let rig = Rig::new().await;
    rig.sql(ITEMS).await;
    let config = rig.config(&["items"]);
    let engine = rig.run(config.clone()).await;
    rig.delivered().await;
    rig.hold(100);
    rig.sql("UPDATE items SET name = 'held' WHERE id = 3").await;
    rig.until_held().await;
    let short = Options { timeout: Duration::from_secs(1), ..options(config.clone()) };
    let report = run(&short).await.unwrap();
    assert_eq!(report.outcome(), Outcome::NotCompared, "{report:?}");
    let reason = report.tables[0].not_compared.keys().next().unwrap();
    assert!(reason.contains("the stream of slot"), "{reason}");
    rig.store.clear_faults();
    assert_eq!(compare(config).await.outcome(), Outcome::Equal);
    stop(engine).await;
}

/// A commit that waits for a standby is in the index before anybody sees it in the table.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_nobody_sees_yet_is_no_difference() {
    let server = own_server_with(&[]).await;
    let rig = Rig::on(&server).await;
    rig.sql(ITEMS).await;
    let config = rig.config(&["items"]);
    let engine = rig.run(config.clone()).await;
    let unconfirmed = Unconfirmed::begin(&rig.client, rig.connect().await).await;
    let other = rig.connect().await;
    let change = tokio::spawn(async move {
        other
            .batch_execute(
                "BEGIN; UPDATE items SET name = 'unseen' WHERE id = 3; DELETE FROM items WHERE id = 4; COMMIT",
            )
            .await
    });
    wait_until("the documents have it", LIMIT, || async { !rig.documents("items").contains_key("4") }).await;
    assert_eq!(rig.count("SELECT count(*) FROM items WHERE name = 'unseen'").await, 0);
    let short = Options { timeout: Duration::from_secs(2), ..options(config.clone()) };
    let report = run(&short).await.unwrap();
    assert_eq!(report.outcome(), Outcome::NotCompared, "{report:?}");
    assert!(report.tables[0].not_compared.keys().any(|reason| reason.contains("standby")), "{report:?}");
    assert!(!change.is_finished());
    unconfirmed.end(&rig.client).await;
    change.await.unwrap().unwrap();
    assert_eq!(compare(config).await.outcome(), Outcome::Equal);
    stop(engine).await;
    drop(rig);
    server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_type_and_any_key_compare_equal() {
    let rig = Rig::new().await;
    rig.sql(
        r#"CREATE TYPE mood AS ENUM ('glad', 'sad');
        CREATE DOMAIN small AS int CHECK (value < 100);
        CREATE TABLE kinds (
            id int PRIMARY KEY, b bool, i2 int2, i8 int8, f4 float4, f8 float8, n numeric, t text, c char(5), v varchar,
            by bytea, j json, jb jsonb, d date, ts timestamp, tz timestamptz, ti time, iv interval, u uuid, inet inet,
            m mood, s small, ia int[], ta text[], na numeric[], r int4range, mo money, bi bit(3), x xml, o oid, mm mood[],
            "Odd ""name" text, g int GENERATED ALWAYS AS (id * 2) STORED);
        INSERT INTO kinds VALUES
          (1, true, -5, 9007199254740993, 0.1, 1e-300, 12345678901234567890.1234567890, E'a\tb\n\\"é', 'ab', '', '\xdeadbeef',
           '{"b" :  1, "a": [1.50, "\u0041", null]}', '{"b": 1e3, "a": {}}', '2024-02-29', '2024-01-01 10:00:00.5',
           '2024-01-01 10:00:00+02', '10:00', '1 day', 'a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11', '10.0.0.1/8', 'sad', 7,
           '{1,NULL,3}', '{a,"b,c",NULL}', '{1.10,2}', '[1,5)', 12.5, B'101', '<a/>', 42, '{sad,glad}', 'quoted'),
          (2, NULL, NULL, NULL, 'NaN', '-Infinity', 'NaN', NULL, NULL, NULL, NULL, 'null', '17.50', 'infinity',
           '0044-03-15 BC', NULL, NULL, NULL, NULL, NULL, NULL, NULL, '{}', '{{a,b},{c,d}}', NULL, 'empty', NULL, NULL,
           NULL, NULL, NULL, NULL);
        CREATE TABLE names (a text, b text, n int, PRIMARY KEY (a, b));
        INSERT INTO names VALUES ('', '', 1), (':', '\', 2), ('a:b', 'c', 3), ('a', 'b:c', 4), (repeat('long', 200), 'x', 5),
            (E'new\nline', E'tab\t', 6), ('é', '"', 7), ('''', '$1', 8);
        CREATE TABLE words (word text PRIMARY KEY, n int);
        INSERT INTO words VALUES ('', 1), (repeat('k', 600), 2), ('a b', 3), ('7', 4), (' 7', 5);
        CREATE TABLE sums (sum numeric PRIMARY KEY); INSERT INTO sums VALUES (1.50), (2.0), (1e10), (-3);
        CREATE TABLE days (day timestamptz PRIMARY KEY, n mood); INSERT INTO days VALUES ('2024-01-01 00:00+00', 'glad');
        CREATE TABLE nothing (id int PRIMARY KEY)"#,
    )
    .await;
    let tables = ["kinds", "names", "words", "sums", "days", "nothing"];
    let config = rig.config(&tables);
    let engine = rig.run(config.clone()).await;
    // The stream's documents are the copy's.
    rig.sql("UPDATE kinds SET id = id + 10; INSERT INTO words VALUES (repeat('z', 513), 1); UPDATE names SET n = -n")
        .await;
    rig.delivered().await;
    let report = compare(config.clone()).await;
    assert_eq!(report.outcome(), Outcome::Equal, "{report:?}");
    let counted: BTreeMap<&str, (u64, u64)> =
        report.tables.iter().map(|table| (table.index.as_str(), (table.rows, table.documents))).collect();
    let all = [
        ("days", (1, 1)),
        ("kinds", (2, 2)),
        ("names", (8, 8)),
        ("nothing", (0, 0)),
        ("sums", (4, 4)),
        ("words", (6, 6)),
    ];
    assert_eq!(counted, BTreeMap::from(all));

    // Every document is spoilt: every one is found by its key, and mended.
    for table in ["kinds", "names", "words", "sums", "days"] {
        let ids: Vec<(String, i64)> =
            rig.documents(table).into_keys().map(|id| (id.clone(), rig.version(table, &id))).collect();
        for (id, version) in ids {
            plant(&rig, &[index(table, &id, version), json!({"spoilt": true})]).await;
        }
        // Ids of no key of this table, or of none at all.
        let digest = "0123456789abcdef".repeat(4);
        for id in ["none", "1.5", "a:b:c", "\\", &digest] {
            plant(&rig, &[index(table, id, 8), json!({})]).await;
        }
    }
    let report = compare(config.clone()).await;
    for table in &report.tables {
        let (rows, extra) = (table.rows, if table.index == "nothing" { 0 } else { 5 });
        assert_eq!((table.missing, table.extra, table.different), (0, extra, rows), "{table:?}");
    }
    let report = run(&Options { repair: true, ..options(config) }).await.unwrap();
    assert_eq!(report.outcome(), Outcome::Equal, "{report:?}");
    rig.equal_by("sums", "sum::text").await;
    let words: Vec<Value> = rig.documents("words").into_values().map(|word| word["n"].clone()).collect();
    assert_eq!(words.len(), 6);
    assert!(words.iter().all(Value::is_number), "{words:?}");
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn filters_lists_and_conditions_are_by_design() {
    let rig = Rig::new().await;
    // Row filters and lists of columns came with PostgreSQL 15; before, the condition of the copy is what there is.
    let filtered = rig.count("SELECT current_setting('server_version_num')::int8").await >= 150_000;
    rig.sql(ITEMS).await;
    let filter = if filtered { "(id, name) WHERE (id > 100)" } else { "" };
    rig.sql(&format!("CREATE PUBLICATION {} FOR TABLE items {filter}", rig.name)).await;
    let (copied, extra) = if filtered { (950, "50") } else { (1000, "-50") };
    let mut config = rig.config(&["items"]);
    config.cdc.publication.tables[0].query_condition = Some("id % 2 = 0".into());
    let engine = rig.run(config.clone()).await;
    rig.delivered().await;
    assert_eq!(rig.documents("items").len(), copied);
    let report = compare(config.clone()).await;
    assert_eq!(report.outcome(), Outcome::Equal, "{report:?}");
    // The condition is the copy's: a change brings its row. The filter is the stream's: a row that leaves it goes.
    rig.sql("UPDATE items SET name = 'odd' WHERE id = 301; UPDATE items SET id = -302 WHERE id = 302").await;
    rig.delivered().await;
    let report = compare(config.clone()).await;
    assert_eq!(report.outcome(), Outcome::Equal, "{report:?}");
    let version = rig.version("items", "301");
    plant(
        &rig,
        &[
            index("items", "301", version),
            json!({"id": 301, "name": "even"}),
            index("items", extra, version),
            json!({"id": 50, "name": "item 50"}),
            delete("items", "400", version),
        ],
    )
    .await;
    let report = run(&Options { repair: true, ..options(config.clone()) }).await.unwrap();
    let table = &report.tables[0];
    assert_eq!((table.missing, table.extra, table.different, table.left), (1, 1, 1, Some(0)), "{table:?}");
    assert_eq!(rig.documents("items").len(), copied + usize::from(!filtered));
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_is_not_done_is_not_compared_and_one_that_is_asked_for_explains_differences() {
    let rig = Rig::new().await;
    rig.sql(ITEMS).await;
    let config = rig.config(&["items"]);
    let missing = run(&options(config.clone())).await.unwrap_err();
    assert!(missing.message.contains("no publication"), "{missing:?}");
    assert_eq!(rig.count("SELECT count(*) FROM pg_publication").await, 0, "it made something");
    let engine = rig.run(config.clone()).await;
    rig.delivered().await;
    stop(engine).await;
    spoil(&rig).await;
    rig.sql(&format!(
        "INSERT INTO cdc_snapshot_chunks (slot_name, table_schema, table_name, chunk_index, chunk_start, chunk_size, status)
         VALUES ('{}', 'public', 'items', -1, 0, 0, 'wanted')",
        rig.name
    ))
    .await;
    let report = compare(config.clone()).await;
    assert_eq!(report.outcome(), Outcome::NotCompared, "{report:?}");
    assert_eq!(report.tables[0].not_compared, BTreeMap::from([("the table is being copied again".to_owned(), 3)]));
    rig.sql("UPDATE cdc_snapshot_job SET completed = false").await;
    let problem = run(&options(config.clone())).await.unwrap_err();
    assert!(problem.message.contains("still being copied"), "{problem:?}");
    let unknown = run(&Options { table: Some("public.item".into()), ..options(config) }).await.unwrap_err();
    assert!(unknown.message.contains("public.item") && unknown.hint.contains("public.items"), "{unknown:?}");
}

/// Mode `never` has a job in the ledger that nobody completes, and no copy is under way for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn where_nothing_is_copied_rows_of_before_are_missing_and_can_be_repaired() {
    let rig = Rig::new().await;
    for table in ["books", "others"] {
        let make = format!("CREATE TABLE {table} (id int PRIMARY KEY, title text)");
        rig.sql(&format!("{make}; INSERT INTO {table} VALUES (1, 'before'), (2, 'before')")).await;
    }
    let mut config = rig.config(&["books", "others"]);
    config.cdc.snapshot.mode = Mode::Never;
    let engine = rig.run(config.clone()).await;
    rig.sql("INSERT INTO books VALUES (3, 'after')").await;
    rig.delivered().await;
    let report = compare(config.clone()).await;
    let missing = |id: &str| (DifferenceKind::Missing, id.to_owned(), String::new());
    assert_eq!(found(&report.tables[0]), [missing("1"), missing("2")]);
    assert!(report.notes.iter().any(|note| note.contains("is not copied by this configuration")), "{report:?}");
    let one = Options { repair: true, table: Some("public.books".into()), ..options(config.clone()) };
    assert_eq!(run(&one).await.unwrap().outcome(), Outcome::Equal);
    rig.equal("books").await;

    let standby = rig.start(config.clone());
    phase(&standby, Phase::Standby).await;
    wait_until("it shows that nothing is copied", LIMIT, || async {
        let status = standby.status();
        status.tables.iter().all(|table| table.state == TableState::Standby) && !status.snapshot.running
    })
    .await;
    stop(standby).await;
    stop(engine).await;

    // Whoever copies begins with the first row.
    config.cdc.snapshot.mode = Mode::Initial;
    let engine = rig.run(config).await;
    rig.equal("books").await;
    rig.equal("others").await;
    let notices = engine.status().notices;
    assert!(notices.iter().any(|notice| notice.text.contains("mode `never` has streamed until now")), "{notices:?}");
    stop(engine).await;
}

fn program(arguments: &[&str]) -> Output {
    std::process::Command::new(process::PROGRAM).arg("verify").args(arguments).output().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_program_tells_by_its_exit_code() {
    let rig = Rig::new().await;
    rig.sql(ITEMS).await;
    let config = rig.config(&["items"]);
    let engine = rig.run(config.clone()).await;
    rig.delivered().await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("pgtide.json");
    let cdc = &config.cdc;
    let configuration = |urls: &str| {
        json!({
            "cdc": {
                "host": cdc.host, "port": cdc.port, "database": cdc.database, "username": cdc.username,
                "password": cdc.password.0, "sslMode": "disable",
                "publication": {"name": rig.name, "tables": [{"name": "items"}]},
                "slot": {"name": rig.name}, "snapshot": {"enabled": true, "mode": "initial"},
            },
            "elasticsearch": {"urls": [urls], "tableIndexMapping": {"public.items": "items"}},
        })
        .to_string()
    };
    std::fs::write(&file, configuration(&rig.store.url())).unwrap();
    let file = file.to_str().unwrap();
    let logs = folder.path().to_str().unwrap();
    let common = ["--config", file, "--log-folder", logs];
    let with = |more: &[&str]| program(&[&common, more].concat());

    let equal = with(&[]);
    let stdout = String::from_utf8_lossy(&equal.stdout).into_owned();
    assert_eq!(equal.status.code(), Some(0), "{equal:?}");
    assert_eq!(stdout, "public.items -> items: 2,000 rows, 2,000 documents: equal\n");
    assert!(equal.stderr.is_empty(), "{equal:?}");

    spoil(&rig).await;
    let different = with(&["--table", "items", "--json"]);
    assert_eq!(different.status.code(), Some(1), "{different:?}");
    let text_of = |output: &Output| String::from_utf8_lossy(&output.stdout).into_owned();
    let lines: Vec<Value> = text_of(&different).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines.len(), 4, "{lines:?}");
    assert_eq!(lines[3]["missing"], 1);
    let plain = with(&[]);
    let text = text_of(&plain);
    assert!(text.contains("  missing   5\n") && text.contains("  different 7  name\n"), "{text}");
    assert!(text.contains("  extra     9999\n"), "{text}");
    assert!(!text.contains("no item") && !text.contains("nobody"), "row contents were printed: {text}");
    assert!(text_of(&with(&["--show-values"])).contains("no item"));

    let repaired = with(&["--repair"]);
    assert_eq!(repaired.status.code(), Some(0), "{repaired:?}");
    assert!(text_of(&repaired).contains("2 sent, 1 removed; none differs any more"), "{repaired:?}");

    let dead = folder.path().join("dead.json");
    std::fs::write(&dead, configuration("http://127.0.0.1:1")).unwrap();
    for (arguments, says) in [
        (vec!["--config", "/nonexistent/pgtide.yaml"], "/nonexistent/pgtide.yaml"),
        (vec!["--config", dead.to_str().unwrap(), "--log-folder", logs], "no connection to"),
        ([&common[..], &["--temp-folder", file]].concat(), "temporary files"),
    ] {
        let failed = program(&arguments);
        let stderr = String::from_utf8_lossy(&failed.stderr).into_owned();
        assert_eq!(failed.status.code(), Some(2), "{arguments:?}: {failed:?}");
        assert!(stderr.contains(says), "{arguments:?}: {stderr}");
    }
    stop(engine).await;
    rig.sql("UPDATE items SET name = 'waits' WHERE id = 1").await;
    let waits = with(&[]);
    assert_eq!(waits.status.code(), Some(2), "{waits:?}");
    assert!(text_of(&waits).contains("1 not compared"), "{waits:?}");
}
