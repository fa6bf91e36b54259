//! The lease of one run, as the process sees it that supervises terraform.
//!
//! When the log shows that terraform holds a lock, `tf` arms the fence and starts a keeper. From then on there are two
//! cases:
//!
//! - The fuse is alive. The keeper renews the lease, and tells the fuse until when terraform may work.
//! - The fuse is gone: it has reached its deadline, or was killed. The kernel has stopped terraform. `tf` waits for the
//!   keeper's look at the lock. [`next_step`](crate::lease::fence::next_step) decides what follows from it.
//!
//! The guardian holds the same descriptors, except the write end of the kill pipe. After the death of `tf` it starts a
//! keeper of its own. It never continues a stopped terraform: if the fuse dies then, the kernel kills terraform.

mod begin;
mod end;
mod guardian_view;
mod stopped;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use nix::unistd::Pid;

use crate::cleanup::process_tree::{GroupFence, NoFence};
use crate::crash_point;
use crate::journal::run_mark::marks_us;
use crate::lease::fence::{
    EndReason, FoundLoss, LateWrite, Look, Loss, LossStep, Lost, LostInUnlock, PhaseAtLoss, SILENCES_TO_REPLACE_FUSE,
    StopCause, Trouble, UnlockStep, is_lost_before, is_reason_due, late_write, loss_step, unlock_step,
};
use crate::lease::notice::{Notice, Provider};
use crate::lease::obstacle::LeaseObstacle;
use crate::lease::record::{Holder, Promise};
use crate::lease::running_time::RunningTime;
use crate::lease::terms::Terms;
use crate::supervise::fence::{EndingFuses, Fence};
use crate::supervise::keeper::{Inherited, Orders, Report};
use crate::supervise::keepers::{Keepers, News};
use crate::sys::boot_clock;
use crate::sys::connections::Barred;
use crate::sys::detached::Parent;
use crate::sys::process::{Process, ProcessHandle};
use crate::terraform::log::Log;
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

/// An obstacle to the lease of a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Blocked {
    /// The ID of the lock. `None` if the log does not name it.
    lock: Option<String>,
    obstacle: LeaseObstacle,
    /// Since when, on the clock of [`boot_clock::now`].
    since: Duration,
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

    /// Returns how the lock was lost. `None` if it was not.
    pub(crate) fn loss(&self) -> Option<&Loss> {
        self.loss.as_ref()
    }

    /// Whether terraform was stopped within its unlock when the lock was found gone, so that it may have released the
    /// lock itself.
    pub(crate) fn is_lost_in_unlock(&self) -> bool {
        self.is_lost_in_unlock
    }

    /// Returns whether [`RunLease::orders`] have changed since the last call.
    pub(crate) fn take_new_orders(&mut self) -> bool {
        std::mem::take(&mut self.has_new_orders)
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

    /// Whether the terraform with the lock has exited.
    fn has_holder_exited(&self) -> bool {
        self.is_shim_watched || self.terraform.as_ref().is_some_and(ProcessHandle::has_exited)
    }

    /// Counts a read that shows the `loss` of a lock that terraform has begun to release, and returns whether the
    /// unlock is over. If one more read decides that, it comes at once: in an outage, the fuse might stop what runs on.
    fn count_read_in_unlock(&mut self, loss: Option<&Loss>, is_end_logged: bool) -> bool {
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
            Report::Lost(loss) => self.found_loss(Some(loss), false, phase),
            Report::Looked { look: Look::Lost, loss, .. } => self.found_loss(loss, true, phase),
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

    /// Does what follows when the keeper has found that the lock is lost. `loss` is how, or `None` if that is unknown.
    /// `is_look`: it is a look at the lock of a stopped terraform.
    fn found_loss(
        &mut self,
        loss: Option<Loss>,
        is_look: bool,
        phase: &mut impl FnMut(&str) -> LockPhase,
    ) -> Option<LeaseEffect> {
        let phase = self.orders.as_ref().map_or(LockPhase::Held, |orders| phase(&orders.lock));
        let phase = self.phase_at_loss(phase, loss.as_ref());
        let is_gone = loss == Some(Loss::Gone);
        let (is_stopped, has_exited) = (self.stopped.is_some(), self.has_holder_exited());
        let step = loss_step(FoundLoss { phase, is_gone, is_stopped, has_exited, is_look });
        if phase == PhaseAtLoss::Unlocking && step != LossStep::Wait {
            self.is_lost_in_unlock = is_gone;
        }
        match step {
            LossStep::Release => self.released(),
            LossStep::Wait => None,
            LossStep::Remember => {
                crash_point::reached("lease: knows the look");
                self.reason = None;
                if let Some(stopped) = &mut self.stopped {
                    stopped.look = Look::Lost;
                }
                self.loss = loss;
                None
            }
            LossStep::Interrupt => {
                let is_new = std::mem::replace(&mut self.loss, loss).is_none();
                is_new.then_some(LeaseEffect::Interrupt(Trouble::Gone))
            }
            LossStep::Kill => {
                self.loss = loss;
                self.cut_off();
                Some(LeaseEffect::Kill(EndReason::LockLost))
            }
        }
    }

    /// Returns how far terraform is with a lock that was found lost. `phase` is what the log shows. A read of a lock that
    /// is being released counts ([`RunLease::count_read_in_unlock`]).
    fn phase_at_loss(&mut self, phase: LockPhase, loss: Option<&Loss>) -> PhaseAtLoss {
        match phase {
            LockPhase::Held => PhaseAtLoss::Held,
            LockPhase::Gone => PhaseAtLoss::Released,
            LockPhase::Unlocking { is_end_logged } if self.count_read_in_unlock(loss, is_end_logged) => {
                trace!("the unlock is over, although the log does not show its end");
                PhaseAtLoss::Released
            }
            LockPhase::Unlocking { .. } => PhaseAtLoss::Unlocking,
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

#[cfg(test)]
mod tests {
    use jiff::SignedDuration;
    use nix::sys::signal::Signal;

    use super::*;
    use crate::terraform::log::tests::ID;

    /// Returns the lease of a run whose terraform the kernel has stopped, and for which no new fuse can be made.
    pub(super) fn lease_of_a_stopped_run() -> RunLease {
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
            assert!(lease.orders().is_some() && !lease.take_new_orders());
            ends(&mut lease);
            assert!(lease.orders().is_none() && lease.take_new_orders() && !lease.take_new_orders());
        }
    }
}
