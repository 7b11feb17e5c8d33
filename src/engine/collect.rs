//! One value of everything that is shown.

use std::sync::atomic::Ordering::Relaxed;

use super::monitor::distance;
use super::shared::Shared;
use crate::config::Mode;
use crate::lsn::Lsn;
use crate::problem::{Problem, ProblemKind};
use crate::sink::SinkStats;
use crate::status::{Phase, Replication, Sink, SnapshotStatus, Source, Status, TableName, TableState, TableStatus};
use crate::telemetry::{TableCounters, lock, now};

/// Bulks that failed in a row before the whole pipeline is said to be in trouble: one 429 is everyday.
const TROUBLED: u32 = 3;
/// Microseconds after which it is in trouble however few attempts that were: one that hangs fails seldom.
const LASTING: i64 = 15_000_000;
/// What happens to the slot is told after so many seconds of samples.
const WAL_RATE_AFTER: f64 = 30.0;
/// An ETA is given after so many chunks and seconds.
const ETA_AFTER: (usize, f64) = (2, 30.0);

#[allow(clippy::cast_precision_loss, reason = "figures for a screen")]
pub(super) fn status(shared: &Shared) -> Status {
    let at = now();
    let config = &shared.options.config;
    let counters = &shared.counters;
    let stats = shared.sink.stats();
    let sampled = lock(&shared.sampled).clone();
    let state = lock(&shared.state).clone();
    let (phase, phase_since, problem, attempts) = phase(shared, &state, &stats, at);

    let tables: Vec<TableStatus> = counters
        .tables
        .iter()
        .enumerate()
        .map(|(number, table)| {
            let rates = sampled.tables.get(number);
            let (all, copied) = rates.map_or((0.0, 0.0), |rates| (rates.all.value(), rates.copied.value()));
            let rejected = u32::try_from(number).ok().and_then(|number| stats.rejected_by_table.get(&number));
            table_status(table, config.cdc.snapshot.chunk_size, all, copied, rejected, at)
        })
        .collect();
    let copy = *lock(&shared.copy);
    let snapshot = SnapshotStatus {
        running: copy.began.is_some(),
        seconds: copy.began.map_or(copy.seconds, |began| began.elapsed().as_secs_f64()),
        workers: counters.workers.load(Relaxed),
        active_workers: counters.active_workers.load(Relaxed),
        eta: overall_eta(&tables, sampled.copied()),
        held_seconds: shared.held.borrow().map(|since| since.elapsed().as_secs_f64()),
    };
    let (events, events_sampled) = counters.events();
    let server = lock(&shared.server).clone();
    Status {
        at,
        started_at: shared.started_at,
        phase,
        phase_since,
        standby: (phase == Phase::Standby).then(|| lock(&shared.standby).clone()).flatten(),
        problem,
        attempts,
        pause_requested: state.paused_since.is_some(),
        read_only: shared.options.read_only,
        source: Source {
            host: config.cdc.host.clone(),
            port: config.cdc.port,
            database: config.cdc.database.clone(),
            version: server.as_ref().map(|server| server.version_text.clone()),
        },
        replication: replication(
            shared,
            sampled.wal.over(WAL_RATE_AFTER),
            server.and_then(|server| server.keep_limit()),
            at,
        ),
        rates: sampled.rates(),
        sink: sink(shared, stats.clone(), &sampled),
        tables,
        snapshot,
        events,
        events_sampled,
        notices: counters.notices(),
        rejections: stats.rejections.into_iter().map(|rejection| rejection.rejection).collect(),
        memory: resident(),
    }
}

/// What the pipeline does, said so that it is true: a pause is one only when nothing moves, and a sink that refuses
/// is not streaming.
fn phase(
    shared: &Shared,
    state: &super::shared::PhaseState,
    stats: &SinkStats,
    at: i64,
) -> (Phase, i64, Option<Problem>, u32) {
    let works = matches!(state.phase, Phase::Snapshot | Phase::CatchUp | Phase::Streaming);
    if let Some(since) = state.paused_since.filter(|_| works || state.phase == Phase::Connecting) {
        let phase = if shared.gate.holds_all() { Phase::Paused } else { Phase::Pausing };
        return (phase, since, None, 0);
    }
    if works
        && let Some(trouble) = stats.trouble.as_ref().filter(|it| it.attempts >= TROUBLED || at - it.since >= LASTING)
    {
        let problem =
            Problem::new(ProblemKind::Elasticsearch, trouble.reason.clone(), trouble.hint.clone()).transient();
        return (Phase::Degraded, trouble.since, Some(problem), trouble.attempts);
    }
    (state.phase, state.since, state.problem.clone(), state.attempts)
}

