//! The guardian: who asks terraform to stop, and gives its lock back, when `tf` is killed.
//!
//! It is forked before terraform starts, and waits for one thing: the end of the socket that it shares with `tf`. If `tf`
//! said before that everything is over, it ends. If not, `tf` was killed, and the guardian does the rest of its work, with
//! the same code, on what it has in its memory since the fork and what `tf` has told it since.
//!
//! It stands beside the run and not above it. The other shape, a supervisor that the caller does not know, with a thin
//! `tf` in front of it, would keep the subreaper's proof when `tf` is killed; but the front is what the shell stops and
//! continues, so every stop, every lending of the terminal and every signal would go through two processes, each of which
//! can die alone; and against what kills a session, a control group or all descendants it is no safer.
//!
//! - It leads a session of its own, with its descriptors 0, 1 and 2 on /dev/null and every other one closed that it does
//!   not need ([`crate::sys::detached`]): neither the caller's pipe nor an outer run's lifeline stays open for it.
//! - CI runners find what they kill by a variable in its environment: those are gone from it. Jenkins also kills what
//!   descends from what it finds, so there the guardian is a child of init's. Elsewhere it is a child of `tf`, which takes
//!   its end away: a container whose first process reaps nobody would collect a zombie with each run.
//! - It knows terraform by a descriptor for that process, which never means another one with the same number. The child
//!   itself sends its number before it becomes terraform.
//! - It mirrors what `tf` decided about signals ([`Stop`] is fed the same events), so that terraform gets one interrupt
//!   whoever sends it.
//! - It reads terraform's pipes in the place of `tf`, into nothing: terraform must not die of SIGPIPE with its state
//!   unsaved.

use crate::cleanup::after_run::AfterRun;
use crate::cleanup::clean_up::LogState;
use crate::cleanup::clean_up::SilentReporter;
use crate::cleanup::run_context::RunContext;
use crate::journal::state_directory::Durability;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cleanup::process_tree::Tree;
use crate::cleanup::waiter::Waiter;
use crate::crash_point;
use crate::journal::history::By;
use crate::journal::recorder::Recorder;
use crate::journal::runs::{JournalEntry, JournalRecord, Unfinished};
use crate::lock::reached::Reached;
use crate::supervise::pipes::Pipes;
use crate::supervise::shim;
use crate::supervise::stop::{Effect, Stop, StopEvent};
use crate::sys::poll;
use crate::sys::process::{self, Process, ProcessList};
use crate::sys::signals::{Arrival, Signals};
use crate::sys::wait::{self, Ended};
use crate::sys::{detached, environment};
use crate::terraform::log::{JSON_LIMIT, Log, UnnamedLock};
use crate::trace::{self, trace};

/// A message's first byte; four bytes with the length of the rest follow.
const STARTED: u8 = 1;
const EVENT: u8 = 2;
const NEWS: u8 = 3;
const STILL: u8 = 4;
const OVER: u8 = 5;
const OUTSIDE_GROUP: u8 = 6;

/// What the guardian says, in one byte.
const CANNOT_WRITE: u8 = 1;
const UNIT_IS_STOPPED: u8 = 2;

/// What the child writes before its pid.
pub(crate) const STARTED_PREFIX: [u8; 5] = [STARTED, 4, 0, 0, 0];

/// No message is longer: what is kept of a log, and how far it was read.
const MAX_MESSAGE_BYTES: usize = JSON_LIMIT + 64;

/// How long a guardian may take to end once it was told that all is over.
const GUARDIAN_EXIT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long its end may take once it has closed its socket, or was killed.
const GUARDIAN_KILL_TIMEOUT: Duration = Duration::from_secs(1);

/// Between two looks at a terraform that was interrupted and may be stopped.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Between two looks at everybody who is below it.
const DESCENDANTS_INTERVAL: Duration = Duration::from_millis(500);

/// How long init may take to bury a terraform before its status is taken for unknown.
const INIT_REAP_TIMEOUT: Duration = Duration::from_millis(200);

/// The guardian, as `tf` sees it.
#[derive(Debug)]
pub(crate) struct Guardian {
    /// Where it is a child of ours.
    pid: Option<Pid>,
    socket: UnixStream,
    /// What did not fit into the socket yet.
    unsent: Vec<u8>,
}

