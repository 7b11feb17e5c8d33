//! Wide and long: as many columns, as long names and values as PostgreSQL has.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use pgtide::engine::Phase;
use pgtide::store::{self, Effect, Fault, Store};
use pgtide::table::{TableId, quote_identifier};

use super::support::pipeline::{LIMIT, Rig, live, stop};
use super::support::process::{Pipeline, Settings, wait_confirmed};
use super::support::{fresh_database, wait_until};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn as_many_columns_as_there_can_be() {
    let rig = Rig::new().await;
    let columns: Vec<String> = (1..1_600).map(|at| format!("column_{at} int2 DEFAULT {at}")).collect();
    // The key at the end.
    rig.sql(&format!("CREATE TABLE wide ({}, id int PRIMARY KEY)", columns.join(", "))).await;
    rig.sql("INSERT INTO wide (id) SELECT generate_series(1, 50)").await;
    let engine = rig.run(rig.config(&["wide"])).await;
    rig.equal("wide").await;
    rig.sql("INSERT INTO wide (id, column_1599) SELECT n, n FROM generate_series(51, 100) n; UPDATE wide SET column_800 = NULL")
        .await;
    rig.sql("DELETE FROM wide WHERE id = 7; UPDATE wide SET id = 7 WHERE id = 8").await;
    rig.equal("wide").await;
    assert_eq!(rig.documents("wide")["100"].as_object().unwrap().len(), 1_600);
    stop(engine).await;
}

/// `NAMEDATALEN` leaves 63 bytes. Longer ones PostgreSQL cuts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn names_as_long_as_there_can_be() {
    let rig = Rig::new().await;
    let long = |first: &str| format!("{first}{}", "\u{e9}".repeat((63 - first.len()) / 2));
    let (schema, table, column) = (long("A schema's"), long("A \"table\"\\"), long("a column "));
    for name in [&schema, &table, &column] {
        assert!(name.len() >= 62, "{name}");
    }
    let id = TableId::new(&schema, &table);
    let quoted = quote_identifier(&column);
    rig.sql(&format!(
        "CREATE SCHEMA {}; CREATE TABLE {} (id int, {quoted} text, PRIMARY KEY ({quoted}, id));
         INSERT INTO {} VALUES (1, 'a'), (2, 'b')",
        quote_identifier(&schema),
        id.quoted(),
        id.quoted()
    ))
    .await;
    let mut config = rig.config(&["elsewhere"]);
    config.cdc.publication.tables[0].id = id.clone();
    config.cdc.publication.name = long("a publication ");
    config.elasticsearch.table_index_mapping = [(id.clone(), "long".to_owned())].into();
    let engine = rig.run(config).await;
    rig.sql(&format!("INSERT INTO {} VALUES (3, 'c'); DELETE FROM {} WHERE id = 1", id.quoted(), id.quoted())).await;
    rig.delivered().await;
    let documents = rig.documents("long");
    assert_eq!(documents.keys().collect::<Vec<_>>(), ["2:b", "3:c"]);
    assert_eq!(documents["3:c"][&column], "c");
    stop(engine).await;
}

/// A row that fills a bulk goes in one of its own: a server that takes no such bulk refuses nothing else with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_row_goes_alone() {
    let rig = Rig::new().await;
    let fill = |from: u32| {
        format!(
            "INSERT INTO long SELECT n, CASE WHEN n = {} THEN repeat('long', 100000) END FROM generate_series({from}, {}) n",
            from + 20,
            from + 40
        )
    };
    rig.sql(&format!("CREATE TABLE long (id int PRIMARY KEY, value text); {}", fill(0))).await;
    let mut config = rig.config(&["long"]);
    config.cdc.snapshot.workers = Some(1);
    config.elasticsearch.concurrent_request = 1;
    config.elasticsearch.batch_byte_size_limit = 300_000;
    config.elasticsearch.batch_ticker_duration = Duration::from_secs(3);
    let first = || rig.store.inject(Fault::new(Effect::Hold { applied: true }));
    let applied = || -> Vec<u32> { rig.store.documents("long").keys().map(|id| id.parse().unwrap()).collect() };
    first();
    let engine = rig.start(config);
    rig.until_held().await;
    assert_eq!(applied().len(), 20, "{:?}", applied());
    assert!(!applied().contains(&20));
    rig.store.clear_faults();
    live(&engine).await;
    rig.equal("long").await;

    // The first change goes at once, what follows gathers for a while.
    rig.sql("UPDATE long SET value = 'x' WHERE id = 0").await;
    rig.delivered().await;
    first();
    rig.sql(&fill(100)).await;
    rig.until_held().await;
    assert!(applied().contains(&100) && !applied().contains(&120), "{:?}", applied());
    rig.store.clear_faults();
    rig.equal("long").await;
    stop(engine).await;
}

