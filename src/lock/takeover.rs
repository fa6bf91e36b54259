//! Takes over a lock whose lease has lapsed: watches the lock for as long as necessary, claims it, and deletes it.
//!
//! A write of the state, or a delete by terraform's own unlock, may still be in flight when the holder's host is gone.
//! So the state and its digest are watched together with the lock. A taker that dies after its claim leaves a claim
//! that lapses like a lease, and the next taker goes on from there.

use std::cell::RefCell;
use std::pin::{Pin, pin};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::deleted::noted;
use super::leased::{LeaseRead, LeasedLock, ObjectPart};
use super::location::LockLocation;
use super::release::consent::global_table;
use super::release::services::nothing_if_excluded;
use super::release::{EXPLANATION_TIMEOUT, SERVICE_TIMEOUT};
use super::stores::{Removed, StoreKey, StoredLock, Stores};
use crate::aws::connect;
use crate::aws::credentials::Purpose;
use crate::aws::failure::{Cause, Failure};
use crate::lease::record::{Claim, NotBelieved, Record};
use crate::lease::takeover::{
    AfterFailure, AfterGaps, AttemptFailure, Circumstances, Constancy, DeleteResult, DeletedBy, Obstacle, Permission,
    ReadTimes, StartWaitsFor, TakeRequests, TakeStage, TakerStep, Unchanged, WatchStep, after_failure, after_gaps,
    deleted_by, is_exclusive, is_start_due, permission, watch_step,
};
use crate::lease::terms::Terms;
use crate::lock::dynamodb::ItemKey;
use crate::lock::probe::IfMatch;
use crate::lock::{dynamodb, s3};
use crate::settings::release_is_asked_for;
use crate::terraform::lock_info::LockInfo;
use crate::trace::trace;
use crate::{crash_point, random};

/// The longest time between two reads of a lock that may not be taken over yet.
const MAX_LOOK_INTERVAL: Duration = Duration::from_secs(5);

/// The longest time between two reads of a lock that is compared with what was read before, or whose claim is waited
/// for.
const MAX_COMPARE_INTERVAL: Duration = Duration::from_secs(1);

/// How long the first read of a lock may take if the start of terraform waits for it. A service that needs more time is
/// too slow to be watched (`MAX_READ_GAP`), or almost so.
const FIRST_READ_TIMEOUT: Duration = Duration::from_secs(4);

/// How long a claim and the deletes may take together. It is about ten requests. They must end before the claim can
/// lapse ([`is_exclusive`]).
const TAKE_TIMEOUT: Duration = Duration::from_secs(40);

/// How often a claim or a delete is tried while the lock is still what was read.
const ATTEMPTS: u32 = 5;

/// The time between two of these attempts.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// Who takes over a lock, and how long it watches.
#[derive(Clone, Debug)]
pub(crate) struct Taker {
    /// As [`Claim::by`].
    pub(crate) by: String,
    /// The terms of the lease of this host's own runs. The intervals between two reads follow from them.
    pub(crate) terms: Terms,
    pub(crate) until: Until,
    /// Whether the terraform that waits for the lock is between two attempts to get it. If the lock is deleted during
    /// an attempt, terraform may give up.
    pub(crate) rests: watch::Receiver<bool>,
    /// Returns whether a process of the run that holds the lock is or may be running on this host, or a process of this
    /// host is finishing the run.
    pub(crate) runs_here: fn(&LockInfo) -> bool,
    /// The lock that an earlier taker of this run could not take. `None` if there is none.
    pub(crate) refused: Option<RefusedLock>,
}

/// A lock that an earlier taker of a run could not take. That was reported, so it is not reported again.
#[derive(Clone, Debug)]
pub(crate) struct RefusedLock {
    /// The ID of the lock. `None` as long as that is not known: it is the lock that the first read shows.
    id: RefCell<Option<String>>,
    /// When it may be tried again.
    until: Instant,
    /// As [`NotTaken::is_final`].
    is_final: bool,
}

impl RefusedLock {
    /// `id` is the ID of the lock. `None` if it is the lock that the first read shows. The lock may be tried again
    /// after the time `left`. `is_final` is as [`NotTaken::is_final`].
    pub(crate) fn new(id: Option<String>, left: Duration, is_final: bool) -> Self {
        Self { id: RefCell::new(id), until: Instant::now() + left, is_final }
    }

    /// Whether it is the lock `id`, which a read has shown. If there was no lock, `id` is empty.
    fn is(&self, id: &str) -> bool {
        self.id.borrow_mut().get_or_insert_with(|| id.to_owned()) == id
    }

    /// Whether the lock `id` is not tried at the time `now`.
    fn excludes(&self, id: &str, now: Instant) -> bool {
        self.is(id) && now < self.until
    }

    /// Whether an earlier taker has reported this.
    fn was_said(&self, progress: Progress<'_>) -> bool {
        match progress {
            Progress::Watches(lapsed, _) => self.is(&lapsed.info.id),
            // After a passing failure, a final one is news.
            Progress::Leaves(lapsed, Reason::NotTaken(failure)) => {
                self.is(&lapsed.info.id) && (self.is_final || !failure.is_final())
            }
            _ => false,
        }
    }
}

/// How long a taker waits until terraform is between two attempts. Terraform's longest pause is 16 s. If terraform's
/// log does not show the attempts, the lock is taken over after this time.
const MAX_REST_WAIT: Duration = Duration::from_secs(20);

/// How long a taker watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Until {
    /// Until it knows that the lock may not be taken over now, or until it has taken it over. The first read has a
    /// short time limit, because the start of terraform waits for it.
    Decided,
    /// Until it is told to end. Terraform waits for a lock.
    Told,
}

