//! Releases the locks of a run whose operation is over. `tf` does this. If `tf` was killed, its guardian does it. If
//! the guardian was killed too, the next `tf` does it. All three use this code. They differ in their information about
//! the run, in whether a person can interrupt them, and in how they report.

use jiff::Timestamp;

use crate::aws::credentials::Purpose;
use crate::aws::failure::Failure;
use crate::cleanup::candidate_backends::CandidateBackends;
use crate::cleanup::messages;
use crate::cleanup::waiter::Waiter;
use crate::cleanup::working_directory::Within;
use crate::crash_point;
use crate::journal::clock_reading::ClockReading;
use crate::journal::history;
use crate::journal::history::{By, LockEvent, What};
use crate::journal::pending_requests::{PENDING_WINDOW, PendingRequest, PendingRequests};
use crate::journal::runs::Replaced;
use crate::lock::location::LockLocation;
use crate::lock::outcome::{Because, Outcome};
use crate::lock::proof::Run;
use crate::lock::reached::Reached;
use crate::lock::release::unnamed_lock::{IdentifiedLock, identify_unnamed_lock};
use crate::lock::release::{self, EXPLANATION_TIMEOUT, Effort, ReleaseContext, SERVICE_TIMEOUT, stored};
use crate::lock::release_step::LateWrites;
use crate::sys::wait::Ended;
use crate::terraform::lock_info::LockInfo;
use crate::terraform::log::{Log, RecordedLock, UnnamedLock};
use crate::terraform::version::{LogDetail, Version};
use crate::trace::trace;

/// The result of looking for an unnamed lock. The outer `Err` is the error of [`Waiter::block_on`].
type Looked = Result<Result<IdentifiedLock, Failure>, &'static str>;

/// The locks of a run that may exist.
#[derive(Debug, Default)]
pub(crate) struct CandidateLocks {
    /// The locks that the log names, and those that were identified by reading their locations.
    pub(crate) named: Vec<RecordedLock>,
    /// The locks that may belong to the run, and why that is not certain.
    pub(crate) suspects: Vec<(LockInfo, &'static str)>,
    /// The locks that could not be looked for, and why.
    pub(crate) unread: Vec<(UnnamedLock, String)>,
    /// The locks that were requested and not found. Their requests may still land.
    pub(crate) awaited: Vec<UnnamedLock>,
}

impl CandidateLocks {
    /// Finds the locks of a run. A lock that the log does not name is looked for at its locations. For `died`, see
    /// [`ReleaseRequest::died`].
    pub(crate) fn find(
        log: &Log,
        candidates: &CandidateBackends,
        release_context: &ReleaseContext,
        died: bool,
        waiter: &mut Waiter<'_>,
    ) -> Self {
        let mut locks = Self::default();
        locks.named.extend(log.unreleased().cloned());
        let _there = Within::enter(&candidates.working_directory);
        // A terraform that exited by itself has received the response to its request. If it had been granted the lock,
        // its log would show that it continued. So a lock that was only requested is not looked for.
        for unnamed in log.unreleased_unnamed().filter(|unnamed| died || !unnamed.is_only_asked_for()) {
            let candidates = candidates.of_unnamed(unnamed);
            let mut unseen = true;
            for location in &candidates {
                let looked = identify_unnamed_lock(unnamed, location, release_context, died);
                unseen &= matches!(locks.add(unnamed, waiter.block_on(looked)), Ok(Ok(IdentifiedLock::None)));
            }
            if !died || !unseen {
                continue;
            }
            if unnamed.progress.held.is_none() {
                if !candidates.is_empty() && release_context.late_writes.may_land() {
                    locks.awaited.push(unnamed.clone());
                }
            } else if let Some(Outcome::Kept { reason, .. }) = not_believed(&candidates, release_context, waiter) {
                locks.unread.push((unnamed.clone(), reason));
            }
        }
        locks
    }

