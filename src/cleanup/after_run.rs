//! After terraform has ended: does it leave a lock, is its tree dead, and giving the lock back.

use crate::cleanup::recovery_process;
use crate::cleanup::run_context::RunContext;
use crate::console;
use crate::terraform::errored_state::errored_state;
use std::borrow::Cow;
use std::cell::LazyCell;
use std::path::Path;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};

use crate::aws::credentials::Purpose;
use crate::cleanup::candidate_backends::CandidateBackends;
use crate::cleanup::end_of_run::EndOfRun;
use crate::cleanup::invocation::Invocation;
use crate::cleanup::messages;
use crate::cleanup::messages::Removal;
use crate::cleanup::other_backend;
use crate::cleanup::other_backend::NonS3Release;
use crate::cleanup::process_tree::{Termination, Tree};
use crate::cleanup::release_all::{
    CandidateLocks, ReleaseResult, check_pending, record_in_history, release_locks, remember_abandoned,
    remember_pending, replaced,
};
use crate::cleanup::waiter::Waiter;
use crate::cleanup::working_directory::Within;
use crate::crash_point;
use crate::holder::evidence::Verdict;
use crate::holder::host::HostView;
use crate::journal::history::By;
use crate::journal::runs::Unfinished;
use crate::lock::location::LockLocation;
use crate::lock::proof::Run;
use crate::lock::reached::Reached;
use crate::lock::release::{self, Because, EXPLANATION_TIMEOUT, Outcome, ReleaseContext};
use crate::lock::stores::{StoreKey, StoredLock};
use crate::sys::poll;
use crate::sys::process::{self, Process, ProcessList};
use crate::sys::wait::Ended;
use crate::terraform::lock_info::LockInfo;
use crate::terraform::log::{Log, RecordedLock};
use crate::trace::trace;

/// All that is known when terraform has ended.
pub(crate) struct Aftermath<'a> {
    pub(crate) context: &'a RunContext<'a>,
    pub(crate) end: EndOfRun,
    pub(crate) log: &'a Log,
    /// Terraform has written nothing into the log, and may have been unable to.
    pub(crate) unlogged: bool,
    pub(crate) tree: &'a Tree,
    pub(crate) reached: &'a Reached,
    /// Why there is no journal of this run. `None` where there is one.
    pub(crate) unprotected: Option<&'a str>,
    /// Dead runs that were tried to be finished before, or while, terraform ran.
    pub(crate) tried: &'a [String],
}

/// Whether terraform died, or left its work, rather than ended its operation.
///
/// What tells is the log, and not the exit code: a terraform that got two interrupts ends with 1, as after any error, and
/// leaves its operation, its provisioners and its requests on their way (internal/command/meta.go, `RunOperation`). One that
/// ends its operation has begun to unlock whatever it had locked. `is_ours` says whether a lock belongs to a backend and a
/// workspace of this run: a lock of another place is that of a terraform which a provisioner has started, and says nothing of
/// ours.
///
/// Exit code 11 is a panic that terraform caught (internal/logging/panic.go). 2 is both "there are changes"
/// (`plan -detailed-exitcode`) and Go's own crash; only a crash leaves a lock. A shim's exit code is its own (tenv 255, a
/// shell 137, `terraform | tee` 0): there also a lock whose unlock was begun counts.
pub(crate) fn died(
    ended: Ended,
    forced: bool,
    behind_a_shim: bool,
    log: &Log,
    is_ours: impl Fn(&RecordedLock) -> bool,
) -> bool {
    let left_operation = || log.was_canceled() || log.unreleased().any(|lock| lock.is_in_use() && is_ours(lock));
    forced
        || match ended {
            Ended::Killed(_) | Ended::Exited(11) => true,
            Ended::Exited(0) => behind_a_shim && log.ends_holding_lock(),
            Ended::Exited(1) => left_operation() || (behind_a_shim && log.ends_holding_lock()),
            Ended::Exited(2) => {
                left_operation() || log.ends_with_request() || (log.held_unlogged() && !log.announces_changes)
            }
            Ended::Exited(_) => left_operation() || (behind_a_shim && (log.ends_with_request() || log.held_unlogged())),
        }
}

