//! Which process may use the frameworks of the system.
//!
//! After a fork, a process of macOS must not use a framework until it executes a program (fork(2) of macOS, CAVEATS). And
//! on macOS 26, a fork can crash in a process that has used Network.framework, although the child executes a program
//! (github.com/resque/resque, issue 1939; github.com/openai/codex, issue 43591). So no process of `tf` that forks uses
//! them there.

use std::sync::atomic::{AtomicBool, Ordering};

static ALLOWED: AtomicBool = AtomicBool::new(false);

/// Allows the frameworks in this process, which must not fork.
pub(crate) fn allow() {
    ALLOWED.store(true, Ordering::Relaxed);
}

/// Returns whether this process may use frameworks. Always true on other systems than macOS. With `tf_portable`, the
/// answer is that of macOS, so that the tests on Linux run what a Mac does.
pub(crate) fn are_allowed() -> bool {
    cfg!(all(not(target_os = "macos"), not(tf_portable))) || ALLOWED.load(Ordering::Relaxed)
}
