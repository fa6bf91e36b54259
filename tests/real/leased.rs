//! "A run with `TFW_LEASE` renews a lease on its lock, and stops working before anybody else may take the lock."

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::Timestamp;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::given_back::{holds_state, is_dynamodb, through, through_changing, writes_state};
use super::in_flight::with_large_state;
use super::slow_credentials;
use super::terminal::{APPLY_LINE, line_of, shell};
use super::two_hosts::{random, trials};
use crate::support::cgroup::Cgroup;
use crate::support::cloud::cloud;
use crate::support::http::Message;
use crate::support::process::{Run, state, terraform_below, tree};
use crate::support::processes::{
    guardian_of, home, is_gone, is_named, marked, named, ours, tf_of, wait_until_all_is_gone, wait_until_gone,
    wait_until_unlocked,
};
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::relay::Relay;
use crate::support::terminal::Terminal;
use crate::support::test_env::{APPLY, WAITS, terraform};
use crate::support::{Lock, Subject, TestEnv, wait_for};

/// Returns a directory in which runs have a lease of `length`.
pub fn leased(lock: Lock, length: &str) -> TestEnv {
    let mut env = TestEnv::new(lock, WAITS);
    env.set("TFW_LEASE", length).set("TFW_CLOCK", "steady");
    env
}

/// Returns the record of the lock, as JSON. `None` if there is no lock, or if it has none.
pub fn record(env: &TestEnv) -> Option<Value> {
    let path = env.path();
    if env.lock == Lock::File {
        let lock: Value = serde_json::from_str(&cloud().object(&format!("{path}.tflock"))?).ok()?;
        return lock.get("tf").cloned();
    }
    let answer = cloud()
        .dynamodb("GetItem", &json!({"TableName": env.table, "Key": {"LockID": {"S": path}}, "ConsistentRead": true}));
    let map = answer["Item"]["tf"]["M"].as_object()?.clone();
    let plain = map.into_iter().map(|(name, value)| {
        let value =
            value["S"].as_str().map(Value::from).or_else(|| value["N"].as_str()?.parse::<u64>().ok().map(Value::from));
        (name, value.unwrap_or_default())
    });
    Some(Value::Object(plain.collect()))
}

pub fn wait_for_renewal_after(env: &TestEnv, last: &Value) -> Value {
    let is_newer = || record(env).filter(|now| now["beat"].as_u64() > last["beat"].as_u64());
    wait_for("a renewal", is_newer, || format!("{:?}\n{}", record(env), env.trace()))
}

#[test]
fn a_lease_is_renewed_while_terraform_works_and_nothing_is_left_after_it() {
    for lock in [Lock::DynamoDb, Lock::File, Lock::Both] {
        let env = leased(lock, "2s");
        let run = env.start_apply(Subject::Tf);
        let mut last = wait_for_renewal_after(&env, &Value::Null);
        assert_eq!(last["fence"], "stop", "{last}\n{}", env.trace());
        for _ in 0..5 {
            last = wait_for_renewal_after(&env, &last);
        }
        env.unblock();
        let end = run.wait();
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        assert!(!end.err.contains("tf:"), "{}", end.err);
        env.assert_unlocked();
        wait_until_all_is_gone(&env);
    }
}

/// The state of another run. It is a valid one, which terraform would overwrite.
const SUCCESSOR: &str = r#"{"version":4,"serial":7,"lineage":"5b6a1b9c-0000-4000-8000-000000000000","terraform_version":"1.11.4","outputs":{"successor":{"value":"x","type":"string"}},"resources":[],"check_results":null}"#;

/// Replaces the state.
#[track_caller]
fn put_state(env: &TestEnv, state: &str) {
    assert_eq!(cloud().s3("PUT", &env.path(), state.as_bytes()).status(), 200);
}

/// Replaces the lock by that of another run, which has written its state. Returns its lock.
#[track_caller]
fn succeed(env: &TestEnv) -> String {
    env.delete_lock();
    let other = env.lock_of_another();
    put_state(env, SUCCESSOR);
    other
}

/// What the trace says when `tf` has heard of a renewal.
const HEARD: &str = "the keeper: Renewed";

/// What `tf` says of a terraform that may have run although its lock was lost.
const MAY_HAVE_WRITTEN: &str = "it may have written its state over the state of the other run";

/// Waits until the process is stopped.
#[track_caller]
pub fn wait_until_stopped(env: &TestEnv, pid: Pid) {
    wait_for("a stop", || (state(pid) == Some('T')).then_some(()), || format!("{:?}\n{}", state(pid), env.trace()));
}

/// Waits until the process runs or sleeps.
#[track_caller]
pub fn wait_until_it_goes_on(env: &TestEnv, pid: Pid) {
    let goes_on = || state(pid).filter(|state| !matches!(state, 'T' | 'Z')).map(drop);
    wait_for("terraform to go on", goes_on, || format!("{:?}\n{}", state(pid), env.trace()));
}

/// Waits until `tf` hears of the next renewal. Unlike [`wait_for_renewal_after`], it sends no requests meanwhile.
#[track_caller]
fn wait_for_news_of_a_renewal(env: &TestEnv) {
    let count = || env.trace().matches(HEARD).count();
    let before = count();
    wait_for("news of a renewal", || (count() > before).then_some(()), || env.trace());
}

/// Starts an apply with a lease, and waits until its lease was renewed.
#[track_caller]
pub fn start(env: &TestEnv) -> Run {
    let run = env.start_apply(Subject::Tf);
    wait_for_renewal_after(env, &Value::Null);
    run
}

#[track_caller]
pub fn ends_well(env: &TestEnv, run: Run) {
    env.unblock();
    let end = run.wait();
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    env.assert_unlocked();
    wait_until_all_is_gone(env);
}

#[test]
fn a_killed_fuse_stops_terraform_until_the_lock_was_looked_at_and_a_new_one_is_there() {
    for lock in [Lock::DynamoDb, Lock::File] {
        let env = leased(lock, "4s");
        let run = start(&env);
        let terraform = terraform_below(run.pid());
        for round in 1..=3 {
            let fuse = named(&env, "tf-fuse");
            kill(fuse, Signal::SIGKILL).unwrap();
            wait_until_gone(&env, fuse);
            let goes_on = || (run.err().matches("terraform goes on").count() == round).then_some(());
            wait_for("terraform to go on", goes_on, || format!("{}{}", run.err(), env.trace()));
            wait_until_it_goes_on(&env, terraform);
        }
        assert_eq!(run.err().matches("terraform was stopped").count(), 3, "{}", run.err());
        ends_well(&env, run);
    }
}

#[test]
fn a_fuse_that_is_killed_before_the_lock_is_taken_is_replaced() {
    let env = leased(Lock::Both, "10s");
    env.lock_of_another();
    let run = env.start(Subject::Tf, &["apply", "-auto-approve", "-no-color", "-lock-timeout=2m"]);
    run.wait_for_out("Acquiring state lock");
    let [fuse, spare] = ["tf-fuse", "tf-spare"].map(|name| named(&env, name));
    kill(fuse, Signal::SIGKILL).unwrap();
    wait_until_gone(&env, fuse);
    env.delete_lock();
    env.wait_for_began(&run);
    let first = wait_for_renewal_after(&env, &Value::Null);
    assert_eq!(first["fence"], "stop", "{first}\n{}", env.trace());
    assert_eq!(named(&env, "tf-fuse"), spare, "{}", env.trace());
    // The new one stops terraform, too.
    kill(spare, Signal::SIGKILL).unwrap();
    run.wait_for_err("the lease was renewed, and terraform goes on");
    ends_well(&env, run);
}

#[test]
fn the_fuses_exist_before_the_lock_is_requested_and_the_keeper_only_while_it_is_held() {
    let env = leased(Lock::Both, "10s");
    env.lock_of_another();
    let run = env.start(Subject::Tf, &["apply", "-auto-approve", "-no-color", "-lock-timeout=2m"]);
    run.wait_for_out("Acquiring state lock");
    let count = |name: &str| marked(&home(&env)).into_iter().filter(|pid| is_named(*pid, name)).count();
    assert_eq!(["tf-fuse", "tf-spare", "tf-keeper"].map(count), [1, 1, 0], "{}", env.trace());
    env.delete_lock();
    env.wait_for_began(&run);
    wait_for_renewal_after(&env, &Value::Null);
    assert_eq!(["tf-fuse", "tf-spare", "tf-keeper"].map(count), [1, 1, 1], "{}", env.trace());
    ends_well(&env, run);
}

/// The lock is an object alone, and the service is not AWS itself, so its treatment of `If-Match` is tested first.
#[test]
fn five_requests_come_before_the_first_renewal_of_an_object() {
    let mut env = leased(Lock::File, "10s");
    let requests = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&requests);
    let _proxy = through(&mut env, move |request| {
        let is_lock = request.start.contains("prod.tfstate.tflock");
        let mut seen = seen.lock().unwrap();
        if !request.is_ours() && is_lock && request.start.starts_with("PUT ") {
            // Terraform takes the lock. What `tf` has sent before is the look before terraform starts.
            seen.clear();
        } else if request.is_ours() {
            seen.push((request.start.clone(), is_lock && request.text().contains("\"renewed\"")));
        }
        ProxyAction::Pass
    });
    let run = start(&env);
    let before: Vec<_> = requests.lock().unwrap().iter().take_while(|(_, renews)| !renews).cloned().collect();
    assert_eq!(before.len(), 5, "{before:?}");
    ends_well(&env, run);
}

#[test]
fn a_killed_keeper_is_replaced_and_terraform_notices_nothing() {
    let env = leased(Lock::Both, "4s");
    let run = start(&env);
    for _ in 0..3 {
        let keeper = named(&env, "tf-keeper");
        kill(keeper, Signal::SIGKILL).unwrap();
        wait_until_gone(&env, keeper);
        let last = record(&env).unwrap_or_default();
        wait_for_renewal_after(&env, &last);
    }
    assert!(!run.err().contains("terraform was stopped"), "{}", run.err());
    ends_well(&env, run);
}

#[test]
fn a_keeper_that_does_not_answer_is_replaced_before_terraform_must_stop() {
    let env = leased(Lock::Both, "15s");
    let run = start(&env);
    let keeper = named(&env, "tf-keeper");
    kill(keeper, Signal::SIGSTOP).unwrap();
    wait_until_gone(&env, keeper);
    let last = record(&env).unwrap_or_default();
    wait_for_renewal_after(&env, &last);
    assert_eq!(run.err(), "", "{}", env.trace());
    ends_well(&env, run);
}

#[test]
fn a_terraform_that_was_stopped_because_its_keeper_does_not_answer_goes_on_by_itself() {
    // The deadline comes before the keeper counts as silent.
    let env = leased(Lock::Both, "2s");
    let run = start(&env);
    let keeper = named(&env, "tf-keeper");
    kill(keeper, Signal::SIGSTOP).unwrap();
    run.wait_for_err("terraform was stopped, because the lease of its lock was not renewed in time");
    run.wait_for_err("the lease was renewed, and terraform goes on");
    assert!(is_gone(keeper), "{}", env.trace());
    ends_well(&env, run);
}

#[test]
fn keepers_that_fail_again_and_again_are_reported_once_and_terraform_goes_on_in_the_end() {
    let env = leased(Lock::Both, "4s");
    let run = start(&env);
    for failures in 1..=5 {
        let keeper = named(&env, "tf-keeper");
        kill(keeper, Signal::SIGKILL).unwrap();
        env.wait_for_trace(&format!("after {failures} failures: signal: 9 (SIGKILL)"));
    }
    let last = record(&env).unwrap_or_default();
    wait_for_renewal_after(&env, &last);
    let said = "the process that renews the lease of this run's lock has failed several times in a row: signal: 9";
    assert_eq!(run.err().matches(said).count(), 1, "{}", run.err());
    ends_well(&env, run);
}

