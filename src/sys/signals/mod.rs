//! The signals that `tf` receives, in the order of their arrival, each with its sender.
//!
//! On Linux all of them are blocked and read from a signalfd. No handler is installed, so every disposition remains as
//! inherited, except that of an ignored SIGCHLD, which is set to the default. So only the signal mask must be restored
//! for terraform. A signalfd also reports a blocked signal that was ignored at the start of `tf`. This is necessary for
//! INT and TERM, because terraform catches both even if they were ignored (Go's `signal.Notify` does so). A HUP that
//! was ignored must have no effect (`nohup`). On other systems, signal handlers write into a pipe.

#[cfg(any(not(target_os = "linux"), tf_portable, test))]
mod origin;
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
use source::SignalSource;

use super::disposition;

/// The kind of sender of a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SignalOrigin {
    /// The kernel, because of a key at the terminal, a hangup, or a state change of a child (`si_code` > 0,
    /// sigaction(2)).
    Kernel,
    /// A process, with kill(2) or a similar call.
    Process,
}

/// One signal that reached this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arrival {
    /// The signal.
    pub(crate) signal: Signal,
    pub(crate) origin: SignalOrigin,
    /// The process that sent the signal. `None` if the kernel sent it, or if the sender has no pid in the pid namespace
    /// of this process.
    pub(crate) sender: Option<nix::unistd::Pid>,
}

/// Returns the sender of a signal. `pid` is the pid in the signal's information (`si_pid`, sigaction(2)). `None` if the
/// kernel sent the signal, or if `pid` is 0.
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
    /// Returns whether `signal` was ignored at the start of this process. Examples are HUP under `nohup`, and INT in a
    /// job that a shell without job control has started with `&`.
    pub(crate) fn ignores(&self, signal: Signal) -> bool {
        self.ignored.contains(&signal)
    }

    /// Returns all signals that were ignored at the start of this process, except SIGPIPE. Terraform must ignore them
    /// too.
    pub(crate) fn ignored(&self) -> &[Signal] {
        &self.ignored
    }
}