/// How long what an ended terraform has started may take to end as well: its providers do, within some milliseconds.
const PROVIDER_EXIT_TIMEOUT: Duration = Duration::from_secs(1);

/// Makes sure that an operation is over: ends what is left of the tree of a terraform that died, and leaves alone what
/// one that ended by itself has left on purpose. Gives the reason why no lock may be released, if there is one.
///
/// `unlock_begun`: terraform ended by itself, and a lock stands that it had begun to release. Its delete was refused, or is
/// still on its way; nothing tells whether the operation was over before.
pub(crate) fn reason_to_keep(
    tree: &Tree,
    (died, unlock_begun): (bool, bool),
    at_once: bool,
    waiter: &mut Waiter<'_>,
) -> Option<Outcome> {
    // A terraform that a provisioner started without us, or a shim that has ended, writes into our recorder, and may hold
    // what we see there.
    if !died || (tree.is_behind_a_shim() && !at_once) {
        let logging = tree.logging();
        let living = tree.living();
        let other = living.iter().find(|process| is_terraform(process) || logging.contains(process));
        if let Some(process) = other {
            tree.note_survivors(std::slice::from_ref(process));
            return Some(Outcome::later(messages::another_terraform(process)));
        }
    }
    if died {
        return match tree.end(waiter, at_once) {
            Termination::Dead(_) => None,
            Termination::Alive(processes) => Some(Outcome::later(messages::still_alive(&processes))),
            Termination::LifelineHeld => Some(Outcome::later(messages::LIFELINE_HELD)),
            Termination::Unseen => Some(Outcome::later(messages::UNSEEN)),
        };
    }
    if unlock_begun { what_lives_on(tree, waiter) } else { None }
}

/// The reason that a living tree is, when terraform ended by itself.
fn what_lives_on(tree: &Tree, waiter: &mut Waiter<'_>) -> Option<Outcome> {
    let begun = Instant::now();
    loop {
        tree.reap_orphans(&[]);
        if process::list() == ProcessList::Unavailable {
            return Some(Outcome::later(messages::UNSEEN));
        }
        let living = tree.living();
        if living.is_empty() {
            return None;
        }
        if begun.elapsed() > PROVIDER_EXIT_TIMEOUT {
            tree.note_survivors(&living);
            return Some(Outcome::later(messages::still_alive(&living)));
        }
        waiter.wait(Duration::from_millis(10));
    }
}

/// The locks of `results` that a terraform which failed by itself had asked for and not had, and whose requests may still land.
/// It may have given up while they were under way: at a second interrupt, after five seconds (internal/command/meta.go,
/// `RunOperation`); or because a proxy answered in the place of the service, or the connection broke, and the SDK's own tries
/// were used up. A lock that was released may come again by such a try. The log does not tell a refusal from these, so only
/// another's lock in the place is taken for one, or a place in which no lock can be.
pub(crate) fn abandoned_requests(
    results: &[ReleaseResult],
    ended: Option<Ended>,
) -> impl Iterator<Item = &ReleaseResult> {
    let failed = matches!(ended, Some(Ended::Exited(code)) if code != 0);
    let abandoned = move |results: &&ReleaseResult| {
        let may_come = match &results.outcome {
            Some(Outcome::Absent { anothers: None, excluded: false } | Outcome::Released(_)) => true,
            // Whether it was refused could not be seen.
            Some(Outcome::Kept { because, .. }) => {
                matches!(because, Because::NoAnswer | Because::NoCredentials | Because::Denied(_) | Because::NotYet)
            }
            Some(Outcome::Absent { .. }) | None => false,
        };
        failed && may_come && results.lock.locked.is_none() && !results.may_still_come
    };
    results.iter().filter(abandoned)
}

