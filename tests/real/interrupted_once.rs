//! "Terraform sees exactly one interrupt, immediately", without a terminal: kill, kill of a group, timeout, scripts,
//! and pipes whose reader exits. Terminals are in `terminal.rs`.

use std::io::Read;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};

use crate::support::cloud::cloud;
use crate::support::process::{Run, SystemCall, state, waits_in};
use crate::support::processes::{KillOnDrop, guardian_of, home, wait_until_ours_are_gone};
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::system::IS_LINUX;
use crate::support::test_env::{APPLY, WAITS};
use crate::support::{Ended, Lock, Subject, TestEnv, wait_for};

/// Records each signal, and writes more and more locks to terraform's log when the test creates `lock`.
const LOCKS: &str = r#"
import os, signal, time
def seen(number, frame):
    with open("seen", "a") as file:
        file.write(signal.Signals(number).name + "\n")
signal.signal(signal.SIGINT, seen)
line = "2026-11-23T01:46:07.565Z [INFO]  backend-s3: Attempting to lock remote state (DynamoDB only)...: "
line += "tf_backend.lock.id={:08x}-1111-2222-3333-444444444444 tf_backend.lock.operation=init "
line += "tf_backend.lock.path=bkt/" + "k" * 600 + " tf_backend.req_id=r tf_backend.s3.bucket=bkt tf_backend.s3.path=k\n"
open("began", "w").close()
number = 0
while not os.path.exists("go"):
    time.sleep(0.01)
    if number < 250 and os.path.exists("lock"):
        with open(os.environ["TF_TEMP_LOG_PATH"], "a") as log:
            log.write(line.format(number))
        number += 1
"#;

/// Returns a [`TestEnv`] in which an interrupted terraform is busy stopping until the proxy delivers its write of the
/// state.
pub fn slow_to_stop() -> (TestEnv, Proxy) {
    let mut env = TestEnv::new(Lock::Both, WAITS);
    let proxy = Proxy::start(cloud().port, |request| {
        let is_state = request.start.starts_with("PUT ") && request.start.contains("prod.tfstate?");
        let is_state = is_state || (request.start.starts_with("PUT ") && request.start.contains("prod.tfstate "));
        if is_state { ProxyAction::Hold } else { ProxyAction::Pass }
    });
    env.set("AWS_ENDPOINT_URL_S3", format!("http://127.0.0.1:{}", proxy.port));
    (env, proxy)
}

#[track_caller]
fn assert_interrupted_once(env: &TestEnv, end: &Ended) {
    assert_eq!(end.out.matches("Interrupt received.").count(), 1, "{}", env.dump(end));
    assert!(!end.err.contains("Two interrupts"), "{}", env.dump(end));
    assert_eq!(end.code(), Some(1), "{}", env.dump(end));
    env.assert_unlocked();
}

#[test]
fn any_one_stop_reaches_terraform_as_one_interrupt() {
    for to_group in [false, true] {
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            let mut env = TestEnv::empty(Lock::DynamoDb);
            env.count_signals();
            let run = env.start(Subject::Tf, &["apply"]);
            env.wait_for_began(&run);
            if to_group {
                run.send_to_group(signal);
            } else {
                run.send(signal);
            }
            wait_for("an interrupt", || (!env.received_signals().is_empty()).then_some(()), || env.trace());
            env.unblock();
            let end = run.wait();
            assert_eq!(env.received_signals(), ["SIGINT"], "{signal} to group {to_group}: {}", env.dump(&end));
            assert_eq!(end.code(), Some(0));
        }
    }
}

#[test]
fn bare_terraform_counts_an_interrupt_and_a_term_as_two() {
    let (env, proxy) = slow_to_stop();
    let run = env.start_apply(Subject::Bare);
    run.send(Signal::SIGINT);
    run.wait_for_out("Interrupt received");
    run.send(Signal::SIGTERM);
    run.wait_for_err("Two interrupts received");
    proxy.let_go();
    run.wait();
}

#[test]
fn an_interrupt_and_then_a_term_are_one_stop() {
    for apart in [Duration::from_millis(20), Duration::from_millis(7500)] {
        let (env, proxy) = slow_to_stop();
        let run = env.start_apply(Subject::Tf);
        run.send(Signal::SIGINT);
        run.wait_for_out("Interrupt received");
        std::thread::sleep(apart);
        run.send(Signal::SIGTERM);
        env.wait_for_trace("got SIGTERM");
        proxy.let_go();
        assert_interrupted_once(&env, &run.wait());
    }
}

