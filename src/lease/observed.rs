//! A lease as a read has found it, for people and programs that look at a lock.

use std::fmt;
use std::time::Duration;

use jiff::Timestamp;

use super::record::{Claim, NotBelieved, Promise, Record};
use super::takeover::{self, LeaseState};
use super::terms::Terms;

/// The lease record of a lock, and the read that has found it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ObservedLease {
    /// The record, or the reason why it is not believed.
    pub(crate) record: Result<Record, NotBelieved>,
    /// The service's time in the response that contained the record. `None` if the response had none that counts.
    pub(crate) date: Option<Timestamp>,
    /// The region in which the record was read.
    pub(crate) region: String,
}

/// Why a lease says nothing about its lock. The lock is then judged as one without a lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LeaseDoubt {
    NotBelieved(NotBelieved),
    /// The service did not send its time, so the age of the lease is not known.
    NoTime,
}

impl fmt::Display for LeaseDoubt {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotBelieved(reason) => reason.fmt(formatter),
            Self::NoTime => formatter.write_str("the age of its lease is not known, because the service sent no time"),
        }
    }
}

/// Whether a lease was renewed in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Freshness {
    /// The holder renewed it in time.
    Fresh,
    /// The holder did not.
    Lapsed,
}

/// A lease that is believed. All ages are by the service's time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KnownLease<'a> {
    pub(crate) record: &'a Record,
    /// The length of the lease.
    pub(crate) length: Duration,
    /// The service's time at which the lease was last renewed.
    pub(crate) renewed: Timestamp,
    /// How long ago that was. Zero if it is in the future by no more than the service's clocks differ.
    pub(crate) age: Duration,
    /// Whether the lease was renewed in time. A claim changes nothing about that: a person may claim the lock of a
    /// holder that works, and the holder works on until its own deadline.
    pub(crate) freshness: Freshness,
    /// The claim of another host. `None` if the lock was not claimed.
    pub(crate) claim: Option<KnownClaim<'a>>,
    /// Whether the record was read in the region in which it was written.
    pub(crate) is_same_region: bool,
}

/// The claim of another host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct KnownClaim<'a> {
    pub(crate) claim: &'a Claim,
    /// How long ago the claim was made. Zero if it is in the future, as for [`KnownLease::age`].
    pub(crate) age: Duration,
    /// Whether the taker has not deleted the lock in the time of a claim.
    pub(crate) has_lapsed: bool,
}

impl ObservedLease {
    /// Returns the lease, or the reason why it says nothing.
    ///
    /// # Errors
    /// See [`LeaseDoubt`].
    pub(crate) fn known(&self) -> Result<KnownLease<'_>, LeaseDoubt> {
        let record = self.record.as_ref().map_err(|reason| LeaseDoubt::NotBelieved(*reason))?;
        let now = self.date.ok_or(LeaseDoubt::NoTime)?;
        let state = takeover::state(Ok(record), now);
        if let LeaseState::None(reason) = state {
            return Err(LeaseDoubt::NotBelieved(reason));
        }
        let freshness = if takeover::holder_has_lapsed(record, now) { Freshness::Lapsed } else { Freshness::Fresh };
        let claim_has_lapsed = matches!(state, LeaseState::ClaimLapsed | LeaseState::ClaimLapsedEarly);
        let malformed = LeaseDoubt::NotBelieved(NotBelieved::Malformed);
        let age = |since: Timestamp| Duration::try_from(now.duration_since(since)).unwrap_or_default();
        let renewed = record.renewed_at().ok_or(malformed)?;
        let claim = match &record.taken {
            None => None,
            Some(claim) => {
                let age = claim.at().map(age).ok_or(malformed)?;
                Some(KnownClaim { claim, age, has_lapsed: claim_has_lapsed })
            }
        };
        Ok(KnownLease {
            record,
            length: record.terms().map(Terms::length).ok_or(malformed)?,
            renewed,
            age: age(renewed),
            freshness,
            claim,
            is_same_region: record.region == self.region,
        })
    }

    /// Returns the record if a person may see what it says. `None` if it is not believed: then it shows nothing. A
    /// record whose age is not known is the holder's nevertheless.
    pub(crate) fn shown_record(&self) -> Option<&Record> {
        match self.known() {
            Ok(known) => Some(known.record),
            Err(LeaseDoubt::NoTime) => self.record.as_ref().ok(),
            Err(LeaseDoubt::NotBelieved(_)) => None,
        }
    }

    /// Returns whether the holder did not renew the lease in time. False if the lease says nothing.
    pub(crate) fn has_lapsed(&self) -> bool {
        self.known().is_ok_and(|lease| lease.freshness == Freshness::Lapsed)
    }

    /// Returns how long it takes until a taker may begin to release the lock, if the holder does not renew the lease
    /// any more. Zero if it may begin now. `since` is how long this run has existed.
    ///
    /// `None` if the holder renews its lease in time, or if the lock is never released without being asked. Also if the
    /// lease had lapsed when this run began: the run has tried to release the lock then, and a repetition would fail as
    /// well.
    pub(crate) fn lapses_after(&self, since: Duration) -> Option<Duration> {
        let lease = self.known().ok()?;
        let (terms, now) = (lease.record.terms()?, self.date?);
        let before = now.checked_sub(since).ok()?;
        let is_promised = lease.fence() == Promise::Stop && lease.is_same_region && lease.claim.is_none();
        let is_late = lease.age > terms.working_time();
        let had_lapsed = terms.has_lapsed(lease.renewed, before);
        (is_promised && is_late && !had_lapsed).then(|| terms.time_to_lapse(lease.renewed, now))
    }
}

