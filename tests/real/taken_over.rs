//! The lock of a host that is gone: its lease has lapsed, and the next run takes it over.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

use super::given_back::{is_dynamodb, through, through_changing};
use super::locks_recover::recover;
use super::survived::{assert_nothing_left, edit, forget_recorder, kill_whole, killed_whole, records, start_recorded};
use super::two_hosts::races;
use crate::support::cloud::cloud;
use crate::support::http::Message;
use crate::support::lease::{LEASED, record};
use crate::support::process::Run;
use crate::support::processes::{home, marked};
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::system::lock_byte;
use crate::support::test_env::{UNSET, WAITS, id_of, lock_json};
use crate::support::{Ended, Lock, Subject, TestEnv, wait_for};

const PLAN: [&str; 2] = ["plan", "-no-color"];

/// Hours, in seconds: a lease that lapsed so long ago is not watched.
pub const LONG_AGO: i64 = 3 * 3600;

fn leased(lock: Lock, lease: &str) -> TestEnv {
    let mut env = TestEnv::new(lock, "true");
    env.set("TFW_LEASE", lease);
    env
}

fn history(env: &TestEnv) -> Vec<Value> {
    let path = env.directory.parent().unwrap().join("home/.local/state/tf/history.jsonl");
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

pub fn takeovers(env: &TestEnv) -> usize {
    history(env).iter().filter(|event| event["event"] == "taken over").count()
}

#[track_caller]
fn assert_taken(env: &TestEnv, end: &Ended) {
    assert_eq!(end.code(), Some(0), "{}", env.dump(end));
    assert!(end.err.contains("released the lock: ") && end.err.contains(LEASED), "{}", env.dump(end));
    assert!(end.err.contains("https://ci.example/job/7"), "{}", env.dump(end));
    env.assert_unlocked();
    assert_eq!(takeovers(env), 1, "{:?}", history(env));
}

#[track_caller]
fn assert_not_taken(env: &TestEnv, end: &Ended) {
    assert_eq!(end.code(), Some(1), "{}", env.dump(end));
    assert!(end.err.contains("Error acquiring the state lock"), "{}", env.dump(end));
    assert!(!end.err.contains("released the lock"), "{}", env.dump(end));
    env.assert_locked();
    assert_eq!(takeovers(env), 0, "{:?}", history(env));
}

fn a_lease_that_lapsed_hours_ago_is_taken_without_a_wait(lock: Lock) {
    let mut env = leased(lock, "5m");
    let told = env.directory.join("told");
    env.set("TFW_ON_EVENT", format!("cat >> '{}'", told.display()));
    env.lock_with_lease(&record(LONG_AGO, 300));
    let end = env.run(Subject::Tf, &PLAN);
    assert_taken(&env, &end);
    assert_eq!(end.err.lines().filter(|line| line.starts_with("tf: ")).count(), 1, "{}", env.dump(&end));
    assert!(end.err.contains("3 h"), "{}", env.dump(&end));
    let event = &history(&env)[0];
    assert_eq!(event["holder"], "runner@fv-az1");
    assert!(event["why"].as_str().unwrap().contains("was last renewed 3 h 0 min ago"), "{event}");
    let line = wait_for("the event", || Some(env.read("told")).filter(|text| text.ends_with('\n')), || env.trace());
    assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), *event);
}
for_each_lock!(a_lease_that_lapsed_hours_ago_is_taken_without_a_wait);

fn a_lease_that_lapsed_just_now_is_watched_first(lock: Lock) {
    let env = leased(lock, "5s");
    // It lapses after 5.8 s, and is watched for 1.5 s.
    env.lock_with_lease(&record(8, 5));
    let end = env.run(Subject::Tf, &PLAN);
    assert_taken(&env, &end);
    assert!(end.err.contains("if nothing changes for 2 s"), "{}", env.dump(&end));
}
for_each_lock!(a_lease_that_lapsed_just_now_is_watched_first);

fn a_fresh_lease_is_respected(lock: Lock) {
    let mut env = leased(lock, "5m");
    env.lock_with_lease(&record(200, 300));
    let end = env.run(Subject::Tf, &PLAN);
    assert_not_taken(&env, &end);
    assert!(end.err.contains("wait until that run is over"), "{}", env.dump(&end));
    // The holder may work for 240 s.
    env.lock_with_lease(&record(245, 300));
    let end = env.run(Subject::Tf, &PLAN);
    assert_not_taken(&env, &end);
    assert!(end.err.contains("run it again in "), "{}", env.dump(&end));
    env.set("TFW_RELEASE", "never");
    let end = env.run(Subject::Tf, &PLAN);
    assert_not_taken(&env, &end);
    assert!(!end.err.contains("run it again"), "{}", env.dump(&end));
}
for_each_lock!(a_fresh_lease_is_respected);

fn without_a_promise_or_consent_nothing_is_taken(lock: Lock) {
    let mut env = leased(lock, "5m");
    let mut none = record(LONG_AGO, 300);
    none["fence"] = "none".into();
    let mut elsewhere = record(LONG_AGO, 300);
    elsewhere["region"] = "eu-west-1".into();
    for (record, said) in [(none, "or its tf has kept the lock on purpose"), (elsewhere, "another AWS region")] {
        env.lock_with_lease(&record);
        let end = env.run(Subject::Tf, &PLAN);
        assert_not_taken(&env, &end);
        assert!(end.err.contains(said) && end.err.contains("tf locks show"), "{}", env.dump(&end));
    }
    env.set("TFW_LEASE", "off");
    env.lock_with_lease(&record(LONG_AGO, 300));
    let end = env.run(Subject::Tf, &PLAN);
    assert_not_taken(&env, &end);
    assert!(!env.trace().contains("no process for the takeover"), "{}", env.trace());
}
for_each_lock!(without_a_promise_or_consent_nothing_is_taken);

fn a_hostile_record_never_leads_to_a_takeover(lock: Lock) {
    let env = leased(lock, "5m");
    let old = |name: &str, value: Value| {
        let mut record = record(LONG_AGO, 300);
        record[name] = value;
        record
    };
    let hostile = [
        // An hour ahead of the service.
        record(-3600, 300),
        old("v", 2.into()),
        old("lock", "44444444-2222-3333-4444-555555555555".into()),
        old("lease", 1.into()),
        old("lease", 36_000.into()),
        old("renewed", i64::MAX.into()),
        old("renewed", i64::MIN.into()),
        old("renewed", 0.into()),
        old("renewed", (-5).into()),
        old("renewed", "0".into()),
        old("fence", "maybe".into()),
        old("taken", json!({ "by": "x", "at": i64::MAX, "number": 1 })),
        old("taken", json!({ "by": "x" })),
        old("tf", "x".repeat(3000).into()),
        json!({}),
    ];
    // Each text alone is read in the same way from each kind of lock.
    let count = if lock == Lock::Both { TEXTS.len() } else { 1 };
    let too_large = filled(&record(LONG_AGO, 300), TEXTS[0], MAX_BYTES + 1);
    for record in hostile.into_iter().chain([too_large]) {
        env.lock_with_lease(&record);
        let end = env.run(Subject::Tf, &PLAN);
        assert_not_taken(&env, &end);
        assert_harmless(&format!("{}{}", end.out, end.err));
        env.delete_lock();
    }
    for texts in &TEXTS[..count] {
        let record = filled(&old("fence", "none".into()), texts, MAX_BYTES);
        env.lock_with_lease(&record);
        let end = env.run(Subject::Tf, &PLAN);
        assert_not_taken(&env, &end);
        assert_harmless(&format!("{}{}", end.out, end.err));
        env.delete_lock();
    }
}
for_each_lock!(a_hostile_record_never_leads_to_a_takeover);

/// The largest record that `tf` parses, in bytes of JSON (src/lease/record.rs).
const MAX_BYTES: usize = 2048;

/// A text that does something to a terminal, or looks like a message of `tf`.
const HOSTILE: &str = "\u{1b}]0;owned\u{7}\u{1b}[2J\r\u{9b}31m\u{7f}\u{202e}\ntf: forged\n";

/// Pointers to the texts of a record (RFC 6901): all of them, each of the holder, and each of the rest.
const TEXTS: [&[&str]; 15] = [
    &[
        "/holder/user",
        "/holder/host",
        "/holder/machine",
        "/holder/boot",
        "/holder/container",
        "/holder/ci",
        "/holder/job",
        "/holder/attempt",
        "/holder/cloud",
        "/region",
        "/tf",
        "/taken/by",
        "/interrupted/host",
        "/interrupted/why",
    ],
    &["/holder/user"],
    &["/holder/host"],
    &["/holder/machine"],
    &["/holder/boot"],
    &["/holder/container"],
    &["/holder/ci"],
    &["/holder/job"],
    &["/holder/attempt"],
    &["/holder/cloud"],
    &["/region"],
    &["/tf"],
    &["/taken/by"],
    &["/interrupted/host"],
    &["/interrupted/why"],
];

