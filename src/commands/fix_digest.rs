//! `tf locks doctor --fix-digest`: makes a digest fit its state, as terraform's next write would. Where there is no state, the
//! digest of one that is gone keeps terraform from starting anew: it is deleted.
//!
//! Everything happens under the state's lock, taken as terraform takes it: first the object, then the item, each only
//! where nothing stands. What a person agreed to is compared once more under that lock, and the digest is written on
//! condition that it is still the one that was shown. The lock is recorded in the journal before it is asked for, and once
//! more when we have it, so that whatever kills us, `tf locks recover` or the next `tf` releases it. Where a request for it
//! had no answer, it may land when we are gone: then it is remembered as that of a dead terraform is.

use crate::console;
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
use crate::console::{length_of_time, quoted, visible};
use crate::journal::pending_requests::{PendingRequest, PendingRequests};
use crate::journal::runs::{Journal, JournalEntry, JournalRecord};
use crate::journal::state_directory::StateDirectory;
use crate::lock::digest::{self, Comparison};
use crate::lock::stores::{Removed, StoreKey, Stores};
use crate::lock::{dynamodb, s3};
use crate::sys::disposition;
use crate::terraform::lock_info::{self, LockInfo};
use crate::terraform::log::{LockParts, RecordedLock};

/// What our lock calls itself.
const OPERATION: &str = "tf locks doctor --fix-digest";

/// Fixes the digest of `workspace`, or of the selected one.
///
/// # Errors
/// [`Trouble`].
pub(super) fn run(place: &LocationArgs, workspace: Option<&str>, yes: bool, dry_run: bool) -> Result<Finding, Trouble> {
    let mut agreed = None;
    let finding = super::block_on(async {
        let (directory, stores, state) = find(place, workspace).await?;
        let compared = compare(&stores, &state).await?;
        let name = visible(&state.path());
        if compared.fits() {
            console::print(&format!("the digest of {name} fits its state: there is nothing to fix"));
            return Ok(Finding::Nothing);
        }
        let now = Timestamp::now();
        let written = compared.written.map_or_else(String::new, |at| {
            format!(", written at {at:.0} ({} ago)", length_of_time(now.duration_since(at).unsigned_abs()))
        });
        let has = compared.computed.as_deref().unwrap_or(
            "none, for there is no state: if there should be one, bring it back first (its bucket may keep old versions)",
        );
        console::print(&format!(
            "state     {name}{written}\nrecorded  {}\nit has    {has}",
            visible(compared.recorded.as_deref().unwrap_or("none"))
        ));
        let (what, question) = match compared.computed {
            Some(_) => ("record what it has", "Record what the state has?"),
            None => ("delete the digest", "Delete the digest, so that terraform begins with an empty state?"),
        };
        if dry_run {
            console::print(&format!("would {what}"));
            return Ok(Finding::Stale);
        }
        if !yes && !std::io::stdin().is_terminal() {
            return Err(Trouble::Said(format!("nobody is there to ask: add --yes to {what}")));
        }
        if !yes && !agreement::is_given(question) {
            console::say("it was left alone");
            return Ok(Finding::Failed);
        }
        agreed = Some((directory, state, compared));
        Ok(Finding::Failed)
    })?;
    let Some((directory, state, compared)) = agreed else { return Ok(finding) };
    // From here on there is a lock of ours; it takes as long as the state takes to be read. Whoever asks us to stop
    // gets that soon enough, and what cannot be ignored is for the journal.
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGTSTP] {
        disposition::set_ignored(signal);
    }
    let mut work = Work::new(&directory, state, compared);
    super::block_on(async {
        let stores = Stores::connect(&directory.backend, Purpose::Work).await?;
        work.under_lock(&stores).await
    })
}

