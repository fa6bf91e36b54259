//! `tf locks shell-init` in each supported shell, at a terminal: Tab is pressed, and lines are typed.

use std::fs;
use std::path::{Path, PathBuf};

use crate::support::process::{Run, copy_program};
use crate::support::terminal::Terminal;
use crate::support::test_env::which;
use crate::support::{Lock, Subject, TestEnv, wait_for};

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("shell/completions").join(name)
}

/// What is typed, with a Tab in it, and what the line must contain then.
type Typed = [(&'static str, &'static str)];

const TF: &Typed = &[
    // Terraform's own completion.
    ("tf ap\t", "tf apply"),
    ("tf workspace sel\t", "tf workspace select"),
    ("tf -chdir=. ap\t", "tf -chdir=. apply"),
    // This needs terraform to read the backend.
    ("tf workspace select oth\t", "tf workspace select other"),
    // The commands of `tf`.
    ("tf loc\t", "tf locks"),
    ("tf locks rel\t", "tf locks release"),
    ("tf locks audit --older\t", "tf locks audit --older-than"),
    ("tf locks doctor --fix\t", "tf locks doctor --fix-digest"),
    ("tf -chdir=. loc\t", "tf -chdir=. locks"),
    ("tf -chdir=. locks rel\t", "tf -chdir=. locks release"),
    // Where neither has a completion, none is offered.
    ("tf locks tell\t-nothing", "tf locks tell-nothing"),
    ("tf nosuch\t-word", "tf nosuch-word"),
];

const TERRAFORM: &Typed = &[
    ("terraform ap\t", "terraform apply"),
    ("terraform loc\t", "terraform locks"),
    ("terraform locks rel\t", "terraform locks release"),
    ("terraform -chdir=. locks rel\t", "terraform -chdir=. locks release"),
    ("terraform workspace select oth\t", "terraform workspace select other"),
];

/// Types each beginning with its Tab, in a shell that has answered a line, and waits for the completed line.
#[track_caller]
fn press_tab(terminal: &mut Terminal, typed: &Typed) {
    for (begun, completed) in typed {
        let before = terminal.screen().len();
        terminal.type_in(begun);
        // A shell draws only what changes, and moves the cursor in between. The line is put together from the printable
        // text.
        let line = |terminal: &Terminal| {
            console::strip_ansi_codes(&terminal.screen()[before..]).replace(['\r', '\u{8}', '\u{7}'], "")
        };
        wait_for(
            completed,
            || line(terminal).contains(completed).then_some(()),
            || format!("{begun:?}: {:?}", &terminal.screen()[before..]),
        );
        // ^U discards the line.
        terminal.type_in("\x15");
    }
}

/// Types a line, and waits for the answer. The terminal shows the typed line too, so the answer must not be part of it.
#[track_caller]
fn ask(terminal: &mut Terminal, line: &str, answer: &str) {
    assert!(!line.contains(answer));
    let before = terminal.screen().len();
    terminal.type_in(&format!("{line}\r"));
    wait_for(
        answer,
        || terminal.screen()[before..].contains(answer).then_some(()),
        || terminal.screen()[before..].to_owned(),
    );
}

/// Returns a directory whose backend has a second workspace, with a home in which fish and zsh keep what they remember.
fn with_another_workspace() -> TestEnv {
    let mut env = TestEnv::new(Lock::File, "true");
    let end = env.run(Subject::Bare, &["workspace", "new", "other"]);
    assert_eq!(end.code(), Some(0), "{}{}", end.out, end.err);
    // fish and zsh remember nothing from other tests.
    let home = env.directory.parent().unwrap().join("shells-home");
    fs::create_dir_all(home.join(".config/fish")).unwrap();
    env.set("HOME", home.clone()).set("ZDOTDIR", home);
    env
}

