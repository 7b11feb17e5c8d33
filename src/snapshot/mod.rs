//! The copy: chunks, ledger, keeper, workers; the first copy, its resumption, and a copy made again.

mod copy;
mod deletes;
mod keeper;
mod ledger;
mod plan;
mod progress;
mod share;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

pub use self::copy::{Copied, CopyTable, Copying};
pub(crate) use self::deletes::action_key;
pub use self::deletes::{DeleteSet, Resnapshots};
pub(crate) use self::keeper::session;
pub use self::keeper::{Keeper, Origin};
pub(crate) use self::ledger::try_lock;
pub use self::ledger::{ChunkRow, Done, Job, Leader, Ledger, Offer, Offered, Position, Recorded, Remembered};
pub use self::plan::{Bounds, Range, by_key, by_pages, integer_key};
pub use self::progress::Progress;
pub use self::share::{Share, help};
use crate::broken::{Rule, broken};
use crate::change::Handler;
use crate::config::{Config, Mode, Strategy};
use crate::gate::Gate;
use crate::lsn::Lsn;
use crate::mapping::{Shape, TableMapping, unwritable};
use crate::postgres::catalog::Leaf;
use crate::postgres::connect::connect;
use crate::postgres::definition::{Definition, Seen};
use crate::postgres::preflight::{Ready, Server};
use crate::postgres::slot::SlotInfo;
use crate::problem::{Problem, ProblemKind};
use crate::sink::{Body, Sink};
use crate::status::{ChunkState, Level, TableState};
use crate::table::TableId;
use crate::telemetry::Counters;

/// What every copy needs.
#[derive(Clone)]
pub struct Context {
    /// The configuration.
    pub config: Arc<Config>,
    /// Where documents go.
    pub sink: Sink,
    /// Where progress is shown.
    pub counters: Arc<Counters>,
    /// An embedder's code.
    pub handler: Option<Arc<dyn Handler>>,
    /// Closed: workers wait.
    pub gate: Gate,
    /// Told which tables are copied again while the stream runs.
    pub resnapshots: Arc<Resnapshots>,
    /// Told since when a snapshot is held, for the screen.
    pub held: tokio::sync::watch::Sender<Option<std::time::Instant>>,
    /// Ends the copy; the next start goes on.
    pub stop: CancellationToken,
}

/// A table to be copied.
#[derive(Clone, Debug)]
struct Table {
    /// Where it goes.
    mapping: Arc<TableMapping>,
    /// As the catalog has it, and which rows.
    ready: Ready,
    /// Its definition.
    seen: Seen,
}

impl Table {
    /// Nothing was altered or rewritten between the two looks.
    fn is_as(&self, other: &Self) -> bool {
        let (one, two) = (&self.ready, &other.ready);
        let leaf = |leaf: &Leaf| (leaf.oid, leaf.id.clone(), leaf.filenode);
        self.seen.definition == other.seen.definition
            && one.condition == two.condition
            && one.info.columns == two.info.columns
            && one.info.leaves.iter().map(leaf).eq(two.info.leaves.iter().map(leaf))
    }
}

impl Context {
    fn workers(&self) -> usize {
        let processors = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
        self.config.cdc.snapshot.workers.unwrap_or_else(|| processors.clamp(2, 8))
    }

    /// Cuts a table into chunks.
    async fn plan(&self, table: &Table) -> Result<Vec<Range>, Problem> {
        let (info, rows) = (&table.ready.info, self.config.cdc.snapshot.chunk_size);
        if table.ready.strategy != Strategy::IntegerRange {
            return Ok(by_pages(&info.leaves, rows));
        }
        let Some(key) = integer_key(info) else {
            self.counters.notice(
                Level::Warn,
                format!("{}: integer_range needs a key of one integer column, so it is copied by ctid", info.id),
            );
            return Ok(by_pages(&info.leaves, rows));
        };
        // Not the keeper's session: an error would cost the snapshot.
        let client = crate::postgres::connect::connect(&self.config.cdc, "control").await?;
        by_key(&client, &info.leaves, key, rows).await
    }

