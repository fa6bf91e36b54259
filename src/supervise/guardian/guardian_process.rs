//! The process of the guardian. [`super`] describes what it does.

use std::cell::RefCell;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::message::{
    CANNOT_WRITE, EVENT, LEASE, LOCK_IS_LOST, MessageReader, NEWS, OUTSIDE_GROUP, OVER, STARTED, STILL, STOPS_NO_MORE,
    Suspension, UNIT_IS_STOPPED,
};
use crate::cleanup::after_run::AfterRun;
use crate::cleanup::clean_up::{LogState, Permission, SilentReporter};
use crate::cleanup::process_tree::{Tree, identities};
use crate::cleanup::run_context::RunContext;
use crate::cleanup::waiter::Waiter;
use crate::crash_point;
use crate::journal::history::By;
use crate::journal::recorder::Recorder;
use crate::journal::run_mark::marks_us;
use crate::journal::runs::{JournalEntry, JournalRecord, Unfinished};
use crate::journal::state_directory::Durability;
use crate::lease::fence::{CleanupPoint, EndReason};
use crate::lock::reached::Reached;
use crate::supervise::keeper::Orders;
use crate::supervise::pipes::Pipes;
use crate::supervise::run_lease::{self, LockPhase, RunLease, STOP_AGAIN_INTERVAL, TfState};
use crate::supervise::shim;
use crate::supervise::stop::{Effect, Stop, StopEvent};
use crate::sys::process::{self, Process, ProcessHandle, ProcessList};
use crate::sys::signals::{Arrival, Signals};
use crate::sys::wait::Ended;
use crate::sys::{environment, poll};
use crate::terraform::log::{Log, UnnamedLock};
use crate::trace::trace;

/// How often the guardian checks a terraform that it has interrupted, or a `tf` that is about to stop itself.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// How often the guardian checks whether somebody has continued a terraform that was stopped together with `tf`.
const RESUME_INTERVAL: Duration = Duration::from_millis(500);

/// How often the guardian searches for all processes below terraform.
const DESCENDANTS_INTERVAL: Duration = Duration::from_millis(500);

/// How long to wait for the exit status of a terraform that has exited, while init may be reaping it. If the status is
/// not available after that time, the status counts as unknown.
const INIT_REAP_TIMEOUT: Duration = Duration::from_millis(200);

/// The data that the guardian gets from `tf` when it is forked.
pub(crate) struct GuardianContext<'a> {
    pub(crate) run: &'a RunContext<'a>,
    /// The pid of `tf`.
    pub(crate) tf: Pid,
    pub(crate) tree: &'a mut Tree,
    pub(crate) pipes: &'a mut Pipes,
    pub(crate) recorder: &'a mut Recorder,
    pub(crate) entry: Option<&'a JournalEntry>,
    pub(crate) record: Option<JournalRecord>,
    pub(crate) stop: Stop,
    /// The lease of the run's lock. `None` without `TFW_LEASE`.
    pub(crate) lease: Option<&'a mut RunLease>,
}

/// The state of the guardian process.
pub(super) struct GuardianProcess<'a> {
    /// All messages but those in `events`. The guardian reports through the same socket.
    messages: MessageReader,
    /// The [`EVENT`] and [`STILL`] messages.
    events: MessageReader,
    context: GuardianContext<'a>,
    terraform: Option<Terraform>,
    /// What `tf` has reported last about its own stop.
    suspension: Suspension,
    /// Since when a terraform that was stopped together with `tf` was seen to run while `tf` was stopped. `None` at all
    /// other times.
    runs_since: Option<Instant>,
    /// The parsed log that was not written to the journal yet, with the offset up to which the log was read, in bytes.
    /// `None` if there is no such log.
    news: Option<(u64, Log)>,
    /// What a keeper of the run's lease needs to know. `None` if no lease has begun, or if it has ended.
    orders: Option<Orders>,
    /// Whether the guardian renews the lease, because `tf` is suspended.
    has_lease: bool,
    /// Whether the guardian has told `tf` that the lock is lost, since `tf` was suspended.
    has_told_loss: bool,
    /// Reads the signals that were sent to the guardian. These signals do not kill the guardian. `None` if they cannot
    /// be read.
    signals: Option<Signals>,
    /// Whether a service manager has sent SIGTERM to the guardian, and this was not reported to `tf` yet.
    unit_is_stopped: bool,
    /// The identities with which the run reaches its backends.
    reached: Reached,
}

