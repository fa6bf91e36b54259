//! Deletes a lock or a run from the journal, without releasing anything (`tf locks recover --forget`).

use std::io;

use super::dead_run::{may_have_in_non_s3, read_recorder};
use crate::journal::host::Standpoint;
use crate::journal::recorder::Recorder;
use crate::journal::runs::{FoundRun, Journal, JournalEntry, JournalRecord, Unfinished};
use crate::journal::state_directory::{Durability, StateDirectory};
use crate::terraform::log::RecordedLock;

/// The result of [`forget`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Forgotten {
    /// The lock or the run was deleted from the journal. The number is the pid of the run's `tf`.
    Yes(u32),
    /// Nothing was deleted: a process of the run is or may be alive, or another process is finishing the run. The
    /// number is the pid of the run's `tf`.
    Alive(u32),
    /// Nothing was deleted, because the journal cannot be changed. The text is the error.
    Failed(String),
    /// No run in the journal has this lock or this ID.
    Unknown,
}

/// Deletes the lock with the ID `what` from the journal. `what` can also be the ID of a run, because the IDs of its
/// locks may be unknown. If so, the whole run is deleted from the journal. The whole run is also deleted if it is a
/// [`FoundRun::Foreign`] and no process holds its lock file. Does not release a lock.
pub(crate) fn forget(what: &str) -> Forgotten {
    forget_in(&StateDirectory::existing(), what)
}

fn forget_in(states: &[StateDirectory], what: &str) -> Forgotten {
    for journal in states.iter().filter_map(Journal::there) {
        for name in journal.names() {
            match journal.look(&name) {
                FoundRun::Dead(mut record, entry, standpoint) => {
                    // A lock may be only in the recorder. Neither that lock nor another lock of its run can be deleted
                    // without it.
                    if standpoint == Standpoint::ThisBoot {
                        let _ = read_recorder(&mut record);
                    }
                    if is_named(&record, what) {
                        return forget_of(*record, &entry, what);
                    }
                }
                FoundRun::Living(mut record) | FoundRun::Recovering(mut record) | FoundRun::Doubtful(mut record, _) => {
                    let _ = read_recorder(&mut record);
                    if is_named(&record, what) {
                        return Forgotten::Alive(record.tf);
                    }
                }
                FoundRun::Foreign(_, Some(record)) if is_named(&record, what) => {
                    if journal.is_held(&name).unwrap_or(true) {
                        return Forgotten::Alive(record.tf);
                    }
                    return forgotten(journal.drop_record(&name), record.tf);
                }
                _ => {}
            }
        }
    }
    Forgotten::Unknown
}

/// Deletes the lock with the ID `what`, or the whole run if `what` is its ID, from the journal. `record` is the record
/// of the run, including what was only in its recorder.
fn forget_of(mut record: JournalRecord, entry: &JournalEntry, what: &str) -> Forgotten {
    let (tf, left) = (record.tf, rest_without(&record, what));
    if left.is_empty() {
        return forgotten(entry.take_away(), tf);
    }
    record.leave(left);
    let written = entry.write(&record, Durability::PowerLoss);
    if written.is_ok() {
        Recorder::clear_away(&record.run);
    }
    forgotten(written, tf)
}

/// Returns the result of a deletion from the journal. `tf` is the pid of the run's `tf`.
fn forgotten(deleted: io::Result<()>, tf: u32) -> Forgotten {
    deleted.map_or_else(|error| Forgotten::Failed(error.to_string()), |()| Forgotten::Yes(tf))
}

/// Whether `what` is the ID of the run of `record`, or of a lock that the run has not released.
fn is_named(record: &JournalRecord, what: &str) -> bool {
    record.run == what || record.log.named().any(|lock| lock.id == what && !lock.progress.is_gone())
}

