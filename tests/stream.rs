//! The stream against a real PostgreSQL: every kind of change, in the order of commits, across stops.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use pgtide::config::Mode;
use pgtide::engine::{Command, Phase};
use serde_json::json;
use support::pipeline::{LIMIT, Rig, ended, metric, operations, phase, stop};
use support::wait_until;

const BOOKS: &str = "CREATE TABLE books (id int PRIMARY KEY, title text, price numeric, sold timestamptz, tags jsonb)";
/// An SQL expression of 13 kB that does not compress.
const LARGE: &str = "(SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 400))";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inserts_updates_and_deletes() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    let engine = rig.run(rig.config(&["books"])).await;
    for n in 1..=10 {
        rig.sql(&format!("INSERT INTO books VALUES ({n}, 'Book {n}', {n}.50, now(), '{{\"a\": [{n}, null]}}')")).await;
    }
    for n in 1..=5 {
        rig.sql(&format!("UPDATE books SET title = 'Changed', tags = NULL WHERE id = {n}")).await;
    }
    rig.equal("books").await;
    assert_eq!(rig.documents("books").len(), 10);
    for n in 6..=10 {
        rig.sql(&format!("DELETE FROM books WHERE id = {n}")).await;
    }
    rig.equal("books").await;
    assert_eq!(rig.documents("books").keys().collect::<Vec<_>>(), ["1", "2", "3", "4", "5"]);
    let status = engine.status();
    assert_eq!(operations(&status, "public.books"), [10.0, 5.0, 5.0]);
    assert_eq!(metric(&status, "go_pq_cdc_elasticsearch_index_total", "books"), 15.0);
    assert_eq!(metric(&status, "go_pq_cdc_elasticsearch_delete_total", "books"), 5.0);
    assert_eq!(metric(&status, "pgtide_documents_total", ""), 20.0);
    assert_eq!(metric(&status, "pgtide_rejected_total", ""), 0.0);
    assert_eq!(status.replication.transactions, 20);
    assert!(metric(&status, "go_pq_cdc_cdc_latency_current", "") >= 0.0);
    stop(engine).await;
}

/// The transaction that begins first commits last: its changes come last and have the higher version.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_order_is_that_of_the_commits() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    rig.sql("INSERT INTO books VALUES (3, 'of nobody')").await;
    let engine = rig.run(rig.config(&["books"])).await;
    let (first, second) = (rig.connect().await, rig.connect().await);
    first.batch_execute("BEGIN; INSERT INTO books VALUES (1, 'of the first')").await.unwrap();
    second.batch_execute("BEGIN; INSERT INTO books VALUES (2, 'of the second')").await.unwrap();
    second.batch_execute("UPDATE books SET title = 'of the second' WHERE id = 3; COMMIT").await.unwrap();
    wait_until("the second is there", LIMIT, || async { rig.documents("books").contains_key("2") }).await;
    assert!(!rig.documents("books").contains_key("1"), "a change came before its commit");
    first.batch_execute("UPDATE books SET title = 'of the first' WHERE id = 3; COMMIT").await.unwrap();
    rig.equal("books").await;
    assert_eq!(rig.documents("books")["3"]["title"], "of the first");
    let [one, two, three] = ["1", "2", "3"].map(|id| rig.position_of("books", id));
    assert!(two < one && one == three, "{one} {two} {three}");
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_rolled_back_never_comes() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    let engine = rig.run(rig.config(&["books"])).await;
    rig.sql("BEGIN; INSERT INTO books VALUES (1, 'one'); UPDATE books SET title = 'uno' WHERE id = 1; COMMIT").await;
    rig.sql("BEGIN; INSERT INTO books VALUES (2, 'two'); UPDATE books SET title = 'x' WHERE id = 1; ROLLBACK").await;
    rig.equal("books").await;
    assert_eq!(rig.documents("books").len(), 1);
    assert_eq!(operations(&engine.status(), "public.books"), [1.0, 1.0, 0.0]);
    assert_eq!(rig.store.stats().items, 2);

    // A savepoint takes back its own part and no more, by hand or by an exception that is caught.
    rig.sql(
        "BEGIN; INSERT INTO books VALUES (3, 'stays');
         SAVEPOINT s; INSERT INTO books SELECT n, 'goes' FROM generate_series(100, 2100) n;
         UPDATE books SET title = 'goes'; ROLLBACK TO s;
         INSERT INTO books VALUES (4, 'stays'); COMMIT",
    )
    .await;
    rig.sql(
        "DO $$ BEGIN
           INSERT INTO books VALUES (5, 'stays');
           FOR n IN 1..50 LOOP
             BEGIN INSERT INTO books VALUES (1000 + n, 'goes'); PERFORM 1 / 0; EXCEPTION WHEN division_by_zero THEN NULL; END;
           END LOOP;
           INSERT INTO books VALUES (6, 'stays');
         END $$",
    )
    .await;
    rig.equal("books").await;
    assert_eq!(rig.documents("books").keys().collect::<Vec<_>>(), ["1", "3", "4", "5", "6"]);
    assert_eq!(operations(&engine.status(), "public.books"), [5.0, 1.0, 0.0]);
    stop(engine).await;
}

