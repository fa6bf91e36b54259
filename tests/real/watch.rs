//! `tf locks --watch` shows what changes, on a terminal and in a pipe.

use std::os::unix::process::ExitStatusExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::sys::signal::Signal;
use serde_json::{Value, json};

use super::terminal::shell;
use crate::support::cloud::cloud;
use crate::support::lease::record;
use crate::support::process::Run;
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::terminal::Terminal;
use crate::support::test_env::lock_json;
use crate::support::{Lock, Subject, TestEnv, system, wait_for};

const A: &str = "aaaaaaaa-3333-4444-5555-666666666666";
const B: &str = "bbbbbbbb-3333-4444-5555-666666666666";
const ENTER: &str = "\u{1b}[?1049h";
const LEAVE: &str = "\u{1b}[?25h\u{1b}[?1049l";

/// Creates the lock of another host, of whose holder nothing is known. Returns its ID.
fn lock_elsewhere(env: &TestEnv, id: &'static str) -> &'static str {
    let mut info: Value = serde_json::from_str(&lock_json(id, &env.path())).unwrap();
    info["Who"] = "anna@elsewhere".into();
    env.put_lock(&info.to_string());
    id
}

/// The commands in docs/locks.md.
#[test]
fn the_documented_commands_watch() {
    let env = TestEnv::new(Lock::DynamoDb, "true");
    let id = lock_elsewhere(&env, B);
    for line in ["tf locks --watch", "tf locks list --watch=30s --table terraform-locks --region us-east-1"] {
        let mut shell = env.command("sh");
        shell.args(["-c", &format!("exec {}", line.replace("terraform-locks", &env.table))]);
        let run = Run::start(shell);
        run.wait_for_out(id);
        run.send(Signal::SIGINT);
        let end = run.wait();
        assert_eq!((end.signal(), end.out.lines().count()), (Some(2), 1), "{line}: {}", env.dump(&end));
    }
}

fn watched(env: &TestEnv, words: &[&str]) -> std::process::Command {
    let mut command = env.command(env.bin().join("tf"));
    command.arg("locks").args(words);
    command
}

#[test]
fn on_a_terminal_the_table_is_redrawn_in_place_and_a_key_restores_the_screen() {
    let env = TestEnv::new(Lock::Both, "true");
    let mut terminal = Terminal::start(watched(&env, &["--watch=1s"]));
    terminal.wait_for("0 locks, 0 stale, at ");
    assert!(terminal.screen().starts_with("\u{1b}[?1049h"), "{:?}", terminal.screen());
    let id = lock_elsewhere(&env, B);
    terminal.wait_for(id);
    let screen = console::strip_ansi_codes(&terminal.screen()).replace('\r', "");
    assert!(screen.contains("1 lock, 0 stale, at ") && screen.contains("\n+ unknown    "), "{screen}");
    // The mark is shown for one round.
    wait_for(
        "the row without its mark",
        || console::strip_ansi_codes(&terminal.screen()).contains("\n  unknown    ").then_some(()),
        || terminal.screen(),
    );
    env.delete_lock();
    wait_for(
        "the row of the lock that is gone",
        || console::strip_ansi_codes(&terminal.screen()).contains("\n- unknown    ").then_some(()),
        || terminal.screen(),
    );
    terminal.type_in("\x03");
    let status = terminal.wait();
    let screen = terminal.whole_screen();
    assert_eq!(status.signal(), Some(2), "{screen}");
    assert_eq!(screen.matches(LEAVE).count(), 1, "{screen:?}");
    let (_, after) = screen.split_once(LEAVE).unwrap();
    assert!(after.replace("^C", "").trim().is_empty(), "{after:?}");
    // No frame writes below the last row or beside the last column.
    for line in console::strip_ansi_codes(&screen).lines() {
        assert!(line.trim_end().chars().count() <= 200, "{line:?}");
    }
}

#[test]
fn a_suspension_restores_the_screen_and_the_table_is_redrawn_after_it() {
    let env = TestEnv::new(Lock::DynamoDb, "true");
    let id = lock_elsewhere(&env, B);
    let mut terminal = shell(&env);
    // The next round would begin after an hour.
    terminal.type_in("tf locks list --watch=1h\r");
    terminal.wait_for(id);
    terminal.type_in("\u{1a}");
    terminal.wait_for("Stopped");
    let screen = terminal.screen();
    assert!(screen.find(LEAVE).is_some_and(|at| at < screen.find("Stopped").unwrap()), "{screen:?}");
    terminal.type_in("fg\r");
    terminal.wait_for_times(id, 2);
    terminal.wait_for_times("\u{1b}[?1049h", 2);
    terminal.type_in("\u{3}");
    terminal.wait_for_times(LEAVE, 2);
    terminal.type_in("exit\r");
    terminal.wait();
}

#[test]
fn a_terminal_that_is_resized_is_redrawn_at_once() {
    let env = TestEnv::new(Lock::DynamoDb, "true");
    let id = lock_elsewhere(&env, B);
    // The next round would begin after an hour.
    let mut terminal = Terminal::start(watched(&env, &["list", "--watch=1h"]));
    terminal.wait_for(id);
    assert!(terminal.screen().contains("SINCE"), "{}", terminal.screen());
    terminal.resize(10, 60);
    terminal.wait_for_times("\u{1b}[H", 2);
    let screen = terminal.screen();
    let (_, last) = screen.rsplit_once("\u{1b}[H").unwrap();
    let last = console::strip_ansi_codes(last).into_owned();
    assert!(!last.contains("SINCE") && last.contains("unknown    "), "{last}");
    assert!(last.lines().count() <= 10 && last.lines().all(|line| line.trim_end().chars().count() <= 60), "{last}");
    terminal.close();
    assert_eq!(terminal.wait().signal(), Some(Signal::SIGHUP as i32));
}

fn in_a_pipe_each_change_is_a_line_with_its_time(lock: Lock) {
    let env = TestEnv::new(lock, "true");
    let id = lock_elsewhere(&env, B);
    let run = Run::start(watched(&env, &["--watch=1s"]));
    run.wait_for_out(id);
    lock_elsewhere(&env, A);
    run.wait_for_out(A);
    env.delete_lock();
    wait_for("the release", || (run.out().lines().count() == 4).then_some(()), || run.out());
    run.send(Signal::SIGTERM);
    let end = run.wait();
    assert_eq!((end.signal(), end.err.as_str()), (Some(15), ""), "{}", env.dump(&end));
    let lines: Vec<Vec<&str>> =
        end.out.lines().map(|line| line.split("  ").filter(|word| !word.is_empty()).map(str::trim).collect()).collect();
    let words: Vec<&str> = lines.iter().map(|line| line[1]).collect();
    assert_eq!(words, ["held", "locked", "released", "released"], "{}", end.out);
    for line in &lines {
        assert!(line[0].parse::<jiff::Timestamp>().is_ok(), "{line:?}");
        assert_eq!((line[2], line[3]), ("unknown", env.path().as_str()), "{line:?}");
    }
    for (line, expected) in lines.iter().zip([id, A, id, A]) {
        assert!(line.contains(&expected), "{expected}: {line:?}");
    }
    assert!(!end.out.contains('\u{1b}'), "{:?}", end.out);
}
for_each_lock!(in_a_pipe_each_change_is_a_line_with_its_time);

/// Each round reads one item, which costs half a unit, so at 0.1 units a second the next one begins 5 s later at the
/// earliest. This test is about that delay.
#[test]
fn a_table_is_read_no_more_often_than_its_capacity_allows() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let id = lock_elsewhere(&env, B);
    let scans = Arc::<std::sync::Mutex<Vec<std::time::Instant>>>::default();
    let seen = Arc::clone(&scans);
    let proxy = Proxy::start(cloud().port, move |request| {
        if request.asks_for("Scan") {
            seen.lock().unwrap().push(std::time::Instant::now());
        }
        ProxyAction::Pass
    });
    env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    let table = env.table.clone();
    let words = ["list", "--table", &table, "--region", "us-east-1", "--rate", "0.1", "--watch=1s"];
    let run = Run::start(watched(&env, &words));
    run.wait_for_out(id);
    wait_for("the second scan", || (scans.lock().unwrap().len() >= 2).then_some(()), || run.err());
    run.send(Signal::SIGINT);
    let end = run.wait();
    assert_eq!(end.signal(), Some(2), "{}", env.dump(&end));
    let scans = scans.lock().unwrap();
    // The proxy sees a request slightly later than it begins.
    assert!((scans[1] - scans[0]).as_secs_f64() >= 4.8, "{:?}", scans[1] - scans[0]);
}

