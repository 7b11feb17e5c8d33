//! The lock that elects the leader among the processes of one job, and what can be seen of who has it.
//!
//! It belongs to the connection by which the ledger is written. So whoever has lost it, in whatever way, cannot write
//! into the ledger any more either.

use std::time::Duration;

use tokio_postgres::Client;

use super::Ledger;
use crate::problem::Problem;

/// The ledger's connection is named so in `pg_stat_activity`; the instance's name follows.
const NAMED: &str = "pgtide ledger ";

/// A lock beside that one, which the leader has for as long as its operator pauses it: like the lead, it ends with the
/// connection.
const PAUSE: &str = "pg_catalog.hashtextextended('pgtide pause of ' || $1, 0)";

/// Whoever has the lock. A lock of 64 bits shows as two halves, objsubid 1: "pg_locks" in PostgreSQL's manual.
pub(super) const HOLDER: &str = "
    FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a ON a.pid = l.pid,
         pg_catalog.hashtextextended('pgtide ' || $1, 0) AS key
    WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 AND (l.classid::int8 << 32 | l.objid::int8) = key
      AND l.database = (SELECT oid FROM pg_catalog.pg_database WHERE datname = pg_catalog.current_database())";

/// The process that leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leader {
    /// The backend of its ledger.
    pub pid: i32,
    /// Its `cdc.snapshot.instanceId`, as far as 63 bytes hold it; empty where something else has the lock.
    pub instance: String,
    /// How long it has not said a word, where this role may see that. It says one every `heartbeatInterval`.
    pub silent: Option<Duration>,
    /// Its operator has paused it.
    pub paused: bool,
}

impl Leader {
    /// `instance host-7, backend 4711`, for a person.
    #[must_use]
    pub fn describe(&self) -> String {
        match self.instance.as_str() {
            "" => format!("backend {}", self.pid),
            instance => format!("instance {instance}, backend {}", self.pid),
        }
    }
}

/// The word by which a ledger's connection is named.
pub(super) fn purpose(instance: &str) -> String {
    // The server makes `?` of anything else, and cuts at 63 bytes.
    format!("{}{instance}", NAMED.strip_prefix("pgtide ").unwrap_or(NAMED))
}

/// Takes the lock of a job for as long as the connection lives. False: another process has it.
pub(crate) async fn try_lock(client: &Client, job: &str) -> Result<bool, Problem> {
    let sql = "SELECT pg_catalog.pg_try_advisory_lock(pg_catalog.hashtextextended('pgtide ' || $1, 0))";
    Ok(client.query_one(sql, &[&job]).await?.get(0))
}

impl Ledger {
    /// Takes the lock that makes this process the leader, for as long as the ledger's connection lives. False: another
    /// process has it.
    ///
    /// # Errors
    /// The query fails.
    pub async fn try_lock(&self) -> Result<bool, Problem> {
        try_lock(&*self.client().await, &self.job).await
    }

    /// Tells the other processes that the operator has paused this one, which leads, or that it goes on.
    ///
    /// # Errors
    /// The query fails.
    pub async fn say_paused(&self, paused: bool) -> Result<(), Problem> {
        let how = if paused { "pg_try_advisory_lock" } else { "pg_advisory_unlock" };
        self.client().await.query_one(&format!("SELECT pg_catalog.{how}({PAUSE})"), &[&self.job]).await?;
        Ok(())
    }

    /// Who has the lock; none at a moment when nobody has.
    ///
    /// # Errors
    /// The query fails.
    pub async fn leader(&self) -> Result<Option<Leader>, Problem> {
        let sql = format!(
            "SELECT l.pid, coalesce(a.application_name, ''), CASE WHEN a.state <> 'active' THEN
                 extract(epoch FROM pg_catalog.clock_timestamp() - a.state_change)::float8 END,
                 EXISTS (SELECT FROM pg_catalog.pg_locks p WHERE p.pid = l.pid AND p.locktype = 'advisory' AND p.granted
                         AND p.objsubid = 1 AND (p.classid::int8 << 32 | p.objid::int8) = {PAUSE}) {HOLDER}"
        );
        let row = self.client().await.query_opt(&sql, &[&self.job]).await?;
        Ok(row.map(|row| Leader {
            pid: row.get(0),
            instance: row.get::<_, String>(1).strip_prefix(NAMED).unwrap_or_default().to_owned(),
            silent: row.get::<_, Option<f64>>(2).and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()),
            paused: row.get(3),
        }))
    }

    /// Ends the ledger's connection of a leader that has said nothing for `claimTimeout`, and with it its lead. Its
    /// name, if there was one. A leader of another role is left alone: what it does cannot be seen.
    ///
    /// # Errors
    /// The query fails.
    pub async fn depose(&self) -> Result<Option<String>, Problem> {
        let sql = format!(
            "SELECT a.application_name, pg_catalog.pg_terminate_backend(l.pid) {HOLDER}
               AND a.usename = current_user AND starts_with(a.application_name, '{NAMED}') AND a.state <> 'active'
               AND pg_catalog.clock_timestamp() - a.state_change > make_interval(secs => $2)"
        );
        let row = self.client().await.query_opt(&sql, &[&self.job, &self.claim_timeout.as_secs_f64()]).await?;
        Ok(row.map(|row| row.get::<_, String>(0).strip_prefix(NAMED).unwrap_or_default().to_owned()))
    }
}
