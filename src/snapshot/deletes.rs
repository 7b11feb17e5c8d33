//! The delete set of a resnapshot: what the stream deleted while the table was copied again.
//!
//! Elasticsearch forgets deleted documents' versions after a while (`index.gc_deletes`, or with a restart of the
//! node), so that a copied row that arrives after its delete would bring the document back. Two things prevent it:
//! a row whose key is in the set is left out when its bulk is built, and at the end of the copy every delete of the
//! set is sent once more, for those whose row was on its way at the time. A document that was written again by then
//! has a higher version and stays.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::broken::{Rule, broken};
use crate::change::{Action, ActionBody};
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