#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "figures for a screen"
)]
fn table_status(
    table: &TableCounters,
    chunk_rows: u64,
    rate: f64,
    copied_rate: f64,
    rejected: Option<&u64>,
    at: i64,
) -> TableStatus {
    let chunks = table.chunks();
    let (done, count) = (chunks.done(), chunks.len());
    let mut state = table.state();
    let waits = table.resnapshot.load(Relaxed) && state != TableState::Failed;
    let copies = matches!(state, TableState::Queued | TableState::Copying | TableState::Retrying);
    if table.paused.load(Relaxed) && (copies || waits) {
        state = TableState::Paused;
    }
    let rows_done = table.rows_done.load(Relaxed);
    let exact = count > 0 && done == count;
    let known = Some(table.rows_total.load(Relaxed)).filter(|&total| total != u64::MAX);
    let rows_total = match known {
        // An estimate that has been passed says nothing any more.
        Some(total) if total >= rows_done => Some(total),
        _ if exact => Some(rows_done),
        _ if done > 0 => Some((rows_done as f64 / done as f64 * count as f64) as u64).map(|total| total.max(rows_done)),
        _ => None,
    };
    let seconds = table.copy_started().map_or(0.0, |began| (at - began) as f64 / 1e6);
    let copying = matches!(state, TableState::Copying | TableState::Retrying);
    let eta = rows_total
        .filter(|_| copying && !exact && done >= ETA_AFTER.0 && seconds >= ETA_AFTER.1 && copied_rate > 0.0)
        .map(|total| (total.saturating_sub(rows_done) as f64 / copied_rate).ceil() as u64);
    TableStatus {
        table: TableName(table.table.clone()),
        index: table.index.clone(),
        state,
        rows_done,
        rows_copied: table.snapshot_rows.load(Relaxed),
        rows_total,
        rows_total_exact: exact,
        rows_per_second: rate,
        eta,
        errors: rejected.copied().unwrap_or(0),
        attempts: table.attempts.load(Relaxed),
        chunks,
        chunk_rows,
        inserts: table.inserts.load(Relaxed),
        updates: table.updates.load(Relaxed),
        deletes: table.deletes.load(Relaxed),
        truncates: table.truncates.load(Relaxed),
        resnapshot: table.resnapshot.load(Relaxed),
        first_copy: table.first_copy.load(Relaxed),
        resnapshots_ended: table.resnapshots_ended.load(Relaxed),
        problem: table.problem(),
    }
}

/// Seconds until everything is copied: what is left over the rate of all workers, once every table that is being
/// copied has an ETA of its own.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an estimate")]
fn overall_eta(tables: &[TableStatus], rate: f64) -> Option<u64> {
    let copying = |table: &&TableStatus| {
        matches!(table.state, TableState::Copying | TableState::Retrying) && !table.rows_total_exact
    };
    let etas = tables.iter().filter(copying).map(|table| table.eta);
    let slowest = etas.collect::<Option<Vec<_>>>()?.into_iter().max()?;
    let left: Option<u64> = tables
        .iter()
        .filter(|table| table.state == TableState::Queued || copying(table))
        .map(|table| Some(table.rows_total?.saturating_sub(table.rows_done)))
        .sum();
    let all = left.filter(|_| rate > 0.0).map(|left| (left as f64 / rate).ceil() as u64);
    Some(all.map_or(slowest, |all| all.max(slowest)))
}

