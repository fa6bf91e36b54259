//! The same guarantees with the other versions of terraform, and with OpenTofu.

use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::process::tree;
use crate::support::processes::{
    KillOnDrop, guardian_of, home, kill_all, tf_of, wait_until_gone, wait_until_ours_are_gone,
};
use crate::support::test_env::{WAITS, id_of, lock_json};
use crate::support::{Lock, Run, Subject, TestEnv, wait_for};

/// The terraforms that log the IDs of their locks, and the kinds of lock that they support.
const TERRAFORMS: [(&str, &[Lock]); 8] = [
    ("terraform-1.6.6", &[Lock::DynamoDb]),
    ("terraform-1.8.4", &[Lock::DynamoDb]),
    ("terraform-1.9.8", &[Lock::DynamoDb]),
    ("terraform-1.10.5", &Lock::ALL),
    ("terraform-1.12.2", &[Lock::Both]),
    ("terraform-1.13.5", &[Lock::Both]),
    ("terraform-1.14.9", &[Lock::Both]),
    ("terraform-1.15.5", &Lock::ALL),
];

/// A program that does not log the IDs of its locks.
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

/// Returns a directory that this program has initialized.
pub fn test_env(name: &str, lock: Lock, provisioner: &str) -> TestEnv {
    let mut env = TestEnv::empty(lock);
    env.set("TFW_TERRAFORM", program(name));
    env.write_main("", provisioner);
    let end = env.run(Subject::Tf, &["init", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{name}: {}", env.dump(&end));
    assert!(!end.err.contains("tf:"), "{name}: {}", end.err);
    env
}

/// Returns the terraform below a `tf`.
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
fn assert_works_again(name: &str, env: &TestEnv) {
    env.unblock();
    let end = env.run(Subject::Tf, &["apply", "-auto-approve", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{name}: {}", env.dump(&end));
    env.assert_unlocked();
}

#[test]
fn the_document_lists_the_versions_that_are_tried() {
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/proof.md")).unwrap();
    let paragraph = text.split("\n\n").find(|paragraph| paragraph.starts_with("`make elsewhere` runs")).unwrap();
    let listed: Vec<&str> = paragraph
        .split(|character: char| !character.is_ascii_digit() && character != '.')
        .map(|word| word.trim_matches('.'))
        .filter(|word| !word.is_empty())
        .collect();
    let tried: Vec<&str> =
        TERRAFORMS.iter().map(|(name, _)| *name).chain([TOFU]).map(|name| name.rsplit('-').next().unwrap()).collect();
    assert_eq!(listed, tried);
}

#[test]
fn bare_each_of_them_leaves_its_lock_when_it_is_killed() {
    for (name, lock) in everything() {
        let env = test_env(name, lock, WAITS);
        let mut command = env.command(program(name));
        command.args(["apply", "-auto-approve", "-no-color"]);
        let run = Run::start(command);
        env.wait_for_began(&run);
        kill(run.pid(), Signal::SIGKILL).unwrap();
        env.unblock();
        run.wait();
        env.assert_locked();
    }
}

#[test]
fn killed_none_leaves_a_lock() {
    for (name, lock) in everything() {
        let env = test_env(name, lock, WAITS);
        let run = env.start_apply(Subject::Tf);
        env.assert_locked();
        kill(terraform_of(&run), Signal::SIGKILL).unwrap();
        let end = run.wait();
        assert!(end.err.contains("released the lock"), "{name}: {}", env.dump(&end));
        env.assert_unlocked();
        assert_works_again(name, &env);
    }
}

#[test]
fn interrupted_each_ends_by_itself_and_nothing_is_said() {
    for (name, lock) in everything() {
        let env = test_env(name, lock, WAITS);
        let run = env.start_apply(Subject::Tf);
        run.send(Signal::SIGINT);
        // Terraform stops its provisioner itself.
        let end = run.wait();
        assert_eq!(end.code(), Some(1), "{name}: {}", env.dump(&end));
        assert!(!end.out.contains("Two interrupts") && !end.err.contains("tf: "), "{name}: {}", env.dump(&end));
        env.assert_unlocked();
    }
}

#[test]
fn a_run_that_ends_well_asks_nobody_and_says_nothing() {
    for (name, lock) in everything() {
        let env = test_env(name, lock, "true");
        for arguments in
            [&["apply", "-auto-approve"][..], &["plan", "-detailed-exitcode"], &["workspace", "new", "green"]]
        {
            let end = env.run(Subject::Tf, arguments);
            assert_eq!(end.code(), Some(0), "{name} {arguments:?}: {}", env.dump(&end));
            assert!(end.err.is_empty(), "{name} {arguments:?}: {}", end.err);
        }
        assert!(!env.trace().contains("a lock may be held"), "{name}: {}", env.trace());
        env.assert_unlocked();
    }
}

#[test]
fn changes_that_are_announced_by_exit_code_2_are_no_crash() {
    for (name, lock) in everything() {
        let env = test_env(name, lock, "true");
        let end = env.run(Subject::Tf, &["plan", "-detailed-exitcode"]);
        assert_eq!(end.code(), Some(2), "{name}: {}", env.dump(&end));
        assert!(end.err.is_empty(), "{name}: {}", env.dump(&end));
        assert!(!env.trace().contains("died: true"), "{name}: {}", env.trace());
    }
}

#[test]
fn when_tf_is_killed_the_guardian_sees_to_the_lock() {
    for (name, lock) in everything() {
        for both in [false, true] {
            let env = test_env(name, lock, WAITS);
            let _kill_on_drop = KillOnDrop(home(&env));
            let run = env.start_apply(Subject::Tf);
            let terraform = terraform_of(&run);
            let tf = tf_of(&env);
            let guardian = guardian_of(&env, tf);
            kill(tf, Signal::SIGKILL).unwrap();
            if both {
                kill(terraform, Signal::SIGKILL).unwrap();
            }
            env.unblock();
            run.wait();
            wait_until_gone(&env, guardian);
            env.assert_unlocked();
            assert_works_again(name, &env);
        }
    }
}

#[test]
fn when_everything_is_killed_the_next_tf_gives_the_lock_back() {
    for (name, lock) in everything() {
        let env = test_env(name, lock, WAITS);
        let _kill_on_drop = KillOnDrop(home(&env));
        let run = env.start_apply(Subject::Tf);
        // The lock is in the journal about 20 ms after it is in the log.
        wait_for(
            "the journal",
            || {
                let runs = env.directory.parent().unwrap().join("home/.local/state/tf/runs");
                let records = std::fs::read_dir(runs).ok()?.flatten().map(|run| run.path().join("record.json"));
                let is_had = |text: &str| !text.contains("\"locked\":null") && !text.contains("\"granted\":null");
                let holds = |text: &str| text.contains("\"asked\"") && is_had(text);
                records.filter_map(|path| std::fs::read_to_string(path).ok()).any(|text| holds(&text)).then_some(())
            },
            || env.trace(),
        );
        kill_all(&env);
        run.wait();
        env.assert_locked();
        env.unblock();
        let end = env.run(Subject::Tf, &["apply", "-auto-approve", "-no-color"]);
        assert_eq!(end.code(), Some(0), "{name}: {}", env.dump(&end));
        assert!(end.err.contains("released the lock that an earlier run left"), "{name}: {}", env.dump(&end));
        env.assert_unlocked();
        wait_until_ours_are_gone(&env);
    }
}

#[test]
fn anothers_lock_is_left_to_him() {
    for (name, lock) in everything() {
        let env = test_env(name, lock, WAITS);
        let theirs = env.lock_of_another();
        let end = env.run(Subject::Tf, &["apply", "-auto-approve", "-no-color"]);
        assert_eq!(end.code(), Some(1), "{name}: {}", env.dump(&end));
        assert!(env.locks().iter().all(|lock| *lock == theirs) && !env.locks().is_empty(), "{name}: {:?}", env.locks());
        env.delete_lock();
    }
}

/// A colleague may have another version, and no `tf`.
#[test]
fn a_lock_with_the_record_of_a_lease_is_an_ordinary_lock_to_every_other_version() {
    for (name, lock) in everything() {
        let mut env = TestEnv::new(lock, WAITS);
        env.set("TFW_LEASE", "10s").set("TFW_CLOCK", "steady");
        let other = |arguments: &[&str]| {
            let mut command = env.command(program(name));
            command.args(arguments).env("TF_DATA_DIR", ".other").env_remove("TFW_LEASE");
            Run::start(command)
        };
        let end = other(&["init", "-no-color"]).wait();
        assert_eq!(end.code(), Some(0), "{name}: {}", env.dump(&end));

        let run = env.start_apply(Subject::Tf);
        env.wait_for_lease();
        let id = id_of(&env.locks()[0]);
        let end = other(&["plan", "-no-color"]).wait();
        assert_eq!(end.code(), Some(1), "{name}: {}", env.dump(&end));
        for text in ["Error acquiring the state lock", &id, "tf lease 10s"] {
            assert!(end.err.contains(text), "{name}: no {text} in {}", env.dump(&end));
        }
        let waiting = other(&["plan", "-no-color", "-lock-timeout=60s"]);
        waiting.wait_for_out("Acquiring state lock");
        env.unblock();
        let end = run.wait();
        assert_eq!(end.code(), Some(0), "{name}: {}", env.dump(&end));
        let end = waiting.wait();
        assert_eq!(end.code(), Some(0), "{name}: {}", env.dump(&end));
        env.assert_unlocked();

        env.forget_state();
        for left in ["began", "go"] {
            std::fs::remove_file(env.directory.join(left)).unwrap();
        }
        let run = env.start_apply(Subject::Tf);
        env.wait_for_lease();
        let id = id_of(&env.locks()[0]);
        let end = other(&["force-unlock", "-force", &id]).wait();
        assert_eq!(end.code(), Some(0), "{name}: {}", env.dump(&end));
        env.assert_unlocked();
        run.wait_for_err("somebody has deleted the lock of this run");
        env.unblock();
        let end = run.wait();
        assert_ne!(end.code(), Some(0), "{name}: {}", env.dump(&end));
        env.assert_unlocked();
    }
}

#[test]
fn a_lock_that_replaced_ours_stands() {
    for (name, lock) in everything() {
        // The provisioner outlives terraform, which gives the test time to replace the lock.
        let env = test_env(
            name,
            lock,
            "(trap '' TERM; touch began; while test -e began && ! test -e go; do sleep 0.02; done)",
        );
        let run = env.start_apply(Subject::Tf);
        kill(terraform_of(&run), Signal::SIGKILL).unwrap();
        env.wait_for_trace("ending ");
        // The new lock is of the same user on the same host and was created a moment later, as on a clone of this
        // machine.
        let theirs = lock_json("22222222-3333-4444-5555-666666666666", &env.path());
        let version = name.rsplit('-').next().unwrap();
        let theirs = theirs.replace("\"1.11.4\"", &format!("\"{version}\""));
        env.delete_lock();
        env.put_lock(&theirs);
        env.unblock();
        let end = run.wait();
        let left = env.locks();
        assert!(
            !left.is_empty() && left.iter().all(|lock| id_of(lock) == id_of(&theirs)),
            "{name}: {}",
            env.dump(&end)
        );
        env.delete_lock();
    }
}

#[test]
fn a_user_who_logs_keeps_his_log_and_loses_no_lock() {
    for (name, lock) in everything() {
        let mut env = test_env(name, lock, WAITS);
        env.set("TF_LOG", "INFO");
        let run = env.start_apply(Subject::Tf);
        kill(terraform_of(&run), Signal::SIGKILL).unwrap();
        let end = run.wait();
        assert!(end.err.contains("[INFO]"), "{name}: {}", env.dump(&end));
        assert!(end.err.contains("released the lock"), "{name}: {}", env.dump(&end));
        env.assert_unlocked();
    }
}

#[test]
fn doctor_says_what_a_programs_log_tells() {
    let said = |env: &TestEnv| env.run(Subject::Tf, &["locks", "doctor"]).out;
    let tofu = test_env(TOFU, Lock::DynamoDb, "true");
    assert!(
        said(&tofu).contains("OpenTofu 1.6.2: its log reports that it held a lock, but not which one"),
        "{}",
        said(&tofu)
    );
    // Here, this terraform is a small program that loads a library. It could as well be a script that starts another
    // program, so its version is known only after its first run.
    let mut old = TestEnv::empty(Lock::DynamoDb);
    old.set("TFW_TERRAFORM", program("terraform-1.8.4"));
    old.write_main("", "true");
    assert!(said(&old).contains("tf does not know yet which one"), "{}", said(&old));
    let end = old.run(Subject::Tf, &["init", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", old.dump(&end));
    assert!(
        said(&old).contains("Terraform 1.8.4: tf can release the locks that this version leaves"),
        "{}",
        said(&old)
    );
}

/// OpenTofu up to 1.10 logs that it has a lock only by what it does next. If a command does not log even that, the lock
/// is not proved to be its own.
#[test]
fn what_opentofu_does_not_tell_is_named_and_kept() {
    let env = test_env(TOFU, Lock::DynamoDb, "true");
    let end = env.run(Subject::Tf, &["apply", "-auto-approve", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    // The proxy holds the read of the state, so that the program is killed while its lock is in the table.
    let proxy = crate::support::proxy::Proxy::start(crate::support::cloud::cloud().port, move |request| {
        let gets_state = request.start.starts_with("GET ") && request.start.contains("dir/prod.tfstate");
        if gets_state { crate::support::proxy::ProxyAction::Hold } else { crate::support::proxy::ProxyAction::Pass }
    });
    let mut env = env;
    env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    let run = env.start(Subject::Tf, &["state", "rm", "terraform_data.a"]);
    proxy.wait_until_held();
    env.wait_for_locked();
    let standing = env.locks();
    kill(terraform_of(&run), Signal::SIGKILL).unwrap();
    proxy.let_go();
    let end = run.wait();
    assert!(
        end.err.contains("may belong to that run and was not released") && end.err.contains(&id_of(&standing[0])),
        "{}",
        env.dump(&end)
    );
    assert_eq!(env.locks(), standing);
    env.delete_lock();
}

/// The program is killed between its request and its next record. The request lands when the program is dead:
/// immediately, or after every look for it.
#[test]
fn a_lock_that_opentofu_only_asked_for_is_named_in_the_end() {
    for (at_once, guarded) in [(true, false), (false, false), (false, true)] {
        let mut env = test_env(TOFU, Lock::DynamoDb, "true");
        let _kill_on_drop = KillOnDrop(home(&env));
        let direct = env.environment();
        let proxy = crate::support::proxy::Proxy::start(crate::support::cloud::cloud().port, |request| {
            let puts = request.header("x-amz-target").is_some_and(|target| target.ends_with(".PutItem"));
            if puts { crate::support::proxy::ProxyAction::Hold } else { crate::support::proxy::ProxyAction::Pass }
        });
        env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
        let run = env.start(Subject::Tf, &["apply", "-auto-approve", "-no-color"]);
        proxy.wait_until_held();
        let land = || {
            proxy.let_go();
            proxy.wait_until_delivered();
            env.assert_locked();
            id_of(&env.locks()[0])
        };
        if guarded {
            let runs = env.directory.parent().unwrap().join("home/.local/state/tf/runs");
            let asked = |path: &Path| {
                std::fs::read_to_string(path.join("record.json")).unwrap_or_default().contains("\"granted\":null")
            };
            wait_for(
                "the journal",
                || std::fs::read_dir(&runs).ok()?.flatten().any(|run| asked(&run.path())).then_some(()),
                || env.trace(),
            );
            kill_all(&env);
            drop(run);
            land();
        } else {
            kill(terraform_of(&run), Signal::SIGKILL).unwrap();
            if at_once {
                env.wait_for_trace("the tree is dead");
                let id = land();
                let end = run.wait();
                assert!(end.err.contains("may belong to that run and was not released"), "{}", env.dump(&end));
                assert!(end.err.contains(&id), "{}", env.dump(&end));
                env.delete_lock();
                continue;
            }
            let end = run.wait();
            assert!(end.err.contains("the lock may still appear"), "{}", env.dump(&end));
            land();
        }
        let standing = env.locks();
        let mut next = env.command(env.bin().join("tf"));
        next.args(["plan", "-no-color"]).env_clear().envs(direct);
        let end = Run::start(next).wait();
        assert!(end.err.contains("may belong to an earlier run"), "{}", env.dump(&end));
        assert!(end.err.contains(&id_of(&standing[0])), "{}", env.dump(&end));
        assert_eq!(env.locks(), standing);
        env.delete_lock();
    }
}

/// OpenTofu, which does not log the IDs of its locks, is killed at moments spread over its run. Each lock that it
/// leaves is released or reported.
#[test]
fn killed_at_any_moment_opentofu_leaves_no_lock_unnamed() {
    let kills: u32 = std::env::var("TF_TEST_KILLS").ok().and_then(|text| text.parse().ok()).unwrap_or(40);
    let env = test_env(TOFU, Lock::DynamoDb, "true");
    let begun = std::time::Instant::now();
    let end = env.run(Subject::Tf, &["apply", "-auto-approve", "-no-color"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    let whole = begun.elapsed();
    let (mut released, mut named) = (0, 0);
    for number in 0..kills {
        let run = env.start(Subject::Tf, &["apply", "-auto-approve", "-no-color", "-replace=terraform_data.a"]);
        let terraform = terraform_of(&run);
        // This sleep is what is tested: the moment of the kill.
        std::thread::sleep(whole * number / kills);
        let _ = kill(terraform, Signal::SIGKILL);
        let end = run.wait();
        released += usize::from(end.err.contains("released the lock"));
        let left = env.locks();
        if let Some(lock) = left.first() {
            // It was killed between the response and its next record, so its log does not show that it had the lock.
            assert!(end.err.contains(&id_of(lock)), "{number}: {}", env.dump(&end));
            named += 1;
            env.delete_lock();
        }
        env.forget_state();
    }
    assert!(released > 0, "{kills} kills: {released} locks released, {named} named");
}
