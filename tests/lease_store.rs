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

// The modules of the program, as in src/main.rs. Most of their items are not used here.
macro_rules! modules {
    ($($name:ident $path:literal)*) => {
        $(#[allow(dead_code, unused_imports, clippy::allow_attributes)] #[path = $path] mod $name;)*
    };
}

modules! {
    another_tf "../src/another_tf.rs"
    aws "../src/aws/mod.rs"
    cleanup "../src/cleanup/mod.rs"
    commands "../src/commands/mod.rs"
    console "../src/console.rs"
    crash_point "../src/crash_point.rs"
    generated_input "../src/generated_input.rs"
    holder "../src/holder/mod.rs"
    journal "../src/journal/mod.rs"
    json "../src/json.rs"
    lease "../src/lease/mod.rs"
    lock "../src/lock/mod.rs"
    panics "../src/panics.rs"
    settings "../src/settings.rs"
    supervise "../src/supervise/mod.rs"
    sys "../src/sys/mod.rs"
    terraform "../src/terraform/mod.rs"
    time "../src/time.rs"
    trace "../src/trace.rs"
}

#[allow(dead_code, unused_imports, unused_macros, clippy::allow_attributes)]
#[macro_use]
#[path = "support/mod.rs"]
mod support;

#[path = "lease_store/store.rs"]
mod store;
