//! Releases a lock. Each part of the lock is read, judged and deleted separately. Each delete is conditional: the part
//! must still be exactly what was read.
//!
//! The DynamoDB part is deleted first and the `.tflock` object last. Terraform acquires the parts in the reverse order,
//! so no other run can get only one of them. `tf` tries both deletes even if one of them fails.
//!
//! If the item has the record of a lease, the item is read first, but deleted last, and only if the object is gone: the
//! record permits any host to take the lock over if this release gets no further. Terraform's own unlock uses this
//! order too. Another terraform that requests the lock between the two deletes gets the object, is refused the item,
//! and deletes its object again. It would also have been refused before the release.
//!
//! A terraform that died may have left two kinds of requests in flight:
//!
//! - A *lock request* without a response can land after `tf` has read the location. So `tf` keeps searching for an
//!   absent part, for [`LATE_REQUEST_WINDOW`].
//! - A *write* of the state, or a delete by terraform's own unlock, is unconditional. It would overwrite the state of
//!   the next holder or delete its lock. So before its first delete, `tf` waits until everything that such a request
//!   would change has stayed unchanged for [`quiet_window`](super::release_step::quiet_window).
//!
//! A single response proves nothing, because a proxy or a captive portal may have sent it. A response that the service
//! cannot have sent is an error ([`dynamodb`], [`s3`]). A lock that the run held counts as absent only if two reads in
//! a row do not find it. A delete counts as successful only if a read after the delete does not find the lock.

use std::cell::Cell;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::digest::Comparison;
use super::leased::StoredPart;
use super::location::LockLocation;
use super::outcome::{Because, Outcome, Released, Write};
use super::proof::{Match, Run, judge, judge_unnamed};
use super::reached::Reached;
use super::release_step::{
    COMES_AND_GOES, ItemHistory, Judged, Look, PartRead, PartStep, PartsLook, QuietStep, QuietWait, Step,
    is_released_by_another, may_item_follow, must_be_read_again, needs_quiet, quiet_window, still_to_do,
};
use super::stores::{Removed, StoreKey, StoredLock, Stores};
use crate::aws::connect;
use crate::aws::credentials::Purpose;
use crate::aws::failure::{Cause, Failure};
use crate::aws::settings::Unreachable;
use crate::console::visible;
use crate::lease::record::Claim;
use crate::lock::dynamodb::ItemKey;
use crate::lock::s3::ObjectKey;
use crate::lock::{digest, dynamodb, s3};
use crate::settings::release_is_asked_for;
use crate::sys::connections::StillSending;
use crate::terraform::lock_info::{LockInfo, is_lock_id};
use crate::terraform::log::{LockParts, RecordedLock, UnnamedLock};
use crate::terraform::logged_lock::Phase;
use crate::trace::trace;
use crate::{console, crash_point};

/// How long to keep searching for a lock that was requested, but that no read has found.
const LATE_REQUEST_WINDOW: Duration = Duration::from_secs(5);

/// How long to retry a service that fails or does not respond, when the lock of a run must be released. It is not
/// longer than a person would wait.
pub(crate) const SERVICE_TIMEOUT: Duration = Duration::from_secs(20);

/// Like [`SERVICE_TIMEOUT`], but for a request that only serves an explanation, or for a lock that most likely does not
/// exist.
pub(crate) const EXPLANATION_TIMEOUT: Duration = Duration::from_secs(3);

/// The reason if the run's own lock was not found within [`EXPLANATION_TIMEOUT`].
const SILENT: &str = "the lock service did not answer in time";

/// The time limit for the last look at the parts whose deletes got no response in time
/// ([`Attempt::look_after_failure`]).
const LAST_LOOK_TIMEOUT: Duration = Duration::from_secs(5);

/// The time that must be left for another attempt. Within less, most services cannot be read and changed.
const MIN_ATTEMPT_TIMEOUT: Duration = Duration::from_secs(1);

/// The time limit for checking the digest of a state after a release. The lock is already deleted then, and the result
/// is only added to the report.
const DIGEST_TIMEOUT: Duration = Duration::from_secs(10);

/// The maximum time between two attempts.
const MAX_RETRY_INTERVAL: Duration = Duration::from_secs(4);

/// The maximum time of a [`QuietWait`], in windows. There is a limit because a process may keep writing the state
/// without a lock.
const MAX_QUIET_TIMEOUT_IN_WINDOWS: u32 = 6;

/// The maximum number of times that one attempt begins a [`QuietWait`]. Another wait is needed if the lock was absent
/// during the previous wait and exists again.
const MAX_QUIET_WINDOWS: u32 = 3;

/// The time between two reads of the same location, and between the first two attempts.
const POLL_INTERVAL: Duration = Duration::from_millis(250);

/// What is known about the run whose lock must be released.
#[derive(Clone, Debug)]
pub(crate) struct ReleaseContext {
    /// The facts that decide whether the lock belongs to the run.
    pub(crate) run: Run,
    /// Whether a lock request may still be in flight. That is so only if terraform has just died: a terraform that
    /// exits by itself has received every response.
    pub(crate) request_may_land: bool,
    /// Whether a write request of the run may still be in flight, or a lock request for a lock that is not found.
    pub(crate) write_may_land: bool,
    /// Whether terraform's connections were in the network namespace of this process, so that
    /// [`StillSending`] sees what the kernel still sends for it.
    pub(crate) is_network_shared: bool,
    /// The identities with which the run reached its backends. If a lock is not found with another identity, it may
    /// still exist in the run's account.
    pub(crate) reached: Reached,
}

/// The location of a lock, and clients for its services that are configured by the location's backend.
struct Services<'a> {
    location: &'a LockLocation,
    stores: Stores,
    /// The location of each part of the lock, in the order in which the parts are released.
    parts: Vec<StoreKey>,
}

impl<'a> Services<'a> {
    async fn connect(location: &'a LockLocation, purpose: Purpose) -> Result<Self, Unreachable> {
        let stores = Stores::connect(&location.backend, purpose).await?;
        Ok(Self { location, parts: location.store_keys(&stores), stores })
    }

    /// Reads what is stored at `part` now. `None` if nothing is stored there, or if no lock can exist there.
    async fn read(&self, part: &StoreKey) -> Result<Option<StoredLock>, Failure> {
        nothing_if_excluded(self.stores.read(part).await)
    }

