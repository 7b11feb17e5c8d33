//! The first copy of a job, begun or gone on with after whatever cut it short.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::keeper::{Keeper, Origin};
use super::ledger::{ChunkRow, Job, Ledger};
use super::plan::{Bounds, integer_key};
use super::{Context, Ended, Table, copy, remember_index, settle_total, show, sweep, temporary_slot};
use crate::broken::{Rule, broken};
use crate::config::Mode;
use crate::lsn::Lsn;
use crate::mapping::TableMapping;
use crate::postgres::catalog::Leaf;
use crate::postgres::connect::connect;
use crate::postgres::definition::Definition;
use crate::postgres::preflight::Server;
use crate::postgres::slot::{self, SlotInfo};
use crate::problem::{Problem, ProblemKind};
use crate::status::{Level, TableState};
use crate::table::TableId;
use crate::telemetry::Counters;
use crate::version;

/// The first copy, begun or gone on with.
///
/// `slot`: ours, if it is there already.
///
/// Going on: what is done stays done, although it is copied under another snapshot than what is still to do. Right,
/// because the slot stands at or before the first snapshot, so that the stream will bring every change since then,
/// and an older version never replaces a newer document. A row that an UPDATE moved from a pending page to one that
/// is done comes with that UPDATE. This does not hold for a table that was rewritten meanwhile (its rows changed
/// places without a change in the stream): that table is copied from its beginning.
///
/// # Errors
/// PostgreSQL fails; the copy is stopped; the index holds documents of another server's making.
pub async fn initial(
    context: &Context,
    ledger: &Arc<Ledger>,
    wanted: &[Arc<TableMapping>],
    slot: Option<&SlotInfo>,
    server: &Server,
) -> Result<Ended, Problem> {
    let config = &context.config;
    let streams = config.mode() != Mode::SnapshotOnly;
    let job = ledger.job().await?;
    let slot_name = config.cdc.slot.name.as_str();
    let temporary = temporary_slot();
    // Without a slot that covers the time since, a half-done copy cannot be gone on with. One that was made later, by an
    // attempt that ended before it had begun its own job, does not.
    let going_on = job.as_ref().filter(|job| {
        let covered = slot.and_then(|slot| slot.confirmed_lsn).is_some_and(|confirmed| confirmed <= job.lsn);
        // Without a stream only whole tables can be added to what is done.
        let fits = if streams { !job.completed && covered } else { job.completed };
        // Rows that were copied on another timeline may be of transactions that this one never had.
        let same = job.system_id.as_ref() == Some(&server.system_id) && job.timeline == Some(server.timeline);
        job.ours && job.begun && fits && same
    });
    if let Some(job) = job.as_ref().filter(|_| going_on.is_none()) {
        context.counters.notice(Level::Warn, again_because(job, streams, slot, server));
    }
    let slot = slot.is_some();
    let origin = match (streams, slot) {
        (false, _) => Origin::NoSlot,
        (true, false) => Origin::NewSlot(slot_name),
        (true, true) => Origin::TemporarySlot(&temporary),
    };
    let (keeper, tables) = tokio::select! {
        taken = Keeper::take(context, origin, wanted, &context.stop) => taken?,
        problem = ledger.lost() => return Err(problem),
    };
    if streams && slot {
        // It was seen before, and may have been of a process that was killed while it gave up its attempt.
        let client = connect(&config.cdc, "slot").await?;
        if slot::find(&client, slot_name).await?.is_none() {
            return Err(Problem::new(
                ProblemKind::Setup,
                format!("slot {slot_name} was dropped before the copy had begun"),
                "The copy begins with a new one by itself.",
            )
            .transient());
        }
    } else if streams {
        context.counters.notice(Level::Info, format!("slot {slot_name} created at {}", keeper.lsn));
    }
    // From here on documents depend on it.
    context.counters.slot_expected.store(streams, Relaxed);
    let mut tables = tables;
    if let Some(job) = going_on {
        tables = go_on(context, ledger, tables, job.lsn, &keeper).await?;
    } else {
        // Documents of an earlier copy whose rows are gone by now are removed at the end. Processes that helped with that one
        // write no more by then: they stop when they see another leader, or are not believed any more.
        let sweep = job.is_some();
        while ledger.others_at_work().await? {
            tokio::select! {
                () = context.stop.cancelled() => return Err(copy::stopped()),
                () = tokio::time::sleep(Duration::from_millis(100)) => {}
            }
        }
        if !sweep {
            strangers(context, wanted).await?;
        }
        let mut plans = Vec::with_capacity(tables.len());
        for table in &tables {
            plans.push((table.mapping.table.clone(), context.plan(table).await?));
        }
        ledger.begin_job(&keeper.snapshot, keeper.lsn, (&server.system_id, server.timeline), sweep, &plans).await?;
        for table in &tables {
            ledger.define(&table.mapping.table, &table.seen, Some(keeper.lsn)).await?;
        }
        tracing::info!(lsn = %keeper.lsn, "snapshot started");
    }
    let tables = tables.as_slice();
    let chunks = ledger.chunks().await?;
    show(context, tables, &chunks);
    let copied = context.copy(ledger, &keeper, tables, None, &context.stop).await?;
    let latest = version::before(keeper.lsn);
    drop(keeper);
    if copied.is_none() {
        let left = ledger.chunks().await?;
        show(context, tables, &left);
        let left = |mapping: &TableMapping| left.iter().any(|chunk| !chunk.completed && chunk.table == mapping.table);
        let left: Vec<usize> =
            tables.iter().filter(|table| left(&table.mapping)).map(|table| table.mapping.number).collect();
        return tokio::select! {
            () = context.resumed(&left) => Ok(Ended::Released),
            () = context.stop.cancelled() => Err(copy::stopped()),
            problem = ledger.lost() => Err(problem),
        };
    }
    let Some(job) = ledger.job().await? else {
        return Err(Problem::new(
            ProblemKind::Setup,
            "the ledger's job is gone: somebody emptied cdc_snapshot_job",
            "Start again; the tables are copied again.",
        ));
    };
    if streams && context.handler.is_none() && wanted.len() == context.counters.tables.len() {
        // What lies before the snapshot is in it. Of rows that went without a change of their own the stream would bring
        // older changes behind the copy, where the slot is older: from another life, or from a start that came no further.
        let client = connect(&config.cdc, "control").await?;
        slot::advance(&client, slot_name, job.lsn).await?;
    }
    for table in tables {
        let planned = chunks.iter().find(|chunk| chunk.table == table.mapping.table).map_or(job.lsn, |chunk| chunk.lsn);
        // Planned anew, a table may have documents of rows that it no longer had by then.
        if job.sweep || planned > job.lsn {
            let version = version::before(planned.max(job.lsn));
            // By other processes as well.
            let refused = ledger.refused(&table.mapping.table).await?;
            let newest = sweep(context, &table.mapping, version, refused, &context.stop).await?;
            if newest > latest {
                // Of a row that is not there: no copy would have met it.
                return Err(copy::foreign(&table.mapping.index, latest));
            }
        } else {
            let _pass = context.pass().await?;
            context.sink.client().refresh(&table.mapping.index).await?;
        }
        remember_index(context, ledger, &table.mapping).await?;
    }
    if !ledger.finish_job().await? {
        return Err(Problem::new(
            ProblemKind::Internal,
            "the copy ended with chunks that are not completed",
            "It goes on by itself.",
        )
        .transient());
    }
    for table in tables {
        let counters = &context.counters.tables[table.mapping.number];
        settle_total(context, table);
        counters.paused.store(false, Relaxed);
        counters.set_state(if streams { TableState::CatchUp } else { TableState::Live });
        context.counters.notice(
            Level::Info,
            format!("{}: copy done, {} rows", table.mapping.table, counters.rows_done.load(Relaxed)),
        );
    }
    Ok(Ended::Copied)
}

