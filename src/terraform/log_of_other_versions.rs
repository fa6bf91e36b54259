//! Tests with logs of versions that are not installed for the tests. The logs are made from the formats in the sources
//! of these versions.

use super::*;
use crate::terraform::log::tests::ID;

const INFO: &str = r#"{\"ID\":\"5e75cb05-d70c-4132-39e0-d2abba1b3077\",\"Operation\":\"OperationTypeApply\",\"Info\":\"\",\"Who\":\"root@vm\",\"Version\":\"1.5.7\",\"Created\":\"2026-11-23T01:46:07.59Z\",\"Path\":\"bkt/dir/prod.tfstate\"}"#;

fn log(text: &str) -> Log {
    let mut log = Log::default();
    log.read(text.as_bytes());
    log
}

fn at(millisecond: u32) -> String {
    format!("2026-11-23T01:46:07.{millisecond:03}Z")
}

/// The format is `[DEBUG] [aws-sdk-go] %s` (aws-sdk-go-base v0.7.1, logger.go:17), with a message of the SDK for Go v1
/// (aws/client/logger.go, `logReqMsg` and `logRespMsg`). The standard logger writes it, and does not change the lines
/// after the first (Terraform v1.5.7, internal/logging/logging.go:57).
fn v1_request(millisecond: u32, call: &str, body: &str) -> String {
    let target = call.split('/').nth(1).unwrap();
    format!(
        "{} [DEBUG] [aws-sdk-go] DEBUG: Request {call} Details:\n\
         ---[ REQUEST POST-SIGN ]-----------------------------\nPOST / HTTP/1.1\r\nHost: dynamodb.eu-west-1.amazonaws.com\r\n\
         Authorization: AWS4-HMAC-SHA256 Credential=K\r\nX-Amz-Target: DynamoDB_20120810.{target}\r\n\r\n{body}\n\
         -----------------------------------------------------\n",
        at(millisecond)
    )
}

fn v1_answer(millisecond: u32, call: &str, status: &str, body: &str) -> String {
    format!(
        "{time} [DEBUG] [aws-sdk-go] DEBUG: Response {call} Details:\n\
         ---[ RESPONSE ]--------------------------------------\nHTTP/1.1 {status}\r\nX-Amz-Crc32: 2745614147\r\n\r\n\n\
         -----------------------------------------------------\n{time} [DEBUG] [aws-sdk-go] {body}\n",
        time = at(millisecond)
    )
}

fn v1_put(millisecond: u32) -> String {
    let body = format!(
        r#"{{"ConditionExpression":"attribute_not_exists(LockID)","Item":{{"Info":{{"S":"{INFO}"}},"LockID":{{"S":"bkt/dir/prod.tfstate"}}}},"TableName":"locks"}}"#
    );
    v1_request(millisecond, "dynamodb/PutItem", &body)
}

const V1_DELETE: &str = r#"{"Key":{"LockID":{"S":"bkt/dir/prod.tfstate"}},"TableName":"locks"}"#;

/// The log of one lock from its request to its delete (Terraform v1.5.7, main.go:82 and
/// backend/remote-state/s3/client.go:182: `log.Printf("[DEBUG] Uploading remote state to S3: %#v", i)`).
pub(super) fn v1_life() -> Vec<String> {
    vec![
        format!("{} [INFO]  Terraform version: 1.5.7\n", at(500)),
        v1_put(594),
        v1_answer(600, "dynamodb/PutItem", "200 OK", "{}"),
        format!(
            "{} [DEBUG] Uploading remote state to S3: {{\n  Body: buffer(0xc000),\n  Bucket: \"bkt\",\n  ContentLength: 157,\n  Key: \"dir/prod.tfstate\"\n}}\n",
            at(700)
        ),
        v1_request(
            710,
            "dynamodb/PutItem",
            r#"{"Item":{"Digest":{"S":"d41d"},"LockID":{"S":"bkt/dir/prod.tfstate-md5"}},"TableName":"locks"}"#,
        ),
        v1_answer(720, "dynamodb/PutItem", "200 OK", "{}"),
        v1_request(800, "dynamodb/DeleteItem", V1_DELETE),
        v1_answer(810, "dynamodb/DeleteItem", "200 OK", "{}"),
    ]
}

