//! The work after terraform has exited: determines whether terraform has left a lock and whether its tree is dead, and
//! releases the lock.

use std::ops::Deref;
use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::cleanup::candidate_backends::CandidateBackends;
use crate::cleanup::clean_up::{CleanUpResult, EndedRun, LogState, NonS3Cleanup, Permission, Reporter, clean_up};
use crate::cleanup::end_of_run::EndOfRun;
use crate::cleanup::other_backend::NonS3Release;
use crate::cleanup::process_tree::{EndPolicy, GroupFence, SurvivorRecord, Termination, Tree};
use crate::cleanup::run_context::RunContext;
use crate::cleanup::waiter::Waiter;
use crate::cleanup::working_directory::Within;
use crate::cleanup::{messages, other_backend};
use crate::crash_point;
use crate::journal::history::By;
use crate::lock::location::LockLocation;
use crate::lock::outcome::{Because, Outcome};
use crate::lock::proof::Run;
use crate::lock::reached::Reached;
use crate::lock::release::{ReleaseContext, stored};
use crate::lock::release_step::LateWrites;
use crate::sys::process::{self, Process, ProcessList};
use crate::sys::wait::Ended;
use crate::terraform::log::{Log, RecordedLock};
use crate::trace::trace;

/// Whether terraform died or abandoned its operation. In both cases the operation is unfinished. Also true if terraform
/// got a second interrupt or was killed by `tf`, and if it is unknown how terraform ended.
///
/// In most cases the log decides this, and not the exit code. After two interrupts, terraform exits with 1, as after
/// any error, although its operation, its provisioners and its requests are unfinished (internal/command/meta.go,
/// `RunOperation`). A terraform that finishes its operation begins to release every lock that it has taken. So a lock
/// whose release was not begun shows that the operation is unfinished. `is_ours` returns true for a lock of a backend
/// and a workspace of this run. Other locks do not count, because they belong to a terraform that a provisioner has
/// started.
///
/// Exit code 11 is a panic that terraform caught (internal/logging/panic.go). Exit code 2 means that there are changes
/// (`plan -detailed-exitcode`), but it is also Go's own code for a crash; only a crash leaves a lock. The exit code of
/// a shim can differ from that of terraform (tenv 255, a shell 137, `terraform | tee` 0), so it does not show how
/// terraform ended. So behind a shim, a lock counts even if its release was begun.
pub(crate) fn died(end: &EndOfRun, behind_a_shim: bool, log: &Log, is_ours: impl Fn(&RecordedLock) -> bool) -> bool {
    let left_operation = || log.was_canceled() || log.unreleased().any(|lock| lock.is_in_use() && is_ours(lock));
    // If it is unknown how terraform ended, terraform counts as dead: it was killed together with `tf`, or by a hangup.
    let Some(ended) = end.ended else { return true };
    end.forced
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

/// How long the processes that terraform has started may take to exit after terraform. Its providers exit within a few
/// milliseconds.
const PROVIDER_EXIT_TIMEOUT: Duration = Duration::from_secs(1);

/// How terraform's operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    /// Terraform has finished the operation.
    Over,
    /// Terraform exited by itself, and a lock that it had begun to release still exists. The delete request was
    /// refused, or is still in flight. The operation may be unfinished.
    Unlocking,
    /// Terraform died, or abandoned the operation.
    Died,
}

/// Determines whether locks may be released after `operation`. Returns `None` if so, and otherwise the outcome with the
/// reason why no lock may be released. If terraform died, this kills the remaining processes of its tree according to
/// `policy`. If terraform exited by itself, this kills no process, because terraform may have left a process running on
/// purpose.
fn reason_to_keep(
    tree: &Tree,
    operation: Operation,
    policy: EndPolicy<'_>,
    record: &SurvivorRecord<'_>,
    waiter: &mut Waiter<'_>,
) -> Option<Outcome> {
    let died = operation == Operation::Died;
    // Another terraform may be running: one that a provisioner started without `tf`, or one whose shim has exited. It
    // writes into the recorder of this run, and may hold a lock that is in the recorder.
    if !died || (tree.is_behind_a_shim() && !policy.at_once) {
        let logging = tree.logging();
        let living = tree.living();
        let other = living.iter().find(|process| is_terraform(process) || logging.contains(process));
        if let Some(process) = other {
            tree.note_survivors(&living);
            return Some(still_running(messages::run::another_terraform(process), false));
        }
    }
    if died {
        return match tree.end(waiter, policy, record) {
            Termination::Dead(_) => None,
            Termination::Alive(processes) => Some(still_running(messages::run::still_alive(&processes), true)),
            Termination::LifelineHeld => Some(still_running(messages::run::LIFELINE_HELD, false)),
            Termination::Unseen => Some(unseen()),
        };
    }
    if operation == Operation::Unlocking { wait_for_tree(tree, waiter) } else { None }
}

