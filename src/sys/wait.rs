//! What became of a child: waitid(2).
//!
//! An end is looked at and left in place (`WNOWAIT`), so that the pid, and the process group of the same number,
//! cannot become somebody else's while we still send signals there. A stop is consumed, in a call of its own: looked
//! at with `WNOWAIT` it would be reported again for ever. Never `waitpid(-1)`: it would take the status of processes
//! that a library of ours started. [`reap_all`] does it, at a time when there are none of these.

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

/// How `child` ended, or `None` while it lives. It stays a zombie.
pub(crate) fn ended(child: Pid) -> Option<Ended> {
    match look(child, libc::WEXITED | libc::WNOWAIT | libc::WNOHANG)? {
        (libc::CLD_EXITED, code) => Some(Ended::Exited(code)),
        // A real-time signal has no name here; nobody sends one, and KILL is what it amounts to.
        (_, signal) => Some(Ended::Killed(Signal::try_from(signal).unwrap_or(Signal::SIGKILL))),
    }
}

/// The signal that stopped `child` since the last call, if one did.
pub(crate) fn stopped(child: Pid) -> Option<Signal> {
    let (_, signal) = look(child, libc::WSTOPPED | libc::WNOHANG)?;
    Signal::try_from(signal).ok()
}

/// Takes a zombie child away. False if it lives, or is no child of ours.
pub(crate) fn reap(child: Pid) -> bool {
    look(child, libc::WEXITED | libc::WNOHANG).is_some()
}

/// What is left of our children.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Children {
    /// There are none, alive or dead: whoever is a subreaper has no descendant then (`PR_SET_CHILD_SUBREAPER`).
    None,
    /// Some are alive.
    Alive,
}

/// Takes away every child that has ended, and tells whether any is left. For a process that has nobody's status to lose: see
/// the head of this file.
pub(crate) fn reap_all() -> Children {
    loop {
        match wait_for(libc::P_ALL, 0, libc::WEXITED | libc::WNOHANG) {
            Err(libc::ECHILD) => return Children::None,
            Ok(0) | Err(_) => return Children::Alive,
            Ok(_) => {}
        }
    }
}

/// Whether `pid` is a child of ours, alive or dead.
pub(crate) fn is_child(pid: Pid) -> bool {
    let Ok(id) = libc::id_t::try_from(pid.as_raw()) else { return false };
    wait_for(libc::P_PID, id, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT).is_ok()
}

/// Whether we have a child in the process group `group`, a zombie among them: as long as that is there, the number of the
/// group is nobody else's.
pub(crate) fn has_child_in(group: Pid) -> bool {
    let Ok(id) = libc::id_t::try_from(group.as_raw()) else { return false };
    wait_for(libc::P_PGID, id, libc::WEXITED | libc::WNOHANG | libc::WNOWAIT).is_ok()
}

/// waitid(2): the child that it tells of, 0 for none, or its errno.
fn wait_for(kind: libc::idtype_t, id: libc::id_t, options: i32) -> Result<i32, i32> {
    // SAFETY: `info` is zeroed, and so valid, before the kernel fills it.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        if libc::waitid(kind, id, &raw mut info, options) == 0 {
            Ok(info.si_pid())
        } else {
            Err(*super::errno::location())
        }
    }
}

/// `si_code` and `si_status`. nix has no waitid for macOS.
fn look(child: Pid, options: i32) -> Option<(i32, i32)> {
    let id = libc::id_t::try_from(child.as_raw()).ok()?;
    // SAFETY: `info` is zeroed, and so valid, before the kernel fills it; si_pid and si_status are what waitid fills.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let found = libc::waitid(libc::P_PID, id, &raw mut info, options) == 0 && info.si_pid() == child.as_raw();
        found.then(|| (info.si_code, info.si_status()))
    }
}