/// The guardian's data about the terraform process.
struct Terraform {
    pid: Pid,
    /// A pidfd of the process, which never refers to another process with the same pid. `None` before Linux 5.3 and on
    /// other systems. There, the guardian signals the pid, but only shortly after the death of `tf`. As long as `tf`
    /// was running, it did not reap terraform, so the pid could not be reused during that time.
    process: Option<ProcessHandle>,
    /// Whether the pid certainly belonged to the child of `tf` when the pidfd was opened.
    certain: bool,
}

impl Terraform {
    /// Returns whether the child has executed terraform or a wrapper, and the pid still belongs to the child. The mark
    /// in the environment of the process proves both. A wrapper may have removed the mark from its environment. So
    /// without the mark, this is true if the pid is certain and the process runs a program other than `tf`.
    fn has_begun(&self, tree: &Tree) -> bool {
        match Process::look_up(self.pid) {
            Some(process) => tree.is_marked(&process) || (self.certain && process.runs_another_program()),
            // Without a process list, this is unknown. The result true is safe: if the child is interrupted before it
            // executes terraform, it dies without having taken a lock.
            None => process::list() != ProcessList::Available,
        }
    }

    fn signal(&self, signal: Signal) -> io::Result<()> {
        match &self.process {
            Some(process) => process.signal(signal),
            None => Ok(kill(self.pid, signal)?),
        }
    }

    fn has_ended(&self, tree: &Tree) -> bool {
        match &self.process {
            Some(process) => process.has_exited(),
            None => tree.lifeline_is_closed() || kill(self.pid, None).is_err(),
        }
    }
}

/// How the connection to `tf` ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ParentExit {
    Clean,
    Killed,
}

impl<'a> GuardianProcess<'a> {
    pub(super) fn begin(messages: MessageReader, events: MessageReader, mut context: GuardianContext<'a>) {
        environment::forget(marks_us);
        environment::unset_empty("AWS_");
        if let Some(lease) = &mut context.lease {
            lease.become_guardians();
        }
        context.tree.observe_as_guardian();
        crash_point::reached("guardian: watching");
        // Identifying the backends may take time. This does not delay terraform, because `tf` starts it at the same
        // time.
        let (access, surroundings) = context.run.candidates.identified(&context.run.id);
        let reached = Reached::of(&context.run.id, &access, &surroundings);
        if let Some(record) = &mut context.record {
            record.surroundings = surroundings;
        }
        // The signal descriptor of `tf` cannot be used, because it is closed in this process.
        let signals = Signals::listen().ok();
        let mut watch = Self {
            messages,
            events,
            context,
            terraform: None,
            suspension: Suspension::Over,
            runs_since: None,
            news: None,
            orders: None,
            has_lease: false,
            has_told_loss: false,
            signals,
            unit_is_stopped: false,
            reached,
        };
        if watch.wait_for_end() == ParentExit::Killed {
            crash_point::reached("guardian: alone");
            watch.finish();
        }
    }

