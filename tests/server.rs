//! The demo's server, its rows and its workload, against a real PostgreSQL.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod support;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use pgtide::demo::{Options, Server, ServerError, Workload, WorkloadOptions, seed, sweep};
use support::{fresh_database, own_server, own_server_with, rows_as_json, wait_until};
use tokio::io::{AsyncBufReadExt, BufReader};

const LIMIT: Duration = Duration::from_secs(30);

fn is_running(pid: u32) -> bool {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.try_into().unwrap()), None).is_ok()
}

async fn show(client: &tokio_postgres::Client, setting: &str) -> String {
    client.query_one(&format!("SHOW {setting}"), &[]).await.unwrap().get(0)
}

async fn wait_gone(folder: &Path, pid: u32) {
    wait_until("process and folder are gone", LIMIT, || async { !is_running(pid) && !folder.exists() }).await;
}

#[tokio::test]
async fn starts_with_initdb_and_stops_without_a_trace() {
    let steps = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let heard = std::sync::Arc::clone(&steps);
    let on_step = std::sync::Arc::new(move |step| heard.lock().unwrap().push(step));
    let server = Server::start(Options { on_step, ..Options::default() }).await.unwrap();
    {
        use pgtide::demo::Step::{Creating, Ready, Starting};
        // A fetch may come before.
        assert!(steps.lock().unwrap().ends_with(&[Creating, Starting, Ready]));
    }
    let client = server.connect("postgres").await.unwrap();
    assert_eq!(show(&client, "wal_level").await, "logical");
    assert_eq!(show(&client, "max_replication_slots").await, "20");
    assert_eq!(show(&client, "server_encoding").await, "UTF8");
    assert_eq!(show(&client, "synchronous_commit").await, "on");
    let (folder, pid) = (server.socket_dir().to_owned(), server.pid().unwrap());
    assert!(is_running(pid));
    server.stop().await.unwrap();
    assert!(!is_running(pid));
    assert!(!folder.exists());
}

