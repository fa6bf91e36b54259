//! "When terraform ends in any way, the lock that it held is gone by the time `tf` returns."

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};

use crate::support::cloud::cloud;
use crate::support::http::Message;
use crate::support::process::{Run, state, terraform_below};
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::system::is_root_on_linux;
use crate::support::test_env::{APPLY, WAITS, id_of};
use crate::support::{Ended, Lock, Subject, TestEnv, wait_for};

fn bare_terraform_leaves_its_lock_when_it_is_killed(lock: Lock) {
    let env = TestEnv::new(lock, WAITS);
    let run = env.start_apply(Subject::Bare);
    run.send(Signal::SIGKILL);
    env.unblock();
    run.wait();
    env.assert_locked();
}
for_each_lock!(bare_terraform_leaves_its_lock_when_it_is_killed);

fn a_killed_terraform_leaves_no_lock_of_any_kind(lock: Lock) {
    for signal in [Signal::SIGKILL, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGSEGV, Signal::SIGABRT] {
        let env = TestEnv::new(lock, WAITS);
        let run = env.start_apply(Subject::Tf);
        env.assert_locked();
        kill(terraform_below(run.pid()), signal).unwrap();
        let end = run.wait();
        env.assert_unlocked();
        assert!(end.err.contains("released the lock"), "{signal}: {}", end.err);
        match signal {
            // Go's runtime catches these signals, dumps its goroutines and exits with 2.
            Signal::SIGQUIT | Signal::SIGABRT | Signal::SIGSEGV => {
                assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
            }
            _ => assert_eq!(end.signal(), Some(signal as i32), "{}", env.dump(&end)),
        }
        assert!(!end.core_dumped());
    }
}
for_each_lock!(a_killed_terraform_leaves_no_lock_of_any_kind);

#[test]
fn a_quit_is_passed_on_and_the_lock_goes_after_the_crash() {
    let env = TestEnv::new(Lock::Both, WAITS);
    let run = env.start_apply(Subject::Tf);
    run.send(Signal::SIGQUIT);
    let end = run.wait();
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    assert!(end.err.contains("goroutine "), "terraform's own dump is there");
    env.assert_unlocked();
}

/// A stand-in whose child, the real terraform, takes a real lock.
#[test]
fn a_panic_leaves_no_lock() {
    let mut env = TestEnv::new(Lock::Both, WAITS);
    // Terraform's own panic handler exits with 11. Here a shell around terraform exits with that code.
    env.stand_in(
        "panics",
        "#!/bin/bash\nterraform \"$@\" &\nwhile ! test -e began; do sleep 0.01; done\nkill -9 $!\nwait\nexit 11\n",
    );
    let end = env.run(Subject::Tf, &APPLY);
    assert_eq!(end.code(), Some(11), "{}", env.dump(&end));
    assert!(end.err.contains("terraform crashed (exit code 11)"), "{}", end.err);
    env.assert_unlocked();
}

#[test]
fn out_of_memory_is_named_and_the_lock_goes() {
    if !is_root_on_linux() {
        // Only root can create a control group. This test is listed in tests/left-out.
        return;
    }
    let group = memory_group().expect("no memory control group can be made: /sys/fs/cgroup is not writable");
    let env = TestEnv::new(Lock::Both, "touch began; while test -e began && ! test -e go; do sleep 0.02; done");
    let mut command = env.command("sh");
    command.args(["-c", &format!("echo $$ > {group}/cgroup.procs; exec tf apply -auto-approve -no-color")]);
    let run = Run::start(command);
    env.wait_for_began(&run);
    let terraform = terraform_below(run.pid());
    // Terraform is the largest process in the group, and would probably be chosen anyway.
    std::fs::write(format!("/proc/{terraform}/oom_score_adj"), "1000").unwrap();
    let hog = "x=x; while :; do x=$x$x; done";
    let _ = std::process::Command::new("sh")
        .args(["-c", &format!("echo $$ > {group}/cgroup.procs; exec timeout 20 bash -c '{hog}'")])
        .stderr(std::process::Stdio::null())
        .status();
    let end = run.wait();
    assert_eq!(end.signal(), Some(9), "{}", env.dump(&end));
    assert!(end.err.contains("killed by SIGKILL (out of memory)"), "{}", end.err);
    env.assert_unlocked();
    let _ = std::fs::remove_dir(&group);
}

