//! Decides what happens to a terraform that the kernel has stopped because its lease was not renewed in time. It is
//! frozen first, then the lock is looked at, and only then does it go on or end: an outage alone is no reason to end
//! it.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::record::Claim;
use super::terms::Terms;

/// What a look at the lock shows while terraform is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) enum Look {
    /// The lock is the run's, and its record was not claimed.
    Ours,
    /// The lock is gone, is another run's, or was claimed by another host.
    Lost,
    /// No response, or the service refused the request. Refused credentials may be renewed.
    Unknown,
}

/// How a run has lost its lock.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Loss {
    /// Another host has claimed it.
    Claimed(Claim),
    /// Another run holds it: `Who` and the time `Created` of its lock.
    Another { who: String, created: String },
    /// Nothing is stored there.
    Gone,
}

/// Whether a terraform may have written its state after it had lost its lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LateWrite {
    /// Terraform has written nothing after the loss.
    No,
    /// Terraform may have written while the loss was not known: another process has deleted the lock of a terraform that
    /// worked.
    BeforeTheLossWasFound,
    /// Terraform may have written, because it ran after the deadline of its lease: another process has continued it.
    AfterTheDeadline,
}

/// What is known about a run that has lost its lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Lost {
    /// Whether the deadline of the lease had stopped terraform when the loss was found.
    pub(crate) is_stopped_in_time: bool,
    /// Whether it was lost before that deadline, as far as the loss itself shows.
    pub(crate) is_lost_before_deadline: bool,
    /// Whether terraform has exited by itself, although it was to be killed.
    pub(crate) has_exited: bool,
    /// When the last confirmed renewal was sent, or when the lease began. `None` if no lease has begun.
    pub(crate) renewed: Option<Timestamp>,
    /// When terraform was to be stopped at the latest. `None` if no lease has begun.
    pub(crate) deadline: Option<Timestamp>,
    /// When terraform last began to write its state. `None` if it has not.
    pub(crate) written: Option<Timestamp>,
}

/// Decides whether terraform may have written its state after it had lost its lock.
///
/// When the last renewal was sent, the lock was the run's. If somebody took or deleted it while terraform worked, every
/// later write may have come too late. If it was lost because the lease lapsed, terraform had it until the deadline. A
/// lock that another run has taken before that deadline was not lost because the lease lapsed.
pub(crate) fn late_write(lost: Lost) -> LateWrite {
    let is_after = |at: Option<Timestamp>| at.zip(lost.written).is_some_and(|(at, written)| written > at);
    if lost.is_stopped_in_time && (lost.has_exited || is_after(lost.deadline)) {
        return LateWrite::AfterTheDeadline;
    }
    let may_be_lost_at_work = !lost.is_stopped_in_time || lost.is_lost_before_deadline;
    if may_be_lost_at_work && is_after(lost.renewed) { LateWrite::BeforeTheLossWasFound } else { LateWrite::No }
}

/// Whether a lock was lost before `deadline`, the deadline of its lease. The times in `loss` are those of another host
/// or of the service. A clock that is late can only make this true.
pub(crate) fn is_lost_before(loss: &Loss, deadline: Timestamp) -> bool {
    match loss {
        Loss::Another { created, .. } => created.parse::<Timestamp>().is_ok_and(|created| created < deadline),
        Loss::Claimed(claim) => claim.at().is_some_and(|at| at < deadline),
        // Nothing shows since when it is gone.
        Loss::Gone => false,
    }
}

/// What is known when a read shows that the lock is lost, and the log shows that terraform has begun to release it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LostInUnlock {
    /// Whether the log shows the end of an unlock. That of Terraform since 1.10 does. That of Terraform up to 1.5 and
    /// of OpenTofu since 1.11 shows the requests to the services, so it does too.
    pub(crate) is_end_logged: bool,
    /// Whether the terraform with the lock has exited, so that it sends nothing more.
    pub(crate) has_exited: bool,
    /// Whether it is stopped, for its lease or by somebody.
    pub(crate) is_stopped: bool,
    /// How many reads in a row have shown the loss, with this one.
    pub(crate) reads: u32,
}

