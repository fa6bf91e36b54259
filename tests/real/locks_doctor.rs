//! `tf locks doctor` finds what would prevent a release before it is needed, and repairs a digest under the lock.

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

use super::given_back::{is_dynamodb, through};
use super::left_behind::writes_digest;
use super::locks_release::locks;
use crate::support::cloud::cloud;
use crate::support::http::Message;
use crate::support::process::Run;
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::test_env::{APPLY, id_of};
use crate::support::{Lock, Subject, TestEnv};

const WRONG: &str = "00000000000000000000000000000000";

/// Returns a directory with a state whose recorded digest is wrong.
pub fn unfit(lock: Lock) -> TestEnv {
    let env = TestEnv::new(lock, "true");
    let end = env.run(Subject::Bare, &APPLY);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    set_digest(&env, WRONG);
    env
}

fn set_digest(env: &TestEnv, digest: &str) {
    let item = json!({ "LockID": { "S": format!("{}-md5", env.path()) }, "Digest": { "S": digest } });
    cloud().dynamodb("PutItem", &json!({ "TableName": env.table, "Item": item }));
}

fn digest(env: &TestEnv) -> String {
    let key = json!({ "LockID": { "S": format!("{}-md5", env.path()) } });
    let answer = cloud().dynamodb("GetItem", &json!({ "TableName": env.table, "Key": key, "ConsistentRead": true }));
    answer["Item"]["Digest"]["S"].as_str().unwrap_or_default().to_owned()
}

