//! "A terraform that leaves its operation has died, whatever its exit code": at two interrupts it exits with code 1,
//! while its provisioners and its requests continue.

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::given_back::{is_dynamodb, takes_file, takes_item, through};
use super::in_flight::wait_for_the_wait;
use super::interrupted_once::slow_to_plan;
use crate::support::http::Message;
use crate::support::process::{Run, terraform_below};
use crate::support::proxy::ProxyAction;
use crate::support::test_env::{APPLY, terraform};
use crate::support::{Ended, Lock, Subject, TestEnv, wait_for};

fn writes_state(request: &Message) -> bool {
    request.start.starts_with("PUT ") && request.start.contains("prod.tfstate") && !request.start.contains(".tflock")
}

/// Whether this is terraform's own delete, which has no condition. A delete of `tf` has one.
fn unlocks(request: &Message) -> bool {
    let item = is_dynamodb(request, ".DeleteItem") && !request.text().contains("ConditionExpression");
    item || (request.start.starts_with("DELETE ") && request.header("if-match").is_none())
}

/// Tests several kinds of lock at the same time, because the delays add up.
fn for_each(kinds: &[Lock], promise: impl Fn(Lock) + Sync) {
    std::thread::scope(|scope| {
        for lock in kinds {
            let promise = &promise;
            scope.spawn(move || promise(*lock));
        }
    });
}

/// Sends two interrupts that do not come through `tf`, as if `killall terraform` was typed twice.
fn interrupt_twice(run: &Run) {
    let terraform = terraform_below(run.pid());
    kill(terraform, Signal::SIGTERM).unwrap();
    run.wait_for_out("Interrupt received");
    kill(terraform, Signal::SIGTERM).unwrap();
    run.wait_for_err("Two interrupts");
}

