//! The lease of one run, as the process sees it that supervises terraform.
//!
//! When the log shows that terraform holds a lock, `tf` arms the fence and starts a keeper. From then on there are two
//! cases:
//!
//! - The fuse is alive. The keeper renews the lease, and tells the fuse until when terraform may work.
//! - The fuse is gone: it has reached its deadline, or was killed. The kernel has stopped terraform. `tf` waits for the
//!   keeper's look at the lock. [`next_step`] decides what follows from it.
//!
//! The guardian holds the same descriptors, except the write end of the kill pipe. After the death of `tf` it starts a
//! keeper of its own. It never continues a stopped terraform: if the fuse dies then, the kernel kills terraform.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::cleanup::candidate_backends::CandidateBackends;
use crate::cleanup::process_tree::{GroupFence, NoFence, Tree};
use crate::cleanup::waiter::Waiter;
use crate::cleanup::working_directory::Within;
use crate::crash_point;
use crate::journal::run_mark::marks_us;
use crate::journal::runs::Journal;
use crate::lease::fence::{
    CleanupPoint, EndReason, FenceStep, LateWrite, Look, Loss, Lost, LostInUnlock, SILENCES_TO_REPLACE_FUSE, StopCause,
    StoppedRun, Trouble, UnlockStep, Withdrawal, are_requests_aborted, ends_at, is_lost_before, is_reason_due,
    late_write, next_step, stop_cause, unlock_step,
};
use crate::lease::notice::{Notice, Provider};
use crate::lease::obstacle::LeaseObstacle;
use crate::lease::record::{Holder, Promise};
use crate::lease::running_time::RunningTime;
use crate::lease::terms::Terms;
use crate::lock::location::LockLocation;
use crate::supervise::fence::{self, EndingFuses, Fence};
use crate::supervise::keeper::{self, Inherited, Keeper, Orders, Report};
use crate::supervise::keepers::{Keepers, News};
use crate::sys::boot_clock;
use crate::sys::connections::{self, Barred};
use crate::sys::detached::Parent;
use crate::sys::process::{Process, ProcessHandle};
use crate::sys::wait::Ended;
use crate::terraform::log::{Log, RecordedLock, UnnamedLock};
use crate::terraform::version::LogDetail;
use crate::time::saturating_add;
use crate::trace::trace;

/// How often to check whether somebody else has continued a terraform that the kernel has stopped.
pub(crate) const STOP_AGAIN_INTERVAL: Duration = Duration::from_millis(20);

/// If every process of the run was stopped, and `tf` is continued, then terraform is continued too, a moment later. So
/// for this time after a SIGCONT, `tf` checks at [`SHORT_STOP_AGAIN_INTERVAL`].
const CONTINUE_WINDOW: Duration = Duration::from_millis(250);
const SHORT_STOP_AGAIN_INTERVAL: Duration = Duration::from_millis(1);

/// What the supervisor must do for the lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum LeaseEffect {
    /// The kernel has stopped terraform. The supervisor takes the terminal back.
    Stopped(StopCause),
    /// Terraform stays stopped for this reason.
    CannotRenew(String),
    /// Terraform can go on. The supervisor gives it the terminal that it had, and then calls [`RunLease::go_on`].
    Continue,
    /// The lock was released, so what is stopped can go on without it. The supervisor gives it the terminal that it
    /// had, and then calls [`RunLease::go_on_without_lock`].
    ContinueWithoutLock,
    /// Terraform must stop gracefully, because its lease cannot be renewed or its lock is gone.
    Interrupt(Trouble),
    /// This host is about to end. This comes once.
    HostEnds(Notice),
    /// Terraform and everything that it has started must be killed.
    Kill(EndReason),
    /// There is no lease. The text says why.
    NoLease(String),
    /// There is a new fuse or keeper with this pid. It does not belong to terraform's tree.
    NewHelper(Pid),
    /// Several keepers in a row have failed. The text says how the last one has.
    KeepersFail(String),
}

/// What [`RunLease::follow`] has found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Followed {
    Nothing,
    /// The lease has begun.
    Begun,
    /// Terraform holds a lock, and there is no lease. The text says why. This comes once.
    NoLease(String),
}

/// An obstacle to the lease of a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Blocked {
    /// The ID of the lock. `None` if the log does not name it.
    lock: Option<String>,
    obstacle: LeaseObstacle,
    /// Since when, on the clock of [`boot_clock::now`].
    since: Duration,
}

/// How far terraform is with the lock of the lease, by its log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LockPhase {
    Held,
    /// It has begun its unlock. `is_end_logged`: the log would show the end of it.
    Unlocking {
        is_end_logged: bool,
    },
    /// It has finished its unlock.
    Gone,
}

impl LockPhase {
    /// Returns the phase of the lock with the ID `id` in `log`.
    pub(crate) fn of(id: &str, log: &Log) -> Self {
        match log.unreleased().find(|lock| lock.id == id) {
            None => Self::Gone,
            Some(lock) if lock.progress.is_before_unlock() => Self::Held,
            Some(_) => Self::Unlocking {
                is_end_logged: matches!(log.log_detail(), Some(LogDetail::Full | LogDetail::HttpTraffic)),
            },
        }
    }
}

/// A deadline of the fuse.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Deadline {
    /// On the clock of [`boot_clock::now`].
    at: Duration,
    /// The same on the host's clock, as it was when the deadline was reported. Terraform's log has times of that clock.
    wall: Timestamp,
}

impl Deadline {
    fn at(at: Duration) -> Self {
        Self { at, wall: wall_time(at) }
    }
}

/// Why the guardian has a keeper of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TfState {
    /// `tf` is suspended, and does the rest when it goes on.
    Suspended,
    /// `tf` is dead.
    Dead,
}

/// A terraform that the kernel has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stopped {
    /// For how long. The time in which the host or `tf` was suspended does not count: the keeper could not look then.
    time: RunningTime,
    /// Whether a new fuse holds the stop pipe.
    is_rearmed: bool,
    /// Whether a new fuse could be made so far.
    can_rearm: bool,
    /// Whether the service has confirmed a renewal since the new fuse was made, or since the last look if none can be
    /// made.
    is_renewed: bool,
    /// How often a person has pressed ^C since.
    interrupts: u8,
    /// What the last look has shown.
    look: Look,
    /// Whether what terraform had sent was broken off.
    is_cut: bool,
}