#[test]
fn without_tf_and_fuse_terraform_is_killed_at_once_and_the_guardian_releases_its_lock() {
    let env = leased(Lock::Both, "4s");
    let run = start(&env);
    let terraform = terraform_below(run.pid());
    let (tf, fuse) = (tf_of(&env), named(&env, "tf-fuse"));
    // The fuse may take longer to die than `tf`. Then the guardian interrupts terraform before the kernel kills it.
    kill(tf, Signal::SIGSTOP).unwrap();
    wait_until_stopped(&env, tf);
    kill(fuse, Signal::SIGKILL).unwrap();
    wait_until_gone(&env, fuse);
    kill(tf, Signal::SIGKILL).unwrap();
    wait_until_gone(&env, terraform);
    assert!(!env.trace().contains("guardian: interrupted terraform: true"), "{}", env.trace());
    drop(run);
    wait_until_unlocked(&env);
    wait_until_all_is_gone(&env);
}

#[test]
fn the_guardian_stops_terraform_gracefully_and_its_own_keeper_renews_meanwhile() {
    let mut env = leased(Lock::Both, "3s");
    // The write of the state takes longer than the lease lasts.
    let proxy = through(&mut env, |request| if writes_state(request) { ProxyAction::Hold } else { ProxyAction::Pass });
    let run = start(&env);
    let terraform = terraform_below(run.pid());
    kill(tf_of(&env), Signal::SIGKILL).unwrap();
    proxy.wait_until_held();
    for _ in 0..10 {
        let last = record(&env).unwrap_or_default();
        wait_for_renewal_after(&env, &last);
        assert_ne!(state(terraform), Some('T'), "{}", env.trace());
    }
    proxy.let_go();
    drop(run);
    wait_until_unlocked(&env);
    wait_until_all_is_gone(&env);
}

/// The guardian has interrupted terraform, which writes its state nevertheless.
#[test]
fn a_terraform_whose_tf_is_dead_is_killed_before_it_writes_if_another_run_holds_its_lock() {
    for lock in Lock::ALL {
        let mut env = leased(lock, "2m");
        let is_slow = Arc::new(AtomicBool::new(true));
        let slow = is_slow.clone();
        let _proxy =
            through(
                &mut env,
                move |request| {
                    if holds_state(request, &slow) { ProxyAction::Close } else { ProxyAction::Pass }
                },
            );
        let run = start(&env);
        let terraform = terraform_below(run.pid());
        let state = env.state();
        kill(tf_of(&env), Signal::SIGKILL).unwrap();
        env.wait_for_trace("guardian: the keeper: Report(Renewed");
        let other = env.lock_of_another();
        env.delete_lock();
        env.put_lock(&other);
        // The next renewal comes after 20 s, but a new keeper renews at once.
        kill(named(&env, "tf-keeper"), Signal::SIGKILL).unwrap();
        wait_until_gone(&env, terraform);
        is_slow.store(false, Ordering::SeqCst);
        drop(run);
        wait_until_all_is_gone(&env);
        assert_eq!(env.state(), state, "{}", env.trace());
        assert!(env.locks().iter().all(|lock| *lock == other), "{:?}", env.locks());
    }
}

/// A command for a provisioner that works until it is killed, and writes into the file `ticks` meanwhile.
const BUSY: &str = "trap '' TERM; touch began; while test -e began; do echo >> ticks; sleep 0.02; done";

/// The record of a dead run promises that nothing of it goes on after the lease. Its keeper and its fuse are all that
/// is left to keep that promise.
#[test]
fn what_a_killed_run_leaves_is_killed_before_its_lease_lapses() {
    for lock in Lock::ALL {
        let mut env = TestEnv::new(lock, BUSY);
        env.set("TFW_LEASE", "4s").set("TFW_CLOCK", "steady");
        let run = start(&env);
        let tf = tf_of(&env);
        let dead = [tf, guardian_of(&env, tf), terraform_below(run.pid())];
        for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
            for pid in dead {
                kill(pid, signal).unwrap();
            }
        }
        let last = record(&env).unwrap();
        wait_until_all_is_gone(&env);
        let renewed = last["renewed"].as_i64().unwrap();
        let now = Timestamp::now().as_second();
        assert!(now <= renewed + 4, "{renewed} {now} {}", env.trace());
        assert_eq!(record(&env).as_ref().map(|record| &record["fence"]), Some(&"stop".into()));
        drop(run);
    }
}

/// The guardian has a keeper of its own while `tf` is suspended. It must know that there is no lease.
#[test]
fn a_suspended_run_that_goes_on_without_a_lease_writes_no_record() {
    for lock in Lock::ALL {
        let mut env = leased(lock, "3s");
        let (is_denied, has_renewed) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicBool::new(false)));
        let (denied, renewed) = (is_denied.clone(), has_renewed.clone());
        let _proxy = through(&mut env, move |request| {
            let is_renewal = request.text().contains("\"beat\"");
            if is_renewal && denied.load(Ordering::SeqCst) {
                return ProxyAction::Answer(request.denied());
            }
            renewed.fetch_or(is_renewal, Ordering::SeqCst);
            ProxyAction::Pass
        });
        let mut terminal = shell(&env);
        terminal.type_in(&line_of("tf", APPLY_LINE));
        terminal.wait_for("goes on without a lease");
        env.wait_for_file("began");
        is_denied.store(false, Ordering::SeqCst);
        terminal.type_in("\x1a");
        terminal.wait_for("Stopped");
        env.wait_for_trace("guardian: tf is suspended: true");
        // A keeper renews several times in one lease.
        let since = Timestamp::now().as_second();
        let is_later = || (Timestamp::now().as_second() > since + 3).then_some(());
        wait_for("the length of a lease", is_later, || format!("{since}"));
        terminal.type_in("fg\n");
        env.unblock();
        terminal.wait_for("Apply complete!");
        assert!(!has_renewed.load(Ordering::SeqCst), "{lock:?} {}", env.trace());
        wait_until_unlocked(&env);
    }
}

/// The network of the proxy's clients: while it is away, no request arrives and no response comes.
pub fn network(env: &mut TestEnv) -> (Proxy, Arc<AtomicBool>) {
    network_that(Outage::Refuses, env)
}

/// What a network does that is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outage {
    /// It closes the connection of each request.
    Refuses,
    /// It drops every packet. What was sent meanwhile arrives when it is back.
    Drops,
}

/// Returns a network, and what makes it go away and come back.
fn network_that(outage: Outage, env: &mut TestEnv) -> (Proxy, Arc<AtomicBool>) {
    let is_away = Arc::new(AtomicBool::new(false));
    let away = is_away.clone();
    let rule = move |_: &Message| {
        while outage == Outage::Drops && away.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(5));
        }
        if away.load(Ordering::SeqCst) { ProxyAction::Close } else { ProxyAction::Pass }
    };
    (through(env, rule), is_away)
}

/// Returns a network in which `tf` alone can be cut off, and what does it. A stopped terraform that ran again could then
/// write its state at once. It is as if the service of the lock had an outage, and that of the state had none.
pub fn network_of_tf(env: &mut TestEnv) -> (Proxy, Arc<AtomicBool>) {
    let is_away = Arc::new(AtomicBool::new(false));
    let away = is_away.clone();
    let rule = move |request: &Message| {
        if request.is_ours() && away.load(Ordering::SeqCst) { ProxyAction::Close } else { ProxyAction::Pass }
    };
    (through(env, rule), is_away)
}

/// What the trace says when a stopped terraform would get no connection if another process continued it.
const CANNOT_CONNECT: &str = "terraform can open a connection: false";

/// The lock and the state of another run, which has taken them while the terraform of this run is stopped.
pub struct Successor {
    lock: String,
    /// Terraform is about to write its own state ([`lets_go`]).
    _open: fs::File,
}

impl Successor {
    /// Cuts the network of `run` off, waits until its terraform is stopped and the run says so, and lets another run
    /// take its lock.
    #[track_caller]
    pub fn of_a_stopped_run(env: &TestEnv, go: &Path, (run, terraform): (&Run, Pid), is_away: &AtomicBool) -> Self {
        is_away.store(true, Ordering::SeqCst);
        wait_until_stopped(env, terraform);
        run.wait_for_err("terraform was stopped, because the lease");
        Self::succeeds(env, go)
    }

    /// Gives lock and state to another run, and makes the stopped terraform write its state as soon as it runs.
    #[track_caller]
    pub fn succeeds(env: &TestEnv, go: &Path) -> Self {
        // A taker needs at least a fifth of the lease after the stop, and this at most a twentieth. A `tf` that is
        // suspended does not do it.
        if !ours(env).iter().any(|pid| state(*pid) == Some('T')) {
            env.wait_for_trace(CANNOT_CONNECT);
            env.wait_for_trace("connections of terraform were broken off");
        }
        Self { lock: succeed(env), _open: lets_go(go) }
    }

    /// Checks that the lock and the state are still those of the other run.
    #[track_caller]
    pub fn assert_stands(&self, env: &TestEnv, what: &str) {
        assert_eq!(env.state().as_deref(), Some(SUCCESSOR), "{what}\n{}", env.trace());
        let locks = env.locks();
        assert!(!locks.is_empty() && locks.iter().all(|lock| *lock == self.lock), "{what} {locks:?}\n{}", env.trace());
    }
}

fn in_an_outage_terraform_is_stopped_in_time_and_goes_on_after_it(lock: Lock) {
    for outage in [Outage::Refuses, Outage::Drops] {
        let mut env = leased(lock, "4s");
        let (_proxy, is_away) = network_that(outage, &mut env);
        let run = start(&env);
        let terraform = terraform_below(run.pid());
        is_away.store(true, Ordering::SeqCst);
        wait_until_stopped(&env, terraform);
        run.wait_for_err("terraform was stopped, because the lease of its lock was not renewed in time");
        run.wait_for_err("tf: the lease cannot be renewed: ");
        is_away.store(false, Ordering::SeqCst);
        wait_until_it_goes_on(&env, terraform);
        run.wait_for_err("the lease was renewed, and terraform goes on");
        ends_well(&env, run);
    }
}
for_each_lock!(in_an_outage_terraform_is_stopped_in_time_and_goes_on_after_it);

/// An outage of two fifths of the lease begins at any moment between two renewals. This is the shortest lease of a
/// release: after an outage, a request of the SDK may wait for 2 s until its next attempt, and a shorter lease has no
/// time for that.
fn an_outage_of_two_fifths_of_the_lease_goes_unnoticed(lock: Lock) {
    const LEASE: Duration = Duration::from_mins(1);
    let passes_unnoticed = |outage: Outage, begins_after: u64| {
        let mut env = leased(lock, "1m");
        let (_proxy, is_away) = network_that(outage, &mut env);
        let run = start(&env);
        wait_for_news_of_a_renewal(&env);
        std::thread::sleep(Duration::from_millis(begins_after));
        is_away.store(true, Ordering::SeqCst);
        std::thread::sleep(LEASE * 2 / 5);
        is_away.store(false, Ordering::SeqCst);
        wait_for_news_of_a_renewal(&env);
        assert_eq!(run.err(), "", "{outage:?} {begins_after}: {}", env.trace());
        ends_well(&env, run);
    };
    std::thread::scope(|scope| {
        for outage in [Outage::Refuses, Outage::Drops] {
            // The longest time between two renewals is less than 10 s.
            for begins_after in [0, 3500, 7000] {
                scope.spawn(move || passes_unnoticed(outage, begins_after));
            }
        }
    });
}
for_each_lock!(an_outage_of_two_fifths_of_the_lease_goes_unnoticed);

