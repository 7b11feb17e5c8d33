//! The keeper: the session that holds the exported snapshot while workers copy from it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_postgres::Client;
use tokio_postgres::error::SqlState;
use tokio_util::sync::CancellationToken;

use super::copy::stopped;
use super::plan::Range;
use super::{Context, Table};
use crate::broken::{Rule, broken};
use crate::config::{Cdc, Config, Mode};
use crate::lsn::Lsn;
use crate::mapping::TableMapping;
use crate::postgres::catalog::Leaf;
use crate::postgres::connect::connect;
use crate::postgres::definition::{Seen, look};
use crate::postgres::replication::{Session, SlotKind};
use crate::postgres::{locks, preflight};
use crate::problem::{Problem, ProblemKind};
use crate::status::Level;
use crate::table::{TableId, quote_literal};

/// How often the keeper's session is asked whether it lives.
const LIFE_SIGN: Duration = Duration::from_secs(1);
/// A slot that takes so long to make waits for somebody.
const LONG_TAKE: Duration = Duration::from_secs(3);
const OPEN_TRANSACTIONS: &str = "waiting for PostgreSQL to make the slot: it does so once every transaction that is open now \
                                 has ended, in whatever database. See them: SELECT pid, datname, xact_start, query FROM \
                                 pg_stat_activity WHERE backend_xid IS NOT NULL ORDER BY xact_start; and the prepared \
                                 ones: SELECT gid, database, prepared FROM pg_prepared_xacts";

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
    /// Takes a snapshot and locks the tables in `ACCESS SHARE` mode without waiting. Gives them as the catalog has
    /// them under the lock: a slot may take hours to make, in which they may be altered; a notice says what for.
    ///
    /// # Errors
    /// No slot is free, a table is gone or locked by somebody else, or was rewritten between the snapshot and the
    /// lock. Then the slot that was created is gone again. `stop` is cancelled.
    pub(super) async fn take(
        context: &Context,
        origin: Origin<'_>,
        wanted: &[Arc<TableMapping>],
        stop: &CancellationToken,
    ) -> Result<(Self, Vec<Table>), Problem> {
        let taken = Self::take_silently(context, origin, wanted);
        tokio::pin!(taken);
        let mut told = false;
        loop {
            tokio::select! {
                taken = &mut taken => return taken,
                () = stop.cancelled() => return Err(stopped()),
                () = tokio::time::sleep(LONG_TAKE), if !told => {
                    told = true;
                    context.counters.notice(Level::Warn, OPEN_TRANSACTIONS);
                }
            }
        }
    }

    async fn take_silently(
        context: &Context,
        origin: Origin<'_>,
        wanted: &[Arc<TableMapping>],
    ) -> Result<(Self, Vec<Table>), Problem> {
        let cdc = &context.config.cdc;
        match origin {
            Origin::NoSlot => {
                let (client, lsn) = without_slot(cdc).await?;
                Self::hold(client, lsn, context, wanted).await
            }
            Origin::NewSlot(name) => {
                let mut session = Session::connect(cdc, "slot").await?;
                let created = session.create_slot(name, cdc.slot.kind()).await?;
                let held = Self::import(context, &created.snapshot_name, created.consistent_point, wanted).await;
                if held.is_err() {
                    // Nothing was read yet. A slot that stayed would keep WAL for nobody.
                    let quoted = crate::table::quote_identifier(name);
                    session.query(&format!("DROP_REPLICATION_SLOT {quoted} WAIT")).await?;
                }
                held
            }
            Origin::TemporarySlot(name) => {
                let mut session = Session::connect(cdc, "snapshot slot").await?;
                let created = session.create_slot(name, SlotKind::Temporary).await?;
                Self::import(context, &created.snapshot_name, created.consistent_point, wanted).await
            }
        }
    }

    async fn import(
        context: &Context,
        snapshot: &str,
        lsn: Lsn,
        wanted: &[Arc<TableMapping>],
    ) -> Result<(Self, Vec<Table>), Problem> {
        let client = connect(&context.config.cdc, "snapshot keeper").await?;
        import(&client, snapshot).await?;
        Self::hold(client, lsn, context, wanted).await
    }

    /// Locks, compares filenodes, and exports again: the slot's session is then free to go.
    async fn hold(
        client: Client,
        lsn: Lsn,
        context: &Context,
        wanted: &[Arc<TableMapping>],
    ) -> Result<(Self, Vec<Table>), Problem> {
        let (tables, server) = lock_all(&client, context, wanted).await?;
        let ids: Vec<TableId> = tables.iter().map(|table| table.mapping.table.clone()).collect();
        let publication = &context.config.cdc.publication.name;
        let then = look(&client, server, &ids, publication).await?;
        // What was altered between the snapshot and the lock has changes in the stream that were made before that, and
        // rows that the snapshot does not see: all of them, where it was rewritten or truncated.
        let same = |(table, then): &(&Table, Option<Seen>)| {
            then.as_ref().is_some_and(|then| then.definition == table.seen.definition)
        };
        if let Some((table, _)) = tables.iter().zip(then).find(|pair| !same(pair) && !broken(Rule::Filenode)) {
            return Err(Problem::new(
                ProblemKind::Setup,
                format!(
                    "table {} was altered, rewritten or truncated while the snapshot was taken",
                    table.mapping.table
                ),
                "The copy is begun again by itself.",
            )
            .transient());
        }
        let row = client.query_one("SELECT pg_catalog.pg_export_snapshot()", &[]).await?;
        Ok((Self { client, snapshot: row.get(0), lsn, since: Instant::now() }, tables))
    }

    /// The session, and with it the snapshot and the locks, is still there.
    pub(super) async fn lives(&self) -> bool {
        self.client.batch_execute("").await.is_ok()
    }

    /// Ends when the session has ended. Nobody tells, so it is asked.
    pub(super) async fn lost(&self) -> Problem {
        while self.lives().await {
            tokio::time::sleep(LIFE_SIGN).await;
        }
        gone()
    }
}

