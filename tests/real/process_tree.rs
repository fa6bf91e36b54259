//! "Everything that terraform started is dead before its lock goes". This includes processes that `tf` cannot read,
//! kill or see: children of another user, children without an environment, and children where there is no /proc.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::cloud::tool;
use crate::support::process::{Run, copy_program, state, terraform_below, tree};
use crate::support::processes::{KillOnDrop, guardian_of, home, is_gone, ours, wait_until_gone, wait_until_unlocked};
use crate::support::system::{self, IS_LINUX, is_root_on_linux};
use crate::support::test_env::APPLY;
use crate::support::{Ended, Lock, Subject, TestEnv, wait_for};

/// A user that is not root and has no name.
const USER: u32 = 54_321;

/// A program that becomes root as sudo does (with all its user IDs, and no inherited descriptor above 2), and works
/// until `sudo-go` exists. It ignores HUP, because a group that loses its last parent while a member is stopped is hung
/// up (POSIX, `_exit`).
const SUDO: &str = "import os, signal, time\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\nos.setgid(0)\nos.setuid(0)\nos.closerange(3, 65536)\n\
                    while not os.path.exists('sudo-go'):\n    open('work', 'a').write('work\\n')\n    time.sleep(0.02)\n";

/// A child of the same user without any mark, which ignores the signals that ask it to exit.
const BARE_CHILD: &str = "import os, signal, sys, time\nif len(sys.argv) < 2:\n    os.closerange(3, 65536)\n\
                          \u{20}   os.execve(sys.executable, [sys.executable, '-S', 'child.py', 'x'], {})\n\
                          for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):\n    signal.signal(s, signal.SIG_IGN)\n\
                          while not os.path.exists('child-go'):\n    open('work', 'a').write('work\\n')\n    time.sleep(0.02)\n";

/// Does the same in a second thread, while its first thread has exited. The kernel calls such a process a zombie.
const CHILD_WITHOUT_ITS_FIRST_THREAD: &str = r"
import ctypes, os, signal, sys, threading, time
if len(sys.argv) < 2:
    os.closerange(3, 65536)
    os.setsid()
    os.execve(sys.executable, [sys.executable, '-S', 'child.py', 'x'], {})
for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(s, signal.SIG_IGN)
def work():
    while not os.path.exists('child-go'):
        open('work', 'a').write('work\n')
        time.sleep(0.02)
    os._exit(0)
threading.Thread(target=work).start()
ctypes.CDLL(None).pthread_exit(None)
";

/// On SIGTERM, starts a worker without environment and descriptors in a session of its own, and works on itself.
const CHILD_THAT_STARTS_ANOTHER_ON_TERM: &str = r"
import os, signal, sys, time
if len(sys.argv) < 2:
    def start(*_):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if os.fork() == 0:
            os.closerange(3, 65536)
            os.setsid()
            os.execve(sys.executable, [sys.executable, '-S', 'child.py', 'x'], {})
    signal.signal(signal.SIGTERM, start)
    open('work', 'w')
    while True:
        time.sleep(0.02)
for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(s, signal.SIG_IGN)
open('pid-new', 'w').write(str(os.getpid()))
os.rename('pid-new', 'pid')
while True:
    open('work', 'a').write('work\n')
    time.sleep(0.02)
";

/// Returns a directory whose provisioner starts a stand-in for sudo. Everything in it belongs to an ordinary user.
fn world_of_user() -> TestEnv {
    let env = TestEnv::empty(Lock::Both);
    let python = fs::canonicalize(tool("python3")).unwrap();
    let sudo = env.directory.join("sudo");
    copy_program(&python, &sudo);
    let prefix = python.parent().and_then(std::path::Path::parent).unwrap();
    env.write("sudo.py", SUDO);
    env.write_main(
        "",
        &format!(
            "PYTHONHOME={} ./sudo -S sudo.py > /dev/null 2>&1 & while ! test -e work; do sleep 0.02; done; touch began; \
             while ! test -e go; do sleep 0.02; done",
            prefix.display()
        ),
    );
    env.init();
    let root = env.directory.parent().unwrap();
    // The `tf` under test may be in a directory that only root can read.
    copy_program(env!("CARGO_BIN_EXE_tf"), root.join("bin/tf-of-user"));
    let owned = Command::new("chown").args(["-R", &format!("{USER}:{USER}")]).arg(root).status().unwrap();
    assert!(owned.success());
    nix::unistd::chown(&sudo, Some(nix::unistd::Uid::from_raw(0)), None).unwrap();
    fs::set_permissions(&sudo, fs::Permissions::from_mode(0o4755)).unwrap();
    env
}

