//! `tf locks show`, `release` and `audit`: the lock of a proven dead holder is released, that of a likely dead one
//! needs a confirmation, and that of a living one is not released.

use std::os::unix::process::ExitStatusExt;

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

use super::given_back::{is_dynamodb, through};
use super::survived::{assert_nothing_left, killed_whole};
use crate::support::cloud::{cloud, tool};
use crate::support::http::Message;
use crate::support::process::{Run, terraform_below};
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::terminal::Terminal;
use crate::support::test_env::{WAITS, id_of, lock_json, who};
use crate::support::{Ended, Lock, Subject, TestEnv, wait_for};

/// Runs `tf locks` with these words, in the directory of the [`TestEnv`].
pub fn locks(env: &TestEnv, words: &[&str]) -> Ended {
    let mut command = env.command(env.bin().join("tf"));
    command.arg("locks").args(words);
    Run::start(command).wait()
}

/// Creates a lock of this user on this host that is older than any boot. Its holder is likely dead, however long this
/// machine is up.
pub fn old_lock(env: &TestEnv) -> String {
    put_lock_of("2020-01-01T00:00:00Z".parse().unwrap(), env)
}

/// Creates a lock of this user on this host, created at `created`.
fn put_lock_of(created: jiff::Timestamp, env: &TestEnv) -> String {
    let mut info: Value =
        serde_json::from_str(&lock_json("22222222-3333-4444-5555-666666666666", &env.path())).unwrap();
    info["Created"] = created.to_string().into();
    let info = info.to_string();
    env.put_lock(&info);
    info
}

fn booted() -> jiff::Timestamp {
    jiff::Timestamp::from_second(crate::support::system::boot_time()).unwrap()
}

