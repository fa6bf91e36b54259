//! The cleanup after a run whose terraform has exited or died. `tf`, its guardian and a later `tf` all use it, so that
//! the order of the steps is defined in one place.
//!
//! [`ORDER`] is the order of the steps, and [`CleanUpStep`] gives the reasons for it. The model in tests/model.rs takes
//! the same steps in the same order.
//!
//! The three callers differ in their information about the run ([`EndedRun`]) and in how they report ([`Reporter`]).

use jiff::Timestamp;

use crate::cleanup::candidate_backends::CandidateBackends;
use crate::cleanup::messages;
use crate::cleanup::messages::release::Wording;
use crate::cleanup::other_backend::{NonS3Release, NonS3Result};
use crate::cleanup::release_all::{
    CandidateLocks, ReleaseRequest, ReleaseResult, abandoned_requests, only_name, record_in_history, release_locks,
    remember_abandoned, remember_pending, replaced,
};
use crate::cleanup::waiter::Waiter;
use crate::cleanup::working_directory::Within;
use crate::crash_point;
use crate::journal::history::By;
use crate::journal::pending_requests::PendingRequests;
use crate::journal::runs::{Journal, Replaced, Unfinished};
use crate::lock::outcome::{Because, Outcome};
use crate::lock::release::ReleaseContext;
use crate::sys::wait::Ended;
use crate::terraform::log::{Log, RecordedLock};

/// Whether the locks of a run may be released.
#[derive(Clone, Debug)]
pub(crate) enum Permission {
    /// The locks may be released.
    Release,
    /// No lock may be released. The outcome contains the reason.
    Keep(Outcome),
    /// No lock may be released, because the user has set `TFW_RELEASE=never`. The locks that still exist are only
    /// reported.
    NameOnly,
}

impl Permission {
    /// Returns why no lock may be released. `None` if locks may be released.
    fn reason(&self) -> Option<(&str, Because)> {
        match self {
            Self::Keep(Outcome::Kept { reason, because }) => Some((reason, *because)),
            Self::Release | Self::Keep(_) => None,
            Self::NameOnly => Some((messages::release::NEVER, Because::Never)),
        }
    }
}

/// Whether the run's log shows which locks the run had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LogState {
    /// The log names every lock that the run had, or terraform exited by itself. A recovery uses this state for every
    /// log that is not empty, because the recovery cannot tell whether the log is complete.
    Complete,
    /// Terraform died, and its log may not show all locks: the log ends within a line, lacks its beginning, or is from
    /// a version that logs no locks.
    Lost,
    /// Terraform wrote no log at all.
    NeverBegun,
}

/// A run whose terraform has exited: everything that the cleanup needs.
pub(crate) struct EndedRun<'a> {
    /// Which process cleans up.
    pub(crate) by: By,
    /// How the run ended, as the beginning of a message.
    pub(crate) ending: &'a str,
    /// The two reasons for a release that are written into the history. The first is the reason that `tf` determined.
    /// The second is the reason that a person gave, or `None` if no person gave one.
    pub(crate) history: (&'a str, Option<&'a str>),
    pub(crate) id: &'a str,
    pub(crate) log: &'a Log,
    pub(crate) log_state: LogState,
    /// The backends and workspaces in which the run may have taken locks.
    pub(crate) candidates: &'a CandidateBackends,
    /// Whether terraform died, or abandoned its operation. If so, a lock whose request got no response may belong to
    /// the run.
    pub(crate) died: bool,
    /// How terraform ended. `None` if that is unknown.
    pub(crate) ended: Option<Ended>,
    /// A time up to which the run, or a process that it started, was working or may have been working.
    pub(crate) until: Timestamp,
    /// Replaced locks that an earlier cleanup of this run has found.
    pub(crate) replaced: &'a [Replaced],
    pub(crate) release_context: ReleaseContext,
    pub(crate) permission: Permission,
    /// The reason that is reported if none of the locks is in a known backend. `None` if all of the run's backends are
    /// known.
    pub(crate) unknown_backends: Option<String>,
    pub(crate) journal: Option<&'a Journal>,
    pub(crate) pending_requests: Option<&'a PendingRequests>,
    pub(crate) non_s3: Option<NonS3Cleanup<'a>>,
}

