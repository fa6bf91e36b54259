//! A failed request to a lock service: its message, and the consequences for the caller.

use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use crate::aws::causes::causes;

/// A failed request. Its `Display` text is the name of the service and the reason.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{service}: {reason}")]
pub(crate) struct Failure {
    service: &'static str,
    reason: String,
    cause: Cause,
}

/// The reason why a request failed. It determines whether a retry can help, and whether a lock can exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// There was no response, or the response cannot be from the service: a proxy or a captive portal may have sent it.
    NoAnswer,
    /// The failure is temporary: for example, a clock is wrong, or the service has an internal error.
    Passing,
    /// The service has no capacity for the request at the moment. Many retries would make that worse.
    Busy,
    /// These credentials have expired. New credentials from the same source may be accepted.
    ExpiredCredentials,
    /// These credentials have no permission for this action. The text is the name of the action in IAM policies.
    Denied(&'static str),
    /// The table does not exist for these credentials in this region.
    NoTable,
    /// The bucket does not exist for these credentials in this region.
    NoBucket,
    /// The table's key is not exactly `LockID`, so the table cannot contain a terraform lock.
    OtherKey,
    /// The service does not accept these credentials.
    RejectedCredentials,
    /// The service does not implement the request. In most cases, it does not implement the condition in the request.
    NotImplemented,
    /// The service refused the request for another reason. The same request would be refused again.
    Refused,
}

impl Cause {
    /// Whether a retry of the request cannot help.
    pub(crate) fn is_final(self) -> bool {
        !matches!(self, Self::NoAnswer | Self::Passing | Self::Busy | Self::ExpiredCredentials)
    }

    /// Whether the failure shows that the table or bucket of the request cannot contain a terraform lock. If false, it
    /// may contain one.
    pub(crate) fn excludes_locks(self) -> bool {
        matches!(self, Self::NoTable | Self::NoBucket | Self::OtherKey)
    }

    /// Returns the cause for an error response to a request for `action`. `code` and `message` are the service's own
    /// (DynamoDB API reference, "Common Errors"; S3 API reference, "Error responses"). `status` is the HTTP status.
    /// Each of the three is `None` if it was not received.
    fn of(action: &'static str, code: Option<&str>, message: Option<&str>, status: Option<u16>) -> Self {
        let Some(code) = code else {
            return match status {
                Some(501) => Self::NotImplemented,
                // Every error response of S3 and DynamoDB contains a code, except the response to a HEAD request, which
                // has no body. So without a code, either there is no response from the service, or a HEAD request has
                // failed. The cause may be a wrong clock or an expired session, so a retry may succeed.
                _ => Self::NoAnswer,
            };
        };
        let is = |codes: &[&str]| codes.iter().any(|known| code.contains(known));
        let says = |text: &str| message.is_some_and(|message| message.contains(text));
        if is(&["AccessDenied"]) {
            Self::Denied(action)
        } else if is(&["NoSuchBucket"]) {
            Self::NoBucket
        } else if is(&["ResourceNotFound"]) || says("non-existent table") {
            Self::NoTable
        } else if is(&["Validation"]) && says("does not match the schema") {
            Self::OtherKey
        } else if is(&["NotImplemented"]) {
            Self::NotImplemented
        } else if is(&["ExpiredToken", "RequestExpired", "TokenRefreshRequired"]) {
            Self::ExpiredCredentials
        } else if is(&["InvalidSignature", "SignatureDoesNotMatch", "UnrecognizedClient", "InvalidAccessKeyId"]) {
            Self::RejectedCredentials
        } else if is(&REFUSALS) {
            Self::Refused
        } else if is(&["Throughput", "Throttl", "RequestLimitExceeded", "TooManyRequests", "SlowDown"]) {
            // The error codes that the SDK counts as throttling (aws_runtime::retries::classifiers::THROTTLING_ERRORS),
            // as far as DynamoDB and S3 have them.
            Self::Busy
        } else {
            Self::Passing
        }
    }
}

