//! The tables in PostgreSQL that remember how far the copy has come: those of the reference, and a few columns more.
//!
//! They live in the schema `public`, where the reference looks for its own. A chunk's row says `pending`,
//! `in_progress` or `completed`; it is completed only after the sink has answered for its last document. Losing the
//! record of a completed chunk costs a second copy of it and nothing else, so chunk rows are written without waiting
//! for the disk.
//!
//! A table that is to be copied again has a row of its own, of chunk -1 and `wanted`, from the wish until documents
//! without a row are removed: its chunks alone would be completed before that.

mod chunks;
mod job;
mod recorded;
mod schema;
mod tables;

use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{Mutex, MutexGuard, OnceCell};
use tokio_postgres::{Client, Statement};

pub use self::chunks::ChunkRow;
pub use self::job::Job;
pub use self::recorded::Recorded;
pub use self::tables::Remembered;
use crate::problem::{Problem, ProblemKind};

/// The ledger of one slot (or, in mode `snapshot_only`, of one job name).
#[derive(Debug)]
pub struct Ledger {
    client: Client,
    job: String,
    instance: String,
    /// Who has it may begin a transaction: there is one connection.
    transacting: Mutex<()>,
    claim: OnceCell<Statement>,
    complete: OnceCell<Statement>,
}

impl Ledger {
    /// The ledger of `job`, its tables created where they are missing. `instance` names this process in claims.
    ///
    /// # Errors
    /// The tables cannot be created: the role needs CREATE on the schema `public`.
    pub async fn open(client: Client, job: &str, instance: &str) -> Result<Self, Problem> {
        client.batch_execute("SET synchronous_commit = off").await?;
        schema::ensure(&client).await?;
        Ok(Self {
            client,
            job: job.to_owned(),
            instance: instance.to_owned(),
            transacting: Mutex::new(()),
            claim: OnceCell::new(),
            complete: OnceCell::new(),
        })
    }

    /// Takes the lock that makes this process the only one that works for the job, for as long as the ledger's
    /// connection lives. False: another process has it.
    ///
    /// # Errors
    /// The query fails.
    pub async fn try_lock(&self) -> Result<bool, Problem> {
        try_lock(&self.client, &self.job).await
    }

    /// Ends when the ledger's connection has ended, and the lock with it. Nobody tells, so it is looked at.
    pub async fn lost(&self) -> Problem {
        while !self.client.is_closed() {
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        Problem::new(
            ProblemKind::Postgres,
            "the connection of the ledger has ended, and with it the lock that keeps a second pgtide out",
            "It is made again by itself. If it keeps ending, the server's log says why.",
        )
        .transient()
    }

    /// Who has the lock, in words, as [`try_lock`](Self::try_lock) did not get it. A process that copies and whose last
    /// sign of life is older than `claim_timeout` is said to hang.
    ///
    /// # Errors
    /// The query fails.
    pub async fn holder(&self, claim_timeout: Duration) -> Result<String, Problem> {
        // A lock of 64 bits shows as two halves, objsubid 1: "pg_locks" in PostgreSQL's manual.
        let held = "SELECT l.pid,
                (SELECT claimed_by FROM public.cdc_snapshot_chunks c
                 WHERE slot_name = $1 AND status = 'in_progress' ORDER BY heartbeat_at DESC NULLS LAST LIMIT 1),
                (SELECT extract(epoch FROM now() AT TIME ZONE 'UTC' - max(heartbeat_at))::float8
                 FROM public.cdc_snapshot_chunks WHERE slot_name = $1 AND status = 'in_progress')
             FROM pg_catalog.pg_locks l, pg_catalog.hashtextextended('pgtide ' || $1, 0) AS key
             WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
               AND (l.classid::int8 << 32 | l.objid::int8) = key
               AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())";
        let Some(row) = self.client.query_opt(held, &[&self.job]).await? else { return Ok(String::new()) };
        let (pid, instance, silent): (i32, Option<String>, Option<f64>) = (row.get(0), row.get(1), row.get(2));
        let instance = instance.map(|instance| format!("instance {instance}, ")).unwrap_or_default();
        let silent = silent.filter(|silent| *silent > claim_timeout.as_secs_f64());
        let silent = silent.map(|silent| format!(", which gave no sign of life for {silent:.0} s: it may hang"));
        Ok(format!(" ({instance}backend {pid}{})", silent.unwrap_or_default()))
    }

    /// Begins a transaction that is on disk once it has committed. Statements that others make meanwhile are part of
    /// it. Dropped without a commit it is rolled back.
    async fn transaction(&self) -> Result<Open<'_>, Problem> {
        let alone = self.transacting.lock().await;
        let open = Open(Some(&self.client), alone);
        self.client.batch_execute("BEGIN; SET LOCAL synchronous_commit = on").await?;
        Ok(open)
    }
}

/// Takes the lock of a job for as long as the connection lives. False: another process has it.
pub(crate) async fn try_lock(client: &Client, job: &str) -> Result<bool, Problem> {
    let sql = "SELECT pg_catalog.pg_try_advisory_lock(pg_catalog.hashtextextended('pgtide ' || $1, 0))";
    Ok(client.query_one(sql, &[&job]).await?.get(0))
}

/// A transaction of the ledger's connection.
struct Open<'a>(Option<&'a Client>, #[allow(dead_code, reason = "held")] MutexGuard<'a, ()>);

impl Open<'_> {
    async fn commit(mut self) -> Result<(), Problem> {
        if let Some(client) = self.0.take() {
            client.batch_execute("COMMIT").await?;
        }
        Ok(())
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        if let Some(client) = self.0.take() {
            // Queued on the connection before anything that comes later; the answer is of no interest.
            drop(client.batch_execute("ROLLBACK").now_or_never());
        }
    }
}