/// The lease of one run.
#[derive(Debug)]
pub(crate) struct RunLease {
    terms: Terms,
    holder: Holder,
    /// The metadata service to ask whether this host is about to end. `None` if none must be asked.
    asks: Option<Provider>,
    /// What the records of this run promise.
    promise: Promise,
    /// `None` if the run promises nothing, or the fence was taken down.
    fence: Option<Fence>,
    /// The fuses of a fence that was taken down.
    ending_fuses: EndingFuses,
    /// Terraform's process group. `None` until terraform was started.
    group: Option<Pid>,
    /// `None` until the log shows a lock that is held.
    orders: Option<Orders>,
    /// The terraform that holds the lock, or the shim that has started it.
    terraform: Option<ProcessHandle>,
    /// Whether the terraform with the lock has exited, and `terraform` is its shim.
    is_shim_watched: bool,
    /// The leader of `group`, which is a child of `tf`. It is terraform, or a shim that has started it.
    leader: Option<ProcessHandle>,
    keepers: Keepers,
    /// Why the guardian has a keeper. It says nothing in `tf`.
    tf: TfState,
    stopped: Option<Stopped>,
    /// A stopped terraform that can open no connection. `None` if it is not barred.
    barred: Option<Barred>,
    /// When `tf` got the last SIGCONT, on the clock of [`boot_clock::now`]. `None` if it got none.
    continued: Option<Duration>,
    /// How often in a row the fuse in use has not answered its keeper.
    fuse_silences: u32,
    /// When the last confirmed renewal was sent after which terraform may work, or when the lease began: the lock was
    /// the run's later than that. `None` if no lease has begun.
    renewed: Option<Timestamp>,
    /// The last deadline of the fuse that is known. The first renewal may be stored, and its fuse may have a deadline,
    /// although none was reported. `None` if no lease has begun.
    deadline: Option<Deadline>,
    /// Whether this process has killed the fuse, and terraform was not continued since.
    has_killed_fuse: bool,
    /// How the lock was lost.
    loss: Option<Loss>,
    /// Whether the deadline of the lease has stopped terraform, and no keeper has reported the loss of the lock before
    /// that.
    is_stopped_in_time: bool,
    /// Whether terraform was stopped within its unlock when the lock was found gone. Then its own delete may have
    /// arrived.
    is_lost_in_unlock: bool,
    /// How many reads in a row have shown that the lock is lost, since terraform has begun its unlock.
    reads_in_unlock: u32,
    /// Why the last request of the keeper has failed. `None` if it has not failed.
    reason: Option<String>,
    /// The ID of the lock that has the lease, or had it. `None` if no lock had one.
    leased: Option<String>,
    /// Whether a lock without a lease was reported.
    has_reported_lock: bool,
    /// What keeps the lease from beginning. `None` if no lock is held, or if its lease has begun.
    blocked: Option<Blocked>,
    /// The reason that was reported last since terraform was stopped, and when, on the clock of [`boot_clock::now`].
    reported: Option<(String, Duration)>,
    /// Whether the orders have changed since the guardian got them.
    has_new_orders: bool,
    is_over: bool,
    /// Whether terraform was stopped for its lease when it ended.
    was_stopped_at_end: bool,
}

impl RunLease {
    /// Creates the lease of a run that holds no lock yet. `promise` is what this host promises. Call this before the
    /// guardian is forked.
    pub(crate) fn new(terms: Terms, holder: Holder, promise: Promise, asks: Option<Provider>) -> Self {
        let prepared = || Fence::prepare(marks_us).inspect_err(|error| trace!("no fence: {error}")).ok();
        let fence = if promise == Promise::Stop { prepared() } else { None };
        let promise = if fence.is_some() { Promise::Stop } else { Promise::None };
        Self {
            terms,
            holder,
            asks,
            promise,
            fence,
            ending_fuses: EndingFuses::default(),
            group: None,
            orders: None,
            terraform: None,
            is_shim_watched: false,
            leader: None,
            keepers: Keepers::new(terms),
            tf: TfState::Suspended,
            stopped: None,
            barred: None,
            continued: None,
            fuse_silences: 0,
            renewed: None,
            deadline: None,
            has_killed_fuse: false,
            loss: None,
            is_stopped_in_time: false,
            is_lost_in_unlock: false,
            reads_in_unlock: 0,
            reason: None,
            reported: None,
            leased: None,
            has_reported_lock: false,
            blocked: None,
            has_new_orders: false,
            is_over: false,
            was_stopped_at_end: false,
        }
    }

    /// Records that terraform was started in the group `group`.
    pub(crate) fn started(&mut self, group: Pid) {
        (self.group, self.leader) = (Some(group), ProcessHandle::open(group).ok());
    }

    /// Returns the descriptors to wait for: the stop pipe, which is readable when the fuse is gone, and the keeper.
    pub(crate) fn awaited(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let pipe = self.fence.as_ref().filter(|_| self.orders.is_some() && self.stopped.is_none() && !self.is_over);
        pipe.map(|fence| fence.stop_pipe().as_fd()).into_iter().chain(self.keepers.socket())
    }

    /// Returns when to call [`RunLease::step`] at the latest, on the clock of [`boot_clock::now`]. `None` if no time
    /// matters.
    pub(crate) fn deadline(&self) -> Option<Duration> {
        let now = boot_clock::now();
        let is_soon = self.continued.is_some_and(|at| now.saturating_sub(at) < CONTINUE_WINDOW);
        let interval = if is_soon { SHORT_STOP_AGAIN_INTERVAL } else { STOP_AGAIN_INTERVAL };
        let stop_again_at = self.is_stopped().then_some(now + interval);
        self.keepers.restart_at().into_iter().chain(stop_again_at).min()
    }

    /// Notes that `tf` got a SIGCONT.
    pub(crate) fn note_continue(&mut self) {
        self.continued = Some(boot_clock::now());
    }

