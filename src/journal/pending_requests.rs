//! Pending requests: lock requests that may still land after their sender has died.
//!
//! If there was no response to a lock request, a proxy or an overloaded service may still hold the request. It may
//! deliver the request long after the sender died, as long as the request's signature is valid (5 minutes for DynamoDB,
//! 15 minutes for S3). That is too long to wait for. The facts about the lock are therefore stored here. Every `tf`
//! that starts in the same location, or whose terraform finds that lock held, releases the lock. The facts are stored
//! for the whole time, even if a lock has already appeared, because another request may follow: a client that gets no
//! response sends its request again, and a lock with both parts (the DynamoDB item and the S3 object) has two requests.
//!
//! Each lock has one file in the user's state directory, which only its owner can read. The file contains facts from
//! terraform's log and from the record of the run: no value of a variable (`-var`), no access key, no token. A wrong
//! file cannot cause the release of another holder's lock, because the stored lock must agree with the file in every
//! field ([`crate::lock::proof`]).

use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::journal::clock_reading::ClockReading;
use crate::journal::runs::JournalRecord;
use crate::journal::state_directory::{
    Durability, StateDirectory, clear_unfinished, is_private, open_private, replace,
};
use crate::lock::proof::Run;
use crate::terraform::lock_info::is_lock_id;
use crate::terraform::log::{Log, RecordedLock};
use crate::trace::trace;

/// How long a request may still land. This time is longer than the signature of any request is valid: S3 accepts a
/// signature for 15 min, DynamoDB for 5 min.
pub(crate) const PENDING_WINDOW: Duration = Duration::from_mins(20);

/// How long a pending request is stored if the service has never responded to a read of the lock.
const UNSEEN_PENDING_WINDOW: Duration = Duration::from_hours(24);

/// The largest file that is read. A larger one is never written.
const MAX_BYTES: u64 = 1 << 20;

/// A lock request that may still land.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PendingRequest {
    /// When `tf` found that the terraform which sent the request was dead.
    #[serde(flatten)]
    pub(crate) since: ClockReading,
    /// The facts about the lock from the log.
    pub(crate) lock: RecordedLock,
    /// The facts about the run.
    pub(crate) run: Run,
    /// Whether the request was most likely refused, because terraform exited by itself or there was no table. If true,
    /// `tf` mentions the lock only after a release.
    #[serde(default)]
    pub(crate) abandoned: bool,
    /// Whether the service has never responded to a read of the lock. If true, it is not known whether the lock exists.
    #[serde(default)]
    pub(crate) unseen: bool,
    /// When a `tf` last searched for the lock and got no response. `None` if there was no such search, or if a later
    /// search got a response.
    #[serde(default)]
    pub(crate) tried: Option<Timestamp>,
    /// The record of the run, which shows a `tf` in another directory how to reach the lock. `None` if the run had no
    /// journal, or if an earlier version wrote the file.
    #[serde(default)]
    pub(crate) record: Option<Box<JournalRecord>>,
}

impl PendingRequest {
    /// Returns the pending request of `lock`, whose terraform was found dead just now.
    pub(crate) fn new(lock: &RecordedLock, run: &Run) -> Self {
        Self {
            since: ClockReading::now(),
            lock: lock.clone(),
            run: run.clone(),
            abandoned: false,
            unseen: false,
            tried: None,
            record: None,
        }
    }

    /// Whether a search for the lock in the 5 minutes before `now` got no response. If so, a `tf` that starts terraform
    /// does not wait for a response again.
    pub(crate) fn was_just_tried(&self, now: Timestamp) -> bool {
        const RETRY_INTERVAL: SignedDuration = SignedDuration::from_mins(5);
        self.tried.is_some_and(|tried| now.duration_since(tried) < RETRY_INTERVAL)
    }

    /// Whether the time for which the request is stored is over at `now`.
    fn is_over(&self, now: &ClockReading) -> bool {
        self.since.age(now) > if self.unseen { UNSEEN_PENDING_WINDOW } else { PENDING_WINDOW }
    }
}

/// The pending requests in one state directory.
#[derive(Debug)]
pub(crate) struct PendingRequests {
    path: PathBuf,
    record: Option<Box<JournalRecord>>,
}

