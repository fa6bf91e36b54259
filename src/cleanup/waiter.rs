//! What may end a wait: a person at the keyboard or, where no person can be reached any more, nothing.

use crate::console;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::poll::PollFlags;
use nix::sys::signal::Signal;

use crate::cleanup::messages;
use crate::panics;
use crate::sys::poll;
use crate::sys::signals::Signals;
use crate::trace::trace;

/// How often to check whether a person has interrupted the wait.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Whether a person may interrupt a wait.
pub(crate) enum Waiter<'a> {
    /// The person at the terminal of `tf`, or one who sends it signals, may interrupt it.
    Interactive(&'a mut Signals),
    /// No person may interrupt it. For the guardian and the recovery process, which no person can reach.
    Unattended,
}

impl Waiter<'_> {
    /// Returns how many interrupts have arrived since the last call.
    pub(crate) fn interrupts(&mut self) -> usize {
        let Self::Interactive(signals) = self else { return 0 };
        let mut interrupts = 0;
        while let Some(arrival) = signals.next() {
            interrupts += usize::from(arrival.signal == Signal::SIGINT);
        }
        interrupts
    }

    /// Waits for `time`, or until a signal arrives.
    pub(crate) fn wait(&self, time: Duration) {
        match self {
            Self::Interactive(signals) => poll::wait(&[(signals.as_fd(), PollFlags::POLLIN)], Some(time)),
            Self::Unattended => poll::wait(&[], Some(time)),
        };
    }

    /// Waits for `work`, which talks to the lock service. A person may end the wait: the first ^C is answered, and the
    /// second one ends it. The signals of a supervisor do not end it, because the wait is limited anyway, and the lock
    /// matters more.
    ///
    /// # Errors
    /// If a person has ended the wait, or if this system has no descriptor or thread left for the work. The text says
    /// which.
    pub(crate) fn block_on<T>(&mut self, work: impl Future<Output = T>) -> Result<T, &'static str> {
        let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                trace!("no runtime: {error}");
                return Err(messages::NO_RESOURCES);
            }
        };
        let finished = panics::caught(|| {
            runtime.block_on(async {
                tokio::select! {
                    finished = work => Some(finished),
                    () = self.second_interrupt() => None,
                }
            })
        });
        // A name lookup that hangs in its thread must not block this process.
        runtime.shutdown_background();
        match finished {
            Some(finished) => finished.ok_or(messages::INTERRUPTED),
            None => Err(messages::NO_RESOURCES),
        }
    }

    async fn second_interrupt(&mut self) {
        let mut asked = 0;
        loop {
            let more = self.interrupts();
            if asked == 0 && more > 0 {
                console::say(&messages::still_releasing());
            }
            asked += more;
            if asked > 1 {
                return;
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    }
}
