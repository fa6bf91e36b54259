//! Whether a lock that stands is the one that our dead run took.
//!
//! The log proposes, the lock must agree. Anybody can put a line into the log: core logs an API's error text raw, and
//! every provisioner can append to the file. So every field must be the same, the holder must be who we are, the times
//! must fit, and nothing in the log may contradict itself. A doubt keeps the lock.

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use crate::terraform::lock_info::{self, LockInfo};
use crate::terraform::log::{Log, RecordedLock};

/// What is known about the run that recorded a lock.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Run {
    /// `user@host`, as a terraform of ours writes it.
    pub(crate) who: String,
    /// When terraform was started, by this host's clock.
    pub(crate) started: Timestamp,
    /// The times in its log run backwards.
    pub(crate) disordered: bool,
    /// It was told to take no lock (`-lock=false`).
    pub(crate) locking_disabled: bool,
}

impl Run {
    /// What `log` tells of a run that this user has started on this host at `started`.
    pub(crate) fn recorded(started: Timestamp, log: &Log) -> Self {
        Self { who: lock_info::who(), started, disordered: log.disordered, locking_disabled: log.locking_disabled }
    }
}

/// What a standing lock is to us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The very lock that our run took.
    Ours,
    /// Another ID: somebody else's.
    Anothers,
    /// Our ID, and something that does not fit: which is said, and the lock is kept.
    Doubt(&'static str),
}

/// The log's times are cut to milliseconds, so a lock may seem made up to one after the line that tells of it.
const ROUNDING: SignedDuration = SignedDuration::from_millis(1);

/// Judges the lock that stands, `standing`, by what the log recorded.
pub(crate) fn judge(recorded: &RecordedLock, standing: &LockInfo, run: &Run) -> Verdict {
    if standing.id != recorded.id {
        return Verdict::Anothers;
    }
    let created = standing.created();
    let conditions = [
        (!recorded.contradicted, "the log of the run contradicts itself"),
        (!run.disordered, "the times in the log of the run go backwards: was the clock set?"),
        (
            !run.locking_disabled || recorded.operation == "init",
            "the run was told to take no lock (-lock=false), and its log names one",
        ),
        (standing.operation == recorded.operation, "its Operation is not the one that the log names"),
        (standing.who == recorded.who, "its Who is not the one that the log names"),
        (standing.version == recorded.version, "its Version is not the one that the log names"),
        (standing.path == recorded.path, "its Path is not the one that the log names"),
        (standing.path == format!("{}/{}", recorded.bucket, recorded.key), "its Path is not the place where it stands"),
        (standing.who == run.who, "its Who is not this user on this host"),
        (created.is_some(), "its Created is not a time"),
        (created.is_none_or(|created| created >= run.started), "it was created before this run began"),
        (
            created.is_none_or(|created| created <= recorded.asked + ROUNDING),
            "it was created after this run asked for it",
        ),
    ];
    match conditions.iter().find(|(holds, _)| !holds) {
        Some((_, reason)) => Verdict::Doubt(reason),
        None => Verdict::Ours,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terraform::log::{Log, tests::ID, tests::lock_line};

    fn recorded() -> RecordedLock {
        let mut log = Log::default();
        log.read(lock_line(7, "Attempting to lock remote state (DynamoDB only)...", ID, "r").as_bytes());
        log.locks.remove(0)
    }

    fn standing() -> LockInfo {
        LockInfo {
            id: ID.into(),
            operation: "OperationTypeApply".into(),
            who: "root@vm".into(),
            version: "1.11.4".into(),
            created: "2026-11-23T01:46:07.5931Z".into(),
            path: "bkt/dir/prod.tfstate".into(),
        }
    }

    fn run() -> Run {
        Run {
            who: "root@vm".into(),
            started: "2026-11-23T01:46:07Z".parse().unwrap(),
            disordered: false,
            locking_disabled: false,
        }
    }

    #[test]
    fn the_lock_that_agrees_in_everything_is_ours() {
        assert_eq!(judge(&recorded(), &standing(), &run()), Verdict::Ours);
    }

    #[test]
    fn another_id_is_anothers_whatever_else_agrees() {
        let other = LockInfo { id: "11111111-d70c-4132-39e0-d2abba1b3077".into(), ..standing() };
        assert_eq!(judge(&recorded(), &other, &run()), Verdict::Anothers);
    }

    #[test]
    fn any_one_thing_that_does_not_fit_is_a_doubt() {
        type Change = (&'static str, fn(&mut RecordedLock, &mut LockInfo, &mut Run));
        let changes: &[Change] = &[
            ("operation", |_, lock, _| lock.operation = "init".into()),
            ("who", |_, lock, _| lock.who = "anna@vm".into()),
            ("version", |_, lock, _| lock.version = "1.5.7".into()),
            ("path", |_, lock, _| lock.path = "bkt/other".into()),
            ("no path", |_, lock, _| lock.path = String::new()),
            ("created before", |_, lock, _| lock.created = "2026-11-23T01:46:06.9Z".into()),
            ("created after", |_, lock, _| lock.created = "2026-11-23T01:46:07.6Z".into()),
            ("created is no time", |_, lock, _| lock.created = "yesterday".into()),
            ("recorded operation", |recorded, _, _| recorded.operation = "init".into()),
            ("recorded who", |recorded, _, _| recorded.who = "anna@vm".into()),
            ("recorded version", |recorded, _, _| recorded.version = String::new()),
            ("recorded path", |recorded, _, _| recorded.path = "bkt/other".into()),
            ("recorded bucket", |recorded, _, _| recorded.bucket = "other".into()),
            ("recorded key", |recorded, _, _| recorded.key = "other".into()),
            ("contradicted", |recorded, _, _| recorded.contradicted = true),
            ("disordered", |_, _, run| run.disordered = true),
            ("told to take no lock", |_, _, run| run.locking_disabled = true),
            ("another host", |_, _, run| run.who = "root@other".into()),
            ("started later", |_, _, run| run.started = "2026-11-23T01:46:08Z".parse().unwrap()),
        ];
        for (name, change) in changes {
            let (mut recorded, mut lock, mut run) = (recorded(), standing(), run());
            change(&mut recorded, &mut lock, &mut run);
            assert!(matches!(judge(&recorded, &lock, &run), Verdict::Doubt(_)), "{name}");
        }
    }
}