/// A host of the service may have a clock that is late. The records with its time replace none with a later time. So
/// the lock must not look as if it had lapsed, while its holder is connected and works. A clock that jumps forward
/// looks like the clock of a host that has stood still.
#[test]
fn a_service_whose_clock_jumps_makes_the_record_promise_nothing() {
    for lock in [Lock::DynamoDb, Lock::File, Lock::Both] {
        for seconds in [-8, -3600, 30, 3600] {
            let mut env = leased(lock, "4s");
            let is_late = Arc::new(AtomicBool::new(false));
            let late = is_late.clone();
            let rule = move |request: &Message| {
                if request.is_ours() && late.load(Ordering::SeqCst) {
                    ProxyAction::PassDated(seconds)
                } else {
                    ProxyAction::Pass
                }
            };
            let _proxy = through(&mut env, rule);
            let run = start(&env);
            is_late.store(true, Ordering::SeqCst);
            let promises_nothing = || record(&env).filter(|record| record["fence"] == "none");
            let last = wait_for("no promise", promises_nothing, || format!("{:?}\n{}", record(&env), env.trace()));
            // It is renewed all the same, and terraform works on.
            wait_for_renewal_after(&env, &last);
            assert_eq!(run.err(), "", "{}", env.trace());
            ends_well(&env, run);
        }
    }
}

/// Such a service would let a late renewal bring a released lock back.
#[test]
fn at_a_service_that_ignores_the_condition_of_a_write_a_run_has_no_lease() {
    let mut env = leased(Lock::File, "4s");
    let ignore_if_match = |request: &mut Message| {
        if request.start.starts_with("PUT ") {
            request.headers.retain(|(name, _)| !name.eq_ignore_ascii_case("if-match"));
        }
    };
    let _proxy = through_changing(&mut env, ignore_if_match, |_| ProxyAction::Pass);
    let run = env.start_apply(Subject::Tf);
    run.wait_for_err("this run goes on without a lease");
    assert_eq!(record(&env), None);
    env.unblock();
    let end = run.wait();
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert_eq!(end.err.matches("without a lease").count(), 1, "{}", env.dump(&end));
    env.assert_unlocked();
}

/// Before Linux 5.3, and in a sandbox that does not know the system call.
#[test]
fn a_run_whose_terraform_cannot_be_watched_says_once_that_it_has_no_lease_and_doctor_says_so_too() {
    /// Makes pidfd_open(2) fail with ENOSYS in the program that it executes, and in all that this one starts. The
    /// number of the system call is the first field of struct seccomp_data (seccomp(2)).
    const WITHOUT_PIDFD: &str = "
import ctypes, os, struct, sys
code = [(0x20, 0, 0, 0), (0x15, 0, 1, 434), (0x06, 0, 0, 0x00050000 | 38), (0x06, 0, 0, 0x7FFF0000)]
filter = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *line) for line in code))
program = ctypes.create_string_buffer(struct.pack('HxxxxxxP', len(code), ctypes.addressof(filter)))
prctl = ctypes.CDLL(None, use_errno=True).prctl
assert prctl(38, 1, 0, 0, 0) == 0 and prctl(22, 2, ctypes.byref(program)) == 0
os.execvp(sys.argv[1], sys.argv[1:])
";
    let env = leased(Lock::Both, "1m");
    let start = |arguments: &[&str]| {
        let mut command = env.command(crate::support::cloud::tool("python3"));
        command.args(["-c", WITHOUT_PIDFD, "tf"]).args(arguments);
        Run::start(command)
    };
    let run = start(&APPLY);
    run.wait_for_err("tf: this run goes on without a lease: tf cannot see when terraform ends (pidfd_open): ");
    env.wait_for_began(&run);
    assert_eq!(record(&env), None);
    env.unblock();
    let end = run.wait();
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert_eq!(end.err.matches("without a lease").count(), 1, "{}", env.dump(&end));
    env.assert_unlocked();
    wait_until_all_is_gone(&env);
    let end = start(&["locks", "doctor"]).wait();
    assert!(end.out.contains("a run has no lease: tf cannot see when terraform ends"), "{}", env.dump(&end));
}

#[test]
fn a_second_lock_of_a_run_has_no_lease_and_that_is_said_once() {
    let mut env = leased(Lock::DynamoDb, "10s");
    let terraform = crate::support::test_env::terraform();
    let again = format!("'{}' apply -auto-approve -no-color -replace=terraform_data.a", terraform.display());
    env.stand_in(
        "twice",
        &format!("#!/bin/sh\n'{}' \"$@\"\nrm go began\n{again}\ntouch third\n{again}\n", terraform.display()),
    );
    let run = start(&env);
    env.unblock();
    let path = env.path();
    run.wait_for_err(&format!("tf: the lock of {path} has no lease: a run has a lease only for its first lock"));
    assert_eq!(record(&env), None, "{}", env.trace());
    env.unblock();
    let end = run.wait();
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert!(env.exists("third"));
    assert_eq!(end.err.matches("has no lease").count(), 1, "{}", env.dump(&end));
    env.assert_unlocked();
    wait_until_all_is_gone(&env);
}

#[test]
fn a_stopped_terraform_whose_credentials_have_expired_says_so_and_goes_on_with_new_ones() {
    let mut env = leased(Lock::DynamoDb, "4s");
    let has_expired = Arc::new(AtomicBool::new(false));
    let expired = has_expired.clone();
    let _proxy = through(&mut env, move |request| {
        if is_dynamodb(request, "Item") && expired.load(Ordering::SeqCst) { expiry() } else { ProxyAction::Pass }
    });
    let run = start(&env);
    has_expired.store(true, Ordering::SeqCst);
    kill(named(&env, "tf-fuse"), Signal::SIGKILL).unwrap();
    run.wait_for_err("terraform was stopped, because it is not certain that it still has its lock");
    run.wait_for_err("tf: the lease cannot be renewed: DynamoDB: ExpiredTokenException: expired");
    has_expired.store(false, Ordering::SeqCst);
    run.wait_for_err("the lease was renewed, and terraform goes on");
    ends_well(&env, run);
}

#[test]
fn the_first_renewal_after_an_outage_extends_the_lease_in_full() {
    for lock in [Lock::DynamoDb, Lock::File] {
        let mut env = leased(lock, "30s");
        let (_proxy, is_away) = network(&mut env);
        let run = start(&env);
        is_away.store(true, Ordering::SeqCst);
        let last = record(&env).unwrap();
        let now = || jiff::Timestamp::now().as_second();
        // More than two intervals between renewals, and less than the time after which terraform is stopped.
        let is_old = || (now() - last["renewed"].as_i64().unwrap() >= 15).then_some(());
        wait_for("a record of 15 s ago", is_old, || env.trace());
        let back = now();
        is_away.store(false, Ordering::SeqCst);
        let first = wait_for_renewal_after(&env, &last);
        assert!(first["renewed"].as_i64().unwrap() >= back - 1, "{back}: {first}\n{}", env.trace());
        assert_eq!(run.err(), "", "{}", env.trace());
        ends_well(&env, run);
    }
}

#[test]
fn a_stopped_terraform_whose_lock_another_run_holds_is_killed_before_it_writes() {
    for lock in [Lock::DynamoDb, Lock::File, Lock::Both] {
        let mut env = leased(lock, "4s");
        let (_proxy, is_away) = network(&mut env);
        let run = start(&env);
        let terraform = terraform_below(run.pid());
        is_away.store(true, Ordering::SeqCst);
        wait_until_stopped(&env, terraform);
        let state = env.state();
        let other = env.lock_of_another();
        env.delete_lock();
        env.put_lock(&other);
        env.unblock();
        is_away.store(false, Ordering::SeqCst);
        let end = run.wait();
        assert_eq!(end.signal(), Some(9), "{}", env.dump(&end));
        for text in ["the lock is held by another run now", "is not in the state", "terraform plan"] {
            assert!(end.err.contains(text), "{text}: {}", env.dump(&end));
        }
        assert_eq!(env.state(), state);
        assert!(env.locks().iter().all(|lock| *lock == other), "{:?}", env.locks());
        wait_until_all_is_gone(&env);
    }
}

/// What terraform has sent before it was stopped stays in the kernel, which repeats it until the network is back: later
/// than another run may have the lock.
#[test]
fn a_write_that_was_sent_before_an_outage_does_not_arrive_after_another_run_has_the_lock() {
    for lock in [Lock::DynamoDb, Lock::File, Lock::Both] {
        let mut env = leased(lock, "4s");
        with_large_state(&env);
        let (proxy, is_away) = network(&mut env);
        let relay = Relay::start(proxy.port);
        env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", relay.port));
        let run = start(&env);
        let terraform = terraform_below(run.pid());
        env.unblock();
        relay.wait_until_stalled();
        is_away.store(true, Ordering::SeqCst);
        wait_until_stopped(&env, terraform);
        env.wait_for_trace("connections of terraform were broken off");
        succeed(&env);
        is_away.store(false, Ordering::SeqCst);
        relay.resume();
        relay.wait_until_ended();
        let end = run.wait();
        assert_eq!(end.signal(), Some(9), "{}", env.dump(&end));
        assert_eq!(env.state().as_deref(), Some(SUCCESSOR), "{}", env.dump(&end));
        wait_until_all_is_gone(&env);
    }
}

#[test]
fn a_stop_without_an_outage_breaks_no_connection_off() {
    let env = leased(Lock::Both, "2m");
    let run = start(&env);
    let terraform = terraform_below(run.pid());
    kill(named(&env, "tf-fuse"), Signal::SIGKILL).unwrap();
    env.wait_for_trace("the lease is renewed, and terraform goes on");
    wait_until_it_goes_on(&env, terraform);
    assert!(!env.trace().contains("broken off"), "{}", env.trace());
    ends_well(&env, run);
}

/// Starts an apply behind a program that goes on after its terraform until there is a file `over`. Returns the run and
/// the pid of that program.
fn start_behind_a_shim(env: &mut TestEnv) -> (Run, Pid) {
    let terraform = crate::support::test_env::terraform();
    env.stand_in(
        "tenv",
        &format!("#!/bin/sh\n'{}' \"$@\"\nwhile ! test -e over; do sleep 0.05; done\n", terraform.display()),
    );
    let run = start(env);
    let (shim, ..) = tree(run.pid()).into_iter().find(|(_, name, ..)| name == "tenv").unwrap();
    (run, shim)
}

/// Ends the program of [`start_behind_a_shim`], and checks that `tf` then releases the lock of its terraform.
#[track_caller]
fn end_the_shim(env: &TestEnv, run: Run) {
    env.write("over", "");
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
    wait_until_all_is_gone(env);
}

/// Its lock is released when the shim has ended.
#[test]
fn a_shim_that_goes_on_after_its_terraform_was_killed_keeps_the_lease_and_is_not_stopped() {
    let mut env = leased(Lock::Both, "5s");
    let (run, shim) = start_behind_a_shim(&mut env);
    kill(terraform_below(shim), Signal::SIGKILL).unwrap();
    env.wait_for_trace("the terraform with the lock has ended, and its shim goes on");
    for _ in 0..5 {
        let last = record(&env).unwrap();
        wait_for_renewal_after(&env, &last);
        assert_ne!(state(shim), Some('T'), "{}", env.trace());
    }
    end_the_shim(&env, run);
}

