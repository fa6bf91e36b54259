//! "If terraform died while it was writing, its lock is released only after that write has arrived, or after nothing
//! has arrived for the quiet window", with an outage of the network, for a recovery, and next to another run's part.
//!
//! These tests are about waits of `tf`, so where they sleep, the sleep is what `tf` must wait through.

use std::fs;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use super::given_back::{through, unlocks_item, writes_state};
use super::survived::{edit, forget_recorder, killed_whole, records};
use crate::support::cloud::cloud;
use crate::support::http::Message;
use crate::support::process::Run;
use crate::support::processes::{KillOnDrop, home, kill_all};
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::relay::Relay;
use crate::support::test_env::{APPLY, lock_json};
use crate::support::{Lock, Subject, TestEnv, wait_for};

const OTHER: &str = "22222222-3333-4444-5555-666666666666";

/// The quiet window of `tf`: `QUIET_WINDOW` in src/lock/release_step.rs.
const QUIET_WINDOW: Duration = Duration::from_secs(10);

/// Longer than the quiet window, and shorter than the time for which `tf` retries a service (20 s).
const OUTAGE: Duration = Duration::from_secs(12);

/// How long after the end of an outage the write arrives that was in flight: the kernel has waited for longer and
/// longer times before it sends again.
const RETRANSMISSION: Duration = Duration::from_secs(3);

/// What the network does with the requests of `tf`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Network {
    Up,
    /// It closes the connection of each request.
    Refuses,
    /// It drops every packet. The kernel of the sender repeats a request until the network is up again.
    Drops,
}

/// Whether this is the first request of a look: `tf` reads the state, its digest, and both parts of the lock.
fn begins_look(request: &Message) -> bool {
    request.is_ours() && request.start.starts_with("HEAD ") && request.start.contains("prod.tfstate ")
}

/// An apply that was killed while the write of its state was held back, and the network between `tf` and the services.
struct Writing {
    env: TestEnv,
    run: Run,
    proxy: Proxy,
    network: Arc<Mutex<Network>>,
    /// The number of looks of `tf` whose first request has reached the service.
    looks: Arc<AtomicUsize>,
}

impl Writing {
    /// Kills terraform, and waits until `tf` has begun to wait for the write, and has looked twice.
    fn killed() -> Self {
        let mut env = TestEnv::new(Lock::Both, "true");
        let network = Arc::new(Mutex::new(Network::Up));
        let looks = Arc::new(AtomicUsize::new(0));
        let (state, count) = (Arc::clone(&network), Arc::clone(&looks));
        let proxy = through(&mut env, move |request| {
            if writes_state(request) {
                return ProxyAction::Hold;
            }
            if !request.is_ours() {
                return ProxyAction::Pass;
            }
            let now = || *state.lock().unwrap();
            while now() == Network::Drops {
                std::thread::sleep(Duration::from_millis(5));
            }
            if now() == Network::Refuses {
                return ProxyAction::Close;
            }
            if begins_look(request) {
                count.fetch_add(1, SeqCst);
            }
            ProxyAction::Pass
        });
        let run = env.start(Subject::Tf, &APPLY);
        proxy.wait_until_held();
        run.kill_terraform();
        env.wait_for_trace("waiting for a write");
        let writing = Self { env, run, proxy, network, looks };
        writing.wait_for_looks(2);
        writing
    }

    /// Waits until `is_so` returns true. Panics if the lock is released before.
    #[track_caller]
    fn wait_for(&self, what: &str, is_so: impl Fn() -> bool) {
        let seen = || format!("{:?}\n{}{}", self.env.locks(), self.run.err(), self.env.trace());
        wait_for(what, || (is_so() || self.env.locks().is_empty()).then_some(()), seen);
        assert!(!self.env.locks().is_empty(), "released before {what}:\n{}", seen());
    }

    /// Waits until `tf` has completed `number` more looks. A look is complete when the next one begins.
    #[track_caller]
    fn wait_for_looks(&self, number: usize) {
        let before = self.looks.load(SeqCst);
        self.wait_for("more looks", || self.looks.load(SeqCst) > before + number);
    }

    fn set(&self, network: Network) {
        *self.network.lock().unwrap() = network;
    }

