//! What takes care of a run while `tf` is running and afterwards: the run's entry in the journal, and its guardian.
//!
//! The guardian writes the journal, because `tf` could handle no signals while it waited for a disk. When there is no
//! guardian any more, `tf` writes the journal itself.

use crate::journal::state_directory::Durability;
use std::os::fd::BorrowedFd;

use nix::unistd::Pid;

use crate::crash_point;
use crate::journal::membership::TreeIdentity;
use crate::journal::recorder::Recorder;
use crate::journal::runs::{JournalEntry, JournalRecord, Unfinished};
use crate::supervise::guardian::{Guardian, Heard};
use crate::supervise::stop::StopEvent;
use crate::terraform::log::{Log, LoggedLock};
use crate::trace::trace;

/// The number of bytes of a log that may be read before they are passed on to the guardian, if they show no new lock.
/// Their memory can be freed only after that.
const NEWS_THRESHOLD_BYTES: u64 = 1 << 16;

/// The guardian and the journal entry of a run, as `tf` holds them.
pub(crate) struct RunRecord {
    pub(crate) guardian: Option<Guardian>,
    /// The entry, and the record that is written to it. `None` if there is no journal.
    pub(crate) entry: Option<(JournalEntry, JournalRecord)>,
    /// What was last passed on of the log.
    pub(crate) told: Told,
    /// The processes outside terraform's group that were last passed on: pid, and start in clock ticks since boot.
    pub(crate) outside_group: Vec<(i32, u64)>,
    /// Whether the journal could not be written.
    pub(crate) failed: bool,
}

/// What was passed on of terraform's log: to the guardian or, without a guardian, into the journal.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// The offset up to which the log was passed on, in bytes.
    until: u64,
    locks: Vec<LoggedLock>,
}

impl RunRecord {
    /// Returns the guardian's socket, which is readable when the guardian has reported something, or is gone. `None` if
    /// there is no guardian.
    pub(crate) fn awaited(&self) -> Option<BorrowedFd<'_>> {
        self.guardian.as_ref().map(Guardian::socket)
    }

    /// Records that terraform was started, and that `tree` identifies its processes.
    pub(crate) fn started(&mut self, terraform: Pid, tree: TreeIdentity) {
        if let Some((_, record)) = &mut self.entry {
            record.terraform = Some(terraform.as_raw());
            record.tree = tree;
        }
    }

    /// Handles what the guardian has reported: that the journal cannot be written, or that the guardian is gone.
    /// Returns true if it reports that a service manager has told all processes of the unit to stop.
    pub(crate) fn hear(&mut self, recorder: &Recorder) -> bool {
        let Some(guardian) = &self.guardian else { return false };
        match guardian.hear() {
            Heard::Nothing => {}
            Heard::CannotWrite => self.failed = true,
            Heard::UnitIsStopped => return true,
            Heard::Gone => self.guardian_is_gone(recorder),
        }
        false
    }

    /// Passes on an event that asks terraform to stop.
    pub(crate) fn note(&mut self, event: StopEvent, recorder: &Recorder) {
        if let Some(guardian) = &mut self.guardian
            && guardian.note(event).is_err()
        {
            self.guardian_is_gone(recorder);
        }
    }

    /// Records the processes below terraform that have left its group, by pid and start in clock ticks since boot, and
    /// passes them on if they have changed.
    pub(crate) fn note_outside_group(&mut self, processes: Vec<(i32, u64)>, recorder: &Recorder) {
        if processes == self.outside_group {
            return;
        }
        if let Some((_, record)) = &mut self.entry {
            record.tree.survivors.clone_from(&processes);
        }
        if let Some(guardian) = &mut self.guardian
            && guardian.tell_outside_group(&processes).is_err()
        {
            self.guardian_is_gone(recorder);
        }
        self.outside_group = processes;
    }

    /// Reports that `tf` is about to stop itself (`still`), or was continued.
    pub(crate) fn stands_still(&mut self, still: bool, recorder: &Recorder) {
        if let Some(guardian) = &mut self.guardian
            && guardian.stands_still(still).is_err()
        {
            self.guardian_is_gone(recorder);
        }
    }

    /// Passes on, for the journal, what is new in terraform's log since it was last passed on, and then lets the
    /// recorder free the memory of what was read.
    pub(crate) fn news(&mut self, recorder: &Recorder) {
        let (log, offset) = (recorder.log(), recorder.whole_until());
        if self.told.locks == log.locks() && offset - self.told.until < NEWS_THRESHOLD_BYTES {
            return;
        }
        let told = if let Some(guardian) = &mut self.guardian {
            guardian.tell(log, offset).unwrap_or_else(|_| {
                self.guardian_is_gone(recorder);
                true
            })
        } else {
            self.write(recorder);
            true
        };
        if told {
            crash_point::reached("tf: told news");
            self.told = Told { until: offset, locks: log.locks().to_vec() };
            recorder.forget();
        }
    }

    fn guardian_is_gone(&mut self, recorder: &Recorder) {
        trace!("the guardian is gone");
        if let Some(guardian) = self.guardian.take() {
            guardian.wait();
        }
        // It is not known whether the guardian has written what was last passed on to it.
        self.write(recorder);
    }

    fn write(&mut self, recorder: &Recorder) {
        if let Some((entry, record)) = &mut self.entry {
            record.log = recorder.log().clone();
            record.offset = recorder.whole_until();
            self.failed |= entry.write(record, Durability::PowerLoss).is_err();
            crash_point::reached("tf: has written");
        }
    }

    /// Closes the record: the run is over, except for `unfinished`, which the next `tf` judges by `log`. `survivors`
    /// are the run's processes that are still running, by pid and start in clock ticks since boot.
    pub(crate) fn close(&mut self, unfinished: Unfinished, log: &Log, survivors: Vec<(i32, u64)>) {
        if let Some(guardian) = &mut self.guardian {
            guardian.over();
        }
        crash_point::reached("tf: over");
        if unfinished.is_empty() {
            // The guardian writes nothing any more once it has read that everything is over. If it is writing at this
            // moment, it writes into a directory that was renamed and is deleted with all its files.
            if let Some((entry, _)) = &self.entry {
                entry.take_away();
            }
        }
        if let Some(guardian) = self.guardian.take() {
            guardian.wait();
        }
        if let Some((entry, mut record)) = self.entry.take()
            && !unfinished.is_empty()
        {
            record.log = log.clone();
            record.tree.survivors = survivors;
            record.leave(unfinished);
            let _ = entry.write(&record, Durability::PowerLoss);
        }
    }
}
