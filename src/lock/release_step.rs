//! Decides the next step of a release, from what was read. The decisions are pure functions, and this module sends no
//! request.

use std::time::Duration;

use super::outcome::{AnothersLock, Because, Outcome, Write};
use super::proof::Match;
use super::stores::StoredLock;
use crate::aws::failure::Failure;
use crate::lease::takeover::MAX_READ_GAP;
use crate::sys::connections::{UNSEEN_BYTES_TIMEOUT, UNSEEN_INTERVAL};
use crate::terraform::lock_info::LockInfo;
use crate::terraform::log::{LockParts, RecordedLock};

/// If terraform died while it was writing, its lock is released only after nothing has changed for this time, if `tf`
/// sees what the kernel still sends.
pub(crate) const QUIET_WINDOW: Duration = Duration::from_secs(10);

/// The limits of the wait for a write of a dead terraform.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QuietLimits {
    /// How long nothing may change.
    pub(crate) window: Duration,
    /// The time since the begin of the wait after which the window begins at the earliest.
    pub(crate) not_before: Duration,
}

impl QuietLimits {
    /// Returns the limits. `is_sending_seen` is whether `tf` sees what the kernel still sends for the dead terraform.
    pub(crate) const fn of(is_sending_seen: bool) -> Self {
        if is_sending_seen {
            Self { window: QUIET_WINDOW, not_before: Duration::ZERO }
        } else {
            Self { window: QUIET_WINDOW.saturating_add(UNSEEN_INTERVAL), not_before: UNSEEN_BYTES_TIMEOUT }
        }
    }

    /// Returns the length of a wait during which nothing changes.
    pub(crate) const fn shortest(self) -> Duration {
        self.not_before.saturating_add(self.window)
    }
}

/// The reason for not releasing a lock if two reads in a row had different results.
pub(crate) const COMES_AND_GOES: &str = "one read finds the lock, and the next read does not";

/// Which writes of the state and deletes that a dead terraform has sent may still land.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LateWrites {
    None,
    /// Those that terraform's log shows as begun.
    Logged,
    /// Any: the end of the log is lost, so terraform may have begun a write that the log does not show.
    Any,
}

impl LateWrites {
    /// Whether any write may land.
    pub(crate) fn may_land(self) -> bool {
        self != Self::None
    }
}

/// Whether a write of the state or a delete may be in flight that the terraform with the lock `recorded` has sent.
/// `late` is what may land of this terraform at all. The log shows when writes and deletes begin, with one exception:
/// terraform has put the S3 object, then finds that the DynamoDB item belongs to another run, and deletes the object
/// unconditionally (backend/remote-state/s3/client.go, `Lock`). So the result is also true for a lock with two parts
/// that terraform may not have acquired completely.
pub(crate) fn needs_quiet(recorded: &RecordedLock, late: LateWrites) -> bool {
    let LockParts { s3, dynamodb } = recorded.parts;
    let may_have_one_part = recorded.progress.held.is_none() && s3 && dynamodb;
    match late {
        LateWrites::None => false,
        LateWrites::Logged => recorded.progress.may_be_writing() || may_have_one_part,
        LateWrites::Any => true,
    }
}

/// The result for one part of a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Judged {
    Absent,
    /// No lock can exist at the part's location.
    Excluded,
    Deleted,
    Anothers(String),
    /// Something that is not a lock is stored at the part's location. The text describes it.
    NoLock(String),
    Doubt(&'static str),
    /// The part belongs to the run, but a write may be in flight that would overwrite the next holder's state or delete
    /// its lock.
    NeedsQuiet,
    /// The part belongs to the run, but must not be deleted without explicit consent. The text says why.
    NeedsConsent(String),
    /// The part belongs to the run and has the record of its lease. It is deleted after the other part.
    Waits,
}

/// What a release does about a part, after it has read the part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PartStep {
    /// Deletes the part, on the condition that it is still what was read.
    Delete,
    /// Deletes nothing. This is the result for the part.
    Settled(Judged),
}

/// The facts about a part that was found, from one read.
pub(crate) struct PartRead<'a> {
    /// The lock that is stored at the part's location.
    pub(crate) info: &'a LockInfo,
    /// The verdict of [`super::proof::judge`] on it.
    pub(crate) verdict: Match,
    /// Why the part must not be deleted without explicit consent. `None` if no consent is needed.
    pub(crate) needs_consent: Option<String>,
    /// Whether the part must not be deleted until nothing has changed for the quiet window.
    pub(crate) needs_quiet: bool,
    /// Whether the part has the record of the lease, and the other part was not looked at yet.
    pub(crate) must_be_last: bool,
}