/// `XDG_CACHE_HOME=$(mktemp -d) PGTIDE_PG_FETCH=always cargo test --test server -- --ignored --nocapture a_fetched`
#[tokio::test]
#[ignore = "needs the network: run by hand, as docs/testing.md says"]
async fn a_fetched_server_serves() {
    assert!(std::env::var("PGTIDE_PG_FETCH").is_ok(), "set PGTIDE_PG_FETCH=always");
    let begin = Instant::now();
    let on_step = std::sync::Arc::new(move |step| eprintln!("{:?} {step:?}", begin.elapsed()));
    let server = Server::start(Options { on_step, ..Options::default() }).await.unwrap();
    let found = server.installation().clone();
    assert!(found.bin.ends_with(format!("pgtide/postgresql/{}.0/bin", found.version)), "{found:?}");
    let client = server.connect("postgres").await.unwrap();
    assert_eq!(show(&client, "server_version").await, found.version);
    assert_eq!(show(&client, "wal_level").await, "logical");
    client
        .batch_execute("SELECT pg_create_logical_replication_slot('s', 'pgoutput')")
        .await
        .expect("the fetched build has no logical decoding");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn tcp_asks_for_the_password() {
    let server = own_server().await;
    server.create_database("it's \"quoted\"").await.unwrap();
    let config = server.config("it's \"quoted\"");
    let mut tcp = tokio_postgres::Config::new();
    tcp.host(&config.host).port(config.port).user(&config.username).dbname(&config.database);
    let without = tcp.connect(tokio_postgres::NoTls).await;
    assert!(without.is_err(), "no password was needed");
    tcp.password("wrong");
    assert!(tcp.connect(tokio_postgres::NoTls).await.is_err(), "any password did");
    tcp.password(&config.password.0);
    let (client, connection) = tcp.connect(tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    assert_eq!(client.query_one("SELECT current_database()", &[]).await.unwrap().get::<_, String>(0), config.database);
    assert!(!format!("{server:?}").contains(&config.password.0), "Debug shows the password");
    server.stop().await.unwrap();
}

#[tokio::test]
async fn a_hard_stop_and_a_restart_keep_port_and_rows() {
    let mut server = own_server_with(&[("max_wal_senders", "7")]).await;
    let port = server.port();
    let client = server.connect("postgres").await.unwrap();
    assert_eq!(show(&client, "max_wal_senders").await, "7");
    client.batch_execute("CREATE TABLE t (id int); INSERT INTO t SELECT generate_series(1, 1000)").await.unwrap();
    let pid = server.pid().unwrap();
    server.kill_hard().await.unwrap();
    assert!(!is_running(pid));
    assert!(client.simple_query("SELECT 1").await.is_err());
    assert!(server.connect("postgres").await.is_err());
    for _ in 0..2 {
        server.restart().await.unwrap();
        assert_eq!(server.port(), port);
        let client = server.connect("postgres").await.unwrap();
        assert_eq!(rows_as_json(&client, "(SELECT id FROM t)").await.len(), 1000);
    }
    let folder = server.socket_dir().to_owned();
    server.kill_hard().await.unwrap();
    drop(server);
    assert!(!folder.exists(), "a server that is down left its folder");
}

#[tokio::test]
async fn dropping_stops_and_removes() {
    let server = own_server().await;
    let (folder, pid) = (server.socket_dir().to_owned(), server.pid().unwrap());
    drop(server);
    wait_gone(&folder, pid).await;
}

#[tokio::test]
async fn what_does_not_start_tells_why_and_leaves_nothing() {
    let settings = vec![("wal_level".to_owned(), "nonsense".to_owned())];
    let error = Server::start(Options { settings, copy_cluster: true, ..Options::default() }).await.unwrap_err();
    let ServerError::Ended { log } = &error else { panic!("{error}") };
    assert!(log.contains("wal_level"), "{log}");
    let settings = vec![("bad name".to_owned(), String::new())];
    let error = Server::start(Options { settings, copy_cluster: true, ..Options::default() }).await.unwrap_err();
    assert!(matches!(error, ServerError::BadSetting(_)), "{error}");
    let prefix = format!("pgtide-demo-{}-", std::process::id());
    wait_until("no folder without a server stays behind", LIMIT, || async {
        std::fs::read_dir(std::env::temp_dir()).unwrap().flatten().all(|entry| {
            !entry.file_name().to_string_lossy().starts_with(&prefix)
                || entry.path().join("data/postmaster.pid").exists()
        })
    })
    .await;
}

/// Not a test but the victim of the two below: starts a server, tells where, and waits to be killed.
#[tokio::test]
#[ignore = "started by the tests of leftovers"]
async fn victim() {
    let server = own_server().await;
    eprintln!("\nVICTIM {} {}", server.pid().unwrap(), server.socket_dir().display());
    std::future::pending::<()>().await;
}

/// Runs [`victim`] in a process of its own: the process, the pid of its PostgreSQL, the folder.
async fn start_victim() -> (tokio::process::Child, u32, PathBuf) {
    let mut child = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["victim", "--exact", "--ignored", "--nocapture"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    loop {
        let line = lines.next_line().await.unwrap().expect("the victim ended");
        if let Some(rest) = line.strip_prefix("VICTIM ") {
            let (pid, folder) = rest.split_once(' ').unwrap();
            return (child, pid.parse().unwrap(), folder.into());
        }
    }
}

#[tokio::test]
async fn the_server_ends_with_its_killed_owner() {
    let (mut victim, pid, folder) = start_victim().await;
    assert!(is_running(pid) && folder.exists());
    victim.kill().await.unwrap();
    wait_gone(&folder, pid).await;
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_sweep_removes_what_was_left_and_nothing_else() {
    let alive = own_server().await;
    let (mut victim, pid, folder) = start_victim().await;
    // The shell between them and its reader must not do the work this time.
    let shell = parent_of(pid);
    let readers: Vec<u32> = std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
        .filter(|other| *other != pid && parent_of(*other) == shell)
        .collect();
    assert_eq!(readers.len(), 1, "the shell has the server and the reader");
    for watchdog in [shell, readers[0]] {
        let arguments = std::fs::read_to_string(format!("/proc/{watchdog}/cmdline")).unwrap();
        assert!(arguments.contains(folder.to_str().unwrap()), "{arguments}");
        let watchdog = nix::unistd::Pid::from_raw(watchdog.try_into().unwrap());
        nix::sys::signal::kill(watchdog, nix::sys::signal::Signal::SIGKILL).unwrap();
    }
    assert!(sweep().iter().all(|swept| *swept != folder), "its owner lives");
    victim.kill().await.unwrap();
    assert!(is_running(pid) && folder.exists(), "nothing but a sweep removes it");

    // A server that another test starts at this moment may sweep as well.
    wait_until("a sweep removes the folder", LIMIT, || async {
        let _ = sweep();
        !folder.exists()
    })
    .await;
    // By now, and not only when PostgreSQL misses its files. One that has ended but is not yet reaped has no arguments.
    let arguments = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    assert!(arguments.is_empty(), "the sweep did not stop the server");
    alive.connect("postgres").await.expect("the sweep stopped a server whose owner lives");
    alive.stop().await.unwrap();
}

/// 0 for a process that is gone.
#[cfg(target_os = "linux")]
fn parent_of(pid: u32) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().find_map(|line| line.strip_prefix("PPid:")).map_or(0, |rest| rest.trim().parse().unwrap())
}

#[tokio::test]
async fn databases_of_the_shared_server_are_apart() {
    let (one, other) = tokio::join!(fresh_database(), fresh_database());
    one.client.batch_execute("CREATE TABLE t (id int)").await.unwrap();
    assert!(other.client.batch_execute("SELECT FROM t").await.is_err());
    assert_ne!(one.name, other.name);
    assert_eq!(one.config.database, one.name);
}

#[tokio::test]
async fn the_seed_fills_and_analyzes() {
    let database = fresh_database().await;
    let loaded = seed(&database.client, 0, |_, _| {}).await.unwrap();
    assert_eq!((loaded.users, loaded.books), (1000, 500));
    assert_eq!(rows_as_json(&database.client, "users").await.len(), 1000);
    let estimate = "SELECT reltuples::float8 FROM pg_class WHERE oid = 'users'::regclass";
    assert_eq!(database.client.query_one(estimate, &[]).await.unwrap().get::<_, f64>(0), 1000.0);

    let database = fresh_database().await;
    let heard = std::cell::RefCell::new(Vec::new());
    let loaded = seed(&database.client, 50_001, |done, total| heard.borrow_mut().push((done, total))).await.unwrap();
    assert_eq!((loaded.users, loaded.books), (50_001, 500));
    assert_eq!(*heard.borrow(), [1000, 21_000, 41_000, 50_001].map(|done| (done, 50_001)));
    let users = rows_as_json(&database.client, "users").await;
    assert_eq!(users.len(), 50_001);
    assert!(users.contains_key("50001"), "the ids have no holes");
    let estimate: f64 = database.client.query_one(estimate, &[]).await.unwrap().get(0);
    assert!((49_000.0..51_000.0).contains(&estimate), "{estimate}");
}

#[tokio::test]
async fn the_workload_keeps_its_rate_and_counts_what_it_does() {
    let server = own_server().await;
    let client = server.connect("postgres").await.unwrap();
    seed(&client, 0, |_, _| {}).await.unwrap();
    // An independent count of what is done.
    client
        .batch_execute(
            "CREATE TABLE seen (op text, n bigint);
             CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS
             $$BEGIN INSERT INTO seen SELECT TG_OP, count(*) FROM changed; RETURN NULL; END$$;
             DO $$DECLARE t text; BEGIN FOREACH t IN ARRAY ARRAY['users', 'books'] LOOP
               EXECUTE format('CREATE TRIGGER i AFTER INSERT ON %I REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION see()', t);
               EXECUTE format('CREATE TRIGGER u AFTER UPDATE ON %I REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION see()', t);
               EXECUTE format('CREATE TRIGGER d AFTER DELETE ON %I REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION see()', t);
             END LOOP; END$$",
        )
        .await
        .unwrap();
    for (rate, seconds) in [(20, 3.0), (1000, 2.0)] {
        client.batch_execute("TRUNCATE seen").await.unwrap();
        let begin = Instant::now();
        let workload = Workload::start(server.socket_config("postgres"), WorkloadOptions { rate, seed: Some(7) });
        tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
        let stats = workload.stop().await;
        let wanted = f64::from(rate) * begin.elapsed().as_secs_f64();
        assert_eq!(stats.failures, 0);
        assert!((0.75..1.1).contains(&(stats.changes() as f64 / wanted)), "{} of {wanted}", stats.changes());
        assert!(stats.inserted > stats.updated / 2 && stats.updated > 0 && stats.deleted > 0, "{stats:?}");
        let seen = "SELECT coalesce(sum(n) FILTER (WHERE op = 'INSERT'), 0)::bigint,
                           coalesce(sum(n) FILTER (WHERE op = 'UPDATE'), 0)::bigint,
                           coalesce(sum(n) FILTER (WHERE op = 'DELETE'), 0)::bigint FROM seen";
        let seen = client.query_one(seen, &[]).await.unwrap();
        let counted = [stats.inserted, stats.updated, stats.deleted].map(|count| i64::try_from(count).unwrap());
        assert_eq!([0, 1, 2].map(|column: usize| seen.get::<_, i64>(column)), counted);
        let sizes = "SELECT (SELECT count(*) FROM users), (SELECT count(*) FROM books)";
        let sizes = client.query_one(sizes, &[]).await.unwrap();
        let (users, books): (i64, i64) = (sizes.get(0), sizes.get(1));
        assert!((850..1350).contains(&users) && (350..850).contains(&books), "{users} {books}");
    }
    server.stop().await.unwrap();
}

#[tokio::test]
async fn the_workload_survives_a_restart() {
    let mut server = own_server().await;
    seed(&server.connect("postgres").await.unwrap(), 0, |_, _| {}).await.unwrap();
    let workload = Workload::start(server.socket_config("postgres"), WorkloadOptions { rate: 200, seed: None });
    wait_until("it works", LIMIT, || async { workload.stats().changes() > 20 }).await;
    server.kill_hard().await.unwrap();
    wait_until("it notices", LIMIT, || async { workload.stats().failures > 0 }).await;
    let before = workload.stats().changes();
    server.restart().await.unwrap();
    wait_until("it works again", LIMIT, || async { workload.stats().changes() > before + 20 }).await;
    workload.set_rate(0);
    workload.stop().await;
    server.stop().await.unwrap();
}