    /// Whether the kernel has stopped terraform, and it was not continued since.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.is_some() || self.fence.as_ref().is_some_and(|fence| self.orders.is_some() && fence.is_blown())
    }

    /// Returns how the lock was lost. `None` if it was not.
    pub(crate) fn loss(&self) -> Option<&Loss> {
        self.loss.as_ref()
    }

    /// Whether terraform was stopped within its unlock when the lock was found gone, so that it may have released the
    /// lock itself.
    pub(crate) fn is_lost_in_unlock(&self) -> bool {
        self.is_lost_in_unlock
    }

    /// Whether [`RunLease::orders`] have changed since the last call.
    pub(crate) fn has_new_orders(&mut self) -> bool {
        std::mem::take(&mut self.has_new_orders)
    }

    /// Stops terraform's group again, in case somebody else has continued a member of it since the kernel has stopped
    /// it. Returns whether its leader was running. Call this again and again while [`RunLease::is_stopped`].
    pub(crate) fn stop_again(&mut self) -> bool {
        let has_run = self.is_stopped() && self.stop_group_again();
        if has_run && let Some(stopped) = &mut self.stopped {
            // It may have opened a connection.
            stopped.is_cut = false;
        }
        has_run
    }

    /// Whether the fuse is gone. The guardian does not know the rest of [`RunLease::is_stopped`].
    pub(crate) fn is_blown(&self) -> bool {
        self.fence.as_ref().is_some_and(Fence::is_blown)
    }

    /// Does the same as [`RunLease::stop_again`], in the guardian, while `tf` is suspended.
    pub(crate) fn stop_again_as_guardian(&self) {
        if self.is_blown() && self.stop_group_again() {
            trace!("guardian: terraform was continued by another process, and is stopped again");
        }
    }

    fn stop_group_again(&self) -> bool {
        let Some(group) = self.group else { return false };
        let leader = Process::look_up(group);
        let runs = leader.is_some_and(|leader| !matches!(leader.state, 'T' | 't' | 'Z' | 'X'));
        // It is sent whatever the state of the processes is: terraform runs until it arrives, and to look at all of
        // them takes longer than terraform may need for a request. A process that is stopped keeps it, until a SIGCONT
        // discards it.
        let _ = killpg(group, Signal::SIGSTOP);
        runs
    }

    /// Whether terraform may have written its state after its lock was lost. `written` is when it last began to write
    /// it, as its log says. `has_exited`: it was not killed.
    pub(crate) fn late_write(&self, written: Option<Timestamp>, has_exited: bool) -> LateWrite {
        let (renewed, deadline) = (self.renewed, self.deadline.map(|deadline| deadline.wall));
        let is_before = |(loss, deadline)| is_lost_before(loss, deadline);
        let is_lost_before_deadline = self.loss.as_ref().zip(deadline).is_some_and(is_before);
        let is_stopped_in_time = self.is_stopped_in_time;
        late_write(Lost { is_stopped_in_time, is_lost_before_deadline, has_exited, renewed, deadline, written })
    }

    /// Returns what a keeper needs to know. `None` if no lock with a lease is held.
    pub(crate) fn orders(&self) -> Option<&Orders> {
        self.orders.as_ref().filter(|_| !self.is_over)
    }

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
                .map_or(Followed::Nothing, |obstacle| self.is_blocked(None, obstacle));
        };
        match self.begin(lock, &candidates(), tree) {
            Ok(()) => Followed::Begun,
            Err(obstacle) => self.is_blocked(Some(&lock.id), obstacle),
        }
    }

    /// Notes that a lock has no lease because of `obstacle`, and gives up in the end. `lock` is its ID, or `None` if
    /// the log does not name it.
    fn is_blocked(&mut self, lock: Option<&str>, obstacle: LeaseObstacle) -> Followed {
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
    fn begin(&mut self, lock: &RecordedLock, candidates: &CandidateBackends, tree: &Tree) -> Result<(), LeaseObstacle> {
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
        let is_reached = logging.iter().all(|process| is_reached(&process) || has_ended(process));
        let holder = logging.first().ok_or(LeaseObstacle::NoHolder)?;
        let (pid, start) = (holder.pid, holder.start);
        self.terraform = Some(ProcessHandle::open(pid).map_err(|error| unwatchable(&error))?);
        if !is_reached || logging.len() > 1 {
            trace!("the lease promises nothing: terraforms {}, all in the group: {is_reached}", logging.len());
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
    /// As [`Fence::arm`] and [`Fence::rearm`]. Nothing is armed then.
    fn arm(&mut self, group: Pid, tree: &Tree) -> io::Result<()> {
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

    /// Starts a keeper with the orders of `tf`, which is dead or suspended. Only the guardian calls this.
    pub(crate) fn take_over(&mut self, tf: TfState, orders: Option<Orders>, tree: &Tree) {
        self.tf = tf;
        // A pid alone could be that of a later process.
        let terraform = orders.as_ref().map(|orders| Pid::from_raw(orders.terraform));
        let logs = terraform.filter(|terraform| tree.logging().iter().any(|process| process.pid == *terraform));
        self.is_shim_watched = logs.is_none();
        // If it is not found, the keepers watch the leader ([`RunLease::ensure_handle`]).
        self.terraform = logs.and_then(|terraform| ProcessHandle::open(terraform).ok());
        self.orders = orders;
        self.keepers.let_go();
        if let Some(orders) = &mut self.orders {
            // A keeper of `tf` may have stored one since `tf` has sent these orders.
            orders.may_have_a_record = true;
        }
        crash_point::reached("lease: the guardian takes over");
        self.start_keeper();
        crash_point::reached("lease: the guardian started a keeper");
    }

    /// Lets go of the keeper of [`RunLease::take_over`], because `tf` has gone on. Only the guardian calls this.
    pub(crate) fn hand_back(&mut self) {
        self.keepers.let_go();
        (self.orders, self.terraform, self.loss, self.reads_in_unlock) = (None, None, None, 0);
    }

    /// Whether another run is known to hold the lock, or to have claimed it. `phase` as in [`RunLease::step`].
    pub(crate) fn is_known_to_be_lost(&self, phase: impl FnOnce(&str) -> LockPhase) -> bool {
        let is_anothers = self.loss.as_ref().is_some_and(|loss| *loss != Loss::Gone);
        is_anothers && self.orders.as_ref().is_some_and(|orders| phase(&orders.lock) == LockPhase::Held)
    }

    /// Replaces a keeper that has died or does not answer. Only the guardian calls this, after [`RunLease::take_over`].
    /// `phase` as in [`RunLease::step`]. Returns whether the lock is lost and terraform must be killed: it writes its
    /// state even after an interrupt. Until then, it is stopped. A lock that is only gone does not kill it, as under
    /// [`RunLease::step`]; the fuse ends it at its deadline.
    pub(crate) fn step_as_guardian(&mut self, mut phase: impl FnMut(&str) -> LockPhase) -> bool {
        let mut is_lost = false;
        while let Some(news) = self.keepers.hear() {
            trace!("guardian: the keeper: {news:?}");
            match news {
                // If `tf` is dead, terraform is interrupted anyway. If it is suspended, it interrupts terraform when it
                // goes on, because of a notice of its own keeper. Until then, the record must not say that.
                News::Report(Report::Notice(notice)) if self.tf == TfState::Dead => {
                    self.note_notice(notice);
                }
                News::Report(Report::Lost(loss)) => {
                    match self.orders.as_ref().map(|orders| phase(&orders.lock)) {
                        Some(LockPhase::Held) if loss != Loss::Gone => {
                            self.cut_off();
                            is_lost = true;
                        }
                        // What follows terraform in its group, such as a wrapper, needs no lock.
                        Some(LockPhase::Gone) => self.let_go(),
                        // While `tf` is suspended, it decides that itself when it goes on.
                        Some(LockPhase::Unlocking { is_end_logged })
                            if self.tf == TfState::Dead && self.is_unlock_over(Some(&loss), is_end_logged) =>
                        {
                            self.let_go();
                        }
                        _ => {}
                    }
                    self.loss = Some(loss);
                }
                News::Report(Report::NoLease(_)) => {
                    self.keepers.let_go();
                    self.orders = None;
                }
                News::Report(_) | News::Failing(_) => {}
            }
        }
        if self.keepers.is_restart_due() {
            crash_point::reached("lease: the guardian replaces its keeper");
            self.start_keeper();
            crash_point::reached("lease: the guardian replaced its keeper");
        }
        is_lost
    }

    /// Keeps terraform from sending anything more, until it is killed.
    fn cut_off(&self) {
        if let Some(group) = self.group {
            let _ = killpg(group, Signal::SIGSTOP);
        }
        self.abort_requests();
    }

    /// Returns the descriptors that the guardian must keep.
    pub(crate) fn guardian_descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.fence.as_ref().map(Fence::guardian_descriptors).into_iter().flatten()
    }

    /// Makes this the guardian's view of the lease. Call this first in the guardian's process.
    pub(crate) fn become_guardians(&mut self) {
        if let Some(fence) = &mut self.fence {
            fence.become_guardians();
        }
    }

    /// Returns the descriptors that terraform must inherit. Drop them right after terraform was started.
    ///
    /// # Errors
    /// The error of fcntl(2) if there is no free descriptor.
    pub(crate) fn inheritable(&self) -> io::Result<Vec<OwnedFd>> {
        self.fence.as_ref().map_or(Ok(Vec::new()), |fence| fence.inheritable_read_ends().map(Vec::from))
    }

    /// Forks the fuse and its spare. If that fails, this run promises nothing. Returns their pids. They do not belong
    /// to terraform's tree. A process that is not a child of this process has no pid here.
    pub(crate) fn fork_fuse(&mut self, parent: Parent) -> Vec<Pid> {
        let Some(fence) = &mut self.fence else { return Vec::new() };
        match fence.fork_fuse(parent) {
            Ok(fuses) => fuses.into_iter().flatten().collect(),
            Err(error) => {
                trace!("no fuse: {error}");
                (self.fence, self.promise) = (None, Promise::None);
                Vec::new()
            }
        }
    }

    /// Makes sure that there is a handle of the process to watch. Only in the guardian there may be none yet.
    ///
    /// # Errors
    /// If no descriptor is free.
    fn ensure_handle(&mut self) -> io::Result<()> {
        if let (Some(_), None, Some(leader)) = (&self.orders, &self.terraform, &self.leader) {
            self.terraform = Some(leader.try_clone()?);
        }
        Ok(())
    }

    /// Has the keepers watch the shim, if the terraform with the lock has ended and the shim that has started it goes
    /// on. The lock is kept until the shim ends, so its lease is renewed until then. Otherwise, the fuse would stop the
    /// shim.
    ///
    /// # Errors
    /// If no descriptor is free. Nothing has changed then.
    fn watch_shim(&mut self) -> io::Result<()> {
        let (Some(orders), Some(terraform), Some(leader), Some(group)) =
            (&mut self.orders, &self.terraform, &self.leader, self.group)
        else {
            return Ok(());
        };
        if orders.terraform != group.as_raw() && terraform.has_exited() && !leader.has_exited() {
            (self.terraform, self.is_shim_watched) = (Some(leader.try_clone()?), true);
            trace!("the terraform with the lock has ended, and its shim goes on");
            orders.terraform = group.as_raw();
            orders.start = Process::look_up(group).map_or(0, |shim| shim.start);
            self.has_new_orders = true;
        }
        Ok(())
    }

    /// Starts a keeper if a lock is held. Returns its pid. `None` if none was started.
    fn start_keeper(&mut self) -> Option<Pid> {
        if let Err(error) = self.ensure_handle().and_then(|()| self.watch_shim()) {
            // Meanwhile the fuse has its deadline.
            self.keepers.cannot_start(&error);
            return None;
        }
        let (Some(orders), Some(terraform)) = (&self.orders, &self.terraform) else { return None };
        if terraform.has_exited() {
            // A keeper would end at once.
            self.keepers.end();
            return None;
        }
        // A keeper whose records promise nothing must ignore the pipe of a fuse that is gone.
        let fence = self.fence.as_ref().filter(|_| orders.fence == Promise::Stop);
        let kill_write_end = self.fence.as_ref().and_then(Fence::kill_write_end);
        let inherited = Inherited { fence, terraform: terraform.as_fd(), kill_write_end };
        self.keepers.start(orders, &inherited)
    }

    /// Reads what the keeper reports and whether the fuse is gone, and carries out what follows. Returns what the
    /// caller must do. `has_person`: a person can end a stopped run with ^C. `phase` reads the log, and returns how far
    /// terraform is with the lock with an ID.
    pub(crate) fn step(&mut self, has_person: bool, mut phase: impl FnMut(&str) -> LockPhase) -> Vec<LeaseEffect> {
        let mut effects = Vec::new();
        self.ending_fuses.reap();
        if self.is_over || self.orders.is_none() {
            return effects;
        }
        // What a keeper has reported before the end of the fuse was noticed is heard before that is judged: `tf` may
        // have been stopped for hours, and its knowledge of the lease is then that old.
        let is_new_stop = self.stopped.is_none() && self.is_blown();
        if let Some(stopped) = &mut self.stopped
            && stopped.is_rearmed
            && self.fence.as_ref().is_some_and(Fence::is_blown)
        {
            trace!("the new fuse is gone, too");
            (stopped.is_rearmed, stopped.is_renewed) = (false, false);
        }
        while let Some(news) = self.keepers.hear() {
            match news {
                News::Report(report) => {
                    if is_new_stop && self.stopped.is_none() && !comes_before_a_stop(&report) {
                        self.note_stop(&mut effects);
                    }
                    effects.extend(self.heard(report, &mut phase));
                }
                News::Failing(how) => effects.push(LeaseEffect::KeepersFail(how)),
            }
        }
        if is_new_stop && self.stopped.is_none() && !self.is_over {
            self.note_stop(&mut effects);
        }
        if effects.contains(&LeaseEffect::ContinueWithoutLock) {
            // The lease is over, so nothing here ends the run.
            return effects;
        }
        if self.keepers.is_restart_due() {
            crash_point::reached("lease: replaces the keeper");
            effects.extend(self.start_keeper().map(LeaseEffect::NewHelper));
            crash_point::reached("lease: replaced the keeper");
        }
        self.abort_requests_if_due();
        effects.extend(self.step_while_stopped(has_person));
        effects.extend(self.reason_to_report().map(LeaseEffect::CannotRenew));
        effects
    }

    /// Notes that the fuse is gone and the kernel has stopped terraform. `effects` are those of the reports from before
    /// that.
    fn note_stop(&mut self, effects: &mut Vec<LeaseEffect>) {
        trace!("the fuse is gone, and terraform is stopped");
        crash_point::reached("lease: knows of the stop");
        // Then terraform does not go on, and what has stopped it does not matter.
        let is_to_be_killed = effects.iter().any(|effect| matches!(effect, LeaseEffect::Kill(_)));
        self.stopped = Some(Stopped {
            time: RunningTime::since(boot_clock::now()),
            is_rearmed: false,
            can_rearm: true,
            is_renewed: false,
            interrupts: 0,
            look: if is_to_be_killed { Look::Lost } else { Look::Unknown },
            is_cut: false,
        });
        self.reported = None;
        let cause = stop_cause(self.has_killed_fuse, boot_clock::now(), self.deadline.map(|deadline| deadline.at));
        self.is_stopped_in_time = cause == StopCause::Deadline && self.loss.is_none();
        if !is_to_be_killed {
            effects.push(LeaseEffect::Stopped(cause));
        }
        self.keepers.hurry();
    }

    /// Returns the reason why a stopped terraform cannot go on, if it must be reported now.
    fn reason_to_report(&mut self) -> Option<String> {
        let (_, reason) = (self.stopped.as_ref()?, self.reason.as_ref()?);
        let now = boot_clock::now();
        let reported = self.reported.as_ref().map(|(reason, at)| (reason.as_str(), now.saturating_sub(*at)));
        if !is_reason_due(reported, reason) {
            return None;
        }
        self.reported = Some((reason.clone(), now));
        Some(reason.clone())
    }

    /// Returns why the last request of the keeper has failed. `None` if it has not failed.
    pub(crate) fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }

    /// Ends the lease of a lock that terraform has released. If what runs on is stopped, the caller must continue it.
    fn released(&mut self) -> Option<LeaseEffect> {
        if self.stopped.is_some() {
            return Some(LeaseEffect::ContinueWithoutLock);
        }
        self.let_go();
        None
    }

    /// Continues what is stopped after [`LeaseEffect::ContinueWithoutLock`]. Returns false if nothing is.
    pub(crate) fn go_on_without_lock(&mut self) -> bool {
        let is_stopped = self.stopped.is_some();
        if is_stopped {
            self.is_stopped_in_time = false;
            self.let_go();
        }
        is_stopped
    }

    /// Whether the terraform with the lock has exited.
    fn has_holder_exited(&self) -> bool {
        self.is_shim_watched || self.terraform.as_ref().is_some_and(ProcessHandle::has_exited)
    }

    /// Counts a read that shows the `loss` of a lock that terraform has begun to release, and returns whether the
    /// unlock is over. If one more read decides that, it comes at once: in an outage, the fuse might stop what runs on.
    fn is_unlock_over(&mut self, loss: Option<&Loss>, is_end_logged: bool) -> bool {
        // A claimed lock is still there, so the request that deletes it may be on its way.
        if matches!(loss, Some(Loss::Claimed(_))) {
            self.reads_in_unlock = 0;
            return false;
        }
        self.reads_in_unlock = self.reads_in_unlock.saturating_add(1);
        let holder = self.orders.as_ref().and_then(|orders| Process::look_up(Pid::from_raw(orders.terraform)));
        let step = unlock_step(LostInUnlock {
            is_end_logged,
            has_exited: self.has_holder_exited(),
            // It is stopped by ^Z, too.
            is_stopped: self.is_stopped() || holder.is_some_and(|holder| matches!(holder.state, 'T' | 't')),
            reads: self.reads_in_unlock,
        });
        match step {
            UnlockStep::ReadAgain => self.keepers.hurry(),
            // What was read so far says nothing.
            UnlockStep::Fenced => self.reads_in_unlock = 0,
            UnlockStep::Over => {}
        }
        step == UnlockStep::Over
    }

    /// Notes what the keeper reports.
    fn heard(&mut self, report: Report, phase: &mut impl FnMut(&str) -> LockPhase) -> Option<LeaseEffect> {
        trace!("the keeper: {report:?}");
        if matches!(report, Report::Lost(_) | Report::Looked { look: Look::Lost, .. })
            && let Some(orders) = &self.orders
        {
            // Terraform writes to its log before it sends the delete of its own lock. So if it has deleted the lock,
            // the log shows that by now. Then the lock of another run may be there as well.
            match phase(&orders.lock) {
                LockPhase::Gone => return self.released(),
                LockPhase::Unlocking { is_end_logged } if self.is_unlock_over(report.loss(), is_end_logged) => {
                    trace!("the unlock is over, although the log does not show its end");
                    return self.released();
                }
                // A terraform that is stopped in its unlock may be about to delete, without a condition, the lock that
                // another run has taken meanwhile. So it goes on only if it is not stopped, or has exited and the lock
                // is only read again.
                LockPhase::Unlocking { .. } if self.stopped.is_none() || self.has_holder_exited() => return None,
                LockPhase::Unlocking { .. } => {
                    let is_gone = |loss: &Loss| *loss == Loss::Gone;
                    self.is_lost_in_unlock = report.loss().is_some_and(is_gone);
                }
                LockPhase::Held => {}
            }
        }
        match report {
            Report::Renewed { fence, sent, fuse } => {
                (self.reason, self.reads_in_unlock) = (None, 0);
                if let Some(orders) = self.orders.as_mut().filter(|orders| fence == Promise::None && orders.may_promise)
                {
                    orders.may_promise = false;
                    self.has_new_orders = true;
                }
                if fuse.is_some() {
                    self.fuse_silences = 0;
                }
                let newest = self.fence.as_ref().map(Fence::fuse_number);
                if let Some(stopped) = &mut self.stopped {
                    // A renewal that only the old fuse knows says nothing about how long terraform may work.
                    stopped.is_renewed =
                        fence == Promise::None || (stopped.is_rearmed && fuse.map(|(number, _)| number) == newest);
                    stopped.look = Look::Ours;
                    if !stopped.is_renewed {
                        return None;
                    }
                }
                let deadline = fuse.map(|(_, deadline)| deadline);
                (self.renewed, self.deadline) = (Some(wall_time(sent)), deadline.map(Deadline::at).or(self.deadline));
                if fence == Promise::None && self.fence.is_some() && self.stopped.is_none() {
                    // The host's clock has stood still. From now on nobody takes the lock without being asked.
                    self.take_down();
                }
                None
            }
            Report::Looked { look, loss, reason } => {
                crash_point::reached("lease: knows the look");
                self.reason = (look == Look::Unknown).then_some(reason);
                if look == Look::Ours {
                    self.reads_in_unlock = 0;
                }
                if let Some(stopped) = &mut self.stopped {
                    stopped.look = look;
                }
                self.loss = loss;
                None
            }
            Report::Lost(Loss::Gone) if self.stopped.is_none() => {
                let is_new = self.loss.replace(Loss::Gone).is_none();
                is_new.then_some(LeaseEffect::Interrupt(Trouble::Gone))
            }
            Report::Lost(loss) => {
                self.loss = Some(loss);
                self.cut_off();
                Some(LeaseEffect::Kill(EndReason::LockLost))
            }
            Report::Alive => None,
            Report::FuseSilent => self.note_silent_fuse().map(LeaseEffect::NewHelper),
            Report::MayHaveRecord => {
                if let Some(orders) = &mut self.orders {
                    orders.may_have_a_record = true;
                }
                None
            }
            Report::Notice(notice) => self.note_notice(notice).then_some(LeaseEffect::HostEnds(notice)),
            Report::Failed(reason) => {
                self.reason = Some(reason);
                None
            }
            Report::Refused(reason) => {
                self.reason = Some(reason.clone());
                Some(LeaseEffect::Interrupt(Trouble::Refused(reason)))
            }
            Report::NoLease(reason) => {
                self.take_down();
                self.let_go();
                (self.orders, self.leased) = (None, None);
                Some(LeaseEffect::NoLease(reason))
            }
        }
    }

    /// Notes that the fuse has not answered its keeper, and replaces it in the end: its death stops terraform, and the
    /// spare one takes its place. A fuse that is not a child of this process cannot be killed. Then the run goes on
    /// without a fence. Returns the pid of a new keeper.
    fn note_silent_fuse(&mut self) -> Option<Pid> {
        self.fuse_silences += 1;
        if self.fuse_silences < SILENCES_TO_REPLACE_FUSE {
            return None;
        }
        trace!("the fuse does not answer, and is replaced");
        self.fuse_silences = 0;
        if self.fence.is_none() || self.kill_fuse() {
            return None;
        }
        if let Some(stopped) = &mut self.stopped {
            (stopped.is_rearmed, stopped.can_rearm) = (false, false);
            return None;
        }
        // The confirmed renewal takes the fence down.
        self.renew_without_fence()
    }

    /// Kills the fuse, so that terraform stays stopped until the keeper has looked at the lock, which may be lost. If
    /// that is not possible (there is no fence, or the fuse is not a child of this process), the keeper renews at once,
    /// and that shows the loss.
    pub(crate) fn stop_for_look(&mut self) {
        if self.orders.is_none() || self.is_over {
            return;
        }
        if self.kill_fuse() {
            trace!("terraform stays stopped until the lock was looked at");
        } else {
            self.keepers.hurry();
        }
    }

    /// Kills the fuse, if there is one, and notes that it was this process. Returns false if it cannot be killed.
    fn kill_fuse(&mut self) -> bool {
        let was_blown = self.is_blown();
        let is_killed = self.fence.as_ref().is_some_and(Fence::kill_fuse);
        self.has_killed_fuse |= is_killed && !was_blown;
        is_killed
    }

    /// Breaks off what the stopped terraform had sent, if it must not arrive any more.
    fn abort_requests_if_due(&mut self) {
        let Some(stopped) = &mut self.stopped else { return };
        let stopped_for = stopped.time.advance(boot_clock::now());
        if !stopped.is_cut && are_requests_aborted(self.terms, stopped.look, self.reason.is_some(), stopped_for) {
            stopped.is_cut = true;
            self.bar();
            self.abort_requests();
        }
    }

    /// Keeps terraform from opening a connection to its backend until it goes on. If another process continues it, it
    /// runs until `tf` has stopped it again. That takes about a millisecond, and terraform may need less for a write of
    /// its state, if its lock is in another service than its state, or the network is back. The connections that it has
    /// are broken off.
    ///
    /// Only `tf` does this, because the guardian does not know when terraform goes on. If `tf` dies before terraform
    /// goes on, terraform is killed, so it never runs on like this.
    fn bar(&mut self) {
        let Some((orders, terraform)) = self.orders.as_ref().zip(self.terraform.as_ref()) else { return };
        if self.barred.is_none() && !self.is_shim_watched && !terraform.has_exited() {
            self.barred = Barred::new(Pid::from_raw(orders.terraform));
            trace!("terraform can open a connection: {}", self.barred.is_none());
        }
    }

    /// Undoes [`RunLease::bar`]. Call this before terraform is continued, and before `tf` gives the kill pipe to a new
    /// fuse: from then on terraform survives the death of `tf`.
    fn lift_bar(&mut self) {
        let Some(barred) = self.barred.take() else { return };
        // The pid of a process that has exited may be that of another one.
        if !self.is_shim_watched && self.terraform.as_ref().is_some_and(|terraform| !terraform.has_exited()) {
            barred.lift();
        }
    }

    /// Breaks off what terraform had sent to its backend: the kernel sends it again and again, while terraform is
    /// stopped and even after it was killed. Terraform's core has no other connections. Those of its providers are left
    /// alone, because not every provider can repeat a request. Terraform itself repeats its requests, if it goes on.
    fn abort_requests(&self) {
        if let (Some(orders), Some(terraform)) = (&self.orders, &self.terraform) {
            let count = connections::abort(Pid::from_raw(orders.terraform), terraform);
            trace!("{count} connections of terraform were broken off");
        }
    }

    /// Notes a notice that a keeper has reported, and tells that keeper that terraform is interrupted because of it.
    /// Returns whether it is the first one. Another keeper may report it as well.
    fn note_notice(&mut self, notice: Notice) -> bool {
        self.keepers.tell_of_interrupt();
        let Some(orders) = &mut self.orders else { return false };
        let is_first = orders.interrupted.is_none();
        if is_first {
            orders.interrupted = Some(notice);
            self.has_new_orders = true;
        }
        is_first
    }

    fn step_while_stopped(&mut self, has_person: bool) -> Vec<LeaseEffect> {
        let mut effects = Vec::new();
        loop {
            let Some(stopped) = &mut self.stopped else { return effects };
            let stopped_for = stopped.time.advance(boot_clock::now());
            let run = StoppedRun {
                is_rearmed: stopped.is_rearmed,
                can_rearm: stopped.can_rearm,
                is_renewed: stopped.is_renewed,
                has_person,
                interrupts: stopped.interrupts,
                stopped_for,
            };
            let step = next_step(self.terms, stopped.look, run);
            let fence = self.fence.as_mut();
            match (step, fence, &mut self.stopped) {
                (FenceStep::Rearm, Some(fence), Some(stopped)) => match fence.rearm() {
                    Ok(fuse) => {
                        trace!("a new fuse holds the stop pipe");
                        crash_point::reached("lease: has a new fuse");
                        (stopped.is_rearmed, stopped.is_renewed) = (true, false);
                        self.fuse_silences = 0;
                        effects.extend(fuse.map(LeaseEffect::NewHelper));
                        self.keepers.hurry();
                    }
                    Err(error) => {
                        trace!("no new fuse: {error}");
                        stopped.can_rearm = false;
                    }
                },
                // The keeper renews by itself.
                (FenceStep::Renew | FenceStep::LookAgain | FenceStep::Rearm, ..) => return effects,
                (FenceStep::RenewWithoutFence, ..) => {
                    effects.extend(self.renew_without_fence().map(LeaseEffect::NewHelper));
                    return effects;
                }
                (FenceStep::Continue, ..) => {
                    effects.push(LeaseEffect::Continue);
                    return effects;
                }
                (FenceStep::End(reason), ..) => {
                    effects.push(LeaseEffect::Kill(reason));
                    return effects;
                }
            }
        }
    }

    /// Continues terraform after [`LeaseEffect::Continue`]. Returns false if it stays stopped.
    pub(crate) fn go_on(&mut self, tree: &Tree) -> bool {
        let Some(stopped) = self.stopped.take() else { return false };
        (self.is_stopped_in_time, self.has_killed_fuse) = (false, false);
        self.lift_bar();
        match &self.fence {
            Some(fence) if stopped.is_rearmed => {
                crash_point::reached("lease: may continue");
                // Without the kill pipe, nothing would kill terraform after the death of `tf` and the fuse.
                let is_given = fence.give_kill_pipe().is_ok();
                crash_point::reached("lease: sent the kill pipe");
                // If the fuse has died meanwhile, its socket keeps the kill pipe until the next fuse is armed. No spare
                // fuse is forked until then: its copy of the socket would keep the pipe after the death of `tf`.
                if !is_given || !self.continue_group() {
                    self.stopped = Some(Stopped { is_rearmed: false, is_renewed: false, is_cut: false, ..stopped });
                    return false;
                }
            }
            _ => {
                // The group is continued first. If `tf` died between the two, a group that is stopped would stay so.
                if let Some(group) = self.group {
                    let _ = killpg(group, Signal::SIGCONT);
                }
                self.take_down();
            }
        }
        trace!("the lease is renewed, and terraform goes on");
        crash_point::reached("lease: has continued");
        self.fork_spare().into_iter().for_each(|pid| tree.exclude(pid));
        crash_point::reached("lease: has a new spare fuse");
        true
    }

    /// Forks the spare of the fuse that is in use now. Terraform goes on meanwhile, so the short time in which the
    /// forked process holds a write end can only delay a stop, and only if the fuse dies in it.
    fn fork_spare(&mut self) -> Option<Pid> {
        if self.stopped.is_some() {
            return None;
        }
        let spare = self.fence.as_mut()?.fork_spare(Parent::Us);
        spare.inspect_err(|error| trace!("no spare fuse: {error}")).ok().flatten()
    }

    /// Replaces the keeper by one whose records promise no fence. Returns the pid of the new one.
    fn renew_without_fence(&mut self) -> Option<Pid> {
        if self.promise == Promise::None {
            return None;
        }
        self.promise = Promise::None;
        self.has_new_orders = true;
        if let Some(orders) = &mut self.orders {
            orders.fence = Promise::None;
        }
        self.keepers.end();
        self.start_keeper()
    }

    /// Takes the fence down: from now on nothing stops terraform.
    fn take_down(&mut self) {
        // The end of the fence continues terraform, which must be able to open files again by then.
        self.lift_bar();
        self.promise = Promise::None;
        if let Some(orders) = &mut self.orders {
            self.has_new_orders |= orders.fence == Promise::Stop;
            orders.fence = Promise::None;
        }
        if let Some(mut fence) = self.fence.take() {
            self.ending_fuses = fence.end(self.group, || {});
        }
    }

    /// Continues terraform's group, unless the kernel has stopped it and its lock was not looked at since. Every
    /// SIGCONT of `tf` to that group goes through here, because a SIGCONT discards a pending stop. Returns whether it was
    /// continued.
    pub(crate) fn continue_group(&self) -> bool {
        let Some(group) = self.group.filter(|_| self.stopped.is_none()) else { return false };
        fence::continue_group(self.fence.as_ref(), group)
    }

    /// Notes a ^C. If terraform is stopped, returns how often a person has pressed it since the stop. `None` if it is
    /// not stopped.
    pub(crate) fn note_key(&mut self) -> Option<u8> {
        let stopped = self.stopped.as_mut()?;
        stopped.interrupts = stopped.interrupts.saturating_add(1);
        Some(stopped.interrupts)
    }

    /// Ends the renewals, because terraform has ended. The keeper has ended when this returns, so that no renewal comes
    /// between a read and a delete of the lock. The fence stays: a process that terraform has started may still work.
    pub(crate) fn end_renewals(&mut self) {
        self.was_stopped_at_end = self.has_stopped();
        self.keepers.let_go();
        crash_point::reached("lease: told the keeper");
        self.keepers.end();
        crash_point::reached("lease: ended the renewals");
    }

    /// Ends the lease ([`Self::end`]) if its fence ends at this point of the cleanup.
    pub(crate) fn end_at(&mut self, point: CleanupPoint, ended: Option<Ended>, tree: &Tree) {
        if ends_at(point) {
            self.end(ended, tree);
        }
    }

    /// Ends the lease, because terraform has ended and no process that it has started needs the fence. `ended` is how it
    /// ended, `None` if that is unknown. A second call does nothing.
    ///
    /// If terraform died while it was stopped for its lease, or if the fence has stopped its group after its death,
    /// another run may have its lock by now, and the processes that terraform has started must not run again. But the
    /// end of the fence continues the group, for a process that terraform has started on purpose. So this kills them
    /// before that. A terraform that exited by itself was not stopped then.
    fn end(&mut self, ended: Option<Ended>, tree: &Tree) {
        let has_died = !matches!(ended, Some(Ended::Exited(_)));
        if has_died && std::mem::take(&mut self.was_stopped_at_end) {
            tree.kill_rest();
        }
        crash_point::reached("lease: ends");
        self.let_go_after(|| {
            if has_died {
                tree.kill_rest();
            }
        });
        self.keepers.end();
        self.ending_fuses.wait();
        crash_point::reached("lease: ended");
    }

    /// Ends the lease, because its lock is gone or never had a lease. Does not wait for the keeper and the fuses,
    /// because the caller has to handle signals. A late renewal fails, because its lock is gone.
    fn let_go(&mut self) {
        self.let_go_after(|| {});
    }

    /// As [`Self::let_go`]. Calls `before_continuing` before a group that the fence has stopped is continued.
    fn let_go_after(&mut self, before_continuing: impl FnOnce()) {
        self.keepers.let_go();
        crash_point::reached("lease: told the keeper");
        // The guardian must not renew it either.
        self.has_new_orders |= self.orders.is_some() && !self.is_over;
        (self.stopped, self.is_over) = (None, true);
        self.lift_bar();
        if let Some(mut fence) = self.fence.take() {
            self.ending_fuses = fence.end(self.group, before_continuing);
        }
    }

    /// Withdraws the promise if the lock of the lease is one of `kept`, the locks that the cleanup keeps on purpose
    /// ([`Self::withdraw`]). If that fails, `journal` remembers these locks, because a later run on this host knows
    /// better than the lease.
    pub(crate) fn withdraw_or_remember(
        &mut self,
        kept: &[String],
        journal: Option<&Journal>,
        waiter: &mut Waiter<'_>,
    ) -> Withdrawal {
        let withdrawal = self.withdraw(|id| kept.iter().any(|kept| kept == id), waiter);
        if withdrawal == Withdrawal::Failed
            && let Some(journal) = journal
        {
            for id in kept {
                journal.kept_locks().add(id);
            }
        }
        withdrawal
    }

    /// Withdraws the promise of the lock of the lease if the run has ended and the lock stays on purpose. Otherwise its
    /// lease would lapse, and another host would take the lock without asking. The lease of a lock that only could not
    /// be released may lapse: its run is dead. Call this after the cleanup. `stays` says whether the lock with an ID
    /// was kept on purpose. A SIGINT ends the wait for it.
    fn withdraw(&mut self, stays: impl Fn(&str) -> bool, waiter: &mut Waiter<'_>) -> Withdrawal {
        // Even if no keeper has reported a renewal: the report may not have been read before terraform ended.
        let is_promised = |orders: &Orders| orders.may_promise || orders.fence == Promise::Stop;
        let handle = self.ensure_handle();
        let Some(mut orders) = self.orders.take().filter(is_promised) else { return Withdrawal::Done };
        if !stays(&orders.lock) {
            return Withdrawal::NoLock;
        }
        let (Ok(()), Some(terraform)) = (handle, &self.terraform) else { return Withdrawal::Failed };
        (orders.fence, orders.withdraws) = (Promise::None, true);
        match Keeper::start(&orders, &Inherited { fence: None, terraform: terraform.as_fd(), kill_write_end: None }) {
            Ok(keeper) => {
                trace!("the promise of the lease is being withdrawn");
                crash_point::reached("lease: withdraws");
                let withdrawal = keeper.withdrawal(waiter);
                crash_point::reached("lease: withdrawn");
                withdrawal
            }
            Err(error) => {
                trace!("no keeper: {error}");
                Withdrawal::Failed
            }
        }
    }
}

impl GroupFence for RunLease {
    fn has_stopped(&self) -> bool {
        self.is_stopped() || self.is_blown()
    }

    fn continue_group(&self, _: Pid) {
        RunLease::continue_group(self);
    }
}

/// Returns the fence of a run with this lease.
pub(crate) fn fence_of(lease: Option<&RunLease>) -> &dyn GroupFence {
    lease.map_or(&NoFence, |lease| lease)
}

/// Whether a report says the same of a terraform whose fuse is gone by now as of one that had its fuse. Every other
/// report is about what happens without a fuse, or must not change a run that is stopped before its lock was looked at.
fn comes_before_a_stop(report: &Report) -> bool {
    match report {
        Report::Renewed { fence, .. } => *fence == Promise::Stop,
        Report::Looked { .. } | Report::NoLease(_) | Report::FuseSilent => false,
        Report::Failed(_)
        | Report::Lost(_)
        | Report::Refused(_)
        | Report::MayHaveRecord
        | Report::Notice(_)
        | Report::Alive => true,
    }
}

/// Returns the wall-clock time of `at`, a time of [`boot_clock::now`].
fn wall_time(at: Duration) -> Timestamp {
    let signed = |duration| SignedDuration::try_from(duration).unwrap_or(SignedDuration::MAX);
    saturating_add(Timestamp::now(), signed(at).saturating_sub(signed(boot_clock::now())))
}

/// Returns the obstacle if the handle of the terraform with the lock cannot be opened. A terraform that has just ended
/// is looked for again, and a descriptor may be free later.
fn unwatchable(error: &io::Error) -> LeaseObstacle {
    match error.raw_os_error() {
        Some(libc::ESRCH) => LeaseObstacle::NoHolder,
        Some(libc::EMFILE | libc::ENFILE) => LeaseObstacle::NoDescriptor,
        _ => LeaseObstacle::Unwatchable(error.to_string()),
    }
}

/// Returns the obstacle if terraform holds a lock of the S3 backend that the log does not name. `None` if it holds
/// none.
fn unnamed_obstacle(log: &Log, candidates: impl FnOnce() -> CandidateBackends) -> Option<LeaseObstacle> {
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
fn lock_besides<'a>(log: &'a Log, leased: &str) -> Option<&'a RecordedLock> {
    log.unreleased().find(|lock| lock.is_in_use() && lock.id != leased)
}

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;

    use super::*;
    use crate::terraform::log::other_versions::tofu_life;
    use crate::terraform::log::tests::{ID, lock_line};

    /// Returns the lease of a run whose terraform the kernel has stopped, and for which no new fuse can be made.
    fn lease_of_a_stopped_run() -> RunLease {
        let terms = Terms::new(Duration::from_mins(1)).unwrap();
        let mut lease = RunLease::new(terms, Holder::default(), Promise::None, None);
        lease.orders = Some(Orders {
            lock: ID.to_owned(),
            places: Vec::new(),
            identities: Vec::new(),
            length: Duration::from_mins(1),
            fence: Promise::None,
            may_promise: true,
            holder: Holder::default(),
            terraform: 1,
            start: 0,
            may_have_a_record: true,
            withdraws: false,
            asks: None,
            interrupted: None,
            directory: std::path::PathBuf::new(),
        });
        lease.stopped = Some(Stopped {
            time: RunningTime::since(boot_clock::now()),
            is_rearmed: false,
            can_rearm: false,
            is_renewed: false,
            interrupts: 0,
            look: Look::Unknown,
            is_cut: false,
        });
        lease
    }

    #[test]
    fn a_terraform_that_went_on_after_a_stop_and_wrote_its_state_has_not_run_on() {
        let mut lease = lease_of_a_stopped_run();
        let now = Timestamp::now();
        let ago = now - SignedDuration::from_hours(1);
        let over = Deadline { at: Duration::ZERO, wall: ago };
        (lease.renewed, lease.deadline, lease.is_stopped_in_time) = (Some(ago), Some(over), true);
        assert_eq!(lease.late_write(Some(now), false), LateWrite::AfterTheDeadline);
        let sent = boot_clock::now();
        let renewed = |fuse| Report::Renewed { fence: Promise::None, sent, fuse };
        lease.heard(renewed(None), &mut |_| LockPhase::Held);
        assert_eq!(lease.late_write(Some(now), false), LateWrite::AfterTheDeadline);
        lease.heard(renewed(Some((1, sent + Duration::from_secs(48)))), &mut |_| LockPhase::Held);
        let after = |seconds| Some(now + SignedDuration::from_secs(seconds));
        assert_eq!(lease.late_write(after(48), false), LateWrite::No);
        assert_eq!(lease.late_write(after(60), false), LateWrite::AfterTheDeadline);
    }

    /// Until then, the stored record may still promise that terraform is stopped in time, and must be withdrawn.
    #[test]
    fn a_promise_counts_as_stored_until_a_renewal_without_it_is_confirmed() {
        let mut lease = lease_of_a_stopped_run();
        let may_promise = |lease: &RunLease| lease.orders.as_ref().unwrap().may_promise;
        let sent = boot_clock::now();
        let renewed = |fence| Report::Renewed { fence, sent, fuse: None };
        for report in [
            Report::Failed("x".to_owned()),
            Report::Refused("x".to_owned()),
            Report::Looked { look: Look::Ours, loss: None, reason: String::new() },
            renewed(Promise::Stop),
        ] {
            lease.heard(report, &mut |_| LockPhase::Held);
            assert!(may_promise(&lease));
        }
        lease.has_new_orders = false;
        lease.heard(renewed(Promise::None), &mut |_| LockPhase::Held);
        assert!(!may_promise(&lease) && lease.has_new_orders, "the guardian must know it too");
    }

    #[test]
    fn a_write_before_the_loss_was_found_is_late_unless_the_deadline_has_stopped_terraform() {
        for is_stopped_in_time in [false, true] {
            let mut lease = lease_of_a_stopped_run();
            let now = Timestamp::now();
            let deadline = Deadline::at(boot_clock::now() + Duration::from_secs(48));
            (lease.renewed, lease.deadline) = (Some(now), Some(deadline));
            lease.is_stopped_in_time = is_stopped_in_time;
            let another = Loss::Another { who: "a@b".to_owned(), created: String::new() };
            lease.heard(Report::Lost(another), &mut |_| LockPhase::Held);
            let expected = if is_stopped_in_time { LateWrite::No } else { LateWrite::BeforeTheLossWasFound };
            assert_eq!(lease.late_write(Some(now + SignedDuration::from_secs(1)), false), expected);
        }
    }

    #[test]
    fn what_a_keeper_reports_of_a_run_with_a_fuse_is_heard_before_the_stop_and_the_rest_after_it() {
        let renewed = |fence| Report::Renewed { fence, sent: Duration::ZERO, fuse: None };
        let looked = Report::Looked { look: Look::Ours, loss: None, reason: String::new() };
        for (report, expected) in [
            (Report::Lost(Loss::Gone), true),
            (renewed(Promise::Stop), true),
            (Report::Failed(String::new()), true),
            // Each of these could take the fence down, or is of a run without a fuse.
            (renewed(Promise::None), false),
            (Report::NoLease(String::new()), false),
            (Report::FuseSilent, false),
            (looked, false),
        ] {
            assert_eq!(comes_before_a_stop(&report), expected, "{report:?}");
        }
    }

    #[test]
    fn only_a_lock_that_is_gone_after_a_stop_within_the_unlock_may_have_been_released_by_terraform_itself() {
        let another = Loss::Another { who: "a@b".to_owned(), created: String::new() };
        for (phase, loss, expected) in [
            (LockPhase::Unlocking { is_end_logged: true }, Loss::Gone, true),
            (LockPhase::Unlocking { is_end_logged: false }, Loss::Gone, true),
            (LockPhase::Unlocking { is_end_logged: false }, another, false),
            (LockPhase::Held, Loss::Gone, false),
        ] {
            let mut lease = lease_of_a_stopped_run();
            let looked = Report::Looked { look: Look::Lost, loss: Some(loss.clone()), reason: String::new() };
            lease.heard(looked, &mut |_| phase);
            assert_eq!(lease.is_lost_in_unlock(), expected, "{phase:?} {loss:?}");
            assert_eq!(lease.loss(), Some(&loss));
        }
    }

    /// Returns whether the lease of the run that `prepare` changes is over after each of the reports.
    fn over_after(reports: &[Report], phase: LockPhase, prepare: impl Fn(&mut RunLease)) -> Vec<bool> {
        let mut lease = lease_of_a_stopped_run();
        // No process has this pid.
        lease.orders.as_mut().unwrap().terraform = i32::MAX;
        prepare(&mut lease);
        let mut over = Vec::new();
        for report in reports {
            let effect = lease.heard(report.clone(), &mut |_| phase);
            assert!(effect.is_none() || effect == Some(LeaseEffect::ContinueWithoutLock), "{effect:?}");
            if effect.is_some() {
                assert!(lease.go_on_without_lock() && !lease.go_on_without_lock());
            }
            assert_eq!(lease.loss(), None);
            over.push(lease.is_over);
        }
        over
    }

    #[test]
    fn two_reads_in_a_row_without_the_lock_end_an_unlock_whose_end_is_not_logged() {
        let another = Loss::Another { who: "a@b".to_owned(), created: String::new() };
        let (gone, another) = (Report::Lost(Loss::Gone), Report::Lost(another));
        let renewed = Report::Renewed { fence: Promise::Stop, sent: boot_clock::now(), fuse: None };
        let (unlogged, logged) =
            (LockPhase::Unlocking { is_end_logged: false }, LockPhase::Unlocking { is_end_logged: true });
        let runs = |lease: &mut RunLease| lease.stopped = None;
        let lost = [gone.clone(), another.clone()];
        assert_eq!(over_after(&lost, unlogged, runs), [false, true]);
        let found_again = [gone.clone(), renewed, another, gone.clone()];
        assert_eq!(over_after(&found_again, unlogged, runs), [false, false, false, true]);
        // A terraform that runs would have logged the end.
        assert_eq!(over_after(&lost, logged, runs), [false, false]);
        // It has exited, and its shim goes on.
        let has_exited = |lease: &mut RunLease| (lease.stopped, lease.is_shim_watched) = (None, true);
        assert_eq!(over_after(&lost, logged, has_exited), [false, true]);
        // It is stopped, but not for its lease.
        #[expect(clippy::disallowed_methods, reason = "this is no terraform")]
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        nix::sys::signal::kill(pid, Signal::SIGSTOP).unwrap();
        while Process::look_up(pid).is_none_or(|child| child.state != 'T') {}
        let suspended = |lease: &mut RunLease| {
            lease.stopped = None;
            lease.orders.as_mut().unwrap().terraform = pid.as_raw();
        };
        assert_eq!(over_after(&lost, unlogged, suspended), [false, false]);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn what_follows_an_exited_terraform_is_not_killed_for_the_lock_that_was_released() {
        let looked = |loss: &Loss| Report::Looked { look: Look::Lost, loss: Some(loss.clone()), reason: String::new() };
        let another = Loss::Another { who: "a@b".to_owned(), created: String::new() };
        let has_exited = |lease: &mut RunLease| lease.is_shim_watched = true;
        for is_end_logged in [false, true] {
            let looks = [looked(&Loss::Gone), looked(&another)];
            assert_eq!(over_after(&looks, LockPhase::Unlocking { is_end_logged }, has_exited), [false, true]);
        }
        assert_eq!(over_after(&[looked(&another)], LockPhase::Gone, |_| ()), [true]);
    }

    #[test]
    fn the_guardian_is_told_that_there_is_no_lease_any_more() {
        let reports: [fn(&mut RunLease); 2] = [
            |lease| drop(lease.heard(Report::NoLease("refused".to_owned()), &mut |_| LockPhase::Held)),
            RunLease::let_go,
        ];
        for ends in reports {
            let mut lease = lease_of_a_stopped_run();
            assert!(lease.orders().is_some() && !lease.has_new_orders());
            ends(&mut lease);
            assert!(lease.orders().is_none() && lease.has_new_orders() && !lease.has_new_orders());
        }
    }

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
        assert_eq!(lease.is_blocked(Some("a"), LeaseObstacle::NoHolder), Followed::Nothing);
        let since = |lease: &RunLease| lease.blocked.as_ref().unwrap().since;
        let first = since(&lease);
        assert_eq!(lease.is_blocked(Some("a"), LeaseObstacle::NoHolder), Followed::Nothing);
        assert_eq!(since(&lease), first);
        while boot_clock::now() == first {}
        assert_eq!(lease.is_blocked(Some("b"), LeaseObstacle::NoHolder), Followed::Nothing);
        assert!(since(&lease) > first);
        lease.blocked.as_mut().unwrap().since = Duration::ZERO;
        let Followed::NoLease(reason) = lease.is_blocked(Some("b"), LeaseObstacle::NoHolder) else { panic!() };
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