#[test]
fn a_storm_of_signals_is_one_stop() {
    let mut env = TestEnv::empty(Lock::DynamoDb);
    env.count_signals();
    let run = env.start(Subject::Tf, &["apply"]);
    env.wait_for_began(&run);
    for round in 0..60 {
        let signal = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP][round % 3];
        if round % 2 == 0 {
            run.send(signal);
        } else {
            run.send_to_group(signal);
        }
        std::thread::yield_now();
    }
    run.send(Signal::SIGUSR1);
    wait_for("USR1", || env.received_signals().contains(&"SIGUSR1".to_owned()).then_some(()), || env.trace());
    env.unblock();
    run.wait();
    assert_eq!(
        env.received_signals().iter().filter(|signal| *signal == "SIGINT").count(),
        1,
        "{:?}",
        env.received_signals()
    );
    assert!(!env.received_signals().contains(&"SIGTERM".to_owned()), "{:?}", env.received_signals());
    assert!(!env.received_signals().contains(&"SIGHUP".to_owned()), "{:?}", env.received_signals());
}

#[test]
fn the_other_signals_are_passed_on_as_they_are() {
    let mut env = TestEnv::empty(Lock::DynamoDb);
    env.count_signals();
    let run = env.start(Subject::Tf, &["apply"]);
    env.wait_for_began(&run);
    let signals =
        [Signal::SIGUSR1, Signal::SIGUSR2, Signal::SIGWINCH, Signal::SIGQUIT, Signal::SIGABRT, Signal::SIGCONT];
    for signal in signals {
        run.send(signal);
        wait_for(
            signal.as_str(),
            || env.received_signals().contains(&signal.as_str().to_owned()).then_some(()),
            || env.trace(),
        );
    }
    env.unblock();
    run.wait();
    assert_eq!(env.received_signals().len(), signals.len(), "{:?}", env.received_signals());
}

/// A program that creates `interrupted` when it gets a SIGINT, even if it was started with SIGINT ignored.
const NOTES_INTERRUPT: &str = r#"
import os, signal, time
signal.signal(signal.SIGINT, lambda number, frame: open("interrupted", "w").close())
open("began", "w").close()
while not os.path.exists("go"):
    time.sleep(0.02)
"#;

/// There are other processes than terraform in the group of `tf`.
#[test]
fn with_a_shared_terminal_a_request_interrupts_terraform_alone() {
    for shared in [false, true] {
        // Terraform kills the shell of a provisioner when it is interrupted, before or after the shell runs its trap.
        // It does not kill a process below the shell.
        let python = crate::support::cloud::tool("python3");
        let mut env =
            TestEnv::new(Lock::DynamoDb, &format!("{} notes-interrupt > /dev/null 2>&1 & wait", python.display()));
        env.write("notes-interrupt", NOTES_INTERRUPT);
        if shared {
            env.set("TFW_TTY", "shared");
        }
        let run = env.start_apply(Subject::Tf);
        run.send(Signal::SIGTERM);
        run.wait_for_out("Interrupt received");
        if !shared {
            env.wait_for_file("interrupted");
        }
        env.unblock();
        let end = run.wait();
        assert_eq!(env.exists("interrupted"), !shared, "{shared}: {}", env.dump(&end));
        env.assert_unlocked();
    }
}

/// A SIGSTOP cannot be caught, so it cannot be forwarded.
#[test]
fn a_stop_that_cannot_be_caught_stops_tf_alone() {
    let env = TestEnv::new(Lock::DynamoDb, WAITS);
    let run = env.start_apply(Subject::Tf);
    run.send(Signal::SIGSTOP);
    let tf = run.pid();
    wait_for("a stopped tf", || (state(tf) == Some('T')).then_some(()), || env.trace());
    assert_ne!(state(crate::support::process::terraform_below(tf)), Some('T'));
    env.unblock();
    wait_for("no lock", || env.locks().is_empty().then_some(()), || env.trace());
    run.send(Signal::SIGCONT);
    assert_eq!(run.wait().code(), Some(0));
    env.assert_unlocked();
}