/// The source of the signals that this process receives, and a queue of signals that were read but not yet returned.
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
    /// Starts to read signals. This process must have one thread.
    ///
    /// # Errors
    /// An error if the source cannot be opened or the signal mask cannot be set.
    pub(crate) fn listen() -> io::Result<Self> {
        let ignored: Vec<Signal> = HEARD.into_iter().filter(|signal| disposition::is_ignored(*signal)).collect();
        if ignored.contains(&Signal::SIGCHLD) {
            // An ignored SIGCHLD must not remain ignored, because the kernel would discard the status of each child
            // (waitpid(2)).
            disposition::set_default(Signal::SIGCHLD);
        }
        let mut mask_at_entry = SigSet::empty();
        let source = SignalSource::open(&HEARD, &mut mask_at_entry)?;
        // Rust's runtime ignores SIGPIPE, so its current disposition is not the inherited one. The inherited one is
        // recorded before the runtime starts (`sys::entry`).
        let ignored = ignored.into_iter().filter(|signal| *signal != Signal::SIGPIPE).collect();
        Ok(Self { source, queue: VecDeque::new(), mask_at_entry, inherited: Inherited { ignored } })
    }

    /// Returns the signal mask from the start of this process. Terraform must be started with this mask.
    pub(crate) fn mask_at_entry(&self) -> &SigSet {
        &self.mask_at_entry
    }

    /// Lets every signal have the effect again that it had before [`Signals::listen`]. Another [`Signals`] may listen
    /// after that.
    pub(crate) fn stop_listening(&self) {
        self.source.close();
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&self.mask_at_entry), None);
    }

    /// Returns the inherited state that decides how `tf` reacts to a signal.
    pub(crate) fn inherited(&self) -> &Inherited {
        &self.inherited
    }

    /// Returns the next signal that has arrived. `None` if there is none now.
    pub(crate) fn next(&mut self) -> Option<Arrival> {
        self.fetch();
        self.queue.pop_front()
    }

    /// Returns the next signal that requests `tf` to end: INT, QUIT, TERM, or HUP unless HUP was ignored at the start.
    /// All other signals that arrived before it are discarded. `None` if there is no such signal now.
    pub(crate) fn next_stop(&mut self) -> Option<Signal> {
        while let Some(Arrival { signal, .. }) = self.next() {
            if self.asks_for_the_end(signal) {
                return Some(signal);
            }
        }
        None
    }

    /// Like [`Signals::next_stop`]. In addition, a TSTP that arrived before it stops this process until it is
    /// continued, unless TSTP was ignored at the start.
    pub(crate) fn next_stop_after_suspending(&mut self) -> Option<Signal> {
        self.next_stop_with(|signals| {
            signals.stop(Signal::SIGTSTP, false);
        })
    }

    /// Like [`Signals::next_stop`]. In addition, a TSTP that arrived before it calls `suspend`, unless TSTP was ignored
    /// at the start.
    pub(crate) fn next_stop_with(&mut self, mut suspend: impl FnMut(&mut Self)) -> Option<Signal> {
        while let Some(Arrival { signal, .. }) = self.next() {
            if self.asks_for_the_end(signal) {
                return Some(signal);
            }
            if signal == Signal::SIGTSTP && !self.inherited.ignores(signal) {
                suspend(self);
            }
        }
        None
    }

    fn asks_for_the_end(&self, signal: Signal) -> bool {
        match signal {
            Signal::SIGINT | Signal::SIGQUIT | Signal::SIGTERM => true,
            Signal::SIGHUP => !self.inherited.ignores(Signal::SIGHUP),
            _ => false,
        }
    }

    /// Returns whether the queue contains signals that [`Signals::next`] has not returned yet. poll(2) on the
    /// descriptor does not report these signals again.
    pub(crate) fn is_queued(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Discards every `signal` that has arrived. Returns true if at least one had arrived.
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

    /// Stops this process with the default action of `signal` (TSTP, TTIN or TTOU). If `whole_group` is set, stops the
    /// whole process group. Returns true after this process has been continued. Returns false if the kernel discarded
    /// the stop. The kernel discards it in an orphaned process group, in which nothing could ever continue the process
    /// (POSIX 2.4.3, "Orphaned process groups").
    ///
    /// This function does not use SIGSTOP, because the kernel would not discard it in an orphaned process group.
    pub(crate) fn stop(&mut self, signal: Signal, whole_group: bool) -> bool {
        self.take(Signal::SIGCONT);
        self.take(signal);
        let previous = disposition::set_default(signal);
        let to = nix::unistd::Pid::from_raw(if whole_group { 0 } else { nix::unistd::getpid().as_raw() });
        let _ = nix::sys::signal::kill(to, signal);
        let mut only = SigSet::empty();
        only.add(signal);
        // The signal is pending. When it is unblocked, it stops the process before sigprocmask returns. After a
        // SIGCONT, the process continues from here.
        let mut mask = SigSet::empty();
        let _ = sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&only), Some(&mut mask));
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&mask), None);
        disposition::restore(signal, &previous);
        // SIGCONT is read like the other signals. If a SIGCONT has continued this process, it has arrived by now.
        self.take(Signal::SIGCONT)
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.source.as_fd()
    }
}

/// While this exists, the process ignores a request to stop: SIGINT, SIGTERM and SIGHUP. One that arrives is discarded.
/// For a few requests that must not end half-way.
#[must_use]
pub(crate) struct Uninterrupted([(Signal, disposition::Disposition); 3]);

impl Uninterrupted {
    pub(crate) fn begin() -> Self {
        Self([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].map(|signal| (signal, disposition::set_ignored(signal))))
    }
}

impl Drop for Uninterrupted {
    fn drop(&mut self) {
        for (signal, before) in &self.0 {
            disposition::restore(*signal, before);
        }
    }
}

/// Sets `signal` to its default action, so that the signal can kill this process.
pub(crate) fn default_action(signal: Signal) {
    disposition::set_default(signal);
}
