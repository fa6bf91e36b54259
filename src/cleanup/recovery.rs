//! Recovery: a later `tf` finishes the dead runs on this host, that is, it releases the locks that they have left.
//!
//! A run at the same location is finished before terraform starts, because terraform would otherwise find the lock of
//! that run. Any other run is finished by a background process, so that `tf` does not wait for the lock service of
//! another directory.
//!
//! Every run is finished in a forked process, for three reasons. The process changes its environment to that of the
//! dead run, to reach AWS in the same way as that run did. It may start threads for the requests to the lock service,
//! but the process that starts terraform must never have more than one thread. And a person who does not want to wait
//! can kill the forked process.

use std::cell::Cell;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::poll::PollFlags;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::aws::redacted_backend::RedactedBackend;
use crate::cleanup::candidate_backends::{CandidateBackends, is_for_any_workspace};
use crate::cleanup::clean_up::{CleanUpResult, EndedRun, LogState, NonS3Cleanup, Permission, Reporter, clean_up};
use crate::cleanup::forked_recovery::{Finished, Left, RECOVERY, RecoveryProcess, in_a_process};
use crate::cleanup::other_backend::{NonS3Release, NonS3Result};
use crate::cleanup::planned_backends::PlannedBackends;
use crate::cleanup::recovery_plan::{DeadRun, Facts, Mode, Sight, Treatment, Turn, treatment};
use crate::cleanup::release_all::{CandidateLocks, ReleaseResult, check_pending, may_land};
use crate::cleanup::waiter::Waiter;
use crate::cleanup::{messages, recovery_plan, working_directory};
use crate::journal::clock_reading::ClockReading;
use crate::journal::history::By;
use crate::journal::host::Standpoint;
use crate::journal::kept_locks::KeptLocks;
use crate::journal::pending_requests::{PendingRequest, PendingRequests};
use crate::journal::recorder::Recorder;
use crate::journal::runs::{
    FoundRun, Journal, JournalEntry, JournalRecord, LOCK_NOT_OPENED, READ_ONLY, Replaced, Unfinished,
};
use crate::journal::state_directory::{Durability, StateDirectory};
use crate::lock::outcome::{Because, Outcome};
use crate::lock::release::{self, EXPLANATION_TIMEOUT, Effort, ReleaseContext, SERVICE_TIMEOUT};
use crate::sys::process::Process;
use crate::sys::signals::Signals;
use crate::sys::{detached, environment, poll};
use crate::terraform::binary;
use crate::terraform::binary::Binary;
use crate::terraform::command_line::logs_its_lock;
use crate::terraform::data_directory::{CommandDirectories, DataDirectory};
use crate::terraform::errored_state::errored_state;
use crate::terraform::log::RecordedLock;
use crate::trace::{self, trace};
use crate::{console, crash_point, settings};

/// How long to wait for another process that is finishing a run of the same location. For [`everything`], the limit of
/// the waits for all runs together.
const OTHER_RECOVERY_TIMEOUT: Duration = Duration::from_secs(30);

/// How long to wait, before terraform starts, for a run that is about to end (see [`ending`]). For a run without an
/// owner, this also limits the wait in [`everything`], because the terraform of such a run may continue for a long
/// time.
const ORPHAN_EXIT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long to wait after a failed attempt before a run of another directory is tried again.
const RETRY_INTERVAL: Duration = Duration::from_mins(5);

/// How often to check a run or a process while waiting for it.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// A dead run that this process must finish.
struct Dead {
    record: Box<JournalRecord>,
    entry: JournalEntry,
    standpoint: Standpoint,
    journal: Journal,
    pending_requests: PendingRequests,
    /// The reason that a person gave, for the history. `None` if no person gave one.
    reason: Option<String>,
}

/// The result of [`before_run`].
#[derive(Debug, Default)]
pub(crate) struct Before {
    /// The signal that asked `tf` to stop meanwhile. `None` if there was none.
    pub(crate) asked: Option<Signal>,
    /// The runs that could not be finished. The reason for each was normally reported. It was not reported if the
    /// process that finishes the run was killed or could not be forked.
    pub(crate) tried: Vec<Tried>,
}

/// A run that could not be finished.
#[derive(Debug)]
pub(crate) struct Tried {
    pub(crate) run: String,
    /// Whether the run could not be finished because no credentials were available.
    pub(crate) lacks_credentials: bool,
}

/// The most dead runs that one `tf` finishes in the background, because a process keeps a descriptor for each of them.
/// An attempt that fails writes the record anew, and the oldest records come first. So a later `tf` finishes the
/// others.
const FAR_LIMIT: usize = 16;

/// A run in the journal.
struct Entry<'a> {
    state: &'a StateDirectory,
    journal: Journal,
    name: String,
}

