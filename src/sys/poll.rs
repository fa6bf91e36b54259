//! poll(2) over a list of descriptors.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Waits until one of `awaited` is ready or `timeout` has passed. If `timeout` is `None`, the wait has no time limit.
/// Returns for each descriptor whether it is ready.
///
/// A descriptor with an error or a hangup counts as ready, because the read or write that follows reports which of the
/// two it is. If poll(2) itself fails (for example with EINTR), no descriptor counts as ready.
pub(crate) fn wait(awaited: &[(BorrowedFd<'_>, PollFlags)], timeout: Option<Duration>) -> Vec<bool> {
    let mut descriptors: Vec<_> = awaited.iter().map(|(descriptor, flags)| PollFd::new(*descriptor, *flags)).collect();
    // The timeout is rounded up. If the wait ended too early, the caller would poll in a busy loop until its deadline.
    let timeout = timeout.map_or(PollTimeout::NONE, |timeout| {
        let milliseconds = timeout.as_micros().div_ceil(1000);
        PollTimeout::try_from(milliseconds).unwrap_or(PollTimeout::MAX)
    });
    let _ = poll(&mut descriptors, timeout);
    descriptors.iter().map(|descriptor| descriptor.any().unwrap_or(false)).collect()
}

/// Returns whether `descriptor` is ready now, without waiting.
pub(crate) fn ready_now(descriptor: BorrowedFd<'_>, flags: PollFlags) -> bool {
    wait(&[(descriptor, flags)], Some(Duration::ZERO)) == [true]
}