#[test]
fn a_terraform_before_1_6_tells_its_lock_by_its_requests() {
    let life = v1_life();
    for (steps, unreleased, locked, uploading, unlocking) in [
        (1, 0, false, false, false),
        (2, 1, false, false, false),
        (3, 1, true, false, false),
        (4, 1, true, true, false),
        (6, 1, true, true, false),
        (7, 1, true, false, true),
        (8, 0, true, false, true),
    ] {
        let log = log(&life[..steps].concat());
        assert_eq!(log.unreleased().count(), unreleased, "{steps}");
        if let Some(lock) = log.named().next() {
            let seen = (lock.progress.held.is_some(), lock.progress.is_writing(), !lock.progress.is_before_unlock());
            assert_eq!(seen, (locked, uploading, unlocking), "{steps}");
            assert_eq!((lock.id.as_str(), lock.bucket.as_str(), lock.key.as_str()), (ID, "bkt", "dir/prod.tfstate"));
            assert_eq!(lock.parts, LockParts { s3: false, dynamodb: true });
        }
        assert!(log.logs_locks() || steps == 1, "{steps}");
    }
}

#[test]
fn a_refused_request_of_old_is_no_lock_that_was_had_and_stays_to_be_looked_for() {
    let refusal = r#"{"__type":"com.amazonaws.dynamodb.v20120810#ConditionalCheckFailedException","message":"x"}"#;
    let log =
        log(&[v1_life()[0].clone(), v1_put(594), v1_answer(600, "dynamodb/PutItem", "400 Bad Request", refusal)]
            .concat());
    assert!(log.named().next().unwrap().progress.held.is_none());
    assert_eq!(log.unreleased().count(), 1);
}

#[test]
fn a_log_of_requests_cut_at_any_byte_or_read_in_pieces_claims_no_other_lock() {
    for text in [v1_life().concat(), tofu_life(true).concat()] {
        for end in 0..text.len() {
            assert!(log(&text[..end]).named().all(|lock| lock.id == ID), "cut at {end}");
        }
        for size in [1, 2, 7, 64, 1000] {
            let mut pieces = Log::default();
            text.as_bytes().chunks(size).for_each(|piece| pieces.read(piece));
            assert_eq!(pieces, log(&text), "pieces of {size}");
        }
    }
}

/// A reader that resumes from a stored [`Log`] starts before an incomplete record, and gets the same result.
#[test]
fn a_log_of_requests_is_read_on_from_wherever_it_was_kept() {
    for text in [v1_life().concat(), tofu_life(true).concat()] {
        for end in (0..text.len()).step_by(13) {
            let mut first = Log::default();
            first.read(&text.as_bytes()[..end]);
            let from = end - usize::try_from(first.unfinished()).unwrap();
            let kept = serde_json::to_string(&first).unwrap();
            let mut second: Log = serde_json::from_str(&kept).unwrap();
            second.read(&text.as_bytes()[from..]);
            let whole = log(&text);
            assert_eq!(second.unreleased().count(), whole.unreleased().count(), "kept at {end}");
            assert_eq!(second.unreleased_unnamed().count(), whole.unreleased_unnamed().count(), "kept at {end}");
        }
    }
}

/// A record of OpenTofu v1.11.0 and later, written because of attachLoggerToContext in s3Lock and dynamoDBLock
/// (backend/remote-state/s3/client.go:294, 332). The format is that of aws-sdk-go-base v2.0.0-beta.66 (logger.go:139
/// and 163, logging/hc_logger.go). If `newer` is true, it is that of beta.72, in which the name of a method includes
/// its service.
fn tofu_record(millisecond: u32, kind: &str, service: &str, method: &str, newer: bool, fields: &str) -> String {
    let method = if newer {
        format!("rpc.method={service}/{method} rpc.system.name=aws-api")
    } else {
        format!("rpc.method={method} rpc.service={service} rpc.system=aws-api")
    };
    format!("{} [DEBUG] backend-s3: HTTP {kind}: aws.region=eu-west-1 {method} {fields}\n", at(millisecond))
}

const LOCK_OBJECT: &str = "aws.s3.bucket=bkt aws.s3.key=dir/prod.tfstate.tflock";

/// The SHA-256 of the lock in `tofu_life`, in the form in which the log contains it.
fn checksum() -> String {
    aws_smithy_types::base64::encode(Sha256::digest(INFO.replace('\\', "")))
}

