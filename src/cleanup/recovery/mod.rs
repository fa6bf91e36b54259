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

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use nix::sys::signal::Signal;

use self::dead_run::is_of;
use self::finish::{Dead, finish, finish_without_waiting};
use self::look::{WaitLimits, look};
use self::reporter::Audience;
use self::requests::{Relation, check_pending_requests, relation};
use crate::cleanup::candidate_backends::CandidateBackends;
use crate::cleanup::forked_recovery::{Left, RecoveryProcess, in_a_process};
use crate::cleanup::recovery_plan::{DeadRun, Turn};
use crate::cleanup::{messages, recovery_plan};
use crate::console;
use crate::journal::clock_reading::ClockReading;
use crate::journal::host::Standpoint;
use crate::journal::pending_requests::{PendingRequest, PendingRequests};
use crate::journal::runs::{FoundRun, Journal, JournalEntry, JournalRecord};
use crate::journal::state_directory::StateDirectory;
use crate::sys::signals::Signals;
use crate::trace::trace;

mod dead_run;
pub(crate) mod every_run;
mod finish;
pub(crate) mod forget;
mod look;
mod reporter;
mod requests;

/// How long to wait after a failed attempt before a run of another directory is tried again.
const RETRY_INTERVAL: Duration = Duration::from_mins(5);

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
                    console::say(&messages::recovery::set_aside(&path));
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
        console::say(&messages::recovery::unread(&path, &error));
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
