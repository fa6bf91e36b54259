//! Checks the pending requests of dead runs: has a lock appeared since?

use std::time::Instant;

use jiff::Timestamp;
use nix::sys::signal::Signal;

use super::dead_run::{candidates_of, enter, workspace_of_lock};
use crate::cleanup::candidate_backends::CandidateBackends;
use crate::cleanup::forked_recovery::{Finished, Left, RecoveryProcess, in_a_process};
use crate::cleanup::messages;
use crate::cleanup::release_all::check_pending;
use crate::cleanup::waiter::Waiter;
use crate::console;
use crate::journal::kept_locks::KeptLocks;
use crate::journal::pending_requests::{PendingRequest, PendingRequests};
use crate::journal::runs::JournalRecord;
use crate::journal::state_directory::StateDirectory;
use crate::lock::outcome::{Because, Outcome};
use crate::lock::release::{EXPLANATION_TIMEOUT, Effort};
use crate::sys::signals::Signals;

/// Checks for each of these pending requests whether its lock exists now. If so, releases the lock. `late` are the
/// requests for a lock at a location of `here`. Stores the first signal that asks `tf` to stop in `asked`.
pub(super) fn check_pending_requests(
    late: &[(&StateDirectory, PendingRequest)],
    others_late: &[(&StateDirectory, PendingRequest)],
    here: &CandidateBackends,
    signals: &mut Signals,
    asked: &mut Option<Signal>,
) {
    // One time limit for all pending requests together, because terraform's start waits for these checks.
    let until = Instant::now() + EXPLANATION_TIMEOUT;
    let remaining = || Effort { limit: until.saturating_duration_since(Instant::now()), ..Effort::EXPLANATION };
    if !late.is_empty() {
        let check_all = || {
            let has_arrived = |(state, pending): &&(&StateDirectory, PendingRequest)| {
                let visited = check_pending(pending, here, remaining(), &mut Waiter::Unattended);
                note_check(state, pending, visited.as_ref());
                matches!(visited, Some(Outcome::Released(_)))
            };
            let come = late.iter().filter(has_arrived);
            Finished {
                messages: come.map(|(_, pending)| messages::late::came_late(&pending.lock)).collect(),
                left: Left::Nothing,
            }
        };
        let announced = late.iter().any(|(_, pending)| !pending.abandoned);
        in_a_process(RecoveryProcess { keep: Vec::new(), announced }, check_all, console::say, signals, asked);
    }
    for (state, pending) in others_late {
        let announced = !pending.abandoned;
        let look = || check_elsewhere(state, pending, remaining());
        in_a_process(RecoveryProcess { keep: Vec::new(), announced }, look, console::say, signals, asked);
    }
}

/// Checks whether the lock of a pending request exists now. If so, releases the lock. This changes the environment to
/// that of the run that sent the request, so call it only in a forked process.
pub(super) fn check_elsewhere(state: &StateDirectory, pending: &PendingRequest, effort: Effort) -> Finished {
    let Some(record) = &pending.record else { return Finished::default() };
    enter(record);
    let (candidates, _) = candidates_of(record);
    let visited = check_pending(pending, &candidates, effort, &mut Waiter::Unattended);
    note_check(state, pending, visited.as_ref());
    report_of_check(pending, record, workspace_of_lock(record, &candidates, &pending.lock), visited)
}

/// How a pending request is related to the run that is about to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Relation {
    /// The new run uses the location of the lock.
    SameLocation,
    /// The request is from a run with the same data directory, but the new run does not use the location of the lock,
    /// for example because the lock belongs to another workspace.
    SameDirectory,
    None,
}

/// Returns how `pending` is related to a run with the candidate backends `here`.
pub(super) fn relation(pending: &PendingRequest, here: &CandidateBackends) -> Relation {
    if !here.of(&pending.lock).is_empty() {
        Relation::SameLocation
    } else if pending.record.as_ref().is_some_and(|record| record.data_directory == here.data_directory) {
        Relation::SameDirectory
    } else {
        Relation::None
    }
}

