//! Catches the panics of libraries, because a panic must not end a release.
//!
//! The AWS SDK and its dependencies panic if a thread cannot be started, or if the machine has no certificate
//! authorities. In these cases, `tf` must report that it could not reach the lock service and that the lock was not
//! released.

use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};

use crate::trace::trace;

/// Calls `work` and returns its result. If `work` panics, logs the panic in the trace and not on stderr, and returns
/// `None`.
pub(crate) fn caught<T>(work: impl FnOnce() -> T) -> Option<T> {
    let hook = take_hook();
    set_hook(Box::new(|panic| trace!("a library panicked: {panic}")));
    let done = catch_unwind(AssertUnwindSafe(work));
    set_hook(hook);
    done.ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_result_and_what_comes_after_it_goes_on() {
        let panicked: Option<()> = caught(|| panic!("on purpose"));
        assert_eq!(panicked, None);
        assert_eq!(caught(|| 7), Some(7));
    }
}
