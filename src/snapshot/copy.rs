//! Workers that copy chunks into Elasticsearch.
//!
//! A worker streams `COPY ... TO STDOUT` of one chunk after another under the exported snapshot, writes each row
//! straight into a bulk body, and has one body under construction and one on its way. A chunk is completed only when
//! the body that holds its last document, and by order every one before it, has been answered for.

use std::collections::{HashMap, HashSet};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicUsize};
use std::time::{Instant, SystemTime};

use futures_util::StreamExt;
use tokio::task::JoinHandle;
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::deletes::{DeleteSet, action_key};
use super::keeper;
use super::ledger::{ChunkRow, Done, Ledger, Offer};
use super::share::Share;
use crate::change::{ActionBody, Field, Handler, Operation, Row};
use crate::config::Cdc;
use crate::gate::{Gate, Pass};
use crate::mapping::{Handled, Shape, TableMapping, unwritable, write_row};
use crate::postgres::connect::connect;
use crate::problem::{Problem, ProblemKind};
use crate::sink::{Body, Sink};
use crate::status::{ChunkState, Event, EventKind, TableState};
use crate::table::TableId;
use crate::telemetry::{Counters, now};
use crate::text::copy::Splitter;
use crate::version;

/// What the workers share.
pub struct Copying {
    /// How to reach PostgreSQL.
    pub cdc: Cdc,
    /// Where claims and completions are written.
    pub ledger: Arc<Ledger>,
    /// Where documents go.
    pub sink: Sink,
    /// Where progress is shown.
    pub counters: Arc<Counters>,
    /// The tables of the copy.
    pub tables: HashMap<TableId, CopyTable>,
    /// The exported snapshot.
    pub offer: Offer,
    /// This process helps another one, whose snapshot it is.
    pub share: Option<Arc<Share>>,
    /// Bodies are handed over at so many documents or bytes.
    pub limits: (usize, usize),
    /// Waits here while paused.
    pub gate: Gate,
    /// An embedder's code.
    pub handler: Option<Arc<dyn Handler>>,
    /// The delete set of a resnapshot.
    pub deletes: Option<Arc<DeleteSet>>,
    /// Workers that wait, with nothing on its way, because the operator holds every table that is left.
    pub waiting: AtomicUsize,
    /// Ends the copy.
    pub stop: CancellationToken,
}

/// One table of the copy.
pub struct CopyTable {
    /// Where it goes.
    pub mapping: Arc<TableMapping>,
    /// Its columns as they are in the snapshot.
    pub shape: Arc<Shape>,
    /// `"id", "name", ...`.
    pub select_list: String,
    /// Only rows that meet this SQL condition.
    pub condition: Option<String>,
    /// The column by which it can be cut into ranges of integers; empty where there is none.
    pub integer_key: String,
}

/// What the workers did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Copied {
    /// Items that a newer document was in the way of.
    pub superseded: u64,
    /// Items refused for good, now among the dead letters.
    pub rejected: u64,
}

impl Copying {
    /// Copies every claimable chunk with `workers` workers; ends when all chunks of its tables are completed, by whomever, or
    /// with the first worker's problem, when what this process has claimed stays so in the ledger.
    ///
    /// # Errors
    /// PostgreSQL fails or the copy is stopped. Elasticsearch's failures are waited out.
    pub async fn run(self: Arc<Self>, workers: usize) -> Result<Copied, Problem> {
        let stop = self.stop.child_token();
        let _stop_all = stop.clone().drop_guard();
        // While the stream goes on, a row may arrive behind its delete: what is on its way at a stop is waited for, unless
        // nobody waits for the copy any more.
        let give_up = if self.deletes.is_some() { CancellationToken::new() } else { stop.clone() };
        let _give_up = give_up.clone().drop_guard();
        let workers = u32::try_from(workers).unwrap_or(u32::MAX);
        let _workers = Counted::new(&self.counters.workers, workers);
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..workers {
            let worker = Worker::new(Arc::clone(&self), stop.clone(), give_up.clone());
            tasks.spawn(worker.run());
        }
        let (mut copied, mut problem) = (Copied::default(), None);
        while let Some(ended) = tasks.join_next().await {
            match ended.unwrap_or_else(|panic| {
                Err(Problem::new(ProblemKind::Internal, format!("a copy worker died: {panic}"), "Report this."))
            }) {
                Ok(done) => {
                    copied.superseded += done.superseded;
                    copied.rejected += done.rejected;
                }
                Err(error) => {
                    stop.cancel();
                    // Those that stop because of the first say so in their own words; the first is the reason.
                    problem.get_or_insert(error);
                }
            }
        }
        problem.map_or(Ok(copied), Err)
    }

