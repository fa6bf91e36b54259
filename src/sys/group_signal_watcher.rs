//! A child process inside terraform's process group that reports which signals the terminal sends to that group.
//!
//! While terraform's group is the foreground group of the terminal, the keys signal that group and not `tf`. Only a
//! member of the group can notice such a signal, because it gets the signal itself. So the watcher blocks every signal,
//! waits for signals with sigwaitinfo(2), and writes the number of each one that the kernel generated into a pipe. It
//! does not report signals that a process sent, such as those that `tf` passes on. On systems other than Linux it
//! cannot tell the two apart and reports all of them.
//!
//! The watcher is a minimal process: it is forked without exec. On Linux every descriptor except the pipe is closed,
//! and the kernel kills the watcher when `tf` exits.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::spawn::AllBlocked;
use super::{descriptor, disposition};

/// The watcher, as seen by its parent. Dropping this kills the watcher.
#[derive(Debug)]
pub(crate) struct GroupSignalWatcher {
    pid: Pid,
    received: OwnedFd,
}

impl GroupSignalWatcher {
    /// Starts a watcher in the process group `group`, and waits until it has joined the group. There must be one
    /// thread.
    ///
    /// # Errors
    /// When no pipe can be created, when fork(2) fails, or when the watcher cannot join the group, for example because
    /// the group no longer exists.
    pub(crate) fn place(group: Pid) -> io::Result<Self> {
        let (received, writer) = descriptor::pipe()?;
        let parent = nix::unistd::getpid();
        let blocked = AllBlocked::now()?;
        // SAFETY: one thread; the child calls only async-signal-safe functions.
        let pid = match unsafe { libc::fork() } {
            -1 => return Err(io::Error::last_os_error()),
            0 => watch(group, parent, writer.as_raw_fd()),
            pid => Pid::from_raw(pid),
        };
        drop((writer, blocked));
        let group_signal_watcher = Self { pid, received };
        // The first byte reports that the watcher is in the group. Only then may terraform's group get the terminal.
        let mut byte = [0];
        match nix::unistd::read(&group_signal_watcher.received, &mut byte) {
            Ok(1) if byte[0] == 0 => {
                use nix::fcntl::{FcntlArg, OFlag, fcntl};
                fcntl(&group_signal_watcher.received, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
                Ok(group_signal_watcher)
            }
            _ => Err(io::Error::other("the watcher could not join terraform's process group")),
        }
    }

    /// Returns the pid of the watcher, which is a child of this process and no descendant of terraform.
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Returns the signals that the terminal has sent to the group since the last call.
    pub(crate) fn received(&self) -> Vec<Signal> {
        let mut bytes = [0; 64];
        let length = nix::unistd::read(&self.received, &mut bytes).unwrap_or(0);
        bytes[..length].iter().filter_map(|&byte| Signal::try_from(i32::from(byte)).ok()).collect()
    }
}

impl AsFd for GroupSignalWatcher {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.received.as_fd()
    }
}

impl Drop for GroupSignalWatcher {
    fn drop(&mut self) {
        let _ = nix::sys::signal::kill(self.pid, Signal::SIGKILL);
        let _ = nix::sys::wait::waitpid(self.pid, None);
    }
}

fn watch(group: Pid, parent: Pid, writer: i32) -> ! {
    // SAFETY: async-signal-safe calls only (signal-safety(7)); every signal has been blocked since before the fork.
    unsafe {
        #[cfg(target_os = "linux")]
        {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            if libc::getppid() != parent.as_raw() {
                libc::_exit(1);
            }
            if writer > 0 {
                libc::syscall(libc::SYS_close_range, 0, writer - 1, 0);
            }
            libc::syscall(libc::SYS_close_range, writer + 1, libc::c_uint::MAX, 0);
        }
        let _ = parent;
        if libc::setpgid(0, group.as_raw()) != 0 {
            libc::_exit(1);
        }
        let mut awaited = std::mem::zeroed();
        libc::sigemptyset(&raw mut awaited);
        for signal in [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTSTP, Signal::SIGHUP] {
            // A pending signal arrived while this process was still a member of the group of `tf`. `tf` has received it
            // too, and a key must not count twice. Ignoring a signal discards it.
            disposition::set_ignored(signal);
            disposition::set_default(signal);
            libc::sigaddset(&raw mut awaited, signal as i32);
        }
        let ready = 0u8;
        libc::write(writer, (&raw const ready).cast(), 1);
        loop {
            let signal = wait_for(&awaited);
            if let Ok(byte) = u8::try_from(signal)
                && byte > 0
                && libc::write(writer, (&raw const byte).cast(), 1) != 1
            {
                libc::_exit(0);
            }
        }
    }
}

/// Waits for a signal of `awaited`. Returns its number if the kernel generated it, and 0 if a process sent it.
#[cfg(target_os = "linux")]
unsafe fn wait_for(awaited: &libc::sigset_t) -> i32 {
    // SAFETY: `info` is written by the kernel; a zeroed one is valid.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let signal = libc::sigwaitinfo(awaited, &raw mut info);
        if signal > 0 && info.si_code > 0 { signal } else { 0 }
    }
}

/// Waits for a signal of `awaited` and returns its number. Without sigwaitinfo(2) the signals of the terminal cannot be
/// told apart from others.
#[cfg(not(target_os = "linux"))]
unsafe fn wait_for(awaited: &libc::sigset_t) -> i32 {
    let mut signal = 0;
    // SAFETY: both point to valid memory.
    unsafe { libc::sigwait(awaited, &raw mut signal) };
    signal
}
