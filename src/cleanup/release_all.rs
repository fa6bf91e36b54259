//! Giving back the locks of a run whose operation is over: by `tf`, else by its guardian, else by the next `tf`. All three
//! do the same here; what differs is what they know, who can lose patience, and whom they can tell.

use crate::journal::runs::Replaced;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::aws::credentials::Purpose;
use crate::aws::failure::Failure;
use crate::cleanup::messages;
use crate::cleanup::places::Places;
use crate::cleanup::waiter::Patience;
use crate::cleanup::working_directory::Within;
use crate::crash_point;
use crate::journal::history;
use crate::journal::history::{By, Event, What};
use crate::journal::pending_requests::{Graveyard, Tombstone};
use crate::journal::runs::LeftOver;
use crate::lock::place::Place;
use crate::lock::reached::Reached;
use crate::lock::release::{self, Because, EXPLANATION_TIMEOUT, Light, Outcome, SERVICE_TIMEOUT, Situation};
use crate::terraform::lock_info::LockInfo;
use crate::terraform::log::{Log, RecordedLock, UnnamedLock};
use crate::terraform::version::{Telling, Version};
use crate::trace::trace;

/// What looking for an unnamed lock came to. The outer error is that of [`Patience::until`].
type Looked = Result<Result<Light, Failure>, &'static str>;

/// The locks of a run that may stand.
#[derive(Debug, Default)]
pub(crate) struct Standing {
    /// Those that its log names, and those that came to light when their places were read.
    pub(crate) named: Vec<RecordedLock>,
    /// Those that may be the run's, and why that is not certain.
    pub(crate) suspects: Vec<(LockInfo, &'static str)>,
    /// Those that could not be looked for, and why.
    pub(crate) unread: Vec<(UnnamedLock, String)>,
    /// Those that were asked for and are not to be seen, and whose requests may still land.
    pub(crate) awaited: Vec<UnnamedLock>,
}

impl Standing {
    /// Looks for what the log does not name. `died` as in [`give_back`].
    pub(crate) fn find(
        log: &Log,
        places: &Places,
        situation: &Situation,
        died: bool,
        patience: &mut Patience<'_>,
    ) -> Self {
        let mut standing = Self { named: log.standing().cloned().collect(), ..Self::default() };
        let _there = Within::enter(&places.working_directory);
        // One that ended by itself had its answer, and has gone on where it was given a lock.
        for unnamed in log.standing_unnamed().filter(|unnamed| died || !unnamed.is_only_asked_for()) {
            let places = places.of_unnamed(unnamed);
            let mut unseen = true;
            for place in &places {
                let looked = release::bring_to_light(unnamed, place, situation, died);
                unseen &= matches!(standing.add(unnamed, patience.until(looked)), Ok(Ok(Light::None)));
            }
            if !died || !unseen {
                continue;
            }
            if unnamed.granted.is_none() {
                if !places.is_empty() && may_land(Some(unnamed.asked), Timestamp::now()) {
                    standing.awaited.push(unnamed.clone());
                }
            } else if let Some(Outcome::Kept { reason, .. }) = not_believed(&places, situation, patience) {
                standing.unread.push((unnamed.clone(), reason));
            }
        }
        standing
    }

    /// Takes what looking for `unnamed` in one place came to, and gives it back.
    fn add(&mut self, unnamed: &UnnamedLock, looked: Looked) -> Looked {
        match &looked {
            Ok(Ok(Light::None)) => {}
            Ok(Ok(Light::Ours(lock))) => self.named.push((**lock).clone()),
            Ok(Ok(Light::Suspect(info, reason))) => self.suspects.push(((**info).clone(), *reason)),
            Ok(Err(failure)) => self.unread.push((unnamed.clone(), failure.to_string())),
            Err(reason) => self.unread.push((unnamed.clone(), (*reason).to_owned())),
        }
        looked
    }

    /// What is left of these for the next `tf`, when `settled` is what became of the named ones.
    pub(crate) fn left_over(self, settled: Vec<Settled>) -> LeftOver {
        LeftOver {
            locks: settled.into_iter().filter(Settled::is_left_over).map(|settled| settled.lock).collect(),
            unnamed: self.unread.into_iter().map(|(lock, _)| lock).chain(self.awaited).collect(),
            ..LeftOver::default()
        }
    }

