//! Giving a lock back: read, judge, delete on condition of exactly what was read; each half by itself.
//!
//! DynamoDB first and `.tflock` last, the reverse of taking, so that no contender gets half in. Both are tried even if
//! the other fails.
//!
//! Two things can still be on their way from a terraform that died. A *lock request* that was not answered can land
//! after we looked: so an absent half is looked for again, for [`LATE`]. A *write*, of the state or of the unlock's own
//! deletes, carries no condition and would hit whoever comes next: so before the first delete everything that such a
//! write would change must have been seen unchanged for [`QUIET`].
//!
//! One response proves nothing, because a proxy or a portal can have sent it. What no service sends is an error
//! ([`dynamodb`], [`s3`]); that a lock which was had is absent is believed when two looks in a row have found it so; that
//! a lock is deleted, when its place was read after the delete.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::digest::Comparison;
use super::failure::Failure;
use super::identity::Reached;
use super::place::Place;
use super::proof::{Run, Verdict, judge, judge_unnamed};
use super::stores::{Removed, Spot, Standing, Stores};
use super::{aws, digest, dynamodb, s3};
use crate::crash_point;
use crate::report;
use crate::settings::release_is_asked_for;
use crate::terraform::lock_info::{LockInfo, is_lock_id};
use crate::terraform::log::{Halves, Mark, RecordedLock, UnnamedLock};
use crate::trace::trace;

/// For how long a lock that was asked for, and not seen, is looked for.
const LATE: Duration = Duration::from_secs(5);

/// For how long nothing may have changed before the lock of a terraform that died while writing is given back.
const QUIET: Duration = Duration::from_secs(10);

/// For how long a service that fails is asked again: not longer than a person would wait.
const PATIENCE: Duration = Duration::from_secs(20);

/// For how long a write is waited for at most: somebody may go on writing there without a lock.
const LONGEST_QUIET: Duration = Duration::from_mins(1);

/// How many times a write is waited for: each time the lock was there before, gone while we waited, and there again.
const MOST_WINDOWS: u32 = 3;

/// Between two looks at the same thing.
const LOOK: Duration = Duration::from_millis(250);

/// What a conditional delete did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deleted {
    /// It is gone, by us.
    Yes,
    /// It is no longer the one that was read: to be read again. Gone, another's, or our own delete, whose answer was
    /// lost, so that the SDK sent it twice.
    Changed,
}

/// What is known of the run whose lock is to be given back.
#[derive(Clone, Debug)]
pub(crate) struct Situation {
    /// For the proof.
    pub(crate) run: Run,
    /// A request for the lock can still be on its way: terraform has died just now. One that ended by itself had its
    /// answers.
    pub(crate) request_may_land: bool,
    /// A write of it can still be on its way.
    pub(crate) write_may_land: bool,
    /// As whom the run reached its backends: what is not seen as somebody else is not gone.
    pub(crate) reached: Reached,
}

/// How giving a lock back came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// No lock of ours stood. `anothers` is the ID that stands there, if one does.
    Absent {
        /// Somebody else's lock at the same place.
        anothers: Option<String>,
    },
    /// It stood, and is gone.
    Released(Released),
    /// It stands, or may, and why.
    Kept {
        /// What is told of it.
        reason: String,
        /// Whether a later try may do better: a service was not to be reached, somebody still lived.
        later: bool,
    },
}

impl Outcome {
    /// Kept, and nothing that we could do later would change that.
    pub(crate) fn kept(reason: impl Into<String>) -> Self {
        Self::Kept { reason: reason.into(), later: false }
    }

    /// Why it is kept.
    pub(crate) fn reason(&self) -> Option<&str> {
        match self {
            Self::Kept { reason, .. } => Some(reason),
            Self::Absent { .. } | Self::Released(_) => None,
        }
    }

    /// Kept for now.
    pub(crate) fn later(reason: impl Into<String>) -> Self {
        Self::Kept { reason: reason.into(), later: true }
    }
}