/// Returns the outcome "not released, because a process of the run is still running". `several` is true if `reason` is
/// about more than one process.
fn still_running(reason: impl Into<String>, several: bool) -> Outcome {
    Outcome::Kept { reason: reason.into(), because: Because::StillRunning { several } }
}

/// Returns the outcome "not released, because there is no process list".
fn unseen() -> Outcome {
    Outcome::Kept { reason: messages::run::UNSEEN.to_owned(), because: Because::Unseen }
}

/// Waits until no process of the tree is running, for at most [`PROVIDER_EXIT_TIMEOUT`]. Kills no process, because
/// terraform exited by itself. Returns `None` if no process is running, and otherwise the outcome with the reason why
/// no lock may be released.
fn wait_for_tree(tree: &Tree, waiter: &mut Waiter<'_>) -> Option<Outcome> {
    let begun = Instant::now();
    loop {
        tree.reap_orphans(&[]);
        if process::list() != ProcessList::Available {
            return Some(unseen());
        }
        let living = tree.living();
        if living.is_empty() {
            return None;
        }
        if begun.elapsed() > PROVIDER_EXIT_TIMEOUT {
            tree.note_survivors(&living);
            return Some(still_running(messages::run::still_alive(&living), true));
        }
        waiter.wait(Duration::from_millis(10));
    }
}

/// A run whose terraform has exited, with the data that `tf` or its guardian has about it.
pub(crate) struct AfterRun<'a> {
    pub(crate) context: &'a RunContext<'a>,
    pub(crate) tree: &'a Tree,
    pub(crate) end: EndOfRun,
    pub(crate) log: &'a Log,
    /// The identities with which the run reached its backends.
    pub(crate) reached: &'a Reached,
    /// Whether the log is empty although terraform was started. If so, terraform may have been unable to open the log
    /// file.
    pub(crate) has_no_log: bool,
    pub(crate) survivor_record: &'a SurvivorRecord<'a>,
}

/// How a run ended, as far as this is known without a request to a service.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ending {
    /// Whether terraform died or abandoned its operation ([`died`]).
    pub(crate) died: bool,
    pub(crate) log_state: LogState,
    /// Whether the run may have left a lock in a backend other than S3.
    pub(crate) non_s3: bool,
}

impl Ending {
    /// Whether the run with the log `log` may have left a lock.
    pub(crate) fn may_have_left_a_lock(self, log: &Log) -> bool {
        log.may_hold() || self.log_state != LogState::Complete || self.non_s3
    }
}

/// The contents of the file that terraform logs into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LogFile {
    /// The file has a log, or it is empty and the run could not have taken a lock.
    Written,
    /// The file is empty although terraform could have taken a lock. Terraform could not write to the file, or died
    /// before it wrote.
    Empty,
}

/// Returns whether the log of a run shows which locks the run had.
fn log_state(died: bool, ended: Option<Ended>, log: &Log, file: LogFile) -> LogState {
    // An empty log does not show whether terraform died. An exit code of 129 or more shows that it died: a shim exits
    // with such a code if a signal killed terraform.
    if file == LogFile::Empty && (died || matches!(ended, Some(Ended::Exited(129..)))) {
        LogState::NeverBegun
    } else if died && (!log.logs_locks() || log.is_torn()) {
        LogState::Lost
    } else {
        LogState::Complete
    }
}

