//! The half of a lock in S3: an object beside the state, its key with `.tflock` behind, its body the lock's JSON
//! (backend/remote-state/s3/client.go, `lockWithFile`).

use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::RequestId;
use aws_sdk_s3::operation::get_object::GetObjectInput;
use aws_sdk_s3::operation::head_object::HeadObjectInput;
use aws_sdk_s3::operation::put_object::PutObjectInput;
use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::interceptors::context::BeforeSerializationInterceptorContextMut;
use aws_smithy_runtime_api::client::interceptors::{Intercept, dyn_dispatch_hint};
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::base64;
use aws_smithy_types::config_bag::ConfigBag;
use md5::{Digest, Md5};
use tokio::time::{Instant, timeout, timeout_at};

use super::deleted::Deleted;
use crate::aws::failure::{Failure, NoAnswer};
use crate::terraform::backend::CachedBackend;

/// No lock is longer.
const MAX_LOCK_BYTES: u64 = 1 << 20;

/// A lock object as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Object {
    /// Its body.
    pub(crate) body: String,
    /// So many bytes are in it. Of one that is too large for a lock the body was not read, and is empty here.
    pub(crate) length: u64,
    /// The tag of exactly that body.
    pub(crate) etag: Option<String>,
}

/// A client for the bucket of `backend`.
pub(crate) fn client(backend: &CachedBackend, config: &aws_config::SdkConfig) -> Client {
    let mut builder = aws_sdk_s3::config::Builder::from(config);
    let endpoint = crate::aws::settings::endpoint(
        backend,
        ["endpoints.s3", "endpoint"],
        ["AWS_ENDPOINT_URL_S3", "AWS_S3_ENDPOINT"],
    );
    if let Some(endpoint) = endpoint {
        builder = builder.endpoint_url(endpoint).use_fips(false).use_dual_stack(false);
    }
    if backend.flag("use_path_style") || backend.flag("force_path_style") {
        builder = builder.force_path_style(true);
    }
    if let Some(key) = CustomerKey::of(backend) {
        builder = builder.interceptor(key);
    }
    Client::from_conf(builder.build())
}

/// `sse_customer_key`: S3 keeps no such key, so each request that reads or writes an object must bring it. Terraform sends
/// it only with `encrypt` (client.go).
#[derive(Clone)]
struct CustomerKey {
    /// In base 64, as the backend has it.
    key: String,
    /// The key's own MD5.
    md5: String,
}

impl std::fmt::Debug for CustomerKey {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("CustomerKey")
    }
}

impl CustomerKey {
    fn of(backend: &CachedBackend) -> Option<Self> {
        let key = backend.string("sse_customer_key").map(ToOwned::to_owned);
        let key =
            key.or_else(|| crate::aws::settings::set("AWS_SSE_CUSTOMER_KEY")).filter(|_| backend.flag("encrypt"))?;
        let raw = base64::decode(&key).ok()?;
        Some(Self { md5: base64::encode(Md5::digest(&raw)), key })
    }
}

#[dyn_dispatch_hint]
impl Intercept for CustomerKey {
    fn name(&self) -> &'static str {
        "CustomerKey"
    }

    fn modify_before_serialization(
        &self,
        context: &mut BeforeSerializationInterceptorContextMut<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let input = context.input_mut();
        let (algorithm, key, md5) = if let Some(get) = input.downcast_mut::<GetObjectInput>() {
            (&mut get.sse_customer_algorithm, &mut get.sse_customer_key, &mut get.sse_customer_key_md5)
        } else if let Some(head) = input.downcast_mut::<HeadObjectInput>() {
            (&mut head.sse_customer_algorithm, &mut head.sse_customer_key, &mut head.sse_customer_key_md5)
        } else if let Some(put) = input.downcast_mut::<PutObjectInput>() {
            (&mut put.sse_customer_algorithm, &mut put.sse_customer_key, &mut put.sse_customer_key_md5)
        } else {
            return Ok(());
        };
        *algorithm = Some("AES256".to_owned());
        *key = Some(self.key.clone());
        *md5 = Some(self.md5.clone());
        Ok(())
    }
}

/// Reads the lock object. `None` when there is none, or only a delete marker.
///
/// # Errors
/// [`Failure`].
pub(crate) async fn read(client: &Client, bucket: &str, key: &str) -> Result<Option<Object>, Failure> {
    let Some(answer) = get(client, bucket, key).await? else { return Ok(None) };
    let etag = answer.e_tag.clone();
    let length = length(answer.content_length);
    if let Some(length) = length.filter(|length| *length > MAX_LOCK_BYTES) {
        // Not a lock, and not read: an object at that key may have any size.
        return Ok(Some(Object { body: String::new(), length, etag }));
    }
    let body = timeout(body_timeout(length), answer.body.collect()).await.map_err(|_| slow_body())?;
    let body = body.map_err(|error| Failure::no_answer("S3", &error.to_string()))?.into_bytes();
    Ok(Some(Object { length: body.len() as u64, body: String::from_utf8_lossy(&body).into_owned(), etag }))
}

