//! Credentials that arrive late or never: a release asks for them once, before its time limit begins, and a failed
//! source is named.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};

use crate::support::cloud::cloud;
use crate::support::http::Message;
use crate::support::process::{Run, terraform_below};
use crate::support::processes::{home, marked, tf_of, wait_until_all_is_gone};
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::terminal::Terminal;
use crate::support::test_env::{UNSET, WAITS};
use crate::support::{Lock, Subject, TestEnv, wait_for};

/// Longer than any attempt of a request by `tf` may take.
const SLOW: Duration = Duration::from_secs(10);

const KEYS: &str = r#"{"Version":1,"AccessKeyId":"test","SecretAccessKey":"test"}"#;

/// Returns a [`TestEnv`] whose credentials are printed by a command. The command does so immediately, unless the file
/// `then` exists. Then it first adds a line to `asked` and runs the shell command `then`.
pub fn by_a_command(lock: Lock, then: &str) -> TestEnv {
    let mut env = TestEnv::empty(lock);
    env.write_main("", WAITS);
    let script = format!("#!/bin/sh\nif test -e then; then\necho asked >> asked\n{then}\nfi\necho '{KEYS}'\n");
    env.write("credentials.sh", &script);
    let path = env.directory.join("credentials.sh");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    env.write("config", &format!("[profile slow]\ncredential_process = {}\n", path.display()));
    let config = env.directory.join("config");
    env.set("AWS_CONFIG_FILE", config).set("AWS_PROFILE", "slow");
    env.set("AWS_ACCESS_KEY_ID", UNSET).set("AWS_SECRET_ACCESS_KEY", UNSET);
    env.init();
    env
}

/// Starts an apply. If it has a lease, waits until its keeper has got its credentials. So only what comes after the end
/// of terraform asks for credentials from then on.
#[track_caller]
fn start_apply(env: &TestEnv) -> Run {
    let run = env.start_apply(Subject::Tf);
    env.wait_for_lease();
    run
}

/// Returns how often the command was started since `then` exists.
fn asked(env: &TestEnv) -> usize {
    env.read("asked").lines().count()
}

