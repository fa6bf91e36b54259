//! What was done to locks is recorded, and reported to a command for which `tf` does not wait.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use serde_json::Value;

use super::locks_release::locks;
use crate::support::process::Run;
use crate::support::test_env::{WAITS, id_of, lock_json};
use crate::support::{Ended, Lock, Subject, TestEnv, wait_for};

fn history(env: &TestEnv) -> Vec<Value> {
    let end = locks(env, &["history", "--json"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    super::locks_list::assert_fits(env, "history", &end.out);
    let all: Value = serde_json::from_str(&end.out).unwrap();
    assert_eq!(all["unreadable"], 0);
    all["events"].as_array().unwrap().clone()
}

/// Runs an apply whose terraform is killed.
fn killed(env: &TestEnv) -> Ended {
    let run = env.start_apply(Subject::Tf);
    run.kill_terraform();
    run.wait()
}

/// Sets a program to which events are reported.
fn told_by(env: &mut TestEnv, script: &str) {
    env.write("told", &format!("#!/bin/sh\n{script}\n"));
    let path = env.directory.join("told");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
    env.set("TFW_ON_EVENT", path.as_os_str());
}

#[test]
fn a_release_is_written_down_and_told() {
    let mut env = TestEnv::new(Lock::Both, WAITS);
    told_by(&mut env, "cat >told.tmp; ls /dev/fd >fds; env >environment; mv told.tmp told.json");
    let end = killed(&env);
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    let events = history(&env);
    let [event] = events.as_slice() else { panic!("{events:?}") };
    assert_eq!((&event["event"], &event["by"]), (&"released".into(), &"tf".into()), "{event}");
    assert_eq!(event["path"], env.path());
    assert!(event["why"].as_str().unwrap().contains("killed by SIGKILL"), "{event}");
    env.wait_for_file("told.json");
    assert_eq!(serde_json::from_str::<Value>(&env.read("told.json")).unwrap(), *event);
    let environment = env.read("environment");
    assert!(!environment.contains("TFW_ON_EVENT=") && !environment.contains("TFW_RUN="), "{environment}");
    let descriptors = env.read("fds");
    // 0, 1 (its own file), 2, and the directory that ls reads. An inherited pipe of `tf` would delay the pipe's reader.
    assert_eq!(descriptors.split_whitespace().collect::<Vec<_>>(), ["0", "1", "2", "3"]);
}

#[test]
fn what_a_person_releases_forces_and_is_refused_is_written_down_with_the_reason() {
    let env = TestEnv::new(Lock::DynamoDb, "true");
    let mut info: Value =
        serde_json::from_str(&lock_json("33333333-3333-4444-5555-666666666666", &env.path())).unwrap();
    info["Who"] = "anna\u{1b}[31m@elsewhere".into();
    let text = info.to_string();
    env.put_lock(&text);
    assert_eq!(locks(&env, &["release", "--yes"]).code(), Some(1));
    let forced = locks(&env, &["release", "--force", &id_of(&text), "--reason", "she said so"]);
    assert_eq!(forced.code(), Some(0), "{}", env.dump(&forced));
    let events = history(&env);
    let seen: Vec<_> =
        events.iter().map(|event| (event["event"].as_str().unwrap(), event["reason"].as_str())).collect();
    assert_eq!(seen, [("refused", None), ("forced", Some("she said so"))]);
    let shown = locks(&env, &["history"]);
    assert!(shown.out.contains("forced") && shown.out.contains("she said so"), "{}", shown.out);
    assert!(
        shown.out.chars().all(|character| character == '\n' || (' '..='~').contains(&character)),
        "{:?}",
        shown.out
    );
}

#[test]
fn a_history_is_filtered_by_time_and_by_path() {
    let env = TestEnv::new(Lock::DynamoDb, "true");
    let other = format!("{}/dir/prod.tfstate.old", env.bucket);
    for (path, id) in [(env.path(), "1"), (other.clone(), "2")] {
        let text = lock_json(&format!("{id}5555555-3333-4444-5555-666666666666"), &path);
        crate::support::cloud::cloud().put_item(&env.table, &path, &text);
        let place = ["--table", &env.table, "--region", "us-east-1", &path];
        let end = locks(&env, &[&["release", "--force", &id_of(&text)], &place[..]].concat());
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    }
    let shown = |words: &[&str]| -> Vec<String> {
        let end = locks(&env, &[&["history", "--json"], words].concat());
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        super::locks_list::assert_fits(&env, "history", &end.out);
        let all: Value = serde_json::from_str(&end.out).unwrap();
        all["events"].as_array().unwrap().iter().map(|event| event["path"].as_str().unwrap().to_owned()).collect()
    };
    let both = [env.path(), other];
    assert_eq!(shown(&[]), both);
    assert_eq!(shown(&["--path", &env.path()]), both[..1]);
    assert_eq!(shown(&["--path", &env.bucket, "--since", "1h"]), both);
    assert_eq!(shown(&["--path", &format!("{}/dir/", env.bucket), "--since", "2020-01-01"]), both);
    assert!(shown(&["--since", "2100-01-01T00:00:00Z"]).is_empty());
    assert!(shown(&["--path", "no-such-bucket"]).is_empty());
    let end = locks(&env, &["history", "--path", &env.path()]);
    assert_eq!(end.out.lines().count(), 1, "{}", end.out);
    let end = locks(&env, &["history", "--since", "2026"]);
    assert!(end.code() == Some(1) && end.err.contains("2026-11-27T08:00:00Z"), "{}", end.err);
    // For example, of a variable that is not set.
    let end = locks(&env, &["history", "--path", ""]);
    assert!(end.code() == Some(1) && end.err.contains("--path"), "{}", env.dump(&end));
}

/// The holder has a name that would be a script in a page.
#[test]
fn a_history_becomes_one_page_that_runs_no_script() {
    let env = TestEnv::new(Lock::DynamoDb, "true");
    let mut info: Value =
        serde_json::from_str(&lock_json("66666666-3333-4444-5555-666666666666", &env.path())).unwrap();
    info["Who"] = "<script>alert(1)</script>\u{202e}".into();
    let text = info.to_string();
    env.put_lock(&text);
    let forced = locks(&env, &["release", "--force", &id_of(&text), "--reason", "</td><img src=x>"]);
    assert_eq!(forced.code(), Some(0), "{}", env.dump(&forced));
    let end = locks(&env, &["history", "--html", "page.html", "--since", "1h"]);
    assert_eq!((end.code(), end.out.as_str()), (Some(0), "wrote page.html\n"), "{}", env.dump(&end));
    let page = env.read("page.html");
    assert_eq!(std::fs::metadata(env.directory.join("page.html")).unwrap().mode() & 0o777, 0o600);
    let path = env.path();
    for expected in [&path, "&lt;script&gt;alert(1)", "&lt;/td&gt;&lt;img", "<b>1</b> forced", "Only events since"] {
        assert!(page.contains(expected), "{expected} {page}");
    }
    assert!(!page.contains("<script") && !page.contains("<img") && !page.contains('\u{202e}'), "{page}");
    let end = locks(&env, &["history", "--html", "-"]);
    assert!(end.out.starts_with("<!DOCTYPE html>") && end.out.ends_with("</html>\n"), "{}", end.out);
    let end = locks(&env, &["history", "--html", "no-such-directory/page.html"]);
    assert_eq!(end.code(), Some(1));
    assert!(end.err.contains("could not write no-such-directory/page.html: No such file"), "{}", end.err);
    assert_eq!(locks(&env, &["history", "--html", "page.html", "--json"]).code(), Some(1));
}

#[test]
fn a_dry_run_is_no_event() {
    let env = TestEnv::new(Lock::DynamoDb, "true");
    let text = lock_json("33333333-3333-4444-5555-666666666666", &env.path());
    env.put_lock(&text);
    let _ = locks(&env, &["release", "--dry-run", "--force", &id_of(&text)]);
    assert!(history(&env).is_empty());
    env.assert_locked();
}

/// A command that hangs, fails or does not exist: the run ends as without it, and the reader of its output is not
/// delayed.
#[test]
fn a_command_that_hangs_delays_nothing_and_one_that_fails_is_nobodys_business() {
    let mut env = TestEnv::new(Lock::File, WAITS);
    told_by(
        &mut env,
        "touch told.began; trap '' TERM INT HUP; while ! test -e told.go; do sleep 0.05; done; touch told.ended",
    );
    // Run::wait reads stdout and stderr to their ends, so a command that had inherited them would delay it.
    let end = killed(&env);
    assert_eq!(end.signal(), Some(9), "{}", env.dump(&end));
    env.wait_for_file("told.began");
    assert!(!env.exists("told.ended"));
    env.write("told.go", "");
    env.wait_for_file("told.ended");
    for (command, failure) in [("exit 7", "exit status: 7"), ("kill -9 $$", "")] {
        let mut env = TestEnv::new(Lock::File, WAITS);
        told_by(&mut env, command);
        assert!(killed(&env).err.contains("released the lock"));
        env.wait_for_trace(&format!("TFW_ON_EVENT failed: {failure}"));
    }
    let mut env = TestEnv::new(Lock::File, WAITS);
    env.set("TFW_ON_EVENT", "/nonexistent/command");
    let end = killed(&env);
    assert!(end.err.contains("released the lock") && !end.err.contains("nonexistent"), "{}", end.err);
}

#[test]
fn the_file_is_for_its_owner_alone_and_bare_terraform_writes_none() {
    let env = TestEnv::new(Lock::File, WAITS);
    killed(&env);
    let find = Run::start({
        let mut find = env.command("find");
        find.arg(env.directory.parent().unwrap()).args(["-name", "history.jsonl"]);
        find
    });
    let found = find.wait();
    let path = found.out.lines().next().unwrap_or_else(|| panic!("no history: {}", found.err));
    assert_eq!(std::fs::metadata(path).unwrap().mode() & 0o777, 0o600);
    let bare = TestEnv::new(Lock::File, WAITS);
    let run = bare.start_apply(Subject::Bare);
    run.kill_terraform();
    run.wait();
    assert!(history(&bare).is_empty());
}

/// `tf` does not wait for the command, and the command does not run forever: its whole group is killed.
#[test]
fn a_command_that_is_told_and_does_not_end_is_killed_after_its_time() {
    let mut env = TestEnv::new(Lock::File, WAITS);
    told_by(&mut env, "trap '' TERM INT HUP; sleep 1000 & echo $$ $! > pids.new; mv pids.new pids; wait; sleep 1000");
    killed(&env);
    env.wait_for_file("pids");
    let begun = std::time::Instant::now();
    let pids: Vec<i32> = env.read("pids").split_whitespace().map(|pid| pid.parse().unwrap()).collect();
    let are_gone =
        || pids.iter().all(|pid| crate::support::processes::is_gone(nix::unistd::Pid::from_raw(*pid))).then_some(());
    // 20 s are less than the command's time limit. The wait below is long enough for the rest.
    while begun.elapsed() < std::time::Duration::from_secs(20) {
        assert!(are_gone().is_none(), "after {:?}", begun.elapsed());
        std::thread::sleep(std::time::Duration::from_millis(500));
    }
    wait_for("the end of the command", are_gone, || format!("{pids:?}"));
}
