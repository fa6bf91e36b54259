//! A lock in terraform's log: its identity and its progress from the request to the release.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::lock_info::LockInfo;

/// The parts of a lock: a DynamoDB item, a `.tflock` object, or both.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct LockParts {
    /// A `.tflock` object.
    pub(crate) s3: bool,
    /// A DynamoDB item.
    pub(crate) dynamodb: bool,
}

/// The progress of a lock after its acquisition. [`Progress`] has the times of the request and of the acquisition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Neither a write of the state nor the release has begun, as far as the log shows.
    #[default]
    Open,
    /// Terraform has begun to write the state. The write may still be in flight.
    Writing,
    /// Terraform has begun to release the lock. Its deletes may still be in flight, and they are unconditional.
    Unlocking,
    /// Terraform has logged that every part is deleted, or each delete has a successful response.
    Gone,
}

/// The progress of a lock, from the request to the release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    /// When terraform first requested the lock. With `-lock-timeout`, it repeats the request with the same ID.
    pub(crate) asked: Timestamp,
    /// When terraform acquired the lock, or continued as if it had. `None` if the log shows neither.
    pub(crate) held: Option<Timestamp>,
    pub(crate) phase: Phase,
}

impl Progress {
    /// Returns the progress of a lock that was requested at `at`.
    pub(crate) fn asked(at: Timestamp) -> Self {
        Self { asked: at, held: None, phase: Phase::Open }
    }

    /// Records that the lock was acquired at `at`. A later call does not change the time.
    pub(crate) fn grant(&mut self, at: Timestamp) {
        self.held = self.held.or(Some(at));
    }

    /// Records that a write of the state has begun. A write that begins after the unlock is ignored, because it is not
    /// protected by this lock.
    pub(crate) fn begin_write(&mut self) {
        if self.phase < Phase::Unlocking {
            self.phase = Phase::Writing;
        }
    }

    /// Records that the release has begun. Terraform releases a lock after all its writes, so no write is in flight any
    /// more.
    pub(crate) fn begin_unlock(&mut self) {
        self.phase = self.phase.max(Phase::Unlocking);
    }

    /// Records that every part of the lock is deleted.
    pub(crate) fn finish(&mut self) {
        self.phase = Phase::Gone;
    }

    /// Whether terraform has not yet begun to release the lock.
    pub(crate) fn is_before_unlock(self) -> bool {
        self.phase < Phase::Unlocking
    }

    /// Whether terraform has begun to release the lock, and the log does not show the end of the release.
    pub(crate) fn is_unlocking(self) -> bool {
        self.phase == Phase::Unlocking
    }

    /// Whether terraform has begun to write the state, and has not yet begun to release the lock.
    #[cfg(test)]
    pub(crate) fn is_writing(self) -> bool {
        self.phase == Phase::Writing
    }

    /// Whether every part of the lock is deleted.
    pub(crate) fn is_gone(self) -> bool {
        self.phase == Phase::Gone
    }

    /// Whether a write or a delete may still be in flight.
    pub(crate) fn may_be_writing(self) -> bool {
        matches!(self.phase, Phase::Writing | Phase::Unlocking)
    }
}

/// A lock whose ID is in the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RecordedLock {
    /// The lock ID.
    pub(crate) id: String,
    /// The operation, for example `OperationTypeApply`.
    pub(crate) operation: String,
    /// The holder: `user@host`.
    pub(crate) who: String,
    /// Terraform's version.
    pub(crate) version: String,
    /// The path of the state: `bucket/key`.
    pub(crate) path: String,
    /// The bucket of the state.
    pub(crate) bucket: String,
    /// The key of the state.
    pub(crate) key: String,
    /// The parts that terraform requested.
    #[serde(rename = "halves")]
    pub(crate) parts: LockParts,
    #[serde(flatten, with = "progress_of_named")]
    pub(crate) progress: Progress,
    /// The IDs of the requests for the lock.
    pub(super) requests: Vec<String>,
    /// Whether the log contradicts itself about this ID: two records disagree, or a response belongs to a request that
    /// was never made. Then the lock is not trusted.
    pub(crate) contradicted: bool,
    /// The parts whose deletes have a successful response.
    #[serde(default)]
    pub(super) gone: LockParts,
}