/// Returns `record` with [`HOSTILE`] again and again in the texts at these places, so that it has `bytes` bytes of
/// JSON.
fn filled(record: &Value, places: &[&str], bytes: usize) -> Value {
    let mut record = record.clone();
    for name in ["machine", "boot", "container", "attempt", "cloud"] {
        record["holder"][name] = "".into();
    }
    if places.contains(&"/taken/by") {
        // This claim lapses within 10 s. Nobody in another region takes the lock over then.
        record["taken"] = json!({ "by": "", "at": jiff::Timestamp::now().as_second() - 65, "number": 1 });
        record["region"] = "eu-west-1".into();
    }
    if places.iter().any(|place| place.starts_with("/interrupted")) {
        record["interrupted"] = json!({ "host": "", "why": "", "at": 1_790_000_120 });
    }
    for place in places.iter().cycle() {
        let length = record.to_string().len();
        let text = record.pointer_mut(place).unwrap();
        let mut filled = text.as_str().unwrap().to_owned();
        let rest = bytes - length;
        // A control character is six bytes of JSON, and an x is one.
        let is_last = rest < 6 * HOSTILE.len();
        filled.push_str(&if is_last { "x".repeat(rest) } else { HOSTILE.to_owned() });
        *text = filled.into();
        if is_last {
            break;
        }
    }
    assert_eq!(record.to_string().len(), bytes);
    record
}

/// Asserts that `text` does nothing to a terminal, and that no line of it looks like a message of `tf`.
#[track_caller]
fn assert_harmless(text: &str) {
    let is_strange = |one: char| (one.is_control() && one != '\n') || one == '\u{202e}';
    assert!(!text.contains(is_strange) && !text.lines().any(|line| line.starts_with("tf: forged")), "{text:?}");
}

/// Only an object can have a member twice. The lease would be fresh by one of the two, and lapsed by the other one.
#[test]
fn a_record_that_has_a_member_twice_is_not_taken_over() {
    let env = leased(Lock::File, "5m");
    let lapsed = record(LONG_AGO, 300);
    let mut fresh = record(0, 300);
    (fresh["fence"], fresh["holder"]["user"]) = ("none".into(), HOSTILE.into());
    let mut info: Value = serde_json::from_str(&lock_json(LEASED, &env.path())).unwrap();
    info["Who"] = "runner@fv-az1".into();
    let info = info.to_string();
    let names: Vec<&String> = lapsed.as_object().unwrap().keys().collect();
    for name in names {
        let plain = format!("\"{name}\":{}", lapsed[name]);
        // The second one has a name with an escape.
        let again = format!("\"\\u{:04x}{}\":{}", u32::from(name.as_bytes()[0]), &name[1..], fresh[name]);
        let text = lapsed.to_string();
        for text in [text.replacen('{', &format!("{{{again},"), 1), format!("{},{again}}}", &text[..text.len() - 1])] {
            assert!(text.contains(&plain), "{plain} {text}");
            let object = format!("{},\"tf\":{text}}}", info.strip_suffix('}').unwrap());
            cloud().s3("PUT", &format!("{}.tflock", env.path()), object.as_bytes());
            let end = env.run(Subject::Tf, &PLAN);
            assert_not_taken(&env, &end);
            assert_harmless(&format!("{}{}", end.out, end.err));
        }
    }
}

/// A person who may write the lock may write the record too. `tf` shows its texts to people and passes them to programs.
fn a_takeover_from_a_holder_with_hostile_texts_is_reported_harmlessly(lock: Lock) {
    let mut env = leased(lock, "5m");
    let told = env.directory.join("told");
    env.set("TFW_ON_EVENT", format!("cat >> '{}'", told.display()));
    let texts: Vec<&str> = TEXTS[0].iter().copied().filter(|text| text.starts_with("/holder")).collect();
    for places in [&texts[..], &["/holder/user", "/holder/host", "/holder/job"]] {
        env.write("told", "");
        let before = takeovers(&env);
        let mut record = record(LONG_AGO, 300);
        if places.len() == 3 {
            for place in places {
                *record.pointer_mut(place).unwrap() = format!("{HOSTILE}{place}").into();
            }
        } else {
            record = filled(&record, places, MAX_BYTES);
        }
        env.lock_with_lease(&record);
        let end = env.run(Subject::Tf, &PLAN);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        assert!(end.err.contains("released the lock: ") && end.err.contains(LEASED), "{}", env.dump(&end));
        assert_harmless(&format!("{}{}", end.out, end.err));
        assert!(end.err.contains(r"\u{1b}"), "the text is shown: {}", env.dump(&end));
        env.assert_unlocked();
        assert_eq!(takeovers(&env), before + 1, "{:?}", history(&env));
        let line = wait_for("the event", || Some(env.read("told")).filter(|text| text.ends_with('\n')), || env.trace());
        let event: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(event["event"], "taken over");
        assert_harmless(&line);
        let written = fs::read_to_string(env.directory.parent().unwrap().join("home/.local/state/tf/history.jsonl"));
        assert_harmless(&written.unwrap());
        for arguments in [&["history"][..], &["history", "--json"]] {
            let end = super::locks_release::locks(&env, arguments);
            assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
            assert!(end.out.contains("taken over"), "{}", env.dump(&end));
            assert_harmless(&format!("{}{}", end.out, end.err));
        }
        // A program that decodes the JSON gets no control characters either.
        let texts = event.as_object().unwrap().values().filter_map(Value::as_str);
        texts.for_each(|text| assert_harmless(text));
    }
}
for_each_lock!(a_takeover_from_a_holder_with_hostile_texts_is_reported_harmlessly);

/// Whether this is the claim of a taker.
fn claims(request: &Message) -> bool {
    request.is_ours() && is_dynamodb(request, ".PutItem") && request.text().contains("ConditionExpression")
}

/// Whether this is a delete by `tf`: of a part of the lock, or of an object that tests the service.
fn deletes(request: &Message) -> bool {
    request.is_ours() && (is_dynamodb(request, ".DeleteItem") || request.start.starts_with("DELETE "))
}

/// Removes the condition of the deletes in S3, as a service does that ignores it.
fn ignore_if_match(request: &mut Message) {
    if request.start.starts_with("DELETE ") {
        request.headers.retain(|(name, _)| !name.eq_ignore_ascii_case("if-match"));
    }
}

