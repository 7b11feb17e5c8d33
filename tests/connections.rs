//! Each connection to PostgreSQL ended by an administrator, in each state: the pipeline goes on by itself.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use pgtide::config::{Config, Heartbeat, Table};
use pgtide::engine::{Command, Engine, Phase, TableState};
use pgtide::lsn::Lsn;
use pgtide::sink::Lease;
use pgtide::snapshot::{Ledger, Position};
use pgtide::store::{Effect, Fault};
use pgtide::table::TableId;
use support::pipeline::{LIMIT, Rig, live, phase, stop};
use support::wait_until;

/// 400 rows in small chunks, small bulks, answers that take their time, and a heartbeat table.
async fn rig() -> (Rig, Config) {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE a (id int PRIMARY KEY, title text)").await;
    rig.sql("INSERT INTO a SELECT n, rpad('x', 1000, 'y') FROM generate_series(1, 400) n; ANALYZE a").await;
    let beat = TableId::new("public", "beat");
    let mut config = rig.config(&["a"]);
    rig.sql("CREATE TABLE beat (id int PRIMARY KEY DEFAULT 1, last_heartbeat timestamptz NOT NULL DEFAULT now())")
        .await;
    config.cdc.publication.tables.push(Table::new(beat.clone()));
    config.cdc.heartbeat = Some(Heartbeat { table: beat, interval: Duration::from_millis(100) });
    config.cdc.snapshot.chunk_size = 10;
    config.cdc.snapshot.workers = Some(2);
    config.elasticsearch.batch_size_limit = 10;
    (rig, config)
}

fn slow(rig: &Rig) {
    rig.store.inject(Fault::new(Effect::Delay { milliseconds: 20 }));
}

/// What a connection is for; that of the ledger has its process's name behind it.
const PURPOSE: &str = "regexp_replace(substr(application_name, 8), '^ledger .*', 'ledger')";