/// Returns the report about a check for the lock of `pending`, a request of the run of `record`. `visited` is the
/// result of the check, or `None` if no check was made. `workspace` is that of the lock, or `None` if it is unknown.
fn report_of_check(
    pending: &PendingRequest,
    record: &JournalRecord,
    workspace: Option<&str>,
    visited: Option<Outcome>,
) -> Finished {
    match visited {
        Some(Outcome::Released(_)) => {
            Finished { messages: vec![messages::late::came_late(&pending.lock)], left: Left::Nothing }
        }
        Some(Outcome::Kept { .. }) if pending.abandoned => Finished::default(),
        Some(Outcome::Kept { reason, because }) => Finished {
            messages: vec![messages::recovery::not_recovered(record, &pending.lock, workspace, (&reason, because))],
            left: Left::Lock,
        },
        Some(Outcome::Absent { .. }) | None => Finished::default(),
    }
}

/// Records the result of a check for the lock of a pending request. Once the service has answered, the request is
/// stored only for as long as it may land. If `visited` is `None`, no check was made, and nothing is recorded.
pub(super) fn note_check(state: &StateDirectory, pending: &PendingRequest, visited: Option<&Outcome>) {
    let Some(outcome) = visited else { return };
    let kept_locks = KeptLocks::of(state);
    if outcome.is_kept_on_purpose() {
        kept_locks.add(&pending.lock.id);
    } else {
        kept_locks.remove(&pending.lock.id);
    }
    let pending_requests = PendingRequests::of(state);
    if is_answered(outcome) {
        pending_requests.was_seen(pending);
    } else {
        pending_requests.was_tried(pending, Timestamp::now());
    }
}

/// Whether a check with the result `outcome` shows what is at the lock's location.
fn is_answered(outcome: &Outcome) -> bool {
    match outcome {
        Outcome::Kept { because, .. } => !matches!(because, Because::NoAnswer | Because::NoCredentials),
        // If the table or bucket does not exist, it may be restored later with the lock in it.
        Outcome::Absent { excluded, .. } => !excluded,
        Outcome::Released(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cleanup::recovery::dead_run::tests::{candidates, kept, reasons, record, requested};
    use crate::lock::outcome::Released;
    use crate::terraform::log::tests::ID;

    fn pending(record: Option<JournalRecord>, abandoned: bool) -> PendingRequest {
        let of = super::tests::record(&requested(ID));
        let lock = of.log.named().next().unwrap().clone();
        let new = PendingRequest::new(&lock, &of.proof());
        PendingRequest { record: record.map(Box::new), abandoned, ..new }
    }

    #[test]
    fn a_pending_request_of_the_same_location_or_directory_is_checked_before_terraform() {
        const KEY: &str = "dir/prod.tfstate";
        for (has_record, directory, key, expected) in [
            (true, "/x/.terraform", KEY, Relation::SameLocation),
            (true, "/y/.terraform", KEY, Relation::SameLocation),
            (false, "/y/.terraform", KEY, Relation::SameLocation),
            (true, "/x/.terraform", "other", Relation::SameDirectory),
            // Without a record it is not known how to reach the lock.
            (false, "/x/.terraform", "other", Relation::None),
            (true, "/y/.terraform", "other", Relation::None),
        ] {
            let pending = pending(has_record.then(|| record("")), false);
            let found = relation(&pending, &candidates(directory, key));
            assert_eq!(found, expected, "{has_record} {directory} {key}");
        }
    }

    #[test]
    fn a_check_is_repeated_as_long_as_the_service_has_not_said_what_is_there() {
        for because in reasons() {
            let is_unanswered = matches!(because, Because::NoAnswer | Because::NoCredentials);
            assert_eq!(is_answered(&kept(because)), !is_unanswered, "{because:?}");
        }
        assert!(is_answered(&Outcome::Released(Released::default())));
        assert!(is_answered(&Outcome::Absent { anothers: None, excluded: false }));
        assert!(!is_answered(&Outcome::Absent { anothers: None, excluded: true }), "the table may be restored");
    }

    #[test]
    fn a_request_that_was_most_likely_refused_is_reported_only_if_its_lock_was_released() {
        let record = record("");
        for abandoned in [false, true] {
            let pending = pending(None, abandoned);
            let report = |visited| {
                let finished = report_of_check(&pending, &record, None, visited);
                (finished.messages.len(), finished.left)
            };
            assert_eq!(report(Some(Outcome::Released(Released::default()))), (1, Left::Nothing));
            assert_eq!(report(Some(Outcome::Absent { anothers: None, excluded: false })), (0, Left::Nothing));
            assert_eq!(report(None), (0, Left::Nothing));
            for because in reasons() {
                let expected = if abandoned { (0, Left::Nothing) } else { (1, Left::Lock) };
                assert_eq!(report(Some(kept(because))), expected, "{abandoned} {because:?}");
            }
        }
    }
}
