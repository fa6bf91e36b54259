//! Signal handlers that write the number of each signal into a pipe, unless one certain process may have sent it.
//!
//! The kernel names no sender of a signal that it has held back because it was blocked or its process was stopped
//! (`psignal_internal`, bsd/kern/kern_sig.c of xnu). Such a signal is not reported: if `tf` has sent it, it would
//! count as a key, and so as one stop request more. A key that is not reported has still reached terraform.

use std::io;
use std::sync::atomic::{AtomicI32, Ordering};

use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::unistd::Pid;

/// The process whose signals are not reported.
static SENDER: AtomicI32 = AtomicI32::new(0);
/// The descriptor of the pipe.
static WRITER: AtomicI32 = AtomicI32::new(-1);

/// Installs the handler for `signals` and unblocks them. The handler writes the number of a signal as one byte into
/// `writer`, unless `sender` has sent it (`si_pid`, sigaction(2)) or the sender is unknown. If the pipe has no reader
/// any more, it ends this process. SIGPIPE must be blocked.
///
/// # Errors
/// The error of sigaction(2) or sigprocmask(2).
pub(crate) fn install(signals: &[Signal], sender: Pid, writer: i32) -> io::Result<()> {
    SENDER.store(sender.as_raw(), Ordering::Relaxed);
    WRITER.store(writer, Ordering::Relaxed);
    for signal in signals {
        // SAFETY: a zeroed sigaction is valid, and `report` calls only async-signal-safe functions (sigaction(2)).
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = report as *const () as usize;
            // A signal that came while the handler runs would have no sender if it were held back.
            action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
            libc::sigemptyset(&raw mut action.sa_mask);
            if libc::sigaction(*signal as i32, &raw const action, std::ptr::null_mut()) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
    }
    sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&signals.iter().copied().collect::<SigSet>()), None)?;
    Ok(())
}

extern "C" fn report(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a complete siginfo_t. write(2) and _exit(2) are async-signal-safe.
    unsafe {
        let byte = u8::try_from(signal).unwrap_or(0);
        let sender = (*info).si_pid();
        let is_reported = sender != 0 && sender != SENDER.load(Ordering::Relaxed);
        if is_reported && libc::write(WRITER.load(Ordering::Relaxed), (&raw const byte).cast(), 1) != 1 {
            libc::_exit(0);
        }
    }
}