/// A service that fails later is no reason to end, and what was seen is not reported as released.
#[test]
fn a_round_that_fails_is_said_and_repeated() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let id = lock_elsewhere(&env, B);
    let is_away = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&is_away);
    let proxy = Proxy::start(cloud().port, move |request| {
        if flag.load(Ordering::SeqCst) && request.asks_for("GetItem") {
            let body = json!({ "__type": "com.amazon.coral.service#AccessDeniedException", "message": "no" });
            return ProxyAction::Answer(crate::support::http::Message::answer("400 Bad Request", &body.to_string()));
        }
        ProxyAction::Pass
    });
    env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    // A path is relative to the directory in which the watch was started, in every round.
    let directory = env.directory.file_name().unwrap().to_str().unwrap().to_owned();
    let mut command = watched(&env, &["--chdir", &directory, "--watch=1s"]);
    command.current_dir(env.directory.parent().unwrap());
    let run = Run::start(command);
    run.wait_for_out(id);
    is_away.store(true, Ordering::SeqCst);
    run.wait_for_err("tf: not up to date: ");
    is_away.store(false, Ordering::SeqCst);
    lock_elsewhere(&env, A);
    run.wait_for_out(A);
    wait_for("the release", || run.out().contains("  released  ").then_some(()), || run.out());
    run.send(Signal::SIGINT);
    let end = run.wait();
    let words: Vec<&str> = end.out.lines().map(|line| line.split_whitespace().nth(1).unwrap()).collect();
    assert_eq!(words, ["held", "locked", "released"], "{}", env.dump(&end));
}

