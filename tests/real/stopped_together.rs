//! "What a provisioner has started ends with the first stop, whoever asks for it", and a stop that reaches all
//! processes of a unit reaches terraform once.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use super::interrupted_once::slow_to_plan;
use super::leased::{Successor, about_to_write, network_of_tf, wait_for_renewal_after, wait_until_stopped};
use crate::support::cloud::tool;
use crate::support::process::{Run, terraform_below};
use crate::support::processes::{KillOnDrop, home, tf_of, wait_until_all_is_gone, wait_until_unlocked};
use crate::support::system::is_root_on_linux;
use crate::support::terminal::Terminal;
use crate::support::test_env::APPLY;
use crate::support::{Lock, Subject, TestEnv, wait_for};

/// This is not a bash script, because bash continues after an INT if its child happens to exit by itself at that
/// moment.
const WORKER: &str = "import time\nopen('began', 'w').close()\nwhile True:\n    open('work', 'a').write('work\\n')\n    pass\n\
                      \u{20}   time.sleep(0.02)\n";

/// Returns a [`TestEnv`] whose provisioner's shell runs a worker that ends at an interrupt, as most programs do. It is
/// not started with `&`, because a background process of a script ignores INT (POSIX 2.11), and ^C would not end it
/// either.
fn with_worker() -> TestEnv {
    let env = TestEnv::empty(Lock::Both);
    env.write("worker", WORKER);
    env.write_main("", &format!("{} -S worker; true", tool("python3").display()));
    env.init();
    env
}

/// Checks that the worker does nothing after the lock is released.
#[track_caller]
fn assert_works_no_more(env: &TestEnv, how: &str) {
    wait_until_unlocked(env);
    let work = env.read("work").len();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(env.read("work").len(), work, "{how}: it works on\n{}", env.trace());
}

#[test]
fn what_a_provisioners_shell_has_started_ends_before_the_lock_is_free_whoever_stops_the_run() {
    let signals = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];
    for signal in signals {
        for to_group in [false, true] {
            let env = with_worker();
            let _kill_on_drop = KillOnDrop(home(&env));
            let run = env.start_apply(Subject::Tf);
            if to_group {
                run.send_to_group(signal);
            } else {
                run.send(signal);
            }
            let end = run.wait();
            assert_works_no_more(&env, &format!("{signal} {to_group}"));
            assert!(!end.err.contains("are still running"), "{}", env.dump(&end));
        }
    }
}

#[test]
fn what_a_provisioners_shell_has_started_ends_when_tf_is_killed() {
    let env = with_worker();
    let _kill_on_drop = KillOnDrop(home(&env));
    let run = env.start_apply(Subject::Tf);
    run.send(Signal::SIGKILL);
    run.wait();
    assert_works_no_more(&env, "kill -9 of tf");
    wait_until_all_is_gone(&env);
}

#[test]
fn what_a_provisioners_shell_has_started_ends_with_a_closed_window_and_with_a_reader_that_leaves() {
    let env = with_worker();
    let _kill_on_drop = KillOnDrop(home(&env));
    let mut shell = env.command("bash");
    shell.args(["--norc", "-i"]);
    let mut terminal = Terminal::start(shell);
    terminal.type_in(&format!("tf {}\r", APPLY.join(" ")));
    env.wait_for_file("began");
    terminal.close();
    assert_works_no_more(&env, "closed window");

    let env = with_worker();
    let _kill_on_drop = KillOnDrop(home(&env));
    // The reader exits once there is a worker. Terraform forwards the output of the worker.
    env.write("worker", &WORKER.replace("pass", "print('says', flush=True)"));
    let mut command = env.command("bash");
    command.args(["-c", &format!("tf {} | while ! test -e work; do sleep 0.02; done", APPLY.join(" "))]);
    let run = Run::start(command);
    env.wait_for_began(&run);
    run.wait();
    assert_works_no_more(&env, "a reader that left");
}

/// Under bare terraform, the worker ends too unless only terraform's pid is signaled: the signaled group contains the
/// worker.
#[test]
fn under_bare_terraform_a_group_signal_ends_the_worker_and_a_kill_of_its_pid_does_not() {
    for (to_group, works_on) in [(true, false), (false, true)] {
        let env = with_worker();
        let _kill_on_drop = KillOnDrop(home(&env));
        let run = env.start_apply(Subject::Bare);
        if to_group {
            run.send_to_group(Signal::SIGTERM);
        } else {
            run.send(Signal::SIGTERM);
        }
        wait_until_unlocked(&env);
        let work = env.read("work").len();
        if works_on {
            wait_for("more work", || (env.read("work").len() > work).then_some(()), || env.read("work"));
        } else {
            assert_works_no_more(&env, "bare, its group");
        }
    }
}

/// A provider must get nothing but INT: providers with go-plugin ignore it, but die of TERM and HUP, with a resource
/// half created.
#[test]
fn terraforms_group_gets_interrupts_and_nothing_else() {
    for signal in [Signal::SIGTERM, Signal::SIGHUP, Signal::SIGINT] {
        let env = TestEnv::empty(Lock::DynamoDb);
        env.write(
            "counts",
            "for s in INT TERM HUP; do trap \"echo $s >> got\" $s; done\ntouch began\n\
             while ! test -e go; do sleep 0.02; done\n",
        );
        // The script is in terraform's group, but it is not the shell that terraform kills.
        env.write_main("", "bash counts > /dev/null 2>&1; true");
        env.init();
        let _kill_on_drop = KillOnDrop(home(&env));
        let run = env.start_apply(Subject::Tf);
        run.send(signal);
        wait_for("the interrupt", || env.exists("got").then_some(()), || env.trace());
        run.wait();
        assert_eq!(env.read("got"), "INT\n", "{signal}\n{}", env.trace());
        env.unblock();
        wait_until_all_is_gone(&env);
    }
}

