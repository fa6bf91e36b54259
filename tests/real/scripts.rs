//! `tf locks shim` and shell/tf.sh: a script that calls terraform needs only one more line to be protected by `tf`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::process::{Run, tree};
use crate::support::processes::{KillOnDrop, home, marked, wait_until_all_is_gone, wait_until_unlocked};
use crate::support::system::program;
use crate::support::test_env::{WAITS, which};
use crate::support::{Ended, Lock, Subject, TestEnv, wait_for};

/// The shells that may run a script. Only the installed ones are used.
const SHELLS: [&[&str]; 8] = [
    &["dash"],
    &["bash"],
    &["bash", "--posix"],
    &["zsh", "-f"],
    &["zsh", "--emulate", "sh", "-f"],
    &["busybox", "sh"],
    &["mksh"],
    &["ksh93"],
];

fn shells() -> impl Iterator<Item = &'static [&'static str]> {
    SHELLS.into_iter().filter(|shell| which(shell[0]).is_some())
}

/// Returns what `code $?` prints after a command that was killed. ksh93 counts from 256.
fn killed(shell: &[&str]) -> &'static str {
    if shell[0] == "ksh93" { "code 265" } else { "code 137" }
}

/// Whether a script with `set -e` ended because of the kill.
fn ended_by_a_kill(shell: &[&str], end: &Ended) -> bool {
    end.code() == Some(137) || (shell[0] == "ksh93" && (end.code() == Some(9) || end.signal() == Some(9)))
}

fn tf_sh() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("shell/tf.sh")
}

/// Returns a command that runs a script with `body` after the line that reads tf.sh.
fn script(env: &TestEnv, shell: &[&str], options: &str, body: &str) -> Command {
    env.write("deploy", &format!("{options}\n. '{}'\n{body}\n", tf_sh().display()));
    let mut command = env.command(shell[0]);
    command.args(&shell[1..]).arg("./deploy");
    command
}

/// Returns what is left in the directory for temporary files.
fn left_behind(env: &TestEnv) -> Vec<PathBuf> {
    fs::read_dir(temporary(env)).unwrap().map(|entry| entry.unwrap().path()).collect()
}

fn temporary(env: &TestEnv) -> PathBuf {
    env.directory.parent().unwrap().join("temporary")
}

fn test_env(provisioner: &str) -> TestEnv {
    let mut env = TestEnv::new(Lock::File, provisioner);
    let temporary = temporary(&env);
    fs::create_dir_all(&temporary).unwrap();
    env.set("TMPDIR", temporary);
    env
}

/// Kills terraform itself, and not the `tf` above it, whose process has the same name.
fn kill_terraform(run: &Run) {
    let ours = Path::new(env!("CARGO_BIN_EXE_tf")).canonicalize().unwrap();
    let is_terraform = |pid: &Pid| {
        program(*pid).is_some_and(|path| path != ours && path.file_name().is_some_and(|name| name == "terraform"))
    };
    let terraform = wait_for(
        "terraform",
        || tree(run.pid()).into_iter().map(|(pid, ..)| pid).find(is_terraform),
        || format!("{:?}", tree(run.pid())),
    );
    kill(terraform, Signal::SIGKILL).unwrap();
}

fn shim(env: &TestEnv, arguments: &[&str]) -> Ended {
    env.run(Subject::Tf, &[&["locks", "shim"], arguments].concat())
}

#[test]
fn a_shim_is_two_links_that_a_script_finds_and_remove_takes_them_away() {
    let env = test_env(WAITS);
    let directory = env.directory.join("new/shim");
    let name = directory.to_str().unwrap();
    for _ in 0..2 {
        let end = shim(&env, &[name]);
        assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", end.out);
    }
    assert_eq!(fs::read_dir(&directory).unwrap().count(), 2);
    // A script that is unchanged.
    let mut command = env.command("sh");
    command.args(["-c", "PATH=\"$0:$PATH\"; terraform apply -auto-approve -no-color", name]);
    let run = Run::start(command);
    env.wait_for_began(&run);
    kill_terraform(&run);
    let end = run.wait();
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
    // Called as tofu, it looks for tofu.
    let mut called = env.command(directory.join("tofu"));
    called.env("PATH", without(&env, "tofu"));
    let end = Run::start(called).wait();
    assert_eq!(end.code(), Some(127));
    assert!(end.err.contains("could not find tofu on PATH"), "{}", end.err);
    for _ in 0..2 {
        let end = shim(&env, &["--remove", name]);
        assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", end.out);
        assert!(!directory.exists());
    }
    let end = shim(&env, &[name, "--only", "terraform"]);
    assert_eq!((end.code(), fs::read_dir(&directory).unwrap().count()), (Some(0), 1));
}

