//! "After terraform's whole process tree is dead, a lock that it held is gone: released by `tf`, else by the guardian that
//! outlives it, else by the next `tf` on that host", and never a living one's.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use serde_json::Value;

use super::given_back::{apply_with_worker, is_dynamodb, takes_file, takes_item, through};
use super::interrupted_once::slow_to_plan;
use crate::support::cloud::cloud;
use crate::support::household::{
    Sweep, guardian_of, home, kill_all, marked, ours, tf_of, wait_until_all_is_gone, wait_until_ours_are_gone,
    wait_until_unlocked,
};
use crate::support::http::Message;
use crate::support::process::{Run, state, terraform_below};
use crate::support::proxy::{Deed, Proxy};
use crate::support::terminal::Terminal;
use crate::support::world::{WAITS, id_of, lock_json};
use crate::support::{Ended, Lock, Subject, World, wait_for};

const APPLY: [&str; 3] = ["apply", "-auto-approve", "-no-color"];
const PLAN: [&str; 2] = ["plan", "-no-color"];

/// Where the journal of a world lies.
pub fn journal(world: &World) -> PathBuf {
    world.directory.parent().unwrap().join("home/.local/state/tf")
}

/// The records that are there, by their paths.
pub fn records(world: &World) -> Vec<PathBuf> {
    let entries = fs::read_dir(journal(world).join("runs")).into_iter().flatten().flatten();
    entries.map(|entry| entry.path().join("record.json")).filter(|path| path.exists()).collect()
}

/// Every file below the state directory, with its content.
fn everything_written(world: &World) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    let mut directories = vec![journal(world)];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                directories.push(entry.path());
            } else {
                found.push((entry.path(), fs::read(entry.path()).unwrap_or_default()));
            }
        }
    }
    found
}

#[track_caller]
pub fn assert_nothing_left(world: &World) {
    // The history stays: it is for people. So does what is known of the programs: it is about no run.
    let left = || -> Vec<PathBuf> {
        let paths = everything_written(world).into_iter().map(|(path, _)| path);
        paths
            .filter(|path| {
                let name = path.file_name().unwrap().to_string_lossy();
                !name.starts_with("history.") && name != "programs.json"
            })
            .collect()
    };
    wait_for("an empty journal", || left().is_empty().then_some(()), || format!("{:?}\n{}", left(), world.trace()));
}

/// Changes the one record of a world.
pub fn edit(world: &World, change: impl Fn(&mut Value)) {
    let [path] = records(world).try_into().expect("one record");
    let mut record: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    change(&mut record);
    fs::write(path, record.to_string()).unwrap();
}

/// A world in which a run was killed, with everything that was to look after it; its lock stands.
pub fn killed_whole(lock: Lock) -> World {
    let world = World::new(lock, WAITS);
    kill_whole(&world);
    world
}

pub fn kill_whole(world: &World) {
    let run = world.start_apply(Subject::Tf);
    world.assert_locked();
    let id = id_of(&world.locks()[0]);
    // What the guardian has written down is on its way to the disk for a moment after the lock stands.
    wait_for(
        "the journal",
        || {
            // Of a lock that it only knows to be asked for, a request may still land.
            let has_it = |record: &Value| {
                let locks = record["log"]["locks"].as_array().into_iter().flatten();
                locks.into_iter().any(|lock| lock["id"] == id.as_str() && lock["locked"].is_string())
            };
            let texts = records(world).into_iter().map(|path| fs::read(path).unwrap_or_default());
            let mut all = texts.filter_map(|text| serde_json::from_slice::<Value>(&text).ok());
            all.any(|record| has_it(&record)).then_some(())
        },
        || format!("{:?}\n{}", records(world), world.trace()),
    );
    kill_all(world);
    drop(run);
    world.assert_locked();
    for name in ["began", "go"] {
        let _ = fs::remove_file(world.directory.join(name));
    }
}

/// The next command gives the lock back, says so in one line, and goes on.
#[track_caller]
fn assert_next_gives_back(world: &World) {
    let end = world.run(Subject::Tf, &PLAN);
    assert_eq!(end.code(), Some(0), "{}", world.story(&end));
    assert_eq!(end.err.matches("released the lock that an earlier run left").count(), 1, "{}", world.story(&end));
    world.assert_unlocked();
    assert_nothing_left(world);
}

// ---- the guardian

#[test]
fn a_killed_tf_lets_terraform_stop_once_save_its_state_and_unlock() {
    for lock in Lock::ALL {
        // To a pipe that tf drained: what terraform still writes must not kill it.
        let world = World::new(lock, WAITS);
        let run = world.start_apply(Subject::Tf);
        let tf = tf_of(&world);
        kill(tf, Signal::SIGKILL).unwrap();
        assert_eq!(run.wait().signal(), Some(9));
        wait_until_unlocked(&world);
        wait_until_all_is_gone(&world);
        assert!(
            world.trace().contains("terraform ended: Some(Exited(1))") || !kernel_tells_ends(),
            "{}",
            world.trace()
        );
        let state = world.state().expect("its state was saved");
        assert!(state.contains("tainted"), "{state}");
        assert_nothing_left(&world);
        // Unlocked by terraform itself, and every part of the state fits: the next run works.
        assert!(!world.trace().contains("deleted "), "{}", world.trace());
        let end = world.run(Subject::Tf, &PLAN);
        assert_eq!(end.code(), Some(0), "{}", world.story(&end));
    }
}

/// PIDFD_INFO_EXIT is there since Linux 6.15.
fn kernel_tells_ends() -> bool {
    let release = nix::sys::utsname::uname().unwrap().release().to_string_lossy().into_owned();
    let mut numbers = release.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(6), Some(15))
}

