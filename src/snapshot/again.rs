//! A table copied again while the stream goes on.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::deletes::{self, DeleteSet};
use super::keeper::{Keeper, Origin};
use super::ledger::Ledger;
use super::{Context, Ended, copy, remember_index, settle_total, show, sweep, temporary_slot};
use crate::lsn::Lsn;
use crate::mapping::{TableMapping, unwritable};
use crate::postgres::connect::connect;
use crate::postgres::preflight;
use crate::problem::{Problem, ProblemKind};
use crate::sink::Body;
use crate::status::Level;
use crate::version;

/// How often the stream's position is looked at.
const LOOK: Duration = Duration::from_millis(50);

/// Copies one table again while the stream goes on, then removes the documents whose rows are gone.
///
/// Everything that the stream deletes meanwhile is remembered from before the snapshot is asked for
/// ([`DeleteSet`]); the snapshot of a temporary slot is exact against the stream of any other slot.
/// A crash leaves the wish in the ledger, and the next start copies it again.
///
/// `wish`: the number of the wish in the ledger, which stays until the sweep has ended.
///
/// # Errors
/// PostgreSQL fails, or `stop` is cancelled: the documents are all valid then, and nothing is removed.
pub async fn again(
    context: &Context,
    ledger: &Arc<Ledger>,
    table: &Arc<TableMapping>,
    wish: i32,
    stop: &CancellationToken,
) -> Result<Ended, Problem> {
    let deletes = context.resnapshots.begin(table.number);
    let outcome = again_recorded(context, ledger, table, &deletes, (wish, stop)).await;
    context.resnapshots.end(table.number);
    outcome
}

async fn again_recorded(
    context: &Context,
    ledger: &Arc<Ledger>,
    mapping: &Arc<TableMapping>,
    deletes: &Arc<DeleteSet>,
    (wish, stop): (i32, &CancellationToken),
) -> Result<Ended, Problem> {
    let control = connect(&context.config.cdc, "control").await?;
    // A slot may take hours to make. What is in the way is said before.
    let server = preflight::server(&control).await?;
    let ids = [mapping.table.clone()];
    preflight::tables(&control, &context.config, &server, &ids, context.handler.is_none()).await?;
    stream_anew(context, mapping, &control, stop).await?;
    drop(control);
    let temporary = temporary_slot();
    let origin = Origin::TemporarySlot(&temporary);
    let (keeper, tables) = Keeper::take(context, origin, std::slice::from_ref(mapping), stop).await?;
    let [table] = tables.as_slice() else { return Ok(Ended::Copied) };
    let version = version::before(keeper.lsn);
    let ranges = context.plan(table).await?;
    ledger.replan(&table.mapping.table, keeper.lsn, &ranges).await?;
    let chunks = ledger.chunks().await?;
    show(context, &tables, &chunks);
    let earlier = context.resnapshots.begins_to_write(mapping);
    let copied = context.copy(ledger, &keeper, &tables, Some(Arc::clone(deletes)), stop).await;
    let keeper_lsn = keeper.lsn;
    drop(keeper);
    // Also when the copy was given up: some rows of it may have arrived behind their deletes.
    redo_deletes(context, &table.mapping, deletes, version).await?;
    if !earlier {
        context.resnapshots.nothing_on_its_way(mapping.number);
    }
    let copied = copied?;
    let Some(copied) = copied else { return Ok(Ended::Released) };
    if deletes.overflowed() {
        return Err(Problem::new(
            // Nothing that is set up otherwise would help: not tried again by itself.
            ProblemKind::Internal,
            format!("{}: more rows were deleted during the copy than pgtide remembers", table.mapping.table),
            "Copy it again at a quieter time. The documents are valid; only deleted rows may still have one.",
        ));
    }
    stream_passes(context, keeper_lsn, stop).await?;
    sweep(context, &table.mapping, version, copied.rejected, stop).await?;
    remember_index(context, ledger, mapping).await?;
    ledger.define(&mapping.table, &table.seen, Some(keeper_lsn)).await?;
    ledger.granted(&mapping.table, wish).await?;
    settle_total(context, table);
    let rows = context.counters.tables[table.mapping.number].rows_done.load(Relaxed);
    context.counters.notice(Level::Info, format!("{}: copied again, {rows} rows", table.mapping.table));
    Ok(Ended::Copied)
}

/// Before PostgreSQL 15 a walsender that has seen a change of a table does not notice when that becomes a partition, or
/// is one no longer: it goes on to send its changes or not as before. One that begins after that does it right, so what is
/// copied afterwards is all that was not sent.
async fn stream_anew(
    context: &Context,
    mapping: &TableMapping,
    control: &Client,
    stop: &CancellationToken,
) -> Result<(), Problem> {
    let sql = "SELECT pg_catalog.pg_current_wal_flush_lsn()::text FROM pg_catalog.pg_class
               WHERE current_setting('server_version_num')::int < 150000 AND oid = pg_catalog.to_regclass($1) AND relkind = 'p'";
    let Some(row) = control.query_opt(sql, &[&mapping.table.quoted()]).await? else { return Ok(()) };
    tokio::select! {
        () = context.resnapshots.stream_beyond(row.get::<_, String>(0).parse().unwrap_or_default()) => Ok(()),
        () = stop.cancelled() => Err(copy::stopped()),
    }
}

/// Waits until everything that was committed before `position` has been streamed and answered for. Of rows that went
/// without a change of their own (their partition was detached, the key changed) the stream may still bring changes
/// from before that, whose documents would come back behind the sweep.
async fn stream_passes(context: &Context, position: Lsn, stop: &CancellationToken) -> Result<(), Problem> {
    while context.counters.confirmed_lsn.load(Relaxed) < position.0 {
        tokio::select! {
            () = stop.cancelled() => return Err(copy::stopped()),
            () = tokio::time::sleep(LOOK) => {}
        }
    }
    Ok(())
}

/// Sends the deletes that the stream made during the copy once more, for rows that were on their way at the time.
///
/// Each goes one below its own version: still not below that of the copy's documents, but below that of a row which
/// the same transaction wrote under the same key after its delete.
async fn redo_deletes(
    context: &Context,
    mapping: &TableMapping,
    deletes: &DeleteSet,
    version: u64,
) -> Result<(), Problem> {
    let limit = context.config.elasticsearch.batch_size_limit;
    let mut pass = context.gate.enter();
    for batch in deletes.since(version).chunks(limit.max(1)) {
        let mut body = Body::with_capacity(batch.len() * 96);
        for (id, at) in batch {
            let version = at.saturating_sub(1);
            if context.handler.is_none() {
                body.delete(&mapping.target, id, version);
            } else if let Some(action) = deletes::delete_action(id) {
                body.action(&mapping.target, &action, version).map_err(unwritable)?;
            }
        }
        pass.wait().await;
        context.sink.deliver(body, &CancellationToken::new()).await?;
    }
    Ok(())
}
