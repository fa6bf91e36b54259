//! "After terraform's whole process tree is dead, a lock that it held is gone: released by `tf`, else by the guardian
//! that outlives it, else by the next `tf` on that host." The lock of a living run is never released.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde_json::Value;

use super::given_back::{
    apply_with_worker, is_dynamodb, lands, released_by_the_next_tf, takes_file, takes_item, through,
};
use super::interrupted_once::slow_to_plan;
use super::reached_alike::to_services;
use crate::support::authority::Authority;
use crate::support::cloud::cloud;
use crate::support::http::Message;
use crate::support::process::{Run, state, terraform_below};
use crate::support::processes::{
    KillOnDrop, guardian_of, home, kill_all, kill_without_guardian, marked, ours, tf_of, wait_until_all_is_gone,
    wait_until_ours_are_gone, wait_until_unlocked,
};
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::system::is_root_on_linux;
use crate::support::terminal::Terminal;
use crate::support::test_env::{APPLY, WAITS, id_of, lock_json};
use crate::support::{Ended, Lock, Subject, TestEnv, wait_for};

const PLAN: [&str; 2] = ["plan", "-no-color"];

/// Returns the path of the journal of a [`TestEnv`].
pub fn journal(env: &TestEnv) -> PathBuf {
    env.directory.parent().unwrap().join("home/.local/state/tf")
}

/// Returns the paths of the records that exist.
pub fn records(env: &TestEnv) -> Vec<PathBuf> {
    let entries = fs::read_dir(journal(env).join("runs")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path().join("record.json")).filter(|path| path.exists()).collect()
}

/// Returns every file below the state directory, with its contents.
fn everything_written(env: &TestEnv) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    let mut directories = vec![journal(env)];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                directories.push(entry.path());
            } else {
                found.push((entry.path(), fs::read(entry.path()).unwrap_or_default()));
            }
        }
    }
    found
}

#[track_caller]
pub fn assert_nothing_left(env: &TestEnv) {
    // The history is kept, because it is for people. So is what is known of programs, because it is not about a run.
    let left = || -> Vec<PathBuf> {
        let paths = everything_written(env).into_iter().map(|(path, _)| path);
        paths
            .filter(|path| {
                let name = path.file_name().unwrap().to_string_lossy();
                // A lock that still exists is remembered as one that this host keeps on purpose.
                let is_kept = path.parent().is_some_and(|parent| parent.ends_with("kept"))
                    && env.locks().iter().any(|lock| id_of(lock) == name);
                !name.starts_with("history.") && name != "programs.json" && !is_kept
            })
            .collect()
    };
    wait_for("an empty journal", || left().is_empty().then_some(()), || format!("{:?}\n{}", left(), env.trace()));
}

/// Changes the only record of a [`TestEnv`].
pub fn edit(env: &TestEnv, change: impl FnOnce(&mut Value)) {
    let [path] = records(env).try_into().expect("one record");
    let mut record: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut record);
    fs::write(path, record.to_string()).unwrap();
}

/// Returns a [`TestEnv`] in which a run was killed together with its `tf` and its guardian. Its lock is held.
pub fn killed_whole(lock: Lock) -> TestEnv {
    let env = TestEnv::new(lock, WAITS);
    kill_whole(&env);
    env
}

/// Starts an apply, and waits until the journal has its lock.
pub fn start_recorded(env: &TestEnv) -> Run {
    let run = env.start_apply(Subject::Tf);
    wait_until_recorded(env);
    run
}

/// Waits until the journal has the lock of the run that is working.
pub fn wait_until_recorded(env: &TestEnv) {
    env.assert_locked();
    let id = id_of(&env.locks()[0]);
    // When the lock is held, the guardian's record may still be on its way to the disk.
    wait_for(
        "the journal",
        || {
            // A lock that is only recorded as requested does not count, because its request may still land.
            let has_it = |record: &Value| {
                let locks = record["log"]["locks"].as_array().into_iter().flatten();
                locks.into_iter().any(|lock| lock["id"] == id.as_str() && lock["locked"].is_string())
            };
            let texts = records(env).into_iter().map(|path| fs::read(path).unwrap_or_default());
            let mut all = texts.filter_map(|text| serde_json::from_slice::<Value>(&text).ok());
            all.any(|record| has_it(&record)).then_some(())
        },
        || format!("{:?}\n{}", records(env), env.trace()),
    );
}

pub fn kill_whole(env: &TestEnv) {
    let run = start_recorded(env);
    kill_all(env);
    drop(run);
    env.assert_locked();
    for name in ["began", "go"] {
        let _ = fs::remove_file(env.directory.join(name));
    }
}

/// Checks that the next command releases the lock, reports it in one line, and continues.
#[track_caller]
fn assert_next_gives_back(env: &TestEnv) {
    let end = env.run(Subject::Tf, &PLAN);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert_eq!(end.err.matches("released the lock that an earlier run left").count(), 1, "{}", env.dump(&end));
    env.assert_unlocked();
    assert_nothing_left(env);
}

// ---- the guardian

fn a_killed_tf_lets_terraform_stop_once_save_its_state_and_unlock(lock: Lock) {
    // The output goes to a pipe that tf has drained. What terraform still writes must not kill it.
    let env = TestEnv::new(lock, WAITS);
    let run = env.start_apply(Subject::Tf);
    let tf = tf_of(&env);
    kill(tf, Signal::SIGKILL).unwrap();
    assert_eq!(run.wait().signal(), Some(9));
    wait_until_unlocked(&env);
    wait_until_all_is_gone(&env);
    assert!(env.trace().contains("terraform ended: Some(Exited(1))") || !kernel_tells_ends(), "{}", env.trace());
    let state = env.state().expect("its state was saved");
    assert!(state.contains("tainted"), "{state}");
    assert_nothing_left(&env);
    // Terraform itself has unlocked, and every part of the state is consistent: the next run works.
    assert!(!env.trace().contains("deleted "), "{}", env.trace());
    let end = env.run(Subject::Tf, &PLAN);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
}
for_each_lock!(a_killed_tf_lets_terraform_stop_once_save_its_state_and_unlock);

/// PIDFD_INFO_EXIT exists since Linux 6.15.
fn kernel_tells_ends() -> bool {
    let release = nix::sys::utsname::uname().unwrap().release().to_string_lossy().into_owned();
    let mut numbers = release.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(6), Some(15))
}