/// Parts of error codes. If the code of an error contains one of these texts, a retry of the same request would fail
/// again.
const REFUSALS: [&str; 14] = [
    "NotFound",
    "Validation",
    "InvalidRequest",
    "InvalidArgument",
    "InvalidBucketName",
    "InvalidObjectState",
    "InvalidEncryptionAlgorithm",
    "MissingSecurityHeader",
    "MethodNotAllowed",
    "PermanentRedirect",
    "AuthorizationHeaderMalformed",
    "AllAccessDisabled",
    "KMS.Disabled",
    "KMS.InvalidState",
];

/// The error for a response that cannot be from the service. A retry may reach the service.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("status {status}, but the response is not from {service}: a proxy or a login page may have sent it")]
pub(crate) struct NoAnswer {
    pub(crate) service: &'static str,
    pub(crate) status: u16,
}

/// The error that a service reports in its response to a request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ServiceAnswer<'a> {
    /// The service's name for the error. `None` if the response contains no code.
    pub(crate) code: Option<&'a str>,
    /// The service's description of the error. `None` if the response contains none.
    pub(crate) message: Option<&'a str>,
    /// The HTTP status. `None` if there was no response.
    pub(crate) status: Option<u16>,
}

impl Failure {
    /// Returns a failure with [`Cause::NoAnswer`], for a response that does not show whether the lock exists. The
    /// response to a retry may show it.
    pub(crate) fn no_answer(service: &'static str, reason: &str) -> Self {
        Self { service, reason: reason.to_owned(), cause: Cause::NoAnswer }
    }

    /// Returns a failure with [`Cause::Refused`], for an error that a retry of the request cannot fix.
    pub(crate) fn refusal(service: &'static str, reason: &str) -> Self {
        Self { service, reason: reason.to_owned(), cause: Cause::Refused }
    }

    /// Returns the failure of a request to `service`. `action` is the name of the requested action in IAM policies.
    pub(crate) fn of_request<E>(service: &'static str, action: &'static str, error: &SdkError<E>) -> Self
    where
        E: std::error::Error + ProvideErrorMetadata + 'static,
    {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(error) = cause {
            if let Some(no_answer) = error.downcast_ref::<NoAnswer>() {
                return Self::no_answer(service, &no_answer.to_string());
            }
            cause = error.source();
        }
        let status = error.raw_response().map(|response| response.status().as_u16());
        let answer = ServiceAnswer { code: error.code(), message: error.message(), status };
        Self::of_answer(service, action, answer, &causes(error))
    }

    /// Returns the failure of a request to `service`. `action` is the name of the requested action in IAM policies. If
    /// there is no code, no message and no status, the reason of the failure is `otherwise`.
    pub(crate) fn of_answer(
        service: &'static str,
        action: &'static str,
        ServiceAnswer { code, message, status }: ServiceAnswer<'_>,
        otherwise: &str,
    ) -> Self {
        let cause = Cause::of(action, code, message, status);
        let reason = match (code, message, status) {
            (Some(code), Some(message), _) => format!("{code}: {message}"),
            (Some(code), None, _) => code.to_owned(),
            (None, None, Some(403)) => format!("status 403 without a reason: the permission {action} may be missing"),
            // Here the SDK's message is an XML parser's error about an HTML page, which is of no use to a reader.
            (None, _, Some(status)) => NoAnswer { service, status }.to_string(),
            (None, Some(message), None) => message.to_owned(),
            (None, None, None) => otherwise.to_owned(),
        };
        Self { service, reason, cause }
    }

    pub(crate) fn cause(&self) -> Cause {
        self.cause
    }