/// What is to be done before terraform starts.
#[derive(Default)]
struct DueWork<'a> {
    /// The dead runs that are finished before terraform starts. There can be any number of them, and each
    /// [`JournalEntry`] needs a descriptor. So each run is looked at again when it is its turn.
    near: Vec<Entry<'a>>,
    /// The dead runs that are finished in the background, each with the time at which its record was written. `None` if
    /// that is not known.
    far: Vec<(Option<Timestamp>, Entry<'a>)>,
    /// A run that no process holds, and whose record cannot be read because of an error of this host, with that error.
    /// `None` if there is no such run.
    unread: Option<(PathBuf, String)>,
    /// The pending requests for a lock at a location of the new run.
    late: Vec<(&'a StateDirectory, PendingRequest)>,
    /// The other pending requests of runs with the same data directory.
    others_late: Vec<(&'a StateDirectory, PendingRequest)>,
}

impl<'a> DueWork<'a> {
    /// Reads the pending requests and the journals in `states`.
    fn find(states: &'a [StateDirectory], here: &CandidateBackends, signals: &mut Signals) -> Self {
        let mut work = Self::default();
        for state in states {
            let now = ClockReading::now();
            let pending = PendingRequests::of(state).read(&now).into_iter();
            for pending in pending.filter(|pending| !pending.was_just_tried(now.time)) {
                match relation(&pending, here) {
                    Relation::SameLocation => work.late.push((state, pending)),
                    Relation::SameDirectory => work.others_late.push((state, pending)),
                    Relation::None => {}
                }
            }
            let Some(journal) = Journal::there(state) else { continue };
            for name in journal.names() {
                work.add_run(Entry { state, journal: journal.clone(), name }, here, signals);
            }
        }
        work
    }

    /// Adds the run `found`, if it is dead and due. Moves an invalid record away.
    fn add_run(&mut self, found: Entry<'a>, here: &CandidateBackends, signals: &mut Signals) {
        let Entry { journal, name, .. } = &found;
        match look(journal, name, |record| is_of(record, here), WaitLimits::BEFORE_TERRAFORM, signals) {
            FoundRun::Dead(record, entry, _) => {
                let turn = recovery_plan::turn(DeadRun {
                    is_near: is_of(&record, here),
                    was_tried: record.over,
                    is_recent: entry.was_written_within(RETRY_INTERVAL),
                });
                match turn {
                    Turn::BeforeTerraform => self.near.push(found),
                    Turn::InBackground => self.far.push((entry.written_at(), found)),
                    Turn::Later => {}
                }
            }
            FoundRun::Broken(_) => {
                if let Some(path) = journal.set_aside(name) {
                    console::say(&messages::set_aside(&path));
                }
            }
            FoundRun::Unread { path, error } => {
                // A run that may be alive is not reported.
                if matches!(journal.is_held(name), Ok(false)) {
                    self.unread.get_or_insert((path, error));
                }
            }
            FoundRun::Foreign(why, _) => trace!("run {name} is left alone: {why}"),
            FoundRun::Doubtful(_, processes) => trace!("run {name} is left alone: {processes:?}"),
            FoundRun::Living(_) | FoundRun::Recovering(_) | FoundRun::Gone => {}
        }
    }
}

impl Entry<'_> {
    /// Returns this run, which was found dead.
    fn dead(self, record: Box<JournalRecord>, entry: JournalEntry, standpoint: Standpoint) -> Dead {
        let pending_requests = PendingRequests::of(self.state).of_run(&record);
        Dead { record, entry, standpoint, journal: self.journal, pending_requests, reason: None }
    }
}

/// Returns those of the dead runs that are finished in the background now: the ones with the oldest records. Leaves out
/// a run that another process has begun to finish meanwhile.
fn oldest(mut far: Vec<(Option<Timestamp>, Entry<'_>)>) -> Vec<Dead> {
    far.sort_by_key(|(written, _)| *written);
    let far = far.into_iter().take(FAR_LIMIT);
    let dead = far.filter_map(|(_, found)| match found.journal.look(&found.name) {
        FoundRun::Dead(record, entry, standpoint) => Some(found.dead(record, entry, standpoint)),
        _ => None,
    });
    dead.collect()
}

/// Finishes dead runs before terraform starts. `here` are the candidate backends of the new run. This process must have
/// only one thread, because it forks.
pub(crate) fn before_run(states: &[StateDirectory], here: &CandidateBackends, signals: &mut Signals) -> Before {
    let DueWork { near, far, unread, late, others_late } = DueWork::find(states, here, signals);
    if let Some((path, error)) = unread {
        console::say(&messages::unread(&path, &error));
    }
    let far = oldest(far);
    if !far.is_empty() {
        finish_without_waiting(far);
    }
    let mut asked = None;
    check_pending_requests(&late, &others_late, here, signals, &mut asked);
    let tried = finish_near(near, here, signals, &mut asked);
    Before { asked, tried }
}

/// Checks for each of these pending requests whether its lock exists now. If so, releases the lock. `late` are the
/// requests for a lock at a location of `here`. Stores the first signal that asks `tf` to stop in `asked`.
fn check_pending_requests(
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
                messages: come.map(|(_, pending)| messages::came_late(&pending.lock)).collect(),
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

/// Finishes the dead runs `near`, until a signal asks `tf` to stop. Stores that signal in `asked`. Returns the runs
/// that could not be finished.
fn finish_near(
    near: Vec<Entry<'_>>,
    here: &CandidateBackends,
    signals: &mut Signals,
    asked: &mut Option<Signal>,
) -> Vec<Tried> {
    let mut tried = Vec::new();
    for found in near {
        if asked.is_some() {
            break;
        }
        // Another process may be finishing the run by now.
        let is_near = |record: &JournalRecord| is_of(record, here);
        let FoundRun::Dead(record, entry, standpoint) =
            look(&found.journal, &found.name, is_near, WaitLimits::BEFORE_TERRAFORM, signals)
        else {
            continue;
        };
        let dead = found.dead(record, entry, standpoint);
        let (name, journal) = (dead.record.run.clone(), dead.journal.clone());
        let keep = vec![dead.entry.lock_file().as_raw_fd()];
        let left = in_a_process(
            RecoveryProcess { keep, announced: true },
            || finish(dead, Audience::Person),
            console::say,
            signals,
            asked,
        );
        if journal.has(&name) {
            tried.push(Tried { run: name, lacks_credentials: left == Left::ForLackOfCredentials });
        }
    }
    tried
}

/// Returns the ID of each dead run that may have taken a lock at a location of `here`, or that had the same data
/// directory, with the pid of its `tf`. Leaves out the runs that another process is finishing. Does not change
/// anything.
pub(crate) fn dead(state: &StateDirectory, here: &CandidateBackends) -> Vec<(String, u32)> {
    let Some(journal) = Journal::there(state) else { return Vec::new() };
    let names = journal.names().into_iter();
    let dead = names.filter_map(|name| match journal.look(&name) {
        FoundRun::Dead(record, ..) if is_of(&record, here) => Some((name, record.tf)),
        _ => None,
    });
    dead.collect()
}

/// The result of [`everything`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Recovered {
    /// The number of runs, pending requests and invalid records that may still have a lock. In a dry run, this includes
    /// the runs with a lock that would be released.
    pub(crate) left: usize,
    /// Whether a lock was not released because no credentials were available.
    pub(crate) lacks_credentials: bool,
    /// The signal that asked `tf` to stop meanwhile. `None` if there was none.
    pub(crate) asked: Option<Signal>,
}

/// The arguments of [`everything`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request<'a> {
    /// Whether to report only which runs would be finished, and to change nothing.
    pub(crate) dry_run: bool,
    /// The ID of the only run to finish. `None` for all runs.
    pub(crate) only: Option<&'a str>,
    /// Whether to suppress the messages about locks that could not be released, because an earlier recovery printed
    /// them.
    pub(crate) again: bool,
    /// The reason that a person gave, for the history. `None` if no person gave one.
    pub(crate) reason: Option<&'a str>,
}

/// Finishes every dead run of this user on this host, or only the requested one, one after the other. Reports the
/// results with `say`. Waits for a run that another process is finishing, and for a run that may hold a lock and is
/// about to end (see [`ending`]). All these waits together are limited to [`OTHER_RECOVERY_TIMEOUT`]. A dry run does
/// not wait. This process must have only one thread, because it forks.
pub(crate) fn everything(request: Request<'_>, say: fn(&str), signals: &mut Signals) -> Recovered {
    let Request { dry_run, only, .. } = request;
    let mut everything = Everything { request, say, recovered: Recovered::default() };
    // One time limit for all runs together, because the caller must wait for all of them.
    let until = Instant::now() + if dry_run { Duration::ZERO } else { OTHER_RECOVERY_TIMEOUT };
    for state in StateDirectory::existing() {
        let Some(journal) = Journal::there(&state) else { continue };
        let names = match journal.list() {
            Ok(names) => names,
            Err(error) => {
                everything.recover(&state, &journal, journal.unlisted(&error), signals);
                continue;
            }
        };
        for name in names.into_iter().filter(|name| only.is_none_or(|only| only == name)) {
            let rest = until.saturating_duration_since(Instant::now());
            let limits = WaitLimits { recovering: rest, ending: rest };
            let found = look(&journal, &name, |_| true, limits, signals);
            everything.recover(&state, &journal, found, signals);
            let asked = &mut everything.recovered.asked;
            *asked = asked.or_else(|| signals.next_stop());
            if asked.is_some() {
                return everything.recovered;
            }
        }
        if only.is_none() && !dry_run {
            everything.check_pending_requests(&state, signals);
        }
    }
    everything.recovered
}

/// The state of [`everything`].
struct Everything<'a> {
    request: Request<'a>,
    say: fn(&str),
    recovered: Recovered,
}

