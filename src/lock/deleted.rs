//! The result of a conditional delete.

/// The result of a conditional delete, as the service reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deleted {
    /// The service accepted the condition and deleted what was read.
    Yes,
    /// The condition failed, so nothing was deleted by this request, and the caller must read the location again. What
    /// was read no longer exists, or something else has replaced it, or an earlier attempt of the same delete
    /// succeeded: if the response to that attempt is lost, the SDK sends the request again.
    Changed,
}
