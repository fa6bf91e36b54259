//! The model of a lease at the service: a run that renews it, and takers on other hosts. It answers one question: is a
//! lock ever claimed or deleted while its terraform may run?
//!
//! Time passes in steps of 12 s, and the lease has 60 s. So the thresholds are 1 step (a renewal, at most 9.5 s), 2
//! (the quiet window), 4 (the working time), and 6 (lapsed). A request may arrive at any time after it was sent, in any
//! order, or never, and its response may be lost or late. A process that is frozen takes its next step late. A host
//! that dies takes no more steps; so no step is needed for that. The kernel acts even then: it ends the fuse at its
//! deadline, and stops terraform. The model of the host (`lease_host.rs`) shows that the kernel does so whatever dies.
//!
//! The decisions are those of the program. This file only says which facts a process sees at each step.
//!
//! These reductions keep the states few, and lose nothing:
//!
//! - All times are ages, and the working time that is left. An age is not counted further once everything that depends
//!   on it has lapsed. So there is no end of time, and any number of renewals is sent.
//! - The holder counts from the moment at which the service answered, and not from the moment before it sent the request.
//!   The program stops earlier than that. So if this holder is stopped in time, the program is, too. A read is one step
//!   for the same reason.
//! - Renewals are known by their order alone, as the service compares them.
//! - A keeper may renew at any time, not only after an interval. A keeper that is restarted is one that reads again.
//! - The skew of the service's clocks is all on the side of the taker. Only the sum of both skews matters.
//! - Of two takers that have done nothing, the first one begins.
//! - What the service would refuse from now on is forgotten: a renewal for whose response nobody waits, and what a taker
//!   has read if it was replaced. A stopped terraform without its lock counts as over, for nothing can continue it.

use std::time::Duration;

use jiff::Timestamp;
use stateright::{Model, Property};

use crate::lease::fence::{FenceStep, Look, StoppedRun, next_step};
use crate::lease::keeper::{Answer, History, KeeperStep, Response, after_answer, next_renewal};
use crate::lease::record::{Claim, Promise, Record, Renewal};
use crate::lease::takeover::{AfterClaim, Circumstances, Permission, TakerStep, permission};
use crate::lease::terms::Terms;

/// The seconds of one step of time.
const STEP: u64 = 12;

/// The length of the lease, in seconds. All other times follow from it.
const LENGTH: u64 = 60;

/// An age in steps at which a lease and a claim have lapsed, whatever the skew. Ages are not counted further.
const LAPSED: i8 = 6;

/// The number of steps that a record must not change (13 s), and more than which is not counted.
const QUIET: u8 = 2;

/// The number of renewals that may be under way at once.
const MAX_IN_FLIGHT: usize = 3;

/// The time of this host's clock, and of the service, at each moment: all others are relative to it.
const CLOCK: Duration = Duration::from_hours(1);
const NOW: i64 = 1_790_000_000;

/// The lock's ID.
const ID: &str = "5e75cb05-d70c-4132-39e0-d2abba1b3077";

/// What terraform's backend locks with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Parts {
    /// The item has the record.
    Item,
    /// The object has the record. A renewal has the condition that the object is as it was read. A taker deletes it
    /// without a claim.
    Object,
    /// The item has the record. The object is deleted after the claim.
    Both,
}

/// The host of the holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Host {
    /// Its clock counts the time in which it is frozen or suspended.
    Steady,
    /// Its clock counts that time, but a fuse that has died cannot be replaced (no memory for a new process).
    NoSecondFuse,
    /// A virtual machine that can be paused. Its clock stands still then.
    Pausable,
}

/// A deliberate fault, which the model must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Fault {
    /// A renewal only has the condition that the lock is the run's.
    RenewsByIdentityAlone,
    /// A renewal has no condition at all.
    RenewsWithoutCondition,
    /// The holder counts from the arrival of the response.
    CountsFromTheReply,
    /// After a renewal that was refused, the holder counts from it although an older one is stored.
    CountsTheRefusedRenewal,
    /// A restarted keeper gives the fuse a deadline before its renewal is confirmed, while terraform is running.
    RestartedKeeperArms,
    /// A claim only has the condition that the lock is the run's.
    ClaimsByIdentityAlone,
    /// A stopped terraform is continued without a look at the lock.
    ContinuesWithoutLook,
    /// A renewal that was sent before the new fuse was armed counts as the one that terraform waits for.
    ContinuesAfterAnOlderRenewal,
    /// A host whose clock stands still promises a fence.
    PromisesWithoutClock,
    /// A taker deletes without a claim, on the condition that the lock is the run's.
    DeletesWithoutClaim,
    /// A taker deletes the record without any condition.
    DeletesWithoutCondition,
}

