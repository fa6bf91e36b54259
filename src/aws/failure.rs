//! A request to a lock service that did not work: what is said of it, and what it means.

use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};

use crate::aws::causes::causes;

/// A request that did not work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{service}: {reason}")]
pub(crate) struct Failure {
    service: &'static str,
    reason: String,
    cause: Cause,
}

/// What a failed request means for whoever sent it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// No answer came, or one that the service cannot have sent: a proxy or a captive portal sends such.
    NoAnswer,
    /// The service cannot do it at this moment: it is busy, or a clock is off.
    Passing,
    /// The session of these credentials is over. New ones from the same source may be well.
    ExpiredCredentials,
    /// These credentials may not do this action, as a policy names it.
    Denied(&'static str),
    /// For these credentials, in this region, there is no such table.
    NoTable,
    /// The same for the bucket.
    NoBucket,
    /// The key of the table is not `LockID` alone, so no lock of terraform's can be in it.
    OtherKey,
    /// The service does not accept these credentials.
    RejectedCredentials,
    /// The service does not implement what was asked for: a condition, most often.
    NotImplemented,
    /// The service understood the request and refuses it for another reason, which it names.
    Refused,
}

impl Cause {
    /// Whether asking again cannot help.
    pub(crate) fn is_final(self) -> bool {
        !matches!(self, Self::NoAnswer | Self::Passing | Self::ExpiredCredentials)
    }

    /// Whether no lock of terraform's can be where the request went.
    pub(crate) fn excludes_locks(self) -> bool {
        matches!(self, Self::NoTable | Self::NoBucket | Self::OtherKey)
    }

    /// What the service's own `code` and `message` mean, in an answer with the HTTP status `status` to a request for
    /// `action`. DynamoDB API reference, "Common Errors"; S3 API reference, "Error responses".
    fn of(action: &'static str, code: Option<&str>, message: Option<&str>, status: Option<u16>) -> Self {
        let Some(code) = code else {
            return match status {
                Some(501) => Self::NotImplemented,
                // Whoever sends an answer of S3's or DynamoDB's says a code in it. What answers a HEAD has no body to say
                // one in: that may be a clock or a session.
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
        } else {
            Self::Passing
        }
    }
}

/// Codes of an answer that will be the same whenever the same request is sent.
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

/// A response that the service cannot have sent. The next one may be its own.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("status {status}, and the response is not {service}'s: a proxy or a portal may have sent it")]
pub(crate) struct NoAnswer {
    pub(crate) service: &'static str,
    pub(crate) status: u16,
}

impl Failure {
    /// A response that tells nothing. The next one may.
    pub(crate) fn no_answer(service: &'static str, reason: &str) -> Self {
        Self { service, reason: reason.to_owned(), cause: Cause::NoAnswer }
    }

    /// Something that asking again cannot mend.
    pub(crate) fn refusal(service: &'static str, reason: &str) -> Self {
        Self { service, reason: reason.to_owned(), cause: Cause::Refused }
    }

    /// What went wrong with a request for `action`, which a policy names so.
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
        Self::of_answer(service, action, (error.code(), error.message(), status), &causes(error))
    }

    /// What went wrong with a request for `action`: `code` and `message` are the service's own, `status` is that of HTTP,
    /// and `otherwise` tells what happened where the service said nothing.
    pub(crate) fn of_answer(
        service: &'static str,
        action: &'static str,
        (code, message, status): (Option<&str>, Option<&str>, Option<u16>),
        otherwise: &str,
    ) -> Self {
        let cause = Cause::of(action, code, message, status);
        let reason = match (code, message, status) {
            (Some(code), Some(message), _) => format!("{code}: {message}"),
            (Some(code), None, _) => code.to_owned(),
            (None, None, Some(403)) => format!("status 403, without a reason: {action} may be missing"),
            // What a page of HTML looks like to a parser of XML is of no use to anybody.
            (None, _, Some(status)) => NoAnswer { service, status }.to_string(),
            (None, Some(message), None) => message.to_owned(),
            (None, None, None) => otherwise.to_owned(),
        };
        Self { service, reason, cause }
    }

    /// What it means.
    pub(crate) fn cause(&self) -> Cause {
        self.cause
    }

    /// The action, as a policy names it, that these credentials may not do. `None` for any other failure.
    pub(crate) fn denied(&self) -> Option<&'static str> {
        match self.cause {
            Cause::Denied(action) => Some(action),
            _ => None,
        }
    }

    /// Whether asking again cannot help.
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
            // The object is encrypted with a key of the customer's, which was not sent.
            (Some("InvalidRequest"), Some("stored using a form of Server Side Encryption"), Some(400), Cause::Refused),
            (Some("NotImplemented"), Some("A header you provided"), Some(501), Cause::NotImplemented),
            (None, None, Some(501), Cause::NotImplemented),
            // A clock, a session that is over, a proxy: they may be well the next time.
            (Some("RequestTimeTooSkewed"), Some("skewed"), Some(403), Cause::Passing),
            (Some("InvalidTokenId"), None, Some(403), Cause::Passing),
            (Some("ProvisionedThroughputExceededException"), None, Some(400), Cause::Passing),
            (Some("SlowDown"), None, Some(503), Cause::Passing),
            (Some("InternalServerError"), None, Some(500), Cause::Passing),
            (None, Some("<html>"), Some(403), Cause::NoAnswer),
            // The answer to a HEAD.
            (None, None, Some(403), Cause::NoAnswer),
            (None, None, Some(400), Cause::NoAnswer),
            (None, None, None, Cause::NoAnswer),
        ] {
            let failure = Failure::of_answer("S3", "s3:GetObject", (code, message, status), "unhandled error");
            assert_eq!(failure.cause(), expected, "{code:?} {message:?} {status:?}");
            let may_pass = matches!(expected, Cause::NoAnswer | Cause::Passing | Cause::ExpiredCredentials);
            assert_eq!(failure.is_final(), !may_pass, "{code:?} {message:?} {status:?}");
        }
    }

    #[test]
    fn only_what_cannot_hold_a_lock_excludes_one() {
        let excluding = [Cause::NoTable, Cause::NoBucket, Cause::OtherKey];
        let others = [
            Cause::NoAnswer,
            Cause::Passing,
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
            Failure::of_answer("S3", "s3:GetObject", (code, message, status), otherwise).to_string()
        };
        assert_eq!(said(Some("AccessDenied"), Some("no"), Some(403), "x"), "S3: AccessDenied: no");
        assert_eq!(said(None, None, None, "timed out"), "S3: timed out");
        assert_eq!(said(None, None, Some(403), "x"), "S3: status 403, without a reason: s3:GetObject may be missing");
        // A parser's account of a page that is no XML of S3's is not shown.
        let page = said(None, None, Some(511), "unhandled error: XmlDecodeError { kind: InvalidXml }");
        assert_eq!(page, "S3: status 511, and the response is not S3's: a proxy or a portal may have sent it");
    }
}
