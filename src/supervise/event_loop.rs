//! Watching one terraform from its start to its end.
//!
//! One loop, one thread, one poll(2). Signals come through a descriptor, and each becomes at most one effect on
//! terraform: [`crate::supervise::stop`] decides about those that ask for an end, [`crate::supervise::foreground`] keeps the terminal.

use crate::console;
use crate::supervise::routing::Circumstances;
use crate::supervise::routing::Route;
use crate::supervise::routing::TerraformGroup;
use crate::supervise::routing::route;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::poll::PollFlags;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, getppid};

use crate::cleanup::messages;
use crate::cleanup::process_tree::Tree;
use crate::cleanup::run_context::RunContext;
use crate::journal::recorder::Recorder;
use crate::supervise::foreground::{Foreground, ForegroundControl};
use crate::supervise::pipes::{Pipes, Progress};
use crate::supervise::run_record::RunRecord;
use crate::supervise::shim;
use crate::supervise::stop::{Effect, Stop, StopEvent, THIRD_KEY_WINDOW};
use crate::supervise::waiting::Waiting;
use crate::sys::group_signal_watcher::GroupSignalWatcher;
use crate::sys::poll;
use crate::sys::process::{self, Process};
use crate::sys::signals::{Arrival, Signals};
use crate::sys::wait::{self, Ended};
use crate::trace::trace;

/// How long terraform may take to act on a SIGTSTP before we stop without it: a program may ignore that signal.
const STOP_TIMEOUT: Duration = Duration::from_secs(1);

/// How often a terraform that stops again and again, for a terminal that nobody can give it, is continued.
const CONTINUE_INTERVAL: Duration = Duration::from_millis(5);

/// Between two looks at who below terraform has left its process group: some ten files a process.
const DESCENDANTS_INTERVAL: Duration = Duration::from_secs(1);

/// How long a service manager may take from the first process of a unit to the last, when it stops all of them.
const UNIT_STOP_WINDOW: Duration = Duration::from_millis(250);

/// Everything that one supervised run needs.
pub(crate) struct Supervision<'a> {
    pub(crate) terraform: Pid,
    pub(crate) context: &'a RunContext<'a>,
    /// What is done about a lock that terraform waits for, where something may be.
    pub(crate) waiting: Option<&'a mut Waiting>,
    pub(crate) group: TerraformGroup,
    pub(crate) signals: &'a mut Signals,
    pub(crate) stop: &'a mut Stop,
    pub(crate) foreground: ForegroundControl,
    pub(crate) pipes: &'a mut Pipes,
    pub(crate) recorder: &'a mut Recorder,
    pub(crate) tree: &'a Tree,
    pub(crate) run_record: &'a mut RunRecord,
    /// Readable when our parent has ended, where that means that nobody is left to tell us.
    pub(crate) parent: Option<OwnedFd>,
    /// SIGCHLD came: something below us stopped or ended, and may be an orphan to take away.
    pub(crate) children_changed: bool,
    /// What we started has ended, and a terraform that it led to works on.
    pub(crate) outlived: bool,
    /// Until when the guardian may tell that the stop which a service manager has asked for went to all of its unit.
    pub(crate) unit_stop: Option<Instant>,
    /// When the first interrupt was sent, in clock ticks since boot, and the terraforms behind a shim that have had theirs.
    pub(crate) interrupted: Option<(u64, Vec<Pid>)>,
}

/// Our parent and a descriptor for its end, where that is to be taken for a request to stop: in CI, unless we were
/// meant to outlive it (`&`, nohup, setsid).
///
/// Never PR_SET_PDEATHSIG: that fires when the *thread* that started us ends, and runners start from thread pools.
pub(crate) fn parent_to_watch(ci: bool, signals: &Signals, has_terminal: bool) -> Option<(Pid, OwnedFd)> {
    let inherited = signals.inherited();
    let leads_session = nix::unistd::getsid(None).is_ok_and(|session| session == nix::unistd::getpid());
    if !ci || inherited.ignores(Signal::SIGINT) || inherited.ignores(Signal::SIGHUP) || (leads_session && !has_terminal)
    {
        return None;
    }
    let parent = getppid();
    let watched = process::open_pidfd(parent).ok()?;
    // Had it ended before it was opened, the number could already be another's.
    (parent.as_raw() > 1 && getppid() == parent).then_some((parent, watched))
}

