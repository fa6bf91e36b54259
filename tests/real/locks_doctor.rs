//! `tf locks doctor`: what would stop a release is found before it is needed, and a digest is mended under the lock.

use nix::sys::signal::{Signal, kill};
use serde_json::json;

use super::given_back::{is_dynamodb, through};
use super::left_behind::writes_digest;
use super::locks_release::locks;
use crate::support::cloud::cloud;
use crate::support::http::Message;
use crate::support::process::Run;
use crate::support::proxy::{Deed, Proxy};
use crate::support::world::id_of;
use crate::support::{Lock, Subject, World};

const WRONG: &str = "00000000000000000000000000000000";

/// A state whose recorded digest is not its own.
pub fn unfit(lock: Lock) -> World {
    let world = World::new(lock, "true");
    let end = world.run(Subject::Bare, &["apply", "-auto-approve", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", world.story(&end));
    set_digest(&world, WRONG);
    world
}

fn set_digest(world: &World, digest: &str) {
    let item = json!({ "LockID": { "S": format!("{}-md5", world.path()) }, "Digest": { "S": digest } });
    cloud().dynamodb("PutItem", &json!({ "TableName": world.table, "Item": item }));
}

fn digest(world: &World) -> String {
    let key = json!({ "LockID": { "S": format!("{}-md5", world.path()) } });
    let answer = cloud().dynamodb("GetItem", &json!({ "TableName": world.table, "Key": key, "ConsistentRead": true }));
    answer["Item"]["Digest"]["S"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn a_directory_in_which_all_is_well_is_told_so() {
    for lock in Lock::ALL {
        let world = World::new(lock, "true");
        assert_eq!(world.run(Subject::Bare, &["apply", "-auto-approve", "-no-color"]).code(), Some(0));
        let end = locks(&world, &["doctor"]);
        assert_eq!(end.code(), Some(0), "{}", world.story(&end));
        let lock_object = if lock == Lock::DynamoDb { "dynamodb:GetItem:" } else { "s3:GetObject:" };
        for checked in ["terraform:", "backend:", "credentials:", lock_object, "clock:", "journal:", "file locks:"] {
            assert!(
                end.out.lines().any(|line| line.starts_with(&format!("ok     {checked}"))),
                "{checked}: {}",
                end.out
            );
        }
        // It has left nothing of what it tried.
        assert!(world.locks().is_empty());
        let listed = locks(&world, &["list"]);
        assert_eq!((listed.code(), listed.out.as_str()), (Some(0), ""), "{}", world.story(&listed));
    }
}

#[test]
fn what_it_tries_leaves_a_standing_lock_alone() {
    for lock in Lock::ALL {
        let world = World::new(lock, "true");
        let theirs = world.lock_of_another();
        let _ = locks(&world, &["doctor"]);
        assert!(!world.locks().is_empty() && world.locks().iter().all(|standing| *standing == theirs));
    }
}

#[test]
fn each_permission_that_is_missing_is_named() {
    type Asked = fn(&Message) -> bool;
    let cases: [(&str, Asked); 5] = [
        ("dynamodb:DeleteItem", |request| is_dynamodb(request, ".DeleteItem")),
        ("dynamodb:GetItem", |request| is_dynamodb(request, ".GetItem")),
        ("s3:GetObject", |request| request.start.starts_with("GET ") && request.start.contains(".tflock")),
        ("s3:DeleteObject", |request| request.start.starts_with("DELETE ")),
        ("s3:ListBucket", |request| request.start.starts_with("GET ") && request.start.contains("list-type=2")),
    ];
    for (name, asked) in cases {
        let mut world = World::new(Lock::Both, "true");
        let _proxy = through(&mut world, move |request| if asked(request) { denied(request) } else { Deed::Pass });
        let end = locks(&world, &["doctor"]);
        assert_eq!(end.code(), Some(2), "{}", world.story(&end));
        let wrong: Vec<&str> = end.out.lines().filter(|line| line.starts_with("WRONG  ")).collect();
        assert!(wrong.iter().any(|line| line.starts_with(&format!("WRONG  {name}: "))), "{}", end.out);
        assert!(end.out.contains(&format!("let these credentials do {name} on ")), "{}", end.out);
        for (other, _) in cases.into_iter().filter(|(other, _)| *other != name) {
            assert!(end.out.contains(&format!("ok     {other}: permitted")), "{}", end.out);
        }
    }
}

/// How either service says it.
pub fn denied(request: &Message) -> Deed {
    let said = "User: arn:aws:iam::000000000000:user/anna is not authorized";
    if request.header("x-amz-target").is_none() {
        let body = format!("<Error><Code>AccessDenied</Code><Message>{said}</Message></Error>");
        return Deed::Answer(Message::answer("403 Forbidden", &body));
    }
    let body = json!({ "__type": "com.amazon.coral.service#AccessDeniedException", "message": said });
    Deed::Answer(Message::answer("400 Bad Request", &body.to_string()))
}

#[test]
fn a_clock_that_is_off_is_named() {
    for (off, health) in [(0, "ok   "), (-4 * 60, "WRONG"), (4 * 60, "WRONG")] {
        let mut world = World::new(Lock::DynamoDb, "true");
        let _proxy = through(&mut world, move |request| {
            if !is_dynamodb(request, ".DeleteItem") {
                return Deed::Pass;
            }
            let body = json!({
                "__type": "com.amazonaws.dynamodb.v20120810#ConditionalCheckFailedException",
                "message": "The conditional request failed",
            });
            let mut answer = Message::answer("400 Bad Request", &body.to_string());
            let now = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(off);
            answer.headers.push(("Date".into(), now.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()));
            Deed::Answer(answer)
        });
        let end = locks(&world, &["doctor"]);
        assert_eq!(end.code(), Some(if off == 0 { 0 } else { 2 }), "{off}: {}", world.story(&end));
        assert!(end.out.contains(&format!("{health}  clock: ")), "{off}: {}", end.out);
    }
}

#[test]
fn a_service_that_ignores_if_match_is_named_as_that() {
    let mut world = World::new(Lock::File, "true");
    let _proxy = through(&mut world, |request| {
        // What such a service answers, whatever stands there.
        if request.start.starts_with("DELETE ") {
            Deed::Answer(Message::answer("204 No Content", ""))
        } else {
            Deed::Pass
        }
    });
    let end = locks(&world, &["doctor"]);
    assert_eq!(end.code(), Some(2), "{}", world.story(&end));
    assert!(end.out.contains("WRONG  If-Match: "), "{}", end.out);
}

#[test]
fn a_service_on_which_a_lock_file_does_not_lock_is_named_and_nothing_is_left_there() {
    for ignores in [false, true] {
        let mut world = World::new(Lock::File, "true");
        let change = |request: &mut Message| {
            request.headers.retain(|(name, _)| !name.eq_ignore_ascii_case("if-none-match"));
        };
        let change: fn(&mut Message) = if ignores { change } else { |_| {} };
        let proxy = Proxy::start_changing(cloud().port, change, |_| Deed::Pass);
        world.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
        let end = locks(&world, &["doctor"]);
        assert_eq!(end.code(), Some(if ignores { 2 } else { 0 }), "{}", world.story(&end));
        let health = if ignores { "WRONG  If-None-Match: " } else { "ok     If-None-Match: " };
        assert!(end.out.contains(health), "{}", end.out);
        assert_eq!(end.out.contains("use_lockfile does not lock there"), ignores, "{}", end.out);
        let left = cloud().s3("GET", &format!("{}?list-type=2", world.bucket), b"").text();
        assert!(!left.contains(".tflock"), "{left}");
    }
}

#[test]
fn a_service_that_does_not_let_an_object_be_put_is_not_known() {
    let mut world = World::new(Lock::File, "true");
    let _proxy =
        through(&mut world, |request| if request.start.starts_with("PUT ") { denied(request) } else { Deed::Pass });
    let end = locks(&world, &["doctor"]);
    assert_eq!(end.code(), Some(0), "{}", world.story(&end));
    assert!(end.out.contains("note   If-None-Match: ") && !end.out.contains("WRONG"), "{}", end.out);
}

#[test]
fn a_table_with_another_key_is_named() {
    let world = World::new(Lock::DynamoDb, "true");
    cloud().give_another_key(&world.table);
    let end = locks(&world, &["doctor"]);
    assert_eq!(end.code(), Some(2), "{}", world.story(&end));
    assert!(end.out.contains("its key is Id"), "{}", end.out);
}

#[test]
fn an_unfit_digest_and_an_errored_state_are_named_with_what_mends_them() {
    let world = unfit(Lock::DynamoDb);
    world.write("errored.tfstate", "{}");
    let end = locks(&world, &["doctor"]);
    assert_eq!(end.code(), Some(2), "{}", world.story(&end));
    assert!(end.out.contains("WRONG  digest of default: ") && end.out.contains("--fix-digest default"), "{}", end.out);
    assert!(end.out.contains("state push errored.tfstate"), "{}", end.out);
}

#[test]
fn a_digest_is_fixed_when_somebody_says_so_and_terraform_is_content() {
    for lock in [Lock::DynamoDb, Lock::Both] {
        let world = unfit(lock);
        let unsaid = locks(&world, &["doctor", "--fix-digest"]);
        assert_eq!(unsaid.code(), Some(1), "{}", world.story(&unsaid));
        let dry = locks(&world, &["doctor", "--fix-digest", "--dry-run"]);
        assert_eq!(dry.code(), Some(2), "{}", world.story(&dry));
        assert_eq!(digest(&world), WRONG);
        let end = locks(&world, &["doctor", "--fix-digest", "default", "--yes"]);
        assert_eq!(end.code(), Some(0), "{}", world.story(&end));
        assert!(end.out.contains(WRONG) && end.out.contains(&digest(&world)) && end.out.contains("written at"));
        world.assert_unlocked();
        let plan = world.run(Subject::Bare, &["plan", "-no-color"]);
        assert_eq!(plan.code(), Some(0), "{}", world.story(&plan));
    }
}

#[test]
fn a_digest_is_not_touched_while_somebody_holds_the_lock() {
    for lock in [Lock::DynamoDb, Lock::Both] {
        let world = unfit(lock);
        let theirs = world.lock_of_another();
        let end = locks(&world, &["doctor", "--fix-digest", "--yes"]);
        assert_eq!(end.code(), Some(1), "{}", world.story(&end));
        assert!(end.err.contains(&id_of(&theirs)), "{}", end.err);
        assert_eq!(digest(&world), WRONG);
        assert!(!world.locks().is_empty() && world.locks().iter().all(|standing| *standing == theirs));
    }
}

#[test]
fn a_fix_that_is_killed_keeps_terraform_out_and_is_recovered() {
    for lock in [Lock::DynamoDb, Lock::Both] {
        let mut world = unfit(lock);
        let proxy = through(&mut world, |request| if writes_digest(request) { Deed::Hold } else { Deed::Pass });
        let mut command = world.command(world.bin().join("tf"));
        command.args(["locks", "doctor", "--fix-digest", "--yes"]);
        let fix = Run::start(command);
        proxy.wait_until_held();
        let refused = world.run(Subject::Bare, &["apply", "-auto-approve", "-no-color"]);
        assert!(refused.err.contains("Error acquiring the state lock"), "{}", world.story(&refused));
        let listed = locks(&world, &["list"]);
        assert!(listed.out.contains("alive"), "{}", world.story(&listed));
        // What asks it to stop is not answered while it has the lock; what cannot be ignored kills it.
        kill(fix.pid(), Signal::SIGTERM).unwrap();
        kill(fix.pid(), Signal::SIGKILL).unwrap();
        assert_eq!(fix.wait().signal(), Some(9));
        proxy.let_go();
        world.assert_locked();
        let end = locks(&world, &["recover"]);
        assert_eq!(end.code(), Some(0), "{}", world.story(&end));
        assert!(end.out.contains("released the lock"), "{}", end.out);
        world.assert_unlocked();
    }
}

#[test]
fn without_a_backend_the_rest_is_looked_at_all_the_same() {
    let world = World::empty(Lock::DynamoDb);
    let end = locks(&world, &["doctor"]);
    assert_eq!(end.code(), Some(2), "{}", world.story(&end));
    assert!(end.out.contains("ok     terraform: ") && end.out.contains("WRONG  backend: "), "{}", end.out);
}

/// Of which the loopback services have none.
pub fn as_a_global_table(world: &mut World, consistency: &str) -> Proxy {
    let described = json!({ "Table": {
        "TableName": world.table, "KeySchema": [{ "AttributeName": "LockID", "KeyType": "HASH" }],
        "Replicas": [{ "RegionName": "eu-west-1" }, { "RegionName": "us-east-1" }],
        "MultiRegionConsistency": consistency,
    } });
    through(world, move |request| {
        let asked = request.header("x-amz-target").is_some_and(|target| target.ends_with(".DescribeTable"));
        if asked { Deed::Answer(Message::answer("200 OK", &described.to_string())) } else { Deed::Pass }
    })
}

#[test]
fn a_global_table_is_named_as_that() {
    let mut world = World::new(Lock::DynamoDb, "true");
    let _proxy = as_a_global_table(&mut world, "EVENTUAL");
    let end = locks(&world, &["doctor"]);
    assert!(end.out.contains("a global table (eu-west-1, us-east-1)"), "{}", world.story(&end));
}