/// Creates a control group with little memory, with version 2 or with the memory controller of version 1. `None` if
/// that is not possible.
fn memory_group() -> Option<String> {
    let name = format!("tf-test-{}", std::process::id());
    let (group, limit) = if std::path::Path::new("/sys/fs/cgroup/memory/memory.limit_in_bytes").exists() {
        (format!("/sys/fs/cgroup/memory/{name}"), "memory.limit_in_bytes")
    } else {
        let _ = std::fs::write("/sys/fs/cgroup/cgroup.subtree_control", "+memory");
        (format!("/sys/fs/cgroup/{name}"), "memory.max")
    };
    std::fs::create_dir(&group).ok()?;
    std::fs::write(format!("{group}/{limit}"), "300000000").ok()?;
    Some(group)
}

#[test]
fn killed_at_any_moment_it_leaves_no_lock() {
    let rounds: u32 = std::env::var("TF_TEST_KILLS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(60);
    for lock in Lock::ALL {
        let env = TestEnv::new(lock, "true");
        let arguments = APPLY;
        let measured = || {
            let begun = Instant::now();
            assert_eq!(env.run(Subject::Tf, &arguments).code(), Some(0));
            begun.elapsed()
        };
        let mut whole = measured();
        let (mut held, mut released, mut round) = (0, 0, 0);
        // If the speed of the machine varies, the moments may miss the lock. Then more moments are tried.
        while round < rounds / 3 || (round < rounds && (held == 0 || released == 0)) {
            // A kill between the write of the state and that of its digest makes every later command fail.
            env.forget_state();
            // The moments are spread evenly over a run, whose duration on this machine is measured again and again.
            let moment = whole * (round % (rounds / 3) + 1) / (rounds / 3);
            let begun = Instant::now();
            let run = env.start(Subject::Tf, &arguments);
            let terraform = terraform_below(run.pid());
            std::thread::sleep(moment.saturating_sub(begun.elapsed()));
            if !env.locks().is_empty() {
                held += 1;
            }
            let _ = kill(terraform, Signal::SIGKILL);
            let end = run.wait();
            assert!(env.locks().is_empty(), "round {round}, killed after {moment:?}: {}", env.dump(&end));
            if end.err.contains("released the lock") {
                released += 1;
            }
            assert!(!end.err.contains("was not released"), "round {round}: {}", env.dump(&end));
            round += 1;
            if round % 10 == 0 || end.code() == Some(0) {
                env.forget_state();
                whole = measured();
            }
        }
        assert!(held > 0 && released > 0, "{lock:?}: held {held}, released {released} of {rounds} times");
    }
}

pub fn through(env: &mut TestEnv, rule: impl Fn(&Message) -> ProxyAction + Send + Sync + 'static) -> Proxy {
    through_changing(env, |_| {}, rule)
}

/// As [`through`], but changes each request before it is forwarded.
pub fn through_changing(
    env: &mut TestEnv,
    change: fn(&mut Message),
    rule: impl Fn(&Message) -> ProxyAction + Send + Sync + 'static,
) -> Proxy {
    let proxy = Proxy::start_changing(cloud().port, change, rule);
    let url = format!("http://127.0.0.1:{}", proxy.port);
    env.set("AWS_ENDPOINT_URL", &url);
    proxy
}

pub fn is_dynamodb(request: &Message, operation: &str) -> bool {
    request.header("x-amz-target").is_some_and(|target| target.ends_with(operation))
}

pub fn takes_item(request: &Message) -> bool {
    is_dynamodb(request, ".PutItem") && !request.text().contains("-md5")
}

/// Whether this is terraform's own delete, which has no condition. The delete of `tf` has one.
pub fn unlocks_item(request: &Message) -> bool {
    is_dynamodb(request, ".DeleteItem") && !request.text().contains("ConditionExpression")
}

pub fn takes_file(request: &Message) -> bool {
    request.start.starts_with("PUT ") && request.start.contains(".tflock")
}

/// Waits while `is_slow`, if this is a write of the state. Returns whether it has waited. The rule of a proxy must
/// close the connection then: a terraform that is still running sends the request again, and what a dead one has sent
/// does not arrive.
pub fn holds_state(request: &Message, is_slow: &AtomicBool) -> bool {
    let is_held = writes_state(request) && is_slow.load(SeqCst);
    while is_held && is_slow.load(SeqCst) {
        std::thread::sleep(Duration::from_millis(5));
    }
    is_held
}

pub fn writes_state(request: &Message) -> bool {
    request.start.starts_with("PUT ") && request.start.contains("prod.tfstate") && !request.start.contains(".tflock")
}

#[test]
fn a_lock_request_in_flight_when_terraform_is_killed_leaves_no_lock() {
    for lock in [Lock::DynamoDb, Lock::File] {
        let mut env = TestEnv::new(lock, "true");
        let proxy = through(&mut env, move |request| {
            if takes_item(request) || takes_file(request) { ProxyAction::Hold } else { ProxyAction::Pass }
        });
        let run = env.start(Subject::Tf, &APPLY);
        proxy.wait_until_held();
        run.kill_terraform();
        // The request lands when its sender is dead, and after `tf` has looked and found nothing.
        env.wait_for_trace("the tree is dead");
        env.wait_for_trace("holds nothing");
        assert!(env.locks().is_empty());
        proxy.let_go();
        proxy.wait_until_delivered();
        let end = run.wait();
        assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
        env.assert_unlocked();
    }
}

/// Kills terraform while a proxy holds its lock request, and waits until `tf` has remembered the request. Also returns
/// the proxy.
fn killed_before_the_answer(lock: Lock) -> (TestEnv, Proxy) {
    let mut env = TestEnv::new(lock, "true");
    let proxy = through(&mut env, |request| {
        if takes_item(request) || takes_file(request) { ProxyAction::Hold } else { ProxyAction::Pass }
    });
    let run = env.start(Subject::Tf, &APPLY);
    proxy.wait_until_held();
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("the next tf in this directory releases it"), "{}", env.dump(&end));
    (env, proxy)
}

