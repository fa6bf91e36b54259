//! Programs between `tf` and terraform, or between the caller and `tf`.

use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::interrupted_once::slow_to_stop;
use crate::support::cloud::tool;
use crate::support::process::{copy_program, tree};
use crate::support::test_env::{APPLY, WAITS, terraform};
use crate::support::{Lock, Run, Subject, TestEnv, wait_for};

/// Replaces terraform by a program that starts it and waits for it. It ignores an interrupt as tenv does (pkg/cmdproxy,
/// transmit_others.go), on the assumption that the terminal has sent one to terraform as well.
fn stays_above(env: &mut TestEnv) {
    let script = format!(
        "#!{}\nimport os, signal, subprocess, sys\nsignal.signal(signal.SIGINT, lambda *_: None)\n\
         sys.exit(subprocess.call([\"{}\"] + sys.argv[1:]))\n",
        tool("python3").display(),
        terraform().display()
    );
    env.stand_in("tenv", &script);
}

#[track_caller]
fn real_terraform_below(run: &Run) -> Pid {
    wait_for(
        "terraform below its shim",
        || tree(run.pid()).into_iter().find(|(_, name, ..)| name == "terraform").map(|(pid, ..)| pid),
        || format!("{:?}", tree(run.pid())),
    )
}

#[track_caller]
fn shim_of(run: &Run) -> Pid {
    wait_for(
        "the shim",
        || tree(run.pid()).into_iter().find(|(_, name, ..)| name == "tenv").map(|(pid, ..)| pid),
        || format!("{:?}", tree(run.pid())),
    )
}

#[test]
fn a_shim_that_throws_interrupts_away_keeps_none_from_terraform() {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let mut env = TestEnv::new(Lock::Both, WAITS);
        stays_above(&mut env);
        let run = env.start_apply(Subject::Tf);
        real_terraform_below(&run);
        run.send(signal);
        run.wait_for_out("Interrupt received");
        // The next signal of a runner is not forwarded. Terraform stops its provisioner itself.
        run.send(Signal::SIGTERM);
        let end = run.wait();
        assert_eq!(end.code(), Some(1), "{signal}: {}", env.dump(&end));
        assert!(!end.err.contains("Two interrupts"), "{signal}: {}", env.dump(&end));
        assert!(!end.err.contains("released the lock"), "terraform unlocks by itself: {}", env.dump(&end));
        env.assert_unlocked();
    }
}

#[test]
fn bare_a_shim_that_is_told_to_stop_leaves_terraform_alone_with_its_lock() {
    let mut env = TestEnv::new(Lock::Both, WAITS);
    stays_above(&mut env);
    let mut command = env.command(env.directory.join("tenv"));
    command.args(APPLY);
    let run = Run::start(command);
    env.wait_for_began(&run);
    let terraform = real_terraform_below(&run);
    run.send(Signal::SIGTERM);
    wait_for("the end of the shim", || crate::support::processes::is_gone(run.pid()).then_some(()), String::new);
    assert!(!crate::support::processes::is_gone(terraform));
    env.assert_locked();
    kill(terraform, Signal::SIGKILL).unwrap();
    env.unblock();
    run.wait();
}

#[test]
fn a_shim_that_dies_takes_no_working_terraform_with_it() {
    let (mut env, proxy) = slow_to_stop();
    stays_above(&mut env);
    let run = env.start_apply(Subject::Tf);
    let terraform = real_terraform_below(&run);
    kill(shim_of(&run), Signal::SIGKILL).unwrap();
    run.wait_for_out("Interrupt received");
    // An interrupted terraform stops its provisioner itself. It is still running because its write of the state is held
    // by the proxy.
    proxy.wait_until_held();
    assert!(!crate::support::processes::is_gone(terraform), "{}", env.trace());
    env.assert_locked();
    proxy.let_go();
    let end = run.wait();
    assert_eq!(end.signal(), Some(9), "it ends as what it started: {}", env.dump(&end));
    assert!(
        env.state().is_some_and(|state| state.contains("terraform_data")),
        "the state is saved: {}",
        env.dump(&end)
    );
    env.assert_unlocked();
}

/// The exit code of the shim does not matter: it may be minus nine, or zero.
#[test]
fn a_terraform_that_dies_behind_its_shim_is_a_dead_one() {
    for (code, hides) in [(247, false), (0, true)] {
        let mut env = TestEnv::new(Lock::Both, WAITS);
        if hides {
            env.stand_in("tenv", &format!("#!/bin/sh\n{} \"$@\" | cat\n", terraform().display()));
        } else {
            stays_above(&mut env);
        }
        let run = env.start_apply(Subject::Tf);
        kill(real_terraform_below(&run), Signal::SIGKILL).unwrap();
        let end = run.wait();
        assert_eq!(end.code(), Some(code), "{}", env.dump(&end));
        assert!(end.err.contains("released the lock"), "{code}: {}", env.dump(&end));
        let trace = env.trace();
        assert!(trace.contains("the tree is dead"), "its provisioner was still at work: {trace}");
        env.assert_unlocked();
    }
}

