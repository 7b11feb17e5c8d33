//! What only a server of one's own can be: set up wrongly, full, another one, or out of WAL.

use pgtide::demo::{Options, Server};
use pgtide::postgres::replication::Session;

use crate::case::{Case, HELD};
use crate::support::{own_server_with, shared_server, wait_until};

#[tokio::test(flavor = "multi_thread")]
async fn a_server_without_logical_decoding_slots_or_senders() {
    let settings = [("wal_level", "replica"), ("max_replication_slots", "1"), ("max_wal_senders", "2")];
    let mut server = own_server_with(&settings).await;
    let mut case = Case::on(&server).await;
    case.refused(4, &["wal_level is replica", "ALTER SYSTEM SET wal_level = 'logical'"]).await;
    // The hint, to the letter.
    case.client.batch_execute("ALTER SYSTEM SET wal_level = 'logical'").await.unwrap();
    server.restart().await.unwrap();
    case.client = server.connect(&case.slot).await.unwrap();

    case.client.batch_execute("SELECT pg_create_logical_replication_slot('other', 'pgoutput')").await.unwrap();
    case.refused(4, &["no replication slot is free", "max_replication_slots"]).await;
    let made: i64 = case.client.query_one("SELECT count(*) FROM pg_replication_slots", &[]).await.unwrap().get(0);
    assert_eq!(made, 1);
    case.client.batch_execute("SELECT pg_drop_replication_slot('other')").await.unwrap();

    let cdc = case.loaded().cdc;
    let sessions = [Session::connect(&cdc, "one").await.unwrap(), Session::connect(&cdc, "two").await.unwrap()];
    case.run(&[], HELD).await.refused(4, &["no WAL sender is free", "max_wal_senders"]);
    drop(sessions);
    case.starts().await;
    server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_lost_its_wal_is_a_gap() {
    let server = own_server_with(&[("max_slot_wal_keep_size", "1MB"), ("min_wal_size", "32MB")]).await;
    let mut case = Case::on(&server).await;
    case.starts().await;
    case.client.batch_execute("UPDATE people SET name = 'Countess' WHERE id = 1").await.unwrap();
    let position = "SELECT wal_status FROM pg_replication_slots WHERE slot_name = $1";
    wait_until("the slot is lost", HELD, || async {
        case.client.batch_execute("INSERT INTO people SELECT 100 + count(*) FROM people").await.unwrap();
        case.client.batch_execute("SELECT pg_switch_wal()").await.unwrap();
        case.client.batch_execute("CHECKPOINT").await.unwrap();
        case.client.query_one(position, &[&case.slot]).await.unwrap().get::<_, &str>(0) == "lost"
    })
    .await;
    let confirmed = case.confirmed().await;
    case.refused(6, &[&case.slot, "is lost", "pg_drop_replication_slot", "cdc.snapshot.resnapshot"]).await;
    // The switch alone does not make a lost slot whole.
    case.set("/cdc/snapshot/resnapshot", true);
    case.refused(6, &[&case.slot, "is lost", "pg_drop_replication_slot"]).await;
    assert_eq!(case.confirmed().await, confirmed);
    case.client.batch_execute(&format!("SELECT pg_drop_replication_slot('{}')", case.slot)).await.unwrap();
    case.starts().await;
    server.stop().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn another_server_is_not_taken_for_the_one_that_was_copied() {
    // Not a copy of a cluster, as the shared server is: another system identifier.
    let other = Server::start(Options::default()).await.unwrap();
    let first = Case::on(shared_server().await).await;
    // Far ahead of a fresh server.
    for _ in 0..3 {
        first.client.batch_execute("INSERT INTO people SELECT 100 + count(*) FROM people").await.unwrap();
        first.client.batch_execute("SELECT pg_switch_wal()").await.unwrap();
    }
    first.starts().await;

    // Its index, with documents of versions that the other has not reached.
    let mut second = Case::on(&other).await;
    second.set("/elasticsearch/urls", vec![first.store.url()]);
    second.refused(6, &["index people", "later version", "Delete that index"]).await;
    first.equal().await;
    second.set("/elasticsearch/urls", vec![second.store.url()]);
    second.starts().await;

    // The database was moved by a dump, the ledger with it, and the slot made by hand.
    let mut moved = Case::on(&other).await;
    moved.starts().await;
    let sql = "SELECT system_id, snapshot_lsn FROM cdc_snapshot_job WHERE slot_name = $1";
    let job = first.client.query_one(sql, &[&first.slot]).await.unwrap();
    let (system_id, lsn): (String, String) = (job.get(0), job.get(1));
    let sql = "UPDATE cdc_snapshot_job SET system_id = $1, snapshot_lsn = $2";
    moved.client.execute(sql, &[&system_id, &lsn]).await.unwrap();
    moved.client.batch_execute("UPDATE people SET name = 'Countess' WHERE id = 1").await.unwrap();
    let before = moved.confirmed().await;
    moved.refused(6, &["another PostgreSQL server", "system identifier", "cdc.snapshot.resnapshot"]).await;
    assert_eq!(moved.confirmed().await, before);
    moved.set("/cdc/snapshot/resnapshot", true);
    moved.starts().await;
    drop(moved);
    drop(second);
    other.stop().await.unwrap();
}
