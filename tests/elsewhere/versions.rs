//! The same promises with every other terraform, and with OpenTofu.

use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::household::{Sweep, guardian_of, home, kill_all, tf_of, wait_until_gone, wait_until_ours_are_gone};
use crate::support::process::tree;
use crate::support::world::{WAITS, id_of, lock_json};
use crate::support::{Lock, Run, Subject, World, wait_for};

/// Terraforms that name their locks in their log, and how they can lock.
const TERRAFORMS: [(&str, &[Lock]); 7] = [
    ("terraform-1.6.6", &[Lock::DynamoDb]),
    ("terraform-1.8.4", &[Lock::DynamoDb]),
    ("terraform-1.9.8", &[Lock::DynamoDb]),
    ("terraform-1.10.5", &Lock::ALL),
    ("terraform-1.12.2", &[Lock::Both]),
    ("terraform-1.14.9", &[Lock::Both]),
    ("terraform-1.15.5", &Lock::ALL),
];

/// One that does not.
const TOFU: &str = "tofu-1.6.2";

fn everything() -> impl Iterator<Item = (&'static str, Lock)> {
    let all = TERRAFORMS.into_iter().chain([(TOFU, &[Lock::DynamoDb][..])]);
    all.flat_map(|(name, locks)| locks.iter().map(move |lock| (name, *lock)))
}

pub fn program(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/elsewhere/bin").join(name);
    assert!(path.exists(), "{} is missing: run make elsewhere", path.display());
    path
}

