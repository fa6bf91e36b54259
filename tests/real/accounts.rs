//! A lock that is not seen counts as released only in the account of its run, because a later `tf` may have credentials
//! of another account. If the lock is gone there, nothing is reported.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

use super::given_back::{is_dynamodb, through};
use super::leased::expiry;
use super::reached_alike::to_services;
use super::survived::{assert_nothing_left, records};
use crate::support::authority::Authority;
use crate::support::cloud::cloud;
use crate::support::http::Message;
use crate::support::process::{Run, terraform_below};
use crate::support::processes::{kill_all, named, wait_until_ours_are_gone};
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::test_env::{APPLY, UNSET, WAITS, id_of};
use crate::support::{Ended, Lock, Subject, TestEnv, wait_for};

/// Account IDs, which are also access keys in MiniStack.
const A: &str = "111111111111";
const B: &str = "222222222222";

/// An access key that does not contain its account.
const OLD: &str = "test";

const SEEN_BY_OTHERS: &str = "not found with the current credentials";

/// Makes `profile` the default profile.
fn log_in(env: &TestEnv, profile: &str) {
    let directory = env.directory.parent().unwrap().join("home/.aws");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join("credentials"), format!("[default]\n{profile}\n")).unwrap();
}

fn key(key: &str) -> String {
    format!("aws_access_key_id = {key}\naws_secret_access_key = s")
}

/// Returns a profile that does not show its account.
fn process(env: &TestEnv) -> String {
    let gives = env.directory.join("gives");
    let credentials = r#"{"Version":1,"AccessKeyId":"test","SecretAccessKey":"s"}"#;
    fs::write(&gives, format!("#!/bin/sh\nprintf '{credentials}'\n")).unwrap();
    fs::set_permissions(&gives, fs::Permissions::from_mode(0o755)).unwrap();
    format!("credential_process = {}", gives.display())
}

/// A store in which each account has its own buckets, as in many that are not from AWS. B has an empty bucket with the
/// same name. In MiniStack and in AWS, a name exists only once.
fn a_store_that_keeps_accounts_apart(env: &mut TestEnv) -> Proxy {
    const ABSENT: &str = "<?xml version=\"1.0\"?><Error><Code>NoSuchKey</Code><Message>no</Message></Error>";
    let proxy = Proxy::start(cloud().port, |request: &Message| {
        let is_bs = request.header("authorization").is_some_and(|text| text.contains(&format!("Credential={B}/")));
        let is_s3 = request.header("authorization").is_some_and(|text| text.contains("/s3/"));
        if is_bs && is_s3 { ProxyAction::Answer(Message::answer("404 Not Found", ABSENT)) } else { ProxyAction::Pass }
    });
    env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    proxy
}

/// Returns a [`TestEnv`] whose credentials come from the default profile, `profile`, of the account `owner`.
fn test_env(lock: Lock, owner: &str, profile: &str) -> TestEnv {
    let mut env = TestEnv::empty(lock);
    for name in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"] {
        env.set(name, UNSET);
    }
    if owner != OLD {
        assert_eq!(cloud().s3("DELETE", &env.bucket, b"").status(), 204);
        assert_eq!(cloud().s3_as(owner, "PUT", &env.bucket, b"").status(), 200);
    }
    for account in [A, B] {
        cloud().create_table_as(account, &env.table);
    }
    log_in(&env, profile);
    env.write_main("", WAITS);
    env.init();
    env
}

/// Returns the parts of the lock that exist in `account`.
fn locks(env: &TestEnv, account: &str) -> Vec<String> {
    let item = (env.lock != Lock::File).then(|| cloud().item_as(account, &env.table, &env.path())).flatten();
    let object = cloud().s3_as(account, "GET", &format!("{}.tflock", env.path()), b"");
    let object = (object.status() == 200 && env.lock != Lock::DynamoDb).then(|| object.text());
    item.into_iter().chain(object).collect()
}

/// Removes the lock by force, as `account`.
fn force_unlock(env: &TestEnv, account: &str) {
    let key = serde_json::json!({"TableName": env.table, "Key": {"LockID": {"S": env.path()}}});
    cloud().dynamodb_as(account, "DeleteItem", &key);
    cloud().s3_as(account, "DELETE", &format!("{}.tflock", env.path()), b"");
    assert!(locks(env, account).is_empty());
}