    /// Handles the messages of `tf` until `tf` reports that the run is over, or is killed. Returns which of the two
    /// happened.
    fn wait_for_end(&mut self) -> ParentExit {
        loop {
            // The stop timeout also runs here, because the guardian must act on it if `tf` is killed. As long as `tf`
            // is running, only `tf` acts on it.
            let effects = self.context.stop.decide(StopEvent::Time, self.context.run.begun.elapsed());
            if !effects.is_empty() {
                trace!("guardian: left to tf: {effects:?}");
            }
            let deadline = self.context.stop.deadline().map(|at| at.saturating_sub(self.context.run.begun.elapsed()));
            let mut awaited =
                [&self.messages, &self.events].map(|reader| (reader.socket().as_fd(), PollFlags::POLLIN)).to_vec();
            // `tf` itself notices the exit of terraform, except while it is stopped.
            let terraform = self.terraform.as_ref().and_then(|terraform| terraform.process.as_ref());
            let ended = terraform.filter(|_| self.is_still()).map(|process| (process.as_fd(), PollFlags::POLLIN));
            let end_at = ended.is_some().then_some(2);
            awaited.extend(ended);
            awaited.extend(self.signals.as_ref().map(|signals| (signals.as_fd(), PollFlags::POLLIN)));
            // While `tf` is stopped, only the guardian can stop a terraform again that somebody else continues although
            // the kernel has stopped it for its lease.
            let lease = self.context.lease.as_ref().filter(|_| self.is_still());
            let deadline = if lease.is_some_and(|lease| lease.is_blown()) {
                Some(deadline.map_or(STOP_AGAIN_INTERVAL, |at| at.min(STOP_AGAIN_INTERVAL)))
            } else {
                // The end of the fuse wakes nobody here.
                lease.map(|_| STOP_AGAIN_INTERVAL * 5).into_iter().chain(deadline).min()
            };
            let resume = (self.suspension == Suspension::WithTerraform).then_some(RESUME_INTERVAL);
            let ready = poll::wait(&awaited, deadline.into_iter().chain(resume).min());
            self.step_lease_while_still();
            self.hear_signals();
            if end_at.is_some_and(|place| ready[place]) {
                self.continue_tf("has ended");
                // `tf` reports a stop before it stops itself, so it may not be stopped yet. The wait makes the loop
                // check again soon.
                poll::wait(&[(self.events.socket().as_fd(), PollFlags::POLLIN)], Some(POLL_INTERVAL));
            }
            // The order is explained in [`super::message`].
            let (mut events, _) = self.events.read();
            let (mut messages, is_tf_gone) = self.messages.read();
            if is_tf_gone {
                events.extend(self.events.read().0);
            }
            // When the run is over, earlier messages do not matter any more. A run may be over before its guardian has
            // read the first message, and `tf` waits for the guardian's exit.
            if messages.iter().any(|(kind, _)| *kind == OVER) {
                self.leave_lease_to_tf();
                return ParentExit::Clean;
            }
            messages.extend(events);
            for (kind, payload) in messages {
                self.heard(kind, &payload);
            }
            self.continue_with_terraform();
            self.hear_signals();
            if is_tf_gone {
                self.forget_early_stop();
                return ParentExit::Killed;
            }
            if !self.messages.is_ready() {
                self.forget_early_stop();
                self.write_news();
            }
        }
    }

    /// While `tf` is suspended, nobody replaces its keeper, and a keeper is easily killed or stopped together with it.
    /// So the guardian has one of its own meanwhile. The service orders the renewals of the two.
    fn step_lease_while_still(&mut self) {
        if !self.is_still() {
            self.leave_lease_to_tf();
            return;
        }
        let Some(lease) = &mut self.context.lease else { return };
        lease.stop_again_as_guardian();
        if let (false, Some(orders), Some(_)) = (self.has_lease, &self.orders, &self.terraform) {
            trace!("guardian: tf is suspended, and the guardian renews the lease, too");
            self.has_lease = true;
            lease.renew_as_guardian(TfState::Suspended, Some(orders.clone()), self.context.tree);
        }
        // A suspended terraform does nothing. But it must not go on with `tf`, whose own keeper may not know of the
        // loss yet. The log is read, because the last message about it may be waiting in the suspended `tf`.
        let recorder = &mut *self.context.recorder;
        if lease.step_as_guardian(|id| LockPhase::of(id, recorder.read()))
            && !std::mem::replace(&mut self.has_told_loss, true)
        {
            trace!("guardian: tf must know that the lock is lost");
            self.report(LOCK_IS_LOST);
        }
    }

    /// Ends the guardian's own keeper, if it has one.
    fn leave_lease_to_tf(&mut self) {
        if let Some(lease) = self.context.lease.as_mut().filter(|_| std::mem::take(&mut self.has_lease)) {
            trace!("guardian: tf goes on, and renews the lease");
            self.has_told_loss = false;
            lease.end_as_guardian();
        }
    }

    fn is_still(&self) -> bool {
        self.suspension != Suspension::Over
    }

    /// Continues a `tf` that has stopped together with terraform, if somebody has continued terraform alone: if terraform was
    /// running at two looks with [`RESUME_INTERVAL`] between them, and `tf` was stopped all the time. A terraform that the
    /// kernel thaws together with `tf` is shown as running for a moment, before it is stopped again. A terraform that the
    /// kernel has stopped for its lease is stopped again at once, so it does not go on.
    fn continue_with_terraform(&mut self) {
        let goes_on = self.suspension == Suspension::WithTerraform && self.tf_is_stopped() && self.terraform_runs();
        self.runs_since = goes_on.then(|| self.runs_since.unwrap_or_else(Instant::now));
        if self.runs_since.is_some_and(|since| since.elapsed() >= RESUME_INTERVAL) {
            self.continue_tf("was continued by somebody");
            // A stop that follows is one of its own.
            (self.suspension, self.runs_since) = (Suspension::Alone, None);
        }
    }

