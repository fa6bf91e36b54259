//! Signal handlers that write into a pipe, for systems without signalfd.
//!
//! Handlers are weaker than a signalfd in two ways. First, between a fork and the child's exec, a handler could still
//! run in the child, so every signal must be blocked around the fork (`sys::spawn`). Second, macOS reports as the
//! sender of a key's signal the process that has typed the key into the terminal ([`super::origin`]).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};

use super::{Arrival, origin};
use crate::sys::descriptor;

/// The pipe into which the handlers write.
#[derive(Debug)]
pub(super) struct SignalSource {
    arrivals: OwnedFd,
    _writer: OwnedFd,
}

impl SignalSource {
    /// Installs a handler for each signal in `heard`, except SIGTTIN and SIGTTOU. Stores the previous signal mask in
    /// `mask`.
    pub(super) fn open(heard: &[Signal], mask: &mut SigSet) -> io::Result<Self> {
        let (arrivals, writer) = descriptor::pipe()?;
        for end in [&arrivals, &writer] {
            fcntl(end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        }
        let number = writer.as_raw_fd();
        // SIGTTIN and SIGTTOU are blocked instead. With a handler, tcsetpgrp(3) from the background would be
        // interrupted repeatedly and would never succeed.
        let (waiting, handled): (Vec<Signal>, Vec<Signal>) =
            heard.iter().partition(|signal| matches!(signal, Signal::SIGTTIN | Signal::SIGTTOU));
        for signal in &handled {
            let signal_number = *signal as i32;
            let write = move |info: &libc::siginfo_t| {
                // SAFETY: the kernel has filled `info` for a signal, and `number` remains open as long as the program
                // runs.
                unsafe {
                    let kernel = info.si_code > 0;
                    let mut bytes = [u8::try_from(signal_number).unwrap_or(0), u8::from(kernel), 0, 0, 0, 0];
                    bytes[2..].copy_from_slice(&info.si_pid().to_ne_bytes());
                    libc::write(number, bytes.as_ptr().cast(), bytes.len());
                }
            };
            // SAFETY: the action calls only write(2), which is async-signal-safe.
            unsafe { signal_hook_registry::register_sigaction(signal_number, write)? };
        }
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&waiting.into_iter().collect()), Some(mask))?;
        sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&handled.into_iter().collect()), None)?;
        Ok(Self { arrivals, _writer: writer })
    }

    /// Returns the next signal, or `None` if none has arrived.
    pub(super) fn read(&self) -> Option<Arrival> {
        let mut bytes = [0; 6];
        // The 6 bytes of a signal are written and read in one piece, because they are fewer than PIPE_BUF.
        if nix::unistd::read(&self.arrivals, &mut bytes) != Ok(bytes.len()) {
            return None;
        }
        let [number, kernel, pid @ ..] = bytes;
        let signal = Signal::try_from(i32::from(number)).ok()?;
        let pid = i32::from_ne_bytes(pid);
        let origin = origin::of(signal, kernel == 1, pid);
        Some(Arrival { signal, origin, sender: super::sender(origin, pid) })
    }
}

impl AsFd for SignalSource {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.arrivals.as_fd()
    }
}
