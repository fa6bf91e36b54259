//! The model of a lease on the holder's host: terraform and the rest of its group, `tf`, its guardian, the keeper, the
//! fuse, and the two pipes whose hang-up stops and kills terraform. It answers two questions. Does terraform ever run
//! while its lock may be claimed? And is anything left stopped, or alive, for ever?
//!
//! There is no time here. The fuse's timer may fire at any moment, and a request may arrive at any moment. The model of
//! the service (`lease.rs`) shows when a lock can be taken: at the earliest after the deadline of a fuse that covers
//! the record, which is one whose deadline follows from the stored renewal or an earlier one. So here a lock with a
//! record can be taken at any moment at which no such fuse is alive. That is more than can happen.
//!
//! A process takes one step at a time, and any other process may take its step in between. So a process or a host that
//! is frozen is one that takes its next step late. The kernel acts even then, and its acts are part of the step that
//! causes them: it closes the files of a dead process, sends the signals of the pipes, and only then continues an
//! orphaned group (kernel/exit.c, `exit_files` before `exit_notify`).

use std::time::Duration;

use stateright::{Model, Property};

use crate::lease::fence::{FenceStep, INTERRUPTS_TO_END, Look, StoppedRun, next_step};
use crate::lease::keeper::{BeforeRenewal, KeeperSight, before_renewal};
use crate::lease::terms::Terms;

/// A deliberate fault, which the model must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Fault {
    /// Nothing kills a stopped terraform whose `tf` and fuse have died. The kernel continues it.
    NoKillPipe,
    /// A new fuse gets the kill pipe before the lease is renewed. If `tf` dies then, the kernel continues terraform.
    KillPipeBeforeRenewal,
    /// Terraform is continued without a look at the stop pipe.
    ContinuesWithoutLook,
    /// Terraform is continued after ^Z and `fg` if a new fuse holds the stop pipe, although its lease was not renewed.
    ContinuesAnUnrenewedRun,
    /// The stop pipe stops, and does not kill, while terraform is being continued.
    ContinuesWithoutKillSignal,
    /// A report about the fuse that has died counts for its successor.
    CountsForTheNextFuse,
    /// The keeper goes on after the end of terraform.
    KeeperWithoutEnd,
    /// A keeper that nobody supervises renews the lease of a stopped terraform.
    KeeperOfTheStopped,
    /// The fuse ends before the pipes are disarmed.
    EndsBeforeDisarming,
}

/// One setting of the model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    /// How many processes are killed.
    pub(crate) kills: u8,
    /// Whether the death of `tf` orphans terraform's group, so that the kernel continues it if it is stopped. Terraform
    /// ignores SIGHUP (nohup).
    pub(crate) is_orphaned: bool,
    /// Whether a new fuse can be made.
    pub(crate) can_rearm: bool,
    /// How often somebody else sends SIGCONT to terraform's group.
    pub(crate) continues: u8,
    pub(crate) fault: Option<Fault>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Terraform {
    Running,
    Stopped,
    Over,
}

/// A process that a provisioner has started in terraform's group, and that outlives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Daemon {
    Running,
    /// The fuse has stopped it, or `tf` for it.
    Stopped,
    /// A person has suspended it (^Z). If all processes of the run are killed then, it stays so, as without a lease.
    Suspended,
    Killed,
}

/// How terraform is continued. The order of the steps is the order here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum GoOn {
    /// The stop pipe gets SIGKILL.
    SetSignal,
    Look,
    /// The stop pipe had not hung up.
    Continue,
    /// The stop pipe gets SIGSTOP again.
    SetBack,
}

/// How the process that supervises a run ends it. The order of the steps is the order here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Ending {
    /// The pipes are disarmed, and what is left of the group is continued.
    Disarm,
    EndKeeper,
    EndFuse,
    Release,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Supervisor {
    Watches,
    /// `tf` alone: it has suspended terraform and itself (^Z).
    Suspended,
    /// `tf` alone: it has a write end of the stop pipe, for a new fuse.
    HasOpenedStopPipe,
    /// `tf` alone: the lease is renewed. It gives the fuse the write end of the kill pipe.
    GivesKillPipe,
    GoesOn(GoOn),
    /// `tf` alone: terraform goes on without a fence. The pipes are disarmed next.
    TakesDown,
    Ends(Ending),
    Done,
    Dead,
}