    /// The same for whoever has nobody to tell: all of which a person should hear is left for the next `tf`, which judges it
    /// again, and says it.
    pub(crate) fn untold(self, settled: Vec<Settled>, log: &Log) -> LeftOver {
        let kept = |settled: &Settled| settled.may_stand && matches!(settled.outcome, Some(Outcome::Kept { .. }));
        let unread: Vec<UnnamedLock> = if self.suspects.is_empty() {
            self.unread.into_iter().map(|(lock, _)| lock).chain(self.awaited).collect()
        } else {
            log.standing_unnamed().cloned().collect()
        };
        LeftOver {
            locks: settled.into_iter().filter(kept).map(|settled| settled.lock).collect(),
            unnamed: unread,
            ..LeftOver::default()
        }
    }
}

/// What became of one recorded lock. None of what it may be: a lock that was refused, and looked for in vain.
#[derive(Debug)]
pub(crate) struct Settled {
    pub(crate) lock: RecordedLock,
    pub(crate) outcome: Option<Outcome>,
    /// The run had it, or died before it knew. One that was refused is somebody else's.
    pub(crate) may_stand: bool,
    /// Its request was not answered, and may still land: all of it, the part that was not seen, or once more, because the
    /// SDK of a terraform that gets no answer sends it again. Or its table or bucket does not exist now, and may be restored.
    pub(crate) may_still_come: bool,
}

impl Settled {
    /// Whether the next `tf` has something to do about it.
    pub(crate) fn is_left_over(&self) -> bool {
        self.may_stand && self.outcome.as_ref().is_some_and(Outcome::is_for_later)
    }
}

/// Gives back what of `standing` is ours.
///
/// `died`: terraform died, so that a lock without an answer may be its own too. `keep`: a reason not to touch any of
/// them. `is_claimed` asks whether another run that is alive says that a lock is its.
pub(crate) fn give_back(
    standing: &[RecordedLock],
    places: &Places,
    situation: &Situation,
    died: bool,
    keep: Option<&Outcome>,
    is_claimed: impl Fn(&str) -> bool,
    patience: &mut Patience<'_>,
) -> Vec<Settled> {
    let _there = Within::enter(&places.working_directory);
    let mut is_silent = false;
    // A migration holds two, and gives back the second first.
    let settled = standing.iter().rev().map(|recorded| {
        crash_point::reached("release: next lock");
        let may_stand = recorded.locked.is_some() || died;
        let named = |outcome: Outcome| may_stand.then_some(outcome);
        let purpose = if may_stand { Purpose::Work } else { Purpose::Explanation };
        // A service that was silent for one lock is not waited for as long for the next.
        let limit = if may_stand && !is_silent { SERVICE_TIMEOUT } else { EXPLANATION_TIMEOUT };
        let outcome = if let Some(kept) = keep {
            named(kept.clone())
        } else if is_claimed(&recorded.id) {
            // Whoever put this ID into our log knew it from there.
            named(Outcome::kept(messages::CLAIMED))
        } else {
            let places = places.of(recorded);
            match wherever_it_is(recorded, &places, situation, (limit, purpose), patience) {
                // One that was refused is not missed, nor one that was not had where another's is.
                Some(absent @ Outcome::Absent { .. })
                    if may_stand
                        && (recorded.locked.is_some() || matches!(absent, Outcome::Absent { anothers: None, .. }))
                        && !is_expected_to_be_gone(recorded, died, situation.run.program.as_ref()) =>
                {
                    Some(not_believed(&places, situation, patience).unwrap_or(absent))
                }
                outcome => outcome.or_else(|| named(Outcome::kept(messages::NO_PLACE))),
            }
        };
        trace!("lock {}: {outcome:?}", recorded.id);
        is_silent |= matches!(outcome, Some(Outcome::Kept { because: Because::NoAnswer, .. }));
        let may_still_come = died
            && match outcome {
                // Its place may come back, and a lock in it: a table that is restored under its name.
                Some(Outcome::Absent { excluded: true, .. }) => true,
                Some(Outcome::Absent { .. } | Outcome::Released(_)) => recorded.locked.is_none(),
                Some(Outcome::Kept { .. }) | None => false,
            };
        Settled { lock: recorded.clone(), may_stand, may_still_come, outcome }
    });
    settled.collect()
}

/// What becomes of those of `standing` that may be there, where locks are to be named and not released.
pub(crate) fn only_name(
    standing: &[RecordedLock],
    places: &Places,
    situation: &Situation,
    patience: &mut Patience<'_>,
) -> Vec<Settled> {
    let _there = Within::enter(&places.working_directory);
    let settled = standing.iter().rev().map(|recorded| {
        let places = places.of(recorded);
        let may_stand = |place: &Place, patience: &mut Patience<'_>| {
            patience.until(release::may_stand(place, &recorded.id)).unwrap_or(true)
        };
        let outcome = if places.is_empty() {
            Outcome::kept(messages::NO_PLACE)
        } else if places.iter().any(|place| may_stand(place, patience)) {
            Outcome::Kept { reason: messages::NEVER.to_owned(), because: Because::Never }
        } else {
            let absent = Outcome::Absent { anothers: None, excluded: false };
            not_believed(&places, situation, patience).unwrap_or(absent)
        };
        trace!("lock {}, which is to be named: {outcome:?}", recorded.id);
        Settled { lock: recorded.clone(), outcome: Some(outcome), may_stand: true, may_still_come: false }
    });
    settled.collect()
}