/// What follows from a [`LostInUnlock`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UnlockStep {
    /// The unlock is over, and the lease with it. Whatever runs on needs no lock.
    Over,
    /// The lock must be read once more.
    ReadAgain,
    /// The unlock may not be over, so the fence stays.
    Fenced,
}

/// The reads in a row that show the end of an unlock. A single response proves nothing: a proxy may have sent it.
const READS_TO_END_UNLOCK: u32 = 2;

/// Decides whether an unlock is over, although the log does not show its end.
///
/// Terraform 1.6 to 1.9 logs only that it begins to release its lock, so the lock itself must show the rest. As long as
/// it is there, the request may be on its way. That request has no condition, so it must not arrive when another run
/// has the lock. A terraform that is stopped may send it when it goes on, so what a read shows before that says
/// nothing.
///
/// A terraform since 1.10 that is running would have logged the end. So if its lock is lost and it has not logged that,
/// its request may still be on its way.
pub(crate) fn unlock_step(seen: LostInUnlock) -> UnlockStep {
    let may_send = !seen.has_exited && (seen.is_end_logged || seen.is_stopped);
    match seen.reads {
        _ if may_send => UnlockStep::Fenced,
        READS_TO_END_UNLOCK.. => UnlockStep::Over,
        _ => UnlockStep::ReadAgain,
    }
}

/// How far terraform is with a lock that was found lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PhaseAtLoss {
    /// Terraform has not begun to release it.
    Held,
    /// Terraform has begun to release it, and the request may still be on its way ([`unlock_step`]).
    Unlocking,
    /// Terraform has released it.
    Released,
}

/// What is known when a keeper of `tf` has found that the lock is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FoundLoss {
    pub(crate) phase: PhaseAtLoss,
    /// Whether nothing is stored where the lock was. If not, another run holds or claims it.
    pub(crate) is_gone: bool,
    /// Whether terraform is stopped for its lease.
    pub(crate) is_stopped: bool,
    /// Whether the terraform with the lock has exited. What follows it needs no lock.
    pub(crate) has_exited: bool,
    /// Whether this is a look at the lock of a stopped terraform. [`next_step`] decides what follows from it.
    pub(crate) is_look: bool,
}

/// What follows from a [`FoundLoss`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LossStep {
    /// Terraform itself has released its lock. The lease is over.
    Release,
    /// Nothing. Terraform is releasing its lock.
    Wait,
    /// The loss is remembered.
    Remember,
    /// Terraform is asked to stop, and saves its state.
    Interrupt,
    /// Terraform is killed.
    Kill,
}

/// Decides what follows when a keeper of `tf` has found that the lock is lost.
///
/// Terraform writes to its log before it sends the delete of its own lock. So if it has deleted the lock, the log shows
/// that by now. Then the lock of another run may be there as well.
///
/// A terraform that is stopped in its unlock may be about to delete, without a condition, the lock that another run has
/// taken meanwhile. So it goes on only if it is not stopped, or has exited and the lock is only read again.
pub(crate) fn loss_step(found: FoundLoss) -> LossStep {
    match found.phase {
        PhaseAtLoss::Released => LossStep::Release,
        PhaseAtLoss::Unlocking if !found.is_stopped || found.has_exited => LossStep::Wait,
        PhaseAtLoss::Held | PhaseAtLoss::Unlocking if found.is_look => LossStep::Remember,
        PhaseAtLoss::Held | PhaseAtLoss::Unlocking if found.is_gone && !found.is_stopped => LossStep::Interrupt,
        PhaseAtLoss::Held | PhaseAtLoss::Unlocking => LossStep::Kill,
    }
}

/// Decides what follows when a keeper of the guardian has found that the lock is lost. `tf` is dead or suspended, so
/// terraform is interrupted or does nothing. A lock that is only gone does not kill it: nobody else has the lock.
pub(crate) fn guardians_loss_step(phase: PhaseAtLoss, is_gone: bool) -> LossStep {
    match phase {
        PhaseAtLoss::Held if !is_gone => LossStep::Kill,
        // What follows terraform in its group, such as a wrapper, needs no lock.
        PhaseAtLoss::Released => LossStep::Release,
        PhaseAtLoss::Held | PhaseAtLoss::Unlocking => LossStep::Remember,
    }
}

