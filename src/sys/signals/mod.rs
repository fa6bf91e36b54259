//! The signals that `tf` receives, in order, each with its sender.
//!
//! On Linux all of them are blocked and read from a signalfd. No handler is installed, so every disposition stays as it
//! was inherited, except an ignored SIGCHLD, which becomes the default. What must be undone for terraform is the signal
//! mask. A signalfd also reports a signal that was ignored at the start of `tf`, as long as that signal is blocked. INT
//! and TERM need this, because terraform catches both even if they were ignored (Go's `signal.Notify` does). A HUP that
//! was ignored must stay without effect (`nohup`). On other systems handlers write into a pipe.

#[cfg(any(not(target_os = "linux"), tf_portable))]
#[path = "handlers.rs"]
mod source;
#[cfg(all(target_os = "linux", not(tf_portable)))]
#[path = "signalfd.rs"]
mod source;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};

use super::disposition;
use source::SignalSource;

/// What sent a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SignalOrigin {
    /// The kernel: for a key at the terminal, a hangup, or a child's change of state (`si_code` > 0, sigaction(2)).
    Kernel,
    /// A process, with kill(2) or a similar call.
    Process,
}

/// One signal that reached this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arrival {
    /// The signal.
    pub(crate) signal: Signal,
    /// What sent it.
    pub(crate) origin: SignalOrigin,
    /// The process that sent it. `None` if the kernel sent it, or if the sender has no pid in the pid namespace of this
    /// process.
    pub(crate) sender: Option<nix::unistd::Pid>,
}

/// Returns the process that sent a signal, from the pid that came with it (`si_pid`, sigaction(2)).
fn sender(origin: SignalOrigin, pid: i32) -> Option<nix::unistd::Pid> {
    (origin == SignalOrigin::Process && pid > 0).then(|| nix::unistd::Pid::from_raw(pid))
}

/// The inherited state that decides how `tf` reacts to a signal.
#[derive(Clone, Debug, Default)]
pub(crate) struct Inherited {
    /// The signals that were ignored when this process started, except SIGPIPE.
    ignored: Vec<Signal>,
}

impl Inherited {
    /// Returns whether `signal` was ignored when this process started: HUP under `nohup`, INT behind `&` in a shell
    /// without job control.
    pub(crate) fn ignores(&self, signal: Signal) -> bool {
        self.ignored.contains(&signal)
    }

    /// Returns all signals that were ignored, except SIGPIPE, so that terraform ignores them too.
    pub(crate) fn ignored(&self) -> &[Signal] {
        &self.ignored
    }
}

/// The signals that this process receives, and a queue of those that were read.
#[derive(Debug)]
pub(crate) struct Signals {
    source: SignalSource,
    queue: VecDeque<Arrival>,
    mask_at_entry: SigSet,
    inherited: Inherited,
}

/// The signals that `tf` reads.
pub(crate) const HEARD: [Signal; 15] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGABRT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGPIPE,
    Signal::SIGALRM,
    Signal::SIGTERM,
    Signal::SIGCHLD,
    Signal::SIGCONT,
    Signal::SIGTSTP,
    Signal::SIGTTIN,
    Signal::SIGTTOU,
    Signal::SIGWINCH,
];

impl Signals {
    /// Starts to listen for signals. Must be called while there is one thread.
    ///
    /// # Errors
    /// When no descriptor can be opened.
    pub(crate) fn listen() -> io::Result<Self> {
        let ignored: Vec<Signal> = HEARD.into_iter().filter(|signal| disposition::is_ignored(*signal)).collect();
        if ignored.contains(&Signal::SIGCHLD) {
            // SIGCHLD must not stay ignored: the kernel would discard a child's status (waitpid(2)).
            disposition::set_default(Signal::SIGCHLD);
        }
        let mut mask_at_entry = SigSet::empty();
        let source = SignalSource::open(&HEARD, &mut mask_at_entry)?;
        // Rust's runtime ignores SIGPIPE. What was inherited for SIGPIPE is recorded before the runtime starts
        // (`sys::entry`).
        let ignored = ignored.into_iter().filter(|signal| *signal != Signal::SIGPIPE).collect();
        Ok(Self { source, queue: VecDeque::new(), mask_at_entry, inherited: Inherited { ignored } })
    }

    /// Returns the signal mask of the start of this process, which terraform must get.
    pub(crate) fn mask_at_entry(&self) -> &SigSet {
        &self.mask_at_entry
    }

    /// Restores the signal mask, for a program that replaces this process after all.
    pub(crate) fn stop_listening(&self) {
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&self.mask_at_entry), None);
    }

    /// Returns the inherited state that decides how `tf` reacts to a signal.
    pub(crate) fn inherited(&self) -> &Inherited {
        &self.inherited
    }

    /// Returns the next signal that has arrived, or `None` if there is none now.
    pub(crate) fn next(&mut self) -> Option<Arrival> {
        self.fetch();
        self.queue.pop_front()
    }

    /// Returns the next signal that asks `tf` to stop: INT, TERM, or HUP unless that was ignored at the start. Any
    /// other signal that arrived before it is discarded. `None` if there is no such signal now.
    pub(crate) fn next_stop(&mut self) -> Option<Signal> {
        while let Some(Arrival { signal, .. }) = self.next() {
            match signal {
                Signal::SIGINT | Signal::SIGTERM => return Some(signal),
                Signal::SIGHUP if !self.inherited.ignores(Signal::SIGHUP) => return Some(signal),
                _ => {}
            }
        }
        None
    }

    /// Returns whether signals were read that [`Signals::next`] has not returned yet. The descriptor does not report
    /// them again.
    pub(crate) fn is_queued(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Discards every signal of one kind that has arrived. Returns whether there was one.
    pub(crate) fn take(&mut self, signal: Signal) -> bool {
        self.fetch();
        let before = self.queue.len();
        self.queue.retain(|arrival| arrival.signal != signal);
        self.queue.len() != before
    }

    fn fetch(&mut self) {
        while let Some(arrival) = self.source.read() {
            self.queue.push_back(arrival);
        }
    }

    /// Stops this process, or its whole process group, with the default action of `signal` (TSTP, TTIN or TTOU), and
    /// returns when it has been continued. Returns false if the kernel discarded the stop. It does so in an orphaned
    /// process group, because nothing could ever continue the process there (POSIX 2.4.3, "Orphaned process groups").
    ///
    /// This function does not use SIGSTOP, because the kernel does not discard that in an orphaned process group.
    pub(crate) fn stop(&mut self, signal: Signal, whole_group: bool) -> bool {
        self.take(Signal::SIGCONT);
        self.take(signal);
        let previous = disposition::set_default(signal);
        let to = nix::unistd::Pid::from_raw(if whole_group { 0 } else { nix::unistd::getpid().as_raw() });
        let _ = nix::sys::signal::kill(to, signal);
        let mut only = SigSet::empty();
        only.add(signal);
        // Once it is unblocked, the pending stop acts before sigprocmask returns. The process goes on from here when it
        // gets a SIGCONT.
        let mut mask = SigSet::empty();
        let _ = sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&only), Some(&mut mask));
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&mask), None);
        disposition::restore(signal, &previous);
        // SIGCONT is read like the other signals, so the one that continued this process has arrived by now.
        self.take(Signal::SIGCONT)
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.source.as_fd()
    }
}

/// Sets `signal` to its default action, so that it can kill this process.
pub(crate) fn default_action(signal: Signal) {
    disposition::set_default(signal);
}
