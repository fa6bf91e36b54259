//! `tf` with all other versions of terraform and OpenTofu that can be installed, and with backends other than S3.
//!
//! `make elsewhere` installs them and runs these tests.

#![expect(
    unsafe_code,
    unreachable_pub,
    dead_code,
    unused_imports,
    unused_macros,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, starts processes, and changes them between fork and exec; what the tests stand on \
              is there for others as well"
)]

#[path = "../support/mod.rs"]
mod support;

mod backends;
mod leases;
mod versions;
