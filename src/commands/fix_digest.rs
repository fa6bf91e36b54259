//! `tf locks doctor --fix-digest`: makes the recorded digest of a state match the state, as terraform's next write
//! would. If there is no state, it deletes the digest: the digest of a deleted state keeps terraform from starting with
//! an empty state.
//!
//! Everything happens under the state's lock, which is acquired as terraform acquires it: first the S3 object, then the
//! DynamoDB item, each only if nothing exists there. Under that lock, the state and its digest are compared once more
//! with what the user agreed to. The digest is written on condition that it is still the one that was shown.
//!
//! The lock is recorded in the journal before it is requested, and once more when it is held. So if this process is
//! killed, `tf locks recover` or the next `tf` releases the lock. A lock request without an answer may be carried out
//! after this process has exited. Such a request is stored as a [`PendingRequest`], like a request of a dead terraform.

use std::io::IsTerminal;
use std::os::fd::OwnedFd;
use std::time::Duration;

use jiff::Timestamp;
use nix::sys::signal::Signal;
use serde_json::json;

use super::connection::{Connection, Directory, LocationArgs, ScanTarget, Trouble};
use super::inventory::{self, ListedState};
use super::{Finding, agreement};
use crate::aws::credentials::Purpose;
use crate::aws::failure::Failure;
use crate::aws::redacted_backend;
use crate::console;
use crate::console::{length_of_time, option, visible, visible_whole};
use crate::journal::pending_requests::{PendingRequest, PendingRequests};
use crate::journal::runs::{Journal, JournalEntry, JournalRecord};
use crate::journal::state_directory::{Durability, StateDirectory};
use crate::lock::digest::{self, Comparison};
use crate::lock::dynamodb::ItemKey;
use crate::lock::s3::ObjectKey;
use crate::lock::stores::{Removed, StoreKey, StoredLock, Stores};
use crate::lock::{dynamodb, s3};
use crate::sys::disposition;
use crate::terraform::lock_info::{self, LockInfo};
use crate::terraform::log::{LockParts, LoggedLock, RecordedLock};

/// The `Operation` of the lock.
const OPERATION: &str = "tf locks doctor --fix-digest";

/// Whether the digest may be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// `--dry-run`: only print what would be changed.
    None,
    /// Ask the user first.
    IfAgreed,
    /// `--yes`: change it without asking.
    Unasked,
}

/// Whether the user agrees to the change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Consent {
    /// Nothing is changed; the change is only printed.
    OnlyPrint,
    /// The user must be asked, and cannot be.
    CannotAsk,
    /// The user must be asked.
    Ask,
    /// The user has agreed with an option.
    Given,
}

/// Returns whether the user agrees to `change`. `is_terminal` is whether stdin is a terminal.
fn consent(change: Change, is_terminal: bool) -> Consent {
    match change {
        Change::None => Consent::OnlyPrint,
        Change::IfAgreed if is_terminal => Consent::Ask,
        Change::IfAgreed => Consent::CannotAsk,
        Change::Unasked => Consent::Given,
    }
}

