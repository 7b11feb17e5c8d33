//! Which tables are copied again while the stream runs, or are to be: where the stream, the operator and the copies meet.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Instant;

use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use super::deletes::DeleteSet;
use super::ledger::Ledger;
use crate::lsn::Lsn;
use crate::mapping::TableMapping;
use crate::postgres::definition::Announced;
use crate::problem::{Problem, ProblemKind};
use crate::table::TableId;
use crate::telemetry::lock;

/// The resnapshots that run or are wanted, by the table's number. Each wish is in the ledger, under a number, before it is
/// here: a later one of the same table has a higher number, and is not taken back with an earlier one.
#[derive(Debug, Default)]
pub struct Resnapshots {
    tables: Vec<Slot>,
    changed: Notify,
    /// Not held: the lock of this process ends with the ledger.
    ledger: Mutex<Weak<Ledger>>,
    beginning: watch::Sender<Beginning>,
}

/// Where the stream's connection began, and where a copy needs it to have begun.
#[derive(Clone, Copy, Debug, Default)]
struct Beginning {
    is: Lsn,
    wanted: Lsn,
}

#[derive(Debug, Default)]
struct Slot {
    recording: AtomicBool,
    set: Mutex<Option<Arc<DeleteSet>>>,
    wish: Mutex<Wish>,
}

#[derive(Debug, Default)]
struct Wish {
    /// The newest number that the ledger gave.
    number: i32,
    /// So many are being written into the ledger.
    asking: u32,
    /// It waits for its turn.
    waits: bool,
    /// What was in the way has it wait until then.
    until: Option<Instant>,
    /// It was given up; the ledger may still hold something of it.
    given_up: bool,
    /// It has its turn; cancelled, it is given up.
    running: Option<CancellationToken>,
    /// Its newest number was given up while an older one had its turn.
    newer_given_up: bool,
    /// What is wrong with the documents until the table has been copied.
    lacks: Option<Problem>,
    /// A copy was cut short: of its rows some may still be on their way that are deleted by now, and nobody would delete them
    /// once more. So it is until the table has been copied.
    cut_short: Option<Problem>,
}

impl Wish {
    fn is_wanted(&self) -> bool {
        self.asking > 0 || self.waits || self.running.is_some()
    }

    fn is_due(&self) -> bool {
        self.waits && self.until.is_none_or(|until| until <= Instant::now())
    }
}

/// A wish that is being written.
struct Asking<'a>(&'a Mutex<Wish>);

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        lock(self.0).asking -= 1;
    }
}

/// A table whose turn it is. Dropped before [`ended`](Self::ended) is called, it waits for the next one, or is given up if
/// that was asked for.
#[derive(Debug)]
pub struct Turn<'a> {
    of: &'a Resnapshots,
    /// Its number.
    pub table: usize,
    /// The wish's number in the ledger.
    pub wish: i32,
    /// Cancelled: the operator gives it up.
    pub stop: CancellationToken,
}

impl Turn<'_> {
    /// It has ended, well or by this problem. What was found wrong meanwhile, by whoever asked for the next one, stays so.
    pub fn ended(self, failed: Option<Problem>) {
        let Some(slot) = self.of.tables.get(self.table) else { return };
        let mut wish = lock(&slot.wish);
        wish.running = None;
        if failed.is_none() {
            wish.cut_short = None;
        }
        if !wish.waits && !std::mem::take(&mut wish.newer_given_up) {
            wish.lacks = failed;
        }
    }

    /// Something is in the way: it waits for its next turn, which is not before `until`.
    pub fn not_before(self, until: Instant) {
        if let Some(slot) = self.of.tables.get(self.table) {
            lock(&slot.wish).until = Some(until);
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let Some(slot) = self.of.tables.get(self.table) else { return };
        let mut wish = lock(&slot.wish);
        if wish.running.take().is_some() {
            if self.stop.is_cancelled() {
                wish.given_up = true;
            } else {
                wish.waits = true;
            }
            self.of.changed.notify_one();
        }
    }
}

impl Resnapshots {
    /// For so many tables; none runs.
    #[must_use]
    pub fn new(tables: usize) -> Self {
        Self { tables: (0..tables).map(|_| Slot::default()).collect(), ..Self::default() }
    }

    /// Begins to record the deletes of a table. Before the snapshot is asked for: the stream may pass its position
    /// while the slot is still being created.
    pub fn begin(&self, table: usize) -> Arc<DeleteSet> {
        let set = Arc::new(DeleteSet::default());
        if let Some(slot) = self.tables.get(table) {
            *lock(&slot.set) = Some(Arc::clone(&set));
            slot.recording.store(true, Ordering::SeqCst);
        }
        set
    }

