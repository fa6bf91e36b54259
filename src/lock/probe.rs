//! Tests whether a release would be permitted, with requests that change no lock and no state. An IAM policy alone does
//! not show that, because an organisation, a permissions boundary, a session or an endpoint can restrict the policy.

use std::time::Duration;

use aws_sdk_dynamodb::types::AttributeValue;
use aws_sdk_s3::error::ProvideErrorMetadata;
use aws_sdk_s3::primitives::ByteStream;
use jiff::Timestamp;
use tokio::time::timeout;

use super::stores::{LOCK_FILE, StoreKey, StoredLock};
use super::{dynamodb, s3, service_time};
use crate::aws::failure::{Cause, Failure};
use crate::terraform::lock_info::{is_lock_id, new_id};

/// A text that no lock has. It is the condition of a delete that must not delete anything.
const NO_LOCK: &str = "tf locks doctor: no lock has this text";

/// The result of a request that tests a permission and changes nothing.
#[derive(Debug)]
pub(crate) struct Trial {
    /// `Ok` if the action is permitted, otherwise the failure of the request.
    pub(crate) answer: Result<(), Failure>,
    /// The service's time, from the `Date` header of a refusal. `None` if the request succeeded or the header is
    /// missing.
    pub(crate) clock: Option<Timestamp>,
}

/// How a bucket treats the condition `If-Match` of a delete or a put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IfMatch {
    /// The bucket obeys the condition.
    Obeyed,
    /// The bucket ignores the condition: a delete deletes any object at the key, and a put replaces any object.
    Ignored,
    /// Not known, because a request of the test failed for another reason.
    Unknown,
}

/// The ETag of an object that does not exist.
const ANOTHERS: &str = "\"00000000000000000000000000000000\"";

/// The body of the objects that these tests put. A person may find one that a killed test has left.
const TEST_BODY: &str = "tf: a test of the service has left this; it can be deleted";

/// The body of those that version 0.1 puts.
const TEST_BODY_OF_0_1: &str = "tf locks doctor: this can be deleted";

/// Returns an unused key for the test objects of the state with the key `state`: `STATE.RANDOM.tflock`, where RANDOM
/// has the form of a lock ID. It ends like a lock's key, because a policy may permit only that.
pub(crate) fn test_key(state: &str) -> String {
    format!("{state}.{}{LOCK_FILE}", new_id())
}

/// Returns whether `stored`, which was read at `place`, is an object that one of these tests has put: it has a key of
/// [`test_key`] and the body of a test object. It is there while a test runs. It stays if the process of the test was
/// killed, or if deleting it was denied.
pub(crate) fn is_test_object(place: &StoreKey, stored: &StoredLock) -> bool {
    let (StoreKey::S3 { key, .. }, StoredLock::Object(_)) = (place, stored) else { return false };
    let name = key.strip_suffix(LOCK_FILE).and_then(|key| key.rsplit_once('.'));
    name.is_some_and(|(state, id)| !state.is_empty() && is_lock_id(id))
        && [TEST_BODY, TEST_BODY_OF_0_1].contains(&stored.text())
}

/// Tests whether a delete of the item `path` is permitted. The delete has a condition that no lock fulfils.
pub(crate) async fn delete_item(client: &aws_sdk_dynamodb::Client, table: &str, path: &str) -> Trial {
    let request = client
        .delete_item()
        .table_name(table)
        .key("LockID", AttributeValue::S(path.to_owned()))
        .condition_expression("Info = :info")
        .expression_attribute_values(":info", AttributeValue::S(NO_LOCK.to_owned()));
    match request.send().await {
        Ok(_) => Trial { answer: Ok(()), clock: None },
        Err(error) => {
            let clock =
                error.raw_response().and_then(|response| response.headers().get("date")).and_then(service_time::parse);
            let refused_by_condition = error.as_service_error().is_some_and(
                aws_sdk_dynamodb::operation::delete_item::DeleteItemError::is_conditional_check_failed_exception,
            );
            Trial {
                answer: if refused_by_condition {
                    Ok(())
                } else {
                    Err(dynamodb::failure("dynamodb:DeleteItem", &error))
                },
                clock,
            }
        }
    }
}

