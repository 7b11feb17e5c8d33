//! What PostgreSQL does that a connector may trip over, each shown first as PostgreSQL has it and then with pgtide. Others of
//! this kind stand beside what they belong to: see docs/testing.md.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pgtide::change::Field;
use pgtide::lsn::Lsn;
use pgtide::postgres::pgoutput::{Message, decode};
use pgtide::postgres::replication::{Frame, Reader, Session, SlotKind};
use support::pipeline::{LIMIT, Rig, live, stop};
use support::standby::{self, Unconfirmed};
use support::{own_server, wait_until};

/// Positions and messages that a slot of its own has for the database.
async fn peek(rig: &Rig, slot: &str) -> Vec<(Lsn, Vec<u8>)> {
    let sql = "SELECT lsn::text, data FROM pg_logical_slot_peek_binary_changes($1, NULL, NULL, 'proto_version', '1',
               'publication_names', $2)";
    let rows = rig.client.query(sql, &[&slot, &rig.name]).await.unwrap();
    rows.iter().map(|row| (row.get::<_, String>(0).parse().unwrap(), row.get(1))).collect()
}

/// Waits until a session of this database waits for another's transaction.
async fn one_waits(rig: &Rig, query: &str) {
    let sql = format!(
        "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'
         AND query LIKE '{query}%'"
    );
    wait_until("it waits for another transaction", LIMIT, || async { rig.count(&sql).await > 0 }).await;
}

/// Two changes of one key may be in the log in another order than their transactions committed, which is the order that
/// counts: an INSERT writes its row before it learns from a unique index that it has to wait.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_in_another_order_than_their_commits() {
    let rig = Rig::new().await;
    // The key's index is the younger one, which PostgreSQL fills last.
    rig.sql("CREATE TABLE t (a int UNIQUE, id int, v text); ALTER TABLE t ADD PRIMARY KEY (id); INSERT INTO t VALUES (7, 5, 'old')")
        .await;
    let engine = rig.run(rig.config(&["t"])).await;
    let slot = format!("{}_look", rig.name);
    rig.sql(&format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')")).await;

    let (first, second, third) = (rig.connect().await, rig.connect().await, rig.connect().await);
    third.batch_execute("BEGIN; INSERT INTO t VALUES (1, 99, 'in the way')").await.unwrap();
    let waiting = tokio::spawn(async move {
        second.batch_execute("BEGIN; INSERT INTO t VALUES (1, 5, 'NEW'); COMMIT").await.unwrap();
    });
    one_waits(&rig, "BEGIN; INSERT INTO t VALUES (1, 5").await;
    first.batch_execute("DELETE FROM t WHERE id = 5").await.unwrap();
    third.batch_execute("ROLLBACK").await.unwrap();
    waiting.await.unwrap();

    let changes = peek(&rig, &slot).await;
    let at = |wanted: u8| changes.iter().position(|(_, data)| data[0] == wanted).unwrap();
    assert!(at(b'D') < at(b'I'), "the DELETE is not the first to be committed");
    assert!(
        changes[at(b'D')].0 > changes[at(b'I')].0,
        "the changes are in the order of their commits: nothing is shown"
    );
    rig.sql(&format!("SELECT pg_drop_replication_slot('{slot}')")).await;

    rig.equal("t").await;
    assert_eq!(rig.documents("t")["5"]["v"], "NEW");
    stop(engine).await;
}