/// Says that indices have documents before the first copy: nothing tells which of them are of no row.
async fn strangers(context: &Context, wanted: &[Arc<TableMapping>]) -> Result<(), Problem> {
    if context.handler.is_some() {
        return Ok(());
    }
    for mapping in wanted {
        let found = context.sink.client().count(&mapping.index).await?.unwrap_or(0);
        if found > 0 {
            let text = format!(
                "{}: index {} has {found} documents already; those that no row replaces stay until the table is copied again",
                mapping.table, mapping.index
            );
            context.counters.notice(Level::Warn, text);
        }
    }
    Ok(())
}

/// Why a copy that the ledger knows of begins again, in words.
fn again_because(job: &Job, streams: bool, slot: Option<&SlotInfo>, server: &Server) -> String {
    let why = if job.ours && !job.begun {
        "mode `never` has streamed until now, and copied nothing".to_owned()
    } else if !job.ours && job.system_id.is_none() {
        "it was begun by another program (go-pq-cdc-elasticsearch), whose chunks cannot be gone on with".to_owned()
    } else if !job.ours || job.completed {
        "as asked for by `cdc.snapshot.resnapshot`".to_owned()
    } else if job.system_id.as_ref() != Some(&server.system_id) {
        "it was begun on another PostgreSQL server".to_owned()
    } else if job.timeline != Some(server.timeline) {
        "the server was promoted since it began".to_owned()
    } else if !streams {
        "without a slot nothing tells what changed since it was left".to_owned()
    } else {
        format!("no slot covers the time since {}, where it began", job.lsn)
    };
    let half = if slot.is_some() { "; the slot stays" } else { "" };
    format!("the copy starts from its beginning: {why}. Documents whose rows are gone are removed at its end{half}")
}

