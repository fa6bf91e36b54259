//! The requests that read, renew and take over a lease, with real services on loopback and with a real terraform.
//!
//! This program includes the modules of `tf`, because no command of `tf` makes exactly one of these requests.

#![expect(
    unsafe_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, starts processes, and changes them between fork and exec"
)]

#[macro_use]
#[path = "support/program.rs"]
mod program;

modules_of_the_program!();

#[allow(dead_code, unused_imports, unused_macros, clippy::allow_attributes)]
#[macro_use]
#[path = "support/mod.rs"]
mod support;

#[path = "lease_store/store.rs"]
mod store;