/// Why the kernel has stopped terraform for its lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StopCause {
    /// The lease was not renewed in time.
    Deadline,
    /// The fuse was killed before the deadline.
    FuseKilled,
}

/// Decides why terraform was stopped, when it is noticed at `now` that its fuse is gone. `deadline` is the last one
/// that the keeper has reported. Both are on the clock of `sys::boot_clock`, which a person cannot set.
/// `is_killed_by_us`: this process has killed the fuse, so that the lock is looked at.
pub(crate) fn stop_cause(is_killed_by_us: bool, now: Duration, deadline: Option<Duration>) -> StopCause {
    let is_over = deadline.is_some_and(|deadline| now >= deadline);
    if is_over && !is_killed_by_us { StopCause::Deadline } else { StopCause::FuseKilled }
}

/// Why terraform is asked to stop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// The service refuses renewals.
    Refused(String),
    /// Somebody has deleted the lock.
    Gone,
}

/// What is known about the stopped run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct StoppedRun {
    /// Whether a new fuse holds the stop pipe.
    pub(crate) is_rearmed: bool,
    /// Whether a new fuse can be made. If not, the run can only go on without a fence.
    pub(crate) can_rearm: bool,
    /// Whether the service has confirmed a renewal from which the deadline of the new fuse follows, or a later one. A
    /// renewal without a fence counts, too. One from before the new fuse does not, even if its response is read later.
    pub(crate) is_renewed: bool,
    /// Whether a person at a terminal can end it.
    pub(crate) has_person: bool,
    /// How often that person has asked for the end.
    pub(crate) interrupts: u8,
    /// How long it has been stopped, without the time in which its supervisor did not run.
    pub(crate) stopped_for: Duration,
}

/// A fuse without a deadline that has not answered so often in a row, with a second for each answer, is killed and
/// replaced. It may be stopped (SIGSTOP). No renewal is sent meanwhile. A fuse with a deadline dies at it in any case.
pub(crate) const SILENCES_TO_REPLACE_FUSE: u32 = 3;

/// The interrupts that end a stopped run. The terminal says so at the first one.
pub(crate) const INTERRUPTS_TO_END: u8 = 3;

/// Why a stopped run is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) enum EndReason {
    /// The lock is another run's, or was claimed by another host.
    LockLost,
    /// A person has asked for the end.
    Person,
    /// For [`Terms::longest_stop`], nobody knew whether the run still has its lock.
    TimedOut,
}

/// What to do with a stopped run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum FenceStep {
    /// Make a new fuse. It holds the pipe before the renewal is sent.
    Rearm,
    /// Renew the lease.
    Renew,
    /// Renew the lease with a record that promises no fence. Then the fence is taken down.
    RenewWithoutFence,
    /// Continue terraform.
    Continue,
    /// Kill terraform and everything that it has started.
    End(EndReason),
    /// Look again.
    LookAgain,
}

/// How long to wait until another reason is reported why the lock of a stopped run is not known.
const REASON_INTERVAL: Duration = Duration::from_mins(1);

/// Whether to report the reason why a stopped run cannot go on. `reported` is the one that was reported last, and how
/// long ago.
pub(crate) fn is_reason_due(reported: Option<(&str, Duration)>, reason: &str) -> bool {
    !reason.is_empty() && reported.is_none_or(|(last, ago)| last != reason && ago >= REASON_INTERVAL)
}

/// Whether to break off the requests that a stopped terraform has handed to the kernel, so that they do not arrive
/// after another run has the lock. `has_failed`: the last request of the keeper has failed. Then the kernel may be
/// repeating those requests until the network is back.
///
/// A service that answers gets them anyway, so a stop without an outage breaks nothing off. A keeper that is silent
/// counts as an outage after a while: a twentieth of the lease, and a taker needs at least a fifth of it.
pub(crate) fn are_requests_aborted(terms: Terms, look: Look, has_failed: bool, stopped_for: Duration) -> bool {
    match look {
        Look::Ours => false,
        Look::Lost => true,
        Look::Unknown => has_failed || stopped_for >= terms.length() / 20,
    }
}