/// What a taker has seen or done.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Progress<'a> {
    /// The lease has lapsed, and the lock is taken over if nothing changes for this time.
    Watches(&'a Lapsed, Duration),
    /// Another host has claimed the lock and is about to delete it.
    WaitsFor(&'a Lapsed, &'a Claim),
    /// The lock was released.
    Took(&'a Lapsed),
    /// The lock was released. There is an object in this place that may be a part of it, and that these credentials may
    /// not read.
    LeftObject(&'a StoreKey),
    /// The lock is gone. This taker has requested its deletion, and the response was lost, so somebody else may have
    /// deleted it.
    MayHaveTaken(&'a Lapsed),
    /// The lock was watched, and is gone although this taker has not deleted it.
    Gone(&'a Lapsed),
    /// The lock was watched, and its holder has renewed the lease.
    Renewed(&'a Lapsed),
    /// The lease has lapsed, and the lock is not taken over.
    Leaves(&'a Lapsed, &'a Reason),
}

impl<'a> Progress<'a> {
    fn of_gone(by: DeletedBy, lapsed: &'a Lapsed) -> Self {
        match by {
            DeletedBy::ThisTaker => Self::Took(lapsed),
            DeletedBy::Unknown => Self::MayHaveTaken(lapsed),
            DeletedBy::Another => Self::Gone(lapsed),
        }
    }
}

/// Why a lock with a lapsed lease is not taken over.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Reason {
    Obstacle(Obstacle),
    /// As [`global_table`] says it.
    GlobalTable(String),
    /// A read has failed after the lock was seen.
    Failure(Failure),
    /// The time between two reads of the lock was so long, again and again, that it cannot be watched.
    TooSlow(Duration),
    /// The lock was not seen unchanged for long enough. The start of terraform has waited for this time.
    Unsettled(Duration),
    /// The claim or the delete has failed.
    NotTaken(Failure),
    /// The delete was requested. Its response, and that to the read after it, was lost.
    Unknown(Failure),
}

/// A lock with a lapsed lease, for a message.
#[derive(Clone, Debug)]
pub(crate) struct Lapsed {
    pub(crate) info: LockInfo,
    pub(crate) record: Record,
    /// `bucket/key` of the state.
    pub(crate) path: String,
    /// The service's time when the lock was read.
    pub(crate) now: Timestamp,
}

impl Lapsed {
    /// Returns how long ago the lease was renewed, by the service's time.
    pub(crate) fn renewed_ago(&self) -> Duration {
        let renewed = self.record.renewed_at().unwrap_or(self.now);
        Duration::try_from(self.now.duration_since(renewed)).unwrap_or_default()
    }

    /// Returns the length of the lease.
    pub(crate) fn length(&self) -> Duration {
        self.record.terms().map_or(Duration::ZERO, Terms::length)
    }
}

/// Watches the lock at `location` and takes it over if its lease allows that ([`permission`]). Calls `report` for each
/// step. When `told` is ready, the taker ends: at once if it has not claimed the lock, and otherwise after the delete.
///
/// Returns how the watch ended.
pub(crate) async fn take_over(
    location: &LockLocation,
    taker: &Taker,
    told: impl Future<Output = ()>,
    mut report: impl FnMut(Progress<'_>),
) -> End {
    let mut report = |progress: Progress<'_>| {
        if !taker.refused.as_ref().is_some_and(|refused| refused.was_said(progress)) {
            report(progress);
        }
    };
    let mut told = pin!(told);
    let (purpose, limit) = match taker.until {
        Until::Decided => (Purpose::Explanation, EXPLANATION_TIMEOUT),
        Until::Told => (Purpose::Work, Duration::MAX),
    };
    let connect = timeout(limit, Stores::connect(&location.backend, purpose));
    let stores = tokio::select! {
        () = &mut told => return End::Over,
        stores = connect => stores,
    };
    let stores = match stores {
        Ok(Ok(stores)) => stores,
        Ok(Err(unreachable)) => {
            trace!("takeover: {unreachable}");
            return End::NoCredentials;
        }
        Err(_) => {
            trace!("takeover: no credentials within {limit:?}");
            return End::NoCredentials;
        }
    };
    let Some(mut watch) = Watch::new(location, &stores, taker) else { return End::Over };
    // How many attempts to take the lock with this ID have failed in a row.
    let mut failed: (String, u32) = Default::default();
    loop {
        let decision = tokio::select! {
            () = &mut told => return watch.told_to_end(&mut report).await,
            decision = watch.decide(&mut report) => decision,
        };
        let (lock, lapsed) = match decision {
            Decision::End(end) => return end,
            Decision::Take(take) => *take,
        };
        let failure = match watch.attempt(&lock, &lapsed, told.as_mut()).await {
            Attempt::Told => return watch.told_to_end(&mut report).await,
            Attempt::JudgeAgain => continue,
            Attempt::Gone(by) => {
                watch.report_gone_by(by, &lapsed, &mut report);
                (watch.lapsed, watch.sent) = (None, None);
                if taker.until == Until::Decided {
                    return End::Over;
                }
                continue;
            }
            Attempt::Failed(failure) => failure,
        };
        trace!("takeover: the lock was not taken: {failure}");
        watch.unchanged.miss();
        if failed.0 != lapsed.info.id {
            failed = (lapsed.info.id.clone(), 0);
        }
        failed.1 += 1;
        match after_failure(failed.1, attempt_failure(&failure), taker.until == Until::Told) {
            AfterFailure::GiveUp => {
                let is_final = failure.is_final();
                if watch.report_failure(&lapsed, failure, &mut report).await {
                    return End::Over;
                }
                return End::NotTaken(NotTaken { id: lapsed.info.id, is_final });
            }
            AfterFailure::Reconnect => {
                watch.told_to_end(&mut report).await;
                connect::forget_credentials(&location.backend);
                return End::Failed;
            }
            AfterFailure::TryAgain { pause, is_said } => {
                if is_said {
                    watch.report_failure(&lapsed, failure, &mut report).await;
                }
                tokio::select! {
                    () = &mut told => return watch.told_to_end(&mut report).await,
                    () = sleep(pause) => {}
                }
            }
        }
    }
}

fn attempt_failure(failure: &Failure) -> AttemptFailure {
    match failure.cause() {
        Cause::ExpiredCredentials => AttemptFailure::ExpiredCredentials,
        cause if cause.is_final() => AttemptFailure::Final,
        _ => AttemptFailure::Passing,
    }
}

/// Whether a failed step ends the watch. `is_awaited` is whether terraform waits for a lock: the watch then goes on
/// while a service fails. `failing_for` is the time since the last step without a failure. `None` if the lock was never
/// read. A step has requests to both services, so one of them that fails at once ends the watch too.
fn ends_watch(failure: AttemptFailure, is_awaited: bool, failing_for: Option<Duration>) -> bool {
    let is_silent = !is_awaited && failing_for.is_none_or(|failing_for| failing_for > SERVICE_TIMEOUT);
    is_silent || failure != AttemptFailure::Passing
}

/// How a watch ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The lock may not be taken over now, is gone, or was taken over, or the taker was told to end.
    Over,
    /// The services could not be reached with the settings of the backend. In most cases there are no credentials.
    NoCredentials,
    /// A request has failed.
    Failed,
    /// The attempts to take a lock have failed. That was reported.
    NotTaken(NotTaken),
}

/// A lock that a taker could not take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NotTaken {
    /// The ID of the lock.
    pub(crate) id: String,
    /// Whether the same attempt would fail again.
    pub(crate) is_final: bool,
}

enum Decision {
    End(End),
    /// The lock may be claimed, or is claimed by this taker.
    Take(Box<(LeasedLock, Lapsed)>),
}

/// How an attempt to take over a lock has ended.
enum Attempt {
    /// The taker was told to end before the attempt.
    Told,
    /// A process of the run that holds the lock may have begun on this host, so the lock must be judged again.
    JudgeAgain,
    /// The lock is gone.
    Gone(DeletedBy),
    /// The claim or the delete may have succeeded nevertheless. The next read shows it.
    Failed(Failure),
}

/// The result of the requests that take over a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Taken {
    /// The lock is gone.
    Gone(DeletedBy),
    /// The lock has changed, so that it must be judged again.
    Changed,
}

/// What a read shows about a lock that this taker may have deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum AfterDelete {
    /// The lock is gone, and that was reported.
    Over,
    /// The lock is still there, or this taker has sent no delete.
    Held,
    /// The read has failed.
    Unread,
}

