//! Documents and requests that the node refuses, for good and for a while.

use pgtide::engine::Engine;
use reqwest::Method;
use serde_json::{Value, json};

use super::scene::{Scene, trouble, until};
use super::support::pipeline::stop;

/// A value that its field does not take is a dead letter, and no other document suffers.
pub async fn mapping_errors(scene: Scene) {
    scene.create(json!({"mappings": {"properties": {"body": {"type": "date"}}}})).await;
    scene.rig.sql("INSERT INTO items SELECT i, i, '2026-11-23' FROM generate_series(1, 300) AS i").await;
    scene.rig.sql("UPDATE items SET body = 'no date' WHERE id % 100 = 0").await;
    let config = scene.config();
    let engine = scene.rig.run(config.clone()).await;
    assert_eq!(scene.refused(&config, "parsing_exception").await, 3);
    scene.rig.sql("UPDATE items SET body = 'no date' WHERE id IN (1, 2); UPDATE items SET n = -1 WHERE id = 3").await;
    assert_eq!(scene.refused(&config, "parsing_exception").await, 5);
    scene.rig.sql("UPDATE items SET body = '2026-11-24' WHERE body = 'no date'").await;
    scene.equal(&config).await;
    assert_eq!(engine.status().sink.rejected, 5);
    stop(engine).await;
}

/// A field that a strict mapping does not have; once it has, a repair writes what was refused.
pub async fn strict_mapping(scene: Scene) {
    let fields = json!({"id": {"type": "integer"}, "n": {"type": "integer"}});
    scene.create(json!({"mappings": {"dynamic": "strict", "properties": fields}})).await;
    scene.rows(50).await;
    let config = scene.config();
    let engine = scene.rig.run(config.clone()).await;
    assert_eq!(scene.refused(&config, "strict_dynamic_mapping_exception").await, 50);
    let field = json!({"properties": {"body": {"type": "keyword"}}});
    scene.done(Method::PUT, &format!("/{}/_mapping", scene.index), field).await;
    let (_, repaired) = scene.verify(&config, true).await;
    assert_eq!(repaired.left, Some(0), "{repaired:?}");
    scene.equal(&config).await;
    stop(engine).await;
}

/// While the index is as `begin` makes it, changes wait and the screen says why; then they go on by themselves.
async fn waits(scene: &Scene, engine: &Engine, begin: (&str, Value), end: (&str, Value), reason: &str) {
    let path = |end: &str| format!("/{}{end}", scene.index);
    let method = |body: &Value| if body.is_null() { Method::POST } else { Method::PUT };
    scene.done(method(&begin.1), &path(begin.0), begin.1).await;
    scene
        .rig
        .sql("UPDATE items SET n = n + 1 WHERE id < 50; DELETE FROM items WHERE id = (SELECT max(id) FROM items)")
        .await;
    trouble(engine, reason).await;
    scene.done(method(&end.1), &path(end.0), end.1).await;
    scene.rig.delivered().await;
    assert_eq!(engine.status().sink.rejected, 0);
    until(engine, "the screen has no trouble any more", |status| status.sink.trouble.is_none()).await;
}

fn block(name: &str, value: Option<bool>) -> (&'static str, Value) {
    ("/_settings", json!({format!("index.blocks.{name}"): value}))
}

pub async fn blocks(scene: Scene) {
    scene.rows(100).await;
    let config = scene.config();
    let engine = scene.rig.run(config.clone()).await;
    for name in ["read_only_allow_delete", "write"] {
        waits(&scene, &engine, block(name, Some(true)), block(name, None), "cluster_block_exception").await;
    }
    scene.equal(&config).await;
    stop(engine).await;
}

pub async fn closed_index(scene: Scene) {
    scene.rows(100).await;
    let config = scene.config();
    let engine = scene.rig.run(config.clone()).await;
    let (close, open) = (("/_close", Value::Null), ("/_open", Value::Null));
    waits(&scene, &engine, close, open, "index_closed_exception").await;
    scene.equal(&config).await;
    stop(engine).await;
}

/// Bodies of several megabytes, where the node takes one; and a document that is longer by itself. The node counts what
/// is unpacked.
pub async fn too_long(scene: Scene) {
    for packed in [false, true] {
        scene.rig.sql("TRUNCATE items").await;
        scene
            .rig
            .sql("INSERT INTO items SELECT i, i, repeat(md5(i::text), 6000) FROM generate_series(1, 40) AS i")
            .await;
        scene.rig.sql("UPDATE items SET body = repeat('x', 1500000) WHERE id = 17").await;
        let mut config = scene.config();
        config.elasticsearch.compression_enabled = packed;
        let engine = scene.rig.run(config.clone()).await;
        assert_eq!(scene.refused(&config, "413").await, 1, "packed: {packed}");
        scene.rig.sql("UPDATE items SET n = -n WHERE id <> 17; UPDATE items SET body = 'short' WHERE id = 17").await;
        scene.equal(&config).await;
        assert!(engine.status().sink.rejected > 0);
        stop(engine).await;
    }
}

/// The node has one write at a time and one that waits; a body is eight writes, and there are many bodies.
pub async fn full_queue(scene: Scene) {
    scene.create(json!({"settings": {"index": {"number_of_shards": 8, "number_of_replicas": 0}}})).await;
    scene.rows(6_000).await;
    let mut config = scene.config();
    config.cdc.snapshot.workers = Some(8);
    config.elasticsearch.concurrent_request = 16;
    let engine = scene.rig.run(config.clone()).await;
    scene.rig.sql("UPDATE items SET n = -n; DELETE FROM items WHERE id % 4 = 0").await;
    scene.equal(&config).await;
    let status = engine.status();
    assert!(status.sink.retried > 0, "nothing was refused for a full queue");
    assert_eq!(status.sink.rejected, 0);
    stop(engine).await;
}

/// Rows that need more memory than the node has for requests: a tenth of its 512 MB. Elasticsearch 9 counts a document
/// four times beside its request.
pub async fn no_memory(scene: Scene) {
    let nine = !scene.installation().is_opensearch() && scene.installation().major() >= 9;
    scene.rows(40).await;
    // 60 MB are refused everywhere, as a request; 20 MB and 12 MB by 9 only, the latter with its request together only.
    scene
        .rig
        .sql("UPDATE items SET body = repeat('x', (ARRAY[12, 20, 60])[id / 10] * 1024 * 1024) WHERE id IN (10, 20, 30)")
        .await;
    let config = scene.config();
    let engine = scene.rig.run(config.clone()).await;
    let refused = if nine { 3 } else { 1 };
    assert_eq!(scene.refused(&config, "429 ").await, refused);
    assert_eq!(scene.letters().matches("needs more memory than indexing_pressure.memory.limit").count(), refused);
    assert_eq!(engine.status().sink.rejected, refused as u64);
    scene.rig.sql("UPDATE items SET body = 'short'").await;
    scene.equal(&config).await;
    stop(engine).await;
}
