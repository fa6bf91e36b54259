//! Locks that are reported and not released, because the user has said so, or because it is not known whether the run
//! is alive.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;

use super::locks_release::locks;
use super::survived::{edit, kill_whole, killed_whole, records, wait_until_recorded};
use crate::support::cloud::cloud;
use crate::support::http::Message;
use crate::support::process::{Ended, Run};
use crate::support::processes::{guardian_of, kill_all, kill_without_guardian, ours};
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::system::arguments;
use crate::support::test_env::{UNSET, WAITS, id_of};
use crate::support::{Lock, Subject, TestEnv, wait_for};

/// Runs in a shell the command that a message says to type after its `number`th "type".
#[track_caller]
fn type_what_is_said(env: &TestEnv, said: &str, number: usize) -> Ended {
    let command = said.split(" type").nth(number).unwrap_or_else(|| panic!("nothing to type: {said}"));
    let command = command.split_once(": ").unwrap().1.lines().next().unwrap().trim();
    env.run_in_shell(command)
}

const SECRET: &str = "x-hunter2-not-to-be-found";

/// Starts an apply that gets a secret as an argument, and waits until it works.
fn with_a_secret() -> (TestEnv, Run) {
    let env = TestEnv::empty(Lock::DynamoDb);
    env.write_main("variable \"x\" {}", WAITS);
    env.init();
    let run = env.start(Subject::Tf, &["apply", "-auto-approve", "-no-color", "-var", &format!("x={SECRET}")]);
    env.wait_for_began(&run);
    (env, run)
}

/// The run was told not to release. Its guardian does not touch the lock either.
#[test]
fn with_release_never_a_killed_tf_leaves_its_lock_to_be_named_and_not_forgotten() {
    for lock in [Lock::DynamoDb, Lock::Both] {
        let mut env = TestEnv::new(lock, WAITS);
        env.set("TFW_RELEASE", "never");
        kill_without_guardian(&env);
        let id = id_of(&env.locks()[0]);
        kill_all(&env);
        env.assert_locked();
        env.set("TFW_RELEASE", UNSET);
        for _ in 0..2 {
            let end = locks(&env, &["recover"]);
            assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
            assert!(end.out.contains("TFW_RELEASE is set to never") && end.out.contains(&id), "{}", env.dump(&end));
            env.assert_locked();
        }
        // When the release is allowed again, the lock is released.
        env.set("TFW_RELEASE", "auto");
        let end = locks(&env, &["recover"]);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        env.assert_unlocked();
        assert!(records(&env).is_empty());
    }
}

/// One response proves nothing, because a proxy can have sent it.
#[test]
fn one_empty_answer_does_not_make_a_recovery_forget_what_it_is_to_name() {
    let mut env = TestEnv::new(Lock::DynamoDb, WAITS);
    env.set("TFW_RELEASE", "never");
    let answered = Arc::new(AtomicBool::new(true));
    let flag = Arc::clone(&answered);
    let proxy = Proxy::start(cloud().port, move |request| {
        let is_first = request.is_ours() && request.asks_for("GetItem") && !flag.swap(true, Ordering::SeqCst);
        if is_first { ProxyAction::Answer(Message::answer("200 OK", "{}")) } else { ProxyAction::Pass }
    });
    env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    kill_without_guardian(&env);
    kill_all(&env);
    answered.store(false, Ordering::SeqCst);
    let end = locks(&env, &["recover"]);
    assert!(answered.load(Ordering::SeqCst), "{}", env.dump(&end));
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    assert!(end.out.contains(&id_of(&env.locks()[0])), "{}", env.dump(&end));
    assert_eq!(records(&env).len(), 1);
}