#[test]
fn a_shim_that_gives_up_takes_no_lock_from_the_terraform_that_works_on() {
    let mut env = TestEnv::new(Lock::Both, WAITS);
    let real = env.directory.parent().unwrap().join("terraform-bin");
    copy_program(terraform(), &real);
    let script = format!(
        "#!{}\nimport os, signal, subprocess, sys\nsignal.signal(signal.SIGUSR1, lambda *_: os._exit(3))\n\
         sys.exit(subprocess.call([\"{}\"] + sys.argv[1:]))\n",
        tool("python3").display(),
        real.display()
    );
    env.stand_in("tenv", &script);
    let run = env.start_apply(Subject::Tf);
    let shim = shim_of(&run);
    kill(shim, Signal::SIGUSR1).unwrap();
    let is_over = || crate::support::processes::is_gone(shim).then_some(());
    wait_for("the end of the shim", is_over, || env.trace());
    env.wait_for_trace("what led to terraform ended");
    env.assert_locked();
    env.unblock();
    let end = run.wait();
    assert_eq!(end.code(), Some(3), "{}", env.dump(&end));
    assert!(!end.err.contains("released the lock"), "{}", env.dump(&end));
    assert!(env.state().is_some_and(|state| state.contains("terraform_data")), "{}", env.dump(&end));
    env.assert_unlocked();
}

#[test]
fn a_tf_that_is_killed_above_a_shim_has_terraform_stop_once() {
    let mut env = TestEnv::new(Lock::Both, WAITS);
    stays_above(&mut env);
    let run = env.start_apply(Subject::Tf);
    let terraform = real_terraform_below(&run);
    kill(run.pid(), Signal::SIGKILL).unwrap();
    run.wait();
    env.wait_for_trace("guardian: interrupted terraform");
    env.unblock();
    crate::support::processes::wait_until_gone(&env, terraform);
    crate::support::processes::wait_until_unlocked(&env);
    assert!(!env.trace().contains("ending "), "nobody was ended: {}", env.trace());
}

/// As with tfenv: a script that becomes the terraform that this directory wants.
#[test]
fn behind_a_script_the_first_run_tells_which_terraform_it_is() {
    let levels = "echo $TF_LOG_CORE >> levels; touch began; while test -e began && ! test -e go; do sleep 0.02; done";
    let mut env = TestEnv::new(Lock::Both, levels);
    let script = format!("#!/bin/sh\necho asked >> asked\nexec {} \"$@\"\n", terraform().display());
    env.stand_in("tfenv", &script);
    for round in 0..2 {
        let run = env.start_apply(Subject::Tf);
        kill(run_pid_of_terraform(&run), Signal::SIGKILL).unwrap();
        let end = run.wait();
        assert!(end.err.contains("released the lock"), "{round}: {}", env.dump(&end));
        env.assert_unlocked();
        fs::remove_file(env.directory.join("began")).unwrap();
        env.forget_state();
    }
    assert_eq!(env.read("levels").lines().collect::<Vec<_>>(), ["TRACE", "INFO"]);
    // It is started only as often as the user has started it.
    assert_eq!(env.read("asked").lines().count(), 2);
}

#[track_caller]
fn run_pid_of_terraform(run: &Run) -> Pid {
    let below = || tree(run.pid()).into_iter().find(|(_, name, ..)| name == "terraform" || name == "tfenv");
    wait_for("terraform", || below().map(|(pid, ..)| pid), || format!("{:?}", tree(run.pid())))
}

/// Terraform up to 1.0 runs itself in a second process. The first one ignores interrupts.
#[test]
fn a_terraform_of_two_processes_is_made_one() {
    let mut env = TestEnv::empty(Lock::DynamoDb);
    let script = "#!/bin/sh\necho \"$TF_FORK,$TF_LOG_CORE\" >> seen\n\
                  echo '2026-11-23T01:46:07.500Z [INFO]  Terraform version: 1.0.11' >> \"$TF_TEMP_LOG_PATH\"\n";
    env.stand_in("old", script);
    for _ in 0..2 {
        let end = env.run(Subject::Tf, &["plan"]);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    }
    assert_eq!(env.read("seen").lines().collect::<Vec<_>>(), ["0,TRACE", "0,DEBUG"]);
}

/// If both are installed, a link called tofu runs OpenTofu, and one called terraform runs Terraform.
#[test]
fn called_as_tofu_it_runs_tofu_and_called_as_terraform_terraform() {
    let mut env = TestEnv::empty(Lock::DynamoDb);
    let real = env.directory.parent().unwrap().join("real");
    let ours = env.directory.parent().unwrap().join("ours");
    for directory in [&real, &ours] {
        fs::create_dir(directory).unwrap();
    }
    for name in ["tofu", "terraform"] {
        let program = real.join(name);
        fs::write(&program, format!("#!/bin/sh\necho this is {name}\n")).unwrap();
        fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_tf"), ours.join(name)).unwrap();
    }
    env.set("PATH", format!("{}:{}:/usr/bin:/bin", ours.display(), real.display()));
    for name in ["tofu", "terraform"] {
        for command in ["plan", "version"] {
            let mut started = env.command(ours.join(name));
            started.arg(command);
            let end = Run::start(started).wait();
            assert_eq!(end.out, format!("this is {name}\n"), "{}", env.dump(&end));
        }
    }
}

