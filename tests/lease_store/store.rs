//! Each test makes the requests of one promise, at a lock of its own.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::json;

use crate::aws::credentials::Purpose;
use crate::lease::record::{Claim, Holder, Promise, Record, Renewal};
use crate::lease::takeover::{AfterClaim, TakeRequests};
use crate::lease::terms::Terms;
use crate::lock::leased::{LeaseRead, LeasedLock, ObjectPart, Renewed};
use crate::lock::probe::IfMatch;
use crate::lock::stores::{Removed, StoreKey, Stores};
use crate::support::cloud::cloud;
use crate::support::http::Message;
use crate::support::proxy::{Proxy, ProxyAction};
use crate::support::test_env::{WAITS, id_of, lock_json};
use crate::support::{Lock, Subject, TestEnv};
use crate::terraform::backend::CachedBackend;

const ID: &str = "0f0e0d0c-1111-2222-3333-444455556666";

/// The service's time at the first renewal, in seconds since 1970. A record before 2020 is not believed.
const BEGIN: i64 = 1_790_000_000;

/// A lock without a lease, and clients for its services.
struct Fixture {
    env: TestEnv,
    stores: Stores,
    /// The location of the lease: the item if there is one, and else the object.
    place: StoreKey,
    text: String,
    runtime: tokio::runtime::Runtime,
}

impl Fixture {
    fn new(lock: Lock) -> Self {
        let env = TestEnv::empty(lock);
        let text = lock_json(ID, &env.path());
        env.put_lock(&text);
        Self::of(env, text, cloud().port)
    }

    fn of(env: TestEnv, text: String, port: u16) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let stores = runtime.block_on(connect(&env, port, &json!({})));
        let place = match env.lock {
            Lock::File => stores.object(&env.bucket, &object_key(&env)),
            Lock::DynamoDb | Lock::Both => stores.item(&env.table, env.path()),
        };
        Self { env, stores, place, text, runtime }
    }

    fn object(&self) -> StoreKey {
        self.stores.object(&self.env.bucket, &object_key(&self.env))
    }

    fn read(&self) -> LeaseRead {
        self.runtime.block_on(self.stores.read_lease(&self.place)).unwrap()
    }

    fn lock(&self) -> LeasedLock {
        self.read().lock.unwrap()
    }

    fn renew(&self, read: &LeasedLock, record: &Record) -> Renewed {
        self.runtime.block_on(self.stores.renew(&self.place, read, record)).unwrap()
    }

    fn claim(&self, read: &LeasedLock, claim: &Claim) -> (AfterClaim, LeaseRead) {
        self.runtime.block_on(self.stores.claim(&self.place, read, claim)).unwrap()
    }

    fn delete_claimed(&self, claimed: &LeasedLock) -> Removed {
        let object = (self.env.lock == Lock::Both).then(|| self.object());
        let mut requests = TakeRequests::default();
        self.runtime
            .block_on(self.stores.delete_claimed(
                &self.place,
                object.as_ref().map(ObjectPart::Known),
                claimed,
                &mut requests,
            ))
            .unwrap()
    }

    /// Returns the whole item, as the service sends it.
    fn raw_item(&self) -> serde_json::Value {
        let key = json!({ "LockID": { "S": self.env.path() } });
        let request = json!({ "TableName": self.env.table, "Key": key, "ConsistentRead": true });
        cloud().dynamodb("GetItem", &request)["Item"].clone()
    }
}

fn object_key(env: &TestEnv) -> String {
    env.path().split_once('/').unwrap().1.to_owned() + ".tflock"
}

async fn connect(env: &TestEnv, port: u16, more: &serde_json::Value) -> Stores {
    let endpoint = format!("http://127.0.0.1:{port}");
    let mut config = json!({
        "bucket": env.bucket, "key": "dir/prod.tfstate", "region": "us-east-1", "use_path_style": true,
        "access_key": "test", "secret_key": "test",
        "endpoints": { "s3": endpoint, "dynamodb": endpoint },
    });
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let backend = CachedBackend::of_parts("s3", config.as_object().unwrap().clone(), "1.10.0");
    Stores::connect(&backend, Purpose::Work).await.unwrap()
}

