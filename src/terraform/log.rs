//! The locks that terraform's core log reports.
//!
//! Since Terraform 1.10, the S3 backend logs four messages at INFO, each with the lock's ID
//! (backend/remote-state/s3/client.go):
//!
//! - `Attempting to lock remote state (KIND)...` before it requests the lock,
//! - `Locked remote state (KIND)` when it has acquired the lock,
//! - `Attempting to unlock remote state (KIND)...` before it releases the lock,
//! - `Unlocked remote state (KIND)` when every part of the lock is deleted.
//!
//! KIND is `S3 Native only`, `DynamoDB only` or `S3 Native and DynamoDB`. Before a write of the state and of its
//! digest, the backend logs `Uploading remote state`. It logs nothing after such a write.
//!
//! Other versions log less, or in another form ([`LogDetail`]). Some log the requests and their responses
//! ([`super::exchange`]). Others log only that the local backend requested a lock, and that it then continued:
//! `requesting state lock for workspace "x"`, then `reading remote state for workspace "x"`
//! (internal/backend/local/backend_local.go). The trace log of every program contains these two records, for every
//! backend.

use std::collections::BTreeSet;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::exchange::{Exchange, Exchanges, LOCK_FILE};
use super::lock_info::{LockInfo, is_lock_id, split_path};
pub(crate) use super::logged_lock::{LockIdentity, LockParts, LoggedLock, RecordedLock, UnnamedLock};
use super::logged_lock::{Part, two_lists};
use super::record::LogRecord;
use super::version::{LogDetail, Product, Version};
use crate::time::saturating_sub;

/// A request to which the log has not shown the response yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Awaited {
    method: String,
    /// The lock's ID, or the path of its state: `bucket/key`. `None` if the request is not about a lock.
    about: Option<String>,
}

/// How much earlier than the latest record before it a record may be. Each goroutine takes the time of its record
/// before it queues for the writer (go-hclog, intlogger.go, `log`). So two neighboring records may be in the wrong
/// order, by the time that one of the goroutines has waited.
const DISORDER_WINDOW: SignedDuration = SignedDuration::from_secs(1);

/// The maximum length of a line, in bytes. A longer line is skipped, because no record that matters is longer.
const MAX_LINE_BYTES: usize = 1 << 16;

/// A bucket or key must have fewer bytes than this. The name of a bucket has at most 63 bytes, and the key of an object
/// at most 1024 (Amazon S3 User Guide).
const MAX_NAME_BYTES: usize = 1025;

/// How many released locks are kept. They are kept so that a late record about one of them is assigned to that lock.
const UNLOCKED_KEPT: usize = 16;

/// The maximum number of unreleased locks. A log with more is not trusted. Terraform has two locks at once while it
/// migrates a state, and the same log contains the locks of nested terraforms.
const UNRELEASED_LIMIT: usize = 256;

/// The maximum number of released locks. A log with more is not trusted. A migration of 8,000 workspaces needs 16,000.
const UNLOCKED_LIMIT: usize = 16_384;

/// The maximum number of requests without a response that are kept. If there are more, the oldest is removed, as if the
/// service had never responded to it.
const AWAITED_LIMIT: usize = 64;

/// The maximum number of request IDs that are kept for a lock. With `-lock-timeout`, terraform requests a lock
/// repeatedly, and only the last request can succeed.
const REQUESTS_KEPT: usize = 16;

/// The maximum length of the text that is kept of a log, in bytes. One byte can become six bytes of JSON. With this
/// limit, the JSON of the whole [`Log`] is still shorter than [`JSON_LIMIT`].
const TEXT_LIMIT: usize = 192 << 10;

/// The maximum length of a [`Log`] in JSON, in bytes. The guardian reads at most this much; the journal reads slightly
/// more.
pub(crate) const JSON_LIMIT: usize = 2 << 20;

/// The locks and the events of a core log that matter for a release. The log can be read in pieces.
///
/// The serialized form is stored, so it must contain no text of the log except the fields of the log's locks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Log {
    /// The locks, in the order in which terraform requested them.
    #[serde(flatten, with = "two_lists")]
    locks: Vec<LoggedLock>,
    /// The program that wrote the log, from the log's first record. `None` if that record was not read; then the log is
    /// not complete.
    #[serde(default)]
    pub(crate) program: Option<Version>,
    /// Whether terraform was started with `-lock=false`. Even then it takes a lock while it creates the state of a
    /// workspace.
    pub(crate) locking_disabled: bool,
    /// Whether terraform logged that it left its operation after a second interrupt, without waiting for the end of the
    /// operation.
    #[serde(default)]
    canceled: bool,
    /// Whether terraform was started with `-detailed-exitcode`, so that it exits with code 2 if there are changes.
    #[serde(default)]
    pub(crate) announces_changes: bool,
    /// The bucket and key of the state whose digest did not match, from the last record about such a mismatch
    /// (backend/remote-state/s3/client.go, `Get`). `None` if the log reports no mismatch.
    #[serde(default)]
    pub(crate) mismatch: Option<(String, String)>,
    /// Whether the times of the records run backwards. Then a clock was set, or another program wrote to the log.
    pub(crate) disordered: bool,
    /// The latest time of all records. `None` if there was no record.
    pub(crate) latest: Option<Timestamp>,
    /// The workspace whose lock terraform has requested, and the time of the request. `None` if there is no such
    /// request, or if terraform has continued since. This lock is one of [`Log::unnamed`].
    #[serde(default)]
    asking: Option<(String, Timestamp)>,
    #[serde(default)]
    awaited: Vec<Awaited>,
    /// Whether the log contains more locks than terraform takes, or more than can be kept. Then none of its locks is
    /// trusted.
    #[serde(default)]
    pub(crate) excessive: bool,
    /// The first 32 bits of the ID of each released lock that is no longer kept.
    #[serde(default)]
    gone: BTreeSet<u32>,
    /// When a lock was last requested, even if that lock is no longer kept. `None` if no lock was requested.
    #[serde(default)]
    asked_last: Option<Timestamp>,
    /// Whether the log contains requests to DynamoDB or S3.
    #[serde(default)]
    has_exchanges: bool,
    /// When the last attempt to get a lock began. With `-lock-timeout`, terraform makes several. `None` if there was
    /// none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) attempted: Option<Timestamp>,
    /// When terraform last began to write a state. `None` if the log shows no write.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) written: Option<Timestamp>,
    #[serde(skip)]
    exchanges: Exchanges,
    /// A record of the S3 backend that is not complete yet, because the lines of its last value have not been read.
    #[serde(skip)]
    begun: Option<String>,
    /// The time of the last record. Lines that continue that record have the same time.
    #[serde(skip)]
    within: Option<Timestamp>,
    #[serde(skip)]
    partial: Vec<u8>,
    /// The number of bytes that were read since the last complete line.
    #[serde(skip)]
    unfinished: u64,
    /// The number of bytes of complete lines that were read since the beginning of the last record.
    #[serde(skip)]
    since_record: u64,
}

