//! Decides what the process that renews a lease does next. It has no clock of its own: it gets the times at which its
//! requests were sent and answered, and the service's time in the responses.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use super::record::{Promise, Renewal};
use super::terms::Terms;

/// A response of the service, and the times of this host around it. They are of `CLOCK_BOOTTIME`, which counts the time
/// in which the host was suspended (clock_gettime(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Response {
    /// Before the request was sent.
    pub(crate) sent: Duration,
    /// After the response was read.
    pub(crate) read: Duration,
    /// The `Date` of the response. It has whole seconds.
    pub(crate) date: Timestamp,
}

/// How much longer the service's time may take between two responses than this host's, until this host's clock counts
/// as one that has stood still. It covers the whole seconds of `Date` and clocks that differ between the service's
/// hosts.
const CLOCK_DIFFERENCE: SignedDuration = SignedDuration::from_secs(6);

/// Whether the service's clock was set back between two responses, or another host of the service has answered whose
/// clock is late. `stored` is the service's time in the stored record of this run. `None` if there is none. A keeper
/// that has just been started knows only that one.
pub(crate) fn has_gone_back(first: Response, last: Response, stored: Option<Timestamp>) -> bool {
    // At least this much time has passed between the two.
    let here = last.sent.saturating_sub(first.read);
    let expected = first.date.checked_add(SignedDuration::try_from(here).unwrap_or(SignedDuration::MAX)).ok();
    let latest = expected.into_iter().chain(stored).max();
    latest.is_some_and(|latest| latest.duration_since(last.date) > CLOCK_DIFFERENCE)
}

/// Whether the clock of this host stood still between two responses, as in a virtual machine that was paused. A slow
/// response cannot look like that, because the time from the first request to the last response is compared.
pub(crate) fn has_stood_still(first: Response, last: Response) -> bool {
    let here = last.read.saturating_sub(first.sent);
    let there = last.date.duration_since(first.date);
    there > SignedDuration::try_from(here).unwrap_or(SignedDuration::MAX).saturating_add(CLOCK_DIFFERENCE)
}

/// The next renewal of a lease, and until when the holder may work once the service has confirmed it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct NextRenewal {
    pub(crate) renewal: Renewal,
    /// On `CLOCK_BOOTTIME`.
    pub(crate) deadline: Duration,
}

/// Returns the renewal after the response `last`. `now` is the time of this host's `CLOCK_BOOTTIME`.
///
/// `stored` is the service's time in the stored record, and `fence` is what the next one promises. A record never
/// replaces one with a later time. So a record that promises nothing gets the later one of the two times: nobody counts
/// on its deadline.
///
/// The record gets the service's time in `last`. The holder counts from before it sent that request. So whatever
/// delayed the request or its response, the holder stops before others count the lease as lapsed.
pub(crate) fn next_renewal(
    terms: Terms,
    last: Response,
    now: Duration,
    fence: Promise,
    stored: Option<Timestamp>,
) -> NextRenewal {
    let latest = stored.filter(|_| fence == Promise::None).map_or(last.date, |stored| stored.max(last.date));
    NextRenewal {
        renewal: Renewal { renewed: latest.as_second(), beat: u64::try_from(now.as_millis()).unwrap_or(u64::MAX) },
        deadline: last.sent.saturating_add(terms.working_time()),
    }
}

/// Whether the keeper must read the lock before it renews at `now`. The renewal writes the time of the response `last`.
/// After an outage, that time is so old that the lease would be extended by little, and the next renewal would come an
/// interval later. After a read, the first renewal extends the lease in full.
pub(crate) fn is_outdated(terms: Terms, last: Response, now: Duration) -> bool {
    now.saturating_sub(last.sent) > terms.renewal_interval() * 3 / 2
}

/// Why a keeper must send a request again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Setback {
    /// There was no response, or the service refused the request.
    Failed,
    /// The service has no capacity for the request.
    Busy,
    /// The source of the credentials has failed. It must not be asked again and again: a few failed requests may lock
    /// an account.
    Credentials,
}

/// The shortest pause after a request that failed.
const MIN_RETRY_PAUSE: Duration = Duration::from_millis(250);

/// The longest pause after the source of the credentials has failed.
const MAX_CREDENTIALS_PAUSE: Duration = Duration::from_mins(1);

