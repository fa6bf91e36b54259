//! A host that gets another name while a run works, or before its recovery: through DHCP, a VPN, hostnamectl or a
//! restart. The lock contains the name of the moment in which terraform took it.

use std::fs;
use std::path::PathBuf;

use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use super::locks_recover::recover;
use super::survived::{assert_nothing_left, edit, records};
use crate::support::process::{Run, terraform_below};
use crate::support::processes::{kill_all, wait_until_all_is_gone, wait_until_unlocked};
use crate::support::system::is_root_on_linux;
use crate::support::test_env::{WAITS, id_of};
use crate::support::{Lock, Subject, TestEnv, wait_for};

/// Starts an apply on a host whose name changes after the apply has taken its lock. `None` without root, because only
/// root can rename a host.
fn renamed_while_it_works(lock: Lock) -> Option<(TestEnv, Run)> {
    if !is_root_on_linux() {
        // These tests are listed in tests/left-out.
        return None;
    }
    let env = TestEnv::new(lock, WAITS);
    let script = "called() { echo \"$1\" > /proc/sys/kernel/hostname; }; called first; \
                  (until test -e rename; do sleep 0.02; done; called second; touch renamed) & \
                  exec tf apply -auto-approve -no-color";
    let mut command = env.command("unshare");
    command.args(["-u", "sh", "-c", script]);
    let run = Run::start(command);
    env.wait_for_began(&run);
    let locks = env.locks();
    assert!(locks.iter().all(|lock| lock.contains("@first")) && !locks.is_empty(), "{locks:?}");
    env.wait_for_trace("journal written");
    env.write("rename", "");
    env.wait_for_file("renamed");
    Some((env, run))
}

/// The same as [`renamed_while_it_works`], and then every process is killed. The recovery runs under this host's own
/// name, which is a third one.
fn killed_under_another_name(lock: Lock) -> Option<TestEnv> {
    let (env, run) = renamed_while_it_works(lock)?;
    let id = id_of(&env.locks()[0]);
    let path = |env: &TestEnv| -> Option<PathBuf> {
        records(env).into_iter().find(|path| fs::read_to_string(path).is_ok_and(|text| text.contains(&id)))
    };
    wait_for("the journal", || path(&env), || env.trace());
    kill_all(&env);
    drop(run);
    env.assert_locked();
    let _ = fs::remove_file(env.directory.join("began"));
    Some(env)
}

#[test]
fn a_host_that_is_renamed_during_a_run_has_the_runs_lock_released() {
    for lock in [Lock::DynamoDb, Lock::File] {
        let Some((env, run)) = renamed_while_it_works(lock) else { return };
        run.kill_terraform();
        let end = run.wait();
        assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
        env.assert_unlocked();
    }
}

#[test]
fn the_guardian_of_a_renamed_host_releases_it_too() {
    let Some((env, run)) = renamed_while_it_works(Lock::Both) else { return };
    let terraform = terraform_below(run.pid());
    for pid in [terraform, run.pid()] {
        kill(pid, Signal::SIGKILL).unwrap();
    }
    run.wait();
    wait_until_unlocked(&env);
    wait_until_all_is_gone(&env);
    assert_nothing_left(&env);
}

#[test]
fn a_host_that_is_renamed_before_the_recovery_has_the_runs_lock_released() {
    let Some(env) = killed_under_another_name(Lock::Both) else { return };
    let end = recover(&env, &[]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert!(end.out.starts_with("released the lock that an earlier run left"), "{}", env.dump(&end));
    env.assert_unlocked();
    assert_nothing_left(&env);
}

/// A record of an earlier version, which does not contain the name.
#[test]
fn a_lock_that_disagrees_with_its_record_is_named_and_recover_ends_with_2() {
    let Some(env) = killed_under_another_name(Lock::DynamoDb) else { return };
    edit(&env, |record| drop(record.as_object_mut().unwrap().remove("who")));
    let end = recover(&env, &[]);
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    let id = id_of(&env.locks()[0]);
    assert!(end.out.contains("the lock's Who is not this user on this host"), "{}", env.dump(&end));
    assert!(end.out.contains(&format!("force-unlock {id}")), "{}", env.dump(&end));
    env.assert_locked();
}

/// A `tf` that runs elsewhere finishes the run in the background, where no person reads its messages.
#[test]
fn a_doubt_that_nobody_has_read_stays_in_the_journal() {
    let Some(env) = killed_under_another_name(Lock::DynamoDb) else { return };
    edit(&env, |record| drop(record.as_object_mut().unwrap().remove("who")));
    let mut other = TestEnv::new(Lock::File, "true");
    other.set("HOME", env.directory.parent().unwrap().join("home"));
    let end = other.run(Subject::Tf, &["plan", "-no-color"]);
    assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", other.dump(&end));
    let over = || {
        let [path] = records(&env).try_into().ok()?;
        let record: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        (record["over"] == true).then_some(())
    };
    wait_for("the recovery in the background", over, || format!("{:?}\n{}", records(&env), other.trace()));
    env.assert_locked();
    let end = recover(&env, &[]);
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    assert!(end.out.contains("the lock's Who is not this user on this host"), "{}", env.dump(&end));
}