impl Log {
    /// Parses the next bytes of the log.
    pub(crate) fn read(&mut self, bytes: &[u8]) {
        for piece in bytes.split_inclusive(|&byte| byte == b'\n') {
            // In whatever pieces a line comes, the same part of it is kept.
            let room = MAX_LINE_BYTES - self.partial.len();
            self.partial.extend_from_slice(&piece[..piece.len().min(room)]);
            self.unfinished += piece.len() as u64;
            if piece.ends_with(b"\n") {
                let length = std::mem::take(&mut self.unfinished);
                let line = std::mem::take(&mut self.partial);
                self.since_record += length;
                // A line that a full disk or the limit has truncated is ignored: a truncated ID would be the ID of
                // another lock.
                if line.ends_with(b"\n") && self.line(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r'])) {
                    self.since_record = length;
                }
            }
        }
    }

    /// Returns the number of bytes at the end that belong to a line or a record that is not complete yet. The
    /// serialized form does not contain them, so a reader that resumes from it must read them again.
    pub(crate) fn unfinished(&self) -> u64 {
        let within = self.exchanges.is_within() || self.begun.is_some();
        self.unfinished + if within { self.since_record } else { 0 }
    }

    /// Whether the log ends within a line, because the disk was full or because terraform died while it wrote the line.
    pub(crate) fn is_torn(&self) -> bool {
        !self.partial.is_empty()
    }

    /// Returns how much this log reports about locks of the S3 backend. `None` if the log's first record was not read.
    pub(crate) fn log_detail(&self) -> Option<LogDetail> {
        self.program.as_ref().map(Version::log_detail)
    }

    /// Whether this log would contain a lock of the S3 backend if terraform had requested one.
    pub(crate) fn logs_locks(&self) -> bool {
        match self.log_detail() {
            Some(LogDetail::Full | LogDetail::IdsOnly) => true,
            // Terraform up to 1.5 logs requests only if its own log is at DEBUG. The log that `tf` adds does not
            // contain them.
            Some(LogDetail::HttpTraffic) => self.has_exchanges,
            Some(LogDetail::AcquireOnly | LogDetail::None) | None => false,
        }
    }

    /// Updates the locks after terraform has exited successfully. If this version does not log the end of a release,
    /// each named lock that terraform had begun to release counts as released: if the release had failed, every version
    /// would have reported an error (`Error releasing the state lock`). For the same reason, an unnamed lock is removed
    /// if terraform had begun to release it, or if only the local backend's records mention it.
    pub(crate) fn ended_well(&mut self) {
        let names_no_end = self.log_detail().is_some_and(|detail| detail != LogDetail::Full);
        self.locks.retain_mut(|lock| match lock {
            LoggedLock::Named(lock) => {
                if names_no_end && lock.progress.is_unlocking() {
                    lock.progress.finish();
                }
                true
            }
            LoggedLock::Unnamed(lock) => !lock.is_of_workspace() && lock.progress.is_before_unlock(),
        });
    }

    /// Returns the locks whose ID is in the log, in the order in which they were requested.
    pub(crate) fn named(&self) -> impl Iterator<Item = &RecordedLock> {
        self.locks.iter().filter_map(LoggedLock::named)
    }

    /// Returns the locks whose ID is not in the log.
    pub(crate) fn unnamed(&self) -> impl Iterator<Item = &UnnamedLock> {
        self.locks.iter().filter_map(LoggedLock::unnamed)
    }

    /// Returns the locks that only the local backend's records mention. They may be in any backend.
    pub(crate) fn of_workspaces(&self) -> impl DoubleEndedIterator<Item = &UnnamedLock> {
        self.locks.iter().filter_map(LoggedLock::unnamed).filter(|lock| lock.is_of_workspace())
    }

    pub(crate) fn locks(&self) -> &[LoggedLock] {
        &self.locks
    }

    /// Marks every lock as acquired, as if the log had reported it. `at` is the time for a lock that is not yet
    /// acquired.
    pub(crate) fn grant_all(&mut self, at: Timestamp) {
        self.locks.iter_mut().for_each(|lock| lock.progress_mut().grant(at));
    }

    /// Replaces all locks with `locks`.
    pub(crate) fn set_locks(&mut self, locks: impl IntoIterator<Item = LoggedLock>) {
        self.locks = locks.into_iter().collect();
    }

    /// Whether the log contains a lock that is not known to be released.
    pub(crate) fn may_hold(&self) -> bool {
        self.unreleased().next().is_some() || self.unreleased_unnamed().next().is_some()
    }

    /// Whether the log contains a lock whose release it should report but does not. This shows that terraform crashed,
    /// if the exit code does not show it. A log of [`LogDetail::IdsOnly`] reports the beginning of a release, but not
    /// its end.
    pub(crate) fn ends_with_request(&self) -> bool {
        let answers = self.log_detail() != Some(LogDetail::IdsOnly);
        self.unreleased().any(|lock| lock.progress.is_before_unlock() || answers)
            || self.unreleased_unnamed().any(|lock| !lock.is_of_workspace())
    }