impl Everything<'_> {
    /// Applies [`treatment`] to a run that was found in `journal`.
    fn recover(&mut self, state: &StateDirectory, journal: &Journal, found: FoundRun, signals: &mut Signals) {
        let mode = if self.request.dry_run { Mode::DryRun } else { Mode::Finish };
        let facts = facts(&found, journal);
        match (treatment(sight(&found), facts, mode), found) {
            (Treatment::Finish, FoundRun::Dead(record, entry, standpoint)) => {
                let pending_requests = PendingRequests::of(state).of_run(&record);
                let reason = self.request.reason.map(ToOwned::to_owned);
                self.finish(
                    Dead { record, entry, standpoint, journal: journal.clone(), pending_requests, reason },
                    signals,
                );
            }
            (Treatment::Announce, FoundRun::Dead(record, ..)) => {
                self.recovered.left += usize::from(record.log.may_hold());
                for lock in record.log.unreleased() {
                    (self.say)(&messages::would_recover(&record, lock));
                }
                for lock in record.log.unreleased_unnamed() {
                    (self.say)(&messages::would_look_for(&record, lock.progress.asked));
                }
            }
            (Treatment::SetAside, FoundRun::Broken(path)) => {
                let moved = path.file_name().and_then(OsStr::to_str).and_then(|name| journal.set_aside(name));
                let text = moved.map_or_else(|| messages::broken(&path), |path| messages::set_aside(&path));
                console::say(&text);
                self.recovered.left += 1;
            }
            (Treatment::Report, found) => {
                self.report(&found, journal);
                self.recovered.left += 1;
            }
            (_, FoundRun::Foreign(why, _)) => trace!("a run is left alone: {why}"),
            _ => {}
        }
    }

    fn finish(&mut self, dead: Dead, signals: &mut Signals) {
        let (name, journal, again) = (dead.record.run.clone(), dead.journal.clone(), self.request.again);
        let keep = vec![dead.entry.lock_file().as_raw_fd()];
        let said = Cell::new(false);
        let tell = |message: &str| {
            said.set(true);
            (self.say)(message);
        };
        let finish = || {
            let mut finished = finish(dead, Audience::Person);
            if again && finished.left != Left::Nothing {
                finished.messages.clear();
            }
            finished
        };
        let process = RecoveryProcess { keep, announced: true };
        let left = in_a_process(process, finish, tell, signals, &mut self.recovered.asked);
        // The run is still in the journal if a later recovery must try again, or if this recovery was killed. A run
        // does not count if it only has requests that may still land and nothing was reported about it.
        let is_left = journal.has(&name) && (said.get() || !only_awaits(&journal, &name));
        self.recovered.left += usize::from(left != Left::Nothing || is_left);
        self.recovered.lacks_credentials |= left == Left::ForLackOfCredentials;
    }

    /// Reports why a run is not finished.
    fn report(&self, found: &FoundRun, journal: &Journal) {
        match found {
            FoundRun::Broken(path) => console::say(&messages::broken(path)),
            FoundRun::Unread { path, error } => console::say(&messages::unread(path, error)),
            FoundRun::Foreign(why @ (READ_ONLY | LOCK_NOT_OPENED), Some(record)) => {
                (self.say)(&messages::cannot_be_finished(record, why));
            }
            FoundRun::Foreign(why, Some(record)) => {
                let (candidates, _) = candidates_of(record);
                let workspace_of = |lock: &RecordedLock| workspace_of_lock(record, &candidates, lock);
                (self.say)(&messages::cannot_be_judged(record, why, workspace_of));
            }
            FoundRun::Doubtful(record, processes) => (self.say)(&messages::may_be_alive(record, processes)),
            FoundRun::Living(record) => {
                let is_left = ending(record, journal) == Some(NearEnd::Left);
                console::say(&messages::still_ending(record, is_left, &journal.members(record)));
            }
            FoundRun::Recovering(record) => console::say(&messages::still_recovering(record)),
            FoundRun::Foreign(_, None) | FoundRun::Dead(..) | FoundRun::Gone => {}
        }
    }

    /// Checks for each pending request whether its lock exists now. If so, releases the lock.
    fn check_pending_requests(&mut self, state: &StateDirectory, signals: &mut Signals) {
        // All requests that were most likely refused share one time limit.
        let until = Instant::now() + EXPLANATION_TIMEOUT;
        for pending in PendingRequests::of(state).read(&ClockReading::now()) {
            // If a request was most likely refused, its lock most likely does not exist, so the wait is short.
            let limit =
                if pending.abandoned { until.saturating_duration_since(Instant::now()) } else { SERVICE_TIMEOUT };
            let look = || check_elsewhere(state, &pending, Effort { limit, ..Effort::WORK });
            let process = RecoveryProcess { keep: Vec::new(), announced: !pending.abandoned };
            let left = in_a_process(process, look, self.say, signals, &mut self.recovered.asked);
            self.recovered.left += usize::from(left != Left::Nothing);
        }
    }
}

/// Returns the [`Sight`] of a run that was found in the journal.
fn sight(found: &FoundRun) -> Sight {
    match found {
        FoundRun::Living(_) => Sight::Living,
        FoundRun::Recovering(_) => Sight::Recovering,
        FoundRun::Dead(..) => Sight::Dead,
        FoundRun::Foreign(READ_ONLY, _) => Sight::ReadOnly,
        FoundRun::Foreign(..) => Sight::Foreign,
        FoundRun::Doubtful(..) => Sight::Doubtful,
        FoundRun::Broken(_) => Sight::Broken,
        FoundRun::Unread { .. } => Sight::Unread,
        FoundRun::Gone => Sight::Gone,
    }
}

/// Returns the facts on which the treatment of `found` depends. A fact that does not matter in this state of the run is
/// false.
fn facts(found: &FoundRun, journal: &Journal) -> Facts {
    match found {
        FoundRun::Foreign(_, Some(record)) => {
            // If that is not known, the run is reported as one that nobody holds, and a person decides.
            let is_held = journal.is_held(&record.run).unwrap_or(false);
            Facts { may_hold: record.log.may_hold(), is_held, ..Facts::default() }
        }
        FoundRun::Doubtful(record, _) | FoundRun::Recovering(record) => {
            Facts { may_hold: may_hold(record), ..Facts::default() }
        }
        FoundRun::Living(record) => {
            let is_about_to_end = ending(record, journal).is_some();
            Facts { may_hold: is_about_to_end && may_hold(record), is_about_to_end, ..Facts::default() }
        }
        FoundRun::Unread { path, .. } => {
            let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
            Facts { is_held: journal.is_held(name).unwrap_or(false), ..Facts::default() }
        }
        FoundRun::Dead(..) | FoundRun::Foreign(_, None) | FoundRun::Broken(_) | FoundRun::Gone => Facts::default(),
    }
}

/// Checks whether the lock of a pending request exists now. If so, releases the lock. This changes the environment to
/// that of the run that sent the request, so call it only in a forked process.
fn check_elsewhere(state: &StateDirectory, pending: &PendingRequest, effort: Effort) -> Finished {
    let Some(record) = &pending.record else { return Finished::default() };
    enter(record);
    let (candidates, _) = candidates_of(record);
    let visited = check_pending(pending, &candidates, effort, &mut Waiter::Unattended);
    note_check(state, pending, visited.as_ref());
    report_of_check(pending, record, workspace_of_lock(record, &candidates, &pending.lock), visited)
}

/// How a pending request is related to the run that is about to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Relation {
    /// The new run uses the location of the lock.
    SameLocation,
    /// The request is from a run with the same data directory, but the new run does not use the location of the lock,
    /// for example because the lock belongs to another workspace.
    SameDirectory,
    None,
}

/// Returns how `pending` is related to a run with the candidate backends `here`.
fn relation(pending: &PendingRequest, here: &CandidateBackends) -> Relation {
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
            Finished { messages: vec![messages::came_late(&pending.lock)], left: Left::Nothing }
        }
        Some(Outcome::Kept { .. }) if pending.abandoned => Finished::default(),
        Some(Outcome::Kept { reason, because }) => Finished {
            messages: vec![messages::not_recovered(record, &pending.lock, workspace, (&reason, because))],
            left: Left::Lock,
        },
        Some(Outcome::Absent { .. }) | None => Finished::default(),
    }
}