#[test]
fn a_shim_overwrites_and_removes_nothing_that_is_not_its_own_link() {
    let env = test_env("true");
    let directory = env.directory.join("bin");
    let name = directory.to_str().unwrap();
    fs::create_dir(&directory).unwrap();
    let terraform = directory.join("terraform");
    let put: [(&str, &dyn Fn()); 4] = [
        ("a file", &|| fs::write(&terraform, "the real one").unwrap()),
        ("a link to /usr/bin/env", &|| symlink("/usr/bin/env", &terraform).unwrap()),
        ("a link to /nowhere/tf", &|| symlink("/nowhere/tf", &terraform).unwrap()),
        ("a directory", &|| fs::create_dir(&terraform).unwrap()),
    ];
    for (what, put) in put {
        put();
        let before = fs::symlink_metadata(&terraform).unwrap();
        for arguments in [&[name][..], &["--remove", name]] {
            let end = shim(&env, arguments);
            assert_eq!((end.code(), end.out.as_str()), (Some(1), ""), "{what}: {}", end.err);
            assert!(end.err.contains(what) && end.err.contains(terraform.to_str().unwrap()), "{}", end.err);
            assert!(!directory.join("tofu").exists(), "{what}: all or nothing");
            let after = fs::symlink_metadata(&terraform).unwrap();
            assert_eq!(
                (after.file_type(), after.modified().unwrap()),
                (before.file_type(), before.modified().unwrap())
            );
        }
        fs::rename(&terraform, env.directory.join(format!("was {}", what.replace('/', "-")))).unwrap();
    }
    // A file in the place of the directory.
    let end = shim(&env, &[env.directory.join("main.tf").to_str().unwrap()]);
    assert_eq!(end.code(), Some(1));
    assert!(end.err.contains("main.tf"), "{}", end.err);
}

#[test]
fn a_script_that_reads_tf_sh_is_safe_and_leaves_nothing_behind() {
    for shell in shells() {
        for options in ["", "set -e", "set -eu"] {
            let env = test_env(WAITS);
            let mut command = script(&env, shell, options, "terraform apply -auto-approve -no-color; echo \"code $?\"");
            command.env("_tf_shim", "");
            let run = Run::start(command);
            env.wait_for_began(&run);
            kill_terraform(&run);
            let end = run.wait();
            assert!(end.err.contains("released the lock"), "{shell:?} {options}: {}", env.dump(&end));
            // Exit code 137 ends a script with `set -e`, with the same code.
            if options.is_empty() {
                assert!(end.out.contains(killed(shell)), "{shell:?}: {}", env.dump(&end));
                assert_eq!(end.code(), Some(0), "{shell:?}");
            } else {
                assert!(ended_by_a_kill(shell, &end), "{shell:?} {options}: {}", env.dump(&end));
            }
            env.assert_unlocked();
            assert!(left_behind(&env).is_empty(), "{shell:?} {options}: {:?}", left_behind(&env));
        }
    }
}

#[test]
fn bare_the_same_script_leaves_the_lock() {
    let env = test_env(WAITS);
    let mut command = env.command("sh");
    command.args(["-c", "terraform apply -auto-approve -no-color; echo \"code $?\""]);
    let run = Run::start(command);
    env.wait_for_began(&run);
    run.kill_terraform();
    run.wait();
    env.assert_locked();
}

