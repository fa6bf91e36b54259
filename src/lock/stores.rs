//! Reads and deletes the parts of a lock in DynamoDB and S3, with the connection settings of one backend.

use std::borrow::Cow;
use std::time::Duration;

use serde::Serialize;

use super::deleted::Deleted;
use crate::aws::credentials::Purpose;
use crate::aws::failure::Failure;
use crate::aws::{connect, settings};
use crate::json::{self, MemberNames};
use crate::lease::record::Claim;
use crate::lock::dynamodb::ItemKey;
use crate::lock::{dynamodb, s3};
use crate::terraform::backend::CachedBackend;
use crate::terraform::lock_info::LockInfo;

/// The location of one part of a lock: a DynamoDB item or an S3 object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub(crate) enum StoreKey {
    /// A DynamoDB item.
    DynamoDb {
        /// The table.
        table: String,
        /// The item's `LockID`. For a lock that terraform took, it is `bucket/key` of the state.
        key: String,
        /// The table's region.
        region: String,
    },
    /// An S3 object beside the state.
    S3 {
        /// The bucket.
        bucket: String,
        /// The key of the state followed by `.tflock`.
        key: String,
        /// The region through which the bucket is reached.
        region: String,
    },
}

pub(crate) use crate::terraform::exchange::LOCK_FILE;

impl StoreKey {
    /// Returns `bucket/key` of the state that a lock at this location protects.
    pub(crate) fn path(&self) -> String {
        self.path_in_place().into_owned()
    }

    /// Does the same as [`Self::path`], but makes no copy of the key of an item.
    pub(crate) fn path_in_place(&self) -> Cow<'_, str> {
        match self {
            Self::DynamoDb { key, .. } => Cow::Borrowed(key),
            Self::S3 { bucket, key, .. } => format!("{bucket}/{}", key.strip_suffix(LOCK_FILE).unwrap_or(key)).into(),
        }
    }

    /// Returns the name of the service.
    pub(crate) fn service(&self) -> &'static str {
        match self {
            Self::DynamoDb { .. } => "DynamoDB",
            Self::S3 { .. } => "S3",
        }
    }

    /// Returns the region of the table, or the region through which the bucket is reached.
    pub(crate) fn region(&self) -> &str {
        match self {
            Self::DynamoDb { region, .. } | Self::S3 { region, .. } => region,
        }
    }

    /// Describes the location for a person: the table or bucket, its region, and the item or object in it.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::DynamoDb { table, key, region } => format!("DynamoDB table {table} ({region}), item {key}"),
            Self::S3 { bucket, key, region } => format!("S3 bucket {bucket} ({region}), object {key}"),
        }
    }
}

/// The content of a lock's location, as it was read. A delete has the condition that this content is unchanged: the
/// item's `Info` attribute byte for byte, or the object's ETag.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum StoredLock {
    /// The `Info` attribute of a DynamoDB item.
    Item(dynamodb::InfoAttribute),
    /// An S3 object.
    Object(s3::Object),
}

impl StoredLock {
    /// Returns the text that should be a lock's JSON. Empty if the item has no text or the object is too large.
    pub(crate) fn text(&self) -> &str {
        match self {
            Self::Item(info) => info.text(),
            Self::Object(object) => &object.body,
        }
    }

    /// Parses the lock. `None` for anything that is not a lock.
    pub(crate) fn info(&self) -> Option<LockInfo> {
        LockInfo::parse(self.text())
    }

    /// Whether this and `other` are the same lock. Its lease record and its ETag may differ.
    pub(crate) fn is_same_lock(&self, other: &Self) -> bool {
        match (self.info(), other.info()) {
            (Some(_), Some(_)) => self.text() == other.text(),
            _ => self == other,
        }
    }

    /// Whether the content is a terraform state, which a person has put at a lock's location by mistake.
    pub(crate) fn is_state(&self) -> bool {
        let names = json::parse(self.text()).map_or_else(|_| Vec::new(), |MemberNames(names)| names);
        ["lineage", "serial"].iter().all(|wanted| names.iter().any(|name| name == wanted))
    }

