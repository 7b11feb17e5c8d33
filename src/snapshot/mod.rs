//! The copy: chunks, ledger, keeper, workers; the first copy, its resumption, and a copy made again.

mod again;
mod copy;
mod deletes;
mod first;
mod keeper;
mod ledger;
mod plan;
mod progress;
mod resnapshots;
mod share;

use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

pub use self::again::again;
pub use self::copy::{Copied, CopyTable, Copying};
pub use self::deletes::DeleteSet;
pub(crate) use self::deletes::action_key;
pub use self::first::{forget_others, initial};
pub(crate) use self::keeper::session;
pub use self::keeper::{Keeper, Origin};
pub(crate) use self::ledger::try_lock;
pub use self::ledger::{ChunkRow, Done, Job, Leader, Ledger, Offer, Offered, Position, Recorded, Remembered};
pub use self::plan::{Bounds, Range, by_key, by_pages, integer_key};
pub use self::progress::Progress;
pub use self::resnapshots::{Resnapshots, Turn};
pub use self::share::{Share, help};
use crate::change::Handler;
use crate::config::{Config, Mode, Strategy};
use crate::gate::{Gate, Pass};
use crate::mapping::TableMapping;
use crate::postgres::catalog::Leaf;
use crate::postgres::definition::Seen;
use crate::postgres::preflight::Ready;
use crate::problem::Problem;
use crate::sink::Sink;
use crate::status::{ChunkState, Level, TableState};
use crate::telemetry::Counters;

/// What every copy needs.
#[derive(Clone)]
pub struct Context {
    /// The configuration.
    pub config: Arc<Config>,
    /// Where documents go.
    pub sink: Sink,
    /// What named its cluster when this process connected: [`ServerInfo::cluster`](crate::sink::ServerInfo::cluster).
    pub cluster: String,
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
        let offer =
            Offer { snapshot: keeper.snapshot.clone(), lsn: keeper.lsn, tables: self.plan_of(&tables, &self.cluster) };
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

    /// Ends, and says so, when for `releaseAfter` every worker has waited for the operator, with nothing on its way, here or
    /// in a process that helps; at once where a resnapshot is held and another one waits for its turn.
    /// Never in mode `snapshot_only`: without a stream, what is left fits no other snapshot.
    async fn paused_for_long(&self, copying: &Copying, workers: usize) {
        let config = &self.config.cdc.snapshot;
        if self.config.mode() == Mode::SnapshotOnly {
            return std::future::pending().await;
        }
        let mut since = None;
        let mut ticks = tokio::time::interval(Duration::from_millis(200));
        loop {
            ticks.tick().await;
            let held = copying.waiting.load(SeqCst) == workers && !copying.held().is_empty();
            // What cannot be asked is taken for work.
            let idle = (self.gate.holds_all() || held) && matches!(copying.ledger.others_at_work().await, Ok(false));
            if held && idle && copying.deletes.is_some() && !self.gate.is_closed() && self.another_waits() {
                let text = "a held table is left for now, so that others are copied; resumed, its copy begins again";
                self.counters.notice(Level::Info, text);
                return;
            }
            match since.filter(|_| idle) {
                None => since = idle.then(Instant::now),
                Some(since) if since.elapsed() >= config.release_after => break,
                Some(_) => {}
            }
        }
        let after = humantime::format_duration(config.release_after);
        self.counters.notice(
            Level::Info,
            format!("the pause has lasted {after}: the snapshot is let go; resumed, the copy takes a new one"),
        );
    }

    /// A place at the gate, once it is open.
    async fn pass(&self) -> Result<Pass, Problem> {
        let mut pass = self.gate.enter();
        tokio::select! {
            () = pass.wait() => {}
            () = self.stop.cancelled() => return Err(copy::stopped()),
        }
        Ok(pass)
    }

    /// A resnapshot waits for its turn that the operator does not hold.
    fn another_waits(&self) -> bool {
        let mut tables = self.counters.tables.iter().enumerate();
        tables.any(|(number, table)| !table.paused.load(Relaxed) && self.resnapshots.is_due(number))
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

fn copy_table(mapping: &Arc<TableMapping>, ready: &Ready) -> CopyTable {
    let info = &ready.info;
    CopyTable {
        mapping: Arc::clone(mapping),
        shape: Arc::new(mapping.shape(info.columns.clone(), None)),
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

/// The name of a slot that lives for a moment; slot names are shared by all databases of a server.
fn temporary_slot() -> String {
    format!("pgtide_tmp_{}_{:08x}", std::process::id(), fastrand::u32(..))
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
        let swept = context.sink.sweep(&mapping.index, version, version, |_| false, &context.gate, stop).await?;
        context
            .counters
            .notice(Level::Info, format!("{}: {} documents removed whose rows are gone", mapping.table, swept.removed));
        return Ok(swept.newest);
    }
    Ok(0)
}

/// Notes in which index the documents of a table are, so that another one of its name is noticed.
///
/// # Errors
/// It is another already than when the copy began.
async fn remember_index(context: &Context, ledger: &Ledger, mapping: &TableMapping) -> Result<(), Problem> {
    if context.handler.is_some() {
        return Ok(());
    }
    let _pass = context.pass().await?;
    let Some(uuid) = context.sink.client().index_uuid(&mapping.index).await? else { return Ok(()) };
    ledger.remember_index(&mapping.table, &uuid).await
}
