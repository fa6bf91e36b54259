//! Terraform's process tree: is it dead, and if not, ending it.
//!
//! After `kill -9` of terraform a provider lives on for seconds, and a script for as long as it likes, both still
//! changing infrastructure. No single sign of that can be trusted. A child may close every descriptor (Python's
//! `subprocess` does), may be orphaned, may clear its environment. So dead means all of:
//!
//! - the lifeline is closed: a pipe that the whole tree inherited, at a high number;
//! - nothing is below us: orphans come to us, as their subreaper, and not to init;
//! - no process of ours anywhere has `TFW_RUN` with this run in its environment.
//!
//! The guardian is no ancestor of anybody, and orphans do not come to it. [`crate::journal::membership`] says what it goes by instead.
//! What escapes it has left terraform's process group, cleared its environment, closed every descriptor and lost its parent
//! before the guardian ever saw it.
//!
//! Without a process list ([`process::list`]: no /proc, or another namespace's) nobody can be found. Then `tf`, as the
//! subreaper, asks the kernel whether it has any child left, which no descendant can escape; what the guardian cannot see
//! is a doubt.
//!
//! A zombie is dead. A process that we may not signal is a reason for doubt, and doubt keeps the lock.

use crate::journal::run_mark::Living;
use crate::journal::run_mark::RUN;
use crate::journal::run_mark::mark_of;
use std::cell::RefCell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, getpid};

use crate::cleanup::waiter::Waiter;
use crate::journal::membership::{ProcessMark, TreeIdentity};
use crate::sys::descriptor;
use crate::sys::poll;
use crate::sys::process::{self, Process, ProcessList, Variable};
use crate::sys::wait::{self, Children};
use crate::trace::trace;

/// How long what is left of a tree may take to end after TERM, before KILL.
const TERM_GRACE: Duration = Duration::from_secs(5);

/// The same for the tree of a `tf` that something in ours has started: its terraform got one interrupt, and saves its state.
const NESTED_TERM_GRACE: Duration = Duration::from_mins(1);

/// How long it may take after KILL. What is still there then hangs in the kernel, or is not ours to kill.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// How often is looked again.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// The tree below us, and how to recognise it.
#[derive(Debug)]
pub(crate) struct Tree {
    lifeline: OwnedFd,
    /// The value of `TFW_RUN`, or its last part.
    run: String,
    terraform: Option<Pid>,
    /// Children that we started for ourselves.
    ours: RefCell<Vec<Pid>>,
    /// Children that we had before terraform: a shell that became us by exec may leave some.
    preexisting_children: Vec<Pid>,
    /// Orphans of strangers may come to us too: we had strange children, or are PID 1.
    has_foreign_orphans: bool,
    /// What we start is no terraform itself, and leads to one: its status is not terraform's, which may outlive it.
    via_shim: bool,
    /// The recorder: its device and its number there.
    recorder: Option<(u64, u64)>,
    /// Terraform has a process group of its own.
    own_group: bool,
    /// What was seen to live on when [`Tree::end`] gave up: pid and start.
    survivors: RefCell<Vec<(i32, u64)>>,
    observer: Observer,
}

/// From where a tree is seen.
#[derive(Debug)]
enum Observer {
    /// By its parent, to whom its orphans come.
    Subreaper,
    /// By the guardian.
    Guardian(RefCell<GuardianView>),
}

/// What the guardian knows of a tree.
#[derive(Debug, Default)]
struct GuardianView {
    /// Everybody that was ever seen to belong to it is among its survivors.
    identity: TreeIdentity,
    /// See [`crate::journal::membership::classify`].
    certain_before: Option<u64>,
}

/// Whether the process belongs to a run below `run`, which has a `tf` of its own.
fn is_nested(process: &Process, run: &str) -> bool {
    let Variable::Set(runs) = process.environment(RUN) else { return false };
    let mut runs = runs.split(|&byte| byte == b'/').skip_while(|marked| *marked != run.as_bytes());
    runs.next().is_some() && runs.next().is_some()
}

/// What a process found below us is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Membership {
    /// It descends from terraform.
    Member,
    /// It does not.
    Other,
    /// Nothing tells.
    Unknown,
}