    /// Reads everything that a write of the terraform with the lock `recorded` would change: the state, its digest, and
    /// the parts of the lock. Returns a [`Failure`] also if a part's location holds something that is not a lock.
    async fn look(&self, recorded: &RecordedLock, run: &Run) -> Result<Look, Failure> {
        let state = s3::fingerprint(&self.stores.s3, &self.location.bucket, &self.location.key, false).await?;
        let digest = match &self.location.table {
            Some(table) => nothing_if_excluded(
                dynamodb::digest(&self.stores.dynamodb, ItemKey { table, path: &self.location.lock_path() }).await,
            )?,
            None => None,
        };
        let mut look = Look::of_state(format!("{state:?} {digest:?}"));
        for part in &self.parts {
            let Some(stored) = self.read(part).await? else {
                look.add_part(None);
                continue;
            };
            let Some(info) = stored.info() else {
                return Err(Failure::no_answer(part.service(), &no_lock(part, &stored)));
            };
            look.add_part(Some((stored.text(), &judge(recorded, &info, run))));
        }
        Ok(look)
    }
}

/// Returns `Ok(None)` for a failure that shows that no lock can exist at the location: for example, a table or bucket
/// that does not exist contains nothing. Returns any other result unchanged.
pub(crate) fn nothing_if_excluded<T>(read: Result<Option<T>, Failure>) -> Result<Option<T>, Failure> {
    match read {
        Err(failure) if failure.cause().excludes_locks() => {
            trace!("no lock can be there: {failure}");
            Ok(None)
        }
        read => read,
    }
}

/// Returns the reason for not releasing a lock if `stored`, which was read at `part`, is not a lock.
fn no_lock(part: &StoreKey, stored: &StoredLock) -> String {
    format!("what is stored there is not a lock ({}): {}", part.describe(), stored.describe_no_lock())
}

/// Runs `work` with the timeout `limit`. If `work` times out, returns a [`Failure`] that names `service`.
fn within<T>(
    limit: Duration,
    service: &'static str,
    work: impl Future<Output = Result<T, Failure>>,
) -> impl Future<Output = Result<T, Failure>> {
    let work = Box::pin(work);
    async move {
        let failed = || Failure::no_answer(service, &format!("no answer within {}", length_of_limit(limit)));
        timeout(limit, work).await.unwrap_or_else(|_| Err(failed()))
    }
}

/// Returns the text for a time limit: whole seconds, or milliseconds if it is shorter than 1 s.
fn length_of_limit(limit: Duration) -> String {
    if limit < Duration::from_secs(1) { format!("{} ms", limit.as_millis()) } else { console::length_of_time(limit) }
}

/// Returns how much of `limit` is left, counted from `begun`. The result is at least [`POLL_INTERVAL`], which is enough
/// for one read.
fn remaining(limit: Duration, begun: Instant) -> Duration {
    limit.saturating_sub(begun.elapsed()).max(POLL_INTERVAL)
}

/// The time limit of a release, and the purpose of its credentials.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Effort {
    /// How long to retry a service that fails or does not respond.
    pub(crate) limit: Duration,
    /// What the credentials are for. This decides whether a person may be prompted.
    pub(crate) purpose: Purpose,
}

impl Effort {
    /// For a lock of this run, or for a lock that a person wants to release.
    pub(crate) const WORK: Self = Self { limit: SERVICE_TIMEOUT, purpose: Purpose::Work };

    /// For a lock that is only explained in a message, or that most likely does not exist.
    pub(crate) const EXPLANATION: Self = Self { limit: EXPLANATION_TIMEOUT, purpose: Purpose::Explanation };
}

/// Releases the lock that the log recorded, if it exists and belongs to the run. Failed requests are retried for
/// `limit`. The time for requesting credentials is not included in `limit`.
///
/// With [`Purpose::Explanation`], `limit` includes everything, and a service that does not answer in time is the
/// outcome [`Because::NoAnswer`]. A long wait is not justified, because the lock most likely belongs to another run or
/// does not exist. That changes if the run's own lock is found: from then on, the limit is [`SERVICE_TIMEOUT`].
pub(crate) async fn release(
    recorded: &RecordedLock,
    location: &LockLocation,
    release_context: &ReleaseContext,
    effort: Effort,
) -> Outcome {
    let is_found = Cell::new(false);
    let mut attempts = Box::pin(attempts(recorded, location, release_context, effort, &is_found));
    if effort.purpose == Purpose::Explanation {
        let limited = timeout(effort.limit, attempts.as_mut()).await;
        match limited {
            Ok(outcome) => return outcome,
            Err(_) if !is_found.get() => {
                return Outcome::Kept { reason: SILENT.to_owned(), because: Because::NoAnswer };
            }
            Err(_) => trace!("the lock {} was found, so its release has more time", recorded.id),
        }
    }
    attempts.await
}

