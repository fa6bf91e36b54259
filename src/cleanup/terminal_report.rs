//! The messages that `tf` prints on stderr after terraform has exited.

use std::borrow::Cow;
use std::ops::Deref;
use std::path::Path;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::cleanup::after_run::{AfterRun, Ending};
use crate::cleanup::candidate_backends::CandidateBackends;
use crate::cleanup::clean_up::{EndedRun, LogState, Reporter};
use crate::cleanup::messages::next_step::Removal;
use crate::cleanup::messages::refused::Refusal;
use crate::cleanup::other_backend::NonS3Result;
use crate::cleanup::release_all::{CandidateLocks, ReleaseResult, check_pending};
use crate::cleanup::waiter::Waiter;
use crate::cleanup::working_directory::Within;
use crate::cleanup::{messages, recovery_process};
use crate::console;
use crate::holder::evidence::Verdict;
use crate::holder::host::HostView;
use crate::journal::clock_reading::ClockReading;
use crate::journal::runs::Replaced;
use crate::lock::leased::{StoredPart, locks_of};
use crate::lock::location::LockLocation;
use crate::lock::outcome::{Because, Outcome};
use crate::lock::release::{Effort, stored, unnamed_lock};
use crate::sys::poll;
use crate::sys::wait::Ended;
use crate::terraform::data_directory::{CommandDirectories, DataDirectory};
use crate::terraform::errored_state::errored_state;
use crate::terraform::log::RecordedLock;
use crate::trace::trace;

/// Prints the results for a run's locks on stderr.
pub(crate) struct TerminalReporter<'a> {
    pub(crate) after: &'a AfterRun<'a>,
    /// A time shortly after terraform's exit.
    pub(crate) ended_at: Timestamp,
    /// Why this run has no journal, or why its journal could not be written. `None` if the journal is complete.
    pub(crate) unprotected: Option<&'a str>,
    /// The IDs of the dead runs that `tf` tried to finish before terraform started, or while it was running.
    pub(crate) tried: &'a [String],
    /// Whether `TFW_LEASE` is set.
    pub(crate) wants_lease: bool,
}

