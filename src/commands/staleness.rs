//! Decides which locks need attention.

use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use jiff::Timestamp;

use super::found::{FoundLock, ListedEntry};
use crate::holder::evidence::Verdict;
use crate::holder::host::HostView;
use crate::holder::witness;

/// When a lock counts as stale.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Staleness {
    /// The age limit. With a limit, a lock is stale if it is older than the limit and its holder is not known to be
    /// alive. Age alone proves nothing, so `tf` does not release such a lock, but a person must look at it. Without a
    /// limit (`None`), a lock is stale if its holder is dead or likely dead.
    pub(super) older_than: Option<Duration>,
    /// How old an answer of the witness may be to be used again. With zero, the witness is asked about each lock that is
    /// judged.
    pub(super) age_of_answers: Duration,
}

impl Staleness {
    /// Returns whether a judged lock is stale. If the lock's `Created` is not a time, or is in the future, the lock
    /// counts as older than any limit.
    fn is_met_by(self, lock: &FoundLock) -> bool {
        match self.older_than {
            None => lock.verdict().is_stale(),
            Some(limit) => {
                let older = lock.age(Timestamp::now()).is_none_or(|age| age > limit);
                lock.verdict() != Verdict::Alive && older
            }
        }
    }

    /// Judges the holder of every lock, and whether the lock is stale. `host` must be a view from after the locks were
    /// read: in an earlier view, the process of a lock that was acquired in between would be missing.
    pub(super) fn judge(self, entries: &mut [ListedEntry], host: &HostView) {
        for entry in entries {
            if let ListedEntry::Lock(lock) = entry {
                lock.judgement = Some(host.judge(&lock.info, lock.lease.as_deref()));
                lock.stale = self.is_met_by(lock);
            }
        }
    }

    /// Asks the witness about each judged lock whose holder is not settled, and judges again whether the lock is stale.
    pub(super) async fn ask_witness(self, entries: &mut [ListedEntry]) {
        if !witness::is_set() {
            return;
        }
        let locks = entries.iter_mut().filter_map(|entry| match entry {
            ListedEntry::Lock(lock) => Some(&mut **lock),
            ListedEntry::UnreadableLock(_) => None,
        });
        let asked = stream::iter(locks).for_each_concurrent(witness::MAX_AT_ONCE, |lock| self.ask_about(lock));
        asked.await;
    }

    /// Asks the witness about one judged lock, as [`Self::ask_witness`].
    pub(super) async fn ask_about(self, lock: &mut FoundLock) {
        let judgement = lock.judgement().clone();
        lock.judgement =
            Some(Arc::new(witness::ask(judgement, &lock.info, lock.lease.as_deref(), self.age_of_answers).await));
        lock.stale = self.is_met_by(lock);
    }
}