/// What the guardian says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Heard {
    Nothing,
    /// The journal cannot be written: a full disk.
    CannotWrite,
    /// A service manager has told every process of our unit to stop, terraform among them.
    UnitIsStopped,
    Gone,
}

/// What the guardian is to know and to keep.
pub(crate) struct GuardianContext<'a> {
    pub(crate) run: &'a RunContext<'a>,
    /// The process of `tf`.
    pub(crate) tf: Pid,
    pub(crate) tree: &'a mut Tree,
    pub(crate) pipes: &'a mut Pipes,
    pub(crate) recorder: &'a mut Recorder,
    pub(crate) entry: Option<&'a JournalEntry>,
    pub(crate) record: Option<JournalRecord>,
    pub(crate) stop: Stop,
}

impl Guardian {
    /// Forks it. There must be one thread, and terraform must not have been started.
    ///
    /// # Errors
    /// When there can be no socket or no process: then the run goes on without.
    pub(crate) fn fork(context: GuardianContext<'_>) -> io::Result<Self> {
        let (socket, its_end) = UnixStream::pair()?;
        socket.set_nonblocking(true)?;
        let mut keep: Vec<RawFd> = [its_end.as_fd(), context.tree.lifeline(), context.recorder.descriptor()]
            .iter()
            .chain(&context.pipes.sources().collect::<Vec<_>>())
            .map(AsRawFd::as_raw_fd)
            .collect();
        keep.extend(context.entry.map(|entry| entry.lock_file().as_raw_fd()));
        keep.extend(context.run.planned_backends.descriptor().map(|plan| plan.as_raw_fd()));
        keep.extend(trace::descriptor());
        // Without a process list `tf` must see by its children alone whether anything of terraform's is left.
        let is_listed = process::list() != ProcessList::Unavailable;
        let parent =
            if runner_kills_descendants() || !is_listed { detached::Parent::Init } else { detached::Parent::Us };
        let pid = detached::run(c"tf-guardian", parent, &keep, || Watch::begin(its_end, context))?;
        Ok(Self { pid, socket, unsent: Vec::new() })
    }

    /// Its process, where it is a child of ours.
    pub(crate) fn pid(&self) -> Option<Pid> {
        self.pid
    }

    /// What the child of a fork writes its pid into.
    pub(crate) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// What it has said.
    pub(crate) fn hear(&self) -> Heard {
        let mut said = [0];
        match (&self.socket).read(&mut said) {
            Ok(1) if said == [UNIT_IS_STOPPED] => Heard::UnitIsStopped,
            Ok(1) => Heard::CannotWrite,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Heard::Nothing,
            _ => Heard::Gone,
        }
    }

    /// Tells of something that asked for an end.
    ///
    /// # Errors
    /// When the guardian is gone.
    pub(crate) fn note(&mut self, event: StopEvent) -> io::Result<()> {
        self.send(EVENT, &serde_json::to_vec(&event)?)
    }

    /// Tells that `tf` stands still from now on, or does not any more.
    ///
    /// # Errors
    /// When the guardian is gone.
    pub(crate) fn stands_still(&mut self, still: bool) -> io::Result<()> {
        self.send(STILL, &[u8::from(still)])
    }

    /// Tells what terraform's log has told. False when there is no room for that now.
    ///
    /// # Errors
    /// When the guardian is gone.
    pub(crate) fn tell(&mut self, log: &Log, offset: u64) -> io::Result<bool> {
        self.flush()?;
        if !self.unsent.is_empty() {
            return Ok(false);
        }
        let news = serde_json::to_vec(&(offset, log))?;
        if news.len() > MAX_MESSAGE_BYTES {
            // It would not be read. The guardian reads the log itself, as long as nothing of it is forgotten.
            return Ok(false);
        }
        self.send(NEWS, &news)?;
        Ok(true)
    }

    /// Tells which processes below terraform have left its group, by pid and start.
    ///
    /// # Errors
    /// When the guardian is gone.
    pub(crate) fn tell_outside_group(&mut self, processes: &[(i32, u64)]) -> io::Result<()> {
        self.send(OUTSIDE_GROUP, &serde_json::to_vec(processes)?)
    }

