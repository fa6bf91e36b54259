//! Arithmetic with times from untrusted text, such as a log, a lock or a record. Jiff's operators panic if a result is
//! outside Jiff's range, the years -9999 to 9999. Untrusted text may contain the first or the last moment of that
//! range.

use jiff::{SignedDuration, Timestamp};

/// Returns `time + by`. If the sum is out of range, returns the nearest [`Timestamp`] that is in range.
pub(crate) fn saturating_add(time: Timestamp, by: SignedDuration) -> Timestamp {
    let limit = if by.is_negative() { Timestamp::MIN } else { Timestamp::MAX };
    time.checked_add(by).unwrap_or(limit)
}

/// Returns `time - by`. If the difference is out of range, returns the nearest [`Timestamp`] that is in range.
pub(crate) fn saturating_sub(time: Timestamp, by: SignedDuration) -> Timestamp {
    let limit = if by.is_negative() { Timestamp::MAX } else { Timestamp::MIN };
    time.checked_sub(by).unwrap_or(limit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_sum_of_a_time_and_a_length_of_time_panics() {
        let lengths = [SignedDuration::MIN, -SignedDuration::from_secs(1), SignedDuration::ZERO, SignedDuration::MAX];
        for time in [Timestamp::MIN, Timestamp::UNIX_EPOCH, Timestamp::MAX] {
            for by in lengths {
                let sum = saturating_add(time, by);
                assert_eq!(sum.cmp(&time), sum.duration_since(time).cmp(&SignedDuration::ZERO));
                let _ = saturating_sub(time, by);
            }
        }
        let second = SignedDuration::from_secs(1);
        assert_eq!(saturating_add(Timestamp::MAX, second), Timestamp::MAX);
        assert_eq!(saturating_sub(Timestamp::MIN, second), Timestamp::MIN);
        assert_eq!(saturating_sub(saturating_add(Timestamp::UNIX_EPOCH, second), second), Timestamp::UNIX_EPOCH);
    }
}
