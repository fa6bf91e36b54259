//! The source of signals on Linux: a signalfd(2).

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::{Arrival, SignalOrigin};

/// A descriptor from which the blocked signals are read.
#[derive(Debug)]
pub(super) struct SignalSource(SignalFd);

impl SignalSource {
    /// Opens a descriptor for the signals in `heard`. Blocks every signal of this process except those of a fault, and
    /// stores the previous signal mask in `mask`.
    ///
    /// A blocked signal that is not in `heard` remains pending for ever, so it has no effect. It has no effect on
    /// terraform either, whose runtime ignores it. The signals of a fault are not blocked, because the kernel kills the
    /// process for a fault in any case.
    pub(super) fn open(heard: &[Signal], mask: &mut SigSet) -> io::Result<Self> {
        let mut all = SigSet::all();
        for fault in [Signal::SIGSEGV, Signal::SIGBUS, Signal::SIGFPE, Signal::SIGILL, Signal::SIGTRAP, Signal::SIGSYS]
        {
            all.remove(fault);
        }
        sigprocmask(SigmaskHow::SIG_SETMASK, Some(&all), Some(mask))?;
        let set: SigSet = heard.iter().copied().collect();
        match SignalFd::with_flags(&set, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC) {
            Ok(descriptor) => Ok(Self(descriptor)),
            Err(error) => {
                sigprocmask(SigmaskHow::SIG_SETMASK, Some(mask), None)?;
                Err(error.into())
            }
        }
    }

    /// Does nothing: the signal mask decides what this reads.
    #[expect(clippy::unused_self, reason = "elsewhere there are handlers")]
    pub(super) fn close(&self) {}

    /// Returns the next signal. `None` if none has arrived.
    pub(super) fn read(&self) -> Option<Arrival> {
        let info = self.0.read_signal().ok()??;
        let signal = Signal::try_from(info.ssi_signo.cast_signed()).ok()?;
        // SI_USER, SI_QUEUE and SI_TKILL are 0 or less. The codes of signals from the kernel are greater than 0
        // (sigaction(2)).
        let origin = if info.ssi_code > 0 { SignalOrigin::Kernel } else { SignalOrigin::Process };
        Some(Arrival { signal, origin, sender: super::sender(origin, info.ssi_pid.cast_signed()) })
    }
}

impl AsFd for SignalSource {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
