//! The S3 part of a lock: an object in the same bucket as the state. Its key is the key of the state followed by
//! `.tflock`, and its body is the lock's JSON (backend/remote-state/s3/client.go, `lockWithFile`).

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
use tokio::time::{Instant, timeout_at};

use super::deleted::Deleted;
use crate::aws::failure::{Failure, NoAnswer};
use crate::terraform::backend::CachedBackend;

/// The largest object that is read as a lock, in bytes (1 MiB). No lock is larger.
const MAX_LOCK_BYTES: u64 = 1 << 20;

/// A lock object as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Object {
    /// The body, in which every sequence that is not UTF-8 is replaced. Empty if the object is larger than
    /// [`MAX_LOCK_BYTES`], because the body is not read then.
    pub(crate) body: String,
    /// The length of the object, in bytes.
    pub(crate) length: u64,
    /// The ETag of exactly these contents. `None` if the service sent none.
    pub(crate) etag: Option<String>,
}

/// Returns a client for the bucket of `backend`.
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

/// The encryption key `sse_customer_key`, which this interceptor adds to requests. S3 does not store such a key, so
/// each request that reads or writes an object must contain it. Terraform sends it only if `encrypt` is set
/// (client.go), and so does `tf`.
#[derive(Clone)]
struct CustomerKey {
    /// The key in base64, as it is in the backend.
    key: String,
    /// The MD5 of the key, in base64.
    md5: String,
}

impl std::fmt::Debug for CustomerKey {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("CustomerKey")
    }
}

