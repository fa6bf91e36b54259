//! The two services that locks stand in, as one backend reaches them; what stands there, read and deleted.

use crate::aws::settings;
use std::time::Duration;

use serde::Serialize;

use super::deleted::Deleted;
use crate::aws::connect;
use crate::aws::credentials::Purpose;
use crate::aws::failure::Failure;
use crate::lock::{dynamodb, s3};
use crate::terraform::backend::CachedBackend;
use crate::terraform::lock_info::LockInfo;

/// Where one half of a lock can stand.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub(crate) enum StoreKey {
    /// An item, by its `LockID`.
    DynamoDb {
        /// The table.
        table: String,
        /// The item's `LockID`: for a lock of terraform's, `bucket/key` of the state.
        key: String,
        /// The table's region.
        region: String,
    },
    /// An object, beside the state.
    S3 {
        /// The bucket.
        bucket: String,
        /// The key of the state with `.tflock` behind.
        key: String,
        /// The region by which it is reached.
        region: String,
    },
}

pub(crate) use crate::terraform::exchange::LOCK_FILE;

impl StoreKey {
    /// `bucket/key` of the state that a lock here belongs to.
    pub(crate) fn path(&self) -> String {
        match self {
            Self::DynamoDb { key, .. } => key.clone(),
            Self::S3 { bucket, key, .. } => format!("{bucket}/{}", key.strip_suffix(LOCK_FILE).unwrap_or(key)),
        }
    }

    /// The service's name.
    pub(crate) fn service(&self) -> &'static str {
        match self {
            Self::DynamoDb { .. } => "DynamoDB",
            Self::S3 { .. } => "S3",
        }
    }

    /// For a person: which service, and what in it.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::DynamoDb { table, key, region } => format!("DynamoDB table {table} ({region}), item {key}"),
            Self::S3 { bucket, key, region } => format!("S3 bucket {bucket} ({region}), object {key}"),
        }
    }
}

/// What was read, byte for byte: what a delete of it depends on.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum StoredLock {
    /// An item.
    Item(dynamodb::InfoAttribute),
    /// An object.
    Object(s3::Object),
}

impl StoredLock {
    /// The text in which a lock is described.
    pub(crate) fn text(&self) -> &str {
        match self {
            Self::Item(info) => info.text(),
            Self::Object(object) => &object.body,
        }
    }

    /// The lock. `None` for anything that is not one.
    pub(crate) fn info(&self) -> Option<LockInfo> {
        LockInfo::parse(self.text())
    }

    /// Whether it is a terraform state, which somebody has put into the place of a lock by mistake.
    pub(crate) fn is_state(&self) -> bool {
        let state = serde_json::from_str::<serde_json::Value>(self.text()).unwrap_or_default();
        ["lineage", "serial"].iter().all(|name| state.get(name).is_some())
    }

    /// What is in a lock's place and is no lock, in words without any of its text.
    pub(crate) fn describe_no_lock(&self) -> String {
        let text = self.text().trim_start();
        match self {
            Self::Item(dynamodb::InfoAttribute::None) => "an item without Info".to_owned(),
            Self::Item(dynamodb::InfoAttribute::Other(_)) => "an item whose Info is no text".to_owned(),
            Self::Item(_) if text.is_empty() => "an item with an empty Info".to_owned(),
            Self::Object(object) if object.body.is_empty() && object.length > 0 => {
                format!("an object of {} bytes, too large for a lock", object.length)
            }
            Self::Object(_) if text.is_empty() => "an empty object".to_owned(),
            _ if text.starts_with('<') => "a page of HTML or XML".to_owned(),
            Self::Object(object) => format!("{} bytes that are no lock", object.length),
            Self::Item(_) => format!("{} bytes that are no lock", self.text().len()),
        }
    }
}

/// What became of what was to be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Removed {
    /// It stands no more.
    Gone,
    /// Something else stands there.
    Anothers,
    /// It stands unchanged, and the service will not delete it.
    Refused,
}

/// The services, as a backend block and this environment reach them.
#[derive(Clone, Debug)]
pub(crate) struct Stores {
    pub(crate) dynamodb: aws_sdk_dynamodb::Client,
    pub(crate) s3: aws_sdk_s3::Client,
    region: String,
}

impl Stores {
    /// Resolves region and credentials. Neither service is asked yet.
    ///
    /// # Errors
    /// [`settings::Unreachable`].
    pub(crate) async fn connect(backend: &CachedBackend, purpose: Purpose) -> Result<Self, settings::Unreachable> {
        let config = connect::connect(backend, purpose).await?;
        let region = config.region().map(ToString::to_string).filter(|region| !region.is_empty());
        let region = region.ok_or(settings::Unreachable::Region)?;
        Ok(Self { dynamodb: dynamodb::client(backend, &config), s3: s3::client(backend, &config), region })
    }

    /// The region.
    pub(crate) fn region(&self) -> &str {
        &self.region
    }

