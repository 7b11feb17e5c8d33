//! The delete set of a resnapshot: what the stream deleted while the table was copied again.
//!
//! Elasticsearch forgets deleted documents' versions after a while (`index.gc_deletes`, or with a restart of the
//! node), so that a copied row that arrives after its delete would bring the document back. Two things prevent it:
//! a row whose key is in the set is left out when its bulk is built, and at the end of the copy every delete of the
//! set is sent once more, for those whose row was on its way at the time. A document that was written again by then
//! has a higher version and stays.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use tokio::sync::{Notify, watch};

use super::ledger::Ledger;
use crate::broken::{Rule, broken};
use crate::change::{Action, ActionBody};
use crate::lsn::Lsn;
use crate::mapping::TableMapping;
use crate::problem::{Problem, ProblemKind};
use crate::telemetry::lock;

/// Bytes of ids that the set may hold. Beyond it the resnapshot is given up rather than the memory.
const LIMIT: usize = 256 << 20;

/// What names the document of a handler's action in a [`DeleteSet`]: its index and routing belong to it.
pub(crate) fn action_key(action: &Action) -> Vec<u8> {
    // Texts always serialise.
    serde_json::to_vec(&(&action.id, &action.index, &action.routing)).unwrap_or_default()
}

/// The delete of the document that [`action_key`] names.
pub(crate) fn delete_action(key: &[u8]) -> Option<Action> {
    let (id, index, routing) = serde_json::from_slice(key).ok()?;
    Some(Action { id, index, routing, body: ActionBody::Delete })
}

/// What was deleted, by document id (of a handler's actions: by [`action_key`]), and the version at which.
#[derive(Debug, Default)]
pub struct DeleteSet {
    ids: Mutex<Ids>,
    overflowed: AtomicBool,
}

#[derive(Debug, Default)]
struct Ids {
    versions: HashMap<Box<[u8]>, u64, foldhash::fast::RandomState>,
    bytes: usize,
}

impl DeleteSet {
    /// Remembers that `id` was deleted at `version`.
    pub fn insert(&self, id: &[u8], version: u64) {
        if broken(Rule::DeleteSet) {
            return;
        }
        let mut ids = lock(&self.ids);
        if ids.bytes > LIMIT {
            self.overflowed.store(true, Ordering::Relaxed);
            return;
        }
        if ids.versions.insert(id.into(), version).is_none() {
            ids.bytes += id.len() + 64;
        }
    }

    /// `id` was deleted at `version` or later.
    #[must_use]
    pub fn contains(&self, id: &[u8], version: u64) -> bool {
        lock(&self.ids).versions.get(id).is_some_and(|&deleted| deleted >= version)
    }

    /// More was deleted than the set holds: it can no longer be relied on.
    #[must_use]
    pub fn overflowed(&self) -> bool {
        self.overflowed.load(Ordering::Relaxed)
    }

    /// Everything deleted at `version` or later.
    #[must_use]
    pub fn since(&self, version: u64) -> Vec<(Box<[u8]>, u64)> {
        lock(&self.ids).versions.iter().filter(|&(_, &at)| at >= version).map(|(id, &at)| (id.clone(), at)).collect()
    }
}

/// The resnapshots that run or are wanted, by the table's number: where the stream and the copies meet.
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
    running: AtomicBool,
    wanted: AtomicBool,
    cancelled: AtomicBool,
    set: Mutex<Option<Arc<DeleteSet>>>,
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
            slot.running.store(true, Ordering::SeqCst);
        }
        set
    }

    /// Ends the recording.
    pub fn end(&self, table: usize) {
        if let Some(slot) = self.tables.get(table) {
            slot.running.store(false, Ordering::SeqCst);
            *lock(&slot.set) = None;
        }
    }

    /// The stream deletes the document `id` of a table at `version`.
    #[inline]
    pub fn deleted(&self, table: usize, id: &[u8], version: u64) {
        let Some(slot) = self.tables.get(table) else { return };
        if slot.running.load(Ordering::SeqCst)
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

    /// Where wishes that must not be lost are kept.
    pub fn keep_in(&self, ledger: &Arc<Ledger>) {
        *lock(&self.ledger) = Arc::downgrade(ledger);
    }

    /// Asks for a resnapshot of a table; a crash after this returns does not lose the wish. For the stream: what it
    /// acknowledges does not come again.
    ///
    /// # Errors
    /// The ledger cannot be written.
    pub async fn want_surely(&self, mapping: &TableMapping) -> Result<(), Problem> {
        let ledger = lock(&self.ledger).upgrade();
        let Some(ledger) = ledger else {
            let lost = Problem::new(ProblemKind::Internal, "the ledger is closed", "It is opened again by itself.");
            return Err(lost.transient());
        };
        ledger.want(&mapping.table).await?;
        self.want(mapping.number);
        Ok(())
    }

    /// Asks for a resnapshot of a table, until the process ends.
    pub fn want(&self, table: usize) {
        if let Some(slot) = self.tables.get(table) {
            slot.wanted.store(true, Ordering::SeqCst);
            self.changed.notify_one();
        }
    }

    /// A resnapshot of the table was asked for and has not begun.
    #[must_use]
    pub fn is_wanted(&self, table: usize) -> bool {
        self.tables.get(table).is_some_and(|slot| slot.wanted.load(Ordering::SeqCst))
    }

    /// Gives up the wish of a table that waits; true if there was one. [`cancelled`](Self::cancelled) has it then.
    pub fn cancel(&self, table: usize) -> bool {
        let waited = self.take_wish(table);
        if waited && let Some(slot) = self.tables.get(table) {
            slot.cancelled.store(true, Ordering::SeqCst);
            self.changed.notify_one();
        }
        waited
    }

    /// The wish of a table was given up since this was asked last, and there is no other.
    pub fn cancelled(&self, table: usize) -> bool {
        self.tables
            .get(table)
            .is_some_and(|slot| slot.cancelled.swap(false, Ordering::SeqCst) && !slot.wanted.load(Ordering::SeqCst))
    }

    /// Takes the wish of one table; true if there was one.
    pub fn take_wish(&self, table: usize) -> bool {
        self.tables.get(table).is_some_and(|slot| slot.wanted.swap(false, Ordering::SeqCst))
    }

    /// Ends when a resnapshot was asked for since it last ended. Cancel-safe.
    pub async fn wished(&self) {
        self.changed.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_action_is_named_whole() {
        let action = Action::delete("1\n\"").in_index("a");
        let routed = action.clone().routed("r");
        assert_ne!(action_key(&action), action_key(&routed));
        for action in [action, routed, Action::delete("")] {
            assert_eq!(delete_action(&action_key(&action)), Some(action));
        }
        assert_eq!(delete_action(b"7"), None);
    }

    #[test]
    fn deletes_before_the_snapshot_do_not_count() {
        let set = DeleteSet::default();
        set.insert(b"1", 80);
        set.insert(b"2", 120);
        assert!(!set.contains(b"1", 100), "its row is not in the snapshot, or was inserted again");
        assert!(set.contains(b"2", 100) && !set.contains(b"3", 100));
        assert_eq!(set.since(100), vec![(b"2".to_vec().into_boxed_slice(), 120)]);
        set.insert(b"2", 130);
        assert_eq!(set.since(100).len(), 1);
    }
}
