//! Messages about terraform itself: how it is stopped, how it ended, and what it has left.

use std::time::Duration;

use nix::sys::signal::Signal;

use crate::cleanup::end_of_run::{EndOfRun, Why};
use crate::console::{length_of_time, visible};
use crate::sys::process::Process;
use crate::sys::wait::Ended;
use crate::terraform::data_directory::CommandDirectories;
use crate::terraform::errored_state::{ERRORED_STATE, push_errored_state};

/// Returns how terraform ended, as the beginning of a message.
pub(crate) fn ending(end: &EndOfRun) -> String {
    match (end.killed, end.ended) {
        (Some(Why::Forced), _) => "terraform was killed (third ^C)".to_owned(),
        (Some(Why::StopTimeout), _) => "terraform was killed (TFW_STOP_TIMEOUT expired)".to_owned(),
        (Some(Why::LockLost), _) => "terraform was killed (its lock was lost)".to_owned(),
        (Some(Why::LeaseUnknown), _) => "terraform was killed (its lease could not be renewed)".to_owned(),
        (None, Some(Ended::Killed(Signal::SIGKILL))) if end.out_of_memory => {
            "terraform was killed by SIGKILL (out of memory)".to_owned()
        }
        (None, Some(Ended::Killed(signal))) => format!("terraform was killed by {}", signal.as_str()),
        (None, Some(Ended::Exited(11))) => "terraform crashed (exit code 11)".to_owned(),
        (None, Some(Ended::Exited(code))) => format!("terraform exited with code {code}"),
        (None, None) => "terraform was killed together with its tf".to_owned(),
    }
}

/// Reports that terraform could not write its state to the backend and saved the state in the working directory.
pub(crate) fn errored_state(path: &std::path::Path, program: &str, directories: CommandDirectories<'_>) -> String {
    format!(
        "{} exists: {ERRORED_STATE}\n{}",
        visible(&path.display().to_string()),
        push_errored_state(program, directories)
    )
}

/// The reason why a lock was not released: there is no process list.
pub(crate) const UNSEEN: &str = "cannot tell whether terraform's child processes are still running: \
     /proc is not mounted, cannot be read, or belongs to another pid namespace";

/// Reports that the outputs of a CI step could not be written to `path`.
pub(crate) fn no_outputs(path: &std::ffi::OsStr, error: &std::io::Error) -> String {
    format!("could not write the outputs of this step to {}: {error}", visible(&path.to_string_lossy()))
}

/// Reports, after terraform has died, that the run had no journal. `has_lease` is whether the run renewed a lease on
/// its lock: any host may release the lock when that has lapsed.
pub(crate) fn unprotected(why: &str, has_lease: bool) -> String {
    let until = if has_lease { " before its lease had lapsed" } else { "" };
    format!(
        "this run had no journal: {}\nif tf had been killed too, no later run would have released the lock{until}",
        visible(why)
    )
}

/// The reason why a lock was not released: processes that terraform started are alive.
pub(crate) fn still_alive(processes: &[Process]) -> String {
    format!("processes that terraform started are still running: {}", list(processes))
}

/// The reason why a lock was not released: a process that `tf` cannot see still has the lifeline open.
pub(crate) const LIFELINE_HELD: &str = "a child process of terraform is still running, but tf cannot see which one";

/// The reason why a lock was not released: another terraform of the run is still running.
pub(crate) fn another_terraform(process: &Process) -> String {
    format!("a terraform that this run started is still running: {}", list(std::slice::from_ref(process)))
}

/// Reports, after an interrupt, the processes that terraform has started and that are still running.
pub(crate) fn survivors(processes: &[Process]) -> String {
    format!(
        "terraform exited after the interrupt, but processes that it started are still running: {}",
        list(processes)
    )
}

pub(super) fn list(processes: &[Process]) -> String {
    let mut names: Vec<_> = processes
        .iter()
        .take(5)
        .map(|process| format!("{} (pid {})", visible(&process.program()), process.pid))
        .collect();
    if processes.len() > names.len() {
        names.push(format!("{} more", processes.len() - names.len()));
    }
    names.join(", ")
}

/// Answers another ^C while terraform is stopping.
pub(crate) fn stopping(since: Duration, offer: Duration, holds_lock: bool) -> String {
    let releases = if holds_lock { " and will release its lock" } else { "" };
    format!(
        "terraform has been stopping for {}{releases}; press ^C again within {} s to force it to stop",
        length_of_time(since),
        offer.as_secs()
    )
}

/// Answers the third ^C.
pub(crate) fn forcing() -> String {
    "sent terraform its second interrupt; it will be killed if it does not exit within 6 s".to_owned()
}

/// Answers the first ^C while a lock is being released.
pub(crate) fn still_releasing() -> String {
    "releasing the state lock; press ^C again to leave it held".to_owned()
}

/// Reports that there is no terraform to run, or that a setting is invalid.
pub(crate) fn cannot_start(reason: &dyn std::fmt::Display) -> String {
    format!("{reason}")
}

/// Reports that terraform was found but could not be run.
pub(crate) fn cannot_run(path: &std::path::Path, error: &std::io::Error) -> String {
    format!("could not run {}: {error}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_journal_the_lock_of_a_run_with_a_lease_would_have_been_released_later() {
        for (has_lease, end) in [(false, "released the lock"), (true, "released the lock before its lease had lapsed")]
        {
            let said = unprotected("No space left on device", has_lease);
            assert!(
                said.starts_with("this run had no journal: No space left on device\n") && said.ends_with(end),
                "{said}"
            );
        }
    }

    #[test]
    fn an_ending_names_its_signal() {
        let ending = |ended, out_of_memory| {
            ending(&EndOfRun { ended: Some(ended), killed: None, forced: false, interrupted: false, out_of_memory })
        };
        assert_eq!(ending(Ended::Killed(Signal::SIGKILL), false), "terraform was killed by SIGKILL");
        assert_eq!(ending(Ended::Killed(Signal::SIGKILL), true), "terraform was killed by SIGKILL (out of memory)");
        assert_eq!(ending(Ended::Killed(Signal::SIGHUP), true), "terraform was killed by SIGHUP");
        assert_eq!(ending(Ended::Exited(1), false), "terraform exited with code 1");
    }
}