    fn failed_looks(&self) -> usize {
        self.env.trace().matches("not seen: ").count()
    }

    /// Waits until one more look of `tf` has failed.
    #[track_caller]
    fn wait_for_failed_look(&self) {
        let before = self.failed_looks();
        self.wait_for("a look that fails", || self.failed_looks() > before);
    }

    /// Lets the write arrive, after the network is up and `tf` has looked. The lock must be held until then.
    #[track_caller]
    fn arrives(self) {
        self.wait_for_looks(1);
        std::thread::sleep(RETRANSMISSION);
        self.env.assert_locked();
        self.proxy.let_go();
        assert!(self.proxy.wait_until_delivered().contains(" 200 "));
        let end = self.run.wait();
        assert!(
            end.err.contains("a write of its state that was in flight has arrived")
                && end.err.contains("released the lock"),
            "{}",
            self.env.dump(&end)
        );
        self.env.assert_unlocked();
    }
}

#[test]
fn a_write_that_arrives_after_an_outage_longer_than_the_window_arrives_before_the_release() {
    std::thread::scope(|scope| {
        for network in [Network::Refuses, Network::Drops] {
            scope.spawn(move || {
                let writing = Writing::killed();
                writing.set(network);
                std::thread::sleep(OUTAGE);
                writing.env.assert_locked();
                writing.set(Network::Up);
                writing.arrives();
            });
        }
    });
}

/// Each outage is shorter than the longest time between two reads that `tf` takes for undisturbed (5 s), so only the
/// read that has failed shows it.
#[test]
fn a_network_that_comes_and_goes_is_not_taken_for_a_quiet_one() {
    let writing = Writing::killed();
    let begun = Instant::now();
    while begun.elapsed() < OUTAGE {
        writing.set(Network::Refuses);
        writing.wait_for_failed_look();
        writing.set(Network::Up);
        writing.wait_for_looks(1);
    }
    writing.arrives();
}

/// Returns the environment of an apply whose state is larger than the buffer of a connection that nobody reads. So its
/// write stays in terraform's kernel while the relay is stalled. It waits before it ends, as [`TestEnv::start_apply`]
/// does, if `command` does.
pub fn with_large_state(env: &TestEnv) {
    fs::write(env.directory.join("large.txt"), "0123456789abcdef".repeat(1 << 14)).unwrap();
    let main = env.directory.join("main.tf");
    let text = fs::read_to_string(&main).unwrap();
    fs::write(main, text + "resource \"terraform_data\" \"large\" {\n  input = file(\"large.txt\")\n}\n").unwrap();
}

