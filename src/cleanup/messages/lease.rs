//! Messages about leases, and about the lock of another host.

use std::time::Duration;

use jiff::Timestamp;

use super::names::{lock, visible_lines};
use super::next_step::IF_UNUSED;
use crate::console::{argument, length_of_time, visible};
use crate::holder::lease_text;
use crate::lease::fence::{INTERRUPTS_TO_END, LateWrite, Loss, StopCause, Trouble};
use crate::lease::notice::{Notice, NoticeStep};
use crate::lease::takeover::{MAX_READ_GAP, Obstacle};
use crate::lock::takeover::{Lapsed, Progress, Reason};

/// Reports that the kernel has stopped terraform because of its lease.
pub(crate) fn lease_stopped(cause: StopCause, has_person: bool) -> String {
    let why = match cause {
        StopCause::Deadline => "the lease of its lock was not renewed in time",
        StopCause::FuseKilled => "it is not certain that it still has its lock",
    };
    let end = if has_person { "\nto end it now, without saving its state, press ^C three times" } else { "" };
    format!(
        "terraform was stopped, because {why}\n\
         it goes on when the service answers and the lock is still this run's{end}"
    )
}

/// Reports why a terraform that was stopped because of its lease stays stopped.
pub(crate) fn cannot_renew(reason: &str) -> String {
    format!("the lease cannot be renewed: {}", visible_lines(reason))
}

/// Reports that a terraform goes on that was stopped because of its lease.
pub(crate) fn lease_continued() -> &'static str {
    "the lease was renewed, and terraform goes on"
}

/// Reports that a run goes on that was stopped because of a lease, although its terraform had released the lock before.
pub(crate) fn released_while_stopped() -> &'static str {
    "terraform had released the lock, and the run goes on"
}

/// Answers the ^C number `keys` while terraform is stopped because of its lease.
pub(crate) fn key_while_stopped(keys: u8) -> String {
    match INTERRUPTS_TO_END.saturating_sub(keys) {
        0 => "ending the stopped terraform; its state is not saved".to_owned(),
        more => format!(
            "terraform is stopped, and stops gracefully when it goes on; to end it now, without saving its state, press \
             ^C {more} more {}",
            if more == 1 { "time" } else { "times" }
        ),
    }
}

/// Reports why terraform is asked to stop.
pub(crate) fn lease_interrupts(trouble: &Trouble) -> String {
    match trouble {
        Trouble::Refused(reason) => format!(
            "the lease of this run's lock cannot be renewed, so terraform is asked to stop: {}",
            visible_lines(reason)
        ),
        Trouble::Gone => "somebody has deleted the lock of this run, so terraform is asked to stop".to_owned(),
    }
}

/// Reports that this host is about to end, and what follows from it.
pub(crate) fn host_ends(Notice { end, announcement, at }: Notice, step: NoticeStep) -> String {
    // The end is at most 15 minutes ahead, so the date is left out.
    let at = at.and_then(|at| Timestamp::from_second(at).ok());
    let at = at.map_or_else(String::new, |at| at.strftime(" at %H:%M:%SZ").to_string());
    let next = match step {
        NoticeStep::Interrupt => "terraform is interrupted so that it can release its lock",
        NoticeStep::InterruptStopped => "terraform is stopped because of its lease, and is interrupted when it goes on",
        NoticeStep::SayOnly => "terraform is being stopped already",
    };
    format!("this host will be {}{at} ({}); {next}", end.word(), announcement.name())
}

/// Reports that the processes fail that renew the lease. `how` says how the last one has.
pub(crate) fn keepers_fail(how: &str) -> String {
    format!(
        "the process that renews the lease of this run's lock has failed several times in a row: {}\n\
         it is started again; the lease is not extended until that succeeds\n\
         to see what it does, set TFW_LOG to the name of a file",
        visible_lines(how)
    )
}

/// Reports that the second lock of a run has no lease. `path` is the lock's.
pub(crate) fn lock_without_lease(path: &str) -> String {
    format!("the lock of {} has no lease: a run has a lease only for its first lock", visible(path))
}

/// Reports that a run has no lease. `reason` says why.
pub(crate) fn no_lease(reason: &str) -> String {
    format!(
        "this run goes on without a lease: {}\nif this host vanishes, another host cannot release its lock without \
         being asked",
        visible_lines(reason)
    )
}