/// A kind of lock, how its service treats a taker, and what `tf` then says beside the fact and the command.
type Service = (Lock, fn(&Message) -> ProxyAction, fn(&mut Message), [&'static str; 2]);

fn refusing_services() -> Vec<Service> {
    let deny_claims = |request: &Message| {
        if claims(request) { ProxyAction::Answer(request.denied()) } else { ProxyAction::Pass }
    };
    let deny_deletes = |request: &Message| {
        if deletes(request) { ProxyAction::Answer(request.denied()) } else { ProxyAction::Pass }
    };
    let pass = |_: &Message| ProxyAction::Pass;
    let permission = |action| ["AccessDenied", action];
    let person = "so only a person can release this lock";
    vec![
        (Lock::DynamoDb, deny_claims, |_| {}, permission("with the permission dynamodb:PutItem, type: ")),
        (Lock::Both, deny_claims, |_| {}, permission("with the permission dynamodb:PutItem, type: ")),
        (Lock::DynamoDb, deny_deletes, |_| {}, permission("with the permission dynamodb:DeleteItem, type: ")),
        (Lock::Both, deny_deletes, |_| {}, permission("with the permission s3:DeleteObject, type: ")),
        (Lock::File, deny_deletes, |_| {}, permission(person)),
        (Lock::File, pass, ignore_if_match, ["the service ignores the condition of a delete (If-Match)", person]),
    ]
}

/// Checks that `tf` says once that it did not release the lock, why, and what to type.
#[track_caller]
fn assert_said_once(env: &TestEnv, end: &Ended, said: [&str; 2]) {
    assert_not_taken(env, end);
    let lines: Vec<_> = end.err.lines().filter(|line| line.starts_with("tf: ")).collect();
    let facts: Vec<_> = (0..lines.len()).filter(|line| lines[*line].contains("the lock was not released: ")).collect();
    let [fact] = facts[..] else { panic!("{}", env.dump(end)) };
    assert!(lines[fact].contains(&env.path()) && lines[fact].contains(LEASED), "{}", env.dump(end));
    let rest = lines[fact + 1..fact + 3].join("\n");
    assert!(said.iter().all(|said| rest.contains(said)), "{said:?}: {}", env.dump(end));
    assert!(rest.ends_with(&format!("type: tf locks release {LEASED}")), "{}", env.dump(end));
}

/// The same attempt would fail again, so terraform starts and is refused.
#[test]
fn a_lock_that_cannot_be_taken_is_left_with_one_message() {
    for (lock, rule, change, said) in refusing_services() {
        let mut env = leased(lock, "5m");
        env.lock_with_lease(&record(LONG_AGO, 300));
        let _proxy = through_changing(&mut env, change, rule);
        let begun = Instant::now();
        let end = env.run(Subject::Tf, &PLAN);
        assert!(begun.elapsed().as_secs() < 20, "{:?}: {}", begun.elapsed(), env.dump(&end));
        assert_said_once(&env, &end, said);
        // With the permission, the command works, even if the taker has claimed the lock.
        env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", cloud().port));
        let end = env.run(Subject::Tf, &["locks", "release", LEASED, "--yes"]);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        env.assert_unlocked();
    }
}

/// A taker that watches while terraform waits gives up too, and the next one leaves the lock alone for 10 min.
#[test]
fn while_terraform_waits_a_lock_that_cannot_be_taken_is_said_once_and_tried_once() {
    let refused = |(lock, rule, change, said): Service| {
        let mut env = leased(lock, "5s");
        // It lapses while terraform waits.
        env.lock_with_lease(&record(3, 5));
        let tries = Arc::new(AtomicUsize::new(0));
        let seen = Arc::clone(&tries);
        let _proxy = through_changing(&mut env, change, move |request| {
            // A test of the service puts one object.
            let is_test = request.is_ours() && request.start.starts_with("PUT ");
            seen.fetch_add(usize::from(claims(request) || is_test), Ordering::Relaxed);
            rule(request)
        });
        let end = env.run(Subject::Tf, &["plan", "-no-color", "-lock-timeout=25s"]);
        assert_said_once(&env, &end, said);
        assert_eq!(tries.load(Ordering::Relaxed), 1, "{}", env.dump(&end));
    };
    let services = refusing_services().into_iter().enumerate().filter(|(number, _)| matches!(number, 1 | 5));
    std::thread::scope(|scope| services.for_each(|(_, service)| drop(scope.spawn(move || refused(service)))));
}

/// The lock of a vanished host cannot be taken, before terraform starts or while it waits. Then the lock is released,
/// and another host leaves another lock.
#[test]
fn another_lock_is_taken_although_the_one_before_it_could_not_be_taken() {
    const NEXT: &str = "44444444-2222-3333-4444-555555555555";
    let run = |age: i64| {
        let mut env = leased(Lock::DynamoDb, "5s");
        env.lock_with_lease(&record(age, 5));
        let reads = Arc::new(AtomicUsize::new(0));
        let read = Arc::clone(&reads);
        let _proxy = through(&mut env, move |request| {
            read.fetch_add(usize::from(request.is_ours() && is_dynamodb(request, ".GetItem")), Ordering::Relaxed);
            let is_denied = claims(request) && request.text().contains(LEASED);
            if is_denied { ProxyAction::Answer(request.denied()) } else { ProxyAction::Pass }
        });
        let run = env.start(Subject::Tf, &["plan", "-no-color", "-lock-timeout=50s"]);
        run.wait_for_err(&format!("type: tf locks release {LEASED}"));
        run.wait_for_out("Acquiring state lock");
        env.wait_for_trace("takeover: Some(NotTaken");
        // The process that says who holds the lock reads it less often.
        let before = reads.load(Ordering::Relaxed);
        let is_seen = || (reads.load(Ordering::Relaxed) >= before + 5).then_some(());
        wait_for("the reads of the next taker", is_seen, || env.trace());
        let mut lapsed = record(10, 5);
        lapsed["lock"] = NEXT.into();
        env.put_lease(&lock_json(NEXT, &env.path()), &lapsed);
        let end = run.wait();
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        assert!(end.err.contains("released the lock: ") && end.err.contains(NEXT), "{}", env.dump(&end));
        assert_eq!(end.err.matches("was not released").count(), 1, "{}", env.dump(&end));
        env.assert_unlocked();
    };
    std::thread::scope(|scope| {
        for age in [LONG_AGO, 3] {
            scope.spawn(move || run(age));
        }
    });
}

/// The attempts before terraform starts and the first ones while it waits fail, and a later one may succeed.
#[test]
fn a_passing_failure_is_said_once_before_terraform_starts_and_while_it_waits() {
    let mut env = leased(Lock::DynamoDb, "5s");
    env.lock_with_lease(&record(LONG_AGO, 5));
    let failing = Arc::new(AtomicBool::new(true));
    let fails = Arc::clone(&failing);
    let _proxy = through(&mut env, move |request| {
        if claims(request) && fails.load(Ordering::Relaxed) { ProxyAction::Close } else { ProxyAction::Pass }
    });
    let run = env.start(Subject::Tf, &["plan", "-no-color", "-lock-timeout=120s"]);
    run.wait_for_err(&format!("type: tf locks release {LEASED}"));
    run.wait_for_out("Acquiring state lock");
    env.wait_for_trace("takeover: Some(NotTaken");
    let attempts = || env.trace().matches("takeover: the lock was not taken").count();
    let before = attempts();
    let is_tried = || (attempts() >= before + 4).then_some(());
    wait_for("four more attempts", is_tried, || env.trace());
    failing.store(false, Ordering::Relaxed);
    let end = run.wait();
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert!(end.err.contains("released the lock: ") && end.err.contains(LEASED), "{}", env.dump(&end));
    assert_eq!(end.err.matches("was not released").count(), 1, "{}", env.dump(&end));
    env.assert_unlocked();
}

/// Jobs that only plan often have `-lock=false` in their environment.
#[test]
fn a_run_that_takes_no_lock_leaves_that_of_another_host() {
    for (name, value, is_taken) in [
        ("TF_CLI_ARGS_plan", "-lock=false", false),
        ("TF_CLI_ARGS", "-lock=false", false),
        ("TF_CLI_ARGS_apply", "-lock=false", true),
    ] {
        let mut env = leased(Lock::DynamoDb, "5m");
        env.lock_with_lease(&record(LONG_AGO, 300));
        env.set(name, value);
        let end = env.run(Subject::Tf, &PLAN);
        assert_eq!(end.code(), Some(0), "{name} {}", env.dump(&end));
        if is_taken {
            assert_taken(&env, &end);
        } else {
            assert!(!end.err.contains("tf:"), "{name} {}", env.dump(&end));
            env.assert_locked();
        }
    }
}

/// Whether this is a request of the test of an S3 service: it has an object of its own, beside the lock.
fn is_of_service_test(request: &Message, path: &str) -> bool {
    let is_beside = request.start.contains(&format!("{path}.")) && !request.start.contains(&format!("{path}.tflock"));
    request.is_ours() && is_beside
}

/// An S3 service that gives every delete of an object that does not exist the same answer, whatever its condition. A
/// test of it needs all its requests.
struct UnconditionalService {
    /// Whether the object of the test is there.
    is_there: AtomicBool,
    /// The status and the body of that answer.
    absent: [&'static str; 2],
}

const NO_SUCH_KEY: [&str; 2] =
    ["404 Not Found", "<?xml version=\"1.0\"?><Error><Code>NoSuchKey</Code><Message>no</Message></Error>"];

impl UnconditionalService {
    fn new(absent: [&'static str; 2]) -> Self {
        Self { is_there: AtomicBool::new(false), absent }
    }

    /// What a proxy does with a request of a test, so that another service seems to be this one.
    fn answer(&self, request: &Message) -> ProxyAction {
        let is_delete = request.start.starts_with("DELETE ");
        if request.start.starts_with("PUT ") {
            self.is_there.store(true, Ordering::Relaxed);
        } else if is_delete && request.header("if-match").is_none() {
            self.is_there.store(false, Ordering::Relaxed);
        } else if is_delete && !self.is_there.load(Ordering::Relaxed) {
            let [status, body] = self.absent;
            return ProxyAction::Answer(Message::answer(status, body));
        }
        ProxyAction::Pass
    }
}

/// The answer to a delete of an object that does not exist shows nothing about the condition.
#[test]
fn a_service_is_tested_with_an_object_whatever_it_answers_without_one() {
    for absent in [["204 No Content", ""], NO_SUCH_KEY] {
        for is_condition_ignored in [false, true] {
            let mut env = leased(Lock::File, "5m");
            let path = env.path();
            let service = UnconditionalService::new(absent);
            let change = if is_condition_ignored { ignore_if_match } else { |_: &mut Message| {} };
            let _proxy = through_changing(&mut env, change, move |request| {
                if is_of_service_test(request, &path) { service.answer(request) } else { ProxyAction::Pass }
            });
            env.lock_with_lease(&record(LONG_AGO, 300));
            let end = env.run(Subject::Tf, &["locks", "doctor"]);
            assert_eq!(end.out.contains("WRONG  If-Match: "), is_condition_ignored, "{absent:?} {}", env.dump(&end));
            let end = env.run(Subject::Tf, &PLAN);
            if is_condition_ignored {
                assert_said_once(&env, &end, ["the service ignores the condition of a delete (If-Match)", ""]);
            } else {
                assert_taken(&env, &end);
            }
        }
    }
}

/// The service fails to answer the request that tests the condition of a delete, or the one that puts the object for
/// the test. That shows nothing about the condition, so the test is made again.
#[test]
fn a_failed_request_of_the_test_of_a_service_decides_nothing() {
    let run = |is_put_failing: bool, is_condition_ignored: bool| {
        let mut env = leased(Lock::File, "5m");
        let path = env.path();
        let service = UnconditionalService::new(["204 No Content", ""]);
        let failures = Arc::new(AtomicUsize::new(0));
        let failed = Arc::clone(&failures);
        let change = if is_condition_ignored { ignore_if_match } else { |_: &mut Message| {} };
        let _proxy = through_changing(&mut env, change, move |request| {
            let is_put = request.start.starts_with("PUT ");
            if !is_of_service_test(request, &path) || !(is_put || request.start.starts_with("DELETE ")) {
                return ProxyAction::Pass;
            }
            // The SDK sends a request three times.
            let is_failing = is_put == is_put_failing && (is_put || service.is_there.load(Ordering::Relaxed));
            if is_failing && failed.fetch_add(1, Ordering::Relaxed) < 3 {
                return ProxyAction::Answer(Message::answer("503 Service Unavailable", ""));
            }
            service.answer(request)
        });
        env.lock_with_lease(&record(LONG_AGO, 300));
        let end = env.run(Subject::Tf, &PLAN);
        assert!(failures.load(Ordering::Relaxed) > 3, "{is_put_failing}: {}", env.dump(&end));
        if is_condition_ignored {
            assert_said_once(&env, &end, ["the service ignores the condition of a delete (If-Match)", ""]);
        } else {
            assert_taken(&env, &end);
        }
    };
    for (is_put_failing, is_condition_ignored) in [(false, false), (false, true), (true, false), (true, true)] {
        run(is_put_failing, is_condition_ignored);
    }
}

/// Whether this is a delete by `tf` of what decides whether the lock at `path` is held: its item, or an object alone.
fn deletes_lock(request: &Message, path: &str) -> bool {
    let is_object = request.start.starts_with("DELETE ") && request.start.contains(&format!("{path}.tflock"));
    request.is_ours() && (is_object || is_dynamodb(request, ".DeleteItem"))
}

/// Checks that the lock is gone, that `tf` has said so, and that it is in the history. An object alone may have been
/// deleted by somebody else whose delete came at the same time.
#[track_caller]
fn assert_deletion_reported(env: &TestEnv, end: &Ended) {
    assert_eq!(end.code(), Some(0), "{}", env.dump(end));
    env.assert_unlocked();
    let is_alone = env.lock == Lock::File;
    let said = if is_alone { "tf: the lock is gone: " } else { "tf: released the lock: " };
    let lines: Vec<_> = end.err.lines().filter(|line| line.contains(LEASED)).collect();
    assert_eq!(lines.iter().filter(|line| line.starts_with(said)).count(), 1, "{}", env.dump(end));
    assert_eq!(end.err.contains("the response was lost"), is_alone, "{}", env.dump(end));
    assert_eq!(takeovers(env), 1, "{:?}: {}", history(env), env.dump(end));
    let why = history(env)[0]["why"].as_str().unwrap().to_owned();
    assert_eq!(why.contains("the response was lost"), is_alone, "{why}");
}

/// Lets `env` reach the services through a proxy that loses the response to a delete of the lock, if `is_lost`.
fn losing_deletes(env: &mut TestEnv, is_lost: impl Fn() -> bool + Send + Sync + 'static) -> Proxy {
    let path = env.path();
    through(
        env,
        move |request| {
            if deletes_lock(request, &path) && is_lost() { ProxyAction::LoseAnswer } else { ProxyAction::Pass }
        },
    )
}

/// Every response to a delete of the lock is lost, although the delete arrives.
fn a_takeover_is_reported_although_the_responses_to_its_delete_are_lost(lock: Lock) {
    let mut env = leased(lock, "5m");
    let _proxy = losing_deletes(&mut env, || true);
    env.lock_with_lease(&record(LONG_AGO, 300));
    let end = env.run(Subject::Tf, &PLAN);
    assert_deletion_reported(&env, &end);
}
for_each_lock!(a_takeover_is_reported_although_the_responses_to_its_delete_are_lost);

/// The response to the first delete is lost. The SDK sends it again, and that one finds no lock.
fn a_takeover_is_reported_although_one_response_is_lost(lock: Lock) {
    let mut env = leased(lock, "5m");
    let once = AtomicBool::new(true);
    let _proxy = losing_deletes(&mut env, move || once.swap(false, Ordering::Relaxed));
    env.lock_with_lease(&record(LONG_AGO, 300));
    let end = env.run(Subject::Tf, &PLAN);
    assert_deletion_reported(&env, &end);
}
for_each_lock!(a_takeover_is_reported_although_one_response_is_lost);

/// The service confirms the delete. After that, the network is away for six requests.
fn a_confirmed_takeover_is_reported_although_the_read_after_it_fails(lock: Lock) {
    let mut env = leased(lock, "5m");
    let path = env.path();
    let left = AtomicUsize::new(usize::MAX);
    let _proxy = through(&mut env, move |request| {
        if deletes_lock(request, &path) {
            left.store(6, Ordering::Relaxed);
        } else if (1..=6).contains(&left.load(Ordering::Relaxed)) && request.is_ours() {
            left.fetch_sub(1, Ordering::Relaxed);
            return ProxyAction::Close;
        }
        ProxyAction::Pass
    });
    env.lock_with_lease(&record(LONG_AGO, 300));
    let end = env.run(Subject::Tf, &PLAN);
    assert_taken(&env, &end);
}
for_each_lock!(a_confirmed_takeover_is_reported_although_the_read_after_it_fails);

/// Terraform gets the lock, so the taker is told to end before it has read the lock again.
fn a_takeover_without_a_response_is_reported_while_terraform_waits(lock: Lock) {
    let mut env = leased(lock, "5s");
    let _proxy = losing_deletes(&mut env, || true);
    env.lock_with_lease(&record(1, 5));
    let end = env.run(Subject::Tf, &["plan", "-no-color", "-lock-timeout=2m"]);
    assert_deletion_reported(&env, &end);
}
for_each_lock!(a_takeover_without_a_response_is_reported_while_terraform_waits);

/// From the first delete on, the service cannot be reached. Whether an item or an object alone is gone is not known. Of
/// a lock with both, only the object may be gone.
#[test]
fn a_takeover_whose_result_cannot_be_read_is_said_to_be_unknown() {
    let run = |lock: Lock, is_terraform_refused: bool| {
        let mut env = leased(lock, "5m");
        let path = env.path();
        let away = AtomicBool::new(false);
        let _proxy = through(&mut env, move |request| {
            let is_delete = deletes_lock(request, &path);
            match (is_delete, away.fetch_or(is_delete, Ordering::Relaxed) && request.is_ours()) {
                (true, false) => ProxyAction::LoseAnswer,
                (_, true) => ProxyAction::Close,
                (false, false) => ProxyAction::Pass,
            }
        });
        env.lock_with_lease(&record(LONG_AGO, 300));
        let end = env.run(Subject::Tf, &PLAN);
        let lines: Vec<_> = end.err.lines().filter(|line| line.starts_with("tf: ")).collect();
        let [fact, why, next] = lines[..] else { panic!("{}", env.dump(&end)) };
        let said =
            if is_terraform_refused { "the lock was not released: " } else { "it is unknown whether the lock was" };
        assert!(fact.strip_prefix("tf: ").unwrap().starts_with(said), "{}", env.dump(&end));
        assert_eq!(why.contains("the response was lost"), !is_terraform_refused, "{}", env.dump(&end));
        assert!(next.ends_with(&format!("type: tf locks release {LEASED}")), "{}", env.dump(&end));
        assert_eq!((end.code(), takeovers(&env)), (Some(i32::from(is_terraform_refused)), 0), "{}", env.dump(&end));
    };
    let locks = [(Lock::File, false), (Lock::DynamoDb, false), (Lock::Both, true)];
    std::thread::scope(|scope| {
        for (lock, refused) in locks {
            scope.spawn(move || run(lock, refused));
        }
    });
}

/// Twenty times, two plans meet the same lapsed lease. Exactly one of them takes the lock.
fn of_two_takers_one_takes(lock: Lock) {
    let mut env = leased(lock, "5m");
    env.set("TFW_LOG", "/dev/null");
    for race in 0..races(20) {
        env.lock_with_lease(&record(LONG_AGO, 300));
        let plans = [0, 1].map(|_| env.start(Subject::Tf, &["plan", "-no-color", "-lock-timeout=30s"]));
        let ends = plans.map(Run::wait);
        for end in &ends {
            assert!(end.code() == Some(0) || end.met_a_lock_that_went(), "{race}: {}", env.dump(end));
        }
        env.assert_unlocked();
        let said = ends.iter().filter(|end| end.err.contains("released the lock: ")).count();
        assert_eq!((said, takeovers(&env)), (1, race + 1), "{race}: {}{}", env.dump(&ends[0]), env.dump(&ends[1]));
    }
}
for_each_lock!(of_two_takers_one_takes);

/// The taker is dead, or its network is. Its claim lapses after a minute.
#[test]
fn a_claim_that_has_lapsed_is_taken_over() {
    for lock in [Lock::DynamoDb, Lock::Both] {
        let env = leased(lock, "5m");
        env.lock_with_lease(&claimed_record(400, 300, 65));
        let end = env.run(Subject::Tf, &PLAN);
        assert_taken(&env, &end);
        assert!(end.err.contains("https://ci.example/job/8 is releasing that lock"), "{}", env.dump(&end));
    }
}

/// The lease record of a lock that another host has claimed `claimed` seconds ago. The holder renewed its lease `age`
/// seconds ago.
fn claimed_record(age: i64, length: u64, claimed: i64) -> Value {
    let mut record = record(age, length);
    record["taken"] =
        json!({ "by": "https://ci.example/job/8", "at": jiff::Timestamp::now().as_second() - claimed, "number": 1 });
    record
}

/// A person has claimed the lock of a holder that had just renewed its lease, and could not delete it. The lock may not
/// be taken for the rest of the lease, so terraform starts and is refused.
#[test]
fn a_claim_that_stays_before_the_lease_has_lapsed_does_not_delay_the_start_of_terraform() {
    let run = |lock: Lock, fence: &str, claimed: i64| {
        let env = leased(lock, "5m");
        let mut record = claimed_record(claimed + 5, 3600, claimed);
        record["fence"] = fence.into();
        env.lock_with_lease(&record);
        let end = env.run(Subject::Tf, &PLAN);
        assert_not_taken(&env, &end);
        // Its taker may be finishing until the claim is 70 s old.
        let is_waited_for = claimed < 70;
        let said = "https://ci.example/job/8 is releasing that lock; waiting for that";
        assert_eq!(end.err.matches(said).count(), usize::from(is_waited_for), "{}", env.dump(&end));
        let left = "its holder cannot renew the lease, which lapses in 58 min";
        assert_eq!(end.err.matches(left).count(), usize::from(is_waited_for), "{}", env.dump(&end));
        assert!(
            end.err.contains("and has not released it") || end.err.contains("but has not released it"),
            "{}",
            env.dump(&end)
        );
    };
    std::thread::scope(|scope| {
        for (lock, fence, claimed) in [
            (Lock::DynamoDb, "stop", 75),
            (Lock::Both, "none", 75),
            (Lock::DynamoDb, "none", 50),
            (Lock::Both, "stop", 50),
        ] {
            scope.spawn(move || run(lock, fence, claimed));
        }
    });
}

/// The claim lapses, and then the lease of the holder, while terraform waits.
#[test]
fn a_lock_with_a_claim_that_stays_is_taken_when_the_lease_has_lapsed_while_terraform_waits() {
    for lock in [Lock::DynamoDb, Lock::Both] {
        let env = leased(lock, "5s");
        env.lock_with_lease(&claimed_record(300, 300, 75));
        let end = env.run(Subject::Tf, &["plan", "-no-color", "-lock-timeout=1m"]);
        assert_taken(&env, &end);
        assert!(!end.err.contains("waiting for that"), "{}", env.dump(&end));
    }
}

/// A program writes the state without a lock, again and again. Terraform starts and is refused.
#[test]
fn a_state_that_keeps_changing_does_not_delay_the_start_of_terraform_for_ever() {
    let env = leased(Lock::Both, "30s");
    // A change every 200 ms must come within each window of 6.5 s.
    env.lock_with_lease(&record(36, 30));
    let run = env.start(Subject::Tf, &PLAN);
    let ended = AtomicBool::new(false);
    let end = std::thread::scope(|scope| {
        scope.spawn(|| {
            // The count ends the thread also if the test fails.
            for serial in (1..300).take_while(|_| !ended.load(Ordering::Relaxed)) {
                let state = json!({ "version": 4, "serial": serial, "lineage": "l", "terraform_version": "1.11.4", "outputs": {}, "resources": [] });
                cloud().s3("PUT", &env.path(), state.to_string().as_bytes());
                std::thread::sleep(Duration::from_millis(200));
            }
        });
        let end = run.wait();
        ended.store(true, Ordering::Relaxed);
        end
    });
    assert_not_taken(&env, &end);
    assert_eq!(end.err.matches("tf has not seen the lock and the state unchanged").count(), 1, "{}", env.dump(&end));
    assert!(end.err.contains(&format!("type: tf locks release {LEASED}")), "{}", env.dump(&end));
}

/// Creates the lock of a vanished host whose backend sets `use_lockfile` too, as a run finds it that has the table
/// alone. The object has this ID.
fn with_object(env: &TestEnv, id: &str) {
    env.lock_with_lease(&record(LONG_AGO, 300));
    let mut info: Value = serde_json::from_str(&lock_json(id, &env.path())).unwrap();
    info["Who"] = "runner@fv-az1".into();
    cloud().s3("PUT", &format!("{}.tflock", env.path()), info.to_string().as_bytes());
}

/// The record is in the item. If that was deleted alone, the object would refuse every run with `use_lockfile` for
/// ever.
#[test]
fn a_run_without_use_lockfile_takes_both_parts_of_a_lock() {
    const OTHER: &str = "44444444-2222-3333-4444-555555555555";
    let env = leased(Lock::DynamoDb, "5m");
    with_object(&env, LEASED);
    let end = env.run(Subject::Tf, &PLAN);
    assert_taken(&env, &end);
    // The object of another run, for example of one that waits for the item, stays.
    with_object(&env, OTHER);
    let end = env.run(Subject::Tf, &PLAN);
    assert_eq!((end.code(), takeovers(&env)), (Some(0), 2), "{}", env.dump(&end));
    assert_eq!(env.locks().iter().map(|lock| id_of(lock)).collect::<Vec<_>>(), [OTHER], "{}", env.dump(&end));
}

/// The credentials of a run without `use_lockfile` may have no permission for objects, and need none where there is no
/// object.
#[test]
fn a_run_without_use_lockfile_needs_permissions_for_an_object_only_where_there_is_one() {
    const UNREAD: &str = "there may be an object that tf could not look at: ";
    for (method, has_object) in [("GET ", false), ("GET ", true), ("DELETE ", false), ("DELETE ", true)] {
        let mut env = leased(Lock::DynamoDb, "5m");
        if has_object {
            with_object(&env, LEASED);
        } else {
            env.lock_with_lease(&record(LONG_AGO, 300));
        }
        let _proxy = through(&mut env, move |request| {
            let is_denied = request.is_ours() && request.start.starts_with(method) && request.start.contains(".tflock");
            if is_denied && !request.start.contains("list-type=2") {
                ProxyAction::Answer(request.denied())
            } else {
                ProxyAction::Pass
            }
        });
        let end = env.run(Subject::Tf, &PLAN);
        assert_eq!(end.err.contains(UNREAD), method == "GET " && has_object, "{method}: {}", env.dump(&end));
        match (method, has_object) {
            (_, false) => assert_taken(&env, &end),
            // It may be another run's.
            ("GET ", true) => assert_eq!((end.code(), env.locks().len()), (Some(0), 1), "{}", env.dump(&end)),
            // The item has the record, with which a run that has the permission can take both parts.
            _ => {
                assert_eq!((end.code(), env.locks().len()), (Some(1), 2), "{}", env.dump(&end));
                let next = format!("with the permission s3:DeleteObject, type: tf locks release {LEASED}");
                assert!(end.err.contains(&next), "{}", env.dump(&end));
            }
        }
    }
}

/// Returns the number of the claim in a request that [`claims`].
fn claim_number(request: &Message) -> String {
    let body: Value = serde_json::from_slice(&request.body).unwrap();
    body["Item"]["tf"]["M"]["taken"]["M"]["number"]["N"].as_str().unwrap().to_owned()
}

/// There is no response to a claim, so the taker sends another one. Just before that arrives, the first one is stored.
#[test]
fn a_claim_that_is_stored_late_is_its_takers_own() {
    for lock in [Lock::DynamoDb, Lock::Both] {
        let mut env = leased(lock, "5m");
        env.lock_with_lease(&record(LONG_AGO, 300));
        let first = Mutex::new(None);
        let (is_second_sent, is_first_stored) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let (sent, stored) = (Arc::clone(&is_second_sent), Arc::clone(&is_first_stored));
        let proxy = Proxy::start(cloud().port, move |request| {
            if !claims(request) {
                return ProxyAction::Pass;
            }
            let mut first = first.lock().unwrap();
            match &*first {
                None => {
                    *first = Some(claim_number(request));
                    ProxyAction::Hold
                }
                // The SDK sends it again.
                Some(number) if *number == claim_number(request) => ProxyAction::Close,
                Some(_) => {
                    sent.store(true, Ordering::Relaxed);
                    wait_for("the first claim", || stored.load(Ordering::Relaxed).then_some(()), String::new);
                    ProxyAction::Pass
                }
            }
        });
        env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
        let run = env.start(Subject::Tf, &PLAN);
        wait_for("the second claim", || is_second_sent.load(Ordering::Relaxed).then_some(()), || env.trace());
        proxy.let_go();
        let is_claimed = || {
            let key =
                json!({ "TableName": env.table, "Key": { "LockID": { "S": env.path() } }, "ConsistentRead": true });
            let item = cloud().dynamodb("GetItem", &key);
            item["Item"]["tf"]["M"]["taken"].is_object().then_some(())
        };
        wait_for("the claim in the item", is_claimed, || env.trace());
        is_first_stored.store(true, Ordering::Relaxed);
        let end = run.wait();
        assert_taken(&env, &end);
        assert!(!end.err.contains("waiting for that"), "{}", env.dump(&end));
    }
}

/// The holder was not gone: it renews its lease while the lock is watched.
fn a_holder_that_renews_in_between_keeps_its_lock(lock: Lock) {
    let env = leased(lock, "30s");
    // It is watched for 6 s.
    env.lock_with_lease(&record(40, 30));
    let run = env.start(Subject::Tf, &PLAN);
    run.wait_for_err("if nothing changes for");
    let mut renewed = record(0, 30);
    renewed["beat"] = 8.into();
    env.lock_with_lease(&renewed);
    let end = run.wait();
    assert_not_taken(&env, &end);
    assert!(end.err.contains("has renewed its lease"), "{}", env.dump(&end));
}
for_each_lock!(a_holder_that_renews_in_between_keeps_its_lock);

/// A write of the dead host lands while the lock is watched. The watch begins anew.
#[test]
fn a_write_in_flight_is_waited_for() {
    let env = leased(Lock::Both, "10s");
    env.lock_with_lease(&record(15, 10));
    let run = env.start(Subject::Tf, &PLAN);
    run.wait_for_err("if nothing changes for 3 s");
    let state = json!({ "version": 4, "serial": 1, "lineage": "l", "terraform_version": "1.11.4", "outputs": {}, "resources": [] });
    // The lock must not change for 2.2 s. Without the write, it would be taken 1.2 s after this pause.
    std::thread::sleep(Duration::from_secs(1));
    let begun = Instant::now();
    cloud().s3("PUT", &env.path(), state.to_string().as_bytes());
    let end = run.wait();
    assert_taken(&env, &end);
    assert!(begun.elapsed().as_secs() >= 2, "{:?}: {}", begun.elapsed(), env.dump(&end));
}

/// A vanished host has left the item of a lock with two parts. Terraforms on other hosts wait for it. With each
/// attempt, they put an object and delete it again.
#[test]
fn the_objects_of_waiting_terraforms_do_not_prolong_the_watch() {
    let env = leased(Lock::Both, "5s");
    env.lock_with_lease(&record(8, 5));
    let object = format!("{}.tflock", env.path());
    let put = |number: usize| {
        let id = format!("44444444-2222-3333-4444-{number:012}");
        cloud().s3("PUT", &object, lock_json(&id, &env.path()).as_bytes());
    };
    put(0);
    let run = env.start(Subject::Tf, &["plan", "-no-color", "-lock-timeout=1m"]);
    let taken = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // The count ends the thread also if the test fails.
            for number in (1..1200).take_while(|_| !taken.load(Ordering::Relaxed)) {
                put(number);
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        run.wait_for_err("released the lock: ");
        taken.store(true, Ordering::Relaxed);
    });
    cloud().s3("DELETE", &object, b"");
    // The object may go while terraform reads who holds the lock. Then it gives up.
    let end = run.wait();
    assert!(end.code() == Some(0) || end.met_a_lock_that_went(), "{}", env.dump(&end));
    assert_eq!(takeovers(&env), 1, "{:?}", history(&env));
}

/// Lets `env` reach the services through a proxy that delays each response to `tf` by `delay`.
/// The first `at_once` ones are not delayed.
fn delayed(env: &mut TestEnv, delay: Duration, at_once: usize) -> Proxy {
    let requests = AtomicUsize::new(0);
    through(env, move |request| {
        if request.is_ours() && requests.fetch_add(1, Ordering::Relaxed) >= at_once {
            std::thread::sleep(delay);
        }
        ProxyAction::Pass
    })
}

/// The watch reads the lock, the state, the digest and the object.
fn a_slow_service_does_not_prevent_a_takeover(lock: Lock) {
    let run = |delay| {
        let mut env = leased(lock, "5s");
        let _proxy = delayed(&mut env, Duration::from_millis(delay), 0);
        env.lock_with_lease(&record(8, 5));
        let end = env.start(Subject::Tf, &PLAN).wait_at_most(Duration::from_secs(90));
        assert_taken(&env, &end);
    };
    std::thread::scope(|scope| {
        for delay in [1200, 1600, 2500] {
            scope.spawn(move || run(delay));
        }
    });
}
for_each_lock!(a_slow_service_does_not_prevent_a_takeover);

/// A change of the holder's could go unnoticed between two reads that are so far apart. Terraform is refused, or waits
/// until its time is up.
#[test]
fn why_a_lock_in_a_service_that_is_too_slow_is_not_taken_is_said_once() {
    let run = |arguments: &[&str], at_once| {
        let mut env = leased(Lock::File, "5s");
        let _proxy = delayed(&mut env, Duration::from_millis(5500), at_once);
        env.lock_with_lease(&record(8, 5));
        let end = env.start(Subject::Tf, arguments).wait_at_most(Duration::from_secs(90));
        assert_said_once(&env, &end, ["the service answers too slowly", "type: tf locks release"]);
    };
    std::thread::scope(|scope| {
        scope.spawn(|| run(&PLAN, 1));
        scope.spawn(|| run(&["plan", "-no-color", "-lock-timeout=45s"], 0));
    });
}

/// DynamoDB, where the lock is, works. S3 refuses every request of `tf` at once, so the state cannot be watched.
#[test]
fn terraform_starts_although_one_of_the_two_services_fails_at_once() {
    let mut env = leased(Lock::DynamoDb, "5s");
    let failed = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&failed);
    let _proxy = through(&mut env, move |request| {
        if !request.is_ours() || request.header("x-amz-target").is_some() {
            return ProxyAction::Pass;
        }
        seen.fetch_add(1, Ordering::Relaxed);
        ProxyAction::Close
    });
    // It lapsed less than 15 min ago, so it must be watched.
    env.lock_with_lease(&record(400, 300));
    let end = env.run(Subject::Tf, &PLAN);
    assert_not_taken(&env, &end);
    assert!(failed.load(Ordering::Relaxed) > 0, "{}", env.dump(&end));
}

/// Each response takes so long that the test of the service takes as long as an attempt to take the lock may take. Or
/// there is no response to one request of the test, after its object was put.
#[test]
fn a_slow_s3_service_of_your_own_does_not_prevent_a_takeover_and_keeps_no_test_object() {
    let run = |is_silent: bool| {
        let mut env = leased(Lock::File, "5m");
        let path = env.path();
        let is_first = AtomicBool::new(true);
        let unanswered = AtomicUsize::new(0);
        let service = UnconditionalService::new(["204 No Content", ""]);
        let _proxy = through(&mut env, move |request| {
            let is_test = is_of_service_test(request, &path);
            let is_delete = is_test && request.start.starts_with("DELETE ") && service.is_there.load(Ordering::Relaxed);
            // The SDK waits 8 s for a response, and sends the request three times.
            if is_silent && is_delete && unanswered.fetch_add(1, Ordering::Relaxed) < 3 {
                std::thread::sleep(std::time::Duration::from_secs(9));
                return ProxyAction::Close;
            }
            // The first read has a limit of its own.
            if !is_silent && request.is_ours() && !is_first.swap(false, Ordering::Relaxed) {
                std::thread::sleep(std::time::Duration::from_millis(5200));
            }
            if is_test { service.answer(request) } else { ProxyAction::Pass }
        });
        env.lock_with_lease(&record(LONG_AGO, 300));
        let end = env.start(Subject::Tf, &PLAN).wait_at_most(std::time::Duration::from_secs(90));
        assert_taken(&env, &end);
        let objects = cloud().s3("GET", &format!("{}?list-type=2", env.bucket), b"").text();
        assert_eq!(objects.matches(".tflock").count(), 0, "{objects}");
    };
    std::thread::scope(|scope| {
        scope.spawn(|| run(false));
        scope.spawn(|| run(true));
    });
}

#[test]
fn an_interrupt_ends_the_wait() {
    let env = leased(Lock::Both, "1m");
    env.lock_with_lease(&record(100, 60));
    let run = env.start(Subject::Tf, &PLAN);
    run.wait_for_err("if nothing changes for 13 s");
    run.send(Signal::SIGINT);
    let end = run.wait();
    assert_eq!(end.signal(), Some(2), "{}", env.dump(&end));
    assert!(end.out.is_empty(), "terraform was not started: {}", env.dump(&end));
    env.assert_locked();
}

/// It watches while terraform waits, so that terraform goes on when the lease has lapsed.
fn a_run_that_waits_for_the_lock_goes_on(lock: Lock) {
    let env = leased(lock, "10s");
    env.lock_with_lease(&record(0, 10));
    let begun = Instant::now();
    let end = env.run(Subject::Tf, &["apply", "-auto-approve", "-no-color", "-lock-timeout=2m"]);
    assert_taken(&env, &end);
    assert!(begun.elapsed().as_secs() < 40, "{:?}: {}", begun.elapsed(), env.dump(&end));
}
for_each_lock!(a_run_that_waits_for_the_lock_goes_on);

/// A run that waits for a living holder ends with its watcher.
#[test]
fn a_watcher_ends_when_terraform_gives_up() {
    let env = leased(Lock::Both, "5m");
    env.lock_with_lease(&record(0, 300));
    let end = env.run(Subject::Tf, &["plan", "-no-color", "-lock-timeout=4s"]);
    assert_not_taken(&env, &end);
    assert!(env.trace().contains("takeover: Some(Over)"), "{}", env.dump(&end));
}

/// Where no lock is, the service gets one more read before terraform starts.
#[test]
fn a_lock_that_is_free_is_said_nothing_about() {
    for lock in Lock::ALL {
        let mut env = leased(lock, "5m");
        let asked = Arc::new(Mutex::new(Vec::new()));
        let seen = asked.clone();
        let _proxy = through(&mut env, move |request| {
            seen.lock().unwrap().push((request.is_ours(), request.start.clone()));
            ProxyAction::Pass
        });
        let end = env.run(Subject::Tf, &PLAN);
        assert_eq!((end.code(), end.err.as_str()), (Some(0), ""), "{}", env.dump(&end));
        let asked = asked.lock().unwrap();
        assert_eq!(asked.iter().take_while(|(is_ours, _)| *is_ours).count(), 1, "{lock:?}: {asked:?}");
    }
}

fn a_person_who_releases_it_claims_it(lock: Lock) {
    let env = leased(lock, "5m");
    env.lock_with_lease(&record(LONG_AGO, 300));
    let end = env.run(Subject::Tf, &["locks", "release", "--force", LEASED]);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    env.assert_unlocked();
    assert_eq!(history(&env).len(), 1);
}
for_each_lock!(a_person_who_releases_it_claims_it);

/// The credentials permit the claim of the lock, and not the delete of one of its parts. The command says which part
/// that is, that the holder stops, and whether the other part is gone.
#[test]
fn a_release_that_cannot_delete_what_it_has_claimed_says_what_follows() {
    const CLAIMED: &str = "the lock is claimed now: its holder cannot renew the lease";
    const HALF: &str = "the other part of the lock was deleted";
    for (lock, is_item_denied, said, is_half_gone) in [
        (Lock::DynamoDb, true, "lack dynamodb:DeleteItem on DynamoDB table ", false),
        (Lock::Both, true, "lack dynamodb:DeleteItem on DynamoDB table ", true),
        (Lock::Both, false, "lack s3:DeleteObject on S3 bucket ", false),
    ] {
        let mut env = leased(lock, "5m");
        env.lock_with_lease(&record(10, 3600));
        let _proxy = through(&mut env, move |request| {
            let is_denied = deletes(request) && is_dynamodb(request, ".DeleteItem") == is_item_denied;
            if is_denied { ProxyAction::Answer(request.denied()) } else { ProxyAction::Pass }
        });
        let end = env.run(Subject::Tf, &["locks", "release", "--force", LEASED]);
        assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
        assert!(end.err.contains(said) && end.err.contains(CLAIMED), "{said}: {}", env.dump(&end));
        assert_eq!(end.err.contains(HALF), is_half_gone, "{}", env.dump(&end));
        assert_eq!(env.locks().len(), if lock == Lock::Both && !is_half_gone { 2 } else { 1 }, "{}", env.dump(&end));
    }
}

/// A person presses ^C when the lock is claimed and not yet deleted.
#[test]
fn a_request_to_stop_does_not_end_a_release_between_the_claim_and_the_delete() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let mut env = leased(Lock::DynamoDb, "5m");
        env.lock_with_lease(&record(LONG_AGO, 300));
        let proxy =
            Proxy::start(cloud().port, |request| if deletes(request) { ProxyAction::Hold } else { ProxyAction::Pass });
        env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
        let run = env.start(Subject::Tf, &["locks", "release", "--yes", LEASED]);
        proxy.wait_until_held();
        run.send(signal);
        proxy.let_go();
        let end = run.wait();
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        assert!(end.out.contains("released the lock"), "{}", env.dump(&end));
        env.assert_unlocked();
    }
}