/// Every command that a script starts finds the links: in a pipeline, a subshell or a substitution, started by another
/// program, or in another script.
#[test]
fn everything_that_a_script_starts_runs_tf() {
    let body = r#"
terraform locks history | cat
(terraform locks history)
echo "$(terraform locks history)"
env terraform locks history
printf 'locks\nhistory\n' | xargs terraform
sh -c 'terraform locks history'
terraform locks history &
wait $!
echo all of them
"#;
    for shell in shells() {
        let env = test_env("true");
        let end = Run::start(script(&env, shell, "set -eu", body)).wait();
        // Bare terraform would report for each line that there is no such command, and end the script.
        assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{shell:?} {}", end.out);
        assert_eq!(end.out.trim(), "all of them", "{shell:?}");
        assert!(left_behind(&env).is_empty(), "{shell:?}: {:?}", left_behind(&env));
    }
}

/// The script keeps its exit code, its arguments, its options and its own exit trap.
#[test]
fn a_script_stays_what_it_is() {
    for shell in shells() {
        for (options, body, out, code) in [
            ("", "exit 3", "", 3),
            ("set -e", "false", "", 1),
            ("trap 'echo \"its own: $?\"' EXIT", "exit 3", "its own: 3", 3),
            ("set -e; trap 'echo \"its own: $?\"' EXIT", "false", "its own: 1", 1),
            ("trap 'echo \"its own\"; exit 5' EXIT", "exit 3", "its own", 5),
            (
                "trap 'echo it\\''s \"$PATH\" | sed \"s/:.*tf-shim.*//\"\necho two' EXIT; trap 'echo usr' USR1",
                "kill -USR1 $$",
                "usr",
                0,
            ),
            ("trap 'echo mine' EXIT; trap : INT; trap : TERM", "exit 5", "mine", 5),
            // A subshell that exits does not remove anything that the script still needs.
            (
                "",
                "(exit 3); x=$(exit 1); { exit 1; } | cat; terraform locks shell-init sh >/dev/null && echo safe",
                "safe",
                0,
            ),
            // The links also work if the script changes its directory, and the exit trap works if it sets a new PATH.
            ("TMPDIR=.", "cd /; terraform locks shell-init sh >/dev/null && echo safe", "safe", 0),
            ("", "PATH=/usr/bin:/bin", "", 0),
            // The variable was inherited from a script that has exited.
            ("_tf_shim=/tmp/gone", "terraform locks shell-init sh >/dev/null && echo safe", "safe", 0),
            // If there is no tofu, the links do not add one.
            ("", "command -v tofu || echo none", "none", 0),
            // If the script sets a trap later, calling the exit function is up to the script.
            ("", "trap '_tf_exit; echo later' EXIT", "later", 0),
            ("set -- one 'two three'", "echo \"$2\"", "two three", 0),
            // tf.sh is read again in the same shell. Nothing is done twice.
            ("", ". \"$TF_SH\"; echo \"$PATH\" | tr : '\\n' | grep -c tf-shim", "1", 0),
            ("", "(exit 4); echo $?; (trap 'echo inner' EXIT); echo outer", "4\ninner\nouter", 0),
        ] {
            let mut env = test_env("true");
            let path = without(&env, "tofu");
            env.set("TF_SH", tf_sh()).set("PATH", path);
            let end = Run::start(script(&env, shell, options, body)).wait();
            assert_eq!((end.code(), end.err.as_str()), (Some(code), ""), "{shell:?} {options} {body}");
            assert!(end.out.trim().starts_with(out), "{shell:?} {options} {body}: {}", end.out);
            assert!(left_behind(&env).is_empty(), "{shell:?} {options} {body}: {:?}", left_behind(&env));
        }
    }
}

/// If the links cannot be found, tf.sh reports it and fails.
#[test]
fn it_does_not_succeed_where_terraform_would_run_bare() {
    for shell in shells() {
        let mut env = test_env("true");
        let odd = env.directory.join("a:b");
        fs::create_dir(&odd).unwrap();
        env.set("TMPDIR", odd.clone());
        let end = Run::start(script(&env, shell, "set -e", "echo went on")).wait();
        assert_eq!((end.code(), end.out.as_str()), (Some(1), ""), "{shell:?}: {}", end.err);
        assert!(end.err.contains("terraform would run without tf"), "{shell:?}: {}", end.err);
        assert_eq!(fs::read_dir(&odd).unwrap().count(), 0, "{shell:?}");
    }
}

