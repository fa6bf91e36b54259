//! "No single response decides about a lock": a response that does not come from the service is ignored, an absence is
//! checked twice, and the location is read after a delete.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::given_back::{is_dynamodb, lands, released_by_the_next_tf, takes_item, through, writes_state};
use super::locks_doctor::unfit;
use super::survived::records;
use crate::support::cloud::{cloud, tool};
use crate::support::http::Message;
use crate::support::process::{Run, tree};
use crate::support::processes::kill_all;
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::test_env::{APPLY, WAITS, lock_json, who};
use crate::support::{Ended, Lock, Subject, TestEnv, wait_for};

/// Returns a response that a proxy or a captive portal sends in place of a service.
fn not_the_service(status: &str, kind: &str, etag: Option<&str>, body: &str) -> Message {
    let mut answer = Message::answer(status, body);
    answer.headers.retain(|(name, _)| name != "Content-Type");
    answer.headers.push(("Content-Type".into(), kind.into()));
    answer.headers.extend(etag.map(|etag| ("ETag".to_owned(), etag.to_owned())));
    if status.starts_with("204") {
        answer.headers.retain(|(name, _)| name != "Content-Length");
    }
    answer
}

const PAGE: &str = "<html><head><title>Sign in</title></head><body>Sign in first.</body></html>";