/// What is told of a lock that was given back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Released {
    /// `Created` of the lock.
    pub(crate) created: Option<jiff::Timestamp>,
    /// A write was waited for: what was seen of it.
    pub(crate) write: Option<Write>,
    /// The state and its digest, where they do not fit any more.
    pub(crate) unfit: Option<Comparison>,
    /// The request for the lock was not answered, and one of its two parts was never seen: it may still land.
    pub(crate) is_partial: bool,
}

/// What became of a write that was on its way when terraform died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Write {
    /// The state changed while we waited.
    Landed,
    /// Nothing changed for as long as we waited.
    Quiet,
}

/// One place, and the services that it is in, as the run reached them.
struct Services<'a> {
    place: &'a Place,
    stores: Stores,
    /// Where its halves can stand.
    halves: Vec<Spot>,
}

impl<'a> Services<'a> {
    async fn connect(place: &'a Place) -> Result<Self, aws::Unreachable> {
        let stores = Stores::connect(&place.backend).await?;
        Ok(Self { place, halves: place.spots(&stores), stores })
    }

    /// Looks at everything that a write of the terraform that held `recorded` would change.
    async fn look(&self, recorded: &RecordedLock, run: &Run) -> Result<Look, Failure> {
        let state = s3::fingerprint(&self.stores.s3, &self.place.bucket, &self.place.key).await?;
        let digest = match &self.place.table {
            Some(table) => dynamodb::digest(&self.stores.dynamodb, table, &self.place.lock_path()).await?,
            None => None,
        };
        let mut look = Look { state: format!("{state:?} {digest:?}"), lock: String::new(), holds: false };
        for half in &self.halves {
            let Some(standing) = self.stores.read(half).await? else {
                look.lock.push_str("- ");
                continue;
            };
            let Some(info) = standing.info() else {
                return Err(Failure::no_answer(half.service(), &no_lock(half, &standing)));
            };
            look.lock.push_str(standing.text());
            look.holds |= judge(recorded, &info, run) != Verdict::Anothers;
        }
        Ok(look)
    }
}

/// One look at what a write of a dead terraform's would change.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Look {
    /// The state and its digest.
    state: String,
    /// What is in the places of the lock.
    lock: String,
    /// One of those may be the dead terraform's.
    holds: bool,
}

/// Why a lock is kept where something else than a lock was read.
fn no_lock(half: &Spot, standing: &Standing) -> String {
    format!("what was read there is no lock ({}): {}", half.describe(), standing.describe_no_lock())
}

/// Gives back the lock that the log recorded, if it stands and is ours.
pub(crate) async fn release(recorded: &RecordedLock, place: &Place, situation: &Situation) -> Outcome {
    let mut attempt = Attempt {
        recorded,
        place,
        situation,
        begun: Instant::now(),
        asked_to_go: Vec::new(),
        created: None,
        deleted: false,
        write: None,
        agreed: release_is_asked_for(),
    };
    loop {
        match attempt.go().await {
            Ok(outcome) => return outcome,
            Err(failure) => {
                trace!("release of {}: {failure}", recorded.id);
                if failure.is_final() || attempt.begun.elapsed() > PATIENCE {
                    let part = if attempt.deleted { "; its other part was released" } else { "" };
                    return Outcome::later(format!("{failure}{part}"));
                }
                sleep(LOOK).await;
            }
        }
    }
}

/// The locks that stand at `place` now: one, or two where somebody got half in. None where nothing can be read.
pub(crate) async fn standing(place: &Place) -> Vec<LockInfo> {
    let Ok(services) = Services::connect(place).await else { return Vec::new() };
    let mut locks: Vec<LockInfo> = Vec::new();
    for half in &services.halves {
        if let Ok(Some(standing)) = services.stores.read(half).await
            && let Some(info) = standing.info()
            && !locks.contains(&info)
        {
            locks.push(info);
        }
    }
    locks
}

/// Whether the lock `id` stands at `place`, or may: also where a service did not let it be read.
pub(crate) async fn may_stand(place: &Place, id: &str) -> bool {
    let Ok(services) = Services::connect(place).await else { return true };
    for half in &services.halves {
        match services.stores.read(half).await {
            Ok(Some(standing)) if standing.info().is_none_or(|info| info.id == id) => return true,
            Ok(_) => {}
            Err(_) => return true,
        }
    }
    false
}

