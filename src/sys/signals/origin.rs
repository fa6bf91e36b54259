//! Decides where a signal comes from, on systems that do not say whether the kernel generated it.
//!
//! On macOS, `si_code` is 0 for every signal except SIGCHLD, and `si_pid` is the process that the kernel was working
//! for when it generated the signal (`psignal_internal`, bsd/kern/kern_sig.c of xnu). For ^C, that is the process that
//! has written the key into the terminal: the terminal program, sshd or tmux.
//!
//! Both are kept once for each process, and not for each signal. So the sender is unknown if two signals arrive at
//! once, or if the signal was held back, because it was blocked or its process was stopped: `si_pid` is 0 then, or
//! `si_code` is that of a SIGCHLD.

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::SignalOrigin;

/// What is known about a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Known {
    /// The kernel says that it generated the signal (`si_code` > 0), or names no sender. Never true on macOS.
    is_kernels: bool,
    /// This process is in the foreground process group of its terminal.
    is_foreground: bool,
    /// The sender is unknown, or it is running and is in another session than this process.
    is_sender_elsewhere: bool,
}

/// Returns where `signal` comes from. The kernel sends the signals of a terminal's keys, and the signal of a new window
/// size, to the foreground process group. The process that writes into the terminal is outside the session that the
/// terminal controls. A kill(1) in this session is in it.
///
/// A signal that a process outside the session sends to a `tf` in the foreground counts as a key, and so does one of an
/// unknown sender.
fn decide(signal: Signal, known: Known) -> SignalOrigin {
    let is_terminals = matches!(signal, Signal::SIGINT | Signal::SIGQUIT | Signal::SIGTSTP | Signal::SIGWINCH);
    if known.is_kernels || (is_terminals && known.is_foreground && known.is_sender_elsewhere) {
        SignalOrigin::Kernel
    } else {
        SignalOrigin::Process
    }
}

/// Returns where `signal` comes from, and the process that sent it, as [`super::Arrival`] has it. `is_kernels` is true
/// if its code is that of a signal that the kernel generates (`si_code` > 0). `sender` is its `si_pid`.
#[cfg(any(not(target_os = "linux"), tf_portable))]
pub(super) fn of(signal: Signal, is_kernels: bool, sender: i32) -> (SignalOrigin, Option<Pid>) {
    // Linux says which signals the kernel generated.
    if cfg!(target_os = "linux") {
        let is_kernels = is_kernels || sender == 0;
        let origin = decide(signal, Known { is_kernels, is_foreground: false, is_sender_elsewhere: false });
        return (origin, super::sender(origin, sender));
    }
    let sender = if is_kernels { 0 } else { sender };
    let origin = decide(
        signal,
        Known {
            is_kernels: false,
            is_foreground: crate::sys::terminal::Terminal::is_our_turn(),
            is_sender_elsewhere: is_elsewhere(sender, nix::unistd::getsid(None).ok(), |pid| {
                nix::unistd::getsid(pid).ok()
            }),
        },
    );
    (origin, super::sender(origin, sender))
}

/// Returns whether the process with the number `sender` is unknown, because the number is 0, or is running and is in
/// another session than `own`. `session` returns the session of a process, and `None` if it has exited.
fn is_elsewhere(sender: i32, own: Option<Pid>, session: impl Fn(Option<Pid>) -> Option<Pid>) -> bool {
    sender == 0 || session(Some(Pid::from_raw(sender))).is_some_and(|session| Some(session) != own)
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

    #[test]
    fn a_sender_is_elsewhere_if_it_runs_in_another_session_or_is_unknown() {
        let [here, there] = [10, 20].map(Pid::from_raw);
        let session = |pid: Option<Pid>| match pid.map(Pid::as_raw) {
            Some(11) => Some(here),
            Some(21) => Some(there),
            _ => None,
        };
        for (sender, expected) in [(11, false), (21, true), (31, false), (0, true)] {
            assert_eq!(is_elsewhere(sender, Some(here), session), expected, "{sender}");
        }
        assert!(is_elsewhere(11, None, session), "a process without a session is in no session of another");
    }
}