    /// Tells that everything is over. It will do nothing more, and [`Guardian::wait`] sees it end.
    pub(crate) fn over(&mut self) {
        let _ = self.send(OVER, &[]);
    }

    /// Waits until it has ended.
    pub(crate) fn wait(self) {
        let begun = Instant::now();
        let mut guardian = self;
        while begun.elapsed() < GUARDIAN_EXIT_TIMEOUT {
            let _ = guardian.flush();
            // Its end alone: what it may have said before counts no more.
            if poll::wait(&[(guardian.socket.as_fd(), PollFlags::empty())], Some(GUARDIAN_EXIT_TIMEOUT)) == [true] {
                break;
            }
        }
        if let Some(pid) = guardian.pid {
            if begun.elapsed() >= GUARDIAN_EXIT_TIMEOUT {
                trace!("the guardian does not end");
                let _ = kill(pid, Signal::SIGKILL);
            }
            // One that is frozen, or hangs in the kernel, does not even die. Init takes it away after us.
            let until = Instant::now() + GUARDIAN_KILL_TIMEOUT;
            // It is waited for by a descriptor: a run must not end later than its guardian.
            if let Ok(end) = process::open_pidfd(pid) {
                poll::wait(&[(end.as_fd(), PollFlags::POLLIN)], Some(GUARDIAN_KILL_TIMEOUT));
            }
            while !wait::reap(pid) && wait::is_child(pid) && Instant::now() < until {
                poll::wait(&[], Some(Duration::from_millis(1)));
            }
        }
    }

    fn send(&mut self, kind: u8, payload: &[u8]) -> io::Result<()> {
        self.unsent.push(kind);
        self.unsent.extend(u32::try_from(payload.len()).unwrap_or(0).to_le_bytes());
        self.unsent.extend(payload);
        self.flush()
    }