impl KnownLease<'_> {
    /// Returns what the holder's host promises about the time after the lease.
    pub(crate) fn fence(&self) -> Promise {
        self.record.fence
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::record::Renewal;
    use super::*;

    pub(crate) const NOW: i64 = 1_790_000_000;

    /// Returns the lease of the lock `id` that was renewed `age` seconds ago and claimed `claimed` seconds ago.
    pub(crate) fn lease(id: &str, age: i64, claimed: Option<i64>, fence: Promise) -> ObservedLease {
        let terms = Terms::new(Duration::from_mins(5)).unwrap();
        let mut record = Record::new(id, terms, Renewal { renewed: NOW - age, beat: 7 }, fence);
        record.taken = claimed.map(|age| Claim { by: "bert@ci-8".to_owned(), at: NOW - age, number: 1 });
        record.region = "r".to_owned();
        ObservedLease { record: Ok(record), date: Timestamp::from_second(NOW).ok(), region: "r".to_owned() }
    }

    #[test]
    fn a_lease_is_known_by_the_time_of_the_response_alone() {
        let seconds = Duration::from_secs;
        for (age, claimed, freshness, shown) in [
            (40, None, Freshness::Fresh, 40),
            (-5, None, Freshness::Fresh, 0),
            (310, None, Freshness::Fresh, 310),
            (311, None, Freshness::Lapsed, 311),
            (400, Some(5), Freshness::Lapsed, 400),
            // A person who may write the lock may claim it at any time.
            (40, Some(5), Freshness::Fresh, 40),
            (310, Some(71), Freshness::Fresh, 310),
            (311, Some(5), Freshness::Lapsed, 311),
            (400, Some(71), Freshness::Lapsed, 400),
        ] {
            let lease = lease("id", age, claimed, Promise::Stop);
            let known = lease.known().unwrap();
            assert_eq!((known.freshness, known.age, known.length), (freshness, seconds(shown), seconds(300)), "{age}");
            let claim = known.claim.map(|claim| (claim.age, claim.has_lapsed));
            assert_eq!(claim, claimed.map(|age| (Duration::from_secs(age.unsigned_abs()), age > 70)));
            assert_eq!(lease.has_lapsed(), freshness == Freshness::Lapsed);
            assert!(known.is_same_region);
        }
    }

    #[test]
    fn a_lease_that_is_not_renewed_in_time_lapses_soon_and_a_takeover_that_was_refused_before_is_not_due() {
        let seconds = Duration::from_secs;
        for (age, claimed, fence, since, expected) in [
            (40, None, Promise::Stop, 5, None),
            // The holder may work for 240 s of 300 s.
            (240, None, Promise::Stop, 5, None),
            (241, None, Promise::Stop, 5, Some(69)),
            (310, None, Promise::Stop, 5, Some(0)),
            (315, None, Promise::Stop, 5, Some(0)),
            (316, None, Promise::Stop, 5, None),
            (316, None, Promise::Stop, 6, Some(0)),
            (315, None, Promise::None, 5, None),
            (241, None, Promise::None, 5, None),
            (315, Some(1), Promise::Stop, 5, None),
        ] {
            let lease = lease("id", age, claimed, fence);
            assert_eq!(
                lease.lapses_after(seconds(since)),
                expected.map(seconds),
                "{age} {claimed:?} {fence:?} {since}"
            );
            let elsewhere = ObservedLease { region: "s".to_owned(), ..lease.clone() };
            let undated = ObservedLease { date: None, ..lease };
            assert_eq!((elsewhere.lapses_after(seconds(since)), undated.lapses_after(seconds(since))), (None, None));
        }
    }

    #[test]
    fn a_lease_that_is_not_believed_or_has_no_time_says_nothing() {
        let good = lease("id", 400, None, Promise::Stop);
        let future = NotBelieved::Future;
        for (lease, doubt) in [
            (ObservedLease { record: Err(NotBelieved::TooLarge), ..good.clone() }, NotBelieved::TooLarge.into()),
            (ObservedLease { date: None, ..good.clone() }, LeaseDoubt::NoTime),
            (lease("id", -11, None, Promise::Stop), future.into()),
            (lease("id", 400, Some(-11), Promise::Stop), future.into()),
            (ObservedLease { date: Some(Timestamp::MIN), ..good.clone() }, future.into()),
        ] {
            assert_eq!(lease.known(), Err(doubt), "{lease:?}");
            assert!(!lease.has_lapsed() && !doubt.to_string().is_empty());
        }
        let long_ago = ObservedLease { date: Some(Timestamp::MAX), ..good.clone() };
        assert!(long_ago.has_lapsed());
        let elsewhere = ObservedLease { region: "s".to_owned(), ..good };
        assert!(!elsewhere.known().unwrap().is_same_region);
    }

    impl From<NotBelieved> for LeaseDoubt {
        fn from(reason: NotBelieved) -> Self {
            Self::NotBelieved(reason)
        }
    }
}