    /// Describes content that is not a lock. The description contains no part of the content.
    pub(crate) fn describe_no_lock(&self) -> String {
        let text = self.text().trim_start();
        match self {
            Self::Item(dynamodb::InfoAttribute::None) => "an item without Info".to_owned(),
            Self::Item(dynamodb::InfoAttribute::Other(_)) => "an item whose Info is not text".to_owned(),
            Self::Item(_) if text.is_empty() => "an item with an empty Info".to_owned(),
            Self::Object(object) if object.body.is_empty() && object.length > 0 => {
                format!("an object of {} bytes, too large for a lock", object.length)
            }
            Self::Object(_) if text.is_empty() => "an empty object".to_owned(),
            _ if text.starts_with('<') => "an HTML or XML page".to_owned(),
            Self::Object(object) => format!("{} bytes that are not a lock", object.length),
            Self::Item(_) => format!("{} bytes that are not a lock", self.text().len()),
        }
    }
}

/// The result of [`Stores::remove`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Removed {
    /// What was read was deleted. Another lock may be stored at the location by now. With it, this claim of another
    /// host was deleted; `None` if the lock was not claimed, or if that is not known because the response was lost.
    Gone(Option<Claim>),
    /// Somebody else has deleted what was read.
    GoneBefore,
    /// The location now holds something other than what was read.
    Anothers,
    /// What was read still exists unchanged after 5 deletes: the service does not delete it.
    Refused,
}

/// Clients for the two services, configured by a backend block and by this process's environment.
#[derive(Clone, Debug)]
pub(crate) struct Stores {
    pub(crate) dynamodb: aws_sdk_dynamodb::Client,
    pub(crate) s3: aws_sdk_s3::Client,
    /// How terraform writes a lock object with this backend.
    pub(super) write_settings: s3::WriteSettings,
    /// Whether S3 is reached at another endpoint than AWS's own.
    pub(super) has_custom_s3: bool,
    region: String,
}

impl Stores {
    /// Determines the region and the credentials. Sends no request to DynamoDB or S3.
    ///
    /// # Errors
    /// Returns [`settings::Unreachable`] if the backend block or the environment has a setting that `tf` does not
    /// support, if no credentials are available, or if no region is known.
    pub(crate) async fn connect(backend: &CachedBackend, purpose: Purpose) -> Result<Self, settings::Unreachable> {
        let config = connect::connect(backend, purpose).await?;
        let region = config.region().map(ToString::to_string).filter(|region| !region.is_empty());
        let region = region.ok_or(settings::Unreachable::Region)?;
        Ok(Self {
            dynamodb: dynamodb::client(backend, &config),
            s3: s3::client(backend, &config),
            write_settings: s3::WriteSettings::of(backend),
            has_custom_s3: s3::has_custom_endpoint(backend, &config),
            region,
        })
    }

    /// Returns clients without credentials.
    #[cfg(test)]
    pub(crate) fn offline(region: &str) -> Self {
        let config = aws_config::SdkConfig::builder().behavior_version(aws_config::BehaviorVersion::latest()).build();
        Self {
            dynamodb: aws_sdk_dynamodb::Client::new(&config),
            s3: aws_sdk_s3::Client::new(&config),
            write_settings: s3::WriteSettings::default(),
            has_custom_s3: false,
            region: region.to_owned(),
        }
    }

    /// Returns the region that both clients use.
    pub(crate) fn region(&self) -> &str {
        &self.region
    }

    /// Returns the location of the item with the `LockID` `key`.
    pub(crate) fn item(&self, table: &str, key: impl Into<String>) -> StoreKey {
        StoreKey::DynamoDb { table: table.to_owned(), key: key.into(), region: self.region.clone() }
    }

    /// Returns the location of an object.
    pub(crate) fn object(&self, bucket: &str, key: &str) -> StoreKey {
        StoreKey::S3 { bucket: bucket.to_owned(), key: key.to_owned(), region: self.region.clone() }
    }

