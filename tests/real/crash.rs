//! Crash points: `tf`, its guardian or a recovery is killed at every step, alone, and then once more in the recovery
//! after it. In the end, every lock of a dead run is released, and every lock of a living run is still held.
//!
//! This needs a build with the feature `crash-points`. The points are those that the program reports to have reached,
//! and they must be all the points in its source.

mod lease;

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use nix::sys::signal::{Signal, kill};

use crate::support::cloud::cloud;
use crate::support::process::{Run, state, tree};
use crate::support::processes::{KillOnDrop, home, kill_all, marked, ours, wait_until_all_is_gone};
use crate::support::test_env::{WAITS, lock_json};
use crate::support::{Ended, Lock, TestEnv, wait_for};

const APPLY: [&str; 4] = ["apply", "-auto-approve", "-no-color", "-var=a=hunter-var"];

/// What must never be written to disk, wherever a run is killed.
const SECRETS: [&str; 3] = ["hunter-var", "hunter-backend", "hunter-env"];

/// What happens to a run. Different outcomes reach different points.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum CrashOutcome {
    /// It exits successfully.
    Ends,
    /// Terraform is killed.
    TerraformKilled,
    /// `tf` is killed.
    TfKilled,
    /// Both are killed.
    BothKilled,
    /// The guardian is killed, and then terraform.
    GuardianKilled,
    /// Every process is killed, and the next run recovers.
    AllKilled,
}

const FATES: [CrashOutcome; 6] = [
    CrashOutcome::Ends,
    CrashOutcome::TerraformKilled,
    CrashOutcome::TfKilled,
    CrashOutcome::BothKilled,
    CrashOutcome::GuardianKilled,
    CrashOutcome::AllKilled,
];

/// A [`TestEnv`] that serves many cases, one after the other.
struct Ground {
    env: TestEnv,
    /// The lock of another, living run in the same table and bucket.
    neighbour: String,
    _kill_on_drop: KillOnDrop,
}

impl Ground {
    fn new() -> Self {
        let mut env = TestEnv::empty(Lock::Both);
        env.write_main("variable \"a\" {\n}\n", WAITS);
        env.set("AWS_SECRET_ACCESS_KEY", "hunter-env");
        let mut init = env.command(env.bin().join("terraform"));
        init.args([
            "init",
            "-no-color",
            "-backend-config=access_key=test",
            "-backend-config=secret_key=hunter-backend",
        ]);
        assert_eq!(Run::start(init).wait().code(), Some(0));
        let neighbour = lock_json("22222222-2222-3333-4444-555555555555", &format!("{}/other", env.bucket));
        cloud().put_item(&env.table, &format!("{}/other", env.bucket), &neighbour);
        cloud().s3("PUT", &format!("{}/other.tflock", env.bucket), neighbour.as_bytes());
        let kill_on_drop = KillOnDrop(home(&env));
        Self { env, neighbour, _kill_on_drop: kill_on_drop }
    }

    fn clear(&self) {
        for name in ["began", "go", "trace", "points"] {
            let _ = fs::remove_file(self.env.directory.join(name));
        }
        self.env.forget_state();
    }

    /// Starts `tf`, which is killed at `point`.
    fn start(&self, arguments: &[&str], point: &str) -> Run {
        let mut command = self.env.command(self.env.bin().join("tf"));
        command.args(arguments).env("TFW_CRASH", point).env("TFW_CRASH_LIST", self.env.directory.join("points"));
        Run::start(command)
    }