/// The purposes of the connections that there are, as `pg_stat_activity` names them.
async fn connections(rig: &Rig) -> BTreeSet<String> {
    let sql = format!(
        "SELECT {PURPOSE} FROM pg_stat_activity WHERE datname = current_database() AND application_name LIKE 'pgtide %'"
    );
    rig.client.query(&sql, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// Ends every connection of a purpose, once there is one.
async fn end(rig: &Rig, purpose: &str) {
    let sql = format!(
        "SELECT count(*) FROM (SELECT pg_terminate_backend(pid) AS ended FROM pg_stat_activity
         WHERE datname = current_database() AND application_name LIKE 'pgtide %' AND {PURPOSE} = '{purpose}') e WHERE ended"
    );
    wait_until(&format!("there is a connection for {purpose}"), LIMIT, || async { rig.count(&sql).await > 0 }).await;
}

/// The pipeline comes to rest, streams what is changed now, and its documents are the rows.
async fn recovers(rig: &Rig, engine: &Engine, what: &str) {
    rig.store.clear_faults();
    wait_until(&format!("it streams again after {what}"), LIMIT, || async {
        let status = engine.status();
        assert_ne!(status.phase, Phase::Failed, "{what}: {:?}", status.problem);
        let table = &status.tables[0];
        status.phase == Phase::Streaming && table.state == TableState::Live && !table.resnapshot
    })
    .await;
    rig.sql("UPDATE a SET title = 'once more' WHERE id % 9 = 0; DELETE FROM a WHERE id % 50 = 1").await;
    // A connection that is seldom used may be missed only now.
    wait_until(&format!("nothing is in the way after {what}"), LIMIT, || async {
        let status = engine.status();
        status.phase == Phase::Streaming && status.problem.is_none()
    })
    .await;
    rig.equal("a").await;
    assert_eq!(engine.status().sink.rejected, 0, "{what}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_the_copy() {
    for purpose in ["control", "ledger", "snapshot keeper", "copy", "slot monitor", "heartbeat"] {
        let (rig, config) = rig().await;
        slow(&rig);
        let engine = rig.start(config);
        wait_until("rows are copied", LIMIT, || async { engine.status().tables[0].rows_done > 30 }).await;
        end(&rig, purpose).await;
        assert!(engine.status().tables[0].rows_done < 400, "{purpose}: the copy had ended");
        rig.sql("UPDATE a SET title = 'in the copy' WHERE id % 7 = 0").await;
        recovers(&rig, &engine, purpose).await;
        stop(engine).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_the_slot_is_made() {
    for purpose in ["control", "ledger", "slot", "slot monitor"] {
        let (rig, config) = rig().await;
        // The slot waits for it.
        let open = rig.connect().await;
        open.batch_execute("BEGIN; INSERT INTO a VALUES (1000, 'open')").await.unwrap();
        let engine = rig.start(config);
        wait_until("the slot is asked for", LIMIT, || async { connections(&rig).await.contains("slot") }).await;
        end(&rig, purpose).await;
        open.batch_execute("COMMIT").await.unwrap();
        recovers(&rig, &engine, purpose).await;
        stop(engine).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_the_stream() {
    let (rig, config) = rig().await;
    let engine = rig.run(config).await;
    let all = connections(&rig).await;
    let known = ["control", "heartbeat", "ledger", "slot monitor", "stream", "stream catalog"];
    assert_eq!(all, known.map(String::from).into(), "a test is missing, or one too many");
    for purpose in &all {
        slow(&rig);
        rig.sql("UPDATE a SET title = title || 'z' WHERE id <= 200").await;
        end(&rig, purpose).await;
        rig.sql("INSERT INTO a SELECT coalesce(max(id), 0) + 1, 'meanwhile' FROM a").await;
        recovers(&rig, &engine, purpose).await;
    }
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_resnapshot() {
    let (rig, config) = rig().await;
    let engine = rig.run(config).await;
    for purpose in ["snapshot keeper", "copy", "ledger", "stream", "stream catalog", "slot monitor"] {
        slow(&rig);
        rig.sql("INSERT INTO a SELECT n, 'more' FROM generate_series(2000, 2100) n ON CONFLICT DO NOTHING").await;
        engine.control().send(Command::Resnapshot(TableId::new("public", "a"))).await.unwrap();
        wait_until("workers copy", LIMIT, || async { connections(&rig).await.contains("copy") }).await;
        end(&rig, purpose).await;
        rig.sql("DELETE FROM a WHERE id % 40 = 3").await;
        recovers(&rig, &engine, purpose).await;
    }
    // The slot of a resnapshot waits for open transactions.
    let open = rig.connect().await;
    open.batch_execute("BEGIN; INSERT INTO a VALUES (5000, 'open')").await.unwrap();
    engine.control().send(Command::Resnapshot(TableId::new("public", "a"))).await.unwrap();
    end(&rig, "snapshot slot").await;
    open.batch_execute("COMMIT").await.unwrap();
    recovers(&rig, &engine, "snapshot slot").await;
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_a_pause() {
    for copying in [true, false] {
        let (rig, config) = rig().await;
        let engine = rig.start(config);
        if copying {
            slow(&rig);
            wait_until("rows are copied", LIMIT, || async { engine.status().tables[0].rows_done > 30 }).await;
        } else {
            live(&engine).await;
        }
        engine.control().send(Command::Pause).await.unwrap();
        phase(&engine, Phase::Paused).await;
        for purpose in connections(&rig).await {
            end(&rig, &purpose).await;
            rig.sql("UPDATE a SET title = 'in the pause' WHERE id % 11 = 0").await;
        }
        engine.control().send(Command::Resume).await.unwrap();
        recovers(&rig, &engine, "a pause").await;
        stop(engine).await;
    }
}

/// All at once, again and again, as a restarting pooler or a zealous administrator does it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_of_them_over_and_over() {
    let (rig, config) = rig().await;
    slow(&rig);
    let engine = rig.start(config);
    let all = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
               WHERE datname = current_database() AND application_name LIKE 'pgtide %'";
    for round in 0..8 {
        wait_until("it is at work", LIMIT, || async {
            !matches!(engine.status().phase, Phase::Connecting | Phase::Degraded)
        })
        .await;
        let before = engine.status().replication.reconnects;
        rig.count(all).await;
        rig.sql(&format!("INSERT INTO a VALUES ({}, 'round'); DELETE FROM a WHERE id = {}", 3000 + round, 10 + round))
            .await;
        wait_until("it is connected again", LIMIT, || async { engine.status().replication.reconnects > before }).await;
    }
    recovers(&rig, &engine, "all of them").await;
    stop(engine).await;
}

/// What Elasticsearch has not answered by the end of the stream is sent again: the ledger is the reason, not Elasticsearch.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_ledger_while_bulks_are_not_answered() {
    let (rig, config) = rig().await;
    let engine = rig.run(config).await;
    rig.hold(100);
    rig.sql("UPDATE a SET title = 'held' WHERE id = 1").await;
    rig.until_held().await;
    end(&rig, "ledger").await;
    for there in [false, true] {
        wait_until("the ledger's connection is gone, and then made again", LIMIT, || async {
            assert_ne!(engine.status().phase, Phase::Failed, "{:?}", engine.status().problem);
            connections(&rig).await.contains("ledger") == there
        })
        .await;
    }
    recovers(&rig, &engine, "the ledger").await;
    stop(engine).await;
}

/// The ledger has one connection for all tasks: what one of them asks for in another's transaction would be lost with it, and
/// an error would undo it, which COMMIT does not say.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_statement_that_fails_in_the_ledger_undoes_no_transaction_of_another_task() {
    let rig = Rig::new().await;
    let ledger = Ledger::open(&rig.config(&[]).cdc, "job", "test", Lease::default()).await.unwrap();
    let position = |lsn| Position { system_id: "1".to_owned(), timeline: 1, acknowledged: Lsn(lsn) };
    ledger.acknowledge(&position(8)).await.unwrap();
    rig.sql("ALTER TABLE cdc_snapshot_tables RENAME TO away; BEGIN; UPDATE cdc_snapshot_job SET completed = completed")
        .await;
    let acknowledging = tokio::spawn({
        let (ledger, next) = (Arc::clone(&ledger), position(16));
        async move { ledger.acknowledge(&next).await }
    });
    let other = rig.connect().await;
    wait_until("the transaction waits for the row", LIMIT, || async {
        let sql = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()
                   AND application_name = 'pgtide ledger test' AND wait_event_type = 'Lock'";
        other.query_one(sql, &[]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    // Its first poll sends it, if there is nothing to wait for.
    let mut failing = Box::pin(ledger.remembered());
    assert!(futures_util::poll!(&mut failing).is_pending());
    rig.sql("COMMIT").await;
    acknowledging.await.unwrap().unwrap();
    failing.await.unwrap_err();
    assert_eq!(ledger.position().await.unwrap(), Some(position(16)));
}