/// After a long outage of the network, the kernel repeats what a dead process has sent later than the quiet window.
#[test]
fn a_write_that_the_kernel_of_a_dead_terraform_still_holds_arrives_before_the_release() {
    let mut env = TestEnv::new(Lock::Both, "true");
    with_large_state(&env);
    let relay = Relay::start(cloud().port);
    env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", relay.port));
    let run = env.start(Subject::Tf, &APPLY);
    relay.wait_until_stalled();
    run.kill_terraform();
    run.wait_for_err("tf: this host is still sending data of a process that has ended");
    let begun = Instant::now();
    while begun.elapsed() < QUIET_WINDOW + RETRANSMISSION {
        env.assert_locked();
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(env.state(), None);
    relay.resume();
    let end = run.wait();
    let arrived = "a write of its state that was in flight has arrived";
    assert!(end.err.contains(arrived) && end.err.contains("released the lock"), "{}", env.dump(&end));
    assert!(env.state().is_some_and(|state| state.contains("0123456789abcdef")));
    env.assert_unlocked();
}

/// Makes everything that is recorded about the only run of `env` half an hour older: the times in its record and the
/// creation of its lock. So the run was silent for half an hour before it was killed, as if it had been frozen.
fn make_older(env: &TestEnv) {
    fn earlier(value: &mut Value) {
        match value {
            Value::String(text) => {
                if let Ok(time) = text.parse::<Timestamp>() {
                    *text = (time - SignedDuration::from_mins(30)).to_string();
                }
            }
            Value::Array(all) => all.iter_mut().for_each(earlier),
            Value::Object(all) => all.values_mut().for_each(earlier),
            _ => {}
        }
    }
    // The recorder would add what the record lacks, with the times of now.
    forget_recorder(env);
    edit(env, earlier);
    let mut lock: Value = serde_json::from_str(&env.locks()[0]).unwrap();
    earlier(&mut lock["Created"]);
    env.put_lock(&lock.to_string());
}

/// Waits until the record of the only run says that its terraform is writing.
fn wait_for_recorded_write(env: &TestEnv) {
    let text = || records(env).iter().map(|path| fs::read_to_string(path).unwrap_or_default()).collect::<String>();
    let is_writing = || {
        let record: Value = serde_json::from_str(&text()).ok()?;
        (record["log"]["locks"][0]["uploading"] == true).then_some(())
    };
    wait_for("the write in the record", is_writing, || format!("{}\n{}", text(), env.trace()));
}

/// Kills a run together with its `tf` and its guardian, while a proxy holds the write of its state. Also returns the
/// proxy.
fn killed_whole_while_writing(lock: Lock) -> (TestEnv, Proxy, KillOnDrop) {
    let mut env = TestEnv::new(lock, "true");
    let kill = KillOnDrop(home(&env));
    let proxy = through(&mut env, |request| if writes_state(request) { ProxyAction::Hold } else { ProxyAction::Pass });
    let run = env.start(Subject::Tf, &APPLY);
    proxy.wait_until_held();
    wait_for_recorded_write(&env);
    kill_all(&env);
    drop(run);
    env.assert_locked();
    (env, proxy, kill)
}

/// Waits until the recovery of `next` waits for a write, as `is_waiting` says, or has released the lock.
pub fn wait_for_the_wait(env: &TestEnv, next: &Run, is_waiting: impl Fn() -> bool) {
    wait_for(
        "the wait for a write, or a release",
        || (is_waiting() || env.locks().is_empty()).then_some(()),
        || format!("{}{}", next.err(), env.trace()),
    );
}

/// A terraform that is frozen for half an hour and then killed may have sent a write in the meantime: its log does not
/// say so.
#[test]
fn a_recovery_waits_for_the_write_of_a_run_whose_log_has_long_been_silent() {
    std::thread::scope(|scope| {
        for does_arrive in [true, false] {
            scope.spawn(move || {
                let (env, proxy, _kill) = killed_whole_while_writing(Lock::Both);
                make_older(&env);
                let begun = Instant::now();
                let next = env.start(Subject::Tf, &["plan", "-no-color"]);
                wait_for_the_wait(&env, &next, || env.trace().contains("waiting for a write"));
                if does_arrive {
                    std::thread::sleep(RETRANSMISSION);
                    env.assert_locked();
                    proxy.let_go();
                    assert!(proxy.wait_until_delivered().contains(" 200 "));
                }
                let end = next.wait();
                assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
                assert!(end.err.contains("released the lock that an earlier run left"), "{}", env.dump(&end));
                assert!(begun.elapsed() >= QUIET_WINDOW, "{:?}: {}", begun.elapsed(), env.dump(&end));
                assert_eq!(env.trace().contains("it landed"), does_arrive, "{}", env.dump(&end));
                assert_eq!(env.state().is_some(), does_arrive, "{}", env.dump(&end));
                env.assert_unlocked();
            });
        }
    });
}

/// After a logout, the end of the log is lost. Terraform may have been writing when it was killed.
#[test]
fn a_recovery_without_the_end_of_the_log_waits_for_a_write() {
    let env = killed_whole(Lock::DynamoDb);
    forget_recorder(&env);
    let end = env.run(Subject::Tf, &["plan", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert!(end.err.contains("terraform's last write may still arrive"), "{}", env.dump(&end));
    assert!(end.err.contains("released the lock that an earlier run left"), "{}", env.dump(&end));
    env.assert_unlocked();
}

/// A recovery in another network namespace does not see what the kernel still sends for the dead terraform.
#[test]
fn a_recovery_in_another_network_namespace_waits_as_long_as_the_kernel_sends() {
    let (env, _proxy, _kill) = killed_whole_while_writing(Lock::DynamoDb);
    let mut network = Value::Null;
    edit(&env, |record| network = record["host"]["network"].take());
    assert!(network.is_u64(), "{network}");
    let next = env.start(Subject::Tf, &["plan", "-no-color"]);
    let is_unseen = "tf cannot see whether the system is still sending data of that terraform";
    wait_for_the_wait(&env, &next, || next.err().contains(is_unseen));
    env.assert_locked();
    assert!(next.err().contains("so it waits 240 s before that"), "{}{}", next.err(), env.trace());
    kill_all(&env);
    drop(next);
    edit(&env, |record| record["host"]["network"] = network.clone());
    let end = env.run(Subject::Tf, &["plan", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert!(end.err.contains("until nothing has arrived for 10 s"), "{}", env.dump(&end));
    assert!(!end.err.contains(is_unseen), "{}", env.dump(&end));
    env.assert_unlocked();
}

/// Whether this is terraform's own delete of the lock object, which has no condition.
fn unlocks_file(request: &Message) -> bool {
    request.start.starts_with("DELETE ") && request.header("if-match").is_none()
}

/// Another run that waits takes the free part, is refused the other one, and deletes its part again and again.
/// Terraform does that with growing pauses, so this test does it in its place: it changes the part after each look of
/// `tf`.
///
/// In the first case, terraform was killed during its unlock: its delete of the item is in flight, and another run
/// takes the object. In the second case, it was killed while it undid a lock request: the item was another run's, and
/// its delete of the object is in flight.
#[test]
fn another_runs_part_does_not_prolong_the_wait() {
    std::thread::scope(|scope| {
        for ours_is_item in [true, false] {
            scope.spawn(move || {
                let mut env = TestEnv::new(Lock::Both, "true");
                let theirs = lock_json(OTHER, &env.path());
                let looks = Arc::new(AtomicUsize::new(0));
                let count = Arc::clone(&looks);
                let proxy = through(&mut env, move |request| {
                    if begins_look(request) {
                        count.fetch_add(1, SeqCst);
                    }
                    let undoes = if ours_is_item { unlocks_item(request) } else { unlocks_file(request) };
                    if undoes { ProxyAction::Hold } else { ProxyAction::Pass }
                });
                let object = format!("{}.tflock", env.path());
                let put = || {
                    if ours_is_item {
                        cloud().s3("PUT", &object, theirs.as_bytes());
                    } else {
                        cloud().put_item(&env.table, &env.path(), &theirs);
                    }
                };
                let delete = || {
                    if ours_is_item {
                        cloud().s3("DELETE", &object, b"");
                    } else {
                        cloud().delete_item(&env.table, &env.path());
                    }
                };
                if !ours_is_item {
                    put();
                }
                let run = env.start(Subject::Tf, &APPLY);
                proxy.wait_until_held();
                let begun = Instant::now();
                run.kill_terraform();
                env.wait_for_trace("waiting for a write");
                let ours = || {
                    if ours_is_item { cloud().item(&env.table, &env.path()) } else { cloud().object(&object) }
                };
                let mut changes = 0;
                while ours().is_some() {
                    if changes % 2 == 0 {
                        put();
                    } else {
                        delete();
                    }
                    changes += 1;
                    let before = looks.load(SeqCst);
                    wait_for(
                        "the next look, or the release",
                        || (looks.load(SeqCst) > before + 1 || ours().is_none()).then_some(()),
                        || format!("{:?}\n{}{}", env.locks(), run.err(), env.trace()),
                    );
                    assert!(begun.elapsed() < QUIET_WINDOW * 3, "{changes} changes: {}{}", run.err(), env.trace());
                }
                assert!(begun.elapsed() >= QUIET_WINDOW, "{:?}: {}", begun.elapsed(), env.trace());
                assert!(changes > 5, "{changes} changes: {}", env.trace());
                // The other run has its whole lock now.
                env.put_lock(&theirs);
                let end = run.wait();
                assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
                assert!(!env.trace().contains("it landed"), "{}", env.dump(&end));
                assert_eq!(env.trace().matches("waiting for a write").count(), 1, "{}", env.dump(&end));
                assert_eq!(env.locks(), [theirs.clone(), theirs.clone()], "{}", env.dump(&end));
            });
        }
    });
}
