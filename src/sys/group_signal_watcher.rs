//! A child process in terraform's process group that reports which signals the terminal sends to that group.
//!
//! While terraform's group is the foreground process group, the terminal sends the signals of its keys to that group
//! and not to `tf`. Only a member of the group receives such a signal. So the watcher blocks every signal, waits for
//! signals with sigwaitinfo(2), and writes the number of each signal that the kernel generated into a pipe. It does not
//! report signals that a process sent, such as those that `tf` passes on. macOS does not say whether the kernel
//! generated a signal. There, a handler reports each signal that `tf` has not sent.
//!
//! The watcher is a fork without exec, so it costs little. It closes every descriptor except the pipe before it joins
//! the group: a copy of a write end of the fence (`supervise::fence`) would keep that pipe silent. When `tf` exits, the
//! kernel kills it (PR_SET_PDEATHSIG, prctl(2)). On macOS it waits for the exit of `tf` and exits then.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::PollFlags;
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::spawn::AllBlocked;
use super::{descriptor, disposition, poll};

/// How long the watcher may take to join the group. It may be stopped together with the group before it has reported
/// that.
const JOIN_TIMEOUT: Duration = Duration::from_secs(1);

/// The byte that reports that the watcher has joined the group. All others are the numbers of signals.
const JOINED: u8 = 0;

/// The parent's handle of the watcher. Dropping it kills the watcher.
#[derive(Debug)]
pub(crate) struct GroupSignalWatcher {
    pid: Pid,
    received: OwnedFd,
}