/// Fixes the digest of `workspace`, or of the selected workspace if `workspace` is `None`.
///
/// # Errors
/// Fails if the directory's backend has no DynamoDB table, if there is no such workspace, if the user cannot be asked
/// because stdin is not a terminal, if the state is locked, if the state or the digest changes in between, or if a
/// request fails.
pub(super) fn run(place: &LocationArgs, workspace: Option<&str>, change: Change) -> Result<Finding, Trouble> {
    let mut agreed = None;
    let finding = super::block_on(async {
        let (directory, stores, state) = find(place, workspace).await?;
        let compared = compare(&stores, &state).await?;
        let name = visible(&state.path());
        if compared.fits() {
            console::print(&format!("the digest of {name} matches its state, so there is nothing to fix"));
            return Ok(Finding::Nothing);
        }
        let now = Timestamp::now();
        let written = compared.written.map_or_else(String::new, |at| {
            format!(", written at {at:.0} ({} ago)", length_of_time(now.duration_since(at).unsigned_abs()))
        });
        let has = compared.computed.as_deref().unwrap_or(
            "none, because there is no state\nif this workspace had resources, restore its state first (the bucket may have old versions)",
        );
        console::print(&format!(
            "state              {name}{written}\nrecorded digest    {}\ndigest of the state {has}",
            visible(compared.recorded.as_deref().unwrap_or("none"))
        ));
        let (what, question) = match compared.computed {
            Some(_) => ("record the digest of the state", "Record the digest of the state?"),
            None => ("delete the digest", "Delete the digest, so that terraform starts with an empty state?"),
        };
        match consent(change, std::io::stdin().is_terminal()) {
            Consent::OnlyPrint => {
                console::print(&format!("would {what}"));
                return Ok(Finding::Stale);
            }
            Consent::CannotAsk => {
                return Err(Trouble::Said(format!(
                    "nothing was changed: stdin is not a terminal, so tf cannot ask\nto {what}, add --yes"
                )));
            }
            Consent::Ask if !agreement::is_given(question) => {
                console::say("nothing was changed");
                return Ok(Finding::Failed);
            }
            Consent::Ask | Consent::Given => {}
        }
        agreed = Some((directory, state, compared));
        Ok(Finding::Failed)
    })?;
    let Some((directory, state, compared)) = agreed else { return Ok(finding) };
    // From here on, this process holds a lock, for about as long as it takes to read the state. It ignores requests to
    // stop for that short time. If a signal that cannot be ignored kills this process, the lock is recorded in the
    // journal.
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGTSTP] {
        disposition::set_ignored(signal);
    }
    let mut work = Work::new(place, &directory, state, compared);
    super::block_on(async {
        let stores = Stores::connect(&directory.backend, Purpose::Work).await?;
        work.under_lock(&stores).await
    })
}

async fn find(place: &LocationArgs, workspace: Option<&str>) -> Result<(Directory, Stores, ListedState), Trouble> {
    let Connection { target: ScanTarget::Directory(directory), stores } = place.reach().await? else {
        return Err(Trouble::Said("a digest can be fixed only from the directory of its state".into()));
    };
    if directory.table.is_none() {
        return Err(Trouble::Said("this backend has no DynamoDB table, so there is no digest to fix".into()));
    }
    let wanted = workspace.unwrap_or(&directory.workspace);
    let (states, _) = inventory::states(&directory, &stores, &inventory::NO_OTHERS).await?;
    let found = match states.iter().find(|state| state.workspace == wanted) {
        Some(state) => Some(state.clone()),
        None => without_state(&directory, &stores, wanted).await?,
    };
    let state = found.ok_or_else(|| {
        let names: Vec<String> = states.iter().map(|state| visible(&state.workspace)).collect();
        Trouble::Said(format!("there is no workspace \"{}\"; the workspaces are {}", visible(wanted), names.join(", ")))
    })?;
    Ok((directory, stores, state))
}

/// Returns the workspace `name`, which has no state, if a digest is recorded for it. Returns `None` if no digest is
/// recorded either, or if the backend has no key.
async fn without_state(directory: &Directory, stores: &Stores, name: &str) -> Result<Option<ListedState>, Trouble> {
    let Some(state) = inventory::state(directory, name) else { return Ok(None) };
    let compared = compare(stores, &state).await?;
    Ok(compared.recorded.is_some().then_some(state))
}

async fn compare(stores: &Stores, state: &ListedState) -> Result<Comparison, Trouble> {
    let table = state.table.as_deref().unwrap_or_default();
    let compared = digest::compare(stores, ObjectKey { bucket: &state.bucket, key: &state.key }, table).await;
    compared.map_err(|failure| Trouble::failed(failure, &visible(&state.path()), stores))
}

