//! The signals that ask a `tf locks` command to end or to be suspended, while it waits for a service or for a command
//! of the user.
//!
//! A command that dies of a signal leaves the processes of a witness running: they are in a session of their own. So
//! the signals are read, and the wait is abandoned, which kills those processes
//! ([`crate::sys::shell_command::answer`]).

use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::time::sleep;

use super::connection::Trouble;
use crate::sys::signals::Signals;

/// How often to check for signals.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// What to do around a suspension (^Z), for a command that has changed the screen of the terminal.
#[derive(Clone, Copy)]
pub(super) struct AroundSuspension {
    pub(super) before: fn(),
    pub(super) after: fn(),
}

/// Reads the signals. While this exists, none of them ends or stops this process by itself.
pub(super) struct StopRequests {
    signals: Signals,
    around_suspension: Option<AroundSuspension>,
    was_suspended: bool,
}

impl StopRequests {
    /// Starts to read the signals. A thread that exists already may still be ended by one, and the process with it.
    ///
    /// # Errors
    /// Fails if the signals cannot be read.
    pub(super) fn listen() -> Result<Self, Trouble> {
        let signals = Signals::listen().map_err(|error| Trouble::Said(error.to_string()))?;
        Ok(Self { signals, around_suspension: None, was_suspended: false })
    }

    /// Sets what to do around a suspension.
    pub(super) fn around_suspension(&mut self, around: AroundSuspension) {
        self.around_suspension = Some(around);
    }

    /// Returns whether this process was suspended since the last call.
    pub(super) fn was_suspended(&mut self) -> bool {
        std::mem::take(&mut self.was_suspended)
    }

    /// Returns the next signal that asks this process to end. `None` if there is none now. A ^Z that came before it
    /// suspends this process until it is continued.
    pub(super) fn next(&mut self) -> Option<Signal> {
        let Self { signals, around_suspension, was_suspended } = self;
        signals.next_stop_with(|signals| {
            if let Some(around) = around_suspension {
                (around.before)();
            }
            signals.stop(Signal::SIGTSTP, false);
            *was_suspended = true;
            if let Some(around) = around_suspension {
                (around.after)();
            }
        })
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