/// The object of a lock may be all that shows a workspace, for example in a first run that has written no state.
#[test]
fn a_lock_that_was_all_of_its_workspace_is_reported_as_released() {
    let env = TestEnv::new(Lock::File, "true");
    let path = format!("{}/env:/green/dir/prod.tfstate", env.bucket);
    let object = format!("{path}.tflock");
    assert_eq!(cloud().s3("PUT", &object, lock_json(A, &path).as_bytes()).status(), 200);
    let run = Run::start(watched(&env, &["--watch=1s"]));
    run.wait_for_out(A);
    assert_eq!(cloud().s3("DELETE", &object, b"").status(), 204);
    wait_for("the release", || run.out().contains("  released  ").then_some(()), || run.out());
    run.send(Signal::SIGINT);
    let end = run.wait();
    assert!(end.out.lines().count() == 2 && end.out.matches(A).count() == 2, "{}", env.dump(&end));
}

/// In the background, the terminal belongs to another process.
#[test]
fn a_watch_in_the_background_leaves_the_terminal_alone() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let id = lock_elsewhere(&env, B);
    let rounds = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&rounds);
    let proxy = Proxy::start(cloud().port, move |request| {
        count.fetch_add(usize::from(request.asks_for("Scan")), Ordering::SeqCst);
        ProxyAction::Pass
    });
    env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    let mut terminal = shell(&env);
    let three_rounds = |terminal: &Terminal| {
        let begun = rounds.load(Ordering::SeqCst);
        let enough = || (rounds.load(Ordering::SeqCst) >= begun + 3).then_some(());
        wait_for("three rounds", enough, || terminal.screen());
    };
    let line = format!("tf locks list --watch=1s --region us-east-1 --table {} &\r", env.table);
    terminal.type_in(&line);
    three_rounds(&terminal);
    assert!(!terminal.screen().contains(ENTER), "{:?}", terminal.screen());
    terminal.type_in("fg\r");
    terminal.wait_for(ENTER);
    terminal.wait_for(id);
    terminal.type_in("\u{1a}");
    terminal.wait_for("Stopped");
    terminal.type_in("bg\r");
    three_rounds(&terminal);
    assert_eq!(terminal.screen().matches(ENTER).count(), 1, "{:?}", terminal.screen());
    terminal.type_in("fg\r");
    terminal.wait_for_times(ENTER, 2);
    terminal.type_in("\u{3}");
    terminal.wait_for_times(LEAVE, 2);
    terminal.type_in("exit\r");
    terminal.wait();
}

