//! Decides whether the lock of another host may be released because its lease has lapsed.
//!
//! A taker first claims the lock: it replaces the record, on the condition that lock and record are still what it has
//! read. That is the decision. A holder that has renewed its lease in the meantime keeps its lock, and of two takers
//! one wins. Then the taker deletes the parts of the lock.

use std::time::Duration;

use jiff::Timestamp;

use super::record::{Claim, NotBelieved, Promise, Record};
use super::terms::{CLAIM_LENGTH, Terms};

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
    /// The same, but the holder's own lease has not lapsed yet. The holder cannot renew it, but may work until its
    /// deadline.
    ClaimLapsedEarly,
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
        // A person may have claimed the lock of a holder that was renewed just before. It may work for the rest of its
        // lease, because nothing but its own deadline stops it.
        (true, true) if !holder_has_lapsed(record, now) => LeaseState::ClaimLapsedEarly,
        (true, true) => LeaseState::ClaimLapsed,
    }
}

/// Whether the holder did not renew its lease in time. A claim changes nothing about that. `now` is as for [`state`].
pub(crate) fn holder_has_lapsed(record: &Record, now: Timestamp) -> bool {
    record.renewed_at().zip(record.terms()).is_some_and(|(renewed, terms)| terms.has_lapsed(renewed, now))
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
    /// How long the slowest response took meanwhile.
    pub(crate) response_time: Duration,
    /// Whether this host's clock agrees with the service's time ([`Terms::agrees`]).
    pub(crate) host_agrees: bool,
    /// Whether the journal of this host shows that a process of the run that holds the lock is or may be running.
    pub(crate) runs_here: bool,
}

/// Why a lock may not be taken over without being asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Obstacle {
    NoLease(NotBelieved),
    Fresh,
    Claimed,
    /// As [`LeaseState::ClaimLapsedEarly`].
    ClaimLapsedEarly,
    /// The holder's host cannot stop it in every case ([`Promise::None`]).
    NoFence,
    AnotherRegion,
    NoConsent,
    /// A process of the holder's run is or may be running on this host.
    RunsHere,
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
        LeaseState::ClaimLapsedEarly => Some(Obstacle::ClaimLapsedEarly),
        LeaseState::Lapsed | LeaseState::ClaimLapsed => None,
    };
    if let Some(obstacle) = obstacle {
        return Permission::No(obstacle);
    }
    let Ok(record) = record else { return Permission::No(Obstacle::NoLease(NotBelieved::Malformed)) };
    if record.fence == Promise::None {
        return Permission::No(Obstacle::NoFence);
    }
    if !circumstances.is_same_region {
        return Permission::No(Obstacle::AnotherRegion);
    }
    if !circumstances.consent {
        return Permission::No(Obstacle::NoConsent);
    }
    // The fence stops terraform's group. A process outside it works on.
    if circumstances.runs_here {
        return Permission::No(Obstacle::RunsHere);
    }
    let (Some(renewed), Some(terms)) = (record.renewed_at(), record.terms()) else {
        return Permission::No(Obstacle::NoLease(NotBelieved::Malformed));
    };
    // A claim stops the renewals. So the holder of a claimed lock cannot defeat the delete by renewing, and needs no
    // further time: it has had its own.
    //
    // A lease that lapsed long ago needs no further time either, if the service's time is right. A proxy, or an S3
    // service that checks no times, may send a wrong one. So without a second clock that agrees, the lock is watched.
    let lapsed_long_ago = terms.has_lapsed_long_ago(renewed, now) && circumstances.host_agrees;
    let quiet = if lapsed_long_ago || record.taken.is_some() {
        Duration::ZERO
    } else {
        terms.quiet_window(circumstances.response_time)
    };
    let missing = quiet.saturating_sub(circumstances.unchanged_for);
    if missing.is_zero() { Permission::Yes } else { Permission::Wait(missing) }
}

/// What a watcher does after it has read the lock and its record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WatchStep {
    /// The lock may be claimed now.
    Claim,
    /// It lapses soon or has lapsed, and must be seen unchanged for some time. The watcher reads everything that must
    /// not change.
    Compare,
    /// Another host has claimed the lock, and may be deleting it.
    WaitForClaim,
    /// The lock may not be taken over. A watcher that has time reads it again later.
    Leave(Obstacle),
}

