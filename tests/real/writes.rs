//! What is written, superseded and removed.

use pgtide::engine::{Command, TableState};
use pgtide::problem::ProblemKind;
use pgtide::table::TableId;
use pgtide::verify::Outcome;
use reqwest::Method;
use serde_json::json;

use super::scene::{Scene, until};
use super::support::pipeline::{ended, stop};
use super::support::wire::Wire;

async fn again(engine: &pgtide::engine::Engine) {
    engine.control().send(Command::Resnapshot(TableId::new("public", "items"))).await.unwrap();
}

async fn copied_again(engine: &pgtide::engine::Engine) {
    until(engine, "it is copied again", |status| {
        status.tables[0].resnapshots_ended > 0 && status.tables[0].state == TableState::Live
    })
    .await;
}

/// Rows are deleted while they wait to be copied again, and the server forgets each delete at once.
pub async fn forgotten_deletes(scene: Scene) {
    scene.create(json!({"settings": {"index": {"gc_deletes": "0s", "number_of_replicas": 0}}})).await;
    scene.rows(5_000).await;
    let mut config = scene.config();
    config.cdc.snapshot.chunk_size = 20;
    let engine = scene.rig.run(config.clone()).await;
    again(&engine).await;
    until(&engine, "a snapshot is held", |status| status.snapshot.held_seconds.is_some()).await;
    scene.rig.sql("DELETE FROM items WHERE id > 2000 AND id % 3 > 0").await;
    scene.rig.sql("UPDATE items SET n = -n WHERE id % 3 = 0; DELETE FROM items WHERE id = 9").await;
    scene.rig.sql("INSERT INTO items VALUES (9, 9, 'anew'), (9001, 1, 'new'); DELETE FROM items WHERE id = 9001").await;
    assert!(engine.status().tables[0].resnapshot, "the rows were not changed while they were copied");
    copied_again(&engine).await;
    scene.equal(&config).await;
    stop(engine).await;
}

/// Documents that no row accounts for go, by their version; those that are newer than the copy stay.
pub async fn sweep(scene: Scene) {
    scene.create(json!({"settings": {"index": {"number_of_replicas": 0}}})).await;
    scene.rows(300).await;
    let config = scene.config();
    let engine = scene.rig.run(config.clone()).await;
    for id in 1000..1010 {
        let path = format!("/{}/_doc/{id}?version=5&version_type=external_gte", scene.index);
        scene.done(Method::PUT, &path, json!({"id": id, "n": 0, "body": "left behind"})).await;
    }
    let (outcome, table) = scene.verify(&config, false).await;
    assert_eq!((outcome, table.extra), (Outcome::Different, 10), "{table:?}");
    again(&engine).await;
    copied_again(&engine).await;
    scene.equal(&config).await;
    stop(engine).await;
}

/// The copy, the stream, and bodies that are packed.
pub async fn packed(scene: Scene) {
    scene.rows(2_000).await;
    let mut config = scene.config();
    config.elasticsearch.compression_enabled = true;
    let wire = Wire::to(&scene.url()).await;
    config.elasticsearch.urls = vec![wire.url()];
    let engine = scene.rig.run(config.clone()).await;
    scene
        .rig
        .sql("UPDATE items SET body = repeat('long ', 1000) WHERE id % 10 = 0; DELETE FROM items WHERE id < 9")
        .await;
    scene.equal(&config).await;
    let (bulks, packed, sent) = wire.counts();
    assert!(bulks > 20 && packed == bulks, "{packed} of {bulks} bulks were packed");
    // 200 bodies of 5,000 bytes, and all the rest.
    assert!(sent < 500_000, "{sent} bytes");
    stop(engine).await;
}

/// Writing through an alias; and the alias is another index then, which lacks the documents.
pub async fn alias(mut scene: Scene) {
    let (one, other) = (format!("{}_1", scene.index), format!("{}_2", scene.index));
    let alias = std::mem::replace(&mut scene.index, one.clone());
    scene.create(json!({"aliases": {&alias: {"is_write_index": true}}})).await;
    scene.index = alias.clone();
    scene.rows(500).await;
    let mut config = scene.config();
    let mut engine = scene.rig.run(config.clone()).await;
    scene.rig.sql("UPDATE items SET n = 0 WHERE id % 2 = 0; DELETE FROM items WHERE id = 1").await;
    scene.equal(&config).await;
    scene.done(Method::PUT, &format!("/{other}"), json!({})).await;
    let swap = json!({"actions": [
        {"remove": {"index": one, "alias": alias}},
        {"add": {"index": other, "alias": alias, "is_write_index": true}},
    ]});
    scene.done(Method::POST, "/_aliases", swap).await;
    let problem = ended(&mut engine).await.unwrap_err();
    assert_eq!(problem.kind, ProblemKind::Gap, "{problem:?}");
    drop(engine);
    scene.rig.sql("UPDATE items SET n = 1 WHERE id % 5 = 0").await;
    config.cdc.snapshot.resnapshot = true;
    let engine = scene.rig.run(config.clone()).await;
    scene.equal(&config).await;
    let counts = [&one, &other].map(|index| format!("/{index}/_count"));
    assert_eq!(scene.done(Method::GET, &counts[0], json!(null)).await["count"], 499, "it was written to the old one");
    assert_eq!(scene.done(Method::GET, &counts[1], json!(null)).await["count"], 499);
    stop(engine).await;
}