/// Returns every kind of such a response, with a name.
fn no_answers() -> Vec<(&'static str, Message)> {
    vec![
        ("empty 200", not_the_service("200 OK", "text/plain", None, "")),
        ("204", not_the_service("204 No Content", "text/plain", None, "")),
        ("page", not_the_service("200 OK", "text/html; charset=utf-8", None, PAGE)),
        ("page of a web server", not_the_service("200 OK", "text/html", Some("\"65f1-1a2b\""), PAGE)),
        ("JSON of a portal", not_the_service("200 OK", "application/json", None, r#"{"error":"sign in first"}"#)),
        ("page that is not found", not_the_service("404 Not Found", "text/html", None, PAGE)),
        ("empty 404", not_the_service("404 Not Found", "text/plain", None, "")),
    ]
}

/// Whether this is a read of either part of the lock.
fn reads_lock(request: &Message) -> bool {
    let item = is_dynamodb(request, ".GetItem") && !request.text().contains("-md5");
    item || (request.start.starts_with("GET ") && request.start.contains(".tflock"))
}

/// Whether this is a delete of either part by `tf`. It has a condition, and terraform's has none.
pub fn deletes_lock(request: &Message) -> bool {
    let item = is_dynamodb(request, ".DeleteItem") && request.text().contains("ConditionExpression");
    item || (request.start.starts_with("DELETE ") && request.header("if-match").is_some())
}

/// Returns the two ends of a switch in a proxy's rule. It is off until the test turns it on.
fn switch() -> (Arc<AtomicBool>, Arc<AtomicBool>) {
    let on = Arc::new(AtomicBool::new(false));
    (Arc::clone(&on), on)
}

/// Waits until a record in the journal contains `text`.
#[track_caller]
fn wait_for_record(env: &TestEnv, text: &str) {
    let all = || -> Vec<String> {
        records(env).into_iter().map(|path| std::fs::read_to_string(path).unwrap_or_default()).collect()
    };
    wait_for(text, || all().iter().any(|record| record.contains(text)).then_some(()), || format!("{:?}", all()));
}

fn recover(env: &TestEnv) -> Ended {
    start_recovery(env).wait().without_progress()
}

fn start_recovery(env: &TestEnv) -> Run {
    let mut command = env.command(env.bin().join("tf"));
    command.args(["locks", "recover"]);
    Run::start(command)
}

/// A write of the state that is held. Once its terraform is dead, the first read of the lock gets one bad response.
struct HeldWrite {
    proxy: Proxy,
    is_terraform_dead: Arc<AtomicBool>,
    /// How often the state was looked at since then.
    looks: Arc<AtomicUsize>,
}

impl HeldWrite {
    fn new(env: &mut TestEnv, answer: Message) -> Self {
        let (is_terraform_dead, is_dead) = switch();
        let left = AtomicUsize::new(1);
        let looks = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&looks);
        let proxy = through(env, move |request| {
            let is_dead = is_dead.load(Ordering::SeqCst);
            if is_dead && request.start.starts_with("HEAD ") {
                counted.fetch_add(1, Ordering::SeqCst);
            }
            let bad = is_dead && reads_lock(request);
            if writes_state(request) {
                ProxyAction::Hold
            } else if bad && left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok() {
                ProxyAction::Answer(answer.clone())
            } else {
                ProxyAction::Pass
            }
        });
        Self { proxy, is_terraform_dead, looks }
    }

    /// Delivers the write between two looks at the state. The lock is held before and after.
    #[track_caller]
    fn lands_after_a_look(&self, env: &TestEnv) {
        env.wait_for_trace("waiting for a write");
        let looked = || self.looks.load(Ordering::SeqCst);
        wait_for("a look at the state", || (looked() > 1).then_some(()), || env.trace());
        env.assert_locked();
        self.proxy.let_go();
        self.proxy.wait_until_delivered();
        env.wait_for_trace("it landed");
        env.assert_locked();
    }
}

/// A read of the lock gets one response that does not come from the service, while the write of the state is still in
/// flight.
#[test]
fn one_bad_answer_does_not_end_the_wait_for_a_write() {
    for lock in Lock::ALL {
        // Each case takes a window of 10 s. The other kinds of response are covered by unit tests.
        for (name, answer) in no_answers() {
            let is_tried = match lock {
                Lock::DynamoDb => ["empty 200", "page"].contains(&name),
                Lock::File => ["empty 200", "page of a web server", "page that is not found"].contains(&name),
                Lock::Both => name == "204",
            };
            if !is_tried {
                continue;
            }
            let mut env = TestEnv::new(lock, "true");
            let write = HeldWrite::new(&mut env, answer);
            let run = env.start(Subject::Tf, &APPLY);
            write.proxy.wait_until_held();
            write.is_terraform_dead.store(true, Ordering::SeqCst);
            run.kill_terraform();
            write.lands_after_a_look(&env);
            let end = run.wait();
            assert!(
                end.err.contains("a write of its state that was in flight has arrived"),
                "{lock:?} {name}: {}",
                env.dump(&end)
            );
            env.assert_unlocked();
        }
    }
}

/// The same in a recovery whose first look finds nothing.
#[test]
fn one_absence_does_not_end_the_wait_of_a_recovery() {
    let mut env = TestEnv::new(Lock::DynamoDb, "true");
    let write = HeldWrite::new(&mut env, Message::answer("200 OK", "{}"));
    let run = env.start(Subject::Tf, &APPLY);
    write.proxy.wait_until_held();
    wait_for_record(&env, "\"uploading\":true");
    kill_all(&env);
    drop(run);
    write.is_terraform_dead.store(true, Ordering::SeqCst);
    let recovery = start_recovery(&env);
    write.lands_after_a_look(&env);
    let end = recovery.wait();
    assert!(end.out.contains("released the lock"), "{}", env.dump(&end));
    env.assert_unlocked();
}

/// The bucket itself responds once that there is no such key, although the lock exists. The table does the same for an
/// item.
#[test]
fn an_absence_is_looked_at_twice() {
    for lock in [Lock::DynamoDb, Lock::File] {
        let mut env = TestEnv::new(lock, WAITS);
        let (killed, is_killed) = switch();
        let left = AtomicUsize::new(1);
        let _proxy = through(&mut env, move |request| {
            let bad = is_killed.load(Ordering::SeqCst) && reads_lock(request);
            if bad && left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1)).is_ok() {
                let no_key = "<?xml version=\"1.0\"?><Error><Code>NoSuchKey</Code><Message>no</Message></Error>";
                ProxyAction::Answer(match lock {
                    Lock::DynamoDb => Message::answer("200 OK", "{}"),
                    _ => not_the_service("404 Not Found", "application/xml", None, no_key),
                })
            } else {
                ProxyAction::Pass
            }
        });
        let run = env.start_apply(Subject::Tf);
        killed.store(true, Ordering::SeqCst);
        run.kill_terraform();
        let end = run.wait();
        assert!(end.err.contains("released the lock"), "{lock:?}: {}", env.dump(&end));
        env.assert_unlocked();
    }
}