/// One setting of the model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) parts: Parts,
    pub(crate) host: Host,
    pub(crate) takers: usize,
    pub(crate) fault: Option<Fault>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Terraform {
    Running,
    /// The kernel has stopped it, because the fuse is gone.
    Stopped,
    /// It goes on without a fence. Its record promises none.
    Unfenced,
    /// It was killed, or it has ended.
    Over,
}

/// A renewal that was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Request {
    /// Its place among all renewals. 0 is a lock without a record.
    rank: u8,
    /// The age of its `renewed`.
    renewed: i8,
    /// How much of the working time is left that follows from it.
    left: u8,
    promises: bool,
    /// Object: the renewal that must be stored.
    if_match: u8,
}

/// The last response of the service that the keeper has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Known {
    /// The age of its `Date`.
    date: i8,
    /// How much of the working time is left that is counted from it.
    left: u8,
    /// Object: the renewal that it showed.
    stored: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Keeper {
    /// It must read first. It was started again, or a new fuse was.
    Starts,
    Idle(Known),
    /// It waits for the response to a renewal.
    Awaits(Known, Request),
    /// The response is on its way. It says whether the renewal was accepted, and has an age.
    Answered(Known, Request, bool, i8),
}

/// The process whose end stops terraform.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Fuse {
    Dead,
    /// It holds the stop pipe, and has no deadline yet.
    New,
    /// The steps until its deadline.
    Armed(u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Owner {
    Run,
    /// A run on the host of a taker.
    Successor,
}

/// What identifies the content of the part with the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Content {
    rank: u8,
    /// The taker that has claimed it, and the age of its claim. It is -1 if the service's clock was ahead.
    claim: Option<(u8, i8)>,
}

/// The part of the lock that has the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Stored {
    owner: Owner,
    content: Content,
    /// Of the renewal, as in [`Request`].
    renewed: i8,
    left: u8,
    promises: bool,
    /// How long it has not changed.
    unchanged: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Taker {
    /// It has done nothing yet.
    New,
    Idle,
    /// Its claim is under way. It has the condition that this is stored. The number is the age of the claim.
    Claiming(Content, i8),
    /// Its claim has arrived, or was refused. It reads what is stored now.
    Reading(Content, i8),
    DeletingObject,
    DeletingRecord,
    Done,
}

/// A state of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    terraform: Terraform,
    keeper: Keeper,
    fuse: Fuse,
    /// Whether a renewal was confirmed that belongs to the deadline of the new fuse.
    is_renewed: bool,
    stored: Option<Stored>,
    /// Both: whether the run's object is stored.
    has_object: bool,
    in_flight: [Option<Request>; MAX_IN_FLIGHT],
    takers: [Taker; 2],
    broken: Option<Broken>,
}

/// An invariant that does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Broken {
    /// Terraform may work, and its lock was claimed or deleted.
    TakenFromTheLiving,
    /// A taker has deleted the lock of another run.
    TookAnothers,
    /// A renewal has brought a lock back, or has changed another run's lock.
    Resurrected,
    /// The run is dead, and no taker that nobody disturbs gets its lock.
    NeverLapses,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    TimePasses,
    /// Time passes, and the clock of the holder's host stands still.
    TimePassesElsewhere,
    /// Terraform is killed, or everything on its host.
    TerraformDies,
    /// Terraform deletes its lock and exits.
    TerraformEnds,
    FuseDies,
    /// A keeper that has just started reads the lock. It may be a second one, after the death of the first.
    KeeperReads,
    SendRenewal,
    /// The keeper waits no longer for its response.
    GiveUpWaiting,
    RenewalArrives(usize),
    RenewalIsLost(usize),
    ResponseArrives,
    /// `tf` looks at its stopped terraform.
    Fence,
    /// Only with [`Fault::ContinuesWithoutLook`].
    Continue,
    /// A taker reads. `true`: the clock of the service's host that answers is ahead by a step.
    TakerLooks(usize, bool),
    ClaimArrives(usize),
    ReadAfterClaim(usize),
    Delete(usize),
    /// A terraform on another host takes the lock.
    SuccessorLocks,
}

/// The model.
#[derive(Clone, Debug)]
pub(crate) struct Lease {
    setup: Setup,
    terms: Terms,
    /// The answers of [`permission`], by the place of [`Lease::place`].
    may_take: Vec<bool>,
}

