//! Messages of a recovery about the runs of this host that are dead, or may be.

use std::fmt::Write as _;

use jiff::Timestamp;

use super::names::{lock, visible_lines};
use super::next_step::{
    RECOVER, RELEASE_NO_LOCK, Removal, decide_after_show, in_directories_of, locks_command_of, removal_command_of,
};
use super::release::{released_or_claimed, replaced};
use super::run::list;
use crate::console::{length_of_time, visible, visible_whole};
use crate::journal::runs::JournalRecord;
use crate::lease::record::Claim;
use crate::lock::outcome::Because;
use crate::sys::process::Process;
use crate::terraform::lock_info::LockInfo;
use crate::terraform::log::RecordedLock;

/// Reports that terraform is waiting for a lock that may belong to a dead run.
pub(crate) fn waiting_for_the_dead(tf: u32) -> String {
    format!(
        "terraform is waiting for a lock that may belong to a dead run on this host (pid {tf})\ntf is cleaning up after that run"
    )
}

/// Reports that an earlier run did not end while this `tf` waited for it. `stops` is true if the `tf` of that run is
/// alive and is stopping terraform. `processes` are the processes of the run that are known to be alive.
pub(crate) fn still_ending(record: &JournalRecord, stops: bool, processes: &[Process]) -> String {
    let tf = record.tf;
    if stops {
        return format!(
            "a run on this host (pid {tf}) is still stopping and may hold a state lock\n\
             that run releases its lock when it exits\nto check again, type: tf locks recover"
        );
    }
    let running = if processes.is_empty() {
        "another process of that run (most likely its guardian, a second tf) is still running\n\
         when it has exited, or after you have killed it"
            .to_owned()
    } else {
        format!(
            "processes of that run are still running: {}\nwhen they have exited, or after you have killed them",
            list(processes)
        )
    };
    format!(
        "a run on this host (pid {tf}) may hold a state lock, which was not released\n\
         the tf of that run is dead, but {running}, type: tf locks recover"
    )
}

/// Reports that another process is cleaning up after a dead run, and did not finish while this `tf` waited for it.
pub(crate) fn still_recovering(record: &JournalRecord) -> String {
    format!(
        "a dead run on this host (pid {}) may hold a state lock\nanother process is still cleaning up after that run\n\
         to check again, type: tf locks recover",
        record.tf
    )
}

/// Reports that a recovery could not be started, because of `error`.
pub(crate) fn no_recovery_process(error: &std::io::Error) -> String {
    format!(
        "could not start a process that cleans up after an earlier run: {error}\nto try again, type: tf locks recover"
    )
}

/// Reports that no process of a run is known to be alive, but that `processes` may belong to the run.
pub(crate) fn may_be_alive(record: &JournalRecord, processes: &[Process]) -> String {
    format!(
        "an earlier run (pid {}) may hold a state lock, which was not released\n\
         these processes may belong to that run: {}\nwhen they have exited, type: tf locks recover",
        record.tf,
        list(processes)
    )
}

/// Reports that this `tf` cannot determine whether an earlier run is alive, and which locks that run may hold.
/// `workspace_of` returns the workspace of a lock, or `None` if that is unknown.
pub(crate) fn cannot_be_judged<'a>(
    record: &JournalRecord,
    why: &str,
    workspace_of: impl Fn(&RecordedLock) -> Option<&'a str>,
) -> String {
    let mut text = format!(
        "an earlier run (pid {}) may hold a state lock, but tf cannot tell whether that run is still running\n{why}",
        record.tf
    );
    for recorded in record.log.unreleased() {
        let words = format!("release --force {}", recorded.id);
        let release = locks_command_of(record, &words, workspace_of(recorded));
        let _ = write!(
            text,
            "\nit may hold the lock {}\n\
             once no process of that run is running on the host or in the container that started it, type: {release}",
            lock(recorded)
        );
    }
    let _ = write!(text, "\nif that lock is gone, type: tf locks recover --forget {}", visible(&record.run));
    text
}

/// Reports that `tf` cannot clean up after a dead run, for the reason `why`.
pub(crate) fn cannot_be_finished(record: &JournalRecord, why: &str) -> String {
    format!(
        "an earlier run (pid {}) may hold a state lock, but tf cannot clean up after that run\n{why}\n\
         once that is fixed, type: tf locks recover",
        record.tf
    )
}

/// Reports that a recovery is taking more than 1 s.
pub(crate) fn recovering() -> String {
    "cleaning up after an earlier run; press ^C twice to skip this".to_owned()
}

/// Reports that a lock of an earlier run was released.
pub(crate) fn recovered(
    record: &JournalRecord,
    recorded: &RecordedLock,
    claim: Option<&Claim>,
    now: Timestamp,
) -> String {
    let ago = length_of_time(now.duration_since(record.started).unsigned_abs());
    let what = format!("the lock that an earlier run left (started {ago} ago, pid {})", record.tf);
    format!("{}: {}", released_or_claimed(&what, claim), lock(recorded))
}

