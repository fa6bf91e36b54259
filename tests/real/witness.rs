//! `TFW_WITNESS`: a command of the user that is asked about a holder that nothing else settles.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::given_back::{is_dynamodb, through};
use super::large_tables::{Generated, ITEMS_FOR_A_LOCK};
use super::locks_release::locks;
use crate::support::lease::{LEASED, record};
use crate::support::process::Run;
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::test_env::{FAKETIME, lock_json};
use crate::support::{Ended, Lock, Subject, TestEnv, wait_for};

/// Makes `script` the witness. Its working directory is that of the [`TestEnv`].
fn witness(env: &mut TestEnv, script: &str) {
    env.write("witness", script);
    let path: PathBuf = env.directory.join("witness");
    env.set("TFW_WITNESS", format!("/bin/sh '{}'", path.display()));
}

/// A backend with the lock of an EC2 instance whose lease lapsed 47 min ago.
fn lapsed(lock: Lock) -> TestEnv {
    let mut env = TestEnv::new(lock, "true");
    env.set("TFW_LEASE", "off");
    let mut lapsed = record(2820, 300);
    lapsed["holder"]["cloud"] = "Amazon EC2 i-0123456789abcdef0".into();
    env.lock_with_lease(&lapsed);
    env
}

/// Returns the only lock of the directory, as JSON.
fn shown(env: &TestEnv) -> Value {
    let end = locks(env, &["show", "--json"]);
    let shown: Result<Value, _> = serde_json::from_str(&end.out);
    assert!(shown.is_ok(), "{}", env.dump(&end));
    shown.unwrap()["locks"][0].take()
}

fn assert_ended(env: &TestEnv, end: &Ended, code: i32, text: &str) {
    assert_eq!(end.code(), Some(code), "{}", env.dump(end));
    assert!(format!("{}{}", end.out, end.err).contains(text), "{text} {}", env.dump(end));
}

const DEAD: &str = r#"echo '{"verdict": "dead", "reason": "i-0123 is terminated"}'"#;

fn a_holder_that_a_witness_calls_dead_is_dead(lock: Lock) {
    let mut env = lapsed(lock);
    witness(&mut env, &format!("cat >> questions\nenv > environment\n{DEAD}"));
    for words in [&["list"][..], &["show"], &["audit", "--older-than", "0s"]] {
        let end = locks(&env, words);
        assert_ended(&env, &end, 2, "dead");
        assert!(end.out.contains("i-0123 is terminated"), "{}", env.dump(&end));
    }
    assert_eq!(shown(&env)["verdict"], "dead");
    // It learns what the lock contains, and gets nothing else from `tf`.
    let questions = env.read("questions");
    let question: Value = serde_json::from_str(questions.lines().next().unwrap()).unwrap();
    assert_eq!(question["lock"]["id"], LEASED);
    assert_eq!(question["holder"]["cloud"], "Amazon EC2 i-0123456789abcdef0");
    assert!(!env.read("environment").contains("TFW_WITNESS="));
    let end = locks(&env, &["release", "--dry-run"]);
    assert_ended(&env, &end, 2, "it would be released");
    env.assert_locked();
    env.write("questions", "");
    // A proof needs no question to a person, as that of the journal. It is made again right before the delete.
    let end = locks(&env, &["release"]);
    assert_ended(&env, &end, 0, "released the lock");
    assert!(end.err.contains("last write may still arrive; waiting 10 s"), "{}", env.dump(&end));
    env.assert_unlocked();
    assert_eq!(env.read("questions").lines().count(), 2);
    let history = locks(&env, &["history", "--json"]).out;
    assert!(history.contains("the holder is dead: TFW_WITNESS says dead: i-0123 is terminated"), "{history}");
}
for_each_lock!(a_holder_that_a_witness_calls_dead_is_dead);

/// It does not get a descriptor that `tf` has inherited either.
#[test]
fn a_witness_has_three_pipes_and_no_other_descriptor() {
    let mut env = lapsed(Lock::DynamoDb);
    // A redirection would be a descriptor of the shell, so find writes the file itself.
    let list = |file: &str| format!("find /proc/$$/fd -type l -fprintf {file} '%f %l\\n'");
    env.set("TFW_WITNESS", format!("{}; {DEAD}", list("its")));
    let end = env.run_in_shell(&format!("exec 7< main.tf; {}; tf locks show", list("ours")));
    assert_ended(&env, &end, 2, "i-0123 is terminated");
    let descriptors = |file: &str| -> BTreeMap<String, bool> {
        let list = env.read(file);
        let links = list.lines().filter_map(|line| line.split_once(' '));
        links.map(|(number, target)| (number.to_owned(), target.starts_with("pipe:["))).collect()
    };
    assert_eq!(descriptors("ours").get("7"), Some(&false), "{}", env.read("ours"));
    assert_eq!(descriptors("its"), ["0", "1", "2"].map(|number| (number.to_owned(), true)).into());
}