/// Sets the number of descriptors that a process may have open. Returns what it was.
fn limit_descriptors(pid: Pid, number: u64) -> u64 {
    let [pid, limit] = [format!("--pid={pid}"), format!("--nofile={number}:")];
    let shows = Command::new("prlimit").args([&pid, "--nofile", "--output=SOFT", "--noheadings"]).output().unwrap();
    assert!(Command::new("prlimit").args([&pid, &limit]).status().unwrap().success());
    String::from_utf8(shows.stdout).unwrap().trim().parse().unwrap()
}

/// Without a free descriptor, `tf` can neither watch the shim nor start a keeper.
#[test]
fn a_shim_that_cannot_be_watched_is_watched_later_and_is_not_stopped() {
    let mut env = leased(Lock::DynamoDb, "10s");
    let (run, shim) = start_behind_a_shim(&mut env);
    let is_open = |number: &u64| fs::symlink_metadata(format!("/proc/{}/fd/{number}", run.pid())).is_ok();
    let free = (0..256).find(|number| !is_open(number)).unwrap();
    // The end of the keeper frees one that is not below this.
    let before = limit_descriptors(run.pid(), free / 2);
    kill(terraform_below(shim), Signal::SIGKILL).unwrap();
    env.wait_for_trace("the keeper is replaced in");
    env.wait_for_trace("it cannot be started: Too many open files");
    limit_descriptors(run.pid(), before);
    let mut last = record(&env).unwrap();
    for _ in 0..3 {
        last = wait_for_renewal_after(&env, &last);
        assert_ne!(state(shim), Some('T'), "{}", env.trace());
    }
    end_the_shim(&env, run);
}

#[test]
fn a_tf_that_is_killed_while_terraform_is_stopped_takes_terraform_with_it() {
    // More trials: TF_TEST_TRIALS=17, which are 102 deaths.
    let trials = trials(1);
    for (lock, program) in Lock::ALL.into_iter().flat_map(|lock| ["tf", "nohup"].map(|program| (lock, program))) {
        for _ in 0..trials {
            let (mut env, go) = about_to_write(lock);
            let (_proxy, is_away) = network(&mut env);
            let mut command = env.command(program);
            command.args((program == "nohup").then_some("tf")).args(APPLY);
            let run = Run::start(command);
            wait_for_renewal_after(&env, &Value::Null);
            env.wait_for_file("began");
            let terraform = terraform_below(run.pid());
            let state = env.state();
            is_away.store(true, Ordering::SeqCst);
            wait_until_stopped(&env, terraform);
            let _open = lets_go(&go);
            kill(run.pid(), Signal::SIGKILL).unwrap();
            // The network is back, so a terraform that ran again would write.
            is_away.store(false, Ordering::SeqCst);
            wait_until_gone(&env, terraform);
            drop(run);
            wait_until_unlocked(&env);
            wait_until_all_is_gone(&env);
            assert_eq!(env.state(), state, "{lock:?} {program} {}", env.trace());
        }
    }
}

#[test]
fn terraform_is_asked_to_stop_if_somebody_deletes_its_lock_and_nothing_brings_the_lock_back() {
    for lock in [Lock::DynamoDb, Lock::File, Lock::Both] {
        let env = leased(lock, "4s");
        let run = start(&env);
        env.delete_lock();
        run.wait_for_err("somebody has deleted the lock of this run");
        env.unblock();
        let end = run.wait();
        assert_ne!(end.code(), Some(0), "{}", env.dump(&end));
        env.assert_unlocked();
        wait_until_all_is_gone(&env);
    }
}

/// Starts an apply in `cgroup`, and waits until its lease was renewed.
#[track_caller]
fn start_in(cgroup: &Cgroup, env: &TestEnv) -> Run {
    let mut command = env.command("sh");
    let script = format!("{} && exec tf apply -auto-approve -no-color", cgroup.enter());
    command.args(["-c", &script]);
    let run = Run::start(command);
    env.wait_for_began(&run);
    wait_for_renewal_after(env, &Value::Null);
    run
}