/// No other responses than these arrive for longer than `tf` waits. The lock is reported, and the next `tf` releases
/// it.
#[test]
fn a_lock_that_nobody_answers_for_is_named_and_kept_for_the_next_tf() {
    for (lock, name) in [
        (Lock::DynamoDb, "empty 200"),
        (Lock::DynamoDb, "JSON of a portal"),
        (Lock::File, "empty 200"),
        (Lock::File, "empty 404"),
    ] {
        let answer = no_answers().into_iter().find(|(known, _)| *known == name).unwrap().1;
        let mut env = TestEnv::new(lock, WAITS);
        let (portal, is_portal) = switch();
        let _proxy = through(&mut env, move |request| {
            if is_portal.load(Ordering::SeqCst) && reads_lock(request) {
                ProxyAction::Answer(answer.clone())
            } else {
                ProxyAction::Pass
            }
        });
        let run = env.start_apply(Subject::Tf);
        portal.store(true, Ordering::SeqCst);
        run.kill_terraform();
        let end = run.wait();
        assert!(end.err.contains("was not released"), "{lock:?} {name}: {}", env.dump(&end));
        env.assert_locked();
        // A recovery behind the same portal cannot do better.
        let end = recover(&env);
        assert_eq!(end.code(), Some(2), "{lock:?} {name}: {}", env.dump(&end));
        assert!(end.out.contains("was not released"), "{lock:?} {name}: {}", env.dump(&end));
        env.assert_locked();
        portal.store(false, Ordering::SeqCst);
        let end = recover(&env);
        assert_eq!(end.code(), Some(0), "{lock:?} {name}: {}", env.dump(&end));
        env.assert_unlocked();
    }
}

/// A delete by `tf` is answered with a success that does not come from the service, and nothing is deleted.
#[test]
fn a_delete_that_deleted_nothing_is_not_called_a_release() {
    for (lock, name) in
        [(Lock::DynamoDb, "empty 200"), (Lock::File, "204"), (Lock::File, "page"), (Lock::Both, "empty 200")]
    {
        let answer = no_answers().into_iter().find(|(known, _)| *known == name).unwrap().1;
        let mut env = TestEnv::new(lock, WAITS);
        let (portal, is_portal) = switch();
        let _proxy = through(&mut env, move |request| {
            if is_portal.load(Ordering::SeqCst) && deletes_lock(request) {
                ProxyAction::Answer(answer.clone())
            } else {
                ProxyAction::Pass
            }
        });
        let run = env.start_apply(Subject::Tf);
        portal.store(true, Ordering::SeqCst);
        run.kill_terraform();
        let end = run.wait();
        assert!(end.err.contains("was not released"), "{lock:?} {name}: {}", env.dump(&end));
        assert!(!end.err.contains("released the lock"), "{lock:?} {name}: {}", env.dump(&end));
        env.assert_locked();
        let history = env.run(Subject::Tf, &["locks", "history"]);
        assert!(!history.out.contains("released"), "{}", history.out);
        let end = env.run(Subject::Tf, &["locks", "release", "--yes"]);
        assert_ne!(end.code(), Some(0), "{lock:?} {name}: {}", env.dump(&end));
        env.assert_locked();
        portal.store(false, Ordering::SeqCst);
        let end = recover(&env);
        assert_eq!(end.code(), Some(0), "{lock:?} {name}: {}", env.dump(&end));
        env.assert_unlocked();
    }
}