/// Records the result of a check for the lock of a pending request. Once the service has answered, the request is
/// stored only for as long as it may land. If `visited` is `None`, no check was made, and nothing is recorded.
fn note_check(state: &StateDirectory, pending: &PendingRequest, visited: Option<&Outcome>) {
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

/// Changes the environment and the working directory of this process to those of the run of `record`.
fn enter(record: &JournalRecord) {
    environment::unset_empty("AWS_");
    for (name, value) in record.surroundings.changes() {
        environment::change(name, value.as_ref());
    }
    working_directory::go(Path::new(&record.directory));
}

/// The result of [`forget`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Forgotten {
    /// The lock or the run was deleted from the journal. The number is the pid of the run's `tf`.
    Yes(u32),
    /// Nothing was deleted: a process of the run is or may be alive, or another process is finishing the run. The
    /// number is the pid of the run's `tf`.
    Alive(u32),
    /// Nothing was deleted, because the journal cannot be changed. The text is the error.
    Failed(String),
    /// No run in the journal has this lock or this ID.
    Unknown,
}

/// Deletes the lock with the ID `what` from the journal. `what` can also be the ID of a run, because the IDs of its
/// locks may be unknown. If so, the whole run is deleted from the journal. The whole run is also deleted if it is a
/// [`FoundRun::Foreign`] and no process holds its lock file. Does not release a lock.
pub(crate) fn forget(what: &str) -> Forgotten {
    forget_in(&StateDirectory::existing(), what)
}

fn forget_in(states: &[StateDirectory], what: &str) -> Forgotten {
    for journal in states.iter().filter_map(Journal::there) {
        for name in journal.names() {
            match journal.look(&name) {
                FoundRun::Dead(mut record, entry, standpoint) => {
                    // A lock may be only in the recorder. Neither that lock nor another lock of its run can be deleted
                    // without it.
                    if standpoint == Standpoint::ThisBoot {
                        read_recorder(&mut record);
                    }
                    if is_named(&record, what) {
                        return forget_of(*record, &entry, what);
                    }
                }
                FoundRun::Living(mut record) | FoundRun::Recovering(mut record) | FoundRun::Doubtful(mut record, _) => {
                    read_recorder(&mut record);
                    if is_named(&record, what) {
                        return Forgotten::Alive(record.tf);
                    }
                }
                FoundRun::Foreign(_, Some(record)) if is_named(&record, what) => {
                    if journal.is_held(&name).unwrap_or(true) {
                        return Forgotten::Alive(record.tf);
                    }
                    return forgotten(journal.drop_record(&name), record.tf);
                }
                _ => {}
            }
        }
    }
    Forgotten::Unknown
}

/// Deletes the lock with the ID `what`, or the whole run if `what` is its ID, from the journal. `record` is the record
/// of the run, including what was only in its recorder.
fn forget_of(mut record: JournalRecord, entry: &JournalEntry, what: &str) -> Forgotten {
    let (tf, left) = (record.tf, rest_without(&record, what));
    if left.is_empty() {
        return forgotten(entry.take_away(), tf);
    }
    record.leave(left);
    let written = entry.write(&record, Durability::PowerLoss);
    if written.is_ok() {
        Recorder::clear_away(&record.run);
    }
    forgotten(written, tf)
}

/// Returns the result of a deletion from the journal. `tf` is the pid of the run's `tf`.
fn forgotten(deleted: io::Result<()>, tf: u32) -> Forgotten {
    deleted.map_or_else(|error| Forgotten::Failed(error.to_string()), |()| Forgotten::Yes(tf))
}

/// Whether `what` is the ID of the run of `record`, or of a lock that the run has not released.
fn is_named(record: &JournalRecord, what: &str) -> bool {
    record.run == what || record.log.named().any(|lock| lock.id == what && !lock.progress.is_gone())
}

/// Returns what is left of the run of `record` without the lock with the ID `what`. Nothing is left if `what` is the ID
/// of the run.
fn rest_without(record: &JournalRecord, what: &str) -> Unfinished {
    if record.run == what {
        return Unfinished::default();
    }
    let is_left = |lock: &&RecordedLock| lock.id != what && !lock.progress.is_gone();
    Unfinished {
        locks: record.log.named().filter(is_left).cloned().collect(),
        unnamed: record.log.unnamed().cloned().collect(),
        elsewhere: may_have_in_non_s3(record),
        unlogged: record.unlogged,
        replaced: record.replaced.clone(),
    }
}

/// Whether the run of `record` may have left a lock in a backend other than S3.
fn may_have_in_non_s3(record: &JournalRecord) -> bool {
    let may_have = record.log.of_workspaces().next().is_some() || !logs_its_lock(&record.command);
    may_have && record.access.iter().any(RedactedBackend::is_elsewhere)
}

/// Whether all that is left of the run `name` are lock requests that may still land, for locks with unknown IDs.
fn only_awaits(journal: &Journal, name: &str) -> bool {
    matches!(journal.look(name), FoundRun::Dead(record, ..) if has_only_requests(&record))
}

/// Does the same as [`only_awaits`] for the record of a dead run.
fn has_only_requests(record: &JournalRecord) -> bool {
    record.over && record.log.named().next().is_none() && record.log.unnamed().all(|lock| lock.progress.held.is_none())
}

/// Whether the run of `record` may have taken a lock at a location of `here`, or had the same data directory.
fn is_of(record: &JournalRecord, here: &CandidateBackends) -> bool {
    record.log.unreleased().any(|lock| !here.of(lock).is_empty())
        || record.log.unreleased_unnamed().any(|lock| !here.of_unnamed(lock).is_empty())
        || record.data_directory == here.data_directory
}

/// Whether a run may hold a lock. True if the log shows a lock. Also true if nothing of the log was read, because the
/// run was killed before that, or because `tf` cannot read the log. If the run was killed, its recorder may have more
/// of the log than its record, so the recorder is read as well.
fn may_hold(record: &JournalRecord) -> bool {
    record.log.may_hold() || record.log.program.is_none() || (!record.over && unrecorded_log_may_hold(record))
}

/// Whether the part of the log that is only in the recorder shows a lock. False if there is no recorder.
fn unrecorded_log_may_hold(record: &JournalRecord) -> bool {
    let Some(mut recorder) = Recorder::find(&record.run, record.log.clone(), record.offset) else { return false };
    let may_hold = recorder.read().may_hold();
    recorder.leave();
    may_hold
}

/// Why a run that is alive may be about to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NearEnd {
    /// The `tf` of the run is dead. The guardian of the run is still working, or processes of the run are still
    /// running.
    Orphaned,
    /// The parent of the run's `tf` is dead. That `tf` takes this as a request to stop
    /// (`supervise::event_loop::parent_to_watch`). A cancelled CI job starts its last step as soon as the shell of the
    /// job is dead, even if the `tf` below that shell is still running.
    Left,
}

/// Returns why a run that is alive is about to end. `None` if its `tf` is alive, and the parent of that `tf` is alive
/// or is not watched. Also `None` if the pids of the run are from another pid namespace. So the result is `None` for a
/// run that a person has interrupted, or for which its job waits: other runs do not wait for such a run.
fn ending(record: &JournalRecord, journal: &Journal) -> Option<NearEnd> {
    if record.host.numbers_processes_as(journal.host()) { near_end(record, is_alive) } else { None }
}

/// Does the same as [`ending`] for a run whose pids are from the pid namespace of this process. `is_alive` is whether
/// the process with a pid is alive.
fn near_end(record: &JournalRecord, is_alive: impl Fn(u32) -> bool) -> Option<NearEnd> {
    let gone = |pid: u32| !is_alive(pid);
    if gone(record.tf) {
        Some(NearEnd::Orphaned)
    } else {
        let parent = record.parent.and_then(|pid| u32::try_from(pid).ok());
        parent.is_some_and(gone).then_some(NearEnd::Left)
    }
}