/// Sets up a scan that asks about 16 locks, which are in four segments of a table.
fn sixteen(env: &mut TestEnv) -> Proxy {
    env.set("TFW_LEASE", "off");
    Generated::new(16 * ITEMS_FOR_A_LOCK).serve(env)
}

const SCAN: [&str; 6] = ["list", "--table", "t", "--region", "us-east-1", "--json"];

/// Each witness waits for the fourth one. The pause is for a fifth one, which must not come.
#[test]
fn at_most_four_witnesses_run_at_the_same_time() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let _proxy = sixteen(&mut env);
    std::fs::create_dir(env.directory.join("running")).unwrap();
    witness(
        &mut env,
        "touch running/$$\necho >> begun\nwhile [ $(wc -l < begun) -lt 4 ]; do sleep 0.02; done\nsleep 0.3\n\
         ls running | wc -l >> counts\nrm running/$$\necho '{\"verdict\": \"alive\"}'",
    );
    let end = locks(&env, &SCAN);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert_eq!(end.out.matches(r#""verdict":"alive""#).count(), 16, "{}", env.dump(&end));
    let counts: Vec<u32> = env.read("counts").lines().map(|count| count.trim().parse().unwrap()).collect();
    assert_eq!((counts.len(), counts.iter().max()), (16, Some(&4)), "{counts:?}");
}

/// The clock of `tf` is 20 times as fast, if that is possible here, so the 20 s are 1 s.
#[test]
fn after_three_witnesses_that_hang_no_other_is_asked() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let _proxy = sixteen(&mut env);
    witness(&mut env, "echo >> asked\nexec sleep 1000");
    if Path::new(FAKETIME).exists() {
        env.set("LD_PRELOAD", FAKETIME).set("FAKETIME", "+0 x20");
    }
    let end = locks(&env, &SCAN);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    let asked = env.read("asked").lines().count();
    // When the third one was killed, three others may have been running.
    assert!((3..=6).contains(&asked), "{asked}");
    let with = |reason: &str| end.out.matches(reason).count();
    // Each reason is also in the evidence.
    assert_eq!(with("it gave no answer within 20 s and was killed"), 2 * asked, "{}", env.dump(&end));
    let not_asked = "it was not asked, because it gave no answer within 20 s before";
    assert_eq!(with(not_asked), 2 * (16 - asked), "{}", env.dump(&end));
    assert_eq!(with(r#""verdict":"unknown""#), 16, "{}", env.dump(&end));
}

#[test]
fn an_answer_that_has_changed_right_before_the_delete_keeps_the_lock() {
    for (second, code, text) in [
        ("unknown", 1, "it is no longer proven that the holder is dead"),
        ("alive", 1, "not released: the holder is alive"),
        ("dead", 0, "released the lock"),
    ] {
        let mut env = lapsed(Lock::DynamoDb);
        let script = format!("if mkdir first 2>/dev/null; then {DEAD}; else echo '{{\"verdict\": \"{second}\"}}'; fi");
        witness(&mut env, &script);
        let end = locks(&env, &["release"]);
        assert_ended(&env, &end, code, text);
        if code == 1 {
            env.assert_locked();
        }
    }
}

#[test]
fn a_witness_is_not_asked_about_a_holder_that_renews_its_lease() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    env.set("TFW_LEASE", "off");
    env.lock_with_lease(&record(40, 300));
    witness(&mut env, &format!("touch asked\n{DEAD}"));
    assert_eq!(shown(&env)["verdict"], "alive");
    assert_ended(&env, &locks(&env, &["release", "--yes"]), 1, "the holder is alive");
    assert!(!env.exists("asked"));
    env.assert_locked();
}

#[test]
fn a_witness_that_calls_a_holder_alive_keeps_its_lock() {
    let mut env = lapsed(Lock::DynamoDb);
    witness(&mut env, r#"echo '{"verdict": "alive", "reason": "the job is running"}'"#);
    assert_ended(&env, &locks(&env, &["list"]), 0, "alive");
    assert_ended(&env, &locks(&env, &["release", "--yes"]), 1, "TFW_WITNESS says alive: the job is running");
    env.assert_locked();
}

/// Nobody can look up a machine of which only a user name and a host name are known.
#[test]
fn without_an_identity_that_travelled_with_the_lock_a_death_is_only_likely() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let mut info: Value = serde_json::from_str(&lock_json(LEASED, &env.path())).unwrap();
    info["Who"] = "runner@fv-az1".into();
    env.put_lock(&info.to_string());
    witness(&mut env, &format!("cat > question\n{DEAD}"));
    let shown = shown(&env);
    assert_eq!(shown["verdict"], "likely_dead", "{shown}");
    let question: Value = serde_json::from_str(&env.read("question")).unwrap();
    assert_eq!(question["holder"], Value::Null);
    assert_ended(&env, &locks(&env, &["release"]), 1, "stdin is not a terminal");
    env.assert_locked();
    assert_ended(&env, &locks(&env, &["release", "--yes"]), 0, "released the lock");
    env.assert_unlocked();
}

#[test]
fn a_bad_witness_changes_no_verdict_and_is_shown_harmlessly() {
    let mut env = lapsed(Lock::DynamoDb);
    for (script, reason) in [
        ("echo garbage", "its answer is not"),
        ("echo '[\"dead\",\"x\"]'", "its answer is not"),
        (":", "it printed no answer"),
        ("echo no access >&2; exit 1", "it failed (exit status: 1): no access"),
        ("kill -9 $$", "it failed (exit status: 137)"),
        ("exec /nonexistent/witness", "/nonexistent/witness"),
        ("head -c 5000000 /dev/zero", "its answer is longer than 64 KiB"),
        ("printf '\\033]0;x\\007\\033[2J'", "\\u{1b}[2J"),
        ("printf '{\"verdict\": \"unknown\", \"reason\": \"\\\\u001b[2J\\\\u202e\"}'", "TFW_WITNESS says unknown: "),
    ] {
        witness(&mut env, script);
        let found = shown(&env);
        assert_eq!(found["verdict"], "likely_dead", "{script} {found}");
        assert!(found["reason"].as_str().unwrap().contains(reason), "{script} {found}");
        for words in [&["list"][..], &["show"], &["release"]] {
            let end = locks(&env, words);
            let all = format!("{}{}", end.out, end.err);
            assert!(!all.contains(['\u{1b}', '\u{7}', '\u{202e}']), "{script} {all}");
        }
        env.assert_locked();
    }
    env.set("TFW_WITNESS", "/nonexistent/witness");
    let reason = shown(&env)["reason"].to_string();
    assert!(reason.contains("(exit status: 127)") && reason.contains("not found"), "{reason}");
}

#[test]
fn a_witness_that_hangs_is_killed_with_everything_that_it_started() {
    let mut env = lapsed(Lock::DynamoDb);
    // The last one has lost its parent.
    witness(&mut env, "trap '' TERM INT HUP; sleep 1000 & (sleep 1000 & echo $! > orphan); echo $$ $! > pids; wait");
    let found = shown(&env);
    let reason = found["reason"].as_str().unwrap();
    assert!(reason.contains("it gave no answer within 20 s and was killed"), "{found}");
    assert_eq!(found["verdict"], "likely_dead");
    let pids = env.read("pids") + &env.read("orphan");
    let pids: Vec<i32> = pids.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
    assert_eq!(pids.len(), 3);
    let all_gone = || pids.iter().all(|pid| kill(Pid::from_raw(*pid), None).is_err()).then_some(());
    wait_for("the end of the witness", all_gone, || format!("{pids:?}"));
}

/// A command that dies of a signal does not leave the processes of the witness, which are in another session.
#[test]
fn an_interrupt_ends_every_process_of_the_witness() {
    let commands: [&[&str]; 6] = [
        &["list"],
        &["list", "--watch=1s"],
        &["show"],
        &["audit", "--older-than", "1h"],
        &["release", "--yes"],
        &["list", "--table", "TABLE", "--region", "us-east-1"],
    ];
    for words in commands {
        let mut env = lapsed(Lock::DynamoDb);
        witness(&mut env, "sleep 1000 & echo $$ $! > pids.new && mv pids.new pids; wait");
        let mut command = env.command(env.bin().join("tf"));
        command.arg("locks").args(words.iter().map(|word| if *word == "TABLE" { &env.table } else { *word }));
        let run = Run::start(command);
        let pids = || std::fs::read_to_string(env.directory.join("pids")).ok();
        let pids = wait_for("the witness", pids, || run.err());
        run.send(Signal::SIGINT);
        let end = run.wait();
        assert_eq!(end.signal(), Some(2), "{words:?}: {}", env.dump(&end));
        let pids: Vec<i32> = pids.split_whitespace().map(|pid| pid.parse().unwrap()).collect();
        let all_gone = || pids.iter().all(|pid| kill(Pid::from_raw(*pid), None).is_err()).then_some(());
        wait_for("the end of the witness", all_gone, || format!("{words:?} {pids:?}"));
        env.assert_locked();
    }
}

#[test]
fn a_watch_in_a_directory_asks_the_witness() {
    let mut env = lapsed(Lock::Both);
    witness(&mut env, DEAD);
    let mut command = env.command(env.bin().join("tf"));
    command.args(["locks", "list", "--watch=1s"]);
    let run = Run::start(command);
    run.wait_for_out("dead");
    run.send(Signal::SIGINT);
    let end = run.wait();
    assert!(end.out.contains("held      dead"), "{}", env.dump(&end));
}

/// Each round of `--watch` describes the table once.
#[test]
fn a_watch_asks_about_a_lock_once_a_minute() {
    let mut env = lapsed(Lock::DynamoDb);
    witness(&mut env, &format!("echo >> asked\n{DEAD}"));
    let rounds = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&rounds);
    let _proxy = through(&mut env, move |request| {
        count.fetch_add(usize::from(is_dynamodb(request, ".DescribeTable")), Ordering::SeqCst);
        ProxyAction::Pass
    });
    let mut command = env.command(env.bin().join("tf"));
    command.args(["locks", "list", "--watch=1s", "--table", &env.table, "--region", "us-east-1"]);
    let run = Run::start(command);
    wait_for("four rounds", || (rounds.load(Ordering::SeqCst) > 4).then_some(()), || run.err());
    run.send(Signal::SIGINT);
    let end = run.wait();
    assert!(end.out.contains("i-0123 is terminated"), "{}", env.dump(&end));
    assert_eq!(env.read("asked").lines().count(), 1, "{}", env.dump(&end));
}

