//! Giving a lock back: read, judge, delete on condition of exactly what was read; each part by itself.
//!
//! DynamoDB first and `.tflock` last, the reverse of taking, so that no contender gets half in. Both are tried even if
//! the other fails.
//!
//! Two things can still be on their way from a terraform that died. A *lock request* that was not answered can land
//! after we looked: so an absent part is looked for again, for [`LATE_REQUEST_WINDOW`]. A *write*, of the state or of the unlock's own
//! deletes, carries no condition and would hit whoever comes next: so before the first delete everything that such a
//! write would change must have been seen unchanged for [`QUIET_WINDOW`].
//!
//! One response proves nothing, because a proxy or a portal can have sent it. What no service sends is an error
//! ([`dynamodb`], [`s3`]); that a lock which was had is absent is believed when two looks in a row have found it so; that
//! a lock is deleted, when its place was read after the delete.

use crate::aws::settings::Unreachable;
use crate::console;
use crate::console::visible;
use crate::terraform::logged_lock::Phase;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::digest::Comparison;
use super::location::LockLocation;
use super::proof::{Match, Run, judge, judge_unnamed};
use super::reached::Reached;
use super::stores::{Removed, StoreKey, StoredLock, Stores};
use crate::aws::connect;
use crate::aws::credentials::Purpose;
use crate::aws::failure::{Cause, Failure};
use crate::crash_point;
use crate::lock::{digest, dynamodb, s3};
use crate::settings::release_is_asked_for;
use crate::terraform::lock_info::{LockInfo, is_lock_id};
use crate::terraform::log::{LockParts, RecordedLock, UnnamedLock};
use crate::trace::trace;

/// For how long a lock that was asked for, and not seen, is looked for.
const LATE_REQUEST_WINDOW: Duration = Duration::from_secs(5);

/// For how long nothing may have changed before the lock of a terraform that died while writing is given back.
const QUIET_WINDOW: Duration = Duration::from_secs(10);

/// For how long a service that fails or is silent is asked, for a lock that a run has left: not longer than a person would
/// wait.
pub(crate) const SERVICE_TIMEOUT: Duration = Duration::from_secs(20);

/// The same for what is only an explanation, or a look at what is most likely not there.
pub(crate) const EXPLANATION_TIMEOUT: Duration = Duration::from_secs(3);

/// For how long the digest of a state is looked at after a release: the lock is gone, and this is said beside that.
const DIGEST_TIMEOUT: Duration = Duration::from_secs(10);

/// The longest time between two tries.
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(4);

/// For how long a write is waited for at most: somebody may go on writing there without a lock.
const MAX_QUIET_TIMEOUT: Duration = Duration::from_mins(1);

/// How many times a write is waited for: each time the lock was there before, gone while we waited, and there again.
const MAX_QUIET_WINDOWS: u32 = 3;

/// Between two looks at the same thing.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// What is known of the run whose lock is to be given back.
#[derive(Clone, Debug)]
pub(crate) struct ReleaseContext {
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
    /// No lock of ours stood.
    Absent {
        /// The ID of somebody else's lock at the same place.
        anothers: Option<String>,
        /// No part of a lock can be there: there is no such table or bucket, or the table has another key.
        excluded: bool,
    },
    /// It stood, and is gone.
    Released(Released),
    /// It stands, or may, and why.
    Kept {
        /// What is told of it.
        reason: String,
        /// What it means.
        because: Because,
    },
}

/// Why a lock is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Because {
    /// It is not certain whose it is, or it is not to be released. A later try finds the same.
    Doubt,
    /// Whoever started the run said that its locks are to be named alone. They stay in the journal until they are gone.
    Never,
    /// A later try may do better: somebody still lived, or what was seen contradicted itself.
    NotYet,
    /// The service did not answer, or could not do it.
    NoAnswer,
    /// Nobody gave credentials. Whoever is asked for them again may have to do something for it each time.
    NoCredentials,
    /// These credentials may not do that action.
    Denied(&'static str),
    /// Its place holds something that is no lock.
    NoLock,
    /// It was not seen, and was looked for in what may be another account.
    OtherAccount,
}

impl Outcome {
    /// Kept, and nothing that we could do later would change that.
    pub(crate) fn kept(reason: impl Into<String>) -> Self {
        Self::Kept { reason: reason.into(), because: Because::Doubt }
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
        Self::Kept { reason: reason.into(), because: Because::NotYet }
    }

    /// Kept because of a failed request.
    fn failed(failure: &Failure, part: &str) -> Self {
        let because = failure.denied().map_or(Because::NoAnswer, Because::Denied);
        Self::Kept { reason: format!("{failure}{part}"), because }
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
    pub(crate) digest_mismatch: Option<Comparison>,
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
    place: &'a LockLocation,
    stores: Stores,
    /// Where its parts can stand.
    parts: Vec<StoreKey>,
}

impl<'a> Services<'a> {
    async fn connect(place: &'a LockLocation, purpose: Purpose) -> Result<Self, Unreachable> {
        let stores = Stores::connect(&place.backend, purpose).await?;
        Ok(Self { place, parts: place.store_keys(&stores), stores })
    }

