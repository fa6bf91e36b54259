//! The locks of one working directory's backend: of the state and of every workspace.
//!
//! Which workspaces there are is told by the bucket, as it is to terraform (backend/remote-state/s3/backend_state.go,
//! `Workspaces`). DynamoDB is asked for each by its key, with the permission that terraform itself needs; its table may be
//! shared by a thousand states, and is not scanned. So a lock in DynamoDB of a workspace that is neither selected nor has a
//! state yet is not seen here: `tf locks list --table` sees it.

use crate::console;
use std::cell::Cell;
use std::collections::BTreeSet;

use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::connection::{Directory, Trouble};
use super::found::{ListedEntry, Wanted, pair};
use super::staleness::Staleness;
use crate::holder::host::HostView;
use crate::lock::s3;
use crate::lock::stores::{LOCK_FILE, StoreKey, Stores};

/// So many requests are on their way at once.
const AT_ONCE: usize = 8;

/// This backend's own lock is in the table, and was looked at. Another's, of somebody who moves to lock files, was not.
const UNSEEN: &str = "lock objects beside the states were not looked at: s3:GetObject is missing on them";

/// What was found.
pub(super) struct Inventory {
    /// The default workspace first, then by name.
    pub(super) entries: Vec<ListedEntry>,
    /// So many states were looked at.
    pub(super) states: u64,
    /// What keeps it from being whole, in a sentence.
    pub(super) incomplete: Option<String>,
}

/// One state, and where its lock can stand.
#[derive(Clone, Debug)]
pub(super) struct ListedState {
    pub(super) workspace: String,
    pub(super) bucket: String,
    pub(super) key: String,
    pub(super) table: Option<String>,
}

impl ListedState {
    /// `bucket/key`, the lock's `Path`.
    pub(super) fn path(&self) -> String {
        format!("{}/{}", self.bucket, self.key)
    }

    /// Both places, DynamoDB first. A lock object is looked for whether or not this backend makes one: another's may.
    pub(super) fn store_keys(&self, stores: &Stores) -> Vec<StoreKey> {
        let item = self.table.as_ref().map(|table| stores.item(table, &self.path()));
        let object = stores.object(&self.bucket, &format!("{}{LOCK_FILE}", self.key));
        item.into_iter().chain([object]).collect()
    }
}

/// Every state of the backend, as far as the bucket tells. With the reason why it does not tell, if it does not.
///
/// # Errors
/// [`Trouble`]: no bucket.
pub(super) async fn states(
    directory: &Directory,
    stores: &Stores,
) -> Result<(Vec<ListedState>, Option<String>), Trouble> {
    let mut names: BTreeSet<String> = BTreeSet::from([directory.workspace.clone()]);
    let incomplete = match workspaces(directory, stores).await {
        Ok(more) => {
            names.extend(more);
            None
        }
        Err(failure) if failure.denied().is_some() => Some(format!(
            "{failure}\nthe bucket cannot be listed, so only the default workspace and the selected one were looked at: \
             s3:ListBucket is missing"
        )),
        Err(failure) => return Err(Trouble::failed(failure, &format!("bucket {}", directory.bucket), stores)),
    };
    names.remove("default");
    let names = std::iter::once("default".to_owned()).chain(names);
    Ok((names.filter_map(|workspace| state(directory, &workspace)).collect(), incomplete))
}

/// The state of `workspace`, whether or not there is one. `None` where the backend does not tell its place.
pub(super) fn state(directory: &Directory, workspace: &str) -> Option<ListedState> {
    Some(ListedState {
        key: directory.backend.state_key(workspace)?,
        bucket: directory.bucket.clone(),
        table: directory.table.clone(),
        workspace: workspace.to_owned(),
    })
}

/// The locks of those states that stand, judged.
///
/// # Errors
/// [`Trouble`].
pub(super) async fn take(directory: &Directory, stores: &Stores, staleness: &Staleness) -> Result<Inventory, Trouble> {
    let (states, incomplete) = states(directory, stores).await?;
    let looked = states.len() as u64;
    let wanted = Wanted { dynamodb: directory.table.is_some(), s3: directory.lock_file };
    let unseen = &Cell::new(false);
    let found: Vec<Vec<ListedEntry>> = stream::iter(states)
        .map(|state| async move { read(&state, wanted, stores, unseen).await })
        .buffered(AT_ONCE)
        .try_collect()
        .await?;
    let mut entries: Vec<ListedEntry> = found.into_iter().flatten().collect();
    staleness.judge(&mut entries, &HostView::look());
    if unseen.get() {
        console::say(UNSEEN);
    }
    Ok(Inventory { entries, states: looked, incomplete })
}

/// What stands at the places of one state. Not judged yet.
async fn read(
    state: &ListedState,
    wanted: Wanted,
    stores: &Stores,
    unseen: &Cell<bool>,
) -> Result<Vec<ListedEntry>, Trouble> {
    let mut parts = Vec::new();
    for store_key in state.store_keys(stores) {
        let what = match &store_key {
            StoreKey::DynamoDb { table, .. } => format!("table {table}"),
            StoreKey::S3 { bucket, .. } => format!("bucket {bucket}"),
        };
        match stores.read(&store_key).await {
            Ok(found) => parts.extend(found.map(|found| (store_key, found))),
            // Who locks with the table alone needs no permission for an object, and has none of his own there.
            Err(failure)
                if failure.denied().is_some()
                    && matches!(store_key, StoreKey::S3 { .. })
                    && !wanted.s3
                    && wanted.dynamodb =>
            {
                unseen.set(true);
            }
            Err(failure) => return Err(Trouble::failed(failure, &what, stores)),
        }
    }
    Ok(pair(wanted, parts, Some(&state.workspace)))
}

/// What the keys of all workspaces' states begin with, as terraform lists them; and what stands behind their names.
pub(super) fn around_workspaces(directory: &Directory) -> Option<(String, String)> {
    // The key of a workspace's state with its name left open.
    let marked = directory.backend.state_key("\u{0}").unwrap_or_default();
    marked.split_once('\u{0}').map(|(before, behind)| (before.to_owned(), behind.to_owned()))
}

/// The names of workspaces that the bucket tells of: by a state, or by a lock.
async fn workspaces(directory: &Directory, stores: &Stores) -> Result<Vec<String>, crate::aws::failure::Failure> {
    let Some((prefix, behind)) = around_workspaces(directory) else { return Ok(Vec::new()) };
    let mut names = Vec::new();
    let mut pages = s3::keys(&stores.s3, &directory.bucket, &prefix);
    while let Some(page) = pages.next().await {
        names.extend(page?.iter().filter_map(|key| {
            let rest = key.strip_prefix(&prefix)?;
            let name = rest.strip_suffix(LOCK_FILE).unwrap_or(rest).strip_suffix(&behind)?;
            (!name.is_empty() && !name.contains('/') && name != "default").then(|| name.to_owned())
        }));
    }
    Ok(names)
}