/// Whether terraform has most likely released `recorded` itself, and cannot say so: it ended by itself after it had begun to,
/// and its version logs no answers. Every failed command of Terraform 1.6 to 1.9 ends like that.
fn is_expected_to_be_gone(recorded: &RecordedLock, died: bool, program: Option<&Version>) -> bool {
    !died && recorded.unlocking && program.is_some_and(|program| program.telling() == Telling::Requests)
}

/// Which of `settled` were replaced while the run worked, which it did `until` then. It is written into the history.
pub(crate) fn replaced(
    settled: &[Settled],
    places: &Places,
    died: bool,
    until: Timestamp,
    by: By,
    patience: &mut Patience<'_>,
) -> Vec<Replaced> {
    let mut all = Vec::new();
    let _there = Within::enter(&places.working_directory);
    for Settled { lock, outcome, .. } in settled {
        let Some(Outcome::Absent { anothers: Some(id), .. }) = outcome else { continue };
        let mut standing = Vec::new();
        for place in places.of(lock) {
            standing.extend(patience.until(release::standing(&place)).unwrap_or_default());
        }
        let other = standing.iter().filter_map(|(_, standing)| standing.info()).find(|info| info.id == *id);
        if let Some(info) = other.filter(|info| worked_at_once(lock, info, died, until)) {
            let why = format!("while its run worked, {} locked the same state, ID {}", info.who, info.id);
            history::record(&Event::of_recorded(What::Replaced, by, lock, &why, None));
            all.push(Replaced { own: lock.clone(), by: info });
        }
    }
    all
}

/// Whether the holder of `other` locked the state while the run of `own` had not ended, which it had `until` then. A
/// terraform whose unlock was refused, because the lock was another's, tells so whatever the clocks of both hosts say.
fn worked_at_once(own: &RecordedLock, other: &LockInfo, died: bool, until: Timestamp) -> bool {
    let refused = !died && own.unlocking && !own.unlocked;
    own.locked.is_some() && (refused || other.created().is_some_and(|created| created <= until))
}

/// Why a lock that was seen in none of `places` does not count as gone. `None` where it does.
fn not_believed(places: &[Place], situation: &Situation, patience: &mut Patience<'_>) -> Option<Outcome> {
    match patience.until(async { tokio::time::timeout(SERVICE_TIMEOUT, situation.reached.believes(places)).await }) {
        Ok(Ok(true)) => None,
        Ok(Ok(false) | Err(_)) => {
            Some(Outcome::Kept { reason: messages::ANOTHER_ACCOUNT.to_owned(), because: Because::OtherAccount })
        }
        Err(reason) => Some(Outcome::later(reason)),
    }
}