    /// Adds the result of looking for `unnamed` at one location, and returns it.
    fn add(&mut self, unnamed: &UnnamedLock, looked: Looked) -> Looked {
        match &looked {
            Ok(Ok(IdentifiedLock::None)) => {}
            Ok(Ok(IdentifiedLock::Ours(lock))) => self.named.push((**lock).clone()),
            Ok(Ok(IdentifiedLock::Possible(info, reason))) => self.suspects.push(((**info).clone(), *reason)),
            Ok(Err(failure)) => self.unread.push((unnamed.clone(), failure.to_string())),
            Err(reason) => self.unread.push((unnamed.clone(), (*reason).to_owned())),
        }
        looked
    }

    /// Whether the lists `named`, `suspects` and `unread` are all empty.
    pub(crate) fn is_empty(&self) -> bool {
        self.named.is_empty() && self.suspects.is_empty() && self.unread.is_empty()
    }
}

/// The result for one recorded lock.
#[derive(Debug)]
pub(crate) struct ReleaseResult {
    pub(crate) lock: RecordedLock,
    /// The outcome of the release. `None` if terraform exited by itself without getting the lock, and `tf` did not look
    /// for the lock or knows no location for it.
    pub(crate) outcome: Option<Outcome>,
    /// Whether this lock may have existed when terraform exited. True if the run had the lock, or died before it
    /// received the response to its request. False if terraform exited by itself without getting the lock: a lock at
    /// the location then belongs to another run.
    pub(crate) may_exist: bool,
    /// Whether the lock, or a part of it, may still appear although it was released or not found. Always false if
    /// terraform exited by itself. True if the request for the lock got no response and may still land. This is
    /// possible even after a release, because the SDK sends a request again if it gets no response. Also true if the
    /// lock's table or bucket does not exist now, because it may be restored.
    pub(crate) may_still_come: bool,
}

/// The locks to release, and the data that decide whether each may be released.
pub(crate) struct ReleaseRequest<'a> {
    pub(crate) locks: &'a [RecordedLock],
    pub(crate) candidates: &'a CandidateBackends,
    pub(crate) release_context: &'a ReleaseContext,
    /// Whether terraform died. If so, a lock whose request got no response may belong to the run.
    pub(crate) died: bool,
    /// The outcome for every lock if none may be released. `None` if locks may be released.
    pub(crate) keep: Option<Outcome>,
}

/// Releases those of the requested locks that belong to the run. Returns the result for each lock. `is_claimed` returns
/// whether the journal has recorded a lock ID for another run that is or may be alive; `None` if this is not known.
pub(crate) fn release_locks(
    request: &ReleaseRequest<'_>,
    is_claimed: impl Fn(&str) -> Option<bool>,
    waiter: &mut Waiter<'_>,
) -> Vec<ReleaseResult> {
    let ReleaseRequest { locks, candidates, release_context, died, keep } = request;
    let died = *died;
    let _there = Within::enter(&candidates.working_directory);
    let mut is_silent = false;
    // The order is reversed because terraform does the same: a migration takes two locks and releases the second one
    // first.
    let results = locks.iter().rev().map(|recorded| {
        crash_point::reached("release: next lock");
        let may_exist = recorded.progress.held.is_some() || died;
        let named = |outcome: Outcome| may_exist.then_some(outcome);
        let purpose = if may_exist { Purpose::Work } else { Purpose::Explanation };
        // If the service did not answer for one lock, the wait for the next lock is shorter.
        let limit = if may_exist && !is_silent { SERVICE_TIMEOUT } else { EXPLANATION_TIMEOUT };
        let is_claimed = if keep.is_some() { Some(false) } else { is_claimed(&recorded.id) };
        let outcome = if let Some(kept) = keep {
            named(kept.clone())
        } else if is_claimed == Some(true) {
            // The journal has recorded this lock for another run, which is or may be alive. So it is the lock of that
            // run, and this log contains its ID only because a process of this run has written the ID into the log.
            named(Outcome::Kept { reason: messages::release::CLAIMED.to_owned(), because: Because::Claimed })
        } else if is_claimed.is_none() {
            named(Outcome::later(messages::release::MAY_BE_CLAIMED))
        } else {
            let candidates = candidates.of(recorded);
            match release_where_found(recorded, &candidates, release_context, Effort { limit, purpose }, waiter) {
                // A lock that was not found may exist in another account, so the account is checked. The check is not
                // needed if terraform was refused the lock, if terraform did not get the lock and another run's lock is
                // there, or if terraform has most likely released the lock itself.
                Some(absent @ Outcome::Absent { .. })
                    if may_exist
                        && (recorded.progress.held.is_some()
                            || matches!(absent, Outcome::Absent { anothers: None, .. }))
                        && !is_expected_to_be_gone(recorded, died, release_context.run.program.as_ref()) =>
                {
                    Some(not_believed(&candidates, release_context, waiter).unwrap_or(absent))
                }
                outcome => outcome.or_else(|| named(no_place())),
            }
        };
        trace!("lock {}: {outcome:?}", recorded.id);
        is_silent |= matches!(outcome, Some(Outcome::Kept { because: Because::NoAnswer, .. }));
        let may_still_come = may_still_come(died, outcome.as_ref(), recorded);
        ReleaseResult { lock: recorded.clone(), may_exist, may_still_come, outcome }
    });
    results.collect()
}

