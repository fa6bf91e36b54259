//! poll(2) over a list of descriptors.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Waits until one of `awaited` is ready, or `timeout` is over (`None`: for ever). Says for each whether it is.
///
/// An error or a hangup on a descriptor counts as ready: the read or write that follows tells what it is.
pub(crate) fn wait(awaited: &[(BorrowedFd<'_>, PollFlags)], timeout: Option<Duration>) -> Vec<bool> {
    let mut descriptors: Vec<_> = awaited.iter().map(|(descriptor, flags)| PollFd::new(*descriptor, *flags)).collect();
    // Rounded up: to wake a moment too early would be to spin until the moment has come.
    let timeout = timeout.map_or(PollTimeout::NONE, |timeout| {
        let milliseconds = timeout.as_micros().div_ceil(1000);
        PollTimeout::try_from(milliseconds).unwrap_or(PollTimeout::MAX)
    });
    let _ = poll(&mut descriptors, timeout);
    descriptors.iter().map(|descriptor| descriptor.any().unwrap_or(false)).collect()
}

/// Whether `descriptor` is ready at this moment.
pub(crate) fn ready_now(descriptor: BorrowedFd<'_>, flags: PollFlags) -> bool {
    wait(&[(descriptor, flags)], Some(Duration::ZERO)) == [true]
}