/// Decides what to do with a stopped run after a look at the lock.
pub(crate) fn next_step(terms: Terms, look: Look, run: StoppedRun) -> FenceStep {
    if look == Look::Lost {
        return FenceStep::End(EndReason::LockLost);
    }
    if run.interrupts >= INTERRUPTS_TO_END {
        return FenceStep::End(EndReason::Person);
    }
    let step = match (look, run.is_rearmed, run.is_renewed) {
        (Look::Ours, true, true) => FenceStep::Continue,
        // It goes on without a fence. If a new fuse could be made, the one that was renewed for is dead again.
        (Look::Ours, false, true) if !run.can_rearm => FenceStep::Continue,
        (Look::Ours, true, false) => FenceStep::Renew,
        (Look::Ours, false, _) if run.can_rearm => FenceStep::Rearm,
        (Look::Ours, false, _) => FenceStep::RenewWithoutFence,
        (Look::Unknown | Look::Lost, ..) => FenceStep::LookAgain,
    };
    // The service may show the lock and refuse the renewal for ever.
    if step != FenceStep::Continue && !run.has_person && run.stopped_for >= terms.longest_stop() {
        return FenceStep::End(EndReason::TimedOut);
    }
    step
}

/// A point of the cleanup after a run, at which the fence of its lease may end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CleanupPoint {
    /// It is known whether terraform has died, and whether it may have left a lock.
    Judged { has_died: bool, may_hold: bool },
    /// The processes of a terraform that has died were ended as far as they may be. `may_release`: none of them works
    /// any more, so its locks may be released.
    TreeEnded { may_release: bool },
    /// The locks were released or are kept.
    CleanedUp(Withdrawal),
}

/// What has become of the promise of the run's lease, after the cleanup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Withdrawal {
    /// Nothing was promised, or the record of the lock that stays on purpose promises no fence any more.
    Done,
    /// No lock of the lease stays on purpose: it is another run's, or gone, or its lease may lapse.
    NoLock,
    /// The lock stays on purpose, and its record may still promise a fence.
    Failed,
}