/// Then no process is in the background.
#[test]
fn a_watch_draws_on_a_terminal_that_is_not_its_controlling_terminal() {
    let env = TestEnv::new(Lock::DynamoDb, "true");
    let id = lock_elsewhere(&env, B);
    let mut command = env.command("setsid");
    command.args(["--wait", "tf", "locks", "--watch=1s"]);
    let mut terminal = Terminal::start(command);
    terminal.wait_for(ENTER);
    terminal.wait_for(id);
    terminal.close();
    terminal.wait();
}

/// A pager may not read on.
#[test]
fn a_signal_ends_a_command_whose_output_nobody_reads() {
    let env = TestEnv::new(Lock::DynamoDb, "true");
    // A pipe holds at most 64 KiB (pipe(7)). The output is larger.
    for batch in 0..16 {
        let put = |number: i32| {
            let path = format!("{}/{}/{batch}-{number}", env.bucket, "deep/".repeat(20));
            let info = lock_json(&format!("{batch:08x}-3333-4444-5555-{number:012x}"), &path);
            json!({ "PutRequest": { "Item": { "LockID": {"S": path}, "Info": {"S": info} } } })
        };
        let items: Vec<Value> = (0..25).map(put).collect();
        cloud().dynamodb("BatchWriteItem", &json!({ "RequestItems": { &*env.table: items } }));
    }
    let table = ["--region", "us-east-1", "--table", &env.table];
    for words in [&["list"][..], &["list", "--json"], &["--watch=1s"], &["audit", "--older-than", "0s"]] {
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            let (reader, writer) = std::io::pipe().unwrap();
            let mut command = watched(&env, words);
            command.args(table).stdout(writer).stderr(std::process::Stdio::null());
            let mut process = command.spawn().unwrap();
            drop(command);
            let begins = || (system::unread(&reader) > 0).then_some(());
            wait_for("the first bytes", begins, || system::unread(&reader).to_string());
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(process.id().cast_signed()), signal).unwrap();
            let ended = || process.try_wait().unwrap();
            let status = wait_for("the end", ended, || format!("{words:?} {signal}"));
            assert_eq!(status.signal(), Some(signal as i32), "{words:?}");
        }
    }
    // A terminal, for example of a session over a network that has stalled.
    for words in [&["list"][..], &["list", "--json"], &["--watch=1s"]] {
        let size = nix::pty::Winsize { ws_row: 24, ws_col: 200, ws_xpixel: 0, ws_ypixel: 0 };
        let pty = nix::pty::openpty(&size, None).unwrap();
        let mut command = watched(&env, words);
        command.args(table).stdout(pty.slave.try_clone().unwrap()).stderr(pty.slave);
        let mut process = command.spawn().unwrap();
        drop(command);
        let begins = || system::is_readable(&pty.master).then_some(());
        wait_for("the first bytes", begins, String::new);
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(process.id().cast_signed()), Signal::SIGTERM).unwrap();
        let ended = || process.try_wait().unwrap();
        let status = wait_for("the end", ended, || format!("{words:?}"));
        assert_eq!(status.signal(), Some(Signal::SIGTERM as i32), "{words:?}");
    }
}