/// The host of a dead run comes back after its lock was taken over, or it recovers the run before that.
#[test]
fn a_recovery_and_a_takeover_release_a_lock_once() {
    for lock in Lock::ALL {
        for is_recovered_first in [false, true] {
            let mut env = killed_whole(lock);
            put_lapsed_lease(&env);
            let recover_it = |env: &TestEnv, said: &str| {
                let end = recover(env, &[]);
                assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
                assert_eq!(end.out.contains("released the lock"), said == "released", "{}", env.dump(&end));
                env.assert_unlocked();
            };
            if is_recovered_first {
                recover_it(&env, "released");
            }
            // Another host has another journal.
            let home = env.directory.parent().unwrap().join("home");
            env.set("HOME", env.directory.parent().unwrap().join("other-home")).set("TFW_LEASE", "5m");
            let end = env.run(Subject::Tf, &PLAN);
            assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
            assert_eq!(end.err.contains("released the lock"), !is_recovered_first, "{}", env.dump(&end));
            env.set("HOME", home);
            if !is_recovered_first {
                recover_it(&env, "nothing");
            }
            assert_nothing_left(&env);
        }
    }
}

/// A provisioner has started a process in a session of its own. Then `tf`, its guardian, terraform and the keeper were
/// killed.
fn a_lock_whose_run_still_has_a_process_on_this_host_stays(lock: Lock) {
    let mut env = TestEnv::empty(lock);
    let child = "while test -e main.tf && ! test -e child-go; do sleep 0.02; done";
    env.write_main(
        "",
        &format!("env -i PATH=$PATH setsid sh -c '{child}; touch child-over' < /dev/null > /dev/null 2>&1 & {WAITS}"),
    );
    env.init();
    env.set("TFW_LEASE", "5m").set("TFW_CLOCK", "steady");
    let run = start_recorded(&env);
    wait_for("a renewal", || super::leased::record(&env).map(drop), || env.trace());
    // The child has no mark.
    for signal in [Signal::SIGSTOP, Signal::SIGKILL] {
        for pid in marked(&home(&env)) {
            let _ = kill(pid, signal);
        }
    }
    run.wait();
    wait_for("the end of the others", || marked(&home(&env)).is_empty().then_some(()), || env.trace());
    let mut info: Value = serde_json::from_str(&env.locks()[0]).unwrap();
    info.as_object_mut().unwrap().remove("tf");
    let info = info.to_string();
    let mut lapsed = record(LONG_AGO, 300);
    lapsed["lock"] = id_of(&info).into();
    env.put_lease(&info, &lapsed);
    for arguments in [&PLAN[..], &["plan", "-no-color", "-lock-timeout=8s"]] {
        let end = env.run(Subject::Tf, arguments);
        assert_not_taken(&env, &end);
        assert!(end.err.contains("the holder is alive: held by terraform apply on this host"), "{}", env.dump(&end));
    }
    // The lease is late, and lapses after this plan has begun. A later plan would not release the lock either.
    let late = jiff::Timestamp::now().as_second() - 270;
    lapsed["renewed"] = late.into();
    env.put_lease(&info, &lapsed);
    let end = env.run(Subject::Tf, &PLAN);
    assert_not_taken(&env, &end);
    assert!(!end.err.contains("run it again") && end.err.contains("wait until that run is over"), "{}", env.dump(&end));
    lapsed["renewed"] = (late - LONG_AGO).into();
    env.put_lease(&info, &lapsed);
    assert!(!env.exists("child-over"), "{}", env.trace());
    env.write("child-go", "");
    env.wait_for_file("child-over");
    let end = env.run(Subject::Tf, &PLAN);
    assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
}
for_each_lock!(a_lock_whose_run_still_has_a_process_on_this_host_stays);