impl AfterRun<'_> {
    /// Determines how the run ended. `candidates` are the candidate backends of the run. The caller may read them
    /// lazily, because they are not needed for every run.
    pub(crate) fn judge(&self, candidates: &impl Deref<Target = CandidateBackends>) -> Ending {
        let is_ours = |lock: &RecordedLock| !candidates.of(lock).is_empty();
        let died = died(&self.end, self.tree.is_behind_a_shim(), self.log, is_ours);
        let file = if self.has_no_log && candidates.selected().is_some() { LogFile::Empty } else { LogFile::Written };
        Ending {
            died,
            log_state: log_state(died, self.end.ended, self.log, file),
            non_s3: died && other_backend::may_be_left(candidates),
        }
    }

    /// Determines whether the locks of the run may be released. If terraform died, this ends what is left of it.
    pub(crate) fn permission(
        &self,
        Ending { died, log_state, .. }: Ending,
        candidates: &CandidateBackends,
        by: By,
        fence: &dyn GroupFence,
        waiter: &mut Waiter<'_>,
    ) -> Permission {
        let permission = if self.context.release {
            let operation = match died {
                true => Operation::Died,
                false if unlock_is_begun(self.log, candidates, waiter) => Operation::Unlocking,
                false => Operation::Over,
            };
            let policy = EndPolicy { at_once: self.end.killed.is_some(), fence };
            reason_to_keep(self.tree, operation, policy, self.survivor_record, waiter)
                .map_or(Permission::Release, Permission::Keep)
        } else {
            Permission::Keep(Outcome::Kept { reason: messages::release::NEVER.to_owned(), because: Because::Never })
        };
        trace!("{by:?}: a lock may be held; died: {died}; log: {log_state:?}; {permission:?}");
        match by {
            By::Guardian => crash_point::reached("guardian: tree judged"),
            _ => crash_point::reached("tf: tree judged"),
        }
        permission
    }

    /// Whether a process of the run may still be working, given its `permission`. Such a process may still write into
    /// the run's log, and request, use or release a lock. So the record of the run must then stay open, with its log.
    pub(crate) fn may_still_work(&self, permission: &Permission) -> bool {
        match permission {
            Permission::Release => false,
            Permission::Keep(Outcome::Kept { because: Because::StillRunning { .. } | Because::Unseen, .. }) => true,
            // The processes were not looked for.
            Permission::Keep(_) | Permission::NameOnly => {
                let living = self.tree.living();
                self.tree.note_survivors(&living);
                process::list() != ProcessList::Available || !living.is_empty()
            }
        }
    }

    /// Releases the locks that the run has left, if `permission` allows it, and reports the results to `reporter`.
    /// Returns what is left.
    pub(crate) fn clean_up(
        &self,
        Ending { died, log_state, non_s3 }: Ending,
        candidates: &CandidateBackends,
        (by, permission): (By, Permission),
        reporter: &mut dyn Reporter,
        waiter: &mut Waiter<'_>,
    ) -> CleanUpResult {
        let context = self.context;
        let ending = messages::run::ending(&self.end);
        let command_line = &context.invocation.command_line;
        let program = &context.invocation.terraform.path;
        let non_s3 = non_s3.then(|| {
            let directory = command_line.directory.as_deref();
            let release = NonS3Release::of(candidates, self.log, program, &context.current, directory)?;
            let unlock = reporter.unlock_command(candidates, release.workspace());
            Some(NonS3Cleanup { release: Ok(release), is_logged: command_line.logs_its_lock(), unlock })
        });
        let run = EndedRun {
            by,
            ending: &ending,
            history: (if by == By::Guardian { GUARDIANS_REASON } else { &ending }, None),
            id: &context.id,
            log: self.log,
            log_state,
            candidates,
            died,
            ended: self.end.ended,
            // Processes below terraform may have worked until now.
            until: Timestamp::now(),
            replaced: &[],
            release_context: ReleaseContext {
                run: Run::recorded(&context.who, context.started, self.log),
                request_may_land: died,
                late_writes: LateWrites::Logged,
                // Terraform has inherited the namespace. A program that runs terraform in another one (`ip netns exec`)
                // is not noticed.
                is_network_shared: true,
                reached: self.reached.clone(),
            },
            permission,
            unknown_backends: None,
            journal: context.journal(),
            pending_requests: context.pending_requests.as_ref(),
            non_s3: non_s3.flatten(),
        };
        clean_up(&run, reporter, waiter)
    }
}

/// The reason that is written into the history if a guardian releases a lock.
const GUARDIANS_REASON: &str = "its tf was killed, and its terraform is dead";

