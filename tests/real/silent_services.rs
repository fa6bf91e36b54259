//! A service that does not respond to `tf`, responds slowly, or responds with something else: every wait is short,
//! nothing is requested hundreds of times, and the messages are about what happened.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;

use super::given_back::{takes_file, takes_item};
use super::locks_release::locks;
use super::survived::{kill_whole, killed_whole};
use crate::support::cloud::cloud;
use crate::support::http::Message;
use crate::support::process::Run;
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::test_env::{WAITS, id_of, lock_json};
use crate::support::{Lock, Subject, TestEnv, wait_for};

fn is_dynamodb(request: &Message) -> bool {
    request.header("x-amz-target").is_some()
}

/// Puts a proxy between a [`TestEnv`] and the services.
fn through(env: &mut TestEnv, rule: impl Fn(&Message) -> ProxyAction + Send + Sync + 'static) -> Proxy {
    let proxy = Proxy::start(cloud().port, rule);
    env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    proxy
}

/// Bare terraform returns immediately. `tf` has only an explanation to add.
fn a_refused_run_is_back_in_seconds_where_nobody_answers_tf(lock: Lock) {
    let mut env = TestEnv::new(lock, "true");
    env.lock_of_another();
    let _proxy = through(&mut env, |request| if request.is_ours() { ProxyAction::Hold } else { ProxyAction::Pass });
    let begun = Instant::now();
    let end = env.run(Subject::Tf, &["plan", "-no-color"]);
    assert_eq!(end.code(), Some(1), "{lock:?}: {}", env.dump(&end));
    assert!(begun.elapsed() < Duration::from_secs(9), "{lock:?} {:?}: {}", begun.elapsed(), env.dump(&end));
    assert!(!end.err.contains("tf:"), "{lock:?}: {}", env.dump(&end));
    let recovered = locks(&env, &["recover"]);
    assert_eq!((recovered.code(), recovered.out.as_str()), (Some(0), ""), "{lock:?}: {}", env.dump(&recovered));
}
for_each_lock!(a_refused_run_is_back_in_seconds_where_nobody_answers_tf);

/// How long the service takes for a delete: longer than the limit for an explanation (3 s), and shorter than the limit
/// for a release (20 s).
const SLOW: Duration = Duration::from_secs(5);

/// The service loses the response to terraform's lock request, so terraform's own retry refuses it. The lock is this
/// run's, and the limit of 3 s for the explanation of a refusal does not apply to its release.
fn a_run_that_its_own_lock_refuses_releases_it_from_a_slow_service(lock: Lock) {
    for (subject, left) in [(Subject::Bare, true), (Subject::Tf, false)] {
        let mut env = TestEnv::new(lock, "true");
        let once = AtomicBool::new(true);
        let _proxy = through(&mut env, move |request| {
            if (takes_item(request) || lock == Lock::File && takes_file(request)) && once.swap(false, Ordering::SeqCst)
            {
                return ProxyAction::LoseAnswer;
            }
            if request.is_ours() && (request.asks_for("DeleteItem") || request.start.starts_with("DELETE ")) {
                std::thread::sleep(SLOW);
            }
            ProxyAction::Pass
        });
        let end = env.run(subject, &["plan", "-no-color"]);
        assert_eq!(end.code(), Some(1), "{subject:?} {lock:?}: {}", env.dump(&end));
        assert!(end.err.contains("Error acquiring the state lock"), "{subject:?} {lock:?}: {}", env.dump(&end));
        assert_eq!(!env.locks().is_empty(), left, "{subject:?} {lock:?}: {}", env.dump(&end));
    }
}
for_each_lock!(a_run_that_its_own_lock_refuses_releases_it_from_a_slow_service);

/// How long the service takes for each response to `tf`. A part of a lock takes three of them: it is read, deleted, and
/// read again.
const SLOW_RESPONSE: Duration = Duration::from_millis(2500);