    /// Whether terraform is neither stopped nor dead, and its lease has not lapsed. False if it cannot be looked up.
    fn terraform_runs(&self) -> bool {
        let has_lapsed = self.context.lease.as_ref().is_some_and(|lease| lease.is_blown());
        let is_running = |process: Process| !matches!(process.state, 'T' | 't') && !process.is_dead();
        let process = self.terraform.as_ref().and_then(|terraform| Process::look_up(terraform.pid));
        !has_lapsed && process.is_some_and(is_running)
    }

    fn tf_is_stopped(&self) -> bool {
        Process::look_up(self.context.tf).is_some_and(|process| process.state == 'T')
    }

    /// Continues `tf` if it is stopped, because its terraform has ended or goes on: `tf` may have to release a lock, or to
    /// pass on output. No other process would continue `tf`: a shell does so only at its user's request, and a CI runner
    /// has no such shell. `what` says what terraform has done.
    fn continue_tf(&self, what: &str) {
        if self.tf_is_stopped() {
            trace!("guardian: continues tf, whose terraform {what}");
            let _ = kill(self.context.tf, Signal::SIGCONT);
        }
    }

    /// Reads the signals that were sent to the guardian. If a service manager sends SIGTERM to the whole unit,
    /// terraform gets the signal too, if terraform is in the same control group as the guardian. In this case, `tf`
    /// must not send terraform another interrupt, so the guardian reports the signal to `tf`.
    fn hear_signals(&mut self) {
        let Some(signals) = &mut self.signals else { return };
        while let Some(Arrival { signal, sender, .. }) = signals.next() {
            self.unit_is_stopped |= signal == Signal::SIGTERM && sender.is_some_and(process::is_service_manager);
        }
        // Terraform may have been started although its [`STARTED`] message has not been read yet. If so, the signal is
        // handled after that message was read.
        let Some(terraform) = self.terraform.as_ref().filter(|_| self.unit_is_stopped) else { return };
        self.unit_is_stopped = false;
        if process::is_in_own_control_group(terraform.pid) {
            trace!("guardian: our unit is stopped");
            let _ = self.context.stop.decide(StopEvent::RequestToAll, self.context.run.begun.elapsed());
            self.report(UNIT_IS_STOPPED);
        }
    }

    /// Reports something to `tf`, which may be gone.
    fn report(&self, report: u8) {
        let _ = self.messages.socket().write(&[report]);
    }

    /// Forgets a stop of the unit that arrived before terraform was started. That signal has not reached terraform.
    /// `tf` got the signal too, and interrupts terraform if the guardian reports nothing. Call this only when the
    /// socket is empty, so that a [`STARTED`] message cannot be overlooked. The child of `tf` discards its pending
    /// signals before it sends that message. So if the guardian has read the signal before the message, the child has
    /// discarded the signal, or was killed by it before it executed terraform.
    fn forget_early_stop(&mut self) {
        self.unit_is_stopped &= self.terraform.is_some();
    }