    /// If the credentials have no permission for the requested action, returns the name of the action in IAM policies.
    /// `None` for any other failure.
    pub(crate) fn denied(&self) -> Option<&'static str> {
        match self.cause {
            Cause::Denied(action) => Some(action),
            _ => None,
        }
    }

    /// Whether a retry of the request cannot help.
    pub(crate) fn is_final(&self) -> bool {
        self.cause.is_final()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_answer_means_follows_from_its_code() {
        const SCHEMA: &str = "The provided key element does not match the schema";
        for (code, message, status, expected) in [
            (Some("AccessDenied"), Some("no"), Some(403), Cause::Denied("s3:GetObject")),
            (Some("AccessDeniedException"), None, Some(400), Cause::Denied("s3:GetObject")),
            (Some("ResourceNotFoundException"), Some("Requested resource not found"), Some(400), Cause::NoTable),
            (
                Some("ResourceNotFoundException"),
                Some("Cannot do operations on a non-existent table"),
                None,
                Cause::NoTable,
            ),
            (Some("NoSuchBucket"), None, Some(404), Cause::NoBucket),
            (Some("ValidationException"), Some(SCHEMA), Some(400), Cause::OtherKey),
            (Some("ValidationException"), Some("1 validation error detected"), Some(400), Cause::Refused),
            (Some("SignatureDoesNotMatch"), None, Some(403), Cause::RejectedCredentials),
            (Some("UnrecognizedClientException"), None, Some(400), Cause::RejectedCredentials),
            (Some("InvalidAccessKeyId"), None, Some(403), Cause::RejectedCredentials),
            (Some("ExpiredToken"), None, Some(400), Cause::ExpiredCredentials),
            (Some("ExpiredTokenException"), None, Some(400), Cause::ExpiredCredentials),
            // The object is encrypted with a customer key, and the request did not contain it.
            (Some("InvalidRequest"), Some("stored using a form of Server Side Encryption"), Some(400), Cause::Refused),
            (Some("NotImplemented"), Some("A header you provided"), Some(501), Cause::NotImplemented),
            (None, None, Some(501), Cause::NotImplemented),
            // These conditions may be over at the next attempt: a wrong clock, an expired session, a busy service.
            (Some("RequestTimeTooSkewed"), Some("skewed"), Some(403), Cause::Passing),
            (Some("InvalidTokenId"), None, Some(403), Cause::Passing),
            (Some("ProvisionedThroughputExceededException"), None, Some(400), Cause::Busy),
            (Some("ThrottlingException"), None, Some(400), Cause::Busy),
            (Some("RequestLimitExceeded"), None, Some(400), Cause::Busy),
            (Some("SlowDown"), None, Some(503), Cause::Busy),
            (Some("InternalServerError"), None, Some(500), Cause::Passing),
            (None, Some("<html>"), Some(403), Cause::NoAnswer),
            // This is the response to a HEAD request, which has no body.
            (None, None, Some(403), Cause::NoAnswer),
            (None, None, Some(400), Cause::NoAnswer),
            (None, None, None, Cause::NoAnswer),
        ] {
            let failure =
                Failure::of_answer("S3", "s3:GetObject", ServiceAnswer { code, message, status }, "unhandled error");
            assert_eq!(failure.cause(), expected, "{code:?} {message:?} {status:?}");
            let may_pass =
                matches!(expected, Cause::NoAnswer | Cause::Passing | Cause::Busy | Cause::ExpiredCredentials);
            assert_eq!(failure.is_final(), !may_pass, "{code:?} {message:?} {status:?}");
        }
    }

    #[test]
    fn only_what_cannot_hold_a_lock_excludes_one() {
        let excluding = [Cause::NoTable, Cause::NoBucket, Cause::OtherKey];
        let others = [
            Cause::NoAnswer,
            Cause::Passing,
            Cause::Busy,
            Cause::ExpiredCredentials,
            Cause::Denied("x"),
            Cause::RejectedCredentials,
            Cause::NotImplemented,
            Cause::Refused,
        ];
        assert!(excluding.iter().all(|cause| cause.excludes_locks() && cause.is_final()));
        assert!(!others.iter().any(|cause| cause.excludes_locks()));
    }

    #[test]
    fn a_failure_says_what_the_service_said() {
        let said = |code, message, status, otherwise: &str| {
            Failure::of_answer("S3", "s3:GetObject", ServiceAnswer { code, message, status }, otherwise).to_string()
        };
        assert_eq!(said(Some("AccessDenied"), Some("no"), Some(403), "x"), "S3: AccessDenied: no");
        assert_eq!(said(None, None, None, "timed out"), "S3: timed out");
        assert_eq!(
            said(None, None, Some(403), "x"),
            "S3: status 403 without a reason: the permission s3:GetObject may be missing"
        );
        // The parser's error about a page that is not from S3 must not be in the text.
        let page = said(None, None, Some(511), "unhandled error: XmlDecodeError { kind: InvalidXml }");
        assert_eq!(page, "S3: status 511, but the response is not from S3: a proxy or a login page may have sent it");
    }
}
