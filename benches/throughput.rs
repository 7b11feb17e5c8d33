//! How fast a million rows go from a real PostgreSQL into a document store that counts and answers, as whole processes
//! on one machine: `cargo bench --bench throughput`.
//!
//! Each figure stands beside a reference that is measured in the same run, alternating with it, as the machine's speed
//! drifts: the copy beside a plain `COPY ... TO STDOUT` whose rows are dropped, the stream beside `pg_recvlogical` that
//! drains the same backlog to /dev/null over TCP.
//!
//! `PGTIDE_BENCH_ROWS` sets another number of rows, `PGTIDE_BENCH_ROUNDS` another number of rounds.

#![allow(clippy::print_stdout, reason = "its figures are its output")]

use std::error::Error;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::pin::pin;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use pgtide::demo::{Options, Server, seed};

const PGTIDE: &str = env!("CARGO_BIN_EXE_pgtide");
type Outcome<T> = Result<T, Box<dyn Error>>;

#[tokio::main]
async fn main() -> Outcome<()> {
    let number =
        |name: &str, default: u64| std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default);
    let rows = number("PGTIDE_BENCH_ROWS", 1_000_000);
    let rounds = number("PGTIDE_BENCH_ROUNDS", 3);
    let transaction = number("PGTIDE_BENCH_TRANSACTION", 100).clamp(1, rows);
    let settings = [("max_wal_size", "8GB"), ("shared_buffers", "512MB"), ("max_slot_wal_keep_size", "-1")];
    let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec();
    let server = Server::start(Options { settings, ..Options::default() }).await?;
    server.create_database("bench").await?;
    let client = server.connect("bench").await?;
    println!("{}, {} processors, load {}", server.installation().version, processors(), load());
    seed(&client, rows, |_, _| {}).await?;
    client.batch_execute("VACUUM ANALYZE users").await?;
    client.batch_execute("CHECKPOINT").await?;
    let folder = tempfile::tempdir()?;
    let store = Store::start()?;

    println!("\nsnapshot of {rows} rows");
    for round in 1..=rounds {
        let plain = plain_copy(&client).await?;
        let config = configuration(&server, &store.url, folder.path(), &format!("copy_{round}"), "initial")?;
        let ours = Run::of(&config, folder.path())?;
        client.batch_execute(&format!("SELECT pg_drop_replication_slot('copy_{round}')")).await?;
        println!(
            "  {round}: pgtide {:>9.0} rows/s ({:.2} s, {:.2} CPU s, {:.0} MiB resident)   COPY alone {:>9.0} rows/s",
            ours.summary["rows_per_second"].as_f64().unwrap_or(0.0),
            ours.summary["copy_seconds"].as_f64().unwrap_or(0.0),
            ours.cpu,
            ours.resident,
            rows as f64 / plain.as_secs_f64(),
        );
    }

    println!("\nstream of {rows} inserts, {transaction} a transaction, from the slot's backlog");
    // The publication is there since the first copy.
    client.query("SELECT pg_create_logical_replication_slot('origin', 'pgoutput')", &[]).await?;
    let insert = format!(
        "DO $$ BEGIN FOR i IN 1..{} LOOP
             INSERT INTO users (name, email, age, bio)
             SELECT 'User ' || n, 'user' || n || '@example.com', 18 + n % 60, 'Reads, writes and waits for the tide ' || n % 97
             FROM generate_series(1, {transaction}) n;
             COMMIT;
         END LOOP; END $$",
        rows / transaction
    );
    client.batch_execute(&insert).await?;
    client.batch_execute("CHECKPOINT").await?;
    let end: String = client.query_one("SELECT pg_current_wal_lsn()::text", &[]).await?.get(0);
    for round in 1..=rounds {
        let (ours, theirs) = (format!("ours_{round}"), format!("theirs_{round}"));
        for slot in [&ours, &theirs] {
            client.query("SELECT pg_copy_logical_replication_slot('origin', $1)", &[&slot]).await?;
        }
        let theirs_took = recvlogical(&server, &theirs, &end)?;
        let config = configuration(&server, &store.url, folder.path(), &ours, "never")?;
        let run = Run::of(&config, folder.path())?;
        let took = run.summary["seconds"].as_f64().unwrap_or(f64::NAN);
        for slot in [&ours, &theirs] {
            client.query("SELECT pg_drop_replication_slot($1)", &[&slot]).await?;
        }
        print!(
            "  {round}: pgtide {:>8.0} rows/s ({took:.2} s, {:.2} CPU s, {:.0} MiB resident)",
            rows as f64 / took,
            run.cpu,
            run.resident
        );
        match theirs_took {
            Some(theirs) => println!(
                "   pg_recvlogical {:>8.0} rows/s ({:.2} s)   ratio {:.2}",
                rows as f64 / theirs.as_secs_f64(),
                theirs.as_secs_f64(),
                theirs.as_secs_f64() / took
            ),
            None => println!("   no pg_recvlogical beside this PostgreSQL"),
        }
    }
    println!("\nload at the end {}", load());
    drop(store);
    server.stop().await?;
    Ok(())
}