/// Returns what is left of the run of `record` without the lock with the ID `what`. Nothing is left if `what` is the ID
/// of the run.
fn rest_without(record: &JournalRecord, what: &str) -> Unfinished {
    if record.run == what {
        return Unfinished::default();
    }
    let is_left = |lock: &&RecordedLock| lock.id != what && !lock.progress.is_gone();
    Unfinished {
        locks: record.log.named().filter(is_left).cloned().collect(),
        unnamed: record.log.unnamed().cloned().collect(),
        elsewhere: may_have_in_non_s3(record),
        unlogged: record.unlogged,
        replaced: record.replaced.clone(),
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::time::Duration;

    use super::*;
    use crate::aws::redacted_backend;
    use crate::cleanup::recovery::dead_run::tests::{OTHER_ID, RUN, record, requested, unnamed};
    use crate::journal::runs::{Replaced, run_id};
    use crate::sys::poll;
    use crate::terraform::backend::CachedBackend;
    use crate::terraform::lock_info::LockInfo;
    use crate::terraform::log::LoggedLock;
    use crate::terraform::log::tests::{ID, unlock_line};

    #[test]
    fn what_is_forgotten_is_one_lock_or_a_whole_run_and_nothing_else() {
        let gone = "7e75cb05-d70c-4132-39e0-d2abba1b3077";
        let log = [
            requested(ID),
            requested(OTHER_ID),
            requested(gone),
            unlock_line(9, "Unlocked remote state (DynamoDB only)", gone),
        ]
        .concat();
        let mut record = record(&log);
        let named: Vec<LoggedLock> = record.log.locks().to_vec();
        record.log.set_locks(named.into_iter().chain([LoggedLock::Unnamed(unnamed(true))]));
        record.unlogged = true;
        let by = LockInfo::default();
        record.replaced = vec![Replaced { own: record.log.named().next().unwrap().clone(), by }];
        for (what, is_meant) in
            [(ID, true), (OTHER_ID, true), (RUN, true), (gone, false), ("", false), ("4000000", false)]
        {
            assert_eq!(is_named(&record, what), is_meant, "{what}");
        }
        let rest = rest_without(&record, ID);
        assert_eq!(rest.locks.iter().map(|lock| lock.id.as_str()).collect::<Vec<_>>(), [OTHER_ID]);
        assert_eq!((rest.unnamed.len(), rest.unlogged, rest.elsewhere), (1, true, false));
        assert_eq!(rest.replaced, record.replaced);
        assert!(rest_without(&record, RUN).is_empty());
    }

    #[test]
    fn a_lock_in_another_backend_is_left_when_a_lock_in_s3_is_forgotten() {
        for (command, kind, expected) in [("init", "gcs", true), ("apply", "gcs", false), ("init", "s3", false)] {
            let mut record = record(&requested(ID));
            record.command = command.into();
            let backend = format!(r#"{{"version":3,"backend":{{"type":"{kind}","config":{{"bucket":"b"}}}}}}"#);
            let backend = CachedBackend::parse(backend.as_bytes());
            record.access = redacted_backend::of_run([&backend.unwrap()]).0;
            assert_eq!(rest_without(&record, ID).elsewhere, expected, "{command} {kind}");
        }
    }

    /// Returns a journal with a dead run whose record has the lock `ID`, and whose recorder has `OTHER_ID` too. Also
    /// returns the path of the run's directory.
    fn dead_run() -> (tempfile::TempDir, StateDirectory, PathBuf) {
        let root = tempfile::tempdir().unwrap();
        let state = StateDirectory::at(root.path());
        let journal = Journal::open(&state).unwrap();
        let mut record = JournalRecord::new(&run_id(), &journal);
        record.log.read(requested(ID).as_bytes());
        let recorder = Recorder::open(&record.run, "INFO", true, |_| None).unwrap();
        std::fs::write(recorder.path(), requested(ID) + &requested(OTHER_ID)).unwrap();
        recorder.leave();
        let path = root.path().join("runs").join(&record.run);
        drop(journal.begin(&record).unwrap());
        // A child process of another test may have the descriptors for a moment.
        while journal.is_held(&record.run).unwrap() {
            poll::wait(&[], Some(Duration::from_millis(5)));
        }
        (root, state, path)
    }

    fn locks_of(path: &Path) -> Vec<String> {
        let record: JournalRecord = serde_json::from_slice(&std::fs::read(path.join("record.json")).unwrap()).unwrap();
        record.log.named().map(|lock| lock.id.clone()).collect()
    }

    #[test]
    fn a_lock_that_only_the_recorder_has_is_left_or_forgotten_like_any_other() {
        for (first, second) in [(ID, OTHER_ID), (OTHER_ID, ID)] {
            let (_root, state, path) = dead_run();
            let states = [state];
            assert_eq!(forget_in(&states, first), Forgotten::Yes(std::process::id()));
            assert_eq!(locks_of(&path), [second]);
            assert_eq!(forget_in(&states, first), Forgotten::Unknown);
            assert_eq!(forget_in(&states, second), Forgotten::Yes(std::process::id()));
            assert!(!path.exists());
        }
    }

    #[test]
    fn what_cannot_be_deleted_from_the_journal_is_not_forgotten() {
        let (_root, state, path) = dead_run();
        let states = [state];
        let run = path.file_name().unwrap().to_str().unwrap();
        // A directory in the way of the new record.
        let in_the_way = path.join(format!("record.{}", std::process::id()));
        std::fs::create_dir(&in_the_way).unwrap();
        assert!(matches!(forget_in(&states, OTHER_ID), Forgotten::Failed(_)));
        assert_eq!(locks_of(&path), [ID], "the record is unchanged");
        std::fs::remove_dir(in_the_way).unwrap();
        // The recorder is unchanged too.
        assert_eq!(forget_in(&states, ID), Forgotten::Yes(std::process::id()));
        assert_eq!(locks_of(&path), [OTHER_ID]);
        // A file in the way of the rename of the directory.
        let in_the_way = path.with_file_name(format!(".old-{run}"));
        std::fs::write(&in_the_way, "").unwrap();
        for what in [OTHER_ID, run] {
            assert!(matches!(forget_in(&states, what), Forgotten::Failed(_)), "{what}");
            assert_eq!(locks_of(&path), [OTHER_ID], "{what}");
        }
        std::fs::remove_file(in_the_way).unwrap();
        assert_eq!(forget_in(&states, run), Forgotten::Yes(std::process::id()));
    }
}
