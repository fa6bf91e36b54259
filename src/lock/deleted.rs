//! The result of a conditional delete.

use crate::aws::failure::Failure;
use crate::lease::record::Claim;
use crate::lease::takeover::DeleteResult;

/// The result of a conditional delete, as the service reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Deleted {
    /// The service accepted the condition and deleted what was read. With it, it has deleted this claim of another
    /// host. `None` if the lock was not claimed.
    Yes(Option<Claim>),
    /// The condition failed, and the request was sent only once, so it has deleted nothing. What was read no longer
    /// exists, or something else has replaced it. The caller must read the location again.
    Changed,
    /// The condition failed, and the request was sent more than once: if the response to an attempt is lost, the SDK
    /// sends the request again. So an earlier attempt may have deleted what was read.
    Unclear,
}

impl Deleted {
    /// The result of a request whose condition has failed. `were_several` is whether it was sent more than once.
    pub(super) fn refused(were_several: bool) -> Self {
        if were_several { Self::Unclear } else { Self::Changed }
    }

    /// Returns what the result of the delete number `attempt`, from 0, shows. After a first delete, a condition that
    /// has failed no longer shows who has deleted what was read.
    pub(super) fn of_attempt(self, attempt: u32) -> Self {
        if self == Self::Changed { Self::refused(attempt > 0) } else { self }
    }

    fn result(&self) -> DeleteResult {
        match self {
            Self::Yes(_) => DeleteResult::Confirmed,
            Self::Changed => DeleteResult::Refused,
            Self::Unclear => DeleteResult::Unknown,
        }
    }
}

/// Sends the conditional delete `delete`, and notes in `result` what is known about it. As long as there is no
/// response, and if the request fails, it may have succeeded.
///
/// # Errors
/// As `delete`.
pub(super) async fn noted(
    result: &mut DeleteResult,
    delete: impl Future<Output = Result<Deleted, Failure>>,
) -> Result<Deleted, Failure> {
    let before = *result;
    *result = before.max(DeleteResult::Unknown);
    let deleted = delete.await?;
    *result = before.max(deleted.result());
    Ok(deleted)
}
