//! One history, from an empty database to the comparison.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use pgtide::engine::{Phase, Status, TableState};
use pgtide::store::{self, Store};
use tokio_postgres::Client;

use super::oracle::{Pending, differences};
use super::schema::Kind;
use super::session::{Log, Sessions};
use super::support::process::{Pipeline, signal};
use super::support::{Database, fresh_database, shared_server, wait_until};
use super::traffic::Traffic;
use super::weather::{Plan, Step};

/// The longest wait for anything that has to come.
const LIMIT: Duration = Duration::from_secs(60);
/// The longest wait for what may come: soon, or once much else is done.
const LONG: Duration = Duration::from_secs(5);
const MOMENT: Duration = Duration::from_millis(400);

/// What does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// In the end documents are rows.
    Equal,
    /// What is confirmed is in the store.
    Acknowledged,
    /// While it says `PAUSED` nothing is sent.
    Paused,
    /// It goes on, and comes to an end.
    Quiet,
    /// No end but those that were asked for, or that have a cause outside; no panic.
    Ends,
    /// The test itself is wrong.
    Test,
}

/// Which rule, and how it does not hold.
#[derive(Debug)]
pub struct Broken {
    pub rule: Rule,
    pub how: String,
}

/// A history that has ended.
pub struct Outcome {
    pub broken: Option<Broken>,
    /// What the processes printed last.
    pub output: String,
    pub transactions: u32,
}

