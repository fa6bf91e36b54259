//! However many locks a log names, the guardian receives the messages of `tf`, and releases the run's own lock.

use std::fs;

use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use super::survived::{assert_nothing_left, records};
use crate::support::process::{log_path, terraform_below};
use crate::support::processes::{KillOnDrop, home, wait_until_ours_are_gone, wait_until_unlocked};
use crate::support::test_env::{APPLY, WAITS};
use crate::support::{Lock, Subject, TestEnv, wait_for};

/// Writes 3,000 locks that were acquired and released to terraform's log, as a migration of so many workspaces does.
const MIGRATES: &str = r#"
import datetime, os
now = lambda: datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
common = "tf_backend.req_id=r tf_backend.s3.bucket=bkt tf_backend.s3.path=" + "k" * 200
def line(message, number, more=""):
    return f"{now()} [INFO]  backend-s3: {message}: tf_backend.lock.id={number:08x}-1111-2222-3333-444444444444 {more}{common}\n"
with open(os.environ["TF_LOG_PATH"], "a") as log:
    for number in range(3000):
        more = "tf_backend.lock.operation=init tf_backend.lock.path=bkt/" + "k" * 200 + " "
        log.write(line("Attempting to lock remote state (DynamoDB only)...", number, more))
        log.write(line("Locked remote state (DynamoDB only)", number, more))
        log.write(line("Unlocked remote state (DynamoDB only)", number))
"#;

#[test]
fn thousands_of_locks_in_one_log_do_not_silence_the_guardian() {
    let python = crate::support::cloud::tool("python3");
    let command = format!("{} migrates.py && {WAITS}", python.display());
    let env = TestEnv::new(Lock::DynamoDb, &command);
    env.write("migrates.py", MIGRATES);
    let _kill_on_drop = KillOnDrop(home(&env));
    let run = env.start_apply(Subject::Tf);
    let terraform = terraform_below(run.pid());
    let length = fs::metadata(log_path(terraform)).unwrap().len();
    let written = || {
        let [path] = records(&env).try_into().ok()?;
        let record: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        record["offset"].as_u64()
    };
    // The last part, as much as tf sends at once, may not have been sent yet.
    let whole = || written().filter(|offset| offset + (1 << 16) > length);
    wait_for("the whole log in the journal", whole, || format!("{:?} of {length}\n{}", written(), env.trace()));
    run.send(Signal::SIGKILL);
    assert_eq!(run.wait().signal(), Some(9));
    env.wait_for_trace("guardian: tf is gone");
    kill(terraform, Signal::SIGKILL).unwrap();
    wait_until_unlocked(&env);
    wait_until_ours_are_gone(&env);
    assert_nothing_left(&env);
}

#[test]
fn a_run_whose_log_named_thousands_of_locks_ends_its_guardian() {
    let python = crate::support::cloud::tool("python3");
    let env = TestEnv::new(Lock::DynamoDb, &format!("{} migrates.py", python.display()));
    env.write("migrates.py", MIGRATES);
    let end = env.run(Subject::Tf, &APPLY);
    assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", env.dump(&end));
    assert!(!env.trace().contains("the guardian does not end"), "{}", env.trace());
}