/// The fix of one digest, and the lock that is held during the fix.
struct Work<'a> {
    /// The options that selected the directory, for commands that a person types.
    place: &'a LocationArgs,
    directory: &'a Directory,
    state: ListedState,
    /// The comparison that was shown to the user before the change.
    shown: Comparison,
    info: LockInfo,
    /// The lock's text as it is stored: `info` in JSON.
    text: String,
    /// `None` if there is no journal. In that case, no later `tf` releases the lock if a signal that cannot be ignored
    /// kills this process.
    journaled: Option<Journaled>,
}

/// This run's part of the journal.
struct Journaled {
    entry: JournalEntry,
    record: JournalRecord,
    pending: PendingRequests,
    /// The tree lock of this run. It is held until this process exits, so that other `tf` processes see in the journal
    /// that this run is alive.
    _tree_lock: OwnedFd,
}

impl<'a> Work<'a> {
    fn new(place: &'a LocationArgs, directory: &'a Directory, state: ListedState, shown: Comparison) -> Self {
        let begun = Timestamp::now();
        let info = LockInfo {
            id: lock_info::new_id(),
            operation: OPERATION.into(),
            who: lock_info::who(),
            version: env!("CARGO_PKG_VERSION").into(),
            created: begun.to_string(),
            path: state.path(),
        };
        let text = json!({
            "ID": info.id, "Operation": info.operation, "Info": "", "Who": info.who, "Version": info.version,
            "Created": info.created, "Path": info.path,
        })
        .to_string();
        let parts = LockParts { s3: directory.lock_file, dynamodb: true };
        let lock = RecordedLock::asked_for(&info, &state.bucket, &state.key, parts, begun);
        let journaled = journal(directory, &state, lock, begun);
        Self { place, directory, state, shown, info, text, journaled }
    }

    async fn under_lock(&mut self, stores: &Stores) -> Result<Finding, Trouble> {
        let mut taken = Vec::new();
        let locked = self.lock(stores, &mut taken).await;
        if matches!(locked, Ok(true)) {
            self.has_locked();
        } else {
            self.remember_request();
        }
        let done = match locked {
            Ok(true) => self.write(stores).await,
            Ok(false) => Err(self.refused(stores, &taken).await),
            Err(failure) => Err(Trouble::failed(failure, &visible(&self.state.path()), stores)),
        };
        // Unlock in any case: a request whose answer was lost may have stored a part of the lock.
        let gone = self.unlock(stores).await;
        match (&self.journaled, gone) {
            // If the record stays, a recovery finds that the lock is gone.
            (Some(journaled), Ok(())) => drop(journaled.entry.take_away()),
            (_, Ok(())) => {}
            (kept, Err(why)) => {
                let command = release_command(self.place, kept.is_some(), &self.info.id);
                let why = if why.is_empty() { "the service does not delete it".to_owned() } else { visible(&why) };
                console::say(&format!(
                    "the lock {} was not released\n{why}\nto release it, type: {command}",
                    self.info.id
                ));
                return done.map(|_| Finding::Failed);
            }
        }
        done
    }

    /// Records in the journal that this run holds the lock. If the write fails, the record still says that the lock was
    /// requested, and recovery looks for the lock anyway.
    fn has_locked(&mut self) {
        let Some(Journaled { entry, record, .. }) = &mut self.journaled else { return };
        record.log.grant_all(Timestamp::now());
        let _ = entry.write(record, Durability::PowerLoss);
    }

    /// Remembers a lock request that had no answer or was refused, because a copy of the request may still be carried
    /// out. A refusal does not rule that out: if the SDK sent the request twice, the first copy may have stored the
    /// lock, so that the second copy was refused.
    fn remember_request(&self) {
        let Some(Journaled { record, pending, .. }) = &self.journaled else { return };
        let run = record.proof();
        for lock in record.log.named() {
            let _ = pending.put(&PendingRequest::new(lock, &run));
        }
    }

    /// Returns the locations of the lock's parts in the order in which terraform acquires them, the S3 object first.
    /// Without `use_lockfile`, there is no object.
    fn store_keys(&self, stores: &Stores) -> Vec<StoreKey> {
        in_order_of_lock(self.state.store_keys(stores), self.directory.lock_file)
    }

