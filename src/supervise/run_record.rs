//! Controls the run's guardian and the run's entry in the journal.
//!
//! The guardian writes the journal, because `tf` could not handle signals while it waits for a disk. If there is no
//! guardian, `tf` writes the journal itself.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use nix::unistd::Pid;

use crate::crash_point;
use crate::journal::membership::TreeIdentity;
use crate::journal::recorder::Recorder;
use crate::journal::runs::{JournalEntry, JournalRecord, Unfinished};
use crate::journal::state_directory::Durability;
use crate::supervise::guardian::{Guardian, Heard, MAX_UNANSWERED, Suspension};
use crate::supervise::keeper::Orders;
use crate::supervise::stop::StopEvent;
use crate::sys::boot_clock;
use crate::terraform::log::{Log, LoggedLock};
use crate::trace::trace;

/// The number of bytes of the log after which the parsed log is passed on even if it shows no new lock. The recorder
/// can free the memory of these bytes only after the parsed log was passed on.
const NEWS_THRESHOLD_BYTES: u64 = 1 << 16;

/// The guardian and the journal entry of a run. `tf` owns both.
pub(crate) struct RunRecord {
    /// `None` if no guardian could be started, or it is gone.
    pub(crate) guardian: Option<Guardian>,
    /// The entry, and the record that is written to it. `None` if there is no journal.
    pub(crate) entry: Option<(JournalEntry, JournalRecord)>,
    /// The part of the log that was passed on.
    pub(crate) told: Told,
    /// The processes outside terraform's group that were last passed on: pid, and start time in clock ticks since boot.
    pub(crate) outside_group: Vec<(i32, u64)>,
    /// Whether writing the journal has failed.
    pub(crate) failed: bool,
    /// Whether the guardian may be about to stop terraform's group.
    pub(crate) late_stop: LateStop,
}

/// How long the guardian may take to answer that it has read that `tf` was continued.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// What the guardian has reported, and `tf` must act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GuardianNews {
    /// As [`Heard::UnitIsStopped`].
    UnitIsStopped,
    /// As [`Heard::LockIsLost`].
    LockIsLost,
}

/// Whether the guardian may be about to stop terraform's group for the lease, although `tf` was continued.
///
/// While `tf` is suspended, the guardian sends SIGSTOP when it sees that the fuse is gone. Between the look and the
/// signal it may get no processor, while `tf` is continued, makes a new fuse, and continues terraform. So only the
/// guardian's answer shows that no SIGSTOP comes any more. One that came before the answer is undone with a SIGCONT.
///
/// A guardian that is frozen does not answer. So a stop that comes later than [`ANSWER_TIMEOUT`] counts as a person's.
/// It is undone nevertheless if it was the guardian's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LateStop {
    /// How often `tf` was continued without an answer of the guardian to it.
    unanswered: u32,
    /// Whether the group is to stay stopped, because somebody else has stopped it.
    stays_stopped: bool,
    /// When `tf` was continued last, on the clock of [`boot_clock::now`].
    asked_at: Duration,
    /// Whether the guardian has answered, and the group was not continued since.
    must_continue: bool,
    /// Whether the last suspension was sent to the guardian.
    is_suspension_sent: bool,
}

impl LateStop {
    /// Notes that the guardian was told at `now` that `tf` was continued.
    fn asked(&mut self, now: Duration) {
        self.unanswered += 1;
        self.stays_stopped = false;
        self.asked_at = now;
    }

    /// Notes a suspension (`still` is true) or its end, and returns whether it is sent to the guardian.
    /// [`MAX_UNANSWERED`] of them may wait for an answer. The end of a suspension is sent if the suspension was.
    fn note_suspension(&mut self, still: bool) -> bool {
        if still {
            self.is_suspension_sent = self.unanswered < MAX_UNANSWERED;
        }
        self.is_suspension_sent
    }

    /// Notes that the group is to stay stopped, although `tf` was just continued: somebody else has stopped it. An
    /// answer that was heard just before changes nothing.
    pub(crate) fn keep_stopped(&mut self) {
        (self.stays_stopped, self.must_continue) = (true, false);
    }

    /// Notes that the group was continued. A stop that comes before an answer is the guardian's.
    pub(crate) fn continued(&mut self) {
        self.stays_stopped = false;
    }

    /// Notes that the guardian has answered.
    fn answered(&mut self) {
        self.must_continue |= self.unanswered > 0 && !self.stays_stopped;
        self.unanswered = self.unanswered.saturating_sub(1);
    }

    /// Notes that the guardian is gone. It sends no signal any more.
    fn gone(&mut self) {
        self.must_continue |= self.unanswered > 0 && !self.stays_stopped;
        self.unanswered = 0;
    }

    /// Whether a stop of terraform by SIGSTOP that is seen at `now` may come from the guardian.
    pub(crate) fn is_possible(&self, now: Duration) -> bool {
        self.unanswered > 0 && !self.stays_stopped && now.saturating_sub(self.asked_at) < ANSWER_TIMEOUT
    }

    /// Whether the group must be continued now. True once after each answer.
    pub(crate) fn take_continue(&mut self) -> bool {
        std::mem::take(&mut self.must_continue)
    }
}

