//! The processes of a [`TestEnv`]: which ones there are, which of them belong to `tf`, and when they are gone.

use std::path::{Path, PathBuf};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::system::{self, state};
use super::{TestEnv, wait_for};

/// Kills every process of a [`TestEnv`] when the test ends, even if it panics. The processes may no longer have a
/// common ancestor, so they are found by their environment.
pub struct KillOnDrop(pub String);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        for pid in marked(&self.0) {
            let _ = kill(pid, Signal::SIGKILL);
        }
    }
}

/// Returns the environment entry that every process of a [`TestEnv`] has.
pub fn home(env: &TestEnv) -> String {
    format!("HOME={}", env.directory.parent().unwrap().join("home").display())
}

/// Returns the processes that were started with `entry` (`NAME=value`) in their environment. A CI runner finds its
/// processes in the same way.
pub fn marked(entry: &str) -> Vec<Pid> {
    let has = |pid: &Pid| system::environment(*pid).is_some_and(|entries| entries.iter().any(|other| other == entry));
    system::pids().into_iter().filter(has).collect()
}

/// Returns the processes of a [`TestEnv`] that run the `tf` binary: `tf` itself, and its guardian.
pub fn ours(env: &TestEnv) -> Vec<Pid> {
    let binary = Path::new(env!("CARGO_BIN_EXE_tf")).canonicalize().unwrap();
    marked(&home(env)).into_iter().filter(|pid| system::program(*pid).as_ref() == Some(&binary)).collect()
}

/// Returns the `tf` of a [`TestEnv`]. The lower pid is not always that of `tf`, because pids wrap around, so the
/// guardian is recognized by its name.
pub fn tf_of(env: &TestEnv) -> Pid {
    let is_guardian = |pid: Pid| system::name(pid).starts_with("tf-");
    wait_for("tf", || ours(env).into_iter().find(|pid| !is_guardian(*pid)), || env.trace())
}

/// Returns the guardian of `tf`.
#[track_caller]
pub fn guardian_of(env: &TestEnv, tf: Pid) -> Pid {
    wait_for(
        "the guardian",
        || ours(env).into_iter().find(|pid| *pid != tf && is_named(*pid, "tf-guardian")),
        || format!("tf {tf}, ours {:?}\n{}", ours(env), env.trace()),
    )
}

/// Whether the process has this name in the process list.
pub fn is_named(pid: Pid, name: &str) -> bool {
    system::name(pid) == name
}

/// Returns the process of a [`TestEnv`] with the name `name`, such as `tf-fuse`.
#[track_caller]
pub fn named(env: &TestEnv, name: &str) -> Pid {
    let find = || ours(env).into_iter().find(|pid| is_named(*pid, name));
    wait_for(name, find, || format!("ours {:?}\n{}", ours(env), env.trace()))
}

pub fn is_gone(pid: Pid) -> bool {
    state(pid).is_none_or(|state| state == 'Z')
}

#[track_caller]
pub fn wait_until_gone(env: &TestEnv, pid: Pid) {
    wait_for("the end of a process", || is_gone(pid).then_some(()), || format!("{pid}\n{}", env.trace()));
}

#[track_caller]
pub fn wait_until_unlocked(env: &TestEnv) {
    wait_for(
        "the lock to go",
        || env.locks().is_empty().then_some(()),
        || format!("{:?}, ours {:?}\n{}", env.locks(), ours(env), env.trace()),
    );
}

/// Waits until no process of a [`TestEnv`] is running.
#[track_caller]
pub fn wait_until_all_is_gone(env: &TestEnv) {
    let left = || marked(&home(env));
    let shown = || left().into_iter().map(|pid| (pid, state(pid), system::name(pid))).collect::<Vec<_>>();
    wait_for("the end of all", || left().is_empty().then_some(()), || format!("{:?}\n{}", shown(), env.trace()));
}

/// Returns the lock files of all runs in the journal that a process has locked.
fn held_locks(env: &TestEnv) -> Vec<PathBuf> {
    let runs = env.directory.parent().unwrap().join("home/.local/state/tf/runs");
    let files = std::fs::read_dir(runs).into_iter().flatten().flatten().map(|run| run.path().join("lock"));
    files.filter(|file| system::is_locked(file)).collect()
}

/// Kills every process of a [`TestEnv`] except `spared`, and none of them notices the end of another one.
pub fn kill_all_but(env: &TestEnv, spared: &[Pid]) {
    // The processes of `tf` are stopped first, because they would notice the end of the others. A shell may start a
    // process between the list and its stop, so the list is read until everything in it was stopped.
    let is_meant = |pid: &Pid| !spared.contains(pid);
    let mut all: Vec<Pid> = ours(env).into_iter().filter(is_meant).collect();
    let mut stopped = 0;
    loop {
        for pid in &all[stopped..] {
            let _ = kill(*pid, Signal::SIGSTOP);
        }
        stopped = all.len();
        let more: Vec<Pid> = marked(&home(env)).into_iter().filter(is_meant).filter(|pid| !all.contains(pid)).collect();
        if more.is_empty() {
            break;
        }
        all.extend(more);
    }
    for pid in &all {
        let _ = kill(*pid, Signal::SIGKILL);
    }
    for pid in &all {
        wait_until_gone(env, *pid);
    }
}

/// Kills every process of a [`TestEnv`], as when its container is stopped.
pub fn kill_all(env: &TestEnv) {
    kill_all_but(env, &[]);
    // The environment of a process that was executing a program when the list was made could not be read, so it is not in
    // the list.
    let left = || {
        let left = marked(&home(env));
        for pid in &left {
            let _ = kill(*pid, Signal::SIGKILL);
        }
        left
    };
    wait_for(
        "the end of all",
        || left().is_empty().then_some(()),
        || format!("{:?}\n{}", marked(&home(env)), env.trace()),
    );
    // A process that was exiting when the list was made has no environment, so it is not in the list, but it may still
    // hold its file locks.
    wait_for(
        "the end of all file locks",
        || held_locks(env).is_empty().then_some(()),
        || format!("{:?}", held_locks(env)),
    );
}

/// Waits until no `tf` and no guardian of a [`TestEnv`] is running.
#[track_caller]
pub fn wait_until_ours_are_gone(env: &TestEnv) {
    wait_for(
        "the end of all that is ours",
        || ours(env).is_empty().then_some(()),
        || format!("{:?}\n{}", ours(env), env.trace()),
    );
}

/// Starts an apply, and kills its `tf` and its terraform while it works. The guardian survives, and does its work.
pub fn kill_without_guardian(env: &TestEnv) {
    let run = env.start_apply(super::Subject::Tf);
    let terraform = super::process::terraform_below(run.pid());
    run.send(Signal::SIGSTOP);
    kill(terraform, Signal::SIGKILL).unwrap();
    run.send(Signal::SIGKILL);
    // The guardian is a child of `tf` until `tf` has exited.
    run.wait();
    wait_until_ours_are_gone(env);
}