/// A refused run and its recovery do not wait for a witness, and delete nothing because of it.
#[test]
fn a_run_of_terraform_asks_no_witness() {
    let mut env = lapsed(Lock::DynamoDb);
    witness(&mut env, &format!("touch asked\n{DEAD}"));
    let end = env.run(Subject::Tf, &["plan", "-no-color"]);
    assert_ended(&env, &end, 1, "the holder is likely dead");
    assert_ended(&env, &locks(&env, &["recover"]), 0, "");
    assert!(!env.exists("asked"));
    env.assert_locked();
}

/// Each lock is judged by its own answer, also in a scan.
#[test]
fn a_scan_asks_about_each_lock() {
    let mut env = lapsed(Lock::DynamoDb);
    let mut info: Value = serde_json::from_str(&lock_json("77777777-2222-3333-4444-555555555555", "x/y")).unwrap();
    info["Who"] = "anna@elsewhere".into();
    let item = json!({ "LockID": { "S": "x/y" }, "Info": { "S": info.to_string() } });
    crate::support::cloud::cloud().dynamodb("PutItem", &json!({ "TableName": env.table, "Item": item }));
    witness(
        &mut env,
        &format!("case $(cat) in *i-0123456789abcdef0*) {DEAD} ;; *) echo '{{\"verdict\": \"unknown\"}}' ;; esac"),
    );
    let end = locks(&env, &["list", "--table", &env.table, "--region", "us-east-1", "--json"]);
    let listed: Value = serde_json::from_str(&end.out).unwrap();
    let mut verdicts: Vec<_> = listed["locks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|lock| (lock["path"].to_string(), lock["verdict"].to_string()))
        .collect();
    verdicts.sort();
    assert_eq!(verdicts.len(), 2, "{listed}");
    assert!(verdicts.contains(&("\"x/y\"".into(), "\"unknown\"".into())), "{verdicts:?}");
    assert!(verdicts.contains(&(format!("\"{}\"", env.path()), "\"dead\"".into())), "{verdicts:?}");
}