    fn heard(&mut self, kind: u8, payload: &[u8]) {
        match kind {
            STARTED => {
                let Ok(number) = payload.try_into().map(i32::from_ne_bytes) else { return };
                let pid = Pid::from_raw(number);
                let process = ProcessHandle::open(pid).ok();
                // As long as `tf` is running, it does not reap terraform, so the pid cannot be reused.
                let certain = !poll::has_hung_up(self.messages.socket().as_fd());
                self.terraform = Some(Terraform { pid, process, certain });
                let identity = self.context.tree.started(pid);
                if let Some(lease) = &mut self.context.lease {
                    lease.started(pid);
                }
                if let Some(record) = &mut self.context.record {
                    record.terraform = Some(number);
                    record.tree = identity;
                }
                crash_point::reached("guardian: knows terraform");
            }
            EVENT => {
                if let Ok(event) = serde_json::from_slice::<StopEvent>(payload) {
                    // Only the state of the [`Stop`] is updated here: `tf` itself carries out the effects of the event.
                    let _ = self.context.stop.decide(event, self.context.run.begun.elapsed());
                }
            }
            STILL => {
                let [number] = *payload else { return };
                self.suspension = Suspension::of_number(number).unwrap_or(Suspension::Over);
                self.runs_since = None;
                trace!("guardian: tf is suspended: {}", self.is_still());
                if !self.is_still() {
                    self.report(STOPS_NO_MORE);
                }
            }
            OUTSIDE_GROUP => {
                let Ok(processes) = serde_json::from_slice::<Vec<(i32, u64)>>(payload) else { return };
                self.context.tree.add_members(&processes);
                write_survivors(self.context.entry, self.context.record.as_mut(), processes);
            }
            LEASE => self.orders = serde_json::from_slice(payload).unwrap_or_default(),
            NEWS => {
                if let Ok((offset, log)) = serde_json::from_slice::<(u64, Log)>(payload) {
                    self.news = Some((offset, log));
                }
            }
            _ => {}
        }
    }

    /// Writes the latest parsed log to the journal, and then frees the memory of the part of the log that was read. If
    /// it were freed before, a later `tf` would find its locks neither in the record nor in the log. Reports a failure
    /// to `tf`. Nothing is freed then.
    fn write_news(&mut self) {
        let Some((offset, log)) = self.news.take() else { return };
        crash_point::reached("guardian: has news");
        let mut is_written = true;
        if let (Some(entry), Some(record)) = (self.context.entry, &mut self.context.record) {
            // A lock that was requested must be in the journal even after a power failure, so a new lock is flushed to
            // disk. Progress of a known lock is not flushed to disk, because the stored lock itself shows that
            // progress.
            let known = |id: &str| record.log.named().any(|lock| lock.id == id);
            let unknown = |lock: &UnnamedLock| !record.log.unnamed().any(|known| known.is_same(lock));
            let is_new = log.unreleased().any(|lock| !known(&lock.id)) || log.unnamed().any(unknown);
            let durability = if is_new { Durability::PowerLoss } else { Durability::Processes };
            record.log = log.clone();
            record.offset = offset;
            let written = entry.write(record, durability);
            trace!("guardian: journal written: {}", written.is_ok());
            is_written = written.is_ok();
            if !is_written {
                self.report(CANNOT_WRITE);
            }
            crash_point::reached("guardian: has written");
        }
        self.context.recorder.resume(log, offset);
        if is_written {
            self.context.recorder.forget();
        }
    }

    /// Does the rest of the work of `tf`, which was killed: stops terraform, releases its locks, and closes the run's
    /// record.
    fn finish(mut self) {
        trace!("guardian: tf is gone");
        self.write_news();
        let _ = std::env::set_current_dir(&self.context.run.current);
        self.context.pipes.discard_output();
        let ended = self.stop_terraform();
        if let Some(lease) = &mut self.context.lease {
            lease.end_renewals();
        }
        trace!("guardian: terraform ended: {ended:?}");
        crash_point::reached("guardian: terraform ended");
        let CleanedUp { unfinished, may_still_work } = self.clean_up(ended);
        // As at the end of `tf` (`Supervision::clean_up`).
        let mut needs_recorder = false;
        if let (Some(entry), Some(mut record)) = (self.context.entry, self.context.record.take()) {
            record.log = self.context.recorder.log().clone();
            if may_still_work {
                record.tree.add_survivors(self.context.tree.survivors());
                record.offset = self.context.recorder.whole_until();
                let _ = entry.write(&record, Durability::PowerLoss);
                needs_recorder = true;
            } else {
                record.tree.survivors = self.context.tree.survivors();
                needs_recorder = entry.close(record, unfinished).is_err();
            }
        }
        if !needs_recorder {
            self.context.recorder.remove();
        }
        crash_point::reached("guardian: done");
    }

