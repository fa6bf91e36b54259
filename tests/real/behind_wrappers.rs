//! "Each terraform behind a wrapper gets one interrupt", whatever the wrapper does with process groups, and whatever
//! else it starts.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use nix::sys::signal::{Signal, kill};

use super::given_back::through;
use super::interrupted_once::slow_to_plan;
use super::survived::assert_nothing_left;
use crate::support::cloud::tool;
use crate::support::process::{copy_program, terraform_below};
use crate::support::processes::{KillOnDrop, home, wait_until_all_is_gone, wait_until_unlocked};
use crate::support::proxy::ProxyAction;
use crate::support::test_env::{APPLY, WAITS};
use crate::support::{Lock, Subject, TestEnv, wait_for};

#[test]
fn a_terraform_in_a_group_of_its_own_is_interrupted_once_by_tf_and_by_the_guardian() {
    for wrapper in ["timeout 600 terraform \"$@\"; exit $?", "set -m; terraform \"$@\"; exit $?"] {
        for guarded in [false, true] {
            let (mut env, proxy) = slow_to_plan();
            let _kill_on_drop = KillOnDrop(home(&env));
            env.stand_in("wrapper", &format!("#!/bin/bash\n{wrapper}\n"));
            let run = env.start(Subject::Tf, &APPLY);
            proxy.wait_until_held();
            run.send(if guarded { Signal::SIGKILL } else { Signal::SIGTERM });
            if guarded {
                env.wait_for_trace("guardian: interrupted terraform: true");
                proxy.let_go();
                wait_until_unlocked(&env);
                assert!(env.state().is_none(), "it was applied all the same\n{}", env.trace());
            } else {
                run.wait_for_out("Interrupt received");
                proxy.let_go();
                let end = run.wait();
                assert_eq!(end.out.matches("Interrupt received.").count(), 1, "{wrapper}: {}", env.dump(&end));
                assert!(!end.err.contains("Two interrupts"), "{wrapper}: {}", env.dump(&end));
                env.assert_unlocked();
            }
            wait_until_all_is_gone(&env);
        }
    }
}

#[test]
fn a_terraform_that_a_wrapper_starts_after_the_stop_is_interrupted_as_well() {
    let (mut env, proxy) = slow_to_plan();
    let _kill_on_drop = KillOnDrop(home(&env));
    env.stand_in("wrapper", "#!/bin/bash\nterraform \"$@\"\nterraform \"$@\"\nexit $?\n");
    let run = env.start(Subject::Tf, &APPLY);
    proxy.wait_until_held();
    run.send(Signal::SIGTERM);
    run.wait_for_out("Interrupt received");
    proxy.let_go();
    let end = run.wait();
    // The second one gets it immediately, and may die of it before it can print anything.
    assert!(env.trace().matches("SIGINT goes to").count() == 2, "{}", env.dump(&end));
    assert!(!end.err.contains("Two interrupts") && !end.out.contains("Apply complete"), "{}", env.dump(&end));
    env.assert_unlocked();
}

/// Such programs are node, vault and kubectl.
#[test]
fn a_large_program_of_a_wrapper_is_not_taken_for_terraform() {
    let mut env = TestEnv::new(Lock::Both, "true");
    let _kill_on_drop = KillOnDrop(home(&env));
    let python = fs::canonicalize(tool("python3")).unwrap();
    let large = env.directory.join("large");
    copy_program(&python, &large);
    fs::File::options().write(true).open(&large).unwrap().set_len(64 << 20).unwrap();
    fs::set_permissions(&large, fs::Permissions::from_mode(0o755)).unwrap();
    let prefix = python.parent().and_then(std::path::Path::parent).unwrap().display().to_string();
    env.write("asks.py", "import time\nopen('asked', 'w').close()\ntime.sleep(60)\n");
    env.stand_in("wrapper", &format!("#!/bin/bash\nPYTHONHOME={prefix} ./large -S asks.py\nexec terraform \"$@\"\n"));
    let run = env.start(Subject::Tf, &APPLY);
    env.wait_for_file("asked");
    run.send(Signal::SIGTERM);
    let end = run.wait();
    // The wrapper was interrupted as well, as by ^C, and starts nothing more.
    assert!(!end.out.contains("Apply complete"), "{}", env.dump(&end));
    assert!(env.state().is_none(), "{}", env.dump(&end));
    env.assert_unlocked();
}

#[test]
fn a_nested_tf_saves_its_state_and_releases_its_lock_when_the_outer_terraform_is_killed() {
    let mut env = TestEnv::empty(Lock::Both);
    let _kill_on_drop = KillOnDrop(home(&env));
    fs::create_dir(env.directory.join("inner")).unwrap();
    let backend = env.backend("inner.tfstate");
    env.write(
        "inner/main.tf",
        &format!("terraform {{\nbackend \"s3\" {{\n{backend}}}\n}}\nresource \"terraform_data\" \"i\" {{}}\n"),
    );
    assert_eq!(env.run(Subject::Bare, &["-chdir=inner", "init"]).code(), Some(0));
    env.write_main("", "tf -chdir=inner apply -auto-approve");
    env.init();
    let proxy = through(&mut env, |request| {
        let state = request.start.starts_with("PUT ") && request.start.contains("inner.tfstate");
        if state && !request.start.contains(".tflock") { ProxyAction::Hold } else { ProxyAction::Pass }
    });
    let run = env.start(Subject::Tf, &APPLY);
    proxy.wait_until_held();
    kill(terraform_below(run.pid()), Signal::SIGKILL).unwrap();
    // It hears of the death by its SIGTERM, or by its output, which nobody reads any more.
    env.wait_for_trace(": [InterruptGroup]");
    // Longer than the time after which a process that is not a tf is killed.
    std::thread::sleep(std::time::Duration::from_secs(7));
    proxy.let_go();
    let end = run.wait();
    assert!(crate::support::cloud::cloud().object(&format!("{}/inner.tfstate", env.bucket)).is_some());
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    // The inner terraform exited by itself after one interrupt, and has unlocked.
    assert_eq!(env.trace().matches("a lock may be held").count(), 1, "{}", env.dump(&end));
    env.assert_unlocked();
    wait_for("the inner lock to go", || env.locks_at("inner.tfstate").is_empty().then_some(()), || env.trace());
    wait_until_all_is_gone(&env);
    assert_nothing_left(&env);
}

#[test]
fn without_certificate_authorities_https_says_what_is_missing() {
    let mut env = TestEnv::new(Lock::Both, "true");
    env.set("SSL_CERT_FILE", "/nonexistent").set("SSL_CERT_DIR", "/nonexistent");
    env.set("AWS_ENDPOINT_URL", "https://127.0.0.1:1");
    let end = env.run(Subject::Tf, &["locks", "list"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(end.err.contains("no certificate authorities: install ca-certificates"), "{}", env.dump(&end));
}

#[test]
fn without_certificate_authorities_a_lock_that_needs_none_is_released() {
    let mut env = TestEnv::new(Lock::Both, WAITS);
    env.set("SSL_CERT_FILE", "/nonexistent").set("SSL_CERT_DIR", "/nonexistent");
    let run = env.start_apply(Subject::Tf);
    run.kill_terraform();
    let end = run.wait();
    assert_eq!(end.signal(), Some(9), "{}", env.dump(&end));
    assert!(end.err.contains("released the lock") && !end.err.contains("panicked"), "{}", env.dump(&end));
    env.assert_unlocked();
}
