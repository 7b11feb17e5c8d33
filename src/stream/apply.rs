//! Changes to operations on documents, in the order of commits.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

use super::fill::{current_row, seen};
use super::relations::{Relation, Relations};
use super::tracker::Tracker;
use crate::broken::{Rule, broken};
use crate::change::{Action, ActionBody, Field, Handler, Operation, Row};
use crate::gate::Gate;
use crate::lsn::Lsn;
use crate::mapping::{Handled, TableMapping, unwritable, write_row};
use crate::postgres::definition::Announced;
use crate::postgres::pgoutput::{self, Message, Oids, Old, Tuple, decode, system_time};
use crate::problem::{Problem, ProblemKind};
use crate::sink::{Lanes, Sink};
use crate::snapshot::{Resnapshots, action_key};
use crate::status::{Event, EventKind, Level, Micros};
use crate::telemetry::{Counters, now};
use crate::text::copy::Splitter;
use crate::version;

/// Events that are shown of one read of the socket; more of them stand behind these.
const SHOWN_PER_READ: u32 = 8;
/// Events that wait for their answer; beyond it the newest stand behind the ones that wait.
const STAGED: usize = 1_000;

/// How long the stream waits for an Elasticsearch that fails before it lets go of the slot.
const PATIENCE: Duration = Duration::from_secs(60);

/// The transaction that is arriving.
#[derive(Clone, Copy, Debug, Default)]
struct Transaction {
    commit: Lsn,
    committed_at: Micros,
    xid: u32,
    /// It changes documents.
    mapped: bool,
    /// Other sessions see it.
    seen: bool,
}

/// Writes rows and their ends into the lanes.
struct Writer {
    lanes: Lanes,
    resnapshots: Arc<Resnapshots>,
    id: Vec<u8>,
    old_id: Vec<u8>,
    /// Where the change stands in the log.
    change: Lsn,
    /// Its place in the transaction, changes of tables that go nowhere included.
    operation: u64,
}

impl Writer {
    /// The version of this operation of the transaction that commits at `commit`.
    #[inline]
    fn version(&self, commit: Lsn) -> u64 {
        if broken(Rule::CommitVersion) { version::of(self.change, 0) } else { version::of(commit, self.operation) }
    }

    /// Writes a row as its document, and removes the one under the key that it had in `old`.
    #[inline]
    fn put<'a>(
        &mut self,
        relation: &Relation,
        mapping: &TableMapping,
        commit: Lsn,
        old: Option<Tuple<'_>>,
        fields: impl Iterator<Item = Field<'a>> + Clone,
    ) -> Result<(), Problem> {
        let named = relation.shape.id(&mut self.id, fields.clone());
        if !named && !relation.shape.precedes_key(fields.clone()) {
            return Err(misfit(relation));
        }
        if let Some(old) = old
            && relation.shape.id(&mut self.old_id, old.iter())
            && !(named && self.old_id == self.id)
        {
            let version = self.version(commit);
            remove(&mut self.lanes, &self.resnapshots, mapping, &self.old_id, commit, version);
        }
        if !named {
            return Ok(());
        }
        let version = self.version(commit);
        let body = self.lanes.body_for(&mapping.target, &self.id, commit);
        write_row(body, &mapping.target, &relation.shape, &self.id, version, fields).map_err(|_| misfit(relation))
    }
}

/// Applies what the stream says.
pub(super) struct Applier {
    writer: Writer,
    pub(super) tracker: Tracker,
    pub(super) relations: Relations,
    pub(super) client: Client,
    pub(super) sink: Sink,
    pub(super) counters: Arc<Counters>,
    pub(super) handler: Option<Arc<dyn Handler>>,
    pub(super) stop: CancellationToken,
    /// Where the last transaction that changed documents ends.
    pub(super) changes: Lsn,
    transaction: Transaction,
    staged: VecDeque<(Lsn, Event, u64)>,
    shown: u32,
    hidden: u64,
}

