//! Services that are stricter or weaker than MiniStack's defaults: one checks signatures and permissions, one ignores
//! conditions, one throttles and refuses in AWS's own words.

use std::process::Stdio;

use serde_json::json;

use super::locks_release::locks;
use crate::support::cloud::{Cloud, Server, cloud, free_port, keep, tool};
use crate::support::http::Message;
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::test_env::{WAITS, id_of, lock_json};
use crate::support::{Lock, Subject, TestEnv, http, wait_for};

/// Makes `env` use `cloud`. Creates its bucket and its table there with signed calls.
fn move_to(env: &mut TestEnv, cloud: &Cloud) {
    cloud.signed(&format!("s3.create_bucket(Bucket='{}')", env.bucket));
    cloud.signed(&format!(
        "dynamodb.create_table(TableName='{}', BillingMode='PAY_PER_REQUEST', \
         AttributeDefinitions=[dict(AttributeName='LockID', AttributeType='S')], \
         KeySchema=[dict(AttributeName='LockID', KeyType='HASH')])",
        env.table
    ));
    env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", cloud.port));
}

/// Returns how many parts of locks exist in a cloud that checks signatures.
fn halves(cloud: &Cloud, env: &TestEnv) -> usize {
    let items = cloud.signed(&format!("[i for i in dynamodb.scan(TableName='{}')['Items'] if 'Info' in i]", env.table));
    let objects = cloud.signed(&format!(
        "[o['Key'] for o in s3.list_objects_v2(Bucket='{}').get('Contents', []) if o['Key'].endswith('.tflock')]",
        env.bucket
    ));
    items.as_array().unwrap().len() + objects.as_array().unwrap().len()
}

/// Kills a terraform that holds both parts, and checks that both are released.
#[track_caller]
fn assert_killed_and_released(cloud: &Cloud, env: &TestEnv) {
    let run = env.start_apply(Subject::Tf);
    assert_eq!(halves(cloud, env), 2);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    assert_eq!(halves(cloud, env), 0);
}

#[test]
fn a_release_is_signed_as_aws_demands_and_a_refusal_is_told() {
    let cloud = Cloud::start(&[("AUTH", "true")]);
    let mut env = TestEnv::empty(Lock::Both);
    move_to(&mut env, &cloud);
    env.write_main("", WAITS);
    env.init();
    assert_killed_and_released(&cloud, &env);

    // This user may lock but not unlock: everything except the two deletes is allowed.
    let policy = json!({"Version": "2012-10-17", "Statement": [
        {"Effect": "Allow", "Action": "*", "Resource": "*"},
        {"Effect": "Deny", "Action": ["dynamodb:DeleteItem", "s3:DeleteObject"], "Resource": "*"},
    ]});
    cloud.signed("iam.create_user(UserName='locker')");
    cloud.signed(&format!("iam.put_user_policy(UserName='locker', PolicyName='p', PolicyDocument='{policy}')"));
    let key = cloud.signed("iam.create_access_key(UserName='locker')")["AccessKey"].clone();
    env.set("AWS_ACCESS_KEY_ID", key["AccessKeyId"].as_str().unwrap());
    env.set("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"].as_str().unwrap());
    let _ = std::fs::remove_file(env.directory.join("began"));
    let run = env.start_apply(Subject::Tf);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("AccessDenied") && end.err.contains("force-unlock"), "{}", env.dump(&end));
    assert_eq!(halves(&cloud, &env), 2);
    // The messages contain no credentials.
    assert!(!end.err.contains(key["SecretAccessKey"].as_str().unwrap()));
}

/// An S3 server that ignores the condition of a delete. It obeys `If-None-Match`, so terraform can lock there.
struct Localbucket {
    port: u16,
    _server: Server,
    _data: tempfile::TempDir,
}

impl Localbucket {
    fn start() -> Self {
        let (port, data) = (free_port(), tempfile::tempdir().unwrap());
        let program = tool("localbucket");
        let command = [program.to_str().unwrap(), "--port", &port.to_string(), data.path().to_str().unwrap()];
        let server = keep(&command, &[]);
        wait_for("localbucket", || http::ask(port, "GET", "/", &[], b""), || format!("nothing on port {port}"));
        Self { port, _server: server, _data: data }
    }

    fn ask(&self, method: &str, path: &str, body: &str) -> Message {
        http::ask(self.port, method, path, &[], body.as_bytes()).unwrap()
    }

