//! `tf locks recover` finishes the dead runs of this host, with a line for each. It prints nothing if there is nothing
//! to do.

use std::fs;

use nix::sys::signal::{Signal, kill};

use super::interrupted_once::slow_to_plan;
use super::locks_doctor::as_a_global_table;
use super::locks_release::locks;
use super::survived::{assert_nothing_left, edit, kill_whole, killed_whole, records};
use crate::support::process::Run;
use crate::support::processes::{wait_until_all_is_gone, wait_until_gone};
use crate::support::test_env::WAITS;
use crate::support::{Ended, Lock, Subject, TestEnv};

pub fn recover(env: &TestEnv, more: &[&str]) -> Ended {
    let mut command = env.command(env.bin().join("tf"));
    command.args(["locks", "recover"]).args(more);
    // It works in any directory, and without a terraform.
    command.current_dir("/").env("PATH", "/nowhere");
    Run::start(command).wait().without_progress()
}

fn it_gives_back_what_dead_runs_left_and_then_there_is_nothing_to_do(lock: Lock) {
    let env = killed_whole(lock);
    let end = recover(&env, &[]);
    assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", env.dump(&end));
    assert_eq!(end.out.lines().count(), 1, "{}", end.out);
    assert!(end.out.starts_with("released the lock that an earlier run left"), "{}", end.out);
    env.assert_unlocked();
    assert_nothing_left(&env);
    let end = recover(&env, &[]);
    assert_eq!((end.code(), end.out.as_str(), end.err.as_str()), (Some(0), "", ""));
}
for_each_lock!(it_gives_back_what_dead_runs_left_and_then_there_is_nothing_to_do);

/// In such a table a condition holds in one region only, and a delete can undo a lock that another region has just
/// taken.
#[test]
fn a_lock_in_a_global_table_goes_only_where_that_is_asked_for() {
    for lock in [Lock::DynamoDb, Lock::Both] {
        let mut env = TestEnv::new(lock, WAITS);
        let _proxy = as_a_global_table(&mut env, "EVENTUAL");
        kill_whole(&env);
        let end = recover(&env, &[]);
        assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
        assert!(end.out.contains("is a global table (eu-west-1, us-east-1)"), "{}", env.dump(&end));
        env.assert_locked();
        env.set("TFW_RELEASE", "auto");
        let end = recover(&env, &[]);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        env.assert_unlocked();
        assert_nothing_left(&env);
    }
}