    /// Like [`Log::ends_with_request`], but true only if terraform had acquired a lock, not only requested one.
    pub(crate) fn ends_holding_lock(&self) -> bool {
        let had = self.unreleased().any(|lock| lock.progress.held.is_some())
            || self.unreleased_unnamed().any(|lock| lock.progress.held.is_some());
        had && self.ends_with_request()
    }

    /// Whether terraform logged that it left its operation after a second interrupt (internal/backend/local/backend.go,
    /// `opWait`).
    pub(crate) fn was_canceled(&self) -> bool {
        self.canceled
    }

    /// Whether there may be a lock that only the local backend's records mention. The log would not report its release.
    pub(crate) fn held_unlogged(&self) -> bool {
        self.unreleased_unnamed().any(UnnamedLock::is_of_workspace)
    }

    /// Returns the locks whose ID is not in the log, and whose release the log does not report.
    pub(crate) fn unreleased_unnamed(&self) -> impl Iterator<Item = &UnnamedLock> {
        // Before terraform requests a lock, its local backend logs two records. If this version also logs the request
        // itself, and the log has only the two records, the lock was never requested.
        let requests_are_logged = self.logs_locks();
        let was_none = move |lock: &UnnamedLock| requests_are_logged && lock.is_of_workspace();
        self.unnamed().filter(move |lock| !(lock.progress.is_gone() || was_none(lock)))
    }

    /// Returns the locks whose ID is in the log, and whose release the log does not report.
    pub(crate) fn unreleased(&self) -> impl Iterator<Item = &RecordedLock> {
        self.named().filter(|lock| !lock.progress.is_gone())
    }

    /// Parses one line. Returns true if the line begins a record.
    fn line(&mut self, line: &str) -> bool {
        if self.goes_on(line) {
            return false;
        }
        let Some(record) = LogRecord::parse(line) else {
            let (exchange, time) = (self.exchanges.line(line), self.within);
            if let (Some(exchange), Some(time)) = (exchange, time) {
                self.exchange(exchange, time);
                self.forget_unlocked();
            }
            return false;
        };
        self.within = Some(record.time);
        if self.program.is_none() {
            self.program = Version::of_record(record.message, record.rest());
        }
        if self.latest.is_some_and(|latest| record.time < saturating_sub(latest, DISORDER_WINDOW)) {
            self.disordered = true;
        }
        self.latest = self.latest.max(Some(record.time));
        if record.message == "CLI command args" {
            self.locking_disabled |= disables_locking(record.rest());
            self.announces_changes |= record.rest().contains("-detailed-exitcode");
        }
        self.canceled |= record.message == "running operation was forcefully canceled";
        if record.module == "backend/local" {
            self.local_backend(&record);
        }
        // If the log of a Terraform contains the IDs of its locks, the requests would add nothing.
        let names_locks = self.program.as_ref().is_none_or(|program| {
            program.product() == Product::Terraform
                && matches!(program.log_detail(), LogDetail::Full | LogDetail::IdsOnly)
        });
        if !names_locks {
            let exchange = self.exchanges.record(&record);
            self.has_exchanges |=
                exchange.as_ref().is_some_and(Exchange::is_of_http) || self.exchanges.is_within_http();
            if let Some(exchange) = exchange {
                self.exchange(exchange, record.time);
            }
        }
        if record.goes_on() {
            self.begun = Some(line.to_owned());
        } else {
            self.s3_backend(&record);
        }
        self.forget_unlocked();
        true
    }

    /// Appends `line` to the record that is not complete yet. Returns false if there is no such record, or if `line`
    /// does not belong to it. The last line of a record consists only of the indentation.
    fn goes_on(&mut self, line: &str) -> bool {
        let Some(mut record) = self.begun.take() else { return false };
        let belongs = line.starts_with("  ") && record.len() + line.len() < MAX_LINE_BYTES;
        if belongs {
            record.push('\n');
            record.push_str(line);
        }
        if belongs && line != "  " {
            self.begun = Some(record);
        } else if let Some(record) = LogRecord::parse(&record) {
            self.s3_backend(&record);
            self.forget_unlocked();
        }
        belongs
    }

    /// Removes the oldest released locks, and keeps only the beginnings of their IDs.
    fn forget_unlocked(&mut self) {
        let is_gone = |lock: &LoggedLock| lock.progress().is_gone();
        let mut surplus = self.locks.iter().filter(|lock| is_gone(lock)).count().saturating_sub(UNLOCKED_KEPT);
        let gone = &mut self.gone;
        self.locks.retain(|lock| {
            let forgotten = surplus > 0 && is_gone(lock);
            if forgotten {
                surplus -= 1;
                gone.extend(lock.named().map(|lock| fingerprint(&lock.id)));
            }
            !forgotten
        });
        if self.gone.len() > UNLOCKED_LIMIT {
            self.excessive = true;
            self.gone.pop_first();
        }
    }

    /// Adds a lock that was requested. If a lock with the same ID was released before, the record is a forgery, and the
    /// lock is marked as contradicted.
    fn add(&mut self, mut lock: LoggedLock) {
        if let LoggedLock::Named(lock) = &mut lock {
            lock.contradicted |= self.gone.contains(&fingerprint(&lock.id));
        }
        self.asked_last = self.asked_last.max(Some(lock.progress().asked));
        self.locks.push(lock);
        if self.is_excessive() {
            self.locks.pop();
        }
    }

    fn await_answer(&mut self, method: &str, about: Option<String>) {
        if self.awaited.len() == AWAITED_LIMIT {
            self.awaited.remove(0);
        }
        self.awaited.push(Awaited { method: method.to_owned(), about });
        if self.is_excessive() {
            self.awaited.pop();
        }
    }

