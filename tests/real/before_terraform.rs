//! While `tf` waits for the release of another lock before terraform starts, a request to end and a ^Z are not lost.

use nix::sys::signal::{Signal, kill};

use super::terminal::shell;
use crate::support::lease::record;
use crate::support::process::{Run, state, tree};
use crate::support::processes::named;
use crate::support::test_env::{APPLY, WAITS, id_of};
use crate::support::{Lock, Subject, TestEnv, wait_for};

/// Returns a directory with the lock of a host that is gone. A run watches it for more than a minute before it releases
/// the lock.
fn with_a_lapsed_lease() -> TestEnv {
    let mut env = TestEnv::new(Lock::DynamoDb, WAITS);
    env.set("TFW_LEASE", "5m").set("TFW_CLOCK", "steady");
    env.lock_with_lease(&record(320, 300));
    env
}

const WATCHES: &str = "releasing the lock if nothing changes for";

/// Checks that terraform was not started, and that the other lock is still there.
#[track_caller]
fn assert_nothing_was_done(env: &TestEnv, said: &str) {
    assert!(!env.exists("began") && !env.trace().contains("started terraform"), "{said}\n{}", env.trace());
    env.assert_locked();
}

fn tf_below(run: &Run) -> Option<nix::unistd::Pid> {
    tree(run.pid()).into_iter().find(|process| process.1 == "tf").map(|process| process.0)
}

#[test]
fn in_ci_terraform_is_not_started_after_the_death_of_our_parent() {
    let mut env = with_a_lapsed_lease();
    env.set("CI", "true");
    let mut command = env.command("bash");
    command.args(["-c", "tf apply -auto-approve -no-color > out 2> err; true"]);
    let run = Run::start(command);
    wait_for("the watch", || env.read("err").contains(WATCHES).then_some(()), || env.trace());
    let tf = wait_for("tf", || tf_below(&run), || env.trace());
    run.send(Signal::SIGTERM);
    wait_for("the end of tf", || state(tf).is_none_or(|state| state == 'Z').then_some(()), || env.trace());
    run.wait();
    assert_nothing_was_done(&env, &env.read("err"));
}

/// The process that watches the lock cannot end by itself.
#[test]
fn a_stopped_taker_does_not_keep_tf_from_ending() {
    let env = with_a_lapsed_lease();
    let run = env.start(Subject::Tf, &APPLY);
    run.wait_for_err(WATCHES);
    kill(named(&env, "tf-takeover"), Signal::SIGSTOP).unwrap();
    run.send(Signal::SIGTERM);
    // A person does not wait for the minute after which the taker is killed.
    run.send(Signal::SIGINT);
    let end = run.wait();
    let signals = [Signal::SIGTERM as i32, Signal::SIGINT as i32];
    assert!(end.signal().is_some_and(|signal| signals.contains(&signal)), "{}", env.dump(&end));
    assert_nothing_was_done(&env, &end.err);
}

#[test]
fn keys_work_while_tf_waits_before_terraform_starts() {
    let env = with_a_lapsed_lease();
    let mut terminal = shell(&env);
    terminal.type_in("tf apply -auto-approve -no-color\n");
    terminal.wait_for(WATCHES);
    terminal.type_in("\u{1a}");
    terminal.wait_for("Stopped");
    let tf = named(&env, "tf");
    assert_eq!(state(tf), Some('T'));
    terminal.type_in("fg\n");
    wait_for("tf to go on", || (state(tf) != Some('T')).then_some(()), || env.trace());
    terminal.type_in("\u{1c}");
    terminal.wait_for("Quit");
    assert_nothing_was_done(&env, "");
}

/// A process that explains the wait for a lock is stopped when terraform dies with a lock of its own.
#[test]
fn a_stopped_explanation_does_not_keep_a_lock() {
    let env = TestEnv::new(Lock::DynamoDb, WAITS);
    let other = env.lock_of_another();
    let waiting = env.start(Subject::Tf, &["apply", "-auto-approve", "-no-color", "-lock-timeout=120s"]);
    waiting.wait_for_err(&id_of(&other));
    kill(named(&env, "tf-waiting"), Signal::SIGSTOP).unwrap();
    env.delete_lock();
    env.wait_for_began(&waiting);
    waiting.kill_terraform();
    let end = waiting.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
}
