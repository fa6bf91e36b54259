//! "A process of a lease that is stopped, slow or killed at a bad moment delays a run, and does nothing worse."

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde_json::Value;

use super::given_back::{is_dynamodb, takes_item, through};
use super::leased::{
    ends_well, leased, network, record, start, suspended_at_a_terminal, wait_for_renewal_after, wait_until_it_goes_on,
    wait_until_stopped,
};
use super::terminal::shell;
use crate::support::process::{state, terraform_below};
use crate::support::processes::{
    guardian_of, is_gone, kill_all_but, named, tf_of, wait_until_all_is_gone, wait_until_gone, wait_until_unlocked,
};
use crate::support::proxy::ProxyAction;
use crate::support::test_env::terraform;
use crate::support::{Lock, Subject, TestEnv, wait_for};

/// The guardian looks at the fuse, and then stops terraform's group. In between, `tf` may have been continued, and may
/// have continued terraform. Here, the test sends the signal that comes too late.
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

/// Without a shell, `tf` cannot stop together with terraform. The guardian's answer does not undo the stop.
#[test]
fn a_terraform_that_somebody_has_stopped_stays_stopped_and_keeps_its_lease() {
    let env = leased(Lock::DynamoDb, "3s");
    let run = start(&env);
    let terraform = terraform_below(run.pid());
    kill(terraform, Signal::SIGSTOP).unwrap();
    env.wait_for_trace("guardian: tf is suspended: false");
    for _ in 0..3 {
        let last = record(&env).unwrap();
        wait_for_renewal_after(&env, &last);
        assert_eq!(state(terraform), Some('T'), "{}", env.trace());
    }
    kill(terraform, Signal::SIGCONT).unwrap();
    ends_well(&env, run);
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
    env.stand_in("wrapper", "#!/bin/bash\nterraform \"$@\"\n: > second\nsleep 1000\n");
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

/// Terraform has asked for the terminal in the background, and is stopped for its lease when `fg` gives the terminal.
#[test]
fn after_fg_three_keys_end_a_terraform_that_wanted_the_terminal_and_was_stopped_for_its_lease() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    env.set("TFW_LEASE", "4s").set("TFW_CLOCK", "steady");
    let (_proxy, is_away) = network(&mut env);
    let mut terminal = shell(&env);
    terminal.type_in("tf apply -no-color\n");
    terminal.wait_for("Enter a value:");
    wait_for_renewal_after(&env, &Value::Null);
    let (tf, fuse) = (tf_of(&env), named(&env, "tf-fuse"));
    terminal.type_in("\x1a");
    terminal.wait_for("Stopped");
    terminal.type_in("bg\n");
    env.wait_for_trace("terraform was stopped by SIGTTIN");
    wait_until_stopped(&env, tf);
    let terraform = terraform_below(tf);
    is_away.store(true, Ordering::SeqCst);
    wait_until_gone(&env, fuse);
    terminal.type_in("fg\n");
    terminal.wait_for("to end it now, without saving its state, press ^C three times");
    for said in ["press ^C 2 more times", "press ^C 1 more time", "ending the stopped terraform"] {
        terminal.type_in("\x03");
        terminal.wait_for(said);
    }
    wait_until_gone(&env, terraform);
    is_away.store(false, Ordering::SeqCst);
    wait_until_unlocked(&env);
    drop(terminal);
    wait_until_all_is_gone(&env);
}

/// Kills `pids` so that none of them notices the death of another one.
fn kill_together(env: &TestEnv, pids: &[Pid]) {
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        for pid in pids {
            kill(*pid, signal).unwrap();
        }
    }
    for pid in pids {
        wait_until_gone(env, *pid);
    }
}

