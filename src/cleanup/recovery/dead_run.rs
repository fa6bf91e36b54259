//! What the record and the recorder of a dead run say, and how this process reaches AWS as that run did.

use std::path::Path;

use crate::aws::redacted_backend::RedactedBackend;
use crate::cleanup::candidate_backends::{CandidateBackends, is_for_any_workspace};
use crate::cleanup::planned_backends::PlannedBackends;
use crate::cleanup::working_directory;
use crate::journal::recorder::Recorder;
use crate::journal::runs::JournalRecord;
use crate::sys::environment;
use crate::terraform::command_line::logs_its_lock;
use crate::terraform::data_directory::DataDirectory;
use crate::terraform::log::RecordedLock;

/// Changes the environment and the working directory of this process to those of the run of `record`.
pub(super) fn enter(record: &JournalRecord) {
    environment::unset_empty("AWS_");
    for (name, value) in record.surroundings.changes() {
        environment::change(name, value.as_ref());
    }
    working_directory::go(Path::new(&record.directory));
}

/// Whether the run of `record` may have left a lock in a backend other than S3.
pub(super) fn may_have_in_non_s3(record: &JournalRecord) -> bool {
    let may_have = record.log.of_workspaces().next().is_some() || !logs_its_lock(&record.command);
    may_have && record.access.iter().any(RedactedBackend::is_elsewhere)
}

/// Whether all that is left of the dead run of `record` are lock requests that may still land, for locks with unknown
/// IDs.
pub(super) fn has_only_requests(record: &JournalRecord) -> bool {
    record.over && record.log.named().next().is_none() && record.log.unnamed().all(|lock| lock.progress.held.is_none())
}

/// Whether the run of `record` may have taken a lock at a location of `here`, or had the same data directory.
pub(super) fn is_of(record: &JournalRecord, here: &CandidateBackends) -> bool {
    record.log.unreleased().any(|lock| !here.of(lock).is_empty())
        || record.log.unreleased_unnamed().any(|lock| !here.of_unnamed(lock).is_empty())
        || record.data_directory == here.data_directory
}

/// Whether a run may hold a lock. True if the log shows a lock. Also true if nothing of the log was read, because the
/// run was killed before that, or because `tf` cannot read the log. If the run was killed, its recorder may have more
/// of the log than its record, so the recorder is read as well.
pub(super) fn may_hold(record: &JournalRecord) -> bool {
    record.log.may_hold() || record.log.program.is_none() || (!record.over && unrecorded_log_may_hold(record))
}

/// Whether the part of the log that is only in the recorder shows a lock. False if there is no recorder.
fn unrecorded_log_may_hold(record: &JournalRecord) -> bool {
    let Some(mut recorder) = Recorder::find(&record.run, record.log.clone(), record.offset) else { return false };
    let may_hold = recorder.read().may_hold();
    recorder.leave();
    may_hold
}

/// Whether the log of a dead run is known to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LogEnd {
    Known,
    /// The latest part of the log was only in the recorder, which is in memory. It is lost if the host was rebooted, or
    /// if the run's container or the run's session directory was removed.
    Lost,
}

/// Adds to `record` the latest part of the run's log, which may be only in the recorder. Returns whether that part was
/// found. A closed record contains the whole log.
pub(super) fn read_recorder(record: &mut JournalRecord) -> LogEnd {
    if record.over {
        return LogEnd::Known;
    }
    let found = Recorder::find(&record.run, record.log.clone(), record.offset);
    let Some(mut recorder) = found else { return LogEnd::Lost };
    record.log = recorder.read().clone();
    record.unlogged = recorder.is_closed();
    // As long as the record exists, a later recovery may need the recorder too, so do not delete it here.
    recorder.leave();
    LogEnd::Known
}

/// Returns the workspace that a dead run most likely used. `None` if the record names none.
pub(super) fn likely_workspace(record: &JournalRecord) -> Option<&str> {
    record.workspaces.first().map(String::as_str)
}