    /// Whether there are more locks or more text than the limits allow. If so, the log is not trusted from then on.
    fn is_excessive(&mut self) -> bool {
        let unreleased = self.locks.iter().filter(|lock| !lock.progress().is_gone()).count();
        let excessive = unreleased > UNRELEASED_LIMIT || self.length_of_text() > TEXT_LIMIT;
        self.excessive |= excessive;
        excessive
    }

    /// Returns the total length of all text that is kept, in bytes.
    fn length_of_text(&self) -> usize {
        let locks = self.locks.iter().map(LoggedLock::length_of_text);
        let awaited = self.awaited.iter().map(|one| one.method.len() + one.about.as_ref().map_or(0, String::len));
        let asking = self.asking.iter().map(|(workspace, _)| workspace.len());
        locks.chain(awaited).chain(asking).sum()
    }

    /// Parses the two records that the local backend writes for an operation in any backend.
    fn local_backend(&mut self, record: &LogRecord<'_>) {
        let workspace = |before| between(record.message, before, "\"");
        if let Some(workspace) = workspace("requesting state lock for workspace \"") {
            if !self.locking_disabled {
                self.asking = Some((workspace.to_owned(), record.time));
                let identity = LockIdentity::Workspace(workspace.to_owned());
                self.locks.push(LoggedLock::Unnamed(UnnamedLock::asked_for(identity, record.time)));
                if self.is_excessive() {
                    self.asking = None;
                    self.locks.pop();
                }
            }
        } else if workspace("reading remote state for workspace \"").is_some()
            && let Some((workspace, asked)) = self.asking.take()
        {
            let identity = LockIdentity::Workspace(workspace);
            let is_it = |lock: &UnnamedLock| {
                lock.identity == identity && lock.progress.asked == asked && lock.progress.held.is_none()
            };
            let is_named = self.asked_last.is_some_and(|last| last >= asked)
                || self.unnamed().any(|lock| lock.progress.asked >= asked && !is_it(lock));
            if is_named || self.locking_disabled {
                self.locks.retain(|lock| !lock.unnamed().is_some_and(is_it));
            } else if let Some(lock) = self.locks.iter_mut().find(|lock| lock.unnamed().is_some_and(is_it)) {
                lock.progress_mut().held = Some(record.time);
            }
        }
    }

    fn s3_backend(&mut self, record: &LogRecord<'_>) {
        if record.module != "backend-s3" {
            return;
        }
        let field = |name| record.field(name).unwrap_or_default();
        if let Some(kind) = between(record.message, "Attempting to lock remote state (", ")...") {
            self.asked(record, kind);
        } else if record.message == "Locking remote state" {
            self.asked(record, "DynamoDB only");
        } else if between(record.message, "Locked remote state (", ")").is_some() {
            self.got(record);
        } else if between(record.message, "Attempting to unlock remote state (", ")...").is_some()
            || record.message == "Unlocking remote state"
        {
            if let Some(lock) = self.lock_of(record) {
                lock.progress.begin_unlock();
            }
        } else if between(record.message, "Unlocked remote state (", ")").is_some() {
            if let Some(lock) = self.lock_of(record) {
                lock.progress.finish();
            }
        } else if record.message == "state MD5 mismatch" {
            let of = |name| record.field(name).filter(|text| text.len() < MAX_NAME_BYTES);
            self.mismatch = of("tf_backend.s3.bucket").zip(of("tf_backend.s3.path"));
        } else if record.message == "Uploading remote state" {
            self.uploads(&field("tf_backend.s3.bucket"), &field("tf_backend.s3.path"), record.time);
        } else if record.message == "Downloading remote state" && self.log_detail() == Some(LogDetail::IdsOnly) {
            // This version does not log whether a lock request succeeded. But it reads the state only after it has
            // acquired the lock.
            let (bucket, key) = (field("tf_backend.s3.bucket"), field("tf_backend.s3.path"));
            let named = self.locks.iter_mut().filter_map(LoggedLock::named_mut);
            let asked =
                named.filter(|lock| lock.bucket == bucket && lock.key == key && lock.progress.is_before_unlock());
            if let Some(lock) = asked.last() {
                lock.progress.grant(record.time);
            }
        }
    }

    fn uploads(&mut self, bucket: &str, key: &str, time: Timestamp) {
        self.written = Some(time);
        for lock in self.locks.iter_mut().filter(|lock| lock.may_lock(bucket, key)) {
            lock.progress_mut().begin_write();
        }
    }

    fn exchange(&mut self, exchange: Exchange, time: Timestamp) {
        if matches!(exchange, Exchange::PutItem { .. } | Exchange::PutLock { .. }) {
            self.attempted = Some(time);
        }
        match exchange {
            Exchange::PutItem { info, text } => {
                self.await_answer("PutItem", Some(info.id.clone()));
                self.put_item(&info, &text, time);
            }
            Exchange::PutLock { bucket, key, checksum } => {
                self.await_answer("PutObject", Some(format!("{bucket}/{key}")));
                let identity = LockIdentity::Object { bucket, key, checksum };
                // With `-lock-timeout`, terraform repeats the request for the same lock.
                let is_it = |lock: &UnnamedLock| lock.identity == identity && !lock.progress.is_gone();
                if !self.unnamed().any(is_it) {
                    self.add(LoggedLock::Unnamed(UnnamedLock::asked_for(identity, time)));
                }
            }
            Exchange::PutState { bucket, key } => self.uploads(&bucket, &key, time),
            Exchange::DeleteItem { path } => {
                self.unlocks(&path);
                self.await_answer("DeleteItem", Some(path));
            }
            Exchange::DeleteLock { bucket, key } => {
                let path = format!("{bucket}/{key}");
                self.unlocks(&path);
                self.await_answer("DeleteObject", Some(path));
            }
            Exchange::Other { method } => self.await_answer(&method, None),
            Exchange::Answered { method, object, status } => self.answered(&method, object, status, time),
        }
    }