#[test]
fn a_killed_tf_gives_terraform_one_interrupt_in_all() {
    for before in [false, true] {
        let mut world = World::empty(Lock::DynamoDb);
        world.count_signals();
        let run = world.start_apply(Subject::Tf);
        if before {
            run.send(Signal::SIGTERM);
            wait_for("the signal", || (world.seen().len() == 1).then_some(()), || world.trace());
        }
        kill(tf_of(&world), Signal::SIGKILL).unwrap();
        run.wait();
        world.wait_for_trace("guardian: tf is gone");
        wait_for("the signal", || (!world.seen().is_empty()).then_some(()), || world.trace());
        world.go();
        wait_until_all_is_gone(&world);
        assert_eq!(world.seen(), ["SIGINT"], "interrupted before: {before}\n{}", world.trace());
    }
}

#[test]
fn a_killed_tf_and_terraform_leave_no_lock() {
    for lock in Lock::ALL {
        for terraform_first in [false, true] {
            let world = World::new(lock, WAITS);
            let run = world.start_apply(Subject::Tf);
            let (tf, terraform) = (run.pid(), terraform_below(run.pid()));
            for pid in if terraform_first { [terraform, tf] } else { [tf, terraform] } {
                kill(pid, Signal::SIGKILL).unwrap();
            }
            run.wait();
            wait_until_unlocked(&world);
            wait_until_all_is_gone(&world);
            assert_nothing_left(&world);
        }
    }
}

#[test]
fn both_groups_killed_leave_no_lock_and_bare_leaves_one() {
    let bare = World::new(Lock::Both, WAITS);
    let run = bare.start_apply(Subject::Bare);
    killpg(run.pid(), Signal::SIGKILL).unwrap();
    run.wait();
    bare.assert_locked();

    let world = World::new(Lock::Both, WAITS);
    let run = world.start_apply(Subject::Tf);
    let terraform = terraform_below(run.pid());
    killpg(run.pid(), Signal::SIGKILL).unwrap();
    let _ = killpg(terraform, Signal::SIGKILL);
    run.wait();
    wait_until_unlocked(&world);
    wait_until_ours_are_gone(&world);
    assert_nothing_left(&world);
}

/// An apply in an interactive shell with job control, its provisioner at work.
fn apply_in_a_shell(world: &World) -> (Terminal, Pid) {
    let mut shell = world.command("bash");
    shell.args(["--norc", "-i"]);
    let mut terminal = Terminal::start(shell);
    terminal.type_in(&format!("tf {}\r", APPLY.join(" ")));
    world.wait_for_file("began");
    (terminal, tf_of(world))
}

#[test]
fn a_terraform_that_was_stopped_when_tf_was_killed_leaves_no_lock() {
    // In a terminal with job control, where the kernel hangs it up.
    let world = World::new(Lock::Both, WAITS);
    let _sweep = Sweep(home(&world));
    let (mut terminal, tf) = apply_in_a_shell(&world);
    terminal.type_in("\x1a");
    wait_for("the stop", || (state(tf) == Some('T')).then_some(()), || world.trace());
    kill(tf, Signal::SIGKILL).unwrap();
    wait_until_unlocked(&world);
    wait_until_ours_are_gone(&world);

    // And without one, where nobody continues it but the guardian.
    let world = World::new(Lock::Both, WAITS);
    let run = world.start_apply(Subject::Tf);
    let terraform = terraform_below(run.pid());
    kill(terraform, Signal::SIGSTOP).unwrap();
    wait_for("the stop", || (state(terraform) == Some('T')).then_some(()), || world.trace());
    kill(run.pid(), Signal::SIGKILL).unwrap();
    run.wait();
    wait_until_unlocked(&world);
    wait_until_all_is_gone(&world);
}

#[test]
fn a_tf_that_stopped_with_a_terraform_that_is_then_killed_goes_on_and_gives_the_lock_back() {
    let world = World::new(Lock::Both, WAITS);
    let _sweep = Sweep(home(&world));
    let (mut terminal, tf) = apply_in_a_shell(&world);
    let terraform = terraform_below(tf);
    terminal.type_in("\x1a");
    wait_for("the stop", || (state(tf) == Some('T')).then_some(()), || world.trace());
    world.assert_locked();
    kill(terraform, Signal::SIGKILL).unwrap();
    wait_until_unlocked(&world);
    wait_until_ours_are_gone(&world);
}

#[test]
fn the_guardian_ends_what_outlives_terraform_before_the_lock_goes() {
    for (name, starts, python) in [
        ("ignores TERM", "bash worker & touch began; wait", false),
        ("python's subprocess, its own session", "exec PYTHON spawn.py", true),
        ("closed descriptors", "exec 3>&1; exec bash closes", false),
    ] {
        let (world, run) = apply_with_worker(Subject::Tf, starts, python);
        let terraform = terraform_below(run.pid());
        for pid in [terraform, run.pid()] {
            kill(pid, Signal::SIGKILL).unwrap();
        }
        run.wait();
        wait_until_unlocked(&world);
        let work = world.read("work").len();
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(world.read("work").len(), work, "{name}: it works on. {}", world.trace());
        wait_until_all_is_gone(&world);
    }
}

#[test]
fn the_guardian_sees_to_the_stop_timeout() {
    let (mut world, proxy) = slow_to_plan();
    world.set("TFW_STOP_TIMEOUT", "500ms");
    let _sweep = Sweep(home(&world));
    let run = world.start(Subject::Tf, &APPLY);
    proxy.wait_until_held();
    world.wait_for_locked();
    kill(run.pid(), Signal::SIGKILL).unwrap();
    run.wait();
    // Terraform waits for an answer that never comes, and does not stop.
    wait_until_unlocked(&world);
    wait_until_ours_are_gone(&world);
    proxy.let_go();
}

