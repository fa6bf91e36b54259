//! The model of one run, of everything that may release its lock, and of everything that may disturb them.
//!
//! A state holds the two parts of the lock, the requests in flight, and the program counter of each process. A process
//! takes one step at a time, and any other process may take its step in between. So a process that is frozen, or a host
//! that is slow, is a process whose next step comes late. A process that is killed takes no more steps, but its
//! requests stay in flight.
//!
//! The decisions are those of the program. This file only says which facts a process sees at each step.

use std::fmt;

use nix::sys::signal::Signal;
use nix::unistd::Pid;
use stateright::{Model, Property};

use crate::aws::failure::Failure;
use crate::cleanup::after_run::died;
use crate::cleanup::clean_up::{CleanUpStep, Cleaned, ORDER};
use crate::cleanup::end_of_run::EndOfRun;
use crate::cleanup::recovery_plan::{Facts, Mode, Sight, Treatment, treatment};
use crate::cleanup::release_all::{ReleaseResult, abandoned_requests, may_still_come};
use crate::holder::evidence::{self, Claim, Seen, Verdict};
use crate::journal::membership::{Membership, ProcessMark, TreeIdentity, classify};
use crate::journal::run_state::{RunState, RunTraces};
use crate::lock::deleted::Deleted;
use crate::lock::dynamodb::InfoAttribute;
use crate::lock::outcome::{AnothersLock, Because, Outcome, Released};
use crate::lock::proof::{Match, Run, judge};
use crate::lock::release_step::{
    ItemHistory, Judged, LateWrites, Look, PartRead, PartStep, PartsLook, QUIET_WINDOW, QuietLimits, QuietStep,
    QuietWait, Step as ReleaseStep, is_released_by_another, may_item_follow, must_be_read_again, needs_quiet,
};
use crate::lock::stores::{Removed, StoredLock, removed};
use crate::sys::process::Process;
use crate::sys::wait::Ended;
use crate::terraform::lock_info::LockInfo;
use crate::terraform::log::tests::{ID, lock_line, unlock_line};
use crate::terraform::log::{Log, RecordedLock};

/// The parts of the lock. Their numbers are the order in which a release reads them.
const ITEM: usize = 0;
const OBJECT: usize = 1;

/// Who a stored part belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Owner {
    /// The run of `tf`.
    Run,
    /// A terraform on another host, without `tf`.
    Contender,
}

/// What terraform's backend locks with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Parts {
    Item,
    Object,
    Both,
    /// Both, and the item has a lease record.
    BothLeased,
}

impl Parts {
    /// The order in which terraform takes the parts, and in which it deletes them (internal/backend/remote-state/s3,
    /// `Lock` and `Unlock`).
    fn terraforms_order(self) -> &'static [usize] {
        match self {
            Self::Item => &[ITEM],
            Self::Object => &[OBJECT],
            Self::Both | Self::BothLeased => &[OBJECT, ITEM],
        }
    }

    /// The order in which a release reads and deletes them (`LockLocation::store_keys`). An item with a lease waits
    /// after its first read, and is read once more and deleted after the object (`Judged::Waits`). The second read of
    /// the object is left out if the first one proves that it is gone (`must_be_read_again`).
    fn our_order(self) -> &'static [usize] {
        match self {
            Self::Item => &[ITEM],
            Self::Object => &[OBJECT],
            Self::Both => &[ITEM, OBJECT],
            Self::BothLeased => &[ITEM, OBJECT, OBJECT, ITEM],
        }
    }

    fn in_the_log(self) -> &'static str {
        match self {
            Self::Item => "DynamoDB only",
            Self::Object => "S3 Native only",
            Self::Both | Self::BothLeased => "S3 Native and DynamoDB",
        }
    }
}

/// A process that terraform starts for a provisioner. It changes real resources as long as it is alive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum ChildKind {
    /// There is no such process.
    None,
    /// It stays in terraform's group, and has the mark and the lifeline.
    Ordinary,
    /// It leaves the group, clears its environment and closes its descriptors.
    Detached,
    /// It does the same, and `tf` may not signal it, for example because it belongs to another user.
    Untouchable,
}

/// A deliberate fault, which the model must find.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Fault {
    /// A delete of ours has no condition.
    DeleteWithoutCondition,
    /// A release never waits for a write in flight.
    NoQuietWindow,
    /// A terraform that exits with 1 counts as one that has finished its operation.
    ExitCodeDecides,
    /// The record that `tf` leaves does not have the processes that outlived the run.
    SurvivorsForgotten,
    /// The pending request is written after the record of the run was deleted.
    RememberedTooLate,
    /// A recovery finishes a run although something of it is alive.
    RecoveryDoesNotLook,
    /// A request counts as refused if another run has only one of the lock's parts.
    HalfIsWhole,
}

/// One setting of the model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Setup {
    pub(crate) parts: Parts,
    pub(crate) child: ChildKind,
    /// How many times a process is killed, or terraform is interrupted twice behind the back of `tf`.
    pub(crate) kills: u8,
    pub(crate) fault: Option<Fault>,
}

/// How far terraform's log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Logged {
    Nothing,
    Asked,
    Held,
    Writing,
    Unlocking,
    Gone,
}

const LOGGED: [Logged; 6] =
    [Logged::Nothing, Logged::Asked, Logged::Held, Logged::Writing, Logged::Unlocking, Logged::Gone];

/// How terraform ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Exit {
    Success,
    Failure,
    Killed,
}

/// What terraform does. The number is a place in [`Parts::terraforms_order`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Terraform {
    Start,
    /// It has requested a part, and waits for the response.
    Ask(usize),
    /// It has deleted the object again, because the item was refused, and waits for the response.
    Undo,
    Work,
    Write,
    /// It has requested the delete of a part, and waits for the response.
    Unlock(usize),
    Ended(Exit),
}

impl Terraform {
    fn is_alive(self) -> bool {
        !matches!(self, Self::Ended(_))
    }
}

/// The requests that were sent and have not landed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Network {
    /// Lock requests of the run's terraform. They land only where nothing is stored.
    puts: [u8; 2],
    /// The delete with which terraform takes back its object. It is unconditional.
    undo: bool,
    /// The deletes of terraform's unlock. They are unconditional.
    deletes: [bool; 2],
    /// A write of the state. It is unconditional.
    write: bool,
    /// Deletes of ours whose process was killed. They are conditional on the run's lock.
    strays: [u8; 2],
}

