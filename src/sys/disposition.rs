//! Reads and changes the dispositions of signals in this process, with sigaction(2).

use nix::sys::signal::Signal;

/// A disposition that was replaced. [`restore`] sets it again.
pub(crate) struct Disposition(libc::sigaction);

fn read(signal: Signal) -> libc::sigaction {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: a null new action changes nothing. The current action is written into `action`, which is zeroed and
    // therefore valid even if the call fails.
    unsafe {
        libc::sigaction(signal as i32, std::ptr::null(), action.as_mut_ptr());
        action.assume_init()
    }
}

fn write(signal: Signal, action: &libc::sigaction) {
    // SAFETY: `action` is a complete sigaction whose handler is SIG_DFL, SIG_IGN or a handler that the kernel returned
    // before.
    unsafe { libc::sigaction(signal as i32, action, std::ptr::null_mut()) };
}

/// Returns whether this process ignores `signal`.
pub(crate) fn is_ignored(signal: Signal) -> bool {
    read(signal).sa_sigaction == libc::SIG_IGN
}

/// Sets `signal` to its default action and returns the previous disposition. Async-signal-safe.
pub(crate) fn set_default(signal: Signal) -> Disposition {
    set(signal, libc::SIG_DFL)
}

/// Ignores `signal` and returns the previous disposition. If the signal is pending, this discards it (sigaction(2)).
/// Async-signal-safe, because this is called between fork and exec.
pub(crate) fn set_ignored(signal: Signal) -> Disposition {
    set(signal, libc::SIG_IGN)
}

/// Sets `signal` to `disposition` again. Async-signal-safe.
pub(crate) fn restore(signal: Signal, disposition: &Disposition) {
    write(signal, &disposition.0);
}

fn set(signal: Signal, handler: usize) -> Disposition {
    let previous = read(signal);
    // SAFETY: all zeroes is a valid sigaction: no flags, an empty mask, SIG_DFL.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    write(signal, &action);
    Disposition(previous)
}