/// What stands at `place` of a lock that the log of its run does not name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Light {
    /// Nothing that could be it.
    None,
    /// It is it.
    Ours(Box<RecordedLock>),
    /// It may be it, and why that is not certain.
    Suspect(Box<LockInfo>, &'static str),
}

/// Looks at `place` for a lock that the log does not name, again while a request for it may land, or while no service
/// answers. That one which was had is absent is believed at the second look.
///
/// # Errors
/// [`Failure`], when a service did not let it be read.
pub(crate) async fn bring_to_light(
    unnamed: &UnnamedLock,
    place: &Place,
    situation: &Situation,
    died: bool,
) -> Result<Light, Failure> {
    let begun = Instant::now();
    let patience = if died { PATIENCE } else { LOOK };
    let late = if situation.request_may_land && unnamed.granted.is_none() { LATE } else { Duration::ZERO };
    let mut absent = unnamed.granted.is_none();
    loop {
        match look_for(unnamed, place, &situation.run, died).await {
            Ok(Light::None) => {
                if absent && begun.elapsed() >= late {
                    return Ok(Light::None);
                }
                absent = true;
            }
            Err(failure) if !failure.is_final() && begun.elapsed() < patience => {
                trace!("a lock that the log does not name: {failure}");
                absent = unnamed.granted.is_none();
            }
            settled => return settled,
        }
        sleep(LOOK).await;
    }
}

/// One look of [`bring_to_light`].
async fn look_for(unnamed: &UnnamedLock, place: &Place, run: &Run, died: bool) -> Result<Light, Failure> {
    let services = Services::connect(place).await.map_err(|error| unreachable(&error))?;
    let mut light = Light::None;
    for half in &services.halves {
        let Some(standing) = services.stores.read(half).await? else { continue };
        let Some(info) = standing.info() else {
            return Err(Failure::no_answer(half.service(), &no_lock(half, &standing)));
        };
        if !is_lock_id(&info.id) {
            continue;
        }
        let verdict = judge_unnamed(unnamed, &info, standing.text(), run, died);
        trace!("{half:?} holds {}, which the log does not name: {verdict:?}", info.id);
        match verdict {
            Verdict::Ours => {
                let halves = Halves { s3: place.lock_file, dynamodb: place.table.is_some() };
                let mut lock = RecordedLock::held(&info, &place.bucket, &place.key, halves, unnamed.asked);
                lock.locked = unnamed.granted;
                // It was made in the moment in which it was asked for, and the log tells that moment to the millisecond.
                lock.asked = info.created().map_or(unnamed.asked, |created| created.max(unnamed.asked));
                // Of what its log does not tell anything may be under way.
                let tells = matches!(unnamed.mark, Mark::Object { .. });
                (lock.uploading, lock.unlocking) = (unnamed.uploading || !tells, unnamed.unlocking || !tells);
                return Ok(Light::Ours(Box::new(lock)));
            }
            Verdict::Doubt(reason) if run.is_of(&info.who) => light = Light::Suspect(Box::new(info), reason),
            Verdict::Doubt(_) | Verdict::Anothers => {}
        }
    }
    Ok(light)
}

/// A lock at `place` that only its own JSON connects with a run whose log is lost: the same user and host, made in the
/// time of that run. Two machines with one name pass the same test, so it is only ever named. `any_user`: the run may have
/// worked as another user of this host.
///
/// # Errors
/// [`Failure`], when a service did not let it be read.
pub(crate) async fn suspect(place: &Place, run: &Run, any_user: bool) -> Result<Option<LockInfo>, Failure> {
    let begun = Instant::now();
    loop {
        match look_for_suspect(place, run, any_user).await {
            Err(failure) if !failure.is_final() && begun.elapsed() < PATIENCE => sleep(LOOK).await,
            settled => return settled,
        }
    }
}

/// One look of [`suspect`].
async fn look_for_suspect(place: &Place, run: &Run, any_user: bool) -> Result<Option<LockInfo>, Failure> {
    let services = Services::connect(place).await.map_err(|error| unreachable(&error))?;
    for half in &services.halves {
        let Some(standing) = services.stores.read(half).await? else { continue };
        let Some(info) = standing.info() else {
            return Err(Failure::no_answer(half.service(), &no_lock(half, &standing)));
        };
        let is_possible = run.is_of(&info.who) || (any_user && run.is_on_its_host(&info.who));
        if is_possible && info.created().is_some_and(|created| created >= run.started) {
            return Ok(Some(info));
        }
    }
    Ok(None)
}

