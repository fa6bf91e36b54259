//! Terraform's process tree: checks whether it is dead, and kills it.
//!
//! After a `kill -9` of terraform, a provider keeps running for seconds, and a script for an unlimited time. Both can
//! still change infrastructure. No single check finds all of these processes: a child process may close every
//! descriptor (Python's `subprocess` does), may become an orphan, and may clear its environment. So the tree is dead
//! only if all of these conditions are true:
//!
//! - The lifeline is closed. It is a pipe that the whole tree has inherited, at a high descriptor number.
//! - No process of the tree is below this process. Orphans of the tree are reparented to this process and not to init,
//!   because this process is their subreaper.
//! - No process of this user anywhere has this run in the `TFW_RUN` of its environment.
//!
//! The guardian is not an ancestor of the tree, so no orphans are reparented to it. The same is true for `tf` on macOS.
//! [`crate::journal::membership`] describes the facts that it uses instead. The guardian misses a process only if the
//! process has left terraform's process group, cleared its environment, closed every descriptor and lost its parent
//! before the guardian found it.
//!
//! Without a process list ([`process::list`]: there is no /proc, or it is that of another pid namespace), no process
//! can be found. In this case, `tf`, as the subreaper, checks with wait(2) whether it has any child left: no descendant
//! can escape that check. The guardian has no such check, so it treats the tree as possibly alive.
//!
//! A zombie counts as dead. A process that this process has no permission to signal counts as possibly alive. As long
//! as the tree may be alive, the lock is not released.

use std::cell::RefCell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, getpid};

use crate::cleanup::waiter::Waiter;
use crate::journal::membership::{ProcessMark, TreeIdentity};
use crate::journal::run_mark::{Living, RUN, mark_of};
use crate::sys::file_id::FileId;
use crate::sys::process::{self, Process, ProcessList, Variable};
use crate::sys::wait::{self, Children};
use crate::sys::{descriptor, poll};
use crate::trace::trace;

/// How long the remaining processes of a tree may take to exit after SIGTERM, before they get SIGKILL.
const TERM_GRACE: Duration = Duration::from_secs(5);

/// The grace period in place of [`TERM_GRACE`] if another `tf` was started in the tree. The terraform of that `tf` gets
/// one interrupt, and needs time to save its state.
const NESTED_TERM_GRACE: Duration = Duration::from_mins(1);

/// How long the tree may take to exit after SIGKILL. A process that still exists after that hangs in the kernel, or
/// this process has no permission to kill it.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// How often the tree is checked.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Terraform's process tree, and the data that identify its processes.
#[derive(Debug)]
pub(crate) struct Tree {
    lifeline: OwnedFd,
    /// The run's ID: the value of `TFW_RUN`, or the last part of it.
    run: String,
    terraform: Option<Pid>,
    /// Helpers that this process has started, such as the guardian. They do not belong to the tree.
    /// The second value is the start time in clock ticks since boot: when a helper was reaped, another process may get
    /// its pid. `None` if it is unknown.
    ours: RefCell<Vec<(Pid, Option<u64>)>>,
    /// Children that this process had before it started terraform. For example, a shell can start children and then
    /// replace itself with `tf` (exec).
    preexisting_children: Vec<Pid>,
    /// Whether orphans that do not belong to the tree may be reparented to this process as well: it had children before
    /// it started terraform, or it is PID 1.
    has_foreign_orphans: bool,
    /// Whether the started program is a shim, which starts terraform. The shim's exit status is not that of terraform,
    /// and terraform may outlive the shim.
    via_shim: bool,
    /// The recorder, the file that terraform logs into. `None` if it is unknown.
    recorder: Option<FileId>,
    /// Whether terraform has a process group of its own.
    own_group: bool,
    /// The processes that are still running, because [`Tree::end`] could not end them or because the cleanup does not
    /// kill them: pid, and start time in clock ticks since boot.
    survivors: RefCell<Vec<(i32, u64)>>,
    observer: Observer,
}

/// Which process observes the tree.
#[derive(Debug)]
enum Observer {
    /// `tf`, terraform's parent. Orphans of the tree are reparented to it.
    Subreaper,
    /// The guardian, or a `tf` to which no orphans are reparented (macOS).
    Guardian(RefCell<GuardianView>),
}

/// The guardian's data about the tree.
#[derive(Debug, Default)]
struct GuardianView {
    /// Identifies the tree's processes. Its `survivors` contain every running process that an earlier search found in
    /// the tree.
    identity: TreeIdentity,
    /// The last moment at which terraform was seen alive, in clock ticks since boot
    /// ([`crate::journal::membership::classify`]). `None` if no such moment is known.
    certain_before: Option<u64>,
}