#[test]
fn timeout_stops_terraform_once() {
    let (env, proxy) = slow_to_stop();
    let mut command = env.command("timeout");
    command.args(["1", "tf", "apply", "-auto-approve", "-no-color"]);
    let run = Run::start(command);
    run.wait_for_out("Interrupt received");
    // timeout(1) signals its child, and then its whole group. Both signals have arrived by now.
    env.wait_for_trace("got SIGTERM");
    proxy.let_go();
    let end = run.wait();
    assert_eq!(end.code(), Some(124), "{}", env.dump(&end));
    assert_eq!(end.out.matches("Interrupt received.").count(), 1);
    assert!(!end.err.contains("Two interrupts"), "{}", env.dump(&end));
    env.assert_unlocked();
}

#[test]
fn a_script_killed_by_its_group_stops_terraform_once() {
    for shell in ["sh", "bash"] {
        let (env, proxy) = slow_to_stop();
        let mut command = env.command(shell);
        command.args(["-c", "tf apply -auto-approve -no-color; echo script got $?"]);
        let run = Run::start(command);
        env.wait_for_began(&run);
        // A ^C as a script gets it: every process in its group, including tf.
        run.send_to_group(Signal::SIGINT);
        run.wait_for_out("Interrupt received");
        proxy.let_go();
        let end = run.wait();
        assert_eq!(end.out.matches("Interrupt received.").count(), 1, "{}", env.dump(&end));
        assert!(!end.err.contains("Two interrupts"), "{}", env.dump(&end));
        env.assert_unlocked();
    }
}

/// Returns a [`TestEnv`] in which a plan waits until the proxy delivers the state that it reads.
pub fn slow_to_plan() -> (TestEnv, Proxy) {
    let mut env = TestEnv::empty(Lock::Both);
    env.write_main(
        &format!(
            "data \"terraform_remote_state\" \"other\" {{\nbackend = \"s3\"\nconfig = {{\nbucket = \"{}\"\n\
             key = \"slow.tfstate\"\nregion = \"us-east-1\"\nuse_path_style = true\n}}\n}}\n",
            env.bucket
        ),
        "true",
    );
    env.init();
    let state = br#"{"version":4,"terraform_version":"1.11.4","serial":1,"lineage":"l","outputs":{},"resources":[]}"#;
    cloud().s3("PUT", &format!("{}/slow.tfstate", env.bucket), state);
    let proxy = Proxy::start(cloud().port, |request| {
        let reads = request.start.starts_with("GET ") || request.start.starts_with("HEAD ");
        if reads && request.start.contains("slow.tfstate") { ProxyAction::Hold } else { ProxyAction::Pass }
    });
    env.set("AWS_ENDPOINT_URL_S3", format!("http://127.0.0.1:{}", proxy.port));
    (env, proxy)
}

#[test]
fn bare_terraform_leaves_its_lock_at_the_second_interrupt_while_planning() {
    let (env, proxy) = slow_to_plan();
    let run = env.start(Subject::Bare, &APPLY);
    proxy.wait_until_held();
    run.send(Signal::SIGINT);
    run.wait_for_out("Interrupt received");
    run.send(Signal::SIGINT);
    let end = run.wait();
    assert!(end.err.contains("Two interrupts"), "{}", env.dump(&end));
    env.assert_locked();
}

#[test]
fn a_second_interrupt_while_planning_leaves_no_lock() {
    let (env, proxy) = slow_to_plan();
    let run = env.start(Subject::Tf, &APPLY);
    proxy.wait_until_held();
    run.send(Signal::SIGINT);
    run.wait_for_out("Interrupt received");
    run.send(Signal::SIGINT);
    proxy.let_go();
    assert_interrupted_once(&env, &run.wait());
}

#[test]
fn after_the_stop_timeout_terraform_is_killed_and_its_lock_released() {
    let mut env = TestEnv::new(Lock::Both, WAITS);
    env.set("TFW_STOP_TIMEOUT", "300ms");
    // console ignores every interrupt, and holds its lock as long as its input is open.
    let run = env.start(Subject::Tf, &["console", "-no-color"]);
    env.wait_for_locked();
    run.send(Signal::SIGTERM);
    env.wait_for_trace("Kill(StopTimeout)");
    let end = run.wait();
    assert_eq!(end.signal(), Some(9), "{}", env.dump(&end));
    assert!(end.err.contains("TFW_STOP_TIMEOUT"), "{}", end.err);
    env.assert_unlocked();
}

