//! As the screen runs it: what may pass is waited for, and what does not stays to be looked at.

use pgtide::engine::{Command, Phase, Status};
use pgtide::postgres::replication::Session;
use pgtide::problem::ProblemKind;
use pgtide::store::{Options, Store};

use crate::case::{Case, SOON, free_port, loopback, says, status_when};
use crate::support::own_server;

fn is_trouble(status: &Status) -> bool {
    status.phase == Phase::Degraded && status.attempts > 1
}

#[tokio::test(flavor = "multi_thread")]
async fn postgresql_that_comes_later() {
    let mut server = own_server().await;
    let mut case = Case::on(&server).await;
    server.kill_hard().await.unwrap();
    let engine = case.engine();
    let status = status_when(&engine, "in trouble", is_trouble).await;
    says(status.problem.as_ref(), ProblemKind::Postgres, &["refused", "cdc.port"]);
    server.restart().await.unwrap();
    let status = status_when(&engine, "streaming", |status| status.phase == Phase::Streaming).await;
    assert!(status.problem.is_none() && status.attempts == 0, "{:?}", status.problem);
    case.client = server.connect(&case.slot).await.unwrap();
    case.equal().await;
    engine.stop().await.unwrap();
    server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn elasticsearch_that_comes_later() {
    let mut case = Case::new().await;
    let port = free_port();
    case.set("/elasticsearch/urls", vec![format!("http://127.0.0.1:{port}")]);
    let engine = case.engine();
    let status = status_when(&engine, "in trouble", is_trouble).await;
    says(status.problem.as_ref(), ProblemKind::Elasticsearch, &["refused", "elasticsearch.urls"]);
    case.store = Store::bind(loopback(port), Options::default()).await.unwrap();
    status_when(&engine, "streaming", |status| status.phase == Phase::Streaming).await;
    case.equal().await;
    engine.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_is_released_later() {
    let case = Case::new().await;
    case.starts().await;
    let session = Session::connect(&case.loaded().cdc, "holder").await.unwrap();
    let held = session.start(&case.slot, pgtide::lsn::Lsn::ZERO, "tide").await.unwrap();
    case.client.batch_execute("INSERT INTO people VALUES (4, 'Barbara')").await.unwrap();
    let engine = case.engine();
    let status = status_when(&engine, "in trouble", is_trouble).await;
    says(status.problem.as_ref(), ProblemKind::Setup, &["is held by another process", "Stop the other"]);
    let refusal = engine.control().send(Command::ResumeTable(status.tables[0].table.0.clone())).await.unwrap_err();
    assert!(refusal.contains("not paused"), "{refusal}");
    drop(held);
    status_when(&engine, "streaming", |status| status.phase == Phase::Streaming).await;
    case.becomes_equal().await;
    engine.stop().await.unwrap();
}

/// Something else than a pgtide has the lock: it is waited for, and left alone however long it says nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_another_leads() {
    let mut case = Case::new().await;
    case.set("/cdc/snapshot/claimTimeout", "300ms");
    case.set("/cdc/snapshot/heartbeatInterval", "100ms");
    case.starts().await;
    let lock = "SELECT pg_advisory_lock(hashtextextended('pgtide ' || $1, 0)), pg_backend_pid()";
    let pid: i32 = case.client.query_one(lock, &[&case.slot]).await.unwrap().get(1);
    let engine = case.engine();
    let silent = |status: &Status| status.standby.as_ref().is_some_and(|standby| standby.silent);
    let status = status_when(&engine, "standing by, the leader silent", silent).await;
    assert_eq!((status.phase, status.problem), (Phase::Standby, None));
    let standby = status.standby.unwrap();
    assert_eq!(standby.leader, format!("backend {pid}"));
    assert!(standby.sentence().contains("leads, but hangs; takes over when it ends"), "{}", standby.sentence());
    let refusal = engine.control().send(Command::Pause).await.unwrap_err();
    assert!(refusal.contains("stands by") && refusal.contains(&standby.leader), "{refusal}");
    let free = "SELECT pg_advisory_unlock(hashtextextended('pgtide ' || $1, 0))";
    assert!(case.client.query_one(free, &[&case.slot]).await.unwrap().get::<_, bool>(0));
    let status = status_when(&engine, "streaming", |status| status.phase == Phase::Streaming).await;
    assert_eq!((status.standby, status.replication.reconnects), (None, 0));
    case.equal().await;
    engine.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_pass_stays_to_be_looked_at() {
    let mut case = Case::new().await;
    let good = case.config.clone();
    case.set("/cdc/publication/createIfNotExists", false);
    let engine = case.engine();
    tokio::time::timeout(SOON, engine.live()).await.unwrap();
    let status = engine.status();
    assert_eq!(status.phase, Phase::Failed);
    says(status.problem.as_ref(), ProblemKind::Setup, &["no publication tide", "CREATE PUBLICATION"]);
    let table = status.tables[0].table.0.clone();
    for command in [
        Command::Pause,
        Command::Resume,
        Command::PauseTable(table.clone()),
        Command::ResumeTable(table.clone()),
        Command::Resnapshot(table.clone()),
        Command::CancelResnapshot(table),
    ] {
        let refusal = engine.control().send(command).await.unwrap_err();
        assert!(refusal.contains("has failed") && refusal.contains("no publication tide"), "{refusal}");
    }
    let status = engine.status();
    assert_eq!(status.phase, Phase::Failed, "a refused command moved it");
    assert!(!engine.is_finished());
    let problem = tokio::time::timeout(SOON, engine.stop()).await.unwrap().unwrap_err();
    says(Some(&problem), ProblemKind::Setup, &["no publication tide"]);
    case.config = good;
    case.starts().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_ends_the_waiting() {
    let mut case = Case::new().await;
    case.set("/cdc/port", free_port());
    let engine = case.engine();
    status_when(&engine, "in trouble", is_trouble).await;
    tokio::time::timeout(SOON, engine.stop()).await.expect("the stop waits").unwrap();
}