impl RecordedLock {
    /// Whether terraform has repeated its request for the lock. It does so only with `-lock-timeout`, and only after a
    /// refusal.
    pub(crate) fn was_requested_again(&self) -> bool {
        self.requests.len() > 1
    }

    /// Whether terraform had acquired the lock and has not begun to release it. Then its operation is not over.
    pub(crate) fn is_in_use(&self) -> bool {
        self.progress.held.is_some() && self.progress.is_before_unlock()
    }

    /// Returns a lock that was requested at `at` and is not known to be acquired. This is for a lock that `tf` itself
    /// requests, and for a logged request that contains the lock.
    pub(crate) fn asked_for(info: &LockInfo, bucket: &str, key: &str, parts: LockParts, at: Timestamp) -> Self {
        Self {
            id: info.id.clone(),
            operation: info.operation.clone(),
            who: info.who.clone(),
            version: info.version.clone(),
            path: info.path.clone(),
            bucket: bucket.to_owned(),
            key: key.to_owned(),
            parts,
            progress: Progress::asked(at),
            requests: Vec::new(),
            contradicted: false,
            gone: LockParts::default(),
        }
    }

    /// Returns a lock that is held since `at`. This is for a lock whose ID `tf` has found by reading the stored lock.
    pub(crate) fn held(info: &LockInfo, bucket: &str, key: &str, parts: LockParts, at: Timestamp) -> Self {
        let mut lock = Self::asked_for(info, bucket, key, parts, at);
        lock.progress.grant(at);
        lock
    }

    /// Records that the delete of one part has a successful response.
    pub(super) fn part_is_gone(&mut self, part: Part) {
        match part {
            Part::Object => self.gone.s3 = true,
            Part::Item => self.gone.dynamodb = true,
        }
        if (self.gone.s3 || !self.parts.s3) && (self.gone.dynamodb || !self.parts.dynamodb) {
            self.progress.finish();
        }
    }

    fn length_of_text(&self) -> usize {
        let fixed = [&self.id, &self.operation, &self.who, &self.version, &self.path, &self.bucket, &self.key];
        fixed.into_iter().chain(&self.requests).map(String::len).sum()
    }
}

/// One part of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// The `.tflock` object.
    Object,
    /// The DynamoDB item.
    Item,
}

/// A lock that terraform requested, but whose ID is not in the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UnnamedLock {
    /// The facts that identify the lock.
    #[serde(rename = "mark")]
    pub(crate) identity: LockIdentity,
    #[serde(flatten, with = "progress_of_unnamed")]
    pub(crate) progress: Progress,
}

impl UnnamedLock {
    /// Returns a lock that was requested at `at` and is not known to be acquired.
    pub(super) fn asked_for(identity: LockIdentity, at: Timestamp) -> Self {
        Self { identity, progress: Progress::asked(at) }
    }

    /// Whether the log shows only that the lock was requested. It shows neither its text nor that it was acquired.
    pub(crate) fn is_only_asked_for(&self) -> bool {
        self.progress.held.is_none() && self.is_of_workspace()
    }

    /// Whether only the records of the local backend mention the lock.
    pub(crate) fn is_of_workspace(&self) -> bool {
        matches!(self.identity, LockIdentity::Workspace(_))
    }

    /// Whether both locks are from the same request.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        (&self.identity, self.progress.asked) == (&other.identity, other.progress.asked)
    }

    fn length_of_text(&self) -> usize {
        match &self.identity {
            LockIdentity::Object { bucket, key, checksum } => {
                bucket.len() + key.len() + checksum.as_ref().map_or(0, String::len)
            }
            LockIdentity::Workspace(name) => name.len(),
        }
    }
}