/// The deletes of one lock that this taker has sent. They have the condition that the lock is still as it was read, so
/// they cannot delete it after it has changed.
struct SentDeletes {
    lapsed: Lapsed,
    /// The lock as it was read before the first of them, or before the claim.
    lock: LeasedLock,
    /// The claim that the lock had when they were sent. `None` if it is an object alone.
    claim: Option<Claim>,
    requests: TakeRequests,
}

/// What must not change beside the lock: everything that a request of the holder in flight would change.
#[derive(Clone, Debug, PartialEq)]
struct Rest {
    /// A text that changes whenever the state changes.
    state: Option<String>,
    digest: Option<String>,
    /// The object of a lock with two parts.
    object: Option<StoredLock>,
}

/// What belongs to a read of the lock.
struct Beside {
    /// When the read was sent, counted from the begin of the watch.
    sent: Duration,
    response_time: Duration,
    /// What must not change beside the lock. `None` if the lock is not compared yet.
    rest: Option<Result<Rest, Failure>>,
}

/// What was reported about the lock that is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reported {
    Watches,
    WaitsFor,
    Leaves,
}

/// Whether a lock in the table may be taken over. A global table is treated as for a release.
#[derive(Clone, Debug, PartialEq, Eq)]
enum TableCheck {
    Unknown,
    Usable,
    /// The text is the reason against it ([`global_table`]).
    Global(String),
}

struct Watch<'a> {
    location: &'a LockLocation,
    stores: &'a Stores,
    taker: &'a Taker,
    /// The part of the lock that has the record.
    part: StoreKey,
    /// The object of a lock with two parts.
    object: Option<StoreKey>,
    /// The place of an object that locks with this backend do not have ([`ObjectPart::OfAnotherBackend`]). `None` if
    /// they have one. It is not compared: terraform deletes its object before the item, and the item is compared.
    other_object: Option<StoreKey>,
    begun: Instant,
    unchanged: Unchanged<(LeasedLock, Rest)>,
    /// How many times in a row the time between two reads was too long.
    gaps: u32,
    claims: OwnClaims,
    /// The deletes of the lock that is there, or may be. `None` if no attempt to take it was made.
    sent: Option<SentDeletes>,
    /// What was reported, and about which lock. `None` if nothing was reported about a lock that is still there.
    lapsed: Option<(Reported, Lapsed)>,
    /// Whether the lock was read.
    has_read: bool,
    /// When the last step was completed that had no failure, or when the watch began.
    succeeded: Instant,
    table: TableCheck,
    /// Whether a test has shown that the service obeys the condition of a delete.
    obeys_if_match: bool,
}

impl<'a> Watch<'a> {
    /// Returns `None` if the lock of `location` has no part.
    fn new(location: &'a LockLocation, stores: &'a Stores, taker: &'a Taker) -> Option<Self> {
        let mut parts = location.store_keys(stores).into_iter();
        let other_object = (!location.lock_file).then(|| stores.object(&location.bucket, &location.lock_key()));
        Some(Self {
            location,
            stores,
            taker,
            part: parts.next()?,
            object: parts.next(),
            other_object,
            begun: Instant::now(),
            unchanged: Unchanged::new(),
            gaps: 0,
            claims: OwnClaims::default(),
            sent: None,
            lapsed: None,
            has_read: false,
            succeeded: Instant::now(),
            table: if release_is_asked_for() { TableCheck::Usable } else { TableCheck::Unknown },
            obeys_if_match: false,
        })
    }

    fn look_interval(&self) -> Duration {
        self.taker.terms.renewal_interval().min(MAX_LOOK_INTERVAL)
    }

    fn compare_interval(&self) -> Duration {
        (self.taker.terms.renewal_interval() / 2).min(MAX_COMPARE_INTERVAL)
    }