/// Tests whether a delete is permitted and how the bucket treats `If-Match`, by deleting an object that does not exist.
/// `key` must not be in use, because a service that ignores the condition deletes any object there. The treatment is a
/// [`Failure`] if a request of the test has failed for another reason, or if the service has not answered within
/// `limit`: that shows nothing about the condition. The test object is deleted again in any case. So the caller must
/// not drop this before it is ready.
pub(crate) async fn delete_object(
    client: &aws_sdk_s3::Client,
    bucket: &str,
    key: &str,
    limit: Duration,
) -> (Trial, Result<IfMatch, Failure>) {
    let mut may_be_there = false;
    let test = timeout(limit, test_deletes(client, bucket, key, &mut may_be_there)).await;
    if may_be_there {
        let _ = timeout(limit, client.delete_object().bucket(bucket).key(key).send()).await;
    }
    test.unwrap_or_else(|_| {
        let failure = Failure::no_answer("S3", "the request timed out");
        (Trial { answer: Err(failure.clone()), clock: None }, Err(failure))
    })
}

/// Does the work of [`delete_object`], and sets `may_be_there` before it puts the test object.
async fn test_deletes(
    client: &aws_sdk_s3::Client,
    bucket: &str,
    key: &str,
    may_be_there: &mut bool,
) -> (Trial, Result<IfMatch, Failure>) {
    let delete = || client.delete_object().bucket(bucket).key(key);
    let mut permitted = Trial { answer: Ok(()), clock: None };
    if let Err(error) = delete().if_match(ANOTHERS).send().await {
        let response = error.raw_response();
        permitted.clock = response.and_then(|response| response.headers().get("date")).and_then(service_time::parse);
        let status = response.map(|response| response.status().as_u16());
        // A 404 also means that the bucket does not exist. That shows nothing about the permission.
        let is_permitted = matches!(status, Some(404 | 412)) && error.code() != Some("NoSuchBucket");
        if !is_permitted {
            let failure = s3::failure("s3:DeleteObject", &error);
            return (Trial { answer: Err(failure.clone()), ..permitted }, Err(failure));
        }
        if status == Some(412) {
            return (permitted, Ok(IfMatch::Obeyed));
        }
    }
    // The service accepts the delete or answers 404, because there is no object. It may ignore the condition all the
    // same. A test object at that key shows whether it does.
    let body = ByteStream::from_static(TEST_BODY.as_bytes());
    *may_be_there = true;
    if let Err(error) = client.put_object().bucket(bucket).key(key).if_none_match("*").body(body).send().await {
        let failure = s3::failure("s3:PutObject", &error);
        // A service that has refused the put has stored nothing.
        *may_be_there = !failure.is_final();
        return (permitted, Err(failure));
    }
    let treatment = match delete().if_match(ANOTHERS).send().await {
        Ok(_) => Ok(IfMatch::Ignored),
        Err(error) if error.raw_response().is_some_and(|response| response.status().as_u16() == 412) => {
            Ok(IfMatch::Obeyed)
        }
        Err(error) => Err(s3::failure("s3:DeleteObject", &error)),
    };
    (permitted, treatment)
}

/// How a bucket treats `If-None-Match`, the condition with which terraform locks: there must be no object at the key.
#[derive(Clone, Debug)]
pub(crate) enum IfNoneMatch {
    /// The bucket obeys the condition.
    Obeyed,
    /// The bucket ignores the condition: a second lock replaces the first one, and both terraforms continue.
    Ignored,
    /// The service does not implement the condition (status 501): terraform cannot lock there.
    Unsupported,
    /// Not known, because a request failed.
    Unknown(Failure),
    /// The condition was not tested.
    Untried,
}

/// Tests how the bucket treats `If-None-Match`. Puts an object twice, each time on the condition that there is none,
/// and then deletes it. `key` must not be in use, and deleting an object there must be permitted.
pub(crate) async fn put_object(client: &aws_sdk_s3::Client, bucket: &str, key: &str) -> IfNoneMatch {
    let put = || {
        let body = ByteStream::from_static(TEST_BODY.as_bytes());
        client.put_object().bucket(bucket).key(key).if_none_match("*").body(body).send()
    };
    match put().await {
        Ok(_) => {}
        Err(error) if error.raw_response().is_some_and(|answer| answer.status().as_u16() == 501) => {
            return IfNoneMatch::Unsupported;
        }
        Err(error) => return IfNoneMatch::Unknown(s3::failure("s3:PutObject", &error)),
    }
    let taken = match put().await {
        Ok(_) => IfNoneMatch::Ignored,
        Err(error) if error.raw_response().is_some_and(|answer| answer.status().as_u16() == 412) => IfNoneMatch::Obeyed,
        Err(error) => IfNoneMatch::Unknown(s3::failure("s3:PutObject", &error)),
    };
    let _ = client.delete_object().bucket(bucket).key(key).send().await;
    taken
}