/// How the end of a tree came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Termination {
    /// All of it is dead; so many processes had to be ended.
    Dead(usize),
    /// These live, or may.
    Alive(Vec<Process>),
    /// Nothing is to be seen, but somebody holds the lifeline.
    LifelineHeld,
    /// There is no process list, and something may live.
    Unseen,
}

impl Tree {
    /// The lifeline of a new run: what is watched, and the end that terraform inherits, at a high number.
    ///
    /// # Errors
    /// When no pipe can be made.
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

    /// This is not terraform's parent any more, but its guardian.
    pub(crate) fn observe_as_guardian(&mut self) {
        self.observer = Observer::Guardian(RefCell::default());
        self.preexisting_children.clear();
    }

    /// Terraform is given a process group of its own.
    pub(crate) fn has_own_group(&mut self) {
        self.own_group = true;
    }

    /// Notes a moment at which terraform was alive, in clock ticks since boot. For the guardian.
    pub(crate) fn was_alive_at(&self, moment: Option<u64>) {
        if let Observer::Guardian(view) = &self.observer {
            view.borrow_mut().certain_before = moment;
        }
    }

    /// The living processes below terraform that have left its group, by pid and start: what only descent tells, and an observer
    /// who is not above them cannot see any more when their parents are gone. Empty without a process list.
    pub(crate) fn outside_group(&self) -> Vec<(i32, u64)> {
        let below = Process::below(getpid());
        let is_outside = |process: &&Process| {
            !process.is_dead()
                && Some(process.group) != self.group()
                && self.membership(process, &below) == Membership::Member
        };
        let outside = below.iter().filter(is_outside).filter(|process| Some(process.pid) != self.terraform);
        outside.map(|process| (process.pid.as_raw(), process.start)).collect()
    }

    /// Takes `processes` for members. For the guardian.
    pub(crate) fn add_members(&self, processes: &[(i32, u64)]) {
        if let Observer::Guardian(view) = &self.observer {
            view.borrow_mut().identity.survivors.extend(processes);
        }
    }

    /// What was seen to live on when [`Tree::end`] gave up, or when the tree was left alone: pid and start.
    pub(crate) fn survivors(&self) -> Vec<(i32, u64)> {
        self.survivors.borrow().clone()
    }

    /// Keeps `processes` as what lives on.
    pub(crate) fn note_survivors(&self, processes: &[Process]) {
        *self.survivors.borrow_mut() = processes.iter().map(|process| (process.pid.as_raw(), process.start)).collect();
    }

