//! The controlling terminal: its foreground process group, and its modes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::sys::termios::{self, SetArg, Termios};
use nix::unistd::{self, Pid};

/// The controlling terminal of this process.
#[derive(Debug)]
pub(crate) struct Terminal(File);

/// The modes of a terminal, for example whether a reader gets lines or single bytes, and whether the terminal echoes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Modes(Termios);

impl Terminal {
    /// Opens `/dev/tty` (tty(4)). `None` if this process has no controlling terminal.
    pub(crate) fn open() -> Option<Self> {
        File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NOCTTY | libc::O_CLOEXEC)
            .open("/dev/tty")
            .ok()
            .map(Self)
    }

    /// Returns whether this process has a terminal and is in the terminal's foreground process group.
    pub(crate) fn is_our_turn() -> bool {
        Self::open().is_some_and(|terminal| terminal.foreground().is_ok_and(|group| group == unistd::getpgrp()))
    }

    /// Returns whether this process has a terminal that belongs to another process group now.
    pub(crate) fn is_anothers_turn() -> bool {
        Self::open().is_some_and(|terminal| terminal.foreground().is_ok_and(|group| group != unistd::getpgrp()))
    }

    /// Returns the foreground process group. It receives the signals of the terminal's keys and may read the terminal.
    ///
    /// # Errors
    /// ENOTTY or EIO if the terminal no longer exists.
    pub(crate) fn foreground(&self) -> io::Result<Pid> {
        Ok(unistd::tcgetpgrp(&self.0)?)
    }

    /// Makes `group` the foreground process group. SIGTTOU must be blocked (tcsetpgrp(3)).
    ///
    /// # Errors
    /// EPERM if `group` is not in the session of this process; ENOTTY or EIO if the terminal no longer exists.
    pub(crate) fn set_foreground(&self, group: Pid) -> io::Result<()> {
        Ok(unistd::tcsetpgrp(&self.0, group)?)
    }

    /// Returns the current modes of the terminal. `None` if the terminal no longer exists.
    pub(crate) fn modes(&self) -> Option<Modes> {
        termios::tcgetattr(&self.0).ok().map(Modes)
    }

    /// Sets the modes of the terminal immediately. This process must be in the foreground process group, because the
    /// kernel stops a background process that sets them (tcsetattr(3)).
    ///
    /// # Errors
    /// ENOTTY or EIO if the terminal no longer exists.
    pub(crate) fn set_modes(&self, modes: &Modes) -> io::Result<()> {
        Ok(termios::tcsetattr(&self.0, SetArg::TCSANOW, &modes.0)?)
    }
}

impl AsFd for Terminal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