/// The lock that a run may have left in a backend other than S3.
pub(crate) struct NonS3Cleanup<'a> {
    /// How the lock is released, or why that is not possible.
    pub(crate) release: Result<NonS3Release<'a>, String>,
    /// Whether the run's command logs that it got a lock.
    pub(crate) is_logged: bool,
    /// The command that a person types to remove the lock.
    pub(crate) unlock: String,
}

/// The results of the steps of a cleanup, from which [`Cleaned::unfinished`] determines the work for the next `tf`.
#[derive(Default)]
pub(crate) struct Cleaned {
    locks: CandidateLocks,
    results: Vec<ReleaseResult>,
    /// The IDs of the locks whose requests were written to disk, because they may still land.
    remembered: Vec<String>,
    replaced: Vec<Replaced>,
    non_s3: NonS3Result,
    /// Whether the next `tf` must look for a lock, because the run's log is lost and no lock was found.
    lost_log_is_left: bool,
}

/// What is left after a cleanup.
#[derive(Debug, Default)]
pub(crate) struct CleanUpResult {
    /// The work for the next `tf`.
    pub(crate) unfinished: Unfinished,
    /// The IDs of the locks that were kept on purpose ([`Because::is_on_purpose`]).
    pub(crate) kept_on_purpose: Vec<String>,
}

