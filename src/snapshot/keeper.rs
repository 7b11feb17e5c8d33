//! The keeper: the session that holds the exported snapshot while workers copy from it.

use std::time::Instant;

use tokio_postgres::Client;

use crate::config::Cdc;
use crate::lsn::Lsn;
use crate::postgres::catalog::Leaf;
use crate::postgres::connect::connect;
use crate::postgres::replication::Session;
use crate::problem::{Problem, ProblemKind};

/// Which slot the snapshot comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin<'a> {
    /// A new slot that stays: the stream will start at its consistent point.
    NewSlot(&'a str),
    /// A slot of its own that is gone as soon as the snapshot is held. The stream of any other slot fits it exactly:
    /// a transaction is visible in the snapshot if and only if it committed before the consistent point.
    TemporarySlot(&'a str),
    /// No slot: mode `snapshot_only`, which nothing streams after.
    NoSlot,
}

/// Holds a snapshot, and a lock on each table that keeps it from being rewritten or truncated. Both end with it.
#[derive(Debug)]
pub struct Keeper {
    /// Kept open; any error on it, or its end, invalidates the snapshot for workers that have not imported it yet.
    client: Client,
    /// The snapshot's name for `SET TRANSACTION SNAPSHOT`.
    pub snapshot: String,
    /// The consistent point: what committed before it is in the snapshot, all else is not.
    pub lsn: Lsn,
    /// Since when it is held.
    pub since: Instant,
}

impl Keeper {
    /// Takes a snapshot and locks `leaves` in `ACCESS SHARE` mode without waiting.
    ///
    /// # Errors
    /// No slot is free, a table is locked by somebody else, or was rewritten between the snapshot and the lock. Then
    /// the slot that was created is gone again.
    pub async fn take(cdc: &Cdc, origin: Origin<'_>, leaves: &[&Leaf]) -> Result<Self, Problem> {
        match origin {
            Origin::NoSlot => {
                let client = connect(cdc, "snapshot").await?;
                client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
                let row = client
                    .query_one(
                        "SELECT (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END)::text",
                        &[],
                    )
                    .await?;
                let lsn = row.get::<_, String>(0).parse().unwrap_or_default();
                Self::hold(client, lsn, leaves).await
            }
            Origin::NewSlot(name) => {
                let mut session = Session::connect(cdc, "slot").await?;
                let created = session.create_slot(name, false).await?;
                let held = Self::import(cdc, &created.snapshot_name, created.consistent_point, leaves).await;
                if held.is_err() {
                    // Nothing was read yet. A slot that stayed would keep WAL for nobody.
                    let quoted = crate::table::quote_identifier(name);
                    session.query(&format!("DROP_REPLICATION_SLOT {quoted} WAIT")).await?;
                }
                held
            }
            Origin::TemporarySlot(name) => {
                let mut session = Session::connect(cdc, "snapshot slot").await?;
                let created = session.create_slot(name, true).await?;
                Self::import(cdc, &created.snapshot_name, created.consistent_point, leaves).await
            }
        }
    }

    async fn import(cdc: &Cdc, snapshot: &str, lsn: Lsn, leaves: &[&Leaf]) -> Result<Self, Problem> {
        let client = connect(cdc, "snapshot keeper").await?;
        import(&client, snapshot).await?;
        Self::hold(client, lsn, leaves).await
    }

    /// Locks, compares filenodes, and exports again: the slot's session is then free to go.
    async fn hold(client: Client, lsn: Lsn, leaves: &[&Leaf]) -> Result<Self, Problem> {
        for leaf in leaves {
            let sql = format!("LOCK TABLE ONLY {} IN ACCESS SHARE MODE NOWAIT", leaf.id.quoted());
            if let Err(error) = client.batch_execute(&sql).await {
                if error.code() == Some(&tokio_postgres::error::SqlState::LOCK_NOT_AVAILABLE) {
                    return Err(Problem::new(
                        ProblemKind::Setup,
                        format!("table {} is locked by another session (ALTER, TRUNCATE, VACUUM FULL, ...)", leaf.id),
                        format!(
                            "Wait for it, or see who it is: SELECT pid, query FROM pg_stat_activity WHERE pid IN \
                             (SELECT pid FROM pg_locks WHERE relation = {}).",
                            leaf.oid
                        ),
                    )
                    .transient());
                }
                return Err(error.into());
            }
        }
        let oids: Vec<u32> = leaves.iter().map(|leaf| leaf.oid).collect();
        // relfilenode is read by the snapshot, pg_relation_filenode() by what is so now. Where they differ the table
        // was rewritten after the snapshot, which would see no row in it.
        let rewritten = client
            .query(
                "SELECT o.oid::regclass::text FROM unnest($1::oid[]) o(oid)
                 LEFT JOIN pg_catalog.pg_class c ON c.oid = o.oid
                 WHERE c.oid IS NULL OR c.relfilenode IS DISTINCT FROM pg_catalog.pg_relation_filenode(c.oid)",
                &[&oids],
            )
            .await?;
        if let Some(row) = rewritten.first() {
            return Err(Problem::new(
                ProblemKind::Setup,
                format!("table {} was rewritten while the snapshot was taken", row.get::<_, String>(0)),
                "The copy is begun again by itself.",
            )
            .transient());
        }
        let row = client.query_one("SELECT pg_catalog.pg_export_snapshot()", &[]).await?;
        Ok(Self { client, snapshot: row.get(0), lsn, since: Instant::now() })
    }

    /// The version of the snapshot's documents: one below the consistent point. Commits begin at multiples of 8, so
    /// that no change has it, every change from the consistent point on is above it, and every earlier one below.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.lsn.0.saturating_sub(1)
    }

    /// The session has ended: workers that come later find no snapshot.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.client.is_closed()
    }
}

/// Begins a transaction of `client` that reads by `snapshot`.
///
/// # Errors
/// The snapshot is gone: its keeper has ended.
pub(super) async fn import(client: &Client, snapshot: &str) -> Result<(), Problem> {
    let sql = format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {}",
        crate::table::quote_literal(snapshot)
    );
    client.batch_execute(&sql).await.map_err(|error| {
        use tokio_postgres::error::SqlState;
        // 42704 since PostgreSQL 17, 22023 before, 55000 when the exporting transaction has just ended.
        let gone =
            [SqlState::UNDEFINED_OBJECT, SqlState::INVALID_PARAMETER_VALUE, SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE];
        if error.code().is_some_and(|code| gone.contains(code)) {
            return Problem::new(
                ProblemKind::Postgres,
                "the exported snapshot is gone: the session that held it has ended",
                "The copy goes on under a new snapshot by itself.",
            )
            .transient();
        }
        error.into()
    })
}