    fn flush(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match self.socket.write(&self.unsent) {
                Ok(length) => drop(self.unsent.drain(..length)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Sends SIGINT to `group`, which the process behind the descriptor `terraform` leads: never to another group that has its
/// number now. Before Linux 6.9 each member is found, held by a descriptor of its own, and looked at once more.
fn interrupt_group(terraform: &OwnedFd, group: Pid) -> io::Result<()> {
    if process::signal_group(terraform, Signal::SIGINT).is_ok() {
        return Ok(());
    }
    for member in Process::all().into_iter().filter(|member| member.group == group && member.pid != group) {
        let Ok(held) = process::open_pidfd(member.pid) else { continue };
        let is_same = Process::look_up(member.pid).is_some_and(|now| (now.start, now.group) == (member.start, group));
        // As long as terraform has not ended, the number is its group's.
        if is_same && !poll::ready_now(terraform.as_fd(), PollFlags::POLLIN) {
            let _ = process::signal(&held, Signal::SIGINT);
        }
    }
    process::signal(terraform, Signal::SIGINT)
}

/// Whether a runner would kill what descends from us, whatever its environment says (Jenkins, ProcessTree.java,
/// `killRecursively`). As the first process of a namespace we are init ourselves, and whoever ends us ends all.
fn runner_kills_descendants() -> bool {
    std::process::id() != 1 && std::env::vars_os().any(|(name, _)| name.to_str().is_some_and(is_jenkins_cookie))
}

fn is_jenkins_cookie(name: &str) -> bool {
    (name.starts_with("JENKINS_") || name.starts_with("HUDSON_")) && name.ends_with("COOKIE")
}

/// The variables by which a runner finds what it started, and the mark of the run that we may be nested in.
fn marks_us(name: &str) -> bool {
    is_jenkins_cookie(name)
        || matches!(name, "RUNNER_TRACKING_ID" | "VSTS_PROCESS_LOOKUP_ID" | "BUILD_ID" | crate::journal::run_mark::RUN)
}

/// What came through the socket and was not heard yet.
#[derive(Debug, Default)]
struct Received {
    bytes: Vec<u8>,
    /// So much of a message that is too long is still to come: none of it is kept, and the next message is heard.
    skipped: usize,
}

impl Received {
    /// The next whole message: its kind, and what it says.
    fn next(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            let skipped = self.skipped.min(self.bytes.len());
            self.bytes.drain(..skipped);
            self.skipped -= skipped;
            let head = *self.bytes.first_chunk::<5>()?;
            let length = u32::from_le_bytes([head[1], head[2], head[3], head[4]]) as usize;
            if length > MAX_MESSAGE_BYTES {
                self.skipped = 5 + length;
                continue;
            }
            if self.bytes.len() < 5 + length {
                return None;
            }
            let payload = self.bytes[5..5 + length].to_vec();
            self.bytes.drain(..5 + length);
            return Some((head[0], payload));
        }
    }
}

/// The guardian's own story.
struct Watch<'a> {
    socket: UnixStream,
    context: GuardianContext<'a>,
    terraform: Option<Terraform>,
    received: Received,
    /// `tf` has stopped itself.
    still: bool,
    /// What the log has told, and was not written down yet.
    news: Option<(u64, Log)>,
    /// What reaches the guardian itself. Nothing of it ends the guardian.
    signals: Option<Signals>,
    /// A service manager has told the guardian to stop, and `tf` was not told yet.
    unit_is_stopped: bool,
    reached: Reached,
}

/// Terraform, as its guardian knows it.
struct Terraform {
    pid: Pid,
    /// It, and never another with its number. None before Linux 5.3 and on other systems; there the number is used, in the
    /// moment after the death of `tf`, which until then kept it from being used again.
    process: Option<OwnedFd>,
    /// The number meant the child of `tf` when the descriptor was opened.
    certain: bool,
}

impl Terraform {
    /// Whether the child has become a program, and is the one that it was. Its mark says so; a wrapper may have cleared its
    /// environment, and is another program than ours then.
    fn has_begun(&self, tree: &Tree) -> bool {
        match Process::look_up(self.pid) {
            Some(process) => tree.is_marked(&process) || (self.certain && process.runs_another_program()),
            // Without a process list nothing tells. Interrupted before it is terraform, it dies, and has locked nothing.
            None => process::list() != ProcessList::Available,
        }
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        match &self.process {
            Some(process) => process::signal(process, signal),
            None => Ok(kill(self.pid, signal)?),
        }
    }

    fn has_ended(&self, tree: &Tree) -> bool {
        match &self.process {
            Some(process) => poll::ready_now(process.as_fd(), PollFlags::POLLIN),
            None => tree.lifeline_is_closed() || kill(self.pid, None).is_err(),
        }
    }
}

/// How the time with `tf` ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ParentExit {
    Clean,
    Killed,
}

impl<'a> Watch<'a> {
    fn begin(socket: UnixStream, mut context: GuardianContext<'a>) {
        environment::forget(marks_us);
        environment::unset_empty("AWS_");
        context.tree.observe_as_guardian();
        crash_point::reached("guardian: watching");
        // Here nobody waits for it: terraform starts meanwhile.
        let (access, surroundings) = context.run.candidates.identified(&context.run.id);
        let reached = Reached::of(&context.run.id, &access, &surroundings);
        if let Some(record) = &mut context.record {
            record.surroundings = surroundings;
        }
        // A descriptor of `tf` would do as well, but it was closed.
        let signals = Signals::listen().ok();
        let mut watch = Self {
            socket,
            context,
            terraform: None,
            received: Received::default(),
            still: false,
            news: None,
            signals,
            unit_is_stopped: false,
            reached,
        };
        if watch.until_parting() == ParentExit::Killed {
            crash_point::reached("guardian: alone");
            watch.finish();
        }
    }

