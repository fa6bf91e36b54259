//! "For every command and ending, bare terraform and `tf` give the same bytes and the same wait status."

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, sigprocmask};

use crate::support::process::{copy_program, tree};
use crate::support::system::IS_LINUX;
use crate::support::test_env::{APPLY, WAITS};
use crate::support::{Ended, Lock, Run, Subject, TestEnv, wait_for};

#[track_caller]
fn assert_same(what: &str, bare: &Ended, tf: &Ended) {
    assert_eq!(bare.status, tf.status, "{what}: bare {bare:?}\ntf {tf:?}");
    assert_eq!(bare.out_without_slow_locks(), tf.out_without_slow_locks(), "{what}: stdout");
    assert_eq!(bare.err, tf.err, "{what}: stderr");
}

/// Writes a program that replaces terraform.
fn stub(env: &mut TestEnv, text: &str) {
    env.stand_in("stub", text);
}

/// Runs the same stub by its own name and through `tf`.
fn both(env: &TestEnv, prepare: impl Fn(&mut Command)) -> [Ended; 2] {
    ["stub", "tf"].map(|name| {
        let program = if name == "tf" { env.bin().join("tf") } else { env.directory.join("stub") };
        let mut command = env.command(program);
        prepare(&mut command);
        Run::start(command).wait()
    })
}

#[test]
fn every_command_has_the_same_output_and_status() {
    let env = TestEnv::new(Lock::Both, "true");
    env.write("unformatted.tf", "locals{a=1}\n");
    let commands: &[&[&str]] = &[
        &[],
        &["-help"],
        &["version"],
        &["-version"],
        &["no-such-command"],
        &["fmt", "-check", "-diff"],
        &["validate", "-no-color"],
        &["init", "-no-color"],
        &["plan", "-no-color"],
        &["plan", "-no-color", "-detailed-exitcode"],
        &["plan", "-no-such-flag"],
        &["apply", "-help"],
        &["apply", "-auto-approve", "-no-color", "-target=terraform_data.none"],
        &["show", "-no-color"],
        &["output", "-json"],
        &["state", "list"],
        &["state", "rm", "terraform_data.none"],
        &["workspace", "list"],
        &["workspace", "show"],
        &["providers"],
        &["graph"],
        &["force-unlock"],
        &["taint", "terraform_data.none"],
        &["-chdir=nowhere", "plan"],
    ];
    for arguments in commands {
        let [bare, tf] = [Subject::Bare, Subject::Tf].map(|subject| env.run(subject, arguments));
        assert_same(&format!("{arguments:?}"), &bare, &tf);
    }
    env.assert_unlocked();
}

#[test]
fn every_exit_code_is_passed_on() {
    let mut env = TestEnv::empty(Lock::DynamoDb);
    stub(&mut env, "#!/bin/sh\nexit $2\n");
    for code in 0..=255 {
        let end = env.run(Subject::Tf, &["apply", &code.to_string()]);
        assert_eq!(end.code(), Some(code), "{end:?}");
        assert!(end.out.is_empty() && end.err.is_empty(), "{end:?}");
    }
}

#[test]
fn death_by_a_signal_is_passed_on_without_a_core() {
    let mut env = TestEnv::empty(Lock::DynamoDb);
    stub(&mut env, "#!/bin/sh\nulimit -c unlimited\nkill -$2 $$\nsleep 5\n");
    for signal in [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM",
        "TERM",
    ] {
        let mut command = env.command(env.bin().join("tf"));
        command.args(["apply", signal]);
        let limit = libc::rlimit { rlim_cur: libc::RLIM_INFINITY, rlim_max: libc::RLIM_INFINITY };
        // SAFETY: setrlimit is async-signal-safe.
        unsafe {
            command.pre_exec(move || {
                libc::setrlimit(libc::RLIMIT_CORE, &raw const limit);
                Ok(())
            });
        }
        let end = Run::start(command).wait();
        let expected: Signal = format!("SIG{signal}").parse().unwrap();
        assert_eq!(end.signal(), Some(expected as i32), "{signal}: {end:?}");
        assert!(!end.core_dumped(), "{signal}: tf left a core");
    }
}

