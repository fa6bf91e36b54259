//! The keepers of one lease: starts one, watches it, and replaces it when it has ended or does not answer.

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
    /// How many keepers in a row have failed.
    failures: u32,
    /// When to start the next keeper, on the clock of [`boot_clock::now`]. `None` if none has to be started.
    restart_at: Option<Duration>,
    /// Whether the failures were reported. They are reported once.
    is_reported: bool,
}

/// A keeper that is running, or has ended and was not heard since.
#[derive(Debug)]
struct Running {
    keeper: Keeper,
    watchdog: Watchdog,
    /// When it was started, on the clock of [`boot_clock::now`].
    since: Duration,
}

/// What was heard of the keepers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum News {
    Report(Report),
    /// Several keepers in a row have failed. The text says how the last one has. This comes once.
    Failing(String),
}

impl Keepers {
    /// Creates the keepers of a lease that has not begun.
    pub(crate) fn new(terms: Terms) -> Self {
        Self { terms, running: None, failures: 0, restart_at: None, is_reported: false }
    }

    /// Starts a keeper in place of the last one, which must have ended. Returns its pid: it is a child of this process.
    /// `None` if none could be started. Then a later call is due ([`Keepers::is_restart_due`]).
    pub(crate) fn start(&mut self, orders: &Orders, inherited: &Inherited<'_>) -> Option<Pid> {
        let now = boot_clock::now();
        self.restart_at = None;
        match Keeper::start(orders, inherited) {
            Ok(keeper) => {
                let pid = keeper.pid();
                self.running = Some(Running { keeper, watchdog: Watchdog::new(now), since: now });
                pid
            }
            Err(error) => {
                trace!("no keeper: {error}");
                self.failures = failures(self.terms, self.failures, Duration::ZERO);
                self.restart_at = Some(now + restart_pause(self.failures));
                None
            }
        }
    }

    /// Returns the socket of the keeper. It is readable when the keeper has reported something or has ended. `None` if no
    /// keeper is running.
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
            let running = self.running.as_mut()?;
            let heard = running.keeper.hear();
            if matches!(heard, Heard::Report(_)) {
                running.watchdog.heard();
            }
            match heard {
                Heard::Report(Report::Alive) => {}
                Heard::Report(report) => return Some(News::Report(report)),
                Heard::Gone => return self.replace(true),
                Heard::Nothing => match running.watchdog.step(self.terms, boot_clock::now()) {
                    WatchdogStep::Wait => return None,
                    WatchdogStep::Ping => running.keeper.ping(),
                    WatchdogStep::Replace => return self.replace(false),
                },
            }
        }
    }

    /// Ends a keeper that has failed, and plans the start of the next one. `has_ended`: its end of the socket is closed.
    fn replace(&mut self, has_ended: bool) -> Option<News> {
        let Running { keeper, since, .. } = self.running.take()?;
        let now = boot_clock::now();
        let how = if has_ended {
            keeper.end().map_or_else(|| "it does not end".to_owned(), |status| status.to_string())
        } else {
            keeper.kill();
            format!("it did not answer for {} s", self.terms.keeper_timeout().as_secs())
        };
        self.failures = failures(self.terms, self.failures, now.saturating_sub(since));
        let pause = restart_pause(self.failures);
        self.restart_at = Some(now + pause);
        trace!("the keeper is replaced in {pause:?}, after {} failures: {how}", self.failures);
        let is_new = self.failures >= FAILURES_TO_REPORT && !std::mem::replace(&mut self.is_reported, true);
        is_new.then_some(News::Failing(how))
    }

    /// Asks the keeper to look at the lock, or to renew, at once.
    pub(crate) fn hurry(&self) {
        if let Some(running) = &self.running {
            running.keeper.hurry();
        }
    }

    /// Ends the keeper. Waits for its end. No other one is started until [`Keepers::start`].
    pub(crate) fn end(&mut self) {
        self.restart_at = None;
        if let Some(running) = self.running.take() {
            running.keeper.end();
        }
    }
}
