//! The server, the login, privileges, tables, publication.

use serde_json::json;

use pgtide::engine::Phase;

use crate::case::{Case, HELD, PASSWORD, free_port, status_when};
use crate::support::own_server;

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_be_reached_or_logged_in_to() {
    let mut case = Case::new().await;
    let good = case.config.clone();
    let down = free_port();
    case.set("/cdc/port", down);
    case.refused(3, &[&format!("127.0.0.1:{down}"), "refused", "cdc.host and cdc.port"]).await;
    case.config = good.clone();
    case.set("/cdc/host", "no-such-host.invalid");
    case.refused(3, &["no-such-host.invalid", "not known", "cdc.host"]).await;
    case.config = good.clone();
    case.set("/cdc/password", PASSWORD);
    case.refused(3, &["password authentication failed", "cdc.password"]).await;
    case.config = good.clone();
    case.set("/cdc/password", "");
    case.refused(3, &["cdc.password"]).await;
    case.config = good.clone();
    case.set("/cdc/database", "not_there");
    case.refused(3, &["not_there", "cdc.database"]).await;
    // Somebody else's port: HTTP, not PostgreSQL.
    case.config = good.clone();
    case.set("/cdc/port", case.store.local_addr().port());
    case.refused(3, &["PostgreSQL", "cdc.port"]).await;
    case.config = good;
    assert_eq!(case.confirmed().await, None);
    case.starts().await;
}

/// The way from a role that may log in to one that may do what is needed, one grant after the other, each as the
/// refusal names it. What it ends with is the least that is needed.
#[tokio::test(flavor = "multi_thread")]
async fn a_role_gets_what_it_needs_and_no_more() {
    let mut case = Case::new().await;
    let role = case.slot.clone();
    let sql = format!("CREATE ROLE {role} LOGIN PASSWORD '{PASSWORD}'");
    case.client.batch_execute(&sql).await.unwrap();
    case.set("/cdc/username", role.as_str()).set("/cdc/password", PASSWORD);
    let database = case.slot.clone();
    let make = async |sql: String| case.client.batch_execute(&sql).await.unwrap();
    // From version 15 on it is so.
    make("REVOKE CREATE ON SCHEMA public FROM PUBLIC".to_owned()).await;

    case.refused(4, &[&role, "replication", &format!("ALTER ROLE \"{role}\" REPLICATION")]).await;
    make(format!("ALTER ROLE \"{role}\" REPLICATION")).await;
    let grant = format!("GRANT USAGE, CREATE ON SCHEMA public TO \"{role}\"");
    case.refused(4, &["cdc_snapshot_job", "permission denied for schema public", &grant]).await;
    make(grant).await;
    let grant = format!("GRANT SELECT ON \"public\".\"people\" TO \"{role}\"");
    case.refused(4, &["may not read", "public.people", &grant]).await;
    make(grant).await;
    let create = "CREATE PUBLICATION \"tide\" FOR TABLE ONLY \"public\".\"people\"";
    case.refused(4, &["publication tide", "permission denied for database", create]).await;
    assert_eq!(case.confirmed().await, None, "a slot was made before the publication");
    make(create.to_owned()).await;
    case.starts().await;
    // The ledger is there now: CREATE can be taken away again.
    make(format!("REVOKE CREATE ON SCHEMA public FROM \"{role}\"")).await;
    case.client.batch_execute("INSERT INTO people VALUES (4, 'Barbara')").await.unwrap();
    case.starts().await;
    let clean = format!(
        "SELECT pg_drop_replication_slot('{database}'); REASSIGN OWNED BY \"{role}\" TO postgres;
         DROP OWNED BY \"{role}\"; DROP ROLE \"{role}\""
    );
    case.client.batch_execute(&clean).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_and_publications_that_do_not_fit() {
    let mut case = Case::new().await;
    let map = |case: &mut Case, table: &str| {
        case.set("/cdc/publication/tables", json!([{"name": table}]));
        case.set("/elasticsearch/tableIndexMapping", json!({format!("public.{table}"): "people"}));
    };
    map(&mut case, "poeple");
    case.refused(4, &["public.poeple", "Did you mean public.people?"]).await;
    map(&mut case, "something_else");
    case.refused(4, &["no table public.something_else", "Create it, or correct the name"]).await;

    case.client.batch_execute("CREATE TABLE keyless (a int, b int)").await.unwrap();
    map(&mut case, "keyless");
    case.refused(4, &["public.keyless", "no primary key"]).await;
    let published = "SELECT count(*) FROM pg_publication";
    let count: i64 = case.client.query_one(published, &[]).await.unwrap().get(0);
    assert_eq!(count, 0, "a publication of a table without a key makes its UPDATEs fail in the application");

    case.client.batch_execute("CREATE UNLOGGED TABLE draft (id int PRIMARY KEY)").await.unwrap();
    map(&mut case, "draft");
    case.refused(4, &["draft", "unlogged", "SET LOGGED"]).await;

    map(&mut case, "people");
    case.set("/cdc/publication/createIfNotExists", false);
    case.refused(4, &["no publication tide", "createIfNotExists", "CREATE PUBLICATION \"tide\" FOR TABLE"]).await;
    case.client.batch_execute("CREATE PUBLICATION tide FOR TABLE keyless").await.unwrap();
    case.refused(4, &["does not publish table public.people", "ALTER PUBLICATION \"tide\" ADD TABLE"]).await;
    case.client.batch_execute("ALTER PUBLICATION tide ADD TABLE people").await.unwrap();

    case.set("/cdc/slot/createIfNotExists", false);
    case.refused(4, &["no replication slot", "cdc.slot.createIfNotExists", &case.slot]).await;
    assert_eq!(case.confirmed().await, None);
    case.set("/cdc/slot/createIfNotExists", true);
    case.starts().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_another_session_has_locked() {
    // Not on the shared one: a transaction that stays open keeps everybody from making a slot.
    let server = own_server().await;
    let case = Case::on(&server).await;
    case.client.batch_execute("BEGIN; LOCK TABLE people IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let ended = case.run(&[], HELD).await;
    let pid: i32 = case.client.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let (who, end) = (format!("locked by another session: pid {pid}"), format!("pg_terminate_backend({pid})"));
    ended.refused(4, &["public.people", &who, "in its transaction since", &end]);
    case.client.batch_execute("COMMIT").await.unwrap();
    assert_eq!(case.confirmed().await, None, "a slot stayed that nothing was read from");

    // Another table's transaction is in the way of the slot, not of the table: that is waited for, and said.
    case.client.batch_execute("BEGIN; CREATE TABLE other (id int)").await.unwrap();
    let engine = case.engine();
    status_when(&engine, "waiting for the transaction", |status| {
        status.notices.iter().any(|notice| notice.text.contains("every transaction that is open now"))
    })
    .await;
    case.client.batch_execute("COMMIT").await.unwrap();
    status_when(&engine, "streaming", |status| status.phase == Phase::Streaming).await;
    case.equal().await;
    engine.stop().await.unwrap();
    server.stop().await.unwrap();
}