fn steps(duration: Duration) -> u8 {
    u8::try_from(duration.as_secs() / STEP).unwrap()
}

fn older(age: i8) -> i8 {
    (age + 1).min(LAPSED)
}

impl Lease {
    pub(crate) fn new(setup: Setup) -> Self {
        let terms = Terms::new(Duration::from_secs(LENGTH)).unwrap();
        let mut model = Self { setup, terms, may_take: vec![false; 1 << 10] };
        for renewed in 0..=LAPSED {
            for claim in std::iter::once(None).chain((-1..=LAPSED).map(Some)) {
                for unchanged in 0..=QUIET {
                    for is_ahead in [false, true] {
                        let place = Self::place(renewed, claim, unchanged, is_ahead);
                        model.may_take[place] = model.is_permitted(renewed, claim, unchanged, is_ahead);
                    }
                }
            }
        }
        model
    }

    fn place(renewed: i8, claim: Option<i8>, unchanged: u8, is_ahead: bool) -> usize {
        let claim = claim.map_or(0, |age| age + 2);
        let number = ((i32::from(renewed) * 9 + i32::from(claim)) * 3 + i32::from(unchanged)) * 2 + i32::from(is_ahead);
        usize::try_from(number).unwrap()
    }

    /// Whether a taker may claim or delete a lock of these ages, of which the record promises a fence.
    fn is_permitted(&self, renewed: i8, claim: Option<i8>, unchanged: u8, is_ahead: bool) -> bool {
        let date = |age: i8| NOW - i64::from(age) * 12;
        let renewal = Renewal { renewed: date(renewed), beat: 1 };
        let mut record = Record::new(ID, self.terms, renewal, Promise::Stop);
        record.taken = claim.map(|age| Claim { by: String::new(), at: date(age), number: 1 });
        let now = Timestamp::from_second(date(-i8::from(is_ahead))).unwrap();
        let unchanged_for = Duration::from_secs(u64::from(unchanged) * STEP);
        let circumstances = Circumstances {
            consent: true,
            is_same_region: true,
            unchanged_for,
            response_time: Duration::ZERO,
            host_agrees: true,
            runs_here: false,
        };
        permission(Ok(&record), now, circumstances) == Permission::Yes
    }

    fn may_take(&self, stored: &Stored, is_ahead: bool) -> bool {
        let claim = stored.content.claim.map(|(_, age)| age);
        // Without a record, or without a fence, it is never permitted (`Obstacle::NoLease`, `Obstacle::NoFence`).
        stored.owner == Owner::Run
            && stored.content.rank > 0
            && stored.promises
            && self.may_take[Self::place(stored.renewed, claim, stored.unchanged, is_ahead)]
    }

    fn has(&self, fault: Fault) -> bool {
        self.setup.fault == Some(fault)
    }

    // The holder's host.

    fn fuse_ends(state: &mut State) {
        state.fuse = Fuse::Dead;
        state.is_renewed = false;
        if state.terraform == Terraform::Running {
            state.terraform = Terraform::Stopped;
        }
    }

    /// A whole step of time passes for the service, and for the host unless its clock stands still.
    fn time_passes(state: &mut State, on_the_host: bool) {
        let host = u8::from(on_the_host);
        if let Some(stored) = &mut state.stored {
            stored.renewed = older(stored.renewed);
            stored.left = stored.left.saturating_sub(host);
            stored.unchanged = (stored.unchanged + 1).min(QUIET);
            stored.content.claim = stored.content.claim.map(|(taker, age)| (taker, older(age)));
        }
        let later = |request: &mut Request| {
            request.renewed = older(request.renewed);
            request.left = request.left.saturating_sub(host);
        };
        let known_later = |known: &mut Known| {
            known.date = older(known.date);
            known.left = known.left.saturating_sub(host);
        };
        state.in_flight.iter_mut().flatten().for_each(later);
        match &mut state.keeper {
            Keeper::Starts => {}
            Keeper::Idle(known) => known_later(known),
            Keeper::Awaits(known, request) => {
                known_later(known);
                later(request);
            }
            Keeper::Answered(known, request, _, age) => {
                known_later(known);
                later(request);
                *age = older(*age);
            }
        }
        for taker in &mut state.takers {
            if let Taker::Claiming(read, at) | Taker::Reading(read, at) = taker {
                *at = older(*at);
                read.claim = read.claim.map(|(taker, age)| (taker, older(age)));
            }
        }
        if let Fuse::Armed(left) = state.fuse {
            state.fuse = Fuse::Armed(left.saturating_sub(host));
            if left <= host {
                Self::fuse_ends(state);
            }
        }
    }