#[track_caller]
fn assert_colleague_is_refused(env: &TestEnv) {
    let end = env.run(Subject::Bare, &["plan", "-no-color"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(end.err.contains("Error acquiring the state lock"), "{}", env.dump(&end));
}

#[track_caller]
fn assert_released(env: &TestEnv, end: &Ended) {
    assert_eq!(end.code(), Some(1), "{}", env.dump(end));
    assert!(end.err.contains("released the lock"), "{}", env.dump(end));
    env.assert_unlocked();
}

#[test]
fn its_lock_stands_until_its_write_of_the_state_has_landed_and_its_workers_are_dead() {
    for_each(&Lock::ALL, |lock| {
        let mut env = TestEnv::empty(lock);
        env.write("worker", "trap '' TERM INT HUP\nwhile :; do echo work >> work; sleep 0.02; done\n");
        env.write_main("", "bash worker > /dev/null 2>&1 & while ! test -e work; do sleep 0.02; done");
        env.init();
        let proxy =
            through(&mut env, |request| if writes_state(request) { ProxyAction::Hold } else { ProxyAction::Pass });
        let run = env.start(Subject::Tf, &APPLY);
        proxy.wait_until_held();
        interrupt_twice(&run);
        env.wait_for_trace("waiting for a write that may be on its way");
        let work = env.read("work").len();
        env.assert_locked();
        assert_colleague_is_refused(&env);
        assert_eq!(env.read("work").len(), work, "a worker lives on\n{}", env.trace());
        proxy.let_go();
        assert!(proxy.wait_until_delivered().contains("200"));
        assert!(env.state().is_some(), "{}", env.trace());
        assert_released(&env, &run.wait());
    });
}

#[test]
fn its_lock_stands_until_its_own_unlock_has_landed() {
    for_each(&[Lock::DynamoDb, Lock::File], |lock| {
        let mut env = TestEnv::new(lock, "true");
        let proxy = through(&mut env, |request| if unlocks(request) { ProxyAction::Hold } else { ProxyAction::Pass });
        let run = env.start(Subject::Tf, &APPLY);
        proxy.wait_until_held();
        interrupt_twice(&run);
        env.wait_for_trace("waiting for a write that may be on its way");
        env.assert_locked();
        assert_colleague_is_refused(&env);
        // It lands before any other run can have taken the lock.
        proxy.let_go();
        proxy.wait_until_delivered();
        let end = run.wait();
        assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
        env.assert_unlocked();
    });
}

#[test]
fn a_lock_that_was_never_begun_to_be_unlocked_is_released_once_all_is_dead() {
    let (env, proxy) = slow_to_plan();
    let run = env.start(Subject::Tf, &APPLY);
    proxy.wait_until_held();
    interrupt_twice(&run);
    let end = run.wait();
    assert!(env.trace().contains("died: true"), "{}", env.dump(&end));
    assert!(!env.trace().contains("waiting for a write"), "nothing was written: {}", env.dump(&end));
    assert_released(&env, &end);
}

#[test]
fn a_lock_request_that_it_left_unanswered_is_released_when_it_lands() {
    for_each(&[Lock::DynamoDb, Lock::File], |lock| {
        let mut env = TestEnv::new(lock, "true");
        let proxy = through(&mut env, |request| {
            if takes_item(request) || takes_file(request) { ProxyAction::Hold } else { ProxyAction::Pass }
        });
        let run = env.start(Subject::Tf, &APPLY);
        proxy.wait_until_held();
        interrupt_twice(&run);
        let end = run.wait();
        assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
        proxy.let_go();
        proxy.wait_until_delivered();
        env.wait_for_locked();
        // This works in any directory, because the pending request contains its location.
        let mut recover = env.command(env.bin().join("tf"));
        recover.args(["locks", "recover"]).current_dir("/");
        let end = Run::start(recover).wait();
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        assert!(end.out.contains("appeared after its terraform had died"), "{}", env.dump(&end));
        env.assert_unlocked();
    });
}

/// A 504 from a proxy is not a response of the service, and the request may still land.
#[test]
fn a_lock_request_that_it_gave_up_is_released_when_it_lands() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let text = env.read("main.tf").replace("use_path_style = true", "use_path_style = true\nmax_retries = 1");
    env.write("main.tf", &text);
    let end = env.run(Subject::Bare, &["init", "-reconfigure", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    let asked = std::sync::Arc::new(std::sync::Mutex::new(None));
    let seen = std::sync::Arc::clone(&asked);
    let _proxy = through(&mut env, move |request| {
        if !takes_item(request) {
            return ProxyAction::Pass;
        }
        *seen.lock().unwrap() = Some(request.text());
        ProxyAction::Answer(Message::answer("504 Gateway Timeout", ""))
    });
    let end = env.run(Subject::Tf, &APPLY);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    let request: serde_json::Value = serde_json::from_str(asked.lock().unwrap().as_ref().unwrap()).unwrap();
    env.put_lock(request["Item"]["Info"]["S"].as_str().unwrap());
    let end = env.run(Subject::Tf, &["locks", "recover"]);
    assert!(end.out.contains("appeared after its terraform had died"), "{}", env.dump(&end));
    env.assert_unlocked();
}

#[test]
fn bare_terraform_leaves_its_lock_in_the_same_places() {
    let (env, proxy) = slow_to_plan();
    let run = env.start(Subject::Bare, &APPLY);
    proxy.wait_until_held();
    kill(run.pid(), Signal::SIGTERM).unwrap();
    run.wait_for_out("Interrupt received");
    kill(run.pid(), Signal::SIGTERM).unwrap();
    assert_eq!(run.wait().code(), Some(1));
    env.assert_locked();
}

/// Terraform does not retry an unlock that the service refuses: it exits by itself, with code 1.
#[test]
fn a_lock_whose_unlock_was_refused_is_kept_as_long_as_something_of_the_run_lives() {
    let mut env = TestEnv::empty(Lock::DynamoDb);
    env.write_main("", "while ! test -e go; do sleep 0.02; done > /dev/null 2>&1 & touch began");
    env.init();
    let _proxy = through(&mut env, |request| {
        if unlocks(request) {
            ProxyAction::Answer(Message::answer("400 Bad Request", REFUSED))
        } else {
            ProxyAction::Pass
        }
    });
    let run = env.start(Subject::Tf, &APPLY);
    let end = run.wait();
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(end.err.contains("was not released") && end.err.contains("are still running"), "{}", env.dump(&end));
    env.assert_locked();
    // The next run finds the same: the process that was left running on purpose is still running.
    let end = env.run(Subject::Tf, &["plan", "-no-color"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    env.assert_locked();
    env.unblock();
    wait_for(
        "the next tf to release it",
        || {
            let end = env.run(Subject::Tf, &["locks", "recover"]);
            (end.code() == Some(0) && env.locks().is_empty()).then_some(())
        },
        || env.trace(),
    );
}

/// A provisioner starts terraform without `tf`, and leaves it running while it waits for the lock of the run. That
/// terraform writes into the log of the run, after the `tf` of the run has ended.
#[test]
fn the_write_of_a_terraform_that_outlives_its_tf_is_waited_for() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    env.write_main(
        "",
        &format!(
            "if test -n \"$NESTED\"; then touch began; while test -e began && ! test -e go; do sleep 0.02; done; exit; fi\n\
             NESTED=1 '{}' apply -auto-approve -no-color -replace terraform_data.a -lock-timeout 60s > nested.out 2>&1 &\n\
             echo $! > nested.pid\n\
             while ! grep -q 'Acquiring state lock' nested.out; do sleep 0.02; done\n",
            terraform().display()
        ),
    );
    // The first write of the state is that of the run itself.
    let is_nested = env.directory.join("began");
    let proxy = through(&mut env, move |request| {
        if writes_state(request) && is_nested.exists() { ProxyAction::Hold } else { ProxyAction::Pass }
    });
    let run = env.start(Subject::Tf, &APPLY);
    let end = run.wait();
    assert_eq!(end.code(), Some(0), "{}{}", env.dump(&end), env.read("nested.out"));
    env.wait_for_file("began");
    env.unblock();
    proxy.wait_until_held();
    let nested = Pid::from_raw(env.read("nested.pid").trim().parse().unwrap());
    kill(nested, Signal::SIGKILL).unwrap();
    let next = env.start(Subject::Tf, &["plan", "-no-color"]);
    wait_for_the_wait(&env, &next, || env.trace().contains("waiting for a write"));
    env.assert_locked();
    proxy.let_go();
    assert!(proxy.wait_until_delivered().contains(" 200 "));
    env.assert_locked();
    let end = next.wait();
    assert!(end.err.contains("released the lock that an earlier run left"), "{}", env.dump(&end));
    env.assert_unlocked();
}

const REFUSED: &str = r#"{"__type":"com.amazonaws.dynamodb.v20120810#AccessDeniedException","Message":"no"}"#;