/// Lets the lock request that `proxy` holds land.
pub fn lands(env: &TestEnv, proxy: &Proxy) {
    proxy.let_go();
    proxy.wait_until_delivered();
    env.assert_locked();
}

/// Checks that the next `tf`, with the arguments `words`, releases the lock of a request that has landed. That `tf` uses
/// no proxy.
pub fn released_by_the_next_tf(env: &TestEnv, words: &[&str]) -> Ended {
    let mut next = env.command(env.bin().join("tf"));
    next.args(words).env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", cloud().port));
    let end = Run::start(next).wait();
    assert!(end.err.contains("appeared after its terraform had died"), "{}", env.dump(&end));
    env.assert_unlocked();
    end
}

#[test]
fn a_lock_request_that_lands_after_everybody_looked_is_gone_in_the_end() {
    for lock in [Lock::DynamoDb, Lock::File] {
        let (env, proxy) = killed_before_the_answer(lock);
        lands(&env, &proxy);
        let end = released_by_the_next_tf(&env, &["plan", "-no-color"]);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        // The request may land once more, because terraform's SDK may have sent it twice.
        let left = std::fs::read_dir(env.directory.join("../home/.local/state/tf/tombstones")).unwrap().count();
        assert_eq!(left, 1);
    }
}

/// The file of a request that was remembered a moment ago looks two days old if the clock was set forward by two days.
#[test]
fn a_clock_that_is_set_forward_lets_no_lock_request_be_forgotten() {
    let (env, proxy) = killed_before_the_answer(Lock::DynamoDb);
    let requests = std::fs::read_dir(super::survived::journal(&env).join("tombstones")).unwrap();
    let [path] = requests.map(|entry| entry.unwrap().path()).collect::<Vec<_>>().try_into().unwrap();
    let mut request: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let since: jiff::Timestamp = request["since"].as_str().unwrap().parse().unwrap();
    request["since"] = (since - jiff::SignedDuration::from_hours(48)).to_string().into();
    std::fs::write(&path, request.to_string()).unwrap();
    lands(&env, &proxy);
    let end = released_by_the_next_tf(&env, &["plan", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
}

#[test]
fn a_run_that_a_late_lock_refuses_gives_it_back_and_says_so() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let first = through(&mut env, |request| if takes_item(request) { ProxyAction::Hold } else { ProxyAction::Pass });
    let run = env.start(Subject::Tf, &APPLY);
    first.wait_until_held();
    run.kill_terraform();
    run.wait();
    // The next run begins before the request lands, and requests its lock afterwards.
    let second =
        through(
            &mut env,
            |request| if request.start.contains("list-type") { ProxyAction::Hold } else { ProxyAction::Pass },
        );
    let run = env.start(Subject::Tf, &APPLY);
    second.wait_until_held();
    first.let_go();
    first.wait_until_delivered();
    second.let_go();
    let end = run.wait();
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(
        end.err.contains("appeared after its terraform had died") && end.err.contains("run the command again"),
        "{}",
        env.dump(&end)
    );
    env.assert_unlocked();
}

/// Terraform's own retry is refused by the lock that its first request took. If the lock has two parts, the undo of
/// the other part may still be in flight, so `tf` waits before it releases them.
#[test]
fn a_lost_reply_to_the_lock_request_leaves_no_lock() {
    type Takes = fn(&Message) -> bool;
    let lost: [(Lock, Takes); 4] =
        [(Lock::DynamoDb, takes_item), (Lock::File, takes_file), (Lock::Both, takes_file), (Lock::Both, takes_item)];
    let run = |subject: Subject, left: bool, (lock, takes): (Lock, Takes)| {
        let mut env = TestEnv::new(lock, "true");
        let once = AtomicBool::new(true);
        let _proxy = through(&mut env, move |request| {
            if takes(request) && once.swap(false, SeqCst) { ProxyAction::LoseAnswer } else { ProxyAction::Pass }
        });
        let end = env.run(subject, &APPLY);
        assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
        assert!(end.err.contains("Error acquiring the state lock"), "{}", end.err);
        assert_eq!(!env.locks().is_empty(), left, "{subject:?} {lock:?}: {}", env.dump(&end));
    };
    std::thread::scope(|scope| {
        for lost in lost {
            scope.spawn(move || run(Subject::Tf, false, lost));
        }
        scope.spawn(move || lost.into_iter().for_each(|lost| run(Subject::Bare, true, lost)));
    });
}

/// With `-lock-timeout`, terraform repeats its request until the time is up, and is refused by its own lock each time.
#[test]
fn a_lock_that_was_released_after_a_lock_timeout_is_not_said_to_be_missing() {
    for (lock, takes) in
        [(Lock::DynamoDb, takes_item as fn(&Message) -> bool), (Lock::File, takes_file), (Lock::Both, takes_item)]
    {
        let mut env = TestEnv::new(lock, "true");
        let once = AtomicBool::new(true);
        let _proxy = through(&mut env, move |request| {
            if takes(request) && once.swap(false, SeqCst) { ProxyAction::LoseAnswer } else { ProxyAction::Pass }
        });
        let end = env.run(Subject::Tf, &["apply", "-auto-approve", "-no-color", "-lock-timeout=5s"]);
        assert_eq!(end.code(), Some(1), "{lock:?}: {}", env.dump(&end));
        assert!(end.err.contains("released the lock"), "{lock:?}: {}", env.dump(&end));
        assert!(!end.err.contains("may still appear"), "{lock:?}: {}", env.dump(&end));
        env.assert_unlocked();
    }
}

#[test]
fn a_failing_unlock_leaves_no_lock() {
    for (subject, left) in [(Subject::Bare, true), (Subject::Tf, false)] {
        for lock in Lock::ALL {
            let mut env = TestEnv::new(lock, "true");
            // Every unlock of terraform fails. It is recognized by its lack of a condition.
            let _proxy = through(&mut env, move |request| {
                let item = unlocks_item(request);
                let file = request.start.starts_with("DELETE ") && request.header("if-match").is_none();
                if item || file { ProxyAction::Answer(Message::answer("403 Forbidden", "")) } else { ProxyAction::Pass }
            });
            let end = env.run(subject, &APPLY);
            assert!(end.err.contains("Error releasing the state lock"), "{}", env.dump(&end));
            assert_eq!(!env.locks().is_empty(), left, "{subject:?} {lock:?}: {}", env.dump(&end));
        }
    }
}

#[test]
fn half_a_lock_is_given_back() {
    // Terraform is killed between the two requests that acquire the lock: the object exists, the item does not.
    let mut env = TestEnv::new(Lock::Both, "true");
    let proxy = through(&mut env, |request| if takes_item(request) { ProxyAction::Hold } else { ProxyAction::Pass });
    let run = env.start(Subject::Tf, &APPLY);
    proxy.wait_until_held();
    assert_eq!(env.locks().len(), 1);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();

    // Terraform is killed between the two requests that release the lock: the object is deleted, the item is not.
    let mut env = TestEnv::new(Lock::Both, "true");
    let proxy = through(&mut env, |request| if unlocks_item(request) { ProxyAction::Hold } else { ProxyAction::Pass });
    let run = env.start(Subject::Tf, &APPLY);
    proxy.wait_until_held();
    assert_eq!(env.locks().len(), 1);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
}

#[test]
fn an_unlock_in_flight_never_hits_the_next_holder() {
    // Terraform's own delete has no condition. It is held, terraform is killed, and `tf` waits for the delete to land.
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let proxy = through(&mut env, |request| {
        let unlock = unlocks_item(request);
        if unlock { ProxyAction::Hold } else { ProxyAction::Pass }
    });
    let run = env.start(Subject::Tf, &APPLY);
    proxy.wait_until_held();
    run.kill_terraform();
    env.wait_for_trace("waiting for a write");
    env.assert_locked();
    proxy.let_go();
    proxy.wait_until_delivered();
    // The delete hits the lock that its own terraform left.
    env.assert_unlocked();
    let end = run.wait();
    assert_eq!(end.signal(), Some(9), "{}", env.dump(&end));
}

#[test]
fn wherever_the_working_directory_says_the_state_is() {
    let kill_it = |env: &TestEnv, run: Run| -> Ended {
        env.wait_for_began(&run);
        run.kill_terraform();
        let end = run.wait();
        assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
        end
    };
    // A selected workspace.
    let env = TestEnv::new(Lock::Both, WAITS);
    assert_eq!(env.run(Subject::Tf, &["workspace", "new", "green"]).code(), Some(0));
    let run = env.start_apply(Subject::Tf);
    assert_eq!(env.locks_at("env:/green/dir/prod.tfstate").len(), 2);
    kill_it(&env, run);
    assert!(env.locks_at("env:/green/dir/prod.tfstate").is_empty());

    // A workspace from TF_WORKSPACE.
    let mut env = TestEnv::new(Lock::Both, WAITS);
    env.set("TF_WORKSPACE", "blue");
    let run = env.start_apply(Subject::Tf);
    assert_eq!(env.locks_at("env:/blue/dir/prod.tfstate").len(), 2);
    kill_it(&env, run);
    assert!(env.locks_at("env:/blue/dir/prod.tfstate").is_empty());

    // -chdir, run from the directory above.
    let env = TestEnv::empty(Lock::Both);
    std::fs::create_dir(env.directory.join("sub")).unwrap();
    env.write_main("", "touch ../began; while test -e ../began && ! test -e ../go; do sleep 0.02; done");
    std::fs::rename(env.directory.join("main.tf"), env.directory.join("sub/main.tf")).unwrap();
    assert_eq!(env.run(Subject::Bare, &["-chdir=sub", "init"]).code(), Some(0));
    let run = env.start(Subject::Tf, &["-chdir=sub", "apply", "-auto-approve", "-no-color"]);
    kill_it(&env, run);
    env.assert_unlocked();

    // TF_DATA_DIR, relative and absolute.
    for absolute in [false, true] {
        let mut env = TestEnv::empty(Lock::Both);
        let data = if absolute { env.directory.join("elsewhere") } else { "elsewhere".into() };
        env.set("TF_DATA_DIR", data);
        env.write_main("", WAITS);
        env.init();
        assert!(!env.exists(".terraform"));
        let run = env.start_apply(Subject::Tf);
        kill_it(&env, run);
        env.assert_unlocked();
    }

    // The user's own logging. Its variables keep their effect.
    let mut env = TestEnv::new(Lock::Both, WAITS);
    let log = env.directory.join("own.log");
    env.set("TF_LOG", "DEBUG").set("TF_LOG_PATH", log);
    let run = env.start_apply(Subject::Tf);
    kill_it(&env, run);
    env.assert_unlocked();
    assert!(env.read("own.log").contains("[DEBUG]"), "the user's own log is there");
}

/// Starts an apply whose provisioner starts `worker`, which appends to `work` again and again, and then waits.
pub fn apply_with_worker(subject: Subject, starts: &str, python: bool) -> (TestEnv, Run) {
    let env = TestEnv::empty(Lock::Both);
    let python3 = crate::support::cloud::tool("python3");
    let command = if python { starts.replace("PYTHON", python3.to_str().unwrap()) } else { starts.to_owned() };
    env.write_main("", &command);
    env.write("worker", "trap '' TERM INT HUP\nwhile :; do echo work >> work; sleep 0.02; done\n");
    env.write("spawn.py", "import subprocess, time\nsubprocess.Popen(['bash', 'worker'], start_new_session=True)\nopen('began', 'w').close()\ntime.sleep(60)\n");
    env.write("closes", "for n in $(seq 3 1023); do eval \"exec $n>&-\"; done\nbash worker & touch began; wait\n");
    env.init();
    let run = env.start_apply(subject);
    env.wait_for_file("work");
    (env, run)
}

#[test]
fn what_outlives_a_killed_terraform_is_ended_before_the_lock_goes() {
    for (name, starts, python) in [
        ("ignores TERM", "bash worker & touch began; wait", false),
        ("python's subprocess, its own session", "exec PYTHON spawn.py", true),
        ("closed descriptors", "exec 3>&1; exec bash closes", false),
        ("a cleared environment", "env -i PATH=$PATH bash worker & touch began; wait", false),
        (
            "a cleared environment and a session of its own",
            "env -i PATH=$PATH setsid bash worker & touch began; sleep 60",
            false,
        ),
    ] {
        let (env, run) = apply_with_worker(Subject::Tf, starts, python);
        run.kill_terraform();
        let mut at_release = None;
        let last_held = wait_for(
            "the lock to go",
            || {
                let work = env.read("work").len();
                if env.locks().is_empty() {
                    at_release
                } else {
                    at_release = Some(work);
                    None
                }
            },
            || env.trace(),
        );
        let end = run.wait();
        let work = env.read("work").len();
        // The work that was written when the lock was last seen is all the work there is, apart from a write that fell
        // between the two looks and before the release.
        assert!(work - last_held < 200, "{name}: {work} after {last_held}");
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(env.read("work").len(), work, "{name}: it works on. {}", env.dump(&end));
        assert!(end.err.contains("released the lock"), "{name}: {}", env.dump(&end));
    }
}

/// Without a free descriptor, `tf` sees no process at all.
#[cfg(target_os = "linux")]
#[test]
fn a_lock_is_kept_while_the_processes_of_its_run_cannot_be_listed() {
    let (env, run) = apply_with_worker(Subject::Tf, "exec PYTHON spawn.py", true);
    let limit = |soft: u64| {
        let limit = libc::rlimit { rlim_cur: soft, rlim_max: 1024 };
        // SAFETY: `limit` is a complete rlimit, and no old limit is asked for.
        let set =
            unsafe { libc::prlimit(run.pid().as_raw(), libc::RLIMIT_NOFILE, &raw const limit, std::ptr::null_mut()) };
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    };
    run.kill_terraform();
    // The worker ignores a SIGTERM for as long as it may.
    env.wait_for_trace("ending ");
    limit(0);
    env.wait_for_trace("the process list could not be read");
    limit(1024);
    let last_held = wait_for(
        "the end of the worker",
        || {
            let work = env.read("work").len();
            env.locks().is_empty().then_some(work)
        },
        || env.trace(),
    );
    let end = run.wait();
    // At most one write may fall between the last look and the read of the file.
    assert!(env.read("work").len() - last_held < 200, "it works on. {}", env.dump(&end));
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
}

#[test]
fn a_terraform_that_ended_by_itself_leaves_running_what_was_left_on_purpose() {
    // The unlock fails, so that there is a lock to release and no process to kill.
    let mut env = TestEnv::new(
        Lock::DynamoDb,
        "nohup sh -c 'touch began; while test -e began && ! test -e go; do sleep 0.02; done; touch ended' >/dev/null 2>&1 &",
    );
    let _proxy = through(&mut env, |request| {
        if unlocks_item(request) {
            ProxyAction::Answer(Message::answer("403 Forbidden", ""))
        } else {
            ProxyAction::Pass
        }
    });
    let end = env.run(Subject::Tf, &APPLY);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    // It is not known whether that process still changes something, so the lock is held as long as it runs.
    assert!(end.err.contains("are still running") && end.err.contains("was not released"), "{}", env.dump(&end));
    let step = "when they have exited, or after you have killed them, type: tf locks recover";
    let ours: Vec<&str> = end.err.lines().filter(|line| line.starts_with("tf: ")).collect();
    assert!(ours.contains(&format!("tf: {step}").as_str()), "{}", env.dump(&end));
    assert!(ours.iter().all(|line| !line.contains("force-unlock")), "{}", env.dump(&end));
    env.assert_locked();
    env.wait_for_file("began");
    assert!(!env.exists("ended"));
    env.unblock();
    env.wait_for_file("ended");
    wait_for(
        "the next tf to release the lock",
        || {
            let end = env.run(Subject::Tf, &["locks", "recover"]);
            (end.code() == Some(0)).then_some(())
        },
        || env.trace(),
    );
    env.assert_unlocked();
}

#[test]
fn after_an_interrupt_what_runs_on_is_named_and_not_ended() {
    let env = TestEnv::new(Lock::Both, "setsid sleep 30 & touch began; wait");
    let run = env.start_apply(Subject::Tf);
    let sleeping = wait_for(
        "sleep",
        || {
            crate::support::process::tree(run.pid())
                .into_iter()
                .find(|process| process.1 == "sleep")
                .map(|process| process.0)
        },
        || env.trace(),
    );
    run.send(Signal::SIGTERM);
    let end = run.wait();
    assert!(end.err.contains(&format!("sleep (pid {sleeping})")), "{}", env.dump(&end));
    assert!(state(sleeping).is_some_and(|state| state != 'Z'));
    kill(sleeping, Signal::SIGKILL).unwrap();
    env.assert_unlocked();
}

#[test]
fn a_state_write_in_flight_never_lands_over_the_next_ones() {
    let mut env = TestEnv::new(Lock::Both, "true");
    let proxy = through(&mut env, |request| if writes_state(request) { ProxyAction::Hold } else { ProxyAction::Pass });
    let run = env.start(Subject::Tf, &APPLY);
    proxy.wait_until_held();
    run.kill_terraform();
    env.wait_for_trace("waiting for a write");
    // The other terraform reaches the cloud directly, and waits for the lock.
    let cloud = format!("http://127.0.0.1:{}", cloud().port);
    env.set("AWS_ENDPOINT_URL", cloud);
    let contender = env.start(Subject::Bare, &["apply", "-auto-approve", "-no-color", "-lock-timeout=60s"]);
    // The write lands 6 s after the death of its sender.
    std::thread::sleep(Duration::from_secs(6));
    proxy.let_go();
    proxy.wait_until_delivered();
    let end = run.wait();
    assert!(end.err.contains("a write of its state that was in flight has arrived"), "{}", env.dump(&end));
    let theirs = contender.wait();
    assert_eq!(theirs.code(), Some(0), "{}{}", theirs.out, theirs.err);
    env.assert_unlocked();
    // The other terraform has seen the write, and its state builds on it.
    let state: serde_json::Value = serde_json::from_str(&env.state().unwrap()).unwrap();
    assert!(state["serial"].as_u64().unwrap() >= 1, "{state}");
    assert_eq!(state["resources"].as_array().unwrap().len(), 1);
}

#[test]
fn the_sdk_follows_a_plain_block_and_the_environment() {
    // The usual configuration: neither path style nor an endpoint in the block.
    let env = TestEnv::empty(Lock::Both);
    env.write_main("", WAITS);
    let text = env.read("main.tf").replace("use_path_style = true\n", "");
    env.write("main.tf", &text);
    env.init();
    let run = env.start_apply(Subject::Tf);
    let id = id_of(&env.locks()[0]);
    run.kill_terraform();
    let end = run.wait();
    env.assert_unlocked();
    assert!(end.err.contains(&id), "{}", end.err);
}

#[test]
fn a_service_that_cuts_our_own_deletes_answer_is_no_error() {
    for lock in [Lock::DynamoDb, Lock::File] {
        let mut env = TestEnv::new(lock, WAITS);
        let once = AtomicBool::new(true);
        let _proxy = through(&mut env, move |request| {
            let ours = (is_dynamodb(request, ".DeleteItem") && request.text().contains("ConditionExpression"))
                || (request.start.starts_with("DELETE ") && request.header("if-match").is_some());
            if ours && once.swap(false, SeqCst) { ProxyAction::LoseAnswer } else { ProxyAction::Pass }
        });
        let run = env.start_apply(Subject::Tf);
        run.kill_terraform();
        let end = run.wait();
        assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
        env.assert_unlocked();
    }
}

/// A command that takes a lock, the commands that must run before it, the key of the state that it locks, and the
/// request that it makes under the lock.
struct Locking {
    before: &'static [&'static [&'static str]],
    command: &'static [&'static str],
    key: &'static str,
    does: &'static str,
}

const DEFAULT: &str = "dir/prod.tfstate";
const GREEN: &str = "env:/green/dir/prod.tfstate";
const APPLY_IN_COLOR: &[&str] = &["apply", "-auto-approve"];
const LOCKING: &[Locking] = &[
    Locking { before: &[APPLY_IN_COLOR], command: &["apply", "-destroy", "-auto-approve"], key: DEFAULT, does: "PUT " },
    Locking {
        before: &[APPLY_IN_COLOR],
        command: &["state", "mv", "terraform_data.a", "terraform_data.b"],
        key: DEFAULT,
        does: "PUT ",
    },
    Locking { before: &[APPLY_IN_COLOR], command: &["state", "rm", "terraform_data.a"], key: DEFAULT, does: "PUT " },
    Locking {
        before: &[APPLY_IN_COLOR],
        command: &["state", "push", "-force", "other.json"],
        key: DEFAULT,
        does: "PUT ",
    },
    Locking { before: &[APPLY_IN_COLOR], command: &["taint", "terraform_data.a"], key: DEFAULT, does: "PUT " },
    Locking {
        before: &[APPLY_IN_COLOR, &["taint", "terraform_data.a"]],
        command: &["untaint", "terraform_data.a"],
        key: DEFAULT,
        does: "PUT ",
    },
    Locking { before: &[], command: &["import", "terraform_data.a", "an-id"], key: DEFAULT, does: "PUT " },
    Locking { before: &[], command: &["workspace", "new", "green"], key: GREEN, does: "PUT " },
    Locking {
        before: &[&["workspace", "new", "green"], &["workspace", "select", "default"]],
        command: &["workspace", "delete", "green"],
        key: GREEN,
        // It releases its lock before it deletes the state.
        does: "GET ",
    },
];

/// Kills terraform while that request is in flight, and the lock is held.
fn kill_while_locked(case: &Locking, subject: Subject) -> (TestEnv, Ended) {
    let mut env = TestEnv::new(Lock::Both, "true");
    env.write(
        "other.json",
        r#"{"version":4,"terraform_version":"1.11.4","serial":9,"lineage":"other","outputs":{},"resources":[]}"#,
    );
    for before in case.before {
        let end = env.run(Subject::Bare, before);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    }
    let locked = AtomicBool::new(false);
    let does = case.does;
    let proxy = through(&mut env, move |request| {
        use std::sync::atomic::Ordering::SeqCst;
        locked.fetch_or(takes_item(request), SeqCst);
        let is_it = request.start.starts_with(does) && request.start.contains("prod.tfstate?");
        if is_it && locked.load(SeqCst) { ProxyAction::Hold } else { ProxyAction::Pass }
    });
    let run = env.start(subject, &[case.command, &["-no-color"]].concat());
    proxy.wait_until_held();
    assert_eq!(env.locks_at(case.key).len(), 2, "{:?}", case.command);
    match subject {
        Subject::Tf => run.kill_terraform(),
        Subject::Bare => run.send(Signal::SIGKILL),
    }
    proxy.let_go();
    let end = run.wait();
    (env, end)
}

#[test]
fn every_command_that_locks_is_given_its_lock_back_and_bare_leaves_it() {
    std::thread::scope(|scope| {
        for case in LOCKING {
            scope.spawn(|| {
                let (env, _) = kill_while_locked(case, Subject::Bare);
                assert_eq!(env.locks_at(case.key).len(), 2, "{:?} is no command that leaves its lock", case.command);
                let (env, end) = kill_while_locked(case, Subject::Tf);
                assert!(end.err.contains("released the lock"), "{:?}: {}", case.command, env.dump(&end));
                assert!(env.locks_at(case.key).is_empty(), "{:?}: {}", case.command, env.dump(&end));
            });
        }
    });
}