/// Runs the history of a plan. `environment`: of the processes.
pub async fn run(plan: &Plan, environment: &[(&'static str, String)], log: &Log) -> Outcome {
    let mut history = History::new(plan, environment, log.clone()).await;
    let broken = history.run(plan).await.err();
    if let Some(broken) = &broken {
        log.add(format!("{:?}: {}", broken.rule, broken.how));
    }
    let output = format!("{}\n--- and the other\n{}", history.pipeline.output(), history.second.output());
    let transactions = history.sessions.transactions();
    history.end().await;
    Outcome { broken, output, transactions }
}

struct History {
    database: Database,
    tables: Vec<Kind>,
    store: Store,
    pipeline: Pipeline,
    /// Another process with the same configuration.
    second: Pipeline,
    sessions: Sessions,
    log: Log,
    slot: String,
    /// Items of the store when it said that it was paused.
    paused: Option<u64>,
    /// Ends that nobody asked for.
    ends: u32,
}

type Held = Result<(), Broken>;

fn broken(rule: Rule, how: impl Into<String>) -> Held {
    Err(Broken { rule, how: how.into() })
}

impl History {
    async fn new(plan: &Plan, environment: &[(&'static str, String)], log: Log) -> Self {
        let database = empty_database().await;
        database.client.batch_execute(&plan.schema.sql()).await.unwrap();
        database.client.batch_execute("SET timezone = 'UTC'").await.unwrap();
        let store = Store::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), store::Options::default()).await.unwrap();
        let slot = format!("model_{}", database.name);
        let process = || {
            let mut process = Pipeline::of(plan.schema.configuration(&database.config, &slot, &store.url()));
            process.environment(environment);
            process
        };
        let (pipeline, second) = (process(), process());
        let mut clients = Vec::new();
        for _ in 0..plan.sessions {
            let client = shared_server().await.connect(&database.name).await.unwrap();
            client.batch_execute("SET lock_timeout = '100ms'; SET statement_timeout = '10s'").await.unwrap();
            clients.push(client);
        }
        let traffic = |session| Traffic::new(plan.seed ^ (session + 1) << 40, &plan.schema, plan.profile.weights);
        let sessions = Sessions::start(clients, traffic, &log);
        Self {
            tables: plan.schema.tables.clone(),
            database,
            store,
            pipeline,
            second,
            sessions,
            log,
            slot,
            paused: None,
            ends: 0,
        }
    }

    fn client(&self) -> &Client {
        &self.database.client
    }

    async fn run(&mut self, plan: &Plan) -> Held {
        for step in &plan.steps {
            self.log.add(format!("{step:?}"));
            self.step(step).await?;
        }
        self.settle().await?;
        for table in &self.tables {
            let found = differences(self.client(), &self.store, *table, &Pending::default()).await;
            if !found.is_empty() {
                return broken(Rule::Equal, found.join("\n    "));
            }
        }
        Ok(())
    }

    async fn step(&mut self, step: &Step) -> Held {
        match step {
            Step::Go(count) => self.sessions.go(*count),
            Step::Until(count) => self.sessions.until(*count).await,
            Step::Join => self.sessions.rest().await,
            Step::Start => self.start()?,
            Step::Second => {
                if !self.second_runs()? {
                    self.second.start();
                }
            }
            Step::Kill if self.second_runs()? => {
                // What the first has sent arrives before the second sends the same.
                self.store.clear_faults();
                if self.running()? {
                    self.pipeline.kill();
                }
                self.store.until_applied().await;
                self.second_is_first();
            }
            Step::Kill => {
                if self.running()? {
                    self.pipeline.kill();
                }
                self.down().await?;
            }
            Step::Terminate => {
                self.only_the_leader().await?;
                self.store.clear_faults();
                if self.running()? {
                    signal(self.pipeline.pid(), Signal::SIGTERM);
                    self.until_ended(0).await?;
                }
                self.down().await?;
            }
            Step::Pause => self.pause().await?,
            Step::Resume => self.resume().await?,
            Step::PauseTable(table) => self.ask(*table, "pause").await,
            Step::ResumeTable(table) => self.ask(*table, "resume").await,
            Step::Resnapshot(table) => self.ask(*table, "resnapshot").await,
            Step::Cancel(table) => self.ask(*table, "cancel").await,
            Step::Cut(of) => {
                let sql = "SELECT application_name, pg_terminate_backend(pid) FROM pg_stat_activity
                           WHERE datname = current_database() AND application_name LIKE 'pgtide%' || $1 || '%'";
                let cut = self.client().query(sql, &[of]).await.unwrap();
                let names: Vec<&str> = cut.iter().map(|row| row.get(0)).collect();
                self.log.add(format!("cut: {names:?}"));
            }
            Step::Fault(fault) => self.store.inject(fault.clone()),
            Step::Release => self.store.clear_faults(),
            Step::Held => {
                let held = self.held().await?;
                self.log.add(if held { "a request is held" } else { "no request is held" });
            }
            Step::Delivered => self.told("flush_lsn").await,
            Step::Received => self.told("write_lsn").await,
            Step::Forget => {
                // A request of a process that is gone has nobody who would know of a delete behind it.
                if self.store.abandoned() == 0 {
                    self.store.forget_tombstones();
                    self.log.add("forgotten");
                }
            }
            Step::Streaming => {
                let deadline = Instant::now() + LONG;
                while Instant::now() < deadline && self.running()? && !self.holds().await {
                    let status = self.pipeline.status().await;
                    if status.is_some_and(|status| matches!(status.phase, Phase::Streaming | Phase::Paused)) {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
            Step::Sql(sql) => {
                self.sessions.rest().await;
                let outcome = self.client().batch_execute(sql).await;
                self.log.add(format!("{sql}: {:?}", outcome.err().map(|error| error.to_string())));
            }
        }
        Ok(())
    }

    /// Waits until PostgreSQL was told that all is received (`write_lsn`) or answered for (`flush_lsn`).
    async fn told(&self, column: &str) {
        let sql = format!(
            "SELECT coalesce(r.{column} >= $2::text::pg_lsn, FALSE) FROM pg_replication_slots s
             JOIN pg_stat_replication r ON r.pid = s.active_pid WHERE slot_name = $1"
        );
        let position = self.position().await;
        let deadline = Instant::now() + MOMENT;
        while Instant::now() < deadline {
            let told = self.client().query_opt(&sql, &[&self.slot, &position]).await.unwrap();
            if told.is_some_and(|row| row.get(0)) {
                self.log.add(format!("{column} has passed {position}"));
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn position(&self) -> String {
        self.client().query_one("SELECT pg_current_wal_lsn()::text", &[]).await.unwrap().get(0)
    }

    /// The store holds a request.
    async fn holds(&self) -> bool {
        tokio::time::timeout(Duration::ZERO, self.store.until_held(1)).await.is_ok()
    }

    /// Waits for a request that is held: longer while a copy is to come.
    async fn held(&mut self) -> Result<bool, Broken> {
        let began = Instant::now();
        while self.running()? {
            if self.holds().await {
                return Ok(true);
            }
            let status = self.pipeline.status().await;
            let copies = status.is_none_or(|status| {
                matches!(status.phase, Phase::Connecting | Phase::Snapshot)
                    || status.tables.iter().any(|table| table.resnapshot)
            });
            if began.elapsed() > if copies { LONG } else { MOMENT } {
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(false)
    }

    /// Whether a second process runs. One that has ended must have had a reason.
    fn second_runs(&mut self) -> Result<bool, Broken> {
        std::mem::swap(&mut self.pipeline, &mut self.second);
        let paused = self.paused;
        let runs = self.running();
        self.paused = paused;
        std::mem::swap(&mut self.pipeline, &mut self.second);
        runs
    }

    fn second_is_first(&mut self) {
        std::mem::swap(&mut self.pipeline, &mut self.second);
        self.paused = None;
        self.log.add("the second process goes on");
    }

    /// Of two processes the one that stands by is killed.
    async fn only_the_leader(&mut self) -> Held {
        if !self.second_runs()? {
            return Ok(());
        }
        let leads = |status: Option<Status>| status.is_some_and(|status| status.phase != Phase::Standby);
        if !self.running()? || !leads(self.pipeline.status().await) && leads(self.second.status().await) {
            self.second_is_first();
        }
        if self.second_runs()? {
            self.second.kill();
        }
        Ok(())
    }

    fn start(&mut self) -> Held {
        if !self.running()? {
            self.pipeline.start();
        }
        Ok(())
    }

    /// Whether a process runs. One that has ended must have had a reason.
    fn running(&mut self) -> Result<bool, Broken> {
        if let Some(status) = self.pipeline.has_ended() {
            self.paused = None;
            self.ends += 1;
            self.log.add(format!("the process has ended by itself: {status}"));
            // 3 and 5: a server was not there at the start; 4: a lock was not to be had.
            if !matches!(status.code(), Some(3..=5)) {
                broken(Rule::Ends, format!("the process has ended by itself: {status}"))?;
            }
        }
        Ok(self.pipeline.is_started())
    }

    async fn until_ended(&mut self, code: i32) -> Held {
        let deadline = Instant::now() + LIMIT;
        let status: ExitStatus = loop {
            if let Some(status) = self.pipeline.has_ended() {
                break status;
            }
            if Instant::now() > deadline {
                return broken(Rule::Quiet, "the process does not stop");
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        };
        self.log.add(format!("ended: {status}"));
        // A signal that comes before it is waited for ends it, too.
        if status.code() == Some(code) || status.signal() == Some(Signal::SIGTERM as i32) {
            return Ok(());
        }
        // Its end may have been under way for another reason.
        if matches!(status.code(), Some(3..=5)) {
            Ok(())
        } else {
            broken(Rule::Ends, format!("told to stop: {status}"))
        }
    }

    /// No process runs any more: what it sent arrives before the next one starts, and what was confirmed is looked at
    /// before that.
    async fn down(&mut self) -> Held {
        self.paused = None;
        self.sessions.rest().await;
        self.acknowledged().await?;
        self.store.clear_faults();
        self.store.until_applied().await;
        Ok(())
    }

    /// Every row that the slot has no change to send for is in the store as it is: what was confirmed was answered for.
    async fn acknowledged(&mut self) -> Held {
        let free = "SELECT active FROM pg_replication_slots WHERE slot_name = $1";
        let deadline = Instant::now() + LIMIT;
        loop {
            match self.client().query_opt(free, &[&self.slot]).await.unwrap().map(|row| row.get::<_, bool>(0)) {
                None => return Ok(()),
                Some(false) => break,
                Some(true) if Instant::now() > deadline => return broken(Rule::Quiet, "the slot stays in use"),
                Some(true) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
        let Some(wanted) = self.wanted(true).await else { return Ok(()) };
        let pending = Pending::of(self.client(), &self.slot, &self.tables).await;
        let altered = self.sessions.altered();
        let mut found = Vec::new();
        for table in self.tables.iter().filter(|table| !wanted.contains(table.name()) && !altered.contains(table)) {
            found.extend(differences(self.client(), &self.store, *table, &pending).await);
        }
        if !found.is_empty() {
            return broken(
                Rule::Acknowledged,
                format!("confirmed, but not in the store:\n    {}", found.join("\n    ")),
            );
        }
        self.log.add("what is confirmed is in the store");
        Ok(())
    }

    /// Tables that are to be copied again; none while the first copy is not done.
    async fn wanted(&self, after_first_copy: bool) -> Option<BTreeSet<String>> {
        let there = "SELECT to_regclass('public.cdc_snapshot_job') IS NOT NULL
                        AND to_regclass('public.cdc_snapshot_chunks') IS NOT NULL";
        if !self.client().query_one(there, &[]).await.unwrap().get::<_, bool>(0) {
            return None;
        }
        let done = "SELECT completed FROM public.cdc_snapshot_job WHERE slot_name = $1";
        let done = self.client().query_opt(done, &[&self.slot]).await.unwrap();
        if after_first_copy && !done.is_some_and(|row| row.get::<_, bool>(0)) {
            return None;
        }
        let wanted = "SELECT table_name FROM public.cdc_snapshot_chunks WHERE slot_name = $1 AND chunk_index < 0";
        let wanted = self.client().query(wanted, &[&self.slot]).await.unwrap();
        Some(wanted.iter().map(|row| row.get(0)).collect())
    }

    async fn ask(&self, table: Kind, what: &str) {
        let said = self.pipeline.ask(&format!("/tables/{}/{what}", table.full_name())).await;
        self.log.add(format!(
            "{what} {}: {}",
            table.full_name(),
            said.map_or("nobody".into(), |said| said.1.trim().to_owned())
        ));
    }

    async fn pause(&mut self) -> Held {
        if self.pipeline.ask("/pause").await.is_ok_and(|(code, _)| code == 202) {
            let deadline = Instant::now() + MOMENT;
            while Instant::now() < deadline && self.running()? {
                if self.pipeline.status().await.is_some_and(|status| status.phase == Phase::Paused) {
                    self.paused = Some(self.store.stats().items);
                    self.log.add("it says that it is paused");
                    break;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        Ok(())
    }

    async fn resume(&mut self) -> Held {
        if let Some(before) = self.paused.take()
            && self.pipeline.status().await.is_some_and(|status| status.phase == Phase::Paused)
            && self.store.stats().items != before
        {
            return broken(Rule::Paused, "documents were sent while it said that it was paused");
        }
        let said = self.pipeline.ask("/resume").await;
        self.log.add(format!("resume: {said:?}"));
        Ok(())
    }

    /// Ends everything that stands in the way, and waits until all is delivered.
    async fn settle(&mut self) -> Held {
        self.sessions.rest().await;
        self.store.clear_faults();
        self.only_the_leader().await?;
        self.resume().await?;
        for table in self.tables.clone() {
            self.ask(table, "resume").await;
        }
        // Documents of rows that no change has touched since are as they were before.
        for table in self.sessions.altered() {
            let sql = format!("UPDATE {} SET n = n", table.name());
            self.client().batch_execute(&sql).await.unwrap();
            self.log.add(sql);
        }
        let position = self.position().await;
        self.log.add(format!("to be delivered: {position}"));
        let (began, ends, mut last) = (Instant::now(), self.ends, None);
        while began.elapsed() < LIMIT {
            if !self.running()? {
                if self.ends > ends + 1 {
                    return broken(Rule::Ends, "the process ends by itself again and again");
                }
                self.log.add("start");
                self.pipeline.start();
            }
            if let Some(status) = self.pipeline.status().await {
                if status.phase == Phase::Failed {
                    return broken(Rule::Ends, format!("failed: {:?}", status.problem));
                }
                if quiet(&status) {
                    let confirmed =
                        "SELECT confirmed_flush_lsn >= $2::text::pg_lsn FROM pg_replication_slots WHERE slot_name = $1";
                    let confirmed = self.client().query_opt(confirmed, &[&self.slot, &position]).await.unwrap();
                    let wanted = self.wanted(false).await.unwrap_or_default();
                    if confirmed.is_some_and(|row| row.get::<_, bool>(0)) && wanted.is_empty() {
                        self.log.add("quiet");
                        if !status.rejections.is_empty() {
                            return broken(Rule::Equal, format!("refused for good: {:?}", status.rejections));
                        }
                        return Ok(());
                    }
                    // A copy that was given up after some attempts is for the operator to ask for.
                    for table in status.tables.iter().filter(|table| table.problem.is_some()) {
                        let kind = self.tables.iter().find(|kind| kind.full_name() == table.table.0.to_string());
                        self.ask(*kind.unwrap(), "resnapshot").await;
                    }
                }
                last = Some(status);
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let said = last.map(|status| {
            let tables: Vec<String> = status
                .tables
                .iter()
                .map(|table| format!("{} {:?} {}", table.table.0, table.state, table.resnapshot))
                .collect();
            format!("{:?} {:?} {tables:?} {:?}", status.phase, status.problem, status.replication.confirmed_lsn)
        });
        broken(Rule::Quiet, format!("not at rest after {LIMIT:?}: {said:?}; wanted: {:?}", self.wanted(false).await))
    }

    /// Leaves nothing on the server but an empty database, for the next history.
    async fn end(mut self) {
        if self.pipeline.has_ended().is_none() && self.pipeline.is_started() {
            self.pipeline.kill();
        }
        if self.second.has_ended().is_none() && self.second.is_started() {
            self.second.kill();
        }
        drop(self.sessions);
        let client = &self.database.client;
        let others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity
                      WHERE datname = current_database() AND pid <> pg_backend_pid() AND backend_type <> 'autovacuum worker'";
        client.query(others, &[]).await.unwrap();
        let drop_slots = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots
                          WHERE database = current_database() AND NOT active";
        wait_until("the slots are gone", LIMIT, || async {
            let _ = client.query(drop_slots, &[]).await;
            let left = "SELECT count(*) FROM pg_replication_slots WHERE database = current_database()";
            client.query_one(left, &[]).await.unwrap().get::<_, i64>(0) == 0
        })
        .await;
        let publication = format!("DROP PUBLICATION IF EXISTS {}", self.slot);
        client.batch_execute(&publication).await.unwrap();
        client.batch_execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public").await.unwrap();
        EMPTY.lock().unwrap().push(self.database);
    }
}

/// Databases of histories that have ended.
static EMPTY: Mutex<Vec<Database>> = Mutex::new(Vec::new());

async fn empty_database() -> Database {
    let empty = EMPTY.lock().unwrap().pop();
    match empty {
        Some(database) => database,
        None => fresh_database().await,
    }
}

fn quiet(status: &Status) -> bool {
    status.phase == Phase::Streaming
        && status.tables.iter().all(|table| table.state == TableState::Live && !table.resnapshot)
}
