//! The replication connection against a real PostgreSQL.

#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use pgtide::change::Field;
use pgtide::config::{Cdc, Secret, SslMode};
use pgtide::demo::Server;
use pgtide::lsn::Lsn;
use pgtide::postgres::connect::connect;
use pgtide::postgres::pgoutput::{Message, decode};
use pgtide::postgres::replication::{Frame, Reader, Session, SlotKind};
use pgtide::problem::ProblemKind;
use tokio_postgres::Client;

use support::{own_server_with, wait_until};

async fn server(settings: &[(&str, &str)]) -> (Server, Cdc, Client) {
    let server = own_server_with(settings).await;
    // Asks for TLS first, which the server does not have.
    let cdc = Cdc { ssl_mode: SslMode::Prefer, ..server.config("postgres") };
    let client = connect(&cdc, "test").await.unwrap();
    (server, cdc, client)
}

/// Reads until `stop` says so of a message.
async fn read_until(reader: &mut Reader, mut stop: impl FnMut(&Message<'_>) -> bool) {
    let read = async {
        loop {
            while let Some(frame) = reader.next_frame().unwrap() {
                if let Frame::Data { data, .. } = frame
                    && stop(&decode(data).unwrap())
                {
                    return;
                }
            }
            reader.fill().await.unwrap();
        }
    };
    tokio::time::timeout(Duration::from_secs(60), read).await.expect("the message did not come");
}

/// Reads `count` commits; gives the rows inserted and the end of the last commit.
async fn read_commits(reader: &mut Reader, count: usize) -> (usize, Lsn) {
    let (mut rows, mut commits, mut end) = (0, 0, Lsn::ZERO);
    read_until(reader, |message| {
        match message {
            Message::Insert { .. } => rows += 1,
            Message::Commit { end_lsn, .. } => (commits, end) = (commits + 1, *end_lsn),
            _ => {}
        }
        commits == count
    })
    .await;
    (rows, end)
}

async fn confirmed(client: &Client, slot: &str) -> Lsn {
    let sql = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1";
    client.query_one(sql, &[&slot]).await.unwrap().get::<_, String>(0).parse().unwrap()
}

#[tokio::test]
async fn sessions_answer_and_survive_errors() {
    let (_server, cdc, client) = server(&[]).await;
    client.batch_execute("CREATE TABLE t (id int PRIMARY KEY); INSERT INTO t VALUES (1)").await.unwrap();
    let mut session = Session::connect(&cdc, "slot").await.unwrap();
    let error = session.query("SELECT nonsense").await.unwrap_err();
    assert_eq!(error.sqlstate(), Some("42703"), "{error}");
    let rows = session.query("SELECT 1, NULL, 'a' UNION ALL SELECT 2, 'b', ''").await.unwrap();
    let text = |text: &str| Some(text.to_owned());
    assert_eq!(rows, [[text("1"), None, text("a")], [text("2"), text("b"), text("")]]);
    let settings = "SELECT current_setting('TimeZone'), current_setting('DateStyle'), current_setting('IntervalStyle'), \
                    current_setting('application_name'), pg_backend_pid()";
    let expected =
        [text("UTC"), text("ISO, YMD"), text("iso_8601"), text("pgtide slot"), text(&session.process_id().to_string())];
    assert_eq!(session.query(settings).await.unwrap(), [expected]);
    let timezone: String = client.query_one("SELECT current_setting('TimeZone')", &[]).await.unwrap().get(0);
    assert_eq!(timezone, "UTC");

    let identity = session.identify_system().await.unwrap();
    assert_eq!((identity.timeline, identity.database.as_deref()), (1, Some("postgres")));
    let slot = session.create_slot("Odd_but_not", SlotKind::Permanent).await.unwrap_err();
    assert_eq!(slot.sqlstate(), Some("42602"), "{slot}");
    let slot = session.create_slot("s", SlotKind::Temporary).await.unwrap();
    assert!(slot.consistent_point >= identity.wal_position);
    client.batch_execute("INSERT INTO t VALUES (2)").await.unwrap();
    let import = format!("BEGIN ISOLATION LEVEL REPEATABLE READ; SET TRANSACTION SNAPSHOT '{}'", slot.snapshot_name);
    client.batch_execute(&import).await.unwrap();
    let seen: i64 = client.query_one("SELECT count(*) FROM t", &[]).await.unwrap().get(0);
    assert_eq!(seen, 1, "the snapshot holds what was committed later");
    let again = Session::connect(&cdc, "slot").await.unwrap().create_slot("s", SlotKind::Temporary).await.unwrap_err();
    assert_eq!(again.sqlstate(), Some("42710"), "{again}");

    // A command that is given up half-way must not lend its rows to the next one.
    tokio::time::timeout(Duration::from_millis(50), session.query("SELECT pg_sleep(1)")).await.unwrap_err();
    assert!(session.query("SELECT 1").await.is_err());
    let missing = Session::connect(&cdc, "x").await.unwrap().start("missing", Lsn::ZERO, "p").await.err().unwrap();
    assert_eq!((missing.sqlstate(), missing.problem().kind), (Some("42704"), ProblemKind::Setup), "{missing}");
}

#[tokio::test]
async fn the_stream_is_read_and_confirmed() {
    let (server, cdc, client) = server(&[]).await;
    // Over a Unix socket and over TCP.
    let folder = server.socket_dir().to_str().unwrap().to_owned();
    let socket = Cdc { host: folder, ..cdc.clone() };
    client
        .batch_execute("CREATE TABLE t (id int PRIMARY KEY, body text); CREATE PUBLICATION \"P\"\"x'y\" FOR TABLE t")
        .await
        .unwrap();
    for (number, cdc) in [(1, &cdc), (2, &socket)] {
        let slot = format!("s{number}");
        let mut session = Session::connect(cdc, "stream").await.unwrap();
        session.create_slot(&slot, SlotKind::Permanent).await.unwrap();
        let (mut reader, feedback) = session.start(&slot, Lsn::ZERO, "P\"x'y").await.unwrap();
        let busy = Session::connect(cdc, "stream").await.unwrap().start(&slot, Lsn::ZERO, "p").await.err().unwrap();
        assert_eq!((busy.sqlstate(), busy.problem().transient), (Some("55006"), true), "{busy}");

        // Larger than the buffer, in the middle of smaller ones.
        let insert = "INSERT INTO t SELECT i, CASE i WHEN 500 THEN repeat('x', 5000000) ELSE 'small' END FROM generate_series(1, 1000) i";
        client.batch_execute(insert).await.unwrap();
        client.batch_execute("DELETE FROM t").await.unwrap();
        let (mut rows, mut longest, mut commits, mut end) = (0, 0, 0, Lsn::ZERO);
        read_until(&mut reader, |message| {
            match message {
                Message::Insert { new, .. } => {
                    rows += 1;
                    let fields: Vec<_> = new.iter().collect();
                    assert_eq!(fields[0], Field::Text(rows.to_string().as_bytes()));
                    let Field::Text(body) = fields[1] else { panic!("no body") };
                    longest = longest.max(body.len());
                }
                Message::Commit { end_lsn, .. } => (commits, end) = (commits + 1, *end_lsn),
                _ => {}
            }
            commits == 2
        })
        .await;
        assert_eq!((rows, longest), (1000, 5_000_000));

        // By the task's own updates.
        feedback.confirm(end);
        feedback.confirm(Lsn(1));
        wait_until("the position is confirmed", Duration::from_secs(10), async || {
            confirmed(&client, &slot).await >= end
        })
        .await;
        assert_eq!(feedback.confirmed_sent(), end);

        // At the end, with more on its way than the kernel's buffers hold.
        client.batch_execute("INSERT INTO t VALUES (1)").await.unwrap();
        let (rows, end) = read_commits(&mut reader, 1).await;
        assert_eq!(rows, 1);
        client
            .batch_execute("INSERT INTO t SELECT i, repeat('y', 100000) FROM generate_series(2, 400) i; TRUNCATE t")
            .await
            .unwrap();
        reader.fill().await.unwrap();
        feedback.confirm(end);
        drop(reader);
        let other = feedback.clone();
        feedback.finish().await.unwrap();
        assert!(confirmed(&client, &slot).await >= end, "the last position was lost");
        assert!(other.dead());
        assert!(other.finish().await.is_err());
    }
}

#[tokio::test]
async fn a_connection_that_nobody_reads_lives() {
    let (_server, cdc, client) = server(&[("wal_sender_timeout", "2s")]).await;
    client
        .batch_execute("CREATE TABLE t (id int PRIMARY KEY, body text); CREATE PUBLICATION p FOR TABLE t")
        .await
        .unwrap();
    let mut session = Session::connect(&cdc, "stream").await.unwrap();
    session.create_slot("s", SlotKind::Permanent).await.unwrap();
    let (mut reader, feedback) = session.start("s", Lsn::ZERO, "p").await.unwrap();
    client.batch_execute("INSERT INTO t SELECT i, repeat('y', 1000) FROM generate_series(1, 50000) i").await.unwrap();
    // It is the passing of time that is tested.
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert!(!feedback.dead());
    assert_eq!(read_commits(&mut reader, 1).await.0, 50_000);
    client.batch_execute("INSERT INTO t VALUES (0)").await.unwrap();
    assert_eq!(read_commits(&mut reader, 1).await.0, 1);
    // Without anybody's confirmation the slot stays where it was.
    drop((reader, feedback));
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let mut session = Session::connect(&cdc, "stream").await.unwrap();
        session.query("SELECT 1").await.unwrap();
        match session.start("s", Lsn::ZERO, "p").await {
            Ok((mut reader, _feedback)) => {
                assert_eq!(read_commits(&mut reader, 2).await.0, 50_001);
                break;
            }
            Err(error) => assert!(error.sqlstate() == Some("55006") && Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn the_end_of_the_server_and_its_errors_are_told() {
    let (_server, cdc, client) = server(&[]).await;
    client.batch_execute("CREATE TABLE t (id int PRIMARY KEY)").await.unwrap();
    let mut session = Session::connect(&cdc, "stream").await.unwrap();
    session.create_slot("s", SlotKind::Temporary).await.unwrap();
    let process = session.process_id();
    // A publication that is not there is noticed with the first change.
    let (mut reader, feedback) = session.start("s", Lsn::ZERO, "missing").await.unwrap();
    client.batch_execute("INSERT INTO t VALUES (1)").await.unwrap();
    let error = next_error(&mut reader).await;
    assert_eq!(error.problem().kind, ProblemKind::Gap, "{error}");
    drop((reader, feedback));

    client.batch_execute("CREATE PUBLICATION p FOR TABLE t").await.unwrap();
    let mut session = Session::connect(&cdc, "stream").await.unwrap();
    assert_ne!(session.process_id(), process);
    session.create_slot("t", SlotKind::Temporary).await.unwrap();
    let process = session.process_id();
    let (mut reader, feedback) = session.start("t", Lsn::ZERO, "p").await.unwrap();
    client.query("SELECT pg_terminate_backend($1)", &[&process]).await.unwrap();
    let error = next_error(&mut reader).await;
    assert!(error.problem().transient, "{error}");
    drop(reader);
    let _ = feedback.clone().finish().await;
    assert!(feedback.dead());
}

async fn next_error(reader: &mut Reader) -> pgtide::postgres::PostgresError {
    let read = async {
        loop {
            match reader.next_frame() {
                Ok(Some(_)) => {}
                Ok(None) => {
                    if let Err(error) = reader.fill().await {
                        return error;
                    }
                }
                Err(error) => return error,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(30), read).await.expect("no error came")
}

#[tokio::test]
async fn single_commits_are_seen_at_once() {
    let (_server, cdc, client) = server(&[]).await;
    client.batch_execute("CREATE TABLE t (id int PRIMARY KEY); CREATE PUBLICATION p FOR TABLE t").await.unwrap();
    let mut session = Session::connect(&cdc, "stream").await.unwrap();
    session.create_slot("s", SlotKind::Temporary).await.unwrap();
    let (mut reader, _feedback) = session.start("s", Lsn::ZERO, "p").await.unwrap();
    let mut quickest = Duration::MAX;
    for id in 0..50 {
        client.execute("INSERT INTO t VALUES ($1)", &[&id]).await.unwrap();
        let committed = Instant::now();
        read_commits(&mut reader, 1).await;
        quickest = quickest.min(committed.elapsed());
    }
    // The quickest of many, for the machine may be busy with something else.
    assert!(quickest < Duration::from_millis(5), "{quickest:?}");
    eprintln!("quickest commit seen after {quickest:?}");
}

#[tokio::test]
async fn every_way_of_login_works() {
    let (_server, cdc, client) = server(&[]).await;
    let lines = ["md5", "scram-sha-256", "password"].map(|way| format!("host all {} all {way}", role(way)));
    let file: String = client.query_one("SHOW hba_file", &[]).await.unwrap().get(0);
    let former = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, format!("{}\n{former}", lines.join("\n"))).unwrap();
    // Prepared, the no-break space is a space and the ligature two letters; a control character is left as it is.
    for (way, stored, password) in [
        ("md5", "md5", "pass\u{e9}"),
        ("scram-sha-256", "scram-sha-256", "plain"),
        ("scram-sha-256", "scram-sha-256", "a\u{a0}\u{fb01}\u{e9}"),
        ("scram-sha-256", "scram-sha-256", "a\u{7}b\u{a0}"),
        ("password", "scram-sha-256", "plain\u{e9}"),
    ] {
        let role = role(way);
        client
            .batch_execute(&format!(
                "SET password_encryption = '{stored}'; DROP ROLE IF EXISTS {role}; \
                 CREATE ROLE {role} LOGIN REPLICATION PASSWORD '{password}'; SELECT pg_reload_conf()"
            ))
            .await
            .unwrap();
        let with = |password: &str| Cdc { username: role.clone(), password: Secret(password.into()), ..cdc.clone() };
        // The server reads its file a moment after it was asked to.
        let refused = || async {
            let error = Session::connect(&with("wrong"), "test").await.err();
            error.is_some_and(|error| error.sqlstate() == Some("28P01"))
        };
        wait_until("a wrong password is refused", Duration::from_secs(10), refused).await;
        let session = Session::connect(&with(password), "test").await;
        assert!(session.is_ok(), "{way}, {password:?}: {}", session.err().unwrap());
        let none = Session::connect(&with(""), "test").await.err().unwrap();
        assert!(none.to_string().contains("cdc.password is empty"), "{none}");
    }
}

fn role(way: &str) -> String {
    format!("by_{}", way.replace('-', "_"))
}

/// Writes to the log until its segment has changed `count` times.
async fn switch_wal(client: &Client, count: usize) {
    for _ in 0..count {
        client.batch_execute("INSERT INTO t VALUES (1)").await.unwrap();
        client.batch_execute("SELECT pg_switch_wal()").await.unwrap();
    }
}

#[tokio::test]
async fn lost_wal_is_a_gap() {
    let (_server, cdc, client) = server(&[("max_slot_wal_keep_size", "1MB")]).await;
    client.batch_execute("CREATE TABLE t (id int); CREATE PUBLICATION p FOR TABLE t").await.unwrap();
    let mut session = Session::connect(&cdc, "slot").await.unwrap();
    session.create_slot("invalidated", SlotKind::Permanent).await.unwrap();
    session.create_slot("removed", SlotKind::Permanent).await.unwrap();
    let start =
        async |slot: &'static str| Session::connect(&cdc, "stream").await.unwrap().start(slot, Lsn::ZERO, "p").await;

    // The segment goes away under a slot that is held to be good.
    let sql =
        "SELECT pg_walfile_name(restart_lsn), current_setting('data_directory') FROM pg_replication_slots LIMIT 1";
    let row = client.query_one(sql, &[]).await.unwrap();
    let segment = format!("{}/pg_wal/{}", row.get::<_, String>(1), row.get::<_, String>(0));
    switch_wal(&client, 1).await;
    let aside = format!("{segment}.aside");
    std::fs::rename(&segment, &aside).unwrap();
    let (mut reader, _feedback) = start("removed").await.unwrap();
    let error = next_error(&mut reader).await;
    assert_eq!((error.sqlstate(), error.problem().kind), (Some("58P01"), ProblemKind::Gap), "{error}");
    std::fs::rename(&aside, &segment).unwrap();

    switch_wal(&client, 4).await;
    client.batch_execute("CHECKPOINT").await.unwrap();
    let error = start("invalidated").await.err().expect("the slot lives");
    assert_eq!((error.sqlstate(), error.problem().kind), (Some("55000"), ProblemKind::Gap), "{error}");
}
