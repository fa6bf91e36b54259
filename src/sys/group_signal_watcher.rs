//! A process of ours inside terraform's process group, that tells which signals the terminal sends there.
//!
//! While the terminal is lent, its keys signal terraform's group and not `tf`. Only a member of that group can see
//! that, and only as a signal of its own. So the witness blocks every signal, waits for them with sigwaitinfo(2), and
//! writes the number of each that the kernel made into a pipe. Signals that a process sent (our own relay among them)
//! are not reported.
//!
//! It is the bare minimum of a process: forked without exec, every descriptor closed but the pipe, killed when `tf`
//! goes away.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::spawn::AllBlocked;
use super::{descriptor, disposition};

/// The witness, as its parent sees it. It is ended when this is dropped.
#[derive(Debug)]
pub(crate) struct GroupSignalWatcher {
    pid: Pid,
    received: OwnedFd,
}

impl GroupSignalWatcher {
    /// Puts a witness into the process group `group`, and waits until it is there. There must be one thread.
    ///
    /// # Errors
    /// What fork(2) says; EPERM when the group is gone.
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
        // Its first byte says that it is in the group: only now may the terminal be lent.
        let mut byte = [0];
        match nix::unistd::read(&group_signal_watcher.received, &mut byte) {
            Ok(1) if byte[0] == 0 => {
                use nix::fcntl::{FcntlArg, OFlag, fcntl};
                fcntl(&group_signal_watcher.received, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
                Ok(group_signal_watcher)
            }
            _ => Err(io::Error::other("the witness could not join terraform's process group")),
        }
    }

    /// The process, which is a child of ours and no descendant of terraform.
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// The signals that the terminal has sent to the group since the last call.
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
    // SAFETY: async-signal-safe calls only (signal-safety(7)); every signal is blocked since before the fork.
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
            // What is pending came while this was still a member of our own group: `tf` has it itself, and a key must
            // not count twice. Ignoring a signal discards it.
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

/// The next signal of `awaited` that the kernel made; 0 for one that a process sent.
#[cfg(target_os = "linux")]
unsafe fn wait_for(awaited: &libc::sigset_t) -> i32 {
    // SAFETY: `info` is written by the kernel; a zeroed one is valid.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let signal = libc::sigwaitinfo(awaited, &raw mut info);
        if signal > 0 && info.si_code > 0 { signal } else { 0 }
    }
}

/// Without sigwaitinfo(2) nothing tells the terminal's signals from others.
#[cfg(not(target_os = "linux"))]
unsafe fn wait_for(awaited: &libc::sigset_t) -> i32 {
    let mut signal = 0;
    // SAFETY: both point to valid memory.
    unsafe { libc::sigwait(awaited, &raw mut signal) };
    signal
}