impl CustomerKey {
    /// Returns the key in `backend` or in `AWS_SSE_CUSTOMER_KEY`. `None` if there is no key, if the key is not base64,
    /// or if `encrypt` is not set.
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

/// Reads the lock object. `None` if there is no object, or only a delete marker.
///
/// # Errors
/// Returns a [`Failure`] if the request fails, if S3 cannot have sent the response, or if the body does not arrive
/// within [`body_timeout`].
pub(crate) async fn read(client: &Client, bucket: &str, key: &str) -> Result<Option<Object>, Failure> {
    let Some(mut answer) = get(client, bucket, key).await? else { return Ok(None) };
    let etag = answer.e_tag.clone();
    let length = length(answer.content_length);
    let too_large = |length| Ok(Some(Object { body: String::new(), length, etag: etag.clone() }));
    if let Some(length) = length.filter(|length| *length > MAX_LOCK_BYTES) {
        // An object of this size is not a lock. Its body is not read, because it may be arbitrarily large.
        return too_large(length);
    }
    let until = Instant::now() + body_timeout(length);
    let mut body = Vec::new();
    while let Some(bytes) = timeout_at(until, answer.body.next()).await.map_err(|_| slow_body())? {
        body.extend_from_slice(&bytes.map_err(|error| Failure::no_answer("S3", &error.to_string()))?);
        // A response without `Content-Length` does not say how large it is.
        if body.len() as u64 > MAX_LOCK_BYTES {
            return too_large(body.len() as u64);
        }
    }
    Ok(Some(Object { length: body.len() as u64, body: String::from_utf8_lossy(&body).into_owned(), etag }))
}

/// Reads an object and passes each piece of its body to `take`. Returns the time at which the object was last written.
/// The outer `Option` is `None` if there is no object, the inner one if the service does not report the time.
///
/// # Errors
/// Returns a [`Failure`] if the request fails, if S3 cannot have sent the response, or if the body does not arrive
/// within [`body_timeout`].
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

/// Returns the timeout for reading a body of `length` bytes. It is necessary because the SDK aborts a body that has
/// stalled, but accepts one that delivers one byte per second forever.
fn body_timeout(length: Option<u64>) -> Duration {
    const FIRST_BYTE_TIMEOUT: Duration = Duration::from_secs(8);
    /// The lowest accepted rate: 64 KiB/s. Any connection on which terraform is usable is faster.
    const MIN_BYTES_PER_SECOND: u64 = 64 << 10;
    // A body of unknown length has the timeout of a state of 4 MiB.
    FIRST_BYTE_TIMEOUT + Duration::from_secs(length.unwrap_or(4 << 20) / MIN_BYTES_PER_SECOND)
}

/// Converts a `Content-Length`, in bytes. `None` if the response has none, or a negative one.
fn length(content_length: Option<i64>) -> Option<u64> {
    content_length.and_then(|length| length.try_into().ok())
}

fn slow_body() -> Failure {
    Failure::no_answer("S3", "timed out while reading the object")
}

async fn get(
    client: &Client,
    bucket: &str,
    key: &str,
) -> Result<Option<aws_sdk_s3::operation::get_object::GetObjectOutput>, Failure> {
    match client.get_object().bucket(bucket).key(key).send().await {
        Ok(answer) => {
            let headers =
                Headers { etag: answer.e_tag(), content_type: answer.content_type(), request_id: answer.request_id() };
            if headers.is_an_answer() { Ok(Some(answer)) } else { Err(no_answer(200)) }
        }
        // S3 sends the code `NoSuchKey` in the body. A 404 without that code does not come from S3, and does not mean
        // that the object is absent.
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

/// Lists the keys that begin with `prefix`, in order, page by page.
pub(crate) fn keys(client: &Client, bucket: &str, prefix: &str) -> KeyPages {
    KeyPages { pages: client.list_objects_v2().bucket(bucket).prefix(prefix).into_paginator().send() }
}

/// The pages of keys that [`keys`] lists.
pub(crate) struct KeyPages {
    pages: aws_smithy_async::future::pagination_stream::PaginationStream<
        Result<
            aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Output,
            SdkError<aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Error>,
        >,
    >,
}

impl KeyPages {
    /// Returns the next page. `None` after the last page.
    pub(crate) async fn next(&mut self) -> Option<Result<Vec<String>, Failure>> {
        let page = self.pages.next().await?;
        Some(match page {
            Ok(page) => Ok(page.contents.unwrap_or_default().into_iter().filter_map(|object| object.key).collect()),
            Err(error) => Err(failure("s3:ListBucket", &error)),
        })
    }
}

/// Returns a text that differs between two versions of the state. It contains the ETag and the time of the last change.
/// `None` if there is no such object.
///
/// # Errors
/// Returns a [`Failure`] if the request fails, or if S3 cannot have sent the response.
pub(crate) async fn fingerprint(client: &Client, bucket: &str, key: &str) -> Result<Option<String>, Failure> {
    let text = |etag: Option<&str>, modified: Option<&aws_smithy_types::DateTime>| format!("{etag:?} {modified:?}");
    match client.head_object().bucket(bucket).key(key).send().await {
        Ok(answer)
            if (Headers {
                etag: answer.e_tag(),
                content_type: answer.content_type(),
                request_id: answer.request_id(),
            })
            .is_an_answer() =>
        {
            Ok(Some(text(answer.e_tag(), answer.last_modified())))
        }
        Ok(_) => Err(no_answer(200)),
        // The response to a HEAD request has no body. So it does not show whether S3 sent a 404, or what another error
        // means. The response to a GET request shows both.
        Err(error) if error.raw_response().is_some_and(|response| response.status().is_client_error()) => {
            let answer = get(client, bucket, key).await?;
            Ok(answer.map(|answer| text(answer.e_tag(), answer.last_modified())))
        }
        Err(error) => Err(failure("s3:GetObject", &error)),
    }
}

/// The headers that show whether S3 sent a successful response.
struct Headers<'a> {
    etag: Option<&'a str>,
    content_type: Option<&'a str>,
    request_id: Option<&'a str>,
}

impl Headers<'_> {
    /// Whether S3 can have sent the response. Every S3 object has an `ETag`, but so do the pages of a web server. S3
    /// adds a request ID to every response, but some compatible services do not. So a request ID is required only for
    /// an HTML page, which terraform never writes.
    fn is_an_answer(&self) -> bool {
        let is_a_page = self.content_type.is_some_and(|kind| kind.to_ascii_lowercase().starts_with("text/html"));
        self.etag.is_some_and(|etag| !etag.is_empty()) && (!is_a_page || self.request_id.is_some())
    }
}

/// Returns the failure for a response that S3 did not send. It is not final, because the next response may come from
/// S3.
fn no_answer(status: u16) -> Failure {
    Failure::no_answer("S3", &NoAnswer { service: "S3", status }.to_string())
}

/// The bucket and the key of an object.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ObjectKey<'a> {
    pub(crate) bucket: &'a str,
    pub(crate) key: &'a str,
}