fn unreachable(error: &aws::Unreachable) -> Failure {
    Failure::refusal("AWS", &error.to_string())
}

/// One release, which may need several goes.
struct Attempt<'a> {
    recorded: &'a RecordedLock,
    place: &'a Place,
    situation: &'a Situation,
    begun: Instant,
    /// The halves that were ours, and were asked to go.
    asked_to_go: Vec<Spot>,
    created: Option<jiff::Timestamp>,
    /// A half is known to be gone by us.
    deleted: bool,
    /// What was seen of a write, when all of [`QUIET`] was waited for.
    write: Option<Write>,
    /// A delete here holds everywhere, or was asked for by name.
    agreed: bool,
}

/// Whether a write of the terraform that held `recorded` may be on its way, when `write_may_land` says that one can be: of
/// the state, or of an unlock. Of one unlock no log tells: where the item is another's, terraform deletes the object that
/// it has just put, without a condition (backend/remote-state/s3/client.go, `Lock`).
fn needs_quiet(recorded: &RecordedLock, write_may_land: bool) -> bool {
    let Halves { s3, dynamodb } = recorded.halves;
    let is_half_had = recorded.locked.is_none() && s3 && dynamodb;
    write_may_land && (recorded.uploading || recorded.unlocking || is_half_had)
}

/// What one round over the halves has found.
#[derive(Default)]
struct Round {
    /// A half is ours, and may not be deleted before the quiet window is over.
    needs_quiet: bool,
    anothers: Option<String>,
    kept: Option<Outcome>,
    failed: Option<Failure>,
    /// A half is not to be seen, and was not deleted by us.
    missing: bool,
    /// What one look does not prove: a half that is absent, or has something that is no lock in its place.
    unproven: Vec<(Spot, Option<String>)>,
}

