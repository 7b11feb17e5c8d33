//! How long this process may take it for granted that it is the one that writes.
//!
//! Versions keep an old write from replacing a newer document, except where Elasticsearch has forgotten the version of a
//! deleted one (`index.gc_deletes`, 60 s). A process that was stopped for long, and whose work others have taken over
//! meanwhile, would bring such documents back with what it still has in memory. So nothing is sent unless PostgreSQL has
//! answered a moment ago.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::SeqCst};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::broken::{Rule, broken};

/// A clock that goes on while the process, or the machine, sleeps.
#[cfg(target_os = "linux")]
const CLOCK: ClockId = ClockId::CLOCK_BOOTTIME;
#[cfg(not(target_os = "linux"))]
const CLOCK: ClockId = ClockId::CLOCK_MONOTONIC;

/// A moment by that clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Moment(i64);

impl Moment {
    /// Now. A clock that cannot be read stands still at the end of time: no lease is valid then.
    #[must_use]
    pub fn now() -> Self {
        let now = clock_gettime(CLOCK).ok();
        Self(now.map_or(i64::MAX, |now| now.tv_sec().saturating_mul(1_000) + now.tv_nsec() / 1_000_000))
    }
}

/// The right to write, for a while. All clones are the same one.
#[derive(Clone, Debug)]
pub struct Lease {
    until: Arc<AtomicI64>,
}

impl Default for Lease {
    /// Valid for ever, until it is [renewed](Lease::renew) for the first time.
    fn default() -> Self {
        Self { until: Arc::new(AtomicI64::new(i64::MAX - 1)) }
    }
}

impl Lease {
    /// Valid for `span` after `asked`: the moment before the question was sent that has been answered now.
    pub fn renew(&self, asked: Moment, span: Duration) {
        let span = i64::try_from(span.as_millis()).unwrap_or(i64::MAX);
        self.until.store(asked.0.saturating_add(span), SeqCst);
    }

    /// It is valid now.
    #[must_use]
    pub fn is_valid(&self) -> bool {
        Moment::now().0 <= self.until.load(SeqCst) || broken(Rule::Lease)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_ends_by_itself() {
        let lease = Lease::default();
        assert!(lease.is_valid());
        let asked = Moment::now();
        lease.renew(asked, Duration::from_secs(60));
        assert!(lease.clone().is_valid());
        lease.renew(Moment(asked.0 - 1_000), Duration::from_millis(999));
        assert!(!lease.is_valid());
    }
}
