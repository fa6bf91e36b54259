//! Watches one terraform from its start until it has exited.
//!
//! One loop in one thread waits with one poll(2). Signals are read from a descriptor. Each signal has at most one
//! effect on terraform. [`crate::supervise::routing`] decides what `tf` does with a signal. [`crate::supervise::stop`]
//! decides which effects a request to stop has. [`crate::supervise::foreground`] controls which process group is the
//! foreground group.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, getppid};

use crate::cleanup::messages;
use crate::cleanup::process_tree::Tree;
use crate::cleanup::run_context::RunContext;
use crate::console;
use crate::journal::recorder::Recorder;
use crate::lease::notice::{Notice, NoticeSight, NoticeStep, notice_step};
use crate::supervise::awake::Awake;
use crate::supervise::foreground::{Foreground, ForegroundControl};
use crate::supervise::guardian::Suspension;
use crate::supervise::pipes::{Pipes, Progress};
use crate::supervise::routing::{Circumstances, Route, TerraformGroup, route};
use crate::supervise::run_lease::{Followed, LeaseEffect, LockPhase, RunLease};
use crate::supervise::run_record::{GuardianNews, RunRecord};
use crate::supervise::shim;
use crate::supervise::stop::{Effect, Stop, StopEvent, THIRD_KEY_WINDOW};
use crate::supervise::waiting::Waiting;
use crate::sys::group_signal_watcher::GroupSignalWatcher;
use crate::sys::process::{self, Process, ProcessHandle};
use crate::sys::signals::{Arrival, Signals};
use crate::sys::terminal::Terminal;
use crate::sys::wait::{self, Ended};
use crate::sys::{boot_clock, poll};
use crate::trace::trace;

/// How long terraform may take to stop after a SIGTSTP. After that, `tf` stops even if terraform has not stopped,
/// because a program may ignore that signal.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// How long `tf` waits before it continues a terraform that was stopped because it needs the terminal, if `tf` cannot
/// make terraform's group the foreground group. `tf` waits because terraform may be stopped again at once.
const CONTINUE_INTERVAL: Duration = Duration::from_millis(5);

/// How often to check which processes below terraform have left its process group. A check reads about ten files for
/// each process.
const DESCENDANTS_INTERVAL: Duration = Duration::from_secs(1);

/// How long a service manager that stops a unit may take to signal all processes of the unit.
const UNIT_STOP_WINDOW: Duration = Duration::from_millis(250);

/// The data that are needed to watch one run.
pub(crate) struct Supervision<'a> {
    pub(crate) terraform: Pid,
    pub(crate) context: &'a RunContext<'a>,
    /// What is done while terraform waits for a lock.
    pub(crate) waiting: &'a mut Waiting,
    pub(crate) group: TerraformGroup,
    pub(crate) signals: &'a mut Signals,
    pub(crate) stop: &'a mut Stop,
    pub(crate) foreground: ForegroundControl,
    pub(crate) pipes: &'a mut Pipes,
    pub(crate) recorder: &'a mut Recorder,
    pub(crate) tree: &'a Tree,
    pub(crate) run_record: &'a mut RunRecord,
    pub(crate) awake: Awake,
    /// The lease of the run's lock. `None` without `TFW_LEASE`.
    pub(crate) lease: Option<&'a mut RunLease>,
    /// Whether this is a CI job ([`crate::settings::Settings::ci`]).
    pub(crate) is_ci: bool,
    /// Readable when the parent of `tf` has exited. `None` if that exit is not a request to stop, if the parent cannot
    /// be watched, or if the exit has been handled.
    pub(crate) parent: Option<ProcessHandle>,
    /// Whether a SIGCHLD has arrived: a child has stopped or exited, and may be an orphan that must be reaped.
    pub(crate) children_changed: bool,
    /// Whether the shim that `tf` started has exited while the terraform behind it is still running.
    pub(crate) outlived: bool,
    /// Until when to wait for the guardian's report that a service manager has sent SIGTERM to all processes of the
    /// unit. `tf` waits after it got a SIGTERM from a service manager. `None` if `tf` does not wait for such a report.
    pub(crate) unit_stop: Option<Instant>,
    /// When the first interrupt was sent, in clock ticks since boot, and the terraforms behind a shim that have got an
    /// interrupt. `None` until the first interrupt is sent to a running shim or to the terraform behind it.
    pub(crate) interrupted: Option<(u64, Vec<Pid>)>,
}

