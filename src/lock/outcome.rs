//! The result of a release.

use std::time::Duration;

use super::digest::Comparison;
use crate::aws::failure::Failure;
use crate::lease::record::Claim;

/// The result of a release.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// No lock of the run exists.
    Absent {
        /// Another run's lock at the same location. `None` if there is none.
        anothers: Option<AnothersLock>,
        /// Whether no part of a lock can exist at the location, because the table or bucket does not exist, or because
        /// the table has another key.
        excluded: bool,
    },
    /// The lock existed, and was released.
    Released(Released),
    /// The lock exists or may exist, and was not released.
    Kept {
        /// The reason, as text for a message.
        reason: String,
        /// The kind of reason. It decides what `tf` does and reports next.
        because: Because,
    },
}

/// Another run's lock at the location of a lock that does not exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AnothersLock {
    pub(crate) id: String,
    /// Whether other runs' locks are at the location of every part. If not, terraform may not have been refused: the
    /// other run may be about to take the missing part, and be refused itself because this run's request lands first.
    pub(crate) is_complete: bool,
}

/// Why a lock was not released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Because {
    /// The lock is not proven to belong to the run, its location is unknown, another run has recorded it, or its
    /// backend has a setting that `tf` does not support. A later attempt has the same result.
    Doubt,
    /// The user has set `TFW_RELEASE=never`, so `tf` only reports locks. The lock stays in the journal until it no
    /// longer exists.
    Never,
    /// A process of the run is still running. A later attempt may succeed after that process has exited.
    StillRunning {
        /// Whether the reason is about more than one process.
        several: bool,
    },
    /// It is unknown whether a process of the run is still running, because there is no process list.
    Unseen,
    /// A later attempt may succeed. For example, two reads had different results.
    NotYet,
    /// A request failed for a reason other than a missing permission, for example because the service did not respond.
    NoAnswer,
    /// No credentials were available. Each new request for credentials may require an action by a person.
    NoCredentials,
    /// The credentials do not permit this action, which is named as in an IAM policy.
    Denied(&'static str),
    /// The lock's location holds something that is not a lock.
    NoLock,
    /// The lock belongs to another run, which is or may be alive. A later attempt has the same result.
    Claimed,
    /// The settings of the backend or of the profile are incomplete, or are not supported, so no service can be
    /// reached. A person can change that.
    Settings,
    /// The lock was not found, but the current credentials may belong to another account than those of the run.
    OtherAccount,
}

impl Because {
    /// Whether `tf` keeps the lock on purpose: an automatic release would be wrong, now and later. False if `tf` would
    /// have released the lock, but could not.
    pub(crate) fn is_on_purpose(self) -> bool {
        match self {
            Self::Doubt | Self::Never | Self::StillRunning { .. } | Self::Unseen | Self::NoLock | Self::Claimed => true,
            Self::NotYet
            | Self::NoAnswer
            | Self::NoCredentials
            | Self::Denied(_)
            | Self::Settings
            | Self::OtherAccount => false,
        }
    }
}

impl Outcome {
    /// Whether the lock was kept on purpose ([`Because::is_on_purpose`]).
    pub(crate) fn is_kept_on_purpose(&self) -> bool {
        matches!(self, Self::Kept { because, .. } if because.is_on_purpose())
    }

    /// Returns the outcome "not released, because of `reason`; a later attempt has the same result"
    /// ([`Because::Doubt`]).
    pub(crate) fn kept(reason: impl Into<String>) -> Self {
        Self::Kept { reason: reason.into(), because: Because::Doubt }
    }

    /// Returns the outcome "not released, because of `reason`; a later attempt may succeed" ([`Because::NotYet`]).
    pub(crate) fn later(reason: impl Into<String>) -> Self {
        Self::Kept { reason: reason.into(), because: Because::NotYet }
    }

    /// Returns the outcome "not released, because a request failed". `part` is appended to the reason.
    pub(super) fn failed(failure: &Failure, part: &str) -> Self {
        let because = failure.denied().map_or(Because::NoAnswer, Because::Denied);
        Self::Kept { reason: format!("{failure}{part}"), because }
    }
}

/// The facts that are reported about a released lock.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Released {
    /// The `Created` field of the lock. `None` if it is not a time.
    pub(crate) created: Option<jiff::Timestamp>,
    /// The result of the wait for a write. `None` if no wait was necessary.
    pub(crate) write: Option<Write>,
    /// The comparison of the state with its digest, if they do not match. `None` if they match or could not be
    /// compared.
    pub(crate) digest_mismatch: Option<Comparison>,
    /// Whether the log shows no response to the lock request, and one of the lock's two parts was never found. The
    /// request for that part may still land.
    pub(crate) is_partial: bool,
    /// Another host had claimed the lock because its lease had lapsed, or a person had. That host reports the release
    /// too. `None` if the lock was not claimed.
    pub(crate) claim: Option<Claim>,
}

/// The result of the wait for a write that may have been in flight when terraform died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Write {
    /// The state or its digest changed during the wait.
    Landed,
    /// Neither the state nor its digest changed while `tf` waited.
    Quiet { waited: Duration },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aws::failure::ServiceAnswer;

    #[test]
    fn a_failed_request_may_succeed_later_unless_a_permission_is_missing() {
        let answered = |code| {
            let answer = ServiceAnswer { code, message: Some("no"), status: None };
            Failure::of_answer("S3", "s3:DeleteObject", answer, "")
        };
        for (code, because) in [
            (Some("AccessDenied"), Because::Denied("s3:DeleteObject")),
            (Some("NoSuchBucket"), Because::NoAnswer),
            (Some("SlowDown"), Because::NoAnswer),
            (Some("ExpiredToken"), Because::NoAnswer),
            (Some("InvalidAccessKeyId"), Because::NoAnswer),
            (Some("NotImplemented"), Because::NoAnswer),
            (Some("InvalidRequest"), Because::NoAnswer),
            (None, Because::NoAnswer),
        ] {
            let failure = answered(code);
            let reason = format!("{failure}; the rest");
            assert_eq!(Outcome::failed(&failure, "; the rest"), Outcome::Kept { reason, because }, "{code:?}");
        }
    }
}