/// At a random moment between or during renewals, or before the first one, terraform releases its lock itself. In every
/// other trial, a renewal takes so long that it often arrives after that. More trials: TF_TEST_TRIALS=100.
fn no_renewal_brings_a_lock_back_that_terraform_has_released(lock: Lock) {
    let mut env = leased(lock, "2s");
    let is_slow = Arc::new(AtomicBool::new(false));
    let slow = is_slow.clone();
    let _proxy = through(&mut env, move |request| {
        if slow.load(Ordering::SeqCst) && request.text().contains("\"beat\"") {
            std::thread::sleep(Duration::from_millis(150));
        }
        ProxyAction::Pass
    });
    let assert_nothing_left = || assert!(lock_objects(&env).is_empty() && env.locks().is_empty(), "{}", env.trace());
    for trial in 0..trials(4) {
        is_slow.store(trial % 2 == 1, Ordering::SeqCst);
        let run = env.start_apply(Subject::Tf);
        // Renewals are 0.3 s apart.
        std::thread::sleep(Duration::from_secs_f64(random() * 0.8));
        env.unblock();
        let end = run.wait();
        assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{trial}: {}", env.dump(&end));
        wait_until_all_is_gone(&env);
        assert_nothing_left();
        env.forget_state();
        for file in ["began", "go"] {
            fs::remove_file(env.directory.join(file)).unwrap();
        }
    }
    // What was on its way when the keeper ended has arrived since.
    let end = env.run(Subject::Bare, &["plan", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert_nothing_left();
}
for_each_lock!(no_renewal_brings_a_lock_back_that_terraform_has_released);

/// The kernel's signal to the group would not reach it, or it is not known which terraform holds the lock.
#[test]
fn a_terraform_in_a_group_of_its_own_or_one_of_several_has_a_lease_that_promises_nothing() {
    let program = terraform();
    let other_logs = "(exec 9>>\"$TFW_RECORDER\"; exec sleep 1000) &";
    let scripts = [
        format!("exec setsid --wait {} \"$@\"", program.display()),
        // Another process in the group of `tf` logs too, and is the first one that is found.
        format!("{other_logs}\nsetsid --wait {} \"$@\"\ncode=$?; kill $!; exit $code", program.display()),
        format!("{other_logs}\n{} \"$@\"\ncode=$?; kill $!; exit $code", program.display()),
    ];
    for (lock, text) in [Lock::DynamoDb, Lock::File, Lock::Both]
        .into_iter()
        .flat_map(|lock| scripts.each_ref().map(|text| (lock, text)))
    {
        let mut env = leased(lock, "2s");
        let script = env.bin().join("behind");
        fs::write(&script, format!("#!/bin/sh\n{text}\n")).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        env.set("TFW_TERRAFORM", &script);
        promises_nothing(&env, env.start_apply(Subject::Tf));
    }
}

/// A data source or a provisioner may run a terraform that logs into the same file.
#[test]
fn a_terraform_that_another_one_has_started_takes_no_promise_away() {
    for lock in [Lock::DynamoDb, Lock::File, Lock::Both] {
        let mut env = leased(lock, "2s");
        let script = env.bin().join("above");
        let text = format!("#!/bin/sh\nexec 9>>\"$TFW_RECORDER\"\n{} \"$@\"\nexit $?\n", terraform().display());
        fs::write(&script, text).unwrap();
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
        env.set("TFW_TERRAFORM", &script);
        let run = env.start_apply(Subject::Tf);
        let record = wait_for_renewal_after(&env, &Value::Null);
        assert_eq!(record["fence"], "stop", "{record}\n{}", env.trace());
        ends_well(&env, run);
    }
}

/// Without a timer, nothing ends the fuse in time (timer_create(2), `RLIMIT_SIGPENDING`).
#[test]
fn where_no_timer_can_be_had_a_lease_promises_nothing() {
    for lock in [Lock::DynamoDb, Lock::File, Lock::Both] {
        let env = leased(lock, "2s");
        let mut command = env.command("prlimit");
        command.args(["--sigpending=0", "tf", "apply", "-auto-approve", "-no-color"]);
        let run = Run::start(command);
        env.wait_for_began(&run);
        promises_nothing(&env, run);
    }
}

/// Checks that the lease of `run` is renewed, that its records promise nothing, and that nothing stops terraform.
#[track_caller]
fn promises_nothing(env: &TestEnv, run: Run) {
    let mut last = Value::Null;
    for _ in 0..3 {
        last = wait_for_renewal_after(env, &last);
        assert_eq!(last["fence"], "none", "{last}\n{}", env.trace());
    }
    assert!(!run.err().contains("terraform was stopped"), "{}", run.err());
    ends_well(env, run);
}

/// While terraform is stopped, another run may get its lock. So what a dead terraform has left may not run again, not
/// even until it gets a signal.
#[test]
fn what_a_terraform_leaves_that_was_killed_while_it_was_stopped_does_not_run_again() {
    for who in ["terraform", "terraform and tf"] {
        let mut env = TestEnv::new(Lock::Both, BUSY);
        env.set("TFW_LEASE", "4s").set("TFW_CLOCK", "steady");
        let (_proxy, is_away) = network(&mut env);
        let run = start(&env);
        let terraform = terraform_below(run.pid());
        is_away.store(true, Ordering::SeqCst);
        wait_until_stopped(&env, terraform);
        let ticks = || fs::metadata(env.directory.join("ticks")).unwrap().len();
        let before = ticks();
        // The network comes back after the death. Otherwise, the lease could be renewed first, and terraform would go on.
        if who == "terraform" {
            kill(terraform, Signal::SIGKILL).unwrap();
            is_away.store(false, Ordering::SeqCst);
            let end = run.wait();
            assert_eq!(end.signal(), Some(9), "{}", env.dump(&end));
        } else {
            // Both are stopped, so that neither acts on the death of the other.
            kill(run.pid(), Signal::SIGSTOP).unwrap();
            kill(terraform, Signal::SIGKILL).unwrap();
            kill(run.pid(), Signal::SIGKILL).unwrap();
            is_away.store(false, Ordering::SeqCst);
        }
        wait_until_all_is_gone(&env);
        assert_eq!(ticks(), before, "{who}: {}", env.trace());
        env.assert_unlocked();
    }
}

/// Returns a new cgroup. `None` for an ordinary user, and on a machine without cgroup v2. These tests are listed in
/// tests/left-out.
pub fn cgroup(name: &str) -> Option<Cgroup> {
    Cgroup::create(&format!("tf-leased-{}-{name}", std::process::id())).ok()
}

#[test]
fn a_frozen_run_whose_lock_nobody_took_goes_on_after_the_thaw() {
    let Some(cgroup) = cgroup("untouched") else { return };
    for lock in [Lock::DynamoDb, Lock::File, Lock::Both] {
        let env = leased(lock, "3s");
        let run = start_in(&cgroup, &env);
        let fuse = named(&env, "tf-fuse");
        cgroup.freeze(true);
        wait_until_gone(&env, fuse);
        cgroup.freeze(false);
        run.wait_for_err("the lease was renewed, and terraform goes on");
        ends_well(&env, run);
    }
}

/// Returns a directory whose runs have a lease of 2 s. Their provisioner waits for a line in the returned pipe, so
/// terraform writes its state a few milliseconds after [`lets_go`], if it may run.
pub fn about_to_write(lock: Lock) -> (TestEnv, PathBuf) {
    let mut env = TestEnv::new(lock, "trap '' INT TERM; touch began; read -r _ < go");
    // Where no state is, terraform first reads again whether there is one, and then writes back what it finds
    // (states/remote/state.go, PersistState).
    let state = SUCCESSOR.replace("successor", "before").replace("5b6a1b9c", "00000000");
    put_state(&env, &state);
    env.set("TFW_LEASE", "2s").set("TFW_CLOCK", "steady");
    let go = env.directory.join("go");
    nix::unistd::mkfifo(&go, nix::sys::stat::Mode::S_IRWXU).unwrap();
    (env, go)
}

/// Writes a line into the pipe `go`. It must stay open: a stop interrupts the shell's open(2), which begins anew.
pub fn lets_go(go: &Path) -> fs::File {
    let mut go = fs::OpenOptions::new().read(true).write(true).open(go).unwrap();
    go.write_all(b"\n").unwrap();
    go
}

#[test]
fn a_frozen_run_whose_lock_was_taken_writes_nothing_after_the_thaw() {
    let Some(cgroup) = cgroup("taken") else { return };
    // More trials: TF_TEST_TRIALS=200.
    let trials = trials(4);
    for (number, lock) in (0..trials).zip([Lock::DynamoDb, Lock::File, Lock::Both].into_iter().cycle()) {
        let (env, go) = about_to_write(lock);
        let run = start_in(&cgroup, &env);
        let fuse = named(&env, "tf-fuse");
        cgroup.freeze(true);
        wait_until_gone(&env, fuse);
        // The successor has the lock, has written its state, and terraform is about to write its own.
        let other = succeed(&env);
        let _open = lets_go(&go);
        cgroup.freeze(false);
        let end = run.wait();
        assert_eq!(end.signal(), Some(9), "{number}: {}", env.dump(&end));
        assert!(end.err.contains("the lock is held by another run now"), "{number}: {}", env.dump(&end));
        assert_eq!(env.state().as_deref(), Some(SUCCESSOR), "{number}: {}", env.dump(&end));
        assert!(env.locks().iter().all(|lock| *lock == other), "{:?}", env.locks());
        wait_until_all_is_gone(&env);
    }
}

/// The order in which the processes of a run are continued.
#[derive(Clone, Copy, Debug)]
enum Continued {
    ByAge,
    ByAgeReversed,
    /// Terraform and its children, and those of `tf` after this time.
    TerraformFirst(Duration),
}

/// A person stops every process of a run for longer than its lease, and continues them one after the other. The stop of
/// the fuse has no effect, because a SIGCONT discards it. So terraform may run until `tf` stops it again, and its write
/// of the state may get out. How often it does is printed, and is in docs/measurements.md: TF_TEST_TRIALS=60.
#[test]
fn a_run_that_was_stopped_and_continued_whole_after_its_lock_was_taken_ends() {
    let trials = trials(1);
    let gaps = [5, 20, 100].map(|gap| Continued::TerraformFirst(Duration::from_millis(gap)));
    for (number, order) in [Continued::ByAge, Continued::ByAgeReversed].into_iter().chain(gaps).enumerate() {
        for is_cut in [false, true] {
            let locks = Lock::ALL.into_iter().cycle().skip(number).take(trials);
            let mut outcomes: Vec<_> = locks.map(|lock| writes_after_it_was_continued(lock, order, is_cut)).collect();
            outcomes.sort_unstable();
            let (median, longest) = (outcomes[trials / 2].0, outcomes[trials - 1].0);
            let written = outcomes.iter().filter(|(_, has_written)| *has_written).count();
            let _ = writeln!(
                std::io::stderr(),
                "{order:?}, connections closed: {is_cut}: {written} of {trials} wrote; all were continued within \
                 {median:.1?}, at most {longest:.1?}"
            );
        }
    }
}

/// Returns the time from the first SIGCONT to the last one, and whether terraform has written over the state of the
/// other run. `is_cut` is whether the service closes its connections while the run is stopped.
fn writes_after_it_was_continued(lock: Lock, order: Continued, is_cut: bool) -> (Duration, bool) {
    let (mut env, go) = about_to_write(lock);
    let proxy = through(&mut env, |_| ProxyAction::Pass);
    let run = start(&env);
    let fuse = named(&env, "tf-fuse");
    // `tf` reads everything that the keeper has reported.
    kill(named(&env, "tf-keeper"), Signal::SIGSTOP).unwrap();
    let reports = || env.trace().matches("keeper: Renewed").count();
    let is_heard = || (reports() == 2 * env.trace().matches(HEARD).count()).then_some(());
    wait_for("the last report", is_heard, || env.trace());
    let mut all = marked(&home(&env));
    for pid in &all {
        let _ = kill(*pid, Signal::SIGSTOP);
    }
    wait_until_gone(&env, fuse);
    let other = succeed(&env);
    if is_cut {
        proxy.close_connections();
    }
    let _open = lets_go(&go);
    let ours = ours(&env);
    let begun = Instant::now();
    match order {
        Continued::ByAge => {}
        Continued::ByAgeReversed => all.reverse(),
        Continued::TerraformFirst(gap) => {
            for pid in all.extract_if(.., |pid| !ours.contains(pid)) {
                let _ = kill(pid, Signal::SIGCONT);
            }
            std::thread::sleep(gap);
        }
    }
    for pid in &all {
        let _ = kill(*pid, Signal::SIGCONT);
    }
    let continued_after = begun.elapsed();
    let end = run.wait();
    let what = || format!("{lock:?} {order:?} {is_cut}: {:?} {}", env.state(), env.dump(&end));
    assert_ne!(end.code(), Some(0), "{}", what());
    assert!(!env.locks().is_empty() && env.locks().iter().all(|lock| *lock == other), "{:?} {}", env.locks(), what());
    wait_until_all_is_gone(&env);
    let has_written = env.state().as_deref() != Some(SUCCESSOR);
    let [admits, denies] = [MAY_HAVE_WRITTEN, "is not in the state"].map(|text| end.err.contains(text));
    if end.signal() == Some(9) {
        assert!(end.err.contains("the lock is held by another run now"), "{}", what());
        assert!(admits != denies && (admits || !has_written), "{}", what());
    } else {
        // Terraform was faster than every stop, and has reported itself that its lock is another one by now.
        assert!(end.err.contains("Error releasing the state lock") && !denies, "{}", what());
    }
    assert!(end.err.contains("another run locked the same state, and both may have changed it"), "{}", what());
    (continued_after, has_written)
}

/// When `tf` hears of the first renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hears {
    AtOnce,
    /// Its response is lost.
    Never,
    /// `tf` is stopped before.
    Later,
}

/// Another process continues a terraform that was stopped for its lease, and it writes its state over that of the run
/// that has the lock now. `tf` and its guardian are stopped meanwhile.
#[test]
fn a_run_whose_stopped_terraform_was_continued_and_wrote_says_so() {
    for hears in [Hears::AtOnce, Hears::Never, Hears::Later] {
        let (mut env, go) = about_to_write(Lock::DynamoDb);
        let [is_away, is_slow, is_sent] = [false, hears == Hears::Later, false].map(|is| Arc::new(AtomicBool::new(is)));
        let (away, slow, sent) = (is_away.clone(), is_slow.clone(), is_sent.clone());
        // Terraform writes the digest after the state. Without a response, it does not go on to its unlock.
        let proxy = through(&mut env, move |request| {
            let renews = request.text().contains("\"beat\"");
            sent.fetch_or(renews, Ordering::SeqCst);
            while renews && slow.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            if !request.is_ours() && is_dynamodb(request, ".PutItem") && request.text().contains("-md5") {
                ProxyAction::Hold
            } else if request.is_ours() && away.load(Ordering::SeqCst) {
                ProxyAction::Close
            } else if renews && hears != Hears::AtOnce {
                away.store(true, Ordering::SeqCst);
                if hears == Hears::Never { ProxyAction::LoseAnswer } else { ProxyAction::Pass }
            } else {
                ProxyAction::Pass
            }
        });
        let run = env.start_apply(Subject::Tf);
        wait_for("a renewal", || is_sent.load(Ordering::SeqCst).then_some(()), || env.trace());
        let (tf, terraform) = (tf_of(&env), terraform_below(run.pid()));
        let ours = [guardian_of(&env, tf), tf];
        let stop_ours = || {
            for pid in ours {
                kill(pid, Signal::SIGSTOP).unwrap();
                wait_until_stopped(&env, pid);
            }
        };
        if hears == Hears::AtOnce {
            env.wait_for_trace(HEARD);
            is_away.store(true, Ordering::SeqCst);
        }
        // If `tf` saw the stop, it would keep terraform from opening a connection.
        stop_ours();
        is_slow.store(false, Ordering::SeqCst);
        wait_until_stopped(&env, terraform);
        let other = succeed(&env);
        let _open = lets_go(&go);
        killpg(terraform, Signal::SIGCONT).unwrap();
        proxy.wait_until_held();
        assert_ne!(env.state().as_deref(), Some(SUCCESSOR));
        is_away.store(false, Ordering::SeqCst);
        for pid in ours {
            kill(pid, Signal::SIGCONT).unwrap();
        }
        let end = run.wait();
        assert_eq!(end.signal(), Some(9), "{hears:?}: {}", env.dump(&end));
        assert!(end.err.contains(MAY_HAVE_WRITTEN), "{hears:?}: {}", env.dump(&end));
        assert_eq!(env.locks(), [other]);
        proxy.let_go();
        wait_until_all_is_gone(&env);
    }
}

/// `tf` was stopped meanwhile, so it hears of the loss when the deadline is long over. But the loss was found before
/// it.
#[test]
fn a_run_that_wrote_while_tf_was_stopped_and_its_lock_another_runs_says_so() {
    let (mut env, go) = about_to_write(Lock::DynamoDb);
    // Terraform must write before the deadline.
    env.set("TFW_LEASE", "20s");
    // Terraform writes the digest after the state. Without a response, it does not go on to its unlock.
    let proxy = through(&mut env, |request| {
        let puts_digest = is_dynamodb(request, ".PutItem") && request.text().contains("-md5");
        if puts_digest && !request.is_ours() { ProxyAction::Hold } else { ProxyAction::Pass }
    });
    let run = start(&env);
    let terraform = terraform_below(run.pid());
    run.send(Signal::SIGSTOP);
    wait_until_stopped(&env, run.pid());
    let other = succeed(&env);
    env.wait_for_trace("keeper: Lost");
    let _open = lets_go(&go);
    proxy.wait_until_held();
    assert_ne!(env.state().as_deref(), Some(SUCCESSOR));
    wait_until_stopped(&env, terraform);
    run.send(Signal::SIGCONT);
    let end = run.wait();
    assert_eq!(end.signal(), Some(9), "{}", env.dump(&end));
    assert!(end.err.contains(MAY_HAVE_WRITTEN), "{}", env.dump(&end));
    assert!(!end.err.contains("was not renewed in time"), "{}", env.dump(&end));
    assert_eq!(env.locks(), [other]);
    proxy.let_go();
    wait_until_all_is_gone(&env);
}

fn a_suspended_run_keeps_its_lease(lock: Lock) {
    let env = leased(lock, "3s");
    let (mut terminal, terraform) = suspended_at_a_terminal(&env);
    wait_for_three_leases_of_3_s(&env);
    assert_eq!(state(terraform), Some('T'));
    terminal.type_in("fg\n");
    wait_until_it_goes_on(&env, terraform);
    env.unblock();
    terminal.wait_for("Apply complete!");
    wait_until_unlocked(&env);
}
for_each_lock!(a_suspended_run_keeps_its_lease);

/// Waits until a lease of 3 s was renewed after three leases from now, by the service's own clock.
#[track_caller]
fn wait_for_three_leases_of_3_s(env: &TestEnv) {
    let since = Timestamp::now().as_second();
    let is_later = || record(env).filter(|now| now["renewed"].as_i64() > Some(since + 9));
    wait_for("three leases", is_later, || format!("{:?}\n{}", record(env), env.trace()));
}

/// What fails while a run is suspended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fails {
    Network,
    Keeper,
    Fuse,
    KeeperAndFuse,
}