#[test]
fn whoever_types_release_has_asked_for_it_in_a_global_table_too() {
    let mut env = TestEnv::new(Lock::DynamoDb, WAITS);
    let _proxy = as_a_global_table(&mut env, "EVENTUAL");
    kill_whole(&env);
    let end = locks(&env, &["release"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    env.assert_unlocked();
}

/// Its regions agree before they respond, so a condition holds in all of them.
#[test]
fn a_global_table_whose_regions_agree_is_one_as_any_other() {
    let mut env = TestEnv::new(Lock::DynamoDb, WAITS);
    let _proxy = as_a_global_table(&mut env, "STRONG");
    kill_whole(&env);
    let end = recover(&env, &[]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    env.assert_unlocked();
}

#[test]
fn a_dry_run_deletes_nothing_and_names_the_lock() {
    let env = killed_whole(Lock::Both);
    let end = recover(&env, &["--dry-run"]);
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    assert!(end.out.contains("would release") && end.out.contains(&env.path()), "{}", end.out);
    env.assert_locked();
    assert_eq!(records(&env).len(), 1);
}

#[test]
fn a_record_that_cannot_be_deleted_is_not_said_to_be_dropped() {
    let env = killed_whole(Lock::DynamoDb);
    let directory = records(&env)[0].parent().unwrap().to_owned();
    let run = directory.file_name().unwrap().to_str().unwrap();
    // `tf` moves a directory to this name before it deletes the directory, and a directory cannot replace a file.
    let in_the_way = directory.with_file_name(format!(".old-{run}"));
    fs::write(&in_the_way, "").unwrap();
    let end = recover(&env, &["--forget", run]);
    assert_eq!((end.code(), end.out.as_str()), (Some(1), ""), "{}", env.dump(&end));
    assert!(end.err.contains("nothing was dropped"), "{}", env.dump(&end));
    assert_eq!(records(&env).len(), 1);
    fs::remove_file(in_the_way).unwrap();
    let end = recover(&env, &["--forget", run]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert_nothing_left(&env);
}

#[test]
fn what_cannot_be_finished_is_named_and_ends_with_2() {
    let env = killed_whole(Lock::DynamoDb);
    // Nothing listens there.
    edit(&env, |record| record["surroundings"]["variables"]["AWS_ENDPOINT_URL"] = "http://127.0.0.1:9".into());
    let end = recover(&env, &[]);
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    assert!(end.out.contains("was not released") && end.out.contains("force-unlock"), "{}", end.out);
    env.assert_locked();
    assert_eq!(records(&env).len(), 1);
}

#[test]
fn a_living_run_keeps_its_lock() {
    let env = TestEnv::new(Lock::Both, WAITS);
    let run = env.start_apply(Subject::Tf);
    let end = recover(&env, &[]);
    assert_eq!((end.code(), end.out.as_str(), end.err.as_str()), (Some(0), "", ""), "{}", env.dump(&end));
    env.assert_locked();
    env.unblock();
    assert_eq!(run.wait().code(), Some(0));
}

#[test]
fn a_guardian_at_work_is_waited_for() {
    let env = TestEnv::new(Lock::Both, WAITS);
    let run = env.start_apply(Subject::Tf);
    kill(run.pid(), Signal::SIGKILL).unwrap();
    // Immediately: tf may still be dying, and its guardian may not have noticed yet.
    let end = recover(&env, &[]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    env.assert_unlocked();
    drop(run);
    wait_until_all_is_gone(&env);
    assert_nothing_left(&env);
}

/// A job's last step runs while terraform is still stopping. The shell in between is dead, and its `tf` is not.
#[test]
fn a_run_that_is_stopping_is_waited_for() {
    let (mut env, proxy) = slow_to_plan();
    env.set("CI", "true");
    let mut shell = env.command("bash");
    shell.args(["-c", "tf apply -auto-approve -no-color; echo done"]);
    let step = Run::start(shell);
    proxy.wait_until_held();
    step.send(Signal::SIGTERM);
    wait_until_gone(&env, step.pid());
    let mut command = env.command(env.bin().join("tf"));
    command.args(["locks", "recover"]);
    let recover = Run::start(command);
    env.wait_for_trace("is waited for");
    env.assert_locked();
    proxy.let_go();
    let end = recover.wait().without_progress();
    assert_eq!((end.code(), end.out.as_str(), end.err.as_str()), (Some(0), "", ""), "{}", env.dump(&end));
    env.assert_unlocked();
}

#[test]
fn a_word_that_it_does_not_know_is_refused_and_help_is_given() {
    let env = TestEnv::empty(Lock::DynamoDb);
    let end = recover(&env, &["--bogus"]);
    assert_eq!((end.code(), end.out.as_str()), (Some(1), ""));
    assert!(end.err.contains("--bogus"), "{}", end.err);
    let end = recover(&env, &["--help"]);
    assert_eq!((end.code(), end.err.as_str()), (Some(0), ""));
    assert!(end.out.contains("--dry-run"), "{}", end.out);
}

/// The recovery waits for the process that finishes a dead run. If that process is frozen, the run does not count as
/// finished.
#[test]
fn a_guardian_that_does_not_end_is_waited_for_as_long_as_is_promised_and_its_lock_is_named() {
    let env = TestEnv::new(Lock::DynamoDb, WAITS);
    let _kill_on_drop = crate::support::processes::KillOnDrop(crate::support::processes::home(&env));
    let run = env.start_apply(Subject::Tf);
    env.wait_for_trace("guardian: journal written");
    let terraform = crate::support::process::terraform_below(run.pid());
    let guardian = crate::support::processes::guardian_of(&env, run.pid());
    kill(guardian, Signal::SIGSTOP).unwrap();
    kill(run.pid(), Signal::SIGKILL).unwrap();
    kill(terraform, Signal::SIGKILL).unwrap();
    let begun = std::time::Instant::now();
    let mut command = env.command(env.bin().join("tf"));
    command.args(["locks", "recover"]);
    let recover = Run::start(command);
    env.wait_for_trace("is waited for");
    while begun.elapsed() < std::time::Duration::from_secs(25) {
        assert_eq!(recover.err(), "", "after {:?}", begun.elapsed());
        std::thread::sleep(std::time::Duration::from_millis(500));
    }
    recover.wait_for_err("the tf of that run is dead, but");
    let end = recover.wait();
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    assert!(begun.elapsed() < std::time::Duration::from_secs(40), "{:?}", begun.elapsed());
    assert!(end.err.contains("may hold a state lock"), "{}", env.dump(&end));
    env.assert_locked();
}
