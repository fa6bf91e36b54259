//! A lock request that nobody saw answered can land long after its sender died: held by a proxy or an overloaded
//! service, for as long as its signature is valid (5 minutes for DynamoDB, 15 for S3). No waiting covers that. So the
//! lock's facts are kept here, and every `tf` that starts on that place, or is refused by that lock, gives it back. They
//! are kept for all of that time, whether a lock came or not: a client without an answer sends its request again, and a
//! lock of both kinds has two requests.
//!
//! One file a lock, under the user's state directory, readable for its owner alone. What is in it was read from
//! terraform's log: no argument, no key, no token. It can make nobody delete another's lock: whatever it says, the lock
//! that stands must agree with it in everything ([`crate::lock::proof`]).

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::journal::runs::JournalRecord;
use crate::journal::state_directory::{StateDirectory, is_private, open_private};
use crate::lock::proof::Run;
use crate::terraform::lock_info::is_lock_id;
use crate::terraform::log::{Log, RecordedLock};
use crate::trace::trace;

/// How long a request can still land: longer than any signature is valid.
pub(crate) const PENDING_WINDOW: SignedDuration = SignedDuration::from_mins(20);

/// How long one is kept of which the service has not said yet whether it is there.
const UNSEEN_PENDING_WINDOW: SignedDuration = SignedDuration::from_hours(24);

/// What is kept of a lock that may still come.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct PendingRequest {
    /// When its terraform was seen dead.
    pub(crate) since: Timestamp,
    /// What the log said of it.
    pub(crate) lock: RecordedLock,
    /// What is known of the run.
    pub(crate) run: Run,
    /// Its request was most likely refused: terraform ended by itself, or there was no table. Only a release of it is reported.
    #[serde(default)]
    pub(crate) abandoned: bool,
    /// The service has not answered yet whether it is there.
    #[serde(default)]
    pub(crate) unseen: bool,
    /// When somebody looked for it last and got no answer.
    #[serde(default)]
    pub(crate) tried: Option<Timestamp>,
    /// How it reached its lock, for whoever looks for that from another directory. None where the run had no journal, and in
    /// a file of an earlier version.
    #[serde(default)]
    pub(crate) record: Option<Box<JournalRecord>>,
}

impl PendingRequest {
    /// What is kept of `lock`, whose terraform was seen dead just now.
    pub(crate) fn new(lock: &RecordedLock, run: &Run) -> Self {
        Self {
            since: Timestamp::now(),
            lock: lock.clone(),
            run: run.clone(),
            abandoned: false,
            unseen: false,
            tried: None,
            record: None,
        }
    }

    /// Whether nobody has got an answer about it a moment before `now`. Whoever starts a terraform does not wait for it again so
    /// soon.
    pub(crate) fn was_just_tried(&self, now: Timestamp) -> bool {
        const RETRY_INTERVAL: SignedDuration = SignedDuration::from_mins(5);
        self.tried.is_some_and(|tried| now.duration_since(tried) < RETRY_INTERVAL)
    }

    /// Whether its time is over.
    fn is_over(&self, now: Timestamp) -> bool {
        now.duration_since(self.since) > if self.unseen { UNSEEN_PENDING_WINDOW } else { PENDING_WINDOW }
    }
}

/// Where tombstones stand.
#[derive(Debug)]
pub(crate) struct PendingRequests {
    path: PathBuf,
    record: Option<Box<JournalRecord>>,
}

impl PendingRequests {
    /// The one in `directory`.
    pub(crate) fn of(directory: &StateDirectory) -> Self {
        Self { path: directory.join("tombstones"), record: None }
    }

    /// The same, for what the run of `record` leaves.
    pub(crate) fn of_run(mut self, record: &JournalRecord) -> Self {
        // What its log told is in the locks themselves.
        self.record = Some(Box::new(JournalRecord { log: Log::default(), ..record.clone() }));
        self
    }

    /// The tombstones that still stand. Those whose time is over are taken away; what cannot be read is left alone.
    pub(crate) fn read(&self, now: Timestamp) -> Vec<PendingRequest> {
        let Ok(entries) = fs::read_dir(&self.path) else { return Vec::new() };
        if !is_private(&self.path) {
            return Vec::new();
        }
        let mut standing = Vec::new();
        for entry in entries.flatten() {
            let path = entry.path();
            let Some(pending) = read_one(&path) else { continue };
            if pending.is_over(now) {
                let _ = fs::remove_file(path);
            } else {
                standing.push(pending);
            }
        }
        standing
    }