/// Starts `tf` as the ordinary user. `before` is a command in front of it, which runs as root.
fn as_user(env: &TestEnv, before: &[&str], arguments: &[&str]) -> Run {
    let ids = [format!("--reuid={USER}"), format!("--regid={USER}")];
    let mut words: Vec<&str> = before.to_vec();
    words.extend(["setpriv", &ids[0], &ids[1], "--clear-groups", "--"]);
    let mut command = env.command(words[0]);
    command.args(&words[1..]).arg(env.bin().join("tf-of-user")).args(arguments);
    Run::start(command)
}

fn run_as_user(env: &TestEnv, arguments: &[&str]) -> Ended {
    as_user(env, &[], arguments).wait()
}

/// Returns the stand-in for sudo. Its process belongs to root, so it is recognized by its program.
fn sudo_of(env: &TestEnv) -> Pid {
    let program = env.directory.join("sudo");
    wait_for(
        "the stand-in for sudo",
        || {
            let is_it = |pid: &Pid| system::program(*pid).as_ref() == Some(&program);
            system::pids().into_iter().find(is_it)
        },
        || env.trace(),
    )
}

/// Returns every process of the [`TestEnv`] except the stand-in.
fn others_of(env: &TestEnv, sudo: Pid) -> Vec<Pid> {
    let entry = home(env);
    crate::support::processes::marked(&entry).into_iter().filter(|pid| *pid != sudo).collect()
}

/// Kills `pids` so that none of them can notice the death of another.
fn kill_at_once(pids: &[Pid]) {
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        for pid in pids {
            let _ = kill(*pid, signal);
        }
    }
}

