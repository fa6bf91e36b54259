//! The locks of one working directory's backend, for the default workspace and every other workspace.
//!
//! The workspaces are those that a listing of the bucket shows, as for terraform
//! (backend/remote-state/s3/backend_state.go, `Workspaces`). In DynamoDB, each lock is read by its key, with the
//! permission that terraform itself needs. The table is not scanned, because a thousand states may share it. So a
//! DynamoDB lock of a workspace that is not selected and has no state yet is not found here; `tf locks list --table`
//! finds it.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};

use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::connection::{Directory, Trouble};
use super::found::{ListedEntry, Wanted, pair};
use super::staleness::Staleness;
use crate::console;
use crate::holder::host::HostView;
use crate::lock::s3;
use crate::lock::stores::{LOCK_FILE, StoreKey, Stores};
use crate::terraform::lock_info::is_lock_id;

/// The maximum number of requests in flight.
const AT_ONCE: usize = 8;

/// Printed if a backend locks only in a table and the lock objects cannot be read. This backend's own locks are in the
/// table and were read. If the backend block of another run already has `use_lockfile`, the lock object of that run was
/// not read.
pub(super) const UNSEEN: &str =
    "the .tflock objects were not checked\npermission denied: s3:GetObject on the .tflock objects";

/// No workspaces beside those that a listing shows.
pub(super) static NO_OTHERS: BTreeSet<String> = BTreeSet::new();

/// The locks of a directory's backend.
pub(super) struct Inventory {
    /// The entries found, sorted by workspace: the default workspace first, then the others by name.
    pub(super) entries: Vec<ListedEntry>,
    /// The workspaces of the states whose locks were read, by the paths of these states.
    pub(super) states: BTreeMap<String, String>,
    /// The message why the list of workspaces is incomplete; `None` if it is complete.
    pub(super) incomplete: Option<String>,
    /// Whether the lock objects were not checked ([`UNSEEN`]).
    pub(super) unseen: bool,
}

/// One state, and the locations that its lock can have.
#[derive(Clone, Debug)]
pub(super) struct ListedState {
    pub(super) workspace: String,
    pub(super) bucket: String,
    pub(super) key: String,
    pub(super) table: Option<String>,
}

impl ListedState {
    /// Returns `bucket/key`, which is the `Path` of the state's lock.
    pub(super) fn path(&self) -> String {
        format!("{}/{}", self.bucket, self.key)
    }

    /// Returns the locations of the lock's parts, DynamoDB first. The lock object is included even if this backend
    /// creates none, because a run with another backend block may create one.
    pub(super) fn store_keys(&self, stores: &Stores) -> Vec<StoreKey> {
        let item = self.table.as_ref().map(|table| stores.item(table, self.path()));
        let object = stores.object(&self.bucket, &format!("{}{LOCK_FILE}", self.key));
        item.into_iter().chain([object]).collect()
    }
}

/// Returns every state that a listing of the bucket shows, and always those of the default workspace, the selected one
/// and those in `known`. If the listing is not permitted, returns only the latter, and a message that says so. Otherwise
/// the message is `None`.
///
/// # Errors
/// Fails if the bucket cannot be listed for another reason than a missing permission.
pub(super) async fn states(
    directory: &Directory,
    stores: &Stores,
    known: &BTreeSet<String>,
) -> Result<(Vec<ListedState>, Option<String>), Trouble> {
    let mut names = known.clone();
    names.insert(directory.workspace.clone());
    let incomplete = match workspaces(directory, stores).await {
        Ok(more) => {
            names.extend(more);
            None
        }
        Err(failure) if failure.denied().is_some() => Some(format!(
            "the bucket cannot be listed, so only the default workspace and the selected one were checked\n\
             permission denied: s3:ListBucket\n{failure}"
        )),
        Err(failure) => return Err(Trouble::failed(failure, &format!("bucket {}", directory.bucket), stores)),
    };
    names.remove("default");
    let names = std::iter::once("default".to_owned()).chain(names);
    Ok((names.filter_map(|workspace| state(directory, &workspace)).collect(), incomplete))
}

/// Returns the state of `workspace`, whether or not it exists. `None` if the backend has no key.
pub(super) fn state(directory: &Directory, workspace: &str) -> Option<ListedState> {
    Some(ListedState {
        key: directory.backend.state_key(workspace)?,
        bucket: directory.bucket.clone(),
        table: directory.table.clone(),
        workspace: workspace.to_owned(),
    })
}