/// The time for a part of the lock is not what an earlier part has left of a share of its own.
fn a_service_that_takes_long_for_each_response_has_time_for_every_part(lock: Lock) {
    let mut env = TestEnv::new(lock, WAITS);
    let is_slow = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&is_slow);
    let _proxy = through(&mut env, move |request| {
        if flag.load(Ordering::SeqCst) && request.is_ours() {
            std::thread::sleep(SLOW_RESPONSE);
        }
        ProxyAction::Pass
    });
    let run = env.start_apply(Subject::Tf);
    is_slow.store(true, Ordering::SeqCst);
    run.kill_terraform();
    let end = run.wait();
    is_slow.store(false, Ordering::SeqCst);
    assert!(end.err.contains("released the lock"), "{lock:?}: {}", env.dump(&end));
    assert!(!end.err.contains("not released"), "{lock:?}: {}", env.dump(&end));
    env.assert_unlocked();
    let recovered = locks(&env, &["recover"]);
    assert_eq!((recovered.code(), recovered.out.as_str()), (Some(0), ""), "{lock:?}: {}", env.dump(&recovered));
}
for_each_lock!(a_service_that_takes_long_for_each_response_has_time_for_every_part);

/// The service has deleted the last part, and answers the read that shows it only after the time limit.
fn a_part_whose_delete_is_confirmed_late_is_looked_at_before_it_counts_as_not_released(lock: Lock) {
    const LATE: Duration = Duration::from_millis(20_500);
    let mut env = TestEnv::new(lock, WAITS);
    let begun = Arc::new(std::sync::OnceLock::<Instant>::new());
    let (since, is_deleted) = (Arc::clone(&begun), AtomicBool::new(false));
    let _proxy = through(&mut env, move |request| {
        let Some(since) = since.get().filter(|_| request.is_ours()) else { return ProxyAction::Pass };
        let is_of = |item: &str, object: &str| match lock {
            Lock::DynamoDb => request.asks_for(item),
            Lock::File | Lock::Both => request.start.starts_with(object) && request.start.contains(".tflock"),
        };
        if is_of("DeleteItem", "DELETE ") {
            is_deleted.store(true, Ordering::SeqCst);
        } else if is_of("GetItem", "GET ") && is_deleted.load(Ordering::SeqCst) {
            std::thread::sleep(LATE.saturating_sub(since.elapsed()));
        }
        ProxyAction::Pass
    });
    let run = env.start_apply(Subject::Tf);
    begun.set(Instant::now()).unwrap();
    run.kill_terraform();
    let end = run.wait();
    assert!(begun.get().unwrap().elapsed() < Duration::from_secs(26), "{lock:?}: {}", env.dump(&end));
    assert!(end.err.contains("released the lock"), "{lock:?}: {}", env.dump(&end));
    assert!(!end.err.contains("not released"), "{lock:?}: {}", env.dump(&end));
    env.assert_unlocked();
    let recovered = locks(&env, &["recover"]);
    assert_eq!((recovered.code(), recovered.out.as_str()), (Some(0), ""), "{lock:?}: {}", env.dump(&recovered));
}
for_each_lock!(a_part_whose_delete_is_confirmed_late_is_looked_at_before_it_counts_as_not_released);

/// The limit is 20 s for a lock that a killed run has left, whatever does not respond.
#[test]
fn a_killed_run_is_back_within_the_time_that_is_promised_where_nobody_answers() {
    for lock in [Lock::DynamoDb, Lock::Both] {
        let mut env = TestEnv::new(lock, WAITS);
        let silent = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&silent);
        let proxy = through(&mut env, move |request| {
            if flag.load(Ordering::SeqCst) && request.is_ours() { ProxyAction::Hold } else { ProxyAction::Pass }
        });
        let run = env.start_apply(Subject::Tf);
        silent.store(true, Ordering::SeqCst);
        run.kill_terraform();
        let begun = Instant::now();
        let end = run.wait();
        assert!(begun.elapsed() < Duration::from_secs(26), "{lock:?} {:?}: {}", begun.elapsed(), env.dump(&end));
        assert!(end.err.contains("was not released") && end.err.contains("no answer within"), "{}", env.dump(&end));
        env.assert_locked();
        silent.store(false, Ordering::SeqCst);
        proxy.let_go();
        let end = locks(&env, &["recover"]);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        env.assert_unlocked();
    }
}

