//! Makes terraform's process group the foreground group when terraform needs the terminal, and later reclaims the
//! foreground.
//!
//! Terraform runs in a background process group, so that the terminal's keys signal `tf` alone. A background group may
//! write to the terminal. If a process of that group reads from the terminal or changes its modes, the kernel stops the
//! whole group (SIGTTIN, SIGTTOU), and notifies `tf`, which is terraform's parent. `tf` then makes that group the
//! foreground group and continues it. `tf` reclaims the foreground when 20 ms have passed *and* the terminal has its
//! previous modes again, for these reasons:
//!
//! - Terraform's own prompt is one read(2) of a line. A read that has begun also works in the background.
//! - A prompt without echo or in raw mode (ssh, sudo, `terraform console`) reads byte by byte. In the background, each
//!   further read would stop the program that prompts. When that program continues, it would flush the terminal's
//!   input, and so discard what was typed. `tf` recognises such a prompt by the terminal's modes.
//!
//! While terraform's group is the foreground group, the terminal's keys signal that group. A [`GroupSignalWatcher`] in
//! that group reports those signals to `tf`.

use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpgrp, getpid};

use crate::sys::group_signal_watcher::GroupSignalWatcher;
use crate::sys::process::Process;
use crate::sys::terminal::{Modes, Terminal};
use crate::trace::trace;

/// The minimum time for which terraform's group is the foreground group. After that time, terraform has begun to read a
/// line.
const MIN_FOREGROUND_WINDOW: Duration = Duration::from_millis(20);

/// How long terraform's group is searched for members that have stopped themselves, after it became the foreground
/// group. Programs that ask for a password catch SIGTTIN and SIGTTOU and later stop only themselves, with kill(2). The
/// kernel does not notify `tf` of such a stop, so `tf` must search.
const STOPPED_MEMBERS_WINDOW: Duration = Duration::from_secs(2);

/// How often to check the terminal's modes, and to search the group for stopped members.
const POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Which process group is the foreground group of the terminal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Foreground {
    /// The process group of `tf`, so `tf` can make another group the foreground group.
    Ours,
    /// Terraform's process group.
    Terraforms,
    /// The process group of another process, for example of another job of the shell.
    Others,
    /// No process group: there is no terminal, or it was hung up.
    Gone,
}

impl Foreground {
    /// Returns whose group the foreground group is. `group` is `None` if there is no terminal, or if it has no
    /// foreground group. `own` is the group of `tf`.
    fn of(group: Option<Pid>, own: Pid, terraform: Pid) -> Self {
        match group {
            Some(group) if group == own => Self::Ours,
            Some(group) if group == terraform => Self::Terraforms,
            Some(_) => Self::Others,
            None => Self::Gone,
        }
    }

    /// Whether terraform does not need the terminal any more. `modes_are_normal` is whether the terminal has its
    /// previous modes again.
    fn is_over(self, modes_are_normal: impl FnOnce() -> bool) -> bool {
        match self {
            Self::Terraforms => modes_are_normal(),
            // When an interactive shell below terraform exits, it restores the foreground group that it found when it
            // started. Here that was the group of `tf`. So the foreground counts as reclaimed.
            Self::Ours => true,
            Self::Others | Self::Gone => false,
        }
    }
}

/// Controls whether terraform's process group is the foreground group of the terminal.
#[derive(Debug)]
pub(crate) struct ForegroundControl {
    terminal: Option<Terminal>,
    /// Terraform's process group.
    terraform: Pid,
    /// The process group of this process.
    own: Pid,
    /// When `tf` made terraform's group the foreground group. `None` if `tf` has not done so, or has reclaimed the
    /// foreground since.
    since: Option<Instant>,
    /// The modes that the terminal must have again before `tf` reclaims the foreground. `None` until `tf` makes
    /// terraform's group the foreground group, and again after it has reclaimed the foreground with these modes.
    normal: Option<Modes>,
    /// The modes that a program of terraform's group had set when the kernel stopped the group for its lease. `None` if
    /// they were the previous modes, or if the group was not stopped.
    modes_when_stopped: Option<Modes>,
    group_signal_watcher: Option<GroupSignalWatcher>,
    /// Whether the kernel stopped members of this process's group while terraform's group was the foreground group.
    stopped_ours: bool,
    /// The end of the search for members that stopped themselves. `None` if there is no search.
    search_until: Option<Instant>,
    /// When to check the modes and to search again. `None` if neither is needed.
    next_look: Option<Instant>,
}

impl ForegroundControl {
    /// Creates the control for terraform's process group `terraform`. `terminal` is `None` if this process has no
    /// terminal, or must not change its foreground group.
    pub(crate) fn new(terminal: Option<Terminal>, terraform: Pid) -> Self {
        Self {
            terminal,
            terraform,
            own: getpgrp(),
            since: None,
            normal: None,
            modes_when_stopped: None,
            group_signal_watcher: None,
            stopped_ours: false,
            search_until: None,
            next_look: None,
        }
    }

    /// Whether `tf` has made terraform's group the foreground group and has not reclaimed the foreground.
    pub(crate) fn terraform_has_foreground(&self) -> bool {
        self.since.is_some()
    }

    /// Returns the watcher in terraform's group. `None` if terraform's group was never the foreground group, or the
    /// watcher could not be started.
    pub(crate) fn group_signal_watcher(&self) -> Option<&GroupSignalWatcher> {
        self.group_signal_watcher.as_ref()
    }

    /// Returns which process group is the foreground group now.
    pub(crate) fn foreground(&self) -> Foreground {
        let group = self.terminal.as_ref().and_then(|terminal| terminal.foreground().ok());
        Foreground::of(group, self.own, self.terraform)
    }