/// ksh93 quotes the name that it finds there.
#[test]
fn a_temporary_directory_and_a_tf_may_have_any_name() {
    for shell in shells() {
        for name in ["a b", "it's", "$HOME", "寿司"] {
            let mut env = test_env("true");
            let odd = env.directory.join(name);
            fs::create_dir(&odd).unwrap();
            std::os::unix::fs::symlink(env.bin().join("tf"), odd.join("tf")).unwrap();
            let mut path = odd.clone().into_os_string();
            path.push(":");
            path.push(without(&env, "tf"));
            env.set("TMPDIR", odd.clone()).set("PATH", path);
            let end =
                Run::start(script(&env, shell, "", "terraform locks shell-init sh >/dev/null && echo safe")).wait();
            assert_eq!((end.code(), end.out.trim(), end.err.as_str()), (Some(0), "safe", ""), "{shell:?} {name}");
            assert_eq!(fs::read_dir(&odd).unwrap().count(), 1, "{shell:?} {name}");
        }
    }
}

/// Returns PATH without a program of that name. A directory that contains it is replaced by links to its other
/// programs.
fn without(env: &TestEnv, name: &str) -> std::ffi::OsString {
    let environment = env.environment();
    let path = environment.iter().find(|(variable, _)| variable == "PATH").unwrap().1.clone();
    let mut number = 0;
    let directories = std::env::split_paths(&path).map(|directory| {
        if !directory.join(name).exists() {
            return directory;
        }
        number += 1;
        let links = env.directory.parent().unwrap().join(format!("without-{name}-{number}"));
        if fs::create_dir(&links).is_ok() {
            for entry in fs::read_dir(&directory).unwrap().flatten().filter(|entry| entry.file_name() != name) {
                let _ = std::os::unix::fs::symlink(entry.path(), links.join(entry.file_name()));
            }
        }
        links
    });
    std::env::join_paths(directories.collect::<Vec<_>>()).unwrap()
}

/// In zsh, a trap on EXIT that is set in a function belongs to that function.
#[test]
fn it_may_be_read_in_a_function() {
    for shell in shells() {
        let env = test_env("true");
        let body = format!(
            "begin() {{ . '{}'; }}\nbegin\nterraform locks shell-init sh >/dev/null && echo safe",
            tf_sh().display()
        );
        env.write("deploy", &body);
        let mut command = env.command(shell[0]);
        command.args(&shell[1..]).arg("./deploy");
        let end = Run::start(command).wait();
        assert_eq!((end.code(), end.out.trim(), end.err.as_str()), (Some(0), "safe", ""), "{shell:?}");
        assert!(left_behind(&env).is_empty(), "{shell:?}: {:?}", left_behind(&env));
    }
}

/// If a `tf` was killed together with its terraform, the script continues. The lock is released when the script exits.
#[test]
fn at_its_exit_a_script_finishes_what_was_killed() {
    for shell in shells() {
        let env = test_env(WAITS);
        let _kill_on_drop = KillOnDrop(home(&env));
        let run = Run::start(script(&env, shell, "", "terraform apply -auto-approve -no-color\necho \"code $?\""));
        env.wait_for_began(&run);
        // Every process except the script is killed at once, as the kernel does with processes that take too much
        // memory.
        let others: Vec<_> = marked(&home(&env)).into_iter().filter(|pid| *pid != run.pid()).collect();
        for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
            for pid in &others {
                let _ = kill(*pid, signal);
            }
        }
        let end = run.wait();
        assert!(end.out.contains(killed(shell)), "{shell:?}: {}", env.dump(&end));
        assert!(end.err.contains("released the lock that an earlier run left"), "{shell:?}: {}", env.dump(&end));
        assert!(!end.out.contains("released"), "{shell:?}: stdout is the script's own: {}", end.out);
        env.assert_unlocked();
        assert!(left_behind(&env).is_empty(), "{shell:?}: {:?}", left_behind(&env));
    }
}