impl PartRead<'_> {
    /// Decides what to do about the part. Only a lock that is proven to belong to the run is deleted.
    pub(crate) fn decide(self) -> PartStep {
        PartStep::Settled(match self.verdict {
            Match::Anothers => Judged::Anothers(self.info.id.clone()),
            Match::Doubt(reason) => Judged::Doubt(reason),
            Match::Ours => match self.needs_consent {
                Some(reason) => Judged::NeedsConsent(reason),
                None if self.needs_quiet => Judged::NeedsQuiet,
                None if self.must_be_last => Judged::Waits,
                None => return PartStep::Delete,
            },
        })
    }
}

/// Returns how many of `parts` parts are still to do after `judged`, the results so far. The part that comes next is
/// one of them. A part that could not be read or deleted is still to do: it needs time for another attempt. So is a
/// part that waits: it is deleted last.
pub(crate) fn still_to_do(parts: usize, judged: &[Result<Judged, Failure>]) -> usize {
    let is_done = |part: &&Result<Judged, Failure>| part.as_ref().is_ok_and(|judged| *judged != Judged::Waits);
    parts.saturating_sub(judged.iter().filter(is_done).count())
}

/// Whether one read of the object does not find the run's part, and does not prove that it is gone: the response may
/// come from a proxy. The object is then read once more before an item is deleted that waits for it.
pub(crate) fn must_be_read_again(object: &Result<Judged, Failure>) -> bool {
    matches!(object, Ok(Judged::Absent | Judged::Excluded | Judged::NoLock(_)))
}

/// Whether an item that waits ([`Judged::Waits`]) is deleted now. `object` is the result for the other part, and
/// `before` that of an earlier read in the same look. `None` if there was one read only.
///
/// As long as the item with the record is there, any host can take the lock over after the lease has lapsed. So the
/// item stays as long as the object may be the run's.
pub(crate) fn may_item_follow(before: Option<&Result<Judged, Failure>>, object: &Result<Judged, Failure>) -> bool {
    match object {
        Ok(Judged::Deleted | Judged::Anothers(_)) => true,
        Ok(Judged::Absent | Judged::Excluded | Judged::NoLock(_)) => before == Some(object),
        Ok(Judged::Doubt(_) | Judged::NeedsQuiet | Judged::NeedsConsent(_) | Judged::Waits) | Err(_) => false,
    }
}

/// What has happened to an item so far in a release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ItemHistory {
    /// Whether it was seen to wait ([`Judged::Waits`]).
    pub(crate) has_waited: bool,
    /// Whether this release has requested its deletion.
    pub(crate) was_asked_to_go: bool,
}

/// Whether somebody else has released a lock. If its item has waited, and is gone although this release has not
/// requested its deletion, then a host that has taken the lock over has deleted it, or another process that cleans up
/// after the run. That one reports the release, also if this release has deleted the object.
pub(crate) fn is_released_by_another(item: &Result<Judged, Failure>, history: ItemHistory) -> bool {
    let is_gone = matches!(item, Ok(Judged::Absent | Judged::Anothers(_)));
    is_gone && history.has_waited && !history.was_asked_to_go
}

/// The findings that one read does not prove. Each finding has the index of a part, and either `None` (the part is
/// absent) or a text that describes something in the part's place that is not a lock.
pub(crate) type Unproven = Vec<(usize, Option<String>)>;

/// The results of one read of all parts of a lock, and the facts that decide what follows from them.
pub(crate) struct PartsLook<'a> {
    pub(crate) parts: &'a [Result<Judged, Failure>],
    /// Whether the log shows that terraform acquired the lock.
    pub(crate) was_had: bool,
    /// Whether nothing has changed for a whole [`QUIET_WINDOW`].
    pub(crate) is_quiet: bool,
    /// Whether a part was deleted now or earlier in this release.
    pub(crate) was_deleted: bool,
    /// The findings that the previous read did not prove. `None` if there was no previous read.
    pub(crate) before: Option<&'a Unproven>,
    /// Whether a lock request may still land, so that an absent part may still appear.
    pub(crate) request_may_land: bool,
    /// Whether the time limit has passed. Then unproven findings are not read again.
    pub(crate) is_time_up: bool,
}

/// The next step of a release, after one read of all parts.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Step {
    /// A part could not be read or deleted.
    Failed(Failure),
    /// A part belongs to the run, and must not be deleted until nothing has changed for [`QUIET_WINDOW`].
    WaitForQuiet,
    /// One read does not prove the result, so the parts must be read again.
    LookAgain(Unproven),
    Kept(Outcome),
    Absent {
        anothers: Option<AnothersLock>,
        excluded: bool,
    },
    Released,
}

