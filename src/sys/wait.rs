//! The state of child processes: waitid(2).
//!
//! An exit status is read but not consumed (`WNOWAIT`). As long as the child is not reaped, its pid and the process
//! group of the same number cannot be reused, so this process can still send signals to them. A stop is consumed, in a
//! separate call, because with `WNOWAIT` it would be reported repeatedly. `waitpid(-1)` is never called, because it
//! would reap processes that a library has started. [`reap_all`] reaps any child as well, but is called only when there
//! are no such processes.

use nix::sys::signal::Signal;
use nix::unistd::Pid;

/// How a process ended (wait(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It called exit with this code, 0 to 255.
    Exited(i32),
    /// A signal killed it.
    Killed(Signal),
}

/// Returns how a process ended, by its exit status in the form of wait(2).
pub(crate) fn ended_with(status: i32) -> Ended {
    if libc::WIFSIGNALED(status) {
        Ended::Killed(Signal::try_from(libc::WTERMSIG(status)).unwrap_or(Signal::SIGKILL))
    } else {
        Ended::Exited(libc::WEXITSTATUS(status))
    }
}

/// Returns how `child` ended, and leaves it a zombie. `None` while it is running, or if it is not a child of this
/// process.
pub(crate) fn ended(child: Pid) -> Option<Ended> {
    match look(child, libc::WEXITED | libc::WNOWAIT | libc::WNOHANG)? {
        // macOS returns more than the 8 bits that a wait(2) returns.
        (libc::CLD_EXITED, code) => Some(Ended::Exited(code & 0xff)),
        // `Signal` has no value for a real-time signal. No such signal is expected, and it would kill the child as
        // SIGKILL does.
        (_, signal) => Some(Ended::Killed(Signal::try_from(signal).unwrap_or(Signal::SIGKILL))),
    }
}

/// Returns the signal that has stopped `child` since the last call. `None` if it was not stopped.
pub(crate) fn stopped(child: Pid) -> Option<Signal> {
    let (_, signal) = look(child, libc::WSTOPPED | libc::WNOHANG)?;
    Signal::try_from(signal).ok()
}

/// Reaps `child` if it is a zombie, and returns true. Returns false if it is still running, or if it is not a child of
/// this process.
pub(crate) fn reap(child: Pid) -> bool {
    look(child, libc::WEXITED | libc::WNOHANG).is_some()
}

/// Whether this process still has a child.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Children {
    /// There is no child, neither running nor a zombie. A subreaper then has no descendant either
    /// (`PR_SET_CHILD_SUBREAPER`).
    None,
    /// At least one child is running, or waitid(2) failed with an error other than ECHILD.
    Alive,
}

/// Reaps every child that has exited, and returns whether a child remains. A process may call this only when it no
/// longer needs the status of any child; see the module documentation.
pub(crate) fn reap_all() -> Children {
    loop {
        match wait_for(libc::P_ALL, 0, libc::WEXITED | libc::WNOHANG) {
            Err(libc::ECHILD) => return Children::None,
            Ok(0) | Err(_) => return Children::Alive,
            Ok(_) => {}
        }
    }
}

/// Returns whether `pid` is a child of this process, either running or a zombie.
pub(crate) fn is_child(pid: Pid) -> bool {
    let Ok(id) = libc::id_t::try_from(pid.as_raw()) else { return false };
    wait_for(libc::P_PID, id, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT).is_ok()
}

/// Returns whether a child of this process, either running or a zombie, is in the process group `group`. As long as
/// this is true, the number of the group cannot be reused.
pub(crate) fn has_child_in(group: Pid) -> bool {
    let Ok(id) = libc::id_t::try_from(group.as_raw()) else { return false };
    wait_for(libc::P_PGID, id, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT).is_ok()
}

/// Calls waitid(2). Returns the pid of the child that it reports, 0 if it reports none, or the errno if it fails.
fn wait_for(kind: libc::idtype_t, id: libc::id_t, options: i32) -> Result<i32, i32> {
    // SAFETY: a zeroed siginfo_t is valid, and the kernel fills it.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        if libc::waitid(kind, id, &raw mut info, options) == 0 {
            Ok(info.si_pid())
        } else {
            Err(*super::errno::location())
        }
    }
}

/// Calls waitid(2) for `child` and returns `si_code` and `si_status`. `None` if there is nothing to report. This does
/// not use nix, because nix has no waitid for macOS.
fn look(child: Pid, options: i32) -> Option<(i32, i32)> {
    let id = libc::id_t::try_from(child.as_raw()).ok()?;
    // SAFETY: a zeroed siginfo_t is valid. waitid fills it, including si_pid and si_status.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let found = libc::waitid(libc::P_PID, id, &raw mut info, options) == 0 && info.si_pid() == child.as_raw();
        found.then(|| (info.si_code, info.si_status()))
    }
}