/// A directory that this program has initialised, whose provisioner waits.
fn world(name: &str, lock: Lock, provisioner: &str) -> World {
    let mut world = World::empty(lock);
    world.set("TFW_TERRAFORM", program(name));
    world.write_main("", provisioner);
    let end = world.run(Subject::Tf, &["init", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{name}: {}", world.story(&end));
    assert!(!end.err.contains("tf:"), "{name}: {}", end.err);
    world
}

/// The terraform below a `tf`.
#[track_caller]
pub fn terraform_of(run: &Run) -> Pid {
    let is_it = |name: &str| name.starts_with("terraform") || name.starts_with("tofu");
    wait_for(
        "terraform",
        || tree(run.pid()).into_iter().find(|(_, name, ..)| is_it(name)).map(|(pid, ..)| pid),
        || format!("{:?}", tree(run.pid())),
    )
}

#[track_caller]
fn assert_works_again(name: &str, world: &World) {
    world.go();
    let end = world.run(Subject::Tf, &["apply", "-auto-approve", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{name}: {}", world.story(&end));
    world.assert_unlocked();
}

#[test]
fn bare_each_of_them_leaves_its_lock_when_it_is_killed() {
    for (name, lock) in everything() {
        let world = world(name, lock, WAITS);
        let mut command = world.command(program(name));
        command.args(["apply", "-auto-approve", "-no-color"]);
        let run = Run::start(command);
        world.wait_for_began(&run);
        kill(run.pid(), Signal::SIGKILL).unwrap();
        world.go();
        run.wait();
        world.assert_locked();
    }
}

#[test]
fn killed_none_leaves_a_lock() {
    for (name, lock) in everything() {
        let world = world(name, lock, WAITS);
        let run = world.start_apply(Subject::Tf);
        world.assert_locked();
        kill(terraform_of(&run), Signal::SIGKILL).unwrap();
        let end = run.wait();
        assert!(end.err.contains("released the lock"), "{name}: {}", world.story(&end));
        world.assert_unlocked();
        assert_works_again(name, &world);
    }
}

#[test]
fn interrupted_each_ends_by_itself_and_nothing_is_said() {
    for (name, lock) in everything() {
        let world = world(name, lock, WAITS);
        let run = world.start_apply(Subject::Tf);
        run.send(Signal::SIGINT);
        // Terraform ends its provisioner itself.
        let end = run.wait();
        assert_eq!(end.code(), Some(1), "{name}: {}", world.story(&end));
        assert!(!end.out.contains("Two interrupts") && !end.err.contains("tf: "), "{name}: {}", world.story(&end));
        world.assert_unlocked();
    }
}

#[test]
fn a_run_that_ends_well_asks_nobody_and_says_nothing() {
    for (name, lock) in everything() {
        let world = world(name, lock, "true");
        for arguments in
            [&["apply", "-auto-approve"][..], &["plan", "-detailed-exitcode"], &["workspace", "new", "green"]]
        {
            let end = world.run(Subject::Tf, arguments);
            assert_eq!(end.code(), Some(0), "{name} {arguments:?}: {}", world.story(&end));
            assert!(end.err.is_empty(), "{name} {arguments:?}: {}", end.err);
        }
        assert!(!world.trace().contains("may stand"), "{name}: {}", world.trace());
        world.assert_unlocked();
    }
}

#[test]
fn changes_that_are_announced_by_exit_code_2_are_no_crash() {
    for (name, lock) in everything() {
        let world = world(name, lock, "true");
        let end = world.run(Subject::Tf, &["plan", "-detailed-exitcode"]);
        assert_eq!(end.code(), Some(2), "{name}: {}", world.story(&end));
        assert!(end.err.is_empty(), "{name}: {}", world.story(&end));
        assert!(!world.trace().contains("died: true"), "{name}: {}", world.trace());
    }
}

#[test]
fn when_tf_is_killed_the_guardian_sees_to_the_lock() {
    for (name, lock) in everything() {
        for both in [false, true] {
            let world = world(name, lock, WAITS);
            let _sweep = Sweep(home(&world));
            let run = world.start_apply(Subject::Tf);
            let terraform = terraform_of(&run);
            let tf = tf_of(&world);
            let guardian = guardian_of(&world, tf);
            kill(tf, Signal::SIGKILL).unwrap();
            if both {
                kill(terraform, Signal::SIGKILL).unwrap();
            }
            world.go();
            run.wait();
            wait_until_gone(&world, guardian);
            world.assert_unlocked();
            assert_works_again(name, &world);
        }
    }
}

#[test]
fn when_everything_is_killed_the_next_tf_gives_the_lock_back() {
    for (name, lock) in everything() {
        let world = world(name, lock, WAITS);
        let _sweep = Sweep(home(&world));
        let run = world.start_apply(Subject::Tf);
        // The journal has it within some 20 ms of the log.
        wait_for(
            "the journal",
            || {
                let runs = world.directory.parent().unwrap().join("home/.local/state/tf/runs");
                let records = std::fs::read_dir(runs).ok()?.flatten().map(|run| run.path().join("record.json"));
                let is_had = |text: &str| !text.contains("\"locked\":null") && !text.contains("\"granted\":null");
                let holds = |text: &str| text.contains("\"asked\"") && is_had(text);
                records.filter_map(|path| std::fs::read_to_string(path).ok()).any(|text| holds(&text)).then_some(())
            },
            || world.trace(),
        );
        kill_all(&world);
        run.wait();
        world.assert_locked();
        world.go();
        let end = world.run(Subject::Tf, &["apply", "-auto-approve", "-no-color"]);
        assert_eq!(end.code(), Some(0), "{name}: {}", world.story(&end));
        assert!(end.err.contains("released the lock that an earlier run left"), "{name}: {}", world.story(&end));
        world.assert_unlocked();
        wait_until_ours_are_gone(&world);
    }
}

#[test]
fn anothers_lock_is_left_to_him() {
    for (name, lock) in everything() {
        let world = world(name, lock, WAITS);
        let theirs = world.lock_of_another();
        let end = world.run(Subject::Tf, &["apply", "-auto-approve", "-no-color"]);
        assert_eq!(end.code(), Some(1), "{name}: {}", world.story(&end));
        assert!(
            world.locks().iter().all(|lock| *lock == theirs) && !world.locks().is_empty(),
            "{name}: {:?}",
            world.locks()
        );
        world.delete_lock();
    }
}

#[test]
fn a_lock_that_replaced_ours_stands() {
    for (name, lock) in everything() {
        // What outlives terraform gives the time to replace its lock.
        let world =
            world(name, lock, "(trap '' TERM; touch began; while test -e began && ! test -e go; do sleep 0.02; done)");
        let run = world.start_apply(Subject::Tf);
        kill(terraform_of(&run), Signal::SIGKILL).unwrap();
        world.wait_for_trace("ending ");
        // Of the same user on the same host, made a moment later: as a clone of this machine would have it.
        let theirs = lock_json("22222222-3333-4444-5555-666666666666", &world.path());
        let version = name.rsplit('-').next().unwrap();
        let theirs = theirs.replace("\"1.11.4\"", &format!("\"{version}\""));
        world.delete_lock();
        world.put_lock(&theirs);
        world.go();
        let end = run.wait();
        let left = world.locks();
        assert!(
            !left.is_empty() && left.iter().all(|lock| id_of(lock) == id_of(&theirs)),
            "{name}: {}",
            world.story(&end)
        );
        world.delete_lock();
    }
}

#[test]
fn a_user_who_logs_keeps_his_log_and_loses_no_lock() {
    for (name, lock) in everything() {
        let mut world = world(name, lock, WAITS);
        world.set("TF_LOG", "INFO");
        let run = world.start_apply(Subject::Tf);
        kill(terraform_of(&run), Signal::SIGKILL).unwrap();
        let end = run.wait();
        assert!(end.err.contains("[INFO]"), "{name}: {}", world.story(&end));
        assert!(end.err.contains("released the lock"), "{name}: {}", world.story(&end));
        world.assert_unlocked();
    }
}

#[test]
fn doctor_says_what_a_programs_log_tells() {
    let said = |world: &World| world.run(Subject::Tf, &["locks", "doctor"]).out;
    let tofu = world(TOFU, Lock::DynamoDb, "true");
    assert!(said(&tofu).contains("OpenTofu 1.6.2: its log tells that it had a lock, and not which"), "{}", said(&tofu));
    // A small program leads to a library here, as a script would: known once it ran.
    let mut old = World::empty(Lock::DynamoDb);
    old.set("TFW_TERRAFORM", program("terraform-1.8.4"));
    old.write_main("", "true");
    assert!(said(&old).contains("nobody knows yet to which"), "{}", said(&old));
    let end = old.run(Subject::Tf, &["init", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", old.story(&end));
    assert!(said(&old).contains("Terraform 1.8.4: its log tells of its locks"), "{}", said(&old));
}

/// OpenTofu up to 1.10 tells of no lock but by what it does next. A command that does not even that is not believed.
#[test]
fn what_opentofu_does_not_tell_is_named_and_kept() {
    let world = world(TOFU, Lock::DynamoDb, "true");
    let end = world.run(Subject::Tf, &["apply", "-auto-approve", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", world.story(&end));
    // Held back by a second lock it never gets to the state: so it is killed with its lock in the table.
    let proxy = crate::support::proxy::Proxy::start(crate::support::cloud::cloud().port, move |request| {
        let gets_state = request.start.starts_with("GET ") && request.start.contains("dir/prod.tfstate");
        if gets_state { crate::support::proxy::Deed::Hold } else { crate::support::proxy::Deed::Pass }
    });
    let mut world = world;
    world.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    let run = world.start(Subject::Tf, &["state", "rm", "terraform_data.a"]);
    proxy.wait_until_held();
    world.wait_for_locked();
    let standing = world.locks();
    kill(terraform_of(&run), Signal::SIGKILL).unwrap();
    proxy.let_go();
    let end = run.wait();
    assert!(
        end.err.contains("may be it, and was not released") && end.err.contains(&id_of(&standing[0])),
        "{}",
        world.story(&end)
    );
    assert_eq!(world.locks(), standing);
    world.delete_lock();
}

/// Killed between its request and its next word, and the request lands when it is dead: at once, or after everybody looked.
#[test]
fn a_lock_that_opentofu_only_asked_for_is_named_in_the_end() {
    for (at_once, guarded) in [(true, false), (false, false), (false, true)] {
        let mut world = world(TOFU, Lock::DynamoDb, "true");
        let _sweep = Sweep(home(&world));
        let direct = world.environment();
        let proxy = crate::support::proxy::Proxy::start(crate::support::cloud::cloud().port, |request| {
            let puts = request.header("x-amz-target").is_some_and(|target| target.ends_with(".PutItem"));
            if puts { crate::support::proxy::Deed::Hold } else { crate::support::proxy::Deed::Pass }
        });
        world.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
        let run = world.start(Subject::Tf, &["apply", "-auto-approve", "-no-color"]);
        proxy.wait_until_held();
        let land = || {
            proxy.let_go();
            proxy.wait_until_delivered();
            world.assert_locked();
            id_of(&world.locks()[0])
        };
        if guarded {
            let runs = world.directory.parent().unwrap().join("home/.local/state/tf/runs");
            let asked = |path: &Path| {
                std::fs::read_to_string(path.join("record.json")).unwrap_or_default().contains("\"granted\":null")
            };
            wait_for(
                "the journal",
                || std::fs::read_dir(&runs).ok()?.flatten().any(|run| asked(&run.path())).then_some(()),
                || world.trace(),
            );
            kill_all(&world);
            drop(run);
            land();
        } else {
            kill(terraform_of(&run), Signal::SIGKILL).unwrap();
            if at_once {
                world.wait_for_trace("the tree is dead");
                let id = land();
                let end = run.wait();
                assert!(end.err.contains("may be it, and was not released"), "{}", world.story(&end));
                assert!(end.err.contains(&id), "{}", world.story(&end));
                world.delete_lock();
                continue;
            }
            let end = run.wait();
            assert!(end.err.contains("that request may still land"), "{}", world.story(&end));
            land();
        }
        let standing = world.locks();
        let mut next = world.command(world.bin().join("tf"));
        next.args(["plan", "-no-color"]).env_clear().envs(direct);
        let end = Run::start(next).wait();
        assert!(end.err.contains("may be an earlier run's"), "{}", world.story(&end));
        assert!(end.err.contains(&id_of(&standing[0])), "{}", world.story(&end));
        assert_eq!(world.locks(), standing);
        world.delete_lock();
    }
}

/// Killed at moments spread over its run, the one that does not name its locks leaves none that its log could tell of.
#[test]
fn killed_at_any_moment_opentofu_leaves_no_lock_unnamed() {
    let kills: u32 = std::env::var("TF_TEST_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(40);
    let world = world(TOFU, Lock::DynamoDb, "true");
    let begun = std::time::Instant::now();
    let end = world.run(Subject::Tf, &["apply", "-auto-approve", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", world.story(&end));
    let whole = begun.elapsed();
    let (mut released, mut named) = (0, 0);
    for number in 0..kills {
        let run = world.start(Subject::Tf, &["apply", "-auto-approve", "-no-color", "-replace=terraform_data.a"]);
        let terraform = terraform_of(&run);
        // The moment is what is tried here.
        std::thread::sleep(whole * number / kills);
        let _ = kill(terraform, Signal::SIGKILL);
        let end = run.wait();
        released += usize::from(end.err.contains("released the lock"));
        let left = world.locks();
        if let Some(lock) = left.first() {
            // Killed between the answer and its next word: the log does not say that it had it.
            assert!(end.err.contains(&id_of(lock)), "{number}: {}", world.story(&end));
            named += 1;
            world.delete_lock();
        }
        world.forget_state();
    }
    assert!(released > 0, "{kills} kills: {released} locks released, {named} named");
}
