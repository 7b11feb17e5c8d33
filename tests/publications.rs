//! What the publication and the replica identity decide, whoever made them: see docs/conformance.md.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use pgtide::config::ReplicaIdentity;
use pgtide::problem::ProblemKind;
use pgtide::table::TableId;
use serde_json::json;
use support::pipeline::{LIMIT, Rig, ended, live, stop};
use support::wait_until;

async fn version(rig: &Rig) -> i64 {
    rig.count("SELECT current_setting('server_version_num')::int8").await
}

/// The replica identity that the configuration names is set, in a publication of somebody else too, and only where the
/// table has another one: setting it takes a lock that nobody else may have.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replica_identities_of_the_configuration() {
    let index = || ReplicaIdentity::UsingIndex("by_code".into());
    for (identity, letter) in [(ReplicaIdentity::Full, "f"), (index(), "i"), (ReplicaIdentity::Default, "d")] {
        let rig = Rig::new().await;
        rig.sql("CREATE TABLE books (id int PRIMARY KEY, code text NOT NULL, n int); CREATE UNIQUE INDEX by_code ON books (code)")
            .await;
        if letter == "d" {
            rig.sql("ALTER TABLE books REPLICA IDENTITY FULL").await;
        }
        rig.sql(&format!(
            "CREATE PUBLICATION {} FOR TABLE books; INSERT INTO books VALUES (1, 'a', 1), (2, 'b', 2)",
            rig.name
        ))
        .await;
        let mut config = rig.config(&["books"]);
        config.cdc.publication.create_if_not_exists = false;
        config.cdc.publication.tables[0].replica_identity = Some(identity.clone());
        let engine = rig.run(config.clone()).await;
        let relreplident = "SELECT relreplident::text FROM pg_class WHERE oid = 'books'::regclass";
        assert_eq!(rig.text(relreplident).await, letter);
        // By an index documents have its columns for their names.
        let name = if letter == "i" { "code" } else { "id::text" };
        rig.sql(
            "UPDATE books SET n = 3; UPDATE books SET code = 'z', id = 9 WHERE id = 1; DELETE FROM books WHERE id = 2",
        )
        .await;
        rig.delivered().await;
        rig.equal_by("books", name).await;
        stop(engine).await;

        let reader = rig.connect().await;
        reader.batch_execute("BEGIN; LOCK TABLE books IN ACCESS SHARE MODE").await.unwrap();
        let engine = rig.run(config).await;
        reader.batch_execute("COMMIT").await.unwrap();
        stop(engine).await;
    }

    let rig = Rig::new().await;
    rig.sql("CREATE TABLE books (id int PRIMARY KEY)").await;
    let mut config = rig.config(&["books"]);
    config.cdc.publication.tables[0].replica_identity = Some(index());
    let mut engine = rig.start(config);
    let problem = ended(&mut engine).await.unwrap_err();
    assert_eq!(problem.kind, ProblemKind::Setup, "{problem:?}");
    assert!(problem.message.contains("by_code") && problem.message.contains("public.books"), "{problem:?}");

    // Then PostgreSQL refuses UPDATE and DELETE, and says so to the application.
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE books (id int PRIMARY KEY)").await;
    let mut config = rig.config(&["books"]);
    config.cdc.publication.tables[0].replica_identity = Some(ReplicaIdentity::Nothing);
    let engine = rig.run(config).await;
    rig.sql("INSERT INTO books VALUES (1), (2)").await;
    rig.equal("books").await;
    assert_eq!(rig.text("SELECT relreplident::text FROM pg_class WHERE oid = 'books'::regclass").await, "n");
    stop(engine).await;
}

