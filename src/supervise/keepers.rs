//! The keepers of one lease: starts one, watches it, and replaces it when it has ended or does not answer.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use nix::unistd::Pid;

use crate::lease::terms::Terms;
use crate::lease::watchdog::{FAILURES_TO_REPORT, Watchdog, WatchdogStep, failures, restart_pause};
use crate::supervise::keeper::{Heard, Inherited, Keeper, Orders, Report};
use crate::sys::boot_clock;
use crate::trace::trace;

/// The keepers of a lease. At most one of them is running.
#[derive(Debug)]
pub(crate) struct Keepers {
    terms: Terms,
    running: Option<Running>,
    /// Keepers that were told to end and were not waited for.
    ending: Vec<Keeper>,
    /// How many keepers in a row have failed.
    failures: u32,
    /// When to start the next keeper, on the clock of [`boot_clock::now`]. `None` if none has to be started.
    restart_at: Option<Duration>,
    /// Whether the failures were reported, or are about to be. They are reported once.
    is_reported: bool,
    /// How the last keeper has failed, if that must be reported now.
    unreported: Option<String>,
}

/// A keeper that is running, or has ended and was not heard since.
#[derive(Debug)]
struct Running {
    keeper: Keeper,
    watchdog: Watchdog,
    /// When it was started, on the clock of [`boot_clock::now`].
    since: Duration,
    /// Whether it was killed because it did not answer. What it had reported before is read first.
    is_killed: bool,
}

/// A report of the keeper, or that keepers fail.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum News {
    Report(Report),
    /// Several keepers in a row have failed. The text says how the last one has. This comes once.
    Failing(String),
}

impl Keepers {
    /// Creates the keepers of a lease that has not begun.
    pub(crate) fn new(terms: Terms) -> Self {
        Self {
            terms,
            running: None,
            ending: Vec::new(),
            failures: 0,
            restart_at: None,
            is_reported: false,
            unreported: None,
        }
    }

    /// Starts a keeper in place of the last one, which must have ended. Returns its pid: it is a child of this process.
    /// `None` if none could be started. Then a later call is due ([`Keepers::is_restart_due`]).
    pub(crate) fn start(&mut self, orders: &Orders, inherited: &Inherited<'_>) -> Option<Pid> {
        let now = boot_clock::now();
        self.restart_at = None;
        match Keeper::start(orders, inherited) {
            Ok(keeper) => {
                let pid = keeper.pid();
                self.running = Some(Running { keeper, watchdog: Watchdog::new(now), since: now, is_killed: false });
                pid
            }
            Err(error) => {
                self.cannot_start(&error);
                None
            }
        }
    }

    /// Notes that no keeper can be started now. A later call of [`Keepers::start`] is due.
    pub(crate) fn cannot_start(&mut self, error: &io::Error) {
        self.failed(Duration::ZERO, format!("it cannot be started: {error}"));
    }

    /// Returns the socket of the keeper. It is readable when the keeper has reported something or has ended. `None` if
    /// no keeper is running.
    pub(crate) fn socket(&self) -> Option<BorrowedFd<'_>> {
        self.running.as_ref().map(|running| running.keeper.socket())
    }

    /// Returns when a keeper must be started, on the clock of [`boot_clock::now`]. `None` if none must.
    pub(crate) fn restart_at(&self) -> Option<Duration> {
        self.restart_at
    }

    /// Whether a keeper must be started now.
    pub(crate) fn is_restart_due(&self) -> bool {
        self.restart_at.is_some_and(|at| at <= boot_clock::now())
    }

    /// Returns the next news, without waiting. `None` if there is nothing new. Call this until then, several times a
    /// second: it also notices that the keeper does not answer, and kills it then.
    pub(crate) fn hear(&mut self) -> Option<News> {
        loop {
            if let Some(how) = self.unreported.take() {
                return Some(News::Failing(how));
            }
            let running = self.running.as_mut()?;
            let heard = running.keeper.hear();
            if matches!(heard, Heard::Report(_)) {
                running.watchdog.heard();
            }
            match heard {
                Heard::Report(Report::Alive) => {}
                Heard::Report(report) => return Some(News::Report(report)),
                Heard::Gone => self.replace(),
                // A process that hangs in the kernel does not end even if it is killed. It sends nothing more.
                Heard::Nothing if running.is_killed => self.replace(),
                Heard::Nothing => match running.watchdog.step(self.terms, boot_clock::now()) {
                    WatchdogStep::Wait => return None,
                    WatchdogStep::Ping => running.keeper.ping(),
                    WatchdogStep::Replace => {
                        running.keeper.kill();
                        running.is_killed = true;
                    }
                },
            }
        }
    }

    /// Plans the start of the next keeper, after one that has closed its socket or was killed.
    fn replace(&mut self) {
        let Some(Running { keeper, since, is_killed, .. }) = self.running.take() else { return };
        let lived = boot_clock::now().saturating_sub(since);
        let how = if is_killed {
            format!("it did not answer for {} s", self.terms.keeper_timeout().as_secs())
        } else {
            keeper.end().map_or_else(|| "it does not end".to_owned(), |status| status.to_string())
        };
        self.failed(lived, how);
    }

    /// Notes that a keeper has failed after it has worked for `lived`, and plans the start of the next one.
    fn failed(&mut self, lived: Duration, how: String) {
        self.failures = failures(self.terms, self.failures, lived);
        let pause = restart_pause(self.failures);
        self.restart_at = Some(boot_clock::now() + pause);
        trace!("the keeper is replaced in {pause:?}, after {} failures: {how}", self.failures);
        if self.failures >= FAILURES_TO_REPORT && !std::mem::replace(&mut self.is_reported, true) {
            self.unreported = Some(how);
        }
    }

    /// Asks the keeper to look at the lock, or to renew, at once.
    pub(crate) fn hurry(&self) {
        if let Some(running) = &self.running {
            running.keeper.hurry();
        }
    }

    /// Tells the keeper that terraform is interrupted because of the notice that the keeper has reported.
    pub(crate) fn tell_of_interrupt(&self) {
        if let Some(running) = &self.running {
            running.keeper.tell_of_interrupt();
        }
    }

    /// Tells the keeper to end, and does not wait for its end. No other one is started until [`Keepers::start`].
    pub(crate) fn let_go(&mut self) {
        self.restart_at = None;
        if let Some(Running { keeper, .. }) = self.running.take() {
            keeper.tell_to_end();
            self.ending.retain_mut(|earlier| !earlier.has_ended());
            self.ending.push(keeper);
        }
    }

    /// Does the same as [`Keepers::let_go`], and waits for the end of every keeper.
    pub(crate) fn end(&mut self) {
        self.let_go();
        for keeper in self.ending.drain(..) {
            keeper.end();
        }
    }
}
