//! Releases a lock. Each part of the lock is read, judged and deleted separately. Each delete is conditional: the part
//! must still be exactly what was read.
//!
//! The DynamoDB part is deleted first and the `.tflock` object last. Terraform acquires the parts in the reverse order,
//! so no other run can get only one of them. `tf` tries both deletes even if one of them fails.
//!
//! If the item has the record of a lease, the item is read first, but deleted last, and only if the object is gone: the
//! record permits any host to take the lock over if this release gets no further. Terraform's own unlock uses this
//! order too. Another terraform that requests the lock between the two deletes gets the object, is refused the item,
//! and deletes its object again. It would also have been refused before the release.
//!
//! A terraform that died may have left two kinds of requests in flight:
//!
//! - A *lock request* without a response can land after `tf` has read the location. So `tf` keeps searching for an
//!   absent part, for [`LATE_REQUEST_WINDOW`](context::LATE_REQUEST_WINDOW).
//! - A *write* of the state, or a delete by terraform's own unlock, is unconditional. It would overwrite the state of
//!   the next holder or delete its lock. So before its first delete, `tf` waits until everything that such a request
//!   would change has stayed unchanged for [`QuietLimits`](super::release_step::QuietLimits).
//!
//! A single response proves nothing, because a proxy or a captive portal may have sent it. A response that the service
//! cannot have sent is an error ([`dynamodb`](super::dynamodb), [`s3`](super::s3)). A lock that the run held counts as
//! absent only if two reads in a row do not find it. A delete counts as successful only if a read after the delete does
//! not find the lock.

use std::cell::Cell;

use tokio::time::{Instant, sleep, timeout};

use self::attempt::Attempt;
pub(crate) use self::context::{EXPLANATION_TIMEOUT, Effort, ReleaseContext, SERVICE_TIMEOUT};
use self::retry::{MAX_RETRY_INTERVAL, credentials, is_retried, unreached};
use self::services::POLL_INTERVAL;
use crate::aws::connect;
use crate::aws::credentials::Purpose;
use crate::aws::failure::Cause;
use crate::lock::location::LockLocation;
use crate::lock::outcome::{Because, Outcome};
use crate::settings::release_is_asked_for;
use crate::terraform::log::RecordedLock;
use crate::trace::trace;

mod attempt;
pub(crate) mod consent;
mod context;
mod quiet;
mod retry;
pub(crate) mod services;
pub(crate) mod stored;
pub(crate) mod unnamed_lock;

/// The reason if the run's own lock was not found within [`EXPLANATION_TIMEOUT`].
const SILENT: &str = "the lock service did not answer in time";

/// Releases the lock that the log recorded, if it exists and belongs to the run. Failed requests are retried for
/// `limit`. The time for requesting credentials is not included in `limit`.
///
/// With [`Purpose::Explanation`], `limit` includes everything, and a service that does not answer in time is the
/// outcome [`Because::NoAnswer`]. A long wait is not justified, because the lock most likely belongs to another run or
/// does not exist. That changes if the run's own lock is found: from then on, the limit is [`SERVICE_TIMEOUT`].
pub(crate) async fn release(
    recorded: &RecordedLock,
    location: &LockLocation,
    release_context: &ReleaseContext,
    effort: Effort,
) -> Outcome {
    let is_found = Cell::new(false);
    let mut attempts = Box::pin(attempts(recorded, location, release_context, effort, &is_found));
    if effort.purpose == Purpose::Explanation {
        let limited = timeout(effort.limit, attempts.as_mut()).await;
        match limited {
            Ok(outcome) => return outcome,
            Err(_) if !is_found.get() => {
                return Outcome::Kept { reason: SILENT.to_owned(), because: Because::NoAnswer };
            }
            Err(_) => trace!("the lock {} was found, so its release has more time", recorded.id),
        }
    }
    attempts.await
}

/// Makes the attempts of [`release`], and sets `is_found` as soon as one of them finds the run's own lock.
async fn attempts(
    recorded: &RecordedLock,
    location: &LockLocation,
    release_context: &ReleaseContext,
    Effort { limit, purpose }: Effort,
    is_found: &Cell<bool>,
) -> Outcome {
    // Request the credentials before the time limit of the release begins. They are cached for the attempts below.
    if let Err(unreachable) = credentials(location, limit, purpose).await {
        return unreached(&unreachable);
    }
    let mut attempt = Attempt {
        recorded,
        location,
        release_context,
        limit,
        is_found,
        purpose,
        renewed: false,
        begun: Instant::now(),
        found: Vec::new(),
        asked_to_go: Vec::new(),
        unconfirmed: Vec::new(),
        claim: None,
        created: None,
        deleted: false,
        has_waited: false,
        write: None,
        agreed: release_is_asked_for(),
    };
    let mut interval = POLL_INTERVAL;
    loop {
        match attempt.go().await {
            Ok(outcome) => return outcome,
            Err(failure) => {
                trace!("release of {}: {failure}", recorded.id);
                if !is_retried(&failure, attempt.begun.elapsed() + interval, attempt.limit) {
                    if let Some(released) = attempt.look_after_failure(&failure).await {
                        return Outcome::Released(released);
                    }
                    let part = if attempt.deleted { "; the other part of the lock was released" } else { "" };
                    return Outcome::failed(&failure, part);
                }
                if failure.cause() == Cause::ExpiredCredentials && !std::mem::replace(&mut attempt.renewed, true) {
                    connect::forget_credentials(&location.backend);
                }
                sleep(interval).await;
                interval = (interval * 2).min(MAX_RETRY_INTERVAL);
            }
        }
    }
}