/// The part of terraform's log that was passed on to the guardian or, without a guardian, written to the journal.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// The offset up to which the log was passed on, in bytes.
    until: u64,
    /// The locks in that part of the log.
    locks: Vec<LoggedLock>,
}

impl Told {
    /// Whether the log must be passed on again. It has `locks` and was read up to `offset`, in bytes.
    fn is_outdated(&self, locks: &[LoggedLock], offset: u64) -> bool {
        self.locks != locks || offset - self.until >= NEWS_THRESHOLD_BYTES
    }
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

    /// Handles the guardian's reports, without waiting, up to one about which the caller must do something, and returns
    /// that one. `None` if there are no more, or no guardian. If the journal cannot be written, stores this in
    /// `failed`. If the guardian is gone, writes the journal in its place.
    pub(crate) fn hear(&mut self, recorder: &Recorder) -> Option<GuardianNews> {
        loop {
            match self.guardian.as_ref()?.hear() {
                Heard::Nothing => return None,
                Heard::CannotWrite => self.failed = true,
                Heard::UnitIsStopped => return Some(GuardianNews::UnitIsStopped),
                Heard::LockIsLost => return Some(GuardianNews::LockIsLost),
                Heard::StopsNoMore => self.late_stop.answered(),
                Heard::Gone => self.guardian_is_gone(recorder),
            }
        }
    }

    /// Sends an event to the guardian, whose [`crate::supervise::stop::Stop`] must have the same state as that of `tf`.
    pub(crate) fn note(&mut self, event: StopEvent, recorder: &Recorder) {
        if let Some(guardian) = &mut self.guardian
            && guardian.note(event).is_err()
        {
            self.guardian_is_gone(recorder);
        }
    }

    /// Tells the guardian what a keeper of the run's lease needs to know. `None` if there is no lease any more.
    pub(crate) fn tell_lease(&mut self, orders: Option<&Orders>, recorder: &Recorder) {
        if let Some(guardian) = &mut self.guardian
            && guardian.tell_lease(orders).is_err()
        {
            self.guardian_is_gone(recorder);
        }
    }