/// Without a response, it is not known whether the table is a global table, in which nothing is deleted without
/// consent.
#[test]
fn a_lock_of_two_parts_stays_whole_while_the_table_is_silent() {
    let mut env = TestEnv::new(Lock::Both, WAITS);
    let silent = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&silent);
    let proxy = through(&mut env, move |request| {
        let holds = flag.load(Ordering::SeqCst) && request.is_ours() && is_dynamodb(request);
        if holds { ProxyAction::Hold } else { ProxyAction::Pass }
    });
    let run = env.start_apply(Subject::Tf);
    silent.store(true, Ordering::SeqCst);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("tf: DynamoDB: no answer within"), "{}", env.dump(&end));
    env.assert_locked();
    silent.store(false, Ordering::SeqCst);
    proxy.let_go();
    assert_eq!(locks(&env, &["recover"]).code(), Some(0));
    env.assert_unlocked();
}

#[test]
fn a_lock_object_that_trickles_in_keeps_nobody_waiting_for_its_end() {
    let mut env = TestEnv::new(Lock::File, WAITS);
    let slow = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&slow);
    let _proxy = through(&mut env, move |request| {
        let is_read = request.start.starts_with("GET ") && request.start.contains(".tflock");
        if flag.load(Ordering::SeqCst) && request.is_ours() && is_read {
            ProxyAction::Trickle
        } else {
            ProxyAction::Pass
        }
    });
    let run = env.start_apply(Subject::Tf);
    slow.store(true, Ordering::SeqCst);
    run.kill_terraform();
    let begun = Instant::now();
    let end = run.wait();
    assert!(begun.elapsed() < Duration::from_secs(26), "{:?}: {}", begun.elapsed(), env.dump(&end));
    assert!(end.err.contains("was not released"), "{}", env.dump(&end));
    let begun = Instant::now();
    let end = locks(&env, &["show"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(begun.elapsed() < Duration::from_secs(26), "{:?}: {}", begun.elapsed(), env.dump(&end));
    assert!(end.err.contains("timed out while reading the object"), "{}", env.dump(&end));
}

/// Terraform waits for a lock whose holder is dead. For a while the service does not let `tf` delete the lock, and then
/// it does.
#[test]
fn a_run_that_waits_tries_a_dead_holder_again() {
    let mut env = TestEnv::new(Lock::DynamoDb, WAITS);
    let away = Arc::new(AtomicBool::new(true));
    let flag = Arc::clone(&away);
    let _proxy = through(&mut env, move |request| {
        let is_delete = request.asks_for("DeleteItem");
        if flag.load(Ordering::SeqCst) && request.is_ours() && is_delete {
            ProxyAction::Answer(request.denied())
        } else {
            ProxyAction::Pass
        }
    });
    kill_whole(&env);
    let run = env.start(Subject::Tf, &["plan", "-no-color", "-lock-timeout=100s"]);
    run.wait_for_err("was not released");
    crate::support::wait_for(
        "the second terraform",
        || (env.trace().matches("started terraform as").count() == 2).then_some(()),
        || env.trace(),
    );
    away.store(false, Ordering::SeqCst);
    // The next attempt comes 15 s after the first. Terraform's own next attempt comes up to 16 s later.
    run.wait_for_err("released the lock that an earlier run left");
    let end = run.wait();
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert_eq!(end.err.matches("was not released").count(), 1, "{}", env.dump(&end));
    env.assert_unlocked();
}

#[test]
fn what_keeps_a_dead_run_is_said_once_in_a_run_that_it_refuses() {
    let mut env = TestEnv::new(Lock::DynamoDb, WAITS);
    let _proxy = through(&mut env, |request| {
        let is_delete = request.asks_for("DeleteItem");
        if request.is_ours() && is_delete { ProxyAction::Answer(request.denied()) } else { ProxyAction::Pass }
    });
    kill_whole(&env);
    for _ in 0..2 {
        let end = env.run(Subject::Tf, &["plan", "-no-color"]);
        assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
        assert_eq!(end.err.matches("was not released").count(), 1, "{}", env.dump(&end));
        let mut lines: Vec<&str> = end.err.lines().filter(|line| line.starts_with("tf:")).collect();
        let said = lines.len();
        lines.sort_unstable();
        lines.dedup();
        assert_eq!(lines.len(), said, "a line is said twice: {}", env.dump(&end));
    }
    env.assert_locked();
}

/// In such a store a conditional delete never succeeds.
#[test]
fn on_a_store_with_weak_etags_the_lock_is_named_after_few_requests() {
    let mut env = TestEnv::new(Lock::File, WAITS);
    let weak = Arc::new(AtomicBool::new(false));
    let asked = Arc::new(AtomicUsize::new(0));
    let (flag, count, path) = (Arc::clone(&weak), Arc::clone(&asked), env.path());
    let _proxy = through(&mut env, move |request| {
        if !flag.load(Ordering::SeqCst) || !request.is_ours() {
            return ProxyAction::Pass;
        }
        count.fetch_add(1, Ordering::SeqCst);
        if request.start.starts_with("GET ") && request.start.contains(".tflock") {
            let body = cloud().object(&format!("{path}.tflock")).unwrap();
            let mut answer = Message::answer("200 OK", &body);
            answer.headers.push(("ETag".into(), "W/\"0123456789abcdef\"".into()));
            return ProxyAction::Answer(answer);
        }
        ProxyAction::Pass
    });
    let run = env.start_apply(Subject::Tf);
    weak.store(true, Ordering::SeqCst);
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("only weak ETags"), "{}", env.dump(&end));
    assert!(asked.load(Ordering::SeqCst) < 10, "{} requests: {}", asked.load(Ordering::SeqCst), env.dump(&end));
    env.assert_locked();
}

