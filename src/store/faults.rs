//! Faults to order: what a test wants to go wrong.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Deserialize;
use tokio::sync::watch;

use super::failure::Failure;

/// What goes wrong.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "fault", rename_all = "snake_case", deny_unknown_fields)]
pub enum Effect {
    /// The whole request is answered with this status; nothing is applied.
    Reject {
        /// HTTP status.
        status: u16,
        /// `error.type`; by the status if none.
        #[serde(default, rename = "type")]
        kind: Option<String>,
    },
    /// Items of bulk requests are answered with this status and not applied. Null mode ignores it.
    RejectItems {
        /// HTTP status of the item.
        status: u16,
        /// `error.type`; by the status if none.
        #[serde(default, rename = "type")]
        kind: Option<String>,
        /// Every n-th item, counted over all requests under this fault; 1 is each, 0 none.
        #[serde(default)]
        every: u64,
        /// The documents with these ids.
        #[serde(default)]
        ids: HashSet<String>,
    },
    /// The answer waits until [`Store::clear_faults`](super::Store::clear_faults) (or the end of the store).
    Hold {
        /// Whether the request is applied before the wait; else after it, even if the client has gone by then.
        #[serde(default)]
        applied: bool,
    },
    /// The request is applied and answered so much later, even if the client has gone by then.
    Delay {
        /// How much later.
        milliseconds: u64,
    },
    /// The request is applied, and then answered with this status, or not at all: the connection closes.
    ApplyThenFail {
        /// HTTP status; none closes the connection.
        #[serde(default)]
        status: Option<u16>,
    },
    /// The request is applied, and the connection closes after so many bytes of the answer, head included.
    Cut {
        /// Bytes that still go through.
        bytes: u64,
    },
}

/// An [`Effect`], on which requests, and how often.
#[derive(Clone, Debug, PartialEq)]
pub struct Fault {
    effect: Effect,
    times: Option<u64>,
    path: String,
}

impl Fault {
    /// On every `_bulk` until cleared.
    #[must_use]
    pub fn new(effect: Effect) -> Self {
        Self { effect, times: None, path: "_bulk".to_owned() }
    }

    /// On so many requests, then no more.
    #[must_use]
    pub fn times(mut self, times: u64) -> Self {
        self.times = Some(times);
        self
    }

    /// On requests whose path ends so, instead of `_bulk`. Empty: on all.
    #[must_use]
    pub fn on(mut self, path: impl Into<String>) -> Self {
        self.path = path.into();
        self
    }

    /// From the JSON of `POST /_pgtide/faults`: the fields of the effect beside `times` and `path`.
    pub(super) fn parse(body: &[u8]) -> Result<Self, Failure> {
        let mut json: serde_json::Value = serde_json::from_slice(body)
            .map_err(|error| Failure::parsing(format!("a fault is a JSON object: {error}")))?;
        let Some(members) = json.as_object_mut() else { return Err(Failure::parsing("a fault is a JSON object")) };
        let times = members.remove("times").and_then(|times| times.as_u64());
        let path = members.remove("path");
        let effect: Effect = serde_json::from_value(json).map_err(|error| Failure::parsing(error.to_string()))?;
        let mut fault = Self::new(effect);
        fault.times = times;
        if let Some(path) = path.as_ref().and_then(serde_json::Value::as_str) {
            fault = fault.on(path);
        }
        Ok(fault)
    }
}

/// A fault in the queue.
pub(super) struct Armed {
    pub(super) effect: Effect,
    path: String,
    left: AtomicU64,
    items: AtomicU64,
}

impl Armed {
    /// What becomes of the next item, as far as this fault is concerned.
    pub(super) fn reject_item(&self, id: &str) -> Option<Failure> {
        let Effect::RejectItems { status, kind, every, ids } = &self.effect else { return None };
        let number = self.items.fetch_add(1, Ordering::Relaxed) + 1;
        let hit = ids.contains(id) || (*every > 0 && number.is_multiple_of(*every));
        hit.then(|| failure(*status, kind.as_deref()))
    }
}

/// The answer that a rejection with `status` gives.
pub(super) fn failure(status: u16, kind: Option<&str>) -> Failure {
    let kind = kind.unwrap_or(match status {
        400 => "document_parsing_exception",
        401 | 403 => "security_exception",
        404 => "index_not_found_exception",
        409 => "version_conflict_engine_exception",
        429 => "es_rejected_execution_exception",
        503 => "unavailable_shards_exception",
        _ => "exception",
    });
    Failure::new(status, kind, "a fault that was asked for")
}

/// The faults to come and the requests that are held.
pub(super) struct Faults {
    queue: Mutex<VecDeque<Arc<Armed>>>,
    /// Counts the releases.
    release: watch::Sender<u64>,
    held: watch::Sender<usize>,
}