/// Reports that terraform was killed because the run has lost its lock. `write` is whether it may have written its
/// state after that. `plan` is the command that plans in the directory and the workspace of the run.
pub(crate) fn lock_lost(loss: Option<&Loss>, write: LateWrite, plan: &str) -> String {
    let how = match loss {
        Some(Loss::Claimed(claim)) => {
            let at = claim.at().map_or_else(String::new, |at| format!(" at {at:.0}"));
            // The lease may have lapsed, or a person may have typed `tf locks release --force`.
            format!("{} has claimed the lock of this run{at}", lease_text::claimant(claim))
        }
        Some(Loss::Another { who, created }) => {
            format!("the lock is held by another run now: {}, since {}", visible(who), visible(created))
        }
        Some(Loss::Gone) | None => "the lock of this run is gone: somebody has released or deleted it".to_owned(),
    };
    let over = match loss {
        Some(Loss::Claimed(_) | Loss::Another { .. }) => "over the state of the other run",
        Some(Loss::Gone) | None => "without a lock",
    };
    let state = match write {
        LateWrite::No => {
            "terraform was killed, so what it has changed since it last saved its state is not in the state".to_owned()
        }
        LateWrite::BeforeTheLossWasFound => {
            format!("terraform was killed; before that was known, it may have written its state {over}")
        }
        LateWrite::AfterTheDeadline => {
            format!("terraform ran after the deadline of its lease, so it may have written its state {over}")
        }
    };
    format!("{how}\n{state}\nto compare the state with the real resources, type: {plan}")
}

/// Reports that terraform was killed because it was stopped within its unlock, and its lock was gone. It writes its
/// state before its unlock. `plan` is as for [`lock_lost`].
pub(crate) fn lost_in_unlock(plan: &str) -> String {
    format!(
        "terraform was stopped while it released its lock, and the lock is gone\n\
         terraform was killed, because it might have released the lock of another run instead of its own\n\
         to compare the state with the real resources, type: {plan}"
    )
}

/// Reports that the record of a lock that stays still promises a fence.
pub(crate) const LEASE_STANDS: &str = "the lease of the lock that stays could not be withdrawn, so another host releases \
     the lock when the lease has lapsed";

/// Describes the holder of a lock with a lease: the URL of its CI job, or `user@host`.
fn leaseholder(Lapsed { info, record, .. }: &Lapsed) -> String {
    lease_text::name(&record.holder).unwrap_or_else(|| visible(&info.who))
}

/// Says whose lease has lapsed, and when it was last renewed.
pub(crate) fn lapsed_lease(lapsed: &Lapsed) -> String {
    format!(
        "the {} lease of {} was last renewed {} ago",
        lease_text::length(lapsed.length()),
        leaseholder(lapsed),
        length_of_time(lapsed.renewed_ago())
    )
}

/// Says who has claimed a lock and has not deleted it, and how long the holder may still work.
fn unfinished_claim(lapsed: &Lapsed) -> String {
    let since = |at: Timestamp| Duration::try_from(lapsed.now.duration_since(at)).unwrap_or_default();
    let Lapsed { record, now, .. } = lapsed;
    let claimed = record.taken.as_ref().map_or_else(
        || "another host claimed the lock".to_owned(),
        |claim| {
            let age = length_of_time(claim.at().map(since).unwrap_or_default());
            format!("{} claimed the lock {age} ago", lease_text::claimant(claim))
        },
    );
    let left = record.terms().zip(record.renewed_at()).map(|(terms, renewed)| terms.time_to_lapse(renewed, *now));
    let holder = match left {
        Some(left) if !left.is_zero() => {
            format!("; its holder cannot renew the lease, which lapses in {}", length_of_time(left))
        }
        _ => String::new(),
    };
    format!("{claimed}, and has not released it{holder}")
}

/// What a taker knows about a lock whose deletion it has requested without a response.
pub(crate) const DELETE_UNANSWERED: &str = "this run requested the deletion of the lock, and the response was lost";

