//! Ends the lease of a run, and withdraws the promise of a lock that stays.

use std::os::fd::AsFd;

use super::RunLease;
use crate::cleanup::process_tree::{GroupFence, Tree};
use crate::cleanup::waiter::Waiter;
use crate::crash_point;
use crate::journal::runs::Journal;
use crate::lease::fence::{CleanupPoint, Withdrawal, ends_at};
use crate::lease::record::Promise;
use crate::supervise::keeper::{Inherited, Keeper, Orders};
use crate::sys::wait::Ended;
use crate::trace::trace;

impl RunLease {
    /// Ends the renewals, because terraform has ended. The keeper has ended when this returns, so that no renewal comes
    /// between a read and a delete of the lock. The fence stays: a process that terraform has started may still work.
    pub(crate) fn end_renewals(&mut self) {
        self.was_stopped_at_end = self.has_stopped();
        self.keepers.let_go();
        crash_point::reached("lease: told the keeper");
        self.keepers.end();
        crash_point::reached("lease: ended the renewals");
    }

    /// Ends the lease ([`Self::end`]) if its fence ends at this point of the cleanup.
    pub(crate) fn end_at(&mut self, point: CleanupPoint, ended: Option<Ended>, tree: &Tree) {
        if ends_at(point) {
            self.end(ended, tree);
        }
    }

    /// Ends the lease, because terraform has ended and no process that it has started needs the fence. `ended` is how it
    /// ended, `None` if that is unknown. A second call does nothing.
    ///
    /// If terraform died while it was stopped for its lease, or if the fence has stopped its group after its death,
    /// another run may have its lock by now, and the processes that terraform has started must not run again. But the
    /// end of the fence continues the group, for a process that terraform has started on purpose. So this kills them
    /// before that. A terraform that exited by itself was not stopped then.
    pub(super) fn end(&mut self, ended: Option<Ended>, tree: &Tree) {
        let has_died = !matches!(ended, Some(Ended::Exited(_)));
        if has_died && std::mem::take(&mut self.was_stopped_at_end) {
            tree.kill_rest();
        }
        crash_point::reached("lease: ends");
        self.let_go_after(|| {
            if has_died {
                tree.kill_rest();
            }
        });
        self.keepers.end();
        self.ending_fuses.wait();
        crash_point::reached("lease: ended");
    }

    /// Ends the lease, because its lock is gone or never had a lease. Does not wait for the keeper and the fuses,
    /// because the caller has to handle signals. A late renewal fails, because its lock is gone.
    pub(super) fn let_go(&mut self) {
        self.let_go_after(|| {});
    }

    /// As [`Self::let_go`]. Calls `before_continuing` before a group that the fence has stopped is continued.
    pub(super) fn let_go_after(&mut self, before_continuing: impl FnOnce()) {
        self.keepers.let_go();
        crash_point::reached("lease: told the keeper");
        // The guardian must not renew it either.
        self.has_new_orders |= self.orders.is_some() && !self.is_over;
        (self.stopped, self.is_over) = (None, true);
        self.lift_bar();
        if let Some(mut fence) = self.fence.take() {
            self.ending_fuses = fence.end(self.group, before_continuing);
        }
    }

    /// Withdraws the promise if the lock of the lease is one of `kept`, the locks that the cleanup keeps on purpose
    /// ([`Self::withdraw`]). If that fails, `journal` remembers these locks, because a later run on this host knows
    /// better than the lease.
    pub(crate) fn withdraw_or_remember(
        &mut self,
        kept: &[String],
        journal: Option<&Journal>,
        waiter: &mut Waiter<'_>,
    ) -> Withdrawal {
        let withdrawal = self.withdraw(|id| kept.iter().any(|kept| kept == id), waiter);
        if withdrawal == Withdrawal::Failed
            && let Some(journal) = journal
        {
            for id in kept {
                journal.kept_locks().add(id);
            }
        }
        withdrawal
    }

    /// Withdraws the promise of the lock of the lease if the run has ended and the lock stays on purpose. Otherwise its
    /// lease would lapse, and another host would take the lock without asking. The lease of a lock that only could not
    /// be released may lapse: its run is dead. Call this after the cleanup. `stays` says whether the lock with an ID
    /// was kept on purpose. A SIGINT ends the wait for it.
    pub(super) fn withdraw(&mut self, stays: impl Fn(&str) -> bool, waiter: &mut Waiter<'_>) -> Withdrawal {
        // Even if no keeper has reported a renewal: the report may not have been read before terraform ended.
        let is_promised = |orders: &Orders| orders.may_promise || orders.fence == Promise::Stop;
        let handle = self.ensure_handle();
        let Some(mut orders) = self.orders.take().filter(is_promised) else { return Withdrawal::Done };
        if !stays(&orders.lock) {
            return Withdrawal::NoLock;
        }
        let (Ok(()), Some(terraform)) = (handle, &self.terraform) else { return Withdrawal::Failed };
        (orders.fence, orders.withdraws) = (Promise::None, true);
        match Keeper::start(&orders, &Inherited { fence: None, terraform: terraform.as_fd(), kill_write_end: None }) {
            Ok(keeper) => {
                trace!("the promise of the lease is being withdrawn");
                crash_point::reached("lease: withdraws");
                let withdrawal = keeper.withdrawal(waiter);
                crash_point::reached("lease: withdrawn");
                withdrawal
            }
            Err(error) => {
                trace!("no keeper: {error}");
                Withdrawal::Failed
            }
        }
    }
}
