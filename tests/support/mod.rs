//! What the tests stand on: a cloud on loopback, a working directory, a process, a terminal, a proxy.

pub mod authority;
pub mod clean;
pub mod cloud;
pub mod http;
pub mod process;
pub mod processes;
pub mod proxy;
pub mod terminal;
pub mod test_env;

use std::time::{Duration, Instant};

pub use process::{Ended, Run};
pub use test_env::{Lock, Subject, TestEnv};

/// The longest that anything here takes. It is not how long a test waits: a test waits for a state.
pub const LONGEST: Duration = Duration::from_secs(30);

/// Waits until `state` gives a value, and fails with the last thing that `seen` tells.
#[track_caller]
pub fn wait_for<T>(what: &str, mut state: impl FnMut() -> Option<T>, seen: impl Fn() -> String) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = state() {
            return value;
        }
        assert!(begun.elapsed() < LONGEST, "waited in vain for {what}; last seen:\n{}", seen());
        std::thread::sleep(Duration::from_millis(5));
    }
}