/// Makes sure that the snapshot of `client`, which holds locks on these tables, sees their rows.
///
/// # Errors
/// One was rewritten between the snapshot and the lock. It passes.
async fn untouched(client: &Client, leaves: impl Iterator<Item = &Leaf>) -> Result<(), Problem> {
    let oids: Vec<u32> = leaves.map(|leaf| leaf.oid).collect();
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
    if let Some(row) = rewritten.first().filter(|_| !broken(Rule::Filenode)) {
        return Err(Problem::new(
            ProblemKind::Setup,
            format!("table {} was rewritten while the snapshot was taken", row.get::<_, String>(0)),
            "The copy is begun again by itself.",
        )
        .transient());
    }
    Ok(())
}

/// A session that reads by a snapshot which nothing streams after, and about where that is.
async fn without_slot(cdc: &Cdc) -> Result<(Client, Lsn), Problem> {
    let client = connect(cdc, "snapshot").await?;
    client.batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY").await?;
    let row = client
        .query_one(
            "SELECT (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_insert_lsn() END)::text",
            &[],
        )
        .await?;
    Ok((client, row.get::<_, String>(0).parse().unwrap_or_default()))
}

/// A session of its own that is all that a keeper is: it reads by the snapshot of a temporary slot (of none where nothing
/// streams), and has a lock on each of a table's `leaves` that keeps it from being rewritten. With the consistent point.
///
/// # Errors
/// No slot is free, a table is locked by somebody else, or was rewritten in between.
pub(crate) async fn session(config: &Config, leaves: &[Leaf]) -> Result<(Client, Lsn), Problem> {
    let (client, lsn) = if config.mode() == Mode::SnapshotOnly {
        without_slot(&config.cdc).await?
    } else {
        let mut session = Session::connect(&config.cdc, "snapshot slot").await?;
        let created = session.create_slot(&super::temporary_slot(), SlotKind::Temporary).await?;
        let client = connect(&config.cdc, "snapshot").await?;
        import(&client, &created.snapshot_name).await?;
        (client, created.consistent_point)
    };
    for leaf in leaves {
        lock(&client, &leaf.id).await?;
    }
    untouched(&client, leaves.iter()).await?;
    Ok((client, lsn))
}