#[test]
fn a_killed_tf_gives_terraform_one_interrupt_in_all() {
    for before in [false, true] {
        let mut env = TestEnv::empty(Lock::DynamoDb);
        env.count_signals();
        let run = env.start_apply(Subject::Tf);
        if before {
            run.send(Signal::SIGTERM);
            wait_for("the signal", || (env.received_signals().len() == 1).then_some(()), || env.trace());
        }
        kill(tf_of(&env), Signal::SIGKILL).unwrap();
        run.wait();
        env.wait_for_trace("guardian: tf is gone");
        wait_for("the signal", || (!env.received_signals().is_empty()).then_some(()), || env.trace());
        env.unblock();
        wait_until_all_is_gone(&env);
        assert_eq!(env.received_signals(), ["SIGINT"], "interrupted before: {before}\n{}", env.trace());
    }
}

fn a_killed_tf_and_terraform_leave_no_lock(lock: Lock) {
    for terraform_first in [false, true] {
        let env = TestEnv::new(lock, WAITS);
        let run = env.start_apply(Subject::Tf);
        let (tf, terraform) = (run.pid(), terraform_below(run.pid()));
        for pid in if terraform_first { [terraform, tf] } else { [tf, terraform] } {
            kill(pid, Signal::SIGKILL).unwrap();
        }
        run.wait();
        wait_until_unlocked(&env);
        wait_until_all_is_gone(&env);
        assert_nothing_left(&env);
    }
}
for_each_lock!(a_killed_tf_and_terraform_leave_no_lock);

#[test]
fn both_groups_killed_leave_no_lock_and_bare_leaves_one() {
    let bare = TestEnv::new(Lock::Both, WAITS);
    let run = bare.start_apply(Subject::Bare);
    killpg(run.pid(), Signal::SIGKILL).unwrap();
    run.wait();
    bare.assert_locked();

    let env = TestEnv::new(Lock::Both, WAITS);
    let run = env.start_apply(Subject::Tf);
    let terraform = terraform_below(run.pid());
    killpg(run.pid(), Signal::SIGKILL).unwrap();
    let _ = killpg(terraform, Signal::SIGKILL);
    run.wait();
    wait_until_unlocked(&env);
    wait_until_ours_are_gone(&env);
    assert_nothing_left(&env);
}

/// Starts an apply in an interactive shell with job control, and waits until its provisioner works.
fn apply_in_a_shell(env: &TestEnv) -> (Terminal, Pid) {
    let mut shell = env.command("bash");
    shell.args(["--norc", "-i"]);
    let mut terminal = Terminal::start(shell);
    terminal.type_in(&format!("tf {}\r", APPLY.join(" ")));
    env.wait_for_file("began");
    (terminal, tf_of(env))
}

#[test]
fn a_terraform_that_was_stopped_when_tf_was_killed_leaves_no_lock() {
    // In a terminal with job control, the kernel hangs the job up.
    let env = TestEnv::new(Lock::Both, WAITS);
    let _kill_on_drop = KillOnDrop(home(&env));
    let (mut terminal, tf) = apply_in_a_shell(&env);
    terminal.type_in("\x1a");
    wait_for("the stop", || (state(tf) == Some('T')).then_some(()), || env.trace());
    kill(tf, Signal::SIGKILL).unwrap();
    wait_until_unlocked(&env);
    wait_until_ours_are_gone(&env);

    // Without one, only the guardian can continue it.
    let env = TestEnv::new(Lock::Both, WAITS);
    let run = env.start_apply(Subject::Tf);
    let terraform = terraform_below(run.pid());
    kill(terraform, Signal::SIGSTOP).unwrap();
    wait_for("the stop", || (state(terraform) == Some('T')).then_some(()), || env.trace());
    kill(run.pid(), Signal::SIGKILL).unwrap();
    run.wait();
    wait_until_unlocked(&env);
    wait_until_all_is_gone(&env);
}

#[test]
fn a_tf_that_stopped_with_a_terraform_that_is_then_killed_goes_on_and_gives_the_lock_back() {
    let env = TestEnv::new(Lock::Both, WAITS);
    let _kill_on_drop = KillOnDrop(home(&env));
    let (mut terminal, tf) = apply_in_a_shell(&env);
    let terraform = terraform_below(tf);
    terminal.type_in("\x1a");
    wait_for("the stop", || (state(tf) == Some('T')).then_some(()), || env.trace());
    env.assert_locked();
    kill(terraform, Signal::SIGKILL).unwrap();
    wait_until_unlocked(&env);
    wait_until_ours_are_gone(&env);
}

#[test]
fn the_guardian_ends_what_outlives_terraform_before_the_lock_goes() {
    for (name, starts, python) in [
        ("ignores TERM", "bash worker & touch began; wait", false),
        ("python's subprocess, its own session", "exec PYTHON spawn.py", true),
        ("closed descriptors", "exec 3>&1; exec bash closes", false),
    ] {
        let (env, run) = apply_with_worker(Subject::Tf, starts, python);
        let terraform = terraform_below(run.pid());
        for pid in [terraform, run.pid()] {
            kill(pid, Signal::SIGKILL).unwrap();
        }
        run.wait();
        wait_until_unlocked(&env);
        let work = env.read("work").len();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(env.read("work").len(), work, "{name}: it works on. {}", env.trace());
        wait_until_all_is_gone(&env);
    }
}

#[test]
fn the_guardian_sees_to_the_stop_timeout() {
    let (mut env, proxy) = slow_to_plan();
    env.set("TFW_STOP_TIMEOUT", "500ms");
    let _kill_on_drop = KillOnDrop(home(&env));
    let run = env.start(Subject::Tf, &APPLY);
    proxy.wait_until_held();
    env.wait_for_locked();
    kill(run.pid(), Signal::SIGKILL).unwrap();
    run.wait();
    // Terraform waits for a response that never comes, and does not stop.
    wait_until_unlocked(&env);
    wait_until_ours_are_gone(&env);
    proxy.let_go();
}

/// On macOS, they let another `tf` ask the system (`src/aws/ask_system.rs`).
#[test]
fn the_guardian_and_the_next_tf_know_the_names_and_the_authorities_of_the_system() {
    // On macOS, Go does not read SSL_CERT_FILE (root_darwin.go).
    if cfg!(target_os = "macos") {
        return;
    }
    let authority = Authority::new();
    let proxy = Proxy::start_tls(cloud().port, &authority, to_services, |_: &Message| ProxyAction::Pass);
    let mut env = TestEnv::empty(Lock::Both);
    let pem = env.directory.parent().unwrap().join("ca.pem");
    fs::write(&pem, &authority.pem).unwrap();
    env.set("SSL_CERT_FILE", pem).set("AWS_ENDPOINT_URL", format!("https://localhost:{}", proxy.port));
    env.write_main("", WAITS);
    env.init();
    kill_without_guardian(&env);
    env.assert_unlocked();
    fs::remove_file(env.directory.join("began")).unwrap();
    env.start_apply(Subject::Tf);
    kill_all(&env);
    env.assert_locked();
    let end = env.run(Subject::Tf, &PLAN);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    env.assert_unlocked();
    for question in [r#"["addresses", "localhost"]"#, r#"["authorities"]"#] {
        let asked = env.trace().matches(&format!("asked another tf for {question}: Ok(")).count();
        assert!(if cfg!(tf_portable) { asked >= 2 } else { asked == 0 }, "{question}: {asked}\n{}", env.trace());
    }
}