impl PendingRequests {
    /// Returns the pending requests in `directory`.
    pub(crate) fn of(directory: &StateDirectory) -> Self {
        Self { path: directory.join("tombstones"), record: None }
    }

    /// Sets `record`, which [`Self::put`] adds to each pending request that has no record.
    pub(crate) fn of_run(mut self, record: &JournalRecord) -> Self {
        // The log is left out, because each pending request already contains the facts about its lock.
        self.record = Some(Box::new(JournalRecord { log: Log::default(), ..record.clone() }));
        self
    }

    /// Returns the pending requests whose time is not over at `now`, and deletes the files of the others, and files
    /// that were not written to their end. A file that cannot be read is skipped and not deleted. Empty if the
    /// directory does not exist or is not private to this user.
    pub(crate) fn read(&self, now: &ClockReading) -> Vec<PendingRequest> {
        let Ok(entries) = fs::read_dir(&self.path) else { return Vec::new() };
        if !is_private(&self.path) {
            return Vec::new();
        }
        let mut awaited = Vec::new();
        for entry in entries.flatten() {
            let path = entry.path();
            let Some(pending) = read_one(&path) else {
                clear_unfinished(&path, is_lock_id);
                continue;
            };
            if pending.is_over(now) {
                let _ = fs::remove_file(path);
            } else {
                awaited.push(pending);
            }
        }
        awaited
    }

    /// Records that the service has answered a check for the lock. From now on, the request is stored only for
    /// [`PENDING_WINDOW`].
    pub(crate) fn was_seen(&self, pending: &PendingRequest) {
        if pending.unseen || pending.tried.is_some() {
            let _ = self.put(&PendingRequest { unseen: false, tried: None, ..pending.clone() });
        }
    }

    /// Records that a search for the lock at `now` got no response.
    pub(crate) fn was_tried(&self, pending: &PendingRequest, now: Timestamp) {
        let _ = self.put(&PendingRequest { tried: Some(now), ..pending.clone() });
    }

    /// Writes `pending` to disk, and replaces an earlier request for the same lock.
    ///
    /// # Errors
    /// Fails if the directory cannot be created or written, or if it is not private to this user, or if the lock has an
    /// invalid ID.
    pub(crate) fn put(&self, pending: &PendingRequest) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.path)?;
        if !is_private(&self.path) || !is_lock_id(&pending.lock.id) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let record = pending.record.clone().or_else(|| self.record.clone());
        let mut text = serde_json::to_vec(&PendingRequest { record, ..pending.clone() })?;
        if text.len() as u64 > MAX_BYTES {
            // Without the record, only a `tf` in the same directory finds the lock.
            text = serde_json::to_vec(&PendingRequest { record: None, ..pending.clone() })?;
        }
        trace!("pending request of lock {}", pending.lock.id);
        replace(&self.path(&pending.lock.id), &text, Durability::PowerLoss)
    }

    fn path(&self, id: &str) -> PathBuf {
        self.path.join(format!("{id}.json"))
    }
}

