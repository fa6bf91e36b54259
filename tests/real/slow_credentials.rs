//! Credentials that take long, or that nobody gives: they are asked for once in a release, before its clock runs, and
//! whoever gave none is named.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};

use crate::support::cloud::cloud;
use crate::support::household::{home, marked, tf_of, wait_until_all_is_gone};
use crate::support::http::Message;
use crate::support::process::terraform_below;
use crate::support::proxy::{Deed, Proxy};
use crate::support::terminal::Terminal;
use crate::support::world::{UNSET, WAITS};
use crate::support::{Lock, Subject, World, wait_for};

/// Longer than any attempt of a request of ours may take.
const SLOW: Duration = Duration::from_secs(10);

const KEYS: &str = r#"{"Version":1,"AccessKeyId":"test","SecretAccessKey":"test"}"#;

/// A world whose credentials are printed by a command. For terraform it does so at once; when there is a file `then`, it
/// counts its start in `asked` and does that.
fn by_a_command(lock: Lock, then: &str) -> World {
    let mut world = World::empty(lock);
    world.write_main("", WAITS);
    let script = format!("#!/bin/sh\nif test -e then; then\necho asked >> asked\n{then}\nfi\necho '{KEYS}'\n");
    world.write("credentials.sh", &script);
    let path = world.directory.join("credentials.sh");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    world.write("config", &format!("[profile slow]\ncredential_process = {}\n", path.display()));
    let config = world.directory.join("config");
    world.set("AWS_CONFIG_FILE", config).set("AWS_PROFILE", "slow");
    world.set("AWS_ACCESS_KEY_ID", UNSET).set("AWS_SECRET_ACCESS_KEY", UNSET);
    world.init();
    world
}

/// How often the command was started since terraform had what it needed.
fn asked(world: &World) -> usize {
    world.read("asked").lines().count()
}

#[test]
fn a_command_that_is_slower_than_a_request_is_asked_once_and_the_lock_is_released() {
    let world = by_a_command(Lock::Both, &format!("sleep {}", SLOW.as_secs()));
    let run = world.start_apply(Subject::Tf);
    world.write("then", "");
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("tf: released the lock"), "{}", world.story(&end));
    world.assert_unlocked();
    assert_eq!(asked(&world), 1, "{}", world.story(&end));
}

/// A login that fails three times may lock an account, and each may be a message on somebody's telephone.
#[test]
fn a_command_that_fails_is_asked_once_and_named() {
    for (then, what) in [
        ("exit 3", "failed (exit status: 3)"),
        ("echo no; exit 0", "printed no credentials"),
        ("echo '{\"Version\":2}'; exit 0", "printed no credentials"),
    ] {
        let world = by_a_command(Lock::Both, then);
        let run = world.start_apply(Subject::Tf);
        world.write("then", "");
        run.kill_terraform();
        let end = run.wait();
        let named = format!("the credential_process of the profile slow {what}");
        assert!(end.err.contains(&named), "{then}: {}", world.story(&end));
        assert_eq!(asked(&world), 1, "{then}: {}", world.story(&end));
        world.assert_locked();
        // By the next tf, when it works again.
        fs::remove_file(world.directory.join("then")).unwrap();
        let end = world.run(Subject::Tf, &["locks", "recover"]);
        assert_eq!(end.code(), Some(0), "{then}: {}", world.story(&end));
        world.assert_unlocked();
    }
}

#[test]
fn a_command_that_nobody_waits_for_any_more_is_killed_with_all_that_it_started() {
    let world = by_a_command(Lock::File, "sleep 1000 & echo > waits; wait");
    let run = world.start_apply(Subject::Tf);
    world.write("then", "");
    run.kill_terraform();
    world.wait_for_file("waits");
    run.send(Signal::SIGINT);
    run.wait_for_err("another ^C leaves it");
    run.send(Signal::SIGINT);
    let end = run.wait();
    assert!(end.err.contains("^C ended the waiting"), "{}", world.story(&end));
    wait_until_all_is_gone(&world);
    world.assert_locked();
}

/// Kills the terraform of an apply at work in a terminal. From then on the command does what it was made for.
fn kill_the_terraform_of(world: &World, terminal: &Terminal) {
    world.wait_for_file("began");
    world.write("then", "");
    kill(terraform_below(terminal.pid()), Signal::SIGKILL).unwrap();
}