    /// The place of an item.
    pub(crate) fn item(&self, table: &str, key: &str) -> StoreKey {
        StoreKey::DynamoDb { table: table.to_owned(), key: key.to_owned(), region: self.region.clone() }
    }

    /// The place of an object.
    pub(crate) fn object(&self, bucket: &str, key: &str) -> StoreKey {
        StoreKey::S3 { bucket: bucket.to_owned(), key: key.to_owned(), region: self.region.clone() }
    }

    /// What stands there now, in a consistent read.
    ///
    /// # Errors
    /// [`Failure`].
    pub(crate) async fn read(&self, store_key: &StoreKey) -> Result<Option<StoredLock>, Failure> {
        Ok(match store_key {
            StoreKey::DynamoDb { table, key, .. } => {
                dynamodb::read(&self.dynamodb, table, key).await?.map(StoredLock::Item)
            }
            StoreKey::S3 { bucket, key, .. } => s3::read(&self.s3, bucket, key).await?.map(StoredLock::Object),
        })
    }

    /// Deletes exactly what was read, or nothing.
    ///
    /// # Errors
    /// [`Failure`].
    pub(crate) async fn delete(&self, store_key: &StoreKey, stored: &StoredLock) -> Result<Deleted, Failure> {
        match (store_key, stored) {
            (StoreKey::DynamoDb { table, key, .. }, StoredLock::Item(info)) => {
                dynamodb::delete(&self.dynamodb, table, key, info).await
            }
            (StoreKey::S3 { bucket, key, .. }, StoredLock::Object(object)) => {
                s3::delete(&self.s3, bucket, key, object).await
            }
            // What was read in one service is not in the other.
            (StoreKey::DynamoDb { .. }, StoredLock::Object(_)) | (StoreKey::S3 { .. }, StoredLock::Item(_)) => {
                Ok(Deleted::Changed)
            }
        }
    }

    /// Deletes exactly what was read, and reads the place again. Only that read decides: the SDK may send a delete twice,
    /// of which the second finds nothing, and a proxy can answer "deleted" for a service that has deleted nothing.
    ///
    /// # Errors
    /// [`Failure`]; the delete may have been done all the same.
    pub(crate) async fn remove(&self, store_key: &StoreKey, stored: &StoredLock) -> Result<Removed, Failure> {
        for _ in 0..5 {
            let deleted = self.delete(store_key, stored).await?;
            let now = self.read(store_key).await?;
            match removed(deleted, stored, now.as_ref()) {
                Some(removed) => return Ok(removed),
                None if stored.info().is_some() && now.is_some_and(|now| now.info().is_none()) => {
                    return Err(Failure::no_answer(
                        store_key.service(),
                        "what its place holds after the delete is no lock",
                    ));
                }
                None => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
        Ok(Removed::Refused)
    }
}

/// What became of `read`, when `now` is in its place after a delete. `None` where that is to be looked at again.
fn removed(deleted: Deleted, read: &StoredLock, now: Option<&StoredLock>) -> Option<Removed> {
    let Some(now) = now else { return Some(Removed::Gone) };
    // Neither is an answer to where the lock is: the same object once more, or something that is no lock.
    if now == read || (now.info().is_none() && read.info().is_some()) {
        return None;
    }
    let id = |stored: &StoredLock| stored.info().map(|info| info.id);
    match deleted {
        Deleted::Yes if id(now) != id(read) => Some(Removed::Gone),
        Deleted::Yes | Deleted::Changed => Some(Removed::Anothers),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_after_a_delete_decides() {
        let text = |text: &str| StoredLock::Item(dynamodb::InfoAttribute::Text(text.to_owned()));
        let item = |id: &str| text(&format!(r#"{{"ID":"{id}"}}"#));
        let (ours, other, page) = (item("a"), item("b"), text("<html>"));
        let rewritten = text(r#"{"ID":"a","Who":"x"}"#);
        for (deleted, now, expected) in [
            (Deleted::Yes, None, Some(Removed::Gone)),
            (Deleted::Changed, None, Some(Removed::Gone)),
            (Deleted::Yes, Some(&other), Some(Removed::Gone)),
            (Deleted::Changed, Some(&other), Some(Removed::Anothers)),
            (Deleted::Yes, Some(&rewritten), Some(Removed::Anothers)),
            // The service, or a proxy in front of it, says that it has deleted it, and it has not.
            (Deleted::Yes, Some(&ours), None),
            (Deleted::Changed, Some(&ours), None),
            (Deleted::Yes, Some(&page), None),
            (Deleted::Changed, Some(&page), None),
        ] {
            assert_eq!(removed(deleted, &ours, now), expected, "{deleted:?} {now:?}");
        }
        // What was no lock in the first place is deleted by hand.
        assert_eq!(removed(Deleted::Changed, &page, Some(&other)), Some(Removed::Anothers));
    }
}
