//! What PostgreSQL is told, remembered in the ledger before it is told.
//!
//! So a slot that stands beyond what is remembered was moved, or made anew, by somebody else, and that is seen.
//!
//! Remembering writes WAL, which moves the position on: for ever, were every position remembered at once. One that
//! changes have led to is, within [`BUSY`]. Others wait ever longer, up to [`IDLE`]: each write may make PostgreSQL
//! write a checkpoint or fill up a segment (`archive_timeout`) in turn. They wait no longer once they are worth it, lest
//! a slot that nothing is written for keeps WAL.

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::lsn::Lsn;
use crate::postgres::PostgresError;
use crate::postgres::replication::{Feedback, Session};
use crate::problem::{Problem, ProblemKind};
use crate::snapshot::{Ledger, Position};
use crate::table::quote_literal;
use crate::telemetry::Counters;

/// Between two records while changes come, and how long the first one waits when none do.
const BUSY: Duration = Duration::from_millis(250);
/// The longest between two records while none come.
const IDLE: Duration = Duration::from_secs(3600);
/// So many segments of WAL are worth a record at any time: more than what the record before it can have caused.
const WORTH: u64 = 2;
/// How long the last record may take.
const LAST: Duration = Duration::from_secs(5);

/// Where positions are remembered, and of which WAL they are.
#[derive(Clone)]
pub struct Record {
    /// Where.
    pub ledger: Arc<Ledger>,
    /// `pg_control_system().system_identifier` of the server that the stream must come from.
    pub system_id: String,
    /// Its timeline.
    pub timeline: u32,
    /// `wal_segment_size` in bytes.
    pub segment: u64,
}

impl Record {
    /// Makes sure, on the connection that is going to stream, that this is the server that was looked at, and that the
    /// slot stands where we left it or before. Gives where that is.
    pub(super) async fn check(
        &self,
        session: &mut Session,
        slot: &str,
        counters: &Counters,
        copy_again: &str,
    ) -> Result<Lsn, Problem> {
        let found = session.identify_system().await?;
        if (&found.system_id, found.timeline) != (&self.system_id, self.timeline) {
            return Err(Problem::new(
                ProblemKind::Postgres,
                "another PostgreSQL server answers than a moment ago, or this one was promoted",
                "It is looked at again by itself.",
            )
            .transient());
        }
        let sql = format!(
            "SELECT confirmed_flush_lsn FROM pg_catalog.pg_replication_slots WHERE slot_name = {}",
            quote_literal(slot)
        );
        let rows = session.query(&sql).await?;
        // A slot that is gone refuses to be streamed from.
        let Some(confirmed) = rows.first().and_then(|row| row.first()?.as_ref()?.parse::<Lsn>().ok()) else {
            return Ok(Lsn::ZERO);
        };
        let known = self.ledger.position().await?;
        let known = known.filter(|known| (&known.system_id, known.timeline) == (&self.system_id, self.timeline));
        let acknowledged = match known {
            Some(known) => known.acknowledged,
            None => {
                self.remember(confirmed).await?;
                confirmed
            }
        };
        counters.acknowledged_lsn.store(acknowledged.0, Relaxed);
        if confirmed > acknowledged {
            return Err(moved(slot, confirmed, acknowledged, copy_again));
        }
        Ok(confirmed)
    }

    async fn remember(&self, acknowledged: Lsn) -> Result<(), Problem> {
        let position = Position { system_id: self.system_id.clone(), timeline: self.timeline, acknowledged };
        self.ledger.acknowledge(&position).await
    }
}

/// The slot stands where it was never told to stand.
pub(crate) fn moved(slot: &str, confirmed: Lsn, acknowledged: Lsn, copy_again: &str) -> Problem {
    Problem::new(
        ProblemKind::Gap,
        format!(
            "slot {slot} stands at {confirmed}, but pgtide acknowledged nothing beyond {acknowledged}: somebody else \
             moved it, or made it anew, and the changes in between are lost"
        ),
        copy_again,
    )
}

#[derive(Clone, Copy, Debug, Default)]
struct Wanted {
    position: Lsn,
    changes: Lsn,
}

/// Acknowledges on one connection. Ends with it by [`finish`](Acknowledge::finish).
pub(super) struct Acknowledge {
    record: Record,
    counters: Arc<Counters>,
    feedback: Feedback,
    wanted: watch::Sender<Wanted>,
    /// None once it has failed.
    task: Option<JoinHandle<Problem>>,
}

impl Acknowledge {
    pub(super) fn start(record: Record, counters: Arc<Counters>, feedback: Feedback) -> Self {
        let (wanted, changed) = watch::channel(Wanted::default());
        let task = tokio::spawn(keep(record.clone(), Arc::clone(&counters), feedback.clone(), changed));
        Self { record, counters, feedback, wanted, task: Some(task) }
    }

    /// Everything before `position` is answered for, and the last transaction that wrote documents ends at `changes`.
    pub(super) fn up_to(&self, position: Lsn, changes: Lsn) {
        self.feedback.applied(position);
        self.wanted.send_if_modified(|wanted| {
            let further = position > wanted.position || changes > wanted.changes;
            *wanted = Wanted { position, changes };
            further
        });
    }