/// What a change leaves to be waited for.
enum Left {
    Nothing,
    /// Columns that PostgreSQL did not send have to be read.
    Fill,
}

impl Applier {
    #[allow(clippy::too_many_arguments, reason = "built in one place")]
    pub(super) fn new(
        lanes: Lanes,
        relations: Relations,
        client: Client,
        sink: Sink,
        counters: Arc<Counters>,
        handler: Option<Arc<dyn Handler>>,
        resnapshots: Arc<Resnapshots>,
        stop: CancellationToken,
    ) -> Self {
        Self {
            writer: Writer { lanes, resnapshots, id: Vec::new(), old_id: Vec::new(), change: Lsn::ZERO, operation: 0 },
            tracker: Tracker::default(),
            relations,
            client,
            sink,
            counters,
            handler,
            stop,
            changes: Lsn::ZERO,
            transaction: Transaction::default(),
            staged: VecDeque::new(),
            shown: 0,
            hidden: 0,
        }
    }

    pub(super) fn lanes(&mut self) -> &mut Lanes {
        &mut self.writer.lanes
    }

    /// The message that comes next stands there in the log.
    #[inline]
    pub(super) fn at(&mut self, change: Lsn) {
        self.writer.change = change;
    }

    /// A new read of the socket begins: a few more events may be shown.
    pub(super) fn new_read(&mut self) {
        self.shown = 0;
    }

    /// Applies one message. Waits where a body is full and its lane busy, and for what the message needs to have read.
    /// False: Elasticsearch takes nothing, and it is not known for how long.
    ///
    /// # Errors
    /// The message cannot be decoded, PostgreSQL fails on a question, or the sink was stopped.
    #[inline]
    pub(super) async fn apply(&mut self, data: &[u8]) -> Result<bool, Problem> {
        let message = decode(data).map_err(|error| {
            Problem::new(
                ProblemKind::Internal,
                format!("PostgreSQL sent what pgtide cannot read: {error}"),
                "Report this.",
            )
        })?;
        if self.writer.lanes.make_way(data.len()) && !self.flush_full().await? {
            return Ok(false);
        }
        let is_operation = matches!(
            message,
            Message::Insert { .. } | Message::Update { .. } | Message::Delete { .. } | Message::Truncate { .. }
        );
        match message {
            Message::Insert { oid, new } => {
                self.touches(oid);
                self.insert(oid, new)?;
            }
            Message::Update { oid, old, new } => {
                self.touches(oid);
                if let Left::Fill = self.update(oid, old, new, None)? {
                    self.fill(oid, old, new).await?;
                }
            }
            Message::Delete { oid, old, .. } => {
                self.touches(oid);
                self.delete(oid, old)?;
            }
            Message::Begin { final_lsn, commit_time, xid } => {
                self.transaction =
                    Transaction { commit: final_lsn, committed_at: commit_time, xid, mapped: false, seen: false };
                self.writer.operation = 0;
                self.tracker.begin(final_lsn);
            }
            Message::Commit { end_lsn, commit_time, .. } => {
                let received = now();
                self.tracker.commit(end_lsn, commit_time, received);
                if self.transaction.mapped {
                    self.changes = end_lsn;
                }
                // Version 14 sends transactions without a published change as well, our own on the ledger among them.
                self.counters.transactions.fetch_add(u64::from(self.transaction.mapped), Relaxed);
                self.counters.received_lsn.fetch_max(end_lsn.0, Relaxed);
                self.counters.cdc_latency.store((received - commit_time).max(0), Relaxed);
            }
            Message::Relation(relation) => {
                if self.relations.announce(&self.client, &relation, self.transaction.xid).await? {
                    self.renamed_documents(relation.oid).await?;
                }
                self.relations.followed(relation.oid);
                self.announced(&relation).await?;
            }
            Message::Truncate { oids, .. } => {
                oids.iter().for_each(|oid| self.touches(oid));
                self.truncate(oids).await?;
            }
            // Not asked for, or of no consequence: origins, types, logical messages (a heartbeat's among them).
            Message::Type { .. } | Message::Origin { .. } | Message::Logical { .. } => {}
        }
        if is_operation {
            self.writer.operation += 1;
        }
        if self.writer.lanes.needs_flush() {
            return self.flush_full().await;
        }
        Ok(true)
    }