pub(crate) fn tofu_life(newer: bool) -> Vec<String> {
    let record = |at, kind, service, method, fields: &str| tofu_record(at, kind, service, method, newer, fields);
    let (sent, received) = ("Request Sent", "Response Received");
    vec![
        format!("{} [INFO]  OpenTofu version: 1.11.5\n", at(500)),
        record(
            594,
            sent,
            "S3",
            "PutObject",
            &format!(
                "{LOCK_OBJECT} http.request.header.if_none_match=\"*\" http.request.header.x_amz_checksum_sha256=\"{}\" \
                 http.request.body=\"[Redacted: 245 bytes, Type: application/json]\"",
                checksum()
            ),
        ),
        record(
            600,
            received,
            "S3",
            "PutObject",
            &format!("{LOCK_OBJECT} http.status_code=200 http.response.body=\"\""),
        ),
        record(
            601,
            sent,
            "DynamoDB",
            "PutItem",
            &format!(
                "aws.dynamodb.table_names=[\"locks\"] http.method=POST\n  http.request.body=\n  | {{\"ConditionExpression\":\"attribute_not_exists(LockID)\",\"Item\":{{\"LockID\":{{\"S\":\"bkt/dir/prod.tfstate\"}},\"Info\":{{\"S\":\"{INFO}\"}}}},\"TableName\":\"locks\"}}\n   http.request_content_length=402"
            ),
        ),
        // In this record, the status is after the body, because the fields have no fixed order.
        record(
            610,
            received,
            "DynamoDB",
            "PutItem",
            "http.duration=9\n  http.response.body=\n  | {}\n   http.status_code=200",
        ),
        record(700, sent, "S3", "PutObject", "aws.s3.bucket=bkt aws.s3.key=dir/prod.tfstate http.method=PUT"),
        record(710, received, "S3", "PutObject", "aws.s3.bucket=bkt aws.s3.key=dir/prod.tfstate http.status_code=200"),
        record(800, sent, "S3", "DeleteObject", LOCK_OBJECT),
        record(805, received, "S3", "DeleteObject", &format!("{LOCK_OBJECT} http.status_code=204")),
        record(
            806,
            sent,
            "DynamoDB",
            "DeleteItem",
            "http.method=POST\n  http.request.body=\n  | {\"ConditionExpression\":\"Info = :info\",\"Key\":{\"LockID\":{\"S\":\"bkt/dir/prod.tfstate\"}},\"TableName\":\"locks\"}\n  ",
        ),
        record(810, received, "DynamoDB", "DeleteItem", "http.status_code=200\n  http.response.body=\n  | {}\n  "),
    ]
}

#[test]
fn a_later_opentofu_tells_both_halves_by_its_requests() {
    for newer in [false, true] {
        let life = tofu_life(newer);
        let seen = |steps: usize| log(&life[..steps].concat());
        // Up to here, only the object was requested. It is identified by the checksum of its text.
        let first = seen(3);
        let object = first.unreleased_unnamed().next().unwrap();
        let expected =
            LockIdentity::Object { bucket: "bkt".into(), key: "dir/prod.tfstate".into(), checksum: Some(checksum()) };
        assert_eq!((&object.identity, object.progress.held.is_some()), (&expected, true));
        // The item's request contains the ID, so the object and the item are now parts of one lock.
        let second = seen(4);
        assert_eq!(second.unreleased_unnamed().count(), 0);
        assert_eq!(second.named().next().unwrap().parts, LockParts { s3: true, dynamodb: true });
        assert!(second.named().next().unwrap().progress.held.is_none());
        assert!(seen(5).named().next().unwrap().progress.held.is_some());
        assert!(
            !seen(5).named().next().unwrap().progress.is_writing()
                && seen(6).named().next().unwrap().progress.is_writing()
                && seen(7).named().next().unwrap().progress.is_writing()
        );
        assert!(
            seen(8).named().next().unwrap().progress.is_unlocking()
                && !seen(8).named().next().unwrap().progress.is_writing()
        );
        assert_eq!(seen(9).unreleased().count(), 1, "one half is gone");
        assert_eq!(seen(10).unreleased().count(), 1);
        assert_eq!(seen(11).unreleased().count(), 0);
    }
}

#[test]
fn without_a_checksum_an_object_is_known_by_its_place_alone() {
    let life = tofu_life(false);
    let put = life[1].replace(&format!("http.request.header.x_amz_checksum_sha256=\"{}\"", checksum()), "");
    let log = log(&[life[0].clone(), put].concat());
    let LockIdentity::Object { checksum, .. } = &log.unnamed().next().unwrap().identity else { panic!() };
    assert_eq!(*checksum, None);
}