#[test]
fn arguments_reach_terraform_as_they_are() {
    let mut env = TestEnv::empty(Lock::DynamoDb);
    stub(&mut env, "#!/bin/sh\nfor a in \"$@\"; do printf '[%s]\\n' \"$a\"; done | cksum; echo $#\n");
    let odd: Vec<OsString> = vec![
        "apply".into(),
        OsString::new(),
        OsStr::from_bytes(b"\xff\xfe\x80").to_owned(),
        " two  words ".into(),
        "-var=a=$(b) `c` \"d\" 'e'".into(),
        "new\nline".into(),
    ];
    let long: Vec<OsString> =
        std::iter::once("apply".into()).chain((0..6000).map(|n| format!("-var=v{n}={n}").into())).collect();
    for arguments in [odd, long] {
        let [bare, tf] = both(&env, |command| {
            command.args(&arguments);
        });
        assert_same("arguments", &bare, &tf);
    }
}

#[test]
fn stdin_is_what_it_was() {
    if !IS_LINUX {
        // This test is listed in tests/left-out.
        return;
    }
    let mut env = TestEnv::empty(Lock::DynamoDb);
    stub(&mut env, "#!/bin/sh\nreadlink /proc/self/fd/0 | sed 's/[0-9]*//g'; cat; echo rc=$?\n");
    for kind in ["null", "file", "closed"] {
        env.write("input", "from a file\n");
        let [bare, tf] = both(&env, |command| {
            command.arg("apply");
            // Run::start uses a pipe. The child replaces it by the input that is tested.
            let input = match kind {
                "null" => Some(OwnedFd::from(File::open("/dev/null").unwrap())),
                "file" => Some(OwnedFd::from(File::open(env.directory.join("input")).unwrap())),
                _ => None,
            };
            // SAFETY: dup2 and close are async-signal-safe.
            unsafe {
                command.pre_exec(move || {
                    match &input {
                        Some(input) => drop(nix::unistd::dup2_stdin(input)),
                        None => drop(nix::unistd::close(0)),
                    }
                    Ok(())
                });
            }
        });
        assert_same(kind, &bare, &tf);
    }
}

#[test]
fn yes_through_a_pipe_approves() {
    let env = TestEnv::new(Lock::Both, "true");
    for subject in [Subject::Bare, Subject::Tf] {
        let mut command = env.command("sh");
        command.args(["-c", &format!("echo yes | {} apply -no-color -replace=terraform_data.a", subject.name())]);
        let end = Run::start(command).wait();
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        assert!(end.out.contains("Apply complete!"), "{}", env.dump(&end));
        assert!(end.err.is_empty(), "{}", end.err);
    }
    env.assert_unlocked();
}

#[test]
fn the_signal_mask_and_the_ignored_signals_are_inherited() {
    if !IS_LINUX {
        // This test is listed in tests/left-out.
        return;
    }
    let mut env = TestEnv::empty(Lock::DynamoDb);
    stub(&mut env, "#!/bin/cat\n");
    let prepared = |ignored: &'static [Signal], blocked: &'static [Signal]| {
        both(&env, move |command| {
            command.arg("/proc/self/status");
            // SAFETY: sigaction and sigprocmask are async-signal-safe.
            unsafe {
                command.pre_exec(move || {
                    // std has given SIGPIPE its default action by now.
                    for signal in ignored {
                        nix::sys::signal::signal(*signal, SigHandler::SigIgn)?;
                    }
                    let set: SigSet = blocked.iter().copied().collect();
                    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&set), None)?;
                    Ok(())
                });
            }
        })
        .map(|end| {
            let lines: Vec<_> = end
                .out
                .lines()
                .filter(|line| line.starts_with("Sig") || line.starts_with("Shd"))
                .map(ToOwned::to_owned)
                .collect();
            lines.into_iter().filter(|line| !line.starts_with("SigQ")).collect::<Vec<_>>()
        })
    };
    let all: &[Signal] = &[
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGPIPE,
        Signal::SIGTERM,
        Signal::SIGCHLD,
        Signal::SIGTSTP,
        Signal::SIGTTIN,
        Signal::SIGTTOU,
        Signal::SIGUSR1,
        Signal::SIGALRM,
    ];
    for ignored in
        [&[][..], &[Signal::SIGPIPE], &[Signal::SIGHUP], &[Signal::SIGINT, Signal::SIGQUIT], &[Signal::SIGCHLD], all]
    {
        for blocked in [&[][..], &[Signal::SIGTERM, Signal::SIGUSR2], all] {
            let [bare, tf] = prepared(ignored, blocked);
            assert!(bare.len() >= 4, "{bare:?}");
            assert_eq!(bare, tf, "ignored {ignored:?}, blocked {blocked:?}");
        }
    }
}