/// An object or item in the lock's place that is not a lock says nothing about the run's own lock.
#[test]
fn what_is_no_lock_is_named_and_left_alone() {
    for (lock, what, words) in [
        (Lock::DynamoDb, "", "an item with an empty Info"),
        (Lock::DynamoDb, PAGE, "an HTML or XML page"),
        (Lock::File, "", "an empty object"),
        (Lock::File, "{}", "2 bytes that are not a lock"),
    ] {
        let env = TestEnv::new(lock, WAITS);
        let run = env.start_apply(Subject::Tf);
        env.put_lock(what);
        run.kill_terraform();
        let end = run.wait();
        assert!(end.err.contains("was not released") && end.err.contains(words), "{lock:?}: {}", env.dump(&end));
        assert_eq!(env.locks(), [what], "{}", env.dump(&end));
    }
}

/// Terraform puts `.tflock`, the item is refused, and terraform deletes `.tflock` without a condition and without a log
/// record.
#[test]
fn an_undo_of_half_a_lock_in_flight_never_hits_the_next_holder() {
    let mut env = TestEnv::new(Lock::Both, "true");
    let theirs = lock_json("11111111-2222-3333-4444-555555555555", &env.path());
    cloud().put_item(&env.table, &env.path(), &theirs);
    let proxy = through(&mut env, |request| {
        let undo = request.start.starts_with("DELETE ") && request.header("if-match").is_none();
        if undo { ProxyAction::Hold } else { ProxyAction::Pass }
    });
    let run = env.start(Subject::Tf, &APPLY);
    proxy.wait_until_held();
    assert_eq!(env.locks().len(), 2);
    run.kill_terraform();
    env.wait_for_trace("waiting for a write");
    assert_eq!(env.locks().len(), 2);
    proxy.let_go();
    proxy.wait_until_delivered();
    // The delete hits the object of its own terraform.
    assert_eq!(env.locks(), std::slice::from_ref(&theirs));
    let end = run.wait();
    assert_eq!(env.locks(), [theirs], "{}", env.dump(&end));
    assert!(!end.err.contains("released the lock"), "{}", env.dump(&end));
}

/// Terraform is killed between the two requests that acquire the lock. The second one lands after every look for it.
#[test]
fn the_other_half_of_a_lock_that_lands_late_is_gone_in_the_end() {
    for recovered in [false, true] {
        let mut env = TestEnv::new(Lock::Both, "true");
        let proxy =
            through(&mut env, |request| if takes_item(request) { ProxyAction::Hold } else { ProxyAction::Pass });
        let run = env.start(Subject::Tf, &APPLY);
        proxy.wait_until_held();
        assert_eq!(env.locks().len(), 1);
        if recovered {
            wait_for_record(&env, "\"asked\"");
            kill_all(&env);
            drop(run);
            let end = recover(&env);
            assert!(
                end.out.contains("released the lock") && end.out.contains("may still appear"),
                "{}",
                env.dump(&end)
            );
        } else {
            run.kill_terraform();
            let end = run.wait();
            assert!(end.err.contains("released the lock"), "{}", env.dump(&end));
            assert!(end.err.contains("may still appear"), "{}", env.dump(&end));
        }
        env.assert_unlocked();
        proxy.let_go();
        proxy.wait_until_delivered();
        assert_eq!(env.locks().len(), 1, "it landed");
        let end = released_by_the_next_tf(&env, &["plan", "-no-color"]);
        assert_eq!(end.code(), Some(0), "{}", env.dump(&end));
    }
}

/// A program that logs what OpenTofu 1.6 logs up to its request for a lock, and then waits.
const ASKS: &str = r#"#!/bin/bash
[ "$1" = version ] && { echo 'OpenTofu v1.6.2'; exit; }
now() { date -u +%Y-%m-%dT%H:%M:%S.%3NZ; }
echo "$(now) [INFO]  OpenTofu version: 1.6.2" >>"$TF_TEMP_LOG_PATH"
echo "$(now) [TRACE] backend/local: requesting state lock for workspace \"default\"" >>"$TF_TEMP_LOG_PATH"
touch began
exec -a asks sleep 600
"#;