#[test]
fn nohup_survives_a_hangup() {
    let env = TestEnv::new(Lock::Both, WAITS);
    let mut command = env.command("nohup");
    command.args(["tf", "apply", "-auto-approve", "-no-color"]);
    let run = Run::start(command);
    env.wait_for_began(&run);
    run.send_to_group(Signal::SIGHUP);
    env.wait_for_trace("got SIGHUP");
    env.unblock();
    let end = run.wait();
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert!(!end.out.contains("Interrupt received"), "{}", end.out);
    env.assert_unlocked();
}

/// Prints a line again and again until it is stopped, or until `go` exists.
const TALKS: &str = "touch began; while test -e began && ! test -e go; do echo talking; sleep 0.02; done";

fn apply_whose_reader_leaves(subject: Subject) -> (TestEnv, Ended) {
    let env = TestEnv::new(Lock::Both, TALKS);
    let mut command = env.command(subject.name());
    command.args(APPLY).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut reader = child.stdout.take().unwrap();
    let mut text = String::new();
    let mut bytes = [0; 256];
    while !text.contains("talking") {
        let length = reader.read(&mut bytes).unwrap();
        text += &String::from_utf8_lossy(&bytes[..length]);
    }
    drop(reader);
    let output = child.wait_with_output().unwrap();
    env.unblock();
    (env, Ended { status: output.status, out: text, err: String::from_utf8_lossy(&output.stderr).into_owned() })
}

#[test]
fn bare_terraform_dies_with_its_lock_when_its_reader_leaves() {
    let (env, end) = apply_whose_reader_leaves(Subject::Bare);
    assert_eq!(end.signal(), Some(13), "{}", env.dump(&end));
    env.assert_locked();
}

#[test]
fn when_the_reader_leaves_terraform_stops_gracefully_with_its_state_saved() {
    let (env, end) = apply_whose_reader_leaves(Subject::Tf);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    env.assert_unlocked();
    let state = env.state();
    assert!(state.as_ref().is_some_and(|state| state.contains("terraform_data")), "{state:?} {}", env.dump(&end));
    assert!(!end.err.contains("released the lock"), "terraform unlocked by itself: {}", end.err);
}

#[test]
fn head_stops_an_apply_and_the_pipeline_ends() {
    let env = TestEnv::new(Lock::Both, TALKS);
    let mut command = env.command("bash");
    command.args(["-c", "tf apply -auto-approve -no-color | head -5; echo ${PIPESTATUS[@]}"]);
    let end = Run::start(command).wait();
    assert!(end.out.trim_end().ends_with("1 0"), "{}", env.dump(&end));
    env.assert_unlocked();
}

#[test]
fn a_reader_that_does_not_read_keeps_no_signal_waiting() {
    if !IS_LINUX {
        // This test is listed in tests/left-out.
        return;
    }
    let mut env = TestEnv::empty(Lock::DynamoDb);
    env.stand_in(
        "fills",
        "#!/bin/sh\ntrap 'echo INT >> seen; exit 3' INT\ntouch began\nwhile :; do echo yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy; done\n",
    );
    let mut command = env.command("tf");
    command.arg("apply").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let terraform = terraform_named("fills", &child);
    // The pipe is full when the writer sleeps in its write.
    wait_for("a full pipe", || (blocked_in_write(terraform)).then_some(()), || format!("{:?}", state(terraform)));
    kill(nix::unistd::Pid::from_raw(child.id().cast_signed()), Signal::SIGINT).unwrap();
    env.wait_for_trace("InterruptGroup");
    drop(child.stdout.take());
    let status = wait_for("the end of tf", || child.try_wait().unwrap(), || env.trace());
    assert_eq!(status.code(), Some(3));
    assert_eq!(env.received_signals(), ["INT"]);
}

fn terraform_named(name: &str, child: &std::process::Child) -> nix::unistd::Pid {
    let root = nix::unistd::Pid::from_raw(child.id().cast_signed());
    wait_for(
        name,
        || crate::support::process::tree(root).into_iter().find(|process| process.1 == name).map(|process| process.0),
        || format!("{:?}", crate::support::process::tree(root)),
    )
}

fn blocked_in_write(pid: nix::unistd::Pid) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/wchan")).is_ok_and(|place| place.contains("pipe_write"))
        || waits_in(pid, SystemCall::Write)
}

#[test]
fn two_streams_into_one_pipe_keep_their_order() {
    let mut env = TestEnv::empty(Lock::DynamoDb);
    env.stand_in("talks", "#!/bin/sh\ni=0\nwhile test $i -lt 2000; do echo o$i; echo e$i >&2; i=$((i+1)); done\n");
    let mut command = env.command("sh");
    command.args(["-c", "tf apply 2>&1"]);
    let end = Run::start(command).wait();
    let expected: String = (0..2000).flat_map(|number| [format!("o{number}\n"), format!("e{number}\n")]).collect();
    assert!(end.out == expected, "{} bytes of {}", end.out.len(), expected.len());
}

