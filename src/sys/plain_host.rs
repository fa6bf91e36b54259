//! What a test says of the host that it runs on, which may be a container, or be called `localhost`.
//!
//! In a debug build `TFW_TEST_HOST=ID` makes this host one whose processes are all to be seen, whose name tells it from others,
//! and which has ID for a machine-id if it has none of its own. In a usual build nothing of this is there: it would make what
//! proves nothing a proof.

/// The machine-id that a test has given. `None` where no test has.
pub(crate) fn machine_id() -> Option<String> {
    if cfg!(debug_assertions) { std::env::var("TFW_TEST_HOST").ok().filter(|id| !id.is_empty()) } else { None }
}

/// Whether a test has said so.
pub(crate) fn is_plain() -> bool {
    machine_id().is_some()
}