impl Reporter for TerminalReporter<'_> {
    fn result(&mut self, run: &EndedRun<'_>, result: &ReleaseResult, is_remembered: bool) {
        let (candidates, ending) = (run.candidates, run.ending);
        let ReleaseResult { lock, outcome, may_exist, may_still_come } = result;
        let has_journal = self.unprotected.is_none();
        match outcome {
            Some(Outcome::Released(released)) => {
                console::say(&messages::release::released(ending, lock, released, Timestamp::now()));
                if released.is_partial && *may_still_come {
                    let unlock = self.unlock_command_of(candidates.workspace_of_lock(lock), candidates);
                    console::say(&messages::late::other_part_may_land(lock, is_remembered, &unlock));
                }
                if let Some(mismatch) = &released.digest_mismatch {
                    let workspace = candidates.workspace_of_lock(lock);
                    let message =
                        |there: CommandDirectories<'_>| messages::release::digest_mismatch(mismatch, workspace, there);
                    console::say(&self.in_directories(None, message));
                }
            }
            // Terraform was refused the lock, and has reported that itself.
            Some(Outcome::Kept { .. }) if !may_exist => {}
            Some(Outcome::Kept { because: Because::OtherAccount, .. }) if has_journal => {
                console::say(&messages::release::not_seen(ending, lock, run.release_context.reached.needs()));
            }
            Some(Outcome::Kept { reason, because }) => {
                let later = has_journal
                    && !matches!(because, Because::Doubt | Because::Settings | Because::Claimed | Because::Never);
                let location = candidates.of(lock).into_iter().next();
                let workspace = location.as_ref().and_then(|location| candidates.workspace_of(location));
                let removal = Removal {
                    unlock: self.unlock_command_of(workspace, candidates),
                    release: self.locks_command(messages::next_step::RELEASE_NO_LOCK, workspace, candidates),
                    show: self.locks_command("show", workspace, candidates),
                };
                console::say(&messages::release::kept(ending, lock, reason, *because, later, &removal));
            }
            Some(Outcome::Absent { excluded: true, .. }) if *may_still_come && lock.progress.held.is_some() => {
                console::say(&messages::late::place_is_away(ending, lock, is_remembered));
            }
            Some(Outcome::Absent { excluded: false, .. }) if *may_still_come => {
                let unlock = self.unlock_command_of(candidates.workspace_of_lock(lock), candidates);
                console::say(&messages::late::may_still_come(ending, lock, is_remembered, &unlock));
            }
            Some(Outcome::Absent { .. }) | None => {}
        }
    }

    fn abandoned(&mut self, run: &EndedRun<'_>, result: &ReleaseResult, is_remembered: bool) {
        let ReleaseResult { lock, outcome, .. } = result;
        let Some(awaited) = awaited(lock, outcome.as_ref(), self.ended_at) else { return };
        let unlock = self.unlock_command_of(run.candidates.workspace_of_lock(lock), run.candidates);
        console::say(&match awaited {
            Awaited::Lock => messages::late::may_still_come(run.ending, lock, is_remembered, &unlock),
            Awaited::OtherPart => messages::late::other_part_may_land(lock, is_remembered, &unlock),
        });
    }

    fn replaced(&mut self, run: &EndedRun<'_>, replaced: &Replaced) {
        let Replaced { own, by } = replaced;
        let workspace = named_workspace(run.candidates.workspace_of_lock(own), run.candidates);
        console::say(&self.in_directories(workspace.as_deref(), |there| {
            messages::release::replaced(run.ending, own, by, &self.program(), there)
        }));
    }

    /// Terraform itself has reported that its lock request was refused. This reports what terraform cannot determine:
    /// whether the holder is running, and which command to type. If the holder is dead, this finishes the run of the
    /// holder, so that its lock is released. Terraform is not started again, because terraform's stdin may have been
    /// consumed, and the caller has already read terraform's output.
    fn refusals(&mut self, run: &EndedRun<'_>, results: &[ReleaseResult], waiter: &mut Waiter<'_>) {
        for result in results {
            if let Some(Outcome::Absent { anothers: Some(anothers), .. }) = &result.outcome {
                self.release_late(waiter, &anothers.id, run.candidates);
            }
        }
        if run.died || run.ended == Some(Ended::Exited(0)) {
            return;
        }
        for ReleaseResult { lock, outcome, .. } in results.iter().filter(|result| result.lock.progress.held.is_none()) {
            // If the service does not answer, or no lock is at the location, there is nothing to report.
            let is_refused = match outcome {
                Some(Outcome::Absent { anothers, .. }) => anothers.is_some(),
                Some(Outcome::Kept { because, .. }) => *because == Because::NoLock,
                Some(Outcome::Released(_)) => false,
                // The lock was not looked for, because no lock may be released.
                None => true,
            };
            if is_refused {
                for location in run.candidates.of(lock) {
                    self.explain_refusal(lock, &location, run.candidates, waiter);
                }
            }
        }
    }

    fn unidentified(&mut self, run: &EndedRun<'_>, locks: &CandidateLocks) {
        for (info, reason) in &locks.suspects {
            let workspace = run.candidates.workspace_of_path(&info.path);
            let show = self.locks_command("show", workspace, run.candidates);
            let unlock = self.unlock_command_of(workspace, run.candidates);
            console::say(&messages::release::suspected(run.ending, info, Some(reason), &show, &unlock));
        }
        for unnamed in &locks.awaited {
            let has_journal = self.unprotected.is_none();
            let list = self.locks_command("", run.candidates.workspaces.first().map(String::as_str), run.candidates);
            console::say(&messages::late::unnamed_may_still_come(
                run.ending,
                unnamed.progress.asked,
                has_journal,
                &list,
            ));
        }
        for (_, reason) in &locks.unread {
            console::say(&messages::release::not_looked_for(run.ending, reason));
        }
    }

    /// Reports a lock that may belong to this run, although the log does not show the lock. Always returns false: a
    /// person reads the report, so the next `tf` does not have to look for the lock.
    fn lost_log(&mut self, run: &EndedRun<'_>, waiter: &mut Waiter<'_>) -> bool {
        let never_begun = run.log_state == LogState::NeverBegun;
        let Some(location) = run.candidates.selected() else { return false };
        let list = self.locks_command("", run.candidates.workspace_of(&location), run.candidates);
        match waiter.block_on(unnamed_lock::suspect(&location, &run.release_context.run, never_begun)) {
            Ok(Ok(Some(info))) if run.release_context.run.is_of(&info.who) => {
                let workspace = run.candidates.workspace_of(&location);
                let unlock = self.unlock_command_of(workspace, run.candidates);
                let show = self.locks_command("show", workspace, run.candidates);
                console::say(&messages::release::suspected(run.ending, &info, None, &show, &unlock));
            }
            Ok(Ok(suspect)) if never_begun => {
                let workspace = named_workspace(run.candidates.workspace_of(&location), run.candidates);
                console::say(&self.in_directories(workspace.as_deref(), |there| {
                    messages::release::unlogged(run.ending, suspect.as_ref(), there)
                }));
            }
            Ok(Err(failure)) => {
                console::say(&messages::release::suspect_not_looked_for(run.ending, &failure.to_string(), &list));
            }
            Err(reason) => console::say(&messages::release::suspect_not_looked_for(run.ending, reason, &list)),
            Ok(Ok(_)) => {}
        }
        false
    }

    fn non_s3(&mut self, run: &EndedRun<'_>, result: &NonS3Result) {
        if run.died {
            self.name_errored_state(run.candidates);
            if let Some(why) = self.unprotected {
                console::say(&messages::run::unprotected(why, self.wants_lease && run.non_s3.is_none()));
            }
        }
        result.messages.iter().for_each(|message| console::say(message));
    }

    fn unlock_command(&self, candidates: &CandidateBackends, workspace: &str) -> String {
        self.force_unlock(Some(workspace), candidates)
    }

    fn has_journal(&self) -> bool {
        self.unprotected.is_none()
    }

    fn is_read(&self) -> bool {
        true
    }
}