/// Whether `recorded`, or a part of it, may still appear after this `outcome`. `died` is true if terraform died.
pub(crate) fn may_still_come(died: bool, outcome: Option<&Outcome>, recorded: &RecordedLock) -> bool {
    died && match outcome {
        // The lock's table may be restored from a backup, with the lock in it.
        Some(Outcome::Absent { excluded: true, .. }) => true,
        Some(Outcome::Absent { .. } | Outcome::Released(_)) => recorded.progress.held.is_none(),
        Some(Outcome::Kept { .. }) | None => false,
    }
}

/// Returns the results for `locks` if no lock may be released (`TFW_RELEASE=never`). The outcome for a lock that may
/// exist is [`Outcome::Kept`], so that the lock is reported.
pub(crate) fn only_name(
    locks: &[RecordedLock],
    candidates: &CandidateBackends,
    release_context: &ReleaseContext,
    waiter: &mut Waiter<'_>,
) -> Vec<ReleaseResult> {
    let _there = Within::enter(&candidates.working_directory);
    let results = locks.iter().rev().map(|recorded| {
        let candidates = candidates.of(recorded);
        let may_exist = |location: &LockLocation, waiter: &mut Waiter<'_>| {
            waiter.block_on(stored::may_exist(location, &recorded.id)).unwrap_or(true)
        };
        let outcome = if candidates.is_empty() {
            no_place()
        } else if candidates.iter().any(|location| may_exist(location, waiter)) {
            Outcome::Kept { reason: messages::release::NEVER.to_owned(), because: Because::Never }
        } else {
            let absent = Outcome::Absent { anothers: None, excluded: false };
            not_believed(&candidates, release_context, waiter).unwrap_or(absent)
        };
        trace!("lock {}, which is to be named: {outcome:?}", recorded.id);
        ReleaseResult { lock: recorded.clone(), outcome: Some(outcome), may_exist: true, may_still_come: false }
    });
    results.collect()
}

/// Whether terraform has most likely released `recorded` itself, although its log cannot show that. This is the case if
/// terraform exited by itself after it had begun to release the lock, and its version logs no responses. The log of
/// every failed command of Terraform 1.6 to 1.9 ends in this way.
fn is_expected_to_be_gone(recorded: &RecordedLock, died: bool, program: Option<&Version>) -> bool {
    !died
        && recorded.progress.is_unlocking()
        && program.is_some_and(|program| program.log_detail() == LogDetail::IdsOnly)
}