#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "figures for a screen"
)]
fn replication(shared: &Shared, wal_rate: Option<f64>, keep_limit: Option<u64>, at: i64) -> Replication {
    let config = &shared.options.config;
    let counters = &shared.counters;
    if config.mode() == Mode::SnapshotOnly {
        return Replication::default();
    }
    let slot = lock(&shared.slot).clone();
    let position = |raw: u64| (raw > 0).then_some(Lsn(raw));
    let received = position(counters.received_lsn.load(Relaxed));
    let confirmed = slot.as_ref().and_then(|slot| slot.confirmed_lsn);
    // What the slot says is up to a second old; what we know ourselves may be newer.
    let confirmed = confirmed.max(position(counters.confirmed_lsn.load(Relaxed)).filter(|_| confirmed.is_some()));
    // What was received has been written.
    let current = slot.as_ref().map(|slot| slot.current_lsn).map(|current| Some(current).max(received).max(confirmed));
    let current = current.flatten();
    let restart = slot.as_ref().and_then(|slot| slot.restart_lsn);
    let lag_bytes = distance(current, confirmed);
    let oldest = counters.oldest_commit.load(Relaxed);
    let lag_seconds = match (lag_bytes, oldest) {
        (None, _) => None,
        (Some(_), oldest) if oldest > 0 => Some((at - oldest).max(0) as f64 / 1e6),
        (Some(0), _) => Some(0.0),
        // Nothing that was received waits: what is not received yet was written after what is confirmed.
        (Some(_), _) => confirmed
            .and_then(|confirmed| lock(&shared.positions).passed(confirmed))
            .map(|passed| (at - passed).max(0) as f64 / 1e6),
    };
    let safe = slot.as_ref().and_then(|slot| slot.safe_wal_size);
    let wal_per_second = wal_rate.filter(|_| slot.is_some());
    let latency = |micros: i64| (micros >= 0).then_some(micros as f64 / 1e6);
    Replication {
        slot: Some(config.cdc.slot.name.clone()),
        publication: Some(config.cdc.publication.name.clone()),
        active: slot.as_ref().map(|slot| slot.active),
        active_pid: slot.as_ref().and_then(|slot| slot.active_pid),
        wal_status: slot.as_ref().map(|slot| slot.wal_status.clone()).filter(|status| !status.is_empty()),
        current_lsn: current,
        received_lsn: received,
        confirmed_lsn: confirmed,
        restart_lsn: restart,
        lag_bytes,
        lag_seconds,
        cdc_latency: latency(counters.cdc_latency.load(Relaxed)),
        process_latency: latency(counters.process_latency.load(Relaxed)),
        retained_bytes: distance(current, restart),
        retained_limit: slot.as_ref().and_then(|slot| slot.keep_limit).or(keep_limit),
        safe_bytes: safe,
        wal_per_second,
        seconds_to_loss: safe
            .zip(wal_per_second.filter(|rate| *rate > 0.0))
            .map(|(safe, rate)| (safe.max(0) as f64 / rate) as u64),
        spilled_bytes: slot.and_then(|slot| slot.spilled_bytes),
        changes: counters.changes.load(Relaxed),
        transactions: counters.transactions.load(Relaxed),
        reconnects: counters.reconnects.load(Relaxed),
    }
}

fn sink(shared: &Shared, stats: SinkStats, sampled: &super::monitor::Sampled) -> Sink {
    let info = lock(&shared.sink_info).clone();
    Sink {
        url: shared.sink.client().url(),
        distribution: info.as_ref().map(|info| info.distribution.clone()),
        version: info.and_then(|info| info.version),
        documents: stats.documents,
        documents_per_second: sampled.documents.value(),
        bytes_per_second: sampled.bytes.value(),
        bulk_documents: stats.bulk_documents,
        bulk_bytes: stats.bulk_bytes,
        latency: stats.latency,
        last_latency: stats.last_latency,
        indices: stats.indices,
        in_flight: stats.in_flight,
        in_flight_limit: stats.in_flight_limit,
        queued_documents: stats.queued_documents,
        throttled_per_second: sampled.throttled.value(),
        retried: stats.retried,
        rejected: stats.rejected,
        superseded: stats.superseded,
        trouble: stats.trouble,
    }
}

/// Resident memory of this process, where the system tells (Linux).
fn resident() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    let page = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()??;
    Some(pages * u64::try_from(page).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::ChunkState;
    use crate::table::TableId;

    #[test]
    fn there_is_no_time_to_the_end_once_all_chunks_are_done() {
        let table = TableCounters::new(TableId::new("public", "books"), "books".to_owned());
        table.set_state(TableState::Copying);
        let at = |seconds: i64| now() + seconds * 1_000_000;
        let status = || table_status(&table, 100, 10.0, 10.0, None, at(60));
        table.begin_copy(&[ChunkState::Done, ChunkState::Done, ChunkState::Pending], 200, Some(310));
        let running = status();
        assert_eq!(running.eta, Some(11));
        table.rows_done.store(300, Relaxed);
        table.set_chunk(2, ChunkState::Done);
        let sweeping = status();
        // The estimate was too high.
        assert_eq!((sweeping.eta, sweeping.rows_total), (None, Some(310)));
        assert_eq!(overall_eta(std::slice::from_ref(&sweeping), 10.0), None);
        // A table whose chunks are done holds up nobody's time.
        assert_eq!(overall_eta(&[sweeping, running], 10.0), Some(11));
    }
}