/// Starts an apply, and waits until its lock is in the journal. Returns the lock's ID too.
fn apply(env: &TestEnv, account: &str) -> (Run, String) {
    let run = env.start_apply(Subject::Tf);
    let held = locks(env, account);
    let id = id_of(held.first().expect("a lock"));
    let written = || {
        let mut texts = records(env).into_iter().map(|path| fs::read_to_string(path).unwrap_or_default());
        texts.any(|text| text.contains(&id)).then_some(())
    };
    wait_for("the journal", written, || env.trace());
    (run, id)
}

/// Kills terraform alone, with `tf`, or with every other process. Returns the output of `tf`; `None` if it was killed.
fn end(env: &TestEnv, run: Run, who: Who) -> Option<Ended> {
    let end = match who {
        Who::Terraform => {
            run.kill_terraform();
            Some(run.wait())
        }
        Who::TfToo => {
            for pid in [terraform_below(run.pid()), run.pid()] {
                kill(pid, Signal::SIGKILL).unwrap();
            }
            run.wait();
            wait_until_ours_are_gone(env);
            None
        }
        Who::Everybody => {
            kill_all(env);
            drop(run);
            None
        }
    };
    let _ = fs::remove_file(env.directory.join("began"));
    end
}

/// Runs in another directory. The SDK finds the shell for a `credential_process` on PATH.
fn recover(env: &TestEnv, more: &[&str]) -> Ended {
    let mut command = env.command(env.bin().join("tf"));
    command.args(["locks", "recover"]).args(more).current_dir("/");
    Run::start(command).wait()
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Terraform,
    TfToo,
    Everybody,
}

impl Who {
    const ALL: [Self; 3] = [Self::Terraform, Self::TfToo, Self::Everybody];
}

#[test]
fn a_lock_that_another_accounts_profile_does_not_see_is_not_gone() {
    for lock in [Lock::DynamoDb, Lock::File] {
        for who in Who::ALL {
            let mut env = test_env(lock, A, &key(A));
            let _proxy = a_store_that_keeps_accounts_apart(&mut env);
            let (run, id) = apply(&env, A);
            log_in(&env, &key(B));
            if let Some(end) = end(&env, run, who) {
                assert!(end.err.contains(SEEN_BY_OTHERS), "{lock:?}: {}", env.dump(&end));
                assert!(end.err.contains(&format!("credentials of account {A}")), "{lock:?}: {}", env.dump(&end));
                assert!(end.err.contains(&format!("--forget {id}")), "{lock:?}: {}", env.dump(&end));
            }
            assert_eq!(locks(&env, A).len(), 1, "{lock:?} {who:?}");
            assert_eq!(records(&env).len(), 1, "{lock:?} {who:?}: {}", env.trace());
            for _ in 0..2 {
                let end = recover(&env, &[]);
                assert_eq!(end.code(), Some(2), "{lock:?} {who:?}: {}", env.dump(&end));
                assert!(end.out.contains(SEEN_BY_OTHERS), "{lock:?} {who:?}: {}", env.dump(&end));
                assert!(end.out.contains(&format!("credentials of account {A}")), "{}", env.dump(&end));
                assert_eq!(locks(&env, A).len(), 1, "{lock:?} {who:?}");
            }
            log_in(&env, &key(A));
            let end = recover(&env, &[]);
            assert_eq!(end.code(), Some(0), "{lock:?} {who:?}: {}", env.dump(&end));
            assert!(end.out.contains("released the lock"), "{lock:?} {who:?}: {}", env.dump(&end));
            assert!(locks(&env, A).is_empty(), "{lock:?} {who:?}");
            assert_nothing_left(&env);
        }
    }
}

/// Makes the credentials of a lease expire while the returned flag is set. The keeper then asks for new ones.
fn expiring(env: &mut TestEnv) -> (Proxy, Arc<AtomicBool>) {
    let has_expired = Arc::new(AtomicBool::new(false));
    let expired = Arc::clone(&has_expired);
    let proxy = through(env, move |request| {
        if is_dynamodb(request, "Item") && request.is_ours() && expired.load(Ordering::SeqCst) {
            expiry()
        } else {
            ProxyAction::Pass
        }
    });
    (proxy, has_expired)
}

/// Waits until the keeper has looked for the lock with the credentials of another account.
fn wait_until_not_seen(env: &TestEnv, before: usize) {
    let not_seen = || (env.trace().matches(SEEN_BY_OTHERS).count() > before).then_some(());
    wait_for("a look in the other account", not_seen, || env.trace());
}

