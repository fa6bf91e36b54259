//! Ending as terraform ended.

use nix::sys::signal::{SigSet, SigmaskHow, kill, sigprocmask};
use nix::unistd::getpid;

use crate::sys::process;
use crate::sys::signals;
use crate::sys::wait::Ended;

/// The exit code for `ended`, for `main` to leave with.
///
/// Where a signal ended terraform the same signal ends us, with its default action and without a core file, so that
/// our parent sees what it would have seen: a shell aborts its script on a child that died of SIGINT, and not on exit
/// code 130. Only PID 1 of a namespace survives that (pid_namespaces(7)), and says 128 + N as a shell would.
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
