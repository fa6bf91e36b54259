//! A run that waits for a lock (`-lock-timeout`) says who holds it.

use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::support::cloud::cloud;
use crate::support::lease::{LEASED, record};
use crate::support::process::tree;
use crate::support::processes::wait_until_ours_are_gone;
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::test_env::{FAKETIME, WAITS, id_of, who};
use crate::support::{Lock, Subject, TestEnv, wait_for};

const PLAN: [&str; 3] = ["plan", "-no-color", "-lock-timeout=60s"];

/// Puts a proxy before the cloud, and returns the requests of `tf` that have reached it, each as its first line and its
/// operation.
fn requests_of_ours(env: &mut TestEnv) -> (Proxy, Arc<Mutex<Vec<String>>>) {
    let asked = Arc::<Mutex<Vec<String>>>::default();
    let seen = Arc::clone(&asked);
    let proxy = Proxy::start(cloud().port, move |request| {
        if request.is_ours() {
            let operation = request.header("x-amz-target").unwrap_or_default();
            seen.lock().unwrap().push(format!("{} {operation}", request.start));
        }
        ProxyAction::Pass
    });
    env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    (proxy, asked)
}

fn a_run_that_waits_says_once_who_holds_the_lock(lock: Lock) {
    let env = TestEnv::new(lock, WAITS);
    let holder = env.start_apply(Subject::Tf);
    let id = id_of(&env.locks()[0]);
    let waiting = env.start(Subject::Tf, &PLAN);
    waiting.wait_for_err("the holder is alive");
    env.unblock();
    let end = holder.wait();
    assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", env.dump(&end));
    let end = waiting.wait();
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    let begin = format!("tf: terraform is waiting for a lock held by {} for OperationTypeApply, since ", who());
    assert!(end.err.starts_with(&begin) && end.err.lines().count() == 1, "{}", env.dump(&end));
    let known = "the holder is alive: held by terraform apply on this host (tf pid ";
    assert!(end.err.contains(&format!(", ID {id}")) && end.err.contains(known), "{}", env.dump(&end));
    assert!(!end.out.contains("tf:"), "{}", env.dump(&end));
    wait_until_ours_are_gone(&env);
    env.assert_unlocked();
}
for_each_lock!(a_run_that_waits_says_once_who_holds_the_lock);

/// With a lease, the lock itself says which CI job holds it. No lock may be released here, so nothing else happens.
fn a_run_that_waits_says_when_the_holder_changes(lock: Lock) {
    let mut env = TestEnv::new(lock, "true");
    env.set("TFW_RELEASE", "never");
    env.lock_with_lease(&record(0, 3000));
    let (_proxy, asked) = requests_of_ours(&mut env);
    let waiting = env.start(Subject::Tf, &PLAN);
    waiting.wait_for_err(LEASED);
    let other = env.lock_of_another();
    waiting.wait_for_err(&id_of(&other));
    let pids: Vec<_> = tree(waiting.pid()).into_iter().map(|(pid, ..)| pid).collect();
    // When it has the lock, it may renew a lease of its own.
    let asked = asked.lock().unwrap().clone();
    env.delete_lock();
    let end = waiting.wait();
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    let lines: Vec<&str> = end.err.lines().collect();
    let [first, second] = lines[..] else { panic!("{}", env.dump(&end)) };
    for text in [
        "tf: terraform is waiting for a lock held by runner@fv-az1 for OperationTypeApply, since ",
        ", job GitHub Actions https://ci.example/job/7; the holder is alive: its lease was renewed ",
    ] {
        assert!(first.contains(text), "{}", env.dump(&end));
    }
    let begin = format!("tf: the lock for which terraform is waiting is now held by {}", who());
    assert!(second.starts_with(&begin) && second.contains("; the holder"), "{}", env.dump(&end));
    // The run that waits does not hold the lock, although it is older than the lock.
    assert!(!pids.iter().any(|pid| second.contains(&format!("(pid {pid})"))), "{pids:?}: {}", env.dump(&end));
    let writes = ["PUT ", "DELETE ", "PutItem", "DeleteItem", "UpdateItem"];
    assert!(!asked.iter().any(|request| writes.iter().any(|write| request.contains(write))), "{asked:?}");
    wait_until_ours_are_gone(&env);
}
for_each_lock!(a_run_that_waits_says_when_the_holder_changes);

/// The clock of `tf` is 20 times as fast, so the 5 min are 15 s. That of terraform is not: it uses no C library.
#[test]
fn a_run_that_waits_says_again_every_five_minutes_who_holds_the_lock() {
    if !Path::new(FAKETIME).exists() {
        return;
    }
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    env.set("TFW_RELEASE", "never").set("TFW_LEASE", "off");
    let (_proxy, asked) = requests_of_ours(&mut env);
    let id = id_of(&env.lock_of_another());
    env.set("LD_PRELOAD", FAKETIME).set("FAKETIME", "+0 x20");
    let begun = Instant::now();
    let waiting = env.start(Subject::Tf, &["plan", "-no-color", "-lock-timeout=5m"]);
    waiting.wait_for_err(&format!("ID {id}"));
    let first = waiting.err();
    waiting.wait_for_err("terraform is still waiting");
    assert!(begun.elapsed() >= Duration::from_secs(15), "{:?}", begun.elapsed());
    let second = waiting.err();
    let reads = || asked.lock().unwrap().len();
    let before = reads();
    let more = || (reads() >= before + 4).then_some(());
    wait_for("four more reads", more, || format!("{} {}", waiting.err(), env.trace()));
    assert_eq!(waiting.err(), second);
    env.delete_lock();
    let end = waiting.wait();
    assert_eq!((end.code(), &end.err), (Some(0), &second), "{}", env.dump(&end));
    let again = second.strip_prefix(&first).unwrap_or_else(|| panic!("{second}"));
    assert_eq!((first.lines().count(), again.lines().count()), (1, 1), "{second}");
    let expected =
        format!("tf: terraform is still waiting for a lock held by {} for OperationTypeApply, since ", who());
    assert!(again.starts_with(&expected) && again.contains(&format!("ID {id}")), "{second}");
    wait_until_ours_are_gone(&env);
}

/// This test is about a run that takes longer than the 3 s after which a wait is explained.
fn a_run_that_has_its_lock_sends_no_request_however_long_it_works(lock: Lock) {
    let mut env = TestEnv::new(lock, "sleep 4");
    env.set("TFW_LEASE", "off");
    let (_proxy, asked) = requests_of_ours(&mut env);
    let end = env.run(Subject::Tf, &["apply", "-auto-approve", "-no-color", "-lock-timeout=60s"]);
    assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", env.dump(&end));
    assert!(asked.lock().unwrap().is_empty(), "{:?}", asked.lock().unwrap());
}
for_each_lock!(a_run_that_has_its_lock_sends_no_request_however_long_it_works);
