//! A lock in terraform's log: what identifies it, and how far it has progressed.

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

/// How far terraform has progressed with a lock, apart from the request for it and its acquisition.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Nothing more is known.
    #[default]
    Open,
    /// Terraform has begun to write the state. The write may still land.
    Writing,
    /// Terraform has begun to release the lock. Its deletes, which have no condition, may still land.
    Unlocking,
    /// Terraform logged that every part is deleted, or the deletes were answered.
    Gone,
}

/// What terraform has done about a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Progress {
    /// When terraform first requested it. With `-lock-timeout` it requests it again, with the same ID.
    pub(crate) asked: Timestamp,
    /// When terraform acquired the lock, or continued as if it had. `None` if the log does not show it.
    pub(crate) held: Option<Timestamp>,
    pub(crate) phase: Phase,
}

impl Progress {
    /// Returns the progress of a lock that was requested at `at`.
    pub(crate) fn asked(at: Timestamp) -> Self {
        Self { asked: at, held: None, phase: Phase::Open }
    }

    /// Notes that the lock was acquired at `at`. Only the first such time counts.
    pub(crate) fn grant(&mut self, at: Timestamp) {
        self.held = self.held.or(Some(at));
    }

    /// Notes that a write of the state has begun. A write that begins after the unlock is not made under this lock.
    pub(crate) fn begin_write(&mut self) {
        if self.phase < Phase::Unlocking {
            self.phase = Phase::Writing;
        }
    }

    /// Notes that the unlock has begun. All writes are answered by then, because terraform unlocks after them.
    pub(crate) fn begin_unlock(&mut self) {
        self.phase = self.phase.max(Phase::Unlocking);
    }

    /// Notes that every part of the lock is deleted.
    pub(crate) fn finish(&mut self) {
        self.phase = Phase::Gone;
    }

    /// Whether terraform has not yet begun to release the lock.
    pub(crate) fn is_before_unlock(self) -> bool {
        self.phase < Phase::Unlocking
    }

    /// Whether terraform has begun to release the lock, and the log does not show that it is released.
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

    /// Whether a write or a delete may still land.
    pub(crate) fn may_be_writing(self) -> bool {
        matches!(self.phase, Phase::Writing | Phase::Unlocking)
    }
}

/// A lock that the log names by its ID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RecordedLock {
    /// The lock ID.
    pub(crate) id: String,
    /// The operation: `OperationTypeApply`...
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
    /// Whether two records about this ID disagree, or a response belongs to a request that was never made.
    pub(crate) contradicted: bool,
    /// The parts whose deletes were answered.
    #[serde(default)]
    pub(super) gone: LockParts,
}

impl RecordedLock {
    /// Whether terraform had acquired the lock and has not begun to release it, so that its operation is not over.
    pub(crate) fn is_in_use(&self) -> bool {
        self.progress.held.is_some() && self.progress.is_before_unlock()
    }

    /// Returns a lock that is only requested, as if a log had said so. `tf` requests the lock itself, or a logged
    /// request names it.
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

    /// Returns a lock whose ID was found by reading the lock, as if a log had named it.
    pub(crate) fn held(info: &LockInfo, bucket: &str, key: &str, parts: LockParts, at: Timestamp) -> Self {
        let mut lock = Self::asked_for(info, bucket, key, parts, at);
        lock.progress.grant(at);
        lock
    }

    /// Notes that the delete of one part was answered.
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

/// A lock that terraform requested. The log does not name its ID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct UnnamedLock {
    /// What the lock can be identified by.
    #[serde(rename = "mark")]
    pub(crate) identity: LockIdentity,
    #[serde(flatten, with = "progress_of_unnamed")]
    pub(crate) progress: Progress,
}

impl UnnamedLock {
    /// Returns a lock that was requested at `at`.
    pub(super) fn asked_for(identity: LockIdentity, at: Timestamp) -> Self {
        Self { identity, progress: Progress::asked(at) }
    }

    /// Whether it is only known that the lock was requested: not its text, and not whether it was acquired.
    pub(crate) fn is_only_asked_for(&self) -> bool {
        self.progress.held.is_none() && self.is_of_workspace()
    }

    /// Whether only the records of the local backend mention it.
    pub(crate) fn is_of_workspace(&self) -> bool {
        matches!(self.identity, LockIdentity::Workspace(_))
    }

    /// Whether both are about the same request.
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

/// What an [`UnnamedLock`] can be identified by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum LockIdentity {
    /// The lock was put into S3 as an object.
    Object {
        /// The bucket.
        bucket: String,
        /// The key of the state.
        key: String,
        /// The SHA-256 of the lock's text, in base 64. `None` if terraform was told to send none (`skip_s3_checksum`).
        checksum: Option<String>,
    },
    /// The local backend's two records name this workspace. Nothing else is known of the lock.
    Workspace(String),
}

/// A lock in a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LoggedLock {
    /// The log names its ID.
    Named(RecordedLock),
    /// The log does not name its ID.
    Unnamed(UnnamedLock),
}

impl LoggedLock {
    /// Returns the lock if the log names its ID.
    pub(crate) fn named(&self) -> Option<&RecordedLock> {
        match self {
            Self::Named(lock) => Some(lock),
            Self::Unnamed(_) => None,
        }
    }

    /// Like [`LoggedLock::named`], but mutable.
    pub(super) fn named_mut(&mut self) -> Option<&mut RecordedLock> {
        match self {
            Self::Named(lock) => Some(lock),
            Self::Unnamed(_) => None,
        }
    }

    /// Returns the lock if the log does not name its ID.
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

    /// Whether this may be the lock of the state `key` in `bucket`. If only its workspace is known, it may lock any
    /// state.
    pub(super) fn may_lock(&self, bucket: &str, key: &str) -> bool {
        match self {
            Self::Named(lock) => lock.bucket == bucket && lock.key == key,
            Self::Unnamed(lock) => match &lock.identity {
                LockIdentity::Object { bucket: its, key: own, .. } => its == bucket && own == key,
                LockIdentity::Workspace(_) => true,
            },
        }
    }

    /// Whether the lock's parts are at `path`, which is `bucket/key` of the state.
    pub(super) fn is_at(&self, path: &str) -> bool {
        match self {
            Self::Named(lock) => lock.path == path,
            Self::Unnamed(lock) => match &lock.identity {
                LockIdentity::Object { bucket, key, .. } => format!("{bucket}/{key}") == path,
                LockIdentity::Workspace(_) => false,
            },
        }
    }

    /// Returns the length of the text that is kept of the lock, in bytes.
    pub(super) fn length_of_text(&self) -> usize {
        match self {
            Self::Named(lock) => lock.length_of_text(),
            Self::Unnamed(lock) => lock.length_of_text(),
        }
    }
}

/// How far a lock has progressed, as version 0.1 wrote it to disk: a flag for each phase.
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

/// The progress of a [`RecordedLock`] on disk.
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

/// The progress of an [`UnnamedLock`] on disk.
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

/// The locks of a log on disk. Version 0.1 had a list of the locks that the log names, and a list of the others.
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