    /// Sends terraform one interrupt, unless terraform has already got one, and waits until terraform has exited.
    /// Returns how terraform ended. `None` if that is unknown, or if terraform was never started.
    fn stop_terraform(&mut self) -> Option<Ended> {
        let terraform = self.terraform.take()?;
        let mut effects = self.first_effects();
        trace!("guardian: after the death of tf: {effects:?}");
        self.take_over_lease();
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
            // The child must have executed terraform before it is interrupted: it discards a signal that arrives
            // between fork and exec.
            let moment = process::start_clock();
            if !terraform.has_ended(self.context.tree) {
                self.context.tree.was_alive_at(moment);
            }
            if interrupt && terraform.has_begun(self.context.tree) {
                interrupt = false;
                self.interrupt(&terraform);
                crash_point::reached("guardian: interrupted");
            }
            // If terraform was stopped when its parent died, the kernel normally sends it SIGHUP and SIGCONT. If the
            // kernel does not do so, as in a session without a terminal, terraform acts on no signal until the guardian
            // continues it here.
            //
            // A terraform that the kernel has stopped for its lease is not continued. The kernel kills it, because the
            // fuse and `tf` are gone.
            let is_stopped = Process::look_up(terraform.pid).is_some_and(|process| process.state == 'T');
            match &mut self.context.lease {
                Some(lease) => {
                    let recorder = &mut *self.context.recorder;
                    if lease.step_as_guardian(|id| LockPhase::of(id, recorder.read())) {
                        trace!("guardian: the lock of terraform is another run's");
                        let lost = StopEvent::LeaseEnded(EndReason::LockLost);
                        effects = self.context.stop.decide(lost, self.context.run.begun.elapsed());
                        continue;
                    }
                    // The pid and the group of a terraform that has ended may belong to other processes by now.
                    if is_stopped && !terraform.has_ended(self.context.tree) {
                        lease.continue_group();
                    }
                }
                None if is_stopped => {
                    let _ = terraform.signal(Signal::SIGCONT);
                }
                None => {}
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
            // Records the processes that are below terraform now, because they can no longer be found when their
            // parents have exited.
            if looked.is_none_or(|at| at.elapsed() > DESCENDANTS_INTERVAL) {
                let living = self.context.tree.living();
                let outside = living.iter().filter(|process| Some(process.group) != self.context.tree.group());
                write_survivors(self.context.entry, self.context.record.as_mut(), identities(outside));
                looked = Some(Instant::now());
            }
            effects = self.context.stop.decide(StopEvent::Time, self.context.run.begun.elapsed());
        }
        let begun = Instant::now();
        loop {
            let ended = terraform.process.as_ref().and_then(|process| process.end_of(terraform.pid));
            if ended.is_some() || begun.elapsed() > INIT_REAP_TIMEOUT {
                return ended;
            }
            poll::wait(&[], Some(Duration::from_millis(5)));
        }
    }

    /// Returns what to do with terraform right after the death of `tf`.
    ///
    /// `tf` may have decided to kill terraform and died before it did. And as long as `tf` was alive, nobody carried
    /// out what the guardian's own [`Stop`] had decided. So a decision to kill is carried out now, perhaps for the
    /// second time.
    fn first_effects(&mut self) -> Vec<Effect> {
        let begun = self.context.run.begun;
        if let Some(why) = self.context.stop.killed() {
            return vec![Effect::Kill(why)];
        }
        let recorder = &mut *self.context.recorder;
        let lease = self.context.lease.as_ref();
        if lease.is_some_and(|lease| lease.is_known_to_be_lost(|id| LockPhase::of(id, recorder.read()))) {
            trace!("guardian: the lock of terraform is another run's");
            return self.context.stop.decide(StopEvent::LeaseEnded(EndReason::LockLost), begun.elapsed());
        }
        self.context.stop.decide(StopEvent::ParentGone, begun.elapsed())
    }

    /// Continues the lease of `tf`, which is dead. Terraform may need longer for its graceful stop than the lease
    /// lasts.
    fn take_over_lease(&mut self) {
        let Some(lease) = &mut self.context.lease else { return };
        lease.renew_as_guardian(TfState::Dead, self.orders.take(), self.context.tree);
    }

    /// Sends the one interrupt of a first stop to every process to which `tf` would have sent it.
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