    /// Acquires the parts of the lock one after the other, and adds each to `taken`. Returns true if this run holds
    /// every part. Returns false at the first part that another lock holds.
    async fn lock(&self, stores: &Stores, taken: &mut Vec<StoreKey>) -> Result<bool, Failure> {
        for store_key in self.store_keys(stores) {
            let took = match &store_key {
                StoreKey::S3 { bucket, key, .. } => {
                    s3::put_if_absent(&stores.s3, &self.directory.backend, ObjectKey { bucket, key }, &self.text)
                        .await?
                }
                StoreKey::DynamoDb { table, key, .. } => {
                    dynamodb::put_if_absent(&stores.dynamodb, ItemKey { table, path: key }, &self.text).await?
                }
            };
            // If the stored text is this run's own, the first attempt of the request succeeded, its answer was lost,
            // and the SDK sent it again.
            if !took && !is_stored(stores.read(&store_key).await?.as_ref(), &self.text) {
                return Ok(false);
            }
            taken.push(store_key);
        }
        Ok(true)
    }

    /// Builds the error that names the holder of the lock in the way. `taken` are the parts that this run acquired.
    async fn refused(&self, stores: &Stores, taken: &[StoreKey]) -> Trouble {
        let mut holder = "an unknown holder".to_owned();
        for store_key in self.store_keys(stores).into_iter().filter(|store_key| !taken.contains(store_key)) {
            if let Ok(Some(stored)) = stores.read(&store_key).await
                && let Some(info) = stored.info()
            {
                holder = format!("{}, ID {}", visible(&info.who), visible(&info.id));
            }
        }
        Trouble::Said(format!(
            "nothing was changed: the state is locked by {holder}\nto see whether it is still locked, type: {}",
            self.place.command("list")
        ))
    }

    async fn write(&self, stores: &Stores) -> Result<Finding, Trouble> {
        let now = compare(stores, &self.state).await?;
        match check(&now, &self.shown) {
            Check::Fits => {
                console::print("the digest matches now: it was fixed in the meantime, or a run was just writing it");
                return Ok(Finding::Nothing);
            }
            Check::Changed => {
                return Err(Trouble::Said(format!(
                    "nothing was changed, because the digest or the state changed in the meantime\nthe recorded digest \
                     is now {}, and the digest of the state is {}\nto try again, type: {}",
                    visible(now.recorded.as_deref().unwrap_or("none")),
                    now.computed.as_deref().unwrap_or("none"),
                    fix_command(self.place, &self.state.workspace)
                )));
            }
            Check::AsShown => {}
        }
        let table = self.state.table.as_deref().unwrap_or_default();
        let failed = |failure| Trouble::failed(failure, &visible(&self.state.path()), stores);
        let (client, path) = (&stores.dynamodb, self.state.path());
        let item = ItemKey { table, path: &path };
        let old = now.recorded.as_deref().unwrap_or_default();
        let done = match &now.computed {
            Some(new) => dynamodb::replace_digest(client, item, old, new).await,
            None => dynamodb::delete_digest(client, item, old).await,
        };
        if !done.map_err(failed)? {
            // The SDK may have sent the request twice, so that the second attempt was refused because of the first.
            let now = compare(stores, &self.state).await?;
            if !now.fits() {
                return Err(Trouble::Said("nothing was changed: the digest changed in the meantime".into()));
            }
        }
        console::print(&match now.computed {
            Some(new) => format!("recorded the digest {new}"),
            None => "deleted the digest".to_owned(),
        });
        Ok(Finding::Nothing)
    }