/// Makes the attempts of [`release`], and sets `is_found` as soon as one of them finds the run's own lock.
async fn attempts(
    recorded: &RecordedLock,
    location: &LockLocation,
    release_context: &ReleaseContext,
    Effort { limit, purpose }: Effort,
    is_found: &Cell<bool>,
) -> Outcome {
    // Request the credentials before the time limit of the release begins. They are cached for the attempts below.
    if let Err(unreachable) = credentials(location, limit, purpose).await {
        return unreached(&unreachable);
    }
    let mut attempt = Attempt {
        recorded,
        location,
        release_context,
        limit,
        is_found,
        purpose,
        renewed: false,
        begun: Instant::now(),
        found: Vec::new(),
        asked_to_go: Vec::new(),
        unconfirmed: Vec::new(),
        claim: None,
        created: None,
        deleted: false,
        has_waited: false,
        write: None,
        agreed: release_is_asked_for(),
    };
    let mut interval = POLL_INTERVAL;
    loop {
        match attempt.go().await {
            Ok(outcome) => return outcome,
            Err(failure) => {
                trace!("release of {}: {failure}", recorded.id);
                if !is_retried(&failure, attempt.begun.elapsed() + interval, attempt.limit) {
                    if let Some(released) = attempt.look_after_failure(&failure).await {
                        return Outcome::Released(released);
                    }
                    let part = if attempt.deleted { "; the other part of the lock was released" } else { "" };
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

/// Whether to make another attempt after `failure`. The attempt would begin at `next` after the start of the release.
/// It must have [`MIN_ATTEMPT_TIMEOUT`] at least.
fn is_retried(failure: &Failure, next: Duration, limit: Duration) -> bool {
    !failure.is_final() && next.saturating_add(MIN_ATTEMPT_TIMEOUT) <= limit
}

/// Requests and caches the credentials for `location`. The caller does this before its own time limit begins, because a
/// source of credentials may take longer than a service may. For [`Purpose::Work`], the request is retried for `limit`
/// if the service that provides the credentials does not respond.
async fn credentials(location: &LockLocation, limit: Duration, purpose: Purpose) -> Result<(), Unreachable> {
    let begun = Instant::now();
    let mut interval = POLL_INTERVAL;
    loop {
        match Services::connect(location, purpose).await {
            Err(unreachable) if is_asked_again(&unreachable, purpose, begun.elapsed() + interval, limit) => {
                trace!("no credentials: {unreachable}");
                sleep(interval).await;
                interval = (interval * 2).min(MAX_RETRY_INTERVAL);
            }
            asked => return asked.map(drop),
        }
    }
}

/// Whether to request credentials again after `unreachable`. The request would be sent at `next` after the first one.
fn is_asked_again(unreachable: &Unreachable, purpose: Purpose, next: Duration, limit: Duration) -> bool {
    // Any other source may prompt a person, or lock an account after a few failed requests.
    matches!(unreachable, Unreachable::Silent(_)) && purpose == Purpose::Work && next < limit
}

/// Returns the outcome "not released" for a lock whose services cannot be reached with the settings of its backend.
fn unreached(unreachable: &Unreachable) -> Outcome {
    let because = match unreachable {
        Unreachable::Credentials(_) => Because::NoCredentials,
        unreachable if unreachable.may_pass() => Because::NoAnswer,
        _ => Because::Settings,
    };
    Outcome::Kept { reason: unreachable.to_string(), because }
}

/// Returns what is stored now at `location`, with one entry for each part of a lock. If there are two entries, they may
/// belong to the locks of two different runs. A part that cannot be read is left out. Empty if the reads take longer
/// than [`EXPLANATION_TIMEOUT`].
pub(crate) async fn stored(location: &LockLocation) -> Vec<StoredPart> {
    read_stored(location).await.unwrap_or_default()
}

/// Why a location could not be read.
#[derive(Clone, Debug)]
pub(crate) enum Unread {
    /// The services could not be reached with the settings of the backend. In most cases there are no credentials.
    Unreachable(Unreachable),
    /// A request has failed, or took too long.
    Failed(Failure),
}

/// As [`stored`].
///
/// # Errors
/// [`Unread`] if no part could be read, or if the reads take longer than [`EXPLANATION_TIMEOUT`].
pub(crate) async fn read_stored(location: &LockLocation) -> Result<Vec<StoredPart>, Unread> {
    let look = async {
        let services = Services::connect(location, Purpose::Explanation).await.map_err(Unread::Unreachable)?;
        let reads = services.parts.iter().map(|part| services.stores.read_part(part));
        let (mut parts, mut failed) = (Vec::new(), None);
        for read in futures_util::future::join_all(reads).await {
            match read {
                Ok(part) => parts.extend(part),
                Err(failure) => failed = Some(failure),
            }
        }
        match failed {
            Some(failure) if parts.is_empty() => {
                if failure.cause() == Cause::ExpiredCredentials {
                    connect::forget_credentials(&location.backend);
                }
                Err(Unread::Failed(failure))
            }
            _ => Ok(parts),
        }
    };
    let timed_out = || Unread::Failed(Failure::no_answer("AWS", "the request timed out"));
    timeout(EXPLANATION_TIMEOUT, look).await.unwrap_or_else(|_| Err(timed_out()))
}

/// Compares the state at `location` with its digest once. Returns the comparison if they do not match. `None` if they
/// match, or cannot be read within [`EXPLANATION_TIMEOUT`]. The two also differ for a moment while a run writes them.
/// So the caller must have seen a mismatch before, and must have waited since then.
pub(crate) async fn state_mismatch(location: &LockLocation) -> Option<Comparison> {
    let table = location.table.as_ref()?;
    let look = async {
        let services = Services::connect(location, Purpose::Explanation).await.ok()?;
        digest::compare(&services.stores, ObjectKey { bucket: &location.bucket, key: &location.key }, table).await.ok()
    };
    timeout(EXPLANATION_TIMEOUT, look).await.ok()?.filter(|compared| !compared.fits())
}

/// Whether the lock `id` exists or may exist at `location`. It may exist if the location cannot be read within
/// [`EXPLANATION_TIMEOUT`], or if something that is not a lock is stored there. False only if two reads in a row do not
/// find the lock, because one response proves nothing.
pub(crate) async fn may_exist(location: &LockLocation, id: &str) -> bool {
    let _ = credentials(location, EXPLANATION_TIMEOUT, Purpose::Work).await;
    if may_exist_once(location, id).await {
        return true;
    }
    sleep(POLL_INTERVAL).await;
    may_exist_once(location, id).await
}

/// Reads the lock's location once. Returns true if the lock `id`, or something that is not a lock, is there, or if a
/// read failed or timed out.
async fn may_exist_once(location: &LockLocation, id: &str) -> bool {
    let look = async {
        let Ok(services) = Services::connect(location, Purpose::Work).await else { return true };
        for part in &services.parts {
            if may_be_there(&services.stores.read(part).await, id) {
                return true;
            }
        }
        false
    };
    timeout(EXPLANATION_TIMEOUT, look).await.unwrap_or(true)
}

/// Whether a part of the lock `id` is or may be at a location. `read` is the result of a read of that location.
fn may_be_there(read: &Result<Option<StoredLock>, Failure>, id: &str) -> bool {
    match read {
        Ok(stored) => stored.as_ref().is_some_and(|stored| stored.info().is_none_or(|info| info.id == id)),
        Err(failure) => !failure.cause().excludes_locks(),
    }
}

/// The result of the search for a lock that the log of its run does not name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum IdentifiedLock {
    /// Nothing at the location can be the run's lock.
    None,
    /// The run's lock was found.
    Ours(Box<RecordedLock>),
    /// A lock that may be the run's lock. The text says why that is not certain.
    Possible(Box<LockInfo>, &'static str),
}

/// Searches `location` for the lock `unnamed`, which the log of its run does not name. The search is repeated while a
/// request for the lock may land and, if terraform `died`, while the services do not respond. A lock that the run held
/// counts as absent only if two searches in a row do not find it.
///
/// # Errors
/// Returns a [`Failure`] if the location cannot be read, or if it holds something that is not a lock.
pub(crate) async fn identify_unnamed_lock(
    unnamed: &UnnamedLock,
    location: &LockLocation,
    release_context: &ReleaseContext,
    died: bool,
) -> Result<IdentifiedLock, Failure> {
    let limit = if died { SERVICE_TIMEOUT } else { EXPLANATION_TIMEOUT };
    let _ = credentials(location, limit, Purpose::Work).await;
    let begun = Instant::now();
    let mut search = Search::begin(unnamed, release_context, died, limit);
    loop {
        let found =
            within(remaining(limit, begun), "AWS", look_for(unnamed, location, &release_context.run, died)).await;
        if search.note_result(&found, begun.elapsed()) {
            return found;
        }
        if let Err(failure) = found {
            trace!("a lock that the log does not name: {failure}");
        }
        sleep(POLL_INTERVAL).await;
    }
}

/// Decides when [`identify_unnamed_lock`] is over.
struct Search {
    /// Whether the log shows that the run held the lock.
    was_held: bool,
    /// Whether terraform died.
    died: bool,
    /// How long to search for a lock whose request may land.
    late: Duration,
    /// How long to retry a service that fails.
    limit: Duration,
    /// Whether one more search without a result is enough.
    is_absent: bool,
}

impl Search {
    fn begin(unnamed: &UnnamedLock, release_context: &ReleaseContext, died: bool, limit: Duration) -> Self {
        let was_held = unnamed.progress.held.is_some();
        let may_land = release_context.request_may_land && !was_held;
        let late = if may_land { LATE_REQUEST_WINDOW } else { Duration::ZERO };
        Self { was_held, died, late, limit, is_absent: !was_held }
    }

    /// Notes `found`, the result of the latest search, and returns whether it is the result of all searches. `elapsed` is the time since the
    /// first search began.
    fn note_result(&mut self, found: &Result<IdentifiedLock, Failure>, elapsed: Duration) -> bool {
        match found {
            Ok(IdentifiedLock::None) => std::mem::replace(&mut self.is_absent, true) && elapsed >= self.late,
            Ok(IdentifiedLock::Ours(_) | IdentifiedLock::Possible(..)) => true,
            Err(failure) => {
                let is_retried = !failure.is_final() && self.died && elapsed < self.limit;
                if is_retried {
                    self.is_absent = !self.was_held;
                }
                !is_retried
            }
        }
    }
}

/// Searches once. The parameters and the result are those of [`identify_unnamed_lock`].
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
                return Ok(IdentifiedLock::Ours(Box::new(identified(unnamed, &info, location))));
            }
            Match::Doubt(reason) if run.is_of(&info.who) => found = IdentifiedLock::Possible(Box::new(info), reason),
            Match::Doubt(_) | Match::Anothers => {}
        }
    }
    Ok(found)
}

/// Returns the lock `unnamed` with the data of `info`, which was read at `location`.
fn identified(unnamed: &UnnamedLock, info: &LockInfo, location: &LockLocation) -> RecordedLock {
    let parts = LockParts { s3: location.lock_file, dynamodb: location.table.is_some() };
    let mut lock = RecordedLock::held(info, &location.bucket, &location.key, parts, unnamed.progress.asked);
    lock.progress.held = unnamed.progress.held;
    // `judge` rejects a lock whose `Created` is after its request. The log has the time of the request only in
    // milliseconds, so use the time in the lock if that is later.
    lock.progress.asked = info.created().map_or(unnamed.progress.asked, |created| created.max(unnamed.progress.asked));
    // If only the local backend's records mention the lock, the log does not show any write or delete. So a write or a
    // delete may be in flight.
    lock.progress.phase = if unnamed.is_of_workspace() { Phase::Unlocking } else { unnamed.progress.phase };
    lock
}

/// Searches `location` for a lock that may belong to a run whose log is lost. Only the lock's own JSON connects the
/// lock with the run: it has the same user and host, and it was created after the run began. A lock from another
/// machine with the same name has the same properties, so such a lock is only reported and never released. If
/// `any_user` is true, any user of this host matches, because terraform may have run as another user. `None` if there
/// is no such lock.
///
/// # Errors
/// Returns a [`Failure`] if the location cannot be read, or if it holds something that is not a lock.
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

/// Searches once. The parameters and the result are those of [`suspect`].
async fn look_for_suspect(location: &LockLocation, run: &Run, any_user: bool) -> Result<Option<LockInfo>, Failure> {
    let services = Services::connect(location, Purpose::Work).await.map_err(|error| unreachable(&error))?;
    for part in &services.parts {
        let Some(stored) = services.read(part).await? else { continue };
        let Some(info) = stored.info() else {
            return Err(Failure::no_answer(part.service(), &no_lock(part, &stored)));
        };
        if is_suspect(&info, run, any_user) {
            return Ok(Some(info));
        }
    }
    Ok(None)
}

/// Whether a stored lock may belong to `run`, as [`suspect`] describes it.
fn is_suspect(info: &LockInfo, run: &Run, any_user: bool) -> bool {
    let is_possible = run.is_of(&info.who) || (any_user && run.is_on_its_host(&info.who));
    is_possible && info.created().is_some_and(|created| created >= run.started)
}

fn unreachable(error: &Unreachable) -> Failure {
    match error {
        Unreachable::Silent(why) => Failure::no_answer("AWS", why),
        error => Failure::refusal("AWS", &error.to_string()),
    }
}

/// The state of one release, which may need several calls of [`Attempt::go`].
struct Attempt<'a> {
    recorded: &'a RecordedLock,
    location: &'a LockLocation,
    release_context: &'a ReleaseContext,
    /// How long to retry a service that fails, counted from `begun`.
    limit: Duration,
    /// Whether a part was found that belongs to the run.
    is_found: &'a Cell<bool>,
    purpose: Purpose,
    begun: Instant,
    /// Whether new credentials were already requested, because a service reported that the old ones had expired.
    renewed: bool,
    /// The parts that were found and belonged to the run.
    found: Vec<StoreKey>,
    /// Those of them that a delete request of this release may have deleted.
    asked_to_go: Vec<StoreKey>,
    /// Those of them for which it is not known whether the latest delete request has deleted them.
    unconfirmed: Vec<StoreKey>,
    created: Option<jiff::Timestamp>,
    /// Whether this release has deleted at least one part.
    deleted: bool,
    /// Whether the item has waited for the object ([`Judged::Waits`]).
    has_waited: bool,
    /// The claim of another host that was deleted with a part.
    claim: Option<Claim>,
    /// The result of the wait for a write. `None` until a [`QuietWait`] has ended.
    write: Option<Write>,
    /// Whether a delete needs no further consent: the table is not a global table, or the user has set
    /// `TFW_RELEASE=auto`.
    agreed: bool,
}

