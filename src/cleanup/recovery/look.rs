//! Looks at a run in the journal, and waits for a run that is about to end.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::unistd::Pid;

use super::dead_run::may_hold;
use crate::journal::runs::{FoundRun, Journal, JournalRecord};
use crate::sys::poll;
use crate::sys::process::Process;
use crate::sys::signals::Signals;
use crate::trace::trace;

/// How long to wait for another process that is finishing a run of the same location. For
/// [`every_run`](super::every_run::every_run), the limit of the waits for all runs together.
pub(super) const OTHER_RECOVERY_TIMEOUT: Duration = Duration::from_secs(30);

/// How long to wait, before terraform starts, for a run that is about to end (see [`ending`]). For a run without an
/// owner, this also limits the wait in [`every_run`](super::every_run::every_run), because the terraform of such a run
/// may continue for a long time.
const ORPHAN_EXIT_TIMEOUT: Duration = Duration::from_secs(2);

/// How often to check a run or a process while waiting for it.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Why a run that is alive may be about to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NearEnd {
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
pub(super) fn ending(record: &JournalRecord, journal: &Journal) -> Option<NearEnd> {
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
pub(super) struct WaitLimits {
    /// The limit for a run that another process is finishing.
    pub(super) recovering: Duration,
    /// The limit for a run that is about to end (see [`ending`]).
    pub(super) ending: Duration,
}

impl WaitLimits {
    /// The limits of a `tf` that is about to start terraform.
    pub(super) const BEFORE_TERRAFORM: Self = Self { recovering: OTHER_RECOVERY_TIMEOUT, ending: ORPHAN_EXIT_TIMEOUT };

    /// Returns the limit for a run that is about to end. If the run has no owner, no process stops its terraform, which
    /// may continue for a long time. If the processes of the run are already exiting, a short wait is enough.
    fn for_ending(self, has_owner: bool) -> Duration {
        if has_owner { self.ending } else { self.ending.min(ORPHAN_EXIT_TIMEOUT) }
    }
}

/// Returns the state of the run `name`. If `is_near` is true for the run's record, waits in two cases: another process
/// is finishing the run, or the run may hold a lock and is about to end (see [`ending`]). Without this wait, terraform
/// would find the lock held. A signal or the limit in `limits` ends the wait.
pub(super) fn look(
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cleanup::recovery::dead_run::tests::record;

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
}
