//! A terraform that runs as another user than `tf`: through sudo, su or setpriv in a wrapper, or because it is setuid.
//! It cannot open a log that only this user can write, and would write it to stderr instead, with the values of `-var`
//! in clear text.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Uid, chown};

use super::locks_recover::recover;
use super::survived::{assert_nothing_left, records};
use crate::support::process::{Run, copy_program, terraform_below};
use crate::support::processes::{kill_all, wait_until_ours_are_gone};
use crate::support::system::is_root_on_linux;
use crate::support::test_env::{WAITS, id_of, terraform};
use crate::support::{Ended, Lock, Subject, TestEnv};

const PLAN: [&str; 4] = ["plan", "-no-color", "-var", "a=hunter2"];

/// The user ID of nobody.
const OTHER: u32 = 65534;

/// Gives every user access to a path and everything below it.
fn open_to_all(path: &Path) {
    let place = fs::symlink_metadata(path).unwrap();
    if place.is_symlink() {
        return;
    }
    let mode = place.permissions().mode() | if place.is_dir() { 0o777 } else { 0o666 };
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    if place.is_dir() {
        fs::read_dir(path).unwrap().flatten().for_each(|entry| open_to_all(&entry.path()));
    }
}

fn test_env() -> TestEnv {
    let env = TestEnv::new(Lock::Both, WAITS);
    env.write("variables.tf", "variable \"a\" {\ndefault = \"\"\n}\n");
    fs::set_permissions(env.directory.parent().unwrap(), fs::Permissions::from_mode(0o755)).unwrap();
    open_to_all(&env.directory);
    env
}

/// Returns a [`TestEnv`] with a script that runs terraform as another user if the file `other` exists.
fn with_wrapper() -> TestEnv {
    let mut env = test_env();
    let script = format!(
        "#!/bin/sh\ntest -e other && exec setpriv --reuid {OTHER} --clear-groups {0} \"$@\"\nexec {0} \"$@\"\n",
        terraform().display()
    );
    env.stand_in("wrapper", &script);
    env.write("other", "");
    env
}

/// Checks that stdout and stderr are those of the bare `program`, byte for byte except for the lines about slow locks.
#[track_caller]
fn assert_as_bare(env: &TestEnv, program: &Path) {
    let mut command = env.command(program);
    command.args(PLAN);
    let bare: Ended = Run::start(command).wait();
    assert_eq!(bare.code(), Some(0), "{}", env.dump(&bare));
    let end = env.run(Subject::Tf, &PLAN);
    let said = |end: &Ended| (end.code(), end.out_without_slow_locks(), end.err.clone());
    assert_eq!(said(&end), said(&bare), "{}", env.dump(&end));
}

#[test]
fn a_terraform_that_cannot_open_the_log_writes_none_of_it_to_stderr() {
    if !is_root_on_linux() {
        return;
    }
    let env = with_wrapper();
    let wrapper = env.directory.join("wrapper");
    assert_as_bare(&env, &wrapper);
    // A wrapper may decide otherwise each time: from an earlier log `tf` knows which terraform it is, and now it cannot
    // open the log.
    fs::remove_file(env.directory.join("other")).unwrap();
    for _ in 0..2 {
        assert_as_bare(&env, &wrapper);
    }
    assert!(env.trace().contains("program: Some(Version"), "{}", env.trace());
    open_to_all(&env.directory);
    env.write("other", "");
    assert_as_bare(&env, &wrapper);
}

#[test]
fn a_setuid_terraform_writes_none_of_it_to_stderr_either() {
    if !is_root_on_linux() {
        return;
    }
    let mut env = test_env();
    let program = env.directory.join("terraform-setuid");
    copy_program(terraform(), &program);
    chown(&program, Some(Uid::from_raw(OTHER)), None).unwrap();
    env.set("TFW_TERRAFORM", &program);
    for mode in [0o755, 0o4755] {
        // Only the mode changes. What is remembered of the program is older.
        fs::set_permissions(&program, fs::Permissions::from_mode(mode)).unwrap();
        assert_as_bare(&env, &program);
        open_to_all(&env.directory.join(".terraform"));
    }
}

