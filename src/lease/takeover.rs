//! Decides whether the lock of another host may be released because its lease has lapsed.
//!
//! A taker first claims the lock: it replaces the record, on the condition that lock and record are still what it has
//! read. That is the decision. A holder that has renewed its lease in the meantime keeps its lock, and of two takers one
//! wins. Then the taker deletes the parts of the lock.

use std::time::Duration;

use jiff::Timestamp;

use super::record::{Fence, NotBelieved, Record};
use super::terms::Terms;

/// The state of a lock's lease, by the service's own time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LeaseState {
    /// The lock has no record that is believed. It is judged as one without a lease.
    None(NotBelieved),
    /// The holder renewed its lease in time.
    Fresh,
    /// The holder did not.
    Lapsed,
    /// Another host has claimed the lock and is about to delete it.
    Claimed,
    /// Another host has claimed the lock, and has not deleted it in the time of a claim.
    ClaimLapsed,
}

/// Returns the state of the lease that `record` describes. `now` is the time of the response that contained it.
pub(crate) fn state(record: Result<&Record, NotBelieved>, now: Timestamp) -> LeaseState {
    let record = match record {
        Ok(record) => record,
        Err(reason) => return LeaseState::None(reason),
    };
    let (since, terms) = match &record.taken {
        Some(claim) => (claim.at(), Some(Terms::of_claim())),
        None => (record.renewed_at(), record.terms()),
    };
    let (Some(since), Some(terms)) = (since, terms) else { return LeaseState::None(NotBelieved::Malformed) };
    if terms.is_in_the_future(since, now) {
        return LeaseState::None(NotBelieved::Future);
    }
    match (record.taken.is_some(), terms.has_lapsed(since, now)) {
        (false, false) => LeaseState::Fresh,
        (false, true) => LeaseState::Lapsed,
        (true, false) => LeaseState::Claimed,
        (true, true) => LeaseState::ClaimLapsed,
    }
}

/// What is known about the lock beside its record.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Circumstances {
    /// Whether `TFW_LEASE` is set here, so that its lapsed lease may be used without being asked.
    pub(crate) consent: bool,
    /// Whether the record was written in the region in which it was read.
    pub(crate) is_same_region: bool,
    /// How long the lock and its record have been seen unchanged.
    pub(crate) unchanged_for: Duration,
}

/// Why a lock may not be taken over without being asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Obstacle {
    NoLease(NotBelieved),
    Fresh,
    Claimed,
    /// The holder's host cannot stop it in every case ([`Fence::None`]).
    NoFence,
    AnotherRegion,
    NoConsent,
}

/// Whether a taker may claim the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Permission {
    No(Obstacle),
    /// It must be seen unchanged for this long.
    Wait(Duration),
    Yes,
}

/// Decides whether the lock with this record may be claimed. `now` is the time of the response that contained it.
pub(crate) fn permission(
    record: Result<&Record, NotBelieved>,
    now: Timestamp,
    circumstances: Circumstances,
) -> Permission {
    let obstacle = match state(record, now) {
        LeaseState::None(reason) => Some(Obstacle::NoLease(reason)),
        LeaseState::Fresh => Some(Obstacle::Fresh),
        LeaseState::Claimed => Some(Obstacle::Claimed),
        LeaseState::Lapsed | LeaseState::ClaimLapsed => None,
    };
    if let Some(obstacle) = obstacle {
        return Permission::No(obstacle);
    }
    let Ok(record) = record else { return Permission::No(Obstacle::NoLease(NotBelieved::Malformed)) };
    if record.fence == Fence::None {
        return Permission::No(Obstacle::NoFence);
    }
    if !circumstances.is_same_region {
        return Permission::No(Obstacle::AnotherRegion);
    }
    if !circumstances.consent {
        return Permission::No(Obstacle::NoConsent);
    }
    let (Some(renewed), Some(terms)) = (record.renewed_at(), record.terms()) else {
        return Permission::No(Obstacle::NoLease(NotBelieved::Malformed));
    };
    // A claim stops the renewals. So the holder of a claimed lock cannot defeat the delete by renewing, and needs no
    // further time: it has had its own.
    let quiet = if terms.has_lapsed_long_ago(renewed, now) || record.taken.is_some() {
        Duration::ZERO
    } else {
        terms.quiet_window()
    };
    let missing = quiet.saturating_sub(circumstances.unchanged_for);
    if missing.is_zero() { Permission::Yes } else { Permission::Wait(missing) }
}