/// Gives the lock that is held a lease that lapsed long ago.
fn put_lapsed_lease(env: &TestEnv) {
    let info = env.locks().first().unwrap().clone();
    let mut lapsed = record(LONG_AGO, 300);
    lapsed["lock"] = id_of(&info).into();
    env.put_lease(&info, &lapsed);
}

/// Returns a [`TestEnv`] in which a run was killed as by [`killed_whole`]. The lease of its lock lapsed long ago.
fn killed_with_a_lease(lock: Lock) -> TestEnv {
    let mut env = killed_whole(lock);
    env.set("TFW_LEASE", "5m");
    put_lapsed_lease(&env);
    env
}

/// A process that finishes a dead run may wait for a write that the kernel of this host has not delivered. It has a
/// lock on byte 1 of the run's lock file.
#[test]
fn a_lock_whose_run_is_being_finished_on_this_host_is_not_taken() {
    let waiting = ["plan", "-no-color", "-lock-timeout=50s"];
    let finished = |lock: Lock, arguments: &[&str], code: i32| {
        let env = killed_with_a_lease(lock);
        let [run] = records(&env).try_into().unwrap();
        let owner = fs::OpenOptions::new().write(true).open(run.with_file_name("lock")).unwrap();
        lock_byte(&owner, 1);
        let run = env.start(Subject::Tf, arguments);
        run.wait_for_err("another process is cleaning up after that run now");
        env.assert_locked();
        // That process has ended without a release.
        drop(owner);
        let end = run.wait();
        assert_eq!(end.code(), Some(code), "{}", env.dump(&end));
        assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
        env.assert_unlocked();
    };
    std::thread::scope(|scope| {
        scope.spawn(|| finished(Lock::DynamoDb, &PLAN, 1));
        scope.spawn(|| finished(Lock::File, &waiting, 0));
        scope.spawn(|| finished(Lock::Both, &waiting, 0));
    });
}