/// OpenTofu up to 1.10 logs that it requests a lock, but not which one.
#[test]
fn a_lock_whose_id_is_not_logged_and_that_lands_late_is_named_in_the_end() {
    for guarded in [false, true] {
        let mut env = TestEnv::new(Lock::DynamoDb, "true");
        env.stand_in("asks", ASKS);
        // `tf` learns the program's version, which determines what the program is told to log.
        env.run(Subject::Tf, &["version"]);
        let run = env.start_apply(Subject::Tf);
        let asks = terraform_named(&run, "sleep");
        let info = lock_json("33333333-4444-5555-6666-777777777777", &env.path()).replace("1.11.4", "1.6.2");
        wait_for_record(&env, "\"granted\":null");
        if guarded {
            kill_all(&env);
            drop(run);
        } else {
            kill(asks, Signal::SIGKILL).unwrap();
            let end = run.wait();
            assert!(end.err.contains("the lock may still appear"), "{}", env.dump(&end));
        }
        assert_eq!(records(&env).len(), 1, "{}", env.trace());
        // The lock does not exist yet: nothing is reported, and the record is kept.
        let end = recover(&env);
        assert_eq!((end.code(), end.out.as_str(), end.err.as_str()), (Some(0), "", ""), "{}", env.dump(&end));
        assert_eq!(records(&env).len(), 1, "{}", env.trace());
        env.put_lock(&info);
        let end = recover(&env);
        let said = [
            "may belong to an earlier run",
            "type: tf locks show --chdir",
            "33333333-4444-5555-6666-777777777777",
            "once no terraform is using this state, type: ",
            "force-unlock",
        ];
        assert!(said.iter().all(|part| end.out.contains(part)), "{}", env.dump(&end));
        assert_eq!(env.locks(), std::slice::from_ref(&info));
        // It was reported, and a person has to decide.
        assert!(records(&env).is_empty());
    }
}

/// A program that logs what OpenTofu 1.11 logs up to the put of its lock object. It writes the object's text to `info`.
const PUTS: &str = r#"
import base64, datetime, hashlib, json, os, sys, time
if sys.argv[1:2] == ["version"]:
    print("OpenTofu v1.11.5")
    sys.exit()
now = lambda: datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")
log = open(os.environ["TF_TEMP_LOG_PATH"], "a")
say = lambda text: (log.write(f"{now()[:-3]}Z {text}\n"), log.flush())
say("[INFO]  OpenTofu version: 1.11.5")
bucket, who = BUCKET, WHO
info = json.dumps({"ID": "44444444-5555-6666-7777-888888888888", "Operation": "OperationTypeApply", "Info": "", "Who": who,
    "Version": "1.11.5", "Created": now() + "Z", "Path": f"{bucket}/dir/prod.tfstate"})
open("info", "w").write(info)
checksum = base64.b64encode(hashlib.sha256(info.encode()).digest()).decode()
say("[DEBUG] backend-s3: HTTP Request Sent: aws.region=us-east-1 rpc.method=PutObject rpc.service=S3 rpc.system=aws-api "
    f"aws.s3.bucket={bucket} aws.s3.key=dir/prod.tfstate.tflock http.request.header.if_none_match=\"*\" "
    f"http.request.header.x_amz_checksum_sha256=\"{checksum}\" http.request.body=\"[Redacted]\"")
open("began", "w").close()
time.sleep(600)
"#;

