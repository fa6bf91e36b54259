//! Requests to DynamoDB and S3, and their responses, in a debug log.
//!
//! There are two formats:
//! - aws-sdk-go-base v2 (OpenTofu, Terraform since 1.6) writes one record for each request and one for each response,
//!   in the module `backend-s3`: `HTTP Request Sent` before a request is sent, and `HTTP Response Received`. The HTTP
//!   fields have no fixed order. If a record has a body, the record continues on the lines after its first line
//!   (hc_logger.go, logger.go).
//! - The SDK for Go v1 (Terraform up to 1.5) writes whole HTTP messages after
//!   `[aws-sdk-go] DEBUG: Request dynamodb/PutItem Details:` (aws-sdk-go-base v0.x, logger.go).

use serde_json::Value;

use super::lock_info::LockInfo;
use super::record::LogRecord;

/// The content of a request or a response, as far as it matters to a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Exchange {
    /// A request for a lock in DynamoDB.
    PutItem {
        /// The lock, parsed from `text`.
        info: LockInfo,
        /// The exact text of the lock.
        text: String,
    },
    /// A request for a lock in S3. `key` is the key of the state. `checksum` is the SHA-256 of the lock's text, in base
    /// 64; `None` if the log does not show it.
    PutLock { bucket: String, key: String, checksum: Option<String> },
    /// A write of a state.
    PutState { bucket: String, key: String },
    /// The delete of a DynamoDB item. `path` is the item's `LockID`.
    DeleteItem { path: String },
    /// The delete of a lock object. `key` is the key of the state.
    DeleteLock { bucket: String, key: String },
    /// Another request to DynamoDB. It is recorded because its response must be matched too.
    Other { method: String },
    /// The response to one of these requests.
    Answered {
        /// The operation: `PutItem`, `DeleteObject`...
        method: String,
        /// The bucket and the key of the request's object. `None` if the response does not contain them.
        object: Option<(String, String)>,
        /// The status code of the HTTP response.
        status: u16,
    },
}

impl Exchange {
    /// Whether this proves that the log contains requests. An [`Exchange::PutState`] does not prove it: Terraform up to
    /// 1.5 logs the write of a state itself, whether or not the SDK logs requests.
    pub(crate) fn is_of_http(&self) -> bool {
        !matches!(self, Self::PutState { .. })
    }
}

/// The message that has begun but is not complete yet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Begun {
    #[default]
    Nothing,
    /// A request to DynamoDB. Its body has not been read yet.
    Request { method: String },
    /// A response. Its status has not been read yet.
    Answer { method: String, object: Option<(String, String)> },
    /// A write of a state. Its key, or its bucket and its key, have not been read yet.
    Upload { bucket: Option<String> },
}

/// Parses the lines of a log in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Exchanges(Begun);

/// The suffix that terraform appends to the key of a state to name the lock object (backend/remote-state/s3/client.go,
/// `lockFileSuffix`).
pub(crate) const LOCK_FILE: &str = ".tflock";

impl Exchanges {
    /// Whether a message has begun but is not complete. A reader that resumes later must then start before this
    /// message.
    pub(crate) fn is_within(&self) -> bool {
        self.0 != Begun::Nothing
    }

    /// Returns the same as [`Exchanges::is_within`], but only for a request or a response, not for a write of a state.
    pub(crate) fn is_within_http(&self) -> bool {
        matches!(self.0, Begun::Request { .. } | Begun::Answer { .. })
    }

    /// Parses the first line of a record. Returns the exchange that this line completes, otherwise `None`.
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

