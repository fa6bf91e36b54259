//! Whether a release would be let through: tried with requests that can change nothing, for a policy does not tell what
//! an organisation, a boundary, a session or an endpoint says on top of it.

use aws_sdk_dynamodb::types::AttributeValue;
use aws_sdk_s3::error::ProvideErrorMetadata;
use aws_sdk_s3::primitives::ByteStream;
use jiff::Timestamp;

use super::{dynamodb, s3};
use crate::aws::failure::Failure;

/// What no lock is: the condition of a delete that must not delete anything.
const NO_LOCK: &str = "tf locks doctor: no lock has this text";

/// What a harmless attempt came to.
#[derive(Debug)]
pub(crate) struct Trial {
    /// Permitted, or what the service said.
    pub(crate) answer: Result<(), Failure>,
    /// The service's clock, as its answer tells.
    pub(crate) clock: Option<Timestamp>,
}

/// How a bucket takes the condition of a delete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum IfMatch {
    /// It is obeyed.
    Obeyed,
    /// It is ignored: a delete hits whatever stands there.
    Ignored,
    /// It could not be found out: no object could be put there to try.
    Unknown,
}

/// Deletes the item of `path` on a condition that no lock fulfils.
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
            let clock = error.raw_response().and_then(|response| response.headers().get("date")).and_then(clock);
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

/// Deletes an object that is not there, and tells how the bucket takes `If-Match`. `key` must be one that nobody uses: a
/// service that ignores the condition would delete what stands there.
pub(crate) async fn delete_object(client: &aws_sdk_s3::Client, bucket: &str, key: &str) -> (Trial, IfMatch) {
    const ANOTHERS: &str = "\"00000000000000000000000000000000\"";
    let delete = || client.delete_object().bucket(bucket).key(key);
    if let Err(error) = delete().if_match(ANOTHERS).send().await {
        let response = error.raw_response();
        let clock = response.and_then(|response| response.headers().get("date")).and_then(clock);
        let status = response.map(|response| response.status().as_u16());
        // A bucket that is not there answers 404 too.
        let permitted = matches!(status, Some(404 | 412)) && error.code() != Some("NoSuchBucket");
        let answer = if permitted { Ok(()) } else { Err(s3::failure("s3:DeleteObject", &error)) };
        return (Trial { answer, clock }, if permitted { IfMatch::Obeyed } else { IfMatch::Unknown });
    }
    // It is content with the absence of what was to be deleted, or it did not look at the condition. An object of our own,
    // under that key, tells which.
    let permitted = Trial { answer: Ok(()), clock: None };
    let body = ByteStream::from_static(b"tf locks doctor: this can be deleted");
    if client.put_object().bucket(bucket).key(key).if_none_match("*").body(body).send().await.is_err() {
        return (permitted, IfMatch::Unknown);
    }
    let taken = if delete().if_match(ANOTHERS).send().await.is_ok() { IfMatch::Ignored } else { IfMatch::Obeyed };
    let _ = delete().send().await;
    (permitted, taken)
}

/// How a bucket takes the condition by which terraform locks: that no object is there.
#[derive(Clone, Debug)]
pub(crate) enum IfNoneMatch {
    /// It is obeyed.
    Obeyed,
    /// It is ignored: a lock replaces the one that is there, and both terraforms go on.
    Ignored,
    /// The service does not know it: terraform cannot lock there.
    Unsupported,
    /// It could not be found out, and why.
    Unknown(Failure),
    /// It was not tried.
    Untried,
}

/// Puts an object twice on the condition that none is there, and deletes it. `key` must be one that nobody uses, and one
/// that may be deleted.
pub(crate) async fn put_object(client: &aws_sdk_s3::Client, bucket: &str, key: &str) -> IfNoneMatch {
    let put = || {
        let body = ByteStream::from_static(b"tf locks doctor: this can be deleted");
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

/// Whether the bucket keeps old versions. `None` where it does not say.
///
/// # Errors
/// [`Failure`].
pub(crate) async fn keeps_versions(client: &aws_sdk_s3::Client, bucket: &str) -> Result<bool, Failure> {
    let answer = client
        .get_bucket_versioning()
        .bucket(bucket)
        .send()
        .await
        .map_err(|error| s3::failure("s3:GetBucketVersioning", &error))?;
    Ok(answer.status == Some(aws_sdk_s3::types::BucketVersioningStatus::Enabled))
}

fn clock(date: &str) -> Option<Timestamp> {
    jiff::fmt::rfc2822::DateTimeParser::new().parse_timestamp(date).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_services_clock_is_read() {
        assert_eq!(clock("Tue, 24 Nov 2026 10:31:45 GMT"), "2026-11-24T10:31:45Z".parse().ok());
        assert_eq!(clock("yesterday"), None);
    }
}
