//! The S3 part of a lock: an object in the same bucket as the state. Its key is the key of the state followed by
//! `.tflock`, and its body is the lock's JSON (backend/remote-state/s3/client.go, `lockWithFile`).

use std::fmt::Write as _;
use std::time::Duration;

use aws_sdk_s3::Client;
use aws_sdk_s3::config::RequestChecksumCalculation;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::RequestId;
use aws_sdk_s3::operation::get_object::GetObjectInput;
use aws_sdk_s3::operation::head_object::HeadObjectInput;
use aws_sdk_s3::operation::put_object::PutObjectInput;
use aws_sdk_s3::types::{ChecksumAlgorithm, ObjectCannedAcl, ServerSideEncryption};
use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::interceptors::context::BeforeSerializationInterceptorContextMut;
use aws_smithy_runtime_api::client::interceptors::{Intercept, dyn_dispatch_hint};
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::base64;
use aws_smithy_types::config_bag::ConfigBag;
use aws_types::service_config::ServiceConfigKey;
use jiff::Timestamp;
use md5::{Digest, Md5};
use tokio::time::{Instant, timeout_at};

use super::attempts::Attempts;
use super::deleted::Deleted;
use super::service_time::ServiceTime;
use super::written::Written;
use crate::aws::failure::{Failure, NoAnswer};
use crate::lease::info_field;
use crate::lease::record::{self, Member, Record};
use crate::terraform::backend::CachedBackend;

/// The largest object that is read as a lock, in bytes (1 MiB). No lock is larger.
const MAX_LOCK_BYTES: u64 = 1 << 20;

/// A lock object as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Object {
    /// The body without the member `tf` and with an empty field `Info` ([`info_field`]), so that it is the text that
    /// terraform wrote. Every sequence that is not UTF-8 is replaced. Empty if the object is larger than
    /// [`MAX_LOCK_BYTES`], because the body is not read then.
    pub(crate) body: String,
    /// The member `tf` of the body: the lease record.
    pub(crate) member: Member,
    /// The length of the object, in bytes.
    pub(crate) length: u64,
    /// The ETag of exactly these contents. `None` if the service sent none.
    pub(crate) etag: Option<String>,
}

impl Object {
    /// `body` is the whole body, and `length` the length of the object in bytes.
    fn new(body: &str, length: u64, etag: Option<String>) -> Self {
        let (body, member) = record::split(body);
        Self { body: info_field::clear(&body).into_owned(), member, length, etag }
    }

    /// Returns the ETag for the condition `If-Match`.
    ///
    /// # Errors
    /// Returns a [`Failure`] if the object has no ETag or a weak one.
    fn strong_etag(&self) -> Result<&str, Failure> {
        let Some(etag) = &self.etag else {
            return Err(Failure::no_answer("S3", "the service returned no ETag for the lock object"));
        };
        // If-Match uses the strong comparison, in which a weak ETag never matches (RFC 9110, 8.8.3.2 and 13.1.1).
        if etag.starts_with("W/") {
            let reason = "the service returns only weak ETags, which a conditional request cannot use";
            return Err(Failure::refusal("S3", reason));
        }
        Ok(etag)
    }
}

