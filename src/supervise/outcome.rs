//! Ends this process in the same way as terraform ended.

use nix::sys::signal::{SigSet, SigmaskHow, kill, sigprocmask};
use nix::unistd::getpid;

use crate::sys::process;
use crate::sys::signals;
use crate::sys::wait::Ended;

/// Returns the exit code for `ended`, with which `main` exits.
///
/// If a signal killed terraform, the same signal kills this process here, with its default action and without a core
/// file. The parent of `tf` then sees what it would have seen of terraform: a shell aborts its script if a child died
/// of SIGINT, and not if it exited with code 130. Only PID 1 of a pid namespace survives the signal
/// (pid_namespaces(7)). It exits with 128 + N, as a shell would.
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