    async fn flush_full(&mut self) -> Result<bool, Problem> {
        loop {
            match tokio::time::timeout(PATIENCE, self.writer.lanes.flush_full()).await {
                Ok(flushed) => return flushed.map(|()| true).map_err(Problem::from),
                Err(_) if self.sink.stats().trouble.is_some() => return Ok(false),
                // Slow, but it goes on.
                Err(_) => {}
            }
        }
    }

    /// The stream begins again: what arrived in part comes once more.
    pub(super) fn restart(&mut self) {
        self.transaction = Transaction::default();
        self.tracker.restart();
    }

    /// A change of a mapped table arrives: from here on documents may be as far as its commit.
    #[inline]
    fn touches(&mut self, oid: u32) {
        if !self.transaction.mapped && self.relations.get(oid).is_some_and(|relation| relation.mapping.is_some()) {
            self.transaction.mapped = true;
            self.counters.applied_lsn.fetch_max(self.transaction.commit.0, Relaxed);
        }
    }

    #[inline]
    fn insert(&mut self, oid: u32, new: Tuple<'_>) -> Result<(), Problem> {
        let Some((relation, mapping)) = mapped(&self.relations, oid)? else { return Ok(()) };
        self.counters.tables[mapping.number].inserts.fetch_add(1, Relaxed);
        let transaction = self.transaction;
        if let Some(handler) = self.handler.clone() {
            let fields: Vec<Field<'_>> = new.iter().collect();
            let actions =
                handled(&handler, mapping, transaction).actions(Operation::Insert, Some(row(relation, &fields)), None);
            let mapping = Arc::clone(mapping);
            return self.act(&mapping, &actions, EventKind::Insert);
        }
        self.writer.put(relation, mapping, transaction.commit, None, new.iter())?;
        let number = mapping.number;
        self.show(EventKind::Insert, number);
        Ok(())
    }

