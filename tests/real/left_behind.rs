//! What else an abrupt end leaves: a digest that no longer matches the state, a state that could not be written. `tf`
//! reports both.

use super::given_back::through;
use super::survived::killed_whole;
use crate::support::http::Message;
use crate::support::proxy::ProxyAction;
use crate::support::test_env::{APPLY, WAITS};
use crate::support::{Lock, Subject, TestEnv};

pub fn writes_digest(request: &Message) -> bool {
    request.header("x-amz-target").is_some_and(|target| target.ends_with(".PutItem"))
        && String::from_utf8_lossy(&request.body).contains("-md5")
}

/// Terraform writes the state, and then its digest. If it is killed between the two, every later command fails.
#[test]
fn a_digest_that_no_longer_fits_is_named_with_the_command_that_mends_it() {
    for lock in [Lock::DynamoDb, Lock::Both] {
        let mut env = TestEnv::new(lock, "true");
        let end = env.run(Subject::Bare, &APPLY);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        let proxy =
            through(&mut env, |request| if writes_digest(request) { ProxyAction::Hold } else { ProxyAction::Pass });
        let run = env.start(Subject::Tf, &["apply", "-auto-approve", "-no-color", "-replace=terraform_data.a"]);
        proxy.wait_until_held();
        run.kill_terraform();
        let end = run.wait();
        env.assert_unlocked();
        assert!(end.err.contains("released the lock") && end.err.contains("digest does not match"), "{}", end.err);
        assert!(end.err.contains("tf locks doctor --fix-digest"), "{}", end.err);
        // The message is true: terraform itself refuses the next command.
        let next = env.run(Subject::Bare, &["plan", "-no-color"]);
        assert_eq!(next.code(), Some(1), "{}", env.dump(&next));
        assert!(next.err.contains("does not have the expected content"), "{}", next.err);
    }
}

#[test]
fn a_digest_that_fits_is_not_spoken_of() {
    let env = TestEnv::new(Lock::DynamoDb, WAITS);
    let run = env.start_apply(Subject::Tf);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock") && !end.err.contains("digest"), "{}", end.err);
}

#[test]
fn a_state_that_terraform_could_not_write_is_named_after_an_abrupt_end() {
    let env = TestEnv::new(
        Lock::DynamoDb,
        "echo {} > errored.tfstate; touch began; while test -e began; do sleep 0.02; done",
    );
    let run = env.start_apply(Subject::Tf);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("errored.tfstate exists"), "{}", end.err);
    assert!(end.err.contains("terraform state push errored.tfstate"), "{}", end.err);
    // A run that exits successfully does not mention it.
    std::fs::remove_file(env.directory.join("began")).unwrap();
    let run = env.start(Subject::Tf, &["plan", "-no-color"]);
    let end = run.wait();
    assert!(end.code() == Some(0) && !end.err.contains("errored"), "{}", env.dump(&end));
}

#[test]
fn the_next_tf_names_them_too() {
    let env = killed_whole(Lock::DynamoDb);
    env.write("errored.tfstate", "{}");
    let digest = serde_json::json!({"TableName": env.table, "Item": {
        "LockID": {"S": format!("{}-md5", env.path())}, "Digest": {"S": "00000000000000000000000000000000"}}});
    crate::support::cloud::cloud().dynamodb("PutItem", &digest);
    let end = env.run(Subject::Tf, &["plan", "-no-color"]);
    assert!(end.err.contains("digest does not match") && end.err.contains("errored.tfstate exists"), "{}", end.err);
    env.assert_unlocked();
}
