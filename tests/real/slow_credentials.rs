//! Credentials that take long, or that nobody gives: they are asked for once in a release, before its clock runs, and
//! whoever gave none is named.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::support::cloud::cloud;
use crate::support::household::{home, marked, wait_until_all_is_gone};
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

/// As bare terraform's SDK lets it: a code, a password.
#[test]
fn a_command_may_ask_the_person_at_the_terminal() {
    let world =
        by_a_command(Lock::File, "printf 'code: ' > /dev/tty; read code < /dev/tty; test \"$code\" = 4711 || exit 1");
    let mut command = world.command(world.bin().join("tf"));
    command.args(["apply", "-auto-approve", "-no-color"]);
    let mut terminal = Terminal::start(command);
    world.wait_for_file("began");
    world.write("then", "");
    let terraform = crate::support::process::terraform_below(terminal.pid());
    nix::sys::signal::kill(terraform, Signal::SIGKILL).unwrap();
    terminal.wait_for("code: ");
    terminal.type_in("4711\r");
    terminal.wait_for("released the lock");
    terminal.wait();
    world.assert_unlocked();
}

/// A role, whose giver takes its time.
#[test]
fn a_role_that_is_slower_than_a_request_is_asked_for_once_and_the_lock_is_released() {
    let mut world = World::empty(Lock::DynamoDb);
    let slow = Arc::new(AtomicUsize::new(usize::MAX));
    let seen = Arc::clone(&slow);
    let sts = Proxy::start(cloud().port, move |request| {
        let is_role = String::from_utf8_lossy(&request.body).contains("Action=AssumeRole");
        if is_role && seen.load(Ordering::SeqCst) != usize::MAX {
            seen.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(SLOW);
        }
        Deed::Pass
    });
    world.set("AWS_ENDPOINT_URL_STS", format!("http://127.0.0.1:{}", sts.port));
    world.write_main("", WAITS);
    let block = "assume_role = { role_arn = \"arn:aws:iam::000000000000:role/locker\" }\nkey =";
    world.write("main.tf", &world.read("main.tf").replacen("key =", block, 1));
    world.init();
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
    use crate::support::http::Message;
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
