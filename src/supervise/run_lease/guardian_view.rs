//! What the guardian does with the lease: it has a keeper of its own while `tf` is suspended, and after the death of `tf`.

use std::os::fd::RawFd;

use nix::unistd::Pid;

use super::{LockPhase, RunLease, TfState};
use crate::cleanup::process_tree::Tree;
use crate::crash_point;
use crate::lease::fence::{Loss, LossStep, PhaseAtLoss, guardians_loss_step};
use crate::supervise::fence::Fence;
use crate::supervise::keeper::{Orders, Report};
use crate::supervise::keepers::News;
use crate::sys::process::ProcessHandle;
use crate::trace::trace;

impl RunLease {
    /// Makes this the guardian's view of the lease. Call this first in the guardian's process.
    pub(crate) fn become_guardians(&mut self) {
        if let Some(fence) = &mut self.fence {
            fence.become_guardians();
        }
    }

    /// Returns the descriptors that the guardian must keep.
    pub(crate) fn guardian_descriptors(&self) -> impl Iterator<Item = RawFd> {
        self.fence.as_ref().map(Fence::guardian_descriptors).into_iter().flatten()
    }

    /// Starts a keeper with the orders of `tf`, which is dead or suspended. Only the guardian calls this.
    pub(crate) fn renew_as_guardian(&mut self, tf: TfState, orders: Option<Orders>, tree: &Tree) {
        self.tf = tf;
        // A pid alone could be that of a later process.
        let terraform = orders.as_ref().map(|orders| Pid::from_raw(orders.terraform));
        let logs = terraform.filter(|terraform| tree.logging().iter().any(|process| process.pid == *terraform));
        self.is_shim_watched = logs.is_none();
        // If it is not found, the keepers watch the leader ([`RunLease::ensure_handle`]).
        self.terraform = logs.and_then(|terraform| ProcessHandle::open(terraform).ok());
        self.orders = orders;
        self.keepers.let_go();
        if let Some(orders) = &mut self.orders {
            // A keeper of `tf` may have stored one since `tf` has sent these orders.
            orders.may_have_a_record = true;
        }
        crash_point::reached("lease: the guardian takes over");
        self.start_keeper();
        crash_point::reached("lease: the guardian started a keeper");
    }

    /// Lets go of the keeper of [`RunLease::renew_as_guardian`], because `tf` has gone on. Only the guardian calls this.
    pub(crate) fn end_as_guardian(&mut self) {
        self.keepers.let_go();
        (self.orders, self.terraform, self.loss, self.reads_in_unlock) = (None, None, None, 0);
    }

    /// Whether another run is known to hold the lock, or to have claimed it. `phase` as in [`RunLease::step`].
    pub(crate) fn is_known_to_be_lost(&self, phase: impl FnOnce(&str) -> LockPhase) -> bool {
        let is_anothers = self.loss.as_ref().is_some_and(|loss| *loss != Loss::Gone);
        is_anothers && self.orders.as_ref().is_some_and(|orders| phase(&orders.lock) == LockPhase::Held)
    }

    /// Replaces a keeper that has died or does not answer. Only the guardian calls this, after [`RunLease::renew_as_guardian`].
    /// `phase` as in [`RunLease::step`]. Returns whether the lock is lost and terraform must be killed: it writes its
    /// state even after an interrupt. Until then, it is stopped. A lock that is only gone does not kill it, as under
    /// [`RunLease::step`]; the fuse ends it at its deadline.
    pub(crate) fn step_as_guardian(&mut self, mut phase: impl FnMut(&str) -> LockPhase) -> bool {
        let mut is_lost = false;
        while let Some(news) = self.keepers.hear() {
            trace!("guardian: the keeper: {news:?}");
            match news {
                // If `tf` is dead, terraform is interrupted anyway. If it is suspended, it interrupts terraform when it
                // goes on, because of a notice of its own keeper. Until then, the record must not say that.
                News::Report(Report::Notice(notice)) if self.tf == TfState::Dead => {
                    self.note_notice(notice);
                }
                News::Report(Report::Lost(loss)) => {
                    let phase = self.orders.as_ref().map(|orders| phase(&orders.lock));
                    let phase = phase.map(|phase| match phase {
                        // While `tf` is suspended, it decides itself when it goes on whether the unlock is over.
                        LockPhase::Unlocking { .. } if self.tf == TfState::Suspended => PhaseAtLoss::Unlocking,
                        phase => self.phase_at_loss(phase, Some(&loss)),
                    });
                    match phase.map(|phase| guardians_loss_step(phase, loss == Loss::Gone)) {
                        Some(LossStep::Kill) => {
                            self.cut_off();
                            is_lost = true;
                        }
                        Some(LossStep::Release) => self.let_go(),
                        _ => {}
                    }
                    self.loss = Some(loss);
                }
                News::Report(Report::NoLease(_)) => {
                    self.keepers.let_go();
                    self.orders = None;
                }
                News::Report(_) | News::Failing(_) => {}
            }
        }
        if self.keepers.is_restart_due() {
            crash_point::reached("lease: the guardian replaces its keeper");
            self.start_keeper();
            crash_point::reached("lease: the guardian replaced its keeper");
        }
        is_lost
    }

    /// Does the same as [`RunLease::stop_again`], in the guardian, while `tf` is suspended.
    pub(crate) fn stop_again_as_guardian(&self) {
        if self.is_blown() && self.stop_group_again() {
            trace!("guardian: terraform was continued by another process, and is stopped again");
        }
    }
}