/// Whether a request for `lock` was left without an answer, as far as that can be told at the end, `at`: terraform waited for
/// it for as long as it does after a second interrupt.
fn was_waited_for(lock: &RecordedLock, at: Timestamp) -> bool {
    /// Less than five seconds by more than a slow machine is late.
    const SECOND_INTERRUPT_WINDOW: SignedDuration = SignedDuration::from_secs(4);
    at.duration_since(lock.asked) >= SECOND_INTERRUPT_WINDOW
}

impl Aftermath<'_> {
    /// Does what is to be done, and says it. Returns the locks that are left for the next `tf`.
    pub(crate) fn settle(&self, waiter: &mut Waiter<'_>) -> Unfinished {
        let at = Timestamp::now();
        // Read once, and only for a run that left something.
        let places = LazyCell::new(|| self.context.candidates_after());
        let with_plan = LazyCell::new(|| places.clone().with_plan(&self.context.planned_backends));
        let is_ours = |lock: &RecordedLock| !with_plan.of(lock).is_empty();
        let died = died(self.end.ended, self.end.forced, self.tree.is_behind_a_shim(), self.log, is_ours);
        // A shim's code tells of a death that the log, being empty, does not.
        let unlogged = self.unlogged && (died || matches!(self.end.ended, Ended::Exited(129..)));
        let lost = unlogged || (died && (!self.log.logs_locks() || self.log.is_torn()));
        if self.log.mismatch.is_some() && !died && !matches!(self.end.ended, Ended::Exited(0)) {
            self.explain_checksum(&with_plan, waiter);
        }
        if !self.log.may_hold() && !died && !unlogged {
            if self.end.interrupted {
                self.name_survivors();
            }
            return Unfinished::default();
        }
        let elsewhere = died && other_backend::may_be_left(&places);
        if !self.log.may_hold() && !lost && !elsewhere {
            if self.log.was_canceled() {
                self.name_survivors();
            }
            self.name_errored_state();
            return Unfinished::default();
        }
        trace!("a lock may stand; died: {died}, log lost: {lost}");
        crash_point::reached("tf: locks may stand");
        let ending = messages::ending(&self.end);
        let places = &*with_plan;
        let keep = if self.context.release {
            let unlock_begun = !died && unlock_is_begun(self.log, places, waiter);
            reason_to_keep(self.tree, (died, unlock_begun), self.end.killed.is_some(), waiter)
        } else {
            Some(Outcome::Kept { reason: messages::NEVER.to_owned(), because: Because::Never })
        };
        crash_point::reached("tf: tree judged");
        let run = Run::recorded(&self.context.who, self.context.started, self.log);
        let reached = self.reached.clone();
        let release_context = ReleaseContext { run, request_may_land: died, write_may_land: true, reached };
        // What is below terraform worked until now.
        let until = Timestamp::now();
        let claimed = |id: &str| self.context.journal().is_some_and(|journal| journal.is_claimed(id, &self.context.id));
        let stored_locks = CandidateLocks::find(self.log, places, &release_context, died, waiter);
        let results =
            release_locks(&stored_locks.named, places, &release_context, died, keep.as_ref(), claimed, waiter);
        crash_point::reached("tf: gave back");
        let remembered = remember_pending(&results, &release_context, true, self.context.pending_requests.as_ref());
        let abandoned = || abandoned_requests(&results, Some(self.end.ended));
        let also_remembered = remember_abandoned(abandoned(), &release_context, self.context.pending_requests.as_ref());
        self.tell(&results, &remembered, places, &ending);
        // Of one that could not be looked for nothing is known that terraform has not said.
        let looked_for = |results: &&ReleaseResult| !matches!(results.outcome, Some(Outcome::Kept { .. }));
        let waited_for = abandoned().filter(looked_for).map(|results| &results.lock);
        for lock in waited_for.filter(|lock| was_waited_for(lock, at)) {
            let kept = also_remembered.contains(&lock.id);
            console::say(&messages::may_still_come(&ending, lock, kept, &self.unlock_command_of(lock, places)));
        }
        record_in_history(&results, By::Tf, &ending, None);
        for one in replaced(&results, places, died, until, By::Tf, waiter) {
            console::say(&messages::replaced(&ending, &one.own, &one.by, &self.program(), self.directory().as_deref()));
        }
        for results in &results {
            if let Some(Outcome::Absent { anothers: Some(id), .. }) = &results.outcome {
                self.release_late(waiter, id, places);
            }
        }
        self.explain_refusals(&results, places, died, waiter);
        for (info, reason) in &stored_locks.suspects {
            console::say(&messages::suspected(&ending, info, Some(reason), &self.unlock_command(None, places)));
        }
        for unnamed in &stored_locks.awaited {
            console::say(&messages::unnamed_may_still_come(&ending, unnamed.asked, self.unprotected.is_none()));
        }
        for (_, reason) in &stored_locks.unread {
            console::say(&messages::not_looked_for(&ending, reason));
        }
        if lost && stored_locks.named.is_empty() && stored_locks.suspects.is_empty() && stored_locks.unread.is_empty() {
            self.name_suspect(waiter, &ending, places, &release_context, unlogged);
        }
        if died {
            self.name_errored_state();
        }
        if let Some(why) = self.unprotected.filter(|_| died) {
            console::say(&messages::unprotected(why));
        }
        let mut unfinished = stored_locks.unfinished(results);
        if elsewhere {
            self.settle_elsewhere(places, &release_context, (keep.as_ref(), &ending), waiter, &mut unfinished);
        }
        unfinished
    }

    /// The same for another backend than S3.
    fn settle_elsewhere(
        &self,
        places: &CandidateBackends,
        release_context: &ReleaseContext,
        (keep, ending): (Option<&Outcome>, &str),
        waiter: &mut Waiter<'_>,
        unfinished: &mut Unfinished,
    ) {
        let Invocation { terraform, command_line, .. } = self.context.invocation;
        let chdir = command_line.directory.as_deref();
        let Some(elsewhere) = NonS3Release::of(places, self.log, &terraform.path, &self.context.current, chdir) else {
            return;
        };
        let keep = keep.and_then(Outcome::reason);
        let told = command_line.logs_its_lock();
        let end = elsewhere.settle(
            &release_context.run,
            told,
            keep,
            [ending, &self.unlock_command(None, places)],
            By::Tf,
            waiter,
        );
        end.messages.iter().for_each(|message| console::say(message));
        if end.later {
            unfinished.add_elsewhere(elsewhere.had);
        }
    }

    fn tell(&self, results: &[ReleaseResult], remembered: &[String], places: &CandidateBackends, ending: &str) {
        for ReleaseResult { lock, outcome, may_stand, may_still_come } in results {
            let kept = self.unprotected.is_none();
            match outcome {
                Some(Outcome::Released(released)) => {
                    console::say(&messages::released(ending, lock, released, Timestamp::now()));
                    if released.is_partial && *may_still_come {
                        let kept = remembered.contains(&lock.id);
                        console::say(&messages::other_part_may_land(lock, kept, &self.unlock_command_of(lock, places)));
                    }
                    if let Some(digest_mismatch) = &released.digest_mismatch {
                        let workspace = places.workspace_of_lock(lock);
                        console::say(&messages::unfit_digest(digest_mismatch, workspace, self.directory().as_deref()));
                    }
                }
                // Terraform was refused, and has said so itself.
                Some(Outcome::Kept { .. }) if !may_stand => {}
                Some(Outcome::Kept { because: Because::OtherAccount, .. }) if kept => {
                    console::say(&messages::not_seen(ending, lock, self.reached.needs()));
                }
                Some(Outcome::Kept { reason, because }) => {
                    let later = kept && !matches!(because, Because::Doubt | Because::Never);
                    let place = places.of(lock).into_iter().next();
                    let workspace = place.as_ref().and_then(|place| unselected_workspace(place, places));
                    let removal = Removal {
                        unlock: self.unlock_command(place.as_ref(), places),
                        release: self.locks_command(messages::RELEASE_NO_LOCK, workspace),
                    };
                    console::say(&messages::kept(ending, lock, reason, *because, later, &removal));
                }
                Some(Outcome::Absent { excluded: true, .. }) if *may_still_come && lock.locked.is_some() => {
                    console::say(&messages::place_is_away(ending, lock, remembered.contains(&lock.id)));
                }
                Some(Outcome::Absent { excluded: false, .. }) if *may_still_come => {
                    let kept = remembered.contains(&lock.id);
                    console::say(&messages::may_still_come(ending, lock, kept, &self.unlock_command_of(lock, places)));
                }
                Some(Outcome::Absent { .. }) | None => {}
            }
        }
    }

    /// Terraform has failed because a state and its digest do not fit, and has said so. We add what to type.
    fn explain_checksum(&self, places: &CandidateBackends, waiter: &mut Waiter<'_>) {
        let Some((bucket, key)) = &self.log.mismatch else { return };
        let _there = Within::enter(&places.working_directory);
        for place in places.of_state(bucket, key) {
            if let Ok(Some(digest_mismatch)) = waiter.block_on(release::unfit_state(&place)) {
                let workspace = places.workspace_of(&place);
                console::say(&messages::unfit_digest(&digest_mismatch, workspace, self.directory().as_deref()));
                return;
            }
        }
    }

    /// Names what runs on after an interrupt. Terraform's providers may be dying at this moment: those are no survivors.
    fn name_survivors(&self) {
        let mut living = self.tree.living();
        if !living.is_empty() {
            poll::wait(&[], Some(Duration::from_millis(100)));
            let later = self.tree.living();
            living.retain(|process| later.iter().any(|other| other.pid == process.pid));
        }
        if !living.is_empty() {
            console::say(&messages::survivors(&living));
        }
    }

    /// We were refused by the lock `id`: if a dead run's request took it late, it goes.
    fn release_late(&self, waiter: &mut Waiter<'_>, id: &str, places: &CandidateBackends) {
        let Some(pending_requests) = &self.context.pending_requests else { return };
        for pending in pending_requests.read(Timestamp::now()).iter().filter(|pending| pending.lock.id == id) {
            if let Some(Outcome::Released(_)) =
                check_pending(pending, places, (EXPLANATION_TIMEOUT, Purpose::Explanation), waiter)
            {
                console::say(&messages::came_late(&pending.lock));
                console::say(messages::TRY_AGAIN);
            }
        }
    }

    /// Terraform was refused by somebody's lock and has said so. We add what it cannot know: whether the holder lives, and
    /// what to type. One that is proven dead is finished, and its lock given back; terraform is not started once more: its
    /// stdin may be consumed, and its output was read.
    fn explain_refusals(
        &self,
        results: &[ReleaseResult],
        places: &CandidateBackends,
        died: bool,
        waiter: &mut Waiter<'_>,
    ) {
        if died || matches!(self.end.ended, Ended::Exited(0)) {
            return;
        }
        for ReleaseResult { lock, outcome, .. } in results.iter().filter(|results| results.lock.locked.is_none()) {
            // Of a service that is silent, and of one where nothing stands, there is nothing to say.
            let is_refused = match outcome {
                Some(Outcome::Absent { anothers, .. }) => anothers.is_some(),
                Some(Outcome::Kept { because, .. }) => *because == Because::NoLock,
                Some(Outcome::Released(_)) => false,
                // It was not looked for: nothing is to be released here.
                None => true,
            };
            if is_refused {
                places.of(lock).iter().for_each(|place| self.explain_refusal(lock, place, places, waiter));
            }
        }
    }

    /// The same for one place of the lock that was asked for.
    fn explain_refusal(
        &self,
        asked: &RecordedLock,
        place: &LockLocation,
        places: &CandidateBackends,
        waiter: &mut Waiter<'_>,
    ) {
        let found = stored_locks(place, places, waiter);
        let command = |words: &str| self.locks_command(words, unselected_workspace(place, places));
        for (store_key, stored_locks) in found.iter().filter(|(_, stored_locks)| stored_locks.info().is_none()) {
            let what = stored_locks.describe_no_lock();
            console::say(&messages::barred(
                &store_key.describe(),
                &what,
                &command(messages::RELEASE_NO_LOCK),
                &place.lock_path(),
            ));
        }
        let mut locks: Vec<LockInfo> = found.iter().filter_map(|(_, stored_locks)| stored_locks.info()).collect();
        locks.dedup();
        for info in locks.into_iter().filter(|info| info.id != asked.id) {
            let host = HostView::look();
            let judgement = host.judge(&info);
            trace!("refused by {}: {:?}", info.id, judgement.verdict);
            let dead = host.dead_run(&info.id).filter(|_| self.context.release && judgement.verdict == Verdict::Dead);
            // One that was tried a moment ago, and could not be finished, is not tried again at once: it was said why.
            let dead = dead.filter(|run| !self.tried.iter().any(|tried| tried == run));
            console::say(&messages::refused(&info, &judgement, Timestamp::now(), command, dead.is_some()));
            let Some(run) = dead else { continue };
            if let Ok(child) = recovery_process::start(run, false) {
                recovery_process::wait_for(child, waiter);
                let left = self::stored_locks(place, places, waiter);
                if !left.iter().filter_map(|(_, left)| left.info()).any(|left| left.id == info.id) {
                    console::say(messages::TRY_AGAIN);
                }
            }
        }
    }

    /// Names a lock that only its own JSON connects with this run.
    fn name_suspect(
        &self,
        waiter: &mut Waiter<'_>,
        ending: &str,
        places: &CandidateBackends,
        release_context: &ReleaseContext,
        unlogged: bool,
    ) {
        let Some(place) = places.selected() else { return };
        let _there = Within::enter(&places.working_directory);
        match waiter.block_on(release::suspect(&place, &release_context.run, unlogged)) {
            Ok(Ok(Some(info))) if release_context.run.is_of(&info.who) => {
                console::say(&messages::suspected(ending, &info, None, &self.unlock_command(Some(&place), places)));
            }
            Ok(Ok(suspect)) if unlogged => {
                console::say(&messages::unlogged(ending, suspect.as_ref(), self.directory().as_deref()));
            }
            Ok(Err(failure)) => console::say(&messages::suspect_not_looked_for(ending, &failure.to_string())),
            Err(reason) => console::say(&messages::suspect_not_looked_for(ending, reason)),
            Ok(Ok(_)) => {}
        }
    }

    /// By what name terraform was run, without a directory.
    fn program(&self) -> Cow<'_, str> {
        Path::new(&self.context.invocation.name).file_name().unwrap_or(&self.context.invocation.name).to_string_lossy()
    }

    /// `-chdir`, as it was given.
    fn directory(&self) -> Option<Cow<'_, str>> {
        self.context.invocation.command_line.directory.as_deref().map(Path::to_string_lossy)
    }

    /// Names a state that terraform could not write. It says so itself, if it lives to say it and anybody reads it.
    fn name_errored_state(&self) {
        let directory = self.context.invocation.command_line.working_directory(&self.context.current);
        if let Some(path) = errored_state(&directory, self.context.started) {
            console::say(&messages::errored_state(&path, &self.program(), self.directory().as_deref()));
        }
    }

    /// A `tf locks` command for the directory of this run, in `workspace` or in the one that its environment names.
    fn locks_command(&self, words: &str, workspace: Option<&str>) -> String {
        let variable = std::env::var("TF_WORKSPACE").ok();
        messages::locks_command(words, self.directory().as_deref(), workspace.or(variable.as_deref()))
    }

    /// Terraform's own command that removes a lock at `place`, without its ID. A workspace that has no state yet, or none any
    /// more, is none for terraform: it refuses to work there, and ours does not.
    fn unlock_command(&self, place: Option<&LockLocation>, places: &CandidateBackends) -> String {
        let workspace = place.and_then(|place| unselected_workspace(place, places));
        if workspace.is_some() && self.context.invocation.command_line.command().starts_with("workspace ") {
            return self.locks_command("release", workspace);
        }
        let command = messages::unlock_command(&self.program(), self.directory().as_deref());
        // Set for this run alone, perhaps, and not where the command will be typed.
        let variable = std::env::var("TF_WORKSPACE").ok();
        messages::in_workspace(workspace.or(variable.as_deref()), &command)
    }

    /// The same for `lock`.
    fn unlock_command_of(&self, lock: &RecordedLock, places: &CandidateBackends) -> String {
        self.unlock_command(places.of(lock).first(), places)
    }
}