/// Returns how long to wait before the next request, after so many `failures` in a row. The pauses of the runs of a
/// fleet differ by up to a half, so that not all send a request at the same moment after an outage. `random` is any
/// number.
pub(crate) fn retry_pause(terms: Terms, failures: u32, setback: Setback, random: u64) -> Duration {
    let longest = match setback {
        Setback::Failed => terms.reconnection_time(),
        Setback::Busy => terms.renewal_interval() / 2,
        Setback::Credentials => MAX_CREDENTIALS_PAUSE,
    };
    let pause = (MIN_RETRY_PAUSE * 2_u32.pow(failures.clamp(1, 12) - 1)).min(longest);
    pause * u32::try_from(500 + random % 501).unwrap_or(1000) / 1000
}

/// What a keeper sees before each renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct KeeperSight {
    /// Whether `tf` or its guardian has told it to end.
    pub(crate) is_told_to_end: bool,
    /// Whether the terraform that holds the lock has ended.
    pub(crate) terraform_has_ended: bool,
    /// Whether the stop pipe has hung up: the fuse is gone, and the kernel has stopped terraform.
    pub(crate) stop_pipe_has_hung_up: bool,
    /// Whether `tf` or its guardian is alive. False if the socket of the keeper has hung up.
    pub(crate) is_supervised: bool,
    /// Whether terraform is stopped, for whatever reason.
    pub(crate) terraform_is_stopped: bool,
    /// Whether the last look has shown that the lock is the run's, and an interval has passed since the last renewal.
    pub(crate) is_seen_and_due: bool,
}

/// What a keeper does instead of the next renewal, or before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BeforeRenewal {
    Renew,
    /// It renews, although there is no fuse: terraform is stopped, and stays so until `tf` has made a new fuse.
    RenewForTheStopped,
    /// It reads the lock and reports what it saw, but does not renew the lease.
    Look,
    /// It ends. If terraform has ended, the fuse is told so.
    End,
}

/// Decides whether a keeper renews the lease. The lock of a dead run must never look alive.
///
/// If `tf` and its guardian are dead, nobody continues a stopped terraform. Then the lease is not renewed, and the fuse
/// ends terraform at its deadline. Otherwise the lock would be held for ever by a run that does nothing.
///
/// If the fuse is gone, terraform is stopped. As long as nobody makes a new fuse, for example because a person has
/// suspended `tf` (^Z), the lease is renewed all the same: the run can go on later. Terraform runs again only after
/// `tf` has looked at the lock.
pub(crate) fn before_renewal(sight: KeeperSight) -> BeforeRenewal {
    if sight.is_told_to_end || sight.terraform_has_ended || (!sight.is_supervised && sight.terraform_is_stopped) {
        BeforeRenewal::End
    } else if sight.stop_pipe_has_hung_up && sight.terraform_is_stopped && sight.is_seen_and_due {
        BeforeRenewal::RenewForTheStopped
    } else if sight.stop_pipe_has_hung_up {
        BeforeRenewal::Look
    } else {
        BeforeRenewal::Renew
    }
}

/// What the service answered to a renewal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Answer {
    Renewed,
    /// Its condition was not met, and a read showed the lock with a record that this keeper has sent: the response to
    /// an earlier copy was lost.
    RenewedBefore,
    /// Its condition was not met, and a read showed that the lock is gone, is another one, or was claimed.
    Lost,
    /// The service understood the request and refused it: a missing permission, expired credentials.
    Refused,
    /// No response, or none of the service.
    None,
    /// The service has no capacity for the request now.
    Busy,
}

/// What a keeper does after an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KeeperStep {
    /// It tells the fuse the new deadline, and renews again after an interval.
    TellDeadline,
    /// It renews again at once, and then at growing intervals.
    Retry,
    /// It reports that the lock is lost.
    ReportLoss,
    /// There never was a lease. It reports that, and ends. The fuse is taken down.
    GiveUp,
    /// It asks for one interrupt of terraform, and goes on. The lease cannot be renewed any more.
    InterruptTerraform,
}

/// What a keeper has seen so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct History {
    /// Whether any renewal was confirmed, or may have arrived although no answer came.
    pub(crate) may_have_a_record: bool,
    /// Whether it has asked for an interrupt.
    pub(crate) has_interrupted: bool,
}

/// Decides what to do after `answer`. `unconfirmed` is how long ago the request was sent whose response had the
/// `renewed` of the last confirmed record.
pub(crate) fn after_answer(terms: Terms, history: History, answer: Answer, unconfirmed: Duration) -> KeeperStep {
    match answer {
        Answer::Renewed | Answer::RenewedBefore => KeeperStep::TellDeadline,
        Answer::Lost => KeeperStep::ReportLoss,
        Answer::Refused if !history.may_have_a_record => KeeperStep::GiveUp,
        Answer::Refused if !history.has_interrupted && unconfirmed >= terms.refusal_time() => {
            KeeperStep::InterruptTerraform
        }
        Answer::None | Answer::Busy | Answer::Refused => KeeperStep::Retry,
    }
}