/// Whether a lock that terraform had begun to release still exists. Also true if that cannot be determined. False if
/// the lock has no known location.
pub(crate) fn unlock_is_begun(log: &Log, candidates: &CandidateBackends, waiter: &mut Waiter<'_>) -> bool {
    let mut begun = log.unreleased().filter(|lock| lock.progress.is_unlocking());
    begun.any(|lock| {
        let mut found = candidates.of(lock).into_iter().map(|location| exists(&lock.id, &location, candidates, waiter));
        found.any(|exists| exists)
    })
}

/// Whether the lock `id` exists at `location`. Also true if that cannot be determined.
fn exists(id: &str, location: &LockLocation, candidates: &CandidateBackends, waiter: &mut Waiter<'_>) -> bool {
    let _there = Within::enter(&candidates.working_directory);
    waiter.block_on(stored::may_exist(location, id)).unwrap_or(true)
}

/// Whether the program of `process` is named `terraform` or `tofu`, possibly followed by a version.
fn is_terraform(process: &Process) -> bool {
    let program = process.program();
    let named = |name: &str| {
        program == name || program.starts_with(&format!("{name}_")) || program.starts_with(&format!("{name}-v"))
    };
    named("terraform") || named("tofu")
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::Signal;

    use super::*;

    fn end(ended: Option<Ended>, forced: bool) -> EndOfRun {
        EndOfRun { ended, killed: None, forced, interrupted: false, out_of_memory: false }
    }

    /// Returns the first `records` records of a log of Terraform 1.11, in which a lock is requested, granted and
    /// released.
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
                        let died = |ended| died(&end(Some(ended), forced), shim, log, |_| ours);
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

    /// OpenTofu does not log the release of a lock. Only the log record about the second interrupt shows that OpenTofu
    /// abandoned its operation.
    #[test]
    fn a_terraform_that_says_that_it_left_its_operation_died() {
        let mut log = told(4);
        log.read(b"2026-11-23T01:46:09.000Z [WARN]  running operation was forcefully canceled\n");
        assert!(died(&end(Some(Ended::Exited(1)), false), false, &log, |_| false));
        assert!(!died(&end(Some(Ended::Exited(0)), false), false, &log, |_| false));
    }

    /// OpenTofu does not log the release of a lock. Only the command line in its log shows whether exit code 2 means a
    /// crash or means that there are changes.
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
            let died = |code, shim| died(&end(Some(Ended::Exited(code)), false), shim, &log, |_| false);
            assert_eq!(died(2, false), crash);
            assert!(!died(1, true) && died(255, true));
        }
    }

    #[test]
    fn a_run_of_which_nothing_says_how_it_ended_died() {
        for records in 1..=5 {
            assert!(died(&end(None, false), false, &told(records), |_| false));
        }
    }

    #[test]
    fn a_log_is_complete_unless_a_terraform_that_died_has_not_finished_it() {
        let torn = {
            let mut log = Log::default();
            log.read(b"2026-11-23T01:46:07.565Z [INFO]  Terraform vers");
            log
        };
        // This version logs no locks, so even its whole log does not show which locks the run had.
        let old = {
            let mut log = Log::default();
            log.read(b"2026-11-23T01:46:07.565Z [INFO]  Terraform version: 0.14.11\n");
            assert!(!log.is_torn() && !log.logs_locks());
            log
        };
        let torn_late = {
            let mut log = told(5);
            log.read(b"2026-11-23T01:46:07.565Z [INFO]  back");
            assert!(log.is_torn() && log.logs_locks());
            log
        };
        for (log, is_whole) in [(&told(5), true), (&torn, false), (&old, false), (&torn_late, false)] {
            for died in [false, true] {
                for ended in
                    [None, Some(Ended::Exited(0)), Some(Ended::Exited(137)), Some(Ended::Killed(Signal::SIGKILL))]
                {
                    for file in [LogFile::Written, LogFile::Empty] {
                        let has_no_log = file == LogFile::Empty;
                        let expected = match ended {
                            _ if has_no_log && died => LogState::NeverBegun,
                            Some(Ended::Exited(137)) if has_no_log => LogState::NeverBegun,
                            _ if died && !is_whole => LogState::Lost,
                            _ => LogState::Complete,
                        };
                        assert_eq!(log_state(died, ended, log, file), expected, "{died} {ended:?} {file:?}");
                    }
                }
            }
        }
    }
}
