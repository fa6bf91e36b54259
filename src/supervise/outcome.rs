//! Makes this process end in the same way as terraform.

use nix::sys::signal::{SigSet, SigmaskHow, kill, sigprocmask};
use nix::unistd::getpid;

use crate::sys::wait::Ended;
use crate::sys::{process, signals};

/// Returns the exit code with which `main` must exit. `ended` is how terraform ended. If a signal killed terraform,
/// this function normally does not return.
///
/// If a signal killed terraform, this function kills this process with the same signal, with its default action and
/// without a core file. So the parent of `tf` gets the same wait status as from terraform. The wait status matters: a
/// shell aborts its script if a child died of SIGINT, but not if the child exited with code 130. Only PID 1 of a pid
/// namespace survives the signal (pid_namespaces(7)). For PID 1, the result is 128 + the signal's number, as in a
/// shell.
pub(crate) fn end_as(ended: Ended) -> u8 {
    match ended {
        Ended::Exited(code) => u8::try_from(code & 0xff).unwrap_or(u8::MAX),
        Ended::Killed(signal) => {
            process::disable_core_dumps();
            signals::default_action(signal);
            let _ = kill(getpid(), signal);
            let mut only = SigSet::empty();
            only.add(signal);
            let _ = sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&only), None);
            128u8.saturating_add(u8::try_from(signal as i32).unwrap_or(127))
        }
    }
}
