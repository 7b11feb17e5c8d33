//! The replication slot: where it stands and whether it can still be used.

use tokio_postgres::Client;

use crate::lsn::Lsn;
use crate::problem::{Problem, ProblemKind};

/// A logical slot and its surroundings, as `pg_replication_slots` shows them.
#[derive(Clone, Debug, PartialEq)]
pub struct SlotInfo {
    /// The output plugin.
    pub plugin: String,
    /// The slot's database.
    pub database: String,
    /// A walsender streams from it.
    pub active: bool,
    /// That walsender.
    pub active_pid: Option<i32>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: String,
    /// Everything before it is answered for, as whoever streams says; none where nobody does, or it is not shown to us.
    pub applied_lsn: Option<Lsn>,
    /// Commits wait for what is acknowledged (`synchronous_standby_names`).
    pub awaited: bool,
    /// The oldest WAL that is kept for it.
    pub restart_lsn: Option<Lsn>,
    /// Everything before it was acknowledged.
    pub confirmed_lsn: Option<Lsn>,
    /// Bytes until it may be lost; none without a limit.
    pub safe_wal_size: Option<i64>,
    /// Where PostgreSQL writes now.
    pub current_lsn: Lsn,
    /// `max_slot_wal_keep_size` in bytes; none when unlimited.
    pub keep_limit: Option<u64>,
    /// Bytes that decoding for it spilled to disk.
    pub spilled_bytes: Option<u64>,
    /// Why it cannot be used any more, since PostgreSQL 17: `wal_removed`, `idle_timeout`, ...
    pub invalidated: Option<String>,
    /// It is kept on standbys as well (PostgreSQL 17).
    pub failover: bool,
}

/// Moves a slot that nobody uses on to `position`, if it is not that far yet: changes before it will not be streamed.
///
/// # Errors
/// The query fails: somebody streams from it.
pub async fn advance(client: &Client, name: &str, position: Lsn) -> Result<(), Problem> {
    let sql = "SELECT pg_catalog.pg_replication_slot_advance(slot_name, $2::text::pg_lsn)
               FROM pg_catalog.pg_replication_slots WHERE slot_name = $1 AND confirmed_flush_lsn < $2::text::pg_lsn";
    client.execute(sql, &[&name, &position.to_string()]).await?;
    Ok(())
}

/// Looks a slot up; `None` when there is none of that name.
///
/// # Errors
/// The query fails, or the slot is a physical one.
pub async fn find(client: &Client, name: &str) -> Result<Option<SlotInfo>, Problem> {
    let row = client
        .query_opt(
            "SELECT s.slot_type::text, coalesce(s.plugin::text, ''), coalesce(s.database::text, ''), s.active, s.active_pid,
                    coalesce(s.wal_status, ''), s.restart_lsn::text, s.confirmed_flush_lsn::text, s.safe_wal_size,
                    CASE WHEN pg_catalog.pg_is_in_recovery() THEN pg_catalog.pg_last_wal_receive_lsn()
                         ELSE pg_catalog.pg_current_wal_lsn() END::text,
                    (SELECT setting::int8 FROM pg_catalog.pg_settings WHERE name = 'max_slot_wal_keep_size'),
                    t.spill_bytes, to_jsonb(s) ->> 'invalidation_reason', coalesce((to_jsonb(s) ->> 'failover')::bool, FALSE),
                    r.replay_lsn::text, coalesce(r.sync_state <> 'async', FALSE)
             FROM pg_catalog.pg_replication_slots s
             LEFT JOIN pg_catalog.pg_stat_replication_slots t ON t.slot_name = s.slot_name::text
             LEFT JOIN pg_catalog.pg_stat_replication r ON r.pid = s.active_pid
             WHERE s.slot_name = $1",
            &[&name],
        )
        .await?;
    let Some(row) = row else { return Ok(None) };
    if row.get::<_, String>(0) != "logical" {
        return Err(Problem::new(
            ProblemKind::Setup,
            format!("slot {name} is a physical one"),
            "Name another slot in `cdc.slot.name`.",
        ));
    }
    let lsn = |column: usize| row.get::<_, Option<String>>(column).and_then(|text| text.parse().ok());
    let limit_mib: i64 = row.get::<_, Option<i64>>(10).unwrap_or(-1);
    Ok(Some(SlotInfo {
        plugin: row.get(1),
        database: row.get(2),
        active: row.get(3),
        active_pid: row.get(4),
        wal_status: row.get(5),
        restart_lsn: lsn(6),
        confirmed_lsn: lsn(7),
        safe_wal_size: row.get(8),
        current_lsn: lsn(9).unwrap_or_default(),
        keep_limit: u64::try_from(limit_mib).ok().map(|mib| mib << 20),
        spilled_bytes: row.get::<_, Option<i64>>(11).and_then(|bytes| u64::try_from(bytes).ok()),
        invalidated: row.get(12),
        failover: row.get(13),
        applied_lsn: lsn(14),
        awaited: row.get(15),
    }))
}