/// The facts that identify an [`UnnamedLock`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum LockIdentity {
    /// The lock was put into S3 as an object.
    Object {
        /// The bucket.
        bucket: String,
        /// The key of the state.
        key: String,
        /// The SHA-256 of the lock's text, in base 64. `None` if terraform was configured to send no checksum
        /// (`skip_s3_checksum`).
        checksum: Option<String>,
    },
    /// The lock of this workspace, which the local backend's two records name. No other fact about the lock is known.
    Workspace(String),
}

/// A lock in a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LoggedLock {
    /// The log contains the lock's ID.
    Named(RecordedLock),
    /// The log does not contain the lock's ID.
    Unnamed(UnnamedLock),
}

impl LoggedLock {
    /// Returns the lock if the log contains its ID, otherwise `None`.
    pub(crate) fn named(&self) -> Option<&RecordedLock> {
        match self {
            Self::Named(lock) => Some(lock),
            Self::Unnamed(_) => None,
        }
    }

    /// Returns the same as [`LoggedLock::named`], as a mutable reference.
    pub(super) fn named_mut(&mut self) -> Option<&mut RecordedLock> {
        match self {
            Self::Named(lock) => Some(lock),
            Self::Unnamed(_) => None,
        }
    }

    /// Returns the lock if the log does not contain its ID, otherwise `None`.
    pub(crate) fn unnamed(&self) -> Option<&UnnamedLock> {
        match self {
            Self::Named(_) => None,
            Self::Unnamed(lock) => Some(lock),
        }
    }

    pub(crate) fn progress(&self) -> Progress {
        match self {
            Self::Named(lock) => lock.progress,
            Self::Unnamed(lock) => lock.progress,
        }
    }

    pub(super) fn progress_mut(&mut self) -> &mut Progress {
        match self {
            Self::Named(lock) => &mut lock.progress,
            Self::Unnamed(lock) => &mut lock.progress,
        }
    }

    /// Whether this may be the lock of the state `key` in `bucket`. True for every state if only the lock's workspace
    /// is known.
    pub(super) fn may_lock(&self, bucket: &str, key: &str) -> bool {
        match self {
            Self::Named(lock) => lock.bucket == bucket && lock.key == key,
            Self::Unnamed(lock) => match &lock.identity {
                LockIdentity::Object { bucket: its, key: own, .. } => its == bucket && own == key,
                LockIdentity::Workspace(_) => true,
            },
        }
    }

    /// Whether this is the lock of the state at `path`, which is `bucket/key`. False if only the lock's workspace is
    /// known.
    pub(super) fn is_at(&self, path: &str) -> bool {
        match self {
            Self::Named(lock) => lock.path == path,
            Self::Unnamed(lock) => match &lock.identity {
                LockIdentity::Object { bucket, key, .. } => format!("{bucket}/{key}") == path,
                LockIdentity::Workspace(_) => false,
            },
        }
    }

    /// Returns the total length of the lock's text, in bytes.
    pub(super) fn length_of_text(&self) -> usize {
        match self {
            Self::Named(lock) => lock.length_of_text(),
            Self::Unnamed(lock) => lock.length_of_text(),
        }
    }
}

/// The phase of a lock in the form in which version 0.1 stored it on disk: three flags.
#[derive(Serialize, Deserialize)]
struct Flags {
    unlocking: bool,
    unlocked: bool,
    uploading: bool,
}

impl From<Phase> for Flags {
    fn from(phase: Phase) -> Self {
        Self {
            unlocking: phase >= Phase::Unlocking,
            unlocked: phase == Phase::Gone,
            uploading: phase == Phase::Writing,
        }
    }
}

impl From<Flags> for Phase {
    fn from(flags: Flags) -> Self {
        match flags {
            Flags { unlocked: true, .. } => Self::Gone,
            Flags { unlocking: true, .. } => Self::Unlocking,
            Flags { uploading: true, .. } => Self::Writing,
            Flags { .. } => Self::Open,
        }
    }
}

/// The form of a [`RecordedLock`]'s progress on disk.
mod progress_of_named {
    use super::{Deserialize, Flags, Progress, Serialize, Timestamp};