impl Attempt<'_> {
    /// Makes one attempt. Each attempt connects again, because the cause of an earlier failure may be fixed by then.
    /// The caller may retry after a [`Failure`] that is not final.
    async fn go(&mut self) -> Result<Outcome, Failure> {
        let services = match Services::connect(self.location, self.purpose).await {
            Ok(services) => services,
            Err(unreachable) => return Ok(unreached(&unreachable)),
        };
        // A lock request may be in flight only if the log shows no response to it, and if terraform did not exit by
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
                    self.write = wait_for_quiet(&services, self.recorded, self.release_context).await?;
                    // The services responded during the wait, so the time limit starts again.
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

    /// Reads, judges and deletes one part after the other. Returns one result for each part, in the same order.
    async fn look(&mut self, services: &Services<'_>) -> Vec<Result<Judged, Failure>> {
        let mut judged = Vec::new();
        for (place, part) in services.parts.iter().enumerate() {
            let to_do = still_to_do(services.parts.len(), &judged);
            let is_last = place + 1 == services.parts.len();
            judged.push(self.part(services, part, to_do, is_last).await);
        }
        self.has_waited |= judged.first() == Some(&Ok(Judged::Waits));
        let mut before = None;
        if let [Ok(Judged::Waits), object] = judged.as_mut_slice()
            && must_be_read_again(object)
        {
            let again = self.part(services, &services.parts[1], 2, true).await;
            before = Some(std::mem::replace(object, again));
        }
        if let [item @ Ok(Judged::Waits), object] = judged.as_mut_slice()
            && may_item_follow(before.as_ref(), object)
        {
            *item = self.part(services, &services.parts[0], 1, true).await;
        }
        self.see_whether_another_has_released(services, &mut judged);
        self.deleted |= judged.iter().any(|part| matches!(part, Ok(Judged::Deleted)));
        judged
    }

    /// If somebody else has released the lock, changes `judged`, the results for its parts, and forgets the deletes of
    /// this release.
    fn see_whether_another_has_released(&mut self, services: &Services<'_>, judged: &mut [Result<Judged, Failure>]) {
        let was_asked_to_go = services.parts.first().is_some_and(|item| self.asked_to_go.contains(item));
        if let [item, object] = judged
            && is_released_by_another(item, ItemHistory { has_waited: self.has_waited, was_asked_to_go })
        {
            if *object == Ok(Judged::Deleted) {
                *object = Ok(Judged::Absent);
            }
            self.asked_to_go.clear();
            self.deleted = false;
        }
    }

    /// Reads the parts once more after `failure`, which ends the release. A delete may have succeeded although its
    /// response, or the read after it, has not arrived in time. Returns the facts about the released lock if this look
    /// shows that each part is gone. `None` if it does not, or if the result of each delete is known.
    async fn look_after_failure(&mut self, failure: &Failure) -> Option<Released> {
        if failure.is_final() || self.unconfirmed.is_empty() {
            return None;
        }
        let services = Services::connect(self.location, self.purpose).await.ok()?;
        let reads = services.parts.iter().map(|part| services.stores.read(part));
        let reads = timeout(LAST_LOOK_TIMEOUT, futures_util::future::join_all(reads)).await.ok()?;
        let parts = services.parts.iter().zip(reads).map(|(part, read)| {
            Judged::of_last_look(nothing_if_excluded(read), &self.recorded.id, self.asked_to_go.contains(part))
                .ok_or_else(|| failure.clone())
        });
        let mut parts: Vec<_> = parts.collect();
        self.see_whether_another_has_released(&services, &mut parts);
        trace!("the last look: {parts:?}");
        let look = PartsLook {
            parts: &parts,
            was_had: self.recorded.progress.held.is_some(),
            is_quiet: self.write.is_some(),
            was_deleted: self.deleted || parts.contains(&Ok(Judged::Deleted)),
            before: None,
            request_may_land: false,
            is_time_up: true,
        };
        match look.combine() {
            Step::Released => Some(self.released(&services).await),
            _ => None,
        }
    }

    /// Returns how long the requests for one of `to_do` parts may take. Each of them has an equal share of the time
    /// that is left. Otherwise a service that does not respond would leave no time for the other one.
    fn share(&self, to_do: usize) -> Duration {
        remaining(self.limit, self.begun) / u32::try_from(to_do.max(1)).unwrap_or(1)
    }

    /// Collects the facts that are reported about the lock after its release.
    async fn released(&self, services: &Services<'_>) -> Released {
        let unseen = services.parts.iter().any(|part| !self.found.contains(part));
        Released {
            created: self.created,
            write: self.write,
            digest_mismatch: digest_mismatch_now(services).await,
            is_partial: self.recorded.progress.held.is_none() && unseen,
            claim: self.claim.clone(),
        }
    }

    /// Reads one part, judges it and deletes it. Starts again if the part changed between the read and the delete. The
    /// requests share the time of the part, which is one of `to_do` parts that are still to do ([`Attempt::share`]). If
    /// the part is not the last one to be looked at, and has the record of the lease, it is not deleted.
    async fn part(
        &mut self,
        services: &Services<'_>,
        part: &StoreKey,
        to_do: usize,
        is_last: bool,
    ) -> Result<Judged, Failure> {
        let begun = Instant::now();
        let mut limit = self.share(to_do);
        let was_asked_to_go = self.asked_to_go.contains(part);
        loop {
            // Both requests run concurrently, so that a slow service causes only one delay.
            let agreed = self.agreed;
            let is_global =
                async { if agreed { Ok(None) } else { global_table(&services.stores, services.location).await } };
            let read = within(remaining(limit, begun), part.service(), services.stores.read_with_lease(part));
            let (stored, global) = tokio::join!(read, within(remaining(limit, begun), "DynamoDB", is_global));
            self.agreed |= global == Ok(None);
            let stored = match stored {
                Err(failure) if failure.cause().excludes_locks() => {
                    trace!("no lock can be in {part:?}: {failure}");
                    return Ok(Judged::Excluded);
                }
                stored => stored?,
            };
            let Some((stored, has_lease)) = stored else {
                trace!("{part:?} holds nothing");
                return Ok(Judged::of_no_part(was_asked_to_go));
            };
            let Some(info) = stored.info() else {
                trace!("{part:?} holds no lock: {}", stored.describe_no_lock());
                return Ok(Judged::NoLock(no_lock(part, &stored)));
            };
            let verdict = judge(self.recorded, &info, &self.release_context.run);
            trace!("{part:?} holds {}: {verdict:?}", info.id);
            if verdict == Match::Ours && !self.is_found.replace(true) && self.limit < SERVICE_TIMEOUT {
                self.limit = SERVICE_TIMEOUT;
                limit = begun.elapsed() + self.share(to_do);
            }
            let read = PartRead {
                info: &info,
                // If the check has failed, that matters only for a part that would be deleted.
                needs_consent: if verdict == Match::Ours { global? } else { None },
                verdict,
                needs_quiet: self.write.is_none() && needs_quiet(self.recorded, self.release_context.write_may_land),
                must_be_last: has_lease && !is_last,
            };
            if let PartStep::Settled(judged) = read.decide() {
                return Ok(judged);
            }
            self.created = info.created();
            crash_point::reached("release: half judged");
            if !self.found.contains(part) {
                self.found.push(part.clone());
            }
            if !self.asked_to_go.contains(part) {
                self.asked_to_go.push(part.clone());
            }
            self.unconfirmed.push(part.clone());
            let removed =
                within(remaining(limit, begun), part.service(), services.stores.remove(part, &stored)).await?;
            self.unconfirmed.retain(|unconfirmed| unconfirmed != part);
            match removed {
                Removed::Gone(claim) => {
                    trace!("deleted {} in {part:?}", info.id);
                    crash_point::reached("release: half deleted");
                    self.claim = claim.or(self.claim.take());
                    return Ok(Judged::Deleted);
                }
                Removed::GoneBefore => {
                    trace!("somebody has deleted {} in {part:?}", info.id);
                    if !was_asked_to_go {
                        self.asked_to_go.retain(|asked| asked != part);
                    }
                    return Ok(Judged::of_no_part(was_asked_to_go));
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
                        return Ok(Judged::Doubt("the lock changed while it was being deleted"));
                    }
                }
            }
        }
    }
}

