//! The digest of a state: its MD5, which terraform writes into another item of the lock's table after it has written
//! the state itself (backend/remote-state/s3/client.go, `putMD5`). If terraform is killed between the two writes, the
//! digest does not match the state, and every later terraform command fails with a checksum error until a person
//! corrects the digest.

use std::fmt::Write as _;

use jiff::Timestamp;
use md5::{Digest as _, Md5};

use super::stores::Stores;
use super::{dynamodb, s3};
use crate::aws::failure::Failure;
use crate::lock::dynamodb::ItemKey;
use crate::lock::s3::ObjectKey;

/// The recorded digest of a state, and the digest computed from the state itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Comparison {
    /// The digest in the table. `None` if the table has no digest or an empty one. Terraform then checks nothing.
    pub(crate) recorded: Option<String>,
    /// The MD5 of the state as it is now, in hexadecimal. `None` if there is no state.
    pub(crate) computed: Option<String>,
    /// When the state was written. `None` if there is no state, or if the service does not report the time.
    pub(crate) written: Option<Timestamp>,
}

impl Comparison {
    /// Whether terraform would accept the state with the recorded digest.
    pub(crate) fn fits(&self) -> bool {
        // A recorded digest without a state does not match either: terraform treats the digest of a missing state as
        // empty.
        self.recorded.is_none() || self.recorded == self.computed
    }
}

/// Compares `state` with its digest in `table`. The two may differ while a terraform is writing them, so the caller must
/// hold the lock or compare twice.
///
/// # Errors
/// Returns a [`Failure`] if the digest or the state cannot be read.
pub(crate) async fn compare(stores: &Stores, state: ObjectKey<'_>, table: &str) -> Result<Comparison, Failure> {
    let ObjectKey { bucket, key } = state;
    let path = format!("{bucket}/{key}");
    let mut hash = Md5::new();
    // Both are read concurrently, so that a slow service delays the comparison only once.
    let (recorded, written) = tokio::join!(
        dynamodb::digest(&stores.dynamodb, ItemKey { table, path: &path }),
        s3::stream(&stores.s3, bucket, key, |bytes| hash.update(bytes))
    );
    let (recorded, written) = (recorded?.filter(|digest| !digest.is_empty()), written?);
    let computed = written.is_some().then(|| {
        hash.finalize().iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
    });
    Ok(Comparison { recorded, computed, written: written.flatten() })
}