/// The snapshot that comes with a slot fits the stream of every other slot: it has just the rows of the transactions
/// whose commit records begin below its point. On that rest the versions of copied rows.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_has_what_was_committed_below_its_point() {
    let rig = Rig::new().await;
    let cdc = rig.config(&[]).cdc;
    rig.sql(&format!("CREATE TABLE w (id bigserial PRIMARY KEY, n int); CREATE PUBLICATION {} FOR TABLE w", rig.name))
        .await;
    let slot = format!("{}_all", rig.name);
    rig.sql(&format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')")).await;
    let done = Arc::new(AtomicBool::new(false));
    let mut writers = Vec::new();
    for n in 0..6 {
        let (client, done) = (rig.connect().await, Arc::clone(&done));
        writers.push(tokio::spawn(async move {
            while !done.load(Ordering::Relaxed) {
                let sql = match fastrand::u8(..10) {
                    0 | 1 => "BEGIN; INSERT INTO w (n) VALUES ($); SELECT pg_sleep(0.02); INSERT INTO w (n) VALUES ($); COMMIT",
                    2 => "BEGIN; INSERT INTO w (n) VALUES ($); ROLLBACK",
                    _ => "INSERT INTO w (n) VALUES ($)",
                };
                client.batch_execute(&sql.replace('$', &n.to_string())).await.unwrap();
            }
        }));
    }
    let mut seen: Vec<(Lsn, BTreeSet<i64>)> = Vec::new();
    for number in 0..10 {
        let mut session = Session::connect(&cdc, "slot").await.unwrap();
        let made = session.create_slot(&format!("{}_{number}", rig.name), SlotKind::Temporary).await.unwrap();
        let reader = rig.connect().await;
        let import =
            format!("BEGIN ISOLATION LEVEL REPEATABLE READ; SET TRANSACTION SNAPSHOT '{}'", made.snapshot_name);
        reader.batch_execute(&import).await.unwrap();
        let rows = reader.query("SELECT id FROM w", &[]).await.unwrap();
        seen.push((made.consistent_point, rows.iter().map(|row| row.get(0)).collect()));
    }
    done.store(true, Ordering::Relaxed);
    for writer in writers {
        writer.await.unwrap();
    }

    let (mut commit, mut committed) = (Lsn::ZERO, Vec::new());
    for (_, data) in peek(&rig, &slot).await {
        match decode(&data).unwrap() {
            Message::Begin { final_lsn, .. } => {
                assert!(final_lsn > commit, "commits are not in the order of their positions");
                commit = final_lsn;
            }
            Message::Insert { new, .. } => {
                let Some(Field::Text(id)) = new.iter().next() else { panic!("no id") };
                committed.push((commit, std::str::from_utf8(id).unwrap().parse::<i64>().unwrap()));
            }
            _ => {}
        }
    }
    for (point, rows) in seen {
        let below: BTreeSet<i64> = committed.iter().filter(|(commit, _)| *commit < point).map(|(_, id)| *id).collect();
        assert_eq!(rows, below, "the snapshot of {point}");
        assert!(committed.iter().all(|(commit, _)| *commit != point));
    }
    rig.sql(&format!("SELECT pg_drop_replication_slot('{slot}')")).await;
}

/// The name of an exported snapshot is worth nothing as soon as its session does something else; who has imported it may
/// export it again, and that one lives as long as its own transaction. So the slot's session need not be kept.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_exported_snapshot_dies_and_its_import_does_not() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE z (id int PRIMARY KEY); INSERT INTO z SELECT generate_series(1, 500)").await;
    let mut session = Session::connect(&rig.config(&[]).cdc, "slot").await.unwrap();
    let made = session.create_slot(&format!("{}_look", rig.name), SlotKind::Temporary).await.unwrap();
    let import =
        |name: &str| format!("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT '{name}'");
    let keeper = rig.connect().await;
    keeper.batch_execute(&import(&made.snapshot_name)).await.unwrap();
    let again: String = keeper.query_one("SELECT pg_export_snapshot()", &[]).await.unwrap().get(0);
    rig.sql("DELETE FROM z WHERE id <= 100").await;
    session.identify_system().await.unwrap();

    let worker = rig.connect().await;
    worker.batch_execute(&import(&made.snapshot_name)).await.expect_err("the first name still serves");
    worker.batch_execute("ROLLBACK").await.unwrap();
    drop(session);
    let slots = format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{}_look'", rig.name);
    wait_until("the slot is gone with its session", LIMIT, || async { rig.count(&slots).await == 0 }).await;
    worker.batch_execute(&import(&again)).await.unwrap();
    let rows: i64 = worker.query_one("SELECT count(*) FROM z", &[]).await.unwrap().get(0);
    assert_eq!(rows, 500);
    drop((worker, keeper));

    // pgtide's workers begin when the session of the slot has ended.
    let mut config = rig.config(&["z"]);
    config.cdc.snapshot.chunk_size = 100;
    config.elasticsearch.batch_size_limit = 50;
    rig.hold(1);
    let engine = rig.start(config);
    rig.until_held().await;
    assert_eq!(rig.walsenders().await, 0);
    rig.sql("DELETE FROM z WHERE id <= 200").await;
    rig.store.clear_faults();
    live(&engine).await;
    rig.equal("z").await;
    stop(engine).await;
}