/// Returns the reason for not deleting a lock in a global table without explicit consent. The condition of the delete
/// is checked only in the region that receives the request. So the delete can remove a lock that was taken a moment ago
/// in another region. `None` if the location has no table, or if the table does not have this problem. If the
/// credentials do not permit this check, the table counts as not global, as nearly all tables are.
pub(crate) async fn global_table(stores: &Stores, location: &LockLocation) -> Result<Option<String>, Failure> {
    let Some(table) = &location.table else { return Ok(None) };
    needs_consent(table, dynamodb::describe(&stores.dynamodb, table).await)
}

/// Does the same as [`global_table`] with `described`, the description of `table`.
fn needs_consent(table: &str, described: Result<dynamodb::Description, Failure>) -> Result<Option<String>, Failure> {
    match described {
        Ok(described) if described.last_writer_wins() => Ok(Some(describe_global_table(table, &described.replicas))),
        Err(failure) if !failure.is_final() => Err(failure),
        Ok(_) | Err(_) => Ok(None),
    }
}

/// Compares the state with its digest after the release. Returns the comparison if they do not match and no run is
/// writing them at this moment. `None` otherwise, and also if they cannot be read: the lock is released in any case, so
/// that is not an error.
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
        // If the second comparison has the same result and no run held the lock in between, the mismatch does not come
        // from a run that has written the state and is about to write the digest.
        (compare().await.as_ref() == Some(&first)).then_some(first)
    };
    timeout(DIGEST_TIMEOUT, look).await.ok()?
}