/// `tf` does not keep sending requests to a service that confirms a delete and does nothing, or that says that it is
/// busy.
#[test]
fn a_service_that_does_not_do_it_is_asked_ever_more_rarely() {
    for busy in [true, false] {
        let mut env = TestEnv::new(Lock::DynamoDb, WAITS);
        let away = Arc::new(AtomicBool::new(false));
        let asked = Arc::new(AtomicUsize::new(0));
        let (flag, count) = (Arc::clone(&away), Arc::clone(&asked));
        let _proxy = through(&mut env, move |request| {
            if !flag.load(Ordering::SeqCst) || !request.is_ours() {
                return ProxyAction::Pass;
            }
            count.fetch_add(1, Ordering::SeqCst);
            let is_delete = request.asks_for("DeleteItem");
            if busy {
                let body = r#"{"__type":"com.amazonaws.dynamodb.v20120810#ProvisionedThroughputExceededException","message":"slow down"}"#;
                ProxyAction::Answer(Message::answer("400 Bad Request", body))
            } else if is_delete {
                ProxyAction::Answer(Message::answer("200 OK", "{}"))
            } else {
                ProxyAction::Pass
            }
        });
        let run = env.start_apply(Subject::Tf);
        away.store(true, Ordering::SeqCst);
        run.kill_terraform();
        let end = run.wait();
        assert!(end.err.contains("was not released"), "{}", env.dump(&end));
        let asked = asked.load(Ordering::SeqCst);
        assert!((4..130).contains(&asked), "{asked} requests: {}", env.dump(&end));
        env.assert_locked();
    }
}