    /// Reads what is stored at `store_key` now, with a consistent read. `None` if nothing is stored there.
    ///
    /// # Errors
    /// Returns a [`Failure`] if the request fails, or if the service cannot have sent the response.
    pub(crate) async fn read(&self, store_key: &StoreKey) -> Result<Option<StoredLock>, Failure> {
        Ok(match store_key {
            StoreKey::DynamoDb { table, key, .. } => {
                dynamodb::read(&self.dynamodb, ItemKey { table, path: key }).await?.map(StoredLock::Item)
            }
            StoreKey::S3 { bucket, key, .. } => s3::read(&self.s3, bucket, key).await?.map(StoredLock::Object),
        })
    }

    /// Like [`Stores::read`]. The result also says whether what is stored is an item with a lease record.
    ///
    /// # Errors
    /// As [`Stores::read`].
    pub(crate) async fn read_with_lease(&self, store_key: &StoreKey) -> Result<Option<(StoredLock, bool)>, Failure> {
        match store_key {
            StoreKey::DynamoDb { table, key, .. } => {
                let read = dynamodb::read_info_and_lease(&self.dynamodb, ItemKey { table, path: key }).await?;
                Ok(read.map(|(info, has_lease)| (StoredLock::Item(info), has_lease)))
            }
            StoreKey::S3 { .. } => Ok(self.read(store_key).await?.map(|stored| (stored, false))),
        }
    }

    /// Deletes what is stored at `store_key`, on the condition that it is still `stored`.
    ///
    /// # Errors
    /// Returns a [`Failure`] if the request fails for a reason other than its condition.
    pub(crate) async fn delete(&self, store_key: &StoreKey, stored: &StoredLock) -> Result<Deleted, Failure> {
        match (store_key, stored) {
            (StoreKey::DynamoDb { table, key, .. }, StoredLock::Item(info)) => {
                dynamodb::delete(&self.dynamodb, ItemKey { table, path: key }, info).await
            }
            (StoreKey::S3 { bucket, key, .. }, StoredLock::Object(object)) => {
                s3::delete(&self.s3, bucket, key, object).await
            }
            // `stored` was read from one service, and `store_key` is in the other one, so `stored` cannot be there.
            (StoreKey::DynamoDb { .. }, StoredLock::Object(_)) | (StoreKey::S3 { .. }, StoredLock::Item(_)) => {
                Ok(Deleted::Changed)
            }
        }
    }

