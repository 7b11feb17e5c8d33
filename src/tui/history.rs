//! Short histories for the sparklines, kept by the screen from one status to the next.

use std::collections::VecDeque;

use crate::engine::Micros;

/// The largest value of each bin, in bins aligned to the clock: a line of them scrolls by whole cells and does not shimmer.
#[derive(Debug)]
pub(super) struct History {
    bin: Micros,
    newest: i64,
    values: VecDeque<Option<f64>>,
    keep: usize,
}

impl History {
    /// An empty history of `keep` bins of `seconds` each.
    pub(super) fn new(seconds: i64, keep: usize) -> Self {
        Self { bin: seconds.max(1) * 1_000_000, newest: i64::MIN, values: VecDeque::new(), keep }
    }

    /// Adds what was seen at `at`. Bins without a value stay gaps; a clock that was set back starts anew.
    pub(super) fn push(&mut self, at: Micros, value: Option<f64>) {
        let bin = at.div_euclid(self.bin);
        let ahead = bin.saturating_sub(self.newest);
        if self.values.is_empty() || ahead < 0 || ahead > i64::try_from(self.keep).unwrap_or(i64::MAX) {
            self.values.clear();
            self.values.push_back(value);
            self.newest = bin;
            return;
        }
        for _ in 0..ahead {
            self.values.push_back(None);
        }
        self.newest = bin;
        if let (Some(last), Some(value)) = (self.values.back_mut(), value) {
            *last = Some(last.map_or(value, |last| last.max(value)));
        }
        while self.values.len() > self.keep {
            self.values.pop_front();
        }
    }

    /// The newest `count` bins, oldest first; fewer if there are fewer.
    pub(super) fn newest(&self, count: usize) -> Vec<Option<f64>> {
        self.values.iter().skip(self.values.len().saturating_sub(count)).copied().collect()
    }

    /// Seconds of a bin.
    pub(super) fn bin_seconds(&self) -> u64 {
        u64::try_from(self.bin / 1_000_000).unwrap_or(1)
    }

    /// Whether the newest bins are above (1), below (-1) or about equal to (0) those before; none while too few are known.
    /// A difference of less than `noise` is none.
    pub(super) fn trend(&self, noise: f64) -> Option<i8> {
        let values = self.newest(8);
        if values.len() < 8 {
            return None;
        }
        let mean = |part: &[Option<f64>]| {
            let known: Vec<f64> = part.iter().flatten().copied().collect();
            (!known.is_empty()).then(|| known.iter().sum::<f64>() / crate::tui::format::as_f64(known.len() as u64))
        };
        let (before, after) = (mean(&values[..4])?, mean(&values[4..])?);
        Some(if (after - before).abs() < noise {
            0
        } else if after > before * 1.1 {
            1
        } else if after < before * 0.9 {
            -1
        } else {
            0
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: i64 = 1_000_000;

    #[test]
    fn a_bin_keeps_its_largest_value_and_a_gap_stays_one() {
        let mut history = History::new(5, 4);
        for (at, value) in [(0, 1.0), (4 * S, 3.0), (4 * S + 1, 2.0), (16 * S, 5.0)] {
            history.push(at, Some(value));
        }
        assert_eq!(history.newest(9), [Some(3.0), None, None, Some(5.0)]);
        history.push(20 * S, None);
        assert_eq!(history.newest(2), [Some(5.0), None]);
        history.push(0, Some(7.0));
        assert_eq!(history.newest(9), [Some(7.0)]);
        history.push(i64::MAX, Some(8.0));
        assert_eq!(history.newest(9), [Some(8.0)]);
    }

    #[test]
    fn a_trend_needs_two_halves() {
        let mut history = History::new(1, 60);
        for second in 0..7 {
            history.push(second * S, Some(10.0));
        }
        assert_eq!(history.trend(5.0), None);
        history.push(7 * S, Some(10.0));
        assert_eq!(history.trend(5.0), Some(0));
        for second in 8..12 {
            history.push(second * S, Some(20.0));
        }
        assert_eq!(history.trend(5.0), Some(1));
        for second in 12..16 {
            history.push(second * S, Some(0.0));
        }
        assert_eq!(history.trend(5.0), Some(-1));
        assert_eq!(history.trend(25.0), Some(0));
    }
}