#[test]
fn a_guardian_that_is_killed_alone_changes_nothing() {
    let world = World::new(Lock::Both, WAITS);
    let run = world.start_apply(Subject::Tf);
    kill(guardian_of(&world, run.pid()), Signal::SIGKILL).unwrap();
    world.wait_for_trace("the guardian is gone");
    world.assert_locked();
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", world.story(&end));
    world.assert_unlocked();
    assert_nothing_left(&world);
}

#[test]
fn a_lock_request_in_flight_when_tf_and_terraform_are_killed_is_gone_in_the_end() {
    for lock in [Lock::DynamoDb, Lock::File] {
        let mut world = World::new(lock, "true");
        let direct = world.environment();
        let proxy =
            through(
                &mut world,
                |request| {
                    if takes_item(request) || takes_file(request) { Deed::Hold } else { Deed::Pass }
                },
            );
        let run = world.start(Subject::Tf, &APPLY);
        proxy.wait_until_held();
        let terraform = terraform_below(run.pid());
        for pid in [terraform, run.pid()] {
            kill(pid, Signal::SIGKILL).unwrap();
        }
        run.wait();
        // The guardian looks for as long as `tf` would, and remembers it.
        wait_until_ours_are_gone(&world);
        proxy.let_go();
        proxy.wait_until_delivered();
        world.assert_locked();
        let mut next = world.command(world.bin().join("tf"));
        next.args(PLAN).env_clear().envs(direct);
        let end = Run::start(next).wait();
        assert_eq!(end.code(), Some(0), "{}", world.story(&end));
        assert!(end.err.contains("took late"), "{}", world.story(&end));
        world.assert_unlocked();
    }
}

// ---- the next run

#[test]
fn the_next_run_in_that_place_gives_it_back_first_and_says_so() {
    for lock in Lock::ALL {
        let world = killed_whole(lock);
        let bare = world.run(Subject::Bare, &PLAN);
        assert_eq!(bare.code(), Some(1), "bare is refused: {}", bare.err);
        assert_next_gives_back(&world);
    }
}

#[test]
fn after_a_restart_the_next_run_gives_it_back() {
    for lock in Lock::ALL {
        let world = killed_whole(lock);
        // Another boot, and what lay in memory is gone.
        edit(&world, |record| record["host"]["boot"] = "00000000-0000-0000-0000-000000000000".into());
        forget_recorder(&world);
        assert_next_gives_back(&world);
    }
}

fn forget_recorder(world: &World) {
    let [path] = records(world).try_into().expect("one record");
    let run = path.parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    fs::remove_file(format!("/dev/shm/tf-{run}.log")).unwrap();
}

#[test]
fn several_dead_runs_are_finished_each_in_its_own_surroundings() {
    // One had its keys from the environment, and one from a profile, which a key of now would go before.
    let first = killed_whole(Lock::Both);
    let home = first.directory.parent().unwrap().join("home");
    let mut second = World::new(Lock::DynamoDb, WAITS);
    let config = second.directory.join("credentials");
    fs::write(&config, "[other]\naws_access_key_id = test\naws_secret_access_key = s\n").unwrap();
    second.set("AWS_SHARED_CREDENTIALS_FILE", config).set("AWS_PROFILE", "other").set("AWS_ACCESS_KEY_ID", "");
    kill_whole(&second);
    // Into one journal, as one user's.
    let [record] = records(&second).try_into().unwrap();
    let directory = record.parent().unwrap();
    fs::rename(directory, home.join(".local/state/tf/runs").join(directory.file_name().unwrap())).unwrap();
    let mut third = World::new(Lock::File, "true");
    third.set("HOME", &home);
    let end = third.run(Subject::Tf, &PLAN);
    assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", third.story(&end));
    wait_until_unlocked(&first);
    wait_until_unlocked(&second);
    assert_nothing_left(&first);
}

#[test]
fn what_an_init_locked_in_a_new_directory_is_given_back_too() {
    // An init of a workspace that does not exist yet locks while it makes its state.
    let mut world = World::empty(Lock::DynamoDb);
    world.write_main("", "true");
    world.set("TF_WORKSPACE", "green");
    let held = Arc::new(AtomicBool::new(true));
    let holds = Arc::clone(&held);
    let proxy = through(&mut world, move |request| {
        let writes = request.start.starts_with("PUT ") && request.start.contains("green");
        if writes && holds.load(Ordering::Relaxed) { Deed::Hold } else { Deed::Pass }
    });
    let run = world.start(Subject::Tf, &["init", "-no-color", "-input=false"]);
    let locks = || world.locks_at("env:/green/dir/prod.tfstate");
    wait_for(
        "a lock, or the end",
        || (!locks().is_empty() || !marked(&home(&world)).iter().any(|pid| *pid == run.pid())).then_some(()),
        || format!("{}{}{}", run.out(), run.err(), world.trace()),
    );
    assert!(!locks().is_empty(), "{}{}", run.out(), run.err());
    world.wait_for_trace("journal written");
    kill_all(&world);
    drop(run);
    held.store(false, Ordering::Relaxed);
    proxy.let_go();
    assert!(!locks().is_empty());
    let end = world.run(Subject::Tf, &["init", "-no-color", "-input=false"]);
    assert!(end.err.contains("an earlier run left"), "{}", world.story(&end));
    assert!(locks().is_empty(), "{}", world.story(&end));
}

