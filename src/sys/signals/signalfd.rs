//! signalfd(2): Linux.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::{Arrival, SignalOrigin};

/// The blocked signals, as a descriptor.
#[derive(Debug)]
pub(super) struct SignalSource(SignalFd);

impl SignalSource {
    /// Blocks every signal of this process, but those that a fault of its own makes: blocked or not, the kernel kills
    /// for these. Opens a descriptor for `heard`; the rest, which terraform's runtime ignores, waits for ever. The mask
    /// that was in force goes into `mask`.
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

    /// The next signal, if one has arrived.
    pub(super) fn read(&self) -> Option<Arrival> {
        let info = self.0.read_signal().ok()??;
        let signal = Signal::try_from(info.ssi_signo.cast_signed()).ok()?;
        // SI_USER, SI_QUEUE, SI_TKILL are 0 and below; what the kernel makes is above (sigaction(2)).
        let origin = if info.ssi_code > 0 { SignalOrigin::Kernel } else { SignalOrigin::Process };
        Some(Arrival { signal, origin, sender: super::sender(origin, info.ssi_pid.cast_signed()) })
    }
}

impl AsFd for SignalSource {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