#[test]
fn the_same_descriptors_are_open_but_for_the_lifeline_and_the_journals_lock() {
    let mut env = TestEnv::empty(Lock::DynamoDb);
    stub(&mut env, "#!/bin/sh\nexec ls /dev/fd\n");
    let [bare, tf] = both(&env, |command| {
        command.arg("apply");
    });
    let more: Vec<i32> = tf
        .out
        .lines()
        .filter(|line| !bare.out.lines().any(|other| other == *line))
        .map(|line| line.parse().unwrap())
        .collect();
    assert_eq!(more.len(), 2, "bare {} tf {}", bare.out, tf.out);
    assert!(more.iter().all(|number| *number >= 500), "{more:?}");
}

#[test]
fn commands_that_cannot_lock_become_terraform() {
    let mut env = TestEnv::empty(Lock::DynamoDb);
    stub(&mut env, "#!/bin/sh\necho $$ > pid; touch began; while test -e began && ! test -e go; do sleep 0.01; done\n");
    for arguments in [&["version"][..], &["fmt"], &["validate"], &["-help"], &["get"], &["workspace", "show"]] {
        for name in ["began", "go"] {
            let _ = std::fs::remove_file(env.directory.join(name));
        }
        let run = env.start(Subject::Tf, arguments);
        env.wait_for_began(&run);
        assert_eq!(env.read("pid").trim(), run.pid().to_string(), "{arguments:?}");
        env.unblock();
        run.wait();
    }
}

#[test]
fn completion_is_terraforms_own() {
    let env = TestEnv::empty(Lock::DynamoDb);
    let [bare, tf] = [Subject::Bare, Subject::Tf].map(|subject| {
        let mut command = env.command(env.bin().join(subject.name()));
        command.args(["terraform", "works", "terraform"]).env("COMP_LINE", "terraform works").env("COMP_POINT", "15");
        Run::start(command).wait()
    });
    assert_eq!(bare.out, "workspace\n", "{bare:?}");
    assert_same("completion", &bare, &tf);
}

#[test]
fn named_terraform_it_finds_the_real_one_behind_it() {
    let env = TestEnv::empty(Lock::DynamoDb);
    let version = env.run(Subject::Bare, &["version"]).out;
    for copied in [false, true] {
        for arguments in [&["version"][..], &["plan", "-help"], &["output"]] {
            let first = env.directory.join(format!("first-{copied}"));
            let second = env.directory.join(format!("second-{copied}"));
            for directory in [&first, &second] {
                let _ = std::fs::create_dir(directory);
                let link = directory.join("terraform");
                let _ = std::fs::remove_file(&link);
                if copied {
                    copy_program(env!("CARGO_BIN_EXE_tf"), &link);
                } else {
                    symlink(env!("CARGO_BIN_EXE_tf"), &link).unwrap();
                }
            }
            // A user's script that leads back to `tf`.
            let script = env.directory.join("script");
            let _ = std::fs::create_dir(&script);
            std::fs::write(script.join("terraform"), "#!/bin/sh\nexec tf \"$@\"\n").unwrap();
            std::fs::set_permissions(script.join("terraform"), std::fs::Permissions::from_mode(0o755)).unwrap();
            let real = env.bin();
            for order in [
                vec![&first],
                vec![&first, &second],
                vec![&second, &first],
                vec![&script],
                vec![&first, &script, &second],
            ] {
                let path = std::env::join_paths(order.iter().map(|path| path.as_path()).chain([
                    real.as_path(),
                    Path::new("/usr/bin"),
                    Path::new("/bin"),
                ]))
                .unwrap();
                let mut command = env.command(order[0].join("terraform"));
                command.args(arguments).env("PATH", &path);
                let end = Run::start(command).wait();
                let mut bare = env.command(real.join("terraform"));
                bare.args(arguments).env("PATH", &path);
                assert_same(&format!("copied {copied} {arguments:?} {order:?}"), &Run::start(bare).wait(), &end);
                if arguments == ["version"] {
                    assert_eq!(end.out, version);
                }
            }
        }
    }
}