    /// Releases every part of this run's lock, the DynamoDB item first. It tries 5 times, with pauses of 200 ms, until
    /// no part exists any more.
    ///
    /// # Errors
    /// Fails with the last failure if a part may still exist after that. The text is empty if the service answered but
    /// did not delete.
    async fn unlock(&self, stores: &Stores) -> Result<(), String> {
        let mut why = String::new();
        for _ in 0..5 {
            let mut left = false;
            for store_key in self.store_keys(stores).into_iter().rev() {
                match self.unlock_half(stores, &store_key).await {
                    Ok(gone) => left |= !gone,
                    Err(failure) => {
                        left = true;
                        why = failure.to_string();
                    }
                }
            }
            if !left {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        Err(why)
    }

    /// Releases one part. Returns true if this run's lock no longer exists there, and false if the service does not
    /// delete it.
    async fn unlock_half(&self, stores: &Stores, store_key: &StoreKey) -> Result<bool, Failure> {
        match stores.read(store_key).await? {
            Some(found) if is_stored(Some(&found), &self.text) => {
                Ok(stores.remove(store_key, &found).await? != Removed::Refused)
            }
            _ => Ok(true),
        }
    }
}

/// Returns the command that releases the lock `id` of this process. `is_recorded` is whether the lock is in the journal:
/// if so, a recovery releases it, and needs no directory.
fn release_command(place: &LocationArgs, is_recorded: bool, id: &str) -> String {
    if is_recorded { "tf locks recover".to_owned() } else { place.command(&format!("release --force {id}")) }
}

/// Returns the command that fixes the digest of `workspace`.
fn fix_command(place: &LocationArgs, workspace: &str) -> String {
    place.command(&format!("doctor{}", option("--fix-digest", &visible_whole(workspace))))
}

/// Returns the locations in which terraform acquires the parts of a lock, the S3 object first. `store_keys` are all
/// locations that the lock can have, in the order of a release. `lock_file` is whether the backend sets `use_lockfile`.
fn in_order_of_lock(store_keys: Vec<StoreKey>, lock_file: bool) -> Vec<StoreKey> {
    let is_used = |store_key: &StoreKey| lock_file || matches!(store_key, StoreKey::DynamoDb { .. });
    store_keys.into_iter().rev().filter(is_used).collect()
}

/// Whether the lock with the text `text` is stored at a location. `stored` is what is there, or `None` if nothing is.
fn is_stored(stored: Option<&StoredLock>, text: &str) -> bool {
    stored.is_some_and(|stored| stored.text() == text)
}

/// The result of the comparison under the lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Check {
    /// The digest matches the state now.
    Fits,
    /// The digest or the state is not the one that was shown to the user.
    Changed,
    /// The digest may be changed.
    AsShown,
}

/// Compares `now`, the comparison under the lock, with `shown`, to which the user has agreed.
fn check(now: &Comparison, shown: &Comparison) -> Check {
    if now.fits() {
        Check::Fits
    } else if now == shown {
        Check::AsShown
    } else {
        Check::Changed
    }
}

/// Records in the journal that this process is about to request `lock`. Returns `None` if there is no journal, or if it
/// cannot be written.
fn journal(directory: &Directory, state: &ListedState, lock: RecordedLock, begun: Timestamp) -> Option<Journaled> {
    let place = StateDirectory::open(|name| std::env::var_os(name)).ok()?;
    let journal = Journal::open(&place).ok()?;
    let run = crate::journal::runs::run_id();
    let (access, mut surroundings) = redacted_backend::of_run([&directory.backend]);
    surroundings.identify(&run, &access, &[&directory.backend]);
    let mut record = JournalRecord {
        who: lock.who.clone(),
        started: begun,
        program: "terraform".into(),
        command: OPERATION.into(),
        directory: directory.path.to_string_lossy().into_owned(),
        data_directory: directory.own_files.to_string_lossy().into_owned(),
        workspaces: vec![state.workspace.clone()],
        surroundings,
        access,
        ..JournalRecord::new(&run, &journal)
    };
    record.log.set_locks([LoggedLock::Named(lock)]);
    let (entry, tree_lock) = journal.begin(&record).ok()?;
    let pending = PendingRequests::of(&place).of_run(&record);
    Some(Journaled { entry, record, pending, _tree_lock: tree_lock })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock::dynamodb::InfoAttribute;

    #[test]
    fn the_digest_is_changed_only_with_consent() {
        for (change, is_terminal, expected) in [
            (Change::None, false, Consent::OnlyPrint),
            (Change::None, true, Consent::OnlyPrint),
            (Change::IfAgreed, false, Consent::CannotAsk),
            (Change::IfAgreed, true, Consent::Ask),
            (Change::Unasked, false, Consent::Given),
            (Change::Unasked, true, Consent::Given),
        ] {
            assert_eq!(consent(change, is_terminal), expected, "{change:?} {is_terminal}");
        }
    }

    #[test]
    fn the_object_is_locked_before_the_item_and_only_if_the_backend_uses_it() {
        let stores = Stores::offline("eu-west-1");
        let state = ListedState {
            workspace: "default".into(),
            bucket: "bkt".into(),
            key: "k".into(),
            table: Some("locks".into()),
        };
        for (lock_file, expected) in [(true, vec!["S3", "DynamoDB"]), (false, vec!["DynamoDB"])] {
            let order = in_order_of_lock(state.store_keys(&stores), lock_file);
            assert_eq!(order.iter().map(StoreKey::service).collect::<Vec<_>>(), expected);
        }
    }

    #[test]
    fn a_command_to_type_names_the_directory_and_any_workspace() {
        let here = LocationArgs::default();
        let there = LocationArgs::directory_of(Some("a b".into()));
        for (place, chdir) in [(&here, ""), (&there, " --chdir 'a b'")] {
            assert_eq!(release_command(place, true, "7"), "tf locks recover");
            assert_eq!(release_command(place, false, "7"), format!("tf locks release --force 7{chdir}"));
            for (workspace, word) in [("green", " green"), ("-x", "=-x"), ("$a", " '$a'")] {
                let expected = format!("tf locks doctor --fix-digest{word}{chdir}");
                assert_eq!(fix_command(place, workspace), expected);
            }
        }
    }

    #[test]
    fn only_the_same_text_is_our_lock() {
        let stored = |text: &str| Some(StoredLock::Item(InfoAttribute::Text(text.to_owned())));
        let text = r#"{"ID":"a","Who":"x"}"#;
        for (stored, expected) in [
            (stored(text), true),
            // Another lock with the same ID would be a lock of somebody else.
            (stored(r#"{"ID":"a","Who":"y"}"#), false),
            (stored(""), false),
            (Some(StoredLock::Item(InfoAttribute::None)), false),
            (None, false),
        ] {
            assert_eq!(is_stored(stored.as_ref(), text), expected, "{stored:?}");
        }
    }

    #[test]
    fn only_the_digest_and_the_state_that_were_shown_are_changed() {
        let comparison = |recorded: Option<&str>, computed: Option<&str>, written: Option<&str>| Comparison {
            recorded: recorded.map(ToOwned::to_owned),
            computed: computed.map(ToOwned::to_owned),
            written: written.map(|at| at.parse().unwrap()),
        };
        let (before, later) = (Some("2026-11-23T01:46:07Z"), Some("2026-11-23T01:46:08Z"));
        let shown = comparison(Some("a"), Some("b"), before);
        for (now, expected) in [
            (comparison(Some("a"), Some("b"), before), Check::AsShown),
            (comparison(Some("c"), Some("b"), before), Check::Changed),
            (comparison(Some("a"), Some("c"), before), Check::Changed),
            (comparison(Some("a"), None, None), Check::Changed),
            // The same contents were written once more, so a run is at work.
            (comparison(Some("a"), Some("b"), later), Check::Changed),
            (comparison(Some("b"), Some("b"), later), Check::Fits),
            (comparison(None, Some("b"), before), Check::Fits),
        ] {
            assert_eq!(check(&now, &shown), expected, "{now:?}");
        }
        let without_state = comparison(Some("a"), None, None);
        assert_eq!(check(&without_state, &without_state), Check::AsShown, "the digest of no state is deleted");
    }
}