    /// Documents of a table that were refused for good and not said to the ledger yet: those of the chunk that has just been
    /// answered for, and maybe some of others.
    fn newly_refused(&self, table: usize) -> u64 {
        let stats = self.sink.stats();
        let number = u32::try_from(table).unwrap_or(u32::MAX);
        let refused = stats.rejected_by_table.get(&number).copied().unwrap_or(0);
        refused.saturating_sub(self.counters.tables[table].refused_said.swap(refused, Relaxed))
    }

    /// The version of the documents.
    fn version(&self) -> u64 {
        version::before(self.offer.lsn)
    }

    /// Makes sure that the snapshot is still that of whoever leads.
    ///
    /// # Errors
    /// Another process leads by now, or nobody.
    async fn is_led(&self) -> Result<(), Problem> {
        // Who can ask has the lock still: it belongs to the connection.
        let offered = self.ledger.offered().await?;
        let same = offered.is_some_and(|offered| offered.offer == self.offer);
        if self.share.is_none() || same { Ok(()) } else { Err(keeper::gone()) }
    }

    /// Tables that the operator of the process that leads holds.
    pub(super) fn held(&self) -> Vec<String> {
        if let Some(share) = &self.share {
            return share.held();
        }
        let held = |table: &&CopyTable| self.counters.tables[table.mapping.number].paused.load(Relaxed);
        self.tables.values().filter(held).map(|table| table.mapping.table.to_string()).collect()
    }
}

/// What counts for as long as this lives: a task that copies may be dropped wherever it waits.
struct Counted<'a>(&'a AtomicU32, u32);

impl<'a> Counted<'a> {
    fn new(figure: &'a AtomicU32, by: u32) -> Self {
        figure.fetch_add(by, Relaxed);
        Self(figure, by)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(self.1, Relaxed);
    }
}

/// Part of a chunk that is in a body.
struct Segment {
    chunk: ChunkRow,
    table: usize,
    rows: u64,
    /// The chunk ends in this body and held so many rows in all.
    end: Option<(u64, Instant)>,
}

struct Worker {
    copying: Arc<Copying>,
    stop: CancellationToken,
    /// Ends what is on its way.
    give_up: CancellationToken,
    body: Body,
    segments: Vec<Segment>,
    flying: Option<JoinHandle<Result<Copied, Problem>>>,
    copied: Copied,
    id: Vec<u8>,
    /// Leaves that this session has locked, and found to be as they were planned.
    locked: HashSet<TableId>,
}

impl Worker {
    fn new(copying: Arc<Copying>, stop: CancellationToken, give_up: CancellationToken) -> Self {
        let body = copying.sink.body();
        Self {
            copying,
            stop,
            give_up,
            body,
            segments: Vec::new(),
            flying: None,
            copied: Copied::default(),
            id: Vec::new(),
            locked: HashSet::new(),
        }
    }

    async fn run(mut self) -> Result<Copied, Problem> {
        let outcome = self.work().await;
        if outcome.is_err() && self.copying.deletes.is_some() {
            // The first problem is the reason.
            let _ = self.landed().await;
        }
        outcome.map(|()| self.copied)
    }

    async fn work(&mut self) -> Result<(), Problem> {
        let copying = Arc::clone(&self.copying);
        let client = connect(&copying.cdc, "copy").await?;
        keeper::import(&client, &copying.offer.snapshot).await?;
        // Once the server has restarted, another snapshot may have that name.
        copying.is_led().await?;
        let mut pass = copying.gate.enter();
        let mut splitter = Splitter::default();
        // A resnapshot's only: another table's that was cut short has chunks in the ledger, too.
        let tables: Vec<String> = copying.tables.keys().map(ToString::to_string).collect();
        let mut waits = false;
        while !self.stop.is_cancelled() {
            self.park(&mut pass).await?;
            let claimed = copying.ledger.claim(1, &tables, &copying.held()).await?;
            let Some(chunk) = claimed.into_iter().next() else {
                self.settle().await?;
                if copying.ledger.unfinished(copying.tables.keys()).await? {
                    // The rest belongs to tables that the operator holds, or is in the hands of others, who may yet die.
                    if !copying.held().is_empty() && !std::mem::replace(&mut waits, true) {
                        copying.waiting.fetch_add(1, SeqCst);
                    }
                    self.wait_for_release(&mut pass).await;
                    continue;
                }
                break;
            };
            if std::mem::take(&mut waits) {
                copying.waiting.fetch_sub(1, SeqCst);
            }
            let _active = Counted::new(&copying.counters.active_workers, 1);
            self.chunk(&client, chunk, &mut splitter, &mut pass).await?;
        }
        if self.stop.is_cancelled() {
            return Err(stopped());
        }
        self.settle().await?;
        // Ends the transaction, so that the server logs no broken connection.
        client.batch_execute("COMMIT").await?;
        Ok(())
    }