async fn find(place: &LocationArgs, workspace: Option<&str>) -> Result<(Directory, Stores, ListedState), Trouble> {
    let Connection { target: ScanTarget::Directory(directory), stores } = place.reach().await? else {
        return Err(Trouble::Said("a digest is fixed from the directory of its state".into()));
    };
    if directory.table.is_none() {
        return Err(Trouble::Said(
            "this backend has no DynamoDB table, and so no digest: there is nothing to fix".into(),
        ));
    }
    let wanted = workspace.unwrap_or(&directory.workspace);
    let (states, _) = inventory::states(&directory, &stores).await?;
    let found = match states.iter().find(|state| state.workspace == wanted) {
        Some(state) => Some(state.clone()),
        None => without_state(&directory, &stores, wanted).await?,
    };
    let state = found.ok_or_else(|| {
        let names: Vec<String> = states.iter().map(|state| visible(&state.workspace)).collect();
        Trouble::Said(format!("there is no workspace {:?}; there are: {}", visible(wanted), names.join(", ")))
    })?;
    Ok((directory, stores, state))
}

/// The workspace `name`, which has no state, if a digest is recorded for it.
async fn without_state(directory: &Directory, stores: &Stores, name: &str) -> Result<Option<ListedState>, Trouble> {
    let Some(state) = inventory::state(directory, name) else { return Ok(None) };
    let compared = compare(stores, &state).await?;
    Ok(compared.recorded.is_some().then_some(state))
}

async fn compare(stores: &Stores, state: &ListedState) -> Result<Comparison, Trouble> {
    let table = state.table.as_deref().unwrap_or_default();
    let compared = digest::compare(stores, &state.bucket, &state.key, table).await;
    compared.map_err(|failure| Trouble::failed(failure, &visible(&state.path()), stores))
}

/// The work that is done with a lock in hand.
struct Work<'a> {
    directory: &'a Directory,
    state: ListedState,
    /// What was agreed to.
    shown: Comparison,
    info: LockInfo,
    /// Our lock, as it stands.
    text: String,
    /// None where there is no journal: then only a signal that cannot be ignored can leave the lock.
    journaled: Option<Journaled>,
}

/// What the journal holds of us.
struct Journaled {
    entry: JournalEntry,
    record: JournalRecord,
    pending: PendingRequests,
    /// Held for as long as we live: whoever looks at the journal sees us by it.
    _life: OwnedFd,
}

impl<'a> Work<'a> {
    fn new(directory: &'a Directory, state: ListedState, shown: Comparison) -> Self {
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
        Self { directory, state, shown, info, text, journaled }
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
        // A request whose answer was lost may have taken a half.
        let gone = self.unlock(stores).await;
        match (&self.journaled, gone) {
            (Some(journaled), Ok(())) => journaled.entry.take_away(),
            (_, Ok(())) => {}
            (kept, Err(why)) => {
                let next = if kept.is_some() { "type: tf locks recover" } else { "type: tf locks release --force" };
                let more = if kept.is_some() { String::new() } else { format!(" {}", self.info.id) };
                console::say(&format!("the lock {} was not given back: {}\n{next}{more}", self.info.id, visible(&why)));
                return done.map(|_| Finding::Failed);
            }
        }
        done
    }

    /// Records that we have the lock. If that fails, the record says that it was asked for, and whoever finds it looks for
    /// the lock all the same.
    fn has_locked(&mut self) {
        let Some(Journaled { entry, record, .. }) = &mut self.journaled else { return };
        for lock in &mut record.log.locks {
            lock.locked = Some(Timestamp::now());
        }
        let _ = entry.write(record, true);
    }

    /// Remembers a lock request without an answer, or with a refusal that the request itself may have caused: sent twice,
    /// it may land once more.
    fn remember_request(&self) {
        let Some(Journaled { record, pending, .. }) = &self.journaled else { return };
        let run = record.proof();
        for lock in &record.log.locks {
            let _ = pending.put(&PendingRequest::new(lock, &run));
        }
    }

    /// Where the halves of our lock stand, in the order in which terraform takes them: the object first.
    fn store_keys(&self, stores: &Stores) -> Vec<StoreKey> {
        let store_keys = self.state.store_keys(stores).into_iter().rev();
        store_keys
            .filter(|store_key| self.directory.lock_file || matches!(store_key, StoreKey::DynamoDb { .. }))
            .collect()
    }

