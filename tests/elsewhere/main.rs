//! `tf` around every other terraform and OpenTofu that can be had, and on other backends than S3.
//!
//! `make elsewhere` installs them and runs this.

#![expect(
    unsafe_code,
    unreachable_pub,
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::disallowed_methods,
    reason = "a test fails by panicking, starts processes, and changes them between fork and exec; what the tests stand on \
              is there for others as well"
)]

#[path = "../support/mod.rs"]
mod support;

mod backends;
mod versions;