/// `tf` itself can do nothing then, because it is suspended as well.
#[test]
fn a_suspended_run_keeps_its_lease_whatever_fails_meanwhile() {
    for (fails, lock) in [
        (Fails::Network, Lock::DynamoDb),
        (Fails::Network, Lock::File),
        (Fails::Keeper, Lock::Both),
        (Fails::Fuse, Lock::File),
        (Fails::KeeperAndFuse, Lock::DynamoDb),
    ] {
        let mut env = leased(lock, "3s");
        let (_proxy, is_away) = network(&mut env);
        let (mut terminal, terraform) = if fails == Fails::Network {
            let suspended = suspended_past_its_deadline(&env, &is_away);
            is_away.store(false, Ordering::SeqCst);
            suspended
        } else {
            let suspended = suspended_at_a_terminal(&env);
            // The guardian has a keeper of its own by then.
            env.wait_for_trace("guardian: tf is suspended, and the guardian renews the lease, too");
            let (keeper, fuse) = (named(&env, "tf-keeper"), named(&env, "tf-fuse"));
            for pid in [keeper, fuse] {
                if fails == Fails::KeeperAndFuse || (pid == fuse) == (fails == Fails::Fuse) {
                    kill(pid, Signal::SIGKILL).unwrap();
                }
            }
            suspended
        };
        wait_for_three_leases_of_3_s(&env);
        assert_eq!(state(terraform), Some('T'), "{fails:?}");
        terminal.type_in("fg\n");
        wait_until_it_goes_on(&env, terraform);
        env.unblock();
        terminal.wait_for("Apply complete!");
        wait_until_unlocked(&env);
        drop(terminal);
        wait_until_all_is_gone(&env);
    }
}

/// Suspends an apply with ^Z. Returns the terminal and terraform.
pub fn suspended_at_a_terminal(env: &TestEnv) -> (Terminal, Pid) {
    let mut terminal = shell(env);
    let terraform = suspended_at(&mut terminal, env);
    (terminal, terraform)
}

/// Types an apply, and suspends it with ^Z when its lease was renewed. Returns terraform.
pub fn suspended_at(terminal: &mut Terminal, env: &TestEnv) -> Pid {
    terminal.type_in(&line_of("tf", APPLY_LINE));
    env.wait_for_file("began");
    wait_for_renewal_after(env, &Value::Null);
    let terraform = terraform_below(terminal.pid());
    terminal.type_in("\x1a");
    terminal.wait_for("Stopped");
    wait_until_stopped(env, terraform);
    terraform
}

/// Suspends an apply with ^Z, and then takes the network away until its fuse is gone. Returns the terminal and
/// terraform.
fn suspended_past_its_deadline(env: &TestEnv, is_away: &AtomicBool) -> (Terminal, Pid) {
    let (terminal, terraform) = suspended_at_a_terminal(env);
    let fuse = named(env, "tf-fuse");
    is_away.store(true, Ordering::SeqCst);
    wait_until_gone(env, fuse);
    (terminal, terraform)
}

/// Starts an apply at a terminal, and takes the network away until the kernel has stopped terraform.
fn stopped_at_a_terminal(env: &TestEnv, is_away: &AtomicBool) -> (Terminal, Pid) {
    let mut terminal = shell(env);
    terminal.type_in(&line_of("tf", APPLY_LINE));
    env.wait_for_file("began");
    wait_for_renewal_after(env, &Value::Null);
    let terraform = terraform_below(terminal.pid());
    is_away.store(true, Ordering::SeqCst);
    wait_until_stopped(env, terraform);
    terminal.wait_for("to end it now, without saving its state, press ^C three times");
    (terminal, terraform)
}

#[test]
fn three_keys_end_a_terraform_that_is_stopped_for_its_lease_and_nothing_else_is_offered() {
    let mut env = leased(Lock::DynamoDb, "3s");
    let (_proxy, is_away) = network(&mut env);
    let (mut terminal, terraform) = stopped_at_a_terminal(&env, &is_away);
    let before = env.state();
    terminal.type_in("\x03");
    terminal.wait_for("press ^C 2 more times");
    terminal.type_in("\x03");
    terminal.wait_for("press ^C 1 more time");
    terminal.type_in("\x03");
    terminal.wait_for("ending the stopped terraform; its state is not saved");
    wait_until_gone(&env, terraform);
    is_away.store(false, Ordering::SeqCst);
    terminal.wait_for("status=137");
    let screen = terminal.screen();
    for text in ["to force it", "and will release its lock", "second interrupt", "Two interrupts"] {
        assert!(!screen.contains(text), "{text}: {screen}");
    }
    assert_eq!(env.state(), before);
    wait_until_unlocked(&env);
}

#[test]
fn two_keys_while_terraform_is_stopped_for_its_lease_are_one_interrupt_when_it_goes_on() {
    let mut env = leased(Lock::DynamoDb, "3s");
    let (_proxy, is_away) = network(&mut env);
    let (mut terminal, _) = stopped_at_a_terminal(&env, &is_away);
    for more in ["press ^C 2 more times", "press ^C 1 more time"] {
        terminal.type_in("\x03");
        terminal.wait_for(more);
    }
    is_away.store(false, Ordering::SeqCst);
    terminal.wait_for("the lease was renewed, and terraform goes on");
    terminal.wait_for("status=1");
    let screen = terminal.screen();
    assert!(!screen.contains("Two interrupts") && !screen.contains("to force it"), "{screen}");
    assert_eq!(env.trace().matches("[InterruptGroup]").count(), 1, "{}", env.trace());
    wait_until_unlocked(&env);
}

#[test]
fn a_ci_job_with_a_terminal_is_not_told_to_press_keys() {
    let mut env = leased(Lock::DynamoDb, "3s");
    env.set("CI", "true");
    let (_proxy, is_away) = network(&mut env);
    let mut terminal = shell(&env);
    terminal.type_in(&line_of("tf", APPLY_LINE));
    env.wait_for_file("began");
    wait_for_renewal_after(&env, &Value::Null);
    is_away.store(true, Ordering::SeqCst);
    terminal.wait_for("it goes on when the service answers and the lock is still this run's");
    is_away.store(false, Ordering::SeqCst);
    terminal.wait_for("the lease was renewed, and terraform goes on");
    assert!(!terminal.screen().contains("press ^C"), "{}", terminal.screen());
    env.unblock();
    terminal.wait_for("Apply complete!");
    wait_until_unlocked(&env);
}

#[test]
fn a_prompt_without_echo_goes_on_after_a_stop_for_the_lease_and_the_terminal_echoes_in_between() {
    let script =
        "bash -c 'read -s -p \"secret? \" secret </dev/tty 2>/dev/tty && echo $secret > answer'; touch answered";
    let mut env = TestEnv::new(Lock::DynamoDb, script);
    env.set("TFW_LEASE", "3s").set("TFW_CLOCK", "steady");
    let (_proxy, is_away) = network(&mut env);
    let mut terminal = shell(&env);
    terminal.type_in(&line_of("tf", APPLY_LINE));
    wait_for_renewal_after(&env, &Value::Null);
    terminal.wait_for("secret? ");
    wait_for("no echo", || (!terminal.echoes()).then_some(()), || terminal.screen());
    for round in 1..=2 {
        is_away.store(true, Ordering::SeqCst);
        terminal.wait_for_times("terraform was stopped, because the lease", round);
        wait_for("an echo", || terminal.echoes().then_some(()), || terminal.screen());
        is_away.store(false, Ordering::SeqCst);
        terminal.wait_for_times("the lease was renewed, and terraform goes on", round);
        wait_for("no echo", || (!terminal.echoes()).then_some(()), || terminal.screen());
    }
    terminal.type_in("sesame\n");
    terminal.wait_for("status=0");
    assert_eq!(env.read("answer"), "sesame\n");
    assert!(!terminal.screen().contains("sesame"), "{}", terminal.screen());
    wait_until_unlocked(&env);
}

#[test]
fn the_approval_prompt_is_answered_after_a_stop_for_the_lease() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    env.set("TFW_LEASE", "3s").set("TFW_CLOCK", "steady");
    let (_proxy, is_away) = network(&mut env);
    let mut terminal = shell(&env);
    terminal.type_in(&line_of("tf", "apply -no-color"));
    terminal.wait_for("Enter a value:");
    wait_for_renewal_after(&env, &Value::Null);
    is_away.store(true, Ordering::SeqCst);
    terminal.wait_for("terraform was stopped, because the lease");
    is_away.store(false, Ordering::SeqCst);
    terminal.wait_for("the lease was renewed, and terraform goes on");
    terminal.type_in("yes\n");
    terminal.wait_for("Apply complete!");
    terminal.wait_for("status=0");
    wait_until_unlocked(&env);
}

#[test]
fn fg_does_not_continue_a_terraform_whose_lease_has_ended_meanwhile() {
    let mut env = leased(Lock::DynamoDb, "3s");
    let (_proxy, is_away) = network(&mut env);
    let (mut terminal, terraform) = suspended_past_its_deadline(&env, &is_away);
    let before = env.state();
    // Terraform would write its state as soon as it ran.
    env.unblock();
    terminal.type_in("fg\n");
    terminal.wait_for("terraform was stopped, because the lease");
    assert_eq!(state(terraform), Some('T'), "{}", env.trace());
    assert_eq!(env.state(), before);
    is_away.store(false, Ordering::SeqCst);
    terminal.wait_for("Apply complete!");
    wait_until_unlocked(&env);
}

#[test]
fn a_sigcont_from_somebody_else_is_answered_with_a_stop() {
    let mut env = leased(Lock::DynamoDb, "3s");
    let (_proxy, is_away) = network(&mut env);
    let run = start(&env);
    let terraform = terraform_below(run.pid());
    is_away.store(true, Ordering::SeqCst);
    wait_until_stopped(&env, terraform);
    run.wait_for_err("terraform was stopped, because the lease");
    continue_in_vain(&env, terraform);
    is_away.store(false, Ordering::SeqCst);
    wait_until_it_goes_on(&env, terraform);
    ends_well(&env, run);
}

/// Another run has the lock of the stopped terraform.
#[test]
fn a_timeout_that_ends_a_run_does_not_continue_its_stopped_terraform() {
    for lock in Lock::ALL {
        let (mut env, go) = about_to_write(lock);
        let (_proxy, is_away) = network_of_tf(&mut env);
        let mut command = env.command("timeout");
        command.args(["1000", "tf", "apply", "-auto-approve", "-no-color"]);
        let run = Run::start(command);
        env.wait_for_began(&run);
        wait_for_renewal_after(&env, &Value::Null);
        let terraform = terraform_below(run.pid());
        let successor = Successor::of_a_stopped_run(&env, &go, (&run, terraform), &is_away);
        // This is how timeout(1) learns that the time is over. It sends SIGTERM to `tf` and to its group, and then
        // SIGCONT to both.
        run.send(Signal::SIGALRM);
        env.wait_for_trace("got SIGTERM");
        env.wait_for_trace("got SIGCONT");
        wait_until_stopped(&env, terraform);
        successor.assert_stands(&env, "before the look");
        is_away.store(false, Ordering::SeqCst);
        let end = run.wait();
        // timeout(1) exits with 137 if its command was killed with SIGKILL, although the time was over.
        assert_eq!(end.code(), Some(137), "{}", env.dump(&end));
        assert!(end.err.contains("the lock is held by another run now"), "{}", env.dump(&end));
        assert!(!end.err.contains(MAY_HAVE_WRITTEN), "{}", env.dump(&end));
        wait_until_all_is_gone(&env);
        successor.assert_stands(&env, "after the look");
    }
}

