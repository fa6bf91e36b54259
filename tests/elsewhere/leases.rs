//! The lease of a run whose terraform logs less about its lock than Terraform does since 1.10.

use nix::sys::signal::Signal;

use super::versions::{program, test_env};
use crate::support::processes::{KillOnDrop, home, is_named, ours, wait_until_all_is_gone};
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::test_env::WAITS;
use crate::support::{Lock, Run, Subject, TestEnv, cloud, wait_for};

/// This version logs that it begins to release its lock, and not that it has released it.
const LOGS_NO_END: &str = "terraform-1.9.8";

fn leased(name: &str, lock: Lock, length: &str) -> TestEnv {
    let mut env = test_env(name, lock, WAITS);
    env.set("TFW_LEASE", length).set("TFW_CLOCK", "steady");
    env
}

/// Whether the run still has a fuse, which can stop terraform.
fn has_fuse(env: &TestEnv) -> bool {
    ours(env).into_iter().any(|pid| is_named(pid, "tf-fuse") || is_named(pid, "tf-spare"))
}

/// Starts a script in place of terraform that runs it, and then `more`. Returns when its lock has a lease.
fn start_with(more: &str, env: &mut TestEnv) -> Run {
    let terraform = program(LOGS_NO_END);
    env.stand_in("wrapper", &format!("#!/bin/sh\n'{}' \"$@\" || exit\n{more}\n", terraform.display()));
    let run = env.start_apply(Subject::Tf);
    env.wait_for_lease();
    run
}

/// Waits until the run has no fuse, so that nothing can stop or kill it any more. At its deadline a fuse ends too, but
/// it stops or kills the run first.
fn wait_until_unfenced(env: &TestEnv) {
    wait_for("the end of the fuses", || (!has_fuse(env)).then_some(()), || env.trace());
}

/// A fuse that is left would stop the second terraform at the deadline of the first lock.
#[test]
fn what_follows_a_release_that_is_not_logged_is_neither_stopped_nor_killed() {
    let mut env = leased(LOGS_NO_END, Lock::DynamoDb, "12s");
    let again = format!("'{}' apply -auto-approve -no-color -replace=terraform_data.a", program(LOGS_NO_END).display());
    let run = start_with(&format!("rm go began\n{again}"), &mut env);
    env.unblock();
    run.wait_for_err("has no lease: a run has a lease only for its first lock");
    wait_until_unfenced(&env);
    assert!(!env.trace().contains("the fuse is gone"), "{}", env.trace());
    env.unblock();
    let end = run.wait();
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert_eq!(end.err.matches("tf:").count(), 1, "{}", env.dump(&end));
    env.assert_unlocked();
    wait_until_all_is_gone(&env);
}

#[test]
fn nor_is_it_killed_when_tf_dies() {
    let mut env = leased(LOGS_NO_END, Lock::DynamoDb, "12s");
    let _kill_on_drop = KillOnDrop(home(&env));
    let works = "trap '' INT\ntouch works\nwhile ! test -e over; do sleep 0.05; done\ntouch worked";
    let run = start_with(works, &mut env);
    // It cannot let the lease go itself.
    run.send(Signal::SIGSTOP);
    env.unblock();
    env.wait_for_file("works");
    run.send(Signal::SIGKILL);
    wait_until_unfenced(&env);
    env.write("over", "");
    wait_until_all_is_gone(&env);
    assert!(env.exists("worked"), "{}", env.trace());
    env.assert_unlocked();
}

/// The delete is unconditional, so it must not arrive when another run has the lock.
#[test]
fn a_release_that_hangs_in_the_network_stays_fenced() {
    let mut env = leased(LOGS_NO_END, Lock::DynamoDb, "12s");
    let proxy = Proxy::start(cloud::cloud().port, |request| {
        let deletes = request.header("x-amz-target").is_some_and(|target| target.ends_with(".DeleteItem"));
        if deletes { ProxyAction::Hold } else { ProxyAction::Pass }
    });
    env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    let run = env.start_apply(Subject::Tf);
    env.wait_for_lease();
    env.unblock();
    proxy.wait_until_held();
    let renewals = || env.trace().matches("the keeper: Renewed").count();
    let before = renewals();
    wait_for("renewals", || (renewals() > before + 3).then_some(()), || env.trace());
    assert!(has_fuse(&env), "{}", env.trace());
    proxy.let_go();
    let end = run.wait();
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert!(!end.err.contains("tf:"), "{}", env.dump(&end));
    env.assert_unlocked();
    wait_until_all_is_gone(&env);
}

/// This version logs that it has a lock, and not which one.
const LOGS_NO_ID: &str = "tofu-1.6.2";

#[test]
fn a_run_whose_log_does_not_name_its_lock_says_once_that_it_has_no_lease() {
    let env = leased(LOGS_NO_ID, Lock::DynamoDb, "4s");
    let run = env.start_apply(Subject::Tf);
    run.wait_for_err("tf: this run goes on without a lease: OpenTofu 1.6.2 does not log the ID of its lock");
    env.unblock();
    let end = run.wait();
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert_eq!(end.err.matches("without a lease").count(), 1, "{}", env.dump(&end));
    env.assert_unlocked();
}

/// Its log is the same as with the S3 backend.
#[test]
fn nothing_is_said_about_a_lease_of_a_lock_in_another_backend() {
    let mut env = TestEnv::empty(Lock::DynamoDb);
    env.set("TFW_TERRAFORM", program(LOGS_NO_ID)).set("TFW_LEASE", "4s").set("TFW_CLOCK", "steady");
    env.write("main.tf", "resource \"terraform_data\" \"a\" {}\n");
    for arguments in [&["init", "-no-color"][..], &["apply", "-auto-approve", "-no-color"]] {
        let end = env.run(Subject::Tf, arguments);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        assert!(end.err.is_empty(), "{}", env.dump(&end));
    }
}
