//! The signals that ask a `tf locks` command to end or to be suspended, while it waits for a service, for a command of
//! the user, or for the reader of stdout.
//!
//! A command that dies of a signal leaves the processes of a witness running: they are in a session of their own. So
//! the signals are read, and the wait is abandoned, which kills those processes
//! ([`crate::sys::shell_command::answer`]).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::signal::Signal;
use tokio::time::sleep;

use super::connection::Trouble;
use crate::sys::descriptor::{self, ATOMIC_WRITE_BYTES, Moved};
use crate::sys::poll;
use crate::sys::signals::Signals;

/// How often to check for signals.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// How long the rest of the output waits for a reader that does not read, after a signal has asked this process to end.
const PATIENCE: Duration = Duration::from_secs(2);

/// Reads the signals. While this exists, none of them ends or stops this process by itself.
pub(super) struct StopRequests {
    signals: Signals,
    before_suspension: Option<fn()>,
    was_suspended: bool,
    /// The last signal that asked this process to end. `None` if there was none.
    asked: Option<Signal>,
    /// Stdout, opened anew if it is a terminal. `None` before the first write.
    stdout: Option<Stdout>,
}

/// Where the output goes.
struct Stdout {
    /// The terminal, opened anew: poll(2) reports a terminal as writable that accepts only a part of a write, and a signal
    /// does not interrupt the wait for the rest. `None` if stdout is no terminal, or cannot be opened.
    terminal: Option<OwnedFd>,
    accepts: Accepts,
}

impl StopRequests {
    /// Starts to read the signals. A thread that exists already may still be ended by one, and the process with it.
    ///
    /// # Errors
    /// Fails if the signals cannot be read.
    pub(super) fn listen() -> Result<Self, Trouble> {
        let signals = Signals::listen().map_err(|error| Trouble::Said(error.to_string()))?;
        Ok(Self { signals, before_suspension: None, was_suspended: false, asked: None, stdout: None })
    }

    /// Sets what to do before a suspension (^Z), for a command that has changed the screen of the terminal.
    pub(super) fn before_suspension(&mut self, before: fn()) {
        self.before_suspension = Some(before);
    }

    /// Returns whether this process was suspended since the last call.
    pub(super) fn was_suspended(&mut self) -> bool {
        std::mem::take(&mut self.was_suspended)
    }

    /// Returns the next signal that asks this process to end. `None` if there is none now. A ^Z that came before it
    /// suspends this process until it is continued.
    pub(super) fn next(&mut self) -> Option<Signal> {
        let Self { signals, before_suspension, was_suspended, asked, .. } = self;
        let next = signals.next_stop_with(|signals| {
            if let Some(before) = before_suspension {
                before();
            }
            signals.stop(Signal::SIGTSTP, false);
            *was_suspended = true;
        });
        *asked = next.or(*asked);
        next
    }

    /// Writes `bytes` to stdout, unless a signal asks this process to end while the reader does not read. A reader such as
    /// a pager can let a write wait for ever, and a signal does not interrupt a write while it is blocked. If a signal
    /// came before, waits for the reader for at most [`PATIENCE`].
    ///
    /// # Errors
    /// Fails with the signal, or if the bytes cannot be written, for example because the reader has exited. A part of
    /// them may be written then.
    pub(super) fn write(&mut self, mut bytes: &[u8]) -> Result<(), Trouble> {
        let (own, mut progress) = (io::stdout(), Instant::now());
        let Stdout { terminal, accepts } = self.stdout.take().unwrap_or_else(|| Stdout::of(own.as_fd()));
        let stdout = terminal.as_ref().map_or(own.as_fd(), AsFd::as_fd);
        while !bytes.is_empty() {
            let was_asked = self.asked.is_some();
            let moved = if poll::wait(&[(stdout, PollFlags::POLLOUT)], Some(POLL_INTERVAL)) == [true] {
                match accepts {
                    Accepts::All => descriptor::write(&stdout, bytes)?,
                    Accepts::Some => descriptor::write_to_pipe(&stdout, bytes)?,
                    Accepts::Piece => descriptor::write(&stdout, &bytes[..bytes.len().min(ATOMIC_WRITE_BYTES)])?,
                }
            } else {
                Moved::NotReady
            };
            if let Moved::Bytes(written) = moved {
                bytes = &bytes[written..];
                progress = Instant::now();
                continue;
            }
            self.next();
            if let Some(signal) = self.asked
                && (!was_asked || progress.elapsed() >= PATIENCE)
            {
                return Err(Trouble::Stopped(signal));
            }
        }
        self.stdout = Some(Stdout { terminal, accepts });
        Ok(())
    }

    /// Waits for `work`, unless a signal asks this process to end.
    ///
    /// # Errors
    /// Fails with that signal. `work` is then abandoned.
    pub(super) async fn unless_stopped<T>(&mut self, work: impl Future<Output = T>) -> Result<T, Signal> {
        let mut work = std::pin::pin!(work);
        loop {
            if let Some(signal) = self.next() {
                return Err(signal);
            }
            tokio::select! {
                done = &mut work => return Ok(done),
                () = sleep(POLL_INTERVAL) => {}
            }
        }
    }
}

/// How much stdout accepts without waiting, if poll(2) reports it as writable.
#[derive(Clone, Copy)]
enum Accepts {
    /// Everything: no write to a file waits for another process.
    All,
    /// A part, as [`descriptor::write_to_pipe`] finds out.
    Some,
    /// A piece of [`ATOMIC_WRITE_BYTES`] bytes. The receiver of a datagram may discard the rest of a longer one.
    Piece,
}

impl Stdout {
    fn of(stdout: BorrowedFd<'_>) -> Self {
        let terminal = descriptor::reopened_terminal(stdout);
        let metadata = stdout.try_clone_to_owned().and_then(|stdout| File::from(stdout).metadata());
        let accepts = match metadata.map(|metadata| metadata.file_type()) {
            Ok(kind) if kind.is_file() => Accepts::All,
            Ok(kind) if kind.is_fifo() => Accepts::Some,
            _ => Accepts::Piece,
        };
        Self { terminal, accepts }
    }
}

impl Drop for StopRequests {
    fn drop(&mut self) {
        self.signals.stop_listening();
    }
}

/// Waits for `work`, unless a signal asks this process to end.
///
/// # Errors
/// Those of `work`, [`Trouble::Stopped`] with that signal, and one if the signals cannot be read.
pub(super) async fn unless_stopped<T>(work: impl Future<Output = Result<T, Trouble>>) -> Result<T, Trouble> {
    StopRequests::listen()?.unless_stopped(work).await.map_err(Trouble::Stopped)?
}
