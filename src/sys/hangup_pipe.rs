//! A pipe that makes the kernel signal a process group when the last write end is closed.
//!
//! A process that dies closes its descriptors, so the process with the only write end cannot die without the signal.
//! The kernel sends it while it closes the descriptor, before the members of the group execute another instruction
//! (`pipe_release`, fs/pipe.c; `kill_fasync`, fs/fcntl.c). So neither a frozen nor a killed supervisor delays it.
//!
//! The signal, its receiver and the flag that enables it belong to the open file description of the read end (F_SETOWN,
//! F_SETSIG and O_ASYNC, fcntl(2)). Every process that inherited the read end shares them: one process arms the pipe,
//! and any of them can disarm it. The kernel signals with the user ID of the process that called
//! [`HangupPipe::arm`].
//!
//! Two conditions for the callers:
//!
//! - Some process other than the holder of the write end must hold the read end. A process that dies may close its read
//!   end first, and then the write end has no reader whose owner could be signalled.
//! - Nobody writes into the pipe. Written data would cause the signal too.
//!
//! Only Linux has F_SETSIG. On other systems [`HangupPipe::new`] fails.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::poll;

/// The read end of such a pipe.
#[derive(Debug)]
pub(crate) struct HangupPipe {
    read_end: OwnedFd,
}