/// Starts a shell that reads `rc` when it starts.
fn shell(env: &TestEnv, shell: &str, rc: &str) -> Terminal {
    let home = PathBuf::from(env.environment().into_iter().find(|(name, _)| name == "HOME").unwrap().1);
    let mut command = env.command(shell);
    match shell {
        "bash" => {
            fs::write(home.join(".bashrc"), format!("PS1='ready> '\n{rc}\n")).unwrap();
            command.arg("-i");
        }
        "zsh" => {
            fs::write(home.join(".zshrc"), format!("PS1='ready> '\n{rc}\n")).unwrap();
            command.args(["-d", "-i"]);
        }
        _ => {
            // fish draws a suggestion after the typed text in gray, which this test would take for a completion.
            let config = format!(
                "function fish_prompt\necho -n 'ready> '\nend\nset -g fish_greeting\nset -g fish_autosuggestion_enabled 0\n{rc}\n"
            );
            fs::write(home.join(".config/fish/config.fish"), config).unwrap();
            command.arg("-i");
        }
    }
    let terminal = Terminal::start(command);
    terminal.wait_for("ready> ");
    terminal
}

const BASH: &str = r#"eval "$(tf locks shell-init bash)""#;
const ZSH: &str = "autoload -Uz compinit && compinit -u -D\neval \"$(tf locks shell-init zsh)\"";
/// Fish reads it from a pipe, which is not the same as reading it as an argument.
const FISH: &str = "tf locks shell-init fish | source";

#[test]
fn in_bash_tab_completes_tf_and_the_alias() {
    let env = with_another_workspace();
    let mut terminal = shell(&env, "bash", BASH);
    press_tab(&mut terminal, TF);
    press_tab(&mut terminal, TERRAFORM);
}

#[test]
fn in_zsh_tab_completes_tf_and_the_alias() {
    if which("zsh").is_none() {
        return;
    }
    let env = with_another_workspace();
    let mut terminal = shell(&env, "zsh", ZSH);
    press_tab(&mut terminal, TF);
    press_tab(&mut terminal, TERRAFORM);
}

/// An rc file may initialize completion before or after it runs shell-init.
#[test]
fn in_zsh_the_order_of_the_lines_in_an_rc_file_does_not_matter() {
    if which("zsh").is_none() {
        return;
    }
    let rc = "eval \"$(tf locks shell-init zsh)\"\nautoload -Uz compinit && compinit -u -D";
    let env = with_another_workspace();
    let mut terminal = shell(&env, "zsh", rc);
    press_tab(&mut terminal, &TF[..6]);
    press_tab(&mut terminal, &TERRAFORM[..3]);
    // A shell that completes an alias as a separate command.
    let rc = format!("setopt complete_aliases\n{ZSH}");
    let mut terminal = shell(&env, "zsh", &rc);
    press_tab(&mut terminal, TERRAFORM);
}

#[test]
fn in_fish_tab_completes_tf_and_the_alias() {
    if which("fish").is_none() {
        return;
    }
    let env = with_another_workspace();
    let mut terminal = shell(&env, "fish", FISH);
    press_tab(&mut terminal, TF);
    press_tab(&mut terminal, TERRAFORM);
}

/// The files as a package installs them. Each shell reads them when Tab is first pressed after `tf`.
#[test]
fn as_a_package_installs_them_the_completions_work() {
    let env = with_another_workspace();
    let mut terminal = shell(&env, "bash", &format!("source '{}'", file("tf.bash").display()));
    press_tab(&mut terminal, TF);
    if which("zsh").is_some() {
        let rc = format!("fpath=('{}' $fpath)\nautoload -Uz compinit && compinit -u -D", file("").display());
        let mut terminal = shell(&env, "zsh", &rc);
        press_tab(&mut terminal, TF);
    }
    if which("fish").is_some() {
        let rc = format!("set -p fish_complete_path '{}'", file("").display());
        let mut terminal = shell(&env, "fish", &rc);
        press_tab(&mut terminal, TF);
    }
}

