//! An embedder's handler in the place of the usual way from row to document.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../examples/handler.rs"]
mod example;
mod support;

use std::sync::{Arc, Mutex};

use pgtide::change::{self, Action, Change, Handler, Operation};
use pgtide::engine::Command;
use pgtide::lsn::Lsn;
use pgtide::table::TableId;
use serde_json::{Value, json};
use support::pipeline::{LIMIT, Rig, live, metric, operations, stop};
use support::wait_until;

const USERS: &str = "CREATE TABLE users (id int PRIMARY KEY, name text, born date)";

/// The example of the README, change by change.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_example_does_what_it_says() {
    let rig = Rig::new().await;
    rig.sql(USERS).await;
    rig.sql("INSERT INTO users VALUES (1, 'Ada', '1815-12-10'), (2, 'Grace', NULL)").await;
    let engine = rig.start_with(rig.config(&["users"]), Some(Arc::new(example::handler)));
    live(&engine).await;
    let ada = json!({"id": 1, "name": "Ada", "born": "1815-12-10", "operation": "SNAPSHOT"});
    assert_eq!(rig.documents("users")["1"], ada);
    rig.sql("INSERT INTO users VALUES (3, 'Alan', '1912-06-23')").await;
    rig.sql("UPDATE users SET name = 'Grace Hopper' WHERE id = 2").await;
    rig.sql("DELETE FROM users WHERE id = 1").await;
    rig.delivered().await;
    let documents = rig.documents("users");
    assert_eq!(documents.keys().collect::<Vec<_>>(), ["2", "3"]);
    assert_eq!(documents["2"], json!({"id": 2, "name": "Grace Hopper", "born": null, "operation": "UPDATE"}));
    assert_eq!(documents["3"], json!({"id": 3, "name": "Alan", "born": "1912-06-23", "operation": "INSERT"}));
    rig.sql("TRUNCATE users").await;
    rig.delivered().await;
    assert_eq!(rig.documents("users").len(), 2, "TRUNCATE was not left to the handler");
    let status = engine.status();
    assert_eq!(operations(&status, "public.users"), [1.0, 1.0, 1.0]);
    assert_eq!(metric(&status, "go_pq_cdc_snapshot_total_rows", "public.users"), 2.0);
    stop(engine).await;
}

/// Each row into an index by its country, routed by it; rows without one nowhere.
fn by_country(change: &Change<'_>) -> Vec<Action> {
    let row = change.new.or(change.old).unwrap();
    let id = row.get("id").unwrap().to_string();
    let Some(country) = row.get("country").and_then(|country| country.as_str().map(str::to_owned)) else {
        return Vec::new();
    };
    let action = match change.operation {
        Operation::Delete => Action::delete(id),
        _ => Action::index(id, &row.to_json()).unwrap(),
    };
    vec![action.in_index(if country == "nl" { "home" } else { "abroad" }).routed(country)]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_may_choose_index_and_routing() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE users (id int PRIMARY KEY, country text); ALTER TABLE users REPLICA IDENTITY FULL").await;
    rig.sql("INSERT INTO users VALUES (1, 'nl'), (2, 'fr'), (3, NULL)").await;
    let mut config = rig.config(&["users"]);
    // The handler alone knows where rows go.
    config.elasticsearch.table_index_mapping.clear();
    let engine = rig.start_with(config, Some(Arc::new(by_country)));
    live(&engine).await;
    // A routing that would be a line of its own, were it written as it is.
    let odd = "o\"dd\\\"}}\n{\"delete\":{\"_index\":\"home\",\"_id\":\"1\"}}\n";
    rig.client.execute("INSERT INTO users VALUES (4, 'nl'), (5, NULL), (6, $1)", &[&odd]).await.unwrap();
    rig.sql("DELETE FROM users WHERE id = 2").await;
    rig.delivered().await;
    let ids = |index: &str| rig.documents(index).into_keys().collect::<Vec<_>>();
    assert_eq!((ids("home"), ids("abroad")), (vec!["1".into(), "4".into()], vec!["6".into()]));
    assert_eq!(rig.store.stats().documents, 3, "something went elsewhere");
    for (index, id, routing) in [("home", "1", "nl"), ("home", "4", "nl"), ("abroad", "6", odd)] {
        let answer = document(&rig, index, id).await;
        assert_eq!(answer["_routing"], routing);
        assert_eq!(answer["_source"], json!({"id": id.parse::<i32>().unwrap(), "country": routing}));
    }
    assert_eq!(metric(&engine.status(), "pgtide_rejected_total", ""), 0.0);
    stop(engine).await;
}

