//! Locations without a lock, and locations where something that is not a lock makes terraform fail: the messages about
//! them are true, and the command in the message works.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use super::locks_release::locks;
use crate::support::cloud::cloud;
use crate::support::process::Ended;
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::terminal::Terminal;
use crate::support::test_env::{APPLY, WAITS, lock_json};
use crate::support::{Lock, Subject, TestEnv};

/// Runs in a shell the last command that a message says to type.
#[track_caller]
fn type_what_is_said(env: &TestEnv, said: &str) -> Ended {
    let command = said.rsplit_once("type: ").unwrap_or_else(|| panic!("nothing to type: {said}")).1;
    let command = command.lines().next().unwrap().trim();
    env.run_in_shell(command)
}

/// Returns every line of `tf` in the messages of a run.
fn ours(end: &Ended) -> Vec<&str> {
    end.err.lines().filter(|line| line.starts_with("tf:")).collect()
}

/// A misspelt table, a table with another key, and a table that refuses: terraform reports the error, and there is
/// nothing to add, to keep or to retry.
#[test]
fn a_lock_that_was_refused_for_good_leaves_no_record_and_no_advice() {
    for (name, both) in
        [("misspelt", false), ("misspelt", true), ("other key", false), ("denied", false), ("denied", true)]
    {
        let mut env = TestEnv::empty(if both { Lock::Both } else { Lock::DynamoDb });
        env.write_main("", "true");
        env.init();
        match name {
            "misspelt" => drop(cloud().dynamodb("DeleteTable", &json!({ "TableName": env.table }))),
            "other key" => {
                cloud().give_another_key(&env.table);
            }
            _ => {}
        }
        let denying = Proxy::start(cloud().port, move |request| {
            let asked = request.header("x-amz-target").unwrap_or_default();
            if name == "denied" && (asked.ends_with(".PutItem") || asked.ends_with(".GetItem")) {
                return ProxyAction::Answer(request.denied());
            }
            ProxyAction::Pass
        });
        env.set("AWS_ENDPOINT_URL_DYNAMODB", format!("http://127.0.0.1:{}", denying.port));
        for round in 0..2 {
            let end = env.run(Subject::Tf, &APPLY);
            assert_eq!(end.code(), Some(1), "{name} {both} {round}: {}", env.dump(&end));
            assert!(end.err.contains("Error acquiring the state lock"), "{name} {both} {round}: {}", env.dump(&end));
            assert!(ours(&end).is_empty(), "{name} {both} {round}: {}", env.dump(&end));
        }
        let recovered = locks(&env, &["recover"]);
        assert_eq!(
            (recovered.code(), recovered.err.as_str()),
            (Some(0), ""),
            "{name} {both}: {}",
            env.dump(&recovered)
        );
        assert!(recovered.out.is_empty(), "{name} {both}: {}", recovered.out);
        // Nothing is reported about it after the mistake is corrected.
        env.set("AWS_ENDPOINT_URL_DYNAMODB", format!("http://127.0.0.1:{}", cloud().port));
        if name != "denied" {
            cloud().dynamodb("DeleteTable", &json!({ "TableName": env.table }));
            cloud().create_table(&env.table);
        }
        let end = env.run(Subject::Tf, &APPLY);
        assert_eq!(end.code(), Some(0), "{name} {both}: {}", env.dump(&end));
        assert!(ours(&end).is_empty(), "{name} {both}: {}", env.dump(&end));
        env.assert_unlocked();
    }
}

/// The run itself destroys the table, and its lock with it.
#[test]
fn a_lock_whose_table_the_run_has_destroyed_is_gone() {
    let env = TestEnv::new(Lock::DynamoDb, WAITS);
    let run = env.start_apply(Subject::Tf);
    // A run that gets no lease says so.
    env.wait_for_lease();
    cloud().dynamodb("DeleteTable", &json!({ "TableName": env.table }));
    env.unblock();
    let end = run.wait();
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(ours(&end).is_empty(), "{}", env.dump(&end));
    let recovered = locks(&env, &["recover"]);
    assert_eq!((recovered.code(), recovered.out.as_str()), (Some(0), ""), "{}", env.dump(&recovered));
}