    fn is_intact(state: &State) -> bool {
        state.stored.is_some_and(|stored| stored.owner == Owner::Run && stored.content.claim.is_none())
    }

    /// A keeper reads the lock. `None` if it is lost: then terraform is killed, which is a step of its own.
    fn keeper_reads(&self, state: &mut State) -> Option<()> {
        if !Self::is_intact(state) {
            return None;
        }
        let working = steps(self.terms.working_time());
        state.keeper = Keeper::Idle(Known { date: 0, left: working, stored: self.etag(state) });
        // The fuse is armed before the first renewal is sent. Terraform does not run, or the lock has no record.
        if state.fuse == Fuse::New || self.has(Fault::RestartedKeeperArms) && matches!(state.fuse, Fuse::Armed(_)) {
            state.fuse = Fuse::Armed(working);
        }
        Some(())
    }

    fn etag(&self, state: &State) -> u8 {
        match self.setup.parts {
            Parts::Object => state.stored.map_or(0, |stored| stored.content.rank),
            Parts::Item | Parts::Both => 0,
        }
    }

    /// If the fuse is gone, the keeper sends a renewal that promises no fence, if no new fuse can be made, and one for
    /// a terraform that is stopped. It sends none to a new fuse without a deadline.
    fn send(&self, state: &mut State) -> Option<()> {
        let Keeper::Idle(known) = state.keeper else { return None };
        let gives_up_the_fence = state.fuse == Fuse::Dead && self.setup.host == Host::NoSecondFuse;
        let is_for_the_stopped = state.fuse == Fuse::Dead && state.terraform == Terraform::Stopped;
        if !matches!(state.fuse, Fuse::Armed(_)) && !gives_up_the_fence && !is_for_the_stopped {
            return None;
        }
        let sent = (CLOCK + step(known.left)).checked_sub(self.terms.working_time()).unwrap();
        let date = Timestamp::from_second(NOW - i64::from(known.date) * 12).unwrap();
        let next = next_renewal(self.terms, Response { sent, read: sent, date }, CLOCK, Promise::Stop, None);
        let rank = Self::ranks(state).into_iter().max().unwrap_or(0) + 1;
        let promises = match self.setup.host {
            Host::Steady | Host::NoSecondFuse => !gives_up_the_fence,
            Host::Pausable => self.has(Fault::PromisesWithoutClock),
        };
        let request = Request {
            rank,
            renewed: i8::try_from((NOW - next.renewal.renewed) / 12).unwrap(),
            left: steps(next.deadline.saturating_sub(CLOCK)),
            promises,
            if_match: known.stored,
        };
        let is_small = self.setup.takers == 1 && self.setup.host != Host::Pausable && self.setup.fault.is_none();
        let max = if is_small { MAX_IN_FLIGHT } else { MAX_IN_FLIGHT - 1 };
        *state.in_flight.iter_mut().rev().take(max).find(|request| request.is_none())? = Some(request);
        state.keeper = Keeper::Awaits(known, request);
        Some(())
    }

    /// The service accepts the renewal if its condition is true.
    fn arrive(&self, state: &mut State, request: Request) -> bool {
        let is_run_s = state.stored.is_some_and(|stored| stored.owner == Owner::Run);
        if self.has(Fault::RenewsWithoutCondition) && !is_run_s {
            state.broken = Some(Broken::Resurrected);
        }
        let Some(stored) = state.stored.as_mut().filter(|stored| stored.owner == Owner::Run) else { return false };
        let number = |renewed: i8, rank: u8| Renewal { renewed: NOW - i64::from(renewed) * 12, beat: u64::from(rank) };
        let before = (stored.content.rank > 0).then(|| number(stored.renewed, stored.content.rank));
        let is_met = match self.setup.parts {
            Parts::Object => stored.content.rank == request.if_match,
            Parts::Item | Parts::Both => number(request.renewed, request.rank).replaces(before),
        };
        let is_unconditional = self.has(Fault::RenewsByIdentityAlone) || self.has(Fault::RenewsWithoutCondition);
        if stored.content.claim.is_some() || !(is_met || is_unconditional) {
            return false;
        }
        let Request { rank, renewed, left, promises, .. } = request;
        let content = Content { rank, claim: None };
        *stored = Stored { owner: Owner::Run, content, renewed, left, promises, unchanged: 0 };
        true
    }

