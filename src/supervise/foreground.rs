//! Lending the terminal to terraform, and taking it back.
//!
//! Terraform runs in a background process group, so that the terminal's keys signal us alone. Output from there is
//! allowed. When somebody in that group reads the terminal, or changes its modes, the kernel stops the whole group
//! (SIGTTIN, SIGTTOU), and we hear of it as terraform's parent. Then its group becomes the foreground group and is
//! continued. The terminal comes back to us when 20 ms have passed *and* its modes are those that it had when it was
//! lent:
//!
//! - Terraform's own prompt is one read(2) of a line, and that survives being in the background once it has begun.
//! - A no-echo or raw prompt (ssh, sudo, `terraform console`) reads byte by byte. Each further read from the
//!   background would stop it, and the flush at its restart would throw away what was typed. Its modes tell it apart.
//!
//! While the terminal is lent its keys signal terraform's group. A witness in that group tells us of them.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, getpgrp, getpid};

use crate::sys::group_signal_watcher::GroupSignalWatcher;
use crate::sys::process::Process;
use crate::sys::terminal::{Modes, Terminal};
use crate::trace::trace;

/// The shortest time for which the terminal is lent: a line read has begun by then.
const MIN_FOREGROUND_WINDOW: Duration = Duration::from_millis(20);

/// How long after a lending the group is searched for members that stopped by themselves. Programs that ask for a
/// password catch TTIN and TTOU and stop only themselves, later, by kill(2), and of that nobody is told but by looking.
const STOPPED_MEMBERS_WINDOW: Duration = Duration::from_secs(2);

/// How often the modes are looked at, and the group is searched.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Who may read the terminal now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Foreground {
    /// We, and so it can be lent.
    Ours,
    /// Terraform's group already.
    Terraforms,
    /// Another job of the shell.
    Others,
    /// There is no terminal, or it was hung up.
    Gone,
}

/// The terminal, and to whom it is lent.
#[derive(Debug)]
pub(crate) struct ForegroundControl {
    terminal: Option<Terminal>,
    terraform: Pid,
    own: Pid,
    /// Since when it is lent.
    since: Option<Instant>,
    /// The modes that it must have again before it comes back.
    normal: Option<Modes>,
    group_signal_watcher: Option<GroupSignalWatcher>,
    /// The kernel stopped members of our own group, which the terminal did not belong to for a while.
    stopped_ours: bool,
    search_until: Option<Instant>,
    next_look: Option<Instant>,
}

impl ForegroundControl {
    /// For the process group `terraform`, at the terminal that this process has.
    pub(crate) fn new(terminal: Option<Terminal>, terraform: Pid) -> Self {
        Self {
            terminal,
            terraform,
            own: getpgrp(),
            since: None,
            normal: None,
            group_signal_watcher: None,
            stopped_ours: false,
            search_until: None,
            next_look: None,
        }
    }

    /// Whether the terminal is lent now.
    pub(crate) fn is_lent(&self) -> bool {
        self.since.is_some()
    }

    /// Our witness in terraform's group, once it was needed.
    pub(crate) fn group_signal_watcher(&self) -> Option<&GroupSignalWatcher> {
        self.group_signal_watcher.as_ref()
    }

    /// Whose turn it is.
    pub(crate) fn foreground(&self) -> Foreground {
        match self.terminal.as_ref().map(Terminal::foreground) {
            Some(Ok(group)) if group == self.own => Foreground::Ours,
            Some(Ok(group)) if group == self.terraform => Foreground::Terraforms,
            Some(Ok(_)) => Foreground::Others,
            Some(Err(_)) | None => Foreground::Gone,
        }
    }

    /// Gives terraform's group the terminal and lets it go on. False if the terminal is gone.
    pub(crate) fn give_foreground(&mut self) -> bool {
        let Some(terminal) = &self.terminal else { return false };
        if self.normal.is_none() {
            self.normal = terminal.modes();
        }
        if self.group_signal_watcher.is_none() {
            // Without one, a key at the prompt is not counted; the prompt itself must not fail for that.
            self.group_signal_watcher = GroupSignalWatcher::place(self.terraform).ok();
        }
        if terminal.set_foreground(self.terraform).is_err() {
            return false;
        }
        let now = Instant::now();
        self.since = Some(now);
        self.search_until = Some(now + STOPPED_MEMBERS_WINDOW);
        self.next_look = Some(now + MIN_FOREGROUND_WINDOW);
        trace!("lent the terminal to group {}", self.terraform);
        let _ = killpg(self.terraform, Signal::SIGCONT);
        true
    }

    /// Takes the terminal back, if it still belongs to terraform's group. A program in there that took it for a group
    /// of its own, an interactive shell, keeps it, and gives it back to terraform's group when it ends.
    pub(crate) fn reclaim_foreground(&mut self) {
        if self.since.take().is_none() {
            return;
        }
        if self.foreground() == Foreground::Terraforms
            && let Some(terminal) = &self.terminal
        {
            let _ = terminal.set_foreground(self.own);
            trace!("took the terminal back");
            if terminal.modes() == self.normal {
                self.normal = None;
            }
        }
        if std::mem::take(&mut self.stopped_ours) {
            // A pager or an editor in our pipeline wanted the terminal meanwhile, and was stopped for it. The one CONT
            // that reaches ourselves is relayed to terraform, where it does nothing.
            let _ = kill(Pid::from_raw(0), Signal::SIGCONT);
        }
    }

    /// Notes that the kernel stopped our own group for wanting the terminal.
    pub(crate) fn note_stopped_ours(&mut self) {
        self.stopped_ours |= self.is_lent();
    }

    /// When [`ForegroundControl::look`] is due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.next_look
    }

    /// Takes the terminal back if it is time, and wakes members of terraform's group that stopped by themselves.
    pub(crate) fn look(&mut self) {
        if self.since.is_some_and(|since| since.elapsed() >= MIN_FOREGROUND_WINDOW) {
            match self.foreground() {
                Foreground::Terraforms if self.modes_are_normal() => self.reclaim_foreground(),
                // A shell gave it to us, in the belief that it was ours: so it is.
                Foreground::Ours => self.reclaim_foreground(),
                _ => {}
            }
        }
        if self.search_until.is_some_and(|until| until < Instant::now()) {
            self.search_until = None;
        }
        if self.search_until.is_some() && self.somebody_stopped() {
            if self.is_lent() {
                let _ = killpg(self.terraform, Signal::SIGCONT);
            } else if self.foreground() == Foreground::Ours {
                self.give_foreground();
            }
        }
        let again = self.is_lent() || self.search_until.is_some();
        self.next_look = again.then(|| Instant::now() + POLL_INTERVAL);
    }

    fn modes_are_normal(&self) -> bool {
        self.terminal.as_ref().is_some_and(|terminal| terminal.modes() == self.normal)
    }

    fn somebody_stopped(&self) -> bool {
        Process::below(getpid()).iter().any(|process| process.group == self.terraform && process.state == 'T')
    }
}

impl Drop for ForegroundControl {
    /// The next reader of this terminal is whoever runs after us: a script that prompts.
    fn drop(&mut self) {
        self.reclaim_foreground();
    }
}