/// Returns a client for the bucket of `backend`.
pub(crate) fn client(backend: &CachedBackend, config: &aws_config::SdkConfig) -> Client {
    let mut builder = aws_sdk_s3::config::Builder::from(config);
    if let Some(endpoint) = own_endpoint(backend) {
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

/// Whether requests go to an endpoint that the backend, the environment or the shared files name. AWS's own endpoints
/// are those that the SDK chooses, so for them this is false.
pub(crate) fn has_custom_endpoint(backend: &CachedBackend, config: &aws_config::SdkConfig) -> bool {
    let of_service = || {
        let key = ServiceConfigKey::builder().service_id("S3").env("AWS_ENDPOINT_URL").profile("endpoint_url").build();
        config.service_config()?.load_config(key.ok()?)
    };
    own_endpoint(backend).is_some() || config.endpoint_url().is_some() || of_service().is_some()
}

fn own_endpoint(backend: &CachedBackend) -> Option<String> {
    crate::aws::settings::endpoint(backend, ["endpoints.s3", "endpoint"], ["AWS_ENDPOINT_URL_S3", "AWS_S3_ENDPOINT"])
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
    Ok(read_with_time(client, ObjectKey { bucket, key }).await?.0)
}

/// Reads the lock object, and the service's time in the response. Both are `None` if there is no object, or only a
/// delete marker: such a response is not a success.
///
/// # Errors
/// As [`read`].
pub(crate) async fn read_with_time(
    client: &Client,
    ObjectKey { bucket, key }: ObjectKey<'_>,
) -> Result<(Option<Object>, Option<Timestamp>), Failure> {
    let time = ServiceTime::default();
    let Some(mut answer) = get(client, bucket, key, &time).await? else { return Ok((None, None)) };
    let etag = answer.e_tag.clone();
    let length = length(answer.content_length);
    let too_large = |length| Ok((Some(Object::new("", length, etag.clone())), time.get()));
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
    let object = Object::new(&String::from_utf8_lossy(&body), body.len() as u64, etag);
    Ok((Some(object), time.get()))
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
    let Some(mut answer) = get(client, bucket, key, &ServiceTime::default()).await? else { return Ok(None) };
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

/// Requests an object. `time` gets the service's time in the response.
async fn get(
    client: &Client,
    bucket: &str,
    key: &str,
    time: &ServiceTime,
) -> Result<Option<aws_sdk_s3::operation::get_object::GetObjectOutput>, Failure> {
    match client.get_object().bucket(bucket).key(key).customize().interceptor(time.clone()).send().await {
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

/// Whether a listing of the bucket shows the object `key`.
///
/// # Errors
/// Returns a [`Failure`] if the request fails.
pub(crate) async fn is_listed(client: &Client, bucket: &str, key: &str) -> Result<bool, Failure> {
    // Of all keys that begin with `key`, `key` itself is the first.
    let page = client.list_objects_v2().bucket(bucket).prefix(key).max_keys(1).send().await;
    let page = page.map_err(|error| failure("s3:ListBucket", &error))?;
    Ok(page.contents().iter().any(|object| object.key() == Some(key)))
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
/// `was_absent` is whether the last read has found no such object. This one then takes the time of one response: it
/// does not send a HEAD request, whose response would have to be confirmed.
///
/// # Errors
/// Returns a [`Failure`] if the request fails, or if S3 cannot have sent the response.
pub(crate) async fn fingerprint(
    client: &Client,
    bucket: &str,
    key: &str,
    was_absent: bool,
) -> Result<Option<String>, Failure> {
    let text = |etag: Option<&str>, modified: Option<&aws_smithy_types::DateTime>| format!("{etag:?} {modified:?}");
    let by_get = async || {
        let answer = get(client, bucket, key, &ServiceTime::default()).await?;
        Ok(answer.map(|answer| text(answer.e_tag(), answer.last_modified())))
    };
    if was_absent {
        return by_get().await;
    }
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
            by_get().await
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

/// How terraform writes a lock object with a backend: its encryption, ACL, checksum and tags (client.go,
/// `lockWithFile`; OpenTofu's client.go, `s3Lock`).
#[derive(Clone, Default)]
pub(crate) struct WriteSettings {
    encryption: Encryption,
    /// A canned ACL.
    acl: Option<String>,
    /// OpenTofu's `lock_tags`, as the query string that S3 expects.
    tagging: Option<String>,
    /// `skip_s3_checksum`.
    has_no_checksum: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Encryption {
    /// The bucket's default, or a customer key, which the client adds to each request ([`CustomerKey`]).
    #[default]
    Default,
    Aes256,
    /// The ID of a KMS key.
    Kms(String),
}

impl std::fmt::Debug for WriteSettings {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("WriteSettings")
    }
}

impl WriteSettings {
    /// Returns the settings in `backend`.
    pub(crate) fn of(backend: &CachedBackend) -> Self {
        let encryption = match backend.string("kms_key_id") {
            _ if !backend.flag("encrypt") || CustomerKey::of(backend).is_some() => Encryption::Default,
            Some(id) => Encryption::Kms(id.to_owned()),
            None => Encryption::Aes256,
        };
        let tags = backend.pairs("lock_tags").into_iter();
        let tags: Vec<_> = tags.map(|(name, value)| format!("{}={}", encoded(name), encoded(value))).collect();
        Self {
            encryption,
            acl: backend.string("acl").map(ToOwned::to_owned),
            tagging: Some(tags.join("&")).filter(|tags| !tags.is_empty()),
            has_no_checksum: backend.flag("skip_s3_checksum"),
        }
    }
}

/// Encodes every byte of `text` that has a meaning in a query string.
fn encoded(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => encoded.push(char::from(byte)),
            _ => drop(write!(encoded, "%{byte:02X}")),
        }
    }
    encoded
}

/// The condition under which an object is put.
#[derive(Clone, Copy)]
enum PutCondition<'a> {
    /// There is no object.
    IfAbsent,
    /// The object still has this ETag.
    IfMatch(&'a str),
}

/// Puts a lock, as terraform does with `backend`, if there is no object at `key`. Returns false if there is one, or if
/// one is being written at this moment.
///
/// # Errors
/// Returns a [`Failure`] if the request fails for a reason other than its condition. The lock may have been put
/// nevertheless.
pub(crate) async fn put_if_absent(
    client: &Client,
    backend: &CachedBackend,
    key: ObjectKey<'_>,
    body: &str,
) -> Result<bool, Failure> {
    let written = put(client, &WriteSettings::of(backend), key, PutCondition::IfAbsent, body).await?;
    Ok(matches!(written, Written::Yes(..)))
}

/// Replaces the record of the lock object `read` by `record`, on the condition that the object is unchanged. Facts
/// about the holder are left out if the body would be larger than [`MAX_BODY_BYTES`], the field `Info` first.
///
/// # Errors
/// Returns a [`Failure`] if the request fails for a reason other than its condition. It may have been written
/// nevertheless. Also if the lock is not of a form to which a record can be added.
pub(crate) async fn renew(
    client: &Client,
    settings: &WriteSettings,
    key: ObjectKey<'_>,
    read: &Object,
    record: &Record,
) -> Result<Written<Object>, Failure> {
    let with = |lock: &str, record: &Record| record::join(lock, &record.to_json());
    let is_small = |body: &Option<String>| body.as_ref().is_some_and(|body| body.len() <= MAX_BODY_BYTES);
    let filled = info_field::fill(&read.body, record).and_then(|lock| with(&lock, record));
    let body = if is_small(&filled) {
        filled
    } else {
        with(&read.body, &record.cut(|record| is_small(&with(&read.body, record))))
    };
    // A byte that is not UTF-8 was replaced, so the text is not terraform's any more.
    let body = body.filter(|body| !body.contains(char::REPLACEMENT_CHARACTER));
    let Some(body) = body else {
        return Err(Failure::refusal("S3", "the lock object has no form to which a lease can be added"));
    };
    let condition = PutCondition::IfMatch(read.strong_etag()?);
    Ok(match put(client, settings, key, condition, &body).await? {
        Written::Yes(etag, time) => Written::Yes(Object::new(&body, body.len() as u64, etag), time),
        Written::Changed => Written::Changed,
    })
}

/// Fills the field `Info` of the lock object `read`, which has no record, on the condition that the object is
/// unchanged. Does nothing if the object is not of the form in which terraform writes it.
///
/// # Errors
/// As [`renew`].
pub(crate) async fn fill_info(
    client: &Client,
    settings: &WriteSettings,
    key: ObjectKey<'_>,
    read: &Object,
    record: &Record,
) -> Result<(), Failure> {
    let body = info_field::fill(&read.body, record).filter(|body| body.len() <= MAX_BODY_BYTES);
    let Some(body) = body.filter(|_| read.member == Member::None) else { return Ok(()) };
    put(client, settings, key, PutCondition::IfMatch(read.strong_etag()?), &body).await.map(drop)
}

/// The largest body that a lock has with its lease record, in bytes. S3 has no such limit; it is the one of an item in
/// DynamoDB ([`super::dynamodb::MAX_ITEM_BYTES`]).
const MAX_BODY_BYTES: usize = super::dynamodb::MAX_ITEM_BYTES;

/// Puts a lock. Returns its ETag.
async fn put(
    client: &Client,
    settings: &WriteSettings,
    ObjectKey { bucket, key }: ObjectKey<'_>,
    condition: PutCondition<'_>,
    body: &str,
) -> Result<Written<Option<String>>, Failure> {
    let mut request = client.put_object().bucket(bucket).key(key).content_type("application/json");
    request = match condition {
        PutCondition::IfAbsent => request.if_none_match("*"),
        PutCondition::IfMatch(etag) => request.if_match(etag),
    };
    request = match &settings.encryption {
        Encryption::Default => request,
        Encryption::Aes256 => request.server_side_encryption(ServerSideEncryption::Aes256),
        Encryption::Kms(id) => request.server_side_encryption(ServerSideEncryption::AwsKms).ssekms_key_id(id),
    };
    request = request.set_acl(settings.acl.as_deref().map(ObjectCannedAcl::from));
    request = request.set_tagging(settings.tagging.clone());
    let mut overridden = aws_sdk_s3::config::Builder::new();
    if settings.has_no_checksum {
        // Otherwise the SDK adds a CRC32, which some services do not accept.
        overridden = overridden.request_checksum_calculation(RequestChecksumCalculation::WhenRequired);
    } else {
        request = request.checksum_algorithm(ChecksumAlgorithm::Sha256);
    }
    let time = ServiceTime::default();
    let request = request.body(body.as_bytes().to_vec().into()).customize();
    match request.config_override(overridden).interceptor(time.clone()).send().await {
        Ok(answer) if (Headers { etag: answer.e_tag(), content_type: None, request_id: None }).is_an_answer() => {
            Ok(Written::Yes(answer.e_tag, time.get()))
        }
        Ok(_) => Err(no_answer(200)),
        Err(error) => match (error.raw_response().map(|response| response.status().as_u16()), condition) {
            (Some(409 | 412), _) => Ok(Written::Changed),
            // There is no object. A 404 without this code may be a proxy's, or mean that there is no bucket.
            (Some(404), PutCondition::IfMatch(_)) if error.code() == Some("NoSuchKey") => Ok(Written::Changed),
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
    let etag = object.strong_etag()?;
    let attempts = Attempts::default();
    let request = client.delete_object().bucket(bucket).key(key).if_match(etag);
    match request.customize().interceptor(attempts.clone()).send().await {
        Ok(_) => Ok(Deleted::Yes(None)),
        Err(error) => {
            let status = error.raw_response().map(|response| response.status().as_u16());
            match (error.code(), status) {
                // 412: there is another object. 404: there is no object. 409: an object is being written at this
                // moment.
                (Some("PreconditionFailed" | "NoSuchKey" | "ConditionalRequestConflict"), _)
                | (_, Some(404 | 409 | 412)) => Ok(Deleted::refused(attempts.were_several())),
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
    fn a_lock_is_written_as_terraform_writes_it() {
        let of = |config| WriteSettings::of(&crate::terraform::backend::tests::backend(config));
        let key = base64::encode([7; 32]);
        let with_key = format!(r#"{{"encrypt":true,"sse_customer_key":"{key}"}}"#);
        for (config, encryption) in [
            ("{}", Encryption::Default),
            (r#"{"kms_key_id":"k"}"#, Encryption::Default),
            (r#"{"encrypt":true}"#, Encryption::Aes256),
            (r#"{"encrypt":true,"kms_key_id":"k"}"#, Encryption::Kms("k".into())),
            (&with_key, Encryption::Default),
        ] {
            assert_eq!(of(config).encryption, encryption, "{config}");
        }
        let plain = of(r#"{"acl":"","lock_tags":{},"skip_s3_checksum":false}"#);
        assert_eq!((plain.acl, plain.tagging, plain.has_no_checksum), (None, None, false));
        let all = of(
            r#"{"acl":"bucket-owner-full-control","lock_tags":{"a b":"c=&d","e":"\u00e9"},"skip_s3_checksum":true}"#,
        );
        assert_eq!(all.acl.as_deref(), Some("bucket-owner-full-control"));
        assert_eq!(all.tagging.as_deref(), Some("a%20b=c%3D%26d&e=%C3%A9"));
        assert!(all.has_no_checksum);
    }

    #[test]
    fn only_a_strong_etag_is_a_condition() {
        let object = |etag: Option<&str>| Object::new("", 0, etag.map(ToOwned::to_owned));
        assert_eq!(object(Some("\"e\"")).strong_etag(), Ok("\"e\""));
        assert!(object(Some("W/\"e\"")).strong_etag().is_err_and(|failure| failure.is_final()));
        assert!(object(None).strong_etag().is_err_and(|failure| !failure.is_final()));
    }

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