#[test]
fn a_guardian_that_is_killed_alone_changes_nothing() {
    let env = TestEnv::new(Lock::Both, WAITS);
    let run = env.start_apply(Subject::Tf);
    kill(guardian_of(&env, run.pid()), Signal::SIGKILL).unwrap();
    env.wait_for_trace("the guardian is gone");
    env.assert_locked();
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
    assert_nothing_left(&env);
}

/// For example, a CI job cleans its workspace, or a logout removes XDG_RUNTIME_DIR.
#[test]
fn a_journal_that_is_removed_during_the_run_keeps_no_lock() {
    let env = TestEnv::new(Lock::Both, WAITS);
    let run = start_recorded(&env);
    fs::remove_dir_all(journal(&env).join("runs")).unwrap();
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
}

#[test]
fn a_lock_request_in_flight_when_tf_and_terraform_are_killed_is_gone_in_the_end() {
    for lock in [Lock::DynamoDb, Lock::File] {
        let mut env = TestEnv::new(lock, "true");
        let proxy = through(&mut env, |request| {
            if takes_item(request) || takes_file(request) { ProxyAction::Hold } else { ProxyAction::Pass }
        });
        let run = env.start(Subject::Tf, &APPLY);
        proxy.wait_until_held();
        let terraform = terraform_below(run.pid());
        for pid in [terraform, run.pid()] {
            kill(pid, Signal::SIGKILL).unwrap();
        }
        run.wait();
        // The guardian looks for the lock as long as `tf` would, and remembers the request.
        wait_until_ours_are_gone(&env);
        lands(&env, &proxy);
        let end = released_by_the_next_tf(&env, &PLAN);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    }
}

// ---- the next run

fn the_next_run_in_that_place_gives_it_back_first_and_says_so(lock: Lock) {
    let env = killed_whole(lock);
    let bare = env.run(Subject::Bare, &PLAN);
    assert_eq!(bare.code(), Some(1), "bare is refused: {}", bare.err);
    assert_next_gives_back(&env);
}
for_each_lock!(the_next_run_in_that_place_gives_it_back_first_and_says_so);

fn after_a_restart_the_next_run_gives_it_back(lock: Lock) {
    let env = killed_whole(lock);
    // The host has booted again, and the log in memory is lost.
    edit(&env, |record| record["host"]["boot"] = "00000000-0000-0000-0000-000000000000".into());
    forget_recorder(&env);
    assert_next_gives_back(&env);
}
for_each_lock!(after_a_restart_the_next_run_gives_it_back);

pub fn forget_recorder(env: &TestEnv) {
    let [path] = records(env).try_into().expect("one record");
    let run = path.parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    fs::remove_file(format!("/dev/shm/tf-{run}.log")).unwrap();
}

#[test]
fn several_dead_runs_are_finished_each_in_its_own_surroundings() {
    // One run had its keys from the environment, and one from a profile. A key in the environment of today would take
    // precedence over the profile.
    let first = killed_whole(Lock::Both);
    let home = first.directory.parent().unwrap().join("home");
    let mut second = TestEnv::new(Lock::DynamoDb, WAITS);
    let config = second.directory.join("credentials");
    fs::write(&config, "[other]\naws_access_key_id = test\naws_secret_access_key = s\n").unwrap();
    second.set("AWS_SHARED_CREDENTIALS_FILE", config).set("AWS_PROFILE", "other").set("AWS_ACCESS_KEY_ID", "");
    kill_whole(&second);
    // Both runs are in one journal, as those of one user are.
    let [record] = records(&second).try_into().unwrap();
    let directory = record.parent().unwrap();
    fs::rename(directory, home.join(".local/state/tf/runs").join(directory.file_name().unwrap())).unwrap();
    let mut third = TestEnv::new(Lock::File, "true");
    third.set("HOME", &home);
    let end = third.run(Subject::Tf, &PLAN);
    assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", third.dump(&end));
    wait_until_unlocked(&first);
    wait_until_unlocked(&second);
    assert_nothing_left(&first);
}

#[test]
fn what_an_init_locked_in_a_new_directory_is_given_back_too() {
    // An init in a workspace that does not exist yet takes a lock while it creates the state.
    let mut env = TestEnv::empty(Lock::DynamoDb);
    env.write_main("", "true");
    env.set("TF_WORKSPACE", "green");
    let held = Arc::new(AtomicBool::new(true));
    let holds = Arc::clone(&held);
    let proxy = through(&mut env, move |request| {
        let writes = request.start.starts_with("PUT ") && request.start.contains("green");
        if writes && holds.load(Ordering::Relaxed) { ProxyAction::Hold } else { ProxyAction::Pass }
    });
    let run = env.start(Subject::Tf, &["init", "-no-color", "-input=false"]);
    let locks = || env.locks_at("env:/green/dir/prod.tfstate");
    wait_for(
        "a lock, or the end",
        || (!locks().is_empty() || !marked(&home(&env)).iter().any(|pid| *pid == run.pid())).then_some(()),
        || format!("{}{}{}", run.out(), run.err(), env.trace()),
    );
    assert!(!locks().is_empty(), "{}{}", run.out(), run.err());
    env.wait_for_trace("journal written");
    kill_all(&env);
    drop(run);
    held.store(false, Ordering::Relaxed);
    proxy.let_go();
    assert!(!locks().is_empty());
    let end = env.run(Subject::Tf, &["init", "-no-color", "-input=false"]);
    assert!(end.err.contains("an earlier run left"), "{}", env.dump(&end));
    assert!(locks().is_empty(), "{}", env.dump(&end));
}

#[test]
fn a_run_elsewhere_gives_it_back_without_waiting_for_it() {
    let dead = killed_whole(Lock::Both);
    // The lock service of the dead run is slow. The command elsewhere does not know that.
    let slow = Proxy::start(cloud().port, |_| ProxyAction::Hold);
    edit(&dead, |record| {
        record["surroundings"]["variables"]["AWS_ENDPOINT_URL"] = format!("http://127.0.0.1:{}", slow.port).into();
    });
    let mut other = TestEnv::new(Lock::Both, "true");
    other.set("HOME", dead.directory.parent().unwrap().join("home"));
    let end = other.run(Subject::Tf, &PLAN);
    assert_eq!(end.code(), Some(0), "{}", other.dump(&end));
    assert_eq!(end.err, "", "{}", other.dump(&end));
    slow.wait_until_held();
    dead.assert_locked();
    slow.let_go();
    wait_until_unlocked(&dead);
    assert_nothing_left(&dead);
}