/// Puts a lock, encrypted as `backend` specifies, if there is no object at `key`. Returns false if there is one, or if
/// one is being written at this moment.
///
/// # Errors
/// Returns a [`Failure`] if the request fails for a reason other than its condition. The lock may have been put
/// nevertheless.
pub(crate) async fn put_if_absent(
    client: &Client,
    backend: &CachedBackend,
    ObjectKey { bucket, key }: ObjectKey<'_>,
    body: &str,
) -> Result<bool, Failure> {
    use aws_sdk_s3::types::ServerSideEncryption;
    let mut request = client.put_object().bucket(bucket).key(key).if_none_match("*").content_type("application/json");
    // With a customer key, the client's interceptor sets the encryption ([`CustomerKey`]).
    if backend.flag("encrypt") && CustomerKey::of(backend).is_none() {
        request = match backend.string("kms_key_id") {
            Some(id) => request.server_side_encryption(ServerSideEncryption::AwsKms).ssekms_key_id(id),
            None => request.server_side_encryption(ServerSideEncryption::Aes256),
        };
    }
    match request.body(body.as_bytes().to_vec().into()).send().await {
        Ok(answer) if (Headers { etag: answer.e_tag(), content_type: None, request_id: None }).is_an_answer() => {
            Ok(true)
        }
        Ok(_) => Err(no_answer(200)),
        Err(error) => match error.raw_response().map(|response| response.status().as_u16()) {
            Some(409 | 412) => Ok(false),
            _ => Err(failure("s3:PutObject", &error)),
        },
    }
}

/// Deletes the object, on the condition that it is still `object` (`If-Match`).
///
/// A service that ignores `If-Match` deletes any object at that key. So the caller must read the object immediately
/// before the delete. That keeps the time short in which another object can replace it and be deleted by mistake.
///
/// # Errors
/// Returns a [`Failure`] if the object has no ETag or a weak one, or if the request fails for a reason other than its
/// condition.
pub(crate) async fn delete(client: &Client, bucket: &str, key: &str, object: &Object) -> Result<Deleted, Failure> {
    let Some(etag) = &object.etag else {
        return Err(Failure::no_answer("S3", "the service returned no ETag for the lock object"));
    };
    // If-Match uses the strong comparison, in which a weak ETag never matches (RFC 9110, 8.8.3.2 and 13.1.1).
    if etag.starts_with("W/") {
        let reason = "the service returns only weak ETags, which a conditional delete cannot use";
        return Err(Failure::refusal("S3", reason));
    }
    match client.delete_object().bucket(bucket).key(key).if_match(etag).send().await {
        Ok(_) => Ok(Deleted::Yes),
        Err(error) => {
            let status = error.raw_response().map(|response| response.status().as_u16());
            match (error.code(), status) {
                // 412: there is another object. 404: there is no object. 409: an object is being written at this
                // moment.
                (Some("PreconditionFailed" | "NoSuchKey" | "ConditionalRequestConflict"), _)
                | (_, Some(404 | 409 | 412)) => Ok(Deleted::Changed),
                _ => Err(failure("s3:DeleteObject", &error)),
            }
        }
    }
}

/// Converts the error of a request. `action` is the name of the request's action in an IAM policy.
pub(super) fn failure<E>(action: &'static str, error: &SdkError<E>) -> Failure
where
    E: std::error::Error + ProvideErrorMetadata + 'static,
{
    // The SDK itself sets this code for a 404 without a body, so the response does not come from S3.
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
            // Services other than AWS may send no request ID.
            (etag, Some("application/json"), None, true),
            (etag, None, None, true),
            // An HTML page was stored under that key.
            (etag, Some("text/html"), id, true),
            (etag, Some("text/html; charset=utf-8"), None, false),
            (etag, Some("Text/HTML"), None, false),
            (None, Some("application/json"), id, false),
            (Some(""), None, id, false),
            (None, None, None, false),
        ] {
            assert_eq!(
                (Headers { etag, content_type, request_id }).is_an_answer(),
                answer,
                "{etag:?} {content_type:?} {request_id:?}"
            );
        }
    }
}
