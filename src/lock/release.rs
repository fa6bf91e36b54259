//! The release of a lock. Each part by itself is read, judged, and deleted on the condition that it is still exactly
//! what was read.
//!
//! The DynamoDB part is deleted first and the `.tflock` object last. Terraform takes them in the reverse order, so no
//! other run can get only one of the parts. Both deletes are tried even if one of them fails.
//!
//! Two things may still be in flight from a terraform that died:
//!
//! - A *lock request* without an answer can land after `tf` has looked. So a part that is absent is looked for again,
//!   for [`LATE_REQUEST_WINDOW`].
//! - A *write*, of the state or by the deletes of the unlock itself, carries no condition and would hit the next
//!   holder. So before the first delete, everything that such a write would change must have been seen unchanged for
//!   [`QUIET_WINDOW`].
//!
//! One response proves nothing, because a proxy or a portal can have sent it. A response that no service sends is an
//! error ([`dynamodb`], [`s3`]). The absence of a lock that was held is believed when two looks in a row have found it.
//! The deletion of a lock is believed when its location was read after the delete.

use crate::aws::settings::Unreachable;
use crate::console;
use crate::console::visible;
use crate::lock::dynamodb::ItemKey;
use crate::lock::s3::ObjectKey;
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

/// How long to look for a lock that was requested and not seen.
const LATE_REQUEST_WINDOW: Duration = Duration::from_secs(5);

/// How long nothing must have changed before the lock of a terraform that died while it was writing is released.
const QUIET_WINDOW: Duration = Duration::from_secs(10);

/// How long to ask a service that fails or is silent, for a lock that a run has left. It is no longer than a person
/// would wait.
pub(crate) const SERVICE_TIMEOUT: Duration = Duration::from_secs(20);

/// The same for an explanation, or for a lock that most likely does not exist.
pub(crate) const EXPLANATION_TIMEOUT: Duration = Duration::from_secs(3);

/// How long the digest of a state may be checked after a release. The lock is gone by then, and the result is an
/// addition to the report.
const DIGEST_TIMEOUT: Duration = Duration::from_secs(10);

/// The longest time between two tries.
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(4);

/// The maximum time to wait for a write: another process may go on writing there without a lock.
const MAX_QUIET_TIMEOUT: Duration = Duration::from_mins(1);

/// The maximum number of waits for a write. A further wait is needed if the lock was gone during the last one, and is
/// there again.
const MAX_QUIET_WINDOWS: u32 = 3;

/// How long to wait between two looks at the same thing.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// What is known of the run whose lock is to be released.
#[derive(Clone, Debug)]
pub(crate) struct ReleaseContext {
    /// The facts by which the lock is judged.
    pub(crate) run: Run,
    /// Whether a request for the lock may still be in flight, because terraform has died just now. A terraform that
    /// exited by itself had its answers.
    pub(crate) request_may_land: bool,
    /// Whether a write of the run may still be in flight.
    pub(crate) write_may_land: bool,
    /// The identities with which the run reached its backends. A lock that is not found with another identity is not
    /// necessarily gone.
    pub(crate) reached: Reached,
}

/// The result of a release.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// No lock of the run exists.
    Absent {
        /// The ID of another run's lock at the same location. `None` if there is none.
        anothers: Option<String>,
        /// Whether no part of a lock can be there: there is no such table or bucket, or the table has another key.
        excluded: bool,
    },
    /// The lock existed, and was released.
    Released(Released),
    /// The lock exists or may exist, and was not released.
    Kept {
        /// The reason, as it is reported.
        reason: String,
        /// What the reason means.
        because: Because,
    },
}

/// Why a lock was not released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Because {
    /// It is not certain that the lock is the run's, or it must not be released. A later try has the same result.
    Doubt,
    /// The user has set that locks are to be named only (`TFW_RELEASE=never`). They stay in the journal until they are
    /// gone.
    Never,
    /// A later try may do better: a process was still running, or what was seen contradicted itself.
    NotYet,
    /// The service did not answer, or could not do it.
    NoAnswer,
    /// No credentials were available. If they are requested again, a person may have to do something for it each time.
    NoCredentials,
    /// The credentials do not permit this action.
    Denied(&'static str),
    /// Its location holds something that is not a lock.
    NoLock,
    /// It was not found, and may have been looked for in another account.
    OtherAccount,
}