/// Returns those of the run's locks that were replaced: another run locked the same state while this run was still
/// working. Up to the time `until`, this run was working or may have been working. Each replacement is also written
/// into the history.
pub(crate) fn replaced(
    results: &[ReleaseResult],
    candidates: &CandidateBackends,
    died: bool,
    until: Timestamp,
    by: By,
    waiter: &mut Waiter<'_>,
) -> Vec<Replaced> {
    let mut all = Vec::new();
    let _there = Within::enter(&candidates.working_directory);
    for ReleaseResult { lock, outcome, .. } in results {
        let Some(Outcome::Absent { anothers: Some(anothers), .. }) = outcome else { continue };
        let mut locks = Vec::new();
        for location in candidates.of(lock) {
            locks.extend(waiter.block_on(stored::stored(&location)).unwrap_or_default());
        }
        let other = locks.iter().filter_map(|part| part.stored.info()).find(|info| info.id == anothers.id);
        if let Some(info) = other.filter(|info| worked_at_once(lock, info, died, until)) {
            let why = format!("while its run was running, {} locked the same state, ID {}", info.who, info.id);
            history::record(&LockEvent::of_recorded(What::Replaced, by, lock, &why, None));
            all.push(Replaced { own: lock.clone(), by: info });
        }
    }
    all
}

/// Whether the holder of `other` locked the state while the run of `own` was still working. Up to the time `until`,
/// that run was working or may have been working. If the unlock of that run was refused because the lock belonged to
/// another run, the result is true whatever the times are, because the clocks of the two hosts may differ. False if
/// that run did not have its lock.
fn worked_at_once(own: &RecordedLock, other: &LockInfo, died: bool, until: Timestamp) -> bool {
    let refused = !died && own.progress.is_unlocking();
    own.progress.held.is_some() && (refused || other.created().is_some_and(|created| created <= until))
}

/// Returns the outcome for a lock that was found at none of `candidates` but does not count as deleted: it may exist in
/// another account, or the account could not be checked. `None` if the lock counts as deleted.
fn not_believed(
    candidates: &[LockLocation],
    release_context: &ReleaseContext,
    waiter: &mut Waiter<'_>,
) -> Option<Outcome> {
    match waiter
        .block_on(async { tokio::time::timeout(SERVICE_TIMEOUT, release_context.reached.believes(candidates)).await })
    {
        Ok(Ok(true)) => None,
        Ok(Ok(false) | Err(_)) => Some(Outcome::Kept {
            reason: messages::release::ANOTHER_ACCOUNT.to_owned(),
            because: Because::OtherAccount,
        }),
        Err(reason) => Some(Outcome::later(reason)),
    }
}

/// Tries to release the lock at each of `candidates`, until it is released at one of them. For `effort`, see
/// [`release::release`]. Returns "released" if the lock was released, otherwise the last "not released", and "absent"
/// only if the lock was absent at all locations. `None` if `candidates` is empty.
fn release_where_found(
    recorded: &RecordedLock,
    candidates: &[LockLocation],
    release_context: &ReleaseContext,
    effort: Effort,
    waiter: &mut Waiter<'_>,
) -> Option<Outcome> {
    let mut worst = None;
    for location in candidates {
        let release = release::release(recorded, location, release_context, effort);
        let outcome = waiter.block_on(release).unwrap_or_else(Outcome::later);
        match outcome {
            Outcome::Released(_) => return Some(outcome),
            Outcome::Kept { .. } => worst = Some(outcome),
            Outcome::Absent { anothers, excluded } => {
                worst = match worst {
                    None => Some(Outcome::Absent { anothers, excluded }),
                    // `excluded` must be true for all locations: if a lock can exist at one of them, it may still
                    // appear there.
                    Some(Outcome::Absent { anothers: before, excluded: too }) => {
                        Some(Outcome::Absent { anothers: before.or(anothers), excluded: excluded && too })
                    }
                    kept => kept,
                }
            }
        }
    }
    worst
}