/// A portal's page is not taken for a response of the service. Neither its text nor the details of a parser error are
/// shown.
#[test]
fn a_portals_page_is_said_to_be_no_answer() {
    const PAGE: &str = "<!DOCTYPE html><html><body><h1>Sign in to the hotel's network</h1></body></html>";
    for status in ["200 OK", "511 Network Authentication Required", "302 Found", "503 Service Unavailable"] {
        let mut env = TestEnv::new(Lock::Both, "true");
        let _proxy = through(&mut env, move |_| {
            let mut page = Message::answer(status, PAGE);
            page.headers[0].1 = "text/html".into();
            ProxyAction::Answer(page)
        });
        let (table, bucket) = (env.table.clone(), env.bucket.clone());
        for words in [
            &["list"][..],
            &["show"],
            &["doctor"],
            &["list", "--table", &table, "--region", "us-east-1"],
            &["list", "--bucket", &bucket, "--region", "us-east-1"],
            &["audit", "--older-than", "2h"],
        ] {
            let end = locks(&env, words);
            let said = format!("{}{}", end.out, end.err);
            assert!(!matches!(end.code(), Some(0)), "{status} {words:?}: {}", env.dump(&end));
            assert!(
                said.contains("a proxy or a login page may have sent it"),
                "{status} {words:?}: {}",
                env.dump(&end)
            );
            for dump in ["Decode", "Error {", "unhandled", "hotel", "<h1>", "its key is"] {
                assert!(!said.contains(dump), "{status} {words:?} {dump}: {}", env.dump(&end));
            }
        }
    }
}