/// Returns the pid of the parent, and a descriptor that becomes readable when the parent has exited. `None` if the exit
/// of the parent is not a request to stop, or if the parent cannot be watched. The exit is a request to stop only in
/// CI, and only if this process was not started to outlive its parent (`&`, nohup, setsid).
///
/// PR_SET_PDEATHSIG is not used: the kernel sends its signal when the *thread* that started this process exits, and
/// runners start processes from thread pools.
pub(crate) fn parent_to_watch(
    is_ci: bool,
    signals: &Signals,
    terminal: Option<&Terminal>,
) -> Option<(Pid, ProcessHandle)> {
    let inherited = signals.inherited();
    let start = Start {
        is_ci,
        ignores_interrupt: inherited.ignores(Signal::SIGINT),
        ignores_hangup: inherited.ignores(Signal::SIGHUP),
        leads_session: nix::unistd::getsid(None).is_ok_and(|session| session == nix::unistd::getpid()),
        has_terminal: terminal.is_some(),
    };
    if !start.depends_on_parent() {
        return None;
    }
    let parent = getppid();
    let watched = ProcessHandle::open(parent).ok()?;
    // If the parent had exited before the descriptor was opened, the descriptor could refer to another process with the
    // same pid.
    (parent.as_raw() > 1 && getppid() == parent).then_some((parent, watched))
}

/// How `tf` was started.
#[derive(Clone, Copy, Debug)]
struct Start {
    is_ci: bool,
    /// Whether SIGINT was ignored (`&` in a script).
    ignores_interrupt: bool,
    /// Whether SIGHUP was ignored (nohup).
    ignores_hangup: bool,
    /// Whether this process is the leader of its session (setsid).
    leads_session: bool,
    has_terminal: bool,
}

impl Start {
    /// Whether the exit of the parent is a request to stop.
    fn depends_on_parent(self) -> bool {
        // The leader of a session with a terminal is a program that the terminal itself runs.
        let is_detached = self.leads_session && !self.has_terminal;
        self.is_ci && !self.ignores_interrupt && !self.ignores_hangup && !is_detached
    }
}