/// The journal is in a volume of two containers. The processes in the other container cannot be seen from here, but one
/// of them holds a byte of the run's lock file: terraform or a child (byte 0), or its guardian (byte 1). The lock also
/// stays if the record cannot be read.
#[test]
fn a_lock_whose_run_may_be_running_in_another_container_is_not_taken() {
    type Change = fn(&Path);
    let is_elsewhere: Change = |path| {
        let mut record: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        record["host"]["machine"] = "0123456789abcdef0123456789abcdef".into();
        fs::write(path, record.to_string()).unwrap();
    };
    let is_torn: Change = |path| fs::write(path, "{").unwrap();
    let stays = |lock: Lock, byte: i64, change: Change, why: &str| {
        let env = killed_with_a_lease(lock);
        let [path] = records(&env).try_into().unwrap();
        change(&path);
        let held = fs::OpenOptions::new().write(true).open(path.with_file_name("lock")).unwrap();
        lock_byte(&held, byte);
        let end = env.run(Subject::Tf, &PLAN);
        assert_not_taken(&env, &end);
        assert!(end.err.contains(why) && !end.err.contains("run it again"), "{}", env.dump(&end));
        drop(held);
        let end = env.run(Subject::Tf, &PLAN);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        assert!(end.err.contains("released the lock: "), "{}", env.dump(&end));
        env.assert_unlocked();
    };
    let elsewhere = "its processes cannot be seen from here, and one of them holds the lock file of the run";
    let unread = "a run on this host, whose record cannot be read, may hold the lock";
    std::thread::scope(|scope| {
        scope.spawn(|| stays(Lock::DynamoDb, 0, is_elsewhere, elsewhere));
        scope.spawn(|| stays(Lock::File, 1, is_elsewhere, elsewhere));
        scope.spawn(|| stays(Lock::Both, 1, is_torn, unread));
    });
}