#[test]
fn two_wrappers_in_a_row_are_one() {
    let env = TestEnv::new(Lock::Both, WAITS);
    let first = env.directory.join("first");
    std::fs::create_dir(&first).unwrap();
    copy_program(env!("CARGO_BIN_EXE_tf"), first.join("terraform"));
    let path =
        std::env::join_paths([first.as_path(), env.bin().as_path(), Path::new("/usr/bin"), Path::new("/bin")]).unwrap();
    let mut command = env.command(env.bin().join("tf"));
    command.args(APPLY).env("PATH", path);
    let run = Run::start(command);
    env.wait_for_began(&run);
    // Until then, a keeper may have the name of `tf`.
    env.wait_for_lease();
    let names: Vec<String> = tree(run.pid()).into_iter().map(|process| process.1).collect();
    assert_eq!(names.iter().filter(|name| *name == "tf" || *name == "terraform").count(), 2, "{names:?}");
    run.kill_terraform();
    let end = run.wait();
    assert_eq!(end.err.matches("released the lock").count(), 1, "{}", env.dump(&end));
    env.assert_unlocked();
}

#[test]
fn without_a_terraform_it_says_where_it_looked() {
    let env = TestEnv::empty(Lock::DynamoDb);
    let empty = env.directory.join("empty");
    std::fs::create_dir(&empty).unwrap();
    symlink(env!("CARGO_BIN_EXE_tf"), empty.join("terraform")).unwrap();
    let mut command = env.command(env.bin().join("tf"));
    command.arg("plan").env("PATH", &empty);
    let end = Run::start(command).wait();
    assert_eq!(end.code(), Some(127), "{end:?}");
    assert!(end.err.contains(empty.to_str().unwrap()), "{}", end.err);
    assert!(end.out.is_empty());

    let mut command = env.command(env.bin().join("tf"));
    command.arg("plan").env("TFW_TERRAFORM", "/no/such/terraform");
    let end = Run::start(command).wait();
    assert_eq!(end.code(), Some(127), "{end:?}");
    assert!(end.err.contains("TFW_TERRAFORM") && end.err.contains("/no/such/terraform"), "{}", end.err);
}

#[test]
fn a_terraform_that_cannot_be_run_is_an_error_of_the_shells_kind() {
    let mut env = TestEnv::empty(Lock::DynamoDb);
    stub(&mut env, "\x7fELF no program\n");
    let end = env.run(Subject::Tf, &["apply"]);
    assert_eq!(end.code(), Some(126), "{end:?}");
    assert!(end.err.contains("stub"), "{}", end.err);
}

#[test]
fn a_setting_that_cannot_be_read_is_refused_before_terraform_starts() {
    let mut env = TestEnv::empty(Lock::DynamoDb);
    stub(&mut env, "#!/bin/sh\ntouch began\n");
    for (name, value) in [
        ("TFW_STOP_TIMEOUT", "soon"),
        ("TFW_RELEASE", "perhaps"),
        ("TFW_TTY", "mine"),
        ("TFW_AWAKE", "no"),
        ("TFW_LEASE", "5"),
        ("TFW_LEASE", "1s"),
        ("TFW_LEASE", "2h"),
        ("TFW_LEASE", "yes"),
        ("TFW_CLOCK", "maybe"),
        ("TFW_NOTICE", "aws"),
    ] {
        let mut command = env.command(env.bin().join("tf"));
        command.arg("apply").env(name, value);
        let end = Run::start(command).wait();
        assert_eq!(end.code(), Some(1), "{end:?}");
        assert!(end.err.starts_with("tf: ") && end.err.lines().count() == 1, "{}", end.err);
        assert!(end.err.contains(name) && end.err.contains(value), "{}", end.err);
        assert!(!env.exists("began"));
    }
    // A command that cannot lock has no lease, and so it has no invalid one.
    let mut command = env.command(env.bin().join("tf"));
    command.arg("version").env("TFW_LEASE", "yes").env("TFW_CLOCK", "maybe").env("TFW_NOTICE", "aws");
    let end = Run::start(command).wait();
    assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{end:?}");
    assert!(env.exists("began"));
}

