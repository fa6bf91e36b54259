//! "A process of a lease that is stopped, slow or killed at a bad moment delays a run, and does nothing worse."

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::signal::{Signal, kill, killpg};
use serde_json::Value;

use super::given_back::{is_dynamodb, takes_item, through};
use super::leased::{
    ends_well, leased, start, suspended_at_a_terminal, wait_for_renewal_after, wait_until_it_goes_on,
    wait_until_stopped,
};
use crate::support::process::{state, terraform_below};
use crate::support::processes::{
    guardian_of, is_gone, named, tf_of, wait_until_all_is_gone, wait_until_gone, wait_until_unlocked,
};
use crate::support::proxy::ProxyAction;
use crate::support::{Lock, Subject};

/// The guardian looks at the fuse, and then stops terraform's group. In between, `tf` may have been continued, and may have
/// continued terraform. Here, the test sends the signal that comes too late.
#[test]
fn a_late_stop_of_the_guardian_neither_stops_terraform_for_ever_nor_suspends_tf() {
    let env = leased(Lock::DynamoDb, "1m");
    let (mut terminal, terraform) = suspended_at_a_terminal(&env);
    env.wait_for_trace("guardian: tf is suspended: true");
    let guardian = guardian_of(&env, tf_of(&env));
    kill(guardian, Signal::SIGSTOP).unwrap();
    wait_until_stopped(&env, guardian);
    terminal.type_in("fg\n");
    wait_until_it_goes_on(&env, terraform);
    killpg(terraform, Signal::SIGSTOP).unwrap();
    env.wait_for_trace("terraform was stopped by SIGSTOP");
    kill(guardian, Signal::SIGCONT).unwrap();
    wait_until_it_goes_on(&env, terraform);
    env.unblock();
    terminal.wait_for("Apply complete!");
    assert_eq!(terminal.screen().matches("Stopped").count(), 1, "{}\n{}", terminal.screen(), env.trace());
    wait_until_unlocked(&env);
}

/// `tf` continues terraform when it is continued itself. But its guardian knows that the lock is lost.
#[test]
fn a_suspended_terraform_whose_lock_another_run_holds_is_killed_and_not_continued() {
    for lock in Lock::ALL {
        let env = leased(lock, "1m");
        let (mut terminal, terraform) = suspended_at_a_terminal(&env);
        env.wait_for_trace("guardian: tf is suspended, and the guardian renews the lease, too");
        let before = env.state();
        let other = env.lock_of_another();
        env.delete_lock();
        env.put_lock(&other);
        env.unblock();
        env.wait_for_trace("guardian: tf must know that the lock is lost");
        terminal.type_in("fg\n");
        terminal.wait_for("the lock is held by another run now");
        wait_until_gone(&env, terraform);
        assert_eq!(env.state(), before);
        assert!(env.locks().iter().all(|lock| *lock == other), "{:?}", env.locks());
        drop(terminal);
        wait_until_all_is_gone(&env);
    }
}

#[test]
fn tf_handles_signals_while_its_fuses_do_not_end() {
    let mut env = leased(Lock::DynamoDb, "1m");
    env.stand_in("wrapper", "#!/bin/bash\nterraform \"$@\"\ntouch second\nsleep 1000\n");
    let run = start(&env);
    let fuses = ["tf-fuse", "tf-spare"].map(|name| named(&env, name));
    for fuse in fuses {
        kill(fuse, Signal::SIGSTOP).unwrap();
    }
    env.unblock();
    env.wait_for_trace("the lock of the lease is gone");
    env.wait_for_file("second");
    run.send(Signal::SIGTERM);
    env.wait_for_trace("got SIGTERM");
    assert_eq!(fuses.map(state), [Some('T'); 2], "{}", env.trace());
    run.wait();
    wait_until_all_is_gone(&env);
    env.assert_unlocked();
}

#[test]
fn a_stopped_fuse_that_replaces_another_is_replaced_too() {
    for lock in [Lock::DynamoDb, Lock::File] {
        let env = leased(lock, "20s");
        let run = start(&env);
        let terraform = terraform_below(run.pid());
        let (fuse, spare) = (named(&env, "tf-fuse"), named(&env, "tf-spare"));
        kill(spare, Signal::SIGSTOP).unwrap();
        kill(fuse, Signal::SIGKILL).unwrap();
        run.wait_for_err("the lease was renewed, and terraform goes on");
        wait_until_it_goes_on(&env, terraform);
        assert!(is_gone(spare), "{}", env.trace());
        ends_well(&env, run);
    }
}

#[test]
fn a_fuse_that_is_stopped_before_it_has_a_deadline_is_replaced() {
    let env = leased(Lock::Both, "20s");
    env.lock_of_another();
    let run = env.start(Subject::Tf, &["apply", "-auto-approve", "-no-color", "-lock-timeout=2m"]);
    run.wait_for_out("Acquiring state lock");
    let (fuse, spare) = (named(&env, "tf-fuse"), named(&env, "tf-spare"));
    kill(fuse, Signal::SIGSTOP).unwrap();
    env.delete_lock();
    env.wait_for_began(&run);
    let first = wait_for_renewal_after(&env, &Value::Null);
    assert_eq!(first["fence"], "stop", "{first}\n{}", env.trace());
    assert!(is_gone(fuse), "{}", env.trace());
    assert_eq!(named(&env, "tf-fuse"), spare, "{}", env.trace());
    ends_well(&env, run);
}

/// Otherwise the next keeper takes the refusal for that of a lease that exists, and terraform is asked to stop.
#[test]
fn a_refusal_after_a_keeper_has_died_before_its_first_renewal_means_that_there_is_no_lease() {
    let mut env = leased(Lock::DynamoDb, "4s");
    let (is_locked, is_holding) = (AtomicBool::new(false), Arc::new(AtomicBool::new(true)));
    let holding = is_holding.clone();
    let proxy = through(&mut env, move |request| {
        if request.text().contains("\"beat\"") {
            return ProxyAction::Answer(request.denied());
        }
        is_locked.fetch_or(takes_item(request), Ordering::SeqCst);
        let reads = request.is_ours() && is_dynamodb(request, ".GetItem") && is_locked.load(Ordering::SeqCst);
        if reads && holding.load(Ordering::SeqCst) { ProxyAction::Hold } else { ProxyAction::Pass }
    });
    let run = env.start_apply(Subject::Tf);
    proxy.wait_until_held();
    let keeper = named(&env, "tf-keeper");
    is_holding.store(false, Ordering::SeqCst);
    kill(keeper, Signal::SIGKILL).unwrap();
    wait_until_gone(&env, keeper);
    proxy.let_go();
    run.wait_for_err("this run goes on without a lease");
    env.unblock();
    let end = run.wait();
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert!(!end.err.contains("asked to stop"), "{}", env.dump(&end));
    env.assert_unlocked();
    wait_until_all_is_gone(&env);
}