    /// The response to a renewal arrives. If it was refused, the keeper reads the lock.
    fn respond(&self, state: &mut State) -> Option<()> {
        let Keeper::Answered(_, request, is_accepted, age) = state.keeper else { return None };
        let working = steps(self.terms.working_time());
        let seen = state.stored.filter(|_| Self::is_intact(state));
        let answer = match (is_accepted, seen) {
            (true, _) => Answer::Renewed,
            (false, Some(stored)) if stored.content.rank > 0 => Answer::RenewedBefore,
            (false, _) => Answer::Lost,
        };
        let history = History { may_have_a_record: true, has_interrupted: false };
        if after_answer(self.terms, history, answer, Duration::ZERO) != KeeperStep::TellDeadline {
            // Terraform is killed.
            return None;
        }
        // An item that refused a renewal has the same one or a newer one. An object that refused it may have an older
        // one, so the keeper counts from the renewal that it has read.
        let (left, promises) = match (answer, seen) {
            (Answer::RenewedBefore, Some(stored)) => match self.setup.parts {
                Parts::Object if !self.has(Fault::CountsTheRefusedRenewal) => (stored.left, stored.promises),
                _ => (request.left, stored.promises),
            },
            _ => (request.left, request.promises),
        };
        let left = if self.has(Fault::CountsFromTheReply) { working } else { left };
        // After a read, its own `Date` counts.
        let date = if is_accepted { age } else { 0 };
        let known_left = working.saturating_sub(u8::try_from(date).unwrap());
        let stored = if is_accepted { request.rank } else { self.etag(state) };
        let stored = if self.setup.parts == Parts::Object { stored } else { 0 };
        state.keeper = Keeper::Idle(Known { date, left: known_left, stored });
        match state.fuse {
            Fuse::Armed(now) => {
                state.fuse = Fuse::Armed(now.max(left));
                if state.terraform == Terraform::Stopped {
                    state.is_renewed |= left >= now || self.has(Fault::ContinuesAfterAnOlderRenewal);
                }
                if state.fuse == Fuse::Armed(0) {
                    Self::fuse_ends(state);
                }
            }
            Fuse::Dead if !promises && self.setup.host == Host::NoSecondFuse => state.is_renewed = true,
            Fuse::Dead | Fuse::New => {}
        }
        Some(())
    }

    /// `tf` decides what happens to its stopped terraform.
    fn fence(&self, state: &mut State) -> Option<()> {
        if state.terraform != Terraform::Stopped {
            return None;
        }
        let run = StoppedRun {
            is_rearmed: state.fuse != Fuse::Dead,
            can_rearm: self.setup.host != Host::NoSecondFuse,
            is_renewed: state.is_renewed,
            has_person: true,
            interrupts: 0,
            stopped_for: Duration::ZERO,
        };
        // After a confirmed renewal, nothing is read again.
        let look = if state.is_renewed || Self::is_intact(state) { Look::Ours } else { Look::Lost };
        match next_step(self.terms, look, run) {
            FenceStep::Rearm => {
                state.fuse = Fuse::New;
                // What the keeper has sent before does not count.
                if !self.has(Fault::ContinuesAfterAnOlderRenewal) {
                    state.keeper = Keeper::Starts;
                }
            }
            FenceStep::Continue if state.fuse == Fuse::Dead => state.terraform = Terraform::Unfenced,
            FenceStep::Continue => state.terraform = Terraform::Running,
            FenceStep::End(_) => state.terraform = Terraform::Over,
            // The keeper sends it.
            FenceStep::Renew | FenceStep::RenewWithoutFence | FenceStep::LookAgain => return None,
        }
        Some(())
    }

    // The takers.

    /// A taker reads the lock. It has watched it all the time, so that it may act as early as possible.
    fn look(&self, state: &mut State, number: usize, is_ahead: bool) -> Option<()> {
        let stored = state.stored.filter(|stored| self.may_take(stored, is_ahead))?;
        state.takers[number] = if self.has(Fault::DeletesWithoutClaim) {
            Taker::DeletingRecord
        } else {
            Taker::Claiming(stored.content, -i8::from(is_ahead))
        };
        Some(())
    }