impl HangupPipe {
    /// Creates a pipe. Returns its read end and its write end. Both are closed on exec and do not block.
    ///
    /// # Errors
    /// The error of pipe2(2). `Unsupported` on systems other than Linux.
    pub(crate) fn new() -> io::Result<(Self, OwnedFd)> {
        #[cfg(target_os = "linux")]
        {
            use nix::fcntl::OFlag;
            let (read_end, write_end) = nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
            Ok((Self { read_end }, write_end))
        }
        #[cfg(not(target_os = "linux"))]
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Returns the pipe whose read end is `read_end`, for example an inherited descriptor.
    pub(crate) fn from_read_end(read_end: OwnedFd) -> Self {
        Self { read_end }
    }

    /// Makes the kernel send `signal` to the process group `group` when the last write end is closed. `group` must
    /// exist.
    ///
    /// # Errors
    /// - `BrokenPipe` if the pipe had hung up before this function returned. The group may have received the signal or
    ///   not, because a hang-up before O_ASYNC signals nobody. The pipe is armed nevertheless.
    /// - ESRCH if there is no such group. `Unsupported` on systems other than Linux. The pipe is not armed.
    pub(crate) fn arm(&self, group: Pid, signal: Signal) -> io::Result<()> {
        self.set_owner(-group.as_raw())?;
        self.set_signal(signal)?;
        self.set_async(true)?;
        if self.has_hung_up() { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(()) }
    }

    /// Whether a hang-up would signal a group: [`HangupPipe::arm`] was called, by any process that shares the read end,
    /// and [`HangupPipe::disarm`] was not called after that.
    pub(crate) fn is_armed(&self) -> bool {
        self.flags().is_ok_and(|flags| flags & libc::O_ASYNC != 0)
    }

    /// Changes the signal of the hang-up. The kernel reads it once for each hang-up, when it sends the signal.
    ///
    /// # Errors
    /// `Unsupported` on systems other than Linux.
    pub(crate) fn set_signal(&self, signal: Signal) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        {
            /// F_SETSIG of asm-generic/fcntl.h. libc has it for some architectures only.
            const F_SETSIG: libc::c_int = 10;
            self.control(F_SETSIG, signal as i32).map(drop)
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = (self, signal);
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    /// Makes a hang-up signal nobody. Both steps are tried even if one fails.
    ///
    /// # Errors
    /// The error of fcntl(2). None is known for an open descriptor.
    pub(crate) fn disarm(&self) -> io::Result<()> {
        self.set_async(false).and(self.set_owner(0))
    }

    /// Whether the pipe has no write end now. A new write end ([`HangupPipe::reopen_write_end`]) ends this state.
    pub(crate) fn has_hung_up(&self) -> bool {
        poll::has_hung_up(self.as_fd())
    }

    /// Opens a new write end of the same pipe, closed on exec. A hang-up ends, and an armed pipe stays armed: the next
    /// hang-up signals the group again, without a step of the processes that hold the read end.
    ///
    /// # Errors
    /// The error of open(2), for example if /proc is not mounted. `Unsupported` on systems other than Linux.
    pub(crate) fn reopen_write_end(&self) -> io::Result<OwnedFd> {
        #[cfg(target_os = "linux")]
        {
            use nix::fcntl::{OFlag, open};
            let path = format!("/proc/self/fd/{}", self.read_end.as_raw_fd());
            let flags = OFlag::O_WRONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
            Ok(open(path.as_str(), flags, nix::sys::stat::Mode::empty())?)
        }
        #[cfg(not(target_os = "linux"))]
        {
            let _ = self;
            Err(io::ErrorKind::Unsupported.into())
        }
    }

    /// Sets the receiver of the signal: a process, the negative number of a group, or 0 for none.
    fn set_owner(&self, owner: libc::c_int) -> io::Result<()> {
        self.control(libc::F_SETOWN, owner).map(drop)
    }

    fn set_async(&self, on: bool) -> io::Result<()> {
        let flags = self.flags()?;
        let flags = if on { flags | libc::O_ASYNC } else { flags & !libc::O_ASYNC };
        self.control(libc::F_SETFL, flags).map(drop)
    }

    fn flags(&self) -> io::Result<libc::c_int> {
        self.control(libc::F_GETFL, 0)
    }

    fn control(&self, command: libc::c_int, value: libc::c_int) -> io::Result<libc::c_int> {
        // SAFETY: the descriptor is open, and the commands of this file take a number.
        let result = unsafe { libc::fcntl(self.read_end.as_raw_fd(), command, value) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
    }
}

impl AsFd for HangupPipe {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.read_end.as_fd()
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use std::os::unix::process::{CommandExt, ExitStatusExt};
    use std::process::{Child, Command};

    use super::*;
    use crate::sys::wait;

    /// Starts a child in its own group.
    #[expect(clippy::disallowed_methods, reason = "a test has no terraform")]
    fn child() -> (Child, Pid) {
        let child = Command::new("sleep").arg("60").process_group(0).spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        (child, pid)
    }

    /// Waits until `child` is stopped.
    fn wait_until_stopped(child: Pid) {
        while wait::stopped(child).is_none() {
            poll::wait(&[], Some(std::time::Duration::from_millis(1)));
        }
    }

    #[test]
    fn a_hangup_stops_the_group_and_a_new_write_end_lets_it_stop_again() {
        let (mut child, group) = child();
        let (pipe, mut write_end) = HangupPipe::new().unwrap();
        assert!(!pipe.is_armed());
        pipe.arm(group, Signal::SIGSTOP).unwrap();
        assert!(pipe.is_armed() && !pipe.has_hung_up());
        for _ in 0..10 {
            drop(write_end);
            wait_until_stopped(group);
            assert!(pipe.has_hung_up());
            write_end = pipe.reopen_write_end().unwrap();
            assert!(pipe.is_armed() && !pipe.has_hung_up());
            nix::sys::signal::killpg(group, Signal::SIGCONT).unwrap();
        }
        // The copy of an inheritor shares the signal.
        let copy = HangupPipe::from_read_end(pipe.as_fd().try_clone_to_owned().unwrap());
        copy.set_signal(Signal::SIGKILL).unwrap();
        drop(write_end);
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
    }

    #[test]
    fn a_pipe_that_has_hung_up_or_is_disarmed_signals_nobody() {
        let (mut child, group) = child();
        let (pipe, write_end) = HangupPipe::new().unwrap();
        drop(write_end);
        let error = pipe.arm(group, Signal::SIGTERM).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);

        let write_end = pipe.reopen_write_end().unwrap();
        let copy = HangupPipe::from_read_end(pipe.as_fd().try_clone_to_owned().unwrap());
        copy.disarm().unwrap();
        assert!(!pipe.is_armed());
        drop(write_end);
        assert!(pipe.has_hung_up());

        // The signal of a hang-up would have been sent before close(2) returned, and the child would have died of it.
        child.kill().unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGKILL));
        let error = pipe.arm(group, Signal::SIGTERM).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
    }
}
