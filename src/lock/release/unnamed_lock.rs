//! Finds the lock of a run whose log does not name the lock's ID.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::context::{EXPLANATION_TIMEOUT, LATE_REQUEST_WINDOW, ReleaseContext, SERVICE_TIMEOUT};
use super::retry::credentials;
use super::services::{POLL_INTERVAL, Services, no_lock, remaining, unreachable, within};
use crate::aws::credentials::Purpose;
use crate::aws::failure::Failure;
use crate::lock::location::LockLocation;
use crate::lock::proof::{Match, Run, judge_unnamed};
use crate::terraform::lock_info::{LockInfo, is_lock_id};
use crate::terraform::log::{LockParts, RecordedLock, UnnamedLock};
use crate::terraform::logged_lock::Phase;
use crate::trace::trace;

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

    /// Notes `found`, the result of the latest search, and returns whether it is the result of all searches. `elapsed`
    /// is the time since the first search began.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock::reached::Reached;
    use crate::lock::release::retry::tests::{failures, seconds};
    use crate::lock::release_step::LateWrites;
    use crate::terraform::backend::tests::backend;
    use crate::terraform::log::LockIdentity;
    use crate::terraform::log::tests::ID;
    use crate::terraform::logged_lock::Progress;

    const MOMENT: &str = "2026-11-23T01:46:07.593Z";

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

    fn search(was_held: bool, [may_land, died]: [bool; 2]) -> Search {
        let mut progress = Progress::asked(run().started);
        progress.held = was_held.then_some(run().started);
        let context = ReleaseContext {
            run: run(),
            request_may_land: may_land,
            late_writes: LateWrites::None,
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
}
