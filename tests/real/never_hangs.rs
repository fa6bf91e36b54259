//! No setting, and no file that an environment variable names, can make `tf` hang or panic.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::interrupted_once::slow_to_stop;
use crate::support::processes::{KillOnDrop, home, wait_until_ours_are_gone, wait_until_unlocked};
use crate::support::test_env::{APPLY, UNSET, WAITS};
use crate::support::{Lock, Subject, TestEnv};

/// A number of seconds can be any number of 64 bits.
const FOR_EVER: [&str; 3] = ["9223372036854775807", "18446744073709551615", "18446744073709551615ms"];

#[test]
fn a_stop_timeout_of_any_length_neither_ends_tf_nor_kills_terraform() {
    for timeout in FOR_EVER {
        let mut env = TestEnv::new(Lock::DynamoDb, WAITS);
        env.set("TFW_STOP_TIMEOUT", timeout);
        let run = env.start_apply(Subject::Tf);
        run.send(Signal::SIGTERM);
        env.wait_for_trace("Request: [Interrupt");
        // Terraform kills its provisioner, because the test does not create `go`.
        let end = run.wait();
        assert_eq!(end.code(), Some(1), "{timeout}: {}", env.dump(&end));
        assert!(!end.err.contains("tf:") && !end.err.contains("panicked"), "{timeout}: {}", end.err);
        env.assert_unlocked();
    }
}

#[test]
fn a_guardian_with_a_stop_timeout_of_any_length_releases_the_lock() {
    for timeout in FOR_EVER {
        let (mut env, proxy) = slow_to_stop();
        env.set("TFW_STOP_TIMEOUT", timeout);
        let _kill_on_drop = KillOnDrop(home(&env));
        let run = env.start_apply(Subject::Tf);
        // The guardian measures the stop timeout from the request too.
        run.send(Signal::SIGTERM);
        // Terraform stops its provisioner itself. It is still running because its write of the state is held by the
        // proxy.
        proxy.wait_until_held();
        run.send(Signal::SIGKILL);
        assert_eq!(run.wait().signal(), Some(9));
        env.wait_for_trace("guardian: tf is gone");
        proxy.let_go();
        wait_until_unlocked(&env);
        wait_until_ours_are_gone(&env);
    }
}

#[test]
fn a_trace_into_a_fifo_that_nobody_reads_keeps_nothing_from_running() {
    let mut env = TestEnv::new(Lock::File, "true");
    let fifo = env.directory.join("fifo");
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    env.set("TFW_LOG", &fifo);
    let end = env.run(Subject::Tf, &APPLY);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    let mut command = env.command(env.bin().join("tf"));
    command.arg("locks");
    assert_eq!(crate::support::Run::start(command).wait().code(), Some(0));
}

#[test]
fn a_trace_into_a_fifo_whose_reader_is_slow_keeps_nothing_from_running() {
    let mut env = TestEnv::new(Lock::File, "kill -9 $PPID");
    let fifo = env.directory.join("fifo");
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    let open =
        |write: bool| File::options().read(!write).write(write).custom_flags(libc::O_NONBLOCK).open(&fifo).unwrap();
    let (_reader, mut writer) = (open(false), open(true));
    while writer.write(&[b'x'; 512]).is_ok() {}
    env.set("TFW_LOG", &fifo);
    let end = env.run(Subject::Tf, &APPLY);
    assert!(end.err.contains("tf: released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
}

#[test]
fn what_a_shell_substitutes_for_a_file_is_terraforms_to_read() {
    let mut env = TestEnv::empty(Lock::File);
    env.write_main("", "true");
    env.set("TFW_LOG", UNSET);
    let script =
        "tf init -no-color -input=false -backend-config=<(echo 'encrypt = true') && tf apply -auto-approve -no-color";
    let mut command = env.command(Path::new("/bin/bash"));
    command.args(["-c", script]);
    let end = crate::support::Run::start(command).wait();
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert!(
        fs::read_to_string(env.directory.join(".terraform/terraform.tfstate")).unwrap().contains("\"encrypt\": true")
    );
}
