//! Finishes one dead run: releases the locks that it has left, and closes its record.

use std::ffi::OsStr;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

use jiff::Timestamp;

use super::dead_run::{LogEnd, candidates_of, enter, likely_workspace, may_have_in_non_s3, read_recorder};
use super::reporter::{Audience, RecoveryReporter};
use crate::cleanup::candidate_backends::CandidateBackends;
use crate::cleanup::clean_up::{CleanUpResult, EndedRun, LogState, NonS3Cleanup, Permission, clean_up};
use crate::cleanup::forked_recovery::{Finished, Left, RECOVERY};
use crate::cleanup::messages;
use crate::cleanup::other_backend::NonS3Release;
use crate::cleanup::release_all::may_land;
use crate::cleanup::waiter::Waiter;
use crate::journal::clock_reading::ClockReading;
use crate::journal::history::By;
use crate::journal::host::Standpoint;
use crate::journal::pending_requests::PendingRequests;
use crate::journal::recorder::Recorder;
use crate::journal::runs::{Journal, JournalEntry, JournalRecord, Unfinished};
use crate::lock::release::ReleaseContext;
use crate::lock::release_step::LateWrites;
use crate::sys::detached;
use crate::terraform::binary;
use crate::terraform::binary::Binary;
use crate::terraform::command_line::logs_its_lock;
use crate::terraform::data_directory::CommandDirectories;
use crate::terraform::errored_state::errored_state;
use crate::trace::{self, trace};
use crate::{crash_point, settings};

/// A dead run that this process must finish.
pub(super) struct Dead {
    pub(super) record: Box<JournalRecord>,
    pub(super) entry: JournalEntry,
    pub(super) standpoint: Standpoint,
    pub(super) journal: Journal,
    pub(super) pending_requests: PendingRequests,
    /// The reason that a person gave, for the history. `None` if no person gave one.
    pub(super) reason: Option<String>,
}

/// Finishes runs of other locations in the background, one after the other. Each run is finished in a separate process,
/// because that process changes its environment.
pub(super) fn finish_without_waiting(runs: Vec<Dead>) {
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

/// Finishes one dead run. This changes the environment, so call it only in a forked process.
pub(super) fn finish(dead: Dead, audience: Audience) -> Finished {
    let Dead { mut record, entry, standpoint, journal, pending_requests, reason } = dead;
    trace!("recovery: run {} is dead ({standpoint:?})", record.run);
    crash_point::reached("recovery: begun");
    // After a reboot, a recorder in memory is gone.
    let log_end = read_recorder(&mut record);
    enter(&record);
    let now = ClockReading::now();
    let sent_until = match last_sign(standpoint, record.over) {
        // Earlier versions wrote no such time, and closed a record although a process of the run was alive.
        LastSign::RecordClosed => record.closed.clone(),
        LastSign::Boot => Some(now.at_boot()),
        LastSign::None => None,
    };
    let late_writes = late_writes(may_land(sent_until.as_ref(), &now), log_end);
    let context = CleanUpContext { journal: &journal, pending_requests: &pending_requests, late_writes };
    let (finished, unfinished) = clean_up_after(&record, context, reason.as_deref(), audience);
    crash_point::reached("recovery: cleaned up");
    let run = record.run.clone();
    if entry.close(*record, unfinished).is_ok() {
        Recorder::clear_away(&run);
    }
    crash_point::reached("recovery: closed");
    finished
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

/// Returns which writes of a dead run may still land. `may_land` is whether any request of the run may.
fn late_writes(may_land: bool, log_end: LogEnd) -> LateWrites {
    match (may_land, log_end) {
        (false, _) => LateWrites::None,
        (true, LogEnd::Known) => LateWrites::Logged,
        (true, LogEnd::Lost) => LateWrites::Any,
    }
}

/// What a recovery knows about a run beside its record.
#[derive(Clone, Copy)]
struct CleanUpContext<'a> {
    journal: &'a Journal,
    pending_requests: &'a PendingRequests,
    late_writes: LateWrites,
}

fn clean_up_after(
    record: &JournalRecord,
    CleanUpContext { journal, pending_requests, late_writes }: CleanUpContext<'_>,
    reason: Option<&str>,
    audience: Audience,
) -> (Finished, Unfinished) {
    let non_s3 = may_have_in_non_s3(record);
    if !record.log.may_hold() && !non_s3 && !record.unlogged && record.replaced.is_empty() {
        return Default::default();
    }
    let now = Timestamp::now();
    let (candidates, missing) = candidates_of(record);
    let ending = messages::recovery::earlier_run(record);
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
            late_writes,
            is_network_shared: record.host.shows_its_connections(),
            reached: record.reached(),
        },
        permission: if is_never(record) { Permission::NameOnly } else { Permission::Release },
        unknown_backends: (!missing.is_empty())
            .then(|| messages::release::missing(&missing.join(", "), &record.data_directory)),
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
        let message = |there: CommandDirectories<'_>| messages::run::errored_state(&path, &record.program, there);
        messages.push(messages::next_step::in_directories_of(record, likely_workspace(record), message));
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
    let unlock = messages::next_step::unlock_command_of(record, workspace);
    Some(NonS3Cleanup { release, is_logged: logs_its_lock(&record.command), unlock })
}

/// Whether to report the locks of a dead run without releasing them. This is the case if `TFW_RELEASE` is `never` for
/// this recovery. It is also the case if it was `never` for the run, and is not `auto` for this recovery.
fn is_never(record: &JournalRecord) -> bool {
    settings::only_reports(settings::release(|name| std::env::var_os(name)), record.named_only)
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn if_the_end_of_the_log_is_lost_any_write_may_land_for_as_long_as_a_request_may() {
        assert_eq!(late_writes(true, LogEnd::Known), LateWrites::Logged);
        assert_eq!(late_writes(true, LogEnd::Lost), LateWrites::Any);
        for log_end in [LogEnd::Known, LogEnd::Lost] {
            assert_eq!(late_writes(false, log_end), LateWrites::None);
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
}