/// Whether the process belongs to a run that is nested in `run`: another `tf`, which was started below terraform,
/// supervises the process.
fn is_nested(process: &Process, run: &str) -> bool {
    matches!(process.environment(RUN), Variable::Set(runs) if names_nested_run(&runs, run))
}

/// Whether a run that is nested in `run` is not over. Its `tf` itself has no mark of that run. It cleans up after its
/// terraform has ended, and must not be killed meanwhile.
fn has_nested(members: &[Process], run: &str) -> bool {
    members.iter().any(|process| is_nested(process, run) || process.runs_our_program() == Some(true))
}

/// Whether `runs`, a value of `TFW_RUN`, names a run after `run`. The value is the IDs of nested runs from the
/// outermost to the innermost, separated by `/`.
fn names_nested_run(runs: &[u8], run: &str) -> bool {
    let mut runs = runs.split(|&byte| byte == b'/').skip_while(|marked| *marked != run.as_bytes());
    runs.next().is_some() && runs.next().is_some()
}

/// Whether a descendant of this process belongs to the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Membership {
    /// The process descends from terraform.
    Member,
    /// The process does not descend from terraform.
    Other,
    /// It is unknown whether the process descends from terraform.
    Unknown,
}

/// Writes processes to the journal that have outlived terraform: pid, and start time in clock ticks since boot. While
/// they are ended, this process may be killed. Its guardian, or the next `tf`, must then find those that have left
/// terraform's group and whose parents have exited.
pub(crate) type SurvivorRecord<'a> = RefCell<dyn FnMut(Vec<(i32, u64)>) + 'a>;

/// Returns the pid and the start time of each process, in clock ticks since boot.
pub(crate) fn identities<'a>(processes: impl IntoIterator<Item = &'a Process>) -> Vec<(i32, u64)> {
    processes.into_iter().map(|process| (process.pid.as_raw(), process.start)).collect()
}

/// What stops the processes of a tree before the lease of the run's lock lapses.
pub(crate) trait GroupFence {
    /// Whether the fence has stopped terraform's process group, because the lease may lapse soon. Then no process of the
    /// run may go on.
    fn has_stopped(&self) -> bool;
    /// Continues terraform's process group, unless the fence has stopped it.
    fn continue_group(&self, group: Pid);
}

/// The fence of a run without a lease: nothing.
pub(crate) struct NoFence;

impl GroupFence for NoFence {
    fn has_stopped(&self) -> bool {
        false
    }

    fn continue_group(&self, group: Pid) {
        let _ = killpg(group, Signal::SIGCONT);
    }
}

/// How the processes of a tree are ended.
#[derive(Clone, Copy)]
pub(crate) struct EndPolicy<'a> {
    /// Whether they get SIGKILL at once, without a grace period.
    pub(crate) at_once: bool,
    /// What ends the grace period early.
    pub(crate) fence: &'a dyn GroupFence,
}

/// The result of killing a tree.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Termination {
    /// The whole tree is dead. The number is how many running processes were found before. It is 0 if there is no
    /// process list.
    Dead(usize),
    /// These processes are still running and belong to the tree, or may belong to it.
    Alive(Vec<Process>),
    /// No process of the tree was found, but some process has the lifeline open.
    LifelineHeld,
    /// There is no process list, and a process may be running.
    Unseen,
}

impl Tree {
    /// Creates the tree of a new run, with its lifeline. Also returns the end of the lifeline that terraform inherits,
    /// at a high descriptor number.
    ///
    /// # Errors
    /// If the pipe cannot be created.
    pub(crate) fn new(run: &str) -> std::io::Result<(Self, OwnedFd)> {
        let (lifeline, end) = descriptor::pipe()?;
        let inherited = descriptor::inheritable_high(&end)?;
        let preexisting_children = process::own_children();
        let has_foreign_orphans = !preexisting_children.is_empty() || getpid() == Pid::from_raw(1);
        let tree = Self {
            lifeline,
            run: run.to_owned(),
            terraform: None,
            ours: RefCell::default(),
            preexisting_children,
            has_foreign_orphans,
            via_shim: false,
            recorder: None,
            own_group: false,
            survivors: RefCell::default(),
            observer: Observer::Subreaper,
        };
        Ok((tree, inherited))
    }

    /// Makes this process observe the tree as the guardian, to which no orphans of the tree are reparented.
    pub(crate) fn observe_as_guardian(&mut self) {
        self.observer = Observer::Guardian(RefCell::default());
        self.preexisting_children.clear();
    }