/// Writes the locks whose requests may still land to disk, so that the next `tf` checks them. Returns the IDs of the
/// locks that were written.
///
/// If no request of the run may still be in flight, only the locks whose table or bucket does not exist now are written.
pub(crate) fn remember_pending(
    results: &[ReleaseResult],
    release_context: &ReleaseContext,
    pending_requests: Option<&PendingRequests>,
) -> Vec<String> {
    let recent = release_context.late_writes.may_land();
    let late = results.iter().filter(|result| result.may_still_come);
    late.filter_map(|result| pending(result, &release_context.run, recent))
        .filter_map(|request| keep(pending_requests, request))
        .collect()
}

/// Returns the locks of `results` whose requests may still land although their terraform exited by itself, with an
/// error and without getting the lock. Terraform may have given up while a request was in flight. It does so 5 s after
/// a second interrupt (internal/command/meta.go, `RunOperation`). It also does so if a proxy answers in place of the
/// service, or the connection breaks, and the SDK has used up its retries. A retry of the SDK can also create a lock
/// again after its release. The log does not distinguish these cases from a refusal. So a request counts as refused
/// only if the location shows it: another run's lock is there with all its parts, no lock can exist there, or what is
/// there is not a lock or is in doubt.
pub(crate) fn abandoned_requests(
    results: &[ReleaseResult],
    ended: Option<Ended>,
) -> impl Iterator<Item = &ReleaseResult> {
    let failed = matches!(ended, Some(Ended::Exited(code)) if code != 0);
    let abandoned = move |results: &&ReleaseResult| {
        let may_come = match &results.outcome {
            Some(Outcome::Absent { anothers, excluded: false }) => {
                anothers.as_ref().is_none_or(|anothers| !anothers.is_complete)
            }
            Some(Outcome::Released(_)) => true,
            // The location could not be read, so it is unknown whether the request was refused.
            Some(Outcome::Kept { because, .. }) => {
                matches!(
                    because,
                    Because::NoAnswer
                        | Because::NoCredentials
                        | Because::Denied(_)
                        | Because::NotYet
                        | Because::StillRunning { .. }
                        | Because::Unseen
                )
            }
            Some(Outcome::Absent { .. }) | None => false,
        };
        failed && may_come && results.lock.progress.held.is_none() && !results.may_still_come
    };
    results.iter().filter(abandoned)
}

/// Writes the locks of `results` to disk, so that the next `tf` checks them. `results` are the results that
/// [`abandoned_requests`] returns. Returns the IDs of the locks that were written.
pub(crate) fn remember_abandoned<'a>(
    results: impl Iterator<Item = &'a ReleaseResult>,
    release_context: &ReleaseContext,
    pending_requests: Option<&PendingRequests>,
) -> Vec<String> {
    results
        .map(|result| abandoned(result, &release_context.run))
        .filter_map(|request| keep(pending_requests, request))
        .collect()
}

/// Returns the pending request for a lock that may still appear. `recent` is whether a request of the run may still be
/// in flight. `None` if the lock need not be checked.
fn pending(ReleaseResult { lock, outcome, .. }: &ReleaseResult, run: &Run, recent: bool) -> Option<PendingRequest> {
    let excluded = matches!(outcome, Some(Outcome::Absent { excluded: true, .. }));
    if !recent && !excluded {
        return None;
    }
    let mut request = PendingRequest::new(lock, run);
    // If terraform did not get the lock, the table most likely never existed. If terraform held the lock in the table,
    // the table may be restored.
    request.abandoned = excluded && lock.progress.held.is_none();
    request.unseen = excluded;
    Some(request)
}

/// Returns the pending request for a lock that was most likely refused.
fn abandoned(ReleaseResult { lock, outcome, .. }: &ReleaseResult, run: &Run) -> PendingRequest {
    let mut request = PendingRequest::new(lock, run);
    request.abandoned = true;
    request.unseen = matches!(outcome, Some(Outcome::Kept { because: Because::NoAnswer | Because::NoCredentials, .. }));
    // This check got no response just now. So for 5 min, no `tf` checks again before it starts terraform.
    request.tried = request.unseen.then(Timestamp::now);
    request
}

