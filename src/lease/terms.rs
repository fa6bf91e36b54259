//! The times of a lease. All of them follow from its length.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

/// The longest accepted lease. A longer one would only make others wait longer for the lock of a dead host.
const MAX_LENGTH: Duration = Duration::from_hours(1);

/// The shortest accepted lease. Clouds pause virtual machines for up to 30 s, and a shorter lease would be lost then. A
/// debug build accepts 2 s, for the tests.
const MIN_LENGTH: Duration = if cfg!(debug_assertions) { Duration::from_secs(2) } else { Duration::from_mins(1) };

/// The longest time between two renewals, without the random part.
const MAX_RENEWAL_INTERVAL: Duration = Duration::from_mins(1);

/// How late the first renewal may be after an outage: the pause between two requests that fail, or, if packets were
/// dropped, the time after which the kernel sends a SYN again.
const MAX_RECONNECTION_TIME: Duration = Duration::from_secs(5);

/// How much the clocks of a service's hosts may differ before a lease counts as lapsed.
const CLOCK_TOLERANCE: Duration = Duration::from_secs(10);

/// S3 and DynamoDB refuse a request whose time differs from theirs by more than this. So the clocks of their own hosts
/// do not differ by more, and a lease that lapsed so long ago needs no further wait.
const MAX_CLOCK_DIFFERENCE: Duration = Duration::from_mins(15);

/// How long a claim counts, from the time at which its taker read the lock. A taker that dies must not keep others
/// from the lock for the length of a long lease.
pub(crate) const CLAIM_LENGTH: Duration = Duration::from_mins(1);

/// The length of a lease, and all times that follow from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Terms {
    length: Duration,
}

impl Terms {
    /// Returns the terms of a lease of `length`. `None` if no holder may choose this length.
    pub(crate) fn new(length: Duration) -> Option<Self> {
        (MIN_LENGTH..=MAX_LENGTH).contains(&length).then_some(Self { length })
    }

    /// Returns the terms of a claim.
    pub(crate) fn of_claim() -> Self {
        Self { length: CLAIM_LENGTH }
    }

    pub(crate) fn length(self) -> Duration {
        self.length
    }

    /// The time between two renewals, without the random part that keeps the runs of a fleet apart: up to a tenth more
    /// or less. It is so short that an outage of [`Terms::unnoticed_outage`] has no effect, whenever it begins: the
    /// last renewal before it may be two intervals old, because a renewal carries the time of the response before it.
    pub(crate) fn renewal_interval(self) -> Duration {
        let rest = self.working_time().saturating_sub(self.unnoticed_outage() + self.reconnection_time());
        (rest / 2 * 10 / 11).min(MAX_RENEWAL_INTERVAL)
    }

    /// How long the service may be out of reach without any effect on terraform.
    fn unnoticed_outage(self) -> Duration {
        self.length * 2 / 5
    }

    /// How late the first renewal after an outage may be. The keeper must not pause for longer between two requests.
    pub(crate) fn reconnection_time(self) -> Duration {
        MAX_RECONNECTION_TIME.min(self.length / 12)
    }

    /// How long the holder may work. It is counted from before the holder sent the request whose response had the
    /// `renewed` of the record.
    pub(crate) fn working_time(self) -> Duration {
        self.length * 4 / 5
    }

    /// How long the process that renews the lease may not answer until it is replaced. This leaves its successor the
    /// time for a renewal before the holder must stop. 10 s, and less only for the leases of the tests.
    pub(crate) fn keeper_timeout(self) -> Duration {
        self.renewal_interval().clamp(Duration::from_secs(2), Duration::from_secs(10))
    }

    /// How long the service may refuse renewals until terraform gets an interrupt, counted like
    /// [`Terms::working_time`].
    pub(crate) fn refusal_time(self) -> Duration {
        self.length * 3 / 5
    }

    /// How much the clocks of the service's hosts may differ.
    fn clock_tolerance(self) -> Duration {
        CLOCK_TOLERANCE.min(self.length / 6)
    }

    /// How long after its renewal a lease lapses, as others see it.
    pub(crate) fn lapse_time(self) -> Duration {
        self.length + self.clock_tolerance()
    }

    /// Whether a lease has lapsed that was renewed at `renewed`. `now` is the time of the response that contained it.
    /// Both are times of the service.
    pub(crate) fn has_lapsed(self, renewed: Timestamp, now: Timestamp) -> bool {
        now.duration_since(renewed) > signed(self.lapse_time())
    }

    /// Returns how long it takes until a lease lapses that was renewed at `renewed`. Zero if it has lapsed. The
    /// arguments are those of [`Terms::has_lapsed`].
    pub(crate) fn time_to_lapse(self, renewed: Timestamp, now: Timestamp) -> Duration {
        let left = signed(self.lapse_time()).saturating_sub(now.duration_since(renewed));
        Duration::try_from(left).unwrap_or_default()
    }

    /// How long a record must not change before its lock is taken over, if the service takes `response_time` for its
    /// slowest response. If the clocks of the service's hosts differ by more than the tolerance, a holder that is
    /// connected renews its lease in this time: a renewal is sent at most one interval after the one before it, and may
    /// arrive up to `response_time` later.
    pub(crate) fn quiet_window(self, response_time: Duration) -> Duration {
        let interval = self.renewal_interval();
        self.clock_tolerance().max(interval * 3 / 2).max(interval * 11 / 10 + response_time)
    }

    /// Whether a lease lapsed so long ago that the clocks of the service's hosts cannot explain it.
    pub(crate) fn has_lapsed_long_ago(self, renewed: Timestamp, now: Timestamp) -> bool {
        now.duration_since(renewed) > signed(self.length + MAX_CLOCK_DIFFERENCE)
    }

