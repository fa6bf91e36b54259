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
//! The guardian is no ancestor of anybody, and orphans do not come to it. Instead of looking below itself it follows the
//! mark downwards: whatever descends from a marked process, or did when it was looked at last, belongs to the tree too.
//! What escapes that cleared its environment, closed every descriptor and lost its parent before the guardian ever saw it.
//!
//! A zombie is dead. A process that we may not signal is a reason for doubt, and doubt keeps the lock.

use std::cell::RefCell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getpid};

use super::patience::Patience;
use super::poll;
use crate::sys::descriptor;
use crate::sys::process::{self, Process};
use crate::sys::wait;
use crate::trace::trace;

/// The variable that marks every process of a run. A run below another one names both, the outer first: `OUTER/INNER`.
pub(crate) const RUN: &str = "TFW_RUN";

/// How long what is left of a tree may take to end after TERM, before KILL.
const GRACE: Duration = Duration::from_secs(5);

/// How long it may take after KILL. What is still there then hangs in the kernel, or is not ours to kill.
const AFTER_KILL: Duration = Duration::from_secs(5);

/// How often is looked again.
const LOOK: Duration = Duration::from_millis(10);

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
    strangers: Vec<Pid>,
    /// Orphans of strangers may come to us too: we had strange children, or are PID 1.
    strangers_possible: bool,
    /// What we start is no terraform itself, and leads to one: its status is not terraform's, which may outlive it.
    leads_on: bool,
    /// The recorder: its device and its number there.
    recorder: Option<(u64, u64)>,
    vantage: Vantage,
}

/// From where a tree is seen.
#[derive(Debug)]
enum Vantage {
    /// By its parent, to whom its orphans come.
    Above,
    /// By the guardian: with everybody that was ever seen to belong to it.
    Beside(RefCell<Vec<(Pid, u64)>>),
}

/// Whether anybody is alive who carries the mark of run `run`.
pub(crate) fn has_living(run: &str) -> bool {
    Process::all().iter().any(|process| !process.is_dead() && is_marked(process, run) == Some(true))
}

/// Whether the process carries the mark of `run`; `None` when its environment cannot be read or is empty.
fn is_marked(process: &Process, run: &str) -> Option<bool> {
    let runs = process.environment(RUN)?;
    Some(runs.split(|&byte| byte == b'/').any(|marked| marked == run.as_bytes()))
}

/// What a process found below us is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kinship {
    /// It descends from terraform.
    Kin,
    /// It does not.
    Stranger,
    /// Nothing tells.
    Unclear,
}

/// How the end of a tree came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// All of it is dead; so many processes had to be ended.
    Dead(usize),
    /// These live, or may.
    Alive(Vec<Process>),
    /// Nothing is to be seen, but somebody holds the lifeline.
    LifelineHeld,
}

impl Tree {
    /// The lifeline of a new run: what is watched, and the end that terraform inherits, at a high number.
    ///
    /// # Errors
    /// When no pipe can be made.
    pub(crate) fn new(run: &str) -> std::io::Result<(Self, OwnedFd)> {
        let (lifeline, end) = descriptor::pipe()?;
        let inherited = descriptor::inheritable_high(&end)?;
        let strangers = process::own_children();
        let strangers_possible = !strangers.is_empty() || getpid() == Pid::from_raw(1);
        let tree = Self {
            lifeline,
            run: run.to_owned(),
            terraform: None,
            ours: RefCell::default(),
            strangers,
            strangers_possible,
            leads_on: false,
            recorder: None,
            vantage: Vantage::Above,
        };
        Ok((tree, inherited))
    }

    /// This is not terraform's parent any more, but its guardian.
    pub(crate) fn see_from_beside(&mut self) {
        self.vantage = Vantage::Beside(RefCell::default());
        self.strangers.clear();
    }

