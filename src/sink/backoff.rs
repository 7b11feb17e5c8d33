//! How long to wait before trying again.

use std::time::Duration;

/// Exponential backoff with full jitter: every wait is drawn from zero to a limit that doubles up to a cap, so that
/// many lanes do not come back at the same moment.
#[derive(Clone, Debug)]
pub(super) struct Backoff {
    base: Duration,
    cap: Duration,
    attempts: u32,
}

/// The longest wait that a server can ask for by `Retry-After`.
const LONGEST_ASKED: Duration = Duration::from_secs(300);

impl Backoff {
    pub(super) fn new(base: Duration, cap: Duration) -> Self {
        Self { base, cap, attempts: 0 }
    }

    /// Something succeeded: the next wait is short again.
    pub(super) fn reset(&mut self) {
        self.attempts = 0;
    }

    /// The next wait; never shorter than the server asked for.
    pub(super) fn next(&mut self, asked: Option<Duration>) -> Duration {
        let limit = self.base.saturating_mul(1 << self.attempts.min(20)).min(self.cap);
        self.attempts = self.attempts.saturating_add(1);
        limit.mul_f64(fastrand::f64()).max(asked.unwrap_or_default().min(LONGEST_ASKED))
    }

    /// A wait for what only a person mends: between a sixth and a third of the cap (5 to 10 s of 30 s).
    pub(super) fn slow(&mut self, asked: Option<Duration>) -> Duration {
        self.attempts = self.attempts.saturating_add(1);
        (self.cap / 6).mul_f64(1.0 + fastrand::f64()).max(asked.unwrap_or_default().min(LONGEST_ASKED))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_cap_and_obey_the_server() {
        let (base, cap) = (Duration::from_millis(100), Duration::from_secs(30));
        let mut backoff = Backoff::new(base, cap);
        for attempt in 0..200 {
            let limit = base.saturating_mul(1 << attempt.min(20)).min(cap);
            assert!(backoff.next(None) <= limit, "attempt {attempt}");
        }
        assert!((0..200).map(|_| backoff.next(None)).max() > Some(cap / 2), "never near the cap");
        assert!(backoff.next(Some(Duration::from_secs(45))) >= Duration::from_secs(45));
        assert_eq!(backoff.next(Some(Duration::from_secs(86_400))), LONGEST_ASKED);
        assert!(backoff.slow(None) >= cap / 6 && backoff.slow(None) <= cap / 3);
        backoff.reset();
        assert!(backoff.next(None) <= base);
    }
}
