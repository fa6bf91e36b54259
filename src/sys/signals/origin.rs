//! Decides where a signal comes from, on systems that do not say whether the kernel generated it.
//!
//! On macOS, `si_code` is 0 for every signal except SIGCHLD, and `si_pid` is the process that the kernel was working
//! for when it generated the signal (`psignal_internal`, bsd/kern/kern_sig.c of xnu). For ^C, that is the process that
//! has written the key into the terminal: the terminal program, sshd or tmux.

use nix::sys::signal::Signal;

use super::SignalOrigin;

/// What is known about a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known {
    /// The kernel says that it generated the signal (`si_code` > 0), or names no sender.
    is_kernels: bool,
    /// This process is in the foreground process group of its terminal.
    is_foreground: bool,
    /// The sender is running, and is in another session than this process.
    is_sender_elsewhere: bool,
}

/// Returns where `signal` comes from. The kernel sends the signals of a terminal's keys, and the signal of a new window
/// size, to the foreground process group. The process that writes into the terminal is outside the session that the
/// terminal controls. A kill(1) in this session is in it.
///
/// A signal that a process outside the session sends to a `tf` in the foreground counts as a key.
fn decide(signal: Signal, known: Known) -> SignalOrigin {
    let is_terminals = matches!(signal, Signal::SIGINT | Signal::SIGQUIT | Signal::SIGTSTP | Signal::SIGWINCH);
    if known.is_kernels || (is_terminals && known.is_foreground && known.is_sender_elsewhere) {
        SignalOrigin::Kernel
    } else {
        SignalOrigin::Process
    }
}

/// Returns where `signal` comes from. `is_kernels` is true if its code says that the kernel generated it. `sender` is
/// its `si_pid`.
#[cfg(any(not(target_os = "linux"), tf_portable))]
pub(super) fn of(signal: Signal, is_kernels: bool, sender: i32) -> SignalOrigin {
    let is_kernels = is_kernels || sender == 0;
    // Linux says which signals the kernel generated.
    if is_kernels || cfg!(target_os = "linux") {
        return decide(signal, Known { is_kernels, is_foreground: false, is_sender_elsewhere: false });
    }
    let own = nix::unistd::getsid(None);
    let senders = nix::unistd::getsid(Some(nix::unistd::Pid::from_raw(sender)));
    let is_foreground = crate::sys::terminal::Terminal::is_our_turn();
    let is_sender_elsewhere = senders.is_ok_and(|session| Ok(session) != own);
    decide(signal, Known { is_kernels, is_foreground, is_sender_elsewhere })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::signals::HEARD;

    #[test]
    fn a_key_is_what_reaches_the_foreground_from_outside_the_session() {
        for signal in HEARD {
            for bits in 0..8u8 {
                let bit = |place: u8| bits & (1 << place) != 0;
                let known = Known { is_kernels: bit(0), is_foreground: bit(1), is_sender_elsewhere: bit(2) };
                let is_key = matches!(signal.as_str(), "SIGINT" | "SIGQUIT" | "SIGTSTP" | "SIGWINCH");
                let expected = bit(0) || (is_key && bit(1) && bit(2));
                assert_eq!(decide(signal, known) == SignalOrigin::Kernel, expected, "{signal} {known:?}");
            }
        }
    }
}