impl PartsLook<'_> {
    /// Combines the results for the parts into the next step. The checks are in this order:
    ///
    /// 1. A part that could not be read may hold anything. So nothing is decided until that part was read.
    /// 2. If a part belongs to the run and must wait for the quiet window, the result for the other part does not
    ///    decide.
    /// 3. While a request may land, an absent part decides nothing. If terraform held the lock, one read that does not
    ///    find a part decides nothing either: a lock must not be forgotten because of one response that comes from a
    ///    proxy or a cache and not from the service. One read is also not enough to report that something which is not
    ///    a lock blocks every run.
    /// 4. A doubt about one part means that the lock is not released, whatever the result for the other part is.
    pub(crate) fn combine(&self) -> Step {
        if let Some(failure) = self.parts.iter().rev().find_map(|part| part.as_ref().err()) {
            return Step::Failed(failure.clone());
        }
        let parts: Vec<&Judged> = self.parts.iter().flatten().collect();
        if parts.contains(&&Judged::NeedsQuiet) {
            return Step::WaitForQuiet;
        }
        let is_missing = |part: &&Judged| matches!(part, Judged::Absent | Judged::Excluded | Judged::Anothers(_));
        let is_late = self.request_may_land && parts.iter().any(is_missing);
        let unproven = self.unproven(&parts);
        let is_proven = unproven.is_empty() || self.before == Some(&unproven);
        if is_late || !(is_proven || self.is_time_up) {
            return Step::LookAgain(unproven);
        }
        if let Some(kept) = parts.iter().rev().find_map(|part| part.keeps()) {
            return Step::Kept(kept);
        }
        if let Some(reason) = unproven.into_iter().find_map(|(_, no_lock)| no_lock) {
            return Step::Kept(Outcome::Kept { reason, because: Because::NoLock });
        }
        if !is_proven {
            return Step::Kept(Outcome::later(COMES_AND_GOES));
        }
        if self.was_deleted {
            return Step::Released;
        }
        let anothers = parts.iter().rev().find_map(|part| match part {
            Judged::Anothers(id) => Some(id.clone()),
            _ => None,
        });
        let is_complete = parts.iter().all(|part| matches!(part, Judged::Anothers(_)));
        let anothers = anothers.map(|id| AnothersLock { id, is_complete });
        let excluded = !parts.is_empty() && parts.iter().all(|part| **part == Judged::Excluded);
        Step::Absent { anothers, excluded }
    }

    fn unproven(&self, parts: &[&Judged]) -> Unproven {
        let unproven = parts.iter().enumerate().filter_map(|(number, part)| match part {
            // The absence of a lock needs a second read only if the lock is known to have existed.
            Judged::Absent if self.was_had || self.is_quiet => Some((number, None)),
            // If terraform did not hold the lock, no second read is needed here: while a lock request may land,
            // `combine` reads again in any case, because the table may still be created.
            Judged::Excluded if self.was_had => Some((number, None)),
            Judged::NoLock(reason) => Some((number, Some(reason.clone()))),
            _ => None,
        });
        unproven.collect()
    }
}

impl Judged {
    /// Returns the result for a part that was not found. If a delete request was sent for it, that request has deleted
    /// the part, and only the response to it was lost.
    pub(crate) fn of_no_part(was_asked_to_go: bool) -> Self {
        if was_asked_to_go { Self::Deleted } else { Self::Absent }
    }

    /// Returns the result for a part that was read once more after the time limit. `read` is what the read found.
    /// `was_asked_to_go` is whether a delete request was sent for the part. `None` if the part of the lock `id` is or
    /// may be still there.
    pub(crate) fn of_last_look(
        read: Result<Option<StoredLock>, Failure>,
        id: &str,
        was_asked_to_go: bool,
    ) -> Option<Self> {
        let Some(stored) = read.ok()? else { return Some(Self::of_no_part(was_asked_to_go)) };
        let info = stored.info().filter(|info| info.id != id)?;
        Some(if was_asked_to_go { Self::Deleted } else { Self::Anothers(info.id) })
    }

    /// Returns the outcome "not released" if this part prevents the release of the whole lock. `None` otherwise.
    fn keeps(&self) -> Option<Outcome> {
        match self {
            Self::Doubt(reason) => Some(Outcome::kept(*reason)),
            Self::NeedsConsent(reason) => Some(Outcome::later(reason)),
            Self::Waits => Some(Outcome::later("the other part of the lock was not released")),
            _ => None,
        }
    }
}

/// What a write of the dead terraform would change, as one read of everything shows it. Two values are equal if nothing
/// has changed between the two reads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Look {
    /// A text that changes whenever the state or its digest changes.
    state: String,
    /// The texts of the parts that are or may be the lock of the dead terraform, one after the other.
    lock: String,
    /// Whether there is at least one such part.
    holds: bool,
}

impl Look {
    /// Returns a look at the state, without a part. `state` is a text that changes whenever the state or its digest
    /// changes.
    pub(crate) fn of_state(state: String) -> Self {
        Self { state, lock: String::new(), holds: false }
    }

