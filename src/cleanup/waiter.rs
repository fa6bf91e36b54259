//! Waits that a person may or may not interrupt.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::PollFlags;
use nix::sys::signal::Signal;

use crate::cleanup::messages;
use crate::sys::poll;
use crate::sys::signals::Signals;
use crate::trace::trace;
use crate::{console, panics, runtime};

/// How often to check whether a person has interrupted the wait.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Whether a person may interrupt a wait.
pub(crate) enum Waiter<'a> {
    /// A person may interrupt the wait, with ^C or with a SIGINT to `tf`.
    Interactive(&'a mut Signals),
    /// No person may interrupt the wait. The guardian and the recovery process use this, because they do not handle
    /// interrupts.
    Unattended,
}

impl Waiter<'_> {
    /// Returns the number of SIGINTs that have arrived since the last call. Always 0 for [`Waiter::Unattended`].
    pub(crate) fn interrupts(&mut self) -> usize {
        let Self::Interactive(signals) = self else { return 0 };
        let mut interrupts = 0;
        while let Some(arrival) = signals.next() {
            interrupts += usize::from(arrival.signal == Signal::SIGINT);
        }
        interrupts
    }

    /// Waits for `time`. For [`Waiter::Interactive`], a signal ends the wait earlier.
    pub(crate) fn wait(&self, time: Duration) {
        match self {
            Self::Interactive(signals) => poll::wait(&[(signals.as_fd(), PollFlags::POLLIN)], Some(time)),
            Self::Unattended => poll::wait(&[], Some(time)),
        };
    }

    /// Runs `work`, which sends requests to the lock service, and returns its result. A person may end the wait: the
    /// first SIGINT is answered with a message, and the second one ends the wait. Other signals, such as the SIGTERM of
    /// a service manager, do not end the wait: `work` has a time limit anyway, and the release of the lock is more
    /// important.
    ///
    /// # Errors
    /// Returns the reason as a text if a person has ended the wait, if no descriptor or thread is available
    /// for `work`, or if `work` panics.
    pub(crate) fn block_on<T>(&mut self, work: impl Future<Output = T>) -> Result<T, &'static str> {
        let finished = panics::caught(|| {
            runtime::block_on(async {
                tokio::select! {
                    finished = work => Some(finished),
                    () = self.second_interrupt() => None,
                }
            })
        });
        match finished {
            Some(Ok(finished)) => finished.ok_or(messages::release::INTERRUPTED),
            Some(Err(error)) => {
                trace!("no runtime: {error}");
                Err(messages::release::NO_RESOURCES)
            }
            None => Err(messages::release::CLIENT_FAILED),
        }
    }

    /// Returns after the second SIGINT. Answers the first one with a message.
    async fn second_interrupt(&mut self) {
        let mut asked = 0;
        loop {
            let more = self.interrupts();
            if asked == 0 && more > 0 {
                console::say(&messages::run::still_releasing());
            }
            asked += more;
            if asked > 1 {
                return;
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
}