impl Attempt<'_> {
    /// Credentials are resolved anew in each go: those of the run may have expired.
    async fn go(&mut self) -> Result<Outcome, Failure> {
        let services = match Services::connect(self.place).await {
            Ok(services) => services,
            Err(unreachable) if unreachable.may_pass() => return Ok(Outcome::later(unreachable.to_string())),
            Err(unreachable) => return Ok(Outcome::kept(unreachable.to_string())),
        };
        // The answer of a lock request tells that nothing is on its way any more; and so does an end by itself.
        let late = self.situation.request_may_land && self.recorded.locked.is_none();
        let late_until = late.then(|| self.begun + LATE);
        let mut unproven = None;
        let mut windows = 0;
        loop {
            let round = self.round(&services).await;
            if let Some(failure) = round.failed {
                return Err(failure);
            }
            if round.needs_quiet {
                windows += 1;
                if windows > MOST_WINDOWS {
                    return Ok(Outcome::later(report::COMES_AND_GOES));
                }
                self.write = wait_for_quiet(&services, self.recorded, &self.situation.run).await?;
                // The service answered all that time: patience begins anew.
                self.begun = Instant::now();
                unproven = None;
                continue;
            }
            let is_late = round.missing && late_until.is_some_and(|until| Instant::now() < until);
            let is_proven = round.unproven.is_empty() || unproven.as_ref() == Some(&round.unproven);
            if !is_late && (is_proven || self.begun.elapsed() > PATIENCE) {
                return Ok(self.outcome(&services, round, is_proven).await);
            }
            unproven = Some(round.unproven);
            sleep(LOOK).await;
        }
    }

    /// Reads, judges and deletes one half after the other.
    async fn round(&mut self, services: &Services<'_>) -> Round {
        let mut round = Round::default();
        for half in &services.halves {
            match self.half(services, half).await {
                Ok(Judged::Absent) => {
                    round.missing = true;
                    // One that was never known to be there may be absent.
                    if self.recorded.locked.is_some() || self.write.is_some() {
                        round.unproven.push((half.clone(), None));
                    }
                }
                Ok(Judged::Deleted) => self.deleted = true,
                Ok(Judged::Anothers(id)) => {
                    round.missing = true;
                    round.anothers = Some(id);
                }
                Ok(Judged::NoLock(reason)) => round.unproven.push((half.clone(), Some(reason))),
                Ok(Judged::Doubt(reason)) => round.kept = Some(Outcome::kept(reason)),
                Ok(Judged::Unasked(reason)) => round.kept = Some(Outcome::later(reason)),
                Ok(Judged::NeedsQuiet) => round.needs_quiet = true,
                Err(failure) => round.failed = Some(failure),
            }
        }
        round
    }

    /// What the last round comes to.
    async fn outcome(&self, services: &Services<'_>, round: Round, is_proven: bool) -> Outcome {
        if let Some(kept) = round.kept {
            return kept;
        }
        if let Some(reason) = round.unproven.into_iter().find_map(|(_, reason)| reason) {
            return Outcome::later(reason);
        }
        if !is_proven {
            return Outcome::later(report::COMES_AND_GOES);
        }
        if !self.deleted {
            return Outcome::Absent { anothers: round.anothers };
        }
        let unseen = services.halves.iter().any(|half| !self.asked_to_go.contains(half));
        Outcome::Released(Released {
            created: self.created,
            write: self.write,
            unfit: unfit_digest(services).await,
            is_partial: self.recorded.locked.is_none() && unseen,
        })
    }

    /// Reads one half, judges it and deletes it, until one of the three has settled it.
    async fn half(&mut self, services: &Services<'_>, half: &Spot) -> Result<Judged, Failure> {
        loop {
            // At the same time: a slow service is paid for once.
            let agreed = self.agreed;
            let is_global = async { if agreed { Ok(None) } else { global_table(services).await } };
            let (standing, global) = tokio::join!(services.stores.read(half), is_global);
            self.agreed |= global == Ok(None);
            let Some(standing) = standing? else {
                // Ours stood here and was asked to go: it went, though the answer to that was lost.
                return Ok(if self.asked_to_go.contains(half) { Judged::Deleted } else { Judged::Absent });
            };
            let Some(info) = standing.info() else {
                trace!("{half:?} holds no lock: {}", standing.describe_no_lock());
                return Ok(Judged::NoLock(no_lock(half, &standing)));
            };
            let verdict = judge(self.recorded, &info, &self.situation.run);
            trace!("{half:?} holds {}: {verdict:?}", info.id);
            match verdict {
                Verdict::Anothers => return Ok(Judged::Anothers(info.id)),
                Verdict::Doubt(reason) => return Ok(Judged::Doubt(reason)),
                Verdict::Ours => {}
            }
            if let Some(reason) = global? {
                return Ok(Judged::Unasked(reason));
            }
            if self.write.is_none() && needs_quiet(self.recorded, self.situation.write_may_land) {
                return Ok(Judged::NeedsQuiet);
            }
            self.created = info.created();
            crash_point::reached("release: half judged");
            if !self.asked_to_go.contains(half) {
                self.asked_to_go.push(half.clone());
            }
            match services.stores.remove(half, &standing).await? {
                Removed::Gone => {
                    trace!("deleted {} in {half:?}", info.id);
                    crash_point::reached("release: half deleted");
                    return Ok(Judged::Deleted);
                }
                Removed::Refused => {
                    return Err(Failure::no_answer(
                        half.service(),
                        "the delete was answered, and the lock is still there",
                    ));
                }
                Removed::Anothers => {
                    sleep(Duration::from_millis(20)).await;
                    if self.begun.elapsed() > PATIENCE {
                        return Ok(Judged::Doubt("it changes while it is deleted"));
                    }
                }
            }
        }
    }
}

/// Why nothing of a lock is deleted unasked: its table is a global one. A delete on condition is right in the region that
/// we ask, and can still undo the lock that somebody took in another one a moment ago. Who may not ask has a table as
/// nearly all of them are.
async fn global_table(services: &Services<'_>) -> Result<Option<String>, Failure> {
    let Some(table) = &services.place.table else { return Ok(None) };
    match dynamodb::describe(&services.stores.dynamodb, table).await {
        Ok(described) if described.last_writer_wins() => Ok(Some(report::global_table(table, &described.replicas))),
        Err(failure) if !failure.is_final() => Err(failure),
        Ok(_) | Err(_) => Ok(None),
    }
}

