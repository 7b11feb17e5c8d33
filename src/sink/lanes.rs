//! Order per document: operations on one document go through one lane, and a lane has one bulk in flight.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::body::{Body, Target, hash_id, hash_index};
use super::deliver::Sink;
use super::error::SinkError;
use super::stats::Queued;
use crate::change::Action;
use crate::lsn::Lsn;

/// When a body is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Items.
    pub documents: usize,
    /// Bytes, before compression. The item that reaches it may go beyond.
    pub bytes: usize,
    /// How long after a lane's last body the next one waits for more, if it is not full. The first after a pause does
    /// not wait.
    pub linger: Duration,
}

/// Bodies under construction and on their way, one of each in every lane and one between.
///
/// Operations of one transaction share their version, and between equal versions the later request wins. So no request of a lane is sent before the one before it is answered for good. For the same reason
/// [`drain`](Lanes::drain) before dropping, if the same changes may be sent again: what is in flight then is given up,
/// and may arrive late.
#[derive(Debug)]
pub struct Lanes {
    sink: Sink,
    limits: Limits,
    lanes: Vec<Lane>,
    /// The lane written to last: the only one that can be full without `full` saying so.
    last: usize,
    full: bool,
    /// Everything under construction goes before the operation that comes next.
    make_way: bool,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Lane {
    body: Body,
    /// The commit of the first operation in `body`; says nothing while that is empty.
    commit: Lsn,
    /// When the last body was handed over.
    sent: Option<Instant>,
    sender: mpsc::Sender<Load>,
    /// The first commit of each body handed over and not answered yet, oldest first.
    pending: Pending,
    task: AbortHandle,
}

type Pending = Arc<Mutex<VecDeque<Lsn>>>;

#[derive(Debug)]
struct Load {
    body: Body,
    queued: Queued,
}

#[derive(Debug, Default)]
struct Shared {
    /// For the caller.
    answered: Arc<Notify>,
    /// For `drain`.
    drained: Notify,
    failed: Mutex<Option<SinkError>>,
}

impl Lanes {
    /// `count` lanes (at least one), each with a task of its own. When `stop` is cancelled they end without waiting
    /// for answers.
    ///
    /// # Panics
    /// Outside a Tokio runtime.
    #[must_use]
    pub fn new(sink: Sink, count: usize, limits: Limits, stop: CancellationToken) -> Self {
        let shared = Arc::new(Shared::default());
        let lane = |_| {
            // One waits here while one is in flight.
            let (sender, receiver) = mpsc::channel(1);
            let pending = Pending::default();
            // Made here: a task that ends before its first step is seen, too.
            let end = End { shared: Arc::clone(&shared), error: Some(SinkError::Fault("a lane has ended".to_owned())) };
            let task = run(sink.clone(), receiver, Arc::clone(&pending), end, stop.clone());
            Lane {
                body: sink.body(),
                commit: Lsn::ZERO,
                sent: None,
                sender,
                pending,
                task: tokio::spawn(task).abort_handle(),
            }
        };
        let lanes = (0..count.max(1)).map(lane).collect();
        Self { sink, limits, lanes, last: 0, full: false, make_way: false, shared }
    }

    /// The body to write the next operation on this document into. `commit` is the commit position of its
    /// transaction and never decreases from call to call. The caller writes at once.
    pub fn body_for(&mut self, target: &Target, id: &[u8], commit: Lsn) -> &mut Body {
        self.body_at(target.hash(id), commit)
    }

    /// The same for what a handler asked for, which may name another index.
    pub fn body_for_action(&mut self, target: &Target, action: &Action, commit: Lsn) -> &mut Body {
        let hash = match &action.index {
            Some(index) => hash_id(hash_index(index), action.id.as_bytes()),
            None => target.hash(action.id.as_bytes()),
        };
        self.body_at(hash, commit)
    }

    fn body_at(&mut self, hash: u64, commit: Lsn) -> &mut Body {
        self.full = self.needs_flush();
        #[allow(clippy::cast_possible_truncation, reason = "less than the number of lanes")]
        let at = ((u128::from(hash) * self.lanes.len() as u128) >> 64) as usize;
        self.last = at;
        let lane = &mut self.lanes[at];
        // A body whose only item was dropped again is empty and keeps a commit that says nothing.
        if lane.body.is_empty() {
            lane.commit = commit;
        }
        &mut lane.body
    }

    /// An operation of so many bytes comes next. True: it fills a body by itself, and what is under construction has to go
    /// before it, so that a server which takes no such body refuses nothing but that: call
    /// [`flush_full`](Lanes::flush_full) first.
    #[inline]
    pub fn make_way(&mut self, bytes: usize) -> bool {
        self.make_way |= bytes >= self.limits.bytes && self.lanes.iter().any(|lane| !lane.body.is_empty());
        self.make_way
    }

    /// Some body has reached its limits: call [`flush_full`](Lanes::flush_full) before writing on.
    #[must_use]
    pub fn needs_flush(&self) -> bool {
        self.full || self.limits.reached(&self.lanes[self.last].body)
    }

    /// Hands the bodies that have reached their limits to their lanes, waiting for those that are busy. May be
    /// cancelled: nothing is lost then.
    ///
    /// # Errors
    /// [`SinkError::Stopped`]
    pub async fn flush_full(&mut self) -> Result<(), SinkError> {
        for at in 0..self.lanes.len() {
            let body = &self.lanes[at].body;
            if self.limits.reached(body) || self.make_way && !body.is_empty() {
                self.hand_over(at).await?;
            }
        }
        (self.full, self.make_way) = (false, false);
        Ok(())
    }