/// Decides what a watcher does about a lock that is not known to be unchanged for any time. `notice` is how long before
/// the lapse it begins to compare, beside the quiet window, so that the quiet window does not delay the takeover. A
/// connected holder renews its lease long before that. `None`: it does not begin before the lapse.
///
/// The other arguments are those of [`permission`]. The watcher has the consent of its user, and has not looked into
/// the journal yet.
pub(crate) fn watch_step(
    record: Result<&Record, NotBelieved>,
    now: Timestamp,
    is_same_region: bool,
    notice: Option<Duration>,
) -> WatchStep {
    let circumstances = Circumstances {
        consent: true,
        is_same_region,
        unchanged_for: Duration::ZERO,
        response_time: Duration::ZERO,
        host_agrees: true,
        runs_here: false,
    };
    match permission(record, now, circumstances) {
        Permission::Yes => WatchStep::Claim,
        Permission::Wait(_) => WatchStep::Compare,
        Permission::No(Obstacle::Claimed) => WatchStep::WaitForClaim,
        Permission::No(Obstacle::Fresh) => {
            let lapses_soon = record.ok().zip(notice).and_then(|(record, notice)| {
                let terms = record.terms()?;
                Some(terms.time_to_lapse(record.renewed_at()?, now) <= terms.quiet_window(Duration::ZERO) + notice)
            });
            if lapses_soon == Some(true) { WatchStep::Compare } else { WatchStep::Leave(Obstacle::Fresh) }
        }
        Permission::No(obstacle) => WatchStep::Leave(obstacle),
    }
}

/// What the start of terraform waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StartWaitsFor {
    /// Another host has claimed the lock and may be deleting it.
    Claim,
    /// The lock must be seen unchanged for the whole `window`, and `missing` is left of it.
    Quiet { window: Duration, missing: Duration },
}

/// Whether terraform is started although the lock may be released later. `waited` is how long its start has waited.
///
/// A claim alone delays the start by at most [`CLAIM_LENGTH`] and the tolerance for the clocks. But each of many runs
/// that cannot delete the lock may claim it in turn, so the start waits for two claims at most. A quiet window begins
/// anew with each change, for example of a state that somebody writes without a lock, and with each failed read. So the
/// start waits for three windows at most, and for the first slow reads.
pub(crate) fn is_start_due(waits_for: StartWaitsFor, waited: Duration) -> bool {
    match waits_for {
        StartWaitsFor::Claim => waited > Terms::of_claim().lapse_time() * 2,
        StartWaitsFor::Quiet { window, missing } => waited + missing > window * 3 + MAX_READ_GAP * 2,
    }
}

/// The longest time between two reads that shows nothing about the network. If it was longer, the network may have been
/// away: the requests of the holder may have been held back until it was back, and the SDK may have repeated the read.
pub(crate) const MAX_READ_GAP: Duration = Duration::from_secs(5);

/// The times of one read of everything that must not change. They are counted from the begin of the watch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ReadTimes {
    /// Before the first request was sent.
    pub(crate) sent: Duration,
    /// After the last response was read.
    pub(crate) completed: Duration,
    /// How long the response took that had the record.
    pub(crate) response_time: Duration,
}

/// What a watcher has seen by the last read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Constancy {
    /// How long nothing has changed: from the end of the first read to the begin of the last one.
    pub(crate) unchanged_for: Duration,
    /// How long the slowest response took in these reads.
    pub(crate) response_time: Duration,
    /// The time between the last two reads, if it was so long that they show nothing about the time between them.
    pub(crate) gap: Option<Duration>,
}

/// Counts for how long a watcher has seen the same, read by read.
#[derive(Clone, Debug)]
pub(crate) struct Unchanged<T> {
    /// `None` if nothing was seen, or if a read has failed since then.
    seen: Option<Seen<T>>,
}

#[derive(Clone, Debug)]
struct Seen<T> {
    last: T,
    /// When the first read of it was completed.
    since: Duration,
    /// When the last read of it was completed.
    read: Duration,
    response_time: Duration,
}

impl<T: PartialEq> Unchanged<T> {
    pub(crate) fn new() -> Self {
        Self { seen: None }
    }

    /// Takes note of a read that failed or was not made.
    pub(crate) fn miss(&mut self) {
        self.seen = None;
    }

    /// Returns what was seen last. `None` if nothing was seen, or if a read has failed since then.
    pub(crate) fn last(&self) -> Option<&T> {
        self.seen.as_ref().map(|seen| &seen.last)
    }

