//! What a release knows about the run whose lock it deletes, and how long it may try.

use std::time::Duration;

use crate::aws::credentials::Purpose;
use crate::lock::proof::Run;
use crate::lock::reached::Reached;
use crate::lock::release_step::LateWrites;

/// How long to keep searching for a lock that was requested, but that no read has found.
pub(super) const LATE_REQUEST_WINDOW: Duration = Duration::from_secs(5);

/// How long to retry a service that fails or does not respond, when the lock of a run must be released. It is not
/// longer than a person would wait.
pub(crate) const SERVICE_TIMEOUT: Duration = Duration::from_secs(20);

/// Like [`SERVICE_TIMEOUT`], but for a request that only serves an explanation, or for a lock that most likely does not
/// exist.
pub(crate) const EXPLANATION_TIMEOUT: Duration = Duration::from_secs(3);

/// What is known about the run whose lock must be released.
#[derive(Clone, Debug)]
pub(crate) struct ReleaseContext {
    /// The facts that decide whether the lock belongs to the run.
    pub(crate) run: Run,
    /// Whether a lock request may still be in flight. That is so only if terraform has just died: a terraform that
    /// exits by itself has received every response.
    pub(crate) request_may_land: bool,
    /// Which writes of the run may still land. If none may, a lock request that nobody has found cannot land either.
    pub(crate) late_writes: LateWrites,
    /// Whether terraform's connections were in the network namespace of this process, so that `tf` sees what the kernel
    /// still sends for it ([`crate::sys::connections::StillSending`]).
    pub(crate) is_network_shared: bool,
    /// The identities with which the run reached its backends. If a lock is not found with another identity, it may
    /// still exist in the run's account.
    pub(crate) reached: Reached,
}

/// The time limit of a release, and the purpose of its credentials.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    /// How long to retry a service that fails or does not respond.
    pub(crate) limit: Duration,
    /// What the credentials are for. This decides whether a person may be prompted.
    pub(crate) purpose: Purpose,
}

impl Effort {
    /// For a lock of this run, or for a lock that a person wants to release.
    pub(crate) const WORK: Self = Self { limit: SERVICE_TIMEOUT, purpose: Purpose::Work };

    /// For a lock that is only explained in a message, or that most likely does not exist.
    pub(crate) const EXPLANATION: Self = Self { limit: EXPLANATION_TIMEOUT, purpose: Purpose::Explanation };
}