/// Locks the tables and gives them as they are under the lock.
async fn lock_all(
    client: &Client,
    context: &Context,
    wanted: &[Arc<TableMapping>],
) -> Result<(Vec<Table>, u32), Problem> {
    let control = connect(&context.config.cdc, "control").await?;
    let server = preflight::server(&control).await?;
    let ids: Vec<TableId> = wanted.iter().map(|mapping| mapping.table.clone()).collect();
    let mut tables: Vec<Table> = Vec::new();
    loop {
        let ready = preflight::tables(&control, &context.config, &server, &ids, context.handler.is_none()).await?;
        let looked = look(&control, server.version, &ids, &context.config.cdc.publication.name).await?;
        let mut seen = Vec::with_capacity(wanted.len());
        for ((mapping, ready), definition) in wanted.iter().zip(ready).zip(looked) {
            let definition = definition.ok_or_else(|| missing(&mapping.table))?;
            seen.push(Table { mapping: Arc::clone(mapping), ready, seen: definition });
        }
        if tables.len() == seen.len() && tables.iter().zip(&seen).all(|(table, seen)| table.is_as(seen)) {
            return Ok((seen, server.version));
        }
        // What was read before the lock may be wrong by the time of the lock: once more, until it is not.
        for leaf in seen.iter().flat_map(|table| &table.ready.info.leaves) {
            lock(client, &leaf.id).await?;
        }
        tables = seen;
    }
}

fn missing(table: &TableId) -> Problem {
    Problem::new(
        ProblemKind::Setup,
        format!("table {table} was dropped or renamed before it was copied"),
        "It is looked for again by itself.",
    )
    .transient()
}

async fn lock(client: &Client, leaf: &TableId) -> Result<(), Problem> {
    let sql = format!("LOCK TABLE ONLY {} IN ACCESS SHARE MODE NOWAIT", leaf.quoted());
    let Err(error) = client.batch_execute(&sql).await else { return Ok(()) };
    if error.code() == Some(&SqlState::UNDEFINED_TABLE) {
        return Err(missing(leaf));
    }
    if error.code() != Some(&SqlState::LOCK_NOT_AVAILABLE) {
        return Err(error.into());
    }
    // The failed transaction is of no use to anybody, and nothing can be asked in it.
    client.batch_execute("ROLLBACK").await?;
    let (message, hint) = locks::locked(client, leaf).await?;
    Err(Problem::new(ProblemKind::Setup, message, hint).transient())
}

/// Locks the leaf of a range for as long as the transaction of `client` lives, and makes sure that it still has the
/// pages that were planned: to an older snapshot a rewritten table is empty. Nothing else would tell, as the keeper's
/// session and its locks may have ended in between.
///
/// # Errors
/// Somebody has it locked, or it was rewritten; both pass.
pub(super) async fn lock_planned(client: &Client, range: &Range) -> Result<(), Problem> {
    lock(client, &range.leaf).await?;
    let row = client
        .query_one(
            "SELECT coalesce(pg_catalog.pg_relation_filenode(pg_catalog.to_regclass($1)), 0::oid)",
            &[&range.leaf.quoted()],
        )
        .await?;
    if row.get::<_, u32>(0) == range.filenode || broken(Rule::Filenode) {
        return Ok(());
    }
    Err(Problem::new(
        ProblemKind::Setup,
        format!("table {} was rewritten before it was copied", range.leaf),
        "It is copied under a new snapshot by itself.",
    )
    .transient())
}

pub(super) fn gone() -> Problem {
    Problem::new(
        ProblemKind::Postgres,
        "the exported snapshot is gone: the session that held it has ended",
        "The copy goes on under a new snapshot by itself.",
    )
    .transient()
}

/// Begins a transaction of `client` that reads by `snapshot`.
///
/// # Errors
/// The snapshot is gone: its keeper has ended.
pub(super) async fn import(client: &Client, snapshot: &str) -> Result<(), Problem> {
    let sql = format!(
        "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET TRANSACTION SNAPSHOT {}",
        quote_literal(snapshot)
    );
    client.batch_execute(&sql).await.map_err(|error| {
        // 42704 since PostgreSQL 17, 22023 before, 55000 when the exporting transaction has just ended.
        let codes =
            [SqlState::UNDEFINED_OBJECT, SqlState::INVALID_PARAMETER_VALUE, SqlState::OBJECT_NOT_IN_PREREQUISITE_STATE];
        if error.code().is_some_and(|code| codes.contains(code)) {
            return gone();
        }
        error.into()
    })
}