/// The process that terraform started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Child {
    None,
    /// It has terraform's group, mark and lifeline.
    Inside,
    /// It has left the group. `tf` has not recorded it yet.
    Left,
    /// It has left the group, and was recorded.
    Recorded,
    Dead,
}

impl Child {
    fn is_alive(self) -> bool {
        matches!(self, Self::Inside | Self::Left | Self::Recorded)
    }
}

/// The result for one part, as [`Judged`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum PartResult {
    Unread,
    Absent,
    Deleted,
    Anothers,
    NeedsQuiet,
    Waits,
}

fn judged(part: PartResult) -> Result<Judged, Failure> {
    Ok(match part {
        PartResult::Absent => Judged::Absent,
        PartResult::Deleted => Judged::Deleted,
        PartResult::Anothers => Judged::Anothers(CONTENDER_ID.to_owned()),
        PartResult::NeedsQuiet => Judged::NeedsQuiet,
        PartResult::Waits => Judged::Waits,
        PartResult::Unread => unreachable!("each part was read"),
    })
}

/// Where a release is. A number is a place in [`Parts::our_order`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum At {
    Read(usize),
    /// The delete is in flight.
    Deleting(usize),
    /// The delete has landed. `true`: its condition was met.
    ReadAgain(usize, bool),
    Combine,
    /// The wait for a write in flight. The fields are what the last read of the wait has shown.
    Quiet([Option<Owner>; 2], u8),
}

/// A release of the run's lock (`lock::release::Attempt`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Release {
    at: At,
    parts: [PartResult; 2],
    asked_to_go: [bool; 2],
    was_deleted: bool,
    /// Whether the item has waited for the object.
    has_waited: bool,
    is_quiet: bool,
    waits: u8,
    /// The parts that the previous look has not proved to be absent.
    before: Option<[bool; 2]>,
    is_late_window_over: bool,
}

impl Release {
    const NEW: Self = Self {
        at: At::Read(0),
        parts: [PartResult::Unread; 2],
        asked_to_go: [false; 2],
        was_deleted: false,
        has_waited: false,
        is_quiet: false,
        waits: 0,
        before: None,
        is_late_window_over: false,
    };
}

/// The result of a release, as [`Outcome`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum ReleaseResultKind {
    Released,
    Absent { anothers: Option<bool> },
    Later,
}

/// What a process that cleans up does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Cleaner {
    /// It waits for the end of terraform.
    Watch,
    /// It judges how terraform ended, and ends what is left of its tree.
    EndTree,
    /// It is at this step of [`ORDER`].
    Step(usize, Release, Option<ReleaseResultKind>),
    /// `tf` alone: it has reported to its guardian that the run is over. Next, the record is closed.
    Close(Option<ReleaseResultKind>),
    /// The record is closed, and the requests that may still land are written only now. This step exists only with
    /// [`Fault::RememberedTooLate`].
    Late(Option<ReleaseResultKind>),
    /// It has exited.
    Done,
    Killed,
}

impl Cleaner {
    fn is_alive(self) -> bool {
        !matches!(self, Self::Done | Self::Killed)
    }
}

/// The next `tf` on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Next {
    /// None is running.
    None,
    /// It finishes the run. `true`: nothing else of the run was alive or in flight when it began.
    Finish(Cleaner, bool),
    /// It looks for the lock of a pending request.
    Pending(Release, bool),
}

/// The run's record in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Record {
    /// Whether the record has the process that left the group.
    has_survivor: bool,
}

/// A terraform on another host, without `tf`. Its requests are answered at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Contender {
    /// It has taken this many parts, in terraform's order.
    Takes(usize),
    Works,
    /// It has deleted this many parts.
    Frees(usize),
    Ended,
}

/// A process that may be killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Victim {
    Terraform,
    Tf,
    Guardian,
    Next,
    Contender,
    /// Terraform, `tf` and its guardian at once, as when a container is killed.
    WholeRun,
}

/// A process that cleans up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Who {
    Tf,
    Guardian,
    Next,
}

/// An invariant that does not hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Broken {
    /// A delete of ours has removed the contender's part.
    TookAnothers,
    /// A delete of ours has removed the lock of a run that may still change something.
    TookLiving,
    /// A request of the run's dead terraform has hit the contender, because the lock was released too early.
    HitByLateRequest,
    /// Two terraforms hold the lock and may write.
    TwoHolders,
    /// A `tf` that nothing disturbed has left the lock of the dead run.
    LeftBehind,
    /// `tf locks` calls the holder dead, and it is alive.
    CalledDead,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct State {
    store: [Option<Owner>; 2],
    /// How many writes of the run's state have landed.
    writes: u8,
    network: Network,
    terraform: Terraform,
    logged: Logged,
    /// Whether terraform has logged that it leaves its operation.
    is_canceled: bool,
    /// Whether the SDK has repeated the request that terraform waits for.
    is_repeated: bool,
    child: Child,
    tf: Cleaner,
    guardian: Cleaner,
    /// Whether the guardian knows the process that left the group.
    guardian_knows: bool,
    next: Next,
    record: Option<Record>,
    is_pending: bool,
    contender: Contender,
    kills: u8,
    broken: Option<Broken>,
}

impl State {
    pub(crate) fn broken(&self) -> Option<Broken> {
        self.broken
    }

    fn kill(&mut self) -> Option<()> {
        self.kills = self.kills.checked_sub(1)?;
        Some(())
    }

    /// Whether the run may still change the state or a resource. A process that outlives a terraform which has given
    /// its lock back does not count: terraform has left it on purpose.
    fn may_write(&self) -> bool {
        self.terraform.is_alive() || self.child.is_alive() || self.network.write
    }

    /// Whether a process looks for those that have left the group: `tf` while terraform is running and while it ends
    /// the rest of its tree, and its guardian after the death of `tf`.
    fn tree_is_watched(&self) -> bool {
        let watches = |cleaner| matches!(cleaner, Cleaner::Watch | Cleaner::EndTree);
        watches(self.tf) || (!self.tf.is_alive() && watches(self.guardian))
    }