/// Returns the workspace of the state that `lock` locks: a command may lock another workspace than the selected one
/// (`workspace delete`). Returns the most likely workspace if the location of the lock is unknown. `None` if the record
/// names no workspace.
pub(super) fn workspace_of_lock<'a>(
    record: &'a JournalRecord,
    candidates: &'a CandidateBackends,
    lock: &RecordedLock,
) -> Option<&'a str> {
    candidates.workspace_of_lock(lock).or_else(|| likely_workspace(record))
}

/// Returns the candidate backends of a dead run, and the backend attributes that are no longer available. A backend
/// that cannot be reached without such an attribute is not among the candidates.
pub(super) fn candidates_of(record: &JournalRecord) -> (CandidateBackends, Vec<String>) {
    let after = DataDirectory::read(Path::new(&record.data_directory), Path::new(&record.working_directory()));
    let mut missing = Vec::new();
    let directories = record.access.iter().filter_map(|access| match access.backend(after.backend.as_ref()) {
        Ok(backend) => Some(DataDirectory { backend: Some(backend), workspace: after.workspace.clone() }),
        Err(attributes) => {
            missing.push(attributes);
            None
        }
    });
    let mut candidates = CandidateBackends {
        directories: directories.collect(),
        workspaces: record.workspaces.clone(),
        any_workspace: is_for_any_workspace(&record.command),
        data_directory: record.data_directory.clone(),
        working_directory: record.working_directory().into(),
    };
    // Only the data directory after the run shows the backend that an `init` has set up and the workspace that a
    // `workspace select` has selected.
    candidates.workspaces.push(after.workspace.clone());
    candidates.directories.push(after);
    if let Some(plan) = &record.plan {
        candidates = candidates.with_plan(&PlannedBackends::of_plan(Path::new(plan)));
    }
    (candidates, missing)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::journal::runs::Journal;
    use crate::journal::state_directory::StateDirectory;
    use crate::lock::outcome::{Because, Outcome};
    use crate::terraform::backend::CachedBackend;
    use crate::terraform::log::tests::{ID, lock_line, unlock_line};
    use crate::terraform::log::{LockIdentity, LoggedLock, UnnamedLock};
    use crate::terraform::logged_lock::Progress;

    pub(in crate::cleanup::recovery) const RUN: &str = "4000000-0123456789abcdef";

    pub(in crate::cleanup::recovery) const OTHER_ID: &str = "6e75cb05-d70c-4132-39e0-d2abba1b3077";

    pub(in crate::cleanup::recovery) fn requested(id: &str) -> String {
        lock_line(7, "Attempting to lock remote state (DynamoDB only)...", id, id)
    }

    /// Returns the record of a run in `/x` with the log `log`.
    pub(in crate::cleanup::recovery) fn record(log: &str) -> JournalRecord {
        let root = tempfile::tempdir().unwrap();
        let journal = Journal::open(&StateDirectory::at(root.path())).unwrap();
        let mut record = JournalRecord::new(RUN, &journal);
        record.data_directory = "/x/.terraform".into();
        record.log.read(log.as_bytes());
        record
    }

    pub(in crate::cleanup::recovery) fn unnamed(is_held: bool) -> UnnamedLock {
        let at = "2026-11-23T01:46:07Z".parse().unwrap();
        let mut progress = Progress::asked(at);
        if is_held {
            progress.grant(at);
        }
        let identity = LockIdentity::Object { bucket: "bkt".into(), key: "k".into(), checksum: None };
        UnnamedLock { identity, progress }
    }

    /// Returns the candidates of a run with the data directory `data_directory` that locks `bkt/KEY` in a table.
    pub(in crate::cleanup::recovery) fn candidates(data_directory: &str, key: &str) -> CandidateBackends {
        let backend = format!(
            r#"{{"version":3,"backend":{{"type":"s3","config":{{"bucket":"bkt","key":"{key}","dynamodb_table":"t"}}}}}}"#
        );
        let backend = CachedBackend::parse(backend.as_bytes());
        CandidateBackends {
            directories: vec![DataDirectory { backend, workspace: "default".into() }],
            workspaces: vec!["default".into()],
            any_workspace: false,
            data_directory: data_directory.into(),
            working_directory: "/x".into(),
        }
    }

    /// Each reason for not releasing a lock.
    pub(in crate::cleanup::recovery) fn reasons() -> [Because; 12] {
        [
            Because::Doubt,
            Because::Settings,
            Because::Never,
            Because::StillRunning { several: false },
            Because::Unseen,
            Because::NotYet,
            Because::NoAnswer,
            Because::NoCredentials,
            Because::Denied("dynamodb:GetItem"),
            Because::NoLock,
            Because::Claimed,
            Because::OtherAccount,
        ]
    }

    pub(in crate::cleanup::recovery) fn kept(because: Because) -> Outcome {
        Outcome::Kept { reason: "why".into(), because }
    }

    #[test]
    fn a_dead_run_is_of_this_location_by_its_unreleased_locks_or_its_directory() {
        const KEY: &str = "dir/prod.tfstate";
        let released = requested(ID) + &unlock_line(9, "Unlocked remote state (DynamoDB only)", ID);
        let is_released = record(&released).log.unreleased().next().is_none();
        assert!(is_released, "the log shows the end of the lock");
        for (log, directory, key, expected) in [
            (requested(ID), "/y/.terraform", KEY, true),
            (requested(ID), "/y/.terraform", "other", false),
            (requested(ID), "/x/.terraform", "other", true),
            (released, "/y/.terraform", KEY, false),
            (String::new(), "/y/.terraform", KEY, false),
            (String::new(), "/x/.terraform", "other", true),
        ] {
            assert_eq!(is_of(&record(&log), &candidates(directory, key)), expected, "{log} {directory} {key}");
        }
        let mut nameless = record("");
        nameless.log.set_locks([LoggedLock::Unnamed(unnamed(false))]);
        assert!(is_of(&nameless, &candidates("/y/.terraform", "k")));
        assert!(!is_of(&nameless, &candidates("/y/.terraform", "other")));
    }

    /// A `workspace delete green` locks the state of `green`, and not that of the selected workspace.
    #[test]
    fn the_workspace_of_a_lock_is_that_of_its_state_or_else_the_one_that_was_selected() {
        let lock = record(&requested(ID)).log.named().next().unwrap().clone();
        let mut record = record("");
        record.workspaces = vec!["green".into(), "default".into()];
        for (key, expected) in [("dir/prod.tfstate", "default"), ("another", "green")] {
            let candidates =
                CandidateBackends { workspaces: record.workspaces.clone(), ..candidates("/x/.terraform", key) };
            assert_eq!(workspace_of_lock(&record, &candidates, &lock), Some(expected), "{key}");
        }
        record.workspaces.clear();
        assert_eq!(workspace_of_lock(&record, &candidates("/x/.terraform", "another"), &lock), None);
    }

    #[test]
    fn a_run_that_only_has_requests_that_may_land_is_not_counted() {
        for (over, locks, expected) in [
            (true, vec![], true),
            (true, vec![LoggedLock::Unnamed(unnamed(false))], true),
            (true, vec![LoggedLock::Unnamed(unnamed(false)), LoggedLock::Unnamed(unnamed(true))], false),
            (true, record(&requested(ID)).log.locks().to_vec(), false),
            (false, vec![], false),
            (false, vec![LoggedLock::Unnamed(unnamed(false))], false),
        ] {
            let mut record = record("");
            record.over = over;
            record.log.set_locks(locks.clone());
            assert_eq!(has_only_requests(&record), expected, "{over} {locks:?}");
        }
    }
}
