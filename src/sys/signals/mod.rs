//! The signals that reach `tf`, one after the other, each with who sent it.
//!
//! On Linux all of them are blocked and read from a signalfd. No handler is installed, so every disposition stays as it
//! was inherited, and the one thing to undo in terraform is the mask. signalfd(2) also reports a signal that was
//! ignored at entry as long as it is blocked, which is what INT and TERM need (terraform catches both even then, because
//! Go's `signal.Notify` does) and what HUP must be protected from (`nohup`). Elsewhere handlers write into a pipe.

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

/// Who made a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SignalOrigin {
    /// The kernel: a key at the terminal, a hangup, a child's change of state (`si_code` > 0, sigaction(2)).
    Kernel,
    /// A process, by kill(2) or a relative of it.
    Process,
}

/// One signal that reached this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Arrival {
    /// Which signal.
    pub(crate) signal: Signal,
    /// Who made it.
    pub(crate) origin: SignalOrigin,
    /// The process that sent it. None where the kernel made it, and where the sender has no number in our pid namespace.
    pub(crate) sender: Option<nix::unistd::Pid>,
}

/// The sender of a signal, by the pid that came with it (`si_pid`, sigaction(2)).
fn sender(origin: SignalOrigin, pid: i32) -> Option<nix::unistd::Pid> {
    (origin == SignalOrigin::Process && pid > 0).then(|| nix::unistd::Pid::from_raw(pid))
}

/// What was inherited and matters to what we do with a signal.
#[derive(Clone, Debug, Default)]
pub(crate) struct Inherited {
    /// The signals that were ignored.
    ignored: Vec<Signal>,
}

impl Inherited {
    /// Whether `signal` was ignored when we started: HUP under `nohup`, INT behind `&` in a shell without job control.
    pub(crate) fn ignores(&self, signal: Signal) -> bool {
        self.ignored.contains(&signal)
    }

    /// All that were ignored, for terraform to ignore them too.
    pub(crate) fn ignored(&self) -> &[Signal] {
        &self.ignored
    }
}

/// The signals of this process, blocked and queued.
#[derive(Debug)]
pub(crate) struct Signals {
    source: SignalSource,
    queue: VecDeque<Arrival>,
    mask_at_entry: SigSet,
    inherited: Inherited,
}

/// What is listened to.
const HEARD: [Signal; 15] = [
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
    /// Starts to listen. To be called while there is one thread.
    ///
    /// # Errors
    /// When no descriptor can be had.
    pub(crate) fn listen() -> io::Result<Self> {
        let ignored: Vec<Signal> = HEARD.into_iter().filter(|signal| disposition::is_ignored(*signal)).collect();
        if ignored.contains(&Signal::SIGCHLD) {
            // It cannot stay so: the kernel would throw a child's status away (waitpid(2)).
            disposition::set_default(Signal::SIGCHLD);
        }
        let mut mask_at_entry = SigSet::empty();
        let source = SignalSource::open(&HEARD, &mut mask_at_entry)?;
        // Rust's runtime ignores SIGPIPE; what was inherited is known from before it.
        let ignored = ignored.into_iter().filter(|signal| *signal != Signal::SIGPIPE).collect();
        Ok(Self { source, queue: VecDeque::new(), mask_at_entry, inherited: Inherited { ignored } })
    }

    /// The mask that terraform must get.
    pub(crate) fn mask_at_entry(&self) -> &SigSet {
        &self.mask_at_entry
    }

    /// Puts the mask back, for a program that we become after all.
    pub(crate) fn stop_listening(&self) {
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&self.mask_at_entry), None);
    }

    /// The dispositions that matter to us, as they were inherited.
    pub(crate) fn inherited(&self) -> &Inherited {
        &self.inherited
    }

    /// The next signal that has arrived, or `None` when there is none now.
    pub(crate) fn next(&mut self) -> Option<Arrival> {
        self.fetch();
        self.queue.pop_front()
    }

    /// The next signal by which somebody asks for an end: INT, TERM, or HUP where that was not ignored at entry. What else
    /// has arrived before it is passed over.
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

    /// Signals were fetched that [`Signals::next`] has not yet returned: the descriptor will not tell of them again.
    pub(crate) fn is_queued(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Takes one kind of signal out of those that have arrived. True if there was one.
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

    /// Stops this process, or its whole group, with the default action of `signal` (TSTP, TTIN or TTOU), and comes
    /// back when it was continued. False if the kernel discarded the stop, as it does in an orphaned process group,
    /// where nobody could ever continue us (POSIX 2.4.3, "Orphaned process groups").
    ///
    /// SIGSTOP would not be discarded there: that is why it is never used.
    pub(crate) fn stop(&mut self, signal: Signal, whole_group: bool) -> bool {
        self.take(Signal::SIGCONT);
        self.take(signal);
        let previous = disposition::set_default(signal);
        let to = nix::unistd::Pid::from_raw(if whole_group { 0 } else { nix::unistd::getpid().as_raw() });
        let _ = nix::sys::signal::kill(to, signal);
        let mut only = SigSet::empty();
        only.add(signal);
        // Unblocked, the pending stop acts before sigprocmask returns; we go on from here when somebody sends CONT.
        let mut mask = SigSet::empty();
        let _ = sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&only), Some(&mut mask));
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&mask), None);
        disposition::restore(signal, &previous);
        // CONT is listened to like the rest, so the one that woke us is waiting.
        self.take(Signal::SIGCONT)
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.source.as_fd()
    }
}

/// Gives `signal` back its default action, to die of it.
pub(crate) fn default_action(signal: Signal) {
    disposition::set_default(signal);
}