/// Continues terraform five times, and waits each time until `tf` has stopped it again.
#[track_caller]
fn continue_in_vain(env: &TestEnv, terraform: Pid) {
    // tf has looked at the state of terraform before it sends a SIGSTOP. So it does not notice each SIGCONT, but the kernel
    // reports each stop.
    let stops = || env.trace().matches("terraform was stopped by SIGSTOP").count();
    wait_for("the report of the first stop", || (stops() > 0).then_some(()), || env.trace());
    for _ in 0..5 {
        let before = stops();
        killpg(terraform, Signal::SIGCONT).unwrap();
        wait_for("the report of another stop", || (stops() > before).then_some(()), || env.trace());
        wait_until_stopped(env, terraform);
    }
}

#[test]
fn a_sigcont_from_somebody_else_does_not_let_a_terraform_write_whose_lock_another_run_has() {
    for lock in Lock::ALL {
        let (mut env, go) = about_to_write(lock);
        let (_proxy, is_away) = network_of_tf(&mut env);
        let run = start(&env);
        let terraform = terraform_below(run.pid());
        let successor = Successor::of_a_stopped_run(&env, &go, (&run, terraform), &is_away);
        continue_in_vain(&env, terraform);
        successor.assert_stands(&env, "before the look");
        is_away.store(false, Ordering::SeqCst);
        let end = run.wait();
        assert_eq!(end.signal(), Some(9), "{}", env.dump(&end));
        assert!(end.err.contains("the lock is held by another run now"), "{}", env.dump(&end));
        wait_until_all_is_gone(&env);
        successor.assert_stands(&env, "after the look");
    }
}

/// A terraform that was continued by another process cannot write, and writes when it goes on.
#[test]
fn a_terraform_that_could_not_write_after_a_sigcont_from_somebody_else_writes_when_it_goes_on() {
    for lock in Lock::ALL {
        let (mut env, go) = about_to_write(lock);
        let (_proxy, is_away) = network_of_tf(&mut env);
        let run = start(&env);
        let terraform = terraform_below(run.pid());
        is_away.store(true, Ordering::SeqCst);
        wait_until_stopped(&env, terraform);
        env.wait_for_trace(CANNOT_CONNECT);
        env.wait_for_trace("connections of terraform were broken off");
        let before = env.state();
        let _open = lets_go(&go);
        continue_in_vain(&env, terraform);
        assert_eq!(env.state(), before, "{}", env.trace());
        is_away.store(false, Ordering::SeqCst);
        let end = run.wait();
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        assert_ne!(env.state(), before, "{}", env.dump(&end));
        env.assert_unlocked();
        wait_until_all_is_gone(&env);
    }
}

#[test]
fn fg_does_not_let_a_terraform_write_whose_lock_another_run_has() {
    for lock in Lock::ALL {
        let (mut env, go) = about_to_write(lock);
        let (_proxy, is_away) = network_of_tf(&mut env);
        let (mut terminal, terraform) = suspended_past_its_deadline(&env, &is_away);
        let successor = Successor::succeeds(&env, &go);
        terminal.type_in("fg\n");
        terminal.wait_for("terraform was stopped, because the lease");
        assert_eq!(state(terraform), Some('T'), "{}", env.trace());
        successor.assert_stands(&env, "before the look");
        is_away.store(false, Ordering::SeqCst);
        terminal.wait_for("the lock is held by another run now");
        wait_until_gone(&env, terraform);
        drop(terminal);
        wait_until_all_is_gone(&env);
        successor.assert_stands(&env, "after the look");
    }
}

/// Another run has the lock meanwhile, or nobody has taken it.
#[test]
fn a_run_that_is_suspended_past_its_deadline_writes_nothing_before_a_look_whichever_process_dies() {
    for (number, dead) in [&["tf"][..], &["guardian"], &["tf", "guardian"]].into_iter().enumerate() {
        for is_taken in [false, true] {
            let lock = Lock::ALL[(number + usize::from(is_taken)) % 3];
            let (mut env, go) = about_to_write(lock);
            let (_proxy, is_away) = network_of_tf(&mut env);
            let (mut terminal, terraform) = suspended_past_its_deadline(&env, &is_away);
            let before = env.state();
            let what = format!("{lock:?}, {dead:?} died, taken: {is_taken}");
            let successor = is_taken.then(|| Successor::succeeds(&env, &go));
            let _open = (!is_taken).then(|| lets_go(&go));
            let assert_stands = || match &successor {
                Some(successor) => successor.assert_stands(&env, &what),
                None => assert_eq!(env.state(), before, "{what}\n{}", env.trace()),
            };
            let tf = tf_of(&env);
            let guardian = guardian_of(&env, tf);
            for name in dead {
                let pid = if *name == "tf" { tf } else { guardian };
                kill(pid, Signal::SIGKILL).unwrap();
                wait_until_gone(&env, pid);
            }
            if dead.contains(&"tf") {
                // Nobody is left who could continue it after a look.
                wait_until_gone(&env, terraform);
            } else {
                terminal.type_in("fg\n");
                terminal.wait_for("terraform was stopped, because the lease");
                wait_until_stopped(&env, terraform);
            }
            assert_stands();
            is_away.store(false, Ordering::SeqCst);
            if !dead.contains(&"tf") {
                terminal.wait_for(if is_taken { "the lock is held by another run now" } else { "Apply complete!" });
            }
            if is_taken {
                wait_until_gone(&env, terraform);
                assert_stands();
            } else if dead.len() == 1 {
                // `tf` or its guardian is left, which releases the lock if terraform does not.
                wait_until_unlocked(&env);
            }
            drop(terminal);
            wait_until_all_is_gone(&env);
            if is_taken {
                assert_stands();
            } else {
                // After the death of both, the next run on this host releases the lock.
                let end = env.run(Subject::Tf, &["plan", "-no-color"]);
                assert_eq!(end.code(), Some(0), "{what}: {}", env.dump(&end));
                env.assert_unlocked();
            }
        }
    }
}

#[test]
fn a_process_that_a_provisioner_left_runs_on_after_the_end() {
    let mut env = TestEnv::new(Lock::Both, "sleep 1000 >/dev/null 2>&1 & echo $! > left");
    env.set("TFW_LEASE", "3s").set("TFW_CLOCK", "steady");
    let end = env.run(Subject::Tf, &APPLY);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    let left = Pid::from_raw(env.read("left").trim().parse().unwrap());
    let others = || marked(&home(&env)).into_iter().filter(|pid| *pid != left).collect::<Vec<_>>();
    wait_for("the end of all others", || others().is_empty().then_some(()), || format!("{:?}", others()));
    assert_eq!(state(left), Some('S'));
    kill(left, Signal::SIGKILL).unwrap();
}

/// A script that ignores SIGTERM has a grace period of 5 s. With a lease of 3 s, another host may take the lock within it.
#[test]
fn what_a_dead_terraform_has_left_does_nothing_more_when_its_lease_may_lapse() {
    const LEASE: Duration = Duration::from_secs(3);
    for is_tf_dead in [false, true] {
        // The shell sees each round of `date`, and its own start.
        let script = "trap '' TERM; touch began; while :; do date +%s%N > last; mv last at; done";
        let mut env = TestEnv::new(Lock::Both, script);
        env.set("TFW_LEASE", "3s").set("TFW_CLOCK", "steady");
        let run = start(&env);
        let (tf, terraform) = (tf_of(&env), terraform_below(run.pid()));
        wait_for_renewal_after(&env, &Value::Null);
        kill(terraform, Signal::SIGSTOP).unwrap();
        let renewed: u128 = record(&env).unwrap()["renewed"].as_u64().unwrap().into();
        if is_tf_dead {
            kill(tf, Signal::SIGKILL).unwrap();
        }
        kill(terraform, Signal::SIGKILL).unwrap();
        let end = run.wait();
        wait_until_all_is_gone(&env);
        wait_until_unlocked(&env);
        let worked_until: u128 = env.read("at").trim().parse().unwrap();
        // The last renewal that this test has not seen was sent before terraform was killed.
        let lapses = (renewed + u128::from(LEASE.as_secs())) * 1_000_000_000;
        assert!(worked_until < lapses + 1_500_000_000, "{renewed} {worked_until}\n{}", env.dump(&end));
    }
}

/// The processes of a run, and terraform.
const PROCESSES: [&str; 5] = ["tf", "guardian", "keeper", "fuse", "terraform"];

/// Kills each subset of the processes of a run, while terraform is running and while it is stopped. If `tf` is left,
/// terraform survives. Otherwise it is killed, unless it was running and its fuse is left. In the end no process is
/// left, and the lock is free: the guardian releases it, or else the next run on this host.
fn every_subset(is_stopped: bool) {
    for subset in 1..1_u8 << PROCESSES.len() {
        let mut env = leased(Lock::Both, "3s");
        let (_proxy, is_away) = network(&mut env);
        let run = start(&env);
        let tf = tf_of(&env);
        let terraform = terraform_below(run.pid());
        let guardian = guardian_of(&env, tf);
        if is_stopped {
            is_away.store(true, Ordering::SeqCst);
            wait_until_stopped(&env, terraform);
        }
        let find = |name: &str| ours(&env).into_iter().find(|pid| is_named(*pid, name));
        let pids = [Some(tf), Some(guardian), find("tf-keeper"), find("tf-fuse"), Some(terraform)];
        let victims: Vec<(&str, Pid)> = (0..PROCESSES.len())
            .filter(|place| subset & (1 << place) != 0)
            .filter_map(|place| Some((PROCESSES[place], pids[place]?)))
            .collect();
        let state = env.state();
        for (_, pid) in &victims {
            kill(*pid, Signal::SIGSTOP).unwrap();
        }
        // `tf` is the last one. If the fuse died later, the guardian would interrupt a terraform that still runs.
        for (_, pid) in victims.iter().rev() {
            kill(*pid, Signal::SIGKILL).unwrap();
            wait_until_gone(&env, *pid);
        }
        let has = |name: &str| victims.iter().any(|(victim, _)| *victim == name);
        let what = format!("{victims:?}, stopped: {is_stopped}");
        // A terraform that is stopped, or whose fuse is gone, dies with its `tf`.
        if has("tf") && (is_stopped || has("fuse")) {
            wait_until_gone(&env, terraform);
            assert_eq!(env.state(), state, "{what}\n{}", env.trace());
        }
        is_away.store(false, Ordering::SeqCst);
        env.unblock();
        let end = run.wait();
        if has("tf") {
            assert_eq!(end.signal(), Some(9), "{what}: {}", env.dump(&end));
        } else if has("terraform") {
            // `tf` ends as terraform did, and has released its lock by then.
            assert_eq!(end.signal(), Some(9), "{what}: {}", env.dump(&end));
            env.assert_unlocked();
        } else {
            // Terraform survives the death of every other process, because `tf` restores what is gone.
            assert_eq!(end.code(), Some(0), "{what}: {}", env.dump(&end));
            assert!(end.out.contains("Apply complete!"), "{what}: {}", env.dump(&end));
            let was_stopped = is_stopped || has("fuse");
            assert_eq!(end.err.contains("terraform was stopped"), was_stopped, "{what}: {}", env.dump(&end));
            env.assert_unlocked();
        }
        if has("tf") && !has("guardian") {
            wait_until_unlocked(&env);
        }
        wait_until_all_is_gone(&env);
        // The guardian, or else the next run on this host, releases what is left.
        let end = env.run(Subject::Tf, &["plan", "-no-color"]);
        assert_eq!(end.code(), Some(0), "{what}: {}", env.dump(&end));
        env.assert_unlocked();
    }
}

