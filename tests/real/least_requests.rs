//! What `tf` asks the services for: nothing in a run that ends well, and else what docs/iam.md says.

use std::sync::{Arc, Mutex};

use serde_json::Value;

use super::locks_doctor::unfit;
use super::locks_release::{locks, old_lock};
use super::survived::kill_whole;
use crate::support::cloud::cloud;
use crate::support::household::kill_without_guardian;
use crate::support::http::Message;
use crate::support::proxy::{Deed, Proxy};
use crate::support::world::{WAITS, lock_json};
use crate::support::{Lock, Subject, World};

fn target(request: &Message) -> &str {
    request.header("x-amz-target").unwrap_or_default()
}

type Asked = Arc<Mutex<Vec<Message>>>;

/// Keeps each request of ours, and answers as `rule` says.
fn record(world: &mut World, rule: impl Fn(&Message) -> Deed + Send + Sync + 'static) -> (Proxy, Asked) {
    let asked = Asked::default();
    let seen = Arc::clone(&asked);
    let proxy = Proxy::start(cloud().port, move |request| {
        if !request.is_ours() {
            return Deed::Pass;
        }
        seen.lock().unwrap().push(request.clone());
        rule(request)
    });
    world.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    (proxy, asked)
}

fn s3_denied() -> Deed {
    let body = "<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code><Message>not you</Message></Error>";
    Deed::Answer(Message::answer("403 Forbidden", body))
}

#[test]
fn a_run_that_ends_well_sends_no_request_of_ours() {
    for lock in Lock::ALL {
        let mut world = World::new(lock, "true");
        let (_proxy, asked) = record(&mut world, |_| Deed::Pass);
        for words in [&["apply", "-auto-approve", "-no-color"][..], &["plan", "-no-color"], &["state", "list"]] {
            let end = world.run(Subject::Tf, words);
            assert_eq!(end.code(), Some(0), "{lock:?} {words:?}: {}", world.story(&end));
            assert!(asked.lock().unwrap().is_empty(), "{lock:?} {words:?}: {:?}", asked.lock().unwrap());
        }
    }
}

/// A policy may be narrowed to these keys (docs/iam.md).
#[test]
fn each_request_is_about_a_lock_a_digest_or_a_state_of_the_backend() {
    let mut killed = World::new(Lock::Both, WAITS);
    let (_proxy, asked_by_release) = record(&mut killed, |_| Deed::Pass);
    let run = killed.start_apply(Subject::Tf);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", killed.story(&end));

    let mut world = unfit(Lock::Both);
    let (_other, asked_by_commands) = record(&mut world, |_| Deed::Pass);
    for words in [&["doctor", "--fix-digest", "--yes"][..], &["doctor"], &["list"], &["audit", "--older-than", "2h"]] {
        locks(&world, words);
    }
    old_lock(&world);
    for words in [&["show"][..], &["release", "--yes"]] {
        locks(&world, words);
    }
    world.assert_unlocked();
    for (world, asked) in [(&killed, asked_by_release), (&world, asked_by_commands)] {
        let asked = asked.lock().unwrap();
        assert!(asked.len() > 3);
        for request in asked.iter() {
            let name = target(request);
            if let Some(operation) = name.strip_prefix("DynamoDB_20120810.") {
                let body: Value = serde_json::from_slice(&request.body).unwrap();
                assert!(["GetItem", "PutItem", "DeleteItem", "DescribeTable"].contains(&operation), "{operation}");
                assert_eq!(body["TableName"], world.table.as_str(), "{body}");
                let id = body["Key"]["LockID"]["S"].as_str().or_else(|| body["Item"]["LockID"]["S"].as_str());
                let expected = [world.path(), format!("{}-md5", world.path())];
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
            assert!(path.starts_with(&format!("/{}", world.bucket)), "{}", request.start);
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
    let mut world = World::new(Lock::File, "true");
    for (name, id) in [("green", "22222222"), ("blue", "33333333")] {
        let path = format!("{}/env:/{name}/dir/prod.tfstate", world.bucket);
        let info = lock_json(&format!("{id}-3333-4444-5555-666666666666"), &path);
        cloud().s3("PUT", &format!("{path}.tflock"), info.as_bytes());
    }
    let (_proxy, _) =
        record(&mut world, |request| if request.start.contains("list-type=2") { s3_denied() } else { Deed::Pass });
    world.set("TF_WORKSPACE", "green");
    let end = locks(&world, &["list", "--json"]);
    assert_eq!(end.code(), Some(1), "{}", world.story(&end));
    assert!(end.err.contains("s3:ListBucket is missing"), "{}", world.story(&end));
    let all: Value = serde_json::from_str(&end.out).unwrap();
    let workspaces: Vec<_> = all["locks"].as_array().unwrap().iter().map(|lock| &lock["workspace"]).collect();
    assert_eq!(workspaces, ["green"], "{all}");
    assert_eq!(all["complete"], false, "{all}");
}

/// Nearly every table is none, and a release must not need what terraform does not.
#[test]
fn without_permission_to_describe_the_table_a_release_takes_it_for_one_of_one_region() {
    let mut world = World::new(Lock::DynamoDb, WAITS);
    let (_proxy, _) = record(&mut world, |request| {
        if request.asks_for("DescribeTable") { Deed::Answer(Message::denied()) } else { Deed::Pass }
    });
    let run = world.start_apply(Subject::Tf);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", world.story(&end));
    world.assert_unlocked();
}

/// Whether the state still changes cannot be seen then.
#[test]
fn without_permission_to_read_the_state_the_lock_of_a_run_that_died_writing_stays_and_is_named() {
    let mut world = World::new(Lock::DynamoDb, "true");
    let path = world.path();
    let state = format!("/{path}");
    let proxy = Proxy::start(cloud().port, move |request| {
        let is_state = request.start.split(' ').nth(1).is_some_and(|target| target.split('?').next() == Some(&state));
        match (request.is_ours(), is_state) {
            (false, true) if request.start.starts_with("PUT ") => Deed::Hold,
            (true, true) => s3_denied(),
            _ => Deed::Pass,
        }
    });
    world.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    let run = world.start(Subject::Tf, &["apply", "-auto-approve", "-no-color"]);
    proxy.wait_until_held();
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("was not released") && end.err.contains("s3:GetObject"), "{}", world.story(&end));
    world.assert_locked();
    proxy.let_go();
}

/// The reverse of how terraform takes them, so that nobody gets half in.
#[test]
fn of_a_lock_of_two_parts_the_item_is_deleted_first_whoever_releases_it() {
    let deletes = |asked: &Asked| -> Vec<&'static str> {
        let asked = asked.lock().unwrap();
        let kind = |request: &Message| {
            if request.asks_for("DeleteItem") {
                Some("item")
            } else {
                request.start.starts_with("DELETE ").then_some("object")
            }
        };
        asked.iter().filter_map(kind).collect()
    };
    for who in ["tf", "guardian", "recovery"] {
        let mut world = World::new(Lock::Both, WAITS);
        let (_proxy, asked) = record(&mut world, |_| Deed::Pass);
        match who {
            "tf" => {
                let run = world.start_apply(Subject::Tf);
                run.kill_terraform();
                run.wait();
            }
            "guardian" => {
                kill_without_guardian(&world);
            }
            _ => {
                kill_whole(&world);
                assert_eq!(locks(&world, &["recover"]).code(), Some(0), "{}", world.trace());
            }
        }
        world.assert_unlocked();
        assert_eq!(deletes(&asked), ["item", "object"], "{who}: {}", world.trace());
    }
}