    /// Records that terraform gets a process group of its own.
    pub(crate) fn has_own_group(&mut self) {
        self.own_group = true;
    }

    /// Records the last moment at which terraform was known to be alive, in clock ticks since boot. Does nothing except
    /// in the guardian.
    pub(crate) fn was_alive_at(&self, moment: Option<u64>) {
        if let Observer::Guardian(view) = &self.observer {
            view.borrow_mut().certain_before = moment;
        }
    }

    /// Returns the running processes below terraform that are not in terraform's own process group: pid, and start time
    /// in clock ticks since boot. If terraform has no group of its own, returns all running processes below terraform.
    /// Empty without a process list.
    ///
    /// If such a process has cleared its environment, it can be recognised only by the chain of its parent pids. If a
    /// parent exits, the process is reparented, and the guardian, which is not an ancestor, can no longer tell that the
    /// process belongs to the tree. So `tf` records the process beforehand.
    pub(crate) fn outside_group(&self) -> Vec<(i32, u64)> {
        let below = Process::below(getpid());
        let is_outside = |process: &&Process| {
            !process.is_dead()
                && Some(process.group) != self.group()
                && self.membership(process, &below) == Membership::Member
        };
        let outside = below.iter().filter(is_outside).filter(|process| Some(process.pid) != self.terraform);
        identities(outside)
    }

    /// Adds `processes` (pid, and start time in clock ticks since boot) to the tree. Does nothing except in the
    /// guardian.
    pub(crate) fn add_members(&self, processes: &[(i32, u64)]) {
        if let Observer::Guardian(view) = &self.observer {
            view.borrow_mut().identity.survivors.extend(processes);
        }
    }

    /// Returns the processes that are still running, because [`Tree::end`] could not end them or because the cleanup
    /// does not kill them: pid, and start time in clock ticks since boot.
    pub(crate) fn survivors(&self) -> Vec<(i32, u64)> {
        self.survivors.borrow().clone()
    }

    /// Records `processes` as the survivors that [`Tree::survivors`] returns.
    pub(crate) fn note_survivors(&self, processes: &[Process]) {
        *self.survivors.borrow_mut() = identities(processes);
    }