#[test]
fn a_command_that_is_slower_than_a_request_is_asked_once_and_the_lock_is_released() {
    let env = by_a_command(Lock::Both, &format!("sleep {}", SLOW.as_secs()));
    let run = start_apply(&env);
    env.write("then", "");
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("tf: released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
    assert_eq!(asked(&env), 1, "{}", env.dump(&end));
}

/// A login that fails three times may lock an account, and each one may send a message to a person's phone.
#[test]
fn a_command_that_fails_is_asked_once_and_named() {
    for (then, what) in [
        ("exit 3", "failed (exit status: 3)"),
        ("echo no; exit 0", "printed no credentials"),
        ("echo '{\"Version\":2}'; exit 0", "printed no credentials"),
    ] {
        let env = by_a_command(Lock::Both, then);
        let run = start_apply(&env);
        env.write("then", "");
        run.kill_terraform();
        let end = run.wait();
        let named = format!("the credential_process of the profile slow {what}");
        assert!(end.err.contains(&named), "{then}: {}", env.dump(&end));
        assert_eq!(asked(&env), 1, "{then}: {}", env.dump(&end));
        env.assert_locked();
        // The next tf releases the lock, when the command works again.
        fs::remove_file(env.directory.join("then")).unwrap();
        let end = env.run(Subject::Tf, &["locks", "recover"]);
        assert_eq!(end.code(), Some(0), "{then}: {}", env.dump(&end));
        env.assert_unlocked();
    }
}

#[test]
fn a_command_that_nobody_waits_for_any_more_is_killed_with_all_that_it_started() {
    let env = by_a_command(Lock::File, "sleep 1000 & echo > waits; wait");
    let run = start_apply(&env);
    env.write("then", "");
    run.kill_terraform();
    env.wait_for_file("waits");
    run.send(Signal::SIGINT);
    run.wait_for_err("press ^C again to leave it");
    run.send(Signal::SIGINT);
    let end = run.wait();
    assert!(end.err.contains("^C ended the wait"), "{}", env.dump(&end));
    wait_until_all_is_gone(&env);
    env.assert_locked();
}

/// Kills the terraform of an apply in a terminal, while the apply works. From then on the command runs what it was
/// given as `then`.
fn kill_the_terraform_of(env: &TestEnv, terminal: &Terminal) {
    env.wait_for_file("began");
    env.wait_for_lease();
    env.write("then", "");
    kill(terraform_below(terminal.pid()), Signal::SIGKILL).unwrap();
}

/// It may ask for a code or a password, as it may with the SDK of bare terraform.
#[test]
fn a_command_may_ask_the_person_at_the_terminal() {
    let env = by_a_command(Lock::File, ASKS);
    let mut command = env.command(env.bin().join("tf"));
    command.args(["apply", "-auto-approve", "-no-color"]);
    let mut terminal = Terminal::start(command);
    kill_the_terraform_of(&env, &terminal);
    terminal.wait_for("code: ");
    terminal.type_in("4711\r");
    terminal.wait_for("released the lock");
    terminal.wait();
    env.assert_unlocked();
}

/// A command that asks for a code on the terminal, and fails if there is none.
const ASKS: &str =
    "printf 'code: ' > /dev/tty || exit 7; read code < /dev/tty || exit 8; test \"$code\" = 4711 || exit 1";

/// Starts an interactive shell.
fn interactive(env: &TestEnv) -> Terminal {
    let mut shell = env.command("bash");
    shell.args(["--norc", "--noprofile", "-i"]).env("PS1", "prompt> ");
    let terminal = Terminal::start(shell);
    terminal.wait_for("prompt> ");
    terminal
}

/// Types `line`, which starts an apply, in an interactive shell, and kills the apply's terraform while it works.
fn in_a_shell(env: &TestEnv, line: &str) -> Terminal {
    let mut terminal = interactive(env);
    terminal.type_in(&format!("{line}\r"));
    kill_the_terraform_of(env, &terminal);
    terminal
}

/// Moves the stopped job to the foreground, types the code, and ends the shell. The job releases its lock only then.
fn answer_in_the_foreground(env: &TestEnv, terminal: &mut Terminal) {
    env.assert_locked();
    let shell = terminal.pid();
    terminal.type_in("fg\r");
    let its_turn = || terminal.foreground().filter(|group| *group != shell);
    wait_for("the job's turn", its_turn, || terminal.screen());
    terminal.type_in("4711\r");
    terminal.wait_for("released the lock");
    terminal.type_in("exit\r");
    terminal.wait();
    env.assert_unlocked();
}

const APPLY: &str = "tf apply -auto-approve -no-color";

/// This is as with bare terraform, whose commands are in its group: the job stops, and continues in the foreground.
#[test]
fn a_key_that_stops_a_command_stops_the_job_and_it_goes_on_in_the_foreground() {
    let env = by_a_command(Lock::File, ASKS);
    let mut terminal = in_a_shell(&env, APPLY);
    terminal.wait_for("code: ");
    terminal.type_in("\u{1a}");
    terminal.wait_for("Stopped");
    answer_in_the_foreground(&env, &mut terminal);
}

/// No process of `tf` takes the terminal from the shell that reads it.
#[test]
fn a_command_of_a_background_job_waits_for_its_turn_at_the_terminal() {
    let env = by_a_command(Lock::File, ASKS);
    let mut terminal = in_a_shell(&env, &format!("{APPLY} &"));
    let tf = tf_of(&env);
    let is_stopped = || (crate::support::process::state(tf) == Some('T')).then_some(());
    wait_for("a job that waits for the terminal", is_stopped, || terminal.screen());
    terminal.type_in("echo here is $((40 + 2))\r");
    terminal.wait_for("here is 42");
    let shell = terminal.pid();
    assert_eq!(terminal.foreground(), Some(shell), "{}", terminal.whole_screen());
    answer_in_the_foreground(&env, &mut terminal);
}

/// Without a terminal the command fails, so only a person at a terminal can have the lock released.
#[test]
fn what_gives_a_dead_runs_lock_back_may_ask_the_person_at_the_terminal() {
    for words in [&["locks", "recover"][..], &["locks", "release"], &["plan", "-no-color"]] {
        let env = by_a_command(Lock::DynamoDb, &unless_terraform(ASKS));
        super::survived::kill_whole(&env);
        env.write("then", "");
        let mut command = env.command(env.bin().join("tf"));
        command.args(words);
        let mut terminal = Terminal::start(command);
        // `release` reads the lock first.
        let times = if words == ["locks", "release"] { 2 } else { 1 };
        for time in 1..=times {
            terminal.wait_for_times("code: ", time);
            terminal.type_in("4711\r");
        }
        let end = terminal.wait();
        assert_eq!(end.code(), Some(0), "{words:?}: {}", terminal.whole_screen());
        env.assert_unlocked();
    }
}

/// The shell sees that the job has stopped, although a process below it asks for the code.
#[test]
fn a_key_that_stops_a_recovery_stops_the_job_and_it_goes_on_in_the_foreground() {
    let env = by_a_command(Lock::DynamoDb, &unless_terraform(ASKS));
    super::survived::kill_whole(&env);
    env.write("then", "");
    let mut terminal = interactive(&env);
    terminal.type_in("tf locks recover\r");
    terminal.wait_for("code: ");
    terminal.type_in("\u{1a}");
    terminal.wait_for("Stopped");
    answer_in_the_foreground(&env, &mut terminal);
}

/// The command has switched the echo off. When `tf` kills it, it cannot switch it on again.
#[test]
fn the_terminal_is_set_as_before_when_a_command_is_cut_off_or_dies() {
    for (traps, keys) in [("trap '' INT; ", 2), ("", 1)] {
        // Without `exec`, dash loses a key that is pressed while it starts `sleep` by vfork(2): its handler does
        // nothing then (dash, trap.c, `onsig`), and `sleep` is not there yet.
        let env = by_a_command(Lock::File, &format!("{traps}stty -echo < /dev/tty; echo > waits; exec sleep 1000"));
        let mut shell = env.command("sh");
        shell.args(["-c", &format!("trap : INT; {APPLY}; stty -a; echo over")]);
        let mut terminal = Terminal::start(shell);
        kill_the_terraform_of(&env, &terminal);
        env.wait_for_file("waits");
        terminal.type_in("\u{3}");
        if keys == 2 {
            terminal.wait_for("press ^C again to leave it");
            terminal.type_in("\u{3}");
        }
        terminal.wait_for("over");
        terminal.wait();
        let screen = terminal.whole_screen();
        assert!(screen.contains(" echo ") && !screen.contains("-echo "), "{screen}");
        wait_until_all_is_gone(&env);
    }
}

/// Returns a command that gives credentials immediately if terraform has started it. If `tf` has started it, it adds a
/// line to `ours` and does `what`.
fn unless_terraform(what: &str) -> String {
    format!(
        "above=$(ps -o ppid= -p $PPID); case $(ps -o comm= -p $PPID)$(ps -o comm= -p $above) in *terraform*) ;; *) \
         echo ours >> ours; {what};; esac"
    )
}

/// After a refused run there is only something to explain. For that, no person is asked for a code, `tf` does not wait
/// for the command, and the next runs do not wait for all that was not explained before.
#[test]
fn an_explanation_asks_nobody_for_anything_and_runs_do_not_add_up() {
    let env = by_a_command(Lock::DynamoDb, &unless_terraform("printf 'code: ' > /dev/tty; sleep 1000"));
    env.lock_of_another();
    let mut before = 0;
    for run in 1..=4 {
        env.write("then", "");
        let mut command = env.command(env.bin().join("tf"));
        command.args(["plan", "-no-color"]);
        let mut terminal = Terminal::start(command);
        let end = terminal.wait();
        let screen = terminal.whole_screen();
        assert_eq!(end.code(), Some(1), "{run}: {screen}");
        assert!(screen.contains("Error acquiring the state lock") && !screen.contains("code: "), "{run}: {screen}");
        let ours = env.read("ours").lines().count();
        assert!((1..=2).contains(&(ours - before)), "{run}: {} starts: {screen}", ours - before);
        before = ours;
    }
}

/// Each attempt may send a message to a person's phone.
#[test]
fn a_run_that_waits_does_not_ask_again_and_again_for_credentials_that_nobody_gives() {
    let env = by_a_command(Lock::DynamoDb, &unless_terraform("exit 3"));
    super::survived::kill_whole(&env);
    env.write("then", "");
    // This is longer than the time after which a dead run is tried again.
    let end = env.run(Subject::Tf, &["plan", "-no-color", "-lock-timeout=18s"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(end.err.contains("failed (exit status: 3)"), "{}", env.dump(&end));
    assert_eq!(env.read("ours").lines().count(), 2, "the recovery, and an explanation: {}", env.dump(&end));
}

/// Returns a [`TestEnv`] whose credentials are those of a role. `rule` says what STS does with each request for the
/// role.
fn by_a_role(rule: impl Fn() -> ProxyAction + Send + Sync + 'static) -> (TestEnv, Proxy) {
    let mut env = TestEnv::empty(Lock::DynamoDb);
    let sts = Proxy::start(cloud().port, move |request| {
        if String::from_utf8_lossy(&request.body).contains("Action=AssumeRole") { rule() } else { ProxyAction::Pass }
    });
    env.set("AWS_ENDPOINT_URL_STS", format!("http://127.0.0.1:{}", sts.port));
    env.write_main("", WAITS);
    let block = "assume_role = { role_arn = \"arn:aws:iam::000000000000:role/locker\" }\nkey =";
    env.write("main.tf", &env.read("main.tf").replacen("key =", block, 1));
    env.init();
    (env, sts)
}

/// STS, or an instance's metadata service, may be unavailable for a moment, as any service may.
#[test]
fn who_gives_credentials_and_is_away_for_a_moment_is_asked_again() {
    let away = Arc::new(AtomicUsize::new(0));
    let left = Arc::clone(&away);
    let (env, _sts) = by_a_role(move || {
        let fails = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok();
        if fails { ProxyAction::Answer(Message::answer("503 Service Unavailable", "")) } else { ProxyAction::Pass }
    });
    let run = start_apply(&env);
    // More failures than one request has attempts.
    away.store(7, Ordering::SeqCst);
    run.kill_terraform();
    let end = run.wait();
    assert_eq!(away.load(Ordering::SeqCst), 0, "{}", env.dump(&end));
    assert!(end.err.contains("tf: released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
}

/// STS takes long to return the role's credentials.
#[test]
fn a_role_that_is_slower_than_a_request_is_asked_for_once_and_the_lock_is_released() {
    let slow = Arc::new(AtomicUsize::new(usize::MAX));
    let seen = Arc::clone(&slow);
    let (env, _sts) = by_a_role(move || {
        if seen.load(Ordering::SeqCst) != usize::MAX {
            seen.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(SLOW);
        }
        ProxyAction::Pass
    });
    let run = start_apply(&env);
    slow.store(0, Ordering::SeqCst);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("tf: released the lock"), "{}", env.dump(&end));
    assert_eq!(slow.load(Ordering::SeqCst), 1, "{}", env.dump(&end));
    env.assert_unlocked();
}

/// A refused role is not reported as a missing permission for the table.
#[test]
fn the_doctor_names_a_role_that_is_refused() {
    let mut env = TestEnv::new(Lock::Both, "true");
    let sts = Proxy::start(cloud().port, |request| {
        if String::from_utf8_lossy(&request.body).contains("Action=AssumeRole") {
            let body = "<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code><Message>not you</Message></Error></ErrorResponse>";
            return ProxyAction::Answer(Message::answer("403 Forbidden", body));
        }
        ProxyAction::Pass
    });
    let config = "[profile role]\nrole_arn = arn:aws:iam::000000000000:role/locker\nsource_profile = keys\n\
                  [profile keys]\naws_access_key_id = test\naws_secret_access_key = test\n";
    env.write("config", config);
    let path = env.directory.join("config");
    env.set("AWS_CONFIG_FILE", path).set("AWS_PROFILE", "role");
    env.set("AWS_ACCESS_KEY_ID", UNSET).set("AWS_SECRET_ACCESS_KEY", UNSET);
    env.set("AWS_ENDPOINT_URL_STS", format!("http://127.0.0.1:{}", sts.port));
    let end = env.run(Subject::Tf, &["locks", "doctor"]);
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    assert!(end.out.contains("not you") && end.out.contains("profile role"), "{}", env.dump(&end));
    assert!(!end.out.contains("allow these credentials"), "{}", env.dump(&end));
    let end = env.run(Subject::Tf, &["locks"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(end.err.contains("not you"), "{}", env.dump(&end));
    wait_for("nothing of it", || marked(&home(&env)).is_empty().then_some(()), || env.trace());
}
