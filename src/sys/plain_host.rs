//! What a test sets for the host that it runs on, which may be a container, or may be named `localhost`.
//!
//! In a debug build `TFW_TEST_HOST=ID` makes `tf` assume that it sees all processes of this host, and that the host's
//! name tells it apart from other hosts. ID becomes its machine-id if it has none of its own. A release build contains
//! none of this, because it would turn facts that prove nothing into a proof.

/// Returns the machine-id that a test has set. `None` if no test has set one.
pub(crate) fn machine_id() -> Option<String> {
    if cfg!(debug_assertions) { std::env::var("TFW_TEST_HOST").ok().filter(|id| !id.is_empty()) } else { None }
}

/// Returns whether a test has set a machine-id.
pub(crate) fn is_plain() -> bool {
    machine_id().is_some()
}
