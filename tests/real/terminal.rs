//! At a real terminal: keys, prompts, job control, a closed terminal. In shells, as session leader, under make and
//! under script(1).

use std::process::Command;

use nix::sys::signal::{Signal, kill, killpg};

use crate::support::process::{SystemCall, state, terraform_below, tree, waits_in};
use crate::support::system::IS_LINUX;
use crate::support::terminal::Terminal;
use crate::support::test_env::{APPLY, WAITS, which};
use crate::support::{Lock, Subject, TestEnv, wait_for};

/// What the line editor of `terraform console` writes when it has the terminal: it clears what is below its prompt.
const CONSOLE: &str = "\u{1b}[J";

/// Waits until the console has printed `result` and has the terminal for its next line. Before that, the terminal
/// driver edits the line: it does not pass ^D on as a byte, so the console would not get it.
#[track_caller]
fn wait_for_result(terminal: &Terminal, result: &str) {
    wait_for(
        "the prompt behind the result",
        || terminal.screen().rsplit_once(result).is_some_and(|(_, behind)| behind.contains(CONSOLE)).then_some(()),
        || terminal.screen(),
    );
}

pub const APPLY_LINE: &str = "apply -auto-approve -no-color";

/// The arguments of an interactive bash.
pub const INTERACTIVE: [&str; 3] = ["--norc", "--noprofile", "-i"];

/// Starts an interactive shell that prints `ready>` when it waits for a line.
pub fn shell(env: &TestEnv) -> Terminal {
    let mut command = env.command("bash");
    command.args(INTERACTIVE);
    shell_of(command)
}

/// Starts `command`, which becomes an interactive bash that prints `ready>` when it waits for a line.
pub fn shell_of(mut command: Command) -> Terminal {
    command.env("PS1", "ready> ");
    let terminal = Terminal::start(command);
    terminal.wait_for("ready> ");
    terminal
}

/// Starts the program itself as the session leader.
fn alone(env: &TestEnv, subject: Subject, arguments: &str) -> Terminal {
    let mut command = env.command(env.bin().join(subject.name()));
    command.args(arguments.split(' '));
    Terminal::start(command)
}

/// Whether the program `name` waits in read(2).
fn reads(terminal: &Terminal, name: &str) -> bool {
    tree(terminal.pid())
        .iter()
        .any(|process| process.1 == name && process.2 == 'S' && waits_in(process.0, SystemCall::Read))
}

