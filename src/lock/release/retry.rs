//! When a request to the services of a lock is repeated, and the outcome if they cannot be reached.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::services::{POLL_INTERVAL, Services};
use crate::aws::credentials::Purpose;
use crate::aws::failure::Failure;
use crate::aws::settings::Unreachable;
use crate::lock::location::LockLocation;
use crate::lock::outcome::{Because, Outcome};
use crate::trace::trace;

/// The time that must be left for another attempt. Within less, most services cannot be read and changed.
pub(super) const MIN_ATTEMPT_TIMEOUT: Duration = Duration::from_secs(1);

/// The maximum time between two attempts.
pub(super) const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(4);

/// Whether to make another attempt after `failure`. The attempt would begin at `next` after the start of the release.
/// It must have [`MIN_ATTEMPT_TIMEOUT`] at least.
pub(super) fn is_retried(failure: &Failure, next: Duration, limit: Duration) -> bool {
    !failure.is_final() && next.saturating_add(MIN_ATTEMPT_TIMEOUT) <= limit
}

/// Requests and caches the credentials for `location`. The caller does this before its own time limit begins, because a
/// source of credentials may take longer than a service may. For [`Purpose::Work`], the request is retried for `limit`
/// if the service that provides the credentials does not respond.
pub(super) async fn credentials(location: &LockLocation, limit: Duration, purpose: Purpose) -> Result<(), Unreachable> {
    let begun = Instant::now();
    let mut interval = POLL_INTERVAL;
    loop {
        match Services::connect(location, purpose).await {
            Err(unreachable) if is_asked_again(&unreachable, purpose, begun.elapsed() + interval, limit) => {
                trace!("no credentials: {unreachable}");
                sleep(interval).await;
                interval = (interval * 2).min(MAX_RETRY_INTERVAL);
            }
            asked => return asked.map(drop),
        }
    }
}

/// Whether to request credentials again after `unreachable`. The request would be sent at `next` after the first one.
fn is_asked_again(unreachable: &Unreachable, purpose: Purpose, next: Duration, limit: Duration) -> bool {
    // Any other source may prompt a person, or lock an account after a few failed requests.
    matches!(unreachable, Unreachable::Silent(_)) && purpose == Purpose::Work && next < limit
}

/// Returns the outcome "not released" for a lock whose services cannot be reached with the settings of its backend.
pub(super) fn unreached(unreachable: &Unreachable) -> Outcome {
    let because = match unreachable {
        Unreachable::Credentials(_) => Because::NoCredentials,
        unreachable if unreachable.may_pass() => Because::NoAnswer,
        _ => Because::Settings,
    };
    Outcome::Kept { reason: unreachable.to_string(), because }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::aws::failure::ServiceAnswer;
    use crate::lock::release::services::tests::failure;

    pub(in crate::lock::release) fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Returns a failure for each cause that excludes a lock, for each other final cause, and for each that may pass.
    pub(in crate::lock::release) fn failures() -> (Vec<Failure>, Vec<Failure>, Vec<Failure>) {
        let all = |codes: &[&str]| codes.iter().map(|code| failure(code)).collect::<Vec<_>>();
        let other_key = ServiceAnswer {
            code: Some("ValidationException"),
            message: Some("The provided key element does not match the schema"),
            status: None,
        };
        let mut excluding = all(&["NoSuchBucket", "ResourceNotFoundException"]);
        excluding.push(Failure::of_answer("DynamoDB", "dynamodb:GetItem", other_key, ""));
        let mut passing = all(&["SlowDown", "ExpiredToken"]);
        passing.push(Failure::no_answer("S3", "x"));
        (excluding, all(&["AccessDenied", "InvalidAccessKeyId", "NotImplemented", "InvalidRequest"]), passing)
    }

    #[test]
    fn a_release_is_tried_again_within_its_limit_and_only_if_that_can_help() {
        let (excluding, others, passing) = failures();
        for failure in excluding.iter().chain(&others) {
            assert!(!is_retried(failure, Duration::ZERO, seconds(20)), "{failure}");
        }
        for failure in &passing {
            assert!(is_retried(failure, seconds(19), seconds(20)), "{failure}");
            let too_late = seconds(19) + Duration::from_millis(1);
            assert!(!is_retried(failure, too_late, seconds(20)), "{failure}");
        }
    }

    #[test]
    fn credentials_are_requested_again_only_from_a_service_that_was_silent_and_only_for_work() {
        let silent = || Unreachable::Silent("x".into());
        for (unreachable, purpose, next, expected) in [
            (silent(), Purpose::Work, 19, true),
            (silent(), Purpose::Work, 20, false),
            (silent(), Purpose::Explanation, 0, false),
            (Unreachable::Credentials("x".into()), Purpose::Work, 0, false),
            (Unreachable::Region, Purpose::Work, 0, false),
            (Unreachable::Attribute("x".into()), Purpose::Work, 0, false),
        ] {
            let found = is_asked_again(&unreachable, purpose, seconds(next), seconds(20));
            assert_eq!(found, expected, "{unreachable:?} {purpose:?} {next}");
        }
    }

    #[test]
    fn a_lock_that_cannot_be_reached_is_tried_again_unless_the_backend_must_change() {
        let text = || "x".to_owned();
        for (unreachable, expected) in [
            (Unreachable::Credentials(text()), Because::NoCredentials),
            (Unreachable::Silent(text()), Because::NoAnswer),
            (Unreachable::Region, Because::NoAnswer),
            (Unreachable::Profile(text()), Because::NoAnswer),
            (Unreachable::SharedFiles(text()), Because::NoAnswer),
            (Unreachable::Certificates { path: text(), reason: text() }, Because::NoAnswer),
            (Unreachable::Attribute(text()), Because::Settings),
            (Unreachable::ProfileKey("x"), Because::Settings),
            (Unreachable::Incomplete("x"), Because::Settings),
            (Unreachable::Metadata(text()), Because::Settings),
            (Unreachable::Duration(text()), Because::Settings),
        ] {
            let reason = unreachable.to_string();
            assert_eq!(unreached(&unreachable), Outcome::Kept { reason, because: expected }, "{unreachable:?}");
        }
    }
}