    /// Hands over every body that holds something, has lingered, and whose lane has nothing to do. Does not wait.
    /// Answers when the next of those that linger is due: call it again then.
    pub fn flush_idle(&mut self) -> Option<Instant> {
        let now = Instant::now();
        let mut next: Option<Instant> = None;
        for lane in &mut self.lanes {
            if lane.body.is_empty() || !lock(&lane.pending).is_empty() {
                continue;
            }
            // None: further away than a moment can tell; drained at the end.
            let due = lane.sent.map_or(Some(now), |sent| sent.checked_add(self.limits.linger));
            match due {
                Some(due) if due <= now => {
                    if let Ok(permit) = lane.sender.clone().try_reserve_owned() {
                        permit.send(lane.load(&self.sink));
                    }
                }
                Some(due) => next = Some(next.map_or(due, |next| next.min(due))),
                None => {}
            }
        }
        next
    }

    /// Waits until everything written so far is answered for good. May be cancelled: nothing is lost then.
    ///
    /// # Errors
    /// [`SinkError::Stopped`]
    pub async fn drain(&mut self) -> Result<(), SinkError> {
        for at in 0..self.lanes.len() {
            if !self.lanes[at].body.is_empty() {
                self.hand_over(at).await?;
            }
        }
        loop {
            let drained = self.shared.drained.notified();
            if self.lanes.iter().all(|lane| lock(&lane.pending).is_empty()) {
                return Ok(());
            }
            if let Some(error) = self.failed() {
                return Err(error);
            }
            drained.await;
        }
    }

    /// The smallest commit of an operation that is not answered for good: under construction, waiting or in flight.
    /// None: all are answered.
    #[must_use]
    pub fn oldest_unanswered(&self) -> Option<Lsn> {
        let oldest = |lane: &Lane| {
            let written = (!lane.body.is_empty()).then_some(lane.commit);
            lock(&lane.pending).front().copied().into_iter().chain(written).min()
        };
        self.lanes.iter().filter_map(oldest).min()
    }

    /// Notified (`notify_one`: for one waiter, not lost when nobody waits yet) whenever a bulk was answered for good,
    /// and when a lane has failed.
    #[must_use]
    pub fn answered(&self) -> Arc<Notify> {
        Arc::clone(&self.shared.answered)
    }

    /// Documents in bodies under construction. Those handed over are in
    /// [`SinkStats::queued_documents`](super::SinkStats::queued_documents).
    #[must_use]
    pub fn under_construction(&self) -> u64 {
        self.lanes.iter().map(|lane| lane.body.len() as u64).sum()
    }

    /// Why the lanes deliver no more. None while they do.
    #[must_use]
    pub fn failed(&self) -> Option<SinkError> {
        lock(&self.shared.failed).clone()
    }

    async fn hand_over(&mut self, at: usize) -> Result<(), SinkError> {
        let lane = &mut self.lanes[at];
        // The body leaves only with the permit in hand, so that a cancelled call loses nothing.
        let Ok(permit) = lane.sender.clone().reserve_owned().await else {
            return Err(self.failed().unwrap_or(SinkError::Stopped));
        };
        permit.send(lane.load(&self.sink));
        Ok(())
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        for lane in &self.lanes {
            lane.task.abort();
        }
    }
}

impl Limits {
    fn reached(&self, body: &Body) -> bool {
        (body.len() >= self.documents || body.bytes() >= self.bytes) && !body.is_empty()
    }
}

impl Lane {
    /// Takes the body and counts it as pending.
    fn load(&mut self, sink: &Sink) -> Load {
        let queued = sink.queue(self.body.len());
        lock(&self.pending).push_back(self.commit);
        self.sent = Some(Instant::now());
        Load { body: std::mem::replace(&mut self.body, sink.body()), queued }
    }
}

async fn run(sink: Sink, mut loads: mpsc::Receiver<Load>, pending: Pending, mut end: End, stop: CancellationToken) {
    while let Some(load) = loads.recv().await {
        if let Err(error) = sink.deliver_queued(load.body, load.queued, &stop).await {
            end.error = Some(error);
            return;
        }
        lock(&pending).pop_front();
        end.shared.wake();
    }
    end.error = None;
}

/// Tells those who wait that a lane is gone, whichever way it went.
struct End {
    shared: Arc<Shared>,
    error: Option<SinkError>,
}

impl Drop for End {
    fn drop(&mut self) {
        if let Some(error) = self.error.take() {
            lock(&self.shared.failed).get_or_insert(error);
        }
        self.shared.wake();
    }
}

impl Shared {
    fn wake(&self) {
        self.answered.notify_one();
        self.drained.notify_waiters();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::config;
    use crate::sink::{Client, SinkOptions};

    #[tokio::test]
    async fn a_lane_that_dies_is_noticed() {
        let config = config::Elasticsearch { urls: vec!["http://127.0.0.1:1".to_owned()], ..Default::default() };
        let sink = Sink::new(Client::new(&config).unwrap(), SinkOptions::new(1, "/nonexistent/dead".into()));
        let limits = Limits { documents: 1, bytes: usize::MAX, linger: Duration::ZERO };
        let mut lanes = Lanes::new(sink, 1, limits, CancellationToken::new());
        let target = Target::new("users", 0);
        lanes.body_for(&target, b"1", Lsn(1)).delete(&target, b"1", 1);
        lanes.flush_full().await.unwrap();
        lanes.lanes[0].task.abort();
        assert!(matches!(lanes.drain().await, Err(SinkError::Fault(_))));
        assert_eq!(lanes.oldest_unanswered(), Some(Lsn(1)));
    }
}
