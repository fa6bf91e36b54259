//! The result of a conditional delete.

/// What a conditional delete did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deleted {
    /// It is gone, by us.
    Yes,
    /// It is no longer the one that was read: to be read again. Gone, another's, or our own delete, whose answer was
    /// lost, so that the SDK sent it twice.
    Changed,
}