/// A person logs in again, to the wrong account. The table there has the same name and no lock.
#[test]
fn a_run_does_not_lose_its_lease_because_another_accounts_profile_does_not_see_the_lock() {
    for is_stopped in [false, true] {
        let mut env = test_env(Lock::DynamoDb, A, &key(A));
        env.set("TFW_LEASE", "1m").set("TFW_CLOCK", "steady");
        let (_proxy, has_expired) = expiring(&mut env);
        let (run, _) = apply(&env, A);
        wait_for("a record", || record_as(&env, A), || env.trace());
        has_expired.store(true, Ordering::SeqCst);
        log_in(&env, &key(B));
        if is_stopped {
            kill(named(&env, "tf-fuse"), Signal::SIGKILL).unwrap();
            run.wait_for_err("terraform was stopped, because it is not certain that it still has its lock");
        }
        env.wait_for_trace("ExpiredTokenException: expired");
        has_expired.store(false, Ordering::SeqCst);
        wait_until_not_seen(&env, 1);
        assert_eq!(locks(&env, A).len(), 1, "{}", env.trace());
        log_in(&env, &key(A));
        if is_stopped {
            run.wait_for_err("the lease was renewed, and terraform goes on");
        }
        let last = record_as(&env, A).unwrap();
        wait_for("a renewal", || record_as(&env, A).filter(|now| *now != last), || env.trace());
        env.unblock();
        let end = run.wait();
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        assert!(!end.err.contains("somebody has") && !end.err.contains("asked to stop"), "{}", env.dump(&end));
        assert!(locks(&env, A).is_empty());
    }
}

/// The promise in the lock stays, so the run says so.
#[test]
fn a_promise_that_another_accounts_profile_does_not_see_does_not_count_as_withdrawn() {
    let mut env = test_env(Lock::DynamoDb, A, &key(A));
    env.set("TFW_LEASE", "5s").set("TFW_CLOCK", "steady").set("TFW_RELEASE", "never");
    let (run, _) = apply(&env, A);
    let record = wait_for("a record", || record_as(&env, A), || env.trace());
    assert_eq!(record["fence"]["S"], "stop", "{record}");
    log_in(&env, &key(B));
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("could not be withdrawn"), "{}", env.dump(&end));
    assert_eq!(record_as(&env, A).unwrap()["fence"]["S"], "stop", "{}", env.dump(&end));
}

/// Returns the record of the lock in `account`.
fn record_as(env: &TestEnv, account: &str) -> Option<Value> {
    let key = json!({"TableName": env.table, "Key": {"LockID": {"S": env.path()}}, "ConsistentRead": true});
    let item = cloud().dynamodb_as(account, "GetItem", &key);
    item["Item"]["tf"]["M"].as_object().map(|record| Value::Object(record.clone()))
}

/// The lock was removed by force in between. That is known, and nothing is reported.
#[test]
fn a_lock_that_is_gone_in_its_own_account_is_gone_without_a_word() {
    for (account, profile) in [(A, key(A)), (OLD, key(OLD))] {
        for who in Who::ALL {
            let env = test_env(Lock::Both, account, &profile);
            let (run, _) = apply(&env, account);
            force_unlock(&env, account);
            if let Some(end) = end(&env, run, who) {
                assert!(!end.err.contains("tf:"), "{account} {who:?}: {}", env.dump(&end));
            }
            let end = recover(&env, &[]);
            assert_eq!((end.code(), end.out.as_str()), (Some(0), ""), "{account} {who:?}: {}", env.dump(&end));
            assert_nothing_left(&env);
        }
    }
}

/// Only the hash of its key distinguishes it.
#[test]
fn a_key_that_does_not_tell_its_account_is_told_from_another() {
    let env = test_env(Lock::DynamoDb, OLD, &key(OLD));
    let (run, _) = apply(&env, OLD);
    log_in(&env, &key(B));
    let end = end(&env, run, Who::Terraform).unwrap();
    assert!(end.err.contains(SEEN_BY_OTHERS), "{}", env.dump(&end));
    assert_eq!(locks(&env, OLD).len(), 1);
    log_in(&env, &key(OLD));
    let end = recover(&env, &[]);
    assert!(end.out.contains("released the lock"), "{}", env.dump(&end));
}