    /// Adds what is stored at the location of the next part, and whether it belongs to the run. Another run's part
    /// counts as none: with `-lock-timeout`, a terraform that waits takes a free part and gives it back, again and
    /// again, until the other part is free too. If that counted as a change, the wait for a quiet time would never end,
    /// and that terraform would never get the lock.
    pub(crate) fn add_part(&mut self, stored: Option<(&str, &Match)>) {
        match stored {
            None | Some((_, Match::Anothers)) => self.lock.push_str("- "),
            Some((text, Match::Ours | Match::Doubt(_))) => {
                self.lock.push_str(text);
                self.holds = true;
            }
        }
    }
}

/// The wait for a write that may be in flight. It ends when nothing has changed for the window, and the service could be
/// reached all that time: while the network is away, the kernel holds back what a dead process has sent, and
/// sends it after the network is back. It doubles the time between two attempts, so after an outage of more than about
/// 25 s, that can be later than [`QUIET_WINDOW`]. So the wait also begins anew as long as the kernel holds such bytes
/// ([`crate::sys::connections::StillSending`]). If `tf` cannot see these bytes, it waits as long as they may exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct QuietWait {
    limits: QuietLimits,
    last: Look,
    /// When the last change was seen, or the first read after an outage, counted from the begin of the wait.
    since: Duration,
    /// When the last read was completed. `None` if the wait begins anew with the next one.
    read: Option<Duration>,
    /// Whether the state or its digest has changed.
    has_landed: bool,
}

/// The result of one more read during the wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QuietStep {
    /// Nothing has changed since the last read, and the wait is not over.
    Wait,
    /// Something has changed, so the wait begins anew.
    Changed,
    /// Nothing has changed for the window.
    Quiet(Write),
    /// The lock has disappeared, so there is nothing to release.
    Gone,
}

impl QuietWait {
    /// Begins the wait. `first` is the first read.
    pub(crate) fn begin(first: Look, limits: QuietLimits) -> Self {
        Self { limits, last: first, since: Duration::ZERO, read: Some(Duration::ZERO), has_landed: false }
    }

    pub(crate) fn limits(&self) -> QuietLimits {
        self.limits
    }

    /// Begins the window anew with the next read, within `limits`: a read has failed, or this host's kernel was still
    /// sending what a dead process had handed to it.
    pub(crate) fn begin_anew(&mut self, limits: QuietLimits) {
        self.limits = limits;
        self.read = None;
    }