/// Reads an object piece by piece. `None` when there is none; else when it was written, as far as the service tells.
///
/// # Errors
/// [`Failure`].
pub(crate) async fn stream(
    client: &Client,
    bucket: &str,
    key: &str,
    mut take: impl FnMut(&[u8]),
) -> Result<Option<Option<jiff::Timestamp>>, Failure> {
    let Some(mut answer) = get(client, bucket, key).await? else { return Ok(None) };
    let written = answer.last_modified.and_then(|at| jiff::Timestamp::from_second(at.secs()).ok());
    let until = Instant::now() + body_timeout(length(answer.content_length));
    while let Some(bytes) = timeout_at(until, answer.body.next()).await.map_err(|_| slow_body())? {
        take(&bytes.map_err(|error| Failure::no_answer("S3", &error.to_string()))?);
    }
    Ok(Some(written))
}

/// How long a body of `length` bytes may take. The SDK ends a body that has stopped, and lets one go on for ever that brings
/// a byte a second.
fn body_timeout(length: Option<u64>) -> Duration {
    const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(8);
    /// Less than any line on which terraform can be used, in bytes a second.
    const MIN_BYTES_PER_SECOND: u64 = 64 << 10;
    // Of an unknown length: as a state of some megabytes.
    FIRST_BYTE_TIMEOUT + Duration::from_secs(length.unwrap_or(4 << 20) / MIN_BYTES_PER_SECOND)
}

/// `Content-Length`. `None` where the response has none, or a negative one.
fn length(content_length: Option<i64>) -> Option<u64> {
    content_length.and_then(|length| length.try_into().ok())
}

fn slow_body() -> Failure {
    Failure::no_answer("S3", "the object was not read within the time that one of its size may take")
}

async fn get(
    client: &Client,
    bucket: &str,
    key: &str,
) -> Result<Option<aws_sdk_s3::operation::get_object::GetObjectOutput>, Failure> {
    match client.get_object().bucket(bucket).key(key).send().await {
        Ok(answer) => {
            let described = [answer.e_tag(), answer.content_type(), answer.request_id()];
            if is_an_answer(described) { Ok(Some(answer)) } else { Err(no_answer(200)) }
        }
        // S3 says `NoSuchKey` in a body. A 404 of anybody else is not an absent object.
        Err(error)
            if error
                .as_service_error()
                .is_some_and(aws_sdk_s3::operation::get_object::GetObjectError::is_no_such_key) =>
        {
            Ok(None)
        }
        Err(error) => Err(failure("s3:GetObject", &error)),
    }
}

/// The keys that begin with `prefix`, in order, page by page.
pub(crate) fn keys(client: &Client, bucket: &str, prefix: &str) -> KeyPages {
    KeyPages { pages: client.list_objects_v2().bucket(bucket).prefix(prefix).into_paginator().send() }
}

/// See [`keys`].
pub(crate) struct KeyPages {
    pages: aws_smithy_async::future::pagination_stream::PaginationStream<
        Result<
            aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Output,
            SdkError<aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Error>,
        >,
    >,
}

impl KeyPages {
    /// The next page. `None` after the last.
    pub(crate) async fn next(&mut self) -> Option<Result<Vec<String>, Failure>> {
        let page = self.pages.next().await?;
        Some(match page {
            Ok(page) => Ok(page.contents.unwrap_or_default().into_iter().filter_map(|object| object.key).collect()),
            Err(error) => Err(failure("s3:ListBucket", &error)),
        })
    }
}

/// What tells one content of the state from the next: its tag and the time of its last change. `None` when there is no
/// such object.
///
/// # Errors
/// [`Failure`].
pub(crate) async fn fingerprint(client: &Client, bucket: &str, key: &str) -> Result<Option<String>, Failure> {
    let text = |etag: Option<&str>, modified: Option<&aws_smithy_types::DateTime>| format!("{etag:?} {modified:?}");
    match client.head_object().bucket(bucket).key(key).send().await {
        Ok(answer) if is_an_answer([answer.e_tag(), answer.content_type(), answer.request_id()]) => {
            Ok(Some(text(answer.e_tag(), answer.last_modified())))
        }
        Ok(_) => Err(no_answer(200)),
        // The response to a HEAD has no body that says whose 404 it is, or what is wrong; the one to a GET has.
        Err(error) if error.raw_response().is_some_and(|response| response.status().is_client_error()) => {
            let answer = get(client, bucket, key).await?;
            Ok(answer.map(|answer| text(answer.e_tag(), answer.last_modified())))
        }
        Err(error) => Err(failure("s3:GetObject", &error)),
    }
}