fn what_is_proven_dead_goes_without_a_question(lock: Lock) {
    let env = killed_whole(lock);
    let end = locks(&env, &["show"]);
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    assert!(end.out.contains("holder is  dead") && end.out.contains("every detail matches"), "{}", end.out);
    let end = locks(&env, &["release", "--dry-run"]);
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    env.assert_locked();
    let end = locks(&env, &["release"]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert!(end.out.contains("released the lock"), "{}", end.out);
    env.assert_unlocked();
    assert_nothing_left(&env);
}
for_each_lock!(what_is_proven_dead_goes_without_a_question);

#[test]
fn what_is_alive_stays_and_its_process_is_named() {
    let env = TestEnv::new(Lock::Both, WAITS);
    let run = env.start_apply(Subject::Tf);
    let terraform = terraform_below(run.pid());
    for words in [&["release"][..], &["release", "--yes"]] {
        let end = locks(&env, words);
        assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
        assert!(end.err.contains("alive") && end.err.contains(&terraform.to_string()), "{}", end.err);
        env.assert_locked();
    }
    let id = id_of(&env.locks()[0]);
    let end = locks(&env, &["release", "--force", "11111111-2222-3333-4444-555555555555"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    env.assert_locked();
    // Only its full ID releases it.
    let end = locks(&env, &["release", "--force", &id]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    env.assert_unlocked();
    env.unblock();
    drop(run);
}

#[test]
fn what_is_likely_dead_needs_a_yes() {
    // One lock is older than this boot. The other is from the first seconds after the boot: no terraform that runs now
    // is as old.
    let ages = ["2020-01-01T00:00:00Z".parse().unwrap(), booted() + jiff::SignedDuration::from_secs(10)];
    for (lock, created) in Lock::ALL.into_iter().flat_map(|lock| ages.map(|created| (lock, created))) {
        let env = TestEnv::new(lock, "true");
        put_lock_of(created, &env);
        let end = locks(&env, &["release"]);
        assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
        assert!(end.err.contains("likely dead") && end.err.contains("--yes"), "{}", end.err);
        env.assert_locked();
        let end = locks(&env, &["release", "--yes"]);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        env.assert_unlocked();
    }
}

#[test]
fn a_person_is_asked_and_only_yes_is_one() {
    for (answer, gone) in [("no", false), ("y", false), ("", false), ("yes", true)] {
        let env = TestEnv::new(Lock::Both, "true");
        old_lock(&env);
        let mut command = env.command(env.bin().join("tf"));
        command.args(["locks", "release"]);
        let mut terminal = Terminal::start(command);
        terminal.wait_for("Release it?");
        terminal.type_in(&format!("{answer}\r"));
        let (status, shown) = (terminal.wait(), terminal.whole_screen());
        assert_eq!(status.code(), Some(i32::from(!gone)), "{answer:?}: {shown}");
        assert_eq!(env.locks().is_empty(), gone, "{answer:?}: {shown}");
    }
}

/// Starts a release on a terminal, and waits for its question.
fn asked(env: &TestEnv) -> Terminal {
    let mut command = env.command(env.bin().join("tf"));
    command.args(["locks", "release"]);
    let terminal = Terminal::start(command);
    terminal.wait_for("Release it?");
    terminal
}

#[test]
fn an_interrupt_at_the_question_ends_tf_and_releases_nothing() {
    let env = TestEnv::new(Lock::Both, "true");
    old_lock(&env);
    let mut terminal = asked(&env);
    terminal.type_in("\u{3}");
    assert_eq!(terminal.wait().signal(), Some(Signal::SIGINT as i32), "{}", terminal.whole_screen());
    env.assert_locked();
}

#[test]
fn a_lock_that_changed_while_a_person_thought_stays_and_is_shown() {
    let env = TestEnv::new(Lock::Both, "true");
    old_lock(&env);
    let mut terminal = asked(&env);
    let other = env.lock_of_another();
    terminal.type_in("yes\r");
    let (status, shown) = (terminal.wait(), terminal.whole_screen());
    assert_eq!(status.code(), Some(1), "{shown}");
    assert!(shown.contains("it changed in the meantime") && shown.contains(&id_of(&other)), "{shown}");
    assert_eq!(env.locks(), [other.clone(), other]);
}

/// The printed commands show such a path with escaped characters.
#[test]
fn a_path_with_a_newline_is_found_by_what_is_printed_of_it() {
    let env = TestEnv::empty(Lock::DynamoDb);
    let path = format!("{}/new\nline", env.bucket);
    cloud().put_item(&env.table, &path, &lock_json("33333333-3333-4444-5555-666666666666", &path));
    let shown = format!("{}/new\\u{{a}}line", env.bucket);
    let end = locks(&env, &["show", "--table", &env.table, "--region", "us-east-1", &shown]);
    assert!(end.out.contains(&format!("Path       {shown}\n")), "{}", env.dump(&end));
    let command = end.out.lines().find_map(|line| line.split_once("tf locks release")).unwrap().1;
    let mut shell = env.command("sh");
    shell.args(["-c", &format!("tf locks release{command}")]);
    let end = Run::start(shell).wait();
    assert!(end.code() == Some(0) && end.out.contains("released"), "{command}: {}", env.dump(&end));
    let end = locks(&env, &["show", "--table", &env.table, "--region", "us-east-1", &shown]);
    assert!(end.err.contains(&format!("there is no lock at \"{shown}\"")), "{}", env.dump(&end));
}

/// The holder finishes while `tf` deletes its lock.
#[test]
fn a_lock_that_another_process_releases_first_is_not_recorded_as_released_by_a_person() {
    for parts in [Lock::DynamoDb, Lock::File, Lock::Both] {
        let mut env = TestEnv::new(parts, "true");
        let id = id_of(&old_lock(&env));
        let deletes = |request: &Message| is_dynamodb(request, ".DeleteItem") || request.start.starts_with("DELETE ");
        let proxy =
            through(&mut env, move |request| if deletes(request) { ProxyAction::Hold } else { ProxyAction::Pass });
        let mut command = env.command(env.bin().join("tf"));
        command.args(["locks", "release", "--force", &id]);
        let run = Run::start(command);
        proxy.wait_until_held();
        env.delete_lock();
        proxy.let_go();
        let end = run.wait();
        assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{parts:?}: {}", env.dump(&end));
        assert!(end.out.ends_with(&format!("the lock {id} is gone: another process released it\n")), "{}", end.out);
        let history = locks(&env, &["history", "--json"]);
        assert!(!history.out.contains(&id), "{}", history.out);
    }
}

#[test]
fn what_nothing_is_known_of_stays() {
    let env = TestEnv::new(Lock::DynamoDb, "true");
    let mut info: Value =
        serde_json::from_str(&lock_json("33333333-3333-4444-5555-666666666666", &env.path())).unwrap();
    for (name, value) in [("Who", "anna@elsewhere"), ("Created", "yesterday")] {
        info[name] = value.into();
        env.put_lock(&info.to_string());
        for words in [&["release"][..], &["release", "--yes"]] {
            let end = locks(&env, words);
            assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
            assert!(end.err.contains("--force 33333333-3333-4444-5555-666666666666"), "{}", end.err);
            env.assert_locked();
        }
    }
}

#[test]
fn a_path_must_match_exactly_one_lock() {
    let env = TestEnv::new(Lock::Both, "true");
    let end = locks(&env, &["release"]);
    assert_eq!((end.code(), end.out.as_str()), (Some(1), ""), "{}", end.err);
    assert!(end.err.contains(&format!("no lock is held for {}", env.path())), "{}", end.err);
    assert!(end.err.contains(&format!("type: tf locks list --table {} --region us-east-1", env.table)), "{}", end.err);
    let end = locks(&env, &["release", "--no-lock"]);
    assert_eq!((end.code(), end.out.as_str()), (Some(1), ""), "{}", end.err);
    assert!(end.err.contains("nothing was deleted: --no-lock found nothing"), "{}", end.err);
    // Each part has another ID.
    cloud().put_item(&env.table, &env.path(), &lock_json("aaaaaaaa-3333-4444-5555-666666666666", &env.path()));
    let other = lock_json("bbbbbbbb-3333-4444-5555-666666666666", &env.path());
    cloud().s3("PUT", &format!("{}.tflock", env.path()), other.as_bytes());
    let end = locks(&env, &["show"]);
    assert_eq!(end.code(), Some(1), "{}", end.out);
    assert!(
        end.err.contains("several locks") && end.err.contains("aaaaaaaa") && end.err.contains("bbbbbbbb"),
        "{}",
        end.err
    );
    let end = locks(&env, &["show", "bbbbbbbb-3333-4444-5555-666666666666"]);
    assert!(end.out.contains("another lock, with another ID"), "{}{}", end.out, end.err);
    let end = locks(&env, &["show", "nowhere"]);
    assert!(end.code() == Some(1) && end.err.contains("no lock matches"), "{}", end.err);
}

#[test]
fn a_lock_is_released_outside_of_any_directory() {
    let env = TestEnv::new(Lock::DynamoDb, "true");
    old_lock(&env);
    let mut command = env.command(env.bin().join("tf"));
    command.current_dir("/").args([
        "locks",
        "release",
        &env.path(),
        "--yes",
        "--table",
        &env.table,
        "--region",
        "us-east-1",
    ]);
    let end = Run::start(command).wait();
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    env.assert_unlocked();
}

/// Runs `tf locks release --yes` for the lock of `env`, outside of any directory.
fn release_outside(env: &TestEnv, place: [&str; 2]) -> Ended {
    let mut command = env.command(env.bin().join("tf"));
    command.current_dir("/").args(["locks", "release", &env.path(), "--yes", "--region", "us-east-1"]).args(place);
    Run::start(command).wait()
}

/// The object alone refuses every run, and the item alone too.
#[test]
fn a_release_from_a_table_releases_the_object_too_and_one_from_a_bucket_says_that_there_may_be_an_item() {
    let env = TestEnv::new(Lock::Both, "true");
    old_lock(&env);
    let end = release_outside(&env, ["--table", &env.table]);
    assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", env.dump(&end));
    env.assert_unlocked();
    old_lock(&env);
    let end = release_outside(&env, ["--bucket", &env.bucket]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    let next = format!("type: tf locks release --table TABLE --region us-east-1 {}", env.path());
    assert!(end.err.contains("if the backend names a DynamoDB table too") && end.err.contains(&next), "{}", end.err);
    assert_eq!(env.locks().len(), 1, "{:?}", env.locks());
    let end = release_outside(&env, ["--table", &env.table]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    env.assert_unlocked();
}

/// The other part is another lock, or is not a lock. It is not released, and every run is still refused.
#[test]
fn a_release_from_a_table_fails_if_the_object_still_refuses_every_run() {
    let env = TestEnv::new(Lock::Both, "true");
    let other = lock_json("44444444-3333-4444-5555-666666666666", &env.path());
    for (object, said) in [
        (other.as_str(), "every run is still refused, because the other part of this lock is another lock"),
        ("<html>", "every run is refused by something that is not a lock"),
    ] {
        old_lock(&env);
        cloud().s3("PUT", &format!("{}.tflock", env.path()), object.as_bytes());
        let end = release_outside(&env, ["--table", &env.table]);
        assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
        assert!(end.out.contains("released the lock") && end.err.contains(said), "{}", env.dump(&end));
        assert_eq!(env.locks(), [object], "{}", env.dump(&end));
        // The command that it names works.
        let (_, next) = end.err.rsplit_once("type: tf locks ").unwrap();
        let mut command = env.command(env.bin().join("tf"));
        command.current_dir("/").arg("locks").args(next.split_whitespace());
        if object == "<html>" {
            command.arg("--yes");
        }
        let end = Run::start(command).wait();
        assert_eq!(end.code(), Some(0), "{next}: {}", env.dump(&end));
        assert_eq!(env.locks().is_empty(), object == "<html>", "{next}: {}", env.dump(&end));
    }
}

/// The credentials permit the table alone.
#[test]
fn a_release_from_a_table_does_not_need_to_read_the_object() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let proxy = Proxy::start(cloud().port, |request| {
        let is_object = request.is_ours() && request.start.contains(".tflock");
        if is_object { ProxyAction::Answer(request.denied()) } else { ProxyAction::Pass }
    });
    env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    old_lock(&env);
    let end = release_outside(&env, ["--table", &env.table]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert!(end.err.contains("the .tflock objects were not checked"), "{}", env.dump(&end));
    env.assert_unlocked();
}

#[test]
fn an_audit_is_the_same_twice_and_a_real_parser_reads_it() {
    let env = TestEnv::new(Lock::DynamoDb, "true");
    old_lock(&env);
    let mut info: Value = serde_json::from_str(&lock_json("44444444-3333-4444-5555-666666666666", "a")).unwrap();
    info["Who"] = "anna@elsewhere".into();
    cloud().put_item(&env.table, "a", &info.to_string());
    cloud().put_item(&env.table, "junk", "{");
    let words = |form: &'static str| {
        ["audit", "--older-than", "1m", "--table", env.table.as_str(), "--region", "us-east-1", form]
    };
    let count = || {
        let end = locks(&env, &words("--json"));
        assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
        super::locks_list::assert_fits(&env, "audit", &end.out);
        let mut count: Value = serde_json::from_str(&end.out).unwrap();
        for name in ["oldest_age_seconds", "scan_seconds"] {
            assert!(count[name].take().as_f64().unwrap() > 0.0);
        }
        count
    };
    let first = count();
    assert_eq!(first, count());
    assert_eq!(
        (&first["likely_dead"], &first["stale"], &first["unreadable"]),
        (&json!(1), &json!(1), &json!(1)),
        "{first}"
    );
    assert_eq!(first["scanned"], json!(3));
    let end = locks(&env, &words("--prometheus"));
    assert_eq!(end.code(), Some(2));
    let script = "import sys, json\nfrom prometheus_client.parser import text_string_to_metric_families as parse\n\
                  print(json.dumps({s.name + ''.join(s.labels.values()): s.value for f in parse(open(sys.argv[1]).read()) for s in f.samples}))";
    let mut parser = env.command(tool("python3"));
    env.write("metrics", &end.out);
    parser.args(["-c", script, "metrics"]);
    let parsed = Run::start(parser).wait();
    let parsed: Value = serde_json::from_str(&parsed.out).unwrap_or_else(|_| panic!("{}", parsed.err));
    for (name, value) in [("tf_lockslikely_dead", 1.0), ("tf_locksunknown", 1.0), ("tf_locks_stale", 1.0)] {
        assert_eq!(parsed[name].as_f64(), Some(value), "{parsed}");
    }
    assert!(parsed["tf_locks_oldest_age_seconds"].as_f64().unwrap() > 60.0);
    // No lock is that old. But an item that is not a lock prevents a run, however old it is.
    let audit = ["audit", "--older-than", "9999d", "--table", &env.table, "--region", "us-east-1"];
    let end = locks(&env, &audit);
    assert_eq!((end.code(), end.out.lines().count()), (Some(2), 1), "{}", env.dump(&end));
    assert!(end.out.starts_with("unreadable   junk"), "{}", end.out);
    cloud().delete_item(&env.table, "junk");
    let end = locks(&env, &audit);
    assert_eq!((end.code(), end.out.as_str()), (Some(0), ""), "{}", env.dump(&end));
}

#[test]
fn an_old_lock_of_nobody_known_is_stale_for_an_audit_and_for_nothing_else() {
    let env = TestEnv::new(Lock::File, "true");
    let mut info: Value =
        serde_json::from_str(&lock_json("55555555-3333-4444-5555-666666666666", &env.path())).unwrap();
    info["Who"] = "anna@elsewhere".into();
    info["Created"] = "2026-01-01T00:00:00Z".into();
    env.put_lock(&info.to_string());
    assert_eq!(locks(&env, &[]).code(), Some(0));
    let end = locks(&env, &["audit", "--older-than", "2h"]);
    assert_eq!(end.code(), Some(2), "{}", env.dump(&end));
    assert!(end.out.contains("anna@elsewhere"), "{}", end.out);
    let end = locks(&env, &["audit"]);
    assert!(end.code() == Some(1) && end.err.contains("--older-than"), "{}", end.err);
}

/// Terraform cannot know whether the holder is alive.
#[test]
fn a_refused_terraform_is_told_whose_lock_it_is() {
    for (release, subject) in [("auto", Subject::Tf), ("never", Subject::Tf), ("auto", Subject::Bare)] {
        let mut env = TestEnv::new(Lock::Both, "true");
        env.set("TFW_RELEASE", release);
        old_lock(&env);
        let end = env.run(subject, &["plan", "-no-color"]);
        assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
        assert!(!end.out.contains("tf:"), "{}", end.out);
        assert_eq!(end.err.contains("the holder is likely dead"), subject == Subject::Tf, "{}", end.err);
        if subject == Subject::Tf {
            let (terraforms, ours) = end.err.rsplit_once("tf: the lock is held by").unwrap();
            assert!(terraforms.contains("Error acquiring the state lock"), "{terraforms}");
            assert!(ours.contains(&who()) && ours.contains("tf locks release 22222222-"), "{ours}");
        }
        env.assert_locked();
    }
}

#[test]
fn a_refused_terraform_is_told_that_the_holder_lives() {
    let env = TestEnv::new(Lock::DynamoDb, WAITS);
    let run = env.start_apply(Subject::Tf);
    let end = env.run(Subject::Tf, &["plan", "-no-color"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(end.err.contains("the holder is alive: held by terraform apply on this host"), "{}", end.err);
    env.assert_locked();
    env.unblock();
    assert_eq!(run.wait().code(), Some(0));
}

/// With -lock-timeout, terraform requests the lock again and again. If the holder dies meanwhile, its lock is released,
/// and terraform's next attempt succeeds.
fn a_lock_whose_holder_dies_is_given_back_while_terraform_waits(lock: Lock) {
    let env = TestEnv::new(lock, WAITS);
    let holder = env.start_apply(Subject::Tf);
    let waiting = env.start(Subject::Tf, &["plan", "-no-color", "-lock-timeout=60s"]);
    wait_for(
        "the second terraform to be refused",
        || (env.trace().matches("started terraform as").count() == 2).then_some(()),
        || env.trace(),
    );
    kill_with_guardian(&env, &holder);
    let end = waiting.wait();
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert!(
        end.err.contains("terraform is waiting for a lock") && end.err.contains("released the lock"),
        "{}",
        end.err
    );
    env.assert_unlocked();
    drop(holder);
}
for_each_lock!(a_lock_whose_holder_dies_is_given_back_while_terraform_waits);

/// The holder died after the refused run had looked for dead runs.
#[test]
fn a_run_that_a_dead_holder_refuses_releases_its_lock_and_says_so() {
    use crate::support::proxy::{Proxy, ProxyAction};
    let mut env = TestEnv::new(Lock::DynamoDb, WAITS);
    let holder = env.start_apply(Subject::Tf);
    let proxy = Proxy::start(cloud().port, |request| {
        let is_put = request.header("x-amz-target").is_some_and(|target| target.ends_with(".PutItem"));
        if is_put { ProxyAction::Hold } else { ProxyAction::Pass }
    });
    env.set("AWS_ENDPOINT_URL_DYNAMODB", format!("http://127.0.0.1:{}", proxy.port));
    let refused = env.start(Subject::Tf, &["plan", "-no-color"]);
    proxy.wait_until_held();
    kill_with_guardian(&env, &holder);
    proxy.let_go();
    let end = refused.wait();
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(end.err.contains("the holder is dead") && end.err.contains("run the command again"), "{}", env.dump(&end));
    env.assert_unlocked();
    drop(holder);
}

/// The same without a release.
#[test]
fn with_release_never_a_dead_holders_lock_stays_and_is_named() {
    let mut env = killed_whole(Lock::DynamoDb);
    env.set("TFW_RELEASE", "never");
    let end = env.run(Subject::Tf, &["plan", "-no-color"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(end.err.contains("the holder is dead") && end.err.contains("tf locks release"), "{}", end.err);
    env.assert_locked();
}

/// Kills a run with all its processes, and no process of another run in the same [`TestEnv`].
fn kill_with_guardian(env: &TestEnv, run: &Run) {
    use crate::support::process::tree;
    use crate::support::processes::{is_gone, ours};
    let guardians: Vec<_> = ours(env).into_iter().filter(|pid| *pid != run.pid()).collect();
    let mut doomed: Vec<_> = tree(run.pid()).into_iter().map(|(pid, ..)| pid).collect();
    let below = doomed.clone();
    doomed.retain(|pid| guardians.contains(pid));
    doomed.extend(below);
    for pid in &doomed {
        let _ = kill(*pid, Signal::SIGSTOP);
    }
    for pid in &doomed {
        let _ = kill(*pid, Signal::SIGKILL);
    }
    wait_for("the end of the run", || doomed.iter().all(|pid| is_gone(*pid)).then_some(()), || format!("{doomed:?}"));
}