/// The records are written in internal/backend/local/backend_local.go: lines 51 and 64 in OpenTofu v1.6.0, 57 and 70 in
/// v1.10.0, 54 and 67 in Terraform v1.15.9.
#[test]
fn a_pair_of_records_of_the_local_backend_is_a_lock_only_where_nothing_else_would_tell_it() {
    let pair = format!(
        "{} [TRACE] backend/local: requesting state lock for workspace \"green\"\n{} [TRACE] backend/local: reading remote state for workspace \"green\"\n",
        at(594),
        at(597)
    );
    for (version, unnamed) in [
        ("OpenTofu version: 1.6.2", 1),
        ("OpenTofu version: 1.10.9", 1),
        ("Terraform version: 1.11.4", 0),
        ("Terraform version: 1.8.4", 0),
        // This log does not contain the requests, because `tf` did not choose the log level.
        ("Terraform version: 1.5.7", 1),
    ] {
        let log = log(&format!("{} [INFO]  {version}\n{pair}", at(500)));
        assert_eq!(log.unreleased_unnamed().count(), unnamed, "{version}");
        assert_eq!(log.unnamed().next().unwrap().identity, LockIdentity::Workspace("green".into()));
    }
    // A log that reports a write of the state does not necessarily contain the requests, because the write is logged at
    // another level (backend/remote-state/s3/client.go:182).
    let upload = format!(
        "{} [DEBUG] Uploading remote state to S3: {{\n  Body: buffer(0xc000),\n  Bucket: \"bkt\",\n  Key: \"dir/prod.tfstate\"\n}}\n",
        at(700)
    );
    let written = log(&format!("{} [INFO]  Terraform version: 1.5.7\n{pair}{upload}", at(500)));
    assert!(written.may_hold() && !written.logs_locks());
    assert!(written.unnamed().next().unwrap().progress.is_writing(), "its write may be on its way");
    let told = format!(
        "{} [INFO]  OpenTofu version: 1.6.2\n{} [INFO]  CLI command args: []string{{\"plan\", \"-lock=false\"}}\n{pair}",
        at(500),
        at(501)
    );
    assert!(log(&told).unnamed().next().is_none(), "it was told to take no lock");
}

/// A terraform that is killed between the two records may hold its lock. Or its lock request may still be in flight,
/// and succeed after its death.
#[test]
fn a_lock_that_the_local_backend_asked_for_may_stand_before_it_was_given() {
    let lines = [
        format!("{} [TRACE] backend/local: requesting state lock for workspace \"green\"\n", at(594)),
        format!("{} [TRACE] backend/local: reading remote state for workspace \"green\"\n", at(597)),
    ];
    let version = |version: &str| format!("{} [INFO]  {version}\n", at(500));
    let asked = log(&[version("OpenTofu version: 1.6.2"), lines[0].clone()].concat());
    let lock = asked.unreleased_unnamed().next().unwrap();
    assert!(asked.may_hold() && lock.is_only_asked_for() && !asked.ends_holding_lock());
    // A reader that resumes from the stored log updates the same lock and does not add a second one.
    let mut kept: Log = serde_json::from_str(&serde_json::to_string(&asked).unwrap()).unwrap();
    kept.read(lines[1].as_bytes());
    assert_eq!(kept.unnamed().count(), 1);
    assert!(
        kept.unnamed().next().unwrap().progress.held.is_some() && !kept.unnamed().next().unwrap().is_only_asked_for()
    );
    // If the log reports the locks themselves, the two records of the local backend do not prove a lock.
    for told in ["Terraform version: 1.11.4", "Terraform version: 1.8.4"] {
        assert!(!log(&[version(told), lines[0].clone()].concat()).may_hold(), "{told}");
    }
    // Terraform exited successfully, so it has released every lock that it had requested.
    let mut well = asked.clone();
    well.ended_well();
    assert!(!well.may_hold());
}

/// The messages are those in Terraform v1.9.8, backend/remote-state/s3/client.go:296 and 343.
#[test]
fn a_terraform_from_1_6_to_1_9_tells_no_answers_and_ends_well_without_them() {
    let locked = |at, text: &str| super::tests::lock_line(at, text, ID, "r");
    let life = [
        format!("{} [INFO]  Terraform version: 1.9.8\n", at(100)),
        locked(7, "Locking remote state"),
        "2026-11-23T01:46:08.100Z [INFO]  backend-s3: Downloading remote state: tf_backend.operation=Get tf_backend.s3.bucket=bkt tf_backend.s3.path=dir/prod.tfstate\n".to_owned(),
        locked(9, "Unlocking remote state"),
    ];
    assert!(log(&life[..2].concat()).named().next().unwrap().progress.held.is_none());
    assert!(log(&life[..3].concat()).named().next().unwrap().progress.held.is_some());
    let mut whole = log(&life.concat());
    assert!(whole.logs_locks());
    assert_eq!(whole.unreleased().count(), 1, "it does not say that it is gone");
    assert!(!whole.ends_with_request() && log(&life[..3].concat()).ends_with_request());
    whole.ended_well();
    assert_eq!(whole.unreleased().count(), 0);
    // Versions since 1.10 report each release. So a successful exit does not count as a release.
    let mut newer = log(&life
        .concat()
        .replace("1.9.8\n", "1.10.5\n")
        .replace("Locking remote state", "Attempting to lock remote state (DynamoDB only)..."));
    newer.ended_well();
    assert_eq!(newer.unreleased().count(), 1);
}