/// A batch, a stop, changes while nobody streams, a start: everything is there, once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_while_it_is_down_come_after_the_start() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    rig.sql("INSERT INTO books SELECT n, 'before' FROM generate_series(1, 10) n").await;
    let engine = rig.run(rig.config(&["books"])).await;
    rig.equal_now("books").await;
    rig.sql("INSERT INTO books SELECT n, 'first' FROM generate_series(11, 15) n").await;
    rig.equal("books").await;
    assert_eq!(operations(&engine.status(), "public.books"), [5.0, 0.0, 0.0]);
    stop(engine).await;
    // Its commit record ends behind the position that is its version.
    let committed = rig.position_of("books", "15");
    assert!(rig.confirmed().await > committed, "a clean stop left answered changes unacknowledged");

    rig.sql("INSERT INTO books SELECT n, 'down' FROM generate_series(21, 25) n").await;
    rig.sql("UPDATE books SET title = 'changed' WHERE id = 1; DELETE FROM books WHERE id = 2").await;
    assert_eq!(rig.documents("books").len(), 15);
    let engine = rig.run(rig.config(&["books"])).await;
    rig.equal("books").await;
    assert_eq!(operations(&engine.status(), "public.books"), [5.0, 1.0, 1.0], "what was acknowledged came again");
    rig.sql("INSERT INTO books VALUES (31, 'live')").await;
    rig.equal("books").await;
    assert_eq!(rig.documents("books")["31"]["title"], "live");
    stop(engine).await;
    assert_eq!(rig.store.stats().items, 10 + 5 + 7 + 1);
}

/// Mode `never`: no copy, everything from the slot on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_copy_only_changes_come() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    rig.sql("INSERT INTO books SELECT n, 'before' FROM generate_series(1, 10) n").await;
    let mut config = rig.config(&["books"]);
    config.cdc.snapshot.mode = Mode::Never;
    let engine = rig.run(config).await;
    rig.sql("INSERT INTO books SELECT n, 'after' FROM generate_series(11, 15) n").await;
    rig.sql("UPDATE books SET title = 'touched' WHERE id = 3").await;
    rig.delivered().await;
    let ids: Vec<String> = rig.documents("books").into_keys().collect();
    assert_eq!(ids, ["11", "12", "13", "14", "15", "3"]);
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_key_moves_the_document() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    rig.sql(
        "CREATE TABLE entries (a int, b text, n int, PRIMARY KEY (a, b)); ALTER TABLE entries REPLICA IDENTITY FULL",
    )
    .await;
    rig.sql(
        "INSERT INTO books VALUES (1, 'one'), (2, 'two'); INSERT INTO entries VALUES (1, 'a:b', 1), (1, 'a\\:b', 2)",
    )
    .await;
    let engine = rig.run(rig.config(&["books", "entries"])).await;
    let id = r"a || ':' || replace(replace(b, '\', '\\'), ':', '\:')";
    rig.equal_now("books").await;
    rig.equal_by("entries", id).await;
    rig.sql("UPDATE books SET id = 7 WHERE id = 1").await;
    // Two rows change places, and one takes the place of another.
    rig.sql("BEGIN; UPDATE books SET id = -1 WHERE id = 7; UPDATE books SET id = 7 WHERE id = 2; UPDATE books SET id = 2 WHERE id = -1; COMMIT")
        .await;
    rig.sql("INSERT INTO entries VALUES (2, 'c', 3); UPDATE entries SET b = 'd', n = 4 WHERE a = 2").await;
    rig.sql("UPDATE entries SET a = 3 WHERE b = 'a:b'; DELETE FROM entries WHERE n = 2").await;
    rig.equal("books").await;
    assert_eq!(rig.documents("books")["7"]["title"], "two");
    rig.equal_by("entries", id).await;
    assert_eq!(rig.documents("entries").keys().collect::<Vec<_>>(), ["2:d", r"3:a\:b"]);
    stop(engine).await;
}