/// Whether a stored record that another keeper of the run has written confirms a renewal. `sent` is what the record of
/// that renewal promises, and `stored` what the stored one does. A stored record that promises more confirms nothing:
/// the caller would take the fence down, or count a promise as withdrawn, while others rely on it.
pub(crate) fn is_confirmed_by_another(sent: Promise, stored: Promise) -> bool {
    sent == Promise::Stop || stored == Promise::None
}

/// Returns the fence that the next record promises. Once the clock of this host has stood still, or the service's was
/// set back, it may do so again. `stored` is the argument of [`has_gone_back`].
pub(crate) fn fence(promised: Promise, first: Response, last: Response, stored: Option<Timestamp>) -> Promise {
    if has_stood_still(first, last) || has_gone_back(first, last, stored) { Promise::None } else { promised }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms() -> Terms {
        Terms::new(Duration::from_mins(5)).unwrap()
    }

    fn response(sent: u64, read: u64, date: i64) -> Response {
        Response {
            sent: Duration::from_secs(sent),
            read: Duration::from_secs(read),
            date: Timestamp::from_second(1_790_000_000 + date).unwrap(),
        }
    }

    #[test]
    fn a_clock_that_stood_still_is_noticed_and_a_slow_response_is_not() {
        for (first, last, expected) in [
            (response(0, 1, 0), response(60, 61, 60), false),
            (response(0, 1, 0), response(60, 61, 67), false),
            (response(0, 1, 0), response(60, 61, 68), true),
            (response(0, 30, 0), response(60, 61, 61), false),
            (response(0, 1, 0), response(60, 120, 119), false),
            (response(0, 1, 0), response(60, 61, 3600), true),
            // The service's clock was set back.
            (response(0, 1, 0), response(60, 61, -3600), false),
        ] {
            assert_eq!(has_stood_still(first, last), expected, "{first:?} {last:?}");
            let is_back = has_gone_back(first, last, None);
            let promised = if expected || is_back { Promise::None } else { Promise::Stop };
            assert_eq!(fence(Promise::Stop, first, last, None), promised);
            assert_eq!(fence(Promise::None, first, last, None), Promise::None);
        }
    }

    #[test]
    fn a_clock_of_the_service_that_was_set_back_is_noticed_and_a_slow_request_is_not() {
        let time = |date: i64| Timestamp::from_second(1_790_000_000 + date).unwrap();
        for (first, last, stored, expected) in [
            (response(0, 1, 0), response(61, 62, 60), None, false),
            (response(0, 1, 0), response(61, 62, 54), None, false),
            (response(0, 1, 0), response(61, 62, 53), None, true),
            (response(0, 1, 0), response(61, 62, -3600), None, true),
            // The first response was late, or the last request was.
            (response(0, 30, 0), response(60, 61, 24), None, false),
            (response(0, 1, 0), response(61, 120, 54), None, false),
            // The requests overlap.
            (response(0, 30, 0), response(10, 40, 0), None, false),
            // A keeper that was just started knows only the stored record.
            (response(0, 1, 0), response(0, 1, 0), Some(time(6)), false),
            (response(0, 1, 0), response(0, 1, 0), Some(time(7)), true),
            (response(0, 1, 0), response(0, 1, 0), Some(time(-100)), false),
        ] {
            assert_eq!(has_gone_back(first, last, stored), expected, "{first:?} {last:?} {stored:?}");
            let promised = if expected { Promise::None } else { Promise::Stop };
            assert_eq!(fence(Promise::Stop, first, last, stored), promised);
        }
    }

    #[test]
    fn a_record_that_promises_nothing_never_has_an_earlier_time_than_the_stored_one() {
        let (last, now) = (response(100, 130, 7), Duration::from_secs(160));
        for (fence, stored, expected) in [
            (Promise::Stop, None, 7),
            (Promise::Stop, Some(9), 7),
            (Promise::None, None, 7),
            (Promise::None, Some(5), 7),
            (Promise::None, Some(9), 9),
        ] {
            let stored = stored.map(|date| Timestamp::from_second(1_790_000_000 + date).unwrap());
            let next = next_renewal(terms(), last, now, fence, stored);
            assert_eq!(next.renewal.renewed, 1_790_000_000 + expected, "{fence:?} {stored:?}");
        }
    }

    #[test]
    fn the_holder_counts_from_before_the_request_whose_time_it_writes() {
        let next = next_renewal(terms(), response(100, 130, 7), Duration::from_secs(160), Promise::Stop, None);
        assert_eq!(next.renewal, Renewal { renewed: 1_790_000_007, beat: 160_000 });
        assert_eq!(next.deadline, Duration::from_secs(340));
    }

    #[test]
    fn after_an_outage_the_lock_is_read_so_that_the_next_renewal_counts_in_full() {
        let last = response(100, 101, 0);
        // An interval of 52 s, changed by at most a tenth, and a slow request.
        for (now, expected) in [(100, false), (158, false), (178, false), (179, true), (1000, true), (0, false)] {
            assert_eq!(is_outdated(terms(), last, Duration::from_secs(now)), expected, "{now}");
        }
    }

    #[test]
    fn the_pauses_grow_to_a_limit_that_depends_on_the_setback_and_are_never_the_same_for_a_fleet() {
        let seconds = Duration::from_secs;
        let short = Terms::new(seconds(60)).unwrap();
        for (terms, setback, longest) in [
            (terms(), Setback::Failed, seconds(5)),
            (terms(), Setback::Busy, terms().renewal_interval() / 2),
            (terms(), Setback::Credentials, seconds(60)),
            (short, Setback::Failed, seconds(5)),
            (short, Setback::Busy, short.renewal_interval() / 2),
            (short, Setback::Credentials, seconds(60)),
        ] {
            let mut before = Duration::ZERO;
            for failures in [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, u32::MAX] {
                let [least, most] = [0, 500].map(|random| retry_pause(terms, failures, setback, random));
                assert_eq!(least * 2, most, "{setback:?} {failures}");
                assert!(most >= before && most <= longest, "{setback:?} {failures}");
                before = most;
                for random in [1, 499, 501, u64::MAX] {
                    assert!((least..=most).contains(&retry_pause(terms, failures, setback, random)));
                }
            }
            assert_eq!(before, longest, "{setback:?}");
            assert_eq!(retry_pause(terms, 1, setback, 500), Duration::from_millis(250));
        }
    }

    #[test]
    fn a_stored_record_that_promises_more_confirms_nothing() {
        for (sent, stored, expected) in [
            (Promise::Stop, Promise::Stop, true),
            (Promise::Stop, Promise::None, true),
            (Promise::None, Promise::None, true),
            (Promise::None, Promise::Stop, false),
        ] {
            assert_eq!(is_confirmed_by_another(sent, stored), expected, "{sent:?} {stored:?}");
        }
    }

    #[test]
    fn a_keeper_renews_only_the_lease_of_a_terraform_that_works_or_will() {
        for bits in 0..64_u8 {
            let bit = |place: u8| bits & (1 << place) != 0;
            let sight = KeeperSight {
                is_told_to_end: bit(0),
                terraform_has_ended: bit(1),
                stop_pipe_has_hung_up: bit(2),
                is_supervised: bit(3),
                terraform_is_stopped: bit(4),
                is_seen_and_due: bit(5),
            };
            let expected = match (bit(0) || bit(1), bit(2), bit(3), bit(4)) {
                (true, ..) | (false, _, false, true) => BeforeRenewal::End,
                (false, true, _, true) if bit(5) => BeforeRenewal::RenewForTheStopped,
                (false, true, ..) => BeforeRenewal::Look,
                (false, false, ..) => BeforeRenewal::Renew,
            };
            assert_eq!(before_renewal(sight), expected, "{sight:?}");
        }
    }

    #[test]
    fn each_answer_has_its_step() {
        use KeeperStep::{GiveUp, InterruptTerraform, ReportLoss, Retry, TellDeadline};
        for record in [false, true] {
            for interrupted in [false, true] {
                for seconds in [0, 179, 180, 239] {
                    let history = History { may_have_a_record: record, has_interrupted: interrupted };
                    let step = |answer| after_answer(terms(), history, answer, Duration::from_secs(seconds));
                    assert_eq!(step(Answer::Renewed), TellDeadline);
                    assert_eq!(step(Answer::RenewedBefore), TellDeadline);
                    assert_eq!(step(Answer::Lost), ReportLoss);
                    assert_eq!(step(Answer::None), Retry);
                    assert_eq!(step(Answer::Busy), Retry);
                    let refused = match (record, interrupted, seconds >= 180) {
                        (false, ..) => GiveUp,
                        (true, false, true) => InterruptTerraform,
                        (true, ..) => Retry,
                    };
                    assert_eq!(step(Answer::Refused), refused, "{history:?} {seconds}");
                }
            }
        }
    }
}