/// Writes `pending` to disk. Returns the ID of its lock. `None` if the write failed or there is no state directory.
fn keep(pending_requests: Option<&PendingRequests>, pending: PendingRequest) -> Option<String> {
    pending_requests?.put(&pending).ok()?;
    Some(pending.lock.id)
}

/// Checks once whether the lock of a pending request has appeared. If so, releases the lock. The pending request is not
/// deleted, because the request, or the request for the lock's other part, may land again.
///
/// The caller uses [`Purpose::Work`] if a person has requested the check. For the limits, see [`release::release`].
/// Returns `None` if the lock has no location. With [`Purpose::Explanation`], also returns `None` if a write of the
/// lock's terraform may still be in flight.
pub(crate) fn check_pending(
    pending: &PendingRequest,
    candidates: &CandidateBackends,
    effort: Effort,
    waiter: &mut Waiter<'_>,
) -> Option<Outcome> {
    let _there = Within::enter(&candidates.working_directory);
    // If the lock was held, a write of its terraform may still be in flight. Only a caller with [`Purpose::Work`] waits
    // for it.
    let write_may_land = pending.lock.progress.held.is_some() && may_land(Some(&pending.since), &ClockReading::now());
    if write_may_land && effort.purpose == Purpose::Explanation {
        return None;
    }
    // One check is enough, because the terraform has been dead for a long time and the next `tf` checks again.
    let reached = Reached::default();
    let release_context = ReleaseContext {
        run: pending.run.clone(),
        request_may_land: false,
        late_writes: if write_may_land { LateWrites::Logged } else { LateWrites::None },
        is_network_shared: pending.record.as_ref().is_some_and(|record| record.host.shows_its_connections()),
        reached,
    };
    let outcome = release_where_found(&pending.lock, &candidates.of(&pending.lock), &release_context, effort, waiter);
    trace!("pending request of {}: {outcome:?}", pending.lock.id);
    if let Some(Outcome::Released(_)) = outcome {
        let had = pending.lock.progress.held.is_some();
        let why = if had {
            "its table or bucket was not available when it died"
        } else {
            "it appeared after its terraform had died"
        };
        history::record(&LockEvent::of_recorded(What::Released, By::Recovery, &pending.lock, why, None));
    }
    outcome
}

/// Returns the outcome for a lock whose place is not known. A later `tf` may know it, in another directory or after an
/// `init`.
fn no_place() -> Outcome {
    Outcome::Kept { reason: messages::release::NO_PLACE.to_owned(), because: Because::Settings }
}

/// Writes the releases among `results` into the history.
pub(crate) fn record_in_history(results: &[ReleaseResult], by: By, why: &str, reason: Option<&str>) {
    for ReleaseResult { lock, .. } in results.iter().filter(|one| matches!(one.outcome, Some(Outcome::Released(_)))) {
        history::record(&LockEvent::of_recorded(What::Released, by, lock, why, reason));
    }
}