impl TerminalReporter<'_> {
    /// Prints the messages about a terraform that has exited, except those about the release of locks. `ending` is how
    /// the run ended. If the run may have left a lock, this prints only the explanation of a checksum error.
    pub(crate) fn terraform_ended(
        &self,
        ending: Ending,
        candidates: &impl Deref<Target = CandidateBackends>,
        waiter: &mut Waiter<'_>,
    ) {
        let AfterRun { log, end, .. } = self.after;
        if log.mismatch.is_some() && !ending.died && end.ended != Some(Ended::Exited(0)) {
            self.explain_checksum(candidates, waiter);
        }
        if ending.may_have_left_a_lock(log) {
            return;
        }
        if if ending.died { log.was_canceled() } else { end.interrupted } {
            self.name_survivors();
        }
        if ending.died {
            self.name_errored_state(candidates);
        }
    }

    /// Reports which command to type if terraform has failed because a state does not match its digest. Terraform has
    /// reported the mismatch itself.
    fn explain_checksum(&self, candidates: &CandidateBackends, waiter: &mut Waiter<'_>) {
        let Some((bucket, key)) = &self.after.log.mismatch else { return };
        let _there = Within::enter(&candidates.working_directory);
        for location in candidates.of_state(bucket, key) {
            if let Ok(Some(digest_mismatch)) = waiter.block_on(stored::state_mismatch(&location)) {
                let workspace = candidates.workspace_of(&location);
                console::say(&self.in_directories(None, |there| {
                    messages::release::digest_mismatch(&digest_mismatch, workspace, there)
                }));
                return;
            }
        }
    }

    /// Reports the processes that are still running after an interrupt. The list is checked twice, 100 ms apart, so
    /// that providers that are just exiting are not reported.
    fn name_survivors(&self) {
        let mut living = self.after.tree.living();
        if !living.is_empty() {
            poll::wait(&[], Some(Duration::from_millis(100)));
            let later = self.after.tree.living();
            living.retain(|process| later.iter().any(|other| other.pid == process.pid));
        }
        if !living.is_empty() {
            console::say(&messages::run::survivors(&living));
        }
    }

    /// Releases the lock `id`, which terraform found held, if a late request of a dead run has created that lock.
    fn release_late(&self, waiter: &mut Waiter<'_>, id: &str, candidates: &CandidateBackends) {
        let Some(pending_requests) = &self.after.context.pending_requests else { return };
        for pending in pending_requests.read(&ClockReading::now()).iter().filter(|pending| pending.lock.id == id) {
            if let Some(Outcome::Released(_)) = check_pending(pending, candidates, Effort::EXPLANATION, waiter) {
                console::say(&messages::late::came_late(&pending.lock));
                console::say(messages::late::TRY_AGAIN);
            }
        }
    }

    /// Explains why terraform did not get the lock `asked`: reports the locks that are at `location` now. If the holder
    /// of such a lock is a dead run on this host, finishes that run.
    fn explain_refusal(
        &self,
        asked: &RecordedLock,
        location: &LockLocation,
        candidates: &CandidateBackends,
        waiter: &mut Waiter<'_>,
    ) {
        let found = stored_locks(location, candidates, waiter);
        let command = |words: &str| self.locks_command(words, candidates.workspace_of(location), candidates);
        for StoredPart { store_key, stored, .. } in found.iter().filter(|part| part.stored.info().is_none()) {
            let what = stored.describe_no_lock();
            let found =
                messages::next_step::NoLock { place: &store_key.describe(), what: &what, path: &location.lock_path() };
            console::say(&messages::next_step::refused_by_no_lock(
                &found,
                &command(messages::next_step::RELEASE_NO_LOCK),
            ));
        }
        for (info, lease) in locks_of(&found).into_iter().filter(|(info, _)| info.id != asked.id) {
            let host = HostView::look();
            let judgement = host.judge(&info, lease.as_ref());
            trace!("refused by {}: {:?}", info.id, judgement.verdict);
            let dead =
                host.dead_run(&info.id).filter(|_| self.after.context.release && judgement.verdict == Verdict::Dead);
            // If `tf` tried to finish the run a moment ago and failed, it is not tried again now. The reason was
            // reported.
            let dead = dead.filter(|run| !self.tried.iter().any(|tried| tried == run));
            let takes_over = self.wants_lease && self.after.context.release;
            let lapses_after = lease.as_ref().and_then(|lease| lease.lapses_after(self.after.context.begun.elapsed()));
            let is_released_after = lapses_after.filter(|_| takes_over && !host.stays(&info));
            let refusal = Refusal { info: &info, lease: lease.as_ref(), judgement: &judgement, is_released_after };
            console::say(&messages::refused::refused(&refusal, Timestamp::now(), command, dead.is_some()));
            let Some(run) = dead else { continue };
            if let Ok(child) = recovery_process::start(run, false) {
                recovery_process::wait_for(child, recovery_process::RECOVERY_TIMEOUT, waiter);
                let left = self::stored_locks(location, candidates, waiter);
                if !left.iter().filter_map(|left| left.stored.info()).any(|left| left.id == info.id) {
                    console::say(messages::late::TRY_AGAIN);
                }
            }
        }
    }

    /// Returns the name by which terraform was run, without a directory.
    fn program(&self) -> Cow<'_, str> {
        Path::new(&self.after.context.invocation.name)
            .file_name()
            .unwrap_or(&self.after.context.invocation.name)
            .to_string_lossy()
    }

    /// Calls `message` with the directories that a command for this run names, and with `workspace`, and returns its
    /// result. The directories are the value of `-chdir` as it was given, and TF_DATA_DIR, because that may be set for
    /// this run only.
    fn in_directories(
        &self,
        workspace: Option<&str>,
        message: impl FnOnce(CommandDirectories<'_>) -> String,
    ) -> String {
        let chdir = self.after.context.invocation.command_line.directory.as_deref().map(Path::to_string_lossy);
        let data = DataDirectory::named_here();
        message(CommandDirectories { chdir: chdir.as_deref(), data: data.as_deref(), workspace })
    }

    /// Reports the file into which terraform has saved a state that it could not upload. Terraform reports that file
    /// too, but not if terraform has died, and a person may not read terraform's output.
    fn name_errored_state(&self, candidates: &CandidateBackends) {
        let directory = self.after.context.invocation.command_line.working_directory(&self.after.context.current);
        if let Some(path) = errored_state(&directory, self.after.context.started) {
            let workspace = named_workspace(candidates.workspaces.first().map(String::as_str), candidates);
            console::say(&self.in_directories(workspace.as_deref(), |there| {
                messages::run::errored_state(&path, &self.program(), there)
            }));
        }
    }

    /// Returns the command `tf locks` with the arguments `words`, for this run's directory and for the lock of
    /// `workspace`. `None` if the workspace is unknown.
    fn locks_command(&self, words: &str, workspace: Option<&str>, candidates: &CandidateBackends) -> String {
        self.in_directories(named_workspace(workspace, candidates).as_deref(), |there| there.locks(words))
    }

    /// Returns the command that plans in the directory and the workspace of this run.
    pub(crate) fn plan_command(&self, candidates: &CandidateBackends) -> String {
        let workspace = named_workspace(candidates.workspaces.first().map(String::as_str), candidates);
        self.in_directories(workspace.as_deref(), |there| there.terraform(&self.program(), "plan"))
    }

    /// Returns terraform's own command that removes a lock of `workspace`, without the lock's ID.
    fn force_unlock(&self, workspace: Option<&str>, candidates: &CandidateBackends) -> String {
        let workspace = named_workspace(workspace, candidates);
        self.in_directories(workspace.as_deref(), |there| messages::next_step::unlock_command(&self.program(), there))
    }

    /// As [`Self::force_unlock`], for a lock in S3 or DynamoDB. After a `workspace` command, the workspace may have no
    /// state yet, or no longer have one, and terraform refuses to work in it. So after such a command, if the workspace
    /// is not the selected one, returns a `tf locks release` command, which works without a state.
    fn unlock_command_of(&self, workspace: Option<&str>, candidates: &CandidateBackends) -> String {
        let is_other = workspace.is_some() && workspace != selected(candidates);
        if is_other && self.after.context.invocation.command_line.command().starts_with("workspace ") {
            self.locks_command("release", workspace, candidates)
        } else {
            self.force_unlock(workspace, candidates)
        }
    }
}

