//! Requests to DynamoDB and S3, and their answers, as a debug log shows them.
//!
//! Two programs write them in two ways. aws-sdk-go-base v2 (OpenTofu, Terraform since 1.6) has one record for each, in
//! `backend-s3`: `HTTP Request Sent` before it is sent, `HTTP Response Received`; the fields of HTTP stand in any order, and
//! those with a body go on below the first line (hc_logger.go, logger.go). The SDK for Go v1 (Terraform up to 1.5) dumps
//! whole messages behind `[aws-sdk-go] DEBUG: Request dynamodb/PutItem Details:` (aws-sdk-go-base v0.x, logger.go).

use serde_json::Value;

use super::lock_info::LockInfo;
use super::record::LogRecord;

/// What was seen of one exchange that matters to a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Exchange {
    /// A lock is asked for in DynamoDB.
    PutItem {
        /// The lock, and the very text of it.
        info: LockInfo,
        text: String,
    },
    /// A lock is asked for in S3: bucket, and key of the state; the SHA-256 of what is put, in base 64.
    PutLock { bucket: String, key: String, checksum: Option<String> },
    /// A state is written.
    PutState { bucket: String, key: String },
    /// An item is to go, by its `LockID`.
    DeleteItem { path: String },
    /// A lock's object is to go.
    DeleteLock { bucket: String, key: String },
    /// Something else is asked of DynamoDB: it has an answer as well.
    Other { method: String },
    /// One of those was answered.
    Answered {
        /// `PutItem`, `DeleteObject`...
        method: String,
        /// What the exchange was about, where the answer tells: bucket and key of an object.
        object: Option<(String, String)>,
        /// The HTTP status.
        status: u16,
    },
}

impl Exchange {
    /// Whether requests are told here. Of a state that is written, Terraform up to 1.5 tells at any level of the SDK's.
    pub(crate) fn is_of_http(&self) -> bool {
        !matches!(self, Self::PutState { .. })
    }
}

/// What the lines above have begun.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Begun {
    #[default]
    Nothing,
    /// A request to DynamoDB, whose body is awaited.
    Request { method: String },
    /// An answer, whose status is awaited.
    Answer { method: String, object: Option<(String, String)> },
    /// A state that is written: its bucket and key are awaited.
    Upload { bucket: Option<String> },
}

/// Reads the lines of a log one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Exchanges(Begun);

/// What terraform puts behind the key of a state for the lock's object (backend/remote-state/s3/client.go,
/// `lockFileSuffix`).
pub(crate) const LOCK_FILE: &str = ".tflock";

impl Exchanges {
    /// Whether the lines to come belong to what has been read: whoever begins to read later must begin before it.
    pub(crate) fn is_within(&self) -> bool {
        self.0 != Begun::Nothing
    }

    /// The same, of a request or an answer.
    pub(crate) fn is_within_http(&self) -> bool {
        matches!(self.0, Begun::Request { .. } | Begun::Answer { .. })
    }

    /// Takes the first line of a record.
    pub(crate) fn record(&mut self, record: &LogRecord<'_>) -> Option<Exchange> {
        self.0 = Begun::Nothing;
        if record.module.starts_with("backend-s3") {
            return match record.message {
                "HTTP Request Sent" => self.request(record),
                "HTTP Response Received" => self.answer(record),
                _ => None,
            };
        }
        if record.message == "Uploading remote state to S3" && record.rest() == "{" {
            self.0 = Begun::Upload { bucket: None };
        }
        if record.message == "[aws-sdk-go] DEBUG" {
            let details = record.rest().strip_suffix(" Details:")?;
            let (kind, call) = details.split_once(' ')?;
            let method = call.split_once('/')?.1.to_owned();
            match kind {
                "Request" => self.0 = Begun::Request { method },
                "Response" => self.0 = Begun::Answer { method, object: None },
                _ => {}
            }
        }
        None
    }

