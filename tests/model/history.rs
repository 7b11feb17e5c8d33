//! One history, from an empty database to the comparison.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use pgtide::engine::Phase;
use pgtide::store::{self, Store};
use serde_json::Value;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::alter::Away;
use super::audit;
use super::causes::{Cause, Causes};
use super::host::Place;
use super::plan::{Plan, Step};
use super::processes::Processes;
use super::schema::Kind;
use super::session::{Log, Sessions};
use super::support::process::Pipeline;
use super::support::wait_until;
use super::traffic::Traffic;

/// The longest wait for anything that has to come.
pub const LIMIT: Duration = Duration::from_secs(60);
/// The longest wait for what may come: soon, or once much else is done.
const LONG: Duration = Duration::from_secs(5);
const MOMENT: Duration = Duration::from_millis(400);

/// What does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// In the end documents are rows.
    Equal,
    /// `pgtide verify` says of documents and rows what is so, and mends what differs.
    Verify,
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
    let output = history.processes.output();
    let transactions = history.sessions.transactions();
    history.end().await;
    Outcome { broken, output, transactions }
}

/// One that is under way.
pub struct History {
    pub place: Place,
    pub tables: Vec<Kind>,
    pub store: Store,
    pub processes: Processes,
    pub configuration: Value,
    pub sessions: Sessions,
    pub causes: Causes,
    pub log: Log,
    /// What became of tables, and is to end.
    pub away: Vec<(Kind, Away)>,
    /// Copies of these were given up.
    pub cancelled: BTreeSet<Kind>,
}

pub type Held = Result<(), Broken>;

pub fn broken(rule: Rule, how: impl Into<String>) -> Held {
    Err(Broken { rule, how: how.into() })
}

impl History {
    async fn new(plan: &Plan, environment: &[(&'static str, String)], log: Log) -> Self {
        let place = Place::take().await;
        place.client.batch_execute(&plan.schema.sql()).await.unwrap();
        let store = Store::bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), store::Options::default()).await.unwrap();
        let configuration = plan.schema.configuration(&place.config(), &place.name, &store.url());
        let causes = Causes::default();
        let process = || {
            let mut process = Pipeline::of(configuration.clone());
            process.environment(environment);
            process
        };
        let processes = Processes::new(process, &causes, &log);
        let mut clients = Vec::new();
        for _ in 0..plan.sessions {
            let client = place.connect().await;
            client.batch_execute("SET lock_timeout = '100ms'; SET statement_timeout = '10s'").await.unwrap();
            clients.push(client);
        }
        let traffic = |session| Traffic::new(plan.seed ^ (session + 1) << 40, &plan.schema, plan.weights);
        let sessions = Sessions::start(clients, traffic, &causes, &log);
        Self {
            place,
            tables: plan.schema.tables.clone(),
            store,
            processes,
            configuration,
            sessions,
            causes,
            log,
            away: Vec::new(),
            cancelled: BTreeSet::new(),
        }
    }

    pub fn client(&self) -> &Client {
        &self.place.client
    }

    async fn run(&mut self, plan: &Plan) -> Held {
        for step in &plan.steps {
            self.log.add(format!("{step:?}"));
            self.step(step).await?;
        }
        self.settle().await?;
        self.equal().await?;
        audit::audit(self, &plan.damage).await
    }