impl Outcome {
    /// Returns that the lock is not released, and that no later try would change that.
    pub(crate) fn kept(reason: impl Into<String>) -> Self {
        Self::Kept { reason: reason.into(), because: Because::Doubt }
    }

    /// Returns why the lock was not released. `None` if it was released, or does not exist.
    pub(crate) fn reason(&self) -> Option<&str> {
        match self {
            Self::Kept { reason, .. } => Some(reason),
            Self::Absent { .. } | Self::Released(_) => None,
        }
    }

    /// Returns that the lock is not released now.
    pub(crate) fn later(reason: impl Into<String>) -> Self {
        Self::Kept { reason: reason.into(), because: Because::NotYet }
    }

    /// Returns that the lock is not released because a request failed. `part` is added to the reason.
    fn failed(failure: &Failure, part: &str) -> Self {
        let because = failure.denied().map_or(Because::NoAnswer, Because::Denied);
        Self::Kept { reason: format!("{failure}{part}"), because }
    }
}

/// What is reported about a lock that was released.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Released {
    /// The `Created` of the lock. `None` if it is not a time.
    pub(crate) created: Option<jiff::Timestamp>,
    /// What was seen of a write that was waited for. `None` if none was waited for.
    pub(crate) write: Option<Write>,
    /// The state and its digest, if they do not match any more. `None` if they match, or could not be compared.
    pub(crate) digest_mismatch: Option<Comparison>,
    /// Whether the lock request was not answered, and one of the lock's two parts was never seen. That part may still
    /// land.
    pub(crate) is_partial: bool,
}

/// What became of a write that may have been in flight when terraform died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Write {
    /// The state changed during the wait.
    Landed,
    /// Nothing changed during the whole wait.
    Quiet,
}

/// One location, and the connections to its services as the run reached them.
struct Services<'a> {
    location: &'a LockLocation,
    stores: Stores,
    /// The locations where the parts of the lock can be.
    parts: Vec<StoreKey>,
}

impl<'a> Services<'a> {
    async fn connect(location: &'a LockLocation, purpose: Purpose) -> Result<Self, Unreachable> {
        let stores = Stores::connect(&location.backend, purpose).await?;
        Ok(Self { location, parts: location.store_keys(&stores), stores })
    }

    /// Reads what is stored at `part` now. `None` if nothing is stored there, or if no lock can be there at all.
    async fn read(&self, part: &StoreKey) -> Result<Option<StoredLock>, Failure> {
        nothing_if_excluded(self.stores.read(part).await)
    }

    /// Looks at everything that a write of the terraform that held `recorded` would change.
    async fn look(&self, recorded: &RecordedLock, run: &Run) -> Result<Look, Failure> {
        let state = s3::fingerprint(&self.stores.s3, &self.location.bucket, &self.location.key).await?;
        let digest = match &self.location.table {
            Some(table) => nothing_if_excluded(
                dynamodb::digest(&self.stores.dynamodb, ItemKey { table, path: &self.location.lock_path() }).await,
            )?,
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

/// One look at what a write of a dead terraform would change.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Look {
    /// The state and its digest, as a text that changes with them.
    state: String,
    /// The text at the locations of the lock's parts.
    lock: String,
    /// Whether one of the parts may be the dead terraform's.
    holds: bool,
}

/// Returns `None` for a read that failed because no lock can be there: a table or bucket that does not exist has
/// nothing in it.
fn nothing_if_excluded<T>(read: Result<Option<T>, Failure>) -> Result<Option<T>, Failure> {
    match read {
        Err(failure) if failure.cause().excludes_locks() => {
            trace!("no lock can be there: {failure}");
            Ok(None)
        }
        read => read,
    }
}

/// Returns why a lock is not released if something other than a lock was read.
fn no_lock(part: &StoreKey, stored: &StoredLock) -> String {
    format!("what is stored there is not a lock ({}): {}", part.describe(), stored.describe_no_lock())
}

/// Limits `work` to `limit`. If it gives no answer within that time, it has failed, and the failure names `service`.
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

/// Returns how much of `limit` is left since `begun`. It is at least [`POLL_INTERVAL`], which is enough for one look.
fn remaining(limit: Duration, begun: Instant) -> Duration {
    limit.saturating_sub(begun.elapsed()).max(POLL_INTERVAL)
}

/// How much a release may cost.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    /// How long a service that fails or is silent is asked.
    pub(crate) limit: Duration,
    /// What the credentials are for.
    pub(crate) purpose: Purpose,
}

impl Effort {
    /// For a lock of the run itself, or one that a person has asked for.
    pub(crate) const WORK: Self = Self { limit: SERVICE_TIMEOUT, purpose: Purpose::Work };