/// Waits until nothing that a write of the dead terraform would change has changed for the window of a [`QuietWait`],
/// and the kernel of this host has delivered or given up what ended processes had sent. Returns whether the state
/// changed during the wait. `None` if the lock disappears during the wait: then there is no lock to release, and nothing
/// is known about a write.
///
/// # Errors
/// Returns a [`Failure`] if a service does not respond for [`SERVICE_TIMEOUT`], or if something still changes
/// [`MAX_QUIET_TIMEOUT_IN_WINDOWS`] after everything was delivered.
async fn wait_for_quiet(
    services: &Services<'_>,
    recorded: &RecordedLock,
    ReleaseContext { run, is_network_shared, .. }: &ReleaseContext,
) -> Result<Option<Write>, Failure> {
    trace!("waiting for a write that may be on its way");
    // The kernel gives up after four minutes at the latest, so this wait ends.
    let mut sending = StillSending::begin(*is_network_shared);
    let window = quiet_window(sending.is_seen());
    let is_write = recorded.progress.may_be_writing();
    console::say(&if is_write { waiting_for_write(window) } else { waiting_for_undo(window) });
    if !sending.is_seen() {
        console::say(SENDING_IS_UNSEEN);
    } else if sending.has_bytes() {
        console::say(STILL_SENDING);
    }
    let first = within(SERVICE_TIMEOUT, "AWS", services.look(recorded, run)).await?;
    let mut wait = QuietWait::begin(first, window);
    // The first read shows everything that has arrived until it was completed, so the wait begins only now.
    let begun = Instant::now();
    let mut seen = begun;
    let mut delivered = begun;
    loop {
        if delivered.elapsed() > wait.window() * MAX_QUIET_TIMEOUT_IN_WINDOWS {
            return Err(Failure::refusal("S3", "the state keeps changing: something writes it without locking it"));
        }
        sleep(POLL_INTERVAL).await;
        if sending.look() {
            // The last bytes may arrive until this look at the connections, so the wait begins with the read after it.
            delivered = Instant::now();
            wait.begin_anew(quiet_window(sending.is_seen()));
        }
        let now = match within(remaining(SERVICE_TIMEOUT, seen), "AWS", services.look(recorded, run)).await {
            Ok(now) => now,
            // Continue after a failed read. The wait begins anew with the next successful one.
            Err(failure) if !failure.is_final() && seen.elapsed() < SERVICE_TIMEOUT => {
                trace!("not seen: {failure}");
                wait.begin_anew(wait.window());
                continue;
            }
            Err(failure) => return Err(failure),
        };
        seen = Instant::now();
        match wait.see(now, begun.elapsed()) {
            QuietStep::Wait => {}
            QuietStep::Changed => trace!("it landed"),
            QuietStep::Gone => {
                trace!("its lock is gone");
                return Ok(None);
            }
            QuietStep::Quiet(write) => return Ok(Some(write)),
        }
    }
}

/// Returns the reason for not releasing a lock in a global table.
fn describe_global_table(table: &str, replicas: &[String]) -> String {
    format!(
        "DynamoDB table {} is a global table ({}), where a delete can remove the lock of a run in another region\n\
         if every run uses the same region, set TFW_RELEASE=auto",
        visible(table),
        visible(&replicas.join(", "))
    )
}

/// The message that the wait lasts longer, because the kernel has not delivered everything.
const STILL_SENDING: &str = "this host is still sending data of a process that has ended; waiting until it has arrived, \
                             for 4 min at most";

/// The message why the wait is long: `tf` does not see the connections that terraform had.
const SENDING_IS_UNSEEN: &str = "tf cannot see whether the system is still sending data of that terraform, so it waits \
                                 longer than the system sends";

