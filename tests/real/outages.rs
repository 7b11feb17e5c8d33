//! The node ends, orderly or not, and comes back with what it had on disk: not with its tombstones.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::Signal;
use pgtide::engine::Engine;
use serde_json::json;
use tokio::task::JoinHandle;

use super::scene::{Scene, until};
use super::support::pipeline::{live, stop};

/// Changes of random rows until it is told to stop.
struct Changes {
    stop: Arc<AtomicBool>,
    task: JoinHandle<()>,
}

impl Changes {
    async fn begin(scene: &Scene, rows: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (client, stopped) = (scene.rig.connect().await, Arc::clone(&stop));
        let task = tokio::spawn(async move {
            while !stopped.load(Ordering::Relaxed) {
                let id = fastrand::u32(1..=rows);
                let sql = format!(
                    "DELETE FROM items WHERE id BETWEEN {id} AND {id} + 2; UPDATE items SET n = n + 1 WHERE id = {id} + 3;
                     INSERT INTO items VALUES ({}, 0, 'anew') ON CONFLICT (id) DO UPDATE SET body = 'changed'",
                    fastrand::u32(1..=rows)
                );
                client.batch_execute(&sql).await.unwrap();
                tokio::time::sleep(std::time::Duration::from_millis(2)).await;
            }
        });
        Self { stop, task }
    }

    async fn end(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.expect("the changes failed");
    }
}

/// The node is away until the pipeline has seen it.
async fn outage(scene: &mut Scene, engine: &Engine, signal: Signal) {
    scene.node().end(signal).await;
    until(engine, "the screen says that it is away", |status| status.sink.trouble.is_some()).await;
    scene.node().relaunch().await;
}

pub async fn while_copying(mut scene: Scene, signal: Signal) {
    scene.create(json!({"settings": {"index": {"number_of_replicas": 0}}})).await;
    scene.rows(8_000).await;
    let mut config = scene.config();
    config.cdc.snapshot.chunk_size = 40;
    let engine = scene.rig.start(config.clone());
    until(&engine, "a part is copied", |status| {
        status.tables.first().is_some_and(|table| (200..6_000).contains(&table.rows_done))
    })
    .await;
    outage(&mut scene, &engine, signal).await;
    assert!(engine.status().tables[0].rows_done < 8_000, "the copy was done before the node ended");
    scene.rig.sql("DELETE FROM items WHERE id % 7 = 0; UPDATE items SET n = 0 WHERE id % 11 = 0").await;
    live(&engine).await;
    scene.equal(&config).await;
    assert_eq!(engine.status().sink.rejected, 0);
    stop(engine).await;
}

pub async fn while_streaming(mut scene: Scene) {
    const ROWS: u32 = 500;
    scene.rows(ROWS).await;
    let config = scene.config();
    let engine = scene.rig.run(config.clone()).await;
    let changes = Changes::begin(&scene, ROWS).await;
    for signal in [Signal::SIGTERM, Signal::SIGKILL] {
        let before = engine.status().sink.documents;
        until(&engine, "changes arrive", |status| status.sink.documents > before + 100).await;
        outage(&mut scene, &engine, signal).await;
    }
    let before = engine.status().sink.documents;
    until(&engine, "changes arrive again", |status| status.sink.documents > before + 100).await;
    changes.end().await;
    scene.equal(&config).await;
    assert_eq!(engine.status().sink.rejected, 0);
    stop(engine).await;
}
