//! Waits for the exit of a process that is not a child of this process (kqueue(2), `EVFILT_PROC`).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::unistd::Pid;

/// A queue of events. Its descriptor is readable while it contains an event, and is closed on exec. A forked process
/// does not inherit it.
#[derive(Debug)]
pub(crate) struct Kqueue(OwnedFd);

impl From<Kqueue> for OwnedFd {
    fn from(Kqueue(descriptor): Kqueue) -> Self {
        descriptor
    }
}

impl Kqueue {
    /// Creates a queue that waits for nothing.
    ///
    /// # Errors
    /// The error of kqueue(2), for example EMFILE.
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: the call has no arguments. Nothing else owns the descriptor that it returns.
        let queue = unsafe {
            match libc::kqueue() {
                -1 => return Err(io::Error::last_os_error()),
                number => OwnedFd::from_raw_fd(number),
            }
        };
        nix::fcntl::fcntl(&queue, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
        Ok(Self(queue))
    }

    /// Makes the exit of the process `pid` an event of this queue.
    ///
    /// # Errors
    /// ESRCH if there is no such process, or if it has exited already, even if it was not reaped.
    pub(crate) fn await_exit(&self, pid: Pid) -> io::Result<()> {
        self.add(pid, libc::NOTE_EXIT)
    }

    /// Makes the exit of the process `pid` an event of this queue, with its exit status.
    ///
    /// # Errors
    /// Those of [`Kqueue::await_exit`], and EACCES if the process is not a child of this process and this process may
    /// not kill it.
    pub(crate) fn await_status(&self, pid: Pid) -> io::Result<()> {
        self.add(pid, libc::NOTE_EXIT | libc::NOTE_EXITSTATUS)
    }

    fn add(&self, pid: Pid, fflags: u32) -> io::Result<()> {
        let change = libc::kevent {
            ident: usize::try_from(pid.as_raw()).map_err(io::Error::other)?,
            filter: libc::EVFILT_PROC,
            flags: libc::EV_ADD,
            fflags,
            data: 0,
            udata: std::ptr::null_mut(),
        };
        // SAFETY: `change` is one complete change, and no event is returned.
        let added = unsafe {
            libc::kevent(self.0.as_raw_fd(), &raw const change, 1, std::ptr::null_mut(), 0, std::ptr::null())
        };
        if added == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Takes the next event from the queue. If `waits` is true, waits for one. `None` if there is none, or if the wait
    /// was interrupted.
    pub(crate) fn next(&self, waits: bool) -> Option<Exit> {
        /// The exit status in the form of wait(2) has 16 bits (`W_EXITCODE`, sys/wait.h). NOTE_PDATAMASK (sys/event.h)
        /// has 20.
        const STATUS: libc::intptr_t = 0xffff;
        let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let timeout = if waits { std::ptr::null() } else { &raw const none };
        // SAFETY: a zeroed kevent is valid. There is no change, and the call writes at most one event. `none` exists
        // until the call returns.
        let event = unsafe {
            let mut event: libc::kevent = std::mem::zeroed();
            if libc::kevent(self.0.as_raw_fd(), std::ptr::null(), 0, &raw mut event, 1, timeout) != 1 {
                return None;
            }
            event
        };
        let has_status = event.fflags & libc::NOTE_EXITSTATUS != 0;
        Some(Exit { status: if has_status { i32::try_from(event.data & STATUS).ok() } else { None } })
    }
}

impl AsFd for Kqueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The exit of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    /// The exit status in the form of wait(2). `None` if it was not asked for.
    pub(crate) status: Option<i32>,
}
