//! The requests of `tf` to the services: none in a run that exits successfully, and otherwise those in docs/iam.md.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::Value;

use super::locks_doctor::unfit;
use super::locks_release::{locks, old_lock};
use super::survived::kill_whole;
use crate::support::cloud::cloud;
use crate::support::http::Message;
use crate::support::processes::{kill_all, kill_without_guardian};
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::test_env::{APPLY, WAITS, lock_json};
use crate::support::{Lock, Subject, TestEnv};

fn target(request: &Message) -> &str {
    request.header("x-amz-target").unwrap_or_default()
}

type Asked = Arc<Mutex<Vec<Message>>>;

/// Records each request of `tf`, and responds as `rule` says.
fn record(env: &mut TestEnv, rule: impl Fn(&Message) -> ProxyAction + Send + Sync + 'static) -> (Proxy, Asked) {
    let asked = Asked::default();
    let seen = Arc::clone(&asked);
    let proxy = Proxy::start(cloud().port, move |request| {
        if !request.is_ours() {
            return ProxyAction::Pass;
        }
        seen.lock().unwrap().push(request.clone());
        rule(request)
    });
    env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    (proxy, asked)
}

fn a_run_that_ends_well_sends_no_request_of_ours(lock: Lock) {
    let mut env = TestEnv::new(lock, "true");
    let (_proxy, asked) = record(&mut env, |_| ProxyAction::Pass);
    for words in [&APPLY[..], &["plan", "-no-color"], &["state", "list"]] {
        let end = env.run(Subject::Tf, words);
        assert_eq!(end.code(), Some(0), "{lock:?} {words:?}: {}", env.dump(&end));
        assert!(asked.lock().unwrap().is_empty(), "{lock:?} {words:?}: {:?}", asked.lock().unwrap());
    }
}
for_each_lock!(a_run_that_ends_well_sends_no_request_of_ours);

/// The condition key `dynamodb:ReturnValues` of an IAM policy can forbid that a delete returns the item.
#[test]
fn a_policy_that_permits_only_deletes_that_return_nothing_is_enough() {
    let mut env = TestEnv::new(Lock::DynamoDb, WAITS);
    let denied = r#"{"__type":"com.amazon.coral.service#AccessDeniedException","message":"not with ALL_OLD"}"#;
    let (_proxy, asked) = record(&mut env, move |request| {
        let returns = request.text().contains("ReturnValues");
        if returns { ProxyAction::Answer(Message::answer("400 Bad Request", denied)) } else { ProxyAction::Pass }
    });
    let run = env.start_apply(Subject::Tf);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    assert!(asked.lock().unwrap().iter().any(|request| request.text().contains("ReturnValues")));
    env.assert_unlocked();
}

/// The condition key `dynamodb:Attributes` of an IAM policy can permit only the attributes that terraform requests.
#[test]
fn a_policy_that_permits_only_the_attributes_of_terraform_is_enough() {
    for lock in [Lock::DynamoDb, Lock::Both] {
        let mut env = TestEnv::new(lock, WAITS);
        env.set("TFW_LEASE", "off");
        let (_proxy, asked) = record(&mut env, |request| {
            let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
            let is_wide = body["ProjectionExpression"].as_str().is_none_or(|read| read.contains("#lease"));
            if request.asks_for("GetItem") && is_wide {
                ProxyAction::Answer(request.denied())
            } else {
                ProxyAction::Pass
            }
        });
        let run = env.start_apply(Subject::Tf);
        let refused = env.run(Subject::Tf, &["plan", "-no-color"]);
        assert!(refused.err.contains("the holder is alive"), "{}", env.dump(&refused));
        run.kill_terraform();
        let end = run.wait();
        assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
        assert!(asked.lock().unwrap().iter().any(|request| request.text().contains("#lease")));
        env.assert_unlocked();
        // The command that `tf` names for another lock works too.
        old_lock(&env);
        let end = locks(&env, &["release", "--yes"]);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        env.assert_unlocked();
    }
}