    /// What a process forked from us must keep to see the tree.
    pub(crate) fn lifeline(&self) -> BorrowedFd<'_> {
        self.lifeline.as_fd()
    }

    /// `pid`, the guardian or another helper, is a child of ours and none of terraform's.
    pub(crate) fn exclude(&self, pid: Pid) {
        self.ours.borrow_mut().push(pid);
    }

    /// Terraform was started as `pid`. Gives what its processes can be known by.
    pub(crate) fn started(&mut self, pid: Pid) -> TreeIdentity {
        self.terraform = Some(pid);
        let identity = TreeIdentity::of(pid, self.own_group);
        if let Observer::Guardian(view) = &self.observer {
            view.borrow_mut().identity = identity.clone();
        }
        identity
    }

    /// Terraform's process group, where it has one of its own.
    pub(crate) fn group(&self) -> Option<Pid> {
        self.terraform.filter(|_| self.own_group)
    }

    /// Takes away the zombies that came to us, but not terraform, nor a child that something else of ours started.
    pub(crate) fn reap_orphans(&self, others: &[Pid]) {
        if matches!(self.observer, Observer::Guardian(_)) {
            return;
        }
        for process in Process::children(getpid()) {
            let ours = self.ours.borrow().contains(&process.pid) || others.contains(&process.pid);
            if process.is_dead() && Some(process.pid) != self.terraform && !ours {
                wait::reap(process.pid);
            }
        }
    }

    /// The living processes of the tree.
    pub(crate) fn living(&self) -> Vec<Process> {
        self.look().0
    }

    /// Nobody holds the end that terraform inherited.
    pub(crate) fn lifeline_is_closed(&self) -> bool {
        poll::ready_now(self.lifeline.as_fd(), PollFlags::POLLIN)
    }

    /// The living kin, and those of which nothing tells whether they are.
    fn look(&self) -> (Vec<Process>, Vec<Process>) {
        if let Observer::Guardian(view) = &self.observer {
            return self.look_as_guardian(&mut view.borrow_mut());
        }
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
        // Where orphans do not come to us, or came to a namespace's own init, the mark is what is left of them.
        for process in Process::all() {
            let known = below.iter().any(|other| other.pid == process.pid);
            if !known && !process.is_dead() && process.pid != getpid() && self.is_marked(&process) {
                members.push(process);
            }
        }
        (members, unknown)
    }

    fn look_as_guardian(&self, view: &mut GuardianView) -> (Vec<Process>, Vec<Process>) {
        let living = Living::of(&self.run, &view.identity, view.certain_before);
        view.identity.survivors = living.members.iter().map(|process| (process.pid.as_raw(), process.start)).collect();
        (living.members, living.unknown)
    }

    /// Whether the process carries the mark of this run: it is terraform by now, or something below it.
    pub(crate) fn is_marked(&self, process: &Process) -> bool {
        mark_of(process, &self.run) == ProcessMark::Marked
    }

    fn membership(&self, process: &Process, below: &[Process]) -> Membership {
        if Some(process.pid) == self.terraform || self.is_marked(process) {
            return Membership::Member;
        }
        // Up to the child of ours that it hangs from.
        let mut top = process;
        for _ in 0..below.len() {
            match below.iter().find(|other| other.pid == top.parent) {
                Some(parent) => top = parent,
                None => break,
            }
        }
        if process.is_helper_of_ours() {
            // The guardian of a `tf` in our tree. It works on no resource, and releases the lock of its own run.
            return Membership::Other;
        }
        if self.preexisting_children.contains(&top.pid) || self.ours.borrow().contains(&top.pid) {
            Membership::Other
        } else if Some(top.pid) == self.terraform || Some(process.group) == self.terraform || !self.has_foreign_orphans
        {
            Membership::Member
        } else {
            Membership::Unknown
        }
    }

    /// Tells the file that terraform logs into, and whether what is started is no terraform itself, and leads to one.
    pub(crate) fn set_log_file(&mut self, recorder: BorrowedFd<'_>, via_shim: bool) {
        self.recorder = descriptor::identity(recorder);
        self.via_shim = via_shim;
    }

    /// The file that terraform logs into, by its device and its number there.
    pub(crate) fn recorder(&self) -> Option<(u64, u64)> {
        self.recorder
    }

    /// Whether what was started only leads to terraform.
    pub(crate) fn is_behind_a_shim(&self) -> bool {
        self.via_shim
    }

    /// The living terraforms of which we see the log: whatever they are called, each has the recorder open, and neither a
    /// provider has it nor what a provisioner started, for Go closes it on exec (os.OpenFile).
    pub(crate) fn logging(&self) -> Vec<Process> {
        let Some(recorder) = self.recorder else { return Vec::new() };
        let logs = |process: &Process| process.has_open(recorder) && process.runs_another_program();
        self.look().0.into_iter().filter(|process| !process.is_dead() && logs(process)).collect()
    }

    /// The terraforms that what we started has led to, and that outlived it. Each is at work as it always was.
    pub(crate) fn orphaned_terraforms(&self) -> Vec<Process> {
        if self.via_shim { self.logging() } else { Vec::new() }
    }

    /// Ends what is left of the tree of a dead terraform: TERM, and KILL after a time of grace, or at once when
    /// `at_once` says that the time for grace is over. A key at the terminal ends the grace too.
    pub(crate) fn end(&self, waiter: &mut Waiter<'_>, at_once: bool) -> Termination {
        let fate = match (process::list(), &self.observer) {
            (ProcessList::Unavailable, Observer::Subreaper) => self.end_unseen(waiter, at_once),
            (ProcessList::Unavailable, Observer::Guardian(_)) => Termination::Unseen,
            (ProcessList::Available | ProcessList::Unsupported, _) => self.end_seen(waiter, at_once),
        };
        if let Termination::Alive(processes) = &fate {
            self.note_survivors(processes);
        }
        fate
    }

    /// The same without a process list. The kernel still tells whether we have any child, and orphans of the tree come to
    /// us: so without a child there is no tree. Signals go to terraform's process group alone, and only while a child of
    /// ours is in it, so that its number cannot be another group's.
    ///
    /// Terraform's own zombie is taken away here. Its status was read before, and nobody sends it a signal from here on.
    fn end_unseen(&self, waiter: &mut Waiter<'_>, at_once: bool) -> Termination {
        let begun = Instant::now();
        let kill_from = if at_once { Duration::ZERO } else { TERM_GRACE };
        let mut told = false;
        loop {
            if wait::reap_all() == Children::None && self.lifeline_is_closed() {
                return Termination::Dead(0);
            }
            let elapsed = begun.elapsed();
            if elapsed > kill_from + KILL_TIMEOUT {
                return Termination::Unseen;
            }
            if let Some(group) = self.group().filter(|group| wait::has_child_in(*group)) {
                if elapsed >= kill_from {
                    let _ = killpg(group, Signal::SIGKILL);
                } else if !std::mem::replace(&mut told, true) {
                    let _ = killpg(group, Signal::SIGTERM);
                    let _ = killpg(group, Signal::SIGCONT);
                }
            }
            waiter.wait(POLL_INTERVAL);
        }
    }

    fn end_seen(&self, waiter: &mut Waiter<'_>, at_once: bool) -> Termination {
        let begun = Instant::now();
        let mut enough = at_once.then_some(Duration::ZERO);
        let mut ended: Vec<Pid> = Vec::new();
        let mut clean = false;
        loop {
            if waiter.interrupts() > 0 && !ended.is_empty() {
                enough = enough.or_else(|| Some(begun.elapsed()));
            }
            self.reap_orphans(&[]);
            let (members, unknown) = self.look();
            let above = matches!(self.observer, Observer::Subreaper);
            let alive = members.iter().filter(|process| !(above && Some(process.pid) == self.terraform)).count();
            if alive == 0 && unknown.is_empty() && self.lifeline_is_closed() {
                // Twice: a process whose parent dies while we look comes to us behind our back. If nothing was below
                // us then, it is below us now.
                if clean {
                    trace!("the tree is dead");
                    return Termination::Dead(ended.len());
                }
                clean = true;
                continue;
            }
            clean = false;
            let elapsed = begun.elapsed();
            let grace = if members.iter().any(|process| is_nested(process, &self.run)) {
                NESTED_TERM_GRACE
            } else {
                TERM_GRACE
            };
            let kill_from = enough.unwrap_or(grace).min(grace);
            if elapsed > kill_from + KILL_TIMEOUT {
                let mut left = members;
                left.extend(unknown);
                return if left.is_empty() { Termination::LifelineHeld } else { Termination::Alive(left) };
            }
            for process in &members {
                let first = !ended.contains(&process.pid);
                if elapsed >= kill_from {
                    send(process.pid, Signal::SIGKILL);
                } else if first && !is_nested(process, &self.run) {
                    // A terraform of a nested run gets its one interrupt from its own tf, which is told here: TERM would be a
                    // second one. A stopped process acts on TERM only when it is continued.
                    send(process.pid, Signal::SIGTERM);
                    send(process.pid, Signal::SIGCONT);
                }
                if first {
                    trace!("ending {} {}", process.pid, process.program());
                    ended.push(process.pid);
                }
            }
            waiter.wait(POLL_INTERVAL);
        }
    }

    /// SIGKILL to terraform and all that is below it now.
    pub(crate) fn kill(&self) {
        if let Some(terraform) = self.terraform {
            send(terraform, Signal::SIGKILL);
        }
        if matches!(self.observer, Observer::Subreaper)
            && process::list() == ProcessList::Unavailable
            && let Some(group) = self.group()
        {
            // Terraform is not taken away yet, so the number is its group's.
            let _ = killpg(group, Signal::SIGKILL);
        }
        for process in self.look().0 {
            send(process.pid, Signal::SIGKILL);
        }
    }
}

fn send(pid: Pid, signal: Signal) {
    match kill(pid, signal) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(error) => trace!("cannot send {signal} to {pid}: {error}"),
    }
}