    /// Makes terraform's group the foreground group. If this returns true, the caller continues the group. Returns
    /// whether terraform's group is now the foreground group. False if there is no terminal, or if the terminal's
    /// foreground group cannot be changed.
    pub(crate) fn give_foreground(&mut self) -> bool {
        let Some(terminal) = &self.terminal else { return false };
        if self.normal.is_none() {
            self.normal = terminal.modes();
        }
        if self.group_signal_watcher.is_none() {
            // If the watcher cannot be started, a ^C at the prompt is not counted as an interrupt. The prompt must work
            // all the same, so the error is ignored.
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
        true
    }

    /// Makes this process's group the foreground group again, if terraform's group is the foreground group now. A
    /// program below terraform, such as an interactive shell, may have made its own group the foreground group. In this
    /// case, the program's group remains the foreground group. When the program exits, it makes terraform's group the
    /// foreground group again.
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
            // A pager or an editor in the same pipeline as `tf` needed the terminal meanwhile, so the kernel stopped
            // that program. This process gets the SIGCONT as well, and passes it on to terraform, where the signal has
            // no effect.
            let _ = kill(Pid::from_raw(0), Signal::SIGCONT);
        }
    }

    /// Takes the terminal from a group that the kernel has stopped for its lease, as a shell does for a stopped job:
    /// the foreground, and the modes. A program may have been stopped while it prompted without echo or in raw mode,
    /// and in raw mode a ^C would signal nobody.
    pub(crate) fn take_from_stopped(&mut self) {
        let theirs = self.terminal.as_ref().and_then(Terminal::modes);
        let normal = self.normal.clone();
        self.reclaim_foreground();
        if let (Some(terminal), Some(theirs), Some(normal)) = (&self.terminal, theirs, normal)
            && theirs != normal
            && self.foreground() == Foreground::Ours
            && terminal.set_modes(&normal).is_ok()
        {
            trace!("the terminal has its previous modes while terraform is stopped");
            (self.modes_when_stopped, self.normal) = (Some(theirs), None);
        }
    }

    /// Gives the terminal back to the program from which [`ForegroundControl::take_from_stopped`] has taken it: the
    /// modes, and the foreground. Call this before the group is continued. Does nothing if the terminal had its
    /// previous modes: a program that then reads from the terminal gets the foreground as any other.
    pub(crate) fn give_back_to_stopped(&mut self) {
        let Some(theirs) = self.modes_when_stopped.take() else { return };
        let Some(terminal) = self.terminal.as_ref().filter(|_| self.foreground() == Foreground::Ours) else { return };
        let normal = terminal.modes();
        if terminal.set_modes(&theirs).is_ok() {
            self.normal = normal;
            self.give_foreground();
        }
    }

    /// Records that the kernel stopped a member of this process's group because that member needed the terminal. Does
    /// nothing unless `tf` has made terraform's group the foreground group.
    pub(crate) fn note_stopped_ours(&mut self) {
        self.stopped_ours |= self.terraform_has_foreground();
    }

    /// Returns when to call [`ForegroundControl::look`]. `None` if no call is needed.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.next_look
    }

    /// Reclaims the foreground if [`MIN_FOREGROUND_WINDOW`] has passed and the terminal has its previous modes again.
    ///
    /// Also searches terraform's group for a member that has stopped itself, for [`STOPPED_MEMBERS_WINDOW`]. If there
    /// is one, and the group of `tf` is the foreground group, makes terraform's group the foreground group. Returns
    /// whether the caller must continue terraform's group.
    pub(crate) fn look(&mut self) -> bool {
        if self.since.is_some_and(|since| since.elapsed() >= MIN_FOREGROUND_WINDOW)
            && self.foreground().is_over(|| self.modes_are_normal())
        {
            self.reclaim_foreground();
        }
        if self.search_until.is_some_and(|until| until < Instant::now()) {
            self.search_until = None;
        }
        let mut must_continue = false;
        if self.search_until.is_some() && self.somebody_stopped() {
            must_continue =
                self.terraform_has_foreground() || (self.foreground() == Foreground::Ours && self.give_foreground());
        }
        let again = self.terraform_has_foreground() || self.search_until.is_some();
        self.next_look = again.then(|| Instant::now() + POLL_INTERVAL);
        must_continue
    }

    fn modes_are_normal(&self) -> bool {
        self.terminal.as_ref().is_some_and(|terminal| terminal.modes() == self.normal)
    }

    fn somebody_stopped(&self) -> bool {
        Process::below(getpid()).iter().any(|process| process.group == self.terraform && process.state == 'T')
    }
}

impl Drop for ForegroundControl {
    /// Reclaims the foreground, so that a process that runs after `tf`, such as a script that prompts, can read from
    /// the terminal.
    fn drop(&mut self) {
        self.reclaim_foreground();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_foreground_is_taken_back_from_terraform_alone_and_only_after_its_prompt() {
        let [own, terraform, other] = [5, 6, 7].map(Pid::from_raw);
        for (group, expected, [is_over_in_raw_mode, is_over_in_normal_mode]) in [
            (Some(own), Foreground::Ours, [true, true]),
            (Some(terraform), Foreground::Terraforms, [false, true]),
            // A shell or a pager below terraform has the terminal.
            (Some(other), Foreground::Others, [false, false]),
            (None, Foreground::Gone, [false, false]),
        ] {
            let foreground = Foreground::of(group, own, terraform);
            assert_eq!(foreground, expected, "{group:?}");
            assert_eq!(foreground.is_over(|| false), is_over_in_raw_mode, "{group:?}");
            assert_eq!(foreground.is_over(|| true), is_over_in_normal_mode, "{group:?}");
        }
        // With a shared group, the group of `tf` is terraform's too.
        assert_eq!(Foreground::of(Some(own), own, own), Foreground::Ours);
    }
}