/// Bare terraform has no such command, and prints this.
const NOT_OURS: &str = "no command named";

#[test]
fn terraform_is_tf_where_it_was_asked_for_and_else_stays_what_it_is() {
    for (name, rc, off) in [("bash", BASH, "bash)\""), ("zsh", ZSH, "zsh)\""), ("fish", FISH, "fish | source")] {
        if which(name).is_none() {
            continue;
        }
        let env = with_another_workspace();
        ask(&mut shell(&env, name, rc), "terraform locks history && printf 'en%s' d-2", "end-2");
        let without = rc.replace(off, &off.replace(name, &format!("{name} --no-alias")));
        assert_ne!(rc, without);
        let mut terminal = shell(&env, name, &without);
        press_tab(&mut terminal, &TF[..2]);
        ask(&mut terminal, "terraform locks history", NOT_OURS);
        // shell-init writes no rc file. Its only effect is what it prints.
        let home = env.directory.parent().unwrap().join("home");
        assert!(!home.join(".bashrc").exists() && !home.join(".zshrc").exists());
    }
}

/// Many users have this alias. With both aliases, each one would expand to the other.
#[test]
fn an_alias_of_the_same_name_for_terraform_does_not_undo_it() {
    for (name, rc) in [("bash", BASH), ("zsh", ZSH), ("fish", FISH)] {
        if which(name).is_none() {
            continue;
        }
        let env = with_another_workspace();
        // If the alias is defined first, it hides tf from the line, as from all other commands.
        let above = format!("alias tf=terraform\n{}", rc.replace("tf locks", "command tf locks"));
        for rc in [above, format!("{rc}\nalias tf=terraform")] {
            let mut terminal = shell(&env, name, &rc);
            ask(&mut terminal, "terraform locks history && printf 'en%s' d-2", "end-2");
            ask(&mut terminal, "tf locks history && printf 'en%s' d-3", "end-3");
            press_tab(&mut terminal, &TF[5..7]);
            press_tab(&mut terminal, &TERRAFORM[..3]);
        }
    }
}

/// A program that is not on PATH, in a directory with a quote and a space in its name.
#[test]
fn a_tf_that_is_not_on_path_is_named_by_its_path() {
    for (name, rc) in [("bash", BASH), ("zsh", ZSH), ("fish", FISH)] {
        if which(name).is_none() {
            continue;
        }
        let mut env = with_another_workspace();
        let away = env.directory.join("it's away");
        fs::create_dir(&away).unwrap();
        copy_program(env!("CARGO_BIN_EXE_tf"), away.join("tf"));
        let path = std::env::var("PATH").unwrap();
        env.set("PATH", path);
        let quoted = if name == "fish" { r"'it\'s away/tf'" } else { r"it\'s\ away/tf" };
        let mut terminal = shell(&env, name, &rc.replace("tf locks", &format!("{quoted} locks")));
        press_tab(&mut terminal, TERRAFORM);
        ask(&mut terminal, "terraform locks bla", "unrecognized subcommand");
    }
}

/// A shell evaluates the code without any output, even with all its checks enabled.
#[test]
fn what_is_printed_is_read_without_a_word() {
    let env = TestEnv::empty(Lock::File);
    for (name, arguments, line) in [
        ("bash", &["--norc", "-euc"][..], BASH),
        ("bash", &["--posix", "--norc", "-euc"], BASH),
        ("zsh", &["-f", "-euc"], "eval \"$(tf locks shell-init zsh)\""),
        ("fish", &["--no-config", "-c"], FISH),
    ] {
        if which(name).is_none() {
            continue;
        }
        let mut command = env.command(name);
        command.args(arguments).arg(line);
        let end = Run::start(command).wait();
        assert_eq!((end.code(), end.out.as_str(), end.err.as_str()), (Some(0), "", ""), "{name}");
    }
}
