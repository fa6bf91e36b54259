//! Begins the lease of a run when terraform holds a lock.

use std::io;

use jiff::Timestamp;
use nix::unistd::Pid;

use super::{Blocked, Deadline, Followed, RunLease};
use crate::cleanup::candidate_backends::CandidateBackends;
use crate::cleanup::process_tree::Tree;
use crate::cleanup::working_directory::Within;
use crate::crash_point;
use crate::lease::obstacle::LeaseObstacle;
use crate::lease::record::Promise;
use crate::lock::location::LockLocation;
use crate::supervise::keeper::{self, Orders};
use crate::sys::boot_clock;
use crate::sys::process::{Process, ProcessHandle};
use crate::terraform::log::{Log, RecordedLock, UnnamedLock};
use crate::trace::trace;

impl RunLease {
    /// Looks for a lock that terraform holds, and starts the lease of the first one. Ends the lease when the log shows
    /// that this lock is gone. Call this when the log was read.
    pub(crate) fn follow(
        &mut self,
        log: &Log,
        candidates: impl FnOnce() -> CandidateBackends,
        tree: &Tree,
    ) -> Followed {
        if self.is_over {
            return Followed::Nothing;
        }
        if let Some(orders) = &self.orders {
            let is_gone = !log.unreleased().any(|lock| lock.id == orders.lock);
            if is_gone && self.stopped.is_none() {
                trace!("the lock of the lease is gone");
                self.let_go();
            }
            return Followed::Nothing;
        }
        let Some(lock) = log.unreleased().find(|lock| lock.is_in_use()) else {
            return unnamed_obstacle(log, candidates)
                .map_or(Followed::Nothing, |obstacle| self.note_obstacle(None, obstacle));
        };
        match self.begin(lock, &candidates(), tree) {
            Ok(()) => Followed::Begun,
            Err(obstacle) => self.note_obstacle(Some(&lock.id), obstacle),
        }
    }

    /// Notes that a lock has no lease because of `obstacle`, and gives up in the end. `lock` is its ID, or `None` if
    /// the log does not name it.
    pub(super) fn note_obstacle(&mut self, lock: Option<&str>, obstacle: LeaseObstacle) -> Followed {
        let now = boot_clock::now();
        let is_same = |blocked: &Blocked| blocked.lock.as_deref() == lock && blocked.obstacle == obstacle;
        let since = self.blocked.take().filter(is_same).map_or(now, |blocked| blocked.since);
        if !obstacle.is_given_up(now.saturating_sub(since)) {
            self.blocked = Some(Blocked { lock: lock.map(ToOwned::to_owned), obstacle, since });
            return Followed::Nothing;
        }
        trace!("no lease: {obstacle:?}");
        // The run says that it goes on without a lease, so a later lock gets none either.
        self.is_over = true;
        Followed::NoLease(obstacle.to_string())
    }