/// What a taker has read after it sent its claim. The response to the claim itself may be lost, and the SDK may have
/// sent it twice, so only this read decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AfterClaim {
    /// The lock with this taker's claim.
    Ours,
    /// Nothing, or another lock.
    Gone,
    /// The lock with the record that the taker had read.
    Unchanged,
    /// The lock with another record, or with the claim of another taker.
    Changed,
}

/// What a taker does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TakerStep {
    /// It deletes the parts of the lock.
    Delete,
    /// The lock is gone. Nothing is left to do.
    Done,
    /// It sends its claim again.
    ClaimAgain,
    /// It starts again with a look at the lock.
    LookAgain,
}

impl AfterClaim {
    pub(crate) fn next(self) -> TakerStep {
        match self {
            Self::Ours => TakerStep::Delete,
            Self::Gone => TakerStep::Done,
            // A claim that is still on its way may only arrive where the record is as it was read.
            Self::Unchanged => TakerStep::ClaimAgain,
            Self::Changed => TakerStep::LookAgain,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::{Claim, Renewal};
    use super::*;

    const NOW: i64 = 1_790_000_000;

    fn record(age: i64, claimed: Option<i64>, fence: Fence) -> Record {
        let terms = Terms::new(Duration::from_mins(5)).unwrap();
        let mut record = Record::new("id", terms, Renewal { renewed: NOW - age, beat: 7 }, fence);
        record.taken = claimed.map(|age| Claim { by: "a@b".to_owned(), at: NOW - age, number: 1 });
        record
    }

    fn now() -> Timestamp {
        Timestamp::from_second(NOW).unwrap()
    }

    #[test]
    fn a_lease_is_lapsed_if_it_was_not_renewed_in_its_time_and_the_clocks_tolerance() {
        for (age, claimed, expected) in [
            (0, None, LeaseState::Fresh),
            (310, None, LeaseState::Fresh),
            (311, None, LeaseState::Lapsed),
            (-11, None, LeaseState::None(NotBelieved::Future)),
            (400, Some(0), LeaseState::Claimed),
            (400, Some(70), LeaseState::Claimed),
            (400, Some(71), LeaseState::ClaimLapsed),
            (400, Some(-11), LeaseState::None(NotBelieved::Future)),
        ] {
            assert_eq!(state(Ok(&record(age, claimed, Fence::Stop)), now()), expected, "{age} {claimed:?}");
        }
        assert_eq!(state(Err(NotBelieved::TooLarge), now()), LeaseState::None(NotBelieved::TooLarge));
    }

    #[test]
    fn a_lock_is_claimed_only_if_everything_allows_it() {
        for age in [0, 311, 1201] {
            for claimed in [None, Some(0), Some(71)] {
                for fence in [Fence::Stop, Fence::None] {
                    for bits in 0..4_u8 {
                        for unchanged in [0, 89, 90] {
                            let circumstances = Circumstances {
                                consent: bits & 1 != 0,
                                is_same_region: bits & 2 != 0,
                                unchanged_for: Duration::from_secs(unchanged),
                            };
                            let record = record(age, claimed, fence);
                            let lapsed = claimed.map_or(age > 310, |age| age > 70);
                            let may = lapsed && fence == Fence::Stop && bits == 3;
                            let needs_quiet = claimed.is_none() && age < 1201 && unchanged < 90;
                            let found = permission(Ok(&record), now(), circumstances);
                            let expected = match (may, needs_quiet) {
                                (false, _) => matches!(found, Permission::No(_)),
                                (true, true) => found == Permission::Wait(Duration::from_secs(90 - unchanged)),
                                (true, false) => found == Permission::Yes,
                            };
                            assert!(expected, "{record:?} {circumstances:?}: {found:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_taker_deletes_only_after_its_own_claim() {
        for (read, step) in [
            (AfterClaim::Ours, TakerStep::Delete),
            (AfterClaim::Gone, TakerStep::Done),
            (AfterClaim::Unchanged, TakerStep::ClaimAgain),
            (AfterClaim::Changed, TakerStep::LookAgain),
        ] {
            assert_eq!(read.next(), step, "{read:?}");
        }
    }
}