    /// For what is only explained, or looked for although it is most likely not there.
    pub(crate) const EXPLANATION: Self = Self { limit: EXPLANATION_TIMEOUT, purpose: Purpose::Explanation };
}

/// Releases the lock that the log recorded, if it exists and is the run's. A service that fails or is silent is asked
/// again for `limit`, not counting the time in which credentials are requested.
pub(crate) async fn release(
    recorded: &RecordedLock,
    location: &LockLocation,
    release_context: &ReleaseContext,
    Effort { limit, purpose }: Effort,
) -> Outcome {
    // Credentials are requested now and remembered, because the time limit of the release begins after that.
    if let Err(unreachable) = credentials(location, limit, purpose).await {
        return unreached(&unreachable);
    }
    let mut attempt = Attempt {
        recorded,
        location,
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
                    connect::forget_credentials(&location.backend);
                }
                sleep(interval).await;
                interval = (interval * 2).min(MAX_RETRY_INTERVAL);
            }
        }
    }
}

/// Requests the credentials for `location` before any time limit begins. They are remembered, and their source may take
/// longer than a service may. For [`Purpose::Work`], a service that gives them and is silent is asked again for
/// `limit`.
async fn credentials(location: &LockLocation, limit: Duration, purpose: Purpose) -> Result<(), Unreachable> {
    let begun = Instant::now();
    let mut interval = POLL_INTERVAL;
    loop {
        match Services::connect(location, purpose).await {
            Err(Unreachable::Silent(why)) if purpose == Purpose::Work && begun.elapsed() + interval < limit => {
                trace!("no credentials: {why}");
                sleep(interval).await;
                interval = (interval * 2).min(MAX_RETRY_INTERVAL);
            }
            asked => return asked.map(drop),
        }
    }
}

/// Returns the outcome for a lock whose services cannot be reached as the backend says.
fn unreached(unreachable: &Unreachable) -> Outcome {
    let because = match unreachable {
        Unreachable::Credentials(_) => Because::NoCredentials,
        unreachable if unreachable.may_pass() => Because::NoAnswer,
        _ => Because::Doubt,
    };
    Outcome::Kept { reason: unreachable.to_string(), because }
}

/// Returns what is stored now at the locations of a lock's parts at `location`: one part, or two, of which the second one
/// may be another run's. Empty if nothing can be read within [`EXPLANATION_TIMEOUT`].
pub(crate) async fn stored(location: &LockLocation) -> Vec<(StoreKey, StoredLock)> {
    let look = async {
        let Ok(services) = Services::connect(location, Purpose::Explanation).await else { return Vec::new() };
        let reads = services.parts.iter().map(|part| services.stores.read(part));
        let read = futures_util::future::join_all(reads).await;
        let read = services.parts.iter().zip(read);
        read.filter_map(|(part, stored)| Some((part.clone(), stored.ok()??))).collect()
    };
    timeout(EXPLANATION_TIMEOUT, look).await.unwrap_or_default()
}