/// A backend may have hundreds of workspaces. Neither a refused run nor the command that it names lists or reads them.
fn a_refused_run_and_the_command_that_it_names_look_at_one_lock(lock: Lock) {
    let mut env = TestEnv::new(lock, "true");
    let other = format!("{}/env:/green/dir/prod.tfstate", env.bucket);
    cloud().s3("PUT", &other, b"{}");
    env.lock_of_another();
    let (_proxy, asked) = record(&mut env, |_| ProxyAction::Pass);
    let assert_one = |what: &str| {
        let asked = std::mem::take(&mut *asked.lock().unwrap());
        assert!(!asked.is_empty(), "{lock:?} {what}");
        for request in asked {
            let is_item = request.text().contains(&format!("\"{}\"", env.path()));
            let is_object = request.start.contains(&format!(" /{}.tflock", env.path()));
            let is_about_the_table = request.asks_for("DescribeTable");
            assert!(
                is_item || is_object || is_about_the_table,
                "{lock:?} {what}: {} {}",
                request.start,
                request.text()
            );
        }
    };
    let end = env.run(Subject::Tf, &["plan", "-no-color"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    let (_, command) = end.err.rsplit_once("type: tf locks ").unwrap();
    let words: Vec<String> = command.split_whitespace().map(ToOwned::to_owned).collect();
    assert_one("plan");
    let end = locks(&env, &words.iter().map(String::as_str).collect::<Vec<_>>());
    assert_eq!(end.code(), Some(0), "{words:?}: {}", env.dump(&end));
    assert!(end.out.contains("11111111-2222-3333-4444-555555555555"), "{}", env.dump(&end));
    assert_one("the command");
    // Another word may name any workspace.
    assert_eq!(locks(&env, &["show", "default"]).code(), Some(0));
    assert!(asked.lock().unwrap().iter().any(|request| request.start.contains("list-type=2")), "{lock:?}");
}
for_each_lock!(a_refused_run_and_the_command_that_it_names_look_at_one_lock);

/// An IAM policy may be limited to these keys (docs/iam.md).
#[test]
fn each_request_is_about_a_lock_a_digest_or_a_state_of_the_backend() {
    let mut killed = TestEnv::new(Lock::Both, WAITS);
    let (_proxy, asked_by_release) = record(&mut killed, |_| ProxyAction::Pass);
    let run = killed.start_apply(Subject::Tf);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", killed.dump(&end));

    let mut env = unfit(Lock::Both);
    let (_other, asked_by_commands) = record(&mut env, |_| ProxyAction::Pass);
    for words in [&["doctor", "--fix-digest", "--yes"][..], &["doctor"], &["list"], &["audit", "--older-than", "2h"]] {
        locks(&env, words);
    }
    old_lock(&env);
    for words in [&["show"][..], &["release", "--yes"]] {
        locks(&env, words);
    }
    env.assert_unlocked();
    for (env, asked) in [(&killed, asked_by_release), (&env, asked_by_commands)] {
        let asked = asked.lock().unwrap();
        assert!(asked.len() > 3);
        for request in asked.iter() {
            let name = target(request);
            if let Some(operation) = name.strip_prefix("DynamoDB_20120810.") {
                let body: Value = serde_json::from_slice(&request.body).unwrap();
                assert!(["GetItem", "PutItem", "DeleteItem", "DescribeTable"].contains(&operation), "{operation}");
                assert_eq!(body["TableName"], env.table.as_str(), "{body}");
                let id = body["Key"]["LockID"]["S"].as_str().or_else(|| body["Item"]["LockID"]["S"].as_str());
                let expected = [env.path(), format!("{}-md5", env.path())];
                assert!(id.is_none_or(|id| expected.iter().any(|path| path == id)), "{operation}: {id:?}");
                assert!(id.is_some() || operation == "DescribeTable", "{operation}");
                continue;
            }
            let path = request.start.split(' ').nth(1).unwrap();
            if path == "/" {
                let body = String::from_utf8_lossy(&request.body);
                assert!(body.contains("Action=GetCallerIdentity"), "{} {body}", request.start);
                continue;
            }
            assert!(path.starts_with(&format!("/{}", env.bucket)), "{}", request.start);
            for other in ["versionId", "versions", "uploads", "acl", "policy"] {
                assert!(
                    !path
                        .split('?')
                        .nth(1)
                        .unwrap_or_default()
                        .split('&')
                        .any(|word| word.split('=').next() == Some(other)),
                    "{path}"
                );
            }
        }
    }
}

#[test]
fn without_permission_to_list_the_bucket_the_default_and_the_selected_workspace_are_shown() {
    let mut env = TestEnv::new(Lock::File, "true");
    for (name, id) in [("green", "22222222"), ("blue", "33333333")] {
        let path = format!("{}/env:/{name}/dir/prod.tfstate", env.bucket);
        let info = lock_json(&format!("{id}-3333-4444-5555-666666666666"), &path);
        cloud().s3("PUT", &format!("{path}.tflock"), info.as_bytes());
    }
    let (_proxy, _) = record(&mut env, |request| {
        if request.start.contains("list-type=2") { ProxyAction::Answer(request.denied()) } else { ProxyAction::Pass }
    });
    env.set("TF_WORKSPACE", "green");
    let end = locks(&env, &["list", "--json"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(end.err.contains("permission denied: s3:ListBucket"), "{}", env.dump(&end));
    let all: Value = serde_json::from_str(&end.out).unwrap();
    let workspaces: Vec<_> = all["locks"].as_array().unwrap().iter().map(|lock| &lock["workspace"]).collect();
    assert_eq!(workspaces, ["green"], "{all}");
    assert_eq!(all["complete"], false, "{all}");
}

/// Nearly every table is in one region only, and a release must not need a permission that terraform does not need.
#[test]
fn without_permission_to_describe_the_table_a_release_takes_it_for_one_of_one_region() {
    let mut env = TestEnv::new(Lock::DynamoDb, WAITS);
    let (_proxy, _) = record(&mut env, |request| {
        if request.asks_for("DescribeTable") { ProxyAction::Answer(request.denied()) } else { ProxyAction::Pass }
    });
    let run = env.start_apply(Subject::Tf);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
}

/// Without that permission, `tf` cannot see whether the state still changes.
#[test]
fn without_permission_to_read_the_state_the_lock_of_a_run_that_died_writing_stays_and_is_named() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let path = env.path();
    let state = format!("/{path}");
    let proxy = Proxy::start(cloud().port, move |request| {
        let is_state = request.start.split(' ').nth(1).is_some_and(|target| target.split('?').next() == Some(&state));
        match (request.is_ours(), is_state) {
            (false, true) if request.start.starts_with("PUT ") => ProxyAction::Hold,
            (true, true) => ProxyAction::Answer(request.denied()),
            _ => ProxyAction::Pass,
        }
    });
    env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    let run = env.start(Subject::Tf, &APPLY);
    proxy.wait_until_held();
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("was not released") && end.err.contains("s3:GetObject"), "{}", env.dump(&end));
    env.assert_locked();
    proxy.let_go();
}

/// Returns which parts of the lock were deleted, in order, with one entry for each request.
fn deletes(asked: &Asked) -> Vec<&'static str> {
    let asked = asked.lock().unwrap();
    let kind = |request: &Message| {
        if request.asks_for("DeleteItem") {
            Some("item")
        } else {
            // The keeper of a lease tests the service with an object of its own.
            let is_lock = request.start.contains("/prod.tfstate.tflock");
            (request.start.starts_with("DELETE ") && is_lock).then_some("object")
        }
    };
    asked.iter().filter_map(kind).collect()
}

/// The record of the lease is in the item. If the release got no further after its first delete, no other host could
/// take a lock over whose item is gone.
#[test]
fn of_a_leased_lock_of_two_parts_the_item_is_deleted_last() {
    for who in ["tf", "recovery"] {
        let mut env = TestEnv::new(Lock::Both, WAITS);
        env.set("TFW_LEASE", "5m").set("TFW_CLOCK", "steady");
        let (_proxy, asked) = record(&mut env, |_| ProxyAction::Pass);
        let run = env.start_apply(Subject::Tf);
        env.wait_for_lease();
        env.wait_for_trace("journal written");
        if who == "tf" {
            run.kill_terraform();
            run.wait();
        } else {
            kill_all(&env);
            drop(run);
            assert_eq!(locks(&env, &["recover"]).code(), Some(0), "{}", env.trace());
        }
        env.assert_unlocked();
        assert_eq!(deletes(&asked), ["object", "item"], "{who}: {}", env.trace());
    }
}

/// Whether this is a read of the lock's object.
fn reads_object(request: &Message) -> bool {
    request.start.starts_with("GET ") && request.start.contains("/prod.tfstate.tflock")
}

/// One response that does not find the object may come from a proxy.
#[test]
fn an_item_with_a_lease_is_deleted_only_if_a_second_read_does_not_find_the_object_either() {
    let mut env = TestEnv::new(Lock::Both, WAITS);
    env.set("TFW_LEASE", "5m").set("TFW_CLOCK", "steady");
    let is_dead = Arc::new(AtomicBool::new(false));
    let hides = Arc::clone(&is_dead);
    let (_proxy, asked) = record(&mut env, move |request| {
        if reads_object(request) && hides.swap(false, Ordering::Relaxed) {
            let mut absent = Message::answer("404 Not Found", "<Error><Code>NoSuchKey</Code></Error>");
            absent.headers.push(("x-amz-request-id".to_owned(), "1".to_owned()));
            ProxyAction::Answer(absent)
        } else {
            ProxyAction::Pass
        }
    });
    let run = env.start_apply(Subject::Tf);
    env.wait_for_lease();
    env.wait_for_trace("journal written");
    is_dead.store(true, Ordering::Relaxed);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    assert!(!is_dead.load(Ordering::Relaxed), "{}", env.dump(&end));
    env.assert_unlocked();
    assert_eq!(deletes(&asked), ["object", "item"], "{}", env.dump(&end));
}

/// After this host has deleted the object, another host that has claimed the lock deletes the item. It says so.
#[test]
fn a_lock_whose_item_another_host_has_deleted_is_not_reported_as_released() {
    for is_taken_again in [false, true] {
        let mut env = TestEnv::new(Lock::Both, WAITS);
        env.set("TFW_LEASE", "5m").set("TFW_CLOCK", "steady");
        let (path, table) = (env.path(), env.table.clone());
        let is_object_gone = AtomicBool::new(false);
        let (_proxy, _asked) = record(&mut env, move |request| {
            if request.start.starts_with("DELETE ") && request.start.contains("/prod.tfstate.tflock") {
                is_object_gone.store(true, Ordering::Relaxed);
            } else if request.asks_for("GetItem") && is_object_gone.swap(false, Ordering::Relaxed) {
                if is_taken_again {
                    cloud().put_item(&table, &path, &lock_json("44444444-2222-3333-4444-555555555555", &path));
                } else {
                    cloud().delete_item(&table, &path);
                    // This read fails, so this host makes another attempt.
                    return ProxyAction::Close;
                }
            }
            ProxyAction::Pass
        });
        let run = env.start_apply(Subject::Tf);
        env.wait_for_lease();
        env.wait_for_trace("journal written");
        run.kill_terraform();
        let end = run.wait();
        assert!(!end.err.contains("released the lock"), "{}", env.dump(&end));
        assert_eq!(env.locks().len(), usize::from(is_taken_again), "{}", env.dump(&end));
    }
}

/// This is the reverse of the order in which terraform acquires them, so that no other run can acquire one of the two.
#[test]
fn of_a_lock_of_two_parts_the_item_is_deleted_first_whoever_releases_it() {
    for who in ["tf", "guardian", "recovery"] {
        let mut env = TestEnv::new(Lock::Both, WAITS);
        env.set("TFW_LEASE", "off");
        let (_proxy, asked) = record(&mut env, |_| ProxyAction::Pass);
        match who {
            "tf" => {
                let run = env.start_apply(Subject::Tf);
                run.kill_terraform();
                run.wait();
            }
            "guardian" => {
                kill_without_guardian(&env);
            }
            _ => {
                kill_whole(&env);
                assert_eq!(locks(&env, &["recover"]).code(), Some(0), "{}", env.trace());
            }
        }
        env.assert_unlocked();
        assert_eq!(deletes(&asked), ["item", "object"], "{who}: {}", env.trace());
    }
}