    /// Returns an initialized directory whose bucket is here. Its provisioner ignores SIGTERM and runs until the test
    /// unblocks it.
    fn env(&self, lock: Lock) -> TestEnv {
        let mut env = TestEnv::empty(lock);
        env.set("AWS_ENDPOINT_URL_S3", format!("http://127.0.0.1:{}", self.port));
        assert_eq!(self.ask("PUT", &format!("/{}", env.bucket), "").status(), 200);
        env.write_main("", "(trap '' TERM; touch began; while test -e began && ! test -e go; do sleep 0.02; done)");
        env.init();
        env
    }
}

const OTHER: &str = "22222222-3333-4444-5555-666666666666";

#[test]
fn on_a_service_that_ignores_conditions_ours_goes_and_anothers_stands() {
    let server = Localbucket::start();
    for replaced in [false, true] {
        let env = server.env(Lock::File);
        let place = format!("/{}.tflock", env.path());
        let run = env.start_apply(Subject::Tf);
        assert_eq!(server.ask("GET", &place, "").status(), 200);
        run.kill_terraform();
        let theirs = lock_json(OTHER, &env.path());
        if replaced {
            env.wait_for_trace("ending ");
            server.ask("PUT", &place, &theirs);
        }
        env.unblock();
        let end = run.wait();
        let left = server.ask("GET", &place, "");
        if replaced {
            assert_eq!(left.text(), theirs, "{}", env.dump(&end));
        } else {
            assert_eq!(left.status(), 404, "{}", env.dump(&end));
        }
    }
}

#[test]
fn on_a_service_that_ignores_conditions_only_a_table_protects_a_lock_taken_between_the_read_and_the_delete() {
    let server = Localbucket::start();
    for lock in [Lock::File, Lock::Both] {
        let mut env = server.env(lock);
        let place = format!("/{}.tflock", env.path());
        // With both parts, the item is deleted first.
        let (upstream, endpoint) = match lock {
            Lock::Both => (cloud().port, "AWS_ENDPOINT_URL_DYNAMODB"),
            _ => (server.port, "AWS_ENDPOINT_URL_S3"),
        };
        let proxy = Proxy::start(upstream, |request| {
            // With a lease, a keeper deletes its test object as well.
            let is_lock = request.start.contains("tfstate.tflock");
            let delete = request.asks_for("DeleteItem") || (request.start.starts_with("DELETE ") && is_lock);
            if delete && request.is_ours() { ProxyAction::Hold } else { ProxyAction::Pass }
        });
        env.set(endpoint, format!("http://127.0.0.1:{}", proxy.port));
        let run = env.start_apply(Subject::Tf);
        run.kill_terraform();
        env.unblock();
        proxy.wait_until_held();
        let theirs = lock_json(OTHER, &env.path());
        server.ask("PUT", &place, &theirs);
        if lock == Lock::Both {
            cloud().put_item(&env.table, &env.path(), &theirs);
        }
        proxy.let_go();
        let end = run.wait();
        let left = server.ask("GET", &place, "");
        if lock == Lock::Both {
            assert_eq!(left.text(), theirs, "{}", env.dump(&end));
            assert_eq!(cloud().item(&env.table, &env.path()), Some(theirs), "{}", env.dump(&end));
            // A lock with the record of a lease is deleted in the other order: then its object was deleted before theirs
            // came.
            let is_object_first =
                env.trace().lines().any(|line| line.contains(" deleted ") && line.contains(" in S3 "));
            assert!(is_object_first || !end.err.contains("released the lock"), "{}", env.dump(&end));
        } else {
            // docs/proof.md, "What it cannot know".
            assert_eq!(left.status(), 404, "{}", env.dump(&end));
        }
    }
}

#[test]
fn a_service_that_ignores_conditions_is_reported_and_with_never_nothing_is_deleted_there() {
    let server = Localbucket::start();
    let mut env = server.env(Lock::File);
    let end = locks(&env, &["doctor"]);
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    let wrong: Vec<&str> = end.out.lines().filter(|line| line.starts_with("WRONG  ")).collect();
    assert!(matches!(wrong[..], [line] if line.starts_with("WRONG  If-Match: ")), "{}", env.dump(&end));
    assert!(end.out.contains("a DynamoDB table") && end.out.contains("TFW_RELEASE=never"), "{}", env.dump(&end));
    let listed = server.ask("GET", &format!("/{}?list-type=2", env.bucket), "").text();
    assert!(!listed.contains("<Key>"), "{listed}");

    env.set("TFW_RELEASE", "never");
    let place = format!("/{}.tflock", env.path());
    let run = env.start_apply(Subject::Tf);
    let ours = server.ask("GET", &place, "").text();
    run.kill_terraform();
    env.unblock();
    let end = run.wait();
    assert_eq!(server.ask("GET", &place, "").text(), ours, "{}", env.dump(&end));
    assert!(end.err.contains(&id_of(&ours)) && !end.err.contains("released the lock"), "{}", env.dump(&end));
}

