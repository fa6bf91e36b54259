//! The two services that locks stand in, as one backend reaches them; what stands there, read and deleted.

use std::time::Duration;

use serde::Serialize;

use super::release::{Deleted, Failure};
use super::{aws, dynamodb, s3};
use crate::terraform::backend::CachedBackend;
use crate::terraform::lock_info::LockInfo;

/// Where one half of a lock can stand.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub(crate) enum Spot {
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

impl Spot {
    /// `bucket/key` of the state that a lock here belongs to.
    pub(crate) fn path(&self) -> String {
        match self {
            Self::DynamoDb { key, .. } => key.clone(),
            Self::S3 { bucket, key, .. } => format!("{bucket}/{}", key.strip_suffix(LOCK_FILE).unwrap_or(key)),
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// The `Info` of an item; empty where it has none.
    Item(String),
    /// An object.
    Object(s3::Object),
}

impl Standing {
    /// The text in which a lock is described.
    pub(crate) fn text(&self) -> &str {
        match self {
            Self::Item(info) => info,
            Self::Object(object) => &object.body,
        }
    }

    /// The lock. `None` for anything that is not one.
    pub(crate) fn info(&self) -> Option<LockInfo> {
        LockInfo::parse(self.text())
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
    /// Resolves region and credentials, and asks nobody yet.
    ///
    /// # Errors
    /// [`aws::Unreachable`].
    pub(crate) async fn connect(backend: &CachedBackend) -> Result<Self, aws::Unreachable> {
        let config = aws::connect(backend).await?;
        Ok(Self {
            dynamodb: dynamodb::client(backend, &config),
            s3: s3::client(backend, &config),
            region: config.region().map(ToString::to_string).unwrap_or_default(),
        })
    }

    /// The region; empty where none is known.
    pub(crate) fn region(&self) -> &str {
        &self.region
    }

    /// The place of an item.
    pub(crate) fn item(&self, table: &str, key: &str) -> Spot {
        Spot::DynamoDb { table: table.to_owned(), key: key.to_owned(), region: self.region.clone() }
    }

    /// The place of an object.
    pub(crate) fn object(&self, bucket: &str, key: &str) -> Spot {
        Spot::S3 { bucket: bucket.to_owned(), key: key.to_owned(), region: self.region.clone() }
    }

    /// What stands there now, in a consistent read.
    ///
    /// # Errors
    /// [`Failure`].
    pub(crate) async fn read(&self, spot: &Spot) -> Result<Option<Standing>, Failure> {
        Ok(match spot {
            Spot::DynamoDb { table, key, .. } => dynamodb::read(&self.dynamodb, table, key).await?.map(Standing::Item),
            Spot::S3 { bucket, key, .. } => s3::read(&self.s3, bucket, key).await?.map(Standing::Object),
        })
    }

    /// Deletes exactly what was read, or nothing.
    ///
    /// # Errors
    /// [`Failure`].
    pub(crate) async fn delete(&self, spot: &Spot, standing: &Standing) -> Result<Deleted, Failure> {
        match (spot, standing) {
            (Spot::DynamoDb { table, key, .. }, Standing::Item(info)) => {
                dynamodb::delete(&self.dynamodb, table, key, info).await
            }
            (Spot::S3 { bucket, key, .. }, Standing::Object(object)) => s3::delete(&self.s3, bucket, key, object).await,
            // What was read in one service is not in the other.
            (Spot::DynamoDb { .. }, Standing::Object(_)) | (Spot::S3 { .. }, Standing::Item(_)) => Ok(Deleted::Changed),
        }
    }

    /// Deletes exactly what was read, and looks what became of it. The SDK may send a delete twice, and then the second
    /// finds nothing: so what stands decides, not the answer.
    ///
    /// # Errors
    /// [`Failure`].
    pub(crate) async fn remove(&self, spot: &Spot, standing: &Standing) -> Result<Removed, Failure> {
        for _ in 0..5 {
            if self.delete(spot, standing).await? == Deleted::Yes {
                return Ok(Removed::Gone);
            }
            match self.read(spot).await? {
                None => return Ok(Removed::Gone),
                Some(now) if now == *standing => tokio::time::sleep(Duration::from_millis(50)).await,
                Some(_) => return Ok(Removed::Anothers),
            }
        }
        Ok(Removed::Refused)
    }
}