/// Plans what is new, and takes out what is no longer asked for. Gives the tables that are copied now: those that cannot
/// be gone on with are copied again once the stream runs, for only then can be told which of their documents have no
/// row. Without a stream they are copied from their beginning.
async fn go_on(
    context: &Context,
    ledger: &Ledger,
    tables: Vec<Table>,
    began: Lsn,
    keeper: &Keeper,
) -> Result<Vec<Table>, Problem> {
    let chunks = ledger.chunks().await?;
    let remembered = ledger.remembered().await?;
    let mut by_table: HashMap<&TableId, Vec<&ChunkRow>> = HashMap::new();
    for chunk in &chunks {
        by_table.entry(&chunk.table).or_default().push(chunk);
    }
    let streams = context.config.mode() != Mode::SnapshotOnly;
    let configured: Vec<TableId> = tables.iter().map(|table| table.mapping.table.clone()).collect();
    let mut going_on = Vec::with_capacity(tables.len());
    for table in tables {
        let id = &table.mapping.table;
        let known = by_table.remove(id).unwrap_or_default();
        if known.is_empty() {
            if !ledger.has_pending(id).await? {
                // Later than the job: documents of an earlier life are swept.
                let lsn = if streams { began } else { keeper.lsn };
                ledger.replan(id, lsn, &context.plan(&table).await?).await?;
                ledger.define(id, &table.seen, Some(keeper.lsn)).await?;
                going_on.push(table);
            }
            continue;
        }
        let seen = remembered.get(id).and_then(|remembered| remembered.seen.as_ref());
        let done = known.iter().all(|chunk| chunk.completed);
        let unseen = (!streams && !done).then_some("no stream brings what was changed since");
        let Some(reason) = in_the_way(&table, &known, seen.map(|seen| &seen.definition)).or(unseen) else {
            going_on.push(table);
            continue;
        };
        if streams {
            let text = format!("{id}: {reason}, so its copy does not go on: it is begun again once the stream runs");
            context.counters.notice(Level::Warn, text);
            ledger.want(id, 0).await?;
            ledger.forget_copy(id).await?;
            continue;
        }
        if !done {
            context.counters.notice(Level::Warn, format!("{id}: {reason}, so it is copied from its beginning"));
            // Later than the job: what was copied before is swept.
            ledger.replan(id, keeper.lsn, &context.plan(&table).await?).await?;
            ledger.define(id, &table.seen, Some(keeper.lsn)).await?;
        }
        going_on.push(table);
    }
    forget_others(ledger, &configured, &context.counters).await?;
    context.counters.notice(Level::Info, format!("the copy goes on under a new snapshot at {}", keeper.lsn));
    Ok(going_on)
}

/// Why the copy of a table cannot be gone on with, of which `known` chunks were planned when it was as `then`.
fn in_the_way(table: &Table, known: &[&ChunkRow], then: Option<&Definition>) -> Option<&'static str> {
    let leaves = &table.ready.info.leaves;
    let Some(then) = then else { return Some("the ledger does not say what it was") };
    if let Some(reason) = then.outdated(&table.seen.definition) {
        return Some(reason);
    }
    if known.iter().any(|chunk| !leaves.iter().any(|leaf| leaf.id == chunk.range.leaf)) {
        return Some("a partition was detached, dropped or renamed");
    }
    if known.iter().all(|chunk| chunk.completed) {
        return None;
    }
    // Rows may have moved between what is done and what is not.
    if then.publication.as_ref().is_none_or(|publication| !publication.operations[1]) {
        return Some("updates are not published, and some may have been made");
    }
    let untouched = |leaf: &Leaf| {
        let mut of_leaf = known.iter().filter(|chunk| chunk.range.leaf == leaf.id).peekable();
        let fits = |bounds| matches!(bounds, Bounds::Pages { .. }) || integer_key(&table.ready.info).is_some();
        of_leaf.peek().is_some()
            && of_leaf.all(|chunk| {
                (chunk.range.filenode == leaf.filenode || broken(Rule::Filenode)) && fits(chunk.range.bounds)
            })
    };
    (!leaves.iter().all(untouched)).then_some("it was rewritten, or got a partition")
}

/// Forgets what was copied of tables that are not in `configured`: added again, they are copied again, for changes in
/// between are not applied.
///
/// # Errors
/// The queries fail.
pub async fn forget_others(ledger: &Ledger, configured: &[TableId], counters: &Counters) -> Result<(), Problem> {
    for table in ledger.tables().await?.iter().filter(|table| !configured.contains(table)) {
        ledger.forget(table).await?;
        counters.notice(Level::Warn, format!("{table}: no longer configured; its index is left as it is"));
    }
    Ok(())
}