    /// Returns the read end of the lifeline. A process forked from this one must keep it open to observe the tree.
    pub(crate) fn lifeline(&self) -> BorrowedFd<'_> {
        self.lifeline.as_fd()
    }

    /// Records that `pid`, the guardian or another helper, is a child of this process and does not belong to the tree.
    /// Call this before the helper can be reaped.
    pub(crate) fn exclude(&self, pid: Pid) {
        let start = Process::look_up(pid).map(|process| process.start);
        self.ours.borrow_mut().push((pid, start));
    }

    /// Whether the process is a helper of this process.
    fn is_ours(&self, process: &Process) -> bool {
        let is_same =
            |(pid, start): &(Pid, Option<u64>)| *pid == process.pid && start.is_none_or(|start| start == process.start);
        self.ours.borrow().iter().any(is_same)
    }

    /// Records that terraform was started as `pid`. Returns the data that identify the processes of the tree.
    pub(crate) fn started(&mut self, pid: Pid) -> TreeIdentity {
        self.terraform = Some(pid);
        let identity = TreeIdentity::of(pid, self.own_group);
        if let Observer::Guardian(view) = &self.observer {
            view.borrow_mut().identity = identity.clone();
        }
        identity
    }

    /// Returns terraform's process group. `None` if terraform has no group of its own, or was not started.
    pub(crate) fn group(&self) -> Option<Pid> {
        self.terraform.filter(|_| self.own_group)
    }

    /// Reaps the zombies that were reparented to this process. Does not reap terraform, the helpers of this process, or
    /// the processes in `others`. Does nothing in the guardian, because no orphans are reparented to it.
    pub(crate) fn reap_orphans(&self, others: &[Pid]) {
        if matches!(self.observer, Observer::Guardian(_)) {
            return;
        }
        for process in Process::children(getpid()) {
            let ours = self.is_ours(&process) || others.contains(&process.pid);
            if process.is_dead() && Some(process.pid) != self.terraform && !ours {
                wait::reap(process.pid);
            }
        }
    }

    /// Returns the running processes that certainly belong to the tree.
    pub(crate) fn living(&self) -> Vec<Process> {
        self.look().0
    }

    /// Whether the write end of the lifeline, which the processes of the tree inherit, is closed in every process.
    pub(crate) fn lifeline_is_closed(&self) -> bool {
        poll::ready_now(self.lifeline.as_fd(), PollFlags::POLLIN)
    }

    /// Returns two lists: the running members of the tree, and the running processes that may be members.
    fn look(&self) -> (Vec<Process>, Vec<Process>) {
        if let Observer::Guardian(view) = &self.observer {
            return self.look_as_guardian(&mut view.borrow_mut());
        }
        let failed_before = process::failed_reads();
        let mut members = Vec::new();
        let mut unknown = Vec::new();
        let below = Process::below(getpid());
        for process in &below {
            match self.membership(process, &below) {
                _ if process.is_dead() => {}
                Membership::Member => members.push(process.clone()),
                Membership::Unknown => unknown.push(process.clone()),
                Membership::Other => {}
            }
        }
        // If orphans are not reparented to this process, or were reparented to the init of a pid namespace, only the
        // mark in their environment identifies them.
        for process in Process::all() {
            let known = below.iter().any(|other| other.pid == process.pid);
            if !known && !process.is_dead() && process.pid != getpid() && self.is_marked(&process) {
                members.push(process);
            }
        }
        // What could not be read may be a member.
        if process::failed_reads() != failed_before {
            trace!("the process list could not be read");
            unknown.push(Process::unseen_in(Pid::from_raw(0)));
        }
        (members, unknown)
    }

    fn look_as_guardian(&self, view: &mut GuardianView) -> (Vec<Process>, Vec<Process>) {
        let mut living = Living::of(&self.run, &view.identity, view.certain_before);
        living.members.retain(|process| !self.is_ours(process));
        living.unknown.retain(|process| !self.is_ours(process));
        view.identity.survivors = living.members.iter().map(|process| (process.pid.as_raw(), process.start)).collect();
        (living.members, living.unknown)
    }

    /// Whether the environment of the process contains the mark of this run (`TFW_RUN`). If so, the process runs
    /// terraform, or is below terraform.
    pub(crate) fn is_marked(&self, process: &Process) -> bool {
        mark_of(process, &self.run) == ProcessMark::Marked
    }

    fn membership(&self, process: &Process, below: &[Process]) -> Membership {
        if Some(process.pid) == self.terraform || self.is_marked(process) {
            return Membership::Member;
        }
        if process.is_helper_of_ours() {
            // Such a helper is, for example, the guardian of another `tf` in this tree. It changes no infrastructure,
            // and must continue to run to release the lock of its own run.
            return Membership::Other;
        }
        self.membership_by_parents(process, below)
    }

    /// Returns the membership of a process without a mark, from the chain of its parents in `below`, which are all
    /// processes below this process.
    fn membership_by_parents(&self, process: &Process, below: &[Process]) -> Membership {
        // Finds the child of this process from which `process` descends.
        let mut top = process;
        for _ in 0..below.len() {
            match below.iter().find(|other| other.pid == top.parent) {
                Some(parent) => top = parent,
                None => break,
            }
        }
        if self.preexisting_children.contains(&top.pid) || self.is_ours(top) {
            Membership::Other
        } else if Some(top.pid) == self.terraform || Some(process.group) == self.terraform || !self.has_foreign_orphans
        {
            Membership::Member
        } else {
            Membership::Unknown
        }
    }

    /// Records which file terraform logs into, and whether the started program is a shim.
    pub(crate) fn set_log_file(&mut self, recorder: BorrowedFd<'_>, via_shim: bool) {
        self.recorder = FileId::of_open(recorder);
        self.via_shim = via_shim;
    }

    /// Returns the file that terraform logs into. `None` if it is unknown.
    pub(crate) fn recorder(&self) -> Option<FileId> {
        self.recorder
    }

    /// Whether the started program is a shim, which starts terraform.
    pub(crate) fn is_behind_a_shim(&self) -> bool {
        self.via_shim
    }

    /// Returns the running terraforms that log into the recorder. A terraform is recognised by the open recorder and
    /// not by the name of its program. Providers and the processes of provisioners do not have the recorder open,
    /// because Go closes it on exec (os.OpenFile). Empty if the recorder is unknown.
    pub(crate) fn logging(&self) -> Vec<Process> {
        let Some(recorder) = self.recorder else { return Vec::new() };
        let logs = |process: &Process| process.has_open(recorder) && process.runs_another_program();
        self.look().0.into_iter().filter(|process| !process.is_dead() && logs(process)).collect()
    }

    /// Returns the terraforms of [`Tree::logging`] that none of the others has started. A provisioner or a data source may
    /// run a terraform without `tf`, which logs into the same recorder.
    pub(crate) fn outermost_logging(&self) -> Vec<Process> {
        let logging = self.logging();
        if logging.len() < 2 {
            return logging;
        }
        let below: Vec<Pid> = logging.iter().flat_map(|above| Process::below(above.pid)).map(|it| it.pid).collect();
        logging.into_iter().filter(|process| !below.contains(&process.pid)).collect()
    }

    /// Returns the running terraforms that a shim has started. If the shim has exited, they are orphans, which continue
    /// to work. Empty if terraform was started directly.
    pub(crate) fn orphaned_terraforms(&self) -> Vec<Process> {
        if self.via_shim { self.logging() } else { Vec::new() }
    }

    /// Kills the remaining processes of the tree of a dead terraform. It sends SIGTERM first, and SIGKILL after a grace
    /// period, which depends on `policy`. A ^C at the terminal ends the grace period. `record` gets the processes that
    /// are still running, again and again.
    pub(crate) fn end(
        &self,
        waiter: &mut Waiter<'_>,
        policy: EndPolicy<'_>,
        record: &SurvivorRecord<'_>,
    ) -> Termination {
        let fate = match (process::list(), &self.observer) {
            (ProcessList::Unavailable, Observer::Subreaper) => self.end_unseen(waiter, policy),
            (ProcessList::Unavailable, Observer::Guardian(_)) | (ProcessList::Unsupported, _) => Termination::Unseen,
            (ProcessList::Available, _) => self.end_seen(waiter, policy, record),
        };
        if let Termination::Alive(processes) = &fate {
            self.note_survivors(processes);
        }
        fate
    }

    /// Does the same as [`Tree::end`] without a process list. The kernel still reports whether this process has any
    /// child. Orphans of the tree are reparented to this process. So if there is no child and the lifeline is closed,
    /// the tree is dead. Signals are sent only to terraform's process group, and only while a child of this process is
    /// in the group. As long as it is, no other group can have the same number.
    ///
    /// This also reaps terraform's own zombie. Terraform's status was read before, and no signal is sent to terraform's
    /// pid afterwards.
    fn end_unseen(&self, waiter: &mut Waiter<'_>, policy: EndPolicy<'_>) -> Termination {
        let begun = Instant::now();
        let mut schedule = EndSchedule::new(policy.at_once);
        let mut told = false;
        loop {
            if wait::reap_all() == Children::None && self.lifeline_is_closed() {
                return Termination::Dead(0);
            }
            let elapsed = begun.elapsed();
            if policy.fence.has_stopped() {
                schedule.end_grace(elapsed);
            }
            let step = schedule.step(elapsed, false);
            if step == EndStep::GiveUp {
                return Termination::Unseen;
            }
            if let Some(group) = self.group().filter(|group| wait::has_child_in(*group)) {
                match next_signal(step, !told) {
                    NextSignal::Kill => drop(killpg(group, Signal::SIGKILL)),
                    NextSignal::Terminate => {
                        told = true;
                        let _ = killpg(group, Signal::SIGTERM);
                        policy.fence.continue_group(group);
                    }
                    NextSignal::None => {}
                }
            }
            waiter.wait(POLL_INTERVAL);
        }
    }

    fn end_seen(&self, waiter: &mut Waiter<'_>, policy: EndPolicy<'_>, record: &SurvivorRecord<'_>) -> Termination {
        let begun = Instant::now();
        let mut schedule = EndSchedule::new(policy.at_once);
        let mut ended: Vec<Pid> = Vec::new();
        let mut clean = false;
        loop {
            if waiter.interrupts() > 0 && !ended.is_empty() {
                schedule.end_grace(begun.elapsed());
            }
            self.reap_orphans(&[]);
            let (members, unknown) = self.look();
            record.borrow_mut()(identities(members.iter().chain(&unknown)));
            if !self.is_any_alive(&members, &unknown) && self.lifeline_is_closed() {
                // Search twice. If a process's parent exits during the first search, the process is reparented to this
                // process, and the search can miss it. The second search finds it among the children of this process.
                if clean {
                    trace!("the tree is dead");
                    return Termination::Dead(ended.len());
                }
                clean = true;
                continue;
            }
            clean = false;
            let elapsed = begun.elapsed();
            if policy.fence.has_stopped() {
                schedule.end_grace(elapsed);
            }
            let step = schedule.step(elapsed, has_nested(&members, &self.run));
            if step == EndStep::GiveUp {
                let mut left = members;
                left.extend(unknown);
                return if left.is_empty() { Termination::LifelineHeld } else { Termination::Alive(left) };
            }
            let mut group_to_continue = None;
            for process in &members {
                let first = !ended.contains(&process.pid);
                match next_signal(step, first) {
                    NextSignal::Kill => send(process.pid, Signal::SIGKILL),
                    // The terraform of a nested run gets its one interrupt from its own `tf`, which gets a SIGTERM
                    // here. For the terraform of the nested run, a SIGTERM would be a second interrupt.
                    NextSignal::Terminate if is_nested(process, &self.run) => {}
                    NextSignal::Terminate => {
                        // A stopped process acts on SIGTERM only when it is continued.
                        send(process.pid, Signal::SIGTERM);
                        match self.group().filter(|group| *group == process.group) {
                            // A SIGCONT to one process would discard the stop at the end of the lease.
                            Some(group) => group_to_continue = Some(group),
                            None => send(process.pid, Signal::SIGCONT),
                        }
                    }
                    NextSignal::None => {}
                }
                if first {
                    trace!("ending {} {}", process.pid, process.program());
                    ended.push(process.pid);
                }
            }
            if let Some(group) = group_to_continue {
                policy.fence.continue_group(group);
            }
            waiter.wait(POLL_INTERVAL);
        }
    }

    /// Whether a process of the tree is running or may be running, according to a search that found `members` and
    /// `unknown`. For `tf`, terraform itself does not count: `tf` has read its exit status, and does not reap it.
    fn is_any_alive(&self, members: &[Process], unknown: &[Process]) -> bool {
        let is_parent = matches!(self.observer, Observer::Subreaper);
        let counts = |process: &Process| !(is_parent && Some(process.pid) == self.terraform);
        !unknown.is_empty() || members.iter().any(counts)
    }

    /// Sends SIGKILL to terraform and to every process of its tree that is running now.
    pub(crate) fn kill(&self) {
        if let Some(terraform) = self.terraform {
            send(terraform, Signal::SIGKILL);
        }
        if matches!(self.observer, Observer::Subreaper)
            && process::list() == ProcessList::Unavailable
            && let Some(group) = self.group()
        {
            // Terraform has not been reaped, so no other group can have the number of its group.
            let _ = killpg(group, Signal::SIGKILL);
        }
        self.kill_rest();
    }

    /// Does the same as [`Tree::kill`] after terraform has ended: its pid may belong to another process by now.
    pub(crate) fn kill_rest(&self) {
        for process in self.look().0 {
            send(process.pid, Signal::SIGKILL);
        }
    }
}