/// OpenTofu since 1.11 logs the checksum of the lock's text, which is sufficient proof.
#[test]
fn a_lock_object_whose_id_is_not_logged_and_that_lands_late_is_gone_in_the_end() {
    for guarded in [false, true] {
        let mut env = TestEnv::new(Lock::File, "true");
        let python = tool("python3").display().to_string();
        let script = PUTS.replace("BUCKET", &format!("{:?}", env.bucket)).replace("WHO", &format!("{:?}", who()));
        env.stand_in("puts", &format!("#!{python}{script}"));
        env.run(Subject::Tf, &["version"]);
        let run = env.start_apply(Subject::Tf);
        wait_for_record(&env, "\"granted\":null");
        if guarded {
            kill_all(&env);
            drop(run);
        } else {
            kill(terraform_named(&run, "puts"), Signal::SIGKILL).unwrap();
            let end = run.wait();
            assert!(end.err.contains("the lock may still appear"), "{}", env.dump(&end));
        }
        let end = recover(&env);
        assert_eq!((end.code(), end.out.as_str(), end.err.as_str()), (Some(0), "", ""), "{}", env.dump(&end));
        env.put_lock(&env.read("info"));
        let end = recover(&env);
        assert!(end.out.contains("released the lock"), "{}", env.dump(&end));
        env.assert_unlocked();
        assert!(records(&env).is_empty());
    }
}

#[track_caller]
fn terraform_named(run: &Run, name: &str) -> Pid {
    wait_for(
        name,
        || tree(run.pid()).into_iter().find(|(_, other, ..)| other == name).map(|(pid, ..)| pid),
        || format!("{:?}", tree(run.pid())),
    )
}

/// The lock request of `tf locks doctor` is held, the doctor is killed or gives up, and then the request lands.
#[test]
fn the_lock_of_a_doctor_that_lands_late_is_gone_in_the_end() {
    for killed in [false, true] {
        let mut env = unfit(Lock::DynamoDb);
        let asked = AtomicUsize::new(0);
        let proxy = through(&mut env, move |request| match () {
            () if !takes_item(request) => ProxyAction::Pass,
            () if asked.fetch_add(1, Ordering::SeqCst) == 0 => ProxyAction::Hold,
            // The SDK retries after 8 s. The response to that does not come from the service.
            () => ProxyAction::Answer(not_the_service("200 OK", "text/html", None, PAGE)),
        });
        let mut command = env.command(env.bin().join("tf"));
        command.args(["locks", "doctor", "--fix-digest", "--yes"]);
        let fix = Run::start(command);
        proxy.wait_until_held();
        if killed {
            fix.send(Signal::SIGKILL);
            fix.wait();
            let end = recover(&env);
            assert_eq!((end.code(), end.out.as_str()), (Some(0), ""), "{}", env.dump(&end));
        } else {
            let end = fix.wait();
            assert_eq!(end.code(), Some(1), "{}", env.dump(&end));
        }
        env.assert_unlocked();
        assert!(records(&env).is_empty());
        lands(&env, &proxy);
        released_by_the_next_tf(&env, &["workspace", "list"]);
    }
}

#[test]
fn a_lock_of_which_one_part_may_not_be_deleted_is_named_with_what_became_of_the_other() {
    // With a lease, the item has the record, and stays as long as the object.
    for (lease, said, left) in [("off", "; the other part of the lock was released", 1), ("5m", "", 2)] {
        let mut env = TestEnv::new(Lock::Both, WAITS);
        env.set("TFW_LEASE", lease).set("TFW_CLOCK", "steady");
        let denied = "<Error><Code>AccessDenied</Code><Message>no</Message></Error>";
        let _proxy = through(&mut env, move |request| {
            if request.start.starts_with("DELETE ") && request.start.contains("/prod.tfstate.tflock") {
                ProxyAction::Answer(Message::answer("403 Forbidden", denied))
            } else {
                ProxyAction::Pass
            }
        });
        let run = env.start_apply(Subject::Tf);
        env.wait_for_lease();
        run.kill_terraform();
        let end = run.wait();
        assert!(end.err.contains(&format!("AccessDenied: no{said}\n")), "{lease}: {}", env.dump(&end));
        assert_eq!(env.locks().len(), left, "{lease}: {}", env.dump(&end));
    }
}