/// Whether a lock stands, or may, that terraform had begun to release.
pub(crate) fn unlock_is_begun(log: &Log, places: &CandidateBackends, waiter: &mut Waiter<'_>) -> bool {
    let mut begun = log.unreleased().filter(|lock| lock.unlocking);
    begun.any(|lock| {
        let mut found = places.of(lock).into_iter().map(|place| stands(&lock.id, &place, places, waiter));
        found.any(|stands| stands)
    })
}

/// Whether the lock `id` stands at `place`, as far as it can be told.
fn stands(id: &str, place: &LockLocation, places: &CandidateBackends, waiter: &mut Waiter<'_>) -> bool {
    let _there = Within::enter(&places.working_directory);
    waiter.block_on(release::may_stand(place, id)).unwrap_or(true)
}

/// The workspace whose state is at `place`, if a command without further words would not look there: it is neither the default
/// one nor the selected one, and it need not have a state yet.
fn unselected_workspace<'a>(place: &LockLocation, places: &'a CandidateBackends) -> Option<&'a str> {
    let selected = places.directories.first().map(|directory| directory.workspace.as_str());
    places.workspace_of(place).filter(|name| Some(*name) != selected)
}

/// What stands in the places of a lock at `place` now.
fn stored_locks(
    place: &LockLocation,
    places: &CandidateBackends,
    waiter: &mut Waiter<'_>,
) -> Vec<(StoreKey, StoredLock)> {
    let _there = Within::enter(&places.working_directory);
    waiter.block_on(release::stored(place)).unwrap_or_default()
}

