//! Signal handlers that write into a pipe, for systems without signalfd.
//!
//! Handlers are weaker than a signalfd in two ways. First, between a fork and the child's exec, a handler could still
//! run in the child, so every signal must be blocked around the fork (`sys::spawn`). Second, macOS reports as the
//! sender of a key's signal the process that has typed the key into the terminal ([`super::origin`]).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use signal_hook_registry::SigId;

use super::{Arrival, SignalOrigin, origin};
use crate::sys::descriptor;
use crate::sys::disposition::{self, Disposition};

/// The handlers that write into the pipe of the last [`SignalSource`] of this process, or of the process from which it
/// was forked.
static INSTALLED: Mutex<Vec<SigId>> = Mutex::new(Vec::new());

/// The dispositions that [`SignalSource::close`] has replaced. signal-hook sets its own only once for each signal, so
/// the next [`SignalSource::open`] must set them again.
static REPLACED: Mutex<Vec<(Signal, Disposition)>> = Mutex::new(Vec::new());

/// The pipe into which the handlers write.
#[derive(Debug)]
pub(super) struct SignalSource {
    arrivals: OwnedFd,
    _writer: OwnedFd,
    /// The signals with a handler, and whether this process ignored each before.
    handled: Vec<(Signal, bool)>,
}

impl SignalSource {
    /// Installs a handler for each signal in `heard`, except SIGTTIN and SIGTTOU. Stores the previous signal mask in
    /// `mask`.
    pub(super) fn open(heard: &[Signal], mask: &mut SigSet) -> io::Result<Self> {
        let (arrivals, writer) = descriptor::pipe()?;
        for end in [&arrivals, &writer] {
            fcntl(end, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        }
        let (number, reader) = (writer.as_raw_fd(), std::process::id().cast_signed());
        let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
        // Here, the descriptor of an earlier pipe may be another file by now.
        for handler in installed.drain(..) {
            signal_hook_registry::unregister(handler);
        }
        // SIGTTIN and SIGTTOU are blocked instead. With a handler, tcsetpgrp(3) from the background would be
        // interrupted repeatedly and would never succeed.
        let (waiting, handled): (Vec<Signal>, Vec<Signal>) =
            heard.iter().partition(|signal| matches!(signal, Signal::SIGTTIN | Signal::SIGTTOU));
        let handled: Vec<_> = handled.into_iter().map(|signal| (signal, disposition::is_ignored(signal))).collect();
        for (signal, disposition) in REPLACED.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            disposition::restore(signal, &disposition);
        }
        for (signal, _) in &handled {
            let signal_number = *signal as i32;
            let write = move |info: &libc::siginfo_t| {
                // SAFETY: the kernel has filled `info` for a signal. In the process `reader`, the descriptor `number`
                // remains open until this handler is replaced.
                unsafe {
                    // A forked child has this handler until it has called execve(2) or this function. The signal was
                    // sent to the child, not to the reader.
                    if libc::getpid() != reader {
                        return;
                    }
                    let kernel = info.si_code > 0;
                    let mut bytes = [u8::try_from(signal_number).unwrap_or(0), u8::from(kernel), 0, 0, 0, 0];
                    bytes[2..].copy_from_slice(&info.si_pid().to_ne_bytes());
                    libc::write(number, bytes.as_ptr().cast(), bytes.len());
                }
            };
            // SAFETY: the action calls only getpid(2) and write(2), which are async-signal-safe.
            installed.push(unsafe { signal_hook_registry::register_sigaction(signal_number, write)? });
        }
        sigprocmask(SigmaskHow::SIG_BLOCK, Some(&waiting.into_iter().collect()), Some(mask))?;
        sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&handled.iter().map(|(signal, _)| *signal).collect()), None)?;
        Ok(Self { arrivals, _writer: writer, handled })
    }

    /// Removes the handlers, so that each signal has its default action again, or is ignored as before.
    pub(super) fn close(&self) {
        let mut replaced = REPLACED.lock().unwrap_or_else(PoisonError::into_inner);
        for (signal, was_ignored) in &self.handled {
            let set = if *was_ignored { disposition::set_ignored } else { disposition::set_default };
            replaced.push((*signal, set(*signal)));
        }
    }

    /// Returns the next signal, or `None` if none has arrived. A SIGTTIN or SIGTTOU wakes no poll, because it is
    /// blocked.
    pub(super) fn read(&self) -> Option<Arrival> {
        let mut bytes = [0; 6];
        // The 6 bytes of a signal are written and read in one piece, because they are fewer than PIPE_BUF.
        if nix::unistd::read(&self.arrivals, &mut bytes) != Ok(bytes.len()) {
            return blocked_arrival();
        }
        let [number, kernel, pid @ ..] = bytes;
        let signal = Signal::try_from(i32::from(number)).ok()?;
        let pid = i32::from_ne_bytes(pid);
        let (origin, sender) = origin::of(signal, kernel == 1, pid);
        Some(Arrival { signal, origin, sender })
    }
}

/// Takes a SIGTTIN or SIGTTOU that is pending. `None` if neither is.
fn blocked_arrival() -> Option<Arrival> {
    // SAFETY: a zeroed set is valid memory for the call.
    let pending = unsafe {
        let mut pending: libc::sigset_t = std::mem::zeroed();
        libc::sigpending(&raw mut pending);
        pending
    };
    // SAFETY: the set is complete.
    let is_pending = |signal: &Signal| unsafe { libc::sigismember(&raw const pending, *signal as i32) } == 1;
    let signal = [Signal::SIGTTIN, Signal::SIGTTOU].into_iter().find(is_pending)?;
    // To ignore a signal discards it.
    disposition::restore(signal, &disposition::set_ignored(signal));
    Some(Arrival { signal, origin: SignalOrigin::Kernel, sender: None })
}

impl AsFd for SignalSource {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.arrivals.as_fd()
    }
}
