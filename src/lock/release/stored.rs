//! Reads what is stored at a lock's location, without changing it.

use tokio::time::{sleep, timeout};

use super::context::EXPLANATION_TIMEOUT;
use super::retry::credentials;
use super::services::{POLL_INTERVAL, Services};
use crate::aws::connect;
use crate::aws::credentials::Purpose;
use crate::aws::failure::{Cause, Failure};
use crate::aws::settings::Unreachable;
use crate::lock::digest;
use crate::lock::digest::Comparison;
use crate::lock::leased::StoredPart;
use crate::lock::location::LockLocation;
use crate::lock::s3::ObjectKey;
use crate::lock::stores::StoredLock;

/// Returns what is stored now at `location`, with one entry for each part of a lock. If there are two entries, they may
/// belong to the locks of two different runs. A part that cannot be read is left out. Empty if the reads take longer
/// than [`EXPLANATION_TIMEOUT`].
pub(crate) async fn stored(location: &LockLocation) -> Vec<StoredPart> {
    read_stored(location).await.unwrap_or_default()
}

/// Why a location could not be read.
#[derive(Clone, Debug)]
pub(crate) enum Unread {
    /// The services could not be reached with the settings of the backend. In most cases there are no credentials.
    Unreachable(Unreachable),
    /// A request has failed, or took too long.
    Failed(Failure),
}

/// As [`stored`].
///
/// # Errors
/// [`Unread`] if no part could be read, or if the reads take longer than [`EXPLANATION_TIMEOUT`].
pub(crate) async fn read_stored(location: &LockLocation) -> Result<Vec<StoredPart>, Unread> {
    let look = async {
        let services = Services::connect(location, Purpose::Explanation).await.map_err(Unread::Unreachable)?;
        let reads = services.parts.iter().map(|part| services.stores.read_part(part));
        let (mut parts, mut failed) = (Vec::new(), None);
        for read in futures_util::future::join_all(reads).await {
            match read {
                Ok(part) => parts.extend(part),
                Err(failure) => failed = Some(failure),
            }
        }
        match failed {
            Some(failure) if parts.is_empty() => {
                if failure.cause() == Cause::ExpiredCredentials {
                    connect::forget_credentials(&location.backend);
                }
                Err(Unread::Failed(failure))
            }
            _ => Ok(parts),
        }
    };
    let timed_out = || Unread::Failed(Failure::no_answer("AWS", "the request timed out"));
    timeout(EXPLANATION_TIMEOUT, look).await.unwrap_or_else(|_| Err(timed_out()))
}

/// Compares the state at `location` with its digest once. Returns the comparison if they do not match. `None` if they
/// match, or cannot be read within [`EXPLANATION_TIMEOUT`]. The two also differ for a moment while a run writes them.
/// So the caller must have seen a mismatch before, and must have waited since then.
pub(crate) async fn state_mismatch(location: &LockLocation) -> Option<Comparison> {
    let table = location.table.as_ref()?;
    let look = async {
        let services = Services::connect(location, Purpose::Explanation).await.ok()?;
        digest::compare(&services.stores, ObjectKey { bucket: &location.bucket, key: &location.key }, table).await.ok()
    };
    timeout(EXPLANATION_TIMEOUT, look).await.ok()?.filter(|compared| !compared.fits())
}

/// Whether the lock `id` exists or may exist at `location`. It may exist if the location cannot be read within
/// [`EXPLANATION_TIMEOUT`], or if something that is not a lock is stored there. False only if two reads in a row do not
/// find the lock, because one response proves nothing.
pub(crate) async fn may_exist(location: &LockLocation, id: &str) -> bool {
    let _ = credentials(location, EXPLANATION_TIMEOUT, Purpose::Work).await;
    if may_exist_once(location, id).await {
        return true;
    }
    sleep(POLL_INTERVAL).await;
    may_exist_once(location, id).await
}

/// Reads the lock's location once. Returns true if the lock `id`, or something that is not a lock, is there, or if a
/// read failed or timed out.
async fn may_exist_once(location: &LockLocation, id: &str) -> bool {
    let look = async {
        let Ok(services) = Services::connect(location, Purpose::Work).await else { return true };
        for part in &services.parts {
            if may_be_there(&services.stores.read(part).await, id) {
                return true;
            }
        }
        false
    };
    timeout(EXPLANATION_TIMEOUT, look).await.unwrap_or(true)
}

/// Whether a part of the lock `id` is or may be at a location. `read` is the result of a read of that location.
pub(super) fn may_be_there(read: &Result<Option<StoredLock>, Failure>, id: &str) -> bool {
    match read {
        Ok(stored) => stored.as_ref().is_some_and(|stored| stored.info().is_none_or(|info| info.id == id)),
        Err(failure) => !failure.cause().excludes_locks(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock::dynamodb::InfoAttribute;
    use crate::terraform::log::tests::ID;

    #[test]
    fn a_lock_may_exist_where_its_id_or_something_that_is_no_lock_is_stored() {
        let stored = |text: &str| Ok(Some(StoredLock::Item(InfoAttribute::Text(text.to_owned()))));
        let with_id = |id: &str| stored(&format!(r#"{{"ID":"{id}"}}"#));
        assert!(may_be_there(&with_id(ID), ID));
        assert!(!may_be_there(&with_id("6e75cb05-d70c-4132-39e0-d2abba1b3077"), ID));
        assert!(may_be_there(&stored("<html>"), ID));
        assert!(may_be_there(&Ok(Some(StoredLock::Item(InfoAttribute::None))), ID));
        assert!(!may_be_there(&Ok(None), ID));
    }
}