    async fn step(&mut self, step: &Step) -> Held {
        match step {
            Step::Go(count) => self.sessions.go(*count),
            Step::Until(count) => self.sessions.until(*count).await,
            Step::Join => self.sessions.rest().await,
            Step::Start => self.processes.start()?,
            Step::Second => self.processes.start_second()?,
            Step::Kill if self.processes.second_runs()? => {
                // What the first has sent arrives before the second sends the same.
                self.release();
                self.processes.kill()?;
                self.store.until_applied().await;
                self.processes.second_is_first();
            }
            Step::Kill => {
                self.processes.kill()?;
                self.down().await?;
            }
            Step::Terminate => {
                self.processes.only_the_leader().await?;
                self.release();
                self.processes.terminate().await?;
                self.down().await?;
            }
            Step::Pause => self.pause().await?,
            Step::Resume => self.resume().await?,
            Step::PauseTable(table) => self.ask(*table, "pause").await,
            Step::ResumeTable(table) => self.ask(*table, "resume").await,
            Step::Resnapshot(table) => self.ask(*table, "resnapshot").await,
            Step::Cancel(table) => {
                self.cancelled.insert(*table);
                self.ask(*table, "cancel").await;
            }
            Step::Cut(of) => {
                let sql = "SELECT application_name, pg_terminate_backend(pid) FROM pg_stat_activity
                           WHERE datname = current_database() AND application_name LIKE 'pgtide%' || $1 || '%'";
                self.causes.once(Cause::Cut);
                let cut = self.client().query(sql, &[of]).await.unwrap();
                let names: Vec<&str> = cut.iter().map(|row| row.get(0)).collect();
                self.log.add(format!("cut: {names:?}"));
            }
            Step::Fault(fault) => self.store.inject(fault.clone()),
            Step::Outage(fault) => {
                self.causes.begin(Cause::Store);
                self.store.inject(fault.clone());
            }
            Step::Release => self.release(),
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
                while Instant::now() < deadline && self.processes.running()? && !self.holds().await {
                    let status = self.processes.first().status().await;
                    if status.is_some_and(|status| matches!(status.phase, Phase::Streaming | Phase::Paused)) {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            }
            Step::Sql(sql) => {
                self.sessions.rest().await;
                let outcome = self.client().batch_execute(sql).await;
                self.log.add(format!("{sql}: {}", said(outcome)));
            }
            Step::Away(table, away) => self.go_away(*table, *away).await,
            Step::Back => drop(self.back("1s").await),
            Step::Crossing(seed) => self.crossing(*seed).await,
        }
        Ok(())
    }

    /// The store works again.
    pub fn release(&self) {
        self.store.clear_faults();
        self.causes.over(Cause::Store);
    }

    /// Something becomes of a table, unless a lock or something else is in the way.
    async fn go_away(&mut self, table: Kind, away: Away) {
        let (sql, _) = away.sql(table, &self.place.name);
        self.causes.begin(Cause::Table);
        let outcome = self.client().batch_execute(&format!("SET lock_timeout = '300ms'; {sql}")).await;
        if outcome.is_ok() {
            self.away.push((table, away));
            self.sessions.alter(table);
        } else {
            self.causes.end(Cause::Table);
        }
        self.log.add(format!("{sql}: {}", said(outcome)));
    }

    /// Everything that has become of tables ends. A lock may be in the way for so long.
    pub async fn back(&mut self, limit: &str) -> Held {
        for (table, away) in std::mem::take(&mut self.away) {
            let (_, sql) = away.sql(table, &self.place.name);
            let outcome = self.client().batch_execute(&format!("SET lock_timeout = '{limit}'; {sql}")).await;
            let done = match outcome.as_ref().err().and_then(tokio_postgres::Error::code) {
                None => outcome.is_ok(),
                // A process that was started meanwhile has published it itself.
                Some(code) if *code == SqlState::DUPLICATE_OBJECT => true,
                // The partition was dropped.
                Some(code) => *code == SqlState::UNDEFINED_TABLE && table == Kind::Parts,
            };
            let said = said(outcome);
            self.log.add(format!("{sql}: {said}"));
            if done {
                self.causes.end(Cause::Table);
            } else {
                self.away.push((table, away));
            }
        }
        match self.away.as_slice() {
            [] => Ok(()),
            left => broken(Rule::Test, format!("{left:?} does not end")),
        }
    }

    /// Two transactions change a row of `singles` in another order than they commit: the one that commits last wrote its
    /// row first, and then waited for the other one to let go of a value.
    async fn crossing(&mut self, seed: u64) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let (row, held) = (rng.i64(1..4), rng.i64(4..7));
        let u = rng.i64(1..9);
        let (one, other) = (self.place.connect().await, self.place.connect().await);
        let prepare = format!(
            "SET lock_timeout = '1s'; BEGIN; DELETE FROM singles WHERE id IN ({row}, {held}) OR u = {u}; \
             INSERT INTO singles (id, u, n) VALUES ({row}, NULL, 0), ({held}, {u}, 0); COMMIT; \
             BEGIN; DELETE FROM singles WHERE id = {held}"
        );
        other.batch_execute("SET lock_timeout = '1s'").await.unwrap();
        let pid: i32 = other.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
        if let Err(error) = one.batch_execute(&prepare).await {
            return self.log.add(format!("no crossing: {error}"));
        }
        let insert = format!("INSERT INTO singles (id, u, n, v) VALUES ({row}, {u}, {seed} % 1000, 'crossed')");
        let insert = tokio::spawn(async move { said(other.batch_execute(&insert).await) });
        let waits = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = $1";
        let deadline = Instant::now() + MOMENT;
        while Instant::now() < deadline && !insert.is_finished() {
            let waits = self.client().query_opt(waits, &[&pid]).await.unwrap();
            if waits.is_some_and(|row| row.get::<_, Option<bool>>(0) == Some(true)) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let delete = format!("DELETE FROM singles WHERE id = {row}; COMMIT");
        let deleted = said(one.batch_execute(&delete).await);
        let inserted = insert.await.unwrap();
        self.log.add(format!("crossing: row {row} by u = {u}: {delete}: {deleted}; INSERT: {inserted}"));
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
            let told = self.client().query_opt(&sql, &[&self.place.name, &position]).await.unwrap();
            if told.is_some_and(|row| row.get(0)) {
                self.log.add(format!("{column} has passed {position}"));
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub async fn position(&self) -> String {
        self.client().query_one("SELECT pg_current_wal_lsn()::text", &[]).await.unwrap().get(0)
    }

    /// The store holds a request.
    async fn holds(&self) -> bool {
        tokio::time::timeout(Duration::ZERO, self.store.until_held(1)).await.is_ok()
    }

    /// Waits for a request that is held: longer while a copy is to come.
    async fn held(&mut self) -> Result<bool, Broken> {
        let began = Instant::now();
        while self.processes.running()? {
            if self.holds().await {
                return Ok(true);
            }
            let status = self.processes.first().status().await;
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

    pub async fn ask(&self, table: Kind, what: &str) {
        let said = self.processes.first().ask(&format!("/tables/{}/{what}", table.full_name())).await;
        self.log.add(format!(
            "{what} {}: {}",
            table.full_name(),
            said.map_or("nobody".into(), |said| said.1.trim().to_owned())
        ));
    }

    async fn pause(&mut self) -> Held {
        if self.processes.first().ask("/pause").await.is_ok_and(|(code, _)| code == 202) {
            let deadline = Instant::now() + MOMENT;
            while Instant::now() < deadline && self.processes.running()? {
                if self.processes.first().status().await.is_some_and(|status| status.phase == Phase::Paused) {
                    self.processes.paused = Some(self.store.stats().items);
                    self.log.add("it says that it is paused");
                    break;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        Ok(())
    }

    pub async fn resume(&mut self) -> Held {
        if let Some(before) = self.processes.paused.take()
            && self.processes.first().status().await.is_some_and(|status| status.phase == Phase::Paused)
            && self.store.stats().items != before
        {
            return broken(Rule::Paused, "documents were sent while it said that it was paused");
        }
        let said = self.processes.first().ask("/resume").await;
        self.log.add(format!("resume: {said:?}"));
        Ok(())
    }

    /// Leaves nothing on the server but an empty database, for the next history.
    async fn end(mut self) {
        self.processes.end();
        drop(self.sessions);
        let client = &self.place.client;
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
        let publication = format!("DROP PUBLICATION IF EXISTS {}", self.place.name);
        client.batch_execute(&publication).await.unwrap();
        client.batch_execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public").await.unwrap();
        self.place.give_back().await;
    }
}

/// What became of a statement.
fn said(outcome: Result<(), tokio_postgres::Error>) -> String {
    match outcome {
        Ok(()) => "done".into(),
        Err(error) => error.as_db_error().map_or_else(|| error.to_string(), |error| error.message().into()),
    }
}