#[test]
fn a_run_elsewhere_gives_it_back_without_waiting_for_it() {
    let dead = killed_whole(Lock::Both);
    // The lock service of the dead run is slow; the command elsewhere does not know.
    let slow = Proxy::start(cloud().port, |_| Deed::Hold);
    edit(&dead, |record| {
        record["surroundings"]["variables"]["AWS_ENDPOINT_URL"] = format!("http://127.0.0.1:{}", slow.port).into();
    });
    let mut other = World::new(Lock::Both, "true");
    other.set("HOME", dead.directory.parent().unwrap().join("home"));
    let end = other.run(Subject::Tf, &PLAN);
    assert_eq!(end.code(), Some(0), "{}", other.story(&end));
    assert_eq!(end.err, "", "{}", other.story(&end));
    slow.wait_until_held();
    dead.assert_locked();
    slow.let_go();
    wait_until_unlocked(&dead);
    assert_nothing_left(&dead);
}

#[test]
fn two_runs_that_start_at_once_recover_once() {
    for _ in 0..5 {
        let world = killed_whole(Lock::Both);
        // Without locks of their own: terraform's contenders fail each other now and then, with or without us.
        let plan = ["plan", "-no-color", "-lock=false"];
        let runs: Vec<Run> = (0..3).map(|_| world.start(Subject::Tf, &plan)).collect();
        let ends: Vec<Ended> = runs.into_iter().map(Run::wait).collect();
        let said: usize = ends.iter().map(|end| end.err.matches("an earlier run left").count()).sum();
        for end in &ends {
            assert_eq!(end.code(), Some(0), "{}", world.story(end));
        }
        assert_eq!(said, 1, "{}", world.trace());
        world.assert_unlocked();
        assert_nothing_left(&world);
    }
}

#[test]
fn a_run_that_starts_while_the_guardian_works_waits_for_it() {
    for lock in Lock::ALL {
        let world = World::new(lock, WAITS);
        let run = world.start_apply(Subject::Tf);
        let terraform = terraform_below(run.pid());
        for pid in [terraform, run.pid()] {
            kill(pid, Signal::SIGKILL).unwrap();
        }
        // At once, while everything of it still dies.
        let end = world.run(Subject::Tf, &["plan", "-no-color", "-lock-timeout=20s"]);
        assert_eq!(end.code(), Some(0), "{}", world.story(&end));
        drop(run);
        wait_until_ours_are_gone(&world);
        world.assert_unlocked();
        assert_eq!(
            world.trace().matches("deleted ").count(),
            if lock == Lock::Both { 2 } else { 1 },
            "{}",
            world.trace()
        );
    }
}

#[test]
fn a_run_whose_provisioner_lives_on_is_not_recovered() {
    let (world, run) = apply_with_worker(Subject::Tf, "bash worker & touch began; wait", false);
    let id = id_of(&world.locks()[0]);
    world.wait_for_trace("journal written");
    let guardian = guardian_of(&world, run.pid());
    let terraform = terraform_below(run.pid());
    for pid in [guardian, run.pid(), terraform] {
        kill(pid, Signal::SIGKILL).unwrap();
    }
    drop(run.wait());
    let _sweep = Sweep(home(&world));
    let end = world.run(Subject::Tf, &PLAN);
    assert_eq!(end.code(), Some(1), "{}", world.story(&end));
    assert_eq!(id_of(&world.locks()[0]), id);
    assert_eq!(records(&world).len(), 1);
    for pid in marked(&home(&world)) {
        let _ = kill(pid, Signal::SIGKILL);
    }
    wait_until_all_is_gone(&world);
    let _ = fs::remove_file(world.directory.join("began"));
    assert_next_gives_back(&world);
}

#[test]
fn a_lock_that_was_replaced_meanwhile_stands() {
    let world = killed_whole(Lock::Both);
    let other = world.lock_of_another();
    let end = world.run(Subject::Tf, &PLAN);
    assert_eq!(end.code(), Some(1), "{}", world.story(&end));
    assert_eq!(world.locks(), [other.clone(), other]);
    assert!(records(&world).is_empty(), "there is nothing left to do for it");
}

#[test]
fn a_stop_asked_for_during_the_recovery_starts_no_terraform() {
    let mut world = killed_whole(Lock::DynamoDb);
    let proxy = through(&mut world, |request| if is_dynamodb(request, "GetItem") { Deed::Hold } else { Deed::Pass });
    edit(&world, |record| {
        record["surroundings"]["variables"]["AWS_ENDPOINT_URL"] = format!("http://127.0.0.1:{}", proxy.port).into();
    });
    let run = world.start(Subject::Tf, &PLAN);
    proxy.wait_until_held();
    run.send(Signal::SIGINT);
    run.wait_for_err("another ^C leaves it");
    run.send(Signal::SIGINT);
    let end = run.wait();
    assert_eq!(end.signal(), Some(2), "{}", world.story(&end));
    assert_eq!(end.out, "", "terraform was not started");
    world.assert_locked();
    proxy.let_go();
    assert_next_gives_back(&world);
}

// ---- the lock service

/// Answers in the place of the lock service for as long as it is told to.
fn ailing(world: &mut World, deed: impl Fn() -> Deed + Send + Sync + 'static) -> (Proxy, Arc<AtomicBool>) {
    let ails = Arc::new(AtomicBool::new(false));
    let now = Arc::clone(&ails);
    let proxy = through(world, move |_| if now.load(Ordering::Relaxed) { deed() } else { Deed::Pass });
    (proxy, ails)
}

