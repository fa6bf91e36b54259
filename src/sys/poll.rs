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

/// Returns whether the other end of `descriptor`, a socket or a pipe, is closed. There may still be something to read.
///
/// The poll requests an event, although no event has to be requested for a hang-up (poll(2)): macOS reports a hang-up
/// only together with a requested event (`poll_nocancel`, bsd/kern/sys_generic.c of xnu).
pub(crate) fn has_hung_up(descriptor: BorrowedFd<'_>) -> bool {
    let mut polled = [PollFd::new(descriptor, PollFlags::POLLIN)];
    let _ = poll(&mut polled, PollTimeout::ZERO);
    let end = PollFlags::POLLHUP | PollFlags::POLLERR | PollFlags::POLLNVAL;
    polled[0].revents().is_some_and(|found| found.intersects(end))
}

/// Returns whether `descriptor` is ready now, without waiting.
pub(crate) fn ready_now(descriptor: BorrowedFd<'_>, flags: PollFlags) -> bool {
    wait(&[(descriptor, flags)], Some(Duration::ZERO)) == [true]
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_hang_up_is_seen_whether_or_not_there_is_something_to_read() {
        for text in [&b""[..], b"text"] {
            let (near, mut far) = UnixStream::pair().unwrap();
            far.write_all(text).unwrap();
            assert!(!has_hung_up(near.as_fd()), "{text:?}");
            drop(far);
            assert!(has_hung_up(near.as_fd()), "{text:?}");
        }
        let (reader, writer) = std::io::pipe().unwrap();
        assert!(!has_hung_up(reader.as_fd()));
        drop(writer);
        assert!(has_hung_up(reader.as_fd()));
    }
}
