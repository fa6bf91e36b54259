//! Who may end a waiting: a person at the keyboard, or nobody, where no person can be asked any more.

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

/// Between two looks at whether a person has had enough.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Whose patience it is.
pub(crate) enum Waiter<'a> {
    /// Of whoever sits before `tf`, or sends it signals.
    Interactive(&'a mut Signals),
    /// The guardian's and the recoverer's, whom nobody reaches.
    Unattended,
}

impl Waiter<'_> {
    /// How many interrupts have come since the last call.
    pub(crate) fn interrupts(&mut self) -> usize {
        let Self::Interactive(signals) = self else { return 0 };
        let mut interrupts = 0;
        while let Some(arrival) = signals.next() {
            interrupts += usize::from(arrival.signal == Signal::SIGINT);
        }
        interrupts
    }

    /// Waits for a while, or until a signal comes.
    pub(crate) fn wait(&self, time: Duration) {
        match self {
            Self::Interactive(signals) => poll::wait(&[(signals.as_fd(), PollFlags::POLLIN)], Some(time)),
            Self::Unattended => poll::wait(&[], Some(time)),
        };
    }

    /// Waits for `work`, which talks to the lock service. A person may end the waiting: the first ^C is answered, the
    /// second ends it. What a supervisor sends does not: it is bounded anyway, and the lock matters more.
    ///
    /// # Errors
    /// Why it is not done, in words: a person has ended it, or this system has no descriptor or thread left for it.
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
        // A name look-up that hangs in its thread must not hold us.
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