    /// Listens to `tf`, for as long as there is one.
    fn until_parting(&mut self) -> ParentExit {
        let mut bytes = [0; 1 << 14];
        loop {
            // The clock of a stop timeout runs here as well, in case it is for us to act on. While `tf` lives it is not.
            let _ = self.context.stop.decide(StopEvent::Time, self.context.run.begun.elapsed());
            let deadline = self.context.stop.deadline().map(|at| at.saturating_sub(self.context.run.begun.elapsed()));
            let mut awaited = vec![(self.socket.as_fd(), PollFlags::POLLIN)];
            // Of terraform's end `tf` hears itself, but when it stands still.
            let terraform = self.terraform.as_ref().and_then(|terraform| terraform.process.as_ref());
            let ended = terraform.filter(|_| self.still).map(|process| (process.as_fd(), PollFlags::POLLIN));
            let end_at = ended.is_some().then_some(1);
            awaited.extend(ended);
            awaited.extend(self.signals.as_ref().map(|signals| (signals.as_fd(), PollFlags::POLLIN)));
            let ready = poll::wait(&awaited, deadline);
            self.hear_signals();
            if end_at.is_some_and(|place| ready[place]) {
                self.continue_tf();
                // It may have been about to stop when it said so.
                poll::wait(&[(self.socket.as_fd(), PollFlags::POLLIN)], Some(POLL_INTERVAL));
            }
            if !poll::ready_now(self.socket.as_fd(), PollFlags::POLLIN) {
                continue;
            }
            let length = match self.socket.read(&mut bytes) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => 0,
            };
            self.received.bytes.extend(&bytes[..length]);
            while let Some((kind, payload)) = self.received.next() {
                if kind == OVER {
                    return ParentExit::Clean;
                }
                self.heard(kind, &payload);
            }
            self.hear_signals();
            if length == 0 {
                return ParentExit::Killed;
            }
            if !poll::ready_now(self.socket.as_fd(), PollFlags::POLLIN) {
                self.write_news();
            }
        }
    }

    /// A `tf` that stopped with its terraform, which was then killed, has a lock to give back and nobody who continues it:
    /// a shell would, if its user asked, and a CI runner has none.
    fn continue_tf(&self) {
        if Process::look_up(self.context.tf).is_some_and(|process| process.state == 'T') {
            trace!("guardian: continues tf, whose terraform has ended");
            let _ = kill(self.context.tf, Signal::SIGCONT);
        }
    }

    /// Hears what somebody has sent to the guardian. What a service manager sends to all of our unit has reached terraform
    /// too, where that is in the same control group: `tf` must not send it an interrupt of its own then.
    fn hear_signals(&mut self) {
        let Some(signals) = &mut self.signals else { return };
        while let Some(Arrival { signal, sender, .. }) = signals.next() {
            self.unit_is_stopped |= signal == Signal::SIGTERM && sender.is_some_and(process::is_service_manager);
        }
        // What was sent before there was a terraform did not reach it.
        let Some(terraform) = self.terraform.as_ref().filter(|_| self.unit_is_stopped) else { return };
        self.unit_is_stopped = false;
        if process::is_in_own_control_group(terraform.pid) {
            trace!("guardian: our unit is stopped");
            let _ = self.context.stop.decide(StopEvent::RequestToAll, self.context.run.begun.elapsed());
            let _ = self.socket.write(&[UNIT_IS_STOPPED]);
        }
    }

    fn heard(&mut self, kind: u8, payload: &[u8]) {
        match kind {
            STARTED => {
                let Ok(number) = payload.try_into().map(i32::from_ne_bytes) else { return };
                let pid = Pid::from_raw(number);
                let process = process::open_pidfd(pid).ok();
                // `tf` keeps a dead terraform's number from being used again, for as long as it lives itself.
                let certain = !poll::ready_now(self.socket.as_fd(), PollFlags::empty());
                self.terraform = Some(Terraform { pid, process, certain });
                let identity = self.context.tree.started(pid);
                if let Some(record) = &mut self.context.record {
                    record.terraform = Some(number);
                    record.tree = identity;
                }
                crash_point::reached("guardian: knows terraform");
            }
            EVENT => {
                if let Ok(event) = serde_json::from_slice::<StopEvent>(payload) {
                    // What follows from it `tf` does itself.
                    let _ = self.context.stop.decide(event, self.context.run.begun.elapsed());
                }
            }
            STILL => self.still = payload == [1],
            OUTSIDE_GROUP => {
                let Ok(processes) = serde_json::from_slice::<Vec<(i32, u64)>>(payload) else { return };
                self.context.tree.add_members(&processes);
                if let (Some(entry), Some(record)) = (self.context.entry, &mut self.context.record) {
                    record.tree.survivors = processes;
                    // Without a lock nobody will ask for them.
                    let _ = if record.log.may_hold() { entry.write(record, Durability::Processes) } else { Ok(()) };
                }
            }
            NEWS => {
                if let Ok((offset, log)) = serde_json::from_slice::<(u64, Log)>(payload) {
                    self.news = Some((offset, log));
                }
            }
            _ => {}
        }
    }