    /// Takes both halves. False when one is somebody else's.
    async fn lock(&self, stores: &Stores, taken: &mut Vec<StoreKey>) -> Result<bool, Failure> {
        for store_key in self.store_keys(stores) {
            let took = match &store_key {
                StoreKey::S3 { bucket, key, .. } => {
                    s3::put_if_absent(&stores.s3, &self.directory.backend, bucket, key, &self.text).await?
                }
                StoreKey::DynamoDb { table, key, .. } => {
                    dynamodb::put_if_absent(&stores.dynamodb, table, key, &self.text).await?
                }
            };
            // Refused by our own request, whose answer was lost and which the SDK sent again.
            if !took && stores.read(&store_key).await?.is_none_or(|stored| stored.text() != self.text) {
                return Ok(false);
            }
            taken.push(store_key);
        }
        Ok(true)
    }

    /// Whose lock is in the way.
    async fn refused(&self, stores: &Stores, taken: &[StoreKey]) -> Trouble {
        let mut holder = "somebody".to_owned();
        for store_key in self.store_keys(stores).into_iter().filter(|store_key| !taken.contains(store_key)) {
            if let Ok(Some(stored)) = stores.read(&store_key).await
                && let Some(info) = stored.info()
            {
                holder = format!("{}, ID {}", visible(&info.who), visible(&info.id));
            }
        }
        Trouble::Said(format!(
            "the state is locked by {holder}: nothing was changed\ntype: tf locks, and once it is free, try again"
        ))
    }

    async fn write(&self, stores: &Stores) -> Result<Finding, Trouble> {
        let now = compare(stores, &self.state).await?;
        if now.fits() {
            console::print("it fits by now: somebody has mended it, or it was being written");
            return Ok(Finding::Nothing);
        }
        if now != self.shown {
            return Err(Trouble::Said(format!(
                "it changed in between: {} is recorded, and the state has {}: nothing was changed\nlook once more: tf locks \
                 doctor --fix-digest {}",
                visible(now.recorded.as_deref().unwrap_or("none")),
                now.computed.as_deref().unwrap_or("none"),
                quoted(&visible(&self.state.workspace))
            )));
        }
        let table = self.state.table.as_deref().unwrap_or_default();
        let failed = |failure| Trouble::failed(failure, &visible(&self.state.path()), stores);
        let (client, path) = (&stores.dynamodb, self.state.path());
        let old = now.recorded.as_deref().unwrap_or_default();
        let done = match &now.computed {
            Some(new) => dynamodb::replace_digest(client, table, &path, old, new).await,
            None => dynamodb::delete_digest(client, table, &path, old).await,
        };
        if !done.map_err(failed)? {
            // The SDK may have sent it twice.
            let now = compare(stores, &self.state).await?;
            if !now.fits() {
                return Err(Trouble::Said("the digest changed in between: nothing was changed".into()));
            }
        }
        console::print(&match now.computed {
            Some(new) => format!("recorded {new}"),
            None => "deleted the digest".to_owned(),
        });
        Ok(Finding::Nothing)
    }

    /// Gives back what is ours, the item first. Comes back when nothing of ours stands any more.
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

    async fn unlock_half(&self, stores: &Stores, store_key: &StoreKey) -> Result<bool, Failure> {
        let Some(found) = stores.read(store_key).await? else { return Ok(true) };
        if found.text() != self.text {
            return Ok(true);
        }
        Ok(stores.remove(store_key, &found).await? != Removed::Refused)
    }
}

/// Records that we are about to ask for `lock`. `None` where there is no journal.
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
    record.log.locks.push(lock);
    let (entry, life) = journal.begin(&record).ok()?;
    let pending = PendingRequests::of(&place).of_run(&record);
    Some(Journaled { entry, record, pending, _life: life })
}