/// Everything of a run was killed at once, and its lease has lapsed. This host says why it does not release the lock.
/// So it does not take the lock over either. Another host, which cannot know that, takes it.
#[test]
fn a_lock_that_this_host_has_said_not_to_release_is_not_taken_by_this_host() {
    let lapsed_run = |lock: Lock, release: &str| {
        let mut env = TestEnv::new(lock, WAITS);
        env.set("TFW_RELEASE", release);
        kill_whole(&env);
        env.set("TFW_RELEASE", UNSET).set("TFW_LEASE", "5m");
        put_lapsed_lease(&env);
        env
    };
    let stays = |env: &TestEnv, arguments: &[&str], why: &str| {
        let end = env.run(Subject::Tf, arguments);
        assert_not_taken(env, &end);
        let said = end.err.matches("which was not released").count();
        assert_eq!(
            (said, end.err.contains("run it again")),
            (usize::from(!why.is_empty()), false),
            "{}",
            env.dump(&end)
        );
        assert!(end.err.contains(why), "{}", env.dump(&end));
    };
    let waiting = ["plan", "-no-color", "-lock-timeout=6s"];
    let never = |lock| {
        let mut env = lapsed_run(lock, "never");
        stays(&env, &PLAN, "TFW_RELEASE is set to never");
        stays(&env, &waiting, "TFW_RELEASE is set to never");
        env.set("TFW_RELEASE", "auto");
        let end = env.run(Subject::Tf, &PLAN);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        assert!(end.err.contains("released the lock that an earlier run left"), "{}", env.dump(&end));
        assert_nothing_left(&env);
    };
    let in_doubt = |lock| {
        let mut env = lapsed_run(lock, UNSET);
        forget_recorder(&env);
        edit(&env, |record| record["log"]["locks"][0]["operation"] = "another".into());
        stays(&env, &PLAN, "the lock's Operation is not the one in the log");
        // That was said once.
        for release in [UNSET, "auto"] {
            env.set("TFW_RELEASE", release);
            stays(&env, &waiting, "");
        }
        let other_home = env.directory.parent().unwrap().join("other-home");
        env.set("TFW_RELEASE", UNSET).set("HOME", other_home);
        let end = env.run(Subject::Tf, &PLAN);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
        assert!(end.err.contains("released the lock: "), "{}", env.dump(&end));
        env.assert_unlocked();
    };
    std::thread::scope(|scope| {
        scope.spawn(|| never(Lock::DynamoDb));
        scope.spawn(|| never(Lock::File));
        scope.spawn(|| in_doubt(Lock::Both));
    });
}

/// A lock without a record, and an entry that is not a lock, are left alone.
#[test]
fn a_lock_without_a_lease_is_judged_as_without_leases() {
    for lock in Lock::ALL {
        let env = leased(lock, "5m");
        env.put_lock(&lock_json(LEASED, &env.path()));
        let end = env.run(Subject::Tf, &PLAN);
        assert_not_taken(&env, &end);
        env.put_lock("<html></html>");
        let end = env.run(Subject::Tf, &PLAN);
        assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
        env.assert_locked();
    }
}