    /// Takes one more read, `now`.
    pub(crate) fn see(&mut self, now: T, times: ReadTimes) -> Constancy {
        let ReadTimes { sent, completed, response_time } = times;
        let mut gap = None;
        let (since, response_time) = match self.seen.take().filter(|seen| seen.last == now) {
            Some(seen) if completed.saturating_sub(seen.read) <= MAX_READ_GAP => {
                (seen.since, seen.response_time.max(response_time))
            }
            last => {
                gap = last.map(|seen| completed.saturating_sub(seen.read));
                (completed, response_time)
            }
        };
        self.seen = Some(Seen { last: now, since, read: completed, response_time });
        Constancy { unchanged_for: sent.saturating_sub(since), response_time, gap }
    }
}

/// How many gaps in a row show that the service is too slow to be watched.
const MAX_GAPS: u32 = 3;

/// What a taker does after the time between two reads was too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AfterGaps {
    Continue,
    /// It reports that the service is too slow, and goes on.
    Say,
    /// It reports that the service is too slow, and ends.
    GiveUp,
}

/// Decides what a taker does after so many `gaps` in a row. `is_awaited` is as in [`after_failure`].
pub(crate) fn after_gaps(gaps: u32, is_awaited: bool) -> AfterGaps {
    match is_awaited {
        false if gaps >= MAX_GAPS => AfterGaps::GiveUp,
        true if gaps == MAX_GAPS => AfterGaps::Say,
        _ => AfterGaps::Continue,
    }
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

/// What the responses to a taker's deletes of one lock show. Of two deletes, the greater result counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum DeleteResult {
    /// No delete was sent.
    #[default]
    NotSent,
    /// The condition of the delete has failed, so it has deleted nothing.
    Refused,
    /// A response is missing, so the delete may have succeeded, or may still succeed.
    Unknown,
    /// The service has confirmed the delete.
    Confirmed,
}

impl DeleteResult {
    /// The result after a read that still shows the lock. A confirmation before it was wrong: a proxy may have sent it.
    pub(crate) fn after_the_lock_was_seen(self) -> Self {
        self.min(Self::Unknown)
    }
}

/// The last step that a taker of a lock with an item has begun.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum TakeStage {
    /// It sends its claim. A request whose response is missing may have stored it.
    #[default]
    Claim,
    /// The lock is claimed. It deletes the object.
    Object,
    /// The object is gone, or there was none. It deletes the item.
    Item,
}

/// What is known about the requests with which a taker takes one lock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TakeRequests {
    /// If a request fails, it is one of this step.
    pub(crate) stage: TakeStage,
    /// The result of the deletes of the item, or of an object alone.
    pub(crate) deleted: DeleteResult,
    /// Whether there is an object that may be a part of the lock, and that these credentials may not read. It was left.
    pub(crate) is_object_unread: bool,
}

/// Who has deleted a lock that a taker has tried to take, as far as the taker knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeletedBy {
    ThisTaker,
    /// This taker, or another process or a person who has deleted the lock at the same time.
    Unknown,
    Another,
}

/// Decides who has deleted a lock that is gone. `result` is what this taker knows about its own deletes. `has_claim` is
/// whether the lock had the claim of this taker, and no other taker can have replaced it.
///
/// While a claim is stored, nobody else says that the lock was released: the holder's host names the taker. An object
/// alone has no claim. The holder's host, another taker or a person may have deleted it between the last read and the
/// delete whose response is missing.
pub(crate) fn deleted_by(result: DeleteResult, has_claim: bool) -> DeletedBy {
    match result {
        DeleteResult::Confirmed => DeletedBy::ThisTaker,
        DeleteResult::Refused | DeleteResult::Unknown if has_claim => DeletedBy::ThisTaker,
        DeleteResult::NotSent | DeleteResult::Refused => DeletedBy::Another,
        DeleteResult::Unknown => DeletedBy::Unknown,
    }
}

/// Whether no other taker can have replaced `claim` by `now`, a time of the service. The tolerance for the clocks of
/// the service's hosts is not added, because another host may have told another taker a later time.
pub(crate) fn is_exclusive(claim: &Claim, now: Timestamp) -> bool {
    claim.at().is_some_and(|at| Duration::try_from(now.duration_since(at)).unwrap_or_default() <= CLAIM_LENGTH)
}

/// How many attempts to take a lock may fail in a row before that is reported.
const MAX_FAILED_ATTEMPTS: u32 = 3;

/// The longest time between two attempts of a taker for which terraform waits.
const MAX_ATTEMPT_INTERVAL: Duration = Duration::from_mins(1);