/// How long to wait for a run.
#[derive(Clone, Copy, Debug)]
struct WaitLimits {
    /// The limit for a run that another process is finishing.
    recovering: Duration,
    /// The limit for a run that is about to end (see [`ending`]).
    ending: Duration,
}

impl WaitLimits {
    /// The limits of a `tf` that is about to start terraform.
    const BEFORE_TERRAFORM: Self = Self { recovering: OTHER_RECOVERY_TIMEOUT, ending: ORPHAN_EXIT_TIMEOUT };

    /// Returns the limit for a run that is about to end. If the run has no owner, no process stops its terraform, which
    /// may continue for a long time. If the processes of the run are already exiting, a short wait is enough.
    fn for_ending(self, has_owner: bool) -> Duration {
        if has_owner { self.ending } else { self.ending.min(ORPHAN_EXIT_TIMEOUT) }
    }
}

/// Returns the state of the run `name`. If `is_near` is true for the run's record, waits in two cases: another process
/// is finishing the run, or the run may hold a lock and is about to end (see [`ending`]). Without this wait, terraform
/// would find the lock held. A signal or the limit in `limits` ends the wait.
fn look(
    journal: &Journal,
    name: &str,
    is_near: impl Fn(&JournalRecord) -> bool,
    limits: WaitLimits,
    signals: &mut Signals,
) -> FoundRun {
    let begun = Instant::now();
    let mut waits = false;
    loop {
        let found = journal.look(name);
        let limit = match &found {
            FoundRun::Recovering(record) if is_near(record) => limits.recovering,
            FoundRun::Living(record) if is_near(record) && ending(record, journal).is_some() && may_hold(record) => {
                limits.for_ending(journal.has_owner(name))
            }
            _ => return found,
        };
        if begun.elapsed() > limit || poll::ready_now(signals.as_fd(), PollFlags::POLLIN) {
            return found;
        }
        if !std::mem::replace(&mut waits, true) {
            trace!("run {name} is waited for");
        }
        poll::wait(&[(signals.as_fd(), PollFlags::POLLIN)], Some(POLL_INTERVAL));
    }
}

/// Whether the process `pid` is running and is not exiting. A `tf` that was killed a moment ago may not be a zombie
/// yet, but does nothing any more. Its guardian takes over, and the caller must wait for the guardian.
///
/// The kernel first takes the SIGKILL from the queue of the process, and marks the process as exiting a few
/// instructions later. In between, neither is visible. So the process is checked twice, 2 ms apart. If the kernel needs
/// more time than that, this run does not wait, and its terraform finds the lock held, as it would without `tf`. After
/// such a refusal, the run checks again.
fn is_alive(pid: u32) -> bool {
    let Some(process) = i32::try_from(pid).ok().map(Pid::from_raw).and_then(Process::look_up) else { return false };
    !process.is_dying() && {
        poll::wait(&[], Some(Duration::from_millis(2)));
        !process.is_dying()
    }
}

/// Finishes runs of other locations in the background, one after the other. Each run is finished in a separate process,
/// because that process changes its environment.
fn finish_without_waiting(runs: Vec<Dead>) {
    let mut keep: Vec<RawFd> = runs.iter().map(|dead| dead.entry.lock_file().as_raw_fd()).collect();
    keep.extend(trace::descriptor());
    let work = || {
        for dead in runs {
            let keep: Vec<RawFd> =
                [dead.entry.lock_file().as_raw_fd()].into_iter().chain(trace::descriptor()).collect();
            let forked = detached::run(RECOVERY, detached::Parent::Us, &keep, || drop(finish(dead, Audience::Nobody)));
            if let Ok(Some(pid)) = forked {
                let _ = nix::sys::wait::waitpid(pid, None);
            }
        }
    };
    if let Err(error) = detached::run(RECOVERY, detached::Parent::Init, &keep, work) {
        trace!("no process for the recovery: {error}");
    }
}

/// Who reads the messages of a recovery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Audience {
    /// A person reads the messages.
    Person,
    /// Nobody: the recovery works in the background. Results that a person must read stay in the journal, until a
    /// recovery reports them to a person.
    Nobody,
}

/// Finishes one dead run. This changes the environment, so call it only in a forked process.
fn finish(dead: Dead, audience: Audience) -> Finished {
    let Dead { mut record, entry, standpoint, journal, pending_requests, reason } = dead;
    trace!("recovery: run {} is dead ({standpoint:?})", record.run);
    crash_point::reached("recovery: begun");
    if standpoint == Standpoint::ThisBoot {
        read_recorder(&mut record);
    }
    enter(&record);
    let sent_until = match last_sign(standpoint, record.over) {
        // A record of an earlier version does not say when it was closed.
        LastSign::RecordClosed => record.closed.clone().or_else(|| entry.written_at().map(ClockReading::of_time)),
        LastSign::Boot => Some(ClockReading::now().at_boot()),
        LastSign::None => None,
    };
    let context = CleanUpContext { journal: &journal, pending_requests: &pending_requests, sent_until };
    let (finished, unfinished) = clean_up_after(&record, context, reason.as_deref(), audience);
    crash_point::reached("recovery: cleaned up");
    let run = record.run.clone();
    if entry.close(*record, unfinished).is_ok() {
        Recorder::clear_away(&run);
    }
    crash_point::reached("recovery: closed");
    finished
}

/// Adds to `record` the latest part of the run's log, which may be only in the recorder. The recorder is in memory. That
/// part is lost if the run's container or the run's session directory was removed.
fn read_recorder(record: &mut JournalRecord) {
    if record.over {
        return;
    }
    let Some(mut recorder) = Recorder::find(&record.run, record.log.clone(), record.offset) else { return };
    record.log = recorder.read().clone();
    record.unlogged = recorder.is_closed();
    // As long as the record exists, a later recovery may need the recorder too, so do not delete it here.
    recorder.leave();
}

/// The event before which every request of a dead run was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LastSign {
    /// The record was closed. Terraform was dead then.
    RecordClosed,
    /// The machine was booted.
    Boot,
    /// No such event is known.
    None,
}

/// Returns the event before which every request of a dead run was sent. `over` is whether the record was closed.
fn last_sign(standpoint: Standpoint, over: bool) -> LastSign {
    match standpoint {
        Standpoint::EarlierBoot => LastSign::Boot,
        Standpoint::ThisBoot if over => LastSign::RecordClosed,
        // The time of the last log record says nothing: terraform may have been frozen since then, or the host asleep,
        // and it may have sent a request just before it was killed.
        Standpoint::ThisBoot | Standpoint::Foreign(_) => LastSign::None,
    }
}

/// What a recovery knows about a run beside its record.
#[derive(Clone)]
struct CleanUpContext<'a> {
    journal: &'a Journal,
    pending_requests: &'a PendingRequests,
    /// The time after which no process of the run can have sent a request. `None` if that is not known.
    sent_until: Option<ClockReading>,
}