/// PostgreSQL does not send a large value that an UPDATE leaves alone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn large_values_that_did_not_change_stay() {
    let rig = Rig::new().await;
    for (table, identity) in [("by_key", "DEFAULT"), ("by_row", "FULL")] {
        rig.sql(&format!("CREATE TABLE {table} (id int PRIMARY KEY, n int, large text, other text)")).await;
        rig.sql(&format!("ALTER TABLE {table} REPLICA IDENTITY {identity}")).await;
        rig.sql(&format!("INSERT INTO {table} SELECT n, 0, {LARGE} || n, {LARGE} || n FROM generate_series(1, 6) n"))
            .await;
    }
    let tables = ["by_key", "by_row"];
    let engine = rig.run(rig.config(&tables)).await;
    let each = async |sql: &str| {
        for table in tables {
            rig.sql(&sql.replace("TABLE", table)).await;
        }
    };
    each("UPDATE TABLE SET n = 1 WHERE id <= 4").await;
    each("UPDATE TABLE SET other = 'small now' WHERE id = 2").await;
    each("UPDATE TABLE SET large = NULL WHERE id = 3").await;
    each("UPDATE TABLE SET id = 14 WHERE id = 4").await;
    for table in tables {
        rig.equal(table).await;
        assert!(rig.documents(table)["1"]["large"].as_str().unwrap().len() > 8_000);
    }

    // Read late: the row has moved on, or is gone, when its earlier change is applied.
    engine.control().send(Command::Pause).await.unwrap();
    phase(&engine, Phase::Paused).await;
    each("UPDATE TABLE SET n = 2").await;
    each("UPDATE TABLE SET id = 21 WHERE id = 1").await;
    each("DELETE FROM TABLE WHERE id = 5").await;
    each("UPDATE TABLE SET id = 22 WHERE id = 3").await;
    each("DELETE FROM TABLE WHERE id = 22").await;
    each("UPDATE TABLE SET n = 3, large = 'replaced' WHERE id = 6").await;
    each("DELETE FROM TABLE WHERE id = 2").await;
    each("INSERT INTO TABLE VALUES (2, 9, 'new', NULL)").await;
    engine.control().send(Command::Resume).await.unwrap();
    for table in tables {
        rig.equal(table).await;
        assert_eq!(rig.documents(table).len(), 4);
        let large = rig.documents(table)["21"]["large"].clone();
        assert!(large.as_str().is_some_and(|text| text.len() > 8_000), "{table}: {large}");
    }
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn truncate_empties_the_index() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    rig.sql("CREATE TABLE authors (id int PRIMARY KEY, name text)").await;
    rig.sql("INSERT INTO books SELECT n, 'copied' FROM generate_series(1, 50) n; INSERT INTO authors VALUES (1, 'a')")
        .await;
    let engine = rig.run(rig.config(&["books", "authors"])).await;
    rig.sql("INSERT INTO books VALUES (51, 'streamed')").await;
    rig.sql("TRUNCATE books").await;
    rig.equal("books").await;
    assert_eq!((rig.documents("books").len(), rig.documents("authors").len()), (0, 1));
    rig.sql("INSERT INTO books SELECT n, 'later' FROM generate_series(40, 60) n").await;
    rig.equal("books").await;

    rig.sql(
        "BEGIN; INSERT INTO books VALUES (70, 'goes'); UPDATE books SET title = 'goes' WHERE id = 41; TRUNCATE books;
         INSERT INTO books VALUES (41, 'stays'), (71, 'stays'); COMMIT",
    )
    .await;
    rig.equal("books").await;
    assert_eq!(rig.documents("books").len(), 2);

    rig.sql("BEGIN; TRUNCATE books, authors; ROLLBACK").await;
    rig.equal("books").await;
    assert_eq!(rig.documents("books").len(), 2);
    rig.sql("TRUNCATE books, authors; INSERT INTO authors VALUES (2, 'b')").await;
    rig.equal("books").await;
    rig.equal("authors").await;
    let status = engine.status();
    assert_eq!(metric(&status, "pgtide_truncate_total", "public.books"), 3.0);
    assert_eq!(metric(&status, "pgtide_truncate_total", "public.authors"), 1.0);
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_transaction() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    let mut config = rig.config(&["books"]);
    config.elasticsearch.batch_size_limit = 1_000;
    let engine = rig.run(config).await;
    rig.sql("INSERT INTO books SELECT n, 'Book ' || n, n / 7.0, now() FROM generate_series(1, 20000) n").await;
    rig.equal("books").await;
    assert_eq!(rig.documents("books").len(), 20_000);
    assert_eq!(operations(&engine.status(), "public.books"), [20_000.0, 0.0, 0.0]);
    // All kinds on the same rows in one transaction: the last one counts.
    rig.sql(
        "BEGIN; UPDATE books SET title = 'x'; DELETE FROM books WHERE id % 2 = 0;
         INSERT INTO books SELECT n, 'again' FROM generate_series(2, 10000, 4) n;
         DELETE FROM books WHERE id % 6 = 0; UPDATE books SET price = 0 WHERE id % 5 = 0; COMMIT",
    )
    .await;
    rig.equal("books").await;
    stop(engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_text_may_be_an_id() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE odd (id text PRIMARY KEY, n int)").await;
    let ids = [
        "plain",
        "it's",
        "\"quoted\"",
        "back\\slash",
        "trailing\\",
        "\\\"",
        "line\nbreak",
        "\r\n",
        "tab\t",
        "\u{1}\u{1f}",
        "\u{7f}\u{85}",
        "über/straße?x=1&y#z",
        "日本語",
        "👩\u{200d}🚀",
        "\u{202e}rtl",
        "\u{feff}",
        " ",
        "a:b",
        "%2F..%00",
        "null",
        "{\"delete\":{\"_index\":\"odd\",\"_id\":\"plain\"}}",
        "x\"}}\n{\"delete\":{\"_id\":\"plain\"}}\n",
        "_id",
        "{}",
    ];
    let (copied, streamed) = ids.split_at(ids.len() / 2);
    rig.client.execute("INSERT INTO odd SELECT unnest($1::text[]), 1", &[&copied]).await.unwrap();
    let engine = rig.run(rig.config(&["odd"])).await;
    rig.equal_now("odd").await;
    rig.client.execute("INSERT INTO odd SELECT unnest($1::text[]), 2", &[&streamed]).await.unwrap();
    rig.equal("odd").await;
    assert_eq!(rig.documents("odd").len(), ids.len());
    rig.sql("UPDATE odd SET n = n + 1").await;
    rig.equal("odd").await;
    rig.sql("UPDATE odd SET id = id || '\\'; ").await;
    rig.equal("odd").await;
    rig.sql("DELETE FROM odd").await;
    rig.equal("odd").await;
    assert_eq!(engine.status().sink.rejected, 0);
    stop(engine).await;
}