fn apply(env: &TestEnv) -> Run {
    let run = env.start(Subject::Tf, &["apply", "-auto-approve", "-no-color", "-var", "a=hunter2"]);
    env.wait_for_began(&run);
    env.assert_locked();
    run
}

#[test]
fn killed_without_a_log_it_is_said_and_the_lock_is_named() {
    if !is_root_on_linux() {
        return;
    }
    let env = with_wrapper();
    let run = apply(&env);
    run.kill_terraform();
    let end = run.wait();
    let id = id_of(&env.locks()[0]);
    assert_eq!(end.signal(), Some(9), "{}", env.dump(&end));
    assert!(end.err.contains("left no log that tf can read"), "{}", env.dump(&end));
    assert!(end.err.contains(&format!("tf locks show {id}")), "{}", env.dump(&end));
    assert!(!end.err.contains("hunter2"), "{}", env.dump(&end));
    env.assert_locked();

    // The run did not lock: no lock is reported, but it is reported that there was no log.
    env.delete_lock();
    fs::remove_file(env.directory.join("began")).unwrap();
    let run = env.start(Subject::Tf, &["apply", "-auto-approve", "-no-color", "-lock=false"]);
    env.wait_for_began(&run);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("left no log that tf can read"), "{}", env.dump(&end));
    assert!(end.err.lines().any(|line| line.ends_with("type: tf locks")), "{}", env.dump(&end));
}

/// No person reads the messages of the guardian, and if it was killed as well it cannot report anything.
#[test]
fn killed_with_tf_the_next_one_names_the_lock() {
    if !is_root_on_linux() {
        return;
    }
    for guarded in [true, false] {
        let env = with_wrapper();
        let run = apply(&env);
        let id = id_of(&env.locks()[0]);
        if guarded {
            for pid in [terraform_below(run.pid()), run.pid()] {
                kill(pid, Signal::SIGKILL).unwrap();
            }
            run.wait();
            wait_until_ours_are_gone(&env);
        } else {
            kill_all(&env);
            drop(run);
        }
        env.assert_locked();
        assert_eq!(records(&env).len(), 1, "{guarded}: {}", env.trace());
        let end = recover(&env, &[]);
        assert_eq!(end.code(), Some(2), "{guarded}: {}", env.dump(&end));
        assert!(end.out.contains("left no log that tf can read"), "{guarded}: {}", env.dump(&end));
        assert!(end.out.contains(&format!("tf locks show {id}")), "{guarded}: {}", env.dump(&end));
        env.assert_locked();
        // It is reported once.
        assert_nothing_left(&env);
    }
}

/// As with `sudo -E terraform`: root can write the log, and `tf` may not see who does so.
#[test]
fn a_run_whose_terraform_cannot_be_seen_says_once_that_it_has_no_lease() {
    if !is_root_on_linux() {
        return;
    }
    let mut env = test_env();
    let program = env.directory.join("terraform-setuid");
    copy_program(terraform(), &program);
    fs::set_permissions(&program, fs::Permissions::from_mode(0o4755)).unwrap();
    env.set("TFW_TERRAFORM", &program).set("TFW_LEASE", "1m").set("TFW_CLOCK", "steady");
    open_to_all(&env.directory.parent().unwrap().join("home"));
    let mut command = env.command("setpriv");
    command.args(["--reuid", &OTHER.to_string(), "--clear-groups", "tf", "apply", "-auto-approve", "-no-color"]);
    let run = Run::start(command);
    env.wait_for_began(&run);
    env.assert_locked();
    run.wait_for_err("tf: this run goes on without a lease: the process that holds the lock was not found");
    env.unblock();
    let end = run.wait();
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert_eq!(end.err.matches("without a lease").count(), 1, "{}", env.dump(&end));
    env.assert_unlocked();
}