    fn write_news(&mut self) {
        let Some((offset, log)) = self.news.take() else { return };
        crash_point::reached("guardian: has news");
        if let (Some(entry), Some(record)) = (self.context.entry, &mut self.context.record) {
            // A loss of power must not lose the fact that a lock was requested, so a new lock is flushed to disk. How
            // far the request has come can be seen from the stored lock itself.
            let known = |id: &str| record.log.named().any(|lock| lock.id == id);
            let unknown = |lock: &UnnamedLock| !record.log.unnamed().any(|known| known.is_same(lock));
            let is_new = log.unreleased().any(|lock| !known(&lock.id)) || log.unnamed().any(unknown);
            let durability = if is_new { Durability::PowerLoss } else { Durability::Processes };
            record.log = log.clone();
            record.offset = offset;
            let written = entry.write(record, durability);
            trace!("guardian: journal written: {}", written.is_ok());
            if written.is_err() {
                let _ = self.socket.write(&[CANNOT_WRITE]);
            }
            crash_point::reached("guardian: has written");
        }
        self.context.recorder.resume(log, offset);
    }

    /// `tf` is gone: everything that it would have done.
    fn finish(mut self) {
        trace!("guardian: tf is gone");
        self.write_news();
        let _ = std::env::set_current_dir(&self.context.run.current);
        self.context.pipes.discard_output();
        let ended = self.stop_terraform();
        trace!("guardian: terraform ended: {ended:?}");
        crash_point::reached("guardian: terraform ended");
        let unfinished = self.clean_up(ended);
        if let (Some(entry), Some(mut record)) = (self.context.entry, self.context.record.take()) {
            if unfinished.is_empty() {
                entry.take_away();
            } else {
                record.log = self.context.recorder.log().clone();
                record.tree.survivors = self.context.tree.survivors();
                record.leave(unfinished);
                let _ = entry.write(&record, Durability::PowerLoss);
            }
        }
        self.context.recorder.remove();
        crash_point::reached("guardian: done");
    }

    /// Gives terraform its one graceful stop, and waits until it has ended. `None` when nothing tells how it did.
    fn stop_terraform(&mut self) -> Option<Ended> {
        let terraform = self.terraform.take()?;
        let mut effects = self.context.stop.decide(StopEvent::ParentGone, self.context.run.begun.elapsed());
        let mut interrupt = false;
        let mut looked: Option<Instant> = None;
        loop {
            for effect in effects.drain(..) {
                match effect {
                    Effect::InterruptGroup | Effect::InterruptTerraform => interrupt = true,
                    Effect::Kill(_) => self.context.tree.kill(),
                    Effect::SayStopping(_) | Effect::SayForcing => {}
                }
            }
            // Not before it is terraform: what comes earlier is thrown away between fork and exec.
            let moment = process::ticks_since_boot();
            if !terraform.has_ended(self.context.tree) {
                self.context.tree.was_alive_at(moment);
            }
            if interrupt && terraform.has_begun(self.context.tree) {
                interrupt = false;
                self.interrupt(&terraform);
                crash_point::reached("guardian: interrupted");
            }
            // One that was stopped when its parent died was hung up by the kernel. Where that did not happen, as in a
            // session without a terminal, it acts on nothing until it is continued.
            if Process::look_up(terraform.pid).is_some_and(|process| process.state == 'T') {
                let _ = terraform.signal(Signal::SIGCONT);
            }
            let mut awaited: Vec<_> =
                terraform.process.iter().map(|process| (process.as_fd(), PollFlags::POLLIN)).collect();
            let pipes_from = awaited.len();
            awaited.extend(self.context.pipes.awaited());
            let ready = poll::wait(&awaited, Some(POLL_INTERVAL));
            self.context.pipes.step(&ready[pipes_from..]);
            if terraform.has_ended(self.context.tree) && self.context.tree.orphaned_terraforms().is_empty() {
                break;
            }
            // Everybody who is below it now, so that they are known when they are not below it any more.
            if looked.is_none_or(|at| at.elapsed() > DESCENDANTS_INTERVAL) {
                self.context.tree.living();
                looked = Some(Instant::now());
            }
            effects = self.context.stop.decide(StopEvent::Time, self.context.run.begun.elapsed());
        }
        let begun = Instant::now();
        loop {
            let ended = terraform.process.as_ref().and_then(|process| process::end_of(terraform.pid, process));
            if ended.is_some() || begun.elapsed() > INIT_REAP_TIMEOUT {
                return ended;
            }
            poll::wait(&[], Some(Duration::from_millis(5)));
        }
    }

