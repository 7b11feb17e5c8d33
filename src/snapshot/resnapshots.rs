//! Which tables are copied again while the stream runs, or are to be: where the stream, the operator and the copies meet.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

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
    /// It waits for its turn.
    waits: bool,
    /// It was given up; the ledger may still hold something of it.
    given_up: bool,
    /// It has its turn; cancelled, it is given up.
    running: Option<CancellationToken>,
    /// What is wrong with the documents until the table has been copied.
    lacks: Option<Problem>,
}

/// A table whose turn it is. Dropped before [`ended`](Self::ended) is called, it waits for the next one, or is given up if
/// that was asked for.
#[derive(Debug)]
pub struct Turn<'a> {
    of: &'a Resnapshots,
    table: usize,
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
        if !wish.waits {
            wish.lacks = failed;
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

    /// Asks for a resnapshot of a table; a crash after this returns does not lose the wish. `why`: what makes its documents
    /// other than its rows until then, should it be given up.
    ///
    /// # Errors
    /// The ledger cannot be written.
    pub async fn want(&self, mapping: &TableMapping, why: Option<&str>) -> Result<(), Problem> {
        let number = self.ledger()?.want(&mapping.table).await?;
        if let Some(slot) = self.tables.get(mapping.number) {
            let mut wish = lock(&slot.wish);
            (wish.number, wish.waits) = (number, true);
            if let Some(why) = why {
                wish.lacks = Some(Problem::new(
                    ProblemKind::Setup,
                    format!(
                        "{}: {why}, and the copy that was to follow was given up: older documents are as they were",
                        mapping.table
                    ),
                    "Copy it again: r in the table list, or POST /tables/{schema.table}/resnapshot.",
                ));
            }
        }
        self.look_again();
        Ok(())
    }

    /// What is wrong with the documents of a table, now that no copy of it runs or waits.
    #[must_use]
    pub fn lacks(&self, table: usize) -> Option<Problem> {
        lock(&self.tables.get(table)?.wish).lacks.clone()
    }

    /// A resnapshot of the table waits for its turn.
    #[must_use]
    pub fn waits(&self, table: usize) -> bool {
        self.tables.get(table).is_some_and(|slot| lock(&slot.wish).waits)
    }

    /// A resnapshot of the table runs, or waits for its turn.
    #[must_use]
    pub fn is_wanted(&self, table: usize) -> bool {
        self.tables.get(table).map(|slot| lock(&slot.wish)).is_some_and(|wish| wish.waits || wish.running.is_some())
    }

    /// Gives a table its turn, if it waits for that.
    pub fn take(&self, table: usize) -> Option<Turn<'_>> {
        let mut wish = lock(&self.tables.get(table)?.wish);
        if !std::mem::take(&mut wish.waits) {
            return None;
        }
        let stop = CancellationToken::new();
        wish.running = Some(stop.clone());
        Some(Turn { of: self, table, wish: wish.number, stop })
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
                return Ok(Some(false));
            }
            if !waited {
                return Ok(None);
            }
            wish.given_up = true;
            wish.number
        };
        let taken_back = match self.ledger() {
            Ok(ledger) => ledger.granted(&mapping.table, number).await,
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
        (std::mem::take(&mut wish.given_up) && !wish.waits).then_some(wish.number)
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