/// A commit that waits for a synchronous standby is in the log and in the stream, and in no snapshot yet. A copy that took
/// "where the log ends" for its beginning would lose it; PostgreSQL makes no slot before it is over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_waits_for_a_standby_when_the_copy_begins() {
    let server = own_server().await;
    let rig = Rig::on(&server).await;
    rig.sql(&format!(
        "CREATE TABLE y (id int PRIMARY KEY, n int); INSERT INTO y VALUES (1, 0); CREATE PUBLICATION {} FOR TABLE y",
        rig.name
    ))
    .await;
    rig.sql("SELECT pg_create_logical_replication_slot('look', 'pgoutput')").await;
    // The ledger is made beforehand: to write it waits for the standby as well.
    let mut config = rig.config(&["y"]);
    config.cdc.slot.name = "before".into();
    stop(rig.run(config).await).await;

    let unconfirmed = Unconfirmed::begin(&rig.client, rig.connect().await).await;
    let other = rig.connect().await;
    let waiting =
        tokio::spawn(async move { other.batch_execute("UPDATE y SET n = n + 1 WHERE id = 1").await.unwrap() });
    standby::waits(&rig.client, "UPDATE y%").await;
    let stream = peek(&rig, "look").await;
    assert!(stream.iter().any(|(_, data)| data[0] == b'U'), "the stream has not got it yet: nothing is shown");
    let seen = rig.count("SELECT n::int8 FROM y").await;
    // Everything below the log's end has been written, this commit too.
    let end = rig.position().await;
    assert!(stream.last().unwrap().0 <= end);

    rig.sql("SET synchronous_commit = local; INSERT INTO y VALUES (2, 0)").await;
    let engine = rig.start(rig.config(&["y"]));
    let asked =
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep' AND application_name LIKE 'pgtide%' OR
                 backend_type = 'walsender' AND wait_event_type = 'Lock'";
    wait_until("the start waits", LIMIT, || async { rig.count(asked).await > 0 }).await;
    assert!(!waiting.is_finished());
    assert_eq!(rig.documents("y").len(), 1, "it was copied under a snapshot that lacks a commit");
    assert_eq!(rig.count("SELECT n::int8 FROM y WHERE id = 1").await, seen);
    unconfirmed.end(&rig.client).await;
    waiting.await.unwrap();
    live(&engine).await;
    rig.equal("y").await;
    assert_eq!(rig.documents("y")["1"]["n"], seen + 1, "the commit was seen already: nothing is shown");
    stop(engine).await;
    server.stop().await.unwrap();
}

/// The numbers that the stream inserts from now until `last` has come.
async fn numbers(reader: &mut Reader, last: i64) -> Vec<i64> {
    let mut numbers = Vec::new();
    let read = async {
        while numbers.last() != Some(&last) {
            while let Some(frame) = reader.next_frame().unwrap() {
                if let Frame::Data { data, .. } = frame
                    && let Message::Insert { new, .. } = decode(data).unwrap()
                    && let Some(Field::Text(id)) = new.iter().next()
                {
                    numbers.push(std::str::from_utf8(id).unwrap().parse().unwrap());
                }
            }
            if numbers.last() != Some(&last) {
                reader.fill().await.unwrap();
            }
        }
    };
    tokio::time::timeout(LIMIT, read).await.expect("it does not come");
    numbers
}

/// A start at a position ahead of the slot's leaves out what lies between without a word, and one behind it is moved to
/// it: a position of one's own is not to be trusted. pgtide begins where the slot stands.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_ahead_of_the_slot_skips_in_silence() {
    let rig = Rig::new().await;
    rig.sql("CREATE TABLE q (id int PRIMARY KEY)").await;
    let engine = rig.run(rig.config(&["q"])).await;
    stop(engine).await;
    let slot = format!("{}_look", rig.name);
    rig.sql(&format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')")).await;
    rig.sql("INSERT INTO q VALUES (1)").await;
    let ahead = rig.position().await;
    rig.sql("INSERT INTO q VALUES (2)").await;
    rig.sql("INSERT INTO q VALUES (3)").await;
    for (from, expected) in [(ahead, vec![2, 3]), (Lsn(1), vec![1, 2, 3])] {
        let cdc = rig.config(&[]).cdc;
        // The former connection holds the slot for a moment longer.
        let deadline = std::time::Instant::now() + LIMIT;
        let (mut reader, feedback) = loop {
            match Session::connect(&cdc, "stream").await.unwrap().start(&slot, from, &rig.name).await {
                Ok(started) => break started,
                Err(error) => {
                    assert!(error.sqlstate() == Some("55006") && std::time::Instant::now() < deadline, "{error}")
                }
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        assert_eq!(numbers(&mut reader, 3).await, expected, "from {from}");
        drop((reader, feedback));
    }
    let engine = rig.run(rig.config(&["q"])).await;
    rig.equal("q").await;
    assert_eq!(rig.documents("q").len(), 3);
    stop(engine).await;
    let drop_it = format!("SELECT pg_drop_replication_slot('{slot}')");
    wait_until("the slot can be dropped", LIMIT, || async { rig.client.batch_execute(&drop_it).await.is_ok() }).await;
}
