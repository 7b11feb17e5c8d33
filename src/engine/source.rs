//! Whether the server and its slot are what was streamed from before: otherwise changes may be missing, or documents may
//! hold what the rows never had.

use std::sync::atomic::Ordering::Relaxed;

use super::shared::Shared;
use crate::config::Mode;
use crate::lsn::Lsn;
use crate::postgres::PostgresError;
use crate::postgres::preflight::Server;
use crate::postgres::replication::Session;
use crate::postgres::slot::{self, SlotInfo};
use crate::problem::{Problem, ProblemKind};
use crate::snapshot::Ledger;
use crate::status::Level;
use crate::stream;
use crate::telemetry::lock;
use crate::version;

/// Makes sure that streaming on from `slot` leaves nothing out, as far as this process and the ledger remember.
///
/// # Errors
/// [`ProblemKind::Gap`]: the server is another one, was promoted when that may have lost what documents hold, or the
/// slot is gone, was moved or made anew.
pub(super) async fn unchanged(
    shared: &Shared,
    server: &Server,
    slot: Option<&SlotInfo>,
    ledger: &Ledger,
) -> Result<(), Problem> {
    let config = &shared.options.config;
    let mode = config.mode();
    if let Some(slot) = slot {
        version::check(slot.current_lsn)?;
    }
    if lock(&shared.worked_with).as_ref().is_some_and(|id| *id != server.system_id) {
        return Err(another(shared));
    }
    let (job, position) = (ledger.job().await?, ledger.position().await?);
    if mode == Mode::SnapshotOnly || mode == Mode::Initial && shared.wants_fresh_copy(job.as_ref()) {
        return Ok(());
    }
    let streamed = *lock(&shared.streamed_on);
    let completed = job.as_ref().is_some_and(|job| job.completed);
    // What was not copied to its end is copied from its beginning, where it cannot be gone on with.
    if streamed.is_none() && !completed && (mode == Mode::Initial || position.is_none()) {
        return Ok(());
    }
    if job.as_ref().and_then(|job| job.system_id.as_ref()).is_some_and(|id| *id != server.system_id) {
        return Err(another(shared));
    }
    let name = &config.cdc.slot.name;
    let timeline = streamed.or(position.as_ref().map(|position| position.timeline));
    let promoted = timeline.filter(|timeline| *timeline != server.timeline);
    let Some(slot) = slot else {
        let with_it = promoted.map_or_else(String::new, |_| {
            format!(
                "; the server was promoted to timeline {}, and a standby has it only where failover slots are synchronized \
                 (`cdc.slot.failover`, PostgreSQL 17)",
                server.timeline
            )
        });
        return Err(Problem::new(
            ProblemKind::Gap,
            format!(
                "slot {name} is gone, but changes were streamed or copied before: those since then are lost{with_it}"
            ),
            copy_again(shared),
        ));
    };
    if let Some(timeline) = promoted {
        return follow(shared, server, timeline, streamed.is_some()).await;
    }
    if let (Some(confirmed), Some(position)) = (slot.confirmed_lsn, position)
        && confirmed > position.acknowledged
    {
        return Err(stream::moved(name, confirmed, position.acknowledged, &copy_again(shared)));
    }
    if job.is_some_and(|job| job.completed && !job.ours) && streamed.is_none() {
        shared.counters.notice(
            Level::Warn,
            format!(
                "the copy was made by another program (go-pq-cdc-elasticsearch): slot {name} is taken over where it stands, \
                 over the documents as they are. A document gets its version with its row's next change; copy a table \
                 again to be sure of those that the other program left behind"
            ),
        );
    }
    Ok(())
}