    /// Deletes what is stored at `store_key`, on the condition that it is still `stored`, and reads the location again.
    /// Only that read decides the result, for two reasons. The SDK may send a delete twice, and the second one then
    /// finds nothing. A proxy may report a delete although the service has deleted nothing. Makes up to 5 attempts.
    ///
    /// # Errors
    /// Returns a [`Failure`] if a request fails, or if the location holds something that is not a lock after the delete
    /// of a lock. The delete may have succeeded nevertheless.
    pub(crate) async fn remove(&self, store_key: &StoreKey, stored: &StoredLock) -> Result<Removed, Failure> {
        for attempt in 0..5 {
            let deleted = self.delete(store_key, stored).await?.of_attempt(attempt);
            let now = self.read(store_key).await?;
            match removed(&deleted, stored, now.as_ref()) {
                Some(removed) => return Ok(removed),
                None if stored.info().is_some() && now.is_some_and(|now| now.info().is_none()) => {
                    return Err(Failure::no_answer(
                        store_key.service(),
                        "after the delete, something that is not a lock is in the lock's place",
                    ));
                }
                None => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
        Ok(Removed::Refused)
    }
}

/// Returns the result of a delete of `read`. `now` is what its location holds after the delete. `None` if that does not
/// show the result, so that the delete must be repeated.
pub(crate) fn removed(deleted: &Deleted, read: &StoredLock, now: Option<&StoredLock>) -> Option<Removed> {
    let gone = match deleted {
        Deleted::Yes(claim) => Removed::Gone(claim.clone()),
        Deleted::Unclear => Removed::Gone(None),
        Deleted::Changed => Removed::GoneBefore,
    };
    let Some(now) = now else { return Some(gone) };
    // Two findings do not show whether the lock is gone: the same content as before, and content that is not a lock
    // although a lock was read before.
    if now == read || (now.info().is_none() && read.info().is_some()) {
        return None;
    }
    let id = |stored: &StoredLock| stored.info().map(|info| info.id);
    match deleted {
        Deleted::Yes(_) if id(now) != id(read) => Some(gone),
        Deleted::Yes(_) | Deleted::Changed | Deleted::Unclear => Some(Removed::Anothers),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_the_same_whether_or_not_it_mentions_its_lease() {
        const LOCK: &str = r#"{"ID":"a","Info":"","Who":"o@h"}"#;
        let filled = LOCK.replace(r#""Info":"""#, r#""Info":"o@h (tf lease 5m)""#);
        let item = |text: &str| StoredLock::Item(dynamodb::InfoAttribute::of_text(text));
        assert!(item(LOCK).is_same_lock(&item(&filled)));
        assert_eq!(item(&filled).text(), LOCK);
        // The condition of a delete has the text that is stored. So the lock is read again after that has changed.
        assert_eq!(removed(&Deleted::Changed, &item(LOCK), Some(&item(&filled))), Some(Removed::Anothers));
    }

    #[test]
    fn a_lock_is_the_same_with_another_record() {
        let object = |body: &str, etag: &str| {
            let (body, member) = crate::lease::record::split(body);
            let (length, etag) = (7, Some(etag.to_owned()));
            StoredLock::Object(s3::Object { body: body.into_owned(), member, length, etag })
        };
        let lock = object(r#"{"ID":"a"}"#, "1");
        for (other, is_same) in [
            (object(r#"{"ID":"a","tf":{}}"#, "2"), true),
            (object(r#"{"ID":"a","tf":7}"#, "2"), false),
            (object(r#"{"ID":"b","tf":{}}"#, "1"), false),
            (object("<html>", "1"), false),
        ] {
            assert_eq!(lock.is_same_lock(&other), is_same, "{other:?}");
        }
        assert!(!object("<html>", "1").is_same_lock(&object("<html>", "2")));
        // After a renewal between the read and the delete, the lock is read and judged again.
        let renewed = object(r#"{"ID":"a","tf":{}}"#, "2");
        assert_eq!(removed(&Deleted::Changed, &lock, Some(&renewed)), Some(Removed::Anothers));
    }

    #[test]
    fn what_is_read_after_a_delete_decides() {
        let text = |text: &str| StoredLock::Item(dynamodb::InfoAttribute::Text(text.to_owned()));
        let item = |id: &str| text(&format!(r#"{{"ID":"{id}"}}"#));
        let (ours, other, page) = (item("a"), item("b"), text("<html>"));
        let rewritten = text(r#"{"ID":"a","Who":"x"}"#);
        let claim = Claim { by: "o@h".into(), at: 20, number: 7 };
        let (yes, claimed) = (Deleted::Yes(None), Deleted::Yes(Some(claim.clone())));
        let (changed, unclear) = (Deleted::Changed, Deleted::Unclear);
        let gone = Removed::Gone(None);
        for (deleted, now, expected) in [
            (&yes, None, Some(&gone)),
            (&claimed, None, Some(&Removed::Gone(Some(claim)))),
            (&unclear, None, Some(&gone)),
            (&changed, None, Some(&Removed::GoneBefore)),
            (&yes, Some(&other), Some(&gone)),
            (&changed, Some(&other), Some(&Removed::Anothers)),
            (&unclear, Some(&other), Some(&Removed::Anothers)),
            (&yes, Some(&rewritten), Some(&Removed::Anothers)),
            // The service, or a proxy in front of it, reports a delete that did not happen.
            (&yes, Some(&ours), None),
            (&changed, Some(&ours), None),
            (&unclear, Some(&ours), None),
            (&yes, Some(&page), None),
            (&changed, Some(&page), None),
            (&unclear, Some(&page), None),
        ] {
            assert_eq!(removed(deleted, &ours, now).as_ref(), expected, "{deleted:?} {now:?}");
        }
        // This case happens only if a person requests the delete of content that is not a lock.
        assert_eq!(removed(&Deleted::Changed, &page, Some(&other)), Some(Removed::Anothers));
    }
}
