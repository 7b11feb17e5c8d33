//! Indices that pgtide makes: mapping, alias, settings while the first copy runs, columns that come later, and what
//! `pgtide check` says of them before.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::process::Output;

use pgtide::engine::Engine;
use pgtide::sink::{Client, Content};
use pgtide::store::{Effect, Fault};
use reqwest::Method;
use serde_json::{Value, json};
use support::pipeline::{LIMIT, Rig, stop};
use support::process::{Pipeline, Settings};
use support::wait_until;

const ITEMS: &str = "CREATE TYPE mood AS ENUM ('glad', 'sad');
    CREATE TABLE items (id int PRIMARY KEY, name text, price numeric(12,2), m mood[], j jsonb, at timestamptz);
    INSERT INTO items SELECT n, 'name ' || n, n, '{glad}', '[1, \"a\"]', '2024-01-01T00:00:00+00' FROM generate_series(1, 500) n";

/// What `GET /{name}` says.
async fn index(rig: &Rig, name: &str) -> Value {
    let client = Client::new(&rig.config(&["items"]).elasticsearch).unwrap();
    let answer = client.send(Method::GET, &[name], &[("flat_settings", "true")], Content::Empty).await.unwrap();
    let mut indices: Value = answer.json().unwrap();
    assert_eq!(answer.status, 200, "{indices}");
    let indices = indices.as_object_mut().unwrap();
    let (own_name, mut index) = std::mem::take(indices).into_iter().next().unwrap();
    index["name"] = json!(own_name);
    index
}

async fn create(rig: &Rig, name: &str, body: Value) {
    let client = Client::new(&rig.config(&["items"]).elasticsearch).unwrap();
    client.create_index(name, &body).await.unwrap();
}

fn noticed(engine: &Engine, text: &str) -> bool {
    engine.status().notices.iter().any(|notice| notice.text.contains(text))
}

/// A first copy goes into it: no refresh, no replicas, and it says what they were.
fn is_hurried(index: &Value) -> bool {
    let setting = |name: &str| index["settings"][name].as_str();
    let fast = setting("index.refresh_interval") == Some("-1") && setting("index.number_of_replicas") == Some("0");
    let kept = index["mappings"]["_meta"]["pgtide"]["settings_before_copy"]
        == json!({"index.refresh_interval": null, "index.number_of_replicas": "1"});
    assert!(kept || !fast, "nobody knows what the settings were: {index}");
    fast
}