/// As bare terraform's SDK lets it: a code, a password.
#[test]
fn a_command_may_ask_the_person_at_the_terminal() {
    let world = by_a_command(Lock::File, ASKS);
    let mut command = world.command(world.bin().join("tf"));
    command.args(["apply", "-auto-approve", "-no-color"]);
    let mut terminal = Terminal::start(command);
    kill_the_terraform_of(&world, &terminal);
    terminal.wait_for("code: ");
    terminal.type_in("4711\r");
    terminal.wait_for("released the lock");
    terminal.wait();
    world.assert_unlocked();
}

/// A command that asks for a code at the terminal, and fails where there is none.
const ASKS: &str =
    "printf 'code: ' > /dev/tty || exit 7; read code < /dev/tty || exit 8; test \"$code\" = 4711 || exit 1";

/// An interactive shell.
fn interactive(world: &World) -> Terminal {
    let mut shell = world.command("bash");
    shell.args(["--norc", "--noprofile", "-i"]).env("PS1", "prompt> ");
    let terminal = Terminal::start(shell);
    terminal.wait_for("prompt> ");
    terminal
}

/// An apply at work in an interactive shell, which was told `line`. Its terraform is killed.
fn in_a_shell(world: &World, line: &str) -> Terminal {
    let mut terminal = interactive(world);
    terminal.type_in(&format!("{line}\r"));
    kill_the_terraform_of(world, &terminal);
    terminal
}

/// Moves the stopped job to the foreground, types the code, and ends the shell: the job releases its lock only then.
fn answer_in_the_foreground(world: &World, terminal: &mut Terminal) {
    world.assert_locked();
    let shell = terminal.pid();
    terminal.type_in("fg\r");
    let its_turn = || terminal.foreground().filter(|group| *group != shell);
    wait_for("the job's turn", its_turn, || terminal.screen());
    terminal.type_in("4711\r");
    terminal.wait_for("released the lock");
    terminal.type_in("exit\r");
    terminal.wait();
    world.assert_unlocked();
}

const APPLY: &str = "tf apply -auto-approve -no-color";

/// As with bare terraform, whose commands are in its group: the job stops, and goes on in the foreground.
#[test]
fn a_key_that_stops_a_command_stops_the_job_and_it_goes_on_in_the_foreground() {
    let world = by_a_command(Lock::File, ASKS);
    let mut terminal = in_a_shell(&world, APPLY);
    terminal.wait_for("code: ");
    terminal.type_in("\u{1a}");
    terminal.wait_for("Stopped");
    answer_in_the_foreground(&world, &mut terminal);
}

/// Nothing of `tf` takes the terminal that the shell reads.
#[test]
fn a_command_of_a_background_job_waits_for_its_turn_at_the_terminal() {
    let world = by_a_command(Lock::File, ASKS);
    let mut terminal = in_a_shell(&world, &format!("{APPLY} &"));
    let tf = tf_of(&world);
    let is_stopped = || (crate::support::process::state(tf) == Some('T')).then_some(());
    wait_for("a job that waits for the terminal", is_stopped, || terminal.screen());
    terminal.type_in("echo here is $((40 + 2))\r");
    terminal.wait_for("here is 42");
    let shell = terminal.pid();
    assert_eq!(terminal.foreground(), Some(shell), "{}", terminal.whole_screen());
    answer_in_the_foreground(&world, &mut terminal);
}

/// Without a terminal it fails: only who sits there can give back the lock that it has kept.
#[test]
fn what_gives_a_dead_runs_lock_back_may_ask_the_person_at_the_terminal() {
    for words in [&["locks", "recover"][..], &["locks", "release"], &["plan", "-no-color"]] {
        let world = by_a_command(Lock::DynamoDb, &unless_terraform(ASKS));
        super::survived::kill_whole(&world);
        world.write("then", "");
        let mut command = world.command(world.bin().join("tf"));
        command.args(words);
        let mut terminal = Terminal::start(command);
        // `release` looks at the lock first.
        let times = if words == ["locks", "release"] { 2 } else { 1 };
        for time in 1..=times {
            terminal.wait_for_times("code: ", time);
            terminal.type_in("4711\r");
        }
        let end = terminal.wait();
        assert_eq!(end.code(), Some(0), "{words:?}: {}", terminal.whole_screen());
        world.assert_unlocked();
    }
}

