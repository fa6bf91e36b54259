//! Decides when the process that renews a lease is replaced: it does not answer, or it has ended. It may be stopped
//! (SIGSTOP), hang in the kernel, or crash at once each time that it is started.

use std::time::Duration;

use super::running_time::RunningTime;
use super::terms::Terms;

/// What to do about a keeper that has reported nothing new.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WatchdogStep {
    Wait,
    /// Ask it to answer.
    Ping,
    /// Kill it, and start another one.
    Replace,
}

/// Watches one keeper. Only the time in which the watching process itself has run counts: after a suspend or a freeze
/// of both, the keeper gets the time to answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Watchdog {
    time: RunningTime,
    /// When the keeper was heard last, and when it was last asked to answer. Both are counted from its start.
    heard: Duration,
    pinged: Duration,
}

impl Watchdog {
    /// Begins to watch a keeper that was started at `now`. The clock of all times is `CLOCK_BOOTTIME`.
    pub(crate) fn new(now: Duration) -> Self {
        Self { time: RunningTime::since(now), heard: Duration::ZERO, pinged: Duration::ZERO }
    }

    /// Notes that the keeper has said something.
    pub(crate) fn heard(&mut self) {
        self.heard = self.time.total();
    }

    /// Decides what to do when everything was read that the keeper has said so far.
    pub(crate) fn step(&mut self, terms: Terms, now: Duration) -> WatchdogStep {
        let total = self.time.advance(now);
        let timeout = terms.keeper_timeout();
        if total.saturating_sub(self.heard) >= timeout {
            WatchdogStep::Replace
        } else if total.saturating_sub(self.heard.max(self.pinged)) >= timeout / 4 {
            self.pinged = total;
            WatchdogStep::Ping
        } else {
            WatchdogStep::Wait
        }
    }
}

/// So many keepers fail in a row until the user is told.
pub(crate) const FAILURES_TO_REPORT: u32 = 3;

/// The shortest and the longest pause before a keeper that has failed is replaced.
const MIN_RESTART_PAUSE: Duration = Duration::from_millis(250);
const MAX_RESTART_PAUSE: Duration = Duration::from_secs(30);

/// Returns how many keepers in a row have failed, after one that has worked for `lived`. `earlier` have failed before.
/// A keeper that has worked for an interval between two renewals ends the row, because its requests were no more than
/// usual.
pub(crate) fn failures(terms: Terms, earlier: u32, lived: Duration) -> u32 {
    if lived >= terms.renewal_interval() { 1 } else { earlier.saturating_add(1) }
}

/// Returns how long to wait before the next keeper is started, after so many `failures` in a row.
pub(crate) fn restart_pause(failures: u32) -> Duration {
    (MIN_RESTART_PAUSE * 2_u32.pow(failures.clamp(1, 10) - 1)).min(MAX_RESTART_PAUSE)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms() -> Terms {
        Terms::new(Duration::from_mins(5)).unwrap()
    }

    const fn ms(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    /// Returns the steps in so many seconds, one look each 250 ms, and the seconds at which they were taken.
    fn steps(watchdog: &mut Watchdog, from: u64, seconds: u64) -> Vec<(u64, WatchdogStep)> {
        let looks = (1..=seconds * 4).map(|look| from + look * 250);
        let mut step = |at| (at, watchdog.step(terms(), ms(at)));
        looks.map(&mut step).filter(|(_, step)| *step != WatchdogStep::Wait).collect()
    }

    #[test]
    fn a_keeper_that_does_not_answer_is_asked_and_then_replaced() {
        use WatchdogStep::{Ping, Replace};
        let mut watchdog = Watchdog::new(ms(7000));
        let asked = [(9500, Ping), (12_000, Ping), (14_500, Ping), (17_000, Replace)];
        assert_eq!(steps(&mut watchdog, 7000, 10), asked);
    }

    #[test]
    fn a_keeper_that_answers_is_never_replaced() {
        let mut watchdog = Watchdog::new(ms(0));
        for look in 1..10_000 {
            match watchdog.step(terms(), ms(look * 250)) {
                WatchdogStep::Wait => {}
                WatchdogStep::Ping => watchdog.heard(),
                WatchdogStep::Replace => panic!("after {look} looks"),
            }
        }
    }

    #[test]
    fn a_keeper_that_was_suspended_together_with_its_watcher_gets_the_time_to_answer() {
        let mut watchdog = Watchdog::new(ms(0));
        assert_eq!(steps(&mut watchdog, 0, 8).len(), 3);
        // An hour later, it is not replaced at once.
        assert_eq!(watchdog.step(terms(), ms(3_608_000)), WatchdogStep::Wait);
        assert_eq!(steps(&mut watchdog, 3_608_000, 1), [(3_609_000, WatchdogStep::Replace)]);
    }

    #[test]
    fn the_pause_grows_with_the_failures_in_a_row_and_a_keeper_that_has_worked_ends_the_row() {
        let pauses: Vec<u128> = (0..12).map(|failures| restart_pause(failures).as_millis()).collect();
        assert_eq!(pauses, [250, 250, 500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000, 30_000]);
        assert_eq!(restart_pause(u32::MAX), MAX_RESTART_PAUSE);
        for (earlier, seconds, expected) in
            [(0, 0, 1), (1, 0, 2), (2, 52, 3), (2, 53, 1), (0, 53, 1), (u32::MAX, 0, u32::MAX)]
        {
            assert_eq!(failures(terms(), earlier, Duration::from_secs(seconds)), expected, "{earlier} {seconds}");
        }
    }
}