impl Supervisor {
    fn is_alive(self) -> bool {
        !matches!(self, Self::Done | Self::Dead)
    }
}

/// What a renewal or a report is about. It is of the fuse that is alive, or of one before it.
type IsOfThisFuse = bool;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Keeper {
    /// It reads the lock. Then the fuse is armed, if it is new.
    Begins,
    /// It has a response of the service, from which the next renewal follows.
    Ready(IsOfThisFuse),
    Awaits(IsOfThisFuse),
    /// Its renewal was confirmed.
    Confirmed(IsOfThisFuse),
    /// The fuse has its new deadline, and has said so. `tf` is told next.
    Told(IsOfThisFuse),
    /// A renewal without a fence is under way.
    AwaitsWithoutFence,
    ConfirmedWithoutFence,
}

/// What the keeper has told `tf`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Report {
    Nothing,
    Ours,
    Lost,
    Renewed(IsOfThisFuse),
    RenewedWithoutFence,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Deadline {
    None,
    /// It does not follow from the stored renewal: the lock may be taken before it.
    Uncovered,
    /// The lock cannot be taken before it.
    Covered,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Fuse {
    deadline: Deadline,
    has_kill_pipe: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Lock {
    WithoutRecord,
    WithRecord,
    /// Its record promises no fence.
    WithoutFence,
    /// A taker has claimed or deleted it.
    Taken,
    Released,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    terraform: Terraform,
    daemon: Daemon,
    tf: Supervisor,
    guardian: Supervisor,
    keeper: Option<Keeper>,
    /// There is no lease any more, because the fence was taken down.
    has_no_lease: bool,
    fuse: Option<Fuse>,
    /// Whether the pipes send signals.
    is_armed: bool,
    /// Whether the stop pipe sends SIGKILL.
    stop_pipe_kills: bool,
    /// Whether the write end of the kill pipe is on its way to the fuse. It counts as a writer.
    kill_pipe_is_sent: bool,
    /// Whether `tf` has found terraform stopped by the fuse.
    is_fenced: bool,
    report: Report,
    /// Whether a renewal is under way of this fuse, and of one before it.
    in_flight: [bool; 2],
    without_fence_in_flight: bool,
    lock: Lock,
    /// Somebody else has continued terraform, and `tf` has not stopped it again.
    is_continued_by_others: bool,
    continues: u8,
    kills: u8,
    broken: Option<Broken>,
}

/// An invariant that does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Broken {
    /// Terraform runs, and its lock was claimed or deleted.
    TakenFromTheLiving,
    /// If nothing else happens, a process of terraform's group stays stopped.
    StoppedForEver,
    /// The end of the fuse at the end of the run has stopped or killed a process that terraform left on purpose.
    HitsTheRest,
    /// If nothing else happens, the keeper or the fuse outlives the run.
    OutlivesTheRun,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Victim {
    Terraform,
    Tf,
    Guardian,
    Keeper,
    Fuse,
    /// All of them, by one signal to a container or a control group.
    Everything,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// `tf` takes its next step. `true`: a person or the time limit ends a stopped terraform.
    Tf(bool),
    Guardian,
    Keeper,
    RenewForTheStopped,
    /// The keeper waits no longer for its response.
    GiveUpWaiting,
    RestartKeeper,
    FuseTakesKillPipe,
    /// The fuse has no deadline, and everybody who could give it one is dead. It disarms the pipes and ends.
    FuseSeesEnd,
    /// A renewal of this fuse, or of one before it, arrives. The keeper gets the response if it waits for it.
    RenewalArrives(IsOfThisFuse),
    RenewalIsLost(IsOfThisFuse),
    RenewalWithoutFenceArrives,
    TerraformEnds,
    TimerFires,
    LockIsTaken,
    Suspend,
    Foreground,
    ContinuedByOthers,
    Kill(Victim),
}

/// The actions of a run that nothing disturbs any more: everybody takes its next step, and the service answers. The
/// timer fires only if nobody renews the lease.
const UNDISTURBED: [Action; 13] = [
    Action::Foreground,
    Action::Tf(false),
    Action::Guardian,
    Action::FuseTakesKillPipe,
    Action::FuseSeesEnd,
    Action::TerraformEnds,
    Action::RestartKeeper,
    Action::RenewalWithoutFenceArrives,
    Action::RenewalArrives(true),
    Action::RenewalArrives(false),
    Action::Keeper,
    Action::GiveUpWaiting,
    Action::TimerFires,
];

/// More steps than an undisturbed run takes.
const MANY: usize = 60;

/// The model.
#[derive(Clone, Debug)]
pub(crate) struct LeaseHost {
    setup: Setup,
    terms: Terms,
}

impl State {
    pub(crate) fn broken(&self) -> Option<Broken> {
        self.broken
    }

    /// Whether no process has a write end of the stop pipe.
    fn has_hung_up(&self) -> bool {
        self.fuse.is_none() && self.tf != Supervisor::HasOpenedStopPipe
    }

    /// Whether `tf`, or the guardian after its death, is there to act for terraform.
    fn is_supervised(&self) -> bool {
        self.tf.is_alive() || self.guardian.is_alive()
    }

    fn stop(&mut self) {
        if self.terraform == Terraform::Running {
            self.terraform = Terraform::Stopped;
        }
        if self.daemon == Daemon::Running {
            self.daemon = Daemon::Stopped;
        }
    }

    /// SIGCONT to the group. It discards a stop that is pending.
    fn cont(&mut self) {
        if self.terraform == Terraform::Stopped {
            self.terraform = Terraform::Running;
        }
        if matches!(self.daemon, Daemon::Stopped | Daemon::Suspended) {
            self.daemon = Daemon::Running;
        }
    }

    fn kill_group(&mut self) {
        (self.terraform, self.daemon) = (Terraform::Over, Daemon::Killed);
    }
}

impl LeaseHost {
    pub(crate) fn new(setup: Setup) -> Self {
        Self { setup, terms: Terms::new(Duration::from_mins(5)).unwrap() }
    }

    fn has(&self, fault: Fault) -> bool {
        self.setup.fault == Some(fault)
    }

    // The kernel.

    /// The stop pipe may have lost its last writer. `had_hung_up`: before that.
    fn stop_pipe_changes(state: &mut State, had_hung_up: bool) {
        if state.is_armed && !had_hung_up && state.has_hung_up() {
            if state.stop_pipe_kills {
                state.kill_group();
            } else {
                state.stop();
            }
        }
    }

    fn kill_pipe_changes(&self, state: &mut State) {
        let fuse_has_it = state.fuse.is_some_and(|fuse| fuse.has_kill_pipe || state.kill_pipe_is_sent);
        if state.is_armed && !state.tf.is_alive() && !fuse_has_it && !self.has(Fault::NoKillPipe) {
            state.kill_group();
        }
    }

    fn fuse_ends(&self, state: &mut State) {
        let had_hung_up = state.has_hung_up();
        state.fuse = None;
        state.kill_pipe_is_sent = false;
        Self::stop_pipe_changes(state, had_hung_up);
        self.kill_pipe_changes(state);
    }

    /// `tf` is killed, or exits.
    fn tf_ends(&self, state: &mut State, end: Supervisor) {
        let had_hung_up = state.has_hung_up();
        state.tf = end;
        Self::stop_pipe_changes(state, had_hung_up);
        self.kill_pipe_changes(state);
        if self.setup.is_orphaned {
            state.cont();
        }
        (state.report, state.is_fenced) = (Report::Nothing, false);
    }

    // The supervisors.

    fn go_on(&self, state: &mut State, step: GoOn) -> Supervisor {
        match step {
            GoOn::SetSignal => {
                state.stop_pipe_kills = !self.has(Fault::ContinuesWithoutKillSignal);
                Supervisor::GoesOn(GoOn::Look)
            }
            GoOn::Look if state.is_armed && state.has_hung_up() && !self.has(Fault::ContinuesWithoutLook) => {
                Supervisor::GoesOn(GoOn::SetBack)
            }
            GoOn::Look => Supervisor::GoesOn(GoOn::Continue),
            GoOn::Continue => {
                state.cont();
                (state.is_fenced, state.report) = (false, Report::Nothing);
                Supervisor::GoesOn(GoOn::SetBack)
            }
            GoOn::SetBack => {
                state.stop_pipe_kills = false;
                Supervisor::Watches
            }
        }
    }

    fn end(&self, state: &mut State, step: Ending) -> Supervisor {
        match step {
            Ending::Disarm => {
                state.is_armed = self.has(Fault::EndsBeforeDisarming) && state.is_armed;
                state.cont();
                Supervisor::Ends(Ending::EndKeeper)
            }
            Ending::EndKeeper => {
                state.keeper = None;
                Supervisor::Ends(Ending::EndFuse)
            }
            Ending::EndFuse => {
                let before = state.daemon;
                self.fuse_ends(state);
                if state.daemon != before {
                    state.broken = Some(Broken::HitsTheRest);
                }
                Supervisor::Ends(Ending::Release)
            }
            Ending::Release => {
                if state.lock != Lock::Taken {
                    state.lock = Lock::Released;
                }
                Supervisor::Done
            }
        }
    }

    fn tf(&self, state: &mut State, is_asked_to_end: bool) -> Option<()> {
        if is_asked_to_end && !(state.tf == Supervisor::Watches && state.is_fenced) {
            return None;
        }
        state.tf = match state.tf {
            Supervisor::Watches if state.terraform == Terraform::Over => Supervisor::Ends(Ending::Disarm),
            Supervisor::Watches => self.tf_watches(state, is_asked_to_end)?,
            Supervisor::HasOpenedStopPipe => {
                let has_kill_pipe = self.has(Fault::KillPipeBeforeRenewal);
                state.fuse = Some(Fuse { deadline: Deadline::None, has_kill_pipe });
                // What was about the fuse before is not about this one.
                state.in_flight = [false, state.in_flight[0] || state.in_flight[1]];
                if !self.has(Fault::CountsForTheNextFuse) {
                    if let Some(Keeper::Ready(now) | Keeper::Awaits(now) | Keeper::Confirmed(now) | Keeper::Told(now)) =
                        &mut state.keeper
                    {
                        *now = false;
                    }
                    state.report = Report::Nothing;
                }
                Supervisor::Watches
            }
            Supervisor::GivesKillPipe => {
                state.kill_pipe_is_sent = state.fuse.is_some_and(|fuse| !fuse.has_kill_pipe);
                Supervisor::GoesOn(GoOn::SetSignal)
            }
            Supervisor::GoesOn(step) => self.go_on(state, step),
            Supervisor::TakesDown => {
                (state.is_armed, state.has_no_lease) = (false, true);
                state.keeper = None;
                Supervisor::Watches
            }
            Supervisor::Ends(step) => {
                let next = self.end(state, step);
                if next == Supervisor::Done {
                    // It tells its guardian that the run is over.
                    state.guardian = if state.guardian.is_alive() { Supervisor::Done } else { state.guardian };
                    self.tf_ends(state, Supervisor::Done);
                }
                next
            }
            Supervisor::Suspended | Supervisor::Done | Supervisor::Dead => return None,
        };
        Some(())
    }

    fn tf_watches(&self, state: &mut State, is_asked_to_end: bool) -> Option<Supervisor> {
        if !state.is_armed {
            return None;
        }
        if (state.has_hung_up() || state.is_fenced) && state.terraform == Terraform::Running {
            // Somebody else has continued it (CLD_CONTINUED).
            state.stop();
            state.is_continued_by_others = false;
            return Some(Supervisor::Watches);
        }
        if state.has_hung_up() && !state.is_fenced {
            (state.is_fenced, state.report) = (true, Report::Nothing);
            return Some(Supervisor::Watches);
        }
        if !state.is_fenced {
            if state.report != Report::Lost {
                return None;
            }
            state.kill_group();
            return Some(Supervisor::Watches);
        }
        let look = match state.report {
            Report::Nothing => Look::Unknown,
            Report::Lost => Look::Lost,
            Report::Ours | Report::Renewed(_) | Report::RenewedWithoutFence => Look::Ours,
        };
        let run = StoppedRun {
            is_rearmed: !state.has_hung_up(),
            can_rearm: self.setup.can_rearm,
            is_renewed: match state.report {
                Report::Renewed(is_of_this_fuse) => is_of_this_fuse && !state.has_hung_up(),
                Report::RenewedWithoutFence => true,
                Report::Nothing | Report::Ours | Report::Lost => false,
            },
            has_person: true,
            interrupts: if is_asked_to_end { INTERRUPTS_TO_END } else { 0 },
            stopped_for: Duration::ZERO,
        };
        match next_step(self.terms, look, run) {
            FenceStep::Rearm => Some(Supervisor::HasOpenedStopPipe),
            FenceStep::Continue if state.report == Report::RenewedWithoutFence => {
                // Before it is continued, the death of `tf` would kill it. So it never stays stopped.
                state.cont();
                state.is_fenced = false;
                Some(Supervisor::TakesDown)
            }
            FenceStep::Continue => Some(Supervisor::GivesKillPipe),
            FenceStep::End(_) => {
                state.kill_group();
                Some(Supervisor::Watches)
            }
            // The keeper does it.
            FenceStep::Renew | FenceStep::RenewWithoutFence | FenceStep::LookAgain => None,
        }
    }

    /// The guardian acts after the death of `tf`.
    fn guardian(&self, state: &mut State) -> Option<()> {
        if state.tf != Supervisor::Dead {
            return None;
        }
        state.guardian = match state.guardian {
            Supervisor::Watches if state.terraform == Terraform::Over => Supervisor::Ends(Ending::Disarm),
            Supervisor::Watches if state.terraform == Terraform::Stopped => Supervisor::GoesOn(GoOn::SetSignal),
            Supervisor::GoesOn(step) => self.go_on(state, step),
            Supervisor::Ends(step) => self.end(state, step),
            _ => return None,
        };
        Some(())
    }

    // The keeper.

    fn keeper(&self, state: &mut State) -> Option<()> {
        let keeper = state.keeper?;
        let is_ours = !matches!(state.lock, Lock::Taken | Lock::Released);
        let sight = KeeperSight {
            is_told_to_end: false,
            terraform_has_ended: state.terraform == Terraform::Over && !self.has(Fault::KeeperWithoutEnd),
            stop_pipe_has_hung_up: state.is_armed && state.has_hung_up(),
            is_supervised: state.is_supervised() || self.has(Fault::KeeperOfTheStopped),
            terraform_is_stopped: state.terraform == Terraform::Stopped,
            // [`Action::RenewForTheStopped`] may come at any moment.
            is_seen_and_due: false,
        };
        state.keeper = match keeper {
            Keeper::Begins | Keeper::Ready(_) if before_renewal(sight) == BeforeRenewal::End => {
                // If nobody else is left to do it, it tells the fuse. The fuse disarms the pipes before it ends. The
                // keeper does so only if the group is empty or the lock is gone. Otherwise the fuse ends at its
                // deadline, which this model has too: the timer may come at any moment.
                if sight.terraform_has_ended && !state.is_supervised() {
                    state.is_armed = false;
                    self.fuse_ends(state);
                }
                None
            }
            Keeper::Begins => {
                if state.tf.is_alive() && state.is_fenced && !matches!(state.report, Report::RenewedWithoutFence) {
                    state.report = if is_ours { Report::Ours } else { Report::Lost };
                }
                match &mut state.fuse {
                    Some(fuse) if is_ours => {
                        // Only a fuse without a deadline gets one before a renewal is confirmed.
                        if fuse.deadline == Deadline::None {
                            // A lock without a record cannot be taken before its first renewal, which has this
                            // deadline.
                            fuse.deadline =
                                if state.lock == Lock::WithoutRecord { Deadline::Covered } else { Deadline::Uncovered };
                        }
                        Some(Keeper::Ready(true))
                    }
                    Some(_) if state.tf.is_alive() => {
                        state.report = Report::Lost;
                        None
                    }
                    // Nobody is left who could be told. The fuse ends the run at its deadline.
                    Some(_) => None,
                    None if is_ours && !self.setup.can_rearm && state.is_fenced => {
                        state.without_fence_in_flight = true;
                        Some(Keeper::AwaitsWithoutFence)
                    }
                    None => Some(Keeper::Begins),
                }
            }
            Keeper::Ready(is_of_this_fuse) => match before_renewal(sight) {
                BeforeRenewal::Renew => {
                    state.in_flight[usize::from(!is_of_this_fuse)] = true;
                    Some(Keeper::Awaits(is_of_this_fuse))
                }
                BeforeRenewal::RenewForTheStopped | BeforeRenewal::Look | BeforeRenewal::End => Some(Keeper::Begins),
            },
            // If its record has lapsed, its deadline has passed, and the timer kills the fuse before that can answer.
            Keeper::Confirmed(false) if !is_ours && state.fuse.is_some_and(|fuse| fuse.deadline == Deadline::None) => {
                self.fuse_ends(state);
                Some(Keeper::Begins)
            }
            Keeper::Confirmed(is_of_this_fuse) => match &mut state.fuse {
                Some(fuse) => {
                    let is_new = fuse.deadline == Deadline::None;
                    if is_new {
                        fuse.deadline = Deadline::Covered;
                    }
                    Some(Keeper::Told(is_of_this_fuse || is_new))
                }
                None => Some(Keeper::Begins),
            },
            Keeper::Told(is_of_this_fuse) => {
                if state.tf.is_alive() && state.is_fenced {
                    state.report = Report::Renewed(is_of_this_fuse);
                }
                Some(Keeper::Ready(is_of_this_fuse))
            }
            Keeper::ConfirmedWithoutFence => {
                if state.tf.is_alive() {
                    state.report = Report::RenewedWithoutFence;
                }
                Some(Keeper::Begins)
            }
            Keeper::Awaits(_) | Keeper::AwaitsWithoutFence => return None,
        };
        if state.keeper == Some(keeper) && keeper == Keeper::Begins && state.report == Report::Nothing {
            return None;
        }
        Some(())
    }

    /// The keeper has seen that the lock is the run's, and renews although there is no fuse.
    fn renew_for_the_stopped(state: &mut State) -> Option<()> {
        let is_ours = !matches!(state.lock, Lock::Taken | Lock::Released);
        let sight = KeeperSight {
            is_told_to_end: false,
            terraform_has_ended: state.terraform == Terraform::Over,
            stop_pipe_has_hung_up: state.is_armed && state.has_hung_up(),
            is_supervised: state.is_supervised(),
            terraform_is_stopped: state.terraform == Terraform::Stopped,
            is_seen_and_due: is_ours,
        };
        let may = state.keeper == Some(Keeper::Begins) && before_renewal(sight) == BeforeRenewal::RenewForTheStopped;
        may.then_some(())?;
        state.in_flight[1] = true;
        state.keeper = Some(Keeper::Awaits(false));
        Some(())
    }

    fn renewal_arrives(state: &mut State, is_of_this_fuse: IsOfThisFuse) -> Option<()> {
        if !std::mem::take(&mut state.in_flight[usize::from(!is_of_this_fuse)]) {
            return None;
        }
        let is_awaited = state.keeper == Some(Keeper::Awaits(is_of_this_fuse));
        match state.lock {
            Lock::WithoutRecord | Lock::WithRecord => {
                state.lock = Lock::WithRecord;
                if is_of_this_fuse
                    && let Some(fuse) = state.fuse.as_mut().filter(|fuse| fuse.deadline != Deadline::None)
                {
                    fuse.deadline = Deadline::Covered;
                }
                if is_awaited {
                    state.keeper = Some(Keeper::Confirmed(is_of_this_fuse));
                }
            }
            // It is refused: it is older than the record, or the lock is not the run's any more.
            Lock::WithoutFence | Lock::Taken | Lock::Released => {
                if is_awaited {
                    state.keeper = Some(Keeper::Begins);
                }
            }
        }
        Some(())
    }

    // The invariants.

    fn check(&self, state: &mut State) {
        if state.broken.is_some() {
            return;
        }
        if state.terraform == Terraform::Running && state.lock == Lock::Taken && !state.is_continued_by_others {
            state.broken = Some(Broken::TakenFromTheLiving);
            return;
        }
        let mut end = *state;
        for _ in 0..MANY {
            let next = UNDISTURBED.iter().find_map(|action| {
                let mut next = end;
                self.act(&mut next, *action)?;
                (next != end).then_some(next)
            });
            match next {
                Some(next) => end = next,
                None => break,
            }
        }
        // Assumption: a terraform that is suspended (^Z), and whose `tf` and guardian are killed, stays suspended if it
        // has no lease: before the lease has begun, or after the fence was taken down. The lock is judged by its host
        // alone then.
        let promises_nothing = matches!(end.lock, Lock::WithoutRecord | Lock::WithoutFence);
        let has_no_lease = promises_nothing && !end.is_supervised() && !end.is_armed;
        // Assumption: if terraform, `tf` and the guardian are killed after a stop and before terraform is continued,
        // nobody continues what is left of the group.
        let was_ended = end.tf == Supervisor::Done || end.guardian == Supervisor::Done;
        let is_stopped = end.terraform == Terraform::Stopped || (end.daemon == Daemon::Stopped && was_ended);
        if is_stopped && !has_no_lease {
            state.broken = Some(Broken::StoppedForEver);
        } else if end.keeper.is_some() || end.fuse.is_some() {
            state.broken = Some(Broken::OutlivesTheRun);
        }
    }

    fn kill(&self, state: &mut State, victim: Victim) -> Option<()> {
        state.kills = state.kills.checked_sub(1)?;
        match victim {
            Victim::Terraform if state.terraform != Terraform::Over => state.terraform = Terraform::Over,
            Victim::Tf if state.tf.is_alive() => self.tf_ends(state, Supervisor::Dead),
            Victim::Guardian if state.guardian.is_alive() => state.guardian = Supervisor::Dead,
            Victim::Keeper if state.keeper.is_some() => state.keeper = None,
            Victim::Fuse if state.fuse.is_some() => self.fuse_ends(state),
            Victim::Everything if state.terraform != Terraform::Over && state.tf.is_alive() => {
                state.kill_group();
                (state.tf, state.guardian) = (Supervisor::Dead, Supervisor::Dead);
                (state.keeper, state.fuse) = (None, None);
            }
            _ => return None,
        }
        Some(())
    }

    /// Does `action`. `None` if it is not possible in this state.
    fn act(&self, state: &mut State, action: Action) -> Option<()> {
        match action {
            Action::Tf(is_asked_to_end) => self.tf(state, is_asked_to_end)?,
            Action::Guardian => self.guardian(state)?,
            Action::Keeper => self.keeper(state)?,
            Action::RenewForTheStopped => Self::renew_for_the_stopped(state)?,
            Action::GiveUpWaiting => match state.keeper? {
                Keeper::Awaits(is_of_this_fuse) => state.keeper = Some(Keeper::Ready(is_of_this_fuse)),
                Keeper::AwaitsWithoutFence => state.keeper = Some(Keeper::Begins),
                _ => return None,
            },
            Action::RestartKeeper => {
                let supervisor = if state.tf == Supervisor::Dead { state.guardian } else { state.tf };
                // The guardian has a keeper of its own while `tf` is suspended.
                let is_suspended = state.tf == Supervisor::Suspended && state.guardian == Supervisor::Watches;
                let is_wanted = state.keeper.is_none() && !state.has_no_lease && state.terraform != Terraform::Over;
                let is_watched = supervisor == Supervisor::Watches || is_suspended;
                (is_wanted && is_watched && state.report != Report::Lost).then_some(())?;
                state.keeper = Some(Keeper::Begins);
            }
            Action::FuseTakesKillPipe => {
                std::mem::take(&mut state.kill_pipe_is_sent).then_some(())?;
                state.fuse.as_mut()?.has_kill_pipe = true;
            }
            Action::FuseSeesEnd => {
                let is_alone = !state.is_supervised() && state.keeper.is_none();
                (is_alone && state.fuse?.deadline == Deadline::None).then_some(())?;
                state.is_armed = false;
                self.fuse_ends(state);
            }
            Action::RenewalArrives(is_of_this_fuse) => Self::renewal_arrives(state, is_of_this_fuse)?,
            Action::RenewalIsLost(is_of_this_fuse) => {
                std::mem::take(&mut state.in_flight[usize::from(!is_of_this_fuse)]).then_some(())?;
            }
            Action::RenewalWithoutFenceArrives => {
                std::mem::take(&mut state.without_fence_in_flight).then_some(())?;
                let is_accepted = matches!(state.lock, Lock::WithRecord | Lock::WithoutRecord | Lock::WithoutFence);
                if is_accepted {
                    state.lock = Lock::WithoutFence;
                }
                if state.keeper == Some(Keeper::AwaitsWithoutFence) {
                    state.keeper = Some(if is_accepted { Keeper::ConfirmedWithoutFence } else { Keeper::Begins });
                }
            }
            Action::TerraformEnds => {
                (state.terraform == Terraform::Running && state.lock != Lock::Taken).then_some(())?;
                (state.terraform, state.lock) = (Terraform::Over, Lock::Released);
            }
            Action::TimerFires => {
                state.fuse.filter(|fuse| fuse.deadline != Deadline::None)?;
                self.fuse_ends(state);
            }
            Action::LockIsTaken => {
                let is_covered = state.fuse.is_some_and(|fuse| fuse.deadline == Deadline::Covered);
                (state.lock == Lock::WithRecord && !is_covered).then_some(())?;
                state.lock = Lock::Taken;
            }
            Action::Suspend => {
                (state.tf == Supervisor::Watches && state.terraform != Terraform::Over).then_some(())?;
                if state.daemon == Daemon::Running {
                    state.daemon = Daemon::Suspended;
                }
                state.stop();
                state.tf = Supervisor::Suspended;
            }
            Action::Foreground => {
                (state.tf == Supervisor::Suspended).then_some(())?;
                // A terraform that the fuse has stopped waits for its renewal, even if a new fuse holds the pipe.
                let waits = state.is_fenced && !self.has(Fault::ContinuesAnUnrenewedRun);
                state.tf = if waits { Supervisor::Watches } else { Supervisor::GoesOn(GoOn::SetSignal) };
            }
            Action::ContinuedByOthers => {
                (state.terraform == Terraform::Stopped).then_some(())?;
                state.continues = state.continues.checked_sub(1)?;
                state.cont();
                state.is_continued_by_others = true;
            }
            Action::Kill(victim) => self.kill(state, victim)?,
        }
        if state.terraform != Terraform::Running {
            state.is_continued_by_others = false;
        }
        Some(())
    }
}

impl Model for LeaseHost {
    type State = State;
    type Action = Action;

    /// Terraform holds the lock, and its log shows it. `tf` has armed the pipes and started the keeper.
    fn init_states(&self) -> Vec<State> {
        vec![State {
            terraform: Terraform::Running,
            daemon: Daemon::Running,
            tf: Supervisor::Watches,
            guardian: Supervisor::Watches,
            keeper: Some(Keeper::Begins),
            has_no_lease: false,
            fuse: Some(Fuse { deadline: Deadline::None, has_kill_pipe: true }),
            is_armed: true,
            stop_pipe_kills: false,
            kill_pipe_is_sent: false,
            is_fenced: false,
            report: Report::Nothing,
            in_flight: [false; 2],
            without_fence_in_flight: false,
            lock: Lock::WithoutRecord,
            is_continued_by_others: false,
            continues: self.setup.continues,
            kills: self.setup.kills,
            broken: None,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.broken.is_some() {
            return;
        }
        actions.extend([
            Action::Tf(false),
            Action::Tf(true),
            Action::Guardian,
            Action::Keeper,
            Action::RenewForTheStopped,
            Action::GiveUpWaiting,
            Action::RestartKeeper,
            Action::FuseTakesKillPipe,
            Action::FuseSeesEnd,
            Action::RenewalArrives(true),
            Action::RenewalArrives(false),
            Action::RenewalIsLost(true),
            Action::RenewalIsLost(false),
            Action::RenewalWithoutFenceArrives,
            Action::TerraformEnds,
            Action::TimerFires,
            Action::LockIsTaken,
            Action::Suspend,
            Action::Foreground,
            Action::ContinuedByOthers,
        ]);
        for victim in
            [Victim::Terraform, Victim::Tf, Victim::Guardian, Victim::Keeper, Victim::Fuse, Victim::Everything]
        {
            actions.push(Action::Kill(victim));
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = *last;
        self.act(&mut state, action)?;
        (state != *last).then(|| {
            self.check(&mut state);
            state
        })
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![Property::always("every invariant holds", |_, state: &State| state.broken.is_none())]
    }
}
