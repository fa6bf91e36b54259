//! The host facts that a test can set, because its real host may be a container or may have the name `localhost`.
//!
//! In a debug build, `TFW_TEST_HOST=ID` makes `tf` assume two facts: it sees all processes of this host, and the name
//! of the host is unique. ID is the machine-id if the host has none. A release build ignores the variable, because
//! otherwise `tf` would accept assumptions as proof.

/// Returns the machine-id that a test has set. `None` if no test has set one.
pub(crate) fn machine_id() -> Option<String> {
    if cfg!(debug_assertions) { std::env::var("TFW_TEST_HOST").ok().filter(|id| !id.is_empty()) } else { None }
}

/// Returns whether a test has set a machine-id.
pub(crate) fn is_plain() -> bool {
    machine_id().is_some()
}