#[test]
fn after_any_kill_while_terraform_works_nothing_is_left_and_the_lock_is_free_in_the_end() {
    every_subset(false);
}

#[test]
fn after_any_kill_while_terraform_is_stopped_nothing_is_left_and_the_lock_is_free_in_the_end() {
    every_subset(true);
}

#[test]
fn the_lock_that_a_run_leaves_on_purpose_promises_nothing() {
    for lock in [Lock::DynamoDb, Lock::File, Lock::Both] {
        let mut env = leased(lock, "4s");
        env.set("TFW_RELEASE", "never");
        let run = start(&env);
        run.kill_terraform();
        let end = run.wait();
        env.assert_locked();
        assert_eq!(record(&env).unwrap()["fence"], "none", "{}", env.dump(&end));
        env.unblock();
        wait_until_all_is_gone(&env);
    }
}

/// Another run may have the lock by the deadline, and nothing but the fence ends what terraform has left.
#[test]
fn what_a_dead_terraform_leaves_ends_at_the_deadline_if_its_lock_is_lost_and_nothing_may_be_released() {
    for lock in [Lock::DynamoDb, Lock::File, Lock::Both] {
        // The loss of the lock may be found before terraform is killed. The script survives that interrupt, too.
        let mut env = TestEnv::new(lock, &format!("trap '' INT; {BUSY}"));
        env.set("TFW_LEASE", "4s").set("TFW_CLOCK", "steady").set("TFW_RELEASE", "never");
        let run = start(&env);
        env.delete_lock();
        run.kill_terraform();
        let end = run.wait();
        assert_eq!(end.signal(), Some(9), "{}", env.dump(&end));
        wait_until_all_is_gone(&env);
    }
}

/// A keeper that withdraws a promise may have to ask a person for credentials.
#[test]
fn after_a_release_nothing_more_is_asked_about_the_lease() {
    for lock in [Lock::DynamoDb, Lock::File, Lock::Both] {
        let env = leased(lock, "1m");
        let run = start(&env);
        run.kill_terraform();
        let end = run.wait();
        assert!(end.err.contains("tf: released the lock") && !end.err.contains("the lease"), "{}", env.dump(&end));
        env.assert_unlocked();
        assert_eq!(env.trace().matches(" keeper: Some(").count(), 1, "{}", env.dump(&end));
    }
}

/// The run is dead, so another host may release its lock when the lease has lapsed.
#[test]
fn the_lease_of_a_lock_that_could_not_be_released_is_left_to_lapse() {
    for lock in [Lock::DynamoDb, Lock::File, Lock::Both] {
        let mut env = leased(lock, "1m");
        let _proxy = through(&mut env, |request| {
            let is_delete = request.asks_for("DeleteItem") || request.start.starts_with("DELETE ");
            if request.is_ours() && is_delete { ProxyAction::Answer(request.denied()) } else { ProxyAction::Pass }
        });
        let run = start(&env);
        run.kill_terraform();
        let end = run.wait();
        assert!(end.err.contains("was not released") && !end.err.contains("the lease"), "{}", env.dump(&end));
        env.assert_locked();
        assert_eq!(record(&env).unwrap()["fence"], "stop", "{}", env.dump(&end));
    }
}

#[test]
fn a_command_that_is_too_slow_to_withdraw_a_promise_is_killed_with_all_that_it_started() {
    let mut env = slow_credentials::by_a_command(Lock::DynamoDb, "sleep 1000 & wait");
    env.set("TFW_LEASE", "1m").set("TFW_CLOCK", "steady").set("TFW_RELEASE", "never");
    let run = start(&env);
    env.write("then", "");
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("the lease of the lock that stays could not be withdrawn"), "{}", env.dump(&end));
    assert_eq!(env.read("asked").lines().count(), 1, "{}", env.dump(&end));
    env.unblock();
    wait_until_all_is_gone(&env);
    env.assert_locked();
}

/// The test of the service puts an object and deletes it again. Without the delete, the object would stay for ever.
#[test]
fn a_keeper_that_is_told_to_end_while_it_tests_the_service_leaves_no_object() {
    for lock in [Lock::File, Lock::Both] {
        told_to_end_while_it_tests(lock);
    }
}

fn told_to_end_while_it_tests(lock: Lock) {
    let mut env = leased(lock, "1m");
    // `tf` ends the keeper at the latest when terraform has ended.
    env.stand_in("wrapper", "#!/bin/bash\nterraform \"$@\"\nwhile ! test -e end; do sleep 0.02; done\n");
    let is_there = AtomicBool::new(false);
    let proxy = through(&mut env, move |request| {
        let is_put = request.is_ours() && request.start.starts_with("PUT ");
        if !is_put || request.start.contains("tfstate.tflock") {
            return ProxyAction::Pass;
        }
        let is_first = request.header("if-none-match").is_some();
        let is_next = !is_first && is_there.load(Ordering::SeqCst);
        is_there.fetch_or(is_first, Ordering::SeqCst);
        if is_next { ProxyAction::Hold } else { ProxyAction::Pass }
    });
    let run = env.start_apply(Subject::Tf);
    proxy.wait_until_held();
    env.unblock();
    wait_until_unlocked(&env);
    env.wait_for_trace("the lock of the lease is gone");
    proxy.let_go();
    let left = || cloud().s3("GET", &format!("{}?list-type=2", env.bucket), b"").text();
    wait_for("no test object", || (!left().contains(".tflock")).then_some(()), left);
    env.write("end", "");
    let end = run.wait();
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    wait_until_all_is_gone(&env);
}

/// Returns the lock objects in the bucket, and the test objects beside them.
fn lock_objects(env: &TestEnv) -> Vec<String> {
    let listed = cloud().s3("GET", &format!("{}?list-type=2", env.bucket), b"").text();
    let keys = listed.split("<Key>").skip(1).filter_map(|rest| rest.split("</Key>").next());
    keys.filter(|key| key.ends_with(".tflock")).map(ToOwned::to_owned).collect()
}

/// The service does not answer in the first moments of the run only. The objects of its test are deleted.
#[test]
fn a_service_that_is_slow_when_it_is_tested_has_a_lease_later() {
    for lock in [Lock::File, Lock::Both] {
        let mut env = leased(lock, "10s");
        let is_slow = Arc::new(AtomicBool::new(true));
        let slow = is_slow.clone();
        let proxy = through(&mut env, move |request| {
            let is_put = request.is_ours() && request.start.starts_with("PUT ");
            if !is_put || request.start.contains("tfstate.tflock") || !slow.load(Ordering::SeqCst) {
                return ProxyAction::Pass;
            }
            // A request that is held is sent again after some seconds, and a lock with two parts is tested for a
            // shorter time.
            if lock == Lock::File { ProxyAction::Close } else { ProxyAction::Hold }
        });
        let run = env.start_apply(Subject::Tf);
        if lock == Lock::File {
            env.wait_for_trace("the service has not answered whether it obeys");
        } else {
            proxy.wait_until_held();
            wait_for_renewal_after(&env, &record(&env).unwrap_or_default());
        }
        is_slow.store(false, Ordering::SeqCst);
        proxy.let_go();
        let mut last = wait_for_renewal_after(&env, &Value::Null);
        for _ in 0..2 {
            last = wait_for_renewal_after(&env, &last);
        }
        assert_eq!(run.err(), "", "{}", env.trace());
        wait_for(
            "no test object",
            || (lock_objects(&env).len() == 1).then_some(()),
            || format!("{:?}", lock_objects(&env)),
        );
        ends_well(&env, run);
    }
}

/// A second terraform of a wrapper must get the interrupt, too. The wrapper itself writes `second`: bash ignores an
/// interrupt that comes while it waits for a child which does not die of it.
#[test]
fn tf_handles_signals_while_its_keeper_ends() {
    let mut env = leased(Lock::DynamoDb, "1m");
    env.stand_in("wrapper", "#!/bin/bash\nterraform \"$@\"\n: > second\nsleep 1000\n");
    let run = start(&env);
    let keeper = named(&env, "tf-keeper");
    kill(keeper, Signal::SIGSTOP).unwrap();
    env.unblock();
    env.wait_for_trace("the lock of the lease is gone");
    env.wait_for_file("second");
    run.send(Signal::SIGTERM);
    env.wait_for_trace("got SIGTERM");
    assert_eq!(state(keeper), Some('T'), "{}", env.trace());
    run.wait();
    wait_until_all_is_gone(&env);
    env.assert_unlocked();
}

#[test]
fn a_key_ends_the_wait_for_a_service_that_does_not_withdraw_the_promise() {
    let mut env = leased(Lock::DynamoDb, "4s");
    env.set("TFW_RELEASE", "never");
    let (_proxy, is_away) = network(&mut env);
    let run = start(&env);
    is_away.store(true, Ordering::SeqCst);
    run.kill_terraform();
    env.wait_for_trace("the promise of the lease is being withdrawn");
    run.send(Signal::SIGINT);
    let end = run.wait();
    assert!(env.trace().contains("a SIGINT ends the wait for the withdrawal"), "{}", env.trace());
    assert!(end.err.contains("could not be withdrawn"), "{}", env.dump(&end));
    env.unblock();
    wait_until_all_is_gone(&env);
}

#[test]
fn while_tf_is_suspended_its_guardian_answers_a_sigcont_from_somebody_else() {
    let mut env = leased(Lock::DynamoDb, "3s");
    let (_proxy, is_away) = network(&mut env);
    let (mut terminal, terraform) = suspended_past_its_deadline(&env, &is_away);
    killpg(terraform, Signal::SIGCONT).unwrap();
    env.wait_for_trace("guardian: terraform was continued by another process, and is stopped again");
    wait_until_stopped(&env, terraform);
    is_away.store(false, Ordering::SeqCst);
    terminal.type_in("fg\n");
    terminal.wait_for("the lease was renewed, and terraform goes on");
    env.unblock();
    terminal.wait_for("Apply complete!");
    wait_until_unlocked(&env);
}

/// The response of DynamoDB to expired credentials.
pub fn expiry() -> ProxyAction {
    ProxyAction::Answer(Message::answer(
        "400 Bad Request",
        r#"{"__type":"com.amazonaws.dynamodb.v20120810#ExpiredTokenException","message":"expired"}"#,
    ))
}

#[test]
fn a_keeper_whose_credentials_expire_asks_for_new_ones_and_terraform_notices_nothing() {
    let mut env = leased(Lock::DynamoDb, "4s");
    let has_expired = Arc::new(AtomicBool::new(false));
    let expired = has_expired.clone();
    // One renewal is refused.
    let _proxy = through(&mut env, move |request| {
        let is_renewal = is_dynamodb(request, ".PutItem") && request.text().contains("taken");
        if is_renewal && expired.swap(false, Ordering::SeqCst) {
            return expiry();
        }
        ProxyAction::Pass
    });
    let run = start(&env);
    has_expired.store(true, Ordering::SeqCst);
    wait_for("a refusal", || (!has_expired.load(Ordering::SeqCst)).then_some(()), || env.trace());
    for _ in 0..5 {
        let last = record(&env).unwrap_or_default();
        wait_for_renewal_after(&env, &last);
    }
    assert_eq!(run.err(), "", "{}", env.trace());
    ends_well(&env, run);
}