    /// What stands at `part` now. Nothing, where no lock can be there at all.
    async fn read(&self, part: &StoreKey) -> Result<Option<StoredLock>, Failure> {
        nothing_if_excluded(self.stores.read(part).await)
    }

    /// Looks at everything that a write of the terraform that held `recorded` would change.
    async fn look(&self, recorded: &RecordedLock, run: &Run) -> Result<Look, Failure> {
        let state = s3::fingerprint(&self.stores.s3, &self.place.bucket, &self.place.key).await?;
        let digest = match &self.place.table {
            Some(table) => {
                nothing_if_excluded(dynamodb::digest(&self.stores.dynamodb, table, &self.place.lock_path()).await)?
            }
            None => None,
        };
        let mut look = Look { state: format!("{state:?} {digest:?}"), lock: String::new(), holds: false };
        for part in &self.parts {
            let Some(stored) = self.read(part).await? else {
                look.lock.push_str("- ");
                continue;
            };
            let Some(info) = stored.info() else {
                return Err(Failure::no_answer(part.service(), &no_lock(part, &stored)));
            };
            look.lock.push_str(stored.text());
            look.holds |= judge(recorded, &info, run) != Match::Anothers;
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

/// A table or bucket that does not exist has nothing in it.
fn nothing_if_excluded<T>(read: Result<Option<T>, Failure>) -> Result<Option<T>, Failure> {
    match read {
        Err(failure) if failure.cause().excludes_locks() => {
            trace!("no lock can be there: {failure}");
            Ok(None)
        }
        read => read,
    }
}

/// Why a lock is kept where something else than a lock was read.
fn no_lock(part: &StoreKey, stored: &StoredLock) -> String {
    format!("what was read there is no lock ({}): {}", part.describe(), stored.describe_no_lock())
}

/// Work that gives no answer for longer than `limit` has failed: so said with the name of the service.
fn within<T>(
    limit: Duration,
    service: &'static str,
    work: impl Future<Output = Result<T, Failure>>,
) -> impl Future<Output = Result<T, Failure>> {
    let work = Box::pin(work);
    async move {
        let failed = || Failure::no_answer(service, &format!("no answer within {}", console::length_of_time(limit)));
        timeout(limit, work).await.unwrap_or_else(|_| Err(failed()))
    }
}

/// How much of `limit` is left since `begun`: enough for one look in any case.
fn remaining(limit: Duration, begun: Instant) -> Duration {
    limit.saturating_sub(begun.elapsed()).max(POLL_INTERVAL)
}

/// Gives back the lock that the log recorded, if it stands and is ours. A service that fails or is silent is asked for
/// `limit`, not counting the time in which credentials are asked for.
pub(crate) async fn release(
    recorded: &RecordedLock,
    place: &LockLocation,
    release_context: &ReleaseContext,
    (limit, purpose): (Duration, Purpose),
) -> Outcome {
    // Asked for now, and remembered: the clock of the release runs from here on.
    if let Err(unreachable) = credentials(place, limit, purpose).await {
        return unreached(&unreachable);
    }
    let mut attempt = Attempt {
        recorded,
        place,
        release_context,
        limit,
        purpose,
        renewed: false,
        begun: Instant::now(),
        asked_to_go: Vec::new(),
        created: None,
        deleted: false,
        write: None,
        agreed: release_is_asked_for(),
    };
    let mut interval = POLL_INTERVAL;
    loop {
        match attempt.go().await {
            Ok(outcome) => return outcome,
            Err(failure) => {
                trace!("release of {}: {failure}", recorded.id);
                if failure.is_final() || attempt.begun.elapsed() + interval >= limit {
                    let part = if attempt.deleted { "; its other part was released" } else { "" };
                    return Outcome::failed(&failure, part);
                }
                if failure.cause() == Cause::ExpiredCredentials && !std::mem::replace(&mut attempt.renewed, true) {
                    connect::forget_credentials(&place.backend);
                }
                sleep(interval).await;
                interval = (interval * 2).min(MAX_RETRY_INTERVAL);
            }
        }
    }
}

/// Has the credentials of `place` asked for, before any clock runs: they are remembered, and who gives them may take longer
/// than a service may. A service that gives them and is silent is asked for `limit`.
async fn credentials(place: &LockLocation, limit: Duration, purpose: Purpose) -> Result<(), Unreachable> {
    let begun = Instant::now();
    let mut interval = POLL_INTERVAL;
    loop {
        match Services::connect(place, purpose).await {
            Err(Unreachable::Silent(why)) if purpose == Purpose::Work && begun.elapsed() + interval < limit => {
                trace!("no credentials: {why}");
                sleep(interval).await;
                interval = (interval * 2).min(MAX_RETRY_INTERVAL);
            }
            asked => return asked.map(drop),
        }
    }
}

/// What a lock comes to whose services cannot be reached as the backend says.
fn unreached(unreachable: &Unreachable) -> Outcome {
    let because = match unreachable {
        Unreachable::Credentials(_) => Because::NoCredentials,
        unreachable if unreachable.may_pass() => Because::NoAnswer,
        _ => Because::Doubt,
    };
    Outcome::Kept { reason: unreachable.to_string(), because }
}

/// What stands at `place` now, in the places of a lock: one, or two, of which the second may be somebody else's. Nothing where
/// nothing can be read within [`EXPLANATION_TIMEOUT`].
pub(crate) async fn stored(place: &LockLocation) -> Vec<(StoreKey, StoredLock)> {
    let look = async {
        let Ok(services) = Services::connect(place, Purpose::Explanation).await else { return Vec::new() };
        let reads = services.parts.iter().map(|part| services.stores.read(part));
        let read = futures_util::future::join_all(reads).await;
        let read = services.parts.iter().zip(read);
        read.filter_map(|(part, stored)| Some((part.clone(), stored.ok()??))).collect()
    };
    timeout(EXPLANATION_TIMEOUT, look).await.unwrap_or_default()
}

/// The state at `place` and its digest, where they do not fit: read once, within [`EXPLANATION_TIMEOUT`]. For somebody who has
/// seen that they do not, and has waited for a while.
pub(crate) async fn unfit_state(place: &LockLocation) -> Option<Comparison> {
    let table = place.table.as_ref()?;
    let look = async {
        let services = Services::connect(place, Purpose::Explanation).await.ok()?;
        digest::compare(&services.stores, &place.bucket, &place.key, table).await.ok()
    };
    timeout(EXPLANATION_TIMEOUT, look).await.ok()?.filter(|compared| !compared.fits())
}

/// Whether the lock `id` stands at `place`, or may: also where a service did not let it be read within
/// [`EXPLANATION_TIMEOUT`]. That it does not is believed at the second look: one response proves nothing.
pub(crate) async fn may_stand(place: &LockLocation, id: &str) -> bool {
    let _ = credentials(place, EXPLANATION_TIMEOUT, Purpose::Work).await;
    if may_be_seen(place, id).await {
        return true;
    }
    sleep(POLL_INTERVAL).await;
    may_be_seen(place, id).await
}

/// One look of [`may_stand`].
async fn may_be_seen(place: &LockLocation, id: &str) -> bool {
    let look = async {
        let Ok(services) = Services::connect(place, Purpose::Work).await else { return true };
        for part in &services.parts {
            match services.stores.read(part).await {
                Ok(Some(stored)) if stored.info().is_none_or(|info| info.id == id) => return true,
                Err(failure) if failure.cause().excludes_locks() => {}
                Ok(_) => {}
                Err(_) => return true,
            }
        }
        false
    };
    timeout(EXPLANATION_TIMEOUT, look).await.unwrap_or(true)
}

/// What stands at `place` of a lock that the log of its run does not name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum IdentifiedLock {
    /// Nothing that could be it.
    None,
    /// It is it.
    Ours(Box<RecordedLock>),
    /// It may be it, and why that is not certain.
    Possible(Box<LockInfo>, &'static str),
}

/// Looks at `place` for a lock that the log does not name, again while a request for it may land, or while no service
/// answers. That one which was had is absent is believed at the second look.
///
/// # Errors
/// [`Failure`], when a service did not let it be read.
pub(crate) async fn identify_unnamed_lock(
    unnamed: &UnnamedLock,
    place: &LockLocation,
    release_context: &ReleaseContext,
    died: bool,
) -> Result<IdentifiedLock, Failure> {
    let limit = if died { SERVICE_TIMEOUT } else { EXPLANATION_TIMEOUT };
    let _ = credentials(place, limit, Purpose::Work).await;
    let begun = Instant::now();
    let late = if release_context.request_may_land && unnamed.progress.held.is_none() {
        LATE_REQUEST_WINDOW
    } else {
        Duration::ZERO
    };
    let mut absent = unnamed.progress.held.is_none();
    loop {
        match within(remaining(limit, begun), "AWS", look_for(unnamed, place, &release_context.run, died)).await {
            Ok(IdentifiedLock::None) => {
                if absent && begun.elapsed() >= late {
                    return Ok(IdentifiedLock::None);
                }
                absent = true;
            }
            Err(failure) if !failure.is_final() && died && begun.elapsed() < limit => {
                trace!("a lock that the log does not name: {failure}");
                absent = unnamed.progress.held.is_none();
            }
            results => return results,
        }
        sleep(POLL_INTERVAL).await;
    }
}

/// One look of [`identify_unnamed_lock`].
async fn look_for(
    unnamed: &UnnamedLock,
    place: &LockLocation,
    run: &Run,
    died: bool,
) -> Result<IdentifiedLock, Failure> {
    let services = Services::connect(place, Purpose::Work).await.map_err(|error| unreachable(&error))?;
    let mut light = IdentifiedLock::None;
    for part in &services.parts {
        let Some(stored) = services.read(part).await? else { continue };
        let Some(info) = stored.info() else {
            return Err(Failure::no_answer(part.service(), &no_lock(part, &stored)));
        };
        if !is_lock_id(&info.id) {
            continue;
        }
        let verdict = judge_unnamed(unnamed, &info, stored.text(), run, died);
        trace!("{part:?} holds {}, which the log does not name: {verdict:?}", info.id);
        match verdict {
            Match::Ours => {
                let parts = LockParts { s3: place.lock_file, dynamodb: place.table.is_some() };
                let mut lock = RecordedLock::held(&info, &place.bucket, &place.key, parts, unnamed.progress.asked);
                lock.progress.held = unnamed.progress.held;
                // It was made in the moment in which it was asked for, and the log tells that moment to the millisecond.
                lock.progress.asked =
                    info.created().map_or(unnamed.progress.asked, |created| created.max(unnamed.progress.asked));
                // Of what its log does not tell anything may be under way.
                lock.progress.phase = if unnamed.is_of_workspace() { Phase::Unlocking } else { unnamed.progress.phase };
                return Ok(IdentifiedLock::Ours(Box::new(lock)));
            }
            Match::Doubt(reason) if run.is_of(&info.who) => light = IdentifiedLock::Possible(Box::new(info), reason),
            Match::Doubt(_) | Match::Anothers => {}
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
pub(crate) async fn suspect(place: &LockLocation, run: &Run, any_user: bool) -> Result<Option<LockInfo>, Failure> {
    let _ = credentials(place, SERVICE_TIMEOUT, Purpose::Work).await;
    let begun = Instant::now();
    loop {
        match within(remaining(SERVICE_TIMEOUT, begun), "AWS", look_for_suspect(place, run, any_user)).await {
            Err(failure) if !failure.is_final() && begun.elapsed() < SERVICE_TIMEOUT => sleep(POLL_INTERVAL).await,
            results => return results,
        }
    }
}

/// One look of [`suspect`].
async fn look_for_suspect(place: &LockLocation, run: &Run, any_user: bool) -> Result<Option<LockInfo>, Failure> {
    let services = Services::connect(place, Purpose::Work).await.map_err(|error| unreachable(&error))?;
    for part in &services.parts {
        let Some(stored) = services.read(part).await? else { continue };
        let Some(info) = stored.info() else {
            return Err(Failure::no_answer(part.service(), &no_lock(part, &stored)));
        };
        let is_possible = run.is_of(&info.who) || (any_user && run.is_on_its_host(&info.who));
        if is_possible && info.created().is_some_and(|created| created >= run.started) {
            return Ok(Some(info));
        }
    }
    Ok(None)
}

fn unreachable(error: &Unreachable) -> Failure {
    match error {
        Unreachable::Silent(why) => Failure::no_answer("AWS", why),
        error => Failure::refusal("AWS", &error.to_string()),
    }
}

/// One release, which may need several goes.
struct Attempt<'a> {
    recorded: &'a RecordedLock,
    place: &'a LockLocation,
    release_context: &'a ReleaseContext,
    /// For how long a service that fails is asked, from `begun` on.
    limit: Duration,
    purpose: Purpose,
    begun: Instant,
    /// A service has said that the credentials are over, and new ones were asked for.
    renewed: bool,
    /// The parts that were ours, and were asked to go.
    asked_to_go: Vec<StoreKey>,
    created: Option<jiff::Timestamp>,
    /// A part is known to be gone by us.
    deleted: bool,
    /// What was seen of a write, when all of [`QUIET_WINDOW`] was waited for.
    write: Option<Write>,
    /// A delete here holds everywhere, or was asked for by name.
    agreed: bool,
}

/// Whether a write of the terraform that held `recorded` may be on its way, when `write_may_land` says that one can be: of
/// the state, or of an unlock. Of one unlock no log tells: where the item is another's, terraform deletes the object that
/// it has just put, without a condition (backend/remote-state/s3/client.go, `Lock`).
fn needs_quiet(recorded: &RecordedLock, write_may_land: bool) -> bool {
    let LockParts { s3, dynamodb } = recorded.parts;
    let may_have_one_part = recorded.progress.held.is_none() && s3 && dynamodb;
    write_may_land && (recorded.progress.may_be_writing() || may_have_one_part)
}

impl Attempt<'_> {
    /// The connection is made anew in each go: what was wrong with it may be mended.
    async fn go(&mut self) -> Result<Outcome, Failure> {
        let services = match Services::connect(self.place, self.purpose).await {
            Ok(services) => services,
            Err(unreachable) => return Ok(unreached(&unreachable)),
        };
        // The answer of a lock request tells that nothing is on its way any more; and so does an end by itself.
        let late = self.release_context.request_may_land && self.recorded.progress.held.is_none();
        let late_until = late.then(|| self.begun + LATE_REQUEST_WINDOW);
        let mut before = None;
        let mut windows = 0;
        loop {
            let judged = self.look(&services).await;
            let look = PartsLook {
                parts: &judged,
                was_had: self.recorded.progress.held.is_some(),
                is_quiet: self.write.is_some(),
                was_deleted: self.deleted,
                before: before.as_ref(),
                request_may_land: late_until.is_some_and(|until| Instant::now() < until),
                is_time_up: self.begun.elapsed() > self.limit,
            };
            match look.combine() {
                Step::Failed(failure) => return Err(failure),
                Step::WaitForQuiet => {
                    windows += 1;
                    if windows > MAX_QUIET_WINDOWS {
                        return Ok(Outcome::later(COMES_AND_GOES));
                    }
                    self.write = wait_for_quiet(&services, self.recorded, &self.release_context.run).await?;
                    // The service answered all that time: its limit begins anew.
                    self.begun = Instant::now();
                    before = None;
                }
                Step::LookAgain(unproven) => {
                    before = Some(unproven);
                    sleep(POLL_INTERVAL).await;
                }
                Step::Kept(outcome) => return Ok(outcome),
                Step::Absent { anothers, excluded } => return Ok(Outcome::Absent { anothers, excluded }),
                Step::Released => return Ok(Outcome::Released(self.released(&services).await)),
            }
        }
    }

    /// Reads, judges and deletes one part after the other.
    async fn look(&mut self, services: &Services<'_>) -> Vec<Result<Judged, Failure>> {
        // Each has its share, so that a service which is silent does not keep the other from being asked.
        let share = remaining(self.limit, self.begun) / u32::try_from(services.parts.len().max(1)).unwrap_or(1);
        let mut judged = Vec::new();
        for part in &services.parts {
            judged.push(self.part(services, part, share).await);
        }
        self.deleted |= judged.iter().any(|part| matches!(part, Ok(Judged::Deleted)));
        judged
    }

    /// What is said of the lock when it was released.
    async fn released(&self, services: &Services<'_>) -> Released {
        let unseen = services.parts.iter().any(|part| !self.asked_to_go.contains(part));
        Released {
            created: self.created,
            write: self.write,
            digest_mismatch: unfit_digest(services).await,
            is_partial: self.recorded.progress.held.is_none() && unseen,
        }
    }

    /// Reads one part, judges it and deletes it, until one of the three has settled it. All of that may take as long as
    /// `limit`.
    async fn part(&mut self, services: &Services<'_>, part: &StoreKey, limit: Duration) -> Result<Judged, Failure> {
        let begun = Instant::now();
        let remaining = || remaining(limit, begun);
        loop {
            // At the same time: a slow service is paid for once.
            let agreed = self.agreed;
            let is_global = async { if agreed { Ok(None) } else { global_table(services).await } };
            let read = within(remaining(), part.service(), services.stores.read(part));
            let (stored, global) = tokio::join!(read, within(remaining(), "DynamoDB", is_global));
            self.agreed |= global == Ok(None);
            let stored = match stored {
                Err(failure) if failure.cause().excludes_locks() => {
                    trace!("no lock can be in {part:?}: {failure}");
                    return Ok(Judged::Excluded);
                }
                stored => stored?,
            };
            let Some(stored) = stored else {
                // Ours stood here and was asked to go: it went, though the answer to that was lost.
                return Ok(if self.asked_to_go.contains(part) { Judged::Deleted } else { Judged::Absent });
            };
            let Some(info) = stored.info() else {
                trace!("{part:?} holds no lock: {}", stored.describe_no_lock());
                return Ok(Judged::NoLock(no_lock(part, &stored)));
            };
            let verdict = judge(self.recorded, &info, &self.release_context.run);
            trace!("{part:?} holds {}: {verdict:?}", info.id);
            match verdict {
                Match::Anothers => return Ok(Judged::Anothers(info.id)),
                Match::Doubt(reason) => return Ok(Judged::Doubt(reason)),
                Match::Ours => {}
            }
            if let Some(reason) = global? {
                return Ok(Judged::NeedsConsent(reason));
            }
            if self.write.is_none() && needs_quiet(self.recorded, self.release_context.write_may_land) {
                return Ok(Judged::NeedsQuiet);
            }
            self.created = info.created();
            crash_point::reached("release: half judged");
            if !self.asked_to_go.contains(part) {
                self.asked_to_go.push(part.clone());
            }
            match within(remaining(), part.service(), services.stores.remove(part, &stored)).await? {
                Removed::Gone => {
                    trace!("deleted {} in {part:?}", info.id);
                    crash_point::reached("release: half deleted");
                    return Ok(Judged::Deleted);
                }
                Removed::Refused => {
                    return Err(Failure::no_answer(
                        part.service(),
                        "the delete was answered, and the lock is still there",
                    ));
                }
                Removed::Anothers => {
                    sleep(Duration::from_millis(20)).await;
                    if self.begun.elapsed() > self.limit {
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
        Ok(described) if described.last_writer_wins() => Ok(Some(describe_global_table(table, &described.replicas))),
        Err(failure) if !failure.is_final() => Err(failure),
        Ok(_) | Err(_) => Ok(None),
    }
}

/// What became of one part of a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Judged {
    Absent,
    /// No lock can be there.
    Excluded,
    Deleted,
    Anothers(String),
    /// Something that is no lock, and what.
    NoLock(String),
    Doubt(&'static str),
    /// It is ours, and a write may be on its way that would hit whoever comes next.
    NeedsQuiet,
    /// It is ours, and goes only where that is asked for.
    NeedsConsent(String),
}

/// What one look does not prove: the parts that are absent, or have something that is no lock in their place, by their number.
type Unproven = Vec<(usize, Option<String>)>;

/// One look at the parts of a lock, and what is known besides.
struct PartsLook<'a> {
    parts: &'a [Result<Judged, Failure>],
    /// Terraform had the lock.
    was_had: bool,
    /// The quiet window is over.
    is_quiet: bool,
    /// A part was deleted in this look or before.
    was_deleted: bool,
    /// What the look before did not prove. `None` if there was none.
    before: Option<&'a Unproven>,
    /// The lock was asked for, and the request may land at this moment.
    request_may_land: bool,
    /// No more looks are to be taken.
    is_time_up: bool,
}

/// What follows from a look.
#[derive(Clone, Debug, PartialEq)]
enum Step {
    /// A part could not be read or deleted.
    Failed(Failure),
    /// A part is ours, and may not be deleted before the quiet window is over.
    WaitForQuiet,
    /// One look does not prove it.
    LookAgain(Unproven),
    Kept(Outcome),
    Absent {
        anothers: Option<String>,
        excluded: bool,
    },
    Released,
}

impl PartsLook<'_> {
    /// What the parts come to together. The order is that of what must not be passed over:
    ///
    /// 1. What could not be read may be anything: nothing is said of the lock before it was read.
    /// 2. A part that is ours and waits for the quiet window keeps the other one from being called the whole.
    /// 3. An absence decides nothing while a request may land, and of a lock that was had it decides nothing alone: one answer
    ///    that no service has sent (a proxy's, a cache's) must not make a lock forgotten. Nor does one look make of what is no
    ///    lock something that bars everybody.
    /// 4. A doubt about one part keeps the lock, whatever became of the other.
    fn combine(&self) -> Step {
        if let Some(failure) = self.parts.iter().rev().find_map(|part| part.as_ref().err()) {
            return Step::Failed(failure.clone());
        }
        let parts: Vec<&Judged> = self.parts.iter().flatten().collect();
        if parts.contains(&&Judged::NeedsQuiet) {
            return Step::WaitForQuiet;
        }
        let is_missing = |part: &&Judged| matches!(part, Judged::Absent | Judged::Excluded | Judged::Anothers(_));
        let is_late = self.request_may_land && parts.iter().any(is_missing);
        let unproven = self.unproven(&parts);
        let is_proven = unproven.is_empty() || self.before == Some(&unproven);
        if is_late || !(is_proven || self.is_time_up) {
            return Step::LookAgain(unproven);
        }
        if let Some(kept) = parts.iter().rev().find_map(|part| part.keeps()) {
            return Step::Kept(kept);
        }
        if let Some(reason) = unproven.into_iter().find_map(|(_, no_lock)| no_lock) {
            return Step::Kept(Outcome::Kept { reason, because: Because::NoLock });
        }
        if !is_proven {
            return Step::Kept(Outcome::later(COMES_AND_GOES));
        }
        if self.was_deleted {
            return Step::Released;
        }
        let anothers = parts.iter().rev().find_map(|part| match part {
            Judged::Anothers(id) => Some(id.clone()),
            _ => None,
        });
        let excluded = !parts.is_empty() && parts.iter().all(|part| **part == Judged::Excluded);
        Step::Absent { anothers, excluded }
    }

    fn unproven(&self, parts: &[&Judged]) -> Unproven {
        let unproven = parts.iter().enumerate().filter_map(|(number, part)| match part {
            // A lock that was never known to be there may be absent.
            Judged::Absent if self.was_had || self.is_quiet => Some((number, None)),
            // It is looked for again while its request may land: a table may be on its way too.
            Judged::Excluded if self.was_had => Some((number, None)),
            Judged::NoLock(reason) => Some((number, Some(reason.clone()))),
            _ => None,
        });
        unproven.collect()
    }
}

impl Judged {
    /// Why the whole lock is not released. `None` where this part does not keep it.
    fn keeps(&self) -> Option<Outcome> {
        match self {
            Self::Doubt(reason) => Some(Outcome::kept(*reason)),
            Self::NeedsConsent(reason) => Some(Outcome::later(reason)),
            _ => None,
        }
    }
}

/// The state and its digest, if they do not fit, and nobody is writing them at this moment. What cannot be read is not
/// said to be wrong, and the lock is gone in any case.
async fn unfit_digest(services: &Services<'_>) -> Option<Comparison> {
    let LockLocation { bucket, key, table, .. } = services.place;
    let table = table.as_ref()?;
    let compare = || async {
        let compared = digest::compare(&services.stores, bucket, key, table).await.ok()?;
        (!compared.fits()).then_some(compared)
    };
    let look = async {
        let first = compare().await?;
        for part in &services.parts {
            if services.stores.read(part).await.ok()?.is_some() {
                return None;
            }
        }
        // The same again, and nobody held the lock in between: so nobody was between the state and its digest.
        (compare().await.as_ref() == Some(&first)).then_some(first)
    };
    timeout(DIGEST_TIMEOUT, look).await.ok()?
}

/// Waits until nothing that a write of the dead terraform would change has changed for [`QUIET_WINDOW`]. `None` when its lock is
/// gone meanwhile, so that there is nothing to keep: nothing is known of a write then.
async fn wait_for_quiet(services: &Services<'_>, recorded: &RecordedLock, run: &Run) -> Result<Option<Write>, Failure> {
    trace!("waiting for a write that may be on its way");
    let is_write = recorded.progress.may_be_writing();
    console::say(&if is_write { waiting_for_write(QUIET_WINDOW) } else { waiting_for_undo(QUIET_WINDOW) });
    let begun = Instant::now();
    let mut last = within(SERVICE_TIMEOUT, "AWS", services.look(recorded, run)).await?;
    let mut write = Write::Quiet;
    let (mut since, mut seen) = (Instant::now(), Instant::now());
    loop {
        if begun.elapsed() > MAX_QUIET_TIMEOUT {
            return Err(Failure::refusal(
                "S3",
                "the state is written again and again, by somebody who does not lock it",
            ));
        }
        sleep(POLL_INTERVAL).await;
        let now = match within(remaining(SERVICE_TIMEOUT, seen), "AWS", services.look(recorded, run)).await {
            Ok(now) => now,
            // What happens meanwhile is seen in the next look.
            Err(failure) if !failure.is_final() && seen.elapsed() < SERVICE_TIMEOUT => {
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
        } else if since.elapsed() >= QUIET_WINDOW {
            return Ok(Some(write));
        }
    }
}

/// Why a lock in a global table stands.
fn describe_global_table(table: &str, replicas: &[String]) -> String {
    format!(
        "DynamoDB table {} is a global table ({}), where a delete can undo what another region has just locked; set \
         TFW_RELEASE=auto if every run uses the same region",
        visible(table),
        visible(&replicas.join(", "))
    )
}

/// Why a lock was kept: it was there at one look and not at the next.
const COMES_AND_GOES: &str = "it is there at one look and gone at the next";

/// A write may be on its way.
fn waiting_for_write(quiet: Duration) -> String {
    format!(
        "a write of terraform's may still be under way; its lock is kept until nothing has arrived for {} s",
        quiet.as_secs()
    )
}

/// The request that undoes one part of a lock may be on its way.
fn waiting_for_undo(quiet: Duration) -> String {
    format!(
        "terraform ended while it took the two parts of its lock; they are kept until nothing has arrived for {} s",
        quiet.as_secs()
    )
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
                for phase in [Phase::Open, Phase::Writing, Phase::Unlocking] {
                    let mut log = Log::default();
                    log.read(lock_line(7, &format!("Attempting to lock remote state ({kind})..."), ID, "r").as_bytes());
                    let mut lock = log.named().next().unwrap().clone();
                    lock.progress.held = locked.then_some(lock.progress.asked);
                    lock.progress.phase = phase;
                    let expected = phase != Phase::Open || (kind.contains("and") && !locked);
                    assert_eq!(needs_quiet(&lock, true), expected, "{kind} {locked} {phase:?}");
                    assert!(!needs_quiet(&lock, false));
                }
            }
        }
    }

    /// Each thing that can be found of a part.
    fn findings() -> Vec<Result<Judged, Failure>> {
        vec![
            Ok(Judged::Absent),
            Ok(Judged::Excluded),
            Ok(Judged::Deleted),
            Ok(Judged::Anothers("other".to_owned())),
            Ok(Judged::NoLock("an empty object".to_owned())),
            Ok(Judged::Doubt("it differs")),
            Ok(Judged::NeedsQuiet),
            Ok(Judged::NeedsConsent("a global table".to_owned())),
            Err(Failure::no_answer("S3", "silence")),
        ]
    }

    /// All locks of one part and of two.
    fn all_parts() -> Vec<Vec<Result<Judged, Failure>>> {
        let one = findings().into_iter().map(|part| vec![part]);
        let two = findings()
            .into_iter()
            .flat_map(|first| findings().into_iter().map(move |second| vec![first.clone(), second]));
        one.chain(two).collect()
    }

    /// Calls `promise` for all parts in all circumstances, with what they come to.
    fn for_all(promise: impl Fn(&PartsLook<'_>, Step)) {
        for parts in all_parts() {
            for bits in 0..32_u8 {
                let bit = |place: u8| bits & (1 << place) != 0;
                let deleted_now = parts.contains(&Ok(Judged::Deleted));
                let mut look = PartsLook {
                    parts: &parts,
                    was_had: bit(0),
                    is_quiet: bit(1),
                    was_deleted: bit(2) || deleted_now,
                    before: None,
                    request_may_land: bit(3),
                    is_time_up: bit(4),
                };
                let unproven = look.unproven(&parts.iter().flatten().collect::<Vec<_>>());
                let other: Unproven = vec![(9, None)];
                for before in [None, Some(&unproven), Some(&other)] {
                    look.before = before;
                    promise(&look, look.combine());
                }
            }
        }
    }

    fn has(look: &PartsLook<'_>, is_it: impl Fn(&Judged) -> bool) -> bool {
        look.parts.iter().flatten().any(is_it)
    }

    #[test]
    fn a_part_that_could_not_be_read_decides_before_any_other() {
        for_all(|look, step| {
            assert_eq!(matches!(step, Step::Failed(_)), look.parts.iter().any(Result::is_err), "{:?}", look.parts);
        });
    }

    #[test]
    fn a_part_that_waits_for_quiet_keeps_the_lock_from_being_settled() {
        for_all(|look, step| {
            let expected = has(look, |part| *part == Judged::NeedsQuiet) && look.parts.iter().all(Result::is_ok);
            assert_eq!(step == Step::WaitForQuiet, expected, "{:?}", look.parts);
        });
    }

    #[test]
    fn a_lock_is_released_only_if_a_part_was_deleted_and_nothing_is_in_doubt() {
        for_all(|look, step| {
            if step == Step::Released {
                assert!(look.was_deleted);
                let is_clear = |part: &Judged| {
                    matches!(part, Judged::Absent | Judged::Excluded | Judged::Deleted | Judged::Anothers(_))
                };
                assert!(look.parts.iter().all(|part| part.as_ref().is_ok_and(is_clear)), "{:?}", look.parts);
            }
        });
    }

    #[test]
    fn a_doubt_about_one_part_keeps_the_lock() {
        for_all(|look, step| {
            if has(look, |part| part.keeps().is_some()) {
                assert!(
                    matches!(step, Step::Failed(_) | Step::WaitForQuiet | Step::LookAgain(_) | Step::Kept(_)),
                    "{:?}: {step:?}",
                    look.parts
                );
            }
        });
    }

    #[test]
    fn one_look_does_not_prove_that_a_lock_that_was_had_is_gone() {
        for_all(|look, step| {
            let is_absent = has(look, |part| matches!(part, Judged::Absent | Judged::Excluded));
            let is_gone = matches!(step, Step::Absent { .. } | Step::Released);
            if look.was_had && is_absent && is_gone {
                let unproven = look.unproven(&look.parts.iter().flatten().collect::<Vec<_>>());
                assert_eq!(look.before, Some(&unproven), "{:?}: {step:?}", look.parts);
            }
        });
    }

    #[test]
    fn while_a_request_may_land_an_absent_part_settles_nothing() {
        for_all(|look, step| {
            let is_missing = has(look, |part| matches!(part, Judged::Absent | Judged::Excluded | Judged::Anothers(_)));
            if look.request_may_land && is_missing {
                assert!(
                    matches!(step, Step::Failed(_) | Step::WaitForQuiet | Step::LookAgain(_)),
                    "{:?}: {step:?}",
                    look.parts
                );
            }
        });
    }

    #[test]
    fn looking_has_an_end() {
        for_all(|look, step| {
            if look.is_time_up && !look.request_may_land {
                assert!(!matches!(step, Step::LookAgain(_)), "{:?}", look.parts);
            }
        });
    }

    #[test]
    fn no_lock_can_be_there_only_if_none_can_be_in_any_part() {
        for_all(|look, step| {
            if let Step::Absent { anothers, excluded } = step {
                assert_eq!(excluded, look.parts.iter().all(|part| *part == Ok(Judged::Excluded)), "{:?}", look.parts);
                assert_eq!(anothers.is_some(), has(look, |part| matches!(part, Judged::Anothers(_))));
                assert!(!look.was_deleted);
            }
        });
    }
}