    fn claim_arrives(&self, state: &mut State, number: usize) -> Option<()> {
        let Taker::Claiming(read, at) = state.takers[number] else { return None };
        let is_any = self.has(Fault::ClaimsByIdentityAlone);
        let is_met = |stored: &Stored| stored.owner == Owner::Run && (is_any || stored.content == read);
        if self.setup.parts == Parts::Object {
            // There is no claim. The delete has the condition that the object is what was read.
            if state.stored.as_ref().is_some_and(is_met) {
                state.stored = None;
            }
            state.takers[number] = Taker::Done;
            return Some(());
        }
        if let Some(stored) = state.stored.as_mut().filter(|stored| is_met(stored)) {
            stored.content.claim = Some((u8::try_from(number).unwrap(), at));
            stored.unchanged = 0;
        }
        state.takers[number] = Taker::Reading(read, at);
        Some(())
    }

    fn read_after_claim(&self, state: &mut State, number: usize) -> Option<()> {
        let Taker::Reading(read, at) = state.takers[number] else { return None };
        let ours = Some((u8::try_from(number).unwrap(), at));
        let after = match state.stored.filter(|stored| stored.owner == Owner::Run) {
            Some(stored) if stored.content.claim == ours => AfterClaim::Ours,
            Some(stored) if stored.content == read => AfterClaim::Unchanged,
            Some(_) => AfterClaim::Changed,
            None => AfterClaim::Gone,
        };
        state.takers[number] = match after.next() {
            TakerStep::Delete if self.setup.parts == Parts::Both => Taker::DeletingObject,
            TakerStep::Delete => Taker::DeletingRecord,
            TakerStep::Done => Taker::Done,
            TakerStep::ClaimAgain => Taker::Claiming(read, at),
            TakerStep::LookAgain => Taker::Idle,
        };
        Some(())
    }

    fn delete(&self, state: &mut State, number: usize) -> Option<()> {
        match state.takers[number] {
            Taker::DeletingObject => {
                // It is deleted on the condition that its ID is the claim's.
                state.has_object = false;
                state.takers[number] = Taker::DeletingRecord;
            }
            Taker::DeletingRecord => {
                let ours = u8::try_from(number).unwrap();
                let is_met = state.stored.is_some_and(|stored| {
                    let is_claimed = stored.content.claim.is_some_and(|(taker, _)| taker == ours);
                    stored.owner == Owner::Run && (is_claimed || self.has(Fault::DeletesWithoutClaim))
                });
                if is_met || self.has(Fault::DeletesWithoutCondition) {
                    if state.stored.is_some_and(|stored| stored.owner == Owner::Successor) {
                        state.broken = Some(Broken::TookAnothers);
                    }
                    state.stored = None;
                }
                state.takers[number] = Taker::Done;
            }
            _ => return None,
        }
        Some(())
    }

    // The invariants.

    fn check(&self, state: &mut State) {
        let runs = matches!(state.terraform, Terraform::Running | Terraform::Unfenced);
        let is_whole = state.has_object || self.setup.parts != Parts::Both;
        if runs && !(Self::is_intact(state) && is_whole) {
            state.broken = Some(Broken::TakenFromTheLiving);
        }
        if state.broken.is_none() && state.terraform == Terraform::Over && !self.lapses(state) {
            state.broken = Some(Broken::NeverLapses);
        }
    }

    /// Whether a taker that nobody disturbs gets the lock of the dead run, even if all other takers have died.
    fn lapses(&self, state: &State) -> bool {
        let is_run_s = state.stored.filter(|stored| stored.owner == Owner::Run);
        let Some(stored) = is_run_s.filter(|stored| stored.content.rank > 0 && stored.promises) else { return true };
        // The taker takes another number than that of a claim.
        let number = stored.content.claim.map_or(0, |(taker, _)| usize::from(1 - taker));
        let mut state = *state;
        state.in_flight = [None; MAX_IN_FLIGHT];
        state.takers[number] = Taker::Idle;
        for _ in 0..=2 * LAPSED {
            if self.look(&mut state, number, false).is_some() {
                self.claim_arrives(&mut state, number);
                self.read_after_claim(&mut state, number);
                self.delete(&mut state, number);
                self.delete(&mut state, number);
                return state.stored.is_none() && !state.has_object;
            }
            Self::time_passes(&mut state, true);
        }
        false
    }

    // Equal states.

    /// Returns every rank that is in use.
    fn ranks(state: &State) -> Vec<u8> {
        let mut ranks = Vec::with_capacity(12);
        Self::each_rank(&mut state.clone(), &mut |rank| ranks.push(*rank));
        ranks
    }