/// What to do about the processes of a tree now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum EndStep {
    /// They get SIGTERM, and then time to exit.
    Terminate,
    /// They get SIGKILL.
    Kill,
    /// They have got SIGKILL for [`KILL_TIMEOUT`], and have not exited.
    GiveUp,
}

/// When the processes of a tree get which signal. All times are counted from the start of the termination.
#[derive(Debug)]
struct EndSchedule {
    /// When the grace period was ended early. `None` if it was not.
    grace_ended_at: Option<Duration>,
    /// When SIGKILL was first due. `None` if it was not due yet.
    kills_since: Option<Duration>,
}

impl EndSchedule {
    /// `at_once`: there is no grace period.
    fn new(at_once: bool) -> Self {
        Self { grace_ended_at: at_once.then_some(Duration::ZERO), kills_since: None }
    }

    /// Ends the grace period early, at `elapsed`.
    fn end_grace(&mut self, elapsed: Duration) {
        self.grace_ended_at.get_or_insert(elapsed);
    }

    /// Returns what to do at `elapsed`. `has_nested` is whether a process of a nested run is running. The grace period
    /// is longer then. When that run has ended, the period may be over since long: the others get SIGKILL first, and
    /// have [`KILL_TIMEOUT`] from then on.
    fn step(&mut self, elapsed: Duration, has_nested: bool) -> EndStep {
        let grace = if has_nested { NESTED_TERM_GRACE } else { TERM_GRACE };
        if self.kills_since.is_none() && elapsed >= self.grace_ended_at.unwrap_or(grace).min(grace) {
            self.kills_since = Some(elapsed);
        }
        match self.kills_since {
            None => EndStep::Terminate,
            Some(since) if elapsed <= since + KILL_TIMEOUT => EndStep::Kill,
            Some(_) => EndStep::GiveUp,
        }
    }
}