fn is_restored(index: &Value) -> bool {
    index["settings"].get("index.refresh_interval").is_none()
        && index["settings"]["index.number_of_replicas"] == "1"
        && index["mappings"]["_meta"]
            == json!({"pgtide": {"job": index["mappings"]["_meta"]["pgtide"]["job"], "table": "public.items"}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_index_is_made_and_one_that_is_there_is_left() {
    let rig = Rig::new().await;
    rig.sql(&format!("{ITEMS}; CREATE TABLE old (id int PRIMARY KEY, v text); INSERT INTO old VALUES (1, 'a')")).await;
    create(&rig, "old", json!({"mappings": {"properties": {"v": {"type": "text"}}}})).await;
    let before = index(&rig, "old").await;

    let engine = rig.run(rig.config(&["items", "old"])).await;
    let made = index(&rig, "items").await;
    assert_eq!(made["name"], "items-000001");
    assert_eq!(made["aliases"], json!({"items": {}}));
    assert_eq!(made["mappings"]["dynamic"], json!(false));
    let types =
        ["id", "name", "price", "m", "j", "at"].map(|name| made["mappings"]["properties"][name]["type"].clone());
    assert_eq!(types, ["integer", "keyword", "scaled_float", "keyword", "object", "date"].map(Value::from));
    assert_eq!(made["settings"]["index.gc_deletes"], "10m");
    assert_eq!(made["mappings"]["_meta"]["pgtide"]["job"], json!(rig.name));
    assert!(is_restored(&made), "{made}");
    assert_eq!(index(&rig, "old").await, before);
    for table in ["items", "old"] {
        rig.equal(table).await;
    }
    stop(engine).await;

    // Again: nothing is made, and nothing changed.
    let engine = rig.run(rig.config(&["items", "old"])).await;
    assert_eq!((index(&rig, "items").await, index(&rig, "old").await), (made, before));
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn switched_off_nothing_is_made() {
    let rig = Rig::new().await;
    rig.sql(ITEMS).await;
    let mut config = rig.config(&["items"]);
    config.elasticsearch.manage_indices = false;
    let engine = rig.run(config).await;
    let found = index(&rig, "items").await;
    assert_eq!((&found["name"], &found["aliases"], &found["mappings"]), (&json!("items"), &json!({}), &json!({})));
    rig.equal("items").await;
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_is_hurried_and_its_settings_come_back_though_elasticsearch_fails() {
    let rig = Rig::new().await;
    rig.sql(ITEMS).await;
    rig.hold(1);
    let engine = rig.start(rig.config(&["items"]));
    rig.until_held().await;
    let copying = index(&rig, "items").await;
    assert!(is_hurried(&copying), "{copying}");
    // From now on it cannot be put back, nor even looked at.
    let refused = Effect::Reject { status: 503, kind: None };
    rig.store.clear_faults();
    rig.store.inject(Fault::new(refused).on("items-000001/_settings").times(3));
    support::pipeline::live(&engine).await;
    wait_until("the settings are back", LIMIT, || async { is_restored(&index(&rig, "items").await) }).await;
    assert!(noticed(&engine, "trying again"), "{:?}", engine.status().notices);
    rig.equal("items").await;
    stop(engine).await;
}

/// One that serves is never hurried, whoever made it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_that_serves_keeps_its_settings_in_a_copy_of_everything() {
    let rig = Rig::new().await;
    rig.sql(ITEMS).await;
    stop(rig.run(rig.config(&["items"])).await).await;
    let served = index(&rig, "items").await;
    let mut config = rig.config(&["items"]);
    config.cdc.snapshot.resnapshot = true;
    rig.hold(1);
    let engine = rig.start(config);
    rig.until_held().await;
    assert_eq!(index(&rig, "items").await, served);
    rig.store.clear_faults();
    support::pipeline::live(&engine).await;
    assert_eq!(index(&rig, "items").await, served);
    stop(engine).await;
}

fn process(rig: &Rig) -> Pipeline {
    let settings =
        Settings { name: rig.name.clone(), tables: vec!["items"], chunk_size: 100, batch_size_limit: 10, workers: 1 };
    Pipeline::to(&rig.config(&["items"]).cdc, &rig.store.url(), &settings)
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_in_the_copy_the_settings_come_back_with_the_next_start() {
    let rig = Rig::new().await;
    rig.sql(ITEMS).await;
    let mut pipeline = process(&rig);
    rig.hold_after(5, 1);
    pipeline.start();
    rig.until_held().await;
    assert!(is_hurried(&index(&rig, "items").await));
    pipeline.kill();
    rig.store.clear_faults();
    assert!(is_hurried(&index(&rig, "items").await));

    pipeline.start();
    pipeline.wait("it streams", LIMIT, |status| status.phase == pgtide::engine::Phase::Streaming).await;
    let after = index(&rig, "items").await;
    assert!(is_restored(&after), "{after}");
    rig.equal("items").await;
    pipeline.kill();
}

/// After its end and before the settings are back, too; and for good by `pgtide drop`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_behind_the_copy_the_settings_come_back_and_by_drop_as_well() {
    for dropped in [false, true] {
        let rig = Rig::new().await;
        rig.sql(ITEMS).await;
        let mut pipeline = process(&rig);
        rig.hold(1);
        pipeline.start();
        rig.until_held().await;
        rig.store.clear_faults();
        rig.store.inject(Fault::new(Effect::Reject { status: 503, kind: None }).on("items-000001/_settings"));
        let done = "SELECT count(*) FROM cdc_snapshot_job WHERE completed";
        wait_until("the copy is done", LIMIT, || async { rig.count(done).await == 1 }).await;
        pipeline.kill();
        rig.store.clear_faults();
        assert!(is_hurried(&index(&rig, "items").await));
        if dropped {
            let looked = pipeline.call(&["drop", "--dry-run"]);
            assert!(stdout(&looked).contains("settings of index items-000001"), "{looked:?}");
            assert!(is_hurried(&index(&rig, "items").await));
            // PostgreSQL notices a little later that the process is gone.
            wait_until("drop works", LIMIT, || async { pipeline.call(&["drop", "--yes"]).status.success() }).await;
        } else {
            pipeline.start();
            pipeline.wait("it streams", LIMIT, |status| status.phase == pgtide::engine::Phase::Streaming).await;
            pipeline.kill();
        }
        let after = index(&rig, "items").await;
        assert!(is_restored(&after), "{after}");
        rig.equal_now("items").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn added_columns_get_fields_and_altered_ones_are_told() {
    let rig = Rig::new().await;
    rig.sql(ITEMS).await;
    create(&rig, "old", json!({})).await;
    rig.sql("CREATE TABLE old (id int PRIMARY KEY); INSERT INTO old VALUES (1)").await;
    let config = || rig.config(&["items", "old"]);
    let engine = rig.run(config()).await;
    let field = async |name: &str| index(&rig, "items").await["mappings"]["properties"][name]["type"].clone();
    // While it runs.
    rig.sql("ALTER TABLE items ADD one date DEFAULT '2024-02-29'; ALTER TABLE old ADD one int DEFAULT 1").await;
    rig.becomes_equal("items").await;
    rig.becomes_equal("old").await;
    assert_eq!(field("one").await, "date");
    assert_eq!(index(&rig, "old").await["mappings"], json!({}));
    // What no field takes is in the document all the same, and said.
    rig.sql("ALTER TABLE items ALTER price TYPE text USING 'about ' || price").await;
    rig.becomes_equal("items").await;
    let text = "column price (text) is mapped as scaled_float in index items-000001, and would be keyword";
    assert!(noticed(&engine, text), "{:?}", engine.status().notices);
    stop(engine).await;

    // While it does not: before the first row comes.
    rig.sql("ALTER TABLE items ADD two inet DEFAULT '10.0.0.1/8'").await;
    let engine = rig.run(config()).await;
    rig.equal("items").await;
    assert_eq!(field("two").await, "ip");
    assert_eq!(engine.status().sink.rejected, 0);
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_shows_the_plan_and_changes_nothing() {
    let rig = Rig::new().await;
    rig.sql(ITEMS).await;
    let mut pipeline = process(&rig);
    let plan = pipeline.call(&["check"]);
    assert_eq!(plan.status.code(), Some(0), "{plan:?}");
    let text = stdout(&plan);
    for line in [
        "public.items -> items: index items-000001 is created, items its alias, with these fields",
        "  id     integer                   integer",
        "  name   text                      keyword, .text: text",
        "  price  numeric(12,2)             scaled_float by 100",
        "  m      mood[]                    keyword",
        "  j      jsonb                     stored only",
        "  at     timestamp with time zone  date",
        &format!("  slot {} is created", rig.name),
        &format!("  publication {} is created", rig.name),
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\nnot in\n{text}");
    }
    // What it shows is what is made.
    let json: Value = serde_json::from_str(&stdout(&pipeline.call(&["check", "--json"]))).unwrap();
    assert_eq!(json["tables"][0]["action"], "create");
    let nothing = "SELECT (SELECT count(*) FROM pg_replication_slots WHERE database = current_database())
                        + (SELECT count(*) FROM pg_publication) + (SELECT count(*) FROM pg_class WHERE relname LIKE 'cdc_%')";
    assert_eq!(rig.count(nothing).await, 0);
    assert!(rig.store.documents("items*").is_empty());
    let client = Client::new(&rig.config(&["items"]).elasticsearch).unwrap();
    assert!(!client.index_exists("items").await.unwrap());
    stop(rig.run(rig.config(&["items"])).await).await;
    let made = index(&rig, "items").await;
    assert_eq!(json["tables"][0]["index"], made["name"]);
    assert_eq!(json["tables"][0]["body"]["mappings"]["properties"], made["mappings"]["properties"]);

    // Of one that is there, and of one that was made by somebody else.
    rig.sql("ALTER TABLE items ADD later int; ALTER TABLE items ALTER name TYPE int USING NULL").await;
    let text = stdout(&pipeline.call(&["check"]));
    assert!(text.contains("index items-000001, made by pgtide, gets the fields later"), "{text}");
    assert!(text.contains("  ! name: keyword in the index"), "{text}");
    assert_eq!(index(&rig, "items").await, made);
    create(&rig, "other", json!({"mappings": {"dynamic": "strict", "properties": {"id": {"type": "long"}}}})).await;
    pipeline.set("/elasticsearch/tableIndexMapping", json!({"public.items": "other"}));
    let text = stdout(&pipeline.call(&["check"]));
    assert!(text.contains("index other is left as it is"), "{text}");
    assert!(text.contains("  ! id: long in the index"), "{text}");
    assert!(text.contains("  ! price: not in the index, which is strict: documents are refused"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_says_all_that_is_in_the_way_with_the_code_of_a_start() {
    let rig = Rig::new().await;
    rig.sql(ITEMS).await;
    rig.sql(
        "CREATE TABLE reserved (id int PRIMARY KEY, _source text); CREATE TABLE dots (a int PRIMARY KEY, \"a.b\" int)",
    )
    .await;
    rig.sql("CREATE TABLE keyless (v int)").await;
    let settings = Settings {
        name: rig.name.clone(),
        tables: vec!["items", "reserved", "dots", "keyless", "missing"],
        chunk_size: 100,
        batch_size_limit: 10,
        workers: 1,
    };
    let cdc = rig.config(&["items"]).cdc;
    let mut pipeline = Pipeline::to(&cdc, &rig.store.url(), &settings);
    let found = pipeline.call(&["check"]);
    assert_eq!(found.status.code(), Some(4), "{found:?}");
    let text = stdout(&found);
    for said in [
        "public.items -> items: index items-000001 is created",
        "table public.reserved has a column \"_source\", which Elasticsearch does not take as a field",
        "table public.dots has a column \"a\" and another that begins with \"a.\"",
        "public.keyless",
        "there is no table public.missing",
    ] {
        assert!(text.contains(said), "{said}\nnot in\n{text}");
    }
    pipeline.set("/elasticsearch/urls", json!(["http://127.0.0.1:1"]));
    let found = pipeline.call(&["check"]);
    assert_eq!(found.status.code(), Some(5), "{found:?}");
    assert!(stdout(&found).contains("there is no table public.missing"), "PostgreSQL was not looked at: {found:?}");
    pipeline.set("/cdc/port", 1);
    let found = pipeline.call(&["check"]);
    assert!(stdout(&found).contains("127.0.0.1:1"), "{found:?}");
    assert_eq!(found.status.code(), Some(5), "{found:?}");
}