    /// Whether nothing of the run is alive or in flight.
    fn is_settled(&self) -> bool {
        !self.terraform.is_alive()
            && !self.child.is_alive()
            && !self.tf.is_alive()
            && !self.guardian.is_alive()
            && self.network == Network::default()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// Terraform takes its next step without a response.
    Terraform,
    /// Terraform's SDK sends the lock request again.
    Repeat,
    /// A lock request lands, and the response arrives if terraform waits for it (`true`) or is lost.
    LandPut(usize, bool),
    LosePut(usize),
    /// Terraform's SDK has used up its attempts.
    GiveUp,
    LandWrite,
    LandDelete(usize),
    LandUndo,
    /// A request of a dead terraform never lands.
    LoseWrite,
    LoseDelete(usize),
    LoseUndo,
    /// A delete of a process of ours that was killed lands, or is lost.
    LandStray(usize),
    LoseStray(usize),
    ChildStarts,
    ChildLeaves,
    ChildIsRecorded,
    ChildEnds,
    /// A person interrupts terraform twice, behind the back of `tf`: terraform exits with its operation unfinished.
    Abandon,
    Kill(Victim),
    /// A process that cleans up takes its next step.
    Step(Who),
    /// A process that cleans up stops looking for a lock whose request may land.
    LateWindowEnds(Who),
    /// Nothing has changed for the quiet window, as far as a process that cleans up has seen.
    QuietWindowEnds(Who),
    /// The delete of a process that cleans up lands.
    LandOurs(Who),
    NextStarts,
    Contender,
}

/// The facts with which a process cleans up.
#[derive(Clone, Copy)]
struct CleanUpFacts {
    died: bool,
    request_may_land: bool,
    late_writes: LateWrites,
}

/// The model: the setting, and the values that the decisions of the program need.
pub(crate) struct Protocol {
    setup: Setup,
    /// The log at each [`Logged`], as the program reads it: without and with the record of a terraform that leaves its
    /// operation.
    logs: Vec<Log>,
    /// The facts about the run with each of these logs.
    runs: Vec<Run>,
    infos: [LockInfo; 2],
}

const CONTENDER_ID: &str = "11111111-2222-3333-4444-555555555555";

impl Protocol {
    pub(crate) fn new(setup: Setup) -> Self {
        let kind = setup.parts.in_the_log();
        let uploading = "2026-11-23T01:46:10.651Z [INFO]  backend-s3: Uploading remote state: \
                         tf_backend.operation=Put tf_backend.req_id=p tf_backend.s3.bucket=bkt \
                         tf_backend.s3.path=dir/prod.tfstate\n";
        let lines = [
            "2026-11-23T01:46:07.565Z [INFO]  Terraform version: 1.11.4\n".to_owned(),
            lock_line(7, &format!("Attempting to lock remote state ({kind})..."), ID, "r1"),
            lock_line(8, &format!("Locked remote state ({kind})"), ID, "r1"),
            uploading.to_owned(),
            unlock_line(11, &format!("Attempting to unlock remote state ({kind})..."), ID),
            unlock_line(12, &format!("Unlocked remote state ({kind})"), ID),
        ];
        let canceled = "2026-11-23T01:46:13.000Z [WARN]  running operation was forcefully canceled\n";
        let logs = LOGGED.iter().flat_map(|logged| {
            ["", canceled].map(|end| {
                let mut log = Log::default();
                log.read((lines[..=*logged as usize].concat() + end).as_bytes());
                log
            })
        });
        let logs: Vec<Log> = logs.collect();
        let run = |log| Run::recorded("root@vm", "2026-11-23T01:46:07Z".parse().unwrap(), log);
        let runs = logs.iter().map(run).collect();
        let info = |id: &str, who: &str| LockInfo {
            id: id.to_owned(),
            operation: "OperationTypeApply".to_owned(),
            who: who.to_owned(),
            version: "1.11.4".to_owned(),
            created: "2026-11-23T01:46:07.59Z".to_owned(),
            path: "bkt/dir/prod.tfstate".to_owned(),
        };
        Self { logs, runs, infos: [info(ID, "root@vm"), info(CONTENDER_ID, "ci@other")], setup }
    }

    fn log_index(state: &State) -> usize {
        state.logged as usize * 2 + usize::from(state.is_canceled)
    }

    fn log(&self, state: &State) -> &Log {
        &self.logs[Self::log_index(state)]
    }

    /// The run's lock, as the log records it. A cleanup asks for it only if the log has it.
    fn recorded(&self, state: &State) -> &RecordedLock {
        self.log(state).named().next().unwrap()
    }

    fn info(&self, owner: Owner) -> &LockInfo {
        &self.infos[owner as usize]
    }

    fn run(&self, state: &State) -> &Run {
        &self.runs[Self::log_index(state)]
    }

    fn ended(exit: Exit) -> Ended {
        match exit {
            Exit::Success => Ended::Exited(0),
            Exit::Failure => Ended::Exited(1),
            Exit::Killed => Ended::Killed(Signal::SIGKILL),
        }
    }

    /// Whether terraform died, as `tf` and its guardian judge it.
    fn died(&self, state: &State) -> bool {
        let Terraform::Ended(exit) = state.terraform else { unreachable!("terraform is alive") };
        if exit == Exit::Failure && self.setup.fault == Some(Fault::ExitCodeDecides) {
            return false;
        }
        let end = EndOfRun {
            ended: Some(Self::ended(exit)),
            killed: None,
            forced: false,
            interrupted: false,
            out_of_memory: false,
        };
        died(&end, false, self.log(state), |_| true)
    }

    fn facts(&self, state: &State, who: Who) -> CleanUpFacts {
        match (who, state.next) {
            (Who::Tf | Who::Guardian, _) => {
                let died = self.died(state);
                CleanUpFacts { died, request_may_land: died, late_writes: LateWrites::Logged }
            }
            (Who::Next, Next::Pending(..)) => {
                // `check_pending`: a lock that was never held has no write in flight.
                let held = self.recorded(state).progress.held.is_some();
                CleanUpFacts {
                    died: true,
                    request_may_land: false,
                    late_writes: if held { LateWrites::Logged } else { LateWrites::None },
                }
            }
            (Who::Next, _) => CleanUpFacts { died: true, request_may_land: false, late_writes: LateWrites::Logged },
        }
    }