/// Reports what a recovery would do about a lock of a dead run.
pub(crate) fn would_recover(record: &JournalRecord, recorded: &RecordedLock) -> String {
    format!("would release, if it is still held, the lock of a dead run (pid {}): {}", record.tf, lock(recorded))
}

/// Reports what a recovery would do about a lock of a dead run if the run's log does not contain the lock's ID.
pub(crate) fn would_look_for(record: &JournalRecord, asked: Timestamp) -> String {
    format!(
        "would look for the lock that a dead run (pid {}) requested at {asked}; the log of that run does not contain the lock's ID",
        record.tf
    )
}

/// Reports that a lock was not released, because it is not certain whether it belongs to an earlier run. `workspace` is
/// the workspace of the lock, or `None` if that is unknown.
pub(crate) fn may_be_its(record: &JournalRecord, info: &LockInfo, workspace: Option<&str>, why: &str) -> String {
    let show = locks_command_of(record, "show", workspace);
    format!(
        "this lock may belong to an earlier run (pid {}) and was not released: {}, Who {}\n{}\n{}",
        record.tf,
        lock(info),
        visible(&info.who),
        visible_lines(why),
        decide_after_show(info, &show, &removal_command_of(record, workspace))
    )
}

/// Reports that `tf` could not look for a lock of an earlier run. The run's log does not contain the ID of that lock.
pub(crate) fn not_looked_for_again(record: &JournalRecord, why: &str) -> String {
    format!(
        "an earlier run (pid {}) may have left a state lock, but tf could not look for that lock\n{}\nthat run used: {}\n\
         if the lock is gone, type: tf locks recover --forget {}",
        record.tf,
        visible_lines(why),
        visible(&record.surroundings.needs()),
        visible(&record.run)
    )
}

/// Returns the beginning of a message about a lock of a dead run.
pub(crate) fn earlier_run(record: &JournalRecord) -> String {
    format!("an earlier run (pid {}) was killed", record.tf)
}

/// Reports that a lock of an earlier run was not released. `workspace` is the workspace of the lock, or `None` if that is
/// unknown.
pub(crate) fn not_recovered(
    record: &JournalRecord,
    recorded: &RecordedLock,
    workspace: Option<&str>,
    (why, because): (&str, Because),
) -> String {
    let removal = Removal {
        unlock: removal_command_of(record, workspace),
        release: locks_command_of(record, RELEASE_NO_LOCK, workspace),
        show: locks_command_of(record, "show", workspace),
    };
    format!(
        "an earlier run (pid {}) may have left a state lock, which was not released: {}\n{}\nthat run used: {}\n\
         {}",
        record.tf,
        lock(recorded),
        visible_lines(why),
        visible(&record.surroundings.needs()),
        removal.next_step(because, recorded, true)
    )
}

/// Reports that another run locked the same state while the earlier run of `record` was working. `workspace` is that of
/// the state, or `None` if it is unknown.
pub(crate) fn replaced_earlier(
    record: &JournalRecord,
    own: &RecordedLock,
    by: &LockInfo,
    workspace: Option<&str>,
) -> String {
    let program = visible_whole(&record.program);
    in_directories_of(record, workspace, |directories| replaced(&earlier_run(record), own, by, &program, directories))
}

/// The next step if the record of a run cannot be read.
const SEE_WHICH_ARE_HELD: &str =
    "that run may have left a state lock; to see which locks are held, type in its directory: tf locks";

/// Reports that the record at `path` cannot be read and was not moved.
pub(crate) fn broken(path: &std::path::Path) -> String {
    format!(
        "could not read the record of an earlier run: {}\n{SEE_WHICH_ARE_HELD}",
        visible(&path.display().to_string())
    )
}

/// Reports that the record at `path` cannot be read because of `error`, which says nothing about the run.
pub(crate) fn unread(path: &std::path::Path, error: &str) -> String {
    format!(
        "could not read the record of an earlier run: {}\n{}\nthat run may have left a state lock; once the record can be \
         read, type: {RECOVER}",
        visible(&path.display().to_string()),
        visible(error)
    )
}

/// Reports that a record is invalid and was moved to `path`.
pub(crate) fn set_aside(path: &std::path::Path) -> String {
    format!(
        "could not read the record of an earlier run; it was moved to {}\n{SEE_WHICH_ARE_HELD}",
        visible(&path.display().to_string())
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cleanup::messages::late::unnamed_may_still_come;
    use crate::cleanup::messages::release::suspect_not_looked_for;

    #[test]
    fn a_lock_that_was_not_looked_for_is_listed_in_the_directory_of_its_run() {
        let list = "TF_WORKSPACE=green tf locks --chdir /w";
        let expected = format!("type: {list}");
        assert!(suspect_not_looked_for("it died", "no answer", list).ends_with(&expected));
        let said = |kept| unnamed_may_still_come("it died", Timestamp::UNIX_EPOCH, kept, list);
        assert!(said(false).ends_with(&expected) && said(true).ends_with("type: tf locks recover"));
    }
}