/// Checks that the stand-in keeps working, that the lock is held, that the next `tf` does not release it, and that it
/// is released after the stand-in has exited.
#[track_caller]
fn assert_kept_until_it_ends(env: &TestEnv, sudo: Pid) {
    assert!(!is_gone(sudo), "{sudo} is gone\n{}", env.trace());
    env.assert_locked();
    let end = run_as_user(env, &["plan", "-no-color"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    let end = run_as_user(env, &["locks", "recover"]);
    assert!(!end.err.contains("released the lock"), "{}", env.dump(&end));
    env.assert_locked();
    assert!(!is_gone(sudo));
    env.write("sudo-go", "");
    wait_until_gone(env, sudo);
    let end = run_as_user(env, &["locks", "recover"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert!(end.err.contains("released the lock") || end.out.contains("released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
}

#[test]
fn a_child_of_another_user_keeps_the_lock_whoever_was_killed() {
    if !is_root_on_linux() {
        return;
    }
    for killed in ["terraform", "tf and terraform", "everything"] {
        let env = world_of_user();
        let _kill_on_drop = KillOnDrop(home(&env));
        let run = as_user(&env, &[], &APPLY);
        env.wait_for_began(&run);
        env.wait_for_trace("journal written");
        let sudo = sudo_of(&env);
        let terraform = terraform_below(run.pid());
        match killed {
            "terraform" => {
                kill(terraform, Signal::SIGKILL).unwrap();
                let end = run.wait();
                assert!(end.err.contains("was not released") && end.err.contains("sudo"), "{}", env.dump(&end));
            }
            "tf and terraform" => {
                for pid in [run.pid(), terraform] {
                    kill(pid, Signal::SIGKILL).unwrap();
                }
                run.wait();
                env.wait_for_trace("Guardian: a lock may be held; died: true; log: Complete; Keep");
                wait_for("the guardian's end", || others_of(&env, sudo).is_empty().then_some(()), || env.trace());
            }
            _ => {
                let all = others_of(&env, sudo);
                kill_at_once(&all);
                run.wait();
                wait_for("the end of the others", || others_of(&env, sudo).is_empty().then_some(()), || env.trace());
            }
        }
        assert_kept_until_it_ends(&env, sudo);
    }
}

#[test]
#[cfg_attr(tf_portable, ignore = "only the parent of the orphans sees a child that /proc does not show")]
fn a_child_that_proc_hides_keeps_the_lock() {
    if !is_root_on_linux() {
        return;
    }
    let env = world_of_user();
    let _kill_on_drop = KillOnDrop(home(&env));
    let hides = "mount -t proc -o hidepid=2 proc /proc && exec \"$@\"";
    let run = as_user(&env, &["unshare", "-m", "sh", "-c", hides, "sh"], &APPLY);
    env.wait_for_began(&run);
    let sudo = sudo_of(&env);
    kill(terraform_below(run.pid()), Signal::SIGKILL).unwrap();
    let end = run.wait();
    assert!(end.err.contains("was not released"), "{}", env.dump(&end));
    // It is hidden from the recovery as well.
    let end = as_user(&env, &["unshare", "-m", "sh", "-c", hides, "sh"], &["locks", "recover"]).wait();
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    assert_kept_until_it_ends(&env, sudo);
}

/// Returns a directory whose provisioner starts a child without environment and descriptors.
fn with_bare_child() -> TestEnv {
    with_child(BARE_CHILD)
}

/// Returns a directory whose provisioner starts this Python program.
fn with_child(program: &str) -> TestEnv {
    let env = TestEnv::empty(Lock::Both);
    let python = tool("python3");
    env.write("child.py", program);
    env.write_main(
        "",
        &format!(
            "{} -S child.py < /dev/null > /dev/null 2>&1 & while ! test -e work; do sleep 0.02; done; touch began; \
             while ! test -e go; do sleep 0.02; done",
            python.display()
        ),
    );
    env.init();
    env
}

fn bare_child_of(env: &TestEnv, above: Pid) -> Pid {
    // macOS does not tell an empty environment from one that cannot be read.
    let cleared = |pid: &Pid| system::environment(*pid).map_or(!IS_LINUX, |entries| entries.is_empty());
    let named = |name: &str| name.starts_with("python");
    wait_for(
        "the child",
        || {
            let below = tree(above).into_iter();
            below
                .filter(|(.., state, _)| *state != 'Z')
                .find_map(|(pid, name, ..)| (named(&name) && cleared(&pid)).then_some(pid))
        },
        || format!("{:?}\n{}", tree(above), env.trace()),
    )
}

/// Checks that everything was written before the lock was released.
#[track_caller]
fn assert_works_no_more(env: &TestEnv) {
    let work = env.read("work").len();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(env.read("work").len(), work, "it works on\n{}", env.trace());
}

#[test]
fn a_child_without_environment_descriptors_or_parent_is_ended_by_the_guardian_before_the_lock_goes() {
    let env = with_bare_child();
    let run = env.start_apply(Subject::Tf);
    let child = bare_child_of(&env, run.pid());
    let terraform = terraform_below(run.pid());
    let mut shells: Vec<Pid> = tree(terraform).into_iter().map(|(pid, ..)| pid).filter(|pid| *pid != child).collect();
    shells.push(run.pid());
    kill_at_once(&shells);
    run.wait();
    wait_until_unlocked(&env);
    assert!(is_gone(child), "{}", env.trace());
    assert_works_no_more(&env);
}

#[test]
fn a_child_without_environment_descriptors_or_parent_keeps_the_lock_of_a_run_that_was_killed_whole() {
    let env = with_bare_child();
    let run = env.start_apply(Subject::Tf);
    env.wait_for_trace("journal written");
    let child = bare_child_of(&env, run.pid());
    let all: Vec<Pid> = others_of(&env, child);
    kill_at_once(&all);
    run.wait();
    assert_kept_as_long_as_it_lives(&env, child);
}

#[test]
fn a_child_that_starts_while_its_tree_is_ended_is_known_to_the_guardian() {
    let env = with_child(CHILD_THAT_STARTS_ANOTHER_ON_TERM);
    let run = env.start_apply(Subject::Tf);
    run.kill_terraform();
    let worker = || env.exists("pid").then(|| Pid::from_raw(env.read("pid").parse().unwrap()));
    let worker = wait_for("the worker", worker, || env.trace());
    wait_until_recorded(&env, worker);
    // `tf` and the parent of the worker die. The worker has no mark, no known parent and no descriptor.
    let guardian = guardian_of(&env, run.pid());
    let above: Vec<Pid> = tree(run.pid()).into_iter().map(|(pid, ..)| pid).collect();
    kill_at_once(&above.into_iter().filter(|pid| ![guardian, worker].contains(pid)).collect::<Vec<_>>());
    run.wait();
    wait_until_unlocked(&env);
    assert!(is_gone(worker), "{}", env.trace());
    assert_works_no_more(&env);
}

/// Checks that a recovery keeps the lock of a run that was killed whole while `child` lives, and releases it
/// afterwards.
#[track_caller]
fn assert_kept_as_long_as_it_lives(env: &TestEnv, child: Pid) {
    wait_for("the end of ours", || ours(env).is_empty().then_some(()), || env.trace());
    let end = env.run(Subject::Tf, &["locks", "recover"]);
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    env.assert_locked();
    assert!(!is_gone(child), "{}", env.dump(&end));
    env.write("child-go", "");
    wait_until_gone(env, child);
    let end = env.run(Subject::Tf, &["locks", "recover"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    env.assert_unlocked();
}

/// Returns the process whose first thread has exited.
fn child_without_its_first_thread_of(env: &TestEnv, above: Pid) -> Pid {
    let first_thread = |pid: Pid| system::process(pid).map(|process| process.state);
    let is_it = |pid: Pid| first_thread(pid) == Some('Z') && state(pid).is_some_and(|state| state != 'Z');
    wait_for(
        "the child",
        || tree(above).into_iter().find_map(|(pid, ..)| is_it(pid).then_some(pid)),
        || format!("{:?}\n{}", tree(above), env.trace()),
    )
}

#[test]
fn a_child_whose_first_thread_has_exited_is_ended_before_the_lock_goes() {
    if !IS_LINUX {
        // This test is listed in tests/left-out.
        return;
    }
    for subject in [Subject::Bare, Subject::Tf] {
        let env = with_child(CHILD_WITHOUT_ITS_FIRST_THREAD);
        let run = env.start_apply(subject);
        let child = child_without_its_first_thread_of(&env, run.pid());
        run.kill_terraform();
        let end = run.wait();
        if subject == Subject::Bare {
            assert!(!is_gone(child), "it would end by itself");
            env.write("child-go", "");
            continue;
        }
        env.assert_unlocked();
        assert!(is_gone(child), "{}", env.dump(&end));
        assert_works_no_more(&env);
    }
}

#[test]
fn a_child_whose_first_thread_has_exited_keeps_the_lock_of_a_run_that_was_killed_whole() {
    if !IS_LINUX {
        // This test is listed in tests/left-out.
        return;
    }
    let env = with_child(CHILD_WITHOUT_ITS_FIRST_THREAD);
    let run = env.start_apply(Subject::Tf);
    let child = child_without_its_first_thread_of(&env, run.pid());
    wait_until_recorded(&env, child);
    kill_at_once(&others_of(&env, child));
    run.wait();
    assert_kept_as_long_as_it_lives(&env, child);
}

/// Waits until the journal has the process.
fn wait_until_recorded(env: &TestEnv, child: Pid) {
    let text = format!("[{child},");
    let is_recorded = || {
        super::survived::records(env)
            .iter()
            .any(|path| fs::read_to_string(path).is_ok_and(|record| record.contains(&text)))
    };
    wait_for("the child in the journal", || is_recorded().then_some(()), || env.trace());
}

/// The child is in another session, below a process that waits for it, as with a `sudo` that has its own terminal.
#[test]
fn a_child_that_left_the_group_and_whose_parents_are_killed_with_everything_keeps_the_lock() {
    a_child_that_left_the_group_keeps_the_lock(|_, _| {});
}

#[test]
fn a_child_that_left_the_group_after_the_guardians_death_keeps_the_lock_too() {
    a_child_that_left_the_group_keeps_the_lock(|env, run| {
        kill(guardian_of(env, run.pid()), Signal::SIGKILL).unwrap();
        env.wait_for_trace("the guardian is gone");
    });
}

/// `before` is called before the child leaves the group.
fn a_child_that_left_the_group_keeps_the_lock(before: impl Fn(&TestEnv, &Run)) {
    let env = TestEnv::empty(Lock::Both);
    env.write("child.py", BARE_CHILD);
    env.write_main(
        "",
        &format!(
            "touch began; while ! test -e leave; do sleep 0.02; done; \
             env -i setsid -w {} -S child.py < /dev/null > /dev/null 2>&1 & while ! test -e go; do sleep 0.02; done",
            tool("python3").display()
        ),
    );
    env.init();
    let run = env.start_apply(Subject::Tf);
    before(&env, &run);
    env.write("leave", "");
    let child = bare_child_of(&env, run.pid());
    wait_until_recorded(&env, child);
    let above: Vec<Pid> = tree(run.pid()).into_iter().map(|(pid, ..)| pid).filter(|pid| *pid != child).collect();
    kill_at_once(&above);
    run.wait();
    assert_kept_as_long_as_it_lives(&env, child);
}

/// Starts `tf` in a namespace. `script` runs before it, and can change /proc.
fn in_namespace(env: &TestEnv, unshare: &[&str], script: &str) -> Run {
    let mut command = env.command("unshare");
    command.args(unshare).args(["sh", "-c", script]);
    command.arg(env.bin().join("tf")).args(APPLY);
    Run::start(command)
}

#[test]
#[cfg_attr(tf_portable, ignore = "only the parent of the orphans sees a child that /proc does not show")]
fn without_proc_what_terraform_left_is_dead_before_the_lock_goes() {
    if !is_root_on_linux() {
        return;
    }
    let env = with_bare_child();
    let run = in_namespace(&env, &["-m"], "mount -t tmpfs none /proc && exec \"$0\" \"$@\"");
    env.wait_for_began(&run);
    let child = bare_child_of(&env, run.pid());
    kill(terraform_below(run.pid()), Signal::SIGKILL).unwrap();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    assert!(is_gone(child), "{}", env.dump(&end));
    assert_works_no_more(&env);
    env.assert_unlocked();
}

#[test]
fn in_a_namespace_whose_proc_is_anothers_nobody_else_is_killed_and_a_doubt_keeps_the_lock() {
    if !is_root_on_linux() {
        return;
    }
    let env = TestEnv::new(Lock::Both, crate::support::test_env::WAITS);
    let _kill_on_drop = KillOnDrop(home(&env));
    // `tf` is PID 1 and has many children. The pids of many of them belong to other processes in the /proc that it
    // sees.
    let siblings = "for n in $(seq 300); do sleep 1000 < /dev/null > /dev/null 2>&1 & done; exec \"$0\" \"$@\"";
    let run = in_namespace(&env, &["-pf", "--kill-child"], siblings);
    env.wait_for_began(&run);
    let sleeping =
        || tree(run.pid()).into_iter().filter(|(_, name, state, _)| name == "sleep" && *state != 'Z').count();
    assert!(sleeping() >= 300);
    kill(terraform_below(run.pid()), Signal::SIGKILL).unwrap();
    run.wait_for_err("was not released");
    assert!(
        run.err().contains("cannot tell whether terraform's child processes are still running"),
        "{}\n{}",
        run.err(),
        env.trace()
    );
    let end = run.wait();
    assert!(!env.trace().contains("ending "), "{}", env.dump(&end));
    env.assert_locked();
}

#[test]
#[cfg_attr(tf_portable, ignore = "only the parent of the orphans sees a child that /proc does not show")]
fn in_a_namespace_whose_proc_is_anothers_the_lock_goes_once_no_child_is_left() {
    if !is_root_on_linux() {
        return;
    }
    let env = with_bare_child();
    let _kill_on_drop = KillOnDrop(home(&env));
    let run = in_namespace(&env, &["-pf", "--kill-child"], "\"$0\" \"$@\"; exit $?");
    env.wait_for_began(&run);
    let child = bare_child_of(&env, run.pid());
    kill(terraform_below(run.pid()), Signal::SIGKILL).unwrap();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    assert!(is_gone(child), "{}", env.dump(&end));
    env.assert_unlocked();
}