#[test]
fn a_throttled_or_cut_release_succeeds_and_a_denied_one_is_told() {
    let port = free_port();
    // MiniStack may lose a response on a reused connection. The proxy opens a connection for each request.
    let proxy = Proxy::start(cloud().port, |_| ProxyAction::Pass);
    let (upstream, own) = (format!("http://127.0.0.1:{}", proxy.port), port.to_string());
    let _server =
        keep(&[tool("microburst").to_str().unwrap(), "-u", &upstream, "-p", &own, "--host", "127.0.0.1"], &[]);
    let rules = |rules: serde_json::Value| {
        http::ask(
            port,
            "POST",
            "/_microburst/rules",
            &[("Content-Type", "application/json")],
            rules.to_string().as_bytes(),
        )
        .filter(|answer| answer.status() == 200)
    };
    wait_for("microburst", || rules(json!([])), || format!("nothing on port {port}"));
    let fault = |response: serde_json::Value| json!([{"service": "dynamodb", "operation": "DeleteItem", "response": response, "times": 2}]);
    let refusal = |code: &str| json!({"error": {"code": code, "status": 400, "message": "as the test says"}});
    for (name, response, released) in [
        ("throttled", refusal("ProvisionedThroughputExceededException"), true),
        ("connection closed", json!({"reset": true}), true),
        ("reply cut", json!({"abort_frac": 0.01}), true),
        ("denied", refusal("AccessDeniedException"), false),
    ] {
        let mut env = TestEnv::new(Lock::DynamoDb, WAITS);
        env.set("AWS_ENDPOINT_URL_DYNAMODB", format!("http://127.0.0.1:{port}"));
        rules(json!([])).unwrap();
        let run = env.start_apply(Subject::Tf);
        let mut rule = fault(response.clone());
        if name == "connection closed" {
            rule = json!([{"service": "dynamodb", "operation": "DeleteItem", "reset": true, "times": 2}]);
        } else if name != "reply cut" {
            rule[0]["error"] = response["error"].clone();
            rule[0].as_object_mut().unwrap().remove("response");
        }
        assert!(rules(rule.clone()).is_some(), "{name}: {rule}");
        run.kill_terraform();
        let end = run.wait();
        assert_eq!(env.locks().is_empty(), released, "{name}: {}", env.dump(&end));
        assert_eq!(end.err.contains("released the lock"), released, "{name}: {}", env.dump(&end));
        if !released {
            assert!(end.err.contains("AccessDeniedException: as the test says"), "{}", end.err);
        }
    }
}

#[test]
fn a_lock_is_looked_for_where_the_run_took_it() {
    // MiniStack separates tables by region, as AWS does. The backend is rewritten during the run.
    let env = TestEnv::new(Lock::DynamoDb, WAITS);
    let run = env.start_apply(Subject::Tf);
    let cached = env.read(".terraform/terraform.tfstate");
    let moved = cached.replace("us-east-1", "eu-west-1");
    assert_ne!(cached, moved);
    env.write(".terraform/terraform.tfstate", &moved);
    run.kill_terraform();
    let end = run.wait();
    // The backend as it was before the run is tried as well, and the lock is there.
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
}

#[test]
fn credentials_of_a_profile_in_an_odd_place_are_followed() {
    let cloud = Cloud::start(&[("AUTH", "true")]);
    let mut env = TestEnv::empty(Lock::Both);
    move_to(&mut env, &cloud);
    env.write("odd-credentials", "[deploy]\naws_access_key_id = test\naws_secret_access_key = test\n");
    let file = env.directory.join("odd-credentials").display().to_string();
    env.write_main("", WAITS);
    let text = env.read("main.tf").replacen(
        "region = ",
        &format!("profile = \"deploy\"\nshared_credentials_files = [\"{file}\"]\nregion = "),
        1,
    );
    env.write("main.tf", &text);
    env.set("AWS_ACCESS_KEY_ID", "").set("AWS_SECRET_ACCESS_KEY", "");
    let mut init = env.command(env.bin().join("terraform"));
    init.args(["init", "-no-color"]).stdin(Stdio::null());
    let output = init.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_killed_and_released(&cloud, &env);
}