impl Inventory {
    /// Prints [`UNSEEN`] if the lock objects were not checked.
    pub(super) fn say_unseen(&self) {
        if self.unseen {
            console::say(UNSEEN);
        }
    }
}

/// As [`look`]. Prints [`UNSEEN`] if the lock objects were not checked.
///
/// # Errors
/// As [`look`].
pub(super) async fn take(directory: &Directory, stores: &Stores, staleness: &Staleness) -> Result<Inventory, Trouble> {
    let inventory = look(directory, stores, staleness, &NO_OTHERS).await?;
    inventory.say_unseen();
    Ok(inventory)
}

/// As [`look`]. Asks the witness about each lock whose holder is not settled.
///
/// # Errors
/// As [`look`].
pub(super) async fn look_and_ask_witness(
    directory: &Directory,
    stores: &Stores,
    staleness: Staleness,
    known: &BTreeSet<String>,
) -> Result<Inventory, Trouble> {
    let mut inventory = look(directory, stores, &staleness, known).await?;
    staleness.ask_witness(&mut inventory.entries).await;
    Ok(inventory)
}

/// Reads the locks of every state of the backend ([`states`]), and judges their holders, without a witness.
///
/// # Errors
/// Fails if the bucket cannot be listed for another reason than a missing permission, or if a lock cannot be read.
async fn look(
    directory: &Directory,
    stores: &Stores,
    staleness: &Staleness,
    known: &BTreeSet<String>,
) -> Result<Inventory, Trouble> {
    let (states, incomplete) = states(directory, stores, known).await?;
    let looked = states.iter().map(|state| (state.path(), state.workspace.clone())).collect();
    let wanted = Wanted { dynamodb: directory.table.is_some(), s3: directory.lock_file };
    let unseen = &Cell::new(false);
    let found: Vec<Vec<ListedEntry>> = stream::iter(states)
        .map(|state| async move { read(&state, wanted, stores, unseen).await })
        .buffered(AT_ONCE)
        .try_collect()
        .await?;
    let mut entries: Vec<ListedEntry> = found.into_iter().flatten().collect();
    staleness.judge(&mut entries, &HostView::look());
    Ok(Inventory { entries, states: looked, incomplete, unseen: unseen.get() })
}

/// Reads the lock of the selected workspace, and judges its holder. `None` if no entry there has the ID or the path
/// `word`. A refused run names the lock of its own workspace, and the backend may have hundreds of others.
///
/// # Errors
/// Fails if the lock cannot be read.
pub(super) async fn take_selected(
    directory: &Directory,
    stores: &Stores,
    word: &str,
) -> Result<Option<Vec<ListedEntry>>, Trouble> {
    let state = state(directory, &directory.workspace).filter(|state| is_lock_id(word) || state.path() == word);
    let Some(state) = state else { return Ok(None) };
    let wanted = Wanted { dynamodb: directory.table.is_some(), s3: directory.lock_file };
    let unseen = Cell::new(false);
    let mut entries = read(&state, wanted, stores, &unseen).await?;
    let is_meant = |entry: &ListedEntry| match entry {
        ListedEntry::Lock(lock) => lock.info.id == word || lock.path() == word,
        ListedEntry::UnreadableLock(unreadable) => unreadable.place.path() == word,
    };
    if !entries.iter().any(is_meant) {
        return Ok(None);
    }
    Staleness::default().judge(&mut entries, &HostView::look());
    if unseen.get() {
        console::say(UNSEEN);
    }
    Ok(Some(entries))
}

/// Reads the parts of one state's lock; the holder is not judged yet. Sets `unseen` if the backend locks only in a
/// table and reading the lock object is not permitted.
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
        match stores.read_part(&store_key).await {
            Ok(found) => parts.extend(found),
            Err(failure) if failure.denied().is_some() && is_dispensable(&store_key, wanted) => unseen.set(true),
            Err(failure) => return Err(Trouble::failed(failure, &what, stores)),
        }
    }
    Ok(pair(wanted, parts, Some(&state.workspace)))
}

/// Whether a lock can be listed without permission to read `store_key`. A backend that locks only in the table needs no
/// permission on lock objects and creates none.
fn is_dispensable(store_key: &StoreKey, wanted: Wanted) -> bool {
    matches!(store_key, StoreKey::S3 { .. }) && !wanted.s3 && wanted.dynamodb
}