/// Nothing shows the account, and nothing shows that the location is the right one.
#[test]
fn where_nothing_tells_the_account_a_person_settles_it() {
    for who in Who::ALL {
        let env = test_env(Lock::Both, OLD, &key(OLD));
        log_in(&env, &process(&env));
        let (run, id) = apply(&env, OLD);
        force_unlock(&env, OLD);
        if let Some(end) = end(&env, run, who) {
            assert!(end.err.contains(SEEN_BY_OTHERS), "{who:?}: {}", env.dump(&end));
            assert!(end.err.contains(&format!("tf locks recover --forget {id}")), "{who:?}: {}", env.dump(&end));
        }
        let end = recover(&env, &[]);
        assert_eq!(end.code(), Some(2), "{who:?}: {}", env.dump(&end));
        assert!(end.out.contains(&format!("tf locks recover --forget {id}")), "{who:?}: {}", env.dump(&end));
        // Other runs report nothing about it.
        let mut other = TestEnv::new(Lock::File, "true");
        other.set("HOME", env.directory.parent().unwrap().join("home"));
        let plan = other.run(Subject::Tf, &["plan", "-no-color"]);
        assert_eq!((plan.code(), plan.err.as_str()), (Some(0), ""), "{who:?}: {}", other.dump(&plan));
        let unknown = recover(&env, &["--forget", "11111111-2222-3333-4444-555555555555"]);
        assert_eq!((unknown.code(), records(&env).len()), (Some(1), 1), "{}", env.dump(&unknown));
        let end = recover(&env, &["--forget", &id]);
        assert_eq!(end.code(), Some(0), "{who:?}: {}", env.dump(&end));
        assert!(end.out.contains("nothing was released"), "{who:?}: {}", env.dump(&end));
        assert_nothing_left(&env);
        let end = recover(&env, &[]);
        assert_eq!((end.code(), end.out.as_str()), (Some(0), ""), "{who:?}: {}", env.dump(&end));
    }
}

#[test]
fn a_run_that_is_alive_is_not_forgotten() {
    let env = test_env(Lock::DynamoDb, A, &key(A));
    let (run, id) = apply(&env, A);
    let end = recover(&env, &["--forget", &id]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(end.err.contains("is still running"), "{}", env.dump(&end));
    assert_eq!(records(&env).len(), 1);
    env.unblock();
    assert_eq!(run.wait().code(), Some(0));
}

/// AWS's own hosts, simulated by a proxy with a trusted authority. In AWS, a bucket name exists only once.
#[test]
fn where_aws_itself_says_that_it_is_gone_no_account_must_be_known() {
    for (lock, has_state, settled) in [
        (Lock::File, false, true),
        (Lock::DynamoDb, false, false),
        (Lock::DynamoDb, true, true),
        (Lock::Both, true, true),
    ] {
        let authority = Authority::new();
        let tunnel = Arc::clone(&authority);
        let proxy = Proxy::start_changing(cloud().port, to_services, move |request: &Message| {
            if request.start.starts_with("CONNECT ") {
                ProxyAction::Tunnel(Arc::clone(&tunnel))
            } else {
                ProxyAction::Pass
            }
        });
        let mut env = TestEnv::empty(lock);
        let pem = env.directory.parent().unwrap().join("ca.pem");
        fs::write(&pem, &authority.pem).unwrap();
        for name in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"] {
            env.set(name, UNSET);
        }
        env.set("AWS_CA_BUNDLE", pem).set("HTTPS_PROXY", format!("http://127.0.0.1:{}", proxy.port));
        log_in(&env, &process(&env));
        env.write_main("", WAITS);
        env.init();
        if has_state {
            env.unblock();
            let end = env.run(Subject::Bare, &APPLY);
            assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
            for name in ["go", "began"] {
                fs::remove_file(env.directory.join(name)).unwrap();
            }
            env.write_main("resource \"terraform_data\" \"b\" {\nprovisioner \"local-exec\" {\ncommand = \"touch began; sleep 60\"\n}\n}\n", "true");
        }
        let (run, _) = apply(&env, OLD);
        env.delete_lock();
        let end = end(&env, run, Who::Terraform).unwrap();
        let case = format!("{lock:?}, state: {has_state}: {}", env.dump(&end));
        assert_eq!(end.err.contains(SEEN_BY_OTHERS), !settled, "{case}");
        assert_eq!(records(&env).is_empty(), settled, "{case}");
    }
}