/// Tests how the bucket treats `If-Match` on a put, by which a lease in a `.tflock` object is renewed: first where
/// there is no object, and then where there is another one. If the bucket ignores it in the first case, a late renewal
/// would bring a released lock back. `key` must not be in use.
///
/// Returns `None` if the service has not answered within `limit`, or has no capacity now. The test object is deleted
/// again in any case. So the caller must not drop this before it is ready.
pub(crate) async fn replace_object(
    client: &aws_sdk_s3::Client,
    bucket: &str,
    key: &str,
    limit: Duration,
) -> Option<IfMatch> {
    let put = || client.put_object().bucket(bucket).key(key).body(ByteStream::from_static(TEST_BODY.as_bytes()));
    let test = async {
        let mut treatment = None;
        for is_there in [false, true] {
            if is_there && let Err(error) = put().if_none_match("*").send().await {
                return (may_answer_later(&s3::failure("s3:PutObject", &error)), true);
            }
            treatment = match put().if_match(ANOTHERS).send().await {
                Ok(_) => Some(IfMatch::Ignored),
                Err(error) => match (error.raw_response().map(|response| response.status().as_u16()), error.code()) {
                    (Some(412), _) | (Some(404), Some("NoSuchKey")) => Some(IfMatch::Obeyed),
                    _ => may_answer_later(&s3::failure("s3:PutObject", &error)),
                },
            };
            if treatment != Some(IfMatch::Obeyed) {
                // A service that has refused the first put has stored nothing.
                return (treatment, is_there || treatment != Some(IfMatch::Unknown));
            }
        }
        (treatment, true)
    };
    let (treatment, may_be_there) = timeout(limit, test).await.unwrap_or((None, true));
    if may_be_there {
        let _ = timeout(limit, client.delete_object().bucket(bucket).key(key).send()).await;
    }
    treatment
}

/// Returns what the failure of a test says about the service. `None` if another test may have another result.
fn may_answer_later(failure: &Failure) -> Option<IfMatch> {
    if matches!(failure.cause(), Cause::NoAnswer | Cause::Passing | Cause::Busy) {
        None
    } else {
        Some(IfMatch::Unknown)
    }
}

/// Whether versioning is enabled, so that the bucket keeps old versions of its objects. False if the bucket reports no
/// versioning status.
///
/// # Errors
/// Returns a [`Failure`] if the request fails.
pub(crate) async fn keeps_versions(client: &aws_sdk_s3::Client, bucket: &str) -> Result<bool, Failure> {
    let answer = client
        .get_bucket_versioning()
        .bucket(bucket)
        .send()
        .await
        .map_err(|error| s3::failure("s3:GetBucketVersioning", &error))?;
    Ok(answer.status == Some(aws_sdk_s3::types::BucketVersioningStatus::Enabled))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::record::Member;
    use crate::lock::dynamodb::InfoAttribute;

    #[test]
    fn only_a_test_object_under_a_test_key_is_one() {
        let at = |key: &str| StoreKey::S3 { bucket: "b".into(), key: key.into(), region: "r".into() };
        let object = |body: &str| {
            let (body, length) = (body.to_owned(), body.len() as u64);
            StoredLock::Object(s3::Object { body, member: Member::None, length, etag: None })
        };
        let key = test_key("dir/k.tfstate");
        assert!(is_test_object(&at(&key), &object(TEST_BODY)), "{key}");
        assert!(is_test_object(&at(&key), &object(TEST_BODY_OF_0_1)), "{key}");
        for body in ["", "{}", r#"{"ID":"a"}"#, "tf locks doctor: this can be deleted ", "<html>"] {
            assert!(!is_test_object(&at(&key), &object(body)), "{body}");
        }
        let upper = key.to_uppercase();
        let without_state = test_key("");
        for key in
            ["k.tflock", "dir/k.tfstate.tflock", "k.5e75cb05-d70c-4132-39e0.tflock", ".tflock", &upper, &without_state]
        {
            assert!(!is_test_object(&at(key), &object(TEST_BODY)), "{key}");
        }
        let item = StoreKey::DynamoDb { table: "t".into(), key: key.clone(), region: "r".into() };
        assert!(!is_test_object(&item, &StoredLock::Item(InfoAttribute::Text(TEST_BODY.into()))));
    }
}