// ---- service managers

/// PID 1 of a namespace, as systemd is, with a unit: a control group whose main process is `tf`. When the file `stop`
/// exists, it sends what systemd sends (argv contains the KillMode: to the whole group, or to the main process), and
/// waits until all processes have exited.
const MANAGER: &str = r#"
import os, signal, sys, time
group, mode, program = sys.argv[1], sys.argv[2], sys.argv[3:]
main = os.fork()
if main == 0:
    open(os.path.join(group, "cgroup.procs"), "w").write(str(os.getpid()))
    os.execvp(program[0], program)
while not os.path.exists("stop"):
    time.sleep(0.005)
members = [int(pid) for pid in open(os.path.join(group, "cgroup.procs"))]
if mode == "mixed":
    members = [main]
for pid in members:
    for number in (signal.SIGTERM, signal.SIGCONT):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass
open("stopped", "w").write(" ".join(map(str, members)))
while True:
    try:
        pid, status = os.wait()
    except ChildProcessError:
        break
    if pid == main:
        code = os.waitstatus_to_exitcode(status)
sys.exit(code if code >= 0 else 128 - code)
"#;

struct Unit(PathBuf);

impl Drop for Unit {
    fn drop(&mut self) {
        for _ in 0..200 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Starts `tf` as the main process of a unit of [`MANAGER`].
fn start_unit(env: &TestEnv, mode: &str) -> (Unit, Run) {
    let root = Path::new("/sys/fs/cgroup");
    let root = if root.join("pids").exists() { root.join("pids") } else { root.to_owned() };
    let unit = Unit(root.join(format!("tf-unit-{}", env.bucket)));
    fs::create_dir(&unit.0).expect("no control group can be made: /sys/fs/cgroup is not writable");
    let mut command = env.command("unshare");
    command.args(["-pf", "--mount-proc", "--kill-child"]).arg(tool("python3")).args(["-c", MANAGER]);
    command.arg(&unit.0).args([mode, "tf"]).args(APPLY);
    (unit, Run::start(command))
}

#[test]
fn a_service_manager_that_stops_a_unit_or_its_main_process_interrupts_terraform_once() {
    if !is_root_on_linux() {
        return;
    }
    for mode in ["control-group", "mixed"] {
        let (env, proxy) = slow_to_plan();
        let _kill_on_drop = KillOnDrop(home(&env));
        let (_unit, run) = start_unit(&env, mode);
        proxy.wait_until_held();
        env.write("stop", "");
        run.wait_for_out("Interrupt received");
        let told = if mode == "mixed" { "Request: [InterruptGroup]" } else { "guardian: our unit is stopped" };
        env.wait_for_trace(told);
        proxy.let_go();
        let end = run.wait();
        assert_eq!(end.out.matches("Interrupt received.").count(), 1, "{mode}: {}", env.dump(&end));
        assert!(!end.err.contains("Two interrupts"), "{mode}: {}", env.dump(&end));
        assert_eq!(end.code(), Some(1), "{mode}: {}", env.dump(&end));
        wait_until_unlocked(&env);
        assert!(!end.err.contains("released"), "terraform did it itself: {}", env.dump(&end));
    }
}

#[test]
fn tf_that_is_killed_after_its_unit_was_told_to_stop_sends_no_second_interrupt() {
    if !is_root_on_linux() {
        return;
    }
    let (env, proxy) = slow_to_plan();
    let _kill_on_drop = KillOnDrop(home(&env));
    let (_unit, run) = start_unit(&env, "control-group");
    proxy.wait_until_held();
    let tf = tf_of(&env);
    // The stopped tf cannot react to the manager's signal.
    kill(tf, Signal::SIGSTOP).unwrap();
    env.write("stop", "");
    env.wait_for_trace("guardian: our unit is stopped");
    kill(tf, Signal::SIGKILL).unwrap();
    env.wait_for_trace("guardian: tf is gone");
    proxy.let_go();
    wait_until_unlocked(&env);
    let end = run.wait();
    assert!(!end.err.contains("Two interrupts"), "{}", env.dump(&end));
}

/// The manager's SIGCONT reaches a terraform that is stopped because its lease was not renewed in time.
#[test]
fn a_service_manager_that_stops_a_unit_does_not_let_a_terraform_write_whose_lock_another_run_has() {
    if !is_root_on_linux() {
        return;
    }
    for (mode, lock) in ["control-group", "mixed"].into_iter().flat_map(|mode| Lock::ALL.map(|lock| (mode, lock))) {
        let (mut env, go) = about_to_write(lock);
        let _kill_on_drop = KillOnDrop(home(&env));
        let (_proxy, is_away) = network_of_tf(&mut env);
        let (_unit, run) = start_unit(&env, mode);
        env.wait_for_began(&run);
        wait_for_renewal_after(&env, &Value::Null);
        let terraform = terraform_below(run.pid());
        let successor = Successor::of_a_stopped_run(&env, &go, (&run, terraform), &is_away);
        env.write("stop", "");
        env.wait_for_file("stopped");
        env.wait_for_trace("got SIGTERM");
        env.wait_for_trace("got SIGCONT");
        wait_until_stopped(&env, terraform);
        successor.assert_stands(&env, mode);
        is_away.store(false, Ordering::SeqCst);
        let end = run.wait();
        assert_eq!(end.code(), Some(137), "{mode}: {}", env.dump(&end));
        assert!(end.err.contains("the lock is held by another run now"), "{mode}: {}", env.dump(&end));
        wait_until_all_is_gone(&env);
        successor.assert_stands(&env, mode);
    }
}