    /// Waits while the gate is closed, with nothing on its way.
    async fn park(&mut self, pass: &mut Pass) -> Result<(), Problem> {
        if !pass.is_closed() {
            return Ok(());
        }
        self.settle().await?;
        tokio::select! {
            () = self.stop.cancelled() => Err(stopped()),
            () = pass.wait() => Ok(()),
        }
    }

    async fn wait_for_release(&self, pass: &mut Pass) {
        let tick = tokio::time::sleep(std::time::Duration::from_millis(200));
        tokio::select! {
            () = self.stop.cancelled() => {}
            () = pass.closing() => {}
            () = tick => {}
        }
    }

    async fn chunk(
        &mut self,
        client: &Client,
        chunk: ChunkRow,
        splitter: &mut Splitter,
        pass: &mut Pass,
    ) -> Result<(), Problem> {
        let copying = Arc::clone(&self.copying);
        let Some(table) = copying.tables.get(&chunk.table) else {
            return Err(Problem::new(
                ProblemKind::Setup,
                format!("the ledger has chunks of {}, which is not in the configuration", chunk.table),
                "Add the table again, or start with `cdc.snapshot.resnapshot: true`.",
            ));
        };
        let number = table.mapping.number;
        let counters = &copying.counters.tables[number];
        counters.set_chunk(chunk.index, ChunkState::Claimed);
        if counters.state() == TableState::Queued {
            counters.set_state(TableState::Copying);
        }
        let began = Instant::now();
        if !self.locked.contains(&chunk.range.leaf) {
            keeper::lock_planned(client, &chunk.range).await?;
            self.locked.insert(chunk.range.leaf.clone());
        }
        let mut condition = chunk.range.bounds.condition(&table.integer_key);
        if let Some(filter) = &table.condition {
            // It may end with a comment.
            condition = format!("{condition} AND ({filter}\n)");
        }
        let sql = format!(
            "COPY (SELECT {} FROM ONLY {} WHERE {condition}) TO STDOUT",
            table.select_list,
            chunk.range.leaf.quoted()
        );
        let mut lines = pin!(client.copy_out(&sql).await?);
        let (mut rows, mut reported) = (0, 0);
        while let Some(line) = lines.next().await {
            let line = line?;
            if line.len() >= copying.limits.1 && !self.body.is_empty() {
                // It fills a body by itself. A server that takes no such body is to refuse nothing but that.
                self.segments.push(Segment { chunk: chunk.clone(), table: number, rows: rows - reported, end: None });
                reported = rows;
                self.hand_over().await?;
            }
            self.row(table, splitter.split(&line).iter(), &line)?;
            rows += 1;
            if self.body.bytes() >= copying.limits.1 || self.body.len() >= copying.limits.0 {
                self.segments.push(Segment { chunk: chunk.clone(), table: number, rows: rows - reported, end: None });
                reported = rows;
                self.hand_over().await?;
                self.park(pass).await?;
                if self.stop.is_cancelled() {
                    return Err(stopped());
                }
            }
        }
        self.segments.push(Segment { chunk, table: number, rows: rows - reported, end: Some((rows, began)) });
        if self.body.is_empty() || self.segments.len() >= 64 {
            // Nothing of it is left to send, or many small chunks wait for one body to fill.
            self.hand_over().await?;
        }
        Ok(())
    }

