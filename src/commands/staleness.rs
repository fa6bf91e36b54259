//! Which locks somebody must look at.

use std::time::Duration;

use jiff::Timestamp;

use super::found::{FoundLock, ListedEntry};
use crate::holder::evidence::Verdict;
use crate::holder::host::HostView;

/// When a lock counts as stale.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Staleness {
    /// Only what is older than this counts, and then also a lock of whose holder nothing is known. Age alone proves
    /// nothing, so such a lock is not released by anybody; but somebody must look. Without it: what is dead or likely dead.
    pub(super) older_than: Option<Duration>,
}

impl Staleness {
    /// Whether a lock that was judged is stale. One that does not tell its age may have any: its Created is no time, or lies
    /// in the future.
    fn is_met_by(self, lock: &FoundLock, now: Timestamp) -> bool {
        match self.older_than {
            None => lock.verdict().is_stale(),
            Some(limit) => {
                let older = lock.age(now).is_none_or(|age| age > limit);
                lock.verdict() != Verdict::Alive && older
            }
        }
    }

    /// Judges every lock, and whether it is stale. To be called with a host that was looked at after they were read.
    pub(super) fn judge(self, entries: &mut [ListedEntry], host: &HostView) {
        let now = Timestamp::now();
        for entry in entries {
            if let ListedEntry::Lock(lock) = entry {
                lock.judgement = host.judge(&lock.info);
                lock.stale = self.is_met_by(lock, now);
            }
        }
    }
}