    /// Ends the recording.
    pub fn end(&self, table: usize) {
        if let Some(slot) = self.tables.get(table) {
            slot.recording.store(false, Ordering::SeqCst);
            *lock(&slot.set) = None;
        }
    }

    /// The stream deletes the document `id` of a table at `version`.
    #[inline]
    pub fn deleted(&self, table: usize, id: &[u8], version: u64) {
        let Some(slot) = self.tables.get(table) else { return };
        if slot.recording.load(Ordering::SeqCst)
            && let Some(set) = lock(&slot.set).as_ref()
        {
            set.insert(id, version);
        }
    }

    /// The stream's connection begins at this position of the slot.
    pub fn stream_begins(&self, position: Lsn) {
        self.beginning.send_modify(|beginning| beginning.is = position);
    }

    /// Makes the stream open a connection anew once it has passed `position`, and ends when it has. Cancel-safe.
    pub async fn stream_beyond(&self, position: Lsn) {
        self.beginning.send_modify(|beginning| beginning.wanted = beginning.wanted.max(position));
        // The sender lives here.
        let _ = self.beginning.subscribe().wait_for(|beginning| beginning.is >= position).await;
    }

    /// Ends when a stream that is confirmed up to `confirmed` has to open a connection anew. Cancel-safe.
    pub async fn stream_anew(&self, confirmed: Lsn) {
        let is_due = |beginning: &Beginning| beginning.is < beginning.wanted && beginning.wanted <= confirmed;
        let _ = self.beginning.subscribe().wait_for(is_due).await;
    }

    /// Where wishes are kept.
    pub fn keep_in(&self, ledger: &Arc<Ledger>) {
        *lock(&self.ledger) = Arc::downgrade(ledger);
    }

    fn ledger(&self) -> Result<Arc<Ledger>, Problem> {
        lock(&self.ledger).upgrade().ok_or_else(|| {
            let lost = Problem::new(ProblemKind::Internal, "the ledger is closed", "It is opened again by itself.");
            lost.transient()
        })
    }

    /// Notes as what the stream announced a table: [`Ledger::announced`].
    ///
    /// # Errors
    /// The ledger cannot be written.
    pub async fn announced(&self, table: &TableId, commit: Lsn, announced: &Announced) -> Result<(), Problem> {
        self.ledger()?.announced(table, commit, announced).await
    }

    /// Asks for a resnapshot of a table, which `flag` says from here on; a crash after this returns does not lose the wish. `why`:
    /// what makes its documents other than its rows until then, should it be given up.
    ///
    /// # Errors
    /// The ledger cannot be written.
    pub async fn want(&self, mapping: &TableMapping, flag: &AtomicBool, why: Option<&str>) -> Result<(), Problem> {
        let Some(slot) = self.tables.get(mapping.number) else { return Ok(()) };
        let (_asking, last) = {
            let mut wish = lock(&slot.wish);
            wish.asking += 1;
            // Not before: a copy that ends at this moment takes it back where nobody asks.
            flag.store(true, Ordering::SeqCst);
            (Asking(&slot.wish), wish.number)
        };
        let number = self.ledger()?.want(&mapping.table, last).await?;
        {
            let mut wish = lock(&slot.wish);
            (wish.number, wish.waits, wish.until) = (wish.number.max(number), true, None);
            if let Some(why) = why {
                wish.lacks = Some(lacking(mapping, &format!("{why}, and the copy that was to follow was given up")));
            }
        }
        self.look_again();
        Ok(())
    }

    /// A resnapshot of a table was under way, or asked for, when this process began. Which of them, and why, nobody knows.
    pub fn begun_before(&self, mapping: &TableMapping) {
        if let Some(slot) = self.tables.get(mapping.number) {
            let what = "a copy that was asked for before this process began, and may have been cut short, was given up";
            lock(&slot.wish).cut_short = Some(lacking(mapping, what));
        }
    }

    /// Rows of a copy go out from here on. True: of an earlier one some may still be on their way.
    pub fn begins_to_write(&self, mapping: &TableMapping) -> bool {
        let Some(slot) = self.tables.get(mapping.number) else { return false };
        let problem = lacking(mapping, "a copy was cut short, and then given up");
        lock(&slot.wish).cut_short.replace(problem).is_some()
    }

    /// Nothing of that copy is on its way any more that the stream has deleted.
    pub fn nothing_on_its_way(&self, table: usize) {
        if let Some(slot) = self.tables.get(table) {
            lock(&slot.wish).cut_short = None;
        }
    }

    /// What is wrong with the documents of a table, now that no copy of it runs or waits.
    #[must_use]
    pub fn lacks(&self, table: usize) -> Option<Problem> {
        let wish = lock(&self.tables.get(table)?.wish);
        let cut_short = wish.cut_short.as_ref().filter(|_| !wish.is_wanted());
        wish.lacks.as_ref().or(cut_short).cloned()
    }