    /// Takes a line that is no record of its own.
    pub(crate) fn line(&mut self, line: &str) -> Option<Exchange> {
        match &mut self.0 {
            Begun::Nothing => None,
            Begun::Request { method } => {
                let body = line.strip_prefix("  | ").unwrap_or(line);
                let body: Value = body.starts_with('{').then(|| serde_json::from_str(body).ok())??;
                let exchange = of_body(method, &body);
                let method = std::mem::take(method);
                self.0 = Begun::Nothing;
                Some(exchange.unwrap_or(Exchange::Other { method }))
            }
            Begun::Answer { method, object } => {
                let status = line.strip_prefix("HTTP/1.").and_then(|rest| rest.get(2..5)?.parse().ok());
                let status = status.or_else(|| {
                    let mut fields = line.strip_prefix("   ")?.split(' ');
                    fields.find_map(|field| field.strip_prefix("http.status_code=")?.parse().ok())
                })?;
                let answered = Exchange::Answered { method: std::mem::take(method), object: object.take(), status };
                self.0 = Begun::Nothing;
                Some(answered)
            }
            Begun::Upload { bucket } => {
                let value = |name: &str| {
                    let quoted = line.trim().strip_prefix(name)?.strip_prefix(": \"")?;
                    Some(quoted.trim_end_matches(',').strip_suffix('"')?.to_owned())
                };
                if let Some(found) = value("Bucket") {
                    *bucket = Some(found);
                }
                let (Some(bucket), Some(key)) = (bucket.clone(), value("Key")) else { return None };
                self.0 = Begun::Nothing;
                Some(Exchange::PutState { bucket, key })
            }
        }
    }

    fn request(&mut self, record: &LogRecord<'_>) -> Option<Exchange> {
        let method = method(record)?;
        let Some((bucket, key)) = object(record) else {
            self.0 = Begun::Request { method };
            return None;
        };
        match (method.as_str(), key.strip_suffix(LOCK_FILE)) {
            ("PutObject", Some(state)) => Some(Exchange::PutLock {
                bucket,
                key: state.to_owned(),
                checksum: record.field("http.request.header.x_amz_checksum_sha256"),
            }),
            ("PutObject", None) => Some(Exchange::PutState { bucket, key }),
            ("DeleteObject", Some(state)) => Some(Exchange::DeleteLock { bucket, key: state.to_owned() }),
            _ => None,
        }
    }

    fn answer(&mut self, record: &LogRecord<'_>) -> Option<Exchange> {
        let (method, object) = (method(record)?, object(record));
        let status = record.field("http.status_code").and_then(|status| status.parse().ok());
        let Some(status) = status else {
            self.0 = Begun::Answer { method, object };
            return None;
        };
        Some(Exchange::Answered { method, object, status })
    }
}

/// `PutItem`, whether it is called so, `DynamoDB/PutItem` (since aws-sdk-go-base v2.0.0-beta.72) or by the name that
/// the first of them had.
fn method(record: &LogRecord<'_>) -> Option<String> {
    let method = record.field("rpc.method").or_else(|| record.field("aws.operation"))?;
    Some(method.rsplit('/').next().unwrap_or_default().to_owned())
}

fn object(record: &LogRecord<'_>) -> Option<(String, String)> {
    Some((record.field("aws.s3.bucket")?, record.field("aws.s3.key")?))
}

fn of_body(method: &str, body: &Value) -> Option<Exchange> {
    let text = |pointer: &str| body.pointer(pointer).and_then(Value::as_str);
    match method {
        // The digest of a state is put in the same way, without a condition.
        "PutItem" if text("/ConditionExpression") == Some("attribute_not_exists(LockID)") => {
            let text = text("/Item/Info/S")?.to_owned();
            Some(Exchange::PutItem { info: LockInfo::parse(&text)?, text })
        }
        "DeleteItem" => Some(Exchange::DeleteItem { path: text("/Key/LockID/S")?.to_owned() }),
        _ => None,
    }
}