fn is_terraform(process: &Process) -> bool {
    let program = process.program();
    let named = |name: &str| {
        program == name || program.starts_with(&format!("{name}_")) || program.starts_with(&format!("{name}-v"))
    };
    named("terraform") || named("tofu")
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::Signal;

    /// What a log of Terraform 1.11 tells, up to that many of its records: of a lock that was asked for, had, given back.
    fn told(records: usize) -> Log {
        let line = |message| crate::terraform::log::tests::lock_line(7, message, crate::terraform::log::tests::ID, "r");
        let records = [
            "2026-11-23T01:46:07.565Z [INFO]  Terraform version: 1.11.4\n".to_owned(),
            line("Attempting to lock remote state (DynamoDB only)..."),
            line("Locked remote state (DynamoDB only)"),
            line("Attempting to unlock remote state (DynamoDB only)..."),
            line("Unlocked remote state (DynamoDB only)"),
        ][..records]
            .concat();
        let mut log = Log::default();
        log.read(records.as_bytes());
        log
    }

    #[test]
    fn only_a_terraform_that_ended_its_operation_did_not_die() {
        for forced in [false, true] {
            for records in 1..=5 {
                for ours in [false, true] {
                    let log = &told(records);
                    let (asked, had) = ((2..5).contains(&records), (3..5).contains(&records));
                    let left = records == 3 && ours;
                    assert_eq!((log.ends_with_request(), log.ends_holding_lock()), (asked, had));
                    for shim in [false, true] {
                        let died = |ended| died(ended, forced, shim, log, |_| ours);
                        assert!(died(Ended::Killed(Signal::SIGKILL)));
                        assert!(died(Ended::Exited(11)));
                        assert_eq!(died(Ended::Exited(0)), forced || (shim && had));
                        assert_eq!(died(Ended::Exited(1)), forced || left || (shim && had), "{records} {ours}");
                        assert_eq!(died(Ended::Exited(2)), forced || asked);
                        for code in [3, 137, 247, 255] {
                            assert_eq!(died(Ended::Exited(code)), forced || left || (shim && asked));
                        }
                    }
                }
            }
        }
    }

    /// Of OpenTofu's locks nothing tells when they are released: there the second interrupt's own record does.
    #[test]
    fn a_terraform_that_says_that_it_left_its_operation_died() {
        let mut log = told(4);
        log.read(b"2026-11-23T01:46:09.000Z [WARN]  running operation was forcefully canceled\n");
        assert!(died(Ended::Exited(1), false, false, &log, |_| false));
        assert!(!died(Ended::Exited(0), false, false, &log, |_| false));
    }

    #[test]
    fn a_request_of_a_terraform_that_failed_may_still_land_unless_another_holds_the_lock() {
        let lock = told(2).locks.remove(0);
        let absent = || Some(Outcome::Absent { anothers: None, excluded: false });
        let kept = |because| Some(Outcome::Kept { reason: String::new(), because });
        let released = || {
            let nothing = release::Released { created: None, write: None, digest_mismatch: None, is_partial: false };
            Some(Outcome::Released(nothing))
        };
        for (outcome, ended, expected) in [
            (absent(), Some(Ended::Exited(1)), 1),
            (released(), Some(Ended::Exited(1)), 1),
            (absent(), Some(Ended::Exited(0)), 0),
            (absent(), None, 0),
            (Some(Outcome::Absent { anothers: Some("x".into()), excluded: false }), Some(Ended::Exited(1)), 0),
            // A table that does not exist has refused it.
            (Some(Outcome::Absent { anothers: None, excluded: true }), Some(Ended::Exited(1)), 0),
            (kept(Because::NoAnswer), Some(Ended::Exited(1)), 1),
            (kept(Because::Denied("dynamodb:GetItem")), Some(Ended::Exited(1)), 1),
            (kept(Because::NoCredentials), Some(Ended::Exited(1)), 1),
            (kept(Because::NoAnswer), Some(Ended::Exited(0)), 0),
            // What is no lock was there, and has refused it.
            (kept(Because::NoLock), Some(Ended::Exited(1)), 0),
            (kept(Because::Doubt), Some(Ended::Exited(1)), 0),
            (None, Some(Ended::Exited(1)), 0),
        ] {
            let results = [ReleaseResult { lock: lock.clone(), outcome, may_stand: false, may_still_come: false }];
            assert_eq!(abandoned_requests(&results, ended).count(), expected, "{results:?} {ended:?}");
        }
        let mut had = lock.clone();
        had.locked = Some(lock.asked);
        let results = [ReleaseResult { lock: had, outcome: absent(), may_stand: true, may_still_come: false }];
        assert_eq!(abandoned_requests(&results, Some(Ended::Exited(1))).count(), 0);
        for (seconds, expected) in [(1, false), (5, true)] {
            assert_eq!(was_waited_for(&lock, lock.asked + SignedDuration::from_secs(seconds)), expected);
        }
    }

    /// Of OpenTofu's locks nothing tells when they are given back; that changes are announced tells the command line.
    #[test]
    fn code_2_is_a_crash_unless_changes_are_announced_by_it() {
        for (arguments, crash) in [("\"plan\"", true), ("\"plan\", \"-detailed-exitcode\"", false)] {
            let mut log = Log::default();
            log.read(
                format!(
                    "2026-11-23T01:46:07.565Z [INFO]  OpenTofu version: 1.6.2\n\
                     2026-11-23T01:46:07.566Z [INFO]  CLI command args: []string{{{arguments}}}\n\
                     2026-11-23T01:46:07.600Z [TRACE] backend/local: requesting state lock for workspace \"default\"\n\
                     2026-11-23T01:46:07.700Z [TRACE] backend/local: reading remote state for workspace \"default\"\n"
                )
                .as_bytes(),
            );
            assert!(log.held_unlogged());
            let died = |code, shim| died(Ended::Exited(code), false, shim, &log, |_| false);
            assert_eq!(died(2, false), crash);
            assert!(!died(1, true) && died(255, true));
        }
    }
}
