//! What happens to a pipeline that streams.

use std::time::Duration;

use pgtide::engine::{Engine, Phase, Status};
use pgtide::problem::ProblemKind;
use pgtide::store::{Effect, Fault, Options, Store};

use crate::case::{Case, loopback, says, status_when};
use crate::support::{own_server, wait_until};

async fn streaming(case: &Case) -> Engine {
    let engine = case.engine();
    status_when(&engine, "streaming", is_streaming).await;
    case.equal().await;
    engine
}

fn is_streaming(status: &Status) -> bool {
    status.phase == Phase::Streaming
}

fn is_degraded(status: &Status) -> bool {
    status.phase == Phase::Degraded
}

fn has_failed(status: &Status) -> bool {
    status.phase == Phase::Failed
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_goes_away_and_comes_back() {
    let mut server = own_server().await;
    let mut case = Case::on(&server).await;
    let engine = streaming(&case).await;
    server.kill_hard().await.unwrap();
    let status = status_when(&engine, "degraded", |status| is_degraded(status) && status.attempts > 1).await;
    says(status.problem.as_ref(), ProblemKind::Postgres, &["PostgreSQL"]);
    assert!(status.replication.active != Some(true), "a slot of a server that is down is shown as active");
    server.restart().await.unwrap();
    case.client = server.connect(&case.slot).await.unwrap();
    case.client
        .batch_execute("INSERT INTO people VALUES (4, 'Barbara'); DELETE FROM people WHERE id = 2")
        .await
        .unwrap();
    status_when(&engine, "streaming again", is_streaming).await;
    case.becomes_equal().await;
    assert_eq!(engine.status().replication.reconnects, 1);
    engine.stop().await.unwrap();
    server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn elasticsearch_goes_away_and_comes_back() {
    let mut case = Case::new().await;
    let engine = streaming(&case).await;
    let address = case.store.local_addr();
    std::mem::replace(&mut case.store, Store::bind(loopback(0), Options::default()).await.unwrap()).shutdown().await;
    case.client.batch_execute("UPDATE people SET name = upper(name)").await.unwrap();
    let committed = case.position().await;
    let status = status_when(&engine, "degraded", is_degraded).await;
    says(status.problem.as_ref(), ProblemKind::Elasticsearch, &["refused", "elasticsearch.urls"]);
    assert!(status.sink.trouble.is_some());
    assert!(case.confirmed_before(&committed).await, "acknowledged although nobody has the change");
    case.store = Store::bind(address, Options::default()).await.unwrap();
    status_when(&engine, "streaming again", is_streaming).await;
    case.becomes_equal().await;
    engine.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn elasticsearch_no_longer_takes_the_password() {
    let case = Case::new().await;
    let engine = streaming(&case).await;
    case.store.inject(Fault::new(Effect::Reject { status: 401, kind: None }).on(""));
    case.client.batch_execute("INSERT INTO people VALUES (4, 'Barbara')").await.unwrap();
    let committed = case.position().await;
    let status = status_when(&engine, "in trouble", |status| status.sink.trouble.is_some()).await;
    let trouble = status.sink.trouble.unwrap();
    assert!(trouble.reason.contains("401") && trouble.hint.contains("elasticsearch.password"), "{trouble:?}");
    assert!(case.confirmed_before(&committed).await, "acknowledged although nobody has the change");
    case.store.clear_faults();
    wait_until("the change arrives", Duration::from_secs(60), || async { case.store.documents("people").len() == 4 })
        .await;
    status_when(&engine, "without trouble", |status| status.sink.trouble.is_none() && is_streaming(status)).await;
    case.equal().await;
    engine.stop().await.unwrap();
}

/// What was committed while there was no publication cannot be streamed, by no means and at no time: it has to be
/// said, and mended by another copy.
#[tokio::test(flavor = "multi_thread")]
async fn a_publication_that_is_dropped() {
    let mut case = Case::new().await;
    // From version 18 on the server says it by a warning, and leaves the changes out.
    let quiet = format!("ALTER DATABASE {} SET client_min_messages = error", case.slot);
    case.client.batch_execute(&quiet).await.unwrap();
    let engine = streaming(&case).await;
    case.client.batch_execute("DROP PUBLICATION tide").await.unwrap();
    case.client.batch_execute("INSERT INTO people VALUES (4, 'Barbara')").await.unwrap();
    let status = status_when(&engine, "failed", has_failed).await;
    says(status.problem.as_ref(), ProblemKind::Gap, &["publication", "tide", "pg_drop_replication_slot", "resnapshot"]);
    engine.stop().await.unwrap_err();
    case.refused(6, &["publication", "tide", "pg_drop_replication_slot"]).await;
    case.client.batch_execute(&format!("SELECT pg_drop_replication_slot('{}')", case.slot)).await.unwrap();
    case.set("/cdc/snapshot/resnapshot", true);
    case.starts().await;
}

async fn drop_slot_by_force(case: &Case) {
    let end = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = $1 AND active";
    wait_until("the slot is dropped", Duration::from_secs(10), || async {
        case.client.execute(end, &[&case.slot]).await.unwrap();
        // Refused while its walsender still ends, or a new one has it.
        case.client.execute("SELECT pg_drop_replication_slot($1)", &[&case.slot]).await.is_ok()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_is_dropped_is_never_made_anew() {
    for mode in ["initial", "never"] {
        let mut case = Case::new().await;
        case.set("/cdc/snapshot/mode", mode);
        let engine = case.engine();
        status_when(&engine, "streaming", is_streaming).await;
        drop_slot_by_force(&case).await;
        case.client.batch_execute("DELETE FROM people WHERE id = 2").await.unwrap();
        let status = status_when(&engine, "failed", has_failed).await;
        says(status.problem.as_ref(), ProblemKind::Gap, &[&case.slot, "is gone", "resnapshot"]);
        assert_eq!(case.confirmed().await, None, "a new slot was made in silence, in mode {mode}");
        engine.stop().await.unwrap_err();
    }
}