/// What a publication leaves out of a table is in no document, by the copy or by the stream, whoever made it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_of_columns_holds_for_copy_and_stream() {
    for ours in [true, false] {
        let rig = Rig::new().await;
        rig.sql("CREATE TABLE people (id int PRIMARY KEY, name text, secret text, twice int GENERATED ALWAYS AS (id * 2) STORED);
                 INSERT INTO people VALUES (1, 'Ada', 's'), (2, 'Grace', 's'), (4, 'Radia', 's')")
            .await;
        let mut config = rig.config(&["people"]);
        config.cdc.publication.create_if_not_exists = ours;
        if ours {
            config.cdc.publication.tables[0].columns = vec!["id".into(), "name".into()];
        }
        if version(&rig).await < 150_000 {
            // There are none: what is asked for and cannot be had is refused.
            if ours {
                let problem = ended(&mut rig.start(config)).await.unwrap_err();
                assert!(problem.message.contains("`columns`"), "{problem:?}");
            }
            continue;
        }
        if !ours {
            rig.sql(&format!("CREATE PUBLICATION {} FOR TABLE people (id, name)", rig.name)).await;
        }
        let engine = rig.run(config).await;
        rig.sql(
            "INSERT INTO people VALUES (3, 'Barbara', 's'); UPDATE people SET secret = 'new' WHERE id = 1;
                 UPDATE people SET name = 'Hopper' WHERE id = 2; DELETE FROM people WHERE id = 1",
        )
        .await;
        rig.delivered().await;
        // The last is as it was copied.
        let names = [(2, "Hopper"), (3, "Barbara"), (4, "Radia")];
        let expected = names.map(|(id, name)| (id.to_string(), json!({"id": id, "name": name})));
        assert_eq!(rig.documents("people"), expected.into());
        stop(engine).await;
    }
}

/// A generated column is not in the stream, unless PostgreSQL 18 is told to send it: the copy then must not have it either,
/// lest the first change take it away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn generated_columns_are_in_all_documents_or_in_none() {
    for published in [false, true] {
        let rig = Rig::new().await;
        if published && version(&rig).await < 180_000 {
            continue;
        }
        rig.sql(
            "CREATE TABLE items (id int PRIMARY KEY, n int, twice int GENERATED ALWAYS AS (n * 2) STORED);
                 INSERT INTO items VALUES (1, 1), (2, 2)",
        )
        .await;
        let with = if published { " WITH (publish_generated_columns = stored)" } else { "" };
        rig.sql(&format!("CREATE PUBLICATION {} FOR TABLE items{with}", rig.name)).await;
        let mut config = rig.config(&["items"]);
        config.cdc.publication.create_if_not_exists = false;
        let engine = rig.run(config).await;
        rig.sql("UPDATE items SET n = 5 WHERE id = 1; INSERT INTO items VALUES (3, 3)").await;
        rig.delivered().await;
        for (id, document) in rig.documents("items") {
            assert_eq!(document.get("twice").is_some(), published, "{id}: {document}");
        }
        if published {
            rig.equal_now("items").await;
        }
        stop(engine).await;
    }
}

/// Rows that a publication's filter leaves out are in no document, by the copy or by the stream; an UPDATE may take a row
/// out of it and into it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_filter_holds_for_copy_and_stream() {
    let rig = Rig::new().await;
    if version(&rig).await < 150_000 {
        // The server has none.
        return;
    }
    rig.sql(&format!(
        "CREATE TABLE people (id int PRIMARY KEY, age int); ALTER TABLE people REPLICA IDENTITY FULL;
         INSERT INTO people SELECT n, n FROM generate_series(1, 40) n;
         CREATE PUBLICATION {} FOR TABLE people WHERE (age >= 18)",
        rig.name
    ))
    .await;
    let mut config = rig.config(&["people"]);
    config.cdc.publication.create_if_not_exists = false;
    let engine = rig.run(config).await;
    assert_eq!(rig.documents("people").len(), 23);
    rig.sql(
        "INSERT INTO people VALUES (41, 1), (42, 50); UPDATE people SET age = 1 WHERE id = 30;
             UPDATE people SET age = 99 WHERE id = 1; DELETE FROM people WHERE id = 20",
    )
    .await;
    rig.delivered().await;
    rig.sql("DELETE FROM people WHERE age < 18").await;
    rig.equal("people").await;
    assert_eq!(rig.documents("people").len(), 23);
    stop(engine).await;
}