    /// Returns a lock that terraform holds without a lease, because another lock of the run has the lease or had it.
    /// `None` if there is none, or if one was returned before.
    pub(crate) fn lock_without_lease<'a>(&mut self, log: &'a Log) -> Option<&'a RecordedLock> {
        let leased = self.leased.as_deref().filter(|_| !self.has_reported_lock)?;
        let lock = lock_besides(log, leased);
        self.has_reported_lock = lock.is_some();
        lock
    }

    /// Begins the lease of `lock`.
    ///
    /// # Errors
    /// What keeps it from beginning.
    pub(super) fn begin(
        &mut self,
        lock: &RecordedLock,
        candidates: &CandidateBackends,
        tree: &Tree,
    ) -> Result<(), LeaseObstacle> {
        let group = self.group.ok_or(LeaseObstacle::NoHolder)?;
        let locations = candidates.of(lock);
        if locations.is_empty() {
            return Err(LeaseObstacle::NoPlace(lock.path.clone()));
        }
        // The terraform that holds the lock may be behind a shim, in another group, or of another user (docker, sudo).
        // Then the kernel's signal to the group would not reach it, and the fence would promise too much. If it is not
        // found, for example because it is just starting or ending, the next call looks again. One that has ended
        // meanwhile has no user any more.
        //
        // A script may run several terraforms at the same time. Then it is not known which of them holds the lock, so
        // the exit of the one that is watched does not show that nobody is releasing it.
        let logging = tree.outermost_logging();
        let is_reached = |process: &&Process| process.group == group && process.has_our_user();
        let has_ended = |process: &Process| {
            Process::look_up(process.pid).is_none_or(|now| now.start != process.start || now.is_dead())
        };
        // A process that terraform has just forked counts as one that logs until it executes another program.
        let is_alone = logging.iter().filter(|process| !has_ended(process)).count() <= 1;
        let is_reached = logging.iter().all(|process| is_reached(&process) || has_ended(process));
        let holder = logging.first().ok_or(LeaseObstacle::NoHolder)?;
        let (pid, start) = (holder.pid, holder.start);
        self.terraform = Some(ProcessHandle::open(pid).map_err(|error| unwatchable(&error))?);
        if !is_reached || !is_alone {
            trace!("the lease promises nothing; all in the group: {is_reached}; one terraform: {is_alone}");
            self.take_down();
        }
        if let Err(error) = self.arm(group, tree) {
            trace!("the fence cannot be armed: {error}");
            self.take_down();
        }
        crash_point::reached("lease: armed the fence");
        self.leased = Some(lock.id.clone());
        let deadline = Deadline::at(boot_clock::now() + self.terms.working_time());
        (self.renewed, self.deadline) = (Some(Timestamp::now()), Some(deadline));
        // Relative paths of the shared files are relative to terraform's working directory.
        let there = Within::enter(&candidates.working_directory);
        let identities = keeper::identities(&lock.id, &locations);
        drop(there);
        self.orders = Some(Orders {
            lock: lock.id.clone(),
            places: locations.iter().map(LockLocation::to_json).collect(),
            identities,
            length: self.terms.length(),
            fence: self.promise,
            may_promise: self.promise == Promise::Stop,
            holder: self.holder.clone(),
            asks: self.asks,
            interrupted: None,
            terraform: pid.as_raw(),
            start,
            may_have_a_record: false,
            withdraws: false,
            directory: candidates.working_directory.clone(),
        });
        self.start_keeper().into_iter().for_each(|pid| tree.exclude(pid));
        crash_point::reached("lease: started the keeper");
        Ok(())
    }

    /// Arms the fence for terraform's group. If the fuse was killed before the lock was taken, the spare one takes its
    /// place first.
    ///
    /// # Errors
    /// As [`Fence::arm`](crate::supervise::fence::Fence::arm) and
    /// [`Fence::rearm`](crate::supervise::fence::Fence::rearm). Nothing is armed then.
    pub(super) fn arm(&mut self, group: Pid, tree: &Tree) -> io::Result<()> {
        let Some(fence) = &mut self.fence else { return Ok(()) };
        match fence.arm(group) {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            armed => return armed,
        }
        trace!("the fuse was killed before it was armed, and another one takes its place");
        fence.rearm()?.into_iter().for_each(|pid| tree.exclude(pid));
        fence.give_kill_pipe()?;
        fence.arm(group)?;
        self.fork_spare().into_iter().for_each(|pid| tree.exclude(pid));
        Ok(())
    }
}

/// Returns the obstacle if the handle of the terraform with the lock cannot be opened. A terraform that has just ended
/// is looked for again, and a descriptor may be free later.
pub(super) fn unwatchable(error: &io::Error) -> LeaseObstacle {
    match error.raw_os_error() {
        Some(libc::ESRCH) => LeaseObstacle::NoHolder,
        Some(libc::EMFILE | libc::ENFILE) => LeaseObstacle::NoDescriptor,
        _ => LeaseObstacle::Unwatchable(error.to_string()),
    }
}

/// Returns the obstacle if terraform holds a lock of the S3 backend that the log does not name. `None` if it holds
/// none.
pub(super) fn unnamed_obstacle(log: &Log, candidates: impl FnOnce() -> CandidateBackends) -> Option<LeaseObstacle> {
    let is_in_use = |lock: &&UnnamedLock| lock.progress.held.is_some() && lock.progress.is_before_unlock();
    let lock = log.unreleased_unnamed().find(is_in_use)?;
    let mut places = candidates().of_unnamed(lock);
    // The local backend's records are the same for every backend, and also if nothing is locked.
    places.retain(|place| place.table.is_some() || place.lock_file);
    let is_of_workspace = lock.is_of_workspace();
    if is_of_workspace && places.is_empty() {
        return None;
    }
    // With a table, the log names the lock when terraform requests the item, after the object.
    let is_final = is_of_workspace || places.iter().all(|place| place.table.is_none());
    Some(LeaseObstacle::Unnamed { program: log.program.as_ref().map(ToString::to_string), is_final })
}

