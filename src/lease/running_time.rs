//! Measures for how long a process has run, by a clock that also counts the time in which it did not.

use std::time::Duration;

/// The longest time between two calls of [`RunningTime::advance`] that counts in full. Of a longer time only this much
/// counts: this process, and probably all others, was suspended or frozen meanwhile.
const MAX_STEP: Duration = Duration::from_secs(1);

/// The time for which this process has run. The caller calls [`RunningTime::advance`] more often than once a second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RunningTime {
    last: Duration,
    total: Duration,
}

impl RunningTime {
    /// Begins to measure at `now`. The clock of all times is `CLOCK_BOOTTIME`.
    pub(crate) fn since(now: Duration) -> Self {
        Self { last: now, total: Duration::ZERO }
    }

    /// Returns for how long this process has run since the beginning.
    pub(crate) fn advance(&mut self, now: Duration) -> Duration {
        self.total += now.saturating_sub(self.last).min(MAX_STEP);
        self.last = now;
        self.total
    }

    /// Returns the result of the last [`RunningTime::advance`]. Zero if there was none.
    pub(crate) fn total(&self) -> Duration {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_time_in_which_the_process_has_run_counts() {
        let mut time = RunningTime::since(Duration::from_secs(100));
        for (milliseconds, expected) in [
            (100_000, 0),
            (100_250, 250),
            (101_250, 1250),
            // It was suspended for an hour.
            (3_701_250, 2250),
            (3_701_500, 2500),
            // The clock does not go back. If it did, nothing would be counted twice.
            (3_701_000, 2500),
            (3_701_100, 2600),
        ] {
            assert_eq!(time.advance(Duration::from_millis(milliseconds)), Duration::from_millis(expected));
            assert_eq!(time.total(), Duration::from_millis(expected));
        }
    }
}