/// The next signal for a process that must exit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NextSignal {
    /// SIGKILL.
    Kill,
    /// SIGTERM, and then SIGCONT.
    Terminate,
    /// No signal: the process has got SIGTERM, and its grace period is not over.
    None,
}

/// Returns the next signal for a process. `is_first` is whether the process has got no signal yet.
fn next_signal(step: EndStep, is_first: bool) -> NextSignal {
    match step {
        EndStep::Kill => NextSignal::Kill,
        EndStep::Terminate if is_first => NextSignal::Terminate,
        EndStep::Terminate | EndStep::GiveUp => NextSignal::None,
    }
}

fn send(pid: Pid, signal: Signal) {
    match kill(pid, signal) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(error) => trace!("cannot send {signal} to {pid}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERRAFORM: i32 = 5_000_000;
    const HELPER: i32 = TERRAFORM + 1;
    const EARLIER: i32 = TERRAFORM + 2;

    /// Returns a process with a pid that no process has (the maximum is 2^22), and therefore without an environment.
    fn process(pid: i32, parent: i32) -> Process {
        let [pid, parent, group] = [pid, parent, pid].map(Pid::from_raw);
        Process { pid, thread: pid, name: "x".into(), state: 'S', parent, group, session: group, start: 7 }
    }

    /// Returns the tree of [`TERRAFORM`], whose parent has also the children [`HELPER`] and [`EARLIER`].
    fn tree(has_foreign_orphans: bool) -> Tree {
        let (mut tree, _end) = Tree::new("run").unwrap();
        tree.preexisting_children = vec![Pid::from_raw(EARLIER)];
        tree.has_foreign_orphans = has_foreign_orphans;
        tree.has_own_group();
        tree.started(Pid::from_raw(TERRAFORM));
        tree.exclude(Pid::from_raw(HELPER));
        tree
    }

    #[test]
    fn a_process_belongs_to_the_tree_if_it_descends_from_terraform_or_can_descend_from_nothing_else() {
        let own = getpid().as_raw();
        let (child, grandchild) = (TERRAFORM + 10, TERRAFORM + 11);
        for has_foreign_orphans in [false, true] {
            let tree = tree(has_foreign_orphans);
            for (top, expected) in [
                (TERRAFORM, Membership::Member),
                (HELPER, Membership::Other),
                (EARLIER, Membership::Other),
                // An orphan. It is of the tree, unless another tree may have lost it to this process.
                (own, if has_foreign_orphans { Membership::Unknown } else { Membership::Member }),
            ] {
                let mut below = vec![process(child, top), process(grandchild, child)];
                if top != own {
                    below.push(process(top, own));
                }
                for process in &below {
                    assert_eq!(tree.membership(process, &below), expected, "{process:?} {has_foreign_orphans}");
                }
            }
        }
    }

    #[test]
    fn an_orphan_in_terraforms_group_belongs_to_the_tree() {
        let orphan = Process { group: Pid::from_raw(TERRAFORM), ..process(TERRAFORM + 10, getpid().as_raw()) };
        assert_eq!(tree(true).membership(&orphan, std::slice::from_ref(&orphan)), Membership::Member);
        let of_helper = Process { parent: Pid::from_raw(HELPER), ..orphan };
        let below = [process(HELPER, getpid().as_raw()), of_helper.clone()];
        assert_eq!(tree(true).membership(&of_helper, &below), Membership::Other);
    }

    #[test]
    fn a_process_that_got_the_pid_of_a_helper_later_is_no_helper() {
        let own = getpid();
        let Some(itself) = Process::look_up(own) else { return };
        let tree = tree(false);
        let helper = Process { parent: Pid::from_raw(1), ..itself };
        for is_excluded in [false, true] {
            let expected = if is_excluded { Membership::Other } else { Membership::Member };
            assert_eq!(tree.membership_by_parents(&helper, std::slice::from_ref(&helper)), expected);
            tree.exclude(own);
        }
        let later = Process { start: helper.start + 1, ..helper };
        assert_eq!(tree.membership_by_parents(&later, std::slice::from_ref(&later)), Membership::Member);
    }

    /// The list of processes is not read at one moment, so a reused pid can make a process its own ancestor.
    #[test]
    fn parents_in_a_circle_are_no_endless_search() {
        let below = [process(TERRAFORM + 10, TERRAFORM + 11), process(TERRAFORM + 11, TERRAFORM + 10)];
        assert_eq!(tree(true).membership(&below[0], &below), Membership::Unknown);
    }

    #[test]
    fn the_guardian_has_no_children_that_are_not_terraforms() {
        let mut tree = tree(false);
        tree.observe_as_guardian();
        assert!(tree.preexisting_children.is_empty());
    }

    #[test]
    fn a_mark_that_goes_on_after_the_run_is_that_of_a_nested_run() {
        for (runs, expected) in [
            ("run", false),
            ("run/inner", true),
            ("outer/run", false),
            ("outer/run/inner", true),
            ("outer/run/inner/innermost", true),
            ("", false),
            ("other", false),
            ("other/inner", false),
            ("run2/inner", false),
            ("outer/xrun/inner", false),
        ] {
            assert_eq!(names_nested_run(runs.as_bytes(), "run"), expected, "{runs:?}");
        }
    }

    #[test]
    fn a_process_gets_one_term_and_after_the_grace_period_kills() {
        for (step, is_first, expected) in [
            (EndStep::Terminate, true, NextSignal::Terminate),
            (EndStep::Terminate, false, NextSignal::None),
            (EndStep::Kill, true, NextSignal::Kill),
            (EndStep::Kill, false, NextSignal::Kill),
            (EndStep::GiveUp, true, NextSignal::None),
            (EndStep::GiveUp, false, NextSignal::None),
        ] {
            assert_eq!(next_signal(step, is_first), expected, "{step:?} {is_first}");
        }
    }

    /// Runs a termination in rounds of 1 s. `nested_until` is the last second in which a nested run is running.
    /// Returns the second in which SIGKILL is first sent, and the one in which the termination is given up.
    fn ended(at_once: bool, grace_ended_at: Option<u64>, nested_until: Option<u64>) -> (u64, u64) {
        let mut schedule = EndSchedule::new(at_once);
        let mut killed = None;
        for second in 0.. {
            let elapsed = Duration::from_secs(second);
            if grace_ended_at.is_some_and(|at| at <= second) {
                schedule.end_grace(elapsed);
            }
            match schedule.step(elapsed, nested_until.is_some_and(|until| second <= until)) {
                EndStep::Terminate => assert_eq!(killed, None, "a SIGTERM after a SIGKILL"),
                EndStep::Kill => killed = killed.or(Some(second)),
                EndStep::GiveUp => return (killed.expect("given up without a SIGKILL"), second),
            }
        }
        unreachable!()
    }

    #[test]
    fn the_grace_period_is_longer_for_a_nested_run_and_a_key_ends_it() {
        for (at_once, grace_ended_at, nested_until, expected) in [
            (false, None, None, 5),
            (false, None, Some(100), 60),
            (true, None, None, 0),
            (true, None, Some(100), 0),
            (false, Some(2), None, 2),
            (false, Some(20), Some(100), 20),
            // The nested run ends before and after the time that the others would have had without it.
            (false, None, Some(3), 5),
            (false, None, Some(12), 13),
            (false, Some(48), Some(48), 48),
        ] {
            let (killed, given_up) = ended(at_once, grace_ended_at, nested_until);
            assert_eq!(killed, expected, "{at_once} {grace_ended_at:?} {nested_until:?}");
            assert_eq!(given_up, killed + KILL_TIMEOUT.as_secs() + 1, "{at_once} {grace_ended_at:?} {nested_until:?}");
        }
    }

    #[test]
    fn what_a_termination_gives_up_has_had_sigkill_for_the_whole_timeout() {
        for at_once in [false, true] {
            for grace_ended_at in [None, Some(0), Some(4), Some(5), Some(6), Some(30), Some(59), Some(60), Some(61)] {
                for nested_until in [None, Some(0), Some(4), Some(5), Some(11), Some(59), Some(60), Some(80)] {
                    let (killed, given_up) = ended(at_once, grace_ended_at, nested_until);
                    assert!(given_up > killed + KILL_TIMEOUT.as_secs(), "{grace_ended_at:?} {nested_until:?}");
                }
            }
        }
    }

    #[test]
    fn terraform_counts_as_alive_for_the_guardian_alone() {
        let mut tree = tree(true);
        let [terraform, other] = [TERRAFORM, TERRAFORM + 10].map(|pid| process(pid, 1));
        let both = [terraform.clone(), other.clone()];
        for (is_guardian, terraform_counts) in [(false, false), (true, true)] {
            if is_guardian {
                tree.observe_as_guardian();
            }
            assert!(!tree.is_any_alive(&[], &[]));
            assert_eq!(tree.is_any_alive(&both[..1], &[]), terraform_counts);
            assert!(tree.is_any_alive(&both[1..], &[]));
            assert!(tree.is_any_alive(&both, &[]));
            assert!(tree.is_any_alive(&[], &both[1..]), "what may belong to the tree counts");
        }
    }
}