impl Supervision<'_> {
    /// Watches terraform until it has exited, and returns how it ended. Terraform is not reaped, so it remains a
    /// zombie.
    pub(crate) fn watch(&mut self) -> Ended {
        let mut continue_at: Option<Instant> = None;
        let started = Instant::now();
        let mut read_at = started;
        let mut look_at = started + DESCENDANTS_INTERVAL;
        loop {
            while let Some(arrival) = self.signals.next() {
                self.arrived(arrival);
            }
            self.handle_group_signals();
            if let Some(ended) = wait::ended(self.terraform)
                && !self.keeps_waiting_behind_shim(ended)
            {
                trace!("terraform ended: {ended:?}");
                return ended;
            }
            if std::mem::take(&mut self.children_changed) {
                let group_signal_watcher = self.foreground.group_signal_watcher().map(GroupSignalWatcher::pid);
                self.tree.reap_orphans(group_signal_watcher.as_slice());
            }
            self.step_lease();
            if let Some(signal) = wait::stopped(self.terraform)
                && let Stopped::ContinueSoon = self.stopped(signal)
            {
                continue_at = Some(Instant::now() + CONTINUE_INTERVAL);
            }
            let now = Instant::now();
            if continue_at.is_some_and(|at| at <= now) {
                continue_at = None;
                self.continue_group();
            }
            if read_at <= now {
                self.recorder.read();
                self.run_record.news(self.recorder);
                self.awake.step(self.recorder.log(), self.terraform, self.tree);
                self.follow_lease();
                self.interrupt_next_terraform();
                if look_at <= now {
                    self.run_record.note_outside_group(self.tree.outside_group(), self.recorder);
                    look_at = now + DESCENDANTS_INTERVAL;
                }
                read_at = now + self.recorder.interval(now - started);
                self.waiting.step(self.recorder.log(), &self.context.candidates, self.tree);
            }
            // A group that the kernel has stopped for the lease does not need the terminal.
            if self.foreground.deadline().is_some_and(|at| at <= now)
                && !self.is_stopped_for_lease()
                && self.foreground.look()
            {
                self.continue_group();
            }
            if self.unit_stop.is_some_and(|until| until <= now) {
                // The guardian got no SIGTERM, so the signal was sent to `tf` alone (KillMode=mixed or process,
                // systemd.kill(5)), and terraform must be asked to stop.
                self.unit_stop = None;
                self.asked(StopEvent::Request);
            }
            self.asked(StopEvent::Time);

            let deadline = [
                self.lease_deadline(),
                self.unit_stop,
                continue_at,
                Some(read_at),
                self.foreground.deadline().filter(|_| !self.is_stopped_for_lease()),
                self.stop.deadline().and_then(|since_begun| self.context.begun.checked_add(since_begun)),
            ];
            self.wait(timeout(self.signals.is_queued(), &deadline, Instant::now()));
        }
    }

    /// Returns whether `tf` must keep waiting although the shim has ended. `ended` is how the shim ended. True if the
    /// terraform behind the shim is still running, and one of these conditions is met: a signal killed the shim, the
    /// run was interrupted, or the log shows that terraform may hold a lock. In these cases, `tf` watches that
    /// terraform as if `tf` had started it, because the cleanup must not begin before terraform has exited. False in
    /// all other cases: a shim that exits by itself may leave terraform running on purpose.
    ///
    /// If a signal killed the shim and the run was not interrupted before, terraform gets the one interrupt of a first
    /// stop.
    fn keeps_waiting_behind_shim(&mut self, ended: Ended) -> bool {
        if !self.tree.is_behind_a_shim() {
            return false;
        }
        let died = matches!(ended, Ended::Killed(_));
        if !(died || self.stop.was_interrupted() || self.recorder.read().may_hold())
            || self.tree.orphaned_terraforms().is_empty()
        {
            return false;
        }
        if !std::mem::replace(&mut self.outlived, true) {
            trace!("what led to terraform ended: {ended:?}");
            if died && !self.stop.was_interrupted() {
                self.asked(StopEvent::ParentGone);
            }
        }
        true
    }

    fn wait(&mut self, timeout: Option<Duration>) {
        let mut awaited = vec![(self.signals.as_fd(), PollFlags::POLLIN)];
        let parent = self.parent.as_ref().map(|parent| (parent.as_fd(), PollFlags::POLLIN));
        let has_parent = parent.is_some();
        awaited.extend(parent);
        let pipes_from = awaited.len();
        awaited.extend(self.pipes.awaited());
        let pipes_to = awaited.len();
        awaited.extend(
            self.foreground
                .group_signal_watcher()
                .map(|group_signal_watcher| (group_signal_watcher.as_fd(), PollFlags::POLLIN)),
        );
        let guardian_at = awaited.len();
        let run_record = self.run_record.awaited();
        let has_guardian = run_record.is_some();
        awaited.extend(run_record.map(|guardian| (guardian, PollFlags::POLLIN)));
        // The events of the lease are handled in each round of the loop.
        awaited.extend(self.lease.iter().flat_map(|lease| lease.awaited()).map(|end| (end, PollFlags::POLLIN)));
        let ready = poll::wait(&awaited, timeout);
        let has_guardian_message = has_guardian && ready.get(guardian_at) == Some(&true);
        if self.pipes.step(&ready[pipes_from..pipes_to]) == Progress::ReaderGone {
            trace!("the reader of our output is gone");
            self.asked(StopEvent::ReaderGone);
        }
        if has_parent && ready[1] {
            self.parent = None;
            self.asked(StopEvent::ParentGone);
        }
        if has_guardian_message {
            self.hear_guardian();
        }
        if self.run_record.late_stop.take_continue() && self.lease.is_some() {
            self.continue_group();
        }
    }

    /// Handles what the guardian has reported, without waiting.
    fn hear_guardian(&mut self) {
        while let Some(news) = self.run_record.hear(self.recorder) {
            match news {
                GuardianNews::UnitIsStopped => {
                    self.unit_stop = None;
                    self.asked(StopEvent::RequestToAll);
                }
                GuardianNews::LockIsLost => {
                    if let Some(lease) = &mut self.lease {
                        lease.stop_for_look();
                    }
                }
            }
        }
    }

    fn arrived(&mut self, arrival: Arrival) {
        let Arrival { signal, origin, sender } = arrival;
        if signal != Signal::SIGCHLD {
            trace!("got {signal} from {origin:?}");
        }
        if signal == Signal::SIGCONT
            && let Some(lease) = &mut self.lease
        {
            lease.note_continue();
        }
        let circumstances = Circumstances {
            group: self.group,
            was_ignored: self.signals.inherited().ignores(signal),
            may_be_for_unit: self.may_be_for_all(sender),
        };
        match route(signal, origin, circumstances) {
            Route::Ask(StopEvent::Keyboard) => {
                if let Some(keys) = self.lease.as_mut().and_then(|lease| lease.note_key()) {
                    console::say(&messages::lease::key_while_stopped(keys));
                    self.asked(StopEvent::KeyboardWhileStopped);
                } else {
                    self.asked(StopEvent::Keyboard);
                }
            }
            Route::Ask(event) => self.asked(event),
            Route::AskGuardian => {
                self.unit_stop.get_or_insert(Instant::now() + UNIT_STOP_WINDOW);
            }
            Route::Suspend => self.suspend(),
            Route::NoteStoppedReader => self.foreground.note_stopped_ours(),
            Route::PassToGroup if signal == Signal::SIGCONT => self.continue_group(),
            Route::PassToGroup => {
                let _ = killpg(self.terraform, signal);
            }
            Route::PassToTerraform => {
                let _ = kill(self.terraform, signal);
            }
            Route::LookAtChildren => self.children_changed = true,
            Route::Ignore => {}
        }
    }

    /// Returns whether a SIGTERM from `sender` may have been sent to every process of the unit, including terraform.
    /// False if the run was interrupted before, if there is no guardian, or if `sender` is not a service manager. A
    /// service manager signals all processes when it stops the unit (KillMode=control-group, systemd.kill(5)), and with
    /// kill(-1) at shutdown. If `tf` sent an interrupt as well, terraform would count that interrupt as the second one,
    /// and would exit with its lock held.
    ///
    /// `tf` cannot see which signals terraform got. But the guardian is in the same control group, so it gets the same
    /// signal and reports it to `tf`.
    fn may_be_for_all(&self, sender: Option<Pid>) -> bool {
        !self.stop.was_interrupted()
            && self.run_record.awaited().is_some()
            && sender.is_some_and(process::is_service_manager)
    }

    /// Handles the signals that the terminal has sent to terraform's group, as the [`GroupSignalWatcher`] reports them.
    fn handle_group_signals(&mut self) {
        let Some(group_signal_watcher) = self.foreground.group_signal_watcher() else { return };
        for signal in group_signal_watcher.received() {
            trace!("the terminal sent {signal} to terraform");
            if signal == Signal::SIGINT {
                self.asked(StopEvent::KeyboardAtTerraform);
                // The next ^C must reach `tf` and not terraform, because terraform would count it as a second
                // interrupt. So `tf` reclaims the foreground even if the terminal's modes are not restored yet.
                self.foreground.reclaim_foreground();
            }
        }
    }

    /// Passes `event` to [`Stop`] and carries out the effects that it returns.
    fn asked(&mut self, event: StopEvent) {
        let effects = self.stop.decide(event, self.context.begun.elapsed());
        if event != StopEvent::Time {
            self.run_record.note(event, self.recorder);
        }
        if !effects.is_empty() {
            trace!("{event:?}: {effects:?}");
        }
        for effect in effects {
            match effect {
                // With a shared group, `killpg` would also signal `tf` and the processes of the caller. So only
                // terraform is interrupted.
                Effect::InterruptGroup if self.group == TerraformGroup::Shared => self.interrupt_terraform(),
                // The whole group gets the interrupt, as the terminal would send it for a ^C.
                Effect::InterruptGroup if !self.tree.is_behind_a_shim() => {
                    let _ = killpg(self.terraform, Signal::SIGINT);
                }
                Effect::InterruptGroup => {
                    self.interrupt_behind_shim(matches!(event, StopEvent::Keyboard | StopEvent::KeyboardWhileStopped));
                }
                Effect::InterruptTerraform => self.interrupt_terraform(),
                Effect::Kill(_) => self.tree.kill(),
                Effect::SayStopping(since) => {
                    let holds = self.recorder.read().unreleased().any(|lock| lock.progress.held.is_some());
                    console::say(&messages::run::stopping(since, THIRD_KEY_WINDOW, holds));
                }
                Effect::SayForcing => console::say(&messages::run::forcing()),
            }
        }
    }

    fn interrupt_terraform(&self) {
        let orphaned_terraforms = self.tree.orphaned_terraforms();
        if wait::ended(self.terraform).is_none() || orphaned_terraforms.is_empty() {
            shim::signal(self.terraform, Signal::SIGINT, self.tree.recorder());
        } else {
            for process in orphaned_terraforms {
                let _ = kill(process.pid, Signal::SIGINT);
            }
        }
    }

    /// Sends the one interrupt of a first stop to a terraform behind a shim. If `is_key` is true, the cause is a ^C at
    /// the terminal. In this case, the shims get the interrupt too, because the terminal would have sent it to them.
    fn interrupt_behind_shim(&mut self, is_key: bool) {
        let recorder = self.tree.recorder();
        let moment = process::start_clock().unwrap_or(u64::MAX);
        if wait::ended(self.terraform).is_none() {
            let terraform = if is_key {
                let terraform = shim::behind(self.terraform, recorder).map(|(terraform, _)| terraform);
                let _ = killpg(self.terraform, Signal::SIGINT);
                terraform
            } else {
                shim::interrupt_group(self.terraform, recorder)
            };
            self.interrupted = Some((moment, terraform.into_iter().collect()));
            return;
        }
        // The shim that `tf` started is a zombie child of this process, so no other process group can have the number
        // of its group. No running shim is left in that group, so no shim can pass the interrupt on to terraform a
        // second time.
        let _ = killpg(self.terraform, Signal::SIGINT);
        for process in self.tree.orphaned_terraforms().iter().filter(|process| process.group != self.terraform) {
            let _ = kill(process.pid, Signal::SIGINT);
        }
    }

    /// Interrupts a terraform that a shim has started since the stop was requested. A shim may start several terraforms
    /// one after the other (`init`, then `apply`), or start its first one only after the request. Each terraform gets
    /// one interrupt.
    fn interrupt_next_terraform(&mut self) {
        let Some((moment, had)) = &mut self.interrupted else { return };
        let recorder = self.tree.recorder();
        let Some((next, _)) = shim::behind(self.terraform, recorder) else { return };
        let started = Process::look_up(next).map(|process| process.start);
        if !had.contains(&next) && was_started_since(started, *moment) {
            had.push(next);
            shim::interrupt_group(self.terraform, recorder);
        }
    }

    /// Stops this process with [`Signals::stop`]. First reports the stop to the guardian. If terraform exits while this
    /// process is stopped, the guardian continues this process, because no other process would. It does so too if
    /// somebody continues terraform, provided that `with` says that terraform is stopped now. Then handles what has
    /// happened to the lease meanwhile. Returns true after this process was continued, and false if the kernel
    /// discarded the stop.
    fn stop_ourselves(&mut self, signal: Signal, whole_group: bool, with: Suspension) -> bool {
        self.run_record.report_suspension(with, self.recorder);
        let stopped = self.signals.stop(signal, whole_group);
        self.run_record.report_suspension(Suspension::Over, self.recorder);
        // The caller continues terraform. If the lock was lost meanwhile, terraform must stay stopped.
        self.hear_guardian();
        self.step_lease();
        stopped
    }

    /// Handles a ^Z, or a SIGTSTP from a process: stops terraform, and then this process.
    fn suspend(&mut self) {
        let mut with = Suspension::Alone;
        if self.group == TerraformGroup::Own {
            self.foreground.reclaim_foreground();
            let _ = killpg(self.terraform, Signal::SIGTSTP);
            let begun = Instant::now();
            loop {
                if wait::stopped(self.terraform).is_some() {
                    with = Suspension::WithTerraform;
                    break;
                }
                if wait::ended(self.terraform).is_some() || begun.elapsed() >= STOP_TIMEOUT {
                    break;
                }
                // This loop does not wait for the signalfd to become readable. The signalfd stays readable as long as
                // any signal is queued in it, so such a wait could become a busy loop.
                poll::wait(&[], Some(Duration::from_millis(1)));
            }
        }
        // In an orphaned process group, and for a session leader, the kernel discards the stop of this process, because
        // no process could continue it. In this case, terraform is continued at once. A terraform without `tf` would
        // not stop there either.
        let stopped = self.stop_ourselves(Signal::SIGTSTP, false, with);
        trace!("stopped: {stopped}");
        self.continue_group();
    }

    /// Continues terraform's group. With a lease, the group stays stopped if the kernel has stopped it for the lease.
    fn continue_group(&self) {
        match &self.lease {
            Some(lease) => {
                lease.continue_group();
            }
            None => {
                let _ = killpg(self.terraform, Signal::SIGCONT);
            }
        }
    }

    /// Makes terraform's group the foreground group and continues it. Returns whether it is the foreground group now.
    fn give_foreground(&mut self) -> bool {
        let is_given = self.foreground.give_foreground();
        if is_given {
            self.continue_group();
        }
        is_given
    }

    /// Begins the lease when terraform holds a lock, and ends it when that lock is gone.
    fn follow_lease(&mut self) {
        let Some(lease) = &mut self.lease else { return };
        // The lock may be in a backend that only the plan names.
        let candidates = || self.context.candidates.clone().with_plan(&self.context.planned_backends);
        match lease.follow(self.recorder.log(), candidates, self.tree) {
            Followed::Nothing => {}
            Followed::Begun => self.run_record.tell_lease(lease.orders(), self.recorder),
            Followed::NoLease(reason) => console::say(&messages::lease::no_lease(&reason)),
        }
        if let Some(lock) = lease.lock_without_lease(self.recorder.log()) {
            console::say(&messages::lease::lock_without_lease(&lock.path));
        }
    }

    /// Whether the kernel has stopped terraform because of its lease.
    fn is_stopped_for_lease(&self) -> bool {
        self.lease.as_ref().is_some_and(|lease| lease.is_stopped())
    }

    fn lease_deadline(&self) -> Option<Instant> {
        let at = self.lease.as_ref()?.deadline()?;
        Some(Instant::now() + at.saturating_sub(boot_clock::now()))
    }

    /// Reads what has happened to the lease, and does what follows from it.
    fn step_lease(&mut self) {
        let Some(lease) = &mut self.lease else { return };
        // This is needed only while terraform is stopped.
        let has_person = lease.is_stopped() && has_person(self.is_ci, self.foreground.foreground());
        if lease.stop_again() {
            // Somebody else has continued terraform: `kill -CONT`, or a service manager with its SIGTERM.
            trace!("terraform was continued by another process, and is stopped again");
        }
        let recorder = &mut *self.recorder;
        let phase = |id: &str| LockPhase::of(id, recorder.read());
        for effect in lease.step(has_person, phase) {
            trace!("lease: {effect:?}");
            match effect {
                LeaseEffect::Stopped(cause) => {
                    self.foreground.take_from_stopped();
                    console::say(&messages::lease::lease_stopped(cause, has_person));
                }
                LeaseEffect::CannotRenew(reason) => console::say(&messages::lease::cannot_renew(&reason)),
                LeaseEffect::Continue => {
                    self.foreground.give_back_to_stopped();
                    if self.lease.as_mut().is_some_and(|lease| lease.go_on(self.tree)) {
                        self.run_record.late_stop.continued();
                        console::say(messages::lease::lease_continued());
                    } else {
                        self.foreground.take_from_stopped();
                    }
                }
                LeaseEffect::ContinueWithoutLock => {
                    self.foreground.give_back_to_stopped();
                    if self.lease.as_mut().is_some_and(|lease| lease.go_on_without_lock()) {
                        self.run_record.late_stop.continued();
                        console::say(messages::lease::released_while_stopped());
                    }
                }
                LeaseEffect::Interrupt(trouble) => {
                    console::say(&messages::lease::lease_interrupts(&trouble));
                    if !self.is_being_asked() {
                        self.asked(StopEvent::LeaseEnds);
                    }
                }
                LeaseEffect::HostEnds(notice) => self.host_ends(notice),
                LeaseEffect::Kill(reason) => self.asked(StopEvent::LeaseEnded(reason)),
                LeaseEffect::NewHelper(pid) => self.tree.exclude(pid),
                LeaseEffect::KeepersFail(how) => console::say(&messages::lease::keepers_fail(&how)),
                LeaseEffect::NoLease(reason) => console::say(&messages::lease::no_lease(&reason)),
            }
        }
        if let Some(lease) = &mut self.lease
            && lease.take_new_orders()
        {
            self.run_record.tell_lease(lease.orders(), self.recorder);
        }
    }

    /// Whether `tf` waits for the guardian's report about a SIGTERM of a service manager. Terraform may have got that
    /// signal too. Then an interrupt would be its second one. Within [`UNIT_STOP_WINDOW`], terraform has got one
    /// interrupt in every case.
    fn is_being_asked(&self) -> bool {
        self.unit_stop.is_some()
    }

    /// Handles a notice that this host is about to end.
    fn host_ends(&mut self, notice: Notice) {
        let step = notice_step(NoticeSight {
            is_interrupted: self.stop.was_interrupted() || self.stop.was_forced(),
            is_being_asked: self.is_being_asked(),
            is_stopped: self.is_stopped_for_lease(),
        });
        console::say(&messages::lease::host_ends(notice, step));
        if step != NoticeStep::SayOnly {
            self.asked(StopEvent::HostEnds);
        }
    }

    /// Handles a stop of terraform by `signal`. Returns what remains to be done.
    fn stopped(&mut self, signal: Signal) -> Stopped {
        trace!("terraform was stopped by {signal}");
        if let Some(lease) = self.lease.as_mut().filter(|lease| lease.is_stopped()) {
            lease.note_stop_report();
            // The pipe says whose stop it was, and not the signal. This stop is no ^Z, so `tf` does not stop itself.
            return Stopped::Handled;
        }
        if signal == Signal::SIGSTOP && self.lease.is_some() && self.run_record.late_stop.is_possible(boot_clock::now())
        {
            // The guardian's answer continues the group.
            return Stopped::Handled;
        }
        match stop_reaction(self.group, signal) {
            StopReaction::StopWith(signal) => {
                // The terminal stopped the whole group. The signal is blocked in this process, so this process must
                // stop itself here.
                self.stop_ourselves(signal, false, Suspension::WithTerraform);
            }
            StopReaction::GiveTerminal => return self.wants_terminal(signal),
            StopReaction::StopJob => {
                // A ^Z while terraform's group is the foreground group must stop the whole job. After a `kill -STOP` of
                // terraform, `tf` stops too, so that a shell can report the stop to its user and `fg` can continue
                // both.
                let key = signal == Signal::SIGTSTP && self.foreground.terraform_has_foreground();
                self.foreground.reclaim_foreground();
                let stopped = self.stop_ourselves(Signal::SIGTSTP, key, Suspension::WithTerraform);
                if stopped || key {
                    self.continue_group();
                } else {
                    self.run_record.late_stop.keep_stopped();
                }
            }
        }
        Stopped::Handled
    }

    /// Handles a stop of terraform by `signal` (SIGTTIN or SIGTTOU): a process of its group needs the terminal.
    fn wants_terminal(&mut self, signal: Signal) -> Stopped {
        match self.foreground.foreground() {
            Foreground::Terraforms => {
                self.continue_group();
                return Stopped::Handled;
            }
            Foreground::Ours if self.give_foreground() => return Stopped::Handled,
            Foreground::Others if self.stop_ourselves(signal, true, Suspension::WithTerraform) => {
                // Terraform needs no terminal while it is stopped for its lease. It asks again when it goes on.
                if self.is_stopped_for_lease() {
                    return Stopped::Handled;
                }
                // The shell has continued `tf`. With `fg`, the group of `tf` is now the foreground group. With `bg` it
                // is not, so terraform stops again when it needs the terminal, and `tf` stops with it.
                if self.foreground.foreground() != Foreground::Ours || !self.give_foreground() {
                    self.continue_group();
                }
                return Stopped::Handled;
            }
            // Either `tf` is in the background and the kernel did not stop it, because its group is orphaned, or the
            // terminal is gone. Nobody can answer terraform's prompt.
            Foreground::Ours | Foreground::Others | Foreground::Gone => {}
        }
        self.asked(StopEvent::NobodyCanAnswer);
        Stopped::ContinueSoon
    }
}