    /// The one interrupt of a first stop, to all that `tf` would have sent it to.
    fn interrupt(&self, terraform: &Terraform) {
        let orphaned_terraforms = self.context.tree.orphaned_terraforms();
        let has_ended = terraform.has_ended(self.context.tree);
        let sent = match (&terraform.process, self.context.tree.group()) {
            _ if has_ended => Ok(()),
            (Some(_), Some(_)) if self.context.tree.is_behind_a_shim() => {
                shim::interrupt_group(terraform.pid, self.context.tree.recorder());
                Ok(())
            }
            (Some(process), Some(group)) => interrupt_group(process, group),
            _ => terraform.signal(Signal::SIGINT),
        };
        if has_ended {
            for process in orphaned_terraforms {
                let _ = kill(process.pid, Signal::SIGINT);
            }
        }
        trace!("guardian: interrupted terraform: {}", sent.is_ok());
    }

    /// Releases what terraform has left. Returns what is left for the next `tf`.
    fn clean_up(&mut self, ended: Option<Ended>) -> Unfinished {
        let GuardianContext { run, tree, recorder, record, stop, .. } = &mut self.context;
        let mut log = recorder.read().clone();
        if ended == Some(Ended::Exited(0)) && !stop.was_forced() {
            log.ended_well();
        }
        let after = AfterRun {
            context: run,
            tree,
            end: stop.end_of_run(ended, false),
            log: &log,
            reached: &self.reached,
            has_no_log: recorder.is_closed() && record.as_ref().is_some_and(|record| record.terraform.is_some()),
        };
        let candidates = run.candidates_after().with_plan(&run.planned_backends);
        let ending = after.judge(&&candidates);
        if !ending.may_have_left_a_lock(&log) {
            return Unfinished::default();
        }
        if !run.release {
            // To be named, which needs somebody who reads it.
            return Unfinished {
                locks: log.unreleased().cloned().collect(),
                unnamed: log.unreleased_unnamed().cloned().collect(),
                elsewhere: ending.non_s3,
                unlogged: ending.log_state == LogState::NeverBegun,
                replaced: Vec::new(),
            };
        }
        after.clean_up(ending, &candidates, By::Guardian, &mut SilentReporter, &mut Waiter::Unattended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: u8, length: usize) -> Vec<u8> {
        let mut message = vec![kind];
        message.extend(u32::try_from(length).unwrap().to_le_bytes());
        message.resize(5 + length, kind);
        message
    }

    #[test]
    fn a_message_that_is_too_long_is_passed_over_and_the_next_is_heard() {
        let long = message(NEWS, MAX_MESSAGE_BYTES + 1);
        let whole = [
            message(EVENT, 1),
            long.clone(),
            message(STILL, 1),
            long,
            message(NEWS, MAX_MESSAGE_BYTES),
            message(OVER, 0),
        ];
        for size in [1 << 14, 4096 + 1, 1 << 23] {
            let mut received = Received::default();
            let mut heard = Vec::new();
            for piece in whole.concat().chunks(size) {
                received.bytes.extend(piece);
                heard.extend(std::iter::from_fn(|| received.next()).map(|(kind, payload)| (kind, payload.len())));
                assert!(received.bytes.len() <= MAX_MESSAGE_BYTES + 5 + size);
            }
            assert_eq!(heard, [(EVENT, 1), (STILL, 1), (NEWS, MAX_MESSAGE_BYTES), (OVER, 0)]);
        }
    }
}