/// Returns the text before and the text after the workspace's name in the key of a state. The first is the prefix with
/// which terraform lists the workspaces. `None` if the key does not contain the name, or if the backend has no key.
pub(super) fn around_workspaces(directory: &Directory) -> Option<(String, String)> {
    // The key of a state with a NUL character in place of the workspace's name.
    let marked = directory.backend.state_key("\u{0}").unwrap_or_default();
    marked.split_once('\u{0}').map(|(before, behind)| (before.to_owned(), behind.to_owned()))
}

/// Returns the names of the workspaces, other than `default`, that have a state or a lock object in the bucket.
async fn workspaces(directory: &Directory, stores: &Stores) -> Result<Vec<String>, crate::aws::failure::Failure> {
    let Some((prefix, behind)) = around_workspaces(directory) else { return Ok(Vec::new()) };
    let mut names = Vec::new();
    let mut pages = s3::keys(&stores.s3, &directory.bucket, &prefix);
    while let Some(page) = pages.next().await {
        names.extend(page?.iter().filter_map(|key| workspace_of_key(key, &prefix, &behind)).map(ToOwned::to_owned));
    }
    Ok(names)
}

/// Returns the workspace, other than `default`, whose state or lock object has the key `key`. `prefix` and `behind` are
/// those of [`around_workspaces`]. `None` if there is no such workspace.
fn workspace_of_key<'a>(key: &'a str, prefix: &str, behind: &str) -> Option<&'a str> {
    let rest = key.strip_prefix(prefix)?;
    let name = rest.strip_suffix(LOCK_FILE).unwrap_or(rest).strip_suffix(behind)?;
    (!name.is_empty() && !name.contains('/') && name != "default").then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terraform::backend::tests::backend;

    fn directory(config: &str) -> Directory {
        Directory {
            path: "/x".into(),
            asked_from: "/x".into(),
            own_files: "/x/.terraform".into(),
            backend: backend(config),
            bucket: "bkt".into(),
            key: "k".into(),
            table: Some("locks".into()),
            lock_file: false,
            workspace: "default".into(),
        }
    }

    #[test]
    fn a_workspace_is_found_by_its_state_or_by_its_lock() {
        for (config, key, expected) in [
            (r#"{"key":"k"}"#, "env:/green/k", Some("green")),
            (r#"{"key":"k"}"#, "env:/green/k.tflock", Some("green")),
            (r#"{"key":"k"}"#, "env:/green/other", None),
            (r#"{"key":"k"}"#, "env:/green/k.tflock.tflock", None),
            (r#"{"key":"k"}"#, "env:/a/b/k", None),
            (r#"{"key":"k"}"#, "env://k", None),
            // The default workspace has its own key; this object is nobody's state.
            (r#"{"key":"k"}"#, "env:/default/k", None),
            (r#"{"key":"k"}"#, "k", None),
            (r#"{"key":"k.tflock"}"#, "env:/green/k.tflock.tflock", Some("green")),
            (r#"{"key":"dir/k","workspace_key_prefix":"x/y"}"#, "x/y/green/dir/k", Some("green")),
            (r#"{"key":"k","workspace_key_prefix":""}"#, "green/k", Some("green")),
        ] {
            let (prefix, behind) = around_workspaces(&directory(config)).unwrap();
            assert_eq!(workspace_of_key(key, &prefix, &behind), expected, "{config} {key}");
            if let Some(workspace) = expected {
                let state = state(&directory(config), workspace).unwrap();
                assert!([state.key.clone(), format!("{}{LOCK_FILE}", state.key)].contains(&key.to_owned()));
            }
        }
        assert!(around_workspaces(&directory("{}")).is_none(), "no key");
        assert!(around_workspaces(&directory(r#"{"key":"../../k"}"#)).is_none(), "all workspaces share one key");
    }

    #[test]
    fn only_the_lock_objects_of_a_backend_without_them_may_be_unreadable() {
        let stores = Stores::offline("r");
        for (dynamodb, s3, expected) in
            [(true, false, true), (true, true, false), (false, true, false), (false, false, false)]
        {
            let wanted = Wanted { dynamodb, s3 };
            assert_eq!(is_dispensable(&stores.object("bkt", "k.tflock"), wanted), expected, "{dynamodb} {s3}");
            assert!(!is_dispensable(&stores.item("locks", "bkt/k"), wanted), "{dynamodb} {s3}");
        }
    }
}