/// Returns the state at `location` and its digest, if they do not match. They are read once, within
/// [`EXPLANATION_TIMEOUT`]. For a caller that has already seen a mismatch, and has waited for a while since. `None` if
/// they match, or cannot be read.
pub(crate) async fn state_mismatch(location: &LockLocation) -> Option<Comparison> {
    let table = location.table.as_ref()?;
    let look = async {
        let services = Services::connect(location, Purpose::Explanation).await.ok()?;
        digest::compare(&services.stores, ObjectKey { bucket: &location.bucket, key: &location.key }, table).await.ok()
    };
    timeout(EXPLANATION_TIMEOUT, look).await.ok()?.filter(|compared| !compared.fits())
}

/// Whether the lock `id` exists at `location`, or may exist. True also if a service did not let it be read within
/// [`EXPLANATION_TIMEOUT`]. Its absence is believed at the second look, because one response proves nothing.
pub(crate) async fn may_exist(location: &LockLocation, id: &str) -> bool {
    let _ = credentials(location, EXPLANATION_TIMEOUT, Purpose::Work).await;
    if may_exist_once(location, id).await {
        return true;
    }
    sleep(POLL_INTERVAL).await;
    may_exist_once(location, id).await
}

/// Does one look of [`may_exist`].
async fn may_exist_once(location: &LockLocation, id: &str) -> bool {
    let look = async {
        let Ok(services) = Services::connect(location, Purpose::Work).await else { return true };
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

/// What is stored at a location, compared with a lock that the log of its run does not name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum IdentifiedLock {
    /// Nothing that could be that lock.
    None,
    /// That lock.
    Ours(Box<RecordedLock>),
    /// A lock that may be that lock, and why that is not certain.
    Possible(Box<LockInfo>, &'static str),
}

/// Looks at `location` for a lock that the log does not name. The look is repeated while a request for the lock may land
/// and, if terraform `died`, while no service answers. The absence of a lock that was held is believed at the second
/// look.
///
/// # Errors
/// Returns a [`Failure`] if a service did not let the lock be read, or if its location holds something that is not a
/// lock.
pub(crate) async fn identify_unnamed_lock(
    unnamed: &UnnamedLock,
    location: &LockLocation,
    release_context: &ReleaseContext,
    died: bool,
) -> Result<IdentifiedLock, Failure> {
    let limit = if died { SERVICE_TIMEOUT } else { EXPLANATION_TIMEOUT };
    let _ = credentials(location, limit, Purpose::Work).await;
    let begun = Instant::now();
    let late = if release_context.request_may_land && unnamed.progress.held.is_none() {
        LATE_REQUEST_WINDOW
    } else {
        Duration::ZERO
    };
    let mut absent = unnamed.progress.held.is_none();
    loop {
        match within(remaining(limit, begun), "AWS", look_for(unnamed, location, &release_context.run, died)).await {
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

/// Does one look of [`identify_unnamed_lock`].
async fn look_for(
    unnamed: &UnnamedLock,
    location: &LockLocation,
    run: &Run,
    died: bool,
) -> Result<IdentifiedLock, Failure> {
    let services = Services::connect(location, Purpose::Work).await.map_err(|error| unreachable(&error))?;
    let mut found = IdentifiedLock::None;
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
                let parts = LockParts { s3: location.lock_file, dynamodb: location.table.is_some() };
                let mut lock =
                    RecordedLock::held(&info, &location.bucket, &location.key, parts, unnamed.progress.asked);
                lock.progress.held = unnamed.progress.held;
                // The lock was created at the moment at which it was requested, and the log has that moment only to the
                // millisecond.
                lock.progress.asked =
                    info.created().map_or(unnamed.progress.asked, |created| created.max(unnamed.progress.asked));
                // If the log shows nothing of the lock but its request, a write or a delete of it may be in flight.
                lock.progress.phase = if unnamed.is_of_workspace() { Phase::Unlocking } else { unnamed.progress.phase };
                return Ok(IdentifiedLock::Ours(Box::new(lock)));
            }
            Match::Doubt(reason) if run.is_of(&info.who) => found = IdentifiedLock::Possible(Box::new(info), reason),
            Match::Doubt(_) | Match::Anothers => {}
        }
    }
    Ok(found)
}

/// Returns a lock at `location` that nothing but its own JSON connects with a run whose log is lost: it has the same user
/// and host, and was created after the run began. A machine with the same name passes the same test, so such a lock is
/// only named, and never released. `any_user`: the run may have worked as another user of this host. `None` if there is
/// no such lock.
///
/// # Errors
/// Returns a [`Failure`] if a service did not let the lock be read, or if its location holds something that is not a
/// lock.
pub(crate) async fn suspect(location: &LockLocation, run: &Run, any_user: bool) -> Result<Option<LockInfo>, Failure> {
    let _ = credentials(location, SERVICE_TIMEOUT, Purpose::Work).await;
    let begun = Instant::now();
    loop {
        match within(remaining(SERVICE_TIMEOUT, begun), "AWS", look_for_suspect(location, run, any_user)).await {
            Err(failure) if !failure.is_final() && begun.elapsed() < SERVICE_TIMEOUT => sleep(POLL_INTERVAL).await,
            results => return results,
        }
    }
}

/// Does one look of [`suspect`].
async fn look_for_suspect(location: &LockLocation, run: &Run, any_user: bool) -> Result<Option<LockInfo>, Failure> {
    let services = Services::connect(location, Purpose::Work).await.map_err(|error| unreachable(&error))?;
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

/// One release, which may need several tries.
struct Attempt<'a> {
    recorded: &'a RecordedLock,
    location: &'a LockLocation,
    release_context: &'a ReleaseContext,
    /// How long to ask a service that fails, counted from `begun`.
    limit: Duration,
    purpose: Purpose,
    begun: Instant,
    /// Whether a service has said that the credentials have expired, and new ones were requested.
    renewed: bool,
    /// The parts that were the run's, and for which a delete was sent.
    asked_to_go: Vec<StoreKey>,
    created: Option<jiff::Timestamp>,
    /// Whether a part was deleted by this release.
    deleted: bool,
    /// What was seen of a write. `None` until the whole [`QUIET_WINDOW`] was waited for.
    write: Option<Write>,
    /// Whether a delete here takes effect everywhere, or was explicitly requested (`TFW_RELEASE=auto`).
    agreed: bool,
}

/// Whether a write of the terraform that held `recorded` may be in flight: of the state, or by an unlock.
/// `write_may_land` says whether any write can be. One unlock is in no log: if the item is another run's, terraform
/// deletes the object that it has just put, without a condition (backend/remote-state/s3/client.go, `Lock`).
fn needs_quiet(recorded: &RecordedLock, write_may_land: bool) -> bool {
    let LockParts { s3, dynamodb } = recorded.parts;
    let may_have_one_part = recorded.progress.held.is_none() && s3 && dynamodb;
    write_may_land && (recorded.progress.may_be_writing() || may_have_one_part)
}

impl Attempt<'_> {
    /// Does one try. Each try connects anew, because what was wrong with the connection may be corrected by then.
    async fn go(&mut self) -> Result<Outcome, Failure> {
        let services = match Services::connect(self.location, self.purpose).await {
            Ok(services) => services,
            Err(unreachable) => return Ok(unreached(&unreachable)),
        };
        // An answer to the lock request shows that no request is in flight any more. So does the exit of a terraform by
        // itself.
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
                    // The service answered all that time, so its time limit begins anew.
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
        // Each part has its share of the time, so that a silent service does not keep the other one from being asked.
        let share = remaining(self.limit, self.begun) / u32::try_from(services.parts.len().max(1)).unwrap_or(1);
        let mut judged = Vec::new();
        for part in &services.parts {
            judged.push(self.part(services, part, share).await);
        }
        self.deleted |= judged.iter().any(|part| matches!(part, Ok(Judged::Deleted)));
        judged
    }

    /// Returns what is reported about the lock when it was released.
    async fn released(&self, services: &Services<'_>) -> Released {
        let unseen = services.parts.iter().any(|part| !self.asked_to_go.contains(part));
        Released {
            created: self.created,
            write: self.write,
            digest_mismatch: digest_mismatch_now(services).await,
            is_partial: self.recorded.progress.held.is_none() && unseen,
        }
    }

    /// Reads one part, judges it and deletes it, and repeats this until one of the three gives a result. All of that
    /// may take as long as `limit`.
    async fn part(&mut self, services: &Services<'_>, part: &StoreKey, limit: Duration) -> Result<Judged, Failure> {
        let begun = Instant::now();
        let remaining = || remaining(limit, begun);
        loop {
            // Both run concurrently, so that a slow service is waited for only once.
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
                // The run's part was here, and a delete was sent for it. It was deleted, although the response to the
                // delete was lost.
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
                        "the service confirmed the delete, but the lock is still there",
                    ));
                }
                Removed::Anothers => {
                    sleep(Duration::from_millis(20)).await;
                    if self.begun.elapsed() > self.limit {
                        return Ok(Judged::Doubt("it changed while it was being deleted"));
                    }
                }
            }
        }
    }
}