    /// Copies the chunks of `tables` under the keeper's snapshot, which other processes are offered too, unless deletes are
    /// recorded: only this process knows those. None: the operator's pause lasts, and the snapshot is to be let go; nothing
    /// is on its way.
    async fn copy(
        &self,
        ledger: &Arc<Ledger>,
        keeper: &Keeper,
        tables: &[Table],
        deletes: Option<Arc<DeleteSet>>,
        stop: &CancellationToken,
    ) -> Result<Option<Copied>, Problem> {
        let shared = deletes.is_none();
        let tables: Vec<_> = tables.iter().map(|table| copy_table(&table.mapping, &table.ready)).collect();
        let offer = Offer { snapshot: keeper.snapshot.clone(), lsn: keeper.lsn, tables: self.plan_of(&tables) };
        let copying = Arc::new(Copying { deletes, ..self.copying(ledger, offer, tables, stop) });
        // Its rows may be of any transaction until then.
        self.counters.applied_lsn.fetch_max(keeper.lsn.0, Relaxed);
        self.held.send_replace(Some(keeper.since));
        let workers = self.workers();
        let copied = tokio::select! {
            copied = Arc::clone(&copying).run(workers) => copied.map(Some),
            problem = ledger.lost() => Err(problem),
            problem = keeper.lost() => Err(problem),
            problem = copying.offer_it(), if shared => Err(problem),
            () = self.paused_for_long(&copying, workers) => Ok(None),
        };
        self.held.send_replace(None);
        if !matches!(copied, Ok(Some(_)))
            && let Err(problem) = ledger.give_back().await
        {
            tracing::debug!(%problem, "what was claimed could not be given back");
        }
        if shared && copied.is_ok() {
            ledger.withdraw_offer().await?;
            // What the others completed last.
            Progress::default().look(ledger, &self.counters).await?;
        }
        match copied {
            // Without its locks a table may have been altered under the workers' hands.
            Err(problem) if !problem.transient && !keeper.lives().await => Err(keeper.lost().await),
            Ok(None) => {
                self.counters.active_workers.store(0, Relaxed);
                let after = humantime::format_duration(self.config.cdc.snapshot.release_after);
                self.counters.notice(
                    Level::Info,
                    format!("the pause has lasted {after}: the snapshot is let go; resumed, the copy takes a new one"),
                );
                Ok(None)
            }
            copied => copied,
        }
    }

    /// A copy of `tables` under the snapshot of `offer`, as the process that leads makes it the first time.
    fn copying(&self, ledger: &Arc<Ledger>, offer: Offer, tables: Vec<CopyTable>, stop: &CancellationToken) -> Copying {
        Copying {
            cdc: self.config.cdc.clone(),
            ledger: Arc::clone(ledger),
            sink: self.sink.clone(),
            counters: Arc::clone(&self.counters),
            tables: tables.into_iter().map(|table| (table.mapping.table.clone(), table)).collect(),
            offer,
            share: None,
            limits: (self.config.elasticsearch.batch_size_limit, self.config.elasticsearch.batch_byte_size_limit),
            gate: self.gate.clone(),
            handler: self.handler.clone(),
            deletes: None,
            waiting: AtomicUsize::new(0),
            stop: stop.clone(),
        }
    }

    /// Ends when for `releaseAfter` every worker has waited for the operator, with nothing on its way.
    /// Never in mode `snapshot_only`: without a stream, what is left fits no other snapshot.
    async fn paused_for_long(&self, copying: &Copying, workers: usize) {
        if self.config.mode() == Mode::SnapshotOnly {
            return std::future::pending().await;
        }
        let mut since = None;
        let mut ticks = tokio::time::interval(Duration::from_millis(200));
        loop {
            ticks.tick().await;
            let idle = self.gate.holds_all() || copying.waiting.load(SeqCst) == workers;
            match since.filter(|_| idle) {
                None => since = idle.then(Instant::now),
                Some(since) if since.elapsed() >= self.config.cdc.snapshot.release_after => return,
                Some(_) => {}
            }
        }
    }