    fn unlocks(&mut self, path: &str) {
        for lock in self.locks.iter_mut().filter(|lock| lock.is_at(path)) {
            lock.progress_mut().begin_unlock();
        }
    }

    fn put_item(&mut self, info: &LockInfo, text: &str, time: Timestamp) {
        let Some((bucket, key)) = split_path(&info.path).filter(|_| is_lock_id(&info.id)) else { return };
        if self.named().any(|known| known.id == info.id) {
            return;
        }
        let checksum = aws_smithy_types::base64::encode(Sha256::digest(text));
        let is_other_part = |lock: &UnnamedLock| {
            let LockIdentity::Object { bucket: its, key: own, checksum: sum } = &lock.identity else { return false };
            its == bucket && own == key && sum.as_ref().is_none_or(|sum| *sum == checksum)
        };
        // If the lock has both parts, terraform has put the object into S3 just before.
        let before = self.locks.len();
        self.locks.retain(|lock| !lock.unnamed().is_some_and(is_other_part));
        let parts = LockParts { s3: self.locks.len() < before, dynamodb: true };
        self.add(LoggedLock::Named(RecordedLock::asked_for(info, bucket, key, parts, time)));
    }

    fn answered(&mut self, method: &str, object: Option<(String, String)>, status: u16, time: Timestamp) {
        let path = match object {
            Some((bucket, key)) => match key.strip_suffix(LOCK_FILE) {
                Some(state) => Some(format!("{bucket}/{state}")),
                // This is a response about the state itself, not about a lock.
                None => return,
            },
            None => None,
        };
        let mut fits = Vec::new();
        for (place, awaited) in self.awaited.iter().enumerate() {
            if awaited.method == method && (path.is_none() || awaited.about == path) {
                fits.push(place);
            }
        }
        let [place] = fits.as_slice() else {
            // More than one request, or none, matches the response. All of them count as unanswered. This is safe,
            // because `tf` then checks whether their locks are still held.
            fits.iter().rev().for_each(|place| drop(self.awaited.remove(*place)));
            return;
        };
        let Some(about) = self.awaited.remove(*place).about.filter(|_| (200..300).contains(&status)) else { return };
        match method {
            "PutItem" => {
                for lock in self.locks.iter_mut().filter_map(LoggedLock::named_mut).filter(|lock| lock.id == about) {
                    lock.progress.grant(time);
                }
            }
            "PutObject" => {
                // A named lock is acquired when its DynamoDB item is written. Its object was put before that.
                for lock in self.locks.iter_mut().filter(|lock| lock.unnamed().is_some() && lock.is_at(&about)) {
                    lock.progress_mut().grant(time);
                }
            }
            "DeleteObject" => self.note_deleted(&about, Part::Object),
            _ => self.note_deleted(&about, Part::Item),
        }
    }

    fn note_deleted(&mut self, path: &str, part: Part) {
        for lock in self.locks.iter_mut().filter(|lock| lock.is_at(path)) {
            match lock {
                LoggedLock::Named(lock) if lock.progress.is_before_unlock() => {}
                LoggedLock::Named(lock) => lock.part_is_gone(part),
                // Only the object of this lock is known, so its delete releases the lock.
                LoggedLock::Unnamed(lock) if part == Part::Object => lock.progress.finish(),
                LoggedLock::Unnamed(_) => {}
            }
        }
    }

    fn lock_of(&mut self, record: &LogRecord<'_>) -> Option<&mut RecordedLock> {
        let id = record.field("tf_backend.lock.id")?;
        self.locks.iter_mut().filter_map(LoggedLock::named_mut).find(|lock| lock.id == id)
    }

    fn asked(&mut self, record: &LogRecord<'_>, kind: &str) {
        let field = |name| record.field(name).unwrap_or_default();
        let id = field("tf_backend.lock.id");
        if !is_lock_id(&id) {
            return;
        }
        self.attempted = Some(record.time);
        let parts = match kind {
            "S3 Native only" => LockParts { s3: true, dynamodb: false },
            "DynamoDB only" => LockParts { s3: false, dynamodb: true },
            // KIND is both, or one that a later version has added. It is always safe to search in both places.
            _ => LockParts { s3: true, dynamodb: true },
        };
        let info = LockInfo {
            id: id.clone(),
            operation: field("tf_backend.lock.operation"),
            who: field("tf_backend.lock.who"),
            version: field("tf_backend.lock.version"),
            created: String::new(),
            path: field("tf_backend.lock.path"),
        };
        let (bucket, key) = (field("tf_backend.s3.bucket"), field("tf_backend.s3.path"));
        let mut lock = RecordedLock::asked_for(&info, &bucket, &key, parts, record.time);
        lock.requests.push(field("tf_backend.req_id"));
        match self.lock_of(record) {
            None => self.add(LoggedLock::Named(lock)),
            Some(known) => {
                let same = known.operation == lock.operation
                    && known.who == lock.who
                    && known.version == lock.version
                    && known.path == lock.path
                    && known.bucket == lock.bucket
                    && known.key == lock.key
                    && known.parts == lock.parts;
                // Terraform generates each ID for a single lock. A request with this ID after the lock was acquired is
                // a forgery.
                known.contradicted |= !same || known.progress.held.is_some() || !known.progress.is_before_unlock();
                known.requests.extend(lock.requests);
                let surplus = known.requests.len().saturating_sub(REQUESTS_KEPT);
                known.requests.drain(..surplus);
                if self.is_excessive()
                    && let Some(known) = self.lock_of(record)
                {
                    known.requests.clear();
                }
            }
        }
    }

    fn got(&mut self, record: &LogRecord<'_>) {
        let request = record.field("tf_backend.req_id").unwrap_or_default();
        let path = record.field("tf_backend.lock.path").unwrap_or_default();
        let time = record.time;
        if let Some(lock) = self.lock_of(record) {
            lock.contradicted |= !lock.requests.contains(&request) || lock.path != path;
            lock.progress.held = Some(time);
        }
    }
}