/// The age of a lease is no change.
#[test]
fn a_verdict_that_changes_is_marked() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    env.set("TFW_LEASE", "off");
    env.lock_with_lease(&record(10, 3000));
    let screen = |terminal: &Terminal| console::strip_ansi_codes(&terminal.screen()).into_owned();
    let mut terminal = Terminal::start(watched(&env, &["--watch=1s"]));
    let run = Run::start(watched(&env, &["list", "--watch=1s"]));
    terminal.wait_for("1 lock, 0 stale");
    run.wait_for_out("held      alive");
    env.lock_with_lease(&record(11, 3000));
    // The next round has read it.
    terminal.wait_for_times("1 lock, 0 stale", 3);
    env.lock_with_lease(&record(3600, 300));
    run.wait_for_out("changed   likely_dead");
    let changed = || screen(&terminal).contains("\n~ likely dead").then_some(());
    wait_for("the mark", changed, || terminal.screen());
    let again = || screen(&terminal).contains("\n  likely dead").then_some(());
    wait_for("the row without its mark", again, || terminal.screen());
    terminal.type_in("\u{3}");
    terminal.wait();
    run.send(Signal::SIGINT);
    let end = run.wait();
    assert_eq!(end.out.lines().count(), 2, "{}", env.dump(&end));
}

/// A root that is read-only is common in a container.
#[test]
fn a_list_of_a_bucket_needs_no_temporary_file() {
    let mut env = TestEnv::new(Lock::File, "true");
    let id = lock_elsewhere(&env, B);
    env.set("TMPDIR", "/nonexistent");
    for words in [&["list"][..], &["list", "--json"], &["audit", "--older-than", "0s"]] {
        let mut command = watched(&env, words);
        command.args(["--region", "us-east-1", "--bucket", &env.bucket]);
        let end = Run::start(command).wait();
        assert!(end.out.contains(id) && !end.err.contains("temporary"), "{}", env.dump(&end));
    }
}

/// A permission that is missing later is no reason to report a lock as released that was not looked for.
#[test]
fn a_lock_that_a_round_may_not_look_for_is_not_reported_as_released() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let path = format!("{}/env:/green/dir/prod.tfstate", env.bucket);
    assert_eq!(cloud().s3("PUT", &path, b"{}").status(), 200);
    let item = json!({ "TableName": env.table, "Item": {
        "LockID": {"S": path}, "Info": {"S": lock_json(A, &path)}}});
    cloud().dynamodb("PutItem", &item);
    let id = lock_elsewhere(&env, B);
    let is_denied = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&is_denied);
    let rounds = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&rounds);
    let proxy = Proxy::start(cloud().port, move |request| {
        if flag.load(Ordering::SeqCst) && request.start.contains("list-type=2") {
            count.fetch_add(1, Ordering::SeqCst);
            return ProxyAction::Answer(request.denied());
        }
        ProxyAction::Pass
    });
    env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    let run = Run::start(watched(&env, &["--watch=1s"]));
    run.wait_for_out(A);
    run.wait_for_out(id);
    is_denied.store(true, Ordering::SeqCst);
    run.wait_for_err("permission denied: s3:ListBucket");
    let three = || (rounds.load(Ordering::SeqCst) >= 3).then_some(());
    wait_for("three rounds", three, || run.err());
    env.delete_lock();
    wait_for("the release", || run.out().contains("  released  ").then_some(()), || run.out());
    run.send(Signal::SIGINT);
    let end = run.wait();
    let words: Vec<&str> = end.out.lines().map(|line| line.split_whitespace().nth(1).unwrap()).collect();
    assert_eq!(words, ["held", "held", "released"], "{}", env.dump(&end));
    assert!(end.out.lines().nth(2).unwrap().contains(id), "{}", env.dump(&end));
    assert_eq!(end.err.matches("s3:ListBucket").count(), 1, "{}", env.dump(&end));
}