    /// Releases the locks that terraform has left.
    fn clean_up(&mut self, ended: Option<Ended>) -> CleanedUp {
        let GuardianContext { run, tree, recorder, record, entry, stop, lease, .. } = &mut self.context;
        let mut log = recorder.read().clone();
        if ended == Some(Ended::Exited(0)) && !stop.was_forced() {
            log.ended_well();
        }
        let has_no_log = recorder.is_closed() && record.as_ref().is_some_and(|record| record.terraform.is_some());
        let survivor_record = RefCell::new(|processes| write_survivors(*entry, record.as_mut(), processes));
        let after = AfterRun {
            context: run,
            tree,
            end: stop.end_of_run(ended, false),
            log: &log,
            reached: &self.reached,
            has_no_log,
            survivor_record: &survivor_record,
        };
        let candidates = run.candidates_after().with_plan(&run.planned_backends);
        let ending = after.judge(&&candidates);
        let may_hold = ending.may_have_left_a_lock(&log);
        if let Some(lease) = lease.as_mut() {
            lease.end_at(CleanupPoint::Judged { has_died: ending.died, may_hold }, ended, tree);
        }
        if !may_hold {
            return CleanedUp::default();
        }
        if !run.release {
            // The locks must only be reported, and nobody reads the messages of the guardian. So the next `tf` reports
            // them.
            let kept: Vec<String> = log.unreleased().map(|lock| lock.id.clone()).collect();
            if let Some(lease) = lease {
                let withdrawal = lease.withdraw_or_remember(&kept, run.journal(), &mut Waiter::Unattended);
                lease.end_at(CleanupPoint::CleanedUp(withdrawal), ended, tree);
            }
            let unfinished = Unfinished {
                locks: log.unreleased().cloned().collect(),
                unnamed: log.unreleased_unnamed().cloned().collect(),
                elsewhere: ending.non_s3,
                unlogged: ending.log_state == LogState::NeverBegun,
                replaced: Vec::new(),
            };
            return CleanedUp { unfinished, may_still_work: after.may_still_work(&Permission::NameOnly) };
        }
        let (fence, waiter) = (run_lease::fence_of(lease.as_deref()), &mut Waiter::Unattended);
        let permission = after.permission(ending, &candidates, By::Guardian, fence, waiter);
        if let Some(lease) = lease.as_mut() {
            let may_release = matches!(permission, Permission::Release);
            lease.end_at(CleanupPoint::TreeEnded { may_release }, ended, tree);
        }
        let may_still_work = after.may_still_work(&permission);
        let left = after.clean_up(ending, &candidates, (By::Guardian, permission), &mut SilentReporter, waiter);
        if let Some(lease) = lease {
            // If the promise stays, nobody reads what the guardian says about it.
            let withdrawal = lease.withdraw_or_remember(&left.kept_on_purpose, run.journal(), waiter);
            lease.end_at(CleanupPoint::CleanedUp(withdrawal), ended, tree);
        }
        CleanedUp { unfinished: left.unfinished, may_still_work }
    }
}

/// The result of [`GuardianProcess::clean_up`].
#[derive(Debug, Default)]
struct CleanedUp {
    /// The work that is left for the next `tf`.
    unfinished: Unfinished,
    /// See [`AfterRun::may_still_work`].
    may_still_work: bool,
}

/// Writes the processes that may outlive terraform to the journal, if they have changed. Without a lock, no later `tf`
/// needs them, so they are not written.
fn write_survivors(entry: Option<&JournalEntry>, record: Option<&mut JournalRecord>, processes: Vec<(i32, u64)>) {
    let (Some(entry), Some(record)) = (entry, record) else { return };
    if record.tree.survivors != processes {
        record.tree.survivors = processes;
        let _ = if record.log.may_hold() { entry.write(record, Durability::Processes) } else { Ok(()) };
    }
}

/// Sends SIGINT to the process group `group`, whose leader is `terraform`. On Linux, the signal never reaches a later
/// group with the same number. Linux before 6.9 and macOS cannot signal a group through a handle. There, this opens
/// each member, checks that the handle refers to the same process, and signals it. Returns an error if terraform itself
/// cannot be signalled.
fn interrupt_group(terraform: &ProcessHandle, group: Pid) -> io::Result<()> {
    if terraform.signal_group(Signal::SIGINT).is_ok() {
        return Ok(());
    }
    for member in Process::all().into_iter().filter(|member| member.group == group && member.pid != group) {
        let Ok(held) = ProcessHandle::open(member.pid) else { continue };
        let is_same = Process::look_up(member.pid).is_some_and(|now| (now.start, now.group) == (member.start, group));
        // As long as terraform has not exited, no other group can have the number of its group.
        if is_same && !terraform.has_exited() {
            let _ = held.signal(Signal::SIGINT);
        }
    }
    terraform.signal(Signal::SIGINT)
}