    /// Ends when the operator wants work on one of these tables: the pause is over, and not each of them is held. Without
    /// a table, as the last chunk may have ended in the pause, the pause alone counts.
    async fn resumed(&self, tables: &[usize]) {
        let mut pass = self.gate.enter();
        loop {
            pass.wait().await;
            if tables.is_empty() || tables.iter().any(|number| !self.counters.tables[*number].paused.load(Relaxed)) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }
}

/// A slot that takes so long to make waits for somebody.
const LONG_TAKE: Duration = Duration::from_secs(3);
/// How often the stream's position is looked at.
const LOOK: Duration = Duration::from_millis(50);
const OPEN_TRANSACTIONS: &str = "waiting for PostgreSQL to make the slot: it does so once every transaction that is open now \
                                 has ended, in whatever database. See them: SELECT pid, datname, xact_start, query FROM \
                                 pg_stat_activity WHERE backend_xid IS NOT NULL ORDER BY xact_start; and the prepared \
                                 ones: SELECT gid, database, prepared FROM pg_prepared_xacts";

fn copy_table(mapping: &Arc<TableMapping>, ready: &Ready) -> CopyTable {
    let info = &ready.info;
    CopyTable {
        mapping: Arc::clone(mapping),
        shape: Arc::new(Shape::new(info.columns.clone())),
        select_list: info.select_list(),
        condition: ready.condition.clone(),
        integer_key: integer_key(info).unwrap_or_default().to_owned(),
    }
}

/// How a copy ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Every chunk has been answered for, and the ledger says so.
    Copied,
    /// A long pause made it let go of its snapshot, and is over: it is to be called again.
    Released,
}

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
        job.ours && fits && same
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
    let take = Keeper::take(context, origin, wanted);
    tokio::pin!(take);
    let mut told = false;
    let (keeper, tables) = loop {
        tokio::select! {
            taken = &mut take => break taken?,
            () = context.stop.cancelled() => return Err(copy::stopped()),
            problem = ledger.lost() => return Err(problem),
            () = tokio::time::sleep(LONG_TAKE), if !told => {
                told = true;
                context.counters.notice(Level::Warn, OPEN_TRANSACTIONS);
            }
        }
    };
    if !slot && streams {
        context.counters.notice(Level::Info, format!("slot {slot_name} created at {}", keeper.lsn));
    }
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
            ledger.define(&table.mapping.table, &table.seen).await?;
        }
        tracing::info!(lsn = %keeper.lsn, "snapshot started");
    }
    let tables = tables.as_slice();
    let chunks = ledger.chunks().await?;
    show(context, tables, &chunks);
    let copied = context.copy(ledger, &keeper, tables, None, &context.stop).await?;
    let latest = keeper.lsn.0.saturating_sub(1);
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
    if job.sweep && streams && context.handler.is_none() && wanted.len() == context.counters.tables.len() {
        // What lies before the snapshot is in it. Of rows that went without a change of their own the stream would bring
        // older changes behind the sweep.
        let client = connect(&config.cdc, "control").await?;
        crate::postgres::slot::advance(&client, slot_name, job.lsn).await?;
    }
    for table in tables {
        let planned = chunks.iter().find(|chunk| chunk.table == table.mapping.table).map_or(job.lsn, |chunk| chunk.lsn);
        // Planned anew, a table may have documents of rows that it no longer had by then.
        if job.sweep || planned > job.lsn {
            let version = planned.0.max(job.lsn.0).saturating_sub(1);
            // By other processes as well.
            let refused = ledger.refused(&table.mapping.table).await?;
            let newest = sweep(context, &table.mapping, version, refused, &context.stop).await?;
            if newest > latest {
                // Of a row that is not there: no copy would have met it.
                return Err(copy::foreign(&table.mapping.index, latest));
            }
        } else {
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
    let why = if !job.ours && job.system_id.is_none() {
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

/// The name of a slot that lives for a moment; slot names are shared by all databases of a server.
fn temporary_slot() -> String {
    format!("pgtide_tmp_{}_{:08x}", std::process::id(), fastrand::u32(..))
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
                ledger.define(id, &table.seen).await?;
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
            ledger.want(id).await?;
            ledger.forget_chunks(id).await?;
            continue;
        }
        if !done {
            context.counters.notice(Level::Warn, format!("{id}: {reason}, so it is copied from its beginning"));
            // Later than the job: what was copied before is swept.
            ledger.replan(id, keeper.lsn, &context.plan(&table).await?).await?;
            ledger.define(id, &table.seen).await?;
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

/// Shows the plan.
fn show(context: &Context, tables: &[Table], chunks: &[ChunkRow]) {
    for table in tables {
        let counters = &context.counters.tables[table.mapping.number];
        let own: Vec<&ChunkRow> = chunks.iter().filter(|chunk| chunk.table == table.mapping.table).collect();
        let states: Vec<ChunkState> =
            own.iter().map(|chunk| if chunk.completed { ChunkState::Done } else { ChunkState::Pending }).collect();
        let rows = own.iter().filter(|chunk| chunk.completed).map(|chunk| chunk.rows).sum();
        counters.begin_copy(&states, rows, estimated_rows(table));
        counters.set_state(TableState::Queued);
    }
}

/// Rows of the table by PostgreSQL's estimate; none when a leaf was never analysed, or only some rows are copied.
fn estimated_rows(table: &Table) -> Option<u64> {
    if table.ready.condition.is_some() {
        return None;
    }
    table.ready.info.leaves.iter().map(|leaf| leaf.rows).sum()
}

/// The copy has ended: what was an estimate is a count.
fn settle_total(context: &Context, table: &Table) {
    let counters = &context.counters.tables[table.mapping.number];
    counters.rows_total.store(counters.rows_done.load(Relaxed), Relaxed);
}

/// Removes the documents of a table's index that no row of the copy at `version`, and no change since, accounts for.
/// `refused`: rows of that copy that are dead letters. Gives the highest version that it saw.
async fn sweep(
    context: &Context,
    mapping: &TableMapping,
    version: u64,
    refused: u64,
    stop: &CancellationToken,
) -> Result<u64, Problem> {
    let refuse = |why: &str| {
        context.counters.notice(
            Level::Warn,
            format!("{}: documents whose rows are gone stay in {}: {why}", mapping.table, mapping.index),
        );
    };
    if !mapping.exclusive {
        refuse("other tables go to that index too");
    } else if context.handler.is_some() {
        refuse("a handler decides what goes there");
    } else if refused > 0 {
        // The old document of a refused row would go as well.
        refuse(&format!("{refused} rows of the copy were refused; mend those first, then copy it again"));
    } else {
        let swept = context.sink.sweep(&mapping.index, version, version, |_| false, stop).await?;
        context
            .counters
            .notice(Level::Info, format!("{}: {} documents removed whose rows are gone", mapping.table, swept.removed));
        return Ok(swept.newest);
    }
    Ok(0)
}

/// Copies one table again while the stream goes on, then removes the documents whose rows are gone.
///
/// Everything that the stream deletes meanwhile is remembered from before the snapshot is asked for
/// ([`DeleteSet`]); the snapshot of a temporary slot is exact against the stream of any other slot.
/// A crash leaves the wish in the ledger, and the next start copies it again.
///
/// # Errors
/// PostgreSQL fails, or `stop` is cancelled: the documents are all valid then, and nothing is removed.
pub async fn again(
    context: &Context,
    ledger: &Arc<Ledger>,
    table: &Arc<TableMapping>,
    stop: &CancellationToken,
) -> Result<Ended, Problem> {
    let number = table.number;
    let deletes = context.resnapshots.begin(number);
    let outcome = again_recorded(context, ledger, table, &deletes, stop).await;
    context.resnapshots.end(number);
    if let Ok(Ended::Released) = outcome {
        let held = [number];
        tokio::select! {
            () = context.resumed(&held) => {}
            () = stop.cancelled() => return Err(copy::stopped()),
        }
    }
    outcome
}

async fn again_recorded(
    context: &Context,
    ledger: &Arc<Ledger>,
    mapping: &Arc<TableMapping>,
    deletes: &Arc<DeleteSet>,
    stop: &CancellationToken,
) -> Result<Ended, Problem> {
    // Until the sweep has ended: whatever cuts this short, it is done again from its beginning.
    let wish = ledger.want(&mapping.table).await?;
    let temporary = temporary_slot();
    let (keeper, tables) = tokio::select! {
        taken = Keeper::take(context, Origin::TemporarySlot(&temporary), std::slice::from_ref(mapping)) => taken?,
        () = stop.cancelled() => return Err(copy::stopped()),
    };
    let [table] = tables.as_slice() else { return Ok(Ended::Copied) };
    let version = keeper.lsn.0.saturating_sub(1);
    let ranges = context.plan(table).await?;
    ledger.replan(&table.mapping.table, keeper.lsn, &ranges).await?;
    let chunks = ledger.chunks().await?;
    show(context, &tables, &chunks);
    let copied = context.copy(ledger, &keeper, &tables, Some(Arc::clone(deletes)), stop).await;
    let keeper_lsn = keeper.lsn;
    drop(keeper);
    // Also when the copy was given up: some rows of it may have arrived behind their deletes.
    redo_deletes(context, &table.mapping, deletes, version).await?;
    let copied = copied?;
    let Some(copied) = copied else { return Ok(Ended::Released) };
    if deletes.overflowed() {
        return Err(Problem::new(
            ProblemKind::Setup,
            format!("{}: more rows were deleted during the copy than pgtide remembers", table.mapping.table),
            "Copy it again at a quieter time. The documents are valid; only deleted rows may still have one.",
        ));
    }
    stream_passes(context, keeper_lsn, stop).await?;
    sweep(context, &table.mapping, version, copied.rejected, stop).await?;
    remember_index(context, ledger, mapping).await?;
    ledger.define(&mapping.table, &table.seen).await?;
    ledger.granted(&mapping.table, wish).await?;
    settle_total(context, table);
    let rows = context.counters.tables[table.mapping.number].rows_done.load(Relaxed);
    context.counters.notice(Level::Info, format!("{}: copied again, {rows} rows", table.mapping.table));
    Ok(Ended::Copied)
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

/// Notes in which index the documents of a table are, so that another one of its name is noticed.
///
/// # Errors
/// It is another already than when the copy began.
async fn remember_index(context: &Context, ledger: &Ledger, mapping: &TableMapping) -> Result<(), Problem> {
    if context.handler.is_some() {
        return Ok(());
    }
    let Some(uuid) = context.sink.client().index_uuid(&mapping.index).await? else { return Ok(()) };
    ledger.remember_index(&mapping.table, &uuid).await
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
        context.sink.deliver(body, &CancellationToken::new()).await?;
    }
    Ok(())
}