/// Returns the message that a write may be in flight, and that `tf` waits for it.
fn waiting_for_write(quiet: Duration) -> String {
    format!(
        "terraform's last write may still arrive; waiting until nothing has arrived for {} s before releasing the lock",
        quiet.as_secs()
    )
}

/// Returns the message that terraform's delete of one part of its lock may be in flight, and that `tf` waits for it.
fn waiting_for_undo(quiet: Duration) -> String {
    format!(
        "terraform exited while it took the two parts of its lock; waiting until nothing has arrived for {} s before \
         releasing them",
        quiet.as_secs()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::aws::failure::ServiceAnswer;
    use crate::lock::dynamodb::InfoAttribute;
    use crate::terraform::backend::tests::backend;
    use crate::terraform::log::LockIdentity;
    use crate::terraform::log::tests::ID;
    use crate::terraform::logged_lock::Progress;

    const MOMENT: &str = "2026-11-23T01:46:07.593Z";

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn failure(code: &str) -> Failure {
        let answer = ServiceAnswer { code: Some(code), message: Some("no"), status: None };
        Failure::of_answer("DynamoDB", "dynamodb:DescribeTable", answer, "")
    }

    /// Returns a failure for each cause that excludes a lock, for each other final cause, and for each that may pass.
    fn failures() -> (Vec<Failure>, Vec<Failure>, Vec<Failure>) {
        let all = |codes: &[&str]| codes.iter().map(|code| failure(code)).collect::<Vec<_>>();
        let other_key = ServiceAnswer {
            code: Some("ValidationException"),
            message: Some("The provided key element does not match the schema"),
            status: None,
        };
        let mut excluding = all(&["NoSuchBucket", "ResourceNotFoundException"]);
        excluding.push(Failure::of_answer("DynamoDB", "dynamodb:GetItem", other_key, ""));
        let mut passing = all(&["SlowDown", "ExpiredToken"]);
        passing.push(Failure::no_answer("S3", "x"));
        (excluding, all(&["AccessDenied", "InvalidAccessKeyId", "NotImplemented", "InvalidRequest"]), passing)
    }

    fn info(who: &str, created: &str) -> LockInfo {
        LockInfo {
            id: ID.into(),
            operation: "OperationTypeApply".into(),
            who: who.into(),
            version: "1.11.4".into(),
            created: created.into(),
            path: "bkt/k".into(),
        }
    }

    fn run() -> Run {
        Run {
            who: "root@vm".into(),
            who_now: "root@vm.new".into(),
            started: MOMENT.parse().unwrap(),
            disordered: false,
            locking_disabled: false,
            excessive: false,
            program: None,
        }
    }

    #[test]
    fn a_read_that_no_lock_can_answer_is_a_read_of_nothing() {
        let (excluding, others, passing) = failures();
        for failure in excluding {
            assert_eq!(nothing_if_excluded::<()>(Err(failure.clone())), Ok(None), "{failure}");
            assert!(!may_be_there(&Err(failure), ID));
        }
        for failure in others.into_iter().chain(passing) {
            assert_eq!(nothing_if_excluded::<()>(Err(failure.clone())), Err(failure.clone()));
            assert!(may_be_there(&Err(failure.clone()), ID), "what cannot be read may be there: {failure}");
        }
        assert_eq!(nothing_if_excluded(Ok(Some(7))), Ok(Some(7)));
        assert_eq!(nothing_if_excluded::<()>(Ok(None)), Ok(None));
    }

    #[test]
    fn a_lock_may_exist_where_its_id_or_something_that_is_no_lock_is_stored() {
        let stored = |text: &str| Ok(Some(StoredLock::Item(InfoAttribute::Text(text.to_owned()))));
        let with_id = |id: &str| stored(&format!(r#"{{"ID":"{id}"}}"#));
        assert!(may_be_there(&with_id(ID), ID));
        assert!(!may_be_there(&with_id("6e75cb05-d70c-4132-39e0-d2abba1b3077"), ID));
        assert!(may_be_there(&stored("<html>"), ID));
        assert!(may_be_there(&Ok(Some(StoredLock::Item(InfoAttribute::None))), ID));
        assert!(!may_be_there(&Ok(None), ID));
    }

    #[test]
    fn a_release_is_tried_again_within_its_limit_and_only_if_that_can_help() {
        let (excluding, others, passing) = failures();
        for failure in excluding.iter().chain(&others) {
            assert!(!is_retried(failure, Duration::ZERO, seconds(20)), "{failure}");
        }
        for failure in &passing {
            assert!(is_retried(failure, seconds(19), seconds(20)), "{failure}");
            let too_late = seconds(19) + Duration::from_millis(1);
            assert!(!is_retried(failure, too_late, seconds(20)), "{failure}");
        }
    }

    #[test]
    fn what_is_left_of_a_limit_is_always_enough_for_one_read() {
        let begun = Instant::now();
        assert!(remaining(seconds(20), begun) > seconds(19));
        assert_eq!(remaining(Duration::ZERO, begun), Duration::from_millis(250));
    }

    #[test]
    fn a_limit_is_never_said_to_be_0_s() {
        for (milliseconds, expected) in [(250, "250 ms"), (999, "999 ms"), (1000, "1 s"), (7500, "7 s")] {
            assert_eq!(length_of_limit(Duration::from_millis(milliseconds)), expected);
        }
    }

    #[test]
    fn credentials_are_requested_again_only_from_a_service_that_was_silent_and_only_for_work() {
        let silent = || Unreachable::Silent("x".into());
        for (unreachable, purpose, next, expected) in [
            (silent(), Purpose::Work, 19, true),
            (silent(), Purpose::Work, 20, false),
            (silent(), Purpose::Explanation, 0, false),
            (Unreachable::Credentials("x".into()), Purpose::Work, 0, false),
            (Unreachable::Region, Purpose::Work, 0, false),
            (Unreachable::Attribute("x".into()), Purpose::Work, 0, false),
        ] {
            let found = is_asked_again(&unreachable, purpose, seconds(next), seconds(20));
            assert_eq!(found, expected, "{unreachable:?} {purpose:?} {next}");
        }
    }

    #[test]
    fn a_lock_that_cannot_be_reached_is_tried_again_unless_the_backend_must_change() {
        let text = || "x".to_owned();
        for (unreachable, expected) in [
            (Unreachable::Credentials(text()), Because::NoCredentials),
            (Unreachable::Silent(text()), Because::NoAnswer),
            (Unreachable::Region, Because::NoAnswer),
            (Unreachable::Profile(text()), Because::NoAnswer),
            (Unreachable::SharedFiles(text()), Because::NoAnswer),
            (Unreachable::Certificates { path: text(), reason: text() }, Because::NoAnswer),
            (Unreachable::Attribute(text()), Because::Settings),
            (Unreachable::ProfileKey("x"), Because::Settings),
            (Unreachable::Incomplete("x"), Because::Settings),
            (Unreachable::Metadata(text()), Because::Settings),
            (Unreachable::Duration(text()), Because::Settings),
        ] {
            let reason = unreachable.to_string();
            assert_eq!(unreached(&unreachable), Outcome::Kept { reason, because: expected }, "{unreachable:?}");
        }
    }

    fn search(was_held: bool, [may_land, died]: [bool; 2]) -> Search {
        let mut progress = Progress::asked(run().started);
        progress.held = was_held.then_some(run().started);
        let context = ReleaseContext {
            run: run(),
            request_may_land: may_land,
            write_may_land: false,
            is_network_shared: true,
            reached: Reached::default(),
        };
        let unnamed = UnnamedLock { identity: LockIdentity::Workspace("default".into()), progress };
        Search::begin(&unnamed, &context, died, seconds(20))
    }

    #[test]
    fn a_search_without_a_result_is_repeated_until_that_proves_something() {
        let none = Ok(IdentifiedLock::None);
        for (was_held, may_land, first, later) in [
            // The run held the lock: two searches in a row must not find it.
            (true, false, false, true),
            (true, true, false, true),
            // The run requested it, and no request can land any more.
            (false, false, true, true),
            // A request may land for 5 s.
            (false, true, false, false),
        ] {
            let mut search = search(was_held, [may_land, true]);
            assert_eq!(search.note_result(&none, seconds(1)), first, "{was_held} {may_land}");
            assert_eq!(search.note_result(&none, seconds(4)), later, "{was_held} {may_land}");
            assert!(search.note_result(&none, seconds(5)), "{was_held} {may_land}");
        }
    }

    #[test]
    fn a_failed_search_is_repeated_only_after_a_death_and_starts_the_count_again() {
        let none = Ok(IdentifiedLock::None);
        let (excluding, others, passing) = failures();
        for died in [false, true] {
            for failure in excluding.iter().chain(&others) {
                assert!(search(true, [false, died]).note_result(&Err(failure.clone()), seconds(0)));
            }
            for failure in &passing {
                let mut search = search(true, [false, died]);
                assert!(!search.note_result(&none, seconds(1)));
                assert_eq!(search.note_result(&Err(failure.clone()), seconds(2)), !died, "{failure}");
                assert_eq!(search.note_result(&none, seconds(3)), !died, "{failure}: two in a row");
                assert!(search.note_result(&Err(failure.clone()), seconds(20)), "{failure}");
            }
        }
    }

    #[test]
    fn a_lock_that_was_found_ends_the_search() {
        let location = LockLocation {
            backend: backend("{}"),
            bucket: "bkt".into(),
            key: "k".into(),
            table: Some("t".into()),
            lock_file: false,
        };
        let asked = MOMENT.parse().unwrap();
        let unnamed =
            |identity, phase| UnnamedLock { identity, progress: Progress { phase, ..Progress::asked(asked) } };
        let of_object =
            |phase| unnamed(LockIdentity::Object { bucket: "bkt".into(), key: "k".into(), checksum: None }, phase);
        let of_workspace = |phase| unnamed(LockIdentity::Workspace("default".into()), phase);
        let lock = identified(&of_object(Phase::Writing), &info("root@vm", MOMENT), &location);
        assert_eq!((lock.parts, lock.progress.held), (LockParts { s3: false, dynamodb: true }, None));
        for found in [IdentifiedLock::Ours(Box::new(lock)), IdentifiedLock::Possible(Box::new(info("", "")), "x")] {
            assert!(search(true, [true, true]).note_result(&Ok(found), Duration::ZERO));
        }
        // The log of a local backend does not show the end of anything.
        for phase in [Phase::Open, Phase::Writing, Phase::Unlocking] {
            let phase_of = |unnamed| identified(&unnamed, &info("root@vm", MOMENT), &location).progress.phase;
            assert_eq!(phase_of(of_object(phase)), phase);
            assert_eq!(phase_of(of_workspace(phase)), Phase::Unlocking);
        }
        for (created, expected) in [
            ("2026-11-23T01:46:07.5939Z", "2026-11-23T01:46:07.5939Z"),
            ("2026-11-23T01:46:07.5921Z", MOMENT),
            ("no time", MOMENT),
        ] {
            let lock = identified(&of_object(Phase::Open), &info("root@vm", created), &location);
            assert_eq!(lock.progress.asked, expected.parse().unwrap(), "{created}");
        }
    }

    #[test]
    fn a_lock_is_suspect_if_this_user_or_this_host_made_it_after_the_start() {
        for (who, created, of_user, of_host) in [
            ("root@vm", MOMENT, true, true),
            ("root@vm.new", MOMENT, true, true),
            ("alice@vm", MOMENT, false, true),
            ("root@other", MOMENT, false, false),
            ("", MOMENT, false, false),
            ("root@vm", "2026-11-23T01:46:07.592Z", false, false),
            ("root@vm", "no time", false, false),
        ] {
            let lock = info(who, created);
            assert_eq!(is_suspect(&lock, &run(), false), of_user, "{who} {created}");
            assert_eq!(is_suspect(&lock, &run(), true), of_host, "{who} {created}");
        }
    }

    #[test]
    fn only_a_table_whose_writes_overwrite_each_other_needs_consent() {
        let described = |replicas: &[&str], strong| dynamodb::Description {
            keys: vec!["LockID".into()],
            read_capacity: None,
            items: None,
            replicas: replicas.iter().map(|region| (*region).to_owned()).collect(),
            strong,
        };
        for (replicas, strong, expected) in
            [(&[][..], false, false), (&["eu-west-1"], false, true), (&["eu-west-1"], true, false)]
        {
            let consent = needs_consent("locks", Ok(described(replicas, strong))).unwrap();
            assert_eq!(consent.is_some(), expected, "{replicas:?} {strong}");
            assert!(consent.is_none_or(|reason| reason.contains("locks") && reason.contains("eu-west-1")));
        }
        let (excluding, others, passing) = failures();
        for failure in excluding.into_iter().chain(others) {
            assert_eq!(needs_consent("locks", Err(failure.clone())), Ok(None), "{failure}");
        }
        for failure in passing {
            assert_eq!(needs_consent("locks", Err(failure.clone())), Err(failure), "a later attempt can know it");
        }
    }
}