    /// Runs `tf` with this outcome. When this returns, no process of the run is left.
    fn play(&self, fate: CrashOutcome, point: &str) {
        let run = self.start(&APPLY, point);
        let tf = run.pid();
        let is_over = || !matches!(state(tf), Some(state) if state != 'Z');
        // Wait until the provisioner works, or until the run is dead.
        let works = wait_for(
            "the provisioner, or the end",
            || {
                if self.env.exists("began") {
                    Some(true)
                } else if is_over() && tree(tf).len() <= 1 && marked(&home(&self.env)).is_empty() {
                    Some(false)
                } else {
                    None
                }
            },
            || self.env.trace(),
        );
        if works {
            let terraform = || tree(tf).into_iter().find(|(_, name, ..)| name == "terraform").map(|(pid, ..)| pid);
            let kill_one = |pid| {
                let _ = kill(pid, Signal::SIGKILL);
            };
            match fate {
                CrashOutcome::Ends => self.env.unblock(),
                CrashOutcome::TerraformKilled => {
                    if let Some(pid) = terraform() {
                        kill_one(pid);
                    }
                }
                CrashOutcome::TfKilled => kill_one(tf),
                CrashOutcome::BothKilled => {
                    let terraform = terraform();
                    kill_one(tf);
                    if let Some(pid) = terraform {
                        kill_one(pid);
                    }
                }
                CrashOutcome::GuardianKilled => {
                    let guardian = tree(tf).into_iter().find(|(_, name, ..)| name == "tf-guardian");
                    if let Some((pid, ..)) = guardian {
                        kill_one(pid);
                        // Its socket is closed by then, so `tf` notices this death before that of terraform.
                        let is_dead = || state(pid).is_none_or(|state| state == 'Z').then_some(());
                        wait_for("the end of the guardian", is_dead, || self.env.trace());
                    }
                    if let Some(pid) = terraform() {
                        kill_one(pid);
                    }
                }
                CrashOutcome::AllKilled => kill_all(&self.env),
            }
        }
        // Without `tf` and the guardian, terraform continues until it is done.
        drop_when_over(run, self);
        self.assert_no_secret(point);
    }

    fn state_directory(&self) -> PathBuf {
        self.env.directory.parent().unwrap().join("home/.local/state/tf")
    }

    fn assert_no_secret(&self, point: &str) {
        let mut directories = vec![self.state_directory()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                let text = fs::read(entry.path()).unwrap_or_default();
                let text = String::from_utf8_lossy(&text);
                for secret in SECRETS {
                    assert!(
                        !text.contains(secret),
                        "{secret} in {}, dead at {point:?}: {text}",
                        entry.path().display()
                    );
                }
                directories.push(entry.path());
            }
        }
    }

    /// Starts the next run, which may be killed at `point` while it recovers.
    fn next(&self, point: &str) -> Ended {
        for name in ["began", "go"] {
            let _ = fs::remove_file(self.env.directory.join(name));
        }
        let end = self.start(&["plan", "-no-color", "-var=a=x"], point).wait();
        wait_until_all_is_gone(&self.env);
        end
    }

    /// Checks that nothing of a dead run is left, and that the lock of the living run is still held.
    fn assert_well(&self, case: &str) {
        let mut end = self.next("none");
        if end.err.contains("does not have the expected content") {
            // Terraform died between the write of its state and that of the digest. That has nothing to do with locks,
            // and is repaired on request.
            let mended = self.start(&["locks", "doctor", "--fix-digest", "--yes"], "none").wait();
            assert_eq!(mended.code(), Some(0), "{case}\n{}", self.env.dump(&mended));
            end = self.next("none");
        }
        let dump = || format!("{case}\n{}", self.env.dump(&end));
        assert_eq!(end.code(), Some(0), "{}", dump());
        assert!(self.env.locks().is_empty(), "{:?}\n{}", self.env.locks(), dump());
        let path = format!("{}/other", self.env.bucket);
        assert_eq!(cloud().item(&self.env.table, &path).as_ref(), Some(&self.neighbour), "{}", dump());
        assert_eq!(cloud().object(&format!("{path}.tflock")).as_ref(), Some(&self.neighbour), "{}", dump());
        // A second run finds nothing to do, and no records. It may look for the pending requests of earlier deaths, and
        // says so if that takes more than a second.
        let end = self.next("none").without_progress();
        assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{case}\n{}", self.env.dump(&end));
        let runs = self.state_directory().join("runs");
        let left: Vec<_> = fs::read_dir(runs).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
        // A record directory whose creation was interrupted is deleted when it is an hour old.
        assert!(left.iter().all(|path| path.to_string_lossy().contains(".new-")), "{left:?}\n{case}");
        for path in left {
            fs::remove_dir_all(path).unwrap();
        }
        // Terraform's log is gone as well. It stays in memory as long as it has a name.
        let trace = self.env.trace();
        for run in trace.lines().filter_map(|line| line.split(", run ").nth(1)) {
            assert!(!Path::new(&format!("/dev/shm/tf-{run}.log")).exists(), "{run}\n{case}\n{trace}");
        }
    }

    fn points(&self) -> BTreeSet<String> {
        self.env.read("points").lines().map(ToOwned::to_owned).collect()
    }
}