    /// Notes that the service has said whether the lock is there.
    pub(crate) fn was_seen(&self, pending: &PendingRequest) {
        if pending.unseen || pending.tried.is_some() {
            let _ = self.put(&PendingRequest { unseen: false, tried: None, ..pending.clone() });
        }
    }

    /// Notes that nobody has said at the moment `now` whether the lock is there.
    pub(crate) fn was_tried(&self, pending: &PendingRequest, now: Timestamp) {
        let _ = self.put(&PendingRequest { tried: Some(now), ..pending.clone() });
    }

    /// Puts one up.
    ///
    /// # Errors
    /// Where the directory is not writable, or not private.
    pub(crate) fn put(&self, pending: &PendingRequest) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.path)?;
        if !is_private(&self.path) || !is_lock_id(&pending.lock.id) {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        // Whole or not at all: written beside its place, and moved there.
        let path = self.path(&pending.lock.id);
        let unfinished = path.with_extension(std::process::id().to_string());
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished)?;
        let record = pending.record.clone().or_else(|| self.record.clone());
        file.write_all(&serde_json::to_vec(&PendingRequest { record, ..pending.clone() })?)?;
        file.sync_all()?;
        trace!("tombstone for {}", pending.lock.id);
        fs::rename(unfinished, path)
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
    if file.metadata().ok()?.len() > 1 << 16 {
        return None;
    }
    let pending: PendingRequest = serde_json::from_reader(file).ok()?;
    (path.file_stem()? == pending.lock.id.as_str() && is_lock_id(&pending.lock.id)).then_some(pending)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terraform::log::{tests::ID, tests::lock_line};

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
        let since = "2026-11-23T01:47:00Z".parse().unwrap();
        PendingRequest {
            since,
            lock: log.locks.remove(0),
            run,
            abandoned: false,
            unseen: false,
            tried: None,
            record: None,
        }
    }

    fn pending_requests() -> (tempfile::TempDir, PendingRequests) {
        let directory = tempfile::tempdir().unwrap();
        let pending_requests = PendingRequests::of(&StateDirectory::at(directory.path()));
        (directory, pending_requests)
    }

    #[test]
    fn a_tombstone_stands_for_its_time() {
        let (_directory, pending_requests) = pending_requests();
        pending_requests.put(&pending()).unwrap();
        let at = |minutes: i64| pending_requests.read(pending().since + SignedDuration::from_mins(minutes)).len();
        assert_eq!((at(0), at(20), at(21), at(0)), (1, 1, 0, 0));
    }

    #[test]
    fn one_that_nobody_could_look_for_stands_for_a_day_and_once_seen_for_its_time() {
        let (_directory, pending_requests) = pending_requests();
        let unseen = PendingRequest { unseen: true, ..pending() };
        pending_requests.put(&unseen).unwrap();
        let at = |minutes: i64| pending_requests.read(pending().since + SignedDuration::from_mins(minutes)).len();
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
            assert!(pending_requests.read(pending().since).is_empty(), "cut at {length}");
        }
        fs::remove_file(pending_requests.path(ID)).unwrap();
        // Under another name, and through a link.
        let other = "11111111-d70c-4132-39e0-d2abba1b3077";
        fs::write(pending_requests.path(other), &whole).unwrap();
        fs::write(pending_requests.path.join("elsewhere"), &whole).unwrap();
        std::os::unix::fs::symlink(pending_requests.path.join("elsewhere"), pending_requests.path(ID)).unwrap();
        assert!(pending_requests.read(pending().since).is_empty());
    }

    #[test]
    fn a_directory_that_others_can_write_is_not_used() {
        use std::os::unix::fs::PermissionsExt;
        let (_directory, pending_requests) = pending_requests();
        pending_requests.put(&pending()).unwrap();
        fs::set_permissions(&pending_requests.path, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(pending_requests.read(pending().since).is_empty());
        assert!(pending_requests.put(&pending()).is_err());
    }

    /// The fixture has a record of a run in it.
    #[test]
    fn files_of_version_0_1_are_read_and_written_unchanged() {
        let text = include_str!("fixtures/pending_request_1.json");
        let read: PendingRequest = serde_json::from_str(text).unwrap();
        let whole: serde_json::Value = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_value(&read).unwrap(), whole);
    }
}