/// Why an attempt to take a lock has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AttemptFailure {
    /// The same attempt would fail again.
    Final,
    ExpiredCredentials,
    /// A later attempt may succeed.
    Passing,
}

/// What a taker does after an attempt to take a lock has failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AfterFailure {
    /// It reports the failure and ends.
    GiveUp,
    /// It ends without a report. Its credentials have expired, and the next taker asks for new ones.
    Reconnect,
    /// It reads the lock again after this time, and takes it if it may. `is_said` is whether it reports the failure
    /// now.
    TryAgain { pause: Duration, is_said: bool },
}

/// Decides what a taker does after `failures` attempts in a row have failed, the last one because of `last`.
/// `is_awaited` is whether the taker watches the lock while terraform waits. Otherwise the start of terraform waits for
/// the taker.
pub(crate) fn after_failure(failures: u32, last: AttemptFailure, is_awaited: bool) -> AfterFailure {
    match last {
        AttemptFailure::ExpiredCredentials if is_awaited => AfterFailure::Reconnect,
        AttemptFailure::Final | AttemptFailure::ExpiredCredentials => AfterFailure::GiveUp,
        AttemptFailure::Passing if !is_awaited && failures >= MAX_FAILED_ATTEMPTS => AfterFailure::GiveUp,
        AttemptFailure::Passing => {
            let doubled = 1_u64.checked_shl(failures.saturating_sub(1)).unwrap_or(u64::MAX);
            let pause = Duration::from_secs(doubled).min(MAX_ATTEMPT_INTERVAL);
            AfterFailure::TryAgain { pause, is_said: failures == MAX_FAILED_ATTEMPTS }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::Renewal;
    use super::*;

    const NOW: i64 = 1_790_000_000;

    fn record(age: i64, claimed: Option<i64>, fence: Promise) -> Record {
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
            (310, Some(70), LeaseState::Claimed),
            (310, Some(71), LeaseState::ClaimLapsedEarly),
            (310, Some(310), LeaseState::ClaimLapsedEarly),
            (0, Some(3600), LeaseState::ClaimLapsedEarly),
            (311, Some(311), LeaseState::ClaimLapsed),
            (400, Some(-11), LeaseState::None(NotBelieved::Future)),
        ] {
            assert_eq!(state(Ok(&record(age, claimed, Promise::Stop)), now()), expected, "{age} {claimed:?}");
        }
        assert_eq!(state(Err(NotBelieved::TooLarge), now()), LeaseState::None(NotBelieved::TooLarge));
    }

    #[test]
    fn a_lock_is_claimed_only_if_everything_allows_it() {
        let quiet_window = Terms::new(Duration::from_mins(5)).unwrap().quiet_window(Duration::ZERO);
        for age in [0, 311, 1201] {
            for claimed in [None, Some(0), Some(71)] {
                for fence in [Promise::Stop, Promise::None] {
                    for bits in 0..16_u8 {
                        for unchanged in [0, 78, 79] {
                            let circumstances = Circumstances {
                                consent: bits & 1 != 0,
                                is_same_region: bits & 2 != 0,
                                unchanged_for: Duration::from_secs(unchanged),
                                response_time: Duration::ZERO,
                                host_agrees: bits & 4 == 0,
                                runs_here: bits & 8 != 0,
                            };
                            let record = record(age, claimed, fence);
                            let lapsed = age > 310 && claimed.is_none_or(|age| age > 70);
                            let may = lapsed && fence == Promise::Stop && bits & 0b1011 == 0b11;
                            let is_old = age >= 1201 && bits & 4 == 0;
                            let needs_quiet = claimed.is_none() && !is_old && unchanged < 79;
                            let found = permission(Ok(&record), now(), circumstances);
                            let expected = match (may, needs_quiet) {
                                (false, _) => matches!(found, Permission::No(_)),
                                (true, true) => {
                                    found
                                        == Permission::Wait(quiet_window.saturating_sub(Duration::from_secs(unchanged)))
                                }
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
    fn a_watcher_begins_to_compare_before_the_lapse() {
        for (age, claimed, fence, same_region, expected) in [
            (0, None, Promise::Stop, true, WatchStep::Leave(Obstacle::Fresh)),
            (226, None, Promise::Stop, true, WatchStep::Leave(Obstacle::Fresh)),
            // It lapses after 310 s, the quiet window is 78.4 s, and the notice is 5 s.
            (227, None, Promise::Stop, true, WatchStep::Compare),
            (311, None, Promise::Stop, true, WatchStep::Compare),
            (1200, None, Promise::Stop, true, WatchStep::Compare),
            (1201, None, Promise::Stop, true, WatchStep::Claim),
            (1201, None, Promise::None, true, WatchStep::Leave(Obstacle::NoFence)),
            (1201, None, Promise::Stop, false, WatchStep::Leave(Obstacle::AnotherRegion)),
            (400, Some(70), Promise::Stop, true, WatchStep::WaitForClaim),
            // The taker may still be at work, and later the lock is left whatever the record promises.
            (400, Some(70), Promise::None, false, WatchStep::WaitForClaim),
            (310, Some(70), Promise::Stop, true, WatchStep::WaitForClaim),
            (310, Some(71), Promise::Stop, true, WatchStep::Leave(Obstacle::ClaimLapsedEarly)),
            (310, Some(71), Promise::None, true, WatchStep::Leave(Obstacle::ClaimLapsedEarly)),
            (311, Some(71), Promise::None, true, WatchStep::Leave(Obstacle::NoFence)),
            (311, Some(71), Promise::Stop, true, WatchStep::Claim),
            (400, Some(71), Promise::Stop, true, WatchStep::Claim),
        ] {
            let record = record(age, claimed, fence);
            let step = |notice| watch_step(Ok(&record), now(), same_region, notice);
            assert_eq!(step(Some(Duration::from_secs(5))), expected, "{age} {claimed:?} {fence:?} {same_region}");
            let is_fresh = age < 311 && claimed.is_none();
            let without = if is_fresh { WatchStep::Leave(Obstacle::Fresh) } else { expected };
            assert_eq!(step(None), without, "{age} {claimed:?} {fence:?} {same_region}");
        }
        let step = watch_step(Err(NotBelieved::Format), now(), true, Some(Duration::from_hours(1)));
        assert_eq!(step, WatchStep::Leave(Obstacle::NoLease(NotBelieved::Format)));
    }

    #[test]
    fn the_start_of_terraform_waits_for_two_claims_or_three_quiet_windows_at_most() {
        let at = Duration::from_secs;
        for (waited, expected) in [(0, false), (70, false), (140, false), (141, true), (10_000, true)] {
            assert_eq!(is_start_due(StartWaitsFor::Claim, at(waited)), expected, "{waited}");
        }
        for (window, missing, waited, expected) in [
            (13, 13, 0, false),
            (13, 13, 36, false),
            // Not even a window without a change would end in time.
            (13, 13, 37, true),
            (13, 1, 37, false),
            (13, 1, 49, true),
            (90, 90, 190, false),
            (90, 90, 191, true),
            (90, 1, 280, true),
        ] {
            let waits_for = StartWaitsFor::Quiet { window: at(window), missing: at(missing) };
            assert_eq!(is_start_due(waits_for, at(waited)), expected, "{window} {missing} {waited}");
        }
        // The holder has one window to renew in, and one more write in flight may arrive in it.
        let window = Terms::new(at(3600)).unwrap().quiet_window(Duration::ZERO);
        let twice = StartWaitsFor::Quiet { window, missing: Duration::from_millis(1) };
        assert!(!is_start_due(twice, window * 2));
    }

    #[test]
    fn only_reads_without_a_gap_and_without_a_change_count() {
        let at = Duration::from_secs;
        let mut unchanged = Unchanged::new();
        let mut see = |now, sent, completed| {
            let times = ReadTimes { sent: at(sent), completed: at(completed), response_time: at(completed - sent) };
            let seen = unchanged.see(now, times);
            (seen.unchanged_for.as_secs(), seen.response_time.as_secs(), seen.gap.map(|gap| gap.as_secs()))
        };
        assert_eq!(see('a', 0, 1), (0, 1, None));
        assert_eq!(see('a', 2, 4), (1, 2, None));
        assert_eq!(see('a', 8, 9), (7, 2, None));
        // The holder has renewed its lease.
        assert_eq!(see('b', 9, 10), (0, 1, None));
        assert_eq!(see('b', 11, 12), (1, 1, None));
        // The network was away, or the service is slow.
        assert_eq!(see('b', 17, 18), (0, 1, Some(6)));
        assert_eq!(see('b', 18, 24), (0, 6, Some(6)));
        assert_eq!(see('c', 24, 30), (0, 6, None));
        unchanged.miss();
        assert_eq!(unchanged.last(), None);
        let times = |sent| ReadTimes { sent: at(sent), completed: at(sent + 1), response_time: at(1) };
        assert_eq!(unchanged.see('c', times(31)).unchanged_for, at(0));
        assert_eq!((unchanged.see('c', times(33)).unchanged_for, unchanged.last()), (at(1), Some(&'c')));
    }

    #[test]
    fn a_service_that_is_too_slow_is_reported_once() {
        for gaps in 1..10 {
            let expected = match gaps {
                0..3 => (AfterGaps::Continue, AfterGaps::Continue),
                3 => (AfterGaps::GiveUp, AfterGaps::Say),
                _ => (AfterGaps::GiveUp, AfterGaps::Continue),
            };
            assert_eq!((after_gaps(gaps, false), after_gaps(gaps, true)), expected, "{gaps}");
        }
    }

    /// A renewal that is sent in time may arrive late by the time of a response.
    #[test]
    fn behind_a_slow_service_a_lock_must_be_unchanged_for_longer() {
        let record = record(311, None, Promise::Stop);
        for (response_time, window) in [(0, 78), (20, 78), (30, 87)] {
            for unchanged in [window, window + 1] {
                let circumstances = Circumstances {
                    consent: true,
                    is_same_region: true,
                    unchanged_for: Duration::from_secs(unchanged),
                    response_time: Duration::from_secs(response_time),
                    host_agrees: true,
                    runs_here: false,
                };
                let may = permission(Ok(&record), now(), circumstances) == Permission::Yes;
                assert_eq!(may, unchanged > window, "{response_time} {unchanged}");
            }
        }
    }

    #[test]
    fn a_taker_whose_attempt_fails_for_good_gives_up_and_one_that_may_succeed_later_tries_less_and_less_often() {
        let again = |seconds, is_said| AfterFailure::TryAgain { pause: Duration::from_secs(seconds), is_said };
        for failures in [1, 2, 3, 100] {
            for is_awaited in [false, true] {
                assert_eq!(after_failure(failures, AttemptFailure::Final, is_awaited), AfterFailure::GiveUp);
            }
            let expired = |is_awaited| after_failure(failures, AttemptFailure::ExpiredCredentials, is_awaited);
            assert_eq!((expired(false), expired(true)), (AfterFailure::GiveUp, AfterFailure::Reconnect));
        }
        for (failures, before_terraform, while_it_waits) in [
            (1, again(1, false), again(1, false)),
            (2, again(2, false), again(2, false)),
            (3, AfterFailure::GiveUp, again(4, true)),
            (4, AfterFailure::GiveUp, again(8, false)),
            (6, AfterFailure::GiveUp, again(32, false)),
            (7, AfterFailure::GiveUp, again(60, false)),
            (100, AfterFailure::GiveUp, again(60, false)),
        ] {
            let next = |is_awaited| after_failure(failures, AttemptFailure::Passing, is_awaited);
            assert_eq!((next(false), next(true)), (before_terraform, while_it_waits), "{failures}");
        }
    }

    #[test]
    fn a_taker_says_that_it_released_a_lock_only_if_nobody_else_can_have_deleted_it() {
        for (result, alone, with_claim) in [
            (DeleteResult::NotSent, DeletedBy::Another, DeletedBy::Another),
            (DeleteResult::Refused, DeletedBy::Another, DeletedBy::ThisTaker),
            (DeleteResult::Unknown, DeletedBy::Unknown, DeletedBy::ThisTaker),
            (DeleteResult::Confirmed, DeletedBy::ThisTaker, DeletedBy::ThisTaker),
        ] {
            assert_eq!((deleted_by(result, false), deleted_by(result, true)), (alone, with_claim), "{result:?}");
            let seen = if result == DeleteResult::Confirmed { DeleteResult::Unknown } else { result };
            assert_eq!(result.after_the_lock_was_seen(), seen);
        }
        // A later request cannot take back what an earlier one may have done.
        assert_eq!(DeleteResult::Unknown.max(DeleteResult::Refused), DeleteResult::Unknown);
        assert_eq!(DeleteResult::Confirmed.max(DeleteResult::Unknown), DeleteResult::Confirmed);
    }

    #[test]
    fn a_claim_is_exclusive_until_another_taker_may_replace_it() {
        for (age, expected) in [(-5, true), (0, true), (60, true), (61, false), (1000, false)] {
            let claim = Claim { by: "a@b".to_owned(), at: NOW - age, number: 1 };
            assert_eq!(is_exclusive(&claim, now()), expected, "{age}");
        }
        assert!(!is_exclusive(&Claim { by: String::new(), at: i64::MAX, number: 1 }, now()));
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