#[test]
fn an_empty_answer_describes_no_table() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let _proxy = through(&mut env, |_| ProxyAction::Answer(Message::answer("200 OK", "{}")));
    let table = env.table.clone();
    let end = locks(&env, &["list", "--table", &table, "--region", "us-east-1"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(
        end.err.contains("the response does not describe a table") && !end.err.contains("its key is"),
        "{}",
        end.err
    );
}

/// A decision of the service will be the same at the next attempt.
#[test]
fn a_definite_answer_is_not_called_a_trouble_of_the_network() {
    let no_key = Message::answer(
        "400 Bad Request",
        "<?xml version=\"1.0\"?><Error><Code>InvalidRequest</Code><Message>The object was stored using a form of Server \
         Side Encryption. The correct parameters must be provided to retrieve the object.</Message></Error>",
    );
    let unknown = Message::answer(
        "501 Not Implemented",
        "<?xml version=\"1.0\"?><Error><Code>NotImplemented</Code><Message>A header you provided implies functionality \
         that is not implemented</Message></Error>",
    );
    for (answer, expected) in [
        (no_key, "the service refused the request; correct the cause above, and try again"),
        (unknown, "this service does not support that"),
    ] {
        let mut env = TestEnv::new(Lock::File, "true");
        env.lock_of_another();
        let _proxy = through(&mut env, move |request| {
            let is_read = request.start.starts_with("GET ") && request.start.contains(".tflock");
            if request.is_ours() && is_read { ProxyAction::Answer(answer.clone()) } else { ProxyAction::Pass }
        });
        let begun = Instant::now();
        let end = locks(&env, &["show"]);
        assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
        assert!(end.err.contains(expected) && !end.err.contains("network"), "{}", env.dump(&end));
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    }
    // A table that has another key.
    let env = TestEnv::new(Lock::DynamoDb, "true");
    cloud().give_another_key(&env.table);
    let end = locks(&env, &["show"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    assert!(end.err.contains("as its only key") && !end.err.contains("network"), "{}", env.dump(&end));
}

/// DynamoDB may return an empty page in the middle of a segment.
#[test]
fn an_empty_page_is_not_the_end_of_a_table() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let info = lock_json("22222222-3333-4444-5555-666666666666", "behind");
    let _proxy = through(&mut env, move |request| {
        if !request.asks_for("Scan") {
            return ProxyAction::Pass;
        }
        let asked: serde_json::Value = serde_json::from_slice(&request.body).unwrap();
        let mut page = json!({ "Count": 0, "ScannedCount": 0, "Items": [] });
        if asked["Segment"] == 0 {
            match asked["ExclusiveStartKey"]["LockID"]["S"].as_str() {
                None => page["LastEvaluatedKey"] = json!({ "LockID": { "S": "one" } }),
                Some("one") => page["LastEvaluatedKey"] = json!({ "LockID": { "S": "two" } }),
                Some(_) => {
                    page = json!({ "Count": 1, "ScannedCount": 1, "Items": [
                        { "LockID": { "S": "behind" }, "Info": { "S": info } },
                    ] });
                }
            }
        }
        ProxyAction::Answer(Message::answer("200 OK", &page.to_string()))
    });
    let table = env.table.clone();
    let end = locks(&env, &["list", "--json", "--table", &table, "--region", "us-east-1"]);
    let all: serde_json::Value = serde_json::from_str(&end.out).unwrap();
    assert_eq!(all["locks"].as_array().unwrap().len(), 1, "{}", env.dump(&end));
    assert_eq!((&all["complete"], &all["scanned"]), (&json!(true), &json!(1)), "{}", env.dump(&end));
}

/// If the result cannot be written, that is an error.
#[test]
fn a_result_that_cannot_be_written_is_an_error() {
    let env = TestEnv::new(Lock::File, WAITS);
    let run = env.start_apply(Subject::Tf);
    let id = id_of(&env.locks()[0]);
    run.kill_terraform();
    assert!(run.wait().err.contains(&id));
    env.lock_of_another();
    for words in [
        "list",
        "list --json",
        "show",
        "history",
        "history --json",
        "doctor",
        "audit --older-than 2h --json",
        "audit --older-than 2h --prometheus",
        "--help",
        "shell-init bash",
    ] {
        for (to, code) in [(">&-", 1), (">/dev/full", 1)] {
            let mut shell = env.command("sh");
            shell.args(["-c", &format!("tf locks {words} {to}")]);
            let end = Run::start(shell).wait();
            assert_eq!(end.code(), Some(code), "{words} {to}: {}", env.dump(&end));
            assert!(end.err.contains("could not write"), "{words} {to}: {}", env.dump(&end));
        }
    }
    // If there is nothing to print, no reader is needed.
    let mut shell = env.command("sh");
    shell.args(["-c", "tf locks recover >&-"]);
    assert_eq!(Run::start(shell).wait().code(), Some(0));
}

#[test]
fn a_locale_without_unicode_gets_none() {
    let mut env = TestEnv::new(Lock::File, "true");
    let mut info: serde_json::Value =
        serde_json::from_str(&lock_json("22222222-3333-4444-5555-666666666666", &env.path())).unwrap();
    info["Who"] = format!("{}寿司@東京", "w".repeat(190)).into();
    info["Info"] = "x".repeat(300).into();
    env.put_lock(&info.to_string());
    for (locale, unicode) in [("C", false), ("POSIX", false), ("C.UTF-8", true)] {
        env.set("LC_ALL", locale);
        for words in [&["list"][..], &["show"]] {
            let end = locks(&env, words);
            assert_eq!(end.out.is_ascii(), !unicode, "{locale} {words:?}: {}", end.out);
        }
        let end = locks(&env, &["show"]);
        assert_eq!(end.out.contains('…'), unicode, "{locale}: {}", end.out);
        assert!(unicode || end.out.contains("xxx..."), "{locale}: {}", end.out);
    }
}

#[test]
fn a_dry_run_leaves_a_broken_record_where_it_is() {
    let env = killed_whole(Lock::File);
    let record = super::survived::records(&env).remove(0);
    std::fs::write(&record, "{").unwrap();
    for (words, stays) in [(&["recover", "--dry-run"][..], true), (&["list"], true), (&["recover"], false)] {
        let end = locks(&env, words);
        assert_eq!(record.exists(), stays, "{words:?}: {}", env.dump(&end));
        if words[0] == "recover" {
            assert_eq!(end.code(), Some(2), "{words:?}: {}", env.dump(&end));
            assert!(end.err.contains("could not read the record of an earlier run"), "{words:?}: {}", env.dump(&end));
            assert!(end.err.contains("that run may have left a state lock"), "{words:?}: {}", env.dump(&end));
        }
    }
}

/// The number of workspaces in the backend does not matter.
fn a_refused_run_looks_at_the_one_lock_that_refused_it(lock: Lock) {
    let mut env = TestEnv::new(lock, "true");
    for number in 0..30 {
        cloud().s3("PUT", &format!("{}/env:/w{number}/dir/prod.tfstate", env.bucket), b"{}");
    }
    env.lock_of_another();
    let asked = Arc::new(std::sync::Mutex::new(Vec::new()));
    let seen = Arc::clone(&asked);
    let _proxy = through(&mut env, move |request| {
        if request.is_ours() {
            let target = request.header("x-amz-target").unwrap_or_default();
            seen.lock().unwrap().push(format!("{} {target}", request.start));
        }
        ProxyAction::Pass
    });
    let end = env.run(Subject::Tf, &["plan", "-no-color"]);
    assert!(end.err.contains("tf: the lock is held by"), "{lock:?}: {}", env.dump(&end));
    let asked = asked.lock().unwrap();
    assert!(asked.len() <= 8, "{lock:?}: {asked:#?}");
    assert!(!asked.iter().any(|request| request.contains("list-type") || request.contains("Scan")), "{asked:#?}");
}
for_each_lock!(a_refused_run_looks_at_the_one_lock_that_refused_it);

/// Makes the pending request for the lock `id` half an hour older: it can no longer land, and no attempt was made just
/// now.
fn age_tombstone(env: &TestEnv, id: &str) {
    let tombstone = super::survived::journal(env).join(format!("tombstones/{id}.json"));
    let mut kept: serde_json::Value = serde_json::from_slice(&std::fs::read(&tombstone).unwrap()).unwrap();
    kept["since"] = (jiff::Timestamp::now() - jiff::SignedDuration::from_mins(30)).to_string().into();
    // The time since boot is left out, because the machine may have been booted later than that.
    kept.as_object_mut().unwrap().remove("boot");
    kept["tried"] = serde_json::Value::Null;
    std::fs::write(&tombstone, kept.to_string()).unwrap();
}

/// Terraform took its lock without getting the response, and `tf` could not ask either. The lock is looked for until
/// the service has responded.
#[test]
fn a_request_that_nobody_could_ask_about_is_looked_for_when_the_service_is_back() {
    let mut env = TestEnv::empty(Lock::DynamoDb);
    env.write_main("", "true");
    env.write("main.tf", &env.read("main.tf").replacen("key =", "max_retries = 1\nkey =", 1));
    env.init();
    let away = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&away);
    let proxy = through(&mut env, move |request| {
        if !flag.load(Ordering::SeqCst) && request.asks_for("PutItem") {
            flag.store(true, Ordering::SeqCst);
            return ProxyAction::LoseAnswer;
        }
        match (flag.load(Ordering::SeqCst), request.is_ours()) {
            (false, _) => ProxyAction::Pass,
            (true, true) => ProxyAction::Hold,
            (true, false) => ProxyAction::Answer(Message::answer("500 Internal Server Error", "{}")),
        }
    });
    let end = env.run(Subject::Tf, &["plan", "-no-color"]);
    assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
    env.assert_locked();
    let id = id_of(&env.locks()[0]);
    age_tombstone(&env, &id);
    away.store(false, Ordering::SeqCst);
    proxy.let_go();
    env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", cloud().port));
    let end = env.run(Subject::Tf, &["plan", "-no-color"]);
    assert!(end.err.contains("appeared after its terraform had died") && end.err.contains(&id), "{}", env.dump(&end));
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    env.assert_unlocked();
}

fn no_table() -> ProxyAction {
    let body = r#"{"__type":"com.amazonaws.dynamodb.v20120810#ResourceNotFoundException","message":"Requested resource not found"}"#;
    ProxyAction::Answer(Message::answer("400 Bad Request", body))
}

/// A proxy can have sent it, or the table may still be about to appear.
#[test]
fn one_answer_that_there_is_no_table_says_nothing_of_a_request_that_was_not_answered() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let looked = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&looked);
    let proxy = through(&mut env, move |request| {
        if !request.is_ours() && request.asks_for("PutItem") {
            return ProxyAction::Hold;
        }
        let is_first = request.is_ours() && request.asks_for("GetItem") && !flag.swap(true, Ordering::SeqCst);
        if is_first { no_table() } else { ProxyAction::Pass }
    });
    let run = env.start(Subject::Tf, &["plan", "-no-color"]);
    proxy.wait_until_held();
    run.kill_terraform();
    wait_for("a look of ours", || looked.load(Ordering::SeqCst).then_some(()), || env.trace());
    proxy.let_go();
    env.wait_for_trace("deleted");
    let end = run.wait();
    assert!(end.err.contains("tf: released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
}

/// The table may be restored under its name.
#[test]
fn a_lock_whose_table_is_away_is_released_when_the_table_is_back() {
    for how in ["recover", "release", "the next run"] {
        let mut env = TestEnv::new(Lock::DynamoDb, WAITS);
        let away = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&away);
        let _proxy = through(&mut env, move |request| {
            let is_away = flag.load(Ordering::SeqCst) && request.is_ours() && is_dynamodb(request);
            if is_away { no_table() } else { ProxyAction::Pass }
        });
        let run = env.start_apply(Subject::Tf);
        let id = id_of(&env.locks()[0]);
        away.store(true, Ordering::SeqCst);
        run.kill_terraform();
        let end = run.wait();
        assert!(end.err.contains("does not exist") && end.err.contains(&id), "{}", env.dump(&end));
        let end = locks(&env, &["recover"]);
        assert_eq!((end.code(), end.out.as_str()), (Some(0), ""), "{}", env.dump(&end));
        away.store(false, Ordering::SeqCst);
        // A run that this lock refuses reports that the holder is dead, and which command to type.
        let end = env.run(Subject::Tf, &["plan", "-no-color"]);
        assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
        assert!(
            end.err.contains("the holder is dead: the terraform that held the lock died on this host\n"),
            "{}",
            env.dump(&end)
        );
        env.assert_locked();
        match how {
            "the next run" => {
                age_tombstone(&env, &id);
                let end = env.run(Subject::Tf, &["plan", "-no-color"]);
                let said = end.err.contains("released a lock that a dead terraform left") && end.err.contains(&id);
                assert!(said, "{}", env.dump(&end));
                assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
            }
            command => {
                let end = locks(&env, &[command]);
                assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
                assert!(end.out.contains("released a lock that a dead terraform left"), "{}", env.dump(&end));
            }
        }
        env.assert_unlocked();
    }
}