    /// Whether the service's time and a host's time are as close as S3 and DynamoDB demand it of a request. A host
    /// whose clock is wrong, and a service that is a proxy's, do not agree.
    pub(crate) fn agrees(service: Timestamp, host: Timestamp) -> bool {
        service.duration_since(host).abs() <= signed(MAX_CLOCK_DIFFERENCE)
    }

    /// Whether `renewed` is later than `now`, by more than the clocks of the service's hosts differ.
    pub(crate) fn is_in_the_future(self, renewed: Timestamp, now: Timestamp) -> bool {
        renewed.duration_since(now) > signed(self.clock_tolerance())
    }

    /// How long a stopped terraform waits for an answer of the service, if no person can end it at a terminal.
    pub(crate) fn longest_stop(self) -> Duration {
        (self.length * 3).max(Duration::from_mins(15))
    }
}

fn signed(duration: Duration) -> SignedDuration {
    SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms(seconds: u64) -> Terms {
        Terms::new(Duration::from_secs(seconds)).unwrap()
    }

    #[test]
    fn two_clocks_agree_if_the_service_would_accept_a_request() {
        let time = |second: i64| Timestamp::from_second(1_790_000_000 + second).unwrap();
        for (host, expected) in [(0, true), (900, true), (-900, true), (901, false), (-901, false), (86_400, false)] {
            assert_eq!(Terms::agrees(time(0), time(host)), expected, "{host}");
        }
    }

    #[test]
    fn a_length_that_nobody_may_choose_is_none() {
        for seconds in [0, 1, 3601, u64::MAX] {
            assert_eq!(Terms::new(Duration::from_secs(seconds)), None, "{seconds}");
        }
        for seconds in [60, 300, 3600] {
            assert_eq!(terms(seconds).length(), Duration::from_secs(seconds));
        }
    }

    /// A holder counts from before it sent the request whose time it wrote, so it has stopped before a taker may begin,
    /// even if the service's clocks differ by this much in each direction.
    #[test]
    fn a_holder_stops_before_a_taker_begins() {
        for (seconds, difference) in [(60, 10), (300, 34), (3600, 364)] {
            let terms = terms(seconds);
            // A `Date` has whole seconds.
            let lapses_after = terms.length + terms.clock_tolerance();
            let margin = lapses_after.checked_sub(terms.working_time() + Duration::from_secs(1)).unwrap();
            assert!(margin >= Duration::from_secs(2 * difference), "{seconds}: {margin:?}");
        }
    }

    #[test]
    fn an_outage_of_two_fifths_of_the_lease_goes_unnoticed_whenever_it_begins() {
        for seconds in 2..=3600 {
            let terms = terms(seconds);
            // The last renewal before the outage carries the time of the response before it, and the next one was due
            // when the outage began. Each interval was the longest one.
            let old = terms.renewal_interval() * 11 / 10 * 2;
            let until = old + terms.length() * 2 / 5 + terms.reconnection_time();
            assert!(until <= terms.working_time(), "{seconds}: {until:?}");
        }
    }

    #[test]
    fn a_keeper_that_does_not_answer_is_replaced_while_the_holder_may_still_work() {
        for seconds in 60..=3600 {
            let terms = terms(seconds);
            // The last renewal carries the time of the response before it, and was just not repeated.
            let left = terms.working_time().checked_sub(terms.renewal_interval() * 11 / 10 * 2).unwrap();
            assert!(left > terms.keeper_timeout() + Duration::from_secs(5), "{seconds}: {left:?}");
        }
    }

    #[test]
    fn a_lease_lapses_by_the_time_of_the_service() {
        let renewed: Timestamp = "2026-11-26T12:00:00Z".parse().unwrap();
        let after = |seconds| renewed + SignedDuration::from_secs(seconds);
        let terms = terms(300);
        for (seconds, lapsed, long_ago, future) in [
            (-3600, false, false, true),
            (-11, false, false, true),
            (-10, false, false, false),
            (0, false, false, false),
            (310, false, false, false),
            (311, true, false, false),
            (1200, true, false, false),
            (1201, true, true, false),
            (36_000, true, true, false),
        ] {
            assert_eq!(terms.has_lapsed(renewed, after(seconds)), lapsed, "{seconds}");
            let left = terms.time_to_lapse(renewed, after(seconds));
            assert_eq!(left, Duration::from_secs(u64::try_from(310 - seconds).unwrap_or_default()), "{seconds}");
            assert_eq!(terms.has_lapsed_long_ago(renewed, after(seconds)), long_ago, "{seconds}");
            assert_eq!(terms.is_in_the_future(renewed, after(seconds)), future, "{seconds}");
        }
        assert!(!terms.has_lapsed(Timestamp::MAX, Timestamp::MIN) && terms.has_lapsed(Timestamp::MIN, Timestamp::MAX));
    }

    #[test]
    fn the_times_of_a_lease_of_five_minutes() {
        let terms = terms(300);
        let seconds = |duration: Duration| duration.as_secs();
        assert_eq!(seconds(terms.renewal_interval()), 52);
        assert_eq!(seconds(terms.refusal_time()), 180);
        assert_eq!(seconds(terms.working_time()), 240);
        assert_eq!(seconds(terms.quiet_window(Duration::ZERO)), 78);
        assert_eq!(seconds(terms.quiet_window(Duration::from_secs(20))), 78);
        assert_eq!(seconds(terms.quiet_window(Duration::from_secs(30))), 87);
        assert_eq!(seconds(terms.longest_stop()), 900);
        assert_eq!(seconds(terms.keeper_timeout()), 10);
        assert_eq!(seconds(Terms::of_claim().quiet_window(Duration::from_secs(3))), 12);
    }
}