/// Returns why no part of a lock is deleted unless that is explicitly requested: its table is a global table. A
/// conditional delete is correct in the region that gets the request, and can still undo a lock that was taken in
/// another region a moment ago. `None` for any other table. If the credentials do not permit the question, the table
/// counts as not global, as nearly all tables are.
async fn global_table(services: &Services<'_>) -> Result<Option<String>, Failure> {
    let Some(table) = &services.location.table else { return Ok(None) };
    match dynamodb::describe(&services.stores.dynamodb, table).await {
        Ok(described) if described.last_writer_wins() => Ok(Some(describe_global_table(table, &described.replicas))),
        Err(failure) if !failure.is_final() => Err(failure),
        Ok(_) | Err(_) => Ok(None),
    }
}

/// The result for one part of a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Judged {
    Absent,
    /// No lock can be there.
    Excluded,
    Deleted,
    Anothers(String),
    /// Something that is not a lock is there. The text says what.
    NoLock(String),
    Doubt(&'static str),
    /// The part is the run's, and a write may be in flight that would hit the next holder.
    NeedsQuiet,
    /// The part is the run's, and is deleted only if that is explicitly requested. The text says why.
    NeedsConsent(String),
}

/// What one look does not prove, with the index of the part: that the part is absent (`None`), or that something which
/// is not a lock is in its place (the text says what).
type Unproven = Vec<(usize, Option<String>)>;