#[test]
fn a_lock_object_that_cannot_be_read_for_a_while_is_not_reported_as_released() {
    let mut env = TestEnv::new(Lock::File, "true");
    let id = lock_elsewhere(&env, B);
    let is_denied = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&is_denied);
    let proxy = Proxy::start(cloud().port, move |request| {
        let reads = request.start.starts_with("GET ") && request.start.contains(".tflock");
        if reads && flag.load(Ordering::SeqCst) { ProxyAction::Answer(request.denied()) } else { ProxyAction::Pass }
    });
    env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    let run = Run::start(watched(&env, &["list", "--watch=1s", "--region", "us-east-1", "--bucket", &env.bucket]));
    run.wait_for_out(id);
    is_denied.store(true, Ordering::SeqCst);
    run.wait_for_out("unreadable");
    is_denied.store(false, Ordering::SeqCst);
    let is_back = || (run.out().matches(id).count() == 2).then_some(());
    wait_for("the lock that can be read again", is_back, || run.out());
    // Another run takes the lock while it cannot be read.
    is_denied.store(true, Ordering::SeqCst);
    let is_away = || (run.out().matches("unreadable").count() == 2).then_some(());
    wait_for("the lock that cannot be read", is_away, || run.out());
    env.delete_lock();
    let other = lock_elsewhere(&env, A);
    is_denied.store(false, Ordering::SeqCst);
    wait_for("the release", || run.out().contains("  released  ").then_some(()), || run.out());
    env.delete_lock();
    let is_over = || (run.out().matches("  released  ").count() == 2).then_some(());
    wait_for("the other release", is_over, || run.out());
    run.send(Signal::SIGINT);
    let end = run.wait();
    let words: Vec<&str> = end.out.lines().map(|line| line.split_whitespace().nth(1).unwrap()).collect();
    let expected = ["held", "changed", "changed", "changed", "locked", "released", "released"];
    assert_eq!(words, expected, "{}", env.dump(&end));
    for (line, id) in end.out.lines().skip(4).zip([other, id, other]) {
        assert!(line.contains(id), "{}", env.dump(&end));
    }
}

/// A table is read for as long as somebody reads what is found.
#[test]
fn a_watch_ends_when_its_reader_has_gone() {
    let env = TestEnv::new(Lock::DynamoDb, "true");
    let id = lock_elsewhere(&env, B);
    let mut shell = env.command("sh");
    let script = format!("(tf locks list --watch=1s --region us-east-1 --table {}; echo end >&2) | head -1", env.table);
    shell.args(["-c", &script]);
    let run = Run::start(shell);
    run.wait_for_err("end");
    let end = run.wait();
    assert!(end.out.lines().count() == 1 && end.out.contains(id) && end.err == "end\n", "{}", env.dump(&end));
}

#[test]
fn an_interval_that_is_none_is_one_clear_line() {
    let env = TestEnv::empty(Lock::File);
    for (word, said) in [
        ("--watch=0", "--watch=0 is not a time"),
        ("--watch=x", "--watch=x is not a time"),
        ("--watch=", "--watch= is not a time"),
        ("--watch=25h", "--watch=25h is not a time"),
    ] {
        for words in [&["locks", word][..], &["locks", "list", word]] {
            let end = env.run(Subject::Tf, words);
            assert_eq!((end.code(), end.out.as_str()), (Some(1), ""), "{}", env.dump(&end));
            let is_one_line = end.err.lines().count() == 1 && end.err.contains("for example --watch=5s");
            assert!(is_one_line && end.err.starts_with(&format!("tf: {said}")), "{}", env.dump(&end));
        }
    }
    let several = ["locks", "list", "--watch", "--table", "one", "--table", "two"];
    let end = env.run(Subject::Tf, &several);
    assert!(
        end.code() == Some(1) && end.err.contains("works with one directory, table or bucket"),
        "{}",
        env.dump(&end)
    );
}