    /// Parses a line that does not begin a record. Returns the exchange that this line completes, otherwise `None`.
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

/// Returns the operation, such as `PutItem`. `None` if the record has no such field. Since aws-sdk-go-base
/// v2.0.0-beta.72 the field has the form `DynamoDB/PutItem`. In the first versions, the field's name was
/// `aws.operation`.
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
        // A `PutItem` without this condition writes the digest of a state, not a lock.
        "PutItem" if text("/ConditionExpression") == Some("attribute_not_exists(LockID)") => {
            let text = text("/Item/Info/S")?.to_owned();
            Some(Exchange::PutItem { info: LockInfo::parse(&text)?, text })
        }
        "DeleteItem" => Some(Exchange::DeleteItem { path: text("/Key/LockID/S")?.to_owned() }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "2026-11-23T01:46:07.593Z [DEBUG] ";
    const LOCK: &str = r#"{"ConditionExpression":"attribute_not_exists(LockID)","Item":{"Info":{"S":"{\"ID\":\"7\"}"},"LockID":{"S":"b/k"}},"TableName":"t"}"#;

    /// Returns the exchanges in the lines. A line that begins with a space, or is the status of a response or a body,
    /// continues a record.
    fn read(lines: &[String]) -> Vec<Exchange> {
        let mut exchanges = Exchanges::default();
        let step = |line: &String| match LogRecord::parse(line) {
            Some(record) => exchanges.record(&record),
            None => exchanges.line(line),
        };
        lines.iter().filter_map(step).collect()
    }

    fn sent(fields: &str) -> String {
        format!("{HEAD}backend-s3: HTTP Request Sent: {fields}")
    }

    #[test]
    fn a_request_to_s3_is_a_lock_or_a_state_by_its_key() {
        let request = |method: &str, key: &str| {
            read(&[sent(&format!("rpc.method={method} aws.s3.bucket=b aws.s3.key={key}"))]).pop()
        };
        let (bucket, key) = ("b".to_owned(), "k".to_owned());
        for (method, object, expected) in [
            (
                "PutObject",
                "k.tflock",
                Some(Exchange::PutLock { bucket: bucket.clone(), key: key.clone(), checksum: None }),
            ),
            ("PutObject", "k", Some(Exchange::PutState { bucket: bucket.clone(), key: key.clone() })),
            ("S3/DeleteObject", "k.tflock", Some(Exchange::DeleteLock { bucket, key })),
            // The delete of a workspace's state, and reads.
            ("DeleteObject", "k", None),
            ("GetObject", "k.tflock", None),
            ("HeadObject", "k", None),
        ] {
            assert_eq!(request(method, object), expected, "{method} {object}");
        }
    }

    #[test]
    fn a_request_to_dynamodb_is_known_by_its_body() {
        let request =
            |method: &str, body: &str| read(&[sent(&format!("rpc.method=DynamoDB/{method}")), body.to_owned()]);
        let digest = r#"{"Item":{"Digest":{"S":"d"},"LockID":{"S":"b/k-md5"}},"TableName":"t"}"#;
        let other = |method: &str| vec![Exchange::Other { method: method.to_owned() }];
        let put = request("PutItem", LOCK);
        let [Exchange::PutItem { info, text }] = put.as_slice() else { panic!("{put:?}") };
        assert_eq!((info.id.as_str(), text.as_str()), ("7", r#"{"ID":"7"}"#));
        assert_eq!(request("PutItem", &format!("  | {LOCK}")), put, "in a multi-line field");
        assert_eq!(request("PutItem", digest), other("PutItem"), "the digest of a state");
        assert_eq!(request("PutItem", &LOCK.replace("\\\"ID", "\\\"Id2")), other("PutItem"), "a text that is no lock");
        let delete = r#"{"Key":{"LockID":{"S":"b/k"}},"TableName":"t"}"#;
        assert_eq!(request("DeleteItem", delete), [Exchange::DeleteItem { path: "b/k".into() }]);
        assert_eq!(request("DeleteItem", r#"{"Key":{}}"#), other("DeleteItem"));
        assert_eq!(request("GetItem", delete), other("GetItem"));
        for line in ["", "no body", "{cut", "[1]"] {
            assert_eq!(request("PutItem", line), [], "{line:?} does not end the request");
        }
    }

    #[test]
    fn a_response_has_the_status_of_its_own_record() {
        let received = |fields: &str| format!("{HEAD}backend-s3: HTTP Response Received: rpc.method=PutItem{fields}");
        let answered = |status| vec![Exchange::Answered { method: "PutItem".into(), object: None, status }];
        assert_eq!(read(&[received(" http.status_code=400")]), answered(400));
        assert_eq!(read(&[received(""), "   x=1 http.status_code=200".into()]), answered(200));
        assert_eq!(read(&[received(""), "HTTP/1.1 503 Slow Down".into()]), answered(503));
        for line in
            ["HTTP/1.1", "HTTP/1.1 x", "http.status_code=200", "   http.status_code=x", "HTTP/1.\u{e9}\u{e9}\u{e9}"]
        {
            assert_eq!(read(&[received(""), line.into()]), [], "{line:?}");
        }
        // The next record ends the message, so its status is not taken from a later one.
        let another = format!("{HEAD}other: x");
        assert_eq!(read(&[received(""), another, "HTTP/1.1 200 OK".into()]), []);
    }

    #[test]
    fn a_message_of_another_module_is_no_request() {
        let line = sent("rpc.method=PutObject aws.s3.bucket=b aws.s3.key=k.tflock");
        assert_eq!(read(&[line.replace("backend-s3", "provider.aws")]), []);
        assert_eq!(read(&[line.replace("HTTP Request Sent", "HTTP Request Planned")]), []);
        assert_eq!(read(&[line]).len(), 1);
    }

    #[test]
    fn only_requests_prove_that_requests_are_logged() {
        let object = || ("b".to_owned(), "k".to_owned());
        let ((bucket, key), (lock_bucket, lock_key)) = (object(), object());
        assert!(!Exchange::PutState { bucket, key }.is_of_http(), "Terraform 1.5 logs it without requests");
        assert!(Exchange::DeleteLock { bucket: lock_bucket, key: lock_key }.is_of_http());
        assert!(Exchange::Other { method: "GetItem".into() }.is_of_http());
    }
}
