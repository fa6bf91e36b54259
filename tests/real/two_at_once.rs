//! A run whose lock was taken by another run while it worked. The other run's lock is not released, and it is reported
//! that two runs have worked on one state.

use std::fs;

use nix::sys::signal::{Signal, kill};

use super::locks_recover::recover;
use super::survived::{assert_nothing_left, killed_whole, records};
use crate::support::process::{Run, terraform_below};
use crate::support::processes::wait_until_ours_are_gone;
use crate::support::test_env::{WAITS, id_of, lock_json};
use crate::support::{Ended, Lock, Subject, TestEnv};

const OTHER: &str = "11111111-2222-3333-4444-555555555555";

const SAID: &str = "while it ran, another run locked the same state";

/// Removes the lock of `env` by force, and puts another run's lock in its place, with `created` as its creation time.
fn taken_over(env: &TestEnv, created: &str) -> String {
    env.delete_lock();
    let mut info: serde_json::Value = serde_json::from_str(&lock_json(OTHER, &env.path())).unwrap();
    (info["Who"], info["Created"]) = ("anna@elsewhere".into(), created.into());
    env.put_lock(&info.to_string());
    info.to_string()
}

fn now() -> String {
    jiff::Timestamp::now().to_string()
}

/// Starts an apply, and returns it with the ID of its lock.
fn apply(env: &TestEnv) -> (Run, String) {
    let run = env.start_apply(Subject::Tf);
    env.assert_locked();
    env.wait_for_trace("journal written");
    let id = id_of(&env.locks()[0]);
    (run, id)
}

#[track_caller]
fn assert_said(env: &TestEnv, end: &Ended, said: &str, own: &str, other: &str) {
    assert_eq!(said.matches(SAID).count(), 1, "{}", env.dump(end));
    for text in [own, OTHER, "anna@elsewhere", "plan"] {
        assert!(said.contains(text), "{text}: {}", env.dump(end));
    }
    assert!(env.locks().iter().all(|lock| lock == other), "{:?}", env.locks());
    env.assert_locked();
}

fn a_run_that_is_killed_after_its_lock_was_taken_over_says_that_two_have_worked(lock: Lock) {
    let env = TestEnv::new(lock, WAITS);
    let (run, own) = apply(&env);
    let other = taken_over(&env, &now());
    run.kill_terraform();
    let end = run.wait();
    assert_eq!(end.signal(), Some(9), "{}", env.dump(&end));
    assert_said(&env, &end, &end.err, &own, &other);
    assert_nothing_left(&env);
    let history = fs::read_to_string(env.directory.parent().unwrap().join("home/.local/state/tf/history.jsonl"));
    assert!(history.unwrap().contains(r#""event":"replaced""#), "{}", env.dump(&end));
}
for_each_lock!(a_run_that_is_killed_after_its_lock_was_taken_over_says_that_two_have_worked);

/// Its unlock is refused. That shows the other lock, whatever the clock of the other host says.
#[test]
fn a_run_that_ends_by_itself_after_its_lock_was_taken_over_says_it_too() {
    for (lock, created) in [
        (Lock::DynamoDb, now()),
        (Lock::File, now()),
        (Lock::Both, now()),
        (Lock::DynamoDb, "2099-01-01T00:00:00Z".to_owned()),
    ] {
        let env = TestEnv::new(lock, WAITS);
        let (run, own) = apply(&env);
        let other = taken_over(&env, &created);
        env.unblock();
        let end = run.wait();
        assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
        assert_said(&env, &end, &end.err, &own, &other);
        assert_nothing_left(&env);
    }
}

#[test]
fn after_a_killed_tf_the_next_one_says_it_once() {
    for ends_by_itself in [false, true] {
        let env = TestEnv::new(Lock::Both, WAITS);
        let (run, own) = apply(&env);
        let other = taken_over(&env, &now());
        if !ends_by_itself {
            kill(terraform_below(run.pid()), Signal::SIGKILL).unwrap();
        }
        kill(run.pid(), Signal::SIGKILL).unwrap();
        run.wait();
        env.unblock();
        wait_until_ours_are_gone(&env);
        assert_eq!(records(&env).len(), 1, "{ends_by_itself}: {}", env.trace());
        let end = recover(&env, &[]);
        assert_said(&env, &end, &end.out, &own, &other);
        assert_nothing_left(&env);
    }
}

/// A dead run's lock was removed, and another run took the lock later: they did not work at the same time.
#[test]
fn a_lock_that_was_taken_after_the_run_had_ended_is_no_alarm() {
    let env = killed_whole(Lock::Both);
    let other = taken_over(&env, &now());
    let end = recover(&env, &[]);
    assert_eq!((end.code(), end.out.as_str()), (Some(0), ""), "{}", env.dump(&end));
    assert_eq!(env.locks(), [other.clone(), other]);
}
