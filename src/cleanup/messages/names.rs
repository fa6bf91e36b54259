//! How a message names a lock, and shows the text of others.

use crate::console::visible;
use crate::terraform::lock_info::LockInfo;
use crate::terraform::log::RecordedLock;

/// The fields of a lock that identify it to a person.
pub(super) struct NamedLock<'a> {
    operation: &'a str,
    path: &'a str,
    id: &'a str,
}

impl<'a> From<&'a RecordedLock> for NamedLock<'a> {
    fn from(lock: &'a RecordedLock) -> Self {
        Self { operation: &lock.operation, path: &lock.path, id: &lock.id }
    }
}

impl<'a> From<&'a LockInfo> for NamedLock<'a> {
    fn from(lock: &'a LockInfo) -> Self {
        Self { operation: &lock.operation, path: &lock.path, id: &lock.id }
    }
}

/// Returns the operation, the path and the ID of a lock, as a message names it.
pub(super) fn lock<'a>(lock: impl Into<NamedLock<'a>>) -> String {
    let NamedLock { operation, path, id } = lock.into();
    format!("{} on {}, ID {}", visible(operation), visible(path), visible(id))
}

/// Returns `why` with each of its lines escaped for a terminal.
pub(super) fn visible_lines(why: &str) -> String {
    why.lines().map(visible).collect::<Vec<_>>().join("\n")
}