    /// Reads the lock until it may be claimed, or until the watch is over.
    async fn decide(&mut self, report: &mut impl FnMut(Progress<'_>)) -> Decision {
        loop {
            let begun = Instant::now();
            let failure = match self.step(report).await {
                Ok(Next::Decided(decision)) => return decision,
                Ok(Next::Pause(pause)) => {
                    self.succeeded = Instant::now();
                    sleep(pause.saturating_sub(begun.elapsed())).await;
                    continue;
                }
                Err(failure) => failure,
            };
            trace!("takeover: {failure}");
            self.unchanged.miss();
            let is_awaited = self.taker.until == Until::Told;
            let failing_for = self.has_read.then(|| self.succeeded.elapsed());
            if ends_watch(attempt_failure(&failure), is_awaited, failing_for) {
                if failure.cause() == Cause::ExpiredCredentials {
                    connect::forget_credentials(&self.location.backend);
                }
                let reason: fn(Failure) -> Reason = match &self.sent {
                    Some(sent) if sent.requests.deleted == DeleteResult::NotSent => Reason::NotTaken,
                    Some(_) => Reason::Unknown,
                    None => Reason::Failure,
                };
                let tried = self.sent.as_ref().map(|sent| &sent.lapsed);
                if let Some(lapsed) = tried.or(self.lapsed.as_ref().map(|(_, lapsed)| lapsed)) {
                    report(Progress::Leaves(lapsed, &reason(failure)));
                }
                return Decision::End(End::Failed);
            }
            sleep(self.compare_interval().saturating_sub(begun.elapsed())).await;
        }
    }

    /// Returns the limit for one read. The first read of a taker for whom the start of terraform waits has a shorter
    /// one.
    fn limit(&self) -> Duration {
        let is_first = !self.has_read && self.taker.until == Until::Decided;
        if is_first { FIRST_READ_TIMEOUT.saturating_sub(self.begun.elapsed()) } else { SERVICE_TIMEOUT }
    }

    /// Reads the lock. While it is compared, everything is read at the same time, so that a slow service does not make
    /// the time between two reads too long (`Unchanged`).
    async fn read(&mut self) -> Result<(LeaseRead, Beside), Failure> {
        let sent = self.begun.elapsed();
        let lock = async {
            let read = self.within(self.limit(), self.stores.read_lease(&self.part)).await;
            (read, self.begun.elapsed().saturating_sub(sent))
        };
        let ((read, response_time), rest) = match self.unchanged.last() {
            None => (lock.await, None),
            Some((before, last)) => {
                let id = before.stored.info().map(|info| info.id).unwrap_or_default();
                let (lock, rest) = tokio::join!(lock, self.rest(&id, last.state.is_none()));
                (lock, Some(rest))
            }
        };
        let read = match read {
            // No lock can be there, for example because the table does not exist.
            Err(failure) if failure.cause().excludes_locks() => LeaseRead { lock: None, date: None },
            read => read?,
        };
        self.has_read = true;
        let read = match read {
            // A single response proves nothing.
            LeaseRead { lock: None, date } if self.sent.is_some() => {
                self.within(SERVICE_TIMEOUT, self.reread(date)).await?
            }
            read => read,
        };
        Ok((read, Beside { sent, response_time, rest }))
    }

    async fn step(&mut self, report: &mut impl FnMut(Progress<'_>)) -> Result<Next, Failure> {
        let (LeaseRead { lock, date }, beside) = self.read().await?;
        if self.see_whether_deleted(lock.as_ref(), date, report) && lock.is_none() {
            return Ok(self.leave());
        }
        let info = lock.as_ref().and_then(|lock| lock.stored.info());
        let id = info.as_ref().map_or("", |info| &info.id);
        let is_excluded = self.taker.refused.as_ref().is_some_and(|refused| refused.excludes(id, Instant::now()));
        let Some(info) = info else { return Ok(self.without_a_lock(report)) };
        let (Some(lock), Some(now)) = (lock, date) else { return Ok(self.leave()) };
        let record = lock
            .record
            .as_ref()
            .map_or(Err(NotBelieved::Malformed), |record| record.as_ref().map_err(|reason| *reason));
        let Ok(seen) = record else { return Ok(self.leave()) };
        let lapsed = Lapsed { info, record: seen.clone(), path: self.location.lock_path(), now };
        if self.claims.of(seen).is_some() {
            return Ok(Next::Decided(Decision::Take(Box::new((lock, lapsed)))));
        }
        if self.lapsed.as_ref().is_some_and(|(_, before)| before.info.id != lapsed.info.id) {
            // Another run has the lock now.
            self.report_gone(report);
        }
        if is_excluded {
            return Ok(self.leave());
        }
        let is_same_region = seen.region == self.stores.region();
        let notice = (self.taker.until == Until::Told).then(|| self.look_interval() * 2);
        match watch_step(record, now, is_same_region, notice) {
            WatchStep::Leave(obstacle @ (Obstacle::NoFence | Obstacle::AnotherRegion)) => {
                return Ok(self.leaves(lapsed, &Reason::Obstacle(obstacle), report));
            }
            WatchStep::Leave(Obstacle::ClaimLapsedEarly) => return Ok(self.leaves_claim(lapsed, report)),
            WatchStep::Leave(_) => {
                if let Some((Reported::Watches, before)) = &self.lapsed {
                    report(Progress::Renewed(before));
                }
                self.lapsed = None;
                return Ok(self.leave());
            }
            WatchStep::WaitForClaim if self.is_start_due(StartWaitsFor::Claim) => {
                return Ok(self.leaves_claim(lapsed, report));
            }
            WatchStep::WaitForClaim => {
                if let Some(claim) = &seen.taken
                    && !matches!(self.lapsed, Some((Reported::WaitsFor, _)))
                {
                    report(Progress::WaitsFor(&lapsed, claim));
                    self.lapsed = Some((Reported::WaitsFor, lapsed));
                }
                return Ok(Next::Pause(self.compare_interval()));
            }
            WatchStep::Claim | WatchStep::Compare => {}
        }
        self.compare(lock, lapsed, beside, report).await
    }

    /// Decides what to do about a lock whose lease lapses soon or has lapsed, and that nobody has claimed.
    async fn compare(
        &mut self,
        lock: LeasedLock,
        lapsed: Lapsed,
        Beside { sent, response_time, rest }: Beside,
        report: &mut impl FnMut(Progress<'_>),
    ) -> Result<Next, Failure> {
        let (now, record) = (lapsed.now, Ok(&lapsed.record));
        if let Some(reason) = self.global_table().await? {
            return Ok(self.leaves(lapsed, &Reason::GlobalTable(reason), report));
        }
        let host_agrees = Terms::agrees(now, Timestamp::now());
        let mut circumstances = Circumstances {
            consent: true,
            is_same_region: lapsed.record.region == self.stores.region(),
            unchanged_for: Duration::ZERO,
            response_time,
            host_agrees,
            runs_here: false,
        };
        let mut may = permission(record, now, circumstances);
        if may != Permission::Yes {
            let rest = match rest {
                Some(rest) => rest?,
                None => self.rest(&lapsed.info.id, false).await?,
            };
            let times = ReadTimes { sent, completed: self.begun.elapsed(), response_time };
            let seen = self.unchanged.see((lock.clone(), rest), times);
            (circumstances.unchanged_for, circumstances.response_time) = (seen.unchanged_for, seen.response_time);
            may = permission(record, now, circumstances);
            // Before the lapse, a gap delays nothing.
            if matches!(may, Permission::Wait(_))
                && let Some(next) = self.after_gap(seen, &lapsed, report)
            {
                return Ok(next);
            }
        }
        // The journal is read only for a lock that is about to be watched or taken.
        let is_watched = matches!(self.lapsed, Some((Reported::Watches, _)));
        if may == Permission::Yes || (matches!(may, Permission::Wait(_)) && !is_watched) {
            circumstances.runs_here = (self.taker.runs_here)(&lapsed.info);
            may = permission(record, now, circumstances);
        }
        Ok(match may {
            Permission::No(obstacle @ Obstacle::RunsHere) => {
                // The explanation of the refusal or of the wait says why.
                if self.lapsed.take().is_some() {
                    report(Progress::Leaves(&lapsed, &Reason::Obstacle(obstacle)));
                }
                self.leave()
            }
            Permission::Yes => Next::Decided(Decision::Take(Box::new((lock, lapsed)))),
            Permission::Wait(missing) if self.is_start_due_without_quiet(&lapsed, &circumstances, missing) => {
                report(Progress::Leaves(&lapsed, &Reason::Unsettled(self.begun.elapsed())));
                self.leave()
            }
            Permission::Wait(missing) => {
                if !is_watched {
                    report(Progress::Watches(&lapsed, missing));
                    self.lapsed = Some((Reported::Watches, lapsed));
                }
                Next::Pause(missing.min(self.compare_interval()))
            }
            // It has not lapsed yet.
            Permission::No(_) if self.taker.until == Until::Decided => Next::Decided(Decision::End(End::Over)),
            Permission::No(_) => Next::Pause(self.compare_interval()),
        })
    }

    /// Reads the lock again that a read at the service's time `date` has not found.
    async fn reread(&self, date: Option<Timestamp>) -> Result<LeaseRead, Failure> {
        match self.stores.read_lease(&self.part).await {
            Err(failure) if failure.cause().excludes_locks() => Ok(LeaseRead { lock: None, date }),
            read => read,
        }
    }

    /// Reports what became of the lock that this taker has tried to delete, if `now`, a read at the service's time
    /// `date`, shows that it is gone and this taker has or may have deleted it. Returns whether that is so.
    fn see_whether_deleted(
        &mut self,
        now: Option<&LeasedLock>,
        date: Option<Timestamp>,
        report: &mut impl FnMut(Progress<'_>),
    ) -> bool {
        let Some(sent) = &mut self.sent else { return false };
        let is_gone = match now.map(|now| now.stored.info()) {
            None => true,
            Some(Some(info)) => info.id != sent.lapsed.info.id,
            // A proxy may have sent it.
            Some(None) => return false,
        };
        if !is_gone {
            let is_claimed = now.and_then(record_of).is_some_and(|record| self.claims.of(record).is_some());
            if is_claimed || now == Some(&sent.lock) {
                sent.requests.deleted = sent.requests.deleted.after_the_lock_was_seen();
            } else {
                self.sent = None;
            }
            return false;
        }
        let has_claim = sent.claim.as_ref().zip(date).is_some_and(|(claim, date)| is_exclusive(claim, date));
        let by = deleted_by(sent.requests.deleted, has_claim);
        if by != DeletedBy::Another
            && let Some(SentDeletes { lapsed, .. }) = &self.sent
        {
            self.report_gone_by(by, lapsed, report);
            self.lapsed = None;
        }
        self.sent = None;
        by != DeletedBy::Another
    }

    /// Reads the lock once more, if this taker has sent a delete whose result it does not know.
    async fn look_after_delete(&mut self, report: &mut impl FnMut(Progress<'_>)) -> AfterDelete {
        if self.sent.as_ref().is_none_or(|sent| sent.requests.deleted == DeleteResult::NotSent) {
            return AfterDelete::Held;
        }
        match self.within(EXPLANATION_TIMEOUT, self.stores.read_lease_surely(&self.part)).await {
            Ok(LeaseRead { lock, date }) if self.see_whether_deleted(lock.as_ref(), date, report) => AfterDelete::Over,
            Ok(LeaseRead { lock, .. }) if lock.as_ref().is_none_or(|lock| lock.stored.info().is_some()) => {
                AfterDelete::Held
            }
            Ok(_) | Err(_) => AfterDelete::Unread,
        }
    }

    /// What follows if the taker is told to end: it reports what is known about a delete that it has sent.
    async fn told_to_end(&mut self, report: &mut impl FnMut(Progress<'_>)) -> End {
        if self.look_after_delete(report).await == AfterDelete::Unread
            && let Some(sent) = &self.sent
        {
            let failure = Failure::no_answer(self.part.service(), "the request timed out");
            report(Progress::Leaves(&sent.lapsed, &Reason::Unknown(failure)));
        }
        End::Over
    }

    /// Reports that an attempt to take the lock has failed, unless the attempt has deleted it all the same. Returns
    /// whether the lock is gone.
    async fn report_failure(
        &mut self,
        lapsed: &Lapsed,
        failure: Failure,
        report: &mut impl FnMut(Progress<'_>),
    ) -> bool {
        let reason = match self.look_after_delete(report).await {
            AfterDelete::Over => return true,
            AfterDelete::Held => Reason::NotTaken(failure),
            AfterDelete::Unread => Reason::Unknown(failure),
        };
        report(Progress::Leaves(lapsed, &reason));
        false
    }

    /// What follows if the lock may not be taken over.
    fn leave(&mut self) -> Next {
        self.unchanged.miss();
        match self.taker.until {
            Until::Decided => Next::Decided(Decision::End(End::Over)),
            Until::Told => Next::Pause(self.look_interval()),
        }
    }

    /// Whether terraform must start now, if its start waits for this taker.
    fn is_start_due(&self, waits_for: StartWaitsFor) -> bool {
        self.taker.until == Until::Decided && is_start_due(waits_for, self.begun.elapsed())
    }

    /// Whether terraform must start now although the lock was not seen unchanged for long enough. `missing` is the time
    /// that is missing.
    fn is_start_due_without_quiet(&self, lapsed: &Lapsed, circumstances: &Circumstances, missing: Duration) -> bool {
        let window = lapsed.record.terms().map(|terms| terms.quiet_window(circumstances.response_time));
        window.is_some_and(|window| self.is_start_due(StartWaitsFor::Quiet { window, missing }))
    }

    /// What follows if another host has claimed the lock and does not delete it. Reports that once, if the claim was
    /// waited for. If it was not, the explanation of the refusal or of the wait names the claim.
    fn leaves_claim(&mut self, lapsed: Lapsed, report: &mut impl FnMut(Progress<'_>)) -> Next {
        if matches!(self.lapsed, Some((Reported::WaitsFor, _))) {
            report(Progress::Leaves(&lapsed, &Reason::Obstacle(Obstacle::ClaimLapsedEarly)));
            self.lapsed = Some((Reported::Leaves, lapsed));
        }
        self.leave()
    }

    /// Counts a read after which the lock was `seen`. Reports once that the service is too slow, if it is. Returns what
    /// follows if the watch is over.
    fn after_gap(&mut self, seen: Constancy, lapsed: &Lapsed, report: &mut impl FnMut(Progress<'_>)) -> Option<Next> {
        let Some(gap) = seen.gap else {
            self.gaps = 0;
            return None;
        };
        self.gaps += 1;
        let decision = after_gaps(self.gaps, self.taker.until == Until::Told);
        if decision != AfterGaps::Continue {
            report(Progress::Leaves(lapsed, &Reason::TooSlow(gap)));
        }
        (decision == AfterGaps::GiveUp).then_some(Next::Decided(Decision::End(End::Over)))
    }

    /// What follows if the lease has lapsed and the lock may not be taken over. Reports it once for a lock.
    fn leaves(&mut self, lapsed: Lapsed, reason: &Reason, report: &mut impl FnMut(Progress<'_>)) -> Next {
        if self.lapsed.is_none() {
            report(Progress::Leaves(&lapsed, reason));
        }
        self.lapsed = Some((Reported::Leaves, lapsed));
        self.leave()
    }

    fn without_a_lock(&mut self, report: &mut impl FnMut(Progress<'_>)) -> Next {
        self.report_gone(report);
        self.leave()
    }

    /// Reports that the lock is gone, which this taker has tried to take.
    fn report_gone_by(&self, by: DeletedBy, lapsed: &Lapsed, report: &mut impl FnMut(Progress<'_>)) {
        report(Progress::of_gone(by, lapsed));
        let is_object_unread = self.sent.as_ref().is_some_and(|sent| sent.requests.is_object_unread);
        if let (DeletedBy::ThisTaker, true, Some(object)) = (by, is_object_unread, &self.other_object) {
            report(Progress::LeftObject(object));
        }
    }

    fn report_gone(&mut self, report: &mut impl FnMut(Progress<'_>)) {
        if let Some((_, lapsed)) = self.lapsed.take() {
            report(Progress::Gone(&lapsed));
        }
    }

    /// Returns why a lock in this table is not taken over. `None` if nothing is wrong with the table. It is asked only
    /// about a lock that would be taken over.
    async fn global_table(&mut self) -> Result<Option<String>, Failure> {
        match &self.table {
            TableCheck::Usable => Ok(None),
            TableCheck::Global(reason) => Ok(Some(reason.clone())),
            TableCheck::Unknown => {
                let asked = self.within(SERVICE_TIMEOUT, global_table(self.stores, self.location)).await?;
                self.table = asked.clone().map_or(TableCheck::Usable, TableCheck::Global);
                Ok(asked)
            }
        }
    }

    /// Reads everything that must not change beside the part with the record. `id` is that of the lock. A terraform
    /// that waits for it puts an object of its own and deletes it again, with each of its attempts, so the object of
    /// another lock counts as none. `had_no_state` is whether the last read has found no state.
    async fn rest(&self, id: &str, had_no_state: bool) -> Result<Rest, Failure> {
        let Self { location: LockLocation { bucket, key, table, .. }, stores, object, .. } = self;
        let state = Box::pin(s3::fingerprint(&stores.s3, bucket, key, had_no_state));
        let digest = Box::pin(async {
            let Some(table) = table else { return Ok(None) };
            let path = &self.location.lock_path();
            nothing_if_excluded(dynamodb::digest(&stores.dynamodb, ItemKey { table, path }).await)
        });
        let object = Box::pin(async {
            let Some(object) = object else { return Ok(None) };
            let read = nothing_if_excluded(stores.read(object).await)?;
            Ok(read.filter(|stored| stored.info().is_none_or(|info| info.id == id)))
        });
        let read = async {
            let (state, digest, object) = tokio::try_join!(state, digest, object)?;
            Ok(Rest { state, digest, object })
        };
        self.within(SERVICE_TIMEOUT, read).await
    }

    async fn within<T>(&self, limit: Duration, work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
        let failed = || Failure::no_answer(self.part.service(), "the request timed out");
        timeout(limit, Box::pin(work)).await.unwrap_or_else(|_| Err(failed()))
    }

    /// Tests whether the service obeys the condition of a delete, if the lock is an object alone and no test has shown
    /// that yet. It is not part of an attempt to take the lock: each attempt has a time limit, and a test that is
    /// broken off leaves an object.
    async fn test_deletes(&mut self) -> Result<(), Failure> {
        if self.obeys_if_match || !matches!(self.part, StoreKey::S3 { .. }) {
            return Ok(());
        }
        let only_a_person = |why: &str| {
            Err(Failure::refusal(self.part.service(), &format!("{why}, so only a person can release this lock")))
        };
        match self.stores.treatment_of_deletes(&self.part, SERVICE_TIMEOUT).await {
            Ok(IfMatch::Obeyed) => {
                self.obeys_if_match = true;
                Ok(())
            }
            Ok(IfMatch::Ignored) => only_a_person("the service ignores the condition of a delete (If-Match)"),
            Ok(IfMatch::Unknown) => only_a_person(UNTESTED),
            Err(failure) if failure.is_final() => only_a_person(&format!("{UNTESTED} ({failure})")),
            Err(failure) => Err(failure),
        }
    }

    /// Returns the claim of this taker that `lock` has. `None` if it has none.
    fn own_claim(&self, lock: &LeasedLock) -> Option<&Claim> {
        self.claims.of(record_of(lock)?)
    }

    /// Whether this taker has claimed `lock`.
    fn has_claimed(&self, lock: &LeasedLock) -> bool {
        self.own_claim(lock).is_some()
    }

    /// Takes over `lock`. If terraform waits for it, this waits until terraform is between two attempts to get it. Ends
    /// before the first request if `told` is ready.
    async fn attempt(
        &mut self,
        lock: &LeasedLock,
        lapsed: &Lapsed,
        told: Pin<&mut impl Future<Output = ()>>,
    ) -> Attempt {
        if let Err(failure) = self.test_deletes().await {
            return Attempt::Failed(failure);
        }
        if self.taker.until == Until::Told {
            let mut rests = self.taker.rests.clone();
            tokio::select! {
                biased;
                () = told => return Attempt::Told,
                _ = timeout(MAX_REST_WAIT, rests.wait_for(|rests| *rests)) => {}
            }
            // The wait may have been long.
            if !self.has_claimed(lock) && (self.taker.runs_here)(&lapsed.info) {
                return Attempt::JudgeAgain;
            }
        }
        let service = self.part.service();
        let failed = |why| Attempt::Failed(Failure::no_answer(service, why));
        match timeout(TAKE_TIMEOUT, self.take(lock, lapsed)).await {
            Ok(Ok(Taken::Gone(by))) => Attempt::Gone(by),
            Ok(Ok(Taken::Changed)) => failed("the lock changed while tf released it"),
            Ok(Err(failure)) => Attempt::Failed(failure),
            Err(_) => failed("the request timed out"),
        }
    }

    /// Claims and deletes `lock`.
    async fn take(&mut self, lock: &LeasedLock, lapsed: &Lapsed) -> Result<Taken, Failure> {
        let own = self.own_claim(lock).cloned();
        let sent = self.sent.get_or_insert_with(|| SentDeletes {
            lapsed: lapsed.clone(),
            lock: lock.clone(),
            claim: None,
            requests: TakeRequests::default(),
        });
        if matches!(self.part, StoreKey::S3 { .. }) {
            return take_object(self.stores, &self.part, lock, &mut sent.requests.deleted).await;
        }
        let object = match (&self.object, &self.other_object) {
            (Some(object), _) => Some(ObjectPart::Known(object)),
            (None, Some(object)) => Some(ObjectPart::OfAnotherBackend(object)),
            (None, None) => None,
        };
        let parts = ItemAndObject { item: &self.part, object };
        if let Some(claim) = own {
            let claim = sent.claim.insert(claim);
            let end = lapsed.now.checked_add(MAX_REST_WAIT + TAKE_TIMEOUT).unwrap_or(lapsed.now);
            return delete(self.stores, parts, lock, is_exclusive(claim, end), &mut sent.requests).await;
        }
        let claim = Claim { by: self.taker.by.clone(), at: lapsed.now.as_second(), number: random::number() };
        self.claims.add(claim.clone(), lapsed.now);
        sent.claim = Some(claim.clone());
        claim_and_delete(self.stores, parts, lock, &claim, &mut sent.requests).await
    }
}

/// Where the parts of a lock with an item are.
#[derive(Clone, Copy)]
struct ItemAndObject<'a> {
    item: &'a StoreKey,
    /// `None` if the lock is an item alone.
    object: Option<ObjectPart<'a>>,
}

/// Releases a lock with a lease at the request of a person: claims the item `lock`, and deletes it and the other part
/// at `object`, if that belongs to the same lock. From the claim on, a holder that is alive cannot renew its lease, so
/// it stops. `by` is as [`Claim::by`], and `now` is the service's time when `lock` was read.
///
/// # Errors
/// Returns a [`Failure`] if a request fails for a reason other than its condition, or if the requests take too long.
/// The step in which that happened says whether the lock is claimed, and which part may be deleted.
pub(crate) async fn release_item(
    stores: &Stores,
    item: &StoreKey,
    object: Option<&StoreKey>,
    lock: &LeasedLock,
    (by, now): (&str, Timestamp),
) -> Result<Taken, (Failure, TakeStage)> {
    let claim = Claim { by: by.to_owned(), at: now.as_second(), number: random::number() };
    let mut requests = TakeRequests::default();
    let parts = ItemAndObject { item, object: object.map(ObjectPart::Known) };
    let work = claim_and_delete(stores, parts, lock, &claim, &mut requests);
    let taken = timeout(TAKE_TIMEOUT, Box::pin(work)).await;
    let stage = requests.stage;
    let part = match (stage, object) {
        (TakeStage::Object, Some(object)) => object,
        _ => item,
    };
    let silence = |_| Err(Failure::no_answer(part.service(), "the request timed out"));
    taken.unwrap_or_else(silence).map_err(|failure| (failure, stage))
}

enum Next {
    Decided(Decision),
    /// Read again this long after the begin of this read.
    Pause(Duration),
}

fn record_of(lock: &LeasedLock) -> Option<&Record> {
    lock.record.as_ref()?.as_ref().ok()
}

/// The claims that a taker has sent, except those that have lapsed. A claim whose response is missing may be stored
/// later, as long as the lock is as it was read: also when the taker has sent another one.
///
/// An earlier claim is not sent again in place of a new one, because it does not count long enough: the deletes that
/// follow must end before it can lapse.
#[derive(Debug, Default)]
struct OwnClaims(Vec<Claim>);

impl OwnClaims {
    /// Takes note of `claim`, which is sent at the service's time `now`.
    fn add(&mut self, claim: Claim, now: Timestamp) {
        self.0.retain(|own| own.at().is_some_and(|at| !Terms::of_claim().has_lapsed(at, now)));
        self.0.push(claim);
    }

    /// Returns the one that `record` has. Its [`Claim::by`] does not count: it is left out if lock and record would be
    /// longer than 1 KiB.
    fn of(&self, record: &Record) -> Option<&Claim> {
        let taken = record.taken.as_ref()?;
        self.0.iter().find(|own| own.is_same(taken))
    }
}

/// Claims the item `lock`, and deletes both parts of the lock. Notes in `requests` what is known about them.
async fn claim_and_delete(
    stores: &Stores,
    parts: ItemAndObject<'_>,
    lock: &LeasedLock,
    claim: &Claim,
    requests: &mut TakeRequests,
) -> Result<Taken, Failure> {
    let item = parts.item;
    requests.stage = TakeStage::Claim;
    crash_point::reached("takeover: before the claim");
    for _ in 0..ATTEMPTS {
        let (after, read) = stores.claim(item, lock, claim).await?;
        match (after.next(), &read.lock) {
            (TakerStep::Delete, Some(claimed)) => {
                crash_point::reached("takeover: claimed");
                return delete(stores, parts, claimed, true, requests).await;
            }
            (TakerStep::Done, _) => return Ok(Taken::Gone(DeletedBy::Another)),
            (TakerStep::LookAgain, _) => return Ok(Taken::Changed),
            (TakerStep::ClaimAgain | TakerStep::Delete, _) => sleep(RETRY_INTERVAL).await,
        }
    }
    Err(Failure::refusal(item.service(), "the service does not store the claim of the lock"))
}

/// Deletes both parts of a lock that this taker has claimed. `is_exclusive` is whether no other taker can replace the
/// claim meanwhile.
async fn delete(
    stores: &Stores,
    ItemAndObject { item, object }: ItemAndObject<'_>,
    claimed: &LeasedLock,
    is_exclusive: bool,
    requests: &mut TakeRequests,
) -> Result<Taken, Failure> {
    let removed = stores.delete_claimed(item, object, claimed, requests).await?;
    crash_point::reached("takeover: deleted");
    match removed {
        Removed::Gone(_) | Removed::GoneBefore => Ok(Taken::Gone(deleted_by(requests.deleted, is_exclusive))),
        // Only another taker changes a claimed lock, and only after the claim has lapsed.
        Removed::Anothers => Ok(Taken::Changed),
        Removed::Refused => {
            Err(Failure::refusal(item.service(), "the service confirmed the delete, but the lock is still there"))
        }
    }
}

/// Why a lock without a table is not taken, if the test of the service had no result.
const UNTESTED: &str = "tf could not test whether the service obeys the condition of a delete (If-Match)";

/// Deletes a lock that is an object alone. The condition of the delete is the decision: the lock and its record are
/// still what was read. A test must have shown that the service obeys it ([`Watch::test_deletes`]). Notes in `result`
/// what is known about the deletes.
async fn take_object(
    stores: &Stores,
    object: &StoreKey,
    lock: &LeasedLock,
    result: &mut DeleteResult,
) -> Result<Taken, Failure> {
    crash_point::reached("takeover: before the delete");
    for _ in 0..ATTEMPTS {
        noted(result, stores.delete(object, &lock.stored)).await?;
        crash_point::reached("takeover: deleted");
        let now = stores.read_lease_surely(object).await?.lock;
        if let Some(taken) = taken(*result, lock, now.as_ref()) {
            return Ok(taken);
        }
        *result = result.after_the_lock_was_seen();
        sleep(RETRY_INTERVAL).await;
    }
    Err(Failure::refusal(object.service(), "the service confirmed the delete, but the lock is still there"))
}

/// Returns the result of conditional deletes of the object `lock`. `now` is what is there after the last one. `None` if
/// that does not show the result, so that the delete must be repeated.
fn taken(result: DeleteResult, lock: &LeasedLock, now: Option<&LeasedLock>) -> Option<Taken> {
    let is_same = match now {
        None => false,
        Some(now) => now.stored.info()?.id == lock.stored.info()?.id,
    };
    match result {
        _ if now == Some(lock) => None,
        // The service has deleted what was read, and the holder cannot have written it again.
        DeleteResult::Confirmed if is_same => None,
        _ if is_same => Some(Taken::Changed),
        result => Some(Taken::Gone(deleted_by(result, false))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lease::record::{Promise, Renewal};

    #[test]
    fn a_watch_for_which_the_start_of_terraform_waits_ends_with_a_service_that_fails() {
        let just_after = SERVICE_TIMEOUT + Duration::from_millis(1);
        for (failing_for, is_silent) in
            [(None, true), (Some(Duration::ZERO), false), (Some(SERVICE_TIMEOUT), false), (Some(just_after), true)]
        {
            for is_awaited in [false, true] {
                let ends = |failure| ends_watch(failure, is_awaited, failing_for);
                assert!(ends(AttemptFailure::Final) && ends(AttemptFailure::ExpiredCredentials));
                assert_eq!(ends(AttemptFailure::Passing), is_silent && !is_awaited, "{is_awaited} {failing_for:?}");
            }
        }
    }

    #[test]
    fn a_refused_lock_is_not_tried_for_some_time_and_not_reported_again() {
        let terms = Terms::new(Duration::from_mins(5)).unwrap();
        let lapsed = |id: &str| Lapsed {
            info: LockInfo { id: id.into(), ..LockInfo::default() },
            record: Record::new(id, terms, Renewal { renewed: 1_790_000_000, beat: 7 }, Promise::Stop),
            path: "b/k".into(),
            now: Timestamp::from_second(1_790_000_400).unwrap(),
        };
        let left = Duration::from_mins(10);
        // The ID, and what the first read shows.
        for (id, first, refused_id) in [
            (Some("a"), "a", "a"),
            (Some("a"), "b", "a"),
            (Some("a"), "", "a"),
            (None, "a", "a"),
            // The lock is gone, so every other one is tried.
            (None, "", ""),
        ] {
            let refused = RefusedLock::new(id.map(ToOwned::to_owned), left, true);
            let passing = RefusedLock::new(id.map(ToOwned::to_owned), Duration::ZERO, false);
            passing.is(first);
            let (now, later) = (refused.until - Duration::from_millis(1), refused.until);
            assert_eq!(refused.excludes(first, now), first == refused_id);
            for id in ["a", "b"] {
                let is_refused = id == refused_id;
                assert_eq!(refused.excludes(id, now), is_refused, "{first} {id}");
                assert!(!refused.excludes(id, later));
                let lapsed = lapsed(id);
                let failure = || Failure::refusal("S3", "x");
                let no_answer = || Failure::no_answer("S3", "x");
                let (refusal, failed) = (Reason::NotTaken(failure()), Reason::Failure(failure()));
                let silence = Reason::NotTaken(no_answer());
                assert!(failure().is_final() && !no_answer().is_final());
                for (progress, is_repetition, is_repetition_of_passing) in [
                    (Progress::Watches(&lapsed, left), true, true),
                    (Progress::Leaves(&lapsed, &refusal), true, false),
                    (Progress::Leaves(&lapsed, &silence), true, true),
                    (Progress::Leaves(&lapsed, &failed), false, false),
                    (Progress::Took(&lapsed), false, false),
                    (Progress::MayHaveTaken(&lapsed), false, false),
                    (Progress::Gone(&lapsed), false, false),
                    (Progress::Renewed(&lapsed), false, false),
                ] {
                    assert_eq!(refused.was_said(progress), is_refused && is_repetition, "{progress:?}");
                    assert_eq!(passing.was_said(progress), is_refused && is_repetition_of_passing, "{progress:?}");
                }
            }
        }
    }

    #[test]
    fn a_taker_recognizes_its_claim_by_number_and_time() {
        let terms = Terms::new(Duration::from_mins(5)).unwrap();
        let renewal = Renewal { renewed: 1_790_000_000, beat: 7 };
        let own = Claim { by: "https://ci.example/job/8".into(), at: 1_790_000_400, number: 9 };
        let with = |taken| {
            let mut record = Record::new("id", terms, renewal, Promise::Stop);
            record.taken = taken;
            record
        };
        for (taken, expected) in [
            (Some(own.clone()), true),
            // There was no room for it.
            (Some(Claim { by: String::new(), ..own.clone() }), true),
            (Some(Claim { number: 8, ..own.clone() }), false),
            (Some(Claim { at: 1_790_000_401, ..own.clone() }), false),
            (None, false),
        ] {
            let mut claims = OwnClaims::default();
            assert_eq!(claims.of(&with(taken.clone())), None);
            claims.add(own.clone(), Timestamp::from_second(own.at).unwrap());
            assert_eq!(claims.of(&with(taken.clone())), expected.then_some(&own), "{taken:?}");
            // The response to the first claim is missing, so the taker sends another one.
            for (age, is_kept) in [(45, true), (70, true), (71, false)] {
                let next = Claim { at: own.at + age, number: 10, ..own.clone() };
                let mut claims = OwnClaims(claims.0.clone());
                claims.add(next.clone(), Timestamp::from_second(next.at).unwrap());
                assert_eq!(claims.of(&with(taken.clone())).is_some(), expected && is_kept, "{taken:?} {age}");
                assert_eq!(claims.of(&with(Some(next.clone()))), Some(&next));
            }
        }
    }
}