/// Otherwise the fuse and its keeper would stay behind for most of the lease, here for an hour.
#[test]
fn keeper_and_fuse_end_at_once_if_nothing_else_is_left_of_the_run() {
    let mut env = leased(Lock::DynamoDb, "1h");
    let run = start(&env);
    kill_all_but(&env, &["tf-keeper", "tf-fuse"].map(|name| named(&env, name)));
    drop(run);
    wait_until_all_is_gone(&env);
    // The next run finds the lock in the journal.
    env.set("TFW_LEASE", "1m");
    let end = env.run(Subject::Tf, &["plan", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    env.assert_unlocked();
}

/// While `tf` was suspended, the guardian has found that another run holds the lock. Then `tf` is killed.
#[test]
fn a_guardian_that_knows_of_the_loss_kills_terraform_and_does_not_ask_it_to_stop() {
    let env = leased(Lock::DynamoDb, "1m");
    let (terminal, terraform) = suspended_at_a_terminal(&env);
    env.wait_for_trace("guardian: tf is suspended, and the guardian renews the lease, too");
    let before = env.state();
    let other = env.lock_of_another();
    env.delete_lock();
    env.put_lock(&other);
    env.wait_for_trace("guardian: tf must know that the lock is lost");
    kill(tf_of(&env), Signal::SIGKILL).unwrap();
    wait_until_gone(&env, terraform);
    drop(terminal);
    wait_until_all_is_gone(&env);
    assert!(!env.trace().contains("guardian: interrupted terraform"), "{}", env.trace());
    assert_eq!(env.state(), before);
    assert_eq!(env.locks(), [other]);
}

/// The guardian notes the end of the stop timeout while `tf` is stopped, and nobody has killed terraform then.
#[test]
fn a_stop_timeout_that_ends_while_tf_is_stopped_counts_when_tf_is_killed() {
    for lease in [None, Some("1m")] {
        let mut env = leased(Lock::Both, lease.unwrap_or("off"));
        env.set("TFW_STOP_TIMEOUT", "5s");
        let run = env.start_apply(Subject::Tf);
        let terraform = terraform_below(run.pid());
        run.send(Signal::SIGTERM);
        env.wait_for_trace("InterruptGroup");
        let tf = tf_of(&env);
        kill(tf, Signal::SIGSTOP).unwrap();
        wait_until_stopped(&env, tf);
        env.wait_for_trace("guardian: left to tf: [Kill");
        kill(tf, Signal::SIGKILL).unwrap();
        // Its provisioner ignores the interrupt.
        wait_until_gone(&env, terraform);
        drop(run);
        wait_until_unlocked(&env);
        wait_until_all_is_gone(&env);
    }
}

/// A wrapper in place of terraform works on when terraform has released its lock. It needs no lock then.
#[test]
fn what_follows_the_unlock_goes_on_if_tf_and_its_keeper_are_dead() {
    let mut env = leased(Lock::Both, "20s");
    let script = "while ! test -e over; do sleep 0.05; done; touch finished";
    env.stand_in("tenv", &format!("#!/bin/sh\n'{}' \"$@\"\n{script}\n", terraform().display()));
    let run = start(&env);
    let fuse = named(&env, "tf-fuse");
    kill_together(&env, &[tf_of(&env), named(&env, "tf-keeper")]);
    // The guardian interrupts terraform, which releases its lock.
    wait_until_unlocked(&env);
    wait_until_gone(&env, fuse);
    env.write("over", "");
    env.wait_for_file("finished");
    drop(run);
    wait_until_all_is_gone(&env);
}

/// Nothing has stopped terraform before, so its last write may have come after another run got the lock.
#[test]
fn a_run_that_wrote_before_it_knew_of_its_loss_says_so() {
    let mut env = leased(Lock::DynamoDb, "1m");
    let is_away = Arc::new(AtomicBool::new(false));
    let away = is_away.clone();
    let proxy = through(&mut env, move |request| {
        while request.is_ours() && away.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
        }
        // Terraform writes the digest after the state. Without a response, it does not go on to its unlock.
        let is_digest = is_dynamodb(request, ".PutItem") && request.text().contains("-md5");
        if is_digest && !request.is_ours() { ProxyAction::Hold } else { ProxyAction::Pass }
    });
    let run = start(&env);
    let before = env.state();
    is_away.store(true, Ordering::SeqCst);
    let other = env.lock_of_another();
    env.delete_lock();
    env.put_lock(&other);
    env.unblock();
    proxy.wait_until_held();
    let written = || (env.state() != before).then_some(());
    wait_for("the write of the state", written, || env.trace());
    is_away.store(false, Ordering::SeqCst);
    let end = run.wait();
    assert_eq!(end.signal(), Some(9), "{}", env.dump(&end));
    let said = "before that was known, it may have written its state over the state of the other run";
    assert!(end.err.contains(said), "{}", env.dump(&end));
    assert_eq!(env.locks(), [other]);
    proxy.let_go();
    wait_until_all_is_gone(&env);
}