    /// What the journal shows about the run to the next `tf`.
    fn run_state(&self, state: &State, record: Record) -> RunState {
        let child = (state.child == Child::Left || state.child == Child::Recorded).then(|| {
            let process = Process {
                pid: Pid::from_raw(500),
                thread: Pid::from_raw(500),
                name: "child".to_owned(),
                state: 'S',
                parent: Pid::from_raw(1),
                group: Pid::from_raw(500),
                session: Pid::from_raw(500),
                start: 5000,
            };
            (process, ProcessMark::Unreadable)
        });
        let all: Vec<_> = child.into_iter().collect();
        let identity = TreeIdentity {
            start: Some(1000),
            group: Some(100),
            session: Some(90),
            survivors: if record.has_survivor { vec![(500, 5000)] } else { Vec::new() },
        };
        let found = classify(&all, &identity, None);
        RunTraces {
            is_owned: state.tf.is_alive() || state.guardian.is_alive(),
            tree_is_locked: state.terraform.is_alive() || state.child == Child::Inside,
            has_members: found.contains(&Membership::Member),
            has_unknown: found.contains(&Membership::Unknown),
        }
        .state()
    }

    fn cleaner(state: &mut State, who: Who) -> Option<&mut Cleaner> {
        match who {
            Who::Tf => Some(&mut state.tf),
            Who::Guardian => Some(&mut state.guardian),
            Who::Next => match &mut state.next {
                Next::Finish(cleaner, _) => Some(cleaner),
                Next::None | Next::Pending(..) => None,
            },
        }
    }

    fn release(state: &mut State, who: Who) -> Option<&mut Release> {
        let cleaner = match (who, &mut state.next) {
            (Who::Tf, _) => &mut state.tf,
            (Who::Guardian, _) => &mut state.guardian,
            (Who::Next, Next::Pending(release, _)) => return Some(release),
            (Who::Next, Next::Finish(cleaner, _)) => cleaner,
            (Who::Next, Next::None) => return None,
        };
        match cleaner {
            Cleaner::Step(step, release, None) if ORDER.get(*step) == Some(&CleanUpStep::Release) => Some(release),
            _ => None,
        }
    }

    /// A delete of ours lands at `part`. Returns whether its condition was met.
    fn land_ours(&self, state: &mut State, part: usize) -> bool {
        let unconditional = self.setup.fault == Some(Fault::DeleteWithoutCondition);
        match state.store[part] {
            Some(Owner::Contender) if unconditional => state.broken = Some(Broken::TookAnothers),
            Some(Owner::Run) => {
                if state.may_write() {
                    state.broken = Some(Broken::TookLiving);
                }
            }
            Some(Owner::Contender) | None => return false,
        }
        state.store[part] = None;
        true
    }

    /// An unconditional delete of terraform lands at `part`.
    fn land_terraforms_delete(state: &mut State, part: usize) {
        if state.store[part] == Some(Owner::Contender) {
            state.broken = Some(Broken::HitByLateRequest);
        }
        state.store[part] = None;
    }

    // Terraform.

    /// Terraform requests the part at `place`.
    fn ask(&self, state: &mut State, place: usize) {
        match self.setup.parts.terraforms_order().get(place) {
            Some(&part) => {
                state.terraform = Terraform::Ask(place);
                state.is_repeated = false;
                state.network.puts[part] += 1;
            }
            None => {
                state.terraform = Terraform::Work;
                state.logged = Logged::Held;
            }
        }
    }

    /// Terraform was refused the part at `place`, or has given up.
    fn refused(state: &mut State, place: usize) {
        if place > 0 {
            state.terraform = Terraform::Undo;
            state.network.undo = true;
        } else {
            state.terraform = Terraform::Ended(Exit::Failure);
        }
    }

    /// Terraform deletes the part at `place`, if it finds its own lock there.
    fn unlock(&self, state: &mut State, place: usize) {
        state.logged = Logged::Unlocking;
        match self.setup.parts.terraforms_order().get(place) {
            Some(&part) if state.store[part] == Some(Owner::Run) => {
                state.terraform = Terraform::Unlock(place);
                state.network.deletes[part] = true;
            }
            Some(_) => state.terraform = Terraform::Ended(Exit::Failure),
            None => {
                state.logged = Logged::Gone;
                state.terraform = Terraform::Ended(Exit::Success);
            }
        }
    }

    fn land_put(&self, state: &mut State, part: usize, answered: bool) -> Option<()> {
        state.network.puts[part] = state.network.puts[part].checked_sub(1)?;
        let was_granted = state.store[part].is_none();
        if was_granted {
            state.store[part] = Some(Owner::Run);
        }
        let Terraform::Ask(place) = state.terraform else { return (!answered).then_some(()) };
        if self.setup.parts.terraforms_order()[place] != part {
            return (!answered).then_some(());
        }
        if answered {
            // Assumption: once a lock request is answered, no copy of it is in flight. A copy that lands after
            // terraform has given the lock back leaves a lock of a run that has ended well, with `tf` and without.
            state.network.puts[part] = 0;
            if was_granted { self.ask(state, place + 1) } else { Self::refused(state, place) }
        }
        Some(())
    }

    fn contender(&self, state: &mut State) {
        let order = self.setup.parts.terraforms_order();
        match state.contender {
            Contender::Takes(place) => match order.get(place) {
                Some(&part) if state.store[part].is_none() => {
                    state.store[part] = Some(Owner::Contender);
                    state.contender = Contender::Takes(place + 1);
                }
                Some(_) => {
                    // Refused: it takes back the object, and tries again later.
                    if place > 0 {
                        state.store[OBJECT] = None;
                    }
                    state.contender = Contender::Takes(0);
                }
                None => {
                    state.contender = Contender::Works;
                    if matches!(state.terraform, Terraform::Work | Terraform::Write) || state.network.write {
                        state.broken = Some(Broken::TwoHolders);
                    }
                }
            },
            Contender::Works => state.contender = Contender::Frees(0),
            Contender::Frees(place) => match order.get(place) {
                Some(&part) => {
                    state.store[part] = None;
                    state.contender = Contender::Frees(place + 1);
                }
                None => state.contender = Contender::Ended,
            },
            Contender::Ended => {}
        }
    }

    // The processes that clean up.