/// What `GET /{index}/_doc/{id}` answers.
async fn document(rig: &Rig, index: &str, id: &str) -> Value {
    let url = format!("{}/{index}/_doc/{id}", rig.store.url());
    // reqwest wants a provider of TLS even where it speaks plain HTTP. Another test may have named it already.
    drop(rustls::crypto::ring::default_provider().install_default());
    let text = reqwest::Client::new().get(url).send().await.unwrap().text().await.unwrap();
    serde_json::from_str(&text).unwrap()
}

type Row = Option<Value>;

/// What a handler was told: the change, the new row, the old one.
#[derive(Clone, Default)]
struct Told(Arc<Mutex<Vec<Heard>>>);

type Heard = (Operation, Row, Row, Lsn, u32);

impl Told {
    /// The example's handler, which tells here.
    fn handler(&self) -> Arc<dyn Handler> {
        let told = self.clone();
        Arc::new(move |change: &Change<'_>| {
            let json = |row: Option<change::Row<'_>>| row.map(|row| Value::Object(row.to_json()));
            let (new, old) = (json(change.new), json(change.old));
            told.0.lock().unwrap().push((change.operation, new, old, change.lsn, change.xid));
            example::handler(change)
        })
    }

    fn take(&self) -> Vec<(Operation, Row, Row, Lsn, u32)> {
        std::mem::take(&mut *self.0.lock().unwrap())
    }
}

/// Old and new rows, positions and transactions, and a value that PostgreSQL did not send.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_is_told_everything_in_order() {
    let rig = Rig::new().await;
    rig.sql(USERS).await;
    rig.sql("ALTER TABLE users ADD bio text").await;
    let bio = "(SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 400))";
    rig.sql(&format!("INSERT INTO users VALUES (1, 'Ada', NULL, {bio})")).await;
    let bio = rig.text("SELECT bio FROM users").await;
    let told = Told::default();
    let engine = rig.start_with(rig.config(&["users"]), Some(told.handler()));
    live(&engine).await;
    let ada = |id: i32, name: &str| Some(json!({"id": id, "name": name, "born": null, "bio": bio}));
    let copied = told.take();
    assert_eq!(copied.len(), 1);
    assert_eq!((copied[0].0, &copied[0].1, &copied[0].2), (Operation::Snapshot, &ada(1, "Ada"), &None));
    assert_eq!((copied[0].4, pgtide::version::before(copied[0].3)), (0, rig.version("users", "1").unsigned_abs()));

    rig.sql("BEGIN; UPDATE users SET name = 'Ada Lovelace'; UPDATE users SET name = 'Lovelace'; COMMIT").await;
    rig.delivered().await;
    let [first, second] = told.take().try_into().unwrap();
    // What PostgreSQL did not send is read, and with it the row as it is by then.
    assert_eq!((first.0, &first.1, &first.2), (Operation::Update, &ada(1, "Lovelace"), &None));
    assert_eq!((second.0, &second.1, &second.2), (Operation::Update, &ada(1, "Lovelace"), &None));
    assert!(first.3 == second.3 && first.3 > copied[0].3, "they have the position of their commit");
    assert!(first.4 == second.4 && first.4 > 0);

    rig.sql("UPDATE users SET id = 2").await;
    rig.delivered().await;
    let key = |id: i32| Some(json!({"id": id, "name": null, "born": null, "bio": null}));
    let [moved] = told.take().try_into().unwrap();
    assert_eq!((moved.0, &moved.1, &moved.2), (Operation::Update, &ada(2, "Lovelace"), &key(1)));
    rig.sql("DELETE FROM users").await;
    rig.sql("TRUNCATE users").await;
    rig.delivered().await;
    let [deleted, truncated] = told.take().try_into().unwrap();
    assert_eq!((deleted.0, &deleted.1, &deleted.2), (Operation::Delete, &None, &key(2)));
    assert_eq!((truncated.0, &truncated.1, &truncated.2), (Operation::Truncate, &None, &None));
    assert!(moved.3 < deleted.3 && deleted.3 < truncated.3);
    stop(engine).await;
}