/// Starts an apply whose provisioner asks for the passphrase of a key: "open sesame". `None` for a user without a name,
/// for whom OpenSSH does nothing. Such tests are listed in tests/left-out.
fn asks_for_a_passphrase() -> Option<(TestEnv, Terminal)> {
    nix::unistd::User::from_uid(nix::unistd::getuid()).unwrap()?;
    let env = TestEnv::empty(Lock::Both);
    let status = Command::new("ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "open sesame", "-f"])
        .arg(env.directory.join("key"))
        .status()
        .expect("ssh-keygen (openssh-client) is missing");
    assert!(status.success());
    env.write_main("", "touch began; ssh-keygen -y -f key > public");
    env.init();
    let mut terminal = shell(&env);
    terminal.type_in(&line_of("tf", APPLY_LINE));
    terminal.wait_for("Enter passphrase");
    Some((env, terminal))
}

pub fn line_of(command: &str, arguments: &str) -> String {
    format!("{command} {arguments}; echo status=$?\n")
}

#[track_caller]
fn assert_interrupted_once(env: &TestEnv, screen: &str) {
    assert_eq!(screen.matches("Interrupt received.").count(), 1, "{screen}\n{}", env.trace());
    assert!(!screen.contains("Two interrupts"), "{screen}\n{}", env.trace());
    env.assert_unlocked();
}

#[test]
fn one_key_is_one_interrupt_and_the_grandchildren_get_it_as_under_bare_terraform() {
    for subject in [Subject::Bare, Subject::Tf] {
        let env = TestEnv::new(Lock::Both, "(touch began; sleep 30; touch survived); true");
        let mut terminal = shell(&env);
        terminal.type_in(&line_of(subject.name(), APPLY_LINE));
        wait_for("the provisioner", || env.exists("began").then_some(()), || terminal.screen());
        let sleeping = wait_for(
            "sleep",
            || tree(terminal.pid()).into_iter().find(|process| process.1 == "sleep").map(|process| process.0),
            || terminal.screen(),
        );
        terminal.type_in("\x03");
        terminal.wait_for("status=1");
        // Terraform may exit because of the provisioner's death before it reports the interrupt.
        assert!(terminal.screen().matches("Interrupt received.").count() <= 1, "{}", terminal.screen());
        assert!(!terminal.screen().contains("Two interrupts"), "{}", terminal.screen());
        env.assert_unlocked();
        assert!(state(sleeping).is_none_or(|state| state == 'Z'), "{subject:?}: the grandchild lives on");
        assert!(!env.exists("survived"));
    }
}

#[test]
fn two_keys_20_ms_apart_are_one_interrupt() {
    let (env, proxy) = crate::interrupted_once::slow_to_stop();
    let mut terminal = shell(&env);
    terminal.type_in(&line_of("tf", APPLY_LINE));
    env.wait_for_file("began");
    terminal.type_in("\x03");
    std::thread::sleep(std::time::Duration::from_millis(20));
    // The kernel merges two pending signals into one. A test below checks that a second one is handled.
    terminal.type_in("\x03");
    terminal.wait_for("Interrupt received.");
    proxy.let_go();
    terminal.wait_for("status=1");
    assert_interrupted_once(&env, &terminal.screen());
}

#[test]
fn bare_terraform_takes_two_keys_for_two_interrupts() {
    let (env, proxy) = crate::interrupted_once::slow_to_stop();
    let mut terminal = shell(&env);
    terminal.type_in(&line_of("terraform", APPLY_LINE));
    env.wait_for_file("began");
    terminal.type_in("\x03");
    terminal.wait_for("Interrupt received.");
    terminal.type_in("\x03");
    terminal.wait_for("Two interrupts received");
    proxy.let_go();
    terminal.wait_for("status=1");
}

#[test]
fn the_third_key_in_time_gives_terraform_its_second_interrupt() {
    let (env, proxy) = crate::interrupted_once::slow_to_stop();
    let mut terminal = shell(&env);
    terminal.type_in(&line_of("tf", APPLY_LINE));
    env.wait_for_file("began");
    terminal.type_in("\x03");
    terminal.wait_for("Interrupt received.");
    terminal.type_in("\x03");
    terminal.wait_for("and will release its lock");
    terminal.wait_for("press ^C again within 3 s to force it");
    terminal.type_in("\x03");
    terminal.wait_for("Two interrupts received");
    proxy.let_go();
    terminal.wait_for("status=1");
    env.assert_unlocked();
}

#[test]
fn the_third_key_kills_a_command_that_ignores_interrupts_and_its_lock_goes() {
    let env = TestEnv::new(Lock::Both, "true");
    let mut terminal = shell(&env);
    // Its input is a pipe that stays open, so it never reads the terminal.
    terminal.type_in("sleep 60 | tf console; echo status=${PIPESTATUS[1]}\n");
    env.wait_for_locked();
    let terraform = terraform_below(terminal.pid());
    terminal.type_in("\x03");
    // The other process of the pipeline dies of the key. console reads the end of its input, and exits.
    wait_for(
        "console to end",
        || state(terraform).is_none_or(|state| state == 'Z').then_some(()),
        || terminal.screen(),
    );
    terminal.wait_for("status=");
    env.assert_unlocked();

    let env = TestEnv::new(Lock::Both, "true");
    let lock = env.lock_of_another();
    let mut terminal = shell(&env);
    terminal.type_in(&line_of("tf", "state rm -lock-timeout=60s terraform_data.a"));
    env.wait_for_trace("started terraform");
    terminal.wait_for("Acquiring state lock");
    terminal.type_in("\x03");
    env.wait_for_trace("InterruptGroup");
    terminal.type_in("\x03");
    terminal.wait_for("to force it");
    terminal.type_in("\x03");
    terminal.wait_for("status=137");
    assert!(env.locks().iter().all(|standing| *standing == lock), "{:?}", env.locks());
    assert!(!env.locks().is_empty());
}

#[test]
fn a_key_that_kills_tee_as_well_lets_terraform_end_gracefully() {
    let env = TestEnv::new(Lock::Both, WAITS);
    let mut terminal = shell(&env);
    terminal.type_in(&format!("tf {APPLY_LINE} | tee log\n"));
    env.wait_for_file("began");
    terminal.type_in("\x03");
    env.wait_for_trace("terraform ended: Exited(1)");
    terminal.wait_for_times("ready> ", 2);
    env.assert_unlocked();
    assert!(env.state().is_some_and(|state| state.contains("terraform_data")), "{}", env.trace());
    assert!(!terminal.screen().contains("released the lock"), "terraform unlocked by itself: {}", terminal.screen());
    assert_eq!(env.trace().matches("[InterruptGroup]").count(), 1, "{}", env.trace());
    assert!(!env.trace().contains("[InterruptTerraform]"), "{}", env.trace());
}

#[test]
fn the_approval_prompt_is_answered() {
    for (answer, expected, applied) in [("yes\n", "Apply complete!", true), ("no\n", "Apply cancelled.", false)] {
        for as_leader in [false, true] {
            let env = TestEnv::new(Lock::Both, "true");
            let mut terminal = if as_leader {
                alone(&env, Subject::Tf, "apply -no-color")
            } else {
                let mut terminal = shell(&env);
                terminal.type_in(&line_of("tf", "apply -no-color"));
                terminal
            };
            terminal.wait_for("Enter a value:");
            terminal.type_in(answer);
            terminal.wait_for(expected);
            if as_leader {
                assert_eq!(terminal.wait().code(), Some(i32::from(!applied)));
            } else {
                terminal.wait_for(&format!("status={}", i32::from(!applied)));
            }
            env.assert_unlocked();
        }
    }
}

#[test]
fn a_key_at_the_approval_prompt_is_one_interrupt() {
    for delay in [0, 10, 25, 200] {
        let env = TestEnv::new(Lock::Both, "true");
        let mut terminal = shell(&env);
        terminal.type_in(&line_of("tf", "apply -no-color"));
        terminal.wait_for("Enter a value:");
        // While terraform is in the foreground, and after the foreground was reclaimed.
        std::thread::sleep(std::time::Duration::from_millis(delay));
        terminal.type_in("\x03");
        terminal.wait_for("status=1");
        let screen = terminal.screen();
        assert!(!screen.contains("Two interrupts"), "{screen}\n{}", env.trace());
        let delivered =
            env.trace().matches("InterruptGroup").count() + env.trace().matches("terminal sent SIGINT").count();
        // The status shows that terraform got one. If the terminal sent it, terraform may end before `tf` hears of it.
        assert!(delivered <= 1, "after {delay} ms: {}", env.trace());
        env.assert_unlocked();
    }
}

#[test]
fn a_window_closed_while_applying_stops_terraform_once_and_leaves_no_lock() {
    for as_leader in [false, true] {
        let env = TestEnv::new(Lock::Both, WAITS);
        let arguments = "apply -auto-approve -no-color";
        let mut terminal = if as_leader {
            alone(&env, Subject::Tf, arguments)
        } else {
            let mut terminal = shell(&env);
            terminal.type_in(&line_of("tf", arguments));
            terminal
        };
        env.wait_for_file("began");
        env.assert_locked();
        terminal.close();
        env.wait_for_trace("terraform ended");
        wait_for("no lock", || env.locks().is_empty().then_some(()), || env.trace());
        assert_eq!(env.trace().matches("[InterruptGroup]").count(), 1, "{}", env.trace());
        assert!(env.trace().contains("Exited(1)"), "{}", env.trace());
        assert!(env.state().is_some_and(|state| state.contains("terraform_data")), "its state was saved");
    }
}

#[test]
fn bare_terraform_leaves_its_lock_when_its_window_is_closed() {
    let env = TestEnv::new(Lock::Both, WAITS);
    let mut terminal = alone(&env, Subject::Bare, APPLY_LINE);
    env.wait_for_file("began");
    terminal.close();
    terminal.wait();
    env.unblock();
    env.assert_locked();
}

#[test]
fn a_window_closed_at_the_approval_prompt_leaves_no_lock() {
    for as_leader in [false, true] {
        let env = TestEnv::new(Lock::Both, "true");
        let mut terminal = if as_leader {
            alone(&env, Subject::Tf, "apply -no-color")
        } else {
            let mut terminal = shell(&env);
            terminal.type_in(&line_of("tf", "apply -no-color"));
            terminal
        };
        terminal.wait_for("Enter a value:");
        env.wait_for_trace("took the terminal back");
        terminal.close();
        env.wait_for_trace("terraform ended");
        wait_for("no lock", || env.locks().is_empty().then_some(()), || env.trace());
        assert!(env.trace().matches("[InterruptGroup]").count() <= 1, "{}", env.trace());
    }
}

#[test]
fn suspended_and_continued_terraform_is_really_stopped_in_between_and_keeps_its_lock() {
    let env = TestEnv::new(Lock::Both, WAITS);
    let mut terminal = shell(&env);
    terminal.type_in(&line_of("tf", APPLY_LINE));
    env.wait_for_file("began");
    let terraform = terraform_below(terminal.pid());
    terminal.type_in("\x1a");
    terminal.wait_for("Stopped");
    wait_for("a stopped terraform", || (state(terraform) == Some('T')).then_some(()), || terminal.screen());
    env.assert_locked();
    // A shell that has just forked waits in state D for a child that is stopped. A command that has just exited is a
    // zombie until its stopped shell can wait for it. A process that runs, or sleeps and could run, is not stopped.
    wait_for(
        "a stopped provisioner",
        || tree(terraform).iter().all(|process| matches!(process.2, 'T' | 'D' | 'Z')).then_some(()),
        || format!("{:?}", tree(terraform)),
    );
    terminal.type_in("fg\n");
    wait_for("a running terraform", || (state(terraform) != Some('T')).then_some(()), || terminal.screen());
    env.unblock();
    terminal.wait_for("Apply complete!");
    env.wait_for_trace("terraform ended");
    env.assert_unlocked();
}

#[test]
fn suspended_twice_and_then_in_the_background_it_goes_on() {
    let env = TestEnv::new(Lock::Both, WAITS);
    let mut terminal = shell(&env);
    terminal.type_in("tf apply -auto-approve -no-color\n");
    env.wait_for_file("began");
    let terraform = terraform_below(terminal.pid());
    for round in 1..3 {
        terminal.type_in("\x1a");
        terminal.wait_for_times("Stopped", round);
        wait_for("a stopped terraform", || (state(terraform) == Some('T')).then_some(()), || terminal.screen());
        if round == 1 {
            terminal.type_in("fg\n");
            wait_for("a running terraform", || (state(terraform) != Some('T')).then_some(()), || terminal.screen());
        }
    }
    terminal.type_in("bg\n");
    wait_for("a running terraform", || (state(terraform) != Some('T')).then_some(()), || terminal.screen());
    env.unblock();
    terminal.wait_for("Apply complete!");
    env.wait_for_trace("terraform ended");
    env.assert_unlocked();
}

#[test]
fn a_session_leader_that_is_suspended_goes_on() {
    // No shell could continue it. The kernel discards the stop of bare terraform in this case, so tf must do the same.
    let env = TestEnv::new(Lock::Both, WAITS);
    let mut terminal = alone(&env, Subject::Tf, APPLY_LINE);
    env.wait_for_file("began");
    terminal.type_in("\x1a");
    env.wait_for_trace("stopped: false");
    env.unblock();
    assert_eq!(terminal.wait().code(), Some(0), "{}", terminal.screen());
    env.assert_unlocked();
}

#[test]
fn a_terraform_stopped_by_somebody_stops_the_job_and_fg_mends_it() {
    let env = TestEnv::new(Lock::Both, WAITS);
    let mut terminal = shell(&env);
    terminal.type_in(&line_of("tf", APPLY_LINE));
    env.wait_for_file("began");
    let terraform = terraform_below(terminal.pid());
    kill(terraform, Signal::SIGSTOP).unwrap();
    terminal.wait_for("Stopped");
    terminal.type_in("fg\n");
    wait_for("a running terraform", || (state(terraform) != Some('T')).then_some(()), || terminal.screen());
    env.unblock();
    terminal.wait_for("Apply complete!");
    env.wait_for_trace("terraform ended");
    env.assert_unlocked();
}

/// tf has stopped together with terraform, and nobody but tf reads what terraform writes when it goes on.
#[test]
fn a_terraform_stopped_and_then_continued_by_somebody_completes() {
    for (stop, line) in
        [("kill", "tf apply -auto-approve -no-color | tail -c 300\n"), ("key", "tf apply -auto-approve -no-color\n")]
    {
        // More than a pipe holds.
        let env = TestEnv::new(Lock::Both, &format!("{WAITS}; seq 20000"));
        let mut terminal = shell(&env);
        terminal.type_in(line);
        env.wait_for_file("began");
        let terraform = terraform_below(terminal.pid());
        match stop {
            "kill" => kill(terraform, Signal::SIGSTOP).unwrap(),
            _ => terminal.type_in("\x1a"),
        }
        env.wait_for_trace("guardian: tf is suspended: true");
        wait_for("a stopped terraform", || (state(terraform) == Some('T')).then_some(()), || terminal.screen());
        killpg(terraform, Signal::SIGCONT).unwrap();
        env.wait_for_trace("guardian: continues tf, whose terraform was continued by somebody");
        env.unblock();
        terminal.wait_for("Apply complete!");
        env.wait_for_trace("terraform ended");
        wait_for("no lock", || env.locks().is_empty().then_some(()), || env.trace());
    }
}

#[test]
fn started_in_the_background_it_stops_for_the_terminal_and_fg_lets_it_be_answered() {
    let env = TestEnv::new(Lock::Both, "true");
    let mut terminal = shell(&env);
    // The shell says at once that a job has stopped. By default it says so before a prompt, and then a prompt that it
    // wrote before tf had stopped would be the last.
    terminal.type_in("set -b\n");
    terminal.type_in("tf apply -no-color &\n");
    terminal.wait_for("Enter a value:");
    env.wait_for_trace("was stopped by SIGTTIN");
    terminal.wait_for("Stopped");
    terminal.type_in("fg\n");
    env.wait_for_trace("lent the terminal");
    env.wait_for_trace("took the terminal back");
    terminal.type_in("yes\n");
    terminal.wait_for("Apply complete!");
    env.wait_for_trace("terraform ended");
    env.assert_unlocked();
}

#[test]
fn a_prompt_that_nobody_can_answer_ends_with_no_lock() {
    for line in ["bash -c 'tf apply -no-color </dev/tty & exit'\n", "( tf apply -no-color </dev/tty & )\n"] {
        let env = TestEnv::new(Lock::Both, "true");
        let mut terminal = shell(&env);
        terminal.type_in(line);
        env.wait_for_trace("NobodyCanAnswer: [InterruptGroup]");
        env.wait_for_trace("terraform ended");
        wait_for("no lock", || env.locks().is_empty().then_some(()), || env.trace());
    }
}

#[test]
fn a_script_that_prompts_after_us_can_read() {
    let env = TestEnv::new(Lock::Both, "true");
    env.write("script", "tf apply -no-color\nread -p 'and now? ' answer\necho answered=$answer\n");
    let mut terminal = shell(&env);
    terminal.type_in("bash script\n");
    terminal.wait_for("Enter a value:");
    terminal.type_in("yes\n");
    terminal.wait_for("and now?");
    terminal.type_in("well\n");
    terminal.wait_for("answered=well");
}

#[test]
fn a_passphrase_is_typed_into_a_provisioner() {
    let Some((env, mut terminal)) = asks_for_a_passphrase() else { return };
    // A person types byte by byte, and more slowly than this.
    for byte in "open sesame\n".chars() {
        terminal.type_in(&byte.to_string());
        std::thread::sleep(std::time::Duration::from_millis(15));
    }
    terminal.wait_for("status=0");
    assert!(env.read("public").starts_with("ssh-ed25519 "), "{}", terminal.screen());
    assert_eq!(terminal.screen().matches("Enter passphrase").count(), 1, "{}", terminal.screen());
    assert!(!terminal.screen().contains("sesame"), "it was echoed: {}", terminal.screen());
    env.assert_unlocked();
}

#[test]
fn a_key_at_a_passphrase_is_one_interrupt_and_nobody_is_left_at_the_terminal() {
    if !IS_LINUX {
        // This test is listed in tests/left-out.
        return;
    }
    let Some((env, mut terminal)) = asks_for_a_passphrase() else { return };
    env.wait_for_trace("lent the terminal");
    // OpenSSH's prompt misses a signal that comes just before its read(2), and reads the next byte first. This is the
    // same under bare terraform. A person presses the key while it reads.
    wait_for("ssh-keygen to read", || reads(&terminal, "ssh-keygen").then_some(()), || terminal.screen());
    terminal.type_in("\x03");
    terminal.wait_for("status=1");
    assert_interrupted_once(&env, &terminal.screen());
    assert!(env.trace().contains("the terminal sent SIGINT"), "{}", env.trace());
    assert!(!terminal.screen().contains("are still running"), "{}\n{}", terminal.screen(), env.trace());
    assert!(tree(terminal.pid()).iter().all(|process| process.1 != "ssh-keygen"), "{:?}", tree(terminal.pid()));
    terminal.type_in("echo still$((1+1))\n");
    terminal.wait_for("still2");
}

#[test]
fn a_window_closed_at_a_no_echo_or_raw_prompt_leaves_no_lock() {
    // Terraform is in the foreground at that moment, so the kernel hangs it up itself, as it does with bare terraform.
    let console = {
        let env = TestEnv::new(Lock::Both, "true");
        let mut terminal = shell(&env);
        terminal.type_in("tf console\n");
        terminal.wait_for(CONSOLE);
        (env, terminal)
    };
    for (env, mut terminal) in std::iter::once(console).chain(asks_for_a_passphrase()) {
        env.wait_for_trace("lent the terminal");
        env.assert_locked();
        terminal.close();
        env.wait_for_trace("terraform ended");
        wait_for("no lock", || env.locks().is_empty().then_some(()), || env.trace());
    }
}

#[test]
fn console_edits_its_line_and_leaves_at_end_of_input() {
    let env = TestEnv::new(Lock::Both, "true");
    let mut terminal = shell(&env);
    terminal.type_in(&line_of("tf", "console"));
    terminal.wait_for(CONSOLE);
    env.wait_for_trace("lent the terminal");
    // "21", one key to the left, and the rest in between: 23 + 10001.
    for keys in ["2", "1", "\x1b[D", "3", " + 1000", "\r"] {
        terminal.type_in(keys);
        std::thread::sleep(std::time::Duration::from_millis(30));
    }
    wait_for_result(&terminal, "10024");
    terminal.type_in("\x04");
    terminal.wait_for("status=0");
    env.assert_unlocked();
}

#[test]
fn a_key_in_the_console_does_what_it_does_bare() {
    // The line editor switches the terminal's signals off. The key is then a byte, and no process is interrupted.
    for subject in [Subject::Bare, Subject::Tf] {
        let env = TestEnv::new(Lock::Both, "true");
        let mut terminal = shell(&env);
        terminal.type_in(&line_of(subject.name(), "console"));
        terminal.wait_for(CONSOLE);
        terminal.type_in("1 + 1");
        terminal.wait_for("1 + 1");
        // It discards the line and asks for the next one.
        terminal.type_in("\x03");
        terminal.wait_for("^C");
        terminal.type_in("20 + 22\r");
        wait_for_result(&terminal, "42");
        terminal.type_in("\x04");
        terminal.wait_for("status=0");
        assert!(!env.trace().contains("SIGINT"), "{}", env.trace());
        env.assert_unlocked();
    }
}

#[test]
fn tostop_does_not_stop_a_plan() {
    let env = TestEnv::new(Lock::Both, "true");
    let mut terminal = shell(&env);
    terminal.type_in("stty tostop; tf plan -no-color; echo status=$?\n");
    terminal.wait_for("status=0");
    env.assert_unlocked();
}

#[test]
fn under_make_and_script_and_other_shells_a_key_is_one_interrupt() {
    let mut lines = vec![
        ("make", "make apply".to_owned()),
        ("script(1)", "script -qec 'tf apply -auto-approve -no-color' /dev/null".to_owned()),
        ("a script", "sh -c 'tf apply -auto-approve -no-color; echo $?'".to_owned()),
        ("a script in bash", "bash -c 'tf apply -auto-approve -no-color; echo $?'".to_owned()),
    ];
    for shell in ["dash", "zsh", "fish"] {
        if which(shell).is_some() {
            lines.push((shell, format!("{shell} -c 'tf apply -auto-approve -no-color; echo'")));
        }
    }
    for (name, line) in lines {
        let env = TestEnv::new(Lock::Both, WAITS);
        env.write("Makefile", "apply:\n\ttf apply -auto-approve -no-color\n");
        let mut terminal = shell(&env);
        terminal.type_in(&format!("{line}\n"));
        wait_for(name, || env.exists("began").then_some(()), || terminal.screen());
        terminal.type_in("\x03");
        env.wait_for_trace("terraform ended");
        wait_for("no lock", || env.locks().is_empty().then_some(()), || env.trace());
        terminal.wait_for_times("ready> ", 2);
        let screen = terminal.screen();
        assert_eq!(screen.matches("Interrupt received.").count(), 1, "{name}: {screen}\n{}", env.trace());
        assert!(!screen.contains("Two interrupts"), "{name}: {screen}");
    }
}

#[test]
fn in_interactive_zsh_and_fish_keys_and_job_control_work() {
    for (name, arguments) in [("zsh", vec!["-f", "-i"]), ("fish", vec!["--no-config", "-i"])] {
        if which(name).is_none() {
            continue;
        }
        let env = TestEnv::new(Lock::Both, WAITS);
        let mut command = env.command(name);
        command.args(arguments);
        let mut terminal = Terminal::start(command);
        // fish asks the terminal for its type before it shows a prompt.
        terminal.type_in("echo shell$(math 1+1 2>/dev/null || echo 2)\n");
        terminal.wait_for("shell2");
        terminal.type_in("tf apply -auto-approve -no-color\n");
        wait_for(name, || env.exists("began").then_some(()), || terminal.screen());
        let terraform = terraform_below(terminal.pid());
        terminal.type_in("\x1a");
        wait_for("a stopped terraform", || (state(terraform) == Some('T')).then_some(()), || terminal.screen());
        env.wait_for_trace("got SIGTSTP");
        let tf = tree(terminal.pid()).into_iter().find(|process| process.1 == "tf").unwrap().0;
        wait_for("a stopped tf", || (state(tf) == Some('T')).then_some(()), || terminal.screen());
        wait_for(
            "the shell in the foreground",
            || (terminal.foreground() != Some(tf)).then_some(()),
            || terminal.screen(),
        );
        env.assert_locked();
        terminal.type_in("fg\n");
        wait_for("a running terraform", || (state(terraform) != Some('T')).then_some(()), || terminal.screen());
        wait_for("us in the foreground", || (terminal.foreground() == Some(tf)).then_some(()), || terminal.screen());
        terminal.type_in("\x03");
        env.wait_for_trace("terraform ended");
        wait_for("no lock", || env.locks().is_empty().then_some(()), || env.trace());
        assert_eq!(terminal.screen().matches("Interrupt received.").count(), 1, "{name}: {}", terminal.screen());
    }
}

#[test]
fn in_tmux_a_key_is_one_interrupt_and_a_killed_window_leaves_no_lock() {
    if which("tmux").is_none() {
        return;
    }
    for kill_window in [false, true] {
        let env = TestEnv::new(Lock::Both, WAITS);
        let socket = env.directory.join("tmux");
        let tmux = |arguments: &[&str]| {
            let output =
                env.command("tmux").arg("-S").arg(&socket).arg("-f").arg("/dev/null").args(arguments).output().unwrap();
            String::from_utf8_lossy(&output.stdout).into_owned()
        };
        tmux(&["new-session", "-d", "-x", "150", "-y", "50", "bash --norc --noprofile -i"]);
        tmux(&["send-keys", "tf apply -auto-approve -no-color", "Enter"]);
        wait_for("the provisioner", || env.exists("began").then_some(()), || tmux(&["capture-pane", "-p"]));
        if kill_window {
            tmux(&["kill-window"])
        } else {
            tmux(&["send-keys", "C-c"])
        };
        env.wait_for_trace("terraform ended");
        wait_for("no lock", || env.locks().is_empty().then_some(()), || env.trace());
        assert!(env.trace().contains("Exited(1)"), "{}", env.trace());
        let told =
            env.trace().matches("[InterruptGroup]").count() + env.trace().matches("[InterruptTerraform]").count();
        assert_eq!(told, 1, "{}", env.trace());
        tmux(&["kill-server"]);
    }
}

#[test]
fn with_a_shared_terminal_it_is_as_bare() {
    let mut env = TestEnv::new(Lock::Both, WAITS);
    env.set("TFW_TTY", "shared");
    let mut terminal = shell(&env);
    terminal.type_in(&line_of("tf", APPLY_LINE));
    env.wait_for_file("began");
    let terraform = terraform_below(terminal.pid());
    terminal.type_in("\x1a");
    terminal.wait_for("Stopped");
    wait_for("a stopped terraform", || (state(terraform) == Some('T')).then_some(()), || terminal.screen());
    terminal.type_in("fg\n");
    wait_for("a running terraform", || (state(terraform) != Some('T')).then_some(()), || terminal.screen());
    terminal.type_in("\x03");
    env.wait_for_trace("terraform ended");
    wait_for("no lock", || env.locks().is_empty().then_some(()), || env.trace());
    assert_eq!(terminal.screen().matches("Interrupt received.").count(), 1, "{}", terminal.screen());
}

/// The shell creates its own process group, and takes the foreground for it. When it exits, it restores the foreground.
#[test]
fn an_interactive_shell_in_a_provisioner_gets_the_terminal() {
    let env = TestEnv::new(Lock::File, "PS1='inner> ' bash --norc -i </dev/tty >/dev/tty 2>&1; touch ended");
    let mut command = env.command(env.bin().join("tf"));
    command.args(APPLY);
    let mut terminal = Terminal::start(command);
    terminal.wait_for("inner> ");
    terminal.type_in("echo sum $((40+2))\r");
    terminal.wait_for("sum 42");
    terminal.type_in("exit\r");
    assert_eq!(terminal.wait().code(), Some(0), "{}", terminal.whole_screen());
    assert!(env.exists("ended"));
    env.assert_unlocked();
}