/// What became of a half.
enum Judged {
    Absent,
    Deleted,
    Anothers(String),
    /// Something that is no lock, and what.
    NoLock(String),
    Doubt(&'static str),
    /// It is ours, and a write may be on its way that would hit whoever comes next.
    NeedsQuiet,
    /// It is ours, and goes only where that is asked for.
    Unasked(String),
}

/// The state and its digest, if they do not fit, and nobody is writing them at this moment. What cannot be read is not
/// said to be wrong, and the lock is gone in any case.
async fn unfit_digest(services: &Services<'_>) -> Option<Comparison> {
    let Place { bucket, key, table, .. } = services.place;
    let table = table.as_ref()?;
    let compare = || async {
        let compared = digest::compare(&services.stores, bucket, key, table);
        let compared = tokio::time::timeout(PATIENCE, compared).await.ok()?.ok()?;
        (!compared.fits()).then_some(compared)
    };
    let first = compare().await?;
    for half in &services.halves {
        if services.stores.read(half).await.ok()?.is_some() {
            return None;
        }
    }
    // The same again, and nobody held the lock in between: so nobody was between the state and its digest.
    (compare().await.as_ref() == Some(&first)).then_some(first)
}

/// Waits until nothing that a write of the dead terraform would change has changed for [`QUIET`]. `None` when its lock is
/// gone meanwhile, so that there is nothing to keep: nothing is known of a write then.
async fn wait_for_quiet(services: &Services<'_>, recorded: &RecordedLock, run: &Run) -> Result<Option<Write>, Failure> {
    trace!("waiting for a write that may be on its way");
    let is_write = recorded.uploading || recorded.unlocking;
    report::say(&if is_write { report::waiting_for_write(QUIET) } else { report::waiting_for_undo(QUIET) });
    let begun = Instant::now();
    let mut last = services.look(recorded, run).await?;
    let mut write = Write::Quiet;
    let (mut since, mut seen) = (Instant::now(), Instant::now());
    loop {
        if begun.elapsed() > LONGEST_QUIET {
            return Err(Failure::refusal(
                "S3",
                "the state is written again and again, by somebody who does not lock it",
            ));
        }
        sleep(LOOK).await;
        let now = match services.look(recorded, run).await {
            Ok(now) => now,
            // What happens meanwhile is seen in the next look.
            Err(failure) if !failure.is_final() && seen.elapsed() < PATIENCE => {
                trace!("not seen: {failure}");
                continue;
            }
            Err(failure) => return Err(failure),
        };
        seen = Instant::now();
        if !now.holds && !last.holds {
            trace!("its lock is gone");
            return Ok(None);
        }
        if now != last {
            trace!("it landed");
            if now.state != last.state {
                write = Write::Landed;
            }
            last = now;
            since = Instant::now();
        } else if since.elapsed() >= QUIET {
            return Ok(Some(write));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All that a log can tell of a lock, and whether a write can be on its way at all.
    #[test]
    fn a_write_is_waited_for_where_one_can_be_on_its_way() {
        use crate::terraform::log::{Log, tests::ID, tests::lock_line};
        for kind in ["S3 Native only", "DynamoDB only", "S3 Native and DynamoDB"] {
            for locked in [false, true] {
                for (uploading, unlocking) in [(false, false), (true, false), (false, true), (true, true)] {
                    let mut log = Log::default();
                    log.read(lock_line(7, &format!("Attempting to lock remote state ({kind})..."), ID, "r").as_bytes());
                    let mut lock = log.locks.remove(0);
                    lock.locked = locked.then_some(lock.asked);
                    (lock.uploading, lock.unlocking) = (uploading, unlocking);
                    let expected = uploading || unlocking || (kind.contains("and") && !locked);
                    assert_eq!(needs_quiet(&lock, true), expected, "{kind} {locked} {uploading} {unlocking}");
                    assert!(!needs_quiet(&lock, false));
                }
            }
        }
    }
}