/// Gives the lock back in the place where it is; a service that is silent is waited for as long as `limit`, and for an
/// explanation nothing takes longer. `None` where there is no place to look in.
fn wherever_it_is(
    recorded: &RecordedLock,
    places: &[Place],
    situation: &Situation,
    (limit, purpose): (Duration, Purpose),
    patience: &mut Patience<'_>,
) -> Option<Outcome> {
    let mut worst = None;
    for place in places {
        let release = async {
            let release = release::release(recorded, place, situation, (limit, purpose));
            if purpose == Purpose::Work {
                return release.await;
            }
            // Nobody is to wait for long for a lock that is most likely somebody else's.
            let silent = || Outcome::Kept { reason: messages::SILENT.to_owned(), because: Because::NoAnswer };
            tokio::time::timeout(limit, release).await.unwrap_or_else(|_| silent())
        };
        let outcome = patience.until(release).unwrap_or_else(Outcome::later);
        match outcome {
            Outcome::Released(_) => return Some(outcome),
            Outcome::Kept { .. } => worst = Some(outcome),
            Outcome::Absent { anothers, excluded } => {
                worst = match worst {
                    None => Some(Outcome::Absent { anothers, excluded }),
                    // No lock can be in one place, and none was in the other: it may still come there.
                    Some(Outcome::Absent { anothers: before, excluded: too }) => {
                        Some(Outcome::Absent { anothers: before.or(anothers), excluded: excluded && too })
                    }
                    kept => kept,
                }
            }
        }
    }
    worst
}

/// Keeps the facts of locks whose requests may still land. Gives those for which that worked.
///
/// `recent`: a request of the run can still be on its way.
pub(crate) fn bury(
    settled: &[Settled],
    situation: &Situation,
    recent: bool,
    graveyard: Option<&Graveyard>,
) -> Vec<String> {
    let late = settled.iter().filter(|settled| settled.may_still_come);
    late.filter_map(|Settled { lock, outcome, .. }| {
        let excluded = matches!(outcome, Some(Outcome::Absent { excluded: true, .. }));
        if !recent && !excluded {
            return None;
        }
        // A table that a request found missing was most likely never there. One in which the lock was had may be back.
        let abandoned = excluded && lock.locked.is_none();
        keep(graveyard, Tombstone { abandoned, unseen: excluded, ..Tombstone::new(lock, &situation.run) })
    })
    .collect()
}

/// Keeps the facts of the locks of `settled`, whose terraform ended by itself without an answer. Gives the IDs of those for which
/// that worked.
pub(crate) fn remember_abandoned<'a>(
    settled: impl Iterator<Item = &'a Settled>,
    situation: &Situation,
    graveyard: Option<&Graveyard>,
) -> Vec<String> {
    settled
        .filter_map(|Settled { lock, outcome, .. }| {
            let unseen =
                matches!(outcome, Some(Outcome::Kept { because: Because::NoAnswer | Because::NoCredentials, .. }));
            // Nobody has to try that again at once.
            let tried = unseen.then(Timestamp::now);
            keep(graveyard, Tombstone { abandoned: true, unseen, tried, ..Tombstone::new(lock, &situation.run) })
        })
        .collect()
}

/// Writes `tombstone` to disk. Returns the ID of its lock, or `None` if that failed or there is no state directory.
fn keep(graveyard: Option<&Graveyard>, tombstone: Tombstone) -> Option<String> {
    graveyard?.put(&tombstone).ok()?;
    Some(tombstone.lock.id)
}