impl GroupSignalWatcher {
    /// Starts a watcher in the process group `group`, and waits until it has joined the group, at most
    /// [`JOIN_TIMEOUT`]. This process must have one thread.
    ///
    /// # Errors
    /// An error if no pipe can be created, if fork(2) fails, or if the watcher cannot join the group, for example
    /// because the group no longer exists. `TimedOut` if it did not join in time; it was killed then.
    pub(crate) fn place(group: Pid) -> io::Result<Self> {
        let (received, writer) = descriptor::pipe()?;
        let parent = nix::unistd::getpid();
        let blocked = AllBlocked::now()?;
        // SAFETY: there is one thread (a condition for the caller), so the child may run any Rust code.
        let pid = match unsafe { libc::fork() } {
            -1 => return Err(io::Error::last_os_error()),
            0 => watch(group, parent, writer.as_raw_fd()),
            pid => Pid::from_raw(pid),
        };
        drop((writer, blocked));
        let group_signal_watcher = Self { pid, received };
        group_signal_watcher.wait_until_joined()?;
        fcntl(&group_signal_watcher.received, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        Ok(group_signal_watcher)
    }

    /// Waits until the watcher has reported that it is in the group. Only after that may terraform's group become the
    /// foreground process group, so a signal that was reported before is no key.
    fn wait_until_joined(&self) -> io::Result<()> {
        let until = Instant::now() + JOIN_TIMEOUT;
        let mut byte = [u8::MAX];
        while byte != [JOINED] {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            if poll::wait(&[(self.as_fd(), PollFlags::POLLIN)], Some(left)) != [true] {
                continue;
            }
            if nix::unistd::read(&self.received, &mut byte) != Ok(1) {
                return Err(io::Error::other("the watcher could not join terraform's process group"));
            }
        }
        Ok(())
    }

    /// Returns the pid of the watcher. The watcher is a child of this process and not a descendant of terraform.
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

/// The signals of the terminal's keys, and of a hangup.
const AWAITED: [Signal; 4] = [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTSTP, Signal::SIGHUP];

fn watch(group: Pid, parent: Pid, writer: i32) -> ! {
    // SAFETY: this process uses no descriptor except `writer` from here on, and each call gets valid memory. Every
    // signal has been blocked since before the fork.
    unsafe {
        #[cfg(target_os = "linux")]
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        descriptor::close_from(0, &[writer]);
        if libc::setpgid(0, group.as_raw()) != 0 {
            libc::_exit(1);
        }
        for signal in AWAITED {
            // A signal that is pending now arrived while this process was still a member of the group of `tf`. `tf` has
            // also received that signal itself, so the watcher must not report it. Ignoring a signal discards it.
            disposition::set_ignored(signal);
            disposition::set_default(signal);
        }
        let Some(source) = Source::new(parent) else { libc::_exit(1) };
        // From here on, the exit of the parent ends this process. If it had exited before, this process has another
        // one.
        if libc::getppid() != parent.as_raw() {
            libc::_exit(1);
        }
        if !Source::listen(parent, writer) {
            libc::_exit(1);
        }
        libc::write(writer, [JOINED].as_ptr().cast(), 1);
        loop {
            match source.next() {
                #[cfg(target_os = "linux")]
                Arrived::Signal(signal) => {
                    if let Ok(byte) = u8::try_from(signal)
                        && libc::write(writer, (&raw const byte).cast(), 1) != 1
                    {
                        libc::_exit(0);
                    }
                }
                Arrived::Nothing => {}
                #[cfg(not(target_os = "linux"))]
                Arrived::ParentGone => libc::_exit(0),
            }
        }
    }
}

/// What the watcher has waited for.
enum Arrived {
    /// A signal with this number. Elsewhere, a handler reports it.
    #[cfg(target_os = "linux")]
    Signal(i32),
    /// A signal that a process sent, or an error.
    Nothing,
    /// The parent has exited.
    #[cfg(not(target_os = "linux"))]
    ParentGone,
}

/// Waits for the signals in [`AWAITED`] that the kernel generates (sigwaitinfo(2)).
#[cfg(target_os = "linux")]
struct Source(libc::sigset_t);

#[cfg(target_os = "linux")]
impl Source {
    #[expect(clippy::unnecessary_wraps, reason = "elsewhere it can fail")]
    fn new(_parent: Pid) -> Option<Self> {
        // SAFETY: a zeroed set is valid memory for the calls.
        unsafe {
            let mut awaited = std::mem::zeroed();
            libc::sigemptyset(&raw mut awaited);
            for signal in AWAITED {
                libc::sigaddset(&raw mut awaited, signal as i32);
            }
            Some(Self(awaited))
        }
    }

    /// Returns true. The signals stay blocked, because sigwaitinfo(2) takes them.
    fn listen(_parent: Pid, _writer: i32) -> bool {
        true
    }

    fn next(&self) -> Arrived {
        // SAFETY: a zeroed siginfo_t is valid, and the kernel fills it.
        unsafe {
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let signal = libc::sigwaitinfo(&raw const self.0, &raw mut info);
            if signal > 0 && info.si_code > 0 { Arrived::Signal(signal) } else { Arrived::Nothing }
        }
    }
}

/// Waits for the exit of the parent (kqueue(2)). Meanwhile, handlers report the signals in [`AWAITED`].
#[cfg(not(target_os = "linux"))]
struct Source(super::macos::kqueue::Kqueue);

#[cfg(not(target_os = "linux"))]
impl Source {
    /// `None` if the parent has exited, or if no descriptor is free.
    fn new(parent: Pid) -> Option<Self> {
        let queue = super::macos::kqueue::Kqueue::new().ok()?;
        queue.await_exit(parent).ok()?;
        Some(Self(queue))
    }

    /// Installs the handlers, which write into `writer`, and unblocks the signals. False if that fails.
    fn listen(parent: Pid, writer: i32) -> bool {
        super::macos::reporting_handler::install(&AWAITED, parent, writer).is_ok()
    }

    fn next(&self) -> Arrived {
        // A signal interrupts the wait, and its handler has reported it then.
        if self.0.next(true).is_some() { Arrived::ParentGone } else { Arrived::Nothing }
    }
}
