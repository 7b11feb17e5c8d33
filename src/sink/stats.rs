//! What the sink has done and what troubles it.

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hdrhistogram::Histogram;

use super::body::{Kind, Parcel};
use crate::engine::{IndexTotals, Latency, Micros, Rejection, Trouble};

/// Latencies are kept for this many spans, of this length each: about a minute.
const SPANS: usize = 6;
const SPAN: Duration = Duration::from_secs(10);
/// Kinds of rejections that are kept apart; what comes after is counted under one heading for its table.
const REJECTIONS: usize = 200;
/// Indices that are counted apart.
const INDICES: usize = 1000;

/// Attempts after which a trouble is written to the log: a single 429 is everyday business.
const WORTH_A_LINE: u32 = 3;

/// The sink at a moment. Counts are since its start.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct SinkStats {
    /// Documents answered for: written, deleted or superseded. Refused ones are in `rejected`.
    pub documents: u64,
    /// Bytes of bulk bodies answered for, before compression.
    pub bytes: u64,
    /// Documents in the newest bulk answered.
    pub bulk_documents: Option<u64>,
    /// Its bytes, before compression.
    pub bulk_bytes: Option<u64>,
    /// Time from sending a bulk to its answer, over about the last minute. None when there was none.
    pub latency: Option<Latency>,
    /// Milliseconds that the newest answer took.
    pub last_latency: Option<f64>,
    /// What each index was given.
    pub indices: Vec<IndexTotals>,
    /// Bulks on their way now.
    pub in_flight: u32,
    /// How many may be.
    pub in_flight_limit: u32,
    /// Documents handed over and not answered for yet. Bodies still being written to are not counted.
    pub queued_documents: u64,
    /// Answers 429, of whole requests and of items.
    pub throttled: u64,
    /// Items sent again, one by one or with their whole request.
    pub retried: u64,
    /// Items refused for good.
    pub rejected: u64,
    /// Items that a newer version forestalled.
    pub superseded: u64,
    /// Items refused for good, by the table's number.
    pub rejected_by_table: BTreeMap<u32, u64>,
    /// The same by table, index and reason; a bounded number of reasons.
    pub rejections: Vec<TableRejection>,
    /// What stands in the way now. None as soon as nothing does.
    pub trouble: Option<Trouble>,
}

/// Refusals of one table for one reason.
#[derive(Clone, Debug, PartialEq)]
pub struct TableRejection {
    /// The number that the table's [`Target`](super::Target) was given.
    pub table: u32,
    /// What was refused and why.
    pub rejection: Rejection,
}

#[derive(Debug, Default)]
pub(super) struct Stats {
    inner: Mutex<Inner>,
    queued: AtomicU64,
}

#[derive(Debug, Default)]
struct Inner {
    documents: u64,
    bytes: u64,
    newest: Option<(u64, u64, f64)>,
    spans: Vec<Span>,
    indices: HashMap<Arc<str>, (u64, u64)>,
    throttled: u64,
    retried: u64,
    rejected: u64,
    superseded: u64,
    rejected_by_table: BTreeMap<u32, u64>,
    rejections: BTreeMap<(u32, String, String), Rejection>,
    troubles: BTreeMap<u64, Trouble>,
    next_trouble: u64,
}

#[derive(Debug)]
struct Span {
    began: Instant,
    micros: Histogram<u32>,
}

/// What one answer settled.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Positions of the items that were written, deleted or superseded.
    pub(super) settled: Vec<usize>,
    /// How many of them were superseded.
    pub(super) superseded: u64,
    /// Items that said 429.
    pub(super) throttled: u64,
    /// Items that have to be sent again.
    pub(super) retried: u64,
}

/// An item refused for good.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) position: usize,
    pub(super) id: String,
    /// Without row contents.
    pub(super) reason: String,
}

impl Stats {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn answered(&self, bytes: usize, documents: usize, took: Duration) {
        let mut inner = self.lock();
        inner.bytes += bytes as u64;
        inner.newest = Some((documents as u64, bytes as u64, took.as_secs_f64() * 1e3));
        inner.record(took);
    }

