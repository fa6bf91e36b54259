//! One attempt to release a lock: reads, judges and deletes its parts.

use std::cell::Cell;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::consent::global_table;
use super::context::{LATE_REQUEST_WINDOW, ReleaseContext, SERVICE_TIMEOUT};
use super::quiet::wait_for_quiet;
use super::retry::unreached;
use super::services::{POLL_INTERVAL, Services, no_lock, nothing_if_excluded, remaining, within};
use crate::aws::credentials::Purpose;
use crate::aws::failure::Failure;
use crate::crash_point;
use crate::lease::record::Claim;
use crate::lock::digest;
use crate::lock::digest::Comparison;
use crate::lock::location::LockLocation;
use crate::lock::outcome::{Outcome, Released, Write};
use crate::lock::proof::{Match, judge};
use crate::lock::release_step::{
    COMES_AND_GOES, ItemHistory, Judged, PartRead, PartStep, PartsLook, Step, is_released_by_another, may_item_follow,
    must_be_read_again, needs_quiet, still_to_do,
};
use crate::lock::s3::ObjectKey;
use crate::lock::stores::{Removed, StoreKey};
use crate::terraform::log::RecordedLock;
use crate::trace::trace;

/// The time limit for the last look at the parts whose deletes got no response in time
/// ([`Attempt::look_after_failure`]).
const LAST_LOOK_TIMEOUT: Duration = Duration::from_secs(5);

/// The time limit for checking the digest of a state after a release. The lock is already deleted then, and the result
/// is only added to the report.
const DIGEST_TIMEOUT: Duration = Duration::from_secs(10);

/// The maximum number of calls of [`wait_for_quiet`] in one attempt. Another wait is needed if the lock was absent
/// during the previous wait and exists again.
const MAX_QUIET_WINDOWS: u32 = 3;

/// The state of one release, which may need several calls of [`Attempt::go`].
pub(super) struct Attempt<'a> {
    pub(super) recorded: &'a RecordedLock,
    pub(super) location: &'a LockLocation,
    pub(super) release_context: &'a ReleaseContext,
    /// How long to retry a service that fails, counted from `begun`.
    pub(super) limit: Duration,
    /// Whether a part was found that belongs to the run.
    pub(super) is_found: &'a Cell<bool>,
    pub(super) purpose: Purpose,
    pub(super) begun: Instant,
    /// Whether new credentials were already requested, because a service reported that the old ones had expired.
    pub(super) renewed: bool,
    /// The parts that were found and belonged to the run.
    pub(super) found: Vec<StoreKey>,
    /// Those of them that a delete request of this release may have deleted.
    pub(super) asked_to_go: Vec<StoreKey>,
    /// Those of them for which it is not known whether the latest delete request has deleted them.
    pub(super) unconfirmed: Vec<StoreKey>,
    pub(super) created: Option<jiff::Timestamp>,
    /// Whether this release has deleted at least one part.
    pub(super) deleted: bool,
    /// Whether the item has waited for the object ([`Judged::Waits`]).
    pub(super) has_waited: bool,
    /// The claim of another host that was deleted with a part.
    pub(super) claim: Option<Claim>,
    /// The result of the wait for a write. `None` until [`wait_for_quiet`] has returned.
    pub(super) write: Option<Write>,
    /// Whether a delete needs no further consent: the table is not a global table, or the user has set
    /// `TFW_RELEASE=auto`.
    pub(super) agreed: bool,
}

impl Attempt<'_> {
    /// Makes one attempt. Each attempt connects again, because the cause of an earlier failure may be fixed by then.
    /// The caller may retry after a [`Failure`] that is not final.
    pub(super) async fn go(&mut self) -> Result<Outcome, Failure> {
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
    pub(super) async fn look_after_failure(&mut self, failure: &Failure) -> Option<Released> {
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
                needs_quiet: self.write.is_none() && needs_quiet(self.recorded, self.release_context.late_writes),
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