/// Looks once whether a lock has come whose request nobody saw answered, and gives it back. What is kept of it stays for its
/// time: the request may land once more, or the other part of it. Where a person has asked for that, a service that is silent
/// is waited for as long as one may be; else a look takes no longer than `limit`. `None` where there is no place to look in, or
/// it is too early.
pub(crate) fn visit(
    tombstone: &Tombstone,
    places: &Places,
    (limit, purpose): (Duration, Purpose),
    patience: &mut Patience<'_>,
) -> Option<Outcome> {
    let _there = Within::enter(&places.working_directory);
    // Of a lock that was had a write may be on its way, for as long as a request can be. Only who was asked for it waits for that.
    let write_may_land = tombstone.lock.locked.is_some() && may_land(Some(tombstone.since), Timestamp::now());
    if write_may_land && purpose == Purpose::Explanation {
        return None;
    }
    // Its terraform is long dead, and one look is enough: the next `tf` looks again.
    let reached = Reached::default();
    let situation = Situation { run: tombstone.run.clone(), request_may_land: false, write_may_land, reached };
    let outcome = wherever_it_is(&tombstone.lock, &places.of(&tombstone.lock), &situation, (limit, purpose), patience);
    trace!("tombstone of {}: {outcome:?}", tombstone.lock.id);
    if let Some(Outcome::Released(_)) = outcome {
        let had = tombstone.lock.locked.is_some();
        let why =
            if had { "its table or bucket was away when it died" } else { "a dead terraform's request took it late" };
        history::record(&Event::of_recorded(What::Released, By::Recovery, &tombstone.lock, why, None));
    }
    outcome
}

/// Writes into the history what was released.
pub(crate) fn remember(settled: &[Settled], by: By, why: &str, reason: Option<&str>) {
    for Settled { lock, .. } in settled.iter().filter(|one| matches!(one.outcome, Some(Outcome::Released(_)))) {
        history::record(&Event::of_recorded(What::Released, by, lock, why, reason));
    }
}

/// Whether a request that was signed at `then` can still land: longer than any signature is valid it cannot.
pub(crate) fn may_land(then: Option<Timestamp>, now: Timestamp) -> bool {
    /// S3's are valid for 15 minutes, DynamoDB's for 5.
    const VALID: SignedDuration = SignedDuration::from_mins(20);
    then.is_none_or(|then| now.duration_since(then) < VALID)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terraform::log::Halves;

    #[test]
    fn only_an_unlock_that_was_begun_and_whose_answer_is_never_logged_is_expected_to_have_worked() {
        let info = LockInfo { id: crate::terraform::log::tests::ID.into(), ..LockInfo::default() };
        let at = "2026-11-23T01:46:07Z".parse().unwrap();
        for version in ["1.5.7", "1.6.0", "1.9.8", "1.10.0"] {
            let program = Version::of_record("Terraform version", version);
            for unlocking in [false, true] {
                for died in [false, true] {
                    let mut lock = RecordedLock::held(&info, "b", "k", Halves::default(), at);
                    lock.unlocking = unlocking;
                    let expected = unlocking && !died && ["1.6.0", "1.9.8"].contains(&version);
                    assert_eq!(is_expected_to_be_gone(&lock, died, program.as_ref()), expected, "{version}");
                    assert!(!is_expected_to_be_gone(&lock, died, None));
                }
            }
        }
    }

    #[test]
    fn two_worked_at_once_where_the_other_locked_before_the_end_or_refused_the_unlock() {
        let at = |second: u32| format!("2026-11-23T01:46:{second:02}Z");
        let info = |created: String| LockInfo {
            id: crate::terraform::log::tests::ID.into(),
            operation: "OperationTypeApply".into(),
            who: "anna@other".into(),
            version: "1.11.4".into(),
            created,
            path: "b/k".into(),
        };
        let end: Timestamp = at(30).parse().unwrap();
        let mut own = RecordedLock::held(&info(at(1)), "b", "k", Halves::default(), at(1).parse().unwrap());
        for (created, before) in [(at(20), true), (at(30), true), (at(40), false), ("yesterday".into(), false)] {
            for died in [false, true] {
                for unlocking in [false, true] {
                    own.unlocking = unlocking;
                    let expected = before || (!died && unlocking);
                    assert_eq!(worked_at_once(&own, &info(created.clone()), died, end), expected, "{created} {died}");
                }
            }
        }
        own.locked = None;
        assert!(!worked_at_once(&own, &info(at(20)), false, end), "it was refused, and did not work");
    }
}