    /// `filled`: the whole row in place of `new`, from elsewhere.
    fn update(
        &mut self,
        oid: u32,
        old: Option<(Old, Tuple<'_>)>,
        new: Tuple<'_>,
        filled: Option<&[Field<'_>]>,
    ) -> Result<Left, Problem> {
        let Some((relation, mapping)) = mapped(&self.relations, oid)? else { return Ok(Left::Nothing) };
        let mut merged: Vec<Field<'_>> = Vec::new();
        if let Some(filled) = filled {
            merged.extend_from_slice(filled);
        } else if new.has_unchanged() {
            // Under REPLICA IDENTITY FULL the old row has what the new one leaves out.
            let old_fields = match old {
                Some((Old::Full, old)) => Some(old.iter()),
                _ => None,
            };
            match old_fields {
                Some(old) => {
                    merged.extend(new.iter().zip(old).map(|(new, old)| if new == Field::Unchanged { old } else { new }))
                }
                None if broken(Rule::Fill) => {
                    merged.extend(new.iter().map(|new| if new == Field::Unchanged { Field::Null } else { new }));
                }
                None => return Ok(Left::Fill),
            }
            if merged.contains(&Field::Unchanged) {
                return Ok(Left::Fill);
            }
        }
        let (number, transaction) = (mapping.number, self.transaction);
        self.counters.tables[number].updates.fetch_add(1, Relaxed);
        if let Some(handler) = self.handler.clone() {
            if merged.is_empty() {
                merged.extend(new.iter());
            }
            let old: Option<Vec<Field<'_>>> = old.map(|(_, old)| old.iter().collect());
            let old_row = old.as_deref().map(|fields| row(relation, fields));
            let actions = handled(&handler, mapping, transaction).actions(
                Operation::Update,
                Some(row(relation, &merged)),
                old_row,
            );
            let mapping = Arc::clone(mapping);
            self.act(&mapping, &actions, EventKind::Update)?;
            return Ok(Left::Nothing);
        }
        let old = old.map(|(_, old)| old);
        if merged.is_empty() {
            // The usual way: straight from the message into the body.
            self.writer.put(relation, mapping, transaction.commit, old, new.iter())?;
        } else {
            self.writer.put(relation, mapping, transaction.commit, old, merged.iter().copied())?;
        }
        self.show(EventKind::Update, number);
        Ok(Left::Nothing)
    }

    /// Reads the row that an update left holes in, as it is now, and writes that under the update's version: a newer
    /// content than the update's own is right, as every later change has a higher version. A row that is gone by now
    /// is left alone: its delete, or the update that moved its key, is still to come. An older one would stay for good,
    /// so the transaction has to be seen first.
    async fn fill(&mut self, oid: u32, old: Option<(Old, Tuple<'_>)>, new: Tuple<'_>) -> Result<(), Problem> {
        let Some((relation, _)) = mapped(&self.relations, oid)? else { return Ok(()) };
        if !self.transaction.seen {
            seen(&self.client, self.transaction.xid).await?;
            self.transaction.seen = true;
        }
        let old_row = old.map(|(_, old)| old);
        let (current, read_at) = current_row(&self.client, relation, self.transaction.xid, old_row, new).await?;
        // What was read may be of any transaction until then.
        self.counters.applied_lsn.fetch_max(read_at.0, Relaxed);
        match current {
            Some(line) => {
                let mut splitter = Splitter::default();
                let fields: Vec<Field<'_>> = splitter.split(&line).iter().collect();
                self.update(oid, old, new, Some(&fields))?;
            }
            None => {
                let Some((relation, mapping)) = mapped(&self.relations, oid)? else { return Ok(()) };
                self.counters.tables[mapping.number].updates.fetch_add(1, Relaxed);
                let Some((_, old)) = old else { return Ok(()) };
                let moved = relation.shape.id(&mut self.writer.old_id, old.iter())
                    && relation.shape.id(&mut self.writer.id, new.iter())
                    && self.writer.old_id != self.writer.id;
                if !moved {
                    return Ok(());
                }
                let Some(handler) = self.handler.clone() else {
                    let version = self.writer.version(self.transaction.commit);
                    remove(
                        &mut self.writer.lanes,
                        &self.writer.resnapshots,
                        mapping,
                        &self.writer.old_id,
                        self.transaction.commit,
                        version,
                    );
                    return Ok(());
                };
                // There is no row to show; that the old key has none any more is what can be said.
                let fields: Vec<Field<'_>> = old.iter().collect();
                let actions = handled(&handler, mapping, self.transaction).actions(
                    Operation::Delete,
                    None,
                    Some(row(relation, &fields)),
                );
                let mapping = Arc::clone(mapping);
                self.act(&mapping, &actions, EventKind::Update)?;
            }
        }
        Ok(())
    }

    #[inline]
    fn delete(&mut self, oid: u32, old: Tuple<'_>) -> Result<(), Problem> {
        let Some((relation, mapping)) = mapped(&self.relations, oid)? else { return Ok(()) };
        self.counters.tables[mapping.number].deletes.fetch_add(1, Relaxed);
        let transaction = self.transaction;
        if let Some(handler) = self.handler.clone() {
            let fields: Vec<Field<'_>> = old.iter().collect();
            let actions =
                handled(&handler, mapping, transaction).actions(Operation::Delete, None, Some(row(relation, &fields)));
            let mapping = Arc::clone(mapping);
            return self.act(&mapping, &actions, EventKind::Delete);
        }
        if relation.shape.id(&mut self.writer.id, old.iter()) {
            let (writer, commit) = (&mut self.writer, transaction.commit);
            let version = writer.version(commit);
            remove(&mut writer.lanes, &writer.resnapshots, mapping, &writer.id, commit, version);
        } else if !relation.shape.precedes_key(old.iter()) {
            return Err(misfit(relation));
        }
        let number = mapping.number;
        self.show(EventKind::Delete, number);
        Ok(())
    }

    /// Empties the indices of truncated tables up to this commit, its own transaction's earlier changes included.
    async fn truncate(&mut self, oids: Oids<'_>) -> Result<(), Problem> {
        let version = self.writer.version(self.transaction.commit);
        for oid in oids.iter() {
            let Some((relation, mapping)) = mapped(&self.relations, oid)? else { continue };
            let (mapping, whole) = (Arc::clone(mapping), relation.whole);
            self.counters.tables[mapping.number].truncates.fetch_add(1, Relaxed);
            if let Some(handler) = self.handler.clone() {
                let actions = handled(&handler, &mapping, self.transaction).actions(Operation::Truncate, None, None);
                self.act(&mapping, &actions, EventKind::Truncate)?;
                continue;
            }
            if !whole || !mapping.exclusive {
                // Which documents came from that partition, the index does not tell.
                self.counters.notice(
                    Level::Warn,
                    format!(
                        "{}: a partition was truncated; the table is copied again to remove its documents",
                        mapping.table
                    ),
                );
                self.copy_again(&mapping, "a partition was truncated").await?;
                continue;
            }
            // Nothing older may still be on its way, and nothing younger has been sent.
            self.writer.lanes.drain().await?;
            // The stream's own place at the gate ends it.
            let (below, gate) = (version.saturating_add(1), Gate::default());
            let swept = self.sink.sweep(&mapping.index, below, version, |_| false, &gate, &self.stop).await?;
            self.counters
                .notice(Level::Info, format!("{}: truncated, {} documents removed", mapping.table, swept.removed));
            self.show(EventKind::Truncate, mapping.number);
        }
        Ok(())
    }

    /// Notes which columns documents are made of from here on: they may be others than when it is looked at the table.
    async fn announced(&self, message: &pgoutput::Relation<'_>) -> Result<(), Problem> {
        let Some((relation, mapping)) = mapped(&self.relations, message.oid)? else { return Ok(()) };
        let columns = message.columns.iter().map(|column| (column.name.to_owned(), column.type_oid)).collect();
        let announced = Announced { whole: relation.whole, columns };
        self.writer.resnapshots.announced(&mapping.table, self.transaction.commit, &announced).await
    }

    /// The key of a table has changed, or another table has its name now: documents stand under ids that no change will
    /// name any more.
    async fn renamed_documents(&mut self, oid: u32) -> Result<(), Problem> {
        let Some((_, mapping)) = mapped(&self.relations, oid)? else { return Ok(()) };
        // None of them may arrive behind the sweep.
        self.writer.lanes.drain().await?;
        self.counters.notice(
            Level::Warn,
            format!(
                "{}: its key has changed, or it was dropped and made anew; it is copied again to name its documents by \
                 the rows of today",
                mapping.table
            ),
        );
        let mapping = Arc::clone(mapping);
        self.copy_again(&mapping, "its key has changed, or it was made anew").await
    }

    /// The table is not live from here on, until it has been copied again.
    async fn copy_again(&self, mapping: &TableMapping, why: &str) -> Result<(), Problem> {
        self.writer.resnapshots.want(mapping, &self.counters.tables[mapping.number].resnapshot, Some(why)).await
    }

    fn act(&mut self, mapping: &TableMapping, actions: &[Action], kind: EventKind) -> Result<(), Problem> {
        let commit = self.transaction.commit;
        let version = self.writer.version(commit);
        for action in actions {
            if matches!(action.body, ActionBody::Delete) {
                self.writer.resnapshots.deleted(mapping.number, &action_key(action), version);
            }
            let body = self.writer.lanes.body_for_action(&mapping.target, action, commit);
            body.action(&mapping.target, action, version).map_err(unwritable)?;
            self.writer.id.clear();
            self.writer.id.extend_from_slice(action.id.as_bytes());
        }
        self.show(kind, mapping.number);
        Ok(())
    }

    /// Shows the change whose id is in `self.writer.id`, once it has been answered for, or counts it among those not shown.
    #[inline]
    fn show(&mut self, kind: EventKind, table: usize) {
        self.counters.changes.fetch_add(1, Relaxed);
        if self.shown >= SHOWN_PER_READ || self.staged.len() >= STAGED {
            self.hidden += 1;
            return;
        }
        self.shown += 1;
        let cut = self.writer.id.len().min(40);
        let event = Event {
            kind,
            table: u32::try_from(table).unwrap_or(u32::MAX),
            key: if kind == EventKind::Truncate {
                String::new()
            } else {
                String::from_utf8_lossy(&self.writer.id[..cut]).into_owned()
            },
            xid: Some(self.transaction.xid),
            lsn: Some(self.transaction.commit),
            // Becomes the time from commit to answer.
            at: self.transaction.committed_at,
            ..Event::default()
        };
        self.staged.push_back((self.transaction.commit, event, 1 + std::mem::take(&mut self.hidden)));
    }

    /// What may be confirmed now. Publishes the events that have been answered for.
    pub(super) fn confirm(&mut self) -> Lsn {
        let oldest = if broken(Rule::AnswerFirst) { None } else { self.writer.lanes.oldest_unanswered() };
        let moment = now();
        while let Some((_, mut event, of)) =
            self.staged.pop_front_if(|(commit, ..)| oldest.is_none_or(|oldest| *commit < oldest))
        {
            #[allow(clippy::cast_precision_loss, reason = "seconds for a screen")]
            let latency = (moment - event.at).max(0) as f64 / 1e6;
            event.latency = Some(latency);
            event.at = moment;
            self.counters.event(event, of);
        }
        let confirmed = self.tracker.confirm(oldest, moment);
        self.counters.confirmed_lsn.fetch_max(confirmed.0, Relaxed);
        self.counters.oldest_commit.store(self.tracker.oldest_commit().unwrap_or(0), Relaxed);
        if let Some(latency) = self.tracker.process_latency() {
            self.counters.process_latency.store(latency.max(0), Relaxed);
        }
        confirmed
    }
}

/// The relation and its mapping; `None` for a table that is published but not mapped.
#[inline]
fn mapped(relations: &Relations, oid: u32) -> Result<Option<(&Relation, &Arc<TableMapping>)>, Problem> {
    let Some(relation) = relations.get(oid) else {
        return Err(Problem::new(
            ProblemKind::Internal,
            format!("PostgreSQL sent a change of relation {oid} without announcing it"),
            "Report this.",
        ));
    };
    Ok(relation.mapping.as_ref().map(|mapping| (relation, mapping)))
}

fn remove(lanes: &mut Lanes, resnapshots: &Resnapshots, mapping: &TableMapping, id: &[u8], commit: Lsn, version: u64) {
    // First the set, then the lane: a copy that builds its bulk in between leaves the row out.
    resnapshots.deleted(mapping.number, id, version);
    lanes.body_for(&mapping.target, id, commit).delete(&mapping.target, id, version);
}

fn row<'a>(relation: &'a Relation, fields: &'a [Field<'a>]) -> Row<'a> {
    Row { columns: relation.shape.columns(), fields }
}

fn handled<'a>(handler: &'a Arc<dyn Handler>, mapping: &'a TableMapping, transaction: Transaction) -> Handled<'a> {
    Handled {
        handler,
        mapping,
        lsn: transaction.commit,
        commit_time: system_time(transaction.committed_at),
        xid: transaction.xid,
    }
}

fn misfit(relation: &Relation) -> Problem {
    Problem::new(
        ProblemKind::Setup,
        format!(
            "a change of {} came without the values of its key, or with another number of columns than announced",
            relation.table
        ),
        "Check its REPLICA IDENTITY and the publication's list of columns: the key has to be published.",
    )
}