/// The shell sees the job stop, though it is a process below it that asks.
#[test]
fn a_key_that_stops_a_recovery_stops_the_job_and_it_goes_on_in_the_foreground() {
    let world = by_a_command(Lock::DynamoDb, &unless_terraform(ASKS));
    super::survived::kill_whole(&world);
    world.write("then", "");
    let mut terminal = interactive(&world);
    terminal.type_in("tf locks recover\r");
    terminal.wait_for("code: ");
    terminal.type_in("\u{1a}");
    terminal.wait_for("Stopped");
    answer_in_the_foreground(&world, &mut terminal);
}

/// A command that nobody waits for any more had switched the echo off, and cannot switch it on again.
#[test]
fn the_terminal_is_set_as_before_when_a_command_is_cut_off_or_dies() {
    for (traps, keys) in [("trap '' INT; ", 2), ("", 1)] {
        let world = by_a_command(Lock::File, &format!("{traps}stty -echo < /dev/tty; echo > waits; sleep 1000"));
        let mut shell = world.command("sh");
        shell.args(["-c", &format!("trap : INT; {APPLY}; stty -a; echo over")]);
        let mut terminal = Terminal::start(shell);
        kill_the_terraform_of(&world, &terminal);
        world.wait_for_file("waits");
        terminal.type_in("\u{3}");
        if keys == 2 {
            terminal.wait_for("another ^C leaves it");
            terminal.type_in("\u{3}");
        }
        terminal.wait_for("over");
        terminal.wait();
        let screen = terminal.whole_screen();
        assert!(screen.contains(" echo ") && !screen.contains("-echo "), "{screen}");
        wait_until_all_is_gone(&world);
    }
}

/// What terraform itself starts gives credentials at once; what `tf` starts counts itself in `ours`, and does `what`.
fn unless_terraform(what: &str) -> String {
    format!(
        "above=$(ps -o ppid= -p $PPID); case $(ps -o comm= -p $PPID)$(ps -o comm= -p $above) in *terraform*) ;; *) \
         echo ours >> ours; {what};; esac"
    )
}

/// Of a refused run there is only something to explain: nobody is asked for a code for that, nobody waits for the command, and
/// the next runs do not wait for all that was not explained before.
#[test]
fn an_explanation_asks_nobody_for_anything_and_runs_do_not_add_up() {
    let world = by_a_command(Lock::DynamoDb, &unless_terraform("printf 'code: ' > /dev/tty; sleep 1000"));
    world.lock_of_another();
    let mut before = 0;
    for run in 1..=4 {
        world.write("then", "");
        let mut command = world.command(world.bin().join("tf"));
        command.args(["plan", "-no-color"]);
        let mut terminal = Terminal::start(command);
        let end = terminal.wait();
        let screen = terminal.whole_screen();
        assert_eq!(end.code(), Some(1), "{run}: {screen}");
        assert!(screen.contains("Error acquiring the state lock") && !screen.contains("code: "), "{run}: {screen}");
        let ours = world.read("ours").lines().count();
        assert!((1..=2).contains(&(ours - before)), "{run}: {} starts: {screen}", ours - before);
        before = ours;
    }
}

/// Each try of them may be a message on somebody's telephone.
#[test]
fn a_run_that_waits_does_not_ask_again_and_again_for_credentials_that_nobody_gives() {
    let world = by_a_command(Lock::DynamoDb, &unless_terraform("exit 3"));
    super::survived::kill_whole(&world);
    world.write("then", "");
    // Longer than the time after which a dead run is tried again.
    let end = world.run(Subject::Tf, &["plan", "-no-color", "-lock-timeout=18s"]);
    assert_eq!(end.code(), Some(1), "{}", world.story(&end));
    assert!(end.err.contains("failed (exit status: 3)"), "{}", world.story(&end));
    assert_eq!(world.read("ours").lines().count(), 2, "the recovery, and an explanation: {}", world.story(&end));
}