/// Receives the results of a cleanup. `tf` writes them to stderr. A recovery collects them. A guardian discards them,
/// because nobody reads its messages.
pub(crate) trait Reporter {
    /// Reports the result for one lock. `is_remembered` is true if the request for the lock may still land and was
    /// written to disk. If so, the next `tf` looks for the lock.
    fn result(&mut self, run: &EndedRun<'_>, result: &ReleaseResult, is_remembered: bool);

    /// Reports a lock whose request may still land, although terraform has exited by itself and did not get the lock.
    /// `result` was reported before. For `is_remembered`, see [`Reporter::result`].
    fn abandoned(&mut self, run: &EndedRun<'_>, result: &ReleaseResult, is_remembered: bool);

    /// Reports that another run locked the same state while this run was working.
    fn replaced(&mut self, run: &EndedRun<'_>, replaced: &Replaced);

    /// Explains why a lock request of terraform was refused: which lock was held, and by which run. `results` are the
    /// results for the locks that the log names. They have been reported before.
    fn refusals(&mut self, run: &EndedRun<'_>, results: &[ReleaseResult], waiter: &mut Waiter<'_>);

    /// Reports the locks that could not be identified.
    fn unidentified(&mut self, run: &EndedRun<'_>, locks: &CandidateLocks);

    /// Reports that the log does not show whether the run held a lock. Returns true if the next `tf` must look for a
    /// lock.
    fn lost_log(&mut self, run: &EndedRun<'_>, waiter: &mut Waiter<'_>) -> bool;

    /// Reports the result for the lock in a backend other than S3.
    fn non_s3(&mut self, run: &EndedRun<'_>, result: &NonS3Result);

    /// Returns the command that a person types to remove the lock of `workspace` in a backend other than S3.
    fn unlock_command(&self, candidates: &CandidateBackends, workspace: &str) -> String;

    /// Whether the run has a complete journal, so that `tf locks recover` may release a lock that was not released.
    fn has_journal(&self) -> bool;

    /// Whether a person reads the reports. If not, everything that a person should read is left for the next `tf`,
    /// which reports it.
    fn is_read(&self) -> bool;
}

/// The reporter of a guardian. It discards everything, because nobody reads the guardian's messages.
pub(crate) struct SilentReporter;

impl Reporter for SilentReporter {
    fn result(&mut self, _: &EndedRun<'_>, _: &ReleaseResult, _: bool) {}

    fn abandoned(&mut self, _: &EndedRun<'_>, _: &ReleaseResult, _: bool) {}

    fn replaced(&mut self, _: &EndedRun<'_>, _: &Replaced) {}

    fn refusals(&mut self, _: &EndedRun<'_>, _: &[ReleaseResult], _: &mut Waiter<'_>) {}

    fn unidentified(&mut self, _: &EndedRun<'_>, _: &CandidateLocks) {}

    /// Returns true if the run has no log at all: a recovery looks for the lock of such a run. Returns false if the log
    /// is incomplete: a recovery would learn no more from it than the guardian has learned.
    fn lost_log(&mut self, run: &EndedRun<'_>, _: &mut Waiter<'_>) -> bool {
        run.log_state == LogState::NeverBegun
    }

    fn non_s3(&mut self, _: &EndedRun<'_>, _: &NonS3Result) {}

    fn unlock_command(&self, _: &CandidateBackends, _: &str) -> String {
        String::new()
    }

    fn has_journal(&self) -> bool {
        true
    }

    fn is_read(&self) -> bool {
        false
    }
}

/// A step of a cleanup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum CleanUpStep {
    /// Finds the locks that the run may have ([`CandidateLocks::find`]). If the log does not name a lock, the lock is
    /// identified by reading its location.
    Find,
    /// Releases each lock, or determines why it cannot be released ([`release_locks`]).
    Release,
    /// Writes the requests that may still land to disk. This is done before they are reported: the report says "the
    /// next `tf` releases it", and that must be true when a person reads it.
    Remember,
    /// Reports the result for each lock. This is done now, because the next steps may take time.
    Report,
    /// Writes the history. It contains only completed actions.
    WriteHistory,
    /// Reports replaced locks (another run locked the same state while this run was working), refusals, and locks that
    /// could not be identified. These reports are explanations. They may need further requests to the service.
    Explain,
    /// Releases the lock in a backend other than S3.
    ReleaseNonS3,
}

/// The order of the steps. After them, the work that is left for the next `tf` is returned, and the caller closes the
/// run's record. So if the process is killed during a step, the record still exists, and the next `tf` repeats all
/// steps.
pub(crate) const ORDER: [CleanUpStep; 7] = [
    CleanUpStep::Find,
    CleanUpStep::Release,
    CleanUpStep::Remember,
    CleanUpStep::Report,
    CleanUpStep::WriteHistory,
    CleanUpStep::Explain,
    CleanUpStep::ReleaseNonS3,
];

/// Releases the locks that `run` has left. Returns what is left.
pub(crate) fn clean_up(run: &EndedRun<'_>, reporter: &mut dyn Reporter, waiter: &mut Waiter<'_>) -> CleanUpResult {
    let _there = Within::enter(&run.candidates.working_directory);
    let mut cleaned = Cleaned::default();
    for step in ORDER {
        cleaned.take(step, run, reporter, waiter);
    }
    let kept_on_purpose = cleaned.kept_on_purpose();
    CleanUpResult { unfinished: cleaned.unfinished(run.log, reporter.is_read()), kept_on_purpose }
}

/// Releases the locks `named` if [`EndedRun::permission`] allows it. Returns the result for each lock, even if no lock
/// may be released.
fn results(run: &EndedRun<'_>, named: &[RecordedLock], waiter: &mut Waiter<'_>) -> Vec<ReleaseResult> {
    let fits_nowhere = !named.is_empty() && named.iter().all(|lock| run.candidates.of(lock).is_empty());
    let unknown = run.unknown_backends.as_ref().filter(|_| fits_nowhere).map(Outcome::later);
    let keep = match &run.permission {
        Permission::NameOnly if unknown.is_none() => {
            return only_name(named, run.candidates, &run.release_context, waiter);
        }
        Permission::Keep(outcome) => Some(outcome.clone()),
        Permission::Release | Permission::NameOnly => unknown,
    };
    let is_claimed = |id: &str| run.journal.map_or(Some(false), |journal| journal.is_claimed(id, run.id));
    let request = ReleaseRequest {
        locks: named,
        candidates: run.candidates,
        release_context: &run.release_context,
        died: run.died,
        keep,
    };
    release_locks(&request, is_claimed, waiter)
}

impl NonS3Cleanup<'_> {
    /// Releases the lock. For `has_journal`, see [`Reporter::has_journal`].
    fn clean_up(&self, run: &EndedRun<'_>, has_journal: bool, waiter: &mut Waiter<'_>) -> NonS3Result {
        match &self.release {
            Ok(release) => release.settle(
                &run.release_context,
                self.is_logged,
                run.permission.reason(),
                Wording { ending: run.ending, unlock: &self.unlock, by: run.by, has_journal },
                waiter,
            ),
            Err(reason) => NonS3Result { messages: vec![reason.clone()], later: true, released: false },
        }
    }
}

impl Cleaned {
    /// Returns a cleanup with these results, and nothing else.
    #[cfg(test)]
    pub(crate) fn of_locks(results: Vec<ReleaseResult>) -> Self {
        Self { results, ..Self::default() }
    }

    /// Takes one step, and adds its results.
    fn take(&mut self, step: CleanUpStep, run: &EndedRun<'_>, reporter: &mut dyn Reporter, waiter: &mut Waiter<'_>) {
        let context = &run.release_context;
        match step {
            CleanUpStep::Find => {
                self.locks = CandidateLocks::find(run.log, run.candidates, context, run.died, waiter);
            }
            CleanUpStep::Release => {
                self.results = results(run, &self.locks.named, waiter);
                match run.by {
                    By::Tf => crash_point::reached("tf: released"),
                    By::Guardian => crash_point::reached("guardian: released"),
                    By::Recovery => crash_point::reached("recovery: released"),
                    By::Command => {}
                }
            }
            CleanUpStep::Remember => {
                let pending = run.pending_requests;
                self.remembered = remember_pending(&self.results, context, pending);
                let abandoned = abandoned_requests(&self.results, run.ended);
                self.remembered.extend(remember_abandoned(abandoned, context, pending));
            }
            CleanUpStep::Report => {
                for result in &self.results {
                    reporter.result(run, result, self.is_remembered(result));
                }
                // If a lock could not be looked for, or another run's lock was found, `tf` has nothing to add to
                // terraform's own report.
                let is_reported = |result: &ReleaseResult| {
                    matches!(result.outcome, Some(Outcome::Kept { .. } | Outcome::Absent { anothers: Some(_), .. }))
                };
                for result in abandoned_requests(&self.results, run.ended).filter(|result| !is_reported(result)) {
                    reporter.abandoned(run, result, self.is_remembered(result));
                }
            }
            CleanUpStep::WriteHistory => {
                let (why, reason) = run.history;
                record_in_history(&self.results, run.by, why, reason);
            }
            CleanUpStep::Explain => {
                self.replaced = replaced(&self.results, run.candidates, run.died, run.until, run.by, waiter);
                self.replaced.extend(run.replaced.iter().cloned());
                for one in &self.replaced {
                    reporter.replaced(run, one);
                }
                reporter.refusals(run, &self.results, waiter);
                reporter.unidentified(run, &self.locks);
                self.lost_log_is_left =
                    run.log_state != LogState::Complete && self.locks.is_empty() && reporter.lost_log(run, waiter);
            }
            CleanUpStep::ReleaseNonS3 => {
                let has_journal = reporter.has_journal();
                self.non_s3 =
                    run.non_s3.as_ref().map(|non_s3| non_s3.clean_up(run, has_journal, waiter)).unwrap_or_default();
                reporter.non_s3(run, &self.non_s3);
            }
        }
    }

    fn is_remembered(&self, result: &ReleaseResult) -> bool {
        self.remembered.contains(&result.lock.id)
    }

    /// Returns the IDs of the locks that were kept on purpose, and of those that may be locks of the run.
    fn kept_on_purpose(&self) -> Vec<String> {
        let is_kept = |result: &&ReleaseResult| result.outcome.as_ref().is_some_and(Outcome::is_kept_on_purpose);
        let kept = self.results.iter().filter(is_kept).map(|result| result.lock.id.clone());
        kept.chain(self.locks.suspects.iter().map(|(info, _)| info.id.clone())).collect()
    }

    /// Returns the work that is left for the next `tf`. `log` is the log of the run.
    ///
    /// If a person has read the report (`is_read` is true), the result contains only what a later attempt may complete.
    /// It does not contain a lock in doubt, because the person decides whether to release such a lock. If nobody has
    /// read the report, the result also contains everything that a person should read. The next `tf` judges it again
    /// and reports it.
    pub(crate) fn unfinished(self, log: &Log, is_read: bool) -> Unfinished {
        let Self { locks, results, replaced, non_s3, lost_log_is_left, .. } = self;
        let is_left = |result: &ReleaseResult| {
            let kept = |because: &Because| {
                !is_read || !matches!(because, Because::Doubt | Because::Settings | Because::Claimed)
            };
            result.may_exist && matches!(&result.outcome, Some(Outcome::Kept { because, .. }) if kept(because))
        };
        let in_doubt = !locks.suspects.is_empty() && !is_read;
        let mut unfinished = Unfinished {
            locks: results.into_iter().filter(is_left).map(|result| result.lock).collect(),
            unnamed: if in_doubt {
                log.unreleased_unnamed().cloned().collect()
            } else {
                locks.unread.into_iter().map(|(lock, _)| lock).chain(locks.awaited).collect()
            },
            elsewhere: false,
            unlogged: lost_log_is_left,
            replaced: if is_read { Vec::new() } else { replaced },
        };
        if non_s3.later || (!is_read && non_s3.leaves_one()) {
            unfinished.add_elsewhere(log.of_workspaces().last().cloned());
        }
        unfinished
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock::outcome::Released;
    use crate::terraform::log::tests::{ID, lock_line};
    use crate::terraform::log::{LockIdentity, LoggedLock, UnnamedLock};
    use crate::terraform::logged_lock::Progress;

    fn unnamed(workspace: &str) -> UnnamedLock {
        let identity = LockIdentity::Workspace(workspace.to_owned());
        UnnamedLock { identity, progress: Progress::asked(Timestamp::UNIX_EPOCH) }
    }

    /// Returns a log with two locks: one with its ID, and one without.
    fn log() -> Log {
        let mut log = Log::default();
        log.read(lock_line(7, "Attempting to lock remote state (DynamoDB only)...", ID, "r").as_bytes());
        let named: Vec<LoggedLock> = log.locks().to_vec();
        log.set_locks(named.into_iter().chain([LoggedLock::Unnamed(unnamed("w"))]));
        log
    }

    fn cleaned(log: &Log, outcome: Option<Outcome>, may_exist: bool) -> Cleaned {
        let result =
            ReleaseResult { lock: log.named().next().unwrap().clone(), outcome, may_exist, may_still_come: false };
        Cleaned::of_locks(vec![result])
    }

    /// If nobody has read the report about a lock, the lock is left for the next `tf`. If a person has read the report,
    /// the lock is left only if another attempt may release it.
    #[test]
    fn a_lock_is_left_for_the_next_tf_where_that_can_do_better_or_nobody_has_heard_of_it() {
        let log = log();
        let released = Released::default();
        let kept = |because| Some(Outcome::Kept { reason: String::new(), because });
        let outcomes = [
            (None, false, false),
            (Some(Outcome::Released(released)), false, false),
            (Some(Outcome::Absent { anothers: None, excluded: false }), false, false),
            (kept(Because::Doubt), false, true),
            (kept(Because::Settings), false, true),
            (kept(Because::Claimed), false, true),
            (kept(Because::NotYet), true, true),
            (kept(Because::StillRunning { several: true }), true, true),
            (kept(Because::Unseen), true, true),
            (kept(Because::NoAnswer), true, true),
            (kept(Because::NoCredentials), true, true),
            (kept(Because::Denied("dynamodb:DeleteItem")), true, true),
            (kept(Because::OtherAccount), true, true),
            (kept(Because::NoLock), true, true),
            (kept(Because::Never), true, true),
        ];
        for (outcome, where_read, where_not) in outcomes {
            for may_exist in [false, true] {
                for (is_read, expected) in [(true, where_read), (false, where_not)] {
                    let unfinished = cleaned(&log, outcome.clone(), may_exist).unfinished(&log, is_read);
                    assert_eq!(!unfinished.is_empty(), expected && may_exist, "{outcome:?} {may_exist} {is_read}");
                    assert_eq!(unfinished.locks.len(), usize::from(expected && may_exist));
                }
            }
        }
    }

    /// The lease of a lock that was released or is gone needs no further request. The lease of a lock that could not be
    /// released may lapse, because its run is dead.
    #[test]
    fn only_a_lock_that_stays_on_purpose_is_kept_on_purpose() {
        let log = log();
        let kept = |because| Some(Outcome::Kept { reason: String::new(), because });
        for (outcome, expected) in [
            (None, false),
            (Some(Outcome::Released(Released::default())), false),
            (Some(Outcome::Absent { anothers: None, excluded: false }), false),
            (Some(Outcome::Absent { anothers: None, excluded: true }), false),
            (kept(Because::Doubt), true),
            (kept(Because::Settings), false),
            (kept(Because::Never), true),
            (kept(Because::StillRunning { several: false }), true),
            (kept(Because::Unseen), true),
            (kept(Because::NoLock), true),
            (kept(Because::Claimed), true),
            (kept(Because::NotYet), false),
            (kept(Because::NoAnswer), false),
            (kept(Because::NoCredentials), false),
            (kept(Because::Denied("dynamodb:DeleteItem")), false),
            (kept(Because::OtherAccount), false),
        ] {
            let ids = cleaned(&log, outcome.clone(), true).kept_on_purpose();
            assert_eq!(ids, if expected { vec![ID.to_owned()] } else { Vec::new() }, "{outcome:?}");
        }
    }

    #[test]
    fn a_doubt_about_an_unnamed_lock_is_left_for_a_reader_and_what_was_not_looked_for_for_anybody() {
        let log = log();
        let info = || crate::terraform::lock_info::LockInfo { id: ID.into(), ..Default::default() };
        for is_read in [false, true] {
            for (suspects, unread, awaited) in (0..8).map(|bits| (bits & 1, bits >> 1 & 1, bits >> 2 & 1)) {
                let mut cleaned = cleaned(&log, None, true);
                cleaned.locks.suspects.extend((0..suspects).map(|_| (info(), "doubt")));
                cleaned.locks.unread.extend((0..unread).map(|_| (unnamed("unread"), String::new())));
                cleaned.locks.awaited.extend((0..awaited).map(|_| unnamed("awaited")));
                let left = cleaned.unfinished(&log, is_read).unnamed;
                let expected = if suspects > 0 && !is_read { 1 } else { unread + awaited };
                assert_eq!(left.len(), expected, "{suspects} {unread} {awaited} {is_read}");
                assert!(suspects == 0 || is_read || left == [unnamed("w")]);
            }
        }
    }

    #[test]
    fn what_else_is_left_depends_on_who_has_heard_of_it() {
        let log = log();
        for is_read in [false, true] {
            for bits in 0..16_u8 {
                let bit = |location: u8| bits & (1 << location) != 0;
                let mut cleaned = cleaned(&log, None, true);
                let by = crate::terraform::lock_info::LockInfo::default();
                cleaned.replaced.extend(bit(0).then(|| Replaced { own: log.named().next().unwrap().clone(), by }));
                cleaned.lost_log_is_left = bit(1);
                cleaned.non_s3.later = bit(2);
                cleaned.non_s3.messages.extend(bit(3).then(|| "it is still held".to_owned()));
                let left = cleaned.unfinished(&log, is_read);
                assert_eq!(!left.replaced.is_empty(), bit(0) && !is_read);
                assert_eq!(left.unlogged, bit(1));
                assert_eq!(left.elsewhere, bit(2) || (bit(3) && !is_read));
                assert_eq!(left.unnamed.len(), usize::from(left.elsewhere));
            }
        }
    }

    #[test]
    fn only_a_release_needs_no_reason() {
        let kept = Outcome::Kept { reason: "a process is alive".to_owned(), because: Because::Unseen };
        assert_eq!(Permission::Release.reason(), None);
        assert_eq!(Permission::Keep(kept).reason(), Some(("a process is alive", Because::Unseen)));
        assert_eq!(Permission::NameOnly.reason(), Some((messages::release::NEVER, Because::Never)));
    }
}