    pub(super) fn settled(&self, parcel: &Parcel, tally: &Tally) {
        let mut counts = vec![(0, 0); parcel.indices.len()];
        for &position in &tally.settled {
            let item = parcel.items[position];
            let (indexed, deleted) = &mut counts[item.slot as usize];
            *(if item.kind == Kind::Delete { deleted } else { indexed }) += 1;
        }
        let mut inner = self.lock();
        inner.documents += tally.settled.len() as u64;
        inner.superseded += tally.superseded;
        inner.throttled += tally.throttled;
        inner.retried += tally.retried;
        for (index, (indexed, deleted)) in parcel.indices.iter().zip(counts) {
            if indexed + deleted == 0 || (inner.indices.len() >= INDICES && !inner.indices.contains_key(index)) {
                continue;
            }
            let totals = inner.indices.entry(Arc::clone(index)).or_default();
            totals.0 += indexed;
            totals.1 += deleted;
        }
    }

    pub(super) fn rejected(&self, parcel: &Parcel, refused: &[Refused]) {
        let now = now();
        let mut inner = self.lock();
        for refusal in refused {
            let table = parcel.items[refusal.position].table;
            let index = parcel.index_of(refusal.position).to_owned();
            inner.rejected += 1;
            *inner.rejected_by_table.entry(table).or_default() += 1;
            let mut key = (table, index, refusal.reason.clone());
            if inner.rejections.len() >= REJECTIONS && !inner.rejections.contains_key(&key) {
                "other reasons".clone_into(&mut key.2);
            }
            let fresh = || Rejection {
                index: key.1.clone(),
                reason: key.2.clone(),
                count: 0,
                first: now,
                last: now,
                last_id: String::new(),
            };
            let rejection = inner.rejections.entry(key.clone()).or_insert_with(fresh);
            if rejection.count == 0 {
                tracing::error!(
                    index = rejection.index,
                    reason = rejection.reason,
                    "Elasticsearch refuses documents for good"
                );
            }
            rejection.count += 1;
            rejection.last = now;
            rejection.last_id.clone_from(&refusal.id);
        }
    }

    /// A whole request has to be sent again.
    pub(super) fn resent(&self, documents: usize, throttled: bool) {
        let mut inner = self.lock();
        inner.retried += documents as u64;
        inner.throttled += u64::from(throttled);
    }

    /// Counts `documents` as handed over until the guard is dropped.
    pub(super) fn queue(self: &Arc<Self>, documents: usize) -> Queued {
        let documents = documents as u64;
        self.queued.fetch_add(documents, Ordering::Relaxed);
        Queued { stats: Arc::clone(self), documents }
    }

    pub(super) fn trouble(self: &Arc<Self>) -> TroubleGuard {
        let mut inner = self.lock();
        inner.next_trouble += 1;
        TroubleGuard { stats: Arc::clone(self), id: inner.next_trouble, set: false }
    }

    pub(super) fn snapshot(&self, in_flight: u32, in_flight_limit: u32) -> SinkStats {
        let inner = self.lock();
        let mut indices: Vec<_> = inner
            .indices
            .iter()
            .map(|(index, &(indexed, deleted))| IndexTotals { index: index.to_string(), indexed, deleted })
            .collect();
        indices.sort_by(|a, b| a.index.cmp(&b.index));
        SinkStats {
            documents: inner.documents,
            bytes: inner.bytes,
            bulk_documents: inner.newest.map(|newest| newest.0),
            bulk_bytes: inner.newest.map(|newest| newest.1),
            latency: inner.latency(),
            last_latency: inner.newest.map(|newest| newest.2),
            indices,
            in_flight,
            in_flight_limit,
            queued_documents: self.queued.load(Ordering::Relaxed),
            throttled: inner.throttled,
            retried: inner.retried,
            rejected: inner.rejected,
            superseded: inner.superseded,
            rejected_by_table: inner.rejected_by_table.clone(),
            rejections: inner
                .rejections
                .iter()
                .map(|((table, ..), rejection)| TableRejection { table: *table, rejection: rejection.clone() })
                .collect(),
            // The one that has lasted longest.
            trouble: inner.troubles.values().min_by_key(|trouble| trouble.since).map(|trouble| Trouble {
                // One that is waited for is the first.
                attempts: trouble.attempts.max(1),
                ..trouble.clone()
            }),
        }
    }
}