/// The server is on another timeline than `before`: going on is right if the new one left it after everything that
/// documents hold. What they hold only a process knows that has streamed on until then (`streamed`): a record in the
/// ledger may be as lost as the transactions are.
async fn follow(shared: &Shared, server: &Server, before: u32, streamed: bool) -> Result<(), Problem> {
    let cdc = &shared.options.config.cdc;
    let now = server.timeline;
    let mut session = Session::connect(cdc, "timeline").await?;
    let history = match session.timeline_history(now).await {
        Ok(history) => history,
        // Its file is not there.
        Err(PostgresError::Server(_)) => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    let gap = |message: String, hint: String| Err(Problem::new(ProblemKind::Gap, message, hint));
    let Some((_, end)) = history.into_iter().find(|(timeline, _)| *timeline == before) else {
        return gap(
            format!(
                "this server is on timeline {now}, which does not come from timeline {before}, where pgtide streamed"
            ),
            format!("Give the present primary in `cdc.host`. If this is it: {}", copy_again(shared)),
        );
    };
    let left = format!("this server was promoted: it is on timeline {now}, which left timeline {before} at {end}");
    let applied = Lsn(shared.counters.applied_lsn.load(Relaxed));
    if cdc.slot.accept_timeline == Some(now) {
        shared.counters.notice(Level::Warn, format!("{left}; accepted by `cdc.slot.acceptTimeline`"));
    } else if !streamed {
        return gap(
            format!(
                "{left}. This process did not run then, so documents may hold transactions that the new primary never had"
            ),
            format!(
                "{} If you know that the new primary had everything, as after a switchover in order or from a synchronous \
                 standby, set `cdc.slot.acceptTimeline: {now}` instead.",
                copy_again(shared)
            ),
        );
    } else if applied > end {
        return gap(
            format!("{left}, but documents hold changes up to {applied}: the new primary never had the last ones"),
            copy_again(shared),
        );
    } else {
        shared.counters.notice(
            Level::Warn,
            format!("{left}. Documents hold nothing beyond {applied}, so nothing is lost: the stream goes on"),
        );
    }
    shared.follow(end);
    Ok(())
}

/// What a look at the slot says that was `expected` to be there: it cannot be streamed on from.
pub(super) fn lost(shared: &Shared, slot: Option<&SlotInfo>, expected: bool) -> Option<Problem> {
    let name = &shared.options.config.cdc.slot.name;
    let Some(slot) = slot else {
        let gone = || {
            let message = format!("slot {name} is gone: somebody dropped it, and changes since then are lost");
            Problem::new(ProblemKind::Gap, message, copy_again(shared))
        };
        return expected.then(gone);
    };
    if slot.wal_status == "lost" {
        return Some(without_slot(shared, slot::lost(name, slot)));
    }
    // What is told is counted before it is told.
    let acknowledged = Lsn(shared.counters.acknowledged_lsn.load(Relaxed));
    let confirmed = slot.confirmed_lsn.filter(|confirmed| acknowledged > Lsn::ZERO && *confirmed > acknowledged)?;
    Some(stream::moved(name, confirmed, acknowledged, &copy_again(shared)))
}

fn another(shared: &Shared) -> Problem {
    Problem::new(
        ProblemKind::Gap,
        "this is another PostgreSQL server than the one the tables were copied from (its system identifier differs)",
        format!("Give the right one in `cdc.host`. If it is: {}", copy_again(shared)),
    )
}

/// What to do where changes are lost: which tables are to be copied again, and how.
pub(super) fn copy_again(shared: &Shared) -> String {
    let tables: Vec<String> = shared.mappings.iter().map(|mapping| mapping.table.to_string()).collect();
    let (tables, cdc) = (tables.join(", "), &shared.options.config.cdc);
    if shared.options.config.mode() == Mode::Never {
        return format!(
            "Start once with `cdc.snapshot.enabled: true`, `mode: initial` and `resnapshot: true`: {tables} are copied, and \
             documents whose rows are gone are removed. To stream from now on without a copy: DELETE FROM \
             public.cdc_snapshot_job WHERE slot_name = '{}';",
            cdc.slot.name
        );
    }
    format!(
        "Start once with `cdc.snapshot.resnapshot: true`: {tables} are copied again, and documents whose rows are gone are \
         removed."
    )
}

/// The same where the slot is in the way.
pub(super) fn drop_and_copy_again(shared: &Shared) -> String {
    let name = &shared.options.config.cdc.slot.name;
    format!("Drop the slot: SELECT pg_drop_replication_slot('{name}'); {}", copy_again(shared))
}

/// A slot that has lost changes cannot be streamed from: what to do names the tables.
pub(super) fn without_slot(shared: &Shared, problem: Problem) -> Problem {
    if problem.kind != ProblemKind::Gap {
        return problem;
    }
    Problem { hint: drop_and_copy_again(shared), ..problem }
}
