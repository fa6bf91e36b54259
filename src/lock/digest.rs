//! The digest of a state: its MD5, which terraform writes into an item beside the lock, after the state itself
//! (backend/remote-state/s3/client.go, `putMD5`). Killed in between, it leaves one that does not fit, and every later
//! command fails with a checksum error until somebody mends it.

use std::fmt::Write as _;

use jiff::Timestamp;
use md5::{Digest as _, Md5};

use super::stores::Stores;
use super::{dynamodb, s3};
use crate::aws::failure::Failure;

/// A state, and what is recorded of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Comparison {
    /// The digest in the table; none where nothing was recorded, and then terraform checks nothing.
    pub(crate) recorded: Option<String>,
    /// That of the state as it is; none where there is no state.
    pub(crate) computed: Option<String>,
    /// When the state was written.
    pub(crate) written: Option<Timestamp>,
}

impl Comparison {
    /// Whether terraform would be content.
    pub(crate) fn fits(&self) -> bool {
        // A digest without a state fails as well: terraform takes the state's for none.
        self.recorded.is_none() || self.recorded == self.computed
    }
}

/// Compares the state `bucket`/`key` with its digest in `table`. While somebody writes them they may not fit: it is for
/// the caller to hold the lock, or to look twice.
///
/// # Errors
/// [`Failure`].
pub(crate) async fn compare(stores: &Stores, bucket: &str, key: &str, table: &str) -> Result<Comparison, Failure> {
    let path = format!("{bucket}/{key}");
    let mut hash = Md5::new();
    // At the same time: a slow service is waited for once.
    let (recorded, written) = tokio::join!(
        dynamodb::digest(&stores.dynamodb, table, &path),
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