impl Default for Faults {
    fn default() -> Self {
        Self { queue: Mutex::default(), release: watch::Sender::new(0), held: watch::Sender::new(0) }
    }
}

impl Faults {
    fn queue(&self) -> MutexGuard<'_, VecDeque<Arc<Armed>>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn inject(&self, fault: Fault) {
        let left = AtomicU64::new(fault.times.unwrap_or(u64::MAX));
        self.queue().push_back(Arc::new(Armed {
            effect: fault.effect,
            path: fault.path,
            left,
            items: AtomicU64::new(0),
        }));
    }

    pub(super) fn clear(&self) {
        self.queue().clear();
        self.release.send_modify(|releases| *releases += 1);
    }

    /// The first fault in the queue that is for `path`; one less of it is left.
    pub(super) fn take(&self, path: &str) -> Option<Arc<Armed>> {
        let mut queue = self.queue();
        queue.retain(|fault| fault.left.load(Ordering::Relaxed) > 0);
        let fault = queue.iter().find(|fault| path.ends_with(fault.path.as_str()))?;
        if fault.left.load(Ordering::Relaxed) != u64::MAX {
            fault.left.fetch_sub(1, Ordering::Relaxed);
        }
        Some(Arc::clone(fault))
    }

    /// Faults in the queue and requests held.
    pub(super) fn counts(&self) -> (usize, usize) {
        let queued = self.queue().iter().filter(|fault| fault.left.load(Ordering::Relaxed) > 0).count();
        (queued, *self.held.borrow())
    }

    /// Waits for the next [`Self::clear`].
    pub(super) async fn hold(&self) {
        let mut release = self.release.subscribe();
        self.held.send_modify(|held| *held += 1);
        // An error would mean that the sender, which is ours, is gone.
        let _ = release.changed().await;
        self.held.send_modify(|held| *held -= 1);
    }

    /// Waits until at least `count` requests are held at once.
    pub(super) async fn until_held(&self, count: usize) {
        let _ = self.held.subscribe().wait_for(|held| *held >= count).await;
    }
}

/// The requests that have arrived and are not applied yet; true: its client has gone.
#[derive(Default)]
pub(super) struct Arrived {
    next: AtomicU64,
    requests: watch::Sender<HashMap<u64, bool>>,
}

impl Arrived {
    pub(super) fn begin(&self) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.requests.send_modify(|requests| {
            requests.insert(number, false);
        });
        number
    }

    pub(super) fn abandon(&self, number: u64) {
        self.requests.send_modify(|requests| {
            requests.entry(number).and_modify(|abandoned| *abandoned = true);
        });
    }

    pub(super) fn end(&self, number: u64) {
        self.requests.send_modify(|requests| {
            requests.remove(&number);
        });
    }

    pub(super) fn abandoned(&self) -> usize {
        self.requests.borrow().values().filter(|abandoned| **abandoned).count()
    }

    pub(super) async fn until_none(&self) {
        let _ = self.requests.subscribe().wait_for(HashMap::is_empty).await;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn are_used_up_in_their_order() {
        let faults = Faults::default();
        let reject = |status| Effect::Reject { status, kind: None };
        faults.inject(Fault::new(reject(503)).times(2));
        faults.inject(Fault::new(reject(404)).on("_search").times(1));
        faults.inject(Fault::new(reject(429)));
        assert_eq!(faults.counts(), (3, 0));
        let next = |path: &str| faults.take(path).map(|fault| fault.effect.clone());
        assert_eq!(next("/t/_search"), Some(reject(404)));
        assert_eq!(next("/t/_search"), None);
        let got: Vec<_> = (0..4).map(|_| next("/_bulk").unwrap()).collect();
        assert_eq!(got, [reject(503), reject(503), reject(429), reject(429)]);
        faults.clear();
        assert_eq!((faults.counts(), next("/_bulk")), ((0, 0), None));
    }

    #[test]
    fn items_are_hit_by_number_or_id() {
        let faults = Faults::default();
        faults.inject(Fault::new(Effect::RejectItems {
            status: 429,
            kind: None,
            every: 3,
            ids: HashSet::from(["x".into()]),
        }));
        let fault = faults.take("/_bulk").unwrap();
        let hit: Vec<bool> = ["a", "b", "c", "x", "d", "e"].iter().map(|id| fault.reject_item(id).is_some()).collect();
        assert_eq!(hit, [false, false, true, true, false, true]);
    }

    #[test]
    fn are_read_from_json() {
        let fault = Fault::parse(br#"{"fault":"reject_items","status":503,"every":2,"times":4,"path":""}"#).unwrap();
        let effect = Effect::RejectItems { status: 503, kind: None, every: 2, ids: HashSet::new() };
        assert_eq!(fault, Fault::new(effect).times(4).on(""));
        assert!(Fault::parse(br#"{"fault":"explode"}"#).unwrap_err().reason.contains("explode"));
        assert!(Fault::parse(b"[]").is_err());
    }
}