fn processors() -> usize {
    std::thread::available_parallelism().map_or(0, std::num::NonZero::get)
}

fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).collect::<Vec<_>>().join(" ")
}

async fn plain_copy(client: &tokio_postgres::Client) -> Outcome<Duration> {
    let began = Instant::now();
    let mut lines = pin!(client.copy_out("COPY users TO STDOUT").await?);
    while let Some(line) = lines.next().await {
        line?;
    }
    Ok(began.elapsed())
}

fn configuration(server: &Server, url: &str, folder: &Path, slot: &str, mode: &str) -> Outcome<std::path::PathBuf> {
    let cdc = server.config("bench");
    let file = folder.join(format!("{slot}.yaml"));
    let text = format!(
        "cdc:
  host: {}
  port: {}
  username: {}
  password: '{}'
  database: bench
  sslMode: disable
  metric: {{port: 0}}
  publication:
    name: bench
    createIfNotExists: true
    tables: [{{name: users}}]
  slot: {{name: {slot}, createIfNotExists: true}}
  snapshot: {{enabled: true, mode: {mode}}}
elasticsearch:
  urls: ['{url}']
  tableIndexMapping: {{public.users: users}}
",
        cdc.host, cdc.port, cdc.username, cdc.password.0
    );
    std::fs::write(&file, text)?;
    Ok(file)
}

/// A finished run of the binary.
struct Run {
    summary: serde_json::Value,
    cpu: f64,
    resident: f64,
}

impl Run {
    fn of(config: &Path, folder: &Path) -> Outcome<Self> {
        let child = Command::new(PGTIDE)
            .args(["run", "--headless", "--until-live", "--format", "json", "--log-folder"])
            .arg(folder)
            .arg("--config")
            .arg(config)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let pid = child.id();
        // The highest figures are gone with the process: they are read while it lives.
        let watch = std::thread::spawn(move || watch(pid));
        let output = child.wait_with_output()?;
        let (cpu, resident) = watch.join().map_err(|_| "the watching thread died")?;
        if !output.status.success() {
            return Err(format!("pgtide: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr)).into());
        }
        Ok(Self { summary: serde_json::from_slice(&output.stdout)?, cpu, resident })
    }
}

/// CPU seconds and the highest resident MiB of a process, as last seen before its end.
fn watch(pid: u32) -> (f64, f64) {
    let (mut cpu, mut resident) = (0.0, 0.0);
    loop {
        let (Ok(stat), Ok(status)) = (
            std::fs::read_to_string(format!("/proc/{pid}/stat")),
            std::fs::read_to_string(format!("/proc/{pid}/status")),
        ) else {
            return (cpu, resident);
        };
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or("").split_whitespace().collect();
        let ticks = |at: usize| fields.get(at).and_then(|text| text.parse::<f64>().ok()).unwrap_or(0.0);
        if fields.first() == Some(&"Z") {
            return (cpu, resident);
        }
        // Clock ticks of user and system time; a hundred a second on Linux.
        cpu = (ticks(11) + ticks(12)) / 100.0;
        let high = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        if let Some(kib) = high.and_then(|text| text.trim().trim_end_matches(" kB").parse::<f64>().ok()) {
            resident = kib / 1024.0;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Drains a slot to /dev/null over TCP; `None` where there is no such program.
fn recvlogical(server: &Server, slot: &str, end: &str) -> Outcome<Option<Duration>> {
    let program = server.installation().bin.join("pg_recvlogical");
    if !program.exists() {
        return Ok(None);
    }
    let cdc = server.config("bench");
    let began = Instant::now();
    let status = Command::new(program)
        .args(["-h", &cdc.host, "-p", &cdc.port.to_string(), "-U", &cdc.username, "-d", "bench", "-S", slot])
        .args(["--start", "-f", "/dev/null", "--no-loop", "-E", end])
        .args(["-o", "proto_version=1", "-o", "publication_names=bench"])
        .env("PGPASSWORD", &cdc.password.0)
        .stderr(Stdio::inherit())
        .status()?;
    if !status.success() {
        return Err(format!("pg_recvlogical: {status}").into());
    }
    Ok(Some(began.elapsed()))
}

/// The document store in its null mode, as a process of its own.
struct Store {
    child: Child,
    url: String,
}

impl Store {
    fn start() -> Outcome<Self> {
        let mut child =
            Command::new(PGTIDE).args(["store", "--null", "--listen", "127.0.0.1:0"]).stdout(Stdio::piped()).spawn()?;
        let mut url = String::new();
        BufReader::new(child.stdout.take().ok_or("no stdout")?).read_line(&mut url)?;
        Ok(Self { child, url: url.trim().to_owned() })
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // Only this process, by its id.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
