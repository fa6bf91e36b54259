//! A moment, by two clocks: the time of day, and the time since boot. The time of day can be set: forward by an
//! administrator or by the first answer of a time server, and the journal is read by a later process. The time since
//! boot cannot be set, but begins anew at each boot.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::sys::{boot_clock, machine};

/// What the clocks of a host showed at one moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ClockReading {
    /// The time of day.
    #[serde(rename = "since")]
    pub(crate) time: Timestamp,
    /// The ID of the boot ([`machine::boot_id`]). `None` if it is not known, and in the files of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    boot: Option<String>,
    /// The time since that boot, in milliseconds, including suspend ([`boot_clock::now`]).
    #[serde(default, skip_serializing_if = "is_zero")]
    since_boot: u64,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature that serde needs")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl ClockReading {
    /// Reads the clocks.
    pub(crate) fn now() -> Self {
        let since_boot = u64::try_from(boot_clock::now().as_millis()).unwrap_or(u64::MAX);
        Self { time: Timestamp::now(), boot: machine::boot_id(), since_boot }
    }

    /// Returns a reading of which only the time of day is known, like those in the files of earlier versions.
    #[cfg(test)]
    pub(crate) fn of_time(time: Timestamp) -> Self {
        Self { time, boot: None, since_boot: 0 }
    }

    /// Returns what the clocks showed when the machine was booted whose clocks show `self` now.
    pub(crate) fn at_boot(&self) -> Self {
        let uptime = SignedDuration::from_millis(i64::try_from(self.since_boot).unwrap_or(i64::MAX));
        Self { time: crate::time::saturating_sub(self.time, uptime), boot: self.boot.clone(), since_boot: 0 }
    }

    /// Returns how much time has passed from this reading until `now`, at least: the shorter of the times that the two
    /// clocks show. So a clock that was set forward never makes a moment count as long ago.
    ///
    /// If the machine was booted in between, the time since that boot is shorter than the time that has passed. If the
    /// boots are not known, only the time of day counts. Zero if the time of day was set back.
    pub(crate) fn age(&self, now: &Self) -> Duration {
        let by_time_of_day = now.time.duration_since(self.time);
        let by_time_of_day = if by_time_of_day.is_negative() { Duration::ZERO } else { by_time_of_day.unsigned_abs() };
        match (&self.boot, &now.boot) {
            (Some(then), Some(boot)) => {
                let begin = if then == boot { self.since_boot } else { 0 };
                by_time_of_day.min(Duration::from_millis(now.since_boot.saturating_sub(begin)))
            }
            _ => by_time_of_day,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(seconds: i64, boot: Option<&str>, since_boot: u64) -> ClockReading {
        let time = Timestamp::from_second(1_800_000_000 + seconds).unwrap();
        ClockReading { time, boot: boot.map(Into::into), since_boot: since_boot * 1000 }
    }

    #[test]
    fn a_clock_that_is_set_forward_makes_no_moment_older_than_it_is() {
        for (then, now, expected) in [
            (reading(0, Some("b1"), 100), reading(7, Some("b1"), 107), 7),
            // The time of day was set by a day, forward and back.
            (reading(0, Some("b1"), 100), reading(86_407, Some("b1"), 107), 7),
            (reading(0, Some("b1"), 100), reading(-86_393, Some("b1"), 107), 0),
            // The time since boot of another time namespace, or of a restored copy of a virtual machine.
            (reading(0, Some("b1"), 100), reading(7, Some("b1"), 90_000), 7),
            (reading(0, Some("b1"), 100), reading(7, Some("b1"), 50), 0),
            // The machine was booted in between: 30 s ago, and before that the time of day was wrong.
            (reading(0, Some("b1"), 5000), reading(60, Some("b2"), 30), 30),
            (reading(0, Some("b1"), 5000), reading(86_400, Some("b2"), 30), 30),
            // The other machine of a shared state directory was booted long before.
            (reading(0, Some("b1"), 5000), reading(60, Some("b2"), 90_000), 60),
            // A file of an earlier version, and a system without a boot ID.
            (reading(0, None, 0), reading(60, Some("b2"), 90_000), 60),
            (reading(0, Some("b1"), 100), reading(60, None, 0), 60),
            (reading(0, None, 0), reading(-60, None, 0), 0),
        ] {
            assert_eq!(then.age(&now), Duration::from_secs(expected), "{then:?} {now:?}");
        }
    }

    #[test]
    fn the_time_since_boot_is_the_age_of_the_boot() {
        let now = reading(0, Some("b1"), 100);
        assert_eq!(now.at_boot(), reading(-100, Some("b1"), 0));
        assert_eq!(now.at_boot().age(&now), Duration::from_secs(100));
        let unknown = ClockReading { time: Timestamp::MIN, ..reading(0, None, u64::MAX / 1000) };
        assert_eq!(unknown.at_boot().time, Timestamp::MIN);
    }

    #[test]
    fn the_clocks_of_this_host_are_read() {
        let then = ClockReading::now();
        let now = ClockReading::now();
        assert!(then.since_boot > 0 && then.age(&now) < Duration::from_mins(1));
        let text = serde_json::to_string(&then).unwrap();
        assert_eq!(serde_json::from_str::<ClockReading>(&text).unwrap(), then, "{text}");
        let old = ClockReading::of_time(then.time);
        assert_eq!(serde_json::to_value(&old).unwrap(), serde_json::json!({ "since": then.time }));
    }
}
