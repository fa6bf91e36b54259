//! The report of a recovery about one dead run.

use jiff::Timestamp;

use super::dead_run::{likely_workspace, workspace_of_lock};
use crate::cleanup::candidate_backends::CandidateBackends;
use crate::cleanup::clean_up::{EndedRun, Reporter};
use crate::cleanup::forked_recovery::Left;
use crate::cleanup::messages;
use crate::cleanup::other_backend::NonS3Result;
use crate::cleanup::release_all::{CandidateLocks, ReleaseResult};
use crate::cleanup::waiter::Waiter;
use crate::journal::runs::{JournalRecord, Replaced};
use crate::lock::outcome::{Because, Outcome};
use crate::lock::release::unnamed_lock;
use crate::terraform::data_directory::CommandDirectories;

/// Who reads the messages of a recovery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Audience {
    /// A person reads the messages.
    Person,
    /// Nobody: the recovery works in the background. Results that a person must read stay in the journal, until a
    /// recovery reports them to a person.
    Nobody,
}

/// Collects the messages about a dead run. The process that forked this one prints them.
pub(super) struct RecoveryReporter<'a> {
    pub(super) record: &'a JournalRecord,
    pub(super) audience: Audience,
    pub(super) now: Timestamp,
    pub(super) messages: Vec<String>,
    pub(super) left: Left,
    /// The ID of the lock that a run without a log may have left. `None` if there is none.
    pub(super) suspect: Option<String>,
}

impl Reporter for RecoveryReporter<'_> {
    fn result(&mut self, run: &EndedRun<'_>, result: &ReleaseResult, is_remembered: bool) {
        let (record, lock) = (self.record, &result.lock);
        match &result.outcome {
            Some(Outcome::Released(released)) => {
                self.messages.push(messages::recovery::recovered(record, lock, released.claim.as_ref(), self.now));
                if released.is_partial && is_remembered {
                    self.messages.push(messages::late::other_part_may_land(lock, true, ""));
                }
                if let Some(mismatch) = &released.digest_mismatch {
                    let workspace = run.candidates.workspace_of_lock(lock);
                    let message =
                        |there: CommandDirectories<'_>| messages::release::digest_mismatch(mismatch, workspace, there);
                    self.messages.push(messages::next_step::in_directories_of(record, None, message));
                }
            }
            Some(Outcome::Kept { reason, because }) => {
                self.messages.push(if *because == Because::OtherAccount {
                    messages::release::not_seen(run.ending, lock, run.release_context.reached.needs())
                } else {
                    let workspace = workspace_of_lock(record, run.candidates, lock);
                    messages::recovery::not_recovered(record, lock, workspace, (reason, *because))
                });
                self.left = self.left.max(left_because(*because));
            }
            Some(Outcome::Absent { .. }) | None => {}
        }
    }

    /// Reports nothing, because it is unknown whether the terraform of a dead run exited by itself.
    fn abandoned(&mut self, _: &EndedRun<'_>, _: &ReleaseResult, _: bool) {}

    fn replaced(&mut self, run: &EndedRun<'_>, replaced: &Replaced) {
        let workspace = workspace_of_lock(self.record, run.candidates, &replaced.own);
        self.messages.push(messages::recovery::replaced_earlier(self.record, &replaced.own, &replaced.by, workspace));
    }

    /// Reports nothing, because the terraform of the dead run has reported the refusal itself.
    fn refusals(&mut self, _: &EndedRun<'_>, _: &[ReleaseResult], _: &mut Waiter<'_>) {}

    fn unidentified(&mut self, run: &EndedRun<'_>, locks: &CandidateLocks) {
        for (info, reason) in &locks.suspects {
            let workspace = run.candidates.workspace_of_path(&info.path).or_else(|| likely_workspace(self.record));
            self.messages.push(messages::recovery::may_be_its(self.record, info, workspace, reason));
            self.left = self.left.max(Left::Lock);
        }
        for (_, reason) in &locks.unread {
            self.messages.push(messages::recovery::not_looked_for_again(self.record, reason));
        }
    }

    /// Reports a lock that the run may have left at the location that the run would lock, or reports that this location
    /// could not be read. Returns true if the next `tf` must look again, because the location could not be read or
    /// nobody reads the report. Returns false if there is no such lock, or if the search could not be made at all.
    fn lost_log(&mut self, run: &EndedRun<'_>, waiter: &mut Waiter<'_>) -> bool {
        let Some(location) = run.candidates.selected() else { return false };
        let (message, is_unread) =
            match waiter.block_on(unnamed_lock::suspect(&location, &run.release_context.run, true)) {
                Ok(Ok(Some(info))) => {
                    let message =
                        |there: CommandDirectories<'_>| messages::release::unlogged(run.ending, Some(&info), there);
                    let message =
                        messages::next_step::in_directories_of(self.record, likely_workspace(self.record), message);
                    self.suspect = Some(info.id);
                    (message, false)
                }
                Ok(Err(failure)) => {
                    let list = messages::next_step::locks_command_of(self.record, "", likely_workspace(self.record));
                    (messages::release::suspect_not_looked_for(run.ending, &failure.to_string(), &list), true)
                }
                Ok(Ok(None)) | Err(_) => return false,
            };
        self.messages.push(message);
        self.left = self.left.max(Left::Lock);
        is_unread || !self.is_read()
    }

    fn non_s3(&mut self, _: &EndedRun<'_>, result: &NonS3Result) {
        if result.leaves_one() {
            self.left = self.left.max(Left::Lock);
        }
        self.messages.extend(result.messages.iter().cloned());
    }

    fn unlock_command(&self, _: &CandidateBackends, workspace: &str) -> String {
        messages::next_step::unlock_command_of(self.record, Some(workspace))
    }

    fn has_journal(&self) -> bool {
        true
    }

    fn is_read(&self) -> bool {
        self.audience == Audience::Person
    }
}

/// Returns what a recovery has left if it did not release a lock because of `because`.
pub(super) fn left_because(because: Because) -> Left {
    if because == Because::NoCredentials { Left::ForLackOfCredentials } else { Left::Lock }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cleanup::recovery::dead_run::tests::reasons;

    #[test]
    fn a_lack_of_credentials_outweighs_every_other_lock_that_is_left() {
        for because in reasons() {
            let is_for_credentials = because == Because::NoCredentials;
            let expected = if is_for_credentials { Left::ForLackOfCredentials } else { Left::Lock };
            assert_eq!(left_because(because), expected, "{because:?}");
            // The results of several locks are combined with `max`.
            assert!(Left::Nothing < left_because(because) && left_because(because) <= Left::ForLackOfCredentials);
        }
    }
}
