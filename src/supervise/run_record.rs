//! Who takes care of a run while `tf` lives, and after: its entry in the journal, and its guardian.
//!
//! The guardian writes the journal, because waiting for a disk would keep signals waiting here. Where there is no guardian
//! any more, `tf` writes it itself.

use crate::journal::state_directory::Durability;
use std::os::fd::BorrowedFd;

use nix::unistd::Pid;

use crate::crash_point;
use crate::journal::membership::TreeIdentity;
use crate::journal::recorder::Recorder;
use crate::journal::runs::{JournalEntry, JournalRecord, Unfinished};
use crate::supervise::guardian::{Guardian, Heard};
use crate::supervise::stop::StopEvent;
use crate::terraform::log::{Log, RecordedLock, UnnamedLock};
use crate::trace::trace;

/// So much of a log may be read and not told, and therefore not forgotten.
const NEWS_THRESHOLD_BYTES: u64 = 1 << 16;

/// The hold of `tf` on its run.
pub(crate) struct RunRecord {
    pub(crate) guardian: Option<Guardian>,
    /// The entry and what stands in it, where there is a journal.
    pub(crate) entry: Option<(JournalEntry, JournalRecord)>,
    /// What was told last.
    pub(crate) told: (u64, Vec<RecordedLock>, Vec<UnnamedLock>),
    /// The processes outside terraform's group that were told of last.
    pub(crate) outside_group: Vec<(i32, u64)>,
    /// The journal could not be written.
    pub(crate) failed: bool,
}

impl RunRecord {
    /// Readable when the guardian has something to say, or is gone.
    pub(crate) fn awaited(&self) -> Option<BorrowedFd<'_>> {
        self.guardian.as_ref().map(Guardian::socket)
    }

    /// Terraform was started, and its processes can be known by `tree`.
    pub(crate) fn started(&mut self, terraform: Pid, tree: TreeIdentity) {
        if let Some((_, record)) = &mut self.entry {
            record.terraform = Some(terraform.as_raw());
            record.tree = tree;
        }
    }

    /// Hears what the guardian says: that the journal cannot be written, or nothing any more. True when it says that a
    /// service manager has told all processes of our unit to stop.
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

    /// Something asked for an end.
    pub(crate) fn note(&mut self, event: StopEvent, recorder: &Recorder) {
        if let Some(guardian) = &mut self.guardian
            && guardian.note(event).is_err()
        {
            self.guardian_is_gone(recorder);
        }
    }

    /// These processes below terraform have left its group, by pid and start.
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

    /// `tf` is about to stop itself, or was continued.
    pub(crate) fn stands_still(&mut self, still: bool, recorder: &Recorder) {
        if let Some(guardian) = &mut self.guardian
            && guardian.stands_still(still).is_err()
        {
            self.guardian_is_gone(recorder);
        }
    }

    /// Terraform's log was read: what is new in it goes into the journal, and may then be forgotten.
    pub(crate) fn news(&mut self, recorder: &Recorder) {
        let (log, offset) = (recorder.log(), recorder.whole_until());
        let (told_until, told_locks, told_unnamed) = &self.told;
        if *told_locks == log.locks && *told_unnamed == log.unnamed && offset - told_until < NEWS_THRESHOLD_BYTES {
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
            self.told = (offset, log.locks.clone(), log.unnamed.clone());
            recorder.forget();
        }
    }

    fn guardian_is_gone(&mut self, recorder: &Recorder) {
        trace!("the guardian is gone");
        if let Some(guardian) = self.guardian.take() {
            guardian.wait();
        }
        // Whether it has written what it was told last, nobody knows.
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

    /// The run is over, except for `unfinished`, which the next `tf` judges by `log`, and for `survivors` of its processes: pid
    /// and start.
    pub(crate) fn close(&mut self, unfinished: Unfinished, log: &Log, survivors: Vec<(i32, u64)>) {
        if let Some(guardian) = &mut self.guardian {
            guardian.over();
        }
        crash_point::reached("tf: over");
        if unfinished.is_empty() {
            // The guardian writes nothing any more once it has heard that it is over. If it is writing at this moment,
            // it does so into a directory that is moved away, and what it has left there is cleared away below.
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