/// Returns a lock that terraform holds, by its log, other than the lock with the ID `leased`. `None` if there is none.
pub(super) fn lock_besides<'a>(log: &'a Log, leased: &str) -> Option<&'a RecordedLock> {
    log.unreleased().find(|lock| lock.is_in_use() && lock.id != leased)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::tests::lease_of_a_stopped_run;
    use super::*;
    use crate::terraform::log::other_versions::tofu_life;
    use crate::terraform::log::tests::{ID, lock_line};

    /// Returns the backends of a run whose S3 backend, at the place of [`tofu_life`], has these settings.
    fn candidates(settings: &str) -> CandidateBackends {
        let json = format!(
            r#"{{"version":3,"backend":{{"type":"s3","config":{{"bucket":"bkt","key":"dir/prod.tfstate"{settings}}}}}}}"#
        );
        let backend = crate::terraform::backend::CachedBackend::parse(json.as_bytes());
        CandidateBackends {
            directories: vec![crate::terraform::data_directory::DataDirectory {
                backend,
                workspace: "default".to_owned(),
            }],
            workspaces: vec!["default".to_owned()],
            any_workspace: false,
            data_directory: "/x/.terraform".to_owned(),
            working_directory: "/x".into(),
        }
    }

    #[test]
    fn a_lock_that_the_log_does_not_name_has_no_lease_unless_the_log_may_name_it_later() {
        let (table, file) = (r#","dynamodb_table":"locks""#, r#","use_lockfile":true"#);
        let both = format!("{table}{file}");
        let read = |lines: &[String]| {
            let mut log = Log::default();
            log.read(lines.concat().as_bytes());
            log
        };
        let life = tofu_life(true);
        let program = Some("OpenTofu 1.11.5".to_owned());
        let unnamed = |is_final| Some(LeaseObstacle::Unnamed { program: program.clone(), is_final });
        for (steps, settings, expected) in [
            // The object was requested, and then put.
            (2, file, None),
            (3, file, unnamed(true)),
            (3, &both, unnamed(false)),
            // The request for the item names both parts.
            (4, &both, None),
        ] {
            let seen = unnamed_obstacle(&read(&life[..steps]), || candidates(settings));
            assert_eq!(seen, expected, "{steps} {settings}");
        }
        let of_workspace: Vec<String> = [
            "[INFO]  OpenTofu version: 1.6.2",
            "[TRACE] backend/local: requesting state lock for workspace \"default\"",
            "[TRACE] backend/local: reading remote state for workspace \"default\"",
        ]
        .map(|line| format!("2026-11-23T01:46:07.000Z {line}\n"))
        .into();
        let program = Some("OpenTofu 1.6.2".to_owned());
        let held = Some(LeaseObstacle::Unnamed { program, is_final: true });
        for (steps, settings, expected) in [(2, table, None), (3, table, held.clone()), (3, file, held), (3, "", None)]
        {
            let seen = unnamed_obstacle(&read(&of_workspace[..steps]), || candidates(settings));
            assert_eq!(seen, expected, "{steps} {settings}");
        }
    }

    #[test]
    fn that_a_run_has_no_lease_is_said_once_and_each_lock_has_its_own_time() {
        let mut lease = lease_of_a_stopped_run();
        assert_eq!(lease.note_obstacle(Some("a"), LeaseObstacle::NoHolder), Followed::Nothing);
        let since = |lease: &RunLease| lease.blocked.as_ref().unwrap().since;
        let first = since(&lease);
        assert_eq!(lease.note_obstacle(Some("a"), LeaseObstacle::NoHolder), Followed::Nothing);
        assert_eq!(since(&lease), first);
        while boot_clock::now() == first {}
        assert_eq!(lease.note_obstacle(Some("b"), LeaseObstacle::NoHolder), Followed::Nothing);
        assert!(since(&lease) > first);
        lease.blocked.as_mut().unwrap().since = Duration::ZERO;
        let Followed::NoLease(reason) = lease.note_obstacle(Some("b"), LeaseObstacle::NoHolder) else { panic!() };
        assert_eq!(reason, LeaseObstacle::NoHolder.to_string());
        assert!(lease.is_over);
        // The next call of `follow` does nothing, whatever the log shows.
        let candidates = || unreachable!("nothing is looked for");
        let tree = Tree::new("run").unwrap().0;
        assert_eq!(lease.follow(&Log::default(), candidates, &tree), Followed::Nothing);
    }

    #[test]
    fn a_terraform_that_has_just_ended_is_looked_for_again() {
        assert_eq!(unwatchable(&io::Error::from_raw_os_error(libc::ESRCH)), LeaseObstacle::NoHolder);
        for error in [libc::EMFILE, libc::ENFILE] {
            assert_eq!(unwatchable(&io::Error::from_raw_os_error(error)), LeaseObstacle::NoDescriptor);
        }
        for error in [libc::ENOSYS, libc::EPERM] {
            let error = io::Error::from_raw_os_error(error);
            assert_eq!(unwatchable(&error), LeaseObstacle::Unwatchable(error.to_string()));
        }
    }

    #[test]
    fn only_a_lock_that_is_held_beside_the_one_with_the_lease_has_none() {
        const OTHER: &str = "0f0e0d0c-0000-4000-8000-000000000001";
        const REQUESTED: &str = "Attempting to lock remote state (DynamoDB only)...";
        let mut log = Log::default();
        for (second, message, id, expected) in [
            (1, REQUESTED, ID, None),
            (2, "Locked remote state (DynamoDB only)", ID, None),
            (3, REQUESTED, OTHER, None),
            (4, "Locked remote state (DynamoDB only)", OTHER, Some(OTHER)),
            (5, "Attempting to unlock remote state (DynamoDB only)...", OTHER, None),
            (6, "Unlocked remote state (DynamoDB only)", OTHER, None),
        ] {
            log.read(lock_line(second, message, id, id).as_bytes());
            assert_eq!(lock_besides(&log, ID).map(|lock| lock.id.as_str()), expected, "{second}");
        }
    }
}