/// If tf is alive, it reports the lock, and the lock is not forgotten either.
#[test]
fn with_release_never_a_killed_terraforms_lock_is_named_again_until_it_is_gone() {
    let mut env = TestEnv::new(Lock::DynamoDb, WAITS);
    env.set("TFW_RELEASE", "never");
    let run = env.start_apply(Subject::Tf);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("TFW_RELEASE is set to never") && !end.err.contains("tries again"), "{}", env.dump(&end));
    // The processes that the run has started were left running.
    kill_all(&env);
    let end = locks(&env, &["recover"]);
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    env.assert_locked();
    env.set("TFW_RELEASE", "auto");
    let end = locks(&env, &["recover"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    env.assert_unlocked();
}

#[test]
fn with_release_never_a_recovery_names_and_once_the_lock_is_gone_forgets() {
    let mut env = killed_whole(Lock::Both);
    env.set("TFW_RELEASE", "never");
    let end = locks(&env, &["recover"]);
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    assert!(end.out.contains("TFW_RELEASE is set to never"), "{}", env.dump(&end));
    env.assert_locked();
    let unlocked = type_what_is_said(&env, &end.out.replace("force-unlock", "force-unlock -force"), 1);
    assert_eq!(unlocked.code(), Some(0), "{}\n{}", end.out, env.dump(&unlocked));
    env.assert_unlocked();
    let end = locks(&env, &["recover"]);
    assert_eq!((end.code(), end.out.as_str()), (Some(0), ""), "{}", env.dump(&end));
    assert!(records(&env).is_empty());
}

/// A value that `tf` does not know may be meant as `never`.
#[test]
fn with_an_unreadable_tfw_release_nothing_is_released() {
    let mut env = killed_whole(Lock::DynamoDb);
    let id = id_of(&env.locks()[0]);
    for value in ["Never", "NEVER", "no"] {
        env.set("TFW_RELEASE", value);
        for words in [&["recover"][..], &["release", &id, "--yes"], &["release", "--force", &id]] {
            let end = locks(&env, words);
            assert_eq!((end.code(), end.out.as_str()), (Some(1), ""), "{words:?} {}", env.dump(&end));
            let expected = format!("tf: TFW_RELEASE is \"{value}\", but must be auto or never\n");
            assert_eq!(end.err, expected, "{words:?}");
            env.assert_locked();
        }
    }
    // What only reads locks is not in the way of a person who looks for the reason.
    let end = locks(&env, &["show", &id]);
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    env.set("TFW_RELEASE", "");
    let end = locks(&env, &["recover"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    env.assert_unlocked();
}

/// The state directory may be a copy of a disk, or in a container's volume: the run may continue elsewhere.
#[test]
fn a_run_that_cannot_be_judged_from_here_is_named_by_a_recovery_and_its_commands_work() {
    for release in [true, false] {
        let env = killed_whole(Lock::DynamoDb);
        let [path] = records(&env).try_into().unwrap();
        let mut record: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        record["host"]["machine"] = "0123456789abcdef0123456789abcdef".into();
        fs::write(&path, record.to_string()).unwrap();
        for words in [&["recover", "--dry-run"][..], &["recover"]] {
            let end = locks(&env, words);
            assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
            assert!(end.out.contains("tf cannot tell whether that run is still running"), "{}", env.dump(&end));
            assert!(end.out.contains(&id_of(&env.locks()[0])), "{}", env.dump(&end));
            assert!(end.out.contains(" --chdir "), "{}", env.dump(&end));
        }
        let said = locks(&env, &["recover"]).out;
        if release {
            let released = type_what_is_said(&env, &said, 1);
            assert_eq!(released.code(), Some(0), "{said}\n{}", env.dump(&released));
            env.assert_unlocked();
        }
        let forgotten = type_what_is_said(&env, &said, 2);
        assert_eq!(forgotten.code(), Some(0), "{said}\n{}", env.dump(&forgotten));
        let end = locks(&env, &["recover"]);
        assert_eq!((end.code(), end.out.as_str()), (Some(0), ""), "{}", env.dump(&end));
        assert_eq!(env.locks().is_empty(), release, "only the record is dropped");
    }
}

/// TF_DATA_DIR was set for that run only. Its directory has more characters than a line shows of an untrusted text.
#[test]
fn the_commands_for_a_run_in_a_long_directory_with_its_own_data_directory_work_where_they_are_typed() {
    let mut env = TestEnv::empty(Lock::Both);
    let data = ".tf's prod";
    let directory = format!("{}/{}", "d".repeat(130), "it's e ".repeat(20));
    let chdir = format!("-chdir={directory}");
    env.write_main("", &format!("cd '{}'; {WAITS}", env.directory.display()));
    let start = |env: &TestEnv| {
        let run = env.start(Subject::Tf, &[&chdir, "apply", "-auto-approve", "-no-color"]);
        env.wait_for_began(&run);
        wait_until_recorded(env);
        run
    };
    let working = env.directory.join(&directory);
    fs::create_dir_all(&working).unwrap();
    fs::rename(env.directory.join("main.tf"), working.join("main.tf")).unwrap();
    env.set("TF_DATA_DIR", data);
    assert_eq!(env.run(Subject::Bare, &[&chdir, "init"]).code(), Some(0));
    let is_unlocked_by = |env: &TestEnv, said: &str| {
        assert!(!working.join(".terraform").exists());
        let typed = type_what_is_said(env, &said.replace("force-unlock", "force-unlock -force"), 1);
        assert_eq!(typed.code(), Some(0), "{said}\n{}", env.dump(&typed));
        env.assert_unlocked();
        fs::remove_file(env.directory.join("began")).unwrap();
    };

    // Everything is killed, and a later `tf` names the command.
    env.set("TFW_RELEASE", "never");
    let run = start(&env);
    kill_all(&env);
    drop(run);
    env.set("TF_DATA_DIR", UNSET);
    is_unlocked_by(&env, &locks(&env, &["recover"]).out);
    assert_eq!(locks(&env, &["recover"]).code(), Some(0));

    // The same for a run that cannot be judged from here.
    env.set("TF_DATA_DIR", data);
    let run = start(&env);
    kill_all(&env);
    drop(run);
    env.set("TF_DATA_DIR", UNSET).set("TFW_RELEASE", UNSET);
    edit(&env, |record| record["host"]["machine"] = "0123456789abcdef0123456789abcdef".into());
    let said = locks(&env, &["recover"]).out;
    is_unlocked_by(&env, &said);
    assert_eq!(type_what_is_said(&env, &said, 2).code(), Some(0));

    // `tf` outlives its terraform, and names the command itself.
    env.set("TF_DATA_DIR", data).set("TFW_RELEASE", "never");
    let run = start(&env);
    run.kill_terraform();
    let end = run.wait();
    env.set("TF_DATA_DIR", UNSET);
    kill_all(&env);
    is_unlocked_by(&env, &end.err);
}

/// The run is in another container, with this directory in a volume. Its processes cannot be seen from here, but they
/// hold its lock file.
#[test]
fn a_run_that_somebody_holds_is_not_called_dead_by_a_recovery_that_cannot_see_it() {
    let env = TestEnv::new(Lock::DynamoDb, WAITS);
    let run = env.start_apply(Subject::Tf);
    let path = wait_for(
        "the record",
        || records(&env).into_iter().find(|path| fs::read_to_string(path).is_ok_and(|text| text.contains("asked"))),
        || env.trace(),
    );
    let mut record: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    record["host"]["machine"] = "0123456789abcdef0123456789abcdef".into();
    fs::write(&path, record.to_string()).unwrap();
    let end = locks(&env, &["recover"]);
    assert_eq!((end.code(), end.out.as_str()), (Some(0), ""), "{}", env.dump(&end));
    let end = locks(&env, &["recover", "--forget", record["run"].as_str().unwrap()]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    env.unblock();
    assert_eq!(run.wait().code(), Some(0));
}

/// The log of a run is in memory. If every process is killed, it stays there until the next `tf`.
#[test]
fn what_a_killed_run_leaves_in_memory_has_no_argument_in_it() {
    let (env, run) = with_a_secret();
    let name = format!("tf-{}.log", env.trace().split("run ").nth(1).unwrap().lines().next().unwrap().trim());
    let log = std::path::Path::new("/dev/shm").join(&name);
    let text = || String::from_utf8_lossy(&fs::read(&log).unwrap_or_default()).into_owned();
    assert!(text().contains("CLI args"), "{name} is the log: {}", text());
    wait_for("the arguments to go", || (!text().contains(SECRET)).then_some(()), text);
    assert!(text().contains("Attempting to lock remote state"), "{}", text());
    kill_all(&env);
    drop(run);
    assert!(!text().contains(SECRET) && log.exists());
    let end = locks(&env, &["recover"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    env.assert_unlocked();
    assert!(!log.exists(), "the recovery takes it away");
}

/// The guardian is a fork, so it inherits the arguments of terraform.
#[test]
fn no_value_of_an_argument_is_in_the_process_list_but_where_it_was_typed() {
    let (env, run) = with_a_secret();
    let guardian = guardian_of(&env, run.pid());
    let shown = arguments;
    assert!(shown(run.pid()).contains(SECRET), "it was typed there");
    assert!(!shown(guardian).contains("x="), "{:?}", shown(guardian));
    // A process that `tf` has just forked shows the arguments of `tf` until it calls exec. So it is waited for.
    let leaks = |pid: &nix::unistd::Pid| *pid != run.pid() && shown(*pid).contains(SECRET);
    let elsewhere = || ours(&env).into_iter().filter(leaks).map(|pid| (pid, shown(pid))).collect::<Vec<_>>();
    let is_hidden = || elsewhere().is_empty().then_some(());
    wait_for("no value in the process list", is_hidden, || format!("{:?}", elsewhere()));
    env.unblock();
    assert_eq!(run.wait().code(), Some(0));
}

/// A run was killed whole, and then a second one. Each has its own record.
#[test]
fn two_killed_runs_are_named_each_by_its_own_lock() {
    let mut env = killed_whole(Lock::DynamoDb);
    env.set("TFW_RELEASE", "never");
    let first = id_of(&env.locks()[0]);
    env.delete_lock();
    kill_whole(&env);
    let second = id_of(&env.locks()[0]);
    let end = locks(&env, &["recover"]);
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    assert!(end.out.contains(&second) && !end.out.contains(&first), "{}", env.dump(&end));
}