    /// Takes one step of a release. Returns the result if the release is over.
    fn release_step(&self, state: &mut State, who: Who, facts: CleanUpFacts) -> Option<Option<ReleaseResultKind>> {
        let order = self.setup.parts.our_order();
        let parts = &order[..order.len().min(2)];
        let recorded = self.recorded(state).clone();
        let run = self.run(state);
        let store = state.store;
        let release = *Self::release(state, who)?;
        let mut now = release;
        let mut result = None;
        // Where the release goes on after the part at `place` of the order.
        let after = |place: usize, parts: [PartResult; 2]| match order.get(place + 1) {
            None => At::Combine,
            Some(_) if place == 0 => At::Read(1),
            Some(_) if parts[ITEM] != PartResult::Waits => At::Combine,
            Some(_) => {
                let object = judged(parts[OBJECT]);
                let before = (place == 2).then(|| judged(release.parts[OBJECT]));
                if place == 1 && must_be_read_again(&object) {
                    At::Read(2)
                } else if may_item_follow(before.as_ref(), &object) {
                    At::Read(3)
                } else {
                    At::Combine
                }
            }
        };
        match release.at {
            At::Read(place) => {
                let part = order[place];
                let must_wait =
                    needs_quiet(&recorded, facts.late_writes) && self.setup.fault != Some(Fault::NoQuietWindow);
                let step = match store[part].map(|owner| self.info(owner)) {
                    None => PartStep::Settled(Judged::of_no_part(release.asked_to_go[part])),
                    Some(info) => PartRead {
                        info,
                        verdict: judge(&recorded, info, run),
                        needs_consent: None,
                        needs_quiet: !release.is_quiet && must_wait,
                        must_be_last: place == 0 && order.len() > 2,
                    }
                    .decide(),
                };
                match step {
                    PartStep::Delete => {
                        now.asked_to_go[part] = true;
                        now.at = At::Deleting(place);
                    }
                    PartStep::Settled(judged) => {
                        now.parts[part] = match judged {
                            Judged::Absent => PartResult::Absent,
                            Judged::Deleted => PartResult::Deleted,
                            Judged::Anothers(_) => PartResult::Anothers,
                            Judged::NeedsQuiet => PartResult::NeedsQuiet,
                            Judged::Waits => PartResult::Waits,
                            other => unreachable!("{other:?}"),
                        };
                        now.was_deleted |= now.parts[part] == PartResult::Deleted;
                        now.at = after(place, now.parts);
                    }
                }
            }
            At::ReadAgain(place, met) => {
                let part = order[place];
                let text = |owner: Owner| {
                    StoredLock::Item(InfoAttribute::Text(format!(r#"{{"ID":"{}"}}"#, self.info(owner).id)))
                };
                let deleted = if met { Deleted::Yes(None) } else { Deleted::Changed };
                match removed(&deleted, &text(Owner::Run), store[part].map(text).as_ref()) {
                    Some(Removed::GoneBefore) => {
                        now.asked_to_go[part] = false;
                        now.parts[part] = PartResult::Absent;
                        now.at = after(place, now.parts);
                    }
                    Some(Removed::Gone(_)) => {
                        now.parts[part] = PartResult::Deleted;
                        now.was_deleted = true;
                        now.at = after(place, now.parts);
                    }
                    Some(Removed::Anothers) => now.at = At::Read(place),
                    Some(Removed::Refused) => unreachable!("the service deletes what it confirms"),
                    None => now.at = At::Deleting(place),
                }
            }
            At::Combine => {
                let judged: Vec<_> = parts.iter().map(|part| judged(release.parts[*part])).collect();
                let unproven = |absent: [bool; 2]| -> Vec<(usize, Option<String>)> {
                    (0..parts.len()).filter(|place| absent[parts[*place]]).map(|place| (place, None)).collect()
                };
                let before = release.before.map(unproven);
                let look = PartsLook {
                    parts: &judged,
                    was_had: recorded.progress.held.is_some(),
                    is_quiet: release.is_quiet,
                    was_deleted: release.was_deleted,
                    before: before.as_ref(),
                    request_may_land: facts.request_may_land
                        && recorded.progress.held.is_none()
                        && !release.is_late_window_over,
                    is_time_up: false,
                };
                match look.combine() {
                    ReleaseStep::WaitForQuiet => {
                        now.waits += 1;
                        now.at = At::Quiet(store, state.writes);
                        if now.waits > 3 {
                            result = Some(ReleaseResultKind::Later);
                        }
                    }
                    ReleaseStep::LookAgain(unproven) => {
                        let mut absent = [false; 2];
                        for (place, _) in unproven {
                            absent[parts[place]] = true;
                        }
                        now.before = Some(absent);
                        now.at = At::Read(0);
                    }
                    ReleaseStep::Kept(_) => result = Some(ReleaseResultKind::Later),
                    ReleaseStep::Absent { anothers, .. } => {
                        let is_whole = self.setup.fault == Some(Fault::HalfIsWhole);
                        let anothers = anothers.map(|anothers| is_whole || anothers.is_complete);
                        result = Some(ReleaseResultKind::Absent { anothers });
                    }
                    ReleaseStep::Released => result = Some(ReleaseResultKind::Released),
                    ReleaseStep::Failed(failure) => unreachable!("{failure}"),
                }
            }
            // Only the network and the time end these.
            At::Deleting(_) | At::Quiet(..) => return None,
        }
        now.has_waited |= now.parts[ITEM] == PartResult::Waits;
        if release.at != At::Combine
            && now.at == At::Combine
            && order.len() > 2
            && is_released_by_another(
                &judged(now.parts[ITEM]),
                ItemHistory { has_waited: now.has_waited, was_asked_to_go: now.asked_to_go[ITEM] },
            )
        {
            if now.parts[OBJECT] == PartResult::Deleted {
                now.parts[OBJECT] = PartResult::Absent;
            }
            now.asked_to_go = [false; 2];
            now.was_deleted = false;
        }
        *Self::release(state, who)? = now;
        // Assumption: a terraform that exits by itself without its lock was refused it if another run's lock was found
        // with all its parts. So none of its requests is in flight.
        let gave_up = state.terraform == Terraform::Ended(Exit::Failure) && !state.is_canceled;
        if gave_up && parts.iter().all(|part| now.parts[*part] == PartResult::Anothers) {
            state.network.puts = [0; 2];
        }
        Some(result)
    }

    /// The quiet window of a release ends. The window is longer than a request of a dead terraform is in flight.
    fn quiet_window_ends(&self, state: &mut State, who: Who) -> Option<()> {
        let Network { undo, deletes, write, .. } = state.network;
        if undo || write || deletes != [false; 2] {
            return None;
        }
        let look = |store: [Option<Owner>; 2], writes: u8| {
            let mut look = Look::of_state(writes.to_string());
            for owner in store {
                look.add_part(owner.map(|owner| match owner {
                    Owner::Run => ("ours", &Match::Ours),
                    Owner::Contender => ("theirs", &Match::Anothers),
                }));
            }
            look
        };
        let now = look(state.store, state.writes);
        let (store, writes) = (state.store, state.writes);
        let release = Self::release(state, who)?;
        let At::Quiet(last_store, last_writes) = release.at else { return None };
        let mut wait = QuietWait::begin(look(last_store, last_writes), QuietLimits::of(true));
        // The service is read more often than the network could have been away.
        let times = [QUIET_WINDOW / 3, QUIET_WINDOW * 2 / 3, QUIET_WINDOW];
        let mut seen = times.into_iter().map(|elapsed| wait.see(now.clone(), elapsed));
        match seen.find(|step| *step != QuietStep::Wait).unwrap_or(QuietStep::Wait) {
            QuietStep::Wait | QuietStep::Changed => release.at = At::Quiet(store, writes),
            step => {
                release.is_quiet = matches!(step, QuietStep::Quiet(_));
                release.before = None;
                release.at = At::Read(0);
            }
        }
        Some(())
    }

    fn outcome(result: ReleaseResultKind) -> Outcome {
        match result {
            ReleaseResultKind::Released => Outcome::Released(Released::default()),
            ReleaseResultKind::Absent { anothers } => {
                let anothers = anothers.map(|is_complete| AnothersLock { id: CONTENDER_ID.to_owned(), is_complete });
                Outcome::Absent { anothers, excluded: false }
            }
            ReleaseResultKind::Later => Outcome::Kept { reason: String::new(), because: Because::NotYet },
        }
    }

    fn results(&self, state: &State, facts: CleanUpFacts, result: Option<ReleaseResultKind>) -> Vec<ReleaseResult> {
        let Some(result) = result else { return Vec::new() };
        let recorded = self.recorded(state);
        let outcome = Some(Self::outcome(result));
        vec![ReleaseResult {
            lock: recorded.clone(),
            may_exist: recorded.progress.held.is_some() || facts.died,
            may_still_come: may_still_come(facts.died, outcome.as_ref(), recorded),
            outcome,
        }]
    }

    /// Writes the requests that may still land.
    fn remember(&self, state: &mut State, who: Who, facts: CleanUpFacts, result: Option<ReleaseResultKind>) {
        let results = self.results(state, facts, result);
        let ended = match (who, state.terraform) {
            (Who::Tf | Who::Guardian, Terraform::Ended(exit)) => Some(Self::ended(exit)),
            _ => None,
        };
        let is_abandoned = abandoned_requests(&results, ended).next().is_some();
        state.is_pending |= is_abandoned || results.iter().any(|result| result.may_still_come);
    }

    /// Takes the next step of a process that cleans up.
    fn clean_up(&self, state: &mut State, who: Who) -> Option<()> {
        if let (Who::Next, Next::Pending(_, was_settled)) = (who, state.next) {
            let facts = self.facts(state, who);
            if self.release_step(state, who, facts)?.is_some() {
                self.next_ends(state, was_settled);
            }
            return Some(());
        }
        let facts = |state: &State| self.facts(state, who);
        let now = *Self::cleaner(state, who)?;
        let then = match now {
            Cleaner::Watch => {
                let may_act = match who {
                    Who::Tf => true,
                    // The guardian acts only after the death of `tf`.
                    Who::Guardian => state.tf == Cleaner::Killed,
                    Who::Next => unreachable!("it watches nothing"),
                };
                if state.terraform.is_alive() || !may_act {
                    return None;
                }
                let mut log = self.log(state).clone();
                if state.terraform == Terraform::Ended(Exit::Success) {
                    log.ended_well();
                }
                if log.may_hold() { Cleaner::EndTree } else { Cleaner::Close(None) }
            }
            // By the same assumption, the guardian has seen it before it ends the tree.
            Cleaner::EndTree if who == Who::Guardian && state.child == Child::Left => return None,
            Cleaner::EndTree => self.end_tree(state, who, facts(state).died),
            Cleaner::Step(step, _, result) if step == ORDER.len() => Cleaner::Close(result),
            Cleaner::Step(step, release, result) => match ORDER[step] {
                // A lock that may not be released already has its result.
                CleanUpStep::Release if result.is_none() => {
                    let facts = facts(state);
                    let result = self.release_step(state, who, facts)?;
                    let Cleaner::Step(_, release, _) = *Self::cleaner(state, who)? else { unreachable!("{now:?}") };
                    match result {
                        Some(result) => self.next_step(step + 1, Release::NEW, Some(result)),
                        None => Cleaner::Step(step, release, None),
                    }
                }
                CleanUpStep::Remember => {
                    if self.setup.fault != Some(Fault::RememberedTooLate) {
                        let facts = facts(state);
                        self.remember(state, who, facts, result);
                    }
                    self.next_step(step + 1, release, result)
                }
                _ => self.next_step(step + 1, release, result),
            },
            Cleaner::Close(result) => {
                if who == Who::Tf && state.guardian.is_alive() {
                    state.guardian = Cleaner::Done;
                    return Some(());
                }
                let facts = result.map(|_| facts(state));
                let results = facts.map_or_else(Vec::new, |facts| self.results(state, facts, result));
                let is_left = !Cleaned::of_locks(results).unfinished(self.log(state), who != Who::Guardian).is_empty();
                let knows = match who {
                    Who::Tf => state.child.is_alive(),
                    Who::Guardian => state.child == Child::Inside || state.guardian_knows,
                    Who::Next => state.record.is_some_and(|record| record.has_survivor),
                };
                let has_survivor = knows && self.setup.fault != Some(Fault::SurvivorsForgotten);
                state.record = is_left.then_some(Record { has_survivor });
                if self.setup.fault == Some(Fault::RememberedTooLate) { Cleaner::Late(result) } else { Cleaner::Done }
            }
            Cleaner::Late(result) => {
                if result.is_some() {
                    let facts = facts(state);
                    self.remember(state, who, facts, result);
                }
                Cleaner::Done
            }
            Cleaner::Done | Cleaner::Killed => return None,
        };
        *Self::cleaner(state, who)? = then;
        if let Next::Finish(Cleaner::Done, was_settled) = state.next {
            self.next_looks_for_pending(state, was_settled);
        }
        Some(())
    }

    /// Goes to the next step that matters here. The others only report, or are about other backends.
    fn next_step(&self, from: usize, release: Release, result: Option<ReleaseResultKind>) -> Cleaner {
        let matters = |step: &usize| matches!(ORDER[*step], CleanUpStep::Release | CleanUpStep::Remember);
        Cleaner::Step((from..ORDER.len()).find(matters).unwrap_or(ORDER.len()), release, result)
    }

    fn end_tree(&self, state: &mut State, who: Who, died: bool) -> Cleaner {
        let go = self.next_step(0, Release::NEW, None);
        let keep = self.next_step(0, Release::NEW, Some(ReleaseResultKind::Later));
        // `tf` is a subreaper and sees every process of the tree. The guardian sees those with the mark, and those that
        // `tf` has recorded.
        let sees_child = match state.child {
            Child::Inside => true,
            Child::Left | Child::Recorded => who == Who::Tf || state.guardian_knows,
            Child::None | Child::Dead => false,
        };
        if died {
            return match (sees_child, self.setup.child) {
                (false, _) => go,
                (true, ChildKind::Untouchable) => keep,
                (true, _) => {
                    state.child = Child::Dead;
                    go
                }
            };
        }
        // `Operation::Unlocking`: the lock still exists, so the rest of the tree must end by itself.
        let exists = state.store.contains(&Some(Owner::Run));
        let is_unlocking = self.recorded(state).progress.is_unlocking() && exists;
        if is_unlocking && sees_child { keep } else { go }
    }

    // The next `tf`.

    fn next_starts(&self, state: &mut State) {
        let was_settled = state.is_settled();
        let finishes = state.record.is_some_and(|record| {
            let found = self.run_state(state, record);
            let sight = match found {
                RunState::Living => Sight::Living,
                RunState::Recovering => Sight::Recovering,
                RunState::Doubtful => Sight::Doubtful,
                RunState::Dead => Sight::Dead,
            };
            let sight = if self.setup.fault == Some(Fault::RecoveryDoesNotLook) { Sight::Dead } else { sight };
            let facts = Facts { may_hold: self.log(state).may_hold(), ..Facts::default() };
            treatment(sight, facts, Mode::Finish) == Treatment::Finish
        });
        if !finishes {
            return self.next_looks_for_pending(state, was_settled);
        }
        // Without a lock in the log, there is nothing to release.
        let begin = self.next_step(0, Release::NEW, None);
        let begin = if self.log(state).may_hold() { begin } else { Cleaner::Close(None) };
        state.next = Next::Finish(begin, was_settled);
    }

    fn next_looks_for_pending(&self, state: &mut State, was_settled: bool) {
        if state.is_pending {
            state.next = Next::Pending(Release::NEW, was_settled);
        } else {
            self.next_ends(state, was_settled);
        }
    }

    fn next_ends(&self, state: &mut State, was_settled: bool) {
        state.next = Next::None;
        if was_settled && state.store.contains(&Some(Owner::Run)) {
            state.broken = Some(Broken::LeftBehind);
        }
    }

    // What `tf locks` says about the run's lock.

    fn verdict(&self, state: &State) -> Verdict {
        let dead = |recovering| Claim::Dead { run: "r".to_owned(), tf: 1, recovering, disagrees: None };
        let claim = match state.record.filter(|_| self.log(state).named().next().is_some()) {
            Some(record) => Some(match self.run_state(state, record) {
                RunState::Living => {
                    Claim::Living { run: "r".to_owned(), tf: 1, terraform: None, command: "apply".to_owned() }
                }
                RunState::Recovering => dead(true),
                RunState::Dead => dead(false),
                RunState::Doubtful => Claim::Foreign { why: "processes may belong to it", may_run_here: true },
            }),
            None => state.is_pending.then_some(Claim::Late { disagrees: None, had: false }),
        };
        // Without a claim, only the age and the host of the lock speak, and `tf` asks.
        let seen = Seen { claim, ..Seen::default() };
        evidence::judge(self.info(Owner::Run), &seen).verdict
    }
}

impl Model for Protocol {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State {
            store: [None; 2],
            writes: 0,
            network: Network::default(),
            terraform: Terraform::Start,
            logged: Logged::Nothing,
            is_canceled: false,
            is_repeated: false,
            child: Child::None,
            tf: Cleaner::Watch,
            guardian: Cleaner::Watch,
            guardian_knows: false,
            next: Next::None,
            record: Some(Record { has_survivor: false }),
            is_pending: false,
            contender: Contender::Takes(0),
            kills: self.setup.kills,
            broken: None,
        }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        if state.broken.is_some() {
            return;
        }
        actions.extend([
            Action::Terraform,
            Action::Repeat,
            Action::GiveUp,
            Action::LandWrite,
            Action::LandUndo,
            Action::LoseWrite,
            Action::LoseUndo,
            Action::ChildStarts,
            Action::ChildLeaves,
            Action::ChildIsRecorded,
            Action::ChildEnds,
            Action::Abandon,
            Action::NextStarts,
            Action::Contender,
        ]);
        for part in [ITEM, OBJECT] {
            actions.extend([
                Action::LandPut(part, true),
                Action::LandPut(part, false),
                Action::LosePut(part),
                Action::LandDelete(part),
                Action::LoseDelete(part),
                Action::LandStray(part),
                Action::LoseStray(part),
            ]);
        }
        for who in [Who::Tf, Who::Guardian, Who::Next] {
            actions.extend([
                Action::Step(who),
                Action::LateWindowEnds(who),
                Action::QuietWindowEnds(who),
                Action::LandOurs(who),
            ]);
        }
        for victim in
            [Victim::Terraform, Victim::Tf, Victim::Guardian, Victim::Next, Victim::Contender, Victim::WholeRun]
        {
            actions.push(Action::Kill(victim));
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        let mut next = *state;
        self.act(&mut next, action)?;
        if next.broken.is_none()
            && next.store.contains(&Some(Owner::Run))
            && self.verdict(&next) == Verdict::Dead
            && (next.terraform.is_alive() || matches!(next.child, Child::Inside | Child::Recorded))
        {
            next.broken = Some(Broken::CalledDead);
        }
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![Property::always("every invariant holds", |_, state: &State| state.broken.is_none())]
    }
}

impl Protocol {
    /// Does `action`. `None` if it is not possible in this state.
    fn act(&self, state: &mut State, action: Action) -> Option<()> {
        let order = self.setup.parts.terraforms_order();
        let is_dead = !state.terraform.is_alive();
        match action {
            Action::Terraform => match state.terraform {
                Terraform::Start => {
                    state.logged = Logged::Asked;
                    self.ask(state, 0);
                }
                Terraform::Work => {
                    state.logged = Logged::Writing;
                    state.terraform = Terraform::Write;
                    state.network.write = true;
                }
                _ => return None,
            },
            Action::Repeat => {
                let Terraform::Ask(place) = state.terraform else { return None };
                if state.is_repeated {
                    return None;
                }
                state.is_repeated = true;
                state.network.puts[order[place]] += 1;
            }
            Action::GiveUp => {
                let Terraform::Ask(place) = state.terraform else { return None };
                if !state.is_repeated {
                    return None;
                }
                Self::refused(state, place);
            }
            Action::LandPut(part, answered) => self.land_put(state, part, answered)?,
            Action::LosePut(part) => {
                state.network.puts[part] = state.network.puts[part].checked_sub(1)?;
            }
            Action::LandWrite => {
                if !state.network.write {
                    return None;
                }
                state.network.write = false;
                state.writes += 1;
                if state.contender == Contender::Works {
                    state.broken = Some(Broken::HitByLateRequest);
                }
                if state.terraform == Terraform::Write {
                    self.unlock(state, 0);
                }
            }
            Action::LandDelete(part) => {
                if !std::mem::take(&mut state.network.deletes[part]) {
                    return None;
                }
                Self::land_terraforms_delete(state, part);
                if let Terraform::Unlock(place) = state.terraform {
                    self.unlock(state, place + 1);
                }
            }
            Action::LandUndo => {
                if !std::mem::take(&mut state.network.undo) {
                    return None;
                }
                Self::land_terraforms_delete(state, OBJECT);
                if state.terraform == Terraform::Undo {
                    state.terraform = Terraform::Ended(Exit::Failure);
                }
            }
            Action::LoseWrite => (is_dead && std::mem::take(&mut state.network.write)).then_some(())?,
            Action::LoseUndo => (is_dead && std::mem::take(&mut state.network.undo)).then_some(())?,
            Action::LoseDelete(part) => {
                (is_dead && std::mem::take(&mut state.network.deletes[part])).then_some(())?;
            }
            Action::LandStray(part) => {
                state.network.strays[part] = state.network.strays[part].checked_sub(1)?;
                self.land_ours(state, part);
            }
            Action::LoseStray(part) => {
                state.network.strays[part] = state.network.strays[part].checked_sub(1)?;
            }
            Action::ChildStarts => {
                if self.setup.child == ChildKind::None
                    || state.child != Child::None
                    || state.terraform != Terraform::Work
                {
                    return None;
                }
                state.child = Child::Inside;
            }
            Action::ChildLeaves => {
                let leaves = matches!(self.setup.child, ChildKind::Detached | ChildKind::Untouchable);
                if !leaves || state.child != Child::Inside || !state.tree_is_watched() {
                    return None;
                }
                state.child = Child::Left;
            }
            Action::ChildIsRecorded => {
                if state.child != Child::Left || !state.tree_is_watched() {
                    return None;
                }
                state.child = Child::Recorded;
                state.guardian_knows = state.guardian.is_alive();
                if let Some(record) = &mut state.record {
                    record.has_survivor = true;
                }
            }
            Action::ChildEnds => {
                if !state.child.is_alive() {
                    return None;
                }
                state.child = Child::Dead;
            }
            Action::Abandon => {
                if is_dead || state.terraform == Terraform::Start {
                    return None;
                }
                state.kill()?;
                state.terraform = Terraform::Ended(Exit::Failure);
                state.is_canceled = true;
            }
            Action::Kill(victim) => self.kill(state, victim)?,
            Action::Step(who) => self.clean_up(state, who)?,
            Action::LateWindowEnds(who) => {
                let release = Self::release(state, who)?;
                if release.at != At::Combine || release.is_late_window_over {
                    return None;
                }
                release.is_late_window_over = true;
            }
            Action::QuietWindowEnds(who) => self.quiet_window_ends(state, who)?,
            Action::LandOurs(who) => {
                let At::Deleting(place) = Self::release(state, who)?.at else { return None };
                let met = self.land_ours(state, self.setup.parts.our_order()[place]);
                Self::release(state, who)?.at = At::ReadAgain(place, met);
            }
            Action::NextStarts => {
                if state.next != Next::None {
                    return None;
                }
                self.next_starts(state);
            }
            Action::Contender => self.contender(state),
        }
        Some(())
    }

    fn kill(&self, state: &mut State, victim: Victim) -> Option<()> {
        // Assumption: `tf`, its guardian and terraform are not killed in the moment in which a process leaves the group
        // and neither of the first two has seen that yet.
        let is_unseen = state.child == Child::Left;
        let who = match victim {
            Victim::Terraform => {
                if !state.terraform.is_alive() || is_unseen {
                    return None;
                }
                state.terraform = Terraform::Ended(Exit::Killed);
                return state.kill();
            }
            Victim::WholeRun => {
                let is_whole = state.terraform.is_alive() && state.tf.is_alive() && state.guardian.is_alive();
                // While terraform is running, neither of the others has a request in flight.
                if !is_whole || is_unseen {
                    return None;
                }
                state.terraform = Terraform::Ended(Exit::Killed);
                (state.tf, state.guardian) = (Cleaner::Killed, Cleaner::Killed);
                return state.kill();
            }
            Victim::Contender => {
                if matches!(state.contender, Contender::Takes(0) | Contender::Ended) {
                    return None;
                }
                state.contender = Contender::Ended;
                return state.kill();
            }
            Victim::Tf if state.tf.is_alive() && !is_unseen => Who::Tf,
            Victim::Guardian if state.guardian.is_alive() && (!is_unseen || state.tf.is_alive()) => Who::Guardian,
            Victim::Next if state.next != Next::None => Who::Next,
            _ => return None,
        };
        if let Some(&mut Release { at: At::Deleting(place), .. }) = Self::release(state, who) {
            state.network.strays[self.setup.parts.our_order()[place]] += 1;
        }
        match who {
            Who::Tf => state.tf = Cleaner::Killed,
            Who::Guardian => state.guardian = Cleaner::Killed,
            Who::Next => state.next = Next::None,
        }
        state.kill()
    }
}

impl fmt::Debug for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.setup.fmt(f)
    }
}