/// Whether a person at the terminal can end a terraform that is stopped for its lease, by pressing ^C. Some CI systems
/// give a job a terminal, but no person types there.
fn has_person(is_ci: bool, foreground: Foreground) -> bool {
    !is_ci && matches!(foreground, Foreground::Ours | Foreground::Terraforms)
}

/// What remains to be done after a stop of terraform.
enum Stopped {
    Handled,
    /// Terraform must be continued after [`CONTINUE_INTERVAL`].
    ContinueSoon,
}

/// Returns how long to wait for the next event. `deadlines` are the moments at which something is due. Zero if a signal
/// `is_queued`, because the descriptor of the signals is not readable then. `None` if nothing is due.
fn timeout(is_queued: bool, deadlines: &[Option<Instant>], now: Instant) -> Option<Duration> {
    if is_queued {
        return Some(Duration::ZERO);
    }
    deadlines.iter().flatten().min().map(|at| at.saturating_duration_since(now))
}

/// Whether a process was started at `moment` or later, in clock ticks since boot. `started` is its start, or `None` if
/// the process does not exist any more.
fn was_started_since(started: Option<u64>, moment: u64) -> bool {
    started.is_some_and(|started| started >= moment)
}

/// What `tf` does when terraform was stopped by a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum StopReaction {
    /// Stop this process with the signal, because terraform is in its group.
    StopWith(Signal),
    /// Give terraform the terminal that it needs.
    GiveTerminal,
    /// Stop this process too, and then continue terraform.
    StopJob,
}