#[test]
fn a_socket_is_drained_as_a_pipe_is() {
    let mut env = TestEnv::empty(Lock::DynamoDb);
    env.stand_in("talks", "#!/bin/sh\nseq 1 200000\n");
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut command = env.command("tf");
    command.arg("apply").stdin(Stdio::null()).stdout(std::os::fd::OwnedFd::from(theirs));
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut text = String::new();
    (&ours).read_to_string(&mut text).unwrap();
    let expected: String = (1..=200_000).flat_map(|number| [number.to_string(), "\n".to_owned()]).collect();
    assert!(text == expected, "{} bytes of {}", text.len(), expected.len());
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn in_ci_the_death_of_our_parent_stops_terraform_once() {
    let mut env = TestEnv::new(Lock::Both, WAITS);
    env.set("CI", "true");
    let mut command = env.command("bash");
    // As the entry process of a job runner: bash waits, gets TERM, dies of it, and signals no other process.
    command.args(["-c", "tf apply -auto-approve -no-color > out 2> err; true"]);
    let run = Run::start(command);
    env.wait_for_began(&run);
    let tf = wait_for(
        "tf",
        || {
            crate::support::process::tree(run.pid())
                .into_iter()
                .find(|process| process.1 == "tf")
                .map(|process| process.0)
        },
        || env.trace(),
    );
    run.send(Signal::SIGTERM);
    wait_for("the end of tf", || state(tf).is_none_or(|state| state == 'Z').then_some(()), || env.trace());
    run.wait();
    assert_eq!(env.read("out").matches("Interrupt received.").count(), 1, "{}", env.read("out"));
    env.assert_unlocked();
}

#[test]
fn what_was_meant_to_outlive_its_parent_does_so_in_ci_too() {
    for line in [
        "nohup tf apply -auto-approve > out 2>&1 &",
        "tf apply -auto-approve > out 2>&1 &",
        "setsid tf apply -auto-approve > out 2>&1 &",
    ] {
        let mut env = TestEnv::new(Lock::Both, WAITS);
        env.set("CI", "true");
        let mut command = env.command("sh");
        command.args(["-c", line]);
        let run = Run::start_as_is(command);
        // The shell has exited when this returns.
        run.wait();
        env.wait_for_file("began");
        env.unblock();
        wait_for(
            "the apply to end well",
            || env.read("out").contains("Apply complete!").then_some(()),
            || format!("{line}: {}{}", env.read("out"), env.trace()),
        );
        wait_for("tf to end", || env.trace().contains("terraform ended").then_some(()), || env.trace());
        assert!(!env.read("out").contains("Interrupt received"));
    }
}

/// A guardian hangs in the kernel while it waits for a disk. It then reads nothing of what `tf` sends.
#[test]
fn a_guardian_that_hung_when_terraform_was_interrupted_does_not_interrupt_it_again() {
    let mut env = TestEnv::empty(Lock::DynamoDb);
    let python = crate::support::cloud::tool("python3");
    env.stand_in("locks", &format!("#!{}{LOCKS}", python.display()));
    let _kill_on_drop = KillOnDrop(home(&env));
    let run = env.start(Subject::Tf, &["apply"]);
    env.wait_for_began(&run);
    let guardian = guardian_of(&env, run.pid());
    kill(guardian, Signal::SIGSTOP).unwrap();
    wait_for("a stopped guardian", || (state(guardian) == Some('T')).then_some(()), || env.trace());
    env.write("lock", "");
    env.wait_for_trace("the guardian has not read what was sent to it");
    run.send(Signal::SIGTERM);
    wait_for("an interrupt", || (!env.received_signals().is_empty()).then_some(()), || env.trace());
    run.send(Signal::SIGKILL);
    assert_eq!(run.wait().signal(), Some(9));
    kill(guardian, Signal::SIGCONT).unwrap();
    env.wait_for_trace("guardian: after the death of tf: ");
    assert!(env.trace().contains("guardian: after the death of tf: []"), "{}", env.trace());
    env.unblock();
    wait_until_ours_are_gone(&env);
    assert_eq!(env.received_signals(), ["SIGINT"], "{}", env.trace());
}