    /// What a process forked from us must keep to see the tree.
    pub(crate) fn lifeline(&self) -> BorrowedFd<'_> {
        self.lifeline.as_fd()
    }

    /// `pid`, the guardian or another helper, is a child of ours and none of terraform's.
    pub(crate) fn leave_out(&self, pid: Pid) {
        self.ours.borrow_mut().push(pid);
    }

    /// Terraform was started as `pid`.
    pub(crate) fn started(&mut self, pid: Pid) {
        self.terraform = Some(pid);
    }

    /// Takes away the zombies that came to us, but not terraform, nor a child that something else of ours started.
    pub(crate) fn reap_orphans(&self, others: &[Pid]) {
        if matches!(self.vantage, Vantage::Beside(_)) {
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
        if let Vantage::Beside(known) = &self.vantage {
            return (self.look_from_beside(&mut known.borrow_mut()), Vec::new());
        }
        let mut kin = Vec::new();
        let mut unclear = Vec::new();
        let below = Process::below(getpid());
        for process in &below {
            match self.kinship(process, &below) {
                _ if process.is_dead() => {}
                Kinship::Kin => kin.push(process.clone()),
                Kinship::Unclear => unclear.push(process.clone()),
                Kinship::Stranger => {}
            }
        }
        // Where orphans do not come to us, or came to a namespace's own init, the mark is what is left of them.
        for process in Process::all() {
            let known = below.iter().any(|other| other.pid == process.pid);
            if !known && !process.is_dead() && process.pid != getpid() && self.is_marked(&process) {
                kin.push(process);
            }
        }
        (kin, unclear)
    }

    /// Everybody alive who carries the mark, descends from one who does, or was seen to belong before.
    fn look_from_beside(&self, known: &mut Vec<(Pid, u64)>) -> Vec<Process> {
        let all: Vec<Process> = Process::all().into_iter().filter(|process| process.pid != getpid()).collect();
        let mut found: Vec<bool> = all
            .iter()
            .map(|process| known.contains(&(process.pid, process.start)) || self.is_marked(process))
            .collect();
        // Downwards, until nobody new is found. A zombie's children have another parent already.
        loop {
            let parents: Vec<Pid> =
                all.iter().zip(&found).filter(|(_, found)| **found).map(|(process, _)| process.pid).collect();
            let mut more = false;
            for (process, found) in all.iter().zip(&mut found) {
                if !*found && parents.contains(&process.parent) {
                    (*found, more) = (true, true);
                }
            }
            if !more {
                break;
            }
        }
        let kin: Vec<Process> = all
            .into_iter()
            .zip(found)
            .filter(|(process, found)| *found && !process.is_dead())
            .map(|(process, _)| process)
            .collect();
        *known = kin.iter().map(|process| (process.pid, process.start)).collect();
        kin
    }

    /// Whether the process carries the mark of this run: it is terraform by now, or something below it.
    pub(crate) fn is_marked(&self, process: &Process) -> bool {
        is_marked(process, &self.run) == Some(true)
    }

    fn kinship(&self, process: &Process, below: &[Process]) -> Kinship {
        if Some(process.pid) == self.terraform || self.is_marked(process) {
            return Kinship::Kin;
        }
        // Up to the child of ours that it hangs from.
        let mut top = process;
        for _ in 0..below.len() {
            match below.iter().find(|other| other.pid == top.parent) {
                Some(parent) => top = parent,
                None => break,
            }
        }
        if self.strangers.contains(&top.pid) || self.ours.borrow().contains(&top.pid) {
            Kinship::Stranger
        } else if Some(top.pid) == self.terraform || Some(process.group) == self.terraform || !self.strangers_possible {
            Kinship::Kin
        } else {
            Kinship::Unclear
        }
    }

    /// Tells the file that terraform logs into, and whether what is started is no terraform itself, and leads to one.
    pub(crate) fn records_into(&mut self, recorder: BorrowedFd<'_>, leads_on: bool) {
        self.recorder = descriptor::identity(recorder);
        self.leads_on = leads_on;
    }

    /// Whether what was started only leads to terraform.
    pub(crate) fn is_behind_a_shim(&self) -> bool {
        self.leads_on
    }

    /// The living terraforms of which we see the log: whatever they are called, each has the recorder open, and neither a
    /// provider has it nor what a provisioner started, for Go closes it on exec (os.OpenFile).
    pub(crate) fn logging(&self) -> Vec<Process> {
        let Some(recorder) = self.recorder else { return Vec::new() };
        let logs = |process: &Process| process.has_open(recorder) && process.runs_another_program();
        self.look().0.into_iter().filter(|process| !process.is_dead() && logs(process)).collect()
    }

    /// The terraforms that what we started has led to, and that outlived it. Each is at work as it always was.
    pub(crate) fn bereaved(&self) -> Vec<Process> {
        if self.leads_on { self.logging() } else { Vec::new() }
    }

    /// Ends what is left of the tree of a dead terraform: TERM, and KILL after a time of grace, or at once when
    /// `at_once` says that the time for grace is over. A key at the terminal ends the grace too.
    pub(crate) fn end(&self, patience: &mut Patience<'_>, at_once: bool) -> Fate {
        let begun = Instant::now();
        let mut kill_from = if at_once { Duration::ZERO } else { GRACE };
        let mut ended: Vec<Pid> = Vec::new();
        let mut clean = false;
        loop {
            if patience.interrupts() > 0 && !ended.is_empty() {
                kill_from = kill_from.min(begun.elapsed());
            }
            self.reap_orphans(&[]);
            let (kin, unclear) = self.look();
            let above = matches!(self.vantage, Vantage::Above);
            let alive = kin.iter().filter(|process| !(above && Some(process.pid) == self.terraform)).count();
            if alive == 0 && unclear.is_empty() && self.lifeline_is_closed() {
                // Twice: a process whose parent dies while we look comes to us behind our back. If nothing was below
                // us then, it is below us now.
                if clean {
                    trace!("the tree is dead");
                    return Fate::Dead(ended.len());
                }
                clean = true;
                continue;
            }
            clean = false;
            let elapsed = begun.elapsed();
            if elapsed > kill_from + AFTER_KILL {
                let mut left = kin;
                left.extend(unclear);
                return if left.is_empty() { Fate::LifelineHeld } else { Fate::Alive(left) };
            }
            for process in &kin {
                let first = !ended.contains(&process.pid);
                if elapsed >= kill_from {
                    send(process.pid, Signal::SIGKILL);
                } else if first {
                    // A stopped process acts on TERM only when it is continued.
                    send(process.pid, Signal::SIGTERM);
                    send(process.pid, Signal::SIGCONT);
                }
                if first {
                    trace!("ending {} {}", process.pid, process.program());
                    ended.push(process.pid);
                }
            }
            patience.wait(LOOK);
        }
    }

    /// SIGKILL to terraform and all that is below it now.
    pub(crate) fn kill(&self) {
        if let Some(terraform) = self.terraform {
            send(terraform, Signal::SIGKILL);
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