/// Returns the first 32 bits of a lock's ID. IDs are random, so these bits nearly always differ.
fn fingerprint(id: &str) -> u32 {
    u32::from_str_radix(id.get(..8).unwrap_or_default(), 16).unwrap_or_default()
}

/// Whether terraform's arguments contain `-lock=false` in any of Go's spellings of false (strconv.ParseBool).
/// `arguments` is a list of strings in the form that Go prints. The list includes the words of `TF_CLI_ARGS`.
fn disables_locking(arguments: &str) -> bool {
    ["0", "f", "F", "false", "FALSE", "False"].iter().any(|no| arguments.contains(&format!("-lock={no}\"")))
}

fn between<'a>(text: &'a str, before: &str, after: &str) -> Option<&'a str> {
    text.strip_prefix(before)?.strip_suffix(after)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) const ID: &str = "5e75cb05-d70c-4132-39e0-d2abba1b3077";

    pub(crate) fn lock_line(second: u32, message: &str, id: &str, request: &str) -> String {
        format!(
            "2026-11-23T01:46:{second:02}.593Z [INFO]  backend-s3: {message}: tf_backend.lock.id={id} \
             tf_backend.lock.info=\"\" tf_backend.lock.operation=OperationTypeApply \
             tf_backend.lock.path=bkt/dir/prod.tfstate tf_backend.lock.version=1.11.4 tf_backend.lock.who=root@vm \
             tf_backend.operation=Lock tf_backend.req_id={request} tf_backend.s3.bucket=bkt \
             tf_backend.s3.path=dir/prod.tfstate\n"
        )
    }

    fn asking(second: u32, id: &str, request: &str) -> String {
        lock_line(second, "Attempting to lock remote state (S3 Native and DynamoDB)...", id, request)
    }

    fn locked(second: u32, id: &str, request: &str) -> String {
        lock_line(second, "Locked remote state (S3 Native and DynamoDB)", id, request)
    }

    pub(crate) fn unlock_line(second: u32, message: &str, id: &str) -> String {
        format!(
            "2026-11-23T01:46:{second:02}.600Z [INFO]  backend-s3: {message}: tf_backend.lock.id={id} \
             tf_backend.operation=Unlock tf_backend.req_id=u tf_backend.s3.bucket=bkt \
             tf_backend.s3.path=dir/prod.tfstate\n"
        )
    }

    const UPLOADING: &str = "2026-11-23T01:46:10.651Z [INFO]  backend-s3: Uploading remote state: \
        tf_backend.operation=Put tf_backend.req_id=p tf_backend.s3.bucket=bkt tf_backend.s3.path=dir/prod.tfstate\n";

    fn log(text: &str) -> Log {
        let mut log = Log::default();
        log.read(text.as_bytes());
        log
    }

    fn whole_life() -> String {
        [
            "2026-11-23T01:46:07.565Z [INFO]  Terraform version: 1.11.4\n".to_owned(),
            asking(7, ID, "r1"),
            locked(8, ID, "r1"),
            UPLOADING.to_owned(),
            unlock_line(11, "Attempting to unlock remote state (S3 Native and DynamoDB)...", ID),
            unlock_line(12, "Unlocked remote state (S3 Native and DynamoDB)", ID),
        ]
        .concat()
    }

    #[test]
    fn a_lock_that_was_given_back_does_not_stand() {
        let log = log(&whole_life());
        assert_eq!(log.unreleased().count(), 0);
        assert_eq!(log.named().count(), 1);
        assert!(log.logs_locks() && !log.disordered && !log.is_torn());
    }

    #[test]
    fn only_a_terraform_that_writes_its_locks_down_is_believed_to_have_none() {
        for (version, tells) in
            [("1.11.4", true), ("1.10.0 beta1", true), ("2.0.0", true), ("1.6.6", true), ("1.5.7", false)]
        {
            let text = format!("2026-11-23T01:46:07.565Z [INFO]  Terraform version: {version}\n");
            assert_eq!(log(&text).logs_locks(), tells, "{version}");
        }
        assert!(!log("2026-11-23T01:46:07.565Z [INFO]  OpenTofu version: 1.10.0\n").logs_locks());
        assert!(!log("").logs_locks());
    }

    #[test]
    fn a_log_cut_at_any_byte_claims_no_other_lock_and_no_lock_too_few() {
        let text = whole_life();
        let asked = text.find("Locked remote").unwrap();
        for end in 0..text.len() {
            let log = log(&text[..end]);
            assert!(log.named().all(|lock| lock.id == ID), "cut at {end}");
            if end >= asked {
                assert_eq!(log.unreleased().count(), 1, "cut at {end}");
            }
        }
    }

    /// Returns the records of a lock from its request to its release. The key of the state is `dir\nx`.
    fn life_on_several_lines() -> String {
        let value = |name: &str, first: &str| format!("\n  {name}=\n  | {first}\n  | x\n  ");
        let text = whole_life();
        let text =
            text.replace(" tf_backend.lock.path=bkt/dir/prod.tfstate", &value("tf_backend.lock.path", "bkt/dir"));
        text.replace(" tf_backend.s3.path=dir/prod.tfstate", &value("tf_backend.s3.path", "dir"))
    }

    #[test]
    fn a_key_with_a_newline_is_read_over_all_its_lines() {
        let text = life_on_several_lines();
        for end in 0..=text.len() {
            let log = log(&text[..end]);
            assert!(log.named().all(|lock| lock.key == "dir\nx" && lock.path == "bkt/dir\nx" && !lock.contradicted));
        }
        let whole = log(&text);
        assert!(whole.locks.len() == 1 && whole.named().next().unwrap().progress.is_gone() && whole.unfinished() == 0);
        let upload = text[..text.find("Attempting to unlock").unwrap()].rfind("2026").unwrap();
        assert!(log(&text[..upload]).named().next().unwrap().progress.is_writing());
    }

    /// A reader that resumes starts at the record that is not complete.
    #[test]
    fn a_reader_that_goes_on_reads_an_unfinished_record_again() {
        let text = life_on_several_lines();
        for end in 0..=text.len() {
            let first = log(&text[..end]);
            let from = end - usize::try_from(first.unfinished()).unwrap();
            let mut second: Log = serde_json::from_str(&serde_json::to_string(&first).unwrap()).unwrap();
            second.read(&text.as_bytes()[from..]);
            assert_eq!(second.locks, log(&text).locks, "{end}");
        }
    }

    /// A provisioner may write any text between the lines of a record. The next record must still be parsed.
    #[test]
    fn a_record_that_is_not_whole_swallows_nothing() {
        let text = life_on_several_lines();
        let begun = &text[..text.find("  tf_backend.lock.path").unwrap()];
        for junk in ["", "junk\n", "\n"] {
            let other = "11111111-d70c-4132-39e0-d2abba1b3077";
            let log = log(&[begun, junk, &asking(8, other, "r2")].concat());
            assert!(log.named().any(|lock| lock.id == other && lock.key == "dir/prod.tfstate"), "{junk:?}");
        }
    }

    #[test]
    fn a_log_read_in_pieces_is_the_same_log() {
        let text = whole_life();
        for size in 1..200 {
            let mut pieces = Log::default();
            text.as_bytes().chunks(size).for_each(|piece| pieces.read(piece));
            assert_eq!(pieces, log(&text), "pieces of {size}");
        }
    }

    #[test]
    fn an_upload_is_under_way_until_the_unlock_begins() {
        let until = |text: &str| {
            log(&whole_life()[..whole_life().find(text).unwrap()]).named().next().unwrap().progress.is_writing()
        };
        assert!(!until("2026-11-23T01:46:10.651Z"));
        assert!(until("2026-11-23T01:46:11"));
        assert!(!until("2026-11-23T01:46:12"));
    }

    #[test]
    fn asking_again_is_the_same_lock_with_one_more_request() {
        let log = log(&[asking(7, ID, "r1"), asking(8, ID, "r2"), locked(8, ID, "r2")].concat());
        assert_eq!(log.named().count(), 1);
        assert!(!log.named().next().unwrap().contradicted);
        assert!(log.named().next().unwrap().progress.held.is_some());
    }

    #[test]
    fn an_answer_to_a_request_that_was_never_made_is_a_contradiction() {
        assert!(log(&[asking(7, ID, "r1"), locked(8, ID, "r9")].concat()).named().next().unwrap().contradicted);
        let other = asking(8, ID, "r2").replace("who=root@vm", "who=anna@vm");
        assert!(log(&[asking(7, ID, "r1"), other].concat()).named().next().unwrap().contradicted);
        assert!(
            log(&[asking(7, ID, "r1"), locked(8, ID, "r1"), asking(9, ID, "r2")].concat())
                .named()
                .next()
                .unwrap()
                .contradicted
        );
    }

    #[test]
    fn locked_without_asking_is_no_lock() {
        assert!(log(&locked(8, ID, "r1")).locks.is_empty());
    }

    #[test]
    fn a_short_or_empty_id_is_no_lock() {
        for id in ["", "1edeca", "*", "5e75cb05-d70c-4132-39e0-d2abba1b307"] {
            assert!(log(&asking(7, id, "r1")).locks.is_empty(), "{id:?}");
        }
    }

    #[test]
    fn time_that_runs_backwards_is_seen_and_swapped_neighbours_are_not() {
        assert!(log(&[asking(9, ID, "r1"), locked(7, ID, "r1")].concat()).disordered);
        assert!(!log(&[asking(9, ID, "r1"), locked(8, ID, "r1")].concat()).disordered);
    }

    /// A provisioner can append a record with any time to the log.
    #[test]
    fn no_time_in_a_log_panics() {
        for time in [Timestamp::MIN, Timestamp::MAX] {
            let first = asking(7, ID, "r1").replace("2026-11-23T01:46:07.593Z", &time.to_string());
            let log = log(&[first.clone(), locked(8, ID, "r1"), first].concat());
            assert!(log.disordered && log.named().next().unwrap().progress.asked == time);
        }
    }

    #[test]
    fn a_line_without_end_is_skipped_and_the_next_is_read() {
        let text = format!("{}\n{}", "x".repeat(1 << 20), asking(7, ID, "r1"));
        assert_eq!(log(&text).locks.len(), 1);
    }

    #[test]
    fn a_terraform_that_was_told_not_to_lock_is_known() {
        let line =
            |word: &str| format!("2026-11-23T01:46:07.5Z [INFO]  CLI command args: []string{{\"plan\", \"{word}\"}}\n");
        for (word, disabled) in
            [("-lock=false", true), ("--lock=0", true), ("-lock=true", false), ("-lock-timeout=0", false)]
        {
            assert_eq!(log(&line(word)).locking_disabled, disabled, "{word}");
        }
    }

    #[test]
    fn a_long_line_means_the_same_in_whatever_pieces_it_comes() {
        for words in [10, 6000, 7200, 8000, 9000] {
            let line = format!(
                "2026-11-23T01:46:07.5Z [INFO]  CLI command args: []string{{\"plan\", {}\"-lock=false\"}}\n",
                "\"-target\", ".repeat(words),
            );
            let whole = log(&line);
            assert_eq!(whole.locking_disabled, line.len() <= MAX_LINE_BYTES, "{}", line.len());
            for at in [1, line.len() / 3, MAX_LINE_BYTES - 1, MAX_LINE_BYTES, line.len() - 1] {
                let at = at.min(line.len());
                let mut pieces = Log::default();
                pieces.read(&line.as_bytes()[..at]);
                pieces.read(&line.as_bytes()[at..]);
                assert_eq!(json(&pieces), json(&whole), "cut at {at} of {}", line.len());
            }
        }
    }

    fn life_of(number: usize) -> String {
        whole_life().replace(ID, &id_of(number))
    }

    pub(super) fn id_of(number: usize) -> String {
        format!("{number:08x}-d70c-4132-39e0-d2abba1b3077")
    }

    fn json(log: &Log) -> String {
        serde_json::to_string(log).unwrap()
    }

    #[test]
    fn of_thousands_of_locks_that_were_given_back_few_are_kept_and_the_next_is_believed() {
        let mut log = log(&(1..=1000).map(life_of).collect::<String>());
        assert!(log.named().count() == UNLOCKED_KEPT && !log.may_hold() && !log.excessive);
        assert!(json(&log).len() < 1 << 16, "{}", json(&log).len());
        log.read(asking(13, ID, "r1").as_bytes());
        let unreleased: Vec<_> = log.unreleased().collect();
        assert!(unreleased.len() == 1 && unreleased[0].id == ID && !unreleased[0].contradicted);
    }

    #[test]
    fn a_late_record_of_a_lock_that_was_given_back_does_not_bring_it_back() {
        let whole: String = (1..=100).map(life_of).collect();
        for number in [1, 50, 84, 85, 100] {
            let id = id_of(number);
            let late = [asking(13, &id, "r1"), locked(13, &id, "r1")].concat();
            for again in [false, true] {
                let mut log = log(&whole);
                if again {
                    // Another process resumes from the serialized log.
                    log = serde_json::from_str(&json(&log)).unwrap();
                }
                log.read(locked(13, &id, "r1").as_bytes());
                assert!(!log.may_hold());
                log.read(late.as_bytes());
                assert!(log.unreleased().all(|lock| lock.contradicted), "{number}");
                assert!(log.named().filter(|lock| lock.id == id).all(|lock| lock.contradicted), "{number}");
            }
        }
    }

    /// Any text may be written to the log. The part that is kept must be no longer than the guardian and a recovery can
    /// read.
    #[test]
    fn what_is_kept_of_a_log_is_never_longer_than_can_be_read() {
        let control = "\u{1}".repeat(4_000);
        let forged: [Box<dyn Fn(usize) -> String>; 7] = [
            Box::new(|number| asking(7, &id_of(number), "r")),
            Box::new(|number| asking(7, &id_of(number), &control)),
            Box::new(|number| asking(7, ID, &format!("{number}{control}"))),
            Box::new(|number| asking(7, &id_of(number), "r").replace("dir/prod", &control)),
            Box::new(life_of),
            Box::new(|number| {
                let time = "2026-11-23T01:46:07.593Z [INFO]  backend/local:";
                format!(
                    "{time} requesting state lock for workspace \"{number}{control}\"\n\
                         {time} reading remote state for workspace \"x\"\n"
                )
            }),
            Box::new(|number| {
                format!(
                    "2026-11-23T01:46:07.593Z [DEBUG] backend-s3: HTTP Request Sent: aws.s3.bucket=b \
                         aws.s3.key=\"{number}{control}.tflock\" rpc.method=PutObject\n"
                )
            }),
        ];
        for (kind, forge) in forged.iter().enumerate() {
            for program in ["Terraform", "OpenTofu"] {
                let mut log = log(&format!("2026-11-23T01:46:07.565Z [INFO]  {program} version: 1.11.4\n"));
                log.read(asking(7, ID, "r1").as_bytes());
                for number in 1..=270 {
                    log.read(forge(number).as_bytes());
                }
                assert!(json(&log).len() < JSON_LIMIT, "{kind} {program}: {}", json(&log).len());
                assert!(log.named().any(|lock| lock.id == ID), "{kind} {program}: the first is kept");
            }
        }
        let mut all = Log::default();
        for forge in &forged {
            (1..=60).for_each(|number| all.read(forge(number).as_bytes()));
        }
        all.gone.extend((0..=UNLOCKED_LIMIT).map(|number| u32::MAX - u32::try_from(number).unwrap()));
        (1000..=1100).for_each(|number| all.read(life_of(number).as_bytes()));
        assert!(all.excessive && json(&all).len() < JSON_LIMIT, "{}", json(&all).len());
    }

    #[test]
    fn a_log_that_names_more_locks_than_terraform_takes_is_not_believed() {
        for (count, believed) in [(UNRELEASED_LIMIT, true), (UNRELEASED_LIMIT + 1, false)] {
            let log = log(&(1..=count).map(|number| asking(7, &id_of(number), "r")).collect::<String>());
            assert!(log.excessive != believed && log.unreleased().count() == UNRELEASED_LIMIT);
        }
        for (count, believed) in [(UNLOCKED_KEPT + 1, true), (UNLOCKED_KEPT + 2, false)] {
            let gone = (1..UNLOCKED_LIMIT).map(|number| u32::MAX - u32::try_from(number).unwrap()).collect();
            let mut log = Log { gone, ..Log::default() };
            (1..=count).for_each(|number| log.read(life_of(number).as_bytes()));
            assert_eq!(log.excessive, !believed, "{count}");
        }
    }

    /// With `-lock-timeout`, terraform repeats the request after at most 16 s.
    #[test]
    fn a_lock_that_was_asked_for_all_day_is_believed() {
        let mut log = Log::default();
        for number in 0..5400 {
            log.read(asking(7, ID, &format!("r{number}")).as_bytes());
        }
        log.read(locked(8, ID, "r5399").as_bytes());
        assert!(!log.named().next().unwrap().contradicted && !log.excessive && json(&log).len() < 2000);
    }

    #[test]
    fn two_locks_of_a_migration_are_two() {
        let other = "11111111-d70c-4132-39e0-d2abba1b3077";
        let log = log(&[asking(7, ID, "r1"), asking(7, other, "r2")].concat());
        assert_eq!(log.unreleased().count(), 2);
    }
}

#[cfg(test)]
#[path = "log_of_other_versions.rs"]
pub(crate) mod other_versions;

#[cfg(test)]
#[path = "generated_logs.rs"]
mod generated_logs;