fn a_directory_in_which_all_is_well_is_told_so(lock: Lock) {
    let env = TestEnv::new(lock, "true");
    assert_eq!(env.run(Subject::Bare, &APPLY).code(), Some(0));
    let end = locks(&env, &["doctor"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    let lock_object = if lock == Lock::DynamoDb { "dynamodb:GetItem:" } else { "s3:GetObject:" };
    for checked in ["terraform:", "backend:", "credentials:", lock_object, "clock:", "journal:", "file locks:"] {
        assert!(end.out.lines().any(|line| line.starts_with(&format!("ok     {checked}"))), "{checked}: {}", end.out);
    }
    // Its trials have left nothing.
    assert!(env.locks().is_empty());
    let listed = locks(&env, &["list"]);
    assert_eq!((listed.code(), listed.out.as_str()), (Some(0), ""), "{}", env.dump(&listed));
}
for_each_lock!(a_directory_in_which_all_is_well_is_told_so);

fn what_it_tries_leaves_a_standing_lock_alone(lock: Lock) {
    let env = TestEnv::new(lock, "true");
    let theirs = env.lock_of_another();
    let _ = locks(&env, &["doctor"]);
    assert!(!env.locks().is_empty() && env.locks().iter().all(|standing| *standing == theirs));
}
for_each_lock!(what_it_tries_leaves_a_standing_lock_alone);

/// Or the user finds out during an incident.
#[test]
fn a_witness_that_does_not_answer_is_wrong() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    for (witness, code, expected) in [
        (r#"cat > question; echo '{"verdict": "unknown"}'"#, 0, "ok     witness: TFW_WITNESS answers; whether"),
        (r#"echo '{"verdict": "dead"}'"#, 2, "WRONG  witness: TFW_WITNESS says dead of a lock that does not exist"),
        (r#"echo '{"verdict": "alive"}'"#, 2, "WRONG  witness: TFW_WITNESS says alive of a lock"),
        ("echo oops", 2, "WRONG  witness: TFW_WITNESS does not answer: its answer is not"),
        ("echo no token >&2; exit 1", 2, "it failed (exit status: 1): no token"),
        ("/nonexistent/witness", 2, "it failed (exit status: 127)"),
    ] {
        env.set("TFW_WITNESS", witness);
        let end = locks(&env, &["doctor"]);
        assert_eq!(end.code(), Some(code), "{}", env.dump(&end));
        assert!(end.out.contains(expected), "{expected}: {}", env.dump(&end));
    }
    let question: Value = serde_json::from_str(&env.read("question")).unwrap();
    assert_eq!((&question["lock"]["who"], &question["holder"]), (&json!("nobody@no-such-host"), &Value::Null));
    assert!(question["lock"]["created"].as_str().unwrap().parse::<jiff::Timestamp>().is_ok(), "{question}");
    env.set("TFW_WITNESS", "");
    assert!(!locks(&env, &["doctor"]).out.contains("witness"));
}

#[test]
fn a_setting_with_which_no_run_starts_is_wrong() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    for (name, value) in [("TFW_TTY", "none"), ("TFW_STOP_TIMEOUT", "soon")] {
        env.set(name, value);
        let run = env.run(Subject::Tf, &["plan", "-no-color"]);
        assert_eq!(run.code(), Some(1), "{}", env.dump(&run));
        let end = locks(&env, &["doctor"]);
        assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
        assert!(end.out.contains(&format!("settings: {name} is ")), "{}", env.dump(&end));
        env.set(name, "");
    }
}

/// The host of this test decides whether it needs `TFW_CLOCK=steady`. The unit tests of the grade have the files of
/// every kind of host.
#[test]
fn the_grade_of_a_lease_is_told_only_if_there_is_one() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let lease = |env: &TestEnv| -> Vec<String> {
        let end = locks(env, &["doctor"]);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        let at = end.out.lines().position(|line| line.get(7..).is_some_and(|rest| rest.starts_with("lease: ")));
        let lines: Vec<&str> = end.out.lines().collect();
        let Some(at) = at else { return Vec::new() };
        let below = lines[at + 1..].iter().take_while(|line| line.starts_with(' '));
        std::iter::once(&lines[at]).chain(below).map(|line| (*line).to_owned()).collect()
    };
    env.set("TFW_LEASE", "off");
    env.set("TFW_CLOCK", "steady");
    assert!(lease(&env).is_empty());
    env.set("TFW_LEASE", "5m");
    let vouched = lease(&env);
    assert!(vouched[0].contains("  lease: 5 min 0 s, grade "), "{vouched:?}");
    env.set("TFW_CLOCK", "");
    let plain = lease(&env);
    let is_unknown = plain[0].contains("grade none") && plain.last().unwrap().contains("set TFW_CLOCK=steady");
    if is_unknown {
        assert!(vouched[0].starts_with("ok     lease: 5 min 0 s, grade stop: TFW_CLOCK=steady "), "{vouched:?}");
    } else {
        assert_eq!(plain, vouched);
    }
    env.set("TFW_TTY", "shared");
    let shared = lease(&env);
    assert!(shared[0].starts_with("note   lease: 5 min 0 s, grade none: "), "{shared:?}");
    assert!(shared.last().unwrap().contains("TFW_CLOCK=steady does not change that"), "{shared:?}");
}

#[test]
fn a_command_that_judges_locks_refuses_an_invalid_lease() {
    for (name, value) in
        [("TFW_LEASE", "5"), ("TFW_LEASE", "1s"), ("TFW_LEASE", "2h"), ("TFW_CLOCK", "maybe"), ("TFW_NOTICE", "aws")]
    {
        let mut env = TestEnv::empty(Lock::DynamoDb);
        env.set(name, value);
        for arguments in
            [&[][..], &["list"], &["show"], &["release"], &["audit", "--older-than", "1h"], &["recover"], &["doctor"]]
        {
            let end = locks(&env, arguments);
            assert_eq!((end.code(), end.out.as_str()), (Some(1), ""), "{arguments:?}: {end:?}");
            assert!(end.err.starts_with("tf: ") && end.err.lines().count() == 1, "{arguments:?}: {end:?}");
            assert!(end.err.contains(name) && end.err.contains(value), "{arguments:?}: {end:?}");
        }
        for arguments in [&["history"][..], &["shell-init", "bash"]] {
            let end = locks(&env, arguments);
            assert_eq!(end.code(), Some(0), "{arguments:?}: {end:?}");
        }
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
        let mut env = TestEnv::new(Lock::Both, "true");
        let _proxy = through(&mut env, move |request| if asked(request) { denied(request) } else { ProxyAction::Pass });
        let end = locks(&env, &["doctor"]);
        assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
        let wrong: Vec<&str> = end.out.lines().filter(|line| line.starts_with("WRONG  ")).collect();
        assert!(wrong.iter().any(|line| line.starts_with(&format!("WRONG  {name}: "))), "{}", end.out);
        assert!(end.out.contains(&format!("allow these credentials {name} on ")), "{}", end.out);
        for (other, _) in cases.into_iter().filter(|(other, _)| *other != name) {
            assert!(end.out.contains(&format!("ok     {other}: permitted")), "{}", end.out);
        }
    }
}

/// Refuses a request in the form of the respective service.
pub fn denied(request: &Message) -> ProxyAction {
    let said = "User: arn:aws:iam::000000000000:user/anna is not authorized";
    if request.header("x-amz-target").is_none() {
        let body = format!("<Error><Code>AccessDenied</Code><Message>{said}</Message></Error>");
        return ProxyAction::Answer(Message::answer("403 Forbidden", &body));
    }
    let body = json!({ "__type": "com.amazon.coral.service#AccessDeniedException", "message": said });
    ProxyAction::Answer(Message::answer("400 Bad Request", &body.to_string()))
}

#[test]
fn a_clock_that_is_off_is_named() {
    for (off, health) in [(0, "ok   "), (-4 * 60, "WRONG"), (4 * 60, "WRONG")] {
        let mut env = TestEnv::new(Lock::DynamoDb, "true");
        let _proxy = through(&mut env, move |request| {
            if !is_dynamodb(request, ".DeleteItem") {
                return ProxyAction::Pass;
            }
            let body = json!({
                "__type": "com.amazonaws.dynamodb.v20120810#ConditionalCheckFailedException",
                "message": "The conditional request failed",
            });
            let mut answer = Message::answer("400 Bad Request", &body.to_string());
            let now = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(off);
            answer.headers.push(("Date".into(), now.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()));
            ProxyAction::Answer(answer)
        });
        let end = locks(&env, &["doctor"]);
        assert_eq!(end.code(), Some(if off == 0 { 0 } else { 2 }), "{off}: {}", env.dump(&end));
        assert!(end.out.contains(&format!("{health}  clock: ")), "{off}: {}", end.out);
    }
}

#[test]
fn a_service_that_ignores_if_match_is_named_as_that() {
    let mut env = TestEnv::new(Lock::File, "true");
    let _proxy = through(&mut env, |request| {
        // Such a service always responds like this, whatever is stored there.
        if request.start.starts_with("DELETE ") {
            ProxyAction::Answer(Message::answer("204 No Content", ""))
        } else {
            ProxyAction::Pass
        }
    });
    let end = locks(&env, &["doctor"]);
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    assert!(end.out.contains("WRONG  If-Match: "), "{}", end.out);
}

#[test]
fn a_service_on_which_a_lock_file_does_not_lock_is_named_and_nothing_is_left_there() {
    for ignores in [false, true] {
        let mut env = TestEnv::new(Lock::File, "true");
        let change = |request: &mut Message| {
            request.headers.retain(|(name, _)| !name.eq_ignore_ascii_case("if-none-match"));
        };
        let change: fn(&mut Message) = if ignores { change } else { |_| {} };
        let proxy = Proxy::start_changing(cloud().port, change, |_| ProxyAction::Pass);
        env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
        let end = locks(&env, &["doctor"]);
        assert_eq!(end.code(), Some(if ignores { 2 } else { 0 }), "{}", env.dump(&end));
        let health = if ignores { "WRONG  If-None-Match: " } else { "ok     If-None-Match: " };
        assert!(end.out.contains(health), "{}", end.out);
        assert_eq!(end.out.contains("use_lockfile does not lock there"), ignores, "{}", end.out);
        let left = cloud().s3("GET", &format!("{}?list-type=2", env.bucket), b"").text();
        assert!(!left.contains(".tflock"), "{left}");
    }
}

#[test]
fn a_service_that_does_not_let_an_object_be_put_is_not_known() {
    let mut env = TestEnv::new(Lock::File, "true");
    let _proxy = through(
        &mut env,
        |request| if request.start.starts_with("PUT ") { denied(request) } else { ProxyAction::Pass },
    );
    let end = locks(&env, &["doctor"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert!(end.out.contains("note   If-None-Match: ") && !end.out.contains("WRONG"), "{}", end.out);
}

#[test]
fn a_table_with_another_key_is_named() {
    let env = TestEnv::new(Lock::DynamoDb, "true");
    cloud().give_another_key(&env.table);
    let end = locks(&env, &["doctor"]);
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    assert!(end.out.contains("its key is Id"), "{}", end.out);
}

#[test]
fn an_unfit_digest_and_an_errored_state_are_named_with_what_mends_them() {
    let env = unfit(Lock::DynamoDb);
    env.write("errored.tfstate", "{}");
    let end = locks(&env, &["doctor"]);
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    assert!(end.out.contains("WRONG  digest of default: ") && end.out.contains("--fix-digest default"), "{}", end.out);
    assert!(end.out.contains("state push errored.tfstate"), "{}", end.out);
}

#[test]
fn a_digest_is_fixed_when_somebody_says_so_and_terraform_is_content() {
    for lock in [Lock::DynamoDb, Lock::Both] {
        let env = unfit(lock);
        let unsaid = locks(&env, &["doctor", "--fix-digest"]);
        assert_eq!(unsaid.code(), Some(1), "{}", env.dump(&unsaid));
        let dry = locks(&env, &["doctor", "--fix-digest", "--dry-run"]);
        assert_eq!(dry.code(), Some(2), "{}", env.dump(&dry));
        assert_eq!(digest(&env), WRONG);
        let end = locks(&env, &["doctor", "--fix-digest", "default", "--yes"]);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        assert!(end.out.contains(WRONG) && end.out.contains(&digest(&env)) && end.out.contains("written at"));
        env.assert_unlocked();
        let plan = env.run(Subject::Bare, &["plan", "-no-color"]);
        assert_eq!(plan.code(), Some(0), "{}", env.dump(&plan));
    }
}

#[test]
fn a_digest_is_not_touched_while_somebody_holds_the_lock() {
    for lock in [Lock::DynamoDb, Lock::Both] {
        let env = unfit(lock);
        let theirs = env.lock_of_another();
        let end = locks(&env, &["doctor", "--fix-digest", "--yes", "--chdir", "."]);
        assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
        assert!(end.err.contains(&id_of(&theirs)), "{}", end.err);
        assert!(end.err.contains("type: tf locks list --chdir .\n"), "{}", end.err);
        assert_eq!(digest(&env), WRONG);
        assert!(!env.locks().is_empty() && env.locks().iter().all(|standing| *standing == theirs));
    }
}

#[test]
fn a_fix_that_is_killed_keeps_terraform_out_and_is_recovered() {
    for lock in [Lock::DynamoDb, Lock::Both] {
        let mut env = unfit(lock);
        let proxy =
            through(&mut env, |request| if writes_digest(request) { ProxyAction::Hold } else { ProxyAction::Pass });
        let mut command = env.command(env.bin().join("tf"));
        command.args(["locks", "doctor", "--fix-digest", "--yes"]);
        let fix = Run::start(command);
        proxy.wait_until_held();
        let refused = env.run(Subject::Bare, &APPLY);
        assert!(refused.err.contains("Error acquiring the state lock"), "{}", env.dump(&refused));
        let listed = locks(&env, &["list"]);
        assert!(listed.out.contains("alive"), "{}", env.dump(&listed));
        // A fix that has the lock does not react to SIGTERM, but SIGKILL kills it.
        kill(fix.pid(), Signal::SIGTERM).unwrap();
        kill(fix.pid(), Signal::SIGKILL).unwrap();
        assert_eq!(fix.wait().signal(), Some(9));
        proxy.let_go();
        env.assert_locked();
        let end = locks(&env, &["recover"]);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        assert!(end.out.contains("released the lock"), "{}", end.out);
        env.assert_unlocked();
    }
}

#[test]
fn without_a_backend_the_rest_is_looked_at_all_the_same() {
    let env = TestEnv::empty(Lock::DynamoDb);
    let end = locks(&env, &["doctor"]);
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    assert!(end.out.contains("ok     terraform: ") && end.out.contains("WRONG  backend: "), "{}", end.out);
}

/// The loopback services have no global tables.
pub fn as_a_global_table(env: &mut TestEnv, consistency: &str) -> Proxy {
    let described = json!({ "Table": {
        "TableName": env.table, "KeySchema": [{ "AttributeName": "LockID", "KeyType": "HASH" }],
        "Replicas": [{ "RegionName": "eu-west-1" }, { "RegionName": "us-east-1" }],
        "MultiRegionConsistency": consistency,
    } });
    through(env, move |request| {
        let asked = request.header("x-amz-target").is_some_and(|target| target.ends_with(".DescribeTable"));
        if asked { ProxyAction::Answer(Message::answer("200 OK", &described.to_string())) } else { ProxyAction::Pass }
    })
}

#[test]
fn a_global_table_is_named_as_that() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let _proxy = as_a_global_table(&mut env, "EVENTUAL");
    let end = locks(&env, &["doctor"]);
    assert!(end.out.contains("a global table (eu-west-1, us-east-1)"), "{}", env.dump(&end));
}