/// The commands to type name the program that the user has. `tf` itself asks for terraform.
#[test]
fn called_as_tofu_every_next_step_names_tofu() {
    let mut env = TestEnv::empty(Lock::DynamoDb);
    let real = env.directory.parent().unwrap().join("real");
    let ours = env.directory.parent().unwrap().join("ours");
    for directory in [&real, &ours] {
        fs::create_dir(directory).unwrap();
    }
    for name in ["tofu", "terraform"] {
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_tf"), ours.join(name)).unwrap();
    }
    env.set("PATH", format!("{}:{}:/usr/bin:/bin", ours.display(), real.display()));
    let locks = |env: &TestEnv, name: &str, words: &[&str]| {
        let mut command = env.command(ours.join(name));
        command.arg("locks").args(words);
        Run::start(command).wait()
    };
    for name in ["tofu", "terraform"] {
        let end = locks(&env, name, &["doctor"]);
        assert!(end.out.contains(&format!("put {name} on PATH")), "{}", env.dump(&end));
        let end = locks(&env, name, &["version"]);
        assert!(end.out.contains(&format!("put {name} on PATH")), "{}", env.dump(&end));
    }
    for name in ["tofu", "terraform"] {
        let program = real.join(name);
        fs::write(&program, "#!/bin/sh\n").unwrap();
        fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    }
    for name in ["tofu", "terraform"] {
        let end = locks(&env, name, &["list"]);
        assert!(end.err.contains(&format!("type `{name} init` first")), "{}", env.dump(&end));
    }
    fs::create_dir(env.directory.join(".terraform")).unwrap();
    let backend = |kind: &str, config: &str| {
        let file = format!(r#"{{"version":3,"backend":{{"type":"{kind}","config":{config}}}}}"#);
        env.write(".terraform/terraform.tfstate", &file);
    };
    backend("http", r#"{"address":"http://localhost/x"}"#);
    for name in ["tofu", "terraform"] {
        let end = locks(&env, name, &["list"]);
        assert!(end.err.contains(&format!("type: {name} force-unlock ID")), "{}", env.dump(&end));
    }
    backend("s3", r#"{"bucket":"b","key":"k","region":"us-east-1"}"#);
    env.write("errored.tfstate", "{}");
    for name in ["tofu", "terraform"] {
        let end = locks(&env, name, &["doctor"]);
        assert!(end.out.contains(&format!("type: {name} state push errored.tfstate")), "{}", env.dump(&end));
    }
}

/// Atlantis has a binary for each version, and applies the plan that it has created.
#[test]
fn as_atlantis_runs_a_plan_its_lock_is_given_back() {
    let mut env = TestEnv::new(Lock::Both, WAITS);
    let bin = env.directory.parent().unwrap().join("atlantis");
    fs::create_dir(&bin).unwrap();
    std::os::unix::fs::symlink(terraform(), bin.join("terraform1.11.4")).unwrap();
    let plan = env.directory.join("default.tfplan");
    env.set("PATH", format!("{}:{}:/usr/bin:/bin", env.bin().display(), bin.display()));
    env.set("TFW_TERRAFORM", "terraform1.11.4").set("PLANFILE", &plan).set("TF_IN_AUTOMATION", "true");
    let mut command = env.command("/bin/sh");
    command.args(["-c", "tf plan -input=false -out $PLANFILE"]);
    let end = Run::start(command).wait();
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    let mut command = env.command("/bin/sh");
    command.args(["-c", "exec tf apply -input=false $PLANFILE"]);
    let run = Run::start(command);
    env.wait_for_began(&run);
    let below = || tree(run.pid()).into_iter().find(|(_, name, ..)| name.starts_with("terraform"));
    kill(wait_for("terraform", || below().map(|(pid, ..)| pid), String::new), Signal::SIGKILL).unwrap();
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
}

/// Every test that docs/wrappers.md names exists.
#[test]
fn the_tests_that_the_recipes_name_are_there() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("docs/wrappers.md")).unwrap();
    let sources: String = fs::read_dir(root.join("tests/real"))
        .unwrap()
        .map(|file| file.unwrap().path())
        .filter(|path| path.is_file())
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    let named: Vec<&str> =
        text.split('`').filter(|word| word.matches('_').count() > 3 && !word.contains(' ')).collect();
    assert!(named.len() > 8, "{named:?}");
    for name in named {
        let name = name.trim_start_matches('.');
        assert!(sources.contains(&format!("{}(", name.trim_start_matches('_'))), "{name}");
    }
}