    #[inline]
    fn row<'a>(
        &mut self,
        table: &CopyTable,
        fields: impl ExactSizeIterator<Item = Field<'a>> + Clone,
        line: &[u8],
    ) -> Result<(), Problem> {
        let copying = &self.copying;
        if let Some(handler) = &copying.handler {
            let fields: Vec<Field<'_>> = fields.collect();
            if fields.len() != table.shape.columns().len() {
                return Err(ragged(table, line.len()));
            }
            let row = Row { columns: table.shape.columns(), fields: &fields };
            let handled = Handled {
                handler,
                mapping: &table.mapping,
                lsn: copying.offer.lsn,
                commit_time: SystemTime::now(),
                xid: 0,
            };
            for action in handled.actions(Operation::Snapshot, Some(row), None) {
                let gone = |deletes: &Arc<DeleteSet>| deletes.contains(&action_key(&action), copying.version());
                if matches!(action.body, ActionBody::Index(_)) && copying.deletes.as_ref().is_some_and(gone) {
                    continue;
                }
                self.body.action(&table.mapping.target, &action, copying.version()).map_err(unwritable)?;
            }
            return Ok(());
        }
        if !table.shape.id(&mut self.id, fields.clone()) {
            return Err(ragged(table, line.len()));
        }
        if copying.deletes.as_ref().is_some_and(|deletes| deletes.contains(&self.id, copying.version())) {
            return Ok(());
        }
        write_row(&mut self.body, &table.mapping.target, &table.shape, &self.id, copying.version(), fields)
            .map_err(|_| ragged(table, line.len()))
    }

    /// Sends the body once the one before it has been answered for.
    async fn hand_over(&mut self) -> Result<(), Problem> {
        self.landed().await?;
        let body = std::mem::replace(&mut self.body, self.copying.sink.body());
        let segments = std::mem::take(&mut self.segments);
        let (copying, give_up) = (Arc::clone(&self.copying), self.give_up.clone());
        self.flying = Some(tokio::spawn(async move { deliver(&copying, body, segments, &give_up).await }));
        Ok(())
    }

    /// Waits for the answer to the body that is on its way.
    async fn landed(&mut self) -> Result<(), Problem> {
        let Some(flying) = self.flying.take() else { return Ok(()) };
        let copied = flying.await.map_err(|panic| {
            Problem::new(ProblemKind::Internal, format!("a delivery died: {panic}"), "Report this.")
        })??;
        self.copied.superseded += copied.superseded;
        self.copied.rejected += copied.rejected;
        Ok(())
    }

    /// Sends what there is and waits until all of it is answered for.
    async fn settle(&mut self) -> Result<(), Problem> {
        if !self.body.is_empty() || !self.segments.is_empty() {
            self.hand_over().await?;
        }
        self.landed().await
    }
}

async fn deliver(
    copying: &Copying,
    body: Body,
    segments: Vec<Segment>,
    give_up: &CancellationToken,
) -> Result<Copied, Problem> {
    let mut copied = Copied::default();
    if !body.is_empty() {
        let delivered = copying.sink.deliver(body, give_up).await?;
        copied = Copied { superseded: delivered.superseded, rejected: delivered.rejected };
    }
    if copied.superseded > 0 && copying.deletes.is_none() {
        // Nothing streams yet, so nothing of this server's making can be newer than the snapshot of whoever leads. What is
        // would keep every change of its row out. A new leader's snapshot is newer than that of the one before.
        copying.is_led().await?;
        let table = segments.first().map(|segment| &copying.counters.tables[segment.table]);
        return Err(foreign(table.map_or("", |table| table.index.as_str()), copying.version()));
    }
    let mut ended = Vec::new();
    for segment in &segments {
        if let Some((rows, _)) = segment.end {
            let refused = copying.newly_refused(segment.table);
            ended.push(Done { id: segment.chunk.id, token: segment.chunk.token, rows, refused });
        }
    }
    copying.ledger.complete(&ended).await?;
    for segment in segments {
        let table = &copying.counters.tables[segment.table];
        table.rows_done.fetch_add(segment.rows, Relaxed);
        table.snapshot_rows.fetch_add(segment.rows, Relaxed);
        if let Some((rows, began)) = segment.end {
            table.set_chunk(segment.chunk.index, ChunkState::Done);
            let event = Event {
                at: now(),
                kind: EventKind::Snapshot,
                table: u32::try_from(segment.table).unwrap_or(u32::MAX),
                key: format!("{}/{}", segment.chunk.index + 1, table.chunk_count()),
                latency: Some(began.elapsed().as_secs_f64()),
                rows: Some(rows),
                ..Event::default()
            };
            copying.counters.event(event, 1);
            tracing::info!(
                table = %table.table,
                chunk = segment.chunk.index + 1,
                of = table.chunk_count(),
                rows,
                "snapshot data captured"
            );
        }
    }
    Ok(copied)
}

/// The index holds what cannot be of this server's making.
pub(super) fn foreign(index: &str, version: u64) -> Problem {
    Problem::new(
        ProblemKind::Gap,
        format!(
            "index {index} holds documents of a later version than this PostgreSQL has reached ({})",
            version::position(version)
        ),
        "They were written from another server, or before this one was restored from a backup or promoted, and would keep \
         newer rows out. Delete that index or name another in `elasticsearch.tableIndexMapping`, then start again.",
    )
}

pub(super) fn stopped() -> Problem {
    Problem::new(ProblemKind::Internal, "the copy was stopped", "It goes on at the next start.").transient()
}

fn ragged(table: &CopyTable, bytes: usize) -> Problem {
    Problem::new(
        ProblemKind::Internal,
        format!(
            "a copied line of {bytes} bytes does not fit the {} columns of {}",
            table.shape.columns().len(),
            table.mapping.table
        ),
        "Report this. Nothing of that chunk counts as copied.",
    )
}