    fn each_rank(state: &mut State, act: &mut impl FnMut(&mut u8)) {
        if let Some(stored) = &mut state.stored {
            act(&mut stored.content.rank);
        }
        for request in state.in_flight.iter_mut().flatten() {
            act(&mut request.rank);
            act(&mut request.if_match);
        }
        match &mut state.keeper {
            Keeper::Starts => {}
            Keeper::Idle(known) => act(&mut known.stored),
            Keeper::Awaits(known, request) | Keeper::Answered(known, request, ..) => {
                act(&mut known.stored);
                act(&mut request.rank);
                act(&mut request.if_match);
            }
        }
        for taker in &mut state.takers {
            if let Taker::Claiming(read, _) | Taker::Reading(read, _) = taker {
                act(&mut read.rank);
            }
        }
    }

    /// Gives equal values to everything that can make no difference any more.
    fn forget(&self, state: &mut State) {
        let is_unconditional = self.has(Fault::RenewsByIdentityAlone) || self.has(Fault::RenewsWithoutCondition);
        let is_accepted = matches!(state.keeper, Keeper::Answered(_, _, true, _));
        let is_lost = !Self::is_intact(state) && !state.is_renewed && !is_accepted;
        if state.terraform == Terraform::Stopped && is_lost && !is_unconditional {
            // No renewal is accepted any more, and without one it is not continued.
            state.terraform = Terraform::Over;
        }
        let is_over = state.terraform == Terraform::Over;
        if is_over {
            (state.keeper, state.fuse, state.is_renewed) = (Keeper::Starts, Fuse::Dead, false);
        }
        if state.terraform == Terraform::Unfenced {
            // Its keeper goes on with records that promise nothing. No taker acts on them.
            (state.keeper, state.is_renewed) = (Keeper::Starts, false);
        }
        let is_final = |stored: &Stored| stored.owner == Owner::Successor || stored.content.claim.is_some();
        for (number, taker) in state.takers.iter_mut().enumerate() {
            if let Taker::Claiming(read, at) | Taker::Reading(read, at) = taker {
                let ours = Some((u8::try_from(number).unwrap(), *at));
                let may_match = state.stored.is_some_and(|stored| {
                    stored.owner == Owner::Run && (stored.content == *read || stored.content.claim == ours)
                });
                if !may_match && !self.has(Fault::ClaimsByIdentityAlone) {
                    // What it has read never comes back, so its claim is refused. (No claim is of a lock without
                    // record.)
                    (*read, *at) = (Content { rank: 0, claim: None }, LAPSED);
                }
            }
        }
        for slot in &mut state.in_flight {
            let Some(request) = slot else { continue };
            let awaited = match state.keeper {
                Keeper::Awaits(_, awaited) => Some(awaited.rank),
                _ => None,
            };
            let is_refused = match state.stored {
                None => true,
                Some(stored) if is_final(&stored) => true,
                Some(stored) if self.setup.parts == Parts::Object => {
                    // A renewal is stored once, and an ETag never comes back.
                    request.if_match != stored.content.rank
                }
                Some(stored) => request.rank <= stored.content.rank,
            };
            if is_refused && awaited != Some(request.rank) && !is_unconditional {
                *slot = None;
            } else if is_over {
                request.left = 0;
            }
        }
        if let Some(stored) = &mut state.stored
            && (self.setup.parts != Parts::Object || is_over)
        {
            stored.left = 0;
        }
        // The ranks of what is stored and of what may be stored, from 1 on.
        let mut ranks = Self::ranks(state);
        ranks.push(0);
        ranks.sort_unstable();
        ranks.dedup();
        Self::each_rank(state, &mut |rank| {
            *rank = u8::try_from(ranks.binary_search(rank).unwrap()).unwrap();
        });
        state.in_flight.sort_unstable();
    }
}

fn step(steps: u8) -> Duration {
    Duration::from_secs(u64::from(steps) * STEP)
}

impl Model for Lease {
    type State = State;
    type Action = Action;