/// One look at the parts of a lock, and what else is known.
struct PartsLook<'a> {
    parts: &'a [Result<Judged, Failure>],
    /// Whether terraform held the lock.
    was_had: bool,
    /// Whether the quiet window is over.
    is_quiet: bool,
    /// Whether a part was deleted in this look or in an earlier one.
    was_deleted: bool,
    /// What the previous look did not prove. `None` if there was none.
    before: Option<&'a Unproven>,
    /// Whether the lock was requested, and the request may land at this moment.
    request_may_land: bool,
    /// Whether the time is up, so that no more looks are to be taken.
    is_time_up: bool,
}

/// What follows from a look.
#[derive(Clone, Debug, PartialEq)]
enum Step {
    /// A part could not be read or deleted.
    Failed(Failure),
    /// A part is the run's, and must not be deleted before the quiet window is over.
    WaitForQuiet,
    /// One look does not prove the result.
    LookAgain(Unproven),
    Kept(Outcome),
    Absent {
        anothers: Option<String>,
        excluded: bool,
    },
    Released,
}

impl PartsLook<'_> {
    /// Combines the results for the parts. The order of the steps is that of what must not be passed over:
    ///
    /// 1. A part that could not be read may hold anything. Nothing is concluded about the lock before that part was
    ///    read.
    /// 2. A part that is the run's and waits for the quiet window keeps the other part from deciding for the whole
    ///    lock.
    /// 3. An absence decides nothing while a request may land. If the lock was held, one absence alone decides nothing:
    ///    a lock must not be forgotten because of one response that no service has sent (a proxy's, a cache's). Nor is
    ///    one look enough to report that something which is not a lock blocks every run.
    /// 4. A doubt about one part keeps the lock from being released, whatever became of the other part.
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
            // A lock that was never known to exist may be absent.
            Judged::Absent if self.was_had || self.is_quiet => Some((number, None)),
            // While its request may land, the lock is looked for again in any case: its table may be about to appear as
            // well.
            Judged::Excluded if self.was_had => Some((number, None)),
            Judged::NoLock(reason) => Some((number, Some(reason.clone()))),
            _ => None,
        });
        unproven.collect()
    }
}