/// Cron sets PATH, HOME, SHELL and LOGNAME at most, and starts in another directory.
#[test]
fn with_almost_nothing_set_it_works_all_the_same() {
    for shell in shells() {
        let env = test_env(WAITS);
        let terraform = which("terraform").unwrap();
        let directory = env.directory.display();
        let keys = env.environment().into_iter().filter(|(name, _)| name.to_string_lossy().starts_with("AWS_"));
        let exports: Vec<String> =
            keys.map(|(name, value)| format!("export {}='{}'", name.display(), value.display())).collect();
        let exports = exports.join("\n");
        let text = format!(
            "set -eu\ncd '{directory}'\n{exports}\nPATH='{}':'{}':/usr/bin:/bin\n. '{}'\nterraform apply -auto-approve -no-color\n",
            env.bin().display(),
            terraform.parent().unwrap().display(),
            tf_sh().display()
        );
        env.write("deploy", &text);
        let mut command = env.command(which(shell[0]).unwrap());
        command.args(&shell[1..]).arg(env.directory.join("deploy")).env_clear().current_dir("/");
        let run = Run::start(command);
        env.wait_for_began(&run);
        kill_terraform(&run);
        let end = run.wait();
        assert!(ended_by_a_kill(shell, &end), "{shell:?}: {}", env.dump(&end));
        assert!(end.err.contains("released the lock"), "{shell:?}: {}", env.dump(&end));
        wait_until_unlocked(&env);
    }
}

/// Otherwise the script would run bare terraform unnoticed.
#[test]
fn without_a_tf_it_says_so_and_ends_what_ends_at_an_error() {
    for shell in shells() {
        let mut env = test_env("true");
        env.set("PATH", "/usr/bin:/bin");
        let end = Run::start(script(&env, shell, "set -e", "echo went on")).wait();
        assert_eq!((end.code(), end.out.as_str()), (Some(127), ""), "{shell:?}: {}", end.err);
        assert!(
            end.err.contains("there is no tf on PATH") && end.err.contains("run without tf"),
            "{shell:?}: {}",
            end.err
        );
        assert!(left_behind(&env).is_empty(), "{shell:?}: {:?}", left_behind(&env));
    }
}

/// For scripts that cannot know where tf.sh is installed.
#[test]
fn what_shell_init_prints_for_a_script_does_the_same() {
    for shell in shells() {
        let env = test_env("true");
        let tf = env.bin().join("tf");
        let line = "begin=$(\"$1\" locks shell-init sh) && eval \"$begin\"\nterraform locks shell-init sh >/dev/null && echo safe";
        let mut command = env.command(shell[0]);
        command.args(&shell[1..]).args(["-euc", line, "deploy"]).arg(&tf);
        let end = Run::start(command).wait();
        assert_eq!((end.code(), end.out.trim(), end.err.as_str()), (Some(0), "safe", ""), "{shell:?}");
        // tf is not on PATH either.
        let mut command = env.command(shell[0]);
        command.args(&shell[1..]).args(["-euc", line, "deploy"]).arg(env!("CARGO_BIN_EXE_tf"));
        command.env("PATH", std::env::var_os("PATH").unwrap());
        let end = Run::start(command).wait();
        assert_eq!((end.code(), end.out.trim(), end.err.as_str()), (Some(0), "safe", ""), "{shell:?}");
        assert!(left_behind(&env).is_empty(), "{shell:?}: {:?}", left_behind(&env));
    }
}

/// An interrupt ends the script as it would without tf. A shell that is killed leaves two links and no lock.
#[test]
fn a_script_that_is_interrupted_ends_as_it_would_and_no_lock_stays() {
    for shell in shells() {
        let env = test_env(WAITS);
        let run = Run::start(script(&env, shell, "set -e", "terraform apply -auto-approve -no-color\necho went on"));
        env.wait_for_began(&run);
        run.send_to_group(Signal::SIGINT);
        let end = run.wait();
        assert!(!end.out.contains("went on"), "{shell:?}: {}", env.dump(&end));
        assert!(matches!(end.code(), Some(1 | 130)) || end.signal() == Some(2), "{shell:?}: {}", env.dump(&end));
        wait_until_unlocked(&env);
        wait_until_all_is_gone(&env);
    }
}