#[test]
fn two_runs_that_start_at_once_recover_once() {
    for _ in 0..5 {
        let env = killed_whole(Lock::Both);
        // The runs take no locks, because contending terraforms make each other fail now and then, with or without tf.
        let plan = ["plan", "-no-color", "-lock=false"];
        let runs: Vec<Run> = (0..3).map(|_| env.start(Subject::Tf, &plan)).collect();
        let ends: Vec<Ended> = runs.into_iter().map(Run::wait).collect();
        let said: usize = ends.iter().map(|end| end.err.matches("an earlier run left").count()).sum();
        for end in &ends {
            assert_eq!(end.code(), Some(0), "{}", env.dump(end));
        }
        assert_eq!(said, 1, "{}", env.trace());
        env.assert_unlocked();
        assert_nothing_left(&env);
    }
}

fn a_run_that_starts_while_the_guardian_works_waits_for_it(lock: Lock) {
    let env = TestEnv::new(lock, WAITS);
    let run = env.start_apply(Subject::Tf);
    let terraform = terraform_below(run.pid());
    for pid in [terraform, run.pid()] {
        kill(pid, Signal::SIGKILL).unwrap();
    }
    // Immediately, while the processes of the first run are still dying.
    let end = env.run(Subject::Tf, &["plan", "-no-color", "-lock-timeout=20s"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    drop(run);
    wait_until_ours_are_gone(&env);
    env.assert_unlocked();
    assert_eq!(env.trace().matches("deleted ").count(), if lock == Lock::Both { 2 } else { 1 }, "{}", env.trace());
}
for_each_lock!(a_run_that_starts_while_the_guardian_works_waits_for_it);

#[test]
fn a_run_whose_provisioner_lives_on_is_not_recovered() {
    let (env, run) = apply_with_worker(Subject::Tf, "bash worker & touch began; wait", false);
    let id = id_of(&env.locks()[0]);
    env.wait_for_trace("journal written");
    let guardian = guardian_of(&env, run.pid());
    let terraform = terraform_below(run.pid());
    for pid in [guardian, run.pid(), terraform] {
        kill(pid, Signal::SIGKILL).unwrap();
    }
    drop(run.wait());
    let _kill_on_drop = KillOnDrop(home(&env));
    let end = env.run(Subject::Tf, &PLAN);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert_eq!(id_of(&env.locks()[0]), id);
    assert_eq!(records(&env).len(), 1);
    for pid in marked(&home(&env)) {
        let _ = kill(pid, Signal::SIGKILL);
    }
    wait_until_all_is_gone(&env);
    let _ = fs::remove_file(env.directory.join("began"));
    assert_next_gives_back(&env);
}

#[test]
fn a_lock_that_was_replaced_meanwhile_stands() {
    let env = killed_whole(Lock::Both);
    let other = env.lock_of_another();
    let end = env.run(Subject::Tf, &PLAN);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert_eq!(env.locks(), [other.clone(), other]);
    assert!(records(&env).is_empty(), "there is nothing left to do for it");
}

#[test]
fn a_stop_asked_for_during_the_recovery_starts_no_terraform() {
    let mut env = killed_whole(Lock::DynamoDb);
    let proxy = through(
        &mut env,
        |request| if is_dynamodb(request, "GetItem") { ProxyAction::Hold } else { ProxyAction::Pass },
    );
    edit(&env, |record| {
        record["surroundings"]["variables"]["AWS_ENDPOINT_URL"] = format!("http://127.0.0.1:{}", proxy.port).into();
    });
    let run = env.start(Subject::Tf, &PLAN);
    proxy.wait_until_held();
    run.send(Signal::SIGINT);
    run.wait_for_err("press ^C again to leave it");
    run.send(Signal::SIGINT);
    let end = run.wait();
    assert_eq!(end.signal(), Some(2), "{}", env.dump(&end));
    assert_eq!(end.out, "", "terraform was not started");
    env.assert_locked();
    proxy.let_go();
    assert_next_gives_back(&env);
}

// ---- the lock service

/// Lets `action` respond in place of the lock service while the returned flag is set.
fn ailing(env: &mut TestEnv, action: impl Fn() -> ProxyAction + Send + Sync + 'static) -> (Proxy, Arc<AtomicBool>) {
    let ails = Arc::new(AtomicBool::new(false));
    let now = Arc::clone(&ails);
    let proxy = through(env, move |_| if now.load(Ordering::Relaxed) { action() } else { ProxyAction::Pass });
    (proxy, ails)
}

fn error(status: &str, code: &str) -> Message {
    Message::answer(status, &format!(r#"{{"__type":"com.amazonaws.dynamodb.v20120810#{code}","message":"ails"}}"#))
}

#[test]
fn a_lock_service_that_ails_when_the_release_is_due_is_left_to_the_next_run() {
    type Case = (&'static str, fn() -> ProxyAction);
    let cases: [Case; 4] = [
        ("answers 500", || ProxyAction::Answer(error("500 Internal Server Error", "InternalServerError"))),
        ("throttles", || ProxyAction::Answer(error("400 Bad Request", "ProvisionedThroughputExceededException"))),
        ("cuts every reply", || ProxyAction::LoseAnswer),
        ("does not answer", || ProxyAction::Hold),
    ];
    std::thread::scope(|scope| {
        for (name, action) in cases {
            scope.spawn(move || {
                let mut env = TestEnv::new(Lock::Both, WAITS);
                let (proxy, ails) = ailing(&mut env, action);
                let run = env.start_apply(Subject::Tf);
                let id = id_of(&env.locks()[0]);
                ails.store(true, Ordering::Relaxed);
                run.kill_terraform();
                if name == "does not answer" {
                    // A person need not wait: the second ^C ends the wait. With a lease, the first held request may be
                    // the keeper's.
                    env.wait_for_trace("a lock may be held");
                    proxy.wait_until_held();
                    run.send(Signal::SIGINT);
                    run.wait_for_err("press ^C again to leave it");
                    run.send(Signal::SIGINT);
                }
                let end = run.wait();
                assert_eq!(end.signal(), Some(9), "{name}: {}", env.dump(&end));
                ails.store(false, Ordering::Relaxed);
                proxy.let_go();
                if name == "cuts every reply" && env.locks().is_empty() {
                    // The deletes had their effect. It is reported that their responses were cut off, and nothing is
                    // left to do.
                    return;
                }
                assert!(end.err.contains(&id) && end.err.contains(&env.path()), "{name}: {}", env.dump(&end));
                assert!(
                    end.err.contains("force-unlock")
                        && end.err.contains("to try again now, type: tf locks recover")
                        && end.err.contains("the next tf in this directory tries again"),
                    "{name}: {}",
                    end.err
                );
                env.assert_locked();
                let _ = fs::remove_file(env.directory.join("began"));
                assert_next_gives_back(&env);
            });
        }
    });
}

#[test]
fn a_slow_lock_service_is_waited_for() {
    // Each request takes 6 s, as with an overloaded service.
    let mut env = TestEnv::new(Lock::DynamoDb, WAITS);
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let (_proxy, ails) = ailing(&mut env, move || {
        count.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_secs(6));
        ProxyAction::Pass
    });
    let run = env.start_apply(Subject::Tf);
    ails.store(true, Ordering::Relaxed);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    assert!(asked.load(Ordering::Relaxed) >= 2);
    env.assert_unlocked();
}

#[test]
fn a_service_that_is_away_leaves_the_run_to_the_next_one_even_for_the_guardian() {
    let mut env = TestEnv::new(Lock::Both, WAITS);
    let (_proxy, ails) =
        ailing(&mut env, || ProxyAction::Answer(error("500 Internal Server Error", "InternalServerError")));
    let run = env.start_apply(Subject::Tf);
    ails.store(true, Ordering::Relaxed);
    let terraform = terraform_below(run.pid());
    for pid in [terraform, run.pid()] {
        kill(pid, Signal::SIGKILL).unwrap();
    }
    run.wait();
    wait_for("the guardian to give up", || ours(&env).is_empty().then_some(()), || env.trace());
    env.assert_locked();
    ails.store(false, Ordering::Relaxed);
    let _ = fs::remove_file(env.directory.join("began"));
    assert_next_gives_back(&env);
}

#[test]
fn credentials_that_expired_meanwhile_are_fetched_anew() {
    let mut env = TestEnv::new(Lock::Both, WAITS);
    // Each call gives another key, and the service accepts only the newest.
    env.write(
        "gives",
        "#!/bin/sh\necho call >> calls\nprintf '{\"Version\":1,\"AccessKeyId\":\"KEY%s\",\"SecretAccessKey\":\"s\"}' $(wc -l < calls)\n",
    );
    let gives = env.directory.join("gives");
    fs::set_permissions(&gives, fs::Permissions::from_mode(0o755)).unwrap();
    let config = env.directory.join("config");
    fs::write(&config, format!("[default]\ncredential_process = {}\n", gives.display())).unwrap();
    let expired = Arc::new(AtomicBool::new(false));
    let now = Arc::clone(&expired);
    let calls = env.directory.join("calls");
    let at_kill = Arc::new(AtomicUsize::new(usize::MAX));
    let limit = Arc::clone(&at_kill);
    let proxy = Proxy::start(cloud().port, move |request| {
        let signed_by = request
            .header("authorization")
            .and_then(|text| text.split("Credential=KEY").nth(1)?.split('/').next()?.parse::<usize>().ok());
        if now.load(Ordering::Relaxed) && signed_by.is_none_or(|key| key <= limit.load(Ordering::Relaxed)) {
            ProxyAction::Answer(error("400 Bad Request", "ExpiredTokenException"))
        } else {
            ProxyAction::Pass
        }
    });
    env.set("AWS_CONFIG_FILE", config).set("AWS_ACCESS_KEY_ID", "").set("AWS_SECRET_ACCESS_KEY", "");
    env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    let run = env.start_apply(Subject::Tf);
    at_kill.store(fs::read_to_string(&calls).unwrap().lines().count(), Ordering::Relaxed);
    expired.store(true, Ordering::Relaxed);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
}

// ---- the account and the holder

#[test]
fn another_accounts_credentials_never_take_unseen_for_gone() {
    let mut env = TestEnv::new(Lock::DynamoDb, WAITS);
    // The keys name their account, as those of AWS do. Each account has a table of that name.
    let table = env.table.clone();
    let (a, b) = ("111111111111", "222222222222");
    for account in [a, b] {
        cloud().create_table_as(account, &table);
    }
    assert_eq!(cloud().s3("DELETE", &env.bucket, b"").status(), 204);
    assert_eq!(cloud().s3_as(a, "PUT", &env.bucket, b"").status(), 200);
    env.set("AWS_ACCESS_KEY_ID", a);
    let run = env.start_apply(Subject::Tf);
    env.wait_for_trace("journal written");
    kill_all(&env);
    drop(run);
    let of_a = || cloud().item_as(a, &table, &env.path());
    assert!(of_a().is_some());
    let with = |key: &str, more: &[(&str, &str)]| {
        let mut command = env.command(env.bin().join("tf"));
        command.args(PLAN).args(["-lock=false"]).env("AWS_ACCESS_KEY_ID", key).envs(more.iter().copied());
        let _ = fs::remove_file(env.directory.join("began"));
        Run::start(command).wait()
    };
    let end = with(b, &[]);
    assert!(end.err.contains("account 111111111111") && end.err.contains("was not released"), "{}", env.dump(&end));
    assert!(of_a().is_some());
    assert_eq!(records(&env).len(), 1, "the record stays");
    // Another region and another endpoint in the environment do not belong to the run: its lock is looked for where it
    // was taken.
    let end = with(a, &[("AWS_REGION", "eu-west-3"), ("AWS_ENDPOINT_URL_DYNAMODB", "http://127.0.0.1:9")]);
    assert!(end.err.contains("an earlier run left"), "{}", env.dump(&end));
    assert!(of_a().is_none());
    assert_nothing_left(&env);
}

#[test]
fn what_another_machine_or_another_user_wrote_is_never_obeyed() {
    type Change = (&'static str, fn(&mut Value));
    let changes: [Change; 4] = [
        ("another machine", |record| record["host"]["machine"] = "0123456789abcdef0123456789abcdef".into()),
        ("another machine, another boot", |record| {
            record["host"]["machine"] = Value::Null;
            record["host"]["boot"] = "00000000-0000-0000-0000-000000000000".into();
        }),
        ("another boot, another file system", |record| {
            record["host"]["boot"] = "00000000-0000-0000-0000-000000000000".into();
            record["host"]["filesystem"] = 7.into();
        }),
        ("a container's, before a restart", |record| {
            record["host"]["boot"] = "00000000-0000-0000-0000-000000000000".into();
            record["host"]["processes"] = serde_json::json!([7, false]);
        }),
    ];
    for (name, change) in changes {
        let env = killed_whole(Lock::Both);
        edit(&env, change);
        let end = env.run(Subject::Tf, &PLAN);
        assert_eq!(end.code(), Some(1), "{name}: {}", env.dump(&end));
        env.assert_locked();
        assert_eq!(records(&env).len(), 1, "{name}: it is somebody's");
    }
    if is_root_on_linux() {
        let env = killed_whole(Lock::Both);
        let [path] = records(&env).try_into().unwrap();
        let directory = path.parent().unwrap().to_owned();
        nix::unistd::chown(&directory, Some(nix::unistd::Uid::from_raw(4711)), None).unwrap();
        let end = env.run(Subject::Tf, &PLAN);
        assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
        env.assert_locked();
    }
    // A symbolic link in the place of a record's directory.
    let env = killed_whole(Lock::Both);
    let [path] = records(&env).try_into().unwrap();
    let directory = path.parent().unwrap().to_owned();
    let elsewhere = env.directory.join("elsewhere");
    fs::rename(&directory, &elsewhere).unwrap();
    symlink(&elsewhere, &directory).unwrap();
    let end = env.run(Subject::Tf, &PLAN);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    env.assert_locked();
}

#[test]
fn under_sudo_with_anothers_home_roots_own_place_is_used() {
    if !is_root_on_linux() {
        // Only root can give a directory to another user.
        return;
    }
    let env = TestEnv::new(Lock::Both, "true");
    let home = env.directory.parent().unwrap().join("home");
    nix::unistd::chown(&home, Some(nix::unistd::Uid::from_raw(4711)), None).unwrap();
    let end = env.run(Subject::Tf, &APPLY);
    assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", env.dump(&end));
    assert_eq!(fs::read_dir(&home).unwrap().count(), 0, "nothing of root's in there");
}

/// Appends 400 KB of records to terraform's log.
const LONG_LOG: &str =
    "seq -f \"$(date -u +%FT%T.000Z) [TRACE] statemgr.Filesystem: round %g\" 6000 >> ${TF_TEMP_LOG_PATH:-$TF_LOG_PATH}";

/// Where nothing can be written to the journal, the log is the only place that has the lock. No part of it may be
/// freed.
#[test]
fn a_lock_that_could_not_be_written_to_the_journal_is_found_in_a_long_log() {
    let grow = "touch began; while ! test -e grow; do sleep 0.02; done";
    let mut env = TestEnv::new(Lock::Both, &format!("{grow}; {LONG_LOG}; {WAITS}"));
    env.stand_in("waits", "#!/bin/sh\nwhile ! test -e blocked; do sleep 0.02; done\nexec terraform \"$@\"\n");
    let run = env.start(Subject::Tf, &APPLY);
    // The guardian writes the journal. A directory is in the place of the file that its write would create.
    let guardian = guardian_of(&env, run.pid());
    let record = wait_for("the record", || records(&env).pop(), || env.trace());
    fs::create_dir(record.with_extension(guardian.to_string())).unwrap();
    env.write("blocked", "");
    env.wait_for_began(&run);
    env.assert_locked();
    env.wait_for_trace("journal written: false");
    let failed = || env.trace().matches("journal written: false").count();
    let before = failed();
    env.write("grow", "");
    wait_for("one more write that fails", || (failed() > before).then_some(()), || env.trace());
    kill_all(&env);
    run.wait();
    env.assert_locked();
    let end = env.run(Subject::Tf, &PLAN);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    env.assert_unlocked();
}

/// The record cannot be written while the run works, nor by `tf` when it could not release the lock.
#[test]
fn a_lock_that_tf_can_neither_release_nor_record_is_released_by_the_next_run() {
    let mut env = TestEnv::new(Lock::Both, WAITS);
    env.stand_in("waits", "#!/bin/sh\nwhile ! test -e blocked; do sleep 0.02; done\nexec terraform \"$@\"\n");
    let is_cut_off = Arc::new(AtomicBool::new(false));
    let cut_off = Arc::clone(&is_cut_off);
    let _proxy =
        through(&mut env, move |_| if cut_off.load(Ordering::SeqCst) { ProxyAction::Close } else { ProxyAction::Pass });
    let run = env.start(Subject::Tf, &APPLY);
    let guardian = guardian_of(&env, run.pid());
    let record = wait_for("the record", || records(&env).pop(), || env.trace());
    // A directory is in the place of the file that a write of each process would create.
    for pid in [guardian.as_raw(), run.pid().as_raw()] {
        fs::create_dir(record.with_extension(pid.to_string())).unwrap();
    }
    env.write("blocked", "");
    env.wait_for_began(&run);
    env.wait_for_trace("journal written: false");
    is_cut_off.store(true, Ordering::SeqCst);
    run.kill_terraform();
    let end = run.wait();
    is_cut_off.store(false, Ordering::SeqCst);
    env.assert_locked();
    let id = id_of(&env.locks()[0]);
    assert!(!fs::read_to_string(&record).unwrap().contains(&id), "{}", env.dump(&end));
    let end = env.run(Subject::Tf, &PLAN);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
}

#[test]
fn a_torn_or_hostile_record_is_set_aside_and_said_once() {
    for text in ["", "{", "null", "[[[[[[", r#"{"format":1}"#, "\u{0}\u{1}\u{2}"] {
        let env = killed_whole(Lock::DynamoDb);
        let [path] = records(&env).try_into().unwrap();
        fs::write(&path, text).unwrap();
        let end = env.run(Subject::Tf, &PLAN);
        assert!(end.err.contains("of an earlier run; it was moved to"), "{text:?}: {}", env.dump(&end));
        assert_eq!(end.code(), Some(1), "{text:?}: {}", env.dump(&end));
        env.assert_locked();
        env.delete_lock();
        let end = env.run(Subject::Tf, &PLAN);
        assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{text:?}: {}", env.dump(&end));
    }
}

/// An error of the host proves nothing about a record: here, each read of the file fails with EIO.
#[test]
fn a_record_that_the_host_cannot_read_stays_where_it_is() {
    if !is_root_on_linux() {
        // Only root can mount.
        return;
    }
    let env = TestEnv::new(Lock::DynamoDb, WAITS);
    let unreadable = |command: &str| {
        let [path] = records(&env).try_into().unwrap();
        let mut unshare = env.command("unshare");
        unshare.args(["-m", "sh", "-c", &format!("mount --bind /proc/$$/mem \"$0\"; exec {command}")]).arg(&path);
        let end = Run::start(unshare).wait();
        assert!(path.exists() && !journal(&env).join("set-aside").exists(), "{}", env.dump(&end));
        env.assert_locked();
        end
    };
    let living = start_recorded(&env);
    let said = "could not read the record of an earlier run: ";
    for command in ["tf plan -no-color", "tf locks recover"] {
        let end = unreadable(command);
        assert!(!end.err.contains(said), "{}", env.dump(&end));
    }
    kill_all(&env);
    drop(living);
    for (command, code) in [("tf plan -no-color", 1), ("tf locks recover --dry-run", 2), ("tf locks recover", 2)] {
        let end = unreadable(command);
        assert_eq!(end.code(), Some(code), "{}", env.dump(&end));
        assert!(end.err.contains(said) && end.err.contains("Input/output error"), "{}", env.dump(&end));
    }
    assert_next_gives_back(&env);
}

#[test]
fn with_few_descriptors_each_dead_run_of_the_directory_is_finished_before_terraform() {
    let mut env = TestEnv::new(Lock::DynamoDb, WAITS);
    let living = start_recorded(&env);
    let [path] = records(&env).try_into().unwrap();
    let mut dead: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    dead["log"]["locks"] = serde_json::json!([]);
    dead["tree"] = serde_json::json!({});
    dead["terraform"] = Value::Null;
    let runs = path.ancestors().nth(2).unwrap();
    for number in 0..60 {
        let name = format!("4000000-{number:016x}");
        dead["run"] = name.as_str().into();
        let directory = runs.join(name);
        fs::create_dir(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(directory.join("lock"), "").unwrap();
        fs::write(directory.join("record.json"), dead.to_string()).unwrap();
    }
    env.stand_in("says", "#!/bin/sh\necho said\n");
    let mut command = env.command("sh");
    command.args(["-c", "ulimit -n 40; exec tf apply"]);
    let end = Run::start(command).wait();
    assert_eq!((end.code(), end.out.as_str()), (Some(0), "said\n"), "{}", env.dump(&end));
    assert_eq!(records(&env), [path], "{}", env.dump(&end));
    env.unblock();
    assert_eq!(living.wait().code(), Some(0));
}

#[test]
fn a_changed_record_takes_no_lock_that_its_run_did_not_take() {
    // The ID of a running bare terraform at the same location, with the same user and host.
    let env = killed_whole(Lock::DynamoDb);
    env.delete_lock();
    let living = env.start_apply(Subject::Bare);
    let theirs = env.locks();
    let id = id_of(&theirs[0]);
    edit(&env, |record| record["log"]["locks"][0]["id"] = id.as_str().into());
    let end = env.run(Subject::Tf, &PLAN);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert_eq!(env.locks(), theirs, "{}", env.dump(&end));
    env.unblock();
    assert_eq!(living.wait().code(), Some(0));

    // The same without the run's log: the times do not match, and neither does any other field that is changed alone.
    for field in ["id", "who", "operation", "version", "path", "bucket", "key", "asked"] {
        let env = killed_whole(Lock::DynamoDb);
        forget_recorder(&env);
        let other = lock_json("11111111-2222-3333-4444-555555555555", &env.path());
        if field == "id" {
            env.put_lock(&other);
        }
        let before = env.locks();
        edit(&env, |record| {
            record["log"]["locks"][0][field] = match field {
                "id" => "11111111-2222-3333-4444-555555555555".into(),
                "asked" => "2020-01-01T00:00:00Z".into(),
                _ => "another".into(),
            };
        });
        let end = env.run(Subject::Tf, &PLAN);
        assert_eq!(env.locks(), before, "{field}: {}", env.dump(&end));
    }
}

#[test]
fn a_lock_that_a_living_run_claims_is_not_taken_for_a_dead_ones() {
    // A dead run whose record has the same contents as that of a living run.
    let env = killed_whole(Lock::DynamoDb);
    env.delete_lock();
    forget_recorder(&env);
    let [dead] = records(&env).try_into().unwrap();
    let living = env.start(Subject::Tf, &APPLY);
    env.wait_for_began(&living);
    let theirs = env.locks();
    let path = wait_for(
        "the record",
        || {
            records(&env).into_iter().find(|path| {
                *path != dead && fs::read_to_string(path).is_ok_and(|text| text.contains(&id_of(&theirs[0])))
            })
        },
        || env.trace(),
    );
    let run = dead.parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    let mut copy: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    copy["run"] = run.as_str().into();
    if let Some(directory) = dead.parent().filter(|directory| !directory.exists()) {
        fs::create_dir(directory).unwrap();
        fs::set_permissions(directory, fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(directory.join("lock"), "").unwrap();
    }
    fs::write(&dead, copy.to_string()).unwrap();
    let end = env.run(Subject::Tf, &PLAN);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    // With a lease, the lock says so after its first renewal.
    let ids = |locks: &[String]| locks.iter().map(|lock| id_of(lock)).collect::<Vec<_>>();
    assert_eq!(ids(&env.locks()), ids(&theirs), "{}", env.dump(&end));
    env.unblock();
    assert_eq!(living.wait().code(), Some(0));
}

// ---- where the journal cannot be kept

#[test]
fn without_a_place_for_the_journal_terraform_runs_silently_and_an_abnormal_end_says_so() {
    if !is_root_on_linux() {
        // Only root can mount.
        return;
    }
    // Each case has its own mount namespace, in which no directory is left that can be written to.
    let everywhere =
        "mount -t tmpfs -o ro none /var/tmp && mount --bind $0/home $0/home && mount -o remount,ro,bind $0/home";
    for (name, prepare) in [
        ("read-only", everywhere.to_owned()),
        ("a full disk", format!("{everywhere}; mount -t tmpfs -o size=4k,nr_inodes=2 none $0/home")),
        ("a disk without room for a record", format!("{everywhere}; mount -t tmpfs -o size=4k none $0/home")),
        ("locks that may mean nothing", format!("{everywhere}; mount -t ramfs none $0/home")),
        ("no home", format!("{everywhere}; export HOME=/nowhere; mount -t tmpfs -o ro none /root")),
    ] {
        let env = TestEnv::new(Lock::Both, WAITS);
        let root = env.directory.parent().unwrap().to_owned();
        let start = |command: &str| {
            let mut unshare = env.command("unshare");
            unshare.args(["-m", "sh", "-c", &format!("{prepare}; cd $0/work; exec {command}")]).arg(&root);
            Run::start(unshare)
        };
        let end = start("tf plan -no-color").wait();
        assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{name}: {}", env.dump(&end));
        let run = start("tf apply -auto-approve -no-color");
        env.wait_for_began(&run);
        run.kill_terraform();
        let end = run.wait();
        assert!(end.err.contains("released the lock"), "{name}: {}", env.dump(&end));
        assert!(end.err.contains("this run had no journal"), "{name}: {}", env.dump(&end));
        let has_lease = std::env::var_os("TF_TEST_LEASE").is_some();
        assert_eq!(end.err.contains("before its lease had lapsed"), has_lease, "{name}: {}", env.dump(&end));
        // `doctor` finds the same before a run.
        let end = start("tf locks doctor").wait();
        assert_eq!(end.code(), Some(2), "{name}: {}", env.dump(&end));
        assert!(end.out.contains("WRONG  journal: "), "{name}: {}", env.dump(&end));
        env.assert_unlocked();
    }
}

#[test]
fn without_a_descriptor_to_spare_terraform_runs_all_the_same() {
    let mut env = TestEnv::empty(Lock::DynamoDb);
    env.stand_in("says", "#!/bin/sh\necho said\n");
    for limit in 4..24 {
        let mut command = env.command("sh");
        command.args(["-c", &format!("ulimit -n {limit}; exec tf apply")]);
        let end = Run::start(command).wait();
        // Below that limit, not even the program's own libraries can be opened, with `tf` or without it.
        let mut bare = env.command("sh");
        bare.args(["-c", &format!("ulimit -n {limit}; exec ./says")]);
        let bare = Run::start(bare).wait();
        assert_eq!((end.code(), end.out, end.err), (bare.code(), bare.out, bare.err), "{limit}");
    }
}

// ---- what is written

#[test]
fn no_secret_is_written_down_and_finished_runs_leave_nothing() {
    let secrets = ["hunter-var", "hunter-backend", "hunter-env", "hunter-tfvar"];
    let mut env = TestEnv::new(Lock::Both, WAITS);
    env.write("variables.tf", "variable \"a\" {\n}\nvariable \"b\" {\n}\n");
    env.set("AWS_SECRET_ACCESS_KEY", "hunter-env").set("TF_VAR_b", "hunter-tfvar");
    let found = |env: &TestEnv| {
        let all = everything_written(env);
        assert!(!all.is_empty(), "something is written");
        for (path, content) in all {
            let text = String::from_utf8_lossy(&content).into_owned();
            for secret in secrets {
                assert!(!text.contains(secret), "{secret} in {}: {text}", path.display());
            }
            let mode = fs::metadata(&path).map_or(0o600, |file| file.permissions().mode());
            assert_eq!(mode & 0o077, 0, "{}", path.display());
        }
    };
    let mut init = env.command(env.bin().join("terraform"));
    init.args([
        "init",
        "-no-color",
        "-reconfigure",
        "-backend-config=secret_key=hunter-backend",
        "-backend-config=access_key=test",
    ]);
    assert_eq!(Run::start(init).wait().code(), Some(0));
    let mut command = env.command(env.bin().join("tf"));
    command.args(APPLY).args(["-var", "a=hunter-var"]);
    let run = Run::start(command);
    env.wait_for_began(&run);
    env.wait_for_trace("journal written");
    found(&env);
    kill_all(&env);
    found(&env);
    drop(run);
    // The keys of the run are only in the cached backend of its directory. The next `tf` reads them from there.
    let _ = fs::remove_file(env.directory.join("began"));
    let mut next = env.command(env.bin().join("tf"));
    next.args(PLAN).args(["-var", "a=x"]);
    let end = Run::start(next).wait();
    assert!(end.err.contains("an earlier run left"), "{}", env.dump(&end));
    env.assert_unlocked();
    assert_nothing_left(&env);
}

#[test]
fn a_secret_that_is_kept_nowhere_is_missed_by_name() {
    let env = TestEnv::new(Lock::DynamoDb, WAITS);
    let mut init = env.command(env.bin().join("terraform"));
    init.args([
        "init",
        "-no-color",
        "-reconfigure",
        "-backend-config=secret_key=test",
        "-backend-config=access_key=test",
    ]);
    assert_eq!(Run::start(init).wait().code(), Some(0));
    kill_whole(&env);
    // The directory was initialized again for another state.
    env.write("main.tf", &fs::read_to_string(env.directory.join("main.tf")).unwrap().replace("prod", "other"));
    let mut init = env.command(env.bin().join("terraform"));
    init.args(["init", "-no-color", "-reconfigure"]);
    assert_eq!(Run::start(init).wait().code(), Some(0));
    let end = env.run(Subject::Tf, &PLAN);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert!(end.err.contains("secret_key") && end.err.contains("was not released"), "{}", env.dump(&end));
    env.assert_locked();
    assert_eq!(records(&env).len(), 1);
}

/// A pid that is in use again. The mark and the lock file show that the process is another one; the pid does not.
#[test]
fn a_number_that_is_somebody_elses_now_is_not_taken_for_terraform() {
    let env = killed_whole(Lock::DynamoDb);
    // A running process that has the pids of the dead run.
    let stranger = Command::new("sleep").arg("60").spawn().unwrap();
    let pid = stranger.id();
    let mut stranger = stranger;
    edit(&env, |record| {
        record["tf"] = pid.into();
        record["terraform"] = pid.into();
    });
    assert_next_gives_back(&env);
    let number = Pid::from_raw(i32::try_from(pid).unwrap());
    assert!(state(number).is_some_and(|state| state != 'Z'), "the stranger lives");
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}

#[test]
fn a_log_that_was_forgotten_behind_the_reader_is_known_to_whoever_comes_after() {
    // The user's own TRACE log, and many resources that each write lines to it: much is written after the lock was
    // taken. The part of the log that `tf` has read is removed from memory.
    let env = || {
        let mut env = TestEnv::empty(Lock::Both);
        let many = "resource \"terraform_data\" \"many\" {\ncount = 300\n}\n";
        env.write_main(many, WAITS);
        let log = env.directory.join("own.log");
        env.set("TF_LOG", "TRACE").set("TF_LOG_PATH", log);
        env.init();
        env
    };
    let forgotten = |env: &TestEnv| {
        let [path] = records(env).try_into().ok()?;
        let record: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        (record["offset"].as_u64()? > 100_000 && record["log"]["locks"][0]["locked"].is_string()).then_some(())
    };
    let start = |env: &TestEnv| {
        let run = env.start(Subject::Tf, &APPLY);
        env.wait_for_began(&run);
        wait_for("a log to be forgotten", || forgotten(env), || format!("{:?}\n{}", records(env), env.trace()));
        run
    };
    let guarded = env();
    let run = start(&guarded);
    let terraform = terraform_below(run.pid());
    for pid in [terraform, run.pid()] {
        kill(pid, Signal::SIGKILL).unwrap();
    }
    run.wait();
    wait_until_unlocked(&guarded);
    wait_until_ours_are_gone(&guarded);

    let alone = env();
    let run = start(&alone);
    kill_all(&alone);
    drop(run);
    alone.assert_locked();
    let end = alone.run(Subject::Tf, &["plan", "-no-color"]);
    assert!(end.err.contains("an earlier run left"), "{}", alone.trace());
    alone.assert_unlocked();
}

#[test]
fn in_a_shared_group_a_killed_tf_leaves_no_lock_either() {
    let mut env = TestEnv::new(Lock::Both, WAITS);
    env.set("TFW_TTY", "shared");
    let run = env.start_apply(Subject::Tf);
    killpg(run.pid(), Signal::SIGKILL).unwrap();
    run.wait();
    wait_until_unlocked(&env);
    wait_until_all_is_gone(&env);
    assert_nothing_left(&env);
}