    /// A resnapshot of the table waits for its turn, and for nothing else.
    #[must_use]
    pub fn is_due(&self, table: usize) -> bool {
        self.tables.get(table).is_some_and(|slot| lock(&slot.wish).is_due())
    }

    /// A resnapshot of the table runs, or waits for its turn.
    #[must_use]
    pub fn is_wanted(&self, table: usize) -> bool {
        self.tables.get(table).is_some_and(|slot| lock(&slot.wish).is_wanted())
    }

    /// Gives one of these tables its turn, of those that wait for that: first those in whose way nothing was, then the one that
    /// has waited longest.
    pub fn take(&self, tables: impl Iterator<Item = usize>) -> Option<Turn<'_>> {
        let due = |table: &usize| self.tables.get(*table).is_some_and(|slot| lock(&slot.wish).is_due());
        let until = |table: &usize| self.tables.get(*table).and_then(|slot| lock(&slot.wish).until);
        let table = tables.filter(due).min_by_key(until)?;
        let mut wish = lock(&self.tables.get(table)?.wish);
        if !std::mem::take(&mut wish.waits) {
            // Given up at this moment.
            return None;
        }
        let stop = CancellationToken::new();
        wish.running = Some(stop.clone());
        wish.newer_given_up = false;
        Some(Turn { of: self, table, wish: wish.number, stop })
    }

    /// When the next one is due that something is in the way of.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        let now = Instant::now();
        let later = |slot: &Slot| {
            let wish = lock(&slot.wish);
            wish.until.filter(|until| wish.waits && *until > now)
        };
        self.tables.iter().filter_map(later).min()
    }

    /// Gives up the resnapshot of a table. True: it waited, and is neither here nor in the ledger any more. False: it runs,
    /// and [`given_up`](Self::given_up) has it once it has ended. None: there is none.
    ///
    /// # Errors
    /// The ledger cannot be written; it still waits then.
    pub async fn cancel(&self, mapping: &TableMapping) -> Result<Option<bool>, Problem> {
        let Some(slot) = self.tables.get(mapping.number) else { return Ok(None) };
        let number = {
            let mut wish = lock(&slot.wish);
            let waited = std::mem::take(&mut wish.waits);
            if let Some(stop) = &wish.running {
                stop.cancel();
                // That copy may be past the last look at this.
                wish.newer_given_up |= waited;
                wish.given_up |= waited;
                return Ok(Some(false));
            }
            if !waited {
                return Ok(None);
            }
            wish.given_up = true;
            wish.number
        };
        let taken_back = match self.ledger() {
            Ok(ledger) => ledger.withdraw(&mapping.table, number).await,
            Err(problem) => Err(problem),
        };
        if taken_back.is_err() {
            lock(&slot.wish).waits = true;
        }
        self.look_again();
        taken_back.map(|()| Some(true))
    }

    /// The number of a table's wish that was given up since this was asked last; none where there is another one.
    pub fn given_up(&self, table: usize) -> Option<i32> {
        let mut wish = lock(&self.tables.get(table)?.wish);
        (std::mem::take(&mut wish.given_up) && !wish.is_wanted()).then_some(wish.number)
    }

    /// Has [`changed`](Self::changed) end.
    pub fn look_again(&self) {
        self.changed.notify_one();
    }

    /// Ends when something has changed since it last ended: a wish, or what is in the way of one. Cancel-safe.
    pub async fn changed(&self) {
        self.changed.notified().await;
    }
}

fn lacking(mapping: &TableMapping, what: &str) -> Problem {
    Problem::new(
        ProblemKind::Setup,
        format!("{}: {what}: older documents are as they were", mapping.table),
        "Copy it again: r in the table list, or POST /tables/{schema.table}/resnapshot.",
    )
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// However often the first ones are tried in vain, the others have their turn.
    #[test]
    fn turns() {
        let all = Resnapshots::new(3);
        for slot in &all.tables {
            lock(&slot.wish).waits = true;
        }
        let now = Instant::now();
        let turn = |ago: u64| {
            let turn = all.take(0..3).expect("one is due");
            let table = turn.table;
            turn.not_before(now - Duration::from_secs(ago));
            table
        };
        assert_eq!([turn(9), turn(8), turn(7)], [0, 1, 2]);
        assert_eq!([turn(6), turn(5), turn(4), turn(3)], [0, 1, 2, 0]);
        assert_eq!(all.take([0, 2].into_iter()).expect("one is due").table, 2, "1 is held");
        let later = Instant::now() + Duration::from_secs(60);
        (0..3).for_each(|_| all.take(0..3).expect("one is due").not_before(later));
        assert!(all.take(0..3).is_none() && !all.is_due(1));
        assert_eq!(all.next_due(), Some(later));
    }
}
