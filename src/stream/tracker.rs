//! What may be acknowledged: only what the sink has answered for, and never a part of a transaction.

use std::collections::VecDeque;

use crate::lsn::Lsn;
use crate::status::Micros;

/// A transaction that has been received whole.
#[derive(Clone, Copy, Debug)]
struct Ended {
    commit: Lsn,
    end: Lsn,
    committed_at: Micros,
    received_at: Micros,
}

/// Transactions in commit order, and how far they have been answered for.
///
/// Invariant: the confirmed position never passes the beginning of the commit record of a transaction with an
/// operation that is not answered for, and never goes back.
#[derive(Debug, Default)]
pub struct Tracker {
    open: Option<Lsn>,
    ended: VecDeque<Ended>,
    idle: Lsn,
    confirmed: Lsn,
    process_latency: Option<Micros>,
}

impl Tracker {
    /// The stream begins again at the confirmed position: what was arriving arrives once more.
    pub fn restart(&mut self) {
        self.open = None;
    }

    /// A transaction with this commit position begins to arrive.
    pub fn begin(&mut self, commit: Lsn) {
        self.open = Some(commit);
    }

    /// It has arrived whole, and the next begins at `end` or later.
    pub fn commit(&mut self, end: Lsn, committed_at: Micros, received_at: Micros) {
        if let Some(commit) = self.open.take() {
            self.ended.push_back(Ended { commit, end, committed_at, received_at });
        }
    }

    /// PostgreSQL has sent everything before `wal_end`.
    pub fn keepalive(&mut self, wal_end: Lsn) {
        // Within a transaction it says nothing: the rest is still to come.
        if self.open.is_none() {
            self.idle = self.idle.max(wal_end);
        }
    }

    /// What may be confirmed when the oldest operation without an answer belongs to the transaction that commits at
    /// `oldest` (none: everything is answered).
    pub fn confirm(&mut self, oldest: Option<Lsn>, now: Micros) -> Lsn {
        while let Some(first) = self.ended.front().filter(|first| oldest.is_none_or(|oldest| first.commit < oldest)) {
            self.confirmed = self.confirmed.max(first.end);
            self.process_latency = Some(now - first.received_at);
            self.ended.pop_front();
        }
        if self.ended.is_empty() && self.open.is_none() && oldest.is_none() {
            self.confirmed = self.confirmed.max(self.idle);
        }
        self.confirmed
    }

    /// When the oldest transaction that is not answered for was committed.
    #[must_use]
    pub fn oldest_commit(&self) -> Option<Micros> {
        self.ended.front().map(|first| first.committed_at)
    }

    /// Microseconds that the newest answered transaction took from its receipt to its answer.
    #[must_use]
    pub fn process_latency(&self) -> Option<Micros> {
        self.process_latency
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_an_answered_prefix_is_confirmed() {
        let mut tracker = Tracker::default();
        for (commit, end) in [(100, 110), (200, 210), (300, 310)] {
            tracker.begin(Lsn(commit));
            tracker.commit(Lsn(end), 0, 0);
        }
        assert_eq!(tracker.confirm(Some(Lsn(100)), 0), Lsn(0));
        assert_eq!(tracker.confirm(Some(Lsn(200)), 0), Lsn(110));
        tracker.keepalive(Lsn(900));
        assert_eq!(tracker.confirm(Some(Lsn(300)), 0), Lsn(210), "a keepalive passes nothing that is on its way");
        assert_eq!(tracker.confirm(None, 0), Lsn(900));
    }

    #[test]
    fn an_open_transaction_holds_the_position() {
        let mut tracker = Tracker::default();
        tracker.begin(Lsn(100));
        tracker.keepalive(Lsn(500));
        assert_eq!(tracker.confirm(None, 0), Lsn(0), "nothing of it may have been written yet");
        tracker.commit(Lsn(110), 0, 0);
        assert_eq!(tracker.confirm(None, 0), Lsn(110));
    }

    proptest! {
        /// Random arrivals and answers: never past an unanswered commit, never back, everything in the end.
        #[test]
        fn never_past_what_is_unanswered(steps in prop::collection::vec((0_u8..4, 1_u64..50), 1..200)) {
            let mut tracker = Tracker::default();
            let (mut position, mut unanswered, mut last, mut open) = (100, VecDeque::new(), Lsn(0), false);
            for (kind, distance) in steps {
                position += distance;
                match kind {
                    0 if !open => { tracker.begin(Lsn(position)); unanswered.push_back(Lsn(position)); open = true; }
                    1 if open => { tracker.commit(Lsn(position), 0, 0); open = false; }
                    2 => { unanswered.pop_front(); }
                    _ => tracker.keepalive(Lsn(position)),
                }
                let confirmed = tracker.confirm(unanswered.front().copied(), 0);
                prop_assert!(confirmed >= last);
                prop_assert!(unanswered.front().is_none_or(|oldest| confirmed <= *oldest));
                last = confirmed;
            }
            if open { tracker.commit(Lsn(position + 1), 0, 0); }
            tracker.keepalive(Lsn(position + 2));
            prop_assert_eq!(tracker.confirm(None, 0), Lsn(position + 2));
        }
    }
}
