//! What is generated for the shells completes there, when Tab is pressed.

use std::path::{Path, PathBuf};

use crate::support::process::Run;
use crate::support::terminal::Terminal;
use crate::support::world::which;
use crate::support::{Lock, World, wait_for};

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("shell/completions").join(name)
}

/// Types each beginning with a Tab behind it, in a shell that has answered a line, until the whole word stands there.
fn press_tab(mut terminal: Terminal, name: &str) {
    for (begun, completed) in [
        ("tf lo\t", "tf locks"),
        ("tf locks rel\t", "tf locks release"),
        ("tf locks audit --older\t", "tf locks audit --older-than"),
        ("tf locks doctor --fix\t", "tf locks doctor --fix-digest"),
        // Of ourselves alone: nothing is offered.
        ("tf locks tell\t-nothing", "tf locks tell-nothing"),
    ] {
        let before = terminal.screen().len();
        terminal.type_in(begun);
        // A shell draws what changes and moves the cursor in between: a line is put together from what is printable.
        let line = || console::strip_ansi_codes(&terminal.screen()[before..]).replace(['\r', '\u{8}', '\u{7}'], "");
        wait_for(completed, || line().contains(completed).then_some(()), || format!("{name}: {:?}", terminal.screen()));
        // ^U: the line is thrown away.
        terminal.type_in("\x15");
    }
}

#[test]
fn in_bash_tab_completes() {
    let world = World::empty(Lock::File);
    world.write("rc", &format!("PS1='ready> '\nsource '{}'\n", file("tf.bash").display()));
    let mut command = world.command("bash");
    command.args(["--rcfile", "rc", "-i"]);
    let terminal = Terminal::start(command);
    terminal.wait_for("ready> ");
    press_tab(terminal, "bash");
}

#[test]
fn in_zsh_tab_completes() {
    if which("zsh").is_none() {
        return;
    }
    let mut world = World::empty(Lock::File);
    let directory = file("");
    let rc =
        format!("PS1='ready> '\nfpath=('{}' $fpath)\nautoload -Uz compinit && compinit -u -D\n", directory.display());
    world.write(".zshrc", &rc);
    let home = world.directory.clone();
    world.set("ZDOTDIR", home);
    let mut command = world.command("zsh");
    command.args(["-d", "-i"]);
    let terminal = Terminal::start(command);
    terminal.wait_for("ready> ");
    press_tab(terminal, "zsh");
}

/// fish draws a guess behind what was typed, in grey, which a test of its screen would take for a completion; it has a
/// command that says what Tab would.
#[test]
fn in_fish_tab_completes() {
    if which("fish").is_none() {
        return;
    }
    let world = World::empty(Lock::File);
    let offered = |line: &str| {
        let mut command = world.command("fish");
        command.args(["--no-config", "-c", "source $argv[1]; complete -C $argv[2]"]).arg(file("tf.fish")).arg(line);
        let end = Run::start(command).wait();
        assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{line}");
        end.out.lines().map(|line| line.split('\t').next().unwrap_or_default().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(offered("tf lo"), ["locks"]);
    assert_eq!(offered("tf locks rel"), ["release"]);
    assert_eq!(offered("tf locks audit --older"), ["--older-than"]);
    assert_eq!(offered("tf locks doctor --fix"), ["--fix-digest"]);
    assert!(offered("tf locks tell").is_empty());
}