/// A publication of all tables publishes the ledger as well, and every table that is made later: of them only those with
/// an index become documents.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_of_all_tables() {
    let rig = Rig::new().await;
    rig.sql(&format!("CREATE PUBLICATION {} FOR ALL TABLES", rig.name)).await;
    rig.sql("CREATE TABLE books (id int PRIMARY KEY); INSERT INTO books VALUES (1); CREATE TABLE others (id int PRIMARY KEY)").await;
    let mut config = rig.config(&["books"]);
    config.cdc.publication.create_if_not_exists = false;
    config.cdc.publication.tables.clear();
    let engine = rig.run(config.clone()).await;
    rig.sql(
        "INSERT INTO books VALUES (2); INSERT INTO others VALUES (1);
             CREATE TABLE later (id int PRIMARY KEY); INSERT INTO later VALUES (1)",
    )
    .await;
    rig.equal("books").await;
    assert_eq!(rig.store.stats().items, 2, "others were written as well");
    stop(engine).await;
    config.elasticsearch.table_index_mapping.insert(TableId::new("public", "later"), "later".into());
    let engine = rig.run(config).await;
    rig.sql("INSERT INTO later VALUES (2)").await;
    rig.equal("later").await;
    rig.equal_now("books").await;
    stop(engine).await;
}

/// PostgreSQL lists the tables of a publication first and opens them then. One that is dropped in between is an internal
/// error there.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_table_that_is_dropped_while_the_publication_is_looked_at() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE books (id int PRIMARY KEY); INSERT INTO books VALUES (1); CREATE TABLE others (id int PRIMARY KEY)").await;
    rig.sql(&format!("CREATE PUBLICATION {} FOR TABLE books, others", rig.name)).await;
    let mut config = rig.config(&["books"]);
    config.cdc.publication.create_if_not_exists = false;
    config.cdc.publication.tables.clear();
    let session = rig.connect().await;
    session.batch_execute("BEGIN; DROP TABLE others").await.unwrap();
    let engine = rig.start(config);
    // Before version 15 the tables are not opened.
    if version(&rig).await >= 150_000 {
        let waits = "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'others'::regclass";
        wait_until("the table is waited for", LIMIT, || async { rig.count(waits).await > 0 }).await;
    }
    session.batch_execute("COMMIT").await.unwrap();
    live(&engine).await;
    rig.equal("books").await;
    stop(engine).await;
}

/// Whoever publishes at the same moment what is to be published is not in the way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn somebody_else_publishes_at_the_same_moment() {
    let create = "CREATE PUBLICATION {} FOR TABLE books";
    let add = "ALTER PUBLICATION {} ADD TABLE books";
    for (before, meanwhile) in [("", create), ("CREATE PUBLICATION {} FOR TABLE others", add)] {
        let rig = Rig::new().await;
        rig.sql("CREATE TABLE books (id int PRIMARY KEY); INSERT INTO books VALUES (1); CREATE TABLE others (id int PRIMARY KEY)").await;
        rig.sql(&before.replace("{}", &rig.name)).await;
        let session = rig.connect().await;
        session.batch_execute(&format!("BEGIN; {}", meanwhile.replace("{}", &rig.name))).await.unwrap();
        let engine = rig.start(rig.config(&["books"]));
        let waits =
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE '%PUBLICATION%'
                     AND datname = current_database()";
        wait_until("pgtide waits for it", LIMIT, || async { rig.count(waits).await > 0 }).await;
        session.batch_execute("COMMIT").await.unwrap();
        live(&engine).await;
        rig.equal("books").await;
        assert!(engine.status().notices.iter().all(|notice| !notice.text.contains("added to publication")));
        stop(engine).await;
    }
}
