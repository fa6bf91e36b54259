//! What became of a child: waitid(2).
//!
//! An end is looked at and left in place (`WNOWAIT`), so that the pid, and the process group of the same number,
//! cannot become somebody else's while we still send signals there. A stop is consumed, in a call of its own: looked
//! at with `WNOWAIT` it would be reported again for ever. Never `waitpid(-1)`: it would take the status of processes
//! that a library of ours started.

use nix::sys::signal::Signal;
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

/// How a process ended (wait(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It called exit with this code, 0 to 255.
    Exited(i32),
    /// A signal killed it.
    Killed(Signal),
}

/// How `child` ended, or `None` while it lives. It stays a zombie.
pub(crate) fn ended(child: Pid) -> Option<Ended> {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
    match waitid(Id::Pid(child), flags) {
        Ok(WaitStatus::Exited(_, code)) => Some(Ended::Exited(code)),
        Ok(WaitStatus::Signaled(_, signal, _)) => Some(Ended::Killed(signal)),
        _ => None,
    }
}

/// The signal that stopped `child` since the last call, if one did.
pub(crate) fn stopped(child: Pid) -> Option<Signal> {
    match waitid(Id::Pid(child), WaitPidFlag::WSTOPPED | WaitPidFlag::WNOHANG) {
        Ok(WaitStatus::Stopped(_, signal)) => Some(signal),
        _ => None,
    }
}

/// Takes a zombie child away. False if it lives, or is no child of ours.
pub(crate) fn reap(child: Pid) -> bool {
    matches!(
        waitpid(child, Some(WaitPidFlag::WNOHANG)),
        Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..))
    )
}
