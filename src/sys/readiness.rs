//! Waits in a task until a descriptor is readable, such as a pidfd.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};

/// A descriptor that a task can wait for.
#[derive(Debug)]
pub(crate) struct Readiness(AsyncFd<OwnedFd>);

impl Readiness {
    /// Registers `descriptor` with the runtime of the task that calls this.
    ///
    /// # Errors
    /// The error of epoll_ctl(2) or kevent(2), for example for a regular file.
    pub(crate) fn of(descriptor: OwnedFd) -> io::Result<Self> {
        // SAFETY: the runtime uses the number of the descriptor as long as the value is registered. The `AsyncFd` owns
        // the descriptor and never lends it mutably, so the number stays that of the same file until it is dropped.
        let registered = unsafe { AsyncFd::register_with_interest(descriptor, Interest::READABLE) };
        Ok(Self(registered?))
    }

    /// Waits until the descriptor is readable. A caller that then finds nothing to read must clear that state in the
    /// result.
    ///
    /// # Errors
    /// If the runtime ends.
    pub(crate) async fn readable(&self) -> io::Result<AsyncFdReadyGuard<'_, OwnedFd>> {
        self.0.readable().await
    }
}