fn drop_when_over(run: Run, ground: &Ground) {
    // A terraform without `tf` and guardian waits until the test creates `go`.
    wait_for(
        "the end of all",
        || {
            let left = marked(&home(&ground.env));
            if ours(&ground.env).is_empty() {
                ground.env.unblock();
            }
            left.is_empty().then_some(())
        },
        || ground.env.trace(),
    );
    drop(run);
}

/// Returns the points that each outcome reaches, in the run and in the next run.
fn reached() -> Vec<(CrashOutcome, BTreeSet<String>, BTreeSet<String>)> {
    let ground = Ground::new();
    FATES
        .into_iter()
        .map(|fate| {
            ground.clear();
            ground.play(fate, "none");
            let in_run = ground.points();
            let _ = fs::remove_file(ground.env.directory.join("points"));
            ground.next("none");
            let after = ground.points();
            ground.assert_well(&format!("{fate:?}"));
            (fate, in_run, after)
        })
        .collect()
}

/// Returns the name of every point in the source for which `is_wanted` returns true.
fn in_source(is_wanted: impl Fn(&str) -> bool) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    let mut directories = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("src")];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap().flatten() {
            if entry.path().is_dir() {
                directories.push(entry.path());
                continue;
            }
            let text = fs::read_to_string(entry.path()).unwrap();
            for piece in text.split("crash_point::reached(\"").skip(1) {
                let name = piece.split('"').next().unwrap();
                if is_wanted(name) {
                    names.insert(name.to_owned());
                }
            }
        }
    }
    names
}

/// Runs `cases` in several [`Ground`]s at the same time.
fn on_grounds<T: Sync>(cases: &[T], play: impl Fn(&Ground, &T) + Sync) {
    let next = Mutex::new(cases.iter());
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                let ground = Ground::new();
                loop {
                    let Some(case) = next.lock().unwrap().next() else { return };
                    ground.clear();
                    play(&ground, case);
                }
            });
        }
    });
}

/// Prints a line that is visible if the output of the tests is requested.
fn tell(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}

#[test]
fn whoever_dies_wherever_no_lock_of_the_dead_stands_and_every_one_of_the_living() {
    let reached = reached();
    let known: BTreeSet<String> = reached.iter().flat_map(|(_, run, after)| run | after).collect();
    let of_others = lease::OF_A_RUN.iter().chain([&lease::OF_A_TAKER]);
    let is_ours = |name: &str| !of_others.clone().any(|kind| name.starts_with(kind));
    assert_eq!(known, in_source(is_ours), "points that no fate comes to, or that the source does not name");
    let cases: Vec<(CrashOutcome, String)> =
        reached.iter().flat_map(|(fate, run, _)| run.iter().map(|point| (*fate, point.clone()))).collect();
    on_grounds(&cases, |ground, (fate, point)| {
        ground.play(*fate, point);
        ground.assert_well(&format!("{fate:?}, dead at {point:?}"));
    });
    tell(&format!("{} points, {} deaths", known.len(), cases.len()));

    // Killed once more in the recovery: after each point at which every other process was killed too.
    let (_, of_all_killed, after) = reached.iter().find(|(fate, ..)| *fate == CrashOutcome::AllKilled).unwrap();
    let pairs: Vec<(&String, &String)> =
        of_all_killed.iter().flat_map(|first| after.iter().map(move |second| (first, second))).collect();
    on_grounds(&pairs, |ground, (first, second)| {
        ground.play(CrashOutcome::AllKilled, first);
        ground.next(second);
        ground.assert_well(&format!("everything killed, one at {first:?}, the next at {second:?}"));
    });
    tell(&format!("{} pairs of deaths", pairs.len()));
}