/// Returns the workspace that is selected after the run. `None` if the data directory was not read.
fn selected(candidates: &CandidateBackends) -> Option<&str> {
    candidates.directories.first().map(|directory| directory.workspace.as_str())
}

/// As [`workspace_to_name`], with the TF_WORKSPACE of this process.
fn named_workspace(workspace: Option<&str>, candidates: &CandidateBackends) -> Option<String> {
    let variable = std::env::var("TF_WORKSPACE").ok().filter(|name| !name.is_empty());
    let named = workspace_to_name(workspace, selected(candidates), variable.as_deref());
    named.map(ToOwned::to_owned)
}

/// Returns the workspace that a command must name to act on `workspace`, which is `None` if it is unknown. `selected` is
/// the selected workspace. `variable` is TF_WORKSPACE of this run, which may be set for this run only. `None` if no name
/// is needed or known.
fn workspace_to_name<'a>(
    workspace: Option<&'a str>,
    selected: Option<&str>,
    variable: Option<&'a str>,
) -> Option<&'a str> {
    match workspace {
        Some(_) if workspace == selected && variable.is_none() => None,
        Some(_) => workspace,
        None => variable,
    }
}

/// Returns what is stored now at `location`, with one entry for each part of a lock. Leaves out a part that does not
/// exist or cannot be read.
fn stored_locks(location: &LockLocation, candidates: &CandidateBackends, waiter: &mut Waiter<'_>) -> Vec<StoredPart> {
    let _there = Within::enter(&candidates.working_directory);
    waiter.block_on(stored::stored(location)).unwrap_or_default()
}