/// Reports a step of a takeover. `command` returns the `tf locks` command with the given arguments.
pub(crate) fn takeover(progress: Progress<'_>, command: impl Fn(&str) -> String) -> String {
    match progress {
        Progress::Watches(lapsed, missing) => format!(
            "a state lock blocks this run: {}; {}\nreleasing the lock if nothing changes for {}; to stop waiting, press ^C",
            lock(&lapsed.info),
            lapsed_lease(lapsed),
            length_of_time(Duration::from_secs(missing.as_millis().div_ceil(1000).try_into().unwrap_or(u64::MAX)))
        ),
        Progress::WaitsFor(lapsed, claim) => format!(
            "a state lock blocks this run: {}; {}\n{} is releasing that lock; waiting for that",
            lock(&lapsed.info),
            lapsed_lease(lapsed),
            lease_text::claimant(claim)
        ),
        Progress::Took(lapsed) => {
            format!("released the lock: {}, because {}", lock(&lapsed.info), lapsed_lease(lapsed))
        }
        Progress::LeftObject(object) => format!(
            "there may be an object that tf could not look at: {}\npermission denied: s3:GetObject\nif it is a part of the \
             released lock, it still refuses every run whose backend sets use_lockfile\nwith that permission, type: {}",
            visible(&object.describe()),
            command("list")
        ),
        Progress::MayHaveTaken(lapsed) => format!(
            "the lock is gone: {}; {}\n{DELETE_UNANSWERED}, so another process may have deleted it",
            lock(&lapsed.info),
            lapsed_lease(lapsed)
        ),
        Progress::Gone(lapsed) => format!("the lock is already released: {}", lock(&lapsed.info)),
        Progress::Renewed(lapsed) => {
            format!("the lock is still held: {}; {} has renewed its lease", lock(&lapsed.info), leaseholder(lapsed))
        }
        Progress::Leaves(lapsed, reason) => {
            let id = argument(&lapsed.info.id);
            let next = match reason {
                Reason::NotTaken(failure) | Reason::Unknown(failure) => {
                    let when = failure
                        .denied()
                        .map_or_else(|| IF_UNUSED.to_owned(), |action| format!("with the permission {action}"));
                    format!("{when}, type: {} {id}", command("release"))
                }
                Reason::TooSlow(_) | Reason::Unsettled(_) => {
                    format!("{IF_UNUSED}, type: {} {id}", command("release"))
                }
                _ => format!("for details, type: {} {id}", command("show")),
            };
            let why = match reason {
                Reason::Obstacle(Obstacle::AnotherRegion) => {
                    "tf does not release it, because that run uses another AWS region".to_owned()
                }
                Reason::Obstacle(Obstacle::Claimed | Obstacle::ClaimLapsedEarly) => unfinished_claim(lapsed),
                Reason::Obstacle(Obstacle::RunsHere) => {
                    "tf does not release it, because a process on this host is or may be working for that run, or because \
                     tf on this host has said that it does not release that lock"
                        .to_owned()
                }
                Reason::Obstacle(_) => {
                    "tf does not release it, because its lease does not promise that terraform was stopped: that host \
                     cannot stop terraform in every case, or its tf has kept the lock on purpose"
                        .to_owned()
                }
                Reason::GlobalTable(reason) => visible_lines(reason),
                Reason::Failure(failure) | Reason::NotTaken(failure) => visible_lines(&failure.to_string()),
                Reason::TooSlow(gap) => format!(
                    "the service answers too slowly: tf must see at least every {} s that nothing has changed, and the \
                     last read took {} s",
                    MAX_READ_GAP.as_secs(),
                    gap.as_millis().div_ceil(1000)
                ),
                Reason::Unsettled(waited) => format!(
                    "in {}, tf has not seen the lock and the state unchanged for long enough: another program may be \
                     writing the state without a lock",
                    length_of_time(*waited)
                ),
                Reason::Unknown(failure) => {
                    format!("{DELETE_UNANSWERED}: {}", visible_lines(&failure.to_string()))
                }
            };
            let fact = match reason {
                Reason::Unknown(_) => "it is unknown whether the lock was released",
                _ => "the lock was not released",
            };
            format!("{fact}: {}; {}\n{why}\n{next}", lock(&lapsed.info), lapsed_lease(lapsed))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::notice::{Announcement, HostEnd};
    use crate::lease::record::{Claim, Promise, Record, Renewal};
    use crate::lease::terms::Terms;
    use crate::terraform::lock_info::LockInfo;

    #[test]
    fn a_notice_says_what_happens_to_the_host_when_why_and_what_follows() {
        let (end, announcement) = (HostEnd::Terminated, Announcement::SpotInterruption);
        let at = |text: &str| Some(text.parse::<Timestamp>().unwrap().as_second());
        for (at, step, expected) in [
            (
                at("2026-11-24T12:00:05Z"),
                NoticeStep::Interrupt,
                "this host will be terminated at 12:00:05Z (EC2 spot interruption); terraform is interrupted so that it \
                 can release its lock",
            ),
            (
                at("2026-11-24T09:08:07Z"),
                NoticeStep::SayOnly,
                "this host will be terminated at 09:08:07Z (EC2 spot interruption); terraform is being stopped already",
            ),
            (
                None,
                NoticeStep::InterruptStopped,
                "this host will be terminated (EC2 spot interruption); terraform is stopped because of its lease, and \
                 is interrupted when it goes on",
            ),
            (
                Some(i64::MIN),
                NoticeStep::SayOnly,
                "this host will be terminated (EC2 spot interruption); terraform is being stopped already",
            ),
        ] {
            assert_eq!(host_ends(Notice { end, announcement, at }, step), expected);
        }
    }

    #[test]
    fn a_taker_that_waits_for_a_claim_names_the_claimant() {
        let terms = Terms::new(Duration::from_mins(5)).unwrap();
        let record = Record::new("id", terms, Renewal { renewed: 1_790_000_000, beat: 7 }, Promise::Stop);
        let now = Timestamp::from_second(1_790_000_400).unwrap();
        let lapsed = Lapsed { info: LockInfo::default(), record, path: "b/k".into(), now };
        for (by, expected) in [("ci@other", "ci@other"), ("", "another host")] {
            let claim = Claim { by: by.into(), at: 1_790_000_390, number: 7 };
            let said = takeover(Progress::WaitsFor(&lapsed, &claim), ToOwned::to_owned);
            assert!(said.ends_with(&format!("\n{expected} is releasing that lock; waiting for that")), "{said}");
        }
    }

    #[test]
    fn a_taker_that_no_longer_waits_for_a_claim_says_how_old_it_is_and_when_the_lease_lapses() {
        let terms = Terms::new(Duration::from_mins(5)).unwrap();
        for (now, expected) in [
            (
                100,
                "ci@other claimed the lock 1 min 20 s ago, and has not released it; its holder cannot renew the lease, \
                 which lapses in 3 min 30 s",
            ),
            (400, "ci@other claimed the lock 6 min 20 s ago, and has not released it"),
        ] {
            let mut record = Record::new("id", terms, Renewal { renewed: 1_790_000_000, beat: 7 }, Promise::Stop);
            record.taken = Some(Claim { by: "ci@other".into(), at: 1_790_000_020, number: 7 });
            let now = Timestamp::from_second(1_790_000_000 + now).unwrap();
            let lapsed = Lapsed { info: LockInfo::default(), record, path: "b/k".into(), now };
            let reason = Reason::Obstacle(Obstacle::ClaimLapsedEarly);
            let said = takeover(Progress::Leaves(&lapsed, &reason), |words| format!("tf locks {words}"));
            assert!(said.starts_with("the lock was not released: "), "{said}");
            assert!(said.contains(&format!("\n{expected}\nfor details, type: tf locks show")), "{said}");
        }
    }

    #[test]
    fn a_lost_lock_is_said_to_be_whose_it_is_or_that_nobody_knows_who_released_it() {
        let claim = |by: &str| Claim { by: by.into(), at: 1_790_000_000, number: 7 };
        let another = Loss::Another { who: "bert@vm".into(), created: "2026-11-26T12:00:00Z".into() };
        for (loss, who) in [
            (
                Some(Loss::Claimed(claim("ci@other"))),
                "ci@other has claimed the lock of this run at 2026-09-21T14:13:20Z\n",
            ),
            (Some(Loss::Claimed(claim(""))), "another host has claimed the lock of this run at 2026-09-21T14:13:20Z\n"),
            (Some(another), "the lock is held by another run now: bert@vm"),
            (Some(Loss::Gone), "the lock of this run is gone: somebody has released or deleted it"),
            (None, "the lock of this run is gone: somebody has released or deleted it"),
        ] {
            let has_another = !matches!(loss, Some(Loss::Gone) | None);
            for write in [LateWrite::No, LateWrite::BeforeTheLossWasFound, LateWrite::AfterTheDeadline] {
                let said = lock_lost(loss.as_ref(), write, "terraform -chdir=d plan");
                assert!(said.ends_with("type: terraform -chdir=d plan"), "{said}");
                assert!(said.starts_with(who) && !said.contains("lapsed"), "{said}");
                assert_eq!(
                    said.contains("the state of the other run"),
                    write != LateWrite::No && has_another,
                    "{said}"
                );
                assert_eq!(said.contains("ran after the deadline"), write == LateWrite::AfterTheDeadline, "{said}");
                assert_eq!(said.contains("since it last saved its state"), write == LateWrite::No, "{said}");
            }
        }
    }
}