/// Returns whether the fence ends at this point.
///
/// If terraform has died, a script of its provisioner may still work. So the fence stays until no process of the run
/// works any more, or until the promise of a lock that is kept was withdrawn. In all other cases, the fence stays after
/// the end of `tf`: another run may have the lock by the deadline, at which the kernel kills the group. If terraform has exited by itself, the fence must
/// not stop a daemon that a provisioner has started on purpose.
pub(crate) fn ends_at(point: CleanupPoint) -> bool {
    match point {
        CleanupPoint::Judged { has_died, may_hold } => !(has_died && may_hold),
        CleanupPoint::TreeEnded { may_release } => may_release,
        CleanupPoint::CleanedUp(withdrawal) => withdrawal == Withdrawal::Done,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_reported_once_and_another_one_a_minute_later() {
        let [early, late] = [59, 60].map(Duration::from_secs);
        for (reported, reason, expected) in [
            (None, "", false),
            (None, "no network", true),
            (Some(("no network", late)), "no network", false),
            (Some(("no network", early)), "login expired", false),
            (Some(("no network", late)), "login expired", true),
            (Some(("no network", late)), "", false),
        ] {
            assert_eq!(is_reason_due(reported, reason), expected, "{reported:?} {reason}");
        }
    }

    #[test]
    fn a_write_after_the_last_renewal_is_late_if_the_loss_was_found_without_a_stop_and_after_the_deadline_otherwise() {
        let at = |second: i64| Some(Timestamp::from_second(1_790_000_000 + second).unwrap());
        for (is_stopped_in_time, has_exited, written, expected) in [
            (false, false, at(0), LateWrite::No),
            (false, false, at(1), LateWrite::BeforeTheLossWasFound),
            (false, true, at(0), LateWrite::No),
            (false, true, at(1), LateWrite::BeforeTheLossWasFound),
            (false, false, None, LateWrite::No),
            (true, false, at(240), LateWrite::No),
            (true, false, at(241), LateWrite::AfterTheDeadline),
            (true, true, at(0), LateWrite::AfterTheDeadline),
            (true, false, None, LateWrite::No),
        ] {
            let lost = Lost {
                is_stopped_in_time,
                is_lost_before_deadline: false,
                has_exited,
                renewed: at(0),
                deadline: at(240),
                written,
            };
            assert_eq!(late_write(lost), expected, "{lost:?}");
            // Such a loss cannot come from the end of the lease.
            let lost = Lost { is_lost_before_deadline: true, ..lost };
            let is_admitted = is_stopped_in_time && written == at(240);
            let expected = if is_admitted { LateWrite::BeforeTheLossWasFound } else { expected };
            assert_eq!(late_write(lost), expected, "{lost:?}");
        }
        let never = Lost {
            is_stopped_in_time: true,
            is_lost_before_deadline: true,
            has_exited: false,
            renewed: None,
            deadline: None,
            written: at(0),
        };
        for is_stopped_in_time in [false, true] {
            assert_eq!(late_write(Lost { is_stopped_in_time, ..never }), LateWrite::No);
        }
    }

    #[test]
    fn a_lock_that_another_run_has_taken_before_the_deadline_was_lost_before_it() {
        let at = |second: i64| Timestamp::from_second(1_790_000_000 + second).unwrap();
        let another = |created: String| Loss::Another { who: "a@b".to_owned(), created };
        let claimed =
            |second: i64| Loss::Claimed(Claim { by: "a@b".to_owned(), at: 1_790_000_000 + second, number: 1 });
        for (loss, expected) in [
            (another(at(239).to_string()), true),
            (another(at(240).to_string()), false),
            (another("2026-13-99".to_owned()), false),
            (another(String::new()), false),
            (claimed(239), true),
            (claimed(240), false),
            (Loss::Gone, false),
        ] {
            assert_eq!(is_lost_before(&loss, at(240)), expected, "{loss:?}");
        }
    }

    #[test]
    fn a_fuse_that_ends_before_its_deadline_or_that_tf_has_killed_was_killed() {
        let [early, deadline] = [239, 240].map(Duration::from_secs);
        for (is_killed_by_us, now, deadline, expected) in [
            (false, early, Some(deadline), StopCause::FuseKilled),
            (false, deadline, Some(deadline), StopCause::Deadline),
            (false, deadline, None, StopCause::FuseKilled),
            (true, early, Some(deadline), StopCause::FuseKilled),
            (true, deadline, Some(deadline), StopCause::FuseKilled),
        ] {
            assert_eq!(stop_cause(is_killed_by_us, now, deadline), expected, "{is_killed_by_us} {now:?} {deadline:?}");
        }
    }

    #[test]
    fn an_unlock_without_an_end_in_the_log_is_over_after_two_reads_unless_terraform_may_still_send_its_request() {
        for bits in 0..8_u8 {
            let bit = |place: u8| bits & (1 << place) != 0;
            for (reads, at_most) in [(1, UnlockStep::ReadAgain), (2, UnlockStep::Over), (3, UnlockStep::Over)] {
                let seen = LostInUnlock { is_end_logged: bit(0), has_exited: bit(1), is_stopped: bit(2), reads };
                let is_silent = bit(1) || !(bit(0) || bit(2));
                let expected = if is_silent { at_most } else { UnlockStep::Fenced };
                assert_eq!(unlock_step(seen), expected, "{seen:?}");
            }
        }
    }

    #[test]
    fn requests_in_flight_are_broken_off_unless_the_lock_is_seen_to_be_the_runs() {
        let terms = Terms::new(Duration::from_mins(5)).unwrap();
        for (look, has_failed, seconds, expected) in [
            (Look::Ours, false, 999, false),
            (Look::Ours, true, 999, false),
            (Look::Lost, false, 0, true),
            (Look::Lost, true, 0, true),
            (Look::Unknown, true, 0, true),
            (Look::Unknown, false, 14, false),
            (Look::Unknown, false, 15, true),
        ] {
            let stopped_for = Duration::from_secs(seconds);
            let decided = are_requests_aborted(terms, look, has_failed, stopped_for);
            assert_eq!(decided, expected, "{look:?} {has_failed} {seconds}");
        }
    }

    #[test]
    fn a_stopped_run_goes_on_only_with_its_lock_and_ends_only_for_a_reason() {
        let terms = Terms::new(Duration::from_mins(5)).unwrap();
        for look in [Look::Ours, Look::Lost, Look::Unknown] {
            for bits in 0..16_u8 {
                for interrupts in [0, 2, 3] {
                    for minutes in [0, 14, 15] {
                        let bit = |place: u8| bits & (1 << place) != 0;
                        let run = StoppedRun {
                            is_rearmed: bit(0),
                            can_rearm: bit(1),
                            is_renewed: bit(2),
                            has_person: bit(3),
                            interrupts,
                            stopped_for: Duration::from_mins(minutes),
                        };
                        let step = next_step(terms, look, run);
                        let expected = match look {
                            Look::Lost => FenceStep::End(EndReason::LockLost),
                            _ if interrupts == 3 => FenceStep::End(EndReason::Person),
                            Look::Ours if bit(2) && (bit(0) || !bit(1)) => FenceStep::Continue,
                            _ if !bit(3) && minutes == 15 => FenceStep::End(EndReason::TimedOut),
                            Look::Ours if bit(0) => FenceStep::Renew,
                            Look::Ours if bit(1) => FenceStep::Rearm,
                            Look::Ours => FenceStep::RenewWithoutFence,
                            Look::Unknown => FenceStep::LookAgain,
                        };
                        assert_eq!(step, expected, "{look:?} {run:?}");
                    }
                }
            }
        }
    }

    /// Whatever else is known: a terraform that has released its lock is left alone, one that works without its lock is
    /// not, and only a lock that nobody else has lets it save its state.
    #[test]
    fn a_lost_lock_ends_the_terraform_that_has_not_released_it() {
        let facts = [false, true];
        for phase in [PhaseAtLoss::Held, PhaseAtLoss::Unlocking, PhaseAtLoss::Released] {
            for (is_gone, is_stopped) in facts.into_iter().flat_map(|one| facts.map(|other| (one, other))) {
                for (has_exited, is_look) in facts.into_iter().flat_map(|one| facts.map(|other| (one, other))) {
                    let found = FoundLoss { phase, is_gone, is_stopped, has_exited, is_look };
                    let may_release_anothers = phase == PhaseAtLoss::Unlocking && is_stopped && !has_exited;
                    let works = phase == PhaseAtLoss::Held || may_release_anothers;
                    let step = loss_step(found);
                    assert_eq!(step == LossStep::Release, phase == PhaseAtLoss::Released, "{found:?}");
                    assert_eq!(matches!(step, LossStep::Kill | LossStep::Interrupt), works && !is_look, "{found:?}");
                    assert_eq!(step == LossStep::Interrupt, works && !is_look && is_gone && !is_stopped, "{found:?}");
                    assert_eq!(step == LossStep::Remember, works && is_look, "{found:?}");
                }
                let step = guardians_loss_step(phase, is_gone);
                assert_eq!(step == LossStep::Kill, phase == PhaseAtLoss::Held && !is_gone, "{phase:?} {is_gone}");
                assert_eq!(step == LossStep::Release, phase == PhaseAtLoss::Released, "{phase:?} {is_gone}");
            }
        }
    }

    #[test]
    fn the_fence_ends_when_no_process_can_write_any_more_or_no_lock_promises_it() {
        for has_died in [false, true] {
            for may_hold in [false, true] {
                let ends = ends_at(CleanupPoint::Judged { has_died, may_hold });
                assert_eq!(ends, !has_died || !may_hold, "{has_died} {may_hold}");
            }
        }
        for fact in [false, true] {
            assert_eq!(ends_at(CleanupPoint::TreeEnded { may_release: fact }), fact);
        }
        for withdrawal in [Withdrawal::Done, Withdrawal::NoLock, Withdrawal::Failed] {
            assert_eq!(ends_at(CleanupPoint::CleanedUp(withdrawal)), withdrawal == Withdrawal::Done);
        }
    }
}