/// Whether a request that was signed at `then` can still land. It cannot land after its signature has expired, because
/// the service then rejects it. True if `then` is `None`, that is, unknown.
pub(crate) fn may_land(then: Option<&ClockReading>, now: &ClockReading) -> bool {
    then.is_none_or(|then| then.age(now) < PENDING_WINDOW)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terraform::logged_lock::Phase;

    fn lock_that_was_asked_for() -> RecordedLock {
        let mut log = Log::default();
        let id = crate::terraform::log::tests::ID;
        let line =
            crate::terraform::log::tests::lock_line(7, "Attempting to lock remote state (DynamoDB only)...", id, "r");
        log.read(line.as_bytes());
        log.named().next().unwrap().clone()
    }
    use crate::terraform::log::LockParts;

    fn run() -> Run {
        Run::recorded("anna@host", "2026-11-23T01:46:00Z".parse().unwrap(), &Log::default())
    }

    #[test]
    fn a_request_that_may_land_is_pending_and_one_without_a_table_was_most_likely_refused() {
        for excluded in [false, true] {
            for recent in [false, true] {
                for held in [false, true] {
                    let mut lock = lock_that_was_asked_for();
                    lock.progress.held = held.then_some(lock.progress.asked);
                    let outcome = Some(Outcome::Absent { anothers: None, excluded });
                    let result = ReleaseResult { lock, outcome, may_exist: true, may_still_come: true };
                    let found = pending(&result, &run(), recent);
                    let found = found.map(|pending| (pending.abandoned, pending.unseen, pending.tried));
                    let expected = (recent || excluded).then_some((excluded && !held, excluded, None));
                    assert_eq!(found, expected, "{excluded} {recent} {held}");
                }
            }
        }
    }

    #[test]
    fn an_abandoned_request_that_nobody_could_look_for_is_not_looked_for_again_at_once() {
        let kept = |because| Some(Outcome::Kept { reason: String::new(), because });
        for (outcome, unseen) in [
            (None, false),
            (Some(Outcome::Absent { anothers: None, excluded: false }), false),
            (kept(Because::NoAnswer), true),
            (kept(Because::NoCredentials), true),
            (kept(Because::Doubt), false),
        ] {
            let result =
                ReleaseResult { lock: lock_that_was_asked_for(), outcome, may_exist: false, may_still_come: false };
            let found = abandoned(&result, &run());
            assert_eq!((found.abandoned, found.unseen, found.tried.is_some()), (true, unseen, unseen), "{result:?}");
        }
    }

    #[test]
    fn only_an_unlock_that_was_begun_and_whose_answer_is_never_logged_is_expected_to_have_worked() {
        let info = LockInfo { id: crate::terraform::log::tests::ID.into(), ..LockInfo::default() };
        let at = "2026-11-23T01:46:07Z".parse().unwrap();
        for version in ["1.5.7", "1.6.0", "1.9.8", "1.10.0"] {
            let program = Version::of_record("Terraform version", version);
            for unlocking in [false, true] {
                for died in [false, true] {
                    let mut lock = RecordedLock::held(&info, "b", "k", LockParts::default(), at);
                    lock.progress.phase = if unlocking { Phase::Unlocking } else { Phase::Open };
                    let expected = unlocking && !died && ["1.6.0", "1.9.8"].contains(&version);
                    assert_eq!(is_expected_to_be_gone(&lock, died, program.as_ref()), expected, "{version}");
                    assert!(!is_expected_to_be_gone(&lock, died, None));
                }
            }
        }
    }

    #[test]
    fn two_worked_at_once_where_the_other_locked_before_the_end_or_refused_the_unlock() {
        let at = |second: u32| format!("2026-11-23T01:46:{second:02}Z");
        let info = |created: String| LockInfo {
            id: crate::terraform::log::tests::ID.into(),
            operation: "OperationTypeApply".into(),
            who: "anna@other".into(),
            version: "1.11.4".into(),
            created,
            path: "b/k".into(),
        };
        let end: Timestamp = at(30).parse().unwrap();
        let mut own = RecordedLock::held(&info(at(1)), "b", "k", LockParts::default(), at(1).parse().unwrap());
        for (created, before) in [(at(20), true), (at(30), true), (at(40), false), ("yesterday".into(), false)] {
            for died in [false, true] {
                for unlocking in [false, true] {
                    own.progress.phase = if unlocking { Phase::Unlocking } else { Phase::Open };
                    let expected = before || (!died && unlocking);
                    assert_eq!(worked_at_once(&own, &info(created.clone()), died, end), expected, "{created} {died}");
                }
            }
        }
        own.progress.held = None;
        assert!(!worked_at_once(&own, &info(at(20)), false, end), "it was refused, and did not work");
    }

    #[test]
    fn a_request_of_a_terraform_that_failed_may_still_land_unless_another_holds_the_lock() {
        let lock = lock_that_was_asked_for();
        let absent = || Some(Outcome::Absent { anothers: None, excluded: false });
        let anothers = |is_complete| {
            let anothers = crate::lock::outcome::AnothersLock { id: "x".into(), is_complete };
            Some(Outcome::Absent { anothers: Some(anothers), excluded: false })
        };
        let kept = |because| Some(Outcome::Kept { reason: String::new(), because });
        let released = || {
            let nothing = crate::lock::outcome::Released::default();
            Some(Outcome::Released(nothing))
        };
        for (outcome, ended, expected) in [
            (absent(), Some(Ended::Exited(1)), 1),
            (released(), Some(Ended::Exited(1)), 1),
            (absent(), Some(Ended::Exited(0)), 0),
            (absent(), None, 0),
            (anothers(true), Some(Ended::Exited(1)), 0),
            // The other run has only one of two parts, so it may not have the lock.
            (anothers(false), Some(Ended::Exited(1)), 1),
            // The table does not exist, so the request failed.
            (Some(Outcome::Absent { anothers: None, excluded: true }), Some(Ended::Exited(1)), 0),
            (kept(Because::NoAnswer), Some(Ended::Exited(1)), 1),
            (kept(Because::Denied("dynamodb:GetItem")), Some(Ended::Exited(1)), 1),
            (kept(Because::NoCredentials), Some(Ended::Exited(1)), 1),
            (kept(Because::NotYet), Some(Ended::Exited(1)), 1),
            (kept(Because::StillRunning { several: true }), Some(Ended::Exited(1)), 1),
            (kept(Because::Unseen), Some(Ended::Exited(1)), 1),
            (kept(Because::NoAnswer), Some(Ended::Exited(0)), 0),
            // An object that is not a lock was there, so the request was refused.
            (kept(Because::NoLock), Some(Ended::Exited(1)), 0),
            (kept(Because::Doubt), Some(Ended::Exited(1)), 0),
            (None, Some(Ended::Exited(1)), 0),
        ] {
            let results = [ReleaseResult { lock: lock.clone(), outcome, may_exist: false, may_still_come: false }];
            assert_eq!(abandoned_requests(&results, ended).count(), expected, "{results:?} {ended:?}");
        }
        let mut had = lock.clone();
        had.progress.held = Some(lock.progress.asked);
        let results = [ReleaseResult { lock: had, outcome: absent(), may_exist: true, may_still_come: false }];
        assert_eq!(abandoned_requests(&results, Some(Ended::Exited(1))).count(), 0);
    }

    #[test]
    fn a_lock_may_still_come_only_of_a_terraform_that_died_and_has_not_had_it() {
        let released = crate::lock::outcome::Released::default();
        let absent = |excluded| Some(Outcome::Absent { anothers: None, excluded });
        let asked = lock_that_was_asked_for();
        let mut had = asked.clone();
        had.progress.held = Some(asked.progress.asked);
        for (outcome, if_asked, if_had) in [
            (absent(false), true, false),
            // The table may be restored from a backup, with the lock in it.
            (absent(true), true, true),
            (Some(Outcome::Released(released)), true, false),
            (Some(Outcome::later("later")), false, false),
            (None, false, false),
        ] {
            assert_eq!(may_still_come(true, outcome.as_ref(), &asked), if_asked, "{outcome:?}");
            assert_eq!(may_still_come(true, outcome.as_ref(), &had), if_had, "{outcome:?}");
            for lock in [&asked, &had] {
                assert!(!may_still_come(false, outcome.as_ref(), lock), "{outcome:?}: it has every response");
            }
        }
    }

    #[test]
    fn a_request_can_land_until_its_signature_has_expired() {
        let then: Timestamp = "2026-11-23T01:46:07Z".parse().unwrap();
        let after = |seconds: i64| ClockReading::of_time(then + jiff::SignedDuration::from_secs(seconds));
        for (seconds, expected) in [(-60, true), (0, true), (20 * 60 - 1, true), (20 * 60, false), (86_400, false)] {
            assert_eq!(may_land(Some(&after(0)), &after(seconds)), expected, "{seconds} s");
            assert!(may_land(None, &after(seconds)), "nobody knows when it was signed");
        }
    }
}