/// Returns what `tf` does when terraform, which is in `group`, was stopped by `signal`.
fn stop_reaction(group: TerraformGroup, signal: Signal) -> StopReaction {
    match (group, signal) {
        (TerraformGroup::Shared, signal) => StopReaction::StopWith(signal_to_stop_with(signal)),
        (TerraformGroup::Own, Signal::SIGTTIN | Signal::SIGTTOU) => StopReaction::GiveTerminal,
        (TerraformGroup::Own, _) => StopReaction::StopJob,
    }
}

/// Returns the signal with which this process stops itself after terraform was stopped by `signal`. The result is never
/// SIGSTOP, because the kernel does not discard a SIGSTOP in an orphaned process group, where no process could continue
/// this process. The kernel discards a SIGTSTP there.
fn signal_to_stop_with(signal: Signal) -> Signal {
    if signal == Signal::SIGSTOP { Signal::SIGTSTP } else { signal }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_in_ci_and_only_if_not_detached_is_the_exit_of_the_parent_a_request_to_stop() {
        for bits in 0..32_u8 {
            let bit = |place: u8| bits & (1 << place) != 0;
            let start = Start {
                is_ci: bit(0),
                ignores_interrupt: bit(1),
                ignores_hangup: bit(2),
                leads_session: bit(3),
                has_terminal: bit(4),
            };
            let is_started_to_outlive = bit(1) || bit(2) || (bit(3) && !bit(4));
            assert_eq!(start.depends_on_parent(), bit(0) && !is_started_to_outlive, "{start:?}");
        }
    }

    #[test]
    fn the_loop_waits_until_the_first_deadline_and_not_at_all_for_a_signal_that_was_read() {
        let now = Instant::now();
        let at = |milliseconds| Some(now + Duration::from_millis(milliseconds));
        let past = now.checked_sub(Duration::from_secs(1));
        for (is_queued, deadlines, expected) in [
            (false, [None, None], None),
            (false, [at(7), None], Some(7)),
            (false, [at(7), at(3)], Some(3)),
            (false, [at(3), at(7)], Some(3)),
            (false, [past, at(7)], Some(0)),
            (true, [None, None], Some(0)),
            (true, [at(7), None], Some(0)),
        ] {
            let expected = expected.map(Duration::from_millis);
            assert_eq!(timeout(is_queued, &deadlines, now), expected, "{is_queued} {deadlines:?}");
        }
    }

    #[test]
    fn only_a_person_in_the_foreground_of_a_terminal_can_end_a_stopped_terraform_and_no_ci_job_has_one() {
        for foreground in [Foreground::Ours, Foreground::Terraforms, Foreground::Others, Foreground::Gone] {
            let is_ours = matches!(foreground, Foreground::Ours | Foreground::Terraforms);
            assert_eq!(has_person(false, foreground), is_ours, "{foreground:?}");
            assert!(!has_person(true, foreground), "{foreground:?}");
        }
    }

    #[test]
    fn a_terraform_that_was_there_before_the_stop_is_no_new_one() {
        for (started, expected) in [(None, false), (Some(6), false), (Some(7), true), (Some(8), true)] {
            assert_eq!(was_started_since(started, 7), expected, "{started:?}");
        }
        // The moment is unknown: no terraform is interrupted a second time.
        assert!(!was_started_since(Some(8), u64::MAX));
    }

    #[test]
    fn a_stop_of_terraform_gives_it_the_terminal_or_stops_the_job() {
        let stops = [Signal::SIGSTOP, Signal::SIGTSTP, Signal::SIGTTIN, Signal::SIGTTOU];
        for signal in stops {
            let StopReaction::StopWith(with) = stop_reaction(TerraformGroup::Shared, signal) else { panic!() };
            // The kernel discards every one of these in an orphaned process group, except SIGSTOP.
            assert_ne!(with, Signal::SIGSTOP, "{signal}");
            assert!(with == signal || signal == Signal::SIGSTOP, "{signal}");
            let needs_terminal = matches!(signal, Signal::SIGTTIN | Signal::SIGTTOU);
            let expected = if needs_terminal { StopReaction::GiveTerminal } else { StopReaction::StopJob };
            assert_eq!(stop_reaction(TerraformGroup::Own, signal), expected, "{signal}");
        }
    }
}