fn clean_up_after(
    record: &JournalRecord,
    CleanUpContext { journal, pending_requests, sent_until }: CleanUpContext<'_>,
    reason: Option<&str>,
    audience: Audience,
) -> (Finished, Unfinished) {
    let non_s3 = may_have_in_non_s3(record);
    if !record.log.may_hold() && !non_s3 && !record.unlogged && record.replaced.is_empty() {
        return Default::default();
    }
    let now = Timestamp::now();
    let (candidates, missing) = candidates_of(record);
    let ending = messages::earlier_run(record);
    let program = binary::find(binary::name(Some(OsStr::new(&record.program)))).map_err(|error| error.to_string());
    let run = EndedRun {
        by: By::Recovery,
        ending: &ending,
        history: ("its run on this host is dead", reason),
        id: &record.run,
        log: &record.log,
        log_state: if record.unlogged { LogState::NeverBegun } else { LogState::Complete },
        candidates: &candidates,
        // It is unknown how terraform ended. With `died`, a lock belongs to the run if the log names the lock and
        // nothing in the lock contradicts the log.
        died: true,
        ended: None,
        // The run worked at least until the time of the last record in its log.
        until: record.log.latest.unwrap_or(record.started),
        replaced: &record.replaced,
        release_context: ReleaseContext {
            run: record.proof(),
            // The location is read only once: if the request lands later, it is handled as a pending request.
            request_may_land: false,
            write_may_land: may_land(sent_until.as_ref(), &ClockReading::now()),
            is_network_shared: record.host.shows_its_connections(),
            reached: record.reached(),
        },
        permission: if is_never(record) { Permission::NameOnly } else { Permission::Release },
        unknown_backends: (!missing.is_empty()).then(|| messages::missing(&missing.join(", "), &record.data_directory)),
        journal: Some(journal),
        pending_requests: Some(pending_requests),
        non_s3: non_s3.then(|| non_s3_cleanup(record, &candidates, program.as_ref())).flatten(),
    };
    let mut reporter =
        RecoveryReporter { record, audience, now, messages: Vec::new(), left: Left::Nothing, suspect: None };
    let CleanUpResult { unfinished, kept_on_purpose } = clean_up(&run, &mut reporter, &mut Waiter::Unattended);
    // Before a message says that a lock was not released: a taker of this host must not release it afterwards.
    let kept_locks = journal.kept_locks();
    for lock in record.log.named().filter(|lock| !kept_on_purpose.contains(&lock.id)) {
        kept_locks.remove(&lock.id);
    }
    for id in kept_on_purpose.iter().chain(&reporter.suspect) {
        kept_locks.add(id);
    }
    let RecoveryReporter { mut messages, left, .. } = reporter;
    if let Some(path) = errored_state(Path::new(&record.working_directory()), record.started) {
        let message = |there: CommandDirectories<'_>| messages::errored_state(&path, &record.program, there);
        messages.push(messages::in_directories_of(record, likely_workspace(record), message));
    }
    (Finished { messages, left }, unfinished)
}

/// Returns the data that are needed to release the lock that a dead run may have left in a backend other than S3.
/// `program` is the terraform that releases the lock: the program that is found now under the name that the run used,
/// or the reason why none is found. Returns `None` if the backend is S3 or is unknown.
fn non_s3_cleanup<'a>(
    record: &'a JournalRecord,
    candidates: &'a CandidateBackends,
    program: Result<&'a Binary, &String>,
) -> Option<NonS3Cleanup<'a>> {
    let (directory, chdir) = (Path::new(&record.directory), record.chdir.as_deref().map(Path::new));
    let release = match program {
        Ok(program) => Ok(NonS3Release::of(candidates, &record.log, &program.path, directory, chdir)?),
        Err(reason) => Err(reason.clone()),
    };
    let workspace = release.as_ref().map_or_else(|_| likely_workspace(record), |release| Some(release.workspace()));
    let unlock = messages::unlock_command_of(record, workspace);
    Some(NonS3Cleanup { release, is_logged: logs_its_lock(&record.command), unlock })
}

/// Collects the messages about a dead run. The process that forked this one prints them.
struct RecoveryReporter<'a> {
    record: &'a JournalRecord,
    audience: Audience,
    now: Timestamp,
    messages: Vec<String>,
    left: Left,
    /// The ID of the lock that a run without a log may have left. `None` if there is none.
    suspect: Option<String>,
}

