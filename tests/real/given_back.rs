//! "When terraform ends in any way, the lock that it held is gone by the time `tf` returns."

use nix::sys::signal::Signal;

use crate::support::process::{terraform_below, tree};
use crate::support::world::WAITS;
use crate::support::{Lock, Subject, World};

#[test]
fn bare_terraform_leaves_its_lock_when_it_is_killed() {
    for lock in Lock::ALL {
        let world = World::new(lock, WAITS);
        let run = world.start_apply(Subject::Bare);
        run.send(Signal::SIGKILL);
        world.go();
        run.wait();
        world.assert_locked();
    }
}

#[test]
fn a_killed_terraform_leaves_no_lock_of_any_kind() {
    for lock in Lock::ALL {
        for signal in [Signal::SIGKILL, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGSEGV, Signal::SIGABRT] {
            let world = World::new(lock, WAITS);
            let run = world.start_apply(Subject::Tf);
            world.assert_locked();
            nix::sys::signal::kill(terraform_below(run.pid()), signal).unwrap();
            let end = run.wait();
            world.assert_unlocked();
            assert!(end.err.contains("released the lock"), "{signal}: {}", end.err);
        }
    }
}