fn error(status: &str, code: &str) -> Message {
    Message::answer(status, &format!(r#"{{"__type":"com.amazonaws.dynamodb.v20120810#{code}","message":"ails"}}"#))
}

#[test]
fn a_lock_service_that_ails_when_the_release_is_due_is_left_to_the_next_run() {
    type Case = (&'static str, fn() -> Deed);
    let cases: [Case; 4] = [
        ("answers 500", || Deed::Answer(error("500 Internal Server Error", "InternalServerError"))),
        ("throttles", || Deed::Answer(error("400 Bad Request", "ProvisionedThroughputExceededException"))),
        ("cuts every reply", || Deed::LoseAnswer),
        ("does not answer", || Deed::Hold),
    ];
    std::thread::scope(|scope| {
        for (name, deed) in cases {
            scope.spawn(move || {
                let mut world = World::new(Lock::Both, WAITS);
                let (proxy, ails) = ailing(&mut world, deed);
                let run = world.start_apply(Subject::Tf);
                let id = id_of(&world.locks()[0]);
                ails.store(true, Ordering::Relaxed);
                run.kill_terraform();
                if name == "does not answer" {
                    // Nobody waits longer than he likes: the second ^C ends it.
                    proxy.wait_until_held();
                    run.send(Signal::SIGINT);
                    run.wait_for_err("another ^C leaves it");
                    run.send(Signal::SIGINT);
                }
                let end = run.wait();
                assert_eq!(end.signal(), Some(9), "{name}: {}", world.story(&end));
                ails.store(false, Ordering::Relaxed);
                proxy.let_go();
                if name == "cuts every reply" && world.locks().is_empty() {
                    // Its deletes had their effect; that their answers were cut is told, and nothing is left to do.
                    return;
                }
                assert!(end.err.contains(&id) && end.err.contains(&world.path()), "{name}: {}", world.story(&end));
                assert!(
                    end.err.contains("force-unlock") && end.err.contains("the next tf here tries again"),
                    "{name}: {}",
                    end.err
                );
                world.assert_locked();
                let _ = fs::remove_file(world.directory.join("began"));
                assert_next_gives_back(&world);
            });
        }
    });
}

#[test]
fn a_slow_lock_service_is_waited_for() {
    // 6 s for each request, as an overloaded one takes.
    let mut world = World::new(Lock::DynamoDb, WAITS);
    let asked = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&asked);
    let (_proxy, ails) = ailing(&mut world, move || {
        count.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_secs(6));
        Deed::Pass
    });
    let run = world.start_apply(Subject::Tf);
    ails.store(true, Ordering::Relaxed);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", world.story(&end));
    assert!(asked.load(Ordering::Relaxed) >= 2);
    world.assert_unlocked();
}

#[test]
fn a_service_that_is_away_leaves_the_run_to_the_next_one_even_for_the_guardian() {
    let mut world = World::new(Lock::Both, WAITS);
    let (_proxy, ails) = ailing(&mut world, || Deed::Answer(error("500 Internal Server Error", "InternalServerError")));
    let run = world.start_apply(Subject::Tf);
    ails.store(true, Ordering::Relaxed);
    let terraform = terraform_below(run.pid());
    for pid in [terraform, run.pid()] {
        kill(pid, Signal::SIGKILL).unwrap();
    }
    run.wait();
    wait_for("the guardian to give up", || ours(&world).is_empty().then_some(()), || world.trace());
    world.assert_locked();
    ails.store(false, Ordering::Relaxed);
    let _ = fs::remove_file(world.directory.join("began"));
    assert_next_gives_back(&world);
}

#[test]
fn credentials_that_expired_meanwhile_are_fetched_anew() {
    let mut world = World::new(Lock::Both, WAITS);
    // Each call gives another key; the service takes only the newest.
    world.write(
        "gives",
        "#!/bin/sh\necho call >> calls\nprintf '{\"Version\":1,\"AccessKeyId\":\"KEY%s\",\"SecretAccessKey\":\"s\"}' $(wc -l < calls)\n",
    );
    let gives = world.directory.join("gives");
    fs::set_permissions(&gives, fs::Permissions::from_mode(0o755)).unwrap();
    let config = world.directory.join("config");
    fs::write(&config, format!("[default]\ncredential_process = {}\n", gives.display())).unwrap();
    let expired = Arc::new(AtomicBool::new(false));
    let now = Arc::clone(&expired);
    let calls = world.directory.join("calls");
    let at_kill = Arc::new(AtomicUsize::new(usize::MAX));
    let limit = Arc::clone(&at_kill);
    let proxy = Proxy::start(cloud().port, move |request| {
        let signed_by = request
            .header("authorization")
            .and_then(|text| text.split("Credential=KEY").nth(1)?.split('/').next()?.parse::<usize>().ok());
        if now.load(Ordering::Relaxed) && signed_by.is_none_or(|key| key <= limit.load(Ordering::Relaxed)) {
            Deed::Answer(error("400 Bad Request", "ExpiredTokenException"))
        } else {
            Deed::Pass
        }
    });
    world.set("AWS_CONFIG_FILE", config).set("AWS_ACCESS_KEY_ID", "").set("AWS_SECRET_ACCESS_KEY", "");
    world.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    let run = world.start_apply(Subject::Tf);
    at_kill.store(fs::read_to_string(&calls).unwrap().lines().count(), Ordering::Relaxed);
    expired.store(true, Ordering::Relaxed);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", world.story(&end));
    world.assert_unlocked();
}

// ---- whose it is

#[test]
fn another_accounts_credentials_never_take_unseen_for_gone() {
    let mut world = World::new(Lock::DynamoDb, WAITS);
    // By keys that name their account, as AWS's own do. Each account has a table of that name.
    let table = world.table.clone();
    let (a, b) = ("111111111111", "222222222222");
    for account in [a, b] {
        cloud().create_table_as(account, &table);
    }
    assert_eq!(cloud().s3("DELETE", &world.bucket, b"").status(), 204);
    assert_eq!(cloud().s3_as(a, "PUT", &world.bucket, b"").status(), 200);
    world.set("AWS_ACCESS_KEY_ID", a);
    let run = world.start_apply(Subject::Tf);
    world.wait_for_trace("journal written");
    kill_all(&world);
    drop(run);
    let of_a = || cloud().item_as(a, &table, &world.path());
    assert!(of_a().is_some());
    let with = |key: &str, more: &[(&str, &str)]| {
        let mut command = world.command(world.bin().join("tf"));
        command.args(PLAN).args(["-lock=false"]).env("AWS_ACCESS_KEY_ID", key).envs(more.iter().copied());
        let _ = fs::remove_file(world.directory.join("began"));
        Run::start(command).wait()
    };
    let end = with(b, &[]);
    assert!(end.err.contains("account 111111111111") && end.err.contains("was not released"), "{}", world.story(&end));
    assert!(of_a().is_some());
    assert_eq!(records(&world).len(), 1, "the record stays");
    // Another region and another endpoint in the environment are not the run's: it is looked for where it was.
    let end = with(a, &[("AWS_REGION", "eu-west-3"), ("AWS_ENDPOINT_URL_DYNAMODB", "http://127.0.0.1:9")]);
    assert!(end.err.contains("an earlier run left"), "{}", world.story(&end));
    assert!(of_a().is_none());
    assert_nothing_left(&world);
}

#[test]
fn what_another_machine_or_another_user_wrote_is_never_obeyed() {
    type Change = (&'static str, fn(&mut Value));
    let changes: [Change; 4] = [
        ("another machine", |record| record["host"]["machine"] = "0123456789abcdef0123456789abcdef".into()),
        ("another machine, another boot", |record| {
            record["host"]["machine"] = Value::Null;
            record["host"]["boot"] = "00000000-0000-0000-0000-000000000000".into();
        }),
        ("another boot, another file system", |record| {
            record["host"]["boot"] = "00000000-0000-0000-0000-000000000000".into();
            record["host"]["filesystem"] = 7.into();
        }),
        ("a container's, before a restart", |record| {
            record["host"]["boot"] = "00000000-0000-0000-0000-000000000000".into();
            record["host"]["processes"] = serde_json::json!([7, false]);
        }),
    ];
    for (name, change) in changes {
        let world = killed_whole(Lock::Both);
        edit(&world, change);
        let end = world.run(Subject::Tf, &PLAN);
        assert_eq!(end.code(), Some(1), "{name}: {}", world.story(&end));
        world.assert_locked();
        assert_eq!(records(&world).len(), 1, "{name}: it is somebody's");
    }
    if nix::unistd::geteuid().is_root() {
        let world = killed_whole(Lock::Both);
        let [path] = records(&world).try_into().unwrap();
        let directory = path.parent().unwrap().to_owned();
        nix::unistd::chown(&directory, Some(nix::unistd::Uid::from_raw(4711)), None).unwrap();
        let end = world.run(Subject::Tf, &PLAN);
        assert_eq!(end.code(), Some(1), "{}", world.story(&end));
        world.assert_locked();
    }
    // A link in the place of a record's directory.
    let world = killed_whole(Lock::Both);
    let [path] = records(&world).try_into().unwrap();
    let directory = path.parent().unwrap().to_owned();
    let elsewhere = world.directory.join("elsewhere");
    fs::rename(&directory, &elsewhere).unwrap();
    symlink(&elsewhere, &directory).unwrap();
    let end = world.run(Subject::Tf, &PLAN);
    assert_eq!(end.code(), Some(1), "{}", world.story(&end));
    world.assert_locked();
}

#[test]
fn under_sudo_with_anothers_home_roots_own_place_is_used() {
    if !nix::unistd::geteuid().is_root() {
        // tests/left-out names this.
        return;
    }
    let world = World::new(Lock::Both, "true");
    let home = world.directory.parent().unwrap().join("home");
    nix::unistd::chown(&home, Some(nix::unistd::Uid::from_raw(4711)), None).unwrap();
    let end = world.run(Subject::Tf, &APPLY);
    assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", world.story(&end));
    assert_eq!(fs::read_dir(&home).unwrap().count(), 0, "nothing of root's in there");
}

#[test]
fn a_torn_or_hostile_record_is_set_aside_and_said_once() {
    for text in ["", "{", "null", "[[[[[[", r#"{"format":1}"#, "\u{0}\u{1}\u{2}"] {
        let world = killed_whole(Lock::DynamoDb);
        let [path] = records(&world).try_into().unwrap();
        fs::write(&path, text).unwrap();
        let end = world.run(Subject::Tf, &PLAN);
        assert!(end.err.contains("cannot be read; it lies in"), "{text:?}: {}", world.story(&end));
        assert_eq!(end.code(), Some(1), "{text:?}: {}", world.story(&end));
        world.assert_locked();
        world.delete_lock();
        let end = world.run(Subject::Tf, &PLAN);
        assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{text:?}: {}", world.story(&end));
    }
}

#[test]
fn a_changed_record_takes_no_lock_that_its_run_did_not_take() {
    // The ID of a living bare terraform at the same place, under the same user and host.
    let world = killed_whole(Lock::DynamoDb);
    world.delete_lock();
    let living = world.start_apply(Subject::Bare);
    let theirs = world.locks();
    let id = id_of(&theirs[0]);
    edit(&world, |record| record["log"]["locks"][0]["id"] = id.as_str().into());
    let end = world.run(Subject::Tf, &PLAN);
    assert_eq!(end.code(), Some(1), "{}", world.story(&end));
    assert_eq!(world.locks(), theirs, "{}", world.story(&end));
    world.go();
    assert_eq!(living.wait().code(), Some(0));

    // The same, and the recorder gone: the times do not fit, and neither does anything else that is changed alone.
    for field in ["id", "who", "operation", "version", "path", "bucket", "key", "asked"] {
        let world = killed_whole(Lock::DynamoDb);
        forget_recorder(&world);
        let other = lock_json("11111111-2222-3333-4444-555555555555", &world.path());
        if field == "id" {
            world.put_lock(&other);
        }
        let before = world.locks();
        edit(&world, |record| {
            record["log"]["locks"][0][field] = match field {
                "id" => "11111111-2222-3333-4444-555555555555".into(),
                "asked" => "2020-01-01T00:00:00Z".into(),
                _ => "another".into(),
            };
        });
        let end = world.run(Subject::Tf, &PLAN);
        assert_eq!(world.locks(), before, "{field}: {}", world.story(&end));
    }
}

#[test]
fn a_lock_that_a_living_run_claims_is_not_taken_for_a_dead_ones() {
    // A dead run whose record says, in everything, what a living one's says.
    let world = killed_whole(Lock::DynamoDb);
    world.delete_lock();
    forget_recorder(&world);
    let [dead] = records(&world).try_into().unwrap();
    let living = world.start(Subject::Tf, &["apply", "-auto-approve", "-no-color"]);
    world.wait_for_began(&living);
    let theirs = world.locks();
    let path = wait_for(
        "the record",
        || {
            records(&world).into_iter().find(|path| {
                *path != dead && fs::read_to_string(path).is_ok_and(|text| text.contains(&id_of(&theirs[0])))
            })
        },
        || world.trace(),
    );
    let run = dead.parent().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
    let mut copy: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    copy["run"] = run.as_str().into();
    if let Some(directory) = dead.parent().filter(|directory| !directory.exists()) {
        fs::create_dir(directory).unwrap();
        fs::set_permissions(directory, fs::Permissions::from_mode(0o700)).unwrap();
        fs::write(directory.join("lock"), "").unwrap();
    }
    fs::write(&dead, copy.to_string()).unwrap();
    let end = world.run(Subject::Tf, &PLAN);
    assert_eq!(end.code(), Some(1), "{}", world.story(&end));
    assert_eq!(world.locks(), theirs, "{}", world.story(&end));
    world.go();
    assert_eq!(living.wait().code(), Some(0));
}

// ---- where the journal cannot be kept

#[test]
fn without_a_place_for_the_journal_terraform_runs_silently_and_an_abnormal_end_says_so() {
    if !nix::unistd::geteuid().is_root() {
        // Only root can mount. tests/left-out names this.
        return;
    }
    // Each in a mount namespace of its own: nothing below is left to write to.
    let everywhere =
        "mount -t tmpfs -o ro none /var/tmp && mount --bind $0/home $0/home && mount -o remount,ro,bind $0/home";
    for (name, prepare) in [
        ("read-only", everywhere.to_owned()),
        ("a full disk", format!("{everywhere}; mount -t tmpfs -o size=4k,nr_inodes=2 none $0/home")),
        ("locks that may mean nothing", format!("{everywhere}; mount -t ramfs none $0/home")),
        ("no home", format!("{everywhere}; export HOME=/nowhere; mount -t tmpfs -o ro none /root")),
    ] {
        let world = World::new(Lock::Both, WAITS);
        let root = world.directory.parent().unwrap().to_owned();
        let start = |command: &str| {
            let mut unshare = world.command("unshare");
            unshare.args(["-m", "sh", "-c", &format!("{prepare}; cd $0/work; exec {command}")]).arg(&root);
            Run::start(unshare)
        };
        let end = start("tf plan -no-color").wait();
        assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{name}: {}", world.story(&end));
        let run = start("tf apply -auto-approve -no-color");
        world.wait_for_began(&run);
        run.kill_terraform();
        let end = run.wait();
        assert!(end.err.contains("released the lock"), "{name}: {}", world.story(&end));
        assert!(end.err.contains("this run had no journal"), "{name}: {}", world.story(&end));
        world.assert_unlocked();
    }
}

#[test]
fn without_a_descriptor_to_spare_terraform_runs_all_the_same() {
    let mut world = World::empty(Lock::DynamoDb);
    world.stand_in("says", "#!/bin/sh\necho said\n");
    for limit in 4..24 {
        let mut command = world.command("sh");
        command.args(["-c", &format!("ulimit -n {limit}; exec tf apply")]);
        let end = Run::start(command).wait();
        // Below that not even the program's own libraries can be opened, with `tf` or without.
        let mut bare = world.command("sh");
        bare.args(["-c", &format!("ulimit -n {limit}; exec ./says")]);
        let bare = Run::start(bare).wait();
        assert_eq!((end.code(), end.out, end.err), (bare.code(), bare.out, bare.err), "{limit}");
    }
}

// ---- what is written

#[test]
fn no_secret_is_written_down_and_finished_runs_leave_nothing() {
    let secrets = ["hunter-var", "hunter-backend", "hunter-env", "hunter-tfvar"];
    let mut world = World::new(Lock::Both, WAITS);
    world.write("variables.tf", "variable \"a\" {\n}\nvariable \"b\" {\n}\n");
    world.set("AWS_SECRET_ACCESS_KEY", "hunter-env").set("TF_VAR_b", "hunter-tfvar");
    let found = |world: &World| {
        let all = everything_written(world);
        assert!(!all.is_empty(), "something is written");
        for (path, content) in all {
            let text = String::from_utf8_lossy(&content).into_owned();
            for secret in secrets {
                assert!(!text.contains(secret), "{secret} in {}: {text}", path.display());
            }
            let mode = fs::metadata(&path).map_or(0o600, |file| file.permissions().mode());
            assert_eq!(mode & 0o077, 0, "{}", path.display());
        }
    };
    let mut init = world.command(world.bin().join("terraform"));
    init.args([
        "init",
        "-no-color",
        "-reconfigure",
        "-backend-config=secret_key=hunter-backend",
        "-backend-config=access_key=test",
    ]);
    assert_eq!(Run::start(init).wait().code(), Some(0));
    let mut command = world.command(world.bin().join("tf"));
    command.args(APPLY).args(["-var", "a=hunter-var"]);
    let run = Run::start(command);
    world.wait_for_began(&run);
    world.wait_for_trace("journal written");
    found(&world);
    kill_all(&world);
    found(&world);
    drop(run);
    // Its keys stand in the cached backend of its directory, and nowhere else: from there they are taken again.
    let _ = fs::remove_file(world.directory.join("began"));
    let mut next = world.command(world.bin().join("tf"));
    next.args(PLAN).args(["-var", "a=x"]);
    let end = Run::start(next).wait();
    assert!(end.err.contains("an earlier run left"), "{}", world.story(&end));
    world.assert_unlocked();
    assert_nothing_left(&world);
}

#[test]
fn a_secret_that_is_kept_nowhere_is_missed_by_name() {
    let world = World::new(Lock::DynamoDb, WAITS);
    let mut init = world.command(world.bin().join("terraform"));
    init.args([
        "init",
        "-no-color",
        "-reconfigure",
        "-backend-config=secret_key=test",
        "-backend-config=access_key=test",
    ]);
    assert_eq!(Run::start(init).wait().code(), Some(0));
    kill_whole(&world);
    // Somebody has set up the directory anew since, for another state.
    world.write("main.tf", &fs::read_to_string(world.directory.join("main.tf")).unwrap().replace("prod", "other"));
    let mut init = world.command(world.bin().join("terraform"));
    init.args(["init", "-no-color", "-reconfigure"]);
    assert_eq!(Run::start(init).wait().code(), Some(0));
    let end = world.run(Subject::Tf, &PLAN);
    assert_eq!(end.code(), Some(0), "{}", world.story(&end));
    assert!(end.err.contains("secret_key") && end.err.contains("was not released"), "{}", world.story(&end));
    world.assert_locked();
    assert_eq!(records(&world).len(), 1);
}

/// A pid that is used again: the mark and the descriptor tell, and not the number.
#[test]
fn a_number_that_is_somebody_elses_now_is_not_taken_for_terraform() {
    let world = killed_whole(Lock::DynamoDb);
    // Somebody alive, who has the numbers of the dead.
    let stranger = Command::new("sleep").arg("60").spawn().unwrap();
    let pid = stranger.id();
    let mut stranger = stranger;
    edit(&world, |record| {
        record["tf"] = pid.into();
        record["terraform"] = pid.into();
    });
    assert_next_gives_back(&world);
    let number = Pid::from_raw(i32::try_from(pid).unwrap());
    assert!(state(number).is_some_and(|state| state != 'Z'), "the stranger lives");
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}

#[test]
fn a_log_that_was_forgotten_behind_the_reader_is_known_to_whoever_comes_after() {
    // The user's own TRACE log, and a resource for each of many lines of it: much is written after the lock was taken, and
    // given back to the system once it was told.
    let world = || {
        let mut world = World::empty(Lock::Both);
        let many = "resource \"terraform_data\" \"many\" {\ncount = 300\n}\n";
        world.write_main(many, WAITS);
        let log = world.directory.join("own.log");
        world.set("TF_LOG", "TRACE").set("TF_LOG_PATH", log);
        world.init();
        world
    };
    let forgotten = |world: &World| {
        let [path] = records(world).try_into().ok()?;
        let record: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        (record["offset"].as_u64()? > 100_000 && record["log"]["locks"][0]["locked"].is_string()).then_some(())
    };
    let start = |world: &World| {
        let run = world.start(Subject::Tf, &APPLY);
        world.wait_for_began(&run);
        wait_for("a log to be forgotten", || forgotten(world), || format!("{:?}\n{}", records(world), world.trace()));
        run
    };
    let guarded = world();
    let run = start(&guarded);
    let terraform = terraform_below(run.pid());
    for pid in [terraform, run.pid()] {
        kill(pid, Signal::SIGKILL).unwrap();
    }
    run.wait();
    wait_until_unlocked(&guarded);
    wait_until_ours_are_gone(&guarded);

    let alone = world();
    let run = start(&alone);
    kill_all(&alone);
    drop(run);
    alone.assert_locked();
    let end = alone.run(Subject::Tf, &["plan", "-no-color"]);
    assert!(end.err.contains("an earlier run left"), "{}", alone.trace());
    alone.assert_unlocked();
}

#[test]
fn in_a_shared_group_a_killed_tf_leaves_no_lock_either() {
    let mut world = World::new(Lock::Both, WAITS);
    world.set("TFW_TTY", "shared");
    let run = world.start_apply(Subject::Tf);
    killpg(run.pid(), Signal::SIGKILL).unwrap();
    run.wait();
    wait_until_unlocked(&world);
    wait_until_all_is_gone(&world);
    assert_nothing_left(&world);
}
