//! What happens to a terraform that the kernel has stopped for its lease, until it goes on or is killed.

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::{LeaseEffect, RunLease, Stopped};
use crate::cleanup::process_tree::Tree;
use crate::crash_point;
use crate::lease::fence::{FenceStep, Look, StopCause, StoppedRun, are_requests_aborted, next_step, stop_cause};
use crate::lease::running_time::RunningTime;
use crate::supervise::fence::{self, Fence};
use crate::sys::boot_clock;
use crate::sys::connections::{self, Barred};
use crate::sys::detached::Parent;
use crate::sys::process::Process;
use crate::trace::trace;

impl RunLease {
    /// Whether the kernel has stopped terraform, and it was not continued since.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.is_some() || self.fence.as_ref().is_some_and(|fence| self.orders.is_some() && fence.is_blown())
    }

    /// Whether the fuse is gone. The guardian does not know the rest of [`RunLease::is_stopped`].
    pub(crate) fn is_blown(&self) -> bool {
        self.fence.as_ref().is_some_and(Fence::is_blown)
    }

    /// Notes that `tf` got a SIGCONT.
    pub(crate) fn note_continue(&mut self) {
        self.continued = Some(boot_clock::now());
    }

    /// Stops terraform's group again, in case somebody else has continued a member of it since the kernel has stopped
    /// it. Returns whether its leader was running. Call this again and again while [`RunLease::is_stopped`].
    pub(crate) fn stop_again(&mut self) -> bool {
        let has_run = self.is_stopped() && self.stop_group_again();
        if has_run && let Some(stopped) = &mut self.stopped {
            // It may have opened a connection.
            stopped.is_cut = false;
        }
        has_run
    }

    /// Notes a report of the kernel that terraform was stopped. Somebody else may have continued it after
    /// [`RunLease::stop_again`] had looked, and before it sent its SIGSTOP. Then only this report shows that terraform
    /// has run, and may have opened a connection.
    pub(crate) fn note_stop_report(&mut self) {
        if let Some(stopped) = &mut self.stopped {
            stopped.is_cut = false;
        }
    }

    pub(super) fn stop_group_again(&self) -> bool {
        let Some(group) = self.group else { return false };
        let leader = Process::look_up(group);
        let runs = leader.is_some_and(|leader| !matches!(leader.state, 'T' | 't' | 'Z' | 'X'));
        // It is sent whatever the state of the processes is: terraform runs until it arrives, and to look at all of
        // them takes longer than terraform may need for a request. A process that is stopped keeps it, until a SIGCONT
        // discards it.
        let _ = killpg(group, Signal::SIGSTOP);
        runs
    }

    /// Notes that the fuse is gone and the kernel has stopped terraform. `effects` are those of the reports from before
    /// that.
    pub(super) fn note_stop(&mut self, effects: &mut Vec<LeaseEffect>) {
        trace!("the fuse is gone, and terraform is stopped");
        crash_point::reached("lease: knows of the stop");
        // Then terraform does not go on, and what has stopped it does not matter.
        let is_to_be_killed = effects.iter().any(|effect| matches!(effect, LeaseEffect::Kill(_)));
        self.stopped = Some(Stopped {
            time: RunningTime::since(boot_clock::now()),
            is_rearmed: false,
            can_rearm: true,
            is_renewed: false,
            interrupts: 0,
            look: if is_to_be_killed { Look::Lost } else { Look::Unknown },
            is_cut: false,
        });
        self.reported = None;
        let cause = stop_cause(self.has_killed_fuse, boot_clock::now(), self.deadline.map(|deadline| deadline.at));
        self.is_stopped_in_time = cause == StopCause::Deadline && self.loss.is_none();
        if !is_to_be_killed {
            effects.push(LeaseEffect::Stopped(cause));
        }
        self.keepers.hurry();
    }

    pub(super) fn step_while_stopped(&mut self, has_person: bool) -> Vec<LeaseEffect> {
        let mut effects = Vec::new();
        loop {
            let Some(stopped) = &mut self.stopped else { return effects };
            let stopped_for = stopped.time.advance(boot_clock::now());
            let run = StoppedRun {
                is_rearmed: stopped.is_rearmed,
                can_rearm: stopped.can_rearm,
                is_renewed: stopped.is_renewed,
                has_person,
                interrupts: stopped.interrupts,
                stopped_for,
            };
            let step = next_step(self.terms, stopped.look, run);
            let fence = self.fence.as_mut();
            match (step, fence, &mut self.stopped) {
                (FenceStep::Rearm, Some(fence), Some(stopped)) => match fence.rearm() {
                    Ok(fuse) => {
                        trace!("a new fuse holds the stop pipe");
                        crash_point::reached("lease: has a new fuse");
                        (stopped.is_rearmed, stopped.is_renewed) = (true, false);
                        self.fuse_silences = 0;
                        effects.extend(fuse.map(LeaseEffect::NewHelper));
                        self.keepers.hurry();
                    }
                    Err(error) => {
                        trace!("no new fuse: {error}");
                        stopped.can_rearm = false;
                    }
                },
                // The keeper renews by itself.
                (FenceStep::Renew | FenceStep::LookAgain | FenceStep::Rearm, ..) => return effects,
                (FenceStep::RenewWithoutFence, ..) => {
                    effects.extend(self.renew_without_fence().map(LeaseEffect::NewHelper));
                    return effects;
                }
                (FenceStep::Continue, ..) => {
                    effects.push(LeaseEffect::Continue);
                    return effects;
                }
                (FenceStep::End(reason), ..) => {
                    effects.push(LeaseEffect::Kill(reason));
                    return effects;
                }
            }
        }
    }

    /// Continues terraform after [`LeaseEffect::Continue`]. Returns false if it stays stopped.
    pub(crate) fn go_on(&mut self, tree: &Tree) -> bool {
        let Some(stopped) = self.stopped.take() else { return false };
        (self.is_stopped_in_time, self.has_killed_fuse) = (false, false);
        self.lift_bar();
        match &self.fence {
            Some(fence) if stopped.is_rearmed => {
                crash_point::reached("lease: may continue");
                // Without the kill pipe, nothing would kill terraform after the death of `tf` and the fuse.
                let is_given = fence.give_kill_pipe().is_ok();
                crash_point::reached("lease: sent the kill pipe");
                // If the fuse has died meanwhile, its socket keeps the kill pipe until the next fuse is armed. No spare
                // fuse is forked until then: its copy of the socket would keep the pipe after the death of `tf`.
                if !is_given || !self.continue_group() {
                    self.stopped = Some(Stopped { is_rearmed: false, is_renewed: false, is_cut: false, ..stopped });
                    return false;
                }
            }
            _ => {
                // The group is continued first. If `tf` died between the two, a group that is stopped would stay so.
                if let Some(group) = self.group {
                    let _ = killpg(group, Signal::SIGCONT);
                }
                self.take_down();
            }
        }
        trace!("the lease is renewed, and terraform goes on");
        crash_point::reached("lease: has continued");
        self.fork_spare().into_iter().for_each(|pid| tree.exclude(pid));
        crash_point::reached("lease: has a new spare fuse");
        true
    }

    /// Forks the spare of the fuse that is in use now. Terraform goes on meanwhile, so the short time in which the
    /// forked process holds a write end can only delay a stop, and only if the fuse dies in it.
    pub(super) fn fork_spare(&mut self) -> Option<Pid> {
        if self.stopped.is_some() {
            return None;
        }
        let spare = self.fence.as_mut()?.fork_spare(Parent::Us);
        spare.inspect_err(|error| trace!("no spare fuse: {error}")).ok().flatten()
    }

    /// Ends the lease of a lock that terraform has released. If what runs on is stopped, the caller must continue it.
    pub(super) fn released(&mut self) -> Option<LeaseEffect> {
        if self.stopped.is_some() {
            return Some(LeaseEffect::ContinueWithoutLock);
        }
        self.let_go();
        None
    }

    /// Continues what is stopped after [`LeaseEffect::ContinueWithoutLock`]. Returns false if nothing is.
    pub(crate) fn go_on_without_lock(&mut self) -> bool {
        let is_stopped = self.stopped.is_some();
        if is_stopped {
            self.is_stopped_in_time = false;
            self.let_go();
        }
        is_stopped
    }

    /// Continues terraform's group, unless the kernel has stopped it and its lock was not looked at since. Every
    /// SIGCONT of `tf` to that group goes through here, because a SIGCONT discards a pending stop. Returns whether it was
    /// continued.
    pub(crate) fn continue_group(&self) -> bool {
        let Some(group) = self.group.filter(|_| self.stopped.is_none()) else { return false };
        fence::continue_group(self.fence.as_ref(), group)
    }

    /// Notes a ^C. If terraform is stopped, returns how often a person has pressed it since the stop. `None` if it is
    /// not stopped.
    pub(crate) fn note_key(&mut self) -> Option<u8> {
        let stopped = self.stopped.as_mut()?;
        stopped.interrupts = stopped.interrupts.saturating_add(1);
        Some(stopped.interrupts)
    }

    /// Kills the fuse, so that terraform stays stopped until the keeper has looked at the lock, which may be lost. If
    /// that is not possible (there is no fence, or the fuse is not a child of this process), the keeper renews at once,
    /// and that shows the loss.
    pub(crate) fn stop_for_look(&mut self) {
        if self.orders.is_none() || self.is_over {
            return;
        }
        if self.kill_fuse() {
            trace!("terraform stays stopped until the lock was looked at");
        } else {
            self.keepers.hurry();
        }
    }

    /// Kills the fuse, if there is one, and notes that it was this process. Returns false if it cannot be killed.
    pub(super) fn kill_fuse(&mut self) -> bool {
        let was_blown = self.is_blown();
        let is_killed = self.fence.as_ref().is_some_and(Fence::kill_fuse);
        self.has_killed_fuse |= is_killed && !was_blown;
        is_killed
    }

    /// Keeps terraform from sending anything more, until it is killed.
    pub(super) fn cut_off(&self) {
        if let Some(group) = self.group {
            let _ = killpg(group, Signal::SIGSTOP);
        }
        self.abort_requests();
    }

    /// Breaks off what the stopped terraform had sent, if it must not arrive any more.
    pub(super) fn abort_requests_if_due(&mut self) {
        let Some(stopped) = &mut self.stopped else { return };
        let stopped_for = stopped.time.advance(boot_clock::now());
        if !stopped.is_cut && are_requests_aborted(self.terms, stopped.look, self.reason.is_some(), stopped_for) {
            stopped.is_cut = true;
            self.bar();
            self.abort_requests();
        }
    }

    /// Keeps terraform from opening a connection to its backend until it goes on. If another process continues it, it
    /// runs until `tf` has stopped it again. That takes about a millisecond, and terraform may need less for a write of
    /// its state, if its lock is in another service than its state, or the network is back. The connections that it has
    /// are broken off.
    ///
    /// Only `tf` does this, because the guardian does not know when terraform goes on. If `tf` dies before terraform
    /// goes on, terraform is killed, so it never runs on like this.
    pub(super) fn bar(&mut self) {
        let Some((orders, terraform)) = self.orders.as_ref().zip(self.terraform.as_ref()) else { return };
        if self.barred.is_none() && !self.is_shim_watched && !terraform.has_exited() {
            self.barred = Barred::new(Pid::from_raw(orders.terraform));
            trace!("terraform can open a connection: {}", self.barred.is_none());
        }
    }

    /// Undoes [`RunLease::bar`]. Call this before terraform is continued, and before `tf` gives the kill pipe to a new
    /// fuse: from then on terraform survives the death of `tf`.
    pub(super) fn lift_bar(&mut self) {
        let Some(barred) = self.barred.take() else { return };
        // The pid of a process that has exited may be that of another one.
        if !self.is_shim_watched && self.terraform.as_ref().is_some_and(|terraform| !terraform.has_exited()) {
            barred.lift();
        }
    }

    /// Breaks off what terraform had sent to its backend: the kernel sends it again and again, while terraform is
    /// stopped and even after it was killed. Terraform's core has no other connections. Those of its providers are left
    /// alone, because not every provider can repeat a request. Terraform itself repeats its requests, if it goes on.
    pub(super) fn abort_requests(&self) {
        if let (Some(orders), Some(terraform)) = (&self.orders, &self.terraform) {
            let count = connections::abort(Pid::from_raw(orders.terraform), terraform);
            trace!("{count} connections of terraform were broken off");
        }
    }
}