impl Reporter for RecoveryReporter<'_> {
    fn result(&mut self, run: &EndedRun<'_>, result: &ReleaseResult, is_remembered: bool) {
        let (record, lock) = (self.record, &result.lock);
        match &result.outcome {
            Some(Outcome::Released(released)) => {
                self.messages.push(messages::recovered(record, lock, released.claim.as_ref(), self.now));
                if released.is_partial && is_remembered {
                    self.messages.push(messages::other_part_may_land(lock, true, ""));
                }
                if let Some(mismatch) = &released.digest_mismatch {
                    let workspace = run.candidates.workspace_of_lock(lock);
                    let message = |there: CommandDirectories<'_>| messages::digest_mismatch(mismatch, workspace, there);
                    self.messages.push(messages::in_directories_of(record, None, message));
                }
            }
            Some(Outcome::Kept { reason, because }) => {
                self.messages.push(if *because == Because::OtherAccount {
                    messages::not_seen(run.ending, lock, run.release_context.reached.needs())
                } else {
                    let workspace = workspace_of_lock(record, run.candidates, lock);
                    messages::not_recovered(record, lock, workspace, (reason, *because))
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
        self.messages.push(messages::replaced_earlier(self.record, &replaced.own, &replaced.by, workspace));
    }

    /// Reports nothing, because the terraform of the dead run has reported the refusal itself.
    fn refusals(&mut self, _: &EndedRun<'_>, _: &[ReleaseResult], _: &mut Waiter<'_>) {}

    fn unidentified(&mut self, run: &EndedRun<'_>, locks: &CandidateLocks) {
        for (info, reason) in &locks.suspects {
            let workspace = run.candidates.workspace_of_path(&info.path).or_else(|| likely_workspace(self.record));
            self.messages.push(messages::may_be_its(self.record, info, workspace, reason));
            self.left = self.left.max(Left::Lock);
        }
        for (_, reason) in &locks.unread {
            self.messages.push(messages::not_looked_for_again(self.record, reason));
        }
    }

    /// Reports a lock that the run may have left at the location that the run would lock, or reports that this location
    /// could not be read. Returns true if the next `tf` must look again, because the location could not be read or
    /// nobody reads the report. Returns false if there is no such lock, or if the search could not be made at all.
    fn lost_log(&mut self, run: &EndedRun<'_>, waiter: &mut Waiter<'_>) -> bool {
        let Some(location) = run.candidates.selected() else { return false };
        let (message, is_unread) = match waiter.block_on(release::suspect(&location, &run.release_context.run, true)) {
            Ok(Ok(Some(info))) => {
                let message = |there: CommandDirectories<'_>| messages::unlogged(run.ending, Some(&info), there);
                let message = messages::in_directories_of(self.record, likely_workspace(self.record), message);
                self.suspect = Some(info.id);
                (message, false)
            }
            Ok(Err(failure)) => {
                let list = messages::locks_command_of(self.record, "", likely_workspace(self.record));
                (messages::suspect_not_looked_for(run.ending, &failure.to_string(), &list), true)
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
        messages::unlock_command_of(self.record, Some(workspace))
    }

    fn has_journal(&self) -> bool {
        true
    }

    fn is_read(&self) -> bool {
        self.audience == Audience::Person
    }
}

/// Whether to report the locks of a dead run without releasing them. This is the case if `TFW_RELEASE` is `never` for
/// this recovery. It is also the case if it was `never` for the run, and is not `auto` for this recovery.
fn is_never(record: &JournalRecord) -> bool {
    settings::only_reports(settings::release(|name| std::env::var_os(name)), record.named_only)
}

/// Returns what a recovery has left if it did not release a lock because of `because`.
fn left_because(because: Because) -> Left {
    if because == Because::NoCredentials { Left::ForLackOfCredentials } else { Left::Lock }
}

/// Returns the workspace that a dead run most likely used. `None` if the record names none.
fn likely_workspace(record: &JournalRecord) -> Option<&str> {
    record.workspaces.first().map(String::as_str)
}

/// Returns the workspace of the state that `lock` locks: a command may lock another workspace than the selected one
/// (`workspace delete`). Returns the most likely workspace if the location of the lock is unknown. `None` if the record
/// names no workspace.
fn workspace_of_lock<'a>(
    record: &'a JournalRecord,
    candidates: &'a CandidateBackends,
    lock: &RecordedLock,
) -> Option<&'a str> {
    candidates.workspace_of_lock(lock).or_else(|| likely_workspace(record))
}

/// Returns the candidate backends of a dead run, and the backend attributes that are no longer available. A backend
/// that cannot be reached without such an attribute is not among the candidates.
fn candidates_of(record: &JournalRecord) -> (CandidateBackends, Vec<String>) {
    let after = DataDirectory::read(Path::new(&record.data_directory), Path::new(&record.working_directory()));
    let mut missing = Vec::new();
    let directories = record.access.iter().filter_map(|access| match access.backend(after.backend.as_ref()) {
        Ok(backend) => Some(DataDirectory { backend: Some(backend), workspace: after.workspace.clone() }),
        Err(attributes) => {
            missing.push(attributes);
            None
        }
    });
    let mut candidates = CandidateBackends {
        directories: directories.collect(),
        workspaces: record.workspaces.clone(),
        any_workspace: is_for_any_workspace(&record.command),
        data_directory: record.data_directory.clone(),
        working_directory: record.working_directory().into(),
    };
    // Only the data directory after the run shows the backend that an `init` has set up and the workspace that a
    // `workspace select` has selected.
    candidates.workspaces.push(after.workspace.clone());
    candidates.directories.push(after);
    if let Some(plan) = &record.plan {
        candidates = candidates.with_plan(&PlannedBackends::of_plan(Path::new(plan)));
    }
    (candidates, missing)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aws::redacted_backend;
    use crate::journal::runs::run_id;
    use crate::lock::outcome::Released;
    use crate::terraform::backend::CachedBackend;
    use crate::terraform::lock_info::LockInfo;
    use crate::terraform::log::tests::{ID, lock_line, unlock_line};
    use crate::terraform::log::{LockIdentity, LoggedLock, UnnamedLock};
    use crate::terraform::logged_lock::Progress;

    const RUN: &str = "4000000-0123456789abcdef";
    const OTHER_ID: &str = "6e75cb05-d70c-4132-39e0-d2abba1b3077";

    fn requested(id: &str) -> String {
        lock_line(7, "Attempting to lock remote state (DynamoDB only)...", id, id)
    }

    /// Returns the record of a run in `/x` with the log `log`.
    fn record(log: &str) -> JournalRecord {
        let root = tempfile::tempdir().unwrap();
        let journal = Journal::open(&StateDirectory::at(root.path())).unwrap();
        let mut record = JournalRecord::new(RUN, &journal);
        record.data_directory = "/x/.terraform".into();
        record.log.read(log.as_bytes());
        record
    }

    fn unnamed(is_held: bool) -> UnnamedLock {
        let at = "2026-11-23T01:46:07Z".parse().unwrap();
        let mut progress = Progress::asked(at);
        if is_held {
            progress.grant(at);
        }
        let identity = LockIdentity::Object { bucket: "bkt".into(), key: "k".into(), checksum: None };
        UnnamedLock { identity, progress }
    }

    /// Returns the candidates of a run with the data directory `data_directory` that locks `bkt/KEY` in a table.
    fn candidates(data_directory: &str, key: &str) -> CandidateBackends {
        let backend = format!(
            r#"{{"version":3,"backend":{{"type":"s3","config":{{"bucket":"bkt","key":"{key}","dynamodb_table":"t"}}}}}}"#
        );
        let backend = CachedBackend::parse(backend.as_bytes());
        CandidateBackends {
            directories: vec![DataDirectory { backend, workspace: "default".into() }],
            workspaces: vec!["default".into()],
            any_workspace: false,
            data_directory: data_directory.into(),
            working_directory: "/x".into(),
        }
    }

    fn pending(record: Option<JournalRecord>, abandoned: bool) -> PendingRequest {
        let of = super::tests::record(&requested(ID));
        let lock = of.log.named().next().unwrap().clone();
        let new = PendingRequest::new(&lock, &of.proof());
        PendingRequest { record: record.map(Box::new), abandoned, ..new }
    }

    /// Each reason for not releasing a lock.
    fn reasons() -> [Because; 12] {
        [
            Because::Doubt,
            Because::Settings,
            Because::Never,
            Because::StillRunning { several: false },
            Because::Unseen,
            Because::NotYet,
            Because::NoAnswer,
            Because::NoCredentials,
            Because::Denied("dynamodb:GetItem"),
            Because::NoLock,
            Because::Claimed,
            Because::OtherAccount,
        ]
    }

    fn kept(because: Because) -> Outcome {
        Outcome::Kept { reason: "why".into(), because }
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
    fn a_dead_run_is_of_this_location_by_its_unreleased_locks_or_its_directory() {
        const KEY: &str = "dir/prod.tfstate";
        let released = requested(ID) + &unlock_line(9, "Unlocked remote state (DynamoDB only)", ID);
        let is_released = record(&released).log.unreleased().next().is_none();
        assert!(is_released, "the log shows the end of the lock");
        for (log, directory, key, expected) in [
            (requested(ID), "/y/.terraform", KEY, true),
            (requested(ID), "/y/.terraform", "other", false),
            (requested(ID), "/x/.terraform", "other", true),
            (released, "/y/.terraform", KEY, false),
            (String::new(), "/y/.terraform", KEY, false),
            (String::new(), "/x/.terraform", "other", true),
        ] {
            assert_eq!(is_of(&record(&log), &candidates(directory, key)), expected, "{log} {directory} {key}");
        }
        let mut nameless = record("");
        nameless.log.set_locks([LoggedLock::Unnamed(unnamed(false))]);
        assert!(is_of(&nameless, &candidates("/y/.terraform", "k")));
        assert!(!is_of(&nameless, &candidates("/y/.terraform", "other")));
    }

    /// A `workspace delete green` locks the state of `green`, and not that of the selected workspace.
    #[test]
    fn the_workspace_of_a_lock_is_that_of_its_state_or_else_the_one_that_was_selected() {
        let lock = record(&requested(ID)).log.named().next().unwrap().clone();
        let mut record = record("");
        record.workspaces = vec!["green".into(), "default".into()];
        for (key, expected) in [("dir/prod.tfstate", "default"), ("another", "green")] {
            let candidates =
                CandidateBackends { workspaces: record.workspaces.clone(), ..candidates("/x/.terraform", key) };
            assert_eq!(workspace_of_lock(&record, &candidates, &lock), Some(expected), "{key}");
        }
        record.workspaces.clear();
        assert_eq!(workspace_of_lock(&record, &candidates("/x/.terraform", "another"), &lock), None);
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

    #[test]
    fn what_is_forgotten_is_one_lock_or_a_whole_run_and_nothing_else() {
        let gone = "7e75cb05-d70c-4132-39e0-d2abba1b3077";
        let log = [
            requested(ID),
            requested(OTHER_ID),
            requested(gone),
            unlock_line(9, "Unlocked remote state (DynamoDB only)", gone),
        ]
        .concat();
        let mut record = record(&log);
        let named: Vec<LoggedLock> = record.log.locks().to_vec();
        record.log.set_locks(named.into_iter().chain([LoggedLock::Unnamed(unnamed(true))]));
        record.unlogged = true;
        let by = LockInfo::default();
        record.replaced = vec![Replaced { own: record.log.named().next().unwrap().clone(), by }];
        for (what, is_meant) in
            [(ID, true), (OTHER_ID, true), (RUN, true), (gone, false), ("", false), ("4000000", false)]
        {
            assert_eq!(is_named(&record, what), is_meant, "{what}");
        }
        let rest = rest_without(&record, ID);
        assert_eq!(rest.locks.iter().map(|lock| lock.id.as_str()).collect::<Vec<_>>(), [OTHER_ID]);
        assert_eq!((rest.unnamed.len(), rest.unlogged, rest.elsewhere), (1, true, false));
        assert_eq!(rest.replaced, record.replaced);
        assert!(rest_without(&record, RUN).is_empty());
    }

    #[test]
    fn a_lock_in_another_backend_is_left_when_a_lock_in_s3_is_forgotten() {
        for (command, kind, expected) in [("init", "gcs", true), ("apply", "gcs", false), ("init", "s3", false)] {
            let mut record = record(&requested(ID));
            record.command = command.into();
            let backend = format!(r#"{{"version":3,"backend":{{"type":"{kind}","config":{{"bucket":"b"}}}}}}"#);
            let backend = CachedBackend::parse(backend.as_bytes());
            record.access = redacted_backend::of_run([&backend.unwrap()]).0;
            assert_eq!(rest_without(&record, ID).elsewhere, expected, "{command} {kind}");
        }
    }

    /// Returns a journal with a dead run whose record has the lock `ID`, and whose recorder has `OTHER_ID` too. Also
    /// returns the path of the run's directory.
    fn dead_run() -> (tempfile::TempDir, StateDirectory, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let state = StateDirectory::at(root.path());
        let journal = Journal::open(&state).unwrap();
        let mut record = JournalRecord::new(&run_id(), &journal);
        record.log.read(requested(ID).as_bytes());
        let recorder = Recorder::open(&record.run, "INFO", true, |_| None).unwrap();
        std::fs::write(recorder.path(), requested(ID) + &requested(OTHER_ID)).unwrap();
        recorder.leave();
        let path = root.path().join("runs").join(&record.run);
        drop(journal.begin(&record).unwrap());
        // A child process of another test may have the descriptors for a moment.
        while journal.is_held(&record.run).unwrap() {
            poll::wait(&[], Some(Duration::from_millis(5)));
        }
        (root, state, path)
    }

    fn locks_of(path: &Path) -> Vec<String> {
        let record: JournalRecord = serde_json::from_slice(&std::fs::read(path.join("record.json")).unwrap()).unwrap();
        record.log.named().map(|lock| lock.id.clone()).collect()
    }

    #[test]
    fn a_lock_that_only_the_recorder_has_is_left_or_forgotten_like_any_other() {
        for (first, second) in [(ID, OTHER_ID), (OTHER_ID, ID)] {
            let (_root, state, path) = dead_run();
            let states = [state];
            assert_eq!(forget_in(&states, first), Forgotten::Yes(std::process::id()));
            assert_eq!(locks_of(&path), [second]);
            assert_eq!(forget_in(&states, first), Forgotten::Unknown);
            assert_eq!(forget_in(&states, second), Forgotten::Yes(std::process::id()));
            assert!(!path.exists());
        }
    }

    #[test]
    fn what_cannot_be_deleted_from_the_journal_is_not_forgotten() {
        let (_root, state, path) = dead_run();
        let states = [state];
        let run = path.file_name().unwrap().to_str().unwrap();
        // A directory in the way of the new record.
        let in_the_way = path.join(format!("record.{}", std::process::id()));
        std::fs::create_dir(&in_the_way).unwrap();
        assert!(matches!(forget_in(&states, OTHER_ID), Forgotten::Failed(_)));
        assert_eq!(locks_of(&path), [ID], "the record is unchanged");
        std::fs::remove_dir(in_the_way).unwrap();
        // The recorder is unchanged too.
        assert_eq!(forget_in(&states, ID), Forgotten::Yes(std::process::id()));
        assert_eq!(locks_of(&path), [OTHER_ID]);
        // A file in the way of the rename of the directory.
        let in_the_way = path.with_file_name(format!(".old-{run}"));
        std::fs::write(&in_the_way, "").unwrap();
        for what in [OTHER_ID, run] {
            assert!(matches!(forget_in(&states, what), Forgotten::Failed(_)), "{what}");
            assert_eq!(locks_of(&path), [OTHER_ID], "{what}");
        }
        std::fs::remove_file(in_the_way).unwrap();
        assert_eq!(forget_in(&states, run), Forgotten::Yes(std::process::id()));
    }

    #[test]
    fn a_run_that_only_has_requests_that_may_land_is_not_counted() {
        for (over, locks, expected) in [
            (true, vec![], true),
            (true, vec![LoggedLock::Unnamed(unnamed(false))], true),
            (true, vec![LoggedLock::Unnamed(unnamed(false)), LoggedLock::Unnamed(unnamed(true))], false),
            (true, record(&requested(ID)).log.locks().to_vec(), false),
            (false, vec![], false),
            (false, vec![LoggedLock::Unnamed(unnamed(false))], false),
        ] {
            let mut record = record("");
            record.over = over;
            record.log.set_locks(locks.clone());
            assert_eq!(has_only_requests(&record), expected, "{over} {locks:?}");
        }
    }

    #[test]
    fn a_run_is_about_to_end_when_its_tf_or_the_parent_that_it_watches_is_dead() {
        for (tf_lives, parent, parent_lives, expected) in [
            (true, None, false, None),
            (true, Some(6), true, None),
            (true, Some(6), false, Some(NearEnd::Left)),
            (true, Some(-6), false, None),
            (false, None, false, Some(NearEnd::Orphaned)),
            (false, Some(6), true, Some(NearEnd::Orphaned)),
            (false, Some(6), false, Some(NearEnd::Orphaned)),
        ] {
            let record = JournalRecord { tf: 5, parent, ..record("") };
            let found = near_end(&record, |pid| if pid == 5 { tf_lives } else { pid == 6 && parent_lives });
            assert_eq!(found, expected, "{tf_lives} {parent:?} {parent_lives}");
        }
    }

    #[test]
    fn the_wait_for_a_run_without_an_owner_is_short() {
        for (ending, with_owner, without) in [(30, 30, 2), (1, 1, 1), (0, 0, 0)] {
            let limits = WaitLimits { recovering: Duration::from_secs(99), ending: Duration::from_secs(ending) };
            assert_eq!(limits.for_ending(true), Duration::from_secs(with_owner));
            assert_eq!(limits.for_ending(false), Duration::from_secs(without));
        }
    }

    #[test]
    fn the_last_request_was_sent_before_the_record_was_closed_or_before_the_boot() {
        for (standpoint, over, expected) in [
            (Standpoint::ThisBoot, true, LastSign::RecordClosed),
            // How long ago the record was closed depends on the time of day, which may have been wrong.
            (Standpoint::EarlierBoot, true, LastSign::Boot),
            (Standpoint::Foreign("x"), true, LastSign::None),
            (Standpoint::ThisBoot, false, LastSign::None),
            (Standpoint::EarlierBoot, false, LastSign::Boot),
            (Standpoint::Foreign("x"), false, LastSign::None),
        ] {
            assert_eq!(last_sign(standpoint, over), expected, "{standpoint:?} {over}");
        }
    }

    #[test]
    fn only_auto_releases_the_locks_of_a_run_that_was_told_not_to() {
        for (setting, of_release_run, of_report_run) in [
            (None, false, true),
            (Some("never"), true, true),
            (Some("auto"), false, false),
            (Some(""), false, true),
            (Some("Never"), true, true),
        ] {
            let read = || settings::release(|_| setting.map(Into::into));
            assert_eq!(settings::only_reports(read(), false), of_release_run, "{setting:?}");
            assert_eq!(settings::only_reports(read(), true), of_report_run, "{setting:?}");
        }
    }

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
