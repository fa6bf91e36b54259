//! What the tests use: a cloud on loopback, a working directory, a process, a terminal, a proxy.

pub mod authority;
pub mod cgroup;
pub mod clean;
pub mod cloud;
pub mod http;
pub mod lease;
pub mod listener;
pub mod metadata;
pub mod process;
pub mod processes;
pub mod proxy;
pub mod relay;
pub mod system;
pub mod terminal;
pub mod test_env;

use std::time::{Duration, Instant};

pub use process::{Ended, Run};
pub use test_env::{Lock, Subject, TestEnv};

/// Defines a test of `$name(lock)` for each kind of lock: `name::item`, `name::object` and `name::both`.
macro_rules! for_each_lock {
    ($name:ident) => {
        mod $name {
            #[test]
            fn item() {
                super::$name($crate::support::Lock::DynamoDb);
            }

            #[test]
            fn object() {
                super::$name($crate::support::Lock::File);
            }

            #[test]
            fn both() {
                super::$name($crate::support::Lock::Both);
            }
        }
    };
}

/// The maximum time for any step of a test. Tests do not wait this long: they wait for a state.
pub const LONGEST: Duration = Duration::from_mins(1);

/// Waits until `state` returns a value. Panics after [`LONGEST`], with the result of `seen`.
#[track_caller]
pub fn wait_for<T>(what: &str, state: impl FnMut() -> Option<T>, seen: impl Fn() -> String) -> T {
    wait_within(LONGEST, what, state, seen)
}

/// Does the same as [`wait_for`], and panics after `limit`.
#[track_caller]
pub fn wait_within<T>(
    limit: Duration,
    what: &str,
    mut state: impl FnMut() -> Option<T>,
    seen: impl Fn() -> String,
) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = state() {
            return value;
        }
        assert!(begun.elapsed() < limit, "waited in vain for {what}; last seen:\n{}", seen());
        std::thread::sleep(Duration::from_millis(5));
    }
}
