//! "Each terraform behind a wrapper gets one interrupt", whatever the wrapper does with groups, and whatever else it starts.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use nix::sys::signal::{Signal, kill};

use super::given_back::through;
use super::interrupted_once::slow_to_plan;
use super::survived::assert_nothing_left;
use crate::support::cloud::tool;
use crate::support::household::{Sweep, home, wait_until_all_is_gone, wait_until_unlocked};
use crate::support::process::terraform_below;
use crate::support::proxy::Deed;
use crate::support::world::WAITS;
use crate::support::{Lock, Subject, World, wait_for};

const APPLY: [&str; 3] = ["apply", "-auto-approve", "-no-color"];

#[test]
fn a_terraform_in_a_group_of_its_own_is_interrupted_once_by_tf_and_by_the_guardian() {
    for wrapper in ["timeout 600 terraform \"$@\"; exit $?", "set -m; terraform \"$@\"; exit $?"] {
        for guarded in [false, true] {
            let (mut world, proxy) = slow_to_plan();
            let _sweep = Sweep(home(&world));
            world.stand_in("wrapper", &format!("#!/bin/bash\n{wrapper}\n"));
            let run = world.start(Subject::Tf, &APPLY);
            proxy.wait_until_held();
            run.send(if guarded { Signal::SIGKILL } else { Signal::SIGTERM });
            if guarded {
                world.wait_for_trace("guardian: interrupted terraform: true");
                proxy.let_go();
                wait_until_unlocked(&world);
                assert!(world.state().is_none(), "it was applied all the same\n{}", world.trace());
            } else {
                run.wait_for_out("Interrupt received");
                proxy.let_go();
                let end = run.wait();
                assert_eq!(end.out.matches("Interrupt received.").count(), 1, "{wrapper}: {}", world.story(&end));
                assert!(!end.err.contains("Two interrupts"), "{wrapper}: {}", world.story(&end));
                world.assert_unlocked();
            }
            wait_until_all_is_gone(&world);
        }
    }
}

#[test]
fn a_terraform_that_a_wrapper_starts_after_the_stop_is_interrupted_as_well() {
    let (mut world, proxy) = slow_to_plan();
    let _sweep = Sweep(home(&world));
    world.stand_in("wrapper", "#!/bin/bash\nterraform \"$@\"\nterraform \"$@\"\nexit $?\n");
    let run = world.start(Subject::Tf, &APPLY);
    proxy.wait_until_held();
    run.send(Signal::SIGTERM);
    run.wait_for_out("Interrupt received");
    proxy.let_go();
    let end = run.wait();
    // The second one gets it at once, and may die of it before it can say so.
    assert!(world.trace().matches("SIGINT goes to").count() == 2, "{}", world.story(&end));
    assert!(!end.err.contains("Two interrupts") && !end.out.contains("Apply complete"), "{}", world.story(&end));
    world.assert_unlocked();
}

/// As node, vault or kubectl are.
#[test]
fn a_large_program_of_a_wrapper_is_not_taken_for_terraform() {
    let mut world = World::new(Lock::Both, "true");
    let _sweep = Sweep(home(&world));
    let python = fs::canonicalize(tool("python3")).unwrap();
    let large = world.directory.join("large");
    fs::copy(&python, &large).unwrap();
    fs::File::options().write(true).open(&large).unwrap().set_len(64 << 20).unwrap();
    fs::set_permissions(&large, fs::Permissions::from_mode(0o755)).unwrap();
    let prefix = python.parent().and_then(std::path::Path::parent).unwrap().display().to_string();
    world.write("asks.py", "import time\nopen('asked', 'w').close()\ntime.sleep(60)\n");
    world.stand_in("wrapper", &format!("#!/bin/bash\nPYTHONHOME={prefix} ./large -S asks.py\nexec terraform \"$@\"\n"));
    let run = world.start(Subject::Tf, &APPLY);
    world.wait_for_file("asked");
    run.send(Signal::SIGTERM);
    let end = run.wait();
    // The wrapper was interrupted with it, as by ^C, and starts nothing.
    assert!(!end.out.contains("Apply complete"), "{}", world.story(&end));
    assert!(world.state().is_none(), "{}", world.story(&end));
    world.assert_unlocked();
}

#[test]
fn a_nested_tf_saves_its_state_and_releases_its_lock_when_the_outer_terraform_is_killed() {
    let mut world = World::empty(Lock::Both);
    let _sweep = Sweep(home(&world));
    fs::create_dir(world.directory.join("inner")).unwrap();
    let backend = world.backend("inner.tfstate");
    world.write(
        "inner/main.tf",
        &format!("terraform {{\nbackend \"s3\" {{\n{backend}}}\n}}\nresource \"terraform_data\" \"i\" {{}}\n"),
    );
    assert_eq!(world.run(Subject::Bare, &["-chdir=inner", "init"]).code(), Some(0));
    world.write_main("", "tf -chdir=inner apply -auto-approve");
    world.init();
    let proxy = through(&mut world, |request| {
        let state = request.start.starts_with("PUT ") && request.start.contains("inner.tfstate");
        if state && !request.start.contains(".tflock") { Deed::Hold } else { Deed::Pass }
    });
    let run = world.start(Subject::Tf, &APPLY);
    proxy.wait_until_held();
    kill(terraform_below(run.pid()), Signal::SIGKILL).unwrap();
    world.wait_for_trace("Request: [InterruptGroup]");
    // Longer than the time after which what is no tf is killed.
    std::thread::sleep(std::time::Duration::from_secs(7));
    proxy.let_go();
    let end = run.wait();
    assert!(crate::support::cloud::cloud().object(&format!("{}/inner.tfstate", world.bucket)).is_some());
    assert!(end.err.contains("released the lock"), "{}", world.story(&end));
    // The inner terraform ended by itself, after one interrupt, and unlocked.
    assert_eq!(world.trace().matches("a lock may stand").count(), 1, "{}", world.story(&end));
    world.assert_unlocked();
    wait_for("the inner lock to go", || world.locks_at("inner.tfstate").is_empty().then_some(()), || world.trace());
    wait_until_all_is_gone(&world);
    assert_nothing_left(&world);
}

#[test]
fn without_certificate_authorities_a_lock_that_needs_none_is_released() {
    let mut world = World::new(Lock::Both, WAITS);
    world.set("SSL_CERT_FILE", "/nonexistent").set("SSL_CERT_DIR", "/nonexistent");
    let run = world.start_apply(Subject::Tf);
    run.kill_terraform();
    let end = run.wait();
    assert_eq!(end.signal(), Some(9), "{}", world.story(&end));
    assert!(end.err.contains("released the lock") && !end.err.contains("panicked"), "{}", world.story(&end));
    world.assert_unlocked();
}