/// A new run does not wait for all requests that were ever left unanswered.
#[test]
fn what_nobody_can_look_for_is_waited_for_once_in_a_while_however_much_it_is() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let _proxy = through(&mut env, |request| if request.is_ours() { ProxyAction::Hold } else { ProxyAction::Pass });
    env.lock_of_another();
    assert_eq!(env.run(Subject::Tf, &["plan", "-no-color"]).code(), Some(1));
    env.delete_lock();
    let kept = super::survived::journal(&env).join("tombstones");
    let first = std::fs::read_dir(&kept).unwrap().next().expect("a refusal that nobody could look at").unwrap().path();
    let first: serde_json::Value = serde_json::from_slice(&std::fs::read(first).unwrap()).unwrap();
    let copies = (0..20).map(|number| {
        let id = format!("{number:08x}-d70c-4132-39e0-d2abba1b3077");
        let path = kept.join(format!("{id}.json"));
        let mut copy = first.clone();
        copy["lock"]["id"] = id.into();
        copy["tried"] = serde_json::Value::Null;
        std::fs::write(&path, copy.to_string()).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
        path
    });
    let copies: Vec<std::path::PathBuf> = copies.collect();
    // With a lease, a run also looks at its lock before it starts terraform. So the requests cannot be counted.
    let looked = || env.trace().matches("pending request of 0000").count();
    for waits in [true, false] {
        let before = looked();
        let begun = Instant::now();
        let end = env.run(Subject::Tf, &["plan", "-no-color"]);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}: {}", begun.elapsed(), env.dump(&end));
        assert_eq!(looked() > before, waits, "{}", env.dump(&end));
    }
    assert!(copies.iter().all(|path| path.exists()), "it is still looked for");
}