/// Whether a success with this `ETag`, `Content-Type` and request ID can be S3's: each object has an `ETag`. A web server
/// gives its pages one too; terraform writes no HTML, and S3 numbers its responses.
fn is_an_answer([etag, content_type, request_id]: [Option<&str>; 3]) -> bool {
    let is_a_page = content_type.is_some_and(|kind| kind.to_ascii_lowercase().starts_with("text/html"));
    etag.is_some_and(|etag| !etag.is_empty()) && (!is_a_page || request_id.is_some())
}

/// A response that S3 has not sent. The next one may be S3's.
fn no_answer(status: u16) -> Failure {
    Failure::no_answer("S3", &NoAnswer { service: "S3", status }.to_string())
}

/// Puts a lock there if nothing is there, encrypted as `backend` says. False when something is.
///
/// # Errors
/// [`Failure`]; the lock may have been put all the same.
pub(crate) async fn put_if_absent(
    client: &Client,
    backend: &CachedBackend,
    bucket: &str,
    key: &str,
    body: &str,
) -> Result<bool, Failure> {
    use aws_sdk_s3::types::ServerSideEncryption;
    let mut request = client.put_object().bucket(bucket).key(key).if_none_match("*").content_type("application/json");
    // With a key of the customer's the client itself says so.
    if backend.flag("encrypt") && CustomerKey::of(backend).is_none() {
        request = match backend.string("kms_key_id") {
            Some(id) => request.server_side_encryption(ServerSideEncryption::AwsKms).ssekms_key_id(id),
            None => request.server_side_encryption(ServerSideEncryption::Aes256),
        };
    }
    match request.body(body.as_bytes().to_vec().into()).send().await {
        Ok(answer) if is_an_answer([answer.e_tag(), None, None]) => Ok(true),
        Ok(_) => Err(no_answer(200)),
        Err(error) => match error.raw_response().map(|response| response.status().as_u16()) {
            Some(409 | 412) => Ok(false),
            _ => Err(failure("s3:PutObject", &error)),
        },
    }
}

/// Deletes the object on condition that it is still the one that was read (`If-Match`).
///
/// A service that ignores `If-Match` deletes whatever stands there. The caller reads immediately before, so that this
/// is as narrow as such a service allows.
///
/// # Errors
/// [`Failure`].
pub(crate) async fn delete(client: &Client, bucket: &str, key: &str, object: &Object) -> Result<Deleted, Failure> {
    let Some(etag) = &object.etag else {
        return Err(Failure::no_answer("S3", "the service gave the lock object no ETag"));
    };
    // If-Match compares strongly, and a weak tag is equal to none (RFC 9110, 8.8.3.2 and 13.1.1).
    if etag.starts_with("W/") {
        let reason = "the service gives weak ETags alone, on which no delete can be conditional";
        return Err(Failure::refusal("S3", reason));
    }
    match client.delete_object().bucket(bucket).key(key).if_match(etag).send().await {
        Ok(_) => Ok(Deleted::Yes),
        Err(error) => {
            let status = error.raw_response().map(|response| response.status().as_u16());
            match (error.code(), status) {
                // 412 another object, 404 none, 409 somebody is writing it at this moment.
                (Some("PreconditionFailed" | "NoSuchKey" | "ConditionalRequestConflict"), _)
                | (_, Some(404 | 409 | 412)) => Ok(Deleted::Changed),
                _ => Err(failure("s3:DeleteObject", &error)),
            }
        }
    }
}

/// What went wrong with `action`, as a policy names it.
pub(super) fn failure<E>(action: &'static str, error: &SdkError<E>) -> Failure
where
    E: std::error::Error + ProvideErrorMetadata + 'static,
{
    // The SDK puts this code in where a 404 has no body. It is nobody's word.
    if error.code() == Some("NotFound") {
        return no_answer(404);
    }
    Failure::of_request("S3", action, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_has_an_etag_and_a_page_is_no_object() {
        let (etag, id) = (Some("\"d41d8cd98f00b204e9800998ecf8427e\""), Some("GRZ6BZ468DF52F2E"));
        for (etag, content_type, request_id, answer) in [
            (etag, Some("application/json"), id, true),
            // Services that are not AWS need not number their responses.
            (etag, Some("application/json"), None, true),
            (etag, None, None, true),
            // Somebody has put a page under that key.
            (etag, Some("text/html"), id, true),
            (etag, Some("text/html; charset=utf-8"), None, false),
            (etag, Some("Text/HTML"), None, false),
            (None, Some("application/json"), id, false),
            (Some(""), None, id, false),
            (None, None, None, false),
        ] {
            assert_eq!(
                is_an_answer([etag, content_type, request_id]),
                answer,
                "{etag:?} {content_type:?} {request_id:?}"
            );
        }
    }
}