#[test]
fn the_users_logging_keeps_its_whole_effect() {
    let plain = |text: &str| -> Vec<String> {
        // Times, addresses and IDs differ between runs. What is logged, and where, does not.
        let mut lines: Vec<String> = text
            .lines()
            .filter_map(|line| {
                line.get(24..)
                    .map(|rest| rest.chars().take_while(|c| !c.is_ascii_digit() && *c != ':' && *c != '=').collect())
            })
            .collect();
        lines.sort();
        lines.dedup();
        lines
    };
    for (name, value) in [
        ("TF_LOG", "INFO"),
        ("TF_LOG", "json"),
        ("TF_LOG_CORE", "INFO"),
        ("TF_LOG_PROVIDER", "DEBUG"),
        ("TF_LOG_PATH", "own.log"),
        ("TF_LOG_CLOUD", "DEBUG"),
    ] {
        let mut env = TestEnv::new(Lock::Both, "true");
        env.set(name, value);
        let run = |subject| {
            let _ = std::fs::remove_file(env.directory.join("own.log"));
            let end = env.run(subject, &["plan", "-no-color"]);
            assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
            (plain(&end.err), env.read("own.log").is_empty())
        };
        let (bare, tf) = (run(Subject::Bare), run(Subject::Tf));
        assert_eq!(bare, tf, "{name}={value}");
    }
}