    /// Records the processes below terraform that have left its process group, by pid and start time in clock ticks
    /// since boot. If they have changed, passes them on to the guardian, which writes them to the journal. If there is
    /// no guardian, writes them here: if `tf` is killed as well, the next `tf` finds these processes only in the
    /// journal. Without a lock, no later `tf` needs these processes, so they are not written.
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
        } else if self.guardian.is_none() && recorder.log().may_hold() {
            self.write(recorder);
        }
        self.outside_group = processes;
    }

    /// Reports to the guardian that `tf` is about to stop itself, or was continued.
    pub(crate) fn report_suspension(&mut self, suspension: Suspension, recorder: &Recorder) {
        let Some(guardian) = &mut self.guardian else { return };
        if !self.late_stop.note_suspension(suspension != Suspension::Over) {
            return;
        }
        if suspension == Suspension::Over {
            self.late_stop.asked(boot_clock::now());
        }
        if guardian.report_suspension(suspension).is_err() {
            self.guardian_is_gone(recorder);
        }
    }

    /// Sends what the guardian could not take yet. If the log has new locks, or enough new bytes, passes the parsed log on to the guardian, which writes it to the
    /// journal and then frees the memory of the part of the log that was read. If there is no guardian, does both here.
    pub(crate) fn news(&mut self, recorder: &Recorder) {
        if let Some(guardian) = &mut self.guardian
            && guardian.flush().is_err()
        {
            self.guardian_is_gone(recorder);
        }
        let (log, offset) = (recorder.log(), recorder.whole_until());
        if !self.told.is_outdated(log.locks(), offset) {
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
        }
    }

    /// Waits for the exit of the guardian, and writes the journal in its place from now on.
    fn guardian_is_gone(&mut self, recorder: &Recorder) {
        trace!("the guardian is gone");
        self.late_stop.gone();
        if let Some(guardian) = self.guardian.take() {
            guardian.wait();
        }
        // It is unknown whether the guardian has written the last log that it got, so `tf` writes it.
        self.write(recorder);
    }

    /// Writes the parsed log to the journal, if there is one, and then frees the memory of the part of the log that was
    /// read. Stores a failure in `failed`. After a failure nothing is freed: a later `tf` can only read the log itself.
    fn write(&mut self, recorder: &Recorder) {
        if let Some((entry, record)) = &mut self.entry {
            record.log = recorder.log().clone();
            record.offset = recorder.whole_until();
            let written = entry.write(record, Durability::PowerLoss);
            crash_point::reached("tf: has written");
            if written.is_err() {
                self.failed = true;
                return;
            }
        }
        recorder.forget();
    }

    /// Leaves the record open, with the log of `recorder`, because a process of the run may still be working. A later
    /// `tf` finishes the run after the death of its processes, as if the supervision had died with them. `survivors` are
    /// the processes that are known ([`Self::close`]). Returns whether there is a record. Only then will a `tf` read the
    /// recorder.
    pub(crate) fn leave_open(&mut self, recorder: &Recorder, survivors: Vec<(i32, u64)>) -> bool {
        if let Some(guardian) = &mut self.guardian {
            guardian.over();
        }
        if let Some(guardian) = self.guardian.take() {
            guardian.wait();
        }
        if let Some((_, record)) = &mut self.entry {
            record.tree.add_survivors(survivors);
        }
        // If this fails, a later `tf` uses the previous record and reads the rest of the log in the recorder.
        self.write(recorder);
        self.entry.take().is_some()
    }

    /// Closes the record ([`JournalEntry::close`]), with `log` and `survivors` if something is unfinished. `survivors`
    /// are the run's processes that are still running, by pid and start time in clock ticks since boot.
    ///
    /// # Errors
    /// Those of [`JournalEntry::close`].
    pub(crate) fn close(&mut self, unfinished: Unfinished, log: &Log, survivors: Vec<(i32, u64)>) -> io::Result<()> {
        if let Some(guardian) = &mut self.guardian {
            guardian.over();
        }
        crash_point::reached("tf: over");
        let mut closed = Ok(());
        // The guardian writes nothing after it has read that the run is over. If it is writing now, it writes into a
        // directory that is renamed and then deleted with all its files. So the record can be deleted, but not written,
        // without waiting for the guardian.
        if let Some((entry, record)) = self.entry.take_if(|_| unfinished.is_empty()) {
            closed = entry.close(record, Unfinished::default());
        }
        if let Some(guardian) = self.guardian.take() {
            guardian.wait();
        }
        if let Some((entry, mut record)) = self.entry.take() {
            record.log = log.clone();
            record.tree.survivors = survivors;
            closed = entry.close(record, unfinished);
        }
        closed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terraform::log::tests::{ID, lock_line};

    #[test]
    fn a_stop_may_be_the_guardians_until_it_has_answered_or_is_gone() {
        let [asked, late] = [7, 12].map(Duration::from_secs);
        let soon = asked + Duration::from_millis(4999);
        let mut late_stop = LateStop::default();
        assert!(!late_stop.is_possible(soon) && !late_stop.take_continue());
        // An answer to nothing, as without a lease.
        late_stop.answered();
        assert!(!late_stop.take_continue());
        for end in [LateStop::answered, LateStop::gone] {
            late_stop.asked(asked);
            late_stop.asked(asked);
            late_stop.answered();
            assert!(late_stop.is_possible(soon) && !late_stop.is_possible(late));
            assert!(late_stop.take_continue() && !late_stop.take_continue());
            end(&mut late_stop);
            assert!(!late_stop.is_possible(soon) && late_stop.take_continue() && !late_stop.take_continue());
        }
        late_stop.asked(asked);
        late_stop.asked(asked);
        late_stop.gone();
        assert!(!late_stop.is_possible(soon) && late_stop.take_continue());
        // Somebody else has stopped the group, which is noted just after the answer.
        late_stop.asked(asked);
        late_stop.answered();
        late_stop.keep_stopped();
        assert!(!late_stop.take_continue());
        // Somebody else has stopped the group, and it was not continued since.
        for end in [LateStop::answered, LateStop::gone] {
            for is_continued in [false, true] {
                late_stop.asked(asked);
                late_stop.keep_stopped();
                assert!(!late_stop.is_possible(soon));
                if is_continued {
                    late_stop.continued();
                }
                assert_eq!(late_stop.is_possible(soon), is_continued);
                end(&mut late_stop);
                assert_eq!(late_stop.take_continue(), is_continued);
            }
        }
    }

    /// The socket of the events must keep room for a request to stop.
    #[test]
    fn a_guardian_that_does_not_answer_is_not_told_of_suspensions_without_end() {
        let mut late_stop = LateStop::default();
        let mut sent = 0;
        for _ in 0..100 {
            for still in [true, false] {
                if late_stop.note_suspension(still) {
                    sent += 1;
                    if !still {
                        late_stop.asked(Duration::ZERO);
                    }
                }
            }
        }
        assert_eq!(sent, 2 * MAX_UNANSWERED);
        late_stop.answered();
        assert!(late_stop.note_suspension(true) && late_stop.note_suspension(false));
    }

    #[test]
    fn the_log_is_passed_on_at_each_step_of_a_lock_and_after_64_kib() {
        let mut log = Log::default();
        let mut told = Told::default();
        assert!(!told.is_outdated(log.locks(), 0));
        assert!(!told.is_outdated(log.locks(), (64 << 10) - 1));
        assert!(told.is_outdated(log.locks(), 64 << 10));
        for message in ["Attempting to lock remote state (DynamoDB only)...", "Locked remote state (DynamoDB only)"] {
            log.read(lock_line(7, message, ID, "r").as_bytes());
            assert!(told.is_outdated(log.locks(), 100), "{message}");
            told = Told { until: 100, locks: log.locks().to_vec() };
            assert!(!told.is_outdated(log.locks(), 100), "{message}");
            assert!(!told.is_outdated(log.locks(), 99 + (64 << 10)), "{message}");
            assert!(told.is_outdated(log.locks(), 100 + (64 << 10)), "{message}");
        }
    }
}