const MIB: u64 = 1 << 20;

/// A row of 200 MB goes through, by copy, by stream and by reading again, at a small multiple of its size in memory.
/// Where the server takes no such body, it goes to the dead letters, and its neighbours are not held up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_of_200_megabytes() {
    let database = fresh_database().await;
    let sql = |sql: &'static str| database.client.batch_execute(sql);
    sql("CREATE TABLE long (id int PRIMARY KEY, n int, value text); ALTER TABLE long ALTER value SET STORAGE EXTERNAL;
         INSERT INTO long SELECT n, 0, 'short' FROM generate_series(1, 100) n;
         UPDATE long SET value = repeat(repeat('tide ', 199) || E'\"\\n\\\\\u{e9}', 200 * 1000) WHERE id = 50")
    .await
    .unwrap();
    let length: i32 =
        database.client.query_one("SELECT octet_length(value) FROM long WHERE id = 50", &[]).await.unwrap().get(0);
    let length = u64::try_from(length).unwrap();
    assert_eq!(length, 200_000_000);
    let options = store::Options { max_content_length: 400 << 20, ..store::Options::default() };
    let store = Store::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), options).await.unwrap();
    let settings = Settings {
        name: database.name.clone(),
        tables: vec!["long"],
        chunk_size: 8_000,
        batch_size_limit: 10_000,
        workers: 1,
    };
    let limit = 2 * LIMIT;
    let mut pipeline = Pipeline::to(&database.config, &store.url(), &settings);
    pipeline.start();
    pipeline.wait("it is live", limit, |status| status.phase == Phase::Streaming).await;
    let of_copy = pipeline.highest_resident();
    // Its beginning, and that it is all there.
    let found = |id: &str, n: u32| {
        let documents = store.documents("long");
        let (_, source) = &documents[id];
        let head = format!("{{\"id\":{id},\"n\":{n},\"value\":\"tide tide");
        source.starts_with(head.as_bytes()) && source.len() as u64 == length + 3 * 200_000 + head.len() as u64 - 7
    };
    assert!(found("50", 0));
    // Whole in the stream, and left out of it.
    sql("INSERT INTO long SELECT 101, 1, value FROM long WHERE id = 50").await.unwrap();
    wait_confirmed(&database.client, &database.name, limit).await;
    assert!(found("101", 1));
    sql("UPDATE long SET n = 2 WHERE id <= 100").await.unwrap();
    wait_confirmed(&database.client, &database.name, limit).await;
    assert!(found("50", 2));
    let highest = pipeline.highest_resident();
    println!("{} MiB in the copy, {} MiB in all", of_copy / MIB, highest / MIB);
    assert!(highest < 6 * length, "{} MiB", highest / MIB);
    pipeline.kill();

    // The next server takes less.
    let store = Store::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), store::Options::default()).await.unwrap();
    pipeline.set("/elasticsearch/urls", vec![store.url()]);
    pipeline.set("/cdc/snapshot/resnapshot", true);
    sql("DELETE FROM long WHERE id = 101").await.unwrap();
    pipeline.start();
    wait_until("the others are there", limit, || async { store.documents("long").len() == 99 }).await;
    let status = pipeline.wait("it is refused", limit, |status| status.sink.rejected == 1).await;
    assert_eq!(status.sink.documents, 99, "{status:?}");
    let highest = pipeline.highest_resident();
    println!("{} MiB with a dead letter", highest / MIB);
    assert!(highest < 7 * length, "{} MiB", highest / MIB);
    pipeline.kill();
}