/// Whether `info` can be streamed from by us, once nobody else does.
///
/// # Errors
/// The slot is lost, of another plugin or database ([`ProblemKind::Setup`], [`ProblemKind::Gap`]).
pub fn usable(name: &str, info: &SlotInfo, database: &str) -> Result<(), Problem> {
    if info.plugin != "pgoutput" {
        return Err(Problem::new(
            ProblemKind::Setup,
            format!("slot {name} belongs to the plugin {}, not pgoutput", info.plugin),
            "Name another slot in `cdc.slot.name`.",
        ));
    }
    if info.database != database {
        return Err(Problem::new(
            ProblemKind::Setup,
            format!("slot {name} belongs to the database {}, not {database}", info.database),
            "Name another slot in `cdc.slot.name`; slot names are shared by all databases of a server.",
        ));
    }
    if info.wal_status == "lost" {
        return Err(lost(name, info));
    }
    Ok(())
}

/// Whether nobody streams from `info`.
///
/// # Errors
/// Somebody does, which may pass.
pub fn free(name: &str, info: &SlotInfo) -> Result<(), Problem> {
    if info.active {
        return Err(Problem::new(
            ProblemKind::Setup,
            format!(
                "slot {name} is held by another process (backend {})",
                info.active_pid.map_or_else(|| "unknown".to_owned(), |pid| pid.to_string())
            ),
            "Stop the other connector, or name another slot in `cdc.slot.name`.",
        )
        .transient());
    }
    Ok(())
}

/// Ends the connection by which a former leader streams, or makes the slot, once this process has taken over: it may hang, and
/// hold the slot for as long.
///
/// # Errors
/// The query fails.
pub async fn end_stream(client: &Client, name: &str) -> Result<(), Problem> {
    client
        .execute(
            "SELECT pg_catalog.pg_terminate_backend(a.pid) FROM pg_catalog.pg_replication_slots s
             JOIN pg_catalog.pg_stat_activity a ON a.pid = s.active_pid
             WHERE s.slot_name = $1 AND a.usename = current_user AND a.application_name IN ('pgtide stream', 'pgtide slot')",
            &[&name],
        )
        .await?;
    Ok(())
}

/// PostgreSQL has given the slot up.
#[must_use]
pub fn lost(name: &str, info: &SlotInfo) -> Problem {
    let why = match info.invalidated.as_deref() {
        Some("idle_timeout") => "nobody used it for longer than idle_replication_slot_timeout",
        Some("rows_removed") => "rows of the catalog that it still needed were removed",
        Some("wal_level_insufficient") => "wal_level was lowered",
        _ => "PostgreSQL removed WAL that it still needed (max_slot_wal_keep_size)",
    };
    Problem::new(
        ProblemKind::Gap,
        format!("slot {name} is lost: {why}. Changes since {} cannot be streamed", confirmed(info)),
        format!("Drop the slot (SELECT pg_drop_replication_slot('{name}')) and copy the tables again."),
    )
}

fn confirmed(info: &SlotInfo) -> String {
    info.confirmed_lsn.map_or_else(|| "its beginning".to_owned(), |confirmed| confirmed.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_that_cannot_be_used_says_why() {
        let good = SlotInfo {
            plugin: "pgoutput".into(),
            database: "shop".into(),
            active: false,
            active_pid: None,
            wal_status: "reserved".into(),
            restart_lsn: Some(Lsn(8)),
            confirmed_lsn: Some(Lsn(8)),
            safe_wal_size: None,
            current_lsn: Lsn(16),
            keep_limit: None,
            spilled_bytes: None,
            invalidated: None,
            failover: false,
            applied_lsn: None,
            awaited: false,
        };
        assert_eq!(usable("s", &good, "shop"), Ok(()));
        let refusal = |info: &SlotInfo| usable("s", info, "shop").expect_err("refused");
        assert_eq!(refusal(&SlotInfo { plugin: "wal2json".into(), ..good.clone() }).kind, ProblemKind::Setup);
        assert_eq!(refusal(&SlotInfo { database: "other".into(), ..good.clone() }).kind, ProblemKind::Setup);
        assert_eq!(refusal(&SlotInfo { wal_status: "lost".into(), ..good.clone() }).kind, ProblemKind::Gap);
        assert_eq!(free("s", &good), Ok(()));
        let busy = free("s", &SlotInfo { active: true, active_pid: Some(42), ..good }).expect_err("refused");
        assert!(busy.transient && busy.message.contains("42"), "{busy:?}");
    }
}
