//! The recovery that a person or a script requests (`tf locks recover`): of every dead run, whatever its directory.

use std::cell::Cell;
use std::ffi::OsStr;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::dead_run::{candidates_of, has_only_requests, may_hold, workspace_of_lock};
use super::finish::{Dead, finish};
use super::look::{NearEnd, OTHER_RECOVERY_TIMEOUT, WaitLimits, ending, look};
use super::reporter::Audience;
use super::requests::check_elsewhere;
use crate::cleanup::forked_recovery::{Left, RecoveryProcess, in_a_process};
use crate::cleanup::messages;
use crate::cleanup::recovery_plan::{Facts, Mode, Sight, Treatment, treatment};
use crate::console;
use crate::journal::clock_reading::ClockReading;
use crate::journal::pending_requests::PendingRequests;
use crate::journal::runs::{FoundRun, Journal, LOCK_NOT_OPENED, READ_ONLY};
use crate::journal::state_directory::StateDirectory;
use crate::lock::release::{EXPLANATION_TIMEOUT, Effort, SERVICE_TIMEOUT};
use crate::sys::signals::Signals;
use crate::terraform::log::RecordedLock;
use crate::trace::trace;

/// The result of [`every_run`].
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

/// The arguments of [`every_run`].
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
pub(crate) fn every_run(request: Request<'_>, say: fn(&str), signals: &mut Signals) -> Recovered {
    let Request { dry_run, only, .. } = request;
    let mut every = EveryRun { request, say, recovered: Recovered::default() };
    // One time limit for all runs together, because the caller must wait for all of them.
    let until = Instant::now() + if dry_run { Duration::ZERO } else { OTHER_RECOVERY_TIMEOUT };
    for state in StateDirectory::existing() {
        let Some(journal) = Journal::there(&state) else { continue };
        let names = match journal.list() {
            Ok(names) => names,
            Err(error) => {
                every.recover(&state, &journal, journal.unlisted(&error), signals);
                continue;
            }
        };
        for name in names.into_iter().filter(|name| only.is_none_or(|only| only == name)) {
            let rest = until.saturating_duration_since(Instant::now());
            let limits = WaitLimits { recovering: rest, ending: rest };
            let found = look(&journal, &name, |_| true, limits, signals);
            every.recover(&state, &journal, found, signals);
            let asked = &mut every.recovered.asked;
            *asked = asked.or_else(|| signals.next_stop());
            if asked.is_some() {
                return every.recovered;
            }
        }
        if only.is_none() && !dry_run {
            every.check_pending_requests(&state, signals);
        }
    }
    every.recovered
}

/// The state of [`every_run`].
struct EveryRun<'a> {
    request: Request<'a>,
    say: fn(&str),
    recovered: Recovered,
}

impl EveryRun<'_> {
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
                    (self.say)(&messages::recovery::would_recover(&record, lock));
                }
                for lock in record.log.unreleased_unnamed() {
                    (self.say)(&messages::recovery::would_look_for(&record, lock.progress.asked));
                }
            }
            (Treatment::SetAside, FoundRun::Broken(path)) => {
                let moved = path.file_name().and_then(OsStr::to_str).and_then(|name| journal.set_aside(name));
                let text = moved
                    .map_or_else(|| messages::recovery::broken(&path), |path| messages::recovery::set_aside(&path));
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
            FoundRun::Broken(path) => console::say(&messages::recovery::broken(path)),
            FoundRun::Unread { path, error } => console::say(&messages::recovery::unread(path, error)),
            FoundRun::Foreign(why @ (READ_ONLY | LOCK_NOT_OPENED), Some(record)) => {
                (self.say)(&messages::recovery::cannot_be_finished(record, why));
            }
            FoundRun::Foreign(why, Some(record)) => {
                let (candidates, _) = candidates_of(record);
                let workspace_of = |lock: &RecordedLock| workspace_of_lock(record, &candidates, lock);
                (self.say)(&messages::recovery::cannot_be_judged(record, why, workspace_of));
            }
            FoundRun::Doubtful(record, processes) => (self.say)(&messages::recovery::may_be_alive(record, processes)),
            FoundRun::Living(record) => {
                let is_left = ending(record, journal) == Some(NearEnd::Left);
                console::say(&messages::recovery::still_ending(record, is_left, &journal.members(record)));
            }
            FoundRun::Recovering(record) => console::say(&messages::recovery::still_recovering(record)),
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

/// Whether the run `name` is dead and [`has_only_requests`].
fn only_awaits(journal: &Journal, name: &str) -> bool {
    matches!(journal.look(name), FoundRun::Dead(record, ..) if has_only_requests(&record))
}
