//! The slot: of another kind, held by another, gone.

use serde_json::{Value, json};

use crate::case::{Case, HELD, SOON, free_port, get};
use crate::support::wait_until;
use pgtide::postgres::replication::Session;

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_of_another_kind_is_left_alone() {
    let mut case = Case::new().await;
    let other = Case::new().await;
    let own = case.slot.clone();
    for (make, plugin, words) in [
        ("pg_create_physical_replication_slot('$')", None, ["is a physical one", "cdc.slot.name"]),
        (
            "pg_create_logical_replication_slot('$', 'test_decoding')",
            Some(&case.client),
            ["test_decoding", "cdc.slot.name"],
        ),
        ("pg_create_logical_replication_slot('$', 'pgoutput')", Some(&other.client), [&*other.slot, "cdc.slot.name"]),
    ] {
        let name = format!("{own}_x");
        let client = plugin.unwrap_or(&case.client);
        let made = client.batch_execute(&format!("SELECT {}", make.replace('$', &name))).await;
        if made.is_err() {
            assert!(make.contains("test_decoding"), "{made:?}");
            continue; // contrib may not be installed
        }
        let position =
            "SELECT coalesce(confirmed_flush_lsn, '0/0')::text FROM pg_replication_slots WHERE slot_name = $1";
        let before: String = case.client.query_one(position, &[&name]).await.unwrap().get(0);
        let mut config = case.config.clone();
        config["cdc"]["slot"]["name"] = json!(name);
        std::mem::swap(&mut config, &mut case.config);
        case.refused(4, &words).await;
        std::mem::swap(&mut config, &mut case.config);
        let after: String = case.client.query_one(position, &[&name]).await.unwrap().get(0);
        assert_eq!(before, after);
        client.batch_execute(&format!("SELECT pg_drop_replication_slot('{name}')")).await.unwrap();
    }
    case.starts().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_a_replication_client_holds() {
    let mut case = Case::new().await;
    case.starts().await;
    let session = Session::connect(&case.loaded().cdc, "holder").await.unwrap();
    let start = session.start(&case.slot, pgtide::lsn::Lsn::ZERO, "tide").await.unwrap();
    case.client.batch_execute("INSERT INTO people VALUES (4, 'Barbara')").await.unwrap();
    let before = case.confirmed().await;
    let port = free_port();
    case.set("/cdc/metric", json!({"port": port}));
    let running = case.spawn();
    wait_until("the status says that the slot is held", SOON, || async {
        let Some(body) = get(port, "/status").await else { return false };
        case.keeps_secrets(&body);
        let status: Value = serde_json::from_str(&body).unwrap();
        status["phase"] == "degraded"
            && status["attempts"].as_u64() > Some(1)
            && status["problem"]["message"].as_str().unwrap().contains("is held by another process")
    })
    .await;
    let ended = case.ended(running, HELD).await;
    ended.refused(4, &[&case.slot, "is held by another process", "Stop the other connector"]);
    assert_eq!(case.confirmed().await, before, "something was acknowledged on a slot of another process");
    drop(start);
    // No wait here: a start outlasts the moment that the server takes to notice.
    case.starts().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_pgtide_stands_by_and_the_first_goes_on() {
    let mut case = Case::new().await;
    let ports = [free_port(), free_port()];
    case.set("/cdc/metric", json!({"port": ports[0]}));
    let first = case.spawn();
    wait_until("the first streams", SOON, || async {
        get(ports[0], "/status").await.is_some_and(|body| body.contains("\"phase\":\"streaming\""))
    })
    .await;
    case.set("/cdc/metric", json!({"port": ports[1]}));
    let second = case.spawn();
    wait_until("the second stands by", SOON, || async {
        get(ports[1], "/status").await.is_some_and(|body| body.contains("\"phase\":\"standby\""))
    })
    .await;
    let status: Value = serde_json::from_str(&get(ports[1], "/status").await.unwrap()).unwrap();
    let leader = status["standby"]["leader"].as_str().unwrap();
    assert!(leader.contains(&format!("-{}, backend ", first.pid())), "{leader}");
    case.client.batch_execute("UPDATE people SET name = 'Countess' WHERE id = 1").await.unwrap();
    case.becomes_equal().await;
    second.terminate();
    let second = case.ended(second, SOON).await;
    assert_eq!(second.code, Some(0), "{second}");
    assert!(second.stderr.contains(&format!("{leader} leads: this process stands by, and takes over")), "{second}");
    first.terminate();
    let first = case.ended(first, SOON).await;
    assert_eq!(first.code, Some(0), "{first}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_is_gone_after_the_copy_is_a_gap() {
    let mut case = Case::new().await;
    case.starts().await;
    let drop_slot = format!("SELECT pg_drop_replication_slot('{}')", case.slot);
    case.client.batch_execute(&drop_slot).await.unwrap();
    case.client
        .batch_execute("DELETE FROM people WHERE id = 2; UPDATE people SET name = 'Countess' WHERE id = 1")
        .await
        .unwrap();
    for _ in 0..2 {
        // However often: never a new slot as if nothing had happened.
        case.refused(6, &[&case.slot, "is gone", "cdc.snapshot.resnapshot"]).await;
        assert_eq!(case.confirmed().await, None);
    }
    case.set("/cdc/snapshot/resnapshot", true);
    case.starts().await;
    case.set("/cdc/snapshot/resnapshot", false);
    case.starts().await;
}