fn read_one(path: &Path) -> Option<PendingRequest> {
    if path.extension()? != "json" {
        return None;
    }
    let file = open_private(OpenOptions::new().read(true), path).ok()?;
    if file.metadata().ok()?.len() > MAX_BYTES {
        return None;
    }
    let pending: PendingRequest = serde_json::from_reader(file).ok()?;
    (path.file_stem()? == pending.lock.id.as_str() && is_lock_id(&pending.lock.id)).then_some(pending)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terraform::log::tests::{ID, lock_line};

    fn pending() -> PendingRequest {
        let mut log = Log::default();
        log.read(lock_line(7, "Attempting to lock remote state (DynamoDB only)...", ID, "r").as_bytes());
        let run = Run {
            who: "root@vm".into(),
            who_now: String::new(),
            started: "2026-11-23T01:46:07Z".parse().unwrap(),
            disordered: false,
            locking_disabled: false,
            excessive: false,
            program: None,
        };
        PendingRequest {
            since: after(0),
            lock: log.named().next().unwrap().clone(),
            run,
            abandoned: false,
            unseen: false,
            tried: None,
            record: None,
        }
    }

    /// Returns what the clocks show `minutes` after [`pending`]'s terraform was found dead.
    fn after(minutes: i64) -> ClockReading {
        let since: Timestamp = "2026-11-23T01:47:00Z".parse().unwrap();
        ClockReading::of_time(since + SignedDuration::from_mins(minutes))
    }

    fn pending_requests() -> (tempfile::TempDir, PendingRequests) {
        let directory = tempfile::tempdir().unwrap();
        let pending_requests = PendingRequests::of(&StateDirectory::at(directory.path()));
        (directory, pending_requests)
    }

    #[test]
    fn a_pending_request_is_remembered_for_its_time() {
        let (_directory, pending_requests) = pending_requests();
        pending_requests.put(&pending()).unwrap();
        let at = |minutes: i64| pending_requests.read(&after(minutes)).len();
        assert_eq!((at(0), at(20), at(21), at(0)), (1, 1, 0, 0));
    }

    #[test]
    fn one_that_nobody_could_look_for_stands_for_a_day_and_once_seen_for_its_time() {
        let (_directory, pending_requests) = pending_requests();
        let unseen = PendingRequest { unseen: true, ..pending() };
        pending_requests.put(&unseen).unwrap();
        let at = |minutes: i64| pending_requests.read(&after(minutes)).len();
        assert_eq!((at(21), at(24 * 60)), (1, 1));
        pending_requests.was_seen(&unseen);
        assert_eq!((at(20), at(21)), (1, 0));
    }

    #[test]
    fn what_is_torn_or_hostile_is_not_obeyed_and_breaks_nothing() {
        let (_directory, pending_requests) = pending_requests();
        pending_requests.put(&pending()).unwrap();
        let whole = fs::read(pending_requests.path(ID)).unwrap();
        for length in 0..whole.len() {
            fs::write(pending_requests.path(ID), &whole[..length]).unwrap();
            assert!(pending_requests.read(&after(0)).is_empty(), "cut at {length}");
        }
        fs::remove_file(pending_requests.path(ID)).unwrap();
        // The file has another name, or is a symbolic link.
        let other = "11111111-d70c-4132-39e0-d2abba1b3077";
        fs::write(pending_requests.path(other), &whole).unwrap();
        fs::write(pending_requests.path.join("elsewhere"), &whole).unwrap();
        std::os::unix::fs::symlink(pending_requests.path.join("elsewhere"), pending_requests.path(ID)).unwrap();
        assert!(pending_requests.read(&after(0)).is_empty());
    }

    #[test]
    fn a_directory_that_others_can_write_is_not_used() {
        use std::os::unix::fs::PermissionsExt;
        let (_directory, pending_requests) = pending_requests();
        pending_requests.put(&pending()).unwrap();
        fs::set_permissions(&pending_requests.path, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(pending_requests.read(&after(0)).is_empty());
        assert!(pending_requests.put(&pending()).is_err());
    }

    /// The fixture contains the record of a run.
    #[test]
    fn files_of_version_0_1_are_read_and_written_unchanged() {
        let text = include_str!("fixtures/pending_request_1.json");
        let read: PendingRequest = serde_json::from_str(text).unwrap();
        let whole: serde_json::Value = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_value(&read).unwrap(), whole);
    }

    #[test]
    fn a_pending_request_with_any_change_is_rejected_or_is_read_back() {
        let text = serde_json::to_vec(&pending()).unwrap();
        crate::generated_input::for_all(file!(), &crate::generated_input::changed(text), |text| {
            crate::generated_input::is_read_back::<PendingRequest>(&text)
        });
    }

    /// `tf` was killed between the write and the rename.
    #[test]
    fn a_file_that_was_not_written_to_its_end_goes_after_an_hour() {
        let root = tempfile::tempdir().unwrap();
        let requests = PendingRequests::of(&StateDirectory::at(root.path()));
        requests.put(&pending()).unwrap();
        let file = |name: &str, age: u64| {
            let path = requests.path.join(name);
            let file = fs::File::create(&path).unwrap();
            file.set_modified(std::time::SystemTime::now() - std::time::Duration::from_secs(age)).unwrap();
            path
        };
        let old = file(&format!("{ID}.4711"), 3700);
        let new = file(&format!("{ID}.4712"), 60);
        let other = file("notes.1", 3700);
        assert_eq!(requests.read(&after(0)).len(), 1);
        assert!(!old.exists() && new.exists() && other.exists());
    }
}