/// Without a key no row names a document, but a handler may: by whatever the row holds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_without_a_key_may_have_a_handler() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE users (id int, name text); ALTER TABLE users REPLICA IDENTITY FULL").await;
    rig.sql("INSERT INTO users VALUES (1, 'Ada'), (2, 'Grace')").await;
    let engine = rig.start_with(rig.config(&["users"]), Some(Arc::new(example::handler)));
    live(&engine).await;
    rig.sql("INSERT INTO users VALUES (3, 'Alan'); DELETE FROM users WHERE id = 1").await;
    rig.sql("UPDATE users SET name = 'Hopper' WHERE id = 2").await;
    rig.delivered().await;
    let documents = rig.documents("users");
    assert_eq!(documents.keys().collect::<Vec<_>>(), ["2", "3"]);
    assert_eq!(documents["2"], json!({"id": 2, "name": "Hopper", "operation": "UPDATE"}));
    stop(engine).await;
}

/// What is deleted while the table is copied again stays deleted where the handler had put it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn deletes_during_a_resnapshot_hold_in_its_indices() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE users (id int PRIMARY KEY, country text); ALTER TABLE users REPLICA IDENTITY FULL").await;
    rig.sql("INSERT INTO users VALUES (1, 'nl'), (2, 'fr'), (3, 'nl'), (4, 'fr')").await;
    let mut config = rig.config(&["users"]);
    config.elasticsearch.table_index_mapping.clear();
    config.cdc.snapshot.workers = Some(1);
    let engine = rig.start_with(config, Some(Arc::new(by_country)));
    live(&engine).await;
    rig.hold(1);
    engine.control().send(Command::Resnapshot(TableId::new("public", "users"))).await.unwrap();
    rig.until_held().await;
    rig.sql("DELETE FROM users WHERE id <= 2").await;
    rig.delivered().await;
    rig.store.forget_tombstones();
    rig.store.clear_faults();
    wait_until("the resnapshot has ended", LIMIT, || async { !engine.status().tables[0].resnapshot }).await;
    let ids = |index: &str| rig.documents(index).into_keys().collect::<Vec<_>>();
    assert_eq!((ids("home"), ids("abroad")), (vec!["3".to_owned()], vec!["4".to_owned()]));
    let status = engine.status();
    assert_eq!((status.sink.rejected, &status.tables[0].problem), (0, &None));
    stop(engine).await;
}

/// Like the example, but a changed key takes the old document away.
fn moving(change: &Change<'_>) -> Vec<Action> {
    let mut actions = example::handler(change);
    if let (Operation::Update, Some(old)) = (change.operation, change.old) {
        actions.insert(0, Action::delete(old.get("id").unwrap().to_string()));
    }
    actions
}

/// A row that moved and has gone again before its large value could be read leaves no document behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_that_moved_and_is_gone_is_told_as_deleted() {
    let rig = Rig::new().await;
    rig.sql(USERS).await;
    rig.sql("INSERT INTO users SELECT n, string_agg(md5(random()::text), '') FROM generate_series(1, 2) n, generate_series(1, 400) GROUP BY n").await;
    let engine = rig.start_with(rig.config(&["users"]), Some(Arc::new(moving)));
    live(&engine).await;
    rig.sql("BEGIN; UPDATE users SET id = 11 WHERE id = 1; DELETE FROM users WHERE id = 11; COMMIT").await;
    rig.sql("UPDATE users SET id = 12 WHERE id = 2").await;
    rig.delivered().await;
    assert_eq!(rig.documents("users").keys().collect::<Vec<_>>(), ["12"]);
    stop(engine).await;
}