    #[derive(Serialize, Deserialize)]
    struct OnDisk {
        asked: Timestamp,
        locked: Option<Timestamp>,
        #[serde(flatten)]
        flags: Flags,
    }

    pub(super) fn serialize<S: serde::Serializer>(progress: &Progress, serializer: S) -> Result<S::Ok, S::Error> {
        let Progress { asked, held, phase } = *progress;
        OnDisk { asked, locked: held, flags: phase.into() }.serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Progress, D::Error> {
        let OnDisk { asked, locked, flags } = OnDisk::deserialize(deserializer)?;
        Ok(Progress { asked, held: locked, phase: flags.into() })
    }
}

/// The form of an [`UnnamedLock`]'s progress on disk.
mod progress_of_unnamed {
    use super::{Deserialize, Flags, Progress, Serialize, Timestamp};

    #[derive(Serialize, Deserialize)]
    struct OnDisk {
        asked: Timestamp,
        granted: Option<Timestamp>,
        #[serde(flatten)]
        flags: Flags,
    }

    pub(super) fn serialize<S: serde::Serializer>(progress: &Progress, serializer: S) -> Result<S::Ok, S::Error> {
        let Progress { asked, held, phase } = *progress;
        OnDisk { asked, granted: held, flags: phase.into() }.serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Progress, D::Error> {
        let OnDisk { asked, granted, flags } = OnDisk::deserialize(deserializer)?;
        Ok(Progress { asked, held: granted, phase: flags.into() })
    }
}

/// The form of a log's locks on disk. Since version 0.1, the named locks and the unnamed locks are in separate lists.
pub(super) mod two_lists {
    use super::{Deserialize, LoggedLock, RecordedLock, Serialize, UnnamedLock};

    #[derive(Serialize)]
    struct Written<'a> {
        locks: Vec<&'a RecordedLock>,
        unnamed: Vec<&'a UnnamedLock>,
    }

    #[derive(Deserialize)]
    struct Read {
        locks: Vec<RecordedLock>,
        #[serde(default)]
        unnamed: Vec<UnnamedLock>,
    }

    pub(crate) fn serialize<S: serde::Serializer>(locks: &[LoggedLock], serializer: S) -> Result<S::Ok, S::Error> {
        let (named, unnamed) = (LoggedLock::named, LoggedLock::unnamed);
        let written = Written {
            locks: locks.iter().filter_map(named).collect(),
            unnamed: locks.iter().filter_map(unnamed).collect(),
        };
        written.serialize(serializer)
    }

    pub(crate) fn deserialize<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<LoggedLock>, D::Error> {
        let Read { locks, unnamed } = Read::deserialize(deserializer)?;
        Ok(locks.into_iter().map(LoggedLock::Named).chain(unnamed.into_iter().map(LoggedLock::Unnamed)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PHASES: [Phase; 4] = [Phase::Open, Phase::Writing, Phase::Unlocking, Phase::Gone];

    #[test]
    fn a_lock_never_goes_back_from_its_unlock() {
        for phase in PHASES {
            let after = |step: fn(&mut Progress)| {
                let mut progress = Progress { phase, ..Progress::asked(Timestamp::UNIX_EPOCH) };
                step(&mut progress);
                progress.phase
            };
            assert_eq!(after(Progress::begin_write), if phase < Phase::Unlocking { Phase::Writing } else { phase });
            assert_eq!(after(Progress::begin_unlock), phase.max(Phase::Unlocking));
            assert_eq!(after(Progress::finish), Phase::Gone);
        }
    }

    #[test]
    fn each_phase_is_read_as_it_was_written_and_every_set_of_flags_is_a_phase() {
        for phase in PHASES {
            assert_eq!(Phase::from(Flags::from(phase)), phase);
        }
        for bits in 0..8_u8 {
            let bit = |place: u8| bits & (1 << place) != 0;
            let phase = Phase::from(Flags { uploading: bit(0), unlocking: bit(1), unlocked: bit(2) });
            let expected = PHASES[usize::try_from(8 - bits.leading_zeros()).unwrap()];
            assert_eq!(phase, expected, "{bits:b}");
        }
    }
}