impl Inner {
    fn record(&mut self, took: Duration) {
        let now = Instant::now();
        if self.spans.last().is_none_or(|span| now.duration_since(span.began) >= SPAN) {
            // Two digits of precision, up to ten minutes: about 20 KiB a span.
            let Ok(micros) = Histogram::new_with_bounds(1, 600_000_000, 2) else { return };
            self.spans.push(Span { began: now, micros });
            if self.spans.len() > SPANS {
                self.spans.remove(0);
            }
        }
        if let Some(span) = self.spans.last_mut() {
            span.micros.saturating_record(u64::try_from(took.as_micros()).unwrap_or(u64::MAX));
        }
    }

    fn latency(&self) -> Option<Latency> {
        let window = SPAN * u32::try_from(SPANS).unwrap_or(1);
        let mut all: Option<Histogram<u32>> = None;
        for span in self.spans.iter().filter(|span| span.began.elapsed() < window + SPAN) {
            match &mut all {
                None => all = Some(span.micros.clone()),
                Some(all) => drop(all.add(&span.micros)),
            }
        }
        let all = all.filter(|all| !all.is_empty())?;
        #[allow(clippy::cast_precision_loss, reason = "milliseconds for a screen")]
        let millis = |micros: u64| micros as f64 / 1e3;
        Some(Latency {
            p50: millis(all.value_at_quantile(0.5)),
            p95: millis(all.value_at_quantile(0.95)),
            p99: millis(all.value_at_quantile(0.99)),
            max: millis(all.max()),
        })
    }
}

/// Documents handed over; dropped when they are answered for or given up.
#[derive(Debug)]
pub(super) struct Queued {
    stats: Arc<Stats>,
    documents: u64,
}

impl Drop for Queued {
    fn drop(&mut self) {
        self.stats.queued.fetch_sub(self.documents, Ordering::Relaxed);
    }
}

/// The trouble of one delivery, visible until it is cleared or dropped: a trouble that has passed is never shown.
#[derive(Debug)]
pub(super) struct TroubleGuard {
    stats: Arc<Stats>,
    id: u64,
    set: bool,
}

impl TroubleGuard {
    pub(super) fn set(&mut self, reason: String, hint: String) {
        let mut inner = self.stats.lock();
        let before = inner.troubles.get(&self.id).map(|trouble| (trouble.attempts, trouble.since));
        let (attempts, since) = before.unwrap_or_else(|| (0, now()));
        if attempts.saturating_add(1) == WORTH_A_LINE {
            tracing::warn!(reason, hint, "Elasticsearch does not take documents; trying again until it does");
        }
        inner.troubles.insert(self.id, Trouble { reason, hint, attempts: attempts.saturating_add(1), since });
        self.set = true;
    }

    /// A request has had no answer `since` then: a trouble too, though nothing has failed yet.
    pub(super) fn waits(&mut self, reason: String, hint: String, since: Micros) {
        let mut inner = self.stats.lock();
        let known = inner.troubles.get(&self.id).map(|trouble| (trouble.attempts, trouble.since));
        let (attempts, since) = known.unwrap_or((0, since));
        inner.troubles.insert(self.id, Trouble { reason, hint, attempts, since });
        self.set = true;
    }

    /// It works again.
    pub(super) fn clear(&mut self) {
        if std::mem::take(&mut self.set) {
            let trouble = self.stats.lock().troubles.remove(&self.id);
            if let Some(trouble) = trouble.filter(|trouble| trouble.attempts >= WORTH_A_LINE) {
                tracing::info!(reason = trouble.reason, attempts = trouble.attempts, "that trouble is over");
            }
        }
    }
}

impl Drop for TroubleGuard {
    fn drop(&mut self) {
        // Given up, which is no recovery.
        if self.set {
            self.stats.lock().troubles.remove(&self.id);
        }
    }
}

pub(super) fn now() -> Micros {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Micros::try_from(since.as_micros()).unwrap_or(Micros::MAX)
}
