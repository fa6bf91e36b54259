//! Panics of libraries: where one must not end a release.
//!
//! The SDK and what it stands on panic where a thread cannot be started, or where a machine has no certificate authorities. A
//! lock service that cannot be reached is a failure that is said, and a lock that is kept.

use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};

use crate::trace::trace;

/// Does `work`. `None` where it panicked, which is written into the trace and not to stderr.
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