/// What may still appear after terraform has exited by itself without its lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Awaited {
    /// The lock. It was not found.
    Lock,
    /// One part of the lock. The other part was found and released.
    OtherPart,
}

/// Returns what may still appear of `lock` after the `outcome` of its release. Terraform exited at the time `at`.
/// `None` if the request for the lock most likely got a response, or if the whole lock was released.
fn awaited(lock: &RecordedLock, outcome: Option<&Outcome>, at: Timestamp) -> Option<Awaited> {
    match outcome {
        _ if !was_waited_for(lock, at) => None,
        Some(Outcome::Released(released)) => released.is_partial.then_some(Awaited::OtherPart),
        _ => Some(Awaited::Lock),
    }
}

/// Whether the request for `lock` most likely got no response before terraform exited at the time `at`. This is the
/// case if terraform waited for the response for about as long as it waits after a second interrupt. False if terraform
/// has repeated the request: then it has waited between its requests.
fn was_waited_for(lock: &RecordedLock, at: Timestamp) -> bool {
    /// This is 1 s less than the 5 s that terraform waits. The 1 s allows for delays on a slow machine.
    const SECOND_INTERRUPT_WINDOW: SignedDuration = SignedDuration::from_secs(4);
    !lock.was_requested_again() && at.duration_since(lock.progress.asked) >= SECOND_INTERRUPT_WINDOW
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock::outcome::Released;
    use crate::terraform::log::Log;
    use crate::terraform::log::tests::{ID, lock_line};

    fn lock(requests: usize) -> RecordedLock {
        let mut log = Log::default();
        for _ in 0..requests {
            log.read(lock_line(7, "Attempting to lock remote state (DynamoDB only)...", ID, "r").as_bytes());
        }
        log.named().next().unwrap().clone()
    }

    #[test]
    fn a_command_names_its_workspace_unless_that_is_the_selected_one_and_nothing_overrides_it() {
        for (workspace, selected, variable, expected) in [
            ("default", "default", None, None),
            ("green", "green", None, None),
            ("default", "green", None, Some("default")),
            ("green", "default", None, Some("green")),
            ("default", "green", Some("default"), Some("default")),
            // TF_WORKSPACE=blue tf workspace delete green
            ("green", "green", Some("blue"), Some("green")),
            ("", "green", Some("blue"), Some("blue")),
            ("", "green", None, None),
        ] {
            let of = (!workspace.is_empty()).then_some(workspace);
            let named = workspace_to_name(of, Some(selected), variable);
            assert_eq!(named, expected, "{workspace} {selected} {variable:?}");
        }
    }

    #[test]
    fn a_request_was_waited_for_where_terraform_stayed_for_as_long_as_it_does_after_a_second_interrupt() {
        for (requests, seconds, expected) in [(1, 1, false), (1, 5, true), (2, 5, false)] {
            let lock = lock(requests);
            let at = lock.progress.asked + SignedDuration::from_secs(seconds);
            assert_eq!(was_waited_for(&lock, at), expected, "{requests} {seconds}");
        }
    }

    #[test]
    fn nothing_that_was_released_is_said_to_be_missing() {
        let released = |is_partial| Outcome::Released(Released { is_partial, ..Released::default() });
        for (outcome, expected) in [
            (None, Some(Awaited::Lock)),
            (Some(Outcome::Absent { anothers: None, excluded: false }), Some(Awaited::Lock)),
            (Some(Outcome::later("x")), Some(Awaited::Lock)),
            (Some(released(false)), None),
            (Some(released(true)), Some(Awaited::OtherPart)),
        ] {
            for (seconds, expected) in [(1, None), (5, expected)] {
                let lock = lock(1);
                let at = lock.progress.asked + SignedDuration::from_secs(seconds);
                assert_eq!(awaited(&lock, outcome.as_ref(), at), expected, "{outcome:?} {seconds}");
            }
        }
    }
}