fn record(id: &str, renewed: i64, beat: u64, keeper: u64) -> Record {
    let terms = Terms::new(Duration::from_mins(5)).unwrap();
    let mut record = Record::new(id, terms, Renewal { renewed, beat }, Promise::Stop);
    record.keeper = keeper;
    "us-east-1".clone_into(&mut record.region);
    record.holder = Holder { user: "anna".into(), host: "ci-7".into(), ..Holder::default() };
    record
}

fn claim(number: u64) -> Claim {
    Claim { by: "other@host".into(), at: BEGIN + 1000, number }
}

fn stored(renewed: &Renewed) -> &LeasedLock {
    let Renewed::Yes(read) = renewed else { panic!("not renewed: {renewed:?}") };
    read.lock.as_ref().unwrap()
}

fn a_renewal_changes_nothing_but_the_record(lock: Lock) {
    let fixture = Fixture::new(lock);
    if lock != Lock::File {
        let item = json!({
            "LockID": { "S": fixture.env.path() }, "Info": { "S": fixture.text },
            "Owner": { "SS": ["a", "b"] }, "Expires": { "N": "17" }, "Nested": { "M": { "x": { "L": [{ "BOOL": true }] } } },
        });
        cloud().dynamodb("PutItem", &json!({ "TableName": fixture.env.table, "Item": item }));
    }
    let before = fixture.read();
    let read = before.lock.unwrap();
    assert_eq!((read.record.as_ref(), read.stored.text()), (None, fixture.text.as_str()));
    assert!(before.date.unwrap().duration_since(jiff::Timestamp::now()).as_secs().abs() < 60, "{:?}", before.date);
    let mut item = fixture.raw_item();
    let mut last = read;
    for beat in 1..=3 {
        let record = record(ID, BEGIN, beat, 7);
        let renewed = fixture.renew(&last, &record);
        let Renewed::Yes(LeaseRead { date, .. }) = &renewed else { panic!("{renewed:?}") };
        assert!(date.is_some(), "{renewed:?}");
        last = stored(&renewed).clone();
        assert_eq!(last, fixture.lock());
        assert_eq!((last.stored.text(), last.record.as_ref()), (fixture.text.as_str(), Some(&Ok(record))));
    }
    if lock == Lock::File {
        let key = format!("{}/{}", fixture.env.bucket, object_key(&fixture.env));
        let answer = cloud().s3("GET", &key, b"");
        assert_eq!(answer.header("content-type"), Some("application/json"));
        let filled = fixture.text.replace(r#""Info":"""#, r#""Info":"anna@ci-7 (tf lease 5m)""#);
        let start = filled.strip_suffix('}').unwrap();
        assert!(answer.text().starts_with(&format!("{start},\"tf\":{{")), "{}", answer.text());
    } else {
        let mut now = fixture.raw_item();
        assert!(now["tf"]["M"]["holder"]["M"]["host"]["S"] == "ci-7", "{now}");
        now.as_object_mut().unwrap().remove("tf");
        let filled = fixture.text.replace(r#""Info":"""#, r#""Info":"anna@ci-7 (tf lease 5m)""#);
        assert_eq!(now["Info"]["S"].as_str(), Some(filled.as_str()));
        now["Info"]["S"] = json!(fixture.text);
        for item in [&mut now, &mut item] {
            let owner = item["Owner"]["SS"].as_array_mut().unwrap();
            owner.sort_by_key(ToString::to_string);
        }
        assert_eq!(now, item);
    }
}

for_each_lock!(a_renewal_changes_nothing_but_the_record);

fn a_late_renewal_replaces_no_newer_one(lock: Lock) {
    let fixture = Fixture::new(lock);
    let first = fixture.lock();
    let newest = record(ID, BEGIN, 7, 1);
    let read = stored(&fixture.renew(&first, &newest)).clone();
    for (late, is_confirmed) in [
        (record(ID, BEGIN, 7, 1), true),
        (record(ID, BEGIN, 6, 1), true),
        (record(ID, BEGIN - 1, 7, 1), true),
        // Made after the newest one, with an earlier time: the service's time was set back in between.
        (record(ID, BEGIN - 1, 9, 1), false),
        (record(ID, BEGIN, 7, 2), false),
        (record(ID, BEGIN, 6, 2), false),
        (record(ID, BEGIN - 1, 9, 2), false),
    ] {
        for read in [&first, &read] {
            match (fixture.renew(read, &late), is_confirmed) {
                (Renewed::Before(now), true) | (Renewed::Overtaken(now), false) => {
                    assert_eq!(now.lock.unwrap().record, Some(Ok(newest.clone())));
                }
                (other, _) => panic!("{late:?}: {other:?}"),
            }
            assert_eq!(fixture.lock().record, Some(Ok(newest.clone())));
        }
    }
    // Another keeper of the same run continues, even if it does not know the last record.
    let next = record(ID, BEGIN, 8, 2);
    assert_eq!(stored(&fixture.renew(&first, &next)).record, Some(Ok(next.clone())));
}

for_each_lock!(a_late_renewal_replaces_no_newer_one);

fn a_renewal_brings_no_lock_back_and_touches_no_other(lock: Lock) {
    let fixture = Fixture::new(lock);
    let first = fixture.lock();
    let read = stored(&fixture.renew(&first, &record(ID, BEGIN, 1, 1))).clone();
    fixture.env.delete_lock();
    for read in [&first, &read] {
        let lost = fixture.renew(read, &record(ID, BEGIN, 2, 1));
        assert!(matches!(&lost, Renewed::Lost(LeaseRead { lock: None, .. })), "{lost:?}");
        fixture.env.assert_unlocked();
    }
    let others = fixture.env.lock_of_another();
    for read in [&first, &read] {
        assert!(matches!(fixture.renew(read, &record(ID, BEGIN, 3, 1)), Renewed::Lost(_)));
        assert_eq!(fixture.lock().stored.text(), others);
        assert_eq!(fixture.lock().record, None);
    }
}

for_each_lock!(a_renewal_brings_no_lock_back_and_touches_no_other);

fn a_claim_replaces_only_what_was_read_and_ends_the_renewals(lock: Lock) {
    let fixture = Fixture::new(lock);
    let read = stored(&fixture.renew(&fixture.lock(), &record(ID, BEGIN, 1, 1))).clone();
    // The holder wakes up and renews after the taker has read.
    let woken = stored(&fixture.renew(&read, &record(ID, BEGIN + 1, 2, 1))).clone();
    let (after, now) = fixture.claim(&read, &claim(1));
    assert_eq!((after, now.lock.as_ref()), (AfterClaim::Changed, Some(&woken)));
    let (after, now) = fixture.claim(&woken, &claim(1));
    assert_eq!(after, AfterClaim::Ours);
    let claimed = now.lock.unwrap();
    // The same claim again, as after a lost response, and another taker's.
    assert_eq!(fixture.claim(&woken, &claim(1)).0, AfterClaim::Ours);
    assert_eq!(fixture.claim(&woken, &claim(2)).0, AfterClaim::Changed);
    for read in [&woken, &claimed] {
        let lost = fixture.renew(read, &record(ID, BEGIN + 2, 3, 1));
        assert!(matches!(&lost, Renewed::Lost(LeaseRead { lock: Some(_), .. })), "{lost:?}");
    }
    assert_eq!(fixture.lock(), claimed);
    // A taker that died has left its claim.
    let (after, now) = fixture.claim(&claimed, &claim(3));
    assert_eq!(after, AfterClaim::Ours);
    assert_eq!(fixture.delete_claimed(&claimed), Removed::Anothers);
    assert_eq!(fixture.delete_claimed(&now.lock.clone().unwrap()), Removed::Gone(None));
    fixture.env.assert_unlocked();
    assert_eq!(fixture.delete_claimed(&now.lock.unwrap()), Removed::Gone(None));
    assert_eq!(fixture.claim(&claimed, &claim(4)).0, AfterClaim::Gone);
    fixture.env.assert_unlocked();
}

#[test]
fn a_claim_of_an_item() {
    a_claim_replaces_only_what_was_read_and_ends_the_renewals(Lock::DynamoDb);
}

#[test]
fn a_claim_of_both_parts() {
    a_claim_replaces_only_what_was_read_and_ends_the_renewals(Lock::Both);
}

#[test]
fn the_object_of_another_lock_is_left_when_a_claimed_lock_is_deleted() {
    let fixture = Fixture::new(Lock::Both);
    fixture.renew(&fixture.lock(), &record(ID, BEGIN, 1, 1));
    let (_, now) = fixture.claim(&fixture.lock(), &claim(1));
    let others = lock_json("11111111-2222-3333-4444-555555555555", &fixture.env.path());
    cloud().s3("PUT", &format!("{}.tflock", fixture.env.path()), others.as_bytes());
    assert_eq!(fixture.delete_claimed(&now.lock.unwrap()), Removed::Gone(None));
    assert_eq!(fixture.env.locks(), [others]);
}

#[test]
fn an_object_with_a_lapsed_lease_is_deleted_only_as_it_was_read() {
    let fixture = Fixture::new(Lock::File);
    let read = stored(&fixture.renew(&fixture.lock(), &record(ID, BEGIN, 1, 1))).clone();
    let woken = stored(&fixture.renew(&read, &record(ID, BEGIN + 1, 2, 1))).clone();
    let remove = |lock: &LeasedLock| fixture.runtime.block_on(fixture.stores.remove(&fixture.place, &lock.stored));
    assert_eq!(remove(&read), Ok(Removed::Anothers));
    assert_eq!(fixture.lock(), woken);
    assert!(fixture.runtime.block_on(fixture.stores.claim(&fixture.place, &woken, &claim(1))).is_err());
    assert_eq!(remove(&woken), Ok(Removed::Gone(None)));
    fixture.env.assert_unlocked();
}

fn a_renewal_whose_response_is_lost_counts(lock: Lock) {
    let once = AtomicBool::new(true);
    let proxy = Proxy::start(cloud().port, move |request: &Message| {
        let is_write = request.asks_for("PutItem") || request.start.starts_with("PUT ");
        if is_write && once.swap(false, Ordering::SeqCst) { ProxyAction::LoseAnswer } else { ProxyAction::Pass }
    });
    let fixture = Fixture::new(lock);
    let fixture = Fixture::of(fixture.env, fixture.text, proxy.port);
    let record = record(ID, BEGIN, 1, 1);
    match fixture.renew(&fixture.lock(), &record) {
        Renewed::Before(now) => assert!(now.date.is_some() && now.lock.unwrap().record == Some(Ok(record))),
        other => panic!("{other:?}"),
    }
}

for_each_lock!(a_renewal_whose_response_is_lost_counts);

#[test]
fn a_lock_with_something_else_in_the_place_of_the_record_gets_none() {
    for lock in [Lock::DynamoDb, Lock::File] {
        let fixture = Fixture::new(lock);
        if lock == Lock::File {
            let body = fixture.text.replacen('{', r#"{"tf":{},"#, 1);
            cloud().s3("PUT", &format!("{}.tflock", fixture.env.path()), body.as_bytes());
        } else {
            let item = json!({
                "LockID": { "S": fixture.env.path() }, "Info": { "S": fixture.text }, "tf": { "S": "mine" },
            });
            cloud().dynamodb("PutItem", &json!({ "TableName": fixture.env.table, "Item": item }));
        }
        let read = fixture.lock();
        assert!(read.record.as_ref().unwrap().is_err(), "{read:?}");
        let renewed = fixture.runtime.block_on(fixture.stores.renew(&fixture.place, &read, &record(ID, BEGIN, 1, 1)));
        assert!(renewed.is_err_and(|failure| failure.is_final()));
        assert_eq!(fixture.lock(), read);
        let removed = fixture.runtime.block_on(fixture.stores.remove(&fixture.place, &read.stored));
        assert_eq!(removed, Ok(Removed::Gone(None)));
    }
}

#[test]
fn an_object_keeps_what_the_backend_says_about_it() {
    let fixture = Fixture::new(Lock::File);
    for (more, checksum) in [(json!({}), true), (json!({ "skip_s3_checksum": true }), false)] {
        let mut more = more;
        more["lock_tags"] = json!({ "team": "a b", "x": "1" });
        more["acl"] = json!("bucket-owner-full-control");
        more["encrypt"] = json!(true);
        let seen = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
        let log = std::sync::Arc::clone(&seen);
        let proxy = Proxy::start(cloud().port, move |request: &Message| {
            if request.start.starts_with("PUT ") {
                log.lock().unwrap().push(request.clone());
            }
            ProxyAction::Pass
        });
        let stores = fixture.runtime.block_on(connect(&fixture.env, proxy.port, &more));
        let record = record(ID, BEGIN, if checksum { 1 } else { 2 }, 1);
        let renewed = fixture.runtime.block_on(stores.renew(&fixture.place, &fixture.lock(), &record)).unwrap();
        assert_eq!(stored(&renewed).record, Some(Ok(record)));
        let request = seen.lock().unwrap().last().unwrap().clone();
        assert_eq!(request.header("x-amz-tagging"), Some("team=a%20b&x=1"));
        assert_eq!(request.header("x-amz-acl"), Some("bucket-owner-full-control"));
        assert_eq!(request.header("x-amz-server-side-encryption"), Some("AES256"));
        assert_eq!(request.header("content-type"), Some("application/json"));
        assert_eq!(request.header("x-amz-checksum-sha256").is_some(), checksum, "{:?}", request.headers);
        assert_eq!(request.header("x-amz-checksum-crc32"), None);
        assert_eq!(request.header("x-amz-trailer"), None);
        assert!(request.header("if-match").is_some());
    }
}

fn terraform_releases_a_lock_with_a_lease(lock: Lock) {
    for force in [false, true] {
        let env = TestEnv::new(lock, WAITS);
        let run = env.start_apply(Subject::Bare);
        let text = env.locks()[0].clone();
        let id = id_of(&text);
        let fixture = Fixture::of(env, text, cloud().port);
        let mut record = record(&id, BEGIN, 1, 7);
        record.holder.job = "https://ci.example.org/".repeat(40);
        let leased = stored(&fixture.renew(&fixture.lock(), &record)).clone();
        assert_eq!(leased.record.as_ref().unwrap().as_ref().unwrap().holder.job, "");
        let raw = if lock == Lock::File { fixture.env.locks()[0].clone() } else { fixture.raw_item().to_string() };
        assert!(raw.contains("ci-7") && leased.stored.text() == fixture.text, "{raw}");
        if lock == Lock::File {
            assert!(raw.len() <= 1024, "{}", raw.len());
        }
        if force {
            // A plan shows the lock, as without a lease.
            let end = fixture.env.run(Subject::Bare, &["plan", "-no-color"]);
            assert!(end.code() == Some(1) && end.err.contains(&id), "{}", fixture.env.dump(&end));
            let end = fixture.env.run(Subject::Bare, &["force-unlock", "-force", "-no-color", &id]);
            assert_eq!(end.code(), Some(0), "{}", fixture.env.dump(&end));
            fixture.env.assert_unlocked();
        }
        fixture.env.unblock();
        let end = run.wait();
        assert_eq!(end.code() == Some(0), !force, "{}", fixture.env.dump(&end));
        fixture.env.assert_unlocked();
    }
}

for_each_lock!(terraform_releases_a_lock_with_a_lease);

fn tf_releases_its_lock_with_a_lease(lock: Lock) {
    let env = TestEnv::new(lock, WAITS);
    let run = env.start_apply(Subject::Tf);
    let text = env.locks()[0].clone();
    let fixture = Fixture::of(env, text, cloud().port);
    fixture.renew(&fixture.lock(), &record(&id_of(&fixture.text), BEGIN, 1, 7));
    run.kill_terraform();
    let end = run.wait();
    assert!(end.err.contains("released"), "{}", fixture.env.dump(&end));
    fixture.env.assert_unlocked();
}

for_each_lock!(tf_releases_its_lock_with_a_lease);

#[test]
fn a_service_that_ignores_the_condition_of_a_renewal_gets_no_lease() {
    let fixture = Fixture::new(Lock::File);
    let limit = Duration::from_mins(1);
    let ask = |stores: &Stores, place: &StoreKey| {
        fixture.runtime.block_on(stores.treatment_of_renewals(place, limit)).expect("an answer in time")
    };
    assert_eq!(ask(&fixture.stores, &fixture.place), IfMatch::Obeyed);
    for absent_only in [false, true] {
        // The proxy takes the condition out of a put: out of each, or only where there is no object.
        let is_first = AtomicBool::new(true);
        let port = cloud().port;
        let proxy = Proxy::start(port, move |request: &Message| {
            let is_conditional = request.start.starts_with("PUT ") && request.header("if-match").is_some();
            if !is_conditional || (!absent_only && is_first.swap(false, Ordering::SeqCst)) {
                return ProxyAction::Pass;
            }
            let path = request.start.split(' ').nth(1).unwrap().split('?').next().unwrap().to_owned();
            let answer = cloud().s3("PUT", path.trim_start_matches('/'), b"x");
            ProxyAction::Answer(answer)
        });
        let stores = fixture.runtime.block_on(connect(&fixture.env, proxy.port, &json!({})));
        assert_eq!(ask(&stores, &fixture.place), IfMatch::Ignored, "{absent_only}");
    }
    let refusing = Proxy::start(cloud().port, |request: &Message| {
        if request.start.starts_with("PUT ") { ProxyAction::Answer(request.denied()) } else { ProxyAction::Pass }
    });
    let stores = fixture.runtime.block_on(connect(&fixture.env, refusing.port, &json!({})));
    assert_eq!(ask(&stores, &fixture.place), IfMatch::Unknown);
    // Nothing is left there but the lock.
    let listed = cloud().s3("GET", &format!("{}?list-type=2", fixture.env.bucket), b"").text();
    assert_eq!(listed.matches("<Key>").count(), 1, "{listed}");
    assert_eq!(fixture.lock().stored.text(), fixture.text);
    let item = fixture.stores.item("no-table", "no-item");
    assert_eq!(ask(&fixture.stores, &item), IfMatch::Obeyed);
}

/// The keeper has ended before `tf` deletes the lock, but its last renewal may still arrive.
#[test]
fn a_renewal_between_the_read_and_the_delete_does_not_keep_the_lock() {
    for lock in Lock::ALL {
        let mut env = TestEnv::new(lock, WAITS);
        let (table, path) = (env.table.clone(), env.path());
        let once = AtomicBool::new(true);
        let proxy = Proxy::start(cloud().port, move |request: &Message| {
            let is_item = request.asks_for("DeleteItem");
            let is_delete = request.is_ours() && (is_item || request.start.starts_with("DELETE "));
            if is_delete && once.swap(false, Ordering::SeqCst) {
                if is_item {
                    let info = cloud().item(&table, &path).unwrap();
                    let tf = json!({ "M": { "v": { "N": "1" } } });
                    let item = json!({ "LockID": { "S": path }, "Info": { "S": info }, "tf": tf });
                    cloud().dynamodb("PutItem", &json!({ "TableName": table, "Item": item }));
                } else {
                    let text = cloud().object(&format!("{path}.tflock")).unwrap();
                    let text = crate::lease::record::join(&text, r#"{"v":1}"#).unwrap();
                    cloud().s3("PUT", &format!("{path}.tflock"), text.as_bytes());
                }
            }
            ProxyAction::Pass
        });
        env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
        let run = env.start_apply(Subject::Tf);
        run.kill_terraform();
        let end = run.wait();
        assert!(end.err.contains("released"), "{lock:?} {}", env.dump(&end));
        env.assert_unlocked();
    }
}

#[test]
fn doctor_says_why_a_lock_object_gets_no_lease() {
    let mut env = TestEnv::new(Lock::File, "true");
    env.set("TFW_LEASE", "5m");
    let end = env.run(Subject::Tf, &["locks", "doctor"]);
    assert!(end.code() == Some(0) && end.out.contains("lease: conditional writes are obeyed"), "{}", env.dump(&end));
    let proxy = Proxy::start(cloud().port, |request: &Message| {
        if request.start.starts_with("PUT ") && request.header("if-match").is_some() {
            let path = request.start.split(' ').nth(1).unwrap().split('?').next().unwrap().to_owned();
            return ProxyAction::Answer(cloud().s3("PUT", path.trim_start_matches('/'), b"x"));
        }
        ProxyAction::Pass
    });
    env.set("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", proxy.port));
    let end = env.run(Subject::Tf, &["locks", "doctor"]);
    assert!(end.out.contains("ignores If-Match on a put"), "{}", env.dump(&end));
}