    /// Terraform holds the lock, and its log shows it. The fuse has no deadline yet.
    fn init_states(&self) -> Vec<State> {
        vec![State {
            terraform: Terraform::Running,
            keeper: Keeper::Starts,
            fuse: Fuse::New,
            is_renewed: false,
            stored: Some(Stored {
                owner: Owner::Run,
                content: Content { rank: 0, claim: None },
                renewed: 0,
                left: 0,
                promises: true,
                unchanged: 0,
            }),
            has_object: self.setup.parts == Parts::Both,
            in_flight: [None; MAX_IN_FLIGHT],
            takers: [Taker::New; 2],
            broken: None,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.broken.is_some() {
            return;
        }
        actions.push(Action::TimePasses);
        if self.setup.host == Host::Pausable {
            actions.push(Action::TimePassesElsewhere);
        }
        if state.terraform != Terraform::Over {
            actions.extend([
                Action::TerraformDies,
                Action::TerraformEnds,
                Action::FuseDies,
                Action::KeeperReads,
                Action::SendRenewal,
                Action::GiveUpWaiting,
                Action::ResponseArrives,
                Action::Fence,
            ]);
            if self.has(Fault::ContinuesWithoutLook) {
                actions.push(Action::Continue);
            }
        }
        for number in 0..MAX_IN_FLIGHT {
            if state.in_flight[number].is_some() {
                actions.extend([Action::RenewalArrives(number), Action::RenewalIsLost(number)]);
            }
        }
        for number in 0..self.setup.takers {
            match state.takers[number] {
                Taker::New if number > 0 && state.takers[number - 1] == Taker::New => {}
                Taker::New | Taker::Idle => {
                    actions.extend([Action::TakerLooks(number, false), Action::TakerLooks(number, true)]);
                }
                Taker::Claiming(..) => actions.push(Action::ClaimArrives(number)),
                Taker::Reading(..) => actions.push(Action::ReadAfterClaim(number)),
                Taker::DeletingObject | Taker::DeletingRecord => actions.push(Action::Delete(number)),
                Taker::Done => {}
            }
        }
        if state.stored.is_none() && !state.has_object {
            actions.push(Action::SuccessorLocks);
        }
    }

    fn next_state(&self, last: &State, action: Action) -> Option<State> {
        let mut state = *last;
        self.act(&mut state, action)?;
        if state.broken.is_none() {
            self.check(&mut state);
        }
        self.forget(&mut state);
        (state != *last).then_some(state)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![Property::always("every invariant holds", |_, state: &State| state.broken.is_none())]
    }
}

impl Lease {
    /// Does `action`. `None` if it is not possible in this state.
    fn act(&self, state: &mut State, action: Action) -> Option<()> {
        match action {
            Action::TimePasses => Self::time_passes(state, true),
            Action::TimePassesElsewhere => Self::time_passes(state, false),
            Action::TerraformDies => state.terraform = Terraform::Over,
            Action::TerraformEnds => {
                if !matches!(state.terraform, Terraform::Running | Terraform::Unfenced) {
                    return None;
                }
                (state.terraform, state.stored, state.has_object) = (Terraform::Over, None, false);
            }
            Action::FuseDies => {
                // Before the fuse is armed there is no lease.
                (state.fuse != Fuse::Dead && state.keeper != Keeper::Starts).then_some(())?;
                Self::fuse_ends(state);
            }
            Action::KeeperReads => self.keeper_reads(state)?,
            Action::SendRenewal => self.send(state)?,
            Action::GiveUpWaiting => match state.keeper {
                Keeper::Awaits(known, _) | Keeper::Answered(known, ..) => state.keeper = Keeper::Idle(known),
                Keeper::Starts | Keeper::Idle(_) => return None,
            },
            Action::RenewalArrives(number) => {
                let request = state.in_flight[number].take()?;
                let is_accepted = self.arrive(state, request);
                if let Keeper::Awaits(known, awaited) = state.keeper
                    && awaited.rank == request.rank
                {
                    state.keeper = Keeper::Answered(known, awaited, is_accepted, 0);
                }
            }
            Action::RenewalIsLost(number) => state.in_flight[number] = None,
            Action::ResponseArrives => self.respond(state)?,
            Action::Fence => self.fence(state)?,
            Action::Continue => {
                (state.terraform == Terraform::Stopped).then_some(())?;
                state.fuse = Fuse::Armed(steps(self.terms.working_time()));
                state.terraform = Terraform::Running;
            }
            Action::TakerLooks(number, is_ahead) => self.look(state, number, is_ahead)?,
            Action::ClaimArrives(number) => self.claim_arrives(state, number)?,
            Action::ReadAfterClaim(number) => self.read_after_claim(state, number)?,
            Action::Delete(number) => self.delete(state, number)?,
            Action::SuccessorLocks => {
                let content = Content { rank: 0, claim: None };
                let stored =
                    Stored { owner: Owner::Successor, content, renewed: 0, left: 0, promises: false, unchanged: 0 };
                state.stored = Some(stored);
            }
        }
        Some(())
    }
}

impl State {
    pub(crate) fn broken(&self) -> Option<Broken> {
        self.broken
    }
}
