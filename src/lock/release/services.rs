//! The lock's location with the clients for its services, and the time limits of their requests.

use std::time::Duration;

use tokio::time::{Instant, timeout};

use crate::aws::credentials::Purpose;
use crate::aws::failure::Failure;
use crate::aws::settings::Unreachable;
use crate::console;
use crate::lock::dynamodb::ItemKey;
use crate::lock::location::LockLocation;
use crate::lock::proof::{Run, judge};
use crate::lock::release_step::Look;
use crate::lock::stores::{StoreKey, StoredLock, Stores};
use crate::lock::{dynamodb, s3};
use crate::terraform::log::RecordedLock;
use crate::trace::trace;

/// The time between two reads of the same location, and between the first two attempts.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// The location of a lock, and clients for its services that are configured by the location's backend.
pub(super) struct Services<'a> {
    pub(super) location: &'a LockLocation,
    pub(super) stores: Stores,
    /// The location of each part of the lock, in the order in which the parts are released.
    pub(super) parts: Vec<StoreKey>,
}

impl<'a> Services<'a> {
    pub(super) async fn connect(location: &'a LockLocation, purpose: Purpose) -> Result<Self, Unreachable> {
        let stores = Stores::connect(&location.backend, purpose).await?;
        Ok(Self { location, parts: location.store_keys(&stores), stores })
    }

    /// Reads what is stored at `part` now. `None` if nothing is stored there, or if no lock can exist there.
    pub(super) async fn read(&self, part: &StoreKey) -> Result<Option<StoredLock>, Failure> {
        nothing_if_excluded(self.stores.read(part).await)
    }

    /// Reads everything that a write of the terraform with the lock `recorded` would change: the state, its digest, and
    /// the parts of the lock. Returns a [`Failure`] also if a part's location holds something that is not a lock.
    pub(super) async fn look(&self, recorded: &RecordedLock, run: &Run) -> Result<Look, Failure> {
        let state = s3::fingerprint(&self.stores.s3, &self.location.bucket, &self.location.key, false).await?;
        let digest = match &self.location.table {
            Some(table) => nothing_if_excluded(
                dynamodb::digest(&self.stores.dynamodb, ItemKey { table, path: &self.location.lock_path() }).await,
            )?,
            None => None,
        };
        let mut look = Look::of_state(format!("{state:?} {digest:?}"));
        for part in &self.parts {
            let Some(stored) = self.read(part).await? else {
                look.add_part(None);
                continue;
            };
            let Some(info) = stored.info() else {
                return Err(Failure::no_answer(part.service(), &no_lock(part, &stored)));
            };
            look.add_part(Some((stored.text(), &judge(recorded, &info, run))));
        }
        Ok(look)
    }
}

/// Returns `Ok(None)` for a failure that shows that no lock can exist at the location: for example, a table or bucket
/// that does not exist contains nothing. Returns any other result unchanged.
pub(crate) fn nothing_if_excluded<T>(read: Result<Option<T>, Failure>) -> Result<Option<T>, Failure> {
    match read {
        Err(failure) if failure.cause().excludes_locks() => {
            trace!("no lock can be there: {failure}");
            Ok(None)
        }
        read => read,
    }
}

/// Returns the reason for not releasing a lock if `stored`, which was read at `part`, is not a lock.
pub(super) fn no_lock(part: &StoreKey, stored: &StoredLock) -> String {
    format!("what is stored there is not a lock ({}): {}", part.describe(), stored.describe_no_lock())
}

/// Runs `work` with the timeout `limit`. If `work` times out, returns a [`Failure`] that names `service`.
pub(super) fn within<T>(
    limit: Duration,
    service: &'static str,
    work: impl Future<Output = Result<T, Failure>>,
) -> impl Future<Output = Result<T, Failure>> {
    let work = Box::pin(work);
    async move {
        let failed = || Failure::no_answer(service, &format!("no answer within {}", length_of_limit(limit)));
        timeout(limit, work).await.unwrap_or_else(|_| Err(failed()))
    }
}

/// Returns the text for a time limit: whole seconds, or milliseconds if it is shorter than 1 s.
fn length_of_limit(limit: Duration) -> String {
    if limit < Duration::from_secs(1) { format!("{} ms", limit.as_millis()) } else { console::length_of_time(limit) }
}

/// Returns how much of `limit` is left, counted from `begun`. The result is at least [`POLL_INTERVAL`], which is enough
/// for one read.
pub(super) fn remaining(limit: Duration, begun: Instant) -> Duration {
    limit.saturating_sub(begun.elapsed()).max(POLL_INTERVAL)
}

pub(super) fn unreachable(error: &Unreachable) -> Failure {
    match error {
        Unreachable::Silent(why) => Failure::no_answer("AWS", why),
        error => Failure::refusal("AWS", &error.to_string()),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::aws::failure::ServiceAnswer;
    use crate::lock::release::retry::tests::{failures, seconds};
    use crate::lock::release::stored::may_be_there;
    use crate::terraform::log::tests::ID;

    pub(in crate::lock::release) fn failure(code: &str) -> Failure {
        let answer = ServiceAnswer { code: Some(code), message: Some("no"), status: None };
        Failure::of_answer("DynamoDB", "dynamodb:DescribeTable", answer, "")
    }

    #[test]
    fn a_read_that_no_lock_can_answer_is_a_read_of_nothing() {
        let (excluding, others, passing) = failures();
        for failure in excluding {
            assert_eq!(nothing_if_excluded::<()>(Err(failure.clone())), Ok(None), "{failure}");
            assert!(!may_be_there(&Err(failure), ID));
        }
        for failure in others.into_iter().chain(passing) {
            assert_eq!(nothing_if_excluded::<()>(Err(failure.clone())), Err(failure.clone()));
            assert!(may_be_there(&Err(failure.clone()), ID), "what cannot be read may be there: {failure}");
        }
        assert_eq!(nothing_if_excluded(Ok(Some(7))), Ok(Some(7)));
        assert_eq!(nothing_if_excluded::<()>(Ok(None)), Ok(None));
    }

    #[test]
    fn what_is_left_of_a_limit_is_always_enough_for_one_read() {
        let begun = Instant::now();
        assert!(remaining(seconds(20), begun) > seconds(19));
        assert_eq!(remaining(Duration::ZERO, begun), Duration::from_millis(250));
    }

    #[test]
    fn a_limit_is_never_said_to_be_0_s() {
        for (milliseconds, expected) in [(250, "250 ms"), (999, "999 ms"), (1000, "1 s"), (7500, "7 s")] {
            assert_eq!(length_of_limit(Duration::from_millis(milliseconds)), expected);
        }
    }
}