/// A lock that a person has put there by hand.
#[test]
fn a_lock_with_any_id_is_named_without_holes_and_released_by_what_is_shown() {
    let long = "x".repeat(300);
    for id in [long.as_str(), "maintenance-4711", "it's $HOME; \u{1b}[31m", "-rf", "a b", "寿司"] {
        for lock in [Lock::DynamoDb, Lock::File] {
            let env = TestEnv::new(lock, "true");
            env.put_lock(&json!({ "ID": id }).to_string());
            let end = env.run(Subject::Tf, &["plan", "-no-color"]);
            assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
            let said = ours(&end).join("\n");
            assert!(said.contains("held by an unknown holder, ID"), "{said}");
            assert!(!said.contains("  "), "{said}");
            let shown = type_what_is_said(&env, &end.err);
            assert_eq!(shown.code(), Some(0), "{id:?}: {}\n{}", end.err, env.dump(&shown));
            assert!(shown.out.contains("holder is"), "{id:?}: {}", env.dump(&shown));
            let released = type_what_is_said(&env, &shown.out);
            assert_eq!(released.code(), Some(0), "{id:?}: {}\n{}", shown.out, env.dump(&released));
            env.assert_unlocked();
        }
    }
}

fn junk() -> [(Lock, Option<Value>, &'static str); 7] {
    [
        (Lock::DynamoDb, Some(json!({})), "an item without Info"),
        (Lock::DynamoDb, Some(json!({ "Info": { "S": "" } })), "an item with an empty Info"),
        (Lock::DynamoDb, Some(json!({ "Info": { "N": "7" } })), "an item whose Info is not text"),
        (Lock::DynamoDb, Some(json!({ "Info": { "S": "by hand, until Monday" } })), "bytes that are not a lock"),
        (Lock::File, None, "an empty object"),
        (Lock::Both, Some(json!({})), "an item without Info"),
        (Lock::Both, None, "an empty object"),
    ]
}

/// Puts an item with these attributes in the place of the lock, or an empty object.
fn put(env: &TestEnv, item: Option<&Value>) {
    match item {
        Some(item) => {
            let mut item = item.clone();
            item["LockID"] = json!({ "S": env.path() });
            cloud().dynamodb("PutItem", &json!({ "TableName": env.table, "Item": item }));
        }
        None => drop(cloud().s3("PUT", &format!("{}.tflock", env.path()), b"")),
    }
}

fn is_there(env: &TestEnv, item: Option<&Value>) -> bool {
    match item {
        Some(_) => {
            let key = json!({ "LockID": { "S": env.path() } });
            cloud().dynamodb("GetItem", &json!({ "TableName": env.table, "Key": key }))["Item"].is_object()
        }
        None => cloud().object(&format!("{}.tflock", env.path())).is_some(),
    }
}

#[test]
fn what_keeps_everybody_out_and_is_no_lock_is_named_counted_and_released_after_a_question() {
    for (lock, item, what) in junk() {
        let env = TestEnv::new(lock, "true");
        put(&env, item.as_ref());
        let end = env.run(Subject::Tf, &["plan", "-no-color"]);
        assert_eq!(end.code(), Some(1), "{what}: {}", env.dump(&end));
        assert!(
            end.err.contains("every run is refused by something that is not a lock") && end.err.contains(what),
            "{what}: {}",
            env.dump(&end)
        );
        for words in [&[][..], &["audit", "--older-than", "2h"], &["doctor"], &["show"], &["release", "--dry-run"]] {
            let end = locks(&env, words);
            assert_eq!(end.code(), Some(2), "{what} {words:?}: {}", env.dump(&end));
        }
        let doctor = locks(&env, &["doctor"]);
        assert!(
            doctor.out.contains("WRONG  lock: its place holds something that is not a lock"),
            "{what}: {}",
            doctor.out
        );
        // There is no terminal on which to ask.
        let refused = type_what_is_said(&env, &end.err);
        assert_eq!(refused.code(), Some(1), "{what}: {}", env.dump(&refused));
        assert!(is_there(&env, item.as_ref()), "{what}: {}", env.dump(&refused));
        let command = end.err.rsplit_once("type: ").unwrap().1.trim().to_owned();
        for (answer, gone) in [("no", false), ("yes", true)] {
            let mut shell = env.command("sh");
            shell.args(["-c", &command]);
            let mut terminal = Terminal::start(shell);
            terminal.wait_for("Delete it?");
            terminal.type_in(&format!("{answer}\r"));
            assert_eq!(terminal.wait().code(), Some(i32::from(!gone)), "{what}: {}", terminal.whole_screen());
            assert_eq!(!is_there(&env, item.as_ref()), gone, "{what} {answer}: {}", terminal.whole_screen());
        }
        let end = env.run(Subject::Tf, &["plan", "-no-color"]);
        assert_eq!(end.code(), Some(0), "{what}: {}", env.dump(&end));
    }
}

#[test]
fn what_changed_while_a_person_thought_is_left_alone_though_it_was_no_lock() {
    for (lock, item, what) in junk() {
        let env = TestEnv::new(lock, "true");
        put(&env, item.as_ref());
        let mut command = env.command(env.bin().join("tf"));
        command.args(["locks", "release"]);
        let mut terminal = Terminal::start(command);
        terminal.wait_for("Delete it?");
        let other = lock_json("11111111-2222-3333-4444-555555555555", &env.path());
        match item {
            Some(_) => cloud().put_item(&env.table, &env.path(), &other),
            None => drop(cloud().s3("PUT", &format!("{}.tflock", env.path()), other.as_bytes())),
        }
        terminal.type_in("yes\r");
        assert_eq!(terminal.wait().code(), Some(1), "{what}: {}", terminal.whole_screen());
        assert!(env.locks().contains(&other), "{what}: {}", terminal.whole_screen());
    }
}

/// There is a valid lock too: it is released, terraform still cannot lock, and that is reported.
#[test]
fn what_is_no_lock_beside_a_lock_is_not_called_nothing() {
    for item in [Some(json!({})), None] {
        let env = TestEnv::new(Lock::Both, "true");
        let mut lock: Value =
            serde_json::from_str(&lock_json("22222222-3333-4444-5555-666666666666", &env.path())).unwrap();
        lock["Who"] = "anna@elsewhere".into();
        env.put_lock(&lock.to_string());
        put(&env, item.as_ref());
        let listed = locks(&env, &[]);
        assert_eq!(listed.code(), Some(2), "{}", env.dump(&listed));
        assert!(!listed.out.contains("there is no item") && !listed.out.contains("no .tflock"), "{}", listed.out);
        assert!(listed.out.contains("is not a lock, so every run is refused"), "{}", listed.out);
        let released = locks(&env, &["release", "--force", "22222222-3333-4444-5555-666666666666"]);
        assert_eq!(released.code(), Some(1), "{}", env.dump(&released));
        assert!(
            released.err.contains("every run is refused by something that is not a lock"),
            "{}",
            env.dump(&released)
        );
        let again = locks(&env, &["release", "--yes"]);
        assert_eq!(again.code(), Some(0), "{}", env.dump(&again));
        env.assert_unlocked();
        assert!(!is_there(&env, item.as_ref()));
    }
}

/// The lock belongs to another run, and is not released.
#[test]
fn the_command_that_removes_what_is_no_lock_leaves_a_lock_beside_it_alone() {
    let words = [&["plan", "-no-color"][..], &["locks", "show"]];
    for (item, words) in [Some(json!({})), None].into_iter().flat_map(|item| words.map(|words| (item.clone(), words))) {
        let env = TestEnv::new(Lock::Both, "true");
        let other = env.lock_of_another();
        put(&env, item.as_ref());
        let end = env.run(Subject::Tf, words);
        let said = end.out.clone() + &end.err;
        let said =
            ["every run is refused by", "every run is refused because"].iter().find_map(|text| said.split_once(text));
        let said = said.unwrap_or_else(|| panic!("{words:?}: it is not named: {}", env.dump(&end))).1;
        let command = said.split_once("type: ").unwrap().1.lines().next().unwrap();
        let removed = env.run_in_shell(&format!("{command} --yes"));
        assert_eq!(removed.code(), Some(0), "{command}: {}", env.dump(&removed));
        assert_eq!(env.locks(), [other], "{}", env.dump(&removed));
    }
}

/// A state matters more than any lock, and a digest is not a lock.
#[test]
fn neither_a_state_nor_a_digest_is_removed_as_what_is_no_lock() {
    let env = TestEnv::new(Lock::Both, "true");
    assert_eq!(env.run(Subject::Bare, &APPLY).code(), Some(0));
    let digest = format!("{}-md5", env.path());
    let end = locks(&env, &["release", "--yes", "--region", "us-east-1", "--table", &env.table, &digest]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(end.err.contains("the digest of a state"), "{}", env.dump(&end));
    let key = json!({ "LockID": { "S": digest } });
    assert!(cloud().dynamodb("GetItem", &json!({ "TableName": env.table, "Key": key }))["Item"].is_object());
    let state = env.state().expect("a state");
    let object = format!("{}.tflock", env.path());
    cloud().s3("PUT", &object, state.as_bytes());
    let end = locks(&env, &["release", "--yes"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(end.err.contains("is a terraform state"), "{}", env.dump(&end));
    assert!(cloud().object(&object).is_some());
    // An object that is too large for a lock is not called empty.
    cloud().s3("PUT", &object, &vec![b'x'; (1 << 20) + 1]);
    let end = locks(&env, &["list"]);
    assert!(end.out.contains("an object of 1048577 bytes, too large for a lock"), "{}", env.dump(&end));
}

/// Terraform's force-unlock does not work in a workspace that has no state yet.
#[test]
fn the_command_that_is_named_releases_the_lock_that_a_new_workspace_left() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let denies = Arc::new(AtomicBool::new(true));
    let flag = Arc::clone(&denies);
    let proxy = Proxy::start(cloud().port, move |request| {
        if request.start.starts_with("PUT ") && request.start.contains("foo/") {
            return ProxyAction::Hold;
        }
        if flag.load(Ordering::SeqCst) && request.is_ours() && request.asks_for("DeleteItem") {
            return ProxyAction::Answer(request.denied());
        }
        ProxyAction::Pass
    });
    env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    let run = env.start(Subject::Tf, &["workspace", "new", "-no-color", "foo"]);
    proxy.wait_until_held();
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("was not released"), "{}", env.dump(&end));
    denies.store(false, Ordering::SeqCst);
    let key = "env:/foo/dir/prod.tfstate";
    assert_eq!(env.locks_at(key).len(), 1);
    let released = type_what_is_said(&env, &end.err);
    assert_eq!(released.code(), Some(0), "{}\n{}", end.err, env.dump(&released));
    assert!(env.locks_at(key).is_empty(), "{}", env.dump(&released));
}

/// The environment has an endpoint at which nothing answers, so only the settings of the backend reach the table.
#[test]
fn without_a_lock_the_command_that_is_named_lists_the_table_of_the_backend() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let path = format!("{}/env:/foo/dir/prod.tfstate", env.bucket);
    let id = "22222222-3333-4444-5555-666666666666";
    cloud().put_item(&env.table, &path, &lock_json(id, &path));
    env.set("AWS_ENDPOINT_URL", "http://127.0.0.1:9");
    let url = format!("http://127.0.0.1:{}", cloud().port);
    let file = ".terraform/terraform.tfstate";
    let mut state: Value = serde_json::from_str(&env.read(file)).unwrap();
    let config = &mut state["backend"]["config"];
    config["endpoints"] = json!({ "dynamodb": url, "s3": url });
    env.write(file, &state.to_string());
    let end = locks(&env, &["show"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(end.err.contains(&format!("--endpoint-url {url}")), "{}", env.dump(&end));
    let listed = type_what_is_said(&env, &end.err);
    assert!(listed.out.contains(id), "{}\n{}", end.err, env.dump(&listed));

    // No option expresses these settings.
    let config = &mut state["backend"]["config"];
    (config["access_key"], config["secret_key"]) = (json!("a"), json!("s"));
    env.write(file, &state.to_string());
    let end = locks(&env, &["show"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(end.err.contains("another account: access_key, secret_key\n"), "{}", env.dump(&end));
    let listed = type_what_is_said(&env, &end.err.replace("WORKSPACE=WORKSPACE", "WORKSPACE=foo"));
    assert!(listed.out.contains(id), "{}\n{}", end.err, env.dump(&listed));
}

/// The workspace is still to be created, and nothing selects it yet.
fn the_command_that_is_named_finds_the_lock_of_a_workspace_that_has_no_state(lock: Lock) {
    let env = TestEnv::new(lock, "true");
    let key = "env:/foo/dir/prod.tfstate";
    let path = format!("{}/{key}", env.bucket);
    let mut info: Value = serde_json::from_str(&lock_json("22222222-3333-4444-5555-666666666666", &path)).unwrap();
    info["Who"] = "anna@elsewhere".into();
    if lock != Lock::File {
        cloud().put_item(&env.table, &path, &info.to_string());
    }
    if lock != Lock::DynamoDb {
        cloud().s3("PUT", &format!("{path}.tflock"), info.to_string().as_bytes());
    }
    let end = env.run(Subject::Tf, &["workspace", "new", "-no-color", "foo"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(end.err.contains("TF_WORKSPACE=foo tf locks show"), "{}", env.dump(&end));
    let shown = type_what_is_said(&env, &end.err);
    assert_eq!(shown.code(), Some(0), "{}\n{}", end.err, env.dump(&shown));
    assert!(shown.out.contains("TF_WORKSPACE=foo tf locks release"), "{}", shown.out);
    let released = type_what_is_said(&env, &shown.out);
    assert_eq!(released.code(), Some(0), "{}\n{}", shown.out, env.dump(&released));
    assert!(env.locks_at(key).is_empty(), "{}", env.dump(&released));
}
for_each_lock!(the_command_that_is_named_finds_the_lock_of_a_workspace_that_has_no_state);

/// The command also works from another directory, even if its name must be quoted in a shell.
#[test]
fn the_command_that_is_named_works_from_where_terraform_was_called() {
    let env = TestEnv::new(Lock::File, "true");
    let moved = env.directory.join("it's a dir");
    fs::create_dir(&moved).unwrap();
    fs::rename(env.directory.join("main.tf"), moved.join("main.tf")).unwrap();
    fs::rename(env.directory.join(".terraform"), moved.join(".terraform")).unwrap();
    let mut info: Value =
        serde_json::from_str(&lock_json("22222222-3333-4444-5555-666666666666", &env.path())).unwrap();
    info["Who"] = "anna@elsewhere".into();
    env.put_lock(&info.to_string());
    let end = env.run(Subject::Tf, &["-chdir=it's a dir", "plan", "-no-color"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    let shown = type_what_is_said(&env, &end.err);
    assert_eq!(shown.code(), Some(0), "{}\n{}", end.err, env.dump(&shown));
    let released = type_what_is_said(&env, &shown.out);
    assert_eq!(released.code(), Some(0), "{}\n{}", shown.out, env.dump(&released));
    env.assert_unlocked();
}

#[test]
fn a_lock_from_the_future_is_said_to_be_that_and_is_stale_for_an_audit() {
    let env = TestEnv::new(Lock::DynamoDb, "true");
    let mut info: Value =
        serde_json::from_str(&lock_json("22222222-3333-4444-5555-666666666666", &env.path())).unwrap();
    info["Who"] = "anna@elsewhere".into();
    for (ahead, stale) in [(8 * 3600, true), (20, false)] {
        info["Created"] = (jiff::Timestamp::now() + jiff::SignedDuration::from_secs(ahead)).to_string().into();
        env.put_lock(&info.to_string());
        let end = env.run(Subject::Tf, &["plan", "-no-color"]);
        assert_eq!(end.err.contains("ahead of this host's clock"), stale, "{}", env.dump(&end));
        let audit = locks(&env, &["audit", "--older-than", "2h"]);
        assert_eq!(audit.code(), Some(if stale { 2 } else { 0 }), "{}", env.dump(&audit));
    }
}

/// A user who may not delete the lock cannot delete it with another command either.
#[test]
fn where_the_policy_forbids_the_delete_the_advice_is_for_somebody_who_may() {
    let mut env = TestEnv::new(Lock::DynamoDb, WAITS);
    let denying = Proxy::start(cloud().port, |request| {
        if request.header("x-amz-target").is_some_and(|target| target.ends_with(".DeleteItem")) {
            return ProxyAction::Answer(request.denied());
        }
        ProxyAction::Pass
    });
    env.set("AWS_ENDPOINT_URL_DYNAMODB", format!("http://127.0.0.1:{}", denying.port));
    let run = env.start_apply(Subject::Tf);
    run.kill_terraform();
    let end = run.wait();
    assert!(
        end.err
            .contains("once no terraform is using this state, with credentials that allow dynamodb:DeleteItem, type: "),
        "{}",
        env.dump(&end)
    );
    env.assert_locked();
    let recovered = locks(&env, &["recover"]);
    assert_eq!(recovered.code(), Some(2), "{}", env.dump(&recovered));
    assert!(recovered.out.contains("with credentials that allow dynamodb:DeleteItem"), "{}", env.dump(&recovered));
    // With the permission, it works.
    env.set("AWS_ENDPOINT_URL_DYNAMODB", format!("http://127.0.0.1:{}", cloud().port));
    let command = end.err.rsplit_once("type: ").unwrap().1.trim().replace("force-unlock", "force-unlock -force");
    let unlocked = env.run_in_shell(&command);
    assert_eq!(unlocked.code(), Some(0), "{command}: {}", env.dump(&unlocked));
    env.assert_unlocked();
}

#[test]
fn a_digest_without_a_state_is_explained_and_mended_by_what_is_named() {
    let env = TestEnv::new(Lock::DynamoDb, "true");
    assert_eq!(env.run(Subject::Bare, &APPLY).code(), Some(0));
    cloud().s3("DELETE", &env.path(), b"");
    let end = env.run(Subject::Tf, &["plan", "-no-color"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(end.err.contains("but there is no state"), "{}", env.dump(&end));
    let doctor = locks(&env, &["doctor"]);
    assert_eq!(doctor.code(), Some(2), "{}", env.dump(&doctor));
    assert!(doctor.out.contains("--fix-digest"), "{}", doctor.out);
    let asked = type_what_is_said(&env, &end.err);
    assert!(asked.code() == Some(1) && asked.err.contains("--yes"), "{}", env.dump(&asked));
    let fixed = locks(&env, &["doctor", "--fix-digest", "default", "--yes"]);
    assert_eq!(fixed.code(), Some(0), "{}", env.dump(&fixed));
    assert!(fixed.out.contains("deleted the digest"), "{}", env.dump(&fixed));
    let end = env.run(Subject::Tf, &["plan", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert!(ours(&end).is_empty(), "{}", env.dump(&end));
}

/// Terraform waits for ten seconds and reports what is wrong, but not which command helps.
#[test]
fn a_checksum_error_of_terraforms_is_followed_by_what_mends_it() {
    let env = TestEnv::new(Lock::Both, "true");
    assert_eq!(env.run(Subject::Bare, &APPLY).code(), Some(0));
    let item = json!({ "LockID": { "S": format!("{}-md5", env.path()) }, "Digest": { "S": "d41d8cd98f00b204e9800998ecf8427e" } });
    cloud().dynamodb("PutItem", &json!({ "TableName": env.table, "Item": item }));
    let end = env.run(Subject::Tf, &["plan", "-no-color"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    let said = ours(&end).join("\n");
    assert!(
        said.contains("the state's digest does not match") && said.contains("--fix-digest default"),
        "{}",
        env.dump(&end)
    );
    let fixed = locks(&env, &["doctor", "--fix-digest", "default", "--yes"]);
    assert_eq!(fixed.code(), Some(0), "{}", env.dump(&fixed));
    let end = env.run(Subject::Tf, &["plan", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
}

#[test]
fn a_directory_with_a_local_state_is_well() {
    let env = TestEnv::empty(Lock::File);
    env.write("main.tf", "resource \"terraform_data\" \"a\" {}\n");
    for initialised in [false, true] {
        if initialised {
            env.init();
        }
        let end = locks(&env, &["doctor"]);
        assert_eq!(end.code(), Some(0), "{initialised}: {}", env.dump(&end));
        assert!(end.out.contains("ok     backend: none: the state is a local file"), "{initialised}: {}", end.out);
    }
    // An uninitialized directory is reported.
    env.write_main("", "true");
    let end = locks(&env, &["doctor"]);
    assert!(end.code() == Some(2) && end.out.contains("terraform init"), "{}", env.dump(&end));
}