#[test]
fn a_run_that_ends_well_touches_no_network_of_ours_and_leaves_no_file() {
    let env = TestEnv::new(Lock::Both, "true");
    let end = env.run(Subject::Tf, &APPLY);
    assert_eq!(end.code(), Some(0));
    assert!(end.err.is_empty(), "{}", end.err);
    assert!(!env.trace().contains("a lock may be held"), "{}", env.trace());
    let run = env.trace().split("run ").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
    for directory in ["/dev/shm", "/tmp"] {
        let left: Vec<_> = std::fs::read_dir(directory)
            .unwrap()
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().contains(&run))
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[test]
fn no_secret_is_on_disk_at_any_moment() {
    // The secrets are new, so only processes of this test can write them anywhere.
    let secret =
        |name: &str| format!("hunter2-{name}-{}-{}", std::process::id(), jiff::Timestamp::now().as_nanosecond());
    let secrets = ["variable", "backend", "environment", "key"].map(secret);
    let secrets = secrets.each_ref().map(String::as_str);
    for (name, value) in [("TF_IN_AUTOMATION", "1"), ("TF_LOG_PROVIDER", "DEBUG")] {
        let mut env = TestEnv::empty(Lock::Both);
        env.set("TF_VAR_from_environment", secrets[2]).set("AWS_SECRET_ACCESS_KEY", secrets[3]).set(name, value);
        let key = format!("-backend-config=secret_key={}", secrets[1]);
        env.write_main("variable \"secret\" {}\nvariable \"from_environment\" {\nsensitive = true\n}\n", WAITS);
        // Terraform itself writes the value of -backend-config into .terraform. That secret must be nowhere else.
        let end = env.run(Subject::Tf, &["init", "-no-color", "-backend-config=access_key=test", &key]);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        let mut command = env.command(env.bin().join("tf"));
        command.args(["apply", "-auto-approve", "-no-color", &format!("-var=secret={}", secrets[0])]);
        let run = Run::start(command);
        env.wait_for_began(&run);
        // While it runs, after it was killed, and afterwards.
        assert_no_secret(&env, &secrets);
        run.kill_terraform();
        let end = run.wait();
        assert_no_secret(&env, &secrets);
        for secret in secrets {
            assert!(!end.err.contains(secret) && !env.trace().contains(secret), "{}", env.dump(&end));
        }
        assert_eq!(std::fs::metadata(env.directory.join("trace")).unwrap().permissions().mode() & 0o777, 0o600);
    }
}

/// Searches every directory to which `tf` or terraform may write, except for the files that the user wrote.
#[track_caller]
fn assert_no_secret(env: &TestEnv, secrets: &[&str]) {
    let places = [env.directory.parent().unwrap().to_owned(), "/tmp".into(), "/var/tmp".into()];
    for secret in secrets {
        let output = Command::new("grep")
            .args(["-rlsF", "-D", "skip", "--exclude-dir=.terraform", "--exclude-dir=target", secret])
            .args(&places[1..])
            .output()
            .unwrap();
        assert!(output.stdout.is_empty(), "{secret}: {}", String::from_utf8_lossy(&output.stdout));
        let output = Command::new("grep")
            .args(["-rlsF", "-D", "skip", "--exclude-dir=.terraform", secret])
            .arg(&places[0])
            .output()
            .unwrap();
        // Exit code 1: grep has searched, and has found nothing.
        let shown = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(shown.is_empty() && output.status.code() == Some(1), "{secret}: {} {shown}", output.status);
    }
}

#[test]
fn a_missing_cli_configuration_is_terraforms_own_warning() {
    let mut env = TestEnv::new(Lock::Both, "true");
    env.set("TF_CLI_CONFIG_FILE", "/no/such/terraformrc");
    let [bare, tf] = [Subject::Bare, Subject::Tf].map(|subject| env.run(subject, &["plan", "-no-color"]));
    assert!(bare.err.contains("/no/such/terraformrc"), "{bare:?}");
    assert_same("plan", &bare, &tf);
}

#[test]
fn a_pipeline_sees_the_end_of_output_when_we_end() {
    let mut env = TestEnv::empty(Lock::DynamoDb);
    stub(&mut env, "#!/bin/sh\necho one; echo two >&2\n");
    let mut command = env.command("sh");
    command
        .args(["-c", "tf apply 2>/dev/null | cat; tf apply 2>&1 >/dev/null | cat; tf apply > file 2>&1; cat file"])
        .stdin(Stdio::null());
    let end = Run::start(command).wait();
    assert_eq!(end.out, "one\ntwo\none\ntwo\n", "{end:?}");
}

/// Such a caller waits for the exit before it reads. That works if all of the output fits into its pipe, however many
/// writes it consists of.
#[test]
fn a_caller_that_reads_only_at_the_end_gets_everything_and_does_not_wait_for_ever() {
    for program in ["terraform", "tf"] {
        let env = TestEnv::new(Lock::Both, "for i in $(seq 60); do echo line $i; sleep 0.01; done");
        let mut command = env.command(if program == "tf" { env.bin().join("tf") } else { program.into() });
        command.args(APPLY);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
        let pid = nix::unistd::Pid::from_raw(child.id().cast_signed());
        let end = wait_for("the end", || child.try_wait().unwrap(), || format!("{:?}\n{}", tree(pid), env.trace()));
        assert!(end.success(), "{program}: {end:?}\n{}", env.trace());
        let out = std::io::read_to_string(child.stdout.take().unwrap()).unwrap();
        assert_eq!(out.matches("(local-exec): line ").count(), 60, "{program}: {out}");
        assert!(out.contains("Apply complete!"), "{program}: {out}");
    }
}

#[test]
fn nothing_of_ours_is_left_running() {
    let env = TestEnv::new(Lock::Both, WAITS);
    let run = env.start_apply(Subject::Tf);
    let all: Vec<_> = tree(run.pid()).into_iter().map(|process| process.0).collect();
    env.unblock();
    run.wait();
    for pid in all {
        wait_for(
            "an end",
            || crate::support::process::state(pid).is_none_or(|state| state == 'Z').then_some(()),
            || pid.to_string(),
        );
    }
}
