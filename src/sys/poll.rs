//! poll(2) over a list of descriptors.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Waits until one of `awaited` is ready or `timeout` has passed. Without a timeout (`None`) it waits for ever. Returns
/// for each descriptor whether it is ready.
///
/// An error or a hangup on a descriptor counts as ready: the read or write that follows reports which it is. When
/// poll(2) itself fails (for example with EINTR), no descriptor counts as ready.
pub(crate) fn wait(awaited: &[(BorrowedFd<'_>, PollFlags)], timeout: Option<Duration>) -> Vec<bool> {
    let mut descriptors: Vec<_> = awaited.iter().map(|(descriptor, flags)| PollFd::new(*descriptor, *flags)).collect();
    // Rounded up: with a wait that ends too early, the caller would spin until its deadline.
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