/// Elasticsearch takes no empty id: such a row has another one, which is no other row's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_empty_key() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE odd (id text PRIMARY KEY, n int); CREATE TABLE two (a text, b text, PRIMARY KEY (a, b))")
        .await;
    rig.sql("INSERT INTO odd VALUES ('', 1), ('\\', 2), ('0', 3); INSERT INTO two VALUES ('', ''), ('', 'b')").await;
    let mut config = rig.config(&["odd", "two"]);
    let engine = rig.run(config.clone()).await;
    let ids = |table: &str| rig.documents(table).into_keys().collect::<Vec<_>>();
    assert_eq!(ids("odd"), ["\0", "0", "\\"]);
    assert_eq!(ids("two"), [":", ":b"]);
    rig.sql("UPDATE odd SET n = n + 10; UPDATE odd SET id = 'moved' WHERE id = ''").await;
    rig.equal("odd").await;
    rig.sql("UPDATE odd SET id = '' WHERE id = '0'").await;
    rig.delivered().await;
    assert_eq!(json!(rig.documents("odd")["\0"]), json!({"id": "", "n": 13}));
    assert_eq!(ids("odd"), ["\0", "\\", "moved"]);
    rig.sql("DELETE FROM odd WHERE id = ''").await;
    rig.equal("odd").await;
    rig.sql("INSERT INTO odd VALUES ('', 5)").await;
    rig.delivered().await;
    assert_eq!(engine.status().sink.rejected, 0);
    stop(engine).await;
    // What a sweep reads of the index is the same id.
    rig.sql("DELETE FROM odd WHERE id = ''").await;
    config.cdc.snapshot.resnapshot = true;
    let engine = rig.run(config).await;
    rig.equal("odd").await;
    let swept = "public.odd: 1 documents removed";
    assert!(
        engine.status().notices.iter().any(|notice| notice.text.starts_with(swept)),
        "{:?}",
        engine.status().notices
    );
    stop(engine).await;
}

