//! The signals that reach `tf`, one after the other, each with who sent it.
//!
//! All of them are blocked and read from a signalfd. No handler is installed, so every disposition stays as it was
//! inherited, and the one thing to undo in terraform is the mask. signalfd(2) also reports a signal that was ignored
//! at entry as long as it is blocked, which is what INT and TERM need (terraform catches both even then, because Go's
//! `signal.Notify` does) and what HUP must be protected from (`nohup`).

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Who made a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
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
    pub(crate) origin: Origin,
}

/// What was inherited and matters to what we do with a signal.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Inherited {
    /// SIGHUP was ignored: `nohup`.
    pub(crate) hup_ignored: bool,
    /// SIGINT was ignored: `tf &` in a shell without job control.
    pub(crate) int_ignored: bool,
    /// SIGTSTP was ignored: ^Z does nothing here.
    pub(crate) tstp_ignored: bool,
    /// SIGCHLD was ignored. It cannot stay so: the kernel would then throw a child's status away (waitpid(2)).
    pub(crate) chld_ignored: bool,
}

/// The signals of this process, blocked and queued.
#[derive(Debug)]
pub(crate) struct Signals {
    descriptor: SignalFd,
    queue: VecDeque<Arrival>,
    mask_at_entry: SigSet,
    inherited: Inherited,
}

/// Signals that only a fault of our own makes. Blocking them would change nothing, for the kernel then kills.
const FAULTS: [Signal; 5] = [
    Signal::SIGSEGV,
    Signal::SIGBUS,
    Signal::SIGFPE,
    Signal::SIGILL,
    Signal::SIGTRAP,
];

impl Signals {
    /// Blocks every signal of this process and starts to listen. To be called while there is one thread.
    pub(crate) fn listen() -> io::Result<Self> {
        let mut all = SigSet::all();
        for fault in FAULTS {
            all.remove(fault);
        }
        let mut mask_at_entry = SigSet::empty();
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&all), Some(&mut mask_at_entry))?;
        let inherited = Inherited {
            hup_ignored: ignored(Signal::SIGHUP),
            int_ignored: ignored(Signal::SIGINT),
            tstp_ignored: ignored(Signal::SIGTSTP),
            chld_ignored: ignored(Signal::SIGCHLD),
        };
        if inherited.chld_ignored {
            super::disposition::set_default(Signal::SIGCHLD);
        }
        let descriptor =
            SignalFd::with_flags(&all, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        Ok(Self { descriptor, queue: VecDeque::new(), mask_at_entry, inherited })
    }

    /// The mask that terraform must get.
    pub(crate) fn mask_at_entry(&self) -> &SigSet {
        &self.mask_at_entry
    }

    /// The dispositions that matter to us, as they were inherited.
    pub(crate) fn inherited(&self) -> Inherited {
        self.inherited
    }

    /// The next signal that has arrived, or `None` when there is none now.
    pub(crate) fn next(&mut self) -> Option<Arrival> {
        self.fetch();
        self.queue.pop_front()
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
        while let Ok(Some(info)) = self.descriptor.read_signal() {
            // Real-time signals have no name in nix; nobody sends them to terraform, whose runtime ignores them.
            let Ok(signal) = Signal::try_from(info.ssi_signo.cast_signed()) else { continue };
            let origin = if info.ssi_code > 0 { Origin::Kernel } else { Origin::Process };
            self.queue.push_back(Arrival { signal, origin });
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
        let previous = super::disposition::set_default(signal);
        let to = nix::unistd::Pid::from_raw(if whole_group { 0 } else { nix::unistd::getpid().as_raw() });
        let _ = nix::sys::signal::kill(to, signal);
        let mut only = SigSet::empty();
        only.add(signal);
        // Unblocked, the pending stop acts before sigprocmask returns; we go on from here when somebody sends CONT.
        let _ = sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&only), None);
        let _ = sigprocmask(SigmaskHow::SIG_BLOCK, Some(&only), None);
        super::disposition::restore(signal, previous);
        // CONT is blocked like the rest, so the one that woke us is waiting in the signalfd.
        self.take(Signal::SIGCONT)
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> i32 {
        self.descriptor.as_raw_fd()
    }
}

/// Gives `signal` back its default action, to die of it.
pub(crate) fn default_action(signal: Signal) {
    super::disposition::set_default(signal);
}

fn ignored(signal: Signal) -> bool {
    super::disposition::is_ignored(signal)
}