    /// Ends when positions cannot be remembered any more. Cancel-safe.
    pub(super) async fn failed(&mut self) -> Problem {
        let Some(task) = &mut self.task else { return pending().await };
        let ended = task.await;
        self.task = None;
        // The next attempt finds the ledger as it is, or makes it.
        ended.map(Problem::transient).unwrap_or_else(|panic| {
            Problem::new(ProblemKind::Internal, format!("the acknowledgement died: {panic}"), "Report this.")
        })
    }

    /// Sends `position` as the last one, remembered to the byte, and ends the connection.
    pub(super) async fn finish(mut self, position: Lsn) -> Result<(), Problem> {
        let remembered = self.last(position).await;
        if remembered.is_ok() {
            self.feedback.confirm(position);
        }
        let parted = self.feedback.clone().finish().await;
        remembered.and(parted.map_err(Problem::from))
    }

    async fn last(&mut self, position: Lsn) -> Result<(), Problem> {
        if let Some(task) = self.task.take() {
            task.abort();
            // What it has asked the ledger for goes before what is asked now.
            let _ = task.await;
        }
        if position.0 <= self.counters.acknowledged_lsn.load(Relaxed) {
            return Ok(());
        }
        let late = PostgresError::Closed("the ledger did not take the last position in time".to_owned());
        match tokio::time::timeout(LAST, self.record.remember(position)).await {
            Ok(remembered) => remembered?,
            Err(_) => return Err(late.into()),
        }
        self.counters.acknowledged_lsn.store(position.0, Relaxed);
        Ok(())
    }
}

impl Drop for Acknowledge {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

async fn keep(
    record: Record,
    counters: Arc<Counters>,
    feedback: Feedback,
    mut wanted: watch::Receiver<Wanted>,
) -> Problem {
    let mut pace = Pace { worth: WORTH * record.segment, last: None, idle: BUSY };
    loop {
        let now = *wanted.borrow_and_update();
        let remembered = Lsn(counters.acknowledged_lsn.load(Relaxed));
        let due = pace.due(now, remembered, counters.awaited.load(Relaxed));
        if due.is_none_or(|due| due > Instant::now()) {
            tokio::select! {
                changed = wanted.changed() => if changed.is_err() {
                    pending::<()>().await;
                },
                () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            }
            continue;
        }
        if let Err(problem) = record.remember(now.position).await {
            return problem;
        }
        // In this order: whoever looks at the slot must not find it beyond what is remembered.
        counters.acknowledged_lsn.store(now.position.0, Relaxed);
        feedback.confirm(now.position);
        pace.remembered(Instant::now(), now.changes > remembered);
    }
}

/// When the next position is to be remembered.
struct Pace {
    /// Bytes that are worth it at any time.
    worth: u64,
    last: Option<Instant>,
    /// How long what no change has led to waits.
    idle: Duration,
}

impl Pace {
    /// None: there is nothing to remember. `awaited`: commits wait for positions.
    fn due(&self, wanted: Wanted, remembered: Lsn, awaited: bool) -> Option<Instant> {
        if wanted.position <= remembered {
            return None;
        }
        let soon = awaited || wanted.changes > remembered || wanted.position.since(remembered) >= self.worth;
        let wait = if soon { BUSY } else { self.idle };
        Some(self.last.map_or_else(Instant::now, |last| last + wait))
    }

    fn remembered(&mut self, now: Instant, changes: bool) {
        self.last = Some(now);
        self.idle = if changes { BUSY } else { (self.idle * 2).min(IDLE) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEGMENT: u64 = 16 << 20;

    /// A server of one's own making: writes that a record causes, and those of others.
    struct Wal {
        now: Instant,
        at: u64,
        remembered: u64,
        records: u32,
        pace: Pace,
    }

    impl Wal {
        fn new() -> Self {
            let pace = Pace { worth: WORTH * SEGMENT, last: None, idle: BUSY };
            Self { now: Instant::now() + BUSY, at: SEGMENT + 100, remembered: SEGMENT, records: 0, pace }
        }

        /// The next second. A record is WAL, and makes PostgreSQL fill up the segment (`archive_timeout`) a minute later.
        fn second(&mut self, others: u64, changes: u64) {
            self.now += Duration::from_secs(1);
            self.at += others;
            let wanted = Wanted { position: Lsn(self.at), changes: Lsn(changes) };
            if self.pace.due(wanted, Lsn(self.remembered), false).is_some_and(|due| due <= self.now) {
                self.pace.remembered(self.now, changes > self.remembered);
                self.remembered = self.at;
                self.records += 1;
                self.at = (self.at + 300).next_multiple_of(SEGMENT) + 40;
            }
        }
    }

    #[test]
    fn an_idle_server_gets_a_record_an_hour() {
        let mut wal = Wal::new();
        for _ in 0..30 * 86_400 {
            wal.second(0, 0);
        }
        assert!((700..750).contains(&wal.records), "{} records in 30 days", wal.records);
    }

    #[test]
    fn what_others_write_is_let_go() {
        let mut wal = Wal::new();
        for _ in 0..86_400 {
            wal.second(100_000, 0);
            assert!(wal.at - wal.remembered <= (WORTH + 1) * SEGMENT, "{}", wal.at - wal.remembered);
        }
    }

    #[test]
    fn changes_are_remembered_at_once() {
        let mut wal = Wal::new();
        for _ in 0..86_400 {
            wal.second(0, 0);
        }
        for _ in 0..100 {
            wal.second(50, 0);
            let end = wal.at + 1;
            wal.second(1, end);
            assert!(wal.remembered >= end, "a change waits");
        }
    }
}