impl Judged {
    /// Returns why the whole lock is not released. `None` if this part does not prevent the release.
    fn keeps(&self) -> Option<Outcome> {
        match self {
            Self::Doubt(reason) => Some(Outcome::kept(*reason)),
            Self::NeedsConsent(reason) => Some(Outcome::later(reason)),
            _ => None,
        }
    }
}

/// Returns the state and its digest, if they do not match and no run is writing them at this moment. If they cannot be
/// read, no mismatch is reported, and the lock is gone in any case.
async fn digest_mismatch_now(services: &Services<'_>) -> Option<Comparison> {
    let LockLocation { bucket, key, table, .. } = services.location;
    let table = table.as_ref()?;
    let compare = || async {
        let compared = digest::compare(&services.stores, ObjectKey { bucket, key }, table).await.ok()?;
        (!compared.fits()).then_some(compared)
    };
    let look = async {
        let first = compare().await?;
        for part in &services.parts {
            if services.stores.read(part).await.ok()?.is_some() {
                return None;
            }
        }
        // The comparison has the same result again, and no run held the lock in between. So no run was between its
        // write of the state and its write of the digest.
        (compare().await.as_ref() == Some(&first)).then_some(first)
    };
    timeout(DIGEST_TIMEOUT, look).await.ok()?
}

/// Waits until nothing that a write of the dead terraform would change has changed for [`QUIET_WINDOW`]. Returns what
/// was seen of the write. `None` if the lock is gone meanwhile: there is no lock to hold back then, and nothing is
/// known of a write.
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
            return Err(Failure::refusal("S3", "the state keeps changing: something writes it without locking it"));
        }
        sleep(POLL_INTERVAL).await;
        let now = match within(remaining(SERVICE_TIMEOUT, seen), "AWS", services.look(recorded, run)).await {
            Ok(now) => now,
            // The next look sees what happens meanwhile.
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

/// Returns why a lock in a global table is not released.
fn describe_global_table(table: &str, replicas: &[String]) -> String {
    format!(
        "DynamoDB table {} is a global table ({}): a delete can remove a lock that another region has just taken; if \
         every run uses the same region, set TFW_RELEASE=auto",
        visible(table),
        visible(&replicas.join(", "))
    )
}

/// Why a lock was not released: one look found it, and the next one did not.
const COMES_AND_GOES: &str = "one read finds it, and the next does not";

/// Reports that a write may be in flight.
fn waiting_for_write(quiet: Duration) -> String {
    format!(
        "terraform's last write may still arrive; waiting until nothing has arrived for {} s before releasing the lock",
        quiet.as_secs()
    )
}

/// Reports that the request which undoes one part of a lock may be in flight.
fn waiting_for_undo(quiet: Duration) -> String {
    format!(
        "terraform ended while it took the two parts of its lock; waiting until nothing has arrived for {} s before \
         releasing them",
        quiet.as_secs()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tests everything that a log can say of a lock, and whether a write can be in flight at all.
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

    /// Returns every result that a part can have.
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

    /// Returns the parts of all locks with one part and with two.
    fn all_parts() -> Vec<Vec<Result<Judged, Failure>>> {
        let one = findings().into_iter().map(|part| vec![part]);
        let two = findings()
            .into_iter()
            .flat_map(|first| findings().into_iter().map(move |second| vec![first.clone(), second]));
        one.chain(two).collect()
    }

    /// Calls `promise` for all parts in all circumstances, with the step that follows.
    fn for_all(promise: impl Fn(&PartsLook<'_>, Step)) {
        for parts in all_parts() {
            for bits in 0..32_u8 {
                let bit = |location: u8| bits & (1 << location) != 0;
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