/// Published, but without an index: left out by design, and nobody waits for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_without_an_index_are_left_out() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    // A name that begins like that of a mapped table is another table's.
    rig.sql("CREATE TABLE books_archive (id int PRIMARY KEY, title text); CREATE TABLE keyless (n int)").await;
    let mut config = rig.config(&["books", "books_archive", "keyless"]);
    config.elasticsearch.table_index_mapping.retain(|table, _| table.name == "books");
    rig.sql("INSERT INTO books_archive VALUES (1, 'archived')").await;
    let engine = rig.run(config).await;
    let begin = rig.confirmed().await;
    rig.sql("INSERT INTO books VALUES (1, 'one')").await;
    rig.sql(
        "INSERT INTO books_archive SELECT n, 'archived' FROM generate_series(2, 100) n; INSERT INTO keyless VALUES (1)",
    )
    .await;
    rig.sql("UPDATE books_archive SET title = 'x'; DELETE FROM books_archive WHERE id = 1; TRUNCATE books_archive")
        .await;
    rig.equal("books").await;
    assert!(rig.confirmed().await > begin);
    assert_eq!(rig.store.stats().items, 1);
    assert_eq!(rig.store.stats().documents, 1);
    assert_eq!(engine.status().tables.len(), 1);
    stop(engine).await;
}

/// Whatever was answered for before the end is acknowledged with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stop_ends_cleanly_while_changes_arrive() {
    let rig = Rig::new().await;
    rig.sql(BOOKS).await;
    for round in 0..3 {
        let mut engine = rig.run(rig.config(&["books"])).await;
        let client = rig.connect().await;
        let writer = tokio::spawn(async move {
            for n in 0..200 {
                let sql = format!("INSERT INTO books VALUES ({}, 'x')", round * 1_000 + n);
                client.batch_execute(&sql).await.unwrap();
            }
        });
        wait_until("some have come", LIMIT, || async { engine.status().tables[0].inserts >= 20 }).await;
        engine.control().send(Command::Stop).await.unwrap();
        ended(&mut engine).await.unwrap();
        assert_eq!(engine.status().phase, Phase::Stopped);
        // All is acknowledged but at most the one transaction whose end had not been read yet.
        let mut versions: Vec<_> = rig.store.documents("books").into_values().map(|(version, _)| version).collect();
        versions.sort_unstable();
        let last_but_one = pgtide::version::position(versions[versions.len() - 2].unsigned_abs());
        assert!(rig.confirmed().await > last_but_one, "answered changes were left unacknowledged");
        writer.await.unwrap();
    }
    let engine = rig.run(rig.config(&["books"])).await;
    rig.equal("books").await;
    assert_eq!(rig.documents("books").len(), 600);
    let items = rig.store.stats().items;
    assert!((600..=603).contains(&items), "{items} items: acknowledged changes came again");
    stop(engine).await;
}