/// A world whose credentials are those of a role, and what STS does each time that it is asked for that.
fn by_a_role(rule: impl Fn() -> Deed + Send + Sync + 'static) -> (World, Proxy) {
    let mut world = World::empty(Lock::DynamoDb);
    let sts = Proxy::start(cloud().port, move |request| {
        if String::from_utf8_lossy(&request.body).contains("Action=AssumeRole") { rule() } else { Deed::Pass }
    });
    world.set("AWS_ENDPOINT_URL_STS", format!("http://127.0.0.1:{}", sts.port));
    world.write_main("", WAITS);
    let block = "assume_role = { role_arn = \"arn:aws:iam::000000000000:role/locker\" }\nkey =";
    world.write("main.tf", &world.read("main.tf").replacen("key =", block, 1));
    world.init();
    (world, sts)
}

/// STS, or an instance's metadata, may be away for a moment as any service may.
#[test]
fn who_gives_credentials_and_is_away_for_a_moment_is_asked_again() {
    let away = Arc::new(AtomicUsize::new(0));
    let left = Arc::clone(&away);
    let (world, _sts) = by_a_role(move || {
        let fails = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok();
        if fails { Deed::Answer(Message::answer("503 Service Unavailable", "")) } else { Deed::Pass }
    });
    let run = world.start_apply(Subject::Tf);
    // More than the tries of one question.
    away.store(7, Ordering::SeqCst);
    run.kill_terraform();
    let end = run.wait();
    assert_eq!(away.load(Ordering::SeqCst), 0, "{}", world.story(&end));
    assert!(end.err.contains("tf: released the lock"), "{}", world.story(&end));
    world.assert_unlocked();
}

/// A role, whose giver takes its time.
#[test]
fn a_role_that_is_slower_than_a_request_is_asked_for_once_and_the_lock_is_released() {
    let slow = Arc::new(AtomicUsize::new(usize::MAX));
    let seen = Arc::clone(&slow);
    let (world, _sts) = by_a_role(move || {
        if seen.load(Ordering::SeqCst) != usize::MAX {
            seen.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(SLOW);
        }
        Deed::Pass
    });
    let run = world.start_apply(Subject::Tf);
    slow.store(0, Ordering::SeqCst);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("tf: released the lock"), "{}", world.story(&end));
    assert_eq!(slow.load(Ordering::SeqCst), 1, "{}", world.story(&end));
    world.assert_unlocked();
}

/// A refused role is no missing permission of the table.
#[test]
fn the_doctor_names_a_role_that_is_refused() {
    let mut world = World::new(Lock::Both, "true");
    let sts = Proxy::start(cloud().port, |request| {
        if String::from_utf8_lossy(&request.body).contains("Action=AssumeRole") {
            let body = "<ErrorResponse><Error><Type>Sender</Type><Code>AccessDenied</Code><Message>not you</Message></Error></ErrorResponse>";
            return Deed::Answer(Message::answer("403 Forbidden", body));
        }
        Deed::Pass
    });
    let config = "[profile role]\nrole_arn = arn:aws:iam::000000000000:role/locker\nsource_profile = keys\n\
                  [profile keys]\naws_access_key_id = test\naws_secret_access_key = test\n";
    world.write("config", config);
    let path = world.directory.join("config");
    world.set("AWS_CONFIG_FILE", path).set("AWS_PROFILE", "role");
    world.set("AWS_ACCESS_KEY_ID", UNSET).set("AWS_SECRET_ACCESS_KEY", UNSET);
    world.set("AWS_ENDPOINT_URL_STS", format!("http://127.0.0.1:{}", sts.port));
    let end = world.run(Subject::Tf, &["locks", "doctor"]);
    assert_eq!(end.code(), Some(2), "{}", world.story(&end));
    assert!(end.out.contains("not you") && end.out.contains("profile role"), "{}", world.story(&end));
    assert!(!end.out.contains("let these credentials do"), "{}", world.story(&end));
    let end = world.run(Subject::Tf, &["locks"]);
    assert_eq!(end.code(), Some(1), "{}", world.story(&end));
    assert!(end.err.contains("not you"), "{}", world.story(&end));
    wait_for("nothing of it", || marked(&home(&world)).is_empty().then_some(()), || world.trace());
}