impl Supervision<'_> {
    /// Watches until terraform has ended. It stays a zombie.
    pub(crate) fn watch(&mut self) -> Ended {
        let mut continue_at: Option<Instant> = None;
        let started = Instant::now();
        let mut read_at = started;
        let mut look_at = started + DESCENDANTS_INTERVAL;
        loop {
            while let Some(arrival) = self.signals.next() {
                self.arrived(arrival);
            }
            self.hear_witness();
            if let Some(ended) = wait::ended(self.terraform)
                && !self.is_outlived(ended)
            {
                trace!("terraform ended: {ended:?}");
                return ended;
            }
            if std::mem::take(&mut self.children_changed) {
                let group_signal_watcher = self.foreground.group_signal_watcher().map(GroupSignalWatcher::pid);
                self.tree.reap_orphans(group_signal_watcher.as_slice());
            }
            if let Some(signal) = wait::stopped(self.terraform)
                && let Stopped::ContinueSoon = self.stopped(signal)
            {
                continue_at = Some(Instant::now() + CONTINUE_INTERVAL);
            }
            let now = Instant::now();
            if continue_at.is_some_and(|at| at <= now) {
                continue_at = None;
                let _ = killpg(self.terraform, Signal::SIGCONT);
            }
            if read_at <= now {
                self.recorder.read();
                self.run_record.news(self.recorder);
                self.interrupt_next_terraform();
                if look_at <= now {
                    self.run_record.note_outside_group(self.tree.outside_group(), self.recorder);
                    look_at = now + DESCENDANTS_INTERVAL;
                }
                read_at = now + self.recorder.interval(now - started);
                if let Some(waiting) = &mut self.waiting {
                    waiting.step(self.recorder.log(), &self.context.candidates, self.tree);
                }
            }
            if self.foreground.deadline().is_some_and(|at| at <= now) {
                self.foreground.look();
            }
            if self.unit_stop.is_some_and(|until| until <= now) {
                // The guardian got none: it was meant for us alone (KillMode=mixed or process, systemd.kill(5)).
                self.unit_stop = None;
                self.asked(StopEvent::Request);
            }
            self.asked(StopEvent::Time);

            let deadline = [
                self.unit_stop,
                continue_at,
                Some(read_at),
                self.foreground.deadline(),
                self.stop.deadline().and_then(|since_begun| self.context.begun.checked_add(since_begun)),
            ];
            let timeout = match deadline.into_iter().flatten().min() {
                _ if self.signals.is_queued() => Some(Duration::ZERO),
                at => at.map(|at| at.saturating_duration_since(Instant::now())),
            };
            self.wait(timeout);
        }
    }

    /// What we started has ended, and the terraform that it led to lives and works: that is waited for as if it were what we
    /// started, and told to stop if its shim died. A shim that ended by itself may have left it on purpose, or not: where
    /// it holds a lock, what we would do after it must not be done before.
    fn is_outlived(&mut self, ended: Ended) -> bool {
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
        let charge_at = awaited.len();
        let run_record = self.run_record.awaited();
        awaited.extend(run_record.map(|guardian| (guardian, PollFlags::POLLIN)));
        let ready = poll::wait(&awaited, timeout);
        let guardian_speaks = ready.get(charge_at) == Some(&true);
        if self.pipes.step(&ready[pipes_from..pipes_to]) == Progress::ReaderGone {
            trace!("the reader of our output is gone");
            self.asked(StopEvent::ReaderGone);
        }
        if has_parent && ready[1] {
            self.parent = None;
            self.asked(StopEvent::ParentGone);
        }
        if guardian_speaks && self.run_record.hear(self.recorder) {
            self.unit_stop = None;
            self.asked(StopEvent::RequestToAll);
        }
    }

    fn arrived(&mut self, arrival: Arrival) {
        let Arrival { signal, origin, sender } = arrival;
        if signal != Signal::SIGCHLD {
            trace!("got {signal} from {origin:?}");
        }
        let circumstances = Circumstances {
            group: self.group,
            was_ignored: self.signals.inherited().ignores(signal),
            may_be_for_unit: self.may_be_for_all(sender),
        };
        match route(signal, origin, circumstances) {
            Route::Ask(event) => self.asked(event),
            Route::AskGuardian => {
                self.unit_stop.get_or_insert(Instant::now() + UNIT_STOP_WINDOW);
            }
            Route::Suspend => self.suspend(),
            Route::NoteStoppedReader => self.foreground.note_stopped_ours(),
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

    /// Whether a TERM from `sender` may have gone to every process of our unit, terraform among them. A service manager's does
    /// (KillMode=control-group, systemd.kill(5)), and so does its kill(-1) at shutdown. Terraform would take ours for a
    /// second interrupt and leave with its lock held.
    ///
    /// What terraform got cannot be seen. But the guardian is in the same control group, so it got the same: it tells.
    fn may_be_for_all(&self, sender: Option<Pid>) -> bool {
        !self.stop.was_interrupted()
            && self.run_record.awaited().is_some()
            && sender.is_some_and(process::is_service_manager)
    }

    fn hear_witness(&mut self) {
        let Some(group_signal_watcher) = self.foreground.group_signal_watcher() else { return };
        for signal in group_signal_watcher.received() {
            trace!("the terminal sent {signal} to terraform");
            if signal == Signal::SIGINT {
                self.asked(StopEvent::KeyboardAtTerraform);
                // A second key is for us to count, whatever modes the first has left behind.
                self.foreground.reclaim_foreground();
            }
        }
    }

    /// Puts `event` to [`Stop`] and does what it says.
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
                // In our own group are others than terraform's.
                Effect::InterruptGroup if self.group == TerraformGroup::Shared => self.interrupt_terraform(),
                // A key goes to every process of a foreground group.
                Effect::InterruptGroup if !self.tree.is_behind_a_shim() => {
                    let _ = killpg(self.terraform, Signal::SIGINT);
                }
                Effect::InterruptGroup => self.interrupt_behind_shim(event == StopEvent::Keyboard),
                Effect::InterruptTerraform => self.interrupt_terraform(),
                Effect::Kill(_) => self.tree.kill(),
                Effect::SayStopping(since) => {
                    let holds = self.recorder.read().unreleased().any(|lock| lock.progress.held.is_some());
                    console::say(&messages::stopping(since, THIRD_KEY_WINDOW, holds));
                }
                Effect::SayForcing => console::say(&messages::forcing()),
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

    /// `is_key`: as a key of the terminal does it, to the shims as well.
    fn interrupt_behind_shim(&mut self, is_key: bool) {
        let recorder = self.tree.recorder();
        let moment = process::ticks_since_boot().unwrap_or(u64::MAX);
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
        // It is a zombie of ours, so the number is its group's. No shim is left there to pass the interrupt on.
        let _ = killpg(self.terraform, Signal::SIGINT);
        for process in self.tree.orphaned_terraforms().iter().filter(|process| process.group != self.terraform) {
            let _ = kill(process.pid, Signal::SIGINT);
        }
    }

    /// A shim may start one terraform after the other (`init`, then `apply`), or its first one after the stop was asked for. Each
    /// gets its one interrupt.
    fn interrupt_next_terraform(&mut self) {
        let Some((moment, had)) = &mut self.interrupted else { return };
        let recorder = self.tree.recorder();
        let Some((next, _)) = shim::behind(self.terraform, recorder) else { return };
        let is_new = Process::look_up(next).is_some_and(|process| process.start >= *moment);
        if is_new && !had.contains(&next) {
            had.push(next);
            shim::interrupt_group(self.terraform, recorder);
        }
    }

    /// Stops `tf` as [`Signals::stop`] says. The guardian knows of it: should terraform be killed meanwhile, nobody else
    /// would continue us.
    fn stop_ourselves(&mut self, signal: Signal, whole_group: bool) -> bool {
        self.run_record.stands_still(true, self.recorder);
        let stopped = self.signals.stop(signal, whole_group);
        self.run_record.stands_still(false, self.recorder);
        stopped
    }

    /// ^Z, or a SIGTSTP from somewhere: terraform stops, and then we.
    fn suspend(&mut self) {
        if self.group == TerraformGroup::Own {
            self.foreground.reclaim_foreground();
            let _ = killpg(self.terraform, Signal::SIGTSTP);
            let begun = Instant::now();
            while wait::stopped(self.terraform).is_none()
                && wait::ended(self.terraform).is_none()
                && begun.elapsed() < STOP_TIMEOUT
            {
                // The signalfd is readable as soon as SIGCHLD tells of the stop, but also as long as anything else is
                // queued in it: a short sleep in poll keeps that from spinning.
                poll::wait(&[], Some(Duration::from_millis(1)));
            }
        }
        // In an orphaned group, and as leader of a session, the kernel discards our stop: nobody could continue us.
        // Bare terraform goes on there as well.
        let stopped = self.stop_ourselves(Signal::SIGTSTP, false);
        trace!("stopped: {stopped}");
        let _ = killpg(self.terraform, Signal::SIGCONT);
    }

    /// Terraform was stopped by `signal`.
    fn stopped(&mut self, signal: Signal) -> Stopped {
        trace!("terraform was stopped by {signal}");
        match signal {
            _ if self.group == TerraformGroup::Shared => {
                // The terminal stopped our whole group; for us it is blocked, and made good here.
                self.stop_ourselves(signal_to_stop_with(signal), false);
            }
            Signal::SIGTTIN | Signal::SIGTTOU => return self.wants_terminal(signal),
            _ => {
                // ^Z while the terminal was lent is for the whole job; a `kill -STOP terraform` is for terraform, and
                // its stop is passed up so that a shell can tell its user and `fg` can mend it.
                let key = signal == Signal::SIGTSTP && self.foreground.is_lent();
                self.foreground.reclaim_foreground();
                let stopped = self.stop_ourselves(Signal::SIGTSTP, key);
                if stopped || key {
                    let _ = killpg(self.terraform, Signal::SIGCONT);
                }
            }
        }
        Stopped::Handled
    }

    fn wants_terminal(&mut self, signal: Signal) -> Stopped {
        match self.foreground.foreground() {
            Foreground::Terraforms => {
                let _ = killpg(self.terraform, Signal::SIGCONT);
                return Stopped::Handled;
            }
            Foreground::Ours if self.foreground.give_foreground() => return Stopped::Handled,
            Foreground::Others if self.stop_ourselves(signal, true) => {
                // `fg` has made us the foreground, or `bg` has not: then terraform will stop again, and so shall we.
                if self.foreground.foreground() != Foreground::Ours || !self.foreground.give_foreground() {
                    let _ = killpg(self.terraform, Signal::SIGCONT);
                }
                return Stopped::Handled;
            }
            // Background, and the kernel would not stop us: an orphaned group. Or no terminal any more.
            Foreground::Ours | Foreground::Others | Foreground::Gone => {}
        }
        self.asked(StopEvent::NobodyCanAnswer);
        Stopped::ContinueSoon
    }
}

/// What is still to be done about a stop.
enum Stopped {
    Handled,
    /// Continue terraform in a moment, as often as it stops.
    ContinueSoon,
}

/// Never SIGSTOP for ourselves: nothing discards that where nobody can continue us.
fn signal_to_stop_with(signal: Signal) -> Signal {
    if signal == Signal::SIGSTOP { Signal::SIGTSTP } else { signal }
}