    /// Takes one more read, `now`, which was completed `elapsed` after the begin of the wait.
    pub(crate) fn see(&mut self, now: Look, elapsed: Duration) -> QuietStep {
        if !now.holds && !self.last.holds {
            return QuietStep::Gone;
        }
        if self.read.is_none_or(|read| elapsed.saturating_sub(read) > MAX_READ_GAP) {
            self.since = elapsed;
        }
        self.read = Some(elapsed);
        if now == self.last {
            let begun = self.since.max(self.limits.not_before);
            let is_over = elapsed.saturating_sub(begun) >= self.limits.window;
            let write = if self.has_landed { Write::Landed } else { Write::Quiet { waited: self.limits.shortest() } };
            return if is_over { QuietStep::Quiet(write) } else { QuietStep::Wait };
        }
        self.has_landed |= now.state != self.last.state;
        self.last = now;
        self.since = elapsed;
        QuietStep::Changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock::dynamodb::InfoAttribute;
    use crate::terraform::logged_lock::Phase;

    /// Tests all kinds of locks in all states that a log can report, with everything that may land.
    #[test]
    fn a_write_is_waited_for_where_one_can_be_on_its_way() {
        use crate::terraform::log::Log;
        use crate::terraform::log::tests::{ID, lock_line};
        for kind in ["S3 Native only", "DynamoDB only", "S3 Native and DynamoDB"] {
            for locked in [false, true] {
                for phase in [Phase::Open, Phase::Writing, Phase::Unlocking] {
                    let mut log = Log::default();
                    log.read(lock_line(7, &format!("Attempting to lock remote state ({kind})..."), ID, "r").as_bytes());
                    let mut lock = log.named().next().unwrap().clone();
                    lock.progress.held = locked.then_some(lock.progress.asked);
                    lock.progress.phase = phase;
                    let expected = phase != Phase::Open || (kind.contains("and") && !locked);
                    assert_eq!(needs_quiet(&lock, LateWrites::Logged), expected, "{kind} {locked} {phase:?}");
                    assert!(!needs_quiet(&lock, LateWrites::None) && needs_quiet(&lock, LateWrites::Any));
                }
            }
        }
    }

    #[test]
    fn a_part_is_deleted_exactly_if_it_is_ours_and_nothing_speaks_against_it() {
        let info = LockInfo { id: "other".to_owned(), ..LockInfo::default() };
        for verdict in [Match::Ours, Match::Anothers, Match::Doubt("it differs")] {
            for bits in 0..8_u8 {
                let bit = |place: u8| bits & (1 << place) != 0;
                let consent = bit(0).then(|| "a global table".to_owned());
                let read = PartRead {
                    info: &info,
                    verdict: verdict.clone(),
                    needs_consent: consent.clone(),
                    needs_quiet: bit(1),
                    must_be_last: bit(2),
                };
                let expected = match (&verdict, consent, bit(1), bit(2)) {
                    (Match::Anothers, ..) => PartStep::Settled(Judged::Anothers("other".to_owned())),
                    (Match::Doubt(reason), ..) => PartStep::Settled(Judged::Doubt(reason)),
                    (Match::Ours, Some(reason), ..) => PartStep::Settled(Judged::NeedsConsent(reason)),
                    (Match::Ours, None, true, _) => PartStep::Settled(Judged::NeedsQuiet),
                    (Match::Ours, None, false, true) => PartStep::Settled(Judged::Waits),
                    (Match::Ours, None, false, false) => PartStep::Delete,
                };
                assert_eq!(read.decide(), expected, "{verdict:?} {bits:03b}");
            }
        }
        assert_eq!(Judged::of_no_part(true), Judged::Deleted);
        assert_eq!(Judged::of_no_part(false), Judged::Absent);
    }

    #[test]
    fn the_time_is_divided_among_the_parts_that_are_still_to_do() {
        let silent = || Err(Failure::no_answer("S3", "x"));
        for (judged, expected) in [
            (vec![], 2),
            (vec![Ok(Judged::Deleted)], 1),
            (vec![Ok(Judged::Absent)], 1),
            (vec![Ok(Judged::Waits)], 2),
            (vec![silent()], 2),
            (vec![silent(), Ok(Judged::Deleted)], 1),
        ] {
            assert_eq!(still_to_do(2, &judged), expected, "{judged:?}");
        }
        assert_eq!(still_to_do(1, &[]), 1);
    }

    /// Without its item, the object has no record, so no other host could release it.
    #[test]
    fn an_item_with_a_lease_stays_as_long_as_the_object_may_be_the_runs() {
        for object in findings() {
            let may_be_ours = match &object {
                Err(_) => true,
                Ok(judged) => {
                    matches!(judged, Judged::Doubt(_) | Judged::NeedsQuiet | Judged::NeedsConsent(_) | Judged::Waits)
                }
            };
            let is_gone = matches!(object, Ok(Judged::Deleted | Judged::Anothers(_)));
            assert_eq!(must_be_read_again(&object), !may_be_ours && !is_gone, "{object:?}");
            for before in findings().into_iter().map(Some).chain([None]) {
                // One read that does not find the object proves nothing.
                let expected = is_gone || (!may_be_ours && before.as_ref() == Some(&object));
                assert_eq!(may_item_follow(before.as_ref(), &object), expected, "{before:?} {object:?}");
            }
        }
    }

    #[test]
    fn who_has_not_requested_the_deletion_of_an_item_that_waited_has_not_released_the_lock() {
        for item in findings() {
            for (has_waited, was_asked_to_go) in [(false, false), (false, true), (true, false), (true, true)] {
                let is_gone = matches!(item, Ok(Judged::Absent | Judged::Anothers(_)));
                let expected = is_gone && has_waited && !was_asked_to_go;
                assert_eq!(
                    is_released_by_another(&item, ItemHistory { has_waited, was_asked_to_go }),
                    expected,
                    "{item:?}"
                );
            }
        }
    }

    #[test]
    fn a_last_look_finds_a_part_deleted_only_if_it_is_gone_and_was_asked_to_go() {
        let text = |text: &str| Some(StoredLock::Item(InfoAttribute::of_text(text)));
        let lock = |id: &str| text(&format!(r#"{{"ID":"{id}"}}"#));
        for (read, was_asked_to_go, expected) in [
            (Ok(None), true, Some(Judged::Deleted)),
            (Ok(None), false, Some(Judged::Absent)),
            (Ok(lock("b")), true, Some(Judged::Deleted)),
            (Ok(lock("b")), false, Some(Judged::Anothers("b".to_owned()))),
            (Ok(lock("a")), true, None),
            (Ok(lock("a")), false, None),
            (Ok(text("<html>")), true, None),
            (Err(Failure::no_answer("S3", "x")), true, None),
        ] {
            assert_eq!(Judged::of_last_look(read.clone(), "a", was_asked_to_go), expected, "{read:?}");
        }
    }

    fn look(state: &str, lock: &str, holds: bool) -> Look {
        Look { state: state.to_owned(), lock: lock.to_owned(), holds }
    }

    #[test]
    fn another_run_that_takes_a_part_and_gives_it_back_does_not_prolong_the_wait() {
        let seen = |item: Option<(&str, &Match)>, object: Option<(&str, &Match)>| {
            let mut look = Look::of_state("s".to_owned());
            look.add_part(item);
            look.add_part(object);
            look
        };
        let (ours, theirs) = (Some(("ours", &Match::Ours)), Some(("theirs", &Match::Anothers)));
        for item in [ours, Some(("ours", &Match::Doubt("it differs")))] {
            let free = seen(item, None);
            assert_eq!(seen(item, theirs), free);
            assert!(free.holds && free != seen(None, None) && free != seen(item, ours));
        }
        assert!(!seen(None, theirs).holds);
    }

    const MILLISECOND: Duration = Duration::from_millis(1);
    const SEEN: QuietLimits = QuietLimits::of(true);
    const NOTHING_ARRIVED: Write = Write::Quiet { waited: QUIET_WINDOW };

    /// Reads the same once a second after `from`, and then at `to`. Returns the last step. All others must be
    /// [`QuietStep::Wait`].
    fn see_until(wait: &mut QuietWait, same: &Look, from: Duration, to: Duration) -> QuietStep {
        let mut at = from + Duration::from_secs(1);
        while at < to {
            assert_eq!(wait.see(same.clone(), at), QuietStep::Wait, "{at:?}");
            at += Duration::from_secs(1);
        }
        wait.see(same.clone(), to)
    }

    #[test]
    fn the_wait_ends_when_nothing_has_changed_for_the_whole_window() {
        let same = look("s", "l", true);
        let mut wait = QuietWait::begin(same.clone(), SEEN);
        let just_before = QUIET_WINDOW.saturating_sub(MILLISECOND);
        assert_eq!(see_until(&mut wait, &same, Duration::ZERO, just_before), QuietStep::Wait);
        assert_eq!(wait.see(same, QUIET_WINDOW), QuietStep::Quiet(NOTHING_ARRIVED));
    }

    /// While the network is away, the kernel holds back what the dead terraform has sent.
    #[test]
    fn an_outage_begins_the_window_anew() {
        let same = look("s", "l", true);
        let at = Duration::from_secs(9);
        for (fails, next) in [(true, at + MILLISECOND), (false, at + MAX_READ_GAP + MILLISECOND), (true, at * 2)] {
            let mut wait = QuietWait::begin(same.clone(), SEEN);
            assert_eq!(see_until(&mut wait, &same, Duration::ZERO, at), QuietStep::Wait);
            if fails {
                wait.begin_anew(SEEN);
            }
            assert_eq!(wait.see(same.clone(), next), QuietStep::Wait);
            let just_before = next + QUIET_WINDOW.saturating_sub(MILLISECOND);
            assert_eq!(see_until(&mut wait, &same, next, just_before), QuietStep::Wait, "{fails} {next:?}");
            assert_eq!(wait.see(same.clone(), next + QUIET_WINDOW), QuietStep::Quiet(NOTHING_ARRIVED));
        }
    }

    /// After an outage of more than 25 s, what the dead terraform has sent arrives later than the window.
    #[test]
    fn the_window_begins_after_the_kernel_has_delivered_what_the_dead_process_sent() {
        let same = look("s", "l", true);
        let mut wait = QuietWait::begin(same.clone(), SEEN);
        for second in 1..200 {
            wait.begin_anew(SEEN);
            assert_eq!(wait.see(same.clone(), Duration::from_secs(second)), QuietStep::Wait);
        }
        // Just before this read, it was seen to have arrived.
        wait.begin_anew(SEEN);
        let at = Duration::from_secs(200);
        assert_eq!(wait.see(same.clone(), at), QuietStep::Wait);
        let just_before = at + QUIET_WINDOW.saturating_sub(MILLISECOND);
        assert_eq!(see_until(&mut wait, &same, at, just_before), QuietStep::Wait);
        assert_eq!(wait.see(same, at + QUIET_WINDOW), QuietStep::Quiet(NOTHING_ARRIVED));
    }

    /// The kernel of Linux gives up 4 min after the end of the process at the latest.
    #[test]
    fn where_what_the_kernel_sends_is_not_seen_the_wait_is_longer_than_the_kernel_sends() {
        let same = look("s", "l", true);
        let unseen = QuietLimits::of(false);
        let longest = unseen.shortest();
        assert_eq!(longest, QUIET_WINDOW + UNSEEN_BYTES_TIMEOUT + UNSEEN_INTERVAL);
        let nothing_arrived = QuietStep::Quiet(Write::Quiet { waited: longest });
        let mut wait = QuietWait::begin(same.clone(), unseen);
        assert_eq!(wait.limits(), unseen);
        assert_eq!(see_until(&mut wait, &same, Duration::ZERO, longest.saturating_sub(MILLISECOND)), QuietStep::Wait);
        assert_eq!(wait.see(same.clone(), longest), nothing_arrived);
        // It was seen until shortly before the end of the wait.
        let mut wait = QuietWait::begin(same.clone(), SEEN);
        let at = QUIET_WINDOW.saturating_sub(MILLISECOND);
        assert_eq!(see_until(&mut wait, &same, Duration::ZERO, at), QuietStep::Wait);
        wait.begin_anew(unseen);
        assert_eq!(wait.see(same.clone(), QUIET_WINDOW), QuietStep::Wait);
        let end = (QUIET_WINDOW + unseen.window).max(longest);
        assert_eq!(see_until(&mut wait, &same, QUIET_WINDOW, end.saturating_sub(MILLISECOND)), QuietStep::Wait);
        assert_eq!(wait.see(same, end), nothing_arrived);
    }

    /// Otherwise a read that fails once in 4 min would prolong the wait without end.
    #[test]
    fn a_failed_read_does_not_begin_the_time_anew_in_which_the_kernel_sends_unseen() {
        let same = look("s", "l", true);
        let unseen = QuietLimits { window: QUIET_WINDOW, not_before: Duration::from_mins(4) };
        let mut wait = QuietWait::begin(same.clone(), unseen);
        let failed = unseen.not_before + Duration::from_secs(5);
        assert_eq!(see_until(&mut wait, &same, Duration::ZERO, failed), QuietStep::Wait);
        wait.begin_anew(unseen);
        let end = failed + Duration::from_secs(1) + QUIET_WINDOW;
        assert_eq!(see_until(&mut wait, &same, failed, end.saturating_sub(MILLISECOND)), QuietStep::Wait);
        assert!(matches!(wait.see(same, end), QuietStep::Quiet(_)));
    }

    #[test]
    fn each_change_begins_the_window_anew_and_a_change_of_the_state_is_a_write() {
        let same = look("s", "l", true);
        for (changed, write) in [(look("t", "l", true), Write::Landed), (look("s", "m", true), NOTHING_ARRIVED)] {
            let mut wait = QuietWait::begin(same.clone(), SEEN);
            let at = QUIET_WINDOW.saturating_sub(MILLISECOND);
            assert_eq!(see_until(&mut wait, &same, Duration::ZERO, at.saturating_sub(MILLISECOND)), QuietStep::Wait);
            assert_eq!(wait.see(changed.clone(), at), QuietStep::Changed);
            let just_before = at + QUIET_WINDOW.saturating_sub(MILLISECOND);
            assert_eq!(see_until(&mut wait, &changed, at, just_before), QuietStep::Wait);
            assert_eq!(wait.see(changed, at + QUIET_WINDOW), QuietStep::Quiet(write));
        }
    }

    #[test]
    fn the_wait_ends_at_once_where_two_reads_in_a_row_do_not_find_the_lock() {
        let mut wait = QuietWait::begin(look("s", "l", true), SEEN);
        assert_eq!(wait.see(look("s", "-", false), Duration::ZERO), QuietStep::Changed);
        assert_eq!(wait.see(look("s", "-", false), Duration::ZERO), QuietStep::Gone);
        let mut wait = QuietWait::begin(look("s", "-", false), SEEN);
        let there = look("s", "l", true);
        assert_eq!(wait.see(there.clone(), MILLISECOND), QuietStep::Changed, "it is there again");
        let step = see_until(&mut wait, &there, MILLISECOND, QUIET_WINDOW + MILLISECOND);
        assert_eq!(step, QuietStep::Quiet(NOTHING_ARRIVED));
    }

    /// Returns every result that a part can have.
    fn findings() -> Vec<Result<Judged, Failure>> {
        vec![
            Ok(Judged::Absent),
            Ok(Judged::Excluded),
            Ok(Judged::Deleted),
            Ok(Judged::Anothers("other".to_owned())),
            Ok(Judged::NoLock("an empty object".to_owned())),
            Ok(Judged::Doubt("it differs")),
            Ok(Judged::NeedsQuiet),
            Ok(Judged::NeedsConsent("a global table".to_owned())),
            Ok(Judged::Waits),
            Err(Failure::no_answer("S3", "silence")),
        ]
    }

    /// Returns every combination of results for a lock with one part and for a lock with two parts.
    fn all_parts() -> Vec<Vec<Result<Judged, Failure>>> {
        let one = findings().into_iter().map(|part| vec![part]);
        let two = findings()
            .into_iter()
            .flat_map(|first| findings().into_iter().map(move |second| vec![first.clone(), second]));
        one.chain(two).collect()
    }

    /// Calls `promise` with every possible [`PartsLook`] and the [`Step`] that follows from it.
    fn for_all(promise: impl Fn(&PartsLook<'_>, Step)) {
        for parts in all_parts() {
            for bits in 0..32_u8 {
                let bit = |location: u8| bits & (1 << location) != 0;
                let deleted_now = parts.contains(&Ok(Judged::Deleted));
                let mut look = PartsLook {
                    parts: &parts,
                    was_had: bit(0),
                    is_quiet: bit(1),
                    was_deleted: bit(2) || deleted_now,
                    before: None,
                    request_may_land: bit(3),
                    is_time_up: bit(4),
                };
                let unproven = look.unproven(&parts.iter().flatten().collect::<Vec<_>>());
                let other: Unproven = vec![(9, None)];
                for before in [None, Some(&unproven), Some(&other)] {
                    look.before = before;
                    promise(&look, look.combine());
                }
            }
        }
    }

    fn has(look: &PartsLook<'_>, is_it: impl Fn(&Judged) -> bool) -> bool {
        look.parts.iter().flatten().any(is_it)
    }

    #[test]
    fn a_part_that_could_not_be_read_decides_before_any_other() {
        for_all(|look, step| {
            assert_eq!(matches!(step, Step::Failed(_)), look.parts.iter().any(Result::is_err), "{:?}", look.parts);
        });
    }

    #[test]
    fn a_part_that_waits_for_quiet_keeps_the_lock_from_being_settled() {
        for_all(|look, step| {
            let expected = has(look, |part| *part == Judged::NeedsQuiet) && look.parts.iter().all(Result::is_ok);
            assert_eq!(step == Step::WaitForQuiet, expected, "{:?}", look.parts);
        });
    }

    #[test]
    fn a_lock_is_released_only_if_a_part_was_deleted_and_nothing_is_in_doubt() {
        for_all(|look, step| {
            if step == Step::Released {
                assert!(look.was_deleted);
                let is_clear = |part: &Judged| {
                    matches!(part, Judged::Absent | Judged::Excluded | Judged::Deleted | Judged::Anothers(_))
                };
                assert!(look.parts.iter().all(|part| part.as_ref().is_ok_and(is_clear)), "{:?}", look.parts);
            }
        });
    }

    #[test]
    fn a_doubt_about_one_part_keeps_the_lock() {
        for_all(|look, step| {
            if has(look, |part| part.keeps().is_some()) {
                assert!(
                    matches!(step, Step::Failed(_) | Step::WaitForQuiet | Step::LookAgain(_) | Step::Kept(_)),
                    "{:?}: {step:?}",
                    look.parts
                );
            }
        });
    }

    #[test]
    fn one_look_does_not_prove_that_a_lock_that_was_had_is_gone() {
        for_all(|look, step| {
            let is_absent = has(look, |part| matches!(part, Judged::Absent | Judged::Excluded));
            let is_gone = matches!(step, Step::Absent { .. } | Step::Released);
            if look.was_had && is_absent && is_gone {
                let unproven = look.unproven(&look.parts.iter().flatten().collect::<Vec<_>>());
                assert_eq!(look.before, Some(&unproven), "{:?}: {step:?}", look.parts);
            }
        });
    }

    #[test]
    fn the_absence_of_a_lock_that_was_never_had_needs_no_second_look() {
        for_all(|look, step| {
            let is_clear = |part: &Judged| {
                matches!(part, Judged::Absent | Judged::Excluded | Judged::Deleted | Judged::Anothers(_))
            };
            let all_clear = look.parts.iter().all(|part| part.as_ref().is_ok_and(is_clear));
            if all_clear && !look.was_had && !look.is_quiet && !look.request_may_land {
                assert!(matches!(step, Step::Absent { .. } | Step::Released), "{:?}: {step:?}", look.parts);
            }
        });
    }

    #[test]
    fn while_a_request_may_land_an_absent_part_settles_nothing() {
        for_all(|look, step| {
            let is_missing = has(look, |part| matches!(part, Judged::Absent | Judged::Excluded | Judged::Anothers(_)));
            if look.request_may_land && is_missing {
                assert!(
                    matches!(step, Step::Failed(_) | Step::WaitForQuiet | Step::LookAgain(_)),
                    "{:?}: {step:?}",
                    look.parts
                );
            }
        });
    }

    #[test]
    fn looking_has_an_end() {
        for_all(|look, step| {
            if look.is_time_up && !look.request_may_land {
                assert!(!matches!(step, Step::LookAgain(_)), "{:?}", look.parts);
            }
        });
    }

    #[test]
    fn no_lock_can_be_there_only_if_none_can_be_in_any_part() {
        for_all(|look, step| {
            if let Step::Absent { anothers, excluded } = step {
                assert_eq!(excluded, look.parts.iter().all(|part| *part == Ok(Judged::Excluded)), "{:?}", look.parts);
                assert_eq!(anothers.is_some(), has(look, |part| matches!(part, Judged::Anothers(_))));
                let is_anothers = |part: &Result<Judged, Failure>| matches!(part, Ok(Judged::Anothers(_)));
                let is_complete = anothers.is_some_and(|anothers| anothers.is_complete);
                assert_eq!(is_complete, look.parts.iter().all(is_anothers), "{:?}", look.parts);
                assert!(!look.was_deleted);
            }
        });
    }
}
